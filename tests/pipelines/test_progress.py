"""What a person sees of a run, and how its time is told apart."""

import io
import os
import sys
import threading

import jax
import jax.numpy as jnp
import pytest

from jaxwan.pipelines import progress
from jaxwan.pipelines.progress import Progress


def compile_one(number):
    jax.jit(lambda x: x * number).lower(jnp.float32(1)).compile()


def test_a_phase_counts_what_it_compiles_itself_and_not_what_other_threads_do():
    phases = Progress(visible=False)
    with phases.phase("beside", 1, "it"):
        other = threading.Thread(target=compile_one, args=(3.0,))
        other.start()
        other.join()
    assert phases.seconds["compile"] == 0 < phases.seconds["beside"]
    with phases.phase("itself", 1, "it"):
        compile_one(5.0)
    assert phases.seconds["compile"] > 0 < phases.seconds["itself"]


def test_time_of_a_phase_that_counts_elsewhere_is_counted_once(monkeypatch):
    clock = iter([0.0, 10.0, 13.0, 20.0, 26.0, 30.0])
    monkeypatch.setattr(progress.time, "perf_counter", lambda: next(clock))
    phases = Progress(visible=False)
    with phases.phase("decode", 1, "frame"):
        for _ in range(2):
            with phases.elsewhere("write"):
                pass
    assert phases.seconds == {"write": 9, "decode": 21, "compile": 0}


def test_a_phase_that_fails_still_counts():
    phases = Progress()
    with pytest.raises(ValueError, match="no"), phases.phase("denoise", 3, "step"):
        raise ValueError("no")
    assert phases.seconds["denoise"] > 0


def run(total=3, unit="step", visible=True):
    with Progress(visible=visible).phase("denoise", total, unit) as update:
        for _ in range(min(total, 10)):
            update(max(1, total // 10))


def test_without_a_terminal_a_phase_is_a_plain_line(capsys):
    run()
    run(1)
    run(2_500_000, "B")
    out, err = capsys.readouterr()
    assert out == "" and "\r" not in err
    lines = err.splitlines()
    assert [line.split(" in ")[0] for line in lines] == ["denoise: 3 steps", "denoise: 1 step", "denoise: 2.5 MB"]


def test_a_long_phase_says_now_and_then_how_far_it_is(capsys, monkeypatch):
    clock = iter(range(0, 1000, 6))
    monkeypatch.setattr(progress.time, "perf_counter", lambda: next(clock))
    run(8)
    said = ["2 of 8 steps, 12 s, 36 s left", "4 of 8 steps, 24 s, 24 s left", "6 of 8 steps, 36 s, 12 s left"]
    lines = [f"denoise: {line}" for line in said]
    assert capsys.readouterr().err.splitlines() == [*lines, "denoise: 8 steps in 54.0 s"]


def test_a_long_phase_of_bytes_says_how_fast_it_is_and_how_long_the_rest_takes(capsys, monkeypatch):
    clock = iter(range(0, 1000, 6))
    monkeypatch.setattr(progress.time, "perf_counter", lambda: next(clock))
    run(120_000_000, "B")
    assert capsys.readouterr().err.splitlines()[1] == "denoise: 48.0 of 120.0 MB, 24 s, 2 MB/s, 36 s left"


def test_a_stderr_that_cannot_be_written_ends_no_phase(monkeypatch):
    with open("/dev/full", "w", buffering=1) as full:
        monkeypatch.setattr(sys, "stderr", full)
        run()
        os.dup2(os.open(os.devnull, os.O_WRONLY), full.fileno())  # for what is left to write


def test_in_a_terminal_a_bar_fills(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    run()
    shown = sys.stderr.getvalue()
    assert "denoise: 100%" in shown and "3/3" in shown


@pytest.mark.parametrize("how", [{"visible": False}, {"total": 0}])
def test_what_is_silent_or_does_nothing_shows_nothing(capsys, how):
    run(**how)
    assert capsys.readouterr() == ("", "")


def test_a_pipeline_logs_and_never_prints(pipeline, capsys, caplog):
    pipe = pipeline("2.1-t2v")  # without progress
    capsys.readouterr()
    with caplog.at_level("INFO", "jaxwan"):
        pipe("a", height=16, width=16, num_frames=1, num_inference_steps=1)
    assert capsys.readouterr() == ("", "")
    assert [record.name for record in caplog.records] == ["jaxwan.pipelines.pipeline"]
    assert caplog.messages[0].startswith("seed ")
