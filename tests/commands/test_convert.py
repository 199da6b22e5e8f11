"""The command that converts, inspects and compares: what it prints, and how it ends."""

import json
import re
import shutil

import pytest
from checkpoints import make_checkpoint
from originals import original_vae
from safetensors.torch import load_file, save_file

from jaxwan.commands.convert import main
from jaxwan.pipelines.checkpoint import BUNDLED_MODEL

pytestmark = pytest.mark.usefixtures("logging_as_before")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints") / "tiny"
    make_checkpoint(folder, "2.1-i2v")
    return folder


@pytest.fixture
def run(capsys):
    def run(*arguments):
        status = main([str(argument) for argument in arguments])
        return (status, *capsys.readouterr())

    return run


def test_a_checkpoint_is_converted_and_held_against_its_source_and_its_checksums(source, tmp_path, run):
    status, out, err = run("convert", source, tmp_path / "new", "--to", "orbax")
    assert (status, out.strip()) == (0, str(tmp_path / "new")) and "convert: " in err
    status, out, err = run("verify", source, tmp_path / "new", "--quiet")
    assert (status, err) == (0, "")
    assert out == "406 tensors are the same, 0 differ, 0 are in one alone\n"
    count = sum(path.is_file() for path in (tmp_path / "new").rglob("*")) - 1  # but for the sums themselves
    assert run("verify", tmp_path / "new", "-q")[:2] == (0, f"{tmp_path / 'new'}: {count} files are as written\n")
    (tmp_path / "new/model_index.json").write_text("{}")
    status, out, err = run("verify", tmp_path / "new", "-q")
    assert (status, out) == (1, "") and "other bytes than were written in model_index.json" in err


def test_what_differs_is_named_and_ends_with_1(source, tmp_path, run):
    other = tmp_path / "vae.safetensors"
    tensors = original_vae(load_file(source / "vae/diffusion_pytorch_model.safetensors"), 1)
    tensors["conv2.bias"] = tensors["conv2.bias"] + 1
    save_file(tensors, other)
    whole = tmp_path / "whole"
    assert run("convert", source, other, whole, "--to", "diffusers")[0] == 0  # the file over the model's part
    status, out, _ = run("verify", source, whole)
    assert status == 1 and "post_quant_conv.bias differs" in out and out.endswith("1 differ, 0 are in one alone\n")
    status, out, _ = run("verify", whole, other, "--json")
    found = json.loads(out)
    assert status == 1 and found["equal"] == 146 and found["different"] == [] and "transformer" in found["only_a"]
    assert run("verify", source, whole, "--tolerance", "0.99")[0] == 1
    status, out, _ = run("verify", other, other)
    assert (status, out) == (0, "146 tensors are the same, 0 differ, 0 are in one alone\n")


def test_what_a_checkpoint_is_is_told_by_its_headers(source, run):
    status, out, _ = run("inspect", source)
    assert status == 0 and out.splitlines()[0].startswith("tiny: Wan2.1-I2V-14B, ")
    assert re.search(r"^transformer +diffusers +188 .* F32 188 +5 unused$", out, re.MULTILINE)
    assert "transformer has unused blocks.0.attn2.norm_added_q.weight" in out
    status, out, _ = run("inspect", BUNDLED_MODEL, "--json")
    found = json.loads(out)
    assert status == 0 and found["loads"] and found["variant"] == "Wan2.2-T2V-A14B"
    assert [(part["name"], part["layout"]) for part in found["components"]] == [
        (name, "diffusers") for name in ("vae", "text_encoder", "transformer", "transformer_2")
    ]
    assert sum(part["num_bytes"] for part in found["components"]) == found["num_bytes"]


def test_what_cannot_be_loaded_is_told_with_the_rest(source, tmp_path, run):
    folder = shutil.copytree(source, tmp_path / "broken")
    path = folder / "vae/diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    del tensors["decoder.conv_in.bias"]
    save_file(tensors, path, {"format": "pt"})
    (folder / "text_encoder/model.safetensors").unlink()
    status, out, _ = run("inspect", folder)
    assert status == 1 and re.search(r"^image_encoder +diffusers +55", out, re.MULTILINE)
    assert re.search(r"vae cannot be loaded: .* 1 missing \(decoder.conv_in.bias\)", out)
    assert re.search(r"text_encoder cannot be loaded: .* has no .*model.safetensors", out)


def test_a_file_alone_is_told_too(source, tmp_path, run):
    status, out, _ = run("inspect", source / "vae/diffusion_pytorch_model.safetensors")
    assert status == 0 and re.search(r"^vae +diffusers +146", out, re.MULTILINE)
    assert run("inspect", source / "vae")[:2] == (0, out.replace("diffusion_pytorch_model.safetensors", "vae"))
    save_file({"a.lora_A.weight": next(iter(load_file(source / "text_encoder/model.safetensors").values()))},
              tmp_path / "x.safetensors")  # fmt: skip
    status, out, _ = run("inspect", tmp_path / "x.safetensors")
    assert status == 1 and "cannot be loaded: holds a LoRA" in out


def test_a_dry_run_says_what_would_be_written_and_writes_nothing(source, tmp_path, run):
    arguments = ["convert", source, tmp_path / "new", "--to", "original", "--dtype", "bfloat16", "--dry-run"]
    status, out, _ = run(*arguments)
    assert status == 0 and "Wan2.1_VAE.pth" not in out and out.splitlines()[-1].endswith("free: enough")
    assert re.search(r"^transformer: \d+ tensors F32 as bfloat16, \d+ tensors F32 as float32$", out, re.MULTILINE)
    status, out, _ = run(*arguments, "--json")
    found = json.loads(out)
    assert found["fits"] and {file["name"] for file in found["files"]} >= {"Wan2.1_VAE.pth", "config.json"}
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["convert", "x", "--to", "orbax"], "x is read or written"),
        (["convert", "nothing", "x", "--to", "orbax"], "there is no folder nothing"),
        (["convert", BUNDLED_MODEL, "x", "--to", "orbax", "--dtype", "fp8"], "not one of bfloat16, float16, float32"),
        (["convert", BUNDLED_MODEL, "x", "--to", "orbax", "--shard-size", "5"], "--shard-size '5' has no unit"),
        (["convert", BUNDLED_MODEL, "x", "--to", "orbax", "--component", "vae"], "--component vae is no NAME=FILE"),
        (["convert", BUNDLED_MODEL, BUNDLED_MODEL, "x", "--to", "orbax"], "are several checkpoints"),
        (["convert", BUNDLED_MODEL, BUNDLED_MODEL, "--to", "orbax"], "are several checkpoints|in each other"),
        (["verify", BUNDLED_MODEL], "has no SHA256SUMS, which a converted folder has"),
        (["verify", BUNDLED_MODEL, BUNDLED_MODEL, "--tolerance", "2"], "--tolerance 2.0 is no share"),
        (["verify", BUNDLED_MODEL, BUNDLED_MODEL, "--most", "-1"], "--most -1 is no number of tensors"),
        (["convert", BUNDLED_MODEL, "x" * 250, "--to", "orbax"], "cannot be written into .*: choose another folder"),
    ],
)
def test_what_cannot_be_done_is_one_sentence(tmp_path, monkeypatch, run, arguments, words):
    monkeypatch.chdir(tmp_path)
    status, out, err = run(*arguments)
    assert (status, out) == (1, "") and re.search(words, err.splitlines()[-1])
    assert err.splitlines()[-1].startswith("error: ") and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["convort", "a", "b"], "invalid choice: 'convort'"),
        (["convert", "a", "b", "--too", "orbax", "--to", "orbax"], "there is no flag --too: did you mean --to?"),
        (["convert", "a", "b", "--to", "zip"], "invalid choice: 'zip'"),
        (["inspect"], "the following arguments are required"),
    ],
)
def test_flags_that_are_none_end_with_2(run, capsys, arguments, words):
    with pytest.raises(SystemExit) as ended:
        run(*arguments)
    assert ended.value.code == 2 and words in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["--help"], ["convert", "--help"]])
def test_help_teaches(run, capsys, arguments):
    with pytest.raises(SystemExit) as ended:
        run(*arguments)
    assert ended.value.code == 0 and re.search("SRC", capsys.readouterr().out)
