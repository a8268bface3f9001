"""Plans of one network on one device, kept and reused within limits of memory and threads."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence

from fastdtd.lowering import Lowered
from fastdtd.plan import OutOfMemoryError, Plan
from fastdtd.schedule import Schedule

_Key = tuple[int, int, tuple[str, ...]]  # batch, workers, tensors whose relevance is kept


class PlanPool:
    """Plans, made when they are needed and kept for the next who asks.

    Who waits for a plan holds none, and who runs one waits for nobody, so everyone who waits gets a turn.

    Parameters
    ----------
    network : Lowered
    bind : callable
        Schedule -> Plan, on the pool's device. OutOfMemoryError where it has no memory for it.
    threads : int
        How many may work at a time on all plans together. With 1, each caller works in a thread of its own, and there
        may be any number.
    limit : int or infinity
        Bytes of all plans, used and idle.
    max_batch : int
        Images of one plan.
    """

    def __init__(self, network: Lowered, bind: Callable[[Schedule], Plan], threads: int, limit: float,
                 max_batch: int) -> None:
        self.limit = limit
        self.bind, self._network, self._max_batch = bind, network, max_batch
        self._max_workers = threads if threads > 1 else math.inf
        self.max_idle = limit  # bytes of idle plans
        self.idle: list[Plan] = []  # the last used last
        self._schedules: dict[_Key, Schedule] = {}
        self.forget_users()

    def forget_users(self) -> None:
        """Nobody uses a plan or waits for one: at first, and in a forked process."""
        self._turn, self._change = threading.Lock(), threading.Condition()
        self.used_bytes = self.used_workers = 0

    def schedule(self, batch: int, workers: int, observed: Sequence[str] = ()) -> Schedule:
        key = batch, workers, tuple(observed)
        if key not in self._schedules:
            schedule = self._network.schedule(*key)
            if observed:  # rarely asked for twice
                return schedule
            self._schedules.setdefault(key, schedule)  # another thread may have been first
        return self._schedules[key]

    def nbytes(self, batch: int, workers: int, observed: Sequence[str] = ()) -> int:
        """What a plan takes. Nothing is allocated to find out."""
        return self.schedule(batch, workers, observed).nbytes

    def max_images(self, workers: int, budget: float) -> int:
        """How many images at a time a plan within `budget` bytes takes, at least 1."""
        images = int(max(1, min(self._max_batch, budget // self.nbytes(1, 1))))
        while images > 1 and self.limit < math.inf and self.nbytes(images, workers) > budget:
            images -= 1
        return images

    def take(self, batch: int, workers: int) -> Plan:
        """A plan for the caller alone, once there are threads and memory for it; who asks first gets it first."""
        return self.take_for(self.schedule(batch, workers))

    def take_for(self, schedule: Schedule) -> Plan:
        """The same, of a schedule that `schedule` gave."""
        def fits() -> bool:
            return not self.used_workers or (self.used_workers + schedule.workers <= self._max_workers
                                             and self.used_bytes + schedule.nbytes <= self.limit)

        with self._turn, self._change:
            self._change.wait_for(fits)
            self.used_bytes += schedule.nbytes
            self.used_workers += schedule.workers
            i = next((i for i in reversed(range(len(self.idle))) if self.idle[i].schedule is schedule), None)
            plan = None if i is None else self.idle.pop(i)
            self._keep()
        try:
            return plan or self.bind(schedule)
        except BaseException:
            self._release(schedule)
            raise

    def give_back(self, plan: Plan, sound: bool = True) -> None:
        """After use.

        A plan that is not sound, for its work was cut short, is not used again; nor one that keeps relevance.
        """
        self._release(plan.schedule, *([plan] if sound and not plan.schedule.observed else []))

    def drop_idle(self) -> bool:
        """Give back the memory of plans that nobody uses. Returns whether there were any."""
        with self._change:
            dropped = bool(self.idle)
            self.idle.clear()
        return dropped

    def _release(self, schedule: Schedule, *plans: Plan) -> None:
        with self._change:
            self.used_bytes -= schedule.nbytes
            self.used_workers -= schedule.workers
            self._keep(*plans)
            self._change.notify_all()

    def _keep(self, *plans: Plan) -> None:
        """Put plans among the idle ones; those not used for longest go where there is no memory for all."""
        self.idle += plans
        while sum(plan.nbytes for plan in self.idle) > min(self.max_idle, self.limit - self.used_bytes):
            self.idle.pop(0)


__all__ = ["OutOfMemoryError", "PlanPool"]
