"""A checkpoint folder as its configuration files describe it: no tensor is read here."""

import re
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from jaxwan.config import (
    ConfigError,
    Defaults,
    ImageEncoderConfig,
    ImageInput,
    TextEncoderConfig,
    TransformerConfig,
    VAEConfig,
    Variant,
    read_json,
    recognise,
)
from jaxwan.geometry import Geometry
from jaxwan.pipelines.arguments import check_kind
from jaxwan.pipelines.prompt import Tokenizer, load_tokenizer
from jaxwan.schedulers.config import SamplerDefaults, read_scheduler

_PIPELINES = ("WanPipeline", "WanImageToVideoPipeline", "WanVideoToVideoPipeline")
_CLASSES = {
    "transformer": "WanTransformer3DModel",
    "transformer_2": "WanTransformer3DModel",
    "vae": "AutoencoderKLWan",
    "text_encoder": "UMT5EncoderModel",
    "image_encoder": "CLIPVisionModel",
}
_KINDS = {
    **dict.fromkeys(("height", "width", "num_frames", "num_inference_steps"), int),
    **dict.fromkeys(("sampler", "negative_prompt", "example_prompt", "vocabulary"), str),
}  # of generation_config.json; all else is a number
_LISTS = ("timesteps", "vocabulary")
BUNDLED_MODEL = Path(__file__).parents[1] / "tiny/model"  # its card is the README.md in it
_BUNDLED_NAME = "jaxwan-tiny"
CHANNEL_MASK = 4  # mask channels beside the image latents of a 36-channel model


@dataclass(frozen=True)
class Checkpoint:
    """What is in a Diffusers folder. `variant` is the published model it is, or is built like."""

    folder: Path
    transformer: TransformerConfig
    num_experts: int
    vae: VAEConfig
    text_encoder: TextEncoderConfig
    image_encoder: ImageEncoderConfig | None
    sampler: SamplerDefaults
    boundary_ratio: float | None
    variant: Variant
    defaults: Defaults
    hub_id: str | None = None  # where the weights are still to be fetched from

    @property
    def name(self) -> str:
        """What people call it, and files it made: the hub id, or the folder's own name."""
        return self.hub_id or (_BUNDLED_NAME if self.folder == BUNDLED_MODEL else self.folder.resolve().name)

    @cached_property
    def tokenizer(self) -> Tokenizer | None:
        """Its tokenizer, read once; None in a folder of configurations alone. Raises as `load_tokenizer` does."""
        folder = self.folder / "tokenizer"
        return load_tokenizer(folder) if (folder / "tokenizer.json").is_file() else None

    @property
    def image_input(self) -> ImageInput:
        """How the model takes an image."""
        return self.variant.image_input

    @property
    def geometry(self) -> Geometry:
        """Strides between pixels, latents and tokens."""
        vae = self.vae
        return Geometry(vae.scale_factor_temporal, vae.scale_factor_spatial, self.transformer.patch_size, vae.z_dim)

    @property
    def experts(self) -> tuple[str, ...]:
        """Folder names of the experts: high noise, then low noise."""
        return ("transformer", "transformer_2")[: self.num_experts]


def open_checkpoint(model: "str | Path | Checkpoint") -> Checkpoint:
    """The configurations of a folder or hub id (of which the JSON files alone are fetched); a Checkpoint is itself.

    Raises OSError where there is none, ValueError for what is not implemented.
    """
    if isinstance(model, Checkpoint):
        return model
    checkpoint = read_checkpoint(find_checkpoint(model, json_only=True))
    return checkpoint if _local(model).is_dir() else replace(checkpoint, hub_id=str(model))


def with_weights(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with its weights there too: those of a hub id are fetched now. Raises OSError."""
    return replace(checkpoint, folder=find_checkpoint(checkpoint.hub_id)) if checkpoint.hub_id else checkpoint


def find_checkpoint(model: str | Path, *, json_only: bool = False) -> Path:
    """The folder of a path or a hub id; a hub id is fetched (its JSON files alone when `json_only`).

    Raises ValueError for an empty text, FileNotFoundError when there is no such folder and the text is no hub id,
    OSError when the hub cannot be had.
    """
    if not isinstance(model, str | Path):
        raise ValueError(f"model={model!r:.40} is no folder or hub id")
    text, path = str(model), _local(model)
    if not text:
        raise ValueError("model is an empty text: give a folder or a hub id, owner/name")
    if path.is_dir():
        return path
    if path.is_file():
        raise NotADirectoryError(f"{text} is a file; a checkpoint is a folder in the Diffusers layout")
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", text):
        raise FileNotFoundError(f"there is no folder {text} (and a hub id has the form owner/name)")
    return _fetch(text, ["*.json"] if json_only else ["*.json", "*.safetensors", "*.model"])


def _local(model: str | Path) -> Path:
    path = Path(model)
    return path.expanduser() if path.parts[:1] == ("~",) else path


def _fetch(repo: str, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repo, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().split("\n")[0]
        raise OSError(f"{repo} is no local folder, and the hub did not give it: {reason}") from error


def read_checkpoint(folder: Path) -> Checkpoint:
    """Read and check every configuration of a Diffusers folder.

    Raises FileNotFoundError for a folder that is no such checkpoint, ConfigError for what is not implemented.
    """
    index = _read_json(folder, "model_index.json")
    if index.get("_class_name") not in _PIPELINES:
        raise ConfigError(f"{folder}: pipeline {index.get('_class_name')!r} is none of {', '.join(_PIPELINES)}")
    if not _present(index, "transformer"):
        raise ConfigError(f"{folder}/model_index.json names no transformer")
    for name, wanted in _CLASSES.items():
        given = index[name][-1] if isinstance(index.get(name), list) and index[name] else index.get(name)
        if given not in (None, wanted, f"{wanted}WithProjection"):
            raise ConfigError(f"{folder}/model_index.json: {name} is a {given}, only {wanted} is implemented")
    experts = 2 if _present(index, "transformer_2") else 1
    configs = [_transformer(folder, name) for name in ("transformer", "transformer_2")[:experts]]
    if configs[0] != configs[-1]:
        raise ConfigError(f"{folder}: the two experts differ in their config.json, which is not implemented")
    variant = recognise(configs[0], experts, bool(index.get("expand_timesteps", False)))
    scheduler = _read_json(folder, "scheduler/scheduler_config.json")
    checkpoint = Checkpoint(
        folder=folder,
        transformer=configs[0],
        num_experts=experts,
        vae=_component(folder, "vae", VAEConfig),
        text_encoder=_component(folder, "text_encoder", TextEncoderConfig),
        image_encoder=_image_encoder(folder, index, variant),
        sampler=read_scheduler(scheduler),
        boundary_ratio=_boundary_ratio(folder, index),
        variant=variant,
        defaults=_defaults(folder, variant, experts),
    )
    _check_channels(checkpoint)
    return checkpoint


def _present(index: dict[str, Any], name: str) -> bool:
    return index.get(name) not in (None, [None, None])


def _boundary_ratio(folder: Path, index: dict[str, Any]) -> float | None:
    value = index.get("boundary_ratio")
    if value is not None and (not isinstance(value, (int, float)) or not 0 <= value <= 1):
        raise ConfigError(f"{folder}/model_index.json: boundary_ratio={value!r} must be a number from 0 to 1")
    return None if value is None else float(value)


def _read_json(folder: Path, name: str) -> dict[str, Any]:
    path = folder / name
    if not path.is_file():
        raise FileNotFoundError(f"{folder} is no Diffusers checkpoint: it has no {name}{_other_layout(folder)}")
    return read_json(path)


def _other_layout(folder: Path) -> str:
    if (folder / "high_noise_model").is_dir() or any(folder.glob("*.pth")):
        return " (this is the original Wan layout, which is not read yet: take the -Diffusers folder)"
    if (folder / "_CHECKPOINT_METADATA").exists() or (folder / "_METADATA").exists():
        return " (this is an Orbax folder, which is not read yet)"
    return ""


def _component(folder: Path, name: str, cls: type) -> Any:
    try:
        return cls.from_json(_read_json(folder, f"{name}/config.json"))
    except ConfigError as error:
        raise ConfigError(f"{folder}/{name}/config.json: {error}") from error


def _transformer(folder: Path, name: str) -> TransformerConfig:
    cfg = _component(folder, name, TransformerConfig)
    return replace(cfg, out_channels=cfg.out_channels or cfg.in_channels)


def _image_encoder(folder: Path, index: dict[str, Any], variant: Variant) -> ImageEncoderConfig | None:
    if variant.image_input is not ImageInput.CHANNELS_AND_CLIP:
        return None
    if not _present(index, "image_encoder"):
        raise ConfigError(f"{folder}/model_index.json names no image_encoder, which {variant.name} needs")
    data = _read_json(folder, "image_encoder/config.json")
    try:
        return ImageEncoderConfig.from_json(data.get("vision_config", data))
    except (ConfigError, AttributeError) as error:
        raise ConfigError(f"{folder}/image_encoder/config.json: {error}") from error


def _defaults(folder: Path, variant: Variant, experts: int) -> Defaults:
    """The variant's row, with what the folder's generation_config.json (if any) says instead."""
    defaults = variant.defaults
    if experts == 1:
        defaults = replace(defaults, guidance_scale_2=None)
    if not (folder / "generation_config.json").is_file():
        return defaults
    given = _read_json(folder, "generation_config.json")
    known = {f.name for f in fields(Defaults)}
    unknown = [key for key in given if key not in known and not key.startswith("_")]
    if unknown:
        raise ConfigError(
            f"{folder}/generation_config.json: unknown {', '.join(unknown)}; known are {', '.join(sorted(known))}"
        )
    given = {key: value for key, value in given.items() if key in known and value is not None}
    for key, value in given.items():
        if key in _LISTS and not isinstance(value, list):
            raise ConfigError(f"{folder}/generation_config.json: {key}={value!r} must be a list")
        for one in value if key in _LISTS and isinstance(value, list) else [value]:
            check_kind(f"{folder}/generation_config.json: {key}", one, _KINDS.get(key, (int, float)))
    return replace(defaults, **{key: tuple(v) if isinstance(v, list) else v for key, v in given.items()})


def _check_channels(checkpoint: Checkpoint) -> None:
    """The parts must fit each other: latents into the DiT, text and image rows into its context."""
    cfg, z = checkpoint.transformer, checkpoint.vae.z_dim
    extra = checkpoint.image_input in (ImageInput.CHANNELS, ImageInput.CHANNELS_AND_CLIP)
    wanted = 2 * z + CHANNEL_MASK if extra else z
    problems = []
    if cfg.in_channels != wanted or cfg.out_channels != z:
        problems.append(f"transformer channels {cfg.in_channels} -> {cfg.out_channels}, expected {wanted} -> {z}")
    if cfg.text_dim != checkpoint.text_encoder.d_model:
        problems.append(f"text_dim={cfg.text_dim} for a text encoder of width {checkpoint.text_encoder.d_model}")
    encoder = checkpoint.image_encoder
    if encoder is not None and cfg.image_dim != encoder.hidden_size:
        problems.append(f"image_dim={cfg.image_dim} for an image encoder of width {encoder.hidden_size}")
    if encoder is not None and cfg.pos_embed_seq_len not in (None, 2 * encoder.num_rows):
        problems.append(f"pos_embed_seq_len={cfg.pos_embed_seq_len} for two images of {encoder.num_rows} rows")
    if problems:
        raise ConfigError(f"{checkpoint.folder}: the parts do not fit each other: {'; '.join(problems)}")
