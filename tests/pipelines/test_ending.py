"""A command that is told to end does so at once, whatever its threads are in, and leaves nothing half."""

import os
import signal
import subprocess
import sys
import time

import jax
import pytest

from jaxwan.pipelines import ending
from jaxwan.pipelines.compilation_cache import _drop_latest
from jaxwan.pipelines.media import writing

HEARD = (  # also where the tests ignore them
    "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    "signal.signal(signal.SIGHUP, signal.SIG_DFL)\n"
)
BUSY = """
import hashlib, numpy  # which starts threads that a signal may come to
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
import jaxwan
jaxwan.end_on_signals()
from jaxwan.pipelines.media.writing import replacing
native = lambda: hashlib.pbkdf2_hmac("sha256", b"", b"", 10**8)  # a minute, and no handler runs
ThreadPoolExecutor().submit(native)  # whom Python's exit would wait for
with replacing(Path("new", "clip.mp4")) as temporary:
    temporary.write_text("half")
    print("ready", flush=True)
    native()
"""


@pytest.mark.parametrize("number, times", [(signal.SIGINT, 2), (signal.SIGTERM, 1), (signal.SIGHUP, 1)])
def test_a_signal_ends_it_at_once_in_native_code_too(tmp_path, number, times):
    process = subprocess.Popen(
        [sys.executable, "-c", HEARD + BUSY], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout.readline() == "ready\n" and len(os.listdir(tmp_path / "new")) == 1
        start = time.monotonic()
        for _ in range(times):
            process.send_signal(number)
        assert process.communicate(timeout=20)[1] == "interrupted\n"
    finally:
        process.kill()
    assert process.returncode == 128 + number and time.monotonic() - start < 2
    assert os.listdir(tmp_path / "new") == []


def test_the_first_signal_may_be_someones_and_the_next_ends_it():
    code = "import os, signal, time, jaxwan; jaxwan.end_on_signals(); heard = []\n"
    code += "with jaxwan.first_signal_to(heard.append, 'saving'):\n"
    code += "  os.kill(os.getpid(), signal.SIGTERM)\n  while not heard: time.sleep(0.01)\n"
    code += "print(heard, flush=True); os.kill(os.getpid(), signal.SIGINT); time.sleep(20)"
    done = subprocess.run([sys.executable, "-c", HEARD + code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "[15]\n", "saving\ninterrupted\n")


def test_what_was_ignored_stays_ignored():
    """As after nohup."""
    code = "import os, signal, time, jaxwan; signal.signal(signal.SIGHUP, signal.SIG_IGN); jaxwan.end_on_signals()"
    done = subprocess.run([sys.executable, "-c", f"{code}; os.kill(os.getpid(), signal.SIGHUP); time.sleep(0.2)"])
    assert done.returncode == 0


def test_the_end_waits_for_no_reader():
    """Of a pipe that is full."""
    code = "import os, signal, time, jaxwan; jaxwan.end_on_signals(); print('ready', flush=True)"
    code += "; os.set_blocking(2, False)\ntry:\n  while True: os.write(2, b'x' * 4096)\nexcept BlockingIOError: pass"
    code += "\nos.set_blocking(2, True); os.kill(os.getpid(), signal.SIGINT); time.sleep(30)"
    process = subprocess.Popen([sys.executable, "-c", HEARD + code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.wait(timeout=10) == 130
    process.communicate()


def test_programs_of_the_last_second_are_removed_from_the_cache(tmp_path):
    before = jax.config.jax_compilation_cache_dir
    for name, age in {"old-cache": 60, "new-cache": 0, "notes": 0}.items():
        (tmp_path / name).write_text("")
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    try:
        for folder in (None, str(tmp_path / "absent"), str(tmp_path)):
            jax.config.update("jax_compilation_cache_dir", folder)
            _drop_latest()
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
    assert sorted(os.listdir(tmp_path)) == ["notes", "old-cache"]
    assert {_drop_latest, writing._remove_under_way} <= set(ending.leaving_nothing_half)
