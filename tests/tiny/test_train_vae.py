"""The bundled model's VAE trainer on a smaller VAE: how it starts, that it learns, what it writes."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxwan.config import VAEConfig
from jaxwan.tiny import train_vae
from jaxwan.tiny.train_vae import (
    Plan,
    draw_crops,
    encode,
    export,
    initial_state,
    load_vae,
    make_phases,
    reconstruct,
)
from jaxwan.tiny.training import Saved, Saver, parameters, run
from jaxwan.tiny.vae_init import with_parameters

pytestmark = pytest.mark.slow  # trains, if little

CFG = VAEConfig(
    base_dim=8, dim_mult=(1, 2, 2), num_res_blocks=1, temperal_downsample=(True, True), scale_factor_spatial=4,
    latents_mean=(0.0,) * 16, latents_std=(1.0,) * 16,
)  # fmt: skip


FITTED = 64  # crops


@pytest.fixture(scope="module")
def crops():
    return jax.jit(draw_crops, static_argnums=(1, 2))(jax.random.key(7), FITTED + 32, 1)


@pytest.fixture(scope="module", autouse=True)
def drawn_once(crops):
    """Training and start see the first of `crops`, drawing among which compiles faster than painting."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_vae, "INIT_CROPS", FITTED)
        patch.setattr(train_vae, "draw_crops", lambda key, n, _: jax.random.choice(key, crops[:FITTED], (n,), False))
        patch.setattr(train_vae, "draw_clips", lambda key, n: jnp.tile(crops[:n], (1, 5, 1, 1, 1)))
        yield


@pytest.fixture(scope="module")
def begun(drawn_once):
    return initial_state(CFG)


def test_it_starts_in_the_current_frames_tap(begun):
    kernels = {path: k for path, k in begun.params.items() if path.endswith("kernel") and k.ndim == 5}
    assert len(kernels) > 20
    for path, kernel in kernels.items():
        if "time_conv" not in path:
            assert not kernel[:-1].any() and kernel[-1].any(), path


def test_it_starts_with_means_and_copies_in_time(begun):
    down = begun.params["encoder.down_blocks.1.time_conv.kernel"][:, 0, 0]
    up = begun.params["decoder.up_blocks.0.upsamplers.0.time_conv.kernel"][:, 0, 0]
    assert jnp.array_equal(down, jnp.array([0, 0.5, 0.5])[:, None, None] * jnp.eye(down.shape[-1]))
    assert jnp.array_equal(up, jnp.array([0, 0, 1])[:, None, None] * jnp.tile(jnp.eye(up.shape[1]), (1, 2)))


def test_it_starts_with_white_latents_and_a_picture(begun, crops):
    """What the fits leave of the pictures' variance; random weights leave more than all of it."""
    pixels = 2 * crops[FITTED:] - 1
    decoded, latents = jax.jit(lambda params: reconstruct(with_parameters(CFG, params), pixels))(begun.params)
    rows = latents.reshape(-1, CFG.z_dim)
    covariance = np.cov(rows, rowvar=False)
    assert np.abs(rows.mean(0)).max() < 0.3 and np.abs(covariance - np.eye(CFG.z_dim)).max() < 0.5  # of other crops
    assert ((decoded - pixels) ** 2).mean() < 0.5 * pixels.var()


def test_training_lowers_the_loss(begun, tmp_path):
    losses = []
    (phase,) = make_phases(1.0, CFG, [Plan("frames", 30, 1, 4, 5e-3, 1e-3)])

    def step(state, key, done):
        state, value = phase.step(state, key, done)
        losses.append(float(value))
        return state, value

    state = jax.tree.map(jnp.copy, begun)  # the step uses it up
    saved, is_done = run([phase._replace(step=step)], Saved(state), Saver(tmp_path))
    assert is_done and len(losses) == 30
    assert np.mean(losses[-5:]) < 0.75 * np.mean(losses[:5])
    restored = Saver(tmp_path).restore(begun)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool(jnp.array_equal(a, b)), restored.state, saved.state))


def test_crops_are_pictures_of_the_data_with_edges_in_them(crops):
    assert crops.min() >= 0 and crops.max() <= 1
    assert (crops.std(axis=(1, 2, 3)).max(-1) > 0.05).mean() > 0.6


def test_phases_go_from_frames_to_long_crops_at_falling_rates():
    plans = train_vae.PLANS
    assert [plan.frames for plan in plans] == [1, 5, 17]
    rates = [rate for plan in plans for rate in (plan.first_rate, plan.last_rate)]
    assert rates == sorted(rates, reverse=True) and rates[-1] == 0
    assert [phase.steps for phase in make_phases(0.1)] == [plan.steps // 10 for plan in plans]


@pytest.fixture(scope="module")
def exported(begun, tmp_path_factory):
    folder = tmp_path_factory.mktemp("vae")
    export(begun.average, folder, cfg=CFG, clips=16)
    return folder


def test_what_is_written_is_the_average_in_half_precision(begun, exported):
    vae = load_vae(exported)
    assert replace(vae.cfg, latents_mean=CFG.latents_mean, latents_std=CFG.latents_std) == CFG
    found = parameters(vae)
    assert found.keys() == begun.average.keys()
    for path, value in begun.average.items():
        assert jnp.array_equal(found[path], value.astype(jnp.float16).astype(jnp.float32)), path


def test_what_is_written_has_latents_of_zero_mean_and_unit_spread(exported, crops):
    vae = load_vae(exported)
    z = jax.jit(lambda x: encode(vae, x))(2 * crops[:16] - 1)  # the first frames of the clips it was measured on
    means, spreads = z.mean((0, 1, 2, 3)), z.std((0, 1, 2, 3))
    assert np.abs(means).max() < 0.5 and 0.5 < spreads.min() and spreads.max() < 2
    assert vae.cfg.latents_std != CFG.latents_std


def test_what_is_written_has_the_keys_of_diffusers(exported):
    from diffusers import AutoencoderKLWan

    assert json.loads((exported / "config.json").read_text())["_class_name"] == "AutoencoderKLWan"
    loaded = AutoencoderKLWan.from_pretrained(exported)
    assert loaded.config.latents_mean == list(load_vae(exported).cfg.latents_mean)


def test_a_latent_channel_that_is_all_but_dead_is_refused(begun, tmp_path, monkeypatch):
    std = np.ones(CFG.z_dim)
    std[5] = 0.09
    monkeypatch.setattr(train_vae, "latent_statistics", lambda vae, clips: (np.zeros(CFG.z_dim), std))
    with pytest.raises(ValueError, match="latent channel 5 has a standard deviation of 0.090"):
        export(begun.average, tmp_path / "vae", cfg=CFG)
    assert not (tmp_path / "vae").exists()


@pytest.fixture
def starts(monkeypatch):
    """What `train_vae` begins with on the small VAE: its training stops at once."""
    begun_with = []

    def stop_at_once(phases, saved, saver, **_):
        begun_with.append(saved)
        return saved, False

    monkeypatch.setattr(train_vae, "CONFIG", CFG)
    monkeypatch.setattr(train_vae, "run", stop_at_once)
    monkeypatch.setattr(train_vae, "judged_clips", lambda count: jnp.zeros((1, 1, 8, 8, 3)))
    return begun_with


def test_without_a_state_it_goes_on_from_what_was_written_with_the_last_phase(starts, begun, exported, tmp_path):
    assert not train_vae.train_vae(tmp_path, exported)
    assert starts[0].phase == len(train_vae.PLANS) - 1 and starts[0].state.step == 0
    path = "decoder.conv_out.kernel"
    assert jnp.allclose(starts[0].state.params[path], begun.average[path], atol=1e-3)


def test_a_state_comes_before_what_was_written(starts, begun, exported, tmp_path):
    Saver(tmp_path / "vae").save(Saved(begun._replace(step=jnp.int32(7)), phase=1, done=3))
    assert not train_vae.train_vae(tmp_path, exported)
    assert (starts[0].phase, starts[0].done, starts[0].state.step) == (1, 3, 7)
    assert jnp.array_equal(starts[0].state.params["quant_conv.bias"], begun.params["quant_conv.bias"])


def test_what_is_trained_and_written_stays(starts, begun, exported, tmp_path):
    """Written anew on other hardware it could differ in a digit, and clips encoded with it would be lost."""
    Saver(tmp_path / "vae").save(Saved(begun._replace(step=jnp.int32(7)), phase=len(train_vae.PLANS)))
    before = {path: path.read_bytes() for path in exported.iterdir()}
    assert train_vae.train_vae(tmp_path, exported) and starts == []
    assert {path: path.read_bytes() for path in exported.iterdir()} == before
