"""Measurements in this process, on tiny models: rows that can be believed."""

import shutil
from collections import namedtuple
from dataclasses import replace
from types import SimpleNamespace
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxwan.bench import blending, ceilings, convolutions, load
from jaxwan.bench.child import measure
from jaxwan.bench.dit import PROMPT_ROWS, make_entries
from jaxwan.bench.growth import AXES, points
from jaxwan.bench.item import Item
from jaxwan.bench.layers import slope
from jaxwan.bench.measure import POOL, compilations, random_state, seconds_in_turns, seconds_of, sustained
from jaxwan.bench.picture import draw_growth, growth_series, ticks
from jaxwan.bench.presets import MID, PRESETS, SMALL, TINY
from jaxwan.bench.profile import by_scope, operation_seconds
from jaxwan.bench.report import Row
from jaxwan.kernels.blend import blend
from jaxwan.models.causal_conv import FORMULATIONS, conv
from jaxwan.models.transformer import WanTransformer

LESS = replace(SMALL.with_layers(1), experts=1, sustain=0.01, matmul=64, load_bytes=2**21)


def test_a_full_size_preset_is_skipped_on_a_cpu():
    (row,) = measure(Item("dit", PRESETS["t2v-a14b-720p"]))
    assert row.status == "skipped" and "--preset small is for a CPU" in row.reason


def test_a_model_with_timesteps_for_every_frame_is_measured():
    tick, guided, predicted = measure(Item("dit", replace(LESS, first_frame=True), runs=2))
    assert tick.status == "ok" and len(tick.seconds) == 2 and tick.ceiling > 0
    assert [row.name for row in (tick, guided, predicted)] == [
        "dit/small",
        "dit/small/guided step",
        "dit/small/predict",
    ]
    assert guided.tflop == 2 * tick.tflop == 2 * predicted.tflop > 0


def test_both_experts_have_an_equal_share_of_the_steps():
    entry, other = make_entries(TINY, 4, videos=2)
    assert entry.inputs.controls.expert[:4].tolist() == [0, 0, 1, 1] and other.num_steps == entry.num_steps == 4
    text = entry.inputs.text
    assert text[..., PROMPT_ROWS - 1, :].any(-1).all() and not text[..., PROMPT_ROWS:, :].any()


def test_a_wrong_attention_is_no_measurement():
    for wrong in (lambda q, k, v, **_: 1.05 * ceilings.attend(q, k, v), lambda q, k, v, **_: q * jnp.nan):
        with mock.patch.object(ceilings, "attention", wrong):
            (row,) = measure(Item("attention", SMALL, "xla"))
        assert row.status == "failed" and "wrong result" in row.reason and not row.seconds


def test_blending_is_measured():
    (blended,) = measure(Item("blend", LESS, "xla", runs=2))
    assert blended.name == "blend/small/xla" and len(blended.seconds) == 2
    assert blended.details["tiles"] == "3x4x1x4x32x32x3"
    assert blended.details["relative error"] == 0 < blended.details["TB/s read and written"]
    (row,) = measure(Item("blend", LESS, "pallas"))
    assert row.status == "failed" and "interpret mode" in row.reason  # on a CPU a named kernel does not run

    def wrong(tiles, implementation=None, **how):
        return blend(tiles, **how) * (1 if implementation is None else 2)

    with mock.patch.object(blending, "blend", wrong):
        (row,) = measure(Item("blend", LESS, "xla"))
    assert row.status == "failed" and "wrong result" in row.reason


def test_a_convolution_is_measured_in_each_of_its_forms():
    found = convolutions.kinds(LESS)
    spatial, temporal = (max((kind for kind in found if kind.kernel[1] == size), key=found.get) for size in (3, 1))
    assert spatial.name == "3x3x3, 32-32, 3x8x12" and found[spatial] == 7 + 8  # encoder, decoder
    assert temporal.stride in ((1, 1), (2, 1))
    with mock.patch.object(convolutions, "kinds", lambda _: {spatial: 16}):
        rows = list(measure(Item("convolution", LESS, "bfloat16", runs=2)))
        assert [row.name.rpartition("/")[2] for row in rows] == list(FORMULATIONS)
        assert {row.status for row in rows} == {"ok"} and len({row.tflop for row in rows}) == 1
        assert rows[0].tflop == 2 * 8 * 12 * 27 * 32 * 32 / 1e12
        (usual,) = (row for row in rows if "chosen" in row.details)
        assert usual.name.endswith("/frames") and usual.details["chosen / this"] == 1

        def wrong(x, kernel, bias, form, **how):
            return conv(x, kernel, bias, form, **how) * (2 if form == "taps" else 1)

        with mock.patch.object(convolutions, "conv", wrong):
            (row,) = measure(Item("convolution", LESS, "float32"))
        assert row.status == "failed" and "as 'taps' differs by 1 from" in row.reason


def test_loading_is_measured_from_the_disk_and_from_memory():
    found = list(measure(Item("load", LESS, runs=1)))
    parts = [f"load/small/{layout}, {part}" for layout in load.LAYOUTS for part in ("from disk", "from the page cache")]
    assert [row.name for row in found] == parts
    disk = found[0]
    assert 0.5 < disk.details["GB"] / (LESS.load_bytes / 1e9) <= 1.1 < disk.details["layers"]
    assert disk.details["GB/s"] == pytest.approx(disk.details["GB"] / disk.median) and disk.memory["host_peak"] > 2**26
    assert all(row.details["GB/s of reading alone"] > 0 for row in found)


def test_a_checkpoint_that_does_not_fit_the_disk_is_not_made():
    usage = namedtuple("usage", "total used free")(2**30, 2**30, 10)
    with mock.patch.object(shutil, "disk_usage", lambda _: usage), mock.patch.object(load, "_files") as made:
        found = list(measure(Item("load", LESS)))
    assert [row.status for row in found] == ["skipped"] * len(load.LAYOUTS) and not made.called
    assert all("0.0 GB left (TMPDIR)" in row.reason for row in found)


def test_a_layer_is_a_quarter_of_what_four_more_of_them_take():
    assert slope([1.0, 2.0], [5.0, 2.0]) == [1.0, 0.0]


# The profile


def plane(name, *events):
    made = [SimpleNamespace(name=op, stats=[("hlo_op", op)] if op else [], duration_ns=ns) for op, ns in events]
    return SimpleNamespace(name=name, lines=[SimpleNamespace(events=made)])


def test_operations_are_summed_on_the_device_and_loops_around_them_are_not():
    host = plane("/host:CPU", ("dot.1", 5e9), ("", 7e9), ("while.2", 9e9), ("dot.1", 1e9), ("add.3", 2e9))
    assert operation_seconds([host]) == {"dot.1": 6.0, "add.3": 2.0}
    assert operation_seconds([host, plane("/device:GPU:0", ("gemm", 3e9))]) == {"gemm": 3.0}


def test_operations_belong_to_the_scope_of_the_model_that_they_come_from():
    named = {
        "dot.1": "jit(f)/while/body/mlp/dot_general",
        "fmha": "jit(f)/while/body/self_attention/x",
        "a": "jit(f)/a",
    }
    scopes = by_scope({"dot.1": 1.0, "fmha": 2.0, "a": 3.0, "unknown": 4.0}, named)
    assert scopes == {
        "self_attention": {"fmha": 2.0}, "cross_attention": {}, "mlp": {"dot.1": 1.0},
        "the rest": {"a": 3.0, "unknown": 4.0},
    }  # fmt: skip


# Growth


@pytest.mark.parametrize("preset", [SMALL, MID, PRESETS["ti2v-5b-704p121"]])
def test_each_axis_grows_alone_and_through_a_common_point(preset):
    varied = points(preset)
    assert tuple(varied) == AXES
    common = set.intersection(*(set(values.values()) for values in varied.values()))
    assert len(common) == 1
    for axis, values in varied.items():
        made = [point.preset(preset) for point in values.values()]
        assert len({m.tokens for m in made}) == (len(values) if axis == "frames" else 1)
        assert len({m.transformer.num_layers for m in made}) == (len(values) if axis == "layers" else 1)
    assert [p.preset(preset).size[0] for p in varied["frames"].values()] == list(varied["frames"])


def test_growth_is_a_picture_of_what_was_measured(tmp_path):
    from PIL import Image

    rows = [
        Row(f"growth/small/{axis} {n}", "ok", "", [0.01 * n], details={"axis": axis, "value": n})
        for axis in ("steps", "layers") for n in (4, 1, 2)
    ]  # fmt: skip
    rows += [Row("growth/small/frames 9", "failed", "no memory"), Row("dit/small", "ok", "", [1.0])]
    assert growth_series(rows) == dict.fromkeys(
        ("small: steps", "small: layers"), [(1.0, 0.01), (2.0, 0.02), (4.0, 0.04)]
    )
    path = draw_growth(rows, tmp_path)
    pixels = np.asarray(Image.open(path))
    assert path.name == "growth.png" and pixels.shape == (400, 1040, 3)
    line = (pixels == (0x1F, 0x5F, 0xBF)).all(-1)
    assert line[:, :520].sum() > 1000 and line[:, 520:].sum() == line[:, :520].sum()
    assert draw_growth(rows[-2:], tmp_path / "nowhere") is None


def test_a_scale_has_round_numbers():
    assert ticks(0.03, 0.6) == pytest.approx([0.05, 0.1, 0.2, 0.5])
    assert ticks(2.1, 2.2) == [pytest.approx(2.15, rel=1e-3)]


# Measuring


def test_random_weights_are_normal_with_the_variance_of_their_fan_in():
    cfg = SMALL.transformer
    abstract = nnx.eval_shape(lambda: WanTransformer(cfg, dtype=jnp.float32, rngs=nnx.Rngs(0)))
    state = random_state(nnx.state(abstract, nnx.PathContains("blocks")), lead=1)
    kernel = np.asarray(state["blocks"]["ffn"]["up"]["kernel"][...])
    assert kernel.shape == (cfg.num_layers, cfg.dim, cfg.ffn_dim)
    assert kernel.std(axis=(1, 2)) == pytest.approx([cfg.dim**-0.5] * cfg.num_layers, rel=0.02)
    rows = kernel.reshape(-1, cfg.ffn_dim)
    assert np.abs(np.corrcoef(rows) - np.eye(len(rows))).max() < 0.4  # no two rows are the same numbers
    assert (np.asarray(state["blocks"]["attn1"]["norm_q"]["scale"][...]) == 1).all()


def test_a_parameter_larger_than_the_pool_is_filled_to_its_end():
    state = nnx.State({"kernel": nnx.Param(jax.ShapeDtypeStruct((2, POOL), jnp.float32))})
    kernel = np.asarray(random_state(state)["kernel"][...])
    assert kernel.std() == pytest.approx(2**-0.5, rel=0.01) and np.count_nonzero(kernel) > 0.999 * kernel.size


def test_warm_ups_are_not_counted():
    calls = []
    assert len(seconds_of(lambda: calls.append(1), 3, warmups=2)) == 3 and len(calls) == 5
    assert 1 < len(sustained(lambda: sum(range(100)), 1e-4)) <= 500


def test_calls_in_turns_alternate():
    order = []
    seconds = seconds_in_turns({name: lambda name=name: order.append(name) for name in "ab"}, 2)
    assert "".join(order) == "ab" * 3 and {name: len(times) for name, times in seconds.items()} == {"a": 2, "b": 2}


def test_programs_are_counted_when_they_are_compiled_and_not_when_they_run():
    function, x = jax.jit(lambda x: x * 3 + 1), jnp.ones(7)
    with compilations() as first:
        function(x)
    with compilations() as second:
        function(x)
    assert len(first) == 1 and first[0] > 0 and second == []
