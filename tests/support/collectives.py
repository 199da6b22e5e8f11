"""What devices send each other, read from a compiled program."""

import re
from collections.abc import Sequence

import numpy as np
from jax.sharding import Mesh

from jaxwan.flops import Sent

KINDS = "all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute|collective-broadcast"


def collectives(text: str) -> list[tuple[str, list]]:
    """(kind, which positions in the mesh take part together) of every collective in a program's text, in no order.

    XLA may join all-reduces that wait for the same: each of their arrays counts.
    """
    found = []
    for line in text.splitlines():
        if match := re.search(rf"\b({KINDS})(-start)?\((.*?)\)", line):
            arrays = match[3].count("%") if match[1] == "all-reduce" else 1
            found += [(match[1], groups(line))] * arrays
    return sorted(found)


def groups(line: str) -> list[list[int]]:
    """{{0,1},{2,3}}, as groups or pairs of source and target; or [2,2]<=[4], which counts them."""
    if counted := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line):
        shape, counts, order = ([int(n) for n in part.split(",")] if part else None for part in counted.groups())
        return sorted(np.arange(np.prod(counts)).reshape(counts).transpose(order).reshape(shape).tolist())
    listed = re.search(r"(?:replica_groups|source_target_pairs)=\{(\{.*?\})\}", line)[1]
    return sorted([int(n) for n in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", listed))


def expected_collectives(mesh: Mesh, traffic: Sequence[Sent]) -> list[tuple[str, list]]:
    """What the program of a tick may have: its layers are one text."""
    places = np.arange(mesh.size).reshape(mesh.devices.shape)
    told = []
    for sent in traffic:
        lines = np.moveaxis(places, mesh.axis_names.index(sent.axis), -1).reshape(-1, mesh.shape[sent.axis])
        if sent.kind == "collective-permute":
            among = np.stack([lines, np.roll(lines, -(mesh.shape[sent.axis] // sent.among), axis=1)], -1).reshape(-1, 2)
        else:
            among = lines.reshape(-1, sent.among)
        told += [(sent.kind, sorted(among.tolist()))] * (sent.a_layer + sent.a_tick)
    return sorted(told)
