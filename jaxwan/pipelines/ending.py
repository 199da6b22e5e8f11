"""How a command ends before its time: at once, whatever native code its threads are in, and without half a file."""

import os
import select
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import suppress

leaving_nothing_half: list[Callable[[], object]] = []  # called before the end, for what is being written just then


def end_on_signals() -> None:
    """From now on Ctrl-C, SIGTERM and SIGHUP end this process within a moment, with status 128 and the signal's number.

    For commands, before they start other threads; in a notebook Ctrl-C stays a KeyboardInterrupt. Python's own handlers
    wait for the main thread, which may compile for minutes, and its exit waits for other threads that do; so a thread
    takes the signals here, and waits for none. What was ignored, as under nohup, stays ignored.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        return
    numbers = {n for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) != signal.SIG_IGN}
    signal.pthread_sigmask(signal.SIG_BLOCK, numbers)  # in threads that are started later too
    threading.Thread(target=_wait_for, args=(numbers,), daemon=True).start()


def _wait_for(numbers: set[signal.Signals]) -> None:
    number = signal.sigwait(numbers)
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
