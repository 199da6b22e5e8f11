"""Orbax checkpoints in canonical form: parameters stacked as models hold them, for any mesh.

A parameter of the DiT is `[expert, layer, …]`, or `[expert, …]` outside of the layers; those of the encoders are
`[layer, …]`; there are no padded layers. On the disk each is an array of Zarr's, uncompressed and without OCDBT, with a
chunk for each row: a file that holds one layer's numbers. So a layer is an extent like any other, which the one loader
reads, and Orbax is not needed for it. `orbax.checkpoint` restores these folders too, to shapes with padding or without.

Sources: the Zarr v2 specification (zarr.readthedocs.io), and the files that orbax-checkpoint 0.11 and 0.12 write with
`PyTreeCheckpointHandler(use_ocdbt=False, use_zarr3=False)`.
"""

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxwan.convert.rules import CheckpointError, Rule, Shape
from jaxwan.convert.save import File, Piece, json_file
from jaxwan.convert.tensors import DTYPES, Extent, Reader

FOLDER = "orbax"  # of a checkpoint, beside its configurations
_METADATA, _COMMITTED = "_METADATA", "_CHECKPOINT_METADATA"
_ARRAY = ".zarray"
_MOST_TEXT = 100_000  # bytes of a description of an array
_ZARR = {"BF16": "bfloat16", "F32": "<f4", "F16": "<f2"}
_DTYPES = {zarr: DTYPES[name] for name, zarr in _ZARR.items()}
_NAMES = {dtype: zarr for zarr, dtype in _DTYPES.items()}
_STACKED = ("blocks.", "layers.")  # what parameters begin with that have a layer axis

_PATHS = {
    "transformer": ("patch_embedding", "time_embedder", "time_proj", "text_embedder", "image_embedder", "proj_out"),
    "text_encoder": ("norm",),
    "image_encoder": ("pre_norm",),
    "vae": ("encoder", "decoder", "quant_conv", "post_quant_conv"),
}
_WHOLE = {
    "transformer": ("scale_shift_table",),
    "text_encoder": ("embedding",),
    "image_encoder": ("class_embedding", "patch_embedding", "position_embedding"),
}


def rules(component: str, num_layers: int | None = None) -> list[Rule]:
    """The rule table of a component, whose tensors here are its parameters, row by row.

    num_layers: of the image encoder, whose last layer and norm are kept, and never read.
    """
    table = [Rule(f"{start}.{{path}}", f"{start}.{{path}}") for start in _PATHS[component]]
    table += [Rule(name, name) for name in _WHOLE.get(component, ())]
    table += [Rule(f"{start}{{layer}}.{{path}}", f"{start}{{path}}") for start in _STACKED if component != "vae"]
    if num_layers is not None:
        table += [Rule(f"layers.{num_layers - 1}.{{path}}", None)]
        table += [Rule("post_norm.{path}", None, aside="post_norm.{path}")]
    return table


# Reading


class Part(NamedTuple):
    """A component of a checkpoint; expert: which of the DiTs, whose parameters are rows of the same arrays."""

    component: str
    expert: int | None = None


def read_orbax(folder: Path, part: Part, reader: Reader) -> dict[str, Extent]:
    """The tensors of a part, row by row under the names that `rules` reads; reads descriptions of arrays alone.

    Raises CheckpointError for arrays that are stored otherwise, and for those of which a row is missing or cut off.
    """
    (name, expert), found = part, {}
    for array in sorted(entry.name for entry in os.scandir(folder) if entry.name.startswith(f"{name}.")):
        path = array.removeprefix(f"{name}.")
        lead = (expert is not None) + path.startswith(_STACKED)
        shape, dtype = _described(folder / array, lead, reader)
        if expert is not None and shape[0] <= expert:
            continue
        stacked = path.startswith(_STACKED)
        for layer in range(shape[lead - 1]) if stacked else (None,):
            row = (*(() if expert is None else (expert,)), *(() if layer is None else (layer,)))
            file = folder / array / _chunk_name(row, len(shape))
            key = path if layer is None else path.replace(".", f".{layer}.", 1)
            found[key] = Extent(file, 0, dtype, shape[lead:])
            _check_size(file, found[key].num_bytes)
    return found


def _described(array: Path, lead: int, reader: Reader) -> tuple[Shape, np.dtype]:
    """Shape and dtype of an array, of whose axes so many count rows. Raises CheckpointError."""
    try:
        path = array / _ARRAY
        size = reader.size(path)
        if size > _MOST_TEXT:
            raise ValueError(f"it has {size} bytes")
        said: Any = json.loads(reader.read(Extent(path, 0, DTYPES["U8"], (size,))).tobytes())
        shape, chunks, kind = said["shape"], said["chunks"], said["dtype"]
        if not all(type(n) is int and n > 0 for n in shape) or math.prod(shape) >= 2**48 or len(shape) < lead:
            raise ValueError("it has no shape")
        wanted = {"zarr_format": 2, "order": "C", "compressor": None, "filters": None}
        wrong = [name for name, value in wanted.items() if said[name] != value]
        wrong += ["chunks"] * (chunks != [1] * lead + shape[lead:]) + ["dtype"] * (kind not in _DTYPES)
        if said.get("dimension_separator", ".") != ".":
            wrong.append("dimension_separator")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{array} does not say what array it is ({error!r:.100})") from error
    if wrong:
        raise CheckpointError(
            f"{array} is stored with other {', '.join(wrong)} than scripts/convert.py writes, and not read: restore it "
            "with Orbax and convert what it was made of"
        )
    return tuple(shape), _DTYPES[kind]


def _chunk_name(row: Sequence[int], ndim: int) -> str:
    """The name of a row's file; Zarr calls that of an array without axes 0."""
    return ".".join(map(str, (*row, *[0] * (ndim - len(row))))) or "0"


def _check_size(file: Path, wanted: int) -> None:
    size = file.stat().st_size if file.is_file() else None
    if size != wanted:
        has = "is missing" if size is None else f"has {size} bytes and not {wanted}"
        raise CheckpointError(f"{file} {has}: the checkpoint is not whole")


# Writing


class Chunk(NamedTuple):
    """A row of a parameter, which is to be written as a file; its piece's name is the parameter's path."""

    component: str
    row: tuple[int, ...]  # expert and layer, if it has them
    piece: Piece


def orbax_files(rows: Iterable[Chunk]) -> list[File]:
    """All files of a checkpoint. Rows of a parameter have one shape and dtype, and are all there."""
    arrays: dict[tuple[str, str], list[Chunk]] = {}
    files: list[File] = []
    for row in rows:
        arrays.setdefault((row.component, row.piece.name), []).append(row)
        name = f"{FOLDER}/{_directory(row)}/{_chunk_name(row.row, len(row.row) + len(row.piece.shape))}"
        files.append(File(name, row.piece.num_bytes, lambda sink, piece=row.piece: sink.add(piece)))
    tree: dict[str, Any] = {}
    for (component, path), found in arrays.items():
        files.append(_description(found))
        keys = [component, *path.split(".")]
        tree[str(tuple(keys))] = {
            "key_metadata": [{"key": key, "key_type": 2} for key in keys],  # 2: of dictionaries
            "value_metadata": {"value_type": "np.ndarray", "skip_deserialize": False},
        }
    metadata = {
        "tree_metadata": tree, "use_ocdbt": False, "use_zarr3": False, "store_array_data_equal_to_fill_value": True,
        "custom_metadata": None,
    }  # fmt: skip
    return [*files, json_file(f"{FOLDER}/{_METADATA}", metadata), json_file(f"{FOLDER}/{_COMMITTED}", _COMMIT)]


_COMMIT: Mapping[str, Any] = {
    "item_handlers": "orbax.checkpoint._src.handlers.pytree_checkpoint_handler.PyTreeCheckpointHandler",
    "metrics": {}, "performance_metrics": {}, "init_timestamp_nsecs": 1, "commit_timestamp_nsecs": 1,
    "custom_metadata": {},
}  # fmt: skip


def _directory(row: Chunk) -> str:
    return f"{row.component}.{row.piece.name}"


def _description(rows: Sequence[Chunk]) -> File:
    """What Zarr has of an array beside its chunks. Raises ValueError unless the rows make one: our own bug."""
    piece, lead = rows[0].piece, [max(row.row[axis] for row in rows) + 1 for axis in range(len(rows[0].row))]
    if {(row.piece.shape, row.piece.dtype) for row in rows} != {(piece.shape, piece.dtype)} or {
        row.row for row in rows
    } != set(product(*map(range, lead))):
        raise ValueError(f"{_directory(rows[0])} has rows that make no array")
    return json_file(f"{FOLDER}/{_directory(rows[0])}/{_ARRAY}", {
        "chunks": [1] * len(lead) + list(piece.shape), "compressor": None, "dimension_separator": ".",
        "dtype": _NAMES[piece.dtype], "fill_value": None, "filters": None, "order": "C",
        "shape": [*lead, *piece.shape], "zarr_format": 2,
    })  # fmt: skip


def is_orbax(folder: Path) -> bool:
    """Whether a checkpoint's folder holds its weights so."""
    return (folder / FOLDER / _METADATA).is_file()
