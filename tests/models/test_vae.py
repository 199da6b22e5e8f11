"""The VAE against diffusers' AutoencoderKLWan with random weights, both kinds."""

import json
from typing import NamedTuple

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from oracle import relative_error

from jaxwan.config import ConfigError, VAEConfig
from jaxwan.convert.diffusers import VAE as RULES
from jaxwan.convert.files import TensorFiles
from jaxwan.convert.load import flat_shapes, load_module
from jaxwan.convert.rules import plan
from jaxwan.models.vae import VAE, patchify, unpatchify
from jaxwan.models.video_coder import VideoCoder

# float32 sums in another order; an independent implementation reaches 7e-7, the least mistake costs 1e-3 or more.
TOLERANCE = 1e-5

KINDS = {
    "2.1": dict(base_dim=8, z_dim=4, num_res_blocks=2),
    "2.2": dict(base_dim=8, decoder_base_dim=12, z_dim=6, num_res_blocks=1, is_residual=True, patch_size=2,
                in_channels=12, out_channels=12, scale_factor_spatial=16),
}  # fmt: skip
OFFICIAL = {
    "2.1": dict(base_dim=96, z_dim=16, num_res_blocks=2),
    "2.2": dict(base_dim=160, decoder_base_dim=256, z_dim=48, num_res_blocks=2, is_residual=True, patch_size=2,
                in_channels=12, out_channels=12, scale_factor_spatial=16,
                latents_mean=[0.0] * 48, latents_std=[1.0] * 48),
}  # fmt: skip
LATENT_SIZE = (3, 2)


class Case(NamedTuple):
    torch_vae: diffusers.AutoencoderKLWan
    folder: object
    cfg: VAEConfig
    coder: VideoCoder


def torch_vae(seed: int = 0, **config) -> diffusers.AutoencoderKLWan:
    """A random model whose norms and latent statistics are no identities, and whose outputs are not small.

    As initialised, the latents' own mean would hide them, and pixels would never leave [-1, 1].
    """
    torch.manual_seed(seed)
    z = config["z_dim"]
    config = dict(latents_mean=torch.randn(z).tolist(), latents_std=(1 + torch.rand(z)).tolist()) | config
    model = diffusers.AutoencoderKLWan(**config).eval()
    for name, value in model.named_parameters():
        if name.endswith("gamma"):
            torch.nn.init.normal_(value, 1.0, 0.2)
    model.requires_grad_(False)
    model.quant_conv.weight.mul_(16)
    model.decoder.conv_out.weight.mul_(4)
    return model


def load(folder, cfg: VAEConfig, dtype=jnp.float32) -> VAE:
    return load_module(lambda: VAE(cfg, dtype=dtype, rngs=nnx.Rngs(0)), TensorFiles.find(folder), RULES)


@pytest.fixture(scope="module", params=KINDS)
def case(request, tmp_path_factory) -> Case:
    model = torch_vae(**KINDS[request.param])
    folder = tmp_path_factory.mktemp("vae")
    model.save_pretrained(folder)
    cfg = VAEConfig.from_json(json.loads((folder / "config.json").read_text()))
    return Case(model, folder, cfg, VideoCoder(load(folder, cfg)))


def pixels(case: Case, frames: int) -> np.ndarray:
    h, w = (n * case.cfg.scale_factor_spatial for n in LATENT_SIZE)
    return np.random.default_rng(frames).uniform(-1, 1, (2, frames, h, w, 3)).astype(np.float32)


def latents(case: Case, frames: int) -> np.ndarray:
    return np.random.default_rng(frames).normal(size=(2, frames, *LATENT_SIZE, case.cfg.z_dim)).astype(np.float32)


def channels_first(x: np.ndarray, dtype=torch.float32) -> torch.Tensor:
    return torch.from_numpy(np.moveaxis(x, -1, 1).copy()).to(dtype)


def torch_encode(case: Case, x: np.ndarray, dtype=torch.float32) -> np.ndarray:
    """What diffusers' pipelines make of a video: the normalised posterior mean, in float32."""
    mean = case.torch_vae.encode(channels_first(x, dtype)).latent_dist.mode().float()
    mean = np.moveaxis(mean.numpy(), 1, -1)
    return (mean - np.float32(case.cfg.latents_mean)) / np.float32(case.cfg.latents_std)


def torch_decode(case: Case, z: np.ndarray, dtype=torch.float32) -> np.ndarray:
    z = z * np.float32(case.cfg.latents_std) + np.float32(case.cfg.latents_mean)
    return np.moveaxis(case.torch_vae.decode(channels_first(z, dtype)).sample.float().numpy(), 1, -1)


@pytest.mark.parametrize("frames", [1, 5, 9])
def test_encode_equals_diffusers(case, frames):
    x = pixels(case, frames)
    actual = case.coder.encode(jnp.asarray(x))
    assert actual.dtype == jnp.float32 and actual.shape[1] == (frames - 1) // 4 + 1
    assert float(actual.std((1, 2, 3)).mean()) > 0.3  # within a channel: more than the normalisation is compared
    assert relative_error(actual, torch_encode(case, x)) < TOLERANCE


@pytest.mark.parametrize("frames", [1, 2, 3])
def test_decode_equals_diffusers(case, frames):
    z = latents(case, frames)
    actual = case.coder.decode(jnp.asarray(z))
    assert actual.dtype == jnp.float32 and actual.shape[1] == 4 * frames - 3
    assert 0.001 < float((jnp.abs(actual) == 1).mean()) < 0.5  # the clamp is seen, and more than it
    assert relative_error(actual, torch_decode(case, z)) < TOLERANCE


def test_decode_does_not_depend_on_how_latents_are_cut_into_chunks(case):
    z = jnp.asarray(latents(case, 4))
    whole = case.coder.decode(z)
    assert jnp.array_equal(case.coder.decode(z[:, :2]), whole[:, :5])  # what comes later changes nothing
    assert jnp.array_equal(jnp.concatenate(list(case.coder.decode_chunks(z)), 1), whole)
    cache, first = case.coder.decode_chunk(None, z[:, :1])
    _, rest = case.coder.decode_chunk(cache, z[:, 1:])
    # 3 latent frames at once are sums in another order.
    assert relative_error(jnp.concatenate([first, rest], 1), whole) < TOLERANCE


def test_the_cache_is_what_the_last_chunk_returned_and_nothing_else(case):
    """Two videos decoded in turns do not see each other."""
    a, b = jnp.asarray(latents(case, 3)), jnp.asarray(latents(case, 4))
    turns = list(zip(case.coder.decode_chunks(a), case.coder.decode_chunks(b), strict=False))
    for i, video in enumerate((a, b[:, :3])):
        assert jnp.array_equal(jnp.concatenate([turn[i] for turn in turns], 1), case.coder.decode(video))


@pytest.mark.parametrize("formulation", ["direct", "taps"])
def test_a_coder_uses_the_formulation_it_is_given(case, formulation):
    program = VideoCoder(load(case.folder, case.cfg), formulation=formulation)
    z = jnp.asarray(latents(case, 2))
    cache = jax.eval_shape(program.decode_chunk, None, z[:, :1])[0]
    jaxpr = str(jax.make_jaxpr(program.decode_chunk)(cache, z[:, 1:]))
    assert ("window_strides=(1, 1, 1)" in jaxpr) == (formulation == "direct")


def test_bfloat16_is_as_close_to_float32_as_in_diffusers(case):
    x, z = pixels(case, 1), latents(case, 2)
    exact = torch_encode(case, x), torch_decode(case, z)
    try:
        case.torch_vae.to(torch.bfloat16)
        theirs = torch_encode(case, x, torch.bfloat16), torch_decode(case, z, torch.bfloat16)
    finally:
        case.torch_vae.load_state_dict(type(case.torch_vae).from_pretrained(case.folder).float().state_dict())
        case.torch_vae.float()
    coder = VideoCoder(load(case.folder, case.cfg, jnp.bfloat16))
    ours = coder.encode(jnp.asarray(x)), coder.decode(jnp.asarray(z))
    for our, their, want in zip(ours, theirs, exact, strict=True):
        assert our.dtype == jnp.float32
        assert 1e-4 < relative_error(our, want) < 2 * relative_error(their, want)


def test_a_second_video_of_the_same_size_compiles_nothing(case):
    compiled = []

    def listen(event: str, duration: float, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(event)

    videos = [(jnp.asarray(pixels(case, 9)) * k, jnp.asarray(latents(case, 3)) * k) for k in (1, 2)]
    case.coder.encode(videos[0][0]), case.coder.decode(videos[0][1])
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        case.coder.encode(videos[1][0]), case.coder.decode(videos[1][1])
        assert not compiled
        jax.jit(lambda x: x + 1)(1.0)
        assert compiled  # the listener hears compilations
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


@pytest.mark.parametrize("kind", KINDS)
def test_a_random_model_neither_explodes_nor_vanishes(kind):
    z = KINDS[kind]["z_dim"]
    config = KINDS[kind] | dict(num_res_blocks=1, latents_mean=[0.0] * z, latents_std=[1.0] * z)
    cfg = VAEConfig.from_json(config)
    coder = VideoCoder(VAE(cfg, rngs=nnx.Rngs(0)))
    latent = coder.encode(jax.random.uniform(jax.random.key(0), (1, 1, 32, 32, 3), minval=-1.0))
    frames = coder.decode(jax.random.normal(jax.random.key(1), latent.shape))
    for values in (latent, frames):
        assert 0.1 < float(values.std()) < 3.0


@pytest.mark.parametrize("kind", OFFICIAL)
def test_rules_map_every_key_of_the_official_checkpoints(kind):
    with torch.device("meta"):
        model = diffusers.AutoencoderKLWan(**OFFICIAL[kind])
    sources = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    cfg = VAEConfig.from_json(OFFICIAL[kind])
    abstract = nnx.split(nnx.eval_shape(lambda: VAE(cfg, rngs=nnx.Rngs(0))))[1]
    targets = {path: leaf.shape for path, leaf in flat_shapes(abstract).items()}
    found = plan(sources, targets, RULES)
    assert found.keys() == sources.keys() and {into.path for into in found.values()} == targets.keys()
    assert all(sum(rule.match(key) is not None for rule in RULES) == 1 for key in sources)


def test_patches_are_ordered_by_channel_then_column_then_row():
    x = np.random.default_rng(0).normal(size=(2, 3, 4, 6, 5)).astype(np.float32)
    folded = np.asarray(patchify(jnp.asarray(x), 2))
    for c, column, row in ((0, 0, 1), (2, 1, 0), (4, 1, 1)):
        assert np.array_equal(folded[..., 4 * c + 2 * column + row], x[:, :, row::2, column::2, c])
    assert np.array_equal(unpatchify(jnp.asarray(folded), 2), x)


def test_sizes_that_cannot_be_encoded_are_refused_with_the_nearest_valid_ones(case):
    stride = case.cfg.scale_factor_spatial
    with pytest.raises(ValueError, match="num_frames=7 is not 4k\\+1: nearest are 5 and 9"):
        case.coder.encode(jnp.zeros((1, 7, stride, stride, 3)))
    with pytest.raises(ValueError, match=f"width={stride + 3} is no multiple of {stride}: nearest are {stride} and"):
        case.coder.encode(jnp.zeros((1, 1, stride, stride + 3, 3)))


def test_chunks_that_do_not_fit_the_cache_are_refused(case):
    stride = case.cfg.scale_factor_spatial
    with pytest.raises(ValueError, match="first chunk is 1 frame, not 4"):
        case.coder.encode_chunk(None, jnp.zeros((1, 4, stride, stride, 3)))
    with pytest.raises(ValueError, match="first chunk is 1 frame, not 2"):
        case.coder.decode_chunk(None, jnp.zeros((1, 2, 1, 1, case.cfg.z_dim)))
    with pytest.raises(ValueError, match="a chunk of 6 frames is no multiple of 4"):
        case.coder.encode_chunk((), jnp.zeros((1, 6, stride, stride, 3)))


def test_levels_that_do_not_give_the_scale_factors_are_refused():
    with pytest.raises(ConfigError, match="scale_factor_spatial=8, but the levels of the VAE scale by 16"):
        VAE(VAEConfig(base_dim=8, patch_size=2), rngs=nnx.Rngs(0))
    with pytest.raises(ConfigError, match="scale_factor_temporal=4, but the levels of the VAE scale by 2"):
        VAE(VAEConfig(base_dim=8, temperal_downsample=(False, False, True)), rngs=nnx.Rngs(0))
