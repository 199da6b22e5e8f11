"""The Wan VAE: chunks of frames to latents and back.

The first frame of a video is a chunk and a latent frame of its own; from then on 4 frames are one.
"""

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jaxwan.config import ConfigError, VAEConfig
from jaxwan.models.causal_conv import Cache, CausalConv3d, Chunk, Formulation
from jaxwan.models.vae_blocks import Decoder, Encoder
from jaxwan.sharding.space import AnySpace


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
                     formulation: Formulation | None = None, space: AnySpace | None = None
                     ) -> tuple[Cache, Float[Array, "b t y x z"]]:  # fmt: skip
        """The next 4t frames of a video to t latent frames, the means of their distributions.

        cache is what the chunk before returned; None for a video's first chunk, which is a single frame. space: how
        frames are split over devices, their units being latent pixels; called by all of them (`Space.spread`).
        """
        _check_chunk(cache, pixels.shape[1], self.cfg.scale_factor_temporal)
        chunk = Chunk(cache, formulation, space)
        x = patchify(pixels.astype(self.dtype), self.cfg.patch_size or 1)
        moments = self.quant_conv(self.encoder(x, chunk), chunk)
        mean = moments[..., : self.cfg.z_dim].astype(jnp.float32)
        center, scale = self._latent_statistics()
        return chunk.halos(), (mean - center) / scale

    def decode_chunk(self, cache: Cache | None, latents: Float[Array, "b t y x z"], *,
                     formulation: Formulation | None = None, space: AnySpace | None = None
                     ) -> tuple[Cache, Float[Array, "b f h w 3"]]:  # fmt: skip
        """The next t latent frames of a video to 4t frames, clamped to [-1, 1], in float32.

        cache is what the chunk before returned; None for a video's first: one latent frame, which gives one frame.
        space as in `encode_chunk`.
        """
        cache, frames = self.decode_chunk_unclamped(cache, latents, formulation=formulation, space=space)
        return cache, jnp.clip(frames, -1.0, 1.0)

    def decode_chunk_unclamped(
        self, cache: Cache | None, latents: Float[Array, "b t y x z"], *, formulation: Formulation | None = None,
        space: AnySpace | None = None,
    ) -> tuple[Cache, Float[Array, "b f h w 3"]]:  # fmt: skip
        """`decode_chunk` without the clamp, which has no gradient outside [-1, 1]: for training."""
        _check_chunk(cache, latents.shape[1], 1)
        chunk = Chunk(cache, formulation, space)
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
