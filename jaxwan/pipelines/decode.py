"""Latents to frames."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, UInt8

from jaxwan.geometry import Geometry
from jaxwan.models.tiles import Coder
from jaxwan.models.video_coder import FrameType
from jaxwan.pipelines.axes import to_internal
from jaxwan.pipelines.progress import Progress


def decode_videos(
    coders: Sequence[Coder],
    geometry: Geometry,
    latents: Float[np.ndarray, "b z t h w"],
    progress: Progress,
    frame_type: FrameType = "float32",
) -> Float[np.ndarray, "b f y x 3"] | UInt8[np.ndarray, "b f y x 3"]:
    """Frames in [0, 1], or in 8 bits, of public latents, each video by its coder, one at a time: that takes the memory
    of one."""
    frames = np.empty((len(latents), *geometry.pixel_shape(*latents.shape[2:]), 3), frame_type)
    with progress.phase("decode", latents.shape[0] * latents.shape[2], "latent frame") as update:
        for coder, video, rows in zip(coders, to_internal(latents), frames, strict=True):
            start = 0
            for (pixels,) in coder.decode_chunks(video[None], frame_type):
                rows[start : start + len(pixels)] = pixels if frame_type == "uint8" else pixels * 0.5 + 0.5
                start += len(pixels)
                update(1)
    return frames
