"""A file that is written while its frames are made, by an encoder in a thread of its own."""

from collections.abc import Iterator, Mapping
from contextlib import suppress
from fractions import Fraction
from pathlib import Path
from queue import Empty, Queue
from threading import Thread
from typing import Any

import numpy as np

from jaxwan.pipelines.media.writing import AS_USUAL, Compression, tell_frames_left_out, write_output

_WAITING = 2  # groups of frames, at most, that are made and not yet encoded; no fewer, see `BackgroundWriter._write`


class _GivenUp(Exception):
    """There will be no more frames, and no file."""


class BackgroundWriter:
    """Writes what `save_output` does of frames that come group by group, while others are made.

        with BackgroundWriter("clip.mp4", 81, 16) as writer:
            for frames in groups:
                writer.put(frames)
            writer.finish()

    Where the block is left before `finish`, there is no file, and no thread.
    """

    def __init__(
        self, path: Path, num_frames: int, fps: int | float | Fraction, metadata: Mapping[str, str] | None = None,
        overwrite: bool = True, compression: Compression = AS_USUAL,
    ):  # fmt: skip
        tell_frames_left_out(path, num_frames, fps)
        self.path = path
        self._queue: Queue = Queue(_WAITING)
        self._num_frames, self._given_up = num_frames, False
        self._error: BaseException | None = None
        file = path, fps, metadata, overwrite, compression
        self._thread = Thread(target=self._write, args=file, name=f"write {path.name}", daemon=True)

    def __enter__(self) -> "BackgroundWriter":
        self._thread.start()
        return self

    def put(self, frames: np.ndarray) -> None:
        """Hand over the next frames (F, H, W, 3), uint8 or float in [0, 1], which nobody changes any more.

        Waits while the encoder is behind. Raises what has ended the writing, as `save_output` does.
        """
        self._raise()
        self._queue.put(frames)

    @property
    def behind(self) -> bool:
        """Whether `put` would wait."""
        return self._queue.full() and self._error is None

    def finish(self) -> None:
        """Wait until the file is there. Raises what has ended the writing."""
        self._queue.put(None)
        self._thread.join()
        self._raise()

    def __exit__(self, *_: Any) -> None:
        if self._thread.is_alive():
            self._given_up = True
            self._empty()
            self._queue.put(None)
            self._thread.join()

    def _write(self, *file: Any) -> None:
        try:
            write_output(self, *file)
        except _GivenUp:
            pass
        except BaseException as error:
            self._error = error
        finally:
            self._empty()  # one who waits in `put` goes on, and no more than that group and the end come after

    def __len__(self) -> int:
        return self._num_frames

    def __iter__(self) -> Iterator[np.ndarray]:
        while (frames := self._queue.get()) is not None:
            yield from frames
        if self._given_up:
            raise _GivenUp

    def _empty(self) -> None:
        with suppress(Empty):
            while True:
                self._queue.get_nowait()

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error
