"""Images and videos out: frames to mp4, webm, gif or png, under a temporary name until all is written."""

import io
import math
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

import numpy as np
from jaxtyping import UInt8

from jaxwan.pipelines.arguments import as_array, output_path
from jaxwan.pipelines.ending import leaving_nothing_half
from jaxwan.pipelines.media.reading import check_pixels
from jaxwan.pipelines.telling import warn


def to_uint8(frames: Any, what: str = "frames") -> UInt8[np.ndarray, "..."]:
    """Float pixels in [0, 1] as 8-bit ones, rounded to nearest; uint8 stays. ValueError outside the range, or NaN.

    Source: diffusers image_processor.py:VaeImageProcessor.numpy_to_pil.
    """
    frames = as_array(frames, what)
    if frames.dtype == np.uint8:
        return frames
    check_pixels(frames, what)
    return (frames * 255).round().astype(np.uint8)


# How videos are compressed

X264_PRESETS = ("ultrafast", "superfast", "veryfast", "faster", "fast", "medium", "slow", "slower", "veryslow")


class _Format(NamedTuple):
    """A kind of file that PyAV writes. crf: the eye sees no loss. options: of the codec, and of the file."""

    codec: str
    crf: int
    most: int  # crf
    options: dict[str, str]
    file_options: dict[str, str]


# superfast: as good and within 5 % as large as medium at the same crf, for a fifth of its time. With mbtree, x264's
# assembly gives small frames other bits in one run of thirty. Without lag-in-frames VP9 has no frame left to encode at
# the end. bitexact: Matroska would number the file at random.
_FORMATS = {
    ".mp4": _Format("libx264", 18, 51, {"preset": "superfast", "mbtree": "0"}, {"movflags": "+faststart"}),
    ".webm": _Format(
        "libvpx-vp9", 15, 63,
        {"b": "0", "deadline": "realtime", "cpu-used": "8", "lag-in-frames": "0", "row-mt": "1", "threads": "8",
         "tile-columns": "2"},
        {"fflags": "+bitexact"},
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Compression:
    """What is to be lost of a video, and at what speed.

    crf: from 1, the best and largest, to 51 in mp4 (18 by default) and 63 in webm (15). x264_preset: of mp4, one of
    X264_PRESETS, "superfast" by default: slower ones make smaller files.
    """

    crf: int | None = None
    x264_preset: str | None = None

    def check(self, path: Path) -> None:
        """Raises ValueError for what a file of this suffix does not take."""
        form = _FORMATS.get(path.suffix.lower())
        if self.crf is not None:
            if form is None:
                raise ValueError(f"crf={self.crf} is for mp4 and webm, and {path} is neither")
            if isinstance(self.crf, bool) or not isinstance(self.crf, int) or not 1 <= self.crf <= form.most:
                raise ValueError(f"crf={self.crf!r} must be a whole number from 1 to {form.most} for {path}")
        if self.x264_preset is not None:
            if path.suffix.lower() != ".mp4":
                raise ValueError(f"x264_preset={self.x264_preset} is for mp4, and {path} is none")
            if self.x264_preset not in X264_PRESETS:
                raise ValueError(f"x264_preset={self.x264_preset!r} is not one of {', '.join(X264_PRESETS)}")

    def options(self, form: _Format) -> dict[str, str]:
        """Of the codec."""
        preset = {"preset": self.x264_preset} if self.x264_preset is not None else {}
        return form.options | {"crf": str(self.crf or form.crf)} | preset


AS_USUAL = Compression()


def can_encode(suffix: str) -> bool:
    """Whether the installed PyAV was built with what makes such files."""
    import av

    form = _FORMATS.get(suffix)
    return form is None or form.codec in av.codecs_available


# Files


def check_output(
    path: str | Path, num_frames: int, overwrite: bool = True, compression: Compression = AS_USUAL
) -> Path:
    """Prove that `num_frames` frames can be saved as `path`, before anything costly, leaving nothing behind.

    Raises ValueError for a suffix that is not .mp4, .webm or .gif (or .png, for one frame) or another compression than
    it takes, OSError where nothing can be written, or a file is that is not to be replaced.
    """
    path = output_path(path)
    allowed = [".mp4", ".webm", ".gif"] + [".png"] * (num_frames == 1)
    if path.suffix.lower() not in allowed:
        raise ValueError(f"output {path} must end in {' or '.join(allowed)} for {num_frames} frame(s)")
    compression.check(path)
    if not can_encode(path.suffix.lower()):
        codec = _FORMATS[path.suffix.lower()].codec
        raise OSError(f"the installed av package cannot encode {path.suffix}: it was built without {codec}")
    return check_writable(path, overwrite)


def check_writable(path: str | Path, overwrite: bool = True) -> Path:
    """Prove that a file can be written as `path`, whose folder may have to be made first. Raises OSError."""
    path = output_path(path)
    if (length := len(os.fsencode(path.name))) > 255:
        raise OSError(f"output {path.name[:40]}… has a name of {length} bytes: file systems take 255")
    if path.is_dir():
        raise IsADirectoryError(f"output {path} is a folder")
    if path.exists() and not path.is_file():
        raise OSError(f"output {path} is no regular file, and would be replaced by one")
    if not overwrite and path.exists():
        raise FileExistsError(f"output {path} exists: choose another name, or say --overwrite (overwrite=True)")
    existing = next(folder for folder in path.absolute().parents if folder.exists())
    try:
        (existing / path.name).exists()  # raises for a name that is too long
        with tempfile.TemporaryFile(dir=existing):
            return path
    except OSError as error:
        raise OSError(f"output folder {existing} cannot be written ({error.strerror})") from error


def save_output(
    frames: Any,
    path: str | Path,
    fps: int | float | Fraction,
    metadata: Mapping[str, str] | None = None,
    overwrite: bool = True,
    compression: Compression = AS_USUAL,
) -> None:
    """Write frames (F, H, W, 3) as what the suffix of `path` says (`check_output`), with texts such as a title."""
    tell_frames_left_out(Path(path), len(frames), fps)
    write_output(frames, path, fps, metadata, overwrite, compression)


def write_output(
    frames: Any,
    path: str | Path,
    fps: int | float | Fraction,
    metadata: Mapping[str, str] | None = None,
    overwrite: bool = True,
    compression: Compression = AS_USUAL,
) -> None:
    """`save_output` of an iterable with a length, in any thread: frames that a gif leaves out are not told."""
    suffix = Path(path).suffix.lower()
    with replacing(Path(path), overwrite) as temporary:
        if suffix == ".png":
            (frame,) = frames
            save_image(frame, temporary, metadata)
        elif suffix == ".gif":
            save_gif(frames, temporary, fps, metadata)
        else:
            _encode(frames, temporary, fps, metadata, suffix, compression)


def tell_frames_left_out(path: Path, count: int, fps: int | float | Fraction) -> None:
    """Warn of frames for which a gif has no time."""
    if path.suffix.lower() == ".gif" and count and len(shown := _gif_times(count, fps)[0]) < count:
        rate = f"{len(shown)} of {count} frames are kept, which last as long"
        warn(f"a gif has at most 50 frames a second, not {float(fps):g}: {rate}")


def save_image(frame: Any, path: str | Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write one frame (H, W, 3), uint8 or float in [0, 1], as png; an existing file is replaced once all is written."""
    import PIL.Image
    from PIL.PngImagePlugin import PngInfo

    texts = PngInfo()
    for key, text in (metadata or {}).items():
        texts.add_itxt(key.capitalize(), text)  # PNG's own keywords are Title, Comment, …
    with replacing(Path(path)) as temporary:
        PIL.Image.fromarray(to_uint8(frame)).save(temporary, format="PNG", pnginfo=texts)


def save_gif(
    frames: Any, path: str | Path, fps: int | float | Fraction, metadata: Mapping[str, str] | None = None
) -> None:
    """Write frames (F, H, W, 3), or an iterable of (H, W, 3) with a length, uint8 or float in [0, 1], as a gif that
    repeats: 256 colours a frame, and no more than 50 frames a second. Of the metadata it takes the comment. An existing
    file is replaced once all is written. However many frames there are, no more than three are kept."""
    if not len(frames):
        raise ValueError(f"there are no frames to save as {path}")
    pictures, comment = _gif_pictures(frames, fps), (metadata or {}).get("comment", "").encode()
    with replacing(Path(path)) as temporary, open(temporary, "wb") as file:
        before = next(pictures)
        data = _small_gif([before], comment)
        for picture in pictures:
            # PIL would keep all of them; a picture is written by what it differs in from the one before alone
            pair = _small_gif([before, picture], comment)
            second = _second_picture(pair)
            file.write(data[:-1] if file.tell() else pair[:second])
            data, before = pair[second:], picture
        file.write(data)


def _gif_pictures(frames: Any, fps: int | float | Fraction) -> Iterator[tuple[Any, int]]:
    """(PIL image of 256 colours, for how many milliseconds it is shown); equal ones in turn are one."""
    import PIL.Image

    delays = dict(zip(*_gif_times(len(frames), fps), strict=True))
    last, lasts = None, 0
    for i, frame in enumerate(_on_host(frames)):
        if i not in delays:
            continue
        image = PIL.Image.fromarray(to_uint8(frame, f"frame {i}")).quantize(dither=PIL.Image.Dither.NONE)
        if last is not None and image.convert("RGB").tobytes() != last.convert("RGB").tobytes():
            yield last, lasts
            lasts = 0
        last, lasts = image, lasts + delays[i]
    yield last, lasts


def _small_gif(pictures: Sequence[tuple[Any, int]], comment: bytes) -> bytes:
    """A whole file, of one or two pictures with their milliseconds."""
    images, delays = zip(*pictures, strict=True)
    file = io.BytesIO()
    images[0].save(
        file, format="GIF", save_all=True, append_images=images[1:], duration=list(delays), loop=0, comment=comment
    )
    return file.getvalue()


def _second_picture(gif: bytes) -> int:
    """Where what belongs to the second picture of a file begins. Source: GIF89a, 17 to 24."""

    def table(flags: int) -> int:
        return 3 << (flags & 7) + 1 if flags & 128 else 0

    at, is_picture = 13 + table(gif[10]), False
    while not is_picture:
        is_picture = gif[at] == ord(",")  # other blocks begin with !
        at += 11 + table(gif[at + 9]) if is_picture else 2
        while gif[at]:
            at += 1 + gif[at]
        at += 1
    return at


def save_video(
    frames: Iterable[Any], path: str | Path, fps: int | float | Fraction, metadata: Mapping[str, str] | None = None,
    *, crf: int | None = None, x264_preset: str | None = None,
) -> None:  # fmt: skip
    """Write the frames of one video (F, H, W, 3), or any iterable of (H, W, 3), uint8 or float in [0, 1], as .mp4,
    .webm or .gif. An existing file is replaced, once all is written.

    mp4 is H.264 and webm VP9; both 8 bit 4:2:0, limited range, BT.709, and mp4 with its index in front: what browsers
    play while loading. crf, x264_preset: their quality and speed (`Compression`).

    Raises ValueError for another suffix, no frames, frames of several or odd sizes, or fps that is not positive.
    """
    path, compression = output_path(path), Compression(crf, x264_preset)
    suffix = path.suffix.lower()
    if suffix not in (*_FORMATS, ".gif"):
        raise ValueError(f"output {path} must end in .mp4, .webm or .gif")
    compression.check(path)
    if suffix == ".gif":
        frames = frames if hasattr(frames, "__len__") else list(frames)
        tell_frames_left_out(path, len(frames), fps)
        save_gif(frames, path, fps, metadata)
    else:
        _encode(frames, path, fps, metadata, suffix, compression)


def _encode(
    frames: Iterable[Any], path: Path, fps: int | float | Fraction, metadata: Mapping[str, str] | None, suffix: str,
    compression: Compression,
) -> None:  # fmt: skip
    """Write an mp4 or webm, frame by frame."""
    import av

    _check_fps(fps)
    rate = Fraction(fps).limit_denominator(1001)  # 23.976 and 30000/1001 stay what they are
    form = _FORMATS[suffix]
    with (
        replacing(path) as temporary,
        av.open(f"file:{temporary}", "w", format=suffix[1:], options=form.file_options) as file,
    ):
        file.metadata.update(metadata or {})
        stream = None
        for i, frame in enumerate(_on_host(frames)):
            pixels = to_uint8(frame, f"frame {i}")
            if stream is None:
                stream = _stream(file, form.codec, compression.options(form), rate, pixels.shape)
            if pixels.shape != (stream.height, stream.width, 3):
                raise ValueError(f"frame {i} has shape {pixels.shape}, frame 0 is {stream.height} x {stream.width}")
            file.mux(stream.encode(_yuv_frame(pixels, i, rate)))
        if stream is None:
            raise ValueError(f"there are no frames to save as {path}")
        file.mux(stream.encode())


def save_npz(path: str | Path, *, overwrite: bool = True, **arrays: np.ndarray) -> None:
    """Write named arrays as .npz; an existing file is replaced once all is written, or kept (FileExistsError)."""
    with replacing(Path(path), overwrite) as temporary, open(temporary, "wb") as file:
        np.savez(file, **arrays)


def _check_fps(fps: int | float | Fraction) -> None:
    if isinstance(fps, bool) or not isinstance(fps, int | float | Fraction | np.number) or not 0 < fps < math.inf:
        raise ValueError(f"fps={fps!r} must be a positive number")


def _gif_times(count: int, fps: int | float | Fraction) -> tuple[list[int], list[int]]:
    """(which of `count` frames a gif shows, for how many milliseconds each).

    Files count hundredths of a second, and browsers play delays below two of them as ten: delays differ so that their
    sum is right, and frames are left out where there are too many.

    60 fps: 12 frames are 0.2 s and become 10: 0, 1, 2, 3, 4, 6, …, 20 ms each. 24 fps: 40, 40, 40, 50, 40, 40, …
    """
    _check_fps(fps)
    total = max(2, round(100 * count / fps))
    kept = min(count, total // 2)
    ends = [round(total * i / kept) for i in range(kept + 1)]
    return [i * count // kept for i in range(kept)], [10 * (b - a) for a, b in zip(ends, ends[1:], strict=False)]


def _on_host(frames: Iterable[Any]) -> Iterable[Any]:
    """A device array is fetched once and not frame by frame."""
    return as_array(frames, "frames") if hasattr(frames, "__array__") else frames


def _stream(file: Any, codec: str, options: dict[str, str], rate: Fraction, shape: tuple[int, ...]) -> Any:
    from av.video.reformatter import ColorRange, Colorspace

    if len(shape) == 4:
        raise ValueError(f"a frame has shape {shape}: give the frames of one video, such as output.frames[0]")
    if len(shape) != 3 or shape[2] != 3 or shape[0] % 2 or shape[1] % 2:
        raise ValueError(f"frames have shape {shape}, a video file needs (H, W, 3) with even H and W")
    stream = file.add_stream(codec, rate=rate, options=options)
    stream.height, stream.width, stream.pix_fmt = shape[0], shape[1], "yuv420p"
    context = stream.codec_context
    context.color_range, context.colorspace = ColorRange.MPEG, Colorspace.ITU709
    context.color_primaries = context.color_trc = 1  # ffmpeg's number of BT.709, for both
    return stream


def _yuv_frame(pixels: UInt8[np.ndarray, "h w 3"], index: int, rate: Fraction) -> Any:
    import av
    from av.video.reformatter import ColorRange, Colorspace

    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
    frame = frame.reformat(format="yuv420p", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG)
    frame.pts, frame.time_base = index, 1 / rate
    return frame


@contextmanager
def replacing(path: Path, overwrite: bool = True) -> Iterator[Path]:
    """A new name in the folder of `path`; what is written there becomes `path` on success and vanishes on failure, also
    where `end_on_signals` ends the process. With overwrite=False a file that has come to be there meanwhile is kept.

    Raises OSError that names `path`: FileExistsError and the like.
    """
    temporary = path.with_name(f".{uuid4().hex[:12]}.tmp")  # short: a name as long as the file system allows must do
    _under_way.add(temporary)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        if not overwrite:
            path.touch(exist_ok=False)  # one of two processes is the first
        os.replace(temporary, path)
    except OSError as error:
        if error.errno is not None and error.filename in (None, str(temporary), f"file:{temporary}"):
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    finally:
        with suppress(OSError):  # the folder may be what is gone
            temporary.unlink()
        _under_way.discard(temporary)


_under_way: set[Path] = set()  # temporary files


def _remove_under_way() -> None:
    for temporary in list(_under_way):
        with suppress(OSError):
            temporary.unlink()


leaving_nothing_half.append(_remove_under_way)
