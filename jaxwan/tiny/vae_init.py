"""How the bundled model's VAE starts: as a linear code that already works, from a few pictures.

Pictures go in as single frames, so every causal convolution starts in the tap of the current frame. Trained from here,
frames are good after minutes; from independent random weights it takes many times longer.
"""

from collections.abc import Mapping
from functools import partial
from math import prod

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

from jaxwan.config import VAEConfig
from jaxwan.convert.load import flat_shapes
from jaxwan.models.causal_conv import CausalConv3d, Chunk, Conv2d
from jaxwan.models.vae import VAE
from jaxwan.models.vae_blocks import Downsample, Encoder, UpBlock, Upsample
from jaxwan.tiny.muon import Params
from jaxwan.tiny.training import module_with

SMALL = 0.1  # of what a residual branch adds
BIAS = 0.1  # with none, flat colours would leave the norms nothing but their epsilon
RIDGE = 1e-4  # of the mean square of a least-squares problem's inputs
LOG_VARIANCE = -16.0  # of the latents' distribution, which training leaves alone: sampling it changes nothing

Pixels = Float[Array, "b 1 h w 3"]
Features = Float[Array, "b 1 h w c"]


def make_vae(cfg: VAEConfig, key: PRNGKeyArray, pictures: Pixels) -> VAE:
    """A VAE of the 2.1 kind whose resampling and last convolutions are fitted to `pictures` in [-1, 1], squares.

    To be compiled: run operation by operation, it takes minutes.
    """
    shapes = flat_shapes(nnx.state(nnx.eval_shape(lambda: VAE(cfg, rngs=nnx.Rngs(0)))))
    vae = with_parameters(cfg, _draw(shapes, key))
    features = _fit_encoder(vae, pictures)
    _fit_decoder(vae, features, pictures)
    return vae


def with_parameters(cfg: VAEConfig, params: Params) -> VAE:
    """The VAE with these parameters."""
    return module_with(partial(VAE, cfg), params)


def _draw(shapes: Mapping[str, jax.ShapeDtypeStruct], key: PRNGKeyArray) -> Params:
    """Random kernels in the current frame's tap, random biases; means and copies where time is resampled."""
    numbers = jax.random.normal(key, (sum(prod(s.shape) for s in shapes.values()),))  # at once: quick to compile
    drawn, used = {}, 0
    for path, shape in ((path, s.shape) for path, s in shapes.items()):
        own, used = numbers[used : used + prod(shape)].reshape(shape), used + prod(shape)
        if path.endswith("gamma"):
            drawn[path] = jnp.ones(shape)
        elif "time_conv" in path:
            drawn[path] = _time_kernel(shape) if path.endswith("kernel") else jnp.zeros(shape)
        elif path.endswith("bias"):
            drawn[path] = BIAS * own
        else:
            scale = SMALL if path.endswith(("conv2.kernel", "proj.kernel")) else 1.0
            kernel = scale * prod(shape[-4:-1]) ** -0.5 * own
            drawn[path] = kernel.at[:-1].set(0) if len(shape) == 5 else kernel
    return drawn


def _time_kernel(shape: tuple[int, ...]) -> Float[Array, "t 1 1 i o"]:
    """Down: the mean of two frames. Up, where there are twice the channels: both new frames are the old one."""
    d_in, d_out = shape[-2:]
    same, kernel = jnp.tile(jnp.eye(d_in), (1, d_out // d_in)), jnp.zeros(shape)
    return kernel.at[-2:, 0, 0].set(0.5 * same) if d_out == d_in else kernel.at[-1, 0, 0].set(same)


def _set(conv: CausalConv3d | Conv2d, kernel: Float[Array, "h w i o"], bias: Float[Array, " o"]) -> None:
    """Give a convolution this kernel in the tap of the current frame, in the upper left where it is smaller."""
    shape = conv.kernel[...].shape
    padding = [(0, full - own) for full, own in zip(shape[-4:], kernel.shape, strict=True)]
    kernel = jnp.pad(kernel, padding)
    if len(shape) == 5:
        kernel = jnp.pad(kernel[None], [(shape[0] - 1, 0)] + [(0, 0)] * 4)
    conv.kernel[...] = kernel
    conv.bias[...] = jnp.broadcast_to(bias, conv.bias[...].shape)


# Encoder


def _fit_encoder(vae: VAE, pictures: Pixels) -> dict[tuple[int, int], Features]:
    """Fit level by level; returns the last features of each (height, channels)."""
    encoder, chunk = vae.encoder, _chunk()
    x = encoder.conv_in(pictures, chunk)
    features = {(x.shape[2], x.shape[-1]): x}
    for block in encoder.down_blocks:
        if isinstance(block, Downsample):
            _fit_downsample(block.resample, x)
        x = block(x, chunk)
        features[x.shape[2], x.shape[-1]] = x
    _fit_latents(vae, encoder, encoder.mid_block(x, chunk))
    return features


def _fit_downsample(conv: Conv2d, x: Features) -> None:
    """The principal components of 2 x 2 patches."""
    b, _, h, w, c = x.shape
    patches = x.reshape(b * h // 2, 2, w // 2, 2, c).transpose(0, 2, 1, 3, 4).reshape(-1, 4 * c)
    mean, _, axes = _principal_components(patches, c)
    _set(conv, axes.reshape(2, 2, c, c), conv.bias[...] - mean @ axes)


def _fit_latents(vae: VAE, encoder: Encoder, x: Features) -> None:
    """The principal components of what the last convolution sees at a pixel, each with unit variance."""
    z_dim = vae.cfg.z_dim
    x = jax.nn.silu(encoder.norm_out(x)).reshape(-1, x.shape[-1])
    mean, variance, axes = _principal_components(x, z_dim)
    axes = axes / jnp.sqrt(variance + 1e-6 * variance.max())
    kernel = jnp.zeros((3, 3, x.shape[-1], 2 * z_dim)).at[1, 1, :, :z_dim].set(axes)
    _set(encoder.conv_out, kernel, jnp.pad(-mean @ axes, (0, z_dim)))
    rest = jnp.repeat(jnp.array([0.0, LOG_VARIANCE]), z_dim)
    _set(vae.quant_conv, jnp.diag((rest == 0).astype(rest.dtype))[None, None], rest)
    _set(vae.post_quant_conv, jnp.eye(z_dim)[None, None], jnp.zeros(z_dim))


def _principal_components(
    x: Float[Array, "n c"], count: int
) -> tuple[Float[Array, " c"], Float[Array, " k"], Float[Array, "c k"]]:
    """Mean, variances and axes of the `count` largest principal components."""
    mean = x.mean(0)
    variance, axes = jnp.linalg.eigh((x - mean).T @ (x - mean) / len(x))  # ascending
    return mean, variance[-count:], axes[:, -count:]


# Decoder


def _fit_decoder(vae: VAE, features: dict[tuple[int, int], Features], pictures: Pixels) -> None:
    """Each enlargement is fitted to the encoder's features of its size, the last convolution to the pictures."""
    decoder, chunk = vae.decoder, _chunk()
    z = vae.encode_chunk(None, pictures)[1]
    x = decoder.mid_block(decoder.conv_in(vae.post_quant_conv(z, chunk), chunk), chunk)
    for block in decoder.up_blocks:
        assert isinstance(block, UpBlock)
        for layer in (*block.resnets, *block.upsamplers):
            if isinstance(layer, Upsample):
                target = features[2 * x.shape[2], layer.resample.bias[...].shape[0]]
                _fit_least_squares(layer.resample, x.repeat(2, axis=2).repeat(2, axis=3), target)
            x = layer(x, chunk)
    _fit_least_squares(decoder.conv_out, jax.nn.silu(decoder.norm_out(x)), pictures)


def _fit_least_squares(conv: CausalConv3d | Conv2d, x: Features, y: Float[Array, "b 1 h w o"]) -> None:
    """The 3 x 3 kernel and bias that give `y` best."""
    b, _, h, w, c = x.shape
    padded = jnp.pad(x[:, 0], ((0, 0), (1, 1), (1, 1), (0, 0)))
    patches = [padded[:, i : i + h, j : j + w] for i in range(3) for j in range(3)]
    inputs = jnp.concatenate([*patches, jnp.ones((b, h, w, 1))], -1).reshape(-1, 9 * c + 1)
    square = inputs.T @ inputs
    square += RIDGE * jnp.trace(square) / len(square) * jnp.eye(len(square))
    fitted = jnp.linalg.solve(square, inputs.T @ y.reshape(len(inputs), -1))
    _set(conv, fitted[:-1].reshape(3, 3, c, -1), fitted[-1])


def _chunk() -> Chunk:
    return Chunk(None, "taps")
