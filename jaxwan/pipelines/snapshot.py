"""A video on its way as one file, from which any pipeline of the same model goes on, whatever its mesh.

The file is safetensors: arrays by the names of `Entry`'s fields, those of latents in the public axis order, and under
`jaxwan` in the metadata what they belong to, as JSON.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxwan import __version__
from jaxwan.pipelines.axes import to_internal, to_public
from jaxwan.pipelines.checkpoint import Checkpoint
from jaxwan.pipelines.denoise import Entry
from jaxwan.pipelines.dit import Controls, Inputs
from jaxwan.pipelines.encoders import entry_shapes
from jaxwan.pipelines.loras import described
from jaxwan.pipelines.media.writing import replacing
from jaxwan.pipelines.prompt import MAX_TOKENS
from jaxwan.schedulers.table import MAX_STEPS, SamplerState, Table

FORMAT = 1  # of the file: another one where an older jaxwan would read it wrongly
KEY = "jaxwan"  # in the file's metadata


def save_entry(
    path: Path, entry: Entry, settings: dict[str, Any], checkpoint: Checkpoint, model: dict[str, Any]
) -> None:
    """Write a video; an existing file is replaced once all is written. model: `identity` of the pipeline's."""
    from safetensors.numpy import save

    size = checkpoint.geometry.pixel_shape(*entry.sampler.x.shape[:3])
    about = {"format": FORMAT, "version": __version__, "model": model, "size": size, "settings": settings}
    arrays = {name: to_public(array) if _has_axes(name) else np.asarray(array) for name, array in _flat(entry)}
    data = save({name: np.array(array, order="C") for name, array in arrays.items()}, {KEY: json.dumps(about)})
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def load_entry(path: Path, checkpoint: Checkpoint, model: dict[str, Any]) -> tuple[Entry, dict[str, Any]]:
    """The video in a file, and the settings that made it.

    Raises OSError for a file that cannot be read, ValueError for one that is none of these, or of another model or
    format: anyone may have written it.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "numpy", backend="pread") as file:
            about = _about(path, file.metadata(), model)
            wanted = _wanted(path, file, checkpoint, about["size"])
            arrays = {name: file.get_tensor(name) for name in wanted}
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or no safetensors file ({error})") from error
    entry = _entry({name: to_internal(x) if _has_axes(name) else x for name, x in arrays.items()})
    steps, experts = entry.num_steps, set(entry.inputs.controls.expert)
    right = 1 <= steps <= MAX_STEPS and 0 <= entry.done <= steps and experts <= {0, model["experts"] - 1}
    right = right and entry.branches <= entry.texts  # guidance needs a negative text
    if not right or not all(np.isfinite(x).all() for x in arrays.values()):
        raise ValueError(f"{path} holds numbers that no video on its way has")
    return entry, about["settings"]


def identity(checkpoint: Checkpoint, dtype: Any) -> dict[str, Any]:
    """What must be the same where a video goes on: the DiT's configuration, its tensors but for their values, dtype."""
    files = {name: checkpoint.files(name) for name in checkpoint.experts}
    tensors = {name: sorted(found.kinds().items()) for name, found in files.items()}
    changed = tensors | {"loras": described(checkpoint.loras)} if checkpoint.loras else tensors
    digest = hashlib.sha256(json.dumps(changed).encode()).hexdigest()
    return structure(checkpoint) | {"dtype": str(dtype), "tensors": digest}


def structure(checkpoint: Checkpoint) -> dict[str, Any]:
    """What of `identity` the configurations tell alone."""
    about = asdict(checkpoint.transformer) | {"experts": checkpoint.num_experts}
    return json.loads(json.dumps(about))  # as a file gives it back: lists for tuples


def check_identity(path: Path, theirs: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Raises ValueError where what a file tells of its model is not what this one's `identity` or `structure` says."""
    for name, value in own.items():
        if theirs.get(name) != value and name == "tensors":
            raise ValueError(
                f"{path} was made by another model: names, shapes or dtypes of its tensors differ, or LoRAs"
            )
        if theirs.get(name) != value:
            raise ValueError(f"{path} was made by a model of {name}={theirs.get(name)!r:.40}, this one has {value!r}")


# Reading what anyone may have written


def _about(path: Path, metadata: dict[str, str] | None, model: dict[str, Any]) -> dict[str, Any]:
    """What the file says of itself, checked against the pipeline's model."""
    try:
        about = json.loads((metadata or {})[KEY])
        version, theirs, size = about["format"], dict(about["model"]), about["size"]
        right = [len(size), *map(type, size), type(about["settings"]["call"]["seed"])] == [3, int, int, int, int]
    except (AttributeError, KeyError, TypeError, ValueError):
        right = False
    if not right:
        raise ValueError(f"{path} holds no video on its way: WanPipeline.save_state writes such files")
    if version != FORMAT:
        raise ValueError(f"{path} is of format {version!r:.20}, and jaxwan {__version__} reads {FORMAT}")
    check_identity(path, theirs, model)
    return about


def _wanted(path: Path, file: Any, checkpoint: Checkpoint, size: Sequence[int]) -> list[str]:
    """The names of the arrays, whose shapes and dtypes are proved to be those of a video of this size and model."""
    checkpoint.geometry.check_size(*size)
    slices = {name: file.get_slice(name) for name in file.keys()}
    found = {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in slices.items()}
    branches, rows = (*found.get("inputs.text", ((),))[0], 0, 0)[:2]
    if branches not in (1, 2) or not 1 <= rows <= MAX_TOKENS:
        raise ValueError(f"{path} has no texts of 1 to {MAX_TOKENS} rows")
    image = found.get("inputs.image", ((0,),))[0][0]
    encoder = checkpoint.image_encoder
    shapes = entry_shapes(
        checkpoint, (size[0], size[1], size[2]), branches=branches, text_rows=rows,
        last_image=encoder is not None and image > encoder.num_rows, renoises="inputs.noise" in found,
    )  # fmt: skip
    wanted = {}
    for name, shape in _flat(shapes):
        sizes = (*shape.shape[:-4], shape.shape[-1], *shape.shape[-4:-1]) if _has_axes(name) else shape.shape
        wanted[name] = sizes, {"float32": "F32", "int32": "I32", "bool": "BOOL"}[shape.dtype.name]
    wrong = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
    if wrong:
        there, right = (what.get(wrong[0], "missing") for what in (found, wanted))
        at = "x".join(map(str, size))
        raise ValueError(f"{path} does not fit this model at {at}: {wrong[0]} is {there}, not {right}")
    return list(wanted)


# Names


def _flat(entry: Entry) -> Iterator[tuple[str, Any]]:
    """(dotted name, leaf) of every array there is."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(entry):
        yield ".".join(key.name for key in path), leaf


def _has_axes(name: str) -> bool:
    """Whether an array is one of latents, so that it has another axis order in the file."""
    return name.startswith("sampler.") or name in ("inputs.channels", "inputs.first", "inputs.noise")


def _entry(arrays: Mapping[str, np.ndarray]) -> Entry:
    """The inverse of `_flat`."""

    def part(kind: Any, prefix: str, **made: Any) -> Any:
        return kind(**{name: made.get(name, arrays.get(prefix + name)) for name in kind._fields})

    table = part(Table, "inputs.controls.table.")
    controls = part(Controls, "inputs.controls.", table=table)
    return part(Entry, "", sampler=part(SamplerState, "sampler."), inputs=part(Inputs, "inputs.", controls=controls))
