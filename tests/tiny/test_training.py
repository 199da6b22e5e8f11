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

from jaxwan.tiny import training
from jaxwan.tiny.training import Phase, Saved, Saver, make_step, run, start

pytestmark = pytest.mark.slow  # trains, if little

TARGET = 3.0
OPTIMIZER = optax.sgd(1.0, momentum=0.5)


def begun():
    return start({"x": jnp.zeros(2)}, OPTIMIZER)


def loss(params, key):
    noise = 0.01 * jax.random.normal(key, (2,))
    return ((params["x"] - TARGET + noise) ** 2).mean()


@cache
def compiled_step(rate):
    step = make_step(loss, OPTIMIZER, lambda done: rate * (1 - done), decay=0.9)
    step(begun(), jax.random.key(0), jnp.float32(0))  # compiles it
    return step


def make_phases(steps=40, count=1, after=lambda state: None, rate=0.1):
    step = compiled_step(rate)

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


def test_the_average_is_of_the_latest_steps():
    step = compiled_step(0.1)
    state, kept = begun(), []
    for _ in range(30):
        state, _ = step(state, jax.random.key(0), jnp.float32(0))
        kept.append(float(state.params["x"][0]))
    average = 0.0
    for i, x in enumerate(kept):
        share = min(0.9, (1 + i) / (10 + i))
        average = share * average + (1 - share) * x
    assert float(state.average["x"][0]) == pytest.approx(average, rel=1e-5)


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
    assert Saver(tmp_path / "none").restore(begun()) is None


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
    step = make_step(lambda p, key: jax.random.uniform(key) + 0 * p["x"].sum(), OPTIMIZER, lambda done: done, decay=0.9)
    losses, state = [], begun()
    for _ in range(3):
        state, value = step(state, jax.random.key(1), jnp.float32(0))
        losses.append(float(value))
    late, value = step(begun()._replace(step=jnp.array(2)), jax.random.key(1), jnp.float32(0))
    assert len(set(losses)) == 3 and float(value) == losses[2]


def test_states_lie_in_the_users_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert training.state_folder() == tmp_path / "jaxwan" / "train_tiny"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert training.state_folder() == tmp_path / ".cache" / "jaxwan" / "train_tiny"
