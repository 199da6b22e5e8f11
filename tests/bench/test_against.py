"""The comparison with Diffusers: the same work on both sides, in turns, and rows that say what cannot be compared."""

import os
from dataclasses import replace

import numpy as np
import pytest
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from jaxwan.bench import against, torch_side
from jaxwan.bench.against import Case, measure_against
from jaxwan.bench.item import Item
from jaxwan.bench.presets import SMALL
from jaxwan.bench.torch_side import COMPILED, EAGER, KERNELS, Side
from jaxwan.flops import vae_decode_flops, vae_encode_flops

ITEM = Item("dit", SMALL, against="diffusers", runs=2)


class Rival(against.Rival):
    """Answers as the other process would, at once: it takes 5 s for 2 layers and 13 s for 6."""

    facts = {"modes": [EAGER, COMPILED], "details": {"torch": "2"}}
    closed = False

    def __init__(self, _):
        self.order = []
        type(self).last = self

    def ask(self, verb, mode, case):
        self.order.append(f"theirs {case}" if verb == "run" else verb)
        if mode == COMPILED:
            raise RuntimeError("no compiler")
        details = {"attention": "flash"}
        seconds = 5.0 if case == "2 layers" else 13.0
        return {"compile_seconds": None, "peak": 100, "details": details} if verb == "prepare" else {"seconds": seconds}

    def close(self):
        self.closed = True


@pytest.fixture
def rows(monkeypatch):
    def cases(item):
        def case(name):
            return Case(lambda: (Rival.last.order.append(f"ours {name}"), np.zeros(1))[1], 2.0)

        return {name: case(name) for name in ("2 layers", "6 layers")}

    monkeypatch.setattr(against, "Rival", Rival)
    monkeypatch.setitem(against._CASES, "dit", cases)
    return {row.name.removeprefix("dit/small/against diffusers/"): row for row in measure_against(ITEM)}


def test_both_sides_run_in_turns(rows):
    turn = ["ours 2 layers", "theirs 2 layers", "ours 6 layers", "theirs 6 layers"]
    assert Rival.last.order == ["prepare"] * 2 + ["ours 2 layers", "ours 6 layers"] + turn * 2 + ["prepare"]
    assert Rival.last.closed


def test_a_layer_is_compared_by_slope(rows):
    theirs, ours = rows["eager/a layer/diffusers"], rows["eager/a layer/jaxwan"]
    assert theirs.seconds == [2.0, 2.0] and len(ours.seconds) == 2
    assert theirs.details["diffusers / jaxwan"] == pytest.approx(2.0 / ours.median)
    whole = rows["eager/6 layers/diffusers"]
    assert whole.details["diffusers / jaxwan"] == pytest.approx(13.0 / rows["eager/6 layers/jaxwan"].median)
    assert whole.details["attention"] == "flash" and whole.details["torch"] == "2" and whole.tflop == 2.0


def test_a_way_to_run_that_fails_is_a_row(rows):
    row = rows[COMPILED]
    assert row.status == "failed" and row.reason == "diffusers: no compiler"


def test_without_diffusers_the_row_says_so(tmp_path, monkeypatch):
    (tmp_path / "diffusers.py").write_text("raise ImportError(\"No module named 'diffusers'\")")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    (row,) = measure_against(ITEM)
    assert row.status == "skipped" and row.name == "dit/small/against diffusers"
    assert row.reason == "No module named 'diffusers': pip install torch diffusers"


@pytest.fixture
def one_thread(monkeypatch):
    """Threads of torch wait for each other at every operation, which takes long beside other tests."""
    monkeypatch.setattr(torch_side.os, "sched_getaffinity", lambda _: {0})


def flops(side, case):
    """Fused attention is not known to the counter."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        side.seconds(case)
    return counter.get_total_flops()


def test_both_sides_do_the_same_work(one_thread):
    """Counters find all taps in a video's first frame."""
    side = Side(ITEM, "float32", "cpu")
    assert set(side.cases) == {"2 layers", "6 layers", "4 layers"} and side.modes == [EAGER, COMPILED]
    for layers in (2, 6):
        told = SMALL.with_layers(layers).forward.total
        assert flops(side, f"{layers} layers") == pytest.approx(told, rel=1e-3)
    short = replace(SMALL, size=(5, 32, 32))
    side = Side(Item("vae", short, "float32", "diffusers"), "float32", "cpu")
    for name, told in (("decode", vae_decode_flops), ("encode", vae_encode_flops)):
        assert flops(side, name) == pytest.approx(told(short.vae, short.latent_shape, first_taps=3), rel=1e-2)
    assert side.modes == [EAGER]


def test_the_attention_that_ran_is_named(one_thread):
    side = Side(ITEM, "float32", "cpu")
    assert side.prepare(EAGER, "2 layers")["details"]["attention"] == "_scaled_dot_product_flash_attention_for_cpu"
    for kernel in ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16", "pytorch_flash::flash_fwd_kernel"):
        assert KERNELS.search(kernel)
    assert not KERNELS.search("aten::scaled_dot_product_attention") and not KERNELS.search("aten::linear")
