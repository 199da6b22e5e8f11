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
    r"\.(comfy_quant|weight_scale|weight_scale_2|input_scale|int8_weight)$": "quantised, with scales beside them",
    r"weight[.:_]+(_?data|_?scale|qdata|scale|zero_point)$": "quantised by torchao or quanto",
}
_MODELS = {
    r"^vace_blocks\.": "VACE",
    r"^(face_adapter|motion_encoder)\.": "Wan-Animate",
    r"^casual_audio_encoder\.": "Wan-S2V",
    r"^audio_proj\.": "HuMo",
    r"^(control_adapter|ref_conv)\.": "Wan-Fun",
    r"\.to_gate_compress\.|\.local_attn\.": "a model with sparse attention of its own",
}


def describe_tensors(dtypes: Mapping[str, str]) -> str | None:
    """What tensors that fit no configuration look like, by their names and dtypes ("F32", "U8", …), and what to do: the
    end of a sentence that begins with where they are. None where nothing is recognised."""
    keys, few = list(dtypes), sorted(set(dtypes.values()) - {"F32", "BF16", "F16", "F64", "I64"})
    if any(_LORA.search(key) for key in keys):
        return "holds a LoRA: give it as --lora FILE (loras in Python), beside the model that it is for"
    if words := _first(_QUANTISED, keys):
        return f"holds weights that are {words}, which are not read (yet): {PLAIN}"
    if few:
        return f"holds weights in {', '.join(few)}, probably quantised, which are not read (yet): {PLAIN}"
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
