"""Calls in a folder, on the way and at the end; and files that cannot be written where they should."""

import os
import time

import numpy as np
import pytest
from runs import PROMPTS

from jaxwan import Engine, SavedCalls
from jaxwan.engine import coding, ring, saving
from jaxwan.pipelines.media import background, load_video

SIZE = dict(height=32, width=48, num_frames=5)
CALL = dict(prompt=[PROMPTS[0], "a moon"], num_inference_steps=[2, 40], guidance_scale=2.0, seed=[1, 2])


@pytest.fixture(scope="module")
def alone(pipe):
    return pipe(**CALL, **SIZE, output_type="uint8")


def until(true):
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_what_is_written_already_is_not_made_again(pipe, alone, tmp_path, monkeypatch):
    monkeypatch.setattr(ring, "SEGMENT", 0.0)  # a round each, so that this takes a while
    paths = [tmp_path / "a.gif", tmp_path / "b.gif"]
    with Engine(pipe, slots=2) as engine:
        engine.submit(**CALL, **SIZE, save={"path": paths, "overwrite": False})
        until(paths[0].exists)
        assert engine.save(tmp_path / "saved", stop=True) == 1
        engine.close()
    assert not paths[1].exists()
    first, decoded = paths[0].read_bytes(), []
    groups = coding.decoded_groups
    monkeypatch.setattr(coding, "decoded_groups", lambda *given: decoded.append(given) or groups(*given))
    with Engine(pipe, slots=2) as engine:
        (handle,) = engine.restore(tmp_path / "saved")
        output = handle.result(60)
    assert output.paths == tuple(paths) and len(decoded) == 1 and paths[0].read_bytes() == first
    np.testing.assert_array_equal(output.latents, alone.latents)


def test_a_file_in_the_way_of_what_was_not_written_is_refused_or_replaced(pipe, tmp_path, monkeypatch):
    monkeypatch.setattr(ring, "SEGMENT", 0.0)
    with Engine(pipe, slots=2) as engine:
        handle = engine.submit(**CALL, **SIZE, save={"path": tmp_path / "x.gif", "overwrite": False})
        engine.save(tmp_path / "saved", stop=True)
        engine.close()
    handle.paths[0].write_text("another's")
    saved = SavedCalls.read(tmp_path / "saved")
    with pytest.raises(FileExistsError, match="x-0-seed1.gif exists"):
        saved.jobs(pipe.checkpoint)
    assert len(saved.overwriting().jobs(pipe.checkpoint)[0].requests) == 2


def test_an_engine_saves_every_so_often_and_removes_what_it_saved_when_nothing_is_left(pipe, tmp_path, monkeypatch):
    monkeypatch.setattr(ring, "SEGMENT", 0.0)
    folder = tmp_path / "saved"
    with Engine(pipe, slots=2, save=folder, save_every=0.01) as engine:
        handle = engine.submit(**CALL, **SIZE)
        until(folder.exists)
        handle.result(60)
        until(lambda: not folder.exists())
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("older", [False, True])
def test_a_save_that_is_broken_off_leaves_the_older_one(pipe, tmp_path, monkeypatch, older):
    def broken(*given):
        raise OSError("no space")

    folder = tmp_path / "saved"
    with Engine(pipe, slots=2) as engine:
        handle = engine.submit(**CALL, **SIZE)
        if older:
            engine.save(folder)
        monkeypatch.setattr(saving, "save_entry", broken)
        until(lambda: handle.progress.steps)
        with pytest.raises(OSError, match="no space"):
            engine.save(folder)
        handle.abort()
    assert os.listdir(tmp_path) == ["saved"] * older
    assert not older or len(SavedCalls.read(folder).calls) == 1


def test_a_process_that_ends_between_two_names_keeps_the_older_save(tmp_path, monkeypatch):
    new, folder, old = (tmp_path / name for name in (".new", "saved", ".old"))
    for place in (new, old):
        place.mkdir()
        (place / saving.INDEX).write_text(place.name)
    monkeypatch.setattr(saving, "_under_way", {new: (folder, old)})
    saving._remove_under_way()
    assert os.listdir(tmp_path) == ["saved"] and (folder / saving.INDEX).read_text() == ".old"


@pytest.mark.parametrize("keep", ["latent", "uint8"])
def test_a_video_that_cannot_be_written_goes_where_its_call_says_or_nowhere(pipe, alone, tmp_path, monkeypatch, keep):
    write = background.write_output

    def full(frames, path, *rest):
        if path.stem.startswith("x"):
            next(iter(frames))
            raise OSError(28, "No space left on device")
        write(frames, path, *rest)

    def otherwise(video, path, error):
        asked.append((path.name, error.strerror, video.seeds))
        return tmp_path / f"y-{path.name}" if "-0-" in path.name else None

    asked = []
    monkeypatch.setattr(background, "write_output", full)
    with Engine(pipe, slots=2) as engine:
        job = engine.submit(**CALL, **SIZE, output_type="latent").job
        handle = engine.submit_job(job, save=tmp_path / "x.gif", output_type=keep, otherwise=otherwise)
        output = handle.result(60)
    names = ["x-0-seed1.gif", "x-1-seed2.gif"]
    assert asked == [(name, "No space left on device", (seed,)) for name, seed in zip(names, (1, 2), strict=True)]
    assert output.paths == (tmp_path / "y-x-0-seed1.gif", None) and len(load_video(output.paths[0])[0]) == 5
    assert os.listdir(tmp_path) == ["y-x-0-seed1.gif"]
    np.testing.assert_array_equal(output.latents, alone.latents)
    np.testing.assert_array_equal(output.frames, alone.latents if keep == "latent" else alone.frames)
