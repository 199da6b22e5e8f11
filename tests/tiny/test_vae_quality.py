"""How the quality of a VAE is measured, and the codes beside it, on made-up clips."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxwan.tiny.vae_quality import baselines, judged_clips, mean_psnr

pytestmark = pytest.mark.slow  # trains, if little


def test_quality_is_the_mean_over_clips_in_decibels():
    clips = jnp.zeros((5, 2, 4, 4, 3))
    errors = jnp.array([0.1, 0.01, 0.1, 0.01, 0.1])  # 20 dB and 40 dB
    found = mean_psnr(lambda part: part + errors[: len(part), None, None, None, None], clips, batch=2)
    assert found == pytest.approx((20 + 40 + 20 + 40 + 20) / 5, abs=1e-3)


def blocks(seed, count=6, components=16):
    """Clips of 9 frames whose blocks are mixed from `components` blocks, the same for all seeds."""
    bases = [np.random.default_rng(time).normal(size=(components, time, 8, 8, 3)) for time in (1, 4)]
    rng, parts = np.random.default_rng(seed), []
    for basis, times in zip(bases, (1, 2), strict=True):
        weights = rng.uniform(size=(count, times, 2, 3, components))
        made = np.einsum("btyxk,kfhwc->btfyhxwc", weights, basis)
        parts.append(made.reshape(count, -1, 16, 24, 3))
    return jnp.asarray(0.5 + 0.02 * np.concatenate(parts, axis=1), jnp.float32)


def test_principal_components_keep_what_has_no_more_of_them():
    found = baselines(blocks(10), blocks(11, count=40))
    assert found["16 principal components"] > 80  # dB: float32's
    assert baselines(blocks(10), blocks(11, count=40), components=12)["12 principal components"] < 50


def test_the_constant_background_is_each_clips_median():
    clips = jnp.full((2, 5, 8, 8, 3), 0.25).at[:, :, :2, :4].set(0.75).at[1].add(0.1)  # an eighth is 0.5 away
    found = baselines(clips, jnp.zeros((1, 5, 8, 8, 3)))["constant background"]
    assert found == pytest.approx(-10 * np.log10(0.25 / 8), abs=1e-3)


def test_the_first_judged_clips_are_the_same_for_every_count():
    first, more = judged_clips(1), judged_clips(2)
    assert jnp.array_equal(first[0], more[0]) and not jnp.allclose(more[0], more[1])
