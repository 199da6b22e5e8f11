"""The child process of a benchmark: measures one item and writes its rows, a JSON object a line, to stdout.

python -m jaxwan.bench.child [ITEM]

ITEM is an `Item` as JSON. The first line is the environment, and the only one without an item. A line that begins with
neither word is noise of a library.
"""

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict

import jax

from jaxwan.bench import (
    against,
    blending,
    ceilings,
    clip,
    compiling,
    convolutions,
    dit,
    engine,
    growth,
    layers,
    load,
    mesh,
    mesh_plan,
    vae,
)
from jaxwan.bench.item import Item
from jaxwan.bench.measure import environment
from jaxwan.bench.report import Row
from jaxwan.sharding.mesh import request_virtual_devices

ENVIRONMENT, ROW = "ENVIRONMENT ", "ROW "
MEASUREMENTS = {
    "ceilings": ceilings.measure_ceilings,
    "attention": ceilings.measure_attention,
    "dit": dit.measure_dit,
    "sampler": dit.measure_sampler,
    "block": layers.measure_block,
    "flags": layers.measure_flag,
    "vae": vae.measure_vae,
    "convolution": convolutions.measure_convolutions,
    "blend": blending.measure_blend,
    "text": vae.measure_text,
    "pipeline": clip.measure_pipeline,
    "e2e": clip.measure_e2e,
    "load": load.measure_load,
    "compile": compiling.measure_compilation,
    "growth": growth.measure_growth,
    "mesh": mesh.measure_mesh,
    "engine": engine.measure_engine,
    "mesh-plan": mesh_plan.measure_plan,
}
DEVICES = {"mesh": 2, "mesh-plan": 4, "engine": engine.STAGES}  # that are needed, virtual ones on a CPU
_NOT_HERE = (RuntimeError, ValueError, NotImplementedError, OSError)  # how JAX and cuDNN say that they cannot run


def main(text: str | None = None) -> None:
    """Measure the item described by `text`."""
    item = None if text is None else Item.from_json(text)
    if item is not None and item.against and not item.preset.needs_accelerator:
        against.use_two_cores()
    if item is not None and item.kind in DEVICES:
        request_virtual_devices(DEVICES[item.kind])
    print(ENVIRONMENT + json.dumps(environment()), flush=True)
    if item is not None:
        for row in measure(item):
            print(ROW + json.dumps(asdict(row)), flush=True)


def measure(item: Item) -> Iterator[Row]:
    """The rows of an item; what cannot run here is a row that says why."""
    if item.preset.needs_accelerator and jax.default_backend() == "cpu":
        yield item.no_row("", "skipped", "a full-size preset needs an accelerator: --preset small is for a CPU")
        return
    try:
        yield from against.measure_against(item) if item.against else MEASUREMENTS[item.kind](item)
    except _NOT_HERE as error:
        yield item.no_row("", "failed", f"{type(error).__name__}: {str(error).strip()[:300]}")


if __name__ == "__main__":
    main(*sys.argv[1:])
