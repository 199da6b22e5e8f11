"""Rule tables of the original Wan repositories' layout, which ComfyUI's files have too, one per component.

Source: the published files' key sets. Values are those of the Diffusers layout under other names (`diffusers.py`); the
image encoder's tensors are first brought into its shapes (`views.py`).
"""

from collections.abc import Iterable

from jaxwan.config import VAEConfig
from jaxwan.convert.rules import CONV2D, CONV3D, KEEP, LINEAR, Rule, Transform


def _pair(source: str, target: str, transform: Transform = LINEAR, weight: str = "kernel") -> Iterable[Rule]:
    """The rules of a layer's weight and bias."""
    return Rule(f"{source}.weight", f"{target}.{weight}", transform), Rule(f"{source}.bias", f"{target}.bias")


def _norm(source: str, target: str) -> Iterable[Rule]:
    return _pair(source, target, KEEP, "scale")


TRANSFORMER: list[Rule] = [
    *_pair("patch_embedding", "patch_embedding", CONV3D),
    *_pair("time_embedding.0", "time_embedder.linear_1"),
    *_pair("time_embedding.2", "time_embedder.linear_2"),
    *_pair("time_projection.1", "time_proj"),
    *_pair("text_embedding.0", "text_embedder.linear_1"),
    *_pair("text_embedding.2", "text_embedder.linear_2"),
    *_norm("img_emb.proj.0", "image_embedder.norm1"),
    *_pair("img_emb.proj.1", "image_embedder.ff.up"),
    *_pair("img_emb.proj.3", "image_embedder.ff.down"),
    *_norm("img_emb.proj.4", "image_embedder.norm2"),
    Rule("img_emb.emb_pos", "image_embedder.pos_embed"),
    *[
        rule
        for source, target in (("self_attn", "attn1"), ("cross_attn", "attn2"))
        for name, ours in (("q", "q"), ("k", "k"), ("v", "v"), ("o", "out"))
        for rule in _pair(f"blocks.{{layer}}.{source}.{name}", f"blocks.{target}.{ours}")
    ],
    *[
        Rule(f"blocks.{{layer}}.{source}.{name}.weight", f"blocks.{target}.{name}.scale")
        for source, target in (("self_attn", "attn1"), ("cross_attn", "attn2"))
        for name in ("norm_q", "norm_k")
    ],
    *_pair("blocks.{layer}.cross_attn.k_img", "blocks.attn2.image_k"),
    *_pair("blocks.{layer}.cross_attn.v_img", "blocks.attn2.image_v"),
    Rule("blocks.{layer}.cross_attn.norm_k_img.weight", "blocks.attn2.norm_image_k.scale"),
    *_norm("blocks.{layer}.norm3", "blocks.norm2"),  # the only norm of a block with parameters, third in the original
    *_pair("blocks.{layer}.ffn.0", "blocks.ffn.up"),
    *_pair("blocks.{layer}.ffn.2", "blocks.ffn.down"),
    Rule("blocks.{layer}.modulation", "blocks.scale_shift_table"),
    Rule("head.modulation", "scale_shift_table"),
    *_pair("head.head", "proj_out"),
]

TEXT_ENCODER: list[Rule] = [
    Rule("token_embedding.weight", "embedding"),
    *[Rule(f"blocks.{{layer}}.attn.{name}.weight", f"layers.{name}.kernel", LINEAR) for name in ("q", "k", "v", "o")],
    Rule("blocks.{layer}.pos_embedding.embedding.weight", "layers.position_bias"),
    Rule("blocks.{layer}.norm1.weight", "layers.attention_norm.scale"),
    Rule("blocks.{layer}.norm2.weight", "layers.mlp_norm.scale"),
    Rule("blocks.{layer}.ffn.gate.0.weight", "layers.gate.kernel", LINEAR),
    Rule("blocks.{layer}.ffn.fc1.weight", "layers.up.kernel", LINEAR),
    Rule("blocks.{layer}.ffn.fc2.weight", "layers.down.kernel", LINEAR),
    Rule("norm.weight", "norm.scale"),
]

_LAYER = "visual.transformer.{layer}"

_IMAGE_ENCODER: list[Rule] = [
    Rule("visual.cls_embedding", "class_embedding"),
    Rule("visual.patch_embedding.weight", "patch_embedding", CONV2D),
    Rule("visual.pos_embedding", "position_embedding"),
    *_norm("visual.pre_norm", "pre_norm"),
    *[rule for name in ("q", "k", "v") for rule in _pair(f"{_LAYER}.attn.to_{name}", f"layers.{name}")],
    *_pair(f"{_LAYER}.attn.proj", "layers.o"),
    *_pair(f"{_LAYER}.mlp.0", "layers.up"),
    *_pair(f"{_LAYER}.mlp.2", "layers.down"),
    *_norm(f"{_LAYER}.norm1", "layers.attention_norm"),
    *_norm(f"{_LAYER}.norm2", "layers.mlp_norm"),
    Rule("visual.post_norm.{path}", None, aside="post_norm.{path}"),  # Wan takes no pooled output
    Rule("visual.head", None),
    Rule("textual.{path}", None),
    Rule("log_scale", None),
]


def image_encoder_rules(num_layers: int) -> list[Rule]:
    """The image encoder's rules, of a model of `num_layers` (the last is never read)."""
    return [*_IMAGE_ENCODER, Rule(f"visual.transformer.{num_layers - 1}.{{path}}", None)]


def vae_rules(cfg: VAEConfig) -> list[Rule]:
    """The VAE's rules for its version and depth: blocks that Diffusers' names (and ours) put in levels are counted
    through in 2.1, and all blocks of a level, whatever they are, are counted together."""
    blocks = _blocks_2_2(cfg) if cfg.is_residual else _blocks_2_1(cfg)
    return [
        *_pair("conv1", "quant_conv", CONV3D),
        *_pair("conv2", "post_quant_conv", CONV3D),
        *[rule for half in ("encoder", "decoder") for rule in _ends(half)],
        *[rule for source, target, is_resampler in blocks for rule in (_resampler if is_resampler else _residual)(
            source, target
        )],
    ]  # fmt: skip


def _ends(half: str) -> Iterable[Rule]:
    yield from _pair(f"{half}.conv1", f"{half}.conv_in", CONV3D)
    yield from _residual(f"{half}.middle.0", f"{half}.mid_block.resnets.0")
    attention, ours = f"{half}.middle.1", f"{half}.mid_block.attentions.0"
    yield Rule(f"{attention}.norm.gamma", f"{ours}.norm.gamma")
    yield from _pair(f"{attention}.to_qkv", f"{ours}.to_qkv", CONV2D)
    yield from _pair(f"{attention}.proj", f"{ours}.proj", CONV2D)
    yield from _residual(f"{half}.middle.2", f"{half}.mid_block.resnets.1")
    yield Rule(f"{half}.head.0.gamma", f"{half}.norm_out.gamma")
    yield from _pair(f"{half}.head.2", f"{half}.conv_out", CONV3D)


def _residual(source: str, target: str) -> Iterable[Rule]:
    yield Rule(f"{source}.residual.0.gamma", f"{target}.norm1.gamma")
    yield from _pair(f"{source}.residual.2", f"{target}.conv1", CONV3D)
    yield Rule(f"{source}.residual.3.gamma", f"{target}.norm2.gamma")
    yield from _pair(f"{source}.residual.6", f"{target}.conv2", CONV3D)
    yield from _pair(f"{source}.shortcut", f"{target}.conv_shortcut", CONV3D)


def _resampler(source: str, target: str) -> Iterable[Rule]:
    yield from _pair(f"{source}.resample.1", f"{target}.resample", CONV2D)
    yield from _pair(f"{source}.time_conv", f"{target}.time_conv", CONV3D)


_Block = tuple[str, str, bool]  # original name, ours, whether it resamples


def _blocks_2_1(cfg: VAEConfig) -> Iterable[_Block]:
    """Encoder blocks are flat in both; each decoder level has one residual block more, and a resampler."""
    levels, down, up = len(cfg.dim_mult), cfg.num_res_blocks, cfg.num_res_blocks + 1
    for i in range(levels * (down + 1) - 1):
        yield f"encoder.downsamples.{i}", f"encoder.down_blocks.{i}", i % (down + 1) == down
    for i in range(levels * (up + 1) - 1):
        level, j = divmod(i, up + 1)
        ours = "upsamplers.0" if j == up else f"resnets.{j}"
        yield f"decoder.upsamples.{i}", f"decoder.up_blocks.{level}.{ours}", j == up


def _blocks_2_2(cfg: VAEConfig) -> Iterable[_Block]:
    """Both halves have levels; the last of each does not resample."""
    for half, name, count, ours in (
        ("encoder", "down", cfg.num_res_blocks, "downsampler"),
        ("decoder", "up", cfg.num_res_blocks + 1, "upsampler"),
    ):
        for level in range(len(cfg.dim_mult)):
            source, target = f"{half}.{name}samples.{level}.{name}samples", f"{half}.{name}_blocks.{level}"
            yield from ((f"{source}.{j}", f"{target}.resnets.{j}", False) for j in range(count))
            if level < len(cfg.dim_mult) - 1:
                yield f"{source}.{count}", f"{target}.{ours}", True
