"""train_tiny.py's command line; the trainings themselves are tested in tests/tiny."""

import importlib.util
from pathlib import Path

import pytest

from jaxwan.tiny.training import state_folder

pytestmark = pytest.mark.slow  # trains, if little


@pytest.fixture
def script(monkeypatch):
    path = Path(__file__).parents[2] / "scripts/train_tiny.py"
    spec = importlib.util.spec_from_file_location("train_tiny", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.calls = []
    monkeypatch.setattr(module, "train_vae", lambda *args, **kwargs: module.calls.append((args, kwargs)))
    return module


def test_the_vae_is_trained_with_the_defaults(script):
    assert script.main(["vae"]) == 0
    assert script.calls == [((state_folder(), Path("outputs/tiny/vae")), {"scale": 1.0, "minutes": None, "seed": 0})]


def test_flags_reach_the_training(script):
    assert script.main("vae --states a --output b --minutes 8 --scale 0.5 --seed 3".split()) == 0
    assert script.calls == [((Path("a"), Path("b/vae")), {"scale": 0.5, "minutes": 8.0, "seed": 3})]


@pytest.mark.parametrize("flag", ["--minutes", "--scale"])
def test_a_number_that_is_not_positive_is_refused(script, capsys, flag):
    assert script.main(["vae", flag, "-1"]) == 1
    assert capsys.readouterr().err == f"error: {flag} -1 must be positive\n" and not script.calls


def test_a_training_that_fails_says_why(script, capsys, monkeypatch):
    def fail(*_, **__):
        raise FloatingPointError("the loss of step 3 is nan; the state saved before it stays")

    monkeypatch.setattr(script, "train_vae", fail)
    assert script.main(["vae"]) == 1
    assert capsys.readouterr().err == "error: the loss of step 3 is nan; the state saved before it stays\n"
