"""The images, videos and latents that a call brings, and the size and number of frames that follow from them.

Checked from headers and shapes; `take_videos` alone decodes, to count, and is called last.
"""

import difflib
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxwan.config import ImageInput
from jaxwan.geometry import Geometry
from jaxwan.pipelines.arguments import Number, as_array, first_given, whole
from jaxwan.pipelines.checkpoint import Checkpoint
from jaxwan.pipelines.media import (
    FITS,
    Clip,
    Video,
    checked_frames,
    fit_size,
    load_image,
    load_latents,
    open_video,
    resize_image,
)


def load_images(checkpoint: Checkpoint, count: int, image: Any, last_image: Any, video: Any) -> tuple[list, list]:
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


def open_videos(checkpoint: Checkpoint, count: int, video: Any, num_frames: int | None, strength: Any) -> list[Video]:
    """One open video a prompt, or none at all; one that several prompts share is opened once.

    At most the model's own length is taken if none is asked for.
    """
    if video is None:
        if strength is not None:
            raise ValueError(f"strength={strength} is for video to video: give a video, or leave it out")
        return []
    sources = _media("video", list(video), count) if _are_videos(video) else [video] * count
    keys = [str(source) if isinstance(source, str | Path) else id(source) for source in sources]
    most, videos = first_given(num_frames, checkpoint.defaults.num_frames), {}
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


def choose_size(
    checkpoint: Checkpoint, height, width, images: list, videos: list[Video], notes: list[str]
) -> tuple[int, int]:
    """Height and width: as given, else the image's or video's aspect ratio at the variant's area, else the default."""
    given = _given_size(height, width)
    if given is not None:
        return given
    defaults, image = checkpoint.defaults, first_given(*images)
    if videos:
        name, h, w = _name(videos[0]), videos[0].height, videos[0].width
    elif image is not None:
        name, (h, w) = "the image", _shape(image)
    else:
        return defaults.height, defaults.width
    fitted = fit_size(h, w, defaults.height * defaults.width, checkpoint.geometry.stride, name)
    notes.append(f"size {fitted[1]}x{fitted[0]}, from {name}'s {w}x{h}")
    return fitted


def _given_size(height: Any, width: Any) -> tuple[int, int] | None:
    if (height is None) != (width is None):
        missing, given = ("width", f"height={height}") if width is None else ("height", f"width={width}")
        raise ValueError(f"{given} without {missing}: give both, or neither")
    return None if height is None else (whole("height", height, 1), whole("width", width, 1))


def check_fit(given: Any, images: list, videos: list[Video]) -> str:
    if given is None:
        return FITS[0]
    if given not in FITS:
        near = difflib.get_close_matches(str(given).lower(), FITS, 1)
        raise ValueError(f"fit={given!r} is not one of {', '.join(FITS)}{f': nearest is {near[0]}' if near else ''}")
    if not videos and all(image is None for image in images):
        raise ValueError(f"fit={given!r} is for images and videos of another shape: give one, or leave it out")
    return given


def tell_stretched(
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


def choose_num_frames(checkpoint: Checkpoint, num_frames: int | None, videos: list[Video]) -> int:
    """As given, else the checkpoint's, or what the shortest video has if that is less."""
    own, geometry = checkpoint.defaults.num_frames, checkpoint.geometry
    if not videos:
        return first_given(num_frames, own)
    shortest = min(videos, key=lambda v: v.num_frames)
    if num_frames is None:
        return geometry.most_frames(min(own, shortest.num_frames))
    if num_frames > shortest.num_frames:
        raise _too_short(geometry, num_frames, f"{_name(shortest)} has {shortest.num_frames}", shortest.num_frames)
    return num_frames


def video_fps(checkpoint: Checkpoint, videos: list[Video], notes: list[str]) -> Number:
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


def take_videos(
    checkpoint: Checkpoint, videos: list[Video], num_frames: int | None, size: tuple[int, int, int], fit: str,
    notes: list[str], read: bool,
) -> tuple[list[Clip], tuple[int, int, int]]:  # fmt: skip
    """(frames of each prompt's video, size of all), shorter than `size` where a video has fewer whole frames than its
    packets promise, which is proved if they are to be read. They are read when they are encoded, but for lists of
    images, of which any may turn out to be none."""
    step, distinct = checkpoint.geometry.temporal, list(dict.fromkeys(videos))
    notes.extend(f"{_name(v)}: {v.colours} is read as sRGB, clipped at its white" for v in distinct if v.colours)
    whole = {video: video.count(size[0]) if read else size[0] for video in distinct}
    shortest = min(distinct, key=lambda video: (whole[video], video.num_frames))
    name, found, total = _name(shortest), whole[shortest], shortest.num_frames
    most = checkpoint.geometry.most_frames(found)
    if found < size[0]:
        if num_frames is not None:
            raise _too_short(checkpoint.geometry, num_frames, f"{name} has {found} whole", found)
        notes.append(f"{most} frames, the largest {step}k+1 in {name}'s {found} whole ones")
    elif num_frames is None and total <= checkpoint.defaults.num_frames:
        notes.append(f"{most} frames, the largest {step}k+1 in {name}'s {total}")
    elif num_frames is None:
        notes.append(f"the first {most} frames of {name}'s {total}, this model's own length: give num_frames for more")
    clips = {video: Clip(video, most, *size[1:], fit) for video in distinct}
    if read:
        clips = {
            video: clip.held() if isinstance(video.source, list | tuple) else clip for video, clip in clips.items()
        }
    return [clips[video] for video in videos], (most, *size[1:])


def clips_of(
    geometry: Geometry, frames: Any, num_frames: int | None, height: int | None, width: int | None, fit: str | None
) -> list[Clip]:
    """Videos that are encoded alone: those of an array (B, F, H, W, 3), or one such as a call takes. What is left out
    is the video's own, and has to fit the VAE; nothing is cut off unless `num_frames` says so."""
    import PIL.Image

    one = isinstance(frames, str | Path)
    one = one or (isinstance(frames, list | tuple) and any(isinstance(frame, PIL.Image.Image) for frame in frames))
    if one:
        videos = [open_video(frames)]
    else:
        videos = [Video("frames", video, *video.shape[:3]) for video in checked_frames(frames)]
    first, fit = videos[0], check_fit(fit, [], videos)
    count = first.num_frames if num_frames is None else whole("num_frames", num_frames, 1)
    if one and num_frames is None and count != (most := geometry.most_frames(count)):
        given = f"{_name(first)} has {count} frames, which is not {geometry.temporal}k+1"
        raise ValueError(f"{given}: give num_frames, {most} at most")
    height, width = first_given(_given_size(height, width), (first.height, first.width))
    geometry.check_size(count, height, width)
    for video in videos:
        video.check_size(height, width)
        if (found := min(video.num_frames, video.count(count))) < count:
            raise _too_short(geometry, count, f"{_name(video)} has {found}", found)
    return [Clip(video, count, height, width, fit) for video in videos]


def _too_short(geometry: Geometry, num_frames: int, has: str, found: int) -> ValueError:
    largest = geometry.most_frames(found)
    return ValueError(f"num_frames={num_frames} but {has} frames: the largest is {largest}")


def check_rope(checkpoint: Checkpoint, num_frames: int, height: int, width: int) -> None:
    grid, most = checkpoint.geometry.token_grid(num_frames, height, width), checkpoint.transformer.rope_max_seq_len
    if max(grid) > most:
        raise ValueError(f"{num_frames}x{height}x{width} is {grid} tokens, and the model counts to {most} on each axis")


def check_pixels(images: list, lasts: list, videos: list[Video], size: tuple[int, int, int]) -> None:
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


def check_latents(checkpoint: Checkpoint, latents: Any, batch: int, size: tuple[int, int, int]) -> np.ndarray | None:
    if latents is None:
        return None
    latents = load_latents(latents) if isinstance(latents, str | Path) else as_array(latents, "latents")
    wanted = (batch, checkpoint.geometry.z_dim, *checkpoint.geometry.latent_shape(*size))
    if latents.shape != wanted or not jnp.issubdtype(latents.dtype, jnp.floating):
        raise ValueError(f"latents are {latents.dtype} of shape {latents.shape}, expected floats of shape {wanted}")
    if not np.isfinite(latents).all():
        raise ValueError("latents hold values that are not finite")
    return latents.astype(np.float32)
