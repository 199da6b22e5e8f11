"""Meshes against one device: what is expected by hand, and rows that say when they are not to be believed."""

import os
from dataclasses import replace
from pathlib import Path
from unittest import mock

import jax
import numpy as np
import pytest

from jaxwan.bench import mesh as module
from jaxwan.bench.child import measure
from jaxwan.bench.item import Item
from jaxwan.bench.mesh import Segment, busy_seconds, expected, find_cores, segment
from jaxwan.bench.presets import PRESETS, SMALL
from jaxwan.sharding.mesh import MeshSpec

LESS = replace(SMALL.with_layers(2), experts=2)
PP, TP = MeshSpec(pp=2), MeshSpec(tp=2)
QUIET, LOUD = Segment(1.0, 1.0, 0.0), Segment(8.0, 1.0, 0.7)  # the same work


@pytest.fixture
def meshes(monkeypatch):
    """One that the program takes, and one that it refuses."""

    def check(spec, checkpoint):
        if spec != PP:
            raise ValueError("heads do not divide")

    monkeypatch.setattr(module, "MESHES", [PP, TP])
    monkeypatch.setattr(module, "check_mesh", check)


def test_what_to_expect_is_the_work_over_the_largest_share():
    preset = PRESETS["pair"]
    d, tokens, layers, ends = 256, 1024, 4, preset.forward.ends
    linear = tokens * (12 * d * d + 4 * d * 1024) + 512 * 4 * d * d
    forward = layers * (linear + 4 * tokens * tokens * d + 4 * tokens * 512 * d) + ends
    hidden = 4 * tokens * d  # bytes; a core does 20 FLOPs meanwhile
    by_hand = {
        PP: forward / ((forward - ends) / 2 + ends + 20 * hidden),
        MeshSpec(dp=2): 2,
        MeshSpec(cfg=2): forward / (forward / 2 + 20 * 4 * 2 * 32 * 64 * 16 / 2),
        MeshSpec(sp=2): forward / ((forward + 4 * 512 * 4 * d * d) / 2 + 20 * 4 * hidden),
        TP: forward / ((forward - ends) / 2 + ends + 20 * 12 * hidden),
    }
    for spec, times in by_hand.items():
        assert expected(preset, spec) == pytest.approx(times, rel=2e-3), spec
        assert 1.8 < times <= 2


def test_a_mesh_is_measured_on_the_same_work_and_one_that_is_refused_is_a_row(meshes):
    with mock.patch.object(module, "keep_all_threads_to") as keep:
        told, pp, tp = measure(Item("mesh", LESS, runs=2))
    assert told.name == "mesh/small/expected" and list(told.details) == ["pp=2", "tp=2"]
    assert tp.name == "mesh/small/tp=2" and tp.status == "skipped" and "refuses it: heads do not divide" in tp.reason
    if len(find_cores()) < 2:
        return
    assert pp.name == "mesh/small/pp=2" and pp.status == "ok" and 1 <= len(pp.seconds) <= 2
    assert pp.details["relative difference"] < 1e-5 and pp.details["times sooner"] > 0
    assert pp.tflop == pytest.approx(4 * LESS.forward.total / 1e12)
    first, second = find_cores()
    before = sorted(os.sched_getaffinity(0))
    assert [call.args[0] for call in keep.call_args_list] == [[first], [first, second]] * 2 + [before]


class Still(module.Denoising):
    """Denoising without denoising: on a mesh the velocity is `differ` larger."""

    differ, tflop = 0.0, 1.0

    def __init__(self, preset, spec, runs):
        self.velocity = np.ones(3) + Still.differ * (spec != MeshSpec())

    def begin(self):
        return mock.Mock(module.Loop, velocities=lambda: self.velocity)


@pytest.fixture
def still(monkeypatch, meshes):
    """Measuring takes no time, and no cores."""
    monkeypatch.setattr(module, "Denoising", Still)
    monkeypatch.setattr(module, "find_cores", lambda: [0, 1])
    monkeypatch.setattr(module, "keep_all_threads_to", mock.Mock())
    monkeypatch.setattr(Still, "differ", 0.0)


@pytest.mark.parametrize(
    ("pairs", "times", "quiet"),
    [
        ([QUIET, QUIET._replace(seconds=0.5), LOUD, LOUD], 2.0, "1 of 2"),
        ([QUIET, LOUD._replace(seconds=0.5), LOUD, QUIET], 5.0, "0 of 2"),
    ],
)
def test_steps_during_which_others_worked_are_left_out_or_it_is_said(monkeypatch, still, pairs, times, quiet):
    monkeypatch.setattr(module, "segment", mock.Mock(side_effect=pairs))
    _, row, _ = measure(Item("mesh", LESS, runs=2))
    assert row.details["times sooner"] == times and row.details["quiet"] == quiet
    assert row.details["at most, by cpu seconds"] == 2 * 1.0 / 1.0
    told = row.details.get("not to be trusted")
    assert told == (None if quiet == "1 of 2" else "others took 0.7 cores")


@pytest.mark.parametrize("differ", [0.01, np.nan])
def test_another_result_is_no_measurement(monkeypatch, still, differ):
    monkeypatch.setattr(Still, "differ", differ)
    *_, row = measure(Item("mesh", LESS, runs=1))
    assert row.status == "failed" and "mesh pp=2 computes something else" in row.reason


def test_a_single_core_is_told_and_nothing_measured(monkeypatch, still):
    monkeypatch.setattr(module, "find_cores", lambda: [0])
    _, row = measure(Item("mesh", LESS))
    assert row.status == "skipped" and row.reason == (
        "two cores that its threads can be kept to are needed, and there are fewer"
    )


def test_two_accelerators_are_measured_as_they_are(monkeypatch, still):
    monkeypatch.setattr(module.jax, "default_backend", lambda: "gpu")
    _, row, _ = measure(Item("mesh", LESS, runs=1))
    assert row.status == "ok" and "quiet" not in row.details
    assert module.keep_all_threads_to.call_count == 1  # as before
    devices = jax.devices()[:1]
    monkeypatch.setattr(module.jax, "devices", lambda: devices)
    _, alone = measure(Item("mesh", LESS))
    assert alone.status == "skipped" and alone.reason == "two devices are needed, and there are fewer"


def test_threads_are_put_on_cores_by_themselves_and_others_work_is_what_is_left(monkeypatch):
    stat = "cpu  9 9 9 9\ncpu0 100 10 20 1000 500 3 2 15 7 7\ncpu1 200 0 0 900 0 0 0 0 0 0\nintr 5\n"
    monkeypatch.setattr(Path, "read_text", lambda self: stat)
    monkeypatch.setattr(Path, "exists", lambda self: str(self) == "/proc/stat")
    monkeypatch.setattr(os, "sysconf", lambda name: 100)
    assert busy_seconds([0]) == pytest.approx(1.5)  # with what a host took, without waiting
    assert busy_seconds([0, 1]) == pytest.approx(3.5)
    assert busy_seconds(None) == 0
    counts, clock = iter([5.0, 8.0]), {"process_time": iter([1.0, 2.5]), "perf_counter": iter([0.0, 2.0])}
    monkeypatch.setattr(module, "busy_seconds", lambda cores: next(counts))
    monkeypatch.setattr(module, "time", mock.Mock(**{name: lambda v=v: next(v) for name, v in clock.items()}))
    kept = []
    monkeypatch.setattr(
        module.os, "sched_setaffinity", lambda thread, cores: kept.append((thread, cores)), raising=False
    )
    monkeypatch.setattr(module.os, "listdir", lambda folder: ["7", "9"])
    assert segment(lambda: None, [3]) == Segment(2.0, 1.5, 0.75)
    assert kept == [(7, [3]), (9, [3])]
