"""Plans of one network on one device, kept and reused within limits of memory and threads."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence

from fastdtd.lowering import Lowered
from fastdtd.plan import OutOfMemoryError, Plan
from fastdtd.schedule import Schedule, Through

# Batch, workers, tensors whose relevance is kept, whether any can be signed, channels that relevance goes through.
_Key = tuple[int, int, tuple[str, ...], bool, Through]
_PATIENCE = 0.05  # seconds after which who waits looks for calls that are over and have not said so


class Loan:
    """A plan that is taken by a call.

    Ctrl-C may cut a call short between any two of its steps, those that give back included. So a loan is open only as
    long as its call holds a lock, in a `with` statement, which lets go of it whatever happens; or while a thread of
    ours, where no such exception is raised, runs it.

    Attributes
    ----------
    plan : Plan or None
        None once it is given back.
    """

    def __init__(self, schedule: Schedule, call: threading.Lock) -> None:
        self.schedule = schedule
        self.plan: Plan | None = None
        self.is_running = self.is_over = False
        self._call = call

    @property
    def is_open(self) -> bool:
        return not self.is_over and (self.is_running or self._call.locked())


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
        # All are plain locks, whose `with` cannot be interrupted halfway; that of a Condition can.
        self._turn, self._lock, self._returns = threading.Lock(), threading.Lock(), threading.Lock()
        self._returns.acquire()  # and is released when a plan is given back
        self._loans: list[Loan] = []

    @property
    def used_bytes(self) -> int:
        return sum(loan.schedule.nbytes for loan in self._loans if loan.is_open)

    @property
    def used_workers(self) -> int:
        return sum(loan.schedule.workers for loan in self._loans if loan.is_open)

    def schedule(self, batch: int, workers: int, observed: Sequence[str] = (), signed: bool = False,
                 through: Through = ()) -> Schedule:
        key = batch, workers, tuple(observed), signed, through
        found = self._schedules.get(key)
        if found is None:
            found = self._network.schedule(*key)
            if observed:  # rarely asked for twice
                return found
            if through:  # those of other channels are done with
                self._schedules = {one: kept for one, kept in self._schedules.items() if one[4] in ((), through)}
            found = self._schedules.setdefault(key, found)  # another thread may have been first
        return found

    def nbytes(self, batch: int, workers: int, observed: Sequence[str] = ()) -> int:
        """What a plan takes. Nothing is allocated to find out."""
        return self.schedule(batch, workers, observed).nbytes

    def max_images(self, workers: int, budget: float) -> int:
        """How many images at a time a plan within `budget` bytes takes, at least 1."""
        images = int(max(1, min(self._max_batch, budget // self.nbytes(1, 1))))
        while images > 1 and self.limit < math.inf and self.nbytes(images, workers) > budget:
            images -= 1
        return images

    def take(self, schedule: Schedule, call: threading.Lock) -> Loan:
        """A plan of one of this pool's schedules, once there are threads and memory for it; who asks first gets it
        first.

        call: a lock that the caller holds, by a `with` statement, as long as it needs the plan.
        """
        loan = Loan(schedule, call)
        with self._turn:
            while not self._admitted(loan):
                self._returns.acquire(timeout=_PATIENCE)
        try:
            loan.plan = loan.plan or self.bind(schedule)
        except BaseException:
            self.give_back(loan, False)
            raise
        return loan

    def _admitted(self, loan: Loan) -> bool:
        with self._lock:
            self._loans = [other for other in self._loans if other.is_open]
            schedule, workers = loan.schedule, self.used_workers
            if workers and (workers + schedule.workers > self._max_workers
                            or self.used_bytes + schedule.nbytes > self.limit):
                return False
            self._loans.append(loan)
            i = next((i for i in reversed(range(len(self.idle))) if self.idle[i].schedule is schedule), None)
            if i is not None:
                loan.plan = self.idle.pop(i)
            else:
                self._keep()
            return True

    def began(self, loan: Loan) -> bool:
        """Whether a thread of ours may use a loan; not when its call is over. The thread is to give it back."""
        with self._lock:
            loan.is_running = loan.is_open
            return loan.is_running

    def give_back(self, loan: Loan, sound: bool = True) -> None:
        """After use.

        A plan that is not sound, for its work was cut short, is not used again; nor one that keeps relevance.
        """
        with self._lock:
            plan, loan.plan, loan.is_over = loan.plan, None, True
            self._loans = [other for other in self._loans if other.is_open]
            if plan is not None and sound and not plan.schedule.observed:
                self.idle.append(plan)
            self._keep()
            if self._returns.locked():  # else others have given back
                self._returns.release()

    def drop_idle(self) -> bool:
        """Give back the memory of plans that nobody uses. Returns whether there were any."""
        with self._lock:
            dropped = bool(self.idle)
            self.idle.clear()
        return dropped

    def _keep(self) -> None:
        """Of the idle plans those not used for longest go where there is no memory for all."""
        while sum(plan.nbytes for plan in self.idle) > min(self.max_idle, self.limit - self.used_bytes):
            self.idle.pop(0)


__all__ = ["OutOfMemoryError", "PlanPool"]
