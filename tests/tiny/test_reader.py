"""The reader, on clips whose truth is known: as rendered, as a coder leaves them, and with nothing to be read."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxwan.tiny import attributes as att
from jaxwan.tiny import clips
from jaxwan.tiny.reader import Reading, read
from jaxwan.tiny.scoring import check_reader, rendered_truth


def blurred(frames, sigma=1.0):
    weights = np.exp(-0.5 * (np.arange(-3, 4) / sigma) ** 2)
    weights = (weights / weights.sum()).astype(np.float32)
    for axis in (1, 2):
        padded = np.pad(frames, [(3, 3) if i == axis else (0, 0) for i in range(4)], mode="edge")
        size = frames.shape[axis]
        frames = sum(w * np.take(padded, range(i, i + size), axis) for i, w in enumerate(weights))
    return frames


def coded(frames):
    """Soft edges and errors of 30 dB: worse than what the bundled VAE leaves."""
    noise = np.random.default_rng(0).normal(0, 10**-1.5, frames.shape).astype(np.float32)
    return np.clip(blurred(frames) + noise, 0, 1)


def test_rendered_clips_are_read():
    shares = check_reader(100, seed=1)
    assert set(shares) == set(att.READ) and min(shares.values()) >= 0.99


def test_blurred_and_noisy_clips_are_read():
    assert min(check_reader(60, least=0.98, through=coded, seed=2).values()) >= 0.98


def test_a_reader_that_cannot_read_is_refused():
    with pytest.raises(ValueError, match="nothing is scored"):
        check_reader(8, through=lambda frames: np.zeros_like(frames))


@pytest.mark.parametrize("background", att.BACKGROUNDS)
def test_an_empty_clip_has_a_background_and_nothing_else(background):
    frames = np.ones((5, 64, 96, 3), np.float32) * att.BACKGROUNDS[background][0]
    assert read(frames.astype(np.float32)) == Reading(None, None, None, background)


def test_noise_has_no_object():
    noise = np.random.default_rng(0).random((17, 64, 96, 3), np.float32)
    assert read(noise)[:3] == (None, None, None)


def moving(travel=(0.0, 0.0), widths=(24.0, 24.0), frames=17):
    """A red circle on black that does something the grammar may not know."""
    body = clips.Body(
        jnp.asarray(0), jnp.array([0.9, 0.1, 0.1]), jnp.array(widths), jnp.array([48.0, 32.0]), jnp.array(travel)
    )
    cover = np.asarray(jax.vmap(lambda t: clips.coverage(body, t))(jnp.linspace(0, 1, frames)))
    return cover[..., None] * np.array([0.9, 0.1, 0.1], np.float32)


@pytest.mark.parametrize(
    ("travel", "widths", "motion"),
    [
        ((30.0, 0.0), (24.0, 24.0), "right"),
        ((-30.0, 18.0), (24.0, 24.0), "down-left"),
        ((0.0, 0.0), (18.0, 29.0), "growing"),
        ((5.0, -4.0), (24.0, 22.0), "still"),
        ((30.0, 18.0), (24.0, 24.0), None),  # the diagonals that are no motion of the grammar
        ((-30.0, -18.0), (24.0, 24.0), None),
        ((30.0, 0.0), (18.0, 29.0), None),  # two motions at once
    ],
)
def test_motion_is_one_of_the_grammars_or_none(travel, widths, motion):
    assert read(moving(travel, widths)) == Reading("red", "circle", motion, "black")


def test_an_object_that_jumps_or_is_gone_half_the_time_has_no_motion():
    steady = moving((30.0, 0.0))
    assert read(steady[[0, 16] * 8]).motion is None
    assert read(np.concatenate([steady[:8], np.zeros_like(steady[8:])])).motion is None


def test_other_numbers_of_frames_and_sizes_are_read():
    assert read(moving((30.0, 0.0), frames=5)).motion == "right"
    padded = np.pad(moving((30.0, 0.0)), ((0, 0), (16, 16), (0, 0), (0, 0)))
    assert read(padded) == Reading("red", "circle", "right", "black")


def test_a_shape_that_is_none_of_the_four_is_unreadable():
    frames = np.zeros((3, 64, 96, 3), np.float32)
    frames[:, 30:34, 30:66, 0] = 0.9  # a bar
    assert read(frames)[:3] == ("red", None, "still")


def test_the_largest_object_is_read_and_specks_are_not():
    row, frames = next(rendered_truth(1, seed=4))
    specked = frames.copy()
    specked[:, 3:6, 3:6] = 1 - specked[:, 3:6, 3:6]
    assert read(specked) == read(frames) == Reading(**att.names(row))
