"""Blending of overlapping tiles into a picture: one public function, named implementations.

Diffusers blends tiles in place, one after the other in reading order: the top of a tile with the bottom of the one
above, then its left with the right of the one before it, both of which have been blended themselves. With

    mix(w, a, b) = w a + (1 - w) b,    wy = y / (rows of the overlap),    wx = x / (columns of it),    SH, SW strides

t(i,j) for tiles as they come, T(i,j) for blended ones, and y, x where both overlaps meet (elsewhere w is 1):

    T(i,j)[y, x] = mix(wx, V[y, x], T(i,j-1)[y, x + SW]),    V[y, x] = mix(wy, t(i,j)[y, x], T(i-1,j)[y + SH, x])

Overlaps are no wider than the stride. So the bottom that a tile lends lies below its own top, and the right that it
lends beside its own left: either was blended across the other seam alone.

    T(i-1,j)[y + SH, x] = mix(wx, t(i-1,j)[y + SH, x], t(i-1,j-1)[y + SH, x + SW])
    T(i,j-1)[y, x + SW] = mix(wy, t(i,j-1)[y, x + SW], t(i-1,j-1)[y + SH, x + SW])

These four lines are the closed form: any pixel from at most four tiles as they came, in any order. It is no product of
a row's weight and a column's: the tile above enters with (1 - wy) wx^2, as it was blended once before it is lent.

Tiles at the far ends are as thin as the picture leaves them, and overlaps as thin as the tile: y counts from the top of
a tile, and a tile that ends early ends where the picture does, as does the one before it. So y + SH still names the
same row of the picture in the tile above, and only wy = y / min(overlap, rows of the tile) changes.

Source: diffusers autoencoder_kl_wan.py:AutoencoderKLWan.tiled_decode, blend_v, blend_h.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

IMPLEMENTATIONS = ("xla", "pallas", "interpret")
BLOCK = 1024  # values of a row that a program of the Pallas kernel makes: a power of two, as Triton wants


def blend(
    tiles: Float[Array, "i j b f h w c"],
    size: tuple[int, int],
    stride: tuple[int, int],
    *,
    patch: int = 1,
    implementation: str | None = None,
) -> Float[Array, "b f y x c"]:
    """The picture of `size` (rows, columns) that tiles make which begin `stride` (rows, columns) after one another.

    Tiles that reach over the picture's end count up to it; what they hold behind it is not looked at. patch: side of
    the squares of pixels that have one weight, as in pictures that are blended while squares are folded into channels.
    Computed in float32. implementation: "xla", the default, runs anywhere; "pallas" is a kernel for CUDA, by way of
    Triton; "interpret" is that kernel run by XLA, for tests. A named one either runs or raises.

    Raises ValueError for an unknown implementation, other numbers of tiles than `size` takes, and overlaps that are
    wider than the stride, of which the closed form is not true.
    """
    chosen = "xla" if implementation is None else implementation
    if chosen not in IMPLEMENTATIONS:
        raise ValueError(f"implementation={chosen!r} is unknown: choose one of {', '.join(IMPLEMENTATIONS)}")
    _check(tiles.shape, size, stride)
    if chosen == "xla":
        return blend_by_slices(tiles, size, stride, patch).astype(tiles.dtype)
    return _pallas(tiles, size, stride, patch, interpret=chosen == "interpret")


def _check(shape: tuple[int, ...], size: tuple[int, int], stride: tuple[int, int]) -> None:
    for axis, count, tile, whole, step in zip(("rows", "columns"), shape[:2], shape[4:6], size, stride, strict=False):
        if not step <= tile <= 2 * step:
            raise ValueError(f"tiles of {tile} {axis} cannot begin {step} apart: from {-(-tile // 2)} to {tile} can")
        if count != -(-whole // step):
            raise ValueError(f"{count} tiles for {whole} {axis}, which take {-(-whole // step)} of stride {step}")


# The reference


def blend_by_slices(
    tiles: Float[Array, "i j b f h w c"], size: tuple[int, int], stride: tuple[int, int], patch: int = 1
) -> Float[Array, "b f y x c"]:
    """The closed form in float32, on whole arrays of tiles: the oracle of the kernel, and one fusion for XLA."""
    (rows, columns, *_, c), (high, wide) = tiles.shape, stride
    tiles = tiles.astype(jnp.float32)
    wy = _weights(size[0], tiles.shape[4], high, patch)[:, None, None, None, :, None, None]
    wx = _weights(size[1], tiles.shape[5], wide, patch)[None, :, None, None, None, :, None]
    own, right = tiles[..., :wide, :], _lent(tiles, axis=5, stride=wide)
    above, corner = (_lent(part, axis=4, stride=high) for part in (own, right))
    own, left = own[..., :high, :, :], right[..., :high, :, :]
    y = _mix(wx, _mix(wy, own, _mix(wx, above, corner)), _mix(wy, left, corner))
    y = y.transpose(2, 3, 0, 4, 1, 5, 6).reshape(*tiles.shape[2:4], rows * high, columns * wide, c)
    return y[:, :, : size[0], : size[1]]


def _lent(tiles: Array, axis: int, stride: int) -> Array:
    """What each tile borrows from the one before it along `axis`: that one from `stride` on, and zeros behind."""
    lent = jax.lax.slice_in_dim(tiles, stride, None, axis=axis)
    padding = [(0, 0)] * tiles.ndim
    padding[axis] = 0, stride - lent.shape[axis]
    lent, before = jnp.pad(lent, padding), axis - 4  # axes 0 and 1 count tiles down and across
    first = jax.lax.slice_in_dim(lent, 0, 1, axis=before)  # has none before it, and borrows with weight 0
    return jnp.concatenate([first, jax.lax.slice_in_dim(lent, 0, -1, axis=before)], axis=before)


def _weights(whole: int, tile: int, stride: int, patch: int) -> Float[np.ndarray, "i s"]:
    """A tile's own share in each of its first `stride` rows: 1 behind the overlap, and in all of the first tile."""
    starts, y = np.arange(0, whole, stride)[:, None], np.arange(stride)
    overlap = np.minimum(tile - stride, whole - starts)
    weights = (y - y % patch) / np.maximum(overlap, 1)
    return np.where((starts == 0) | (y >= overlap), 1, weights).astype(np.float32)


def _mix(weight: Any, own: Any, other: Any) -> Any:
    """Where its weight is 0, `other` is not looked at: there it may be what lies behind a tile."""
    return jnp.where(weight < 1, weight * own + (1 - weight) * other, own)


# The Pallas kernel


def _pallas(tiles: Array, size: tuple[int, int], stride: tuple[int, int], patch: int, *, interpret: bool) -> Array:
    """A program makes BLOCK values of one row of the picture: it looks its pixels up in the tiles, as flat arrays.

    Whatever the sizes are, blocks are powers of two; what does not fill the last one is masked.
    """
    from jax.experimental.pallas import triton

    if tiles.size >= 2**31:
        raise ValueError(f"implementation='pallas' indexes tiles of up to 2^31 values, not {tiles.size}: blend fewer")
    _, _, b, f, _, _, c = tiles.shape
    kernel = partial(_kernel, shape=tiles.shape, size=size, stride=stride, patch=patch, io=triton)
    flat = pl.pallas_call(
        kernel, out_shape=jax.ShapeDtypeStruct((b * f * size[0] * size[1] * c,), tiles.dtype),
        grid=(b * f * size[0], pl.cdiv(size[1] * c, BLOCK)), interpret=interpret,
        compiler_params=None if interpret else triton.CompilerParams(num_warps=4),
    )(tiles.reshape(-1))  # fmt: skip
    return flat.reshape(b, f, *size, c)


def _kernel(tiles: Any, out: Any, *, shape: tuple[int, ...], size: tuple[int, int], stride: tuple[int, int],
            patch: int, io: Any) -> None:  # fmt: skip
    """Crop and both blends, of values of one row."""
    _, across, b, f, h, w, c = shape
    row, at = pl.program_id(0), pl.program_id(1) * BLOCK + jnp.arange(BLOCK, dtype=jnp.int32)
    inside = at < size[1] * c
    (frame, line), (column, channel) = _divmod(row, size[0]), _divmod(at, c)
    (i, y), (j, x) = _divmod(line, stride[0]), _divmod(column, stride[1])
    wy, wx = _weight(i, y, size[0], h, stride[0], patch), _weight(j, x, size[1], w, stride[1], patch)

    def tile(up: int, left: int) -> Array:
        """The pixel in this tile, or in the one before it, by as much further in."""
        seen = inside & (wy < 1 if up else True) & (wx < 1 if left else True)
        pixel = (((i - up) * across + j - left) * b * f + frame) * h + y + up * stride[0]
        index = (pixel * w + x + left * stride[1]) * c + channel
        return io.load(tiles.at[index], mask=seen, other=0.0).astype(jnp.float32)

    corner = tile(1, 1)
    above, left = _mix(wx, tile(1, 0), corner), _mix(wy, tile(0, 1), corner)
    made = _mix(wx, _mix(wy, tile(0, 0), above), left)
    io.store(out.at[row * size[1] * c + at], made.astype(out.dtype), mask=inside)


def _divmod(a: Array, b: int) -> tuple[Array, Array]:
    """Of what is not negative: Python's operators would spend instructions on signs."""
    return jax.lax.div(a, jnp.int32(b)), jax.lax.rem(a, jnp.int32(b))


def _weight(tile: Array, y: Array, whole: int, high: int, stride: int, patch: int) -> Array:
    """`_weights`, of one row of one tile."""
    overlap = jnp.minimum(high - stride, whole - tile * stride)
    weight = (y - jax.lax.rem(y, jnp.int32(patch))).astype(jnp.float32) / jnp.maximum(overlap, 1).astype(jnp.float32)
    return jnp.where((tile == 0) | (y >= overlap), 1.0, weight)
