"""The renderer: what a clip promises, measured on its frames."""

from math import pi, sin, sqrt

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxwan.tiny import attributes as att
from jaxwan.tiny import clips

COUNT = 64
MIDDLE = jnp.asarray(0.5)


@pytest.fixture(scope="module")
def single():
    """(attributes, scenes, cover of the object [B, F, H, W], frames) of clips with one object, of all combinations."""
    rows = np.concatenate([att.combinations(False), att.combinations(True)])
    rows = np.random.default_rng(0).permutation(rows)[:COUNT]

    @jax.jit
    @jax.vmap
    def make(key, row):
        attributes = att.draw_attributes(key, row, two_objects=0.0)
        scene = clips.place(attributes, key)
        times = jnp.linspace(0, 1, clips.NUM_FRAMES)
        cover = jax.vmap(lambda t: clips.coverage(scene.first, t))(times)
        return attributes, scene, cover, clips.paint(scene, times)

    return jax.tree.map(np.asarray, make(jax.random.split(jax.random.key(5), COUNT), rows))


def centres(cover):
    y, x = np.mgrid[: cover.shape[-2], : cover.shape[-1]]
    return np.stack([(cover * a).sum((-2, -1)) / cover.sum((-2, -1)) for a in (x, y)], axis=-1)


def test_frames_are_float32_in_range_and_the_same_for_the_same_key(single):
    attributes, _, _, frames = single
    assert frames.shape == (COUNT, 17, 64, 96, 3) and frames.dtype == np.float32
    assert frames.min() >= 0 and frames.max() <= 1
    key = jax.random.split(jax.random.key(5), COUNT)[3]
    again = jax.jit(clips.make_clip)(jax.tree.map(lambda x: x[3], attributes), key)
    np.testing.assert_allclose(again, frames[3], atol=1e-5)  # another batch may round otherwise


def test_objects_stay_wholly_inside_and_keep_to_their_widths(single):
    cover = single[2]
    for edge in (cover[..., 0, :], cover[..., -1, :], cover[..., 0], cover[..., -1]):
        assert edge.max() < 1e-4  # no object touches the outermost pixels
    assert (cover.sum((-2, -1)) > 100).all()
    widths = single[1].first.widths
    assert widths.min() >= 18 and widths.max() <= 30
    columns = (cover[:, 0].max(axis=-2) >= 0.5).sum(-1)
    assert abs(columns - widths[:, 0]).max() < 3  # the tips of a star fill no pixel by half


def test_motion_is_as_named_and_large_enough(single):
    attributes, scene, cover, _ = single
    way = np.array(list(att.MOTIONS.values()))[attributes.first.motion]
    travel = (centres(cover)[:, -1] - centres(cover)[:, 0]) / (clips.WIDTH, clips.HEIGHT)
    np.testing.assert_allclose(np.where(way[:, :2] == 0, travel, 0), 0, atol=0.005)
    assert (way[:, :2] * travel)[way[:, :2] != 0].min() > 0.245  # a quarter, within rounding to pixels
    growth = np.log(scene.first.widths[:, 1] / scene.first.widths[:, 0])
    assert (np.sign(growth) == way[:, 2]).all()
    assert abs(growth[growth != 0]).min() >= np.log(1.6) - 1e-5
    areas = cover.sum((-2, -1))
    np.testing.assert_allclose(np.log(areas[:, -1] / areas[:, 0]) / 2, growth, atol=0.03)


@pytest.mark.parametrize(
    ("shape", "area"),
    [("circle", pi / 4), ("square", 1.0), ("triangle", sqrt(3) / 4),
     ("star", 5 * sin(pi / 5) * 0.45 * (0.5 / sin(0.4 * pi)) ** 2)],
)  # fmt: skip
def test_shapes_have_their_area_and_soft_edges(shape, area):
    zero = jnp.zeros(2)
    body = clips.Body(
        jnp.asarray(att.SHAPES.index(shape)), jnp.zeros(3), jnp.array([28.0, 28.0]), jnp.array([40.3, 30.6]), zero
    )
    cover = np.asarray(clips.coverage(body, MIDDLE))
    assert cover.sum() == pytest.approx(area * 28**2, rel=0.02)  # the softening rounds corners off
    soft = ((cover > 0) & (cover < 1)).sum()
    assert 60 < soft < 200  # about one pixel along the whole edge


def test_object_and_background_have_their_colours(single):
    attributes, _, cover, frames = single
    inside, outside = cover == 1, cover == 0
    for i in range(COUNT):
        colour = att.palette("colour")[attributes.first.colour[i]]
        assert abs(frames[i][inside[i]] - colour).max() <= clips.JITTER + 1e-5
        plain, dark, light = np.array(list(att.BACKGROUNDS.values()), np.float32)[attributes.background[i]]
        pixels = frames[i][outside[i]]
        ends = (dark, light) if attributes.graded[i] else (plain, plain)
        assert (pixels >= ends[0] - clips.JITTER - 1e-5).all() and (pixels <= ends[1] + clips.JITTER + 1e-5).all()
        spread = np.ptp(pixels, axis=0).max()
        assert spread > 0.08 if attributes.graded[i] else spread < 1e-5


def test_positions_are_random_where_the_caption_is_silent(single):
    attributes, scene, *_ = single
    still = attributes.first.motion == list(att.MOTIONS).index("still")
    assert np.ptp(scene.first.start[still], axis=0).min() > 15


def test_two_objects_are_both_to_be_seen():
    @jax.jit
    @jax.vmap
    def make(key):
        attributes = att.draw_attributes(key, two_objects=1.0)
        scene = clips.place(attributes, key)
        times = jnp.linspace(0, 1, 5)
        covers = [jax.vmap(lambda t, body=body: clips.coverage(body, t))(times) for body in scene[:2]]
        return attributes, clips.paint(scene, times), jnp.stack(covers, 1)

    attributes, frames, cover = make(jax.random.split(jax.random.key(2), 64))
    cover, frames = np.asarray(cover), np.asarray(frames)  # [B, F, 2, H, W]
    hidden = cover.min(axis=2).sum((-2, -1)) / cover[:, :, 1].sum((-2, -1))
    assert (hidden.max(axis=1) > 0.02).mean() < 0.15  # crossing paths cannot always be kept apart
    assert hidden.mean() < 0.02
    second = (cover[:, :, 1] == 1) & (cover[:, :, 0] == 0)
    for i in range(64):
        colour = att.palette("colour")[attributes.second.colour[i]]
        assert abs(frames[i][second[i]] - colour).max() <= clips.JITTER + 1e-5
