"""Calls that write their videos while they decode them, against the same videos decoded and then saved."""

import errno
import os
import re
import resource
import subprocess
import sys
import threading

import numpy as np
import pytest

from jaxwan.pipelines.media import load_video, read_settings
from jaxwan.pipelines.pipeline import WanPipeline

CALL = dict(
    prompt=["a red cat", "a dog"], height=32, width=48, num_frames=9, num_inference_steps=1, seed=[1, 2],
    guidance_scale=1.0,
)  # fmt: skip


@pytest.fixture
def pipe(pipeline):
    return pipeline("2.1-t2v")


@pytest.fixture(scope="module")
def whole(pipeline, tmp_path_factory):
    """suffix -> what the files of the call's videos hold, and their Output, by way of frames in float32."""
    output, folder = pipeline("2.1-t2v")(**CALL), tmp_path_factory.mktemp("whole")
    names = {suffix: [path.read_bytes() for path in output.save(folder / f"clip{suffix}")] for suffix in SUFFIXES}
    return names, output


SUFFIXES = (".mp4", ".webm", ".gif")
NAMES = ["clip-0-seed1", "clip-1-seed2"]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_files_written_while_decoding_are_those_of_whole_frames(pipe, whole, tmp_path, suffix):
    output = pipe(**CALL, save=tmp_path / f"clip{suffix}")
    assert output.paths == tuple(tmp_path / f"{name}{suffix}" for name in NAMES)
    assert [path.read_bytes() for path in output.paths] == whole[0][suffix]
    assert sorted(os.listdir(tmp_path)) == [path.name for path in output.paths]
    np.testing.assert_array_equal(output.latents, whole[1].latents)
    assert output.frames is output.latents and output.seconds["decode"] > 0 and output.seconds["write"] > 0
    assert output[1].paths == output.paths[1:] and read_settings(output.paths[1])["call"]["seed"] == 2


@pytest.mark.parametrize("output_type", ["np", "uint8", "pil"])
def test_frames_are_kept_beside_the_files_if_asked_for(pipe, whole, tmp_path, output_type):
    output = pipe(**CALL, save=str(tmp_path / "clip.mp4"), output_type=output_type)
    assert [path.read_bytes() for path in output.paths] == whole[0][".mp4"]
    rounded = (whole[1].frames * 255).round().astype(np.uint8)
    expected = whole[1].frames if output_type == "np" else rounded
    np.testing.assert_array_equal(np.stack(output.frames), expected)


def test_an_output_of_latents_is_decoded_into_files_as_it_is_told(pipe, whole, tmp_path):
    latent = pipe(**CALL, output_type="latent")
    kept = dict(metadata=False, crf=40, x264_preset="fast")
    made = pipe.decode(latent, save=dict(path=[tmp_path / "a.mp4", tmp_path / "b.mp4"], **kept))
    assert made.paths == (tmp_path / "a.mp4", tmp_path / "b.mp4") and made.frames is made.latents
    expected = [path.read_bytes() for path in whole[1].save([tmp_path / "c.mp4", tmp_path / "d.mp4"], **kept)]
    assert [path.read_bytes() for path in made.paths] == expected
    with pytest.raises(ValueError, match="latents alone do not say how fast they are shown"):
        pipe.decode(latent.latents, save=tmp_path / "e.mp4")
    picture = pipe(**CALL | dict(num_frames=1, prompt="a", seed=3), save=tmp_path / "f.png")
    assert picture.paths == (tmp_path / "f.png",) and picture.paths[0].is_file()


@pytest.mark.parametrize(
    ("save", "error", "words"),
    [
        ("clip.avi", ValueError, "must end in .mp4 or .webm or .gif"),
        ("clip.png", ValueError, "must end in .mp4 or .webm or .gif for 9"),
        (["a.mp4"], ValueError, r"2 video\(s\) need as many paths, each another, and these are 1"),
        (["a.mp4", "a.mp4"], ValueError, r"2 video\(s\) need as many paths, each another"),
        (["a.mp4", None], ValueError, r"None\] is no path or list of paths, nor a dict of path"),
        (dict(path=3), ValueError, "is no path or list of paths"),
        (dict(path="a.mp4", crv=3), ValueError, "nor a dict of path and any of overwrite, metadata, crf"),
        (dict(crf=3), ValueError, "is no path or list of paths, nor a dict of path"),
        (dict(path="a.gif", crf=3), ValueError, "crf=3 is for mp4 and webm"),
        (dict(path="there.mp4", overwrite=False), FileExistsError, "there-0-seed1.mp4 exists"),
        (3, ValueError, "save=3 is no path or list of paths, nor a dict of path"),
    ],
)
def test_what_cannot_be_written_is_refused_before_anything_is_computed(
    pipe, tmp_path, monkeypatch, save, error, words
):  # fmt: skip
    (tmp_path / "there-0-seed1.mp4").write_text("older")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(WanPipeline, "_prepare", None)  # not reached
    with pytest.raises(error, match=words):
        pipe(**CALL, save=save)
    assert os.listdir() == ["there-0-seed1.mp4"]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_disk_that_is_full_ends_the_call_without_half_a_file_or_a_thread(pipe, tmp_path, suffix):
    latent, limits = pipe(**CALL, output_type="latent"), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError) as caught:
            pipe.decode(latent, save=tmp_path / f"clip{suffix}")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.errno == errno.EFBIG and caught.value.filename == str(tmp_path / f"{NAMES[0]}{suffix}")
    assert os.listdir(tmp_path) == [] and not [t for t in threading.enumerate() if t.name.startswith("write ")]


def test_a_vae_that_fails_in_the_middle_leaves_no_file(pipe, tmp_path):
    latent = pipe(**CALL, output_type="latent")
    latent.latents[1, :, 1] = np.nan
    with pytest.raises(ValueError, match="the VAE computed NaN"):
        pipe.decode(latent, save=tmp_path / "clip.mp4")
    assert os.listdir(tmp_path) == [f"{NAMES[0]}.mp4"]
    assert len(load_video(tmp_path / f"{NAMES[0]}.mp4")[0]) == 9


LONG = """
import resource, sys
from dataclasses import replace
import numpy as np
from jaxwan import BUNDLED_MODEL, Output, WanPipeline

pipe = WanPipeline.from_pretrained(BUNDLED_MODEL, progress=False)
settings = ({"call": {"prompt": "a", "seed": 1}},)
for latent_frames in (13, 251):
    latents = np.random.default_rng(0).normal(size=(1, 16, latent_frames, 12, 16)).astype(np.float32)
    output = pipe.decode(Output(latents, latents, 16.0, settings, {}), save="clip.mp4")
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, flush=True)
"""


@pytest.mark.slow
def test_host_memory_does_not_grow_with_the_number_of_frames(tmp_path):
    """Of 49 and 1,001 frames of 96 x 128: those would take 140 MB more in float32, 35 MB in bytes.

    glibc is told to return what is free, or its arenas go up and down by more than that.
    """
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "500000"}
    done = subprocess.run([sys.executable, "-c", LONG], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    short, long = (int(kilobytes) / 1024 for kilobytes in re.findall(r"^\d+$", done.stdout, re.MULTILINE))
    print(f"measured: {short:.0f} and {long:.0f} MB")
    assert long - short < 20  # of latents alone there are 3 MB
    assert len(load_video(tmp_path / "clip.mp4")[0]) == 1001
