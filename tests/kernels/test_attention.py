"""Attention: the XLA form in query chunks against the reference that holds queries x keys."""

import re
from functools import partial
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import plain_attention, relative_error

from jaxwan.kernels import attention as module
from jaxwan.kernels.attention import Attended, attend, attention, attention_with_lse, merge, query_chunk


def arrays(b, q, s, n, k, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    return tuple(jnp.asarray(rng.standard_normal(shape), dtype) for shape in ((b, q, n, k), (b, s, n, k), (b, s, n, k)))


SHAPES = [(2, 37, 37, 3, 10), (1, 50, 13, 2, 22), (2, 1, 9, 1, 8), (1, 64, 64, 4, 16)]


@pytest.mark.parametrize("shape", SHAPES)
def test_the_reference_is_softmax_attention(shape):
    inputs = arrays(*shape)
    assert relative_error(attend(*inputs), plain_attention(*inputs)[0]) < 1e-6  # float32's own: sqrt(64 keys) * 2^-24


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
    assert relative_error(out.astype(jnp.float32), plain_attention(*inputs)[0]) < tolerance
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
        assert relative_error(out[i : i + 1], plain_attention(q[i : i + 1], *repeated)[0]) < 1.5e-6


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


@pytest.mark.parametrize("function", [attention, attention_with_lse])
def test_no_array_is_queries_by_keys(function):
    abstract = [jax.ShapeDtypeStruct((1, 75_600, 40, 128), jnp.bfloat16)] * 3
    found = list(shapes_in(jax.make_jaxpr(lambda *x: function(*x, implementation="xla"))(*abstract).jaxpr))
    assert (1, 40, 22, 75_600) in found  # a chunk's logits: the search sees into the loop
    assert not [shape for shape in found if sum(size >= 75_600 for size in shape) > 1]


def test_without_a_name_the_cpu_takes_the_xla_form():
    inputs = arrays(1, 9, 9, 2, 8)
    np.testing.assert_array_equal(attention(*inputs), attention(*inputs, implementation="xla"))


@pytest.mark.parametrize("function", [attention, attention_with_lse])
def test_a_name_never_falls_back(function):
    inputs = arrays(1, 9, 9, 2, 8)
    with pytest.raises(ValueError, match="implementation='flash' is unknown: choose one of cudnn, tpu, xla"):
        function(*inputs, implementation="flash")


@pytest.mark.parametrize("function", [attention, attention_with_lse])
def test_a_bias_is_refused_where_it_is_not_taken(function):
    with pytest.raises(ValueError, match="implementation='cudnn' takes no bias here: leave it out, or choose 'xla'"):
        function(*arrays(1, 9, 9, 2, 8, jnp.bfloat16), bias=jnp.zeros((1, 9)), implementation="cudnn")


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="cuDNN is there")
@pytest.mark.parametrize("function", [attention, attention_with_lse])
def test_cudnn_raises_where_it_is_missing(function):
    with pytest.raises((RuntimeError, ValueError, NotImplementedError)):
        jax.block_until_ready(function(*arrays(1, 9, 9, 2, 8, jnp.bfloat16), implementation="cudnn"))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("logits_bytes", [1 << 28, 1])
def test_the_log_sum_exp_is_the_float64_one(monkeypatch, shape, logits_bytes):
    monkeypatch.setattr(module, "LOGITS_BYTES", logits_bytes)
    inputs = arrays(*shape)
    out, lse = jax.jit(attention_with_lse)(*inputs)
    expected, expected_lse = plain_attention(*inputs)
    assert relative_error(out, expected) < 1e-6  # float32's own, as the next
    np.testing.assert_allclose(lse, expected_lse, atol=2e-6)


def hidden_somewhere(batch, keys):
    """Biases of counts and hidden keys; the first text hides keys 4 to 7, the last one all of its last keys."""
    bias = np.log(np.random.default_rng(1).integers(1, 500, (batch, keys))).astype(np.float32)
    bias[0, 4:7] = bias[-1, keys // 2 :] = -np.inf
    return bias


@pytest.mark.parametrize("shape", SHAPES[:2])
@pytest.mark.parametrize(
    ("logits_bytes", "dtype", "tolerance"),
    [(1 << 28, jnp.float32, 1e-6), (1, jnp.float32, 1e-6), (1 << 28, jnp.bfloat16, 6e-3)],  # half a bfloat16 step
)
@pytest.mark.parametrize("biased", [False, True])
def test_merged_parts_are_attention_over_all_keys(monkeypatch, shape, logits_bytes, dtype, tolerance, biased):
    monkeypatch.setattr(module, "LOGITS_BYTES", logits_bytes)
    batch, queries, keys, heads, width = shape
    q, k, v = arrays(*shape, dtype)
    bias = jnp.asarray(hidden_somewhere(batch, keys)) if biased else None

    @jax.jit
    def in_parts(q, k, v, bias):
        merged = Attended(jnp.zeros((batch, queries, heads, width)), jnp.full((batch, queries, heads), -jnp.inf))
        for part in (slice(4, 7), slice(0, 4), slice(7, keys)):
            keys_bias = None if bias is None else bias[:, part]
            merged = merge(merged, attention_with_lse(q, k[:, part], v[:, part], bias=keys_bias, implementation="xla"))
        return merged

    merged = in_parts(q, k, v, bias)
    expected, expected_lse = plain_attention(q, k, v, bias)
    assert merged.out.dtype == merged.lse.dtype == jnp.float32
    assert relative_error(merged.out, expected) < tolerance
    np.testing.assert_allclose(merged.lse, expected_lse, atol=4e-6)  # of up to 11: a few float32 steps of 1e-6


def test_merging_is_exact_but_for_rounding():
    q, k, v = arrays(2, 37, 37, 3, 10)
    with jax.enable_x64(True):
        parts = [
            Attended(*map(jnp.asarray, plain_attention(q, k[:, s], v[:, s]))) for s in np.split(np.arange(37), [9])
        ]
        merged = merge(*parts)
        for actual, expected in zip(merged, plain_attention(q, k, v), strict=True):
            assert relative_error(actual, expected) < 1e-15  # float64's own; the parts apart: over 0.1


def test_a_part_that_saw_nothing_changes_no_bit():
    q, k, v = arrays(1, 50, 13, 2, 22)
    seen = jax.jit(lambda bias: attention_with_lse(q, k, v, bias=bias))
    nothing, something = seen(jnp.full((1, 13), -jnp.inf)), seen(jnp.zeros((1, 13)))
    np.testing.assert_array_equal(nothing.out, jnp.zeros_like(q))
    np.testing.assert_array_equal(nothing.lse, jnp.full(q.shape[:-1], -jnp.inf))
    for both in (merge(nothing, something), merge(something, nothing)):
        jax.tree.map(np.testing.assert_array_equal, both, something)
    jax.tree.map(np.testing.assert_array_equal, merge(nothing, nothing), nothing)


@pytest.mark.parametrize("logits_bytes", [1 << 28, 1])
@pytest.mark.parametrize("biased", [False, True])
def test_keys_behind_the_length_are_not_looked_at(monkeypatch, logits_bytes, biased):
    monkeypatch.setattr(module, "LOGITS_BYTES", logits_bytes)
    lengths = np.array([0, 1, 8, 13])
    q, k, v = arrays(4, 37, 13, 3, 10)
    bias = hidden_somewhere(4, 13)[::-1] if biased else None  # of all 13 keys some are hidden
    out, lse = jax.jit(attention_with_lse)(q, k, v, bias=bias, key_length=jnp.asarray(lengths))
    np.testing.assert_array_equal(out[0], jnp.zeros_like(out[0]))
    np.testing.assert_array_equal(lse[0], jnp.full_like(lse[0], -jnp.inf))
    for i, length in enumerate(lengths[1:], 1):
        own = slice(i, i + 1), slice(length)
        expected, expected_lse = plain_attention(q[own[0]], k[own], v[own], None if bias is None else bias[own])
        assert relative_error(out[own[0]], expected) < 1e-6  # float32's own, as the next
        np.testing.assert_allclose(lse[own[0]], expected_lse, atol=4e-6)


CUDNN_CALL = "__cudnn$fmhaSoftmax"


def lowered_for_cuda(function, q, kv, **arrays):
    """The program of `function` by cuDNN, lowered for CUDA on any machine.

    It shows that JAX's own checks take the shapes and which call is made, not that cuDNN has a kernel for them nor what
    that computes: only a GPU shows that.
    """
    from jax._src.cudnn import fused_attention_stablehlo as private

    missing = [n for n in ("check_cudnn_version", "check_compute_capability") if not hasattr(private, n)]
    assert not missing, f"this JAX has no {missing}: find what it asks the GPU for in {private.__file__}"
    with (
        mock.patch.object(private, "check_cudnn_version", lambda: 91300),
        mock.patch.object(private, "check_compute_capability", lambda capability: capability <= "9.0"),
    ):
        return jax.export.export(
            jax.jit(partial(function, implementation="cudnn")), platforms=["cuda"],
            disabled_checks=[jax.export.DisabledSafetyCheck.custom_call(CUDNN_CALL)],
        )(q, kv, kv, **arrays)  # fmt: skip


@pytest.mark.parametrize("function", [attention, attention_with_lse])
@pytest.mark.parametrize(
    ("queries", "keys", "heads"),
    [
        (75_600, 75_600, 40),  # A14B, 720 x 1280 x 81
        (75_600, 512, 40),
        (27_280, 27_280, 24),  # TI2V-5B, 704 x 1280 x 121
        (9_450, 9_450, 40),  # a ring of 8 at 720p
    ],
)
def test_the_official_shapes_are_one_cudnn_call_on_cuda(function, queries, keys, heads):
    q, kv = (jax.ShapeDtypeStruct((1, n, heads, 128), jnp.bfloat16) for n in (queries, keys))
    exported = lowered_for_cuda(function, q, kv)
    program = exported.mlir_module()
    assert program.count(f"@{CUDNN_CALL}(%arg0, %arg1, %arg2)") == program.count("custom_call @") == 1
    assert "dot_general" not in program
    # log-sum-exps in float32: jax.nn's own would come in bfloat16
    out = (((1, queries, heads, 128), jnp.bfloat16), ((1, queries, heads), jnp.float32))
    assert [(a.shape, a.dtype) for a in exported.out_avals] == list(out[: len(exported.out_avals)])
    assert len(exported.out_avals) == (1 if function is attention else 2)
    assert "NO_MASK" in program


def test_cudnn_takes_the_number_of_keys_that_count_as_its_own():
    q, kv = (jax.ShapeDtypeStruct((2, n, 40, 128), jnp.bfloat16) for n in (9_450, 9_456))
    lengths = jax.ShapeDtypeStruct((2,), jnp.int32)
    program = lowered_for_cuda(attention_with_lse, q, kv, key_length=lengths).mlir_module()
    assert (call := re.search(rf"@{re.escape(CUDNN_CALL)}\(%arg0, %arg1, %arg2, (%\w+), %arg3\) .*", program))
    assert f"{call[1]} = stablehlo.broadcast_in_dim" in program  # all queries count
    assert "PADDING" in call[0]
    assert "dot_general" not in program


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(2, 40, 24, 3, 64), (1, 64, 64, 4, 128)])
def test_cudnn_equals_the_reference(shape):
    inputs = arrays(*shape, jnp.bfloat16)
    out = attention(*inputs, implementation="cudnn")
    assert relative_error(np.asarray(out, np.float32), plain_attention(*inputs)[0]) < 6e-3


@pytest.mark.gpu
def test_cudnns_log_sum_exp_is_the_natural_logarithm_of_scaled_logits_in_float32():
    inputs = arrays(2, 40, 24, 3, 64, jnp.bfloat16)
    out, lse = attention_with_lse(*inputs, implementation="cudnn")
    expected, expected_lse = plain_attention(*inputs)
    assert lse.dtype == jnp.float32
    assert relative_error(np.asarray(out, np.float32), expected) < 6e-3
    np.testing.assert_allclose(lse, expected_lse, atol=1e-4)  # bfloat16 would be off by up to 8e-3


@pytest.mark.gpu
def test_cudnn_looks_at_no_key_behind_the_length():
    lengths = np.array([0, 1, 17, 24], np.int32)
    q, k, v = arrays(4, 40, 24, 3, 64, jnp.bfloat16)
    out, lse = attention_with_lse(q, k, v, key_length=jnp.asarray(lengths), implementation="cudnn")
    assert (np.asarray(out[0], np.float32) == 0).all() and jnp.isneginf(lse[0]).all()
    for i, length in enumerate(lengths[1:], 1):
        own = slice(i, i + 1), slice(length)
        expected, expected_lse = plain_attention(q[own[0]], k[own], v[own])
        assert relative_error(np.asarray(out[own[0]], np.float32), expected) < 6e-3
        np.testing.assert_allclose(lse[own[0]], expected_lse, atol=1e-4)
