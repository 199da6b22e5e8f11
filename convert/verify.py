"""Whether checkpoints hold the same numbers, whatever their layouts, and whether one is as it was written."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxwan.convert.files import TensorFiles
from jaxwan.convert.load import OnBytes
from jaxwan.convert.rules import CheckpointError, Rule, Target, place_all, some

SUMS = "SHA256SUMS"  # in a folder that was converted
_AT_ONCE = 2**24  # numbers that are compared at once, bytes of a file that are read at once
_Place = tuple[str, int | None]  # parameter and layer

Component = tuple[TensorFiles, Sequence[Rule]]  # and the rules that read them


# Two checkpoints


class Difference(NamedTuple):
    """A tensor that is not the same; largest: of |a - b|, None where shapes differ or one is not a number."""

    component: str
    a: str  # its names
    b: str
    told: str
    largest: float | None = None


class Comparison(NamedTuple):
    """What two checkpoints have in common, and what not."""

    equal: int
    different: list[Difference]
    only_a: list[str]  # "component: name"
    only_b: list[str]

    @property
    def same(self) -> bool:
        """Whether all tensors that are read are in both and the same."""
        return self.equal > 0 and not (self.different or self.only_a or self.only_b)


def count_compared(a: Mapping[str, Component], b: Mapping[str, Component]) -> int:
    """Bytes that `compare` reads."""
    both = [parts[name] for name in a.keys() & b.keys() for parts in (a, b)]
    return sum(files.num_bytes(key) for files, rules in both for key in place_all(files.shapes, rules))


def compare(
    a: Mapping[str, Component], b: Mapping[str, Component], tolerance: float | None = None,
    progress: OnBytes | None = None,
) -> Comparison:  # fmt: skip
    """Compare tensor by tensor, by the parameters that they are; two of them are in memory.

    tolerance: by how much a number may differ, as a share of the tensor's largest in `a`; None: not at all. Dtypes may
    differ where the numbers do not.
    """
    equal, different, only_a, only_b = 0, [], [], []
    for name in [*a, *(name for name in b if name not in a)]:
        if name not in a or name not in b:
            (only_a if name in a else only_b).append(name)
            continue
        (files_a, rules_a), (files_b, rules_b) = a[name], b[name]
        places_b = {_place(into): (key, into) for key, into in place_all(files_b.shapes, rules_b).items()}
        for key, into in place_all(files_a.shapes, rules_a).items():
            if _place(into) not in places_b:
                only_a.append(f"{name}: {key}")
                continue
            other, from_b = places_b.pop(_place(into))
            x = into.transform.apply(files_a.read(key))
            y = from_b.transform.apply(files_b.read(other))
            told, largest = _differing(x, y, tolerance)
            if progress is not None:
                progress(files_a.num_bytes(key) + files_b.num_bytes(other))
            if told is None:
                equal += 1
            else:
                different.append(Difference(name, key, other, told, largest))
        only_b += [f"{name}: {key}" for key, _ in places_b.values()]
    return Comparison(equal, different, only_a, only_b)


def _place(into: Target) -> _Place:
    return into.path, into.layer


def _differing(a: np.ndarray, b: np.ndarray, tolerance: float | None) -> tuple[str | None, float | None]:
    """In words by what two tensors differ (None: by nothing), and the largest difference."""
    if a.shape != b.shape:
        return f"{a.shape} and {b.shape}", None
    if a.dtype == b.dtype and all(np.array_equal(_bits(x), _bits(y)) for x, y in _blocks(a, b)):
        return None, None
    count, largest, scale = 0, 0.0, 0.0
    with np.errstate(invalid="ignore"):
        for x, y in _blocks(a, b):
            x, y = x.astype(np.float32), y.astype(np.float32)
            unequal = ~((x == y) | (np.isnan(x) & np.isnan(y)))
            count += int(unequal.sum())
            largest = float(np.maximum(largest, np.abs(x[unequal] - y[unequal]).max(initial=0)))
            scale = float(np.maximum(scale, np.abs(x).max(initial=0)))
    if count == 0 or (tolerance is not None and largest <= tolerance * scale):
        return None, None
    if not np.isfinite(largest):
        return f"{count:,} of {a.size:,} numbers, some of them infinite or none", None
    share = f", {largest / scale:.2g} of the largest" if scale else ""
    return f"{count:,} of {a.size:,} numbers, by {largest:.3g} at most{share}", largest


def _bits(x: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(x).view(np.uint8)


def _blocks(*arrays: np.ndarray) -> Iterator[tuple[np.ndarray, ...]]:
    """Arrays of one shape, in parts of their first axis that are not too large to have several copies of."""
    rows = np.atleast_1d(arrays[0]).shape[0]
    step = max(1, _AT_ONCE * rows // max(1, arrays[0].size))
    for start in range(0, rows, step):
        yield tuple(np.atleast_1d(x)[start : start + step] for x in arrays)


# One checkpoint


def read_sums(folder: Path) -> dict[str, str]:
    """File -> its sha256 when it was written. Raises CheckpointError for a list that is none."""
    path = folder / SUMS
    lines = [line.partition("  ") for line in path.read_text(encoding="utf-8").splitlines()]
    if any(len(digest) != 64 or not name or ".." in Path(name).parts or Path(name).is_absolute()
           for digest, _, name in lines):  # fmt: skip
        raise CheckpointError(f"{path} is no list of checksums as sha256sum writes it")
    return {name: digest for digest, _, name in lines}


def check_sums(folder: Path, progress: OnBytes | None = None) -> int:
    """How many files are as they were written. Raises CheckpointError that names those that are not."""
    sums = read_sums(folder)
    missing = [name for name in sums if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(f"{folder} lacks {some(missing)}, which {SUMS} names")
    wrong = [name for name, digest in sums.items() if _sha256(folder / name, progress) != digest]
    if wrong:
        raise CheckpointError(f"{folder} has other bytes than were written in {some(wrong)}: it is damaged or changed")
    return len(sums)


def _sha256(path: Path, progress: OnBytes | None) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while data := file.read(_AT_ONCE):
            digest.update(data)
            if progress is not None:
                progress(len(data))
    return digest.hexdigest()


def check_finite(files: TensorFiles, keys: Iterable[str], *, what: str, progress: OnBytes | None = None) -> None:
    """Raises CheckpointError that names tensors with numbers that are infinite or none."""
    wrong = []
    for key in keys:
        tensor: Any = files.read(key)
        if not all(np.isfinite(block.astype(np.float32)).all() for (block,) in _blocks(tensor)):
            wrong.append(key)
        if progress is not None:
            progress(files.num_bytes(key))
    if wrong:
        raise CheckpointError(f"{what} has NaN or Inf in {len(wrong)} tensors ({some(wrong)})")
