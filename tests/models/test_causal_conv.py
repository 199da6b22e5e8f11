"""The one convolution of the VAE against PyTorch's, in all formulations, and its halos against whole videos."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from oracle import relative_error

from jaxwan.models.causal_conv import FORMULATIONS, CausalConv3d, Chunk, conv
from jaxwan.sharding.space import Filled

TOLERANCE = 1e-6  # float32 sums of up to 81 products, in any order: sqrt(81) * 2^-24 = 5e-7


@pytest.mark.parametrize("formulation", FORMULATIONS)
@pytest.mark.parametrize(
    ("kernel", "stride", "padding"),
    [
        ((3, 3, 3), (1, 1), (1, 1, 1, 1)),
        ((3, 1, 1), (1, 1), (0, 0, 0, 0)),
        ((3, 1, 1), (2, 1), (0, 0, 0, 0)),
        ((1, 3, 3), (1, 1), (1, 1, 1, 1)),
        ((1, 3, 3), (1, 2), (0, 1, 0, 1)),  # right and below only
        ((1, 1, 1), (1, 1), (0, 0, 0, 0)),
    ],
)
def test_all_formulations_equal_torch(formulation, kernel, stride, padding):
    rng = np.random.default_rng(0)
    x, k, b = (rng.normal(size=s).astype(np.float32) for s in ((2, 5, 6, 8, 3), (*kernel, 3, 7), (7,)))
    actual = conv(jnp.asarray(x), jnp.asarray(k), jnp.asarray(b), formulation, stride=stride)
    apart = conv(jnp.asarray(x[:, 2:]), jnp.asarray(k), jnp.asarray(b), formulation, before=jnp.asarray(x[:, :2]),
                 stride=stride)  # fmt: skip
    assert relative_error(apart, actual) < TOLERANCE
    x, k, b = (
        torch.from_numpy(a).double() for a in (np.moveaxis(x, -1, 1).copy(), k.transpose(4, 3, 0, 1, 2).copy(), b)
    )
    padded = torch.nn.functional.pad(x, padding)
    expected = torch.nn.functional.conv3d(padded, k, b, (stride[0], stride[1], stride[1]))
    assert relative_error(actual, np.moveaxis(expected.numpy(), 1, -1)) < TOLERANCE


@pytest.mark.parametrize("formulation", FORMULATIONS)
@pytest.mark.parametrize("stride", [1, 2])
def test_a_picture_that_does_not_fill_its_array_is_convolved_as_if_it_ended_there(formulation, stride):
    rng = np.random.default_rng(0)
    x, k, b = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((2, 5, 8, 12, 3), (3, 3, 3, 3, 7), (7,)))
    space = Filled(jnp.array([3, 2]), (4, 3))  # units of 2 x 4 pixels
    made = conv(x, k, b, formulation, stride=(1, stride), space=space)
    alone = conv(x[:, :, :6, :8], k, b, formulation, stride=(1, stride))
    assert made.shape[2:4] == (8 // stride, 12 // stride)
    assert relative_error(made[:, :, : 6 // stride, : 8 // stride], alone) < TOLERANCE
    hidden = np.isneginf(space.bias(x)).reshape(10, 8, 12)
    assert not hidden[:, :6, :8].any() and hidden[:, 6:].all() and hidden[:, :, 8:].all()


@pytest.mark.parametrize("formulation", FORMULATIONS)
def test_chunks_with_halos_equal_the_whole_video_behind_zeros(formulation):
    layer = CausalConv3d(3, 5, (3, 3), dtype=jnp.float32, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(1), (2, 8, 4, 6, 3))
    behind_zeros = jnp.pad(x, ((0, 0), (2, 0), (0, 0), (0, 0), (0, 0)))
    whole = conv(behind_zeros, layer.kernel[...], layer.bias[...], formulation)
    cache, parts = None, []
    for start, stop in ((0, 1), (1, 2), (2, 6), (6, 8)):
        chunk = Chunk(cache, formulation)
        parts.append(layer(x[:, start:stop], chunk))
        cache = chunk.halos()
        assert [halo.shape for halo in cache] == [(2, 2, 4, 6, 3)]
    assert relative_error(jnp.concatenate(parts, 1), whole) < TOLERANCE


def test_taps_are_summed_in_float32_for_bfloat16():
    x, k = jnp.full((1, 3, 1, 1, 1), 1.0, jnp.bfloat16), jnp.array([256.0, 1.0, 1.0], jnp.bfloat16)
    y = conv(x, k.reshape(3, 1, 1, 1, 1), jnp.zeros(1, jnp.bfloat16), "taps")
    assert y.dtype == jnp.bfloat16 and float(y[0, 0, 0, 0, 0]) == 258.0  # 256 + 1 is 256 in bfloat16


def test_formulations_differ_by_the_rounding_of_bfloat16_alone():
    rng = np.random.default_rng(0)
    x, k, b = (jnp.asarray(rng.normal(size=s), jnp.bfloat16) for s in ((1, 5, 6, 8, 16), (3, 3, 3, 16, 8), (8,)))
    exact = conv(*(a.astype(jnp.float32) for a in (x, k, b)), "direct")
    for formulation in FORMULATIONS:
        made = conv(x, k, b, formulation)
        assert made.dtype == jnp.bfloat16
        assert relative_error(made.astype(jnp.float32), exact) < 2**-8  # of one rounding, or two with "direct"'s bias
