"""Explainer: pictures in, relevance out. Checks what comes in, shares the work among threads, and says what was lost."""

from __future__ import annotations

import os
import threading
import warnings
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from fastdtd import kernels
from fastdtd.errors import InputError
from fastdtd.graph import Array
from fastdtd.model import Model
from fastdtd.packing import pack
from fastdtd.plan import Plan
from fastdtd.rules import Rules, assign

Target = int | str | Sequence[int | str] | npt.NDArray[Any] | None

_ARENA_BYTES = 1 << 28  # of one thread's buffers: more images at once would not be faster
_MOST_IMAGES = 32
_CLIP_TOLERANCE = 1e-4  # of the width of the box: what preprocessing rounds off


class ExplanationWarning(UserWarning):
    """An input was clipped to the model's value box, or a target's score has nothing to decompose."""


@dataclass(frozen=True, eq=False)
class Explanation:
    """What an Explainer returns for N pictures.

    Attributes
    ----------
    relevance : (N, C, H, W) float32
        The share of `explained` that each input value carries: non-negative, and summing to `explained` less what `ledger` names.
    output : (N, K) float32
        Class scores, before any softmax.
    target : (N,) int64
        The output that is explained.
    explained : (N,) float32
        Its score, or 0 where the score is not positive: then there is nothing to decompose and the relevance is 0.
    ledger : dict of str to (N,) float64
        By layer, the relevance that it absorbed: where a neuron is active though none of its inputs speaks for it (its bias does), the
        rule has nowhere to send its relevance.
    """

    relevance: Array
    output: Array
    target: npt.NDArray[np.int64]
    explained: Array
    ledger: dict[str, npt.NDArray[np.float64]]

    @property
    def absorbed(self) -> npt.NDArray[np.float64]:
        """(N,) float64: what all layers absorbed together."""
        return np.asarray(sum(self.ledger.values(), np.zeros(len(self.target))))


class Explainer:
    """Explains a model's predictions by deep Taylor decomposition.

    Weights are packed and memory laid out when it is made, so make it once and call it often; calls from several threads are safe.

    Parameters
    ----------
    model : Model
        From `fastdtd.load` or `fastdtd.convert`.
    rules : "dtd" or mapping of str to str
        See `fastdtd.rules.assign`: "dtd" is the method as published, each layer's rule following from its input domain.
    device : "cpu"
    threads : int or None
        None: as many as this process may use.

    Raises
    ------
    RuleError
        A rule that does not exist or does not fit.
    InputError
        An unknown device or a number of threads below 1.

    References
    ----------
    Montavon, Lapuschkin, Binder, Samek, Müller: Explaining NonLinear Classification Decisions with Deep Taylor Decomposition. Pattern
    Recognition 65:211-222, 2017.
    """

    def __init__(self, model: Model, rules: Rules = "dtd", device: str = "cpu", threads: int | None = None):
        if device not in kernels.DEVICES:
            raise InputError(f"device {device!r} is unknown; required: one of {', '.join(map(repr, kernels.DEVICES))}")
        if threads is not None and (isinstance(threads, bool) or not isinstance(threads, int) or threads < 1):
            raise InputError(f"threads is {threads!r}; required: a whole number from 1, or None for all processors")
        self.model = model
        self.rules = assign(model.graph, rules)
        self.threads = threads or _usable_processors()
        self._kernels = kernels.load(device)
        self._packed = pack(model.graph, self.rules, self._kernels)
        self._idle: list[Plan] = []  # the last used last
        self._without_threads()
        if hasattr(os, "register_at_fork"):  # threads and who holds a lock do not come along into a forked process
            forked = weakref.WeakMethod(self._without_threads)
            os.register_at_fork(after_in_child=lambda: (renew := forked()) and renew())
        one = self._new_plan(1, 1)
        self._kept_bytes = self.threads * max(one.nbytes, _ARENA_BYTES)
        self.batch = max(1, min(_MOST_IMAGES, _ARENA_BYTES // one.nbytes))
        self._give_back(one)

    def __call__(self, batch: npt.ArrayLike, target: Target = None) -> Explanation:
        """Explain each picture of a batch.

        Parameters
        ----------
        batch : (N, C, H, W) or (C, H, W) array of float32, or what converts to it
            As `model.preprocess` makes it. Values beyond the model's value box are clipped to it, with a warning.
        target : int, str, sequence of these, or None
            The output to explain: its number or class name, one for all or one for each picture. None: the one with the highest score.

        Returns
        -------
        Explanation

        Raises
        ------
        InputError
            A batch of another shape, of no numbers, or with NaN or infinity; a target that the model does not have; scores or relevance
            beyond float32.

        Warns
        -----
        ExplanationWarning
            Values were clipped, or a target's score is not positive.
        """
        pictures = self._checked(batch)
        count, outputs = len(pictures), self.model.graph.shapes[self.model.graph.output][0]
        targets = self._targets(target, count, outputs)
        names = [name for name, rule in self.rules.items() if rule.name != "winner"]
        e = Explanation(np.empty_like(pictures), np.empty((count, outputs), np.float32), np.empty(count, np.int64),
                        np.empty(count, np.float32), {name: np.zeros(count) for name in names})

        def explain(first: int, last: int, workers: int = 1) -> None:
            plan = self._take_plan(last - first, workers)
            submit = self._threads().submit if workers > 1 else None
            part = slice(first, last)
            plan.input[:] = pictures[part]
            plan.forward(submit)
            e.output[part] = plan.output
            e.target[part] = e.output[part].argmax(1) if targets is None else targets[part]
            e.explained[part] = np.maximum(np.take_along_axis(e.output[part], e.target[part, None], 1)[:, 0], 0)
            plan.start[:] = 0
            start = e.explained[part] if plan.starts_with_relevance else e.explained[part] > 0
            np.put_along_axis(plan.start, e.target[part, None], np.asarray(start, np.float32)[:, None], 1)
            plan.back(submit)
            e.relevance[part] = plan.relevance
            for column, name in enumerate(plan.ledger_layers):
                e.ledger[name][part] = plan.ledger[:, column]
            self._give_back(plan)

        self._share_out(explain, count)
        if not (np.isfinite(e.output).all() and np.isfinite(e.relevance).all()):
            worst = int(np.argmin(np.isfinite(e.output).all(1) & np.isfinite(e.relevance).all((1, 2, 3))))
            raise InputError(f"picture {worst} gives scores or relevance beyond float32; its values or the model's weights are too large")
        nothing = np.flatnonzero(e.explained <= 0)
        if len(nothing):
            picture, which = nothing[0], int(e.target[nothing[0]])
            warnings.warn(f"{len(nothing)} of {count} targets have a score that is not positive, so there is nothing to decompose and "
                          f"the relevance is zero; the first is picture {picture}, {self.model.class_name(which)!r}, score "
                          f"{e.output[picture, which]:.4g}", ExplanationWarning, stacklevel=2)
        return e

    def _share_out(self, explain: Callable[..., None], count: int) -> None:
        """Whole images to each thread; all threads to a batch of fewer images than threads."""
        if self.threads == 1 or count >= self.threads:
            parts = -(-count // self.batch)
            parts = -(-parts // self.threads) * self.threads if count > 1 else parts  # as many for each thread
            edges = [count * i // parts for i in range(parts + 1)] if parts else [0]
            ranges = [(a, b) for a, b in pairwise(edges) if b > a]
            if self.threads == 1:
                for first, last in ranges:
                    explain(first, last)
                return
            futures = [self._threads().submit(explain, first, last) for first, last in ranges]
            try:
                for future in futures:
                    future.result()
            finally:
                for future in futures:
                    future.cancel()
        elif count:
            with self._alone:
                explain(0, count, self.threads)

    def _new_plan(self, batch: int, workers: int) -> Plan:
        return Plan(self.model.graph, self.rules, self._kernels, self._packed, batch, workers)

    def _take_plan(self, batch: int, workers: int) -> Plan:
        with self._lock:
            for i in reversed(range(len(self._idle))):
                if (self._idle[i].batch, self._idle[i].workers) == (batch, workers):
                    return self._idle.pop(i)
        return self._new_plan(batch, workers)

    def _give_back(self, plan: Plan) -> None:
        with self._lock:
            self._idle.append(plan)
            while sum(idle.nbytes for idle in self._idle) > self._kept_bytes:
                self._idle.pop(0)

    def _without_threads(self) -> None:
        self._lock = threading.Lock()
        self._alone = threading.Lock()  # plans whose threads wait for each other, one at a time
        self._executor: ThreadPoolExecutor | None = None

    def _threads(self) -> ThreadPoolExecutor:
        """The worker threads, all of them running: threads that wait for each other must not wait for one that cannot start."""
        with self._lock:
            if self._executor is None:
                executor, ready = ThreadPoolExecutor(self.threads, "fastdtd"), threading.Event()
                try:
                    for _ in range(self.threads):
                        executor.submit(ready.wait)
                except RuntimeError as error:
                    raise InputError(f"{self.threads} threads cannot be started ({error}); use fewer") from None
                finally:
                    ready.set()
                self._executor = executor
            return self._executor

    def _checked(self, batch: npt.ArrayLike) -> Array:
        shape = self.model.graph.input_shape
        try:
            given = np.asarray(batch)
        except (ValueError, TypeError) as error:
            raise InputError(f"the batch is no array of one shape ({error}); required: (N, {', '.join(map(str, shape))}) float32") from None
        if given.dtype.kind not in "fiu":
            raise InputError(f"the batch has type {given.dtype}; required: real numbers, as model.preprocess makes them")
        if given.shape == shape:
            given = given[None]
        if given.shape[1:] != shape:
            raise InputError(f"the batch has shape {given.shape}; required: (N, {', '.join(map(str, shape))}), as numpy.stack of what "
                             "model.preprocess returns")
        with np.errstate(over="ignore"):
            pictures = np.ascontiguousarray(given, np.float32)
        if not np.isfinite(pictures).all():
            worst = int(np.argmin(np.isfinite(pictures).all((1, 2, 3))))
            raise InputError(f"picture {worst} holds NaN or infinity (as float32); required: finite numbers")
        box = self.model.graph.box
        if box is None:
            return pictures
        low, high = (bound[:, None, None] for bound in box)
        clipped = np.clip(pictures, low, high)
        beyond = np.abs(pictures - clipped) > _CLIP_TOLERANCE * (high - low)
        if beyond.any():
            warnings.warn(f"{int(beyond.any((1, 2, 3)).sum())} of {len(pictures)} pictures have values beyond the model's value box "
                          f"{box[0].tolist()}..{box[1].tolist()}; they were clipped to it. Was model.preprocess used?",
                          ExplanationWarning, stacklevel=3)
        return clipped

    def _targets(self, target: Target, count: int, outputs: int) -> npt.NDArray[np.int64] | None:
        if target is None:
            return None
        if isinstance(target, np.ndarray):
            target = target.tolist()
        alone = isinstance(target, (str, int, np.integer)) or not isinstance(target, Sequence)
        given = [target] if alone else list(target)  # type: ignore[arg-type]  # what it is not is refused below
        indices = []
        for one in given:
            index = self.model.class_index(one) if isinstance(one, str) else one
            if isinstance(index, bool) or not isinstance(index, (int, np.integer)) or not 0 <= index < outputs:
                raise InputError(f"target {one!r} is not an output; required: a whole number from 0 to {outputs - 1}, or a class name")
            indices.append(int(index))
        if not alone and len(indices) != count:
            raise InputError(f"{len(indices)} targets were given for {count} pictures; required: one for all, or one for each")
        return np.resize(np.array(indices, np.int64), count)


def _usable_processors() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
