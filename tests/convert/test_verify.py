"""Comparing tensors whatever their layout, and files with what was written."""

import hashlib

import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxwan.convert.files import TensorFiles
from jaxwan.convert.rules import LINEAR, CheckpointError, Rule
from jaxwan.convert.verify import SUMS, check_finite, check_sums, compare, count_compared

OURS = [Rule("blocks.{layer}.weight", "kernel", LINEAR), Rule("bias", "bias"), Rule("unread", None)]
THEIRS = [Rule("layer{layer}", "kernel"), Rule("b", "bias")]


@pytest.fixture
def component(tmp_path):
    def make(name, tensors, rules):
        save_file({key: np.ascontiguousarray(value) for key, value in tensors.items()}, tmp_path / name)
        return {"part": (TensorFiles((tmp_path / name,)), rules)}

    return make


def numbers(seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal((4, 6)).astype(dtype) for name in ("0", "1")} | {"bias": np.ones(3, dtype)}


def ours(n):
    return {"blocks.0.weight": n["0"], "blocks.1.weight": n["1"], "bias": n["bias"], "unread": n["bias"]}


def theirs(n):
    return {"layer0": n["0"].T, "layer1": n["1"].T, "b": n["bias"]}


def test_the_same_numbers_under_other_names_axes_and_dtypes_are_the_same(component):
    half = numbers(dtype=np.float16)
    full = {name: value.astype(np.float32) for name, value in half.items()}
    a, b = component("a", ours(half), OURS), component("b", theirs(full), THEIRS)
    read = []
    found = compare(a, b, progress=read.append)
    assert found.same and found.equal == 3 and sum(read) == count_compared(a, b) == (2 * 24 + 3) * (2 + 4)


def test_what_differs_is_named_with_how_much(component):
    changed = numbers()
    changed["1"] = changed["1"].copy()
    changed["1"][2, 3] += 0.5
    found = compare(component("a", ours(numbers()), OURS), component("b", theirs(changed), THEIRS))
    (difference,) = found.different
    assert (difference.a, difference.b, found.equal, found.same) == ("blocks.1.weight", "layer1", 2, False)
    assert difference.largest == pytest.approx(0.5) and difference.told.startswith("1 of 24 numbers, by 0.5 at most")


def test_a_tolerance_is_a_share_of_the_largest_number(component):
    changed = numbers()
    top = np.abs(changed["0"]).max()
    changed["0"] = changed["0"] + np.float32(0.01 * top)
    a, b = component("a", ours(numbers()), OURS), component("b", theirs(changed), THEIRS)
    assert compare(a, b, 0.0101).same and not compare(a, b, 0.0099).same  # rounding of a sum is 1e-7 of it


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_no_tolerance_hides_what_is_no_number(component, value):
    changed = numbers()
    changed["0"] = changed["0"].copy()
    changed["0"][0, 0] = value
    a, b = component("a", ours(numbers()), OURS), component("b", theirs(changed), THEIRS)
    assert "infinite or none" in compare(a, b, 0.99).different[0].told
    assert compare(b, b, 0.99).same  # their bits are the same


def test_tensors_and_parts_in_one_alone_are_named(component):
    less = {name: value for name, value in ours(numbers()).items() if name != "blocks.1.weight"}
    a, b = component("a", less, OURS), component("b", theirs(numbers()), THEIRS)
    found = compare(a | {"more": a["part"]}, b)
    assert (found.only_a, found.only_b, found.same) == (["more"], ["part: layer1"], False)


def test_other_shapes_differ(component):
    wide = numbers() | {"bias": np.ones(4, np.float32)}
    found = compare(component("a", ours(numbers()), OURS), component("b", theirs(wide), THEIRS))
    assert [item.told for item in found.different] == ["(3,) and (4,)"]


def test_nothing_in_common_is_not_the_same(component):
    a = component("a", {"x": np.ones(1)}, OURS)
    assert not compare(a, a).same


# Against what was written


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "x").mkdir()
    (tmp_path / "x/y.bin").write_bytes(b"numbers")
    (tmp_path / SUMS).write_text(f"{hashlib.sha256(b'numbers').hexdigest()}  x/y.bin\n")
    return tmp_path


def test_files_as_written_are_counted_and_others_named(folder):
    read = []
    assert check_sums(folder, read.append) == 1 and read == [7]
    (folder / "x/y.bin").write_bytes(b"numberz")
    with pytest.raises(CheckpointError, match="other bytes than were written in x/y.bin: it is damaged or changed"):
        check_sums(folder)
    (folder / "x/y.bin").unlink()
    with pytest.raises(CheckpointError, match="lacks x/y.bin, which SHA256SUMS names"):
        check_sums(folder)


@pytest.mark.parametrize("line", ["x/y.bin", f"{'0' * 64}  ../x", f"{'0' * 64}  /etc/x", f"{'0' * 64}  "])
def test_a_list_that_is_none_or_leads_elsewhere_is_refused(folder, line):
    (folder / SUMS).write_text(line + "\n")
    with pytest.raises(CheckpointError, match="is no list of checksums"):
        check_sums(folder)


def test_numbers_that_are_none_are_named(component):
    bad = numbers()
    bad["1"] = np.where(bad["1"] > 1, np.inf, bad["1"])
    files, _ = component("a", ours(bad), OURS)["part"]
    read = []
    check_finite(files, ["blocks.0.weight", "bias"], what="it", progress=read.append)
    assert read == [96, 12]
    with pytest.raises(CheckpointError, match=r"it has NaN or Inf in 1 tensors \(blocks.1.weight\)"):
        check_finite(files, files.shapes, what="it")
