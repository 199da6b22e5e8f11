"""What only an accelerator can show; run with `pytest -m gpu` on a machine that has one."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import relative_error

from jaxwan import BUNDLED_MODEL, WanPipeline
from jaxwan.kernels.attention import attend, attention
from jaxwan.kernels.blend import blend

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif("jax.default_backend() != 'gpu'", reason="needs a CUDA device"),
]
# 16-bit inputs and weights: each output is a mean of values rounded to 8 bits
SIXTEEN_BITS = 1e-2


@pytest.mark.parametrize(("queries", "keys"), [(4725, 4725), (4725, 512), (4725, 257)])
def test_cudnn_attention_equals_the_reference_at_lengths_that_are_no_multiple_of_64(queries, keys):
    lengths = (queries, keys, keys)
    q, k, v = (jax.random.normal(jax.random.key(i), (1, n, 5, 128), jnp.bfloat16) for i, n in enumerate(lengths))
    actual = jax.jit(lambda *a: attention(*a, implementation="cudnn"))(q, k, v)
    expected = attend(*(x.astype(jnp.float32) for x in (q, k, v)))
    assert relative_error(actual.astype(jnp.float32), expected) <= SIXTEEN_BITS


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("to", [None, jnp.uint8])
def test_the_blending_kernel_equals_xlas_form(dtype, to):
    """Of 720p: 28 tiles, thin ones at the ends."""
    tiles = jnp.tanh(jax.random.normal(jax.random.key(0), (4, 7, 1, 4, 256, 256, 3), dtype))
    kernel, slices = (
        jax.jit(partial(blend, size=(720, 1280), stride=(192, 192), dtype=to, implementation=name))(tiles)
        for name in ("pallas", "xla")
    )
    # the same float32 operations in another order, rounded once; of uint8 a few sums on the other side of a half
    tolerance = 1e-6 if kernel.dtype == jnp.float32 else 1e-3
    assert relative_error(kernel.astype(jnp.float32), slices.astype(jnp.float32)) < tolerance


def generate(mesh, dtype):
    pipe = WanPipeline.from_pretrained(BUNDLED_MODEL, mesh, dtype, progress=False)
    return pipe(["a red circle", "a blue square"], seed=[1, 2], guidance_scale=[4.0, 1.0])


@pytest.fixture(scope="module")
def on_one_gpu():
    return generate(None, "float32")


def test_a_float32_run_equals_the_cpu(on_one_gpu, tmp_path):
    code = (
        "import numpy as np, sys; sys.path[:0] = sys.argv[2:]; from test_gpu import generate;"
        "np.save(sys.argv[1], generate(None, 'float32').latents)"
    )
    here = Path(__file__).parent
    subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "cpu.npy"), str(here), str(here / "support")],
        check=True, env=os.environ | {"JAX_PLATFORMS": "cpu", "JAX_DEFAULT_MATMUL_PRECISION": "highest"},
    )  # fmt: skip
    # the bound of a whole loop against another library
    assert relative_error(on_one_gpu.latents, np.load(tmp_path / "cpu.npy")) <= 1e-4


def test_bfloat16_is_the_default_and_stays_near_float32(on_one_gpu):
    pipe = WanPipeline.from_pretrained(BUNDLED_MODEL, progress=False)
    assert pipe.parts.denoiser.dtype == jnp.bfloat16
    # the reference's own bfloat16 error over a whole loop is 2e-2 to 4e-2
    assert relative_error(generate(None, "bfloat16").latents, on_one_gpu.latents) <= 8e-2


@pytest.mark.skipif("len(jax.devices()) < 2", reason="needs two devices")
def test_two_stages_equal_one_bit_for_bit(on_one_gpu):
    np.testing.assert_array_equal(generate("pp=2", "float32").latents, on_one_gpu.latents)
