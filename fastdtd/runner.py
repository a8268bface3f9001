"""Sets of images: read, explained, drawn and written, with bounded memory and nothing lost when a run is cut off.

Threads take batches, each from its files to what is stored of it, so that no processor waits for another. What they
give back is written in order, into shards (results.py): a shard is whole or not there. The same call again keeps the
shards that are there and makes the others.
"""

from __future__ import annotations

import contextlib
import csv
import functools
import hashlib
import itertools
import math
import os
import sys
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

from fastdtd import model_file, results
from fastdtd.cost import cost
from fastdtd.errors import InputError, OutputError, shown
from fastdtd.explainer import MAX_THREADS, Explainer
from fastdtd.files import FolderLock, HeldError, remove_abandoned, replace
from fastdtd.inputs import (
    Against,
    ExplanationWarning,
    MapTarget,
    against_text,
    checked_against,
    checked_places,
    checked_targets,
    checked_through,
)
from fastdtd.model import Model
from fastdtd.results import Head, Storage, read_head, shard_path
from fastdtd.shards import (
    DRAWN,
    MODEL,
    OUTPUTS,
    STAGES,
    STORAGE,
    Batch,
    Job,
    Maker,
    Settings,
    make_shard,
    require_writable,
    split,
    write_shard,
    writing,
)
from fastdtd.sources import Entry
from fastdtd.threads import Task, Threads

SHARD = 64  # images of a shard, unless there would be more than results.MAX_SHARDS
_BATCH = 16  # of processors; GPUs take more
_BATCH_BYTES = 2**26  # of activations, beyond which a processor's caches do not help: then batches are smaller
_AHEAD = 2  # batches for each thread, being made or waiting to be written
_DRAWINGS = r"\.heatmap\.png|\.overlay\.png"


class AnotherRunError(OutputError):
    """The output folder holds another run."""


@dataclass(frozen=True)
class Line:
    """What is said of one explanation."""

    name: str
    target: int
    class_name: str
    against: str  # what the target is held against; "" where nothing is
    score: float
    explained: float
    relevance: float
    absorbed: float
    ledger: dict[str, float]  # by layer, what it absorbed
    flow: dict[str, float]  # by layer, what came to it; empty where that was not asked for
    place: str = ""  # of maps, where in the map it is explained
    cut: float = 0.0  # relevance that went through other channels than those asked for


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


def run(explainer: Explainer, entries: Sequence[Entry], out: Path, target: MapTarget = None,
        outputs: Iterable[str] = OUTPUTS, batch: int | None = None, on_line: Callable[[Line], Any] = lambda line: None,
        on_progress: Callable[[int], Any] = lambda count: None, flow: bool = False, *, top: int = 1,
        true_label: bool = False, workers: int | None = None, draw: int | None = DRAWN, storage: Storage = STORAGE,
        draft: bool = False, shard: int | None = None, retry_failed: bool = False, executor: Executor | None = None,
        on_failed: Callable[[int], Any] = lambda count: None, against: Against = None,
        through: Mapping[str, int | Sequence[int]] | None = None) -> Summary:
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
    target : int, str, tuple, or list of these, optional
        Outputs to explain of all images, one or several. None: what `top` and `true_label` say. Of maps, (channel, y,
        x) or (channel, "max"), as an `Explainer` takes them; no masks.
    outputs : some of "heatmap", "overlay", "relevance"
        What to write beside scores: drawings, and the relevance itself.
    batch : int, optional
        Images that a worker takes at a time. None: 2 to 16, the fewer the larger the network, or as many as GPUs take
        at once.
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
    against : int, str, or sequence of these, optional
        What the targets are held against, as an `Explainer` takes it.
    through : mapping from str to int or sequence of int, optional
        Layers, and the channels of them that alone pass relevance on. The rest is the column "cut".

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
                         storage, draft, against, through)
    for name, value, most in (("batch", batch, math.inf), ("number of threads", workers, MAX_THREADS),
                              ("shard", shard, math.inf)):
        if value is not None:
            _require_count(name, value, 1, most)
    if batch is None:
        small = max(2, min(_BATCH, _BATCH_BYTES // cost(explainer.model.graph).activation_bytes))
        batch = max(_BATCH, explainer.at_once) if explainer.precision else small
    size = max(shard or SHARD, -(-len(entries) // results.MAX_SHARDS))
    with _locked(out) as lock:
        return _Run(explainer, entries, out, lock, settings, size, batch, workers or explainer.threads).go(
            on_line, on_progress, on_failed, retry_failed, executor)


def _settings(explainer: Explainer, target: MapTarget, outputs: Iterable[str], flow: bool, top: int, true_label: bool,
              draw: int, storage: Storage, draft: bool, against: Against,
              through: Mapping[str, int | Sequence[int]] | None) -> Settings:
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
    if isinstance(storage.keep, bool) or not isinstance(storage.keep, (int, float)) or not 0 < storage.keep <= 1:
        raise InputError(f"of relevance {shown(storage.keep)} is to be kept; required: a share above 0, up to 1")
    graph = explainer.model.graph
    is_of_maps = graph.has_maps
    _require_count("top", top, 1, 1 if is_of_maps else graph.outputs)  # the next scores of a map lie beside the highest
    _require_count("draw", draw, 0)
    if (target is not None) + true_label + (top > 1) > 1:
        raise InputError("of target, true_label and top, several were given; required: one of them")
    is_many = isinstance(target, (Sequence, np.ndarray)) and not isinstance(target, (str, bytes, bytearray)) and not (
        is_of_maps and isinstance(target, tuple))
    given: Any = list(target) if is_many else [] if target is None else [target]  # type: ignore[arg-type]  # is_many says so
    targets: list[int | tuple[Any, ...]] = []
    if given and is_of_maps:
        channels, places = checked_places(given, explainer.model, len(given))
        assert channels is not None
        assert places is not None
        if any(isinstance(place, np.ndarray) for place in places):
            raise InputError('a target has a mask; required: (channel, y, x), (channel, "max") or a channel, for the '
                             "settings of a run are kept as text")
        targets += [channel if place is None else (channel, place) if isinstance(place, str) else (channel, *place)
                    for channel, place in zip(channels.tolist(), places, strict=True)]
    elif given:
        targets += checked_targets(given, explainer.model, len(given)).tolist()  # type: ignore[union-attr]  # some are given
    return Settings(tuple(targets), top, true_label,
                    checked_against(against, explainer.model, explainer.conserves),
                    checked_through(through, explainer.model, explainer.conserves), tuple(sorted(set(outputs))),
                    draw if {"heatmap", "overlay"} & set(outputs) else 0, storage, draft, flow)


def _require_count(name: str, value: int, least: int, most: float = math.inf) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or not least <= value <= most:
        upper = f" to {most}" if most < math.inf else ""
        raise InputError(f"{name} is {shown(value)}; required: a whole number from {least}{upper}")


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
        failed: dict[int, tuple[int, str, str]] = {}
        before = 0
        for number, numbers in enumerate(self.shards):
            head = read_head(shard_path(self.out, number))
            if head is None or (retry_failed and head.failed):
                continue
            self.heads[number] = head
            before += len(numbers)
            self.summary.done_before += len(numbers) - head.failed
            if head.failed:
                failed |= {one[0]: one for one in results.read_failed(shard_path(self.out, number))}
            self._tell(number, head, on_line)
        on_progress(before)
        todo = [number for number, head in enumerate(self.heads) if head is None]
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
                         self.explainer.model.classes)
        self.summary.elapsed = time.perf_counter() - begun
        return self.summary

    def _tell(self, number: int, head: Head, on_line: Callable[[Line], Any]) -> None:
        if head.rows:
            for line in _lines(shard_path(self.out, number), self.explainer.model, self.settings):
                on_line(line)

    def _begin(self, manifest: dict[str, Any]) -> None:
        """Make sure that `out` is this run's, or is to be."""
        found = results.read_manifest(self.out)
        if found is not None and (changed := results.difference(manifest, found)):
            if changed.startswith("images"):
                changed = f"{changed}{self._first_difference()}"
            raise AnotherRunError(
                f"{str(self.out)!r} holds another run: {changed}; choose another folder, or remove that one")
        with writing(self.out):
            (self.out / results.SHARDS).mkdir(exist_ok=True)
            for folder in {self.out, self.out / results.SHARDS,
                           *((self.out / entry.name).parent for entry in self.entries[:self.settings.draw])}:
                remove_abandoned(folder, f"{results.WRITTEN}|{_DRAWINGS}")
            if found is None:
                if any((self.out / results.SHARDS).iterdir()):
                    raise OutputError(f"{str(self.out / results.SHARDS)!r} has files, and no manifest says whose; "
                                      "choose another folder, or remove them")
                results.write_set(self.out, self.entries)
                results.write_manifest(self.out, manifest)

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
        maker = Maker(self.explainer, self.entries, 0, self.out, self.settings)
        threads = Threads(self.workers)
        # Made one by one: a list of them would keep what each was filled with.
        waiting = (Batch(numbers) for number in todo for numbers in split(self.shards[number], self.batch))
        started: deque[tuple[Batch, Task]] = deque()

        def batches() -> Iterator[Batch]:
            while True:
                for batch in itertools.islice(waiting, _AHEAD * self.workers - len(started)):
                    started.append((batch, threads.submit(maker.make, batch)))
                if not started:
                    return
                batch, task = started.popleft()
                task.result()
                yield batch

        coming = batches()
        try:
            for number in todo:
                with self._writing():
                    head, failed = write_shard(maker, coming, shard_path(self.out, number), self.shards[number],
                                               on_progress, self.summary.seconds)
                yield number, head, failed
        finally:
            maker.is_stopped = True
            # Who interrupts does not wait for batches that are being made.
            if not isinstance(sys.exc_info()[1], KeyboardInterrupt):
                threads.join()

    def _made_by(self, executor: Executor, todo: Sequence[int], on_progress: Callable[[int], Any]
                 ) -> Iterator[tuple[int, Head, list[tuple[int, str, str]]]]:
        """Shards in the order in which an executor's processes make them; a few more than it has threads are given to
        it at a time."""
        with self._writing():
            replace(self.out / MODEL, lambda path: model_file.save(self.explainer.model, path))
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
        with writing(self.out):
            yield


def _lines(path: Path, model: Model, settings: Settings) -> Iterator[Line]:
    """What is said of a shard's rows."""
    # Not the scores of all classes, which are most of what a shard has beside relevance.
    of_maps = ["place"] if model.graph.has_maps else []
    cut = ["cut"] if settings.through else []
    names = ["file", "target", "score", "explained", "sum", "absorbed", "ledger", *(["flow"] if settings.flow else []),
             *of_maps, *cut]
    columns, layers = results.read_columns(path, names), results.ledger_layers(path)
    against = against_text(settings.against, model)
    for row in range(len(columns["file"])):
        target = int(columns["target"][row])
        ledgers = [dict(zip(layers, columns[name][row].tolist(), strict=True)) if name in columns else {}
                   for name in ("ledger", "flow")]
        yield Line(str(columns["file"][row]), target, model.class_name(target), against, float(columns["score"][row]),
                   float(columns["explained"][row]), float(columns["sum"][row]), float(columns["absorbed"][row]),
                   ledgers[0], ledgers[1], str(columns["place"][row]) if of_maps else "",
                   float(columns["cut"][row]) if cut else 0.0)


# ---- Files -----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _locked(out: Path) -> Iterator[FolderLock]:
    """The folder `out`, made where it does not exist, for this run alone."""
    try:
        with writing(out):
            out.mkdir(parents=True, exist_ok=True)
            require_writable(out)
            lock = FolderLock(out)
    except HeldError as holder:
        raise OutputError(
            f"another run is writing to {str(out)!r}: {holder}; wait until it has finished, end it, or choose another "
            "folder") from None
    with lock:
        yield lock


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
                  "outputs": graph.output_shape[0]},
        "rules": {name: str(rule.rule) for name, rule in explainer.rules.items()},
        "preprocessing": {name: np.asarray(value).tolist() for name, value in vars(p).items()},
        "precision": explainer.precision, "conserves": explainer.conserves,
        "target": [list(one) if isinstance(one, tuple) else one for one in settings.targets] or (
            "true label" if settings.true_label else f"top {settings.top}"),
        "against": against_text(settings.against, explainer.model) or None,
        "through": {name: list(channels) for name, channels in settings.through} or None,
        "outputs": list(settings.outputs), "draw": settings.draw, "draft": settings.draft, "flow": settings.flow,
        "storage": asdict(settings.storage) if "relevance" in settings.outputs else None,
        "images": {"count": len(entries), "sha256": images_of.hexdigest()}, "shard": shard,
        "shards": -(-len(entries) // shard),
    }
