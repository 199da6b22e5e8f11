"""Programs compiled ahead of time are those that a call runs, and nothing else changes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from collectives import collectives, expected_collectives
from runs import IMAGE, LAST_IMAGE, NEGATIVES, PROMPTS, VIDEO, compilations, picture

from jaxwan.config import ImageInput
from jaxwan.flops import device_share, tick_traffic
from jaxwan.models.tiles import Tiling
from jaxwan.pipelines import pipeline as pipelines
from jaxwan.pipelines import warmup
from jaxwan.pipelines.call import make_job
from jaxwan.pipelines.checkpoint import read_checkpoint
from jaxwan.pipelines.dit import most_ulysses
from jaxwan.pipelines.dry_run import image_rows
from jaxwan.pipelines.encoders import abstract_entry
from jaxwan.pipelines.load import load_parts
from jaxwan.pipelines.parts import abstract_parts
from jaxwan.pipelines.pipeline import WanPipeline
from jaxwan.pipelines.progress import Progress
from jaxwan.pipelines.warmup import compiling
from jaxwan.sharding.mesh import MeshSpec, make_mesh

SIZE = dict(height=32, width=48, num_frames=5)
CALL = SIZE | dict(prompt=PROMPTS[0], negative_prompt=NEGATIVES[0], num_inference_steps=2, seed=1)
GREY = np.full((32, 48, 3), 128, np.uint8)
RING = {"ring", "the ring's slots", "a video into its slot", "noise"}
OUT = "a video out of its slot"
TILES = Tiling(32, 32, 32, 16)  # side by side: two of 32 columns, and one of 16
TEXT, FIRST = {"text encoder"}, {"VAE decode, first frame", "8 bits, first frame"}
DECODE = FIRST | {"VAE decode, later frames", "8 bits, later frames"}
ENCODE_FIRST, ENCODE = {"VAE encode, first frame"}, {"VAE encode, first frame", "VAE encode, later frames"}
CASES = {
    # family, mesh, arguments of the warm-up, of the call, programs
    "guided": ("t2v-A14B", "pp=1", SIZE | dict(guidance_scale=9.0), CALL | dict(guidance_scale=4.0), TEXT | DECODE),
    "two prompts on two stages, each with negative prompts apart": (
        "t2v-A14B", "dp=2,cfg=2,pp=2", SIZE | dict(prompt=["", ""]),
        CALL | dict(prompt=PROMPTS, sampler=["euler", "dpm++2m"], seed=[1, 2]), TEXT | DECODE,
    ),
    "not guided, latents, two videos": (
        "t2v-A14B", "dp=2", SIZE | dict(guidance_scale=1.0, num_videos_per_prompt=2, output_type="latent"),
        CALL | dict(guidance_scale=1.0, num_videos_per_prompt=2, output_type="latent"), TEXT,
    ),
    "embeddings, a single frame": (
        "t2v-A14B", "pp=1",
        SIZE | dict(prompt_embeds=np.zeros((1, 512, 24)), negative_prompt_embeds=np.zeros((1, 512, 24)), num_frames=1,
                    sampler="renoise", timesteps=[700, 300, 1]),
        SIZE | dict(prompt_embeds=np.ones((1, 512, 24)), negative_prompt_embeds=np.zeros((1, 512, 24)), num_frames=1,
                    sampler="renoise", timesteps=[900, 500], seed=1, output_type="uint8"), FIRST,
    ),
    "image and last image with CLIP": (
        "2.1-flf2v", "cfg=2", SIZE | dict(image=GREY, last_image=GREY), CALL | dict(image=IMAGE, last_image=LAST_IMAGE),
        TEXT | DECODE | ENCODE | {"image encoder"},
    ),
    "first frame of one of two": (
        "ti2v-5B", "pp=2", dict(prompt=["", ""], image=[GREY, None], height=64, width=96, num_frames=5),
        CALL | dict(prompt=PROMPTS, image=[None, IMAGE], height=64, width=96), TEXT | DECODE | ENCODE_FIRST,
    ),
    "video to video": (
        "2.1-t2v", "pp=1", SIZE | dict(video=[picture(i, 32, 48) for i in range(5)]),
        CALL | dict(video=VIDEO, strength=0.6, output_type="uint8"), TEXT | DECODE | ENCODE,
    ),
    "video to video in tiles": (
        "2.1-t2v", "pp=2", SIZE | dict(video=[picture(0, 32, 48)], num_frames=1, tiling=TILES),
        CALL | dict(video=VIDEO, num_frames=1, tiling=TILES, output_type="uint8"),
        TEXT | {"8 bits, first frame"} | {
            f"VAE {what}, first frame"
            for what in ("encode in tiles", "encode, blending", "decode in tiles", "decode, blending")
        },
    ),
}  # fmt: skip


@pytest.fixture
def fresh(folder):
    """(family, mesh) -> a pipeline that has compiled nothing yet."""
    return lambda family, mesh: WanPipeline.from_pretrained(folder(family), mesh, "float32", progress=False)


@pytest.mark.parametrize(
    "case",
    [pytest.param(name, marks=pytest.mark.slow) if case[0] == "ti2v-5B" else name for name, case in CASES.items()],
)
def test_after_a_warm_up_a_call_compiles_nothing_and_gives_the_same_bits(fresh, pipeline, case):
    family, mesh, ahead, call, programs = CASES[case]
    pipe, outputs = fresh(family, mesh), []
    warm = pipe.warmup(**ahead)
    second = MeshSpec.parse(mesh).num_devices // 2
    out = {f"{OUT} on device 0", f"{OUT} on device {second}"} if "dp=2" in mesh else {OUT}
    assert set(warm.programs) == RING | out | programs
    assert 0 < max(warm.programs.values()) <= warm.seconds
    assert compilations(lambda: pipe.warmup(**ahead)) == 0
    assert compilations(lambda: outputs.append(pipe(**call))) == 0
    expected = pipeline(family, mesh)(**call)
    np.testing.assert_array_equal(outputs[0].latents, expected.latents)
    np.testing.assert_array_equal(outputs[0].frames, expected.frames)


LAYOUTS = [
    ("t2v-A14B", "dp=2,cfg=2,pp=2", None), ("t2v-A14B", "cfg=2,sp=2,tp=2", None), ("2.1-flf2v", "pp=2,sp=4", None),
    ("i2v-A14B", "tp=2", None), ("t2v-A14B", "sp=4", 1),
]  # fmt: skip
MORE_LAYOUTS = [
    ("t2v-A14B", "pp=1", None), ("2.1-flf2v", "sp=3,tp=2", None), ("ti2v-5B", "dp=2,sp=2", None),
    ("ti2v-5B", "pp=2,tp=2", None), ("2.1-t2v", "sp=8", None),
]  # fmt: skip


@pytest.mark.parametrize(
    ("family", "mesh", "ulysses"), LAYOUTS + [pytest.param(*more, marks=pytest.mark.slow) for more in MORE_LAYOUTS]
)
def test_devices_send_each_other_what_the_account_says_and_nothing_else(folder, family, mesh, ulysses):
    """Of what every denoising program holds: nothing is gathered, and a video goes to its rank alone."""
    checkpoint, mesh = read_checkpoint(folder(family)), make_mesh(MeshSpec.parse(mesh))
    image = {"image": IMAGE} if checkpoint.image_input is not ImageInput.NONE else {}
    last = {"last_image": IMAGE} if "flf2v" in family else {}
    size = dict(height=96, width=160, num_frames=5)
    job = make_job(checkpoint, prompt=["", ""], seed=0, guidance_scale=2.0, **size, **image, **last)
    denoiser = abstract_parts(checkpoint, mesh, "float32", "float32", ulysses=ulysses).denoiser
    bucket = denoiser.bucket([abstract_entry(checkpoint, request) for request in job.requests])
    sent = {
        name: collectives(function.lower(*arguments).compile().as_text())
        for name, function, arguments in denoiser.programs(bucket).listed(denoiser.weights)
    }
    cfg, sizes = checkpoint.transformer, dict(mesh.shape)
    tokens = checkpoint.geometry.num_tokens(1, *job.size[1:])
    share = device_share(cfg, sizes, tokens, ulysses or most_ulysses(cfg, sizes))
    traffic = tick_traffic(cfg, share, 2, 4, image_rows=image_rows(cfg))
    assert sent.pop("ring") == expected_collectives(mesh, traffic)
    assert len(sent) == 2 + sizes["dp"] * sizes["sp"] and not any(sent.values())


def test_programs_compiled_while_the_weights_are_read_are_those_of_the_run(folder, pipeline):
    checkpoint, outputs = read_checkpoint(folder("i2v-A14B")), []
    job = make_job(checkpoint, image=IMAGE, **CALL)
    parts = load_parts(checkpoint, MeshSpec(pp=2), "float32", "float32", job, progress=False)
    assert set(parts.seconds) == {"prepare", "trace", "load", "compile"} and min(parts.seconds.values()) > 0
    pipe = WanPipeline(checkpoint, parts, progress=False)
    assert compilations(lambda: outputs.append(pipe.run(job))) == 0
    expected = pipeline("i2v-A14B", "pp=2").run(job)
    np.testing.assert_array_equal(outputs[0].frames, expected.frames)


def test_a_call_named_while_loading_is_checked_first_and_then_compiles_nothing(folder, pipeline, monkeypatch):
    path, outputs = folder("t2v-A14B"), []
    monkeypatch.setattr(pipelines, "load_parts", None)  # not reached
    with pytest.raises(ValueError, match="num_frames=6 is not 4k"):
        WanPipeline.from_pretrained(path, warmup=CALL | dict(num_frames=6))
    with pytest.raises(TypeError, match="there is no argument num_frame: did you mean num_frames"):
        WanPipeline.from_pretrained(path, warmup=dict(num_frame=5))
    with pytest.raises(ValueError, match="mesh dp=2 deals videos to 2 groups of devices and this call has 1 video"):
        WanPipeline.from_pretrained(path, "dp=2", warmup=SIZE)
    monkeypatch.undo()
    call = SIZE | dict(output_type="np", callback_on_step_end=None)  # as the call will be given
    pipe = WanPipeline.from_pretrained(path, dtype=jnp.float32, warmup=call, progress=False)
    assert compilations(lambda: outputs.append(pipe(**CALL))) == 0
    np.testing.assert_array_equal(outputs[0].latents, pipeline("t2v-A14B", "pp=1")(**CALL).latents)


def test_a_pipeline_that_reads_weights_alone_compiles_no_program_of_a_call(folder, monkeypatch):
    monkeypatch.setattr(warmup, "_compile", None)
    checkpoint = read_checkpoint(folder("2.1-t2v"))
    load_parts(checkpoint, MeshSpec(), "float32", "float32", progress=False)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"num_frames": 6}, "nearest are 5 and 9"),
        ({"image": GREY}, "it takes no image"),
        ({"output_type": "gif"}, "output_type='gif' is not one of np, uint8, pil, latent"),
    ],
)
def test_bad_arguments_are_refused_before_anything_compiles(pipeline, arguments, words):
    pipe = pipeline("t2v-A14B", "pp=1")

    def refused():
        with pytest.raises(ValueError, match=words):
            pipe.warmup(**SIZE | arguments)

    assert compilations(refused) == 0


def test_a_program_that_cannot_be_compiled_is_raised(pipeline, monkeypatch):
    missing = jax.jit(lambda x: jax.ffi.ffi_call("no_such_target", jax.ShapeDtypeStruct(x.shape, x.dtype))(x))
    broken = "broken", missing, (jax.ShapeDtypeStruct((3,), np.float32),)
    fine = "fine", jax.jit(lambda x: x - 3), (jax.ShapeDtypeStruct((3,), np.float32),)
    monkeypatch.setattr(pipelines, "job_programs", lambda *_, **__: [fine, broken, fine])
    with pytest.raises(jax.errors.JaxRuntimeError, match="no_such_target"):
        pipeline("t2v-A14B", "pp=1").warmup(**SIZE)


def test_settings_of_the_caller_hold_for_what_is_compiled_in_threads():
    product, x = jax.jit(lambda x: x @ x), np.ones((3, 3), np.float32)
    with jax.default_matmul_precision("bfloat16"):
        programs = [("product", product, (jax.ShapeDtypeStruct(x.shape, x.dtype),))]
        with compiling(programs, Progress(visible=False)) as finished:
            assert [program.name for program in finished] == ["product"]
        assert compilations(lambda: product(x)) == 0
    assert compilations(lambda: product(x)) == 1
