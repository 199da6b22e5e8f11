"""LoRA files of every style add what Diffusers, PEFT or float64 by hand say, to tensors of either layout and to fp8;
any rows of the sum are those of the whole."""

import contextlib
import json

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from hypothesis import given, settings
from hypothesis import strategies as st
from loras import STYLES, lora_tensors, original_name, underscored, write_lora
from originals import original_transformer, scaled_fp8
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file

from jaxwan.config import TransformerConfig
from jaxwan.convert import diffusers, original
from jaxwan.convert.detect import config_of, kind_of, rules_of
from jaxwan.convert.files import TensorFiles
from jaxwan.convert.load import flat_shapes, prove
from jaxwan.convert.lora import Lora, names_in, with_loras
from jaxwan.convert.rules import CheckpointError, expected_sources
from jaxwan.models.layers import abstract
from jaxwan.models.transformer import WanTransformer
from jaxwan.pipelines.dit import load_weights
from jaxwan.sharding.mesh import MeshSpec, make_mesh

ONE_BLOCK = ("attn1.to_q", "attn2.to_out.0", "attn2.add_k_proj", "ffn.net.0.proj", "ffn.net.2")
ALL = [
    f"blocks.{i}.{name}"
    for i in range(2)
    for name in (
        *(f"{attention}.{part}" for attention in ("attn1", "attn2") for part in ("to_q", "to_k", "to_v", "to_out.0")),
        "attn2.add_k_proj", "attn2.add_v_proj", "ffn.net.0.proj", "ffn.net.2",
    )
]  # fmt: skip
ENDS = (
    "condition_embedder.time_embedder.linear_1", "condition_embedder.text_embedder.linear_2",
    "condition_embedder.time_proj", "condition_embedder.image_embedder.ff.net.0.proj", "proj_out",
)  # fmt: skip
IMAGE = "add_k_proj", "add_v_proj", "image_embedder"
# of what is near 1, in float32: the sum's own rounding, and that of a product of 8 terms
ATOL = 2e-6


def make_model(**config):
    """A DiT with layers of more rows than are made at once, and of no multiple of them."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = WanTransformer3DModel(
            num_attention_heads=1, attention_head_dim=128, in_channels=16, out_channels=16, text_dim=24, freq_dim=32,
            ffn_dim=700, num_layers=2, **config,
        )  # fmt: skip
        for parameter in model.parameters():
            parameter.data = torch.randn_like(parameter)
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def tensors():
    """Those of a DiT with image attention."""
    return dict(make_model(image_dim=32, added_kv_proj_dim=128).state_dict())


@pytest.fixture(scope="module")
def base(tensors, tmp_path_factory):
    """layout -> the DiT's file."""
    folder = tmp_path_factory.mktemp("base")
    save_file(tensors, folder / "diffusers.safetensors")
    save_file(original_transformer(tensors), folder / "original.safetensors")
    return {layout: folder / f"{layout}.safetensors" for layout in ("diffusers", "original")}


def factors(tensors, modules, seed=0):
    """A rank of its own for each module."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for i, module in enumerate(modules):
        rows, *columns = tensors[f"{module}.weight"].shape
        rank = 4 * (1 + i % 2)
        down = torch.randn(rank, *columns, generator=generator)
        found[module] = down, torch.randn(rows, rank, *[1] * (len(columns) - 1), generator=generator) / 3
    return found


def by_hand(down, up):
    product = up.flatten(1).double() @ down.flatten(1).double()
    return product.reshape(len(up), *down.shape[1:])


def read(path, *loras):
    files = with_loras(TensorFiles((path,)), loras)
    return {key: files.read(key) for key in files.shapes}


def assert_adds(path, tensors, lora, expected, atol=ATOL):
    """A LoRA adds `expected`, by Diffusers' names of tensors, and leaves all else as it is; in whatever layout."""
    names = {new: old for old in tensors for new in original_transformer({old: torch.zeros(())})}
    found = {names.get(key, key): value for key, value in read(path, lora).items()}
    assert found.keys() == tensors.keys()
    for key, tensor in tensors.items():
        if key not in expected:
            np.testing.assert_array_equal(found[key], tensor.numpy(), err_msg=key)
            continue
        delta = expected[key].double().reshape(tensor.shape)
        assert delta.abs().max() > 0.05, key
        np.testing.assert_allclose(found[key], (tensor.double() + delta).numpy(), rtol=0, atol=atol, err_msg=key)


# Styles


@pytest.mark.parametrize("layout", ["diffusers", "original"])
@pytest.mark.parametrize("style", STYLES)
def test_a_product_is_added_whatever_the_style_and_the_layout(tmp_path, tensors, base, style, layout):
    modules = [f"blocks.{i}.{name}" for i in range(2) for name in ONE_BLOCK]
    modules += [] if style == "musubi" else [*ENDS, "patch_embedding"]
    lora, alpha = factors(tensors, modules), 2.0 if style in ("comfyui", "musubi", "videox", "lycoris") else None
    stored = lora_tensors(lora, style, alpha)
    path = tmp_path / "lora"
    if style == "longlive":
        torch.save({"generator_lora": stored, "step": 7}, path)
    else:
        write_lora(path, stored)
    expected = {
        f"{module}.weight": 0.5 * (alpha / len(down) if alpha else 1.0) * by_hand(down, up)
        for module, (down, up) in lora.items()
    }
    assert_adds(base[layout], tensors, Lora(path, 0.5), expected)


def lightx2v(tensors, seed=3):
    """Whole differences of all that is no large matrix, in the names of the original layout -> of which tensor each."""
    generator, found = torch.Generator().manual_seed(seed), {}
    for key, tensor in tensors.items():
        (name,) = original_transformer({key: tensor})
        head, _, kind = name.rpartition(".")
        if kind == "weight" and "." in head and ".attn" not in key and "ffn" not in key or "norm" in key:
            name = f"{head}.{'diff' if kind == 'weight' else 'diff_b'}"
        elif kind in ("bias", "modulation"):
            name = f"{head}.{'diff_b' if kind == 'bias' else 'diff_m'}"
        elif name == "patch_embedding.weight":
            name = "patch_embedding.diff"
        else:
            continue
        found[f"diffusion_model.{name}"] = key, torch.randn(tensor.shape, generator=generator)
    return found


@pytest.mark.parametrize("layout", ["diffusers", "original"])
def test_differences_of_norms_biases_and_modulations_are_added_by_strength_alone(tmp_path, tensors, base, layout):
    whole, lora = lightx2v(tensors), factors(tensors, [f"blocks.{i}.attn1.to_v" for i in range(2)])
    kinds = ("norm", "bias", "scale_shift_table", "patch_embedding", "proj_out.weight")
    assert all(any(kind in key for key, _ in whole.values()) for kind in kinds)
    stored = lora_tensors(lora, "lightx2v", 4.0) | {name: diff for name, (_, diff) in whole.items()}
    expected = {key: -0.25 * diff for key, diff in whole.values()}
    expected |= {f"{m}.weight": -0.25 * 4 / len(down) * by_hand(down, up) for m, (down, up) in lora.items()}
    assert_adds(base[layout], tensors, Lora(write_lora(tmp_path / "x", stored), -0.25), expected)


def lokr(shape, generator, *, factored):
    """LoKr's tensors for a matrix of a shape whose sides 4 divides; which of the two are products, of rank 3."""
    sizes = {"1": (4, 2), "2": (shape[0] // 4, shape[1] // 2)}
    parts = {}
    for i, (rows, columns) in sizes.items():
        if i in factored:
            parts[f"lokr_w{i}_a"] = torch.randn(rows, 3, generator=generator)
            parts[f"lokr_w{i}_b"] = torch.randn(3, columns, generator=generator)
        else:
            parts[f"lokr_w{i}"] = torch.randn(rows, columns, generator=generator)
    w1, w2 = (
        parts[f"lokr_w{i}_a"].double() @ parts[f"lokr_w{i}_b"].double()
        if i in factored
        else parts[f"lokr_w{i}"].double()
        for i in "12"
    )
    return parts, torch.kron(w1, w2) * (2.0 / 3 if factored else 1.0)


@pytest.mark.parametrize("prefix", ["lycoris_", "lora_unet_", "diffusion_model."])
@pytest.mark.parametrize("factored", ["", "1", "2", "12"])
def test_lokr_is_a_kronecker_product_with_alpha_where_a_side_is_factored(tmp_path, tensors, base, factored, prefix):
    generator, stored, expected = torch.Generator().manual_seed(1), {}, {}
    for module in ("blocks.0.attn1.to_k", "blocks.1.ffn.net.0.proj"):
        parts, delta = lokr(tensors[f"{module}.weight"].shape, generator, factored=factored)
        name = original_name(module)
        name = f"{prefix}{underscored(name) if prefix.endswith('_') else name}"
        stored |= {f"{name}.{part}": value for part, value in parts.items()} | {f"{name}.alpha": torch.tensor(2.0)}
        expected[f"{module}.weight"] = delta
    # numbers of up to 50, in float32
    assert_adds(base["diffusers"], tensors, Lora(write_lora(tmp_path / "x", stored)), expected, atol=1e-5)


def test_loha_is_two_products_multiplied_number_by_number(tmp_path, tensors, base):
    stored, expected = {}, {}
    for module in ("blocks.0.attn2.to_q", "blocks.1.ffn.net.2"):
        (a, b), (c, d) = (factors(tensors, [module], seed)[module] for seed in (0, 1))
        name = f"lycoris_{underscored(original_name(module))}"
        stored |= {f"{name}.hada_w1_a": b, f"{name}.hada_w1_b": a, f"{name}.hada_w2_a": d, f"{name}.hada_w2_b": c}
        stored[f"{name}.alpha"] = torch.tensor(2.0)
        expected[f"{module}.weight"] = 0.5 * by_hand(a, b) * by_hand(c, d) * 2.0 / len(a)
    assert_adds(base["original"], tensors, Lora(write_lora(tmp_path / "x", stored), 0.5), expected, atol=1e-5)


def test_several_are_added_each_with_its_strength(tmp_path, tensors, base):
    first, second = factors(tensors, ALL, 0), factors(tensors, ALL[:5], 1)
    one = Lora(write_lora(tmp_path / "1", lora_tensors(first, "comfyui")), 0.5)
    other = Lora(write_lora(tmp_path / "2", lora_tensors(second, "musubi", 8.0)), -2.0)
    found = read(base["diffusers"], one, other)
    for module, (down, up) in first.items():
        expected = tensors[f"{module}.weight"].double() + 0.5 * by_hand(down, up)
        if module in second:
            down, up = second[module]
            expected -= 2.0 * 8 / len(down) * by_hand(down, up)
        np.testing.assert_allclose(found[f"{module}.weight"], expected.numpy(), rtol=0, atol=1e-5)


# Against Diffusers and PEFT


def fused(model, path, scale):
    """The tensors of a model with a LoRA, by Diffusers."""
    pipe = WanPipeline(tokenizer=None, text_encoder=None, vae=None, scheduler=FlowMatchEulerDiscreteScheduler(),
                       transformer=model)  # fmt: skip
    pipe.load_lora_weights(path)
    pipe.fuse_lora(components=["transformer"], lora_scale=scale)
    pipe.unload_lora_weights()
    return {key: value.numpy() for key, value in pipe.transformer.state_dict().items()}


@pytest.mark.parametrize("style", ["diffusers", "diffusers with metadata", "comfyui", "lightx2v", "musubi"])
def test_the_sum_is_that_of_diffusers(tmp_path, tensors, base, style):
    modules = ALL + ([] if style == "musubi" else [name for name in ENDS if name != "proj_out"])
    lora, config = factors(tensors, modules), None
    if style == "diffusers with metadata":
        ranks = {module: len(down) for module, (down, _) in lora.items()}
        said = LoraConfig(
            r=4, lora_alpha=6, rank_pattern=ranks, alpha_pattern={"attn1.to_q": 3}, use_rslora=True
        ).to_dict()  # fmt: skip
        said["target_modules"] = list(lora)
        config = {f"transformer.{name}": x for name, x in said.items() if isinstance(x, str | int | dict | list)}
    stored = lora_tensors(lora, style.partition(" ")[0], 3.0 if style in ("lightx2v", "musubi") else None)
    if style == "lightx2v":  # of differences, those that Diffusers reads: of norms and modulations it does not
        read_by_both = ("attn1.to_", "attn2.to_", "attn2.add_", "ffn.net.", "time_embedder", "text_embedder")
        ends = [name for name in stored if "text_embedding" in name or "time_" in name or "img_emb" in name]
        for name in ends:  # and scales of these by alpha neither
            if name.endswith(".alpha"):
                del stored[name]
        whole = {
            name: diff for name, (key, diff) in lightx2v(tensors).items()
            if name.endswith("diff_b") and (any(part in key for part in read_by_both) or "proj_out" in key)
            and f"{key.removesuffix('.bias')}" in [*lora, "proj_out"]
        }  # fmt: skip
        whole["diffusion_model.head.head.diff"] = torch.randn(tensors["proj_out.weight"].shape)
        assert len(whole) > 20
        stored |= whole
    path = write_lora(tmp_path / "lora.safetensors", stored, config)
    expected = fused(make_model(image_dim=32, added_kv_proj_dim=128), path, 0.75)
    found = read(base["diffusers"], Lora(path, 0.75))
    changed = [key for key in expected if (expected[key] != tensors[key].numpy()).any()]
    assert len(changed) >= len(modules)
    for key, value in expected.items():
        np.testing.assert_allclose(found[key], value, rtol=0, atol=ATOL, err_msg=key)


@pytest.mark.filterwarnings("ignore:.*invalid shape")  # which PEFT says of biases
@pytest.mark.parametrize("rslora", [False, True])
def test_the_sum_is_that_of_peft_with_its_configuration_beside(tmp_path, tensors, base, rslora):
    model = make_model(image_dim=32, added_kv_proj_dim=128)
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["to_q", "to_out.0", "proj_out"], use_rslora=rslora,
                        init_lora_weights=False, lora_bias=True, rank_pattern={"attn2.to_q": 8},
                        alpha_pattern={"blocks.1.attn1.to_q": 5, "proj_out": 1})  # fmt: skip
    adapted = get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    adapted.save_pretrained(tmp_path)
    expected = {key: value.numpy() for key, value in adapted.merge_and_unload().state_dict().items()}
    found = read(base["diffusers"], Lora(tmp_path / "adapter_model.safetensors"))
    assert sum((found[key] != tensors[key].numpy()).any() for key in found) == 18
    for key, value in expected.items():
        np.testing.assert_allclose(found[key], value, rtol=0, atol=2 * ATOL, err_msg=key)


# Bits


def test_on_fp8_the_sum_is_that_on_what_it_means(tmp_path, tensors):
    stored, meaning = scaled_fp8(original_transformer(tensors), "model.diffusion_model.")
    save_file(stored, tmp_path / "fp8.safetensors")
    save_file(meaning, tmp_path / "twin.safetensors")
    lora = Lora(write_lora(tmp_path / "x", lora_tensors(factors(tensors, ALL), "comfyui")))
    ours, twin = (read(tmp_path / f"{name}.safetensors", lora) for name in ("fp8", "twin"))
    assert ours.keys() == twin.keys() and stored["model.diffusion_model.blocks.0.ffn.0.weight"].dtype.itemsize == 1
    for key, value in twin.items():
        np.testing.assert_array_equal(ours[key], value, err_msg=key)


@pytest.fixture(scope="module")
def every_kind(tmp_path_factory, tensors, base):
    """The files of a DiT with a LoRA of every kind of sum, each on a tensor of 700 rows or 128."""
    folder, generator = tmp_path_factory.mktemp("kinds"), torch.Generator().manual_seed(2)
    first, second = "blocks.0.ffn.net.0.proj", "blocks.1.ffn.net.0.proj"
    (a, b), (c, d) = (factors(tensors, [second], seed)[second] for seed in (0, 1))
    stored = lora_tensors(factors(tensors, [first, "blocks.0.ffn.net.2"]), "diffusers")
    stored |= {f"{second}.{name}": x for name, x in zip(
        ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"), (b, a, d, c), strict=True)}  # fmt: skip
    parts, _ = lokr(tensors[f"{first}.weight"].shape, generator, factored="2")
    other = {f"{first}.{name}": value for name, value in parts.items()}
    other[f"{second}.diff"] = torch.randn(tensors[f"{second}.weight"].shape, generator=generator)
    other[f"{first}.diff_b"] = torch.randn(700, generator=generator)
    loras = [Lora(write_lora(folder / str(i), tensors)) for i, tensors in enumerate((stored, other))]
    return with_loras(TensorFiles((base["diffusers"],)), loras)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(["0.ffn.net.0.proj.weight", "1.ffn.net.0.proj.weight", "0.ffn.net.2.weight",
                        "0.ffn.net.0.proj.bias"]), st.integers(0, 700), st.integers(0, 700))  # fmt: skip
def test_any_rows_of_a_sum_are_those_of_the_whole_bit_for_bit(every_kind, name, start, stop):
    key, rows = f"blocks.{name}", slice(start, stop)
    np.testing.assert_array_equal(every_kind.read(key, rows), every_kind.read(key)[rows])
    assert every_kind.num_bytes(key, rows) <= every_kind.num_bytes(key)


@pytest.mark.parametrize("mesh", ["pp=2", "tp=2", "pp=2,tp=4"])
def test_parameters_on_a_mesh_are_those_on_one_device_bit_for_bit(tmp_path, tensors, base, mesh):
    model = {key: value for key, value in tensors.items()}
    config = config_of(kind_of(model), {key: value.shape for key, value in model.items()})
    config = TransformerConfig(**{**vars(config), "num_attention_heads": 8, "attention_head_dim": 16})
    lora = Lora(write_lora(tmp_path / "x", lora_tensors(factors(tensors, ALL), "comfyui")), 0.7)
    arrays = []
    for spec in (MeshSpec(), MeshSpec.parse(mesh)):
        files = with_loras(TensorFiles((base["original"],)), [lora])
        weights = load_weights(config, [files], make_mesh(spec), "bfloat16")
        flat = {path: leaf for part in weights for path, leaf in flat_arrays(part)}
        arrays.append(flat)
    for path, value in arrays[0].items():
        np.testing.assert_array_equal(bits(value), bits(arrays[1][path]), err_msg=path)


def flat_arrays(state):
    from flax import nnx

    return [(".".join(map(str, path)), np.asarray(leaf[...])) for path, leaf in nnx.to_flat_state(state)]


def bits(array):
    return array.view(np.uint16 if array.dtype.itemsize == 2 else np.uint32)


# Names


@pytest.mark.parametrize("image", [False, True])
def test_all_names_of_all_tensors_at_full_size_are_told_apart(image):
    config = TransformerConfig(in_channels=36, **{"image_dim": 1280, "added_kv_proj_dim": 5120} if image else {})
    shapes = {p: s.shape for p, s in flat_shapes(abstract(WanTransformer, config, jnp.dtype("float32"))[1]).items()}
    tables = [expected_sources(shapes, rules) for rules in (original.TRANSFORMER, diffusers.TRANSFORMER)]
    for table in tables:
        names = names_in({key: shape for key, (_, shape) in table.items()}, what="model")
        keys = {into: key for key, (into, _) in table.items()}
        for other in tables:
            for name, (into, _) in other.items():
                assert names[name] == names[name.replace(".", "_")] == keys[into]


def test_a_merged_file_is_proved_to_fit_as_any_other(tmp_path, tensors, base, every_kind):
    config = config_of(kind_of(tensors), {key: value.shape for key, value in tensors.items()})
    shapes = {p: s.shape for p, s in flat_shapes(abstract(WanTransformer, config, jnp.dtype("float32"))[1]).items()}
    found = prove(shapes, every_kind, rules_of("transformer", config, every_kind.shapes), what="x")
    assert len(found) == len(tensors)
    ints = {key: value.to(torch.int8) if key.endswith("ffn.net.2.weight") else value for key, value in tensors.items()}
    save_file(ints, tmp_path / "int8.safetensors")
    files = with_loras(TensorFiles((tmp_path / "int8.safetensors",)), every_kind.loras)
    with pytest.raises(CheckpointError, match="ffn.net.2.weight is I8"):
        prove(shapes, files, rules_of("transformer", config, files.shapes), what="x")


# Models with and without image attention


@pytest.mark.parametrize("style", ["diffusers", "comfyui", "musubi"])
def test_modules_for_images_pass_over_a_model_without_them(tmp_path, tensors, style):
    plain = {key: value for key, value in tensors.items() if not any(part in key for part in (*IMAGE, "norm_added"))}
    save_file(plain, tmp_path / "plain.safetensors")
    modules = ALL + ([] if style == "musubi" else list(ENDS))
    lora = factors(tensors, modules)
    stored = lora_tensors(lora, style)
    if style == "comfyui":
        stored["diffusion_model.blocks.0.cross_attn.norm_k_img.diff"] = torch.ones(128)
        stored["diffusion_model.img_emb.proj.0.diff_b"] = torch.ones(32)
    expected = {f"{m}.weight": by_hand(*pair) for m, pair in lora.items() if not any(part in m for part in IMAGE)}
    path = write_lora(tmp_path / "x", stored)
    assert_adds(tmp_path / "plain.safetensors", plain, Lora(path), expected)
    only = {name: value for name, value in stored.items() if "img" in name or "add_" in name or "image_" in name}
    with pytest.raises(CheckpointError, match="changes nothing in .*plain.safetensors"):
        read(tmp_path / "plain.safetensors", Lora(write_lora(tmp_path / "only", only)))


# What is refused

Q = "diffusion_model.blocks.0.self_attn.q"


@pytest.mark.parametrize(
    ("stored", "words"),
    [
        ({f"{Q}.dora_scale": torch.ones(128, 1)}, r"is a DoRA \(diffusion_model.*, which rescales weights"),
        ({f"{Q}.lora_magnitude_vector": torch.ones(128)}, "is a DoRA"),
        ({"text_encoder.x.lora_A.weight": torch.ones(4, 9), "text_encoder.x.lora_B.weight": torch.ones(9, 4)},
         r"does not fit .*: 1 without a place in it \(text_encoder.x.weight\)"),
        ({f"{Q}.scale": torch.ones(4), f"{Q}.set_weight": torch.ones(4)},
         rf"2 without a place in it \({Q}.scale, {Q}.set_weight\)"),
        ({f"{Q}.lora_mid.weight": torch.ones(4, 4)}, "1 without a place in it"),
        ({f"{Q}0.lora_A.weight": torch.ones(4, 128), f"{Q}0.lora_B.weight": torch.ones(128, 4)}, "1 without a place"),
        ({"lora_unet_blocks_2_ffn_0.lora_up.weight": torch.ones(700, 4),
          "lora_unet_blocks_2_ffn_0.lora_down.weight": torch.ones(4, 128)}, r"\(blocks_2_ffn_0.weight\)"),
        ({f"{Q[:-1]}v.lora_A.weight": torch.ones(4, 128)}, r"1 of other ranks or shapes \(.*attn.v: one of two factor"),
        ({f"{Q[:-1]}v.lora_A.weight": torch.ones(4, 128), f"{Q[:-1]}v.lora_B.weight": torch.ones(128, 8)},
         r"self_attn.v: factors \(128, 8\) and \(4, 128\)"),
        ({f"{Q[:-1]}v.lora_A.weight": torch.ones(4, 300), f"{Q[:-1]}v.lora_B.weight": torch.ones(128, 4)},
         r"self_attn.v: \(128, 300\) for \(128, 128\)"),
        ({f"{Q[:-1]}v.alpha": torch.ones(())}, "self_attn.v: alpha without the rest"),
        ({f"{Q}.alpha": torch.ones(3)}, r"self_attn.q: alpha of shape \(3,\)"),
        ({f"{Q}.alpha": torch.tensor(float("nan"))}, "self_attn.q: alpha nan"),
        ({f"{Q}.lokr_w1": torch.ones(4, 4)}, "self_attn.q: one of two factors is missing"),
        ({f"{Q}.hada_w1_a": torch.ones(4, 4)}, "self_attn.q: one of two factors is missing"),
        ({f"{Q}.diff": torch.ones(128, 128, dtype=torch.int8)}, "self_attn.q: diff is int8"),
        ({f"{Q[:-1]}k.diff_b": torch.ones(64), "diffusion_model.head.diff_m": torch.ones(128, 2)},
         r"2 of other ranks or shapes \(blocks.0.self_attn.k: \(64,\) for \(128,\); head: \(128, 2\)|head: "),
        ({f"{Q}.lora_A.default.weight": torch.ones(4, 128)}, "holds two adapters"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_in_one_sentence(tmp_path, tensors, base, stored, words):
    good = lora_tensors(factors(tensors, ["blocks.0.attn1.to_q"]), "comfyui")
    path = write_lora(tmp_path / "lora.safetensors", good | stored)
    for layout in ("diffusers", "original"):
        with pytest.raises(CheckpointError, match=f"lora.safetensors.*{words}"):
            read(base[layout], Lora(path))


def test_a_whole_model_and_another_component_are_no_lora(tmp_path, base):
    with pytest.raises(CheckpointError, match="diffusers.safetensors holds no LoRA, but .* and 85 more"):
        read(base["diffusers"], Lora(base["diffusers"]))
    save_file({"decoder.middle.0.residual.0.gamma": torch.ones(3)}, tmp_path / "vae.safetensors")
    with pytest.raises(CheckpointError, match="vae.safetensors holds a vae and not a transformer"):
        read(tmp_path / "vae.safetensors", Lora(base["diffusers"]))


_PREFIXES = ("", "diffusion_model.", "lora_unet_", "transformer_2.", "base_model.model.model.", "lycoris_")
_MODULES = ("blocks.0.self_attn.q", "blocks_1_ffn_0", "head", "blocks.1.norm3", "blocks.9.attn1.to_q", "", "img_emb.x")
_PARTS = (
    "lora_A.weight", "lora_B.weight", "lora_up.weight", "lora_down.x.weight", "lora_B.bias", "alpha", "diff", "diff_b",
    "diff_m", "lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "hada_w1_a", "hada_w1_b",
    "hada_w2_a", "hada_w2_b", "lokr_t2", "weight",
)  # fmt: skip


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_a_file_of_any_parts_is_a_sum_or_is_refused(tmp_path_factory, base, data):
    sizes = st.lists(st.sampled_from([0, 1, 2, 4, 32, 64, 128]), max_size=4)
    module = data.draw(st.sampled_from(_PREFIXES)) + data.draw(st.sampled_from(_MODULES))
    stored = {}
    for part in data.draw(st.lists(st.sampled_from(_PARTS), min_size=1, max_size=5, unique=True)):
        dtype = data.draw(st.sampled_from([torch.float32, torch.float16, torch.int8, torch.float8_e4m3fn]))
        stored[f"{module}.{part}"] = torch.ones(data.draw(sizes)).to(dtype)
    path = write_lora(tmp_path_factory.getbasetemp() / "any.safetensors", stored)
    with contextlib.suppress(CheckpointError):
        found = read(base["original"], Lora(path))
        assert all(value.dtype == np.float32 for value in found.values())


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ("[", "is no configuration of a LoRA"),
        ("[1]", "is no configuration of a LoRA"),
        ('{"lora_alpha": "8"}', "alpha '8'"),
        ('{"lora_alpha": 8, "use_dora": true}', "says that this is a 'DORA' of PEFT's, which is not read"),
        ('{"peft_type": "LOKR"}', "says that this is a 'LOKR'"),
        ('{"alpha_pattern": {"to_(q|k)": 3}}', "is no configuration of a LoRA"),
        ('{"alpha_pattern": 3}', "is no configuration of a LoRA"),
    ],
)
def test_a_configuration_that_cannot_be_followed_is_refused(tmp_path, tensors, base, config, words):
    stored = lora_tensors(factors(tensors, ALL[:2]), "peft")
    path = write_lora(tmp_path / "x.safetensors", stored)
    (tmp_path / "adapter_config.json").write_text(config)
    with pytest.raises(CheckpointError, match=words):
        read(base["diffusers"], Lora(path))
    write_lora(path, lora_tensors(factors(tensors, ALL[:2]), "comfyui"))
    read(base["diffusers"], Lora(path))  # of which a stranger's configuration beside it says nothing
    save_file(stored, path, {"lora_adapter_metadata": config})
    with pytest.raises(CheckpointError, match=words):
        read(base["diffusers"], Lora(path))


def test_a_file_for_both_experts_gives_each_its_own(tmp_path, tensors, base):
    first, second = factors(tensors, ALL[:3], 0), factors(tensors, ALL[3:5], 1)
    stored = lora_tensors(first, "diffusers")
    stored |= {f"transformer_2.{name.partition('.')[2]}": x for name, x in lora_tensors(second, "diffusers").items()}
    config = {"transformer.lora_alpha": 3, "transformer_2.lora_alpha": 2}
    path = write_lora(tmp_path / "x", stored, config)
    for expert, own, alpha in (("high", first, 3), ("low", second, 2)):
        expected = {f"{m}.weight": alpha / len(pair[0]) * by_hand(*pair) for m, pair in own.items()}
        assert_adds(base["diffusers"], tensors, Lora(path, expert=expert), expected)
    with pytest.raises(CheckpointError, match="holds LoRAs of two experts, and the model has one"):
        read(base["diffusers"], Lora(path))


@pytest.mark.parametrize(
    ("text", "lora"),
    [
        ("a.safetensors", Lora("a.safetensors")),
        ("a.safetensors:0.8", Lora("a.safetensors", 0.8)),
        ("high=a.safetensors:-1", Lora("a.safetensors", -1.0, "high")),
        ("low=b", Lora("b", 1.0, "low")),
        (r"C:\loras\a.safetensors", Lora(r"C:\loras\a.safetensors")),
        (r"high=C:\loras\a.safetensors:.5", Lora(r"C:\loras\a.safetensors", 0.5, "high")),
        ("a:2.safetensors:1e-1", Lora("a:2.safetensors", 0.1)),
        ("a:2:1", Lora("a:2", 1.0)),
        ("mid=a:nan", Lora("mid=a:nan")),
        (":3", Lora(":3")),
    ],
)
def test_a_strength_is_a_number_behind_the_last_colon(text, lora):
    assert Lora.parse(text) == lora


def test_peft_s_own_configuration_is_valid_json(tmp_path):
    """What the tests above write is what Diffusers and PEFT write."""
    LoraConfig(r=2, target_modules=["to_q"]).save_pretrained(tmp_path)
    assert {"lora_alpha", "alpha_pattern", "use_rslora", "use_dora", "peft_type"} <= json.loads(
        (tmp_path / "adapter_config.json").read_text()
    ).keys()
