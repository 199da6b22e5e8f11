"""What the planner expects of meshes against what they take, and the efficiencies that would make both agree.

Virtual CPU devices work too: of them ratios alone are worth something, and only on a machine that does nothing else.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from statistics import median

import jax
import numpy as np

from jaxwan.bench.clip import make_checkpoint
from jaxwan.bench.item import Item, dtype
from jaxwan.bench.mesh import LAYERS, VIDEOS, Denoising
from jaxwan.bench.report import Row
from jaxwan.pipelines.call import make_job
from jaxwan.pipelines.chips import LINKS, Machine, find_chip
from jaxwan.pipelines.dry_run import dealt, present_memory
from jaxwan.pipelines.plan import Search, Tick, works
from jaxwan.sharding.mesh import MeshSpec

MESHES = tuple(
    map(MeshSpec.parse, ("pp=1", "pp=2", "dp=2", "cfg=2", "sp=2", "tp=2", "cfg=2,sp=2", "pp=2,sp=2", "sp=2,tp=2"))
)


def measure_plan(item: Item) -> Iterator[Row]:
    """A row for each mesh that is possible here, and one with what follows from all."""
    devices = jax.devices()
    if len(devices) < 2:
        yield item.no_row("", "skipped", "several devices are needed, and there is one")
        return
    preset = replace(item.preset, experts=1)
    preset = preset.with_layers(LAYERS) if preset.needs_accelerator else preset
    checkpoint, memory = make_checkpoint(preset), present_memory(devices[0])
    job = make_job(checkpoint, False, prompt="", seed=0, num_videos_per_prompt=VIDEOS)
    chip, known = find_chip(None, devices[0].device_kind, memory)
    machine = Machine(chip, LINKS[chip.link], LINKS["Ethernet"], jax.local_device_count(), known)
    search = Search(checkpoint, job, machine, memory, dtype().name, "float32")
    measured: list[float] = []
    expected: list[Tick] = []
    for mesh in MESHES:
        if mesh.num_devices > len(devices) or not works(mesh, checkpoint, job):
            yield item.no_row(str(mesh), "skipped", "not possible here: too few devices, heads or videos")
            continue
        steps, period = seconds_of_steps(Denoising(preset, mesh, item.runs), item.runs), dealt(mesh, job).period
        measured.append(median(steps) / period)
        expected.append(search.tick(mesh))
        details = {
            "a tick, expected s": sum(expected[-1]), "a tick, measured s": measured[-1],
            "against one device, expected": sum(expected[-1]) / sum(expected[0]),
            "against one device, measured": measured[-1] / measured[0],
        }  # fmt: skip
        yield item.row(str(mesh), seconds=steps, details=details)
    computing, sending = fit(expected, measured)
    reached = machine.link.reached / sending if sending else "too little is sent to tell"
    yield item.row("fit", details={
        "chip": chip.name, "dit": chip.dit / computing, "dit in the table": chip.dit,
        "link": machine.link.name, "reached": reached, "reached in the table": machine.link.reached,
    })  # fmt: skip


def seconds_of_steps(side: Denoising, runs: int) -> list[float]:
    """Of so many steps of all videos, after the first."""
    loop, seconds = side.begin(), []
    for _ in range(runs):
        start = time.perf_counter()
        loop.advance()
        seconds.append(time.perf_counter() - start)
    return seconds


def fit(expected: Sequence[Tick], measured: Sequence[float]) -> tuple[float, float]:
    """How many times longer than expected computing and sending take, by least squares of relative errors; sending 0.0
    where it explains nothing."""
    scaled = np.array(expected) / np.array(measured)[:, None]
    ones = np.ones(len(measured))
    (computing, sending), *_ = np.linalg.lstsq(scaled, ones)
    if sending <= 0 or np.linalg.matrix_rank(scaled) < 2:
        ((computing,), *_), sending = np.linalg.lstsq(scaled[:, :1], ones), 0.0
    return float(computing), float(sending)
