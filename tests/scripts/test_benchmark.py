"""The benchmark as a command: a rehearsal of everything on a CPU, runs that are cut, and children that end badly."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from jaxwan.bench.item import Item
from jaxwan.bench.plan import KINDS
from jaxwan.bench.presets import SMALL
from jaxwan.bench.report import Report, read_report

SCRIPT = Path(__file__).parents[2] / "scripts" / "benchmark.py"
# what is compiled here need not be fast, but be ready soon
QUICK = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_backend_optimization_level=0"}


def command(*arguments):
    return [sys.executable, str(SCRIPT), *map(str, arguments)]


def finish(*arguments):
    return subprocess.run(command(*arguments), env=QUICK, capture_output=True, text=True, timeout=1800)


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
    return folder, finish("all", "--preset", "small", "--runs", 2, "--output", folder)


def measured(folder):
    return {row.name: row for row in read_report(folder / "report.json").rows}


@pytest.mark.slow
def test_everything_is_measured_with_the_small_preset(rehearsal):
    folder, process = rehearsal
    assert process.returncode == 0, process.stderr
    rows = measured(folder)
    not_here = {"attention/small/cudnn": "cuDNN is not detected", "attention/small/tpu": "interpret mode",
                "blend/small/pallas": "interpret mode"}  # fmt: skip
    assert [name for name, row in rows.items() if row.status != "ok"] == list(not_here)
    assert all(reason in rows[name].reason for name, reason in not_here.items())
    for name in ("dit/small", "vae/small/float32/decode", "vae/small/float32/encode", "attention/small/xla",
                 "text/small", "block/small/6 layers", "e2e/small/whole clip"):  # fmt: skip
        row = rows[name]
        assert len(row.seconds) == 2 and row.median > 0 and row.ceiling > 0 and row.tflop > 0
        assert row.compile_seconds is None or row.compile_seconds > 0
        assert row.memory["arguments"] > 0 and row.memory["host_peak"] > 2**26
    assert 0.5 < rows["dit/small"].tflop / (SMALL.forward.total / 1e12) <= 1  # the text's part is made once a request
    report = read_report(folder / "report.json")
    assert report.environment["device"] == "cpu" and {"jax", "flax", "python", "host"} <= report.environment.keys()
    assert report.settings == {"measured": "all", "runs": 2, "budget": "none"}


@pytest.mark.slow
def test_calls_after_the_first_compile_nothing(rehearsal):
    rows = measured(rehearsal[0])
    compiled = [row.details["programs compiled"] for name, row in rows.items() if name.startswith("pipeline/")]
    assert compiled[0] > 2 and compiled[1:] == [0, 0]


@pytest.mark.slow
def test_a_second_process_reads_compiled_programs(rehearsal):
    rows = measured(rehearsal[0])
    for form, read in (("cold", False), ("warm", True)):
        programs = {name: row for name, row in rows.items() if name.startswith(f"compile/small/{form}/")}
        total = programs.pop(f"compile/small/{form}/all programs")
        assert len(programs) >= 4 and {row.details["read from the cache"] for row in programs.values()} == {read}
        assert total.compile_seconds == pytest.approx(sum(row.compile_seconds for row in programs.values()))


@pytest.mark.slow
def test_where_the_time_goes_is_told_by_scope(rehearsal):
    folder, _ = rehearsal
    shares = {name.rpartition("/")[2]: row.details["share"] for name, row in measured(folder).items()
              if name.startswith("block/small/profile/")}  # fmt: skip
    assert shares.keys() == {"self_attention", "cross_attention", "mlp", "the rest"}
    assert sum(shares.values()) == pytest.approx(1) and min(shares.values()) > 0.01
    assert list((folder / "profile" / "small").rglob("*.xplane.pb"))


@pytest.mark.slow
def test_growth_is_a_table_and_a_picture(rehearsal):
    folder, _ = rehearsal
    axes = {row.details["axis"] for name, row in measured(folder).items() if name.startswith("growth/")}
    assert axes == {"steps", "requests", "frames", "layers"} and (folder / "growth.png").stat().st_size > 10_000


@pytest.mark.slow
def test_the_report_reads_well(rehearsal):
    folder, process = rehearsal
    text = (folder / "report.md").read_text()
    table = [line for line in text.splitlines() if line.startswith("| ") and line.count("|") > 4]
    assert len({line.count("|") for line in table}) == 1 and len(table) == 2 + len(measured(folder))
    assert "as a whole, 4 guided steps, 2 experts" in text and "loop / sum of its forwards" in text
    assert process.stdout.splitlines()[-1] == f"report: {folder / 'report.json'}, {folder / 'report.md'}"


@pytest.mark.slow
def test_what_does_not_fit_the_budget_is_skipped(rehearsal, tmp_path):
    old = rehearsal[0] / "report.json"
    process = finish("all", "--preset", "small", "--budget", "1s", "--output", tmp_path, "--compare", old)
    rows = read_report(tmp_path / "report.json").rows
    assert process.returncode == 0 and len(rows) == 19
    assert all(row.status == "skipped" and "of the budget left" in row.reason for row in rows)
    assert "## Against the older report" in (tmp_path / "report.md").read_text()


def test_a_run_that_is_cut_while_a_child_starts_leaves_no_child(script, monkeypatch):
    started = []

    def start(*_):
        started.append(subprocess.Popen(["sleep", "60"], stdout=subprocess.PIPE, text=True))
        signal.raise_signal(signal.SIGTERM)
        return started[0]

    monkeypatch.setattr(script, "start_child", start)
    usual = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        with pytest.raises(SystemExit):
            list(script.measured_rows(Item("ceilings", SMALL), "", 60.0, Report({})))
    finally:
        signal.signal(signal.SIGTERM, usual)
    assert started[0].returncode == -signal.SIGKILL


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
    assert [row.status for row in rows] == ["ok"] * 3 + ["pending"] * 18
    assert {row.reason for row in rows[3:]} == {"not measured: the run ended before"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.json", "report.md"]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "case"), [("dit", "a layer"), ("vae", "decode"), ("sampler", "4 steps")])
def test_diffusers_does_the_same_in_turns(tmp_path, kind, case):
    process = finish(kind, "--against", "diffusers", "--preset", "small", "--runs", 2, "--output", tmp_path)
    rows = measured(tmp_path)
    assert process.returncode == 0 and {row.status for row in rows.values()} == {"ok"}, rows
    for mode in ("eager",) if kind == "vae" else ("eager", "compiled"):
        ours, theirs = (next(row for name, row in rows.items() if name.endswith(f"{mode}/{case}/{side}"))
                        for side in ("jaxwan", "diffusers"))  # fmt: skip
        assert len(ours.seconds) == len(theirs.seconds) == 2
        assert theirs.details["diffusers / jaxwan"] == pytest.approx(theirs.median / ours.median)
    assert any(row.details.get("torch") and row.details.get("threads") in (1, 2) for row in rows.values())


@pytest.mark.slow
def test_the_engine_is_measured_with_requests_and_in_segments(tmp_path):
    process = finish("engine", "--preset", "small", "--runs", 1, "--output", tmp_path)
    rows = measured(tmp_path)
    assert process.returncode == 0 and {row.status for row in rows.values()} == {"ok"}, rows
    assert list(rows) == ["engine/small/requests/pp=1", "engine/small/requests/pp=4", "engine/small/segments"]


@pytest.mark.slow
def test_a_flag_that_the_backend_rejects_is_a_row(tmp_path):
    flags = ("--flag=--xla_no_such_flag=1", "--flag=--xla_cpu_enable_fast_math=true")
    process = finish("flags", "--preset", "small", "--runs", 1, *flags, "--output", tmp_path)
    rows = measured(tmp_path)
    assert process.returncode == 0 and len(rows) == 4
    (rejected,) = (row for row in rows.values() if row.status == "failed")
    assert rejected.name == "flags/small/--xla_no_such_flag=1/rest" and "xla_no_such_flag" in rejected.reason
    assert rows["flags/small/none"].details["why"] == rows["flags/small/none again"].details["why"] == "to compare with"


def test_one_measurement_from_the_command_line_to_the_report(tmp_path):
    process = finish("text", "--preset", "small", "--runs", 1, "--output", tmp_path)
    assert process.returncode == 0, process.stderr
    (row,) = measured(tmp_path).values()
    assert row.name == "text/small" and row.median > 0 and row.tflop > 0
    assert "| text/small |" in (tmp_path / "report.md").read_text()


def test_each_process_has_the_settings_of_its_item(script, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_a=1")
    assert script.child_settings(Item("dit", SMALL), "/s") == {"TMPDIR": "/s"}
    assert script.child_settings(Item("flags", SMALL, "--xla_b=2"), "/s")["XLA_FLAGS"] == "--xla_a=1 --xla_b=2"
    assert "XLA_FLAGS" not in script.child_settings(Item("flags", SMALL, "none again"), "/s")
    cold, warm = (script.child_settings(Item("compile", SMALL, form), "/s") for form in ("cold", "warm"))
    assert cold == warm and cold["JAX_COMPILATION_CACHE_DIR"] == "/s/compiled/small"
    assert cold["JAX_ENABLE_COMPILATION_CACHE"] == "true"


@pytest.mark.parametrize(
    ("code", "timeout", "reason"),
    [
        ("raise MemoryError('too big')", 60, "its process ended with status 1: MemoryError: too big"),
        ("import os; os.abort()", 60, f"its process ended with status {-signal.SIGABRT}: "),
        ("import time; time.sleep(60)", 1, "took longer than 1 s"),
    ],
)
def test_a_child_that_ends_badly_is_a_row(script, monkeypatch, tmp_path, code, timeout, reason):
    first = json.dumps({"name": "dit/small", "status": "ok"})
    code = f"print('a warning'); print('ROW {first}', flush=True); {code}"
    monkeypatch.setattr(script, "start_child", lambda *_: subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))  # fmt: skip
    rows = list(script.measured_rows(Item("dit", SMALL), str(tmp_path), timeout, Report({})))
    assert [(row.name, row.status) for row in rows] == [("dit/small", "ok"), ("dit/small/rest", "failed")]
    assert rows[1].reason == reason


def test_help_names_every_flag():
    process = finish("--help")
    for flag in ("--preset", "--budget", "--runs", "--output", "--compare", "--against", "--profile", "--flag", "small",
                 "t2v-a14b-720p"):  # fmt: skip
        assert flag in process.stdout
    assert f"{{{','.join(KINDS)}}}" in process.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["dit", "--budget", "soon"], "'soon' is no duration above 0, such as 540s, 9m or 1h"),
        (["dit", "--runs", "0"], "'0' must be a whole number from 1"),
        (["dit", "--compare", "nowhere.json"], "nowhere.json"),
        (["dit", "--preset", "large"], "invalid choice: 'large'"),
        (["load", "--against", "diffusers", "--output", "out"], "--against is for dit, vae, sampler, not for load"),
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
