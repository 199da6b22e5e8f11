"""Tick arithmetic against a ring that is moved by hand: arrivals, lengths, drops and segments at random."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxwan.sharding.ring import make_turns, slot_at
from jaxwan.sharding.turns import (
    RingPlan,
    Turn,
    deal,
    done_at,
    first_start,
    rebased,
    steps_done,
    ticks_until_step,
    work_at,
)

SIZES = ((1, 1), (1, 2, 2), (2, 2), (3, 1, 1), (4, 2), (4, 2, 2, 2), (5, 2, 2), (3, 1, 2), (4, 2, 1, 1), (2, 1, 3, 2))
PLANS = [RingPlan(stages, tuple(branches)) for stages, *branches in SIZES]
SLOTS, BRANCHES = 4, 3  # room for all of them, in one program


class Job:
    """A request, and how far the simulation has brought it."""

    def __init__(self, num_steps, done):
        self.num_steps, self.done = num_steps, done
        self.entered = {}


class Simulation:
    """Micro-batches moved by hand; a job steps on when its last branch comes back, unless it was dropped meanwhile."""

    def __init__(self, plan):
        self.plan, self.tick = plan, 0
        self.slots = len(plan.branches)
        self.order = [(slot, branch) for slot, count in enumerate(plan.branches) for branch in range(count)]
        self.jobs, self.turns = [None] * self.slots, [Turn()] * self.slots
        self.stages = [None] * plan.stages  # (job, slot, branch, step)

    def run_tick(self):
        """One tick; returns what each stage worked on: (slot, branch, step), of jobs that are still there."""
        index, place = divmod(self.tick, self.plan.period)
        if place < self.plan.microbatches:
            slot, branch = self.order[place]
            job, turn = self.jobs[slot], self.turns[slot]
            step = index - turn.start + turn.done
            if job is not None and index >= turn.start and step < turn.num_steps:
                assert job.done == step, "a step entered before the one before it was finished"
                assert job.entered.setdefault(step, 0) == branch, "branches enter in order, each once"
                job.entered[step] += 1
                self.stages[0] = (job, slot, branch, step)
        worked = [held and held[1:] if held and self.jobs[held[1]] is held[0] else None for held in self.stages]
        back, self.stages = self.stages[-1], [None, *self.stages[:-1]]
        if back is not None and self.jobs[back[1]] is back[0] and back[2] == self.plan.branches[back[1]] - 1:
            back[0].done += 1
        self.tick += 1
        return worked


@partial(jax.jit, static_argnums=0)
def told(stages, turns, tick):
    """What every device works out in a tick."""
    return jax.vmap(lambda place: slot_at(turns, tick - place))(jnp.arange(stages))


actions = st.one_of(
    st.tuples(st.just("run"), st.integers(0, 17)),
    st.tuples(st.just("insert"), st.integers(1, 5), st.integers(0, 3), st.integers(0, 2)),  # steps, done, later rounds
    st.tuples(st.just("drop"), st.integers(0, 5)),
    st.tuples(st.just("rebase"), st.just(0)),
    st.tuples(st.just("next"), st.just(0)),
)


@given(st.sampled_from(PLANS), st.lists(actions, max_size=25))
@settings(max_examples=150, deadline=None, derandomize=True)
def test_whatever_comes_and_goes_is_where_the_arithmetic_says(plan, script):
    ring, offset = Simulation(plan), 0  # ticks that rebasing took away from the counters

    def check():
        for slot, (job, turn) in enumerate(zip(ring.jobs, ring.turns, strict=True)):
            assert turn.start >= -8  # rebasing lets nothing drift away
            assert steps_done(plan, slot, turn, ring.tick) == (job.done if job else 0)

    def run(ticks):
        for _ in range(ticks):
            turns = make_turns(plan, ring.turns, slots=SLOTS, branches=BRANCHES)
            slots = jax.tree.map(np.asarray, told(plan.stages, turns, np.int32(ring.tick)))
            for place, worked in enumerate(ring.run_tick()):
                at = jax.tree.map(lambda x, i=place: x[i].item(), slots)
                assert work_at(plan, ring.turns, ring.tick - 1 - place) == worked
                assert at.active == (worked is not None) and worked in (None, (at.request, at.branch, at.step))
                assert at.last == (at.branch == plan.branches[at.request] - 1)
                assert 0 <= at.step and 0 <= at.request < ring.slots  # also where nothing is
            check()

    for what, *values in [*script, ("next", 0), ("next", 0)]:
        if what == "run":
            run(values[0])
        elif what == "insert":
            free = [slot for slot, job in enumerate(ring.jobs) if job is None or job.done == job.num_steps]
            if free:
                steps, done, later = values
                slot = free[-1]
                ring.jobs[slot] = Job(steps + done, done)
                ring.turns[slot] = Turn(first_start(plan, slot, ring.tick) + later, steps + done, done)
        elif what == "drop":
            slot = values[0] % ring.slots
            ring.jobs[slot], ring.turns[slot] = None, Turn()
        elif what == "rebase":
            before = ring.tick
            ring.turns, ring.tick = rebased(plan, ring.turns, ring.tick)
            assert ring.tick < plan.stages + 2 * plan.period and (before - ring.tick) % plan.period == 0
            offset += before - ring.tick
        else:
            ahead = ticks_until_step(plan, ring.turns, ring.tick)
            unfinished = [job for job in ring.jobs if job and job.done < job.num_steps]
            assert (ahead is None) == (not unfinished)
            if ahead is not None:
                done = [job.done for job in unfinished]
                run(ahead - 1)
                assert [job.done for job in unfinished] == done
                run(1)
                assert [job.done for job in unfinished] != done
        check()
    while (ahead := ticks_until_step(plan, ring.turns, ring.tick)) is not None:  # all that are there come to their end
        run(ahead)
    assert all(job is None or job.done == job.num_steps for job in ring.jobs)


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_no_earlier_start_would_do(plan):
    """In the round before, the slot's first branch would have had to enter already."""
    for slot in range(len(plan.branches)):
        first = sum(plan.branches[:slot])
        for tick in range(3 * plan.period):
            start = first_start(plan, slot, tick)
            assert start * plan.period + first >= tick
            assert start == 0 or (start - 1) * plan.period + first < tick


def test_worked_numbers():
    plan = RingPlan(stages=4, branches=(2, 2))  # period 5: ticks 0..3 for four micro-batches, one idle
    assert plan.period == 5
    assert done_at(plan, 0, Turn(0, 40), 0) == 5 and done_at(plan, 1, Turn(0, 40), 0) == 7
    assert plan.ticks([40, 40]) == done_at(plan, 1, Turn(0, 40), 39) == 202
    assert first_start(plan, 1, 2) == 0 and first_start(plan, 1, 3) == 1
    assert steps_done(plan, 1, Turn(0, 40), 6) == 0 and steps_done(plan, 1, Turn(0, 40), 7) == 1
    assert ticks_until_step(plan, [Turn(0, 40), Turn(0, 40)], 5) == 2
    assert steps_done(plan, 1, Turn(1, 40, done=10), 11) == 10 and steps_done(plan, 1, Turn(1, 40, done=10), 12) == 11
    assert rebased(plan, [Turn(3, 40), Turn(0, 5)], 104) == ([Turn(-17, 40), Turn(0, 5, 5)], 4)


# Requests dealt to ranks


@given(st.lists(st.integers(1, 2), min_size=1, max_size=7), st.integers(1, 4), st.integers(1, 4))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_requests_are_dealt_so_that_a_period_is_as_short_as_it_can_be(branches, ranks, stages):
    dealt, share = deal(branches, ranks=ranks, stages=stages), -(-len(branches) // ranks)
    told = [(r, dealt.plans[rank].branches[slot]) for r, (rank, slot) in enumerate(dealt.places)]
    assert told == list(enumerate(branches)) and len(set(dealt.places)) == len(branches)
    assert sum(len(plan.branches) for plan in dealt.plans) == len(branches) and len(dealt.plans) == ranks
    assert max(len(plan.branches) for plan in dealt.plans) == share and dealt.microbatches == sum(branches)
    assert {plan.period for plan in dealt.plans} == {dealt.period}
    best = stages + len(branches) * 2
    for places in itertools.product(range(ranks), repeat=len(branches)):
        if places[0] == 0 and max(map(places.count, range(ranks))) <= share:
            rings = [tuple(b for b, p in zip(branches, places, strict=True) if p == rank) for rank in range(ranks)]
            best = min(best, max(RingPlan(stages, ring).period for ring in rings))
    assert dealt.period == best


def test_worked_deals():
    assert deal([1, 2, 1], ranks=1, stages=2).places == ((0, 0), (0, 1), (0, 2))  # a single ring keeps their order
    dealt = deal([2, 1, 2, 1], ranks=2, stages=1)
    assert dealt.places == ((0, 0), (0, 1), (1, 0), (1, 1)) and dealt.period == 3
    assert dealt.ticks([50, 50, 10, 50]) == 150
    idle = deal([2], ranks=3, stages=2)
    assert [plan.branches for plan in idle.plans] == [(2,), (), ()] and idle.ticks([4]) == RingPlan(2, (2,)).ticks([4])
