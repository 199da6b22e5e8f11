"""Collectives along one mesh axis, inside shard_map. On an axis of size 1 they leave nothing in the program.

A size is a Python number here, so that one program text serves every mesh. Sums and means along None are x itself: of
a model that knows no mesh.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Shaped


def position(axis: str) -> jax.Array | int:
    """This device's place along a mesh axis. Size 1: plain 0, which varies over nothing."""
    return jax.lax.axis_index(axis) if jax.lax.axis_size(axis) > 1 else 0


def shift(x: jax.Array, axis: str, by: int = 1) -> jax.Array:
    """Pass x `by` positions on along a mesh axis, the last to the first. Size 1: x itself."""
    size = jax.lax.axis_size(axis)
    if size == 1:
        return x
    return jax.lax.ppermute(x, axis, [(i, (i + by) % size) for i in range(size)])


def psum(x: jax.Array, axis: str | None) -> jax.Array:
    """The sum over a mesh axis, the same on all of its positions. Size 1: x itself."""
    return jax.lax.psum(x, axis) if axis is not None and jax.lax.axis_size(axis) > 1 else x


def pmean(x: jax.Array, axis: str | None) -> jax.Array:
    """The mean over a mesh axis, the same on all of its positions. Size 1: x itself."""
    return jax.lax.pmean(x, axis) if axis is not None and jax.lax.axis_size(axis) > 1 else x


def trade(x: jax.Array, axis: str, *, give: int, take: int, among: int) -> jax.Array:
    """Each position keeps its part of the array's axis `give` and gets that part from `among` neighbours, itself
    included, which then follow each other along the array's axis `take`. Among 1: x itself."""
    if among == 1:
        return x
    size = jax.lax.axis_size(axis)
    groups = None if among == size else np.arange(size).reshape(-1, among).tolist()
    return jax.lax.all_to_all(x, axis, give, take, tiled=True, axis_index_groups=groups)


def gather(x: Shaped[Array, "*s"], axis: str) -> Shaped[Array, "n *s"]:
    """x of all positions along a mesh axis, in their order, the same on all of them. Size 1: x alone.

    A sum of rows of which all but one are zero, which is exact (CPUs may take what is below 1e-38 as zero);
    `jax.lax.all_gather` would leave the type varying.
    """
    places = jnp.arange(jax.lax.axis_size(axis)).reshape(-1, *[1] * x.ndim)
    return psum(jnp.where(places == position(axis), x, jnp.zeros_like(x)), axis)
