"""Shards of a run, from images to files: what a worker does, in a thread of this process or in one of another."""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from fastdtd import heatmap, images, model_file, sources
from fastdtd.errors import InputError, OutputError, PictureError
from fastdtd.explainer import Explainer
from fastdtd.files import replace, replacing
from fastdtd.graph import Array
from fastdtd.inputs import BeyondFloat32Error, checked_targets
from fastdtd.results import Head, ShardWriter, Storage, shard_path
from fastdtd.schedule import Through
from fastdtd.sources import Entry

OUTPUTS = ("heatmap", "overlay", "relevance")
DRAWN = 100  # images of which heatmaps and overlays are drawn, unless it is said
STAGES = ("read", "prepare", "explain", "draw", "store", "write")
STORAGE = Storage()
MODEL = "model.h5"  # in the output folder, for the processes of an executor
# What can be wrong with one output's name or place, while others can be written.
_OF_ONE_NAME = {errno.EACCES, errno.EEXIST, errno.EILSEQ, errno.EINVAL, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG,
                errno.ENOTDIR, errno.ENOTEMPTY, errno.EPERM}


@dataclass(frozen=True)
class Settings:
    """What is done with each image: all that must be the same for a run to go on.

    targets : outputs to explain of each image, as an Explainer takes them, or what follows says which
    top : so many of the highest scores
    true_label : the class that the source says
    against, through : as fastdtd.question.Question has them
    """

    targets: tuple[int | tuple[Any, ...], ...] = ()
    top: int = 1
    true_label: bool = False
    against: str | tuple[int, ...] | None = None
    through: Through = ()
    outputs: tuple[str, ...] = OUTPUTS
    draw: int = DRAWN
    storage: Storage = STORAGE
    draft: bool = False
    flow: bool = False

    @property
    def rows(self) -> int:
        """Of each image."""
        return len(self.targets) or (1 if self.true_label else self.top)


@dataclass
class Batch:
    """Images on their way from files to rows; numbers are those in the set."""

    numbers: range
    columns: dict[str, npt.NDArray[Any]] = field(default_factory=dict)
    failed: list[tuple[int, str, str]] = field(default_factory=list)  # number, name, reason
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STAGES, 0.0))

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


class Maker:
    """Makes batches: what a worker does."""

    def __init__(self, explainer: Explainer, entries: Sequence[Entry], first: int, out: Path, settings: Settings
                 ) -> None:
        self.explainer, self.out, self.settings = explainer, out, settings
        self._entries, self._first = entries, first
        self.layers: tuple[str, ...] = ()  # of the ledger, once something was explained
        self.is_stopped = False

    def entry(self, number: int) -> Entry:
        return self._entries[number - self._first]

    def make(self, batch: Batch) -> None:
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

    def _load(self, number: int, batch: Batch) -> _Loaded:
        entry, model = self.entry(number), self.explainer.model
        height, width = model.graph.input_shape[1:]
        label = _label(entry, self.explainer, self.settings.true_label)
        with batch.timed("read"):
            image = sources.open_image(entry, (height, width) if self.settings.draft else None)
        with batch.timed("prepare"):
            seen = images.seen_by_network(image, (height, width), model.preprocessing.resize, heatmap.MAX_SIDE) if (
                "overlay" in self.settings.outputs and number < self.settings.draw) else None
            return _Loaded(number, entry, label, model.preprocess(image), seen)

    def _explain(self, loaded: Sequence[_Loaded]) -> list[dict[str, npt.NDArray[Any]]]:
        """Columns for each rank of targets."""
        pixels, settings = np.stack([one.values for one in loaded]), self.settings
        labels = np.array([one.label for one in loaded], np.int64)
        explain = functools.partial(self.explainer, pixels, against=settings.against,
                                    through=dict(settings.through) or None)
        first = explain(labels if settings.true_label else list(settings.targets[:1]) * len(loaded)
                        if settings.targets else None)
        made = [first]
        if settings.targets:
            made += [explain(target) for target in settings.targets[1:]]
        elif settings.top > 1:
            order = np.argsort(-np.asarray(first.output), 1, kind="stable")
            made += [explain(order[:, rank]) for rank in range(1, settings.top)]
        parts = []
        for rank, e in enumerate(made):
            columns = e.columns()
            columns["attribution"], columns["prediction"] = columns.pop("relevance"), columns.pop("scores")
            columns["label"], columns["rank"] = labels, np.full(len(loaded), rank, np.int64)
            columns["score"] = e.score
            if e.region is not None:  # maps would be larger than the relevance
                columns["prediction"] = columns["prediction"].max((2, 3))
                columns["place"] = np.array([e.place(i) for i in range(len(loaded))], object)
            columns["ledger"] = np.stack([*e.ledger.values()], 1) if e.ledger else np.zeros((len(loaded), 0))
            if settings.through:
                columns["cut"] = np.sum([*e.cut.values()], 0)
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

    def _fail(self, batch: Batch, number: int, reason: str) -> None:
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
            with writing(self.out):
                if error.errno not in _OF_ONE_NAME:
                    raise
                require_writable(self.out)
            return f"cannot be drawn to {error.filename2 or error.filename!r}: {error.strerror}"
        return ""


def _label(entry: Entry, explainer: Explainer, is_needed: bool) -> int:
    """The number of an image's true class; -1 where it has none that the model knows."""
    try:
        given: int | str = int(entry.label) if entry.label.isdecimal() else entry.label
        if entry.label:
            [label] = checked_targets(given, explainer.model, 1)  # type: ignore[misc]  # one is given
            return int(label)
        trouble = "has no label, which the target was to be"
    except InputError as error:
        trouble = f"has a label that is no class: {error}"
    if is_needed:
        raise PictureError(f"picture {entry.path!r} {trouble}")
    return -1


# ---- Shards ----------------------------------------------------------------------------------------------------------


def write_shard(maker: Maker, batches: Iterator[Batch], place: Path, numbers: range,
                on_progress: Callable[[int], Any], seconds: dict[str, float]
                ) -> tuple[Head, list[tuple[int, str, str]]]:
    """Write the next shard: batches come in order."""
    failed: list[tuple[int, str, str]] = []
    settings, graph = maker.settings, maker.explainer.model.graph
    rows = len(numbers) * settings.rows
    per_row = 4 * graph.output_shape[0] + 16 * len(graph.layers) + 4096
    with replacing(place) as beside:
        storage = settings.storage if "relevance" in settings.outputs else None
        writer = ShardWriter(beside, storage, graph.input_shape, rows, per_row)
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


def split(numbers: range, size: int) -> Iterator[range]:
    return (numbers[first:first + size] for first in range(0, len(numbers), size))


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
    stat = os.stat(out / MODEL)
    key = job.out, stat.st_mtime_ns, stat.st_size, repr(job.arguments)
    with _explainers_lock:
        if key not in _explainers:
            _explainers.clear()
            _explainers[key] = Explainer(model_file.load(out / MODEL), rules, device, 1, *others)
        explainer = _explainers[key]
    maker = Maker(explainer, job.entries, job.numbers.start, out, job.settings)

    def batches() -> Iterator[Batch]:
        for numbers in split(job.numbers, job.batch):
            batch = Batch(numbers)
            maker.make(batch)
            yield batch

    seconds = dict.fromkeys(STAGES, 0.0)
    head, failed = write_shard(maker, batches(), shard_path(out, job.number), job.numbers, lambda count: None, seconds)
    return head, failed, seconds


@contextlib.contextmanager
def writing(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"cannot write to {str(out)!r}: {error.strerror or error}; required: a folder that can be written and has "
            "free space. Nothing that was reported as done is lost") from None


def require_writable(out: Path) -> None:
    """Better to know now than after an hour."""
    with tempfile.TemporaryFile(dir=out):
        pass
