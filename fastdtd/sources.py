"""Image sets: what their images are, found without opening them, and one image of them.

A set is made of pictures, folders, globs, lists, HDF5 files and tars. None of these is trusted: names are made safe to
write results under, sizes are compared with the file's, and what is wrong with one image is told of that image alone.
"""

from __future__ import annotations

import os, re, errno
from pathlib import Path
from collections.abc import Iterator
from collections.abc import Iterable
from dataclasses import dataclass

from PIL import Image

from fastdtd import images
from fastdtd.errors import PictureError, InputError


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


_DRAWN = (".heatmap.png", ".overlay.png")
_UNPRINTABLE = re.compile("[\0-\x1f\x7f-\x9f\ud800-\udfff]")
@dataclass(frozen=True)
class Picture:
    path: Path
    name: str
    trouble: str = ""
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



def find(sources, labels=False):
    return [Entry(str(p.path), p.name, trouble=p.trouble) for p in find_pictures(sources)]


def open_image(entry: Entry, draft: tuple[int, int] | None = None) -> Image.Image:
    if entry.trouble:
        raise PictureError(entry.trouble)
    return images.open_picture(entry.path)
