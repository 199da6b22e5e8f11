"""The DiT against diffusers' WanTransformer3DModel with random weights."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import WanTransformer3DModel
from flax import nnx
from oracle import exact_attention, relative_error

from jaxwan.config import TransformerConfig
from jaxwan.convert.diffusers import TRANSFORMER
from jaxwan.convert.files import TensorFiles
from jaxwan.convert.load import flat_shapes, load_module
from jaxwan.convert.rules import plan
from jaxwan.models import transformer
from jaxwan.models.transformer import WanTransformer
from jaxwan.tiny.captions import fold_rows

# An independent float32 implementation differs from diffusers by 3e-6 to 5e-6; a wrong GELU already costs 7e-5.
FORWARD = 2e-5

TINY = TransformerConfig(
    num_attention_heads=3, attention_head_dim=20, in_channels=16, out_channels=16, text_dim=24, freq_dim=32,
    ffn_dim=72, num_layers=5,
)  # fmt: skip
CASES = {
    "t2v": TINY,
    "i2v by channels": dataclasses.replace(TINY, in_channels=36, attention_head_dim=22),
    "ti2v": dataclasses.replace(TINY, in_channels=48, out_channels=48, attention_head_dim=28),
    "2.1 i2v": dataclasses.replace(TINY, in_channels=36, image_dim=40, added_kv_proj_dim=60),
    "2.1 i2v, image rows as text": dataclasses.replace(TINY, in_channels=36, image_dim=40),  # as in Diffusers' tests
    "flf2v": dataclasses.replace(TINY, in_channels=36, image_dim=40, added_kv_proj_dim=60, pos_embed_seq_len=514),
}


def save_reference(folder, cfg):
    torch.manual_seed(0)
    model = WanTransformer3DModel(**dataclasses.asdict(cfg)).eval()
    with torch.no_grad():  # zeros and ones by default: biases, norms and position embeddings must count too
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    model.save_pretrained(folder)
    return model


def inputs(cfg, batch=2, grid=(3, 6, 10), image_rows=257):
    rng = np.random.default_rng(0)
    latents = rng.standard_normal((batch, cfg.in_channels, *grid), np.float32)
    text = rng.standard_normal((batch, 512, cfg.text_dim), np.float32)
    images = 2 if cfg.pos_embed_seq_len else 1
    image = rng.standard_normal((batch * images, image_rows, cfg.image_dim), np.float32) if cfg.image_dim else None
    return latents, text, image


def run_reference(model, latents, timestep, text, image):
    dtype = model.dtype
    with torch.no_grad():
        out = model(
            torch.tensor(latents).to(dtype), torch.tensor(timestep), torch.tensor(text).to(dtype),
            encoder_hidden_states_image=None if image is None else torch.tensor(image).to(dtype), return_dict=False,
        )[0]  # fmt: skip
    return out.float().numpy()


def run_ours(model, latents, timestep, text, image):
    graph, state = nnx.split(model)
    if image is not None:
        image = jnp.asarray(image).reshape(latents.shape[0], -1, image.shape[-1])
    forward = jax.jit(lambda s, *a: nnx.merge(graph, s)(*a))
    out = forward(state, jnp.asarray(latents).transpose(0, 2, 3, 4, 1), jnp.asarray(timestep), jnp.asarray(text), image)
    return np.asarray(out.astype(jnp.float32)).transpose(0, 4, 1, 2, 3)


def load(folder, cfg, dtype=jnp.float32):
    def make():
        return WanTransformer(cfg, dtype=dtype, rngs=nnx.Rngs(0))

    return load_module(make, TensorFiles.find(folder), TRANSFORMER)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    made = {}

    def get(case):
        if case not in made:
            folder = tmp_path_factory.mktemp("dit")
            made[case] = folder, save_reference(folder, CASES[case])
        return made[case]

    return get


@pytest.mark.parametrize("case", CASES)
def test_forward_equals_diffusers(saved, case):
    folder, reference = saved(case)
    latents, text, image = inputs(CASES[case])
    t = np.array([999.0, 321.0], np.float32)
    expected = run_reference(reference, latents, t, text, image)
    actual = run_ours(load(folder, CASES[case]), latents, t[:, None], text, image)
    assert relative_error(actual, expected) <= FORWARD


@pytest.mark.parametrize("per", ["frame", "token"])
def test_timesteps_per_frame_and_per_token_equal_diffusers_expanded_timesteps(saved, per):
    folder, reference = saved("ti2v")
    latents, text, _ = inputs(CASES["ti2v"])
    tokens_per_frame = 3 * 5
    rng = np.random.default_rng(1)
    if per == "frame":
        t = np.array([[0, 700, 700], [500, 500, 500]], np.float32)
        expanded = np.repeat(t, tokens_per_frame, axis=1)
    else:
        t = expanded = rng.uniform(0, 1000, (2, 3 * tokens_per_frame)).astype(np.float32)
    expected = run_reference(reference, latents, expanded, text, None)
    actual = run_ours(load(folder, CASES["ti2v"]), latents, t, text, None)
    assert relative_error(actual, expected) <= FORWARD


@pytest.mark.parametrize("case", ["t2v", "2.1 i2v"])
def test_bfloat16_stays_within_twice_diffusers_own_error(tmp_path, saved, case):
    folder, reference = saved(case)
    latents, text, image = inputs(CASES[case])
    t = np.array([999.0, 321.0], np.float32)
    exact = run_reference(reference, latents, t, text, image)
    low = WanTransformer3DModel.from_pretrained(folder, torch_dtype=torch.bfloat16)
    theirs = relative_error(run_reference(low, latents, t, text, image), exact)
    ours = relative_error(run_ours(load(folder, CASES[case], jnp.bfloat16), latents, t[:, None], text, image), exact)
    assert ours <= 2 * theirs


def test_the_modules_that_diffusers_keeps_in_float32_are_float32_in_a_bfloat16_model(saved):
    folder, _ = saved("2.1 i2v")
    low = WanTransformer3DModel.from_pretrained(folder, torch_dtype=torch.bfloat16)
    theirs = {k: v.dtype == torch.float32 for k, v in low.state_dict().items()}
    abstract = nnx.eval_shape(lambda: WanTransformer(CASES["2.1 i2v"], dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))
    ours = flat_shapes(nnx.split(abstract)[1])
    found = plan({k: tuple(v.shape) for k, v in low.state_dict().items()}, {p: s.shape for p, s in ours.items()},
                 TRANSFORMER)  # fmt: skip
    assert {k: ours[into.path].dtype == jnp.float32 for k, into in found.items()} == {k: theirs[k] for k in found}


def test_a_block_of_zeros_is_the_identity_bit_for_bit():
    graph, state = nnx.split(WanTransformer(TINY, dtype=jnp.float32, rngs=nnx.Rngs(0)))
    blocks = jax.tree.map(jnp.zeros_like, state["blocks"])
    state["blocks"] = blocks
    model = nnx.merge(graph, state)
    x = jax.random.normal(jax.random.key(0), (1, 45, TINY.dim)) * 100
    context = model.embed_context(jnp.ones((1, 512, TINY.text_dim)), None)
    _, modulation = model.embed_time(jnp.full((1, 1), 500.0))
    np.testing.assert_array_equal(model.run_blocks(x, jnp.arange(5), context, modulation, (3, 3, 5)), x)


def test_one_row_stands_for_all_that_are_alike(monkeypatch):
    """By a bias of the logarithm of their number, as the training of the bundled model has it."""
    graph, state = nnx.split(WanTransformer(TINY, dtype=jnp.float32, rngs=nnx.Rngs(0)))
    rng, real = np.random.default_rng(0), 9
    text = rng.standard_normal((1, 512, TINY.text_dim), np.float32) * (np.arange(512) < real)[:, None]
    x = jnp.asarray(rng.standard_normal((1, 45, TINY.dim), np.float32))

    def run(text, bias=None):
        model = nnx.merge(graph, state)
        context = model.embed_context(text, None)._replace(bias=bias)
        _, modulation = model.embed_time(jnp.full((1, 1), 500.0))
        return model.run_blocks(x, jnp.arange(5), context, modulation, (3, 3, 5))

    rows, counts = fold_rows(jnp.asarray(text[:, :16]), np.arange(16)[None] < real, 512)
    folded = jax.jit(run)(rows, counts)
    monkeypatch.setattr(transformer, "attention", exact_attention)  # float32 sums over 512 rows are less exact
    assert relative_error(folded, jax.jit(lambda text: run(text))(text)) < 1e-6  # float32's own; 0.7 without the counts


def test_the_model_has_derivatives_forward_and_backward():
    graph, state = nnx.split(WanTransformer(TINY, dtype=jnp.float32, rngs=nnx.Rngs(0)))
    x, direction = jax.random.normal(jax.random.key(0), (2, 1, 1, 4, 4, 16))
    text = jnp.ones((1, 3, TINY.text_dim))

    @jax.jit
    def both(x):
        run = lambda x: nnx.merge(graph, state)(x, jnp.full((1, 1), 500.0), text).sum()  # noqa: E731
        return jax.jvp(run, (x,), (direction,))[1], jnp.vdot(jax.grad(run)(x), direction)

    forward, backward = both(x)
    assert (
        abs(forward) > 1e-2 and relative_error(np.asarray(forward), np.asarray(backward)) < 1e-4
    )  # a sum of few terms


OFFICIAL = {
    "Wan2.2-T2V-A14B": TransformerConfig(),
    "Wan2.2-I2V-A14B": TransformerConfig(in_channels=36),
    "Wan2.2-TI2V-5B": TransformerConfig(
        num_attention_heads=24, in_channels=48, out_channels=48, ffn_dim=14336, num_layers=30
    ),
    "Wan2.1-T2V-1.3B": TransformerConfig(num_attention_heads=12, ffn_dim=8960, num_layers=30),
    "Wan2.1-I2V-14B": TransformerConfig(in_channels=36, image_dim=1280, added_kv_proj_dim=5120),
    "Wan2.1-FLF2V-14B": TransformerConfig(
        in_channels=36, image_dim=1280, added_kv_proj_dim=5120, pos_embed_seq_len=514
    ),
}


@pytest.mark.parametrize("name", OFFICIAL)
def test_the_rule_table_maps_the_full_size_key_set_completely(name):
    cfg = OFFICIAL[name]
    with torch.device("meta"):
        reference = WanTransformer3DModel(**dataclasses.asdict(cfg))
    shapes = {k: tuple(v.shape) for k, v in reference.state_dict().items()}
    abstract = nnx.eval_shape(lambda: WanTransformer(cfg, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))
    ours = flat_shapes(nnx.split(abstract)[1])
    found = plan(shapes, {p: s.shape for p, s in ours.items()}, TRANSFORMER, what=name)
    assert found.keys() == shapes.keys()
    assert sum(np.prod(s.shape) for s in ours.values()) == sum(np.prod(s) for s in shapes.values())
