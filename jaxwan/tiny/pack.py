"""Carries a training to another machine and back: its latest states and the model written so far, in small files.

The files are pieces of one tar file (`cat state.tar.* | tar t` lists it) and their checksums, as `sha256sum -c` reads
them. Nothing is compressed: Orbax has done it, and what is left of float32 numbers gives no more. Encoded clips stay
behind: they follow from the VAE, and a GPU makes them anew in a minute.
"""

import os
import re
import tarfile
from collections.abc import Iterable, Mapping
from functools import partial
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory

from jaxwan.tiny.checkpoint import EXPERTS
from jaxwan.tiny.training import latest_step

PIECE = 15 * 2**20  # bytes a piece, at most
SUMS = "SHA256SUMS"

# What each stage writes into the model's folder, and what lies there beside it.
WRITTEN = {
    "vae": ("vae",),
    "text": ("text_encoder",),
    "base": tuple(EXPERTS.values()),
    **{expert: (folder,) for expert, folder in EXPERTS.items()},
}
ENTRIES = (
    "vae",
    "text_encoder",
    *EXPERTS.values(),
    "tokenizer",
    "scheduler",
    "generation_config.json",
    "model_index.json",
)


def pack(states: Path, output: Path, folder: Path, stages: Iterable[str] = tuple(WRITTEN)) -> dict[str, int]:
    """Write the stages' latest states and the model in `output` into `folder`; returns each packed state's step.

    A stage without a state is left out. Raises ValueError when there is neither a state nor a model.
    """
    steps = {stage: step for stage in stages if (step := latest_step(states / stage)) is not None}
    entries = [name for name in ENTRIES if (output / name).exists()]
    if not steps and not entries:
        raise ValueError(f"there is nothing to pack: {states} holds no state, {output} no model")
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder, prefix=".packing-") as made:
        with tarfile.open(Path(made, "whole"), "w") as tar:
            for stage, step in steps.items():
                tar.add(states / stage / str(step), f"states/{stage}/{step}")
            for name in entries:
                tar.add(output / name, f"model/{name}")
        pieces = _cut(Path(made, "whole"), Path(made))
        for path in (folder / SUMS, *_pieces(folder)):  # the sums go first and come last: without them nothing counts
            path.unlink(missing_ok=True)
        for name in (*pieces, SUMS):
            os.rename(Path(made, name), folder / name)
    return steps


def unpack(folder: Path, states: Path, output: Path) -> dict[str, int]:
    """Put what `pack` wrote into `folder` where it belongs, whole or not at all; returns each packed state's step.

    What a stage has written to `output` is replaced with its state; of the rest, what is there stays. So a leg of one
    expert leaves the other alone. Raises ValueError when a piece is missing or damaged, and when a state is here that
    is further than the packed one.
    """
    pieces = _checked_pieces(folder)
    for place in (states, output):
        place.mkdir(parents=True, exist_ok=True)
    with (
        TemporaryDirectory(dir=states, prefix=".unpacking-") as new_states,
        TemporaryDirectory(dir=output, prefix=".unpacking-") as new_model,
    ):
        with open(Path(new_states, "whole"), "wb") as whole:
            whole.writelines(piece.read_bytes() for piece in pieces)
        try:
            steps = _extract(Path(new_states, "whole"), Path(new_states), Path(new_model))
        except tarfile.TarError as error:
            raise ValueError(f"{folder} holds no packed training: {error}") from error
        later = _later(steps, states, folder)
        written = {name for stage in later for name in WRITTEN[stage]}
        for name in ENTRIES:
            new, old = Path(new_model, "model", name), output / name
            if new.exists() and (name in written or not old.exists()):
                _replace(old, new)
        for stage in later:  # last: after a crash before this, unpacking once more replaces the model again
            _replace(states / stage, Path(new_states, "states", stage))
    return steps


def _cut(whole: Path, folder: Path) -> list[str]:
    """Write pieces and their sums; returns the pieces' names, in order."""
    sums = {}
    with open(whole, "rb") as file:
        for number, content in enumerate(iter(partial(file.read, PIECE), b"")):
            name = f"state.tar.{number:03}"
            (folder / name).write_bytes(content)
            sums[name] = sha256(content).hexdigest()
    (folder / SUMS).write_text("".join(f"{digest}  {name}\n" for name, digest in sums.items()))
    return list(sums)


def _checked_pieces(folder: Path) -> list[Path]:
    """All pieces in `folder`, in order. Raises ValueError unless they are those that were written."""
    if not (folder / SUMS).is_file():
        raise ValueError(f"{folder} has no {SUMS}: it is no packed training, or a part of one")
    sums = {
        name: digest for digest, _, name in (line.partition("  ") for line in (folder / SUMS).read_text().splitlines())
    }
    found = [path.name for path in _pieces(folder)]
    if missing := sorted(sums.keys() - set(found)):
        raise ValueError(f"{folder} lacks {', '.join(missing)} of {len(sums)} pieces")
    if unknown := sorted(set(found) - sums.keys()):
        raise ValueError(f"{folder} has {', '.join(unknown)}, which {SUMS} does not name")
    for name in found:
        if sha256((folder / name).read_bytes()).hexdigest() != sums[name]:
            raise ValueError(f"{folder / name} is damaged: its checksum is another than {SUMS} says")
    return [folder / name for name in found]


def _pieces(folder: Path) -> list[Path]:
    return sorted(folder.glob("state.tar.*"))


def _extract(whole: Path, states: Path, model: Path) -> dict[str, int]:
    """Extract what is packed to `states`/states and `model`/model; returns the step of each state."""
    steps = {}
    with tarfile.open(whole) as tar:
        for name in tar.getnames():
            if found := re.fullmatch(r"states/(\w+)/(\d+)", name):
                steps[found[1]] = int(found[2])
        for place, prefix in ((states, "states/"), (model, "model/")):
            members = [member for member in tar if member.name.startswith(prefix)]
            tar.extractall(place, members, filter="data")
    if unknown := steps.keys() - WRITTEN.keys():
        raise ValueError(f"states of {', '.join(sorted(unknown))} are packed: known are {', '.join(WRITTEN)}")
    return steps


def _later(steps: Mapping[str, int], states: Path, folder: Path) -> list[str]:
    """The stages whose packed state is further than the one here."""
    here = {stage: latest_step(states / stage) for stage in steps}
    for stage, step in steps.items():
        if (own := here[stage]) is not None and own > step:
            raise ValueError(
                f"{states / stage} is at step {own}, {folder} only at {step}: move the first away to go back to it"
            )
    return [stage for stage, step in steps.items() if here[stage] != step]


def _replace(old: Path, new: Path) -> None:
    """Move `new` to `old`; what was there goes where `new` came from, to be deleted with it."""
    if old.exists():
        old.rename(new.with_name(f"{new.name}.old"))
    new.rename(old)
