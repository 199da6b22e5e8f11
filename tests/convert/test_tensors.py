"""Extents of safetensors files against the library's own reading of them, and the one reader of bytes."""

import gc
import json
import os
import resource
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from jaxwan.convert.rules import CheckpointError
from jaxwan.convert.tensors import DTYPES, Extent, Reader, read_safetensors

RNG = np.random.default_rng(0)
TENSORS = {
    "matrix": RNG.standard_normal((6, 5), np.float32),
    "empty": np.zeros((0, 3), np.float32),
    "scalar": np.array(3.5, np.float32),
    "conv": RNG.standard_normal((4, 3, 2, 1)).astype(ml_dtypes.bfloat16),
    "half": RNG.standard_normal(7).astype(np.float16),
    "fp8": RNG.standard_normal((2, 9)).astype(ml_dtypes.float8_e4m3fn),
    "bytes": np.arange(5, dtype=np.uint8),
}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("tensors") / "model.safetensors"
    save_file(TENSORS, path, metadata={"format": "pt"})
    return path


@pytest.fixture
def asked(monkeypatch):
    """What the system is asked for: (first byte, number of bytes)."""
    asked, preadv = [], os.preadv

    def counted(descriptor, buffers, offset):
        asked.append((offset, sum(map(len, buffers))))
        return preadv(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", counted)
    return asked


def same(ours, theirs):
    assert ours.dtype == theirs.dtype and ours.shape == theirs.shape and ours.tobytes() == theirs.tobytes()


# The reader


def test_tensors_are_those_that_were_written_in_the_order_of_the_file(path):
    reader = Reader()
    extents = read_safetensors(path, reader)
    with safe_open(path, "numpy") as file:
        assert list(extents) == list(file.offset_keys())
        assert {k: e.dtype for k, e in extents.items()} == {k: DTYPES[file.get_slice(k).get_dtype()] for k in extents}
    for key, tensor in TENSORS.items():
        same(reader.read(extents[key]), tensor)


@pytest.mark.parametrize("key", [key for key in TENSORS if key != "scalar"])
def test_rows_are_read_by_asking_for_their_bytes_alone(path, asked, key):
    reader = Reader()
    extent, tensor = read_safetensors(path, reader)[key], TENSORS[key]
    row = tensor[:1].nbytes
    for start in range(len(tensor) + 1):
        for stop in range(start, len(tensor) + 1):
            asked.clear()
            same(reader.read(extent.rows(slice(start, stop))), tensor[start:stop])
            assert asked == ([(extent.offset + start * row, (stop - start) * row)] if stop > start else [])
    same(reader.read(extent.rows(slice(None))), tensor)


def test_the_header_is_all_that_is_read_of_a_file_to_know_its_tensors(path, asked):
    length = int.from_bytes(path.read_bytes()[:8], "little")
    read_safetensors(path, Reader())
    assert asked == [(0, 8), (8, length)]


def test_what_the_system_gives_in_pieces_is_put_together(path, monkeypatch):
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda descriptor, buffers, offset: preadv(descriptor, [buffers[0][:7]], offset))
    reader = Reader()
    extents = read_safetensors(path, reader)
    for key, tensor in TENSORS.items():
        same(reader.read(extents[key]), tensor)


def test_each_read_has_memory_of_its_own(path):
    reader = Reader()
    extent = read_safetensors(path, reader)["matrix"]
    first, second = reader.read(extent), reader.read(extent)
    first[:] = 0
    same(second, TENSORS["matrix"])


def test_a_file_that_is_replaced_stays_the_one_whose_header_was_read(tmp_path, path):
    mine, other = tmp_path / "mine", tmp_path / "other"
    mine.write_bytes(path.read_bytes())
    reader = Reader()
    extents = read_safetensors(mine, reader)
    other.write_bytes(b"")
    other.replace(mine)
    same(reader.read(extents["matrix"]), TENSORS["matrix"])


def test_a_file_that_is_cut_off_meanwhile_is_named(tmp_path, path):
    mine = tmp_path / "mine"
    mine.write_bytes(path.read_bytes())
    reader = Reader()
    extents = read_safetensors(mine, reader)
    os.truncate(mine, extents["matrix"].offset + 4)
    with pytest.raises(CheckpointError, match=rf"mine was cut off at byte {extents['matrix'].offset + 4} after"):
        reader.read(extents["matrix"])


def test_a_file_is_opened_once_and_closed_with_its_reader(path, monkeypatch):
    opened, open_ = [], os.open
    monkeypatch.setattr(os, "open", lambda *arguments: opened.append(open_(*arguments)) or opened[-1])
    reader = Reader()
    for extent in read_safetensors(path, reader).values():
        reader.read(extent)
    (descriptor,) = opened
    os.fstat(descriptor)
    del reader
    gc.collect()
    with pytest.raises(OSError):
        os.fstat(descriptor)


# What is refused


def written(path: Path, header: bytes | dict, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def entry(begin=0, end=4, dtype="F32", shape=(1,), **more):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]} | more


def unsound(library_takes=False, data=b"12345678", length=None, reason="", header: bytes | dict = b""):
    return pytest.param(header, data, length, reason, library_takes)


@pytest.mark.parametrize(
    ("header", "data", "length", "reason", "library_takes"),
    [
        unsound(header={"x": entry()}, reason="its tensors take 4 bytes, and it has 8"),
        unsound(header={"x": entry(0, 12, shape=[3])}, reason="its tensors take 12 bytes, and it has 8"),
        unsound(header={"x": entry(), "y": entry()}, reason="begins at byte 0, what is before it ends at 4"),
        unsound(header={"x": entry(), "y": entry(2, 6)}, data=b"123456", reason="y begins at byte 2"),
        unsound(header={"x": entry(4, 8)}, reason="x begins at byte 4, what is before it ends at 0"),
        unsound(header={"x": entry(0, 8)}, reason=r"x is F32 \(1,\) in 8 bytes"),
        unsound(header={"x": entry(8, 0, shape=[2])}, reason=r"x is F32 \(2,\) in -8 bytes"),
        unsound(header={"x": entry(-4, 4, shape=[2])}, reason="x has no data_offsets"),
        unsound(header={"x": entry(0, 8, shape=[-1, -2])}, reason="x has no shape"),
        unsound(header={"x": entry(0, 8, shape=[True, 2])}, reason="x has no shape"),
        unsound(header={"x": entry(0, 8, shape=[2.0])}, reason="x has no shape"),
        unsound(header={"x": entry(0, 0, shape=[0, 2**60, 2**60])}, data=b"", reason="no shape", library_takes=True),
        unsound(header={"x": entry(0, 8, shape=[1] * 99 + [2])}, reason="x has no shape", library_takes=True),
        unsound(header={"x": entry(shape="1")}, data=b"1234", reason="x has no shape"),
        unsound(header={"x": entry(dtype=["F32"])}, data=b"1234", reason="x has no dtype"),
        unsound(header={"x": entry(dtype="a dtype " * 99)}, data=b"1234", reason="x has no dtype"),
        unsound(header={"x": {"dtype": "F32", "shape": [2]}}, reason="x has no dtype, shape and data_offsets"),
        unsound(header={"x": [0, 8]}, reason="x has no dtype, shape and data_offsets"),
        unsound(header=b"[]", reason="its header is no JSON object"),
        unsound(header=b'{"x": ', reason="Expecting value"),
        unsound(header=b'{"\xff": 0}', reason="can't decode byte 0xff"),
        unsound(header=b'{"\\ud800": {"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', reason="surrogates"),
        unsound(header=b"[" * 100_000, reason="recursion"),
        unsound(header=b'{"x": ' + b"9" * 10_000 + b"}", reason="digits"),
        unsound(
            header=b'{"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"x":{"dtype":"I32","shape":[2],"data_offsets":[0,8]}}',
            reason="its header holds a name twice", library_takes=True,
        ),
        unsound(header=b"{}", data=b"", length=2**63, reason="its header would have 9223372036854775808 bytes"),
        unsound(header=b"{}", data=b"", length=3, reason="its header would have 3 bytes, and the file has 10"),
        unsound(header=b"", data=b"", length=0, reason="Expecting value"),
    ],
)  # fmt: skip
def test_a_header_that_is_not_sound_is_refused_with_the_reason(tmp_path, header, data, length, reason, library_takes):
    path = written(tmp_path / "x.safetensors", header, data, length)
    with pytest.raises(CheckpointError, match=rf"x.safetensors is truncated or no safetensors file \(.*{reason}"):
        read_safetensors(path, Reader())
    try:
        with safe_open(path, "numpy"):
            assert library_takes
    except SafetensorError:
        assert not library_takes


@pytest.mark.parametrize("dtype", ["F4", "F6_E2M3", "I2"])
def test_a_dtype_of_which_numbers_share_bytes_is_refused_by_name(tmp_path, dtype):
    path = written(tmp_path / "x.safetensors", {"x": entry(0, 2, dtype, [4]), "y": entry(2, 6)}, b"123456")
    with pytest.raises(CheckpointError, match=f"x.safetensors holds weights in {dtype}, probably quantised, which"):
        read_safetensors(path, Reader())


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_what_the_library_refuses_is_refused_here_whatever_a_header_says(tmp_path_factory, data):
    """One byte of a sound file is another, or its end is missing."""
    sound = {"a": entry(0, 8, shape=[2]), "b.c": entry(8, 20, "BF16", [2, 3]), "d": entry(20, 24, shape=[])}
    path = written(tmp_path_factory.getbasetemp() / "mutated.safetensors", sound, bytes(24))
    content = bytearray(path.read_bytes())
    at = data.draw(st.integers(0, len(content) - 25))
    content[at] = data.draw(st.integers(0, 255) | st.sampled_from(b'0123456789-{}[],:"'))
    path.write_bytes(content[: data.draw(st.just(len(content)) | st.integers(0, len(content)))])
    try:
        extents = read_safetensors(path, Reader())
    except CheckpointError:
        return
    with safe_open(path, "numpy") as file:
        assert set(file.keys()) == extents.keys()
        for key, extent in extents.items():
            same(Reader().read(extent), file.get_tensor(key))


def test_an_extent_knows_its_bytes():
    extent = Extent(Path("x"), 10, DTYPES["BF16"], (4, 3))
    assert extent.num_bytes == 24
    assert extent.rows(slice(1, 3)) == Extent(Path("x"), 16, DTYPES["BF16"], (2, 3))


def test_more_files_than_a_process_may_open_are_read(tmp_path):
    """As those of an Orbax checkpoint."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    paths = [tmp_path / str(number) for number in range(300)]
    for number, path in enumerate(paths):
        path.write_bytes(bytes([number % 256]))
    reader = Reader()
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/dev/fd")) + 150, limit[1]))
        for path in [*paths, *paths]:
            assert reader.read(Extent(path, 0, np.dtype(np.uint8), (1,))).tobytes() == path.read_bytes()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limit)
