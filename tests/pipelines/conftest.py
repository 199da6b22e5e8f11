"""One tiny checkpoint of each family a session, and the pipelines of both sides on it, made when first asked for."""

from functools import cache

import checkpoints
import jax
import pytest
import torch

from jaxwan.pipelines.pipeline import WanPipeline


@pytest.fixture(scope="session", autouse=True)
def compilation_cache(tmp_path_factory):
    """Pipelines share many programs, such as the VAE's: compile each once a session."""
    options = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compilation_cache")),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in options}
    for name, value in options.items():
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.fixture(scope="module")
def quick_compilation():
    """Less optimised programs, which compile twice as fast: enough where results are compared within a tolerance."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """family -> its checkpoint."""

    @cache
    def make(family):
        path = tmp_path_factory.mktemp(family)
        checkpoints.make_checkpoint(path, family)
        return path

    return make


@pytest.fixture(scope="session")
def reference(folder):
    """(family, dtype, pipeline class) -> diffusers' pipeline."""

    @cache
    def load(family, dtype=torch.float32, cls=None):
        return checkpoints.load_reference(folder(family), family, dtype, cls)

    return load


@pytest.fixture(scope="session")
def pipeline(folder):
    """(family, mesh, dtype) -> ours."""

    @cache
    def load(family, mesh=None, dtype="float32"):
        return WanPipeline.from_pretrained(folder(family), mesh, dtype, progress=False)

    return load
