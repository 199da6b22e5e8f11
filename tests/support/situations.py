"""Ten situations that people are in, and the tables of docs/mesh_plans.md made of what the planner says to them.

    python tests/support/situations.py      prints the tables, to be put in their place

`tests/test_docs.py` compares. JAX takes 92 % of a card here, as in commands.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from published import write_configs

from jaxwan.pipelines.checkpoint import Checkpoint, read_checkpoint
from jaxwan.pipelines.chips import CHIPS, LINKS
from jaxwan.pipelines.plan import against, label, plan_mesh

A14B, TI2V, SMALL = "Wan2.2-T2V-A14B", "Wan2.2-TI2V-5B", "Wan2.1-T2V-1.3B"
P480 = dict(height=480, width=832)
# what is to be made, on what, model, arguments of `plan_mesh`
SITUATIONS: list[tuple[str, str, str, dict[str, Any]]] = [
    ("A14B, 720p", "1 x 80 GB", A14B, dict(devices=1, chip="H100")),
    ("A14B, 720p", "2 x 24 GB", A14B, dict(devices=2, chip="RTX 4090")),
    ("A14B, 720p", "4 x 80 GB", A14B, dict(devices=4, chip="H100")),
    ("A14B, 720p", "8 x 80 GB", A14B, dict(devices=8, chip="H100")),
    ("A14B, 720p", "2 hosts of 8 x 80 GB", A14B, dict(devices=16, chip="H100", devices_per_host=8)),
    ("5B, 704p", "1 x 24 GB", TI2V, dict(devices=1, chip="RTX 4090")),
    ("1.3B, 480p", "1 x 16 GB", SMALL, dict(devices=1, device_memory="16GB")),
    ("A14B, 480p", "8 x 24 GB, PCIe", A14B, dict(devices=8, chip="RTX 4090", **P480)),
    ("A14B, 480p, 8 videos", "8 x 24 GB, PCIe", A14B, dict(devices=8, chip="RTX 4090", requests=8, **P480)),
    ("A14B, 720p, 2 videos", "2 hosts of 4 x 80 GB", A14B,
     dict(devices=8, chip="H100", devices_per_host=4, requests=2)),
]  # fmt: skip


def plans_table(checkpoint_of: Callable[[str], Checkpoint]) -> str:
    """What is chosen in each situation, and what comes next."""
    lines = ["| what | on | chosen | a device | seconds | next, and what would be faster |", "| --- " * 6 + "|"]
    for what, machine, model, given in SITUATIONS:
        try:
            plan = plan_mesh(checkpoint_of(model), **given)
        except ValueError as refused:
            told = str(refused).split(" fits: ")[1]
            lines.append(f"| {what} | {machine} | nothing fits | | | {told} |")
            continue
        others = [row for row in plan.rows[1:] if row.fits][:2] + [row for row in plan.rows if not row.fits][:1]
        told = "; ".join(f"`{label(row.mesh)}` {against(row, plan.seconds, plan.room)}" for row in others)
        taken = f"{plan.seconds:,.0f}"
        memory = f"{plan.bytes / 2**30:.1f} of {(plan.room or 0) / 2**30:.1f} GiB"
        lines.append(f"| {what} | {machine} | `{label(plan.mesh)}` | {memory} | {taken} | {told} |")
    return "\n".join(lines)


def chips_table() -> str:
    """The chips, by data sheet and estimate."""
    lines = ["| chip | bfloat16, TFLOP/s | memory, GB | link | DiT reaches | VAE reaches |", "| --- " * 6 + "|"]
    for chip in CHIPS.values():
        if not chip.shared:
            sheet = f"{chip.peak / 1e12:.0f} | {chip.memory / 1e9:.0f} | {chip.link}"
            lines.append(f"| {chip.name} | {sheet} | {chip.dit:.2f} | {chip.vae:.2f} |")
    return "\n".join(lines)


def links_table() -> str:
    """The links, by data sheet and estimate."""
    lines = ["| link | GB/s that are sent | reached | before it moves, µs |", "| --- " * 4 + "|"]
    for link in LINKS.values():
        if link.name != "memory":
            lines.append(f"| {link.name} | {link.rate / 1e9:g} | {link.reached:.2f} | {link.latency * 1e6:.0f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    import os

    os.environ["XLA_CLIENT_MEM_FRACTION"] = "0.92"
    with tempfile.TemporaryDirectory() as scratch:
        made = {n: read_checkpoint(write_configs(Path(scratch, n), n)) for n in (A14B, TI2V, SMALL)}
        print(plans_table(made.__getitem__), chips_table(), links_table(), sep="\n\n")
