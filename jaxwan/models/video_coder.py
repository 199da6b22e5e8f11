"""Whole videos through the VAE, as a loop over chunks.

Each direction has exactly two programs, for a video's first frame and for later ones, and coding chunk by chunk gives
what coding the whole video would.
"""

from collections.abc import Callable, Iterator
from copy import copy
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from jaxwan.geometry import Geometry
from jaxwan.models.causal_conv import Cache, Formulation
from jaxwan.models.vae import VAE


class VideoCoder:
    """Whole videos through one VAE, chunk by chunk: two compiled programs per direction, frame size and batch.

    Programs do not depend on the number of frames. The cache is donated from chunk to chunk, so one is alive at a time.
    `formulation` overrides the platform's choice of convolution.
    """

    def __init__(self, vae: VAE, *, formulation: Formulation | None = None):
        self.cfg = vae.cfg
        graph, self.state = nnx.split(vae)
        self._encode, self._decode = _programs(graph, formulation)

    def holding(self, state: nnx.State) -> "VideoCoder":
        """The same programs with other parameters."""
        other = copy(self)
        other.state = state
        return other

    def encode_chunk(
        self, cache: Cache | None, pixels: Float[Array | np.ndarray, "b f h w 3"]
    ) -> tuple[Cache, Float[Array, "b t y x z"]]:
        """`VAE.encode_chunk`, compiled; uses up `cache`."""
        return self._encode(self.state, cache, pixels)

    def decode_chunk(
        self, cache: Cache | None, latents: Float[Array | np.ndarray, "b t y x z"]
    ) -> tuple[Cache, Float[Array, "b f h w 3"]]:
        """`VAE.decode_chunk`, compiled; uses up `cache`."""
        return self._decode(self.state, cache, latents)

    def encode_chunks(self, pixels: Float[Array | np.ndarray, "b f h w 3"]) -> Iterator[Float[Array, "b 1 y x z"]]:
        """Normalised latents of a video in [-1, 1], a latent frame at a time: of its first frame, then of 4 each.

        Raises ValueError when f is not 4k+1, or h or w no multiple of the VAE's stride.
        """
        step = self.cfg.scale_factor_temporal
        Geometry(step, self.cfg.scale_factor_spatial, patch=(1, 1, 1)).check_size(*pixels.shape[1:4])
        cache, latent = self.encode_chunk(None, _frames(pixels, 0, 1))
        yield latent
        for start in range(1, pixels.shape[1], step):
            cache, latent = self.encode_chunk(cache, _frames(pixels, start, step))
            yield latent

    def encode(self, pixels: Float[Array | np.ndarray, "b f h w 3"]) -> Float[Array, "b t y x z"]:
        """The latents of `encode_chunks` as one array."""
        return jnp.concatenate(list(self.encode_chunks(pixels)), axis=1)

    def decode_chunks(self, latents: Float[Array | np.ndarray, "b t y x z"]) -> Iterator[Float[Array, "b f h w 3"]]:
        """The frames of each latent frame in turn, in [-1, 1]: one for the first, 4 for each of the others."""
        cache = None
        for start in range(latents.shape[1]):
            cache, frames = self.decode_chunk(cache, _frames(latents, start, 1))
            yield frames

    def decode(self, latents: Float[Array | np.ndarray, "b t y x z"]) -> Float[Array, "b f h w 3"]:
        """The video, in [-1, 1], of normalised latents: 4 (t - 1) + 1 frames."""
        return jnp.concatenate(list(self.decode_chunks(latents)), axis=1)

    def programs(self, direction: str, shape: tuple[int, ...]) -> Iterator[tuple[str, Callable, tuple]]:
        """(name, jitted function, arguments) of all that coding a host array of `shape` compiles.

        direction: "encode" for frames [B, F, H, W, 3], "decode" for latents [B, T, H, W, Z].
        """
        function, step = {
            "encode": (self._encode, self.cfg.scale_factor_temporal), "decode": (self._decode, 1)
        }[direction]  # fmt: skip
        first, later = (jax.ShapeDtypeStruct((shape[0], n, *shape[2:]), jnp.float32) for n in (1, step))
        if shape[1] > 1:
            cache, _ = jax.eval_shape(function, self.state, None, first)
            place = jax.tree.leaves(self.state)[0].sharding
            cache = jax.tree.map(lambda leaf: leaf.update(sharding=place), cache)
            yield f"VAE {direction}, later frames", function, (self.state, cache, later)
        yield f"VAE {direction}, first frame", function, (self.state, None, first)


@lru_cache(maxsize=8)
def _programs(graph: Any, formulation: Formulation | None) -> tuple[Callable, Callable]:
    """The jitted chunks of a VAE of this structure, encode and decode: the same for all coders of it."""

    def encode(state, cache, pixels):
        return nnx.merge(graph, state).encode_chunk(cache, pixels, formulation=formulation)

    def decode(state, cache, latents):
        return nnx.merge(graph, state).decode_chunk(cache, latents, formulation=formulation)

    return jax.jit(encode, donate_argnums=1), jax.jit(decode, donate_argnums=1)


def _frames(x: Array | np.ndarray, start: int, count: int) -> Array | np.ndarray:
    """x[:, start : start + count], compiled once for all `start`; a host array's stay where they are."""
    if isinstance(x, np.ndarray):
        return x[:, start : start + count]
    return jax.lax.dynamic_slice_in_dim(x, np.int32(start), count, axis=1)
