"""Presets: how published models are sampled, by name. What a call says itself goes before each of their values."""

from dataclasses import dataclass
from typing import Any

from .table import check_choice

# As published, with full-width commas, which cleaning makes ASCII.
# Source: Wan2.2 wan/configs/shared_config.py:sample_neg_prompt, the same in Wan2.1.
OFFICIAL_NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，"
    "丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，"
    "静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"
)
_IMAGE_21 = "镜头晃动，" + OFFICIAL_NEGATIVE_PROMPT  # Wan2.1 wan/configs/wan_i2v_14B.py
_FRAMES_21 = "镜头切换，" + _IMAGE_21  # Wan2.1 wan/configs/__init__.py

DEFAULT_PRESET = "diffusers"
SMALL_PIXELS = 832 * 480  # of a frame of "480p", whatever its shape


@dataclass(frozen=True)
class Preset:
    """What a call uses where it is silent, None where that is the checkpoint's. Names are a call's."""

    sampler: str | None = None
    sigma_schedule: str | None = None
    num_inference_steps: int | None = None
    flow_shift: float | None = None
    timesteps: tuple[float, ...] | None = None
    guidance_scale: float | None = None
    guidance_scale_2: float | None = None  # with guidance_scale: None is the same as that
    negative_prompt: str | None = None
    small_flow_shift: float | None = None  # of frames of at most SMALL_PIXELS
    note: str | None = None  # what the caller is to know, as files do not tell it


def _official(
    shift: float, steps: int, high: float, low: float | None = None, *, negative: str = OFFICIAL_NEGATIVE_PROMPT,
    small_shift: float | None = None,
) -> Preset:  # fmt: skip
    return Preset(
        "unipc2", "original", steps, shift, guidance_scale=high, guidance_scale_2=low, negative_prompt=negative,
        small_flow_shift=small_shift,
    )  # fmt: skip


# The defaults of the original repositories' generate.py.
# Sources: Wan2.2 wan/configs/wan_{t2v_A14B,i2v_A14B,ti2v_5B}.py, where guidance is (low noise, high noise); Wan2.1
# generate.py:_validate_args.
_OFFICIAL = {
    "Wan2.2-T2V-A14B": _official(12.0, 40, 4.0, 3.0),
    "Wan2.2-I2V-A14B": _official(5.0, 40, 3.5, 3.5),
    "Wan2.2-TI2V-5B": _official(5.0, 50, 5.0),
    "Wan2.1-T2V-1.3B": _official(5.0, 50, 5.0),
    "Wan2.1-T2V-14B": _official(5.0, 50, 5.0),
    "Wan2.1-I2V-14B": _official(5.0, 40, 5.0, negative=_IMAGE_21, small_shift=3.0),
    "Wan2.1-FLF2V-14B": _official(16.0, 50, 5.0, negative=_FRAMES_21),
}

_DISTILLED = "is for weights that were distilled for it, which files do not tell"
# name -> its row, or one for each published model
PRESETS: dict[str, Preset | dict[str, Preset]] = {
    DEFAULT_PRESET: Preset(),
    "official": _OFFICIAL,
    # Sigmas 1, 0.9375, 0.8333, 0.625. Source: LightX2V schedulers/wan/step_distill, whose list is 1000 750 500 250.
    "lightx2v-4step": Preset("euler", "even", 4, 5.0, guidance_scale=1.0, note=_DISTILLED),
    # Sigmas 1, 0.75676, 0.52174. Source: FastVideo DmdDenoisingStage, whose shift is 8 for every model.
    "fastwan-3step": Preset(
        "renoise", "lookup", None, 8.0, (1000.0, 757.0, 522.0), guidance_scale=1.0, note=_DISTILLED
    ),
    # Sigmas as lightx2v-4step's. Source: Self-Forcing configs/self_forcing_dmd.yaml.
    "self-forcing-4step": Preset(
        "renoise", "even", 4, 5.0, guidance_scale=1.0,
        note=f"{_DISTILLED}; causal ones run with full attention here, all frames at once",
    ),
}  # fmt: skip


def find_preset(name: str, variant: str, published: bool) -> Preset:
    """The row of a preset for the published model `variant`, or for one that is built like it.

    Raises ValueError for an unknown name, with the nearest, and where a preset is of published models alone.
    """
    check_choice("preset", name, tuple(PRESETS))
    row = PRESETS[name]
    if isinstance(row, Preset):
        return row
    if not published:
        own = row[variant]
        raise ValueError(
            f"preset={name!r} is of published models, and this is none, though built like {variant}: say instead "
            f"sigma_schedule={own.sigma_schedule!r}, flow_shift={own.flow_shift:g} or what it was trained for"
        )
    return row[variant]


def preset_values(preset: Preset, *, small: bool = False) -> dict[str, Any]:
    """What a preset says, by the names of a call's arguments; of `small` frames what holds for them.

    Its sampling and guidance are wholes: where it has a sampler, all that it does not name of them is None.
    """
    if preset.sampler is None:
        return {}
    values = {name: getattr(preset, name) for name in PRESET_ARGUMENTS}
    if small and preset.small_flow_shift is not None:
        values["flow_shift"] = preset.small_flow_shift
    silent = [name for name in ("num_inference_steps", "negative_prompt") if values[name] is None]
    return {name: value for name, value in values.items() if name not in silent}


PRESET_ARGUMENTS = (
    "sampler", "sigma_schedule", "num_inference_steps", "flow_shift", "timesteps", "guidance_scale",
    "guidance_scale_2", "negative_prompt",
)  # fmt: skip
