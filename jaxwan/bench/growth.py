"""How the cost of a denoising loop grows with its steps, requests, frames and layers."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from statistics import median

import numpy as np

from jaxwan.bench.dit import Ring
from jaxwan.bench.item import Item
from jaxwan.bench.measure import memory, seconds_of
from jaxwan.bench.presets import Preset
from jaxwan.bench.report import Row

AXES = ("steps", "requests", "frames", "layers")
STRIDE = 4  # frames of a latent frame


@dataclass(frozen=True)
class Point:
    """A loop: guided, of one expert; what is not varied is as small as it can be and still be typical."""

    latent_frames: int
    steps: int = 2
    requests: int = 1
    layers: int = 2

    def preset(self, preset: Preset) -> Preset:
        """The preset at this point."""
        frames = STRIDE * (self.latent_frames - 1) + 1
        return replace(preset, size=(frames, *preset.size[1:]), experts=1).with_layers(self.layers)


def points(preset: Preset) -> dict[str, dict[int, Point]]:
    """Axis -> its values and their loops. A clip of four latent frames or more is shortened, others are prolonged."""
    t = preset.latent_shape[0]
    frames = (t // 4, t // 2, t) if t >= 4 else (t, 2 * t, 4 * t)
    base = Point(t)
    return {
        "steps": {n: replace(base, steps=n) for n in (1, 2, 4, 8)},
        "requests": {n: replace(base, requests=n) for n in (1, 2, 4)},
        "frames": {STRIDE * (n - 1) + 1: replace(base, latent_frames=n) for n in frames},
        "layers": {n: replace(base, layers=n) for n in (1, 2, 4)},
    }


def measure_growth(item: Item) -> Iterator[Row]:
    """One row a point. The last one of each axis says with which power of it the seconds grow."""
    rings: dict[Point, Ring] = {}
    for axis, values in points(item.preset).items():
        found: dict[int, float] = {}
        for value, point in values.items():
            key = replace(point, steps=0)  # one executable for all step counts
            if key not in rings:
                rings[key] = Ring(point.preset(item.preset), point.steps, point.requests)
            seconds = _loop_seconds(rings[key], point, item.runs)
            found[value] = median(seconds)
            yield _row(item, axis, value, point, seconds, rings[key], found if value == max(values) else None)
        rings = {key: ring for key, ring in rings.items() if key == Point(item.preset.latent_shape[0], steps=0)}


def _loop_seconds(ring: Ring, point: Point, runs: int) -> list[float]:
    """Seconds of whole loops, each from the start again."""
    taken = []
    for run in range(runs + 1):
        ring.start(point.steps)
        seconds = seconds_of(lambda: ring.run(ring.ticks), 1, warmups=0)
        taken += seconds if run else []  # the first one warms up
    ring.check()
    return taken


def _row(item: Item, axis: str, value: int, point: Point, seconds: list[float], ring: Ring,
         found: dict[int, float] | None) -> Row:  # fmt: skip
    """The row of a point, with the power where `found` holds all of its axis."""
    details = {"axis": axis, "value": value, "steps": point.steps, "requests": point.requests,
               "tokens": ring.preset.tokens, "layers": point.layers}  # fmt: skip
    if found is not None:
        power = np.polyfit(np.log(list(found)), np.log(list(found.values())), 1)[0]
        details["grows with the power"] = round(float(power), 2)
    work = 2 * point.steps * point.requests * ring.tflop
    return item.row(f"{axis} {value}", seconds=seconds, compile_seconds=ring.compile_seconds, tflop=work,
                    memory=memory(ring.executable), details=details)  # fmt: skip
