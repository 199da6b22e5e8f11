"""Tick arithmetic by worked numbers, and requests dealt to ranks."""

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from jaxwan.sharding.turns import RingPlan, Turn, deal, done_at, steps_done


def test_worked_numbers():
    plan = RingPlan(stages=4, branches=(2, 2))  # period 5: ticks 0..3 for four micro-batches, one idle
    assert plan.period == 5
    assert done_at(plan, 0, Turn(0, 40), 0) == 5 and done_at(plan, 1, Turn(0, 40), 0) == 7
    assert plan.ticks([40, 40]) == done_at(plan, 1, Turn(0, 40), 39) == 202
    assert steps_done(plan, 1, Turn(0, 40), 6) == 0 and steps_done(plan, 1, Turn(0, 40), 7) == 1
    assert steps_done(plan, 1, Turn(1, 40, done=10), 11) == 10 and steps_done(plan, 1, Turn(1, 40, done=10), 12) == 11


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
