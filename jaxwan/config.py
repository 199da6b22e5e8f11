"""Frozen configurations read from the `config.json` files of a Diffusers folder.

Missing keys take Diffusers' defaults (2.1 checkpoints lack several); a key that changes the result and is not
implemented here is refused by name when it is off its default.
"""

import json
from dataclasses import dataclass, field, fields
from enum import StrEnum
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, get_args, get_origin

_C = TypeVar("_C", bound="_FromJson")


class ConfigError(ValueError):
    """A configuration file asks for something that is not implemented, or is malformed."""


CHANNEL_MASK = 4  # mask channels beside the image latents of a 36-channel model
GIT_LFS_POINTER = b"version https://git-lfs"  # begins what git leaves in place of a large file that was not fetched


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises ConfigError for anything else in it."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        if path.read_bytes().startswith(GIT_LFS_POINTER):  # tokenizers are large enough to be kept so
            raise ConfigError(f"{path} is a git-lfs pointer and not the file: fetch it with `git lfs pull`") from error
        raise ConfigError(f"{path} is no JSON file ({error})") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path} holds a {type(data).__name__}, not an object")
    return data


class _FromJson:
    """Mixin: a frozen dataclass made from a parsed config.json."""

    _fixed: dict[str, Any] = {}  # keys with the only value that is implemented, beside null

    @classmethod
    def from_json(cls: type[_C], data: dict[str, Any]) -> _C:
        """Read the known keys of `data`, where null is false for a flag and the default for what has no null.

        Raises ConfigError for an unsupported value of a key in `_fixed`, for values of another kind, and for those
        that do not go together.
        """
        if data.get("quantization_config") is not None:
            raise ConfigError(
                f"the weights are quantised{_method(data)}, which is not read (yet): take them in bfloat16, float16 or "
                "float32"
            )
        for key, only in cls._fixed.items():
            if data.get(key) not in (None, only):
                raise ConfigError(f"{cls.__name__}: {key}={data[key]!r} is not implemented (only {only!r})")
        kinds = {f.name: f.type for f in fields(cls)}  # pyright: ignore[reportArgumentType]
        given = {k: False if v is None and kinds[k] is bool else _frozen(v) for k, v in data.items() if k in kinds}
        given = {k: v for k, v in given.items() if v is not None or _is_kind(None, kinds[k])}
        wrong = [f"{k}={v!r} is no {_name(kinds[k])}" for k, v in given.items() if not _is_kind(v, kinds[k])]
        made = None if wrong else cls(**given)
        wrong += [] if made is None else made.problems()
        if made is None or wrong:
            raise ConfigError(f"{cls.__name__}: {', '.join(wrong)}")
        return made

    def problems(self) -> list[str]:
        """What no model can be made of, in words."""
        counts = {f.name: getattr(self, f.name) for f in fields(self) if f.type is int}  # pyright: ignore
        return [f"{name}={value} must be 1 or more" for name, value in counts.items() if value < 1]


def _method(data: dict[str, Any]) -> str:
    """How the quantization_config of a config.json says that it is quantised."""
    config = data["quantization_config"]
    method = config.get("quant_method") if isinstance(config, dict) else None
    bits = next((f" to {n} bits" for n in (4, 8) if isinstance(config, dict) and config.get(f"load_in_{n}bit")), "")
    return f"{bits} by {method}" if method else bits


def _frozen(value: Any) -> Any:
    return tuple(_frozen(v) for v in value) if isinstance(value, list) else value


def _is_kind(value: Any, kind: Any) -> bool:
    """Whether a JSON value is of the annotated kind; a whole number is a float too, true and false are no numbers."""
    if isinstance(kind, UnionType):
        return any(_is_kind(value, k) for k in get_args(kind))
    if get_origin(kind) is tuple:
        kinds = get_args(kind)
        kinds = kinds[:1] * len(value) if kinds[-1] is ... and isinstance(value, tuple) else kinds
        return isinstance(value, tuple) and len(value) == len(kinds) and all(map(_is_kind, value, kinds))
    if isinstance(value, bool) or kind is bool:
        return isinstance(value, bool) and kind is bool
    return isinstance(value, (int, float) if kind is float else kind)


def _name(kind: Any) -> str:
    return getattr(kind, "__name__", str(kind)) if get_origin(kind) is None else str(kind)


@dataclass(frozen=True)
class TransformerConfig(_FromJson):
    """`WanTransformer3DModel`. Defaults are Diffusers'."""

    patch_size: tuple[int, int, int] = (1, 2, 2)
    num_attention_heads: int = 40
    attention_head_dim: int = 128
    in_channels: int = 16
    out_channels: int = 16
    text_dim: int = 4096
    freq_dim: int = 256
    ffn_dim: int = 13824
    num_layers: int = 40
    cross_attn_norm: bool = True
    eps: float = 1e-6
    image_dim: int | None = None
    added_kv_proj_dim: int | None = None
    rope_max_seq_len: int = 1024
    pos_embed_seq_len: int | None = None

    _fixed = {"qk_norm": "rms_norm_across_heads", "_class_name": "WanTransformer3DModel"}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "TransformerConfig":
        """As of all; null for out_channels is as many as in_channels."""
        if "out_channels" in data and data["out_channels"] is None:
            data = data | {"out_channels": data.get("in_channels")}
        return super().from_json(data)

    def problems(self) -> list[str]:
        """Widths that are halved."""
        widths = {name: getattr(self, name) for name in ("attention_head_dim", "freq_dim")}
        return [f"{name}={width} is odd" for name, width in widths.items() if width % 2] + super().problems()

    @property
    def dim(self) -> int:
        """Model width D."""
        return self.num_attention_heads * self.attention_head_dim


@dataclass(frozen=True)
class VAEConfig(_FromJson):
    """`AutoencoderKLWan`, of the 2.1 kind (`is_residual` false) or the 2.2 kind (true, with pixel patches)."""

    base_dim: int = 96
    decoder_base_dim: int | None = None
    z_dim: int = 16
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    attn_scales: tuple[float, ...] = ()
    temperal_downsample: tuple[bool, ...] = (False, True, True)  # spelt so in the published files
    latents_mean: tuple[float, ...] = (
        -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
        0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
    )  # fmt: skip
    latents_std: tuple[float, ...] = (
        2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
        3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
    )  # fmt: skip
    is_residual: bool = False
    in_channels: int = 3
    out_channels: int = 3
    patch_size: int | None = None
    scale_factor_temporal: int = 4
    scale_factor_spatial: int = 8

    _fixed = {"_class_name": "AutoencoderKLWan", "attn_scales": []}


@dataclass(frozen=True)
class TextEncoderConfig(_FromJson):
    """`UMT5EncoderModel`. Defaults are umt5-xxl's."""

    vocab_size: int = 256384
    d_model: int = 4096
    d_kv: int = 64
    d_ff: int = 10240
    num_layers: int = 24
    num_heads: int = 64
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6

    _fixed = {"feed_forward_proj": "gated-gelu", "model_type": "umt5"}


@dataclass(frozen=True)
class ImageEncoderConfig(_FromJson):
    """`CLIPVisionModel` of the Wan2.1 image-to-video checkpoints. Defaults are ViT-H/14's."""

    hidden_size: int = 1280
    intermediate_size: int = 5120
    num_hidden_layers: int = 32
    num_attention_heads: int = 16
    image_size: int = 224
    patch_size: int = 14
    num_channels: int = 3
    layer_norm_eps: float = 1e-5
    hidden_act: str = "gelu"

    def problems(self) -> list[str]:
        """Widths that do not divide."""
        width, heads = self.hidden_size, self.num_attention_heads
        told = f"hidden_size={width} does not divide among num_attention_heads={heads}"
        return super().problems() or [told] * (width % heads > 0)

    @property
    def num_rows(self) -> int:
        """Rows of an image: the class token's and one a patch."""
        return (self.image_size // self.patch_size) ** 2 + 1


# Variants: what the configurations alone say about a checkpoint


class ImageInput(StrEnum):
    """How a model takes an image, if it does."""

    NONE = "none"  # text only
    CHANNELS = "channels"  # mask and image latents as extra input channels (Wan2.2-I2V-A14B)
    CHANNELS_AND_CLIP = "channels and CLIP"  # and CLIP rows in cross-attention (Wan2.1 image to video)
    FIRST_FRAME = "first frame"  # clean first latent frame at timestep 0 (Wan2.2-TI2V-5B); optional


@dataclass(frozen=True)
class Defaults:
    """What a call uses where it is silent: the model cards' settings."""

    height: int
    width: int
    num_frames: int
    fps: int | float
    num_inference_steps: int
    guidance_scale: int | float
    guidance_scale_2: int | float | None = None  # low-noise expert
    sampler: str | None = None  # None: the scheduler_config.json's
    sigma_schedule: str | None = None  # None: the sampler's own
    flow_shift: int | float | None = None
    negative_prompt: str = ""
    strength: int | float = 0.8  # of video to video
    boundary_ratio: int | float | None = None  # None: the model_index.json's
    timesteps: tuple[int | float, ...] | None = None  # of samplers "renoise" and "euler"
    example_prompt: str | None = None  # what the model surely understands
    vocabulary: tuple[str, ...] | None = field(default=None, repr=False)  # all words of a model that knows few


@dataclass(frozen=True)
class Variant:
    """One published model. Recognised by structure (experts, image input, last image), then by width."""

    name: str
    experts: int
    image_input: ImageInput
    last_image: bool  # whether a last frame may be given
    dim: int
    defaults: Defaults


VARIANTS = (
    Variant("Wan2.2-T2V-A14B", 2, ImageInput.NONE, False, 5120, Defaults(720, 1280, 81, 16, 40, 4.0, 3.0)),
    Variant("Wan2.2-I2V-A14B", 2, ImageInput.CHANNELS, True, 5120, Defaults(720, 1280, 81, 16, 40, 3.5, 3.5)),
    Variant("Wan2.2-TI2V-5B", 1, ImageInput.FIRST_FRAME, False, 3072, Defaults(704, 1280, 121, 24, 50, 5.0)),
    Variant("Wan2.1-T2V-1.3B", 1, ImageInput.NONE, False, 1536, Defaults(480, 832, 81, 16, 50, 5.0)),
    Variant("Wan2.1-T2V-14B", 1, ImageInput.NONE, False, 5120, Defaults(720, 1280, 81, 16, 50, 5.0)),
    Variant("Wan2.1-I2V-14B", 1, ImageInput.CHANNELS_AND_CLIP, False, 5120, Defaults(480, 832, 81, 16, 50, 5.0)),
    Variant("Wan2.1-FLF2V-14B", 1, ImageInput.CHANNELS_AND_CLIP, True, 5120, Defaults(720, 1280, 81, 16, 50, 5.5)),
)  # fmt: skip


def recognise(transformer: TransformerConfig, experts: int, expand_timesteps: bool) -> Variant:
    """The table's row for these configurations; an unknown width takes the row of the same structure, nearest in width.

    Raises ConfigError when no published model has the structure.
    """
    if expand_timesteps:
        image_input = ImageInput.FIRST_FRAME
    elif transformer.image_dim is not None:
        image_input = ImageInput.CHANNELS_AND_CLIP
    else:
        image_input = ImageInput.NONE if transformer.in_channels == transformer.out_channels else ImageInput.CHANNELS
    last_image = image_input is ImageInput.CHANNELS or transformer.pos_embed_seq_len is not None
    structure = (image_input, last_image)
    rows = [v for v in VARIANTS if (v.image_input, v.last_image) == structure]
    rows = [v for v in rows if v.experts == experts] or rows
    if not rows:
        raise ConfigError(
            f"no Wan model takes its image as {image_input} with pos_embed_seq_len={transformer.pos_embed_seq_len}"
        )
    return min(rows, key=lambda v: abs(v.dim - transformer.dim))
