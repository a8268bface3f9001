"""Pictures in: any file or array that people have -> 8-bit pixels of the network's size.

Files are not trusted: only formats that Pillow decodes by itself are opened, and sizes are checked before pixels are
decoded.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import threading
import warnings
from collections.abc import Iterator
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from fastdtd.errors import PictureError
from fastdtd.files import open_to_read

MAX_PIXELS = 100_000_000  # of one picture: 400 MB in Pillow's memory, and as much again while it is turned upright
MAX_ANIMATED = 25_000_000  # of a WebP animation, whose first frame takes as long as four pictures of its size
MAX_SCANNED = 10 * MAX_PIXELS  # pixels times scans of a JPEG; progressive ones have about ten scans
MIN_SCANS = 20  # that one of any size may have
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")  # none that runs another program, as EPS does
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")

_JPEGS = ("JPEG", "MPO")
_TURNED = (5, 6, 7, 8)  # EXIF's orientations that exchange width and height
_GREY_STEPS = {"1": 255, "L;2": 85, "L;4": 17}  # what Pillow multiplies a PNG's grey of fewer bits by


class _Quiet(threading.local):
    """Within it, what Pillow warns of in this thread is not shown.

    Filters of warnings belong to the whole process, and none may be set and unset while others use them. So one is put
    before all others that matches in threads which ask for it alone. It stays, and is nothing to others.
    """

    asked = False
    # scikit-learn copies filters, whose patterns it takes to be regular expressions, to threads and processes of its
    # own. There they match nothing.
    pattern = "(?!)"

    def match(self, module: str) -> bool:
        """What filters ask of a pattern of modules' names."""
        return self.asked and module.startswith("PIL.")

    def __reduce__(self) -> tuple[Any, ...]:
        return re.compile, (self.pattern, )

    def __enter__(self) -> None:
        filters: Any = warnings.filters
        if not filters or filters[0] is not _PILLOWS:  # others may have been put before it, or all removed
            filters.insert(0, _PILLOWS)
        self.asked = True

    def __exit__(self, *_: object) -> None:
        self.asked = False


_quiet = _Quiet()
_PILLOWS = ("ignore", None, Warning, _quiet, 0)


def read(picture: Any, shape: tuple[int, int, int], color: str, resize: str) -> npt.NDArray[np.uint8]:
    """Pixels (C, H, W) 0..255 of a picture (see `open_picture`) at the network's size and in its order of channels."""
    fitted = fit(open_picture(picture), shape[1:], resize)
    if color == "gray":
        return np.asarray(fitted.convert("L"))[None]
    pixels = np.asarray(fitted).transpose(2, 0, 1)
    return pixels[::-1] if color == "bgr" else pixels


def open_picture(picture: Any, draft: tuple[int, int] | None = None) -> Image.Image:
    """An upright RGB image of 8 bits.

    Parameters
    ----------
    picture : path, PIL image, or uint8 array (H, W), (H, W, 3) or (H, W, 4)
        Transparent parts are laid over white, 16-bit grey is reduced to 8 bits, of an animation the first frame is
        taken.
    draft : (height, width), optional
        A JPEG file is decoded at the smallest of 1/8, 1/4, 1/2 and 1 of its size that is not below this, which takes
        less time and gives other pixels.

    Raises
    ------
    PictureError
        What cannot be read, is no picture, or is too large or empty.
    """
    if isinstance(picture, (str, os.PathLike)):
        name = f"picture {os.fspath(picture)!r}"
    elif isinstance(picture, Image.Image):
        name = "the image"
    elif isinstance(picture, np.ndarray):
        name = "the array"
        if isinstance(picture, np.ma.MaskedArray):
            raise PictureError("the array is masked; required: pixels alone, as picture.filled(255) gives them")
        pixels = picture.ndim == 2 or (picture.ndim == 3 and picture.shape[2] in (3, 4))
        if picture.dtype != np.uint8 or not pixels:
            raise PictureError(
                f"the array has type {picture.dtype} and shape {picture.shape}; required: uint8 pixels (H, W), (H, W, "
                "3) or (H, W, 4), red first")
    else:
        raise PictureError(
            f"a picture of type {type(picture).__name__} was given; required: a path, a PIL image or a uint8 array")
    with _reading(name):
        if isinstance(picture, Image.Image):
            return _upright_rgb(picture, name)
        if isinstance(picture, np.ndarray):
            return _upright_rgb(Image.fromarray(picture), name)
        try:
            with open_to_read(picture) as file:
                return _decoded(file, name, draft)
        except FileNotFoundError:
            is_link = os.path.islink(picture)
            raise PictureError(f"{name} {'is a link to what does' if is_link else 'does'} not exist") from None
        except IsADirectoryError:
            raise PictureError(f"{name} is a folder; required: a file") from None


def open_bytes(content: bytes, name: str, draft: tuple[int, int] | None = None) -> Image.Image:
    """The bytes of a picture file as `open_picture` gives the file; errors begin with `name`."""
    with _reading(name):
        return _decoded(io.BytesIO(content), name, draft)


@contextlib.contextmanager
def _reading(name: str) -> Iterator[None]:
    """Whatever goes wrong becomes a PictureError, and nothing is said of it otherwise."""
    try:
        with _quiet:
            yield
    except PictureError:
        raise
    except Image.DecompressionBombError:
        raise PictureError(f"{name} is too large; at most {MAX_PIXELS} pixels are accepted") from None
    except UnidentifiedImageError:
        raise PictureError(f"{name} is damaged, or not in a known format ({', '.join(FORMATS)})") from None
    except Exception as error:  # decoders raise whatever their format's damage leads to
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise PictureError(f"{name} cannot be read: {' '.join(reason.split())}") from None


def _decoded(file: BinaryIO, name: str, draft: tuple[int, int] | None) -> Image.Image:
    # A file that Pillow does not know by name is not mapped into memory, where one that shrinks would crash.
    with Image.open(file, formats=FORMATS) as image:
        return _upright_rgb(image, name, draft)


def _upright_rgb(image: Image.Image, name: str, draft: tuple[int, int] | None = None) -> Image.Image:
    if not 0 < image.width * image.height <= MAX_PIXELS:
        raise PictureError(f"{name} has {image.width} x {image.height} pixels; 1 to {MAX_PIXELS} are accepted")
    _require_few_scans(image, name)
    if image.format == "WEBP" and getattr(image, "is_animated", False) and image.width * image.height > MAX_ANIMATED:
        raise PictureError(f"{name} is an animation of {image.width} x {image.height} pixels; at most {MAX_ANIMATED} "
                           "are accepted")
    if draft and image.format in _JPEGS:
        is_turned = image.getexif().get(ExifTags.Base.Orientation, 1) in _TURNED
        image.draft("RGB", draft if is_turned else draft[::-1])
    tiles = getattr(image, "tile", [])  # of a file that is not yet decoded
    stored = str(tiles[0][3]) if image.format == "PNG" and tiles else ""
    image.load()
    if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        raise PictureError(
            f"{name} holds floating-point pixels, whose range is unknown; required: 8 or 16 bits a channel")
    clear = image.info.get("transparency")  # of a PNG, the one grey or colour that is, as it is stored
    if image.mode.startswith("I"):  # 16-bit grey
        values = np.asarray(image)
        grey = (np.clip(values, 0, 65535) >> 8).astype(np.uint8)
        if isinstance(clear, int):
            grey[values == clear] = 255
        image = Image.fromarray(grey)
    elif isinstance(clear, int) or (isinstance(clear, tuple) and stored == "RGB;16B"):
        image = image.copy()  # it may be the caller's
        image.info["transparency"] = min(clear * _GREY_STEPS.get(stored, 1), 255) if isinstance(clear, int) else (
            tuple(value >> 8 for value in clear))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _require_few_scans(image: Image.Image, name: str) -> None:
    """A JPEG may be made of any number of scans, each of which goes through all pixels and takes but a few bytes."""
    file = getattr(image, "fp", None)  # None once it is decoded
    if file is None or image.format not in _JPEGS:
        return
    place = file.tell()
    file.seek(0)
    scans = file.read().count(b"\xff\xda")
    file.seek(place)
    most = max(MIN_SCANS, MAX_SCANNED // (image.width * image.height))
    if scans > most:
        raise PictureError(f"{name} is a JPEG of {scans} scans; at most {most} are accepted with {image.width} x "
                           f"{image.height} pixels. Save it anew")


def fit(image: Image.Image, size: tuple[int, int], resize: str) -> Image.Image:
    """`image` at (height, width): stretched, or scaled to cover it and cut to the centre ("crop"). Bilinear."""
    return image.resize((size[1], size[0]), Image.Resampling.BILINEAR, box=visible_part(image, size, resize))


def visible_part(image: Image.Image, size: tuple[int, int], resize: str) -> tuple[float, float, float, float]:
    """(left, top, right, bottom) of what the network sees, in the picture's pixels: never beyond it, never empty."""
    width, height = image.size
    if resize == "stretch":
        return 0, 0, width, height
    # The side that is seen whole is compared in whole numbers: rounding must not lead out of the picture.
    if width * size[0] <= height * size[1]:
        top = _margin(height, width * size[0] / size[1])
        return 0, top, width, height - top
    left = _margin(width, height * size[1] / size[0])
    return left, 0, width - left, height


def _margin(length: int, seen: float) -> float:
    """What is cut off at each end of a side; at least a pixel is left, and more of one so long that its middle has no
    single pixels in float32, with which Pillow computes."""
    return max(0.0, (length - max(seen, 1, length / 2**20)) / 2)


def seen_by_network(image: Image.Image, size: tuple[int, int], resize: str, max_side: int) -> Image.Image:
    """What the network sees of a picture, in the picture's own proportions, with no side longer than `max_side`."""
    box = visible_part(image, size, resize)
    width, height = box[2] - box[0], box[3] - box[1]
    scale = min(1, max_side / max(width, height))
    shown = max(1, round(width * scale)), max(1, round(height * scale))
    return image.resize(shown, Image.Resampling.BILINEAR, box, reducing_gap=2)
