"""Latents to frames."""

from collections.abc import Generator, Sequence
from contextlib import nullcontext

import numpy as np
from jaxtyping import Float, UInt8

from jaxwan.geometry import Geometry
from jaxwan.models.tiles import Coder
from jaxwan.models.video_coder import FrameType
from jaxwan.pipelines.axes import to_internal
from jaxwan.pipelines.media import BackgroundWriter
from jaxwan.pipelines.progress import Progress


def decode_videos(
    coders: Sequence[Coder],
    geometry: Geometry,
    latents: Float[np.ndarray, "b z t h w"],
    progress: Progress,
    frame_type: FrameType = "float32",
    *,
    keep: bool = True,
    writers: Sequence[BackgroundWriter] | None = None,
) -> Float[np.ndarray, "b f y x 3"] | UInt8[np.ndarray, "b f y x 3"] | None:
    """Frames in [0, 1], or in 8 bits, of public latents, each video by its coder, one at a time: that takes the memory
    of one. writers: one a video, which takes its frames as they come; with keep=False nobody else does, and none are
    returned."""
    shape = (len(latents), *geometry.pixel_shape(*latents.shape[2:]), 3)
    frames = np.empty(shape, frame_type) if keep else None
    with progress.phase("decode", latents.shape[0] * latents.shape[2], "latent frame") as update:
        for i, (coder, video) in enumerate(zip(coders, to_internal(latents), strict=True)):
            with nullcontext() if writers is None else writers[i] as writer:
                for pixels in decoded_groups(coder, video, frame_type, None if frames is None else frames[i]):
                    if writer is not None:
                        with progress.elsewhere("write"):  # that is, waiting for it
                            writer.put(pixels)
                    update(1)
                if writer is not None:
                    with progress.elsewhere("write"):
                        writer.finish()
    return frames


def decoded_groups(
    coder: Coder,
    latents: Float[np.ndarray, "t h w z"],
    frame_type: FrameType = "float32",
    kept: np.ndarray | None = None,
) -> Generator[Float[np.ndarray, "f y x 3"] | UInt8[np.ndarray, "f y x 3"]]:
    """The frames of each latent frame of a video in turn, in [0, 1] or in 8 bits; into `kept` (F, y, x, 3) too."""
    start = 0
    for (pixels,) in coder.decode_chunks(latents[None], frame_type):
        pixels = pixels if frame_type == "uint8" else pixels * 0.5 + 0.5
        if kept is not None:
            kept[start : start + len(pixels)] = pixels
        start += len(pixels)
        yield pixels
