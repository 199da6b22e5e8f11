"""scheduler_config.json: what is read, and what is refused by name."""

import inspect

import diffusers
import numpy as np
import pytest
import torch

from jaxwan.schedulers import SamplerDefaults, make_table, read_scheduler
from jaxwan.schedulers.config import SUPPORTED

OFFICIAL = {  # as published with Wan2.1 and Wan2.2 (flow_shift 5.0 with TI2V)
    "_class_name": "UniPCMultistepScheduler",
    "_diffusers_version": "0.35.0.dev0",
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "beta_start": 0.0001,
    "disable_corrector": [],
    "dynamic_thresholding_ratio": 0.995,
    "final_sigmas_type": "zero",
    "flow_shift": 3.0,
    "lower_order_final": True,
    "num_train_timesteps": 1000,
    "predict_x0": True,
    "prediction_type": "flow_prediction",
    "rescale_betas_zero_snr": False,
    "sample_max_value": 1.0,
    "solver_order": 2,
    "solver_p": None,
    "solver_type": "bh2",
    "steps_offset": 0,
    "thresholding": False,
    "timestep_spacing": "linspace",
    "trained_betas": None,
    "use_beta_sigmas": False,
    "use_exponential_sigmas": False,
    "use_flow_sigmas": True,
    "use_karras_sigmas": False,
}
MULTISTEP = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
SMALLEST = {
    "UniPCMultistepScheduler": {"_class_name": "UniPCMultistepScheduler", **MULTISTEP},
    "DPMSolverMultistepScheduler": {"_class_name": "DPMSolverMultistepScheduler", **MULTISTEP},
    "FlowMatchEulerDiscreteScheduler": {"_class_name": "FlowMatchEulerDiscreteScheduler"},
}
INEFFECTIVE = {  # odd values for every argument that read_scheduler lets pass unread
    "beta_start": 0.01,
    "beta_end": 0.3,
    "beta_schedule": "squaredcos_cap_v2",
    "trained_betas": np.linspace(0.01, 0.3, 1000).tolist(),
    "dynamic_thresholding_ratio": 0.5,
    "sample_max_value": 0.1,
    "timestep_spacing": "trailing",
    "steps_offset": 7,
    "rescale_betas_zero_snr": True,
    "time_shift_type": "exponential",
    "sigma_min": 0.1,
    "sigma_max": 0.5,
    "lower_order_final": False,
    "euler_at_final": True,
    "lambda_min_clipped": -5.1,
    "variance_type": "learned",
    "base_shift": 0.1,
    "max_shift": 7.0,
    "base_image_seq_len": 16,
    "max_image_seq_len": 32,
}


def constructor(name):
    parameters = inspect.signature(getattr(diffusers, name).__init__).parameters
    return {key: p.default for key, p in parameters.items() if key != "self"}


def result(config, steps):
    """Diffusers' samples of a toy model under `config`."""
    scheduler = getattr(diffusers, config["_class_name"]).from_config(config)
    scheduler.set_timesteps(steps)
    x = torch.linspace(-2, 2, 24).reshape(1, 2, 3, 4)
    for t in scheduler.timesteps:
        x = scheduler.step(torch.tanh(x) + t / 1000, t, x, return_dict=False)[0]
    return x


def test_the_published_configuration_is_unipc_of_order_two():
    assert read_scheduler(OFFICIAL) == SamplerDefaults("unipc", 2, 3.0)
    assert read_scheduler(OFFICIAL | {"flow_shift": 5, "solver_order": 3}) == SamplerDefaults("unipc", 3, 5.0)


@pytest.mark.parametrize(
    ("name", "keys", "expected"),
    [
        ("UniPCMultistepScheduler", {}, SamplerDefaults("unipc", 2, 1.0)),
        ("UniPCMultistepScheduler", {"shift": 7.0}, SamplerDefaults("unipc", 2, 7.0)),
        ("UniPCMultistepScheduler", {"shift": 7.0, "flow_shift": 3.0}, SamplerDefaults("unipc", 2, 3.0)),
        ("UniPCMultistepScheduler", {"solver_type": "midpoint"}, SamplerDefaults("unipc", 2, 1.0)),
        ("DPMSolverMultistepScheduler", {"flow_shift": 5.0}, SamplerDefaults("dpm++2m", 2, 5.0)),
        ("FlowMatchEulerDiscreteScheduler", {}, SamplerDefaults("euler", 2, 1.0)),
        ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0, "solver_order": 9}, SamplerDefaults("euler", 2, 3.0)),
        ("FlowMatchEulerDiscreteScheduler", {"flow_shift": 3.0}, SamplerDefaults("euler", 2, 3.0)),
    ],
)
def test_missing_keys_take_the_class_defaults(name, keys, expected):
    defaults = read_scheduler(SMALLEST[name] | keys)
    assert defaults == expected
    assert make_table(defaults.sampler, 4, defaults.shift, order=defaults.order).num_steps == 4


@pytest.mark.parametrize("name", SUPPORTED)
def test_the_assumed_defaults_are_those_of_diffusers(name):
    theirs = constructor(name)
    assert {key: default for key, (default, _) in SUPPORTED[name].items()} == {
        key: theirs[key] for key in SUPPORTED[name]
    }


@pytest.mark.parametrize("name", SUPPORTED)
def test_every_argument_is_read_refused_or_without_effect(name):
    unread = set(constructor(name)) - set(SUPPORTED[name]) - {"shift", "flow_shift"}
    plain = {steps: result(SMALLEST[name], steps) for steps in (4, 20)}
    for key in sorted(unread):
        config = SMALLEST[name] | {key: INEFFECTIVE[key]}
        assert read_scheduler(config) == read_scheduler(SMALLEST[name])
        for steps, expected in plain.items():
            assert torch.equal(result(config, steps), expected), key


@pytest.mark.parametrize(("name", "key"), [(name, key) for name in SUPPORTED for key in SUPPORTED[name]])
def test_every_setting_that_is_not_implemented_is_refused_by_name(name, key):
    with pytest.raises(ValueError, match=f"{name} is not implemented with {key}='other', only"):
        read_scheduler(SMALLEST[name] | {key: "other"})


@pytest.mark.parametrize("name", ["UniPCMultistepScheduler", "DPMSolverMultistepScheduler"])
def test_a_missing_key_whose_default_is_not_implemented_is_refused(name):
    with pytest.raises(ValueError, match="use_flow_sigmas=False \\(missing, so the class's default\\), only True"):
        read_scheduler({"_class_name": name, "prediction_type": "flow_prediction"})


def test_all_offending_keys_are_named_at_once():
    with pytest.raises(ValueError) as error:
        read_scheduler(OFFICIAL | {"use_karras_sigmas": True, "solver_type": "bh1", "disable_corrector": [0]})
    for part in (
        "use_karras_sigmas=True, only False",
        "solver_type='bh1', only 'bh2' or",
        "disable_corrector=[0], only []",
    ):
        assert part in str(error.value)


@pytest.mark.parametrize("config", [{}, {"_class_name": "DDIMScheduler"}, {"_class_name": "FlowMatchLCMScheduler"}])
def test_another_class_is_refused_with_those_that_are_read(config):
    with pytest.raises(ValueError, match="is not one of UniPCMultistepScheduler, DPMSolver.*, FlowMatchEuler"):
        read_scheduler(config)


@pytest.mark.parametrize("shift", [0.0, -1, "3", True, float("nan")])
def test_a_shift_that_is_no_positive_number_is_refused(shift):
    with pytest.raises(ValueError, match="shift"):
        read_scheduler(OFFICIAL | {"flow_shift": shift})
