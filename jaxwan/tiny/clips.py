"""Clips of coloured shapes that move over a background, painted on the device: the bundled model's training data.

`place` turns attributes and a key into a scene (positions, colours), `paint` a scene into frames; both are pure and
can be compiled and mapped over batches. Positions are pixels, x to the right and y down from the frame's corner.
"""

from math import cos, pi, sin, sqrt
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from jaxwan.tiny.attributes import BACKGROUNDS, MOTIONS, SHAPES, SIZES, SPEEDS, Attributes, Thing, palette

NUM_FRAMES, HEIGHT, WIDTH = 17, 64, 96
SMALLEST, LARGEST, GROWTH = 18.0, 30.0, 1.6  # widths in pixels; least ratio of what grows or shrinks
MARGIN = 1.0  # pixels between an object and the frame's border, at least
JITTER = 0.03  # of an object's colour, in each channel, and of the background's brightness
TRIES = 12  # places tried for two objects; the one with the widest gap between them is taken

_STAR = 0.5 / sin(0.4 * pi)  # from the centre to a tip, in widths
_STAR_INNER = 0.45  # of that, to a corner between two tips

# How far each shape reaches from its centre, in widths: to either side, up, down.
_REACH = {
    "circle": (0.5, 0.5, 0.5),
    "square": (0.5, 0.5, 0.5),
    "triangle": (0.5, 1 / sqrt(3), 0.5 / sqrt(3)),  # equilateral, about its centroid
    "star": (0.5, _STAR, _STAR * cos(0.2 * pi)),
}


class Body(NamedTuple):
    """An object in numbers: its width at the clip's start and end, its centre's start and travel as (x, y)."""

    shape: Int[Array, ""]
    colour: Float[Array, " 3"]
    widths: Float[Array, " 2"]
    start: Float[Array, " 2"]
    travel: Float[Array, " 2"]

    def at(self, time: Float[Array, ""]) -> tuple[Float[Array, " 2"], Float[Array, ""]]:
        """Centre and width at a time between 0, the first frame, and 1, the last."""
        return self.start + time * self.travel, self.widths[0] + time * (self.widths[1] - self.widths[0])


class Scene(NamedTuple):
    """A clip in numbers. The background runs from `ends[0]` to `ends[1]` along the unit vector `direction`."""

    first: Body
    second: Body
    two: Bool[Array, ""]
    ends: Float[Array, "2 3"]
    direction: Float[Array, " 2"]


def make_clip(
    attributes: Attributes, key: PRNGKeyArray, num_frames: int = NUM_FRAMES
) -> Float[Array, "{num_frames} 64 96 3"]:
    """Frames in [0, 1] of a clip that shows the attributes; what they leave open is drawn from the key."""
    return paint(place(attributes, key), jnp.linspace(0, 1, num_frames))


def place(attributes: Attributes, key: PRNGKeyArray) -> Scene:
    """Choose positions, exact widths, speeds and colours."""
    chances = jax.random.uniform(key, (TRIES * 16 + 3,))  # at once: every draw of its own is slow to compile
    tries, shades = chances[3:].reshape(TRIES, 2, 8), chances[:3]
    pairs = jax.vmap(lambda c: (_place(attributes.first, c[0]), _place(attributes.second, c[1])))(tries)
    best = jnp.argmax(jax.vmap(_gap)(*pairs)) * attributes.two  # one object alone takes the first place
    first, second = jax.tree.map(lambda x: x[best], pairs)
    ends, direction = _background(attributes, shades)
    return Scene(first, second, jnp.asarray(attributes.two), ends, direction)


def paint(scene: Scene, times: Float[Array, " f"]) -> Float[Array, "f 64 96 3"]:
    """Frames in [0, 1] at times between 0 and 1, edges softened over one pixel; `first` lies in front."""
    second = jax.vmap(lambda t: coverage(scene.second, t))(times) * scene.two
    first = jax.vmap(lambda t: coverage(scene.first, t))(times)
    x, y = _pixels()
    # -1 to 1 between the corners that lie farthest apart along the direction
    along = (x - WIDTH / 2) * scene.direction[0] + (y - HEIGHT / 2) * scene.direction[1]
    along = along / (WIDTH / 2 * abs(scene.direction[0]) + HEIGHT / 2 * abs(scene.direction[1]))
    frames = scene.ends[0] + (0.5 + 0.5 * along)[..., None] * (scene.ends[1] - scene.ends[0])
    for body, cover in ((scene.second, second), (scene.first, first)):
        frames = frames + cover[..., None] * (body.colour - frames)
    return frames


def coverage(body: Body, time: Float[Array, ""]) -> Float[Array, "64 96"]:
    """How much of each pixel the body covers, 0 to 1."""
    (cx, cy), width = body.at(time)
    x, y = _pixels()
    return jnp.clip(0.5 - distance(body.shape, (x - cx) / width, (y - cy) / width) * width, 0, 1)


def distance(shape: Int[Array, ""], x: Float[Array, "*p"], y: Float[Array, "*p"]) -> Float[Array, "*p"]:
    """Signed distance to the edge of a shape of width 1, negative inside; outside a corner it is an underestimate."""
    x, radius = abs(x), jnp.hypot(x, y)  # every shape is its own mirror image
    square = jnp.maximum(x, abs(y)) - 0.5
    triangle = jnp.maximum(y, sqrt(0.75) * x - 0.5 * y) - 0.5 / sqrt(3)
    # the circles end the tips, which two edges alone would let fade out over more than a pixel
    shapes = {
        "circle": radius - 0.5,
        "square": square,
        "triangle": jnp.maximum(triangle, radius - 1 / sqrt(3)),
        "star": jnp.maximum(_star_distance(x, y), radius - _STAR),
    }
    return jnp.select([shape == SHAPES.index(name) for name in shapes], list(shapes.values()))


def _star_distance(x: Float[Array, "*p"], y: Float[Array, "*p"]) -> Float[Array, "*p"]:
    """Folded at two of its axes until one edge is left, from the upper tip to the corner on its right."""
    y = -y
    for angle in (0.6 * pi, 0.2 * pi):  # clockwise from the upper tip
        beyond = jnp.maximum(x * cos(angle) - y * sin(angle), 0)
        x, y = x - 2 * beyond * cos(angle), y + 2 * beyond * sin(angle)
    inner = _STAR_INNER * _STAR
    edge = (inner * sin(0.2 * pi), inner * cos(0.2 * pi) - _STAR)
    length = sqrt(edge[0] ** 2 + edge[1] ** 2)
    return ((y - _STAR) * edge[0] - abs(x) * edge[1]) / length


def _pixels() -> tuple[Float[Array, "64 96"], Float[Array, "64 96"]]:
    """x and y of the pixels' centres."""
    y, x = jnp.mgrid[:HEIGHT, :WIDTH]
    return x + 0.5, y + 0.5


# Placing. `chance` is uniform in [0, 1).


def _place(thing: Thing, chance: Float[Array, " 8"]) -> Body:
    """Anywhere that keeps the body inside the frame all the time."""
    way = jnp.array(list(MOTIONS.values()), jnp.float32)[thing.motion]
    sides = jnp.array([WIDTH, HEIGHT], jnp.float32)
    travel = way[:2] * sides * _between(chance[0], jnp.array(list(SPEEDS.values()))[thing.speed])
    widths = _widths(thing, way[2], chance[1:3])
    side, up, down = jnp.array([_REACH[name] for name in SHAPES])[thing.shape] * widths.max()
    low = jnp.stack([side, up]) + MARGIN - jnp.minimum(travel, 0)
    high = sides - jnp.stack([side, down]) - MARGIN - jnp.maximum(travel, 0)
    start = low + chance[3:5] * (high - low)
    colour = jnp.asarray(palette("colour"))[thing.colour] + JITTER * (2 * chance[5:] - 1)
    return Body(jnp.asarray(thing.shape), jnp.clip(colour, 0, 1), widths, start, travel)


def _widths(thing: Thing, growth: Float[Array, ""], chance: Float[Array, " 2"]) -> Float[Array, " 2"]:
    """Width at the start and at the end."""
    constant = _between(chance[0], jnp.array(list(SIZES.values()))[thing.size])
    small = _between(chance[0], jnp.array([SMALLEST, LARGEST / GROWTH]))
    large = _between(chance[1], jnp.stack([GROWTH * small, jnp.array(LARGEST)]))
    changing = jnp.where(growth > 0, jnp.stack([small, large]), jnp.stack([large, small]))
    return jnp.where(growth == 0, constant, changing)


def _gap(first: Body, second: Body) -> Float[Array, ""]:
    """Least distance between two bodies' circumscribed circles over the clip; negative where they overlap."""
    (ours, our_widths), (theirs, their_widths) = (jax.vmap(b.at)(jnp.linspace(0, 1, 9)) for b in (first, second))
    return (jnp.linalg.norm(ours - theirs, axis=-1) - 0.6 * (our_widths + their_widths)).min()


def _background(attributes: Attributes, chance: Float[Array, " 3"]) -> tuple[Float[Array, "2 3"], Float[Array, " 2"]]:
    """The colours at both ends and the direction from one to the other; a plain one has two equal ends."""
    plain, dark, light = jnp.array(list(BACKGROUNDS.values()))[attributes.background]
    strength = attributes.graded * (0.6 + 0.4 * chance[0])
    ends = plain + strength * (jnp.stack([dark, light]) - plain)
    shift = JITTER * (2 * chance[1] - 1)  # of the brightness alone: gray stays gray
    turn = 2 * pi * chance[2]
    return jnp.clip(ends + shift, 0, 1), jnp.stack([jnp.cos(turn), jnp.sin(turn)])


def _between(chance: Float[Array, ""], ends: Float[Array, " 2"]) -> Float[Array, ""]:
    return ends[0] + chance * (ends[1] - ends[0])
