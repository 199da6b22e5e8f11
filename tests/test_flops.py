"""The FLOP account against published counts, against the programs of our own modules, and against XLA's count."""

import math
from functools import partial
from unittest import mock

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P
from published import write_configs

from jaxwan.config import TextEncoderConfig, TransformerConfig, VAEConfig
from jaxwan.flops import (
    device_flops,
    device_share,
    text_encoder_flops,
    transformer_flops,
    vae_decode_flops,
    vae_encode_flops,
)
from jaxwan.kernels.attention import attend
from jaxwan.models import transformer
from jaxwan.models.text_encoder import UMT5Encoder
from jaxwan.models.transformer import Block, Context, WanTransformer
from jaxwan.models.vae import VAE
from jaxwan.pipelines.checkpoint import read_checkpoint
from jaxwan.pipelines.dit import abstract_weights, map_axes, parallel_on, split_on
from jaxwan.sharding.mesh import MeshSpec, make_mesh
from jaxwan.sharding.rules import RULES

TERA = 10**12


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """The published configurations, as checkpoints without tensors, by name."""
    names = ("Wan2.2-T2V-A14B", "Wan2.2-TI2V-5B", "Wan2.1-T2V-1.3B")
    return {name: read_checkpoint(write_configs(tmp_path_factory.mktemp("published"), name)) for name in names}


# Against counts made elsewhere, by torch's FLOP counter on diffusers' models


@pytest.mark.parametrize(
    ("name", "size", "linear", "self_attention", "total"),
    [
        ("Wan2.2-T2V-A14B", (81, 720, 1280), 1809.6, 4682.0, 6523.4),
        ("Wan2.2-T2V-A14B", (81, 480, 832), 785.4, 879.2, 1678.4),
        ("Wan2.2-TI2V-5B", (121, 704, 1280), 237.4, 274.3, 517.0),
        ("Wan2.1-T2V-1.3B", (81, 480, 832), 82.1, 197.8, 283.0),
    ],
)
def test_a_forward_of_the_published_models_takes_the_known_tflop(published, name, size, linear, self_attention, total):
    checkpoint = published[name]
    flops = transformer_flops(checkpoint.transformer, checkpoint.geometry.num_tokens(*size))
    told = [flops.linear / TERA, flops.self_attention / TERA, flops.total / TERA]
    assert told == pytest.approx([linear, self_attention, total], rel=1e-3)


@pytest.mark.parametrize(
    ("name", "size", "decode", "encode"),
    [
        ("Wan2.2-T2V-A14B", (81, 720, 1280), 639.2, 381.7),
        ("Wan2.2-T2V-A14B", (81, 480, 832), 275.4, 163.7),
        ("Wan2.2-TI2V-5B", (121, 704, 1280), 2011, 382.6),
    ],
)
def test_the_published_vaes_take_the_known_tflop(published, name, size, decode, encode):
    checkpoint = published[name]
    shape = checkpoint.geometry.latent_shape(*size)
    counted = [f(checkpoint.vae, shape, first_taps=3) / TERA for f in (vae_decode_flops, vae_encode_flops)]
    assert counted == pytest.approx([decode, encode], rel=1e-3)
    needed = [f(checkpoint.vae, shape) / TERA for f in (vae_decode_flops, vae_encode_flops)]
    assert all(0.985 < n / c < 1 for n, c in zip(needed, counted, strict=True))  # the zeros ahead of the first frame


# Against the matrix products and convolutions in our own programs


def program_flops(function, *arguments):
    """FLOPs of all dot_general and conv_general_dilated of a program, from their shapes; loops count every turn."""
    return jaxpr_flops(jax.make_jaxpr(function)(*arguments).jaxpr)


def jaxpr_flops(jaxpr):
    total = 0
    for equation in jaxpr.eqns:
        shapes = [v.aval for v in equation.invars]
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            total += 2 * equation.outvars[0].aval.size * math.prod(shapes[0].shape[axis] for axis in contracted)
        elif equation.primitive.name == "conv_general_dilated":
            features = equation.params["dimension_numbers"].rhs_spec[0]
            total += 2 * equation.outvars[0].aval.size * shapes[1].size // shapes[1].shape[features]
        turns = equation.params.get("length", 1) if equation.primitive.name == "scan" else 1
        total += turns * sum(jaxpr_flops(inner) for inner in inner_jaxprs(equation))
    return total


def inner_jaxprs(equation):
    values = jax.tree.leaves(
        list(equation.params.values()), is_leaf=lambda v: hasattr(v, "eqns") or hasattr(v, "jaxpr")
    )
    return [getattr(v, "jaxpr", v) for v in values if hasattr(v, "eqns") or hasattr(v, "jaxpr")]


def split(make):
    return nnx.split(nnx.eval_shape(make))


def floats(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


@pytest.mark.parametrize("image_rows", [0, 7])
@pytest.mark.parametrize("timesteps", [1, 3])
def test_a_forward_is_counted_to_the_last_product(image_rows, timesteps):
    image = {"image_dim": 14, "added_kv_proj_dim": 24, "in_channels": 11} if image_rows else {}
    given = {"num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 5, "out_channels": 4, "text_dim": 18}
    cfg = TransformerConfig(num_layers=3, ffn_dim=50, freq_dim=16, **given | image)
    graph, state = split(lambda: WanTransformer(cfg, dtype=jnp.float32, rngs=nnx.Rngs(0)))
    clip = floats(1, image_rows, 14) if image_rows else None
    counted = program_flops(
        lambda s, *a: nnx.merge(graph, s)(*a),
        state, floats(1, 3, 4, 6, cfg.in_channels), floats(1, timesteps), floats(1, 13, 18), clip,
    )  # fmt: skip
    told = transformer_flops(cfg, 3 * 2 * 3, text_rows=13, image_rows=image_rows, timesteps=timesteps)
    assert counted == told.total


@pytest.mark.parametrize(
    ("sp", "tp", "ulysses"), [(2, 1, 2), (2, 1, 1), (1, 2, 1), (3, 2, 1), (4, 2, 2), (4, 1, 4), (4, 1, 1)]
)
def test_the_share_of_a_device_is_counted_to_the_last_product(sp, tp, ulysses):
    """Three frames of six tokens, of which four devices have two each, pads too."""
    given = {"num_attention_heads": 4, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4, "text_dim": 18}
    cfg = TransformerConfig(num_layers=3, ffn_dim=52, freq_dim=16, **given)
    mesh = make_mesh(MeshSpec(sp=sp, tp=tp))
    split = split_on(mesh, cfg, (3, 4, 6), ulysses)
    graph, weights = abstract_weights(cfg, 1, 1, jnp.float32, parallel_on(mesh, split))
    weights = jax.tree.map(lambda x: x.update(shape=x.shape[1:]), weights)
    specs = jax.tree.map(lambda s: P(*s[1:]), map_axes(partial(RULES.spec, mesh), weights))

    def forward(weights, patches, timesteps, text):
        model = nnx.merge(graph, *weights)
        temb, modulation = model.embed_time(timesteps)
        x = model.embed_patches(patches.reshape(1, -1, 16))
        x = model.run_blocks(x, jnp.arange(3), model.embed_context(text, None), modulation, (3, 2, 3))
        return model.head_patches(x, temb).reshape(3, -1, 16)

    tokens = RULES.spec(mesh, None, "token")
    shared = jax.shard_map(forward, mesh=mesh, in_specs=(specs, tokens, P(), P()), out_specs=tokens)
    counted = program_flops(shared, weights, floats(3, split.share * sp, 16), floats(1, 1), floats(1, 13, 18))
    share = device_share(cfg, mesh.shape, 6, ulysses)
    assert counted == device_flops(cfg, share, 3, 6, text_rows=13).total


@pytest.mark.parametrize("kind", ["2.1", "2.2"])
def test_coding_a_video_is_counted_to_the_last_tap(kind):
    residual = {"is_residual": True, "patch_size": 2, "in_channels": 12, "out_channels": 12, "decoder_base_dim": 12,
                "scale_factor_spatial": 16}  # fmt: skip
    levels = {"z_dim": 4, "dim_mult": (1, 2, 4, 4), "num_res_blocks": 1, "base_dim": 8}
    cfg = VAEConfig(latents_mean=(0.0,) * 4, latents_std=(1.0,) * 4, **levels | (residual if kind == "2.2" else {}))
    graph, state = split(lambda: VAE(cfg, dtype=jnp.float32, rngs=nnx.Rngs(0)))
    t, h, w = 4, 2, 3
    stride = cfg.scale_factor_spatial

    def coded(name, first, later):
        def run(state, cache, x):
            return getattr(nnx.merge(graph, state), name)(cache, x, formulation="direct")

        cache, _ = jax.eval_shape(lambda s, x: run(s, None, x), state, first)
        return program_flops(lambda s, x: run(s, None, x), state, first) + (t - 1) * program_flops(
            run, state, cache, later
        )

    latent = floats(1, 1, h, w, 4)
    assert coded("decode_chunk", latent, latent) == vae_decode_flops(cfg, (t, h, w))
    pixels = [floats(1, f, h * stride, w * stride, 3) for f in (1, 4)]
    assert coded("encode_chunk", *pixels) == vae_encode_flops(cfg, (t, h, w))


def test_a_prompt_is_counted_to_the_last_product():
    cfg = TextEncoderConfig(d_model=24, d_kv=10, d_ff=40, num_layers=3, num_heads=3, vocab_size=50)
    graph, state = split(lambda: UMT5Encoder(cfg, dtype=jnp.float32, rngs=nnx.Rngs(0)))
    words = jax.ShapeDtypeStruct((1, 11), jnp.int32)
    counted = program_flops(lambda s, *a: nnx.merge(graph, s)(*a), state, words, words)
    assert counted == text_encoder_flops(cfg, 11)


# Against XLA, at full size


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("Wan2.2-T2V-A14B", (81, 720, 1280)),
        ("Wan2.2-T2V-A14B", (81, 480, 832)),
        ("Wan2.2-TI2V-5B", (121, 704, 1280)),
        ("Wan2.1-T2V-1.3B", (81, 480, 832)),
    ],
)
def test_a_full_size_block_is_what_xla_counts(published, name, size):
    """XLA counts the softmax too, a handful of operations beside the 4 K of every logit: about 1 %."""
    checkpoint = published[name]
    cfg, grid = checkpoint.transformer, checkpoint.geometry.token_grid(*size)
    tokens = math.prod(grid)
    graph, state = split(lambda: Block(cfg, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))

    def block(state, x, text, modulation):
        rope = transformer.rope_tables(grid, cfg.attention_head_dim)
        return nnx.merge(graph, state)(x, Context(text, None), modulation, rope)

    def hidden(*shape):
        return jax.ShapeDtypeStruct((1, *shape, cfg.dim), jnp.bfloat16)

    with mock.patch.object(transformer, "attention", attend):  # a loop over chunks would count as one turn
        lowered = jax.jit(block).lower(state, hidden(tokens), hidden(512), hidden(1, 6))
    flops = transformer_flops(cfg, tokens)
    assert lowered.cost_analysis()["flops"] == pytest.approx((flops.total - flops.ends) / cfg.num_layers, rel=0.02)
