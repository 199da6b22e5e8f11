"""Tiny checkpoints under the names of the original repositories: Diffusers' tensors renamed, word by word and without
the tables of the code under test. Sources: the key sets of the published files in both layouts."""

import re
from collections.abc import Mapping

import torch

_DIT = (
    (r"^condition_embedder\.image_embedder\.norm1\.", "img_emb.proj.0."),
    (r"^condition_embedder\.image_embedder\.ff\.net\.0\.proj\.", "img_emb.proj.1."),
    (r"^condition_embedder\.image_embedder\.ff\.net\.2\.", "img_emb.proj.3."),
    (r"^condition_embedder\.image_embedder\.norm2\.", "img_emb.proj.4."),
    (r"^condition_embedder\.image_embedder\.pos_embed$", "img_emb.emb_pos"),
    (r"^condition_embedder\.(text|time)_embedder\.linear_1\.", r"\1_embedding.0."),
    (r"^condition_embedder\.(text|time)_embedder\.linear_2\.", r"\1_embedding.2."),
    (r"^condition_embedder\.time_proj\.", "time_projection.1."),
    (r"^scale_shift_table$", "head.modulation"),
    (r"^proj_out\.", "head.head."),
    (r"\.scale_shift_table$", ".modulation"),
    (r"\.norm2\.", ".norm3."),
    (r"\.ffn\.net\.0\.proj\.", ".ffn.0."),
    (r"\.ffn\.net\.2\.", ".ffn.2."),
    (r"\.attn1\.", ".self_attn."),
    (r"\.attn2\.", ".cross_attn."),
    (r"\.to_out\.0\.", ".o."),
    (r"\.to_([qkv])\.", r".\1."),
    (r"\.add_([kv])_proj\.", r".\1_img."),
    (r"\.norm_added_k\.", ".norm_k_img."),
)
_VAE = (
    (r"^quant_conv\.", "conv1."),
    (r"^post_quant_conv\.", "conv2."),
    (r"coder\.conv_in\.", "coder.conv1."),
    (r"coder\.conv_out\.", "coder.head.2."),
    (r"\.norm_out\.gamma$", ".head.0.gamma"),
    (r"\.mid_block\.resnets\.0\.", ".middle.0."),
    (r"\.mid_block\.attentions\.0\.", ".middle.1."),
    (r"\.mid_block\.resnets\.1\.", ".middle.2."),
    (r"\.norm1\.gamma$", ".residual.0.gamma"),
    (r"\.norm2\.gamma$", ".residual.3.gamma"),
    (r"((?:blocks|resnets)\.\d+|middle\.[02])\.conv1\.", r"\1.residual.2."),
    (r"((?:blocks|resnets)\.\d+|middle\.[02])\.conv2\.", r"\1.residual.6."),
    (r"\.conv_shortcut\.", ".shortcut."),
)
_UMT5 = (
    (r"^shared\.", "token_embedding."),
    (r"^encoder\.final_layer_norm\.", "norm."),
    (r"^encoder\.block\.(\d+)\.layer\.0\.layer_norm\.", r"blocks.\1.norm1."),
    (r"^encoder\.block\.(\d+)\.layer\.1\.layer_norm\.", r"blocks.\1.norm2."),
    (r"\.SelfAttention\.relative_attention_bias\.", ".SelfAttention.pos_embedding.embedding."),
    (r"^encoder\.block\.(\d+)\.layer\.0\.SelfAttention\.", r"blocks.\1.attn."),
    (r"\.attn\.pos_embedding\.", ".pos_embedding."),
    (r"^encoder\.block\.(\d+)\.layer\.1\.DenseReluDense\.wi_0\.", r"blocks.\1.ffn.gate.0."),
    (r"^encoder\.block\.(\d+)\.layer\.1\.DenseReluDense\.wi_1\.", r"blocks.\1.ffn.fc1."),
    (r"^encoder\.block\.(\d+)\.layer\.1\.DenseReluDense\.wo\.", r"blocks.\1.ffn.fc2."),
)  # fmt: skip
_LLAMA = (
    (r"\.layer\.0\.layer_norm\.", ".layer.0.attn_norm."),
    (r"\.layer\.1\.layer_norm\.", ".layer.1.ffn_norm."),
    (r"^shared\.", "token_embd."),
    (r"^encoder\.final_layer_norm\.", "enc.output_norm."),
    (r"^encoder\.block\.(\d+)\.layer\.[01]\.", r"enc.blk.\1."),
    (r"(blk\.\d+)\.SelfAttention\.relative_attention_bias\.", r"\1.attn_rel_b."),
    (r"(blk\.\d+)\.SelfAttention\.", r"\1.attn_"),
    (r"\.DenseReluDense\.wi_0\.", ".ffn_gate."),
    (r"\.DenseReluDense\.wi_1\.", ".ffn_up."),
    (r"\.DenseReluDense\.wo\.", ".ffn_down."),
)
_CLIP = (
    (r"^(vision_model\.)?embeddings\.class_embedding$", "visual.cls_embedding"),
    (r"^(vision_model\.)?embeddings\.position_embedding\.weight$", "visual.pos_embedding"),
    (r"^(vision_model\.)?embeddings\.patch_embedding\.", "visual.patch_embedding."),
    (r"^(vision_model\.)?pre_layrnorm\.", "visual.pre_norm."),
    (r"^(vision_model\.)?post_layernorm\.", "visual.post_norm."),
    (r"^(vision_model\.)?encoder\.layers\.", "visual.transformer."),
    (r"\.layer_norm([12])\.", r".norm\1."),
    (r"\.self_attn\.out_proj\.", ".attn.proj."),
    (r"\.mlp\.fc1\.", ".mlp.0."),
    (r"\.mlp\.fc2\.", ".mlp.2."),
)

Tensors = Mapping[str, torch.Tensor]


def _renamed(tensors: Tensors, words) -> dict[str, torch.Tensor]:
    renamed = {}
    for name, tensor in tensors.items():
        for pattern, word in words:
            name = re.sub(pattern, word, name)
        renamed[name] = tensor
    assert len(renamed) == len(tensors)
    return renamed


def original_transformer(tensors: Tensors) -> dict[str, torch.Tensor]:
    """Without the norm that published Diffusers files have and nothing reads."""
    return _renamed({k: v for k, v in tensors.items() if "norm_added_q" not in k}, _DIT)


def original_text_encoder(tensors: Tensors) -> dict[str, torch.Tensor]:
    """Of the embedding one copy."""
    return _renamed({k: v for k, v in tensors.items() if "embed_tokens" not in k}, _UMT5)


def llama_text_encoder(tensors: Tensors) -> dict[str, torch.Tensor]:
    """Under the names that llama.cpp gives a T5 encoder, which end up in GGUF files."""
    return _renamed({k: v for k, v in tensors.items() if "embed_tokens" not in k}, _LLAMA)


def original_image_encoder(tensors: Tensors) -> dict[str, torch.Tensor]:
    """Queries, keys and values in one, other axes, and the parts that Wan does not use."""
    renamed = _renamed(tensors, _CLIP)
    fused = {}
    for name in [name for name in renamed if ".self_attn.q_proj." in name]:
        parts = [renamed.pop(name.replace("q_proj", f"{x}_proj")) for x in "qkv"]
        fused[name.replace("self_attn.q_proj", "attn.to_qkv")] = torch.cat(parts)
    renamed["visual.cls_embedding"] = renamed["visual.cls_embedding"].reshape(1, 1, -1)
    renamed["visual.pos_embedding"] = renamed["visual.pos_embedding"][None]
    unused = {"visual.head": torch.ones(4, 3), "textual.norm.weight": torch.ones(3), "log_scale": torch.zeros(())}
    return renamed | fused | unused


def original_vae(tensors: Tensors, residual_blocks: int) -> dict[str, torch.Tensor]:
    """Of either version; the blocks of a level are counted together, in 2.1 through all levels."""
    is_2_2 = any(re.match(r"encoder\.down_blocks\.\d\.resnets", name) for name in tensors)
    up, down = residual_blocks + 1, residual_blocks
    renamed = {}
    for name, tensor in _renamed(tensors, _VAE).items():
        if is_2_2:
            name = re.sub(r"^encoder\.down_blocks\.(\d)\.resnets\.", r"encoder.downsamples.\1.downsamples.", name)
            name = re.sub(
                r"^encoder\.down_blocks\.(\d)\.downsampler\.", rf"encoder.downsamples.\1.downsamples.{down}.", name
            )
            name = re.sub(r"^decoder\.up_blocks\.(\d)\.resnets\.", r"decoder.upsamples.\1.upsamples.", name)
            name = re.sub(r"^decoder\.up_blocks\.(\d)\.upsampler\.", rf"decoder.upsamples.\1.upsamples.{up}.", name)
        elif m := re.match(r"decoder\.up_blocks\.(\d)\.(?:resnets\.(\d)|upsamplers\.0)\.", name):
            place = int(m[1]) * (up + 1) + (up if m[2] is None else int(m[2]))
            name = f"decoder.upsamples.{place}.{name[m.end() :]}"
        else:
            name = name.replace("encoder.down_blocks.", "encoder.downsamples.")
        renamed[name] = tensor
    assert len(renamed) == len(tensors)
    return renamed


def scaled_fp8(tensors: Tensors, prefix: str = "", *, newer: bool = False) -> tuple[dict, dict[str, torch.Tensor]]:
    """Matrices in fp8 as ComfyUI stores them (its older form or the newer), the rest in float16; and, under the names
    that came, what these files mean, in float32."""
    file, meaning = {}, {}
    for name, tensor in tensors.items():
        layer = name.removesuffix(".weight")
        if layer == name or tensor.ndim != 2 or min(tensor.shape) < 8:
            file[prefix + name] = tensor.half()
            meaning[name] = file[prefix + name].float()
            continue
        scale = (tensor.abs().max() / 448).float()
        numbers = (tensor / scale).to(torch.float8_e4m3fn)
        file[prefix + name] = numbers
        file[f"{prefix}{layer}.{'weight_scale' if newer else 'scale_weight'}"] = scale
        file[f"{prefix}{layer}.{'input_scale' if newer else 'scale_input'}"] = torch.tensor(1.0)
        if newer:
            note = b'{"format": "float8_e4m3fn", "full_precision_matrix_mult": true}'
            file[f"{prefix}{layer}.comfy_quant"] = torch.tensor(list(note), dtype=torch.uint8)
        meaning[name] = numbers.float() * scale
    if not newer:
        file[f"{prefix}scaled_fp8"] = torch.zeros(2, dtype=torch.float8_e4m3fn)
    return file, meaning
