"""Image sets: what their images are, found without opening them, and one image of them.

A set is made of pictures, folders, globs, lists, HDF5 files and tars. None of these is trusted: names are made safe to
write results under, sizes are compared with the file's, and what is wrong with one image is told of that image alone.
"""

from __future__ import annotations

import csv
import errno
import fnmatch
import io
import itertools
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from fastdtd import hdf5_format, images
from fastdtd.errors import InputError, ModelError, PictureError
from fastdtd.files import as_path, open_to_read
from fastdtd.image_files import opened, opened_hdf5, read_labels, read_tar, reason

REQUIRED = ("a picture, a folder of pictures, a glob, a list (.txt, .csv), an HDF5 file of images (FILE.h5 or "
            "FILE.h5:/DATASET) or a tar of pictures")
_DRAWN = (".heatmap.png", ".overlay.png")
_UNPRINTABLE = re.compile("[\0-\x1f\x7f-\x9f\ud800-\udfff]")  # the last ones stand for bytes that are no UTF-8
_HDF5_SUFFIXES = (".h5", ".hdf5", ".hdf")
_LISTS = (".txt", ".csv")
_DATASET = re.compile(rf"(.+(?:{'|'.join(map(re.escape, _HDF5_SUFFIXES))})):[/\\](.+)", re.IGNORECASE | re.DOTALL)
_MAGIC = re.compile(r"[*?\[]")
_BRACES = re.compile(r"\{(?:(\d{1,18})\.\.(\d{1,18})|([^{}]*,[^{}]*))\}")  # {000..999}, {a,b}
_PACKED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\0": "xz", b"\x28\xb5\x2f\xfd": "zstd", b"PK\3\4": "zip",
           b"7z\xbc\xaf\x27\x1c": "7-Zip", b"Rar!\x1a\7": "RAR"}
# Headers of columns, without "_" and spaces
_PATHS = {"path", "file", "filename", "filepath", "image", "imagepath", "imagefile"}
_LABELS = {"target", "label", "class", "classname"}
_MAX_LINE = 2**16  # characters of a list


@dataclass(frozen=True, slots=True)
class Entry:
    """An image of a set.

    Attributes
    ----------
    path : str
        The file that holds it.
    name : str
        Under which its results go: relative, printable, no other image's of the set.
    label : str
        Its true class, as the source has it: a number or a name; "" where the source has none.
    member : int
        Of a tar's image: where its bytes begin. Of an HDF5 file's: its row. Else -1.
    size : int
        Of a tar's image: how many bytes it has. Else -1.
    trouble : str
        Why it cannot be read, where that is known already.
    dataset : str
        Of an HDF5 file's image: the dataset's name.
    """

    path: str
    name: str
    label: str = ""
    member: int = -1
    size: int = -1
    trouble: str = ""
    dataset: str = ""


def find(sources: Iterable[str | os.PathLike[str]], labels: bool = False) -> list[Entry]:
    """The images of `sources`, in order.

    Parameters
    ----------
    sources : iterable of paths
        Each one of

        - a picture file;
        - a folder: the files in it and below it whose names end like a picture's, in order. Hidden files, and what an
          earlier run drew, are left out, links to folders are not followed;
        - a glob with ``*``, ``?``, ``[...]`` and ``**``, or braces, ``{000..123}`` and ``{a,b}``, where no file has
          that very name. Files that it matches are taken where they end like a picture's, or as the glob itself does;
        - a list: text (.txt) with a path a line, or a path, a tab and a label; or a table (.csv) with a header that
          names its columns, such as path and label, or without, paths first. Paths are relative to the list's folder;
        - an HDF5 file, as FILE or FILE:/DATASET: uint8 (N, H, W), (N, H, W, C) with C = 1, 3 or 4, or (N, C, H, W) with
          C = 1 or 3. A dataset ``label`` or ``labels`` beside it has integers or strings;
        - a tar, not compressed: pictures, and KEY.cls beside KEY.jpg with its label, as WebDataset has them.

        A file is taken once, whatever links lead to it; of lists every line counts.
    labels : bool
        The folders in which pictures are, of those next below a source, are their labels.

    Returns
    -------
    list of Entry
        What is known to be unreadable is among them, with its trouble.

    Raises
    ------
    InputError
        What is wrong with a source as a whole: it does not exist, has no image, or is not understood.
    """
    finder = _Finder(labels)
    for source in sources:
        finder.add(str(as_path(source, InputError, REQUIRED)))
    if not finder.entries:
        raise InputError(f"no source was given; required: {REQUIRED}")
    return finder.entries


class _Finder:
    def __init__(self, labels: bool) -> None:
        self.entries: list[Entry] = []
        self._labels = labels
        # What was found: real folders that were walked, and of others the files in them.
        self._walked: set[str] = set()
        self._single: dict[str, set[str]] = {}
        self._real: dict[str, str] = {}  # the real folders of single files
        self._known: dict[str, str] = {}  # labels, so that there is one object for each
        self._taken: dict[str, int] = {}  # names, and how many images were to have each
        self._is_empty = True

    def add(self, source: str) -> None:
        self._is_empty = True
        for path, base, dataset in _expanded(source):
            if dataset:
                self._hdf5(path, dataset)
            elif os.path.isdir(path):  # unlike Path.is_dir, False for a name that is too long
                self._folder(path, path if base is None else base)
            else:
                kind = _kind(path)
                if kind == "picture":
                    self._picture(path, os.path.dirname(path) if base is None else base)
                else:
                    {"list": self._list, "tar": self._tar, "HDF5": self._hdf5}[kind](path)
        if self._is_empty:
            raise InputError(f"no picture was found in {source}; files looked for end in {' '.join(images.SUFFIXES)}")

    def _append(self, path: str, name: str, label: str = "", member: int = -1, size: int = -1, trouble: str = "",
                dataset: str = "") -> None:
        label = self._known.setdefault(label, _printable(label))
        self.entries.append(Entry(path, self._free(_printable(name)), label, member, size, trouble, dataset))
        self._is_empty = False

    def _free(self, name: str) -> str:
        """The name, or where another image has it, the name with a number."""
        number = self._taken.get(name, 0) + 1
        free = name
        while free in self._taken:
            free = f"{name}-{number}"
            number += free in self._taken
        self._taken[name] = number
        self._taken.setdefault(free, 1)
        return free

    def _is_new(self, path: str, part: str = "") -> bool:
        """Whether a file is found for the first time; or a part of it."""
        self._is_empty = False
        folder, name = os.path.split(path)
        if os.path.islink(path) and os.path.exists(path):
            folder, name = os.path.split(os.path.realpath(path))
        else:
            if folder not in self._real:
                self._real[folder] = os.path.realpath(folder)
            folder = self._real[folder]
        if folder in self._walked and _is_picture(name):
            return False
        names = self._single.setdefault(folder, set())
        before = len(names)
        names.add(name + part)
        return len(names) > before

    # ---- Pictures and folders ----------------------------------------------------------------------------------------

    def _picture(self, path: str, base: str) -> None:
        if self._is_new(path):
            name = path[len(os.path.join(base, "")):].replace(os.sep, "/")
            self._append(path, name, self._label_of(path, name))

    def _label_of(self, path: str, name: str) -> str:
        if not self._labels:
            return ""
        label, _, below = name.partition("/")
        if not below:
            raise InputError(f"{path!r} is in no folder below the source, whose name would be its label; required: "
                             "pictures as SOURCE/LABEL/PICTURE")
        return label

    def _folder(self, source: str, base: str) -> None:
        """Pictures in a folder and below it, in order. Not by recursion: folders may be any number deep."""
        strip = len(os.path.join(base, ""))
        real = os.path.realpath(source)
        stack = [(real, self._listed(source, real, os.path.basename(real)))]
        while stack:
            folder, entries = stack[-1]
            single = self._single.get(folder, ())
            for entry in entries:
                name = entry.path[strip:].replace(os.sep, "/")
                is_link = entry.is_symlink()
                if not is_link and entry.is_dir(follow_symlinks=False):
                    below = os.path.join(folder, entry.name)
                    stack.append((below, self._listed(entry.path, below, name)))
                    break
                if not _is_picture(entry.name) or (is_link and os.path.isdir(entry.path)):
                    continue
                self._is_empty = False
                if self._is_new(entry.path) if is_link and os.path.exists(entry.path) else entry.name not in single:
                    self._append(entry.path, name, self._label_of(entry.path, name))
            else:
                stack.pop()

    def _listed(self, folder: str, real: str, name: str) -> Iterator[os.DirEntry[str]]:
        """What is in a folder, in order; nothing where it was walked before."""
        if real in self._walked:
            self._is_empty = False
            return iter(())
        self._walked.add(real)
        try:
            with os.scandir(folder) as entries:
                listed = [entry for entry in entries if not entry.name.startswith(".")]
        except OSError as error:
            self._append(folder, name, trouble=f"folder {folder!r} cannot be read: {error.strerror}")
            return iter(())
        return iter(sorted(listed, key=lambda entry: entry.name))

    # ---- Lists -------------------------------------------------------------------------------------------------------

    def _list(self, path: str) -> None:
        folder = os.path.dirname(path)
        count, missing, first = 0, 0, ""
        for number, given, label in _listed_files(path, folder):
            file = os.path.join(folder, given)
            count += 1
            trouble = ""
            if not given or not os.path.lexists(file):
                what = f"picture {file!r} does not exist, which is" if given else "no path is"
                trouble = f"{what} in line {number} of {path!r}"
                missing += 1
                first = first or given
            name = given[len(folder) + 1:] if folder and given.startswith(folder + os.sep) else given
            self._append(file, _relative(name), label, trouble=trouble)
        if count == missing:
            found = f"of the {count} files that it names none exists, such as {first!r}" if count else "it has no line"
            raise InputError(f"list {path!r} cannot be used: {found}; required: a path a line, relative to the list's "
                             "folder, and with a label after a tab (.txt) or a comma (.csv)")

    # ---- HDF5 --------------------------------------------------------------------------------------------------------

    def _hdf5(self, path: str, dataset: str = "") -> None:
        try:
            file = opened_hdf5(path, dataset)
            labels = read_labels(path, file.name, file.count)
        except (ModelError, OSError) as error:
            raise InputError(f"HDF5 file {path!r} {reason(error)}") from None
        if not self._is_new(path, part=f":{file.name}"):
            return
        stem, digits = _relative(Path(path).stem), len(str(file.count - 1))
        for row in range(file.count):
            self._append(path, f"{stem}/{row:0{digits}d}", labels[row] if labels else "", row,
                         dataset=file.name)

    # ---- Tars --------------------------------------------------------------------------------------------------------

    def _tar(self, path: str) -> None:
        if not self._is_new(path):
            return
        stem = _relative(Path(path).stem)
        tar = read_tar(path)
        count = len(self.entries)
        for name, start, size, trouble in tar.members:
            folder, last = os.path.split(name)
            if not _is_picture(last) or any(part.startswith(".") for part in _relative(folder).split("/")):
                continue
            # WebDataset's keys end at the first dot, so that more than one picture may have a label.
            keys = name[:name.rindex(".")], os.path.join(folder, last.partition(".")[0])
            label = next((tar.labels[key] for key in keys if key in tar.labels), "")
            self._append(path, f"{stem}/{_relative(name)}", label, start, size,
                         f"picture {name!r} in {path!r} {trouble}" if trouble else "")
        if len(self.entries) == count:
            raise InputError(f"tar {path!r} {tar.rest or 'has no picture'}; required: a tar of pictures, not "
                             f"compressed, whose names end in {' '.join(images.SUFFIXES)}")
        if tar.rest:
            self._append(path, f"{stem}/rest", trouble=f"tar {path!r} {tar.rest}")


# ---- Names -----------------------------------------------------------------------------------------------------------


def _is_picture(name: str) -> bool:
    """By a file's name: neither hidden nor drawn by an earlier run."""
    lower = name.lower()
    return lower.endswith(images.SUFFIXES) and not name.startswith(".") and not name.endswith(_DRAWN)


def _printable(name: str) -> str:
    return name if name.isprintable() else _UNPRINTABLE.sub(lambda match: ascii(match[0])[1:-1], name)


def _relative(name: str) -> str:
    """A name out of a list or tar, or of any file, as one that leads nowhere but below a folder."""
    if os.name == "nt":
        name = name.replace("\\", "/").replace(":", "_")
    return "/".join(part for part in name.split("/") if part not in ("", ".", "..")) or "picture"


def _is_named_somewhere(path: str) -> bool:
    """Whether there is something of this name, or may be one in a folder that cannot be read."""
    try:
        os.lstat(path)
    except OSError as error:
        return error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG)
    except ValueError:  # a NUL
        return False
    return True


def _expanded(source: str) -> Iterator[tuple[str, str | None, str]]:
    """(path, folder to which its name is relative, dataset) of all that a source names; the folder is None where it is
    no glob."""
    if _is_named_somewhere(source):
        yield source, None, ""
        return
    within = _DATASET.fullmatch(source)
    pattern, dataset = (within[1], "/" + within[2].replace(os.sep, "/").strip("/")) if within else (source, "")
    for name in _without_braces(pattern):
        if _is_named_somewhere(name):
            yield name, None, dataset
        elif _MAGIC.search(name):
            base, matches = _matching(name)
            if not matches:
                raise InputError(f"nothing matches {name!r}; required: {REQUIRED}")
            for path in matches:
                yield path, base, dataset
        else:
            of = f", of {source!r}," if name != source else ""
            raise InputError(f"{name!r}{of} does not exist; required: {REQUIRED}")


def _without_braces(pattern: str) -> Iterator[str]:
    match = _BRACES.search(pattern)
    if match is None:
        yield pattern
        return
    first, last, words = match.groups()
    choices: Iterable[str] = words.split(",") if words is not None else ()
    if words is None:
        width = max(len(first), len(last)) if first[0] == "0" or last[0] == "0" else 0
        step = 1 if int(first) <= int(last) else -1
        choices = (f"{number:0{width}d}" for number in range(int(first), int(last) + step, step))
    for choice in choices:
        yield from _without_braces(pattern[:match.start()] + choice + pattern[match.end():])


def _matching(pattern: str) -> tuple[str, list[str]]:
    """The folder of a glob before its first wildcard, and what it matches, in order. "**" follows no links."""
    path = Path(pattern)
    first = next(i for i, part in enumerate(path.parts) if _MAGIC.search(part))
    base, parts = str(Path(*path.parts[:first])), path.parts[first:]
    tests = [re.compile(fnmatch.translate(part)).match for part in parts]
    found: set[str] = set()
    waiting, seen = [(base, 0)], set()
    while waiting:
        folder, at = step = waiting.pop()
        if at == len(parts):
            found.add(folder)
            continue
        if step in seen:
            continue
        seen.add(step)
        is_last, is_deep = at + 1 == len(parts), parts[at] == "**"
        if is_deep:
            waiting.append((folder, at + 1))
        elif not _MAGIC.search(parts[at]):
            if _is_named_somewhere(below := os.path.join(folder, parts[at])):
                waiting.append((below, at + 1))
            continue
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    if entry.name.startswith(".") and not parts[at].startswith("."):
                        continue
                    if is_deep:
                        if entry.is_dir(follow_symlinks=False):
                            waiting.append((entry.path, at))
                    elif tests[at](entry.name):
                        if not is_last:
                            waiting.append((entry.path, at + 1))
                        elif _is_wanted(entry.name, parts[at]) or os.path.isdir(entry.path):
                            found.add(entry.path)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError:  # which is told when it is searched
            found.add(folder)
    return base, sorted(found)


def _is_wanted(name: str, pattern: str) -> bool:
    """Whether a file that a glob matches is meant: "photos/*" may match notes, too."""
    suffix = os.path.splitext(name)[1].lower()
    return _is_picture(name) if suffix in images.SUFFIXES else bool(suffix) and pattern.lower().endswith(suffix)


def _kind(path: str) -> str:
    """"picture", "list", "tar" or "HDF5": by the name, and where that does not say it, by the first bytes."""
    suffix = os.path.splitext(path)[1].lower()
    if suffix in images.SUFFIXES:
        return "picture"
    if suffix in _LISTS:
        return "list"
    try:
        with open_to_read(path) as file:
            start = file.read(512)
    except (OSError, ValueError):  # which is told when it is read
        start = b""
    for magic, name in _PACKED.items():
        if start.startswith(magic):
            raise InputError(f"{path!r} is compressed ({name}), so that single pictures cannot be read from it; "
                             "required: unpack it first, to a folder or a tar")
    if start.startswith(hdf5_format.SIGNATURE) or suffix in _HDF5_SUFFIXES:
        return "HDF5"
    return "tar" if start[257:262] == b"ustar" or suffix == ".tar" else "picture"


# ---- Lists -----------------------------------------------------------------------------------------------------------


def _listed_files(path: str, folder: str) -> Iterator[tuple[int, str, str]]:
    """Line, path and label of each file in a list."""
    try:
        with open_to_read(path) as file:
            if file.peek(2)[:2] in (b"\xff\xfe", b"\xfe\xff"):
                raise InputError(f"list {path!r} is in UTF-16; required: UTF-8")
            is_text = path.lower().endswith(".txt")
            # Names that are no UTF-8 are those of files nevertheless.
            with io.TextIOWrapper(file, "utf-8-sig", "surrogateescape", newline=None if is_text else "") as text:
                lines = _lines(text, path)
                if is_text:
                    for number, line in enumerate(lines, 1):
                        given, _, label = line.rstrip("\n").partition("\t")
                        if given or label:
                            yield number, given, label.strip()
                else:
                    yield from _table(lines, path, folder)
    except OSError as error:
        raise InputError(f"list {path!r} {reason(error)}") from None


def _lines(text: io.TextIOWrapper, path: str) -> Iterator[str]:
    for number in itertools.count(1):
        line = text.readline(_MAX_LINE + 1)
        if len(line) > _MAX_LINE:
            raise InputError(f"list {path!r} has a line {number} of more than {_MAX_LINE} characters; required: a path "
                             "a line")
        if not line:
            return
        yield line


def _table(lines: Iterator[str], path: str, folder: str) -> Iterator[tuple[int, str, str]]:
    first = next((line for line in lines if line.strip()), "")
    delimiter = next((one for one in ",;\t" if one in first), ",")
    rows = csv.reader(itertools.chain([first], lines), delimiter=delimiter, strict=True)
    try:
        header = next(rows, [])
        names = [re.sub(r"[\s_]", "", name).lower() for name in header]
        files, labels = ([i for i, name in enumerate(names) if name in known] for known in (_PATHS, _LABELS))
        given = header[files[0] if files else 0] if header else ""
        is_header = bool(files or labels) and not (given and os.path.lexists(os.path.join(folder, given)))
        if is_header and (len(files) != 1 or len(labels) > 1):
            raise InputError(f"list {path!r} has the columns {', '.join(header)[:200]}; required: one that is named "
                             "path or file, and at most one that is named label, target or class")
        if not is_header and len(header) > 2:
            raise InputError(f"list {path!r} has {len(header)} columns and no header that says which is what; "
                             "required: a first line that names one path, and one label")
        columns = len(header)
        at, label_at = (files[0], labels[0] if labels else columns) if is_header else (0, 1)
        for row in rows if is_header else itertools.chain([header], rows):
            if len(row) > columns:
                raise InputError(f"list {path!r} has {len(row)} columns in line {rows.line_num}; required: {columns}, "
                                 "as in its first line, and quotes around what has a comma")
            if row:
                filled = row + [""] * (columns + 2 - len(row))
                yield rows.line_num, filled[at], filled[label_at].strip()
    except csv.Error as error:
        raise InputError(f"list {path!r} is no CSV from line {rows.line_num} on: {error}; required: quotes that are "
                         "closed, and doubled within quotes") from None


def open_image(entry: Entry, draft: tuple[int, int] | None = None) -> Image.Image:
    """An image of a set: upright RGB of 8 bits, as `images.open_picture` gives it. For any number of threads at once.

    Parameters
    ----------
    entry : Entry
        From `find`.
    draft : (height, width), optional
        JPEGs are decoded at the smallest of 1/8, 1/4, 1/2 and 1 of their size that is not below this.

    Raises
    ------
    PictureError
        Whatever is wrong with it.
    """
    if entry.trouble:
        raise PictureError(entry.trouble)
    if entry.member < 0:
        return images.open_picture(entry.path, draft)
    try:
        if entry.dataset:
            name = f"row {entry.member} of {entry.dataset!r} in {entry.path!r}"
            return images.open_picture(opened_hdf5(entry.path, entry.dataset)[entry.member])
        name = f"picture {entry.name!r} in {entry.path!r}"
        content = opened(entry.path).read(entry.member, entry.size)
    except (ModelError, OSError, MemoryError) as error:
        raise PictureError(f"{name} {reason(error)}") from None
    if len(content) < entry.size:
        raise PictureError(f"{name} has {entry.size} bytes of which {len(content)} are left: the tar was cut off")
    return images.open_bytes(content, name, draft)
