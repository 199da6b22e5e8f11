"""Files of torch.save: their tensors against PyTorch's own reading, and nothing else in them is run or believed."""

import collections
import os
import pickle
import struct
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxwan.convert.files import TensorFiles
from jaxwan.convert.rules import CheckpointError
from jaxwan.convert.tensors import Extent, Reader, Strided
from jaxwan.convert.torch_files import read_torch, saved_under

torch.manual_seed(0)
BASE = torch.randn(4, 6)
TENSORS = {
    "matrix": torch.randn(3, 4),
    "turned": BASE.t(),
    "cut": BASE[1:3, 2:5],
    "channels last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "a row of another": BASE[2],
    "bf16": torch.randn(3).bfloat16(),
    "half": torch.randn(2, 5).half(),
    "fp8": torch.randn(2, 2).to(torch.float8_e4m3fn),
    "parameter": torch.nn.Parameter(torch.randn(2)),
    "scalar": torch.tensor(2.0),
    "empty": torch.zeros(0, 3),
    "bytes": torch.arange(5, dtype=torch.uint8),
}


def saved(path, value, **arguments):
    torch.save(value, path, **arguments)
    return path


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("torch") / "model.pth", collections.OrderedDict(TENSORS))


def same(ours, theirs):
    theirs = theirs.detach()
    if theirs.dtype in (torch.bfloat16, torch.float8_e4m3fn):
        ours, theirs = ours.astype(np.float32), theirs.float()
    np.testing.assert_array_equal(ours, theirs.numpy())
    assert ours.dtype == theirs.numpy().dtype and ours.shape == tuple(theirs.shape)


# What is read


def test_tensors_are_those_that_pytorch_saved(path):
    reader = Reader()
    found = read_torch(path, reader)
    assert found.keys() == TENSORS.keys()
    for key, tensor in TENSORS.items():
        same(found[key].read(reader), tensor)
    strided = {key for key, tensor in found.items() if isinstance(tensor, Strided)}
    assert strided == {"turned", "cut", "channels last"}
    offsets = [(t.span if isinstance(t, Strided) else t).offset for t in found.values()]
    assert offsets == sorted(offsets)


@pytest.mark.parametrize("key", sorted(TENSORS.keys() - {"scalar"}))
def test_rows_are_those_of_the_tensor(path, key):
    files, tensor = TensorFiles((path,)), TENSORS[key]
    for start in range(len(tensor) + 1):
        for stop in range(start, len(tensor) + 1):
            same(files.read(key, slice(start, stop)), tensor[start:stop])
            if not isinstance(files.tensors[key], Strided):
                assert files.num_bytes(key, slice(start, stop)) == tensor[start:stop].numel() * tensor.element_size()


def test_no_number_is_read_to_know_the_tensors(tmp_path, monkeypatch):
    large = saved(tmp_path / "large.pth", {"x": torch.zeros(1_000_000), "y": torch.ones(2)})
    asked, preadv = [], os.preadv
    monkeypatch.setattr(os, "preadv", lambda d, b, o: asked.append(sum(map(len, b))) or preadv(d, b, o))
    read_torch(large, Reader())
    assert sum(asked) < 4000


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_newer_pickles_are_read_too(tmp_path, protocol):
    found = read_torch(saved(tmp_path / "x.pt", {"x": BASE}, pickle_protocol=protocol), Reader())
    same(found["x"].read(Reader()), BASE)


X, Y = {"x": torch.ones(1)}, {"x": torch.zeros(1), "y": torch.zeros(1)}


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({"state_dict": X, "epoch": 3, "lr": 1e-4, "done": False, "log": [1, (2, None)]}, X),
        ({"model": {"state_dict": X}}, X),
        ({"generator": X, "critic": Y}, X),
        ({"generator": X, "generator_ema": Y}, Y),
        ({"generator": Y, "generator_ema": X}, Y),  # averages of a part alone
        (
            {"generator": {"model._fsdp_wrapped_module.x": X["x"]}, "generator_ema": {"model.x": Y["x"]}},
            {"model.x": Y["x"]},
        ),
        ({"generator_lora": X, "step": 3}, X),
        ({"generator_lora": Y, "generator": X}, X),
        (X | {"step": 7}, X),
        (torch.nn.Linear(2, 3).state_dict(), None),  # with attributes of the dictionary
    ],
)
def test_the_state_dict_is_found_inside_of_what_training_saves(tmp_path, value, expected):
    expected = value if expected is None else expected
    found = read_torch(saved(tmp_path / "x.pt", value), Reader())
    assert found.keys() == expected.keys()
    for key, tensor in found.items():
        same(tensor.read(Reader()), expected[key])


def test_the_dictionaries_around_a_state_dict_are_told(tmp_path):
    for value, expected in (
        (X, ()), ({"generator": X}, ("generator",)), ({"model": {"state_dict": X}}, ("model", "state_dict")),
        ({"generator": X, "generator_ema": Y}, ("generator_ema",)),
        ({"generator": Y, "generator_ema": X}, ("generator",)),
    ):  # fmt: skip
        assert saved_under(saved(tmp_path / "x.pt", value), Reader()) == expected


# What is refused


class Evil:
    """Runs code where it is unpickled."""

    def __init__(self, call, *arguments):
        self.reduced = call, arguments

    def __reduce__(self):
        return self.reduced


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (Evil(os.mkdir, "ran"), r"asks for '(posix|nt)\.mkdir', which is refused"),
        (Evil(eval, "open('ran', 'w')"), r"asks for '__builtin__\.eval', which is refused"),
        (Evil(getattr, "", "join"), r"asks for '__builtin__\.getattr'"),
        (torch.nn.Linear(1, 1), r"asks for 'torch\.nn\.modules\.linear\.Linear'"),
        (np.float64(1), r"asks for 'numpy"),
        ({3: [Evil(exec, "")]}, r"asks for '__builtin__\.exec'"),
        ({"lr": 0.1, "names": ["a"]}, r"holds no dictionary of tensors, at its top or under .*, but 'lr', 'names'"),
        ([torch.ones(1)], "holds no dictionary of tensors"),
        ({"x": torch.ones(2, dtype=torch.complex64)}, r"asks for 'torch\.ComplexFloatStorage'"),
        ({"x": torch.ones(1).expand(1000)}, "is larger than its storage"),
        ({"x\n": torch.ones(1)}, "a tensor of it is called"),
    ],
)
def test_what_a_pickle_holds_beside_tensors_is_refused_by_name_and_not_run(tmp_path, monkeypatch, value, words):
    monkeypatch.chdir(tmp_path)
    path = saved(tmp_path / "x.pt", value)
    with pytest.raises(CheckpointError, match=f"x.pt cannot be read as a file of PyTorch's: .*{words}"):
        read_torch(path, Reader())
    assert os.listdir(tmp_path) == ["x.pt"]


def test_a_file_of_old_pytorch_says_how_to_write_it_anew(tmp_path):
    path = saved(tmp_path / "x.pt", X, _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match=r"x.pt is a bare pickle, as PyTorch wrote it before 1.6.*weights_only"):
        read_torch(path, Reader())


def test_values_that_repeat_each_other_are_neither_walked_nor_printed(tmp_path):
    """2^64 of them, in a few bytes."""
    value = ("x",)
    for _ in range(64):
        value = (value, value)
    path = rezipped(tmp_path / "x.pt", X, pickled=pickle.dumps(value, 2))
    with pytest.raises(CheckpointError, match="holds no dictionary of tensors"):
        read_torch(path, Reader())
    call = pickle.dumps(value, 2)[:-1] + b"Q."  # as the name of a storage
    with pytest.raises(CheckpointError, match="which is no storage") as error:
        read_torch(rezipped(tmp_path / "y.pt", X, pickled=call), Reader())
    assert len(str(error.value)) < 300


def rezipped(path, value, *, pickled=None, compression=zipfile.ZIP_STORED, renamed=None, more=(), data=None):
    """A file of torch.save written again by Python's zipfile, something in it changed."""
    torch.save(value, path)
    with zipfile.ZipFile(path) as old:
        entries = {info.filename: old.read(info) for info in old.infolist()}
    with zipfile.ZipFile(path, "w", compression) as new:
        for name, content in entries.items():
            if name.endswith("data.pkl") and pickled is not None:
                content = pickled
            if "/data/" in name and data is not None:
                content = data
            new.writestr((renamed or {}).get(name.rpartition("/")[2], name), content)
        for name, content in more:
            new.writestr(name, content)
    return path


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"compression": zipfile.ZIP_DEFLATED}, "is compressed, which PyTorch does not do"),
        ({"data": b"abc"}, "its storage 0 has 3 bytes and not 4"),
        ({"renamed": {"0": "x/data/1"}}, "names the storage '0', which it does not hold"),
        ({"renamed": {"0": "../../0"}}, r"an entry is called '\.\./\.\./0'"),
        ({"renamed": {"0": "/etc/0"}}, "an entry is called '/etc/0'"),
        ({"renamed": {"data.pkl": "x/other.pkl"}}, "holds 0 files data.pkl"),
        ({"more": [("x/y/data.pkl", b"N.")]}, "holds 2 files data.pkl"),
        ({"pickled": b"N.N."}, "goes on behind its end"),
        ({"pickled": b"N"}, "no end|exhausted"),
        ({"pickled": b"."}, "takes a value where there is none"),
        ({"pickled": b"Nt."}, "from a mark, and there is none"),
        ({"pickled": b"h\x05."}, "asks for value 5"),
        ({"pickled": b"Na."}, "takes a value where there is none"),
        ({"pickled": b"NNa."}, "appends to what is no list"),
        ({"pickled": b"}))s."}, "other keys than texts and numbers"),
        ({"pickled": b"NNb."}, "attributes to what is no OrderedDict"),
        ({"pickled": b"ccollections\nOrderedDict\n)b."}, "attributes to what is no OrderedDict"),
        ({"pickled": b"ccollections\nOrderedDict\nN\x85R."}, "an OrderedDict of it is not made as PyTorch makes it"),
        ({"pickled": b"ctorch._utils\n_rebuild_tensor_v2\n)R."}, "_rebuild_tensor_v2 with 0 values"),
        ({"pickled": b"ctorch\nFloatStorage\n)R."}, "calls .*FloatStorage.*, which is refused"),
        ({"pickled": b"cos\nsystem\n."}, r"asks for 'os\.system'"),
        ({"pickled": b"\x80\x04\x8c\x02os\x8c\x06system\x93."}, r"asks for 'os\.system'"),
        ({"pickled": b"(cos\nsystem\no."}, r"asks for 'os\.system'"),
        ({"pickled": b"(ios\nsystem\n."}, "the instruction INST, which no dictionary of tensors needs"),
        ({"pickled": b"NN\x81."}, "the instruction NEWOBJ"),
        ({"pickled": b"\x82\x01."}, "the instruction EXT1"),
        ({"pickled": b"P0\n."}, "the instruction PERSID"),
    ],
)
def test_a_zip_or_pickle_that_is_none_of_pytorchs_is_refused_with_the_reason(tmp_path, changes, words):
    with pytest.raises(CheckpointError, match=words):
        read_torch(rezipped(tmp_path / "x.pt", {"x": torch.ones(1)}, **changes), Reader())


def test_entries_whose_bytes_overlap_are_refused(tmp_path):
    """A zip in which one entry stands for many, as zip bombs are built."""
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as new:
        new.writestr("x/data.pkl", b"N.")
        new.writestr("x/data/0", struct.pack("<4s5H3I2H", b"PK\3\4", 0, 0, 0, 0, 0, 0, 1, 1, 8, 0) + b"x/data/1" + b"!")
    content = (tmp_path / "x.pt").read_bytes()
    inner = content.index(b"x/data/1") - 30
    directory, end = content.index(b"PK\1\2"), content.index(b"PK\5\6")
    third = struct.pack("<4s6H3I5H2I", b"PK\1\2", 0, 0, 0, 0, 0, 0, 0, 1, 1, 8, 0, 0, 0, 0, 0, inner) + b"x/data/1"
    tail = struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, 3, 3, end - directory + len(third), directory, 0)
    (tmp_path / "x.pt").write_bytes(content[:end] + third + tail)
    with pytest.raises(CheckpointError, match="x/data/1 begins at byte .*, what is before it ends at"):
        read_torch(tmp_path / "x.pt", Reader())


def check(path):
    """Read or refused as documented, and never a tensor beyond the file."""
    try:
        found = read_torch(path, Reader())
    except CheckpointError as error:
        assert len(str(error)) < 1000
        return
    for tensor in found.values():
        extent = tensor.span if isinstance(tensor, Strided) else tensor
        assert isinstance(extent, Extent) and 0 <= extent.offset
        assert extent.offset + extent.num_bytes <= path.stat().st_size
        assert tensor.read(Reader()).shape == tensor.shape


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_a_damaged_file_is_read_or_refused_and_nothing_else(path, tmp_path_factory, data):
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as file:
        pickled = file.getinfo("model/data.pkl")
        length = pickled.file_size
    first = content.index(b"\x80\x02")
    where = st.integers(first, first + length) | st.integers(content.index(b"PK\1\2"), len(content) - 1)
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(where)] = data.draw(st.integers(0, 255))
    mutated = tmp_path_factory.getbasetemp() / "mutated.pth"
    mutated.write_bytes(content[: data.draw(st.just(len(content)) | st.integers(0, len(content)))])
    check(mutated)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.sampled_from([
    b"N", b"}", b"]", b")", b"(", b"0", b"K\x01", b"J\xff\xff\xff\xff", b"X\x01\x00\x00\x00x", b"q\x00", b"h\x00", b"Q",
    b"R", b"b", b"s", b"u", b"a", b"e", b"t", b"\x85", b"\x86", b"\x87", b"ctorch\nFloatStorage\n", b"\x94",
    b"ccollections\nOrderedDict\n", b"ctorch._utils\n_rebuild_tensor_v2\n", b"ctorch._utils\n_rebuild_parameter\n",
    b"X\x07\x00\x00\x00storage", b"X\x01\x00\x00\x000", b"cos\nsystem\n", b"\x93", b"\x8a\x08" + b"\x7f" * 8,
]), max_size=30))  # fmt: skip
def test_any_program_of_a_pickle_is_read_or_refused_and_nothing_else(tmp_path_factory, program):
    check(rezipped(tmp_path_factory.getbasetemp() / "program.pt", X, pickled=b"".join(program) + b"."))
