"""Checkpoint tensors into device arrays, one tensor at a time.

A parameter that stacks layers or experts is never stacked on the host: its device shards are allocated as zeros and
each tensor is written into its row by a donated update, so the peak is one tensor above the parameters themselves. Rows
that no tensor fills stay zero: the ring's padding layers.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Sharding, SingleDeviceSharding
from jaxtyping import Array

from jaxwan.convert.files import TensorFiles
from jaxwan.convert.rules import Rule, Slot, plan

Progress = Callable[[int], None]  # called with the bytes of each tensor once it is placed


def load_module(
    make: Callable[[], nnx.Module],
    files: TensorFiles,
    rules: Sequence[Rule],
    *,
    device: jax.Device | None = None,
    what: str = "checkpoint",
    progress: Progress | None = None,
):
    """The module that `make` builds (under eval_shape), its parameters read from `files` onto one device."""
    graph, abstract = nnx.split(nnx.eval_shape(make))
    shapes = flat_shapes(abstract)
    slots = prove(make, files, rules, what=what)
    place = SingleDeviceSharding(device or jax.devices()[0])
    arrays = load_arrays({path: (s, place) for path, s in shapes.items()}, [((), files, slots)], progress)
    return nnx.merge(graph, fill(abstract, arrays))


def prove(make: Callable[[], nnx.Module], files: TensorFiles, rules: Sequence[Rule], *, what: str) -> dict[str, Slot]:
    """Where each tensor of `files` goes in the module that `make` builds; only headers are read.

    Raises CheckpointError naming every missing, extra and mis-shaped tensor.
    """
    shapes = flat_shapes(nnx.split(nnx.eval_shape(make))[1])
    slots = plan(files.shapes, {path: s.shape for path, s in shapes.items()}, rules, what=what)
    files.check_dtypes(slots)
    return slots


def flat_shapes(abstract: nnx.State) -> dict[str, jax.ShapeDtypeStruct]:
    """Dotted path -> shape and dtype of every parameter of an abstract state."""
    return {
        ".".join(map(str, path)): jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
        for path, leaf in nnx.to_flat_state(abstract)
    }


def fill(abstract: nnx.State, arrays: Mapping[str, Array]) -> nnx.State:
    """An abstract state with its leaves replaced by the arrays of the same path."""
    flat = [(path, leaf.replace(arrays[".".join(map(str, path))])) for path, leaf in nnx.to_flat_state(abstract)]
    return nnx.from_flat_state(flat)


def load_arrays(
    targets: Mapping[str, tuple[jax.ShapeDtypeStruct, Sharding]],
    sources: Sequence[tuple[tuple[int, ...], TensorFiles, Mapping[str, Slot]]],
    progress: Progress | None = None,
) -> dict[str, Array]:
    """Global arrays of `targets` (path -> shape, dtype, sharding), filled from `sources`.

    A source is (prefix, files, slots): its tensors go to rows `prefix + (layer,)` of the parameters, where prefix is
    the expert. Shardings may split only those leading axes. Tensors are read in the order in which they lie on disk.
    """
    stacks: dict[str, _Stack] = {}
    whole: dict[str, Array] = {}
    for prefix, files, slots in sources:
        for key in files.shapes:
            if key not in slots:
                continue
            slot, tensor = slots[key], files.read(key)
            target, sharding = targets[slot.path]
            row = prefix if slot.layer is None else (*prefix, slot.layer)
            if row:
                stacks.setdefault(slot.path, _Stack(target, sharding)).write(row, tensor, slot.transform.axes)
            else:
                value = np.ascontiguousarray(slot.transform.apply(tensor)).astype(target.dtype)
                whole[slot.path] = jax.device_put(value, sharding)
            if progress is not None:
                progress(tensor.nbytes)
    return whole | {path: stack.array() for path, stack in stacks.items()}


class _Stack:
    """One stacked parameter under construction: its shard on every device of this process."""

    def __init__(self, target: jax.ShapeDtypeStruct, sharding: Sharding):
        self.target, self.sharding = target, sharding
        self.index = sharding.addressable_devices_indices_map(target.shape)
        local = sharding.shard_shape(target.shape)
        self.shards = {device: jnp.zeros(local, target.dtype, device=device) for device in self.index}

    def write(self, row: tuple[int, ...], tensor: np.ndarray, axes: tuple[int, ...] | None) -> None:
        for device, index in self.index.items():
            starts = [(s.start or 0) for s in index[: len(row)]]
            stops = [self.target.shape[i] if s.stop is None else s.stop for i, s in enumerate(index[: len(row)])]
            if all(a <= r < b for a, r, b in zip(starts, row, stops, strict=True)):
                local = np.array([r - a for r, a in zip(row, starts, strict=True)], np.int32)
                moved = jax.device_put(tensor, device)
                self.shards[device] = _write_row(self.shards[device], moved, local, axes=axes).block_until_ready()

    def array(self) -> Array:
        shards = list(self.shards.values())
        return jax.make_array_from_single_device_arrays(self.target.shape, self.sharding, shards)


@partial(jax.jit, donate_argnums=0, static_argnames="axes")
def _write_row(buffer: Array, tensor: Array, row: Array, *, axes: tuple[int, ...] | None) -> Array:
    """buffer[row] = tensor, permuted and cast on the device (both are slow on the host)."""
    value = (tensor if axes is None else tensor.transpose(axes)).astype(buffer.dtype)
    starts = [row[i] for i in range(row.shape[0])] + [0] * value.ndim
    return jax.lax.dynamic_update_slice(buffer, value[(None,) * row.shape[0]], starts)
