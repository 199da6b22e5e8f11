"""What files hold in forms of their own, as tensors under known names; decoding by hand in float32."""

import json

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxwan.convert.files import TensorFiles
from jaxwan.convert.rules import CheckpointError

RNG = np.random.default_rng(0)
NUMBERS = RNG.standard_normal((6, 5), np.float32).astype(ml_dtypes.float8_e4m3fn)
ROWS = RNG.random(6, np.float32)
ONE = np.float32(0.3)


def files(tmp_path, tensors, **metadata):
    save_file(tensors, tmp_path / "x.safetensors", metadata)
    return TensorFiles((tmp_path / "x.safetensors",))


def note(**said):
    return np.frombuffer(json.dumps(said).encode(), np.uint8)


@pytest.mark.parametrize(
    ("beside", "expected"),
    [
        ({}, NUMBERS.astype(np.float32)),
        ({"a.scale_weight": np.array(ONE)}, NUMBERS.astype(np.float32) * ONE),
        ({"a.scale_weight": np.array([ONE]), "a.scale_input": ROWS[:1]}, NUMBERS.astype(np.float32) * ONE),
        ({"a.weight_scale": ROWS[:, None]}, NUMBERS.astype(np.float32) * ROWS[:, None]),
        ({"a.scale_weight": ROWS}, NUMBERS.astype(np.float32) * ROWS[:, None]),
        (
            {"a.weight_scale": np.array(ONE), "a.input_scale": np.array(ONE),
             "a.comfy_quant": note(format="float8_e4m3fn", full_precision_matrix_mult=True)},
            NUMBERS.astype(np.float32) * ONE,
        ),
        ({"scaled_fp8": np.zeros(2, ml_dtypes.float8_e4m3fn)}, NUMBERS.astype(np.float32)),
    ],
)  # fmt: skip
def test_fp8_is_its_numbers_times_their_scales(tmp_path, beside, expected):
    found = files(tmp_path, {"a.weight": NUMBERS, "b.bias": ROWS, **beside})
    assert found.shapes == {"a.weight": (6, 5), "b.bias": (6,)}
    assert found.dtypes["a.weight"] == "F32"
    np.testing.assert_array_equal(found.read("a.weight"), expected)
    for rows in (slice(0, 2), slice(3, 6), slice(2, 2)):
        np.testing.assert_array_equal(found.read("a.weight", rows), expected[rows])
        assert found.num_bytes("a.weight", rows) < found.num_bytes("a.weight")


def test_the_other_fp8_is_decoded_too_code_by_code(tmp_path):
    codes = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e5m2).reshape(16, 16)
    found = files(tmp_path, {"a.weight": codes})
    np.testing.assert_array_equal(found.read("a.weight"), codes.astype(np.float32))


def test_a_single_number_stays_an_array(tmp_path):
    read = files(tmp_path, {"a.weight": np.array(NUMBERS[0, 0]), "a.scale_weight": np.array(ONE)}).read("a.weight")
    assert isinstance(read, np.ndarray) and read.shape == () and read == np.float32(NUMBERS[0, 0]) * ONE


@pytest.mark.parametrize(
    ("beside", "words"),
    [
        ({"a.weight_scale": np.ones((6, 1), ml_dtypes.float8_e8m0fnu)}, r"scales \(6, 1\) of a.weight .* are mxfp8"),
        ({"a.weight_scale": np.ones((6, 5), np.float32)}, "are not one for all or one a row"),
        ({"a.weight_scale": np.ones(5, np.float32)}, "are not one for all or one a row"),
        ({"a.weight_scale": ROWS, "a.scale_weight": ROWS}, "are not one for all or one a row"),
        ({"a.comfy_quant": note(format="nvfp4")}, "quantised as 'nvfp4', which is not read: take the file in bfloat16"),
        ({"a.comfy_quant": note(format="float8_e4m3fn", convrot=True)}, "'float8_e4m3fn' with convrot"),
        ({"a.comfy_quant": note(scale=1)}, "a.comfy_quant does not say how it is quantised"),
        ({"a.comfy_quant": np.frombuffer(b"[" * 9000, np.uint8)}, "a.comfy_quant does not say how it is quantised"),
        ({"a.comfy_quant": np.zeros(99_999, np.uint8)}, "does not say how it is quantised"),
        (
            {"a.pre_quant_scale": np.ones(5, np.float32)},
            "holds a.pre_quant_scale, a scale of weights in a form that is not",
        ),
        ({"b.scale_weight": np.array(ONE), "b.weight": ROWS}, "holds b.scale_weight, a scale of weights in a form"),
        ({"net.a.weight": ROWS, "net.b": ROWS, "net.c": ROWS}, "holds a.weight twice"),
    ],
)
def test_what_is_not_decoded_is_refused_by_name(tmp_path, beside, words):
    with pytest.raises(CheckpointError, match=f"x.safetensors.*{words}"):
        _ = files(tmp_path, {"a.weight": NUMBERS, **beside}).tensors


def layers(**said):
    return json.dumps({"format_version": "1.0", "layers": {"a": said}})


def test_formats_may_stand_in_the_header_instead_of_beside_tensors(tmp_path):
    tensors = {"a.weight": NUMBERS, "a.weight_scale": np.array(ONE)}
    found = files(tmp_path, tensors, format="pt", _quantization_metadata=layers(format="float8_e4m3fn"))
    np.testing.assert_array_equal(found.read("a.weight"), NUMBERS.astype(np.float32) * ONE)


@pytest.mark.parametrize(
    ("said", "words"),
    [
        (layers(format="nvfp4"), "quantised as 'nvfp4', which is not read: take the file in bfloat16"),
        (layers(format="mxfp8"), "quantised as 'mxfp8', which"),
        (layers(format="int8_tensorwise", convrot=True), "quantised as 'int8_tensorwise' with convrot, which"),
        (layers(form="nvfp4"), "its _quantization_metadata do not say how it is quantised"),
        ("[" * 9000, "its _quantization_metadata do not say how it is quantised"),
        ("[]", "its _quantization_metadata do not say how it is quantised"),
    ],
)
@pytest.mark.parametrize("dtype", [ml_dtypes.float8_e4m3fn, np.uint8, np.int8])
def test_other_formats_in_the_header_are_refused_by_name(tmp_path, said, words, dtype):
    with pytest.raises(CheckpointError, match=f"x.safetensors.*{words}"):
        _ = files(tmp_path, {"a.weight": NUMBERS.view(dtype)}, _quantization_metadata=said).tensors


@pytest.mark.parametrize("prefix", ["model.diffusion_model.", "diffusion_model.", "model.", "net."])
@pytest.mark.parametrize("wrapper", ["", "_orig_mod.", "module.", "_fsdp_wrapped_module."])
def test_names_lose_what_wrapped_the_model(tmp_path, prefix, wrapper):
    tensors = {f"{wrapper}{prefix}blocks.0.{wrapper}{name}": ROWS for name in "abc"}
    assert sorted(files(tmp_path, tensors).shapes) == ["blocks.0.a", "blocks.0.b", "blocks.0.c"]


def test_names_of_few_tensors_are_no_prefix(tmp_path):
    assert sorted(files(tmp_path, {"model.a": ROWS, "b": ROWS}).shapes) == ["b", "model.a"]
