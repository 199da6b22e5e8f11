"""A video's steps as rows of `Controls`, and its noise."""

from collections.abc import Callable
from functools import partial

import jax
import numpy as np
from jaxtyping import Array, UInt32

from jaxwan.pipelines.dit import RENOISINGS, Controls
from jaxwan.pipelines.request import Request
from jaxwan.schedulers.sigmas import NUM_TRAIN_TIMESTEPS
from jaxwan.schedulers.table import Table

INITIAL = 0  # noise streams of a video: where it starts, then one a step
RENOISE = 1


def make_controls(request: Request, has_first: np.ndarray | None, latent_frames: int) -> Controls:
    """The steps of a request, in float32. has_first: whether its first frame is given, in models where one may be."""
    table = request.table
    expert = choose_expert(table.timesteps, request.boundary_ratio)
    timesteps = frame_timesteps(table.timesteps, has_first, latent_frames)
    guidance = np.where(expert == 0, request.guidance_scale, request.guidance_scale_2)
    return to_float32(Controls(table, timesteps, expert, guidance, np.array(request.guided)))


def choose_expert(timesteps: np.ndarray, boundary_ratio: float | None) -> np.ndarray:
    """0 (high noise) at or above the boundary, 1 (low noise) below it; without a boundary always 0."""
    if boundary_ratio is None:
        return np.zeros(timesteps.shape, np.int32)
    return (timesteps < boundary_ratio * NUM_TRAIN_TIMESTEPS).astype(np.int32)


def frame_timesteps(timesteps: np.ndarray, has_first: np.ndarray | None, latent_frames: int) -> np.ndarray:
    """Timesteps `[N]` as the model takes them, `[N, Q]`: of TI2V one a latent frame, 0 for a given first one."""
    if has_first is None:
        return timesteps[:, None]
    per_frame = np.repeat(timesteps[:, None], latent_frames, axis=1)
    if has_first:
        per_frame[:, 0] = 0
    return per_frame


def to_float32(controls: Controls) -> Controls:
    """Controls as the devices hold them: tables are made in float64."""
    return jax.tree.map(lambda x: x.astype(np.float32) if x.dtype == np.float64 else x, controls)


def initial_noise(seed: int, index: int, shape: tuple[int, ...]) -> np.ndarray:
    """Unit noise of video `index` of a prompt, time first: a function of (seed, index) alone."""
    return np.asarray(_normal(_words(seed), np.uint32(index), np.uint32(INITIAL), shape))


def renoise_noise(table: Table, seed: int | None, index: int, shape: tuple[int, ...]) -> np.ndarray | None:
    """The noise of every step that adds some, `[8, …]`: a function of (seed, index, step); None where none does."""
    if not table.renoises:
        return None
    assert seed is not None
    noise = np.zeros((RENOISINGS, *shape), np.float32)
    for step in np.flatnonzero(table.predictor[:, 4]):
        noise[step] = _normal(_words(seed), np.uint32(index), np.uint32(RENOISE + step), shape)
    return noise


def noise_program(shape: tuple[int, ...]) -> tuple[str, Callable, tuple]:
    """(name, jitted function, arguments) of what draws noise of a shape."""
    return "noise", _normal, (_words(0), np.uint32(0), np.uint32(INITIAL), shape)


def _words(seed: int) -> UInt32[np.ndarray, "2"]:
    """A 64-bit seed as threefry's key."""
    return np.array([seed >> 32, seed & 0xFFFFFFFF], np.uint32)


@partial(jax.jit, static_argnums=3)
def _normal(words: Array, index: Array, stream: Array, shape: tuple[int, ...]) -> Array:
    """Drawn in a program of its own: fused into another one, the last bit of a few values would differ."""
    key = jax.random.fold_in(jax.random.fold_in(jax.random.wrap_key_data(words, impl="threefry2x32"), index), stream)
    return jax.random.normal(key, shape, jax.numpy.float32)
