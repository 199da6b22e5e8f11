"""Rule tables of the Diffusers layout, one per component. Sources: the published files' key sets."""

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

VAE: list[Rule] = []

TEXT_ENCODER: list[Rule] = []

IMAGE_ENCODER: list[Rule] = []
