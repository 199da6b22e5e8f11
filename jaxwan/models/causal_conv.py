"""Convolutions of the VAE: causal in time, run chunk by chunk with the frames before a chunk as an explicit halo.

A causal convolution of 3 frames needs the 2 frames ahead of its input. For a video's first chunk, which is one frame,
these are zeros: only the last tap of the kernel counts and the convolution is one of images. For later chunks they are
the last frames of its input in the chunk before. `Chunk` hands them from chunk to chunk.

Frames may be split in space (`Chunk.space`): every device then convolves a strip of them, and `conv` fetches the pixels
that it reads beyond it.
"""

import functools
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jaxwan.models.layers import fan_in_normal, param
from jaxwan.sharding.space import AnySpace

Cache = tuple[Array, ...]  # the halos that one chunk leaves to the next, in the order of their convolutions
Formulation = Literal["direct", "taps", "joined", "frames"]
FORMULATIONS: tuple[Formulation, ...] = get_args(Formulation)
Padding = list[tuple[int, int]]  # ahead and behind, of rows and of columns


class Chunk:
    """What convolutions need besides their input: the halos of the chunk before, how to convolve, and how frames are
    split over devices, if they are.

    Lives while one chunk is traced. Every causal convolution takes its halo and leaves the next one, so that `halos()`
    after the last convolution is the cache for the next chunk. A cache of None makes this the first chunk of a video.
    """

    def __init__(self, cache: Cache | None, formulation: Formulation | None = None, space: AnySpace | None = None):
        self.first = cache is None
        self.space = space
        self.formulation: Formulation | None = formulation
        self._before = iter(cache or ())
        self._after: list[Array] = []

    def before(self, x: Float[Array, "b f h w c"], halo: int) -> Float[Array, "b halo h w c"] | None:
        """The `halo` frames ahead of `x`, of which a first chunk has none; the last `halo` frames of both are kept."""
        if self.first:
            missing = halo - x.shape[1]
            self._after.append(jnp.pad(x, ((0, 0), (missing, 0), (0, 0), (0, 0), (0, 0))))
            return None
        before = next(self._before)
        self._after.append(_behind(before[:, x.shape[1] :], x)[:, -halo:])
        return before

    def skip(self, x: Float[Array, "b f h w c"], halo: int) -> None:
        """Keep `halo` zero frames: the convolution does not run, and the next chunk is not to see `x`."""
        assert self.first
        self._after.append(jnp.zeros((x.shape[0], halo, *x.shape[2:]), x.dtype))

    def halos(self) -> Cache:
        """The cache for the next chunk, once all convolutions have run."""
        assert next(self._before, None) is None
        return tuple(self._after)


def default_formulation(c_in: int) -> Formulation:
    """What is fastest where JAX runs, for a convolution of so many channels; `scripts/benchmark.py vae` measures it.

    On CPUs XLA convolves images 1.5 to 7 times faster than videos, the fewer channels the more. Narrow convolutions
    gain from fewer sums, and, as few channels leave some of its threads idle, from being several. Training narrow
    models is fastest with "joined" at all widths.
    """
    if jax.default_backend() != "cpu":
        return "direct"
    return "joined" if c_in <= 16 else "frames" if c_in < 64 else "taps"


def conv(
    x: Float[Array, "b f h w i"],
    kernel: Float[Array, "kt kh kw i o"],
    bias: Float[Array, " o"],
    formulation: Formulation | None = None,
    *,
    before: Float[Array, "b p h w i"] | None = None,
    stride: tuple[int, int] = (1, 1),
    space: AnySpace | None = None,
) -> Float[Array, "b g h2 w2 o"]:
    """Convolution of a video, the one place where pixels of other frames, rows and columns are read.

    before: frames ahead of `x`, as if both were one array. stride is (time, space). Time is not padded. Space is padded
    with zeros: all around for stride 1, below and to the right only for stride 2; where frames are split, with the
    neighbours' pixels. formulation, by default that of the platform: "direct" is XLA's convolution of videos; "taps"
    sums convolutions of images, one for each frame that the kernel sees; "joined" convolves these frames at once, as
    channels of one image; "frames" is "joined" with a convolution for each frame of the result. Only "direct" has
    `before` and `x` copied into one array, which is what cuDNN takes.
    """
    padding = [(size // 2 if stride[1] == 1 else 0, size // 2) for size in kernel.shape[1:3]]  # of rows, of columns
    if space is not None and kernel.shape[space.dim - 1] > 1:
        x, before = space.with_neighbours(_behind(before, x), *padding[space.dim - 2]), None
        padding[space.dim - 2] = (0, 0)
    formulation = formulation or default_formulation(x.shape[-1])
    if formulation == "direct" and kernel.shape[0] > 1:
        return _conv3d(_behind(before, x), kernel, stride, padding) + bias.astype(x.dtype)
    frames = [part[:, i : i + 1] for part in (before, x) if part is not None for i in range(part.shape[1])]
    seen = [frames[i : i + kernel.shape[0]] for i in range(0, len(frames) - kernel.shape[0] + 1, stride[0])]
    if formulation in ("joined", "frames"):
        seen = [[jnp.concatenate(taps, axis=-1)] for taps in seen]
        kernel = kernel.transpose(1, 2, 0, 3, 4).reshape(1, *kernel.shape[1:3], -1, kernel.shape[-1])
    groups = [[taps] for taps in seen] if formulation == "frames" else [seen]  # what is convolved at once
    made = [_sum_of_taps(group, kernel, stride[1], padding) for group in groups]
    return (jnp.concatenate(made, axis=1) + bias).astype(x.dtype)


def _behind(before: Array | None, x: Array) -> Array:
    """Both as one array."""
    return x if before is None else jnp.concatenate([before, x], axis=1)


def _conv3d(x: Array, kernel: Array, stride: tuple[int, int], padding: Padding) -> Array:
    strides = (stride[0], stride[1], stride[1])
    return jax.lax.conv_general_dilated(
        x, kernel, strides, [(0, 0), *padding], dimension_numbers=("NDHWC", "DHWIO", "NDHWC")
    )


def _sum_of_taps(seen: list[list[Array]], kernel: Array, stride: int, padding: Padding) -> Array:
    """Of the frames that each result sees, which are arrays of one frame: each tap's of all results at once."""
    met = (jnp.concatenate(frames, axis=1) for frames in zip(*seen, strict=True))
    made = (_conv2d(images, tap, stride, padding) for images, tap in zip(met, kernel, strict=True))
    return functools.reduce(jnp.add, made)


def _conv2d(x: Array, kernel: Array, stride: int, padding: Padding) -> Array:
    """Each frame by itself, the result in float32 so that taps are summed unrounded."""
    if kernel.shape[:2] == (1, 1):
        return jnp.matmul(x, kernel[0, 0], preferred_element_type=jnp.float32)
    images = x.reshape(-1, *x.shape[2:])
    y = jax.lax.conv_general_dilated(
        images, kernel, (stride, stride), padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"), preferred_element_type=jnp.float32,
    )  # fmt: skip
    return y.reshape(*x.shape[:2], *y.shape[1:])


class Conv2d(nnx.Module):
    """A convolution of each frame by itself."""

    def __init__(self, c_in: int, c_out: int, size: int, *, stride: int = 1, dtype: DTypeLike, rngs: nnx.Rngs):
        self.kernel = param(fan_in_normal((size, size, c_in, c_out), dtype, rngs))
        self.bias = param(jnp.zeros(c_out, dtype))
        self.stride = stride

    def __call__(self, x: Float[Array, "b f h w i"], chunk: Chunk) -> Float[Array, "b f h2 w2 o"]:
        kernel, bias = self.kernel[...][None], self.bias[...]
        return conv(x, kernel, bias, chunk.formulation, stride=(1, self.stride), space=chunk.space)


class CausalConv3d(nnx.Module):
    """A convolution over `size` = (frames, pixels) that sees no later frame; with time_stride 2 it halves the frames.

    Source: diffusers autoencoder_kl_wan.py:WanCausalConv3d and the cache handling around its calls.
    """

    def __init__(self, c_in: int, c_out: int, size: tuple[int, int], *, time_stride: int = 1, dtype: DTypeLike,
                 rngs: nnx.Rngs):  # fmt: skip
        self.kernel = param(fan_in_normal((size[0], size[1], size[1], c_in, c_out), dtype, rngs))
        self.bias = param(jnp.zeros(c_out, dtype))
        self.time_stride = time_stride
        self.halo = size[0] - time_stride

    def __call__(self, x: Float[Array, "b f h w i"], chunk: Chunk) -> Float[Array, "b g h w o"]:
        kernel, before = self.kernel[...], None
        if self.halo > 0:
            before = chunk.before(x, self.halo)
            if chunk.first:
                kernel = kernel[-1:]  # the others meet the zeros ahead of the video
        stride = (self.time_stride, 1)
        return conv(x, kernel, self.bias[...], chunk.formulation, before=before, stride=stride, space=chunk.space)
