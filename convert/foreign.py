"""Files that are not read: what they look like, so that an error can say it, and what to take instead."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from jaxwan.config import GIT_LFS_POINTER

PLAIN = "take the weights in the Diffusers layout in bfloat16, float16 or float32"
_LORA = re.compile(r"\.(lora_(A|B|up|down)|lokr_w|hada_w|diff(_b|_m)?$)")
# what names of tensors tell, by the words for it; the first that is found counts
_QUANTISED = {
    r"\.quant_state\.|\.absmax$": "quantised to 4 bits by bitsandbytes",
    r"\.SCB$": "quantised to 8 bits by bitsandbytes",
    r"\.(qweight|qzeros|g_idx)$": "quantised by GPTQ or AWQ",
    r"\.int8_weight$": "quantised to int8 by TurboDiffusion (a -quant file)",
    r"\.(weight|input)_global_scale$": "quantised to nvfp4 by LightX2V",
    r"\.(comfy_quant|weight_scale|weight_scale_2|input_scale|pre_quant_scale)$": "quantised, with scales beside them",
    r"weight[.:_]+(_?data|_?scale|qdata|scale|zero_point)$": "quantised by torchao or quanto",
}
_MODELS = {
    r"^vace_blocks\.": "VACE",
    r"^(face_adapter|motion_encoder)\.": "Wan-Animate",
    r"^blocks\.0\.block\.": "Wan-Animate-2",
    r"^casual_audio_encoder\.": "Wan-S2V",
    r"^audio_proj\.": "HuMo",
    r"^control_adapter\.": "Wan-Fun with camera control",
    r"^ref_conv\.": "Wan-Fun with a reference image",
    r"\.to_gate_compress\.": "FastWan with video sparse attention (VSA)",
    r"\.local_attn\.": "TurboDiffusion with sparse-linear attention (SLA)",
    r"^(encoder|decoder)\.\d+\.": "a tiny autoencoder (TAEHV: taew, lighttae)",
    r"(^|\.)(patchify_proj|adaln_single)\.": "LTX-Video",
    r"(^|\.)double_blocks\.": "HunyuanVideo or FLUX",
    r"(^|\.)transformer_blocks\.\d+\.img_mod\.": "Qwen-Image",
    r"(^|\.)(input_blocks|down_blocks\.0\.attentions)\.": "Stable Diffusion",
}
# other networks, or other weights of the same one, that nothing but their file's name tells
_FILES = {
    r"^lightvae": "LightX2V's pruned VAE",
    r"^(lighttae|taew)": "a tiny autoencoder (TAEHV)",
    r"^wan_alpha": "Wan-Alpha's VAE, for transparent videos",
}


def describe_name(path: Path) -> str | None:
    """What a file is that its name tells and its tensors do not: the end of a sentence that begins with where it is.
    None for all others."""
    told = next((words for pattern, words in _FILES.items() if re.match(pattern, path.name.lower())), None)
    return told and f"is {told} by its name, which is not implemented: take the VAE of the published Wan models"


def describe_tensors(dtypes: Mapping[str, str]) -> str | None:
    """What tensors that fit no configuration look like, by their names and dtypes ("F32", "U8", …), and what to do: the
    end of a sentence that begins with where they are. None where nothing is recognised."""
    keys, few = list(dtypes), sorted(set(dtypes.values()) - {"F32", "BF16", "F16", "F64", "I64"})
    if any(_LORA.search(key) for key in keys):
        return "holds a LoRA: give it as --lora FILE (loras in Python), beside the model that it is for"
    if words := _first(_QUANTISED, keys):
        kinds = f" in {', '.join(few)}" if few else ""
        return f"holds weights{kinds} that are {words}, which are not read: {PLAIN}"
    if few:
        return f"holds weights in {', '.join(few)}, probably quantised, which are not read: {PLAIN}"
    if words := _first(_MODELS, keys):
        return f"holds tensors of {words}, which is not implemented: take one of the published Wan models"
    return None


def describe_file(path: Path, otherwise: str = "is truncated or no safetensors file") -> str:
    """What a file that cannot be read is, by how it begins, and what to do: the end of a sentence about it."""
    with path.open("rb") as file:
        start = file.read(200)
    text = start.lstrip().lower()
    if start.startswith(GIT_LFS_POINTER):
        return "is a git-lfs pointer and not the weights: fetch them with `git lfs pull`"
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "is a web page and not the weights: download it again (the link may need a login)"
    if start.startswith(b"\x80"):
        return (
            "is a bare pickle, as PyTorch wrote it before 1.6, which is not read: if you trust it, write it anew by "
            "torch.save(torch.load(FILE, weights_only=True), NEW)"
        )
    return otherwise


def _first(words: Mapping[str, str], keys: Iterable[str]) -> str | None:
    joined = "\n".join(keys)
    return next((told for pattern, told in words.items() if re.search(pattern, joined, re.MULTILINE)), None)
