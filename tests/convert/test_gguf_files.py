"""GGUF files written by the package `gguf`: their tensors against what was written and the package's own decoding, and
headers that are not sound."""

import os
import struct
import sys

import gguf
import ml_dtypes
import numpy as np
import pytest
from gguf_writing import Q, blocks, write_gguf
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxwan.convert.detect import Kind, kind_of
from jaxwan.convert.files import TensorFiles
from jaxwan.convert.gguf_files import Blocks, read_gguf
from jaxwan.convert.rules import CheckpointError
from jaxwan.convert.tensors import Extent, Reader

RNG = np.random.default_rng(0)
BLOCKS = [  # all that the package decodes
    Q.Q4_0, Q.Q4_1, Q.Q5_0, Q.Q5_1, Q.Q8_0, Q.Q2_K, Q.Q3_K, Q.Q4_K, Q.Q5_K, Q.Q6_K, Q.IQ1_S, Q.IQ1_M, Q.IQ2_XXS,
    Q.IQ2_XS, Q.IQ2_S, Q.IQ3_XXS, Q.IQ3_S, Q.IQ4_NL, Q.IQ4_XS, Q.TQ1_0, Q.TQ2_0, Q.MXFP4, Q.NVFP4,
]  # fmt: skip
PLAIN = {
    "matrix": RNG.standard_normal((6, 5), np.float32),
    "half": RNG.standard_normal((3, 7)).astype(np.float16),
    "brain": RNG.standard_normal((2, 9)).astype(ml_dtypes.bfloat16),
    "patch_embedding.weight": RNG.standard_normal((4, 3, 1, 2, 2), np.float32),
    "vector": RNG.standard_normal(7).astype(np.float32),
}


def same(ours, theirs):
    assert ours.dtype == theirs.dtype and ours.shape == theirs.shape and ours.tobytes() == theirs.tobytes()


def test_plain_numbers_are_read_as_they_were_written(tmp_path):
    files = TensorFiles((write_gguf(tmp_path / "x.gguf", PLAIN),))
    assert files.shapes == {name: tensor.shape for name, tensor in PLAIN.items()}
    for name, tensor in PLAIN.items():
        same(files.read(name), tensor)
        same(files.read(name, slice(1, 3)), tensor[1:3])


def test_every_type_of_blocks_that_the_package_decodes_has_a_case():
    decodable = []
    for kind in Q:
        try:
            gguf.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
            decodable.append(kind)
        except NotImplementedError:
            pass
    assert set(decodable) - {Q.F32, Q.F16, Q.BF16} == set(BLOCKS)


@pytest.mark.parametrize("kind", BLOCKS, ids=lambda kind: kind.name)
def test_blocks_are_decoded_as_the_package_does_whole_and_by_rows(tmp_path, kind):
    codes = blocks(RNG, kind, (5, 512))
    files = TensorFiles((write_gguf(tmp_path / "x.gguf", {"x": codes}, {"x": kind}),))
    expected = gguf.dequantize(codes, kind)
    assert (files.shapes, files.dtypes) == ({"x": (5, 512)}, {"x": "F32"})
    assert files.num_bytes("x") == codes.nbytes and files.tensors["x"].kind_on_disk == kind.name
    same(files.read("x"), expected)
    for rows in (slice(0, 2), slice(3, 5), slice(2, 2), slice(4, 1)):
        same(files.read("x", rows), expected[rows])
        assert files.num_bytes("x", rows) == codes[rows].nbytes


def test_what_the_package_quantised_comes_back_within_its_rounding(tmp_path):
    tensor = RNG.standard_normal((4, 64), np.float32)
    path = write_gguf(tmp_path / "x.gguf", {"x": gguf.quantize(tensor, Q.Q8_0)}, {"x": Q.Q8_0})
    ours = TensorFiles((path,)).read("x")
    # half a step of a block's scale, which is its largest number over 127, and that in 11 bits
    np.testing.assert_allclose(ours, tensor, rtol=0, atol=np.abs(tensor).max() / 127 * 0.51)


def test_a_large_tensor_is_decoded_in_pieces(tmp_path, monkeypatch):
    codes = blocks(RNG, Q.Q4_K, (7, 768))
    files = TensorFiles((write_gguf(tmp_path / "x.gguf", {"x": codes}, {"x": Q.Q4_K}),))
    monkeypatch.setattr("jaxwan.convert.gguf_files._AT_ONCE", 1024)
    same(files.read("x"), gguf.dequantize(codes, Q.Q4_K))


def test_metadata_give_a_shape_whose_rows_may_cut_blocks(tmp_path):
    """As converters keep convolutions: in rows of whole blocks, with their own shape in the metadata."""
    codes = blocks(RNG, Q.Q8_0, (10, 96))
    arrays = {"comfy.gguf.orig_shape.x": [16, 5, 3, 2, 2]}
    files = TensorFiles((write_gguf(tmp_path / "x.gguf", {"x": codes}, {"x": Q.Q8_0}, **arrays),))
    expected = gguf.dequantize(codes, Q.Q8_0).reshape(16, 5, 3, 2, 2)
    same(files.read("x"), expected)
    for start in range(17):
        for stop in range(start, 17):
            same(files.read("x", slice(start, stop)), expected[start:stop])
    tensor = files.tensors["x"]
    same(tensor.rows(slice(3, 15)).rows(slice(2, 7)).read(Reader()), expected[5:10])
    assert tensor.rows(slice(0, 1)).num_bytes == 2 * 34  # 60 numbers: two blocks of 32


def test_rows_and_the_header_are_all_that_is_read(tmp_path, monkeypatch):
    tensors = {"head.modulation": PLAIN["vector"], "patch_embedding.weight": np.zeros((1, 2**20), np.float32)}
    path = write_gguf(tmp_path / "x.gguf", tensors | {"x": blocks(RNG, Q.Q4_K, (4, 256))}, {"x": Q.Q4_K})
    asked, preadv = [], os.preadv
    monkeypatch.setattr(os, "preadv", lambda f, b, o: asked.append((o, sum(map(len, b)))) or preadv(f, b, o))
    reader = Reader()
    found = read_gguf(path, reader)
    assert asked == [(0, 2**20)]
    found["x"].rows(slice(1, 3)).read(reader)
    assert asked[1:] == [(found["x"].span.offset + 144, 288)]


def test_names_of_llama_cpp_are_those_of_a_text_encoder(tmp_path):
    short = ("attn_q", "attn_k", "attn_v", "attn_o", "attn_norm", "attn_rel_b", "ffn_gate", "ffn_up", "ffn_down")
    tensors = {f"enc.blk.{i}.{x}.weight": PLAIN["vector"] for i in range(2) for x in (*short, "ffn_norm")}
    tensors |= {"token_embd.weight": PLAIN["matrix"], "enc.output_norm.weight": PLAIN["vector"]}
    shapes = TensorFiles((write_gguf(tmp_path / "x.gguf", tensors),)).shapes
    attention, mlp = "encoder.block.1.layer.0", "encoder.block.1.layer.1"
    expected = {f"{attention}.SelfAttention.{x}.weight" for x in ("q", "k", "v", "o", "relative_attention_bias")}
    expected |= {f"{mlp}.DenseReluDense.{x}.weight" for x in ("wi_0", "wi_1", "wo")}
    expected |= {f"{attention}.layer_norm.weight", f"{mlp}.layer_norm.weight"}
    expected |= {name.replace("block.1", "block.0") for name in expected}
    assert shapes.keys() == expected | {"shared.weight", "encoder.final_layer_norm.weight"}
    assert kind_of(shapes) == Kind("text_encoder", "diffusers")


# What is refused


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_a_dit_without_its_patch_embedding_is_refused_with_the_reason(tmp_path, prefix):
    path = write_gguf(tmp_path / "x.gguf", {f"{prefix}head.modulation": PLAIN["vector"]})
    with pytest.raises(CheckpointError, match="x.gguf lacks patch_embedding.weight, whose 5 axes some converters"):
        read_gguf(path, Reader())


def test_without_the_package_blocks_are_refused_and_plain_numbers_read(tmp_path, monkeypatch):
    quantised = write_gguf(tmp_path / "q.gguf", {"x": blocks(RNG, Q.Q8_0, (1, 32))}, {"x": Q.Q8_0})
    plain = write_gguf(tmp_path / "p.gguf", PLAIN)
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert len(read_gguf(plain, Reader())) == len(PLAIN)
    with pytest.raises(CheckpointError, match="q.gguf is quantised as GGUF, .*: `pip install gguf`"):
        read_gguf(quantised, Reader())


def test_blocks_that_the_package_does_not_decode_are_named(tmp_path):
    path = write_gguf(tmp_path / "x.gguf", {"x": np.zeros((1, 292), np.uint8)}, {"x": Q.Q8_K})
    with pytest.raises(CheckpointError, match="holds x as Q8_K, which the package gguf does not decode"):
        read_gguf(path, Reader())


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def tensor(name=b"x", shape=(4,), kind=0, offset=0, axes=None) -> bytes:
    axes = len(shape) if axes is None else axes
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", axes, *shape, kind, offset)


def pair(name: bytes, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def gguf_file(pairs=(), tensors=(), data=64, version=3, counts=None) -> bytes:
    counts = counts or (len(tensors), len(pairs))
    header = b"GGUF" + struct.pack("<IQQ", version, *counts) + b"".join([*pairs, *tensors])
    return header + bytes(-len(header) % 32) + bytes(data)


UNSOUND = [
    (b"", "it does not begin|go to byte 4"),
    (gguf_file()[:20], "go to byte 24 at least, and the file has 20"),
    (gguf_file(version=1), "it has version 1"),
    (gguf_file(version=0x03000000), "version 50331648 .big-endian"),
    (gguf_file(counts=(2**60, 0), data=0), "a tensor of it is called ''"),
    (gguf_file(counts=(0, 2**60)), "a value of type|go to byte|twice"),
    (gguf_file(tensors=[tensor(), tensor(offset=32)]), "it holds x twice"),
    (gguf_file(tensors=[tensor(), tensor(b"y")]), "y has bytes .*, what is before it ends at"),
    (gguf_file(tensors=[tensor(), tensor(b"y", offset=8)]), "y has bytes .*, what is before it ends at"),
    (gguf_file(tensors=[tensor(offset=4)]), "x has bytes"),
    (gguf_file(tensors=[tensor(shape=(17,))]), "x has bytes .*and the file at"),
    (gguf_file(tensors=[tensor(offset=2**63)]), "x has bytes"),
    (gguf_file(tensors=[tensor(shape=(2**40, 2**40))]), "x has no shape but"),
    (gguf_file(tensors=[tensor(shape=(0, 2**60))]), "x has no shape but"),
    (gguf_file(tensors=[tensor(axes=2**31)]), "x has 2147483648 axes"),
    (gguf_file(tensors=[tensor(kind=99)]), "x is of type 99, which the package gguf does not know"),
    (gguf_file(tensors=[tensor(kind=8)]), "x of .4,. has rows of other than whole blocks of 32"),
    (gguf_file(tensors=[tensor(b"\xff")]), "can't decode byte"),
    (gguf_file(tensors=[tensor(b"a\nb")]), "a tensor of it is called"),
    (gguf_file([pair(b"a", 4, bytes(4)), pair(b"a", 4, bytes(4))]), "it says 'a' twice"),
    (gguf_file([pair(b"a", 99, bytes(4))]), "a value of type 99"),
    (gguf_file([pair(b"a", 9, struct.pack("<IQ", 9, 3))]), "a value of type 9"),
    (gguf_file([pair(b"a", 9, struct.pack("<IQ", 8, 2**60))]), "its header would go to byte"),
    (gguf_file([pair(b"a", 9, struct.pack("<IQ", 0, 2**60))]), "its header would go to byte"),
    (gguf_file([pair(b"a", 8, struct.pack("<Q", 2**63))]), "its header would go to byte"),
    (gguf_file([pair(b"general.alignment", 4, struct.pack("<I", 24))]), "its alignment is 24"),
    (gguf_file([pair(b"general.alignment", 8, text(b"32"))]), "its alignment is 0"),
    (gguf_file([pair(b"comfy.gguf.orig_shape.x", 8, text(b"2"))], [tensor()]), "'comfy.gguf.orig_shape.x' is no"),
    (
        gguf_file([pair(b"comfy.gguf.orig_shape.x", 9, struct.pack("<IQ2i", 5, 2, -2, -2))], [tensor()]), "is no shape",
    ),
    (
        gguf_file([pair(b"comfy.gguf.orig_shape.x", 9, struct.pack("<IQ2i", 5, 2, 3, 3))], [tensor()]),
        "x of .4,. has the shape .3, 3. in its metadata",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("content", "words"), UNSOUND, ids=[words for _, words in UNSOUND])
def test_a_header_that_is_not_sound_is_refused_with_the_reason(tmp_path, content, words):
    (tmp_path / "x.gguf").write_bytes(content)
    with pytest.raises(CheckpointError, match=f"x.gguf cannot be read as a GGUF file: .*({words})") as error:
        read_gguf(tmp_path / "x.gguf", Reader())
    assert len(str(error.value)) < 500


def test_a_header_is_not_longer_than_it_may_be(tmp_path, monkeypatch):
    monkeypatch.setattr("jaxwan.convert.gguf_files.MOST_HEADER", 40)
    with pytest.raises(CheckpointError, match="its header would go to byte"):
        read_gguf(write_gguf(tmp_path / "x.gguf", PLAIN), Reader())


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_a_damaged_file_is_read_or_refused_and_nothing_else(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "sound.gguf"
    if not path.exists():
        arrays = {"comfy.gguf.orig_shape.b": [2, 2, 16, 8]}
        tensors = {"a": PLAIN["matrix"], "b": blocks(RNG, Q.Q4_0, (2, 256)), "c": PLAIN["half"]}
        write_gguf(path, tensors, {"b": Q.Q4_0}, **arrays)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 600))] = data.draw(st.integers(0, 255) | st.just(255))
    mutated = tmp_path_factory.getbasetemp() / "mutated.gguf"
    mutated.write_bytes(content[: data.draw(st.just(len(content)) | st.integers(0, len(content)))])
    try:
        found = read_gguf(mutated, Reader())
    except CheckpointError as error:
        assert len(str(error)) < 1000
        return
    for tensor in found.values():
        extent = tensor.span if isinstance(tensor, Blocks) else tensor
        assert isinstance(extent, Extent)
        assert 0 <= extent.offset and extent.offset + extent.num_bytes <= len(content)
        assert tensor.read(Reader()).shape == tensor.shape
