"""Videos that come in parts: each part encoded or decoded when it comes."""

from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Float

from jaxwan.models.causal_conv import Cache
from jaxwan.models.video_coder import Stream
from jaxwan.pipelines.arguments import as_array
from jaxwan.pipelines.axes import to_internal, to_public
from jaxwan.pipelines.media import load_video, to_unit_range


class EncodeStream:
    """Videos to normalised latents, in as many calls as their frames come in. Made by `WanPipeline.encode_stream`."""

    def __init__(self, stream: Stream):
        self._stream = stream

    @property
    def state(self) -> Cache | None:
        """All that a call leaves to the next one, which uses it up: a pytree of arrays, None before the first."""
        return self._stream.cache

    def __call__(self, frames: Any) -> Float[np.ndarray, "b z t h w"]:
        """Latents of the next frames (B, F, H, W, 3), uint8 or float in [0, 1]: 4k+1 in the first call, then 4k.

        Raises ValueError for other numbers, for another batch or size than in the first call, and as `encode` does.
        """
        return to_public(self._stream(np.stack(coded_pixels(frames))))


class DecodeStream:
    """Latents to videos, in as many calls as they come in. Made by `WanPipeline.decode_stream`."""

    def __init__(self, stream: Stream, checked: Callable[[Any], np.ndarray]):
        self._stream, self._checked = stream, checked

    @property
    def state(self) -> Cache | None:
        """All that a call leaves to the next one, which uses it up: a pytree of arrays, None before the first."""
        return self._stream.cache

    def __call__(self, latents: Any) -> Float[np.ndarray, "b f y x 3"]:
        """Frames in [0, 1] of the next normalised latents (B, C, T, h, w): 4T, and 3 fewer in the first call.

        Raises ValueError for another batch or size than in the first call, and as `decode` does.
        """
        return self._stream(to_internal(self._checked(latents))) * 0.5 + 0.5


def coded_pixels(frames: Any) -> list[Float[np.ndarray, "f h w 3"]]:
    """The videos of frames (B, F, H, W, 3), uint8 or float in [0, 1], as the VAE takes them: in [-1, 1]."""
    pixels = as_array(frames, "frames")
    if pixels.ndim != 5 or pixels.shape[-1] != 3 or not len(pixels):
        raise ValueError(f"frames have shape {pixels.shape}, expected (B, F, H, W, 3)")
    return [2 * to_unit_range(load_video(video)[0]) - 1 for video in pixels]
