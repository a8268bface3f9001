"""The output folder of a run: its manifest, its shards, and the one result that presents them.

A shard holds a fixed part of the set. It is written beside and renamed into place when it is whole; its first bytes say
how long it is and what its checksum is. docs/howto-many-pictures.md says what is in each file.
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import io
import itertools
import json
import math
import os
import re
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from fastdtd.errors import OutputError, shown
from fastdtd.files import FolderLock, HeldError, as_path, open_to_read, replace
from fastdtd.graph import Array

if TYPE_CHECKING:
    from fastdtd.sources import Entry

MANIFEST, SET, RESULT, SCORES, FAILED = "manifest.json", "images.csv", "attribution.h5", "scores.csv", "failed.csv"
SET_COLUMNS = ("image", "name", "label", "path", "member", "size", "dataset")  # of images.csv; sources.Entry has them
SHARDS = "shards"
WRITTEN = r"manifest\.json|images\.csv|attribution\.h5|scores\.csv|failed\.csv|\d{5}\.h5"  # names of all files of a run
VERSION = 1
MAX_SHARDS = 499  # HDF5 answers with what it fills in, and no error, where it cannot open a file more
DTYPES = ("float32", "float16", "int8")
COMPRESSIONS = ("gzip", "lzf")
_SPARE_BYTES = 1 << 20
_HEAD_BYTES = 512  # of a shard: a user block, which HDF5's library passes over
_HEAD = "fastdtd shard {version}\nbytes {size}\nsha256 {sha256}\nrows {rows}\nfailed {failed}\n"
_HEAD_PATTERN = re.compile(_HEAD.format(version=VERSION, size=r"(\d+)", sha256="([0-9a-f]{64})", rows=r"(\d+)",
                                        failed=r"(\d+)").encode() + rb"\0*")
_FAILED = "failed_"  # columns of images that are not among the rows
_LARGE = "attribution"  # all other columns are small, and are copied into the result
_LARGEST_LOSS, _LARGEST_LOSS_TF32 = 1e-3, 1e-2  # of what is explained, as Explainer has them


@dataclass(frozen=True)
class Storage:
    """How relevance is stored.

    dtype : "float32"; "float16", with an error of 0.05 % of each value; "int8", with one of 0.4 % of the image's
        largest, which the column `scale` is of
    channels : whether channels are kept; else their sum is, (N, 1, H, W)
    compression : None, "gzip" or "lzf"
    keep : of the relevance of each image, the share that is stored, that of the largest values; the others are zero,
        which is what compression is for
    """

    dtype: str = "float32"
    channels: bool = True
    compression: str | None = None
    keep: float = 1.0

    def shape(self, image: Sequence[int]) -> tuple[int, ...]:
        return (image[0] if self.channels else 1, *image[1:])

    def stored(self, relevance: Array) -> tuple[npt.NDArray[Any], npt.NDArray[np.float32]]:
        """Relevance (N, C, H, W) as it is stored, and what each image's is to be multiplied by. Values beyond float16
        become infinite.
        """
        if not self.channels:
            relevance = relevance.sum(1, keepdims=True, dtype=np.float64).astype(np.float32)
        if self.keep < 1:
            relevance = np.stack([_largest(one, self.keep) for one in relevance])
        scale = np.ones(len(relevance), np.float32)
        if self.dtype == "int8":
            scale = (np.abs(relevance).max((1, 2, 3)) / 127).astype(np.float32)
            scale[scale == 0] = 1  # of no relevance, or one that is nothing beside float32's least number
            return np.rint(relevance / scale[:, None, None, None]).clip(-127, 127).astype(np.int8), scale
        with np.errstate(over="ignore"):
            return relevance.astype(self.dtype), scale


def _largest(relevance: Array, share: float) -> Array:
    """Zero but for the fewest values whose magnitudes are that share of all."""
    sizes = np.abs(relevance)
    falling = np.sort(sizes, axis=None)[::-1]
    sums = np.cumsum(falling, dtype=np.float64)
    least = falling[min(int(np.searchsorted(sums, share * sums[-1])), falling.size - 1)]
    return np.where(sizes >= least, relevance, np.float32(0))


# ---- Shards ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Head:
    """What a shard says of itself."""

    nbytes: int
    sha256: str
    rows: int
    failed: int


def shard_path(out: Path, number: int) -> Path:
    return out / SHARDS / f"{number:05}.h5"


class ShardWriter:
    """Writes the rows of a shard to `path`, batch by batch.

    All the space it may need is taken first: HDF5's library does not survive a full disk.
    """

    def __init__(self, path: Path, storage: Storage | None, image: Sequence[int], rows: int, row_bytes: int) -> None:
        """storage: None where relevance is not kept; rows: at most; row_bytes: of all other columns."""
        import h5py

        self._path, self._rows = path, 0
        self._columns: dict[str, list[npt.NDArray[Any]]] = {}
        content = io.BytesIO()
        with h5py.File(content, "w", userblock_size=_HEAD_BYTES):
            pass
        if storage is not None:
            shape = storage.shape(image)
            # Compression may make more of what it cannot compress.
            row_bytes += math.prod(shape) * np.dtype(storage.dtype).itemsize * (2 if storage.compression else 1)
        take_space(path, content.getbuffer(), rows * row_bytes)
        self._file, self._large = h5py.File(path, "r+", locking=False), None
        if storage is not None and rows:
            how = {"compression": storage.compression, "shuffle": True} if storage.compression else {}
            self._large = self._file.create_dataset(_LARGE, (rows, *shape), storage.dtype, chunks=(1, *shape),
                                                    maxshape=(rows, *shape), **how)

    def add(self, columns: Mapping[str, npt.NDArray[Any]]) -> None:
        """Rows; `attribution` as it is stored."""
        count = len(next(iter(columns.values())))
        for name, values in columns.items():
            if name == _LARGE and self._large is not None:
                self._large[self._rows:self._rows + count] = values
            elif name != _LARGE:
                self._columns.setdefault(name, []).append(values)
        self._rows += count

    def finish(self, failed: Sequence[tuple[int, str, str]], layers: Sequence[str]) -> Head:
        """Write all the rest; failed: number, name and reason of each image that is not among the rows; layers: of the
        ledger's columns.
        """
        if self._large is not None:
            self._large.resize(self._rows, 0)
        for name, parts in self._columns.items():
            put(self._file, name, np.concatenate(parts))
        for index, name in enumerate(("image", "file", "reason")):
            put(self._file, _FAILED + name, np.array([one[index] for one in failed], object if index else np.int64))
        if "ledger" in self._columns:
            self._file["ledger"].attrs["layers"] = _encoded(layers)
        self._file.flush()
        size = self._file.id.get_filesize()
        self.close()
        os.truncate(self._path, size)
        head = Head(size, _digest(self._path), self._rows, len(failed))
        text = _HEAD.format(version=VERSION, size=size, sha256=head.sha256, rows=head.rows, failed=head.failed)
        with open(self._path, "r+b") as file:
            file.write(text.encode())
        return head

    def close(self) -> None:
        self._file.close()


def take_space(path: Path, content: memoryview, nbytes: int) -> None:
    """Write what a file begins with, and take room for `nbytes` more, so that nothing later can lack it."""
    with open(path, "r+b") as file:
        file.write(content)
        file.flush()
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, len(content) + nbytes + _SPARE_BYTES)


def put(file: Any, name: str, values: npt.NDArray[Any]) -> None:
    """A column; texts, of type object, are of fixed length, with which the bytes are the same every time."""
    import h5py

    if values.dtype == object:
        encoded = np.array([text.encode("utf-8", "backslashreplace") for text in values], np.bytes_)
        values = encoded.astype(h5py.string_dtype("utf-8", max(1, encoded.itemsize)))
    file.create_dataset(name, data=values, track_times=False)


def _digest(path: Path) -> str:
    """SHA-256 of a shard behind its head."""
    digest = hashlib.sha256()
    with open_to_read(path) as file:
        file.seek(_HEAD_BYTES)
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def read_head(path: Path) -> Head | None:
    """What a shard says of itself; None where it is not there, cut off, or no shard."""
    try:
        with open_to_read(path) as file:
            match = _HEAD_PATTERN.fullmatch(file.read(_HEAD_BYTES))
            size = os.fstat(file.fileno()).st_size
    except (OSError, ValueError):
        return None
    if match is None or int(match[1]) != size:
        return None
    return Head(size, match[2].decode(), int(match[3]), int(match[4]))


def read_columns(path: Path, names: Sequence[str] | None = None) -> dict[str, npt.NDArray[Any]]:
    """Small columns of a shard or of the result, texts as objects.

    Raises OutputError where it cannot be read.
    """
    import h5py

    try:
        with h5py.File(path, "r", locking=False) as file:
            wanted = [name for name in file if name != _LARGE] if names is None else names
            return {name: file[name].asstr()[...] if h5py.check_string_dtype(file[name].dtype) else file[name][...]
                    for name in wanted}
    except (OSError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise OutputError(f"{str(path)!r} cannot be read ({error}); required: a file of a run, undamaged") from None


def _encoded(names: Sequence[str]) -> npt.NDArray[Any]:
    return np.array([name.encode() for name in names] or [b""], np.bytes_)


def ledger_layers(path: Path) -> list[str]:
    """Names of the layers that a ledger's columns are of."""
    import h5py

    with h5py.File(path, "r", locking=False) as file:
        return [name.decode() for name in file["ledger"].attrs["layers"].tolist() if name]


# ---- Manifest --------------------------------------------------------------------------------------------------------


def read_manifest(out: Path) -> dict[str, Any] | None:
    """None where there is none."""
    path = out / MANIFEST
    try:
        with open_to_read(path) as file:
            found = json.loads(file.read(1 << 26))
        if not isinstance(found, dict) or found.get("format") != "fastdtd-run":
            raise ValueError("it is another JSON")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise OutputError(f"{str(path)!r} is no manifest of a run ({error}); remove the folder, or choose another"
                          ) from None
    return found


def write_manifest(out: Path, manifest: Mapping[str, Any]) -> None:
    text = json.dumps(manifest, indent=1, ensure_ascii=True) + "\n"
    replace(out / MANIFEST, lambda path: path.write_text(text))


def difference(ours: Mapping[str, Any], theirs: Mapping[str, Any], where: str = "") -> str:
    """The first setting in which two manifests differ, with both values; nothing where none does."""
    for key in [*ours, *(key for key in theirs if key not in ours)]:
        one, other = ours.get(key), theirs.get(key)
        if one == other:
            continue
        name = f"{where}{key}"
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            return difference(one, other, f"{name} ")
        return f"{name} was {_short(other)} then and is {_short(one)} now"
    return ""


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


# ---- The result ------------------------------------------------------------------------------------------------------


def join(out: Path, manifest: Mapping[str, Any], heads: Sequence[Head], classes: Sequence[str]) -> None:
    """The shards as one file, and as a table. Of the file only relevance stays in the shards; the rest is copied, shard
    by shard, for there may be more of it than memory."""
    import h5py

    digest = hashlib.sha256("".join(head.sha256 for head in heads).encode()).hexdigest()
    with contextlib.suppress(OSError), h5py.File(out / RESULT, "r", locking=False) as file:
        if file.attrs.get("shards") == digest and (out / SCORES).exists() and (
                (out / FAILED).exists() == any(head.failed for head in heads)):
            return
    filled = [(shard_path(out, number), head.rows) for number, head in enumerate(heads) if head.rows]
    layout = _layout([shard for shard, _ in filled])
    replace(out / SCORES, lambda path: _write_scores(path, filled, layout, classes))
    write_failed(out, [one for number, head in enumerate(heads) if head.failed
                       for one in read_failed(shard_path(out, number))])
    if not filled:
        with contextlib.suppress(FileNotFoundError):
            (out / RESULT).unlink()
        return
    count = sum(rows for _, rows in filled)

    def write(path: Path) -> None:
        content = io.BytesIO()
        with h5py.File(content, "w") as file:
            file.attrs["shards"] = digest
            if classes:
                put(file, "classes", np.array(classes, object))
        take_space(path, content.getbuffer(), 4096 * len(filled) + sum(
            count * dtype.itemsize * math.prod(shape) for dtype, shape in layout.values()))
        with h5py.File(path, "r+", locking=False) as file:
            columns = {name: file.create_dataset(name, (count, *shape), dtype, track_times=False)
                       for name, (dtype, shape) in layout.items()}
            at = 0
            for shard, rows in filled:
                with h5py.File(shard, "r", locking=False) as source:
                    for name, column in columns.items():
                        column[at:at + rows] = source[name][...]
                at += rows
            file["ledger"].attrs["layers"] = _encoded(ledger_layers(filled[0][0]))
            if manifest["storage"] is not None:
                _add_virtual(file, out, filled)
            file.flush()
            size = file.id.get_filesize()
        os.truncate(path, size)

    replace(out / RESULT, write)


def _layout(shards: Sequence[Path]) -> dict[str, tuple[np.dtype[Any], tuple[int, ...]]]:
    """Type and shape of a row of each small column; of texts the longest type."""
    import h5py

    found: dict[str, tuple[np.dtype[Any], tuple[int, ...]]] = {}
    for shard in shards:
        with h5py.File(shard, "r", locking=False) as file:
            for name, column in file.items():
                if name != _LARGE and not name.startswith(_FAILED) and (
                        name not in found or column.dtype.itemsize > found[name][0].itemsize):
                    found[name] = column.dtype, column.shape[1:]
    return found


def _add_virtual(file: Any, out: Path, shards: Sequence[tuple[Path, int]]) -> None:
    import h5py

    with h5py.File(shards[0][0], "r", locking=False) as first:
        shape, dtype = first[_LARGE].shape[1:], first[_LARGE].dtype
    # By the calls of HDF5: h5py's own notes the time, and the bytes would be others every time.
    layout = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    layout.set_obj_track_times(False)
    layout.set_fill_value(np.array(np.nan if dtype.kind == "f" else -128, dtype))
    space = h5py.h5s.create_simple((sum(rows for _, rows in shards), *shape))
    at = 0
    for shard, rows in shards:
        place, part = shard.relative_to(out).as_posix(), (rows, *shape)
        space.select_hyperslab((at, *(0 for _ in shape)), part)
        layout.set_virtual(space, place.encode(), _LARGE.encode(), h5py.h5s.create_simple(part))
        at += rows
    space.select_all()
    h5py.h5d.create(file.id, _LARGE.encode(), h5py.h5t.py_create(dtype), space, layout)


def _write_scores(path: Path, shards: Sequence[tuple[Path, int]],
                  layout: Mapping[str, tuple[np.dtype[Any], tuple[int, ...]]], classes: Sequence[str]) -> None:
    """The columns of one number or text, as CSV."""
    names = [name for name, (_, shape) in layout.items() if not shape]
    with open(path, "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow([*names, "class"] if classes else names)
        for shard, _ in shards:
            columns = [values.tolist() for values in read_columns(shard, names).values()]
            if classes:
                columns.append([classes[target] for target in columns[names.index("target")]])
            table.writerows(zip(*columns, strict=True))


def read_failed(path: Path) -> list[tuple[int, str, str]]:
    """Number, name and reason of each image of a shard that was not explained."""
    columns = read_columns(path, [_FAILED + name for name in ("image", "file", "reason")])
    return list(zip(*(values.tolist() for values in columns.values()), strict=True))


def write_failed(out: Path, failed: Sequence[tuple[int, str, str]]) -> None:
    """failed.csv, or none where nothing failed."""
    if not failed:
        with contextlib.suppress(FileNotFoundError):
            (out / FAILED).unlink()
        return

    def write(path: Path) -> None:
        with open(path, "w", newline="", encoding="utf-8", errors="backslashreplace") as file:
            table = csv.writer(file, lineterminator="\n")
            table.writerow(("image", "file", "reason"))
            table.writerows(failed)

    replace(out / FAILED, write)


@contextlib.contextmanager
def added_to(out: Path, who: str) -> Iterator[None]:
    """A run's folder, while something is added to it; who: may hold it otherwise, for the message."""
    try:
        with FolderLock(out):
            yield
    except HeldError as holder:
        raise OutputError(f"{who} is writing to {str(out)!r}: {holder}; wait until it has finished, or end it"
                          ) from None
    except OSError as error:
        raise OutputError(f"cannot write to {str(out)!r}: {error.strerror or error}; required: a folder that can be "
                          "written and has free space") from None


# ---- The set ---------------------------------------------------------------------------------------------------------

_UNDECODED = re.compile(r"\\udc([89a-f][0-9a-f])")  # a byte of a path that is no UTF-8, as images.csv has it


def write_set(out: Path, entries: Sequence[Entry]) -> None:
    def write(path: Path) -> None:
        with open(path, "w", newline="", encoding="utf-8", errors="backslashreplace") as file:
            table = csv.writer(file, lineterminator="\n")
            table.writerow(SET_COLUMNS)
            table.writerows((number, entry.name, entry.label, os.path.abspath(entry.path), entry.member, entry.size,
                             entry.dataset) for number, entry in enumerate(entries))

    replace(out / SET, write)


def read_set(out: Path, numbers: Container[int]) -> dict[int, Entry]:
    """Images of a run's set, those of these numbers, as images.csv has them.

    Raises OutputError where it cannot be read.
    """
    from fastdtd.sources import Entry

    path = out / SET
    found = {}
    try:
        with open(path, newline="", encoding="utf-8") as file:
            table = csv.reader(file, strict=True)
            header = next(table, [])
            if tuple(header) != SET_COLUMNS:
                raise ValueError(f"its columns are {shown(', '.join(header))}")
            for number, name, label, written, member, size, dataset in table:
                if int(number) in numbers:
                    place = _UNDECODED.sub(lambda match: chr(0xdc00 + int(match[1], 16)), written)
                    found[int(number)] = Entry(place, name, label, int(member), int(size), dataset=dataset)
    except (OSError, ValueError, csv.Error) as error:
        raise OutputError(f"{str(path)!r} cannot be read ({error}); required: the list of images that a run writes, "
                          f"with the columns {', '.join(SET_COLUMNS)}") from None
    return found


# ---- Reading results -------------------------------------------------------------------------------------------------


class Columns(Mapping[str, npt.NDArray[Any]]):
    """Columns of shards by name, each read when it is asked for; those of one number a row are kept."""

    def __init__(self, shards: Sequence[Path]) -> None:
        self._shards, self._names = shards, list(_layout(shards[:1]))
        self._kept: dict[str, npt.NDArray[Any]] = {}

    def __getitem__(self, name: str) -> npt.NDArray[Any]:
        if name not in self._names:
            raise KeyError(name)
        if name in self._kept:
            return self._kept[name]
        values = np.concatenate([read_columns(shard, [name])[name] for shard in self._shards])
        if values.ndim == 1:
            self._kept[name] = values
        return values

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class Results(Sequence[Array]):
    """A finished run: relevance of each row, and columns.

    Attributes
    ----------
    columns : mapping of str to array, N rows each
        As docs/howto-many-pictures.md lists them: file, image, label, target, explained, sum, absorbed, prediction, ...
    manifest : dict
        What was run: model, rules, preprocessing, target, storage, versions.
    classes : tuple of str
        Names of the network's outputs; empty where they have none.
    failed : list of (int, str, str)
        Number, name and reason of each image that was not explained.
    """

    def __init__(self, out: Path, manifest: dict[str, Any], heads: Sequence[Head]) -> None:
        self.classes: tuple[str, ...] = ()
        with contextlib.suppress(OutputError):  # a network without names has no such column
            self.classes = tuple(read_columns(out / RESULT, ["classes"])["classes"].tolist())
        self.out, self.manifest, self._heads = out, manifest, list(heads)
        self._ends = np.cumsum([head.rows for head in heads])
        self.failed = [one for number, head in enumerate(heads) if head.failed
                       for one in read_failed(shard_path(out, number))]
        self.columns = Columns([shard_path(out, number) for number, head in enumerate(heads) if head.rows])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __repr__(self) -> str:
        return f"<Results of {len(self)} explanations in {os.fspath(self.out)!r}, {len(self.failed)} images failed>"

    def __getitem__(self, row: Any) -> Any:
        """Relevance (C, H, W) of a row, or (n, C, H, W) of a slice, as float32 whatever it is stored as."""
        if self.manifest["storage"] is None:
            raise OutputError("the run did not keep relevance; required: one whose outputs have it")
        if isinstance(row, slice):
            return self._read(range(*row.indices(len(self))))
        if not isinstance(row, (int, np.integer)) or not -len(self) <= row < len(self):
            raise IndexError(f"row {shown(row)} of {len(self)} was asked for")
        return self._read([int(row) % len(self)])[0]

    def _read(self, rows: Sequence[int]) -> Array:
        """Of rows that follow one another in a shard it is opened once."""
        import h5py

        made = np.empty((len(rows), *self._shape()), np.float32)
        numbers = np.searchsorted(self._ends, np.array(rows, np.int64), "right").tolist()
        for number, group in itertools.groupby(range(len(rows)), numbers.__getitem__):
            path, begin = shard_path(self.out, number), int(self._ends[number]) - self._heads[number].rows
            try:
                with h5py.File(path, "r", locking=False) as file:
                    for i in group:
                        made[i] = file[_LARGE][rows[i] - begin]
            except (OSError, LookupError, RuntimeError) as error:
                raise OutputError(f"{str(path)!r} cannot be read ({error}); `fastdtd verify {self.out}` says more"
                                  ) from None
        if len(rows):
            made *= self.columns["scale"][rows, None, None, None]
        return made

    def winners(self) -> npt.NDArray[np.int64]:
        """(N,): the output with the highest score. Scores of all outputs are read shard by shard."""
        found = [read_columns(shard_path(self.out, number), ["prediction"])["prediction"].argmax(1)
                 for number, head in enumerate(self._heads) if head.rows]
        return np.concatenate(found) if found else np.zeros(0, np.int64)

    def _shape(self) -> tuple[int, ...]:
        storage = Storage(**self.manifest["storage"])
        return storage.shape(self.manifest["model"]["input"])


def open_results(out: str | os.PathLike[str]) -> Results:
    """The results of a finished run, checked before they are read: all shards are there, and of the size they say.

    HDF5 fills what it cannot open of `attribution.h5` with NaN, without a word; here it is an error.

    Parameters
    ----------
    out : path
        The output folder of `fastdtd explain`.

    Returns
    -------
    Results

    Raises
    ------
    OutputError
        No run, an unfinished one, or one of which a part is missing or damaged.

    Examples
    --------
    >>> import fastdtd
    >>> from fastdtd import cli
    >>> cli.main(["explain", "squeezenet1_1", "cat.jpg", "-o", "out"])    # or in a shell
    cat.jpg  285 Egyptian cat  score ..., relevance ...
    1 explained; see out/
    0
    >>> results = fastdtd.open_results("out")
    >>> results[0].shape, results.columns["file"][0]
    ((3, 227, 227), 'cat.jpg')
    """
    place = as_path(out, OutputError, "the output folder of a run")
    manifest, heads, missing = _state(place)
    if missing:
        raise OutputError(f"{str(place)!r} has {len(heads) - len(missing)} of {len(heads)} shards whole, and "
                          f"{shard_path(place, missing[0]).name} is missing or damaged; start the same run again, "
                          "which makes what is missing")
    return Results(place, manifest, [head for head in heads if head is not None])


def _state(out: Path) -> tuple[dict[str, Any], list[Head | None], list[int]]:
    """The manifest, what each shard says, and the numbers of those that are missing or damaged."""
    manifest = read_manifest(out)
    if manifest is None:
        raise OutputError(f"{str(out)!r} has no {MANIFEST}; required: the output folder of a run of `fastdtd explain`")
    if manifest.get("version") != VERSION:
        raise OutputError(f"{str(out)!r} is of version {shown(manifest.get('version'))} of results; this fastdtd reads "
                          f"version {VERSION}")
    count = manifest.get("shards")
    if not isinstance(count, int) or not 1 <= count <= MAX_SHARDS:
        raise OutputError(f"{str(out / MANIFEST)!r} says {shown(count)} shards; required: 1 to {MAX_SHARDS}")
    heads = [read_head(shard_path(out, number)) for number in range(count)]
    return manifest, heads, [number for number, head in enumerate(heads) if head is None]


@dataclass
class Verified:
    """What `verify` found.

    shards, rows, failed : how many
    troubles : what is wrong, a line each
    """

    shards: int = 0
    rows: int = 0
    failed: int = 0
    troubles: list[str] = field(default_factory=list)


def verify(out: str | os.PathLike[str], progress: Any = lambda count: None) -> Verified:
    """Check a finished run: every shard is there, with its checksum; all images of the set are in one; relevance is
    finite, sums to what is said, and with what layers absorbed to what is explained.

    Parameters
    ----------
    out : path
    progress : callable
        Told of each shard that was checked, with 1.

    Raises
    ------
    OutputError
        It is no run.
    """
    place = as_path(out, OutputError, "the output folder of a run")
    manifest, heads, _ = _state(place)
    found = Verified(len(heads))
    for number, head in enumerate(heads):
        path = shard_path(place, number)
        if head is None:
            found.troubles.append(f"{path.name} is missing, cut off, or no shard")
        elif _digest(path) != head.sha256:
            found.troubles.append(f"{path.name} has another checksum than it says: it is damaged")
        else:
            found.rows, found.failed = found.rows + head.rows, found.failed + head.failed
            found.troubles += [f"{path.name} {trouble}" for trouble in _troubles(path, manifest, number, head)]
        progress(1)
    path = place / RESULT
    if not found.troubles and found.rows:
        columns = read_columns(path, ["image"]) if path.exists() else {"image": np.zeros(0)}
        if len(columns["image"]) != found.rows:
            found.troubles.append(f"{RESULT} has {len(columns['image'])} rows; required: {found.rows}")
    return found


def _troubles(path: Path, manifest: Mapping[str, Any], number: int, head: Head) -> Iterator[str]:
    import h5py

    columns = read_columns(path)
    begin = number * manifest["shard"]
    wanted = set(range(begin, min(begin + manifest["shard"], manifest["images"]["count"])))
    explained, failed = columns.get("image", np.zeros(0, np.int64)).tolist(), columns["failed_image"].tolist()
    if {*explained, *failed} != wanted or set(explained) & set(failed) or len(failed) != head.failed:
        yield (f"holds {len(set(explained))} images and {len(failed)} failed ones; required: the {len(wanted)} of its "
               "part")
        return
    if len(explained) != head.rows or any(len(values) != head.rows for name, values in columns.items()
                                          if not name.startswith(_FAILED)):
        yield f"has columns of other lengths than {head.rows}"
        return
    if not head.rows:
        return
    turnover = np.maximum(np.abs(columns["explained"]), np.abs(columns["score"])) + np.abs(columns["ledger"]).sum(1)
    if manifest["storage"] is not None:
        storage = Storage(**manifest["storage"])
        with h5py.File(path, "r", locking=False) as file:
            for row in range(head.rows):
                relevance = file[_LARGE][row].astype(np.float64) * columns["scale"][row]
                size, largest = float(np.abs(relevance).sum()), float(np.abs(relevance).max())
                bound = {"float32": 1e-6 * size, "float16": 2**-10 * size + relevance.size * 2**-24,
                         "int8": relevance.size * largest / 254}[storage.dtype]
                told = float(columns["sum"][row])
                bound += (1 - storage.keep) / storage.keep * size * (1 + 1e-6)
                if not np.isfinite(relevance).all() or abs(relevance.sum() - told) > bound:
                    yield f"row {row} has relevance that sums to {relevance.sum():.6g}; required: {told:.6g}"
                    return
                turnover[row] = max(turnover[row], size)
    cut = columns.get("cut", np.zeros(head.rows))  # where relevance was to go through some channels alone
    lost = np.abs(columns["explained"] - columns["sum"] - columns["absorbed"] - cut)
    largest = _LARGEST_LOSS_TF32 if manifest.get("precision") == "tf32" else _LARGEST_LOSS
    for row in np.flatnonzero(lost > largest * turnover)[:1] if manifest["conserves"] else ():
        yield f"row {row} loses {lost[row]:.3g} of {columns['explained'][row]:.3g}"
