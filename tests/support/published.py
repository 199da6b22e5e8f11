"""The configuration files of the published checkpoints, at full size or shrunk, in folders without a single tensor."""

import json
from pathlib import Path
from typing import Any

_DIT = {
    "_class_name": "WanTransformer3DModel", "_diffusers_version": "0.35.0.dev0", "added_kv_proj_dim": None,
    "attention_head_dim": 128, "cross_attn_norm": True, "eps": 1e-06, "ffn_dim": 13824, "freq_dim": 256,
    "image_dim": None, "in_channels": 16, "num_attention_heads": 40, "num_layers": 40, "out_channels": 16,
    "patch_size": [1, 2, 2], "qk_norm": "rms_norm_across_heads", "rope_max_seq_len": 1024, "text_dim": 4096,
}  # fmt: skip
_VAE_2_1 = {
    "_class_name": "AutoencoderKLWan", "_diffusers_version": "0.33.0.dev0", "attn_scales": [], "base_dim": 96,
    "dim_mult": [1, 2, 4, 4], "dropout": 0.0, "num_res_blocks": 2, "temperal_downsample": [False, True, True],
    "z_dim": 16,
    "latents_mean": [-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
                     0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921],
    "latents_std": [2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
                    3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.916],
}  # fmt: skip
_VAE_2_2 = _VAE_2_1 | {
    "base_dim": 160, "clip_output": False, "decoder_base_dim": 256, "in_channels": 12, "is_residual": True,
    "latents_mean": [0.01 * i - 0.2 for i in range(48)], "latents_std": [0.5 + 0.01 * i for i in range(48)],
    "out_channels": 12, "patch_size": 2, "scale_factor_spatial": 16, "scale_factor_temporal": 4, "z_dim": 48,
}  # fmt: skip
_UMT5 = {
    "architectures": ["UMT5EncoderModel"], "d_ff": 10240, "d_kv": 64, "d_model": 4096, "dense_act_fn": "gelu_new",
    "feed_forward_proj": "gated-gelu", "is_gated_act": True, "layer_norm_epsilon": 1e-06, "model_type": "umt5",
    "num_heads": 64, "num_layers": 24, "relative_attention_max_distance": 128, "relative_attention_num_buckets": 32,
    "scalable_attention": True, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "vocab_size": 256384,
}  # fmt: skip
_CLIP = {
    "architectures": ["CLIPVisionModel"], "hidden_act": "gelu", "hidden_size": 1280, "image_size": 224,
    "intermediate_size": 5120, "layer_norm_eps": 1e-05, "model_type": "clip_vision_model", "num_attention_heads": 16,
    "num_channels": 3, "num_hidden_layers": 32, "patch_size": 14, "projection_dim": 1024, "torch_dtype": "float32",
}  # fmt: skip
_SCHEDULER = {
    "_class_name": "UniPCMultistepScheduler", "flow_shift": 3.0, "lower_order_final": True,
    "num_train_timesteps": 1000, "predict_x0": True, "prediction_type": "flow_prediction", "solver_order": 2,
    "solver_type": "bh2", "use_flow_sigmas": True, "use_karras_sigmas": False,
}  # fmt: skip
_PARTS = {
    "scheduler": ["diffusers", "UniPCMultistepScheduler"],
    "text_encoder": ["transformers", "UMT5EncoderModel"],
    "tokenizer": ["transformers", "T5TokenizerFast"],
    "transformer": ["diffusers", "WanTransformer3DModel"],
    "vae": ["diffusers", "AutoencoderKLWan"],
}
_TWO = _PARTS | {"expand_timesteps": False, "transformer_2": ["diffusers", "WanTransformer3DModel"]}
_IMAGE = {"_class_name": "WanImageToVideoPipeline", "image_encoder": ["transformers", "CLIPVisionModel"],
          "image_processor": ["transformers", "CLIPImageProcessor"]}  # fmt: skip
_NONE = {"image_encoder": [None, None], "image_processor": [None, None]}
_I2V_2_1 = {"in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 5120}

# name of the variant -> (what differs in model_index.json, what differs in the transformer's config.json)
PUBLISHED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "Wan2.2-T2V-A14B": (_TWO | {"_class_name": "WanPipeline", "boundary_ratio": 0.875}, {"pos_embed_seq_len": None}),
    "Wan2.2-I2V-A14B": (
        _TWO | _NONE | {"_class_name": "WanImageToVideoPipeline", "boundary_ratio": 0.9},
        {"in_channels": 36, "pos_embed_seq_len": None},
    ),
    "Wan2.2-TI2V-5B": (
        _PARTS | {"_class_name": "WanPipeline", "boundary_ratio": None, "expand_timesteps": True,
                  "transformer_2": [None, None]},
        {"in_channels": 48, "out_channels": 48, "num_attention_heads": 24, "num_layers": 30, "ffn_dim": 14336,
         "pos_embed_seq_len": None},
    ),
    "Wan2.1-T2V-1.3B": (
        _PARTS | {"_class_name": "WanPipeline"}, {"num_attention_heads": 12, "num_layers": 30, "ffn_dim": 8960}
    ),
    "Wan2.1-T2V-14B": (_PARTS | {"_class_name": "WanPipeline"}, {}),
    "Wan2.1-I2V-14B": (_PARTS | _IMAGE, _I2V_2_1),
    "Wan2.1-FLF2V-14B": (_PARTS | _IMAGE, _I2V_2_1 | {"pos_embed_seq_len": 514}),
}  # fmt: skip

# Small enough to be silent about time: a width and a layer count that no published model has.
TINY = {
    "transformer": {"num_attention_heads": 2, "attention_head_dim": 20, "num_layers": 5, "ffn_dim": 72, "freq_dim": 32,
                    "text_dim": 24},
    "vae": {"base_dim": 8, "num_res_blocks": 1},
    "text_encoder": {"d_model": 24, "d_kv": 10, "d_ff": 40, "num_layers": 2, "num_heads": 3, "vocab_size": 100},
}  # fmt: skip


def write_configs(folder: Path, name: str, *, tiny: bool = False) -> Path:
    """Every configuration file of a published checkpoint, and nothing else; returns the folder."""
    index, transformer = PUBLISHED[name]
    shrunk = TINY if tiny else dict.fromkeys(TINY, {})
    dit = _DIT | transformer | shrunk["transformer"]
    files = {
        "model_index.json": {"_diffusers_version": "0.35.0.dev0", **index},
        "transformer/config.json": dit,
        "vae/config.json": (_VAE_2_2 if "TI2V" in name else _VAE_2_1) | shrunk["vae"],
        "text_encoder/config.json": _UMT5 | shrunk["text_encoder"],
        "scheduler/scheduler_config.json": _SCHEDULER | {"flow_shift": 5.0 if "TI2V" in name else 3.0},
    }
    if "transformer_2" in index and index["transformer_2"] != [None, None]:
        files["transformer_2/config.json"] = dit
    if index.get("image_encoder", [None])[0]:
        files["image_encoder/config.json"] = _CLIP
    for path, data in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(json.dumps(data, indent=2))
    return folder


def edit(path: Path, **values: Any) -> None:
    """Change keys of a JSON file; `...` removes one."""
    data = json.loads(path.read_text()) | values
    path.write_text(json.dumps({key: value for key, value in data.items() if value is not ...}))
