"""The loop that the trainers of the bundled model share, on a training of one number."""

import os
import signal
import time
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jaxwan.models.layers import Linear
from jaxwan.tiny import training
from jaxwan.tiny.training import (
    Phase,
    Saved,
    Saver,
    latest_step,
    make_step,
    module_with,
    parameters,
    run,
    start,
)

pytestmark = pytest.mark.slow  # trains, if little

TARGET = 3.0
OPTIMIZER = optax.sgd(1.0, momentum=0.5)


def test_products_in_training_have_the_gradients_of_plain_ones():
    make = partial(Linear, 5, 3)
    plain = make(dtype=jnp.float32, rngs=nnx.Rngs(0))
    plain.bias[...] = jnp.arange(3.0)
    ours = module_with(make, parameters(plain))
    x = jax.random.normal(jax.random.key(2), (4, 7, 5))
    for rows in (x, x[0], x[0, 0]):
        wanted, actual = (jax.grad(lambda m, x: (m(x) ** 3).sum(), argnums=(0, 1))(m, rows) for m in (plain, ours))
        for a, w in zip(jax.tree.leaves(actual), jax.tree.leaves(wanted), strict=True):
            np.testing.assert_allclose(a, w, rtol=1e-5, atol=1e-5)


def begun():
    return start({"x": jnp.zeros(2)}, OPTIMIZER)


def loss(params, key):
    noise = 0.01 * jax.random.normal(key, (2,))
    return ((params["x"] - TARGET + noise) ** 2).mean()


@cache
def compiled_step(rate, steps=40):
    step = make_step(loss, OPTIMIZER, lambda done: rate * (1 - done), steps=steps, decay=0.9)
    step(begun(), jax.random.key(0), 0)  # compiles it
    return step


def make_phases(steps=40, count=1, after=lambda state: None, rate=0.1):
    step = compiled_step(rate, steps)

    def watched_step(state, key, done):
        state, value = step(state, key, done)
        after(state)
        return state, value

    return [Phase(f"phase {i}", steps, watched_step) for i in range(count)]


def stop_at(step, state, number=signal.SIGTERM):
    if state.step == step:
        os.kill(os.getpid(), number)


def same(a, b):
    return jax.tree.all(jax.tree.map(lambda x, y: bool(jnp.array_equal(x, y)) and x.dtype == y.dtype, a, b))


def test_phases_follow_each_other_and_reach_the_target(tmp_path):
    seen = []
    saved, is_done = run(
        make_phases(count=2), Saved(begun()), Saver(tmp_path), report=lambda s: seen.append(s) or {"x": 1}
    )
    assert is_done and (saved.phase, saved.done, saved.state.step) == (2, 0, 80)
    assert jnp.allclose(saved.state.params["x"], TARGET, atol=0.1)
    assert jnp.allclose(saved.state.average["x"], saved.state.params["x"], atol=0.1)
    assert [(e["phase"], e["step"], e["x"]) for e in saved.history] == [("phase 0", 40, 1), ("phase 1", 80, 1)]
    assert [(s.phase, s.done) for s in seen] == [(0, 40), (1, 40)]


def test_the_average_is_of_the_latest_steps_and_warms_up_anew_in_each_phase():
    step = compiled_step(0.1)
    state, average = begun(), 0.0
    for done in (*range(30), *range(30)):
        state, _ = step(state, jax.random.key(0), done)
        share = min(0.9, (1 + done) / (10 + done))
        average = share * average + (1 - share) * float(state.params["x"][0])
        assert float(state.average["x"][0]) == pytest.approx(average, rel=1e-5)


def test_the_rate_follows_the_share_of_the_phase_that_is_done():
    step = make_step(lambda p, key: p["x"].sum(), optax.sgd(1.0), lambda done: 8 * done, steps=16, decay=0.9)
    state, seen = start({"x": jnp.zeros(2)}, optax.sgd(1.0)), [0.0]
    for done in (0, 2, 8):
        state, _ = step(state, jax.random.key(0), done)
        seen.append(float(state.params["x"][0]))
    assert [a - b for a, b in zip(seen, seen[1:], strict=False)] == [0, 1, 4]


def test_a_step_is_given_its_data():
    step = make_step(lambda p, key, x: (p["x"] * x).sum(), optax.sgd(1.0), lambda done: 1.0, steps=1, decay=0.9)
    state, value = step(start({"x": jnp.ones(2)}, optax.sgd(1.0)), jax.random.key(0), 0, jnp.array([3.0, 5.0]))
    assert value == 8 and state.params["x"].tolist() == [-2, -4]


def test_a_training_that_was_stopped_ends_as_one_that_was_not(tmp_path):
    whole, _ = run(make_phases(count=2), Saved(begun()), Saver(tmp_path / "whole"))
    stop = partial(stop_at, 25)
    part, is_done = run(
        make_phases(count=2, after=stop), Saved(begun(), history=({"x": 1.5},)), Saver(tmp_path / "parts")
    )
    assert not is_done and part.done == 25
    found = Saver(tmp_path / "parts").restore(jax.eval_shape(begun))
    assert found is not None and same(found.state, part.state) and found._replace(state=0) == part._replace(state=0)
    end, is_done = run(make_phases(count=2), found, Saver(tmp_path / "parts"))
    assert is_done and same(end.state, whole.state)


def test_no_saved_training_is_none(tmp_path):
    assert latest_step(tmp_path / "none") is None
    assert Saver(tmp_path / "none").restore(begun()) is None
    assert latest_step(tmp_path / "none") is None


def test_the_latest_state_is_told_by_its_step(tmp_path):
    with Saver(tmp_path) as saver:
        for step in (5, 12):
            saver.save(Saved(begun()._replace(step=jnp.int32(step))))
    assert latest_step(tmp_path) == 12


class Two(nnx.Module):
    """What a module looks like whose parts are kept in other precisions."""

    def __init__(self, *, dtype, rngs):
        self.small = nnx.Param(jax.random.normal(rngs.params(), (3,), dtype))
        self.exact = nnx.Param(jnp.zeros(2, jnp.float32))


def test_a_module_is_filled_with_parameters_in_the_precision_it_wants():
    params = {"small": jnp.array([1 + 2**-12, 2.0, 3.0]), "exact": jnp.array([1 + 2**-12, 5.0])}
    made = module_with(Two, params, jnp.bfloat16)
    assert made.small[...].dtype == jnp.bfloat16 and made.small[...].tolist() == [1, 2, 3]
    assert jnp.array_equal(made.exact[...], params["exact"])
    assert same(parameters(module_with(Two, params)), params)


def test_it_stops_after_its_minutes(tmp_path):
    phases = make_phases(steps=10_000, after=lambda state: time.sleep(0.01))
    saved, is_done = run(phases, Saved(begun()), Saver(tmp_path), minutes=0.3 / 60)
    assert not is_done and 0 < saved.done <= 30 and 0 < saved.seconds < 0.5
    assert Saver(tmp_path).restore(begun()).done == saved.done


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_after_the_step_with_its_state_saved(tmp_path, number):
    before = signal.getsignal(number)
    saved, is_done = run(make_phases(after=partial(stop_at, 3, number=number)), Saved(begun()), Saver(tmp_path))
    assert not is_done and saved.state.step == 3
    assert Saver(tmp_path).restore(begun()).state.step == 3
    assert signal.getsignal(number) == before


def test_it_saves_on_the_way(tmp_path, monkeypatch):
    """A process that dies without a word loses no more than SAVE_MINUTES."""
    monkeypatch.setattr(training, "SAVE_MINUTES", 0.0)

    def die(state):
        if state.step == 5:
            raise KeyError

    with pytest.raises(KeyError):
        run(make_phases(after=die), Saved(begun()), Saver(tmp_path))
    assert Saver(tmp_path).restore(begun()).done == 4


def test_a_loss_that_is_not_finite_ends_it_and_is_not_saved(tmp_path):
    phases = make_phases(rate=np.inf)
    with pytest.raises(FloatingPointError, match="the loss of step 2 is"):
        run(phases, Saved(begun()), Saver(tmp_path))
    assert Saver(tmp_path).restore(begun()) is None


def test_a_step_draws_by_its_number():
    """So that a training that went on elsewhere sees the data that it would have seen."""
    step = make_step(
        lambda p, key: jax.random.uniform(key) + 0 * p["x"].sum(), OPTIMIZER, lambda done: done, steps=3, decay=0.9
    )
    losses, state = [], begun()
    for done in range(3):
        state, value = step(state, jax.random.key(1), done)
        losses.append(float(value))
    late, value = step(begun()._replace(step=jnp.array(2)), jax.random.key(1), 0)
    assert len(set(losses)) == 3 and float(value) == losses[2]


def test_states_lie_in_the_users_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert training.state_folder() == tmp_path / "jaxwan" / "train_tiny"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert training.state_folder() == tmp_path / ".cache" / "jaxwan" / "train_tiny"
