"""The ring's tick arithmetic, in plain Python: when a request may start, which steps are done, when something happens.

Slots are rows of the ring's arrays, each the place of one request at a time. A slot has as many micro-batches a period
as its request has branches, and those of all slots follow each other. All of it follows from two facts. Micro-batch m
enters in the ticks whose place in the period is m, and it is back after as many ticks as there are stages. How plans
follow each other while requests come and go, `timetable.py` says.

The mesh axis `dp` has a ring on each of its ranks. `deal` gives each its requests, and all one period.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True)
class RingPlan:
    """What is where in a ring: `stages`, and the `branches` of each slot in use, such as 2 with guidance, 1 without."""

    stages: int
    branches: tuple[int, ...]
    least: int = 1  # ticks of a period, where other rings need so many

    @property
    def microbatches(self) -> int:
        """M, of all slots."""
        return sum(self.branches)

    @property
    def period(self) -> int:
        """Ticks from one step of a request to its next: max(M, stages + branches - 1) for the most branches of a slot.

        A request's first branch may enter again only after its last branch, `branches - 1` ticks behind, came back.
        """
        return max(self.least, self.microbatches, self.stages + max((1, *self.branches)) - 1)

    def first(self, slot: int) -> int:
        """A slot's first micro-batch."""
        return sum(self.branches[:slot])

    def ticks(self, num_steps: Sequence[int]) -> int:
        """Ticks until every request has finished its steps, when all start in round 0."""
        return max((done_at(self, slot, Turn(0, n), n - 1) for slot, n in enumerate(num_steps)), default=0)


@dataclass(frozen=True)
class Deal:
    """Requests dealt to the rings of several ranks. `plans`: of each ring. `places`: (rank, slot) of each request.

    A period is equally long in all rings: that of the one with the most micro-batches. So all are in the same round,
    and whoever looks at the requests after some ticks finds none a step ahead of another.
    """

    plans: tuple[RingPlan, ...]
    places: tuple[tuple[int, int], ...]

    @property
    def period(self) -> int:
        """Ticks from one step of a request to its next, in every ring."""
        return self.plans[0].period

    @property
    def microbatches(self) -> int:
        """Of all rings."""
        return sum(plan.microbatches for plan in self.plans)

    def at(self, request: int) -> tuple[RingPlan, int]:
        """The plan of a request's ring, and its slot there."""
        rank, slot = self.places[request]
        return self.plans[rank], slot

    def ticks(self, num_steps: Sequence[int]) -> int:
        """Ticks until every request has finished its steps, when all start in round 0."""
        return max(done_at(*self.at(request), Turn(0, n), n - 1) for request, n in enumerate(num_steps))


def deal(branches: Sequence[int], *, ranks: int, stages: int) -> Deal:
    """Deal requests of so many branches to ranks, none of which gets more than its share, rounded up, and all about as
    many micro-batches: those with most branches go first, each to the rank that has the fewest so far.

    Steps play no part: a period, and so a step, takes as long for all.
    """
    most, held = -(-len(branches) // ranks), [[] for _ in range(ranks)]
    for request in sorted(range(len(branches)), key=lambda r: -branches[r]):
        free = [own for own in held if len(own) < most]
        min(free, key=lambda own: sum(branches[r] for r in own)).append(request)
    own = [tuple(branches[r] for r in sorted(requests)) for requests in held]
    period = max(RingPlan(stages, counts).period for counts in own)
    places = {r: (rank, slot) for rank, requests in enumerate(held) for slot, r in enumerate(sorted(requests))}
    plans = tuple(RingPlan(stages, counts, least=period) for counts in own)
    return Deal(plans, tuple(places[r] for r in range(len(branches))))


class Turn(NamedTuple):
    """The steps that the request in a slot takes in the ring: from `done` to `num_steps`, one a round from `start` on.

    `done` steps were taken elsewhere before. An empty slot has no steps; giving a slot no steps releases it, and what
    is still in the ring of it is not looked at any more.
    """

    start: int = 0
    num_steps: int = 0
    done: int = 0


class Work(NamedTuple):
    """A step of the request in a slot, in one of its branches."""

    slot: int
    branch: int
    step: int


def work_at(plan: RingPlan, turns: Sequence[Turn], u: int) -> Work | None:
    """What entered the ring in tick u, and so is at position p in tick u + p; None where that is nothing.

    What `ring.slot_at` works out on every device.
    """
    index, microbatch = divmod(u, plan.period)
    if u < 0 or microbatch >= plan.microbatches:
        return None
    slot = next(slot for slot in range(len(plan.branches)) if microbatch < plan.first(slot + 1))
    step = index - turns[slot].start + turns[slot].done
    if index < turns[slot].start or step >= turns[slot].num_steps:
        return None
    return Work(slot, microbatch - plan.first(slot), step)


def done_at(plan: RingPlan, slot: int, turn: Turn, step: int) -> int:
    """Ticks, counted from the ring's first, after which a request has finished a step."""
    last_branch_enters = (turn.start + step - turn.done) * plan.period + plan.first(slot + 1) - 1
    return last_branch_enters + plan.stages


def steps_done(plan: RingPlan, slot: int, turn: Turn, tick: int) -> int:
    """Steps that a request has finished after `tick` ticks, those taken elsewhere too."""
    since_first = tick - done_at(plan, slot, turn, turn.done)
    return turn.done + max(0, min(turn.num_steps - turn.done, since_first // plan.period + 1))
