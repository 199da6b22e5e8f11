"""Parameters out as a Diffusers component folder: the rule tables run backwards, torch-free."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx
from jaxtyping import ArrayLike

from jaxwan.convert.rules import Rule, expected_sources

STEM = "diffusion_pytorch_model"  # file name of Diffusers' components; transformers' are called "model"


def save_module(module: nnx.Module, folder: Path, rules: Sequence[Rule], *, stem: str = STEM) -> Path:
    """Write the parameters of `module` as `folder/<stem>.safetensors`; what `load_module` reads with the same rules."""
    flat = nnx.to_flat_state(nnx.state(module, nnx.Param))
    return save_arrays({".".join(map(str, path)): leaf[...] for path, leaf in flat}, folder, rules, stem=stem)


def save_arrays(arrays: Mapping[str, ArrayLike], folder: Path, rules: Sequence[Rule], *, stem: str = STEM) -> Path:
    """Write parameters (dotted path -> array) as one file `folder/<stem>.safetensors`, each in the dtype it has.

    Every row of a stacked parameter becomes a tensor of its own; all of them are on the host at once. The file appears
    whole or not at all. Raises OSError when it cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    path = folder / f"{stem}.safetensors"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(checkpoint_tensors(arrays, rules), path, metadata={"format": "pt"})  # Diffusers insists on a format
        path.chmod(0o644)  # safetensors leaves it readable by its owner alone
    except (OSError, SafetensorError) as error:
        raise OSError(f"{path} cannot be written ({error})") from error
    return path


def checkpoint_tensors(arrays: Mapping[str, ArrayLike], rules: Sequence[Rule]) -> dict[str, np.ndarray]:
    """Checkpoint key -> tensor of everything in `arrays` (dotted path -> parameter)."""
    values = {path: np.asarray(value) for path, value in arrays.items()}
    tensors = {}
    for key, (into, _) in expected_sources({path: v.shape for path, v in values.items()}, rules).items():
        value = values[into.path] if into.layer is None else values[into.path][into.layer]
        tensors[key] = np.ascontiguousarray(into.transform.invert(value))  # views would be written in the wrong order
    return tensors


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Write a configuration file, its folder too."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
