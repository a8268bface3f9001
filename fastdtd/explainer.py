"""Explainer: pictures in, relevance out. Checks what comes in, shares the work among threads, and says what was lost."""

from __future__ import annotations

import math
import os
import re
import threading
import warnings
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from fastdtd import devices
from fastdtd.errors import DeviceError, InputError
from fastdtd.graph import Array, Conv2d, Dense, Graph
from fastdtd.model import Model
from fastdtd.packing import pack
from fastdtd.plan import NoRoomError, Plan, fusible_activations
from fastdtd.rules import Rules, absorbers, assign, derived_from

Target = int | str | Sequence[int | str] | npt.NDArray[Any] | None

_ARENA_BYTES = 1 << 28  # of one thread's buffers: more images at once would not be faster
_SMALL_NETWORK = 1 << 25  # multiply-adds of one product of all layers; half a millisecond or less
_CLIP_TOLERANCE = 1e-4  # of the width of the box: what preprocessing rounds off
_UNITS = {"kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


class ExplanationWarning(UserWarning):
    """An input was clipped to the model's value box, or a target's score has nothing to decompose."""


@dataclass(frozen=True, eq=False)
class Explanation:
    """What an Explainer returns for N pictures.

    Attributes
    ----------
    relevance : (N, C, H, W) float32
        The share of `explained` that each input value carries, summing to `explained` less what `ledger` names. Non-negative by the rules
        of "dtd"; epsilon, gamma and alpha-beta can make it negative. The presets named after derivatives have these instead.
    output : (N, K) float32
        Class scores, before any softmax.
    target : (N,) int64
        The output that is explained.
    explained : (N,) float32
        Its score, or 0 where the score is not positive: then there is nothing to decompose and the relevance is 0. Beside derivatives
        the score as it is.
    ledger : dict of str to (N,) float64
        By layer, the relevance that it absorbed: where a neuron is active though none of its inputs speaks for it (its bias does), the
        rule has nowhere to send its relevance; and what a stabiliser, or a bias that is part of a rule's sums, kept.
    """

    relevance: Array
    output: Array
    target: npt.NDArray[np.int64]
    explained: Array
    ledger: dict[str, npt.NDArray[np.float64]]
    _explain_again: Callable[[Sequence[str]], dict[str, Array]] | None = field(default=None, repr=False)

    def at(self, layer: str) -> Array:
        """Relevance of what a layer makes: the share of `explained` that each number carries there.

        It is computed now, by explaining the pictures again. A layer and the ReLU or clip behind it have the same relevance; derivatives
        have only those behind.

        Parameters
        ----------
        layer : str
            A layer's name, or "input".

        Returns
        -------
        (N, C, H, W) float32

        Raises
        ------
        InputError
            The network has no such layer, or not the derivative by it.
        """
        return self._at([layer])[layer]

    def flow(self) -> dict[str, npt.NDArray[np.float64]]:
        """By layer of the ledger, the relevance that came to it: (N,) float64. What went on is this less what the ledger names.

        It is computed now, by explaining the pictures again.
        """
        return {name: relevance.sum((1, 2, 3), dtype=np.float64) for name, relevance in self._at(list(self.ledger)).items()}

    def _at(self, layers: Sequence[str]) -> dict[str, Array]:
        if self._explain_again is None:
            raise InputError("this explanation was pickled, without the network; explain the pictures again for relevance at inner layers")
        return self._explain_again(layers)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_explain_again": None}

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
    rules : str, mapping of str to str or Rule, or sequence of these
        See `fastdtd.rules.assign`: "dtd" is the method as published, each layer's rule following from its input domain.
    device : str
        "cpu"; "cuda": all GPUs that CUDA shows, which share out the images of a call; "cuda:1": one of them; "auto": "cuda" where that
        works, else "cpu". GPUs need `pip install "fastdtd[cuda]"`.
    threads : int or None
        None: as many as this process may use. However many callers there are, no more threads than these compute at a time; but with one,
        each call is computed by the thread that makes it. On GPUs those that read and write pictures for `fastdtd.runner`.
    memory : str, int or None
        The most memory that activations, tapes and scratch may take (on each GPU), of all calls together and of what is kept for the next:
        a text such as "2GiB" (or KiB, MiB, KB, MB, GB) or a number of bytes. With less, fewer images are explained at a time, and if need
        be all threads work on one; the results are the same bits. Weights, pictures and explanations are not counted. None: whatever is
        fastest, which is at most 256 MiB, or one image, for each thread; of a GPU at most 80 % of what is free.
    precision : str or None
        How GPUs multiply in convolutions: "tf32", on tensor cores, with 11 bits of each factor; "3xtf32", on tensor cores with float32's
        accuracy; "fp32", without tensor cores. None: "tf32" where the chip has it.

    Attributes
    ----------
    batch : int
        Images that a thread (on GPUs: a stream), or all threads where they must share one image's memory, take at a time. It is halved
        when a GPU has no memory left for as many.
    at_once : int
        Images that all threads, or the streams of all GPUs, take together.
    precision : str
        What GPUs compute with; "" on processors.

    Raises
    ------
    RuleError
        A rule that does not exist or does not fit.
    InputError
        An unknown device, a number of threads below 1, or a limit of memory that is none, or in which not one image can be explained.
    DeviceError
        A GPU that cannot be used: what is missing or does not fit, and what to do.

    References
    ----------
    Montavon, Lapuschkin, Binder, Samek, Müller: Explaining NonLinear Classification Decisions with Deep Taylor Decomposition. Pattern
    Recognition 65:211-222, 2017.
    """

    def __init__(self, model: Model, rules: Rules = "dtd", device: str = "cpu", threads: int | None = None,
                 memory: str | int | None = None, precision: str | None = None):
        if threads is not None and (isinstance(threads, bool) or not isinstance(threads, int) or threads < 1):
            raise InputError(f"threads is {threads!r}; required: a whole number from 1, or None for all processors")
        given = math.inf if memory is None else _bytes(memory)
        self.model = model
        self.rules = assign(model.graph, rules)
        self._derivative = derived_from(rules)
        self.threads = threads or _usable_processors()
        found = devices.find(device, precision)
        self.precision = found.precision
        self._kernels, self._process = found.kernels, os.getpid()
        at_once = self._kernels.MAX_PLANS or self.threads  # on each device
        alone = not self._kernels.THREADS_SHARE_A_PLAN
        # Of each device: its number, and plans.
        self._places = [(number, self._plans_on(number, at_once, given)) for number in found.numbers]
        self._at_once = len(self._places) * at_once
        self._forget_threads()
        if hasattr(os, "register_at_fork"):  # threads and who holds a lock do not come along into a forked process
            forked = weakref.WeakMethod(self._forget_threads)
            os.register_at_fork(after_in_child=lambda: (renew := forked()) and renew())
        plans, limit = self._plans, min(plans.limit for _, plans in self._places)
        one = plans.nbytes(1, 1)
        if one > limit:
            told = f"memory is limited to {memory!r}; raise the limit, or" if limit == given else "a GPU has less;"
            raise InputError(f"one picture takes {_rounded_up(one)} for activations, tapes and scratch, and {told} use a network with a "
                             "smaller input")
        everything = int(limit) if self._kernels.FILLS_MEMORY else min(limit, at_once * max(one, _ARENA_BYTES))
        for _, each in self._places:
            each.kept = everything
        self._apart = at_once * one <= limit or alone  # is there room for a picture in each thread?
        self._small = alone or _multiply_adds(model.graph) < _SMALL_NETWORK
        self._workers = self.threads  # on one plan, where they work together
        if alone:
            self._workers = 1
        elif limit < math.inf and (scratch := plans.nbytes(1, 2) - one):  # of each further worker
            self._workers = min(self.threads, 1 + int(limit - one) // scratch)
        self._batch_together = plans.most_images(self._workers, everything)
        self.batch = plans.most_images(1, everything // at_once) if self._apart else self._batch_together

    def _plans_on(self, number: int, at_once: int, limit: float) -> _Plans:
        """Plans of one device, with the weights there."""
        graph, device_kernels = self.model.graph, self._kernels
        try:
            with device_kernels.on_device(number):
                packed = pack(graph, self.rules, device_kernels, devices.PRECISIONS.get(self.precision, devices.PRECISIONS["fp32"]))
        except MemoryError as error:
            raise InputError(f"there is no memory for the network's weights ({error}); use a device with more, or a smaller network"
                             ) from None

        def make(batch: int, workers: int, observed: Sequence[str] = ()) -> Plan:
            try:
                with device_kernels.on_device(number):
                    return Plan(graph, self.rules, device_kernels, packed, batch, workers, observed)
            except MemoryError as error:
                raise NoRoomError(f"there is no memory for {batch} pictures at a time ({error})") from None

        return _Plans(make, at_once, min(limit, device_kernels.memory_budget(number) or limit), device_kernels.MAX_IMAGES)

    @property
    def at_once(self) -> int:
        return self.batch * (self._at_once if self._apart else 1)

    @property
    def _plans(self) -> _Plans:
        """Of the first device."""
        return self._places[0][1]

    def __call__(self, batch: npt.ArrayLike, target: Target = None, start: npt.ArrayLike | None = None) -> Explanation:
        """Explain each picture of a batch.

        Parameters
        ----------
        batch : (N, C, H, W) or (C, H, W) array of float32, or what converts to it
            As `model.preprocess` makes it. Values beyond the model's value box are clipped to it, with a warning. With device="cuda" it may
            be an array of CuPy on one of the explainer's GPUs; it is explained there, and relevance and output stay there.
        target : int, str, sequence of these, or None
            The output to explain: its number or class name, one for all or one for each picture. None: the one with the highest score.
        start : (N, K) or (K,) array, or None
            Instead of a target: the relevance that each output starts with, none negative. Its largest is the `target` of the explanation,
            and its sum what is `explained`.

        Returns
        -------
        Explanation

        Raises
        ------
        InputError
            A batch of another shape, of no numbers, or with NaN or infinity; a target that the model does not have; a start of another
            shape, negative, beside a target, or at an output whose score is zero; scores or relevance beyond float32.
        DeviceError
            It was made for GPUs before the process was forked.

        Warns
        -----
        ExplanationWarning
            Values were clipped, or a target's score is not positive.
        """
        names, library, read = absorbers(self.model.graph, self.rules), self._kernels.namespace(batch), self._kernels.read
        with self._kernels.on_device_of(batch):
            pictures = self._checked(batch)
            count, outputs = len(pictures), self.model.graph.shapes[self.model.graph.output][0]
            targets, begins = self._targets(target, count, outputs), self._begins(start, target, count, outputs)
            explained_targets, finite = np.empty(count, np.int64), np.zeros(count, np.bool_)
            e = Explanation(library.empty_like(pictures), library.empty((count, outputs), np.float32), explained_targets,
                            np.empty(count, np.float32), {name: np.zeros(count) for name in names},
                            partial(self._observed, pictures, explained_targets, begins))

        def explain(plan: Plan, first: int, last: int) -> None:
            part = slice(first, last)
            scores, e.target[part], e.explained[part] = self._run(
                plan, pictures[part], None if targets is None else targets[part], None if begins is None else begins[part], first)
            e.output[part] = library.asarray(scores)
            read(e.relevance[part], plan.relevance)
            match self._derivative:
                case "gradient*input":
                    e.relevance[part] *= pictures[part]
                case "sensitivity":
                    e.relevance[part] **= 2
            ledger = np.empty(plan.ledger.shape)
            read(ledger, plan.ledger)
            for column, name in enumerate(plan.ledger_layers):
                e.ledger[name][part] = ledger[:, column]
            with np.errstate(invalid="ignore"):
                sums = e.relevance[part].sum((1, 2, 3), dtype=np.float64)  # not finite where one number is not
            read(finite[part], library.isfinite(sums) & library.isfinite(e.output[part]).all(1))

        self._share_out(explain, count, self._places_of(pictures))
        if not finite.all():
            raise InputError(f"picture {finite.argmin()} gives scores or relevance beyond float32; its values or the model's weights are "
                             "too large")
        nothing = np.flatnonzero(e.explained <= 0)
        if len(nothing) and begins is None and not self._derivative:
            picture, which = nothing[0], int(e.target[nothing[0]])
            warnings.warn(f"{len(nothing)} of {count} targets have a score that is not positive, so there is nothing to decompose and "
                          f"the relevance is zero; the first is picture {picture}, {self.model.class_name(which)!r}, score "
                          f"{float(e.output[picture, which]):.4g}", ExplanationWarning, stacklevel=2)
        return e

    def _run(self, plan: Plan, pictures: Array, targets: npt.NDArray[np.int64] | None, begins: Array | None, first: int
             ) -> tuple[Array, npt.NDArray[np.int64], Array]:
        """Forward and back: scores, what is explained of each picture, and how much that is. first: the number of the first picture."""
        submit = self._threads().submit if plan.workers > 1 else None
        self._kernels.write(plan.input, pictures)
        plan.forward(submit)
        scores = np.empty(plan.output.shape, np.float32)
        self._kernels.read(scores, plan.output)
        if begins is None:
            target = scores.argmax(1) if targets is None else targets
            score = np.take_along_axis(scores, target[:, None], 1)
            explained = score[:, 0] if self._derivative else np.maximum(score, 0)[:, 0]
            relevance = np.zeros_like(scores)
            np.put_along_axis(relevance, target[:, None], 1 if self._derivative else explained[:, None], 1)
        else:
            relevance, target, explained = begins, begins.argmax(1), begins.sum(1)
        self._kernels.write(plan.start, relevance if plan.starts_with_relevance else _factors(relevance, scores, first))
        plan.back(submit)
        return scores, target, explained

    def _observed(self, pictures: Array, targets: npt.NDArray[np.int64], begins: Array | None, layers: Sequence[str]) -> dict[str, Array]:
        """Relevance of some tensors, one picture after the other: a plan that keeps it is large."""
        graph = self.model.graph
        for name in layers:
            if name not in graph.shapes:
                raise InputError(f"the network has no layer {name!r}; it has {', '.join(graph.shapes)}")
            if self._derivative and (behind := fusible_activations(graph).get(name)):
                raise InputError(f"the derivative by what layer {name!r} makes is not kept, for the activation behind it is computed with "
                                 f"it; required: a layer such as {behind.name!r}")
        library, (number, plans) = self._kernels.namespace(pictures), self._places_of(pictures)[0]
        with self._kernels.on_device_of(pictures):
            found = {name: library.empty((len(pictures), *graph.shapes[name]), np.float32) for name in layers}
        with self._kernels.on_device(number):
            try:
                plan = plans.make(1, 1, layers)
            except NoRoomError:
                plans.drop_idle()
                plan = plans.make(1, 1, layers)
            for i in range(len(pictures)):
                part = slice(i, i + 1)
                self._run(plan, pictures[part], targets[part], None if begins is None else begins[part], i)
                for name, relevance in found.items():
                    self._kernels.read(relevance[part], plan.observed[name])
        return found

    def _places_of(self, pictures: Array) -> list[tuple[int, _Plans]]:
        """The devices for these pictures: all, or the one that they are on."""
        if not self._kernels.SURVIVES_FORK and os.getpid() != self._process:
            raise DeviceError("this explainer was made before the process was forked, and no GPU can be used from both sides of a fork; "
                              "make explainers in the processes that use them, started by multiprocessing's 'spawn'")
        if self._kernels.namespace(pictures) is np:
            return self._places
        own = int(pictures.device.id)  # type: ignore[attr-defined]  # of CuPy's arrays
        places = [(number, plans) for number, plans in self._places if number == own]
        if not places:
            raise InputError(f"the batch is on cuda:{own}; required: pictures on cuda:{', cuda:'.join(str(n) for n, _ in self._places)}, "
                             "or of NumPy")
        return places

    def _share_out(self, explain: Callable[[Plan, int, int], None], count: int, places: list[tuple[int, _Plans]]) -> None:
        """Whole images to each thread; all threads to each image where there are fewer images than threads, or no memory for as many.

        Threads that share an image meet after each layer: a small network is done before that pays. Of several devices each gets as many
        images, and those that a device has no memory for come again, in halves.
        """
        apart = self._apart and (count >= self.threads or self._small)
        workers, most = (1, self.batch) if apart else (self._workers, self._batch_together)
        parts = -(-count // most)
        if apart and count > 1 and self._kernels.MAX_PLANS is None:
            parts = -(-parts // self.threads) * self.threads  # as many for each thread
        parts = min(count, -(-parts // len(places)) * len(places))
        edges = [count * i // parts for i in range(parts + 1)] if parts else [0]
        elsewhere = self._threads() if apart and self._at_once > 1 and parts > 1 else None
        failed = False
        todo = [(first, last) for first, last in pairwise(edges) if first < last][::-1]

        def halve(first: int, last: int) -> None:
            middle = (first + last) // 2
            todo.extend((i, j) for i, j in ((middle, last), (first, middle)) if i < j)
            if middle > first:
                self.batch = min(self.batch, middle - first)

        def run(loan: list[Plan], place: tuple[int, _Plans], first: int, last: int) -> None:
            nonlocal failed
            plan, done, too_many = loan.pop(), False, False
            try:
                with self._kernels.on_device(place[0]):
                    explain(plan, first, last)
                done = True
            except MemoryError:  # of a GPU, where others may have taken some
                too_many = self._kernels.ALLOCATION_MAY_FAIL_AT_RUN_TIME and last - first > 1
                if not too_many:
                    raise
            finally:
                failed |= not (done or too_many)
                place[1].give_back(plan, done)
                del plan  # and its memory, where it was not given back
            if too_many:
                halve(first, last)

        running: list[tuple[Future[None], list[Plan], _Plans]] = []
        try:
            while (todo and not failed) or running:
                if failed or not todo:  # what is under way may be to do again
                    running[0][0].result()
                    del running[0]
                    continue
                first, last = todo.pop()
                place = min(places, key=lambda place: place[1].used_workers)
                try:
                    loan = [place[1].take(last - first, workers)]  # `run` takes it out: a plan known here would keep its memory
                except NoRoomError:
                    busy = [future for future, _, _ in running if not future.done()]
                    wait(busy)
                    if place[1].drop_idle() or busy or last - first > 1:
                        halve(first, last)
                        continue
                    raise
                if elsewhere is None:
                    run(loan, place, first, last)
                else:
                    running.append((elsewhere.submit(run, loan, place, first, last), loan, place[1]))
        finally:
            for future, loan, plans in running:
                if future.cancel():
                    plans.give_back(loan.pop(), False)

    def _forget_threads(self) -> None:
        self._lock = threading.Lock()
        self._executor: ThreadPoolExecutor | None = None
        for _, plans in self._places:
            plans.forget_users()

    def _threads(self) -> ThreadPoolExecutor:
        """The worker threads, all of them running: threads that wait for each other must not wait for one that cannot start."""
        with self._lock:
            if self._executor is None:
                executor, ready = ThreadPoolExecutor(self._at_once, "fastdtd"), threading.Event()
                try:
                    for _ in range(self._at_once):
                        executor.submit(ready.wait)
                except RuntimeError as error:
                    raise InputError(f"{self._at_once} threads cannot be started ({error}); use fewer") from None
                finally:
                    ready.set()
                self._executor = executor
            return self._executor

    def _checked(self, batch: npt.ArrayLike) -> Array:
        shape, library = self.model.graph.input_shape, self._kernels.namespace(batch)
        try:
            given = library.asarray(batch)
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
            pictures: Array = library.array(given, np.float32, order="C")  # `at` reads it later, when the caller's may be another
        if not pictures.size:
            return pictures
        planes = pictures.reshape(-1, shape[1] * shape[2])  # rows of which each is read by one part of a GPU
        least, most = planes.min(1).reshape(-1, shape[0]).min(0), planes.max(1).reshape(-1, shape[0]).max(0)  # NaN where one number is
        if not (library.isfinite(least).all() and library.isfinite(most).all()):
            worst = int(library.argmin(library.isfinite(pictures).all((1, 2, 3))))
            raise InputError(f"picture {worst} holds NaN or infinity (as float32); required: finite numbers")
        box = self.model.graph.box
        if box is None:
            return pictures
        low, high = (library.asarray(bound)[:, None, None] for bound in box)
        if (least[:, None, None] >= low).all() and (most[:, None, None] <= high).all():
            return pictures
        clipped: Array = library.clip(pictures, low, high)
        beyond = library.abs(pictures - clipped) > _CLIP_TOLERANCE * (high - low)
        if beyond.any():
            warnings.warn(f"{int(beyond.any((1, 2, 3)).sum())} of {len(pictures)} pictures have values beyond the model's value box "
                          f"{box[0].tolist()}..{box[1].tolist()}; they were clipped to it. Was model.preprocess used?",
                          ExplanationWarning, stacklevel=3)
        return clipped

    def _begins(self, start: npt.ArrayLike | None, target: Target, count: int, outputs: int) -> Array | None:
        if start is None:
            return None
        if target is not None:
            raise InputError("a target and a start were given; required: one or the other")
        try:
            given = np.asarray(start)
            if given.dtype.kind not in "fiu":
                raise ValueError
            with np.errstate(over="ignore"):
                begins = np.broadcast_to(given, (count, outputs)).astype(np.float32)
        except (ValueError, TypeError):
            raise InputError(f"start is no ({count}, {outputs}) or ({outputs},) array of numbers; required: relevance for each output"
                             ) from None
        if not (np.isfinite(begins).all() and (begins >= 0).all()):
            raise InputError("start holds a number that is negative, infinite or NaN; required: relevance from 0")
        return begins

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


def _factors(relevance: Array, scores: Array, first: int) -> Array:
    """c of R = |score| c. first: the number of the first picture."""
    impossible = (relevance > 0) & (scores == 0)
    if impossible.any():
        picture, output = np.argwhere(impossible)[0]
        raise InputError(f"output {output} of picture {first + picture} has the score 0, and start gives it relevance; required: a score "
                         "that can be shared")
    with np.errstate(all="ignore"):  # what becomes infinite is refused with the relevance
        return np.divide(relevance, np.abs(scores), out=np.zeros_like(relevance), where=relevance > 0)


class _Plans:
    """Plans, made when they are needed and kept for whoever asks next, within limits of memory and threads.

    Who waits for a plan holds none, and who runs one waits for nobody, so everyone who waits gets a turn.

    Parameters
    ----------
    make : callable
        (batch, workers, observed=()) -> Plan
    threads : int
        How many may work at a time on all plans together. With 1, each caller works in a thread of its own, and there may be any number.
    limit : int or infinity
        Bytes of all plans, used and idle.
    most_images : int
        Of one plan.
    """

    def __init__(self, make: Callable[..., Plan], threads: int, limit: float, most_images: int) -> None:
        self.make, self.limit, self._most_images = make, limit, most_images
        self._most_workers = threads if threads > 1 else math.inf
        self.kept = limit  # bytes of idle plans
        self.idle: list[Plan] = []  # the last used last
        self._nbytes: dict[tuple[int, int], int] = {}
        self.forget_users()

    def forget_users(self) -> None:
        """Nobody uses a plan or waits for one: at first, and in a forked process."""
        self._turn, self._change = threading.Lock(), threading.Condition()
        self.used_bytes = self.used_workers = 0

    def nbytes(self, batch: int, workers: int) -> int:
        """What a plan takes. Found by making one: that takes address space, and memory only when it runs (of a GPU at once)."""
        if (batch, workers) not in self._nbytes:
            plan = self.make(batch, workers)
            with self._change:
                self._nbytes[batch, workers] = plan.nbytes
                self._keep(plan)
        return self._nbytes[batch, workers]

    def most_images(self, workers: int, room: float) -> int:
        """How many images at a time a plan of `room` bytes holds, at least 1."""
        images = int(max(1, min(self._most_images, room // self.nbytes(1, 1))))
        while images > 1 and self.limit < math.inf:
            try:
                if self.nbytes(images, workers) <= room:
                    break
                images -= 1
            except NoRoomError:  # a GPU's memory is in pieces, or others have taken some
                images //= 2
        return images

    def take(self, batch: int, workers: int) -> Plan:
        """A plan for the caller alone, once there are threads and memory for it; who asks first gets it first."""
        nbytes = self.nbytes(batch, workers)
        with self._turn, self._change:
            self._change.wait_for(lambda: not self.used_workers or (self.used_workers + workers <= self._most_workers
                                                                    and self.used_bytes + nbytes <= self.limit))
            self.used_bytes += nbytes
            self.used_workers += workers
            i = next((i for i in reversed(range(len(self.idle))) if (self.idle[i].batch, self.idle[i].workers) == (batch, workers)), None)
            plan = None if i is None else self.idle.pop(i)
            self._keep()
        try:
            return plan or self.make(batch, workers)
        except BaseException:
            self._release(batch, workers)
            raise

    def give_back(self, plan: Plan, sound: bool = True) -> None:
        """After use. A plan that is not sound, for its work was cut short, is not used again."""
        self._release(plan.batch, plan.workers, *([plan] if sound else []))

    def drop_idle(self) -> bool:
        """Give back the memory of plans that nobody uses. Returns whether there were any."""
        with self._change:
            dropped = bool(self.idle)
            self.idle.clear()
        return dropped

    def _release(self, batch: int, workers: int, *plans: Plan) -> None:
        with self._change:
            self.used_bytes -= self._nbytes[batch, workers]
            self.used_workers -= workers
            self._keep(*plans)
            self._change.notify_all()

    def _keep(self, *plans: Plan) -> None:
        """Put plans among the idle ones; those not used for longest go where there is no room for all."""
        self.idle += plans
        while sum(plan.nbytes for plan in self.idle) > min(self.kept, self.limit - self.used_bytes):
            self.idle.pop(0)


def _bytes(memory: str | int) -> int:
    """A limit of memory as a number of bytes."""
    size = 0
    if isinstance(memory, int) and not isinstance(memory, bool):
        size = memory
    elif isinstance(memory, str) and (match := re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmg]i?b)\s*", memory, re.ASCII | re.IGNORECASE)):
        size = int(float(match[1]) * _UNITS[match[2].lower()])
    if size < 1:
        raise InputError(f"memory is {memory!r}; required: a number with one of the units KiB, MiB, GiB, KB, MB, GB, as in '2GiB', or a "
                         "whole number of bytes")
    return size


def _rounded_up(nbytes: int) -> str:
    return f"{math.ceil(nbytes / 2**20)}MiB" if nbytes > 2**20 else f"{math.ceil(nbytes / 2**10)}KiB"


def _multiply_adds(graph: Graph) -> int:
    """Of the convolutions and dense layers, for one picture, forward."""
    return sum(layer.weight.size // len(layer.weight) * math.prod(graph.shapes[layer.name]) for layer in graph
               if isinstance(layer, (Conv2d, Dense)))


def _usable_processors() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
