"""The tensors of one component: a folder of safetensors, single or sharded, or a file of any format that is read."""

import json
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from jaxwan.convert.foreign import describe_file
from jaxwan.convert.gguf_files import MAGIC, read_gguf
from jaxwan.convert.orbax import Part, read_orbax
from jaxwan.convert.rules import CheckpointError, Shape, some
from jaxwan.convert.tensors import DTYPES, MOST_HEADER, Extent, Reader, Stored, read_metadata, read_safetensors
from jaxwan.convert.torch_files import read_torch, saved_under
from jaxwan.convert.views import TOKENIZER, as_known, check_metadata

_QUANTISED = {DTYPES[name] for name in ("F8_E4M3", "F8_E5M2", "I8", "U8")}
_READABLE = ("F32", "BF16", "F16")
_STEMS = ("diffusion_pytorch_model", "model")  # Diffusers' components, and those of transformers
_SHARD = r"-\d{5}-of-\d{5}"
_VARIANT = re.compile(rf"(?:{'|'.join(_STEMS)})(?:\.([\w-]+?)(?:{_SHARD})?|{_SHARD}\.([\w-]+))\.safetensors")
_MOST_TOKENIZER = 2**26  # bytes; UMT5's has 4.5 million
_WEIGHTS = (".bin", ".pt", ".pth", ".ckpt", ".gguf", ".safetensors")


@dataclass(frozen=True)
class TensorFiles:
    """Keys and shapes from the headers alone; `read` fetches one tensor or rows of it, and no other byte.

    part: what of an Orbax checkpoint, whose folder is then the only path.
    """

    paths: tuple[Path, ...]
    part: Part | None = None

    @classmethod
    def find(cls, folder: Path, variant: str | None = None) -> "TensorFiles":
        """The safetensors of a Diffusers component folder; raises as `weight_files` does."""
        names = weight_files(list_files(folder), lambda name: read_index(folder / name), variant, what=str(folder))
        return cls(tuple(folder / name for name in names))

    @cached_property
    def _reader(self) -> Reader:
        return Reader()

    @cached_property
    def _own(self) -> dict[str, Stored]:
        """Key -> its tensor, as the files name it; reads the headers, whose claims it checks (so no file is
        truncated)."""
        if self.part is not None:
            return dict(read_orbax(self.paths[0], self.part, self._reader))
        found: dict[str, Stored] = {}
        for path in self.paths:
            tensors = read_tensors(path, self._reader)
            if any(isinstance(tensor, Extent) and tensor.dtype in _QUANTISED for tensor in tensors.values()):
                check_metadata(metadata_of(path, self._reader), what=str(path))
            for key, tensor in tensors.items():
                if key in found:
                    raise CheckpointError(f"{path} holds {key} a second time")
                found[key] = tensor
        return found

    @cached_property
    def tensors(self) -> dict[str, Stored]:
        """Key -> its tensor, under names that rules know, in the order in which they lie on disk."""
        if self.part is not None:  # whose names are those of parameters
            return self._own
        return as_known(self._own, self._reader, what=str(self.paths[0]))

    @property
    def has_tokenizer(self) -> bool:
        """Whether a SentencePiece model lies beside the tensors, as in ComfyUI's text encoders."""
        return TOKENIZER in self._own

    def read_tokenizer(self) -> bytes:
        """The SentencePiece model. Raises CheckpointError where it cannot be one."""
        stored = self._own[TOKENIZER]
        if stored.dtype != DTYPES["U8"] or not 0 < stored.num_bytes <= _MOST_TOKENIZER:
            raise CheckpointError(f"{self.paths[0]}: {TOKENIZER} {stored.shape} is no SentencePiece model")
        return stored.read(self._reader).tobytes()

    @cached_property
    def shapes(self) -> dict[str, Shape]:
        """Key -> shape, in the order in which they lie on disk."""
        return {key: tensor.shape for key, tensor in self.tensors.items()}

    @cached_property
    def dtypes(self) -> dict[str, str]:
        """Key -> dtype, as the headers say: "F32", "BF16", …"""
        names = {dtype: name for name, dtype in DTYPES.items()}
        return {key: names[tensor.dtype] for key, tensor in self.tensors.items()}

    def check_dtypes(self, keys: Iterable[str]) -> None:
        """Raises CheckpointError with the first few tensors of `keys` that hold no floats of a known kind."""
        wrong = [f"{key} is {self.dtypes[key]}" for key in keys if self.dtypes[key] not in _READABLE]
        if wrong:
            raise CheckpointError(f"{self.paths[0].parent}: {some(wrong)}; readable are {', '.join(_READABLE)}")

    def kinds(self) -> dict[str, tuple[Shape, str]]:
        """Key -> shape and dtype, as the headers say."""
        return {key: (shape, self.dtypes[key]) for key, shape in self.shapes.items()}

    def read(self, key: str, rows: slice | None = None) -> np.ndarray:
        """One tensor, or these rows of its first axis, in its dtype on disk."""
        return self._tensor(key, rows).read(self._reader)

    def num_bytes(self, key: str, rows: slice | None = None) -> int:
        """Bytes of one tensor, or of these rows of it."""
        return self._tensor(key, rows).num_bytes

    def _tensor(self, key: str, rows: slice | None) -> Stored:
        return self.tensors[key] if rows is None else self.tensors[key].rows(rows)


def read_tensors(path: Path, reader: Reader) -> dict[str, Stored]:
    """The tensors of a file by name, in the order in which they lie in it, whatever its format; its headers alone are
    read. Raises CheckpointError as the format's own function does."""
    start = reader.read(Extent(path, 0, DTYPES["U8"], (min(4, reader.size(path)),))).tobytes()
    if start == MAGIC:
        return read_gguf(path, reader)
    return dict(read_torch(path, reader) if start == b"PK\3\4" else read_safetensors(path, reader))


def saved_by_training(path: Path) -> tuple[str, ...]:
    """The names of the dictionaries around the tensors of a file of PyTorch's; () for other files."""
    reader = Reader()
    start = reader.read(Extent(path, 0, DTYPES["U8"], (min(4, reader.size(path)),))).tobytes()
    return saved_under(path, reader) if start == b"PK\3\4" else ()


def metadata_of(path: Path, reader: Reader) -> dict[str, Any]:
    """What a file whose tensors could be read says beside them, if it is a safetensors file."""
    start = reader.read(Extent(path, 0, DTYPES["U8"], (4,))).tobytes()
    return {} if start in (MAGIC, b"PK\3\4") else read_metadata(path, reader)


# Which files


def weight_files(
    names: Collection[str], shards_of: Callable[[str], list[str]], variant: str | None, *, what: str
) -> list[str]:
    """Which of the files in a component folder hold its tensors, as Diffusers and transformers choose them.

    names: the files that are there, on a disk or a hub. shards_of: index file -> the shards that it names. A variant
    such as "fp16" counts where the folder has it, else the plain files do. Where a whole file lies beside an index of
    shards, from an earlier save, Diffusers reads the shards of its own models, transformers the whole file; an index
    whose shards are gone counts only where there is no whole file.

    Raises FileNotFoundError, in a sentence that begins with `what`, where there are none or a shard is missing.
    """
    lacking = ""
    for name in _candidates(variant if variant in find_variants(names) else None):
        if name not in names:
            continue
        if not name.endswith(".json"):
            return [name]
        shards = shards_of(name)
        absent = [shard for shard in shards if shard not in names]
        if not absent:
            return shards
        lacking = f"{what} lacks {some(absent)}, named by {name}"
    if lacking:
        raise FileNotFoundError(lacking)
    raise FileNotFoundError(f"{what} {_other_weights(names)}")


def find_variants(names: Iterable[str]) -> list[str]:
    """The variants that files are named after: "fp16" of model.fp16.safetensors."""
    found = (_VARIANT.fullmatch(name) for name in names)
    return sorted({m[1] or m[2] for m in found if m})


def check_variant(variant: str | None, names: Mapping[str, Collection[str]], *, what: str) -> None:
    """Raises FileNotFoundError where no component (of which these are the files) has any of a variant."""
    if variant is None:
        return
    there = find_variants(name for files in names.values() for name in files)
    if variant not in there:
        instead = f"those there are {', '.join(there)}" if there else "it has none: leave variant out"
        raise FileNotFoundError(f"{what} has no weights of variant={variant!r}; {instead}")


def is_weights(name: str) -> bool:
    """Whether a file of this name holds weights, in whatever format."""
    return name.endswith(_WEIGHTS)


def list_files(folder: Path) -> list[str]:
    """The names of the files in a folder, none if there is no folder."""
    return sorted(path.name for path in folder.iterdir() if path.is_file()) if folder.is_dir() else []


def read_index(index: Path) -> list[str]:
    """The file names in an index of shards. Raises CheckpointError for anything else."""
    try:
        if (size := index.stat().st_size) > MOST_HEADER:
            raise ValueError(f"it has {size} bytes")
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        if any(Path(name).name != name or not name.endswith(".safetensors") for name in names):
            raise ValueError("its shards lie in other folders, or are no safetensors files")
        if not names:
            raise ValueError("it names none")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = str(error) if isinstance(error, ValueError) else repr(error)
        told = describe_file(index, f"is no index of shards ({reason:.200})")
        raise CheckpointError(f"{index} {told}") from error
    return names


def _candidates(variant: str | None) -> Iterator[str]:
    """File names in the order in which they are looked for. Of a variant's index there are three spellings: Diffusers'
    and transformers' own, Diffusers' older one, and one that follows the whole file's name."""
    ours, theirs = _STEMS
    whole, plain = f".{variant}.safetensors" if variant else ".safetensors", ".safetensors.index.json"
    indices = [plain]
    if variant:
        indices = [f".safetensors.index.{variant}.json", f".safetensors.{variant}.index.json", f"{whole}.index.json"]
    yield from (ours + end for end in (*indices, whole))
    yield from (theirs + end for end in (whole, *indices))


def _other_weights(names: Collection[str]) -> str:
    """What a folder without readable files has instead, and what to do."""
    variants, others = find_variants(names), [name for name in names if name.endswith(_WEIGHTS)]
    wanted = " or ".join(f"{stem}.safetensors" for stem in _STEMS)
    if variants:
        given = " or ".join(f"--variant {v} (variant={v!r} in Python)" for v in variants)
        return f"has no {wanted}, but those of a variant: give {given}"
    if not others:
        return f"has no {wanted} (or shards of it)"
    if shards := [name for stem in _STEMS for name in others if re.fullmatch(rf"{stem}{_SHARD}\.safetensors", name)]:
        return f"holds {some(shards)} and no .safetensors.index.json, which says what is in the shards"
    if any(name.endswith(".safetensors") for name in others):
        lora = any("lora" in name.lower() for name in others)
        if lora:
            return f"holds {some(others)}, a LoRA by its name, and no {wanted}"
    return f"holds {some(others)} and no {wanted}: give it as --component NAME=FILE (components in Python)"
