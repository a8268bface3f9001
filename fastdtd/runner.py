"""Many pictures: read, explain, write, with bounded memory and nothing lost when a run is cut off.

What is done is on disk before it is said to be done: each picture's PNGs, then each batch's numbers as one part file,
all written beside and renamed into place. At the end the parts become `explanations.h5`. A run that was cut off leaves
its parts; the same call goes on from them.
"""

from __future__ import annotations

import contextlib
import errno
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
from fastdtd.errors import InputError, OutputError, PictureError, shown
from fastdtd.explainer import Explainer
from fastdtd.explanation import write_header
from fastdtd.files import FolderLock, HeldError, open_to_read, remove_abandoned, replace
from fastdtd.graph import Array
from fastdtd.inputs import BeyondFloat32Error, ExplanationWarning, Target, checked_targets

OUTPUTS = ("heatmap", "overlay", "relevance")
RESULT = "explanations.h5"
_PART = "explanations.part-{:06d}.h5"
_PARTS = f"explanations.part-{'[0-9]' * 6}.h5"
_SOURCE = "source"
_SPARE_BYTES = 1 << 20
_BATCH = 16  # of processors; GPUs take more
_DRAWN = (".heatmap.png", ".overlay.png")
_WRITTEN = r"\.heatmap\.png|\.overlay\.png|explanations.*\.h5"
# What can be wrong with one output's name or place, while others can be written.
_OF_ONE_NAME = {errno.EACCES, errno.EEXIST, errno.EILSEQ, errno.EINVAL, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG,
                errno.ENOTDIR, errno.ENOTEMPTY, errno.EPERM}
_UNPRINTABLE = re.compile("[\0-\x1f\x7f-\x9f\ud800-\udfff]")  # the last ones stand for bytes that are no UTF-8


@dataclass(frozen=True)
class Picture:
    """A picture file and the name, relative to the output folder, under which its results go.

    trouble : why it cannot be read, where that is known before it is opened
    """

    path: Path
    name: str
    trouble: str = ""


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

    Of a folder, hidden files and what an earlier run drew are left out. A folder below that cannot be read is listed
    with its trouble; links to folders are not followed.

    Raises
    ------
    InputError
        A source that does not exist, or no picture in all of them.
    """
    found: dict[str, Picture] = {}
    taken: set[str] = set()
    for source in map(Path, sources):
        if os.path.isdir(source):  # unlike Path.is_dir, False for a name that is too long
            listed = sorted(_below(source))
            named = [(path, path.relative_to(source).as_posix(), trouble) for path, trouble in listed]
        elif _is_named_somewhere(source):
            named = [(source, source.name, "")]
        else:
            raise InputError(f"{str(source)!r} does not exist; required: a picture or a folder of pictures")
        for path, given, trouble in named:
            place = os.path.realpath(path)
            if place in found:
                continue
            name = free = _UNPRINTABLE.sub(lambda match: ascii(match[0])[1:-1], given)
            number = 1
            while free in taken:  # two files of one name from different folders
                number += 1
                free = f"{name}-{number}"
            taken.add(free)
            found[place] = Picture(path, free, trouble)
    if not found:
        raise InputError(
            f"no picture was found in {', '.join(map(str, sources))}; files looked for end in "
            f"{' '.join(images.SUFFIXES)}"
        )
    return list(found.values())


def _below(source: Path) -> Iterator[tuple[Path, str]]:
    """Pictures in a folder and below it, and folders that cannot be read, with the reason."""
    unreadable: list[OSError] = []
    for folder, folders, names in os.walk(source, onerror=unreadable.append):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for path in (Path(folder, name) for name in names):
            if path.suffix.lower() in images.SUFFIXES and not path.name.startswith(".") and not path.name.endswith(
                    _DRAWN):
                yield path, ""
    for error in unreadable:
        yield Path(error.filename), f"folder {error.filename!r} cannot be read: {error.strerror}"


def _is_named_somewhere(path: Path) -> bool:
    """Whether there is something of this name, or may be one in a folder that cannot be read."""
    try:
        os.lstat(path)
    except OSError as error:
        return error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG)
    except ValueError:  # a NUL
        return False
    return True


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
        Pictures that could not be read, explained or drawn are listed there; the others are explained.

    Raises
    ------
    OutputError
        `out` cannot be written, another run is writing to it, or it holds the parts of another one that was cut off.
    InputError
        An unknown target or output.
    """
    outputs = list(outputs)
    if not outputs or any(one not in OUTPUTS for one in outputs):
        raise InputError(
            f"outputs {', '.join(map(shown, outputs)) or 'none'} given; required: some of {', '.join(OUTPUTS)}")
    if batch is None:
        batch = max(_BATCH, explainer.at_once) if explainer.precision else _BATCH
    if isinstance(batch, bool) or not isinstance(batch, (int, np.integer)) or batch < 1:
        raise InputError(f"batch is {shown(batch)}; required: a whole number from 1")
    graph = explainer.model.graph
    checked = checked_targets(target, explainer.model, 1, graph.shapes[graph.output][0])
    target = None if checked is None else int(checked[0])
    with _locked(out) as lock:
        return _Run(explainer, pictures, out, lock, target, sorted(set(outputs)), flow).go(batch, on_line, on_progress)


class _Run:
    """A run over `pictures` into `out`, which it has for itself."""

    def __init__(self, explainer: Explainer, pictures: list[Picture], out: Path, lock: FolderLock, target: int | None,
                 outputs: list[str], flow: bool) -> None:
        self.explainer, self.pictures, self.out, self.lock = explainer, pictures, out, lock
        self.target, self.outputs, self.flow = target, outputs, flow
        self.run_id = _fingerprint(explainer, target, outputs)
        self.summary = Summary()
        self.threads = ThreadPoolExecutor(explainer.threads, "fastdtd-pictures")

    def go(self, batch: int, on_line: Callable[[Line], Any], on_progress: Callable[[int], Any]) -> Summary:
        with _writing(self.out):
            for folder in {self.out, *((self.out / p.name).parent for p in self.pictures)}:
                remove_abandoned(folder, _WRITTEN)
            self.parts = sorted(self.out.glob(_PARTS))
        done = _done_before(self.parts, self.run_id, self.pictures)
        todo = [p for p in self.pictures if p.name not in done]
        self.summary.done_before = len(done)
        on_progress(self.summary.done_before)
        # Warnings are recorded out here, around all threads: which are shown and which are not is a setting of the
        # whole process.
        with self.threads, warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always", ExplanationWarning)
            try:
                for loaded, count in self._loaded_batches(todo, batch):
                    lines = self._settle(loaded)
                    for line in lines:
                        on_line(line)
                    self.summary.explained += len(lines)
                    on_progress(count)
            finally:
                self.threads.shutdown(cancel_futures=True)
        self.summary.clipped = next((str(w.message) for w in told if "clipped" in str(w.message)), None)
        if self.parts:
            self._finish()
        return self.summary

    def _loaded_batches(self, todo: list[Picture], batch: int) -> Iterator[tuple[list[_Loaded], int]]:
        """Batches of readable pictures, each with how many it settles; one is read while another is explained."""
        def start(first: int) -> list[tuple[Picture, Future[_Loaded]]]:
            return [(p, self.threads.submit(self._load, p)) for p in todo[first:first + batch]]

        coming = start(0)
        for first in range(0, len(todo), batch):
            now, coming = coming, start(first + batch)
            good = []
            for picture, future in now:
                try:
                    good.append(future.result())
                except PictureError as error:
                    self.summary.failed.append((picture.path, str(error)))
            yield good, len(now)

    def _load(self, picture: Picture) -> _Loaded:
        if picture.trouble:
            raise PictureError(picture.trouble)
        image = images.open_picture(picture.path)
        model = self.explainer.model
        shown = images.seen_by_network(image, model.graph.input_shape[1:], model.preprocessing.resize,
                                       heatmap.MAX_SIDE) if "overlay" in self.outputs else None
        return _Loaded(picture, model.preprocess(image), shown)

    def _settle(self, loaded: list[_Loaded]) -> list[Line]:
        """Explain one batch and write all of it, the part last: what is in it is done."""
        try:
            if not loaded:
                return []
            e = self.explainer(np.stack([one.values for one in loaded]), self.target)
        except BeyondFloat32Error as error:
            for i, reason in error.reasons.items():
                self._fail(loaded[i].picture, reason)
            return self._settle([one for i, one in enumerate(loaded) if i not in error.reasons])
        drawn = [self.threads.submit(self._draw, one, relevance)
                 for one, relevance in zip(loaded, e.relevance, strict=True)]
        troubles = [future.result() for future in drawn]
        rows = [i for i, trouble in enumerate(troubles) if not trouble]
        for one, trouble in zip(loaded, troubles, strict=True):
            if trouble:
                self._fail(one.picture, trouble)
        if not rows:
            return []
        kept = rows if len(rows) < len(loaded) else slice(None)  # which copies nothing
        columns = {name: values[kept] for name, values in e.columns().items()
                   if name != "relevance" or "relevance" in self.outputs}
        columns["file"] = np.array([loaded[i].picture.name for i in rows], object)
        columns[_SOURCE] = np.array([_source(loaded[i].picture) for i in rows], object)
        part = self.out / _PART.format(int(self.parts[-1].stem[-6:]) + 1 if self.parts else 0)
        with self._writing():
            replace(part, lambda path: path.write_bytes(_part(columns, self.run_id)))
        self.parts.append(part)
        came = e.flow() if self.flow else {}
        return [
            Line(loaded[i].picture.name, target := int(e.target[i]), self.explainer.model.class_name(target),
                 float(e.output[i, target]), float(columns["sum"][row]), float(e.absorbed[i]),
                 {name: float(lost[i]) for name, lost in e.ledger.items()},
                 {name: float(given[i]) for name, given in came.items()})
            for row, i in enumerate(rows)
        ]

    def _draw(self, one: _Loaded, relevance: Array) -> str:
        """Write a picture's drawings; returns why they alone cannot be written, where that is so."""
        path = self.out / one.picture.name
        kinds = {"heatmap": None, "overlay": one.shown}
        try:
            for folder in reversed(path.relative_to(self.out).parents[:-1]):  # `out` itself is not made again
                (self.out / folder).mkdir(exist_ok=True)
            for kind in self.outputs:
                if kind in kinds:
                    def save(path: Path, shown: Image.Image | None = kinds[kind]) -> None:
                        heatmap.write(path, relevance, shown)

                    replace(path.with_name(f"{path.name}.{kind}.png"), save)
        except OSError as error:
            with _writing(self.out):
                if error.errno not in _OF_ONE_NAME:
                    raise
                _require_writable(self.out)
            return f"cannot be drawn to {error.filename2 or error.filename!r}: {error.strerror}"
        return ""

    def _fail(self, picture: Picture, reason: str) -> None:
        self.summary.failed.append((picture.path, f"picture {os.fspath(picture.path)!r} {reason}"))

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Writing what all of the run depends on."""
        if not self.lock.is_held():
            raise OutputError(
                f"{str(self.out)!r} was removed or replaced while a run wrote to it; start the run again")
        with _writing(self.out):
            yield

    def _finish(self) -> None:
        """The parts become the result."""
        with self._writing():
            if "relevance" in self.outputs:
                replace(self.out / RESULT, self._join)
            for part in reversed(self.parts):  # if this is cut off, it can be taken up again
                part.unlink()

    def _join(self, path: Path) -> None:
        """All parts as one file: pictures in their order, so that the bytes are the same however the run was cut up."""
        import h5py

        numbers = {picture.name: i for i, picture in enumerate(self.pictures)}
        files = [_read_part(part, self.run_id, ["file"])["file"] for part in self.parts]
        order = [numbers.get(name, -1) for names in files for name in names]
        if len(set(order)) < len(order) or min(order) < 0:
            raise OutputError(f"the parts in {str(self.out)!r} are not of one run; remove them and start it again")
        rows = np.argsort(np.argsort(order))  # of the result
        content = io.BytesIO()
        with h5py.File(content, "w") as file:
            write_header(file, self.explainer.context)
        with open(path, "wb") as plain:
            plain.write(content.getbuffer())
            plain.flush()
            # HDF5 does not survive a full disk: all the space it will need is taken before it writes.
            needed = len(content.getbuffer()) + sum(part.stat().st_size for part in self.parts) + _SPARE_BYTES
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(plain.fileno(), 0, needed)
        with h5py.File(path, "r+", locking=False) as file:
            columns: dict[str, Any] = {}
            at = 0
            for part, names in zip(self.parts, files, strict=True):  # one by one: there may be more than can be open
                found = _read_part(part, self.run_id)
                columns = columns or {name: _create(file, name, values, len(order)) for name, values in found.items()
                                      if name not in (_SOURCE, "file")}
                into = rows[at:at + len(names)]
                breaks = np.flatnonzero(np.diff(into) != 1) + 1
                for run in np.split(np.arange(len(names)), breaks):  # rows that lie one beside the other
                    for name, column in columns.items():
                        column[into[run[0]]:into[run[-1]] + 1] = found[name][run]
                at += len(names)
            names = np.empty(len(order), object)
            names[rows] = np.concatenate(files)
            _create(file, "file", names, len(names))[...] = names  # at once: HDF5 puts texts where there is room
            file.flush()
            size = file.id.get_filesize()
        os.truncate(path, size)


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
    return hashlib.sha256(os.fsencode(os.path.realpath(picture.path))).hexdigest()


def _done_before(parts: list[Path], run_id: str, pictures: list[Picture]) -> set[str]:
    """Names of the pictures in `parts`."""
    wanted = {(p.name, _source(p)) for p in pictures}
    done: set[str] = set()
    for part in parts:
        found = _read_part(part, run_id, ["file", _SOURCE])
        if not wanted.issuperset(zip(found["file"], found[_SOURCE], strict=True)):
            raise _foreign(part)
        done.update(found["file"])
    return done


def _read_part(part: Path, run_id: str, columns: Iterable[str] = ()) -> dict[str, Any]:
    """Columns, or all of them, of a part of this very run."""
    import h5py

    try:
        with open_to_read(part) as content, h5py.File(content, "r") as file:
            if file.attrs["run"] == run_id:
                found = {name: file[name].asstr()[...] if h5py.check_string_dtype(file[name].dtype) else file[name][...]
                         for name in columns or file}
                if len({len(values) for values in found.values()}) == 1:
                    return found
    except FileNotFoundError:
        raise OutputError(f"{str(part)!r} was removed while a run needed it; start the run again") from None
    except (OSError, LookupError, RuntimeError, TypeError, ValueError):
        pass
    raise _foreign(part)


def _foreign(part: Path) -> OutputError:
    return OutputError(
        f"{str(part)!r} is left of a run that was cut off, with another model, rules, target, outputs, precision or "
        "pictures, or is damaged; finish that one, remove its parts, or choose another folder")


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
