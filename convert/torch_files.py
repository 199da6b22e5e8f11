"""`.pth` and `.pt` files of PyTorch: where their tensors lie, without running what is in them.

Such a file is a zip of stored entries: one pickle, and a storage of raw numbers for each tensor. A pickle is a program.
The one here is read by an interpreter of our own that knows the few instructions of which dictionaries of tensors are
made; the only "functions" it knows describe tensors, and it refuses every other by its name. Python's `pickle` is not
used. Storages are not read: their tensors become extents.

Sources: https://pkware.cachefly.net/webdocs/casestudies/APPNOTE.TXT (zip), Python's pickletools (pickle), and
torch/_utils.py and torch/serialization.py (what PyTorch writes).
"""

import math
import pickletools
import reprlib
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten
from typing import Any, NamedTuple

from jaxwan.convert.foreign import describe_file
from jaxwan.convert.rules import CheckpointError, Shape
from jaxwan.convert.tensors import DTYPES, MOST_AXES, MOST_HEADER, MOST_NUMBERS, Extent, Reader, Strided
from jaxwan.convert.views import unwrapped

_Tensor = Extent | Strided
_FEW = reprlib.Repr()
_FEW.maxlevel, _FEW.maxstring, _FEW.maxother = 2, 100, 80
_MOST_ENTRIES = 1_000_000
# state dicts inside of what training saves, in the order in which they are preferred
_STATE_DICTS = (
    "generator_ema", "generator", "ema", "state_dict", "model_state_dict", "model", "module", "generator_lora",
)  # fmt: skip
_MOST_NESTED = 4  # state dicts in each other
_BRINGS = {
    "Double": "F64", "Float": "F32", "Half": "F16", "BFloat16": "BF16", "Long": "I64", "Int": "I32", "Short": "I16",
    "Char": "I8", "Byte": "U8", "Bool": "BOOL",
}  # fmt: skip
_STORAGES = {f"torch {kind}Storage": dtype for kind, dtype in _BRINGS.items()}
_UNTYPED = "torch.storage UntypedStorage"  # counts bytes; the tensor says what they are
_DTYPES = {
    "torch float8_e4m3fn": "F8_E4M3", "torch float8_e5m2": "F8_E5M2", "torch float8_e8m0fnu": "F8_E8M0",
    "torch float8_e4m3fnuz": "F8_E4M3FNUZ", "torch float8_e5m2fnuz": "F8_E5M2FNUZ", "torch uint16": "U16",
    "torch uint32": "U32", "torch uint64": "U64",
}  # fmt: skip


def read_torch(path: Path, reader: Reader) -> dict[str, _Tensor]:
    """The tensors of a file of torch.save by name, in the order in which they lie in it; reads no number of them.

    Where the file holds a state dict inside of another dictionary, as training saves it, those are its tensors:
    averaged weights ("generator_ema") before others if they are complete. What is beside them is passed over.
    Raises CheckpointError for a file that is none, for one whose claims do not fit each other, and for a pickle that
    would do anything else than describe tensors, which is named.
    """
    return _read(path, reader)[0]


def saved_under(path: Path, reader: Reader) -> tuple[str, ...]:
    """The names of the dictionaries that a file's state dict is in: ("generator_ema",). Raises as `read_torch`."""
    return _read(path, reader)[1]


def _read(path: Path, reader: Reader) -> tuple[dict[str, _Tensor], tuple[str, ...]]:
    if reader.size(path) >= 2 and reader.read(Extent(path, 0, DTYPES["U8"], (2,))).tobytes() != b"PK":
        raise CheckpointError(f"{path} {describe_file(path)}")
    try:
        entries = _read_zip(path, reader)
        names = [name for name in entries if name.rpartition("/")[2] == "data.pkl"]
        if len(names) != 1:
            raise ValueError(f"it holds {len(names)} files data.pkl, and one is its table")
        folder = names[0].removesuffix("data.pkl")
        order = entries.get(f"{folder}byteorder")
        if order is not None and reader.read(order.rows(slice(0, 9))).tobytes() != b"little":
            raise ValueError("its numbers are big-endian")
        if entries[names[0]].num_bytes > MOST_HEADER:
            raise ValueError(f"its data.pkl has {entries[names[0]].num_bytes} bytes")
        storages = {name.removeprefix(f"{folder}data/"): entry for name, entry in entries.items()}
        value = _Machine(storages).run(reader.read(entries[names[0]]).tobytes())
        found, under = _state_dict(value)
    except (ValueError, struct.error, OverflowError) as error:
        raise CheckpointError(f"{path} cannot be read as a file of PyTorch's: {error}") from error
    return dict(sorted(found.items(), key=lambda item: _first_byte(item[1]))), under


def _first_byte(tensor: _Tensor) -> int:
    return tensor.offset if isinstance(tensor, Extent) else tensor.span.offset


# The zip


def _read_zip(path: Path, reader: Reader) -> dict[str, Extent]:
    """Where the entries of a zip lie, by name. Raises ValueError unless all are stored as they are, each in bytes of
    its own, and where readers could see different entries."""
    size = reader.size(path)

    def take(offset: int, length: int) -> bytes:
        if offset < 0 or length < 0 or offset + length > size:
            raise ValueError(f"bytes {offset} to {offset + length} of its {size} are asked for")
        return reader.read(Extent(path, offset, DTYPES["U8"], (length,))).tobytes()

    count, length, start = _zip_end(take, size)
    if count > _MOST_ENTRIES or length > MOST_HEADER:
        raise ValueError(f"its directory would have {count} entries in {length} bytes")
    directory, at, entries = take(start, length), 0, {}
    for _ in range(count):
        entry, at = _zip_entry(directory, at)
        if entry.name in entries:
            raise ValueError(f"it holds {entry.name} twice")
        data = _data_of(entry, take)
        if data + entry.size > start:
            raise ValueError(f"{entry.name} ends at byte {data + entry.size}, where its directory begins at {start}")
        entries[entry.name] = Extent(path, data, DTYPES["U8"], (entry.size,))
    if at != length:
        raise ValueError(f"its directory has {length} bytes, of which {at} are entries")
    end = 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].offset, item[1].num_bytes)):
        if entry.offset < end:
            raise ValueError(f"{name} begins at byte {entry.offset}, what is before it ends at {end}")
        end = entry.offset + entry.num_bytes
    return entries


def _zip_end(take: Callable[[int, int], bytes], size: int) -> tuple[int, int, int]:
    """How many entries the directory has, its bytes, and where it begins; the file ends with what says it."""
    end = size - 22
    tail = take(end, 22) if end >= 0 else b""
    if tail[:4] != b"PK\5\6" or tail[20:] != b"\0\0":
        raise ValueError("it is truncated, or no zip")
    disk, first, here, count, length, start = struct.unpack("<4H2I", tail[4:20])
    if end >= 20 and (locator := take(end - 20, 20))[:4] == b"PK\6\7":
        (end,) = struct.unpack("<Q", locator[8:16])
        tail = take(end, 56)
        if tail[:4] != b"PK\6\6":
            raise ValueError("its directory is not where it says")
        disk, first, here, count, length, start = struct.unpack("<2I4Q", tail[16:])
    if disk or first or here != count or start + length != end:
        raise ValueError("its directory is not where it says")
    return count, length, start


class _ZipEntry(NamedTuple):
    name: str
    size: int
    header: int  # where its own header begins


def _zip_entry(directory: bytes, at: int) -> tuple[_ZipEntry, int]:
    """The entry of a directory at a byte, and where the next begins."""
    if directory[at : at + 4] != b"PK\1\2" or at + 46 > len(directory):
        raise ValueError("its directory is cut off")
    flags, method = struct.unpack_from("<2H", directory, at + 8)
    packed, size, name_length, extra_length, comment, disk = struct.unpack_from("<2I4H", directory, at + 20)
    (header,) = struct.unpack_from("<I", directory, at + 42)
    middle, end = at + 46 + name_length, at + 46 + name_length + extra_length + comment
    if end > len(directory):
        raise ValueError("its directory is cut off")
    name = directory[at + 46 : middle].decode()
    large = iter(_zip64(directory[middle : middle + extra_length]))
    size, packed, header = (next(large, value) if value == 0xFFFFFFFF else value for value in (size, packed, header))
    if not name.isprintable() or name.startswith("/") or "\\" in name or ".." in name.split("/"):
        raise ValueError(f"an entry is called {name!r:.80}")
    if method or packed != size:
        raise ValueError(f"{name} is compressed, which PyTorch does not do")
    if flags & 1 or disk:
        raise ValueError(f"{name} is encrypted or in another file")
    return _ZipEntry(name, size, header), end


def _zip64(extra: bytes) -> list[int]:
    """The numbers of 64 bits among an entry's extra fields."""
    while len(extra) >= 4:
        kind, length = struct.unpack("<2H", extra[:4])
        if kind == 1:
            return [n for (n,) in struct.iter_unpack("<Q", extra[4 : 4 + length // 8 * 8])]
        extra = extra[4 + length :]
    return []


def _data_of(entry: _ZipEntry, take: Callable[[int, int], bytes]) -> int:
    """Where an entry's bytes begin, behind a header of their own, which must say the same name."""
    header = take(entry.header, 30)
    name_length, extra_length = struct.unpack("<2H", header[26:])
    if header[:4] != b"PK\3\4" or take(entry.header + 30, name_length) != entry.name.encode():
        raise ValueError(f"{entry.name} is not where its directory says")
    return entry.header + 30 + name_length + extra_length


# The pickle


@dataclass(frozen=True)
class _Name:
    """A name of Python's that a pickle asks for, "module name": one of those that are known here."""

    text: str


@dataclass(frozen=True)
class _Storage:
    """Raw numbers of a file; dtype None: bytes, of which the tensor says what they are."""

    extent: Extent
    dtype: str | None


class _Mark:
    """What a pickle puts below several values."""


def _storage(identity: Any, storages: Mapping[str, Extent]) -> _Storage:
    """What PyTorch names by ("storage", kind, key, device, count)."""
    if not isinstance(identity, tuple) or len(identity) != 5 or identity[0] != "storage":
        raise ValueError(f"it names {_shown(identity)}, which is no storage")
    _, kind, key, _, count = identity
    dtype = _STORAGES.get(kind.text) if isinstance(kind, _Name) else None
    if dtype is None and kind != _Name(_UNTYPED):
        raise ValueError(f"it names a storage of {_shown(kind)}")
    if not isinstance(key, str) or key not in storages:
        raise ValueError(f"it names the storage {_shown(key)}, which it does not hold")
    claimed = count * (DTYPES[dtype].itemsize if dtype else 1) if _is_count(count) else count
    if claimed != storages[key].num_bytes:
        raise ValueError(f"its storage {key} has {storages[key].num_bytes} bytes and not {_shown(claimed)}")
    return _Storage(storages[key], dtype)


def _tensor_v2(
    storage: Any, offset: Any, shape: Any, strides: Any, _grad: Any, _hooks: Any, _more: Any = None
) -> _Tensor:
    return _tensor(storage, offset, shape, strides, None)


def _tensor_v3(
    storage: Any, offset: Any, shape: Any, strides: Any, _grad: Any, _hooks: Any, dtype: Any, _more: Any = None
) -> _Tensor:
    kind = _DTYPES.get(dtype.text) if isinstance(dtype, _Name) else None
    if kind is None:
        raise ValueError(f"it holds a tensor of {_shown(dtype)}")
    return _tensor(storage, offset, shape, strides, kind)


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, dtype: str | None) -> _Tensor:
    """The tensor that strides make of a storage; each number of it must be one of its own there."""
    if not isinstance(storage, _Storage) or (storage.dtype or dtype) is None:
        raise ValueError(f"a tensor of it has no storage but {_shown(storage)}")
    kind = DTYPES[storage.dtype or dtype]  # pyright: ignore[reportArgumentType]
    counts = all(isinstance(numbers, tuple) and all(map(_is_count, numbers)) for numbers in (shape, strides))
    if not counts or not _is_count(offset) or len(shape) != len(strides) or len(shape) > MOST_AXES:
        raise ValueError(f"a tensor of it has the shape {_shown(shape)} and strides {_shown(strides)}")
    if math.prod(max(n, 1) for n in shape) >= MOST_NUMBERS:
        raise ValueError(f"a tensor of it has the shape {_shown(shape)}")
    empty = 0 in shape
    length = 0 if empty else 1 + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    if (offset + length) * kind.itemsize > storage.extent.num_bytes or math.prod(shape) > length:
        raise ValueError(f"a tensor of it, {_shown(shape)} with strides {_shown(strides)}, is larger than its storage")
    span = Extent(storage.extent.path, storage.extent.offset + offset * kind.itemsize, kind, (length,))
    if empty or all(n == 1 or stride == own for n, stride, own in zip(shape, strides, _row_major(shape), strict=True)):
        return Extent(span.path, span.offset, kind, shape)
    return Strided(span, shape, strides)


def _row_major(shape: Shape) -> Shape:
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


def _parameter(tensor: Any, _grad: Any, _hooks: Any) -> Any:
    return tensor


def _ordered_dict(*pairs: Any) -> dict:
    if pairs:
        raise ValueError("an OrderedDict of it is not made as PyTorch makes it")
    return {}


# All that a pickle may call; each describes and does nothing.
_CALLS: dict[str, Callable[..., Any]] = {
    "torch._utils _rebuild_tensor_v2": _tensor_v2,
    "torch._utils _rebuild_tensor_v3": _tensor_v3,
    "torch._utils _rebuild_parameter": _parameter,
    "collections OrderedDict": _ordered_dict,
}
_NAMES = _CALLS.keys() | _STORAGES.keys() | _DTYPES.keys() | {_UNTYPED}


class _Machine:
    """Runs the instructions of a pickle that build dictionaries, lists and tuples of plain values and tensors."""

    def __init__(self, storages: Mapping[str, Extent]):
        self.storages, self.stack, self.memo = storages, [], {}

    def run(self, program: bytes) -> Any:
        """The value of a whole pickle. Raises ValueError."""
        for instruction, argument, at in pickletools.genops(program):
            name = instruction.name
            if name in ("PROTO", "FRAME"):
                continue
            if name == "STOP":
                if at is None or at + 1 != len(program):
                    raise ValueError("its pickle goes on behind its end")
                return self._pop()
            self._step(name, argument)
        raise ValueError("its pickle has no end")

    def _step(self, name: str, argument: Any) -> None:
        match name:
            case "MARK":
                self.stack.append(_Mark)
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                self.stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[name])
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT" | "SHORT_BINUNICODE" | "BINUNICODE":
                self.stack.append(argument)
            case "EMPTY_DICT" | "EMPTY_LIST" | "EMPTY_TUPLE":
                self.stack.append({"EMPTY_DICT": {}, "EMPTY_LIST": [], "EMPTY_TUPLE": ()}[name])
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                self.stack.append(tuple(reversed([self._pop() for _ in range(int(name[-1]))])))
            case "TUPLE":
                self.stack.append(tuple(self._marked()))
            case "BINPUT" | "LONG_BINPUT" | "MEMOIZE":
                self.memo[len(self.memo) if argument is None else argument] = self._top()
            case "BINGET" | "LONG_BINGET":
                if argument not in self.memo:
                    raise ValueError(f"its pickle asks for value {argument}, which it has not made")
                self.stack.append(self.memo[argument])
            case "GLOBAL":
                self.stack.append(_known(argument))
            case "STACK_GLOBAL":
                parts = [self._pop(), self._pop()][::-1]
                self.stack.append(_known(" ".join(part if isinstance(part, str) else repr(part) for part in parts)))
            case "BINPERSID":
                self.stack.append(_storage(self._pop(), self.storages))
            case "REDUCE":
                arguments, called = self._pop(), self._pop()
                self.stack.append(_call(called, arguments))
            case "SETITEM" | "SETITEMS":
                items = [self._pop(), self._pop()][::-1] if name == "SETITEM" else self._marked()
                _set_items(self._top(), items)
            case "APPEND" | "APPENDS":
                items = [self._pop()] if name == "APPEND" else self._marked()
                if not isinstance(self._top(), list):
                    raise ValueError("its pickle appends to what is no list")
                self._top().extend(items)
            case "BUILD":  # attributes of an OrderedDict, which PyTorch keeps versions of modules in
                self._pop()
                if not isinstance(self._top(), dict):
                    raise ValueError("its pickle gives attributes to what is no OrderedDict")
            case _:
                raise ValueError(f"its pickle has the instruction {name}, which no dictionary of tensors needs")

    def _pop(self) -> Any:
        self._top()
        return self.stack.pop()

    def _top(self) -> Any:
        if not self.stack or self.stack[-1] is _Mark:
            raise ValueError("its pickle takes a value where there is none")
        return self.stack[-1]

    def _marked(self) -> list[Any]:
        """The values above the last mark, which goes too."""
        values = []
        while self.stack and self.stack[-1] is not _Mark:
            values.append(self.stack.pop())
        if not self.stack:
            raise ValueError("its pickle takes values from a mark, and there is none")
        self.stack.pop()
        return values[::-1]


def _known(name: str) -> _Name:
    if name not in _NAMES:
        raise ValueError(
            f"its pickle asks for {_shown(name.replace(' ', '.'))}, which is refused, as it could run code: if you "
            "trust it, load it in PyTorch and save its tensors alone, best as safetensors"
        )
    return _Name(name)


def _call(called: Any, arguments: Any) -> Any:
    if not isinstance(called, _Name) or called.text not in _CALLS or not isinstance(arguments, tuple):
        raise ValueError(f"its pickle calls {_shown(called)}, which is refused")
    try:
        return _CALLS[called.text](*arguments)
    except TypeError as error:  # another number of arguments
        raise ValueError(f"its pickle calls {called.text.replace(' ', '.')} with {len(arguments)} values") from error


def _set_items(target: Any, items: Sequence[Any]) -> None:
    if not isinstance(target, dict) or len(items) % 2:
        raise ValueError("its pickle sets items of what is no dictionary")
    for key, value in zip(items[::2], items[1::2], strict=True):
        if not isinstance(key, str | int | float | bool | None):
            raise ValueError("its pickle has a dictionary with other keys than texts and numbers")
        target[key] = value


def _shown(value: Any) -> str:
    """What a pickle built, in a few letters: in full it may be as long as it likes, of values that it repeats."""
    return shorten(_FEW.repr(value), 100, placeholder=" …")


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


# The state dict


def _state_dict(value: Any) -> tuple[dict[str, _Tensor], tuple[str, ...]]:
    """The tensors of a state dict, by name, or of the one that is preferred among those inside of it; and the names of
    the dictionaries that it is in."""
    under: tuple[str, ...] = ()
    for _ in range(_MOST_NESTED):
        if not isinstance(value, dict):
            break
        if tensors := dict(_tensors(value)):
            return tensors, under
        inner = {name: value[name] for name in _STATE_DICTS if isinstance(value.get(name), dict)}
        if not inner:
            break
        chosen = next(iter(inner))
        if chosen == "generator_ema" and not _bare(inner.get("generator", {})) <= _bare(inner[chosen]):
            chosen = "generator"  # averages of a part alone
        value, under = inner[chosen], (*under, chosen)
    raise ValueError(
        f"it holds no dictionary of tensors, at its top or under {', '.join(_STATE_DICTS)}"
        + (f", but {', '.join(map(repr, list(value)[:5]))}" if isinstance(value, dict) and value else "")
    )


def _bare(names: Mapping[Any, Any]) -> set[str]:
    """Names without wrappers, which those of averages have not where those of the model have."""
    return {unwrapped(name) for name in names if isinstance(name, str)}


def _tensors(value: Mapping[Any, Any]) -> Iterator[tuple[str, _Tensor]]:
    for name, tensor in value.items():
        if isinstance(tensor, Extent | Strided):
            if not isinstance(name, str) or not name.isprintable():
                raise ValueError(f"a tensor of it is called {_shown(name)}")
            yield name, tensor
