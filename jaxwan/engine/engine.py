"""Calls that arrive at any time share one ring: continuous batching, abort, priorities, previews (docs/engine.md)."""

import itertools
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from jaxwan.engine.admission import Admission, state_bytes
from jaxwan.engine.coding import CodeTask, DecodeTask, EncodeTask, public_latents
from jaxwan.engine.handle import Aborted, Call, Handle, Otherwise, QueueFull, State, Video
from jaxwan.engine.lanes import Lane
from jaxwan.engine.ring import Entered, RingTask
from jaxwan.engine.saving import SavedCalls, check_folder, save_calls
from jaxwan.pipelines.arguments import Number, local_path, whole
from jaxwan.pipelines.axes import to_public
from jaxwan.pipelines.call import make_job, with_prompt
from jaxwan.pipelines.denoise import Bucket, Entry
from jaxwan.pipelines.load import check_use
from jaxwan.pipelines.media import BackgroundWriter
from jaxwan.pipelines.output import Output, Saving, as_pil, kept_type
from jaxwan.pipelines.parts import job_settings
from jaxwan.pipelines.pipeline import WanPipeline, tell
from jaxwan.pipelines.progress import Progress
from jaxwan.pipelines.request import Job
from jaxwan.pipelines.warmup import compiling, job_programs, programs_key

RESIDENT = 2  # rings of different buckets that are on the devices at once
log = logging.getLogger(__name__)
PATIENCE = 5.0  # seconds for which a ring goes on taking new videos while one with an older call waits to be let in
RINGS = 8  # of different buckets that are kept for further calls, with their programs, beside those in use


class Engine:
    """Runs calls of a pipeline together as they arrive.

        with Engine(pipe, slots=4) as engine:
            handles = [engine.submit(prompt, seed=7) for prompt in prompts]
            videos = [handle.result() for handle in handles]

    A call's result has the bits that `pipe(…)` gives, whatever else runs, and whenever it came. slots: videos of the
    same kind (size, number of text rows, kind of input) that are denoised together; each takes memory for its latents.
    queue: calls that may wait, beside those that run; None: any number. resident: of how many kinds videos are denoised
    in turns; others wait. device_memory: of one device, "80GB" or bytes, where devices do not tell it themselves.
    save, save_every: a folder where open calls are saved (`save`) every so many seconds.

    While an engine is open, the pipeline is the engine's: its devices are driven by a thread of the engine, and
    programs that another thread starts on them may wait for each other for ever. An error of that thread which belongs
    to no call is that of all, and closes the engine.
    """

    def __init__(
        self, pipe: WanPipeline, *, slots: int = 4, queue: int | None = None, resident: int = RESIDENT,
        device_memory: int | str | None = None, trace: bool = False, save: str | Path | None = None,
        save_every: Number | None = None,
    ):  # fmt: skip
        self.pipe, self.slots, self.resident = pipe, whole("slots", slots, 1), whole("resident", resident, 1)
        self._queue = None if queue is None else whole("queue", queue, 1)
        self._admission = Admission(pipe, device_memory)
        self.lock = threading.Condition(threading.RLock())
        self._open: dict[int, Handle] = {}  # calls that are not over, by arrival
        self._numbers, self._closed = itertools.count(), False
        self._traces: list[list[Entered]] | None = [] if trace else None
        self._rings: OrderedDict[Bucket, RingTask] = OrderedDict()  # the latest used last
        self._gone = 0, 0  # ticks of rings that were let go
        self._ready: dict[tuple, bool] = {}  # whether programs are compiled, by `programs_key`
        self._compiler = ThreadPoolExecutor(1, thread_name_prefix="jaxwan engine, compile")
        self._mesh = Lane("mesh", self.lock, self._broken)
        self._vae = Lane("VAE", self.lock, self._broken) if pipe.vae_devices else self._mesh
        self._encode, self._decode = EncodeTask(self, self._mesh), DecodeTask(self)
        self._code = CodeTask(self, self._vae)
        with self.lock:
            self._mesh.add(self._encode)
            self._vae.add(self._code)
            self._vae.add(self._decode)
        self._saving, self._ended = threading.Lock(), threading.Event()
        if save is not None and save_every is not None:
            threading.Thread(target=self._save_often, args=(save, save_every), daemon=True).start()

    # Calls

    def submit(
        self, prompt: str | Sequence[str] | None = None, negative_prompt: str | Sequence[str | None] | None = None, *,
        priority: int = 0, output_type: str | None = None, save: Any = None, **call: Any,
    ) -> Handle:  # fmt: skip
        """Take a call, with the arguments of `WanPipeline.__call__` but for callbacks, from any thread.

        priority: who comes first; a more urgent call takes the slot of a less urgent one, which goes on later.

        Raises in the caller's thread what a call raises for its arguments, ValueError too for one that can never fit
        the devices, `QueueFull` where too many wait, RuntimeError once the engine is closed.
        """
        if "callback_on_step_end" in call:
            raise TypeError("callback_on_step_end is an argument of a call alone: handles have progress and preview")
        given = {"prompt": prompt, "negative_prompt": negative_prompt} | call
        job = make_job(self.pipe.checkpoint, **given)
        tell(job)
        return self.submit_job(job, priority=priority, output_type=output_type, save=save, given=given)

    def submit_job(
        self, job: Job, *, priority: int = 0, output_type: str | None = None, save: Any = None,
        given: Mapping[str, Any] | None = None, entries: Sequence[Entry] | None = None,
        finished: Mapping[int, Path | None] | None = None, progress: Progress | None = None,
        otherwise: Otherwise | None = None,
    ) -> Handle:  # fmt: skip
        """`submit` a checked job (`make_job`), whose notes are the caller's to tell.

        given: the arguments that made it, which `save` needs. entries: of its videos, where they were encoded before;
        finished: where the files are of those that are written already, by their numbers. progress: where the phases of
        encoding are shown.
        otherwise: called, in a thread of the engine's, for a video that cannot be decoded or written: with an Output of
        its latents, the path and the error. It returns another path, or None: then the video has no file, its path in
        the result is None, and the call goes on. (If it has no frames either, nobody's are in the result.) Without it
        the call fails.
        """
        keep, priority = kept_type(output_type, save), whole("priority", priority, -(2**31))
        finished = finished or {}
        paths = [] if save is None else Saving.parse(save).paths(job.settings(), job.size[0], finished)
        check_use(self.pipe.mesh, self.pipe.checkpoint, job, loaded=True)
        self._admission.check(job, self.slots)
        progress = progress or Progress(visible=False)
        call = Call(job, keep, save, priority, None if given is None else dict(given), progress, otherwise)
        decode = keep != "latent" or save is not None
        key = programs_key(self.pipe.checkpoint, self.pipe.parts, job, decode=decode, videos=self.slots)
        with self.lock:
            if self._closed:
                raise RuntimeError("the engine is closed")
            waiting = sum(handle.state in ("queued", "encoding") for handle in self._open.values())
            if self._queue is not None and waiting >= self._queue:
                raise QueueFull(f"{waiting} calls wait already, and this engine's queue has room for {self._queue}")
            handle = Handle(self, call, next(self._numbers), self._ring(key[0]), key, paths)
            for number, path in finished.items():
                handle.written[number], handle.videos[number].finished = path, True
            self._open[handle.arrived] = handle
            if key not in self._ready:
                self._ready[key] = False
                self._compiler.submit(self._compile, key, job, decode)
            if entries is None:
                first = self._encode if self._vae is self._mesh else self._code
                first.waiting.append(handle)
            self.lock.notify_all()
        if entries is not None:
            self.encoded(handle, entries)
        return handle

    def warmup(self, **call: Any) -> None:
        """Compile all that a call with these arguments runs, and compute nothing; as `WanPipeline.warmup`, but for this
        engine's slots. Other processes find the programs in the cache."""
        job = make_job(self.pipe.checkpoint, False, **with_prompt(self.pipe.checkpoint, call))
        self._admission.check(job, self.slots)
        key = programs_key(self.pipe.checkpoint, self.pipe.parts, job, videos=self.slots)
        with self.lock:
            if self._closed:
                raise RuntimeError("the engine is closed")
            self._ring(key[0])
            self._ready.setdefault(key, False)
            compiled = self._compiler.submit(self._compile, key, job, True)
        compiled.result()

    def wait_for(self, predicate: Callable[[], Any], timeout: Number | None = None) -> Any:
        """Wait, for so many seconds at most, until what a function returns is true. It is called now, and whenever a
        call has come on."""
        with self.lock:
            return self.lock.wait_for(predicate, timeout)

    def drain(self, timeout: Number | None = None) -> bool:
        """Wait until all calls are over; False where that takes longer than `timeout` seconds."""
        return self.wait_for(lambda: not self._open, timeout)

    def close(self) -> None:
        """Abort what is not over, and end the engine's threads."""
        with self.lock:
            self._closed = True
            handles = list(self._open.values())
        for handle in handles:
            self.abort(handle)
        self._ended.set()
        self._compiler.shutdown(cancel_futures=True)
        self._mesh.close()
        if self._vae is not self._mesh:
            self._vae.close()
        self._decode.close()

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, kind: type | None, *_: Any) -> None:
        if kind is None:
            self.drain()
        self.close()

    # Saving

    def save(self, folder: str | Path, *, stop: bool = False) -> int:
        """Write all calls that are not over, with each video as far as it is, so that `restore` goes on with them in
        another process, on any mesh, to the same bits. Taken between two segments; an older save in the folder is
        replaced once all is written, and where no call is left, removed. stop: no segment begins any more. Returns how
        many calls.

        Raises ValueError for a folder that holds something else, OSError where nothing can be written.
        """
        folder = local_path(folder, "folder to save in", "give a path of this machine")
        check_folder(folder)
        with self._saving:
            calls = self._mesh.ask(lambda: self._calls(stop)).result()
            if stop:
                self._vae.close()
                self._decode.close()  # files that were being finished are, and none comes to be there later
            calls = [(handle, entries) for handle, entries in calls if not handle.over]
            save_calls(folder, self.pipe, calls)
        return len(calls)

    def restore(
        self, saved: str | Path | SavedCalls, *, progress: Progress | None = None, otherwise: Otherwise | None = None
    ) -> list[Handle]:
        """Go on with the calls that `save` wrote into a folder, in their order. progress, otherwise: as of
        `submit_job`. Raises as `submit` does, and ValueError for a folder that holds none, or of another model."""
        saved = saved if isinstance(saved, SavedCalls) else SavedCalls.read(saved)
        handles = []
        try:
            for job, rest, entries in saved.load(self.pipe):
                handles.append(self.submit_job(job, entries=entries, progress=progress, otherwise=otherwise, **rest))
        except BaseException:
            for handle in handles:  # nobody would have them
                handle.abort()
            raise
        return handles

    def _calls(self, stop: bool) -> list[tuple[Handle, list[Entry | None]]]:
        """All open calls, with what each video is now; None where it is not encoded."""
        if stop:
            self._mesh.stop()
        return [(handle, [handle.ring.read(video) for video in handle.videos]) for handle in self.handles]

    def _save_often(self, folder: str | Path, seconds: Number) -> None:
        while not self._ended.wait(seconds):
            try:
                self.save(folder)
            except Exception as error:  # the next may succeed
                if not self._closed:
                    log.warning("the calls could not be saved: %s", error)

    # Of handles

    def abort(self, handle: Handle) -> bool:
        """`Handle.abort`."""
        return self._end(handle, "aborted", Aborted("the call was aborted"))

    def preview(self, video: Video, timeout: Number | None = None) -> np.ndarray | None:
        """`Handle.preview`."""
        if video.latents is not None:
            return to_public(video.latents)
        x0 = self._mesh.ask(lambda: video.handle.ring.preview(video)).result(timeout)
        return None if x0 is None else to_public(x0)

    # What the engine says of itself

    @property
    def handles(self) -> list[Handle]:
        """Of the calls that are not over, as they arrived."""
        with self.lock:
            return list(self._open.values())

    @property
    def ticks(self) -> tuple[int, int]:
        """Ticks that the rings have run, and of them those in which nothing entered."""
        with self.lock:
            counts = [self._gone, *((ring.ticks, ring.idle_ticks) for ring in self._rings.values())]
        return sum(ticks for ticks, _ in counts), sum(idle for _, idle in counts)

    @property
    def trace(self) -> list[list[Entered]]:
        """Of each ring, in an engine with `trace=True`, what entered in each tick."""
        with self.lock:
            return list(self._traces or [])

    # For its tasks

    def begin(self, handle: Handle, state: State) -> None:
        """A call's next phase."""
        with self.lock:
            if not handle.over:
                handle.seconds.setdefault("wait", time.perf_counter() - handle.submitted)
                handle.state = state

    def wants(self, handle: Handle) -> bool:
        """Whether a call is to be encoded now."""
        return self._ready.get(handle.key, False) and handle.ring.wants(handle.priority)

    def expects(self, ring: RingTask, above: float) -> bool:
        """Whether a call of more than this priority is on its way to a ring."""
        with self.lock:
            before = [handle for handle in self._open.values() if handle.state in ("queued", "encoding")]
            return any(h.ring is ring and h.priority > above and self._ready.get(h.key) for h in before)

    def coded(self, handle: Handle) -> None:
        """The VAE's part of its encoding is done."""
        with self.lock:
            self._encode.waiting.append(handle)
            self.lock.notify_all()

    def encoded(self, handle: Handle, entries: Sequence[Entry]) -> None:
        """Its videos wait for places in their ring."""
        finished = []
        with self.lock:
            if not handle.over:
                handle.state = "queued"  # for a place in the ring
            for video, entry in zip(handle.videos, entries, strict=True):
                video.entry, video.done = entry, int(entry.done)
                if video.done == entry.num_steps:
                    finished.append((video, entry))
                else:
                    handle.ring.waiting.append(video)
            self.lock.notify_all()
        for video, entry in finished:
            self.denoised(video, entry)

    def may_reside(self, ring: RingTask) -> bool:
        """Whether a ring may have its arrays on the devices; it may where it has them. First come, first served."""
        if ring.resident or not self._ready_ring(ring):
            return ring.resident
        others = [other.state_bytes for other in self._rings.values() if other.resident]
        if len(others) >= self.resident or self._before(ring):
            return False
        return not others or self._admission.fits([ring.state_bytes, *others])

    def may_join(self, ring: RingTask) -> bool:
        """Whether a ring may take more videos: not for long where another, with an older call, waits to be let in."""
        with self.lock:
            return not ring.resident or all(other.shut_out < PATIENCE for other in self._before(ring))

    def spent(self, handles: Sequence[Handle], name: str, seconds: float) -> None:
        """Device time that calls shared."""
        for handle in dict.fromkeys(handles):
            handle.seconds[name] = handle.seconds.get(name, 0.0) + seconds

    def denoised(self, video: Video, entry: Entry) -> None:
        """All of its steps are done."""
        with self.lock:
            video.latents, video.entry = entry.latents, None if video.handle.over else entry
        if video.finished or not video.handle.call.decodes:  # finished: before it was saved
            self.decoded(video)
            return
        with self.lock:
            self._decode.waiting.append(video)
            self.lock.notify_all()

    def decoded(self, video: Video) -> None:
        """All that was asked for of it is there."""
        handle = video.handle
        video.finished = True
        if all(other.finished for other in handle.videos):
            output = self._output(handle)
            with self.lock:
                if handle.over:
                    return
                handle.state = "done"
                self._leave(handle)
            handle.future.set_result(output)

    def fail(self, handle: Handle, error: BaseException) -> None:
        """A call ends by an error of its own."""
        self._end(handle, "failed", error)

    def unwritten(self, video: Video, error: Exception) -> None:
        """A video could not be decoded or written. Where its call says so, it goes elsewhere, or nowhere, and the call
        goes on."""
        handle, i, otherwise = video.handle, video.number, video.handle.call.otherwise
        path, latents = handle.written[i], video.latents
        if otherwise is None or latents is None or handle.over:
            return self.fail(handle, error)
        if path is not None:
            shown, settings = to_public(latents)[None], self._settings(handle)[i : i + 1]
            try:
                handle.written[i] = otherwise(Output(shown, shown, video.request.fps, settings, {}), path, error)
            except Exception as its_own:
                return self.fail(handle, its_own)
        again = handle.written[i] is not None
        if handle.call.keep != "latent" and not again and video.groups < len(latents):
            again = path is not None  # for its frames alone
            handle.frames[i] = None
        if not again:
            return self.decoded(video)
        with self.lock:
            self._decode.waiting.appendleft(video)
            self.lock.notify_all()

    def writer(self, video: Video, path: Path) -> BackgroundWriter:
        """Of a video that is to be written while it is decoded."""
        call, settings = video.handle.call, self._settings(video.handle)[video.number]
        return BackgroundWriter(path, call.job.size[0], video.request.fps, *Saving.parse(call.save).rest(settings))

    # Inside

    def _ring(self, bucket: Bucket) -> RingTask:
        """The ring of a bucket, which may be new; one that was idle for long is let go for it. With the lock."""
        if bucket not in self._rings:
            in_use = {handle.ring for handle in self._open.values()}
            idle = [ring for ring in self._rings.values() if ring not in in_use and not ring.busy]
            for ring in idle[: max(0, len(self._rings) - RINGS + 1)]:
                self._let_go(ring)
            ring = self._rings[bucket] = RingTask(self, self.pipe.parts.denoiser, bucket, self.slots)
            if self._traces is not None:
                ring.trace = []
                self._traces.append(ring.trace)
            self._mesh.add(ring)
        self._rings.move_to_end(bucket)
        return self._rings[bucket]

    def _let_go(self, ring: RingTask) -> None:
        """Forget a ring and its programs."""
        self._mesh.remove(ring)
        del self._rings[ring.bucket]
        self._gone = self._gone[0] + ring.ticks, self._gone[1] + ring.idle_ticks
        for key in [key for key in self._ready if key[0] == ring.bucket]:
            del self._ready[key]
            self._admission.forget(key)

    def _ready_ring(self, ring: RingTask) -> bool:
        return any(ready for key, ready in self._ready.items() if key[0] == ring.bucket)

    def _before(self, ring: RingTask) -> list[RingTask]:
        """Rings that wait to be let onto the devices, with a call that comes before all that wait for this one."""
        first, others = ring.first, (r for r in self._rings.values() if r is not ring and not r.resident)
        waiting = [(other, other.first) for other in others if self._ready_ring(other)]
        return [other for other, its in waiting if its is not None and first is not None and its < first]

    def _broken(self, error: BaseException) -> None:
        """A thread has ended by an error that is no call's own: nothing can go on."""
        with self.lock:
            self._closed = True
        for handle in self.handles:
            self.fail(handle, error)

    def _compile(self, key: tuple, job: Job, decode: bool) -> None:
        """Compile what calls of this kind run; where that fails, they do."""
        checkpoint, parts = self.pipe.checkpoint, self.pipe.parts
        try:
            programs = list(job_programs(checkpoint, parts, job, decode=decode, videos=self.slots))
            with compiling(programs, Progress(visible=False)) as finished:
                for one in finished:
                    self._admission.compiled(key, one.program)
            self._admission.check_compiled(key, state_bytes(parts.denoiser.programs(key[0]).running_shapes))
        except Exception as error:  # it is that of all calls that wait for it
            with self.lock:
                self._ready.pop(key, None)
                waiting = [handle for handle in self._open.values() if handle.key == key]
            for handle in waiting:
                self.fail(handle, error)
            raise
        with self.lock:
            if key in self._ready:  # else its ring was let go meanwhile
                self._ready[key] = True
            self.lock.notify_all()

    def _end(self, handle: Handle, state: State, error: BaseException) -> bool:
        with self.lock:
            if handle.over:
                return False
            handle.state = state
            self._leave(handle)
        handle.future.set_exception(error)
        return True

    def _leave(self, handle: Handle) -> None:
        """Nothing more happens to it. What it was made of is kept no longer than its result."""
        self._open.pop(handle.arrived, None)
        handle.frames, handle.encoders = [None] * len(handle.videos), None
        for video in handle.videos:
            if video.latents is not None:  # else its ring lets go of it
                video.entry = None
        self.lock.notify_all()

    def _output(self, handle: Handle) -> Output:
        """What a call returns."""
        call, latents = handle.call, public_latents(handle.videos)
        frames: Any = latents
        if call.keep != "latent" and all(video is not None for video in handle.frames):
            frames = [as_pil(video) for video in handle.frames] if call.keep == "pil" else np.stack(handle.frames)
        paths = () if call.save is None else tuple(handle.written)
        return Output(frames, latents, call.job.requests[0].fps, self._settings(handle), dict(handle.seconds), paths)

    def _settings(self, handle: Handle) -> tuple[dict[str, Any], ...]:
        return job_settings(self.pipe.checkpoint, self.pipe.parts, handle.job)
