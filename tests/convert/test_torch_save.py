"""Files as torch.save makes them, written without it: PyTorch and our own reader find the same tensors."""

import pickletools

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jaxwan.convert.save import Piece
from jaxwan.convert.tensors import Reader
from jaxwan.convert.torch_files import read_torch
from jaxwan.convert.torch_save import state_dict, torch_file

DTYPES = {"bfloat16": jnp.bfloat16, "float16": np.float16, "float32": np.float32, "float64": np.float64,
          "int64": np.int64, "uint8": np.uint8}  # fmt: skip


def pieces(arrays):
    return [Piece(name, a.shape, a.dtype, lambda a=a: a) for name, a in arrays.items()]


def test_pytorch_and_our_reader_find_every_tensor_with_its_bits(tmp_path):
    rng = np.random.default_rng(0)
    shapes = {"matrix.weight": (5, 3), "vector": (7,), "number": (), "none": (0, 4), "ü.conv": (2, 3, 1, 2, 2)}
    arrays = {
        f"{dtype}.{name}": (9 * rng.standard_normal(shape)).astype(kind)
        for dtype, kind in DTYPES.items()
        for name, shape in shapes.items()
    }
    torch_file("model.pth", pieces(arrays)).write_to(tmp_path)
    loaded = torch.load(tmp_path / "model.pth", weights_only=True)
    assert list(loaded) == list(arrays)
    for name, array in arrays.items():
        theirs = loaded[name]
        assert str(theirs.dtype).removeprefix("torch.") == name.split(".")[0] and theirs.shape == array.shape
        assert theirs.contiguous().view(-1).view(torch.uint8).numpy().tobytes() == array.tobytes(), name
    reader = Reader()
    for name, tensor in read_torch(tmp_path / "model.pth", reader).items():
        assert tensor.read(reader).tobytes() == arrays[name].tobytes(), name


def test_the_same_tensors_make_the_same_file(tmp_path):
    file = torch_file("model.pth", pieces({"x": np.arange(4.0)}))
    assert file.write_to(tmp_path) == file.write_to(tmp_path) and file.num_bytes == 32


@pytest.mark.parametrize("rows", [2**31 - 1, 2**31, 2**40])
def test_sizes_beyond_32_bits_are_written_whole(rows):
    """Of such a tensor the pickle alone."""
    program = state_dict([Piece("x", (rows, 3), np.dtype(np.float32), lambda: np.zeros(()))])
    numbers = [value for code, value, _ in pickletools.genops(program) if code.name in ("BININT", "LONG1")]
    assert numbers == [3 * rows, 0, rows, 3, 3, 1]  # the storage's size, offset, shape, strides
