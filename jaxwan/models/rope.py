"""Rotary position embedding over time, height and width: each axis has its own share of the head and its own base."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


def axis_widths(head_dim: int) -> tuple[int, int, int]:
    """How a head's channels are shared by (t, h, w): 128 -> (44, 42, 42), 20 -> (8, 6, 6)."""
    spatial = 2 * (head_dim // 6)
    return head_dim - 2 * spatial, spatial, spatial


def rope_tables(
    grid: tuple[int, int, int], head_dim: int, theta: float = 10000.0
) -> tuple[Float[Array, "s k2"], Float[Array, "s k2"]]:
    """cos and sin of every token's angles, tokens in (t, h, w) order, one column a channel pair.

    Angles are computed in float64 on the host, one small table an axis, and only broadcast on the device: as constants
    of the program they are a few kilobytes, where the full table of 75,600 tokens would be 39 MB.
    Source: diffusers transformer_wan.WanRotaryPosEmbed.
    """
    axes = []
    for size, width in zip(grid, axis_widths(head_dim), strict=True):
        inverse = theta ** -(np.arange(0, width, 2, dtype=np.float64) / width)
        axes.append(np.outer(np.arange(size, dtype=np.float64), inverse))
    return _spread([np.cos(a) for a in axes], grid), _spread([np.sin(a) for a in axes], grid)


def _spread(axes: list[np.ndarray], grid: tuple[int, int, int]) -> Array:
    parts = []
    for axis, table in enumerate(axes):
        shape = [1, 1, 1, table.shape[1]]
        shape[axis] = grid[axis]
        parts.append(jnp.broadcast_to(jnp.asarray(table, jnp.float32).reshape(shape), (*grid, table.shape[1])))
    return jnp.concatenate(parts, axis=-1).reshape(-1, sum(t.shape[1] for t in axes))


def rotate(
    x: Float[Array, "b s n k"], rope: tuple[Float[Array, "s k2"], Float[Array, "s k2"]]
) -> Float[Array, "b s n k"]:
    """Turn each adjacent channel pair of every head by its token's angle; in float32, result in x's dtype."""
    cos, sin = (table[:, None, :] for table in rope)
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)
    a, b = pairs[..., 0], pairs[..., 1]
    turned = jnp.stack([a * cos - b * sin, a * sin + b * cos], axis=-1)
    return turned.reshape(x.shape).astype(x.dtype)
