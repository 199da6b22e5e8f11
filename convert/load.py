"""Checkpoint tensors into device arrays, one tensor at a time.

A process reads what its own devices hold and nothing else (`plan_reads`), however the shardings cut the parameters.

A large parameter that stacks layers or experts is never stacked on the host: its device shards are allocated as zeros
and each tensor is written into its row by a donated update, so the peak is one tensor above the parameters themselves.
Small ones are stacked on the host, because a program for each of their shapes would take longer to compile than they to
copy. Rows that no tensor fills stay zero: the ring's padding layers.
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Sharding, SingleDeviceSharding
from jaxtyping import Array

from jaxwan.convert.files import TensorFiles
from jaxwan.convert.foreign import describe_tensors
from jaxwan.convert.rules import CheckpointError, Rule, Shape, Target, Transform, plan

ON_HOST = 2**24  # bytes of a stacked parameter that is still stacked on the host

OnBytes = Callable[[int], None]  # called with the bytes of what was read, once it is placed

Box = tuple[range, ...]  # a range on each axis of an array
Targets = Mapping[str, tuple[jax.ShapeDtypeStruct, Sharding]]  # path -> shape, dtype and where its parts lie
# Expert or nothing, files, key -> where it goes: tensors go to rows `expert + (layer,)` of the parameters
Source = tuple[tuple[int, ...], TensorFiles, Mapping[str, Target]]


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
    placed: nnx.State | None = None,
    what: str = "checkpoint",
    progress: OnBytes | None = None,
) -> nnx.State:
    """Parameters of these shapes, read from `files` to where the shapes say that they lie, else onto one device.

    placed: instead, where; of shapes that may have more rows than `abstract`, zeros behind those of the files.
    """
    found = prove({path: s.shape for path, s in flat_shapes(abstract).items()}, files, rules, what=what)
    targets = targets_of(abstract if placed is None else placed, SingleDeviceSharding(device or jax.devices()[0]))
    return fill(abstract, load_arrays(targets, [((), files, found)], progress))


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


def targets_of(
    abstract: nnx.State, otherwise: Sharding | None = None
) -> dict[str, tuple[jax.ShapeDtypeStruct, Sharding]]:
    """Where an abstract state says that its parameters lie; those of which it says nothing lie as `otherwise`."""
    targets = {}
    for path, shape in flat_shapes(abstract).items():
        sharding = shape.sharding or otherwise
        assert sharding is not None, path
        targets[path] = shape, sharding
    return targets


def fill(abstract: nnx.State, arrays: Mapping[str, Array]) -> nnx.State:
    """An abstract state with its leaves replaced by the arrays of the same path."""
    flat = [(path, leaf.replace(arrays[".".join(map(str, path))])) for path, leaf in nnx.to_flat_state(abstract)]
    return nnx.from_flat_state(flat)


@dataclass(frozen=True)
class Part:
    """What devices hold of a tensor, all of these the same.

    box: what they hold of the parameter, a range on each axis. cut: where that is in what was read of the tensor.
    """

    devices: tuple[jax.Device, ...]
    box: Box
    cut: tuple[slice, ...]


@dataclass(frozen=True)
class Read:
    """Rows (None: all) of a source's tensor, read at once, and the parts of them that devices hold.

    row: where the tensor is in the parameter's leading axes, expert and layer; () if it has neither.
    """

    source: int
    key: str
    rows: slice | None
    num_bytes: int
    into: Target
    row: tuple[int, ...]
    parts: tuple[Part, ...]


def plan_reads(targets: Targets, sources: Sequence[Source], devices: Collection[jax.Device]) -> list[Read]:
    """What has to be read for these devices to hold their parts of `targets`, in the order in which it lies on disk.

    A tensor of which they hold nothing, such as one of another's layer, is not in it, and neither are rows of a tensor
    (along its own first axis) that none of them holds. Along its other axes all is read, and cut.
    """
    boxes = {path: _boxes(shape.shape, sharding, devices) for path, (shape, sharding) in targets.items()}
    reads = []
    for number, (prefix, files, found) in enumerate(sources):
        for key, shape in files.shapes.items():
            if key in found:
                into = found[key]
                row = prefix if into.layer is None else (*prefix, into.layer)
                parts = _parts_by_rows(shape, into.transform, row, boxes[into.path])
                for first in sorted(parts, key=lambda first: first.start):
                    rows = None if len(first) == math.prod(shape[:1]) else slice(first.start, first.stop)
                    num_bytes = files.num_bytes(key, rows)
                    reads.append(Read(number, key, rows, num_bytes, into, row, tuple(parts[first])))
    return reads


def _boxes(shape: Shape, sharding: Sharding, devices: Collection[jax.Device]) -> dict[Box, tuple[jax.Device, ...]]:
    """What is held of an array of `shape` -> those of `devices` that hold it."""
    boxes: dict[Box, tuple[jax.Device, ...]] = {}
    for device, index in sharding.devices_indices_map(shape).items():
        if device in devices:
            box = tuple(range(*part.indices(size)) for part, size in zip(index, shape, strict=True))
            boxes[box] = (*boxes.get(box, ()), device)
    return boxes


def _parts_by_rows(
    shape: Shape, transform: Transform, row: tuple[int, ...], boxes: Mapping[Box, tuple[jax.Device, ...]]
) -> dict[range, list[Part]]:
    """Rows of a tensor of `shape` (one that has no axes is one row) -> what is held of them."""
    parts: dict[range, list[Part]] = {}
    for box, devices in boxes.items():
        if all(r in own for r, own in zip(row, box, strict=False)):
            held = transform.in_source(box[len(row) :])
            held = tuple(range(min(r.start, size), min(r.stop, size)) for r, size in zip(held, shape, strict=True))
            rows = held[0] if shape else range(1)
            cut = tuple(slice(None) if axis == 0 else slice(r.start, r.stop) for axis, r in enumerate(held))
            parts.setdefault(rows, []).append(Part(devices, box, cut))
    return parts


def load_arrays(targets: Targets, sources: Sequence[Source], progress: OnBytes | None = None) -> dict[str, Array]:
    """Global arrays of `targets`, filled from `sources`: by what `plan_reads` says for the devices of this process."""
    stacked = {into.path for prefix, _, found in sources for into in found.values() if prefix or into.layer is not None}
    parameters = _begin(targets, stacked)
    for read in plan_reads(targets, sources, local_devices(targets)):
        _place(parameters[read.into.path], read, sources[read.source][1].read(read.key, read.rows))
        if progress is not None:
            progress(read.num_bytes)
    return {path: parameter.array() for path, parameter in parameters.items()}


def count_bytes(targets: Targets, sources: Sequence[Source]) -> int:
    """How many bytes `load_arrays` reads in this process and reports."""
    return sum(read.num_bytes for read in plan_reads(targets, sources, local_devices(targets)))


def local_devices(targets: Targets) -> set[jax.Device]:
    """Those of the devices that hold `targets` that this process can write to."""
    return {device for _, sharding in targets.values() for device in sharding.addressable_devices}


def _place(parameter: "_Parameter", read: Read, tensor: np.ndarray) -> None:
    """Takes the tensor as an argument, so that no name keeps it while the next one is read."""
    for part in read.parts:
        parameter.write(read, part, tensor[(*part.cut, ...)])  # with the ellipsis, a scalar stays an array


# Parameters under construction: `write` takes a part of a tensor, cut out but neither permuted nor cast


class _Whole:
    """A parameter that is one tensor, with zeros behind it if it is larger: made on the host, part by part."""

    def __init__(self, target: jax.ShapeDtypeStruct, sharding: Sharding):
        self.target, self.sharding, self.shards = target, sharding, {}

    def write(self, read: Read, part: Part, tensor: np.ndarray) -> None:
        value = read.into.transform.apply(tensor).astype(self.target.dtype, order="C", copy=False)
        if value.shape != (shape := tuple(map(len, part.box))):
            value = np.pad(value, [(0, size - own) for size, own in zip(shape, value.shape, strict=True)])
        for device in part.devices:
            self.shards[device] = jax.device_put(value, device).block_until_ready()

    def array(self) -> Array:
        return _assemble(self.target, self.sharding, self.shards)


class _HostStack:
    """A small stacked parameter: on the host, until all of it is there."""

    def __init__(self, target: jax.ShapeDtypeStruct, sharding: Sharding):
        self.values, self.sharding = np.zeros(target.shape, target.dtype), sharding

    def write(self, read: Read, part: Part, tensor: np.ndarray) -> None:
        own = tuple(slice(r.start, r.stop) for r in part.box[len(read.row) :])
        self.values[read.row + own] = read.into.transform.apply(tensor).astype(self.values.dtype)

    def array(self) -> Array:
        values = self.values
        return jax.make_array_from_callback(values.shape, self.sharding, lambda box: values[box], dtype=values.dtype)


class _Stack:
    """A large stacked parameter: its shards on the devices of this process, written row by row."""

    def __init__(self, target: jax.ShapeDtypeStruct, sharding: Sharding, zeros: Array | None):
        self.target, self.sharding = target, sharding
        self.shards = {} if zeros is None else {shard.device: shard.data for shard in zeros.addressable_shards}

    def write(self, read: Read, part: Part, tensor: np.ndarray) -> None:
        row = np.array([r - own.start for r, own in zip(read.row, part.box, strict=False)], np.int32)
        tensor = np.asarray(tensor, order="C")
        for device in part.devices:
            # put in the call, so that no name keeps one device's copy while the next is made
            new = _write_row(self.shards[device], jax.device_put(tensor, device), row, axes=read.into.transform.axes)
            self.shards[device] = new.block_until_ready()

    def array(self) -> Array:
        return _assemble(self.target, self.sharding, self.shards)


_Parameter = _Whole | _HostStack | _Stack


def _begin(targets: Targets, stacked: set[str]) -> dict[str, _Parameter]:
    """All of `targets`, as yet without numbers."""
    small = {path for path in stacked if _bytes(targets[path][0]) <= ON_HOST}
    large = {path: targets[path] for path in sorted(stacked - small)}
    here = {path: target for path, target in large.items() if target[1].addressable_devices}
    zeros = _zeros(here) if here else {}
    begun: dict[str, _Parameter] = {path: _Whole(*target) for path, target in targets.items() if path not in stacked}
    begun |= {path: _HostStack(*targets[path]) for path in small}
    return begun | {path: _Stack(*target, zeros.get(path)) for path, target in large.items()}


def _assemble(target: jax.ShapeDtypeStruct, sharding: Sharding, shards: Mapping[jax.Device, Array]) -> Array:
    arrays = list(shards.values())
    return jax.make_array_from_single_device_arrays(target.shape, sharding, arrays, dtype=target.dtype)


def _bytes(target: jax.ShapeDtypeStruct) -> int:
    return target.size * target.dtype.itemsize


def _zeros(targets: Targets) -> dict[str, Array]:
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
