"""The ring: its tick arithmetic against a simulation that knows nothing of it, and the program against a plain loop."""

import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array

from jaxwan.sharding.mesh import MeshSpec, make_mesh, sharding, spec
from jaxwan.sharding.ring import RingState, Stage, make_ring, make_turns, slot_at
from jaxwan.sharding.turns import RingPlan, Turn, done_at

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
        self.tick = self.busy = 0

    def run_tick(self):
        """One tick; returns what each stage worked on."""
        place, index = self.tick % self.period, self.tick // self.period
        if place < len(self.order) and self._rides(self.order[place][0], index):
            r, g = self.order[place]
            assert self.done[r] == self.entered[r, g], "a step entered before the one before it was finished"
            self.held[0] = (r, g, self.entered[r, g])
            self.entered[r, g] += 1
        worked, returned = list(self.held), self.held[-1]
        self.busy += sum(h is not None for h in worked)
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
def test_ticks_and_utilisation_equal_a_simulation(plan):
    steps = STEPS[: len(plan.branches)]
    simulation = Simulation(plan, steps)
    after = []  # steps finished after each tick
    while simulation.done != steps:
        simulation.run_tick()
        after.append(list(simulation.done))
    assert plan.ticks(steps) == len(after)
    assert plan.utilisation(steps) == pytest.approx(simulation.busy / (plan.stages * len(after)))
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
    assert plan.utilisation([2]) == pytest.approx(4 / 6)


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
        r, last = slot.request, slot.last
        x = carry.x[r] + (2 * carry.cond[r] if branches == 2 else 0) - hidden
        new = Toy(jnp.where(last, x, carry.x[r]), hidden, carry.steps[r] + last)
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


class Problem:
    """Five layers, three requests of different lengths that start in different rounds."""

    layers, steps, start, width = 5, [3, 1, 4], [0, 2, 1], 2

    def __init__(self, stages, branches):
        rng = np.random.default_rng(0)
        self.branches, self.plan = branches, RingPlan(stages, (branches,) * len(self.steps))
        self.weights, biases = (rng.integers(-9, 9, (self.layers, self.width), np.int32) for _ in range(2))
        self.inputs = Given(rng.integers(-9, 9, (3, branches, self.width), np.int32), biases)
        self.x = rng.integers(-9, 9, (3, self.width), np.int32)
        self.mesh = make_mesh(MeshSpec(pp=stages))
        staged, everywhere = spec(self.mesh, "pp"), spec(self.mesh)
        stage = Stage(enter_toy, run_toy_layers, retire_toy(branches))
        self.run = make_ring(self.mesh, stage, staged, Given(everywhere, staged))
        turns = [Turn(*turn) for turn in zip(self.start, self.steps, strict=True)]
        turns = make_turns(self.plan, turns, slots=len(turns), branches=branches)
        short = -self.layers % stages  # padding layers, of zeros
        scales, biases = (np.pad(w, ((0, short), (0, 0))) for w in (self.weights, biases))
        self.placed = (
            jax.device_put(scales, sharding(self.mesh, "pp")),
            jax.device_put(Given(self.inputs.texts, biases), Given(sharding(self.mesh), sharding(self.mesh, "pp"))),
            jax.device_put(turns, sharding(self.mesh)),
        )

    def first_state(self):
        rows = Toy(self.x, np.zeros_like(self.x), np.zeros(3, np.int32))
        stages = self.plan.stages
        rows = jax.tree.map(lambda a: np.repeat(a[None], stages, axis=0), rows)
        garbage = np.full((stages, self.width), 12345, np.int32)
        state = RingState(np.int32(0), garbage, (), rows)
        everywhere, position = sharding(self.mesh), sharding(self.mesh, "pp")
        return jax.device_put(state, RingState(everywhere, position, (), position))

    def segments(self, *ticks):
        state = self.first_state()
        for count in ticks:
            state = self.run(*self.placed, state, np.int32(count))
        return state

    @property
    def total(self):
        """Ticks until all are done; late starters count from their round."""
        return self.ticks_of_round(max(s + n for s, n in zip(self.start, self.steps, strict=True)) - 1)

    def ticks_of_round(self, index):
        """Until every request has finished what it does in a round."""
        return done_at(self.plan, len(self.steps) - 1, Turn(0, index + 1), index)


def truth(state):
    """The carry of stage 0."""
    return jax.tree.map(lambda x: np.asarray(x)[0], state.carry)


@pytest.mark.parametrize("branches", [1, 2])
@pytest.mark.parametrize("stages", [1, 2, 3, 4, 5])
def test_the_ring_equals_a_plain_loop_bit_for_bit(stages, branches):
    problem = Problem(stages, branches)
    done = truth(problem.segments(problem.total))
    layers = problem.weights, problem.inputs.biases
    expected = plain_loop(layers, problem.inputs.texts, problem.x.copy(), problem.steps, branches)
    np.testing.assert_array_equal(done.x, expected)
    assert done.steps.tolist() == problem.steps
    # ticks beyond the end change nothing
    more = truth(problem.segments(problem.total + 3))
    np.testing.assert_array_equal(more.x, expected)
    assert more.steps.tolist() == problem.steps


def test_any_segmentation_gives_the_same_state_with_one_executable():
    def listen(event, _, **__):
        events.append(event)

    problem, events = Problem(3, 2), []
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        whole = problem.segments(problem.total)
        assert COMPILED in events
        events.clear()
        for ticks in ([1] * problem.total, [0, 5, 0, problem.total - 5], [7, problem.total - 7]):
            state = problem.segments(*ticks)
            assert int(state.tick) == problem.total
            jax.tree.map(np.testing.assert_array_equal, state, whole)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert COMPILED not in events


def test_a_state_between_two_rounds_holds_finished_steps_alone():
    problem = Problem(4, 2)
    state, finished = problem.first_state(), []
    for index in range(5):
        ticks = problem.ticks_of_round(index) - int(state.tick)
        state = problem.run(*problem.placed, state, np.int32(ticks))
        finished.append(truth(state).steps.tolist())
    assert finished == [[1, 0, 0], [2, 0, 1], [3, 1, 2], [3, 1, 3], [3, 1, 4]]


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

    everywhere, staged = sharding(mesh), sharding(mesh, "pp")
    plan = RingPlan(stages, (branches,) * 3)
    stage = Stage(enter_toy, run_remembering_layers, retire_toy(branches))
    run = make_ring(mesh, stage, spec(mesh, "pp"), Given(spec(mesh), spec(mesh, "pp")))
    rows = Toy(first, np.zeros_like(first), np.zeros(3, np.int32))
    rows = jax.tree.map(lambda a: np.repeat(a[None], stages, axis=0), rows)
    held = np.zeros((stages, layers // stages, 3, width), np.int32)
    state = RingState(np.int32(0), np.zeros((stages, width), np.int32), held, rows)
    state = jax.device_put(state, RingState(everywhere, staged, staged, staged))
    given = jax.device_put((weights, Given(texts, biases)), (staged, Given(everywhere, staged)))
    turns = make_turns(plan, [Turn(0, n) for n in steps], slots=3, branches=branches)
    turns = jax.device_put(turns, everywhere)
    for ticks in (3, plan.ticks(steps) - 3, 5):
        state = run(*given, turns, state, np.int32(ticks))
    np.testing.assert_array_equal(truth(state).x, x)
    np.testing.assert_array_equal(np.asarray(state.held).reshape(layers, 3, width), memory)
