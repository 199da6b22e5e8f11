"""What chips and the links between them can do: a small table, and the time that a collective takes over it.

Peaks, memory and rates of links are those of data sheets. Shares of them that are reached, and latencies, are estimates
until they are measured (`scripts/benchmark.py mesh-plan`); what they were taken from stands beside them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from math import prod

import numpy as np

from jaxwan.flops import Sent
from jaxwan.sharding.mesh import AXES


@dataclass(frozen=True)
class Link:
    """What joins devices of a host, or hosts. `rate`: bytes a second that a device sends, of a link between hosts a
    whole host. `reached`: the share of it that collectives reach. `latency`: seconds before a collective moves."""

    name: str
    rate: float
    reached: float
    latency: float

    def seconds(self, size: float, collectives: int) -> float:
        """Of so many bytes in so many collectives."""
        return size / (self.rate * self.reached) + collectives * self.latency


@dataclass(frozen=True)
class Chip:
    """A device. `peak`: FLOP/s of dense bfloat16 products. `dit`, `vae`: the shares of it that a forward and the VAE
    reach, both in bfloat16; `float32`: how fast float32 is beside that. `shared`: its devices are virtual, and have one
    machine's cores together. `kinds`: words that JAX's `device_kind` has."""

    name: str
    kinds: tuple[str, ...]
    peak: float
    memory: int  # bytes
    link: str  # between those of a host
    dit: float
    vae: float = 0.2  # 2.1 kind: 0.10 to 0.15 by PyTorch, 2.2 kind: 0.37 (SGLang, H200)
    float32: float = 0.5  # TF32
    shared: bool = False

    def rate(self, share: float, dtype: str) -> float:
        """FLOP/s where a share of the peak is reached in bfloat16."""
        return self.peak * share * (self.float32 if dtype == "float32" else 1.0)


LINKS = {
    link.name: link
    for link in (
        Link("NVLink", 450e9, 0.75, 20e-6),  # of H100 and H200; NCCL's bus bandwidth
        Link("NVLink 3", 300e9, 0.75, 20e-6),  # of A100
        Link("PCIe 4", 32e9, 0.5, 40e-6),  # x16; consumer cards send by way of the host's memory
        Link("PCIe 5", 64e9, 0.5, 40e-6),
        Link("ICI v5e", 90e9, 0.8, 10e-6),  # both directions of one axis of the torus
        Link("ICI v6e", 180e9, 0.8, 10e-6),
        Link("Ethernet", 12.5e9, 0.7, 100e-6),  # 100 Gbit/s a host, TCP
        Link("InfiniBand", 400e9, 0.7, 30e-6),  # eight cards of 400 Gbit/s a host
        Link("memory", 5e9, 1.0, 100e-6),  # between virtual devices
    )
}
CHIPS = {
    chip.name: chip
    for chip in (
        # Hopper: Wan2.2's own repository reaches 0.51 with A14B at 720p, LightX2V 0.66 with 14B at 480p
        Chip("H100", ("H100", "H800"), 989e12, 80 * 10**9, "NVLink", dit=0.55),
        Chip("H200", ("H200",), 989e12, 141 * 10**9, "NVLink", dit=0.55),
        Chip("A100", ("A100", "A800"), 312e12, 80 * 10**9, "NVLink 3", dit=0.6),
        # Wan2.1's repository: 1.3B, 480p, 50 steps in about 4 minutes on an RTX 4090, which is 0.7
        Chip("RTX 4090", ("RTX 4090",), 165e12, 24 * 10**9, "PCIe 4", dit=0.65),
        Chip("RTX 5090", ("RTX 5090",), 209e12, 32 * 10**9, "PCIe 5", dit=0.65),
        # maxdiffusion: A14B, 720p, 40 steps in 251 s on eight v6e, which is 0.28
        Chip("TPU v5e", ("TPU v5 lite", "TPU v5e"), 197e12, 16 * 10**9, "ICI v5e", dit=0.4, float32=1.0),
        Chip("TPU v6e", ("TPU v6 lite", "TPU v6e"), 918e12, 32 * 10**9, "ICI v6e", dit=0.28, float32=1.0),
        Chip("CPU", ("cpu",), 2e11, 64 * 2**30, "memory", dit=0.5, vae=0.2, float32=1.0, shared=True),
    )
}
_BY_MEMORY = ("RTX 4090", "RTX 5090", "H100", "H200")  # what a device that no one named is counted as


@dataclass(frozen=True)
class Machine:
    """Devices that are alike. `per_host`: how many share a host, next to each other. `known`: the table has the chip;
    what is worked out for another is worth something in comparisons alone."""

    chip: Chip
    link: Link
    between: Link
    per_host: int
    known: bool = True

    def seconds(self, sizes: Mapping[str, int], one: Sent, layers: int) -> float:
        """That devices send each other one kind of collective of a tick for, on a mesh of these sizes."""
        sent, times = one.sent(layers), one.times(layers)
        inside, away = _ways(tuple(sizes[axis] for axis in AXES), one.axis, one.kind, one.among, self.per_host)
        near = self.link.seconds(inside * sent, times)
        return max(near, self.between.seconds(away * sent, times)) if away else near

    @property
    def relative(self) -> bool:
        """Whether seconds are worth something in comparisons alone."""
        return self.chip.shared or not self.known

    def trust(self, dtype: str) -> str:
        """What seconds are worth, in a line."""
        if self.chip.shared:
            return "virtual CPU devices share one machine's cores, more of them are no faster: times are relative"
        rate, sent = self.chip.rate(self.chip.dit, dtype) / 1e12, self.link.rate * self.link.reached / 1e9
        told = f"{self.chip.name} at {rate:.0f} TFLOP/s, {self.link.name} at {sent:.0f} GB/s"
        if self.known:
            return f"seconds are estimates until measured: {told}"
        return f"the chip is not known, times are relative: counted as {told}"


@cache
def _ways(sizes: tuple[int, ...], axis: str, kind: str, among: int, per_host: int) -> tuple[float, float]:
    """Of the bytes that a device sends: the largest share that stays in its host, and, for the host from which most
    go, how many times they leave it. Sums and shifts send to the next device of their axis; trades to all others."""
    count = prod(sizes)
    if count <= per_host:
        return 1.0, 0.0
    at, hosts = AXES.index(axis), np.arange(count).reshape(sizes) // per_host
    if axis == "sp":  # neighbours trade, and the groups of them pass on
        ways, trades = sizes[at], kind == "all-to-all"
        shape = (ways // among, among) if trades else (among, ways // among)
        hosts, at = hosts.reshape(*sizes[:at], *shape, *sizes[at + 1 :]), at + trades
    shifts = range(1, among) if kind == "all-to-all" else (1,)
    leaves = np.mean([np.roll(hosts, -shift, at) != hosts for shift in shifts], axis=0)
    return float(1 - leaves.min()), float(np.bincount(hosts.ravel(), leaves.ravel()).max())


def find_chip(name: str | None, kind: str = "", memory: int | None = None) -> tuple[Chip, bool]:
    """The chip of a name, else of JAX's `device_kind`, else the least of the table's with so much memory; and whether
    the table has it. Raises ValueError for a name that it has not."""
    if name is not None:
        found = [chip for chip in CHIPS.values() if chip.name.lower() == name.strip().lower()]
        if not found:
            raise ValueError(f"chip {name!r} is not known: {', '.join(CHIPS)}")
        return found[0], True
    for chip in CHIPS.values():
        if any(word in kind for word in chip.kinds):
            return chip, True
    enough = (CHIPS[like] for like in _BY_MEMORY if memory is not None and CHIPS[like].memory >= memory)
    return next(enough, CHIPS["H200" if memory else "H100"]), False


def find_link(name: str) -> Link:
    """A link of the table. Raises ValueError for a name that it has not."""
    if name not in LINKS:
        raise ValueError(f"link {name!r} is not known: {', '.join(LINKS)}")
    return LINKS[name]
