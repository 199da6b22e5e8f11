"""Reads colour, shape, motion and background off a clip by classical image analysis: the judge of generated clips.

It sees frames and nothing else. What it cannot read is None, and counts as wrong.
"""

from functools import cache
from math import sqrt
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int
from numpy.lib.stride_tricks import sliding_window_view

from jaxwan.tiny.attributes import BACKGROUNDS, COLOURS, MOTIONS, SHAPES, palette
from jaxwan.tiny.clips import distance

Frames = Float[np.ndarray, "f h w 3"]

RING = 3  # pixels of border that tell the background
FAR = 0.30  # RGB distance beyond which a colour is none of the palette's
CONTRAST = 0.20  # least RGB distance between object and background
LEAST_AREA, MOST_AREA = 40, 0.3  # of an object: pixels, and share of the frame
HALO = 4  # pixels around it that may still be part of it
TRAVEL = 0.125  # of the frame's side: half the least travel in the data
RATIO = 1.6**0.5  # of widths at the end and the start: the root of the least growth in the data
STRAIGHT = 3.0  # pixels that a path may leave its straight line, root mean square
GRID, REACH = 41, 1.15  # aligned shapes: points a side, and half the side in units of the area's root
BLURS = (0.0, 0.05, 0.10, 0.15, 0.20)  # of the templates, in the same unit
LIKENESS = 0.80  # least likeness of a shape and its template, where 1 is equal


class Reading(NamedTuple):
    """Names of `attributes.VALUES`, None where unreadable."""

    colour: str | None
    shape: str | None
    motion: str | None
    background: str | None


class _Object(NamedTuple):
    """The object of a clip, in the frames that show it."""

    colour: Float[np.ndarray, " 3"]
    cover: Float[np.ndarray, "f h w"]  # share of each pixel, 0 to 1
    seen: Bool[np.ndarray, " f"]
    centres: Float[np.ndarray, "f 2"]  # x, y in pixels
    areas: Float[np.ndarray, " f"]


def read(frames: Frames) -> Reading:
    """Attributes of a clip with one object, from frames in [0, 1]."""
    frames = np.asarray(frames, np.float32)
    background = _nearest(np.median(_ring(frames), axis=(0, 1)), "background")
    found = _find(frames, _background_plane(frames))
    if found is None:
        return Reading(None, None, None, background)
    return Reading(_nearest(found.colour, "colour"), _shape(found), _motion(found), background)


# Background


def _ring(frames: Frames) -> Float[np.ndarray, "f n 3"]:
    """Pixels of the border."""
    return frames[:, _is_ring(frames.shape[1:3])]


def _is_ring(size: tuple[int, ...]) -> Bool[np.ndarray, "h w"]:
    ring = np.ones(size, bool)
    ring[RING:-RING, RING:-RING] = False
    return ring


def _background_plane(frames: Frames) -> Float[np.ndarray, "h w 3"]:
    """The background behind the object, continued linearly from the border; what lies on the border is left out."""
    height, width = frames.shape[1:3]
    y, x = np.mgrid[:height, :width].astype(np.float32)
    terms = np.stack([np.ones_like(x), x / width - 0.5, y / height - 0.5], axis=-1)
    ring = _is_ring((height, width))
    basis, pixels = terms[ring], np.median(frames, axis=0)[ring]
    kept = np.linalg.norm(pixels - np.median(pixels, axis=0), axis=-1) < FAR
    plane = np.linalg.lstsq(basis[kept], pixels[kept], rcond=None)[0] if kept.any() else np.zeros((3, 3))
    return (terms @ plane).astype(np.float32)


def _nearest(colour: Float[np.ndarray, " 3"], name: str) -> str | None:
    """The colour or background of the palette that lies nearest."""
    away = np.linalg.norm(palette(name) - colour, axis=-1)
    names = list(COLOURS if name == "colour" else BACKGROUNDS)
    return names[int(away.argmin())] if away.min() < FAR else None


# Object


def _find(frames: Frames, plane: Float[np.ndarray, "h w 3"]) -> _Object | None:
    """The largest connected piece, in each frame, of what stands out from the background."""
    rest = frames - plane
    away = np.linalg.norm(rest, axis=-1)
    level = np.quantile(away, 0.99)  # the smallest object fills twice the last hundredth of the pixels
    if level < CONTRAST:
        return None
    piece = _largest_piece(away > level / 2)
    filled = piece.sum((1, 2))
    seen = (filled >= LEAST_AREA) & (filled <= MOST_AREA * away[0].size)
    core = piece & (away > 0.75 * level) & seen[:, None, None]
    if not core.any():
        return None
    colour = np.median(frames[core], axis=0)
    contrast = colour - plane
    cover = (rest * contrast).sum(-1) / np.maximum((contrast**2).sum(-1), CONTRAST**2)
    cover = np.clip(cover, 0, 1) * _widened(piece)
    return _Object(colour, cover, seen, *_moments(cover))


def _moments(cover: Float[np.ndarray, "f h w"]) -> tuple[Float[np.ndarray, "f 2"], Float[np.ndarray, " f"]]:
    """Centroids (x, y) and areas."""
    y, x = np.mgrid[: cover.shape[1], : cover.shape[2]]
    areas = cover.sum((1, 2))
    sums = np.stack([(cover * x).sum((1, 2)), (cover * y).sum((1, 2))], axis=-1)
    return sums / np.maximum(areas, 1e-6)[:, None], areas


def _largest_piece(mask: Bool[np.ndarray, "f h w"]) -> Bool[np.ndarray, "f h w"]:
    """The largest piece of each frame whose pixels touch by their sides."""
    frames, height, width = mask.shape
    number = np.where(mask, np.arange(1, height * width + 1, dtype=np.int32).reshape(height, width), 0)
    while True:  # every pixel takes the largest number that it sees along its row and column, until none changes
        spread = number
        for axis in (1, 2):
            for flip in (slice(None), slice(None, None, -1)):
                spread = _spread(spread, mask, axis, flip)
        if np.array_equal(spread, number):
            break
        number = spread
    counts = np.stack([np.bincount(n.ravel(), minlength=height * width + 1) for n in number])
    counts[:, 0] = 0
    return mask & (number == counts.argmax(1)[:, None, None])


def _spread(
    number: Int[np.ndarray, "f h w"], mask: Bool[np.ndarray, "f h w"], axis: int, flip: slice
) -> Int[np.ndarray, "f h w"]:
    """The largest number met so far within each unbroken run of the mask along an axis."""
    number, mask = np.moveaxis(number, axis, -1)[..., flip], np.moveaxis(mask, axis, -1)[..., flip]
    # counted so that numbers of a later run outweigh those of all earlier ones
    breaks = np.cumsum(~mask, axis=-1, dtype=np.int32) * np.int32(mask[0].size + 1)
    met = np.maximum.accumulate(number + breaks, axis=-1) - breaks
    return np.moveaxis(met[..., flip], -1, axis)


def _widened(mask: Bool[np.ndarray, "f h w"]) -> Bool[np.ndarray, "f h w"]:
    """HALO pixels more on each side: soft edges lie there."""
    for axis in (1, 2):
        padding = [(HALO, HALO) if i == axis else (0, 0) for i in range(3)]
        mask = np.asarray(sliding_window_view(np.pad(mask, padding), 2 * HALO + 1, axis).any(-1))
    return mask


# Motion


def _motion(found: _Object) -> str | None:
    """From straight lines through the centroid's path and the root of the area; one kind of change alone is read."""
    if found.seen.mean() < 0.9:
        return None
    time = np.linspace(-0.5, 0.5, len(found.seen))[found.seen]
    basis = np.stack([np.ones_like(time), time], axis=-1)
    path = found.centres[found.seen]
    line = np.linalg.lstsq(basis, path, rcond=None)[0]
    if np.sqrt(((path - basis @ line) ** 2).sum(-1).mean()) > STRAIGHT:
        return None
    middle, growth = np.linalg.lstsq(basis, np.sqrt(found.areas[found.seen]), rcond=None)[0]
    ratio = (middle + growth / 2) / max(middle - growth / 2, 1e-6)
    travel = line[1] / found.cover.shape[:0:-1]
    way = np.where(np.abs(travel) > TRAVEL, np.sign(travel), 0).astype(int)
    change = (*way.tolist(), int(ratio > RATIO) - int(ratio < 1 / RATIO))
    return next((name for name, motion in MOTIONS.items() if motion == change), None)


# Shape


def _shape(found: _Object) -> str | None:
    """The template that is most like the mean of all frames, aligned by centroid and area."""
    if found.seen.mean() < 0.5:
        return None
    mean = _aligned(found.cover[found.seen], found.centres[found.seen], found.areas[found.seen]).mean(0)
    likeness = [max(_likeness(mean, template) for template in _templates()[name]) for name in SHAPES]
    best = int(np.argmax(likeness))
    return SHAPES[best] if likeness[best] > LIKENESS else None


def _likeness(mean: Float[np.ndarray, "g g"], template: Float[np.ndarray, "g g"]) -> float:
    return 1 - float(((mean - template) ** 2).sum() / (template**2).sum())


def _aligned(
    cover: Float[np.ndarray, "f h w"], centres: Float[np.ndarray, "f 2"], areas: Float[np.ndarray, " f"]
) -> Float[np.ndarray, "f g g"]:
    """Sampled bilinearly on a grid about the centroid that is scaled by the root of the area."""
    steps = np.linspace(-REACH, REACH, GRID) * np.sqrt(areas)[:, None]
    padded = np.pad(cover, ((0, 0), (1, 1), (1, 1)))  # zero outside the frame
    x = np.clip(centres[:, :1] + steps + 1, 0, padded.shape[2] - 1.001)
    y = np.clip(centres[:, 1:] + steps + 1, 0, padded.shape[1] - 1.001)
    column, row = x.astype(int), y.astype(int)
    right, low = (x - column)[:, None, :], (y - row)[:, :, None]
    frame = np.arange(len(cover))[:, None, None]

    def corner(down: int, over: int) -> Float[np.ndarray, "f g g"]:
        return padded[frame, (row + down)[:, :, None], (column + over)[:, None, :]]

    upper = (1 - right) * corner(0, 0) + right * corner(0, 1)
    lower = (1 - right) * corner(1, 0) + right * corner(1, 1)
    return (1 - low) * upper + low * lower


@cache
def _templates() -> dict[str, list[Float[np.ndarray, "g g"]]]:
    """Each shape at several blurs, aligned as clips are."""
    width, size = 60, 140
    y, x = jnp.mgrid[:size, :size] + 0.5 - size / 2
    made = {}
    for index, name in enumerate(SHAPES):
        far = distance(jnp.asarray(index), x / width, y / width) * width
        sharp = np.clip(0.5 - np.asarray(far), 0, 1)
        blurred = [_blurred(sharp, blur * sqrt(sharp.sum())) for blur in BLURS]
        made[name] = [_aligned(b[None], *_moments(b[None]))[0] for b in blurred]
    return made


def _blurred(image: Float[np.ndarray, "h w"], sigma: float) -> Float[np.ndarray, "h w"]:
    """By a Gaussian of `sigma` pixels."""
    if not sigma:
        return image
    reach = int(3 * sigma) + 1
    weights = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    for axis in (0, 1):
        image = np.apply_along_axis(np.convolve, axis, image, weights / weights.sum(), "same")
    return image
