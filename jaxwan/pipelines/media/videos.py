"""Videos in: files, lists of PIL images and arrays to frames, as a player shows them.

A file is opened first, which tells its size, rate and length from its packets and first frame. `Video.count` proves how
many frames decode, and keeps none; a `Clip` gives them group by group, each frame brought to its size before the next.
Colours and orientation are those of the ffmpeg command; that pixels need not be square and that HDR is brighter than
white, ffmpeg leaves to the player.
"""

from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cache
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from jaxwan.pipelines.arguments import as_array, local_path
from jaxwan.pipelines.media.pictures import upright_rgb
from jaxwan.pipelines.media.reading import _check_size, _checked, _reading, fit_image
from jaxwan.pipelines.telling import warn

# PIL and av are imported where they are used, so their types cannot stand in signatures.
VideoSource = Any  # a path, a sequence of PIL images, or an array (F, H, W, 3): uint8, or float in [0, 1]
Frames = UInt8[np.ndarray, "f h w 3"] | Float[np.ndarray, "f h w 3"]

_REORDERED = 32  # packets that a frame may come later than those shown after it, 16 in H.264 and HEVC


@dataclass(frozen=True, eq=False)
class Video:
    """A source video that is open and not yet read; `open_video` makes it.

    what: its name in messages. source: a path, PIL images, or a uint8 or float array, which stays the caller's.
    num_frames: as many as its packets promise; fewer where some are damaged. height, width: as shown. fps: of a file.
    header_fps: what its header says where that is wrong. colours: what they are converted from, such as "HDR (HLG)".
    """

    what: str
    source: VideoSource
    num_frames: int
    height: int
    width: int
    fps: Fraction | None = None
    header_fps: Fraction | None = None
    colours: str | None = None
    orientation: tuple[bool, int, int] = (False, 1, 1)  # `_orientation` of its first frame
    ends_early: bool = False  # and was told so
    stamp: tuple[int, ...] | None = None  # `_stamp` of a file

    def count(self, most: int) -> int:
        """How many of its first `most` frames there are: a file is decoded for that, and no frame is kept.

        What is damaged is left out, with a warning. Raises OSError for a file that became unreadable.
        """
        if not isinstance(self.source, Path):
            return min(most, self.num_frames)
        faults: list[Any] = []
        with self._opened() as (container, stream):
            found = sum(1 for _ in islice(_frames(container, stream, faults), most))
        self._tell(faults)
        return found

    def read(
        self, count: int | None = None, height: int | None = None, width: int | None = None, fit: str = "stretch"
    ) -> Frames:
        """The first `count` frames (all by default), or as many as there are, brought to a size (as shown by default)
        as `fit_image` does; later ones are not decoded. Floats are float32.

        What is damaged is left out, with a warning. Raises OSError for a file that became unreadable, ValueError for a
        float array of another size.
        """
        faults: list[Any] = []
        frames = np.stack(list(islice(self.frames(height, width, fit, faults), count)))
        self._tell(faults)
        return frames if frames.dtype == np.uint8 else frames.astype(np.float32, copy=False)

    def frames(
        self, height: int | None = None, width: int | None = None, fit: str = "stretch", faults: list[Any] | None = None
    ) -> Iterator[np.ndarray]:
        """What `read` returns, one after the other and without warnings: `faults` is told of what is damaged. Of an
        array of that size they are views."""
        height, width = height or self.height, width or self.width
        self.check_size(height, width)
        if self.is_array_of(height, width):
            yield from self.source
            return
        aspect = self.width / self.height
        for image in self._images([] if faults is None else faults):
            yield np.asarray(fit_image(image, height, width, fit, aspect))

    def is_array_of(self, height: int, width: int) -> bool:
        """Whether its frames are there, in this size."""
        return isinstance(self.source, np.ndarray) and (self.height, self.width) == (height, width)

    def check_size(self, height: int, width: int) -> None:
        """Raises ValueError if it is a float array of another size."""
        if isinstance(self.source, np.ndarray) and self.source.dtype != np.uint8:
            _check_size((self.height, self.width), height, width, self.what)

    @contextmanager
    def _opened(self) -> Iterator[tuple[Any, Any]]:
        """Its file, open again. Raises OSError for one that is not as it was: its frames would be taken for those that
        were checked, however many there are."""
        if _stamp(self.source) not in (None, self.stamp):
            raise OSError(f"{self.what} {self.source} was changed after it was opened: let it be until it is encoded")
        with _opened(self.source, self.what) as opened:
            yield opened

    def _tell(self, faults: list[Any]) -> None:
        if faults and not self.ends_early:
            warn(f"{self.what} {self.source} is damaged: frames lost or faulty: {len(faults)}")

    def _images(self, faults: list[Any]) -> Iterator[Any]:
        """PIL images in RGB, upright, with the pixels that the source has; `faults` is told of what is damaged."""
        import PIL.Image

        if isinstance(self.source, Path):
            with self._opened() as (container, stream):
                for frame in _frames(container, stream, faults):
                    image = PIL.Image.fromarray(_shown(frame, *self.orientation))
                    yield image if image.mode == "RGB" else upright_rgb(image, self.what)
        elif isinstance(self.source, np.ndarray):
            yield from map(PIL.Image.fromarray, self.source)
        else:
            yield from (
                upright_rgb(image, f"frame {i} of {self.what}", f"a frame of {self.what}")
                for i, image in enumerate(self.source)
            )


@dataclass(frozen=True, eq=False)
class Clip:
    """The frames of a video that a call takes, in its size. They are read when they are gone through, which can be done
    again: a file is decoded from its beginning, an array is looked at as it is then."""

    video: Video
    num_frames: int
    height: int
    width: int
    fit: str = "stretch"

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Of all frames, as one array."""
        return self.num_frames, self.height, self.width, 3

    def groups(self, step: int) -> Iterator[Frames]:
        """The first frame, and then `step` at a time.

        Raises OSError for a file that has fewer frames than it had, or cannot be read any more.
        """
        with closing(self.video.frames(self.height, self.width, self.fit)) as frames:
            for start in (0, *range(1, self.num_frames, step)):
                count = min(step, self.num_frames - start) if start else 1
                group = list(islice(frames, count))
                if len(group) < count:
                    name = f"{self.video.what} {self.video.source}"
                    found = f"{self.num_frames} frames when it was opened, and has {start + len(group)} now"
                    raise OSError(f"{name} had {found}: it was changed or damaged meanwhile")
                yield np.stack(group)

    def read(self) -> Frames:
        """All of them."""
        frames = np.empty(self.shape, getattr(self.video.source, "dtype", np.uint8))
        for i, group in enumerate(self.groups(1)):
            frames[i : i + 1] = group
        return frames

    def held(self) -> "Clip":
        """The same, of an array: bytes in its size, unless it is an array already."""
        if self.video.is_array_of(self.height, self.width):
            return self
        return replace(self, video=Video(self.video.what, self.read(), *self.shape[:3]))


def open_video(source: VideoSource, what: str = "video", *, most: int | None = None) -> Video:
    """A video of which `most` frames are to be read (all by default).

    Raises OSError for a file that is missing or unreadable, ValueError for a picture, for a song with a cover, and for
    frames of another shape, depth or range. Warns of a file that ends before it should.
    """
    import PIL.Image

    if isinstance(source, str | Path):
        return _open_file(local_path(source, what), what, most)
    if isinstance(source, PIL.Image.Image) or (getattr(source, "ndim", 0) == 3 and source.shape[-1] == 3):
        raise ValueError(
            f"{what} has shape {as_array(source, what).shape}, must be (F, H, W, 3): give a picture as image"
        )
    if isinstance(source, list | tuple):
        width, height = _one_size(source[:most], what)
        return Video(what, source, len(source), height, width)
    pixels = _checked(source[:most] if getattr(source, "ndim", 0) else source, ("F", "H", "W", 3), what)
    return Video(what, pixels, len(source), *pixels.shape[1:3])


def load_video(
    source: VideoSource, what: str = "video", *, max_frames: int | None = None
) -> tuple[Frames, Fraction | None]:
    """The first `max_frames` frames (all by default) and, of a file, its frame rate; later frames are not decoded.

    As players show them: upright, with square pixels, and HDR as sRGB. Raises as `open_video` does.
    """
    video = open_video(source, what, most=max_frames)
    return video.read(max_frames), video.fps


def _one_size(images: Sequence[Any], what: str) -> tuple[int, int]:
    """(width, height) of PIL images that are proved to be alike."""
    import PIL.Image

    for i, image in enumerate(images):
        if not isinstance(image, PIL.Image.Image):
            raise ValueError(f"frame {i} of {what} is a {type(image).__name__}; a sequence must hold PIL images only")
    sizes = {image.size for image in images}
    if len(sizes) != 1:
        raise ValueError(f"the frames of {what} must have one size, got {sorted(sizes) or 'no frames'}")
    return upright_rgb(images[0], f"frame 0 of {what}", f"a frame of {what}").size


# Files


def _open_file(path: Path, what: str, most: int | None) -> Video:
    stamp = _stamp(path)
    with _opened(path, what) as (container, stream):
        # ffmpeg's readers of pictures are called png_pipe and the like; a still gif or avif has one frame and no time
        if container.format.name.endswith("_pipe") or (stream.frames == 1 and not stream.duration):
            raise ValueError(f"{what} {path} is a picture: give it as image")
        times, total, missing = _timed(container, stream, most)
        rate, aspect = stream.average_rate or stream.guessed_rate, float(stream.sample_aspect_ratio or 1)
    with _opened(path, what) as (container, stream):
        first = next(_frames(container, stream, []), None)
    if first is None:
        raise OSError(f"{what} {path} is no readable video (damaged, or of an unknown format)")
    header = Fraction(rate.numerator, rate.denominator) if rate else None  # av 19 has a type of its own
    fps = _average(times[:most], header)
    ends_early = fps is not None and missing > 1.2 / fps  # ASF counts a frame too many
    if ends_early:
        warn(f"{what} {path} ends early: {missing:.2g} s that its header promises are missing")
    # pixels that are not square make the picture wider or higher, so that none is lost
    height, width = round(first.height / min(aspect, 1)), round(first.width * max(aspect, 1))
    orientation = _orientation(first)
    if orientation[0]:
        height, width = width, height
    lying = None if fps == header else header
    return Video(what, path, total, height, width, fps, lying, _colours(first), orientation, ends_early, stamp)


def _stamp(path: Path) -> tuple[int, ...] | None:
    """What of a file changes when it is written again or replaced; None of one that is gone."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


@contextmanager
def _opened(path: Path, what: str) -> Iterator[tuple[Any, Any]]:
    """An open file and its video stream; what fails while it is read is an OSError that names it."""
    import av
    import av.error
    from av.stream import Disposition

    reading = _reading(path, what, "video", av.error.InvalidDataError, av.error.FFmpegError)
    # As a file object: of a name, ffmpeg would also take protocols. Its tags may be in any encoding.
    with reading, path.open("rb") as file, av.open(file, "r", metadata_errors="replace") as container:
        streams = [stream for stream in container.streams.video if not stream.disposition & Disposition.attached_pic]
        if not streams:
            cover = " but a cover picture" if container.streams.video else ""
            cover = cover or " that can be read: is it cut or damaged?" * (not container.streams.audio)
            raise ValueError(f"{what} {path} has no video stream{cover}")
        if streams[0].codec_context is None:
            raise OSError("its codec is unknown")
        yield container, streams[0]


def _timed(container: Any, stream: Any, most: int | None) -> tuple[list[float], int, float]:
    """(times of the first frames in seconds, number of all frames, seconds missing at the end), from packets alone.

    Where the header has the number, no more packets are read than the first `most` frames take.
    """
    import av

    own = stream.duration is not None
    lasts = float(stream.duration * stream.time_base) if own else (container.duration or 0) / av.time_base
    times, total, end, vp8 = [], 0, 0.0, stream.codec_context.codec.canonical_name == "vp8"
    for packet in _packets(container, stream if own else None):
        time = packet.dts if packet.pts is None else packet.pts
        if time is not None:
            end = max(end, float((time + (packet.duration or 0)) * packet.time_base))
        hidden = vp8 and not memoryview(packet)[0] & 16  # of a frame that others refer to: RFC 6386, 9.1
        if packet.stream.index != stream.index or packet.is_discard or hidden:
            continue
        total += 1
        if time is not None:
            times.append(float(time * packet.time_base))
        if stream.frames and most is not None and total == most + _REORDERED:
            return sorted(times), stream.frames, 0.0
    return sorted(times), total, lasts - end


def _average(times: Sequence[float], header: Fraction | None) -> Fraction | None:
    """Frames a second of frames shown at `times`: the header's, unless it is off by half a frame."""
    gaps = len(times) - 1
    span = times[-1] - times[0] if times else 0.0
    if not span or (header and abs(span - gaps / header) < 0.5 / header):
        return header
    return Fraction(gaps / span).limit_denominator(1001) or header


def _frames(container: Any, stream: Any, faults: list[Any]) -> Iterator[Any]:
    """What decodes, as the ffmpeg command gives it, of a damaged file too; `faults` is told of what is damaged."""
    import av.error

    for packet in chain(_packets(container, stream), [None]):  # None: the decoder gives what it holds
        try:
            frames = stream.decode(packet)
        except av.error.FFmpegError as error:
            faults.append(error)
            continue
        faults.extend("corrupt" for frame in frames if frame.is_corrupt)
        yield from frames


def _packets(container: Any, stream: Any = None) -> Iterator[Any]:
    """Packets of a stream, or of all, up to where the file ends or cannot be understood any more."""
    import av.error

    with suppress(av.error.FFmpegError):
        yield from (packet for packet in container.demux(*[stream] * (stream is not None)) if packet.size)


# Frames


def _shown(frame: Any, transposed: bool, rows: int, columns: int) -> UInt8[np.ndarray, "h w _"]:
    """Pixels as they are to be shown, but for the aspect ratio of one; with transparency where a file has any."""
    alpha = any(component.is_alpha for component in frame.format.components)
    pixels = _to_srgb(frame) if _colours(frame) else frame.to_ndarray(format="rgba" if alpha else "rgb24")
    return (pixels.transpose(1, 0, 2) if transposed else pixels)[::rows, ::columns]


def _orientation(frame: Any) -> tuple[bool, int, int]:
    """(whether x and y change places, steps along the rows and along the columns then, 1 or -1) by its display matrix.

    The matrix takes a pixel's (x, y, 1) to where it is shown. To be asked of one frame alone: `side_data` keeps a frame
    alive until Python looks for cycles.
    Source: ffmpeg libavutil/display.h; its command line turns and mirrors alike.
    """
    from av.sidedata.sidedata import Type

    data = frame.side_data.get(Type.DISPLAYMATRIX)
    if data is None:
        return False, 1, 1
    matrix = np.frombuffer(data, np.int32).reshape(3, 3)[:2, :2]
    transposed = bool(abs(matrix[0, 1]) > abs(matrix[0, 0]))
    x, y = (matrix[1, 0], matrix[0, 1]) if transposed else (matrix[0, 0], matrix[1, 1])
    return transposed, -1 if y < 0 else 1, -1 if x < 0 else 1


# Colours beyond BT.709's

_PQ, _HLG = 16, 18  # transfers, as ITU-T H.273 numbers them
_BT709, _BT2020 = 1, 9  # primaries
_WHITE, _PEAK = 203, 1000  # nits, of diffuse white in HDR (ITU-R BT.2408) and of the display that HLG is made for
_LUMINANCE = np.array([0.2627, 0.6780, 0.0593], np.float32)  # of BT.2020's red, green and blue
_TO_BT709 = np.array(
    [[1.6605, -0.5876, -0.0728], [-0.1246, 1.1329, -0.0083], [-0.0182, -0.1006, 1.1187]], np.float32
)  # of light, ITU-R BT.2087


def _colours(frame: Any) -> str | None:
    """What `_to_srgb` is needed for."""
    hdr = {_PQ: "HDR (PQ)", _HLG: "HDR (HLG)"}.get(frame.color_trc)
    return hdr or ("BT.2020" if frame.color_primaries == _BT2020 else None)


def _to_srgb(frame: Any) -> UInt8[np.ndarray, "h w 3"]:
    """HDR or BT.2020 with diffuse white as white; what is brighter, or out of BT.709's gamut, is clipped."""
    light = _light(frame.color_trc)[frame.to_ndarray(format="gbrp16le")]  # rgb48le has wrong rows in ffmpeg 8.0
    if frame.color_trc == _HLG:  # a display's gamma, of luminance alone
        light *= (light @ _LUMINANCE)[..., None] ** 0.2 * (_PEAK / _WHITE)
    if frame.color_primaries != _BT709:
        light = light @ _TO_BT709.T
    return _srgb()[(light.clip(0, 1) * 65535 + 0.5).astype(np.uint16)]


@cache
def _light(transfer: int) -> Float[np.ndarray, " 65536"]:
    """Light, 1 at diffuse white, of each 16-bit code; of HLG the scene's, 1 at its peak. Source: ITU-R BT.2100."""
    code = np.arange(65536) / 65535
    if transfer == _PQ:
        root = code ** (32 / 2523)
        light = (
            10000 / _WHITE * (np.maximum(root - 3424 / 4096, 0) / (2413 / 128 - 2392 / 128 * root)) ** (16384 / 2610)
        )
    elif transfer == _HLG:
        light = np.where(code <= 0.5, code**2 / 3, (np.exp((code - 0.55991073) / 0.17883277) + 0.28466892) / 12)
    else:
        light = np.where(code <= 0.04045, code / 12.92, ((code + 0.055) / 1.055) ** 2.4)
    return light.astype(np.float32)


@cache
def _srgb() -> UInt8[np.ndarray, " 65536"]:
    """sRGB of light in 16 bits. Source: IEC 61966-2-1."""
    light = np.arange(65536) / 65535
    code = np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)
    return (255 * code).round().astype(np.uint8)
