"""Attention on TPUs: the Pallas kernel in interpret mode against float64, and its programs for TPUs without one."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec
from oracle import plain_attention, relative_error

from jaxwan.kernels import attention as module
from jaxwan.kernels import attention_tpu
from jaxwan.kernels.attention import Attended, attention, attention_with_lse, merge
from jaxwan.kernels.attention_tpu import block_size

on_tpu = partial(attention, implementation="tpu")
on_tpu_with_lse = partial(attention_with_lse, implementation="tpu")
TOLERANCES = {jnp.float32: 2e-6, jnp.bfloat16: 6e-3}  # a few of its own steps; half a step of the output


@pytest.fixture
def interpreted(monkeypatch):
    """The kernel on a CPU, in blocks of up to 256 rows of float32 and 512 of bfloat16."""
    make = attention_tpu.splash.make_splash_mha
    monkeypatch.setattr(attention_tpu.splash, "make_splash_mha", partial(make, interpret=True))
    monkeypatch.setattr(attention_tpu, "BLOCK", 512)


def arrays(b, q, s, n, k, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    return tuple(jnp.asarray(rng.standard_normal(shape), dtype) for shape in ((b, q, n, k), (b, s, n, k), (b, s, n, k)))


@pytest.mark.parametrize(
    ("rows", "size"), [(1, 128), (128, 128), (257, 384), (512, 512), (1024, 1024), (1025, 640), (75_600, 1024),
                       (32_760, 1024), (27_280, 640), (9_450, 640)],
)  # fmt: skip
def test_blocks_are_few_and_full(rows, size):
    assert block_size(rows, 2) == size
    assert rows <= 1024 or -rows % size == min(-rows % other for other in range(512, 1025, 128))
    assert block_size(rows, 4) <= 512


def check(attended, inputs, dtype):
    """An output and its log-sum-exps against float64."""
    expected, expected_lse = plain_attention(*inputs)
    assert attended.out.dtype == dtype and attended.lse.dtype == jnp.float32
    assert relative_error(np.asarray(attended.out, np.float32), expected) < TOLERANCES[dtype]
    # queries are rounded once more after they were scaled, which moves a logit of up to 4 by half a step at most
    np.testing.assert_allclose(attended.lse, expected_lse, atol=4e-6 if dtype == jnp.float32 else 4 * 2**-9)


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((2, 1, 9, 1, 8), jnp.float32),
        ((1, 37, 600, 3, 64), jnp.bfloat16),
        ((1, 300, 257, 2, 128), jnp.float32),
        ((1, 600, 257, 2, 128), jnp.bfloat16),
        ((2, 128, 512, 2, 128), jnp.float32),  # no pads
    ],
)
def test_the_kernel_equals_float64_whatever_the_lengths(interpreted, shape, dtype):
    inputs = arrays(*shape, dtype)
    check(jax.jit(on_tpu_with_lse)(*inputs), inputs, dtype)


def test_without_log_sum_exps_it_is_the_same(interpreted):
    inputs = arrays(2, 37, 300, 2, 64)
    np.testing.assert_array_equal(*(jax.jit(f)(*inputs) for f in (on_tpu, lambda *x: on_tpu_with_lse(*x).out)))


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_keys_behind_the_length_are_not_looked_at(interpreted, dtype):
    lengths = np.array([0, 1, 129, 300])  # of three blocks of float32: all hidden, all but one, some, only the pads
    q, k, v = arrays(4, 37, 300, 2, 64, dtype)
    loud = [jnp.where(jnp.arange(300)[:, None, None] < lengths.reshape(-1, 1, 1, 1), x, 1e4) for x in (k, v)]
    attended = jax.jit(on_tpu_with_lse)(q, *(x.astype(dtype) for x in loud), key_length=jnp.asarray(lengths))
    np.testing.assert_array_equal(attended.out[0], jnp.zeros_like(q[0]))
    np.testing.assert_array_equal(attended.lse[0], jnp.full(q.shape[1:3], -jnp.inf))
    for i, length in enumerate(lengths[1:], 1):
        own = slice(i, i + 1), slice(length)
        check(Attended(*(x[own[0]] for x in attended)), (q[own[0]], k[own], v[own]), dtype)


def test_merged_parts_are_attention_over_all_keys(interpreted):
    q, k, v = arrays(1, 37, 300, 2, 64)

    @jax.jit
    def in_parts(q, k, v):
        merged = Attended(jnp.zeros(q.shape), jnp.full(q.shape[:-1], -jnp.inf))
        for start, count in ((0, 100), (100, 0), (200, 100), (100, 100)):
            part = slice(start, start + 100)
            merged = merge(merged, on_tpu_with_lse(q, k[:, part], v[:, part], key_length=jnp.array([count])))
        return merged

    check(in_parts(q, k, v), (q, k, v), jnp.float32)


@pytest.mark.parametrize("function", [attention, attention_with_lse])
@pytest.mark.parametrize(
    ("width", "dtype", "biased", "taken"),
    [
        (128, jnp.bfloat16, False, True),
        (64, jnp.bfloat16, False, True),
        (128, jnp.bfloat16, True, False),
        (128, jnp.float32, False, False),
        (32, jnp.bfloat16, False, False),
    ],
)
def test_on_tpus_the_kernel_is_chosen_for_the_models_own_shapes(monkeypatch, function, width, dtype, biased, taken):
    monkeypatch.setattr(module.jax, "default_backend", lambda: "tpu")
    bias = jnp.zeros((1, 9)) if biased else None
    program = jax.make_jaxpr(partial(function, bias=bias))(*arrays(1, 9, 9, 2, width, dtype))
    assert ("splash" in str(program)) == taken


@pytest.mark.parametrize("function", [on_tpu, on_tpu_with_lse])
def test_a_name_never_falls_back(function):
    inputs = arrays(1, 9, 9, 2, 8)
    with pytest.raises(ValueError, match="implementation='tpu' takes no bias here: leave it out, or choose 'xla'"):
        function(*inputs, bias=jnp.zeros((1, 9)))
    if jax.default_backend() != "tpu":
        with pytest.raises(ValueError, match="interpret mode"):
            function(*inputs)


@pytest.mark.parametrize("function", [on_tpu, on_tpu_with_lse])
@pytest.mark.parametrize(
    ("queries", "keys", "heads"),
    [
        (75_600, 75_600, 40),  # A14B, 720 x 1280 x 81
        (75_600, 512, 40),
        (27_280, 27_280, 24),  # TI2V-5B, 704 x 1280 x 121
        (9_450, 9_450, 40),  # a ring of 8 at 720p
    ],
)
def test_the_official_shapes_are_one_kernel_on_tpus(function, queries, keys, heads):
    q, kv = (jax.ShapeDtypeStruct((1, n, heads, 128), jnp.bfloat16) for n in (queries, keys))
    exported = jax.export.export(jax.jit(function), platforms=["tpu"])(q, kv, kv)
    program = exported.mlir_module()
    assert program.count("@tpu_custom_call(") == program.count("custom_call @") == 1 and "dot_general" not in program
    out = (((1, queries, heads, 128), jnp.bfloat16), ((1, queries, heads), jnp.float32))
    assert [(a.shape, a.dtype) for a in exported.out_avals] == list(out[: len(exported.out_avals)])
    assert len(exported.out_avals) == (1 if function is on_tpu else 2)


@pytest.mark.parametrize("devices", [1, 2])
def test_a_device_of_a_mesh_runs_it_on_its_own_part(devices):
    mesh = AbstractMesh((devices,), ("sp",), axis_types=(AxisType.Auto,))
    spec = PartitionSpec(None, "sp")
    own = jax.shard_map(  # not on CPUs: `ring.check_types` asks for no proof of types
        lambda q, k, v, lengths: on_tpu_with_lse(q, k, v, key_length=lengths), mesh=mesh,
        in_specs=(spec, spec, spec, PartitionSpec()), out_specs=Attended(spec, spec), check_vma=False,
    )  # fmt: skip
    q = jax.ShapeDtypeStruct((1, 9_450 * devices, 40, 128), jnp.bfloat16, sharding=NamedSharding(mesh, spec))
    lengths = jax.ShapeDtypeStruct((1,), jnp.int32, sharding=NamedSharding(mesh, PartitionSpec()))
    exported = jax.export.export(jax.jit(own), platforms=["tpu"])(q, q, q, lengths)
    assert exported.nr_devices == devices
    assert exported.mlir_module().count("@tpu_custom_call(") == 1
    assert "tensor<1x40x9600x128xbf16>" in exported.mlir_module()  # its own queries, in 15 blocks
