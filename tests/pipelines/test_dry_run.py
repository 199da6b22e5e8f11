"""What a call would take, against what it takes: bytes after loading, ticks executed, and the published sizes."""

import gc
import inspect
import json
import math
import re
import shutil
from collections import Counter
from dataclasses import asdict, replace
from functools import cache
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from clips import write_clip
from PIL import Image
from published import write_configs
from safetensors.numpy import load_file, save_file

from jaxwan.convert.files import TensorFiles
from jaxwan.models.tiles import Tiling
from jaxwan.pipelines import load as loading
from jaxwan.pipelines import pipeline as pipeline_module
from jaxwan.pipelines.call import make_job
from jaxwan.pipelines.checkpoint import read_checkpoint
from jaxwan.pipelines.denoise import Denoiser, Loop, Programs
from jaxwan.pipelines.dit import Weights, abstract_weights
from jaxwan.pipelines.dry_run import dry_run, make_report, parameter_bytes, parse_memory
from jaxwan.pipelines.encoders import abstract_entry
from jaxwan.pipelines.load import DTYPES
from jaxwan.pipelines.pipeline import WanPipeline
from jaxwan.pipelines.vae_memory import largest_array, tree_bytes
from jaxwan.sharding.mesh import MeshSpec, make_mesh

GB = 10**9
VAE = 4 * 0.127  # GB of the 2.1 kind in float32


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """name -> checkpoint of full-size configurations."""
    return cache(lambda name: read_checkpoint(write_configs(tmp_path_factory.mktemp("published"), name)))


@pytest.fixture(autouse=True)
def all_memory(monkeypatch):
    """JAX takes all of a device, but where a test says less."""
    monkeypatch.setenv("XLA_CLIENT_MEM_FRACTION", "1.0")
    return monkeypatch


@pytest.fixture(scope="module")
def told(published):
    """name -> the report of a plain call in bfloat16 on four stages of 80 GB."""
    return cache(lambda name: report(published(name)))


def report(checkpoint, mesh=None, dtype="bfloat16", device_memory=80 * GB, **arguments):
    job = make_job(checkpoint, **{"prompt": "a cat"} | arguments)
    return make_report(checkpoint, mesh or MeshSpec(pp=4), job, dtype, "float32", device_memory)


# Against what happens


def resident_bytes(load):
    """(what `load` returns, bytes that it left on each device)."""
    before = {id(array): array for array in jax.live_arrays()}
    loaded = load()
    gc.collect()
    resident = Counter()
    for array in jax.live_arrays():
        if id(array) not in before:
            for shard in array.addressable_shards:
                resident[shard.device.id] += shard.data.nbytes
    return loaded, resident


@pytest.mark.parametrize(
    ("family", "mesh", "dtype", "vae_devices"),
    [
        ("t2v-A14B", "pp=1", "float32", None), ("t2v-A14B", "pp=2", "bfloat16", None),
        ("t2v-A14B", "pp=3", "float32", 1), ("2.1-i2v", "pp=2", "bfloat16", 3),
        ("2.1-i2v", "dp=4", "float32", None), ("t2v-A14B", "dp=2,cfg=2,pp=2", "float32", None),
        ("2.1-flf2v", "pp=2,sp=2,tp=2", "bfloat16", None), ("ti2v-5B", "cfg=2,sp=3", "float32", None),
    ],
)  # fmt: skip
def test_parameter_bytes_are_those_on_each_device_after_loading(monkeypatch, folder, family, mesh, dtype, vae_devices):
    path, count = folder(family), MeshSpec.parse(mesh).num_devices + (vae_devices or 0)
    expected = parameter_bytes(read_checkpoint(path), MeshSpec.parse(mesh), dtype, "float32", vae_devices or 0)
    read, told, read_tensor, count_bytes = {}, [], TensorFiles.read, loading.bytes_to_read

    def counted(files, key, rows):
        assert (*files.paths, key, str(rows)) not in read  # once from disk, however many devices hold it
        tensor = read[*files.paths, key, str(rows)] = read_tensor(files, key, rows)
        return tensor

    monkeypatch.setattr(TensorFiles, "read", counted)
    monkeypatch.setattr(loading, "bytes_to_read", lambda *parts: told.append(count_bytes(*parts)) or told[-1])
    given = dict(vae_devices=vae_devices, progress=False)
    pipe, resident = resident_bytes(lambda: WanPipeline.from_pretrained(path, mesh, dtype, **given))
    assert told == [sum(tensor.nbytes for tensor in read.values())]  # what the bar is as long as
    assert [resident[device.id] for device in jax.devices()[:count]] == expected
    assert sum(resident.values()) == sum(expected)
    assert pipe.checkpoint.folder == path


@pytest.mark.parametrize("steps", [[4, 6, 3], [1, 2, 1]])
def test_ticks_are_those_executed(pipeline, steps):
    pipe, loops = pipeline("t2v-A14B", "pp=2"), []
    arguments = dict(prompt=["a", "b", "c"], num_inference_steps=steps, height=32, width=48, num_frames=5, seed=0)

    def begin(*given):
        loops.append(Loop(*given))
        return loops[-1]

    with mock.patch.object(pipeline_module, "Loop", begin):
        pipe(output_type="latent", **arguments)
    (loop,) = loops
    told = report(pipe.checkpoint, MeshSpec(pp=2), "float32", **arguments)
    assert loop.timetable.tick == told.ticks  # of three videos in a ring with room for four


@pytest.mark.parametrize(
    ("mesh", "arguments"),
    [
        ("pp=1", {"num_inference_steps": 5}),
        ("pp=4", {"num_inference_steps": 5, "guidance_scale": 1.0}),
        ("pp=3", {"prompt": ["a", "b"], "num_inference_steps": [7, 2], "num_videos_per_prompt": 2}),
        ("pp=4", {"prompt": ["a", "b"], "guidance_scale": [1.0, 2.0], "num_inference_steps": 3}),
        ("pp=2", {"video": np.zeros((5, 32, 48, 3), np.uint8), "strength": 0.5, "num_inference_steps": 6}),
        ("pp=3", {"sampler": "renoise", "timesteps": [1000, 500]}),
        ("cfg=2,pp=2", {"num_inference_steps": 5}),
        ("dp=2", {"prompt": ["a", "b", "c"], "guidance_scale": [1.0, 2.0, 3.0], "num_inference_steps": [5, 3, 4]}),
        ("dp=2,cfg=2,pp=2", {"num_videos_per_prompt": 5, "num_inference_steps": 3}),
    ],
)
def test_the_loop_hands_out_as_many_ticks_as_are_told(folder, mesh, arguments):
    """With programs that only count."""
    checkpoint = read_checkpoint(folder("t2v-A14B"))
    size = {"height": 32, "width": 48, "num_frames": 5}
    expected = report(checkpoint, MeshSpec.parse(mesh), **size, **arguments)
    job = make_job(checkpoint, **{"prompt": "a cat"} | size | arguments)
    handed = []
    mesh = make_mesh(MeshSpec.parse(mesh))
    denoiser = Denoiser(checkpoint.transformer, Weights(None, None), mesh, jnp.dtype("float32"))
    counting = dict(empty=mock.DEFAULT, insert=mock.DEFAULT, run=lambda *given: handed.append(given[-1]))
    with mock.patch.multiple(Programs, **counting):
        loop = Loop(denoiser, [abstract_entry(checkpoint, request) for request in job.requests])
        for _ in range(loop.rounds):
            loop.advance()
    plan = loop.timetable.now
    assert sum(handed) == expected.ticks == loop.timetable.tick
    assert min(handed) > 0 and loop.rounds == 0
    assert (expected.microbatches, expected.period) == (sum(p.microbatches for p in plan.plans), plan.period)


def test_source_videos_are_not_decoded(folder, tmp_path, monkeypatch):
    checkpoint, frames = read_checkpoint(folder("2.1-t2v")), np.zeros((12, 48, 64, 3), np.uint8)
    path = write_clip(tmp_path / "clip.mp4", frames)
    monkeypatch.setattr("jaxwan.pipelines.media.videos.Video.count", None)
    for video, num_frames in ((path, 9), (frames, 9), ([path, frames], 5)):
        given = dict(prompt=["a", "b"], video=video, num_frames=None if num_frames == 9 else num_frames)
        assert dry_run(checkpoint, height=32, width=48, **given).num_frames == num_frames


def test_the_largest_array_is_found_inside_loops():
    def function(x):
        def body(carry, _):
            return carry + jnp.outer(x, x).sum(), None

        return jax.lax.scan(body, 0.0, None, length=3)[0]

    assert largest_array(function, jax.ShapeDtypeStruct((50,), jnp.float32)) == 50 * 50


# The published sizes


@pytest.mark.parametrize(
    ("name", "billions", "tokens"),
    [
        ("Wan2.2-T2V-A14B", 14.288, 75_600),
        ("Wan2.2-TI2V-5B", 5.000, 27_280),
        ("Wan2.1-T2V-1.3B", 1.419, 32_760),
        ("Wan2.1-T2V-14B", 14.288, 75_600),
    ],
)
def test_parameters_and_tokens_of_the_published_models(published, name, billions, tokens):
    checkpoint = published(name)
    _, weights = abstract_weights(checkpoint.transformer, 1, 1, jnp.float32)
    assert tree_bytes(weights) / 4e9 == pytest.approx(billions, abs=5e-4)
    d = checkpoint.defaults
    assert checkpoint.geometry.num_tokens(d.num_frames, d.height, d.width) == tokens


def test_a14b_on_four_stages(told):
    told = told("Wan2.2-T2V-A14B")
    assert told.tokens == 75_600
    assert told.layers_per_stage == [10] * 4
    assert told.latent_shape == (21, 90, 160)
    assert (told.microbatches, told.period, told.ticks, told.forwards) == (2, 5, 200, 80)
    assert told.utilisation == pytest.approx(0.4)
    # two experts in bfloat16, a quarter of the layers each, and all of what is not a layer (0.24 billion, the fifth of
    # it being kept in float32); a quarter of UMT5 (5.68 billion) in bfloat16, and the VAE (0.127 billion) in float32
    assert told.parameter_bytes == [told.parameter_bytes[0]] * 4
    assert told.parameter_bytes[0] == pytest.approx((15.1 + 2.84 + VAE) * GB, rel=0.01)
    assert told.parameter_bytes[0] > ((2 * 14.288 + 5.68) * 2 / 4 + VAE) * GB
    assert told.fits and max(told.needed_bytes) < 80 * GB
    phases = [sum(buffers.values()) for buffers in told.activation_bytes.values()]
    assert told.needed_bytes == [weights + max(phases) for weights in told.parameter_bytes]
    denoise, hidden = told.activation_bytes["denoise"], 75_600 * 5120 * 2
    assert max(told.parameter_bytes) + sum(denoise.values()) < 24 * GB  # the goal for every device until it decodes
    assert denoise["hidden state"] == hidden
    assert denoise["one layer, in attention: q, k, v and the result"] == 4 * hidden


@pytest.mark.parametrize(
    ("name", "forward", "decode", "text"),
    [
        ("Wan2.2-T2V-A14B", 6523.4, 633.1,
         "model runs  80 of 75,600 tokens (21x90x160 latents), 6,523 TFLOP each\ndecoding    633.1 TFLOP a video\n"),
        ("Wan2.2-TI2V-5B", 517.0, 1999.1,
         "model runs  100 of 27,280 tokens (31x44x80 latents), 517 TFLOP each\ndecoding    1,999 TFLOP a video\n"),
    ],
)  # fmt: skip
def test_the_work_of_a_forward_and_of_decoding(told, name, forward, decode, text):
    told = told(name)
    assert [sum(told.forward_tflop.values()), told.decode_tflop] == pytest.approx([forward, decode], abs=0.1)
    assert text in str(told)


def test_tiles_need_the_halos_of_one_and_keep_their_frames(published):
    checkpoint = published("Wan2.2-T2V-A14B")
    size = dict(height=720, width=1280, num_frames=81)
    whole = report(checkpoint, MeshSpec(), **size).activation_bytes["decode"]
    square = report(checkpoint, MeshSpec(), height=256, width=256, num_frames=81).activation_bytes["decode"]
    halos = "halos of the causal convolutions"
    for mesh, tiles in ((MeshSpec(), 4 * 7), (MeshSpec(pp=8), 4)):
        tiled = report(checkpoint, mesh, **size, tiling=Tiling()).activation_bytes["decode"]
        kept = tiled.pop("frames of tiles, until they are blended")
        assert kept == tiles * 81 * 256 * 256 * 3 * 4
        assert tiled[halos] == square[halos] and len(tiled) == len(square)
    assert sum(whole.values()) > 5 * (sum(tiled.values()) + kept)  # on eight devices; four times as much on one
    no_larger = report(checkpoint, MeshSpec(), **size, tiling=Tiling(720, 1280, 720, 1280))
    assert no_larger.activation_bytes["decode"] == whole


def test_encoding_whole_videos_is_a_phase_which_tiles_of_the_2_2_kind_can_make_the_largest(published):
    checkpoint = published("Wan2.2-TI2V-5B")
    clip = np.zeros((121, 704, 1280, 3), np.uint8)
    assert "encode" not in report(checkpoint, MeshSpec()).activation_bytes
    whole, tiled = (report(checkpoint, MeshSpec(pp=8), video=clip, tiling=t) for t in (None, Tiling()))
    taken = [{phase: sum(buffers.values()) for phase, buffers in r.activation_bytes.items()} for r in (whole, tiled)]
    assert taken[0]["encode"] < taken[0]["decode"] and taken[1]["encode"] > taken[1]["decode"]
    assert "encoding needs, beside the weights:" in str(tiled)
    with_channels = report(published("Wan2.2-I2V-A14B"), MeshSpec(pp=4), image=clip[0])
    assert list(with_channels.activation_bytes) == ["encode", "denoise", "decode"]
    assert max(with_channels.needed_bytes) == with_channels.parameter_bytes[0] + max(
        sum(buffers.values()) for buffers in with_channels.activation_bytes.values()
    )


def test_float32_takes_twice_the_bytes_of_the_dit(published):
    half, full = (
        parameter_bytes(published("Wan2.1-T2V-1.3B"), MeshSpec(pp=4), dtype, "float32", 1)[1] for dtype in DTYPES
    )
    assert 1.9 * half < full < 2 * half  # some modules are float32 in either


@pytest.mark.parametrize(("stages", "layers"), [(1, [5]), (3, [2, 2, 1]), (4, [2, 2, 1, 0]), (5, [1] * 5)])
def test_layers_that_do_not_divide_fill_the_first_stages(folder, stages, layers):
    told = report(read_checkpoint(folder("t2v-A14B")), MeshSpec(pp=stages), height=16, width=16, num_frames=1)
    assert told.layers_per_stage == layers
    assert len(told.parameter_bytes) == len(told.needed_bytes) == stages


def test_more_videos_fill_the_ring(published, told):
    alone, eight = told("Wan2.1-T2V-1.3B"), report(published("Wan2.1-T2V-1.3B"), num_videos_per_prompt=8)
    assert "fill the idle time" in str(alone) and alone.utilisation < 0.5
    assert eight.utilisation > 0.99 and "fill the idle time" not in str(eight)
    assert eight.microbatches == 16
    name = "latents, x0 history and velocity of a ring's videos (6 x float32)"
    assert eight.activation_bytes["denoise"][name] == 8 * alone.activation_bytes["denoise"][name]


@pytest.mark.parametrize(
    ("mesh", "videos", "counts", "utilisation", "slots"),
    [
        # microbatches, period, ticks of 50 steps; slots and text rows of a rank
        ("cfg=2", 1, (1, 1, 50), 1.0, (1, 1)),
        ("cfg=2,pp=2", 1, (1, 2, 100), 0.5, (1, 1)),
        ("dp=2", 2, (4, 2, 100), 1.0, (1, 2)),
        ("dp=2", 3, (6, 4, 200), 0.75, (2, 4)),
        ("dp=4,cfg=2,pp=2", 12, (12, 3, 151), 600 / 604, (4, 4)),
    ],
)
def test_rings_side_by_side_each_have_a_share(published, mesh, videos, counts, utilisation, slots):
    checkpoint, mesh = published("Wan2.1-T2V-1.3B"), MeshSpec.parse(mesh)
    alone, told = (
        report(checkpoint, m, num_videos_per_prompt=n) for m, n in ((MeshSpec(pp=mesh.pp), 1), (mesh, videos))
    )
    assert (told.microbatches, told.period, told.ticks) == counts
    assert told.utilisation == pytest.approx(utilisation) and told.forwards == 100 * videos
    assert len(told.parameter_bytes) == len(told.needed_bytes) == mesh.num_devices
    without = replace(checkpoint, text_encoder=None)  # of which more devices hold less each
    dit = [parameter_bytes(without, m, "bfloat16", "float32")[-1] for m in (MeshSpec(pp=mesh.pp), mesh)]
    assert dit[0] == dit[1] < told.parameter_bytes[-1] or mesh.pp == 1
    latents, text = "latents, x0 history and velocity of a ring's videos (6 x float32)", "text rows of a ring's videos"
    shares = told.activation_bytes["denoise"], alone.activation_bytes["denoise"]
    assert shares[0][latents] == slots[0] * shares[1][latents] and shares[0][text] * 2 == slots[1] * shares[1][text]
    layers = "30" if mesh.pp == 1 else "15 + 15"
    rings = mesh.num_devices // mesh.pp
    assert f"layers      {layers} in each of {rings} rings on {mesh.num_devices} devices, at work" in str(told)


def test_devices_send_what_the_axes_of_a_mesh_take(published):
    """By hand, for A14B: 75,600 tokens of 5,120 numbers in bfloat16, 40 layers."""
    hidden = 75_600 * 5120 * 2
    told = report(published("Wan2.2-T2V-A14B"), MeshSpec(pp=4))
    assert told.sent == {"pp": {"collectives": 1, "bytes": hidden}}
    told = report(published("Wan2.2-T2V-A14B"), MeshSpec(cfg=2, sp=4))
    velocities = 2 * 4 * 21 * 90 * 160 * 16 // 4  # both, in float32, a quarter of each
    assert told.sent == {
        "cfg": {"collectives": 1, "bytes": velocities},
        "sp": {"collectives": 4 * 40, "bytes": 4 * 40 * hidden // 4 * 3 // 4},  # each keeps a quarter of its quarter
    }
    told = report(published("Wan2.2-T2V-A14B"), MeshSpec(sp=3))  # 40 heads: keys and values go round
    assert told.sent == {"sp": {"collectives": 4 * 40, "bytes": 4 * 40 * hidden // 3}}
    told = report(published("Wan2.2-T2V-A14B"), MeshSpec(pp=2, tp=4))
    means = 3 * 4 * 75_600 + 4 * 512  # of q, k and cross-attention's q; of the text's k
    assert told.sent["tp"] == {"collectives": 7 * 20, "bytes": pytest.approx(20 * (3 * hidden + means) * 3 / 2)}
    assert "each stage 4 of them" in str(told) and "over tp in 140 collectives" in str(told)


@pytest.mark.parametrize("mesh", ["pp=2", "dp=2", "cfg=2", "sp=2", "tp=2", "pp=2,sp=2,tp=2"])
def test_work_is_shared_by_the_axes_that_split_it(published, mesh):
    """What stays whole are embeddings and head, and keys and values of the text where tokens alone are split."""
    mesh = MeshSpec.parse(mesh)
    told = report(published("Wan2.1-T2V-1.3B"), mesh, num_videos_per_prompt=2)
    share = told.device_tflop * mesh.pp * mesh.sp * mesh.tp / sum(told.forward_tflop.values())
    assert 1 <= share < 1.005


def test_an_image_model_has_its_channels_and_clip(published):
    image = Image.new("RGB", (832, 480))
    told = report(published("Wan2.1-I2V-14B"), image=image)
    latent = 21 * 60 * 104
    assert told.activation_bytes["denoise"]["image rows and channels"] == 4 * (257 * 1280 + latent * 20)
    self_attention, cross_attention = (told.forward_tflop[name] for name in ("self_attention", "cross_attention"))
    assert cross_attention / self_attention == pytest.approx((512 + 257) / told.tokens)
    without = replace(published("Wan2.1-I2V-14B"), image_encoder=None)
    without = parameter_bytes(without, MeshSpec(pp=4), "bfloat16", "float32")
    clip = [have - lack for have, lack in zip(told.parameter_bytes, without, strict=True)]
    assert clip == pytest.approx([0.632 * GB] * 4, rel=0.1)  # a quarter of ViT-H/14, in float32


def test_every_device_decodes_a_strip(published):
    """Of 160 columns of latents."""
    checkpoint = published("Wan2.2-T2V-A14B")
    decode = [report(checkpoint, MeshSpec(pp=n)).activation_bytes["decode"] for n in (1, 4, 8, 7)]
    halos = [buffers["halos of the causal convolutions"] for buffers in decode]
    assert halos[0] == 4 * halos[1] == 8 * halos[2] and 23 * halos[0] == 160 * halos[3]  # 23 columns, of 160 / 7
    assert sum(decode[1].values()) == 2 * sum(decode[2].values()) < sum(decode[0].values())
    eight = report(checkpoint, MeshSpec(pp=8))
    assert "devices 0-7" in str(eight) and "of its own" not in str(eight)


def test_a_vae_with_devices_of_its_own_is_nowhere_else(published):
    checkpoint = published("Wan2.2-T2V-A14B")
    shared, apart = dry_run(checkpoint, mesh="pp=4"), dry_run(checkpoint, mesh="pp=4", vae_devices=2)
    assert len(apart.parameter_bytes) == len(apart.needed_bytes) == 6
    vae = apart.parameter_bytes[5]
    assert vae == pytest.approx(VAE * GB, rel=0.01)
    assert apart.parameter_bytes == [size - vae for size in shared.parameter_bytes] + [vae] * 2
    denoise, decode = (sum(apart.activation_bytes[phase].values()) for phase in ("denoise", "decode"))
    assert [n - w for n, w in zip(apart.needed_bytes, apart.parameter_bytes, strict=True)] == [denoise] * 4 + [
        decode
    ] * 2
    assert decode == pytest.approx(2 * sum(shared.activation_bytes["decode"].values()), rel=1e-3)
    assert "decoding    633.1 TFLOP a video, on 2 devices of its own\n" in str(apart) and "devices 4-5 " in str(apart)
    assert "10 + 10 + 10 + 10 on 4 devices" in str(apart)
    with pytest.raises(ValueError, match="vae_devices=0 must be a whole number from 1"):
        dry_run(checkpoint, vae_devices=0)


# The report


def test_the_report_says_whether_it_fits(published, told):
    assert "fits: " in str(told("Wan2.2-T2V-A14B"))
    small = report(published("Wan2.2-T2V-A14B"), MeshSpec(), device_memory=80 * GB)
    assert small.fits is False
    assert small.would_fit == ("mesh pp=2", "vae_dtype bfloat16", "848x480, 81 frames")
    assert str(small).endswith(
        "DOES NOT FIT: 77.80 GiB of 74.51 GiB a device. What would fit: mesh pp=2; vae_dtype bfloat16; "
        "848x480, 81 frames"
    )
    unknown = report(published("Wan2.2-T2V-A14B"), device_memory=None)  # no accelerator here
    assert unknown.fits is None and "the fullest device needs " in str(unknown)


def test_jax_takes_a_share_of_a_card(published, all_memory):
    """As much as the environment says, else 75 %; the report tells it."""
    checkpoint = published("Wan2.2-T2V-A14B")
    most = max(report(checkpoint).needed_bytes)
    for name, share, fits in (
        ("XLA_CLIENT_MEM_FRACTION", "0.92", True), ("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92", True), ("X", "", False)
    ):  # fmt: skip
        all_memory.delenv("XLA_CLIENT_MEM_FRACTION", raising=False)
        all_memory.setenv(name, share)
        told = report(checkpoint, device_memory=int(most / 0.9))
        assert told.memory_fraction == float(share or 0.75) and told.fits is fits
        assert f"the {share and '92' or '75'}% of" in str(told) and "that JAX takes" in str(told)
        all_memory.delenv(name)
    all_memory.setenv("XLA_CLIENT_MEM_FRACTION", "92%")
    with pytest.raises(ValueError, match="XLA_CLIENT_MEM_FRACTION=92% is no share"):
        report(checkpoint)


def test_what_would_fit_does(published, tmp_path):
    """The first of each kind; and where none is enough by itself, the least of all kinds together."""
    checkpoint = published("Wan2.2-TI2V-5B")
    needed = dry_run(checkpoint, vae_dtype="bfloat16", device_memory="80GB").needed_bytes
    told = dry_run(checkpoint, device_memory=max(needed))
    assert told.fits is False and told.would_fit[:2] == ("mesh pp=2", "vae_dtype bfloat16")
    size = re.fullmatch(r"(\d+)x(\d+), (\d+) frames", told.would_fit[2])
    width, height, num_frames = map(int, size.groups())
    assert dry_run(checkpoint, device_memory=max(needed), width=width, height=height, num_frames=num_frames).fits
    together = dry_run(checkpoint, device_memory="5GB")
    assert together.would_fit == ("mesh pp=16, dtype and vae_dtype bfloat16, 1280x704, 121 frames, all together",)
    assert dry_run(checkpoint, mesh="pp=16", vae_dtype="bfloat16", device_memory="5GB").fits
    assert not dry_run(checkpoint, mesh="pp=8", vae_dtype="bfloat16", device_memory="5GB").fits
    assert "What would fit: nothing tried does" in str(dry_run(checkpoint, device_memory="2GB"))


@pytest.mark.parametrize(("ulysses", "told"), [(None, True), (8, False)])
def test_what_would_fit_keeps_the_ulysses_that_was_asked_for(published, ulysses, told):
    """24 heads: of 12 on each of two devices, eight devices could not trade."""
    given = dict(mesh="pp=30,sp=8", ulysses=ulysses, dtype="bfloat16", vae_dtype="bfloat16")
    needed = max(dry_run(published("Wan2.2-TI2V-5B"), **given).needed_bytes)
    would_fit = dry_run(published("Wan2.2-TI2V-5B"), device_memory=needed - 10**7, **given).would_fit
    assert ("mesh pp=30,sp=8,tp=2" in would_fit) == told and len(would_fit) == 1 + told


# From the package


@pytest.mark.parametrize("name", ["Wan2.2-T2V-A14B", "Wan2.2-I2V-A14B", "Wan2.2-TI2V-5B", "Wan2.1-FLF2V-14B"])
def test_a_plan_needs_neither_prompt_nor_image(published, name):
    checkpoint = published(name)
    told = dry_run(checkpoint, mesh="pp=4", device_memory="80GB")
    defaults = checkpoint.defaults
    shape = defaults.width // 16, defaults.height // 16
    image = {} if "T2V" in name or "TI2V" in name else dict(image=Image.new("RGB", shape))
    if "FLF" in name:
        image["last_image"] = image["image"]
    size = dict(height=defaults.height, width=defaults.width)
    assert told == dry_run(str(checkpoint.folder), mesh="pp=4", device_memory=80 * GB, prompt="a", **size, **image)
    assert (told.height, told.width, told.num_frames) == (defaults.height, defaults.width, defaults.num_frames)
    assert told.notes == ()


def test_a_plan_of_an_image_follows_its_aspect(published):
    told = dry_run(published("Wan2.2-I2V-A14B"), device_memory="80GB", mesh="pp=4", image=Image.new("RGB", (100, 50)))
    assert (told.width, told.height) == (1344, 672)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        ({"num_frames": 6}, ValueError, "nearest are 5 and 9"),
        ({"mesh": 4}, ValueError, 'did you mean "pp=4"'),
        ({"mesh": "pp=41"}, ValueError, "the largest is pp=40"),
        ({"dtype": "fp8"}, ValueError, "dtype='fp8' is not one of bfloat16, float32"),
        ({"device_memory": "24"}, ValueError, "has no unit"),
        ({"device_memry": "24GB"}, TypeError, "there is no argument device_memry"),
        ({"height": 480}, ValueError, "height=480 without width"),
    ],
)
def test_a_bad_plan_is_refused(published, call, error, words):
    plain = inspect.unwrap(dry_run)  # without the type checks of the tests
    for name in ("Wan2.2-T2V-A14B", "Wan2.2-I2V-A14B"):
        with pytest.raises(error, match=words):
            plain(published(name), **call)


def test_the_report_as_json_holds_everything(told):
    told = told("Wan2.1-T2V-1.3B")
    data = json.loads(told.to_json())
    assert data == json.loads(json.dumps(asdict(told)))
    assert data["tokens"] == 32_760 and data["device_memory"] == 80 * GB
    for phase, buffers in told.activation_bytes.items():
        listed = [name for name in buffers if name in str(told)]
        assert sum(buffers[name] for name in listed) >= 0.98 * sum(buffers.values()), phase


# The weights' headers


def test_weights_that_are_here_are_checked_by_their_headers(folder):
    told = dry_run(folder("t2v-A14B"))
    names = "vae, text_encoder, transformer, transformer_2"
    assert re.fullmatch(rf"checked by their headers: {names}, [1-9]\d* MB to read", told.weights)
    assert f"weights     {told.weights}\n" in str(told) and json.loads(told.to_json())["weights"] == told.weights


def test_weights_without_a_tokenizer_are_refused_as_loading_does(folder, tmp_path):
    shutil.copytree(folder("2.1-t2v"), tmp_path / "model")
    (tmp_path / "model/tokenizer/tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match="tokenizer has no tokenizer.json, which prompts need"):
        dry_run(tmp_path / "model")


def test_configurations_alone_are_planned_with_and_it_is_said(tmp_path, published):
    (folder := write_configs(tmp_path / "model", "Wan2.2-T2V-A14B")).joinpath("transformer/x.index.json").touch()
    assert dry_run(folder, device_memory="80GB").weights == "not checked: model has none here"
    of_the_hub = replace(published("Wan2.1-T2V-14B"), hub_id="owner/name")
    assert dry_run(of_the_hub, device_memory="80GB").weights == "not checked: owner/name has none here yet"


def test_of_a_hub_id_a_part_of_the_weights_is_no_mistake(folder, tmp_path):
    shutil.copytree(folder("2.1-t2v"), tmp_path / "model")
    (tmp_path / "model/vae/diffusion_pytorch_model.safetensors").unlink()
    of_the_hub = replace(read_checkpoint(tmp_path / "model"), hub_id="owner/name")
    assert dry_run(of_the_hub).weights.startswith("not checked: not all are fetched (")


def spoil(folder, how):
    """Break a checkpoint as downloads and other programs do."""
    path = folder / "transformer/diffusion_pytorch_model.safetensors"
    if how == "absent":
        path.unlink()
    elif how == "truncated":
        path.write_bytes(path.read_bytes()[:-1])
    elif how == "variant":
        path.rename(path.with_name("diffusion_pytorch_model.fp16.safetensors"))
    else:
        tensors = load_file(path)
        weight = tensors["blocks.0.ffn.net.2.weight"]
        cast = {"int8": weight.astype(np.int8), "shape": weight[:1].copy()}
        save_file(tensors | {"blocks.0.ffn.net.2.weight": cast[how]}, path)


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("absent", "transformer has no diffusion_pytorch_model.safetensors"),
        ("truncated", "is truncated or no safetensors file"),
        ("variant", "give --variant fp16"),
        ("int8", r"holds weights in I8, probably quantised, which are not read: take"),
        ("shape", "transformer does not fit its configuration: 1 of another shape"),
    ],
)
def test_weights_that_cannot_be_loaded_are_refused_as_loading_does(folder, tmp_path, how, words):
    shutil.copytree(folder("2.1-t2v"), tmp_path / "model")
    spoil(tmp_path / "model", how)
    with pytest.raises((ValueError, OSError), match=words) as planned:
        dry_run(tmp_path / "model")
    with pytest.raises(type(planned.value)) as loaded:
        WanPipeline.from_pretrained(tmp_path / "model", progress=False)
    assert str(loaded.value) == str(planned.value)
    if how == "variant":
        assert dry_run(tmp_path / "model", variant="fp16").weights.startswith("checked")


def test_a_given_memory_means_an_accelerator_and_bfloat16(folder):
    checkpoint = read_checkpoint(folder("t2v-A14B"))
    for memory, dtype in ((GB, "bfloat16"), (None, "float32")):  # without one, what the CPU here would use
        given = dict(dtype=None, device_memory=memory, height=16, width=16, num_frames=1)
        assert report(checkpoint, **given).dtype == dtype


@pytest.mark.parametrize(
    ("text", "size"),
    [(None, None), ("80GB", 80 * GB), ("80 GiB", 80 * 2**30), ("1.5tb", 1.5e12), (" 24000 MB ", 24 * GB), (GB, GB)],
)
def test_sizes_of_memory(text, size):
    assert parse_memory(text) == size


@pytest.mark.parametrize(
    "text", ["", "GB", "80 gigabytes", "-80GB", "0GB", "nanGB", "infGB", "8O GB", "80GBB", "many", "-24", 24, 0, "24B"]
)
def test_what_is_no_size_of_memory_is_refused(text):
    with pytest.raises(ValueError, match="is no size from 1MB up, such as 80GB or 80GiB"):
        parse_memory(text)


def test_a_size_without_a_unit_is_asked_for_it():
    with pytest.raises(ValueError, match="device memory '24' has no unit: 24GB, 24GiB?"):
        parse_memory("24")


def test_bytes_of_a_tree():
    tree = {"a": jnp.zeros((3, 5), jnp.bfloat16), "b": [jax.ShapeDtypeStruct((), jnp.float32)]}
    assert tree_bytes(tree) == 3 * 5 * 2 + 4 == math.prod((3, 5, 2)) + 4
