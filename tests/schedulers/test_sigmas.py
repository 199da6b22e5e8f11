"""Schedules: equal to Diffusers' to the last bit."""

import numpy as np
import pytest
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

from jaxwan.schedulers import make_table

FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
SCHEDULERS = {
    "unipc": lambda shift: UniPCMultistepScheduler(flow_shift=shift, **FLOW),
    "euler": lambda shift: FlowMatchEulerDiscreteScheduler(shift=shift),
    "dpm++2m": lambda shift: DPMSolverMultistepScheduler(flow_shift=shift, **FLOW),
}


@pytest.mark.parametrize("sampler", SCHEDULERS)
@pytest.mark.parametrize("shift", [0.01, 1.0, 2.7, 3.0, 5.0, 12.0, 100.0])
def test_sigmas_and_timesteps_are_exactly_those_of_diffusers(sampler, shift):
    scheduler = SCHEDULERS[sampler](shift)
    for n in (*range(1, 51), 77, 128):
        scheduler.set_timesteps(n)
        table = make_table(sampler, n, shift)
        np.testing.assert_array_equal(table.sigmas[: n + 1].astype(np.float32), scheduler.sigmas.numpy())
        np.testing.assert_array_equal(table.timesteps[:n], scheduler.timesteps.numpy())
        assert (np.diff(table.sigmas[: n + 1]) < 0).all()


@pytest.mark.parametrize(
    ("sampler", "num_steps", "shift", "first", "last"),
    [
        ("unipc", 4, 3.0, [999, 900, 750, 500], []),
        ("unipc", 7, 3.0, [999, 947, 882, 800, 692, 546, 334], []),
        ("unipc", 40, 3.0, [999, 991, 982, 973, 964], [251, 197, 138, 74]),
        ("euler", 4, 5.0, [1000, 909.70715, 717.31744, 24.414066], []),
        ("euler", 4, 1.0, [1000, 667, 334, 1], []),
    ],
)
def test_timesteps_are_the_known_ones(sampler, num_steps, shift, first, last):
    timesteps = make_table(sampler, num_steps, shift).timesteps[:num_steps]
    np.testing.assert_allclose(timesteps[: len(first)], first, rtol=1e-7)  # the literals have eight digits
    np.testing.assert_allclose(timesteps[num_steps - len(last) :], last, rtol=1e-7)


def test_sigmas_are_the_known_ones():
    sigmas = make_table("unipc", 4, 3.0).sigmas[:5]
    np.testing.assert_allclose(sigmas, [0.999999, 0.90011996, 0.7503748, 0.500999, 0], atol=5e-8)


@pytest.mark.parametrize(
    ("shift", "boundary", "expected"),
    [
        (3.0, 0.875, [7, 13, 16]),
        (3.0, 0.9, [6, 11, 13]),
        (5.0, 0.875, [9, 17, 21]),
        (5.0, 0.9, [8, 15, 18]),
        (12.0, 0.875, [13, 26, 32]),
        (12.0, 0.9, [12, 23, 29]),
    ],
)
def test_the_high_noise_expert_gets_the_known_number_of_steps(shift, boundary, expected):
    counts = [int((make_table("unipc", n, shift).timesteps >= boundary * 1000).sum()) for n in (20, 40, 50)]
    assert counts == expected


def test_a_timestep_may_meet_the_boundary_exactly():
    assert make_table("unipc", 4, 3.0).timesteps[1] == 0.9 * 1000
