"""What devices send each other, read from a compiled program."""

import re

import numpy as np
from jax.sharding import Mesh

KINDS = "all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute|collective-broadcast"


def collectives(text: str) -> list[tuple[str, list]]:
    """(kind, which positions in the mesh take part together) of every collective in a program's text, in no order."""
    lines = [line for line in text.splitlines() if re.search(rf"\b({KINDS})(-start)?\(", line)]
    return sorted((re.search(KINDS, line.split(" = ", 1)[1])[0], groups(line)) for line in lines)


def groups(line: str) -> list[list[int]]:
    """{{0,1},{2,3}}, as groups or pairs of source and target; or [2,2]<=[4], which counts them."""
    if counted := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line):
        shape, counts, order = ([int(n) for n in part.split(",")] if part else None for part in counted.groups())
        return sorted(np.arange(np.prod(counts)).reshape(counts).transpose(order).reshape(shape).tolist())
    listed = re.search(r"(?:replica_groups|source_target_pairs)=\{(\{.*?\})\}", line)[1]
    return sorted([int(n) for n in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", listed))


def expected_collectives(mesh: Mesh) -> list[tuple[str, list]]:
    """What a tick of the ring may have: a hop to the next stage, and a sum over the branches."""
    places = np.arange(mesh.size).reshape(mesh.devices.shape)

    def along(axis: str) -> list[list[int]]:
        return np.moveaxis(places, mesh.axis_names.index(axis), -1).reshape(-1, mesh.shape[axis]).tolist()

    hops = sorted([a, b] for stages in along("pp") for a, b in zip(stages, stages[1:] + stages[:1], strict=True))
    told = [("all-reduce", sorted(along("cfg")))] * (mesh.shape["cfg"] > 1)
    return told + [("collective-permute", hops)] * (mesh.shape["pp"] > 1)
