"""What a submitted call is from outside: how far it is, and its result; and the videos that it is inside."""

import time
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from jaxwan.pipelines.arguments import Number
from jaxwan.pipelines.denoise import Entry
from jaxwan.pipelines.encoders import Encoders
from jaxwan.pipelines.output import Output
from jaxwan.pipelines.progress import Progress
from jaxwan.pipelines.request import Job, Request

if TYPE_CHECKING:
    from jaxwan.engine.engine import Engine
    from jaxwan.engine.ring import RingTask

State = Literal["queued", "encoding", "denoising", "decoding", "done", "failed", "aborted"]
OVER = ("done", "failed", "aborted")
Otherwise = Callable[[Output, Path, Exception], Path | None]  # (a video's latents, where its file failed, why)


class Aborted(Exception):
    """The result of a call that was aborted, or that an engine was closed upon."""


class QueueFull(RuntimeError):
    """More calls wait than the engine's `queue` allows: try again when others are done."""


class NotFinite(ValueError):
    """A video whose numbers became NaN or infinite: which, in which step, by which expert."""


class Standing(NamedTuple):
    """How far a call is. steps: of all of its videos' denoising; groups: of decoded frames, a latent frame each."""

    state: State
    steps: int
    num_steps: int
    groups: int
    num_groups: int

    @property
    def fraction(self) -> float:
        """Of steps and groups together, 0 to 1; 1 only when the result is there."""
        if self.state == "done":
            return 1.0
        return min(0.999, (self.steps + self.groups) / max(1, self.num_steps + self.num_groups))


@dataclass(eq=False)
class Video:
    """One of a call's videos on its way. entry: as it was encoded, or taken out of the ring; latents: once denoised
    [T, H, W, Z]."""

    handle: "Handle"
    number: int  # within the call
    request: Request
    entry: Entry | None = None
    done: int = 0  # steps
    groups: int = 0  # decoded
    latents: np.ndarray | None = None
    finished: bool = False  # all that was asked for of it is there

    @property
    def num_steps(self) -> int:
        """Of its whole way."""
        return int(self.request.table.num_steps)

    @property
    def order(self) -> tuple[int, int, int]:
        """Who comes first: urgent ones, then as they arrived."""
        return -self.handle.priority, self.handle.arrived, self.number


class Handle:
    """A submitted call. `result()` waits for its `Output`; `await handle` does in asyncio. Made by `Engine.submit`."""

    def __init__(
        self, engine: "Engine", call: "Call", arrived: int, ring: "RingTask", key: tuple, paths: Sequence[Path]
    ):  # fmt: skip
        self._engine, self.call, self.arrived = engine, call, arrived
        self.ring, self.key, self.paths = ring, key, tuple(paths)  # key: of the programs that it runs
        self.submitted = time.perf_counter()
        self.videos = [Video(self, number, request) for number, request in enumerate(call.job.requests)]
        self.written: list[Path | None] = [*paths] or [None] * len(self.videos)  # where files are in the end, if any is
        self.state: State = "queued"
        self.seconds: dict[str, float] = {}  # of device time, by phase, and `wait` until it was first worked on
        self.encoders: Encoders | None = None  # where a part of its encoding is done
        self.frames: list[Any] = [None] * len(self.videos)
        self.future: Future[Output] = Future()
        self.future.set_running_or_notify_cancel()  # it is aborted by `abort`, and not by the future

    @property
    def job(self) -> Job:
        """What is made."""
        return self.call.job

    @property
    def priority(self) -> int:
        """Higher is more urgent."""
        return self.call.priority

    @property
    def over(self) -> bool:
        """Whether nothing more happens to it."""
        return self.state in OVER

    @property
    def progress(self) -> Standing:
        """How far it is."""
        videos, groups = self.videos, self.ring.bucket.latent_shape[0] if self.call.decodes else 0
        return Standing(
            self.state, sum(v.done for v in videos), sum(v.num_steps for v in videos),
            sum(v.groups for v in videos), groups * len(videos),
        )  # fmt: skip

    def preview(self, video: int = 0, timeout: Number | None = None) -> np.ndarray | None:
        """The estimate of the final latents (C, T, h, w) after the latest step of one of its videos; None before the
        first. Waits for the unit of work that is under way."""
        return self._engine.preview(self.videos[video], timeout)

    def abort(self) -> bool:
        """End it within one segment of the ring, free its slots and leave no half file; False where it was over."""
        return self._engine.abort(self)

    def result(self, timeout: Number | None = None) -> Output:
        """The call's output. Raises `Aborted`, the call's own error, or TimeoutError."""
        return self.future.result(timeout)

    def done(self) -> bool:
        """Whether `result` would not wait."""
        return self.future.done()

    def add_done_callback(self, function: Callable[["Handle"], Any]) -> None:
        """Call a function with this handle once it is over, in a thread of the engine's, or now if it is."""
        self.future.add_done_callback(lambda _: function(self))

    def __await__(self) -> Generator[Any, None, Output]:
        import asyncio

        return asyncio.wrap_future(self.future).__await__()

    def __repr__(self) -> str:
        standing = self.progress
        return f"Handle({self.state}, {standing.steps} of {standing.num_steps} steps)"


@dataclass(frozen=True, eq=False)
class Call:
    """What was submitted. given: the arguments as they came, None of a job that was made elsewhere."""

    job: Job
    keep: str  # `output.kept_type`
    save: Any = None
    priority: int = 0
    given: dict[str, Any] | None = field(default=None, repr=False)
    progress: Progress = field(default_factory=lambda: Progress(visible=False))  # of encoding
    otherwise: Otherwise | None = None

    @property
    def decodes(self) -> bool:
        """Whether frames are made."""
        return self.keep != "latent" or self.save is not None
