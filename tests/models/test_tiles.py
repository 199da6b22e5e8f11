"""Coding in tiles against Diffusers' `enable_tiling`, on any number of devices."""

import json
from dataclasses import asdict
from functools import cache
from typing import NamedTuple

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from oracle import relative_error

from jaxwan.config import VAEConfig
from jaxwan.convert.diffusers import VAE as RULES
from jaxwan.convert.files import TensorFiles
from jaxwan.convert.load import load_module
from jaxwan.models.tiles import Layout, TiledCoder, Tiling
from jaxwan.models.vae import VAE
from jaxwan.models.video_coder import VideoCoder
from jaxwan.sharding.space import strip_mesh

TOLERANCE = 1e-5  # the VAE's own, against diffusers; what is between tiles and none is 1e-1 or more

LEVELS = dict(base_dim=8, z_dim=4, num_res_blocks=1, dim_mult=[1, 2, 2], temperal_downsample=[True, True])
KINDS = {
    "2.1": LEVELS | dict(scale_factor_spatial=4),
    "2.2": LEVELS | dict(decoder_base_dim=12, is_residual=True, patch_size=2, in_channels=12, out_channels=12,
                         scale_factor_spatial=8),
}  # fmt: skip


class Case(NamedTuple):
    theirs: diffusers.AutoencoderKLWan
    vae: VAE
    cfg: VAEConfig

    def coder(self, devices=1):
        mesh = strip_mesh(jax.devices()[:devices])
        graph, state = nnx.split(self.vae)
        state = jax.device_put(state, NamedSharding(mesh, PartitionSpec()))
        return VideoCoder(nnx.merge(graph, state), mesh=mesh)


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """kind -> a random VAE on both sides."""

    @cache
    def make(kind):
        torch.manual_seed(0)
        theirs = diffusers.AutoencoderKLWan(**KINDS[kind], latents_mean=[0.1] * 4, latents_std=[1.5] * 4).eval()
        theirs.requires_grad_(False)
        theirs.quant_conv.weight.mul_(16)
        theirs.decoder.conv_out.weight.mul_(4)  # some pixels leave [-1, 1]
        folder = tmp_path_factory.mktemp("vae")
        theirs.save_pretrained(folder)
        cfg = VAEConfig.from_json(json.loads((folder / "config.json").read_text()))
        vae = load_module(lambda: VAE(cfg, rngs=nnx.Rngs(0)), TensorFiles.find(folder), RULES)
        return Case(theirs, vae, cfg)

    return make


def tiling_of(cfg, tile, stride):
    scale = cfg.scale_factor_spatial
    return Tiling(*(n * scale for n in (*tile, *stride)))


def channels_first(x):
    return torch.from_numpy(np.moveaxis(x, -1, 1).copy())


def video(case, direction, frames, size):
    """(ours, theirs) of a random input, `size` in latents."""
    rng, scale, statistics = np.random.default_rng(0), case.cfg.scale_factor_spatial, (np.float32(0.1), np.float32(1.5))
    if direction == "encode":
        x = rng.uniform(-1, 1, (1, 4 * frames - 3, *(n * scale for n in size), 3)).astype(np.float32)
        mean = case.theirs.encode(channels_first(x)).latent_dist.mode().numpy()
        return x, (np.moveaxis(mean, 1, -1) - statistics[0]) / statistics[1]
    z = rng.normal(size=(1, frames, *size, 4)).astype(np.float32)
    return z, np.moveaxis(case.theirs.decode(channels_first(z * statistics[1] + statistics[0])).sample.numpy(), 1, -1)


# in latents; at the ends are thin tiles, beside others that end where they do
FRAMES, SIZE, TILE, STRIDE = 2, (7, 9), (4, 5), (3, 3)
ALL = [(kind, direction, devices) for kind in KINDS for direction in ("decode", "encode")
       for devices in (1, 3, 8)]  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "direction", "devices"),
    [
        ("2.2", "decode", 3), ("2.2", "encode", 8),  # of 2.1, see tests/pipelines/test_parts.py
        *(pytest.param(*some, marks=pytest.mark.slow) for some in ALL),
    ],
)  # fmt: skip
def test_tiles_on_any_devices_equal_diffusers_tiles(case, kind, direction, devices):
    case = case(kind)
    tiling = tiling_of(case.cfg, TILE, STRIDE)
    case.theirs.enable_tiling(*asdict(tiling).values())
    x, expected = video(case, direction, FRAMES, SIZE)
    made = getattr(TiledCoder(case.coder(devices), tiling), direction)(x)
    assert relative_error(made, expected) < TOLERANCE
    if direction == "decode":
        assert 0.001 < (np.abs(made) == 1).mean() < 0.5  # clamped, after they were blended


def test_results_have_the_same_bits_on_any_devices(case):
    case = case("2.2")
    tiling, (z, _) = tiling_of(case.cfg, TILE, STRIDE), video(case, "decode", FRAMES, SIZE)
    made = [TiledCoder(case.coder(devices), tiling).decode(z) for devices in (3, 8)]
    np.testing.assert_array_equal(*made)
    in_8_bits = np.concatenate(list(TiledCoder(case.coder(3), tiling).decode_chunks(z, "uint8")), axis=1)
    np.testing.assert_array_equal(in_8_bits, ((made[0] * 0.5 + 0.5) * 255).round().astype(np.uint8))


def test_what_is_no_larger_than_a_tile_is_coded_as_a_whole_and_so_is_it_in_diffusers(case):
    case = case("2.1")
    coder = TiledCoder(case.coder(), tiling_of(case.cfg, (2, 3), (2, 2)))
    case.theirs.enable_tiling(*asdict(coder.tiling).values())
    x, expected = video(case, "decode", 1, (2, 3))
    made = coder.decode(x)
    assert np.array_equal(made, case.coder().decode(x)) and relative_error(made, expected) < TOLERANCE
    names = [[name for name, *_ in some.programs("decode", x.shape)] for some in (coder, case.coder())]
    assert names[0] == names[1] == ["VAE decode, first frame", "8 bits, first frame"]


def test_what_the_vae_cannot_code_is_refused_as_without_tiles(case):
    coder = TiledCoder(case("2.1").coder(), tiling_of(case("2.1").cfg, TILE, STRIDE))
    with pytest.raises(ValueError, match="num_frames=2 is not 4k\\+1"):
        coder.encode_chunks(jnp.zeros((1, 2, 64, 64, 3)))
    with pytest.raises(ValueError, match="latents have 3 channels, and this VAE's have 4"):
        coder.decode_chunks(jnp.zeros((1, 1, 8, 8, 3)))


# Where tiles lie


def test_tiles_of_720p():
    layout = Tiling().layout(VAEConfig(), "decode", (90, 160))
    spans = layout.spans(8)
    assert layout.counts == (4, 7) and len(spans) == 28 and layout.largest == (32, 32)
    assert spans[8] == (slice(192, 448), slice(192, 448))
    assert spans[-1] == (slice(576, 720), slice(1152, 1280))
    assert [layout.rounds(devices) for devices in (1, 3, 8)] == [28, 10, 4]
    assert Tiling().layout(VAEConfig(), "decode", (20, 160)).largest == (20, 32)


def test_the_encoder_of_the_2_2_kind_sees_tiles_of_twice_the_side():
    cfg = VAEConfig(is_residual=True, patch_size=2, in_channels=12, out_channels=12, scale_factor_spatial=16)
    assert Tiling().layout(cfg, "decode", (44, 80)) == Layout((44, 80), (16, 16), (12, 12))
    assert Tiling().layout(cfg, "encode", (44, 80)) == Layout((44, 80), (32, 32), (24, 24))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (dict(stride_height=300), "stride_height=300 leaves gaps between tiles of 256: it may be 128 to 256 pixels"),
        (dict(stride_width=100), "stride_width=100 makes overlaps longer than itself with tiles of 256: it may be 128"),
        (dict(stride_height=0), "stride_height=0 must be a whole number of pixels from 1"),
        (dict(tile_width=True), "tile_width=True must be a whole number of pixels from 1"),
    ],
)
def test_tiles_that_do_not_meet_are_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        Tiling(**arguments)


def test_tiles_are_of_whole_latents():
    Tiling(64, 96, 48, 48).check(VAEConfig())
    for wrong, words in (
        (Tiling(100, 8, 96, 8), "tile_height=100 is no multiple of 8, the pixels of a latent: nearest are 96 and 104"),
        (Tiling(8, 8, 8, 4), "stride_width=4 is no multiple of 8, the pixels of a latent: nearest is 8"),
    ):
        with pytest.raises(ValueError, match=words):
            wrong.check(VAEConfig())


def test_a_tiling_is_read_from_plain_values():
    assert Tiling.parse(None) is None and Tiling.parse(Tiling()) == Tiling()
    assert Tiling.parse(asdict(Tiling(64, 64, 48, 48))) == Tiling(64, 64, 48, 48)
    for wrong in (True, 256, {"tile": 256}):
        with pytest.raises(ValueError, match="is no jaxwan.Tiling, nor a dict of tile_height, tile_width, stride_"):
            Tiling.parse(wrong)
