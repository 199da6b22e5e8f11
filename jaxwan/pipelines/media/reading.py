"""Images in: files, PIL images and arrays to float32 pixels in [0, 1]; and the settings in files.

8-bit input (files, PIL, uint8 arrays) is resized where a size is asked for; float arrays must have it already.
"""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from jaxwan.pipelines.arguments import as_array, local_path
from jaxwan.pipelines.media.pictures import open_picture, upright_rgb, what_else
from jaxwan.pipelines.telling import warn

# PIL and av are imported where they are used, so their types cannot stand in signatures.
Image = Any  # PIL.Image.Image in RGB, or a float32 array (H, W, 3) in [0, 1]
FITS = ("stretch", "crop", "pad")  # how an image of another shape is brought to a size: `fit_image`
ImageSource = Any  # a path, a PIL image, or an array (H, W, 3): uint8, or float in [0, 1]


def load_image(source: ImageSource, what: str = "image") -> Image:
    """A PIL image in RGB as viewers show it; float arrays come back as float32.

    It is turned upright by its EXIF tag, and its colour profile is made sRGB. What is transparent lies on white, with a
    warning; metadata that is broken is left aside, with one too. Diffusers looks at the EXIF tag alone.

    Raises OSError for a file that is missing or unreadable, ValueError for pixels of another shape, depth or range.
    Source: diffusers utils/loading_utils.py:load_image.
    """
    import PIL.Image

    if isinstance(source, str | Path):
        return _read_image(local_path(source, what), what)
    if isinstance(source, PIL.Image.Image):
        return upright_rgb(source, what)
    pixels = _checked(source, ("H", "W", 3), what)
    return PIL.Image.fromarray(pixels) if pixels.dtype == np.uint8 else pixels.astype(np.float32)


def resize_image(
    image: Image, height: int, width: int, what: str = "image", fit: str = "stretch"
) -> Float[np.ndarray, "{height} {width} 3"]:
    """Pixels in [0, 1] of what `load_image` returned, brought to the size by Lanczos. fit: one of FITS.

    Raises ValueError for a float array of another size: Diffusers would sample it to the nearest pixel.
    Source: diffusers image_processor.py:VaeImageProcessor.preprocess, which stretches.
    """
    if isinstance(image, np.ndarray):
        _check_size(image.shape[:2], height, width, what)
        return image
    return np.asarray(fit_image(image, height, width, fit)).astype(np.float32) / 255.0


def fit_image(image: Any, height: int, width: int, fit: str = "stretch", aspect: float | None = None) -> Any:
    """A PIL image brought to a size by Lanczos.

    fit: "stretch", which does not keep its shape; "crop" takes the largest part from its middle that has the size's
    shape; "pad" puts black bars beside the whole of it. aspect: its width / height as shown, if pixels are not square.
    """
    import PIL.Image

    lanczos = PIL.Image.Resampling.LANCZOS
    shape = aspect or image.width / image.height
    if fit == "crop":
        return image.resize((width, height), lanczos, box=_middle(image, width / height / shape))
    if fit == "pad":
        whole = min(width, max(1, round(height * shape))), min(height, max(1, round(width / shape)))
        padded = PIL.Image.new(image.mode, (width, height))
        padded.paste(image.resize(whole, lanczos), (round((width - whole[0]) / 2), round((height - whole[1]) / 2)))
        return padded
    return image.resize((width, height), lanczos)


def crop_image(image: Image, height: int, width: int) -> Image:
    """What `fit_image` with "crop" shows, in whole pixels and not resized; float arrays as they are."""
    if isinstance(image, np.ndarray):
        return image
    x, y, right, bottom = _middle(image, width / height * image.height / image.width)
    left, top = round(x), round(y)
    return image.crop((left, top, left + max(1, round(right - x)), top + max(1, round(bottom - y))))


def _middle(image: Any, change: float) -> tuple[float, float, float, float]:
    """(left, top, right, bottom) of its largest part in the middle whose width / height is `change` times its own."""
    x, y = image.width * (1 - min(change, 1)) / 2, image.height * (1 - min(1 / change, 1)) / 2
    return x, y, image.width - x, image.height - y


def to_unit_range(frames: UInt8[np.ndarray, "..."] | Float[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
    """uint8 pixels as float32 in [0, 1]; float ones as float32."""
    pixels = frames.astype(np.float32, copy=False)
    return pixels / 255.0 if frames.dtype == np.uint8 else pixels


def fit_size(image_height: int, image_width: int, area: int, stride: int, what: str = "an image") -> tuple[int, int]:
    """(height, width) of about `area` pixels in an image's aspect ratio, each rounded down to a multiple of `stride`.

    A 1080 x 1920 image at area 480 * 832 and stride 16: (464, 832).
    Source: diffusers pipelines/wan/pipeline_wan_i2v.py, its example.
    """
    aspect = image_height / image_width
    height = round(math.sqrt(area * aspect)) // stride * stride
    width = round(math.sqrt(area / aspect)) // stride * stride
    if not height or not width:
        raise ValueError(
            f"{what} of {image_width}x{image_height} is too narrow for {area} pixels with sides that are multiples of "
            f"{stride}: give height and width"
        )
    return height, width


def load_image_processor(folder: str | Path | None) -> Any:
    """The CLIP image processor of a checkpoint's `image_processor` folder; None: the published checkpoints'.

    Always the PIL one: the class that transformers picks by itself gives other pixels where torchvision is installed.
    """
    from transformers import CLIPImageProcessorPil

    if folder is None:
        return CLIPImageProcessorPil()  # whose defaults are theirs
    path = Path(folder) / "preprocessor_config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no preprocessor_config.json, which the image encoder's input needs")
    return CLIPImageProcessorPil.from_pretrained(str(folder), local_files_only=True)


def clip_pixels(image: Image, processor: Any) -> Float[np.ndarray, "h w 3"]:
    """The image encoder's input: what `load_image` returned, unresized, normalised by `load_image_processor`'s object.

    Diffusers lets the processor divide by 255 once more what is already in [0, 1]. This does the same with a float
    array, to give the same video, and warns: the image encoder then sees an almost black image.
    Source: diffusers pipelines/wan/pipeline_wan_i2v.py:WanImageToVideoPipeline.encode_image.
    """
    layout = {}
    if isinstance(image, np.ndarray):
        layout = {"input_data_format": "channels_last"}
        warn("the image encoder sees a float image almost black, as in Diffusers; give uint8 or PIL")
    return processor(images=image, return_tensors="np", **layout)["pixel_values"][0].transpose(1, 2, 0)


def read_settings(path: str | Path) -> dict[str, Any]:
    """The settings that `Output.save` wrote into an mp4, webm, gif or png: values as the file has them, not checked.

    `pipe(**read_settings("kite.mp4")["call"])` makes it again, with the images or arrays that `["inputs"]` names.

    Raises OSError for a file that cannot be read, ValueError for one without settings.
    """
    import av
    import av.error
    import PIL.Image

    path = local_path(path, "file")
    if (suffix := path.suffix.lower()) in (".mp4", ".webm"):
        reading = _reading(path, "file", suffix[1:], av.error.InvalidDataError, av.error.FFmpegError)
        with reading, path.open("rb") as file, av.open(file, "r") as container:
            text = container.metadata.get("comment") or container.metadata.get("COMMENT")  # Matroska's spelling
    else:
        reading = _reading(path, "file", "mp4, webm, gif or png", PIL.UnidentifiedImageError, SyntaxError)
        with reading, PIL.Image.open(path) as image:
            text = image.info.get("Comment") or image.info.get("comment")
    try:
        settings = json.loads(text or "")
    except ValueError:
        settings = None
    kinds = {"jaxwan": str, "call": dict, "inputs": list, "components": list, "loras": list}
    given = settings if isinstance(settings, dict) else {}
    right = all(isinstance(given[name], kinds[name]) for name in kinds.keys() & given.keys())
    if not right or not {"jaxwan", "call"} <= given.keys():
        raise ValueError(f"{path} does not say how it was made: jaxwan wrote no settings into it")
    return given


def _read_image(path: Path, what: str) -> Image:
    import PIL.Image

    with _reading(path, what, "image", PIL.UnidentifiedImageError, Exception):  # PIL raises whatever broken files cause
        image = open_picture(path, what)
    return upright_rgb(image, what, f"{what} {path}")


def load_latents(path: str | Path) -> np.ndarray:
    """The array of a .npy file, which is never unpickled. Raises OSError for a file that is none of these."""
    path = local_path(path, "latents")
    with _reading(path, "latents", ".npy file of plain numbers", ValueError, MemoryError), path.open("rb") as file:
        return np.lib.format.read_array(file, allow_pickle=False)


@contextmanager
def _reading(path: Path, what: str, kind: str, unknown: type[Exception], *errors: type[Exception]) -> Iterator[None]:
    """Errors of a reader as OSErrors that name the path once, and the reason; `unknown` is that of foreign content."""
    try:
        yield
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{what} {path} does not exist") from error
    except (OSError, unknown, *errors) as error:
        if foreign := what_else(path):
            reason = foreign
        elif isinstance(error, unknown):
            reason = "damaged, or of an unknown format"
        else:
            reason = getattr(error, "strerror", None) or str(error)  # str of those that have both names the path again
        raise OSError(f"{what} {path} is no readable {kind} ({reason})") from error


def _checked(source: Any, axes: tuple, what: str) -> UInt8[np.ndarray, "..."] | Float[np.ndarray, "..."]:
    """`source` as uint8 or float array, proved to have `axes` and, if float, values in [0, 1]."""
    pixels = as_array(source, what)
    if pixels.ndim != len(axes) or pixels.shape[-1] != 3 or not pixels.size:
        first = pixels.ndim == len(axes) and pixels.shape[-3] == 3
        hint = ": the colours come last, as np.moveaxis(x, -3, -1) puts them" if first else ""
        raise ValueError(f"{what} has shape {pixels.shape}, must be ({', '.join(map(str, axes))}){hint}")
    if pixels.dtype != np.uint8:
        check_pixels(pixels, what)
    return pixels


def checked_frames(frames: Any) -> UInt8[np.ndarray, "b f h w 3"] | Float[np.ndarray, "b f h w 3"]:
    """Videos (B, F, H, W, 3) as an array, proved to be uint8, or floats in [0, 1]."""
    pixels = as_array(frames, "frames")
    if pixels.ndim != 5 or pixels.shape[-1] != 3 or not pixels.size:
        raise ValueError(f"frames have shape {pixels.shape}, expected (B, F, H, W, 3)")
    if pixels.dtype != np.uint8:
        check_pixels(pixels, "frames")
    return pixels


def check_pixels(pixels: np.ndarray, what: str) -> None:
    if not np.issubdtype(pixels.dtype, np.floating):
        raise ValueError(f"{what} has dtype {pixels.dtype}, must be uint8, or float in [0, 1]")
    low, high = pixels.min(), pixels.max()
    if not (low >= 0 and high <= 1):  # written so that NaN fails
        raise ValueError(f"{what} has values from {low} to {high}, float pixels must lie in [0, 1]")


def _check_size(size: tuple[int, ...], height: int, width: int, what: str) -> None:
    if size != (height, width):
        raise ValueError(
            f"{what} is a float array of {size[0]} x {size[1]} but {height} x {width} is asked for; "
            "only uint8 and PIL images are resized"
        )
