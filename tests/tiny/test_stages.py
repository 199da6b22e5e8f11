"""The stages of the bundled model's training on a small one: what each begins with, what it leaves."""

import importlib.util
import os
import signal
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small_tiny import draw_parameters, make_latents, small_models

from jaxwan.tiny import stages, train_dit
from jaxwan.tiny.checkpoint import read_component, write_component, write_surroundings
from jaxwan.tiny.latents import PIECES, VALIDATION
from jaxwan.tiny.stages import Settings, learning_curve, train_stage
from jaxwan.tiny.train_dit import HIGH, LOW, Plan, make_optimizer
from jaxwan.tiny.training import Saved, Saver, latest_step, start

BASE = (Plan("pictures", 2, "pictures", 8, 3e-3, 0.0), Plan("clips", 4, "clips", 8, 3e-3, 0.4))
EXPERTS = {
    "high": (Plan("high noise", 2, "clips", 8, 1e-2, 0.5, HIGH),),
    "low": (Plan("low noise", 2, "clips", 8, 1e-2, 0.5, LOW),),
}


class Unjudged:
    """In place of a Judge, which is tested in test_dit_quality.py."""

    def __init__(self, encoded, tokenizer, encoder, vae, folder):
        self.kind = "pictures" if encoded.latents.shape[1] == 1 else "clips"

    def losses(self, params):
        return {0.5: float(len(params))}

    def gaps(self, params):
        return {"gap": self.kind}

    def samples(self, params, name):
        return {"name": name}


@pytest.fixture(scope="module", autouse=True)
def shrunk():
    """Few steps of a small model on noise."""
    with small_models() as patch:
        patch.setattr(stages, "BASE", BASE)
        patch.setattr(stages, "EXPERT_PLANS", EXPERTS)
        patch.setattr(stages, "Judge", Unjudged)
        patch.setattr(stages, "load_vae", lambda folder: None)
        patch.setattr(stages, "make_latents", lambda vae, folder, kind, numbers: folder)
        patch.setattr(
            stages, "read_latents",
            lambda folder, kind, numbers: make_latents(16, (1 if kind == "pictures" else 2, 4, 6, 16)),
        )  # fmt: skip
        yield


def write_vae(output):
    (output / "vae").mkdir(parents=True)
    (output / "vae" / "config.json").write_text("{}")


def write_vae_and_text(output):
    write_vae(output)
    write_component(draw_parameters("text_encoder"), output, "text_encoder")


def same(a, b):
    return a.keys() == b.keys() and all(jnp.array_equal(a[path], b[path]) for path in a)


@pytest.fixture
def settings(tmp_path):
    made = Settings(tmp_path / "states", tmp_path / "model", dtype="float32")
    write_vae_and_text(made.output)
    return made


# What a stage begins with


@pytest.fixture(scope="module")
def weights():
    return {name: draw_parameters(name) for name in ("transformer", "text_encoder")}


@pytest.fixture
def starts(monkeypatch):
    """What a stage begins with: its training stops at once."""
    begun_with = []

    def stop_at_once(phases, saved, saver, **_):
        begun_with.append((saved, [phase.name for phase in phases]))
        return saved, False

    monkeypatch.setattr(stages, "run", stop_at_once)
    return begun_with


def write_base(settings, weights):
    write_component(weights["text_encoder"], settings.output, "text_encoder")
    for folder in ("transformer", "transformer_2"):
        write_component(weights["transformer"], settings.output, folder)


def rounded(params):
    return {path: p.astype(jnp.bfloat16).astype(jnp.float32) for path, p in params.items()}


def test_a_stage_needs_those_before_it(tmp_path):
    settings = Settings(tmp_path, tmp_path / "model")
    for stage in ("latents", "text", "base", "high"):
        with pytest.raises(ValueError, match="model has no vae: run the stage 'vae' first"):
            train_stage(stage, settings)
    write_vae(settings.output)
    for stage in ("base", "high"):
        with pytest.raises(ValueError, match="model has no text_encoder: run the stage 'text' first"):
            train_stage(stage, settings)
    write_component(draw_parameters("text_encoder"), settings.output, "text_encoder")
    for stage, folder in (("high", "transformer"), ("low", "transformer_2")):
        with pytest.raises(ValueError, match=f"model has no {folder}: run the stage 'base' first"):
            train_stage(stage, settings)


def test_base_starts_afresh_when_there_is_nothing(starts, settings, monkeypatch):
    monkeypatch.setattr(stages, "initial_parameters", lambda seed: {"seed": jnp.full(1, seed)})
    assert not train_stage("base", settings._replace(seed=5))
    ((saved, names),) = starts
    assert (saved.phase, saved.done, saved.state.step) == (0, 0, 0) and names == ["pictures", "clips"]
    assert saved.state.params["seed"] == 5


def test_base_goes_on_from_weights_with_the_last_phase(starts, settings, weights):
    write_base(settings, weights)
    assert not train_stage("base", settings)
    ((saved, _),) = starts
    assert (saved.phase, saved.done, saved.state.step) == (1, 0, 0)
    wanted = rounded(weights["transformer"])
    assert same(saved.state.params, wanted) and same(saved.state.average, wanted)


def test_a_state_comes_before_weights(starts, settings, weights):
    write_base(settings, weights)
    state = start(draw_parameters("transformer", 9), make_optimizer())
    with Saver(settings.states / "base") as saver:
        saver.save(Saved(state._replace(step=jnp.int32(3)), phase=1, done=1))
    assert not train_stage("base", settings)
    ((saved, _),) = starts
    assert (saved.phase, saved.done, saved.state.step) == (1, 1, 3)
    assert same(saved.state.params, state.params)


def test_the_curve_of_what_was_measured_is_a_table_a_stage(settings):
    assert learning_curve(settings.states) == f"no state in {settings.states}"
    state = start({"x": jnp.zeros(1)}, optax.sgd(1.0))
    history = ({"step": 3, "loss": 0.5}, {"step": 9, "loss": 0.25, "read shape": 0.75})
    with Saver(settings.states / "low") as saver:
        saver.save(Saved(state, history=history))
    wanted = [
        "low:",
        "",
        "| step | loss | read shape |",
        "| --- | --- | --- |",
        "| 3 | 0.5 |  |",
        "| 9 | 0.25 | 0.75 |",
    ]
    assert learning_curve(settings.states).splitlines() == wanted


def test_an_expert_starts_from_the_base(starts, settings, weights):
    write_base(settings, weights)
    write_surroundings(settings.output)
    assert not train_stage("low", settings)
    ((saved, names),) = starts
    assert (saved.phase, saved.done) == (0, 0) and names == ["low noise"]
    assert same(saved.state.params, rounded(weights["transformer"]))


def test_all_clips_and_pictures_are_encoded_with_the_validation_first(settings, monkeypatch):
    encoded = []
    monkeypatch.setattr(
        stages, "make_latents", lambda vae, folder, kind, numbers: encoded.extend((kind, n) for n in numbers)
    )
    assert train_stage("latents", settings)
    assert encoded == [(kind, n) for kind, count in PIECES.items() for n in (VALIDATION, *range(count))]
    encoded.clear()
    assert not train_stage("latents", settings._replace(minutes=0.0)) and encoded == []


def test_what_a_stage_lacks_of_clips_is_encoded_within_its_minutes(settings, weights, starts, monkeypatch, capsys):
    encoded, clock = [], iter(range(0, 10**6, 30))  # half a minute at every look
    monkeypatch.setattr(stages.time, "monotonic", lambda: float(next(clock)))
    monkeypatch.setattr(stages, "make_latents", lambda vae, folder, kind, numbers: encoded.extend(numbers))
    write_base(settings, weights)
    write_surroundings(settings.output)
    assert not train_stage("high", settings._replace(minutes=5.0)) and starts == []
    assert 0 < len(encoded) < PIECES["clips"]
    assert "stopped while clips were being encoded" in capsys.readouterr().err
    assert not train_stage("high", settings._replace(minutes=60.0)) and len(starts) == 1


# Trained through the script


@pytest.fixture(scope="module")
def script():
    path = Path(__file__).parents[2] / "scripts/train_tiny.py"
    spec = importlib.util.spec_from_file_location("train_tiny", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def flags(folder):
    return ["--states", str(folder / "states"), "--output", str(folder / "model"), "--dtype", "float32"]


@pytest.fixture(scope="module")
def whole(script, tmp_path_factory):
    """Folder of a base that was trained without a stop."""
    folder = tmp_path_factory.mktemp("whole")
    write_vae_and_text(folder / "model")
    assert script.main(["base", *flags(folder)]) == 0
    return folder


@pytest.mark.slow
def test_base_is_trained_judged_and_written_for_both_experts(whole, capsys):
    with Saver(whole / "states" / "base") as saver:
        saved = saver.restore(train_dit.abstract_state())
    assert (saved.phase, saved.state.step) == (2, 6)
    assert [entry["gap"] for entry in saved.history] == ["pictures", "clips"]
    assert [entry["name"] for entry in saved.history] == ["base-000002", "base-000006"]
    assert np.isfinite([entry["loss"] for entry in saved.history]).all()
    begun = train_dit.initial_parameters(0)
    still = [path for path, p in saved.state.params.items() if jnp.array_equal(p, begun[path])]
    assert still == [], "parameters that training leaves alone"
    for folder in ("transformer", "transformer_2"):
        written = read_component(whole / "model", folder)
        assert same(written, rounded(saved.state.average))


@pytest.mark.slow
def test_stopped_and_carried_elsewhere_it_ends_as_without(script, whole, tmp_path, monkeypatch):
    here, there = tmp_path / "here", tmp_path / "there"
    write_vae_and_text(here / "model")
    draw = train_dit.Data.draw

    def draw_and_stop(self, step, count):
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return draw(self, step, count)

    monkeypatch.setattr(train_dit.Data, "draw", draw_and_stop)
    assert script.main(["base", *flags(here), "--pack", str(tmp_path / "packed")]) == 0
    assert latest_step(here / "states" / "base") == 4 and not (here / "model" / "transformer").exists()
    monkeypatch.setattr(train_dit.Data, "draw", draw)
    back = str(tmp_path / "back")
    assert script.main(["base", *flags(there), "--unpack", str(tmp_path / "packed"), "--pack", back]) == 0
    assert script.main(["--unpack", back, *flags(here)]) == 0
    assert latest_step(here / "states" / "base") == 6
    for name in ("text_encoder", "transformer", "transformer_2"):
        ours, wanted = (read_component(folder / "model", name) for folder in (here, whole))
        assert same(ours, wanted), name


@pytest.mark.slow
def test_an_expert_is_trained_and_leaves_all_else(script, whole):
    model = whole / "model"
    before = {name: read_component(model, name) for name in ("text_encoder", "transformer", "transformer_2")}
    assert script.main(["high", *flags(whole)]) == 0
    after = {name: read_component(model, name) for name in before}
    assert [name for name in before if not same(before[name], after[name])] == ["transformer"]
    assert latest_step(whole / "states" / "high") == 2
