"""The original layout: tensors that were renamed independently give their Diffusers twin's parameters, bit for bit; at
full size the tables ask for as many tensors as the published files hold."""

import contextlib

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from checkpoints import FAMILIES, make_checkpoint
from flax import nnx
from full_size import CONFIGS, LAYOUTS, MODELS, sources, vae_2_2
from hypothesis import given, settings
from hypothesis import strategies as st
from originals import original_image_encoder, original_text_encoder, original_transformer, original_vae, scaled_fp8
from safetensors.torch import load_file, save_file

from jaxwan.config import ConfigError, ImageEncoderConfig, TransformerConfig
from jaxwan.convert.detect import Kind, config_of, kind_of, rules_of
from jaxwan.convert.files import TensorFiles
from jaxwan.convert.load import load_state
from jaxwan.convert.rules import CheckpointError, plan
from jaxwan.models.layers import abstract
from jaxwan.pipelines.checkpoint import read_checkpoint

RENAMED = {
    "transformer": original_transformer,
    "vae": lambda tensors: original_vae(tensors, 1),
    "text_encoder": original_text_encoder,
    "image_encoder": original_image_encoder,
}
CASES = [
    ("2.1-flf2v", "transformer"), ("ti2v-5B", "transformer"), ("2.1-flf2v", "vae"), ("ti2v-5B", "vae"),
    ("ti2v-5B", "text_encoder"), ("2.1-flf2v", "image_encoder"),
]  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """family -> the folder of a tiny Diffusers checkpoint of it."""
    made = {}

    def get(family):
        if family not in made:
            made[family] = tmp_path_factory.mktemp(family)
            make_checkpoint(made[family], family)
        return made[family]

    return get


def diffusers_tensors(folder):
    tensors = {}
    for path in TensorFiles.find(folder).paths:
        tensors |= load_file(path)
    return tensors


def parameters(component, config, files):
    _, state = abstract(MODELS[component], config, jnp.dtype(jnp.float32))
    loaded = load_state(state, files, rules_of(component, config, files.shapes))
    return {".".join(map(str, path)): np.asarray(leaf[...]) for path, leaf in nnx.to_flat_state(loaded)}


def equal(ours, theirs):
    assert ours.keys() == theirs.keys()
    for path, value in ours.items():
        np.testing.assert_array_equal(value, theirs[path], err_msg=path)


@pytest.mark.parametrize("form", ["pth", "safetensors", "prefixed"])
@pytest.mark.parametrize(("family", "component"), CASES)
def test_renamed_tensors_give_the_parameters_of_their_twin(checkpoint, tmp_path, family, component, form):
    folder = checkpoint(family)
    config = getattr(read_checkpoint(folder), component)
    tensors = RENAMED[component](diffusers_tensors(folder / component))
    if form == "pth":
        path = tmp_path / "x.pth"
        torch.save(tensors, path)
    else:
        path = tmp_path / "x.safetensors"
        prefix = "model.diffusion_model." if form == "prefixed" else ""
        save_file({prefix + name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    files = TensorFiles((path,))
    assert kind_of(files.shapes) == Kind(component, "original")
    equal(parameters(component, config, files), parameters(component, config, TensorFiles.find(folder / component)))


@pytest.mark.parametrize("newer", [False, True])
def test_scaled_fp8_is_its_numbers_times_their_scale(checkpoint, tmp_path, newer):
    folder = checkpoint("2.1-flf2v")
    config = read_checkpoint(folder).transformer
    names = {}
    for name, tensor in diffusers_tensors(folder / "transformer").items():
        names |= dict.fromkeys(original_transformer({name: tensor}), name)
    stored, meaning = scaled_fp8(
        original_transformer(diffusers_tensors(folder / "transformer")), "diffusion_model.", newer=newer
    )
    save_file(stored, tmp_path / "fp8.safetensors")
    save_file({names[name]: tensor for name, tensor in meaning.items()}, tmp_path / "twin.safetensors")
    ours = parameters("transformer", config, TensorFiles((tmp_path / "fp8.safetensors",)))
    equal(ours, parameters("transformer", config, TensorFiles((tmp_path / "twin.safetensors",))))


# At full size


@pytest.mark.parametrize(("component", "size"), CONFIGS)
def test_the_tables_ask_for_as_many_tensors_as_published_files_hold(component, size):
    config, count = CONFIGS[component, size]
    shapes, rules, expected = sources(component, config, "original")
    assert len(expected) == count
    assert len(plan(expected, shapes, rules)) == count
    assert config_of(Kind(component, "original"), expected) == config


def test_the_2_2_vae_is_recognised_at_full_size_with_its_statistics():
    config = vae_2_2()
    assert (config.base_dim, config.decoder_base_dim, config.z_dim, config.num_res_blocks) == (160, 256, 48, 2)
    assert len(config.latents_mean) == len(config.latents_std) == 48
    _, _, expected = sources("vae", config, "original")
    assert len(expected) == 196
    assert expected["decoder.upsamples.2.upsamples.0.shortcut.weight"] == (512, 1024, 1, 1, 1)
    assert config_of(Kind("vae", "original"), expected) == config


@pytest.mark.parametrize(("component", "size"), CONFIGS)
def test_the_diffusers_layout_tells_the_same_sizes(component, size):
    config, _ = CONFIGS[component, size]
    _, _, expected = sources(component, config, "diffusers")
    assert kind_of(expected) == Kind(component, "diffusers")
    assert config_of(Kind(component, "diffusers"), expected) == config


def test_the_image_encoder_is_recognised_at_full_size():
    config = ImageEncoderConfig()
    _, _, expected = sources("image_encoder", config, "original")
    last = {"visual.transformer.31.attn.proj.weight": (1280, 1280)}  # which is not read
    assert config_of(Kind("image_encoder", "original"), expected | last) == config
    assert expected["visual.pos_embedding"] == (257, 1280) and expected["visual.cls_embedding"] == (1280,)


@pytest.fixture(scope="module")
def published():
    """(component, size, layout) -> the shapes of all tensors, by name."""
    made = {(*case, layout): sources(case[0], CONFIGS[case][0], layout)[2] for case in CONFIGS for layout in LAYOUTS}
    small = {"blocks.0", "encoder.block.0", "coder.downsamples.0", "coder.down_blocks.0"}
    return {
        key: {n: s for n, s in shapes.items() if "block" not in n or any(part in n for part in small)}
        for key, shapes in made.items()
    }


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_shapes_of_any_kind_tell_a_configuration_or_are_refused(published, data):
    component, size = data.draw(st.sampled_from(list(CONFIGS)))
    layout = data.draw(st.sampled_from(LAYOUTS))
    shapes = dict(published[component, size, layout])
    for name in data.draw(st.lists(st.sampled_from(sorted(shapes)), max_size=3)):
        shapes[name] = tuple(data.draw(st.lists(st.integers(0, 300), max_size=5)))
    for name in data.draw(st.lists(st.sampled_from(sorted(shapes)), max_size=3)):
        shapes.pop(name, None)
    with contextlib.suppress(ConfigError):
        config_of(Kind(component, layout), shapes)


def test_another_component_is_refused_by_its_name():
    with pytest.raises(CheckpointError, match="x.pth holds a vae and not a transformer"):
        rules_of("transformer", TransformerConfig(), {"decoder.middle.0.residual.0.gamma": ()}, what="x.pth")


def test_every_family_has_a_case():
    assert {family for family, _ in CASES} <= FAMILIES.keys() and {name for _, name in CASES} == MODELS.keys()
