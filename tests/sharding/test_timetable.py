"""Videos that come and go, against rings that are moved by hand: arrivals, lengths, drops and segments at random."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxwan.sharding.ring import _of_phase, make_turns, slot_at
from jaxwan.sharding.timetable import Member, empty_timetable
from jaxwan.sharding.turns import RingPlan, work_at

SLOTS, BRANCHES = 3, 2


class Video:
    """How far the simulation has brought one."""

    def __init__(self, place, member):
        self.place, self.member, self.done = place, member, member.done
        self.entered = {}  # step -> branches that entered


class Simulation:
    """Micro-batches moved by hand through the rings of all ranks. A video steps on when its last branch comes back."""

    def __init__(self, stages, ranks):
        self.table, self.stages = empty_timetable(stages, ranks, SLOTS), stages
        self.held = [[None] * stages for _ in range(ranks)]
        self.videos = {}  # by place
        self.worked = 0

    def run_tick(self):
        tick = self.table.tick
        for rank, held in enumerate(self.held):
            entering = self.entering(rank, tick)
            if entering is not None:
                video = self.videos[rank, entering.slot]
                assert video.done == entering.step, "a step entered before the one before it was finished"
                assert video.entered.setdefault(entering.step, 0) == entering.branch, "branches in order, each once"
                video.entered[entering.step] += 1
                entering = video, entering
                self.worked += 1
            held[:] = [entering, *held[:-1]]
            self.check_devices(rank, tick)
            video, back = held[-1] or (None, None)
            if video is not None and self.videos.get(video.place) is video and back.branch == video.member.branches - 1:
                assert video.done == back.step
                video.done += 1
        self.table = self.table.ran(1)
        for place, video in self.videos.items():
            assert self.table.steps_done(place) == video.done

    def entering(self, rank, tick):
        phase = self.table.phases[tick >= self.table.now.since]
        return work_at(phase.plans[rank], phase.turns[rank], tick - phase.since)

    def check_devices(self, rank, tick):
        """What every device works out for itself is what it holds."""
        turns = [make_turns(p.plans[rank], p.turns[rank], p.since, slots=SLOTS, branches=BRANCHES)
                 for p in self.table.phases]  # fmt: skip
        turns = jax.tree.map(lambda *rows: np.stack(rows), *turns)
        told = jax.tree.map(lambda x: x.tolist(), told_at(self.stages, turns, np.int32(tick)))
        for place, held in enumerate(self.held[rank]):
            at = jax.tree.map(lambda x, i=place: x[i], told, is_leaf=lambda x: isinstance(x, list))
            alive = held is not None and self.videos.get(held[0].place) is held[0]
            assert at.active == alive
            if alive:
                assert (at.request, at.branch, at.step) == held[1]
                assert at.last == (at.branch == held[0].member.branches - 1)


@partial(jax.jit, static_argnums=0)
def told_at(stages, turns, tick):
    return jax.vmap(lambda u: slot_at(_of_phase(turns, u), u))(tick - jnp.arange(stages))


actions = st.one_of(
    st.tuples(st.just("rounds"), st.integers(1, 3)),
    st.tuples(st.just("join"), st.integers(1, 2), st.integers(1, 4), st.integers(0, 3)),  # branches, steps, done before
    st.tuples(st.just("drop"), st.integers(0, 5)),
    st.tuples(st.just("replan"), st.just(0)),
    st.tuples(st.just("restart"), st.just(0)),
)


@given(st.integers(1, 5), st.integers(1, 2), st.lists(actions, max_size=20))
@settings(max_examples=300, deadline=None, derandomize=True)
def test_whatever_comes_and_goes_is_where_the_timetable_says(stages, ranks, script):
    ring = Simulation(stages, ranks)

    def run(ticks):
        for _ in range(ticks):
            ring.run_tick()

    for what, *values in script:
        table = ring.table
        if what == "rounds":
            run(table.ticks_of_rounds(*values))
            assert ring.table.changes
        elif what == "join" and table.changes:
            branches, steps, done = values
            ring.videos = {p: v for p, v in ring.videos.items() if v.done < v.member.num_steps}
            free = [(r, s) for s in range(SLOTS) for r in range(ranks) if (r, s) not in ring.videos]
            if free:
                member = Member(branches, steps + done, done)
                ring.videos[free[-1]] = Video(free[-1], member)
                ring.table = table.changed({free[-1]: member})
                assert ring.table.tick == 0 and ring.table.now.since < stages + BRANCHES
        elif what == "drop":
            place = values[0] % ranks, values[0] % SLOTS
            ring.videos.pop(place, None)
            ring.table = table.released(place)
        elif what == "replan" and table.changes:
            ring.videos = {p: v for p, v in ring.videos.items() if v.done < v.member.num_steps}
            ring.table = table.changed({})
            if full(table.now) and full(ring.table.now):  # enough of them for every tick: none is lost
                assert ring.table.now.since <= 0 or table.tick < table.now.since
        elif what == "restart":
            for video in ring.videos.values():
                video.entered = {}
            for place, video in list(ring.videos.items()):  # what is under way of it belongs to nobody
                ring.videos[place] = fresh = Video(place, video.member._replace(done=video.done))
                fresh.done = video.done
            ring.table = table.restarted()
        assert all(ring.table.steps_done(place) == video.done for place, video in ring.videos.items())
    ended = ring.table.end - ring.table.tick
    run(ended)
    assert all(video.done == video.member.num_steps for video in ring.videos.values())


def full(phase):
    return all(plan.microbatches == plan.period for plan in phase.plans)


def test_one_that_comes_delays_nobody_and_one_that_leaves_makes_room_at_once():
    """Four stages, guided videos of a step each tick they can: five ticks a step for one or two, six for three."""
    table = empty_timetable(4, 1, SLOTS).changed({(0, 0): Member(2, 40)})
    first = [table.done_at((0, 0), step) for step in range(3)]
    assert first == [5, 10, 15] and table.now.period == 5
    table = table.ran(5).changed({(0, 1): Member(2, 2)})
    assert table.done_at((0, 0), 1) == 5 and table.done_at((0, 1), 0) == 7
    table = table.ran(5).changed({(0, 2): Member(2, 40)})
    assert table.now.period == 6 and [table.done_at((0, s), 1 + (s == 0)) for s in (0, 1)] == [5, 7]
    table = table.ran(12).changed({})  # the second video is done; for the third to be back in time, a tick is waited
    assert table.now.period == 5 and table.now.since == 1
    assert [table.done_at((0, 0), 4), table.done_at((0, 2), 2)] == [6, 8]


def test_rings_without_videos_run_no_ticks():
    table = empty_timetable(3, 2, SLOTS)
    assert table.end == 0 and table.ticks_of_rounds(3) == 0 and table.changes
    assert table.now.plans[0] == RingPlan(3, (0,) * SLOTS) and table.members == {}


def test_while_the_next_plan_waits_for_a_step_to_come_back_nothing_enters_by_the_last_one():
    """Three stages, four ticks a step: the second video is done after the first, and the third's step comes back in
    tick 6, so that the plan of three ticks waits a tick. In that one the first video entered once more than it may."""
    ring, members = Simulation(3, 1), {(0, 0): Member(1, 6), (0, 1): Member(2, 1), (0, 2): Member(1, 3)}
    ring.table = ring.table.changed(members)
    ring.videos = {place: Video(place, member) for place, member in members.items()}
    for _ in range(ring.table.ticks_of_rounds()):
        ring.run_tick()
    ring.table = ring.table.changed({})
    assert (ring.table.now.since, ring.table.now.period) == (1, 3)
    while ring.table.tick < ring.table.end:
        ring.run_tick()
    assert all(video.done == video.member.num_steps for video in ring.videos.values())


def test_one_that_leaves_makes_nobody_wait_for_its_last_step():
    """Its second branch comes back in the third tick of the next plan, where its place would be the second."""
    members = {(0, 0): Member(1, 9), (0, 1): Member(1, 9), (0, 2): Member(2, 1)}
    table = empty_timetable(5, 1, SLOTS).changed(members)
    table = table.ran(table.ticks_of_rounds()).released((0, 1)).changed({})
    assert table.now.period == 5 and table.now.since == 0 and table.steps_done((0, 2)) == 0


def test_a_plan_is_shortened_where_that_brings_nobody_later():
    table = empty_timetable(4, 1, SLOTS).changed({(0, s): Member(2, n) for s, n in enumerate((3, 9, 5))})
    table = table.ran(12).released((0, 1))
    assert table.changed({}).now.since == 1  # for the third: and the first, with a step left, would be a tick later
    assert table.shortened() == table
    table = table.ran(6)
    assert table.shortened() == table.changed({}) and table.shortened().now.period == 5
