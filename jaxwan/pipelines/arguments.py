"""Names and plain values of a call's arguments: misspelt names, those that other programs use, kinds of values, paths
and arrays."""

import difflib
import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

Number = int | float

# Arguments of Diffusers' pipelines that have no meaning here: what of them holds anyway, and what to do instead
_WITHOUT_MEANING = {
    "generator": ((None,), "noise comes from seed, a whole number"),
    "return_dict": ((None, True), "a call returns an Output, whose videos are in .frames"),
    "attention_kwargs": ((None, {}), "there are no attention processors that would take them"),
    "callback_on_step_end_tensor_inputs": ((None, ["latents"]), "callback_on_step_end is given the latents"),
    "image_embeds": ((None,), "give the image itself, as image"),
}

_OF_LOADING = ("model", "mesh", "dtype", "vae_dtype", "loras", "warmup", "check", "progress")

# What an argument is called in Diffusers, Wan's own scripts and other programs
_ELSEWHERE = {
    **dict.fromkeys(("steps", "sample_steps", "sampling_steps", "num_steps", "num_step"), "num_inference_steps"),
    **dict.fromkeys(("cfg", "cfg_scale", "sample_guide_scale", "guide_scale"), "guidance_scale"),
    **dict.fromkeys(("shift", "sample_shift"), "flow_shift"),
    **dict.fromkeys(("scheduler", "sample_solver", "sampler_name"), "sampler"),
    **dict.fromkeys(("frame_num", "frames", "length"), "num_frames"),
    **dict.fromkeys(("n_prompt", "negative"), "negative_prompt"),
    **dict.fromkeys(("num_videos", "num_images_per_prompt", "batch_size"), "num_videos_per_prompt"),
    **dict.fromkeys(("base_seed", "noise_seed"), "seed"),
    **dict.fromkeys(("callback", "callback_on_step"), "callback_on_step_end"),
    **dict.fromkeys(("device", "device_map"), "mesh"),
    "resize_mode": "fit",
    "torch_dtype": "dtype",
    "frame_rate": "fps",
    "boundary": "boundary_ratio",
    "denoise": "strength",
}


# Attributes of Diffusers' pipelines, and how the same is had here
_AT_HOME = {
    "scheduler": "choose a sampler in each call, such as pipe(…, sampler='unipc', flow_shift=3)",
    **dict.fromkeys(("_guidance_scale", "guidance_scale", "_guidance_scale_2"), "give guidance_scale to each call"),
    **dict.fromkeys(("transformer", "transformer_2", "vae", "text_encoder", "image_encoder", "tokenizer"),
                    "a pipeline's models are in pipe.parts; use pipe.predict, encode, decode or encode_prompt"),
    **dict.fromkeys(("to", "cuda", "device", "enable_model_cpu_offload", "enable_sequential_cpu_offload"),
                    "say the devices when loading, from_pretrained(…, mesh='pp=4')"),
    "enable_vae_tiling": "give a tiling to each call, pipe(…, tiling=jaxwan.Tiling())",
    "enable_vae_slicing": "the VAE decodes one video at a time, a few frames at a time, as it is",
    **dict.fromkeys(("load_lora_weights", "set_adapters", "fuse_lora"),
                    "name the files when loading, from_pretrained(…, loras=[jaxwan.Lora('style.safetensors', 0.8)])"),
    "set_progress_bar_config": "from_pretrained(…, progress=False) is silent",
    "save_pretrained": "a pipeline is not written again",
}  # fmt: skip


def no_attribute(name: str) -> AttributeError:
    """What to raise for an attribute that a pipeline does not have."""
    hint = f": {_AT_HOME[name]}" if name in _AT_HOME else ""
    return AttributeError(f"WanPipeline has no attribute {name}{hint}")


def refuse_unknown(given: Mapping[str, Any], known: Collection[str]) -> None:
    """Raises TypeError, naming the right argument, for one that is unknown or has no meaning here."""
    for name, value in given.items():
        if name in _OF_LOADING and name not in known:
            raise TypeError(
                f"{name} is no argument of a call: say it when loading, WanPipeline.from_pretrained(…, {name}=…)"
            )
        if name in _WITHOUT_MEANING:
            harmless, instead = _WITHOUT_MEANING[name]
            if not any(value is one or (type(value) is type(one) and value == one) for one in harmless):
                raise TypeError(f"{name}={value!r:.40} has no meaning here: {instead}")
            continue
        right = _ELSEWHERE.get(name)
        near = [right] if right else difflib.get_close_matches(name, known, 1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
        raise TypeError(f"there is no argument {name}: {hint}")


# Values


def check_kind(name: str, value: Any, kind: type | tuple[type, ...]) -> None:
    """Raises ValueError unless `value` is a text (kind str), a whole number (int) or a number (int, float)."""
    if not isinstance(value, kind) or isinstance(value, bool):
        wanted = "a text" if kind is str else "a whole number" if kind is int else "a number"
        raise ValueError(f"{name}={value!r} must be {wanted}")


def per_prompt(name: str, value: Any, count: int, kind: type | tuple[type, ...], default: Any = None) -> list:
    """One value a prompt, from one value or a list of them; None, alone or in the list, means the default.

    Raises ValueError for another number of values, another kind, or numbers that are not finite.
    """
    if isinstance(value, np.ndarray | jax.Array) or hasattr(value, "detach"):
        value = as_array(value, name).tolist()
    values = list(value) if isinstance(value, (list, tuple)) else [value] * count
    if len(values) != count:
        raise ValueError(f"{name} is a list of {len(values)} for {count} prompts: give one value, or one a prompt")
    values = [v.item() if isinstance(v, np.generic | jax.Array) and v.ndim == 0 else v for v in values]
    for v in values:
        if v is not None:
            check_kind(name, v, kind)
        if isinstance(v, float) and not np.isfinite(v):
            raise ValueError(f"{name}={v} is not finite")
    return [default if v is None else v for v in values]


def number(name: str, value: Any) -> Number:
    """One finite number. Raises ValueError for anything else."""
    (value,) = per_prompt(name, value, 1, (int, float))
    return value


def whole(name: str, value: Any, least: int) -> int:
    """One whole number from `least` on. Raises ValueError for anything else."""
    value = per_prompt(name, value, 1, int)[0]
    if value is None or value < least:
        raise ValueError(f"{name}={value} must be a whole number from {least}")
    return value


# Paths and arrays


def local_path(path: str | Path, what: str, instead: str = "give a path of this machine (download it first)") -> Path:
    """A path of this machine, with ~ and ~user opened. Raises ValueError for an empty text, and for a URL, saying what
    to do `instead`."""
    text = str(path)
    if path == "":
        raise ValueError(f"{what} is an empty text: give a path, or leave it out")
    if re.match(r"data:|[A-Za-z][A-Za-z0-9+.-]+:/", text):  # one letter is a drive of Windows
        url = re.sub(r":/+", "://", text, count=1) if isinstance(path, Path) else text  # a Path has lost a slash of it
        raise ValueError(f"{what} {url if len(url) <= 100 else url[:100] + '…'} is a URL: {instead}")
    return Path(os.path.expanduser(path))  # unlike Path.expanduser it leaves a ~ before no user's name, as shells do


def output_path(path: str | Path) -> Path:
    """`local_path` of what is to be written."""
    return local_path(path, "output", "give a path of this machine")


def as_array(value: Any, what: str) -> np.ndarray:
    """NumPy's array of an array of any library (a torch tensor of any device and dtype too), or of lists of them.

    Numbers that NumPy has no type for, such as bfloat16, become float32. Raises ValueError for complex numbers, whose
    imaginary part would be lost, and for what are no numbers.
    """
    if hasattr(value, "read"):
        raise ValueError(f"{what} is an open file: give its path, or what is in it as an array")
    try:
        array = np.asarray(_on_host(value))
        array = array.astype(np.float32) if array.dtype.kind == "V" else array  # JAX's bfloat16 and smaller ones
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{what} must be an array of numbers: {str(error).splitlines()[0]}") from error
    if array.dtype.kind not in "biuf":
        why = "are complex: give real ones" if array.dtype.kind == "c" else "are none"
        raise ValueError(f"{what} must be an array of numbers, and those of dtype {array.dtype} {why}")
    return array


def _on_host(value: Any) -> Any:
    """torch tensors, alone or in lists, as NumPy's; torch is not imported for that."""
    if isinstance(value, list | tuple):
        return [_on_host(one) for one in value]
    if not hasattr(value, "is_floating_point") or not hasattr(value, "detach"):
        return value
    small = value.is_floating_point() and value.element_size() < 4  # of these NumPy knows float16 alone
    return (value.float() if small else value).numpy(force=True)


def first_given(*values: Any) -> Any:
    """The first that is not None."""
    return next((v for v in values if v is not None), None)
