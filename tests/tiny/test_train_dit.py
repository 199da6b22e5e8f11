"""What the denoisers are trained on and how, on smaller ones: data, noise levels, loss, start, rates."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import exact_attention, relative_error
from small_tiny import DIT, TEXT, draw_parameters, make_latents, small_models

from jaxwan.models import transformer
from jaxwan.models.text_encoder import UMT5Encoder
from jaxwan.models.transformer import Context, WanTransformer
from jaxwan.pipelines.prompt import encode_prompts
from jaxwan.tiny import captions as captions_module
from jaxwan.tiny import train_dit
from jaxwan.tiny.attributes import COLOURS
from jaxwan.tiny.captions import ROWS, tokenize_captions
from jaxwan.tiny.grammar import COLOUR_WORDS
from jaxwan.tiny.train_dit import (
    BASE,
    EXPERT_PLANS,
    FLOW_SHIFT,
    HIGH,
    LOW,
    NO_CAPTION,
    Data,
    draw_sigmas,
    embed_captions,
    flow_loss,
    initial_parameters,
    make_optimizer,
    make_phases,
    predict,
)
from jaxwan.tiny.training import module_with


@pytest.fixture(scope="module", autouse=True)
def shrunk():
    with small_models():
        yield


@pytest.fixture(scope="module")
def encoded():
    return make_latents(128)


# Data


@pytest.fixture(scope="module")
def data(encoded, tokenizer):
    return Data(encoded, tokenizer)


def drawn(data, step, count=16):
    latents, rows, captions = data.draw(step, count)
    return np.asarray(latents), rows, *captions


def test_what_a_step_sees_follows_from_its_number(data, encoded, tokenizer):
    again = Data(encoded, tokenizer)
    for a, b in zip(drawn(data, 7), drawn(again, 7), strict=True):
        assert np.array_equal(a, b)
    for other in (drawn(data, 8), drawn(Data(encoded, tokenizer, seed=1), 7)):
        assert not np.array_equal(drawn(data, 7)[1], other[1])


def test_clips_are_worded_anew_at_every_use_and_some_captions_are_empty(data, tokenizer):
    (empty,) = tokenize_captions(tokenizer, [""]).tokens
    steps = [drawn(data, step, 64) for step in range(12)]
    rows, tokens = (np.concatenate([s[i] for s in steps]) for i in (1, 2))
    is_empty = (tokens == empty).all(1)
    # four standard deviations of 768 draws
    assert abs(is_empty.mean() - NO_CAPTION) < 4 * (NO_CAPTION * (1 - NO_CAPTION) / len(rows)) ** 0.5
    assert np.bincount(rows, minlength=128).max() <= 12  # none twice in a step
    assert len(np.unique(tokens[~is_empty], axis=0)) > 0.9 * (~is_empty).sum()


def test_captions_are_those_of_the_rows(data, encoded, tokenizer):
    _, rows, tokens, mask = drawn(data, 3, 64)
    assert mask[:, 0].all() and (np.diff(mask.astype(int), axis=1) <= 0).all()
    for row, ids, real in zip(rows, tokens, mask, strict=True):
        words = COLOUR_WORDS[list(COLOURS)[encoded.attributes.first.colour[row]]]
        text = tokenizer.backend.decode(ids[real].tolist())
        assert text == "" or any(word in text for word in words), text


def test_captions_leave_a_row_behind_them(data, encoded, tokenizer, monkeypatch):
    assert drawn(data, 0, 128)[3].sum(1).max() < ROWS
    monkeypatch.setattr(captions_module, "ROWS", 16)  # so few that many captions are too long, and are drawn anew
    alone = encoded.attributes._replace(two=np.zeros(128, bool))
    lengths = drawn(Data(encoded._replace(attributes=alone), tokenizer), 0, 128)[3].sum(1)
    assert lengths.max() == 15 and (lengths > 1).mean() > 0.8


# Noise levels and loss


@pytest.mark.parametrize("among", [(0.0, 1.0), HIGH, LOW], ids=["base", "high", "low"])
def test_noise_levels_are_spread_evenly_over_the_steps_of_the_sampler(among):
    """u of sigma = s u / (1 + (s - 1) u) lies once in each of `count` equal parts of its range."""
    draws = jax.jit(jax.vmap(lambda key: draw_sigmas(key, 16, among)))(jax.random.split(jax.random.key(0), 200))
    sigmas = np.asarray(draws, np.float64)
    assert among[0] <= sigmas.min() and sigmas.max() <= among[1] + 1e-6
    u, low, high = (s / (FLOW_SHIFT - (FLOW_SHIFT - 1) * s) for s in (sigmas, *among))
    within = (u - low) / (high - low) * 16 - np.arange(16)
    assert within.min() > -1e-4 and within.max() < 1 + 1e-4
    assert abs(within.mean() - 0.5) < 0.02 and within.std() == pytest.approx(12**-0.5, abs=0.01)


def test_the_loss_is_the_velocitys_squared_error(dit, monkeypatch):
    x0, noise = (jax.random.normal(jax.random.key(i), (3, 2, 4, 6, 16)) for i in (0, 1))
    sigmas, context = jnp.array([1.0, 0.5, 0.05]), Context(jnp.zeros((3, 1, DIT.dim)), None)

    def oracle(dit, noisy, level, given):
        assert given is context and level is sigmas
        exact = (noisy - x0) / level[:, None, None, None, None]  # x = x0 + sigma (noise - x0)
        return exact + jnp.array([0.0, 0.0, 2.0])[:, None, None, None, None]

    monkeypatch.setattr(train_dit, "predict", oracle)
    loss = flow_loss(dit, context, x0, sigmas, noise)
    np.testing.assert_allclose(loss, [0, 0, 4], atol=1e-4)


# Model


@pytest.fixture(scope="module")
def params(shrunk):
    """All random, so that everything counts; much of it is zero at the start of training."""
    return draw_parameters("transformer")


@pytest.fixture(scope="module")
def dit(params):
    return module_with(partial(WanTransformer, DIT), params)


@pytest.fixture(scope="module")
def encoder(shrunk):
    return module_with(partial(UMT5Encoder, TEXT), draw_parameters("text_encoder"))


X = jax.random.normal(jax.random.key(2), (3, 2, 4, 6, 16))
SIGMAS = jnp.array([0.95, 0.5, 0.1])
TEXTS = ["a red circle moving left on a black background", "", "blue star."]


@pytest.fixture(scope="module")
def velocity(encoder):
    @jax.jit
    def velocity(params, captions):
        dit = module_with(partial(WanTransformer, DIT), params)
        return predict(dit, X, SIGMAS, embed_captions(dit, encoder, captions))

    return velocity


def test_the_velocity_is_that_of_inference(params, dit, encoder, velocity, tokenizer, monkeypatch):
    """Captions of ROWS rows give what inference gives with 512."""
    encode = jax.jit(encoder)
    rows = encode_prompts(lambda tokens, mask: np.asarray(encode(tokens, mask)), tokenizer, TEXTS)
    with monkeypatch.context() as patch:  # float32 sums over 512 rows would be the less exact side
        patch.setattr(transformer, "attention", exact_attention)
        expected = jax.jit(dit)(X, 1000 * SIGMAS[:, None], rows)
    found = velocity(params, tokenize_captions(tokenizer, TEXTS))
    assert relative_error(found, expected) < 1e-6  # float32's own
    other = velocity(params, tokenize_captions(tokenizer, TEXTS[::-1]))
    assert relative_error(other, expected) > 1e-3  # captions matter


def test_at_the_start_layers_change_nothing_and_the_velocity_is_zero(velocity, tokenizer):
    begun = initial_parameters(0)
    assert not velocity(begun, tokenize_captions(tokenizer, TEXTS)).any()
    moved = {path for path, p in begun.items() if p.any()}
    head = {f"proj_out.{name}" for name in ("kernel", "bias")}
    assert not head & moved and "blocks.attn1.out.kernel" in moved
    # with a head that shows what comes to it, layers that add nothing are like no layers
    shown = begun | {path: jnp.ones_like(begun[path]) for path in head}
    without = {path: jnp.zeros_like(p) if "blocks" in path else p for path, p in shown.items()}
    captions = tokenize_captions(tokenizer, TEXTS)
    assert relative_error(velocity(shown, captions), velocity(without, captions)) < 1e-6


# Steps


@pytest.mark.slow
def test_matrices_of_layers_move_alike_and_all_else_as_with_adam(params):
    """With Muon the root mean square of a step does not depend on the gradient, nor on the matrix's shape."""
    params = params | {f"text_encoder.{path}": p for path, p in draw_parameters("text_encoder").items()}
    optimizer = make_optimizer()
    rng = np.random.default_rng(0)
    grads = {path: rng.choice([-1, 1], p.shape) * rng.uniform(0.5, 1.5, p.shape) for path, p in params.items()}
    grads = jax.tree.map(partial(jnp.asarray, dtype=jnp.float32), grads)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = jax.jit(optimizer.update)(grads, jax.jit(optimizer.init)(zeros), zeros)
    by_muon = {path for path in params if path.endswith("kernel") and path.startswith(
        ("blocks.", "text_encoder.layers.", "text_embedder."))}  # fmt: skip
    assert len(by_muon) == 10 + 7 + 2
    for path, update in updates.items():
        assert (update * grads[path]).sum() < 0, path
        if path in by_muon:  # 0.2 in a square, whose singular values are all 1, to the accuracy of five rounds
            assert 0.12 < float(jnp.sqrt((update**2).mean())) < 0.25, path
        else:  # the first step of Adam, at half the rate
            np.testing.assert_allclose(jnp.abs(update), 0.5, rtol=1e-3, err_msg=path)


@pytest.fixture
def rates(monkeypatch):
    """(plan, its learning rate at a share of its steps) of every phase."""
    made = []
    monkeypatch.setattr(train_dit, "make_step", lambda loss, optimizer, rate, **_: made.append(rate))
    plans = [*BASE, *EXPERT_PLANS["high"], *EXPERT_PLANS["low"]]
    phases = make_phases(plans, lambda kind: None, jnp.float32, draw_parameters("text_encoder"), scale=0.5)
    assert [phase.steps for phase in phases] == [plan.steps // 2 for plan in plans]
    return list(zip(plans, made, strict=True))


def test_rates_rise_in_a_hundred_steps_and_fall_to_zero_at_the_end(rates):
    for plan, rate in rates:
        steps = plan.steps // 2
        assert rate(jnp.float32(0)) == pytest.approx(plan.rate / 100)
        done = 100 / steps
        assert rate(jnp.float32(done)) == pytest.approx(plan.rate * min(1, (1 - done) / max(plan.falling, 1e-9)))
        if plan.falling:
            late = 1 - plan.falling / 4
            assert rate(jnp.float32(late)) == pytest.approx(plan.rate / 4, rel=1e-4)
            assert rate(jnp.float32(1 - 1e-6)) < 1e-4 * plan.rate
        else:
            assert rate(jnp.float32(1 - 1e-6)) == pytest.approx(plan.rate)


def test_the_experts_see_their_noise_levels_and_share_the_border():
    assert EXPERT_PLANS["high"][0].sigmas == HIGH and EXPERT_PLANS["low"][0].sigmas == LOW
    assert HIGH[0] < 0.875 < LOW[1] and HIGH[1] == 1 and LOW[0] == 0
    assert BASE[-1].falling > 0  # judged, and forked, after its decay
