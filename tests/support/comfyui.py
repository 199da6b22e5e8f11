"""An image-to-video checkpoint with two experts, as people have it: files of ComfyUI, and a twin in Diffusers' layout
that holds what these mean."""

from pathlib import Path
from unittest import mock

import torch
from checkpoints import FAMILIES, Family, make_checkpoint
from originals import original_transformer, original_vae, scaled_fp8
from safetensors.torch import load_file, save_file

FILE = "diffusion_pytorch_model.safetensors"
# heads of Wan's own width, because a file alone does not tell it
FAMILY = Family(1, 128, 2, experts=2, in_channels=36, boundary_ratio=0.9, image="channels")
EXPERTS = {"transformer": "high", "transformer_2": "low"}


def make_twins(folder: Path, files: Path) -> dict[str, Path]:
    """Write the twin into `folder`, and beside it files of the same meaning, whose paths are returned by component: the
    experts' in scaled fp8 of both kinds, the text encoder's too, and a VAE under original names."""
    with mock.patch.dict(FAMILIES, {"i2v-128": FAMILY}):
        make_checkpoint(folder, "i2v-128")
    parts = {name: files / f"wan2.2_i2v_{noise}_noise_14B_fp8_scaled.safetensors" for name, noise in EXPERTS.items()}
    for name, noise in EXPERTS.items():
        tensors = load_file(folder / name / FILE)
        names = {key: name for name in tensors for key in original_transformer({name: tensors[name]})}
        stored, meaning = scaled_fp8(original_transformer(tensors), "model.diffusion_model.", newer=noise == "low")
        save_file(stored, parts[name])
        save_file({names[key]: value for key, value in meaning.items()}, folder / name / FILE, {"format": "pt"})
    tensors = load_file(folder / "text_encoder/model.safetensors")
    stored, meaning = scaled_fp8({key: value.float() for key, value in tensors.items()})
    save_file(stored | {"spiece_model": torch.zeros(9, dtype=torch.uint8)}, files / "umt5.safetensors")
    save_file(meaning, folder / "text_encoder/model.safetensors", {"format": "pt"})
    torch.save(original_vae(load_file(folder / "vae" / FILE), 1), files / "vae.pth")
    others = {"vae": files / "vae.pth", "text_encoder": files / "umt5.safetensors", "tokenizer": folder / "tokenizer"}
    return parts | others
