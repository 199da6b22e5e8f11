"""A ring's videos come, go, are aborted and put back: micro-batches moved by hand, in no thread and by no device."""

import itertools
import threading
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxwan.engine import ring
from jaxwan.engine.handle import NotFinite, Video
from jaxwan.engine.ring import RingTask
from jaxwan.pipelines.denoise import Bucket, Denoiser, Entry
from jaxwan.pipelines.dit import Fault
from jaxwan.sharding.timetable import Member, empty_timetable
from jaxwan.sharding.turns import RingPlan, work_at


class Clip(Video):
    """A video whose sampler is the number of steps that the rings have made of it."""

    def __init__(self, handle, number, branches, steps):
        table = SimpleNamespace(num_steps=steps)
        controls = SimpleNamespace(table=table, guided=branches == 2, expert=[0] * steps)
        self.handle, self.number, self.done, self.latents = handle, number, 0, None
        self.request = SimpleNamespace(table=table, prompt=f"call {handle.arrived}", boundary_ratio=None)
        self.entry = Entry(0, np.int32(0), SimpleNamespace(controls=controls, video=self))
        self.finished = False
        self.at = []  # ticks, after which its steps were done


class Call:
    """As the ring sees a handle."""

    def __init__(self, arrived, priority, videos):
        self.arrived, self.priority, self.over, self.error = arrived, priority, False, None
        self.videos = [Clip(self, number, *video) for number, video in enumerate(videos)]


class Held:
    """What is in a slot: a video since it was put there."""

    def __init__(self, entry):
        self.branches, self.done, self.entered, self.video = entry.branches, int(entry.done), {}, entry.inputs.video
        assert entry.sampler == self.done, "it goes on from where it was taken out"


class ByHand:
    """`Programs` whose micro-batches are moved by hand. A second of the clock is a tick."""

    def __init__(self, stages, ranks, slots, clock):
        self.stages, self.ranks, self.slots, self.clock = stages, ranks, slots, clock
        self.fails, self.broken = False, set()  # the next segment; places whose numbers are not finite
        self.lost = {}  # by error, the calls that it was the end of

    def timetable(self):
        return empty_timetable(self.stages, self.ranks, self.slots)

    def member(self, entry):
        return Member(entry.branches, entry.num_steps, int(entry.done))

    def empty(self):
        return SimpleNamespace(slots={}, rings=[[None] * self.stages for _ in range(self.ranks)])

    def insert(self, device, place, entry):
        device.slots[place] = Held(entry)
        self.broken.discard(place)
        return device

    def read(self, device, place):
        return SimpleNamespace(sampler=device.slots[place].done)

    def faults(self, device):
        return dict.fromkeys(self.broken, Fault(0, "velocity"))

    def run(self, weights, device, table, ticks):
        if self.fails:
            self.fails, error = False, RuntimeError("the device is gone")
            self.lost[error] = {held.video.handle for held in device.slots.values()}
            raise error
        for tick in range(table.tick, table.tick + ticks):
            self.clock[0] += 1
            phase = table.phases[tick >= table.now.since]
            for rank, held in enumerate(device.rings):
                work = work_at(phase.plans[rank], phase.turns[rank], tick - phase.since)
                held[:] = [work and self.enter(device, (rank, work.slot), work), *held[:-1]]
                if held[-1] is not None:
                    self.retire(device, *held[-1])
        return device

    def enter(self, device, place, work):
        video = device.slots[place]
        assert work.step == video.done, "a step enters when the one before it is finished"
        assert video.entered.setdefault(work.step, 0) == work.branch, "branches in order, each once"
        video.entered[work.step] += 1
        return place, video, work

    def retire(self, device, place, video, work):
        if device.slots[place] is video and work.branch == video.branches - 1:
            assert video.done == work.step
            video.done += 1
            video.video.at.append(self.clock[0])


class Desk:
    """The engine, as a ring knows it, with a ring, and those who call."""

    def __init__(self, stages=1, ranks=1, slots=3, segment=0):
        self.lock, self.numbers = threading.RLock(), itertools.count()
        self.calls, self.expecting, self.segment, self.clock = [], False, segment, [0]
        self.programs = programs = ByHand(stages, ranks, -(-slots // ranks), self.clock)

        class Fake(Denoiser):
            def __init__(self):
                self.weights = None

            def programs(self, bucket):
                return programs

        self.task = RingTask(self, Fake(), Bucket(programs.slots, Entry(None, None, None)), slots)

    def submit(self, *videos, priority=0):
        call = Call(next(self.numbers), priority, videos)
        self.calls.append(call)
        self.task.waiting.extend(call.videos)
        return call

    def unit(self):
        """A segment, of as many rounds as `segment` ticks have room for."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ring, "SEGMENT", self.segment)
            patch.setattr(ring, "time", SimpleNamespace(perf_counter=lambda: self.clock[0]))
            assert self.task.ready()
            self.task.unit()

    def finish(self):
        """Run until nobody is left."""
        most = 20 + sum(video.num_steps for call in self.calls for video in call.videos)
        while self.task.ready():
            most -= 1
            assert most, "every segment brings somebody on"
            self.unit()

    # What the ring asks

    def may_reside(self, _):
        return True

    def may_join(self, _):
        return True

    def expects(self, *_):
        return self.expecting

    def begin(self, handle, state):
        assert state == "denoising"

    def spent(self, handles, name, seconds):
        pass

    def fail(self, handle, error):
        handle.over, handle.error = True, handle.error or error

    def denoised(self, video, entry):
        assert entry.sampler == int(entry.done) == video.num_steps == len(video.at) and not video.finished
        video.finished = True
        if all(other.finished for other in video.handle.videos):
            video.handle.over = True


def running(desk):
    return set(desk.task.videos()) - set(desk.task.waiting)


def step_in_turn(desk):
    """A segment; who was put back made room for somebody more urgent, and nobody was passed over."""
    before, waited = running(desk), set(desk.task.waiting)
    changed, run = [], desk.programs.run

    def looking(*given):
        changed.append((running(desk), list(desk.task.waiting)))
        return run(*given)

    desk.programs.run = looking
    desk.unit()
    desk.programs.run = run
    for now, waiting in changed:
        came, back = now - before, before & set(waiting)
        assert came <= waited and len(now) <= desk.task._slots
        assert all(min(video.handle.priority for video in came) > video.handle.priority for video in back)
        if waiting:
            assert len(now) == desk.task._slots, "nobody waits beside a free place"
            assert min(v.handle.priority for v in now) >= max(v.handle.priority for v in waiting)
            assert not came or max(v.order for v in came) < min(v.order for v in waiting)


videos = st.lists(st.tuples(st.integers(1, 2), st.integers(1, 5)), min_size=1, max_size=2)  # branches, steps
actions = st.one_of(
    st.tuples(st.just("submit"), videos, st.integers(-1, 1)),
    st.tuples(st.just("abort"), st.integers(0, 20)),
    st.tuples(st.just("units"), st.integers(1, 3)),
    st.tuples(st.just("expect"), st.booleans()),
    st.tuples(st.just("break"), st.integers(0, 5)),
    st.tuples(st.just("fail"), st.none()),
)


@given(
    st.integers(1, 5), st.integers(1, 2), st.integers(1, 4), st.sampled_from([0, 10, 1000]),
    st.lists(actions, max_size=25),
)  # fmt: skip
@settings(max_examples=200, deadline=None, derandomize=True)
def test_whoever_comes_goes_or_fails_all_others_make_all_their_steps_in_order(stages, ranks, slots, segment, script):
    desk, aborted, broken = Desk(stages, ranks, slots, segment), set(), set()
    for what, value, *rest in script:
        if what == "submit":
            desk.submit(*value, priority=rest[0])
        elif what == "abort" and value < len(desk.calls) and not desk.calls[value].over:
            desk.calls[value].over = True
            aborted.add(desk.calls[value])
        elif what == "units":
            for _ in range(value):
                if desk.task.ready():
                    step_in_turn(desk)
        elif what == "expect":
            desk.expecting = value
        elif what == "break":
            places = {place: video.handle for place, video in desk.task._running.items() if place[1] == value}
            desk.programs.broken |= places.keys()
            broken |= set(places.values())
        elif what == "fail":
            desk.programs.fails = True
    desk.finish()
    assert all(call.over for call in desk.calls) and not list(desk.task.videos()) and not desk.task.resident
    for call in desk.calls:
        whole = all(video.finished for video in call.videos)
        assert whole or call in aborted or call.error is not None
        if isinstance(call.error, NotFinite):
            assert call in broken
        elif call.error is not None:
            assert call in desk.programs.lost[call.error.__cause__]


few = st.lists(st.tuples(st.integers(1, 2), st.integers(1, 6)), min_size=2, max_size=5)  # branches, steps


@given(st.integers(1, 5), st.integers(1, 2), few, st.integers(0, 5), st.integers(0, 4))
@settings(max_examples=150, deadline=None, derandomize=True)
def test_an_abort_brings_nobody_later_than_the_plan_said_before_it(stages, ranks, calls, units, who):
    desk = Desk(stages, ranks, slots=len(calls))
    handles = [desk.submit(call) for call in calls]
    for _ in range(units):
        if desk.task.ready():
            desk.unit()
    table, now = desk.task._table, desk.clock[0]
    ends = {v: now + table.done_at(p, v.num_steps - 1) - table.tick for p, v in desk.task._running.items()}
    handles[who % len(handles)].over = True
    desk.finish()
    for video, end in ends.items():
        assert video.handle is handles[who % len(handles)] or video.at[-1] <= end


@given(st.integers(1, 5), st.integers(1, 2), few)
@settings(max_examples=100, deadline=None, derandomize=True)
def test_calls_that_arrive_together_take_the_ticks_of_the_formula(stages, ranks, calls):
    desk = Desk(stages, ranks, slots=len(calls), segment=10**9)
    desk.task.trace = []
    handles = [desk.submit(call) for call in calls]
    desk.task._tick_seconds = 1  # as after a first segment, which is of one round
    desk.finish()
    own = [calls[rank::ranks] for rank in range(ranks)]
    plans = [RingPlan(stages, tuple(branches for branches, _ in ring)) for ring in own]
    period = max(plan.period for plan in plans)
    ticks = [replace(plan, least=period).ticks([n for _, n in ring]) for plan, ring in zip(plans, own, strict=True)]
    assert desk.task.ticks == len(desk.task.trace) == desk.clock[0] == max(ticks)
    entered = [at for tick in desk.task.trace for at in tick.entered if at is not None]
    assert len(entered) == len(set(entered)) == sum(branches * steps for branches, steps in calls)
    assert desk.task.idle_ticks == sum(not any(tick.entered) for tick in desk.task.trace)
    assert all(handle.over for handle in handles)


@pytest.mark.parametrize(("stages", "branches", "slots"), [(1, 1, 1), (2, 2, 2), (4, 2, 3), (4, 1, 4), (5, 2, 3)])
def test_no_tick_is_idle_once_there_are_enough_micro_batches(stages, branches, slots):
    """R · G >= S + G - 1; one that leaves is in the ring to its end, and so the rest alone are to be enough then."""
    for more, lengths in ((0, [20] * slots), (1, [20 + slot for slot in range(slots + 1)] + [20] * 20)):
        assert slots * branches >= stages + branches - 1
        desk = Desk(stages, slots=slots + more)
        for steps in lengths:
            desk.submit((branches, steps))
        while desk.task.waiting or not more and all(video.done < 19 for video in desk.task.videos()):
            desk.unit()
        assert desk.task.ticks >= 19 * slots * branches and desk.task.idle_ticks == 0


def test_who_is_no_more_urgent_waits_for_a_free_place_and_another_goes_on_undisturbed():
    desk = Desk(slots=2)
    first = desk.submit((1, 5))
    desk.unit()
    desk.submit((1, 5)), desk.submit((1, 5))
    put_back, desk.task._put_back = [], lambda place: put_back.append(place)
    desk.unit()
    assert first.videos[0].done == 2 and not put_back and len(desk.task.waiting) == 1


def test_videos_that_are_about_to_join_are_not_lost_where_reading_another_fails():
    desk = Desk(slots=2)
    low = [desk.submit((1, 5), priority=-2), desk.submit((1, 5), priority=-1)]
    desk.unit()
    low[0].over = True
    urgent = [desk.submit((1, 2)), desk.submit((1, 2))]  # one finds the place free, the other takes that of `low[1]`

    def gone(*_):
        raise RuntimeError("the device is gone")

    desk.programs.read = gone
    desk.task.unit()
    assert all(call.error is not None for call in (low[1], urgent[0]))
    del desk.programs.read
    desk.finish()
    assert urgent[1].videos[0].finished


def test_a_failed_program_names_each_video_that_it_was_the_end_of():
    desk = Desk(slots=2)
    calls = [desk.submit((1, 5)), desk.submit((2, 3))]
    desk.unit()
    desk.programs.fails = True
    desk.unit()
    told = [str(call.error) for call in calls]
    assert told == [
        "'call 0', 1 of 5 steps done: its program failed: the device is gone",
        "'call 1', 1 of 3 steps done: its program failed: the device is gone",
    ]


def test_a_video_that_comes_while_others_are_put_in_order_is_not_lost():
    desk = Desk()

    def come():
        with desk.lock:
            desk.submit((1, 1))

    class Meanwhile(Call):
        """While one looks whether it is over, another call comes in another thread."""

        @property
        def over(self):
            if self.thread is None:
                self.thread = threading.Thread(target=come)
                self.thread.start()
                self.thread.join(0.05)
            return False

        @over.setter
        def over(self, _):
            self.thread = None

    first = Meanwhile(next(desk.numbers), 0, [(1, 1)])
    desk.task.waiting.extend(first.videos)
    desk.task._tidy()
    first.thread.join()
    assert len(desk.task.waiting) == 2


def test_an_urgent_call_is_encoded_though_as_many_wait_as_there_are_slots():
    desk = Desk(slots=1)
    desk.submit((1, 9))
    desk.unit()
    desk.submit((1, 9))
    assert not desk.task.wants(0) and desk.task.wants(1)


def test_what_calls_that_are_over_were_made_of_is_let_go():
    desk = Desk(slots=1)
    calls = [desk.submit((1, 9)), desk.submit((1, 9))]
    desk.unit()
    for call in calls:
        call.over = True
    desk.unit()
    assert not desk.task.busy and [call.videos[0].entry for call in calls] == [None, None]
