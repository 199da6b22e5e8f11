"""What a call returns: videos, how they were made, and how they are kept and shown."""

import base64
import html
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from jaxwan import __version__
from jaxwan.pipelines.arguments import output_path
from jaxwan.pipelines.media import (
    BackgroundWriter,
    Compression,
    can_encode,
    check_output,
    save_npz,
    save_output,
    to_uint8,
)  # fmt: skip
from jaxwan.pipelines.request import Job

Paths = str | Path | list[str | Path] | tuple[str | Path, ...]  # of several, one a video
OUTPUT_TYPES = ("np", "uint8", "pil", "latent")
SHOWN_BYTES = 2_000_000  # of all videos shown in a notebook together


@dataclass(frozen=True, eq=False, repr=False)
class Output:
    """Videos of a call, prompt-major: prompt 0's, then prompt 1's, …

    frames: (B, F, H, W, 3), float32 in [0, 1] or, with output_type "uint8", bytes; with "pil" lists of images, with
    "latent" the latents. latents: float32, normalised, (B, C, T, h, w). settings: what makes each video again,
    such as `pipe(**output.settings[0]["call"])`, and the model's name and dtypes (`Request.settings`). seconds: time
    that each phase took, compilation apart. paths: the files that `save=` wrote, None where it could not.

    `output[1]` and `output[2:4]` are Outputs too, and `len(output)` counts videos.
    """

    frames: Any
    latents: np.ndarray
    fps: float
    settings: tuple[dict[str, Any], ...]
    seconds: dict[str, float]
    paths: tuple[Path | None, ...] = ()

    @property
    def seeds(self) -> tuple[int | None, ...]:
        """Each video's seed; None where its noise was given."""
        return tuple(video["call"].get("seed") for video in self.settings)

    def __len__(self) -> int:
        return len(self.settings)

    def __getitem__(self, index: int | slice) -> "Output":
        if not isinstance(index, slice):
            index = _one(index, len(self))
        latents = self.latents[index]
        frames = latents if self.frames is self.latents else self.frames[index]
        return Output(frames, latents, self.fps, self.settings[index], self.seconds, self.paths[index])

    def save(
        self, path: Paths, *, overwrite: bool = True, metadata: bool = True, crf: int | None = None,
        x264_preset: str | None = None,
    ) -> list[Path]:  # fmt: skip
        """Write each video as mp4, webm or gif (or png, one frame), as the suffix of `path` says; returns where they
        are.

        One video goes to `path` itself, several to names beside it (`numbered`), or each to its own of a list. An
        existing file is replaced, once all of the new one is written, or with `overwrite=False` refused. metadata:
        write the settings into the file, where `read_settings` finds them: no time, path or machine is among them.
        crf, x264_preset: quality and speed of compression, as of `save_video`.

        Raises ValueError for another suffix or where nothing was decoded, OSError where nothing can be written.
        """
        videos, saving = (
            [self._pixels(i) for i in range(len(self))],
            Saving(path, overwrite, metadata, crf, x264_preset),
        )
        paths = saving.paths(self.settings, len(videos[0]))
        for pixels, target, settings in zip(videos, paths, self.settings, strict=True):
            save_output(pixels, target, self.fps, *saving.rest(settings))
        return paths

    def save_npz(self, path: str | Path, *, overwrite: bool = True, frames: bool = True) -> None:
        """Write the arrays `latents` and, if decoded and not left out, `frames` as .npz."""
        arrays = {"latents": self.latents}
        if frames and self.frames is not self.latents:
            arrays["frames"] = np.stack([self._pixels(i) for i in range(len(self))])
        save_npz(output_path(path), overwrite=overwrite, **arrays)

    def _pixels(self, i: int) -> np.ndarray:
        """Frames (F, H, W, 3) of a video."""
        if self.frames is self.latents:
            raise ValueError("output_type='latent' has no frames to save or show: decode them with pipe.decode")
        video = self.frames[i]
        return video if isinstance(video, np.ndarray) else np.stack([np.asarray(image) for image in video])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """The frames (or latents), for NumPy."""
        return np.asarray(self.frames, dtype)

    def __repr__(self) -> str:
        count = f"{len(self)} video{'s' * (len(self) != 1)}"
        if not len(self):
            return f"Output({count})"
        if self.frames is self.latents:
            return f"Output({count}, latents {self.latents.shape}{_seeds(self.seeds)})"
        call = self.settings[0]["call"]
        frames = f"{call['num_frames']} frame{'s' * (call['num_frames'] != 1)}"
        return f"Output({count} of {call['width']}x{call['height']}, {frames} at {self.fps:g} fps{_seeds(self.seeds)})"

    def _repr_html_(self) -> str | None:
        """The videos, for notebooks; made smaller where they would take more than SHOWN_BYTES."""
        if self.frames is self.latents or not len(self):
            return None
        shown = [_embedded(self._pixels(i), self.fps, SHOWN_BYTES // len(self)) for i in range(len(self))]
        return "".join(
            f'<figure style="display: inline-block">{video}<figcaption>{_caption(made["call"])}</figcaption></figure>'
            for video, made in zip(shown, self.settings, strict=True)
        )


# What is kept


def kept_type(output_type: str | None, save: Any) -> str:
    """What an output keeps: frames where they are written nowhere. Raises ValueError for types that are not offered."""
    if output_type not in (None, *OUTPUT_TYPES):
        raise ValueError(f"output_type={output_type!r} is not one of {', '.join(OUTPUT_TYPES)}")
    return output_type or ("np" if save is None else "latent")


def as_pil(video: np.ndarray) -> list:
    """The frames (F, H, W, 3), uint8, as PIL images."""
    from PIL import Image

    return [Image.fromarray(frame) for frame in video]


# Names and settings of files


@dataclass(frozen=True)
class Saving:
    """What `Output.save` is told; `save=` of a call is its path, or a dict of all of it."""

    path: Paths
    overwrite: bool = True
    metadata: bool = True
    crf: int | None = None
    x264_preset: str | None = None

    @classmethod
    def parse(cls, value: Any) -> "Saving":
        """Raises ValueError for what is neither."""
        names = [field.name for field in fields(cls)]
        given = value if isinstance(value, Mapping) else {"path": value}
        path = given.get("path")
        each = path if isinstance(path, list | tuple) else [path]
        if not set(given) <= set(names) or not all(isinstance(one, str | Path) for one in each):
            known = ", ".join(names[1:])
            raise ValueError(f"save={value!r:.80} is no path or list of paths, nor a dict of path and any of {known}")
        return cls(**given)

    def paths(
        self, settings: Sequence[Mapping[str, Any]], num_frames: int, written: Collection[int] = ()
    ) -> list[Path]:
        """Where each video goes, proved to be possible; the files of those that are `written` may be there."""
        compression = Compression(self.crf, self.x264_preset)
        return [
            check_output(path, num_frames, self.overwrite or i in written, compression)
            for i, path in enumerate(numbered(self.path, settings))
        ]

    def rest(self, settings: Mapping[str, Any]) -> tuple[Any, ...]:
        """What `save_output` takes behind a video's rate."""
        texts = comment(settings) if self.metadata else None
        return texts, self.overwrite, Compression(self.crf, self.x264_preset)

    def writers(self, output: Output, num_frames: int) -> list[BackgroundWriter]:
        """One for each video of an output of latents. Raises as `Output.save` does."""
        return [
            BackgroundWriter(path, num_frames, output.fps, *self.rest(settings))
            for path, settings in zip(self.paths(output.settings, num_frames), output.settings, strict=True)
        ]


def numbered(path: Paths, settings: Sequence[Mapping[str, Any]]) -> list[Path]:
    """Where each of several videos goes: beside `path`, with its place, its seed and, from 1 on, its index within its
    prompt; one video is `path` itself. Of a list, each has its own.

    clip.mp4 of two prompts, seeds 7 and 8: clip-0-seed7.mp4, clip-1-seed8.mp4
    """
    if isinstance(path, list | tuple):
        paths = [output_path(p) for p in path]
        if len(paths) != len(settings) or len(set(paths)) != len(paths):
            raise ValueError(f"{len(settings)} video(s) need as many paths, each another, and these are {len(paths)}")
        return paths
    path = output_path(path)
    if len(settings) == 1:
        return [path]
    return [
        path.with_stem(f"{path.stem}-{i}{seed_label(made['call'], in_file_name=True)}")
        for i, made in enumerate(settings)
    ]


def seed_label(call: Mapping[str, Any], *, in_file_name: bool = False) -> str:
    """What a video's noise is called: "seed 7", "seed 7, index 2", or nothing where it was given; at the end of a
    file's name "-seed7-index2"."""
    parts = ["seed"] * ("seed" in call) + ["index"] * bool(call.get("index"))
    return "".join(f"-{p}{call[p]}" for p in parts) if in_file_name else ", ".join(f"{p} {call[p]}" for p in parts)


def check_save(
    job: Job, path: Paths, *, overwrite: bool = True, crf: int | None = None, x264_preset: str | None = None
) -> list[Path]:
    """Where `Output.save(path)` will write the videos of a job, proved to be possible before anything costly.

    Raises as `Output.save` does.
    """
    return Saving(path, overwrite, crf=crf, x264_preset=x264_preset).paths(job.settings(), job.size[0])


def comment(settings: Mapping[str, Any]) -> dict[str, str]:
    """Title and comment of a file: the prompt, and all settings as JSON."""
    text = json.dumps({"jaxwan": __version__, **settings}, ensure_ascii=False)
    return {"title": settings["call"].get("prompt", ""), "comment": text}


# Notebooks


def _embedded(frames: np.ndarray, fps: float, limit: int) -> str:
    """An HTML element that holds the frames, halved in size until they take no more than `limit` bytes."""
    frames = to_uint8(frames)
    suffix = ".png" if len(frames) == 1 else ".mp4" if can_encode(".mp4") else ".gif"
    with TemporaryDirectory() as folder:
        path = Path(folder, "shown" + suffix)
        save_output(frames, path, fps)
        while path.stat().st_size * 4 / 3 > limit and min(frames.shape[1:3]) >= 64:  # base64 is 4/3 as long
            frames = _halved(frames)
            save_output(frames, path, fps)
        data = base64.b64encode(path.read_bytes()).decode()
    style = 'style="min-width: 192px; image-rendering: pixelated"'
    if suffix == ".mp4":
        return f'<video controls loop autoplay muted {style} src="data:video/mp4;base64,{data}"></video>'
    return f'<img {style} src="data:image/{suffix[1:]};base64,{data}">'


def _halved(frames: np.ndarray) -> np.ndarray:
    """Half as high and wide, to even sizes; each pixel is the mean of four."""
    height, width = (size // 4 * 2 for size in frames.shape[1:3])
    blocks = frames[:, : 2 * height, : 2 * width].reshape(len(frames), height, 2, width, 2, 3)
    return blocks.mean(axis=(2, 4)).round().astype(np.uint8)


def _one(index: int, length: int) -> slice:
    if not -length <= index < length:
        raise IndexError(f"there is no video {index} among {length}")
    place = index % length
    return slice(place, place + 1)


def _caption(call: Mapping[str, Any]) -> str:
    return html.escape(": ".join(filter(None, (seed_label(call), call.get("prompt", "")))))


def _seeds(seeds: tuple[int | None, ...]) -> str:
    different = [seed for seed in dict.fromkeys(seeds) if seed is not None]
    shown = ", ".join(map(str, different[:4])) + (", …" if len(different) > 4 else "")
    return f", seed{'s' * (len(different) != 1)} {shown}" if different else ""
