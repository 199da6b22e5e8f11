"""Files as `torch.save` writes a state dict, without PyTorch: a zip of stored entries, of which one is a pickle.

The original repositories' code opens its VAE and encoders under names that end in .pth, so these have to be such files.
The pickle is put together from the instructions that `torch_files.py` reads. Sources: Python's pickletools, and
torch/serialization.py and torch/_utils.py for what PyTorch looks for.
"""

import math
import struct
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxwan.convert.save import File, Piece, Sink
from jaxwan.convert.tensors import DTYPES

_STORAGES = {"F64": "Double", "F32": "Float", "F16": "Half", "BF16": "BFloat16", "I64": "Long", "U8": "Byte"}
_KINDS = {DTYPES[name]: f"{kind}Storage" for name, kind in _STORAGES.items()}
_LARGE = 2**31  # bytes, from which on a zip needs longer fields


def torch_file(name: str, pieces: Sequence[Piece]) -> File:
    """A state dict of these tensors, in this order; what `torch.load(…, weights_only=True)` reads."""

    def write(sink: Sink) -> None:
        folder = Path(name).stem  # as torch.save names it
        forward: Any = sink  # a file as far as zipfile needs one that cannot go back
        with zipfile.ZipFile(forward, "w") as file:
            file.writestr(_entry(f"{folder}/data.pkl"), state_dict(pieces))
            file.writestr(_entry(f"{folder}/byteorder"), "little")
            for number, piece in enumerate(pieces):
                with file.open(_entry(f"{folder}/data/{number}"), "w", force_zip64=piece.num_bytes >= _LARGE) as entry:
                    sink.add(piece, entry.write)
            file.writestr(_entry(f"{folder}/version"), "3\n")

    return File(name, sum(piece.num_bytes for piece in pieces), write)


def _entry(name: str) -> zipfile.ZipInfo:
    """Without the time, so that the same tensors make the same file."""
    return zipfile.ZipInfo(name)


def state_dict(pieces: Sequence[Piece]) -> bytes:
    """The pickle of name -> tensor, each in the storage of its number."""
    items = b"".join(_text(piece.name) + _tensor(number, piece) for number, piece in enumerate(pieces))
    return b"\x80\x02" + b"}" + b"(" + items + b"u" + b"."  # protocol 2; a dictionary; its items, set; the end


def _tensor(number: int, piece: Piece) -> bytes:
    """A call of PyTorch's function that makes a tensor of a storage."""
    strides = [math.prod(piece.shape[axis + 1 :]) for axis in range(len(piece.shape))]
    count = math.prod(piece.shape)
    storage = b"(" + _text("storage") + _name("torch", _KINDS[piece.dtype]) + _text(str(number)) + _text("cpu")
    storage += _number(count) + b"t" + b"Q"  # the tuple, and the storage that it names
    hooks = _name("collections", "OrderedDict") + b")" + b"R"
    arguments = storage + _number(0) + _numbers(piece.shape) + _numbers(strides) + b"\x89" + hooks  # no gradient
    return _name("torch._utils", "_rebuild_tensor_v2") + b"(" + arguments + b"t" + b"R"


def _text(text: str) -> bytes:
    return b"X" + struct.pack("<I", len(text.encode())) + text.encode()


def _name(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def _number(number: int) -> bytes:
    """Of 32 bits, or as long as it is."""
    if number < 2**31:
        return b"J" + struct.pack("<i", number)
    return b"\x8a\x08" + struct.pack("<q", number)


def _numbers(numbers: Sequence[int]) -> bytes:
    return b"(" + b"".join(map(_number, numbers)) + b"t"
