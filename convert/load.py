"""Checkpoint tensors into device arrays, one tensor at a time.

A large parameter that stacks layers or experts is never stacked on the host: its device shards are allocated as zeros
and each tensor is written into its row by a donated update, so the peak is one tensor above the parameters themselves.
Small ones are stacked on the host, because a program for each of their shapes would take longer to compile than they to
copy. Rows that no tensor fills stay zero: the ring's padding layers.
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
from jaxwan.convert.foreign import describe_tensors
from jaxwan.convert.rules import CheckpointError, Rule, Shape, Target, plan

ON_HOST = 2**24  # bytes of a stacked parameter that is still stacked on the host

OnBytes = Callable[[int], None]  # called with the bytes of each tensor once it is placed


def load_module(
    make: Callable[[], nnx.Module],
    files: TensorFiles,
    rules: Sequence[Rule],
    *,
    device: jax.Device | None = None,
    what: str = "checkpoint",
    progress: OnBytes | None = None,
):
    """The module that `make` builds (under eval_shape), its parameters read from `files` onto one device."""
    graph, abstract = nnx.split(nnx.eval_shape(make))
    return nnx.merge(graph, load_state(abstract, files, rules, device=device, what=what, progress=progress))


def load_state(
    abstract: nnx.State,
    files: TensorFiles,
    rules: Sequence[Rule],
    *,
    device: jax.Device | None = None,
    what: str = "checkpoint",
    progress: OnBytes | None = None,
) -> nnx.State:
    """Parameters of these shapes, read from `files` onto one device."""
    shapes = flat_shapes(abstract)
    found = prove({path: s.shape for path, s in shapes.items()}, files, rules, what=what)
    place = SingleDeviceSharding(device or jax.devices()[0])
    arrays = load_arrays({path: (s, place) for path, s in shapes.items()}, [((), files, found)], progress)
    return fill(abstract, arrays)


def prove(targets: Mapping[str, Shape], files: TensorFiles, rules: Sequence[Rule], *, what: str) -> dict[str, Target]:
    """Where each tensor of `files` goes among parameters of these shapes; only headers are read.

    Raises CheckpointError that says what the files look like instead, if that is known, counts the missing, extra and
    mis-shaped tensors, or those that hold no floats, and names a few.
    """
    try:
        found = plan(files.shapes, targets, rules, what=what)
        files.check_dtypes(found)
    except CheckpointError as error:
        told = describe_tensors(files.dtypes)
        if told is None:
            raise
        raise CheckpointError(f"{what} {told} ({str(error).removeprefix(what).lstrip(': ')})") from error
    return found


def flat_shapes(abstract: nnx.State) -> dict[str, jax.ShapeDtypeStruct]:
    """Dotted path -> shape, dtype and sharding (if it has one) of every parameter of an abstract state."""
    return {
        ".".join(map(str, path)): jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.get_value().sharding)
        for path, leaf in nnx.to_flat_state(abstract)
    }


def fill(abstract: nnx.State, arrays: Mapping[str, Array]) -> nnx.State:
    """An abstract state with its leaves replaced by the arrays of the same path."""
    flat = [(path, leaf.replace(arrays[".".join(map(str, path))])) for path, leaf in nnx.to_flat_state(abstract)]
    return nnx.from_flat_state(flat)


def load_arrays(
    targets: Mapping[str, tuple[jax.ShapeDtypeStruct, Sharding]],
    sources: Sequence[tuple[tuple[int, ...], TensorFiles, Mapping[str, Target]]],
    progress: OnBytes | None = None,
) -> dict[str, Array]:
    """Global arrays of `targets` (path -> shape, dtype, sharding), filled from `sources`.

    A source is (prefix, files, found): its tensors go to rows `prefix + (layer,)` of the parameters, where prefix is
    the expert. Shardings may split only those leading axes. Tensors are read in the order in which they lie on disk.
    """
    rows = {into.path for prefix, _, found in sources for into in found.values() if prefix or into.layer is not None}
    small = {path for path in rows if _bytes(targets[path][0]) <= ON_HOST}
    stacks = {path: _HostStack(*targets[path]) for path in small}
    large = {path: targets[path] for path in sorted(rows - small)}
    stacks |= {path: _Stack(zeros) for path, zeros in (_zeros(large) if large else {}).items()}
    whole: dict[str, Array] = {}

    def place(prefix: tuple[int, ...], into: Target, tensor: np.ndarray) -> int:
        """Takes the tensor as an argument, so that no name keeps it while the next one is read."""
        target, sharding = targets[into.path]
        row = prefix if into.layer is None else (*prefix, into.layer)
        if not row:
            value = np.ascontiguousarray(into.transform.apply(tensor)).astype(target.dtype)
            whole[into.path] = jax.device_put(value, sharding)
        else:
            stacks[into.path].write(row, tensor, into.transform.axes)
        return tensor.nbytes

    for prefix, files, found in sources:
        for key in files.shapes:
            if key in found:
                placed = place(prefix, found[key], files.read(key))
                if progress is not None:
                    progress(placed)
    return whole | {path: stack.array() for path, stack in stacks.items()}


class _HostStack:
    """One stacked parameter under construction, on the host."""

    def __init__(self, target: jax.ShapeDtypeStruct, sharding: Sharding):
        self.rows, self.sharding = np.zeros(target.shape, target.dtype), sharding

    def write(self, row: tuple[int, ...], tensor: np.ndarray, axes: tuple[int, ...] | None) -> None:
        self.rows[row] = (tensor if axes is None else tensor.transpose(axes)).astype(self.rows.dtype)

    def array(self) -> Array:
        return jax.make_array_from_callback(self.rows.shape, self.sharding, lambda part: self.rows[part])


class _Stack:
    """One stacked parameter under construction: its shard on every device of this process."""

    def __init__(self, zeros: Array):
        self.shape, self.sharding = zeros.shape, zeros.sharding
        self.shards = {shard.device: shard.data for shard in zeros.addressable_shards}
        self.held = {
            shard.device: [range(*part.indices(size)) for part, size in zip(shard.index, self.shape, strict=True)]
            for shard in zeros.addressable_shards
        }

    def write(self, row: tuple[int, ...], tensor: np.ndarray, axes: tuple[int, ...] | None) -> None:
        for device, held in self.held.items():
            if all(r in own for r, own in zip(row, held, strict=False)):
                local = np.array([r - own.start for r, own in zip(row, held, strict=False)], np.int32)
                # put in the call, so that no name keeps one device's copy while the next is made
                new = _write_row(self.shards[device], jax.device_put(tensor, device), local, axes=axes)
                self.shards[device] = new.block_until_ready()

    def array(self) -> Array:
        shards = list(self.shards.values())
        return jax.make_array_from_single_device_arrays(self.shape, self.sharding, shards)


def _bytes(target: jax.ShapeDtypeStruct) -> int:
    return target.size * target.dtype.itemsize


def _zeros(targets: Mapping[str, tuple[jax.ShapeDtypeStruct, Sharding]]) -> dict[str, Array]:
    """Zeros of every target, made where they belong (jnp.zeros(device=…) would copy from the first device).

    One program for all of them: a program a shape takes seconds to compile.
    """
    shardings = {path: sharding for path, (_, sharding) in targets.items()}
    make = jax.jit(lambda: {p: jnp.zeros(t.shape, t.dtype) for p, (t, _) in targets.items()}, out_shardings=shardings)
    return make()


@partial(jax.jit, donate_argnums=0, static_argnames="axes")
def _write_row(buffer: Array, tensor: Array, row: Array, *, axes: tuple[int, ...] | None) -> Array:
    """buffer[row] = tensor, permuted and cast on the device (both are slow on the host)."""
    value = (tensor if axes is None else tensor.transpose(axes)).astype(buffer.dtype)
    starts = [row[i] for i in range(row.shape[0])] + [0] * value.ndim
    return jax.lax.dynamic_update_slice(buffer, value[(None,) * row.shape[0]], starts)
