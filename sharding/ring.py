"""The pipeline ring: layers sharded over `pp`, micro-batches circling through the stages until their steps are done.

Every rank of the other mesh axes has a ring, all in the same tick: those of `dp` other requests, those of `cfg` the
other branch of the same ones, those of `sp` other tokens of it, those of `tp` a share of each layer.

A micro-batch is one (request, branch) pair. Each tick, stage 0 takes in the micro-batch whose turn it is, every stage
applies its layers to the one it holds, all pass theirs on, and what returns from the last stage is retired at stage 0,
where it may finish a step of its request. Nothing waits for a step to end: requests enter again once they are back.

No counters travel with the data. In tick t, position p holds what entered in tick u = t - p; its round is u // period
and its micro-batch u % period, so every device works out by itself what it holds. Worked example, 2 stages, 1 request
with 2 branches, period max(2, 2 + 2 - 1) = 3:

    tick     0   1   2   3   4   5        c0: cond of step 0, u0: uncond of step 0
    stage 0  c0  u0  .   c1  u1  .        u0 leaves stage 1 in tick 2 and is retired at stage 0 in that tick,
    stage 1      c0  u0  .   c1  u1       so step 1 can enter in tick 3

This module knows nothing of the model: what enters, what a stage does and what retiring means are functions. Which
slots are in use, by how many branches, is data too: arrays may have room for more, which costs memory and no ticks.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Int, PyTree

from jaxwan.sharding.collectives import position, shift
from jaxwan.sharding.rules import RULES
from jaxwan.sharding.turns import RingPlan, Turn


class Slot(NamedTuple):
    """The micro-batch at one position of the ring; indices are in range even where it is not active."""

    request: Int[Array, ""]
    branch: Int[Array, ""]
    last: Bool[Array, ""]  # whether no branch of the request follows
    step: Int[Array, ""]
    active: Bool[Array, ""]


class Turns(NamedTuple):
    """A plan and the turns of its requests (`turns.RingPlan`, `turns.Turn`), for R slots of up to G branches.

    The ring takes them with two leading axes: of ranks, each of which has plans of its own, and of phases, the plans
    that follow each other. What has entered by one plan goes its way by it while others enter by the next.
    """

    since: Int[Array, "*d"]  # the tick in which the plan's first round begins
    period: Int[Array, "*d"]
    microbatches: Int[Array, "*d"]
    owner: Int[Array, "*d m"]  # slot of each micro-batch, M = R G
    branch: Int[Array, "*d m"]
    branches: Int[Array, "*d r"]
    start: Int[Array, "*d r"]
    num_steps: Int[Array, "*d r"]
    done: Int[Array, "*d r"]


def make_turns(plan: RingPlan, turns: Sequence[Turn] = (), since: int = 0, *, slots: int, branches: int) -> Turns:
    """The turns as arrays, on the host, with room for `slots` of `branches`; those without a turn are empty."""
    pairs = [(slot, branch) for slot, count in enumerate(plan.branches) for branch in range(count)]
    room = np.zeros((2, slots * branches), np.int32)
    room[:, : len(pairs)] = np.array(pairs, np.int32).reshape(-1, 2).T
    given = np.zeros((4, slots), np.int32)
    given[0, : len(plan.branches)] = plan.branches
    given[1:, : len(turns)] = np.array(turns, np.int32).reshape(-1, 3).T
    return Turns(np.int32(since), np.int32(plan.period), np.int32(plan.microbatches), *room, *given)


class RingState(NamedTuple):
    """What a segment of ticks hands to the next. Leading axes: of hidden and held dp, cfg, pp, sp; of carry pp, sp,
    slots."""

    hidden: PyTree
    held: PyTree  # what a stage keeps from tick to tick, such as its layers' caches; () where they keep nothing
    carry: PyTree  # each stage's own, of which the first one's is the truth


class Stage(NamedTuple):
    """What the ring does to a micro-batch, as pure functions of this device's share of weights and inputs."""

    enter: Callable[[Any, Any, Any, Slot], Any]  # (weights, inputs, carry, slot) -> hidden
    layers: Callable[[Any, Any, Any, Any, Slot], tuple]  # (weights, inputs, hidden, held, slot) -> (hidden, held)
    retire: Callable[[Any, Any, Any, Any, Slot], Any]  # (weights, inputs, carry, hidden, slot) -> carry


def slot_at(turns: Turns, u: Int[Array, ""]) -> Slot:
    """The micro-batch that entered (or would have) in tick u, by a single plan."""
    u = u - turns.since
    index, microbatch = u // turns.period, u % turns.period
    here = microbatch < turns.microbatches
    row = jnp.where(here, microbatch, 0)
    request, branch = turns.owner[row], turns.branch[row]
    start, num_steps, done = (column[request] for column in (turns.start, turns.num_steps, turns.done))
    step = index - start + done
    active = (u >= 0) & here & (index >= start) & (step < num_steps)
    step = jnp.clip(step, 0, jnp.maximum(num_steps - 1, 0))  # an empty slot has a step too
    return Slot(request, branch, branch == turns.branches[request] - 1, step, active)


def _of_phase(turns: Turns, u: Int[Array, ""]) -> Turns:
    """Of several plans the one by which a micro-batch entered in tick u."""
    phase = jnp.sum(u >= turns.since[1:])
    return jax.tree.map(lambda x: x[phase], turns)


def make_ring(mesh: Mesh, stage: Stage, weight_specs: PyTree, input_specs: PyTree) -> Callable[..., RingState]:
    """The compiled program `run(weights, inputs, turns, state, tick, ticks) -> state`, with `state` donated: `ticks`
    ticks from `tick` on.

    Both are traced: one executable serves every segment. weight_specs, input_specs: PartitionSpecs of
    `weights` and `inputs`; turns have a row for each rank of requests. Idle positions compute on garbage that nothing
    reads: leaving the work out would make control flow differ between devices, which deadlocks collectives.
    """
    axis, stages = RULES.stage, mesh.shape[RULES.stage]

    def run(weights, inputs, turns, state, first, ticks):
        turns = jax.tree.map(lambda x: x[0], turns)
        carry = jax.tree.map(lambda x: x[0, 0], state.carry)
        hidden, held = jax.tree.map(lambda x: x[0, 0, 0, 0], (state.hidden, state.held))
        place = position(axis)

        def entered(u):
            return slot_at(_of_phase(turns, u), u)

        def tick(t, loop):
            hidden, held, carry = loop
            entering = stage.enter(weights, inputs, carry, entered(t))
            hidden = jax.tree.map(lambda new, old: jnp.where(place == 0, new, old), entering, hidden)
            hidden, held = stage.layers(weights, inputs, hidden, held, entered(t - place))
            hidden = shift_tree(hidden)
            carry = stage.retire(weights, inputs, carry, hidden, entered(t - (stages - 1)))
            return hidden, held, carry

        hidden, held, carry = jax.lax.fori_loop(first, first + ticks, tick, (hidden, held, carry))
        hidden, held = jax.tree.map(lambda x: x[None, None, None, None], (hidden, held))
        return RingState(hidden, held, jax.tree.map(lambda x: x[None, None], carry))

    def shift_tree(tree):
        return jax.tree.map(lambda x: shift(x, axis), tree)

    specs = state_specs(mesh)
    sharded = jax.shard_map(
        run, mesh=mesh, in_specs=(weight_specs, input_specs, turns_spec(mesh), specs, PartitionSpec(), PartitionSpec()),
        out_specs=specs, check_vma=check_types(mesh),
    )  # fmt: skip
    # fixed output shardings: inferred ones may be spelt differently from the inputs', and the second call recompiles
    return jax.jit(sharded, donate_argnums=3, out_shardings=jax.tree.map(partial(NamedSharding, mesh), specs))


def turns_spec(mesh: Mesh) -> PartitionSpec:
    """Of turns: each rank of requests has a row."""
    return RULES.spec(mesh, "request")


def state_specs(mesh: Mesh) -> RingState:
    """Of a state: of hidden and held each device has its own, in a row of its own along four axes; carry goes by
    stages, shares of tokens, and slots, and is that of both branches. Devices that share heads have all alike."""
    own = RULES.spec(mesh, "request", "branch", "stage", "token")
    return RingState(own, own, RULES.spec(mesh, "stage", "token", "request"))


def check_types(mesh: Mesh) -> bool:
    """Whether shard_map proves which values vary over which axis: on CPUs only, other kernels have no rules for it."""
    return mesh.devices.flat[0].platform == "cpu"
