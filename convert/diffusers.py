"""Rule tables of the Diffusers layout, one per component. Sources: the published files' key sets."""

from collections.abc import Collection, Iterable
from dataclasses import replace

from jaxwan.convert.rules import CONV2D, CONV3D, LINEAR, Rule

TRANSFORMER: list[Rule] = [
    Rule("patch_embedding.weight", "patch_embedding.kernel", CONV3D),
    Rule("patch_embedding.bias", "patch_embedding.bias"),
    Rule("condition_embedder.time_embedder.{path}.weight", "time_embedder.{path}.kernel", LINEAR),
    Rule("condition_embedder.time_embedder.{path}.bias", "time_embedder.{path}.bias"),
    Rule("condition_embedder.time_proj.weight", "time_proj.kernel", LINEAR),
    Rule("condition_embedder.time_proj.bias", "time_proj.bias"),
    Rule("condition_embedder.text_embedder.{path}.weight", "text_embedder.{path}.kernel", LINEAR),
    Rule("condition_embedder.text_embedder.{path}.bias", "text_embedder.{path}.bias"),
    Rule("condition_embedder.image_embedder.norm1.weight", "image_embedder.norm1.scale"),
    Rule("condition_embedder.image_embedder.norm1.bias", "image_embedder.norm1.bias"),
    Rule("condition_embedder.image_embedder.ff.net.0.proj.weight", "image_embedder.ff.up.kernel", LINEAR),
    Rule("condition_embedder.image_embedder.ff.net.0.proj.bias", "image_embedder.ff.up.bias"),
    Rule("condition_embedder.image_embedder.ff.net.2.weight", "image_embedder.ff.down.kernel", LINEAR),
    Rule("condition_embedder.image_embedder.ff.net.2.bias", "image_embedder.ff.down.bias"),
    Rule("condition_embedder.image_embedder.norm2.weight", "image_embedder.norm2.scale"),
    Rule("condition_embedder.image_embedder.norm2.bias", "image_embedder.norm2.bias"),
    Rule("condition_embedder.image_embedder.pos_embed", "image_embedder.pos_embed"),
    *[
        rule
        for attn in ("attn1", "attn2")
        for name in ("q", "k", "v")
        for rule in (
            Rule(f"blocks.{{layer}}.{attn}.to_{name}.weight", f"blocks.{attn}.{name}.kernel", LINEAR),
            Rule(f"blocks.{{layer}}.{attn}.to_{name}.bias", f"blocks.{attn}.{name}.bias"),
        )
    ],
    *[
        rule
        for attn in ("attn1", "attn2")
        for rule in (
            Rule(f"blocks.{{layer}}.{attn}.to_out.0.weight", f"blocks.{attn}.out.kernel", LINEAR),
            Rule(f"blocks.{{layer}}.{attn}.to_out.0.bias", f"blocks.{attn}.out.bias"),
            Rule(f"blocks.{{layer}}.{attn}.norm_q.weight", f"blocks.{attn}.norm_q.scale"),
            Rule(f"blocks.{{layer}}.{attn}.norm_k.weight", f"blocks.{attn}.norm_k.scale"),
        )
    ],
    Rule("blocks.{layer}.attn2.add_k_proj.weight", "blocks.attn2.image_k.kernel", LINEAR),
    Rule("blocks.{layer}.attn2.add_k_proj.bias", "blocks.attn2.image_k.bias"),
    Rule("blocks.{layer}.attn2.add_v_proj.weight", "blocks.attn2.image_v.kernel", LINEAR),
    Rule("blocks.{layer}.attn2.add_v_proj.bias", "blocks.attn2.image_v.bias"),
    Rule("blocks.{layer}.attn2.norm_added_k.weight", "blocks.attn2.norm_image_k.scale"),
    Rule("blocks.{layer}.attn2.norm_added_q.weight", None),  # in the published 2.1 I2V files, read by no model
    Rule("blocks.{layer}.norm2.weight", "blocks.norm2.scale"),
    Rule("blocks.{layer}.norm2.bias", "blocks.norm2.bias"),
    Rule("blocks.{layer}.ffn.net.0.proj.weight", "blocks.ffn.up.kernel", LINEAR),
    Rule("blocks.{layer}.ffn.net.0.proj.bias", "blocks.ffn.up.bias"),
    Rule("blocks.{layer}.ffn.net.2.weight", "blocks.ffn.down.kernel", LINEAR),
    Rule("blocks.{layer}.ffn.net.2.bias", "blocks.ffn.down.bias"),
    Rule("blocks.{layer}.scale_shift_table", "blocks.scale_shift_table"),
    Rule("scale_shift_table", "scale_shift_table"),
    Rule("proj_out.weight", "proj_out.kernel", LINEAR),
    Rule("proj_out.bias", "proj_out.bias"),
]

VAE: list[Rule] = [
    *[
        rule
        for name, transform in (
            *((f"{{path}}.{conv}", CONV3D) for conv in ("conv_in", "conv_out", "conv1", "conv2", "conv_shortcut")),
            ("{path}.time_conv", CONV3D),
            ("quant_conv", CONV3D),
            ("post_quant_conv", CONV3D),
            ("{path}.to_qkv", CONV2D),
            ("{path}.proj", CONV2D),
        )
        for rule in (Rule(f"{name}.weight", f"{name}.kernel", transform), Rule(f"{name}.bias", f"{name}.bias"))
    ],
    Rule("{path}.resample.1.weight", "{path}.resample.kernel", CONV2D),  # 0 is the padding or the enlargement
    Rule("{path}.resample.1.bias", "{path}.resample.bias"),
    Rule("{path}.gamma", "{path}.gamma"),
]

_TIED = "encoder.embed_tokens.weight"

TEXT_ENCODER: list[Rule] = [
    Rule("shared.weight", "embedding"),
    Rule(_TIED, None),  # a second copy of shared.weight that some files hold
    *[
        Rule(f"encoder.block.{{layer}}.layer.0.SelfAttention.{name}.weight", f"layers.{name}.kernel", LINEAR)
        for name in ("q", "k", "v", "o")
    ],
    Rule("encoder.block.{layer}.layer.0.SelfAttention.relative_attention_bias.weight", "layers.position_bias"),
    Rule("encoder.block.{layer}.layer.0.layer_norm.weight", "layers.attention_norm.scale"),
    Rule("encoder.block.{layer}.layer.1.DenseReluDense.wi_0.weight", "layers.gate.kernel", LINEAR),
    Rule("encoder.block.{layer}.layer.1.DenseReluDense.wi_1.weight", "layers.up.kernel", LINEAR),
    Rule("encoder.block.{layer}.layer.1.DenseReluDense.wo.weight", "layers.down.kernel", LINEAR),
    Rule("encoder.block.{layer}.layer.1.layer_norm.weight", "layers.mlp_norm.scale"),
    Rule("encoder.final_layer_norm.weight", "norm.scale"),
]

CLIP_PREFIX = "vision_model."

IMAGE_ENCODER: list[Rule] = [
    Rule(CLIP_PREFIX + "embeddings.class_embedding", "class_embedding"),
    Rule(CLIP_PREFIX + "embeddings.patch_embedding.weight", "patch_embedding", CONV2D),
    Rule(CLIP_PREFIX + "embeddings.position_embedding.weight", "position_embedding"),
    Rule(CLIP_PREFIX + "pre_layrnorm.weight", "pre_norm.scale"),  # spelt so in the published files
    Rule(CLIP_PREFIX + "pre_layrnorm.bias", "pre_norm.bias"),
    *[
        rule
        for source, target in (
            ("self_attn.q_proj", "q"),
            ("self_attn.k_proj", "k"),
            ("self_attn.v_proj", "v"),
            ("self_attn.out_proj", "o"),
            ("mlp.fc1", "up"),
            ("mlp.fc2", "down"),
        )
        for rule in (
            Rule(f"{CLIP_PREFIX}encoder.layers.{{layer}}.{source}.weight", f"layers.{target}.kernel", LINEAR),
            Rule(f"{CLIP_PREFIX}encoder.layers.{{layer}}.{source}.bias", f"layers.{target}.bias"),
        )
    ],
    *[
        rule
        for source, target in (("layer_norm1", "attention_norm"), ("layer_norm2", "mlp_norm"))
        for rule in (
            Rule(f"{CLIP_PREFIX}encoder.layers.{{layer}}.{source}.weight", f"layers.{target}.scale"),
            Rule(f"{CLIP_PREFIX}encoder.layers.{{layer}}.{source}.bias", f"layers.{target}.bias"),
        )
    ],
    Rule(CLIP_PREFIX + "embeddings.position_ids", None),  # 0, 1, 2, … in files of older transformers
    Rule(CLIP_PREFIX + "post_layernorm.{path}", None, aside="post_norm.{path}"),  # Wan takes no pooled output
    Rule("visual_projection.weight", None),  # of CLIPVisionModelWithProjection, as Diffusers' conversion writes it
]


def text_encoder_rules(keys: Collection[str]) -> list[Rule]:
    """The text encoder's rules for a file with these keys: of the table's two tied names it may have either alone."""
    if _TIED in keys and "shared.weight" not in keys:
        return [Rule(_TIED, "embedding"), *TEXT_ENCODER[2:]]
    return TEXT_ENCODER


def image_encoder_rules(keys: Iterable[str], num_layers: int) -> list[Rule]:
    """The image encoder's rules for a file with these keys, of a model of `num_layers` (the last is never read).

    transformers 5 writes the keys without the published prefix.
    """
    rules = [*IMAGE_ENCODER, Rule(f"{CLIP_PREFIX}encoder.layers.{num_layers - 1}.{{path}}", None)]
    if any(key.startswith(CLIP_PREFIX) for key in keys):
        return rules
    return [replace(rule, source=rule.source.removeprefix(CLIP_PREFIX)) for rule in rules]
