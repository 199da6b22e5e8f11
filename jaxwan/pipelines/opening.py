"""What the words of a command name: a folder, a hub id, or files that are told apart by what they hold."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from jaxwan.convert.detect import config_of, kind_of, layout_rules
from jaxwan.convert.foreign import describe_tensors
from jaxwan.convert.lora import Lora
from jaxwan.convert.rules import CheckpointError
from jaxwan.convert.verify import Component
from jaxwan.pipelines.checkpoint import Checkpoint, ensure_weights, open_checkpoint
from jaxwan.pipelines.components import files_at, noise_of


def open_sources(
    sources: Sequence[str], variant: str | None = None, components: Mapping[str, str] | None = None,
    loras: Sequence[Lora] = (),
) -> Checkpoint:  # fmt: skip
    """The checkpoint that a folder or hub id is, or that files are together; headers of files are read, no weights.

    components: further files, by the part that each is. loras: merged into the DiTs. Raises ValueError or OSError as
    `open_checkpoint` does, and for files that are no part, or the same one.
    """
    if len(sources) == 1:  # of a file, the other parts may lie beside it
        return open_checkpoint(sources[0], variant, components, loras)
    files = [source for source in sources if Path(source).is_file()]
    models = [source for source in sources if source not in files]
    if len(models) > 1:
        raise ValueError(f"{' and '.join(models)} are several checkpoints: give one, and files over it if need be")
    parts = dict(components or {})
    for file in files:
        name = part_of(Path(file))
        if name in parts:
            raise ValueError(f"{parts[name]} and {file} are both a {name}: leave one out, or say which part it is")
        parts[name] = file
    return open_checkpoint(models[0] if models else None, variant, parts, loras)


def part_of(file: Path) -> str:
    """Which part of a checkpoint a file is by its tensors, of two experts by its name. Raises CheckpointError."""
    files = files_at(file)
    kind, told = kind_of(files.shapes), describe_tensors(files.dtypes)
    if kind is None or told is not None:
        raise CheckpointError(f"{file} {told or 'holds no component of a Wan model'}")
    low = kind.component == "transformer" and noise_of(file) == "low"
    return "transformer_2" if low else kind.component


def open_components(source: str, variant: str | None = None) -> dict[str, Component]:
    """Component -> its tensors and the rules that read them, of a checkpoint whose weights are fetched, or of a file
    alone. Raises ValueError or OSError."""
    path = Path(source)
    if path.is_file():
        name, files = part_of(path), files_at(path)
        kind = kind_of(files.shapes)
        assert kind is not None  # or it was no part
        config = None if kind.component == "transformer" else config_of(kind, files.shapes)
        return {name: (files, layout_rules(kind.component, kind.layout, config, files.shapes, whole=True))}
    checkpoint = open_checkpoint(source, variant)
    ensure_weights(checkpoint)
    return {name: _component(checkpoint, name) for name in checkpoint.components}


def _component(checkpoint: Checkpoint, name: str) -> Component:
    files, component = checkpoint.files(name), "transformer" if name in checkpoint.experts else name
    kind = kind_of(files.shapes)
    if kind is None or kind.component != component:
        raise CheckpointError(f"{checkpoint.place(name)} holds no {component} of a Wan model")
    config = getattr(checkpoint, component)
    return files, layout_rules(component, kind.layout, config, files.shapes, whole=True)
