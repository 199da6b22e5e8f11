"""What a checkpoint is, from its headers alone: parts, layouts, sizes, dtypes, and what does not fit."""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from jaxwan.config import ConfigError
from jaxwan.convert.detect import kind_of, layout_rules
from jaxwan.convert.files import TensorFiles
from jaxwan.convert.foreign import describe_tensors
from jaxwan.convert.load import flat_shapes, prove
from jaxwan.convert.rules import CheckpointError, place_all, some
from jaxwan.convert.tensors import DTYPES, Stored
from jaxwan.convert.verify import SUMS
from jaxwan.models.layers import abstract
from jaxwan.models.transformer import WanTransformer
from jaxwan.pipelines.checkpoint import Checkpoint
from jaxwan.pipelines.components import files_at
from jaxwan.pipelines.load import component_rules
from jaxwan.pipelines.parts import MODELS

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Component:
    """A part of a checkpoint by its headers. dtypes: as they are stored -> how many tensors; quantised: those that are
    decoded while they are read; problem: why it cannot be loaded."""

    name: str
    path: str
    layout: str | None
    files: int = 0
    tensors: int = 0
    parameters: int = 0
    num_bytes: int = 0
    dtypes: Mapping[str, int] | None = None
    quantised: int = 0
    unused: tuple[str, ...] = ()
    problem: str | None = None


@dataclass(frozen=True)
class Inspection:
    """What a source is."""

    name: str
    variant: str | None
    components: tuple[Component, ...]
    told: Mapping[str, Any]  # settings that come with it

    @property
    def num_bytes(self) -> int:
        """Of all tensors, as they are stored."""
        return sum(component.num_bytes for component in self.components)

    @property
    def loads(self) -> bool:
        """Whether all parts that are there can be loaded."""
        return not any(component.problem for component in self.components)

    def as_json(self) -> dict[str, Any]:
        """All of it."""
        return asdict(self) | {"num_bytes": self.num_bytes, "loads": self.loads}


def inspect_checkpoint(checkpoint: Checkpoint) -> Inspection:
    """What a checkpoint holds; reads headers only. What is wrong with a part is its `problem`."""
    told = {
        "experts": list(checkpoint.experts), "sampler": checkpoint.sampler.sampler,
        "flow_shift": checkpoint.sampler.shift, "boundary_ratio": checkpoint.boundary_ratio,
        "tokenizer": (checkpoint.place("tokenizer") / "tokenizer.json").is_file(),
        "checksums": (checkpoint.folder / SUMS).is_file(),
    }  # fmt: skip
    parts = tuple(_component(checkpoint, name) for name in checkpoint.components)
    return Inspection(checkpoint.name, checkpoint.variant.name, parts, told)


def inspect_file(path: Path) -> Inspection:
    """What a single file (or a folder of one part) holds, whether it is of a Wan model or not. Raises CheckpointError
    or OSError for what cannot be read at all."""
    files = files_at(path)
    kind, told = kind_of(files.shapes), describe_tensors(files.dtypes)
    if kind is None or told is not None:
        problem = told or "holds no component of a Wan model"
        return Inspection(path.name, None, (_counted("?", path, None, files, problem=problem),), {})
    return Inspection(path.name, None, (_counted(kind.component, path, kind.layout, files),), {})


def _component(checkpoint: Checkpoint, name: str) -> Component:
    place, component = checkpoint.place(name), "transformer" if name in checkpoint.experts else name
    try:
        files = checkpoint.files(name)
        kind = kind_of(files.shapes)
    except (OSError, CheckpointError) as error:
        if checkpoint.hub_id is not None and isinstance(error, FileNotFoundError):
            return Component(name, str(place), "not fetched")
        return Component(name, str(place), None, problem=str(error))
    layout, unused, problem = None if kind is None else kind.layout, (), None
    try:
        cfg = getattr(checkpoint, component)
        _, state = abstract(MODELS.get(name, WanTransformer), cfg, jnp.dtype("float32"))
        shapes = {path: leaf.shape for path, leaf in flat_shapes(state).items()}
        prove(shapes, files, component_rules(name, checkpoint, files), what=str(place))
        if layout is not None:
            read = place_all(files.shapes, layout_rules(component, layout, cfg, files.shapes, whole=True))
            unused = tuple(key for key in files.shapes if key not in read)
    except (CheckpointError, ConfigError) as error:
        problem = str(error)
    return _counted(name, files.paths[0] if files.part else place, layout, files, unused=unused, problem=problem)


def _counted(name: str, path: Path, layout: str | None, files: TensorFiles, **more: Any) -> Component:
    tensors = files.tensors.values()
    counts = [_count(tensor) for tensor in tensors]
    return Component(
        name, str(path), layout, files=len(files.paths), tensors=len(counts), parameters=sum(counts),
        num_bytes=sum(tensor.num_bytes for tensor in tensors),
        dtypes=dict(Counter(stored_dtype(tensor) for tensor in tensors).most_common()),
        quantised=sum(t.num_bytes < n * t.dtype.itemsize for t, n in zip(tensors, counts, strict=True)), **more,
    )  # fmt: skip


def _count(tensor: Stored) -> int:
    count = 1
    for size in tensor.shape:
        count *= size
    return count


def stored_dtype(tensor: Stored) -> str:
    """In the file, where a view is read as another."""
    return _NAMES[getattr(tensor, "dtype_on_disk", tensor.dtype)]


def table(inspection: Inspection) -> str:
    """For people."""
    rows = [("part", "layout", "tensors", "parameters", "size", "dtypes", "")]
    for part in inspection.components:
        dtypes = ", ".join(f"{name} {count}" for name, count in (part.dtypes or {}).items())
        notes = {f"{part.quantised} quantised": part.quantised, f"{len(part.unused)} unused": part.unused}
        rows.append((
            part.name, part.layout or "-", str(part.tensors), f"{part.parameters / 1e6:,.1f} M",
            amount(part.num_bytes), dtypes, ", ".join(note for note, any_ in notes.items() if any_),
        ))  # fmt: skip
    what = inspection.variant or "a part of a checkpoint"
    lines = [f"{inspection.name}: {what}, {amount(inspection.num_bytes)}", *_aligned(rows, numbers=(2, 3, 4))]
    for name, value in inspection.told.items():
        if value not in (None, False):
            value = ", ".join(value) if isinstance(value, list) else "yes" if value is True else value
            lines.append(f"{name}: {value}")
    for part in inspection.components:
        lines += [f"{part.name} has unused {some(part.unused)}"] * bool(part.unused)
        lines += [f"{part.name} cannot be loaded: {part.problem}"] * bool(part.problem)
    return "\n".join(lines)


def amount(num_bytes: int) -> str:
    """Bytes, for people."""
    return f"{num_bytes / 1e9:,.2f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:,.2f} MB"


def _aligned(rows: Sequence[tuple[str, ...]], numbers: Collection[int]) -> list[str]:
    """Rows in columns, those of numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if place in numbers else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
