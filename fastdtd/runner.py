"""Many pictures: read, explain, write, with bounded memory and nothing lost when a run is cut off.

What is done is on disk before it is said to be done: each picture's PNGs, then each batch's numbers as one part file,
all written beside and renamed into place. At the end the parts become `explanations.h5`. A run that was cut off leaves
its parts; the same call goes on from them.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import re
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fastdtd import heatmap, images
from fastdtd.errors import InputError, OutputError, PictureError
from fastdtd.explainer import Explainer
from fastdtd.explanation import write_header
from fastdtd.files import replace
from fastdtd.graph import Array
from fastdtd.inputs import ExplanationWarning, Target

OUTPUTS = ("heatmap", "overlay", "relevance")
RESULT = "explanations.h5"
_PART = "explanations.part-{:06d}.h5"
_PARTS = f"explanations.part-{'[0-9]' * 6}.h5"
_SOURCE = "source"
_SPARE_BYTES = 1 << 20
_BATCH = 16  # of processors; GPUs take more
_DRAWN = (".heatmap.png", ".overlay.png")
_LEFT_BESIDE = re.compile(r"\..*(\.heatmap\.png|\.overlay\.png|explanations.*\.h5)\.[0-9a-f]{32}")  # see files.replace
_UNPRINTABLE = re.compile("[\0-\x1f\x7f-\x9f\ud800-\udfff]")  # the last ones stand for bytes that are no UTF-8


@dataclass(frozen=True)
class Picture:
    """A picture file and the name, relative to the output folder, under which its results go."""

    path: Path
    name: str


@dataclass(frozen=True)
class Line:
    """What is said of one explained picture."""

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
    """What became of a run."""

    explained: int = 0
    done_before: int = 0
    failed: list[tuple[Path, str]] = field(default_factory=list)
    clipped: str | None = None


@dataclass(frozen=True, eq=False)
class _Loaded:
    picture: Picture
    values: Array
    shown: Image.Image | None


def find_pictures(sources: Iterable[str | os.PathLike[str]]) -> list[Picture]:
    """The files named, and those in folders and below them whose names end like a picture's, in order and each once.

    Of a folder, hidden files and what an earlier run drew are left out.

    Raises
    ------
    InputError
        A source that does not exist, or no picture in all of them.
    """
    found: dict[Path, Picture] = {}
    taken: set[str] = set()
    for source in map(Path, sources):
        if os.path.isdir(source):  # unlike Path.is_dir, False for a name that is too long
            files = sorted(p for p in source.rglob("*")
                           if p.suffix.lower() in images.SUFFIXES and not p.name.endswith(_DRAWN))
            named = [(p, p.relative_to(source).as_posix()) for p in files if p.is_file()]
            named = [(p, name) for p, name in named if not any(part.startswith(".") for part in name.split("/"))]
        elif os.path.exists(source):
            named = [(source, source.name)]
        else:
            raise InputError(f"{str(source)!r} does not exist; required: a picture or a folder of pictures")
        for path, given in named:
            if path.resolve() in found:
                continue
            name = free = _UNPRINTABLE.sub(lambda match: ascii(match[0])[1:-1], given)
            number = 1
            while free in taken:  # two files of one name from different folders
                number += 1
                free = f"{name}-{number}"
            taken.add(free)
            found[path.resolve()] = Picture(path, free)
    if not found:
        raise InputError(
            f"no picture was found in {', '.join(map(str, sources))}; files looked for end in "
            f"{' '.join(images.SUFFIXES)}"
        )
    return list(found.values())


def run(explainer: Explainer, pictures: list[Picture], out: Path, target: Target = None,
        outputs: Iterable[str] = OUTPUTS, batch: int | None = None, on_line: Callable[[Line], Any] = lambda line: None,
        on_progress: Callable[[int], Any] = lambda count: None, flow: bool = False) -> Summary:
    """Explain every picture and write the results to `out`.

    Parameters
    ----------
    explainer : Explainer
    pictures : list of Picture
        From `find_pictures`.
    out : Path
        Made where it does not exist. Gets NAME.heatmap.png and NAME.overlay.png for each picture, and explanations.h5
        for all.
    target : int or str, optional
        One output for all pictures. None: each picture's winner.
    outputs : some of "heatmap", "overlay", "relevance"
        What to write; "relevance" is the HDF5 file.
    batch : int, optional
        Pictures at a time: what is lost if the run is cut off, and what is held in memory. None: 16, or as many as GPUs
        take at once.
    on_line, on_progress : callable
        Told of each explained picture, and of each batch how many pictures it settled.

    flow : bool
        Whether lines say what came to each layer, which takes a second pass.

    Returns
    -------
    Summary
        Pictures that could not be read are listed there; the others are explained.

    Raises
    ------
    OutputError
        `out` cannot be written, or holds the parts of another run that was cut off.
    InputError
        An unknown target or output.
    """
    outputs = list(outputs)
    if not outputs or set(outputs) - set(OUTPUTS):
        raise InputError(
            f"outputs {', '.join(map(repr, outputs)) or 'none'} given; required: some of {', '.join(OUTPUTS)}")
    if batch is None:
        batch = max(_BATCH, explainer.at_once) if explainer.precision else _BATCH
    if batch < 1:
        raise InputError(f"batch is {batch}; required: 1 or more")
    if isinstance(target, str):
        target = explainer.model.class_index(target)
    run_id = _fingerprint(explainer, target, sorted(set(outputs)))
    summary = Summary()
    with _writing(out):
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):  # can it be written to? Better to know now than after an hour
            pass
        for folder in {out, *((out / p.name).parent for p in pictures)}:  # a run that was killed while it wrote
            for file in folder.glob(".*"):
                if _LEFT_BESIDE.fullmatch(file.name):
                    file.unlink()
        parts = sorted(out.glob(_PARTS))
        done = _done_before(parts, run_id, pictures)
    todo = [p for p in pictures if p.name not in done]
    summary.done_before = len(done)
    on_progress(summary.done_before)
    # Warnings are recorded out here, around all threads: which are shown and which are not is a setting of the whole
    # process.
    with ThreadPoolExecutor(explainer.threads,
                            "fastdtd-pictures") as executor, warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", ExplanationWarning)
        try:
            for loaded, count in _loaded_batches(executor, explainer, todo, batch, "overlay" in outputs, summary):
                if loaded:
                    part = out / _PART.format(int(parts[-1].stem[-6:]) + 1 if parts else 0)
                    lines = _settle(executor, explainer, loaded, target, outputs, out, part, run_id, flow)
                    parts.append(part)
                    for line in lines:
                        on_line(line)
                    summary.explained += len(lines)
                on_progress(count)
        finally:
            executor.shutdown(cancel_futures=True)
    summary.clipped = next((str(w.message) for w in told if "clipped" in str(w.message)), None)
    with _writing(out):
        if "relevance" in outputs and parts:
            replace(out / RESULT, lambda path: _join(path, parts, explainer))
        for part in reversed(parts):  # if this is cut off, the pictures that are explained again come last again
            part.unlink()
    return summary


def _loaded_batches(executor: ThreadPoolExecutor, explainer: Explainer, todo: list[Picture], batch: int, show: bool,
                    summary: Summary,
                    ) -> Iterator[tuple[list[_Loaded], int]]:
    """Batches of readable pictures, each with how many pictures it settles; the next one is read while one is
    explained.
    """
    def start(first: int) -> list[tuple[Picture, Future[_Loaded]]]:
        return [(p, executor.submit(_load, explainer, p, show)) for p in todo[first:first + batch]]

    coming = start(0)
    for first in range(0, len(todo), batch):
        now, coming = coming, start(first + batch)
        good = []
        for picture, future in now:
            try:
                good.append(future.result())
            except PictureError as error:
                summary.failed.append((picture.path, str(error)))
        yield good, len(now)


def _load(explainer: Explainer, picture: Picture, show: bool) -> _Loaded:
    image = images.open_picture(picture.path)
    model = explainer.model
    shown = images.seen_by_network(image, model.graph.input_shape[1:], model.preprocessing.resize,
                                   heatmap.MAX_SIDE) if show else None
    return _Loaded(picture, explainer.model.preprocess(image), shown)


def _settle(executor: ThreadPoolExecutor, explainer: Explainer, loaded: list[_Loaded], target: Target,
            outputs: list[str], out: Path, part: Path, run_id: str, flow: bool) -> list[Line]:
    """Explain one batch and write all of it, the part last: what is in it is done."""
    e = explainer(np.stack([one.values for one in loaded]), target)

    def draw(one: _Loaded, relevance: Array) -> None:
        with _writing(out):
            path = out / one.picture.name
            path.parent.mkdir(parents=True, exist_ok=True)
            for kind, shown in (("heatmap", None), ("overlay", one.shown)):
                if kind in outputs:
                    def save(path: Path, shown: Image.Image | None = shown) -> None:
                        heatmap.write(path, relevance, shown)

                    replace(path.with_name(f"{path.name}.{kind}.png"), save)

    for future in [executor.submit(draw, one, relevance) for one, relevance in zip(loaded, e.relevance, strict=True)]:
        future.result()
    columns = {name: values for name, values in e.columns().items() if name != "relevance" or "relevance" in outputs}
    columns["file"] = np.array([one.picture.name for one in loaded], object)
    columns[_SOURCE] = np.array([_source(one.picture) for one in loaded], object)
    with _writing(out):
        replace(part, lambda path: path.write_bytes(_part(columns, run_id)))
    came = e.flow() if flow else {}
    return [
        Line(one.picture.name, int(t), explainer.model.class_name(int(t)), float(scores[t]), float(columns["sum"][i]),
             float(e.absorbed[i]), {name: float(lost[i]) for name, lost in e.ledger.items()},
             {name: float(given[i]) for name, given in came.items()})
        for i, (one, t, scores) in enumerate(zip(loaded, e.target, e.output, strict=True))
    ]


# ---- Files -----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _writing(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"cannot write to {str(out)!r}: {error.strerror or error}; required: a folder that can be written and has "
            "free space. Nothing that was reported as done is lost") from None


def _part(columns: dict[str, Any], run_id: str) -> memoryview:
    """The bytes of a part file. Not written by HDF5, which does not survive a full disk."""
    import h5py

    content = io.BytesIO()
    with h5py.File(content, "w") as file:
        file.attrs["run"] = run_id
        for name, values in columns.items():
            _create(file, name, values, len(values))[...] = values
    return content.getbuffer()


def _create(file: Any, name: str, like: Any, count: int) -> Any:
    """A dataset for `count` rows; not compressed, for relevance hardly shrinks."""
    import h5py

    return file.create_dataset(name, (count, *like.shape[1:]),
                               like.dtype if like.dtype.kind != "O" else h5py.string_dtype())


def _source(picture: Picture) -> str:
    """Tells apart pictures of one name."""
    return hashlib.sha256(os.fsencode(picture.path.resolve())).hexdigest()


def _done_before(parts: list[Path], run_id: str, pictures: list[Picture]) -> set[str]:
    """Names of the pictures in `parts`."""
    import h5py

    wanted = {(p.name, _source(p)) for p in pictures}
    done: set[str] = set()
    for part in parts:
        try:
            with h5py.File(part, "r", locking=False) as file:  # a lock is refused on some network file systems
                names = list(file["file"].asstr()[...])
                same = file.attrs["run"] == run_id and wanted.issuperset(
                    zip(names, file[_SOURCE].asstr()[...], strict=True))
        except (OSError, KeyError):
            names, same = [], False
        if not same:
            raise OutputError(
                f"{str(part)!r} is left of a run that was cut off, with another model, rules, target, outputs, "
                "precision or pictures; finish that one, remove its parts, or choose another folder")
        done.update(names)
    return done


def _join(path: Path, parts: list[Path], explainer: Explainer) -> None:
    """All parts as one file, in their order."""
    import h5py

    content = io.BytesIO()
    with h5py.File(content, "w") as file:
        write_header(file, explainer.context)
    with open(path, "wb") as plain:
        plain.write(content.getbuffer())
        plain.flush()
        # HDF5 does not survive a full disk: all the space it will need is taken before it writes.
        needed = len(content.getbuffer()) + sum(part.stat().st_size for part in parts) + _SPARE_BYTES
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(plain.fileno(), 0, needed)
    with h5py.File(parts[-1], "r", locking=False) as last, h5py.File(path, "r+", locking=False) as file:
        counts = []
        for part in parts:
            with h5py.File(part, "r", locking=False) as one:
                counts.append(len(one["target"]))
        columns = {name: _create(file, name, last[name], sum(counts)) for name in last if name != _SOURCE}
        at = 0
        for part, count in zip(parts, counts, strict=True):  # one by one: there may be more than can be open at once
            with h5py.File(part, "r", locking=False) as one:
                for name, values in columns.items():
                    values[at:at + count] = one[name][...]
            at += count
        file.flush()
        size = file.id.get_filesize()
    os.truncate(path, size)


def _fingerprint(explainer: Explainer, target: Target, outputs: list[str]) -> str:
    """Of all that must be the same for two calls to be the same, but the pictures. Processors, whose precision is "",
    and GPUs differ in the last bits, GPUs among themselves by their precision."""
    graph, p = explainer.model.graph, explainer.model.preprocessing
    digest = hashlib.sha256(repr((target, outputs, graph.input_shape, p.color, p.resize, p.scale)).encode())
    rules = [(name, str(rule.rule)) for name, rule in explainer.rules.items()]
    digest.update(explainer.precision.encode())
    layers = [value for layer in graph for value in (type(layer), *vars(layer).values())]
    for value in (rules, p.mean, p.std, *(graph.box or ()), *layers):
        digest.update(value.tobytes() if isinstance(value, np.ndarray) else repr(value).encode())
    return digest.hexdigest()
