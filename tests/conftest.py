"""Shared test set-up: runtime shape checks, eight virtual CPU devices, float32 matmuls in full precision, and programs
that are compiled quickly and once a session."""

import gc
import os

from jaxtyping import install_import_hook

install_import_hook("jaxwan", "beartype.beartype")

import jax  # noqa: E402
import pytest  # noqa: E402
from compilation import as_in_use, compile_quickly  # noqa: E402
from jax.experimental.compilation_cache.compilation_cache import reset_cache  # noqa: E402

os.environ.setdefault("JAXWAN_COMPILATION_CACHE", "0")  # nothing of tests in the user's cache folder
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_default_matmul_precision", "highest")


@pytest.fixture(scope="session", autouse=True)
def compilation(tmp_path_factory):
    """Programs that several files or workers need, such as the VAE's, are compiled by the first of them."""
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent
    jax.config.update("jax_compilation_cache_dir", str(root / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)  # others are compiled sooner than read
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    reset_cache()  # JAX asks for the folder once, when it first compiles, which files may do when they are imported
    if jax.default_backend() == "cpu":
        compile_quickly()


@pytest.fixture(scope="module")
def optimised():
    """Programs as in use, for what is claimed of their bits: with less of it the last ones do differ."""
    with as_in_use():
        yield


@pytest.fixture(scope="module", autouse=True)
def _forget():
    """A process that keeps the programs of all files would need gigabytes."""
    yield
    jax.clear_caches()
    gc.collect()
