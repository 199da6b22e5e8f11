"""A pipeline whose VAE is on several devices, the mesh's or its own, against one; and videos that come in parts."""

import re
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import jax
import numpy as np
import pytest
from oracle import relative_error
from runs import IMAGE, compilations, unit_noise

from jaxwan.models import video_coder
from jaxwan.pipelines.pipeline import WanPipeline
from jaxwan.pipelines.streams import stream_bytes, weight_bytes

# Rounding: sums are ordered by the size of arrays (tests/models/test_video_coder.py)
TOLERANCE = 1e-6
OF_LATENTS = 2e-6  # an encoder's sums, over more channels, of taps and channels together

CALL = dict(prompt="a red cat", height=48, width=80, num_frames=5, num_inference_steps=2, seed=1, guidance_scale=1.0)
LATENTS = unit_noise((1, 16, 3, 6, 10))


@pytest.fixture(autouse=True, scope="module")
def split_small_frames():
    """Frames of tests are small, and those of users are not."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(video_coder, "WHOLE", 1)
        yield


@pytest.fixture(scope="module")
def on(folder):
    """(mesh, vae_devices) -> a pipeline."""

    @cache
    def load(mesh=None, vae_devices=None):
        given = dict(vae_devices=vae_devices, progress=False)
        return WanPipeline.from_pretrained(folder("2.1-t2v"), mesh, "float32", **given)

    return load


def coding_devices(pipe) -> list[int]:
    """Those that hold the VAE."""
    leaves = jax.tree.leaves(pipe.parts.coder.state)
    (placed,) = {tuple(sorted(device.id for device in leaf.devices())) for leaf in leaves}
    return list(placed)


def test_small_frames_are_coded_by_one_device_with_its_bits(on, monkeypatch):
    monkeypatch.setattr(video_coder, "WHOLE", 11)  # of ten columns
    pipe = on("pp=2")
    assert pipe.parts.coder.decode_stream().space(LATENTS.transpose(0, 2, 3, 4, 1).shape) is None
    np.testing.assert_array_equal(pipe.decode(LATENTS), on().decode(LATENTS))
    for name, _, (given, *_) in pipe.parts.coder.programs("decode", (1, 3, 6, 10, 16)):
        assert {len(x.sharding.device_set) for x in jax.tree.leaves(given)} == {1}, name


def test_a_mesh_codes_as_one_device_does(on):
    assert coding_devices(on("pp=3")) == [0, 1, 2] and coding_devices(on()) == [0]
    frames, alone = on("pp=3").decode(LATENTS), on().decode(LATENTS)
    assert relative_error(frames, alone) < TOLERANCE and alone.std() > 0.05
    assert np.abs((255 * frames).round() - (255 * alone).round()).max() <= 1
    latents = on().encode(alone)
    assert relative_error(on("pp=3").encode(alone), latents) < OF_LATENTS and latents.std() > 0.3


def test_a_vae_with_devices_of_its_own_gives_the_bits_of_as_many_devices_of_a_mesh(on):
    apart = on("pp=2", 3)
    assert coding_devices(apart) == [2, 3, 4] and "mesh pp=2, 2 x cpu, VAE on 3 more" in repr(apart)
    np.testing.assert_array_equal(apart.decode(LATENTS), on("pp=3").decode(LATENTS))
    frames = on("pp=3").decode(LATENTS)
    np.testing.assert_array_equal(apart.encode(frames), on("pp=3").encode(frames))
    assert coding_devices(on(None, 1)) == [1]
    np.testing.assert_array_equal(on(None, 1).decode(LATENTS), on().decode(LATENTS))


def test_decoding_in_another_thread_beside_a_call_gives_the_same_bits(on):
    pipe = on("pp=2", 3)
    pipe.warmup(**CALL)
    video, decoded = pipe(**CALL), pipe.decode(LATENTS)
    with ThreadPoolExecutor(1) as pool:
        beside = [pool.submit(pipe.decode, LATENTS) for _ in range(4)]
        again = [pipe(**CALL) for _ in range(2)]
    for result in beside:
        np.testing.assert_array_equal(result.result(), decoded)
    for result in again:
        np.testing.assert_array_equal(result.latents, video.latents)
        np.testing.assert_array_equal(result.frames, video.frames)


def test_after_a_warm_up_neither_a_mesh_nor_a_vae_apart_compiles_anything(folder):
    """What a call encodes included."""
    for vae_devices in (None, 2):
        pipe = WanPipeline.from_pretrained(
            folder("i2v-A14B"), "pp=2", "float32", vae_devices=vae_devices, progress=False,
            warmup=CALL | dict(image=IMAGE),
        )  # fmt: skip
        assert compilations(lambda p=pipe: p(**CALL, image=IMAGE)) == 0


def test_more_devices_than_there_are_and_none_are_refused(folder, on):
    for vae_devices, words in (
        (7, "mesh pp=2 and vae_devices=7 need 9 devices and JAX is already initialised with 8 on the CPU"),
        (0, "vae_devices=0 must be a whole number from 1"),
    ):
        with pytest.raises(ValueError, match=words):
            WanPipeline.from_pretrained(folder("2.1-t2v"), "pp=2", vae_devices=vae_devices, progress=False)


# In parts


@pytest.mark.parametrize("mesh", [None, "pp=3"])
def test_videos_that_come_in_parts_are_coded_as_whole_ones(on, mesh):
    pipe, latents = on(mesh), np.concatenate([LATENTS, 2 * LATENTS])
    stream, other = pipe.decode_stream(), pipe.decode_stream()
    assert stream.state is None
    first = stream(latents[:, :, :2])
    assert other(latents[:1]).shape == (1, 9, 48, 80, 3)  # another stream, in between
    frames = np.concatenate([first, stream(latents[:, :, 2:])], axis=1)
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(stream.state)) > 2**16
    assert frames.shape == (2, 9, 48, 80, 3)
    for video, whole in zip(frames, pipe.decode(latents), strict=True):
        assert relative_error(video, whole) < TOLERANCE  # which is decoded alone: other sums
    stream, pixels = pipe.encode_stream(), (255 * frames[:1]).astype(np.uint8)
    parts = [stream(pixels[:, :1]), stream(pixels[:, 1:5]), stream(pixels[:, 5:])]
    np.testing.assert_array_equal(np.concatenate(parts, axis=2), pipe.encode(pixels))


def test_parts_that_do_not_go_on_are_refused(on):
    decode, encode = on().decode_stream(), on().encode_stream()
    with pytest.raises(ValueError, match=r"latents have shape \(1, 15, 3, 6, 10\), expected \(B, 16, T, h, w\)"):
        decode(LATENTS[:, :15])
    with pytest.raises(ValueError, match="num_frames=3 is not 4k\\+1: nearest are 1 and 5"):
        encode(np.zeros((1, 3, 48, 80, 3)))
    with pytest.raises(ValueError, match=r"frames have shape \(48, 80, 3\), expected \(B, F, H, W, 3\)"):
        encode(np.zeros((48, 80, 3)))
    decode(LATENTS)
    with pytest.raises(ValueError, match=r"goes on with \(1, 6, 10, 16\) \(B, H, W, C\), and not with \(1, 6, 9, 16\)"):
        decode(LATENTS[..., :9])


def test_a_closed_stream_goes_on_no_more(on):
    stream = on().decode_stream()
    stream(LATENTS)
    stream.close()
    assert stream.state is None
    with pytest.raises(ValueError, match="this stream is closed: open another one"):
        stream(LATENTS)


def test_a_call_that_ends_in_the_middle_closes_its_stream(on, monkeypatch):
    """Some of its latents are in the state, and nobody has the frames."""
    stream = on().decode_stream()
    stream(LATENTS[:, :, :1])
    code, calls = stream._stream.coder.decode_chunk, []

    def interrupted(*given):
        calls.append(given)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return code(*given)

    monkeypatch.setattr(stream._stream.coder, "decode_chunk", interrupted)
    with pytest.raises(KeyboardInterrupt):
        stream(LATENTS[:, :, 1:])
    assert stream.state is None
    with pytest.raises(ValueError, match="this stream is closed: open another one"):
        stream(LATENTS[:, :, 1:])


@pytest.mark.parametrize("mesh", [None, "pp=3"])
def test_what_streams_keep_is_known_before_they_begin(on, mesh):
    """To the byte, of the device with the most."""
    coder, videos = on(mesh).parts.coder, np.concatenate([LATENTS, LATENTS])
    for stream, given in (
        (coder.decode_stream(), videos.transpose(0, 2, 3, 4, 1)),
        (coder.encode_stream(), np.zeros((2, 5, 48, 80, 3), np.float32)),
    ):
        told = stream_bytes(stream, given.shape)
        stream(given)
        kept = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(stream.cache))
        assert told.state == kept > 2**16 and told.step > given[:, :1].nbytes


def test_more_streams_than_a_device_has_room_for_are_refused(on, monkeypatch):
    """Of several sizes and both directions, on a device that says half of itself to JAX."""
    monkeypatch.setenv("XLA_CLIENT_MEM_FRACTION", "0.5")
    pipe = WanPipeline(on("pp=3").checkpoint, on("pp=3").parts)
    first = pipe.parts.denoiser.mesh.devices.flat[0]
    weights = weight_bytes(pipe.parts, first)
    assert (
        0 < weights < sum(leaf.nbytes for leaf in jax.tree.leaves((pipe.parts.denoiser.weights, pipe.parts.states())))
    )
    decode, encode = (
        stream_bytes(pipe.parts.coder.decode_stream(), (1, 3, 6, 10, 16)),
        stream_bytes(pipe.parts.coder.encode_stream(), (1, 5, 48, 80, 3)),
    )
    memory = 2 * (weights + 2 * decode.state + encode.state + max(decode.step, encode.step))
    streams = [pipe.decode_stream(device_memory=memory) for _ in range(3)]
    frames = streams[0](LATENTS)
    pipe.encode_stream(device_memory=memory)(frames)  # and is dropped
    streams[1](LATENTS)
    kept = pipe.encode_stream(device_memory=memory)
    kept(frames)
    with pytest.raises(MemoryError) as caught:
        streams[2](LATENTS)
    assert re.fullmatch(
        r"a stream of \S+ MiB beside 3 open streams of \S+ MiB and \S+ MiB of weights needs \S+ MiB of a device, steps "
        r"included, and it has \S+ MiB: close one, by stream.close\(\) or by dropping it", str(caught.value)
    )  # fmt: skip
    kept(frames[:, 1:])  # one that is open goes on
    streams[1].close()
    np.testing.assert_array_equal(streams[2](LATENTS), frames)
    with pytest.raises(MemoryError, match="beside 3 open streams"):
        pipe.encode_stream(device_memory=memory)(frames)
    del streams, kept, caught  # whose traceback knows a stream
    with pytest.raises(MemoryError, match=r"a stream of .* beside \S+ MiB of weights needs .* and it has 4.77 MiB$"):
        pipe.decode_stream(device_memory="10MB")(LATENTS)
    with pytest.raises(ValueError, match="device memory '20' has no unit: 20GB, 20GiB\\?"):
        pipe.decode_stream(device_memory="20")
    pipe.decode_stream()(LATENTS)  # where memory is not known, nothing is refused
