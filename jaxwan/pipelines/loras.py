"""LoRAs beside a checkpoint: for which expert each is, and that it fits, before anything is loaded."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from jaxwan.config import TransformerConfig
from jaxwan.convert import diffusers
from jaxwan.convert.load import flat_shapes
from jaxwan.convert.lora import Lora, added_by, names_in
from jaxwan.convert.rules import Shape, expected_sources
from jaxwan.convert.tensors import Reader
from jaxwan.models.layers import abstract
from jaxwan.models.transformer import WanTransformer
from jaxwan.pipelines.arguments import local_path, number
from jaxwan.pipelines.components import EXPERTS, noise_of

log = logging.getLogger(__name__)


def check_loras(
    loras: Any, transformer: TransformerConfig, experts: Sequence[str], *, pair: bool, name: str
) -> tuple[Lora, ...]:
    """LoRAs for a model, with the expert that each is for; those whose expert is None are for all that it has.

    experts: the components that there are. pair: whether the model is published with two. Says by logging what a LoRA
    does not say itself. Raises ValueError or OSError for what is no LoRA, is for another expert, or does not fit.
    """
    if not isinstance(loras, Sequence) or isinstance(loras, str):
        raise ValueError(f"loras={loras!r:.60} is no list, such as [jaxwan.Lora('style.safetensors', 0.8)]")
    noises = [EXPERTS[expert] for expert in experts] if pair else [None]
    shapes, chosen = _shapes(transformer), []
    names, reader = names_in(shapes, what=name), Reader()
    for lora in map(_checked, loras):
        lora, notes = _for_expert(lora, noises, name), {}
        for noise in (noise for noise in noises if lora.expert in (None, noise)):
            if any(_same(other, lora) and other.expert in (None, noise) for other in chosen):
                raise ValueError(f"the LoRA {lora.path} is given twice for the same expert: give one strength")
            own = replace(lora, expert=noise)
            notes |= dict.fromkeys(added_by(own, names, shapes, reader, what=name).notes)
        for note in notes:
            log.info(note)
        chosen.append(lora)
    return tuple(chosen)


def described(loras: Sequence[Lora]) -> list[dict[str, Any]]:
    """What a video's settings say of LoRAs: the files' names, and not where they are."""
    return [{"file": Path(lora.path).name, "strength": lora.strength, "expert": lora.expert} for lora in loras]


def _shapes(cfg: TransformerConfig) -> dict[str, Shape]:
    """The tensors of a DiT, in the Diffusers layout."""
    _, state = abstract(WanTransformer, cfg, jnp.dtype(jnp.float32))
    targets = {path: leaf.shape for path, leaf in flat_shapes(state).items()}
    return {key: shape for key, (_, shape) in expected_sources(targets, diffusers.TRANSFORMER).items()}


def _checked(lora: Any) -> Lora:
    """A LoRA whose file is there and whose values are such. Raises ValueError or OSError."""
    lora = Lora(lora) if isinstance(lora, str | Path) else lora
    if not isinstance(lora, Lora) or not isinstance(lora.path, str | Path):
        raise ValueError(f"loras: {lora!r:.60} is no jaxwan.Lora(path, strength, expert)")
    if lora.expert not in (None, "high", "low"):
        raise ValueError(f"loras: expert={lora.expert!r:.40} is neither 'high' nor 'low'")
    path = local_path(lora.path, "lora", "give a file")
    if path.is_dir():
        files = ", ".join(sorted(file.name for file in path.glob("*.safetensors"))[:3]) or "no safetensors"
        raise IsADirectoryError(f"lora: {path} is a folder (with {files}): give the file")
    if not path.is_file():
        raise FileNotFoundError(f"lora: there is no file {path} (a strength is a number behind a last colon: FILE:0.8)")
    return Lora(path, float(number("a LoRA's strength", lora.strength)), lora.expert)


def _same(a: Lora, b: Lora) -> bool:
    """Whether two are one file, however their paths are written."""
    return Path(a.path).samefile(b.path)


def _for_expert(lora: Lora, noises: Sequence[str | None], name: str) -> Lora:
    """The LoRA with its expert: the one that was said, else that of its name. Raises ValueError for one not there."""
    file = Path(lora.path)
    told = noise_of(file)
    if noises == [None]:
        if lora.expert is not None:
            raise ValueError(f"the LoRA {file} is given for the {lora.expert}-noise expert, and {name} has one DiT")
        if told is not None:
            log.info("%s is for a %s-noise expert by its name; %s has one DiT, which it goes to", file.name, told, name)
        return lora
    if lora.expert is None and told is None:
        if len(noises) > 1:
            log.info("%s says no expert by its name (high or low): it goes to both", file.name)
        return lora
    if lora.expert is not None and told not in (None, lora.expert):
        log.info("%s is for the %s-noise expert by its name, and goes to the other", file.name, told)
    expert = lora.expert or told
    if expert not in noises:
        raise ValueError(f"the LoRA {file} is for the {expert}-noise expert, and {name} has the other alone")
    return replace(lora, expert=expert)
