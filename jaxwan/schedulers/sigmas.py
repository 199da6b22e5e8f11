"""Sigma schedules: functions of a step count and a shift, or of timesteps.

Each returns `(sigmas, timesteps)`: n+1 noise levels falling to a final 0, and the n values the model is shown, both as
float64 arrays. Sigmas hold float32 values, because Diffusers rounds them before it derives any coefficient and one
float32 step near sigma = 1 changes 1 - sigma by 6 %.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

Schedule = tuple[Float[np.ndarray, " n1"], Float[np.ndarray, " n"]]

NUM_TRAIN_TIMESTEPS = 1000


def unipc(num_steps: int, shift: float | int) -> Schedule:
    """Evenly spaced from 1 towards 1/1000, then shifted; timesteps truncated to integers.

    `unipc(4, 3.0)`: timesteps 999 900 750 500. The first sigma stays 1e-6 below 1, where lambda would be infinite.
    Source: diffusers scheduling_unipc_multistep.py:set_timesteps (use_flow_sigmas).
    """
    sigmas = _shift(np.linspace(1, 1 / NUM_TRAIN_TIMESTEPS, num_steps + 1)[:-1], shift)
    if abs(sigmas[0] - 1) < 1e-6:
        sigmas[0] -= 1e-6
    return _end_at_zero(sigmas), np.trunc(sigmas * NUM_TRAIN_TIMESTEPS)


def dpmpp(num_steps: int, shift: float | int) -> Schedule:
    """Evenly spaced from 0.999 towards 0, then shifted; timesteps truncated to integers.

    Source: diffusers scheduling_dpmsolver_multistep.py:set_timesteps (use_flow_sigmas).
    """
    alphas = np.linspace(1, 1 / NUM_TRAIN_TIMESTEPS, num_steps + 1)
    sigmas = _shift(1 - alphas, shift)[:0:-1].copy()
    return _end_at_zero(sigmas), np.trunc(sigmas * NUM_TRAIN_TIMESTEPS)


def euler(num_steps: int, shift: float | int) -> Schedule:
    """Evenly spaced between the two ends of the shifted range, then shifted once more; timesteps are float32.

    The low end is thus shifted twice: at shift 5 the last sigma is 0.0244, not 0.005. `euler(4, 5.0)`: timesteps
    1000, 909.70715, 717.31744, 24.414066.
    Source: diffusers scheduling_flow_match_euler_discrete.py:set_timesteps.
    """
    high, low = _shift(np.array([NUM_TRAIN_TIMESTEPS, 1], np.float32) / NUM_TRAIN_TIMESTEPS, shift).astype(float)
    evenly = np.linspace(high * NUM_TRAIN_TIMESTEPS, low * NUM_TRAIN_TIMESTEPS, num_steps) / NUM_TRAIN_TIMESTEPS
    sigmas = _shift(evenly, shift)
    return _end_at_zero(sigmas), _timesteps(sigmas)


def original(num_steps: int, shift: float | int, *, integers: bool = True) -> Schedule:
    """As the original repository spaces them: evenly from 0.999 to 0, then shifted.

    `integers`: timesteps truncated, as its UniPC shows them; else 1000 sigma in float32, as Euler's are.
    Source: Wan2.2 wan/utils/fm_solvers_unipc.py:set_timesteps, made with shift 1 and given the shift there.
    """
    highest = float(np.float32(1 - 1 / NUM_TRAIN_TIMESTEPS))  # held in float32 there
    sigmas = _shift(np.linspace(highest, 0, num_steps + 1)[:-1], shift)
    shown = np.trunc(sigmas * NUM_TRAIN_TIMESTEPS) if integers else _timesteps(sigmas)
    return _end_at_zero(sigmas), shown


def even(num_steps: int, shift: float | int) -> Schedule:
    """Evenly spaced from 1 to 0, then shifted; timesteps are float32. Step-distilled models were trained on these.

    `even(4, 5.0)`: sigmas 1, 0.9375, 0.8333, 0.625. Not for UniPC, whose lambda is infinite at sigma 1.
    Source: Self-Forcing's warp_denoising_step of 1000, 750, 500, 250; LightX2V's step-distilled scheduler.
    """
    sigmas = _shift(np.linspace(1, 0, num_steps + 1)[:-1], shift)
    return _end_at_zero(sigmas), _timesteps(sigmas)


def given(timesteps: Sequence[float | int]) -> Schedule:
    """The given timesteps as they are, sigma = t / 1000 without any shift.

    Source: diffusers scheduling_flow_match_lcm.py:set_timesteps with shift 1.
    """
    shown = np.asarray(timesteps, np.float32)
    return _end_at_zero(shown / np.float32(NUM_TRAIN_TIMESTEPS)), shown.astype(float)


def looked_up(timesteps: Sequence[float | int], shift: float | int) -> Schedule:
    """The given timesteps as they are, each with the sigma of the nearest of 1000 rows, evenly spaced and then shifted.

    `looked_up([1000, 757, 522], 8.0)`: sigmas 1, 0.75676, 0.52174. The last row is 1/1000 shifted, not 0.
    Source: CausVid, Self-Forcing and FastVideo, whose DMD sampling looks sigmas up in the table that they train with.
    """
    rows = _shift(np.arange(NUM_TRAIN_TIMESTEPS, 0, -1) / NUM_TRAIN_TIMESTEPS, shift)
    shown = np.asarray(timesteps, np.float32).astype(float)
    nearest = np.abs(rows * NUM_TRAIN_TIMESTEPS - shown[:, None]).argmin(axis=1)
    if len(set(nearest)) < len(nearest):
        raise ValueError(f"timesteps={list(timesteps)}: two have the same of the {len(rows)} sigmas at shift {shift:g}")
    return _end_at_zero(rows[nearest]), shown


def _shift(sigmas: np.ndarray, shift: float | int) -> np.ndarray:
    """Move the schedule towards noise (shift > 1), in the precision of `sigmas`."""
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def _timesteps(sigmas: np.ndarray) -> Float[np.ndarray, " n"]:
    """1000 sigma, computed in float32."""
    return (sigmas.astype(np.float32) * np.float32(NUM_TRAIN_TIMESTEPS)).astype(float)


def _end_at_zero(sigmas: np.ndarray) -> Float[np.ndarray, " n1"]:
    return np.append(sigmas, 0).astype(np.float32).astype(float)
