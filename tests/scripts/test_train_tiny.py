"""train_tiny.py's command line; the trainings themselves are tested in tests/tiny."""

import importlib.util
import time
from pathlib import Path

import pytest

from jaxwan.tiny.stages import STAGES, Settings
from jaxwan.tiny.training import state_folder

ALL = ("vae", "text", "base", "high", "low")


@pytest.fixture
def script(monkeypatch):
    """The script, whose calls of training and carrying are kept in `calls`; stages named in `stopped` are not done."""
    path = Path(__file__).parents[2] / "scripts/train_tiny.py"
    spec = importlib.util.spec_from_file_location("train_tiny", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.calls, module.stopped = [], []

    def train_stage(*args):
        module.calls.append(args)
        return args[0] not in module.stopped

    def carry(name):
        return lambda *args: module.calls.append((name, *args)) or {"base": 7}

    monkeypatch.setattr(module, "train_stage", train_stage)
    for name in ("pack", "unpack"):
        monkeypatch.setattr(module, name, carry(name))
    return module


def test_a_stage_is_trained_with_the_defaults(script):
    assert script.main(["vae"]) == 0
    assert script.calls == [("vae", Settings(state_folder(), Path("outputs/tiny")))]


def test_flags_reach_the_training(script):
    assert script.main("base --states a --output b --minutes 8 --scale 0.5 --seed 3 --dtype float32".split()) == 0
    ((name, settings),) = script.calls
    assert name == "base" and settings.minutes == pytest.approx(8, abs=0.1)
    assert settings._replace(minutes=8.0) == Settings(Path("a"), Path("b"), 0.5, 8.0, 3, "float32")


def test_all_stages_follow_each_other_until_one_is_stopped(script):
    assert script.main(["all"]) == 0
    assert [name for name, _ in script.calls] == list(STAGES)
    script.calls.clear()
    script.stopped.append("base")
    assert script.main(["all"]) == 0
    assert [name for name, _ in script.calls] == ["vae", "latents", "text", "base"]


def test_the_minutes_are_those_of_all_stages_together(script, monkeypatch):
    clock = map(float, range(0, 3600, 120))  # two minutes a look
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    assert script.main(["all", "--minutes", "5"]) == 0
    assert [settings.minutes for _, settings in script.calls] == [3, 1, 0, 0, 0, 0]


def test_a_leg_unpacks_first_and_packs_last(script, capsys):
    assert script.main("base --states a --output b --unpack here --pack there --carry base high".split()) == 0
    assert [call[0] for call in script.calls] == ["unpack", "base", "pack"]
    assert script.calls[0] == ("unpack", Path("here"), Path("a"), Path("b"))
    assert script.calls[2] == ("pack", Path("a"), Path("b"), Path("there"), ["base", "high"])
    told = capsys.readouterr().err.splitlines()
    assert told == ["unpacked base at step 7, and the model so far", "packed base at step 7, and the model so far"]


@pytest.mark.parametrize("flag", ["pack", "unpack"])
def test_states_are_carried_without_training(script, flag):
    assert script.main([f"--{flag}", "x"]) == 0
    (call,) = script.calls
    assert call[0] == flag and (flag == "unpack" or call[-1] == ALL)


def test_a_stage_that_was_stopped_is_packed_too(script):
    script.stopped.append("base")
    assert script.main(["base", "--pack", "there"]) == 0
    assert [call[0] for call in script.calls] == ["base", "pack"]


@pytest.mark.parametrize("flags", [[], ["--minutes", "8"], ["muse"], ["--pack", "x", "--carry", "latents"]])
def test_nothing_to_do_and_unknown_stages_are_refused(script, capsys, flags):
    with pytest.raises(SystemExit, match="2"):
        script.main(flags)
    assert "name a stage" in capsys.readouterr().err or "muse" in flags or "latents" in flags
    assert not script.calls


@pytest.mark.parametrize("flag", ["--minutes", "--scale"])
def test_a_number_that_is_not_positive_is_refused(script, capsys, flag):
    assert script.main(["vae", "--unpack", "x", flag, "-1"]) == 1
    assert capsys.readouterr().err == f"error: {flag} -1 must be positive\n" and not script.calls


def test_a_training_that_fails_says_why_and_packs_nothing(script, capsys, monkeypatch):
    def fail(*_):
        raise FloatingPointError("the loss of step 3 is nan; the state saved before it stays")

    monkeypatch.setattr(script, "train_stage", fail)
    assert script.main(["vae", "--pack", "x"]) == 1
    assert capsys.readouterr().err == "error: the loss of step 3 is nan; the state saved before it stays\n"
    assert not script.calls
