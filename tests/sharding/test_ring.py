"""The ring: its tick arithmetic against a simulation that knows nothing of it, and the program against a plain loop."""

import itertools
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from collectives import collectives, expected_collectives
from jax.sharding import NamedSharding
from jaxtyping import Array

from jaxwan.flops import Sent
from jaxwan.sharding.collectives import gather
from jaxwan.sharding.mesh import MeshSpec, make_mesh
from jaxwan.sharding.ring import RingState, Stage, make_ring, make_turns, slot_at, state_specs, turns_spec
from jaxwan.sharding.rules import RULES
from jaxwan.sharding.turns import RingPlan, Turn, deal, done_at

COMPILED = "/jax/core/compile/backend_compile_duration"

# Tick arithmetic


class Simulation:
    """Micro-batches moved by hand: in the first ticks of every period stage 0 takes them in one by one, each request as
    long as it has steps left. Steps are counted when they come back."""

    def __init__(self, plan: RingPlan, num_steps, start=None, period=None):
        self.plan, self.num_steps = plan, num_steps
        self.start = start or [0] * len(plan.branches)
        self.period = period or plan.period
        self.order = [(slot, branch) for slot, count in enumerate(plan.branches) for branch in range(count)]
        self.held = [None] * plan.stages  # (request, branch, step) at each stage
        self.entered = dict.fromkeys(self.order, 0)
        self.done = [0] * len(plan.branches)  # steps finished
        self.tick = 0

    def run_tick(self):
        """One tick; returns what each stage worked on."""
        place, index = self.tick % self.period, self.tick // self.period
        if place < len(self.order) and self._rides(self.order[place][0], index):
            r, g = self.order[place]
            assert self.done[r] == self.entered[r, g], "a step entered before the one before it was finished"
            self.held[0] = (r, g, self.entered[r, g])
            self.entered[r, g] += 1
        worked, returned = list(self.held), self.held[-1]
        self.held = [None, *self.held[:-1]]
        if returned is not None and returned[1] == self.plan.branches[returned[0]] - 1:
            assert self.done[returned[0]] == returned[2]
            self.done[returned[0]] += 1
        self.tick += 1
        return worked

    def _rides(self, request, index):
        return self.start[request] <= index < self.start[request] + self.num_steps[request]


def plans():
    for stages, requests, branches in itertools.product((1, 2, 3, 4, 7), (1, 2, 3, 5), (1, 2)):
        yield RingPlan(stages, (branches,) * requests)
    for stages, branches in itertools.product((1, 3, 4, 7), ((1, 2), (2, 1), (2, 1, 1), (1, 2, 1, 3))):
        yield RingPlan(stages, branches)


STEPS = [4, 1, 3, 7, 2]


@pytest.mark.parametrize("plan", plans(), ids=str)
def test_ticks_equal_a_simulation(plan):
    steps = STEPS[: len(plan.branches)]
    simulation = Simulation(plan, steps)
    after = []  # steps finished after each tick
    while simulation.done != steps:
        simulation.run_tick()
        after.append(list(simulation.done))
    assert plan.ticks(steps) == len(after)
    for index in range(max(steps)):
        ticks = max(done_at(plan, slot, Turn(0, n), index) for slot, n in enumerate(steps) if n > index)
        assert after[ticks - 1] == [min(n, index + 1) for n in steps]


@pytest.mark.parametrize("plan", [p for p in plans() if p.period > p.microbatches], ids=str)
def test_no_shorter_period_would_do(plan):
    """Nor would one below the micro-batches: stage 0 takes one in a tick."""
    with pytest.raises(AssertionError, match="before the one before it was finished"):
        simulation = Simulation(plan, [3] * len(plan.branches), period=plan.period - 1)
        for _ in range(3 * plan.period):
            simulation.run_tick()


@pytest.mark.parametrize(
    ("plan", "steps", "start"),
    [
        (RingPlan(4, (2,)), [3], [0]),
        (RingPlan(3, (2, 2, 2)), [2, 4, 1], [0, 0, 0]),
        (RingPlan(2, (1, 1, 1)), [3, 2, 2], [0, 2, 1]),
        (RingPlan(5, (2, 2)), [1, 3], [3, 0]),
        (RingPlan(1, (1, 1)), [2, 2], [1, 0]),
        (RingPlan(3, (2, 1, 2)), [2, 3, 1], [1, 0, 2]),
    ],
)
def test_every_device_works_out_what_it_holds(plan, steps, start):
    simulation = Simulation(plan, steps, start)
    turns = make_turns(plan, [Turn(*turn) for turn in zip(start, steps, strict=True)], slots=4, branches=2)
    turns = jax.tree.map(jnp.asarray, turns)
    ticks = 8 * plan.period
    u = jnp.arange(ticks)[:, None] - jnp.arange(plan.stages)  # tick - position
    slots = jax.jit(jax.vmap(jax.vmap(lambda u: slot_at(turns, u))))(u)
    slots = jax.tree.map(np.asarray, slots)
    for tick in range(ticks):
        for place, held in enumerate(simulation.run_tick()):
            at = jax.tree.map(lambda x, i=(tick, place): x[i].item(), slots)
            assert at.active == (held is not None)
            assert held in (None, (at.request, at.branch, at.step))
            assert at.last == (at.branch == plan.branches[at.request] - 1)
            assert 0 <= at.request < len(steps) and 0 <= at.step < steps[at.request]  # also where it is idle


def test_the_worked_example_of_the_module():
    plan = RingPlan(2, (2,))
    turns = jax.tree.map(jnp.asarray, make_turns(plan, [Turn(0, 2)], slots=1, branches=2))
    shown = {}
    for place in range(2):
        slots = jax.jit(jax.vmap(lambda u: slot_at(turns, u)))(jnp.arange(6) - place)
        rows = zip(*(x.tolist() for x in (slots.branch, slots.step, slots.active)), strict=True)
        shown[place] = [f"{'cu'[branch]}{step}" if active else "." for branch, step, active in rows]
    assert plan.period == 3
    assert shown[0] == ["c0", "u0", ".", "c1", "u1", "."]
    assert shown[1] == [".", "c0", "u0", ".", "c1", "u1"]
    assert plan.ticks([2]) == 6


@pytest.mark.parametrize(
    ("plan", "steps", "period", "ticks"),
    [
        (RingPlan(1, (2,)), [40], 2, 80),  # one device: a tick for each of 2 x 40 evaluations
        (RingPlan(4, (2,)), [40], 5, 200),  # one request cannot fill four stages: 3 idle ticks in 5
        (RingPlan(4, (2, 2)), [40, 40], 5, 202),
        (RingPlan(4, (2, 1)), [40, 40], 5, 201),  # no tick for the branch that there is not
        (RingPlan(4, (1,) * 4), [40] * 4, 4, 163),  # four requests without guidance fill them
        (RingPlan(4, (2,) * 3), [40] * 3, 6, 243),
    ],
)
def test_literal_tick_counts(plan, steps, period, ticks):
    assert (plan.period, plan.ticks(steps)) == (period, ticks)


# The program, on a toy model of whole numbers: every order of operations but the right one gives another result


class Toy(NamedTuple):
    """What the toy's loop changes: x, the cond branch's result, and how many steps were taken."""

    x: Array  # [R, K]
    cond: Array  # [R, K]
    steps: Array  # [R]


class Given(NamedTuple):
    """What the toy's loop reads: something of each micro-batch, and the layers' biases, staged as the weights are."""

    texts: Array  # [R, G, K]
    biases: Array  # [layers, K]


def enter_toy(weights, inputs, carry, slot):
    return carry.x[slot.request] * 3 + inputs.texts[slot.request, slot.branch] * (slot.step + 1)


def toy_layer(hidden, layer):
    """All-zero parameters are an identity."""
    scale, bias = layer
    return hidden + scale * hidden + bias


def run_toy_layers(weights, inputs, hidden, held, slot):
    return jax.lax.scan(lambda h, layer: (toy_layer(h, layer), None), hidden, (weights, inputs.biases))[0], held


def retire_toy(branches):
    def retire(weights, inputs, carry, hidden, slot):
        r, last, outs = slot.request, slot.last, gather(hidden, "cfg")
        cond, uncond = outs if len(outs) == 2 else (carry.cond[r], hidden)
        x = carry.x[r] + (2 * cond if branches == 2 else 0) - uncond
        new = Toy(jnp.where(last, x, carry.x[r]), outs[0], carry.steps[r] + last)
        return jax.tree.map(lambda rows, n: rows.at[r].set(jnp.where(slot.active, n, rows[r])), carry, new)

    return retire


def plain_loop(layers, texts, x, steps, branches):
    """Each request alone, step by step, layer by layer, in NumPy."""
    for r, count in enumerate(steps):
        for step in range(count):
            outs = []
            for branch in range(branches):
                hidden = x[r] * 3 + texts[r, branch] * (step + 1)
                for layer in zip(*layers, strict=True):
                    hidden = toy_layer(hidden, layer)
                outs.append(hidden)
            x[r] += (2 * outs[0] if branches == 2 else 0) - outs[-1]
    return x


def put(mesh, tree, specs):
    """Arrays on the devices of a mesh, by their PartitionSpecs."""
    return jax.device_put(tree, jax.tree.map(partial(NamedSharding, mesh), specs))


class Problem:
    """Five layers, three requests of different lengths that start in different rounds, or as many as are told."""

    layers, width = 5, 2

    def __init__(self, mesh, branches, steps=(3, 1, 4), start=(0, 2, 1)):
        rng, count = np.random.default_rng(0), len(steps)
        self.branches, self.steps, self.start, self.sizes = branches, list(steps), start, mesh
        self.plan = deal([branches // mesh.cfg] * count, ranks=mesh.dp, stages=mesh.pp)
        self.room = -(-count // mesh.dp)  # slots of a rank
        self.slots = [rank * self.room + slot for rank, slot in self.plan.places]
        self.weights, biases = (rng.integers(-9, 9, (self.layers, self.width), np.int32) for _ in range(2))
        self.inputs = Given(rng.integers(-9, 9, (count, branches, self.width), np.int32), biases)
        self.x = rng.integers(-9, 9, (count, self.width), np.int32)
        self.mesh = make_mesh(mesh)
        staged = RULES.spec(self.mesh, "layer")
        given = Given(RULES.spec(self.mesh, "request", "branch"), staged)
        self.run = make_ring(self.mesh, Stage(enter_toy, run_toy_layers, retire_toy(branches)), staged, given)
        turns = [[Turn()] * self.room for _ in range(mesh.dp)]
        for (rank, slot), *turn in zip(self.plan.places, start, steps, strict=True):
            turns[rank][slot] = Turn(*turn)
        room = dict(slots=self.room, branches=branches // mesh.cfg)
        turns = [make_turns(plan, own, **room) for plan, own in zip(self.plan.plans, turns, strict=True)]
        turns = jax.tree.map(lambda *rows: np.stack(rows)[:, None], *turns)  # of a single phase
        short = -self.layers % mesh.pp  # padding layers, of zeros
        scales, biases = (np.pad(w, ((0, short), (0, 0))) for w in (self.weights, biases))
        inputs = Given(self.in_slots(self.inputs.texts), biases)
        self.placed = put(self.mesh, (scales, inputs, turns), (staged, given, turns_spec(self.mesh)))

    def in_slots(self, rows):
        """Rows of the requests where their slots are, garbage in the others."""
        slots = np.full((self.sizes.dp * self.room, *rows.shape[1:]), 54321, rows.dtype)
        slots[self.slots] = rows
        return slots

    def first_state(self):
        rows = Toy(self.x, np.zeros_like(self.x), np.zeros(len(self.x), np.int32))
        rows = jax.tree.map(lambda a: np.repeat(self.in_slots(a)[None, None], self.sizes.pp, axis=0), rows)
        garbage = np.full((self.sizes.dp, self.sizes.cfg, self.sizes.pp, 1, self.width), 12345, np.int32)
        return put(self.mesh, RingState(garbage, (), rows), state_specs(self.mesh)._replace(held=()))

    def segments(self, *ticks):
        state, tick = self.first_state(), 0
        for count in ticks:
            state = self.run(*self.placed, state, np.int32(tick), np.int32(count))
            tick += count
        return state

    def truth(self, state):
        """The carry of stage 0, by request."""
        return jax.tree.map(lambda x: np.asarray(x)[0, 0, self.slots], state.carry)

    @property
    def total(self):
        """Ticks until all are done; late starters count from their round."""
        turns = [Turn(*turn) for turn in zip(self.start, self.steps, strict=True)]
        return max(done_at(*self.plan.at(r), turn, turn.num_steps - 1) for r, turn in enumerate(turns))

    def ticks_of_round(self, index):
        """Until every request has finished what it does in a round."""
        return max(done_at(*self.plan.at(r), Turn(0, index + 1), index) for r in range(len(self.steps)))

    def check(self):
        """The ring equals a plain loop, and ticks beyond the end change nothing."""
        layers = self.weights, self.inputs.biases
        expected = plain_loop(layers, self.inputs.texts, self.x.copy(), self.steps, self.branches)
        for ticks in (self.total, self.total + 3):
            done = self.truth(self.segments(ticks))
            np.testing.assert_array_equal(done.x, expected)
            assert done.steps.tolist() == self.steps
        assert self.truth(self.segments(self.total - 1)).steps.tolist() != self.steps


@pytest.mark.parametrize("branches", [1, 2])
@pytest.mark.parametrize("stages", [1, 2, 3, 4, 5])
def test_the_ring_equals_a_plain_loop_bit_for_bit(stages, branches):
    Problem(MeshSpec(pp=stages), branches).check()


@pytest.mark.parametrize(
    ("mesh", "branches", "steps"),
    [
        ("dp=2", 1, [2, 3]),
        ("dp=2", 2, [2, 3, 1]),  # a slot is left over
        ("dp=3,pp=2", 2, [2, 1, 3, 2]),
        ("dp=4,pp=2", 1, [3, 2, 4]),  # a rank has none
        ("dp=8", 2, [1, 2]),
        ("cfg=2", 2, [3]),
        ("cfg=2,pp=2", 2, [3]),
        ("cfg=2,pp=4", 2, [2, 1, 3, 1, 2]),
        ("cfg=2,pp=3", 2, [2, 4]),  # layers that do not divide
        ("dp=2,cfg=2", 2, [2, 1, 4]),
        ("dp=2,cfg=2,pp=2", 2, [2, 1, 4, 3, 1]),
    ],
)
def test_rings_side_by_side_equal_a_plain_loop_bit_for_bit(mesh, branches, steps):
    problem = Problem(MeshSpec.parse(mesh), branches, steps, [0] * len(steps))
    problem.check()
    assert problem.total == problem.plan.ticks(steps)
    late = Problem(MeshSpec.parse(mesh), branches, steps, [2 * (r % 2) for r in range(len(steps))])
    np.testing.assert_array_equal(
        late.truth(late.segments(late.total)).x, problem.truth(problem.segments(problem.total)).x
    )


def test_any_segmentation_gives_the_same_state_with_one_executable():
    def listen(event, _, **__):
        events.append(event)

    problem, events = Problem(MeshSpec(dp=2, pp=3), 2), []
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        whole = problem.segments(problem.total)
        assert COMPILED in events
        events.clear()
        for ticks in ([1] * problem.total, [0, 5, 0, problem.total - 5], [7, problem.total - 7]):
            state = problem.segments(*ticks)
            jax.tree.map(np.testing.assert_array_equal, state, whole)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert COMPILED not in events


@pytest.mark.parametrize("mesh", ["pp=4", "dp=2", "dp=2,cfg=2"])
def test_a_state_between_two_rounds_holds_finished_steps_alone(mesh):
    """However many micro-batches each ring has: no request is a step ahead."""
    problem = Problem(MeshSpec.parse(mesh), 2)
    state, finished, tick = problem.first_state(), [], 0
    for index in range(5):
        ticks = problem.ticks_of_round(index) - tick
        state = problem.run(*problem.placed, state, np.int32(tick), np.int32(ticks))
        tick += ticks
        finished.append(problem.truth(state).steps.tolist())
    assert finished == [[1, 0, 0], [2, 0, 1], [3, 1, 2], [3, 1, 3], [3, 1, 4]]


@pytest.mark.parametrize("mesh", ["pp=1", "pp=3", "dp=2", "cfg=2", "dp=2,cfg=2,pp=2"])
def test_a_tick_holds_no_collectives_but_its_own(mesh):
    """One hop over pp, one sum over cfg, nothing between requests."""
    problem = Problem(MeshSpec.parse(mesh), 2)
    text = problem.run.lower(*problem.placed, problem.first_state(), np.int32(0), np.int32(1)).compile().as_text()
    branches = Sent("cfg", "all-reduce", problem.mesh.shape["cfg"], 0, 1, 0)
    hop = Sent("pp", "collective-permute", problem.mesh.shape["pp"], 0, 1, 0)
    traffic = [sent for sent in (branches, hop) if sent.among > 1]
    assert collectives(text) == expected_collectives(problem.mesh, traffic)


# Stages that remember


def remember(hidden, layer, memory):
    """A layer whose result depends on all that it has seen of a request."""
    return toy_layer(hidden, layer) + memory, memory * 3 + hidden


def run_remembering_layers(weights, inputs, hidden, held, slot):
    hidden, memory = jax.lax.scan(
        lambda h, layer: remember(h, layer[:2], layer[2]), hidden, (weights, inputs.biases, held[:, slot.request])
    )
    return hidden, held.at[:, slot.request].set(jnp.where(slot.active, memory, held[:, slot.request]))


@pytest.mark.parametrize("stages", [1, 2, 4])
def test_a_stage_keeps_its_own_from_tick_to_tick(stages):
    """Idle ticks between must leave it alone; the branches of a request share it, in their order."""
    layers, steps, branches, width = 4, [3, 1, 4], 2, 2
    rng, mesh = np.random.default_rng(1), make_mesh(MeshSpec(pp=stages))
    weights, biases = (rng.integers(-9, 9, (layers, width), np.int32) for _ in range(2))
    texts, first = rng.integers(-9, 9, (3, branches, width), np.int32), rng.integers(-9, 9, (3, width), np.int32)
    x, memory = first.copy(), np.zeros((layers, 3, width), np.int32)
    for r, count in enumerate(steps):
        for step in range(count):
            outs = []
            for branch in range(branches):
                hidden = x[r] * 3 + texts[r, branch] * (step + 1)
                for i in range(layers):
                    hidden, memory[i, r] = remember(hidden, (weights[i], biases[i]), memory[i, r])
                outs.append(hidden)
            x[r] += 2 * outs[0] - outs[-1]

    staged = RULES.spec(mesh, "layer")
    plan = RingPlan(stages, (branches,) * 3)
    stage = Stage(enter_toy, run_remembering_layers, retire_toy(branches))
    specs = staged, Given(RULES.spec(mesh, "request", "branch"), staged)
    run = make_ring(mesh, stage, *specs)
    rows = Toy(first, np.zeros_like(first), np.zeros(3, np.int32))
    rows = jax.tree.map(lambda a: np.repeat(a[None, None], stages, axis=0), rows)
    held = np.zeros((1, 1, stages, 1, layers // stages, 3, width), np.int32)
    state = RingState(np.zeros((1, 1, stages, 1, width), np.int32), held, rows)
    state = put(mesh, state, state_specs(mesh))
    turns = make_turns(plan, [Turn(0, n) for n in steps], slots=3, branches=branches)
    turns = jax.tree.map(lambda x: x[None, None], turns)
    given = put(mesh, ((weights, Given(texts, biases)), turns), (specs, turns_spec(mesh)))
    tick = 0
    for ticks in (3, plan.ticks(steps) - 3, 5):
        state = run(*given[0], given[1], state, np.int32(tick), np.int32(ticks))
        tick += ticks
    np.testing.assert_array_equal(np.asarray(state.carry.x)[0, 0], x)
    np.testing.assert_array_equal(np.asarray(state.held).reshape(layers, 3, width), memory)
