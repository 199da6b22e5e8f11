"""Where tensors lie in files, and the one reader of their bytes.

A format is a function from a file to extents by name, which has checked all that a header may claim. What then reads an
extent, or some of its rows, asks the system for those bytes only.
"""

import json
import math
import os
import re
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax.numpy as jnp
import numpy as np

from jaxwan.convert.foreign import describe_file, describe_tensors
from jaxwan.convert.rules import CheckpointError, Shape

_KINDS = {
    "BOOL": np.bool_, "U8": np.uint8, "I8": np.int8, "U16": np.uint16, "I16": np.int16, "U32": np.uint32,
    "I32": np.int32, "U64": np.uint64, "I64": np.int64, "F16": np.float16, "BF16": jnp.bfloat16, "F32": np.float32,
    "F64": np.float64, "C64": np.complex64, "F8_E4M3": jnp.float8_e4m3fn, "F8_E5M2": jnp.float8_e5m2,
    "F8_E8M0": jnp.float8_e8m0fnu, "F8_E4M3FNUZ": jnp.float8_e4m3fnuz, "F8_E5M2FNUZ": jnp.float8_e5m2fnuz,
}  # fmt: skip
# by safetensors' names, in which errors speak too; there are others, of fewer than 8 bits, which nothing reads
DTYPES = {name: np.dtype(kind) for name, kind in _KINDS.items()}
MOST_HEADER = 100_000_000  # bytes of a header; the safetensors library refuses longer ones too
MOST_AXES, MOST_NUMBERS = 32, 2**48  # of a shape
_METADATA = "__metadata__"  # in a safetensors header, no tensor
_MOST_OPEN = 128  # files; systems allow few hundred, and an Orbax checkpoint has thousands
_ONE_READ = 2**30  # bytes; macOS refuses 2 GiB, and Linux reads less than it is asked for


@runtime_checkable
class Stored(Protocol):
    """A tensor that is not read yet: an extent of a file, or a view that makes one tensor of others."""

    @property
    def shape(self) -> Shape:
        """Of the tensor."""
        ...

    @property
    def dtype(self) -> np.dtype:
        """Of the tensor, as `read` gives it."""
        ...

    @property
    def num_bytes(self) -> int:
        """How many bytes of files are read for it."""
        ...

    def rows(self, rows: slice) -> "Stored":
        """These rows (of the first axis) alone."""
        ...

    def read(self, reader: "Reader") -> np.ndarray:
        """The tensor, in memory of its own. Raises CheckpointError where a file ends within it."""
        ...


@dataclass(frozen=True)
class Extent:
    """A tensor in a file: from byte `offset` on, numbers of `dtype`, the last axis of `shape` running fastest."""

    path: Path
    offset: int
    dtype: np.dtype
    shape: Shape

    @property
    def num_bytes(self) -> int:
        """How many bytes it takes."""
        return math.prod(self.shape) * self.dtype.itemsize

    def rows(self, rows: slice) -> "Extent":
        """The part of these rows (of the first axis), which lie next to each other."""
        start, stop, step = rows.indices(self.shape[0])
        assert step == 1
        row = math.prod(self.shape[1:]) * self.dtype.itemsize
        return replace(self, offset=self.offset + start * row, shape=(max(0, stop - start), *self.shape[1:]))

    def read(self, reader: "Reader") -> np.ndarray:
        """The tensor. Raises CheckpointError where the file ends within it."""
        return reader.read(self)


@dataclass(frozen=True)
class Strided:
    """A tensor whose numbers lie in a row of them, `span`, at strides (counted in numbers) that are not row-major."""

    span: Extent
    shape: Shape
    strides: Shape

    @property
    def dtype(self) -> np.dtype:
        """Of its numbers."""
        return self.span.dtype

    @property
    def num_bytes(self) -> int:
        """From its first number to its last."""
        return self.span.num_bytes

    def rows(self, rows: slice) -> "Strided":
        """These rows, read from the first number of them to the last."""
        start, stop, step = rows.indices(self.shape[0])
        assert step == 1
        shape = (max(0, stop - start), *self.shape[1:])
        length = 1 + sum((n - 1) * stride for n, stride in zip(shape, self.strides, strict=True)) if shape[0] else 0
        first = start * self.strides[0]
        return replace(self, span=self.span.rows(slice(first, first + length)), shape=shape)

    def read(self, reader: "Reader") -> np.ndarray:
        """The tensor, its last axis running fastest. Raises CheckpointError where the file ends within it."""
        numbers, size = reader.read(self.span), self.dtype.itemsize
        strides = [stride * size for stride in self.strides]
        return np.ascontiguousarray(np.lib.stride_tricks.as_strided(numbers, self.shape, strides))


class Reader:
    """Reads extents, each into memory of its own; nothing is mapped.

    A file stays open, so that its tensors are those of the header that was checked, and is closed with the reader; of
    very many, which have no headers, only the first ones do.
    """

    def __init__(self) -> None:
        self._descriptors: dict[Path, int] = {}
        self._close: dict[Path, Callable[[], Any]] = {}

    def size(self, path: Path) -> int:
        """Bytes of a file."""
        return os.fstat(self._descriptor(path)).st_size

    def read(self, extent: Extent) -> np.ndarray:
        """The tensor of an extent. Raises CheckpointError where the file ends within it."""
        buffer, done = np.empty(extent.num_bytes, np.uint8), 0
        while done < len(buffer):
            rest = memoryview(buffer)[done : done + _ONE_READ]
            count = os.preadv(self._descriptor(extent.path), [rest], extent.offset + done)
            if count == 0:
                raise CheckpointError(f"{extent.path} was cut off at byte {extent.offset + done} after it was opened")
            done += count
        return buffer.view(extent.dtype).reshape(extent.shape)

    def _descriptor(self, path: Path) -> int:
        if path not in self._descriptors:
            if len(self._descriptors) == _MOST_OPEN:
                latest = next(reversed(self._descriptors))
                self._close.pop(latest)()
                del self._descriptors[latest]
            self._descriptors[path] = os.open(path, os.O_RDONLY)
            self._close[path] = weakref.finalize(self, os.close, self._descriptors[path])
        return self._descriptors[path]


def read_safetensors(path: Path, reader: Reader) -> dict[str, Extent]:
    """The tensors of a safetensors file by name, in the order in which they lie in it; reads its header only.

    The header must be sound: no name twice, and every tensor as long as its dtype and shape say, one behind the other
    up to the file's end. Raises CheckpointError that says what the file is instead, where that is known.
    Source: the format's description at https://github.com/huggingface/safetensors.
    """
    try:
        start, header, _ = _read_header(path, reader)
        entries = sorted((_entry(name, found) for name, found in header.items()), key=lambda entry: entry.span)
        _check_spans(entries, reader.size(path) - start)
    except (ValueError, RecursionError) as error:
        told = describe_file(path, f"is truncated or no safetensors file ({error})")
        raise CheckpointError(f"{path} {told}") from error
    if not {entry.dtype for entry in entries} <= DTYPES.keys():
        raise CheckpointError(f"{path} {describe_tensors({entry.name: entry.dtype for entry in entries})}")
    return {e.name: Extent(path, start + e.span[0], DTYPES[e.dtype], e.shape) for e in entries}


def read_metadata(path: Path, reader: Reader) -> dict[str, str]:
    """The texts that a safetensors header holds beside its tensors; none of a file of another format."""
    try:
        _, _, found = _read_header(path, reader)
    except (ValueError, RecursionError):
        return {}
    return {name: text for name, text in found.items() if isinstance(text, str)}


class _Entry(NamedTuple):
    """What a header says of one tensor; span: its first byte and the one behind it, counted from the header's end."""

    name: str
    dtype: str
    shape: Shape
    span: tuple[int, int]


def _read_header(path: Path, reader: Reader) -> tuple[int, dict[str, Any], dict[str, Any]]:
    """Where the header ends, what it says of each tensor, whatever that is, and its metadata. Raises ValueError."""
    size = reader.size(path)
    if size < 8:
        raise ValueError(f"it has {size} bytes")
    length = int.from_bytes(reader.read(Extent(path, 0, DTYPES["U8"], (8,))), "little")
    if length > min(size - 8, MOST_HEADER):
        raise ValueError(f"its header would have {length} bytes, and the file has {size}")
    text = reader.read(Extent(path, 8, DTYPES["U8"], (length,))).tobytes().decode()
    header = json.loads(text, object_pairs_hook=_without_repeats)
    if not isinstance(header, dict):
        raise ValueError("its header is no JSON object")
    metadata = header.pop(_METADATA, None)
    return 8 + length, header, metadata if isinstance(metadata, dict) else {}


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, of which other readers might take the first or the last of two values."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("its header holds a name twice")
    return found


def _entry(name: str, found: Any) -> _Entry:
    """What a header says of a tensor, if it can be. Raises ValueError."""
    name.encode()  # raises where half a character is escaped, which no message could show
    if not isinstance(found, dict) or found.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{name} has no dtype, shape and data_offsets")
    dtype, shape, span = found["dtype"], found["shape"], found["data_offsets"]
    if not isinstance(dtype, str) or not re.fullmatch(r"[A-Z0-9_]{1,20}", dtype):
        raise ValueError(f"{name} has no dtype")
    if not _are_counts(shape) or len(shape) > MOST_AXES or math.prod(max(n, 1) for n in shape) >= MOST_NUMBERS:
        raise ValueError(f"{name} has no shape")
    if not _are_counts(span) or len(span) != 2:
        raise ValueError(f"{name} has no data_offsets")
    if dtype in DTYPES and math.prod(shape) * DTYPES[dtype].itemsize != span[1] - span[0]:
        raise ValueError(f"{name} is {dtype} {tuple(shape)} in {span[1] - span[0]} bytes")
    return _Entry(name, dtype, tuple(shape), (span[0], span[1]))


def _are_counts(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


def _check_spans(entries: Sequence[_Entry], size: int) -> None:
    """Raises ValueError unless entries, sorted by their spans, fill `size` bytes without holes or overlaps."""
    end = 0
    for entry in entries:
        if entry.span[0] != end or entry.span[1] < end:
            raise ValueError(f"{entry.name} begins at byte {entry.span[0]}, what is before it ends at {end}")
        end = entry.span[1]
    if end != size:
        raise ValueError(f"its tensors take {end} bytes, and it has {size} for them")
