"""Denoising: videos are put into the slots of a compiled ring, run, and read out of it.

One set of programs serves all videos of a `Bucket`: solvers, step counts, guidance, experts and timesteps are rows of
arrays, indexed by what the ring says each device holds, and which slots are in use is data too.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from threading import Lock
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import jax
import jax.numpy as jnp
import numpy as np
from jax.lax import dynamic_index_in_dim, dynamic_update_index_in_dim
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding
from jax.typing import DTypeLike

from jaxwan.config import TransformerConfig
from jaxwan.pipelines.dit import (
    Carry,
    Fault,
    Inputs,
    Weights,
    abstract_weights,
    as_latents,
    as_tokens,
    fresh,
    input_specs,
    make_stage,
    map_axes,
    num_stages,
    parallel_on,
    shapes_at,
    split_on,
)
from jaxwan.schedulers.table import SamplerState
from jaxwan.sharding.collectives import position
from jaxwan.sharding.ring import RingState, Turns, check_types, make_ring, make_turns, state_specs
from jaxwan.sharding.rules import RULES
from jaxwan.sharding.timetable import Member, Place, Timetable, empty_timetable
from jaxwan.sharding.turns import deal

KEPT = 8  # sets of programs that a Denoiser keeps, the latest used


class Entry(NamedTuple):
    """One video on its way, with all that its steps need; on the host, float32."""

    sampler: SamplerState  # each [T, H, W, Z]
    done: np.ndarray  # steps that were taken
    inputs: Inputs

    @property
    def num_steps(self) -> int:
        """Steps of the whole way."""
        return int(self.inputs.controls.table.num_steps)

    @property
    def texts(self) -> int:
        """Texts that it has: 2 with a negative one, else 1."""
        return self.inputs.text.shape[0]

    @property
    def branches(self) -> int:
        """Micro-batches of a step: 2 with guidance, else 1."""
        return 2 if self.inputs.controls.guided else 1

    @property
    def latents(self) -> np.ndarray:
        """x [T, H, W, Z] with a given first frame in its place: the solver moves that one too."""
        x, first = self.sampler.x, self.inputs.first
        return np.concatenate([first, x[1:]]) if first is not None and self.inputs.has_first else np.asarray(x)

    def with_latents(self, x: np.ndarray) -> "Entry":
        """The same video with other latents [T, H, W, Z] before its next step."""
        return self._replace(sampler=self.sampler._replace(x=np.asarray(x, np.float32)))


def begin(latents: np.ndarray, inputs: Inputs) -> Entry:
    """A video before its first step, from latents [T, H, W, Z] at the first step's noise level."""
    none = np.zeros_like(latents)
    return Entry(SamplerState(latents, none, none, none, none), np.zeros((), np.int32), inputs)


@dataclass(frozen=True)
class Bucket:
    """What programs are compiled for: a number of slots, and shapes and dtypes of what each of their videos brings."""

    slots: int  # of each rank
    entry: Entry

    @classmethod
    def of(cls, entries: Sequence[Entry], *, ranks: int = 1, videos: int = 0) -> "Bucket":
        """The bucket of some videos, with slots for all (`room`), or for so many `videos`, of two texts each. Of their
        arrays the shapes suffice.

        Videos without guidance and those that do not renoise fit beside others; what else differs in shape is refused
        with a ValueError.
        """
        shapes = [shapes_at(None, entry) for entry in entries]
        widest = shapes[0].inputs.text
        widest = widest.update(shape=(2, *widest.shape[1:]))
        noise = next((s.inputs.noise for s in shapes if s.inputs.noise is not None), None)
        bucket = cls(room(-(-max(videos, len(entries)) // ranks)), _with(shapes[0], widest, noise))
        for shape in shapes:
            text = widest if shape.inputs.text.shape[1:] == widest.shape[1:] else shape.inputs.text
            if _with(shape, text, noise) != bucket.entry:
                raise ValueError("videos of other sizes, numbers of text rows or kinds of input are denoised apart")
        return bucket

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """(T, H, W, Z)."""
        return self.entry.sampler.x.shape

    def fitted(self, entry: Entry) -> Entry:
        """The entry with all arrays that the bucket's programs read: zeros where nothing of its own is looked at."""
        text, noise = entry.inputs.text, entry.inputs.noise
        if entry.texts < self.entry.texts:
            text = np.concatenate([text, np.zeros_like(text)])
        if noise is None and self.entry.inputs.noise is not None:
            noise = np.zeros(self.entry.inputs.noise.shape, np.float32)
        return _with(entry, text, noise)


def _with(entry: Entry, text: Any, noise: Any) -> Entry:
    return entry._replace(inputs=entry.inputs._replace(text=text, noise=noise))


def room(videos: int) -> int:
    """Slots for so many videos: 1, 2, 4, 8, then multiples of 8. Empty ones cost memory and no ticks."""
    return next((slots for slots in (1, 2, 4) if videos <= slots), -(-videos // 8) * 8)


class Running(NamedTuple):
    """A ring on each rank and the videos in their slots, on the devices. What changes it uses it up.

    Slots of all ranks follow each other: those of rank d are `d * Bucket.slots` and on.
    """

    inputs: Inputs  # with a leading axis of slots
    state: RingState  # of Carry, with a leading axis of slots


class Programs:
    """The compiled programs of a bucket: a ring without videos, one put in, ticks, one read out.

    ulysses: of how many devices trade tokens for heads (`dit.split_on`).
    """

    def __init__(
        self, cfg: TransformerConfig, mesh: Mesh, dtype: DTypeLike, bucket: Bucket, ulysses: int | None = None
    ):
        self.cfg, self.bucket, self.mesh = cfg, bucket, mesh
        self.ranks, branches, stages = (RULES.parts(mesh.shape, axis) for axis in ("request", "branch", "stage"))
        self.branches = bucket.entry.texts // branches  # that follow each other in the ring
        self.split = split = split_on(mesh, cfg, bucket.latent_shape, ulysses)
        graph, weights = abstract_weights(cfg, 1, stages, dtype, parallel_on(mesh, split))

        def own(entry: Entry) -> Entry:
            """This device's share of a video's latents, as tokens, with all else."""
            inputs = entry.inputs
            latents = entry.sampler, inputs.channels, inputs.first, inputs.noise
            sampler, channels, first, noise = jax.tree.map(lambda x: split.own(as_tokens(x, cfg)), latents)
            return Entry(sampler, entry.done, inputs._replace(channels=channels, first=first, noise=noise))

        def empty() -> Running:
            entry = jax.eval_shape(own, bucket.entry)
            hidden = jnp.zeros((1, 1, 1, 1, 1, split.frames * split.share, cfg.dim), dtype)
            carry = _zeros((1, 1, bucket.slots), fresh(entry.sampler))
            return Running(_zeros((bucket.slots,), entry.inputs), RingState(hidden, (), carry))

        def insert(running: Running, slot: Any, entry: Entry) -> Running:
            """On each device by itself: where the slot is another rank's, all stays as it is."""
            entry = own(entry)
            row = slot - position(RULES.request) * bucket.slots
            here, row = (row >= 0) & (row < bucket.slots), jnp.clip(row, 0, bucket.slots - 1)

            def put(rows: Any, new: Any, axis: int = 0) -> Any:
                def put_one(x: Any, y: Any) -> Any:
                    y = jnp.where(here, y, dynamic_index_in_dim(x, row, axis, keepdims=False))
                    return dynamic_update_index_in_dim(x, y, row, axis)

                return jax.tree.map(put_one, rows, new)

            carry = put(running.state.carry, fresh(entry.sampler), 2)
            return Running(put(running.inputs, entry.inputs), running.state._replace(carry=carry))

        def read(carry: Carry, row: Any) -> Carry:
            return jax.tree.map(lambda x: dynamic_index_in_dim(x[0, 0], row, keepdims=False), carry)

        specs, whole = Running(input_specs(mesh), state_specs(mesh)), PartitionSpec()
        brought = Inputs(*[whole] * len(Inputs._fields))._replace(text=RULES.spec(mesh, "branch"))  # of a single slot
        on_each = partial(jax.shard_map, mesh=mesh, out_specs=specs, check_vma=check_types(mesh))
        empty = on_each(empty, in_specs=())
        insert = on_each(insert, in_specs=(specs, whole, Entry(whole, whole, brought)))
        self._placed = jax.tree.map(partial(NamedSharding, mesh), specs)
        self._empty = jax.jit(empty, out_shardings=self._placed)
        self._insert = jax.jit(insert, donate_argnums=0, out_shardings=self._placed)
        stage = make_stage(cfg, graph, bucket.latent_shape, split)
        self._ring = make_ring(mesh, stage, map_axes(partial(RULES.spec, mesh), weights), specs.inputs)
        self._read = jax.jit(read)

    def empty(self) -> Running:
        """The rings of all ranks without videos."""
        return self._empty()

    def timetable(self) -> Timetable:
        """Of such rings."""
        return empty_timetable(RULES.parts(self.mesh.shape, "stage"), self.ranks, self.bucket.slots)

    def member(self, entry: Entry) -> Member:
        """A video as the timetable has it: with a branch alone where each has devices of its own."""
        branches = entry.branches if self.branches > 1 else 1
        return Member(branches, entry.num_steps, int(entry.done))

    def insert(self, running: Running, place: Place, entry: Entry) -> Running:
        """Put a video into a place, whatever was there before; when its steps enter, the timetable says."""
        return self._insert(running, np.int32(self.row(place)), self.bucket.fitted(entry))

    def run(self, weights: Weights, running: Running, timetable: Timetable, ticks: int) -> Running:
        """So many ticks; their results may not be there yet."""
        arguments = weights, running.inputs, self._turns(timetable), running.state
        return running._replace(state=self._ring(*arguments, np.int32(timetable.tick), np.int32(ticks)))

    def row(self, place: Place) -> int:
        """Where a place is in the arrays."""
        rank, slot = place
        return rank * self.bucket.slots + slot

    def read(self, running: Running, place: Place) -> Carry:
        """What the video in a place has become: latents [T, H, W, Z], on the host."""
        rank, row = place
        shares = []
        for device in self._first(rank):
            own = jax.tree.map(lambda x: x.addressable_data(device), running.state.carry)  # noqa: B023
            shares.append(self._read(own, np.int32(row)))
        latents = jax.tree.map(
            lambda *x: as_latents(np.concatenate(x, axis=1), self.cfg, self.bucket.latent_shape),
            *(share._replace(fault=None) for share in shares),
        )
        return latents._replace(fault=_first_of([int(share.fault) for share in shares]))

    def faults(self, running: Running) -> dict[Place, Fault]:
        """Places whose videos have computed what is not finite. Waits for all ticks that were started."""
        found = {}
        for rank in range(self.ranks):
            fault = running.state.carry.fault
            shares = [np.asarray(fault.addressable_data(device))[0, 0] for device in self._first(rank)]
            for slot, numbers in enumerate(np.stack(shares, axis=1).tolist()):
                if failed := Fault.parse(_first_of(numbers)):
                    found[rank, slot] = failed
        return found

    @property
    def running_shapes(self) -> Running:
        """Shapes, dtypes and places of the rings' arrays."""
        return jax.tree.map(shapes_at, self._placed, jax.eval_shape(self._empty))

    def listed(self, weights: Weights) -> Iterator[tuple[str, Callable, tuple]]:
        """(name, jitted function, arguments) of each program; of all arguments shapes and places."""
        number = jax.ShapeDtypeStruct((), np.int32)
        turns = shapes_at(None, self._turns(self.timetable()))
        running = self.running_shapes
        yield "ring", self._ring, (weights, running.inputs, turns, running.state, number, number)
        yield "the ring's slots", self._empty, ()
        yield "a video into its slot", self._insert, (running, number, self.bucket.entry)
        devices = [device for rank in range(self.ranks) for device in self._first(rank)]
        for device in devices:
            place = SingleDeviceSharding(self.mesh.devices.flat[device])
            own = jax.tree.map(lambda x: x.update(shape=x.sharding.shard_shape(x.shape)), running.state.carry)
            name = "a video out of its slot" + f" on device {device}" * (len(devices) > 1)
            yield name, self._read, (shapes_at(place, own), number)

    def _turns(self, timetable: Timetable) -> Turns:
        room = dict(slots=self.bucket.slots, branches=self.branches)
        each = [
            make_turns(plan, turns, phase.since, **room)
            for phase in timetable.phases
            for plan, turns in zip(phase.plans, phase.turns, strict=True)
        ]
        return jax.tree.map(lambda *x: np.stack(x).reshape(2, self.ranks, *x[0].shape).swapaxes(0, 1), *each)

    def _first(self, rank: int) -> list[int]:
        """Which of the mesh's devices have a rank's videos, a share of the tokens each: those of its first stage."""
        places = np.arange(self.mesh.size).reshape(self.mesh.devices.shape)
        return places[rank, 0, 0, :, 0].tolist()


def _first_of(faults: Sequence[int]) -> int:
    """Of the shares of a video's tokens the first fault, as a number; 0 where there is none."""
    return min((fault for fault in faults if fault > 0), default=0)


def _zeros(lead: tuple[int, ...], tree: Any) -> Any:
    return jax.tree.map(lambda x: jnp.zeros((*lead, *x.shape), x.dtype), tree)


@dataclass
class Denoiser:
    """The DiT on a mesh, with the programs made for it lately, and all that are still held elsewhere."""

    cfg: TransformerConfig
    weights: Weights
    mesh: Mesh
    dtype: jnp.dtype
    ulysses: int | None = None  # of how many devices trade tokens for heads; None: as many as can be
    _kept: OrderedDict = field(default_factory=OrderedDict, repr=False)
    _alive: WeakValueDictionary = field(default_factory=WeakValueDictionary, repr=False)
    _lock: Any = field(default_factory=Lock, repr=False)

    def bucket(self, entries: Sequence[Entry], videos: int = 0) -> Bucket:
        """The bucket of some videos on this mesh, with room for so many at least."""
        return Bucket.of(entries, ranks=RULES.parts(self.mesh.shape, "request"), videos=videos)

    def programs(self, bucket: Bucket) -> Programs:
        """The bucket's programs; those of the KEPT latest buckets are compiled once. Any thread may ask."""
        with self._lock:
            found = self._alive.get(bucket)
            if found is None:
                found = self._alive[bucket] = Programs(self.cfg, self.mesh, self.dtype, bucket, self.ulysses)
            self._kept[bucket] = found
            self._kept.move_to_end(bucket)
            while len(self._kept) > KEPT:
                self._kept.popitem(last=False)
            return found


class Loop:
    """Videos denoised together: advance them step by step, and look at them or change them in between."""

    def __init__(self, denoiser: Denoiser, entries: Sequence[Entry]):
        self.entries = list(entries)
        self.done = [int(entry.done) for entry in entries]  # steps, of each video
        self._weights, self._programs = denoiser.weights, denoiser.programs(denoiser.bucket(entries))
        members = [self._programs.member(entry) for entry in entries]
        dealt = deal([m.branches for m in members], ranks=self._programs.ranks, stages=num_stages(denoiser.mesh))
        self._places, self._running = dealt.places, self._programs.empty()
        self.timetable = self._programs.timetable().changed(dict(zip(dealt.places, members, strict=True)))
        for place, entry in zip(self._places, entries, strict=True):
            self._running = self._programs.insert(self._running, place, entry)

    @property
    def rounds(self) -> int:
        """Steps that are left to the video that has most."""
        return max(entry.num_steps - done for entry, done in zip(self.entries, self.done, strict=True))

    def advance(self) -> None:
        """Run until every video has made one step more, but for those that are done, and wait for it."""
        ends = [self.timetable.tick]
        for video, entry in enumerate(self.entries):
            if self.done[video] < entry.num_steps:
                ends.append(self.timetable.done_at(self._places[video], self.done[video]))
                self.done[video] += 1
        ticks = max(ends) - self.timetable.tick
        self._running = jax.block_until_ready(self._programs.run(self._weights, self._running, self.timetable, ticks))
        self.timetable = self.timetable.ran(ticks)

    def replace(self, latents: Mapping[int, np.ndarray]) -> None:
        """Go on with other latents [T, H, W, Z] of some videos.

        In the ring they may be in their next step already, with the old ones, so that step is begun again: by all,
        since they are to advance together.
        """
        self.timetable = self.timetable.restarted()
        for video, x in latents.items():
            entry = self.entry(video).with_latents(x)
            self._running = self._programs.insert(self._running, self._places[video], entry)

    def read(self, video: int) -> Carry:
        """A video's sampler and latest velocity, guided: latents [T, H, W, Z], on the host."""
        return self._programs.read(self._running, self._places[video])

    def latents(self) -> np.ndarray:
        """x of all videos [B, T, H, W, Z], float32, on the host."""
        return np.stack([self.read(video).sampler.x for video in range(len(self.entries))])

    def velocities(self) -> np.ndarray:
        """Of each video's latest step, guided [B, T, H, W, Z]; zeros before the first."""
        return np.stack([self.read(video).velocity for video in range(len(self.entries))])

    def entry(self, video: int) -> Entry:
        """A video as it is now, on the host."""
        return self.entries[video]._replace(sampler=self.read(video).sampler, done=np.array(self.done[video], np.int32))
