"""What commands share: what they tell in a terminal, in a pipe or to nobody at all, and flags that are misspelt."""

import argparse
import codecs
import difflib
import io
import json
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterable
from typing import Any, NoReturn

log = logging.getLogger("jaxwan.command")


class Told:
    """stdout or stderr, of which a failure costs no video: whatever it cannot take is dropped from then on."""

    def __init__(self, stream: Any):
        self.stream = open(os.devnull, "w") if stream is None else stream  # closed by the caller
        self.failure: OSError | None = None
        if isinstance(self.stream, io.TextIOWrapper):
            self.stream.reconfigure(errors="escaped")

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> None:
        self._try(self.stream.write, text)

    def flush(self) -> None:
        self._try(self.stream.flush)

    def _try(self, function: Callable, *arguments: str) -> None:
        try:
            function(*arguments)
        except OSError as error:  # a reader that is gone, a terminal that was closed, a full disk
            self.failure = error
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())  # where Python writes the rest at its exit


def tell_on_stderr(*, quiet: bool) -> None:
    """What the library notes, and Python's warnings, without their lines of code; with `quiet` nothing."""
    lines = _Lines()
    lines.setFormatter(logging.Formatter("%(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[lines], force=True)
    logging.getLogger("jaxwan").setLevel(logging.ERROR if quiet else logging.INFO)
    warnings.showwarning = lambda message, *_, **__: log.warning("warning: %s", message)


def tell_above_bar(line: str) -> None:
    """A line on stdout, while stderr may show a bar on the same terminal."""
    from tqdm import tqdm

    with tqdm.external_write_mode(file=sys.stdout):
        print(line, flush=True)


def tell_error(message: str, *, as_json: bool) -> None:
    """What is wrong, in a line on stderr, and for scripts on stdout too."""
    print(f"error: {message}", file=sys.stderr)
    if as_json:
        print(json.dumps({"error": message}))


class Parser(argparse.ArgumentParser):
    """Explains a mistake in one line, with the nearest flag."""

    def parse_args(self, args=None, namespace=None):  # pyright: ignore[reportIncompatibleMethodOverride]
        self.given = sys.argv[1:] if args is None else args
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            given = unknown[0].split("=")[0]
            if not given.startswith("-"):
                self.error(f"what is {given!r} for? Texts go behind a flag, in quotes: --prompt {' '.join(unknown)!r}")
            flags = [option for action in self._actions for option in action.option_strings]
            near = difflib.get_close_matches(given, flags, 1)
            self.error(f"there is no flag {given}: {f'did you mean {near[0]}?' if near else 'see --help'}")
        return parsed

    def error(self, message: str) -> NoReturn:
        tell_error(message, as_json="--json" in self.given)
        self.exit(2)


class _Lines(logging.Handler):
    """Plain lines on stderr, above the bar if there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        tqdm.write(self.format(record), file=sys.stderr)


def _escaped(error: UnicodeError) -> tuple[str | bytes, int]:
    """A codec's answer to what cannot be encoded: the bytes of a file's name as they are, and escapes for all else."""
    try:
        return codecs.lookup_error("surrogateescape")(error)
    except UnicodeError:
        return codecs.backslashreplace_errors(error)


codecs.register_error("escaped", _escaped)


def named_files(given: Iterable[str]) -> dict[str, str]:
    """The files of --component by name. Raises ValueError for one that is no NAME=FILE, or a name twice."""
    named: dict[str, str] = {}
    for text in given:
        name, equals, file = text.partition("=")
        if not equals or not file or name in named:
            again = f"names {name} again" if name in named else "is no NAME=FILE"
            raise ValueError(f"--component {text} {again}: such as --component vae=wan_2.1_vae.safetensors")
        named[name] = file
    return named
