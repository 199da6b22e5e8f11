"""Scoring, and scripts/evaluate_tiny.py with a pipeline that paints what it is asked for, or something else."""

import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from PIL import Image

from jaxwan.tiny import scoring
from jaxwan.tiny.attributes import READ, combinations, draw_attributes, names
from jaxwan.tiny.clips import make_clip
from jaxwan.tiny.reader import Reading

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("evaluate_tiny", ROOT / "scripts" / "evaluate_tiny.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def obedient(case):
    return Reading(**names(case.row))


def test_half_of_the_captions_is_held_out_and_no_combination_comes_twice():
    cases = scoring.make_cases(400)
    assert sum(case.held_out for case in cases) == 200
    held_out = set(map(tuple, combinations(True).tolist()))
    assert all((tuple(case.row.tolist()) in held_out) == case.held_out for case in cases)
    assert len({tuple(case.row.tolist()) for case in cases}) == 400
    assert len({case.seed for case in cases}) == 400
    assert len({case.caption for case in cases}) > 395
    assert [case.caption for case in scoring.make_cases(400)] == [case.caption for case in cases]


def test_more_captions_than_combinations_walk_through_the_table_again():
    rows = [tuple(case.row.tolist()) for case in scoring.make_cases(600) if case.held_out]
    assert len(rows) == 300 and set(rows) == set(map(tuple, combinations(True).tolist()))


@pytest.mark.parametrize(("right", "total"), [(9, 10), (340, 400), (1, 3), (0, 20), (5, 5)])
def test_intervals_are_wilsons(right, total):
    """Their ends are the true shares whose normal 95 % region just reaches what was measured."""
    share = right / total
    low, high = scoring.interval(right, total)
    assert low <= share <= high
    for end in (low, high):
        assert abs(share - end) == pytest.approx(1.959964 * np.sqrt(end * (1 - end) / total), abs=1e-9)


def test_the_score_counts_each_attribute_and_all_four_by_part():
    cases = scoring.make_cases(40)
    readings = [obedient(case) for case in cases]
    readings[0] = readings[0]._replace(shape=None)  # a seen one
    readings[1] = readings[1]._replace(colour="pink", motion=None)  # a held-out one
    made = scoring.score(cases, readings)
    right = {part: {name: shares[name].right for name in scoring.COLUMNS} for part, shares in made.items()}
    assert list(right["all"].values()) == [39, 39, 39, 40, 38]
    assert list(right["seen"].values()) == [20, 19, 20, 20, 19]
    assert list(right["held out"].values()) == [19, 20, 19, 20, 19]
    assert made["seen"]["shape"].total == 20


def test_controls_of_an_obedient_model_are_zero_and_chance():
    cases = scoring.make_cases(400)
    controls = scoring.score_controls(cases, [obedient(case) for case in cases])
    assert all(share.right == 0 for share in controls["all differ"].values())
    for name in READ:
        share = controls["random"][name]
        # four standard deviations of 400 draws; values are not quite alike, as no object has its background's colour
        assert abs(share.right / share.total - controls["expected"][name]) < 0.09
    assert controls["expected"]["shape"] == 0.25


class Painter:
    """A pipeline that paints the right clip, or for every third seed another case's."""

    def __init__(self, cases):
        self.rows = {case.caption: case.row for case in cases}
        self.other = cases[0].row
        self.make = jax.jit(lambda key, row: make_clip(draw_attributes(key, row, two_objects=0.0), key))
        self.calls = []

    def __call__(self, prompt, seed, **settings):
        self.calls.append((len(prompt), settings))
        rows = [self.other if s % 3 == 2 else self.rows[p] for p, s in zip(prompt, seed, strict=True)]
        frames = [np.asarray(self.make(jax.random.key(s), row)) for row, s in zip(rows, seed, strict=True)]
        return SimpleNamespace(frames=np.stack(frames))

    def encode(self, frames):
        return np.asarray(frames)

    decode = encode


@pytest.fixture
def painter(script, monkeypatch):
    pipe = Painter(scoring.make_cases(14))
    monkeypatch.setattr(script, "WanPipeline", SimpleNamespace(from_pretrained=lambda *_, **__: pipe))
    monkeypatch.setattr(script, "check_reader", lambda count, *_, **__: scoring.check_reader(4))
    return pipe


def test_the_script_writes_table_numbers_and_contact_sheet(script, painter, tmp_path, capsys):
    out = tmp_path / "new" / "folder"
    flags = ["--captions", "14", "--batch", "6", "--sheet", "5", "--guidance-scale", "4", "--check-reader"]
    assert script.main(["--model", "somewhere", "--output", str(out), *flags]) == 0
    assert painter.calls == [(6, {"guidance_scale": 4.0})] * 3
    results = json.loads((out / "results.json").read_text())
    assert len(results["clips"]) == 14 and set(results["reader"]) == {"rendered", "reconstructed"}
    # of the seeds 0 to 13, those that leave 2 when divided by 3 show another clip
    assert results["score"]["all"]["all four"]["right"] == 10
    assert results["score"]["all"]["all four"]["share"] == pytest.approx(10 / 14)
    assert all(c["read"] == c["wanted"] for c in results["clips"] if c["seed"] % 3 != 2)
    table = (out / "results.md").read_text()
    assert "| held out (7) | " in table and "71.4 % (45.4-88.3)" in table
    assert table.strip() in capsys.readouterr().out
    sheet = Image.open(out / "contact_sheet.png").convert("RGB")
    assert sheet.size == (2 * (5 * 98 + 10), 3 * 98)
    bars = [sheet.getpixel((2 + i % 2 * 500, 30 + i // 2 * 98)) for i in range(5)]
    assert bars == [script.RED if i % 3 == 2 else script.GREEN for i in range(5)]


def test_a_sweep_scores_one_setting_at_a_time(script, painter, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "SWEEP", {"guidance_scale": (1.0, 7.0), "sampler": ("euler",)})
    flags = ["--captions", "8", "--batch", "8", "--num-inference-steps", "6", "--sweep"]
    assert script.main([*flags, "--output", str(tmp_path)]) == 0
    changed = [{}, {"guidance_scale": 1.0}, {"guidance_scale": 7.0}, {"sampler": "euler"}]
    assert [settings for _, settings in painter.calls] == [{"num_inference_steps": 6} | cell for cell in changed]
    rows = json.loads((tmp_path / "sweep.json").read_text())
    assert [row["settings"] for row in rows] == [settings for _, settings in painter.calls]
    assert all(row["score"]["all four"]["right"] == 6 for row in rows)  # seeds 2 and 5 show another clip
    assert len((tmp_path / "sweep.md").read_text().splitlines()) == 2 + 4


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--captions", "1"], "at least 2"),
        (["--captions", "4", "--batch", "0"], "--batch 0"),
        (["--captions", "4", "--model", "/nonexistent"], "nonexistent"),
    ],
)
def test_bad_input_is_one_sentence(script, monkeypatch, tmp_path, capsys, flags, message):
    monkeypatch.setattr(script, "check_reader", lambda *_, **__: {})
    assert script.main([*flags, "--output", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_reader_that_fails_its_check_scores_nothing(script, painter, monkeypatch, tmp_path, capsys):
    def fail(*_, **__):
        return scoring.check_reader(4, through=lambda frames: 0 * frames)

    monkeypatch.setattr(script, "check_reader", fail)
    assert script.main(["--captions", "4", "--output", str(tmp_path)]) == 1
    assert "nothing is scored" in capsys.readouterr().err
    assert painter.calls == []
