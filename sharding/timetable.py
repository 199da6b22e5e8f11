"""Videos that come and go while the rings run: whose turn it is by the plan that holds now, and by the one before.

A plan is made for the videos that are there (`turns.RingPlan`), so that a period is as short as it can be for them.
When one comes or leaves, the next plan begins at the end of a round. What has entered by then is still in the ring, and
goes its way by the plan before: nothing waits for the ring to run empty. As a round is no shorter than the way through
the ring, no third plan can matter.

Plain Python, and states in, states out: devices are told `phases` as arrays.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

from jaxwan.sharding.turns import RingPlan, Turn, done_at, steps_done

Place = tuple[int, int]  # a rank of the mesh axis `dp`, and a slot of its ring


class Member(NamedTuple):
    """A video in a slot. branches: that follow each other in the ring; num_steps: of its whole way; done: before it was
    put there."""

    branches: int
    num_steps: int
    done: int = 0


@dataclass(frozen=True)
class Phase:
    """The plans and turns of all ranks' rings, whose first round begins in tick `since`. An empty slot has no branches
    and no steps."""

    since: int
    plans: tuple[RingPlan, ...]
    turns: tuple[tuple[Turn, ...], ...]

    @property
    def period(self) -> int:
        """Ticks from one step of a video to its next, in every ring."""
        return self.plans[0].period

    def of(self, place: Place) -> tuple[RingPlan, int, Turn]:
        """The plan of a place's ring, its slot there and its turn."""
        rank, slot = place
        return self.plans[rank], slot, self.turns[rank][slot]

    def done_at(self, place: Place, step: int) -> int:
        """The tick after which a video has finished a step."""
        return self.since + done_at(*self.of(place), step)

    def released(self, place: Place) -> "Phase":
        """The same with no steps for a slot: what is in the ring of it is not looked at any more."""
        rank, slot = place
        turns = [list(own) for own in self.turns]
        turns[rank][slot] = Turn()
        return replace(self, turns=tuple(map(tuple, turns)))

    def entered(self, tick: int) -> int:
        """Rounds that have begun before a tick, which is the end of one."""
        return max(0, -(-(tick - self.since) // self.period))

    def ended(self, tick: int) -> "Phase":
        """The same with the steps alone that have entered before a tick: none enters by this plan while the next one is
        waited for."""
        rounds = self.entered(tick)
        turns = (tuple(t._replace(num_steps=min(t.num_steps, t.done + rounds)) for t in own) for own in self.turns)
        return replace(self, turns=tuple(turns))


@dataclass(frozen=True)
class Timetable:
    """The rings of all ranks after `tick` ticks, by two phases. Made by `empty_timetable`."""

    tick: int
    before: Phase
    now: Phase

    @property
    def phases(self) -> tuple[Phase, Phase]:
        """What devices are told."""
        return self.before, self.now

    @property
    def members(self) -> dict[Place, Member]:
        """Whose turn it is, and what each had done when this phase began."""
        return {
            (rank, slot): Member(plan.branches[slot], turn.num_steps, turn.done)
            for rank, (plan, turns) in enumerate(zip(self.now.plans, self.now.turns, strict=True))
            for slot, turn in enumerate(turns)
            if turn.num_steps
        }

    def done_at(self, place: Place, step: int) -> int:
        """The tick after which the video in a place has finished a step that it takes here."""
        entered_before = step < self.now.of(place)[2].done
        return (self.before if entered_before else self.now).done_at(place, step)

    def steps_done(self, place: Place) -> int:
        """Steps that the video in a place has finished, those taken elsewhere too."""
        plan, slot, turn = self.now.of(place)
        old_plan, _, old = self.before.of(place)
        if old.num_steps:  # it was there before; what it has not finished by that plan is still in the ring
            finished = steps_done(old_plan, slot, old, self.tick - self.before.since)
            if finished < turn.done:
                return finished
        return steps_done(plan, slot, turn, self.tick - self.now.since)

    @property
    def end(self) -> int:
        """The tick after which every video that is there has finished all of its steps."""
        return max((self.done_at(p, m.num_steps - 1) for p, m in self.members.items()), default=self.tick)

    def ticks_of_rounds(self, rounds: int = 1) -> int:
        """Ticks until so many rounds have ended, the one that is under way among them, or until all videos are done."""
        ended = max(0, self.tick - self.now.since) // self.now.period
        return max(0, min(self.now.since + (ended + rounds) * self.now.period, self.end) - self.tick)

    def ran(self, ticks: int) -> "Timetable":
        """After so many ticks more."""
        return replace(self, tick=self.tick + ticks)

    def released(self, *places: Place) -> "Timetable":
        """Without some videos, whose slots may be given to others in the next `changed`."""
        before, now = self.before, self.now
        for place in places:
            before, now = before.released(place), now.released(place)
        return replace(self, before=before, now=now)

    @property
    def changes(self) -> bool:
        """Whether a new phase may begin: at the end of a round, or where no video has a step left."""
        waiting = self.tick <= self.now.since
        return waiting or (self.tick - self.now.since) % self.now.period == 0 or self.tick >= self.end

    def changed(self, joining: Mapping[Place, Member]) -> "Timetable":
        """By a new plan, with further videos in free places; those that were done are no longer in it.

        The new phase begins at once but for the few ticks that a video may need to come back from its last step. Ticks
        are counted from now on: a ring that runs for ever stays within 32 bits.
        """
        assert self.changes, "a plan is changed at the end of a round"
        going_on = self._going_on()
        assert not going_on.keys() & joining.keys(), "a place has one video at a time"
        next_ = _phase(self.now, going_on | dict(joining))
        since = self.tick
        for place, member in going_on.items():
            if member.branches and member.done > self.steps_done(place):  # it is to be back before it enters again
                plan, slot, _ = next_.of(place)
                since = max(since, self.done_at(place, member.done - 1) - plan.first(slot))
        before = self.before if self.tick <= self.now.since else self.now.ended(self.tick)
        for place in joining:
            before = before.released(place)
        before, now = replace(before, since=before.since - self.tick), replace(next_, since=since - self.tick)
        return Timetable(0, before, now)

    def shortened(self) -> "Timetable":
        """By a new plan for those that go on, where its period is shorter and it brings none of them later to its end;
        else as it is."""
        next_ = self.changed({})
        ends = [(place, member.num_steps - 1) for place, member in next_.members.items()]
        later = any(next_.done_at(*end) > self.done_at(*end) - self.tick for end in ends)
        return self if later or next_.now.period >= self.now.period else next_

    def restarted(self) -> "Timetable":
        """As if all that is under way had not begun: each video goes on from its last finished step, at once."""
        members = {}
        for (rank, slot), m in self.members.items():
            branches = m.branches or self.before.plans[rank].branches[slot]  # none, if all had entered by then
            members[rank, slot] = m._replace(branches=branches, done=self.steps_done((rank, slot)))
        empty = self.released(*members)
        return replace(empty, now=replace(empty.now, since=self.tick)).changed(members)

    def _going_on(self) -> dict[Place, Member]:
        """Videos that are not done, with the steps that have entered by now as done; those all of whose steps have, but
        are not back, need no further ticks."""
        rounds, found = self.now.entered(self.tick), {}
        for place, member in self.members.items():
            entered = min(member.num_steps, member.done + rounds)
            if entered < member.num_steps:
                found[place] = member._replace(done=entered)
            elif self.steps_done(place) < entered:
                found[place] = member._replace(done=entered, branches=0)
        return found


def empty_timetable(stages: int, ranks: int, slots: int) -> Timetable:
    """Rings of so many stages and slots, on as many ranks, without videos."""
    nobody = Phase(0, (RingPlan(stages, (0,) * slots),) * ranks, ((Turn(),) * slots,) * ranks)
    return Timetable(0, nobody, nobody)


def _phase(like: Phase, members: Mapping[Place, Member]) -> Phase:
    """A phase from tick 0 on for these videos, in rings as those of another; all ranks' rings have one period."""
    stages, slots = like.plans[0].stages, len(like.turns[0])
    own = [[members.get((rank, slot), Member(0, 0)) for slot in range(slots)] for rank in range(len(like.plans))]
    plans = [RingPlan(stages, tuple(m.branches for m in ring)) for ring in own]
    period = max(plan.period for plan in plans)
    turns = tuple(tuple(Turn(0, m.num_steps, m.done) for m in ring) for ring in own)
    return Phase(0, tuple(replace(plan, least=period) for plan in plans), turns)
