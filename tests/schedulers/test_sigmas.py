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


def spaced_as_the_original(n, shift):
    """The closed form in float64, but for 0.999, which the original holds in float32."""
    s = np.linspace(float(np.float32(0.999)), 0, n + 1)[:-1]
    return shift * s / (1 + (shift - 1) * s)


@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0, 12.0, 16.0])
def test_the_original_spacing_is_its_closed_form_and_what_diffusers_makes_of_it(shift):
    for n in (1, 2, 4, 20, 40, 50, 128):
        sigmas = spaced_as_the_original(n, shift)
        tables = [make_table(sampler, n, shift, sigma_schedule="original") for sampler in ("unipc", "euler")]
        for table in tables:
            np.testing.assert_array_equal(table.sigmas[: n + 1], [*sigmas.astype(np.float32), 0])
        unipc, euler = tables
        np.testing.assert_array_equal(unipc.timesteps[:n], np.trunc(1000 * sigmas))
        scheduler = SCHEDULERS["unipc"](shift)
        scheduler.set_timesteps(sigmas=np.linspace(float(np.float32(0.999)), 0, n + 1)[:-1])  # shifted there
        np.testing.assert_array_equal(unipc.sigmas[: n + 1].astype(np.float32), scheduler.sigmas.numpy())
        np.testing.assert_array_equal(unipc.timesteps[:n], scheduler.timesteps.numpy())
        scheduler = SCHEDULERS["euler"](1.0)
        scheduler.set_timesteps(sigmas=sigmas)
        np.testing.assert_array_equal(euler.sigmas[: n + 1].astype(np.float32), scheduler.sigmas.numpy())
        np.testing.assert_array_equal(euler.timesteps[:n], scheduler.timesteps.numpy())


def test_the_original_spacing_differs_from_that_of_diffusers_by_what_users_see():
    """Timesteps by up to 8 at shift 12 and 50 steps: worth a preset."""
    ours, theirs = (make_table("unipc", 50, 12.0, sigma_schedule=name) for name in ("original", "diffusers"))
    assert np.abs(ours.timesteps - theirs.timesteps).max() == 8
    assert 0.007 < np.abs(ours.sigmas - theirs.sigmas).max() < 0.009


@pytest.mark.parametrize("sampler", ["euler", "renoise"])
@pytest.mark.parametrize(
    ("n", "shift", "timesteps"),
    [
        (4, 5.0, [1000, 937.5, 2500 / 3, 625]),  # 1000 750 500 250, warped as Self-Forcing and LightX2V do
        (4, 8.0, [1000, 960, 8000 / 9, 8000 / 11]),
        (5, 5.0, [1000, 20000 / 21, 15000 / 17, 10000 / 13, 5000 / 9]),
        (4, 7.0, [1000, 21000 / 22, 875, 700]),
    ],
)
def test_even_sigmas_are_those_of_step_distilled_models(sampler, n, shift, timesteps):
    table = make_table(sampler, n, shift, sigma_schedule="even")
    np.testing.assert_array_equal(table.sigmas[: n + 1], [*(np.array(timesteps) / 1000).astype(np.float32), 0])
    np.testing.assert_allclose(table.timesteps[:n], timesteps, rtol=1.2e-7)  # two roundings to float32


@pytest.mark.parametrize("timesteps", [[1000], [1000, 937.5, 2500 / 3, 625], list(range(1000, 0, -8))])
def test_euler_takes_timesteps_as_they_are(timesteps):
    table, n = make_table("euler", None, 5.0, timesteps=timesteps), len(timesteps)
    scheduler = SCHEDULERS["euler"](1.0)
    scheduler.set_timesteps(sigmas=(np.array(timesteps) / 1000).tolist())
    np.testing.assert_array_equal(table.sigmas[: n + 1].astype(np.float32), scheduler.sigmas.numpy())
    np.testing.assert_array_equal(table.timesteps[:n], np.array(timesteps, np.float32))


@pytest.mark.parametrize("shift", [5.0, 8.0])
@pytest.mark.parametrize("timesteps", [[1000, 757, 522], [1000, 750, 500, 250], [1000, 937.5, 2500 / 3, 625, 1]])
def test_a_lookup_finds_the_nearest_row_of_the_table_that_diffusers_trains_with(timesteps, shift):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)  # its first sigmas are that table's, in float32
    rows = [np.abs(scheduler.timesteps.numpy() - t).argmin() for t in timesteps]
    for sampler in ("renoise", "euler"):
        table, n = make_table(sampler, None, shift, timesteps=timesteps, sigma_schedule="lookup"), len(timesteps)
        # the table is shifted in float32 there
        np.testing.assert_allclose(table.sigmas[:n], scheduler.sigmas.numpy()[rows], rtol=1.2e-7)
        np.testing.assert_array_equal(table.timesteps[:n], np.array(timesteps, np.float32))
        assert table.sigmas[n] == 0


def test_the_sigmas_of_fastwan_are_the_known_ones():
    sigmas = make_table("renoise", None, 8.0, timesteps=[1000, 757, 522], sigma_schedule="lookup").sigmas[:4]
    by_hand = [8 * s / (1 + 7 * s) for s in (1, 0.280, 0.120)]
    np.testing.assert_array_equal(sigmas, [*np.array(by_hand, np.float32), 0])
    assert round(sigmas[1], 5) == 0.75676
