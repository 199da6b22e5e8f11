"""The benchmark as a command: a rehearsal of everything on a CPU, runs that are cut, and children that end badly."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from jaxwan.bench.items import Item
from jaxwan.bench.presets import SMALL
from jaxwan.bench.report import Report, read_report

SCRIPT = Path(__file__).parents[2] / "scripts" / "benchmark.py"
# what is compiled here need not be fast, but be ready soon
QUICK = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_backend_optimization_level=0"}


def command(*arguments):
    return [sys.executable, str(SCRIPT), *map(str, arguments)]


def finish(*arguments):
    return subprocess.run(command(*arguments), env=QUICK, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def script():
    specification = importlib.util.spec_from_file_location("benchmark_script", SCRIPT)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory):
    """(folder, finished process) of everything with the small preset."""
    folder = tmp_path_factory.mktemp("rehearsal")
    return folder, finish("all", "--preset", "small", "--budget", "5m", "--runs", 2, "--output", folder)


@pytest.mark.slow
def test_everything_is_measured_with_the_small_preset(rehearsal):
    folder, process = rehearsal
    assert process.returncode == 0, process.stderr
    report = read_report(folder / "report.json")
    rows = {row.name: row for row in report.rows}
    assert [name for name, row in rows.items() if row.status != "ok"] == ["attention/small/cudnn"]
    assert "cuDNN is not detected" in rows["attention/small/cudnn"].reason
    assert {name.removeprefix("pipeline/small/") for name in rows if name.startswith("pipeline")} == {
        "text", "step", "decode", "whole clip",
    }  # fmt: skip
    timed = {"dit/small", "vae/small/float32/decode", "vae/small/float32/encode", "attention/small/xla"}
    for name in timed:
        row = rows[name]
        assert len(row.seconds) == 2 and row.median > 0 and row.compile_seconds > 0 and row.ceiling > 0
        assert row.tflop > 0 and row.memory["arguments"] > 0 and row.memory["host_peak"] > 2**26
    assert rows["dit/small"].tflop == pytest.approx(SMALL.forward.total / 1e12)
    assert report.environment["device"] == "cpu" and {"jax", "flax", "python", "host"} <= report.environment.keys()
    assert report.settings == {"measured": "all", "runs": 2, "budget": "300 s"}


@pytest.mark.slow
def test_the_report_reads_well(rehearsal):
    folder, process = rehearsal
    text = (folder / "report.md").read_text()
    table = [line for line in text.splitlines() if line.startswith("| ") and line.count("|") > 4]
    assert len({line.count("|") for line in table}) == 1 and len(table) == 2 + len(
        read_report(folder / "report.json").rows
    )
    assert "extrapolated" in text and "not measured as a whole" in text
    assert process.stdout.splitlines()[-1] == f"report: {folder / 'report.json'}, {folder / 'report.md'}"


@pytest.mark.slow
def test_what_does_not_fit_the_budget_is_skipped(rehearsal, tmp_path):
    old = rehearsal[0] / "report.json"
    process = finish("all", "--preset", "small", "--budget", "1s", "--output", tmp_path, "--compare", old)
    rows = read_report(tmp_path / "report.json").rows
    assert process.returncode == 0 and len(rows) == 6
    assert all(row.status == "skipped" and "of the budget left" in row.reason for row in rows)
    assert "## Against the older report" in (tmp_path / "report.md").read_text()


@pytest.mark.slow
def test_a_run_that_is_cut_leaves_a_valid_report(tmp_path):
    arguments = command("all", "--preset", "small", "--runs", 1, "--output", tmp_path)
    with subprocess.Popen(arguments, env=QUICK, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        for line in process.stdout:
            if line.startswith("[2/"):
                break
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGTERM
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)  # no child is left
    rows = read_report(tmp_path / "report.json").rows
    assert [row.status for row in rows] == ["ok"] * 3 + ["pending"] * 5
    assert {row.reason for row in rows[3:]} == {"not measured: the run ended before"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.json", "report.md"]


@pytest.mark.parametrize(
    ("code", "timeout", "reason"),
    [
        ("raise MemoryError('too big')", 60, "its process ended with status 1: MemoryError: too big"),
        ("import os; os.abort()", 60, f"its process ended with status {-signal.SIGABRT}: "),
        ("import time; time.sleep(60)", 1, "took longer than 1 s"),
    ],
)
def test_a_child_that_ends_badly_is_a_row(script, monkeypatch, code, timeout, reason):
    first = json.dumps({"name": "dit/small", "status": "ok"})
    code = f"print('a warning'); print('ROW {first}', flush=True); {code}"
    monkeypatch.setattr(script, "start_child", lambda *_: subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))  # fmt: skip
    rows = list(script.measured_rows(Item("dit", SMALL), 1, timeout, Report({})))
    assert [(row.name, row.status) for row in rows] == [("dit/small", "ok"), ("dit/small/rest", "failed")]
    assert rows[1].reason == reason


def test_help_names_every_flag():
    process = finish("--help")
    for flag in ("--preset", "--budget", "--runs", "--output", "--compare", "t2v-a14b-720p", "small"):
        assert flag in process.stdout
    assert "{ceilings,attention,dit,vae,pipeline,all}" in process.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["dit", "--budget", "soon"], "'soon' is no duration above 0, such as 540s, 9m or 1h"),
        (["dit", "--runs", "0"], "'0' must be a whole number from 1"),
        (["dit", "--compare", "nowhere.json"], "nowhere.json"),
        (["dit", "--preset", "large"], "invalid choice: 'large'"),
    ],
)
def test_bad_arguments_are_explained(script, capsys, arguments, words):
    try:
        status = script.main(arguments)
    except SystemExit as end:
        status = end.code
    assert status and words in capsys.readouterr().err


def test_the_report_lies_in_a_dated_folder_by_default(script):
    folder = script.default_folder("NVIDIA H200")
    assert folder.parent == SCRIPT.parents[1] / "docs" / "benchmarks" and folder.name.endswith("-nvidia-h200")
