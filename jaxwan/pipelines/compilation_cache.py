"""The user's cache folder, and compiled programs kept in it: a first run compiles for minutes, others read a file."""

import os
import time
from pathlib import Path

import jax
from jax.experimental.compilation_cache.compilation_cache import reset_cache

from jaxwan.pipelines.ending import leaving_nothing_half

VARIABLE = "JAXWAN_COMPILATION_CACHE"
KEPT_FROM = 0.2  # JAX's 1.0 leaves out the programs of small models, which together take a second
_SECONDS = "jax_persistent_cache_min_compile_time_secs"


def keep_compiled_programs() -> Path | None:
    """Let JAX keep what takes KEPT_FROM seconds or longer to compile; the folder, or None where nothing is kept.

    The folder is `jaxwan/compiled` in the user's cache folder (`$XDG_CACHE_HOME`, else `~/.cache`), unless JAX was told
    one already (`jax_compilation_cache_dir` or `$JAX_COMPILATION_CACHE_DIR`). With `JAXWAN_COMPILATION_CACHE=0` in the
    environment, or without a home, JAX's settings stay as they are.
    """
    chosen = jax.config.jax_compilation_cache_dir  # pyright: ignore[reportAttributeAccessIssue]
    if chosen is not None:
        return Path(chosen)
    if os.environ.get(VARIABLE) == "0":
        return None
    try:
        folder = cache_folder() / "compiled"
    except OSError:  # no home
        return None
    jax.config.update("jax_compilation_cache_dir", str(folder))
    if _SECONDS.upper() not in os.environ:
        jax.config.update(_SECONDS, KEPT_FROM)
    reset_cache()  # JAX asks for the folder once, when it first compiles, which may have been before
    return folder


def cache_folder() -> Path:
    """`jaxwan` in the user's cache folder (`$XDG_CACHE_HOME`, else `~/.cache`). Raises OSError without a home."""
    given = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if given.is_absolute():  # the XDG specification ignores any other
        return given / "jaxwan"
    try:
        return Path.home() / ".cache" / "jaxwan"
    except RuntimeError as error:
        raise OSError("there is no home folder for the user's cache: set XDG_CACHE_HOME") from error


def _drop_latest() -> None:
    """Remove the programs of the last second. JAX writes them in place, and what the end of its process left half would
    never be replaced: every run would warn, and compile it again."""
    folder = jax.config.jax_compilation_cache_dir  # pyright: ignore[reportAttributeAccessIssue]
    for program in [] if folder is None else Path(folder).glob("*-cache"):
        if program.stat().st_mtime > time.time() - 1:
            program.unlink(missing_ok=True)


leaving_nothing_half.append(_drop_latest)
