"""Image sets: what their images are, found without opening them, and one image of them.

A set is made of pictures, folders, globs, lists, HDF5 files and tars. None of these is trusted: names are made safe to
write results under, sizes are compared with the file's, and what is wrong with one image is told of that image alone.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass

from PIL import Image

from fastdtd import images
from fastdtd.errors import PictureError


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
    from fastdtd.runner import find_pictures

    return [Entry(str(p.path), p.name, trouble=p.trouble) for p in find_pictures(sources)]


def open_image(entry: Entry, draft: tuple[int, int] | None = None) -> Image.Image:
    if entry.trouble:
        raise PictureError(entry.trouble)
    return images.open_picture(entry.path)
