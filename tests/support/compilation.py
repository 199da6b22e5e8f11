"""How the programs of tests are compiled: in the least time, unless a test needs them as in use."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
from jax._src import compiler

# The emitters that XLA had before its present ones: where nothing is optimised, they take half of the time.
OLDER_EMITTERS = {"xla_cpu_use_fusion_emitters": False}

_quick = False


def compile_quickly(value: bool = True) -> None:
    """From now on leave out what makes programs fast but slow to compile: they give the same but for rounding."""
    global _quick
    _quick = value
    jax.config.update("jax_disable_most_optimizations", value)


@contextmanager
def compiling_quickly(value: bool = True) -> Iterator[None]:
    """Whether what is compiled inside is compiled quickly, or as in use."""
    before = _quick
    compile_quickly(value)
    yield
    compile_quickly(before)


def use_older_emitters() -> None:
    """Compile quickly with OLDER_EMITTERS; where JAX or XLA have them no more, it takes longer."""
    make_options = getattr(compiler, "get_compile_options", None)
    try:
        jax.jit(lambda x: x + 1).lower(1).compile(compiler_options=OLDER_EMITTERS)
    except jax.errors.JaxRuntimeError:
        return
    if make_options is None:
        return

    def make(*args: Any, env_options_overrides: dict | None = None, **kwargs: Any) -> Any:
        given = (OLDER_EMITTERS if _quick else {}) | (env_options_overrides or {})
        return make_options(*args, env_options_overrides=given, **kwargs)

    compiler.get_compile_options = make
