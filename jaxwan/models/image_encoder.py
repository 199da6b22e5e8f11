"""The CLIP vision tower whose penultimate layer conditions the image-to-video models of Wan2.1."""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jaxwan.config import ConfigError, ImageEncoderConfig
from jaxwan.kernels.attention import attention
from jaxwan.models.layers import LayerNorm, Linear, param, scan_layers, stack


def _quick_gelu(x):
    return x * jax.nn.sigmoid(1.702 * x)


ACTIVATIONS = {"gelu": partial(jax.nn.gelu, approximate=False), "quick_gelu": _quick_gelu}


class CLIPVisionEncoder(nnx.Module):
    """Pixels -> output of the last layer but one, for the class token and then every patch, row by row.

    The last layer and the pooled output are never read, so they are neither computed nor stored.
    Source: transformers models/clip/modeling_clip.py:CLIPVisionModel; Wan2.1 wan/modules/clip.py:VisionTransformer.
    """

    def __init__(self, cfg: ImageEncoderConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        """Raises ConfigError for an unknown activation, a size of broken patches, or fewer than two layers."""
        _check(cfg)
        self.cfg = cfg
        pixels = cfg.patch_size * cfg.patch_size * cfg.num_channels
        patch_shape = (cfg.patch_size, cfg.patch_size, cfg.num_channels, cfg.hidden_size)
        self.patch_embedding = param(jax.random.normal(rngs.params(), patch_shape, dtype) * pixels**-0.5)
        self.class_embedding = param(jax.random.normal(rngs.params(), (cfg.hidden_size,), dtype))
        self.position_embedding = param(jax.random.normal(rngs.params(), (cfg.num_rows, cfg.hidden_size), dtype))
        self.pre_norm = LayerNorm(cfg.hidden_size, cfg.layer_norm_eps, affine=True, dtype=dtype)
        self.layers = stack(lambda rngs: _Layer(cfg, dtype=dtype, rngs=rngs), cfg.num_hidden_layers - 1, rngs)

    def __call__(self, pixels: Float[Array, "b h w c"]) -> Float[Array, "b s d"]:
        """pixels are normalised by CLIP's mean and std, of exactly image_size; any other raises ValueError."""
        return self.run_layers(self.embed(pixels))

    def embed(self, pixels: Float[Array, "b h w c"]) -> Float[Array, "b s d"]:
        """What the first layer takes: class token and patches with their positions, normalised."""
        size, channels = self.cfg.image_size, self.cfg.num_channels
        if pixels.shape[1:] != (size, size, channels):
            raise ValueError(
                f"pixels have shape {pixels.shape}, the image encoder takes (B, {size}, {size}, {channels})"
            )
        dtype = self.patch_embedding[...].dtype
        return self.pre_norm(self._patches(pixels.astype(dtype))).astype(dtype)

    def run_layers(self, x: Float[Array, "b s d"]) -> Float[Array, "b s d"]:
        """All layers that are stored, or those that this module has of them."""
        return scan_layers(self.layers, x, lambda layer, x: layer(x))

    def _patches(self, pixels):
        p = self.cfg.patch_size
        batch, side = pixels.shape[0], self.cfg.image_size // p
        patches = pixels.reshape(batch, side, p, side, p, -1).swapaxes(2, 3).reshape(batch, side * side, -1)
        kernel = self.patch_embedding[...]
        tokens = patches @ kernel.reshape(-1, kernel.shape[-1])
        first = jnp.broadcast_to(self.class_embedding[...], (batch, 1, kernel.shape[-1]))
        return jnp.concatenate([first, tokens], axis=1) + self.position_embedding[...]


class _Layer(nnx.Module):
    def __init__(self, cfg: ImageEncoderConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        dim, mlp = cfg.hidden_size, cfg.intermediate_size
        self.cfg = cfg
        self.attention_norm = LayerNorm(dim, cfg.layer_norm_eps, affine=True, dtype=dtype)
        self.q, self.k, self.v, self.o = (Linear(dim, dim, dtype=dtype, rngs=rngs) for _ in range(4))
        self.mlp_norm = LayerNorm(dim, cfg.layer_norm_eps, affine=True, dtype=dtype)
        self.up = Linear(dim, mlp, dtype=dtype, rngs=rngs)
        self.down = Linear(mlp, dim, dtype=dtype, rngs=rngs)

    def __call__(self, x):
        x = x + self._attention(self.attention_norm(x).astype(x.dtype))
        y = self.mlp_norm(x).astype(x.dtype)
        return x + self.down(ACTIVATIONS[self.cfg.hidden_act](self.up(y)))

    def _attention(self, x):
        q_BSNK, k_BSNK, v_BSNK = (
            f(x).reshape(*x.shape[:-1], self.cfg.num_attention_heads, -1) for f in (self.q, self.k, self.v)
        )
        return self.o(attention(q_BSNK, k_BSNK, v_BSNK).reshape(x.shape))


def _check(cfg: ImageEncoderConfig) -> None:
    if cfg.hidden_act not in ACTIVATIONS:
        allowed = ", ".join(map(repr, ACTIVATIONS))
        raise ConfigError(f"image encoder: hidden_act={cfg.hidden_act!r} is not implemented (only {allowed})")
    if cfg.image_size % cfg.patch_size:
        raise ConfigError(f"image encoder: image_size={cfg.image_size} is no multiple of patch_size={cfg.patch_size}")
    if cfg.num_hidden_layers < 2:
        raise ConfigError(f"image encoder: num_hidden_layers={cfg.num_hidden_layers}, needs at least 2")
