"""Many pictures: read, explain, write, with bounded memory and nothing lost when a run is cut off.

What is done is on disk before it is said to be done: each picture's PNGs, and each batch's numbers as one part file, all written beside and
renamed into place. At the end the parts become `explanations.h5`. A run that was cut off leaves its parts; the same call goes on from them.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
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
from fastdtd.explainer import Explainer, ExplanationWarning, Target
from fastdtd.files import replace
from fastdtd.graph import Array

OUTPUTS = ("heatmap", "overlay", "relevance")
RESULT = "explanations.h5"
_PART = "explanations.part-{:06d}.h5"
_PARTS = "explanations.part-*.h5"


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

    Raises
    ------
    InputError
        A source that does not exist, or no picture in all of them.
    """
    found: dict[Path, Picture] = {}
    taken: set[str] = set()
    for source in map(Path, sources):
        if source.is_dir():
            files = sorted(p for p in source.rglob("*") if p.suffix.lower() in images.SUFFIXES and p.is_file())
            named = [(p, p.relative_to(source).as_posix()) for p in files]
        elif source.exists():
            named = [(source, source.name)]
        else:
            raise InputError(f"{str(source)!r} does not exist; required: a picture or a folder of pictures")
        for path, name in named:
            if path.resolve() in found:
                continue
            free, number = name, 2
            while free in taken:  # two files of one name from different folders
                free, number = f"{name}-{number}", number + 1
            taken.add(free)
            found[path.resolve()] = Picture(path, free)
    if not found:
        raise InputError(f"no picture was found in {', '.join(map(str, sources))}; files looked for end in {' '.join(images.SUFFIXES)}")
    return list(found.values())


def run(explainer: Explainer, pictures: list[Picture], out: Path, target: Target = None, outputs: Iterable[str] = OUTPUTS, batch: int = 16,
        on_line: Callable[[Line], None] = lambda line: None, on_progress: Callable[[int], None] = lambda count: None) -> Summary:
    """Explain every picture and write the results to `out`.

    Parameters
    ----------
    explainer : Explainer
    pictures : list of Picture
        From `find_pictures`.
    out : Path
        Made where it does not exist. Gets NAME.heatmap.png and NAME.overlay.png for each picture, and explanations.h5 for all.
    target : int or str, optional
        One output for all pictures. None: each picture's winner.
    outputs : some of "heatmap", "overlay", "relevance"
        What to write; "relevance" is the HDF5 file.
    batch : int
        Pictures at a time: what is lost if the run is cut off, and what is held in memory.
    on_line, on_progress : callable
        Told of each explained picture, and of each batch how many pictures it settled.

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
        raise InputError(f"outputs {', '.join(map(repr, outputs)) or 'none'} given; required: some of {', '.join(OUTPUTS)}")
    if batch < 1:
        raise InputError(f"batch is {batch}; required: 1 or more")
    if isinstance(target, str):
        target = explainer.model.class_index(target)
    run_id = json.dumps({"model": _fingerprint(explainer), "rules": {k: r.name for k, r in explainer.rules.items()}, "target": target})
    summary = Summary()
    with _writing(out):
        out.mkdir(parents=True, exist_ok=True)
        replace(out / ".fastdtd-test", lambda path: path.write_bytes(b""))  # find out now, not after an hour
        (out / ".fastdtd-test").unlink()
        parts = sorted(out.glob(_PARTS))
        done = _done_before(parts, run_id)
    todo = [p for p in pictures if p.name not in done]
    summary.done_before = len(pictures) - len(todo)
    on_progress(summary.done_before)
    number = 1 + max((int(p.name.split("-")[1].split(".")[0]) for p in parts), default=-1)
    with ThreadPoolExecutor(explainer.threads, "fastdtd-pictures") as executor:
        for loaded, count in _loaded_batches(executor, explainer, todo, batch, "overlay" in outputs, summary):
            if loaded:
                lines = _settle(executor, explainer, loaded, target, outputs, out, out / _PART.format(number), run_id, summary)
                number += "relevance" in outputs
                for line in lines:
                    on_line(line)
                summary.explained += len(lines)
            on_progress(count)
    if "relevance" in outputs and (summary.explained or summary.done_before):
        with _writing(out):
            parts = sorted(out.glob(_PARTS))
            replace(out / RESULT, lambda path: _join(path, parts, explainer))
            for part in parts:
                part.unlink()
    return summary


def _loaded_batches(executor: ThreadPoolExecutor, explainer: Explainer, todo: list[Picture], batch: int, show: bool, summary: Summary,
                    ) -> Iterator[tuple[list[_Loaded], int]]:
    """Batches of readable pictures, each with how many pictures it settles; the next one is read while one is explained."""
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
    shown = None
    if show:
        left, top, right, bottom = images.visible_part(image, explainer.model.graph.input_shape[1:], explainer.model.preprocessing.resize)
        shown = image.crop((round(left), round(top), max(round(right), round(left) + 1), max(round(bottom), round(top) + 1)))
        shown.thumbnail((heatmap.MOST_SIDE, heatmap.MOST_SIDE))
    return _Loaded(picture, explainer.model.preprocess(image), shown)


def _settle(executor: ThreadPoolExecutor, explainer: Explainer, loaded: list[_Loaded], target: Target, outputs: list[str], out: Path,
            part: Path, run_id: str, summary: Summary) -> list[Line]:
    """Explain one batch and write all of it."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", ExplanationWarning)
        e = explainer(np.stack([one.values for one in loaded]), target)
    summary.clipped = summary.clipped or next((str(w.message) for w in told if "clipped" in str(w.message)), None)

    def draw(one: _Loaded, relevance: Array) -> None:
        with _writing(out):
            place = out / one.picture.name
            place.parent.mkdir(parents=True, exist_ok=True)
            for kind, shown in (("heatmap", None), ("overlay", one.shown)):
                if kind in outputs:
                    def save(path: Path, shown: Image.Image | None = shown) -> None:
                        heatmap.write(path, relevance, shown)

                    replace(place.with_name(f"{place.name}.{kind}.png"), save)

    for future in [executor.submit(draw, one, relevance) for one, relevance in zip(loaded, e.relevance, strict=True)]:
        future.result()
    sums = e.relevance.sum((1, 2, 3), dtype=np.float64)
    if "relevance" in outputs:
        columns = {"relevance": e.relevance, "scores": e.output, "target": e.target, "explained": e.explained, "sum": sums,
                   "absorbed": e.absorbed, "file": np.array([one.picture.name for one in loaded], object)}
        with _writing(out):
            replace(part, lambda path: _write_part(path, columns, run_id))
    return [Line(one.picture.name, int(t), explainer.model.class_name(int(t)), float(scores[t]), float(s), float(a))
            for one, t, scores, s, a in zip(loaded, e.target, e.output, sums, e.absorbed, strict=True)]


# ---- Files -------------------------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _writing(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OutputError(f"cannot write to {str(out)!r}: {error.strerror or error}; required: a folder that can be written and has room. "
                          "What was reported as done is there") from None


def _write_part(path: Path, columns: dict[str, Any], run_id: str) -> None:
    import h5py

    with h5py.File(path, "w") as file:
        file.attrs["run"] = run_id
        for name, values in columns.items():
            _create(file, name, values, len(values))[...] = values


def _create(file: Any, name: str, like: Any, count: int) -> Any:
    import h5py

    if name == "relevance":  # a chunk for each picture, compressed: zeros and equal exponents take a third of the space
        return file.create_dataset(name, (count, *like.shape[1:]), like.dtype, chunks=(1, *like.shape[1:]), compression="gzip",
                                   compression_opts=1, shuffle=True)
    return file.create_dataset(name, (count, *like.shape[1:]), h5py.string_dtype() if name == "file" else like.dtype)


def _done_before(parts: list[Path], run_id: str) -> set[str]:
    import h5py

    done: set[str] = set()
    for part in parts:
        try:
            with h5py.File(part, "r") as file:
                same = file.attrs["run"] == run_id
                done |= set(file["file"].asstr()[...])
        except (OSError, KeyError):
            same = False
        if not same:
            raise OutputError(f"{str(part)!r} is left of another run, with another model, rules or target; remove it, or choose another "
                              "folder")
    return done


def _join(path: Path, parts: list[Path], explainer: Explainer) -> None:
    """All parts as one file, sorted as the parts are."""
    import h5py

    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(h5py.File(part, "r")) for part in parts]
        result = stack.enter_context(h5py.File(path, "w"))
        result.attrs["format"] = "fastdtd-explanations"
        result.attrs["rules"] = json.dumps({name: rule.name for name, rule in explainer.rules.items()})
        if explainer.model.classes:
            result["classes"] = np.array(explainer.model.classes, object)
        for name in files[0]:
            joined = _create(result, name, files[0][name], sum(len(file[name]) for file in files))
            at = 0
            for file in files:
                count = len(file[name])
                joined[at:at + count] = file[name][...]
                at += count


def _fingerprint(explainer: Explainer) -> str:
    digest = hashlib.sha256()
    for layer in explainer.model.graph:
        for name, value in sorted(vars(layer).items()):
            digest.update(name.encode())
            digest.update(value.tobytes() if isinstance(value, np.ndarray) else repr(value).encode())
    p = explainer.model.preprocessing
    digest.update(repr((p.color, p.resize, p.scale, p.mean.tolist(), p.std.tolist(), explainer.model.graph.input_shape)).encode())
    return digest.hexdigest()
