"""Checkpoints of every family written in the other layouts and back: the same bits; what Diffusers and Orbax make of
them; and that none appears before it is whole."""

import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from checkpoints import FAMILIES, load_reference, make_checkpoint
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from originals import original_image_encoder, original_text_encoder, original_transformer, original_vae, scaled_fp8
from published import edit
from runs import PROMPTS
from safetensors.torch import load_file, save_file
from transformers import CLIPVisionModel

from jaxwan import WanPipeline, dry_run, open_checkpoint
from jaxwan.convert.diffusers import TRANSFORMER
from jaxwan.convert.load import flat_shapes
from jaxwan.convert.rules import CheckpointError, expected_sources
from jaxwan.convert.save import Piece, safetensors_file
from jaxwan.models.layers import abstract
from jaxwan.models.transformer import WanTransformer
from jaxwan.pipelines import ending, folders
from jaxwan.pipelines.conversion import CLIP, NOISE, T5, convert, plan_conversion

PARTS = ("transformer", "transformer_2", "vae", "text_encoder", "image_encoder")
SHARD = 200_000  # bytes: of the DiTs here there are several
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """family -> the folder of a tiny Diffusers checkpoint of it."""
    made = {}

    def get(family):
        if family not in made:
            made[family] = tmp_path_factory.mktemp(family)
            make_checkpoint(made[family], family)
        return made[family]

    return get


def converted(source, target, layout, **arguments):
    return convert(plan_conversion(open_checkpoint(source), layout, shard_size=SHARD, **arguments), target)


def tensors_of(folder, *, read=True):
    """All tensors in a folder; read: without those that no model reads."""
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
    return {key: value for key, value in tensors.items() if not (read and "norm_added_q" in key)}


def equal(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype and torch.equal(ours[name], tensor), name


def write_original(folder, source, family):
    """A Diffusers checkpoint as an original repository, renamed without the tables under test; returns its tensors."""
    f, names = FAMILIES[family], {"vae": f"Wan2.{2 if family == 'ti2v-5B' else 1}_VAE.pth", "text_encoder": T5}
    names |= {"image_encoder": CLIP} if f.image == "clip" else {}
    rename = {"vae": lambda tensors: original_vae(tensors, 1), "text_encoder": original_text_encoder,
              "image_encoder": original_image_encoder}  # fmt: skip
    made = {}
    for name in ("transformer", "transformer_2")[: f.experts]:
        place = folder / NOISE[name] if f.experts == 2 else folder
        place.mkdir(parents=True, exist_ok=True)
        made[name] = original_transformer(tensors_of(source / name))
        save_file(made[name], place / "diffusion_pytorch_model.safetensors")
        (place / "config.json").write_text(json.dumps({"_class_name": "WanModel", "num_heads": f.heads}))
    for name, file in names.items():
        made[name] = rename[name](tensors_of(source / name))
        torch.save(made[name], folder / file)
    shutil.copytree(source / "tokenizer", folder / "google/umt5-xxl")
    return made


def read_original(folder):
    files = {"vae": next(folder.glob("*_VAE.pth")), "text_encoder": folder / T5, "image_encoder": folder / CLIP}
    tensors = {name: torch.load(file, weights_only=True) for name, file in files.items() if file.exists()}
    experts = {name: folder / place for name, place in NOISE.items() if (folder / place).is_dir()}
    return tensors | {name: tensors_of(place) for name, place in (experts or {"transformer": folder}).items()}


# The same bits


@pytest.mark.parametrize("family", FAMILIES)
def test_diffusers_to_orbax_and_back_are_the_same_files(folder, tmp_path, family):
    source = folder(family)
    orbax = converted(source, tmp_path / "orbax", "orbax")
    assert not list(orbax.rglob("*.safetensors"))
    assert dry_run(orbax, height=32, width=32, num_frames=5).weights.startswith("checked by their headers")
    back = converted(orbax, tmp_path / "back", "diffusers")
    for name in PARTS:
        equal(tensors_of(back / name), tensors_of(source / name))
    for path in (path.relative_to(source) for path in source.rglob("*.json")):
        if not path.name.endswith(".index.json"):
            assert json.loads((back / path).read_text()) == json.loads((source / path).read_text()), path


@pytest.mark.parametrize("family", FAMILIES)
def test_original_to_diffusers_and_back_are_the_same_tensors(folder, tmp_path, family):
    source = folder(family)
    expected = write_original(tmp_path / "original", source, family)
    diffusers = converted(tmp_path / "original", tmp_path / "diffusers", "diffusers")
    for name in PARTS:
        equal(tensors_of(diffusers / name), tensors_of(source / name))
    back = read_original(converted(diffusers, tmp_path / "back", "original"))
    if "image_encoder" in expected:  # without what stands for the text half, which Diffusers' layout has no place for
        for key in [key for key in expected["image_encoder"] if re.match("textual|log_scale|visual.head", key)]:
            del expected["image_encoder"][key]
    assert back.keys() == expected.keys()
    for name, tensors in expected.items():
        equal(back[name], tensors)


def leaves(model, mesh, **arguments):
    parts = WanPipeline.from_pretrained(model, mesh=mesh, progress=False, **arguments).parts
    return jax.tree.leaves((parts.states(), parts.denoiser.weights))


def same_parameters(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype and a.sharding == b.sharding
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.mark.parametrize(
    ("family", "mesh"), [("t2v-A14B", "pp=2"), ("i2v-A14B", "pp=3"), ("2.1-flf2v", "pp=2,tp=2"), ("ti2v-5B", "pp=1")]
)
def test_an_orbax_checkpoint_is_on_any_mesh_what_the_diffusers_folder_is(folder, tmp_path, family, mesh):
    """Layers (5 and 7) that stages do not divide."""
    orbax = converted(folder(family), tmp_path / "orbax", "orbax")
    same_parameters(leaves(orbax, mesh, check=True), leaves(folder(family), mesh))


def test_converting_to_bfloat16_rounds_what_loading_in_bfloat16_does(folder, tmp_path):
    half = converted(folder("2.1-i2v"), tmp_path / "half", "diffusers", dtype="bfloat16")
    dtypes = {name: {str(t.dtype) for t in tensors_of(half / name).values()} for name in PARTS}
    assert dtypes["vae"] == dtypes["image_encoder"] == {"torch.float32"} and "torch.bfloat16" in dtypes["text_encoder"]
    assert json.loads((half / "text_encoder/config.json").read_text())["torch_dtype"] == "bfloat16"
    same_parameters(leaves(half, "pp=1", dtype="bfloat16"), leaves(folder("2.1-i2v"), "pp=1", dtype="bfloat16"))


def test_experts_of_two_dtypes_are_one_array_that_holds_both(folder, tmp_path):
    source = shutil.copytree(folder("t2v-A14B"), tmp_path / "source")
    for path in (source / "transformer_2").glob("*.safetensors"):
        save_file({name: tensor.bfloat16() for name, tensor in load_file(path).items()}, path, {"format": "pt"})
    back = converted(converted(source, tmp_path / "orbax", "orbax"), tmp_path / "back", "diffusers")
    for name in ("transformer", "transformer_2"):
        equal(tensors_of(back / name), {key: value.float() for key, value in tensors_of(source / name).items()})


def test_scaled_fp8_is_written_as_the_dtype_that_was_asked_for(folder, tmp_path):
    source = folder("2.1-t2v")
    names = {}
    for name, tensor in tensors_of(source / "transformer").items():
        names |= dict.fromkeys(original_transformer({name: tensor}), name)
    stored, meaning = scaled_fp8(original_transformer(tensors_of(source / "transformer")), "model.diffusion_model.")
    save_file(stored, tmp_path / "fp8.safetensors")
    checkpoint = open_checkpoint(source, components={"transformer": tmp_path / "fp8.safetensors"})
    with pytest.raises(ValueError, match="transformer is quantised or .* --dtype bfloat16, float16 or float32"):
        plan_conversion(checkpoint, "diffusers")
    target = convert(plan_conversion(checkpoint, "diffusers", dtype="float32"), tmp_path / "whole")
    equal(tensors_of(target / "transformer"), {names[key]: value for key, value in meaning.items()})


def test_what_a_lora_adds_is_written_as_it_is_loaded(folder, tmp_path):
    source, rng = folder("2.1-t2v"), torch.Generator().manual_seed(0)
    weight = tensors_of(source / "transformer")["blocks.1.attn1.to_q.weight"]
    factors = {"A": (2, weight.shape[1]), "B": (weight.shape[0], 2)}
    save_file({f"transformer.blocks.1.attn1.to_q.lora_{x}.weight": torch.randn(shape, generator=rng)
               for x, shape in factors.items()}, tmp_path / "lora.safetensors")  # fmt: skip
    checkpoint = open_checkpoint(source, loras=[tmp_path / "lora.safetensors"])
    target = convert(plan_conversion(checkpoint, "diffusers"), tmp_path / "merged")
    same_parameters(leaves(target, "pp=1"), leaves(checkpoint, "pp=1"))
    assert not torch.equal(tensors_of(target / "transformer")["blocks.1.attn1.to_q.weight"], weight)


# What others make of it


def test_diffusers_makes_the_same_videos_of_what_was_written_from_an_original_repository(folder, tmp_path):
    """Whose configurations are all made here."""
    write_original(tmp_path / "original", folder("t2v-A14B"), "t2v-A14B")
    target = converted(tmp_path / "original", tmp_path / "diffusers", "diffusers")
    call = dict(prompt=PROMPTS[0], height=32, width=32, num_frames=5, num_inference_steps=3, output_type="np")
    theirs, ours = (
        load_reference(path, "t2v-A14B")(**call, generator=torch.Generator().manual_seed(0)).frames
        for path in (folder("t2v-A14B"), target)
    )
    np.testing.assert_array_equal(ours, theirs)


def test_transformers_finds_every_weight_of_an_image_encoder_that_was_an_original(folder, tmp_path):
    """The last layer and norm too, which no model of Wan's reads."""
    write_original(tmp_path / "original", folder("2.1-i2v"), "2.1-i2v")
    target = converted(tmp_path / "original", tmp_path / "diffusers", "diffusers")
    _, told = CLIPVisionModel.from_pretrained(target / "image_encoder", output_loading_info=True)
    assert not told["missing_keys"] and not told["unexpected_keys"] and not told["mismatched_keys"]


def test_orbax_itself_restores_the_arrays_with_padded_layers_or_without(folder, tmp_path):
    ocp = pytest.importorskip("orbax.checkpoint")
    source = folder("t2v-A14B")
    arrays = converted(source, tmp_path / "target", "orbax") / "orbax"
    key = tensors_of(source / "transformer_2")["blocks.3.attn1.to_q.weight"]
    whole = ocp.StandardCheckpointer().restore(arrays)["transformer"]["blocks"]["attn1"]["q"]["kernel"]
    assert whole.shape[:2] == (2, 5)
    np.testing.assert_array_equal(whole[1, 3], key.numpy().T)
    sharding = NamedSharding(Mesh(np.array(jax.devices()[:6]).reshape(3, 2), ("pp", "tp")), PartitionSpec(None, "pp"))
    shape = (2, 6, *whole.shape[2:])

    def nested(leaf):
        return {"transformer": {"blocks": {"attn1": {"q": {"kernel": leaf}}}}}

    restored = ocp.PyTreeCheckpointer().restore(arrays, args=ocp.args.PyTreeRestore(
        item=nested(jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)), partial_restore=True,
        restore_args=nested(ocp.ArrayRestoreArgs(sharding=sharding, global_shape=shape, strict=False)),
    ))["transformer"]["blocks"]["attn1"]["q"]["kernel"]  # fmt: skip
    assert restored.shape == shape and restored.sharding == sharding
    np.testing.assert_array_equal(np.asarray(restored)[:, :5], whole)
    assert not np.asarray(restored)[:, 5:].any()


def test_an_orbax_checkpoint_that_is_damaged_or_stored_otherwise_is_refused(folder, tmp_path):
    target = converted(folder("ti2v-5B"), tmp_path / "target", "orbax")
    array = target / "orbax/transformer.blocks.ffn.up.kernel"
    chunk, description = array / "0.3.0.0", array / ".zarray"
    said, whole = json.loads(description.read_text()), chunk.read_bytes()
    refused = {
        "is missing: the checkpoint is not whole": lambda: chunk.unlink(),
        "has 4 bytes and not": lambda: chunk.write_bytes(b"1234"),
        "with other compressor than": lambda: edit(description, compressor={"id": "zstd"}),
        "with other chunks than": lambda: edit(description, chunks=said["shape"]),
        "with other dtype than": lambda: edit(description, dtype="<i4"),
        "does not say what array it is": lambda: description.write_text("[]"),
    }
    for words, damage in refused.items():
        damage()
        with pytest.raises(CheckpointError, match=words):
            open_checkpoint(target).files("transformer").shapes  # noqa: B018
        description.write_text(json.dumps(said))
        chunk.write_bytes(whole)
    assert open_checkpoint(target).files("transformer").shapes


def test_damaged_numbers_are_refused_where_they_are_checked(folder, tmp_path):
    target = converted(folder("2.1-t2v"), tmp_path / "target", "diffusers")
    path = target / "transformer/diffusion_pytorch_model-00001-of-00004.safetensors"
    path = next((target / "transformer").glob("*00001-of-*.safetensors")) if not path.exists() else path
    tensors = load_file(path)
    next(iter(tensors.values())).view(-1)[0] = float("nan")
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(CheckpointError, match="other bytes than were written in transformer/"):
        WanPipeline.from_pretrained(target, check=True, progress=False)
    (target / "SHA256SUMS").unlink()
    with pytest.raises(CheckpointError, match="NaN or Inf in 1 tensors"):
        WanPipeline.from_pretrained(target, check=True, progress=False)


# Whole or not at all


@pytest.fixture
def source(folder):
    return folder("2.1-t2v")


def test_a_conversion_that_fails_leaves_nothing(source, tmp_path, monkeypatch):
    planned = plan_conversion(open_checkpoint(source), "diffusers")
    monkeypatch.setattr(folders.os, "fsync", lambda _: (_ for _ in ()).throw(OSError("the disk is gone")))
    with pytest.raises(OSError, match="the disk is gone"):
        convert(planned, tmp_path / "target")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_conversion_that_is_ended_leaves_nothing_that_looks_finished_and_starts_over(source, tmp_path, number):
    command = [sys.executable, str(ROOT / "scripts/convert.py"), "convert", str(source), "target", "--to", "orbax"]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.PIPE)
    partial = tmp_path / ".target.partial"
    while not list(partial.glob("orbax/*")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.001)
    process.send_signal(number)
    process.communicate()
    assert process.returncode == (-9 if number == signal.SIGKILL else 128 + number)
    assert not (tmp_path / "target").exists()
    assert partial.exists() == (number == signal.SIGKILL)
    converted(source, tmp_path / "target", "orbax")
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


def test_what_is_under_way_is_removed_where_a_command_is_ended(source, tmp_path):
    with pytest.raises(FileNotFoundError), folders.appearing(tmp_path / "target", 0, False) as partial:
        assert partial.path.is_dir() and folders._remove_under_way in ending.leaving_nothing_half
        folders._remove_under_way()
        assert not partial.path.exists()
        folders._naming.release()  # as no command does
    assert list(tmp_path.iterdir()) == []


def test_two_conversions_do_not_write_into_one_folder(source, tmp_path):
    (tmp_path / ".target.partial").mkdir()
    descriptor = os.open(tmp_path / ".target.partial", os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    with pytest.raises(OSError, match="another process is writing"):
        converted(source, tmp_path / "target", "diffusers")
    os.close(descriptor)
    converted(source, tmp_path / "target", "diffusers")


def test_a_disk_that_is_too_small_is_told_before_anything_is_written(source, tmp_path, monkeypatch):
    planned = plan_conversion(open_checkpoint(source), "diffusers")
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(folders.shutil, "disk_usage", lambda path: usage(planned.num_bytes))
    with pytest.raises(OSError, match="takes .* GB, and there are .* GB left on its disk"):
        convert(planned, tmp_path / "target")
    assert list(tmp_path.iterdir()) == []


def test_a_target_is_replaced_only_if_it_was_converted_and_that_is_asked_for(source, tmp_path):
    planned = plan_conversion(open_checkpoint(source), "diffusers")
    (tmp_path / "target").mkdir()
    (tmp_path / "target/thesis.txt").touch()
    for overwrite, words in (
        (False, "exists: choose another name, or say --overwrite"),
        (True, "was not written here"),
    ):
        with pytest.raises(FileExistsError, match=words):
            convert(planned, tmp_path / "target", overwrite=overwrite)
    (tmp_path / "target/thesis.txt").unlink()
    convert(planned, tmp_path / "target")
    (tmp_path / "target/more").touch()
    convert(planned, tmp_path / "target", overwrite=True)
    assert not (tmp_path / "target/more").exists() and [path.name for path in tmp_path.iterdir()] == ["target"]
    for target in (source, source / "x", source.parent):
        with pytest.raises(OSError, match="are in each other: choose another folder"):
            convert(planned, target, overwrite=True)
    with pytest.raises(FileNotFoundError, match="there is no folder .*nowhere to write x in"):
        convert(planned, tmp_path / "nowhere/x")


def test_what_a_layout_cannot_hold_is_refused_or_told(folder, tmp_path, caplog):
    with pytest.raises(ValueError, match="layout 'zip' is none of diffusers, original, orbax"):
        plan_conversion(open_checkpoint(folder("ti2v-5B")), "zip")
    converted(folder("ti2v-5B"), tmp_path / "original", "original")
    told = [record.getMessage() for record in caplog.records]
    assert all("…: who opens it takes (" in line and line.endswith("…") for line in told)
    assert [line.split("=")[0] for line in told] == [
        "the original layout does not hold vae's latents_mean", "the original layout does not hold vae's latents_std"
    ]  # fmt: skip
    alone = shutil.copytree(folder("t2v-A14B"), tmp_path / "alone")
    edit(alone / "model_index.json", transformer_2=[None, None], boundary_ratio=0.0)
    with pytest.raises(ValueError, match="the original layout of Wan2.2-T2V-A14B has two experts, and this has one"):
        plan_conversion(open_checkpoint(alone), "original")


MEASURE = """
import json, re, sys
from pathlib import Path
from jaxwan import open_checkpoint
from jaxwan.pipelines.conversion import convert, plan_conversion

def status(name):
    return 1024 * int(re.search(name + r":\\s*(\\d+) kB", Path("/proc/self/status").read_text())[1])

source, target, layout, dtype = sys.argv[1:]
planned = plan_conversion(open_checkpoint(source), layout, dtype=dtype or None)
Path("/proc/self/clear_refs").write_text("5")
before = status("VmRSS")
convert(planned, Path(target))
print(json.dumps({"over": status("VmHWM") - before}))
"""


@pytest.fixture(scope="module")
def wide(folder, tmp_path_factory):
    """A checkpoint with a DiT of 1.3 GB, of which the largest tensors have 134 MB."""
    target = shutil.copytree(folder("2.1-t2v"), tmp_path_factory.mktemp("wide") / "source")
    edit(
        target / "transformer/config.json", num_attention_heads=16, attention_head_dim=128, ffn_dim=16384, num_layers=3
    )
    for path in (target / "transformer").glob("*.safetensors*"):
        path.unlink()
    cfg = open_checkpoint(target).transformer
    _, state = abstract(WanTransformer, cfg, jnp.dtype(jnp.float32))
    shapes = {path: leaf.shape for path, leaf in flat_shapes(state).items()}
    pieces = [
        Piece(key, shape, np.dtype(np.float32), lambda shape=shape: np.ones(shape, np.float32))
        for key, (_, shape) in expected_sources(shapes, TRANSFORMER).items()
    ]
    assert max(piece.num_bytes for piece in pieces) == LARGEST
    safetensors_file("diffusion_pytorch_model.safetensors", pieces).write_to(target / "transformer")
    return target


LARGEST = 2048 * 16384 * 4


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").is_file(), reason="reads the peak from Linux's /proc")
@pytest.mark.parametrize(
    ("layout", "dtype"), [("diffusers", "bfloat16"), ("original", ""), ("orbax", ""), ("orbax", "float16")]
)
def test_converting_takes_no_more_memory_than_two_of_the_largest_tensor(wide, tmp_path, layout, dtype):
    command = [sys.executable, "-c", MEASURE, str(wide), str(tmp_path / "target"), layout, dtype]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    over = json.loads(done.stdout)["over"]
    print(f"\n{layout} {dtype}: {over / LARGEST:.2f} of the largest tensor")
    assert over <= 2 * LARGEST + 2**24  # what Python allocates beside them
