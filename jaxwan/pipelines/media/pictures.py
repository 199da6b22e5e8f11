"""Pictures as viewers show them: files opened in spite of broken metadata, and their pixels upright and in sRGB.

Metadata is what anyone may have written, and PIL's readers raise whatever that leads them to: hence `except Exception`.
"""

import io
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from jaxwan.config import GIT_LFS_POINTER
from jaxwan.pipelines.telling import warn

# PIL is imported where it is used, so its types cannot stand in signatures.
_HEIC = "heic heix heim heis hevc hevx mif1 msf1".split()  # brands; the last two also of AVIF, which PIL reads
_VIDEOS = b"ftypiso", b"ftypmp4", b"ftypqt", b"ftypM4V", b"ftyp3gp", b"ftypavc1", b"ftypdash"
_RAW = ".dng .nef .cr2 .cr3 .crw .arw .raf .orf .rw2 .pef .srw".split()


def what_else(path: Path) -> str | None:
    """What a file is in place of a picture or video, by its first bytes, and what to do about it."""
    try:
        with path.open("rb") as file:
            head = file.read(512)
    except OSError:
        return None
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if not head:
        return "it is empty"
    if head.startswith(GIT_LFS_POINTER):
        return "it is a git-lfs pointer: fetch the file itself, by `git lfs pull`"
    if text.startswith((b"<!doctype html", b"<html", b"<head")):
        return "it is a web page: download the file itself"
    if text.startswith((b"<svg", b"<?xml")) and b"<svg" in text:
        return "it is a drawing, SVG: export it as png"
    if head.startswith((b"\xff\x0a", b"\0\0\0\x0cJXL ")):
        return "it is JPEG XL: convert it to png or jpeg"
    return None


def open_picture(path: Path, what: str) -> Any:
    """A PIL image whose pixels are all there. Metadata that keeps PIL from reading it is left out, with a warning.

    Raises whatever PIL raises, and OSError for what it would not read, or only the preview of.
    """
    import PIL.Image

    with path.open("rb") as file:
        head = file.read(64)
        if head[4:].startswith(_VIDEOS) or head.startswith(b"\x1aE\xdf\xa3") or head[8:12] == b"AVI ":
            raise OSError("it is a video: give a picture, such as one of its frames")
        if path.suffix.lower() in _RAW:
            raise OSError("it is a camera's RAW file: develop it to png or jpeg")
        if head[4:8] == b"ftyp" and head[8:12].decode("latin-1") in _HEIC and b"avif" not in head:
            _read_heic()
        file.seek(0)
        try:
            with warnings.catch_warnings(record=True) as told:  # which name no file
                warnings.simplefilter("always")
                image = PIL.Image.open(file)
                image.load()
            for text in dict.fromkeys(str(warning.message).strip() for warning in told):
                reason = " has broken EXIF metadata, which is left aside" if "EXIF" in text else f": {text}"
                warn(f"{what} {path}{reason}")
            return image
        except Exception:
            file.seek(0)
            mended = _mended(file)
            if mended is None:
                raise
    image = PIL.Image.open(mended)
    image.load()
    warn(f"{what} {path} has broken metadata, which is left aside")
    return image


def upright_rgb(image: Any, what: str, tell: str | None = None) -> Any:
    """A PIL image in RGB as viewers show it. tell: what warnings call it.

    It is turned upright by its EXIF tag, its colour profile is made sRGB, and what is transparent lies on white, with a
    warning. Raises OSError for pixels that cannot be read, ValueError for more than 8 bits.
    """
    import PIL.Image
    import PIL.ImageOps
    from PIL.ExifTags import Base

    tell = tell or what
    try:
        image.load()
    except Exception as error:
        raise OSError(f"{what} cannot be read ({error})") from error
    if image.mode in ("I", "F", "LAB") or image.mode.startswith("I;"):
        raise ValueError(f"{tell} has pixels of mode {image.mode}, which are not read: convert it to RGB of 8 bits")
    orientation = 1
    try:
        orientation = image.getexif().get(Base.Orientation, 1)
    except Exception:
        warn(f"{tell} has broken EXIF metadata, which is left aside")
    transparent = image.has_transparency_data
    if image.mode in ("RGBa", "La"):  # colours times alpha
        image = image.convert({"RGBa": "RGBA", "La": "LA"}[image.mode])
    elif image.mode in ("P", "PA"):
        image = image.convert("RGBA" if transparent else "RGB")
    shown = _in_srgb(image, tell)
    alpha = image.convert("RGBA").getchannel("A") if transparent else None
    if alpha is not None and alpha.getextrema()[0] < 255:
        warn(f"{tell} is transparent in places, which are laid on white")
        shown = PIL.Image.composite(shown, PIL.Image.new("RGB", shown.size, "white"), alpha)
    shown.info = {}  # else it would be converted again wherever it is given to
    shown.getexif()[Base.Orientation] = orientation
    return PIL.ImageOps.exif_transpose(shown)


def _in_srgb(image: Any, tell: str) -> Any:
    """The image in RGB, its colours those of sRGB; transparency is not looked at."""
    import PIL.Image
    from PIL import ImageCms

    plain, profile = image.convert("RGB"), image.info.get("icc_profile")
    if not profile:
        return plain
    try:
        own: Any = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        mode = {"GRAY": "L"}.get(space := own.profile.xcolor_space.strip(), space)
        if mode != "RGB" and image.mode.removesuffix("A") != mode or mode == "RGB" and image.mode == "CMYK":
            raise ValueError(f"it is for {space}, the pixels are {image.mode}")
        transform = ImageCms.buildTransform(own, ImageCms.createProfile("sRGB"), mode, "RGB")
    except Exception as error:
        warn(f"{tell} has a colour profile that is left aside: {error}")
        return plain
    if mode != "CMYK":  # the many profiles of sRGB itself are to change nothing, where rounding would
        levels = np.stack(np.meshgrid(*[np.arange(0, 256, 15, dtype=np.uint8)] * 3), axis=-1).reshape(1, -1, 3)
        every = PIL.Image.fromarray(levels).convert(mode)
        moved = np.asarray(transform.apply(every)).astype(int) - np.asarray(every.convert("RGB"))
        if np.abs(moved).max() <= 1:
            return plain
    return transform.apply(image.convert(mode))


def _read_heic() -> None:
    """Let PIL read HEIC. Raises OSError without the plug-in."""
    try:
        import pillow_heif  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        advice = "convert it to png or jpeg, or `pip install pillow-heif`"
        raise OSError(f"it is HEIC, which is not read: {advice}") from error
    pillow_heif.register_heif_opener()


# Files with broken metadata


def _mended(file: Any) -> io.BytesIO | None:
    """A png or jpeg without those parts beside its picture that PIL does not open; None if there are none."""
    import PIL.Image

    kind = file.read(8)
    file.seek(0)
    if kind == b"\x89PNG\r\n\x1a\n":
        start, parts, rest = _png_parts(file.read())
    elif kind.startswith(b"\xff\xd8"):
        start, parts, rest = _jpeg_parts(file.read())
    else:
        return None

    def opens(part: bytes) -> bool:
        try:
            return bool(PIL.Image.open(io.BytesIO(start + part + rest[:4096])))
        except Exception:
            return False

    sound = [part for part in parts if opens(part)]
    return None if len(sound) == len(parts) else io.BytesIO(start + b"".join(sound) + rest)


def _png_parts(data: bytes) -> tuple[bytes, list[bytes], bytes]:
    """(header, chunks beside the picture, the picture). Texts, of which there may be too many, are one part."""
    start, parts, texts, rest, at = data[:8], [], b"", b"", 8
    while at < len(data):
        end = at + 12 + int.from_bytes(data[at : at + 4], "big")
        chunk, kind = data[at:end], data[at + 4 : at + 8]
        if kind in (b"IHDR", b"PLTE"):
            start += chunk
        elif kind[:1].isupper():
            rest += chunk
        elif kind in (b"tEXt", b"zTXt", b"iTXt"):
            texts += chunk
        else:
            parts.append(chunk)
        at = end
    return start, [*parts, texts], rest


def _jpeg_parts(data: bytes) -> tuple[bytes, list[bytes], bytes]:
    """(start, application segments and comments, the picture)."""
    parts, rest, at = [], b"", 2
    while data[at : at + 1] == b"\xff" and data[at + 1 : at + 2] != b"\xda":  # from the first scan on all is picture
        end = at + 2 + max(2, int.from_bytes(data[at + 2 : at + 4], "big"))
        if data[at + 1] == 0xFE or 0xE0 <= data[at + 1] <= 0xEF:
            parts.append(data[at:end])
        else:
            rest += data[at:end]
        at = end
    return data[:2], parts, rest + data[at:]
