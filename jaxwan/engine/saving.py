"""An engine's calls in a folder, from which an engine of another process goes on, on any mesh.

`engine.json` lists the calls with their arguments; beside it lie images and arrays that they were given, and each video
that was encoded, as far as it is (`pipelines/snapshot.py`). A folder is there as a whole or not at all.
"""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from jaxwan import __version__
from jaxwan.engine.handle import Handle
from jaxwan.pipelines.arguments import local_path
from jaxwan.pipelines.call import make_job
from jaxwan.pipelines.checkpoint import Checkpoint
from jaxwan.pipelines.denoise import Entry
from jaxwan.pipelines.ending import leaving_nothing_half
from jaxwan.pipelines.output import Saving
from jaxwan.pipelines.parts import job_settings, pipeline_settings
from jaxwan.pipelines.request import Job
from jaxwan.pipelines.snapshot import check_identity, identity, load_entry, save_entry, structure

if TYPE_CHECKING:
    from jaxwan.pipelines.pipeline import WanPipeline

FORMAT = 1
INDEX = "engine.json"
_OF_PROMPTS = ("image", "last_image", "prompt_embeds", "negative_prompt_embeds")  # one a prompt; the others one a call


def save_calls(
    folder: Path, pipe: "WanPipeline", calls: Sequence[tuple[Handle, Sequence[Entry | None]]]
) -> None:  # fmt: skip
    """Write calls and their videos, as far as they are encoded; what was in the folder is replaced once all is written.

    Raises ValueError for a call whose arguments are not known (`Engine.submit_job` without `given`), and for a folder
    that holds something else; OSError where nothing can be written.
    """
    check_folder(folder)
    if not calls:
        if folder.exists():
            _remove(folder)
        return
    model = identity(pipe.checkpoint, pipe.parts.denoiser.dtype)
    new, old = (folder.with_name(f".{folder.name}.{what}-{os.getpid()}") for what in ("new", "old"))
    _remove(new)
    _under_way[new] = folder, old
    new.mkdir(parents=True)
    try:
        made_by = pipeline_settings(pipe.checkpoint, pipe.parts)
        index = {"format": FORMAT, "version": __version__, "model": model, "made_by": made_by, "calls": []}
        for i, (handle, entries) in enumerate(calls):
            index["calls"].append(_write_call(new, f"call-{i}", handle))
            settings = job_settings(pipe.checkpoint, pipe.parts, handle.job)
            for video, (entry, made) in enumerate(zip(entries, settings, strict=True)):
                if entry is not None:
                    save_entry(new / f"call-{i}-video-{video}.safetensors", entry, made, pipe.checkpoint, model)
        (new / INDEX).write_text(json.dumps(index, ensure_ascii=False, indent=1))
        if folder.exists():
            folder.rename(old)
        new.rename(folder)
    finally:
        _remove_under_way()
        del _under_way[new]


_under_way: dict[Path, tuple[Path, Path]] = {}  # what is being written -> what it will be, and where the older one goes


def _remove(folder: Path) -> None:
    """A folder vanishes at once, and with it whoever writes in it still."""
    with suppress(OSError):
        shutil.rmtree(folder.rename(folder.with_name(f".{folder.name}.gone-{os.getpid()}")))


def _remove_under_way() -> None:
    for new, (folder, old) in list(_under_way.items()):
        if not folder.exists():
            with suppress(OSError):
                old.rename(folder)
        _remove(new)
        _remove(old)


leaving_nothing_half.append(_remove_under_way)


def check_folder(folder: Path) -> None:
    """Raises ValueError for a folder that is no engine's, which saving would replace, OSError where none can be."""
    if folder.exists() and not (folder / INDEX).is_file() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is there already, and holds no saved calls: choose another folder to save them in")
    folder.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(folder.parent, os.W_OK):
        raise PermissionError(f"nothing can be written in {folder.parent}")


class SavedCalls(NamedTuple):
    """What `Engine.save` wrote, read as far as is needed to say what it is. made_by: as in an output's settings, the
    model and its numbers."""

    folder: Path
    model: dict[str, Any]
    made_by: dict[str, Any]
    calls: list[dict[str, Any]]

    @classmethod
    def read(cls, folder: str | Path) -> "SavedCalls":
        """Raises OSError for what cannot be read, ValueError for what `Engine.save` did not write."""
        folder = local_path(folder, "saved calls")
        if not (folder / INDEX).is_file():
            raise FileNotFoundError(f"{folder} holds no saved calls: there is no {INDEX} in it")
        try:
            index = json.loads((folder / INDEX).read_text())
            version, calls = index["format"], [dict(call) for call in index["calls"]]
            model, made_by = dict(index["model"]), dict(index["made_by"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{folder / INDEX} lists no saved calls ({error})") from error
        if version != FORMAT:
            raise ValueError(f"{folder} is of format {version!r:.20}, and jaxwan {__version__} reads {FORMAT}")
        return cls(folder, model, made_by, calls)

    def jobs(self, checkpoint: Checkpoint) -> list[Job]:
        """What the calls make. Raises ValueError for another model's, before any weights are read, and as `Output.save`
        does where files cannot be written any more."""
        check_identity(self.folder / INDEX, self.model, structure(checkpoint))
        jobs = [make_job(checkpoint, **self._arguments(saved)) for saved in self.calls]
        for saved, job in zip(self.calls, jobs, strict=True):
            if saved.get("save") is not None:
                Saving.parse(saved["save"]).paths(job.settings(), job.size[0], self._finished(saved))
        return jobs

    def overwriting(self) -> "SavedCalls":
        """The same, but that files may be there that were not written yet."""
        other = {"overwrite": True}
        other = {"overwrite": True}
        return self._replace(
            calls=[call | {"save": call["save"] | other} if call.get("save") else call for call in self.calls]
        )

    @staticmethod
    def check_folder(folder: str | Path) -> None:
        """Raises ValueError for a folder where `Engine.save` would replace something, also calls that were saved,
        OSError where it can write nothing."""
        folder = local_path(folder, "folder to save in", "give a path of this machine")
        check_folder(folder)
        if (folder / INDEX).exists():
            raise ValueError(f"{folder} holds saved calls, which would be lost: resume them, or choose another folder")

    def load(self, pipe: "WanPipeline") -> list[tuple[Job, dict[str, Any], list[Entry] | None]]:
        """Of each call (job, arguments of `Engine.submit_job`, entries if its videos were encoded). Raises as `jobs`
        does, and for files of videos that do not fit."""
        model, found = identity(pipe.checkpoint, pipe.parts.denoiser.dtype), []
        for i, (saved, job) in enumerate(zip(self.calls, self.jobs(pipe.checkpoint), strict=True)):
            try:
                rest = {name: saved[name] for name in ("priority", "output_type", "save")}
            except KeyError as error:
                raise self._broken(error) from error
            names = [self.folder / f"call-{i}-video-{video}.safetensors" for video in range(len(job.requests))]
            entries = None
            if all(name.exists() for name in names):
                each = zip(names, job.requests, strict=True)
                entries = [_entry(name, request, pipe.checkpoint, model) for name, request in each]
            given = {"given": self._arguments(saved), "finished": self._finished(saved)}
            found.append((job, rest | given, entries))
        return found

    def _finished(self, saved: dict[str, Any]) -> dict[int, Path | None]:
        """Where the files are of a call's videos that are written."""
        try:
            return {int(video): Path(path) if path else None for video, path in saved["finished"].items()}
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            raise self._broken(error) from error

    def _arguments(self, saved: dict[str, Any]) -> dict[str, Any]:
        """Of `make_job`."""
        try:
            return {name: _read(self.folder, value) for name, value in saved["call"].items()}
        except (KeyError, TypeError, AttributeError) as error:
            raise self._broken(error) from error

    def _broken(self, error: Exception) -> ValueError:
        return ValueError(f"{self.folder / INDEX} lists no saved calls ({error!r})")


def _entry(path: Path, request: Any, checkpoint: Checkpoint, model: dict[str, Any]) -> Entry:
    entry, _ = load_entry(path, checkpoint, model)
    steps, size = int(request.table.num_steps), checkpoint.geometry.pixel_shape(*entry.sampler.x.shape[:3])
    if (entry.num_steps, size) != (steps, request.size):
        raise ValueError(f"{path} is not the video of its call, which has {steps} steps at {request.size}")
    return entry


# One call


def _write_call(folder: Path, name: str, handle: Handle) -> dict[str, Any]:
    """What makes a call again, as JSON; what is no plain value lies in files beside it."""
    call = handle.call
    if call.given is None:
        raise ValueError("a call of `submit_job` without its arguments (`given`) cannot be saved")
    kept = {}
    for argument, value in (call.given | _decided(handle.job)).items():
        kept[argument] = _written(folder, f"{name}-{argument}", value)
    paths = [str(path.absolute()) for path in handle.paths]
    save = None if call.save is None else asdict(Saving.parse(call.save)) | {"path": paths}
    finished = {}
    if call.keep == "latent":  # and there is no need of frames
        written = {video.number: handle.written[video.number] for video in handle.videos if video.finished}
        finished = {number: path and str(path.absolute()) for number, path in written.items()}
    return {
        "call": kept, "priority": call.priority, "output_type": call.keep, "save": save, "finished": finished
    }  # fmt: skip


def _decided(job: Job) -> dict[str, Any]:
    """What a call left open or brought, as it became: seeds that were drawn; pixels and arrays."""
    per_prompt = max(1, len({r.index for r in job.requests}))
    firsts, made = job.requests[::per_prompt], {}
    if all(r.seed is not None for r in firsts):
        made["seed"] = [r.seed for r in firsts]
    for name in _OF_PROMPTS:
        values = [getattr(r, name) for r in firsts]
        if any(value is not None for value in values):
            made[name] = values
    if job.requests[0].latents is not None:
        made["latents"] = np.stack([np.asarray(r.latents) for r in job.requests])
    for name in ("prompt_embeds", "negative_prompt_embeds"):
        if all(value is not None for value in made.get(name, [None])):
            made[name] = np.stack(made[name])
        else:
            made.pop(name, None)
    return made


def _written(folder: Path, name: str, value: Any) -> Any:
    """A value as JSON has it: arrays and images by the names of their files."""
    from PIL import Image

    if isinstance(value, Image.Image):
        value.convert("RGB").save(folder / f"{name}.png")
        return {"file": f"{name}.png"}
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, Path):
        return str(value.absolute())
    if isinstance(value, list | tuple):
        return [_written(folder, f"{name}-{i}", one) for i, one in enumerate(value)]
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, np.generic):
        return value.item()
    np.save(folder / f"{name}.npy", np.asarray(value), allow_pickle=False)
    return {"file": f"{name}.npy"}


def _read(folder: Path, value: Any) -> Any:
    if isinstance(value, list):
        return [_read(folder, one) for one in value]
    if not isinstance(value, dict) or set(value) != {"file"}:
        return value
    name = str(value["file"])
    if Path(name).name != name or Path(name).suffix not in (".png", ".npy"):
        raise ValueError(f"{folder / INDEX} names the file {name!r:.80}, which is none of its own")
    if name.endswith(".npy"):
        return np.load(folder / name, allow_pickle=False)
    from PIL import Image

    with Image.open(folder / name) as image:
        return image.convert("RGB")
