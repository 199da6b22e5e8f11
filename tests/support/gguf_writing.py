"""GGUF files as converters write them, by the package gguf's own writer."""

from collections.abc import Mapping
from pathlib import Path

import gguf
import numpy as np

Q = gguf.GGMLQuantizationType


def write_gguf(path: Path, tensors: Mapping[str, np.ndarray], kinds: Mapping[str, Q] | None = None, **arrays) -> Path:
    """Tensors as they are, those of `kinds` as bytes of their blocks; arrays: of integers, into the metadata."""
    writer = gguf.GGUFWriter(path, "wan")
    writer.add_quantization_version(2)
    writer.add_array("tokenizer.ggml.tokens", ["<pad>", "</s>", "▁a"])
    writer.add_array("tokenizer.ggml.scores", [0.0, 0.5, -1.0])
    for name, values in arrays.items():
        writer.add_array(name, values)
    for name, tensor in tensors.items():
        kind = (kinds or {}).get(name)
        bf16 = tensor.dtype == "bfloat16"
        writer.add_tensor(name, tensor.view(np.uint8) if bf16 else tensor, raw_dtype=Q.BF16 if bf16 else kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def blocks(rng: np.random.Generator, kind: Q, shape: tuple[int, ...]) -> np.ndarray:
    """Random bytes that are blocks of a type for a tensor of this shape, whose scales are finite and small."""
    size, length = gguf.GGML_QUANT_SIZES[kind]
    return rng.integers(0, 56, (*shape[:-1], shape[-1] // size * length)).astype(np.uint8)
