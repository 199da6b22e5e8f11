"""Each mesh axis of size 2 against one device, on the same work and in turns.

On a CPU the two devices are virtual, and a core each. XLA's threads keep to a core only where the system makes them, so
every thread of this process is put on one core before a step of the one device, and on two before a step of both.
Figures of a busy machine are worth nothing: steps during which others took the cores are left out, or it is said.
"""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from math import prod
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxwan.bench.clip import make_checkpoint
from jaxwan.bench.dit import make_entries, random_weights
from jaxwan.bench.item import TERA, Item, dtype
from jaxwan.bench.presets import Preset
from jaxwan.bench.report import Row
from jaxwan.flops import TEXT_ROWS
from jaxwan.pipelines.denoise import Denoiser, Loop
from jaxwan.pipelines.load import check_mesh
from jaxwan.sharding.mesh import MeshSpec, make_mesh
from jaxwan.sharding.turns import deal

MESHES = [MeshSpec(**{axis: 2}) for axis in ("pp", "dp", "cfg", "sp", "tp")]
VIDEOS = 2  # with guidance: four micro-batches a step
LAYERS = 4  # at full size, for time's sake
# FLOPs in the time of a byte that is sent: 50 GFLOP/s and 2.5 GB/s of a core; 500 TFLOP/s and 300 GB/s of a card
FLOPS_A_BYTE = {"cpu": 20}
ON_A_CARD = 1700
BUSY = 0.08  # of a core
SAME = {4: 1e-4, 2: 5e-2}  # bytes of a number -> relative difference of velocities by sums in another order


def measure_mesh(item: Item) -> Iterator[Row]:
    """What to expect, then a row for each mesh."""
    preset = replace(item.preset, experts=1)
    preset = preset.with_layers(LAYERS) if preset.needs_accelerator else preset
    predictions = {mesh: expected(preset, mesh) for mesh in MESHES}
    yield item.row("expected", details={str(mesh): f"{times:.2f} times" for mesh, times in predictions.items()})
    cores = find_cores() if jax.default_backend() == "cpu" else None
    if cores is None and len(jax.devices()) < 2 or cores is not None and len(cores) < 2:
        what = "devices" if cores is None else "cores that its threads can be kept to"
        yield item.no_row("", "skipped", f"two {what} are needed, and there are fewer")
        return
    one = Denoising(preset, MeshSpec(), item.runs)
    for mesh, times in predictions.items():
        try:
            check_mesh(mesh, make_checkpoint(preset))
        except ValueError as refused:
            yield item.no_row(str(mesh), "skipped", f"the program refuses it: {refused}")
            continue
        with all_threads_as_before():
            yield _row(item, mesh, (one, Denoising(preset, mesh, item.runs)), cores, times)


def expected(preset: Preset, mesh: MeshSpec) -> float:
    """How many times sooner than on one device VIDEOS guided videos make a step, by FLOPs and bytes that are sent."""
    cfg, forward, layers = preset.transformer, preset.forward, preset.transformer.num_layers
    own = 0  # FLOPs of a tick that are not shared out
    if mesh.pp > 1 or mesh.tp > 1:
        own += forward.ends
    if mesh.sp > 1:
        own += layers * TEXT_ROWS * 4 * cfg.dim**2  # keys and values of the text
    hidden = preset.tokens * cfg.dim * dtype().itemsize
    sent = 0  # bytes by a device in a tick
    if mesh.pp > 1:
        sent += hidden
    if mesh.cfg > 1:
        sent += 2 * 4 * prod(preset.latent_shape) * preset.vae.z_dim  # rows of both velocities, float32
    if mesh.sp > 1:
        sent += layers * 4 * hidden // 4  # of q, k, v and the mean: of its half the half that is another's
    if mesh.tp > 1:
        sent += layers * 3 * hidden  # sums of both attentions and the MLP
    tick = (forward.total - own) / (mesh.pp * mesh.sp * mesh.tp) + own
    tick += sent * FLOPS_A_BYTE.get(jax.default_backend(), ON_A_CARD)
    period = deal([1 if mesh.cfg > 1 else 2] * VIDEOS, ranks=mesh.dp, stages=mesh.pp).period
    return 2 * VIDEOS * forward.total / (period * tick)


class Denoising:
    """The same videos on some mesh, step by step."""

    def __init__(self, preset: Preset, spec: MeshSpec, runs: int):
        mesh = make_mesh(spec)
        self.denoiser = Denoiser(preset.transformer, random_weights(preset, mesh), mesh, dtype())
        self.entries = make_entries(preset, runs + 1, VIDEOS)
        self.tflop = 2 * VIDEOS * preset.forward.total / TERA  # of a step

    def begin(self) -> Loop:
        """From the first step, which compiles, and fills a ring of several stages."""
        loop = Loop(self.denoiser, self.entries)
        loop.advance()
        return loop


class Segment(NamedTuple):
    """One step. cpu: seconds of all threads of this process. others: cores of ours that were at work for others."""

    seconds: float
    cpu: float
    others: float


def _row(item: Item, mesh: MeshSpec, sides: tuple[Denoising, ...], cores: list[int] | None, times: float) -> Row:
    """Both sides in turns: one device, then the mesh."""
    loops = [side.begin() for side in sides]
    own = [None] * 2 if cores is None else [cores[:1], cores]
    pairs = [[segment(loop.advance, of) for loop, of in zip(loops, own, strict=True)] for _ in range(item.runs)]
    quiet = [pair for pair in pairs if max(step.others for step in pair) <= BUSY]
    one, two = zip(*(quiet or pairs), strict=True)
    details: dict[str, Any] = {
        "times sooner": median(a.seconds / b.seconds for a, b in zip(one, two, strict=True)),
        "expected": times,
        "one device s": median(step.seconds for step in one),
        "relative difference": _difference(mesh, *(loop.velocities() for loop in loops)),
    }
    if cores is not None:
        details |= {f"cpu / wall, {name}": median(step.cpu / step.seconds for step in side)
                    for name, side in (("one", one), ("two", two))}  # fmt: skip
        # if no device waited for another or for a core: others change it little
        details["at most, by cpu seconds"] = 2 * median(step.cpu for step in one) / median(step.cpu for step in two)
        details["quiet"] = f"{len(quiet)} of {len(pairs)}"
        if not quiet:
            others = median(max(step.others for step in pair) for pair in pairs)
            details["not to be trusted"] = f"others took {others:.1f} cores"
    return item.row(str(mesh), seconds=[step.seconds for step in two], tflop=sides[1].tflop, details=details)


def _difference(mesh: MeshSpec, one: np.ndarray, two: np.ndarray) -> float:
    found = float(np.linalg.norm(two - one) / np.linalg.norm(one))
    if not found < SAME[dtype().itemsize]:
        raise RuntimeError(f"mesh {mesh} computes something else: its velocities differ by {found:.3g}")
    return found


# Cores


def find_cores() -> list[int]:
    """Two cores that threads of this process can be kept to, or fewer where there are."""
    return sorted(os.sched_getaffinity(0))[:2] if hasattr(os, "sched_setaffinity") else []


def segment(call: Callable[[], Any], cores: Sequence[int] | None) -> Segment:
    """Time a call, on a CPU with all threads of this process on some cores."""
    if cores is not None:
        keep_all_threads_to(cores)
    busy, cpu, start = busy_seconds(cores), time.process_time(), time.perf_counter()
    call()
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    return Segment(seconds, cpu, max(0.0, busy_seconds(cores) - busy - cpu) / seconds if busy else 0.0)


def keep_all_threads_to(cores: Sequence[int]) -> None:
    """Each by itself: those that are there already do not follow the process."""
    for thread in os.listdir("/proc/self/task"):
        with suppress(OSError):  # it has ended
            os.sched_setaffinity(int(thread), cores)


@contextmanager
def all_threads_as_before() -> Iterator[None]:
    """Threads may run again where this one may, after the block."""
    before = os.sched_getaffinity(0) if hasattr(os, "sched_setaffinity") else None
    yield
    if before is not None:
        keep_all_threads_to(sorted(before))


def busy_seconds(cores: Sequence[int] | None) -> float:
    """Seconds that these cores have worked for anyone since the machine started; 0 where no one counts them."""
    counts = Path("/proc/stat")
    if cores is None or not counts.exists():
        return 0.0
    lines = [line.split() for line in counts.read_text().splitlines() if line.startswith("cpu")]
    own = [line[1:9] for line in lines if line[0] in {f"cpu{core}" for core in cores}]
    idle = {3, 4}  # and waiting for disks
    ticks = sum(int(count) for line in own for i, count in enumerate(line) if i not in idle)
    return ticks / os.sysconf("SC_CLK_TCK")
