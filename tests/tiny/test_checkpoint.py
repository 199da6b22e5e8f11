"""The bundled model's folder: written by the trainers, read by everyone."""

import jax.numpy as jnp
import numpy as np
import pytest
from small_tiny import VAE_CONFIG, draw_parameters, small_models, write_vae

from jaxwan.pipelines.checkpoint import read_checkpoint
from jaxwan.pipelines.pipeline import WanPipeline
from jaxwan.tiny.checkpoint import EXPERTS, read_component, write_component, write_surroundings

PROMPT = "a red circle moving right on a blue background"


@pytest.fixture(scope="module")
def written():
    """Component -> its parameters."""
    with small_models():
        experts = {folder: draw_parameters("transformer", seed) for seed, folder in enumerate(EXPERTS.values())}
        yield experts | {"text_encoder": draw_parameters("text_encoder")}


@pytest.fixture(scope="module")
def folder(written, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    write_vae(folder / "vae")
    for name, params in written.items():
        write_component(params, folder, name)
    write_surroundings(folder)
    return folder


@pytest.mark.parametrize("name", ["text_encoder", "transformer", "transformer_2"])
def test_what_is_written_is_read_again_in_half_precision(written, folder, name):
    found, params = read_component(folder, name), written[name]
    assert found.keys() == params.keys()
    for path, p in params.items():
        assert found[path].dtype == jnp.float32
        assert jnp.array_equal(found[path], p.astype(jnp.bfloat16).astype(jnp.float32)), path


def test_it_is_a_wan_2_2_checkpoint_with_two_experts(folder):
    checkpoint = read_checkpoint(folder)
    assert checkpoint.num_experts == 2 and checkpoint.vae == VAE_CONFIG
    assert EXPERTS == {"high": "transformer", "low": "transformer_2"}


def test_it_makes_a_clip(folder):
    pipe = WanPipeline.from_pretrained(folder, progress=False)
    clip = pipe(PROMPT, height=32, width=32, num_frames=5, num_inference_steps=2, seed=0)
    assert clip.frames.shape == (1, 5, 32, 32, 3) and np.isfinite(clip.frames).all() and clip.frames.std() > 0.01
