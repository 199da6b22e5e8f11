"""Samplers as tables: weights made once in float64 on the host, applied by one short `step` in float32.

All tables have the shape of MAX_STEPS steps, so requests with different solvers, step counts and shifts stack into one
array and share one compiled program.
"""

import difflib
import math
from collections.abc import Sequence
from functools import partial, reduce
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from . import sigmas as schedules
from . import solvers

MAX_STEPS = 128
SHIFT_RANGE = 0.01, 100.0  # beyond it neighbouring sigmas of long schedules begin to coincide in float32

_SOLVERS = {  # `unipc` is one of the first three
    "unipc1": partial(solvers.unipc, order=1),
    "unipc2": partial(solvers.unipc, order=2),
    "unipc3": partial(solvers.unipc, order=3),
    "euler": solvers.euler,
    "dpm++2m": solvers.dpmpp_2m,
    "renoise": solvers.renoise,
}
SAMPLERS = ("unipc", *_SOLVERS)
_UNIPC = ("unipc1", "unipc2", "unipc3")
_SPACED = {  # schedules of a step count and a shift: by name, those of each sampler that has one
    "diffusers": {**dict.fromkeys(_UNIPC, schedules.unipc), "euler": schedules.euler, "dpm++2m": schedules.dpmpp},
    "original": {
        **dict.fromkeys(_UNIPC, schedules.original), "euler": partial(schedules.original, integers=False)
    },
    "even": {"euler": schedules.even, "renoise": schedules.even},
}  # fmt: skip
_GIVEN = {  # of timesteps and a shift
    "diffusers": lambda timesteps, shift: schedules.given(timesteps),
    "lookup": schedules.looked_up,
}
SIGMA_SCHEDULES = tuple(dict.fromkeys((*_SPACED, *_GIVEN)))
_GIVEN_COUNTS = {"euler": (1, MAX_STEPS), "renoise": (2, 9)}  # samplers that take timesteps: how many


class Table(NamedTuple):
    """A sampler for one request, N = MAX_STEPS rows of which the first `num_steps` are real; the rest keep x.

    Stacked tables (`stack_tables`) have leading axes in every field.
    """

    sigmas: Float[np.ndarray, "*r n1"]  # noise levels, N + 1 of them; sigmas[num_steps] is 0
    timesteps: Float[np.ndarray, "*r n"]  # what the model is shown: integers except for Euler and given ones
    corrector: Float[np.ndarray, "*r n 6"]  # weighs (x, last, m, m1, m2, m3)
    predictor: Float[np.ndarray, "*r n 5"]  # weighs (corrected, m, m1, m2, noise)
    num_steps: Int[np.ndarray, "*r"]

    @property
    def renoises(self) -> bool:
        """Whether any step adds fresh noise."""
        return bool(self.predictor[..., 4].any())


class Row(NamedTuple):
    """One step of a table, float32."""

    sigma: Float[Array, ""]
    timestep: Float[Array, ""]
    corrector: Float[Array, " 6"]
    predictor: Float[Array, " 5"]


class SamplerState(NamedTuple):
    """What a sampler remembers between steps, float32, all of the latents' shape.

    x is the input of the next velocity; `last` the x of the step before after its correction, from which the next
    corrector starts again (Diffusers' last_sample); m1, m2, m3 the latest x0 estimates, newest first. Estimates are
    made from the uncorrected x, which the model saw.
    """

    x: Float[Array, "..."]
    last: Float[Array, "..."]
    m1: Float[Array, "..."]
    m2: Float[Array, "..."]
    m3: Float[Array, "..."]


def init_state(x: Float[Array, "..."]) -> SamplerState:
    """The state before the first step: no history, which the first rows give no weight."""
    x = x.astype(jnp.float32)
    zeros = jnp.zeros_like(x)
    return SamplerState(x, zeros, zeros, zeros, zeros)


def step(
    row: Row, state: SamplerState, velocity: Float[Array, "..."], noise: Float[Array, "..."] | float
) -> SamplerState:
    """The state after one step of any sampler; `noise` (or 0.0) matters to `renoise` only.

    The weights are scalars: for several requests with rows of their own, `jax.vmap`.
    """
    x, last, m1, m2, m3 = state
    m = x - row.sigma * velocity.astype(jnp.float32)
    corrected = _weigh(row.corrector, (x, last, m, m1, m2, m3))
    x = _weigh(row.predictor, (corrected, m, m1, m2, noise))
    return SamplerState(x, corrected, m, m1, m2)


def table_row(table: Table, *index: int | Int[Array, ""]) -> Row:
    """Row `index` of a table, `(request, step)` of stacked ones; indices and table may be traced."""
    sigma, timestep, corrector, predictor = (jnp.asarray(a, jnp.float32)[index] for a in table[:4])
    return Row(sigma, timestep, corrector, predictor)


def stack_tables(tables: Sequence[Table]) -> Table:
    """One table with a leading request axis."""
    return Table(*(np.stack(column) for column in zip(*tables, strict=True)))


def add_noise(
    x0: Float[Array | np.ndarray, "..."], noise: Float[Array | np.ndarray, "..."], sigma: Float[Array, ""] | float
) -> Float[Array | np.ndarray, "..."]:
    """Clean latents brought to noise level `sigma`, in float32: where video to video starts, at the first used sigma.

    Of host arrays, and a plain number, a host array.

    Source: diffusers scheduling_unipc_multistep.py:add_noise.
    """
    return (1 - sigma) * x0.astype(jnp.float32) + sigma * noise.astype(jnp.float32)


def _weigh(weights: Float[Array, " k"], arrays: tuple) -> Float[Array, "..."]:
    return reduce(jnp.add, (weights[k] * a for k, a in enumerate(arrays)))


def make_table(
    sampler: str,
    num_steps: int | None,
    shift: float | int,
    *,
    order: int = 2,
    timesteps: Sequence[float | int] | None = None,
    sigma_schedule: str = "diffusers",
    first_step: int = 0,
) -> Table:
    """The table of a sampler, one of SAMPLERS.

    `order` is for `unipc` alone (`unipc2` says it in its name). `timesteps` in (0, 1000], for `euler` and `renoise`,
    are shown as given, and num_steps may then be None. `sigma_schedule`, one of SIGMA_SCHEDULES, says where sigmas lie:

    - "diffusers": as that sampler spaces them there; of `timesteps` at t / 1000, and shift does not enter;
    - "original" (`unipc`, `euler`): as in the original repository;
    - "even" (`euler`, `renoise`): evenly from 1 to 0, then shifted;
    - "lookup": of `timesteps`, in the nearest of 1000 rows that are shifted.

    `first_step` skips that many steps of the schedule, for video to video; the solver warms up from there, and row 0 is
    the first step used.
    Raises ValueError when a value is not allowed, naming the nearest one that is.
    """
    check_choice("sampler", sampler, SAMPLERS)
    check_choice("sigma_schedule", sigma_schedule, SIGMA_SCHEDULES)
    check_range("order", order, 1, solvers.MAX_ORDER)
    check_range("shift", shift, *SHIFT_RANGE)
    name = f"unipc{order}" if sampler == "unipc" else sampler
    if timesteps is None and sigma_schedule in _SPACED and name in _SPACED[sigma_schedule]:
        sigmas, shown = _SPACED[sigma_schedule][name](_checked_steps(name, num_steps), shift)
    elif sampler in _GIVEN_COUNTS and sigma_schedule in _GIVEN:
        sigmas, shown = _GIVEN[sigma_schedule](_checked_timesteps(name, timesteps, num_steps), shift)
    else:
        raise ValueError(_no_schedule(sampler, name, sigma_schedule, timesteps))
    check_range("first_step", first_step, 0, len(shown) - 1)
    sigmas, shown = sigmas[first_step:], shown[first_step:]
    return _padded(sigmas, shown, *_SOLVERS[name](sigmas))


def spaces(sigma_schedule: str) -> bool:
    """Whether a schedule is one of step counts alone, which timesteps given by a call replace."""
    return sigma_schedule not in _GIVEN


def first_used_step(num_steps: int, strength: float | int) -> int:
    """The step video to video begins with: `first_used_step(50, 0.8)` is 10, the last 40 steps remain.

    Raises ValueError when strength is outside (0, 1] or leaves no step.
    Source: diffusers pipeline_wan_video2video.py:get_timesteps.
    """
    check_range("num_steps", num_steps, 1, MAX_STEPS)
    smallest = math.ceil(1e4 / num_steps) / 1e4
    remaining = int(num_steps * strength) if 0 < strength <= 1 else 0
    if remaining < 1:
        nearest = 1.0 if strength > 1 else smallest
        raise ValueError(
            f"strength={strength} is outside {smallest} to 1.0, which keeps at least one of {num_steps} steps: "
            f"nearest is {nearest}"
        )
    return num_steps - remaining


def check_range(name: str, value: float | int, low: float | int, high: float | int) -> None:
    """Raises ValueError, with the nearest allowed value, for a number outside `low` to `high`, or NaN."""
    if not low <= value <= high:  # also true of NaN
        raise ValueError(f"{name}={value} is outside {low} to {high}: nearest is {high if value > high else low}")


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Raises ValueError, with the nearest choice, for another one."""
    if value not in choices:
        nearest = difflib.get_close_matches(value.lower(), choices, n=1, cutoff=0)[0]
        raise ValueError(f"{name}={value!r} is not one of {', '.join(choices)}: nearest is {nearest}")


def _no_schedule(sampler: str, name: str, sigma_schedule: str, timesteps: Sequence | None) -> str:
    """Why a sampler, `name` with its order, has no such sigmas."""
    if timesteps is not None and sampler not in _GIVEN_COUNTS:
        return f"timesteps are for sampler='renoise' or 'euler' only: {sampler} makes its own"
    if timesteps is not None:
        return f"sigma_schedule={sigma_schedule!r} makes its own timesteps: with given ones it is {' or '.join(_GIVEN)}"
    others = [other for other, samplers in _SPACED.items() if name in samplers]
    others += ["lookup (with timesteps)"] * (sampler in _GIVEN_COUNTS)
    return f"sigma_schedule={sigma_schedule!r} is not for sampler={sampler!r}, which takes {' or '.join(others)}"


def _checked_steps(sampler: str, num_steps: int | None) -> int:
    if num_steps is None:
        raise ValueError(f"num_steps=None is for timesteps: without any {sampler} takes 1 to {MAX_STEPS}")
    low, high = _GIVEN_COUNTS[sampler] if sampler == "renoise" else (1, MAX_STEPS)
    check_range("num_steps", num_steps, low, high)
    return num_steps


def _padded(sigmas: np.ndarray, shown: np.ndarray, corrector: np.ndarray, predictor: np.ndarray) -> Table:
    """Tables of MAX_STEPS rows: behind the real ones sigma and timestep are 0 and the weights keep x."""
    idle = MAX_STEPS - len(shown)
    keep_x, keep_corrected = np.tile(np.eye(6)[0], (idle, 1)), np.tile(np.eye(5)[0], (idle, 1))
    return Table(
        sigmas=np.pad(sigmas, (0, idle)),
        timesteps=np.pad(shown, (0, idle)),
        corrector=np.concatenate([corrector, keep_x]),
        predictor=np.concatenate([predictor, keep_corrected]),
        num_steps=np.array(len(shown), np.int32),
    )


def _checked_timesteps(
    sampler: str, timesteps: Sequence[float | int] | None, num_steps: int | None
) -> Sequence[float | int]:
    low, high = _GIVEN_COUNTS[sampler]
    rule = (
        f"sampler={sampler!r} takes {low} to {high} timesteps in (0, 1000], strictly decreasing, "
        "such as 1000 750 500 250"
    )
    if timesteps is None:
        raise ValueError(f"timesteps are missing: {rule}")
    if not low <= len(timesteps) <= high:
        raise ValueError(f"timesteps has {len(timesteps)} values: {rule}")
    outside = [t for t in timesteps if not 0 < t <= schedules.NUM_TRAIN_TIMESTEPS]
    if outside or not all(a > b for a, b in zip(timesteps[:-1], timesteps[1:], strict=True)):
        raise ValueError(f"timesteps={list(timesteps)}: {rule}")
    if num_steps is not None and num_steps != len(timesteps):
        raise ValueError(f"num_steps={num_steps} differs from the {len(timesteps)} timesteps given: leave it out")
    return timesteps
