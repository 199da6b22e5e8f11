"""Rule tables: the completeness proof, and every table run backwards."""

import dataclasses
from functools import partial

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from flax import nnx
from transformers import CLIPVisionConfig, CLIPVisionModel, UMT5Config, UMT5EncoderModel

from jaxwan.config import ImageEncoderConfig, TextEncoderConfig, TransformerConfig, VAEConfig
from jaxwan.convert import diffusers as tables
from jaxwan.convert.load import flat_shapes
from jaxwan.convert.rules import CONV2D, CONV3D, KEEP, LINEAR, CheckpointError, Rule, expected_sources, plan
from jaxwan.convert.save import pieces_of
from jaxwan.models.image_encoder import CLIPVisionEncoder
from jaxwan.models.text_encoder import UMT5Encoder
from jaxwan.models.transformer import WanTransformer
from jaxwan.models.vae import VAE

RULES = [
    Rule("blocks.{layer}.to_q.weight", "blocks.q.kernel", LINEAR),
    Rule("blocks.{layer}.to_q.bias", "blocks.q.bias"),
    Rule("{path}.gamma", "{path}.gamma"),
    Rule("unused.{path}", None),
]
TARGETS = {"blocks.q.kernel": (2, 3, 5), "blocks.q.bias": (2, 5), "up.norm.gamma": (7,)}
SOURCES = {
    "blocks.0.to_q.weight": (5, 3), "blocks.0.to_q.bias": (5,),
    "blocks.1.to_q.weight": (5, 3), "blocks.1.to_q.bias": (5,),
    "up.norm.gamma": (7,), "unused.old.thing": (1,),
}  # fmt: skip


def test_a_complete_checkpoint_is_planned_tensor_by_tensor():
    found = plan(SOURCES, TARGETS, RULES)
    assert found.keys() == SOURCES.keys() - {"unused.old.thing"}
    assert (found["blocks.1.to_q.weight"].path, found["blocks.1.to_q.weight"].layer) == ("blocks.q.kernel", 1)
    assert (found["up.norm.gamma"].path, found["up.norm.gamma"].layer) == ("up.norm.gamma", None)


def test_one_error_names_everything_missing_extra_and_misshaped():
    sources = SOURCES | {"blocks.0.to_q.bias": (6,), "blocks.2.to_q.bias": (5,), "stray": (1,)}
    del sources["up.norm.gamma"], sources["blocks.1.to_q.weight"]
    with pytest.raises(CheckpointError) as error:
        plan(sources, TARGETS, RULES, what="some/folder")
    assert str(error.value) == (
        "some/folder does not fit its configuration: 2 missing (blocks.1.to_q.weight, up.norm.gamma); "
        "2 unexpected (blocks.2.to_q.bias, stray); 1 of another shape (blocks.0.to_q.bias (6,), expected (5,))"
    )


def test_a_transposed_tensor_is_misshaped_though_its_size_is_right():
    with pytest.raises(CheckpointError, match=r"blocks.0.to_q.weight \(3, 5\), expected \(5, 3\)"):
        plan(SOURCES | {"blocks.0.to_q.weight": (3, 5)}, TARGETS, RULES)


@pytest.mark.parametrize("rules", [RULES[1:], [*RULES, Rule("other.{layer}", "blocks.q.kernel")]])
def test_a_parameter_without_exactly_one_rule_is_our_own_mistake(rules):
    with pytest.raises(ValueError, match="blocks.q.kernel has [02] rules, must have exactly one") as error:
        plan(SOURCES, TARGETS, rules)
    assert not isinstance(error.value, CheckpointError)


def test_two_parameters_read_from_one_tensor_are_our_own_mistake():
    rules = [Rule("a.weight", "x"), Rule("a.weight", "y")]
    with pytest.raises(ValueError, match="a.weight is read by two rules"):
        expected_sources({"x": (1,), "y": (1,)}, rules)


@pytest.mark.parametrize("transform", [KEEP, LINEAR, CONV2D, CONV3D])
def test_a_transform_inverts_itself_and_knows_the_order_of_the_source_axes(transform):
    shape = (2, 3, 4, 5, 6)[: len(transform.axes or (0, 1))]
    tensor = np.arange(np.prod(shape)).reshape(shape)
    value = transform.apply(tensor)
    np.testing.assert_array_equal(transform.invert(value), tensor)
    assert transform.in_source(value.shape) == shape


DIT = TransformerConfig(num_attention_heads=2, attention_head_dim=12, text_dim=10, freq_dim=8, ffn_dim=20, num_layers=3)
DITS = {
    "t2v": DIT,
    "i2v by channels": dataclasses.replace(DIT, in_channels=36),
    "ti2v": dataclasses.replace(DIT, in_channels=48, out_channels=48),
    "2.1 i2v": dataclasses.replace(DIT, in_channels=36, image_dim=14, added_kv_proj_dim=24),
    "flf2v": dataclasses.replace(DIT, in_channels=36, image_dim=14, added_kv_proj_dim=24, pos_embed_seq_len=514),
}
VAES = {
    "vae 2.1": VAEConfig(base_dim=4, num_res_blocks=1),
    "vae 2.2": VAEConfig(
        base_dim=4, decoder_base_dim=6, num_res_blocks=1, is_residual=True, patch_size=2, in_channels=12,
        out_channels=12, scale_factor_spatial=16,
    ),
}  # fmt: skip
TEXT = TextEncoderConfig(vocab_size=12, d_model=8, d_kv=3, d_ff=10, num_layers=3, num_heads=2)
CLIP = ImageEncoderConfig(
    hidden_size=8, intermediate_size=12, num_hidden_layers=4, num_attention_heads=2, image_size=8, patch_size=4
)


def kwargs(cfg):
    return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(cfg).items()}


# family -> (our module, its table, the reference's module)
FAMILIES = {
    **{
        name: (partial(WanTransformer, cfg, dtype=jnp.float32), tables.TRANSFORMER,
               partial(WanTransformer3DModel, **kwargs(cfg)))
        for name, cfg in DITS.items()
    },
    **{name: (partial(VAE, cfg), tables.VAE, partial(AutoencoderKLWan, **kwargs(cfg))) for name, cfg in VAES.items()},
    "text encoder": (partial(UMT5Encoder, TEXT, dtype=jnp.float32), tables.TEXT_ENCODER,
                     lambda: UMT5EncoderModel(UMT5Config(**kwargs(TEXT)))),
    "image encoder": (partial(CLIPVisionEncoder, CLIP, dtype=jnp.float32), tables.IMAGE_ENCODER,
                      lambda: CLIPVisionModel(CLIPVisionConfig(**kwargs(CLIP)))),
}  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
def test_backwards_then_forwards_gives_every_parameter_back(name):
    make, rules, make_reference = FAMILIES[name]
    with torch.device("meta"):
        theirs = {key: tuple(value.shape) for key, value in make_reference().state_dict().items()}
    if name == "image encoder":
        rules = tables.image_encoder_rules(theirs, CLIP.num_hidden_layers)
    abstract = nnx.state(nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0))))
    shapes = {path: s.shape for path, s in flat_shapes(abstract).items()}
    rng = np.random.default_rng(0)
    arrays = {path: rng.standard_normal(shape, np.float32) for path, shape in shapes.items()}
    tensors = {piece.name: piece.make() for piece in pieces_of(arrays, rules)}

    assert {key: value.shape for key, value in tensors.items()}.items() <= theirs.items()
    left = theirs.keys() - tensors.keys()
    assert all(any(rule.target is None and rule.match(key) is not None for rule in rules) for key in left)

    found = plan({key: value.shape for key, value in tensors.items()}, shapes, rules)
    back = {path: np.full(shape, np.nan, np.float32) for path, shape in shapes.items()}
    for key, tensor in tensors.items():
        into = found[key]
        back[into.path][... if into.layer is None else into.layer] = into.transform.apply(tensor)
    for path, value in arrays.items():
        np.testing.assert_array_equal(back[path], value, err_msg=path)
