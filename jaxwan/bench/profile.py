"""Where the time of a program goes: a trace of JAX's profiler, summed by the named scopes of the model."""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jax

from jaxwan.bench.item import Item
from jaxwan.bench.report import Row

SCOPES = ("self_attention", "cross_attention", "mlp")  # of a block; all else is "the rest"
REST = "the rest"
NAMED = re.compile(r'^\s*(?:ROOT )?%?([\w.-]+) = .*?op_name="([^"]*)"', re.MULTILINE)
CONTAINERS = re.compile(r"(while|call|conditional)\b")  # their time is that of the operations inside
CALLS = 2
SHOWN = 6  # operations of a scope that are named


def profile_rows(item: Item, forward: Any) -> Iterator[Row]:
    """One row a scope: seconds of one call that the device spent in its operations, and the largest of them.

    Operations may run at the same time, so that their sum is not the time of a call. The trace stays in the item's
    folder; its rows say why where a platform names no operations.
    """
    folder = Path(item.profile) / item.preset.name
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    with jax.profiler.trace(str(folder), profiler_options=options):
        for _ in range(CALLS):
            jax.block_until_ready(forward.run())
    found = sorted(folder.rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime)
    spent = operation_seconds(jax.profiler.ProfileData.from_file(str(found[-1])).planes) if found else {}
    if not spent:
        yield item.no_row("profile", "skipped", f"the profiler names no operations here; its trace is in {folder}")
        return
    scopes = by_scope(spent, dict(NAMED.findall(forward.executable.as_text())))
    total = sum(spent.values())
    for scope, operations in scopes.items():
        largest = sorted(operations.items(), key=lambda pair: -pair[1])[:SHOWN]
        shares = ", ".join(f"{name} {seconds / total:.1%}" for name, seconds in largest)
        seconds = sum(operations.values())
        yield item.row(
            f"profile/{scope}", seconds=[seconds / CALLS],
            details={"share": seconds / total, "operations": len(operations), "largest": shares},
        )  # fmt: skip


def operation_seconds(planes: Iterable[Any]) -> dict[str, float]:
    """Operation -> seconds, over all of a trace: of the devices' own planes, or the host's where it is the device."""
    planes = list(planes)
    devices = [plane for plane in planes if plane.name.startswith("/device:")]
    spent: dict[str, float] = defaultdict(float)
    for plane in devices or planes:
        for line in plane.lines:
            for event in line.events:
                name = dict(event.stats).get("hlo_op")
                if name is not None and not event.name.startswith("end: ") and not CONTAINERS.match(name):
                    spent[name] += event.duration_ns / 1e9
    return dict(spent)


def by_scope(spent: dict[str, float], named: dict[str, str]) -> dict[str, dict[str, float]]:
    """Scope -> its operations. named: operation -> path of scopes, from the program's text."""
    scopes: dict[str, dict[str, float]] = {scope: {} for scope in (*SCOPES, REST)}
    for operation, seconds in spent.items():
        path = named.get(operation, "").split("/")
        scopes[next((scope for scope in SCOPES if scope in path), REST)][operation] = seconds
    return scopes
