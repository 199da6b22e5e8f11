"""Whole runs: the tables against Diffusers' schedulers, every step of a nonlinear toy model."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchLCMScheduler,
    UniPCMultistepScheduler,
)
from diffusers.schedulers import scheduling_flow_match_lcm
from jax.sharding import Mesh, PartitionSpec

from jaxwan.schedulers import (
    SAMPLERS,
    add_noise,
    first_used_step,
    init_state,
    make_table,
    stack_tables,
    step,
    table_row,
)

SHAPE = (2, 3, 4, 5)
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
SCHEDULERS = {
    "unipc1": lambda shift: UniPCMultistepScheduler(solver_order=1, flow_shift=shift, **FLOW),
    "unipc2": lambda shift: UniPCMultistepScheduler(solver_order=2, flow_shift=shift, **FLOW),
    "unipc3": lambda shift: UniPCMultistepScheduler(solver_order=3, flow_shift=shift, **FLOW),
    "euler": lambda shift: FlowMatchEulerDiscreteScheduler(shift=shift),
    "dpm++2m": lambda shift: DPMSolverMultistepScheduler(flow_shift=shift, **FLOW),
}
KNOWN = [  # mean |x| after 4, 10 and 20 steps of v = x * t / (t + 1) from a known start, made with Diffusers
    ("unipc1", 3.0, [0.145655, 0.173039, 0.180174]),
    ("unipc2", 3.0, [0.150124, 0.178892, 0.183554]),
    ("unipc3", 3.0, [0.150124, 0.178914, 0.183248]),
    ("unipc2", 5.0, [0.127603, 0.169766, 0.180796]),
    ("euler", 3.0, [0.129041, 0.168424, 0.177213]),
    ("euler", 5.0, [0.110406, 0.161511, 0.174195]),
    ("dpm++2m", 5.0, [0.126992, 0.169700, 0.181218]),
]


@jax.jit
def advance(table, i, state, velocity, noise):
    return step(table_row(table, i), state, velocity, noise)


def toy_velocity(x, t):
    """Smooth and nonlinear in x and t, with trajectories that stay near 1."""
    return np.tanh(1.3 * x) - np.float32(0.8) * np.sin(x * np.float32(2 + t / 500)) + np.float32(np.cos(t / 150))


def latents(seed, shape=SHAPE):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def run_table(table, x, velocity=toy_velocity, noises=None):
    """x after every step."""
    state, trace = init_state(jnp.asarray(x)), []
    for i in range(int(table.num_steps)):
        noise = np.zeros_like(x) if noises is None else noises[i]
        state = advance(table, i, state, velocity(np.asarray(state.x), table.timesteps[i]), noise)
        trace.append(np.asarray(state.x))
    return trace


def run_diffusers(scheduler, timesteps, x):
    x, trace = torch.from_numpy(x), []
    for t in timesteps:
        velocity = torch.from_numpy(toy_velocity(x.numpy(), t.item()))
        x = scheduler.step(velocity, t, x, return_dict=False)[0]
        trace.append(x.numpy())
    return trace


def worst_error(ours, theirs):
    assert len(ours) == len(theirs)
    return max(np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("sampler", SCHEDULERS)
@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0, 12.0])
def test_every_step_equals_diffusers(sampler, shift):
    for n in (1, 2, 3, 4, 5, 10, 16, 50):
        scheduler = SCHEDULERS[sampler](shift)
        scheduler.set_timesteps(n)
        theirs = run_diffusers(scheduler, scheduler.timesteps, latents(n))
        # Diffusers computes its weights in float32, at 50 steps with differences of near equal numbers
        assert worst_error(run_table(make_table(sampler, n, shift), latents(n)), theirs) < 2e-6


@pytest.mark.parametrize("sampler", ["unipc1", "unipc2", "unipc3", "euler"])
@pytest.mark.parametrize("shift", [3.0, 12.0])
def test_every_step_on_the_original_sigmas_equals_diffusers(sampler, shift):
    for n in (1, 2, 5, 40):
        table = make_table(sampler, n, shift, sigma_schedule="original")
        scheduler = SCHEDULERS[sampler](1.0)
        scheduler.set_timesteps(sigmas=table.sigmas[:n])  # not shifted again
        theirs = run_diffusers(scheduler, torch.from_numpy(table.timesteps[:n]).to(scheduler.timesteps), latents(n))
        assert worst_error(run_table(table, latents(n)), theirs) < 1e-6


@pytest.mark.parametrize(
    "arguments",
    [
        dict(num_steps=4, shift=5.0, sigma_schedule="even"),
        dict(num_steps=None, shift=5.0, timesteps=[1000, 937.5, 2500 / 3, 625]),
        dict(num_steps=None, shift=8.0, timesteps=[1000, 757, 522], sigma_schedule="lookup"),
    ],
)
def test_every_step_of_euler_on_few_sigmas_equals_diffusers(arguments):
    table = make_table("euler", **arguments)
    n = int(table.num_steps)
    scheduler = SCHEDULERS["euler"](1.0)
    scheduler.set_timesteps(sigmas=table.sigmas[:n].tolist())
    state, theirs = torch.from_numpy(latents(0)), []
    for i, t in enumerate(scheduler.timesteps):  # the model is shown ours, which a lookup does not derive from sigma
        velocity = torch.from_numpy(toy_velocity(state.numpy(), table.timesteps[i]))
        state = scheduler.step(velocity, t, state, return_dict=False)[0]
        theirs.append(state.numpy())
    assert worst_error(run_table(table, latents(0)), theirs) < 1e-6


def test_a_renoised_lookup_uses_its_sigmas_at_both_ends_of_a_step():
    """x0 = x - sigma(t) * v, then (1 - sigma(t')) * x0 + sigma(t') * noise, by hand in float64."""
    timesteps, sigmas = [1000, 757, 522], [1.0, 2.24 / 2.96, 0.96 / 1.84, 0.0]
    noises, x, theirs = [latents(10 + i) for i in range(3)], latents(0).astype(float), []
    for i, t in enumerate(timesteps):
        x0 = x - sigmas[i] * toy_velocity(x, np.float64(t))
        x = (1 - sigmas[i + 1]) * x0 + sigmas[i + 1] * noises[i]
        theirs.append(x)
    table = make_table("renoise", None, 8.0, timesteps=timesteps, sigma_schedule="lookup")
    assert worst_error(run_table(table, latents(0), noises=noises), theirs) < 1e-6


@pytest.mark.parametrize("sampler", SCHEDULERS)
@pytest.mark.parametrize(("n", "strength"), [(10, 0.75), (6, 0.5), (8, 0.2)])
def test_a_late_start_equals_diffusers_begin_index(sampler, n, strength):
    first = first_used_step(n, strength)
    scheduler = SCHEDULERS[sampler](3.0)
    scheduler.set_timesteps(n)
    scheduler.set_begin_index(first)
    table = make_table(sampler, n, 3.0, first_step=first)
    assert table.num_steps == n - first
    theirs = run_diffusers(scheduler, scheduler.timesteps[first:], latents(n))
    assert worst_error(run_table(table, latents(n)), theirs) < 2e-6


@pytest.mark.parametrize("sampler", SCHEDULERS)
def test_noise_is_added_as_diffusers_does_at_the_first_used_sigma(sampler):
    scheduler = SCHEDULERS[sampler](5.0)
    scheduler.set_timesteps(10)
    add = scheduler.scale_noise if sampler == "euler" else scheduler.add_noise
    x0, noise, t = torch.from_numpy(latents(0)), torch.from_numpy(latents(1)), scheduler.timesteps[3:4]
    theirs = add(x0, t, noise) if sampler == "euler" else add(x0, noise, t)
    table = make_table(sampler, 10, 5.0, first_step=3)
    ours = add_noise(jnp.asarray(latents(0)), jnp.asarray(latents(1)), table.sigmas[0])
    np.testing.assert_allclose(ours, theirs, atol=5e-7)  # two float32 roundings of numbers below 4


@pytest.mark.parametrize(
    "timesteps", [[1000, 750, 500, 250], [1000.0, 937.5, 833.3], [999, 1], list(range(900, 0, -100))]
)
def test_renoising_equals_diffusers_lcm_with_the_same_noise(timesteps, monkeypatch):
    noises = [latents(100 + i) for i in range(len(timesteps))]
    left = iter(noises)
    monkeypatch.setattr(scheduling_flow_match_lcm, "randn_tensor", lambda *_, **__: torch.from_numpy(next(left)))
    scheduler = FlowMatchLCMScheduler(shift=1)
    scheduler.set_timesteps(timesteps=timesteps)
    table = make_table("renoise", None, 5.0, timesteps=timesteps)
    n = len(timesteps)
    np.testing.assert_array_equal(table.sigmas[: n + 1].astype(np.float32), scheduler.sigmas.numpy())
    np.testing.assert_array_equal(table.timesteps[:n].astype(np.float32), scheduler.timesteps.numpy())
    theirs = run_diffusers(scheduler, scheduler.timesteps, latents(0))
    assert worst_error(run_table(table, latents(0), noises=noises), theirs) < 1e-6


@pytest.mark.parametrize(("sampler", "shift", "expected"), KNOWN)
def test_known_inputs_give_the_known_mean(sampler, shift, expected):
    x = (np.arange(768, dtype=np.float32).reshape(3, 8, 8, 4) / 768).transpose(3, 0, 1, 2)
    for n, mean in zip((4, 10, 20), expected, strict=True):
        last = run_table(make_table(sampler, n, shift), x, lambda x, t: x * np.float32(t / (t + 1)))[-1]
        assert abs(np.abs(last).mean() - mean) < 1.5e-6  # the literals have six digits


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_model_that_knows_x0_ends_there(sampler):
    x0, noise = latents(1), latents(2)
    table = (
        make_table(sampler, None, 1.0, timesteps=[1000, 600, 200])
        if sampler == "renoise"
        else make_table(sampler, 9, 5.0)
    )
    level = dict(zip(table.timesteps, table.sigmas[:-1].astype(np.float32), strict=True))
    start = np.asarray(add_noise(jnp.asarray(x0), jnp.asarray(noise), table.sigmas[0]))
    last = run_table(table, start, lambda x, t: (x - x0) / level[t], [noise] * 9)[-1]
    np.testing.assert_allclose(last, x0, atol=5e-7)  # m = x - sigma * v rounds once more than x0


@pytest.fixture(scope="module")
def mixed():
    """Six requests of every kind, their starts and noises."""
    tables = [
        make_table("unipc", 20, 3.0),
        make_table("unipc3", 7, 12.0, first_step=2),
        make_table("euler", 4, 5.0),
        make_table("dpm++2m", 13, 1.0),
        make_table("renoise", None, 5.0, timesteps=[1000, 750, 500, 250]),
        make_table("unipc1", 1, 3.0),
    ]
    return tables, latents(0, (6, *SHAPE)), latents(1, (20, 6, *SHAPE))


def scanned(table, x, noises):
    """The same toy model in a compiled loop; all requests run as many steps as the longest."""

    def body(state, inputs):
        i, noise = inputs
        row = table_row(table, i)
        return step(row, state, jnp.tanh(1.3 * state.x) + jnp.cos(row.timestep / 150), noise), None

    return jax.lax.scan(body, init_state(x), (jnp.arange(20), noises))[0].x


def test_mixed_tables_under_vmap_equal_each_alone(mixed):
    tables, x, noises = mixed
    together = jax.jit(jax.vmap(scanned, in_axes=(0, 0, 1)))(stack_tables(tables), x, noises)
    alone = jax.jit(scanned)
    for r, table in enumerate(tables):
        np.testing.assert_allclose(together[r], alone(table, x[r], noises[:, r]), atol=1e-6)  # fused differently


def test_steps_behind_the_last_leave_x_alone(mixed):
    _, x, noises = mixed
    table = make_table("unipc", 4, 3.0)
    longer = jax.jit(scanned)(table, x[0], noises[:, 0])
    state = init_state(jnp.asarray(x[0]))
    for i in range(4):
        row = table_row(table, i)
        state = advance(table, i, state, jnp.tanh(1.3 * state.x) + jnp.cos(row.timestep / 150), noises[i, 0])
    np.testing.assert_allclose(longer, state.x, atol=1e-6)  # fused differently


def test_requests_may_lie_on_different_devices(mixed):
    tables, x, noises = mixed
    mesh = Mesh(np.array(jax.devices()[:3]), ("dp",))
    requests, drawn = PartitionSpec("dp"), PartitionSpec(None, "dp")
    runs = jax.vmap(scanned, in_axes=(0, 0, 1))
    spread = jax.jit(jax.shard_map(runs, mesh=mesh, in_specs=(requests, requests, drawn), out_specs=requests))
    stacked = stack_tables(tables)
    np.testing.assert_allclose(
        spread(stacked, x, noises), jax.jit(runs)(stacked, x, noises), atol=1e-6
    )  # fused differently


def test_a_row_of_stacked_tables_is_that_of_the_table(mixed):
    tables, *_ = mixed
    got = jax.jit(table_row)(stack_tables(tables), 3, 5)
    np.testing.assert_allclose(got.predictor, tables[3].predictor[5], rtol=1e-7)
    np.testing.assert_allclose(got.sigma, tables[3].sigmas[5], rtol=1e-7)
    assert got.timestep == tables[3].timesteps[5] and got.corrector.dtype == jnp.float32


def test_the_state_stays_float32_for_a_bfloat16_velocity():
    x = jnp.ones(SHAPE, jnp.bfloat16)
    state = step(table_row(make_table("unipc", 3, 3.0), 0), init_state(x), x, 0.0)
    assert {a.dtype for a in state} == {jnp.dtype(jnp.float32)}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (partial(make_table, "unipc", 0, 3.0), "num_steps=0 is outside 1 to 128: nearest is 1"),
        (partial(make_table, "euler", 129, 3.0), "num_steps=129 is outside 1 to 128: nearest is 128"),
        (partial(make_table, "dpm++2m", None, 3.0), "num_steps=None is for timesteps: without any dpm"),
        (partial(make_table, "unipc", 4, 0.0), "shift=0.0 is outside 0.01 to 100.0: nearest is 0.01"),
        (partial(make_table, "unipc", 4, float("nan")), "shift=nan is outside"),
        (partial(make_table, "unipc", 4, 3.0, order=4), "order=4 is outside 1 to 3: nearest is 3"),
        (partial(make_table, "unipc", 4, 3.0, first_step=4), "first_step=4 is outside 0 to 3: nearest is 3"),
        (partial(make_table, "unipc", 4, 3.0, first_step=-1), "first_step=-1 is outside 0 to 3: nearest is 0"),
        (partial(make_table, "DPM++ 2M", 4, 3.0), r"renoise: nearest is dpm\+\+2m"),
        (partial(make_table, "uni_pc", 4, 3.0), "is not one of unipc, unipc1, unipc2, unipc3, euler, dpm"),
        (partial(make_table, "unipc", 2, 3.0, timesteps=[1000, 500]), "timesteps are for sampler='renoise' or 'euler'"),
        (partial(make_table, "euler", None, 3.0, timesteps=[]), "sampler='euler' takes 1 to 128 timesteps in"),
        (partial(make_table, "euler", 4, 3.0, sigma_schedule="lookup"), "timesteps are missing: sampler='euler' takes"),
        (partial(make_table, "unipc", 4, 3.0, sigma_schedule="lookup"), "for sampler='unipc', which takes diffusers"),
        (partial(make_table, "unipc", 4, 3.0, sigma_schedule="even"), "which takes diffusers or original$"),
        (partial(make_table, "dpm++2m", 4, 3.0, sigma_schedule="original"), "sampler='dpm.*which takes diffusers$"),
        (
            partial(make_table, "renoise", 10, 3.0, sigma_schedule="even"),
            "num_steps=10 is outside 2 to 9: nearest is 9",
        ),
        (partial(make_table, "euler", 4, 3.0, sigma_schedule="orignal"), "diffusers, original.*: nearest is original"),
        (
            partial(make_table, "euler", None, 3.0, timesteps=[900, 100], sigma_schedule="original"),
            "sigma_schedule='original' makes its own timesteps: with given ones it is diffusers or lookup",
        ),
        (
            partial(make_table, "euler", None, 5.0, timesteps=[2, 1], sigma_schedule="lookup"),
            "two have the same of the 1000 sigmas at shift 5",
        ),
        (partial(make_table, "renoise", 4, 3.0), "timesteps are missing: sampler='renoise' takes 2 to 9"),
        (partial(make_table, "renoise", 3, 3.0, timesteps=[1000, 500]), "num_steps=3 differs from the 2 timesteps"),
        (partial(make_table, "renoise", None, 3.0, timesteps=[1000]), "timesteps has 1 values"),
        (partial(make_table, "renoise", None, 3.0, timesteps=[*range(10, 0, -1)]), "timesteps has 10 values"),
        (partial(make_table, "renoise", None, 3.0, timesteps=[500, 500]), "strictly decreasing"),
        (partial(make_table, "renoise", None, 3.0, timesteps=[1001, 500]), r"in \(0, 1000\]"),
        (partial(make_table, "renoise", None, 3.0, timesteps=[500, 0]), r"in \(0, 1000\]"),
        (partial(first_used_step, 50, 0.0), "strength=0.0 is outside 0.02 to 1.0.*nearest is 0.02"),
        (partial(first_used_step, 50, 1.1), "strength=1.1 is outside 0.02 to 1.0.*nearest is 1.0"),
        (partial(first_used_step, 3, 0.3), "strength=0.3 is outside 0.3334 to 1.0.*at least one of 3 steps"),
        (partial(first_used_step, 0, 0.5), "num_steps=0 is outside 1 to 128"),
    ],
)
def test_bad_arguments_are_refused_with_what_is_allowed(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_the_named_smallest_strength_keeps_one_step():
    for n in range(1, 129):
        with pytest.raises(ValueError, match="keeps at least one") as error:
            first_used_step(n, 1e-9)
        assert first_used_step(n, float(str(error.value).split()[-1])) == n - 1


def test_strength_counts_steps_as_diffusers_does():
    assert [first_used_step(50, s) for s in (1.0, 0.8, 0.5, 0.02)] == [0, 10, 25, 49]
    assert first_used_step(10, 0.29) == 8  # int(2.9) steps remain
