"""Tiny random Diffusers checkpoints of every published family, and diffusers' own pipelines on them.

They are written by the `save_pretrained` of diffusers and transformers; then the configuration files are edited back
to the forms that are published, which are older than the libraries here.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import (
    AutoencoderKLWan,
    DiffusionPipeline,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
)
from safetensors.torch import load_file, save_file
from tokenizer_files import write_tokenizer
from transformers import (
    AutoTokenizer,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModel,
    UMT5Config,
    UMT5EncoderModel,
)

torch.set_num_threads(1)  # models so small gain nothing from threads, and wait for them where cores are shared


class Family(NamedTuple):
    """What tells one published family from another; layers that 4 does not divide, heads that RoPE splits unevenly."""

    heads: int
    head_dim: int
    layers: int
    experts: int = 1
    in_channels: int = 16
    boundary_ratio: float | None = None
    image: str | None = None  # "channels", "clip" or "expand" (timesteps)
    last_image_rows: int | None = None  # pos_embed_seq_len
    flow_shift: float = 3.0
    shard_size: str = "10GB"

    @property
    def is_2_1(self) -> bool:
        return self.boundary_ratio is None and self.image != "expand"


FAMILIES = {
    "t2v-A14B": Family(2, 20, 5, experts=2, boundary_ratio=0.875, shard_size="400KB"),
    "i2v-A14B": Family(2, 22, 7, experts=2, in_channels=36, boundary_ratio=0.9, image="channels"),
    "ti2v-5B": Family(2, 28, 5, in_channels=48, image="expand", flow_shift=5.0),
    "2.1-t2v": Family(3, 20, 6),
    "2.1-i2v": Family(2, 28, 5, in_channels=36, image="clip"),
    "2.1-flf2v": Family(2, 20, 5, in_channels=36, image="clip", last_image_rows=514),
}
TEXT_WIDTH, CLIP_WIDTH = 24, 32

# Keys that configurations published with Wan2.1 do not have.
_NOT_IN_2_1 = {
    "model_index.json": ("boundary_ratio", "expand_timesteps", "transformer_2"),
    "vae/config.json": (
        "decoder_base_dim", "in_channels", "is_residual", "out_channels", "patch_size", "scale_factor_spatial",
        "scale_factor_temporal",
    ),
}  # fmt: skip
_LATER_SCHEDULER_KEYS = ("shift_terminal", "sigma_max", "sigma_min", "time_shift_type", "use_dynamic_shifting")


def make_checkpoint(folder: Path, family: str) -> None:
    """Write a random checkpoint of a family, always the same one."""
    f = FAMILIES[family]
    vocabulary = write_tokenizer(folder / "tokenizer")
    with torch.random.fork_rng():
        torch.manual_seed(sorted(FAMILIES).index(family))
        parts: dict[str, Any] = {
            "tokenizer": AutoTokenizer.from_pretrained(folder / "tokenizer"),
            "text_encoder": _text_encoder(vocabulary, torch.float32 if f.is_2_1 else torch.bfloat16),
            "vae": _vae(f),
            "scheduler": UniPCMultistepScheduler(
                prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=f.flow_shift
            ),
            "transformer": _transformer(f),
        }
        if f.experts == 2:
            parts["transformer_2"] = _transformer(f)
        if f.image == "clip":
            parts |= {"image_encoder": _image_encoder(), "image_processor": CLIPImageProcessorPil()}
    if not f.is_2_1:
        parts |= {"boundary_ratio": f.boundary_ratio, "expand_timesteps": f.image == "expand"}
    cls = WanImageToVideoPipeline if f.image in ("channels", "clip") else WanPipeline
    cls(**parts).save_pretrained(folder, max_shard_size=f.shard_size)
    write_tokenizer(folder / "tokenizer")  # over what transformers 5 made of it
    _publish(folder, f)


def load_reference(folder: Path, family: str, dtype: torch.dtype = torch.float32, cls: type | None = None):
    """diffusers' pipeline on a checkpoint, its VAE in float32; `cls` for another task than the folder's own."""
    f = FAMILIES[family]
    text_encoder = UMT5EncoderModel.from_pretrained(folder / "text_encoder", dtype=dtype)
    # the published config unties what is stored once; releases of transformers differ in what they make of it
    text_encoder.encoder.embed_tokens.weight = text_encoder.shared.weight
    parts = {"text_encoder": text_encoder, "tokenizer": AutoTokenizer.from_pretrained(folder / "tokenizer")}
    parts["vae"] = AutoencoderKLWan.from_pretrained(folder / "vae", torch_dtype=torch.float32)
    if f.image == "clip":
        parts["image_encoder"] = CLIPVisionModel.from_pretrained(folder / "image_encoder", dtype=torch.float32)
        parts["image_processor"] = CLIPImageProcessorPil.from_pretrained(folder / "image_processor")
    pipe = (cls or DiffusionPipeline).from_pretrained(folder, torch_dtype=dtype, **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


# The parts


def _perturbed(model, amount: float = 0.1):
    """Fresh norms are ones and fresh biases zeros or small: all must count."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(amount * torch.randn_like(p))
    return model.eval()


def _text_encoder(vocabulary: int, dtype: torch.dtype) -> UMT5EncoderModel:
    """Rows beyond the tokenizer's vocabulary, and heads that do not make up d_model, as in the published one."""
    cfg = UMT5Config(
        vocab_size=vocabulary + 5, d_model=TEXT_WIDTH, d_kv=10, d_ff=40, num_layers=2, num_heads=3,
        feed_forward_proj="gated-gelu", is_gated_act=True, dense_act_fn="gelu_new",
    )  # fmt: skip
    return _perturbed(UMT5EncoderModel(cfg)).to(dtype)


def _image_encoder() -> CLIPVisionModel:
    """ViT-H/14's geometry, 257 rows, because the DiT counts on it."""
    cfg = CLIPVisionConfig(
        hidden_size=CLIP_WIDTH, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2, image_size=224,
        patch_size=14, hidden_act="gelu",
    )  # fmt: skip
    return _perturbed(CLIPVisionModel(cfg))


def _vae(f: Family) -> AutoencoderKLWan:
    kind = {}
    if f.image == "expand":
        kind = dict(
            decoder_base_dim=12, z_dim=48, is_residual=True, patch_size=2, in_channels=12, out_channels=12,
            scale_factor_spatial=16, latents_mean=torch.randn(48).tolist(), latents_std=(1 + torch.rand(48)).tolist(),
        )  # fmt: skip
    vae = _perturbed(AutoencoderKLWan(base_dim=8, num_res_blocks=1, **kind), 0.05)
    with torch.no_grad():  # latents of order 1; as it is, pixels fill [-1, 1] and pass it here and there
        vae.quant_conv.weight.mul_(4)
    return vae


def _transformer(f: Family) -> WanTransformer3DModel:
    dim = f.heads * f.head_dim
    model = WanTransformer3DModel(
        num_attention_heads=f.heads, attention_head_dim=f.head_dim, in_channels=f.in_channels,
        out_channels=48 if f.image == "expand" else 16, text_dim=TEXT_WIDTH, freq_dim=32, ffn_dim=72,
        num_layers=f.layers, image_dim=CLIP_WIDTH if f.image == "clip" else None,
        added_kv_proj_dim=dim if f.image == "clip" else None, pos_embed_seq_len=f.last_image_rows,
    )  # fmt: skip
    return _scaled(_perturbed(model), f)


def _scaled(model: WanTransformer3DModel, f: Family) -> WanTransformer3DModel:
    """Velocities of order 1, so that latents stay near it too; texts that differ change them."""
    with torch.no_grad():
        for block in model.blocks:
            block.attn2.norm_k.weight.mul_(3)  # else the padding, most of the 512 rows, drowns the text
            if f.image == "clip":
                block.attn2.norm_added_k.weight.mul_(3)
        x, text = torch.randn(1, f.in_channels, 2, 4, 6), torch.randn(1, 512, TEXT_WIDTH)
        image = torch.randn(2 if f.last_image_rows else 1, 257, CLIP_WIDTH) if f.image == "clip" else None
        velocity = model(x, torch.tensor([500]), text, image, return_dict=False)[0]
        model.proj_out.weight.div_(velocity.std())
        model.proj_out.bias.div_(velocity.std())
    return model


# Back to the published forms


def _publish(folder: Path, f: Family) -> None:
    index = _read(folder / "model_index.json")
    if f.image == "clip":
        index["image_processor"] = ["transformers", "CLIPImageProcessor"]
    index["tokenizer"] = ["transformers", "T5TokenizerFast"]
    _write(folder / "model_index.json", index)
    for name in ("text_encoder", "image_encoder"):
        if (folder / name).is_dir():
            _publish_transformers(folder / name / "config.json")
    _without(folder / "scheduler/scheduler_config.json", _LATER_SCHEDULER_KEYS)
    if f.image == "clip":
        _publish_clip(folder)
    if f.is_2_1:
        for name, keys in _NOT_IN_2_1.items():
            _without(folder / name, keys)
        if f.last_image_rows is None:
            _without(folder / "transformer/config.json", ["pos_embed_seq_len"])


def _publish_transformers(path: Path) -> None:
    """Older transformers wrote `torch_dtype`; the published text encoder says that it is not tied, although it is."""
    data = _read(path)
    data["torch_dtype"] = data.pop("dtype")
    if data["model_type"] == "umt5":
        data["tie_word_embeddings"] = False
    _write(path, data)


def _publish_clip(folder: Path) -> None:
    """Keys with the prefix that transformers 5 leaves out, and a norm in the DiT that no model reads."""
    path = folder / "image_encoder/model.safetensors"
    tensors = {f"vision_model.{key.removeprefix('vision_model.')}": value for key, value in load_file(path).items()}
    save_file(tensors, path, {"format": "pt"})
    path = folder / "transformer/diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    unread = {key.replace("norm_added_k", "norm_added_q"): value + 1 for key, value in tensors.items()}
    save_file(tensors | {key: value for key, value in unread.items() if "norm_added_q" in key}, path, {"format": "pt"})


def _without(path: Path, keys) -> None:
    _write(path, {key: value for key, value in _read(path).items() if key not in keys})


def _read(path: Path) -> dict:
    return json.loads(path.read_text())


def _write(path: Path, data: dict) -> None:
    path.write_text(json.dumps(data, indent=2))
