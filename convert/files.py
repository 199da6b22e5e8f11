"""The tensors of one component folder: safetensors, single or sharded, read one tensor at a time."""

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from jaxwan.convert.rules import CheckpointError, Shape

_DTYPES = {"F32": 4, "BF16": 2, "F16": 2}  # name in the header -> bytes
_STEMS = ("diffusion_pytorch_model", "model")


@dataclass(frozen=True)
class TensorFiles:
    """Keys and shapes from the headers alone; `read` fetches one tensor by pread, so no file is ever mapped."""

    paths: tuple[Path, ...]

    @classmethod
    def find(cls, folder: Path) -> "TensorFiles":
        """The safetensors of a Diffusers component folder.

        Raises FileNotFoundError when the folder has none, or lacks a shard that its index names; CheckpointError when
        the index is malformed.
        """
        for stem in _STEMS:
            index = folder / f"{stem}.safetensors.index.json"
            if index.is_file():
                names = _shards(index)
                absent = [n for n in names if not (folder / n).is_file()]
                if absent:
                    raise FileNotFoundError(f"{folder} lacks {', '.join(absent)}, named by {index.name}")
                return cls(tuple(folder / n for n in names))
            if (folder / f"{stem}.safetensors").is_file():
                return cls((folder / f"{stem}.safetensors",))
        raise FileNotFoundError(f"{folder} has no {' or '.join(f'{s}.safetensors' for s in _STEMS)} (or shards of it)")

    @cached_property
    def _handles(self) -> dict[Path, Any]:
        from safetensors import SafetensorError, safe_open

        handles = {}
        for path in self.paths:
            try:
                handles[path] = safe_open(path, "numpy", backend="pread")
            except SafetensorError as error:
                raise CheckpointError(f"{path} is truncated or no safetensors file ({error})") from error
        return handles

    @cached_property
    def _file_of(self) -> dict[str, Any]:
        """Key -> its file's handle, in the order in which the tensors lie on disk."""
        found: dict[str, Any] = {}
        for path, handle in self._handles.items():
            for key in handle.offset_keys():
                if key in found:
                    raise CheckpointError(f"{path} holds {key} a second time")
                found[key] = handle
        return found

    @cached_property
    def shapes(self) -> dict[str, Shape]:
        """Key -> shape, read from the headers (which also proves that no file is truncated)."""
        return {key: tuple(handle.get_slice(key).get_shape()) for key, handle in self._file_of.items()}

    def check_dtypes(self, keys: Iterable[str]) -> None:
        """Raises CheckpointError naming every tensor of `keys` that holds no floats of a known kind."""
        dtypes = {key: self._file_of[key].get_slice(key).get_dtype() for key in keys}
        wrong = [f"{key} is {dtype}" for key, dtype in dtypes.items() if dtype not in _DTYPES]
        if wrong:
            where, only = self.paths[0].parent, ", ".join(_DTYPES)
            raise CheckpointError(f"{where}: {', '.join(wrong)}; readable are {only}")

    def kinds(self) -> dict[str, tuple[Shape, str]]:
        """Key -> shape and dtype, as the headers say."""
        return {key: (self.shapes[key], handle.get_slice(key).get_dtype()) for key, handle in self._file_of.items()}

    def read(self, key: str) -> np.ndarray:
        """One tensor, in its dtype on disk."""
        return self._file_of[key].get_tensor(key)

    def count_bytes(self, keys: Iterable[str]) -> int:
        """Bytes of these tensors, whose dtypes were checked."""
        slices = [self._file_of[key].get_slice(key) for key in keys]
        return sum(math.prod(part.get_shape()) * _DTYPES[part.get_dtype()] for part in slices)


def _shards(index: Path) -> list[str]:
    """The file names in an index of shards."""
    try:
        return sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} is no index of shards ({type(error).__name__}: {error})") from error
