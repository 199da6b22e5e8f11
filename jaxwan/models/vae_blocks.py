"""Encoder and decoder of the Wan VAE, of the 2.1 kind and of the 2.2 kind (with parameter-free shortcuts).

Modules are named as in Diffusers, so that the rule table is short. All take and return videos [B, F, H, W, C].
"""

from collections.abc import Iterable, Iterator

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jaxwan.config import VAEConfig
from jaxwan.kernels.attention import attention
from jaxwan.models.causal_conv import CausalConv3d, Chunk, Conv2d
from jaxwan.models.layers import param


class ChannelNorm(nnx.Module):
    """`x / |x| * sqrt(C) * gamma` over the channels; statistics in float32, result in x's dtype.

    `axes` is how many axes of size 1 the stored gamma has behind its channels.
    Source: diffusers autoencoder_kl_wan.py:WanRMS_norm.
    """

    def __init__(self, dim: int, *, axes: int = 3, dtype: DTypeLike):
        self.gamma = param(jnp.ones((dim,) + (1,) * axes, dtype))

    def __call__(self, x: Float[Array, "b f h w c"]) -> Float[Array, "b f h w c"]:
        x32 = x.astype(jnp.float32)
        norm = jnp.maximum(jnp.sqrt((x32 * x32).sum(-1, keepdims=True)), 1e-12)
        gamma = self.gamma[...].astype(jnp.float32).reshape(-1)
        return (x32 / norm * (x.shape[-1] ** 0.5 * gamma)).astype(x.dtype)


class ResidualBlock(nnx.Module):
    """Two normalised causal convolutions beside a shortcut. Source: diffusers autoencoder_kl_wan.py."""

    def __init__(self, d_in: int, d_out: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.norm1 = ChannelNorm(d_in, dtype=dtype)
        self.conv1 = CausalConv3d(d_in, d_out, (3, 3), dtype=dtype, rngs=rngs)
        self.norm2 = ChannelNorm(d_out, dtype=dtype)
        self.conv2 = CausalConv3d(d_out, d_out, (3, 3), dtype=dtype, rngs=rngs)
        self.conv_shortcut = CausalConv3d(d_in, d_out, (1, 1), dtype=dtype, rngs=rngs) if d_in != d_out else None

    def __call__(self, x: Float[Array, "b f h w i"], chunk: Chunk) -> Float[Array, "b f h w o"]:
        y = self.conv1(jax.nn.silu(self.norm1(x)), chunk)
        y = self.conv2(jax.nn.silu(self.norm2(y)), chunk)
        return y + (x if self.conv_shortcut is None else self.conv_shortcut(x, chunk))


class AttentionBlock(nnx.Module):
    """Attention of one head among the pixels of each frame. Source: diffusers autoencoder_kl_wan.py."""

    def __init__(self, dim: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.norm = ChannelNorm(dim, axes=2, dtype=dtype)
        self.to_qkv = Conv2d(dim, 3 * dim, 1, dtype=dtype, rngs=rngs)
        self.proj = Conv2d(dim, dim, 1, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b f h w c"], chunk: Chunk) -> Float[Array, "b f h w c"]:
        c = x.shape[-1]
        qkv = self.to_qkv(self.norm(x), chunk)
        q, kv = qkv[..., :c], qkv[..., c:]
        if chunk.space is not None:
            kv = chunk.space.gather(kv)  # every pixel of a frame is attended to
        bias = None if chunk.space is None else chunk.space.bias(kv)
        y = attention(_pixels(q), *jnp.split(_pixels(kv), 2, axis=-1), bias=bias)
        return x + self.proj(y.reshape(x.shape), chunk)


def _pixels(x: Float[Array, "b f h w c"]) -> Float[Array, "bf hw 1 c"]:
    """The pixels of each frame in a row, of one head."""
    b, f, h, w, c = x.shape
    return x.reshape(b * f, h * w, 1, c)


class MidBlock(nnx.Module):
    """Residual block, attention, residual block. Source: diffusers autoencoder_kl_wan.py:WanMidBlock."""

    def __init__(self, dim: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.resnets = nnx.List([ResidualBlock(dim, dim, dtype=dtype, rngs=rngs) for _ in range(2)])
        self.attentions = nnx.List([AttentionBlock(dim, dtype=dtype, rngs=rngs)])

    def __call__(self, x: Float[Array, "b f h w c"], chunk: Chunk) -> Float[Array, "b f h w c"]:
        x = self.attentions[0](self.resnets[0](x, chunk), chunk)
        return self.resnets[1](x, chunk)


class Downsample(nnx.Module):
    """Half the height and width, and with `time` half the frames: the first frame of a video stays one.

    Source: diffusers autoencoder_kl_wan.py:WanResample, modes downsample2d and downsample3d.
    """

    def __init__(self, dim: int, *, time: bool, dtype: DTypeLike, rngs: nnx.Rngs):
        self.resample = Conv2d(dim, dim, 3, stride=2, dtype=dtype, rngs=rngs)
        self.time_conv = CausalConv3d(dim, dim, (3, 1), time_stride=2, dtype=dtype, rngs=rngs) if time else None

    def __call__(self, x: Float[Array, "b f h w c"], chunk: Chunk) -> Float[Array, "b g h2 w2 c"]:
        x = self.resample(x, chunk)
        if self.time_conv is None:
            return x
        if chunk.first:
            chunk.before(x, self.time_conv.halo)
            return x
        return self.time_conv(x, chunk)


class Upsample(nnx.Module):
    """Twice the height and width, and with `time` twice the frames: the first frame of a video stays one.

    Source: diffusers autoencoder_kl_wan.py:WanResample, modes upsample2d and upsample3d.
    """

    def __init__(self, d_in: int, d_out: int, *, time: bool, dtype: DTypeLike, rngs: nnx.Rngs):
        self.resample = Conv2d(d_in, d_out, 3, dtype=dtype, rngs=rngs)
        self.time_conv = CausalConv3d(d_in, 2 * d_in, (3, 1), dtype=dtype, rngs=rngs) if time else None

    def __call__(self, x: Float[Array, "b f h w i"], chunk: Chunk) -> Float[Array, "b g h2 w2 o"]:
        if self.time_conv is not None:
            if chunk.first:
                chunk.skip(x, self.time_conv.halo)
            else:
                x = _interleave_halves(self.time_conv(x, chunk))
        return self.resample(x.repeat(2, axis=2).repeat(2, axis=3), chunk)


def _interleave_halves(x: Array) -> Array:
    """[b, f, h, w, 2c] -> [b, 2f, h, w, c]: the two halves of the channels are successive frames."""
    b, f, h, w, c = x.shape
    return x.reshape(b, f, h, w, 2, c // 2).transpose(0, 1, 4, 2, 3, 5).reshape(b, 2 * f, h, w, c // 2)


def average_down(x: Float[Array, "b f h w c"], d_out: int, *, time: int, space: int) -> Float[Array, "b g h2 w2 o"]:
    """Fold `time` frames and `space` x `space` pixels into channels, then average groups of them down to `d_out`.

    A single frame folded by `time` = 2 has a zero frame ahead. Source: diffusers autoencoder_kl_wan.py:AvgDown3D.
    """
    x = jnp.pad(x, ((0, 0), (-x.shape[1] % time, 0), (0, 0), (0, 0), (0, 0)))
    b, f, h, w, c = x.shape
    x = x.reshape(b, f // time, time, h // space, space, w // space, space, c).transpose(0, 1, 3, 5, 7, 2, 4, 6)
    return x.reshape(*x.shape[:4], d_out, c * time * space * space // d_out).mean(-1)


def duplicate_up(x: Float[Array, "b f h w c"], d_out: int, *, time: int, space: int,
                 first: bool) -> Float[Array, "b g h2 w2 o"]:  # fmt: skip
    """Repeat channels and unfold them into `time` frames and `space` x `space` pixels; `first` drops all but the last.

    Source: diffusers autoencoder_kl_wan.py:DupUp3D.
    """
    b, f, h, w, c = x.shape
    x = x.repeat(d_out * time * space * space // c, axis=-1).reshape(b, f, h, w, d_out, time, space, space)
    x = x.transpose(0, 1, 5, 2, 6, 3, 7, 4).reshape(b, f * time, h * space, w * space, d_out)
    return x[:, time - 1 :] if first else x


class ResidualDownBlock(nnx.Module):
    """A level of the 2.2 encoder. Source: diffusers autoencoder_kl_wan.py:WanResidualDownBlock."""

    def __init__(self, d_in: int, d_out: int, num_res_blocks: int, *, down: bool, time: bool, dtype: DTypeLike,
                 rngs: nnx.Rngs):  # fmt: skip
        self.resnets = nnx.List(_resnets(d_in, d_out, num_res_blocks, dtype, rngs))
        self.downsampler = Downsample(d_out, time=time, dtype=dtype, rngs=rngs) if down else None
        self.d_out, self.time, self.space = d_out, 1 + time, 1 + down

    def __call__(self, x: Float[Array, "b f h w i"], chunk: Chunk) -> Float[Array, "b g h2 w2 o"]:
        shortcut = average_down(x, self.d_out, time=self.time, space=self.space)
        for block in self.resnets:
            x = block(x, chunk)
        return shortcut + (x if self.downsampler is None else self.downsampler(x, chunk))


class ResidualUpBlock(nnx.Module):
    """A level of the 2.2 decoder. Source: diffusers autoencoder_kl_wan.py:WanResidualUpBlock."""

    def __init__(self, d_in: int, d_out: int, num_res_blocks: int, *, up: bool, time: bool, dtype: DTypeLike,
                 rngs: nnx.Rngs):  # fmt: skip
        self.resnets = nnx.List(_resnets(d_in, d_out, num_res_blocks + 1, dtype, rngs))
        self.upsampler = Upsample(d_out, d_out, time=time, dtype=dtype, rngs=rngs) if up else None
        self.d_out, self.time = d_out, 1 + time

    def __call__(self, x: Float[Array, "b f h w i"], chunk: Chunk) -> Float[Array, "b g h2 w2 o"]:
        y = x
        for block in self.resnets:
            y = block(y, chunk)
        if self.upsampler is None:
            return y
        return self.upsampler(y, chunk) + duplicate_up(x, self.d_out, time=self.time, space=2, first=chunk.first)


class UpBlock(nnx.Module):
    """A level of the 2.1 decoder; going up halves the channels. Source: diffusers autoencoder_kl_wan.py:WanUpBlock."""

    def __init__(self, d_in: int, d_out: int, num_res_blocks: int, *, up: bool, time: bool, dtype: DTypeLike,
                 rngs: nnx.Rngs):  # fmt: skip
        self.resnets = nnx.List(_resnets(d_in, d_out, num_res_blocks + 1, dtype, rngs))
        upsample = [Upsample(d_out, d_out // 2, time=time, dtype=dtype, rngs=rngs)] if up else []
        self.upsamplers = nnx.List(upsample)

    def __call__(self, x: Float[Array, "b f h w i"], chunk: Chunk) -> Float[Array, "b g h2 w2 o"]:
        for layer in (*self.resnets, *self.upsamplers):
            x = layer(x, chunk)
        return x


def _resnets(d_in: int, d_out: int, count: int, dtype: DTypeLike, rngs: nnx.Rngs) -> list[ResidualBlock]:
    return [ResidualBlock(d_out if i else d_in, d_out, dtype=dtype, rngs=rngs) for i in range(count)]


class Encoder(nnx.Module):
    """Pixels (or patches of them) to the moments of the latents.

    Source: diffusers autoencoder_kl_wan.py:WanEncoder3d.
    """

    def __init__(self, cfg: VAEConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        dim = cfg.base_dim * cfg.dim_mult[-1]
        self.conv_in = CausalConv3d(cfg.in_channels, cfg.base_dim, (3, 3), dtype=dtype, rngs=rngs)
        self.down_blocks = nnx.List(_down_blocks(cfg, dtype, rngs))
        self.mid_block = MidBlock(dim, dtype=dtype, rngs=rngs)
        self.norm_out = ChannelNorm(dim, dtype=dtype)
        self.conv_out = CausalConv3d(dim, 2 * cfg.z_dim, (3, 3), dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b f h w c"], chunk: Chunk) -> Float[Array, "b t y x z2"]:
        x = self.conv_in(x, chunk)
        for block in self.down_blocks:
            x = block(x, chunk)
        x = self.mid_block(x, chunk)
        return self.conv_out(jax.nn.silu(self.norm_out(x)), chunk)


def _down_blocks(cfg: VAEConfig, dtype: DTypeLike, rngs: nnx.Rngs) -> Iterator[nnx.Module]:
    """The levels of the encoder: modules of their own in the 2.2 kind, laid out flat in the 2.1 kind."""
    dims = [cfg.base_dim * m for m in (1, *cfg.dim_mult)]
    for d_in, d_out, down, time in _levels(dims, cfg.temperal_downsample):
        if cfg.is_residual:
            yield ResidualDownBlock(d_in, d_out, cfg.num_res_blocks, down=down, time=time, dtype=dtype, rngs=rngs)
            continue
        yield from _resnets(d_in, d_out, cfg.num_res_blocks, dtype, rngs)
        if down:
            yield Downsample(d_out, time=time, dtype=dtype, rngs=rngs)


class Decoder(nnx.Module):
    """Latents to pixels (or patches of them). Source: diffusers autoencoder_kl_wan.py:WanDecoder3d."""

    def __init__(self, cfg: VAEConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        mult = cfg.dim_mult[::-1]
        dims = [(cfg.decoder_base_dim or cfg.base_dim) * m for m in (mult[0], *mult)]
        self.conv_in = CausalConv3d(cfg.z_dim, dims[0], (3, 3), dtype=dtype, rngs=rngs)
        self.mid_block = MidBlock(dims[0], dtype=dtype, rngs=rngs)
        make = ResidualUpBlock if cfg.is_residual else UpBlock
        self.up_blocks = nnx.List(
            make(d_in if cfg.is_residual or i == 0 else d_in // 2, d_out, cfg.num_res_blocks,
                 up=up, time=time, dtype=dtype, rngs=rngs)
            for i, (d_in, d_out, up, time) in enumerate(_levels(dims, cfg.temperal_downsample[::-1]))
        )  # fmt: skip
        self.norm_out = ChannelNorm(dims[-1], dtype=dtype)
        self.conv_out = CausalConv3d(dims[-1], cfg.out_channels, (3, 3), dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b t y x z"], chunk: Chunk) -> Float[Array, "b f h w c"]:
        x = self.mid_block(self.conv_in(x, chunk), chunk)
        for block in self.up_blocks:
            x = block(x, chunk)
        return self.conv_out(jax.nn.silu(self.norm_out(x)), chunk)


def _levels(dims: list[int], temporal: Iterable[bool]) -> Iterator[tuple[int, int, bool, bool]]:
    """(d_in, d_out, resamples space, resamples time) of each level; the last one resamples nothing."""
    flags = [(True, t) for t in temporal] + [(False, False)]
    for d_in, d_out, (space, time) in zip(dims[:-1], dims[1:], flags, strict=True):
        yield d_in, d_out, space, time
