"""Images (`reading`) and videos (`videos`) that are read, and what is written (`writing`)."""

from jaxwan.pipelines.media.reading import (
    Image,
    ImageSource,
    check_pixels,
    clip_pixels,
    fit_size,
    load_image,
    load_image_processor,
    read_settings,
    resize_image,
    to_unit_range,
)
from jaxwan.pipelines.media.videos import Video, VideoSource, load_video, open_video
from jaxwan.pipelines.media.writing import (
    can_encode_h264,
    check_output,
    check_writable,
    replacing,
    save_gif,
    save_image,
    save_npz,
    save_output,
    save_video,
    to_uint8,
)

__all__ = [
    "Image",
    "ImageSource",
    "Video",
    "VideoSource",
    "can_encode_h264",
    "check_output",
    "check_pixels",
    "check_writable",
    "clip_pixels",
    "fit_size",
    "load_image",
    "load_image_processor",
    "load_video",
    "open_video",
    "read_settings",
    "replacing",
    "resize_image",
    "save_gif",
    "save_image",
    "save_npz",
    "save_output",
    "save_video",
    "to_uint8",
    "to_unit_range",
]
