"""The report of a benchmark: rows, and the JSON and Markdown that are rewritten after every one of them."""

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

JSON_NAME, MARKDOWN_NAME = "report.json", "report.md"
PENDING = "not measured: the run ended before"
_COLUMNS = ("measurement", "median s", "min – max s", "runs", "compile s", "TFLOP", "TFLOP/s", "of ceiling",
            "of peak", "memory GiB", "remarks")  # fmt: skip


@dataclass
class Row:
    """One measurement, or the reason why there is none."""

    name: str  # "dit/t2v-a14b-720p"
    status: str = "pending"  # "ok", "skipped" (with a reason) or "failed" (with a reason)
    reason: str = PENDING
    seconds: list[float] = field(default_factory=list)  # of each measured call
    compile_seconds: float | None = None
    tflop: float | None = None  # of one call
    ceiling: float | None = None  # TFLOP/s of the matrix product measured beside it
    peak: float | None = None  # TFLOP/s in the data sheet
    memory: dict[str, int] = field(default_factory=dict)  # bytes
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def median(self) -> float | None:
        """Median of the seconds."""
        return median(self.seconds) if self.seconds else None

    @property
    def rate(self) -> float | None:
        """TFLOP/s at the median."""
        return self.tflop / self.median if self.tflop is not None and self.median else None

    def cells(self) -> list[str]:
        """The row of the Markdown table."""
        spread = f"{min(self.seconds):.4g} – {max(self.seconds):.4g}" if self.seconds else ""
        memory = max(self.memory.values()) / 2**30 if self.memory else None
        remarks = [f"{self.status}: {self.reason}"] if self.status != "ok" else []
        remarks += [f"{key} {_number(value)}" for key, value in self.details.items()]
        return [
            self.name, _number(self.median), spread, str(len(self.seconds) or ""), _number(self.compile_seconds),
            _number(self.tflop), _number(self.rate), _share(self.rate, self.ceiling), _share(self.rate, self.peak),
            _number(memory), "; ".join(remarks).replace("|", "/").replace("\n", " "),
        ]  # fmt: skip


@dataclass
class Report:
    """All rows of a run in their order, with what they were measured on."""

    settings: dict[str, Any]
    environment: dict[str, Any] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)

    def replace(self, name: str, rows: list[Row]) -> None:
        """Put rows in the place of the one called `name`."""
        at = next(i for i, row in enumerate(self.rows) if row.name == name)
        self.rows[at : at + 1] = rows

    def write(self, folder: Path, comparison: str = "") -> None:
        """Both files, each complete at any moment: written beside, then renamed."""
        data = {"settings": self.settings, "environment": self.environment}
        rows = [asdict(row) | {"median": row.median, "tflop_per_second": row.rate} for row in self.rows]
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in (
            (JSON_NAME, json.dumps(data | {"rows": rows}, indent=1) + "\n"),
            (MARKDOWN_NAME, self.markdown() + comparison),
        ):
            beside = folder / f".{name}.{os.getpid()}"
            beside.write_text(text)
            beside.replace(folder / name)

    def markdown(self) -> str:
        """The report to read."""
        known = {**self.environment, **self.settings}
        lines = ["# Benchmark", "", "| | |", "| --- | --- |"]
        lines += [f"| {key} | {value} |" for key, value in known.items()]
        lines += ["", _line(_COLUMNS), _line(["---"] * len(_COLUMNS))]
        lines += [_line(row.cells()) for row in self.rows]
        return "\n".join(lines) + "\n"


def read_report(path: str | Path) -> Report:
    """A report written by `Report.write`. Raises ValueError for what is none."""
    try:
        data = json.loads(Path(path).read_text())
        rows = [
            Row(**{k: v for k, v in row.items() if k not in ("median", "tflop_per_second")}) for row in data["rows"]
        ]
        return Report(data["settings"], data["environment"], rows)
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is no benchmark report: {error}") from error


def compare(new: Report, old: Report) -> str:
    """A Markdown table of the medians of both, and what differs between their environments."""
    before = {row.name: row for row in old.rows}
    lines = ["", "## Against the older report", "", _line(("measurement", "old s", "new s", "old / new")),
             _line(["---"] * 4)]  # fmt: skip
    for row in new.rows:
        past = before.get(row.name)
        if past is not None and past.median and row.median:
            lines.append(
                _line((row.name, _number(past.median), _number(row.median), f"{past.median / row.median:.3f}"))
            )
    keys = {**old.environment, **new.environment}
    differing = [k for k in keys if old.environment.get(k) != new.environment.get(k)]
    lines += [""] + [f"{k}: was {old.environment.get(k)}, is {new.environment.get(k)}" for k in differing]
    return "\n".join(lines) + "\n"


def _line(cells: Any) -> str:
    return "| " + " | ".join(cells) + " |"


def _number(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    return "" if value is None else str(value)


def _share(rate: float | None, of: float | None) -> str:
    return f"{rate / of:.0%}" if rate is not None and of else ""
