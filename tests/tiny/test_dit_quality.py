"""How a denoiser in training is judged."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image
from small_tiny import VAE_CONFIG, draw_parameters, make_latents, small_models

from jaxwan.models.vae import VAE
from jaxwan.tiny import dit_quality
from jaxwan.tiny.attributes import READ, Attributes, Thing, combinations, row_of
from jaxwan.tiny.captions import ROWS, tokenize_captions
from jaxwan.tiny.dit_quality import BINS, Judge
from jaxwan.tiny.grammar import caption


@pytest.fixture(scope="module", autouse=True)
def shrunk():
    with small_models():
        yield


@pytest.fixture(scope="module")
def judge(tokenizer, tmp_path_factory):
    vae = nnx.eval_shape(lambda: VAE(VAE_CONFIG, rngs=nnx.Rngs(0)))
    folder = tmp_path_factory.mktemp("tiny") / "samples"
    return Judge(make_latents(80), tokenizer, draw_parameters("text_encoder"), vae, folder, count=64)


def shown(row):
    first = Thing(colour=row[0], shape=row[1], motion=row[2], size=1, speed=1)
    return Attributes(first, first, two=False, background=row[3], graded=False)


def test_a_swapped_caption_differs_in_one_attribute_that_training_has_seen():
    seen = {tuple(row) for row in combinations().tolist()}
    for seed, row in enumerate(combinations()):
        for column, name in enumerate(READ):
            swapped = row_of(dit_quality._swapped(shown(row), name, seed))
            assert (swapped != row).tolist() == [i == column for i in range(4)]
            assert tuple(swapped.tolist()) in seen


def test_captions_that_are_judged_by_fit(tokenizer):
    texts = [caption(shown(row), seed, plain=True) for seed, row in enumerate(combinations())]
    assert tokenize_captions(tokenizer, texts).mask.sum(1).max() < ROWS


def test_clips_with_two_objects_are_left_out(judge):
    """A caption with another first object would say as much of the second."""
    latents = np.float32(make_latents(80).latents)
    alone = [i for i in range(80) if i % 8 != 7][:64]
    assert np.array_equal(np.asarray(judge._x0), latents[alone])


def test_gaps_are_what_the_loss_grows_by_in_per_cent(judge, monkeypatch):
    grown = {id(judge._captions[name]): share for name, share in zip(READ, (1.5, 1.0, 0.9, 1.234), strict=True)}
    monkeypatch.setattr(
        dit_quality, "_loss", lambda params, encoder, x0, level, given: level * grown.get(id(given), 1.0)
    )
    gaps = judge.gaps({})
    assert gaps == {f"{name}@{level}": gap for level in (0.8, 0.9)
                    for name, gap in zip(READ, (50.0, 0.0, -10.0, 23.4), strict=True)}  # fmt: skip
    assert judge.losses({}) == {level: level for level in BINS}


def test_samples_are_scored_by_the_reader_and_shown(judge, monkeypatch):
    """Every other clip is read as it should be, the rest only in its background."""
    scored = []

    def mark(case, reading):
        scored.append(case)
        return dict.fromkeys(READ, len(scored) % 2 == 0) | {"background": reading == "reading"}

    monkeypatch.setattr(dit_quality, "_sample", lambda params, encoder, noise, captions: noise)
    monkeypatch.setattr(dit_quality, "read", lambda frames: "reading")
    monkeypatch.setattr(dit_quality, "marks_of", mark)
    monkeypatch.setattr(judge._coder, "decode", lambda latents: np.zeros((1, 5, 8, 12, 3), np.float32))
    shares = judge.samples({}, "base-000100")
    assert shares == {"read colour": 0.5, "read shape": 0.5, "read motion": 0.5, "read background": 1.0}
    assert all(a is b for a, b in zip(scored, judge._cases, strict=True))
    assert Image.open(judge._folder / "base-000100.png").size == (2 * 5 * 12, len(scored) // 2 * 8)


@pytest.mark.slow
def test_loss_and_samples_of_a_random_model(judge):
    """A velocity of order 1 that knows nothing has a loss of noise and clip together, and more; numbers are finite."""
    params = draw_parameters("transformer")
    losses = judge.losses(params, (0.5, 0.9))
    assert all(1.5 < loss < 10 for loss in losses.values())
    captions = dit_quality._slice(judge._captions[""], 0)
    noise = jax.random.normal(jax.random.key(7), (16, *judge._x0.shape[1:]))
    made = dit_quality._sample(params, judge._encoder, noise, captions)
    assert made.shape == noise.shape and jnp.isfinite(made).all() and not jnp.allclose(made, noise)
    # guidance is against the caption that inference takes for none
    (empty,) = judge._tokenize([""]).tokens
    assert empty.tolist() == [dit_quality.END] + [0] * (ROWS - 1)
