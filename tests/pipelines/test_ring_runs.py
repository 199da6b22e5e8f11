"""Whole runs over several stages and in batches: the same bits as on one device and alone, and no recompiling.

The ring is optimised as in use: with less of it the last bits do differ.
"""

from functools import cache
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runs import IMAGE, LAST_IMAGE, NEGATIVES, PROMPTS, VIDEO, compilations, picture, run_ours

from jaxwan.convert.files import TensorFiles
from jaxwan.pipelines import pipeline as pipeline_module
from jaxwan.pipelines.denoise import Denoiser, Loop
from jaxwan.pipelines.dit import load_weights
from jaxwan.pipelines.pipeline import WanPipeline
from jaxwan.sharding.mesh import MeshSpec, make_mesh

pytestmark = pytest.mark.usefixtures("optimised_ring")

BATCH = dict(
    prompt=[PROMPTS[0], 12 * "the dog of the blue tones ", ""],
    negative_prompt=[*NEGATIVES, "slow"], num_inference_steps=[4, 6, 3],
    guidance_scale=[4.0, 1.0, 2.5], sampler=["unipc", "euler", "dpm++2m"], flow_shift=[3.0, 5.0, 8.0], seed=[1, 2, 3],
    height=32, width=48, num_frames=5,
)  # fmt: skip
BATCHES = {
    "t2v-A14B": BATCH | dict(guidance_scale_2=[3.0, 1.5, 2.0]),
    "i2v-A14B": BATCH | dict(image=[IMAGE, picture(3, 64, 64), IMAGE], last_image=[LAST_IMAGE, None, None]),
    "ti2v-5B": BATCH | dict(image=[None, IMAGE, picture(3, 64, 64)], height=64, width=96),
    "2.1-flf2v": BATCH | dict(image=IMAGE, last_image=LAST_IMAGE),
    "2.1-t2v": BATCH | dict(video=VIDEO, strength=0.7),
}
PER_PROMPT = {key for key, value in BATCH.items() if isinstance(value, list)} | {
    "guidance_scale_2", "image", "last_image"
}  # fmt: skip


def alone(batch: dict, i: int) -> dict:
    """Request i of a batch as a call of its own."""
    return {key: value[i] if key in PER_PROMPT else value for key, value in batch.items()}


@pytest.fixture(scope="module")
def pipeline(folder):
    """(family, mesh) -> a pipeline; those on several devices share all but the DiT with the one on one device."""

    @cache
    def load(family, mesh=None):
        if mesh is None:
            return WanPipeline.from_pretrained(folder(family), progress=False)
        single, mesh = load(family), make_mesh(MeshSpec.parse(mesh))
        cfg, experts = single.checkpoint.transformer, single.checkpoint.experts
        weights = load_weights(cfg, [TensorFiles.find(folder(family) / name) for name in experts], mesh, jnp.float32)
        parts = single.parts._replace(denoiser=Denoiser(cfg, weights, mesh, jnp.dtype(jnp.float32)))
        return WanPipeline(single.checkpoint, parts, progress=False)

    return load


@pytest.fixture(scope="module")
def on_one_device(pipeline):
    """family -> its batch, run on one device."""
    return cache(lambda family: run_ours(pipeline(family), **BATCHES[family]))


USUAL = [
    ("t2v-A14B", "pp=2"), ("i2v-A14B", "pp=3"), ("ti2v-5B", "pp=4"), ("2.1-flf2v", "pp=2"),
    ("t2v-A14B", "dp=2,cfg=2,pp=2"), ("i2v-A14B", "dp=2"), ("ti2v-5B", "cfg=2,pp=2"), ("2.1-flf2v", "cfg=2"),
    ("2.1-t2v", "dp=2,pp=2"),
]  # fmt: skip
MORE = [
    ("i2v-A14B", "pp=2"), ("i2v-A14B", "pp=4"), ("ti2v-5B", "pp=2"), ("ti2v-5B", "pp=3"), ("t2v-A14B", "dp=2"),
    ("t2v-A14B", "cfg=2"), ("t2v-A14B", "dp=3,pp=2"), ("t2v-A14B", "cfg=2,pp=4"), ("i2v-A14B", "cfg=2,pp=3"),
    ("i2v-A14B", "dp=2,pp=2"), ("ti2v-5B", "dp=2,cfg=2,pp=2"), ("ti2v-5B", "dp=2"), ("ti2v-5B", "dp=3,cfg=2"),
    ("2.1-flf2v", "dp=2,cfg=2,pp=2"), ("2.1-flf2v", "dp=2,pp=3"), ("2.1-t2v", "dp=2,cfg=2"), ("2.1-t2v", "pp=2"),
]  # fmt: skip
MESHES = USUAL + [pytest.param(*more, marks=pytest.mark.slow) for more in MORE]


@pytest.mark.parametrize(("family", "mesh"), MESHES)
def test_a_mixed_batch_on_a_mesh_equals_one_device_bit_for_bit(pipeline, on_one_device, family, mesh):
    result = pipeline(family, mesh)(**BATCHES[family], output_type="latent")
    np.testing.assert_array_equal(result.latents, on_one_device(family).latents)


def test_a_pipeline_loaded_onto_a_mesh_equals_one_device_bit_for_bit(folder, on_one_device):
    result = WanPipeline.from_pretrained(folder("t2v-A14B"), "pp=4", progress=False)(**BATCHES["t2v-A14B"])
    np.testing.assert_array_equal(result.latents, on_one_device("t2v-A14B").latents)
    np.testing.assert_array_equal(result.frames, on_one_device("t2v-A14B").frames)


ALONE = [  # request 1 is not guided: alone it has a program of its own
    ("t2v-A14B", (0, 1, 2)), ("i2v-A14B", (0, 2)), ("ti2v-5B", (0, 2)),
    pytest.param("i2v-A14B", (1,), marks=pytest.mark.slow), pytest.param("ti2v-5B", (1,), marks=pytest.mark.slow),
]  # fmt: skip


@pytest.mark.parametrize(("family", "requests"), ALONE)
def test_a_request_riding_with_others_equals_itself_alone_bit_for_bit(pipeline, on_one_device, family, requests):
    batch = on_one_device(family)
    assert len(batch.steps) == 6
    for i in requests:
        single = run_ours(pipeline(family), **alone(BATCHES[family], i))
        np.testing.assert_array_equal(single.latents, batch.latents[i : i + 1])
        np.testing.assert_array_equal(single.frames, batch.frames[i : i + 1])
        for k, (latents, timesteps) in enumerate(zip(batch.steps, batch.timesteps, strict=True)):
            own = min(k, len(single.steps) - 1)  # finished requests stay as they are
            np.testing.assert_array_equal(latents[i : i + 1], single.steps[own])
            assert timesteps[i] == single.timesteps[own]


def test_noise_depends_on_seed_and_index_alone(pipeline, on_one_device):
    settings = alone(BATCHES["t2v-A14B"], 0) | dict(num_videos_per_prompt=3, output_type="latent")
    videos = pipeline("t2v-A14B")(**settings).latents
    np.testing.assert_array_equal(videos[0], on_one_device("t2v-A14B").latents[0])
    assert min(np.abs(videos[i] - videos[j]).mean() for i, j in ((0, 1), (0, 2), (1, 2))) > 0.1
    third = pipeline("t2v-A14B")(**settings | dict(num_videos_per_prompt=1, index=2)).latents
    np.testing.assert_array_equal(third, videos[2:])


SECOND = dict(
    prompt=["two dogs " * 300, "a moon", "x"], negative_prompt="", num_inference_steps=[2, 5, 3],
    guidance_scale=[1.0, 9.0, 2.0], seed=[8, 9, 10], sampler=["dpm++2m", "euler", "unipc1"], flow_shift=7.0,
)  # fmt: skip
OTHER, OTHER_LAST = picture(4, 100, 31), picture(5, 30, 99)
SECONDS = {
    "t2v-A14B": ("dp=2,cfg=2,pp=2", SECOND | dict(guidance_scale_2=2.0, boundary_ratio=0.7)),
    "i2v-A14B": ("pp=3", SECOND | dict(image=[IMAGE, OTHER, OTHER], last_image=[None, OTHER_LAST, None])),
    "ti2v-5B": ("pp=4", SECOND | dict(image=[OTHER, None, IMAGE])),
}


@pytest.mark.parametrize("family", SECONDS)
def test_a_second_call_of_the_same_size_compiles_nothing(pipeline, family):
    mesh, second = SECONDS[family]
    pipe, first = pipeline(family, mesh), BATCHES[family]
    pipe(**first)
    size = {key: first[key] for key in ("height", "width", "num_frames")}
    assert compilations(lambda: run_ours(pipe, **second, **size)) == 0


def test_renoising_is_another_ring_once(pipeline):
    """Its fresh noise is an input that others do not bring."""
    pipe, call = pipeline("2.1-t2v"), SECOND | dict(sampler="renoise", num_inference_steps=None, output_type="latent")
    call |= {key: BATCH[key] for key in ("height", "width", "num_frames")}
    assert compilations(lambda: pipe(**call | dict(timesteps=[900, 500, 100.5]))) > 0
    assert compilations(lambda: pipe(**call | dict(timesteps=[999, 1]))) == 0


def test_a_batch_that_fits_the_next_bucket_compiles_nothing(pipeline):
    """Three videos and four take the same programs; the ticks are those of the videos there."""
    pipe, prompts = pipeline("t2v-A14B", "pp=2"), ["a moon", "two dogs", "x", "a red cat"]
    call = dict(num_inference_steps=2, guidance_scale=[4.0, 1.0, 2.0], seed=5, output_type="latent")
    call |= {key: BATCH[key] for key in ("height", "width", "num_frames")}
    pipe(**BATCHES["t2v-A14B"])
    outputs = []
    assert compilations(lambda: outputs.append(pipe(prompts[:3], **call))) == 0
    assert compilations(lambda: outputs.append(pipe(prompts, **call | dict(guidance_scale=3.0)))) == 0
    loops = []
    with mock.patch.object(pipeline_module, "Loop", lambda *given: loops.append(Loop(*given)) or loops[-1]):
        pipe(prompts[:3], **call)
        pipe(prompts, **call | dict(guidance_scale=3.0))
    assert [loop.tick for loop in loops] == [5 + 6, 8 + 9]


def test_compilations_are_counted():
    assert compilations(lambda: jax.jit(lambda x: x * 3 + 1).lower(np.float32(2)).compile()) == 1
