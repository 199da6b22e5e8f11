"""The engine against calls one after the other, and against fixed batches that wait for their slowest."""

import time
from collections.abc import Callable, Iterator, Sequence
from statistics import median
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxwan.bench.clip import random_pipeline, random_prompt
from jaxwan.bench.item import Item
from jaxwan.bench.measure import compilations
from jaxwan.bench.report import Row
from jaxwan.engine.engine import Engine
from jaxwan.pipelines.call import make_job
from jaxwan.pipelines.encoders import prepare
from jaxwan.pipelines.pipeline import WanPipeline
from jaxwan.pipelines.progress import Progress
from jaxwan.sharding.mesh import MeshSpec
from jaxwan.sharding.timetable import Member, empty_timetable
from jaxwan.sharding.turns import RingPlan

FORMS = ("requests", "segments")
REQUESTS, STEPS = 32, (4, 40)
SLOTS, STAGES, BRANCHES = 4, 4, 2
LOAD = 1.5  # requests arrive in so many times the pace at which one after the other is done
LONG = 20  # steps of the run that is cut into segments


class Request(NamedTuple):
    """steps: with guidance. arrives: seconds, in steps of a request alone."""

    steps: int
    arrives: float


def make_requests(count: int = REQUESTS, seed: int = 0) -> list[Request]:
    """Of random lengths, at random times."""
    rng = np.random.default_rng(seed)
    steps = rng.integers(STEPS[0], STEPS[1] + 1, count)
    gaps = rng.exponential(steps.mean() / LOAD, count)
    return [Request(int(n), float(at)) for n, at in zip(steps, np.cumsum(gaps) - gaps[0], strict=True)]


def measure_engine(item: Item) -> Iterator[Row]:
    """Random requests in seconds on one device and in ticks on four stages; or what cutting a run costs."""
    if item.form == "requests":
        requests = make_requests()
        yield _seconds_row(item, requests)
        yield _ticks_row(item, requests)
    else:
        yield _segments_row(item)


# Seconds


class Served(NamedTuple):
    """Seconds of each request from its arrival to its result, and of all from the first arrival to the last result."""

    waits: list[float]
    total: float

    def told(self, name: str) -> dict[str, float]:
        """What a row says of it."""
        return {
            f"{name}: all s": self.total, f"{name}: first result s": self.waits[0],
            f"{name}: median wait s": median(self.waits),
        }  # fmt: skip


def _seconds_row(item: Item, requests: Sequence[Request]) -> Row:
    pipe, prompt = random_pipeline(item.preset), random_prompt(item.preset)

    def call(some: Sequence[Request]) -> Any:
        many = {name: np.repeat(rows, len(some), axis=0) for name, rows in prompt.items()}
        return pipe(**many, num_inference_steps=[r.steps for r in some], seed=0, output_type="latent")

    for count in (1, SLOTS):
        call(requests[:count])  # which compiles
    start = time.perf_counter()
    call([requests[0]])
    pace = (time.perf_counter() - start) / requests[0].steps
    arrivals = [pace * request.arrives for request in requests]
    alone = in_turns(arrivals, 1, lambda i: call(requests[i : i + 1]))
    batches = in_turns(arrivals, SLOTS, lambda i: call(requests[i : i + SLOTS]))
    with Engine(pipe, slots=SLOTS) as engine:
        engine.warmup(**prompt)
        with compilations() as programs:
            shared = _submitted(engine, prompt, requests, arrivals)
    details = shared.told("engine") | alone.told("one after the other") | batches.told("fixed batches")
    details |= {
        "one after the other / engine": alone.total / shared.total,
        "fixed batches / engine": batches.total / shared.total, "programs compiled": len(programs),
    }  # fmt: skip
    return item.row("pp=1", seconds=[shared.total], details=details)


def in_turns(arrivals: Sequence[float], size: int, serve: Callable[[int], Any]) -> Served:
    """Batches of `size` as they arrive, each when its last request is there and the one before is done. Nothing waits:
    the time that each takes is measured, and when it would have begun follows."""
    now, waits = 0.0, []
    for first in range(0, len(arrivals), size):
        own = arrivals[first : first + size]
        start = time.perf_counter()
        serve(first)
        now = max(now, own[-1]) + time.perf_counter() - start
        waits += [now - at for at in own]
    return Served(waits, now)


def _submitted(engine: Engine, prompt: dict[str, np.ndarray], requests: Sequence[Request],
               arrivals: Sequence[float]) -> Served:  # fmt: skip
    start, done = time.perf_counter(), [0.0] * len(requests)
    for i, (request, at) in enumerate(zip(requests, arrivals, strict=True)):
        time.sleep(max(0.0, start + at - time.perf_counter()))
        handle = engine.submit(**prompt, num_inference_steps=request.steps, seed=0, output_type="latent")
        handle.add_done_callback(lambda _, i=i: done.__setitem__(i, time.perf_counter() - start))
        last = handle
    engine.drain()
    last.result()
    return Served([end - at for end, at in zip(done, arrivals, strict=True)], max(done))


# Ticks


def _ticks_row(item: Item, requests: Sequence[Request]) -> Row:
    """All are there from the start."""
    pipe, prompt = random_pipeline(item.preset, MeshSpec(pp=STAGES)), random_prompt(item.preset)
    steps = [request.steps for request in requests]
    with Engine(pipe, slots=SLOTS) as engine:
        engine.warmup(**prompt)
        for n in steps:
            engine.submit(**prompt, num_inference_steps=n, seed=0, output_type="latent")
        engine.drain()
        ticks, idle = engine.ticks
    alone = sum(RingPlan(STAGES, (BRANCHES,)).ticks([n]) for n in steps)
    batches = sum(
        RingPlan(STAGES, (BRANCHES,) * len(own)).ticks(own)
        for own in (steps[i : i + SLOTS] for i in range(0, len(steps), SLOTS))
    )
    return item.row(
        f"pp={STAGES}",
        details={
            "engine: ticks": ticks, "idle": idle, "by the arithmetic": ring_ticks(steps),
            "with work for every tick": BRANCHES * sum(steps), "one after the other: ticks": alone,
            "fixed batches: ticks": batches, "one after the other / engine": alone / ticks,
            "fixed batches / engine": batches / ticks,
        },
    )  # fmt: skip


def ring_ticks(steps: Sequence[int], slots: int = SLOTS, stages: int = STAGES) -> int:
    """Ticks of requests that are all there from the start, each of which takes a slot when one is free."""
    table, waiting, ticks = empty_timetable(stages, 1, slots), list(steps), 0
    left: dict[tuple[int, int], int] = {}
    while waiting or left:
        free = [(0, slot) for slot in range(slots) if (0, slot) not in left]
        joining = dict(zip(free, waiting, strict=False))
        waiting = waiting[len(joining) :]
        table = table.changed({place: Member(BRANCHES, n) for place, n in joining.items()}) if joining else table
        left |= joining
        more = table.ticks_of_rounds()
        table, ticks = table.ran(more), ticks + more
        left = {place: n for place, n in left.items() if table.steps_done(place) < n}
        table = table.shortened()
    return ticks


# Segments


def _segments_row(item: Item) -> Row:
    """A request alone, in segments of the engine's, against all of its ticks in one go; in turns, from the arguments to
    the latents."""
    pipe, prompt = random_pipeline(item.preset), random_prompt(item.preset)
    call = {**prompt, "num_inference_steps": LONG, "seed": 0}
    with Engine(pipe, slots=1) as engine:

        def in_segments() -> np.ndarray:
            return engine.submit(**call, output_type="latent").result().latents

        sides = {"segments": in_segments, "at once": lambda: at_once(pipe, call)}
        found = [side() for side in sides.values()]  # which compiles
        np.testing.assert_array_equal(*found)
        taken = {name: [] for name in sides}
        for _ in range(item.runs):
            for name, side in sides.items():
                start = time.perf_counter()
                side()
                taken[name].append(time.perf_counter() - start)
    ratios = [a / b for a, b in zip(taken["segments"], taken["at once"], strict=True)]
    return item.row(
        "", seconds=taken["segments"],
        details={
            "at once s": median(taken["at once"]), "tick ms": 1e3 * min(taken["at once"]) / (BRANCHES * LONG),
            "overhead": f"{median(ratios) - 1:.1%}", "overhead, by the fastest of each":
            f"{min(taken['segments']) / min(taken['at once']) - 1:.1%}", "steps": LONG,
        },
    )  # fmt: skip


def at_once(pipe: WanPipeline, call: dict[str, Any]) -> np.ndarray:
    """Latents (1, C, T, h, w) of a call whose ticks are all one segment."""
    job = make_job(pipe.checkpoint, **call)
    (entry,), denoiser = (
        prepare(pipe.checkpoint, pipe.parts, job.requests, Progress(visible=False)),
        pipe.parts.denoiser,
    )
    programs = denoiser.programs(denoiser.bucket([entry]))
    table = programs.timetable().changed({(0, 0): programs.member(entry)})
    running = programs.insert(programs.empty(), (0, 0), entry)
    running = jax.block_until_ready(programs.run(denoiser.weights, running, table, table.end))
    return np.moveaxis(programs.read(running, (0, 0)).sampler.x, -1, 0)[None]
