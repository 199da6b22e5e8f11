"""Shared test set-up: runtime shape checks, eight virtual CPU devices, float32 matmuls in full precision, and programs
that are compiled quickly and once a session."""

import gc
import logging
import os
from contextlib import contextmanager
from pathlib import Path

from jaxtyping import install_import_hook

install_import_hook("jaxwan", "beartype.beartype")

# Processes that tests start import this clone too, as the tests do by `pythonpath` in pyproject.toml
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")]))
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"  # of JAX in processes of their own; of this one, see `compilation`
os.environ.setdefault("OMP_NUM_THREADS", "1")  # torch's threads gain nothing on models so small, and wait for cores

import jax  # noqa: E402
import pytest  # noqa: E402
from compilation import compile_quickly, compiling_quickly, use_older_emitters  # noqa: E402
from jax.experimental.compilation_cache.compilation_cache import reset_cache  # noqa: E402

os.environ.setdefault("JAXWAN_COMPILATION_CACHE", "0")  # nothing of tests in the user's cache folder
compile_quickly()
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_default_matmul_precision", "highest")


LONGEST = ("test_ring_runs.py", "test_bundled_model.py")  # files to begin with, so that no process ends alone with one


def pytest_xdist_auto_num_workers(config):
    """A process a core, and no more than four of up to 2 GB each; single files, and what is slow or compiles for GPUs,
    run in this one."""
    if config.option.markexpr.startswith(("slow", "gpu", "aot")) or all(".py" in argument for argument in config.args):
        return 0
    return min(4, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.name not in LONGEST)
    gc.freeze()  # else every collection of garbage looks through all that is imported


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
        use_older_emitters()
    else:
        compile_quickly(False)


@pytest.fixture(scope="module")
def optimised():
    """Programs as in use."""
    with compiling_quickly(False):
        yield


@pytest.fixture(scope="module")
def optimised_ring(optimised):
    """The ring as in use, because its bits are compared between programs: optimised less, the last ones do differ.

    VAE and encoders take a video or text by itself: the same program on both sides of a comparison.
    """
    from jaxwan.models.video_coder import VideoCoder
    from jaxwan.pipelines.encoder_ring import EncoderRing

    with pytest.MonkeyPatch.context() as patch:
        for cls, name in ((VideoCoder, "encode_chunk"), (VideoCoder, "decode_chunk"), (EncoderRing, "__call__")):
            patch.setattr(cls, name, compiling_quickly()(getattr(cls, name)))
        yield


@pytest.fixture(scope="module", autouse=True)
def _forget():
    """A process that keeps the programs of all files would need gigabytes."""
    yield
    jax.clear_caches()
    gc.collect()


@contextmanager
def kept_logging():
    """For what runs a script in this process: it sets up logging as if the process were its own."""
    loggers = logging.getLogger(), logging.getLogger("jaxwan")
    before = [(logger, logger.level, logger.handlers[:]) for logger in loggers]
    yield
    for logger, level, handlers in before:
        logger.setLevel(level)
        logger.handlers[:] = handlers


@pytest.fixture
def logging_as_before():
    """`kept_logging` around a test."""
    with kept_logging():
        yield


@pytest.fixture(scope="module")
def logging_as_before_module():
    """`kept_logging` around the fixtures of a module."""
    with kept_logging():
        yield
