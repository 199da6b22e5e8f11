"""Videos through the VAE with frames split over devices, against one device; and in several calls, against one."""

from collections import Counter
from functools import cache
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from collectives import collectives
from compilation import compiling_quickly
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from oracle import relative_error
from runs import compilations

from jaxwan.config import VAEConfig
from jaxwan.models import video_coder
from jaxwan.models.vae import VAE
from jaxwan.models.video_coder import VideoCoder, to_8_bits
from jaxwan.sharding.space import strip_mesh

# A pixel sees the same numbers on any number of devices, but XLA orders sums, on CPUs those of norms over channels, by
# the size of arrays: rounding of 2^-24 in each of 30 layers. Measured are 5e-7 at most, a wrong halo costs 1e-2.
TOLERANCE = 1e-6

SMALL = dict(
    base_dim=8, z_dim=4, num_res_blocks=1, dim_mult=(1, 2, 2), temperal_downsample=(True, True),
    latents_mean=(0.1, 0.2, -0.3, 0.0), latents_std=(1.3, 0.8, 1.0, 1.1),
)  # fmt: skip
KINDS = {
    "2.1": VAEConfig(**SMALL, scale_factor_spatial=4),
    "2.2": VAEConfig(**SMALL, decoder_base_dim=12, is_residual=True, patch_size=2, in_channels=12, out_channels=12,
                     scale_factor_spatial=8),
}  # fmt: skip
DIRECTIONS = ("encode", "decode")


@pytest.fixture(autouse=True, scope="module")
def split_small_frames():
    """Frames of tests are small, and those of users are not."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(video_coder, "WHOLE", 1)
        yield


def make_coder(kind: str, devices: int = 1, dtype=jnp.float32) -> VideoCoder:
    """With random biases and gains, so that nothing stays zero outside of the picture."""
    graph, state = nnx.split(VAE(KINDS[kind], dtype=dtype, rngs=nnx.Rngs(1)))
    state = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(x.size), x.shape) * (x.ndim < 5), state)
    mesh = strip_mesh(jax.devices()[:devices])
    return VideoCoder(nnx.merge(graph, jax.device_put(state, NamedSharding(mesh, PartitionSpec()))), mesh=mesh)


coder = cache(make_coder)


def video(kind: str, direction: str, size: tuple[int, int], latent_frames: int = 3) -> np.ndarray:
    """Frames or latents to be coded, of so many latent pixels."""
    rng, cfg = np.random.default_rng(0), KINDS[kind]
    if direction == "decode":
        return rng.normal(size=(1, latent_frames, *size, cfg.z_dim)).astype(np.float32)
    pixels = (n * cfg.scale_factor_spatial for n in size)
    return rng.uniform(-1, 1, (1, 4 * latent_frames - 3, *pixels, 3)).astype(np.float32)


@cache
def on_one_device(kind: str, direction: str, size: tuple[int, int]) -> np.ndarray:
    return getattr(coder(kind), direction)(video(kind, direction, size))


def as_uint8(frames: np.ndarray) -> np.ndarray:
    return (frames * 127.5 + 127.5).round().astype(int)


# (latent height and width, devices): rows that do not divide, and columns that run out
IN_CI = [((5, 4), 3), ((2, 5), 8)]
SLOW = [((4, 8), 2), ((5, 7), 2), ((7, 3), 3), ((3, 10), 4), ((9, 9), 4), ((13, 5), 6), ((6, 17), 8), ((1, 1), 8)]


@pytest.mark.parametrize(("size", "devices"), [*IN_CI, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)])
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_frames_split_over_devices_equal_one_device(kind, direction, size, devices):
    actual = getattr(coder(kind, devices), direction)(video(kind, direction, size))
    expected = on_one_device(kind, direction, size)
    error = relative_error(actual, expected)
    print("measured", error)
    assert error < TOLERANCE
    assert expected.std() > 0.3
    if direction == "decode":
        assert 0.001 < (np.abs(expected) == 1).mean()
        assert np.abs(as_uint8(actual) - as_uint8(expected)).max() <= 1


# The compiled programs


def sums_of_pixels(kind: str, direction: str) -> tuple[int, int]:
    """How many convolutions see the pixels on both sides, and on one side only."""
    part = "encoder" if direction == "encode" else "decoder"
    wide = [path for path, leaf in nnx.to_flat_state(coder(kind).state) if leaf.shape[-3:-2] == (3,) and part in path]
    halving = sum(part == "encoder" and "resample" in path for path in wide)
    return len(wide) - halving, halving


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_devices_send_each_other_halos_and_the_pixels_attended_to(kind, direction):
    """By hops between neighbours, both ways for a convolution that sees both sides; and one gather."""
    shape = video(kind, direction, (5, 4)).shape
    both, one = sums_of_pixels(kind, direction)
    for name, program, arguments in coder(kind, 3).programs(direction, shape):
        if not name.startswith("VAE"):
            continue  # frames in 8 bits, of which devices agree on whether any is NaN
        sent = collectives(program.lower(*arguments).compile().as_text())
        onward, back = ("collective-permute", [[0, 1], [1, 2]]), ("collective-permute", [[1, 0], [2, 1]])
        assert Counter(map(str, sent)) == Counter(
            map(str, [("all-gather", [[0, 1, 2]]), *[onward] * both, *[back] * (both + one)])
        )
    assert both > 10 and one == (2 if direction == "encode" else 0)


@pytest.mark.parametrize("devices", [1, 3])
def test_a_second_video_of_the_same_size_compiles_nothing(devices):
    """Nor does the first, once the programs that are listed are there."""
    for direction in DIRECTIONS:
        given = video("2.1", direction, (5, 4))
        for _, program, arguments in coder("2.1", devices).programs(direction, given.shape):
            program.lower(*arguments).compile()
        assert compilations(lambda d=direction, x=given: getattr(coder("2.1", devices), d)(x)) == 0
        assert compilations(lambda d=direction, x=given: getattr(coder("2.1", devices), d)(x / 2)) == 0


# Streams


@pytest.mark.parametrize("devices", [1, 3])
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_video_in_several_calls_has_the_bits_of_one(kind, direction, devices):
    """However it is cut, and whatever other streams do in between."""
    whole = video(kind, direction, (5, 4), latent_frames=4)
    step = 4 if direction == "encode" else 1
    expected = getattr(coder(kind, devices), direction)(whole)
    cuts = [(0, 1, 1 + 2 * step, 1 + 3 * step), (0, 1 + step, 1 + 3 * step), (0, 1 + 3 * step)]
    streams = [getattr(coder(kind, devices), f"{direction}_stream")() for _ in cuts]
    made = [[] for _ in cuts]
    for call in range(3):
        for stream, at, parts in zip(streams, cuts, made, strict=True):
            if call + 1 < len(at):
                parts.append(stream(whole[:, at[call] : at[call + 1]]))
    for parts in made:
        np.testing.assert_array_equal(np.concatenate(parts, axis=1), expected)


@pytest.fixture
def float64(monkeypatch):
    """Everything in float64, with what the VAE computes in float32 whatever its dtype is."""
    monkeypatch.setattr(jnp, "float32", jnp.float64)
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize("devices", [1, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_in_float64_a_video_in_several_calls_is_the_whole_one(kind, direction, devices, float64):
    """Whose later frames go through the VAE at once, on one device. In float32 these differ by 1e-7; a wrong halo costs
    1e-2."""
    whole = video(kind, direction, (5, 4), latent_frames=4).astype(np.float64)
    one, step = make_coder(kind, dtype=np.float64), 4 if direction == "encode" else 1
    code = getattr(one, f"{direction}_chunk")
    cache, first = code(None, whole[:, :1])
    expected = np.concatenate([first, code(cache, whole[:, 1:])[1]], axis=1)
    several = one if devices == 1 else make_coder(kind, devices, np.float64)
    for cuts in ((0, 1, 1 + 2 * step, 1 + 3 * step), (0, 1 + step, 1 + 3 * step)):
        stream = getattr(several, f"{direction}_stream")()
        made = np.concatenate([stream(whole[:, a:b]) for a, b in pairwise(cuts)], axis=1)
        print("measured", np.abs(made - expected).max())
        assert made.dtype == np.float64 and expected.std() > 0.3
        assert np.abs(made - expected).max() < 1e-13


def test_a_stream_keeps_nothing_but_its_cache():
    """It may be put aside, and another takes its place: the cache is the whole state."""
    latents, one = video("2.1", "decode", (5, 4)), coder("2.1")
    before, after = one.decode_stream(), one.decode_stream()
    first = before(latents[:, :2])
    after.cache = before.cache
    rest = after(latents[:, 2:])
    np.testing.assert_array_equal(np.concatenate([first, rest], 1), one.decode(latents))


def test_what_does_not_go_on_with_a_stream_is_refused():
    frames, latents = video("2.1", "encode", (5, 4)), video("2.1", "decode", (5, 4))
    encode, decode = coder("2.1").encode_stream(), coder("2.1").decode_stream()
    with pytest.raises(ValueError, match=r"num_frames=4 is not 4k\+1: nearest are 1 and 5"):
        encode(frames[:, :4])
    with pytest.raises(ValueError, match="latents have 5 channels, and this VAE's have 4"):
        decode(np.zeros((1, 1, 5, 4, 5), np.float32))
    with pytest.raises(ValueError, match=r"nothing is to be coded in shape \(1, 0, 5, 4, 4\)"):
        decode(latents[:, :0])
    encode(frames[:, :1])
    decode(latents[:, :1])
    cache = decode.cache
    with pytest.raises(
        ValueError, match="num_frames=5 of a video that goes on is no multiple of 4: nearest are 4 and 8"
    ):
        encode(frames[:, :5])
    with pytest.raises(ValueError, match=r"goes on with \(1, 5, 4, 4\) \(B, H, W, C\), and not with \(1, 5, 3, 4\)"):
        decode(latents[:, 1:, :, :3])
    assert decode.cache is cache  # as if nothing had been asked
    np.testing.assert_array_equal(decode(latents[:, 1:]), coder("2.1").decode(latents)[:, 1:])


def test_a_stream_takes_its_size_from_what_it_coded():
    """And from nothing that was only asked for."""
    frames, stream = video("2.1", "encode", (5, 4)), coder("2.1").encode_stream()
    stream.check((2, *frames[:, :5].shape[1:]))
    stream(frames[:, :5])
    with pytest.raises(ValueError, match="this stream goes on with"):
        stream.check((2, *frames[:, :4].shape[1:]))


# Frames in 8 bits


def test_8_bits_are_numpys_rounding_of_the_same_frames():
    """Of every half between two levels and its neighbours, too, where a fused sum would go the other way."""
    halves = np.arange(-1, 512, dtype=np.float32) / 2 / 127.5 - 1
    near = [np.nextafter(halves, np.float32(side)) for side in (-2, 2)]
    drawn = np.random.default_rng(0).uniform(-1, 1, 3 * 10**6).astype(np.float32)
    x = np.concatenate([halves, *near, drawn]).clip(-1, 1)
    x = x[: len(x) // 3 * 3].reshape(1, 1, 1, -1, 3)
    with compiling_quickly(False):
        frames, damaged = to_8_bits(jnp.asarray(x))
    np.testing.assert_array_equal(frames, ((x * 0.5 + 0.5) * 255).round().astype(np.uint8))
    assert not damaged and {0, 255} <= set(np.unique(frames))


@pytest.mark.parametrize("devices", [1, 3])
def test_frames_come_in_8_bits_from_any_devices(devices):
    """A picture of 4 latent columns on 3 devices, which hold 6."""
    z = video("2.1", "decode", (2, 4))
    expected = ((coder("2.1", devices).decode(z) * 0.5 + 0.5) * 255).round()
    chunks = list(coder("2.1", devices).decode_chunks(z, "uint8"))
    assert [chunk.shape[1] for chunk in chunks] == [1, 4, 4] and chunks[0].dtype == np.uint8
    np.testing.assert_array_equal(np.concatenate(chunks, axis=1), expected)


@pytest.mark.parametrize("devices", [1, 3])
def test_nan_is_no_frame_in_8_bits(devices):
    z = video("2.1", "decode", (2, 4))
    z[0, 1, 0, 3] = np.nan
    chunks = coder("2.1", devices).decode_chunks(z, "uint8")
    assert next(chunks).shape[1] == 1
    with pytest.raises(ValueError, match="the VAE computed NaN, of which there are no frames"):
        next(chunks)
