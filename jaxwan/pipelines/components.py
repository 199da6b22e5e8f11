"""Parts of a checkpoint that are named one by one: files in any layout, and what they are by their content."""

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from jaxwan.config import ConfigError, read_json
from jaxwan.convert.detect import Config, config_of, kind_of
from jaxwan.convert.files import TensorFiles, list_files, saved_by_training
from jaxwan.convert.foreign import describe_name, describe_tensors
from jaxwan.pipelines.arguments import local_path
from jaxwan.pipelines.hub import fetch_file

EXPERTS = {"transformer": "high", "transformer_2": "low"}  # and the noise that each is for
WEIGHTS = (*EXPERTS, "vae", "text_encoder", "image_encoder")
COMPONENTS = (*WEIGHTS, "tokenizer")
_NOISE = re.compile(r"(?<![a-z])(high|low)(?:[_-]?noise)?(?![a-z])")
_NOISES = ("high_noise_model", "low_noise_model")  # an original repository's folders of its experts
_MODEL_TYPES = ("t2v", "i2v", "ti2v", "flf2v")
_ORIGINAL = {
    "vae": r"Wan2\.[12]_VAE\.(pth|safetensors)",
    "text_encoder": r"models_t5_.*\.(pth|safetensors)",
    "image_encoder": r"models_clip_.*\.(pth|safetensors)",
}  # files at the root of an original repository


def check_components(components: Mapping[str, Any] | None) -> dict[str, Path]:
    """Component -> the file or folder that it is read from.

    Raises ValueError for a name of no component, for an expert that a file is not by its name, and for other networks
    that names tell; FileNotFoundError for what is not there.
    """
    if not isinstance(components, Mapping | None):
        raise ValueError(f"components={components!r:.60} are no names with a file each, such as {{'vae': FILE}}")
    paths = {}
    for name, path in (components or {}).items():
        if name not in COMPONENTS:
            raise ValueError(f"components: {name!r:.40} is none of {', '.join(COMPONENTS)}")
        if not isinstance(path, str | Path):
            raise ValueError(f"components: {name}={path!r:.40} is no file")
        paths[name] = fetched(path, local_path(path, name, "give a file or a folder"))
        if not paths[name].exists():
            raise FileNotFoundError(
                f"{name}: there is no file or folder {path} (and a file on the hub is owner/name:path)"
            )
        if told := describe_name(paths[name]):
            raise ValueError(f"{name}: {path} {told}")
    for name, noise in EXPERTS.items():
        told = noise_of(paths[name]) if name in paths else None
        if told not in (None, noise):
            raise ValueError(
                f"{name} is the {noise}-noise expert, and {paths[name].name} is the other by its name: give it as "
                f"{next(other for other in EXPERTS if other != name)}"
            )
    if "tokenizer" in paths and not (paths["tokenizer"] / "tokenizer.json").is_file():
        raise FileNotFoundError(f"tokenizer: {paths['tokenizer']} is no folder with a tokenizer.json")
    return paths


def fetched(given: str | Path, path: Path) -> Path:
    """A path, or the file of the hub that the text names if there is none: owner/name:path. Raises OSError."""
    named = re.fullmatch(r"(\w[\w.-]*/\w[\w.-]*):(\w[\w./-]*)", str(given))
    if path.exists() or named is None or ".." in named[2].split("/"):
        return path
    return fetch_file(*named.groups())


def noise_of(path: Path) -> str | None:
    """ "high" or "low", the expert that a file or folder is by its own name, as no tensor tells; None if by neither."""
    found = set(_NOISE.findall(path.name.lower()))
    return found.pop() if len(found) == 1 else None


_CAUSAL = re.compile(r"self[_-]?forcing|caus(al|vid)|long[_-]?live|stream[_-]?diffusion|krea[_-]?realtime")


def is_causal(path: Path) -> bool:
    """Whether a DiT was trained to see no later frames, as its name says (Self-Forcing, CausVid, StreamDiffusionV2,
    LongLive, Krea Realtime), or the dictionaries that their training saves it in; none of its tensors does."""
    if _CAUSAL.search(path.name.lower()):
        return True
    return path.is_file() and any(name.startswith("generator") for name in saved_by_training(path))


def original_components(folder: Path) -> dict[str, Path]:
    """The parts of an original repository's folder, as `check_components` returns them; none for any other folder."""
    found = {}
    for name, pattern in _ORIGINAL.items():
        matching = [file for file in list_files(folder) if re.fullmatch(pattern, file)]
        if matching:
            found[name] = folder / matching[0]
    both = {name: folder / inner for name, inner in zip(EXPERTS, _NOISES, strict=True)}
    experts = {name: path for name, path in both.items() if path.is_dir()}
    if "vae" not in found and not experts:
        return {}
    found |= experts or {"transformer": folder}
    tokenizer = folder / "google/umt5-xxl"
    return found | ({"tokenizer": tokenizer} if (tokenizer / "tokenizer.json").is_file() else {})


def original_files(names: Collection[str]) -> list[str]:
    """Of the files of a repository on the hub those that are read if it is one of the original ones; else none."""
    root = [name for name in names if "/" not in name]
    if not any(re.fullmatch(_ORIGINAL["vae"], name) for name in root):
        return []
    read = [name for name in root for pattern in _ORIGINAL.values() if re.fullmatch(pattern, name)]
    inner = "|".join(_NOISES)
    experts = rf"(({inner})/)?diffusion_pytorch_model[\w.-]*\.safetensors(\.index\.json)?"
    return [*read, *(n for n in names if re.fullmatch(experts, n) or n.startswith("google/umt5-xxl/"))]


def check_original(repo: str, config: Mapping[str, Any]) -> None:
    """Raises ConfigError for an original repository's config.json whose model is not implemented."""
    kind = config.get("model_type", "t2v")
    if kind not in _MODEL_TYPES:
        raise ConfigError(f"{repo} holds a model of type {kind!r:.40}, and implemented are {', '.join(_MODEL_TYPES)}")


def files_at(path: Path, variant: str | None = None) -> TensorFiles:
    """The tensors of a component, in a file of any layout or a folder of Diffusers' files."""
    return TensorFiles((path,)) if path.is_file() else TensorFiles.find(path, variant)


def _heads(path: Path) -> int | None:
    """How many heads the configuration in an original repository's folder says that its DiT has."""
    config = path / "config.json"
    said = read_json(config) if path.is_dir() and config.is_file() else {}
    heads = said.get("num_heads") if said.get("_class_name") == "WanModel" else None
    if heads is not None and (type(heads) is not int or heads < 1):
        raise ConfigError(f"{config}: num_heads={heads!r:.40} is no number of heads")
    return heads


def configs_of(paths: Mapping[str, Path]) -> dict[str, Config]:
    """The configuration of each part with weights, as its tensors tell it.

    Raises ConfigError for a file that holds another component or none, and for experts that differ.
    """
    configs = {}
    for name in (name for name in WEIGHTS if name in paths):
        files, component = files_at(paths[name]), "transformer" if name in EXPERTS else name
        kind = kind_of(files.shapes)
        told = describe_tensors(files.dtypes)
        if told is not None or kind is None:
            raise ConfigError(f"{paths[name]} {told or f'holds no {component} of a Wan model'}")
        if kind.component != component:
            raise ConfigError(f"{paths[name]} holds a {kind.component} and not a {component}")
        try:
            configs[name] = config_of(kind, files.shapes, heads=_heads(paths[name]))
        except ConfigError as error:
            raise ConfigError(f"{paths[name]}: {error}") from error
    if paths.keys() >= EXPERTS.keys() and configs["transformer"] != configs["transformer_2"]:
        raise ConfigError(f"{paths['transformer']} and {paths['transformer_2']} are of models that differ in size")
    return configs
