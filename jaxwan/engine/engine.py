"""Calls that arrive at any time share one ring: continuous batching, abort, priorities, previews (docs/engine.md)."""

import itertools
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from jaxwan.engine.admission import Admission
from jaxwan.engine.coding import CodeTask, DecodeTask, EncodeTask, public_latents
from jaxwan.engine.handle import Aborted, Call, Handle, QueueFull, State, Video
from jaxwan.engine.lanes import Lane
from jaxwan.engine.ring import Entered, RingTask
from jaxwan.engine.saving import check_folder, load_calls, save_calls
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
PATIENCE = 5.0  # seconds of device time that a ring goes on taking new videos while another waits to be let in


class Engine:
    """Runs calls of a pipeline together as they arrive.

        with Engine(pipe, slots=4) as engine:
            handles = [engine.submit(prompt, seed=7) for prompt in prompts]
            videos = [handle.result() for handle in handles]

    A call's result has the bits that `pipe(…)` gives, whatever else runs, and whenever it came. slots: videos of the
    same kind (size, number of text rows, kind of input) that are denoised together; each takes memory for its latents.
    queue: calls that may wait, beside those that run; None: any number. resident: of how many kinds videos are denoised
    in turns; others wait. device_memory: of one device, "80GB" or bytes, where devices do not tell it themselves.

    While an engine is open, the pipeline is the engine's: its devices are driven by a thread of the engine, and
    programs that another thread starts on them may wait for each other for ever.
    """

    def __init__(
        self, pipe: WanPipeline, *, slots: int = 4, queue: int | None = None, resident: int = RESIDENT,
        device_memory: int | str | None = None, trace: bool = False,
    ):  # fmt: skip
        self.pipe, self.slots, self.resident = pipe, whole("slots", slots, 1), whole("resident", resident, 1)
        self._queue = None if queue is None else whole("queue", queue, 1)
        self._admission = Admission(pipe, device_memory)
        self.lock = threading.Condition(threading.RLock())
        self._open: dict[int, Handle] = {}  # calls that are not over, by arrival
        self._numbers, self._closed, self._trace = itertools.count(), False, trace
        self._rings: dict[Bucket, RingTask] = {}
        self._ready: dict[tuple, bool] = {}  # whether programs are compiled, by `programs_key`
        self._compiler = ThreadPoolExecutor(1, thread_name_prefix="jaxwan engine, compile")
        self._mesh = Lane("mesh", self.lock)
        self._vae = Lane("VAE", self.lock) if pipe.vae_devices else self._mesh
        self._encode, self._decode = EncodeTask(self, self._mesh), DecodeTask(self)
        self._code = CodeTask(self, self._vae)
        with self.lock:
            self._mesh.add(self._encode)
            self._vae.add(self._code)
            self._vae.add(self._decode)

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
    ) -> Handle:  # fmt: skip
        """`submit` a checked job (`make_job`), whose notes are the caller's to tell. given: the arguments that made it,
        which `save` needs. entries: of its videos, where they were encoded before."""
        keep, priority = kept_type(output_type, save), whole("priority", priority, -(2**31))
        paths = [] if save is None else Saving.parse(save).paths(job.settings(), job.size[0])
        check_use(self.pipe.mesh, self.pipe.checkpoint, job, loaded=True)
        self._admission.check(job, self.slots)
        call = Call(job, keep, save, priority, None if given is None else dict(given))
        decode = keep != "latent" or save is not None
        key = programs_key(self.pipe.checkpoint, self.pipe.parts, job, decode=decode, videos=self.slots)
        with self.lock:
            if self._closed:
                raise RuntimeError("the engine is closed")
            waiting = sum(handle.state == "queued" for handle in self._open.values())
            if self._queue is not None and waiting >= self._queue:
                raise QueueFull(f"{waiting} calls wait already, and this engine's queue has room for {self._queue}")
            handle = Handle(self, call, next(self._numbers), self._ring(key[0]), key, paths)
            self._open[handle.arrived] = handle
            if key not in self._ready:
                self._ready[key] = False
                self._compiler.submit(self._compile, key, job, decode)
            if entries is not None:
                self.encoded(handle, entries)
            elif self._vae is self._mesh:
                self._encode.waiting.append(handle)
            else:
                self._code.waiting.append(handle)
            self.lock.notify_all()
        return handle

    def warmup(self, **call: Any) -> None:
        """Compile all that a call with these arguments runs, and compute nothing; as `WanPipeline.warmup`, but for this
        engine's slots. Other processes find the programs in the cache."""
        job = make_job(self.pipe.checkpoint, False, **with_prompt(self.pipe.checkpoint, call))
        self._admission.check(job, self.slots)
        key = programs_key(self.pipe.checkpoint, self.pipe.parts, job, videos=self.slots)
        with self.lock:
            self._ready.setdefault(key, False)
        self._compiler.submit(self._compile, key, job, True).result()

    def drain(self, timeout: Number | None = None) -> bool:
        """Wait until all calls are over; False where that takes longer than `timeout` seconds."""
        with self.lock:
            return self.lock.wait_for(lambda: not self._open, timeout)

    def close(self) -> None:
        """Abort what is not over, and end the engine's threads."""
        with self.lock:
            self._closed = True
            handles = list(self._open.values())
        for handle in handles:
            self.abort(handle)
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

    def save(self, folder: str | Path) -> int:
        """Write all calls that are not over, with each video as far as it is, so that `restore` goes on with them in
        another process, on any mesh, to the same bits. Taken between two segments; an older save in the folder is
        replaced once all is written. Returns how many calls.

        Raises ValueError for a folder that holds something else, OSError where nothing can be written.
        """
        folder = local_path(folder, "folder to save in", "give a path of this machine")
        check_folder(folder)
        calls = self._mesh.ask(self._calls).result()
        save_calls(folder, self.pipe, calls)
        return len(calls)

    def restore(self, folder: str | Path) -> list[Handle]:
        """Go on with the calls that `save` wrote, in their order. Raises as `submit` does, and ValueError for a folder
        that holds none, or of another model."""
        return [self.submit_job(job, entries=entries, **rest) for job, rest, entries in load_calls(folder, self.pipe)]

    def _calls(self) -> list[tuple[Handle, list[Entry | None]]]:
        """All open calls, with what each video is now; None where it is not encoded."""
        return [(handle, [handle.ring.read(video) for video in handle.videos]) for handle in self.handles]

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
        return sum(r.ticks for r in self._rings.values()), sum(r.idle_ticks for r in self._rings.values())

    @property
    def trace(self) -> list[list[Entered]]:
        """Of each ring, in an engine with `trace=True`, what entered in each tick."""
        return [ring.trace for ring in self._rings.values() if ring.trace is not None]

    # For its tasks

    def begin(self, handle: Handle, state: State) -> None:
        """A call's next phase."""
        with self.lock:
            if not handle.over:
                if handle.state == "queued":
                    handle.seconds["wait"] = time.perf_counter() - handle.submitted
                handle.state = state

    def wants(self, handle: Handle) -> bool:
        """Whether a call is to be encoded now."""
        return self._ready[handle.key] and handle.ring.wants > 0

    def expects(self, ring: RingTask, above: float) -> bool:
        """Whether a call of more than this priority is on its way to a ring."""
        with self.lock:
            before = [handle for handle in self._open.values() if handle.state in ("queued", "encoding")]
            return any(handle.ring is ring and handle.priority > above and self._ready[handle.key] for handle in before)

    def coded(self, handle: Handle) -> None:
        """The VAE's part of its encoding is done."""
        with self.lock:
            self._encode.waiting.append(handle)
            self.lock.notify_all()

    def encoded(self, handle: Handle, entries: Sequence[Entry]) -> None:
        """Its videos wait for places in their ring."""
        with self.lock:
            for video, entry in zip(handle.videos, entries, strict=True):
                video.entry, video.done = entry, int(entry.done)
                if video.done == entry.num_steps:
                    self.denoised(video, entry)
                else:
                    handle.ring.waiting.append(video)
            self.lock.notify_all()

    def may_reside(self, ring: RingTask) -> bool:
        """Whether a ring may have its arrays on the devices; it may where it has them."""
        others = [other for other in self._rings.values() if other.resident and other is not ring]
        if not self._ready_ring(ring) or (not ring.resident and len(others) >= self.resident):
            return False
        return ring.resident or self._admission.fits(ring.state_bytes, *(other.state_bytes for other in others))

    def may_join(self, ring: RingTask) -> bool:
        """Whether a ring may take more videos: not for long where another waits to be let in."""
        waiting = [r for r in self._rings.values() if r.waiting and not r.resident and r is not ring]
        if not waiting or not ring.resident:
            return True
        return ring.seconds - min(r.seconds for r in waiting) < PATIENCE and self.resident > 1

    def spent(self, handles: Sequence[Handle], name: str, seconds: float) -> None:
        """Device time that calls shared."""
        for handle in dict.fromkeys(handles):
            handle.seconds[name] = handle.seconds.get(name, 0.0) + seconds

    def denoised(self, video: Video, entry: Entry) -> None:
        """All of its steps are done."""
        video.latents, video.entry = entry.latents, entry
        with self.lock:
            if video.handle.call.decodes:
                self._decode.waiting.append(video)
                self.lock.notify_all()
            else:
                self.decoded(video)

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
                for other in handle.videos:
                    other.entry = None
                self._open.pop(handle.arrived, None)
                self.lock.notify_all()
            handle.future.set_result(output)

    def fail(self, handle: Handle, error: BaseException) -> None:
        """A call ends by an error of its own."""
        self._end(handle, "failed", error)

    def writer(self, video: Video) -> BackgroundWriter:
        """Of a video that is to be written while it is decoded."""
        call, path = video.handle.call, video.handle.paths[video.number]
        settings = job_settings(self.pipe.checkpoint, self.pipe.parts, call.job)[video.number]
        frames, fps = call.job.size[0], video.request.fps
        return BackgroundWriter(path, frames, fps, *Saving.parse(call.save).rest(settings))

    # Inside

    def _ring(self, bucket: Bucket) -> RingTask:
        if bucket not in self._rings:
            ring = self._rings[bucket] = RingTask(self, self.pipe.parts.denoiser, bucket, self.slots)
            ring.trace = [] if self._trace else None
            self._mesh.add(ring)
        return self._rings[bucket]

    def _ready_ring(self, ring: RingTask) -> bool:
        return any(ready for key, ready in self._ready.items() if key[0] == ring.bucket)

    def _compile(self, key: tuple, job: Job, decode: bool) -> None:
        """Compile what calls of this kind run; where that fails, they do."""
        checkpoint, parts = self.pipe.checkpoint, self.pipe.parts
        try:
            programs = list(job_programs(checkpoint, parts, job, decode=decode, videos=self.slots))
            with compiling(programs, Progress(visible=False)) as finished:
                for name, _, program in finished:
                    self._admission.compiled(name, program)
        except Exception as error:  # it is that of all calls that wait for it
            with self.lock:
                self._ready.pop(key, None)
                waiting = [handle for handle in self._open.values() if handle.key == key]
            for handle in waiting:
                self.fail(handle, error)
            return
        with self.lock:
            self._ready[key] = True
            self.lock.notify_all()

    def _end(self, handle: Handle, state: State, error: BaseException) -> bool:
        with self.lock:
            if handle.over:
                return False
            handle.state = state
            self._open.pop(handle.arrived, None)
            self.lock.notify_all()
        handle.future.set_exception(error)
        return True

    def _output(self, handle: Handle) -> Output:
        """What a call returns."""
        call, latents = handle.call, public_latents(handle.videos)
        settings = job_settings(self.pipe.checkpoint, self.pipe.parts, call.job)
        frames: Any = latents
        if call.keep == "pil":
            frames = [as_pil(video) for video in handle.frames]
        elif call.keep != "latent":
            frames = np.stack(handle.frames)
        fps = call.job.requests[0].fps
        return Output(frames, latents, fps, settings, dict(handle.seconds), tuple(handle.paths))
