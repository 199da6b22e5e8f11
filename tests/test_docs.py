"""Numbers in the docs that the program can work out."""

import re
from pathlib import Path

import pytest

from jaxwan.sharding.mesh import MeshSpec
from jaxwan.sharding.turns import deal

DOCS = Path(__file__).parents[1] / "docs"
ROWS = re.findall(
    r"^\| (\d+) \| `([\w=,]+)` \| ([\d.]+) \| ([\d.–]+) \| ([\d.]+) \|",
    (DOCS / "parallelism.md").read_text(),
    re.MULTILINE,
)


def test_the_table_of_meshes_is_found():
    assert len(ROWS) == 18 and {row[0] for row in ROWS} == {"1", "2", "4", "8"}


@pytest.mark.parametrize(("devices", "mesh", "weights", "one", "four"), ROWS)
def test_a_mesh_has_the_devices_weights_and_time_that_are_told(devices, mesh, weights, one, four):
    spec = MeshSpec.parse(mesh)
    assert (str(spec), spec.num_devices) == (mesh, int(devices))
    assert float(weights) == pytest.approx(57.2 / (spec.pp * spec.tp), abs=0.06)
    for videos, told in ((1, one), (4, four)):
        if spec.dp > videos:
            assert told == "–"
            continue
        dealt = deal([1 if spec.cfg > 1 else 2] * videos, ranks=spec.dp, stages=spec.pp)
        forwards = dealt.ticks([40] * videos) / (spec.pp * spec.sp * spec.tp * videos)
        assert float(told) == pytest.approx(forwards, abs=0.051)
