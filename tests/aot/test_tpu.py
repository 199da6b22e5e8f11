"""What XLA compiles for TPUs, without one.

It needs libtpu, of the version that jax[tpu] asks for, beside the environment:

    pip install --no-deps --target DIR libtpu==VERSION
    PYTHONPATH=DIR TPU_LIBRARY_PATH=DIR/libtpu/libtpu.so TPU_SKIP_MDS_QUERY=1 pytest -q -m aot -s tests/aot/test_tpu.py

It shows that the programs exist and fit, since XLA refuses others: into a TPU's memory, and the blocks of attention's
kernel into the fast memory of a core. Not what they compute, nor how fast.
"""

import importlib.util
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, SingleDeviceSharding
from published import write_configs

from jaxwan.kernels import attention
from jaxwan.pipelines.call import make_job
from jaxwan.pipelines.checkpoint import read_checkpoint
from jaxwan.pipelines.parts import abstract_parts
from jaxwan.pipelines.warmup import job_programs
from jaxwan.sharding.mesh import AXES, MeshSpec

pytestmark = [
    pytest.mark.aot,
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="see the file's docstring"),
    pytest.mark.usefixtures("optimised"),
]

TPUS = ("v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1")


@pytest.fixture(scope="module", autouse=True)
def not_kept():
    """Programs for TPUs take longer to write down than tests have reason to read them again."""
    usual = jax.config.jax_persistent_cache_min_compile_time_secs
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1e9)
    yield
    jax.config.update("jax_persistent_cache_min_compile_time_secs", usual)


def tpus(topology: str) -> list:
    return topologies.get_topology_desc(topology, "tpu").devices


def compiled(function, *arguments):
    return function.trace(*arguments).lower(lowering_platforms=("tpu",)).compile()


@pytest.mark.parametrize("topology", TPUS)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize(
    ("queries", "keys", "heads", "width"),
    [(75_600, 75_600, 40, 128), (75_600, 512, 40, 128), (27_280, 27_280, 24, 128), (9_450, 257, 5, 64)],
)
def test_attention_fits_the_fast_memory(topology, dtype, queries, keys, heads, width):
    here = SingleDeviceSharding(tpus(topology)[0])
    q, kv = (jax.ShapeDtypeStruct((1, n, heads, width), dtype, sharding=here) for n in (queries, keys))
    lengths = jax.ShapeDtypeStruct((1,), jnp.int32, sharding=here)

    def attend(q, k, v, key_length):
        return attention.attention_with_lse(q, k, v, key_length=key_length, implementation="tpu")

    text = compiled(jax.jit(attend), q, kv, kv, lengths).as_text()
    assert text.count('custom_call_target="tpu_custom_call"') == 1


@pytest.mark.parametrize(("mesh", "ulysses", "kernels", "collectives"), [
    ("pp=8", None, 2, {"collective-permute"}),  # self- and cross-attention
    ("pp=2,sp=4", 2, 3, {"collective-permute", "all-to-all"}),  # keys of both groups, and cross-attention
])  # fmt: skip
def test_a_ring_of_the_largest_model_at_its_full_size_compiles(
    tmp_path, monkeypatch, mesh, ulysses, kernels, collectives
):
    monkeypatch.setattr(attention, "_tpu_fits", lambda q: q.dtype == jnp.bfloat16 and q.shape[-1] == 128)
    spec, devices = MeshSpec.parse(mesh, ulysses), np.array(tpus("v6e:2x4"))
    checkpoint = read_checkpoint(write_configs(tmp_path, "Wan2.2-T2V-A14B"))
    placed = Mesh(devices.reshape(spec.sizes), AXES, axis_types=(AxisType.Auto,) * 5)
    parts = abstract_parts(checkpoint, placed, "bfloat16", "float32", ulysses=ulysses)
    _, ring, arguments = next(job_programs(checkpoint, parts, make_job(checkpoint, prompt="a", seed=0)))
    program = compiled(ring, *arguments)
    peak = program.memory_analysis().peak_memory_in_bytes / 2**30
    print(f"\n{mesh} on TPU v6e: {peak:.1f} GiB a device")
    text = program.as_text()
    assert text.count('custom_call_target="tpu_custom_call"') == kernels
    kinds = ("collective-permute", "all-to-all", "all-reduce", "all-gather")
    assert {kind for kind in kinds if re.search(rf"{kind}(-start)?\(", text)} == collectives
