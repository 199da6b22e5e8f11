"""What is to be made: requests, one a video, and the job of a whole call. `call.make_job` makes them."""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from jaxwan.models.tiles import Tiling
from jaxwan.pipelines.arguments import Number
from jaxwan.pipelines.media import Clip
from jaxwan.pipelines.prompt import MAX_TOKENS
from jaxwan.schedulers.presets import DEFAULT_PRESET
from jaxwan.schedulers.table import Table


@dataclass(frozen=True, eq=False)
class Request:
    """One video to be made, checked and complete."""

    prompt: str | None  # None where embeddings were given, as the next
    negative_prompt: str | None
    num_frames: int
    height: int
    width: int
    fps: float
    sampling: "Sampling"
    guidance_scale: float  # high-noise expert
    guidance_scale_2: float  # low-noise expert
    boundary_ratio: float | None
    seed: int | None  # None where no noise is drawn: latents were given
    index: int  # within its prompt: with the seed it makes the noise
    image: Any = None  # PIL image or float array
    last_image: Any = None
    video: Clip | None = None  # of video to video
    strength: Number | None = None
    fit: str = "stretch"  # images to the size: one of media.FITS; the video has it
    latents: np.ndarray | None = None  # public axis order (C, T, h, w)
    prompt_embeds: np.ndarray | None = None  # (512, C)
    negative_prompt_embeds: np.ndarray | None = None
    max_sequence_length: int = MAX_TOKENS  # rows of the texts
    tiling: Tiling | None = None  # of the VAE
    preset: str = DEFAULT_PRESET  # what was left open came from it

    @property
    def guided(self) -> bool:
        """Whether classifier-free guidance runs: decided by guidance_scale alone, as in Diffusers."""
        return self.guidance_scale > 1

    @property
    def size(self) -> tuple[int, int, int]:
        """(num_frames, height, width)."""
        return self.num_frames, self.height, self.width

    @property
    def table(self) -> Table:
        """The sampler's weights."""
        return self.sampling.table

    def settings(self) -> dict[str, Any]:
        """What makes the video again: under `call` plain values, by their names as arguments, and under `inputs`, if
        there were any, the names of arguments that were images, a video or arrays."""
        own = {name: getattr(self, name) for name in _PLAIN} | {
            name: getattr(self.sampling, name) for name in _SAMPLING
        }
        own["tiling"] = self.tiling and asdict(self.tiling)
        unused = ["guidance_scale_2"] * (self.boundary_ratio is None or not self.guided)
        unused += ["negative_prompt"] * (not self.guided) + ["index"] * (self.seed is None)
        unused += ["fit"] * (self.fit == "stretch") + ["preset"] * (self.preset == DEFAULT_PRESET)
        call = {name: value for name, value in own.items() if value is not None and name not in unused}
        inputs = [name for name in _ARRAYS if getattr(self, name) is not None]
        return {"call": call} | ({"inputs": inputs} if inputs else {})


_PLAIN = (
    "prompt negative_prompt height width num_frames fps guidance_scale guidance_scale_2 boundary_ratio seed index "
    "strength fit max_sequence_length preset"
).split()
_SAMPLING = ("sampler", "sigma_schedule", "num_inference_steps", "flow_shift", "timesteps")
_ARRAYS = ("image", "last_image", "video", "latents", "prompt_embeds", "negative_prompt_embeds")


@dataclass(frozen=True, eq=False)
class Sampling:
    """A request's way from noise to video, as it was asked for and as a table."""

    sampler: str
    sigma_schedule: str
    num_inference_steps: int | None  # None with timesteps
    flow_shift: float | None  # None where it does not enter
    timesteps: tuple[float, ...] | None
    table: Table


@dataclass(frozen=True, eq=False)
class Job:
    """A whole call: its videos, all of one size, prompt-major: prompt 0's, then prompt 1's, …"""

    requests: tuple[Request, ...]
    decided: tuple[str, ...] = ()  # what the call left open and may surprise
    warnings: tuple[str, ...] = ()  # what it gives in vain, or is likely not to mean
    sampling: tuple[str, ...] = ()  # preset, sampler, shift, guidance and experts: a line for all, or some a prompt

    @property
    def notes(self) -> tuple[str, ...]:
        """All that the caller is to be told."""
        return self.decided + self.warnings

    @property
    def guided(self) -> bool:
        """Whether any request is guided; then each one is two micro-batches."""
        return any(request.guided for request in self.requests)

    @property
    def size(self) -> tuple[int, int, int]:
        """(num_frames, height, width) of every video."""
        return self.requests[0].size

    def settings(self) -> tuple[dict[str, Any], ...]:
        """What makes each video again."""
        return tuple(request.settings() for request in self.requests)
