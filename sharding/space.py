"""Pictures cut into strips, one on each device, and what a strip needs of the others.

A picture is `size` units along one axis, and an array of it has some pixels a unit there, which may change from layer
to layer. Every device holds `share` units. Units that do not divide leave the last devices with fewer or none, and with
pixels outside of the picture instead: what is computed of them is not looked at, and `with_neighbours` reads zeros.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int, Shaped

from jaxwan.sharding.ring import check_types

AXIS = "space"


def strip_mesh(devices: Iterable[Any]) -> Mesh:
    """Devices in a row: neighbours hold neighbouring strips."""
    return Mesh(np.array(list(devices)), (AXIS,), axis_types=(AxisType.Auto,))


@dataclass(frozen=True)
class Space:
    """How the axis `dim` of a picture's arrays is split over a mesh of one axis, `strip_mesh`.

    An abstract mesh is enough for sizes.
    """

    mesh: Mesh | AbstractMesh
    dim: int
    size: int  # units of the picture along it

    @property
    def share(self) -> int:
        """Units on each device."""
        return -(-self.size // self.mesh.size)

    @property
    def spec(self) -> PartitionSpec:
        """Of an array that is split."""
        return PartitionSpec(*[None] * self.dim, AXIS)

    @property
    def sharding(self) -> NamedSharding:
        """Of an array that is split."""
        return NamedSharding(self.mesh, self.spec)

    def strip(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The shape of what each device holds of a picture's array."""
        pixels = shape[self.dim] // self.size * self.share
        return (*shape[: self.dim], pixels, *shape[self.dim + 1 :])

    # On the host

    def padded(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The shape of the array that holds a picture's, with what is outside of it."""
        pixels = self.strip(shape)[self.dim] * self.mesh.size
        return (*shape[: self.dim], pixels, *shape[self.dim + 1 :])

    def split(self, x: Shaped[np.ndarray, "*s"]) -> Shaped[Array, "*p"]:
        """A picture on the devices."""
        more = [(0, after - before) for before, after in zip(x.shape, self.padded(x.shape), strict=True)]
        return jax.device_put(np.pad(x, more) if any(n for _, n in more) else x, self.sharding)

    def join(self, x: Shaped[Array, "*p"]) -> Shaped[np.ndarray, "*s"]:
        """The picture that the devices hold, without what is outside of it."""
        return self.picture(np.asarray(x))

    def picture(self, x: Any) -> Any:
        """An array of all strips without what is outside of the picture."""
        pixels = x.shape[self.dim] // (self.share * self.mesh.size) * self.size
        return x[(slice(None),) * self.dim + (slice(pixels),)]

    def spread(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function(whole, *split)` of what all devices have and of trees of strips, to trees of strips, as a function
        of whole arrays: every device runs it on its strip."""

        def run(whole, *split):
            specs = (PartitionSpec(), *[self.spec] * len(split))
            sharded = jax.shard_map(
                function, mesh=self.mesh, in_specs=specs, out_specs=self.spec, check_vma=check_types(self.mesh)
            )
            return sharded(whole, *split)

        return run

    # Inside of what is spread

    def with_neighbours(self, x: Shaped[Array, "*s"], before: int, after: int) -> Shaped[Array, "*p"]:
        """A strip between the last `before` pixels of the strip ahead of it and the first `after` of the next one.

        Pixels outside of the picture are zeros, those of the strip itself too. A strip is at least as wide as it gives.
        """
        x = self._picture_alone(x)
        last, parts = self.mesh.size - 1, [x]
        if before:
            end = jax.lax.slice_in_dim(x, x.shape[self.dim] - before, None, axis=self.dim)
            parts.insert(0, jax.lax.ppermute(end, AXIS, [(i, i + 1) for i in range(last)]))  # the first receives zeros
        if after:
            start = jax.lax.slice_in_dim(x, 0, after, axis=self.dim)
            parts.append(jax.lax.ppermute(start, AXIS, [(i + 1, i) for i in range(last)]))
        return jnp.concatenate(parts, axis=self.dim)

    def gather(self, x: Shaped[Array, "*s"]) -> Shaped[Array, "*p"]:
        """The whole picture, on every device."""
        whole = jax.lax.all_gather(x, AXIS, axis=self.dim, tiled=True)
        return jax.lax.slice_in_dim(whole, 0, x.shape[self.dim] // self.share * self.size, axis=self.dim)

    def _picture_alone(self, x: Array) -> Array:
        """x with zeros outside of the picture; x itself where nothing is."""
        if self.size == self.share * self.mesh.size:
            return x
        pixels = x.shape[self.dim]
        first = jax.lax.axis_index(AXIS) * pixels
        inside = first + jnp.arange(pixels) < pixels // self.share * self.size
        return jnp.where(inside.reshape(-1, *[1] * (x.ndim - 1 - self.dim)), x, jnp.zeros_like(x))

    def bias(self, x: Shaped[Array, "b f h w c"]) -> None:
        """What attention adds to the logits of a gathered picture's pixels: nothing, none is outside of it."""


class Filled(NamedTuple):
    """A picture in an array that is larger, from its first row and column on: several sizes for one program.

    Behind the picture are zeros to those who ask for neighbours, and pixels that attention does not see; what is
    computed there is not looked at. Units are as of `Space`, and the methods are those that it has inside.
    """

    units: Int[Array, " 2"]  # rows and columns of the picture
    whole: tuple[int, int]  # and of the array

    dim = 2  # rows are those that come back with neighbours; to columns who asks adds zeros, as without a space

    def with_neighbours(self, x: Shaped[Array, "b f h w c"], before: int, after: int) -> Shaped[Array, "b f g w c"]:
        """x with rows of zeros around it, and zeros behind the picture."""
        x = jnp.where(self._inside(x)[..., None], x, jnp.zeros_like(x))
        return jnp.pad(x, ((0, 0), (0, 0), (before, after), (0, 0), (0, 0)))

    def gather(self, x: Shaped[Array, "b f h w c"]) -> Shaped[Array, "b f h w c"]:
        """x, which is all there is."""
        return x

    def bias(self, x: Shaped[Array, "b f h w c"]) -> Float[Array, "bf hw"]:
        """What attention adds to the logits of the pixels of each frame: 0, and -inf behind the picture."""
        row = jnp.where(self._inside(x).reshape(-1), 0.0, -jnp.inf)
        return jnp.broadcast_to(row, (x.shape[0] * x.shape[1], row.size))

    def _inside(self, x: Array) -> Bool[Array, "h w"]:
        rows, columns = (
            jnp.arange(pixels) < pixels // whole * filled
            for pixels, whole, filled in zip(x.shape[2:4], self.whole, self.units, strict=True)
        )
        return rows[:, None] & columns


AnySpace = Space | Filled
