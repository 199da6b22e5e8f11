"""The phases of a run as a person sees them: a bar for each, or plain lines, and how long each took."""

import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import jax

_COMPILE_EVENTS = ("/jax/core/compile/jaxpr_to_mlir_module_duration", "/jax/core/compile/backend_compile_duration")
_LINE_EVERY = 10.0  # seconds, where there is no terminal
Update = Callable[..., Any]  # called with the units done since the last call, and a note if there is one to show


class Progress:
    """Seconds of each phase, with compilation told apart: `seconds["denoise"]` excludes what `compile` counts.

    What other threads compile meanwhile delays nothing here, and is not counted.
    """

    def __init__(self, *, visible: bool = True):
        self.visible = visible
        self.seconds: dict[str, float] = {}
        self._elsewhere = 0.0  # seconds of phases that count as others'

    @contextmanager
    def phase(self, name: str, total: int, unit: str, *, apart: bool = True) -> Iterator[Update]:
        """Show `total` units being done, if any; time adds up under `name`. Yields what is told the units just done.

        apart=False: what is compiled is no other phase's but this one's.
        """
        compiling, own, elsewhere = 0.0, threading.get_ident(), self._elsewhere

        def listen(event: str, duration: float, **_):
            nonlocal compiling
            if (
                apart and event in _COMPILE_EVENTS and threading.get_ident() == own
            ):  # called in the thread that compiles
                compiling += duration

        jax.monitoring.register_event_duration_secs_listener(listen)
        start = time.perf_counter()
        try:
            shown = self.visible and total and sys.stderr is not None  # it may have been closed
            with _shown(name, total, unit) if shown else _hidden() as update:
                yield update
        finally:
            jax.monitoring.unregister_event_duration_listener(listen)
            self._add(name, time.perf_counter() - start - compiling - (self._elsewhere - elsewhere))
            self._add("compile", compiling)

    @contextmanager
    def elsewhere(self, name: str) -> Iterator[None]:
        """Inside of a phase: this time adds up under another name, and not under the phase's."""
        start = time.perf_counter()
        try:
            yield
        finally:
            taken = time.perf_counter() - start
            self._elsewhere += taken
            self._add(name, taken)

    def _add(self, name: str, seconds: float) -> None:
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds


@contextmanager
def _hidden() -> Iterator[Update]:
    yield lambda done, note="": None


@contextmanager
def _shown(name: str, total: int, unit: str) -> Iterator[Update]:
    """A bar in terminals and notebooks; elsewhere a line now and then, and one at the end."""
    if sys.stderr.isatty() or "ipykernel" in sys.modules:
        from tqdm import TqdmWarning

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", TqdmWarning)  # a notebook without ipywidgets gets bars of text
            from tqdm.auto import tqdm
        with tqdm(total=total, desc=f"{name:>8}", unit=unit, unit_scale=unit == "B") as bar:

            def update(done: int, note: str = "") -> None:
                bar.set_postfix_str(note, refresh=False)
                bar.update(done)

            yield update
        return
    lines = _Lines(name, total, unit)
    yield lines.update
    lines.end()


class _Lines:
    """Progress on a stream that cannot take a line back."""

    def __init__(self, name: str, total: int, unit: str):
        self.name, self.total, self.unit, self.done = name, total, unit, 0
        self.start = self.last = time.perf_counter()

    def update(self, done: int, note: str = "") -> None:
        self.done += done
        now = time.perf_counter()
        if now - self.last >= _LINE_EVERY and self.done < self.total:
            self.last = now
            told = f"{self._number(self.done)} of {self._count(self.total)}"
            self._print(", ".join(filter(None, (told, self._pace(now - self.start), note))))

    def end(self) -> None:
        self._print(f"{self._count(self.done)} in {time.perf_counter() - self.start:.1f} s")

    def _pace(self, seconds: int | float) -> str:
        """How long it took so far, and the rest takes at that; of bytes also how many a second."""
        if not self.done:
            return f"{seconds:.0f} s"
        rate = f", {self.done / 1e6 / seconds:,.0f} MB/s" if self.unit == "B" else ""
        return f"{seconds:.0f} s{rate}, {seconds * (self.total - self.done) / self.done:.0f} s left"

    def _count(self, number: int) -> str:
        return f"{self._number(number)} {'MB' if self.unit == 'B' else self.unit + 's' * (number != 1)}"

    def _number(self, number: int) -> str:
        return f"{number / 1e6:,.1f}" if self.unit == "B" else str(number)

    def _print(self, text: str) -> None:
        with suppress(OSError):  # a reader that is gone, or a full disk, ends no run
            print(f"{self.name}: {text}", file=sys.stderr, flush=True)
