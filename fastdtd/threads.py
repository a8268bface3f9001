"""Threads that do what is put into a queue, and tasks that can be waited for.

What `concurrent.futures` is for, but a waiting thread may be interrupted at any moment, as Ctrl-C does it: the locks in
`Condition`, and so in futures and executors, can stay locked then, for they are taken by Python code. Here all waiting
is done by locks and a queue that are native code, which either have done something or have not.
"""

from __future__ import annotations

import atexit
import threading
import weakref
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any

_all: weakref.WeakSet[Threads] = weakref.WeakSet()


class Task:
    """A call that a thread will make."""

    def __init__(self, function: Callable[..., object], *arguments: Any) -> None:
        self._function, self._arguments = function, arguments
        self._unfinished = threading.Lock()
        self._unfinished.acquire()
        self._error: BaseException | None = None

    @property
    def is_done(self) -> bool:
        return not self._unfinished.locked()

    def wait(self) -> None:
        with self._unfinished:
            pass

    def result(self) -> None:
        """Wait for it, and raise what it raised."""
        self.wait()
        if self._error is not None:
            raise self._error

    def run(self) -> None:
        try:
            self._function(*self._arguments)
        except BaseException as error:  # for who waits
            self._error = error
        finally:
            del self._function, self._arguments  # and what they hold
            self._unfinished.release()


class Threads:
    """`count` threads, all running once they are made. They end when nobody needs them, or with the process."""

    def __init__(self, count: int) -> None:
        self._queue: SimpleQueue[Task | None] = SimpleQueue()
        self._end = weakref.finalize(self, _end, self._queue, count)
        self._threads = []
        for i in range(count):
            self._threads.append(threading.Thread(target=_work, args=(self._queue,), name=f"fastdtd_{i}", daemon=True))
            self._threads[-1].start()
        _all.add(self)

    def submit(self, function: Callable[..., object], *arguments: Any) -> Task:
        task = Task(function, *arguments)
        self._queue.put(task)
        return task

    def join(self) -> None:
        """End them once all tasks are done."""
        self._end()
        for thread in self._threads:
            thread.join()


def _work(queue: SimpleQueue[Task | None]) -> None:
    while (task := queue.get()) is not None:
        task.run()
        del task  # while it waits for the next


def _end(queue: SimpleQueue[Task | None], count: int) -> None:
    for _ in range(count):
        queue.put(None)


@atexit.register
def _join_all() -> None:
    """Native code must not run on while the interpreter takes its memory down."""
    for threads in list(_all):
        threads.join()
