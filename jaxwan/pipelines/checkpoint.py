"""A checkpoint folder as its configuration files describe it: no tensor is read here."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from jaxwan.config import (
    CHANNEL_MASK,
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
from jaxwan.convert.files import TensorFiles, is_weights, list_files
from jaxwan.convert.lora import Lora, with_loras
from jaxwan.convert.orbax import FOLDER as ORBAX
from jaxwan.convert.orbax import Part, is_orbax
from jaxwan.convert.rules import some
from jaxwan.geometry import Geometry
from jaxwan.pipelines.arguments import check_kind, local_path
from jaxwan.pipelines.comfyui import find_parts
from jaxwan.pipelines.components import (
    EXPERTS,
    check_components,
    check_original,
    configs_of,
    fetched,
    files_at,
    is_causal,
    noise_of,
    original_components,
    original_files,
)
from jaxwan.pipelines.hub import NotInRepository, fetch_file, fetch_files, fetch_weights, list_paths
from jaxwan.pipelines.loras import check_loras
from jaxwan.pipelines.prompt import Tokenizer, load_sentencepiece, load_tokenizer
from jaxwan.schedulers.config import SamplerDefaults, read_scheduler

_PIPELINES = ("WanPipeline", "WanImageToVideoPipeline", "WanVideoToVideoPipeline")
_CLASSES = {
    "transformer": "WanTransformer3DModel",
    "transformer_2": "WanTransformer3DModel",
    "vae": "AutoencoderKLWan",
    "text_encoder": "UMT5EncoderModel",
    "image_encoder": "CLIPVisionModel",
}
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
_KINDS = {
    **dict.fromkeys(("height", "width", "num_frames", "num_inference_steps"), int),
    **dict.fromkeys(("sampler", "sigma_schedule", "negative_prompt", "example_prompt", "vocabulary"), str),
}  # of generation_config.json; all else is a number
_LISTS = ("timesteps", "vocabulary")
BUNDLED_MODEL = Path(__file__).parents[1] / "tiny/model"  # its card is the README.md in it
_BUNDLED_NAME = "jaxwan-tiny"


@dataclass(frozen=True)
class Checkpoint:
    """What is in a Diffusers folder, or in parts that were named one by one.

    `variant` is the published model it is, or is built like. `parts`: where those components lie that are not in the
    folder, which in a checkpoint of such parts alone is the transformer's own file, or their folder.
    `loras`: added to the DiTs' tensors while they are read.
    """

    folder: Path
    transformer: TransformerConfig
    experts: tuple[str, ...]  # their folders: high noise, then low noise, or one of them alone
    vae: VAEConfig
    text_encoder: TextEncoderConfig | None  # None where texts can come as embeddings alone
    image_encoder: ImageEncoderConfig | None
    sampler: SamplerDefaults
    boundary_ratio: float | None
    variant: Variant
    defaults: Defaults
    hub_id: str | None = None  # where the weights are still to be fetched from
    weights_variant: str | None = None  # in the names of weights files: "fp16"
    parts: tuple[tuple[str, Path], ...] = ()
    loras: tuple[Lora, ...] = ()  # each with the expert it is for; None: all

    @property
    def name(self) -> str:
        """What people call it, and files it made: the hub id, or the folder's own name."""
        return self.hub_id or (_BUNDLED_NAME if self.folder == BUNDLED_MODEL else self.folder.resolve().name)

    @cached_property
    def tokenizer(self) -> Tokenizer | None:
        """Its tokenizer, read once: a tokenizer.json, else what the text encoder's file brings; None in a folder of
        configurations alone. Raises as `load_tokenizer` and `load_sentencepiece` do."""
        folder, encoder = self.place("tokenizer"), self.place("text_encoder")
        if (folder / "tokenizer.json").is_file():
            return load_tokenizer(folder)
        if self.text_encoder is not None and encoder.is_file() and (files := files_at(encoder)).has_tokenizer:
            return load_sentencepiece(files.read_tokenizer(), self.text_encoder.vocab_size, str(encoder))
        return None

    @cached_property
    def causal(self) -> bool:
        """Whether a DiT was trained to see no later frames, as far as names tell; it sees all here."""
        return any(is_causal(path) for path in (Path(self.name), *map(self.place, self.experts)))

    def place(self, component: str) -> Path:
        """The file or folder that a component is read from."""
        return dict(self.parts).get(component, self.folder / component)

    @property
    def is_orbax(self) -> bool:
        """Whether the folder's weights are in Orbax's layout."""
        return is_orbax(self.folder)

    def files(self, component: str) -> TensorFiles:
        """The tensors of a component, with its LoRAs. Raises OSError where there are none."""
        if self.is_orbax and component not in dict(self.parts):
            expert = component in self.experts
            part = Part("transformer", self.experts.index(component)) if expert else Part(component)
            files = TensorFiles((self.folder / ORBAX,), part)
        else:
            files = files_at(self.place(component), self.weights_variant)
        noise = EXPERTS.get(component)
        own = [lora for lora in self.loras if noise is not None and lora.expert in (None, noise)]
        if self.variant.experts > 1:  # of a file for both, the LoRA of this one
            own = [replace(lora, expert=noise) for lora in own]
        return with_loras(files, own)

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
    def num_experts(self) -> int:
        """How many DiTs are loaded."""
        return len(self.experts)

    @property
    def components(self) -> tuple[str, ...]:
        """The folders whose weights are read."""
        encoders = {"text_encoder": self.text_encoder, "image_encoder": self.image_encoder}
        return ("vae", *(name for name, config in encoders.items() if config is not None), *self.experts)


def open_checkpoint(
    model: "str | Path | Checkpoint | None", variant: str | None = None, components: Mapping[str, Any] | None = None,
    loras: Sequence[Lora | str | Path] = (),
) -> Checkpoint:  # fmt: skip
    """The configurations of a folder or hub id (of which no weights are fetched); a Checkpoint is itself.

    variant: of the weights files, as Diffusers names them: "fp16" reads diffusion_pytorch_model.fp16.safetensors, and
    plain files in components that have none of it. components: files in any layout (docs/checkpoints.md) to read parts
    from, by name ("transformer", "transformer_2", "vae", "text_encoder", "image_encoder"; "tokenizer": a folder),
    instead of the model's own, whose configurations they must fit; with model None they are all that there is, and
    their configurations follow from their tensors. A folder may also be one of the original repositories, or hold
    ComfyUI's files; a file is a DiT's, beside which the other parts lie. Of an original repository on the hub the
    weights are fetched at once, since they tell its configurations. loras: files that are added to the DiTs,
    `Lora(path, strength, expert)`, beside those that a Checkpoint has; what they hold is proved to fit from their
    headers.
    Raises OSError where there is no checkpoint, ValueError for what is not implemented or does not fit.
    """
    checkpoint = _open(model, variant, components)
    if not loras:
        return checkpoint
    if isinstance(loras, list | tuple):
        loras = [*checkpoint.loras, *loras]
    pair = checkpoint.variant.experts == 2
    checked = check_loras(loras, checkpoint.transformer, checkpoint.experts, pair=pair, name=checkpoint.name)
    return replace(checkpoint, loras=checked)


def _open(
    model: "str | Path | Checkpoint | None", variant: str | None, components: Mapping[str, Any] | None
) -> Checkpoint:
    if not (variant is None or (isinstance(variant, str) and re.fullmatch(r"[\w-]+", variant))):
        raise ValueError(f"variant={variant!r:.40} is no variant's name, such as 'fp16'")
    paths = check_components(components)
    if model is None and paths:
        return replace(_assemble(paths), weights_variant=variant)
    if isinstance(model, Checkpoint):
        return _with_parts(model if variant is None else replace(model, weights_variant=variant), paths)
    folder = find_checkpoint(model)
    hub_id = None if folder.is_file() or _local(model).exists() else str(model)
    if not (folder / "model_index.json").is_file():
        if own := original_components(folder):
            return replace(_assemble(own | paths, folder), weights_variant=variant, hub_id=hub_id)
        if folder.is_file() or not (folder.parent / "model_index.json").is_file():
            if found := find_parts(folder, paths):
                whole = _assemble(found, None if folder.is_file() else folder, whole=True)
                return replace(whole, weights_variant=variant)
    return _with_parts(replace(read_checkpoint(folder), weights_variant=variant, hub_id=hub_id), paths)


def _with_parts(checkpoint: Checkpoint, paths: Mapping[str, Path]) -> Checkpoint:
    """A checkpoint of which these parts are read from other files."""
    unknown = [name for name in paths if name not in (*checkpoint.components, "tokenizer")]
    if unknown:
        has = ", ".join((*checkpoint.components, "tokenizer"))
        raise ValueError(f"components: {checkpoint.name} has no {', '.join(unknown)}; its parts are {has}")
    return replace(checkpoint, parts=tuple((dict(checkpoint.parts) | dict(paths)).items()))


_BOUNDARIES = {"Wan2.2-T2V-A14B": 0.875, "Wan2.2-I2V-A14B": 0.9}  # which no file of weights holds


def _assemble(paths: Mapping[str, Path], folder: Path | None = None, *, whole: bool = False) -> Checkpoint:
    """The checkpoint that parts make, of a folder or named one by one; of what no tensor tells it is as published.
    whole: whether a text encoder is one of them. Raises ValueError for parts that lack others, or are not
    implemented."""
    if not paths.keys() & EXPERTS.keys():
        raise ValueError(f"components lack a transformer: {_add(['transformer'])}")
    configs: dict[str, Any] = configs_of(paths)
    experts = tuple(name for name in EXPERTS if name in paths)
    transformer, vae, text_encoder = configs[experts[0]], configs.get("vae"), configs.get("text_encoder")
    variant = recognise(transformer, len(experts), expand_timesteps=transformer.in_channels == 48)
    alone = len(experts) == 1 and (variant.experts == 2 or noise_of(paths[experts[0]]) is not None)
    tokenizer = text_encoder is not None and "tokenizer" not in paths
    needed = {
        "transformer": alone,
        "transformer_2": alone,
        "vae": True,
        "text_encoder": whole,
        "image_encoder": variant.image_input is ImageInput.CHANNELS_AND_CLIP,
        "tokenizer": tokenizer and not files_at(paths["text_encoder"]).has_tokenizer,
    }
    if lacking := [name for name, is_needed in needed.items() if is_needed and name not in paths]:
        raise ValueError(f"components lack a {', a '.join(lacking)}, which {variant.name} needs: {_add(lacking)}")
    if len(experts) > variant.experts:
        raise ValueError(f"components: {variant.name}, which {paths['transformer']} is, has no transformer_2")
    shift = 5.0 if variant.image_input is ImageInput.FIRST_FRAME else 3.0
    checkpoint = Checkpoint(
        folder=folder or paths[experts[0]],
        transformer=transformer,
        experts=experts,
        vae=vae,
        text_encoder=text_encoder,
        image_encoder=configs.get("image_encoder"),
        sampler=SamplerDefaults("unipc", 2, shift),
        boundary_ratio=_BOUNDARIES.get(variant.name),
        variant=variant,
        defaults=variant.defaults,
        parts=tuple(paths.items()),
    )
    _check_channels(checkpoint)
    return checkpoint


def _add(names: Sequence[str]) -> str:
    kinds = {name: "FOLDER" if name == "tokenizer" else "FILE" for name in names}
    flags = " ".join(f"--component {name}={kind}" for name, kind in kinds.items())
    of_folder = " (with a tokenizer.json)" if "tokenizer" in kinds else ""
    return f"add {flags}{of_folder} (components={{{', '.join(f'{name!r}: …' for name in names)}}} in Python)"


def ensure_weights(checkpoint: Checkpoint) -> None:
    """Fetch the weights of a hub id, into the same folder. Raises OSError."""
    if checkpoint.hub_id is None:
        return
    others = ["image_processor/preprocessor_config.json"] * (checkpoint.image_encoder is not None)
    own = [name for name in checkpoint.components if name not in dict(checkpoint.parts)]
    if not own:
        return
    fetch_weights(checkpoint.hub_id, checkpoint.folder, own, checkpoint.weights_variant, others)


def find_checkpoint(model: str | Path | None) -> Path:
    """The folder (or file) of a path or a hub id, whose configurations are fetched.

    Raises ValueError for an empty text, FileNotFoundError when there is no such folder and the text is no hub id,
    OSError when the hub cannot be had.
    """
    if not isinstance(model, str | Path):
        raise ValueError(f"model={model!r:.40} is no folder or hub id")
    if model == "":
        raise ValueError("model is an empty text: give a folder or a hub id, owner/name")
    text, path = str(model), _local(model)
    path = fetched(text, path)
    if path.is_dir() or path.is_file():
        return path
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", text):
        raise FileNotFoundError(f"there is no folder {text} (and a hub id has the form owner/name)")
    return _fetch_configs(text)


def _local(model: str | Path) -> Path:
    return local_path(model, "model", "give a folder or a hub id, owner/name")


def _fetch_configs(repo: str) -> Path:
    try:
        index = fetch_file(repo, "model_index.json")
    except NotInRepository as error:
        return _fetch_original(repo, error)
    parts = [name for name in _CLASSES if _present(read_json(index), name)]
    names = ["scheduler/scheduler_config.json", *(f"{name}/config.json" for name in parts)]
    names += [f"tokenizer/{name}" for name in _TOKENIZER] * ("text_encoder" in parts)  # tells what of a prompt is cut
    fetch_files(repo, index.parent, names, optional=["generation_config.json"])  # which Diffusers does not know
    return index.parent


def _fetch_original(repo: str, error: NotInRepository) -> Path:
    """The folder of an original repository. Raises `error`, with what there is instead, for any other."""
    listed = list_paths(repo)
    names = original_files(listed)
    if not names:
        single = [name for name in listed if is_weights(name)]
        parts = f": {some(single, 3)} are parts, to be named as --component NAME={repo}:PATH" if single else ""
        raise OSError(f"{error}, and is no original repository of Wan's{parts}") from error
    configs = [name for name in listed if re.fullmatch(r"(high_noise_model/)?config\.json", name)]
    for name in configs:
        check_original(repo, read_json(fetch_file(repo, name)))
    folder = fetch_file(repo, next(name for name in names if "/" not in name)).parent
    fetch_files(repo, folder, names)
    return folder


def read_checkpoint(folder: Path) -> Checkpoint:
    """Read and check every configuration of a Diffusers folder.

    Raises FileNotFoundError for a folder that is no such checkpoint, ConfigError for what is not implemented.
    """
    index = _read_json(folder, "model_index.json")
    if index.get("_class_name") not in _PIPELINES:
        raise ConfigError(f"{folder}: pipeline {index.get('_class_name')!r} is none of {', '.join(_PIPELINES)}")
    for name, wanted in _CLASSES.items():
        given = index[name][-1] if isinstance(index.get(name), list) and index[name] else index.get(name)
        if given not in (None, wanted, f"{wanted}WithProjection"):
            raise ConfigError(f"{folder}/model_index.json: {name} is a {given}, only {wanted} is implemented")
    boundary, experts = _boundary_ratio(folder, index), _experts(folder, index)
    transformer = _transformer(folder, experts)
    published = 2 if boundary is not None else len(experts)  # one alone of two has a boundary still
    variant = recognise(transformer, published, bool(index.get("expand_timesteps", False)))
    scheduler = _read_json(folder, "scheduler/scheduler_config.json")
    encodes_text = _present(index, "text_encoder") and _present(index, "tokenizer")
    checkpoint = Checkpoint(
        folder=folder,
        transformer=transformer,
        experts=experts,
        vae=_component(folder, "vae", VAEConfig),
        text_encoder=_component(folder, "text_encoder", TextEncoderConfig) if encodes_text else None,
        image_encoder=_image_encoder(folder, index, variant),
        sampler=read_scheduler(scheduler),
        boundary_ratio=boundary,
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


def _experts(folder: Path, index: dict[str, Any]) -> tuple[str, ...]:
    """The experts that the folder has: both, or the one that takes all steps."""
    names = ("transformer", "transformer_2")
    found, boundary = tuple(name for name in names if _present(index, name)), _boundary_ratio(folder, index)
    if not found:
        raise ConfigError(f"{folder}/model_index.json names no transformer")
    for expert, other, alone in ((*names, (0.0, None)), (*names[::-1], (1.0,))):  # boundaries that leave one all steps
        if found == (expert,) and boundary not in alone:
            raise ConfigError(
                f"{folder}/model_index.json names no {other}, which takes steps where boundary_ratio={boundary}: "
                f"{alone[0]} leaves them all to {expert}"
            )
    return found


def _read_json(folder: Path, name: str) -> dict[str, Any]:
    path = folder / name
    if not path.is_file():
        raise FileNotFoundError(f"{folder} is no Diffusers checkpoint: it has no {name}{_other_layout(folder)}")
    return read_json(path)


def _other_layout(folder: Path) -> str:
    if (folder / "_CHECKPOINT_METADATA").exists() or (folder / "_METADATA").exists():
        whole = is_orbax(folder.parent) and folder.name == ORBAX
        return f" (this is a part of one: give {folder.parent})" if whole else " (this is a folder of Orbax's alone)"
    if (folder.parent / "model_index.json").is_file():
        return f" (this is a part of one: give {folder.parent})"
    single = next(filter(is_weights, list_files(folder)), None)
    return f" ({single} and what lies beside it hold no DiT: name files as --component NAME=FILE)" if single else ""


def _component(folder: Path, name: str, cls: type) -> Any:
    data = _read_json(folder, f"{name}/config.json")
    try:
        return cls.from_json(data)
    except ConfigError as error:
        raise ConfigError(f"{folder}/{name}/config.json: {error}") from error


def _transformer(folder: Path, experts: Sequence[str]) -> TransformerConfig:
    """The configuration that all experts have."""
    configs = [_component(folder, name, TransformerConfig) for name in experts]
    first, last = asdict(configs[0]), asdict(configs[-1])
    differing = [f"{key} ({value} and {last[key]})" for key, value in first.items() if value != last[key]]
    if differing:
        raise ConfigError(f"{folder}: the two experts differ in {', '.join(differing)}, which is not implemented")
    return configs[0]


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


def of_experts(defaults: Defaults, experts: Sequence[str]) -> Defaults:
    """Defaults of two experts as those of the ones that are there: one alone has its own guidance."""
    if len(experts) == 2:
        return defaults
    low = defaults.guidance_scale_2 if experts[0] == "transformer_2" else None
    return replace(defaults, guidance_scale=low or defaults.guidance_scale, guidance_scale_2=None)


def _defaults(folder: Path, variant: Variant, experts: Sequence[str]) -> Defaults:
    """The variant's row, with what the folder's generation_config.json (if any) says instead."""
    defaults = of_experts(variant.defaults, experts)
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
    text = checkpoint.text_encoder
    if text is not None and cfg.text_dim != text.d_model:
        problems.append(f"text_dim={cfg.text_dim} for a text encoder of width {text.d_model}")
    encoder = checkpoint.image_encoder
    if encoder is not None and cfg.image_dim != encoder.hidden_size:
        problems.append(f"image_dim={cfg.image_dim} for an image encoder of width {encoder.hidden_size}")
    if encoder is not None and cfg.pos_embed_seq_len not in (None, 2 * encoder.num_rows):
        problems.append(f"pos_embed_seq_len={cfg.pos_embed_seq_len} for two images of {encoder.num_rows} rows")
    if problems:
        raise ConfigError(f"{checkpoint.folder}: the parts do not fit each other: {'; '.join(problems)}")
