"""Schedule -> Plan: the only place that allocates, binds kernels to memory, and runs them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fastdtd.errors import InputError
from fastdtd.graph import Array
from fastdtd.protocols import AnyDevice
from fastdtd.schedule import Schedule, Scratch, State, Tensor, View

Submit = Callable[..., Any]
_NO_STEPS = np.zeros(0, np.int64)


class OutOfMemoryError(InputError):
    """A plan for which there is no memory."""


@dataclass(frozen=True, eq=False)
class _Call:
    """A step of one worker, bound: what the kernels' `bind` made of it, its arguments, and which units it does."""

    code: Any
    slots: Any
    arguments: list[Any]
    first: int
    last: int


class Plan:
    """A schedule bound to a device's memory. Not for two callers at once.

    Attributes
    ----------
    schedule : Schedule
    input : (batch, C, H, W) float32
        Write images here before `forward`.
    output : (batch, outputs) float32
        Class scores, valid between `forward` and `backward`.
    start : (batch, outputs) float32
        Write here what the output carries back (1 for the class to explain; its relevance if
        `schedule.starts_with_relevance`) before `backward`.
    relevance : (batch, C, H, W) float32
        Of the input, valid after `backward`.
    ledger : (batch, layers) float64
        Relevance that each layer of `schedule.ledger_layers` absorbed, valid after `backward`.
    observed : dict of str to (batch, C, H, W) float32
        Relevance of the tensors that were asked for, valid after `backward`.
    came : dict of str to (batch, C, H, W) float32
        Relevance that came to each layer of `schedule.through`, before it ended in other channels; valid after
        `backward`.
    """

    def __init__(self, schedule: Schedule, kernels: AnyDevice) -> None:
        self.schedule, self.nbytes, self._kernels = schedule, schedule.nbytes, kernels
        try:
            self._workspace = kernels.empty(schedule.workspace_elements)
            self._states = {name: kernels.zeros(shape, dtype) for name, (shape, dtype) in schedule.states.items()}
            self._views = {
                view: self._bind_view(view) for step in schedule.steps for view in step.arguments
                if isinstance(view, View)
            }
            self._calls = [self._bind(worker)
                           for worker in range(schedule.workers)]  # what the tables hold addresses of
        except MemoryError:
            raise OutOfMemoryError(
                f"the network needs {schedule.nbytes / 2**30:.1f} GiB for {schedule.batch} images at a time, more than "
                "there is") from None
        self._tables = [kernels.table(calls) for calls in self._calls]
        self._dead, self.ledger = self._states["dead"], self._states["ledger"]
        steps = np.arange(len(schedule.steps))
        self._forward, self._backward = steps[:schedule.forward_steps], steps[schedule.forward_steps:]
        self.observed = {name: self._states[f"observed/{name}"] for name in schedule.observed}
        self.came = {name: self._states[f"came/{name}"] for name, _ in schedule.through}
        self.input, self.relevance = self._tensor(schedule.input), self._tensor(schedule.relevance)
        self.output, self.start = (self._tensor(ends).reshape(schedule.batch, -1)  # no copy: nothing else lies there
                                   for ends in (schedule.output, schedule.start))

    def forward(self, submit: Submit | None = None) -> None:
        """input -> output. `submit` starts a call in another thread; needed where the plan has several workers."""
        self._dead[:] = 0
        self.run(self._forward, submit)

    def backward(self, submit: Submit | None = None) -> None:
        """start -> relevance and ledger."""
        self.ledger[:] = 0
        self.run(self._backward, submit)

    def explain(self, begin: Callable[[], None], submit: Submit | None = None) -> None:
        """Both passes; `begin` is called between them, to read output and write start. The other workers are started
        once, and wait for it without leaving native code."""
        self._dead[:] = 0
        self.ledger[:] = 0
        self.run(self._forward, submit, begin, self._backward)

    def run(self, wanted: npt.NDArray[np.int64], submit: Submit | None = None, then: Callable[[], None] | None = None,
            after: npt.NDArray[np.int64] = _NO_STEPS) -> None:
        """Run some steps, by number, each once all workers are done with the one before; then the caller's thread calls
        `then`, and the steps `after` follow."""
        workers, barrier = self.schedule.workers, np.zeros(1, np.int64)
        if workers == 1:
            self._kernels.run_steps(self._tables[0], wanted, np.zeros(2, np.int64), barrier, 1)
            if then is not None:
                then()
                self._kernels.run_steps(self._tables[0], after, np.zeros(2, np.int64), barrier, 1)
            return
        assert submit is not None
        if then is not None:
            after = np.concatenate((np.array([self._kernels.NO_STEP]), after))  # where the others wait for the caller
        arrivals = workers * (len(wanted) + len(after))
        working = threading.Lock()  # as long as the caller holds it; Ctrl-C may end that at any moment
        errors: list[BaseException] = []

        def work(table: Any, steps: npt.NDArray[np.int64]) -> None:
            progress = np.zeros(2, np.int64)
            while not self._kernels.run_steps(table, steps, progress, barrier, workers):
                if not working.locked():  # and who is not at the barrier yet does not come
                    barrier[0] = self._kernels.BROKEN
                time.sleep(0)

        def work_with_caller(table: Any) -> None:
            try:
                if working.locked():
                    work(table, np.concatenate((wanted, after)))
            except BaseException as error:  # the caller's to raise
                errors.append(error)
                barrier[0] = self._kernels.BROKEN  # nobody waits for a worker that does not arrive

        others: list[Any] = []
        try:
            with working:
                others += (submit(work_with_caller, table) for table in self._tables[1:])
                work(self._tables[0], wanted)
                if then is not None and not errors:
                    then()
                    work(self._tables[0], after)
        finally:
            if barrier[0] != arrivals:  # else all have done their part of the last step
                for other in others:
                    other.result()
        if errors:
            raise errors[0]

    def prepared(self, steps: Iterable[int]) -> Callable[[], None]:
        """What runs some steps, whatever their conditions, and takes no other time: to measure them. For one worker."""
        assert self.schedule.workers == 1
        wanted, progress, barrier = np.array(list(steps), np.int64), np.zeros(2, np.int64), np.zeros(1, np.int64)
        table, run_steps = self._tables[0], self._kernels.run_steps

        def run() -> None:
            progress[:] = 0
            run_steps(table, wanted, progress, barrier, 1)

        return run

    def arguments(self, step: int) -> list[Any]:
        """Of a step as its first worker's kernel gets them: arrays and numbers."""
        return self._calls[0][step].arguments

    def _bind_view(self, view: View) -> Any:
        buffer = self.schedule.buffers[view.buffer]
        flat = self._workspace[buffer.offset:buffer.offset + buffer.elements]
        return _images(flat.view(view.dtype).reshape(buffer.images, *view.shape), view.image)

    def _tensor(self, tensor: Tensor) -> Array:
        bound: Array = self._bind_view(tensor.view)[:, tensor.channel:tensor.channel + tensor.channels]
        return bound

    def _state(self, state: State) -> Any:
        array = self._states[state.name] if state.row is None else self._states[state.name][state.row]
        return _images(array, state.image)

    def _bind(self, worker: int) -> list[_Call]:
        scratch = {name: self._kernels.empty(elements) for name, elements in self.schedule.scratch.items()}
        calls = []
        for step in self.schedule.steps:
            bound: list[Any] = []
            for argument in step.arguments:
                match argument:
                    case View():
                        bound.append(self._views[argument])
                    case Scratch(name):
                        bound.append(scratch[name])
                    case State():
                        bound.append(self._state(argument))
                    case _:
                        bound.append(argument)
            workers = self.schedule.workers
            first, last = step.units * worker // workers, step.units * (worker + 1) // workers
            code, slots = self._kernels.bind(step.kernel, bound)
            calls.append(_Call(code, slots, bound, first, last))
        return calls


def _images(array: Any, image: int | None) -> Any:
    return array if image is None else array[image:image + 1]
