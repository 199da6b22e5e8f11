"""Videos of one bucket in a ring that runs as long as there are any: they join, step, leave and are put back."""

import math
import time
from bisect import insort
from collections.abc import Iterator
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from jaxwan.engine.admission import state_bytes
from jaxwan.engine.handle import NotFinite, Video
from jaxwan.engine.lanes import Task
from jaxwan.pipelines.denoise import Bucket, Denoiser, Entry, Running
from jaxwan.pipelines.dit import Fault
from jaxwan.sharding.timetable import Place, Timetable
from jaxwan.sharding.turns import work_at

if TYPE_CHECKING:
    from jaxwan.engine.engine import Engine

SEGMENT = 0.25  # seconds that a segment of several rounds may take: what an abort, or who arrives, waits for at most


class Entered(NamedTuple):
    """A tick of a traced ring: what entered, as (call, video, branch, step), on each rank; None where nothing did."""

    tick: int
    entered: tuple[tuple[int, int, int, int] | None, ...]


class RingTask(Task):
    """A bucket's ring, its videos, and those that wait for a place in it. Of the engine's lane for the mesh.

    A unit is a segment: whole rounds, after which every video has finished as many steps. The device holds the ring's
    arrays only while there are videos in it.
    """

    def __init__(self, engine: "Engine", denoiser: Denoiser, bucket: Bucket, slots: int):
        super().__init__()
        self.bucket, self.waiting = bucket, []
        self.ticks = self.idle_ticks = 0  # that were run; in which nothing entered on any rank
        self.trace: list[Entered] | None = None
        self._engine, self._denoiser, self._slots = engine, denoiser, slots
        self._programs = denoiser.programs(bucket)
        self._running: dict[Place, Video] = {}
        self._device: Running | None = None
        self._table: Timetable = self._programs.timetable()
        self._tick_seconds = 0.0  # of late; 0 before the first
        self._shut_out: float | None = None  # since when it has waited to be let onto the devices

    # Asked by the engine, with its lock

    @property
    def resident(self) -> bool:
        """Whether the ring's arrays are on the devices."""
        return self._device is not None

    @cached_property
    def state_bytes(self) -> int:
        """Of its arrays, on each device."""
        return state_bytes(self._programs.running_shapes)

    @property
    def first(self) -> tuple[int, int, int] | None:
        """The `order` of the video that is to come next."""
        return min((video.order for video in self.waiting if not video.handle.over), default=None)

    @property
    def shut_out(self) -> float:
        """Seconds for which it has waited to be let onto the devices."""
        return 0.0 if self._shut_out is None else time.perf_counter() - self._shut_out

    def wants(self, priority: int) -> bool:
        """Whether it makes sense to encode one more video now: fewer than it has slots for wait that go before it."""
        return sum(video.handle.priority >= priority for video in self.waiting) < self._slots

    @property
    def busy(self) -> bool:
        """Whether there are videos in it, or waiting."""
        return bool(self._running or self.waiting)

    def ready(self) -> bool:
        """Whether there are videos to step, or to begin with."""
        if self._running:
            return True
        self._tidy()
        ready = bool(self.waiting) and self._engine.may_reside(self)
        if ready or not self.waiting:
            self._shut_out = None
        elif self._shut_out is None:
            self._shut_out = time.perf_counter()
        return ready

    def videos(self) -> Iterator[Video]:
        """Those in the ring and those that wait."""
        yield from self._running.values()
        yield from self.waiting

    # Units

    def unit(self) -> None:
        """A segment, with all who come and go before it."""
        try:
            self._change()
            if self._running:
                self._segment()
        except BaseException as error:  # the program failed, of which the videos in it know nothing
            lost, self._running, self._device = list(self._running.values()), {}, None
            self._table = self._programs.timetable()
            for video in lost:
                self._engine.fail(video.handle, program_failed(video, error))
        if not self._running:
            self._device = None

    def read(self, video: Video) -> Entry | None:
        """A video as it is now, on the host; None if it was not encoded yet."""
        for place, other in self._running.items():
            if other is video:
                return self._entry(place)
        return video.entry

    def preview(self, video: Video) -> np.ndarray | None:
        """The latest estimate of its final latents [T, H, W, Z]; None before its first step, or where it is gone."""
        entry = self.read(video)
        return None if entry is None or int(entry.done) == 0 else np.asarray(entry.sampler.m1)

    def _entry(self, place: Place) -> Entry:
        video, done = self._running[place], np.array(self._table.steps_done(place), np.int32)
        assert video.entry is not None and self._device is not None
        return video.entry._replace(sampler=self._programs.read(self._device, place).sampler, done=done)

    # Who comes and goes

    def _change(self) -> None:
        """Those whose calls are over leave, and who waits comes, at the end of a round."""
        gone = [place for place, video in self._running.items() if video.handle.over]
        for place in gone:
            self._running.pop(place).entry = None
        self._table = self._table.released(*gone)
        joining = self._join()
        if joining:
            self._table = self._table.changed(
                {place: self._programs.member(video.entry) for place, video in joining.items() if video.entry}
            )
        else:
            self._table = self._table.shortened()
        if joining and self._device is None:
            self._device = self._programs.empty()
        for place, video in joining.items():
            assert video.entry is not None and self._device is not None
            self._device = self._programs.insert(self._device, place, video.entry)
            self._engine.begin(video.handle, "denoising")

    def _join(self) -> dict[Place, Video]:
        """Give free places to those who come first, and places of less urgent videos to more urgent ones."""
        joining: dict[Place, Video] = {}
        self._tidy()
        while self.waiting and self._engine.may_join(self):
            if len(self._running) >= self._slots and not self._make_room(self.waiting[0]):
                break
            place = min(
                ((rank, slot) for rank in range(self._programs.ranks) for slot in range(self.bucket.slots)
                 if (rank, slot) not in self._running),
                key=lambda p: (sum(p[0] == rank for rank, _ in self._running), p),
            )  # fmt: skip
            self._running[place] = joining[place] = self.waiting.pop(0)
        return joining

    def _tidy(self) -> None:
        """Those that wait, as they are to come, without those whose calls are over."""
        with self._engine.lock:  # others append to the list
            for video in self.waiting:
                if video.handle.over:
                    video.entry = None
            self.waiting = sorted((v for v in self.waiting if not v.handle.over), key=lambda video: video.order)

    def _make_room(self, video: Video) -> bool:
        """Put back the least urgent running video, if it is less urgent than this one."""
        place = max(self._running, key=lambda p: self._running[p].order)
        if self._running[place].handle.priority >= video.handle.priority:
            return False
        self._put_back(place)
        return True

    @property
    def _least_urgent(self) -> float:
        """The priority above which a call need not wait for a place."""
        if len(self._running) < self._slots:
            return -math.inf
        return float(min(video.handle.priority for video in self._running.values()))

    def _put_back(self, place: Place) -> None:
        """A running video waits again, as far as it is."""
        video = self._running[place]
        video.entry = self._entry(place)
        del self._running[place]
        self._table = self._table.released(place)
        with self._engine.lock:
            insort(self.waiting, video, key=lambda other: other.order)

    # Ticks

    def _segment(self) -> None:
        assert self._device is not None
        ticks = self._table.ticks_of_rounds(self._rounds())
        self._note(ticks)
        start = time.perf_counter()
        self._device = self._programs.run(self._denoiser.weights, self._device, self._table, ticks)
        faults = self._programs.faults(self._device)
        taken = time.perf_counter() - start
        self._table = self._table.ran(ticks)
        self._tick_seconds = taken / max(1, ticks)
        self._engine.spent([video.handle for video in self._running.values()], "denoise", taken)
        for place, video in list(self._running.items()):
            video.done = self._table.steps_done(place)
            if place in faults:
                self._engine.fail(video.handle, not_finite(video, faults[place]))
            elif video.done == video.num_steps:
                entry = self._entry(place)
                del self._running[place]
                self._engine.denoised(video, entry)

    def _rounds(self) -> int:
        """As many rounds as SEGMENT has time for, but one where somebody may soon join, and none in which a place stays
        free that somebody waits for."""
        left = [video.num_steps - video.done for video in self._running.values()]
        most = max(left) if not self.waiting else min(left)
        if not self._tick_seconds or self._engine.expects(self, self._least_urgent):
            return 1
        return max(1, min(most, int(SEGMENT / (self._tick_seconds * self._table.now.period))))

    def _note(self, ticks: int) -> None:
        """Count what enters in the next ticks."""
        for tick in range(self._table.tick, self._table.tick + ticks):
            phase = self._table.phases[tick >= self._table.now.since]
            entered = []
            for rank, (plan, turns) in enumerate(zip(phase.plans, phase.turns, strict=True)):
                work = work_at(plan, turns, tick - phase.since)
                if work is None or (video := self._running.get((rank, work.slot))) is None:
                    entered.append(None)
                else:
                    entered.append((video.handle.arrived, video.number, work.branch, work.step))
            self.idle_ticks += not any(entered)
            if self.trace is not None:
                self.trace.append(Entered(self.ticks, tuple(entered)))
            self.ticks += 1


def program_failed(video: Video, error: BaseException) -> RuntimeError:
    """What to say of a video whose program failed."""
    told = RuntimeError(f"{_named(video)}, {video.done} of {video.num_steps} steps done: its program failed: {error}")
    told.__cause__ = error
    return told


def _named(video: Video) -> str:
    prompt = video.request.prompt
    return f"{prompt if prompt is not None else '(embeddings)'!r:.80}"


def not_finite(video: Video, fault: Fault) -> NotFinite:
    """What to say of a video that failed."""
    expert = int(np.asarray(video.entry.inputs.controls.expert)[fault.step]) if video.entry else 0
    which = f" by the {'low' if expert else 'high'}-noise expert" * (video.request.boundary_ratio is not None)
    step = f"step {fault.step + 1} of {video.num_steps}"
    return NotFinite(
        f"{_named(video)}, {step}{which}: the {fault.what} is not finite: is the checkpoint damaged, or its dtype too "
        "narrow for it?"
    )
