"""The CLIP vision tower against transformers' CLIPVisionModel with random weights."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from oracle import relative_error
from safetensors.torch import load_file, save_file
from transformers import CLIPVisionConfig, CLIPVisionModel, CLIPVisionModelWithProjection

from jaxwan.config import ConfigError, ImageEncoderConfig
from jaxwan.convert.diffusers import image_encoder_rules
from jaxwan.convert.files import TensorFiles
from jaxwan.convert.load import flat_shapes, load_module
from jaxwan.convert.rules import plan
from jaxwan.models.image_encoder import CLIPVisionEncoder

# Two float32 implementations differ by 2e-7; tanh instead of erf in the GELU costs 1.6e-4.
FORWARD = 2e-5

TINY = ImageEncoderConfig(
    hidden_size=40, intermediate_size=72, num_hidden_layers=4, num_attention_heads=2, image_size=56, patch_size=14
)


def save_reference(folder, cfg):
    torch.manual_seed(0)
    model = CLIPVisionModel(CLIPVisionConfig(**dataclasses.asdict(cfg))).eval()
    with torch.no_grad():  # zero biases, unit norms and tiny projections by default: all must count
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=["gelu", "quick_gelu"])
def case(request, tmp_path_factory):
    cfg = dataclasses.replace(TINY, hidden_act=request.param)
    return cfg, save_reference(tmp_path_factory.mktemp("image_encoder"), cfg)


@pytest.fixture(scope="module")
def pixels():
    return np.random.default_rng(0).standard_normal((2, 56, 56, 3), np.float32)


def run_reference(folder, pixels, dtype=torch.float32):
    with torch.no_grad():
        model = CLIPVisionModel.from_pretrained(folder, dtype=dtype).eval()
        states = model(torch.tensor(pixels.transpose(0, 3, 1, 2)), output_hidden_states=True).hidden_states
    return states[-2].float().numpy()


def load(folder, cfg, dtype=jnp.float32):
    files = TensorFiles.find(folder)
    return load_module(
        lambda: CLIPVisionEncoder(cfg, dtype=dtype, rngs=nnx.Rngs(0)),
        files,
        image_encoder_rules(files.shapes, cfg.num_hidden_layers),
    )


def test_output_equals_the_penultimate_hidden_state_of_transformers(case, pixels):
    cfg, folder = case
    actual = load(folder, cfg)(jnp.asarray(pixels))
    assert relative_error(actual, run_reference(folder, pixels)) < FORWARD


def test_published_keys_with_their_prefix_load_the_same_model(case, pixels, tmp_path):
    cfg, folder = case
    tensors = load_file(folder / "model.safetensors")
    assert not any(key.startswith("vision_model.") for key in tensors)
    save_file({f"vision_model.{key}": value for key, value in tensors.items()}, tmp_path / "model.safetensors")
    np.testing.assert_array_equal(load(tmp_path, cfg)(jnp.asarray(pixels)), load(folder, cfg)(jnp.asarray(pixels)))


@pytest.mark.parametrize("prefix", ["", "vision_model."])
def test_an_image_encoder_with_projection_is_the_one_without(pixels, tmp_path, prefix):
    torch.manual_seed(0)
    cfg = CLIPVisionConfig(**dataclasses.asdict(TINY), projection_dim=10)
    CLIPVisionModelWithProjection(cfg).eval().save_pretrained(tmp_path)
    expected, tensors = run_reference(tmp_path, pixels), load_file(tmp_path / "model.safetensors")
    assert "visual_projection.weight" in tensors
    vision = {key.removeprefix("vision_model."): x for key, x in tensors.items() if key != "visual_projection.weight"}
    named = {prefix + key: x for key, x in vision.items()} | {"visual_projection.weight": torch.ones(10, 40)}
    save_file(named, tmp_path / "model.safetensors", {"format": "pt"})
    assert relative_error(load(tmp_path, TINY)(jnp.asarray(pixels)), expected) < FORWARD


def test_bfloat16_is_as_close_to_float32_as_transformers_own(case, pixels):
    cfg, folder = case
    exact = run_reference(folder, pixels)
    actual = load(folder, cfg, jnp.bfloat16)(jnp.asarray(pixels))
    assert actual.dtype == jnp.bfloat16
    assert relative_error(actual, exact) < 2 * relative_error(run_reference(folder, pixels, torch.bfloat16), exact)


def test_rules_are_complete_for_the_published_size():
    cfg = ImageEncoderConfig()
    with torch.device("meta"):
        reference = CLIPVisionModel(CLIPVisionConfig(**dataclasses.asdict(cfg)))
    sources = {f"vision_model.{key}": tuple(value.shape) for key, value in reference.state_dict().items()}
    model = nnx.eval_shape(lambda: CLIPVisionEncoder(cfg, dtype=jnp.float32, rngs=nnx.Rngs(0)))
    found = plan(sources, {path: s.shape for path, s in flat_shapes(nnx.state(model)).items()},
                 image_encoder_rules(sources, cfg.num_hidden_layers))  # fmt: skip
    unread = set(sources) - set(found)
    assert len(found) == 5 + 31 * 16
    assert all(".layers.31." in key or ".post_layernorm." in key for key in unread)
    assert len(unread) == 16 + 2


def test_a_random_model_is_finite_and_of_order_one(pixels):
    y = CLIPVisionEncoder(TINY, dtype=jnp.float32, rngs=nnx.Rngs(0))(jnp.asarray(pixels))
    assert 0.5 < float(jnp.sqrt((y * y).mean())) < 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(hidden_act="relu"), "hidden_act='relu' is not implemented"),
        (dict(image_size=60), "no multiple of patch_size=14"),
        (dict(num_hidden_layers=1), "at least 2"),
    ],
)
def test_a_configuration_that_is_not_implemented_is_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        CLIPVisionEncoder(dataclasses.replace(TINY, **change), dtype=jnp.float32, rngs=nnx.Rngs(0))


def test_pixels_of_another_size_are_refused():
    model = CLIPVisionEncoder(TINY, dtype=jnp.float32, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="takes .B, 56, 56, 3."):
        model(jnp.zeros((1, 56, 70, 3)))
