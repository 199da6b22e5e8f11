"""`scheduler_config.json`: which sampler and shift a checkpoint was made for."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class SamplerDefaults:
    """Arguments of `make_table` that a checkpoint fixes. A sampler named by the user takes this order and shift.

    `order` is UniPC's: 2 where the checkpoint names another solver.
    """

    sampler: str
    order: int
    shift: float


# For each class, every constructor argument that changes the samples of a flow-matching model: (its default, the
# values implemented here). Arguments not listed are without effect on flow sigmas once these hold: the beta schedule,
# timestep_spacing, steps_offset, sigma_min/max, thresholding ratios, time_shift_type, …; with DPM++ 2M ending in
# sigma 0 also lower_order_final and euler_at_final, because its last step is of first order anyway.
_FLOW = {
    "num_train_timesteps": (1000, (1000,)),
    "use_karras_sigmas": (False, (False,)),
    "use_exponential_sigmas": (False, (False,)),
    "use_beta_sigmas": (False, (False,)),
    "use_dynamic_shifting": (False, (False,)),
}
_MULTISTEP = _FLOW | {
    "prediction_type": ("epsilon", ("flow_prediction",)),
    "use_flow_sigmas": (False, (True,)),
    "thresholding": (False, (False,)),
    "final_sigmas_type": ("zero", ("zero",)),
}
SUPPORTED: dict[str, dict[str, tuple[Any, tuple]]] = {
    "UniPCMultistepScheduler": _MULTISTEP
    | {
        "solver_order": (2, (2, 1, 3)),
        "solver_type": ("bh2", ("bh2", "midpoint", "heun", "logrho")),  # the last three mean bh2
        "predict_x0": (True, (True,)),
        "lower_order_final": (True, (True,)),
        "disable_corrector": ([], ([],)),
        "solver_p": (None, (None,)),
        "shift_terminal": (None, (None,)),
    },
    "DPMSolverMultistepScheduler": _MULTISTEP
    | {
        "solver_order": (2, (2,)),
        "algorithm_type": ("dpmsolver++", ("dpmsolver++",)),
        "solver_type": ("midpoint", ("midpoint", "logrho", "bh1", "bh2")),  # the last three mean midpoint
        "use_lu_lambdas": (False, (False,)),
    },
    "FlowMatchEulerDiscreteScheduler": _FLOW
    | {
        "shift_terminal": (None, (None,)),
        "invert_sigmas": (False, (False,)),
        "stochastic_sampling": (False, (False,)),
    },
}
_SAMPLERS = {
    "UniPCMultistepScheduler": "unipc",
    "DPMSolverMultistepScheduler": "dpm++2m",
    "FlowMatchEulerDiscreteScheduler": "euler",
}


def read_scheduler(config: dict[str, Any]) -> SamplerDefaults:
    """The sampler a parsed `scheduler_config.json` asks for.

    A missing key means the default of the class, as in Diffusers; so does null, but that it turns a flag off. The shift
    is `flow_shift` (multistep classes) or `shift` (Euler); when the class's own key is missing, the other one counts,
    though Diffusers would ignore it.
    Raises ValueError for another class, and for settings that change the result and are not implemented, all named.
    """
    name = config.get("_class_name")
    if not isinstance(name, str) or name not in SUPPORTED:
        raise ValueError(f"scheduler_config.json: _class_name={name!r} is not one of {', '.join(SUPPORTED)}")
    wrong = [_complaint(config, key, *rule) for key, rule in SUPPORTED[name].items()]
    if any(wrong):
        raise ValueError(f"scheduler_config.json: {name} is not implemented with {'; '.join(filter(None, wrong))}")
    own, other = ("shift", "flow_shift") if _SAMPLERS[name] == "euler" else ("flow_shift", "shift")
    shift = next((config[key] for key in (own, other) if config.get(key) is not None), 1.0)
    if isinstance(shift, bool) or not isinstance(shift, (int, float)) or not shift > 0:
        raise ValueError(f"scheduler_config.json: the shift is {shift!r}, not a number above 0")
    order = config.get("solver_order") or 2 if "solver_order" in SUPPORTED[name] else 2
    return SamplerDefaults(_SAMPLERS[name], order, float(shift))


def _complaint(config: dict[str, Any], key: str, default: Any, implemented: tuple) -> str | None:
    """What is wrong with `key`, or None."""
    value = config.get(key, default)
    if value in implemented or (value is None and default is not True and default in implemented):
        return None
    missing = "" if key in config else " (missing, so the class's default)"
    return f"{key}={value!r}{missing}, only {' or '.join(map(repr, implemented))}"
