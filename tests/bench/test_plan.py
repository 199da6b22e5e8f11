"""What the benchmark measures: the published models, in the order of what is worth knowing."""

from dataclasses import replace

import pytest
from published import write_configs

from jaxwan import BUNDLED_MODEL
from jaxwan.bench.child import MEASUREMENTS
from jaxwan.bench.item import Item
from jaxwan.bench.plan import COMPARABLE, KINDS, make_items, predicted_seconds
from jaxwan.bench.presets import FULL_SIZE, MID, PRESETS, SMALL, TINY
from jaxwan.pipelines.checkpoint import read_checkpoint

FULL = [PRESETS[name] for name in FULL_SIZE]


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


def test_the_tiny_preset_is_the_bundled_model():
    bundled = read_checkpoint(BUNDLED_MODEL)
    assert (TINY.transformer, TINY.text_encoder, TINY.experts) == (bundled.transformer, bundled.text_encoder, 2)
    defaults = bundled.defaults
    assert TINY.size == (defaults.num_frames, defaults.height, defaults.width)
    assert TINY.steps == defaults.num_inference_steps
    statistics = {name: getattr(TINY.vae, name) for name in ("latents_mean", "latents_std")}
    assert replace(bundled.vae, **statistics) == TINY.vae


def test_the_mid_preset_has_layers_of_512_channels_and_4096_tokens():
    assert MID.transformer.dim == 512 and MID.tokens == 4096


def test_everything_is_measured_in_the_order_of_its_worth():
    names = [item.name for item in make_items("all", FULL)]
    assert names[:9] == [
        "ceilings/t2v-a14b-720p", *(f"attention/t2v-a14b-720p/{name}" for name in ("cudnn", "tpu", "xla")),
        *(f"dit/{name}" for name in FULL_SIZE), "block/t2v-a14b-720p",
    ]  # fmt: skip
    # 1.3B's VAE at 480p is A14B's
    assert names[9:13] == [
        "vae/t2v-a14b-720p/float32", "vae/t2v-a14b-480p/float32", "vae/ti2v-5b-704p121/float32", "e2e/t2v-a14b-720p",
    ]  # fmt: skip
    assert names[-1] == "growth/t2v-a14b-720p" and len(set(names)) == len(names)
    assert {name.split("/")[0] for name in names} == set(KINDS) - {"all", "flags", "mesh", "mesh-plan", "engine"}


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "all"])
def test_every_kind_has_a_measurement_and_a_predicted_cost(kind):
    assert kind in MEASUREMENTS
    for preset in (SMALL, FULL[0])[: 1 if kind == "engine" else 2]:  # whole loops by the dozen: of small models alone
        items = make_items(kind, [preset], runs=1, profile="folder")
        assert items and all(item.runs == 1 for item in items)
        for item in items:
            assert 4 < predicted_seconds(item) < (80 if preset is SMALL else 600)
            assert Item.from_json(item.to_json()) == item
            assert bool(item.profile) == (kind == "block")


def test_more_runs_and_a_rival_cost_more():
    one, more = (predicted_seconds(Item("dit", FULL[0], runs=runs)) for runs in (1, 3))
    assert more - one == pytest.approx(2 * FULL[0].forward.total / 1e12 / 500)
    assert predicted_seconds(Item("vae", SMALL, against="diffusers")) > 2 * predicted_seconds(Item("vae", SMALL))


def test_flags_are_tried_between_two_runs_without_one():
    forms = [item.form for item in make_items("flags", [SMALL], flags=("--xla_a=1", "--xla_b="))]
    assert forms == ["none", "--xla_a=1", "--xla_b=", "none again"]
    usual = [item.form for item in make_items("flags", FULL[:1])][1:-1]
    assert usual and all(flag.startswith("--xla_gpu_") and "=" in flag for flag in usual)


def test_what_diffusers_has_no_part_in_is_not_compared_with_it():
    assert {kind for kind in KINDS if kind != "all"} > set(COMPARABLE)
    with pytest.raises(ValueError, match="--against is for dit, vae, sampler, not for load"):
        make_items("load", [SMALL], against="diffusers")
