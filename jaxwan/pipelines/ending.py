"""How a command ends before its time: at once, whatever native code its threads are in, and without half a file."""

import os
import select
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
_heard: list[tuple[Callable[[int], object], str]] = []  # who is told of the next signal, and what is said
leaving_nothing_half: list[Callable[[], object]] = []  # called before the end, for what is being written just then


def end_on_signals() -> None:
    """From now on Ctrl-C, SIGTERM and SIGHUP end this process within a moment, with status 128 and the signal's number.

    For commands, in their main thread; in a notebook Ctrl-C stays a KeyboardInterrupt. Python's own handlers wait for
    the main thread, which may compile for minutes, and its exit waits for other threads that do; so a thread is woken
    here, and waits for none. What was ignored, as under nohup, stays ignored.
    """
    woken, wake = os.pipe()
    os.set_blocking(wake, False)  # as Python demands
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    threading.Thread(target=_end_when_woken, args=(woken,), daemon=True).start()
    for number in SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, lambda *_: None)  # any handler of Python's has the number written to `wake`


@contextmanager
def first_signal_to(hear: Callable[[int], object], saying: str) -> Iterator[None]:
    """While the block runs, the first signal of those that would end this process is told to a function instead, in
    another thread, which must not wait in it. The next one ends the process."""
    told = hear, saying
    _heard.append(told)
    try:
        yield
    finally:
        with suppress(ValueError):
            _heard.remove(told)


def _end_when_woken(woken: int) -> None:
    while True:
        (number,) = os.read(woken, 1)
        if number not in SIGNALS:
            continue  # someone handles it
        try:
            hear, saying = _heard.pop()
        except IndexError:
            break
        _tell(saying)
        hear(number)
    try:
        for remove in leaving_nothing_half:
            with suppress(OSError):
                remove()
        _tell("interrupted")
    finally:
        os._exit(128 + number)


def _tell(text: str) -> None:
    """A line on stderr, below a bar, unless its reader has stopped and it would wait."""
    with suppress(OSError, ValueError, AttributeError):
        file = sys.stderr.fileno()
        if select.select([], [file], [], 0)[1]:
            os.write(file, ("\n" * os.isatty(file) + text + "\n").encode())
