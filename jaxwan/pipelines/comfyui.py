"""Parts that lie beside each other as ComfyUI keeps them: in one folder, or in its tree of folders by kind of model.

Which part a file is, its content tells; which of several are meant, sizes and names tell, or the caller is asked.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from jaxwan.config import ConfigError, ImageEncoderConfig, TextEncoderConfig, TransformerConfig, VAEConfig
from jaxwan.convert.detect import Config, config_of, kind_of
from jaxwan.convert.files import is_weights, list_files
from jaxwan.convert.foreign import describe_name, describe_tensors
from jaxwan.convert.rules import CheckpointError, some
from jaxwan.pipelines.components import EXPERTS, configs_of, files_at, noise_of

_DITS = ("diffusion_models", "unet")
_TREE = (*_DITS, "vae", "text_encoders", "clip", "clip_vision")
_INSIDE = ("", "models", "split_files")  # where the tree lies: in its folder itself, in ComfyUI's, in Comfy-Org's
_TOKENIZERS = ("", "tokenizer", "umt5-xxl", "google/umt5-xxl")


class _Part(NamedTuple):
    """A file that holds one part of a Wan model."""

    path: Path
    component: str
    config: Config


def find_parts(model: Path, given: Mapping[str, Path]) -> dict[str, Path]:
    """The parts of a model that is a DiT's file, with what lies beside it, or a folder of ComfyUI's; with the `given`
    ones, by component, of which none is looked for. A folder without a DiT has none.

    Raises ValueError where several files could be a part, ConfigError for a file that is no DiT, and for a folder
    without one where files are recognised as something else.
    """
    folder = _root(model.parent) if model.is_file() else model
    parts = dict(given)
    if model.is_file():
        wanted = next((name for name, noise in EXPERTS.items() if noise == noise_of(model)), "transformer")
        configs_of({wanted: model})  # raises for what is none
        if wanted in parts:
            raise ValueError(f"{model} and {parts[wanted]} are both given as the {wanted}: leave one out")
        parts[wanted] = model
    found, others = _read_parts(_candidates(folder, beside=model.parent if model.is_file() else folder))
    parts |= _experts([part for part in found if part.component == "transformer"], parts, folder)
    dit = next((config for name, config in configs_of(_only(parts, EXPERTS)).items()), None)
    if not isinstance(dit, TransformerConfig):
        if others:
            raise ConfigError(others[0])
        return {}
    for name, fits in _fitting(dit).items():
        paths = [part.path for part in found if part.component == name and fits(part)]
        if name not in parts and paths:
            parts[name] = _the_one(name, paths, folder)
    if "tokenizer" not in parts:
        folders = (folder / inside / name for inside in _INSIDE for name in _TOKENIZERS)
        if tokenizer := next((path for path in folders if (path / "tokenizer.json").is_file()), None):
            parts["tokenizer"] = tokenizer
    return parts


def _only(parts: Mapping[str, Path], names: Iterable[str]) -> dict[str, Path]:
    return {name: parts[name] for name in names if name in parts}


def _root(folder: Path) -> Path:
    """The folder of the tree that a folder of DiTs is in, or else that folder itself."""
    return next((path.parent for path in (folder, *folder.parents[:2]) if path.name in _DITS), folder)


def _candidates(folder: Path, beside: Path) -> list[Path]:
    """Files that may hold a part: those in a folder, those beside the DiT, and those in the trees inside of it."""
    tree = [path for inside in _INSIDE for name in _TREE for path in _with_inner(folder / inside / name)]
    folders = dict.fromkeys([folder, beside, *tree])
    files = [path / name for path in folders for name in filter(is_weights, list_files(path))]
    return [path for path in files if not re.search(r"-\d{5}-of-\d{5}\.", path.name)]


def _with_inner(folder: Path) -> list[Path]:
    """A folder and those in it, in which people keep files by model."""
    return [folder, *sorted(path for path in folder.iterdir() if path.is_dir())] if folder.is_dir() else []


def _read_parts(paths: Iterable[Path]) -> tuple[list[_Part], list[str]]:
    """What the files hold that hold a part of a Wan model, by their headers; and what is said of others."""
    parts, others = [], []
    for path in paths:
        try:
            files = files_at(path)
            kind, told = kind_of(files.shapes), describe_name(path) or describe_tensors(files.dtypes)
            if told is not None:
                others.append(f"{path} {told}")
            elif kind is not None:
                parts.append(_Part(path, kind.component, config_of(kind, files.shapes)))
        except CheckpointError as error:
            others.append(str(error))
        except ConfigError as error:
            others.append(f"{path}: {error}")
    return parts, others


def _experts(found: list[_Part], parts: Mapping[str, Path], folder: Path) -> dict[str, Path]:
    """The DiTs that are meant, of those found and beside those that are given: one alone, or one for either noise."""
    given = configs_of(_only(parts, EXPERTS))
    if not given:
        by_noise = {name: [part for part in found if noise_of(part.path) == n] for name, n in EXPERTS.items()}
        if len(found) == 1 or (len(found) == 2 and all(len(several) == 1 for several in by_noise.values())):
            named = {name: several[0].path for name, several in by_noise.items() if several}
            return named or {"transformer": found[0].path}
        return {"transformer": _the_one("transformer", [part.path for part in found], folder)} if found else {}
    ((name, config), *others) = given.items()
    if others or noise_of(parts[name]) is None:
        return {}
    (other,) = EXPERTS.keys() - {name}
    paths = [part.path for part in found if part.config == config and noise_of(part.path) == EXPERTS[other]]
    twins = [path for path in paths if _without_noise(path) == _without_noise(parts[name])]
    return {other: _the_one(other, twins or paths, folder)} if paths else {}


def _without_noise(path: Path) -> str:
    """A file's name without the word that tells its expert."""
    return re.sub(r"(?<![a-z])(high|low)", "", path.name.lower())


def _fitting(dit: TransformerConfig) -> dict[str, Callable[[_Part], bool]]:
    """Component -> whether one of its files goes with this DiT."""

    def vae(part: _Part) -> bool:
        return isinstance(part.config, VAEConfig) and part.config.z_dim == dit.out_channels

    def text_encoder(part: _Part) -> bool:  # T5's position biases are its first layer's alone
        has = f"encoder.block.{getattr(part.config, 'num_layers', 0) - 1}.layer.0.SelfAttention.relative_attention_bias"
        shapes = files_at(part.path).shapes
        umt5 = "token_embedding.weight" in shapes or f"{has}.weight" in shapes
        return isinstance(part.config, TextEncoderConfig) and part.config.d_model == dit.text_dim and umt5

    def image_encoder(part: _Part) -> bool:
        return isinstance(part.config, ImageEncoderConfig) and part.config.hidden_size == dit.image_dim

    return {"vae": vae, "text_encoder": text_encoder, "image_encoder": image_encoder}


def _the_one(name: str, paths: list[Path], folder: Path) -> Path:
    """The only one. Raises ValueError that names all of several."""
    if len(paths) > 1:
        raise ValueError(
            f"{folder} holds {len(paths)} files that could be the {name}, {some([path.name for path in paths])}: "
            f"say which by --component {name}=FILE (components={{{name!r}: …}} in Python)"
        )
    return paths[0]
