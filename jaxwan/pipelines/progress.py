"""The stages of a run as a person sees them: a progress bar for each, and how long each took."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import jax

_COMPILE_EVENTS = ("/jax/core/compile/jaxpr_to_mlir_module_duration", "/jax/core/compile/backend_compile_duration")


class Stages:
    """Seconds of each stage, with compilation told apart: `seconds["denoise"]` excludes what `compile` counts.

    What other threads compile meanwhile delays nothing here, and is not counted.
    """

    def __init__(self, *, progress: bool = True):
        self.progress = progress
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str, total: int, unit: str = "it") -> Iterator:
        """A progress bar of `total` units; time adds up under `name`. Yields the bar's `update`."""
        from tqdm import tqdm

        compiling, own = 0.0, threading.get_ident()

        def listen(event: str, duration: float, **_):
            nonlocal compiling
            if event in _COMPILE_EVENTS and threading.get_ident() == own:  # called in the thread that compiles
                compiling += duration

        jax.monitoring.register_event_duration_secs_listener(listen)
        start = time.perf_counter()
        scale = unit == "B"
        bar = tqdm(total=total, desc=f"{name:>8}", unit=unit, unit_scale=scale, disable=not self.progress, leave=True)
        try:
            yield bar.update
        finally:
            bar.close()
            jax.monitoring.unregister_event_duration_listener(listen)
            self._add(name, time.perf_counter() - start - compiling)
            self._add("compile", compiling)

    def _add(self, name: str, seconds: float) -> None:
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds
