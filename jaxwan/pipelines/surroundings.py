"""What lies beside the weights of a checkpoint that is written: configurations, tokenizer, scheduler.

They are copied where the source has them, and otherwise made of what is known of it.
"""

from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from jaxwan.config import ImageInput, TransformerConfig, read_json
from jaxwan.convert.files import is_weights, list_files
from jaxwan.convert.save import File, copied_file, json_file
from jaxwan.pipelines.checkpoint import Checkpoint

INDEX = "model_index.json"
_VERSION = {"_diffusers_version": "0.35.0"}  # of the configurations that are made here
_MOST_COPIED = 2**27  # bytes of a file that is no tensors
_CLASSES = {
    "transformer": ["diffusers", "WanTransformer3DModel"],
    "transformer_2": ["diffusers", "WanTransformer3DModel"],
    "vae": ["diffusers", "AutoencoderKLWan"],
    "text_encoder": ["transformers", "UMT5EncoderModel"],
    "tokenizer": ["transformers", "T5TokenizerFast"],
    "scheduler": ["diffusers", "UniPCMultistepScheduler"],
    "image_encoder": ["transformers", "CLIPVisionModel"],
    "image_processor": ["transformers", "CLIPImageProcessor"],
}
_FIXED = {
    "transformer": {"_class_name": "WanTransformer3DModel", **_VERSION, "qk_norm": "rms_norm_across_heads"},
    "vae": {"_class_name": "AutoencoderKLWan", **_VERSION},
    "text_encoder": {
        "architectures": ["UMT5EncoderModel"], "model_type": "umt5", "feed_forward_proj": "gated-gelu",
        "is_gated_act": True, "dense_act_fn": "gelu_new", "is_encoder_decoder": True, "scalable_attention": True,
        "tie_word_embeddings": True, "eos_token_id": 1, "pad_token_id": 0, "dropout_rate": 0.1,
    },
    "image_encoder": {"architectures": ["CLIPVisionModel"], "model_type": "clip_vision_model"},
}  # fmt: skip
_IMAGE_PROCESSOR = {
    "image_processor_type": "CLIPImageProcessor", "do_resize": True, "size": {"shortest_edge": 224}, "resample": 3,
    "do_center_crop": True, "crop_size": {"height": 224, "width": 224}, "do_rescale": True,
    "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711], "do_convert_rgb": True,
}  # fmt: skip


def diffusers_surroundings(checkpoint: Checkpoint, dtype: str | None) -> list[File]:
    """Of a Diffusers folder. dtype: of DiT and text encoder, where it is another than the source's."""
    folder = checkpoint.folder
    if (folder / INDEX).is_file():
        others = _others(folder, ["scheduler", "image_processor"])
        files = [json_file(INDEX, _present_only(checkpoint, read_json(folder / INDEX))), *others]
        files += _copies(folder, [name for name in list_files(folder) if name == "generation_config.json"])
        files += _copies(folder, [name for name in list_files(folder) if name.upper().startswith("LICENSE")])
        configs = {name: read_json(folder / name / "config.json") for name in checkpoint.components}
    else:
        files = [json_file(INDEX, _index(checkpoint))]
        files.append(json_file("scheduler/scheduler_config.json", _scheduler(checkpoint)))
        if checkpoint.image_encoder is not None:
            files.append(json_file("image_processor/preprocessor_config.json", _IMAGE_PROCESSOR))
        configs = {name: _config(checkpoint, name) for name in checkpoint.components}
    if dtype is not None and "text_encoder" in configs:  # which transformers loads it in
        old = "torch_dtype" if "torch_dtype" in configs["text_encoder"] else "dtype"
        configs["text_encoder"] = configs["text_encoder"] | {old: dtype}
    files += [json_file(f"{name}/config.json", config) for name, config in configs.items()]
    return files + _tokenizer(checkpoint, "tokenizer")


def original_surroundings(checkpoint: Checkpoint, folders: Iterable[str]) -> list[File]:
    """Of a folder of the original repositories. folders: of the DiTs, with a slash if they have one of their own."""
    config = _original_config(checkpoint)
    return [
        *(json_file(f"{folder}config.json", config) for folder in folders), *_tokenizer(checkpoint, "google/umt5-xxl"),
    ]  # fmt: skip


def _others(folder: Path, names: Iterable[str]) -> list[File]:
    return [file for name in names for file in _copies(folder, [f"{name}/{n}" for n in list_files(folder / name)])]


def _copies(folder: Path, names: Iterable[str]) -> list[File]:
    """Files under their names, but for weights, which nothing here needs."""
    return [
        copied_file(name, folder / name)
        for name in names
        if not is_weights(name) and (folder / name).stat().st_size <= _MOST_COPIED
    ]


def _tokenizer(checkpoint: Checkpoint, name: str) -> list[File]:
    if checkpoint.text_encoder is None:
        return []
    folder = checkpoint.place("tokenizer")
    return [copied_file(f"{name}/{file}", folder / file) for file in list_files(folder) if not is_weights(file)]


def _present_only(checkpoint: Checkpoint, index: dict[str, Any]) -> dict[str, Any]:
    """An index that names no part that is not written."""
    absent = {"text_encoder", "tokenizer"} if checkpoint.text_encoder is None else set()
    absent |= {"image_encoder", "image_processor"} if checkpoint.image_encoder is None else set()
    return {name: [None, None] if name in absent and value is not None else value for name, value in index.items()}


def _index(checkpoint: Checkpoint) -> dict[str, Any]:
    takes_images = checkpoint.image_input in (ImageInput.CHANNELS, ImageInput.CHANNELS_AND_CLIP)
    parts = [*checkpoint.components, "scheduler", *["tokenizer"] * (checkpoint.text_encoder is not None)]
    parts += ["image_processor"] * (checkpoint.image_encoder is not None)
    absent = {"transformer", "transformer_2", "image_encoder", "image_processor"} - set(parts)
    return {
        "_class_name": "WanImageToVideoPipeline" if takes_images else "WanPipeline",
        **_VERSION,
        "boundary_ratio": checkpoint.boundary_ratio,
        "expand_timesteps": checkpoint.image_input is ImageInput.FIRST_FRAME,
        **{name: _CLASSES[name] for name in sorted(parts)},
        **{name: [None, None] for name in sorted(absent) if takes_images or name.startswith("transformer")},
    }


def _config(checkpoint: Checkpoint, name: str) -> dict[str, Any]:
    component = "transformer" if name in checkpoint.experts else name
    return _FIXED[component] | asdict(getattr(checkpoint, component))


def _scheduler(checkpoint: Checkpoint) -> dict[str, Any]:
    return {
        "_class_name": "UniPCMultistepScheduler", **_VERSION, "num_train_timesteps": 1000, "solver_type": "bh2",
        "solver_order": checkpoint.sampler.order, "prediction_type": "flow_prediction", "use_flow_sigmas": True,
        "flow_shift": checkpoint.sampler.shift, "predict_x0": True, "lower_order_final": True,
        "final_sigmas_type": "zero",
    }  # fmt: skip


def _original_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """As the original repositories write it; what it lacks, such as the patch's size, is the same in all of them."""
    cfg: TransformerConfig = checkpoint.transformer
    kinds = {ImageInput.NONE: "t2v", ImageInput.CHANNELS: "i2v", ImageInput.FIRST_FRAME: "ti2v"}
    kind = kinds.get(checkpoint.image_input, "flf2v" if cfg.pos_embed_seq_len is not None else "i2v")
    return {
        "_class_name": "WanModel", **_VERSION, "dim": cfg.dim, "eps": cfg.eps, "ffn_dim": cfg.ffn_dim,
        "freq_dim": cfg.freq_dim, "in_dim": cfg.in_channels, "model_type": kind, "num_heads": cfg.num_attention_heads,
        "num_layers": cfg.num_layers, "out_dim": cfg.out_channels, "text_len": 512,
    }  # fmt: skip
