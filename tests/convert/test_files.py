"""Which files of a component folder are read, compared with what diffusers and transformers read after their own saves;
and what is said of those that are not."""

import json
import re
from typing import NamedTuple

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan
from safetensors.numpy import save_file
from transformers import UMT5Config, UMT5EncoderModel

from jaxwan.convert.diffusers import TRANSFORMER
from jaxwan.convert.files import TensorFiles, check_variant, find_variants
from jaxwan.convert.foreign import describe_tensors
from jaxwan.convert.load import prove
from jaxwan.convert.rules import CheckpointError

DIT, TEXT = "diffusion_pytorch_model", "model"


class Library(NamedTuple):
    """A model of one of the two libraries, whose every number is `value`."""

    make: type
    stem: str
    key: str
    shards: str  # a size that makes several

    def filled(self, value: float):
        config = UMT5Config(vocab_size=20, d_model=8, d_kv=3, d_ff=10, num_layers=2, num_heads=2)
        model = UMT5EncoderModel(config) if self.make is UMT5EncoderModel else AutoencoderKLWan(4, num_res_blocks=1)
        with torch.no_grad():
            for p in model.parameters():
                p.fill_(value)
        return model


LIBRARIES = {
    "transformers": Library(UMT5EncoderModel, TEXT, "encoder.final_layer_norm.weight", "1KB"),
    "diffusers": Library(AutoencoderKLWan, DIT, "decoder.conv_in.bias", "100KB"),
}


@pytest.fixture(params=LIBRARIES)
def library(request):
    return LIBRARIES[request.param]


def read(library, folder, variant=None) -> float:
    return float(TensorFiles.find(folder, variant).read(library.key).flat[0])


def read_by_library(library, folder, **arguments) -> float:
    return float(library.make.from_pretrained(folder, **arguments).state_dict()[library.key].flatten()[0])


# What the libraries wrote


@pytest.mark.parametrize("sizes", [("whole", "shards"), ("shards", "whole"), ("shards", "shards"), ("whole", "whole")])
def test_after_a_second_save_that_file_is_read_which_the_library_reads(library, tmp_path, sizes):
    for value, size in enumerate(sizes, 1):
        library.filled(value).save_pretrained(tmp_path, max_shard_size="1GB" if size == "whole" else library.shards)
    try:
        expected = read_by_library(library, tmp_path)
    except OSError:  # diffusers trips over the index that it left behind
        assert library.make is AutoencoderKLWan and sizes == ("shards", "whole")
        expected = 2
    assert read(library, tmp_path) == expected


@pytest.mark.parametrize("size", ["whole", "shards"])
def test_a_variant_is_read_as_the_library_reads_it(library, tmp_path, size):
    most = "1GB" if size == "whole" else library.shards
    library.filled(1).save_pretrained(tmp_path)
    library.filled(2).save_pretrained(tmp_path, variant="fp16", max_shard_size=most)
    assert read(library, tmp_path, "fp16") == read_by_library(library, tmp_path, variant="fp16") == 2
    assert read(library, tmp_path) == 1
    assert find_variants(path.name for path in tmp_path.iterdir()) == ["fp16"]


@pytest.mark.parametrize("index", [".safetensors.fp16.index.json", ".fp16.safetensors.index.json"])
@pytest.mark.parametrize("shard", ["-00001-of-00001.fp16", ".fp16-00001-of-00001"])
def test_other_spellings_of_a_sharded_variant_are_read(tmp_path, index, shard):
    save_file({"x": np.ones(1, np.float16)}, tmp_path / f"{DIT}{shard}.safetensors")
    (tmp_path / (DIT + index)).write_text(json.dumps({"weight_map": {"x": f"{DIT}{shard}.safetensors"}}))
    assert TensorFiles.find(tmp_path, "fp16").paths == (tmp_path / f"{DIT}{shard}.safetensors",)
    assert find_variants(path.name for path in tmp_path.iterdir()) == ["fp16"]


def test_a_component_without_the_variant_is_read_plain_and_an_unknown_variant_is_refused(tmp_path):
    save_file({"x": np.ones(1, np.float32)}, tmp_path / f"{DIT}.safetensors")
    assert TensorFiles.find(tmp_path, "fp16").paths == (tmp_path / f"{DIT}.safetensors",)
    check_variant(None, {}, what="folder")
    check_variant("bf16", {"vae": [], "transformer": [f"{DIT}.bf16.safetensors"]}, what="folder")
    for names, instead in (([f"{DIT}.bf16.safetensors"], "those there are bf16"), ([], "it has none: leave variant")):
        with pytest.raises(FileNotFoundError, match=f"folder has no weights of variant='fp16'; {instead}"):
            check_variant("fp16", {"vae": names}, what="folder")


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_a_broken_set_of_shards_is_told_by_its_missing_files_and_not_replaced(library, tmp_path, variant):
    if variant:
        library.filled(1).save_pretrained(tmp_path)  # plain files do not stand in for a variant that is there
    library.filled(2).save_pretrained(tmp_path, variant=variant, max_shard_size=library.shards)
    shard = sorted(tmp_path.glob("*-00001-of-*.safetensors"))[0]
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=f"lacks {shard.name}, named by .*json"):
        TensorFiles.find(tmp_path, variant)


# What is not read


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ([f"{DIT}.fp16.safetensors"], "those of a variant: give --variant fp16 .variant='fp16' in Python."),
        ([f"{TEXT}.bf16-00001-of-00002.safetensors"], "those of a variant: give --variant bf16"),
        ([f"{DIT}.bin"], f"holds {DIT}.bin and no {DIT}.safetensors .*: give it as --component"),
        (["pytorch_model-00001-of-00002.bin", "a.pth", "b.pt"], "holds a.pth, b.pt, .*--component NAME=FILE"),
        (["wan-Q4_K_M.gguf"], "holds wan-Q4_K_M.gguf and no .*--component NAME=FILE"),
        (["pytorch_lora_weights.safetensors"], "a LoRA by its name, and no"),
        (["wan2.1.safetensors"], f"holds wan2.1.safetensors and no {DIT}.safetensors or model.safetensors"),
        ([f"{TEXT}-00001-of-00002.safetensors"], "no .safetensors.index.json, which says what is in the shards"),
        (["notes.txt"], f"has no {DIT}.safetensors or model.safetensors .or shards of it."),
    ],
)
def test_a_folder_of_other_files_says_which_and_what_to_do(tmp_path, names, words):
    for name in names:
        (tmp_path / name).touch()
    with pytest.raises(FileNotFoundError, match=words) as error:
        TensorFiles.find(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "is a git-lfs pointer .*git lfs pull"),
        (b"\n<!DOCTYPE html>\n<html><head>", "is a web page and not the weights: download it again"),
        (b"PK\x03\x04 rest of a zip", "cannot be read as a file of PyTorch's: it is truncated"),
        (b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.", "is a bare pickle, as PyTorch wrote it before 1.6"),
        (b"GGUF\x03\x00\x00\x00", "cannot be read as a GGUF file: its header would go to byte 24"),
        (b"Entry not found", "is truncated or no safetensors file"),
        (b"", "is truncated or no safetensors file"),
    ],
)
def test_what_is_in_a_file_instead_of_tensors_is_recognised(tmp_path, data, words):
    (tmp_path / f"{DIT}.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match=f"{DIT}.safetensors {words}") as error:
        _ = TensorFiles.find(tmp_path).shapes
    assert "header would have" not in str(error.value) or "truncated" in words  # what it is, or why it is none


KEY = "blocks.0.attn1.to_q"
FOREIGN = {  # tensors beside or instead of those of a DiT in Diffusers' layout -> the words for them
    "comfy_quant": ({f"{KEY}.weight": "I8", f"{KEY}.comfy_quant": "U8"}, "quantised, with scales beside them"),
    "nf4": ({f"{KEY}.weight": "U8", f"{KEY}.weight.quant_state.bitsandbytes__nf4": "U8"}, "4 bits by bitsandbytes"),
    "int8": ({f"{KEY}.weight": "I8", f"{KEY}.SCB": "F32"}, "8 bits by bitsandbytes"),
    "gptq": ({f"{KEY}.qweight": "I32", f"{KEY}.qzeros": "I32"}, "GPTQ or AWQ"),
    "quanto": ({f"{KEY}.weight._data": "I8", f"{KEY}.weight._scale": "F32"}, "torchao or quanto"),
    "unknown": ({f"{KEY}.weight": "I8"}, "weights in I8, probably quantised"),
    "peft": ({f"transformer.{KEY}.lora_A.weight": "F32", f"transformer.{KEY}.lora_B.weight": "F32"}, "holds a LoRA"),
    "kohya": ({"lora_unet_blocks_0_ffn_0.lora_down.weight": "F16"}, "holds a LoRA"),
    "vace": ({"vace_blocks.0.proj_in.weight": "F32"}, "holds tensors of VACE"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_tensors_of_other_formats_are_recognised(name):
    dtypes, words = FOREIGN[name]
    told = describe_tensors(dtypes)
    assert told is not None and re.search(words, told) and ": " in told  # and what to do


def test_tensors_that_merely_do_not_fit_are_called_nothing_else():
    for library in LIBRARIES.values():
        assert describe_tensors({key: "F32" for key in library.filled(0).state_dict()}) is None
    assert describe_tensors({f"{KEY}.weight": "F16", "proj_out.bias": "F32", "condition_embedder.x": "BF16"}) is None


@pytest.mark.parametrize("count", [1, 40])
def test_an_error_is_as_long_for_forty_layers_as_for_one(tmp_path, count):
    """What it looks like comes first, then counts and a few names."""
    tensors = {
        f"vace_blocks.{i}.self_attn.{x}.weight": np.ones((2, 2), np.float32) for i in range(count) for x in "qkvo"
    }
    save_file(tensors, tmp_path / f"{DIT}.safetensors")
    wanted = {f"blocks.attn1.{x}.kernel": (count, 2, 2) for x in "qkv"} | {"proj_out.bias": (2,)}
    with pytest.raises(CheckpointError) as error:
        prove(wanted, TensorFiles.find(tmp_path), TRANSFORMER, what="transformer")
    said = str(error.value)
    assert said.startswith("transformer holds tensors of VACE, which is not implemented")
    assert f"{3 * count + 1} missing (" in said and f"{4 * count} unexpected (" in said
    assert len(said) < 500 and said.count("blocks.") <= 5
