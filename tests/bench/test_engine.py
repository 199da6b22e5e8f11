"""The engine's benchmark: random requests, its arithmetic by hand, and a rehearsal of few short requests."""

from dataclasses import replace

from jaxwan.bench import engine as module
from jaxwan.bench.child import measure
from jaxwan.bench.engine import Request, in_turns, make_requests, ring_ticks
from jaxwan.bench.item import Item
from jaxwan.bench.presets import SMALL
from jaxwan.sharding.turns import RingPlan

LESS = replace(SMALL.with_layers(2), experts=1, steps=2)


def test_requests_are_random_and_the_same_again():
    requests = make_requests()
    assert requests == make_requests() != make_requests(seed=1) and len(requests) == 32
    assert min(r.steps for r in requests) >= 4 and max(r.steps for r in requests) <= 40
    arrivals = [r.arrives for r in requests]
    assert arrivals[0] == 0 and arrivals == sorted(arrivals)


def test_batches_wait_for_their_last_request_and_for_the_batch_before(monkeypatch):
    clock = iter([0.0, 3.0, 10.0, 12.0])  # the first batch takes 3 seconds, the second 2
    monkeypatch.setattr(module.time, "perf_counter", lambda: next(clock))
    served = in_turns([0.0, 1.0, 2.0], 2, lambda first: None)
    assert served.waits == [4.0, 3.0, 4.0] and served.total == 6.0


def test_ticks_of_the_ring_are_the_formulas_where_all_come_and_go_together_and_fewer_where_they_do_not():
    assert ring_ticks([7] * 4) == RingPlan(4, (2,) * 4).ticks([7] * 4)
    assert ring_ticks([5], stages=3) == RingPlan(3, (2,)).ticks([5])
    steps = [4, 40, 10, 20, 30, 8]
    batches = RingPlan(4, (2,) * 4).ticks(steps[:4]) + RingPlan(4, (2,) * 2).ticks(steps[4:])
    assert 2 * sum(steps) < ring_ticks(steps) < batches < sum(RingPlan(4, (2,)).ticks([n]) for n in steps)


def test_few_short_requests_are_measured_in_seconds_and_ticks_and_a_run_in_segments(monkeypatch):
    monkeypatch.setattr(module, "make_requests", lambda: [Request(2, 0.0), Request(3, 1.0), Request(1, 2.0)])
    monkeypatch.setattr(module, "LONG", 3)
    seconds, ticks = measure(Item("engine", LESS, "requests"))
    (segments,) = measure(Item("engine", LESS, "segments", runs=1))
    assert [row.status for row in (seconds, ticks, segments)] == ["ok"] * 3, (seconds, ticks, segments)
    assert seconds.name == "engine/small/requests/pp=1" and seconds.details["programs compiled"] == 0
    assert all(seconds.details[f"{side}: all s"] > 0 for side in ("engine", "one after the other", "fixed batches"))
    assert ticks.details["one after the other: ticks"] == 5 * 6 and ticks.details["with work for every tick"] == 12
    assert ticks.details["fixed batches: ticks"] == RingPlan(4, (2,) * 3).ticks([2, 3, 1])
    assert 12 < ticks.details["engine: ticks"] <= 30
    assert segments.details["tick ms"] > 0 and len(segments.seconds) == 1
