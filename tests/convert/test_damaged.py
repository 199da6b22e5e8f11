"""Whatever a file says, it is read or refused by the documented errors: headers of real models with names, shapes,
dtypes and notes changed, and indices of shards. (Damaged bytes: beside each format's own tests.)"""

import contextlib
import json
import re
from functools import cache
from pathlib import Path

import pytest
from full_size import sources
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxwan.config import ConfigError, ImageEncoderConfig, TextEncoderConfig, TransformerConfig, VAEConfig, read_json
from jaxwan.convert.detect import kind_of
from jaxwan.convert.files import TensorFiles
from jaxwan.convert.foreign import describe_tensors
from jaxwan.convert.rules import CheckpointError
from jaxwan.convert.tensors import DTYPES, Reader
from jaxwan.pipelines.components import configs_of

SMALL = {
    "transformer": TransformerConfig(num_attention_heads=1, num_layers=2, ffn_dim=16, text_dim=8, freq_dim=8,
                                     in_channels=36, image_dim=8, added_kv_proj_dim=128, pos_embed_seq_len=4),
    "vae": VAEConfig(base_dim=4, num_res_blocks=1),
    "text_encoder": TextEncoderConfig(vocab_size=9, d_model=8, d_kv=4, d_ff=8, num_layers=2, num_heads=2),
    "image_encoder": ImageEncoderConfig(hidden_size=80, intermediate_size=8, num_hidden_layers=2, num_attention_heads=1,
                                        image_size=28),
}  # fmt: skip


@cache
def headers():
    """(component, layout) -> name -> dtype and shape."""
    return {
        (component, layout): {n: ("F16", shape) for n, shape in sources(component, config, layout)[2].items()}
        for component, config in SMALL.items()
        for layout in ("original", "diffusers")
    }


def write(path: Path, header, notes=None, metadata=None) -> Path:
    """A safetensors file of zeros, but for the notes; sound whatever it holds."""
    entries, data = {"__metadata__": metadata} if metadata else {}, b""
    for name, (dtype, shape) in header.items():
        size = DTYPES[dtype].itemsize
        for n in shape:
            size *= n
        content = (notes or {}).get(name, bytes(size))
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [len(data), len(data) + size]}
        data += content
    text = json.dumps(entries).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def check(component: str, path: Path) -> None:
    """What the file holds can be told and read, or is refused in a sentence."""
    try:
        files = TensorFiles((path,))
        kind_of(files.shapes)
        describe_tensors(files.dtypes)
        for name, tensor in files.tensors.items():
            read = tensor.read(Reader())
            assert (read.shape, read.dtype) == (tensor.shape, tensor.dtype), name
            if tensor.shape:
                assert (tensor.rows(slice(1, 3)).read(Reader()) == read[1:3]).all()
        if files.has_tokenizer:
            files.read_tokenizer()
        configs_of({component: path})
    except (CheckpointError, ConfigError) as error:
        assert "\n" not in str(error) and len(str(error)) < 1000


WORDS = [
    "model.", "net.", "module.", "_orig_mod.", "diffusion_model.", "lora_A.", "vace_blocks.0.", ".comfy_quant",
    ".weight_scale", ".scale_weight", ".input_scale", "scaled_fp8", "spiece_model", "visual.cls_embedding",
    "blocks.0.attn.to_qkv.weight", "enc.blk.0.attn_q.weight", "head.modulation", "", ".", "..", "../", "é",
]  # fmt: skip
SHAPES = st.lists(st.integers(0, 9), max_size=5).map(tuple)
NOTES = st.sampled_from([
    b"", b"{}", b"[]", b"null", b'{"format": "float8_e4m3fn"}', b'{"format": "nvfp4"}', b'{"format": []}', b"[" * 5000,
    b'{"format": "float8_e4m3fn", "convrot": 1}', b"\xff\xfe",
])  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_real_header_with_changes_is_read_or_refused(tmp_path_factory, data):
    component, layout = data.draw(st.sampled_from(sorted(headers())))
    header, notes = dict(headers()[component, layout]), {}
    if data.draw(st.booleans()):  # in fp8, some with scales
        dtype = data.draw(st.sampled_from(["F8_E4M3", "F8_E5M2"]))
        for name in [n for n, (_, shape) in header.items() if len(shape) == 2]:
            header[name] = (dtype, header[name][1])
            header[name.removesuffix("weight") + "weight_scale"] = ("F32", data.draw(st.just(()) | SHAPES))
            if data.draw(st.integers(0, 3)) == 0:
                break
    for _ in range(data.draw(st.integers(0, 4))):
        name = data.draw(st.sampled_from(sorted(header)))
        match data.draw(st.sampled_from(["drop", "dtype", "shape", "name", "more", "note"])):
            case "drop":
                del header[name]
            case "dtype":
                header[name] = (data.draw(st.sampled_from(sorted(DTYPES))), header[name][1])
            case "shape":
                header[name] = (header[name][0], data.draw(SHAPES))
            case "name":
                word = data.draw(st.sampled_from(WORDS))
                header[data.draw(st.sampled_from([word, word + name, name + word]))] = header.pop(name)
            case "more":
                header[data.draw(st.sampled_from(WORDS)) + name] = (data.draw(st.sampled_from(["F32", "U8"])), (3,))
            case "note":
                note = data.draw(NOTES)
                notes[f"{name.removesuffix('.weight')}.comfy_quant"] = note
                header |= {key: ("U8", (len(value),)) for key, value in notes.items()}
        if not header:
            break
    if data.draw(st.booleans()):
        prefix = data.draw(st.sampled_from(WORDS[:6]))
        header, notes = ({prefix + name: value for name, value in d.items()} for d in (header, notes))
    said = data.draw(st.none() | NOTES.map(lambda note: note.decode(errors="replace")))
    metadata = said and {"_quantization_metadata": said}
    notes = {name: note for name, note in notes.items() if header.get(name) == ("U8", (len(note),))}
    check(component, write(tmp_path_factory.getbasetemp() / "changed.safetensors", header, notes, metadata))


# Indices of shards

NAMES = st.sampled_from([
    "model.safetensors", "../model.safetensors", "/etc/passwd", "inner/model.safetensors", "..", ".", "",
    "a\0b.safetensors", "model.bin", "C:\\model.safetensors", "\ud800.safetensors",
])  # fmt: skip
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | NAMES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=8,
)
INDICES = VALUES | VALUES.map(lambda v: {"weight_map": v}) | st.dictionaries(st.text(max_size=3), NAMES).map(
    lambda shards: {"weight_map": shards}
)  # fmt: skip


@settings(max_examples=100, deadline=None)
@given(INDICES)
def test_an_index_names_shards_beside_it_or_is_refused(tmp_path_factory, index):
    folder = tmp_path_factory.getbasetemp() / "shards"
    if not folder.exists():
        folder.mkdir()
        write(folder / "model.safetensors", headers()["text_encoder", "diffusers"])
        write(folder.parent / "model.safetensors", {"outside": ("F32", (1,))})
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    with contextlib.suppress(CheckpointError, FileNotFoundError):
        files = TensorFiles.find(folder)
        assert all(path.parent == folder for path in files.paths)
        assert "outside" not in files.shapes


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"weight_map": {"x": "../x.safetensors"}}', "its shards lie in other folders, or are no safetensors files"),
        ('{"weight_map": {"x": "/x.safetensors"}}', "its shards lie in other folders"),
        ('{"weight_map": {"x": ".."}}', "or are no safetensors files"),
        ('{"weight_map": {"x": ["x.safetensors"]}}', "unhashable"),
        ("[" * 100_000, "RecursionError"),
        ("{", "Expecting property name"),
        ('{"weight_map": {}}', "it names none"),
    ],
)
def test_an_index_that_is_none_is_refused_with_the_reason(tmp_path, text, words):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match=f"index.json is no index of shards .*{re.escape(words)}") as error:
        TensorFiles.find(tmp_path)
    assert "ValueError(" not in str(error.value)


def test_an_index_is_not_longer_than_it_may_be(tmp_path, monkeypatch):
    monkeypatch.setattr("jaxwan.convert.files.MOST_HEADER", 9)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {}}')
    with pytest.raises(CheckpointError, match="it has 18 bytes"):
        TensorFiles.find(tmp_path)


def test_a_configuration_as_deep_as_it_likes_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("[" * 100_000)
    with pytest.raises(ConfigError, match="config.json is no JSON file"):
        read_json(tmp_path / "config.json")
