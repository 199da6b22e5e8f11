"""Attention: the XLA form in query chunks against the reference that holds queries x keys."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import relative_error

from jaxwan.kernels import attention as module
from jaxwan.kernels.attention import attend, attention, query_chunk


def arrays(b, q, s, n, k, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    return tuple(jnp.asarray(rng.standard_normal(shape), dtype) for shape in ((b, q, n, k), (b, s, n, k), (b, s, n, k)))


def plain(q, k, v):
    """softmax(q k^T / sqrt(K)) v, head by head in float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.empty_like(q)
    for b, n in np.ndindex(q.shape[0], q.shape[2]):
        logits = q[b, :, n] @ k[b, :, n].T / np.sqrt(q.shape[-1])
        weights = np.exp(logits - logits.max(axis=1, keepdims=True))
        out[b, :, n] = weights / weights.sum(axis=1, keepdims=True) @ v[b, :, n]
    return out


SHAPES = [(2, 37, 37, 3, 10), (1, 50, 13, 2, 22), (2, 1, 9, 1, 8), (1, 64, 64, 4, 16)]


@pytest.mark.parametrize("shape", SHAPES)
def test_the_reference_is_softmax_attention(shape):
    inputs = arrays(*shape)
    assert relative_error(attend(*inputs), plain(*inputs)) < 1e-6  # float32's own


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("logits_bytes", "dtype", "tolerance"),
    [(1, jnp.float32, 1e-6), (10_000, jnp.float32, 1e-6), (2_000, jnp.bfloat16, 6e-3)],  # half a bfloat16 step
)
def test_chunks_of_any_size_equal_the_reference(monkeypatch, shape, logits_bytes, dtype, tolerance):
    monkeypatch.setattr(module, "LOGITS_BYTES", logits_bytes)
    inputs = arrays(*shape, dtype)
    out = jax.jit(lambda *x: attention(*x, implementation="xla"))(*inputs)
    assert out.dtype == dtype
    assert relative_error(out.astype(jnp.float32), plain(*inputs)) < tolerance
    # a row of the softmax does not know its chunk
    np.testing.assert_allclose(*(np.asarray(x, np.float32) for x in (out, attend(*inputs))), rtol=1e-2, atol=1e-5)


@pytest.mark.parametrize("logits_bytes", [1 << 28, 1])
def test_the_logarithm_of_a_count_makes_a_key_so_many_equal_ones(monkeypatch, logits_bytes):
    monkeypatch.setattr(module, "LOGITS_BYTES", logits_bytes)
    counts = np.array([[1, 1, 502, 0, 0], [7, 0, 1, 449, 2]])  # -inf: not looked at
    q, k, v = arrays(2, 37, 5, 3, 10)
    with np.errstate(divide="ignore"):
        bias = jnp.asarray(np.log(counts), jnp.float32)
    out = jax.jit(lambda *x: attention(*x[:3], bias=x[3]))(q, k, v, bias)
    for i, count in enumerate(counts):
        repeated = (np.repeat(np.asarray(x)[i : i + 1], count, axis=1) for x in (k, v))
        # float32's own; the logarithm's rounding, of 6, is 3e-7 of a count
        assert relative_error(out[i : i + 1], plain(q[i : i + 1], *repeated)) < 1.5e-6


@pytest.mark.parametrize(
    ("batch", "queries", "keys", "heads", "chunk"),
    [
        (1, 75_600, 75_600, 40, 22),  # A14B, 720 x 1280 x 81: 12.1 MB of logits a query
        (1, 75_600, 512, 40, 3_150),
        (1, 27_280, 27_280, 24, 102),  # TI2V-5B, 704 x 1280 x 121
        (1, 20, 20, 4, 20),
        (10_000, 3, 75_600, 40, 1),  # not less than one query
    ],
)
def test_chunks_are_even_and_within_the_bytes(batch, queries, keys, heads, chunk):
    assert query_chunk(batch, queries, keys, heads) == chunk
    assert chunk == 1 or 4 * batch * heads * keys * chunk <= module.LOGITS_BYTES
    chunks = -(-queries // chunk)
    assert chunks * chunk - queries < chunks  # not one query of padding a chunk


def shapes_in(jaxpr):
    for equation in jaxpr.eqns:
        yield from (v.aval.shape for v in equation.outvars)
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda p: hasattr(p, "jaxpr")):
            if hasattr(value, "jaxpr"):
                yield from shapes_in(value.jaxpr)


def test_no_array_is_queries_by_keys():
    abstract = [jax.ShapeDtypeStruct((1, 75_600, 40, 128), jnp.bfloat16)] * 3
    found = list(shapes_in(jax.make_jaxpr(lambda *x: attention(*x, implementation="xla"))(*abstract).jaxpr))
    assert (1, 40, 22, 75_600) in found  # a chunk's logits: the search sees into the loop
    assert not [shape for shape in found if sum(size >= 75_600 for size in shape) > 1]


def test_without_a_name_the_cpu_takes_the_xla_form():
    inputs = arrays(1, 9, 9, 2, 8)
    np.testing.assert_array_equal(attention(*inputs), attention(*inputs, implementation="xla"))


def test_a_name_never_falls_back():
    inputs = arrays(1, 9, 9, 2, 8)
    with pytest.raises(ValueError, match="implementation='flash' is unknown: choose one of cudnn, xla"):
        attention(*inputs, implementation="flash")


def test_a_bias_is_refused_where_it_is_not_taken():
    with pytest.raises(ValueError, match="implementation='cudnn' takes no bias here: leave it out, or choose 'xla'"):
        attention(*arrays(1, 9, 9, 2, 8, jnp.bfloat16), bias=jnp.zeros((1, 9)), implementation="cudnn")


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="cuDNN is there")
def test_cudnn_raises_where_it_is_missing():
    with pytest.raises((RuntimeError, ValueError, NotImplementedError)):
        jax.block_until_ready(attention(*arrays(1, 9, 9, 2, 8, jnp.bfloat16), implementation="cudnn"))


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(2, 40, 24, 3, 64), (1, 64, 64, 4, 128)])
def test_cudnn_equals_the_reference(shape):
    inputs = arrays(*shape, jnp.bfloat16)
    out = attention(*inputs, implementation="cudnn")
    assert relative_error(np.asarray(out, np.float32), plain(*inputs)) < 6e-3
