"""The same work by Diffusers, in turns with ours. torch runs in a process of its own, which this one starts and asks.

Both processes hold their models at once, but only one of them works at a time.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from statistics import median
from typing import Any, NamedTuple

import jax

from jaxwan.bench.clip import random_pipeline, random_prompt
from jaxwan.bench.item import TERA, Item, dtype
from jaxwan.bench.layers import FEW, MORE, attention_that_ran, layer_tflop, make_forwards, slope
from jaxwan.bench.measure import memory, seconds_of
from jaxwan.bench.report import Row
from jaxwan.bench.vae import DIRECTIONS, make_codings

REPLY = "REPLY "
CORES = 2  # that both sides share on a CPU, at the small presets


class Case(NamedTuple):
    """One thing that both sides can do: ours, ready to run."""

    run: Callable[[], Any]
    tflop: float
    compile_seconds: float | None = None
    memory: dict[str, int] = {}
    details: dict[str, Any] = {}


class Missing(Exception):
    """The other side cannot be compared with here."""


class Rival:
    """The process that runs Diffusers. It ends with this one: its standard input closes."""

    def __init__(self, item: Item):
        wanted = {"item": item.to_json(), "dtype": item.form or str(dtype()), "platform": jax.default_backend()}
        command = [sys.executable, "-m", "jaxwan.bench.torch_side", json.dumps(wanted)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.facts = self._reply()

    def ask(self, *request: Any) -> dict[str, Any]:
        """Its answer to (verb, mode, case). Raises RuntimeError for what it could not do."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return self._reply()

    def _reply(self) -> dict[str, Any]:
        for line in self.process.stdout or ():
            if line.startswith(REPLY):
                answer = json.loads(line.removeprefix(REPLY))
                if "missing" in answer:
                    raise Missing(answer["missing"])
                if "error" in answer:
                    raise RuntimeError(answer["error"])
                return answer
        raise RuntimeError(f"the process that runs Diffusers ended with status {self.process.wait()}")

    def close(self) -> None:
        """End it."""
        self.process.kill()
        self.process.wait()


def use_two_cores() -> None:
    """Keep this process, and those that it starts, on two cores. To be called before JAX looks at its devices."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CORES])


def measure_against(item: Item) -> Iterator[Row]:
    """Rows of both sides for each of the ways in which Diffusers can run, each with how many times longer it took."""
    try:
        rival = Rival(item)
    except Missing as reason:
        yield item.no_row("", "skipped", str(reason))
        return
    try:
        cases = _CASES[item.kind](item)
        for mode in rival.facts["modes"]:
            yield from _pair(item, rival, mode, cases)
    finally:
        rival.close()


def _pair(item: Item, rival: Rival, mode: str, cases: dict[str, Case]) -> Iterator[Row]:
    """All cases in one mode, ours and theirs in turns."""
    try:
        prepared = {name: rival.ask("prepare", mode, name) for name in cases}
    except RuntimeError as error:
        yield item.no_row(mode, "failed", f"diffusers: {str(error)[:300]}")
        return
    ours: dict[str, list[float]] = {name: [] for name in cases}
    theirs: dict[str, list[float]] = {name: [] for name in cases}
    for case in cases.values():
        jax.block_until_ready(case.run())
    for _ in range(item.runs):
        for name, case in cases.items():
            ours[name] += seconds_of(case.run, 1, warmups=0)
            theirs[name].append(rival.ask("run", mode, name)["seconds"])
    for name, case in cases.items():
        yield item.row(f"{mode}/{name}/jaxwan", seconds=ours[name], compile_seconds=case.compile_seconds,
                       tflop=case.tflop, memory=case.memory, details=case.details)  # fmt: skip
        facts = prepared[name]
        yield item.row(
            f"{mode}/{name}/diffusers", seconds=theirs[name], compile_seconds=facts["compile_seconds"],
            tflop=case.tflop, memory={"peak": facts["peak"]},
            details=_ratio(theirs[name], ours[name]) | facts["details"] | rival.facts["details"],
        )  # fmt: skip
    if item.kind == "dit":
        layer = [slope(side[_depth(FEW)], side[_depth(MORE)]) for side in (ours, theirs)]
        yield item.row(f"{mode}/a layer/jaxwan", seconds=layer[0], tflop=layer_tflop(item.preset.forward, item.preset))
        yield item.row(f"{mode}/a layer/diffusers", seconds=layer[1],
                       tflop=layer_tflop(item.preset.forward, item.preset),
                       details=_ratio(layer[1], layer[0]))  # fmt: skip


def _ratio(theirs: list[float], ours: list[float]) -> dict[str, float]:
    return {"diffusers / jaxwan": median(theirs) / median(ours)}


# Our side


def _depth(layers: int) -> str:
    return f"{layers} layers"


def _forwards(item: Item) -> dict[str, Case]:
    """Plain forwards of 2 and 6 layers; of all where the preset says so."""
    whole = (item.preset.transformer.num_layers,) if item.preset.whole_pair else ()
    forwards = make_forwards(item.preset, tuple(dict.fromkeys((FEW, MORE, *whole))))
    return {
        _depth(depth): Case(
            f.run, f.tflop, f.compile_seconds, memory(f.executable), {"attention": attention_that_ran(f.executable)}
        )
        for depth, f in forwards.items()
    }  # fmt: skip


def _videos(item: Item) -> dict[str, Case]:
    """Whole videos through the VAE, both ways."""
    codings = zip(DIRECTIONS, make_codings(item.preset, item.form), strict=True)
    return {name: Case(c.video, c.tflop, c.compile_seconds, memory(*c.executables)) for name, c in codings}


def _loop(item: Item) -> dict[str, Case]:
    """Latents of a whole call, from embeddings."""
    pipe, prompt = random_pipeline(item.preset), random_prompt(item.preset)
    tflop = 2 * item.preset.steps * item.preset.forward.total / TERA

    def call():
        return pipe(**prompt, seed=1, output_type="latent").latents

    return {f"{item.preset.steps} steps": Case(call, tflop)}


_CASES = {"dit": _forwards, "vae": _videos, "sampler": _loop}
