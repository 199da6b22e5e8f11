"""A call, checked and completed before anything heavy is loaded: arguments -> Job.

Everything here needs the configuration files alone. What the caller left open is filled from the checkpoint; what was
decided that way and may surprise is kept in `Job.notes`, for the caller to be told.
"""

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxwan.config import ImageInput
from jaxwan.pipelines.checkpoint import Checkpoint
from jaxwan.pipelines.media import fit_size, load_image, load_video
from jaxwan.schedulers.table import Table, first_used_step, make_table
from jaxwan.sharding.mesh import MeshSpec

SEEDS = 2**64
DEFAULT_STRENGTH = 0.8
FLF_ROWS = 514  # position embeddings of the first-last-frame model: two images of 257 CLIP rows


@dataclass(frozen=True)
class Request:
    """One prompt of a call. Texts are None where embeddings were given."""

    prompt: str | None
    negative_prompt: str | None
    table: Table
    guidance_scale: float  # high-noise expert
    guidance_scale_2: float  # low-noise expert
    seed: int
    image: Any  # PIL image or float array, None without
    last_image: Any

    @property
    def guided(self) -> bool:
        """Whether classifier-free guidance runs: decided by guidance_scale alone, as in Diffusers."""
        return self.guidance_scale > 1


@dataclass(frozen=True)
class Job:
    """A whole call: all requests share one size. Videos are prompt-major: prompt 0's, then prompt 1's, …"""

    requests: tuple[Request, ...]
    num_videos: int  # per prompt
    num_frames: int
    height: int
    width: int
    fps: float
    boundary_ratio: float | None
    video: np.ndarray | list | None = None
    latents: np.ndarray | None = None  # public axis order (B, C, T, h, w)
    prompt_embeds: np.ndarray | None = None
    negative_prompt_embeds: np.ndarray | None = None
    notes: tuple[str, ...] = ()

    @property
    def guided(self) -> bool:
        """Whether any request is guided; then each one rides as two micro-batches."""
        return any(request.guided for request in self.requests)

    @property
    def batch(self) -> int:
        """Videos of the call."""
        return len(self.requests) * self.num_videos


def make_job(
    checkpoint: Checkpoint,
    *,
    prompt: str | Sequence[str] | None = None,
    negative_prompt: str | Sequence[str] | None = None,
    image: Any = None,
    last_image: Any = None,
    video: Any = None,
    strength: float | None = None,
    height: int | None = None,
    width: int | None = None,
    num_frames: int | None = None,
    fps: float | None = None,
    num_inference_steps: int | Sequence[int] | None = None,
    guidance_scale: float | Sequence[float] | None = None,
    guidance_scale_2: float | Sequence[float] | None = None,
    boundary_ratio: float | None = None,
    flow_shift: float | Sequence[float] | None = None,
    sampler: str | Sequence[str] | None = None,
    timesteps: Sequence[float] | None = None,
    seed: int | Sequence[int] | None = None,
    latents: Any = None,
    prompt_embeds: Any = None,
    negative_prompt_embeds: Any = None,
    num_videos_per_prompt: int = 1,
) -> Job:
    """Check and complete the arguments of a call; their meanings are WanPipeline's.

    Raises ValueError (OSError for files) in a sentence: what came, what is allowed, the nearest valid value.
    """
    prompts, embeds, negative_embeds = _texts(
        checkpoint, prompt, prompt_embeds, negative_prompt, negative_prompt_embeds
    )
    count = len(prompts)
    num_videos = _whole("num_videos_per_prompt", num_videos_per_prompt, 1)
    images, last_images = _images(checkpoint, count, image, last_image, video)
    frames, video_fps = _video(checkpoint, video, strength)
    notes: list[str] = []
    height, width = _size(checkpoint, height, width, images, frames, notes)
    num_frames = _num_frames(checkpoint, num_frames, frames, notes)
    checkpoint.geometry.check_size(num_frames, height, width)
    _check_rope(checkpoint, num_frames, height, width)
    tables = _tables(checkpoint, count, num_inference_steps, sampler, flow_shift, timesteps, frames, strength)
    guidance = _guidance(checkpoint, count, guidance_scale, guidance_scale_2)
    seeds = _seeds(count, seed, notes)
    default = checkpoint.defaults.negative_prompt
    negatives = _per_prompt("negative_prompt", default if negative_prompt is None else negative_prompt, count, str)
    if negative_embeds is not None:
        negatives = [None] * count
    return Job(
        requests=tuple(
            Request(*r)
            for r in zip(
                prompts, negatives, tables, *zip(*guidance, strict=True), seeds, images, last_images, strict=True
            )
        ),
        num_videos=num_videos,
        num_frames=num_frames,
        height=height,
        width=width,
        fps=_positive("fps", _first(fps, video_fps, checkpoint.defaults.fps)),
        boundary_ratio=_boundary(checkpoint, boundary_ratio),
        video=None if frames is None else frames[:num_frames],
        latents=_latents(checkpoint, latents, count * num_videos, (num_frames, height, width)),
        prompt_embeds=embeds,
        negative_prompt_embeds=negative_embeds,
        notes=tuple(notes),
    )


def check_mesh(mesh: MeshSpec, checkpoint: Checkpoint) -> None:
    """Raises ValueError for a mesh that this checkpoint cannot be laid out on, or that is not built yet."""
    others = [f"{axis}={size}" for axis, size in zip(("dp", "cfg", "sp", "tp"), _others(mesh), strict=True) if size > 1]
    if others:
        raise ValueError(
            f"mesh {mesh}: {', '.join(others)} is not built yet, only pp may exceed 1 (such as pp={mesh.pp})"
        )
    layers = checkpoint.transformer.num_layers
    if mesh.pp > layers:
        raise ValueError(f"mesh {mesh} has {mesh.pp} stages for {layers} layers: the largest is pp={layers}")


def _others(mesh: MeshSpec) -> tuple[int, int, int, int]:
    return mesh.dp, mesh.cfg, mesh.sp, mesh.tp


# Texts


def _texts(checkpoint: Checkpoint, prompt, prompt_embeds, negative, negative_embeds) -> tuple[list, Any, Any]:
    """(prompts or Nones, prompt_embeds, negative_prompt_embeds), one source for each."""
    if prompt is not None and prompt_embeds is not None:
        raise ValueError("prompt and prompt_embeds are both given: give one of them")
    if negative is not None and negative_embeds is not None:
        raise ValueError("negative_prompt and negative_prompt_embeds are both given: give one of them")
    if prompt is None and prompt_embeds is None:
        raise ValueError('a prompt is missing (an empty one, "", is allowed), or prompt_embeds')
    if prompt_embeds is not None:
        prompt_embeds = _embeds(checkpoint, "prompt_embeds", prompt_embeds, None)
        prompts: list = [None] * len(prompt_embeds)
    else:
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        wrong = [type(p).__name__ for p in prompts if not isinstance(p, str)]
        if wrong or not prompts:
            raise ValueError(f"prompt must be a text or a list of texts, not {wrong[0] if wrong else 'an empty list'}")
    if negative_embeds is not None:
        negative_embeds = _embeds(checkpoint, "negative_prompt_embeds", negative_embeds, len(prompts))
    return prompts, prompt_embeds, negative_embeds


def _embeds(checkpoint: Checkpoint, name: str, value: Any, count: int | None) -> np.ndarray:
    value = np.asarray(value, np.float32)
    wanted = (count if count is not None else "B", 512, checkpoint.text_encoder.d_model)
    if value.ndim != 3 or value.shape[1:] != wanted[1:] or len(value) == 0 or count not in (None, len(value)):
        raise ValueError(f"{name} has shape {value.shape}, expected ({', '.join(map(str, wanted))})")
    if not np.isfinite(value).all():
        raise ValueError(f"{name} holds values that are not finite")
    return value


# Images, video, size


def _images(checkpoint: Checkpoint, count: int, image: Any, last_image: Any, video: Any) -> tuple[list, list]:
    """One image and one last image a prompt, loaded, or None."""
    name, kind = checkpoint.variant.name, checkpoint.image_input
    if image is not None and video is not None:
        raise ValueError("image and video are both given: give one of them")
    images = _media("image", image, count)
    last_images = _media("last_image", last_image, count)
    given = [i is not None for i in images]
    if any(given) and kind is ImageInput.NONE:
        raise ValueError(f"this is a text-to-video model (built like {name}): it takes no image")
    if not all(given) and kind in (ImageInput.CHANNELS, ImageInput.CHANNELS_AND_CLIP) and video is None:
        raise ValueError(f"this is an image-to-video model (built like {name}): it needs an image for every prompt")
    lasts = [i is not None for i in last_images]
    if any(lasts) and not checkpoint.variant.last_image:
        why = f" (its pos_embed_seq_len is not {FLF_ROWS})" if kind is ImageInput.CHANNELS_AND_CLIP else ""
        raise ValueError(f"this model (built like {name}) takes no last image{why}")
    if any(last and not first for first, last in zip(given, lasts, strict=True)):
        raise ValueError("last_image needs an image too, the first frame")
    if checkpoint.transformer.pos_embed_seq_len is not None and not all(lasts):
        raise ValueError(f"this is a first-last-frame model (built like {name}): it needs a last image too")
    load = {"image": images, "last_image": last_images}
    loaded = {k: [None if v is None else load_image(v, k) for v in values] for k, values in load.items()}
    return loaded["image"], loaded["last_image"]


def _media(name: str, value: Any, count: int) -> list:
    if isinstance(value, (list, tuple)):
        if len(value) != count:
            raise ValueError(f"{name} is a list of {len(value)} for {count} prompts: give one, or one a prompt")
        return list(value)
    return [value] * count


def _video(checkpoint: Checkpoint, video: Any, strength: float | None) -> tuple[Any, float | None]:
    """(frames, their own fps) of a source video, or (None, None)."""
    if video is None:
        if strength is not None:
            raise ValueError(f"strength={strength} is for video to video: give a video, or leave it out")
        return None, None
    if checkpoint.image_input in (ImageInput.CHANNELS, ImageInput.CHANNELS_AND_CLIP):
        raise ValueError(f"this is an image-to-video model (built like {checkpoint.variant.name}): it takes no video")
    return load_video(video)


def _size(checkpoint: Checkpoint, height, width, images: list, frames: Any, notes: list[str]) -> tuple[int, int]:
    """Height and width: as given, else the image's or video's aspect ratio at the variant's area, else the default."""
    if (height is None) != (width is None):
        missing, given = ("width", f"height={height}") if width is None else ("height", f"width={width}")
        raise ValueError(f"{given} without {missing}: give both, or neither")
    if height is not None:
        return _whole("height", height, 1), _whole("width", width, 1)
    defaults = checkpoint.defaults
    source = images[0] if frames is None else frames[0]
    if source is None:
        return defaults.height, defaults.width
    h, w = source.shape[:2] if isinstance(source, np.ndarray) else source.size[::-1]
    fitted = fit_size(h, w, defaults.height * defaults.width, checkpoint.geometry.stride)
    notes.append(f"size {fitted[1]}x{fitted[0]}, from the {'image' if frames is None else 'video'}'s {w}x{h}")
    return fitted


def _num_frames(checkpoint: Checkpoint, num_frames: int | None, frames: Any, notes: list[str]) -> int:
    if num_frames is not None:
        num_frames = _whole("num_frames", num_frames, 1)
    if frames is None:
        return checkpoint.defaults.num_frames if num_frames is None else num_frames
    step = checkpoint.geometry.temporal
    most = (len(frames) - 1) // step * step + 1
    if num_frames is None:
        notes.append(f"{most} frames, the largest {step}k+1 in the video's {len(frames)}")
        return most
    if num_frames > len(frames):
        raise ValueError(f"num_frames={num_frames} but the video has {len(frames)} frames: the largest is {most}")
    return num_frames


def _check_rope(checkpoint: Checkpoint, num_frames: int, height: int, width: int) -> None:
    grid, most = checkpoint.geometry.token_grid(num_frames, height, width), checkpoint.transformer.rope_max_seq_len
    if max(grid) > most:
        raise ValueError(f"{num_frames}x{height}x{width} is {grid} tokens, and the model counts to {most} on each axis")


def _latents(checkpoint: Checkpoint, latents: Any, batch: int, size: tuple[int, int, int]) -> np.ndarray | None:
    if latents is None:
        return None
    latents = np.asarray(latents)
    wanted = (batch, checkpoint.geometry.z_dim, *checkpoint.geometry.latent_shape(*size))
    if latents.shape != wanted or not np.issubdtype(latents.dtype, np.floating):
        raise ValueError(f"latents are {latents.dtype} of shape {latents.shape}, expected floats of shape {wanted}")
    if not np.isfinite(latents).all():
        raise ValueError("latents hold values that are not finite")
    return latents.astype(np.float32)


# Sampling


def _tables(checkpoint: Checkpoint, count: int, steps, sampler, shift, timesteps, frames, strength) -> list[Table]:
    defaults, own = checkpoint.defaults, checkpoint.sampler
    samplers = _per_prompt("sampler", _first(sampler, defaults.sampler, own.sampler), count, str)
    shifts = _per_prompt("flow_shift", _first(shift, defaults.flow_shift, own.shift), count, (int, float))
    silent = None if timesteps is not None else defaults.num_inference_steps
    counts = _per_prompt("num_inference_steps", _first(steps, silent), count, int)
    tables = []
    for name, value, n in zip(samplers, shifts, counts, strict=True):
        first = 0
        if frames is not None:
            total = len(timesteps) if n is None and timesteps is not None else n
            first = first_used_step(total, DEFAULT_STRENGTH if strength is None else _number("strength", strength))
        tables.append(make_table(name, n, value, order=own.order, timesteps=timesteps, first_step=first))
    return tables


def _guidance(checkpoint: Checkpoint, count: int, high: Any, low: Any) -> list[tuple[float, float]]:
    """(high-noise, low-noise) guidance a prompt: the defaults' pair only when neither is given, as in Diffusers."""
    if low is not None and checkpoint.num_experts == 1:
        raise ValueError(f"guidance_scale_2={low} is for a second expert, and this model has one: use guidance_scale")
    defaults = checkpoint.defaults
    if high is None and low is None:
        low = defaults.guidance_scale_2
    highs = _per_prompt("guidance_scale", _first(high, defaults.guidance_scale), count, (int, float))
    lows = _per_prompt("guidance_scale_2", low, count, (int, float))
    return [(float(h), float(h if x is None else x)) for h, x in zip(highs, lows, strict=True)]


def _boundary(checkpoint: Checkpoint, given: float | None) -> float | None:
    if given is None:
        return checkpoint.boundary_ratio if checkpoint.num_experts == 2 else None
    if checkpoint.num_experts == 1:
        raise ValueError(f"boundary_ratio={given} is for a second expert, and this model has one")
    if not 0 <= _number("boundary_ratio", given) <= 1:
        raise ValueError(f"boundary_ratio={given} is outside 0 to 1: nearest is {min(max(given, 0), 1)}")
    return float(given)


def _seeds(count: int, seed: Any, notes: list[str]) -> list[int]:
    if seed is None:
        seed = secrets.randbelow(2**32)
        notes.append(f"seed {seed}")
    seeds = _per_prompt("seed", seed, count, int)
    for value in seeds:
        if not 0 <= value < SEEDS:
            raise ValueError(f"seed={value} is outside 0 to {SEEDS - 1}: nearest is {min(max(value, 0), SEEDS - 1)}")
    return seeds


# Plain values


def _per_prompt(name: str, value: Any, count: int, kind: type | tuple[type, ...]) -> list:
    """One value a prompt, from one value or a list of them; None stays None."""
    if isinstance(value, np.ndarray):
        value = value.tolist()
    values = list(value) if isinstance(value, (list, tuple)) else [value] * count
    if len(values) != count:
        raise ValueError(f"{name} is a list of {len(values)} for {count} prompts: give one value, or one a prompt")
    values = [v.item() if isinstance(v, np.generic) else v for v in values]
    for v in values:
        if v is not None and (not isinstance(v, kind) or isinstance(v, bool)):
            wanted = "a text" if kind is str else "a whole number" if kind is int else "a number"
            raise ValueError(f"{name}={v!r} must be {wanted}")
        if isinstance(v, float) and not np.isfinite(v):
            raise ValueError(f"{name}={v} is not finite")
    return values


def _number(name: str, value: Any) -> float:
    return _per_prompt(name, value, 1, (int, float))[0]


def _whole(name: str, value: Any, least: int) -> int:
    value = _per_prompt(name, value, 1, int)[0]
    if value is None or value < least:
        raise ValueError(f"{name}={value} must be a whole number from {least}")
    return value


def _positive(name: str, value: Any) -> float:
    value = _number(name, value)
    if not value > 0:
        raise ValueError(f"{name}={value} must be above 0")
    return float(value)


def _first(*values: Any) -> Any:
    """The first that is not None."""
    return next((v for v in values if v is not None), None)
