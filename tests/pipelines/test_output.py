"""What a call returns: its videos as a sequence, in files with their settings, and shown in notebooks."""

import base64
import json
import os
import re

import av
import numpy as np
import pytest
from PIL import Image

import jaxwan
from jaxwan.pipelines import output as outputs
from jaxwan.pipelines.call import make_job
from jaxwan.pipelines.checkpoint import BUNDLED_MODEL, read_checkpoint
from jaxwan.pipelines.media import load_video, read_settings
from jaxwan.pipelines.output import Output, check_save, numbered

PROMPT = 'a "red" star & <b>中文</b> 🎬\nsecond line'
CALL = dict(height=32, width=48, num_frames=5, fps=8, num_inference_steps=4)


@pytest.fixture(scope="module")
def made():
    """(call) -> (its job, an Output of it whose videos are grey levels)."""

    def make(**call):
        job = make_job(read_checkpoint(BUNDLED_MODEL), **dict(prompt="a red star", seed=7) | CALL | call)
        count = len(job.requests)
        frames = np.zeros((count, *job.size, 3), np.float32)
        frames += np.linspace(0.2, 0.8, count, dtype=np.float32)[:, None, None, None, None]
        latents = np.zeros((count, 16, 2, 4, 6), np.float32)
        settings = tuple({"model": "tiny", "dtype": "float32", "vae_dtype": "float32"} | s for s in job.settings())
        return job, Output(frames, latents, job.requests[0].fps, settings, {})

    return make


@pytest.fixture
def three(made):
    _, output = made(prompt=["a red star", "a blue star", "a green star"], seed=[7, 8, 9])
    return output


def level(path):
    return load_video(path)[0].mean() / 255


# A sequence of videos


def test_an_output_is_a_sequence_of_outputs(three):
    assert len(three) == 3 and three.seeds == (7, 8, 9)
    assert [video.seeds for video in three] == [(7,), (8,), (9,)]
    assert three[-1].seeds == (9,) and three[1:].seeds == (8, 9)
    np.testing.assert_array_equal(three[1].frames, three.frames[1:2])
    np.testing.assert_array_equal(three[1].latents, three.latents[1:2])
    with pytest.raises(IndexError, match="there is no video 3 among 3"):
        _ = three[3]
    np.testing.assert_array_equal(np.asarray(three[1]), three.frames[1:2])


def test_it_is_said_in_a_line(three, made):
    assert repr(three) == "Output(3 videos of 48x32, 5 frames at 8 fps, seeds 7, 8, 9)"
    assert repr(three[0]) == "Output(1 video of 48x32, 5 frames at 8 fps, seed 7)"
    _, many = made(num_videos_per_prompt=6)
    assert repr(many) == "Output(6 videos of 48x32, 5 frames at 8 fps, seed 7)"
    latent = Output(many.latents, many.latents, 8.0, many.settings, {})
    assert repr(latent) == "Output(6 videos, latents (6, 16, 2, 4, 6), seed 7)"
    assert repr(many[6:]) == "Output(0 videos)" and many[6:]._repr_html_() is None
    assert repr(made(num_frames=1)[1]) == "Output(1 video of 48x32, 1 frame at 8 fps, seed 7)"


# Files


def test_one_video_goes_where_it_is_told_and_several_beside_it(three, tmp_path):
    assert three[1].save(tmp_path / "new/clip.mp4") == [tmp_path / "new/clip.mp4"]
    paths = three.save(str(tmp_path / "clip.gif"))
    assert [p.name for p in paths] == ["clip-0-seed7.gif", "clip-1-seed8.gif", "clip-2-seed9.gif"]
    assert sorted(os.listdir(tmp_path)) == [*(p.name for p in paths), "new"]
    assert level(tmp_path / "new/clip.mp4") == pytest.approx(0.5, abs=0.02)
    assert [level(p) for p in paths] == pytest.approx([0.2, 0.5, 0.8], abs=0.02)


def test_names_say_the_index_within_the_prompt_too(made):
    job, output = made(prompt=["a red star", "a red star"], num_videos_per_prompt=2, index=1)
    expected = ["a-0-seed7-index1.mp4", "a-1-seed7-index2.mp4", "a-2-seed7-index1.mp4", "a-3-seed7-index2.mp4"]
    assert [p.name for p in numbered("a.mp4", output.settings)] == expected
    assert [p.name for p in check_save(job, "a.mp4")] == expected


def test_pictures_images_and_bytes_are_saved_alike(made, tmp_path):
    _, output = made(num_frames=1)
    images = [[Image.fromarray((frame * 255).round().astype(np.uint8)) for frame in video] for video in output.frames]
    output.save(tmp_path / "a.png")
    Output(images, output.latents, 8.0, output.settings, {}).save(tmp_path / "b.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_existing_files_are_replaced_or_kept(three, tmp_path):
    target = tmp_path / "a.gif"
    three[0].save(target)
    with pytest.raises(
        FileExistsError, match=r"a.gif exists: choose another name, or say --overwrite \(overwrite=True\)"
    ):
        three[1].save(target, overwrite=False)
    assert level(target) == pytest.approx(0.2, abs=0.02)
    three[1].save(target)
    assert level(target) == pytest.approx(0.5, abs=0.02)


def test_arrays_are_saved_under_their_names(three, tmp_path):
    three.save_npz(tmp_path / "a.npz")
    Output(three.latents, three.latents, 8.0, three.settings, {}).save_npz(tmp_path / "b.npz")
    with np.load(tmp_path / "a.npz") as a, np.load(tmp_path / "b.npz") as b:
        assert set(a) == {"latents", "frames"} and set(b) == {"latents"}
        np.testing.assert_array_equal(a["frames"], three.frames)


@pytest.mark.parametrize("name", ["a.avi", "a", "a.png"])
def test_other_names_are_refused_and_leave_nothing(three, tmp_path, name):
    with pytest.raises(ValueError, match="must end in .mp4 or .webm or .gif for 5 frame"):
        three.save(tmp_path / name)
    assert os.listdir(tmp_path) == []


def test_latents_alone_are_neither_saved_nor_shown(three):
    latent = Output(three.latents, three.latents, 8.0, three.settings, {})
    for output in (latent, latent[0]):
        with pytest.raises(
            ValueError, match="output_type='latent' has no frames to save or show: decode them with pipe.de"
        ):
            output.save("a.mp4")
        assert output._repr_html_() is None


# Settings in files


@pytest.mark.parametrize("name", ["a.mp4", "a.webm", "a.gif", "a.png"])
def test_a_file_says_how_it_was_made(made, tmp_path, name):
    job, output = made(prompt=PROMPT, num_frames=1 if name == "a.png" else 5, seed=2**64 - 1, sampler="euler")
    output.save(tmp_path / name)
    settings = read_settings(tmp_path / name)
    assert settings == {"jaxwan": jaxwan.__version__} | output.settings[0]
    assert settings["call"]["prompt"] == PROMPT and settings["call"]["seed"] == 2**64 - 1
    assert make_job(read_checkpoint(BUNDLED_MODEL), **settings["call"]).settings() == job.settings()


@pytest.mark.parametrize("name", ["a.mp4", "a.webm"])
def test_settings_hold_no_time_path_or_machine_and_are_left_out_if_told(three, tmp_path, name):
    (target,) = three[0].save(tmp_path / name)
    once = target.read_bytes()
    three[0].save(target)
    assert target.read_bytes() == once
    assert not {str(tmp_path).encode(), os.uname().nodename.encode()} & set(re.findall(rb"[\w./-]+", once))
    three[0].save(target, metadata=False)
    with pytest.raises(ValueError, match=f"{name} does not say how it was made"):
        read_settings(target)
    with av.open(str(target)) as file:
        assert "title" not in file.metadata


def test_settings_name_what_was_given_as_arrays(made):
    job, _ = made(latents=np.zeros((1, 16, 2, 4, 6), np.float32))
    assert job.settings()[0]["inputs"] == ["latents"]
    job, _ = made(video=np.zeros((5, 32, 48, 3), np.uint8), strength=0.5)
    (settings,) = job.settings()
    assert settings["inputs"] == ["video"] and settings["call"]["strength"] == 0.5


@pytest.mark.parametrize(
    ("text", "error", "words"),
    [
        (None, FileNotFoundError, "does not exist"),
        (b"", OSError, r"is no readable mp4.* \(it is empty\)"),
        (b"no picture at all", OSError, r"is no readable mp4.* \(damaged, or of an unknown format\)"),
    ],
)
@pytest.mark.parametrize("name", ["a.mp4", "a.png"])
def test_a_file_that_cannot_be_read_is_told(tmp_path, name, text, error, words):
    if text is not None:
        (tmp_path / name).write_bytes(text)
    with pytest.raises(error, match=words):
        read_settings(tmp_path / name)


@pytest.mark.parametrize(
    "comment", ["", "a holiday", "[1, 2]", '{"prompt": "a"}', '{"jaxwan": "1", "call": {}, "inputs": 3}', "{" * 5000]
)
def test_a_comment_of_someone_else_is_no_settings(tmp_path, comment):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.gif", comment=comment.encode())
    with pytest.raises(ValueError, match="does not say how it was made"):
        read_settings(tmp_path / "a.gif")


# Notebooks


def embedded(html):
    return [(kind, base64.b64decode(data)) for kind, data in re.findall(r'src="data:(\w+/\w+);base64,([^"]+)"', html)]


def test_a_notebook_shows_every_video_with_its_seed_and_prompt(made, tmp_path):
    _, output = made(prompt=["a red star", PROMPT], seed=[7, 8], index=1)
    html = output._repr_html_()
    assert "seed 7, index 1: a red star" in html and "&lt;b&gt;" in html and "<b>" not in html
    shown = embedded(html)
    assert [kind for kind, _ in shown] == ["video/mp4"] * 2
    (tmp_path / "a.mp4").write_bytes(shown[1][1])
    assert load_video(tmp_path / "a.mp4")[0].shape == (5, 32, 48, 3) and level(tmp_path / "a.mp4") > 0.7
    _, picture = made(num_frames=1)
    assert [kind for kind, _ in embedded(picture._repr_html_())] == ["image/png"]


def test_large_videos_are_shown_smaller(made, tmp_path, monkeypatch):
    _, output = made(height=128, width=208)
    noise = np.random.default_rng(0).random(output.frames.shape, np.float32)
    noisy = Output(noise, output.latents, 8.0, output.settings, {})
    ((_, whole),) = embedded(noisy._repr_html_())
    monkeypatch.setattr(outputs, "SHOWN_BYTES", len(whole))
    html = noisy._repr_html_()
    assert len(html) < len(whole)
    (tmp_path / "a.mp4").write_bytes(embedded(html)[0][1])
    assert load_video(tmp_path / "a.mp4")[0].shape == (5, 64, 104, 3)


def test_without_h264_a_notebook_shows_an_animated_picture(three, monkeypatch):
    monkeypatch.setattr(outputs, "can_encode", lambda _: False)
    assert [kind for kind, _ in embedded(three[0]._repr_html_())] == ["image/gif"]


def test_settings_can_be_written_as_json(three):
    assert json.loads(json.dumps(three.settings)) == list(three.settings)
