"""Estimates beside measurements, and efficiencies that are found again."""

from dataclasses import replace
from unittest import mock

import pytest

from jaxwan.bench import mesh_plan as module
from jaxwan.bench.child import measure
from jaxwan.bench.item import Item
from jaxwan.bench.mesh_plan import fit
from jaxwan.bench.presets import SMALL
from jaxwan.pipelines.chips import CHIPS
from jaxwan.pipelines.plan import Tick
from jaxwan.sharding.mesh import MeshSpec

TICKS = [Tick(8.0, 0.0), Tick(4.0, 1.0), Tick(4.0, 0.1), Tick(2.0, 2.0)]


@pytest.mark.parametrize(("computing", "sending"), [(1.0, 1.0), (1.25, 3.0), (0.8, 0.5)])
def test_what_takes_longer_than_expected_is_found_again(computing, sending):
    measured = [computing * a + sending * b for a, b in TICKS]
    assert fit(TICKS, measured) == pytest.approx((computing, sending))


def test_links_are_not_told_where_they_explain_nothing():
    assert fit([Tick(8.0, 0.0), Tick(4.0, 0.0)], [16.0, 8.0]) == pytest.approx((2.0, 0.0))
    computing, sending = fit(TICKS, [16.0, 7.0, 8.0, 3.0])  # sooner where more is sent
    assert sending == 0 and 1.5 < computing < 2


def test_meshes_are_measured_beside_what_is_expected_of_them():
    """Every step of which takes a second: a tick is that divided by the period."""
    small = replace(SMALL.with_layers(2), size=(5, 64, 64))
    meshes = tuple(map(MeshSpec.parse, ("pp=1", "cfg=2", "tp=3")))
    with (
        mock.patch.object(module, "MESHES", meshes), mock.patch.object(module, "Denoising"),
        mock.patch.object(module, "seconds_of_steps", lambda side, runs: [1.0] * runs),
    ):  # fmt: skip
        one, cfg, tp, told = measure(Item("mesh-plan", small, runs=2))
    assert [row.name for row in (one, cfg, tp, told)] == [
        f"mesh-plan/small/{n}" for n in ("pp=1", "cfg=2", "tp=3", "fit")
    ]
    assert tp.status == "skipped" and one.seconds == cfg.seconds == [1.0, 1.0]
    # two guided videos are four ticks a step of one device, and two of two, which share the cores
    assert one.details["a tick, measured s"] == 1 / 4 and cfg.details["a tick, measured s"] == 1 / 2
    assert cfg.details["against one device, measured"] == 2
    assert 2 < cfg.details["against one device, expected"] < 3
    assert told.details["chip"] == "CPU" and told.details["dit in the table"] == CHIPS["CPU"].dit
