"""A lane alone: turns, questions between them, and errors that belong to no task."""

import threading
from concurrent.futures import Future

import pytest

from jaxwan.engine.lanes import Lane, Task


class Counting(Task):
    """Has so many units."""

    def __init__(self, units):
        super().__init__()
        self.left, self.done = units, threading.Event()

    def ready(self):
        return self.left > 0

    def unit(self):
        self.left -= 1
        if not self.left:
            self.done.set()


@pytest.fixture
def lane():
    broken = []
    lane = Lane("test", threading.Condition(threading.RLock()), broken.append)
    lane.broken = broken
    yield lane
    lane.close()


def add(lane, *tasks):
    with lane.lock:
        for task in tasks:
            lane.add(task)
        lane.lock.notify_all()


def test_who_asks_again_and_again_does_not_keep_the_tasks_from_their_turns(lane):
    task, asking = Counting(3), True

    def again():
        if asking:
            lane._asked.append((again, Future()))

    with lane.lock:
        lane._asked.append((again, Future()))
        lane.add(task)
        lane.lock.notify_all()
    assert task.done.wait(10)
    asking = False


@pytest.mark.parametrize("where", ["ready", "unit"])
def test_an_error_that_no_task_has_dealt_with_is_told_and_whoever_asks_is_answered(lane, where):
    task = Counting(1)

    def wrong():
        raise KeyError("a mistake")

    setattr(task, where, wrong)
    add(lane, task)
    lane._thread.join(10)
    assert not lane._thread.is_alive() and [str(error) for error in lane.broken] == ["'a mistake'"]
    with pytest.raises(RuntimeError, match="closed"):
        lane.ask(lambda: 1).result(10)


def test_tasks_share_the_time_and_one_that_was_idle_is_not_owed_it(lane):
    first, second = Counting(50), Counting(3)
    first.seconds = 100.0
    add(lane, first)
    assert first.done.wait(10)
    add(lane, second)
    assert second.done.wait(10)
    assert lane.ask(lambda: 7).result(10) == 7
