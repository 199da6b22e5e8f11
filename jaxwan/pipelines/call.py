"""A call, checked and completed before anything heavy is loaded: arguments -> Job.

Everything here needs the configuration files alone. What the caller left open is filled from the checkpoint; what was
decided that way and may surprise is kept in `Job.notes`, for the caller to be told.
"""

import difflib
import inspect
import secrets
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxwan.config import ImageInput
from jaxwan.pipelines.arguments import Number, as_array, check_kind, number, per_prompt, refuse_unknown, whole
from jaxwan.pipelines.checkpoint import Checkpoint
from jaxwan.pipelines.condition import choose_expert
from jaxwan.pipelines.media import FITS, Video, fit_size, load_image, load_latents, open_video, resize_image
from jaxwan.pipelines.prompt import MAX_TOKENS, check_unicode, lost_text, tell_unknown_words
from jaxwan.pipelines.request import Job, Request, Sampling
from jaxwan.schedulers.table import MAX_STEPS, SHIFT_RANGE, check_range, first_used_step, make_table

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
    flow_shift: Number | Sequence[Number | None] | None = None,
    sampler: str | Sequence[str | None] | None = None,
    timesteps: Sequence[Number] | np.ndarray | None = None,
    seed: int | Sequence[int | None] | None = None,
    latents: Any = None,
    prompt_embeds: Any = None,
    negative_prompt_embeds: Any = None,
    num_videos_per_prompt: int = 1,
    index: int = 0,
    max_sequence_length: int = MAX_TOKENS,
    **unknown: Any,
) -> Job:
    """Check and complete the arguments of a call; their meanings are WanPipeline's.

    A source video is read last, once all else is right; with read=False, for a call that is not to be run, it is black.

    Raises ValueError (OSError for files, TypeError for an argument that there is not) in a sentence: what came, what is
    allowed, the nearest valid value.
    """
    refuse_unknown(unknown, (*ARGUMENTS, "output_type", "callback_on_step_end"))
    rows = _text_rows(checkpoint, max_sequence_length)
    prompts, negatives, embeds, negative_embeds = _texts(
        checkpoint, prompt, prompt_embeds, negative_prompt, negative_prompt_embeds, rows
    )
    count = len(prompts)
    tell_unknown_words(prompts, checkpoint.defaults)
    num_videos = whole("num_videos_per_prompt", num_videos_per_prompt, 1)
    index = whole("index", index, 0)
    check_range("index", index, 0, MAX_INDEX - num_videos)
    num_frames = None if num_frames is None else whole("num_frames", num_frames, 1)
    images, last_images = _images(checkpoint, count, image, last_image, video)
    videos = _videos(checkpoint, count, video, num_frames, strength)
    notes: list[str] = []
    fit = _fit(fit, images, videos)
    derived = height is None and width is None
    height, width = _size(checkpoint, height, width, images, videos, notes)
    if fit == "stretch":
        _tell_stretched(checkpoint, images, last_images, videos, (height, width), derived, notes)
    size = _num_frames(checkpoint, num_frames, videos), height, width
    checkpoint.geometry.check_size(*size)
    _check_rope(checkpoint, *size)
    _check_pixels(images, last_images, videos, size)
    if videos:
        strength = number("strength", _first(strength, checkpoint.defaults.strength))
    samplings = _samplings(checkpoint, count, num_inference_steps, sampler, flow_shift, timesteps, strength)
    boundary = _boundary(checkpoint, boundary_ratio)
    guidance = _guidance(checkpoint, count, guidance_scale, guidance_scale_2, boundary)
    draws = [latents is None or sampling.table.renoises for sampling in samplings]
    seeds = _seeds(seed, draws, notes)
    fps = _fps(_video_fps(checkpoint, videos, notes) if fps is None else fps)
    latents = _latents(checkpoint, latents, count * num_videos, size)
    pixels = [None] * count
    if videos:
        pixels, size = _pixels(checkpoint, videos, num_frames, size, fit, notes, read)
        latents = _latents(checkpoint, latents, count * num_videos, size)  # a damaged video can be shorter than it says
    shared = dict(
        num_frames=size[0], height=height, width=width, fps=fps, boundary_ratio=boundary, strength=strength,
        fit=fit, max_sequence_length=rows,
    )  # fmt: skip
    requests = tuple(
        Request(
            prompt=prompts[i], negative_prompt=negatives[i], sampling=samplings[i], guidance_scale=guidance[i][0],
            guidance_scale_2=guidance[i][1], seed=seeds[i], index=index + k, image=images[i],
            last_image=last_images[i], video=pixels[i],
            latents=None if latents is None else latents[i * num_videos + k],
            prompt_embeds=None if embeds is None else embeds[i],
            negative_prompt_embeds=None if negative_embeds is None else negative_embeds[i], **shared,
        )
        for i in range(count) for k in range(num_videos)
    )  # fmt: skip
    _check_encoded(checkpoint, requests)
    firsts = requests[::num_videos]
    notes += _cut_texts(checkpoint, firsts)
    notes += _without_effect(
        firsts, draws, negative_prompt=negative_prompt, negative_prompt_embeds=negative_prompt_embeds,
        guidance_scale_2=guidance_scale_2, flow_shift=flow_shift, seed=seed, index=index or None,
    )  # fmt: skip
    notes += _equal_videos(requests)
    return Job(requests, tuple(notes))


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
    checkpoint: Checkpoint, prompt, prompt_embeds, negative, negative_embeds, rows: int
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
        default = checkpoint.defaults.negative_prompt
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


# Images, video, size


def _images(checkpoint: Checkpoint, count: int, image: Any, last_image: Any, video: Any) -> tuple[list, list]:
    """One image and one last image a prompt, loaded, or None."""
    name, kind = checkpoint.variant.name, checkpoint.image_input
    if image is not None and video is not None:
        raise ValueError("image and video are both given: give one of them")
    if video is not None and kind in (ImageInput.CHANNELS, ImageInput.CHANNELS_AND_CLIP):
        raise ValueError(f"this is an image-to-video model (built like {name}): it takes no video")
    images = _media("image", image, count)
    last_images = _media("last_image", last_image, count)
    given = [i is not None for i in images]
    if any(given) and kind is ImageInput.NONE:
        raise ValueError(f"this is a text-to-video model (built like {name}): it takes no image")
    if not all(given) and kind in (ImageInput.CHANNELS, ImageInput.CHANNELS_AND_CLIP):
        raise ValueError(f"this is an image-to-video model (built like {name}): it needs an image for every prompt")
    lasts = [i is not None for i in last_images]
    if any(lasts) and not checkpoint.variant.last_image:
        why = " (it has no pos_embed_seq_len)" if kind is ImageInput.CHANNELS_AND_CLIP else ""
        raise ValueError(f"this model (built like {name}) takes no last image{why}")
    if any(last and not first for first, last in zip(given, lasts, strict=True)):
        raise ValueError("last_image needs an image too, the first frame")
    if checkpoint.transformer.pos_embed_seq_len is not None and not all(lasts):
        raise ValueError(f"this is a first-last-frame model (built like {name}): it needs a last image too")
    return _loaded("image", images), _loaded("last_image", last_images)


def _loaded(name: str, sources: list) -> list:
    """The images; a source that several prompts share is loaded once and stays one object."""
    made = {id(source): None if source is None else load_image(source, name) for source in sources}
    return [made[id(source)] for source in sources]


def _media(name: str, value: Any, count: int) -> list:
    if isinstance(value, (list, tuple)):
        if len(value) != count:
            raise ValueError(f"{name} is a list of {len(value)} for {count} prompts: give one, or one a prompt")
        return list(value)
    return [value] * count


def _videos(checkpoint: Checkpoint, count: int, video: Any, num_frames: int | None, strength: Any) -> list[Video]:
    """One open video a prompt, or none at all; one that several prompts share is opened once.

    At most the model's own length is taken if none is asked for.
    """
    if video is None:
        if strength is not None:
            raise ValueError(f"strength={strength} is for video to video: give a video, or leave it out")
        return []
    sources = _media("video", list(video), count) if _are_videos(video) else [video] * count
    keys = [str(source) if isinstance(source, str | Path) else id(source) for source in sources]
    most, videos = _first(num_frames, checkpoint.defaults.num_frames), {}
    for i, (key, source) in enumerate(zip(keys, sources, strict=True)):
        if source is None:
            raise ValueError(f"video[{i}] is None: give one video for all prompts, or one for each")
        if key not in videos:
            videos[key] = open_video(source, "video" if len(set(keys)) == 1 else f"video[{i}]", most=most)
    return [videos[key] for key in keys]


def _are_videos(value: Any) -> bool:
    """Whether it is one video a prompt, and not one video for all."""
    if isinstance(value, (list, tuple)):
        return any(v is None or isinstance(v, str | Path | list | tuple) or getattr(v, "ndim", 0) == 4 for v in value)
    return getattr(value, "ndim", 0) == 5


def _name(video: Video) -> str:
    return "the video" if video.what == "video" else video.what


def _size(
    checkpoint: Checkpoint, height, width, images: list, videos: list[Video], notes: list[str]
) -> tuple[int, int]:
    """Height and width: as given, else the image's or video's aspect ratio at the variant's area, else the default."""
    if (height is None) != (width is None):
        missing, given = ("width", f"height={height}") if width is None else ("height", f"width={width}")
        raise ValueError(f"{given} without {missing}: give both, or neither")
    if height is not None:
        return whole("height", height, 1), whole("width", width, 1)
    defaults, image = checkpoint.defaults, _first(*images)
    if videos:
        name, h, w = _name(videos[0]), videos[0].height, videos[0].width
    elif image is not None:
        name, (h, w) = "the image", _shape(image)
    else:
        return defaults.height, defaults.width
    fitted = fit_size(h, w, defaults.height * defaults.width, checkpoint.geometry.stride)
    notes.append(f"size {fitted[1]}x{fitted[0]}, from {name}'s {w}x{h}")
    return fitted


def _fit(given: Any, images: list, videos: list[Video]) -> str:
    if given is None:
        return FITS[0]
    if given not in FITS:
        near = difflib.get_close_matches(str(given).lower(), FITS, 1)
        raise ValueError(f"fit={given!r} is not one of {', '.join(FITS)}{f': nearest is {near[0]}' if near else ''}")
    if not videos and all(image is None for image in images):
        raise ValueError(f"fit={given!r} is for images and videos of another shape: give one, or leave it out")
    return given


def _tell_stretched(
    checkpoint: Checkpoint, images: list, lasts: list, videos: list[Video], size: tuple[int, int], derived: bool,
    notes: list[str],
) -> None:  # fmt: skip
    """Note what changes its shape by more than the stride asks for; a derived size has that of the first."""
    (height, width), stride = size, checkpoint.geometry.stride
    sources = [(video.what, video.height, video.width) for video in videos]
    for name, pictures in (("image", images), ("last_image", lasts)):
        sources += [(name, *_shape(picture)) for picture in pictures if picture is not None]
    for name, h, w in dict.fromkeys(sources):
        nearest = min(abs(height - width * h / w), abs(width - height * w / h)) < stride / 2
        if not nearest and not (derived and h * sources[0][2] == w * sources[0][1]):
            notes.append(f"{name} of {w}x{h} is stretched to {width}x{height}: fit crop or pad would keep its shape")


def _shape(image: Any) -> tuple[int, int]:
    """(height, width) of what `load_image` returned."""
    return image.shape[:2] if isinstance(image, np.ndarray) else image.size[::-1]


def _num_frames(checkpoint: Checkpoint, num_frames: int | None, videos: list[Video]) -> int:
    """As given, else the checkpoint's, or what the shortest video has if that is less."""
    own, geometry = checkpoint.defaults.num_frames, checkpoint.geometry
    if not videos:
        return _first(num_frames, own)
    shortest = min(videos, key=lambda v: v.num_frames)
    if num_frames is None:
        return geometry.most_frames(min(own, shortest.num_frames))
    if num_frames > shortest.num_frames:
        raise _too_short(checkpoint, num_frames, f"{_name(shortest)} has {shortest.num_frames}", shortest.num_frames)
    return num_frames


def _video_fps(checkpoint: Checkpoint, videos: list[Video], notes: list[str]) -> Number:
    """The first video's frame rate, else the default."""
    if not videos or videos[0].fps is None:
        return checkpoint.defaults.fps
    first, fps = videos[0], float(videos[0].fps)
    if first.header_fps is not None:
        wrong = f"its header says {float(first.header_fps):.4g}"
        notes.append(f"fps {fps:.4g}, from the times of {_name(first)}'s frames: {wrong}")
    for video in dict.fromkeys(videos):
        if video.fps not in (None, first.fps):
            notes.append(f"fps {fps:.4g}, {_name(first)}'s: {video.what} has {float(video.fps):.4g}")
    return fps


def _pixels(
    checkpoint: Checkpoint, videos: list[Video], num_frames: int | None, size: tuple[int, int, int], fit: str,
    notes: list[str], read: bool,
) -> tuple[list[np.ndarray], tuple[int, int, int]]:  # fmt: skip
    """(frames of each prompt's video, size of all), shorter than `size` where a video has fewer whole frames than its
    packets promise."""
    step, distinct = checkpoint.geometry.temporal, list(dict.fromkeys(videos))
    notes.extend(f"{_name(v)}: {v.colours} is read as sRGB, clipped at its white" for v in distinct if v.colours)
    frames = {video: video.read(*size, fit) if read else video.blank(*size) for video in distinct}
    shortest = min(distinct, key=lambda video: (len(frames[video]), video.num_frames))
    name, found, total = _name(shortest), len(frames[shortest]), shortest.num_frames
    most = checkpoint.geometry.most_frames(found)
    if found < size[0]:
        if num_frames is not None:
            raise _too_short(checkpoint, num_frames, f"{name} has {found} whole", found)
        notes.append(f"{most} frames, the largest {step}k+1 in {name}'s {found} whole ones")
    elif num_frames is None and total <= checkpoint.defaults.num_frames:
        notes.append(f"{most} frames, the largest {step}k+1 in {name}'s {total}")
    elif num_frames is None:
        notes.append(f"the first {most} frames of {name}'s {total}, this model's own length: give num_frames for more")
    frames = {video: pixels[:most] for video, pixels in frames.items()}
    return [frames[video] for video in videos], (most, *size[1:])


def _too_short(checkpoint: Checkpoint, num_frames: int, has: str, found: int) -> ValueError:
    most = checkpoint.geometry.most_frames(found)
    return ValueError(f"num_frames={num_frames} but {has} frames: the largest is {most}")


def _check_rope(checkpoint: Checkpoint, num_frames: int, height: int, width: int) -> None:
    grid, most = checkpoint.geometry.token_grid(num_frames, height, width), checkpoint.transformer.rope_max_seq_len
    if max(grid) > most:
        raise ValueError(f"{num_frames}x{height}x{width} is {grid} tokens, and the model counts to {most} on each axis")


def _check_pixels(images: list, lasts: list, videos: list[Video], size: tuple[int, int, int]) -> None:
    """What could otherwise be told only when the pixels are encoded."""
    num_frames, height, width = size
    if num_frames == 1 and any(last is not None for last in lasts):
        raise ValueError("num_frames=1 has no last frame beside the first: leave last_image out, or take 5 frames")
    for name, values in (("image", images), ("last_image", lasts)):
        for pixels in values:
            if isinstance(pixels, np.ndarray):
                resize_image(pixels, height, width, name)  # a float array is not resized: its size is checked
    for video in videos:
        video.check_size(height, width)


def _latents(checkpoint: Checkpoint, latents: Any, batch: int, size: tuple[int, int, int]) -> np.ndarray | None:
    if latents is None:
        return None
    latents = load_latents(latents) if isinstance(latents, str | Path) else as_array(latents, "latents")
    wanted = (batch, checkpoint.geometry.z_dim, *checkpoint.geometry.latent_shape(*size))
    if latents.shape != wanted or not jnp.issubdtype(latents.dtype, jnp.floating):
        raise ValueError(f"latents are {latents.dtype} of shape {latents.shape}, expected floats of shape {wanted}")
    if not np.isfinite(latents).all():
        raise ValueError("latents hold values that are not finite")
    return latents.astype(np.float32)


# Sampling


def _samplings(checkpoint: Checkpoint, count: int, steps, sampler, shift, timesteps, strength) -> list[Sampling]:
    defaults, own = checkpoint.defaults, checkpoint.sampler
    samplers = per_prompt("sampler", sampler, count, str, _first(defaults.sampler, own.sampler))
    shifts = per_prompt("flow_shift", shift, count, (int, float), _first(defaults.flow_shift, own.shift))
    if sampler is None and steps is None:
        timesteps = _first(timesteps, defaults.timesteps)
    timesteps = _timesteps(timesteps)
    silent = defaults.num_inference_steps if timesteps is None else len(timesteps)
    counts = per_prompt("num_inference_steps", steps, count, int, silent)
    made = []
    for name, value, n in zip(samplers, shifts, counts, strict=True):
        check_range("flow_shift", value, *SHIFT_RANGE)
        if timesteps is None:
            check_range("num_inference_steps", n, 1, MAX_STEPS)
        elif n != len(timesteps):
            raise ValueError(f"num_inference_steps={n} for {len(timesteps)} timesteps: leave it out")
        first = 0 if strength is None else first_used_step(n, strength)
        table = make_table(name, n, value, order=own.order, timesteps=timesteps, first_step=first)
        name = f"unipc{own.order}" if name == "unipc" else name
        if timesteps is None:
            made.append(Sampling(name, n, float(value), None, table))
        else:
            made.append(Sampling(name, None, None, tuple(map(float, timesteps)), table))
    return made


def _timesteps(given: Any) -> list | None:
    if given is None:
        return None
    if not isinstance(given, (list, tuple)) and not np.ndim(given):
        raise ValueError(f"timesteps={given!r} must be a list of numbers, such as 1000 750 500 250")
    return per_prompt("timesteps", given, len(given), (int, float), float("nan"))


def _guidance(
    checkpoint: Checkpoint, count: int, high: Any, low: Any, boundary: float | None
) -> list[tuple[float, float]]:
    """(high-noise, low-noise) guidance a prompt: the defaults' pair only when neither is given."""
    if low is not None and checkpoint.num_experts == 1:
        raise ValueError(f"guidance_scale_2={low} is for a second expert, and this model has one: use guidance_scale")
    if low is not None and boundary is None:
        raise ValueError(f"guidance_scale_2={low} needs a boundary_ratio too, which this checkpoint does not set")
    defaults = checkpoint.defaults
    highs = per_prompt("guidance_scale", high, count, (int, float))
    lows = per_prompt("guidance_scale_2", low, count, (int, float))
    pairs = []
    for first, second in zip(highs, lows, strict=True):
        if first is None and second is None:
            second = defaults.guidance_scale_2
        first = _first(first, defaults.guidance_scale)
        pairs.append((float(first), float(_first(second, first))))
    return pairs


def _boundary(checkpoint: Checkpoint, given: Number | None) -> float | None:
    if given is None:
        own = _first(checkpoint.defaults.boundary_ratio, checkpoint.boundary_ratio)
        return own if checkpoint.num_experts == 2 else None
    if checkpoint.num_experts == 1:
        raise ValueError(f"boundary_ratio={given} is for a second expert, and this model has one")
    check_range("boundary_ratio", number("boundary_ratio", given), 0, 1)
    return float(given)


def _seeds(seed: Any, draws: list[bool], notes: list[str]) -> list[int | None]:
    """A seed a prompt, drawn where there is none; None where no noise is `draws`n and none was given."""
    seeds = per_prompt("seed", seed, len(draws), int)
    for value in seeds:
        if value is not None:
            check_range("seed", value, 0, SEEDS - 1)
    missing = [value is None and needed for value, needed in zip(seeds, draws, strict=True)]
    drawn = [secrets.randbelow(2**32) if absent else value for value, absent in zip(seeds, missing, strict=True)]
    if any(missing):
        notes.append(f"seed{'s' * (len(drawn) > 1)} {', '.join(map(str, drawn))}")
    return drawn


def _fps(value: Any) -> float:
    check_range("fps", number("fps", value), *FPS_RANGE)
    return float(value)


def _first(*values: Any) -> Any:
    """The first that is not None."""
    return next((v for v in values if v is not None), None)


# Notes on what a caller would else find out late, or never


def _cut_texts(checkpoint: Checkpoint, requests: Sequence[Request]) -> Iterator[str]:
    """On texts that are longer than what the model reads, if the checkpoint has its tokenizer."""
    if checkpoint.tokenizer is None:
        return
    rows = requests[0].max_sequence_length
    texts = [("prompt", r.prompt) for r in requests]
    texts += [("negative prompt", r.negative_prompt) for r in requests if r.guided]
    for name, text in dict.fromkeys(texts):
        if lost := text and lost_text(checkpoint.tokenizer, text, rows):
            yield f"the {name} is longer than {rows} tokens, its end is not read: {lost!r}"


def _without_effect(requests: Sequence[Request], draws: Sequence[bool], **given: Any) -> Iterator[str]:
    """On arguments that change no prompt's video; of those that are given one a prompt, on each that does not."""
    for name, value in given.items():
        several = isinstance(value, (list, tuple))
        values = value if several else [value] * len(requests)
        silent = [v is None or (isinstance(v, str) and not v) for v in values]
        whys = [None if s else _why_idle(name, *of) for s, *of in zip(silent, requests, draws, strict=True)]
        idle = [i for i, why in enumerate(whys) if why]
        if len(idle) == len(requests):
            yield f"{name} has no effect: {whys[0]}"
        elif several:
            yield from (f"{name} of prompt {i} has no effect: {whys[i]}" for i in idle)


def _why_idle(name: str, request: Request, draws: bool) -> str | None:
    """Why an argument that is given changes nothing of a video, or None."""
    if name in ("seed", "index"):
        return None if draws else "the noise is given, as latents"
    if name == "flow_shift":
        return None if request.sampling.timesteps is None else "timesteps are used as they are"
    if not request.guided:
        return f"guidance_scale={request.guidance_scale:g} turns guidance off (of both experts, if there are two)"
    timesteps = request.table.timesteps[: request.table.num_steps]
    if name == "guidance_scale_2" and not choose_expert(timesteps, request.boundary_ratio).any():
        return "no step is the low-noise expert's"
    return None


def _equal_videos(requests: Sequence[Request]) -> Iterator[str]:
    """On videos that will be equal, because all that makes them is."""
    first: dict[tuple, int] = {}
    for i, request in enumerate(requests):
        settings = request.settings()
        made_of = repr(settings["call"]), *(id(getattr(request, name)) for name in settings.get("inputs", ()))
        if first.setdefault(made_of, i) != i:
            yield f"videos {first[made_of]} and {i} will be the same: prompt, seed and all else are equal"
