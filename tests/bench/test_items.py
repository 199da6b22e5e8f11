"""What the benchmark measures: the published models, by rows that can be believed."""

from dataclasses import replace
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from published import write_configs

from jaxwan.bench import items
from jaxwan.bench.items import Item, make_items, measure
from jaxwan.bench.measure import POOL, random_state, seconds_of, sustained
from jaxwan.bench.presets import FULL_SIZE, PRESETS, SMALL
from jaxwan.models.transformer import WanTransformer
from jaxwan.pipelines.checkpoint import read_checkpoint


@pytest.mark.parametrize(
    ("preset", "published"),
    [
        ("t2v-a14b-720p", "Wan2.2-T2V-A14B"),
        ("t2v-a14b-480p", "Wan2.2-T2V-A14B"),
        ("ti2v-5b-704p121", "Wan2.2-TI2V-5B"),
        ("t2v-1.3b-480p", "Wan2.1-T2V-1.3B"),
    ],
)
def test_presets_are_the_published_models(tmp_path, preset, published):
    preset, checkpoint = PRESETS[preset], read_checkpoint(write_configs(tmp_path, published))
    assert preset.transformer == checkpoint.transformer
    assert preset.text_encoder == checkpoint.text_encoder
    statistics = {name: getattr(preset.vae, name) for name in ("latents_mean", "latents_std")}
    assert preset.vae == replace(checkpoint.vae, **statistics)
    assert preset.experts == checkpoint.num_experts and preset.steps == checkpoint.defaults.num_inference_steps
    assert preset.first_frame == ("TI2V" in published)
    if preset.name != "t2v-a14b-480p":
        d = checkpoint.defaults
        assert preset.size == (d.num_frames, d.height, d.width)


def test_everything_is_measured_in_the_order_of_its_worth():
    names = [item.name for item in make_items("all", [PRESETS[name] for name in FULL_SIZE])]
    assert names[:4] == [
        "ceilings/t2v-a14b-720p", "attention/t2v-a14b-720p/cudnn", "attention/t2v-a14b-720p/xla", "dit/t2v-a14b-720p",
    ]  # fmt: skip
    # 1.3B's VAE at 480p is A14B's
    assert [name for name in names if name.startswith("vae") and name.endswith("float32")] == [
        "vae/t2v-a14b-720p/float32", "vae/t2v-a14b-480p/float32", "vae/ti2v-5b-704p121/float32",
    ]  # fmt: skip
    assert names[-1] == "pipeline/t2v-a14b-720p" and len(set(names)) == len(names)


def test_a_full_size_preset_is_skipped_on_a_cpu():
    (row,) = measure(Item("dit", PRESETS["t2v-a14b-720p"]), 1)
    assert row.status == "skipped" and "--preset small is for a CPU" in row.reason


def test_a_model_with_timesteps_for_every_frame_is_measured():
    (row,) = measure(Item("dit", replace(SMALL, first_frame=True, experts=1, sustain=0.01)), 2)
    assert row.status == "ok" and len(row.seconds) == 2 and row.ceiling > 0
    assert row.tflop == pytest.approx(SMALL.forward.total / 1e12, rel=1e-2)


def test_a_wrong_attention_is_no_measurement():
    for wrong in (lambda q, k, v, **_: 1.05 * items.attend(q, k, v), lambda q, k, v, **_: q * jnp.nan):
        with mock.patch.object(items, "attention", wrong):
            (row,) = measure(Item("attention", SMALL, "xla"), 1)
        assert row.status == "failed" and "wrong result" in row.reason and not row.seconds


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
