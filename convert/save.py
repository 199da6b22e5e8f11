"""Tensors out into files, one at a time, torch-free.

What is to be written is planned first, from shapes alone: a `File` knows its name and size before any number is there,
and its tensors are made when their turn comes. So hardly more than one of them is in memory, and what does not fit on
the disk is told beforehand. Files are written from their first byte to their last, which gives their checksum too.
"""

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from flax import nnx
from jaxtyping import ArrayLike

from jaxwan.convert.rules import Rule, Shape, expected_sources
from jaxwan.convert.tensors import DTYPES

STEM = "diffusion_pytorch_model"  # file name of Diffusers' components; transformers' are called "model"
_ONE_WRITE = 2**26  # bytes between two reports of progress
_ANY_TIME = nullcontext()
_NAMES = {dtype: name for name, dtype in DTYPES.items()}

OnBytes = Callable[[int], Any]  # called with the bytes of tensors that were just written


class Piece(NamedTuple):
    """A tensor to be written, and what makes its numbers, in this shape and dtype, when its turn comes."""

    name: str
    shape: Shape
    dtype: np.dtype
    make: Callable[[], np.ndarray]

    @property
    def num_bytes(self) -> int:
        """Of its numbers."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


class Sink:
    """What a file is written into: it goes forward only, and adds up the checksum."""

    def __init__(self, file: BinaryIO, progress: OnBytes = lambda done: None):
        self._file, self._progress, self._sum = file, progress, hashlib.sha256()

    def write(self, data: Any) -> int:
        """Append bytes."""
        self._sum.update(data)
        self._file.write(data)
        return len(data)

    def flush(self) -> None:
        """As of files; zipfile asks for it."""

    def add(self, piece: Piece, write: Callable[[Any], Any] | None = None) -> None:
        """Make a tensor and append its numbers, or give them to `write`. Raises ValueError for other numbers than were
        planned: our own bug."""
        value = np.asarray(piece.make(), order="C")
        if (value.shape, value.dtype) != (piece.shape, piece.dtype):
            raise ValueError(f"{piece.name} became {value.dtype} {value.shape}, not {piece.dtype} {piece.shape}")
        rest = memoryview(value.reshape(-1).view(np.uint8))
        while rest:
            (write or self.write)(rest[:_ONE_WRITE])
            self._progress(len(rest[:_ONE_WRITE]))
            rest = rest[_ONE_WRITE:]

    @property
    def sha256(self) -> str:
        """Of all that was written."""
        return self._sum.hexdigest()


@dataclass(frozen=True)
class File:
    """A file to be written: its name in the folder, what its tensors (or text) take, and what writes it."""

    name: str
    num_bytes: int
    write: Callable[[Sink], None]

    def write_to(
        self, folder: Path, progress: OnBytes = lambda done: None, naming: AbstractContextManager = _ANY_TIME
    ) -> str:
        """Write it into a folder, in which it appears whole or not at all; its sha256. naming: entered while names are
        made. Raises OSError."""
        path = folder / self.name
        beside = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            with naming:
                path.parent.mkdir(parents=True, exist_ok=True)
                file = beside.open("wb")
            with file:
                self.write(sink := Sink(file, progress))
            with naming:
                beside.replace(path)
        except BaseException as error:
            with suppress(OSError):
                beside.unlink()
            if isinstance(error, OSError):
                raise OSError(f"{path} cannot be written ({error})") from error
            raise
        return sink.sha256


# Files


def json_file(name: str, data: Mapping[str, Any]) -> File:
    """A configuration file."""
    text = (json.dumps(data, indent=2) + "\n").encode()
    return File(name, len(text), lambda sink: sink.write(text) and None)


def copied_file(name: str, source: Path) -> File:
    """A file as it is; no large one."""
    return File(name, source.stat().st_size, lambda sink: sink.write(source.read_bytes()) and None)


def safetensors_file(name: str, pieces: Sequence[Piece]) -> File:
    """A safetensors file, its tensors in this order."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # Diffusers insists on a format
    end = 0
    for piece in pieces:
        span = [end, end := end + piece.num_bytes]
        header[piece.name] = {"dtype": _NAMES[piece.dtype], "shape": list(piece.shape), "data_offsets": span}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # numbers begin at a multiple of 8

    def write(sink: Sink) -> None:
        sink.write(len(text).to_bytes(8, "little") + text)
        for piece in pieces:
            sink.add(piece)

    return File(name, end, write)


def sharded_files(stem: str, pieces: Sequence[Piece], most: int) -> list[File]:
    """Tensors as `<stem>.safetensors`, or if they take more than `most` bytes as shards of no more, with their index; a
    tensor that is larger has a shard of its own."""
    shards: list[list[Piece]] = [[]]
    size = 0
    for piece in pieces:
        if shards[-1] and size + piece.num_bytes > most:
            shards.append([])
            size = 0
        shards[-1].append(piece)
        size += piece.num_bytes
    if len(shards) == 1:
        return [safetensors_file(f"{stem}.safetensors", pieces)]
    files, where = [], {}
    for number, shard in enumerate(shards, 1):
        files.append(safetensors_file(f"{stem}-{number:05}-of-{len(shards):05}.safetensors", shard))
        where |= {piece.name: Path(files[-1].name).name for piece in shard}
    total = sum(file.num_bytes for file in files)
    index = {"metadata": {"total_size": total}, "weight_map": where}
    return [*files, json_file(f"{stem}.safetensors.index.json", index)]


# Parameters that are all there


def save_module(module: nnx.Module, folder: Path, rules: Sequence[Rule], *, stem: str = STEM) -> Path:
    """Write the parameters of `module` as `folder/<stem>.safetensors`; what `load_module` reads with the same rules."""
    flat = nnx.to_flat_state(nnx.state(module, nnx.Param))
    return save_arrays({".".join(map(str, path)): leaf[...] for path, leaf in flat}, folder, rules, stem=stem)


def save_arrays(arrays: Mapping[str, ArrayLike], folder: Path, rules: Sequence[Rule], *, stem: str = STEM) -> Path:
    """Write parameters (dotted path -> array) as one file `folder/<stem>.safetensors`, each in the dtype it has.

    Every row of a stacked parameter becomes a tensor of its own. The file appears whole or not at all. Raises OSError
    when it cannot be written.
    """
    name = f"{stem}.safetensors"
    safetensors_file(name, pieces_of(arrays, rules)).write_to(folder)
    return folder / name


def pieces_of(arrays: Mapping[str, ArrayLike], rules: Sequence[Rule]) -> list[Piece]:
    """The checkpoint's tensors of everything in `arrays` (dotted path -> parameter)."""
    values = {path: np.asarray(value) for path, value in arrays.items()}
    expected = expected_sources({path: value.shape for path, value in values.items()}, rules)

    def piece(key: str) -> Piece:
        into, shape = expected[key]
        value = values[into.path] if into.layer is None else values[into.path][into.layer]
        return Piece(key, shape, value.dtype, lambda: into.transform.invert(value))

    return [piece(key) for key in expected]


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Write a configuration file, its folder too."""
    json_file(path.name, data).write_to(path.parent)
