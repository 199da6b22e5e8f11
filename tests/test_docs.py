"""Numbers in the docs are what the program works out."""

import re
from functools import cache
from pathlib import Path

import pytest
from published import write_configs
from situations import chips_table, links_table, plans_table

from jaxwan.pipelines.call import make_job
from jaxwan.pipelines.checkpoint import read_checkpoint
from jaxwan.pipelines.dry_run import make_report
from jaxwan.sharding.mesh import MeshSpec
from jaxwan.sharding.turns import deal

DOCS = Path(__file__).parents[1] / "docs"
ROW = r"^\| (\d+) \| `([\w=,]+)` \| ([\d.]+) \| ([\d.–]+) \| ([\d.]+) \| ([\d.–]+) \| ([\d.–]+)"
ROWS = re.findall(ROW, (DOCS / "parallelism.md").read_text(), re.MULTILINE)


@pytest.fixture(scope="module")
def job_of(tmp_path_factory):
    """A14B and a call of one video at its official size."""
    checkpoint = read_checkpoint(write_configs(tmp_path_factory.mktemp("configs"), "Wan2.2-T2V-A14B"))
    return checkpoint, make_job(checkpoint, prompt="a", seed=0)


def test_the_table_of_meshes_is_found():
    assert len(ROWS) == 18 and {row[0] for row in ROWS} == {"1", "2", "4", "8"}


@pytest.mark.parametrize(("devices", "mesh", "weights", "one", "four", "sent", "share"), ROWS)
def test_what_a_mesh_holds_takes_and_sends(job_of, devices, mesh, weights, one, four, sent, share):
    spec, told = MeshSpec.parse(mesh), make_report(job_of[0], MeshSpec.parse(mesh), job_of[1], device_memory=10**12)
    assert (str(spec), spec.num_devices) == (mesh, int(devices))
    assert float(weights) == pytest.approx(57.2 / (spec.pp * spec.tp), abs=0.06)
    forward = spec.pp * spec.sp * spec.tp  # ticks
    assert one == "–" if spec.dp > 1 else float(one) == pytest.approx(told.ticks / forward, abs=0.051)
    four_dealt = deal([1 if spec.cfg > 1 else 2] * 4, ranks=spec.dp, stages=spec.pp)
    assert float(four) == pytest.approx(four_dealt.ticks([40] * 4) / forward / 4, abs=0.051)
    gigabytes = sum(way["bytes"] for way in told.sent.values()) / 1e9
    if spec.num_devices > 1:
        assert float(sent) == pytest.approx(gigabytes, abs=0.051)
        assert float(share) == pytest.approx(100 * gigabytes / 450 / (told.device_tflop / 790), abs=0.051)


def test_the_tables_of_plans_are_what_the_planner_says(monkeypatch, tmp_path_factory):
    monkeypatch.setenv("XLA_CLIENT_MEM_FRACTION", "0.92")
    made = cache(lambda name: read_checkpoint(write_configs(tmp_path_factory.mktemp("configs"), name)))
    text = (DOCS / "mesh_plans.md").read_text()
    for table in (plans_table(made), chips_table(), links_table()):
        assert table in text, table
