"""Do clips show what their captions say? The captions that are asked for, the reader's own check, and the score."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from math import sqrt
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from jaxwan.tiny.attributes import READ, VALUES, combinations, draw_attributes, names
from jaxwan.tiny.clips import make_clip
from jaxwan.tiny.grammar import captions
from jaxwan.tiny.reader import Reading, read

RENDERED, RECONSTRUCTED = 0.99, 0.98  # least share that the reader must read right of each attribute
ALL = "all four"
COLUMNS = (*READ, ALL)


class Case(NamedTuple):
    """A caption to generate from: the row of `attributes.combinations` that it describes, and the noise's seed."""

    caption: str
    row: Int[np.ndarray, " 4"]
    seed: int
    held_out: bool


class Share(NamedTuple):
    """right of total, and the ends of the 95 % interval of right / total."""

    right: int
    total: int
    low: float
    high: float

    def __str__(self) -> str:
        return f"{_percent(self.right / self.total)} ({100 * self.low:.1f}-{100 * self.high:.1f})"


def make_cases(count: int, seed: int = 0) -> list[Case]:
    """Captions of one object, in turn seen in training and held out, always the same ones for a seed.

    Both kinds walk in random order through their combinations, each of which comes once before one comes twice.
    """
    if count < 2:
        raise ValueError(f"{count} captions are asked for, at least 2 are needed: one seen, one held out")
    rng = np.random.default_rng(seed)
    orders = [_walk(combinations(held_out), (count + 1) // 2, rng) for held_out in (False, True)]
    rows = np.stack(orders, axis=1).reshape(-1, 4)[:count]
    keys = jax.random.split(jax.random.key(seed), count)
    texts = captions(jax.tree.map(np.asarray, _draw_alone(keys, rows)), range(seed, seed + count), plain=True)
    return [Case(text, row, seed + i, bool(i % 2)) for i, (text, row) in enumerate(zip(texts, rows, strict=True))]


def rendered_truth(count: int, seed: int = 0) -> Iterator[tuple[Int[np.ndarray, " 4"], Float[np.ndarray, "f h w 3"]]]:
    """(row, frames) of clips that show one object, of all combinations alike."""
    rows = _walk(np.concatenate([combinations(False), combinations(True)]), count, np.random.default_rng(seed))
    for key, row in zip(jax.random.split(jax.random.key(seed), count), rows, strict=True):
        yield row, np.asarray(_render(key, row))


_draw_alone = jax.jit(jax.vmap(partial(draw_attributes, two_objects=0.0)))


@jax.jit
def _render(key: PRNGKeyArray, row: Int[Array, " 4"]) -> Float[Array, "f h w 3"]:
    drawing, placing = jax.random.split(key)
    return make_clip(draw_attributes(drawing, row, two_objects=0.0), placing)


def check_reader(
    count: int, least: float = RENDERED, *, through: Callable | None = None, seed: int = 0
) -> dict[str, float]:
    """Share of each attribute that the reader reads right off rendered clips.

    through: what is done to the frames first, such as encoding and decoding them. Raises ValueError when a share is
    below `least`: what such a reader says of generated clips would mean nothing.
    """
    truth = rendered_truth(count, seed)
    pairs = [(row, read(frames if through is None else through(frames))) for row, frames in truth]
    rows, readings = zip(*pairs, strict=True)
    shares = {name: float(column.mean()) for name, column in _marked(readings, rows).items() if name != ALL}
    worst = min(shares, key=lambda name: shares[name])
    if shares[worst] < least:
        raise ValueError(
            f"the reader reads {_percent(shares[worst])} of {worst} right off {count} clips whose truth is known, "
            f"{_percent(least)} are needed: nothing is scored"
        )
    return shares


def score(cases: Sequence[Case], readings: Sequence[Reading]) -> dict[str, dict[str, Share]]:
    """Shares read as the caption says: of all cases, of the seen and of the held-out ones, by attribute."""
    marks = _marked(readings, [case.row for case in cases])
    held_out = np.array([case.held_out for case in cases])
    parts = {"all": np.ones(len(cases), bool), "seen": ~held_out, "held out": held_out}
    return {part: {name: _share(column[chosen]) for name, column in marks.items()} for part, chosen in parts.items()}


def score_controls(
    cases: Sequence[Case], readings: Sequence[Reading], seed: int = 0
) -> dict[str, dict[str, Share | float]]:
    """What the same clips score against captions that are not theirs: a model that obeys none scores as much.

    "all differ": captions whose four attributes all differ. "random": captions drawn from all combinations, with
    "expected", the share that chance gives to clips that can all be read.
    """
    rng = np.random.default_rng(seed)
    table = np.concatenate([combinations(False), combinations(True)])
    differing = [_draw(rng, table[(table != case.row).all(axis=1)]) for case in cases]
    chance = [_draw(rng, table) for _ in cases]
    expected: dict[str, Share | float] = {name: 1 / len(VALUES[name]) for name in READ}
    expected[ALL] = 1 / len(table)
    return {
        "all differ": {name: _share(column) for name, column in _marked(readings, differing).items()},
        "random": {name: _share(column) for name, column in _marked(readings, chance).items()},
        "expected": expected,
    }


def marks_of(case: Case, reading: Reading) -> dict[str, bool]:
    """Whether each attribute was read as the caption says."""
    return {name: getattr(reading, name) == value for name, value in names(case.row).items()}


def interval(right: int, total: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share: 9 right of 10 lie between 0.596 and 0.982."""
    z = 1.959964
    share, scale = right / total, 1 + z * z / total
    middle = (share + z * z / (2 * total)) / scale
    half = z / scale * sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    return max(middle - half, 0.0), min(middle + half, 1.0)


def _marked(readings: Sequence[Reading], rows: Iterable[Any]) -> dict[str, Bool[np.ndarray, " n"]]:
    """Which readings fit the rows, by attribute, and in all four."""
    wanted = [names(row) for row in rows]
    marks = {
        name: np.array([getattr(r, name) == w[name] for r, w in zip(readings, wanted, strict=True)]) for name in READ
    }
    return marks | {ALL: np.all(list(marks.values()), axis=0)}


def _share(marks: Bool[np.ndarray, " n"]) -> Share:
    return Share(int(marks.sum()), len(marks), *interval(int(marks.sum()), len(marks)))


def _walk(table: Int[np.ndarray, "n 4"], count: int, rng: np.random.Generator) -> Int[np.ndarray, "m 4"]:
    """`count` rows in random order, each once before one comes twice."""
    rounds = -(-count // len(table))
    return np.concatenate([rng.permutation(table) for _ in range(rounds)])[:count]


def _draw(rng: np.random.Generator, table: Int[np.ndarray, "n 4"]) -> Int[np.ndarray, " 4"]:
    return table[rng.integers(len(table))]


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
