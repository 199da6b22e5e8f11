"""What tensors are, by their names and shapes alone: which component in which layout, its configuration, its rules."""

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import NamedTuple

from jaxwan.config import (
    CHANNEL_MASK,
    ConfigError,
    ImageEncoderConfig,
    TextEncoderConfig,
    TransformerConfig,
    VAEConfig,
)
from jaxwan.convert import diffusers, orbax, original
from jaxwan.convert.rules import CheckpointError, Rule, Shape, with_unused

Shapes = Mapping[str, Shape]
Config = TransformerConfig | VAEConfig | TextEncoderConfig | ImageEncoderConfig

_HEAD = 128  # width of a head in every published DiT, which no tensor tells
_CLIP_HEAD = 80  # and in the image encoder


class Kind(NamedTuple):
    """A component, and whose names its tensors have: "original", "diffusers" (for encoders transformers' own), or
    "orbax" (those of parameters)."""

    component: str
    layout: str


# a name that only this kind has -> the kind; the first that is found counts
_SIGNS = {
    r"blocks\.0\.attn1\.q\.kernel": Kind("transformer", "orbax"),
    r"decoder\.conv_in\.kernel": Kind("vae", "orbax"),
    r"layers\.0\.gate\.kernel": Kind("text_encoder", "orbax"),
    r"class_embedding": Kind("image_encoder", "orbax"),
    r"head\.modulation": Kind("transformer", "original"),
    r"condition_embedder\..+": Kind("transformer", "diffusers"),
    r"decoder\.middle\.0\.residual\.0\.gamma": Kind("vae", "original"),
    r"decoder\.mid_block\..+": Kind("vae", "diffusers"),
    r"token_embedding\.weight": Kind("text_encoder", "original"),
    r"shared\.weight|encoder\.embed_tokens\.weight": Kind("text_encoder", "diffusers"),
    r"visual\.transformer\.0\..+": Kind("image_encoder", "original"),
    r"(vision_model\.)?embeddings\.class_embedding": Kind("image_encoder", "diffusers"),
}


def kind_of(names: Mapping[str, object]) -> Kind | None:
    """What tensors of these names are; None for what no Wan model has."""
    for sign, kind in _SIGNS.items():
        if any(re.fullmatch(sign, name) for name in names):
            return kind
    return None


def rules_of(
    component: str, config: Config | None, names: Mapping[str, object], *, what: str = "checkpoint"
) -> list[Rule]:
    """The rule table for a component's tensors of these names: the Diffusers layout's where they are in no other.

    Raises CheckpointError where they are those of another component.
    """
    kind = kind_of(names)
    if kind is not None and kind.component != component:
        raise CheckpointError(f"{what} holds a {kind.component} and not a {component}")
    return layout_rules(component, "diffusers" if kind is None else kind.layout, config, names)


def layout_rules(
    component: str, layout: str, config: Config | None, names: Mapping[str, object], *, whole: bool = False
) -> list[Rule]:
    """The rule table of a component in a layout; of Diffusers' spellings the one that these names have, or else the
    published one.

    whole: for what published files hold and no model reads too, as far as a converted file should have it.
    """
    if whole:
        if isinstance(config, ImageEncoderConfig):  # of which the last layer is never read
            config = replace(config, num_hidden_layers=config.num_hidden_layers + 1)
        return with_unused(layout_rules(component, layout, config, names))
    if layout == "orbax":
        layers = config.num_hidden_layers if isinstance(config, ImageEncoderConfig) else None
        return orbax.rules(component, layers)
    if layout == "original":
        if isinstance(config, VAEConfig):
            return original.vae_rules(config)
        if isinstance(config, ImageEncoderConfig):
            return original.image_encoder_rules(config.num_hidden_layers)
        return original.TEXT_ENCODER if component == "text_encoder" else original.TRANSFORMER
    if isinstance(config, ImageEncoderConfig):
        return diffusers.image_encoder_rules(names, config.num_hidden_layers)
    if component == "text_encoder":
        return diffusers.text_encoder_rules(names.keys())
    return diffusers.VAE if component == "vae" else diffusers.TRANSFORMER


# Configurations


def config_of(kind: Kind, shapes: Shapes, *, heads: int | None = None) -> Config:
    """The configuration of a component of published proportions, which its tensors' shapes tell; of the DiT's heads a
    configuration may say how many there are.

    What they do not tell is as in every published model: heads of 128 in the DiT and 80 in the image encoder, the
    levels of a VAE, and the statistics of its latents. Raises ConfigError where a tensor that tells it is not
    there, or has another number of axes.
    """
    make = {
        "transformer": partial(_transformer, heads=heads),
        "vae": _vae,
        "text_encoder": _text_encoder,
        "image_encoder": _image_encoder,
    }[kind.component]
    try:
        return make(shapes, kind.layout == "original")
    except ConfigError:
        raise
    except KeyError as error:
        raise ConfigError(f"its {kind.component} lacks {error}, which tells its size") from error
    except (IndexError, ValueError, ZeroDivisionError) as error:
        raise ConfigError(f"its {kind.component} has tensors of other shapes than Wan's") from error


def _layers(shapes: Shapes, template: str) -> int:
    """How many layers have a tensor: `template` with {} for their number."""
    pattern = re.compile(re.escape(template).replace(r"\{\}", r"\d+"))
    return sum(pattern.fullmatch(name) is not None for name in shapes)


def _transformer(shapes: Shapes, original: bool, heads: int | None) -> TransformerConfig:
    def names(theirs: str, diffusers: str) -> str:
        return theirs if original else diffusers

    embedder = "condition_embedder."
    dim, in_channels, *patch = shapes["patch_embedding.weight"]
    if dim % (heads or _HEAD):
        told = f"its {heads} heads" if heads else f"{_HEAD}, the width of Wan's heads"
        raise ConfigError(f"its width {dim} is no multiple of {told}")
    heads = heads or dim // _HEAD
    out_channels = shapes[names("head.head.weight", "proj_out.weight")][0] // math.prod(patch)
    with_image = 2 * out_channels + CHANNEL_MASK
    if in_channels not in (out_channels, with_image):
        raise ConfigError(
            f"its transformer takes {in_channels} channels and gives {out_channels}, as those with controls do "
            f"(Wan-Fun-Control), which are not implemented: Wan's take {out_channels} or {with_image}"
        )
    image = shapes.get(names("img_emb.proj.0.weight", f"{embedder}image_embedder.norm1.weight"))
    rows = shapes.get(names("img_emb.emb_pos", f"{embedder}image_embedder.pos_embed"))
    return TransformerConfig(
        patch_size=(patch[0], patch[1], patch[2]),
        num_attention_heads=heads,
        attention_head_dim=dim // heads,
        in_channels=in_channels,
        out_channels=out_channels,
        text_dim=shapes[names("text_embedding.0.weight", f"{embedder}text_embedder.linear_1.weight")][1],
        freq_dim=shapes[names("time_embedding.0.weight", f"{embedder}time_embedder.linear_1.weight")][1],
        ffn_dim=shapes[names("blocks.0.ffn.0.weight", "blocks.0.ffn.net.0.proj.weight")][0],
        num_layers=_layers(shapes, names("blocks.{}.modulation", "blocks.{}.scale_shift_table")),
        image_dim=None if image is None else image[0],
        added_kv_proj_dim=None if image is None else dim,
        pos_embed_seq_len=None if rows is None else rows[1],
    )


_LATENTS_MEAN_2_2 = (
    -0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557, -0.1382, 0.0542, 0.2813, 0.0891,
    0.1570, -0.0098, 0.0375, -0.1825, -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502,
    -0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230, -0.0313, -0.1649, 0.0117, 0.0723,
    -0.2839, -0.2083, -0.0520, 0.3748, 0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667,
)  # fmt: skip
_LATENTS_STD_2_2 = (
    0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013, 0.8158, 1.0344, 0.5894, 1.0901,
    0.6885, 0.6165, 0.8454, 0.4978, 0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659,
    0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093, 0.5709, 0.6065, 0.6415, 0.4944,
    0.5726, 1.2042, 0.5458, 1.6887, 0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744,
)  # fmt: skip
_STATISTICS = {48: {"latents_mean": _LATENTS_MEAN_2_2, "latents_std": _LATENTS_STD_2_2}, 16: {}}  # by z_dim


def _vae(shapes: Shapes, original: bool) -> VAEConfig:
    """Blocks before the first that resamples are the residual blocks of a level."""
    names = (
        ("encoder.conv1.weight", "decoder.head.2.weight", "conv2.weight", r"encoder\.downsamples\.0\.downsamples\..*")
        if original
        else (
            "encoder.conv_in.weight",
            "decoder.conv_out.weight",
            "post_quant_conv.weight",
            r".*_blocks\.0\.resnets\..*",
        )
    )
    base, in_channels = shapes[names[0]][:2]
    out, base_out = shapes[names[1]][:2]
    z_dim = shapes[names[2]][0]
    is_residual = any(name.startswith("encoder.") and re.fullmatch(names[3], name) for name in shapes)
    if z_dim not in _STATISTICS:
        raise ConfigError(f"its VAE has {z_dim} latent channels, and Wan's have 16 or 48")
    return VAEConfig(
        base_dim=base,
        decoder_base_dim=None if base_out == base else base_out,
        z_dim=z_dim,
        num_res_blocks=_residual_blocks(shapes, original, is_residual),
        is_residual=is_residual,
        in_channels=in_channels,
        out_channels=out,
        patch_size=2 if in_channels == 12 else None,
        scale_factor_spatial=16 if in_channels == 12 else 8,
        **_STATISTICS[z_dim],
    )


def _residual_blocks(shapes: Shapes, original: bool, is_residual: bool) -> int:
    if original:
        sign = r"encoder\.downsamples\.0\.downsamples\.(\d+)\.r" if is_residual else r"encoder\.downsamples\.(\d+)\.r"
        sign += r"esample\.1\.weight"
        return min(int(m[1]) for m in (re.fullmatch(sign, name) for name in shapes) if m)
    if is_residual:
        return _layers(shapes, "encoder.down_blocks.0.resnets.{}.conv1.weight")
    sign = r"encoder\.down_blocks\.(\d+)\.resample\.1\.weight"
    return min(int(m[1]) for m in (re.fullmatch(sign, name) for name in shapes) if m)


def _text_encoder(shapes: Shapes, original: bool) -> TextEncoderConfig:
    attention = "encoder.block.0.layer.0.SelfAttention"
    names = (
        ("token_embedding.weight", "blocks.0.attn.q.weight", "blocks.0.pos_embedding.embedding.weight",
         "blocks.0.ffn.gate.0.weight", "blocks.{}.attn.q.weight")
        if original
        else ("shared.weight" if "shared.weight" in shapes else "encoder.embed_tokens.weight", f"{attention}.q.weight",
              f"{attention}.relative_attention_bias.weight", "encoder.block.0.layer.1.DenseReluDense.wi_0.weight",
              "encoder.block.{}.layer.0.SelfAttention.q.weight")
    )  # fmt: skip
    (vocabulary, width), (buckets, heads) = shapes[names[0]], shapes[names[2]]
    return TextEncoderConfig(
        vocab_size=vocabulary, d_model=width, d_kv=shapes[names[1]][0] // heads, d_ff=shapes[names[3]][0],
        num_layers=_layers(shapes, names[4]), num_heads=heads, relative_attention_num_buckets=buckets,
    )  # fmt: skip


def _image_encoder(shapes: Shapes, original: bool) -> ImageEncoderConfig:
    start = "" if original or "embeddings.class_embedding" in shapes else "vision_model."
    names = (
        ("visual.patch_embedding.weight", "visual.pos_embedding", "visual.transformer.0.mlp.0.weight",
         "visual.transformer.{}.attn.proj.weight")
        if original
        else (f"{start}embeddings.patch_embedding.weight", f"{start}embeddings.position_embedding.weight",
              f"{start}encoder.layers.0.mlp.fc1.weight", f"{start}encoder.layers.{{}}.self_attn.out_proj.weight")
    )  # fmt: skip
    width, channels, patch = shapes[names[0]][:3]
    return ImageEncoderConfig(
        hidden_size=width, intermediate_size=shapes[names[2]][0], num_hidden_layers=_layers(shapes, names[3]),
        num_attention_heads=max(1, width // _CLIP_HEAD), image_size=patch * math.isqrt(shapes[names[1]][0] - 1),
        patch_size=patch, num_channels=channels,
    )  # fmt: skip
