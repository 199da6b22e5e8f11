"""A thread for each disjoint set of devices, which does pieces of work on them one after the other.

Two threads that start programs with collectives on the same devices in different orders wait for each other for ever.
So all work on a set of devices is units of tasks, and its lane runs one unit at a time, always of the task that has had
the least of its time.
"""

import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

STALLED = 0.01  # seconds after which a lane looks again at what waits for no other thread's word, such as a full queue


class Task:
    """What a lane shares its time among."""

    stalled = False  # whether it waits for what does not notify the lock

    def __init__(self) -> None:
        self.seconds = 0.0  # of the lane's time; one that had nothing to do for a while is not owed that

    def ready(self) -> bool:
        """Whether there is a unit to do. Called with the lane's lock."""
        raise NotImplementedError

    def unit(self) -> None:
        """Do one. It deals with its own errors."""
        raise NotImplementedError


class Lane:
    """The thread of a set of devices. `lock` is the engine's, and is notified of all that may make a task ready.

    broken: is told what ended the thread, where that was an error which no task has dealt with.
    """

    def __init__(self, name: str, lock: threading.Condition, broken: Callable[[BaseException], None]):
        self.lock, self.tasks, self._broken = lock, [], broken
        self._asked: deque[tuple[Callable[[], Any], Future]] = deque()
        self._closing = False
        self._idle: set[Task] = set()
        self._thread = threading.Thread(target=self._run, name=f"jaxwan engine, {name}", daemon=True)
        self._thread.start()

    def add(self, task: Task) -> None:
        """Share time with one more task; called with the lock."""
        self.tasks.append(task)
        self._idle.add(task)

    def remove(self, task: Task) -> None:
        """The contrary, of one that has nothing to do; called with the lock."""
        self.tasks.remove(task)
        self._idle.discard(task)

    def ask(self, function: Callable[[], Any]) -> Future:
        """What a function returns that is called between two units."""
        if threading.current_thread() is self._thread:
            raise RuntimeError("a callback of the engine's own thread cannot wait for it")
        future: Future = Future()
        with self.lock:
            if self._closing:
                future.set_exception(RuntimeError("the engine is closed"))
            else:
                self._asked.append((function, future))
                self.lock.notify_all()
        return future

    def between(self, *, but: Task) -> None:
        """In the middle of a long unit: one of the others', if any waits for it."""
        with self.lock:
            task = self._next(but)
        if task is not None:
            start = time.perf_counter()
            task.unit()
            taken = time.perf_counter() - start
            task.seconds += taken
            but.seconds -= taken

    def stop(self) -> None:
        """Begin no unit any more."""
        with self.lock:
            self._closing = True
            self.lock.notify_all()

    def close(self) -> None:
        """End after the unit that is under way, and wait for that."""
        self.stop()
        self._thread.join()

    def _run(self) -> None:
        try:
            self._work()
        except BaseException as error:  # nobody sees what a thread raises, and all would wait for ever
            self._broken(error)
        with self.lock:
            self._closing = True
        for _, future in self._asked:
            future.set_exception(RuntimeError("the engine is closed"))

    def _work(self) -> None:
        while True:
            with self.lock:
                self.lock.notify_all()  # of what the last unit has done, for those who follow it
                task = None
                while not (self._closing or self._asked) and (task := self._next()) is None:
                    self.lock.wait(STALLED if any(task.stalled for task in self.tasks) else None)
                if self._closing:
                    break
                asked, self._asked = self._asked, deque()
                task = task or self._next()  # those who ask again and again do not keep the tasks from their turns
            for one in asked:
                _answer(*one)
            if task is not None and not self._closing:  # one who asked may have stopped it
                start = time.perf_counter()
                task.unit()
                task.seconds += time.perf_counter() - start

    def _next(self, but: Task | None = None) -> Task | None:
        """The task whose turn it is."""
        ready = [task for task in self.tasks if task is not but and task.ready()]
        busy = [task.seconds for task in ready if task not in self._idle]
        for task in ready:
            if task in self._idle:  # it begins level with those that kept the lane busy
                task.seconds = max([task.seconds, *([min(busy)] if busy else [])])
        self._idle = {task for task in self.tasks if task not in ready and task is not but}
        return min(ready, key=lambda task: task.seconds, default=None)


def _answer(function: Callable[[], Any], future: Future) -> None:
    try:
        future.set_result(function())
    except BaseException as error:  # it is the asker's
        future.set_exception(error)
