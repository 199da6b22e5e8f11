"""What comes before and after the ring: calls are encoded, videos decoded, in units of a group of frames."""

import time
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from jaxwan.engine.handle import Aborted, Handle, NotFinite, Video
from jaxwan.engine.lanes import Lane, Task
from jaxwan.models.tiles import coder_for
from jaxwan.pipelines.axes import to_public
from jaxwan.pipelines.decode import decoded_groups
from jaxwan.pipelines.encoders import Encoders, prepare
from jaxwan.pipelines.media import BackgroundWriter

if TYPE_CHECKING:
    from jaxwan.engine.engine import Engine


class Encoding(Task):
    """Calls that wait for a part of their encoding, as many ahead as the rings have use for. A unit is a call's; in
    between groups of frames the lane's other tasks have theirs."""

    def __init__(self, engine: "Engine", lane: Lane):
        super().__init__()
        self.waiting: list[Handle] = []
        self._engine, self._lane = engine, lane

    def ready(self) -> bool:
        """Whether there is a call that its ring has a use for."""
        return self._next() is not None

    def unit(self) -> None:
        """Do this part of one call."""
        with self._engine.lock:
            handle = self._next()
            if handle is None:
                return
            self.waiting.remove(handle)
        self._engine.begin(handle, "encoding")
        try:
            self.work(handle)
        except Exception as error:  # whatever is wrong with one call is that call's alone
            self._engine.fail(handle, error)

    def work(self, handle: Handle) -> None:
        """This part, and what follows it."""
        raise NotImplementedError

    def encoders(self, handle: Handle) -> Encoders:
        """Those of a call, which pause for others, and end where the call is over."""

        def pause() -> None:
            if handle.over:
                raise Aborted("the call was aborted")
            self._lane.between(but=self)

        pipe = self._engine.pipe
        return Encoders(pipe.checkpoint, pipe.parts, handle.job.requests[0].tiling, pause)

    def _next(self) -> Handle | None:
        """Who comes first, of those whose programs are there and whose ring has a use for more."""
        self.waiting = [handle for handle in self.waiting if not handle.over]
        fit = (handle for handle in self.waiting if self._engine.wants(handle))
        return min(fit, key=lambda handle: (-handle.priority, handle.arrived), default=None)


class CodeTask(Encoding):
    """The VAE's part, where that has devices, and so a lane, of its own."""

    def work(self, handle: Handle) -> None:
        """Images and videos to latents; the mesh's lane does the rest."""
        encoders, start = self.encoders(handle), time.perf_counter()
        for request in handle.job.requests:
            encoders.code(request)
        handle.encoders = encoders
        self._engine.spent([handle], "encode", time.perf_counter() - start)
        self._engine.coded(handle)


class EncodeTask(Encoding):
    """All of it, or what is left after `CodeTask`."""

    def work(self, handle: Handle) -> None:
        """A call's arguments to entries of the ring."""
        pipe, progress, encoders = self._engine.pipe, handle.call.progress, handle.encoders or self.encoders(handle)
        entries = prepare(pipe.checkpoint, pipe.parts, handle.job.requests, progress, encoders)
        handle.encoders = None
        for video, entry in zip(handle.videos, entries, strict=True):
            for what, numbers in (("the text became", entry.inputs.text), ("it begins with", entry.sampler.x)):
                if not np.isfinite(numbers).all():
                    raise NotFinite(f"{video.request.prompt!r:.80}: what {what} is not finite")
        for name, seconds in progress.seconds.items():
            self._engine.spent([handle], name, seconds)
        self._engine.encoded(handle, entries)


@dataclass(eq=False)
class Decoding:
    """A video whose frames are being made, and what takes them."""

    video: Video
    groups: Generator[np.ndarray]
    writer: BackgroundWriter | None
    stack: ExitStack  # leaving it before the writer has finished removes the file

    @property
    def behind(self) -> bool:
        """Whether its writer is."""
        return self.writer is not None and self.writer.behind


class DecodeTask(Task):
    """Videos that are denoised and not yet decoded, one at a time: that takes the memory of one.

    A file is written by a thread of its own. While that is behind, others use the devices; its end is waited for in
    another thread, and so is all that needs no device.
    """

    def __init__(self, engine: "Engine"):
        super().__init__()
        self.waiting: deque[Video] = deque()
        self._engine, self._now = engine, None
        self._after = ThreadPoolExecutor(2, thread_name_prefix="jaxwan engine, after decoding")

    def ready(self) -> bool:
        """Whether a group can be decoded now."""
        return bool(self.waiting) if self._now is None else self._now.video.handle.over or not self._now.behind

    @property
    def stalled(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether it waits for a writer."""
        return self._now is not None and self._now.behind

    def unit(self) -> None:
        """One group of frames, of the video that was begun, or of the next."""
        if self._now is None:
            with self._engine.lock:
                video = self.waiting.popleft()
            self._guarded(video, self._begin)
        elif self._now.video.handle.over:
            self._guarded(self._now.video, lambda _: self.leave())
        else:
            self._guarded(self._now.video, self._group)

    def leave(self) -> None:
        """Give up the video that is being decoded, and its file."""
        now, self._now = self._now, None
        if now is not None:
            now.groups.close()
            now.stack.close()
            now.video.handle.frames[now.video.number] = None

    def close(self) -> None:
        """Leave no half file, and wait for those that are being finished."""
        self.leave()
        self._after.shutdown()

    def _guarded(self, video: Video, piece: Callable[[Video], None]) -> None:
        try:
            piece(video)
        except Exception as error:  # whatever is wrong with one call is that call's alone
            if self._now is not None and self._now.video is video:
                self.leave()
            self._engine.unwritten(video, error)

    def _begin(self, video: Video) -> None:
        handle, engine, latents = video.handle, self._engine, video.latents
        if handle.over or latents is None:
            return
        engine.begin(handle, "decoding")
        kind = "float32" if handle.call.keep == "np" else "uint8"
        if handle.call.keep != "latent":
            shape = *engine.pipe.checkpoint.geometry.pixel_shape(*latents.shape[:3]), 3
            handle.frames[video.number] = np.empty(shape, kind)
        coder = coder_for(engine.pipe.parts.coder, video.request.tiling)
        groups, video.groups = decoded_groups(coder, latents, kind, handle.frames[video.number]), 0
        path = handle.written[video.number]
        with ExitStack() as stack:
            writer = None if path is None else stack.enter_context(engine.writer(video, path))
            self._now = Decoding(video, groups, writer, stack.pop_all())
        self._group(video)

    def _group(self, video: Video) -> None:
        now = self._now
        assert now is not None
        start = time.perf_counter()
        frames = next(now.groups, None)
        self._engine.spent([video.handle], "decode", time.perf_counter() - start)
        if frames is None:
            self._now = None
            self._after.submit(self._guarded, video, partial(self._finish, now))
            return
        if now.writer is not None:
            now.writer.put(frames)
        video.groups += 1

    def _finish(self, decoding: Decoding, video: Video) -> None:
        """All frames are there: what is left needs no device."""
        with decoding.stack:
            if decoding.writer is not None and not video.handle.over:
                decoding.writer.finish()
        self._engine.decoded(video)


def public_latents(videos: list[Video]) -> np.ndarray:
    """(B, C, T, h, w) of videos that are all denoised."""
    return to_public(np.stack([np.asarray(video.latents) for video in videos]))
