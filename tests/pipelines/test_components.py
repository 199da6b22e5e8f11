"""Parts named one by one, in the layouts of ComfyUI and of the original repositories: the same videos as of a folder in
the Diffusers layout that holds what these files mean."""

import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from checkpoints import make_checkpoint
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
        (lambda p: without(p, "transformer"), "lack a transformer: add --component transformer=FILE"),
        (lambda p: without(p, "vae"), "lack a vae: add --component vae=FILE"),
        (
            lambda p: without(p, "tokenizer") | {"text_encoder": bare_encoder(p)},
            "lack a tokenizer, .* add --component tokenizer=FOLDER",
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


def test_a_file_instead_of_a_checkpoint_says_how_to_give_it(twin):
    with pytest.raises(NotADirectoryError, match=re.escape("give each as --component NAME=FILE")):
        open_checkpoint(twin[1]["transformer"])


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
