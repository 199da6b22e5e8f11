"""The UMT5 encoder against transformers' UMT5EncoderModel with random weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from oracle import relative_error
from safetensors.torch import load_file, save_file
from transformers import UMT5Config, UMT5EncoderModel

from jaxwan.config import ConfigError, TextEncoderConfig
from jaxwan.convert.diffusers import TEXT_ENCODER, text_encoder_rules
from jaxwan.convert.files import TensorFiles
from jaxwan.convert.load import flat_shapes, load_module
from jaxwan.convert.rules import CheckpointError, plan
from jaxwan.models.text_encoder import UMT5Encoder, position_buckets

# Two float32 implementations differ by 7e-7; erf instead of tanh costs 2.4e-4, one distance in a wrong bucket 4e-2.
FORWARD = 2e-5

# 3 heads of 10 are not d_model 36; 160 tokens reach past max_distance 128.
TINY = dict(vocab_size=80, d_model=36, d_kv=10, d_ff=56, num_layers=3, num_heads=3)
LENGTH = 160


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    model = UMT5EncoderModel(UMT5Config(**TINY))
    with torch.no_grad():  # fresh norms are ones and fresh biases small: both must count
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    path = tmp_path_factory.mktemp("text_encoder")
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def batch():
    """One text of 23 tokens and one of full length, padded with token 0."""
    tokens = np.random.default_rng(0).integers(1, TINY["vocab_size"], (2, LENGTH)).astype(np.int32)
    mask = np.arange(LENGTH) < np.array([[23], [LENGTH]])
    return np.where(mask, tokens, 0).astype(np.int32), mask


def run_reference(folder, batch, dtype=torch.float32):
    tokens, mask = map(torch.tensor, batch)
    with torch.no_grad():
        model = UMT5EncoderModel.from_pretrained(folder, dtype=dtype).eval()
        return model(tokens.long(), mask.long()).last_hidden_state.float().numpy()


def load(folder, dtype=jnp.float32):
    def make():
        return UMT5Encoder(TextEncoderConfig(**TINY), dtype=dtype, rngs=nnx.Rngs(0))

    files = TensorFiles.find(folder)
    return load_module(make, files, text_encoder_rules(files.shapes))


def test_hidden_states_equal_transformers_on_a_padded_batch(folder, batch):
    tokens, mask = batch
    actual = load(folder)(jnp.asarray(tokens), jnp.asarray(mask))
    expected = run_reference(folder, batch)
    assert relative_error(actual, expected) < FORWARD
    assert relative_error(actual[0, :23], expected[0, :23]) < FORWARD


@pytest.mark.parametrize("names", [["shared"], ["encoder.embed_tokens"], ["shared", "encoder.embed_tokens"]])
def test_either_name_of_the_tied_table_will_do(folder, batch, tmp_path, names):
    tensors = load_file(folder / "model.safetensors")
    table = next(tensors.pop(f"{n}.weight") for n in ("shared", "encoder.embed_tokens") if f"{n}.weight" in tensors)
    tensors.pop("encoder.embed_tokens.weight", None)
    save_file(tensors | {f"{name}.weight": table.clone() for name in names}, tmp_path / "model.safetensors")
    tokens, mask = map(jnp.asarray, batch)
    np.testing.assert_array_equal(load(tmp_path)(tokens, mask), load(folder)(tokens, mask))


def test_an_integer_mask_means_the_same_as_a_boolean_one(folder, batch):
    tokens, mask = map(jnp.asarray, batch)
    model = load(folder)
    np.testing.assert_array_equal(model(tokens, mask), model(tokens, mask.astype(jnp.int32)))


def test_tokens_behind_the_mask_change_no_visible_row(folder, batch):
    tokens, mask = map(jnp.asarray, batch)
    model = load(folder)
    other = model(jnp.where(mask, tokens, 7), mask)
    np.testing.assert_array_equal(model(tokens, mask)[mask], other[mask])
    assert not np.array_equal(model(tokens, jnp.ones_like(mask))[0, :23], other[0, :23])


def test_bfloat16_is_as_close_to_float32_as_transformers_own(folder, batch):
    tokens, mask = map(jnp.asarray, batch)
    exact = run_reference(folder, batch)
    model = load(folder, jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(model))} == {jnp.dtype(jnp.bfloat16)}
    actual = model(tokens, mask)
    assert actual.dtype == jnp.bfloat16
    assert relative_error(actual, exact) < 2 * relative_error(run_reference(folder, batch, torch.bfloat16), exact)


def test_rules_are_complete_for_the_published_size():
    cfg = TextEncoderConfig()
    with torch.device("meta"):
        reference = UMT5EncoderModel(
            UMT5Config(vocab_size=256384, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64)
        )
    sources = {key: tuple(value.shape) for key, value in reference.state_dict().items()}
    assert "encoder.embed_tokens.weight" in sources  # the copy that some files hold
    model = nnx.eval_shape(lambda: UMT5Encoder(cfg, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))
    targets = {path: s.shape for path, s in flat_shapes(nnx.state(model)).items()}
    assert len(plan(sources, targets, TEXT_ENCODER)) == len(sources) - 1
    del sources["shared.weight"]
    with pytest.raises(CheckpointError, match="1 missing .shared.weight"):
        plan(sources, targets, TEXT_ENCODER)


def test_position_buckets_change_at_the_known_distances():
    buckets = position_buckets(512, 32, 128)
    before, after = buckets[511, ::-1], buckets[0]  # keys at distances 0..511 before and after the query
    assert np.flatnonzero(np.diff(before)).tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 11, 15, 22, 31, 45, 63, 90]
    assert (before[0], before[7], before[8], before[511]) == (0, 7, 8, 15)
    np.testing.assert_array_equal(after[1:], before[1:] + 16)


def test_a_random_model_is_finite_and_of_order_one():
    model = UMT5Encoder(TextEncoderConfig(**TINY), dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    y = model(jnp.arange(64)[None], jnp.ones((1, 64), bool)).astype(jnp.float32)
    assert 0.5 < float(jnp.sqrt((y * y).mean())) < 2


def test_a_feed_forward_that_is_not_gated_gelu_is_refused():
    with pytest.raises(ConfigError, match="feed_forward_proj='relu'"):
        TextEncoderConfig.from_json(TINY | {"feed_forward_proj": "relu"})
