"""Parameters written as checkpoint files and read back."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors import safe_open

from jaxwan.config import TextEncoderConfig
from jaxwan.convert.diffusers import TEXT_ENCODER
from jaxwan.convert.files import TensorFiles
from jaxwan.convert.load import fill, flat_shapes, load_module
from jaxwan.convert.save import save_arrays, save_module
from jaxwan.models.text_encoder import UMT5Encoder

CFG = TextEncoderConfig(vocab_size=20, d_model=8, d_kv=3, d_ff=10, num_layers=3, num_heads=2)


def make():
    return UMT5Encoder(CFG, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))


def random_module():
    """What `make` builds, with numbers that nothing had to be compiled for."""
    graph, abstract = nnx.split(nnx.eval_shape(make))
    rng = np.random.default_rng(0)
    arrays = {path: jnp.asarray(rng.standard_normal(s.shape), s.dtype) for path, s in flat_shapes(abstract).items()}
    return nnx.merge(graph, fill(abstract, arrays))


def test_a_saved_module_loads_bit_for_bit_in_its_own_dtype(tmp_path):
    module = random_module()
    path = save_module(module, tmp_path / "text_encoder", TEXT_ENCODER, stem="model")
    assert path == tmp_path / "text_encoder" / "model.safetensors"
    loaded = load_module(make, TensorFiles.find(path.parent), TEXT_ENCODER)
    before, after = (jax.tree.leaves(nnx.state(m)) for m in (module, loaded))
    assert {leaf.dtype for leaf in after} == {jnp.dtype(jnp.bfloat16)}
    for a, b in zip(before, after, strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_the_file_says_the_format_that_diffusers_insists_on(tmp_path):
    path = save_module(random_module(), tmp_path, TEXT_ENCODER)
    with safe_open(path, "numpy") as file:
        assert file.metadata() == {"format": "pt"}


def test_transposed_rows_are_written_in_their_own_order(tmp_path):
    arrays = {"layers.q.kernel": np.arange(24, dtype=np.float32).reshape(2, 3, 4)}
    save_arrays(arrays, tmp_path, TEXT_ENCODER)
    with safe_open(tmp_path / "diffusion_pytorch_model.safetensors", "numpy") as file:
        row = file.get_tensor("encoder.block.1.layer.0.SelfAttention.q.weight")
    np.testing.assert_array_equal(row, arrays["layers.q.kernel"][1].T)


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text(json.dumps({}))
    with pytest.raises(OSError, match="file/x/diffusion_pytorch_model.safetensors cannot be written"):
        save_arrays({"embedding": np.zeros((2, 2))}, tmp_path / "file" / "x", TEXT_ENCODER)
