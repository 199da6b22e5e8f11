"""LoRA files in the styles of those who write them, from factors by Diffusers' names of modules; renamed without the
tables of the code under test."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from originals import original_transformer
from safetensors.torch import save_file

Factors = Mapping[str, tuple[torch.Tensor, torch.Tensor]]  # module -> down (rank, in), up (out, rank)


def original_name(module: str) -> str:
    """A module's name in the original layout."""
    (name,) = original_transformer({f"{module}.weight": torch.zeros(())})
    return name.removesuffix(".weight")


def underscored(name: str) -> str:
    return name.replace(".", "_")


# style -> (name of a module, "lora_A", "lora_B"), where the suffix of a factor's name follows
_NAMES = {
    "diffusers": lambda m: f"transformer.{m}.lora_{{}}.weight",
    "peft": lambda m: f"base_model.model.{m}.lora_{{}}.weight",
    "comfyui": lambda m: f"diffusion_model.{original_name(m)}.lora_{{}}.weight",
    "diffsynth": lambda m: f"pipe.dit.{original_name(m)}.lora_{{}}.default.weight",
    "bare": lambda m: f"{original_name(m)}.lora_{{}}.default.weight",
    "longlive": lambda m: f"base_model.model._fsdp_wrapped_module.{original_name(m)}.lora_{{}}.weight",
    "lightx2v": lambda m: f"diffusion_model.{original_name(m)}.lora_{{}}.weight",
    "musubi": lambda m: f"lora_unet_{underscored(original_name(m))}.lora_{{}}.weight",
    "videox": lambda m: f"lora_unet__{underscored(original_name(m))}.lora_{{}}.weight",
    "lycoris": lambda m: f"lycoris_{underscored(m)}.lora_{{}}.weight",
}
STYLES = tuple(_NAMES)
_DOWN_UP = ("lightx2v", "musubi", "videox", "lycoris")  # the others say A and B


def lora_tensors(factors: Factors, style: str, alpha: float | None = None) -> dict[str, torch.Tensor]:
    """The tensors of a file of a style; with the same alpha in all modules, if any."""
    tensors = {}
    for module, (down, up) in factors.items():
        name = _NAMES[style](module)
        sides = ("down", "up") if style in _DOWN_UP else ("A", "B")
        tensors |= {name.format(sides[0]): down.contiguous(), name.format(sides[1]): up.contiguous()}
        if alpha is not None:
            tensors[f"{name.partition('.lora_')[0]}.alpha"] = torch.tensor(float(alpha))
    return tensors


def write_lora(path: Path, tensors: Mapping[str, torch.Tensor], config: Mapping | None = None) -> Path:
    """A safetensors file; config: PEFT's configuration, in its header as Diffusers writes it."""
    said = None if config is None else {"lora_adapter_metadata": json.dumps(config), "format": "pt"}
    save_file(dict(tensors), path, said)
    return path
