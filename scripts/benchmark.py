"""Measure the speed of everything, with random weights at the official sizes.

    python scripts/benchmark.py all --budget 9m              one GPU: what matters most comes first
    python scripts/benchmark.py dit --preset t2v-a14b-720p   one model evaluation of one preset
    python scripts/benchmark.py all --preset small           a rehearsal on a CPU
    python scripts/benchmark.py mesh --preset pair           two devices against one, on two cores of a CPU
    python scripts/benchmark.py engine --preset tiny         requests that arrive at random, through the engine
    python scripts/benchmark.py mesh-plan --preset pair      what `--mesh auto` expects against what meshes take
    python scripts/benchmark.py dit --against diffusers      the same by Diffusers, in turns (also vae, sampler)

Measurements: ceilings (matrix product, memory), attention (each implementation, checked against float32), dit (a model
evaluation in the pipeline ring), block (one layer by slope, with --profile where its time goes), vae (whole videos,
both directions, and its convolutions), convolution (each kind that the VAE has in each form), blend (a chunk of tiles,
each implementation), text (a prompt), sampler (what the loop adds to its forwards), pipeline (calls as a user makes
them, and what they compile), load (a checkpoint made on the spot), e2e (a whole clip; at full size from a few steps),
compile (without and with the persistent cache), growth (with steps, requests, frames and layers, as a picture), mesh
(each mesh axis against one device), mesh-plan (the planner's estimates against several meshes, and the efficiencies
that fit), engine (random requests against one after the other and fixed batches; what segments of a long run cost),
flags (XLA's). Each runs in a process of its own, one after the other.

The report, report.json and report.md, is rewritten after every measurement, so a run that is cut leaves a valid one.
What does not fit the budget is skipped, and what cannot run here says why. Needs jax, flax, numpy, jaxtyping and
safetensors; where jaxwan is not installed, set PYTHONPATH to the repository.
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import date
from pathlib import Path
from threading import Event, Timer
from typing import Any

from jaxwan.bench.child import ENVIRONMENT, ROW
from jaxwan.bench.item import Item
from jaxwan.bench.picture import draw_growth
from jaxwan.bench.plan import COMPARABLE, KINDS, make_items, predicted_seconds
from jaxwan.bench.presets import FULL_SIZE, PRESETS
from jaxwan.bench.report import JSON_NAME, MARKDOWN_NAME, Report, Row, compare, read_report

ROOT = Path(__file__).resolve().parents[1]
CRASH = re.compile(
    r"[\w.]*(Error|Exception|Interrupt|FATAL|F\d{4} )|Killed|Aborted"
)  # the line that says what happened
UNITS = {"s": 1, "m": 60, "h": 3600}
SLACK = 3  # a child may take this many times its predicted seconds, and GRACE more
GRACE = 60


def main(argv: list[str] | None = None) -> int:
    """Run the command; 0, or 1 after bad input was explained in a sentence."""
    args = parse(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        old = None if args.compare is None else read_report(args.compare)
        environment = {} if args.output else child_environment()
        folder = Path(args.output) if args.output else default_folder(environment["device"])
        items = planned(args, folder)
        folder.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    try:
        run(args, items, Report(settings(args), environment, [Row(item.name) for item in items]), folder, old)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    finally:
        print(f"report: {folder / JSON_NAME}, {folder / MARKDOWN_NAME}", flush=True)
    return 0


def planned(args: argparse.Namespace, folder: Path) -> list[Item]:
    """The items of a command line."""
    presets = [PRESETS[name] for name in args.preset or FULL_SIZE]
    profile = str((folder / "profile").resolve()) if args.profile or args.what == "all" else ""
    return make_items(args.what, presets, against=args.against, runs=args.runs, profile=profile, flags=tuple(args.flag))


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """What the report says about the command line."""
    found = {"measured": args.what, "runs": args.runs, "budget": f"{args.budget:g} s" if args.budget else "none"}
    return found | ({"against": args.against} if args.against else {})


def run(args: argparse.Namespace, items: list[Item], report: Report, folder: Path, old: Report | None) -> None:
    """Measure item after item, and write the report before the first and after every row."""
    start = time.monotonic()

    def write() -> None:
        report.write(folder, "" if old is None else compare(report, old))

    write()
    with tempfile.TemporaryDirectory(prefix="jaxwan-benchmark-") as scratch:
        for number, item in enumerate(items, 1):
            left = float("inf") if args.budget is None else args.budget - (time.monotonic() - start)
            predicted = predicted_seconds(item)
            print(f"[{number}/{len(items)}] {item.name}: about {predicted:.0f} s", flush=True)
            if predicted > left:
                reason = f"predicted {predicted:.0f} s, {max(left, 0):.0f} s of the budget left"
                report.replace(item.name, [Row(item.name, "skipped", reason)])
                write()
                continue
            rows: list[Row] = []
            for row in measured_rows(item, scratch, min(left, SLACK * predicted + GRACE), report):
                print(f"    {row.name}: {summary(row)}", flush=True)
                add_ceiling(row, report)
                report.replace((rows or [Row(item.name)])[-1].name, [*rows[-1:], row])
                rows.append(row)
                write()
            if item.kind == "growth" and (picture := draw_growth(report.rows, folder)) is not None:
                print(f"    picture: {picture}", flush=True)
    write()


def measured_rows(item: Item, scratch: str, timeout: float, report: Report) -> Iterator[Row]:
    """The rows of an item as its process writes them; of one that ends badly, a last row that says how."""
    expired, last = Event(), ""
    with ExitStack() as at_the_end:
        with deferred(signal.SIGTERM):  # which could come when the child runs and no one knows it yet
            process = start_child(child_settings(item, scratch), item.to_json())
            at_the_end.callback(process.wait)
            at_the_end.callback(process.kill)
        timer = Timer(timeout, lambda: (expired.set(), process.kill()))
        at_the_end.callback(timer.cancel)
        timer.start()
        for line in process.stdout or ():
            if line.startswith(ENVIRONMENT):
                report.environment = report.environment or json.loads(line.removeprefix(ENVIRONMENT))
            elif line.startswith(ROW):
                yield Row(**json.loads(line.removeprefix(ROW)))
            elif CRASH.match(line):
                last = line.strip()
        status = process.wait()
        if expired.is_set():
            yield Row(f"{item.name}/rest", "failed", f"took longer than {timeout:.0f} s")
        elif status:
            yield Row(f"{item.name}/rest", "failed", f"its process ended with status {status}: {last[:300]}")


@contextmanager
def deferred(number: signal.Signals) -> Iterator[None]:
    """A signal that comes while the block runs is acted on behind it."""
    came: list[int] = []
    usual = signal.signal(number, lambda number, _: came.append(number))
    try:
        yield
    finally:
        signal.signal(number, usual)
        if came:
            signal.raise_signal(number)


def child_settings(item: Item, scratch: str) -> dict[str, str]:
    """Environment variables of an item's process. What it leaves in `scratch` is gone after the run."""
    found = {"TMPDIR": scratch}
    if item.kind == "compile":
        found |= {"JAX_ENABLE_COMPILATION_CACHE": "true"}
        found |= {"JAX_COMPILATION_CACHE_DIR": str(Path(scratch) / "compiled" / item.preset.name)}
        if not item.preset.needs_accelerator:  # small programs compile faster than what JAX cares to keep
            found |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    if item.kind == "flags" and item.form.startswith("--"):
        found |= {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {item.form}".strip()}
    return found


def start_child(settings: dict[str, str], *arguments: str) -> subprocess.Popen:
    """A process that measures; its stderr is in its stdout, so that the last line of a crash is at hand."""
    environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "JAX_ENABLE_COMPILATION_CACHE": "false"}
    command = [sys.executable, "-m", "jaxwan.bench.child", *arguments]
    return subprocess.Popen(
        command, env=environment | settings, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def child_environment() -> dict[str, Any]:
    """Hardware and versions, asked of a child: this process leaves the accelerator alone.

    Raises OSError when it cannot start.
    """
    output, _ = start_child({}).communicate()
    for line in output.splitlines():
        if line.startswith(ENVIRONMENT):
            return json.loads(line.removeprefix(ENVIRONMENT))
    raise OSError(f"a measuring process does not start: {output.strip().splitlines()[-1:]}")


def add_ceiling(row: Row, report: Report) -> None:
    """Rows that have no ceiling measured beside them take the run's first one."""
    known = [r.rate for r in report.rows if r.name.startswith("ceilings/") and r.name.endswith("square matmul")]
    if row.ceiling is None and known:
        row.ceiling = known[0]


def summary(row: Row) -> str:
    """One line for the terminal."""
    if row.status != "ok":
        return f"{row.status}: {row.reason}"
    if row.median is None:
        compiled = [] if row.compile_seconds is None else [f"compiled in {row.compile_seconds:.4g} s"]
        return ", ".join(compiled + [f"{key} {value}" for key, value in row.details.items()])
    rate = "" if row.rate is None else f", {row.rate:.4g} TFLOP/s"
    return f"{row.median:.4g} s{rate}"


def default_folder(device: str) -> Path:
    """docs/benchmarks/DATE-DEVICE of this repository."""
    name = "".join(c if c.isalnum() else "-" for c in device.lower()).strip("-")
    return ROOT / "docs" / "benchmarks" / f"{date.today().isoformat()}-{name}"


def duration(text: str) -> float:
    """Seconds of "540", "540s", "9m" or "1h"."""
    number, unit = (text[:-1], text[-1]) if text[-1:] in UNITS else (text, "s")
    try:
        seconds = float(number) * UNITS[unit]
    except ValueError:
        seconds = 0.0
    if not seconds > 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no duration above 0, such as 540s, 9m or 1h")
    return seconds


def runs(text: str) -> int:
    """A count of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number from 1")
    return int(text)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=KINDS, help="what to measure")
    parser.add_argument("--preset", action="append", choices=tuple(PRESETS), metavar="NAME",
                        help=f"model and size, once or several times: {', '.join(PRESETS)}; "
                             "default: all of full size")  # fmt: skip
    parser.add_argument("--budget", type=duration, help="time for the whole run, such as 9m; default: no limit")
    parser.add_argument("--runs", type=runs, default=3, help="measured calls of each executable; default %(default)s")
    parser.add_argument("--against", choices=("diffusers",), default="", metavar="diffusers",
                        help=f"the same by Diffusers, in turns with ours: {', '.join(COMPARABLE)}")  # fmt: skip
    parser.add_argument(
        "--profile", action="store_true", help="of block: also where the time goes, and a trace; part of all"
    )
    parser.add_argument("--flag", action="append", default=[], metavar="--xla_…=…",
                        help="of flags: an XLA flag to try, once or several times, as in --flag=--xla_x=1; "
                             "default: a few that are worth it")  # fmt: skip
    parser.add_argument("--output", metavar="DIR", help="of the report; default docs/benchmarks/DATE-DEVICE")
    parser.add_argument("--compare", metavar="OLD.json", help="also tell how times differ from an older report")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
