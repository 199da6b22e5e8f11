"""Videos between two steps, for those who drive the loop themselves."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jaxtyping import Bool, Float, Int

from jaxwan.pipelines.arguments import as_array, number
from jaxwan.pipelines.axes import to_internal, to_public
from jaxwan.pipelines.denoise import Bucket, Entry
from jaxwan.pipelines.dit import RENOISINGS
from jaxwan.schedulers.table import step, table_row

EDITED = "edits between steps"  # among the inputs that settings name: a file cannot say how to make such a video again


@dataclass(frozen=True, eq=False, repr=False)
class StepState:
    """Videos on their way, all of one size. It never changes: functions of WanPipeline take one and give another.

    entries: each video's arrays, on the host. settings: what makes each video again, as of `Output`.

    `state[1]` and `state[2:4]` are states too, `len(state)` counts videos, and `StepState.join` puts states together:
    their videos may be at different steps, and differ in number of steps, guidance, shift, sampler and seed.
    """

    entries: tuple[Entry, ...]
    settings: tuple[dict[str, Any], ...]

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int | slice) -> "StepState":
        if not isinstance(index, slice):
            if not -len(self) <= index < len(self):
                raise IndexError(f"there is no video {index} among {len(self)}")
            index = slice(index % len(self), index % len(self) + 1)
        return StepState(self.entries[index], self.settings[index])

    def __iter__(self) -> "Iterator[StepState]":
        return (self[i] for i in range(len(self)))

    def __repr__(self) -> str:
        steps = ", ".join(f"{e.done}/{e.num_steps}" for e in self.entries)
        return f"StepState({len(self)} video{'s' * (len(self) != 1)}, steps done {steps})"

    @classmethod
    def join(cls, *states: "StepState") -> "StepState":
        """The videos of all states in one. ValueError where their sizes, text rows or kinds of input differ."""
        entries = tuple(entry for state in states for entry in state.entries)
        if not entries:
            raise ValueError("there is no video in these states")
        Bucket.of(entries)
        return cls(entries, tuple(made for state in states for made in state.settings))

    @property
    def latents(self) -> Float[np.ndarray, "b c t h w"]:
        """What the next step starts from, normalised, float32; a given first frame (TI2V) is not put back in it."""
        return to_public(np.stack([np.asarray(entry.sampler.x) for entry in self.entries]))

    @property
    def results(self) -> Float[np.ndarray, "b c t h w"]:
        """The latents to decode: a given first frame is put back, which the sampler moved too."""
        return to_public(np.stack([entry.latents for entry in self.entries]))

    @property
    def steps_done(self) -> Int[np.ndarray, " b"]:
        """Steps that each video has taken."""
        return np.array([int(entry.done) for entry in self.entries])

    @property
    def num_steps(self) -> Int[np.ndarray, " b"]:
        """Steps of each video's whole way."""
        return np.array([entry.num_steps for entry in self.entries])

    @property
    def done(self) -> Bool[np.ndarray, " b"]:
        """Which videos have no step left; more steps leave those as they are, bit for bit."""
        return self.steps_done >= self.num_steps

    @property
    def timesteps(self) -> Float[np.ndarray, " b"]:
        """What the model is shown in each video's next step, 0 to 1000; 0 for videos that are done."""
        return self._next("timesteps")

    @property
    def sigmas(self) -> Float[np.ndarray, " b"]:
        """The noise level of each video's latents: x = (1 - sigma) x0 + sigma noise; 0 for videos that are done."""
        return self._next("sigmas")

    def _next(self, column: str) -> Float[np.ndarray, " b"]:
        rows = (getattr(entry.inputs.controls.table, column) for entry in self.entries)
        return np.array([row[n] if n < len(row) else 0 for row, n in zip(rows, self.steps_done, strict=True)])

    def replace(
        self,
        *,
        latents: Any | None = None,
        guidance_scale: Any = None,
        guidance_scale_2: Any = None,
    ) -> "StepState":
        """The state with other latents, or with other guidance in the steps to come; one value, or one a video.

        guidance_scale alone is that of both experts. Raises ValueError for another shape, for values that are not
        finite, and for guidance above 1 of a video that was prepared without: it has no negative text.
        """
        entries = list(self.entries)
        if latents is None and guidance_scale is None and guidance_scale_2 is None:
            return self
        if latents is not None:
            new = checked_latents(latents, self.latents.shape)
            entries = [entry.with_latents(x) for entry, x in zip(entries, to_internal(new), strict=True)]
        if guidance_scale is not None or guidance_scale_2 is not None:
            highs, lows = (self._scales(n, v) for n, v in (
                ("guidance_scale", guidance_scale), ("guidance_scale_2", guidance_scale_2)))  # fmt: skip
            entries = [_guided(*given) for given in zip(entries, highs, lows, strict=True)]
        return StepState(tuple(entries), tuple(map(edited, self.settings)))

    def _scales(self, name: str, value: Any) -> list[float | None]:
        values = list(value) if isinstance(value, list | tuple | np.ndarray) else [value] * len(self)
        if len(values) != len(self):
            raise ValueError(f"{name} has {len(values)} values for {len(self)} videos: give one, or one a video")
        return [None if v is None else float(number(name, v)) for v in values]

    def after(self, entries: Sequence[Entry], changed: Sequence[bool] | None = None) -> "StepState":
        """The same videos further on; `changed` says whose latents were replaced on the way."""
        settings = self.settings
        if changed is not None:
            settings = tuple(edited(m) if c else m for m, c in zip(settings, changed, strict=True))
        return StepState(tuple(entries), settings)

    def stepped(self, velocity: Any) -> "StepState":
        """After each video's own sampler step along a velocity. Raises ValueError as `replace` does."""
        rows = to_internal(checked_latents(velocity, self.latents.shape, "velocity"))
        return self.after([_step(entry, v) for entry, v in zip(self.entries, rows, strict=True)])


def checked_latents(value: Any, shape: tuple[int, ...], name: str = "latents") -> Float[np.ndarray, "b c t h w"]:
    """The array, float32. ValueError for another shape than `shape`, or values that are not finite."""
    array = as_array(value, name).astype(np.float32)
    if array.shape != shape:
        raise ValueError(f"{name} has shape {array.shape}, expected {shape}")
    if not np.isfinite(array).all():
        raise ValueError(f"{name} holds values that are not finite")
    return array


def edited(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings that say that they alone do not make the video again."""
    inputs = settings.get("inputs", [])
    return settings if EDITED in inputs else settings | {"inputs": [*inputs, EDITED]}


def _guided(entry: Entry, high: float | None, low: float | None) -> Entry:
    """The entry with other guidance from its next step on."""
    controls, done = entry.inputs.controls, int(entry.done)
    low = high if low is None else low
    new = controls.guidance.copy()
    for expert, scale in ((0, high), (1, low)):
        if scale is not None:
            new[done:][controls.expert[done:] == expert] = scale
    guided = controls.guided if high is None else np.array(high > 1)
    if guided and entry.texts == 1:
        raise ValueError(f"guidance_scale={high} needs a negative text, and this video was prepared without guidance")
    return entry._replace(inputs=entry.inputs._replace(controls=controls._replace(guidance=new, guided=guided)))


_sampler_step = jax.jit(step)


def _step(entry: Entry, velocity: Float[np.ndarray, "t h w z"]) -> Entry:
    done = int(entry.done)
    if done >= entry.num_steps:
        return entry
    noise = 0.0 if entry.inputs.noise is None else entry.inputs.noise[min(done, RENOISINGS - 1)]
    sampler = _sampler_step(table_row(entry.inputs.controls.table, done), entry.sampler, velocity, noise)
    return entry._replace(sampler=jax.tree.map(np.asarray, sampler), done=np.array(done + 1, np.int32))
