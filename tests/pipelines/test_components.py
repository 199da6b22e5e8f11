"""Parts named one by one, in the layouts of ComfyUI and of the original repositories: the same videos as of a folder in
the Diffusers layout that holds what these files mean."""

import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from checkpoints import FAMILIES, Family, make_checkpoint
from comfyui import FILE, make_twins
from gguf_writing import write_gguf
from originals import llama_text_encoder, original_image_encoder, original_text_encoder, original_transformer
from published import PUBLISHED, write_configs
from runs import IMAGE, PROMPTS
from safetensors.torch import load_file, save_file
from sentencepiece import SentencePieceProcessor
from tokenizer_files import train_sentencepiece, write_tokenizer

from jaxwan import WanPipeline, dry_run, open_checkpoint
from jaxwan.config import ConfigError
from jaxwan.convert.rules import CheckpointError
from jaxwan.pipelines.checkpoint import read_checkpoint
from jaxwan.pipelines.components import noise_of
from jaxwan.pipelines.load import check_weights
from jaxwan.pipelines.prompt import SentencePiece, tokenize


@pytest.fixture(scope="module")
def twin(tmp_path_factory):
    """A folder in the Diffusers layout, and files of the same meaning by component."""
    folder = tmp_path_factory.mktemp("twin")
    return folder, make_twins(folder, tmp_path_factory.mktemp("files"))


def latents(model, **arguments):
    pipe = WanPipeline.from_pretrained(model, mesh="pp=2", progress=False, **arguments)
    call = dict(prompt=PROMPTS[0], negative_prompt="", image=IMAGE, height=32, width=48, num_frames=5, seed=0)
    return np.asarray(pipe(**call, num_inference_steps=4, output_type="latent").latents)


def test_two_fp8_files_with_a_vae_and_a_text_encoder_make_the_latents_of_their_twin(twin):
    folder, parts = twin
    expected, ours = open_checkpoint(folder), open_checkpoint(None, components=parts)
    for name in ("transformer", "experts", "text_encoder", "sampler", "boundary_ratio", "variant", "defaults"):
        assert getattr(ours, name) == getattr(expected, name), name
    assert ours.vae == expected.vae and ours.name == "wan2.2_i2v_high_noise_14B_fp8_scaled.safetensors"
    np.testing.assert_array_equal(latents(None, components=parts), latents(folder))


def test_gguf_files_in_16_bits_make_the_latents_of_their_twin(twin, tmp_path):
    """Matrices in float16, all else in float32, as converters write them; the text encoder under llama.cpp's names."""
    folder, parts = twin
    rounded = shutil.copytree(folder, tmp_path / "rounded")
    paths = {}
    for name, file, rename in (
        ("transformer", FILE, original_transformer), ("transformer_2", FILE, original_transformer),
        ("text_encoder", "model.safetensors", llama_text_encoder),
    ):  # fmt: skip
        tensors = {
            key: value.half() if value.ndim == 2 else value.float()
            for key, value in load_file(folder / name / file).items()
        }
        save_file({key: value.float() for key, value in tensors.items()}, rounded / name / file, {"format": "pt"})
        paths[name] = tmp_path / f"{name.replace('transformer_2', 'LowNoise')}-F16.gguf"
        write_gguf(paths[name], {key: value.numpy() for key, value in rename(tensors).items()})
    np.testing.assert_array_equal(latents(None, components=parts | paths), latents(rounded))


def test_a_tokenizer_within_a_text_encoder_is_used_where_no_other_is_given(twin, tmp_path, caplog):
    _, parts = twin
    model = train_sentencepiece(100)
    encoder = load_file(parts["text_encoder"]) | {"spiece_model": torch.tensor(list(model), dtype=torch.uint8)}
    save_file(encoder, tmp_path / "umt5.safetensors")
    parts = without(parts, "tokenizer") | {"text_encoder": tmp_path / "umt5.safetensors"}
    with caplog.at_level("INFO"):
        pipe = WanPipeline.from_pretrained(components=parts, mesh="pp=2", progress=False)
    assert "the tokenizer is the one within umt5.safetensors, SentencePiece's" in caplog.text
    assert isinstance(pipe.parts.tokenizer, SentencePiece)
    own = SentencePieceProcessor(model_proto=model, add_eos=True).encode("the red cat")
    assert tokenize(pipe.parts.tokenizer, "the red cat", len(own))[0].tolist() == own
    for wrong in (torch.zeros(0, dtype=torch.uint8), torch.zeros(9)):
        save_file(encoder | {"spiece_model": wrong}, tmp_path / "umt5.safetensors")
        with pytest.raises(CheckpointError, match="is no SentencePiece model"):
            _ = open_checkpoint(None, components=parts).tokenizer


def test_parts_over_a_model_are_read_instead_of_its_own(twin, tmp_path):
    folder, parts = twin
    bare = shutil.copytree(folder, tmp_path / "bare")
    for name in ("transformer", "transformer_2", "vae", "text_encoder"):
        for path in (bare / name).glob("*.safetensors"):
            path.unlink()
    shutil.rmtree(bare / "tokenizer")
    checkpoint = open_checkpoint(bare, components=parts)
    assert check_weights(checkpoint).startswith(
        "checked by their headers: vae, text_encoder, transformer, transformer_2"
    )
    assert checkpoint.tokenizer is not None and checkpoint.name == "bare"
    report = dry_run(bare, components=parts, mesh="pp=2", height=32, width=48, num_frames=5)
    assert report.weights.startswith("checked")


def test_a_folder_of_an_original_repository_is_a_checkpoint(twin, tmp_path):
    folder, parts = twin
    for name, noise in (("transformer", "high"), ("transformer_2", "low")):
        (tmp_path / f"{noise}_noise_model").mkdir()
        tensors = original_transformer(load_file(folder / name / FILE))
        save_file(tensors, tmp_path / f"{noise}_noise_model" / FILE)
    shutil.copy(parts["vae"], tmp_path / "Wan2.1_VAE.pth")
    tensors = original_text_encoder(load_file(folder / "text_encoder/model.safetensors"))
    torch.save(tensors, tmp_path / "models_t5_umt5-xxl-enc-bf16.pth")
    shutil.copytree(folder / "tokenizer", tmp_path / "google/umt5-xxl")
    np.testing.assert_array_equal(latents(tmp_path), latents(folder))
    assert open_checkpoint(tmp_path).name == tmp_path.name


def test_an_original_image_encoder_fits_a_model_that_has_one(tmp_path):
    make_checkpoint(tmp_path, "2.1-flf2v")
    torch.save(original_image_encoder(load_file(tmp_path / "image_encoder/model.safetensors")), tmp_path / "clip.pth")
    checkpoint = open_checkpoint(tmp_path, components={"image_encoder": tmp_path / "clip.pth"})
    (tmp_path / "image_encoder/model.safetensors").unlink()
    assert "image_encoder" in check_weights(checkpoint)


@pytest.mark.parametrize("name", PUBLISHED)
def test_parts_of_every_published_model_make_its_checkpoint(tmp_path, monkeypatch, name):
    """From configurations at full size, as `test_original.py` shows that tensors tell them."""
    expected = read_checkpoint(write_configs(tmp_path / "configs", name))
    configs = {part: getattr(expected, part) for part in ("transformer", "vae", "text_encoder", "image_encoder")}
    configs |= dict.fromkeys(expected.experts, expected.transformer)
    paths = {part: tmp_path / f"{part}.safetensors" for part, config in configs.items() if config is not None}
    for path in paths.values():
        path.touch()
    paths["tokenizer"] = tmp_path / "tokenizer"
    write_tokenizer(paths["tokenizer"])
    monkeypatch.setattr(
        "jaxwan.pipelines.checkpoint.configs_of", lambda given: {n: configs[n] for n in given if n in configs}
    )
    ours = open_checkpoint(None, components=paths)
    assert ours.name == "transformer.safetensors"
    assert replace(ours, folder=expected.folder, parts=()) == expected


# Causal ones


@pytest.fixture(scope="module")
def causal(twin, tmp_path_factory):
    """What the training of a causal model saves: averages and the model itself, in wrappers, beside other things."""
    folder = tmp_path_factory.mktemp("training")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(FAMILIES, "t2v-128", Family(1, 128, 2))
        make_checkpoint(folder, "t2v-128")
    ema = original_transformer(load_file(folder / "transformer" / FILE))
    wrapped = {f"model._fsdp_wrapped_module.{name.replace('.ffn', '._orig_mod.ffn')}": 0 * t for name, t in ema.items()}
    saved = {"generator": wrapped, "critic": {"x": torch.ones(3)}, "step": 600}
    torch.save(saved | {"generator_ema": {f"model.{name}": t for name, t in ema.items()}}, folder / "model.pt")
    torch.save({"generator_lora": {"base_model.model.blocks.0.self_attn.q.lora_A.default.weight": torch.ones(2, 2)}},
               folder / "lora.pt")  # fmt: skip
    save_file({f"net.{name}": tensor for name, tensor in ema.items()}, folder / "Self-Forcing-1.3B.safetensors")
    return folder


def test_a_causal_checkpoint_is_read_as_its_averages_and_said_to_be_one(causal):
    for name in ("model.pt", "Self-Forcing-1.3B.safetensors"):
        ours = open_checkpoint(causal, components={"transformer": causal / name})
        files, twin = ours.files("transformer"), load_file(causal / "transformer" / FILE)
        np.testing.assert_array_equal(files.read("head.head.weight"), twin["proj_out.weight"].numpy())
        assert check_weights(ours).startswith("checked by their headers")
        report = dry_run(ours, height=32, width=48, num_frames=5)
        assert any("trained causally, to see no later frames: here each sees all" in note for note in report.notes)
    assert not any("causal" in note for note in dry_run(causal, height=32, width=48, num_frames=5).notes)


def test_a_lora_of_training_is_told_to_be_one(causal):
    with pytest.raises(CheckpointError, match="lora.pt holds a LoRA"):
        check_weights(open_checkpoint(causal, components={"transformer": causal / "lora.pt"}))


# Parts that lie beside each other


@pytest.fixture
def lay(twin, tmp_path):
    """Parts as links into a folder: each into the inner folder that `where` says of its kind."""

    def into(**where):
        for name, path in twin[1].items():
            kind = "transformer" if name == "transformer_2" else name
            target = tmp_path / "root" / where.get(kind, "") / ("tokenizer" if name == "tokenizer" else path.name)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(path)
        return tmp_path / "root"

    return into


TREE = {"transformer": "diffusion_models/wan", "vae": "vae", "text_encoder": "text_encoders", "tokenizer": ""}
PLACES = {
    "flat": {}, "tree": TREE, "ComfyUI": {name: f"models/{inner}" for name, inner in TREE.items()},
    "Comfy-Org": {name: f"split_files/{inner}" for name, inner in TREE.items()},
}  # fmt: skip
NAMES = ("transformer", "transformer_2", "vae", "text_encoder")


@pytest.mark.parametrize("place", PLACES)
def test_parts_are_found_beside_each_other(twin, lay, place):
    folder, expected = lay(**PLACES[place]), open_checkpoint(None, components=twin[1])
    high, low = (next(folder.rglob(f"*_{noise}_noise_*")) for noise in ("high", "low"))
    for model in (folder, high, low) if place in ("flat", "ComfyUI") else (folder,):
        ours = open_checkpoint(model)
        assert {name: ours.place(name).resolve() for name in NAMES} == {n: twin[1][n].resolve() for n in NAMES}
        assert ours.tokenizer is not None and ours.place("tokenizer").name == "tokenizer"
        assert replace(ours, folder=expected.folder, parts=expected.parts) == expected
        assert ours.name == (folder.name if model == folder else high.name)
    with pytest.raises(FileNotFoundError, match="has no weights of variant='fp16'"):
        check_weights(open_checkpoint(folder, "fp16"))


def test_other_files_beside_the_parts_do_no_harm(twin, lay, tmp_path):
    folder = lay(**PLACES["ComfyUI"])
    models = folder / "models"
    save_file({"blocks.0.self_attn.q.lora_A.weight": torch.ones(3)}, models / "diffusion_models/a_lora.safetensors")
    (models / "vae/ae.safetensors").write_bytes(b"none")
    save_file(
        {"decoder.1.weight": torch.ones(3), "encoder.0.weight": torch.ones(3)}, models / "vae/taew2_1.safetensors"
    )
    only_first = "encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight"
    t5 = {name: tensor for name, tensor in load_file(twin[1]["text_encoder"]).items() if name != only_first}
    save_file(t5, models / "text_encoders/t5xxl.safetensors")
    (models / "clip").mkdir()
    assert open_checkpoint(folder).place("text_encoder").name == "umt5.safetensors"


def test_of_several_that_fit_the_caller_is_asked(twin, lay):
    folder = lay()
    shutil.copy(twin[1]["text_encoder"], folder / "umt5_fp16.safetensors")
    with pytest.raises(
        ValueError, match="2 files that could be the text_encoder, umt5.safetensors, umt5_fp16.saf.*: say"
    ):
        open_checkpoint(folder)
    given = {"text_encoder": folder / "umt5_fp16.safetensors"}
    assert open_checkpoint(folder, components=given).place("text_encoder") == given["text_encoder"]
    high, low = twin[1]["transformer"], twin[1]["transformer_2"]
    shutil.copy(low, folder / low.name.replace("fp8_scaled", "fp16"))
    with pytest.raises(ValueError, match="3 files that could be the transformer, .*high_noise.*low_noise.*: say which"):
        open_checkpoint(folder, components=given)
    ours = open_checkpoint(folder / high.name, components=given)  # the low one whose name is its own otherwise
    assert ours.place("transformer_2") == folder / low.name
    (folder / low.name).rename(folder / "a_low.safetensors")
    with pytest.raises(ValueError, match="2 files that could be the transformer_2, a_low.safetensors, wan2.2_i2v_low"):
        open_checkpoint(folder / high.name, components=given)


def test_a_file_without_its_other_parts_says_which_flags_to_add(twin, tmp_path):
    path = shutil.copy(twin[1]["transformer"], tmp_path)
    with pytest.raises(ValueError, match=re.escape(
        "components lack a transformer_2, a vae, a text_encoder, which Wan2.2-I2V-A14B needs: add --component "
        "transformer_2=FILE --component vae=FILE --component text_encoder=FILE (components={'transformer_2': …, 'vae'"
    )):  # fmt: skip
        open_checkpoint(path)
    with pytest.raises(ValueError, match="are both given as the transformer: leave one out"):
        open_checkpoint(path, components=twin[1])
    with pytest.raises(ConfigError, match="vae.pth holds a vae and not a transformer"):
        open_checkpoint(shutil.copy(twin[1]["vae"], tmp_path))
    (tmp_path / "folder").mkdir()
    save_file({"vace_blocks.0.x": torch.ones(1)}, tmp_path / "folder/wan_vace.safetensors")
    with pytest.raises(ConfigError, match="wan_vace.safetensors holds tensors of VACE, which is not implemented"):
        open_checkpoint(tmp_path / "folder")


# What is refused


def bare_encoder(parts):
    """The text encoder without a tokenizer of its own."""
    path = parts["text_encoder"].with_name("bare.safetensors")
    save_file({k: v for k, v in load_file(parts["text_encoder"]).items() if k != "spiece_model"}, path)
    return path


def without(parts, *names):
    return {name: path for name, path in parts.items() if name not in names}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda p: without(p, "transformer"), "lack a transformer, which .* needs: add --component transformer=FILE"),
        (lambda p: without(p, "vae"), "lack a vae, which Wan2.2-I2V-A14B needs: add --component vae=FILE"),
        (
            lambda p: without(p, "tokenizer") | {"text_encoder": bare_encoder(p)},
            "lack a tokenizer, which .* add --component tokenizer=FOLDER",
        ),
        (lambda p: without(p, "transformer_2"), "lack a transformer_2, which Wan2.2-I2V-A14B needs: add --component"),
        (lambda p: p | {"transformer": p["transformer_2"]}, "high-noise expert, and .* is the other by its name"),
        (lambda p: p | {"vae": p["text_encoder"]}, "umt5.safetensors holds a text_encoder and not a vae"),
        (lambda p: p | {"text_encoder": p["vae"]}, "vae.pth holds a vae and not a text_encoder"),
        (lambda p: p | {"unet": p["vae"]}, "'unet' is none of transformer, transformer_2, vae"),
        (lambda p: p | {"vae": "nowhere.pth"}, "vae: there is no file or folder nowhere.pth"),
        (lambda p: p | {"vae": 3}, "vae=3 is no file"),
        (lambda p: p | {"tokenizer": p["vae"]}, "is no folder with a tokenizer.json"),
    ],
)
def test_parts_that_lack_others_or_are_others_are_refused_with_what_to_do(twin, change, words):
    with pytest.raises((ValueError, OSError), match=words):
        open_checkpoint(None, components=change(twin[1]))


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"vace_blocks.0.x": 1, "head.modulation": 1}, "holds tensors of VACE, which is not implemented"),
        ({"blocks.0.self_attn.q.lora_A.weight": 1}, "holds a LoRA: give it as --lora FILE"),
        ({"taesd.x": 1}, "holds no transformer of a Wan model"),
        ({"head.modulation": 1}, "lacks 'patch_embedding.weight', which tells its size"),
    ],
)
def test_a_file_of_another_model_is_refused_by_its_name(twin, tmp_path, tensors, words):
    save_file({name: torch.ones(n) for name, n in tensors.items()}, tmp_path / "x.safetensors")
    with pytest.raises(ConfigError, match=f"x.safetensors.*{words}"):
        open_checkpoint(None, components=twin[1] | {"transformer": tmp_path / "x.safetensors"})


def test_a_part_of_another_size_is_refused_before_anything_is_read(twin, tmp_path):
    make_checkpoint(tmp_path, "i2v-A14B")
    with pytest.raises(CheckpointError, match="wan2.2_i2v_high.* does not fit its configuration"):
        check_weights(open_checkpoint(tmp_path, components={"transformer": twin[1]["transformer"]}))
    with pytest.raises(ValueError, match="has no image_encoder; its parts are vae, text_encoder, transformer"):
        open_checkpoint(tmp_path, components={"image_encoder": twin[1]["vae"]})


@pytest.mark.parametrize(
    ("name", "noise"),
    [
        ("wan2.2_t2v_high_noise_14B_fp16.safetensors", "high"), ("Wan2_2-I2V-A14B-LOW_fp8.safetensors", "low"),
        ("low_noise_model", "low"), ("HighNoise-Q4.gguf", "high"), ("slow-highres.safetensors", None),
        ("wan2.1_t2v_14B.safetensors", None), ("high_and_low.safetensors", None),
    ],
)  # fmt: skip
def test_an_expert_is_told_by_its_name(tmp_path, name, noise):
    assert noise_of(tmp_path / name) == noise
