"""How the images of a call are shared out among threads and devices, within the memory that there is."""

from __future__ import annotations

import math
import os
import threading
import weakref
from collections.abc import Callable, Sequence
from itertools import pairwise

from fastdtd.cost import multiply_adds
from fastdtd.devices import Devices
from fastdtd.errors import DeviceError, InputError
from fastdtd.graph import Conv2d, Dense, Graph
from fastdtd.lowering import Lowered, lower
from fastdtd.plan import OutOfMemoryError, Plan
from fastdtd.plan_pool import Loan, PlanPool
from fastdtd.rules import Assignment
from fastdtd.schedule import Schedule, Through
from fastdtd.threads import Task, Threads

_WORKSPACE_BYTES = 1 << 28  # of one thread's buffers: more images at once would not be faster
_SMALL_NETWORK = 1 << 25  # multiply-adds of one product of all layers; half a millisecond or less

DevicePool = tuple[int, PlanPool]  # a device's number, and the plans there
Work = Callable[[Plan, int, int], None]  # of images first..last-1, which a plan explains


class Executor:
    """The threads of an explainer and the plans that they run.

    Parameters
    ----------
    graph, assignment :
        The network and its rules.
    found : Devices
    threads : int
    limit : int or infinity
        Bytes that the plans of a device may take.
    told_limit : object
        The limit as the user gave it, for messages.

    Attributes
    ----------
    batch : int
        Images that a thread (on GPUs: a stream), or all threads where they must share one image's memory, take at a
        time.
    """

    def __init__(self, graph: Graph, assignment: Assignment, found: Devices, threads: int, limit: float,
                 told_limit: object) -> None:
        self.kernels, self.threads = found.kernels, threads
        self._process = os.getpid()
        kernels = found.kernels
        concurrent = kernels.MAX_PLANS or threads  # plans at a time, on each device
        self.devices = [(number, self._pool(graph, assignment, found, number, concurrent, limit))
                        for number in found.numbers]
        self._concurrent = len(self.devices) * concurrent
        self._forget_threads()
        if hasattr(os, "register_at_fork"):  # a forked process has neither the threads nor the holders of locks
            forked = weakref.WeakMethod(self._forget_threads)
            os.register_at_fork(after_in_child=lambda: (renew := forked()) and renew())
        plans, available = self.devices[0][1], min(plans.limit for _, plans in self.devices)
        one = plans.nbytes(1, 1)
        there_is = available if available < math.inf else _memory_of_machine()
        if one > there_is:
            told = "a GPU has less;" if available < math.inf else f"this machine has {_rounded_up(int(there_is))};"
            if available == limit < math.inf:
                told = f"memory is limited to {told_limit!r}; raise the limit, or"
            raise InputError(
                f"one image takes {_rounded_up(one)} for activations, ratios and scratch, and {told} use a network "
                "with a smaller input")
        budget = int(available) if kernels.FILLS_MEMORY else min(available, concurrent * max(one, _WORKSPACE_BYTES))
        for _, each in self.devices:
            each.max_idle = budget
        # Is there memory for an image in each thread?
        self._own_plans = concurrent * one <= available or not kernels.THREADS_SHARE_A_PLAN
        self._is_small = not kernels.THREADS_SHARE_A_PLAN or _weighted(graph) < _SMALL_NETWORK
        self._workers = threads  # on one plan, where they share one
        if not kernels.THREADS_SHARE_A_PLAN:
            self._workers = 1
        elif available < math.inf and (scratch := plans.nbytes(1, 2) - one):  # of each further worker
            self._workers = min(threads, 1 + int(available - one) // scratch)
        self._shared_batch = plans.max_images(self._workers, budget)
        self.batch = plans.max_images(1, budget // concurrent) if self._own_plans else self._shared_batch

    @property
    def at_once(self) -> int:
        """Images that all threads, or the streams of all GPUs, take together."""
        return self.batch * (self._concurrent if self._own_plans else 1)

    def _pool(self, graph: Graph, assignment: Assignment, found: Devices, number: int, concurrent: int,
              limit: float) -> PlanPool:
        """Plans of one device, with the weights there."""
        kernels = found.kernels
        try:
            with kernels.on_device(number):
                network: Lowered = lower(graph, assignment, kernels, found.precision_code)
        except MemoryError as error:
            raise InputError(
                f"there is no memory for the network's weights ({error}); use a device with more, or a smaller network"
            ) from None

        def bind(schedule: Schedule) -> Plan:
            try:
                with kernels.on_device(number):
                    return Plan(schedule, kernels)
            except MemoryError as error:
                raise OutOfMemoryError(f"there is no memory for {schedule.batch} images at a time ({error})") from None

        budget = min(limit, kernels.memory_budget(number) or limit)
        return PlanPool(network, bind, concurrent, budget, kernels.MAX_IMAGES)

    def devices_for(self, images: object) -> list[DevicePool]:
        """The devices for these images: all, or the one that they are on."""
        if not self.kernels.SURVIVES_FORK and os.getpid() != self._process:
            raise DeviceError(
                "this explainer was made before the process was forked, and no GPU can be used from both sides of a "
                "fork; make explainers in the processes that use them, started by multiprocessing's 'spawn'")
        own = getattr(getattr(images, "device", None), "id", None)  # of CuPy's arrays
        if own is None:
            return self.devices
        devices = [(number, plans) for number, plans in self.devices if number == int(own)]
        if not devices:
            raise InputError(
                f"the batch is on cuda:{own}; required: images on "
                f"cuda:{', cuda:'.join(str(n) for n, _ in self.devices)}, or of NumPy")
        return devices

    def submit(self, plan: Plan) -> Callable[..., object] | None:
        """What starts the calls of a plan's other workers; None where it has one."""
        return self._threads().submit if plan.schedule.workers > 1 else None

    def map(self, work: Work, count: int, devices: list[DevicePool], signed: bool = False,
            through: Through = ()) -> None:
        """Whole images to each thread; all threads to each image where there are fewer images than threads, or no
        memory for as many.

        Threads that share an image wait for each other after each layer: a small network is done before that pays. The
        last images are explained by the caller's own thread, for to hand them over and to wait takes longer. Of several
        devices each gets as many images, and those that a device has no memory for come again, in halves.

        signed, through: as `Lowered.schedule` takes them.
        """
        own_plans = self._own_plans and (count >= self.threads or self._is_small)
        workers, max_images = (1, self.batch) if own_plans else (self._workers, self._shared_batch)
        parts = -(-count // max_images)
        if own_plans and count > 1 and self.kernels.MAX_PLANS is None:
            parts = -(-parts // self.threads) * self.threads  # as many for each thread
        parts = min(count, -(-parts // len(devices)) * len(devices))
        edges = [count * i // parts for i in range(parts + 1)] if parts else [0]
        threads = self._threads() if own_plans and self._concurrent > 1 and parts > 1 else None
        failed = False
        todo = [(first, last) for first, last in pairwise(edges) if first < last][::-1]

        def halve(first: int, last: int) -> None:
            middle = (first + last) // 2
            todo.extend((i, j) for i, j in ((middle, last), (first, middle)) if i < j)
            if middle > first:
                self.batch = min(self.batch, middle - first)

        def run(loan: Loan, device: DevicePool, first: int, last: int) -> None:
            nonlocal failed
            done, too_many = False, False
            try:
                assert loan.plan is not None
                with self.kernels.on_device(device[0]):
                    work(loan.plan, first, last)
                done = True
            except MemoryError:  # of a GPU, where others may have taken some
                too_many = self.kernels.ALLOCATION_MAY_FAIL_AT_RUN_TIME and last - first > 1
                if not too_many:
                    raise
            finally:
                failed |= not (done or too_many)
                device[1].give_back(loan, done)
            if too_many:
                halve(first, last)

        def run_in_a_thread(loan: Loan, device: DevicePool, first: int, last: int) -> None:
            if device[1].began(loan):
                run(loan, device, first, last)

        running: list[Task] = []
        call = threading.Lock()
        with call:  # which takes back what is not running, whatever happens
            while (todo and not failed) or running:
                if failed or not todo:  # what is under way may be to do again
                    running[0].result()
                    del running[0]
                    continue
                first, last = todo.pop()
                device = min(devices, key=lambda device: device[1].used_workers)
                try:
                    loan = device[1].take(device[1].schedule(last - first, workers, (), signed, through), call)
                except OutOfMemoryError:
                    busy = [task for task in running if not task.is_done]
                    for task in busy:
                        task.wait()
                    if device[1].drop_idle() or busy or last - first > 1:
                        halve(first, last)
                        continue
                    raise
                if threads is None or not todo:
                    run(loan, device, first, last)
                else:
                    running.append(threads.submit(run_in_a_thread, loan, device, first, last))

    def observe(self, work: Callable[[Plan], None], layers: Sequence[str], device: DevicePool, signed: bool = False,
                through: Through = ()) -> None:
        """Run `work` with plans that keep the relevance of tensors, as many at a time as there is memory for. The
        others: as in `map`."""
        number, plans = device
        todo = [list(layers)]
        while todo:
            part = todo.pop()
            schedule = plans.schedule(1, 1, part, signed, through)
            if schedule.nbytes > plans.limit:
                if len(part) == 1:
                    raise InputError(
                        f"relevance at layer {part[0]!r} takes {_rounded_up(schedule.nbytes)}, and the limit is "
                        f"{_rounded_up(int(plans.limit))}; make the explainer with a higher memory=")
                todo += [part[len(part) // 2:], part[:len(part) // 2]]
                continue
            call = threading.Lock()
            with call:
                try:
                    loan = plans.take(schedule, call)
                except OutOfMemoryError:
                    if not plans.drop_idle():
                        raise
                    loan = plans.take(schedule, call)
                done = False
                try:
                    assert loan.plan is not None
                    with self.kernels.on_device(number):
                        work(loan.plan)
                    done = True
                finally:
                    plans.give_back(loan, done)

    def _forget_threads(self) -> None:
        self._lock = threading.Lock()
        self._pool_of_threads: Threads | None = None
        for _, plans in self.devices:
            plans.forget_users()

    def _threads(self) -> Threads:
        """The worker threads, all running: those that wait for each other must not wait for one that cannot start."""
        with self._lock:
            if self._pool_of_threads is None:
                try:
                    self._pool_of_threads = Threads(self._concurrent)
                except RuntimeError as error:
                    raise InputError(f"{self._concurrent} threads cannot be started ({error}); use fewer") from None
            return self._pool_of_threads


def _rounded_up(nbytes: int) -> str:
    return f"{math.ceil(nbytes / 2**20)}MiB" if nbytes > 2**20 else f"{math.ceil(nbytes / 2**10)}KiB"


def _memory_of_machine() -> float:
    """Bytes; infinity where the system does not say. More would only be found out when it is written to."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return math.inf


def _weighted(graph: Graph) -> int:
    """Multiply-adds of the convolutions and dense layers, for one image, forward."""
    return sum(multiply_adds(layer, graph) for layer in graph if isinstance(layer, (Conv2d, Dense)))
