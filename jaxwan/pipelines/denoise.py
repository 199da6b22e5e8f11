"""Denoising: videos are put into the slots of a compiled ring, run, and read out of it.

One set of programs serves all videos of a `Bucket`: solvers, step counts, guidance, experts and timesteps are rows of
arrays, indexed by what the ring says each device holds, and which slots are in use is data too.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.lax import dynamic_update_index_in_dim
from jax.sharding import Mesh, PartitionSpec, SingleDeviceSharding
from jax.typing import DTypeLike

from jaxwan.config import TransformerConfig
from jaxwan.pipelines.dit import (
    WEIGHT_AXES,
    Carry,
    Inputs,
    Weights,
    abstract_weights,
    make_stage,
    num_tokens,
    shapes_at,
)
from jaxwan.schedulers.table import SamplerState
from jaxwan.sharding.mesh import sharding, spec
from jaxwan.sharding.ring import RingState, Turns, make_ring, make_turns
from jaxwan.sharding.turns import RingPlan, Turn, done_at, first_start

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

    slots: int
    entry: Entry

    @classmethod
    def of(cls, entries: Sequence[Entry]) -> "Bucket":
        """The bucket of some videos, with slots for all (`room`). Of their arrays the shapes suffice.

        Videos without guidance and those that do not renoise fit beside others; what else differs in shape is refused
        with a ValueError.
        """
        shapes = [shapes_at(None, entry) for entry in entries]
        widest = max(shapes, key=lambda entry: entry.texts)
        noise = next((s.inputs.noise for s in shapes if s.inputs.noise is not None), None)
        bucket = cls(room(len(entries)), _with(widest, widest.inputs.text, noise))
        for shape in shapes:
            text = widest.inputs.text
            text = text if shape.inputs.text.shape[1:] == text.shape[1:] else shape.inputs.text
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
    """A ring and the videos in its slots, on the devices. What changes it uses it up."""

    inputs: Inputs  # replicated, with a leading axis of slots
    turns: Turns
    state: RingState  # of Carry, with leading axes pp and slots


class Programs:
    """The compiled programs of a bucket: a ring without videos, one put in, ticks, one read out."""

    def __init__(self, cfg: TransformerConfig, mesh: Mesh, dtype: DTypeLike, bucket: Bucket):
        self.bucket, self.mesh, self.stages = bucket, mesh, mesh.shape["pp"]
        entry, position, everywhere = bucket.entry, sharding(mesh, "pp"), sharding(mesh)
        hidden = self.stages, 1, num_tokens(cfg, bucket.latent_shape), cfg.dim
        specs = Weights(*(spec(mesh, *axes) for axes in WEIGHT_AXES))
        graph, _ = abstract_weights(cfg, 1, self.stages, dtype)

        def empty(turns: Turns) -> Running:
            carry = Carry(entry.sampler, entry.sampler.x)
            rows = _zeros((bucket.slots,), entry.inputs), _zeros((self.stages, bucket.slots), carry)
            return Running(rows[0], turns, RingState(jnp.int32(0), jnp.zeros(hidden, dtype), (), rows[1]))

        def insert(running: Running, slot: Any, start: Any, entry: Entry) -> Running:
            def put(rows: Any, row: Any) -> Any:
                return jax.tree.map(lambda x, new: dynamic_update_index_in_dim(x, new, slot, 0), rows, row)

            turns, state = running.turns, running.state
            turns = turns._replace(
                start=put(turns.start, start), done=put(turns.done, entry.done),
                num_steps=put(turns.num_steps, entry.inputs.controls.table.num_steps),
            )  # fmt: skip
            new = Carry(entry.sampler, jnp.zeros_like(entry.sampler.x))
            carry = jax.vmap(put, in_axes=(0, None))(state.carry, new)  # in every stage's copy
            return Running(put(running.inputs, entry.inputs), turns, state._replace(carry=carry))

        def read(carry: Carry, slot: Any) -> Carry:
            return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x[0], slot, keepdims=False), carry)

        placed = Running(everywhere, everywhere, RingState(everywhere, position, (), position))
        self._empty = jax.jit(empty, out_shardings=placed)
        self._insert = jax.jit(insert, donate_argnums=0, out_shardings=placed)
        self._ring = make_ring(mesh, make_stage(cfg, graph, bucket.latent_shape[:3]), specs, PartitionSpec())
        self._read = jax.jit(read)
        self._placed = placed

    def empty(self, plan: RingPlan) -> Running:
        """The ring before its first tick; the plan's slots have no videos yet."""
        return self._empty(make_turns(plan, slots=self.bucket.slots, branches=self.bucket.entry.texts))

    def insert(self, running: Running, slot: int, start: int, entry: Entry) -> Running:
        """Put a video into a slot, to enter in round `start` (`turns.first_start`), whatever was there before."""
        return self._insert(running, np.int32(slot), np.int32(start), self.bucket.fitted(entry))

    def run(self, weights: Weights, running: Running, ticks: int) -> Running:
        """So many ticks; their results may not be there yet."""
        state = self._ring(weights, running.inputs, running.turns, running.state, np.int32(ticks))
        return running._replace(state=state)

    def read(self, running: Running, slot: int) -> Carry:
        """What a slot's video has become, on the first device."""
        own = jax.tree.map(lambda x: x.addressable_data(0), running.state.carry)
        return self._read(own, np.int32(slot))

    def listed(self, weights: Weights) -> Iterator[tuple[str, Callable, tuple]]:
        """(name, jitted function, arguments) of each program; of all arguments shapes and places."""
        number = jax.ShapeDtypeStruct((), np.int32)
        room = {"slots": self.bucket.slots, "branches": self.bucket.entry.texts}
        turns = shapes_at(None, make_turns(RingPlan(1, (1,)), **room))
        running = jax.tree.map(shapes_at, self._placed, jax.eval_shape(self._empty, turns))
        yield "ring", self._ring, (weights, running.inputs, running.turns, running.state, number)
        yield "the ring's slots", self._empty, (turns,)
        yield "a video into its slot", self._insert, (running, number, number, self.bucket.entry)
        first = SingleDeviceSharding(self.mesh.devices.flat[0])
        carry = jax.eval_shape(lambda carry: jax.tree.map(lambda x: x[:1], carry), running.state.carry)
        yield "a video out of its slot", self._read, (shapes_at(first, carry), number)


def _zeros(lead: tuple[int, ...], tree: Any) -> Any:
    return jax.tree.map(lambda x: jnp.zeros((*lead, *x.shape), x.dtype), tree)


@dataclass
class Denoiser:
    """The DiT on a mesh, with the programs made for it lately."""

    cfg: TransformerConfig
    weights: Weights
    mesh: Mesh
    dtype: jnp.dtype
    _made: OrderedDict = field(default_factory=OrderedDict, repr=False)

    def programs(self, bucket: Bucket) -> Programs:
        """The bucket's programs; those of the KEPT latest buckets are compiled once."""
        if bucket not in self._made:
            self._made[bucket] = Programs(self.cfg, self.mesh, self.dtype, bucket)
        self._made.move_to_end(bucket)
        while len(self._made) > KEPT:
            self._made.popitem(last=False)
        return self._made[bucket]


class Loop:
    """Videos denoised together: advance them step by step, and look at them or change them in between."""

    def __init__(self, denoiser: Denoiser, entries: Sequence[Entry]):
        self.entries, self.tick = list(entries), 0
        self.plan = RingPlan(denoiser.mesh.shape["pp"], tuple(entry.branches for entry in entries))
        self.turns = [Turn(0, entry.num_steps, int(entry.done)) for entry in entries]
        self.done = [int(entry.done) for entry in entries]  # steps, of each video
        self._weights, self._programs = denoiser.weights, denoiser.programs(Bucket.of(entries))
        self._running = self._programs.empty(self.plan)
        for slot, entry in enumerate(entries):
            self._running = self._programs.insert(self._running, slot, 0, entry)

    @property
    def rounds(self) -> int:
        """Steps that are left to the video that has most."""
        return max(turn.num_steps - done for turn, done in zip(self.turns, self.done, strict=True))

    def advance(self) -> None:
        """Run until every video has made one step more, but for those that are done, and wait for it."""
        ends = [self.tick]
        for slot, turn in enumerate(self.turns):
            if self.done[slot] < turn.num_steps:
                ends.append(done_at(self.plan, slot, turn, self.done[slot]))
                self.done[slot] += 1
        ticks = max(ends) - self.tick
        self._running = jax.block_until_ready(self._programs.run(self._weights, self._running, ticks))
        self.tick += ticks

    def replace(self, latents: Mapping[int, np.ndarray]) -> None:
        """Go on with other latents [T, H, W, Z] of some videos, by slot.

        In the ring they may be in their next step already, with the old ones, so that step is begun again: by all,
        since they are to advance together.
        """
        start = max(first_start(self.plan, slot, self.tick) for slot in range(len(self.entries)))
        for slot in range(len(self.entries)):
            entry = self.entry(slot)
            entry = entry.with_latents(latents[slot]) if slot in latents else entry
            self.turns[slot] = Turn(start, entry.num_steps, self.done[slot])
            self._running = self._programs.insert(self._running, slot, start, entry)

    def read(self, slot: int) -> Carry:
        """A video's sampler and latest velocity, guided, on the device."""
        return self._programs.read(self._running, slot)

    def latents(self) -> np.ndarray:
        """x of all videos [B, T, H, W, Z], float32, on the host."""
        return np.stack([np.asarray(self.read(slot).sampler.x) for slot in range(len(self.entries))])

    def velocities(self) -> np.ndarray:
        """Of each video's latest step, guided [B, T, H, W, Z]; zeros before the first."""
        return np.stack([np.asarray(self.read(slot).velocity) for slot in range(len(self.entries))])

    def entry(self, slot: int) -> Entry:
        """A video as it is now, on the host."""
        sampler = jax.tree.map(np.asarray, self.read(slot).sampler)
        return self.entries[slot]._replace(sampler=sampler, done=np.array(self.done[slot], np.int32))
