"""Is the heatmap right? How fast a score falls as the regions that a method finds relevant are replaced by noise."""

from __future__ import annotations

import contextlib
import csv
import math
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from fastdtd.errors import InputError, OutputError, PictureError, shown
from fastdtd.explainer import Explainer
from fastdtd.files import replace
from fastdtd.graph import Array
from fastdtd.inputs import (
    Against,
    BeyondFloat32Error,
    MapTarget,
    checked_against,
    checked_images,
    checked_places,
    checked_targets,
    checked_through,
    memory_size,
    pictures_of,
)
from fastdtd.model import Model
from fastdtd.question import Question, Score
from fastdtd.rules import PRESETS, Rules

if TYPE_CHECKING:
    from PIL import Image

Methods = str | Sequence[str] | Mapping[str, Rules]
RANDOM, EDGES = "random", "edges"  # methods that do not ask the network
METHODS = ("dtd", "gradient*input", "sensitivity", RANDOM, EDGES)
ORDERS = ("most", "least")
_ANY = "any"  # order of random regions: from either end it is the same
_STEPS = 100
_CHUNK = 16  # pictures that are held at a time
_JOB_BYTES = 1 << 26  # of images that are made at a time
_JOBS = 2  # at a time: while one's images are scored, another's are made

Floats = npt.NDArray[np.float64]
Numbers = npt.NDArray[np.int64]


# ---- What comes out --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Curve:
    """How scores fall as the regions of each picture are replaced in one method's order.

    Attributes
    ----------
    method : str
    order : "most", "least" or "any"
        Which regions are replaced first: those of most or of least relevance; "any" of a random order.
    drops : (N, L + 1) float64
        By how much each picture's score is lower once 0..L regions are replaced, averaged over the repeats.
    """

    method: str
    order: str
    drops: Floats

    @property
    def mean(self) -> Floats:
        """(L + 1,): over pictures."""
        return np.asarray(self.drops.mean(0))

    @property
    def standard_error(self) -> Floats:
        """(L + 1,): of `mean`; NaN with one picture."""
        return _standard_error(self.drops)

    @property
    def aopc(self) -> float:
        """The area over the perturbation curve: the mean of `mean` over steps 0..L."""
        return float(self.drops.mean())

    @property
    def aopc_error(self) -> float:
        """Standard error of `aopc`; NaN with one picture."""
        return float(_standard_error(self.drops.mean(1)))


def _standard_error(values: Floats) -> Floats:
    count = len(values)
    return np.asarray(values.std(0, ddof=1) / math.sqrt(count) if count > 1 else np.full(values.shape[1:], np.nan))


@dataclass(frozen=True, eq=False, repr=False)
class Evaluation:
    """What `evaluate` returns. Printed, it is a table.

    Attributes
    ----------
    curves : tuple of Curve
        Of each method and order.
    failed : dict of int to str
        By the picture's number, why it is left out: it cannot be read, say.
    """

    curves: tuple[Curve, ...]
    failed: dict[int, str]

    def __repr__(self) -> str:
        rows = [("method", "order", "AOPC", "standard error", "pictures")]
        rows += [(curve.method, curve.order, f"{curve.aopc:.4g}", f"{curve.aopc_error:.2g}", str(len(curve.drops)))
                 for curve in self.curves]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join("  ".join(f"{cell:<{w}}" if i < 2 else f"{cell:>{w}}"
                                   for i, (cell, w) in enumerate(zip(row, widths, strict=True))) for row in rows)

    def plot(self) -> Image.Image:
        """The curves, each in a band of its standard error."""
        from fastdtd import plot

        methods = list(dict.fromkeys(curve.method for curve in self.curves))
        orders = [order for order in ORDERS if any(curve.order == order for curve in self.curves)]
        lines = [
            plot.Line(f"{curve.method}, {curve.order}" if len(orders) > 1 and curve.order in orders else curve.method,
                      curve.mean, curve.standard_error, methods.index(curve.method), curve.order == ORDERS[1])
            for curve in self.curves]
        first = " or ".join(orders)
        count = len(self.curves[0].drops)
        return plot.draw(lines, f"regions replaced{first and f', {first} relevant first'}",
                         f"fall of the score, mean of {count} picture{'' if count == 1 else 's'}")

    def save(self, out: str | os.PathLike[str]) -> None:
        """Write evaluation.csv, every step of each curve, and evaluation.png, the plot.

        Parameters
        ----------
        out : path
            A folder; made where it does not exist.

        Raises
        ------
        OutputError
            It cannot be written to.
        """
        folder = writable_folder(out)
        with writing(folder):
            replace(folder / "evaluation.csv", self._write_csv)
            replace(folder / "evaluation.png", lambda path: self.plot().save(path, "PNG"))

    def _write_csv(self, path: Path) -> None:
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(("method", "order", "step", "mean", "standard_error"))
            for curve in self.curves:
                for step, (mean, error) in enumerate(zip(curve.mean, curve.standard_error, strict=True)):
                    writer.writerow((curve.method, curve.order, step, f"{mean:.9g}", f"{error:.9g}"))


def writable_folder(out: str | os.PathLike[str]) -> Path:
    """`out`, made where it does not exist. OutputError: it cannot be written to, which is better known at first."""
    folder = Path(out)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    return folder


@contextlib.contextmanager
def writing(out: Path) -> Iterator[None]:
    """What the system says against writing to `out`, as an OutputError."""
    try:
        yield
    except OSError as error:
        raise OutputError(f"cannot write to {str(out)!r}: {error.strerror or error}; required: a folder that can be "
                          "written and has free space") from None


# ---- The measure -----------------------------------------------------------------------------------------------------


def evaluate(model: Model, pictures: Any, methods: Methods = METHODS, order: str = "most",
             steps: int | None = None, region: int = 9, repeats: int = 1, target: MapTarget = None, seed: int = 0,
             on_progress: Callable[[int], Any] = lambda count: None, *, against: Against = None,
             through: Mapping[str, int | Sequence[int]] | None = None, **options: Any) -> Evaluation:
    """How fast scores fall as the regions that a method finds relevant are replaced, one after the other, by noise.

    A method that finds what the network looks at makes its score fall fast when the most relevant regions go first. The
    regions are the squares of a grid over the input, and a region's relevance is the sum of its pixels'; regions of the
    same relevance come in a random order. Noise is uniform within the model's value box or, where it has none, within
    the range of each channel of the picture. All methods get the same noise.

    Parameters
    ----------
    model : Model
    pictures : sequence of pictures, or (N, C, H, W) array
        As an `Explainer` takes them; of a sequence of paths a few are held at a time. Or images of a set, as
        ``fastdtd.sources.find`` gives them.
    methods : str, sequence of str, or mapping from str to rules
        Presets of rules, such as "dtd", "gradient*input" and "sensitivity"; "random", which is any order; "edges",
        the picture's own edges (Sobel), which know no network. Or any names, with rules as an `Explainer` takes them.
    order : {"most", "least", "both"}
        Which regions go first: the most relevant, so that the score should fall fast, or the least, so that it should
        hardly fall.
    steps : int or None
        Regions that are replaced. None: 100, or all where there are fewer.
    region : int
        Side of a region, in pixels. What is left over at the input's borders stays as it is.
    repeats : int
        Of each picture, with other noise. Their average is the picture's.
    target : int, str, tuple, sequence of these, or None
        What is explained and scored, as an `Explainer` takes it: a class, or a part of a map, whose scores are summed.
        None: each picture's winner. Winner, position of the highest score and runner-up are those of the picture as it
        is.
    seed : int
        Of the noise and of random orders. The same seed gives the same numbers, with any number of threads.
    on_progress : callable
        Told from time to time how many more pictures are done.
    against : int, str, sequence of these, or None
        A class, or several, that the target is held against, or "runner-up", as an `Explainer` takes it: the score that
        falls is the target's less theirs (less their mean). Methods that derive have the derivative of that.
    through : mapping from str to int or sequence of int, or None
        Layers, and their channels through which relevance goes, as an `Explainer` takes it. The score is the target's.
    **options
        Of `Explainer`: device, threads, memory (of all methods together), precision, max_multiply_adds.

    Returns
    -------
    Evaluation

    Raises
    ------
    InputError
        Unknown methods, no or not fitting pictures, regions larger than the input, more steps than regions; a target,
        `against` or `through` that an `Explainer` refuses, or of which there is no score to fall.
    RuleError
        A preset that the network cannot be explained by.

    Examples
    --------
    >>> import fastdtd
    >>> model = fastdtd.load("squeezenet1_1")
    >>> print(fastdtd.evaluate(model, ["cat.jpg", "coffee.jpg"], ["dtd", "random"], steps=10))
    method  order  AOPC  standard error  pictures
    dtd     most   ...  ...              2
    random  any    ...  ...              2

    References
    ----------
    Samek, Binder, Montavon, Lapuschkin, Müller: Evaluating the Visualization of What a Deep Neural Network Has Learned.
    IEEE Transactions on Neural Networks and Learning Systems 28:2660-2673, 2017.
    """
    from fastdtd.sources import Entry, open_image

    if not isinstance(model, Model):
        raise InputError(f"the model is {shown(model)}, of type {type(model).__name__}; required: a Model, as "
                         "fastdtd.load(...) and fastdtd.convert(...) return it")
    chosen = _checked_methods(methods)
    if not isinstance(order, str) or order not in (*ORDERS, "both"):
        raise InputError(f"order is {shown(order)}; required: most, least or both")
    if model.inputs:
        raise InputError(f"this model has several inputs, {', '.join(model.inputs)}; required: a model of one, an "
                         "image whose regions can be replaced")
    _, height, width = model.graph.input_shape
    of = f"of the input of {height} x {width} pixels"
    grid = _Grid(height, width, _checked_number("region", region, 1, min(height, width), of))
    of = f"for there are {grid.count} regions of {region} x {region} pixels; smaller ones are more"
    steps = min(_STEPS, grid.count) if steps is None else _checked_number("steps", steps, 1, grid.count, of)
    held, channels = checked_against(against, model, True), checked_through(through, model, True)
    if held in ("others", "softmax-gradient"):
        raise InputError(f"against is {held!r}, under which what is explained sums to 0, whatever the picture, so no "
                         "score can fall; required: a class, several, or 'runner-up'")
    run = _Run(model, chosen, ORDERS if order == "both" else (order,), grid, steps,
               _checked_number("repeats", repeats, 1), _checked_number("seed", seed, 0), options)
    derived = [name for name, explainer in run.explainers.items() if not explainer.conserves]
    if channels and derived:
        raise InputError(f"method {derived[0]!r} derives, and no relevance goes through channels; required: methods "
                         "that redistribute, as in methods=['dtd', 'random'] (--methods dtd,random)")
    is_set = isinstance(pictures, (list, tuple)) and all(isinstance(one, Entry) for one in pictures)  # as an empty one
    given = pictures if is_set else pictures_of(pictures, model)
    read: Callable[[int], Array]
    if is_set:
        count, read = len(pictures), lambda number: model.preprocess(open_image(pictures[number]))
    elif given is None:
        array = checked_images(pictures, model, np)
        count, read = len(array), array.__getitem__
    else:
        count, read = len(given), lambda number: model.preprocess(given[number])
    if not count:
        raise InputError("there are no pictures; required: at least one")
    targets, places = (checked_places(target, model, count) if model.graph.has_maps else
                       (checked_targets(target, model, count), None))
    question = Question(model.graph.output_shape, targets, places, None, held, True, channels)
    drops, failed = run.go(count, read, question, on_progress)
    if not drops:
        raise InputError(f"none of {count} pictures can be evaluated: {next(iter(failed.values()))}")
    return Evaluation(tuple(Curve(*curve, np.stack([one[i] for one in drops])) for i, curve in enumerate(run.curves)),
                      failed)


def _checked_methods(methods: Methods) -> dict[str, Rules | None]:
    """Rules by name; None for what has none."""
    if isinstance(methods, Mapping) and methods and all(isinstance(name, str) for name in methods):
        return {name: None if name in (RANDOM, EDGES) else rules for name, rules in methods.items()}
    given: list[Any] = [methods] if isinstance(methods, str) or not isinstance(methods, Sequence) else list(methods)
    known = (*PRESETS, RANDOM, EDGES)
    unknown = [name for name in given if name not in known]
    if unknown or not given:
        raise InputError(f"method {shown(unknown[0])} is unknown; required: some of {', '.join(known)}" if unknown else
                         f"there are no methods; required: some of {', '.join(known)}")
    return {name: None if name in (RANDOM, EDGES) else name for name in given}


def _checked_number(name: str, value: int, lowest: int, highest: float = math.inf, why: str = "") -> int:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or not lowest <= value <= highest:
        upwards = "" if highest == math.inf else f" to {highest}, {why}"
        raise InputError(f"{name} is {shown(value)}; required: a whole number from {lowest}{upwards}")
    return int(value)


class _Grid:
    """Squares in the middle of the input, as many as there is room for."""

    def __init__(self, height: int, width: int, region: int) -> None:
        self.region, self.rows, self.columns = region, height // region, width // region
        self.count = self.rows * self.columns
        top, left = height % region // 2, width % region // 2
        self.window = (..., slice(top, top + self.rows * region), slice(left, left + self.columns * region))

    def sums(self, relevance: Array) -> Floats:
        """(N, regions) of (N, C, H, W)."""
        inside = relevance[self.window].sum(1, dtype=np.float64)
        shape = len(relevance), self.rows, self.region, self.columns, self.region
        return np.asarray(inside.reshape(shape).sum((2, 4)).reshape(len(relevance), self.count))

    def pixels(self, regions: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
        """Those of the window that lie in some regions."""
        square = regions.reshape(self.rows, self.columns)
        return square.repeat(self.region, 0).repeat(self.region, 1)


class _Run:
    """One evaluation. Of each picture come `repeats` times all curves, of each curve its steps, as images to be scored;
    these are numbered, and cut into jobs wherever one is full."""

    def __init__(self, model: Model, methods: Mapping[str, Rules | None], orders: Sequence[str], grid: _Grid,
                 steps: int, repeats: int, seed: int, options: dict[str, Any]) -> None:
        self.model, self.methods, self.grid, self.seed = model, list(methods), grid, seed
        self.curves = [(name, order) for name in methods for order in (orders if name != RANDOM else [_ANY])]
        self.shape = repeats, len(self.curves), steps  # of one picture's scores
        rules = {name: own for name, own in methods.items() if own is not None}
        if options.get("memory") is not None:  # is for all explainers together
            options = {**options, "memory": max(1, memory_size(options["memory"]) // len({*rules, "dtd"}))}
        self.explainers = {name: Explainer(model, own, **options) for name, own in rules.items()}
        own = self.explainers["dtd"] if methods.get("dtd") == "dtd" else None
        self.scorer = own or Explainer(model, **options)  # the same, whatever the methods
        image = 4 * math.prod(model.graph.input_shape)
        self.job = max(1, min(self.scorer.at_once, _JOB_BYTES // image))

    def go(self, count: int, read: Callable[[int], Array], question: Question, on_progress: Callable[[int], Any]
           ) -> tuple[list[Floats], dict[int, str]]:
        """Of each picture (curves, L + 1); and why others have none."""
        drops: dict[int, Floats] = {}
        failed: dict[int, str] = {}
        told = 0

        def tell(done: int) -> None:
            nonlocal told
            if done > told:
                on_progress(done - told)
                told = done

        with ThreadPoolExecutor(_JOBS, "fastdtd-evaluation") as threads:
            try:
                for first in range(0, count, _CHUNK):
                    last = min(first + _CHUNK, count)
                    loaded: dict[int, Array] = {}
                    for number, future in [(n, threads.submit(read, n)) for n in range(first, last)]:
                        try:
                            loaded[number] = future.result()
                        except PictureError as error:
                            failed[number] = str(error)
                    while loaded:
                        numbers = np.array(list(loaded))
                        images = checked_images(np.stack(list(loaded.values())), self.model, np)
                        try:
                            found = self._drops(threads, numbers, images, question.part(numbers), tell,
                                                last - len(loaded))
                            drops.update(zip(loaded, found, strict=True))
                            break
                        except BeyondFloat32Error as error:  # of these pictures; the others are tried again
                            for i, reason in error.reasons.items():
                                failed[int(numbers[i])] = f"picture {numbers[i]} {reason}"
                                del loaded[int(numbers[i])]
                    tell(last)
            finally:
                threads.shutdown(cancel_futures=True)
        return list(drops.values()), dict(sorted(failed.items()))

    def _drops(self, threads: ThreadPoolExecutor, numbers: Numbers, images: Array, question: Question,
               tell: Callable[[int], Any], done_before: int) -> Floats:
        """(N, curves, L + 1) of some pictures."""
        shape = question.shape
        scores = self.scorer.predict(images).reshape(-1, *shape)
        followed = question.followed(scores)
        before = np.array([one.of(own) for one, own in zip(followed, scores, strict=True)])
        relevant = {name: self.grid.sums(self._relevance(name, images, question, followed)) for name in self.methods}
        of_one = math.prod(self.shape)
        after = np.empty(len(images) * of_one)

        def score(first: int, last: int) -> int:
            pictures = np.arange(first, last) // of_one
            try:
                found = self.scorer.predict(self._replaced(numbers, images, relevant, first, last))
            except BeyondFloat32Error as error:
                raise BeyondFloat32Error({int(pictures[i]): why for i, why in error.reasons.items()}) from None
            after[first:last] = [followed[i].of(own)
                                 for i, own in zip(pictures.tolist(), found.reshape(-1, *shape), strict=True)]
            return last

        jobs = [*range(0, len(after), self.job), len(after)]
        for done in threads.map(score, jobs, jobs[1:]):
            tell(done_before + done // of_one)
        drops = before[:, None, None] - after.reshape(len(images), *self.shape).mean(1)
        return np.pad(drops, ((0, 0), (0, 0), (1, 0)))

    def _relevance(self, method: str, images: Array, question: Question, followed: Sequence[Score]) -> Array:
        """(N, C or 1, H, W)."""
        if method == RANDOM:  # and regions of the same relevance come in a random order
            return np.zeros_like(images[:, :1])
        if method == EDGES:
            return _edges(images)
        explainer, shape = self.explainers[method], question.shape
        if question.against is not None and not explainer.conserves:
            start = np.stack([score.derivative(shape) for score in followed])
            return explainer(images, start=start if question.is_of_maps else start.reshape(len(images), -1)).relevance
        targets = [(score.target, score.region) if question.is_of_maps else score.target for score in followed]
        return explainer(images, targets, against=question.against, through=dict(question.through) or None).relevance

    def _replaced(self, numbers: Numbers, images: Array, relevant: dict[str, Floats], first: int, last: int) -> Array:
        """Images first..last-1."""
        batch = np.empty((last - first, *images.shape[1:]), np.float32)
        place = partial(np.unravel_index, shape=(len(images), *self.shape))
        for i in range(last - first):
            picture, repeat, curve, step = map(int, place(first + i))
            if i == 0 or curve == step == 0:
                rng = np.random.default_rng([self.seed, int(numbers[picture]), repeat])
                shuffled, noise = rng.permutation(self.grid.count), self._noise(rng, images[picture])
            if i == 0 or step == 0:
                method, order = self.curves[curve]
                sums = relevant[method][picture]
                turn = np.argsort(np.lexsort((shuffled, sums if order == ORDERS[1] else -sums)))
            batch[i] = images[picture]
            np.copyto(batch[i][self.grid.window], noise, where=self.grid.pixels(turn <= step))
        return batch

    def _noise(self, rng: np.random.Generator, image: Array) -> Array:
        """(C, height, width) of the window."""
        low, high = self.model.graph.box or (image.min((1, 2)), image.max((1, 2)))
        shape = image[self.grid.window].shape
        return rng.uniform(low[:, None, None], high[:, None, None], shape).astype(np.float32)


def _edges(images: Array) -> Array:
    """(N, 1, H, W): Sobel's magnitude of the mean of all channels."""
    grey = np.pad(images.mean(1), ((0, 0), (1, 1), (1, 1)), "edge")
    across, down = grey[:, :, 2:] - grey[:, :, :-2], grey[:, 2:] - grey[:, :-2]
    horizontal = across[:, :-2] + 2 * across[:, 1:-1] + across[:, 2:]
    vertical = down[:, :, :-2] + 2 * down[:, :, 1:-1] + down[:, :, 2:]
    return np.asarray(np.hypot(horizontal, vertical)[:, None])
