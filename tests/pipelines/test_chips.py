"""Chips by name, kind and memory, and what leaves a host of the collectives of a mesh, counted by hand."""

import pytest

from jaxwan.flops import Sent
from jaxwan.pipelines.chips import CHIPS, LINKS, Link, Machine, find_chip, find_link
from jaxwan.sharding.mesh import AXES, MeshSpec

GB = 10**9


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "H100"), ("NVIDIA H200", "H200"), ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"), ("NVIDIA GeForce RTX 5090", "RTX 5090"),
        ("TPU v5 lite", "TPU v5e"), ("TPU v6 lite", "TPU v6e"), ("cpu", "CPU"),
    ],
)  # fmt: skip
def test_chips_are_known_by_what_jax_calls_them(kind, name):
    assert find_chip(None, kind, 10**9) == (CHIPS[name], True)
    assert find_chip(name.lower(), "NVIDIA H100") == (CHIPS[name], True)


@pytest.mark.parametrize(
    ("memory", "name"),
    [(16 * GB, "RTX 4090"), (32 * GB, "RTX 5090"), (48 * GB, "H100"), (80 * GB, "H100"), (192 * GB, "H200"),
     (None, "H100")],
)  # fmt: skip
def test_others_count_as_one_with_so_much_memory(memory, name):
    assert find_chip(None, "NVIDIA L40S", memory) == (CHIPS[name], False)


def test_what_the_table_has_not_is_refused():
    with pytest.raises(ValueError, match="chip 'H900' is not known: H100, H200"):
        find_chip("H900")
    with pytest.raises(ValueError, match="link 'rope' is not known: NVLink, "):
        find_link("rope")
    assert {chip.link for chip in CHIPS.values()} <= set(LINKS)


def test_float32_is_slower_where_products_are():
    h100, tpu = CHIPS["H100"], CHIPS["TPU v6e"]
    assert h100.rate(0.5, "float32") == h100.rate(0.5, "bfloat16") / 2 == 989e12 / 4
    assert tpu.rate(0.5, "float32") == tpu.rate(0.5, "bfloat16")


MIB = 2.0**20
NEAR, FAR = Link("near", 100 * MIB, 0.5, 0.25), Link("far", 10 * MIB, 1.0, 1.0)  # 50 and 10 MiB/s


@pytest.mark.parametrize(
    ("mesh", "kind", "axis", "among", "near", "far"),
    [
        # how many times 1 MiB a device sends over the nearest link, and all devices of a host out of it
        ("tp=4", "all-reduce", "tp", 4, 1, 0),  # all in a host
        ("pp=2,tp=4", "all-reduce", "tp", 4, 1, 0),
        ("pp=2,tp=4", "collective-permute", "pp", 2, 0, 4),  # every device has its like in the other host
        ("pp=8", "collective-permute", "pp", 8, 1, 1),  # the last of a host passes on to the next
        ("tp=8", "all-reduce", "tp", 8, 1, 1),
        ("sp=8", "all-to-all", "sp", 8, 3 / 7, 4 * 4 / 7),  # four of the seven others are in the other host
        ("sp=8", "all-to-all", "sp", 4, 1, 0),  # neighbours trade
        ("sp=8", "collective-permute", "sp", 2, 0, 4),  # and their groups pass on
        ("sp=8", "collective-permute", "sp", 4, 1, 2),  # of two each: both of a host's second group
        ("dp=2,cfg=2,tp=2", "all-reduce", "cfg", 2, 1, 0),
        ("pp=3,tp=2", "collective-permute", "pp", 3, 1, 2),  # a host of four and one of two
    ],
)  # fmt: skip
def test_what_leaves_a_host(mesh, kind, axis, among, near, far):
    machine = Machine(CHIPS["H100"], NEAR, FAR, per_host=4)
    sizes = dict(zip(AXES, MeshSpec.parse(mesh).sizes, strict=True))
    parts = {"all-reduce": 2 * (among - 1) / among, "all-to-all": (among - 1) / among, "collective-permute": 1}
    one = Sent(axis, kind, among, a_layer=1, a_tick=1, payload=int(MIB / parts[kind] / 3))
    sent = one.sent(2)  # 1 MiB in three collectives
    assert sent == pytest.approx(MIB, rel=1e-4)
    told = machine.seconds(sizes, one, 2)
    assert told == pytest.approx(max(near * sent / (50 * MIB) + 0.75, far and far * sent / (10 * MIB) + 3), rel=1e-9)
