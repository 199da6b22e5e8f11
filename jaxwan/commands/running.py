"""Calls on an engine as a command runs them: shown while they come on, their files told, saved where it is to end."""

import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from jaxwan.pipelines.ending import first_signal_to

if TYPE_CHECKING:  # of these parts importing this needs nothing: JAX takes seconds to start
    from jaxwan.engine.handle import Handle, Standing
    from jaxwan.engine.saving import SavedCalls
    from jaxwan.pipelines.output import Output
    from jaxwan.pipelines.pipeline import WanPipeline
    from jaxwan.pipelines.progress import Progress
    from jaxwan.pipelines.request import Job

OFTEN = 0.2  # seconds between looks at whether a signal came


class Call(NamedTuple):
    """What is to be run: a job, the arguments that made it, and where its videos go."""

    job: "Job"
    given: dict[str, Any]
    targets: list[Path]
    name: str = ""  # of several, what messages call it, such as "line 3"


class File(NamedTuple):
    """Where a file is, if it is anywhere, and what went wrong."""

    path: Path | None
    error: str | None = None


class Stopped(Exception):
    """A signal came, and what is left was saved."""

    def __init__(self, number: int, calls: int):
        super().__init__(number, calls)
        self.number, self.calls = number, calls


class Runs:
    """Calls on an engine of their own.

        with Runs(pipe, slots=4, save="saved") as runs:
            handles = runs.submit(calls, saving)
            for handle in runs.follow(handles, progress): …

    save: a folder. Then the first signal ends what runs after its segment and saves all calls, and `follow` raises
    `Stopped`; the next one ends the process.
    """

    def __init__(
        self, pipe: "WanPipeline", *, slots: int, save: str | Path | None = None, save_every: float | None = None
    ):
        from jaxwan.engine.engine import Engine

        self.engine = Engine(pipe, slots=slots, save=save, save_every=save_every)
        self.elsewhere, self._save, self._signals = Elsewhere(), save, []

    def __enter__(self) -> "Runs":
        return self

    def __exit__(self, *_: Any) -> None:
        self.engine.close()

    def submit(
        self, calls: Sequence[Call], saving: Mapping[str, Any], *, frames: bool = False,
        progress: "Progress | None" = None,
    ) -> list["Handle"]:  # fmt: skip
        """Take calls. saving: what `save=` has beside its path. frames: they are kept too, as float32."""
        return [
            self.engine.submit_job(
                call.job, given=call.given, save={"path": call.targets, **saving},
                output_type="np" if frames else "latent", progress=progress, otherwise=self.elsewhere,
            )
            for call in calls
        ]  # fmt: skip

    def restore(self, saved: "SavedCalls") -> list["Handle"]:
        """Go on with saved calls."""
        return self.engine.restore(saved, otherwise=self.elsewhere)

    def follow_one(self, handle: "Handle", progress: "Progress") -> None:
        """Show the phases of a call behind its encoding, until it is over."""
        phases: list[tuple[str, str, Callable[[Standing], tuple[int, int]]]] = [
            ("denoise", "step", lambda at: (at.steps, at.num_steps)),
            ("decode", "latent frame", lambda at: (at.groups, at.num_groups)),
        ]
        with self._saved_on_a_signal():
            self._wait(lambda: handle.state not in ("queued", "encoding"))
            for name, unit, count in phases:
                shown, total = 0, count(handle.progress)[1]
                with progress.phase(name, 0 if handle.over else total, unit) as update:
                    while shown < total and not handle.over:
                        self._wait(lambda: handle.over or count(handle.progress)[0] > shown)  # noqa: B023
                        now = max(shown, count(handle.progress)[0])
                        update(now - shown)
                        shown = now
            with progress.phase("write", 0, "file"):
                self._wait(lambda: handle.over)

    def follow(self, handles: Sequence["Handle"], progress: "Progress") -> Iterator["Handle"]:
        """Show how far all calls are together; gives each as soon as it is over."""
        videos, waiting, shown = sum(len(h.videos) for h in handles), list(handles), 0
        total = sum(handle.progress.num_steps for handle in handles)
        with self._saved_on_a_signal(), progress.phase("run", total, "step") as update:
            while waiting:
                self._wait(lambda: any(h.over for h in waiting) or _steps(handles) > shown)  # noqa: B023
                now, over = max(shown, _steps(handles)), [handle for handle in waiting if handle.over]
                waiting = [handle for handle in waiting if handle not in over]
                left = sum(len(handle.videos) for handle in waiting)
                update(now - shown, f"{videos - left} of {videos} videos")
                shown = now
                yield from over

    def files(self, handle: "Handle") -> list[File]:
        """Where the files of a call are that is done."""
        return [self.elsewhere.file(path, written) for path, written in zip(handle.paths, handle.written, strict=True)]

    def forget(self) -> None:
        """Remove what was saved on the way, once all calls are over."""
        if self._save is not None:
            self.engine.save(self._save)

    def _saved_on_a_signal(self) -> AbstractContextManager:
        saying = "saving; Ctrl-C again to leave without"
        return nullcontext() if self._save is None else first_signal_to(self._signals.append, saying)

    def _wait(self, predicate: Callable[[], bool]) -> None:
        """Raises `Stopped`."""
        over = False
        while not over:
            if self._signals and self._save is not None:
                raise Stopped(self._signals[0], self.engine.save(self._save, stop=True))
            over = self.engine.wait_for(predicate, OFTEN)


def _steps(handles: Sequence["Handle"]) -> int:
    """Of calls together; those that failed count as done."""
    return sum(at.num_steps if handle.over else at.steps for handle in handles for at in [handle.progress])


# Files that cannot be written where they should


class Elsewhere:
    """Where a video goes that cannot be written where it should: into the working folder, else into the one for
    temporary files; what cannot be made at all leaves its latents. It is an engine's `otherwise`."""

    def __init__(self) -> None:
        self._said: dict[Path, str] = {}  # of each file that has failed
        self._lost: dict[Path, str] = {}  # and that is nowhere
        self._first: dict[Path, Path] = {}  # another place -> where it should have been

    def __call__(self, video: "Output", path: Path, error: Exception) -> Path | None:
        """The next place, or None when the latents are all that is kept."""
        wanted = self._first.get(path, path)
        said = self._said.setdefault(wanted, could_not(wanted, error))
        places = other_places(wanted) if isinstance(error, OSError) else []
        for place in places[places.index(path) + 1 if path in places else 0 :]:
            if not place.exists():
                self._first[place] = wanted
                return place
        latents = save(wanted.with_suffix(".npz"), lambda p: video.save_npz(p, overwrite=False, frames=False))
        kept = "and neither could its latents" if latents.path is None else f"its latents are {latents.path}"
        self._lost[wanted] = f"{said}; {kept}"
        return None

    def file(self, wanted: Path, written: Path | None) -> File:
        """What became of a video that should have been written as `wanted`."""
        if written is None:
            return File(None, self._lost.get(wanted, f"{wanted} could not be written before the run was saved"))
        return File(written, f"{self._said[wanted]}: it is {written}" if written in self._first else None)


def other_places(path: Path) -> list[Path]:
    """Where a file may go instead."""
    places = []
    for folder, name in ((Path.cwd, path.name), (tempfile.gettempdir, f"{os.getpid()}-{path.name}")):
        try:
            places.append(Path(folder(), name))
        except OSError:  # the working folder may be gone
            continue
    return places


def save(path: Path, write: Callable[[Path], Any]) -> File:
    """Write a file as `path`, else in another place."""
    said = None
    for target in (path, *other_places(path)):
        try:
            if said is None or not target.exists():
                write(target)
                return File(target, said and f"{said}: it is {target}")
        except OSError as error:
            said = said or could_not(path, error)
        except Exception as error:  # whatever it is: computing what would be lost may have taken hours
            said = said or could_not(path, error)
            break  # for it would be no other in another place
    return File(None, said)


def could_not(path: Path, error: Exception) -> str:
    """What is said of a file that failed."""
    return f"{path} could not be {'written' if isinstance(error, OSError) else 'made'} ({reason(error)})"


def reason(error: BaseException) -> str:
    """What went wrong, in a line."""
    lines = str(getattr(error, "strerror", None) or error).splitlines()
    return lines[0] if lines else type(error).__name__
