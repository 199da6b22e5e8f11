"""A call, checked and completed before anything heavy is loaded: arguments -> Job.

Everything here needs the configuration files alone. What the caller left open is filled from the checkpoint; what was
decided that way and may surprise is kept in `Job.notes`, for the caller to be told.
"""

import inspect
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from jaxwan.config import Defaults
from jaxwan.models.tiles import Tiling
from jaxwan.pipelines.arguments import (
    Number,
    as_array,
    check_kind,
    first_given,
    number,
    per_prompt,
    refuse_unknown,
    whole,
)
from jaxwan.pipelines.checkpoint import Checkpoint, of_experts
from jaxwan.pipelines.notes import cut_texts, equal_videos, sampling_lines, without_effect
from jaxwan.pipelines.prompt import MAX_TOKENS, check_unicode, tell_unknown_words
from jaxwan.pipelines.request import Job, Request, Sampling
from jaxwan.pipelines.sources import (
    check_fit,
    check_latents,
    check_pixels,
    check_rope,
    choose_num_frames,
    choose_size,
    load_images,
    open_videos,
    take_videos,
    tell_stretched,
    video_fps,
)
from jaxwan.schedulers.presets import DEFAULT_PRESET, SMALL_PIXELS, Preset, find_preset, preset_values
from jaxwan.schedulers.table import MAX_STEPS, SHIFT_RANGE, check_range, first_used_step, make_table, spaces

SEEDS = 2**64
MAX_INDEX = 2**32  # of a video within its prompt: a word of the noise's key
FPS_RANGE = 0.01, 1000.0  # what a video file's fractions can say


def make_job(
    checkpoint: Checkpoint,
    read: bool = True,
    /,
    *,
    prompt: str | Sequence[str] | None = None,
    negative_prompt: str | Sequence[str | None] | None = None,
    image: Any = None,
    last_image: Any = None,
    video: Any = None,
    strength: Number | None = None,
    fit: str | None = None,
    height: int | None = None,
    width: int | None = None,
    num_frames: int | None = None,
    fps: Number | None = None,
    num_inference_steps: int | Sequence[int | None] | None = None,
    guidance_scale: Number | Sequence[Number | None] | None = None,
    guidance_scale_2: Number | Sequence[Number | None] | None = None,
    boundary_ratio: Number | None = None,
    preset: str | None = None,
    flow_shift: Number | Sequence[Number | None] | None = None,
    sampler: str | Sequence[str | None] | None = None,
    sigma_schedule: str | Sequence[str | None] | None = None,
    timesteps: Sequence[Number] | np.ndarray | None = None,
    seed: int | Sequence[int | None] | None = None,
    latents: Any = None,
    prompt_embeds: Any = None,
    negative_prompt_embeds: Any = None,
    num_videos_per_prompt: int = 1,
    index: int = 0,
    max_sequence_length: int = MAX_TOKENS,
    tiling: Tiling | Mapping[str, int] | None = None,
    **unknown: Any,
) -> Job:
    """Check and complete the arguments of a call; their meanings are WanPipeline's.

    The frames of a source video are counted last, once all else is right, and read when they are encoded; with
    read=False, for a call that is not to be run, they are those that its packets promise.

    Raises ValueError (OSError for files, TypeError for an argument that there is not) in a sentence: what came, what is
    allowed, the nearest valid value.
    """
    refuse_unknown(unknown, (*ARGUMENTS, "output_type", "save", "callback_on_step_end"))
    notes: list[str] = []
    warned: list[str] = []
    preset, row = _preset(checkpoint, preset, notes)
    if checkpoint.causal:
        notes.append(f"{checkpoint.name} was trained causally, to see no later frames: here each sees all, at once")
    defaults = _defaults(checkpoint, row)
    rows = _text_rows(checkpoint, max_sequence_length)
    prompts, negatives, embeds, negative_embeds = _texts(
        checkpoint, prompt, prompt_embeds, negative_prompt, negative_prompt_embeds, rows, defaults.negative_prompt
    )
    count = len(prompts)
    tell_unknown_words(prompts, checkpoint.defaults)
    num_videos = whole("num_videos_per_prompt", num_videos_per_prompt, 1)
    index = whole("index", index, 0)
    check_range("index", index, 0, MAX_INDEX - num_videos)
    num_frames = None if num_frames is None else whole("num_frames", num_frames, 1)
    images, last_images = load_images(checkpoint, count, image, last_image, video)
    videos = open_videos(checkpoint, count, video, num_frames, strength)
    fit = check_fit(fit, images, videos)
    derived = height is None and width is None
    height, width = choose_size(checkpoint, height, width, images, videos, notes)
    if fit == "stretch":
        tell_stretched(checkpoint, images, last_images, videos, (height, width), derived, warned)
    size = choose_num_frames(checkpoint, num_frames, videos), height, width
    checkpoint.geometry.check_size(*size)
    check_rope(checkpoint, *size)
    tiling = _tiling(checkpoint, tiling, (height, width), warned)
    check_pixels(images, last_images, videos, size)
    if videos:
        strength = number("strength", first_given(strength, checkpoint.defaults.strength))
    defaults = _defaults(checkpoint, row, height * width)
    samplings = _samplings(
        checkpoint, defaults, count, num_inference_steps, sampler, flow_shift, timesteps, strength, sigma_schedule
    )
    boundary = _boundary(checkpoint, boundary_ratio)
    guidance = _guidance(checkpoint, defaults, count, guidance_scale, guidance_scale_2, boundary)
    draws = [latents is None or sampling.table.renoises for sampling in samplings]
    seeds = _seeds(seed, draws, notes)
    fps = _fps(video_fps(checkpoint, videos, notes) if fps is None else fps)
    latents = check_latents(checkpoint, latents, count * num_videos, size)
    clips = [None] * count
    if videos:
        clips, size = take_videos(checkpoint, videos, num_frames, size, fit, notes, read)
        # once more: a damaged video can be shorter than it says
        latents = check_latents(checkpoint, latents, count * num_videos, size)
    shared = dict(
        num_frames=size[0], height=height, width=width, fps=fps, boundary_ratio=boundary, strength=strength,
        fit=fit, max_sequence_length=rows, tiling=tiling, preset=preset,
    )  # fmt: skip
    requests = tuple(
        Request(
            prompt=prompts[i], negative_prompt=negatives[i], sampling=samplings[i], guidance_scale=guidance[i][0],
            guidance_scale_2=guidance[i][1], seed=seeds[i], index=index + k, image=images[i],
            last_image=last_images[i], video=clips[i],
            latents=None if latents is None else latents[i * num_videos + k],
            prompt_embeds=None if embeds is None else embeds[i],
            negative_prompt_embeds=None if negative_embeds is None else negative_embeds[i], **shared,
        )
        for i in range(count) for k in range(num_videos)
    )  # fmt: skip
    _check_encoded(checkpoint, requests)
    firsts = requests[::num_videos]
    warned += cut_texts(checkpoint, firsts)
    warned += without_effect(
        firsts, draws, negative_prompt=negative_prompt, negative_prompt_embeds=negative_prompt_embeds,
        guidance_scale_2=guidance_scale_2, flow_shift=flow_shift, seed=seed, index=index or None,
    )  # fmt: skip
    warned += equal_videos(requests)
    return Job(requests, tuple(notes), tuple(warned), tuple(sampling_lines(firsts)))


def with_prompt(checkpoint: Checkpoint, call: Mapping[str, Any]) -> dict[str, Any]:
    """A call's arguments, with an empty prompt if they have none: for calls that are only planned or compiled."""
    if call.get("prompt") is not None or call.get("prompt_embeds") is not None:
        return dict(call)
    if checkpoint.text_encoder is not None:
        return {**call, "prompt": ""}
    rows = np.zeros((1, call.get("max_sequence_length", MAX_TOKENS), checkpoint.transformer.text_dim), np.float32)
    return {"negative_prompt_embeds": rows, **call, "prompt_embeds": rows}


ARGUMENTS = tuple(
    name
    for name, parameter in inspect.signature(make_job).parameters.items()
    if parameter.kind is parameter.KEYWORD_ONLY
)


# Texts


def _text_rows(checkpoint: Checkpoint, given: int) -> int:
    rows = whole("max_sequence_length", given, 1)
    check_range("max_sequence_length", rows, 1, MAX_TOKENS)
    if rows != MAX_TOKENS and checkpoint.image_encoder is not None:
        raise ValueError(f"max_sequence_length={rows}: with CLIP's rows behind the text's, a model takes {MAX_TOKENS}")
    return rows


def _texts(
    checkpoint: Checkpoint, prompt, prompt_embeds, negative, negative_embeds, rows: int, default: str
) -> tuple[list, list, Any, Any]:
    """(prompts, negative prompts, prompt_embeds, negative_prompt_embeds); texts are None where embeddings are given."""
    if prompt is not None and prompt_embeds is not None:
        raise ValueError("prompt and prompt_embeds are both given: give one of them")
    if negative is not None and negative_embeds is not None:
        raise ValueError("negative_prompt and negative_prompt_embeds are both given: give one of them")
    if prompt is None and prompt_embeds is None:
        raise ValueError('a prompt is missing (an empty one, "", is allowed), or prompt_embeds')
    if prompt_embeds is not None:
        prompt_embeds = _embeds(checkpoint, "prompt_embeds", prompt_embeds, None, rows)
        prompts: list = [None] * len(prompt_embeds)
    else:
        prompts = list(prompt) if isinstance(prompt, (list, tuple)) else [prompt]
        for text in prompts:
            check_kind("prompt", text, str)
        if not prompts:
            raise ValueError("prompt is an empty list: give a text, or a list of texts")
    if negative_embeds is not None:
        negative_embeds = _embeds(checkpoint, "negative_prompt_embeds", negative_embeds, len(prompts), rows)
        negatives: list = [None] * len(prompts)
    else:
        negatives = per_prompt("negative_prompt", negative, len(prompts), str, default)
    for name, texts in (("prompt", prompts), ("negative_prompt", negatives)):
        for text in texts:
            check_unicode(text or "", name)
    return prompts, negatives, prompt_embeds, negative_embeds


def _embeds(checkpoint: Checkpoint, name: str, value: Any, count: int | None, rows: int) -> np.ndarray:
    value = as_array(value, name).astype(np.float32)
    wanted = (count if count is not None else "B", rows, checkpoint.transformer.text_dim)
    if value.ndim != 3 or value.shape[1:] != wanted[1:] or len(value) == 0 or count not in (None, len(value)):
        raise ValueError(f"{name} has shape {value.shape}, expected ({', '.join(map(str, wanted))})")
    if not np.isfinite(value).all():
        raise ValueError(f"{name} holds values that are not finite")
    return value


def _check_encoded(checkpoint: Checkpoint, requests: Sequence[Request]) -> None:
    """Without a text encoder, all that the model looks at comes as embeddings."""
    if checkpoint.text_encoder is not None:
        return
    for r in requests:
        if r.prompt_embeds is None:
            raise ValueError(f"prompt={r.prompt!r:.40}: this checkpoint has no text encoder: give prompt_embeds")
        if r.guided and r.negative_prompt_embeds is None:
            raise ValueError(
                "this checkpoint has no text encoder: give negative_prompt_embeds too, or guidance_scale=1"
            )


# Sampling


def _preset(checkpoint: Checkpoint, given: Any, notes: list[str]) -> tuple[str, Preset]:
    """The preset's name and row."""
    name = DEFAULT_PRESET if given is None else given
    check_kind("preset", name, str)
    variant = checkpoint.variant
    preset = find_preset(name, variant.name, variant.dim == checkpoint.transformer.dim)
    if preset.note is not None:
        notes.append(f"preset {name} {preset.note}")
    return name, preset


def _defaults(checkpoint: Checkpoint, preset: Preset, pixels: int | None = None) -> Defaults:
    """What the checkpoint says where the preset is silent; for frames of so many pixels, once that is known."""
    values = preset_values(preset, small=pixels is not None and pixels <= SMALL_PIXELS)
    return of_experts(replace(checkpoint.defaults, **values), checkpoint.experts) if values else checkpoint.defaults


def _samplings(
    checkpoint: Checkpoint, defaults: Defaults, count: int, steps, sampler, shift, timesteps, strength, schedule
) -> list[Sampling]:
    own = checkpoint.sampler
    samplers = per_prompt("sampler", sampler, count, str, first_given(defaults.sampler, own.sampler))
    shifts = per_prompt("flow_shift", shift, count, (int, float), first_given(defaults.flow_shift, own.shift))
    default = first_given(defaults.sigma_schedule, "diffusers")
    if timesteps is not None and spaces(default):
        default = "diffusers"
    schedules = per_prompt("sigma_schedule", schedule, count, str, default)
    if sampler in (None, defaults.sampler) and steps is None:
        timesteps = first_given(timesteps, defaults.timesteps)
    timesteps = _timesteps(timesteps)
    silent = defaults.num_inference_steps if timesteps is None else len(timesteps)
    counts = per_prompt("num_inference_steps", steps, count, int, silent)
    made = []
    for name, value, n, sigmas in zip(samplers, shifts, counts, schedules, strict=True):
        check_range("flow_shift", value, *SHIFT_RANGE)
        if timesteps is None:
            check_range("num_inference_steps", n, 1, MAX_STEPS)
        elif n != len(timesteps):
            raise ValueError(f"num_inference_steps={n} for {len(timesteps)} timesteps: leave it out")
        first = 0 if strength is None else first_used_step(n, strength)
        table = make_table(
            name, n, value, order=own.order, timesteps=timesteps, sigma_schedule=sigmas, first_step=first
        )
        name = f"unipc{own.order}" if name == "unipc" else name
        if timesteps is None:
            made.append(Sampling(name, sigmas, n, float(value), None, table))
        else:
            value = float(value) if sigmas == "lookup" else None
            made.append(Sampling(name, sigmas, None, value, tuple(map(float, timesteps)), table))
    return made


def _timesteps(given: Any) -> list | None:
    if given is None:
        return None
    if not isinstance(given, (list, tuple)) and not np.ndim(given):
        raise ValueError(f"timesteps={given!r} must be a list of numbers, such as 1000 750 500 250")
    return per_prompt("timesteps", given, len(given), (int, float), float("nan"))


def _guidance(
    checkpoint: Checkpoint, defaults: Defaults, count: int, high: Any, low: Any, boundary: float | None
) -> list[tuple[float, float]]:
    """(high-noise, low-noise) guidance a prompt: the defaults' pair only when neither is given."""
    if low is not None and checkpoint.num_experts == 1:
        raise ValueError(f"guidance_scale_2={low} is for a second expert, and this model has one: use guidance_scale")
    if low is not None and boundary is None:
        raise ValueError(f"guidance_scale_2={low} needs a boundary_ratio too, which this checkpoint does not set")
    highs = per_prompt("guidance_scale", high, count, (int, float))
    lows = per_prompt("guidance_scale_2", low, count, (int, float))
    pairs = []
    for first, second in zip(highs, lows, strict=True):
        if first is None and second is None:
            second = defaults.guidance_scale_2
        first = first_given(first, defaults.guidance_scale)
        pairs.append((float(first), float(first_given(second, first))))
    return pairs


def _boundary(checkpoint: Checkpoint, given: Number | None) -> float | None:
    if given is None:
        own = first_given(checkpoint.defaults.boundary_ratio, checkpoint.boundary_ratio)
        return own if checkpoint.num_experts == 2 else None
    if checkpoint.num_experts == 1:
        raise ValueError(f"boundary_ratio={given} is for a second expert, and this model has one")
    check_range("boundary_ratio", number("boundary_ratio", given), 0, 1)
    return float(given)


def _seeds(seed: Any, draws: list[bool], notes: list[str]) -> list[int | None]:
    """A seed a prompt, drawn where there is none; None where no noise is `draws`n."""
    seeds = per_prompt("seed", seed, len(draws), int)
    for value in seeds:
        if value is not None:
            check_range("seed", value, 0, SEEDS - 1)
    seeds = [value if needed else None for value, needed in zip(seeds, draws, strict=True)]
    missing = [value is None and needed for value, needed in zip(seeds, draws, strict=True)]
    drawn = [secrets.randbelow(2**32) if absent else value for value, absent in zip(seeds, missing, strict=True)]
    if any(missing):
        notes.append(f"seed{'s' * (len(drawn) > 1)} {', '.join(map(str, drawn))}")
    return drawn


def _tiling(checkpoint: Checkpoint, given: Any, size: tuple[int, int], warned: list[str]) -> Tiling | None:
    tiling = Tiling.parse(given)
    if tiling is not None:
        tiling.check(checkpoint.vae)
        if not tiling.cuts(*size):
            tile = f"{tiling.tile_width}x{tiling.tile_height}"
            warned.append(f"tiling has no effect: {size[1]}x{size[0]} is no larger than a tile of {tile}")
    return tiling


def _fps(value: Any) -> float:
    check_range("fps", number("fps", value), *FPS_RANGE)
    return float(value)
