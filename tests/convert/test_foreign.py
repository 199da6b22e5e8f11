"""What is recognised and not read is refused by name in one sentence: at full size, from names, shapes and dtypes."""

import re
from pathlib import Path

import pytest
from full_size import CONFIGS, sources

from jaxwan.config import ConfigError
from jaxwan.convert.rules import CheckpointError
from jaxwan.convert.tensors import DTYPES, Extent
from jaxwan.pipelines.components import check_components, configs_of

WIDTH = 5120
BLOCKS = range(40)


@pytest.fixture(scope="module")
def published():
    """(component, size) -> the shape of every tensor under its original name."""
    return {case: sources(case[0], config, "original")[2] for case, (config, _) in CONFIGS.items()}


@pytest.fixture
def refused(monkeypatch):
    """What is said of a file of these tensors, of which nothing but their shapes and dtypes exists."""

    def refuse(component, shapes, dtypes=None):
        path, dtypes = Path("somewhere/x.safetensors"), dtypes or {}
        tensors = {name: Extent(path, 0, DTYPES[dtypes.get(name, "BF16")], shape) for name, shape in shapes.items()}
        monkeypatch.setattr("jaxwan.convert.files.read_tensors", lambda path, reader: tensors)
        monkeypatch.setattr("jaxwan.convert.files.metadata_of", lambda path, reader: {})
        monkeypatch.setattr(Path, "is_file", lambda path: True)
        with pytest.raises((ConfigError, CheckpointError)) as error:
            configs_of({component: path})
        said = str(error.value)
        assert said.startswith(str(path)) and "\n" not in said and len(said) < 400
        return said

    return refuse


def linears(template, numbers, out=WIDTH):
    """Weights and biases of linear layers, one for each number."""
    ends = {".weight": (out, WIDTH), ".bias": (out,)}
    return {template.format(i) + end: shape for i in numbers for end, shape in ends.items()}


MODELS = {  # what is beside the tensors of a published DiT of this size -> the words for it
    "VACE": ("14B", linears("vace_blocks.{}.after_proj", BLOCKS[::5]), "tensors of VACE, "),
    "Animate": ("2.1 I2V", linears("face_adapter.fuser_blocks.{}.linear1_kv", range(8), 2 * WIDTH), "Wan-Animate, "),
    "Animate's motion": ("2.1 I2V", {"motion_encoder.enc.fc.0.weight": (512, 512)}, "tensors of Wan-Animate, "),
    "S2V": ("14B", {"casual_audio_encoder.encoder.final_linear.weight": (WIDTH, 2048)}, "tensors of Wan-S2V, "),
    "Fun camera": ("I2V-A14B", {"control_adapter.conv.weight": (WIDTH, 1536, 2, 2)}, "Wan-Fun with camera control, "),
    "Fun reference": ("I2V-A14B", {"ref_conv.weight": (WIDTH, 16, 2, 2)}, "Wan-Fun with a reference image, "),
    "HuMo": ("14B", linears("audio_proj.audio_proj_glob_{}.layer", range(1, 4)), "tensors of HuMo, "),
    "VSA": ("1.3B", linears("blocks.{}.to_gate_compress", range(30)), "FastWan with video sparse attention .VSA., "),
    "SLA": ("14B", linears("blocks.{}.self_attn.attn_op.local_attn.proj_l", BLOCKS), "sparse-linear attention .SLA., "),
}


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("name", MODELS)
def test_models_that_have_more_than_wans_tensors_are_named(published, refused, name, prefix):
    size, beside, words = MODELS[name]
    shapes = published["transformer", size]
    assert len(shapes) == CONFIGS["transformer", size][1] and not beside.keys() & shapes.keys()
    said = refused("transformer", {prefix + name: shape for name, shape in (shapes | beside).items()})
    assert re.search(f"holds tensors of {words.removeprefix('tensors of ')}|{words}", said)
    assert "which is not implemented: take one of the published Wan models" in said


def test_animate_2_is_named_by_its_nested_blocks(published, refused):
    nested = {re.sub(r"^(blocks\.\d+)\.", r"\1.block.", n): s for n, s in published["transformer", "2.1 I2V"].items()}
    assert "holds tensors of Wan-Animate-2, which is not implemented" in refused("transformer", nested)


@pytest.mark.parametrize("channels", [32, 48, 52])
def test_models_of_other_channels_are_told_from_wans(published, refused, channels):
    shapes = published["transformer", "14B"] | {"patch_embedding.weight": (WIDTH, channels, 1, 2, 2)}
    said = refused("transformer", shapes)
    assert f"takes {channels} channels and gives 16, as those with controls do (Wan-Fun-Control)" in said
    assert said.endswith("Wan's take 16 or 36")


OTHERS = {
    "LTX-Video": {"transformer_blocks.0.attn1.to_q.weight": (2048, 2048), "patchify_proj.weight": (2048, 128)},
    "HunyuanVideo or FLUX": {"double_blocks.0.img_attn.qkv.weight": (9216, 3072)},
    "Qwen-Image": {"transformer_blocks.0.img_mod.1.weight": (18432, 3072)},
    "Stable Diffusion": {"input_blocks.0.0.weight": (320, 4, 3, 3)},
    "a tiny autoencoder (TAEHV: taew, lighttae)": {"decoder.1.weight": (256, 16, 3, 3), "encoder.0.weight": (64,)},
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_other_networks_are_named(refused, name):
    component = "vae" if "autoencoder" in name else "transformer"
    assert f"holds tensors of {name}, which is not implemented" in refused(component, OTHERS[name])


@pytest.mark.parametrize(
    "file", ["lightvaew2_1.pth", "lighttaew2_2.safetensors", "taew2_1.pth", "wan_alpha_2.1_vae.pt"]
)
def test_other_vaes_under_wans_names_are_told_by_their_files(tmp_path, file):
    (tmp_path / file).touch()
    with pytest.raises(ValueError, match=f"vae: .*{file} is .* by its name, which is not implemented: take the VAE of"):
        check_components({"vae": tmp_path / file})


def quantised(shapes, dtype, weight, scale, of):
    """The linear layers of blocks in a dtype of 8 bits, scales beside them."""
    stored, dtypes = {}, {}
    for name, shape in shapes.items():
        if name.startswith("blocks.") and len(shape) == 2 and name.endswith(".weight"):
            layer = name.removesuffix(".weight")
            stored |= {f"{layer}.{weight}": shape, f"{layer}.{scale}": of(*shape)}
            dtypes |= {f"{layer}.{weight}": dtype, f"{layer}.{scale}": "F32"}
        else:
            stored[name] = shape
    return stored, dtypes


NONE, ROW, TILE = (lambda o, i: ()), (lambda o, i: (o, 1)), (lambda o, i: (-(-o // 128), -(-i // 128)))
UNREAD = "a scale of weights in a form that is not read: take the file in bfloat16"
QUANTISED = {  # dtype, what the numbers and the scales are called, the scales' shape, and the words for all that
    "TurboDiffusion's": (
        "I8",
        "int8_weight",
        "scale",
        TILE,
        "in I8 that are quantised to int8 by TurboDiffusion .a -qu",
    ),
    "LightX2V's int8": (
        "I8",
        "weight",
        "weight_scale",
        ROW,
        "in I8 that are quantised, with scales beside them, which",
    ),
    "LightX2V's nvfp4": ("U8", "weight", "weight_global_scale", NONE, "nvfp4 by LightX2V, which are not read: take"),
    "its older nvfp4": ("U8", "weight", "input_global_scale", NONE, "nvfp4 by LightX2V, which are not read: take"),
    "scales of inputs": ("F8_E4M3", "weight", "pre_quant_scale", lambda o, i: (i,), rf"\.pre_quant_scale, {UNREAD}"),
    "a second scale": ("F8_E4M3", "weight", "weight_scale_2", NONE, rf"\.weight_scale_2, {UNREAD}"),
    "scales of tiles": ("F8_E4M3", "weight", "weight_scale_inv", TILE, rf"\.weight_scale_inv, {UNREAD}"),
    "scales of groups": (
        "F8_E4M3",
        "weight",
        "weight_scale",
        lambda o, i: (o, i // 32),
        "are not one for all or one a r",
    ),
    "unknown": ("I8", "weight", "alpha", NONE, "in I8, probably quantised, which are not read: take"),
}


@pytest.mark.parametrize("name", QUANTISED)
def test_what_is_quantised_otherwise_is_named(published, refused, name):
    *how, words = QUANTISED[name]
    shapes, dtypes = quantised(published["transformer", "14B"], *how)
    assert re.search(words, refused("transformer", shapes, dtypes))
