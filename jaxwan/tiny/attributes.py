"""What a clip of the bundled model's data shows: the values of each attribute, the pairs held out of training, and
how attributes are drawn."""

from functools import cache
from itertools import product
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

RGB = tuple[float, float, float]

COLOURS: dict[str, RGB] = {
    "red": (0.90, 0.12, 0.12),
    "green": (0.10, 0.72, 0.22),
    "blue": (0.12, 0.25, 0.92),
    "yellow": (0.97, 0.88, 0.12),
    "orange": (0.98, 0.52, 0.06),
    "purple": (0.62, 0.16, 0.80),
    "white": (0.97, 0.97, 0.97),
}
SHAPES = ("circle", "square", "triangle", "star")
# Direction of travel (x to the right, y down), and growth of the width: 1 grows, -1 shrinks.
MOTIONS: dict[str, tuple[int, int, int]] = {
    "left": (-1, 0, 0),
    "right": (1, 0, 0),
    "up": (0, -1, 0),
    "down": (0, 1, 0),
    "up-right": (1, -1, 0),
    "down-left": (-1, 1, 0),
    "growing": (0, 0, 1),
    "shrinking": (0, 0, -1),
    "still": (0, 0, 0),
}
# The plain colour, and the darkest and lightest one that a graded background runs between.
BACKGROUNDS: dict[str, tuple[RGB, RGB, RGB]] = {
    "black": ((0.04, 0.04, 0.04), (0.0, 0.0, 0.0), (0.20, 0.20, 0.20)),
    "white": ((0.95, 0.95, 0.95), (0.80, 0.80, 0.80), (1.0, 1.0, 1.0)),
    "gray": ((0.50, 0.50, 0.50), (0.38, 0.38, 0.38), (0.62, 0.62, 0.62)),
    "blue": ((0.15, 0.30, 0.85), (0.08, 0.17, 0.62), (0.30, 0.46, 0.98)),
    "green": ((0.18, 0.55, 0.25), (0.10, 0.38, 0.16), (0.30, 0.72, 0.38)),
}
SIZES: dict[str, tuple[float, float]] = {"small": (18.0, 22.0), "medium": (22.0, 26.0), "large": (26.0, 30.0)}  # px
SPEEDS: dict[str, tuple[float, float]] = {  # travel through the clip, in sides of the frame
    "slow": (0.25, 0.32),
    "medium": (0.32, 0.40),
    "fast": (0.40, 0.48),
}

READ = ("colour", "shape", "motion", "background")  # what a caption names and a clip is judged by
VALUES: dict[str, tuple[str, ...]] = dict(
    zip(READ, (tuple(COLOURS), SHAPES, tuple(MOTIONS), tuple(BACKGROUNDS)), strict=True)
)

# No clip of the training data has such an object; each value is seen with all but one of the others.
HELD_OUT_COLOUR_SHAPE = (("green", "square"), ("yellow", "triangle"), ("purple", "circle"))
HELD_OUT_SHAPE_MOTION = (("circle", "up"), ("square", "growing"), ("triangle", "left"), ("star", "down-left"))

TWO_OBJECTS = 0.12  # share of training clips
GRADED = 0.5  # share of clips whose background is graded


class Thing(NamedTuple):
    """One object, as indices into COLOURS, SHAPES, MOTIONS, SIZES and SPEEDS.

    size counts for nothing in what grows or shrinks, speed for nothing in what does not travel.
    """

    colour: Any
    shape: Any
    motion: Any
    size: Any
    speed: Any


class Attributes(NamedTuple):
    """What a clip shows; `second` is there when `two` is true. Integers and booleans, or batches of them."""

    first: Thing
    second: Thing
    two: Any
    background: Any
    graded: Any


def has_held_out_pair(colour: str, shape: str, motion: str) -> bool:
    """Whether an object is kept out of the training data."""
    return (colour, shape) in HELD_OUT_COLOUR_SHAPE or (shape, motion) in HELD_OUT_SHAPE_MOTION


@cache
def combinations(held_out: bool = False) -> Int[np.ndarray, "n 4"]:
    """Rows (colour, shape, motion, background) of all clips with one object that training sees, or of the others.

    An object never has its background's colour. Training sees 912 rows, 240 are held out.
    """
    rows = [
        tuple(VALUES[name].index(value) for name, value in zip(READ, (colour, shape, motion, background), strict=True))
        for colour, shape, motion, background in product(*VALUES.values())
        if colour != background and has_held_out_pair(colour, shape, motion) == held_out
    ]
    return np.array(rows, np.int32)


def names(row: Any) -> dict[str, str]:
    """Names of the indices of a row of `combinations`: {"colour": "red", …}."""
    return {name: VALUES[name][int(index)] for name, index in zip(READ, row, strict=True)}


def row_of(attributes: Attributes) -> Int[np.ndarray, " 4"]:
    """The row of `combinations` that a clip's first object and background are."""
    first = attributes.first
    return np.array([first.colour, first.shape, first.motion, attributes.background], np.int32)


def draw_attributes(
    key: PRNGKeyArray, row: Int[Array, " 4"] | None = None, *, two_objects: float = TWO_OBJECTS
) -> Attributes:
    """Attributes of a training clip, drawn from a key.

    row: of `combinations` (drawn evenly from the seen ones when not given; for stratified data walk through the
    table). Everything else is drawn; with probability `two_objects` there is a second object, of another colour.
    """
    seen = jnp.asarray(combinations())
    which, second, two, graded, *rest = jax.random.uniform(key, (8,))  # at once: each draw is slow to compile
    if row is None:
        row = seen[_index(which, len(seen))]
    fits = jnp.cumsum((seen[:, 3] == row[3]) & (seen[:, 0] != row[0]))  # how many up to each row
    other = seen[jnp.searchsorted(fits, 1 + _index(second, fits[-1]))]
    has_two = two < two_objects
    sizes = [_index(c, len(SIZES)) * ~has_two for c in rest[:2]]  # two small ones, so that both have room
    speeds = [_index(c, len(SPEEDS)) for c in rest[2:]]
    first, other = (Thing(*things[:3], *looks) for things, *looks in zip((row, other), sizes, speeds, strict=True))
    return Attributes(first, other, has_two, row[3], graded < GRADED)


def _index(chance: Float[Array, ""], count: int | Int[Array, ""]) -> Int[Array, ""]:
    """A whole number below `count` from one in [0, 1); the minimum guards against rounding up."""
    return jnp.minimum((chance * count).astype(jnp.int32), count - 1)


def palette(name: str) -> Float[np.ndarray, "n 3"]:
    """RGB of every value of "colour" or "background", in order."""
    if name == "colour":
        return np.array(list(COLOURS.values()), np.float32)
    return np.array([plain for plain, _, _ in BACKGROUNDS.values()], np.float32)
