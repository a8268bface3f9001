"""Sets of images: read, explained, drawn and written, with bounded memory and nothing lost when a run is cut off.

Threads take batches, each from its files to what is stored of it, so that no processor waits for another. What they
give back is written in order, into shards (results.py): a shard is whole or not there. The same call again keeps the
shards that are there and makes the others.
"""

from __future__ import annotations

import contextlib
import csv
import errno
import functools
import hashlib
import itertools
import math
import os
import tempfile
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, wait
from dataclasses import asdict, dataclass, field
from dataclasses import replace as replace_fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from fastdtd import heatmap, images, model_file, results, sources
from fastdtd.errors import InputError, OutputError, PictureError, shown
from fastdtd.explainer import MAX_THREADS, Explainer
from fastdtd.files import FolderLock, HeldError, remove_abandoned, replace, replacing
from fastdtd.graph import Array
from fastdtd.inputs import BeyondFloat32Error, ExplanationWarning, Target, checked_targets
from fastdtd.model import Model
from fastdtd.results import Head, ShardWriter, Storage, read_head, shard_path
from fastdtd.sources import Entry
from fastdtd.threads import Task, Threads

OUTPUTS = ("heatmap", "overlay", "relevance")
SHARD = 64  # images of a shard, unless there would be more than results.MAX_SHARDS
DRAWN = 100  # images of which heatmaps and overlays are drawn, unless it is said
STAGES = ("read", "prepare", "explain", "draw", "store", "write")
_BATCH = 16  # of processors; GPUs take more
_AHEAD = 2  # batches for each thread, being made or waiting to be written
_MODEL = "model.h5"  # in the output folder, for the processes of an executor
# What can be wrong with one output's name or place, while others can be written.
_OF_ONE_NAME = {errno.EACCES, errno.EEXIST, errno.EILSEQ, errno.EINVAL, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG,
                errno.ENOTDIR, errno.ENOTEMPTY, errno.EPERM}
_STORAGE = Storage()
_DRAWINGS = r"\.heatmap\.png|\.overlay\.png"


class AnotherRunError(OutputError):
    """The output folder holds another run."""


@dataclass(frozen=True)
class Line:
    """What is said of one explanation."""

    name: str
    target: int
    class_name: str
    score: float
    relevance: float
    absorbed: float
    ledger: dict[str, float]  # by layer, what it absorbed
    flow: dict[str, float]  # by layer, what came to it; empty where that was not asked for


@dataclass
class Summary:
    """What became of a run.

    explained, done_before : images
    failed : path and reason of each image that was not explained
    clipped : the first warning of values beyond the model's box
    seconds : by stage, of one thread, for the images of this call
    elapsed : seconds
    """

    explained: int = 0
    done_before: int = 0
    failed: list[tuple[Path, str]] = field(default_factory=list)
    clipped: str | None = None
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STAGES, 0.0))
    elapsed: float = 0.0


@dataclass(frozen=True)
class Settings:
    """What is done with each image: all that must be the same for a run to go on.

    targets : outputs to explain of each image, or what follows says which
    top : so many of the highest scores
    true_label : the class that the source says
    """

    targets: tuple[int, ...] = ()
    top: int = 1
    true_label: bool = False
    outputs: tuple[str, ...] = OUTPUTS
    draw: int = DRAWN
    storage: Storage = _STORAGE
    draft: bool = False
    flow: bool = False

    @property
    def rows(self) -> int:
        """Of each image."""
        return len(self.targets) or (1 if self.true_label else self.top)


def run(explainer: Explainer, entries: Sequence[Entry], out: Path, target: Target = None,
        outputs: Iterable[str] = OUTPUTS, batch: int | None = None, on_line: Callable[[Line], Any] = lambda line: None,
        on_progress: Callable[[int], Any] = lambda count: None, flow: bool = False, *, top: int = 1,
        true_label: bool = False, workers: int | None = None, draw: int | None = DRAWN, storage: Storage = _STORAGE,
        draft: bool = False, shard: int | None = None, retry_failed: bool = False, executor: Executor | None = None,
        on_failed: Callable[[int], Any] = lambda count: None) -> Summary:
    """Explain every image of a set and write the results to `out`.

    Parameters
    ----------
    explainer : Explainer
        With one thread it is called by all workers at once, which keeps all processors busy; one with more threads is
        for few images.
    entries : list of Entry
        From `sources.find`.
    out : Path
        Made where it does not exist. docs/howto-many-pictures.md says what it gets.
    target : int, str, or sequence of these, optional
        Outputs to explain of all images, one or several. None: what `top` and `true_label` say.
    outputs : some of "heatmap", "overlay", "relevance"
        What to write beside scores: drawings, and the relevance itself.
    batch : int, optional
        Images that a worker takes at a time. None: 16, or as many as GPUs take at once.
    on_line, on_progress : callable
        Told of each explanation that is on disk, those of before first, and of each batch how many images it settled.
    flow : bool
        Whether what came to each layer is kept, which takes a second pass.
    top : int
        How many of the highest scores to explain of each image.
    true_label : bool
        Explain the class that the source says; an image without one fails.
    workers : int, optional
        Threads that read, explain and draw. None: the explainer's number.
    draw : int or None
        How many images, the first ones, get drawings; None: all.
    storage : Storage
        How relevance is stored.
    draft : bool
        Scale JPEGs while they are decoded, which is faster and gives somewhat other pixels.
    shard : int, optional
        Images of a shard: what is lost if the run is cut off. None: 64, or more where there would be 500 shards.
    retry_failed : bool
        Make shards again that have images which failed.
    executor : concurrent.futures.Executor, optional
        Takes a shard as a task, in processes that see `out` and the source by the same paths. None: threads of this
        process.
    on_failed : callable
        Told how many images have failed so far.

    Returns
    -------
    Summary
        Images that could not be read, explained or drawn are listed there; the others are explained.

    Raises
    ------
    OutputError
        `out` cannot be written, another run is writing to it, or it holds another one.
    InputError
        An unknown target or output, or another argument of no use.
    """
    settings = _settings(explainer, target, outputs, flow, top, true_label, len(entries) if draw is None else draw,
                         storage, draft)
    for name, value, most in (("batch", batch, math.inf), ("number of threads", workers, MAX_THREADS),
                              ("shard", shard, math.inf)):
        if value is not None:
            _require_count(name, value, 1, most)
    if batch is None:
        batch = max(_BATCH, explainer.at_once) if explainer.precision else _BATCH
    size = max(shard or SHARD, -(-len(entries) // results.MAX_SHARDS))
    with _locked(out) as lock:
        return _Run(explainer, entries, out, lock, settings, size, batch, workers or explainer.threads).go(
            on_line, on_progress, on_failed, retry_failed, executor)


def _settings(explainer: Explainer, target: Target, outputs: Iterable[str], flow: bool, top: int, true_label: bool,
              draw: int, storage: Storage, draft: bool) -> Settings:
    outputs = list(outputs)
    if not outputs or any(one not in OUTPUTS for one in outputs):
        raise InputError(
            f"outputs {', '.join(map(shown, outputs)) or 'none'} given; required: some of {', '.join(OUTPUTS)}")
    if storage.dtype not in results.DTYPES:
        raise InputError(f"relevance is to be stored as {shown(storage.dtype)}; required: one of "
                         f"{', '.join(results.DTYPES)}")
    if storage.compression not in (None, *results.COMPRESSIONS):
        raise InputError(f"compression is {shown(storage.compression)}; required: one of "
                         f"{', '.join(results.COMPRESSIONS)}, or None")
    graph = explainer.model.graph
    count = graph.shapes[graph.output][0]
    _require_count("top", top, 1, count)
    _require_count("draw", draw, 0)
    if (target is not None) + true_label + (top > 1) > 1:
        raise InputError("of target, true_label and top, several were given; required: one of them")
    is_many = isinstance(target, (Sequence, np.ndarray)) and not isinstance(target, (str, bytes, bytearray))
    given: Any = target if is_many else [] if target is None else [target]
    indices = checked_targets(list(given), explainer.model, len(given), count) if len(given) else None
    return Settings(() if indices is None else tuple(indices.tolist()), top, true_label, tuple(sorted(set(outputs))),
                    draw if {"heatmap", "overlay"} & set(outputs) else 0, storage, draft, flow)


def _require_count(name: str, value: int, least: int, most: float = math.inf) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or not least <= value <= most:
        upper = f" to {most}" if most < math.inf else ""
        raise InputError(f"{name} is {shown(value)}; required: a whole number from {least}{upper}")


# ---- Batches ---------------------------------------------------------------------------------------------------------


@dataclass
class _Batch:
    """Images on their way from files to rows; numbers are those in the set."""

    numbers: range
    columns: dict[str, npt.NDArray[Any]] = field(default_factory=dict)
    failed: list[tuple[int, str, str]] = field(default_factory=list)  # number, name, reason
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STAGES, 0.0))
    task: Task | None = None

    @contextlib.contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        begun = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] += time.perf_counter() - begun


@dataclass(frozen=True, eq=False)
class _Loaded:
    number: int
    entry: Entry
    label: int
    values: Array
    shown: Image.Image | None


class _Maker:
    """Makes batches: what a worker does."""

    def __init__(self, explainer: Explainer, entries: Sequence[Entry], first: int, out: Path, settings: Settings
                 ) -> None:
        self.explainer, self.out, self.settings = explainer, out, settings
        self._entries, self._first = entries, first
        self.layers: tuple[str, ...] = ()  # of the ledger, once something was explained
        self.is_stopped = False

    def entry(self, number: int) -> Entry:
        return self._entries[number - self._first]

    def make(self, batch: _Batch) -> None:
        loaded = []
        for number in batch.numbers:
            if self.is_stopped:
                return
            try:
                loaded.append(self._load(number, batch))
            except PictureError as error:
                self._fail(batch, number, str(error))
        parts: list[dict[str, npt.NDArray[Any]]] = []
        while loaded and not parts:
            try:
                with batch.timed("explain"):
                    parts = self._explain(loaded)
            except BeyondFloat32Error as error:
                for i, reason in error.reasons.items():
                    self._fail(batch, loaded[i].number, f"picture {loaded[i].entry.path!r} {reason}")
                loaded = [one for i, one in enumerate(loaded) if i not in error.reasons]
        if not parts:
            return
        with batch.timed("draw"):
            troubles = [self._draw(one, parts[0]["attribution"][i]) for i, one in enumerate(loaded)]
        with batch.timed("store"):
            if "relevance" in self.settings.outputs:
                for part in parts:
                    part["attribution"], part["scale"] = self.settings.storage.stored(part["attribution"])
                    if part["attribution"].dtype.kind == "f":
                        for i in np.flatnonzero(~np.isfinite(part["attribution"]).all((1, 2, 3))).tolist():
                            troubles[i] = troubles[i] or "has relevance beyond float16; required: float32 or int8"
            else:
                for part in parts:
                    del part["attribution"]
            kept = [i for i, trouble in enumerate(troubles) if not trouble]
            for one, trouble in zip(loaded, troubles, strict=True):
                if trouble:
                    self._fail(batch, one.number, f"picture {one.entry.path!r} {trouble}")
            if kept:
                batch.columns = self._rows(loaded, parts, kept)

    def _load(self, number: int, batch: _Batch) -> _Loaded:
        entry, model = self.entry(number), self.explainer.model
        height, width = model.graph.input_shape[1:]
        label = _label(entry, self.explainer, self.settings.true_label)
        with batch.timed("read"):
            image = sources.open_image(entry, (width, height) if self.settings.draft else None)
        with batch.timed("prepare"):
            seen = images.seen_by_network(image, (height, width), model.preprocessing.resize, heatmap.MAX_SIDE) if (
                "overlay" in self.settings.outputs and number < self.settings.draw) else None
            return _Loaded(number, entry, label, model.preprocess(image), seen)

    def _explain(self, loaded: Sequence[_Loaded]) -> list[dict[str, npt.NDArray[Any]]]:
        """Columns for each rank of targets."""
        pixels, settings = np.stack([one.values for one in loaded]), self.settings
        labels = np.array([one.label for one in loaded], np.int64)
        first = self.explainer(pixels, labels if settings.true_label else list(settings.targets[:1]) * len(loaded)
                               if settings.targets else None)
        made = [first]
        if settings.targets:
            made += [self.explainer(pixels, target) for target in settings.targets[1:]]
        elif settings.top > 1:
            order = np.argsort(-np.asarray(first.output), 1, kind="stable")
            made += [self.explainer(pixels, order[:, rank]) for rank in range(1, settings.top)]
        parts = []
        for rank, e in enumerate(made):
            columns = e.columns()
            columns["attribution"], columns["prediction"] = columns.pop("relevance"), columns.pop("scores")
            columns["label"], columns["rank"] = labels, np.full(len(loaded), rank, np.int64)
            columns["score"] = np.take_along_axis(columns["prediction"], columns["target"][:, None], 1)[:, 0]
            columns["ledger"] = np.stack([*e.ledger.values()], 1) if e.ledger else np.zeros((len(loaded), 0))
            self.layers = tuple(e.ledger)
            if settings.flow:
                columns["flow"] = np.stack([*e.flow().values()], 1) if e.ledger else columns["ledger"]
            parts.append(columns)
        return parts

    def _rows(self, loaded: Sequence[_Loaded], parts: Sequence[Mapping[str, npt.NDArray[Any]]], kept: Sequence[int]
              ) -> dict[str, npt.NDArray[Any]]:
        """All ranks of an image after one another."""
        columns = {"image": np.repeat([loaded[i].number for i in kept], len(parts)),
                   "file": np.repeat(np.array([loaded[i].entry.name for i in kept], object), len(parts))}
        for name, values in parts[0].items():
            if len(parts) == 1 and len(kept) == len(loaded):
                columns[name] = values  # which copies nothing
            else:
                columns[name] = np.stack([part[name][kept] for part in parts], 1).reshape(-1, *values.shape[1:])
        return columns

    def _fail(self, batch: _Batch, number: int, reason: str) -> None:
        batch.failed.append((number, self.entry(number).name, reason))

    def _draw(self, one: _Loaded, relevance: Array) -> str:
        """Write an image's drawings; returns why they alone cannot be written, where that is so."""
        if one.number >= self.settings.draw:
            return ""
        path = self.out / one.entry.name
        kinds = {"heatmap": None, "overlay": one.shown}
        try:
            for folder in reversed(path.relative_to(self.out).parents[:-1]):  # `out` itself is not made again
                (self.out / folder).mkdir(exist_ok=True)
            for kind in self.settings.outputs:
                if kind in kinds:
                    replace(path.with_name(f"{path.name}.{kind}.png"),
                            functools.partial(heatmap.write, relevance=relevance, picture=kinds[kind]))
        except OSError as error:
            with _writing(self.out):
                if error.errno not in _OF_ONE_NAME:
                    raise
                _require_writable(self.out)
            return f"cannot be drawn to {error.filename2 or error.filename!r}: {error.strerror}"
        return ""


def _label(entry: Entry, explainer: Explainer, is_needed: bool) -> int:
    """The number of an image's true class; -1 where it has none that the model knows."""
    try:
        given: int | str = int(entry.label) if entry.label.isdecimal() else entry.label
        if entry.label:
            graph = explainer.model.graph
            [label] = checked_targets(given, explainer.model, 1, graph.shapes[graph.output][0])  # type: ignore[misc]
            return int(label)
        trouble = "has no label, which the target was to be"
    except InputError as error:
        trouble = f"has a label that is no class: {error}"
    if is_needed:
        raise PictureError(f"picture {entry.path!r} {trouble}")
    return -1


# ---- Shards ----------------------------------------------------------------------------------------------------------


def _write_shard(maker: _Maker, batches: Iterator[_Batch], place: Path, numbers: range,
                 on_progress: Callable[[int], Any], seconds: dict[str, float]
                 ) -> tuple[Head, list[tuple[int, str, str]]]:
    """Write the next shard: batches come in order."""
    failed: list[tuple[int, str, str]] = []
    settings, graph = maker.settings, maker.explainer.model.graph
    rows = len(numbers) * settings.rows
    per_row = 4 * graph.shapes[graph.output][0] + 16 * len(graph.layers) + 4096
    with replacing(place) as beside:
        keeps = "relevance" in settings.outputs
        writer = ShardWriter(beside, settings.storage, graph.input_shape, rows if keeps else 0, per_row)
        try:
            left = len(numbers)
            while left:
                batch = next(batches)
                left -= len(batch.numbers)
                with batch.timed("write"):
                    if batch.columns:
                        writer.add(batch.columns)
                failed += batch.failed
                for stage, spent in batch.seconds.items():
                    seconds[stage] += spent
                on_progress(len(batch.numbers))
            begun = time.perf_counter()
            head = writer.finish(failed, maker.layers)
            seconds["write"] += time.perf_counter() - begun
        finally:
            writer.close()
    return head, failed


class _Run:
    """A run over `entries` into `out`, which it has for itself."""

    def __init__(self, explainer: Explainer, entries: Sequence[Entry], out: Path, lock: FolderLock, settings: Settings,
                 shard: int, batch: int, workers: int) -> None:
        self.entries, self.out, self.lock, self.settings = entries, out, lock, settings
        self.explainer, self.batch, self.workers, self.shard = explainer, batch, workers, shard
        self.summary = Summary()
        self.shards = [range(first, min(first + shard, len(entries))) for first in range(0, len(entries), shard)]
        self.heads: list[Head | None] = [None] * len(self.shards)

    def go(self, on_line: Callable[[Line], Any], on_progress: Callable[[int], Any], on_failed: Callable[[int], Any],
           retry_failed: bool, executor: Executor | None) -> Summary:
        begun = time.perf_counter()
        manifest = _manifest(self.explainer, self.entries, self.settings, self.shard)
        self._begin(manifest)
        for number in range(len(self.shards)):
            head = read_head(shard_path(self.out, number))
            if head is not None and not (retry_failed and head.failed):
                self.heads[number] = head
        todo = [number for number, head in enumerate(self.heads) if head is None]
        self.summary.done_before = sum(len(self.shards[number]) - head.failed for number, head in enumerate(self.heads)
                                       if head is not None)
        before = sum(len(self.shards[number]) for number, head in enumerate(self.heads) if head is not None)
        on_progress(before)
        failed: dict[int, tuple[int, str, str]] = {}
        for number, head in enumerate(self.heads):
            if head is not None:
                failed |= {one[0]: one for one in (_failed_before(shard_path(self.out, number)) if head.failed else ())}
                self._tell(number, head, on_line)
        # Warnings are recorded out here, around all threads: which are shown and which are not is a setting of the
        # whole process.
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always", ExplanationWarning)
            try:
                made = self._made_here if executor is None else functools.partial(self._made_by, executor)
                for number, head, of_shard in made(todo, on_progress):
                    self.heads[number] = head
                    failed |= {one[0]: one for one in of_shard}
                    if failed:
                        on_failed(len(failed))
                    self.summary.explained += len(self.shards[number]) - len(of_shard)
                    self._tell(number, head, on_line)
            finally:
                self.summary.failed = [(Path(self.entries[number].path), reason)
                                       for number, _, reason in sorted(failed.values())]
        self.summary.clipped = next((str(w.message) for w in told if "clipped" in str(w.message)), None)
        with self._writing():
            remove_abandoned(self.out / results.SHARDS, results.WRITTEN)  # of an executor's processes that were killed
            results.join(self.out, manifest, [head for head in self.heads if head is not None],
                         {"classes": list(self.explainer.model.classes)} if self.explainer.model.classes else {})
        self.summary.elapsed = time.perf_counter() - begun
        return self.summary

    def _tell(self, number: int, head: Head, on_line: Callable[[Line], Any]) -> None:
        for line in _lines(shard_path(self.out, number), self.explainer.model) if head.rows else ():
            on_line(line)

    def _begin(self, manifest: dict[str, Any]) -> None:
        """Make sure that `out` is this run's, or is to be."""
        found = results.read_manifest(self.out)
        if found is not None and (changed := results.difference(manifest, found)):
            if changed.startswith("images"):
                changed = f"{changed}{self._first_difference()}"
            raise AnotherRunError(
                f"{str(self.out)!r} holds another run: {changed}; choose another folder, or remove that one")
        with _writing(self.out):
            (self.out / results.SHARDS).mkdir(exist_ok=True)
            for folder in {self.out, self.out / results.SHARDS,
                           *((self.out / entry.name).parent for entry in self.entries[:self.settings.draw])}:
                remove_abandoned(folder, f"{results.WRITTEN}|{_DRAWINGS}")
            if found is None:
                if any((self.out / results.SHARDS).iterdir()):
                    raise OutputError(f"{str(self.out / results.SHARDS)!r} has files, and no manifest says whose; "
                                      "choose another folder, or remove them")
                replace(self.out / results.SET, self._write_set)
                results.write_manifest(self.out, manifest)

    def _write_set(self, path: Path) -> None:
        with open(path, "w", newline="", encoding="utf-8", errors="backslashreplace") as file:
            table = csv.writer(file, lineterminator="\n")
            table.writerow(results.SET_COLUMNS)
            table.writerows((number, entry.name, entry.label, os.path.abspath(entry.path), entry.member, entry.size,
                             entry.dataset) for number, entry in enumerate(self.entries))

    def _first_difference(self) -> str:
        """Between the images of then and those of now."""
        with contextlib.suppress(OSError, ValueError), open(
                self.out / results.SET, newline="", encoding="utf-8", errors="backslashreplace") as file:
            table = csv.reader(file)
            next(table)
            for number, (row, entry) in enumerate(itertools.zip_longest(table, self.entries)):
                then = "none" if row is None else repr(row[1])
                now = "none" if entry is None else repr(entry.name)
                if row is None or entry is None or row[1:3] != [entry.name, entry.label]:
                    return f" (the first that differs is image {number}: it was {then}, and is {now})"
        return ""

    def _made_here(self, todo: Sequence[int], on_progress: Callable[[int], Any]
                   ) -> Iterator[tuple[int, Head, list[tuple[int, str, str]]]]:
        """Shards, one after the other; threads make batches of those that follow meanwhile."""
        maker = _Maker(self.explainer, self.entries, 0, self.out, self.settings)
        threads = Threads(self.workers)
        waiting = iter([_Batch(numbers) for number in todo for numbers in _split(self.shards[number], self.batch)])
        started: deque[_Batch] = deque()

        def batches() -> Iterator[_Batch]:
            while True:
                for batch in itertools.islice(waiting, _AHEAD * self.workers - len(started)):
                    started.append(batch)
                    batch.task = threads.submit(maker.make, batch)
                if not started:
                    return
                batch = started.popleft()
                assert batch.task is not None
                batch.task.result()
                yield batch

        coming = batches()
        try:
            for number in todo:
                with self._writing():
                    head, failed = _write_shard(maker, coming, shard_path(self.out, number), self.shards[number],
                                                on_progress, self.summary.seconds)
                yield number, head, failed
        finally:
            maker.is_stopped = True
            threads.join()

    def _made_by(self, executor: Executor, todo: Sequence[int], on_progress: Callable[[int], Any]
                 ) -> Iterator[tuple[int, Head, list[tuple[int, str, str]]]]:
        """Shards in the order in which an executor's processes make them; a few more than it has threads are given to
        it at a time."""
        with self._writing():
            replace(self.out / _MODEL, lambda path: model_file.save(self.explainer.model, path))
        arguments = self.explainer.__reduce__()[1][1:]
        waiting = iter(todo)
        running: dict[Future[Any], int] = {}
        try:
            while True:
                for number in itertools.islice(waiting, 4 * self.workers - len(running)):
                    numbers = self.shards[number]
                    entries = tuple(replace_fields(entry, path=os.path.abspath(entry.path))
                                    for entry in self.entries[numbers.start:numbers.stop])
                    job = Job(str(self.out.resolve()), number, numbers, entries, self.settings, self.batch, arguments)
                    running[executor.submit(make_shard, job)] = number
                if not running:
                    return
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    number = running.pop(future)
                    head, failed, seconds = future.result()
                    for stage, spent in seconds.items():
                        self.summary.seconds[stage] += spent
                    on_progress(len(self.shards[number]))
                    yield number, head, failed
        finally:
            for future in running:
                future.cancel()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Writing what all of the run depends on."""
        if not self.lock.is_held():
            raise OutputError(
                f"{str(self.out)!r} was removed or replaced while a run wrote to it; start the run again")
        with _writing(self.out):
            yield


def _split(numbers: range, size: int) -> Iterator[range]:
    return (numbers[first:first + size] for first in range(0, len(numbers), size))


def _failed_before(path: Path) -> list[tuple[int, str, str]]:
    columns = results.read_columns(path, ("failed_image", "failed_file", "failed_reason"))
    return list(zip(*(values.tolist() for values in columns.values()), strict=True))


def _lines(path: Path, model: Model) -> Iterator[Line]:
    """What is said of a shard's rows."""
    columns, layers = results.read_columns(path), results.ledger_layers(path)
    for row in range(len(columns["image"])):
        target = int(columns["target"][row])
        ledgers = [dict(zip(layers, columns[name][row].tolist(), strict=True)) if name in columns else {}
                   for name in ("ledger", "flow")]
        yield Line(str(columns["file"][row]), target, model.class_name(target), float(columns["score"][row]),
                   float(columns["sum"][row]), float(columns["absorbed"][row]), *ledgers)


# ---- Shards as tasks of other processes ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """A shard to be made, by a process that sees `out` and the source; all of it can be pickled."""

    out: str
    number: int
    numbers: range
    entries: tuple[Entry, ...]
    settings: Settings
    batch: int
    arguments: tuple[Any, ...]  # of the Explainer, behind the model


_explainers: dict[tuple[Any, ...], Explainer] = {}
_explainers_lock = threading.Lock()


def make_shard(job: Job) -> tuple[Head, list[tuple[int, str, str]], dict[str, float]]:
    """Make a shard, in the thread that calls. Returns what it says of itself, what failed, and seconds by stage."""
    out = Path(job.out)
    rules, device, _, *others = job.arguments
    stat = os.stat(out / _MODEL)
    key = job.out, stat.st_mtime_ns, stat.st_size, repr(job.arguments)
    with _explainers_lock:
        if key not in _explainers:
            _explainers.clear()
            _explainers[key] = Explainer(model_file.load(out / _MODEL), rules, device, 1, *others)
        explainer = _explainers[key]
    maker = _Maker(explainer, job.entries, job.numbers.start, out, job.settings)

    def batches() -> Iterator[_Batch]:
        for numbers in _split(job.numbers, job.batch):
            batch = _Batch(numbers)
            maker.make(batch)
            yield batch

    seconds = dict.fromkeys(STAGES, 0.0)
    head, failed = _write_shard(maker, batches(), shard_path(out, job.number), job.numbers, lambda count: None, seconds)
    return head, failed, seconds


# ---- Files -----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _writing(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"cannot write to {str(out)!r}: {error.strerror or error}; required: a folder that can be written and has "
            "free space. Nothing that was reported as done is lost") from None


@contextlib.contextmanager
def _locked(out: Path) -> Iterator[FolderLock]:
    """The folder `out`, made where it does not exist, for this run alone."""
    try:
        with _writing(out):
            out.mkdir(parents=True, exist_ok=True)
            _require_writable(out)
            lock = FolderLock(out)
    except HeldError as holder:
        raise OutputError(
            f"another run is writing to {str(out)!r}: {holder}; wait until it has finished, end it, or choose another "
            "folder") from None
    with lock:
        yield lock


def _require_writable(out: Path) -> None:
    """Better to know now than after an hour."""
    with tempfile.TemporaryFile(dir=out):
        pass


def _manifest(explainer: Explainer, entries: Sequence[Entry], settings: Settings, shard: int) -> dict[str, Any]:
    """All that must be the same for two calls to be the same. Processors, whose precision is "", and GPUs differ in the
    last bits, GPUs among themselves by their precision."""
    from fastdtd import __version__

    graph, p = explainer.model.graph, explainer.model.preprocessing
    weights, images_of = hashlib.sha256(repr(graph.input_shape).encode()), hashlib.sha256()
    for value in (*(graph.box or ()), *(value for layer in graph for value in (type(layer), *vars(layer).values()))):
        weights.update(value.tobytes() if isinstance(value, np.ndarray) else repr(value).encode())
    for entry in entries:
        images_of.update(repr((os.path.abspath(entry.path), entry.name, entry.label, entry.member, entry.size,
                               entry.dataset)).encode())
    return {
        "format": "fastdtd-run", "version": results.VERSION, "fastdtd": __version__,
        "model": {"sha256": weights.hexdigest(), "input": list(graph.input_shape),
                  "outputs": graph.shapes[graph.output][0]},
        "rules": {name: str(rule.rule) for name, rule in explainer.rules.items()},
        "preprocessing": {name: np.asarray(value).tolist() for name, value in vars(p).items()},
        "precision": explainer.precision, "conserves": explainer.conserves,
        "target": list(settings.targets) or ("true label" if settings.true_label else f"top {settings.top}"),
        "outputs": list(settings.outputs), "draw": settings.draw, "draft": settings.draft, "flow": settings.flow,
        "storage": asdict(settings.storage) if "relevance" in settings.outputs else None,
        "images": {"count": len(entries), "sha256": images_of.hexdigest()}, "shard": shard,
        "shards": -(-len(entries) // shard),
    }
