"""Videos in: files, lists of PIL images and arrays to frames, and what their headers say."""

from collections.abc import Sequence
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from jaxwan.pipelines.media.reading import _check_size, _checked, _reading, _upright_rgb, resize_image

# PIL and av are imported where they are used, so their types cannot stand in signatures.
VideoSource = Any  # a path, a sequence of PIL images, or an array (F, H, W, 3): uint8, or float in [0, 1]


def load_video(
    source: VideoSource, what: str = "video", *, max_frames: int | None = None
) -> tuple[UInt8[np.ndarray, "f h w 3"] | Float[np.ndarray, "f h w 3"], Fraction | None]:
    """The first `max_frames` frames (all by default) and, of a file, its frame rate; later frames are not decoded.

    Raises OSError for a file that is missing or unreadable, ValueError for a picture and for frames of another shape,
    depth or range.
    """
    import PIL.Image

    if isinstance(source, str | Path):
        return _read_video(Path(source), what, max_frames)
    if isinstance(source, PIL.Image.Image) or (getattr(source, "ndim", 0) == 3 and source.shape[-1] == 3):
        raise ValueError(f"{what} has shape {np.asarray(source).shape}, must be (F, H, W, 3): give a picture as image")
    if isinstance(source, list | tuple):
        return _stacked(source[:max_frames], what), None
    return _checked(source, ("F", "H", "W", 3), what)[:max_frames], None


def count_frames(source: VideoSource) -> int | None:
    """How many frames `load_video` finds in what it takes, without decoding any; None where a file does not say."""
    import av

    if not isinstance(source, str | Path):
        return len(source)
    with Path(source).open("rb") as file, av.open(file, "r") as container:
        return container.streams.video[0].frames or None


def resize_video(
    frames: UInt8[np.ndarray, "f h w 3"] | Float[np.ndarray, "f h w 3"], height: int, width: int, what: str = "video"
) -> Float[np.ndarray, "f {height} {width} 3"]:
    """`resize_image` of every frame that `load_video` returned."""
    import PIL.Image

    if frames.dtype != np.uint8:
        _check_size(frames.shape[1:3], height, width, what)
        return frames
    return np.stack([resize_image(PIL.Image.fromarray(frame), height, width) for frame in frames])


def _read_video(path: Path, what: str, max_frames: int | None) -> tuple[UInt8[np.ndarray, "f h w 3"], Fraction | None]:
    import av
    import av.error

    reading = _reading(path, what, "video", av.error.InvalidDataError, av.error.FFmpegError)
    # As a file object: of a name, ffmpeg would also take protocols.
    with reading, path.open("rb") as file, av.open(file, "r") as container:
        if not container.streams.video:
            raise ValueError(f"{what} {path} has no video stream")
        stream = container.streams.video[0]
        # ffmpeg's readers of pictures are called png_pipe and the like; a still gif or avif has one frame and no time
        if container.format.name.endswith("_pipe") or (stream.frames == 1 and not stream.duration):
            raise ValueError(f"{what} {path} is a picture: give it as image")
        frames = [_upright(frame) for frame in islice(container.decode(stream), max_frames)]
        rate = stream.average_rate or stream.guessed_rate
    if not frames:
        raise ValueError(f"{what} {path} has no frames")
    return np.stack(frames), Fraction(rate.numerator, rate.denominator) if rate else None  # av 19 has a type of its own


def _upright(frame: Any) -> UInt8[np.ndarray, "h w 3"]:
    return np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90))


def _stacked(images: Sequence[Any], what: str) -> UInt8[np.ndarray, "f h w 3"]:
    import PIL.Image

    for i, image in enumerate(images):
        if not isinstance(image, PIL.Image.Image):
            raise ValueError(f"frame {i} of {what} is a {type(image).__name__}; a sequence must hold PIL images only")
    sizes = {image.size for image in images}
    if len(sizes) != 1:
        raise ValueError(f"the frames of {what} must have one size, got {sorted(sizes) or 'no frames'}")
    return np.stack([np.asarray(_upright_rgb(image, f"frame {i} of {what}")) for i, image in enumerate(images)])
