"""Files that are written while their frames are made: the bytes of `save_output`, and nothing where that ends early."""

import errno
import os
import resource
import signal
import subprocess
import sys
import threading
from contextlib import contextmanager

import numpy as np
import pytest

from jaxwan.pipelines.media import BackgroundWriter, Compression, background, load_video, save_output
from jaxwan.pipelines.media.background import _WAITING

FRAMES = np.random.default_rng(0).integers(0, 256, (13, 32, 48, 3), np.uint8)
GROUPS = np.split(FRAMES, [1, 5, 9])


def writers():
    return [thread for thread in threading.enumerate() if thread.name.startswith("write ")]


@pytest.fixture(autouse=True)
def _no_thread_is_left():
    yield
    assert writers() == []


def write(path, groups, fps=8, **kept):
    with BackgroundWriter(path, sum(map(len, groups)), fps, **kept) as writer:
        for group in groups:
            writer.put(group)
        writer.finish()


@contextmanager
def file_limit(size):
    """What a full disk is like, as far as a limit of the process is: SIGXFSZ is ignored by Python."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("name", ["clip.mp4", "clip.webm", "clip.gif", "frame.png"])
def test_the_file_is_that_of_all_frames_at_once(tmp_path, name):
    """Of bytes, and of the float frames that they were rounded from."""
    groups = GROUPS[:1] if name.endswith("png") else GROUPS
    texts = {"title": "a", "comment": "b"}
    save_output(np.concatenate(groups), tmp_path / name, 8, texts)
    expected = (tmp_path / name).read_bytes()
    (tmp_path / name).write_text("older")
    write(tmp_path / name, groups, metadata=texts)
    assert (tmp_path / name).read_bytes() == expected
    write(tmp_path / name, [group / np.float32(255) for group in groups], metadata=texts)
    assert (tmp_path / name).read_bytes() == expected and os.listdir(tmp_path) == [name]


def test_it_is_compressed_as_told(tmp_path):
    sizes = {}
    for compression in (Compression(), Compression(crf=40), Compression(x264_preset="medium")):
        write(tmp_path / "clip.mp4", GROUPS, compression=compression)
        sizes[compression] = (tmp_path / "clip.mp4").stat().st_size
    assert len(set(sizes.values())) == 3 and sizes[Compression(crf=40)] < min(sizes.values()) + 1


def test_frames_are_encoded_while_others_are_made_and_no_more_wait_than_told(tmp_path, monkeypatch):
    """The encoder stands still until the maker waits for it."""
    go_on, taken, put = threading.Event(), [], []

    def encode(frames, *_):
        for frame in frames:
            assert go_on.wait(60)
            taken.append(frame)

    monkeypatch.setattr(background, "write_output", encode)
    with BackgroundWriter(tmp_path / "clip.mp4", 80, 8) as writer:

        def make():
            for i in range(20):
                writer.put(np.full((4, 16, 16, 3), i, np.uint8))
                put.append(i)

        maker = threading.Thread(target=make)
        maker.start()
        maker.join(0.2)
        assert maker.is_alive() and len(put) <= _WAITING + 1 and taken == []
        go_on.set()
        maker.join()
        writer.finish()
    assert [frame.max() for frame in taken] == [i for i in range(20) for _ in range(4)]


@pytest.mark.parametrize("name", ["clip.mp4", "clip.webm", "clip.gif", "frame.png"])
def test_a_maker_that_fails_leaves_the_folder_as_it_was(tmp_path, name):
    (tmp_path / name).write_text("older")
    for error in (RuntimeError, KeyboardInterrupt):
        with pytest.raises(error), BackgroundWriter(tmp_path / name, 13, 8) as writer:
            for group in GROUPS[:3]:
                writer.put(group)
            raise error
    assert os.listdir(tmp_path) == [name] and (tmp_path / name).read_text() == "older"


@pytest.mark.parametrize("name", ["clip.mp4", "clip.webm", "clip.gif"])
def test_a_full_disk_ends_the_maker_and_leaves_nothing(tmp_path, name):
    """However many groups are still to come."""
    noise = np.random.default_rng(0).integers(0, 256, (4, 128, 128, 3), np.uint8)
    with file_limit(10_000), pytest.raises(OSError) as caught:
        write(tmp_path / name, [noise] * 40)
    assert caught.value.errno == errno.EFBIG and caught.value.filename == str(tmp_path / name)
    assert os.listdir(tmp_path) == []


def test_an_encoder_that_fails_at_once_holds_up_nobody(tmp_path, monkeypatch):
    """At any moment of a maker who puts more than may wait."""
    failed, taken, count = threading.Event(), [], 0

    def fail(frames, *_):
        taken.extend(next(iter(frames)) for _ in range(count))
        failed.set()
        raise RuntimeError("the encoder broke")

    monkeypatch.setattr(background, "write_output", fail)
    for count, wait in [(0, False), (0, True), (1, False), (1, True)]:
        failed.clear()
        taken.clear()
        broken = pytest.raises(RuntimeError, match="the encoder broke")
        with broken, BackgroundWriter(tmp_path / "a.mp4", 40, 8) as writer:
            writer.put(FRAMES)
            assert not wait or failed.wait(60)
            for _ in range(40):
                writer.put(FRAMES)
        with broken:
            write(tmp_path / "a.mp4", [FRAMES])
        assert len(taken) == 2 * count


def test_a_file_that_came_meanwhile_is_kept(tmp_path):
    path = tmp_path / "clip.mp4"
    with pytest.raises(FileExistsError), BackgroundWriter(path, 13, 8, overwrite=False) as writer:
        writer.put(FRAMES)
        path.write_text("another's")
        writer.finish()
    assert path.read_text() == "another's" and os.listdir(tmp_path) == ["clip.mp4"]


def test_what_a_gif_leaves_out_is_told_at_the_callers_line(tmp_path):
    with pytest.warns(UserWarning, match="at most 50 frames a second, not 100") as told:
        write(tmp_path / "clip.gif", GROUPS, fps=100)
    assert told[0].filename == __file__ and len(told) == 1


ENDLESS = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # also where the tests ignore it
import numpy as np
from pathlib import Path
import jaxwan
from jaxwan.pipelines.media import BackgroundWriter
{before}
noise = np.random.default_rng(0).integers(0, 256, (4, 256, 256, 3), np.uint8)
with BackgroundWriter(Path("clip.mp4"), 10**6, 8) as writer:
    for i in range(10**6):
        writer.put(noise)
        if i == 30:
            print("ready", flush=True)
"""


@pytest.mark.parametrize(("number", "command"), [(signal.SIGINT, True), (signal.SIGTERM, True), (signal.SIGINT, False)])
def test_a_signal_in_the_middle_leaves_nothing(tmp_path, number, command):
    """Of a command, and of Python's own Ctrl-C."""
    code = ENDLESS.format(before="jaxwan.end_on_signals()" if command else "")
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout.readline() == "ready\n" and len(os.listdir(tmp_path)) == 1
        process.send_signal(number)
        err = process.communicate(timeout=30)[1]
    finally:
        process.kill()
    assert err == "interrupted\n" if command else err.endswith("KeyboardInterrupt\n")
    assert os.listdir(tmp_path) == [] and process.returncode == (128 + number if command else -signal.SIGINT)


def test_the_last_frame_is_there(tmp_path):
    steps = np.linspace(0, 255, 40).astype(np.uint8)[:, None, None, None] * np.ones((1, 16, 16, 3), np.uint8)
    for name in ("a.mp4", "a.webm"):
        write(tmp_path / name, np.split(steps, 10))
        levels = load_video(tmp_path / name)[0].astype(int)
        assert np.abs(levels - steps).max() <= 6
