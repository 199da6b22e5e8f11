"""Source videos that are read while they are encoded: what the host holds of them, and how that ends when it fails."""

import os
import re
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
from PIL import Image

from jaxwan.models.tiles import TiledCoder, Tiling
from jaxwan.pipelines.call import make_job
from jaxwan.pipelines.encoders import encode_clip, image_channels
from jaxwan.pipelines.media import load_video, save_video
from jaxwan.pipelines.sources import clips_of

HEIGHT, WIDTH = 32, 48
FRAME = 12 * HEIGHT * WIDTH  # bytes of one in float32
TILES = Tiling(32, 32, 24, 24)
CLIP = np.stack([np.roll(np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8), i, 1) for i in range(65)])


@pytest.fixture
def pipe(pipeline):
    return pipeline("2.1-t2v")


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("clips") / "clip.mp4"
    save_video(CLIP, path, 16)
    return path


def clip_of(pipe, source, num_frames):
    """As `encode` takes it."""
    (clip,) = clips_of(pipe.parts.coder.geometry, source, num_frames, HEIGHT, WIDTH, None)
    return clip


def peak(function) -> int:
    """Most bytes of arrays that are there at a time, beyond those from before; compiled before."""
    function()
    tracemalloc.start()
    try:
        function()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


# What the host holds


@pytest.mark.parametrize("kind", ["file", "bytes", "floats"])
def test_what_is_encoded_is_never_there_as_a_whole(pipe, path, kind):
    """Of 65 frames no more than three groups of four, each three times on its way to [-1, 1]."""
    sized = CLIP[:, :HEIGHT, :WIDTH]
    source = {"file": path, "bytes": CLIP[None], "floats": (sized / 255).astype(np.float32)[None]}[kind]
    held = peak(lambda: encode_clip(pipe.parts.coder, clip_of(pipe, source, 65)))
    print("measured", held / FRAME, "frames")
    assert 4 < held / FRAME < 40


def test_in_tiles_it_is_there_as_bytes(pipe, path):
    """A quarter of float32, and at most twice while they are read."""
    coder = TiledCoder(pipe.parts.coder, TILES)
    short, long = (peak(lambda n=n: encode_clip(coder, clip_of(pipe, path, n))) for n in (17, 65))
    print("measured", (long - short) / FRAME, "frames")
    assert 48 / 4 * FRAME < long - short < 48 / 2 * FRAME


def test_a_video_between_images_is_never_there_as_a_whole(pipe):
    first, last = np.random.default_rng(0).uniform(-1, 1, (2, HEIGHT, WIDTH, 3)).astype(np.float32)
    held = peak(lambda: image_channels(pipe.parts.coder, first, last, 65))
    print("measured", held / FRAME, "frames")
    assert 4 < held / FRAME < 40


LONG = """
import resource, sys
from jaxwan import BUNDLED_MODEL, WanPipeline, make_job
from jaxwan.pipelines.encoders import prepare
from jaxwan.pipelines.progress import Progress

pipe, size = WanPipeline.from_pretrained(BUNDLED_MODEL, progress=False), dict(height=96, width=128)
for num_frames in (49, 1001):
    job = make_job(pipe.checkpoint, prompt="a", seed=1, video="clip.mp4", num_frames=num_frames, **size)
    prepare(pipe.checkpoint, pipe.parts, job.requests, Progress(visible=False))
    pipe.encode("clip.mp4", num_frames=num_frames, **size)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, flush=True)
"""


@pytest.mark.slow
def test_host_memory_does_not_grow_with_the_number_of_frames_of_a_source(tmp_path):
    """Of 49 and 1,001 frames of 96 x 128, in video to video until it denoises and encoded alone. They would take 140 MB
    more in float32, 35 MB in bytes.

    glibc is told to return what is free, or its arenas go up and down by more than that.
    """
    save_video((np.roll(CLIP[0], i, 1) for i in range(1001)), tmp_path / "clip.mp4", 16)
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "500000"}
    done = subprocess.run([sys.executable, "-c", LONG], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    short, long = (int(kilobytes) / 1024 for kilobytes in re.findall(r"^\d+$", done.stdout, re.MULTILINE))
    print(f"measured: {short:.0f} and {long:.0f} MB")
    assert long - short < 20  # of latents, noise and their sum there are 9 MB


# Encoding alone


@pytest.mark.parametrize("tiling", [None, TILES])
def test_a_file_is_encoded_as_its_frames_are(pipe, path, tiling):
    frames = np.stack([np.asarray(Image.fromarray(f).resize((WIDTH, HEIGHT), 1)) for f in load_video(path)[0][:9]])
    expected = pipe.encode(frames[None], tiling=tiling)
    given = dict(num_frames=9, height=HEIGHT, width=WIDTH, tiling=tiling)
    np.testing.assert_array_equal(pipe.encode(path, **given), expected)
    np.testing.assert_array_equal(pipe.encode([Image.fromarray(f) for f in load_video(path)[0]], **given), expected)
    twice = np.stack([load_video(path)[0]] * 2)
    np.testing.assert_array_equal(pipe.encode(twice, **given), np.concatenate([expected] * 2))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (dict(num_frames=8), r"num_frames=8 is not 4k\+1: nearest are 5 and 9"),
        (dict(num_frames=69), "num_frames=69 but the video has 65 frames: the largest is 65"),
        (dict(height=36, width=48), "height=36 is no multiple of 8: nearest are 32 and 40"),
        (dict(height=48), "height=48 without width: give both, or neither"),
        (dict(fit="fill"), "fit='fill' is not one of stretch, crop, pad"),
    ],
)
def test_what_cannot_be_encoded_is_refused(pipe, path, given, words):
    with pytest.raises(ValueError, match=words):
        pipe.encode(path, **given)


def test_a_file_whose_length_does_not_fit_says_how_much_of_it_does(pipe, tmp_path):
    """And not the next larger number, which it does not have."""
    save_video(CLIP[:7], tmp_path / "seven.mp4", 16)
    with pytest.raises(ValueError, match=r"^the video has 7 frames, which is not 4k\+1: give num_frames, 5 at most$"):
        pipe.encode(tmp_path / "seven.mp4")


# Failures


def test_a_file_that_fails_while_it_is_encoded_ends_the_call_and_leaves_nothing(pipe, path, tmp_path):
    copy = tmp_path / "source.mp4"
    copy.write_bytes(path.read_bytes())
    size = dict(height=HEIGHT, width=WIDTH, num_frames=33)
    job = make_job(pipe.checkpoint, prompt="a", video=copy, seed=1, num_inference_steps=2, **size)
    save_video(CLIP[::-1], copy, 16)  # as many frames, of as many pixels
    with pytest.raises(OSError) as caught:
        pipe.run(job, save=tmp_path / "made.mp4")
    assert str(caught.value) == f"video {copy} was changed after it was opened: let it be until it is encoded"
    copy.unlink()
    with pytest.raises(FileNotFoundError, match=f"video {copy} does not exist"):
        pipe.run(job, save=tmp_path / "made.mp4")
    assert os.listdir(tmp_path) == []
