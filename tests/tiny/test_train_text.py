"""How the bundled model's text encoder is trained, on a smaller one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_tiny import draw_parameters, small_models

from jaxwan.tiny import stages, train_text
from jaxwan.tiny.attributes import COLOURS, MOTIONS, READ, VALUES, Attributes, Thing
from jaxwan.tiny.captions import Captions
from jaxwan.tiny.checkpoint import read_component
from jaxwan.tiny.stages import Settings, train_stage
from jaxwan.tiny.train_dit import make_optimizer
from jaxwan.tiny.train_text import NUM_LABELS, Teller, initial_parameters, labels, make_phase, make_report, right
from jaxwan.tiny.training import latest_step, module_with, start

KEY = jax.random.key(0)


@pytest.fixture(scope="module", autouse=True)
def shrunk():
    with small_models() as patch:
        patch.setattr(train_text, "BATCH", 32)
        patch.setattr(train_text, "JUDGED", 16)
        yield


def batch(*clips):
    """Clips as a batch of NumPy arrays."""
    return jax.tree.map(lambda *x: np.array(x), *clips)


def clip(first, second, two):
    return Attributes(Thing(*first), Thing(*second), two, background=3, graded=True)


def test_labels_are_what_the_clip_shows_and_of_two_objects_both():
    one, both = (0, 1, 2, 0, 2), (4, 1, 8, 2, 2)
    alone, pair = labels(batch(clip(one, both, False), clip(one, both, True)))
    assert len(alone) == NUM_LABELS == 7 + 4 + 9 + 3 + 3 + 5 + 2
    assert np.flatnonzero(alone).tolist() == [0, 7 + 1, 11 + 2, 20, 23 + 2, 26 + 3, 31]
    assert np.flatnonzero(pair).tolist() == [0, 4, 7 + 1, 11 + 2, 11 + 8, 20, 22, 23 + 2, 26 + 3, 31, 32]
    assert set(np.unique(pair)) == {0, 1}


def test_right_is_the_share_of_real_rows_that_tell_the_value():
    table = np.array([[1, 0, 8, 4], [2, 3, 0, 0]], np.int32)
    shown = batch(*(clip((*row[:3], 0, 0), (0, 0, 0, 0, 0), False)._replace(background=row[3]) for row in table))
    logits = np.repeat(labels(shown)[:, None], 4, axis=1)
    mask = np.array([[True, True, False, False], [True, True, True, False]])
    assert right(logits, table, mask).tolist() == [1, 1, 1, 1]
    logits[0, 1, : len(COLOURS)] = np.eye(len(COLOURS))[5]  # one real row of five tells another colour
    logits[1, 3, 11 : 11 + len(MOTIONS)] = np.eye(len(MOTIONS))[4]  # and one behind the caption another motion
    assert right(logits, table, mask).tolist() == [0.8, 1, 1, 1]


def test_rows_behind_a_caption_count_for_nothing(tokenizer, monkeypatch):
    """Neither in the loss: wherever they are, it is the mean over the real ones."""
    given = []
    monkeypatch.setattr(train_text, "make_step", lambda loss, *_, **__: given.append(loss))
    make_phase(tokenizer, jnp.float32, make_optimizer())
    params = initial_parameters(0)
    wanted = jnp.asarray(np.random.default_rng(0).integers(2, size=(2, NUM_LABELS)), jnp.float32)
    tokens, mask = jnp.array([[7, 9, 1, 5], [8, 1, 6, 6]]), jnp.array([[1, 1, 1, 0], [1, 1, 0, 0]], bool)
    captions = Captions(tokens, mask)
    params |= {"head.kernel": jax.random.normal(jax.random.key(1), params["head.kernel"].shape)}
    (loss,) = given
    logits = np.float64(module_with(Teller, params)(captions))
    each = np.logaddexp(0, logits) - logits * np.asarray(wanted)[:, None]
    expected = each.sum(-1)[np.asarray(mask)].mean()
    np.testing.assert_allclose(loss(params, KEY, captions, wanted), expected, rtol=1e-5)  # float32 sums of 33
    other = captions._replace(tokens=jnp.where(mask, tokens, 2))
    np.testing.assert_allclose(loss(params, KEY, other, wanted), expected, rtol=1e-5)


def test_what_a_step_sees_follows_from_its_number_and_the_seed(tokenizer, monkeypatch):
    seen = []

    def note(state, key, done, *data):
        seen.append(data)
        return state, jnp.float32(0)

    monkeypatch.setattr(train_text, "make_step", lambda *_, **__: note)
    state = start({"x": jnp.zeros(1)}, make_optimizer())
    for seed, step in ((0, 3), (0, 3), (0, 4), (1, 3)):
        phase = make_phase(tokenizer, jnp.float32, make_optimizer(), seed=seed)
        phase.step(state._replace(step=jnp.int32(step)), KEY, 0)
    first, again, later, other = ((captions.tokens, wanted) for captions, wanted in seen)
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not np.array_equal(first[0], later[0]) and not np.array_equal(first[0], other[0])
    assert first[0].shape[0] == len(first[1]) == 32


def test_steps_teach_and_the_report_tells(tokenizer, monkeypatch):
    """Even the small encoder soon tells shapes, for which one word is enough, and backgrounds from others."""
    monkeypatch.setattr(train_text, "RATE", 2e-2)
    phase = make_phase(tokenizer, jnp.float32, make_optimizer(), scale=300 / train_text.STEPS)
    report = make_report(tokenizer, jnp.float32)
    state = start(initial_parameters(0), make_optimizer())
    before = report(state.params)
    losses = []
    for done in range(phase.steps):
        state, loss = phase.step(state, KEY, done)
        losses.append(float(loss))
    after = report(state.params)
    assert list(after) == [f"{kind} {name}" for kind in ("seen", "held out") for name in READ]
    assert losses[-1] < 0.65 * losses[0]
    for name in ("shape", "background"):  # twice what chance gives, and more
        assert after[f"seen {name}"] > max(before[f"seen {name}"], 2 / len(VALUES[name])), name


@pytest.fixture
def settings(tmp_path):
    (tmp_path / "model" / "vae").mkdir(parents=True)
    (tmp_path / "model" / "vae" / "config.json").write_text("{}")
    return Settings(tmp_path / "states", tmp_path / "model", scale=2 / train_text.STEPS, dtype="float32")


def test_the_stage_writes_the_encoder_alone_and_goes_on_from_it(settings, monkeypatch):
    assert train_stage("text", settings)
    assert latest_step(settings.states / "text") == 2
    written = read_component(settings.output, "text_encoder")
    assert written.keys() == draw_parameters("text_encoder").keys()
    begun_with = []
    monkeypatch.setattr(stages, "run", lambda phases, saved, saver, **_: (begun_with.append(saved), (saved, False))[1])
    train_stage("text", settings._replace(states=settings.states / "lost"))
    (saved,) = begun_with
    for path, p in written.items():
        assert jnp.array_equal(saved.state.params[f"text_encoder.{path}"], p), path


def test_the_stage_starts_afresh_without_weights(settings, monkeypatch):
    begun_with = []
    monkeypatch.setattr(stages, "run", lambda phases, saved, saver, **_: (begun_with.append(saved), (saved, False))[1])
    assert not train_stage("text", settings._replace(seed=3))
    (saved,) = begun_with
    wanted = initial_parameters(3)
    assert saved.state.step == 0 and saved.state.params.keys() == wanted.keys()
    assert all(jnp.array_equal(saved.state.params[path], p) for path, p in wanted.items())
