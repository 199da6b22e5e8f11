"""Strips of pictures on several devices against whole pictures, by hand: every device's part is looked at."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxwan.sharding.space import Space, strip_mesh

# (devices, units): as many to each; the last one has fewer; some have none; one alone
CASES = [(4, 8), (3, 5), (8, 9), (5, 2), (1, 3)]


def picture(dim: int, units: int, pixels: int) -> np.ndarray:
    """No pixel of which is zero."""
    shape = [2, 3, 4, 4, 2]
    shape[dim] = units * pixels
    return np.random.default_rng(0).uniform(1, 2, shape).astype(np.float32)


@pytest.mark.parametrize("pixels", [1, 3])
@pytest.mark.parametrize("dim", [2, 3])
@pytest.mark.parametrize(("devices", "units"), CASES)
def test_strips_join_to_the_picture(devices, units, dim, pixels):
    space, x = Space(strip_mesh(jax.devices()[:devices]), dim, units), picture(dim, units, pixels)
    split = space.split(x)
    widths = {shard.data.shape[dim] for shard in split.addressable_shards}
    assert widths == {-(-units // devices) * pixels} and split.shape == space.padded(x.shape)
    np.testing.assert_array_equal(space.join(split), x)


@pytest.mark.parametrize(("before", "after"), [(1, 1), (0, 1), (2, 0), (0, 0)])
@pytest.mark.parametrize("dim", [2, 3])
@pytest.mark.parametrize(("devices", "units"), CASES)
def test_a_strip_sees_its_neighbours_and_zeros_outside_of_the_picture(devices, units, dim, before, after):
    space, x = Space(strip_mesh(jax.devices()[:devices]), dim, units), picture(dim, units, 2)

    def see(_, strip):
        strip = jnp.where(strip == 0, 7.0, strip)  # what is outside of the picture is no zero before
        return space.with_neighbours(strip, before, after)

    seen = jax.jit(space.spread(see))((), space.split(x))
    width = space.share * 2
    ends = [(0, 0)] * 5
    ends[dim] = (before, devices * width - x.shape[dim] + after)
    padded = np.pad(x, ends)
    for device, strip in enumerate(np.split(np.asarray(seen), devices, axis=dim)):
        expected = padded.take(range(device * width, (device + 1) * width + before + after), axis=dim)
        np.testing.assert_array_equal(strip, expected)


@pytest.mark.parametrize("dim", [2, 3])
@pytest.mark.parametrize(("devices", "units"), CASES)
def test_gathered_is_the_whole_picture_on_every_device(devices, units, dim):
    space, x = Space(strip_mesh(jax.devices()[:devices]), dim, units), picture(dim, units, 2)
    gathered = jax.jit(space.spread(lambda _, strip: space.gather(strip)))((), space.split(x))
    for whole in np.split(np.asarray(gathered), devices, axis=dim):
        np.testing.assert_array_equal(whole, x)


def test_a_function_that_reads_no_neighbours_sends_nothing():
    space = Space(strip_mesh(jax.devices()[:3]), 3, 5)
    program = jax.jit(space.spread(lambda whole, strip: jnp.tanh(strip) * whole))
    text = program.lower(jnp.float32(2), space.split(picture(3, 5, 1))).compile().as_text()
    assert "tanh" in text and not any(word in text for word in ("permute", "gather(", "reduce("))
