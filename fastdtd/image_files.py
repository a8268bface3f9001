"""Files of many images, tars and HDF5's: what is in them, and one image of them. They are not trusted.

They stay open, a few at a time, with what was read of their structure, and any number of threads read of them.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import re
import tarfile
import threading
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from fastdtd import hdf5, hdf5_format, hdf5_storage, images
from fastdtd.errors import ModelError, printable
from fastdtd.files import open_to_read

_MAX_LABEL = 1024  # bytes of a tar's
_MAX_HEADER = 2**16  # bytes of what comes before a tar's member: its long name, its attributes
_MAX_BYTES = 2**30  # of a picture in a tar
_MAX_OBJECTS = 10_000  # of an HDF5 file
_MAX_CHUNKS = 2**22  # of an HDF5 dataset of images
_MAX_LABEL_BYTES = 2**28  # of an HDF5 dataset of labels
_STRUCTURE_BYTES = 2**28  # of an HDF5 file: an index of a million chunks takes 56 MiB
_OPEN_FILES = 8  # that are kept open
_BEFORE = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE,
           tarfile.XGLTYPE)  # members of a tar that say something of the next one, or of all
_WITHOUT_BYTES = {tarfile.LNKTYPE: "a link", tarfile.SYMTYPE: "a link", tarfile.CHRTYPE: "a device",
                  tarfile.BLKTYPE: "a device", tarfile.DIRTYPE: "a folder", tarfile.FIFOTYPE: "a named pipe"}
_FIRST, _LAST = (1, 3), (1, 3, 4)  # channels of images
_IMAGES = "uint8 (N, H, W), (N, H, W, C) with C = 1, 3 or 4, or (N, C, H, W) with C = 1 or 3"


# ---- Files that stay open --------------------------------------------------------------------------------------------


class OpenFile:
    """A file of which threads read, each at places of its own; closed with its last reference."""

    def __init__(self, path: str) -> None:
        self._file = open_to_read(path)
        self._lock = threading.Lock()
        self.size = os.fstat(self._file.fileno()).st_size

    def read(self, start: int, count: int) -> bytes:
        """Fewer bytes where the file ends."""
        if not hasattr(os, "pread"):
            with self._lock:
                self._file.seek(start)
                return self._file.read(count)
        parts = []
        while count and (part := os.pread(self._file.fileno(), count, start)):
            parts.append(part)
            start, count = start + len(part), count - len(part)
        return b"".join(parts) if len(parts) != 1 else parts[0]

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            self._file.close()


def _identity(path: str) -> tuple[int, ...]:
    """Of a file that may be replaced while others of its name are open."""
    status = os.stat(path)
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


class _Kept:
    """Files that are open, and indices that were read, the last of each."""

    def __init__(self) -> None:
        self.forget()
        if hasattr(os, "register_at_fork"):  # the lock may be held by a thread that a child does not have
            os.register_at_fork(after_in_child=self.forget)

    def forget(self) -> None:
        self.lock = threading.RLock()  # so that no two threads read the same index
        self.files = functools.lru_cache(_OPEN_FILES)(lambda path, identity: OpenFile(path))
        self.rows = functools.lru_cache(_OPEN_FILES // 2)(lambda path, name, identity: ImageRows(path, name))


_kept = _Kept()


def opened(path: str) -> OpenFile:
    """Raises OSError."""
    identity = _identity(path)  # which may take long on a network's disk
    with _kept.lock:
        return _kept.files(path, identity)


def opened_hdf5(path: str, dataset: str) -> ImageRows:
    """Raises ModelError or OSError."""
    identity = _identity(path)
    with _kept.lock:
        return _kept.rows(path, dataset, identity)


def reason(error: Exception) -> str:
    """What is wrong, after the name of a file."""
    if isinstance(error, OSError):
        return f"cannot be read: {error.strerror or error}"
    return str(error) or "does not fit into memory"


# ---- Tars ------------------------------------------------------------------------------------------------------------


class Member(NamedTuple):
    """Of a tar: its name there, where its bytes begin, how many they are, and why it cannot be read."""

    name: str
    start: int
    size: int
    trouble: str


class Tar(NamedTuple):
    """What is in a tar.

    members : all but folders
    labels : the texts of members KEY.cls by key
    rest : what is wrong after the last member
    """

    members: list[Member]
    labels: dict[str, str]
    rest: str


def read_tar(path: str) -> Tar:
    """All headers of a tar, and labels."""
    found = Tar([], {}, "")
    try:
        file = opened(path)
        for member in _members(file):
            name, start, size, trouble = member
            if name.endswith(".cls") and not trouble and size <= _MAX_LABEL:
                found.labels[name[:-4]] = file.read(start, size).decode("utf-8", "replace").strip()
            else:
                found.members.append(member)
    except (ModelError, OSError) as error:
        return found._replace(rest=reason(error))
    return found


def _members(file: OpenFile) -> Iterator[Member]:
    """All members of a tar but folders; ModelError for what cannot be. Not by tarfile's loop, which takes a damaged
    header for the end, reads headers of any size, and takes three times as long.
    """
    at = 0
    name, said = "", dict[str, str]()  # of the next member, before its header
    while True:
        header = file.read(at, tarfile.BLOCKSIZE)
        if header == bytes(tarfile.BLOCKSIZE):
            if file.read(at, _MAX_HEADER).strip(b"\0"):
                raise ModelError(f"has more after its end at byte {at}, as tars that were written one after the other "
                                 "have; required: single ones")
            return
        if len(header) < tarfile.BLOCKSIZE:
            raise ModelError(f"ends at byte {file.size} without a tar's end: it is cut off")
        size, kind = _octal(header[124:136]), header[156:157]
        if sum(header) - sum(header[148:156]) + 8 * ord(" ") != _octal(header[148:156]):
            raise ModelError(f"has no sound header at byte {at}: it is damaged, or no tar")
        at += tarfile.BLOCKSIZE
        if kind in _BEFORE:
            if not 0 <= size <= _MAX_HEADER:
                raise ModelError(f"has {size} bytes of names or attributes before byte {at}; at most {_MAX_HEADER} are "
                                 "accepted")
            body = file.read(at, size)
            if kind == tarfile.GNUTYPE_LONGNAME:
                name = _text(body)
            elif kind in (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE):
                said = _attributes(body)
            at += _padded(size)
            continue
        name = said.get("path") or name or _name(header)
        is_folder = kind == tarfile.DIRTYPE or (kind == tarfile.AREGTYPE and name.endswith("/"))
        is_sparse = kind == tarfile.GNUTYPE_SPARSE or any(key.startswith("GNU.sparse.") for key in said)
        if kind in _WITHOUT_BYTES or is_folder:  # whatever they say
            size = 0
        elif "size" in said:
            size = int(said["size"]) if re.fullmatch("[0-9]{1,19}", said["size"]) else -1
        is_extended = kind == tarfile.GNUTYPE_SPARSE and header[482]
        while is_extended:
            extension = file.read(at, tarfile.BLOCKSIZE).ljust(tarfile.BLOCKSIZE, b"\0")
            at, is_extended = at + tarfile.BLOCKSIZE, extension[504]
        if not 0 <= size <= file.size - at:
            raise ModelError(f"says that member {name[:200]!r} has {size} bytes from byte {at} on, and has {file.size} "
                             "itself: it is cut off or damaged")
        trouble = ""
        if is_sparse or kind not in tarfile.REGULAR_TYPES:
            what = "sparse" if is_sparse else _WITHOUT_BYTES.get(kind, "of an unknown kind")
            trouble = f"is {what} in the tar; required: a regular member"
        elif size > _MAX_BYTES:
            trouble = f"has {size} bytes; at most {_MAX_BYTES} are accepted"
        if not is_folder:
            yield Member(name, at, size, trouble)
        at += _padded(size)
        name, said = "", {}


def _octal(field: bytes) -> int:
    """A number of a header, -1 where it is none. Large ones are written as bytes."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    try:
        return int(field.partition(b"\0")[0].strip() or b"0", 8)
    except ValueError:
        return -1


def _text(field: bytes) -> str:
    return field.partition(b"\0")[0].decode("utf-8", "surrogateescape")


def _name(header: bytes) -> str:
    name, is_posix = _text(header[:100]), header[257:263] == b"ustar\0"
    return f"{_text(header[345:500])}/{name}" if is_posix and header[345] else name


def _padded(size: int) -> int:
    return -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE


def _attributes(records: bytes) -> dict[str, str]:
    """Of the next member, as POSIX's pax has them: length, key and value."""
    found: dict[str, str] = {}
    at = 0
    while at < len(records) and records[at]:
        digits = records[at:at + 8].partition(b" ")[0]
        length = int(digits) if digits.isdigit() else 0
        key, equals, value = records[at + len(digits) + 1:at + length - 1].partition(b"=")
        if not equals or not length:
            raise ModelError("has a header of attributes that is damaged")
        found[key.decode("utf-8", "replace")] = value.decode("utf-8", "surrogateescape")
        at += length
    return found


# ---- HDF5 ------------------------------------------------------------------------------------------------------------


class ImageRows:
    """The images of a dataset, read one by one by any thread.

    Attributes
    ----------
    name : the dataset's
    count : how many there are
    """

    def __init__(self, path: str, name: str) -> None:
        """Raises ModelError or OSError."""
        file = opened(path)
        with open_to_read(path) as stream, hdf5.opened(stream, "images in HDF5", _STRUCTURE_BYTES) as outermost:
            content = outermost.content
            found = dict(_datasets(outermost))
            self.name = name or _only_dataset(found)
            if self.name not in found:
                raise ModelError(f"has no dataset {self.name!r}; its datasets: {_listed_datasets(found)}")
            data = hdf5.dataset(found[self.name], self.name, (3, 4), 2**50, _MAX_CHUNKS)
            shape = data.shape or ()
            self._axes = _axes(data, self.name)
            self.count = shape[0]
            if self.count > content.size:
                raise ModelError(f"{self.name} claims {self.count} images in a file of {content.size} bytes: it is "
                                 "damaged")
            pixels = math.prod(shape[1:]) // (1 if len(shape) == 3 else shape[self._axes[2] + 1])
            if pixels > images.MAX_PIXELS:
                raise ModelError(f"{self.name} has images of {pixels} pixels; at most {images.MAX_PIXELS} are accepted")
            begin = content.begin
            self._rows = hdf5_storage.Rows(data, lambda start, count: file.read(begin + start, count))

    def __getitem__(self, row: int) -> npt.NDArray[np.uint8]:
        """uint8 (H, W), (H, W, 3) or (H, W, 4)."""
        pixels = self._rows[row].transpose(self._axes)
        return pixels[..., 0] if pixels.shape[2:] == (1,) else pixels


def _datasets(outermost: hdf5_format.Object) -> Iterator[tuple[str, hdf5_format.Object]]:
    """All of a file by their names, each once; what links elsewhere is left out."""
    waiting, seen = [("", outermost)], {outermost.address}
    while waiting:
        where, group = waiting.pop()
        for link in hdf5_format.links(group):
            if link.address is None or link.address in seen:
                continue
            seen.add(link.address)
            if len(seen) > _MAX_OBJECTS:
                raise ModelError(f"holds more than {_MAX_OBJECTS} objects; required: a file for the images alone")
            child, name = hdf5_format.Object(group.content, link.address), f"{where}/{hdf5.text(link.name, where)}"
            kind = hdf5.kind(child, name)
            if kind == "group":
                waiting.append((name, child))
            elif kind == "dataset":
                yield name, child


def _only_dataset(found: dict[str, hdf5_format.Object]) -> str:
    """The name of the only dataset of images."""
    fitting = []
    for name, child in found.items():
        with contextlib.suppress(ModelError):  # of what is read of no dataset
            data = hdf5_storage.Dataset(child)
            if _is_of_images(data):
                fitting.append(name)
    if len(fitting) != 1:
        raise ModelError(
            f"has the datasets of images {', '.join(sorted(fitting))[:1000]}; required: which one, as FILE:/DATASET"
            if fitting else f"has no dataset of images, which are {_IMAGES}; its datasets: {_listed_datasets(found)}")
    return fitting[0]


def _listed_datasets(found: dict[str, hdf5_format.Object]) -> str:
    told = []
    for name, child in sorted(found.items())[:20]:
        try:
            data = hdf5_storage.Dataset(child)
            told.append(f"{name}, {data.datatype.kind} {data.shape}")
        except ModelError as error:
            told.append(f"{name}, which {error}")
    return "; ".join(told) or "none"


def _is_of_images(data: hdf5_storage.Dataset) -> bool:
    shape = data.shape or (0,)
    return data.datatype.numpy == np.uint8 and data.datatype.kind == "Integer" and 0 not in shape and (
        len(shape) == 3 or (len(shape) == 4 and (shape[3] in _LAST or shape[1] in _FIRST)))


def _axes(data: hdf5_storage.Dataset, name: str) -> tuple[int, ...]:
    """How an image's axes are to be moved to be (H, W) or (H, W, C)."""
    shape = data.shape or ()
    if not _is_of_images(data):
        raise ModelError(f"{name} is {data.datatype.kind} of {data.datatype.size} bytes and shape {shape}; required: "
                         f"{_IMAGES}")
    if len(shape) == 3:
        return 0, 1
    if shape[3] in _LAST and shape[1] in _FIRST:
        raise ModelError(f"{name} has shape {shape}, whose channels may be first or last; required: images whose sides "
                         "cannot be taken for channels")
    return (0, 1, 2) if shape[3] in _LAST else (1, 2, 0)


def read_labels(path: str, name: str, count: int) -> list[str]:
    """Of the dataset beside `count` images, where there is one; none where there is none."""
    with open_to_read(path) as stream, hdf5.opened(stream, "images in HDF5", _STRUCTURE_BYTES) as outermost:
        return _labels(dict(_datasets(outermost)), name, count)


def _labels(found: dict[str, hdf5_format.Object], name: str, count: int) -> list[str]:
    group = name.rpartition("/")[0]
    names = [f"{group}/{one}" for one in ("label", "labels") if f"{group}/{one}" in found]
    if not names:
        return []
    if len(names) > 1:
        raise ModelError(f"has both {names[0]} and {names[1]}; required: one of them")
    [where] = names
    data = hdf5.dataset(found[where], where, (1,), 2**32, _MAX_CHUNKS)
    if data.shape != (count,):
        raise ModelError(f"{where} has shape {data.shape}; required: ({count},), a label for each image")
    texts: Iterable[str]
    if data.datatype.kind == "String":
        texts = map(printable, hdf5.strings(found[where], where, count, _MAX_LABEL_BYTES))
    elif data.datatype.numpy.kind in "iu":
        try:
            texts = map(str, hdf5_storage.elements(data).tolist())
        except ModelError as error:
            raise ModelError(f"{where} {error}") from None
    else:
        raise ModelError(f"{where} is of HDF5 type {data.datatype.kind}; required: integers or strings")
    return list(texts)
