"""The Wan VAE: chunks of frames to latents and back, and whole videos as a loop over chunks.

The first frame of a video is a chunk and a latent frame of its own; from then on 4 frames are one. So each direction
has exactly two programs, and coding chunk by chunk gives what coding the whole video would.
"""

from collections.abc import Callable, Iterator
from copy import copy

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jaxwan.config import ConfigError, VAEConfig
from jaxwan.geometry import Geometry
from jaxwan.models.causal_conv import Cache, CausalConv3d, Chunk, Formulation
from jaxwan.models.vae_blocks import Decoder, Encoder


class VAE(nnx.Module):
    """`AutoencoderKLWan` of the 2.1 or the 2.2 kind, without tiling.

    Latents are normalised (zero mean and unit variance by the configuration's `latents_mean` and `latents_std`) and
    float32; pixels are in [-1, 1]. Parameters and activations are of `dtype`. Raises ConfigError when the levels of
    the configuration do not give its scale factors, as nothing but 4 frames to a latent frame is defined.
    Source: diffusers autoencoder_kl_wan.py:AutoencoderKLWan.
    """

    def __init__(self, cfg: VAEConfig, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs):
        _check(cfg)
        self.cfg = cfg
        self.dtype = dtype
        self.encoder = Encoder(cfg, dtype=dtype, rngs=rngs)
        self.quant_conv = CausalConv3d(2 * cfg.z_dim, 2 * cfg.z_dim, (1, 1), dtype=dtype, rngs=rngs)
        self.post_quant_conv = CausalConv3d(cfg.z_dim, cfg.z_dim, (1, 1), dtype=dtype, rngs=rngs)
        self.decoder = Decoder(cfg, dtype=dtype, rngs=rngs)

    def encode_chunk(self, cache: Cache | None, pixels: Float[Array, "b f h w 3"], *,
                     formulation: Formulation | None = None) -> tuple[Cache, Float[Array, "b t y x z"]]:  # fmt: skip
        """The next 4t frames of a video to t latent frames, the means of their distributions.

        cache is what the chunk before returned; None for a video's first chunk, which is a single frame.
        """
        _check_chunk(cache, pixels.shape[1], self.cfg.scale_factor_temporal)
        chunk = Chunk(cache, formulation)
        x = patchify(pixels.astype(self.dtype), self.cfg.patch_size or 1)
        moments = self.quant_conv(self.encoder(x, chunk), chunk)
        mean = moments[..., : self.cfg.z_dim].astype(jnp.float32)
        center, scale = self._latent_statistics()
        return chunk.halos(), (mean - center) / scale

    def decode_chunk(self, cache: Cache | None, latents: Float[Array, "b t y x z"], *,
                     formulation: Formulation | None = None) -> tuple[Cache, Float[Array, "b f h w 3"]]:  # fmt: skip
        """The next t latent frames of a video to 4t frames, clamped to [-1, 1], in float32.

        cache is what the chunk before returned; None for a video's first: one latent frame, which gives one frame.
        """
        cache, frames = self.decode_chunk_unclamped(cache, latents, formulation=formulation)
        return cache, jnp.clip(frames, -1.0, 1.0)

    def decode_chunk_unclamped(
        self, cache: Cache | None, latents: Float[Array, "b t y x z"], *, formulation: Formulation | None = None
    ) -> tuple[Cache, Float[Array, "b f h w 3"]]:
        """`decode_chunk` without the clamp, which has no gradient outside [-1, 1]: for training."""
        _check_chunk(cache, latents.shape[1], 1)
        chunk = Chunk(cache, formulation)
        center, scale = self._latent_statistics()
        z = latents.astype(jnp.float32) * scale + center
        x = self.decoder(self.post_quant_conv(z.astype(self.dtype), chunk), chunk)
        frames = unpatchify(x, self.cfg.patch_size or 1)
        return chunk.halos(), frames.astype(jnp.float32)

    def _latent_statistics(self) -> tuple[np.ndarray, np.ndarray]:
        return np.array(self.cfg.latents_mean, np.float32), np.array(self.cfg.latents_std, np.float32)


def _check(cfg: VAEConfig) -> None:
    if not len(cfg.latents_mean) == len(cfg.latents_std) == cfg.z_dim:
        lengths = f"{len(cfg.latents_mean)} latents_mean and {len(cfg.latents_std)} latents_std"
        raise ConfigError(f"VAE: {lengths} for z_dim={cfg.z_dim}")
    space = (cfg.patch_size or 1) * 2 ** (len(cfg.dim_mult) - 1)
    time = 2 ** sum(cfg.temperal_downsample)
    for name, given, built in (
        ("spatial", cfg.scale_factor_spatial, space),
        ("temporal", cfg.scale_factor_temporal, time),
    ):
        if given != built:
            raise ConfigError(f"scale_factor_{name}={given}, but the levels of the VAE scale by {built}")
    if time != 4 or len(cfg.temperal_downsample) != len(cfg.dim_mult) - 1:
        raise ConfigError(
            f"temperal_downsample={cfg.temperal_downsample} must have {len(cfg.dim_mult) - 1} entries, two of them true"
        )


def _check_chunk(cache: Cache | None, frames: int, step: int) -> None:
    if cache is None and frames != 1:
        raise ValueError(f"a video's first chunk is 1 frame, not {frames}")
    if cache is not None and (frames < 1 or frames % step):
        raise ValueError(f"a chunk of {frames} frames is no multiple of {step}")


def patchify(x: Float[Array, "b f h w c"], size: int) -> Float[Array, "b f h2 w2 c2"]:
    """Fold `size` x `size` pixels into channels, ordered (channel, column, row)."""
    b, f, h, w, c = x.shape
    x = x.reshape(b, f, h // size, size, w // size, size, c).transpose(0, 1, 2, 4, 6, 5, 3)
    return x.reshape(b, f, h // size, w // size, c * size * size)


def unpatchify(x: Float[Array, "b f h w c"], size: int) -> Float[Array, "b f h2 w2 c2"]:
    """The inverse of `patchify`."""
    b, f, h, w, c = x.shape
    x = x.reshape(b, f, h, w, c // (size * size), size, size).transpose(0, 1, 2, 6, 3, 5, 4)
    return x.reshape(b, f, h * size, w * size, c // (size * size))


class VideoCoder:
    """Whole videos through one VAE, chunk by chunk: two compiled programs per direction, frame size and batch.

    Programs do not depend on the number of frames. The cache is donated from chunk to chunk, so one is alive at a time.
    `formulation` overrides the platform's choice of convolution.
    """

    def __init__(self, vae: VAE, *, formulation: Formulation | None = None):
        self.cfg = vae.cfg
        graph, self.state = nnx.split(vae)

        def encode(state, cache, pixels):
            return nnx.merge(graph, state).encode_chunk(cache, pixels, formulation=formulation)

        def decode(state, cache, latents):
            return nnx.merge(graph, state).decode_chunk(cache, latents, formulation=formulation)

        self._encode = jax.jit(encode, donate_argnums=1)
        self._decode = jax.jit(decode, donate_argnums=1)

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


def _frames(x: Array | np.ndarray, start: int, count: int) -> Array | np.ndarray:
    """x[:, start : start + count], compiled once for all `start`; a host array's stay where they are."""
    if isinstance(x, np.ndarray):
        return x[:, start : start + count]
    return jax.lax.dynamic_slice_in_dim(x, np.int32(start), count, axis=1)
