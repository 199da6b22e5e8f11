"""GGUF files: where their tensors lie, and the view that decodes those whose numbers are in blocks of a few bits.

The header is read here, with bounds on all that it claims. What its metadata say is passed over, but for the alignment
and the shapes that converters of ComfyUI keep there, because ggml's own have few axes. Blocks are decoded by the
package `gguf`, an extra; files of plain numbers are read without it.

Sources: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md; the package's constants for the types.
"""

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxwan.convert.foreign import describe_file
from jaxwan.convert.rules import CheckpointError, Shape
from jaxwan.convert.tensors import DTYPES, MOST_AXES, MOST_HEADER, MOST_NUMBERS, Extent, Reader, Stored

MAGIC = b"GGUF"
_VERSIONS = (2, 3)
# ggml's numbers of types -> ours, where each number is stored by itself
_PLAIN = {0: "F32", 1: "F16", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 30: "BF16"}
_UINT32, _INT32, _STRING, _ARRAY = 4, 5, 8, 9  # types of metadata
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, _UINT32: 4, _INT32: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # bytes of the others
_SHAPE = "comfy.gguf.orig_shape."  # and a tensor's name
_PIECE = 2**20  # bytes of a header that are read at once
_AT_ONCE = 2**18  # numbers that are decoded at once: they and what they pass through stay in a core's cache


def read_gguf(path: Path, reader: Reader) -> dict[str, Stored]:
    """The tensors of a GGUF file by name, in the order in which they lie in it; reads its header only.

    Raises CheckpointError for a header that is not sound, for types of blocks that the package `gguf` does not decode,
    or all of them where it is not installed, and for a DiT without its patch embedding.
    """
    try:
        found = _read(path, reader)
    except (ValueError, struct.error) as error:
        raise CheckpointError(f"{path} {describe_file(path, f'cannot be read as a GGUF file: {error}')}") from error
    bare = {name.rpartition("head.modulation")[0] for name in found if name.endswith("head.modulation")}
    if any(f"{prefix}patch_embedding.weight" not in found for prefix in bare):
        raise CheckpointError(
            f"{path} lacks patch_embedding.weight, whose 5 axes some converters to GGUF leave out, to be added later: "
            "take a file that has it"
        )
    return found


def _read(path: Path, reader: Reader) -> dict[str, Stored]:
    header = _Header(path, reader)
    if header.take(4) != MAGIC:
        raise ValueError("it does not begin as one")
    (version,) = header.unpack("<I")
    if version not in _VERSIONS:
        raise ValueError(f"it has version {version} (big-endian, if that is large); readable are 2 and 3")
    tensors, pairs = header.unpack("<QQ")
    alignment, shapes = _metadata(header, pairs)
    entries: dict[str, _Entry] = {}
    for _ in range(tensors):
        entry = _entry(header)
        if entry.name in entries:
            raise ValueError(f"it holds {entry.name} twice")
        entries[entry.name] = entry
    start = -(-header.at // alignment) * alignment
    found, end = {}, start
    for entry in sorted(entries.values(), key=lambda entry: entry.offset):
        tensor = _stored(path, start, entry, shapes.get(entry.name))
        begin, length = start + entry.offset, tensor.num_bytes
        if entry.offset % alignment or begin < end or begin + length > header.size:
            raise ValueError(
                f"{entry.name} has bytes {begin} to {begin + length}, what is before it ends at {end}, and the file at "
                f"{header.size}"
            )
        found[entry.name], end = tensor, begin + length
    return found


# The header


class _Header:
    """A file from its beginning on, of which no more is read than is taken."""

    def __init__(self, path: Path, reader: Reader):
        self.path, self.reader, self.size = path, reader, reader.size(path)
        self.at, self.read = 0, bytearray()

    def take(self, length: int) -> memoryview:
        """The next bytes. Raises ValueError where the file, or what a header may have, ends within them."""
        end = self.at + length
        if end > min(self.size, MOST_HEADER):
            raise ValueError(f"its header would go to byte {end} at least, and the file has {self.size}")
        while len(self.read) < end:
            first = len(self.read)
            piece = min(max(_PIECE, end - first), self.size - first)
            self.read += self.reader.read(Extent(self.path, first, DTYPES["U8"], (piece,))).tobytes()
        taken = memoryview(bytes(self.read[self.at : end]))
        self.at = end
        return taken

    def unpack(self, form: str) -> tuple:
        """The next numbers."""
        return struct.unpack(form, self.take(struct.calcsize(form)))

    def text(self) -> str:
        """The next string. Raises ValueError unless it is UTF-8."""
        (length,) = self.unpack("<Q")
        return bytes(self.take(length)).decode()


def _metadata(header: _Header, pairs: int) -> tuple[int, dict[str, Shape]]:
    """The alignment of tensors, and shapes that they have instead of ggml's, by name."""
    alignment, shapes, seen = 32, {}, set()
    for _ in range(pairs):
        name = header.text()
        if name in seen:
            raise ValueError(f"it says {name!r:.80} twice")
        seen.add(name)
        (kind,) = header.unpack("<I")
        value = _value(header, kind)
        if name == "general.alignment":
            alignment = value[0] if kind == _UINT32 else 0
            if not 0 < alignment <= 2**20 or alignment & (alignment - 1):
                raise ValueError(f"its alignment is {alignment}")
        elif name.startswith(_SHAPE):
            if kind != _ARRAY or not 0 < len(value) <= MOST_AXES or min(value) < 0:
                raise ValueError(f"{name!r:.80} is no shape")
            shapes[name.removeprefix(_SHAPE)] = tuple(value)
    return alignment, shapes


def _value(header: _Header, kind: int) -> tuple[int, ...]:
    """The next value, if it is of 32-bit integers; anything else is passed over."""
    if kind == _STRING:
        header.take(*header.unpack("<Q"))
        return ()
    if kind != _ARRAY:
        kinds, count = kind, 1
    else:
        kinds, count = header.unpack("<IQ")
    if kinds == _STRING:
        for _ in range(count):
            header.take(*header.unpack("<Q"))
        return ()
    if kinds not in _SIZES:
        raise ValueError(f"its metadata have a value of type {kinds}")
    content = header.take(count * _SIZES[kinds])
    if kinds not in (_UINT32, _INT32) or count > MOST_AXES:
        return ()
    return struct.unpack(f"<{count}{'I' if kinds == _UINT32 else 'i'}", content)


class _Entry(NamedTuple):
    """What a header says of one tensor; shape: as ours, the last axis running fastest; offset: from the first's."""

    name: str
    shape: Shape
    kind: int
    offset: int


def _entry(header: _Header) -> _Entry:
    name = header.text()
    if not name.isprintable() or not name:
        raise ValueError(f"a tensor of it is called {name!r:.80}")
    (axes,) = header.unpack("<I")
    if axes > MOST_AXES:
        raise ValueError(f"{name} has {axes} axes")
    shape = header.unpack(f"<{axes}Q")[::-1]
    if math.prod(max(n, 1) for n in shape) >= MOST_NUMBERS:
        raise ValueError(f"{name} has no shape but {shape}")
    kind, offset = header.unpack("<IQ")
    return _Entry(name, shape, kind, offset)


def _stored(path: Path, start: int, entry: _Entry, shape: Shape | None) -> Stored:
    """A tensor of a header, in the shape that metadata give it, if any. Raises ValueError if it can be none."""
    numbers, own = math.prod(entry.shape), entry.shape if shape is None else shape
    if math.prod(own) != numbers:
        raise ValueError(f"{entry.name} of {entry.shape} has the shape {own} in its metadata")
    if entry.kind in _PLAIN:
        return Extent(path, start + entry.offset, DTYPES[_PLAIN[entry.kind]], own)
    block, size = _block(path, entry)
    if not entry.shape or entry.shape[-1] % block:
        raise ValueError(f"{entry.name} of {entry.shape} has rows of other than whole blocks of {block}")
    span = Extent(path, start + entry.offset, DTYPES["U8"], (numbers // block, size))
    return Blocks(span, entry.kind, block, 0, own)


def _block(path: Path, entry: _Entry) -> tuple[int, int]:
    """How many numbers a block has, and how many bytes. Raises CheckpointError for what cannot be decoded."""
    try:
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize
    except ImportError as error:
        raise CheckpointError(
            f"{path} is quantised as GGUF, which the package gguf decodes: `pip install gguf` ({error})"
        ) from error
    try:
        kind = GGMLQuantizationType(entry.kind)
        numbers, size = GGML_QUANT_SIZES[kind]
        dequantize(np.zeros((1, size), np.uint8), kind)
    except (ValueError, KeyError) as error:
        raise ValueError(f"{entry.name} is of type {entry.kind}, which the package gguf does not know") from error
    except NotImplementedError as error:
        raise CheckpointError(
            f"{path} holds {entry.name} as {GGMLQuantizationType(entry.kind).name}, which the package gguf does not "
            "decode: take another file of the same model, such as Q8_0"
        ) from error
    return numbers, size


# Blocks


@dataclass(frozen=True)
class Blocks:
    """A tensor whose numbers are in blocks, next to each other: `span` has a row of bytes for each of them.

    kind: ggml's number of the type. block: numbers of one block. skip: how many of the first are before the tensor's.
    """

    span: Extent
    kind: int
    block: int
    skip: int
    shape: Shape
    dtype = DTYPES["F32"]

    @property
    def num_bytes(self) -> int:
        """Of the blocks, as they are stored."""
        return self.span.num_bytes

    @property
    def kind_on_disk(self) -> str:
        """The type's name: "Q4_K"."""
        from gguf import GGMLQuantizationType

        return GGMLQuantizationType(self.kind).name

    def rows(self, rows: slice) -> "Blocks":
        """These rows; blocks that hold none of them are not read."""
        start, stop, step = rows.indices(self.shape[0])
        assert step == 1
        row = math.prod(self.shape[1:])
        first, last = self.skip + start * row, self.skip + max(start, stop) * row
        blocks = slice(first // self.block, -(-last // self.block) if last > first else first // self.block)
        shape = (max(0, stop - start), *self.shape[1:])
        return replace(self, span=self.span.rows(blocks), skip=first % self.block, shape=shape)

    def read(self, reader: Reader) -> np.ndarray:
        """The numbers as float32, as the package decodes them. Raises CheckpointError where the file ends within."""
        from gguf import GGMLQuantizationType, dequantize

        codes, kind = reader.read(self.span), GGMLQuantizationType(self.kind)
        decoded = np.empty((len(codes), self.block), np.float32)
        at_once = max(1, _AT_ONCE // self.block)
        with np.errstate(over="ignore", invalid="ignore"):  # scales that are infinite or none, in a damaged file
            for first in range(0, len(codes), at_once):
                part = slice(first, first + at_once)
                decoded[part] = dequantize(codes[part].reshape(1, -1), kind).reshape(-1, self.block)
        return decoded.reshape(-1)[self.skip :][: math.prod(self.shape)].reshape(self.shape)


# Names

_UMT5 = {
    "attn_norm": "0.layer_norm", "attn_q": "0.SelfAttention.q", "attn_k": "0.SelfAttention.k",
    "attn_v": "0.SelfAttention.v", "attn_o": "0.SelfAttention.o", "ffn_norm": "1.layer_norm",
    "attn_rel_b": "0.SelfAttention.relative_attention_bias", "ffn_gate": "1.DenseReluDense.wi_0",
    "ffn_up": "1.DenseReluDense.wi_1", "ffn_down": "1.DenseReluDense.wo",
}  # fmt: skip
_UMT5_ENDS = {"token_embd": "shared", "enc.output_norm": "encoder.final_layer_norm"}


def text_encoder_names(tensors: Mapping[str, Stored]) -> dict[str, str]:
    """llama.cpp's names of a T5 encoder's tensors -> those of transformers, which rule tables know."""
    if not any(name.startswith("enc.blk.") for name in tensors):
        return {}
    names = {f"{theirs}.weight": f"{ours}.weight" for theirs, ours in _UMT5_ENDS.items()}
    for name in tensors:
        parts = name.split(".")
        if len(parts) == 5 and parts[:2] == ["enc", "blk"] and parts[3] in _UMT5:
            names[name] = f"encoder.block.{parts[2]}.layer.{_UMT5[parts[3]]}.{parts[4]}"
    return names
