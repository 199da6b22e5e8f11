"""What fits on the devices: calls that never will are refused, those that do not now wait."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import jax

from jaxwan.pipelines.dry_run import make_report, memory_fraction, parse_memory, present_memory
from jaxwan.pipelines.pipeline import WanPipeline
from jaxwan.pipelines.request import Job


class Admission:
    """The memory of a device, what a pipeline's parameters take of it, and what its compiled programs ask for.

    device_memory: "80GB" or bytes, of which JAX takes its share, where devices do not tell what they have. `memory` is
    None where nobody does: then all is taken.
    """

    def __init__(self, pipe: WanPipeline, device_memory: int | str | None):
        self._pipe, self._told = pipe, parse_memory(device_memory)
        present = present_memory(pipe.parts.denoiser.mesh.devices.flat[0])
        self.memory = present if self._told is None else int(self._told * memory_fraction())
        self.parameters = parameter_bytes(pipe)
        self._temporaries: dict[tuple, int] = {}  # of the programs of a kind of call the most

    def check(self, job: Job, slots: int) -> None:
        """Raises ValueError for a job that does not fit beside nothing else, with as many videos of its kind as there
        are slots: by the dry run's account, before anything is compiled."""
        if self.memory is None:
            return
        denoiser = self._pipe.parts.denoiser
        full = replace(job, requests=tuple(job.requests[i % len(job.requests)] for i in range(slots)))
        report = make_report(
            self._pipe.checkpoint, self._pipe.mesh, full, str(denoiser.dtype), str(self._pipe.parts.vae_dtype),
            self._told, self._pipe.vae_devices,
        )  # fmt: skip
        if report.fits is False:
            frames, height, width = job.size
            needed, there = (f"{size / 2**30:.2f} GiB" for size in (max(report.needed_bytes), self.memory))
            what = (
                f"{width}x{height} with {frames} frames, {slots} at a time, needs {needed} of a device that has {there}"
            )
            instead = "; ".join(report.would_fit)
            raise ValueError(what + f": what would fit is {instead}" * bool(instead))

    def compiled(self, key: tuple, program: jax.stages.Compiled) -> None:
        """Note what a program of a kind of call (`programs_key`) takes beside its arguments."""
        analysis = program.memory_analysis()
        if analysis is not None:
            needs = analysis.temp_size_in_bytes + analysis.output_size_in_bytes - analysis.alias_size_in_bytes
            self._temporaries[key] = max(self._temporaries.get(key, 0), needs)

    def check_compiled(self, key: tuple, state: int) -> None:
        """Raises ValueError where compiled programs do not fit beside a ring's arrays of so many bytes alone."""
        needed = self.parameters + state + self._temporaries.get(key, 0)
        if self.memory is not None and needed > self.memory:
            raise ValueError(
                f"its compiled programs need {needed / 2**30:.2f} GiB of a device that has {self.memory / 2**30:.2f} "
                "GiB: choose a smaller size, fewer frames, or an engine with fewer slots"
            )

    def forget(self, key: tuple) -> None:
        """The programs of a kind of call are let go."""
        self._temporaries.pop(key, None)

    def fits(self, states: Iterable[int]) -> bool:
        """Whether rings whose arrays take so many bytes of a device may be there together: one program runs at a time,
        beside the parameters and all arrays."""
        if self.memory is None:
            return True
        return self.parameters + sum(states) + max(self._temporaries.values(), default=0) <= self.memory


def parameter_bytes(pipe: WanPipeline) -> int:
    """Of all parts, on the device that has most."""
    held: dict[Any, int] = {}
    for leaf in jax.tree.leaves((pipe.parts.denoiser.weights, pipe.parts.states())):
        for shard in leaf.addressable_shards:
            held[shard.device] = held.get(shard.device, 0) + shard.data.nbytes
    return max(held.values(), default=0)


def state_bytes(shapes: Any) -> int:
    """Of a tree of shapes with shardings, on each device."""
    return sum(leaf.dtype.itemsize * _count(leaf.sharding.shard_shape(leaf.shape)) for leaf in jax.tree.leaves(shapes))


def _count(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count
