"""Pictures in: any file or array that people have -> 8-bit pixels of the network's size.

Files are not trusted: only formats that Pillow decodes by itself are opened, and sizes are checked before pixels are
decoded.
"""

from __future__ import annotations

import contextlib
import os
import threading
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from fastdtd.errors import PictureError

MAX_PIXELS = 100_000_000  # of one picture, decoded: 300 MB
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")  # none that runs another program, as EPS does
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")

_filters = threading.Lock()


def read(picture: Any, shape: tuple[int, int, int], color: str, resize: str) -> npt.NDArray[np.uint8]:
    """Pixels (C, H, W) 0..255 of a picture (see `open_picture`) at the network's size and in its order of channels."""
    fitted = fit(open_picture(picture), shape[1:], resize)
    if color == "gray":
        return np.asarray(fitted.convert("L"))[None]
    pixels = np.asarray(fitted).transpose(2, 0, 1)
    return pixels[::-1] if color == "bgr" else pixels


def open_picture(picture: Any) -> Image.Image:
    """An upright RGB image of 8 bits.

    Parameters
    ----------
    picture : path, PIL image, or uint8 array (H, W), (H, W, 3) or (H, W, 4)
        Transparent parts are laid over white, 16-bit grey is reduced to 8 bits, of an animation the first frame is
        taken.

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
        pixels = picture.ndim == 2 or (picture.ndim == 3 and picture.shape[2] in (3, 4))
        if picture.dtype != np.uint8 or not pixels:
            raise PictureError(
                f"the array has type {picture.dtype} and shape {picture.shape}; required: uint8 pixels (H, W), (H, W, "
                "3) or (H, W, 4), red first")
    else:
        raise PictureError(
            f"a picture of type {type(picture).__name__} was given; required: a path, a PIL image or a uint8 array")
    try:
        if isinstance(picture, Image.Image):
            return _upright_rgb(picture, name)
        if isinstance(picture, np.ndarray):
            return _upright_rgb(Image.fromarray(picture), name)
        with _opened(picture) as image:
            return _upright_rgb(image, name)
    except PictureError:
        raise
    except FileNotFoundError:
        raise PictureError(f"{name} does not exist") from None
    except IsADirectoryError:
        raise PictureError(f"{name} is a folder; required: a file") from None
    except Image.DecompressionBombError:
        raise PictureError(f"{name} is too large; at most {MAX_PIXELS} pixels are accepted") from None
    except UnidentifiedImageError:
        raise PictureError(f"{name} is damaged, or not in a known format ({', '.join(FORMATS)})") from None
    except Exception as error:  # decoders raise whatever their format's damage leads to
        raise PictureError(f"{name} cannot be read: {str(error) or type(error).__name__}") from None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No warnings of Pillow's.

    Filters belong to the whole process: two threads that set them at once would mix them up.
    """
    with _filters, warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")
        yield


def _opened(path: str | os.PathLike[str]) -> Image.Image:
    with _quiet():
        return Image.open(path, formats=FORMATS)


def _upright_rgb(image: Image.Image, name: str) -> Image.Image:
    if not 0 < image.width * image.height <= MAX_PIXELS:
        raise PictureError(f"{name} has {image.width} x {image.height} pixels; 1 to {MAX_PIXELS} are accepted")
    image.load()
    with _quiet():  # after load, so that threads decode at the same time
        image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        raise PictureError(
            f"{name} holds floating-point pixels, whose range is unknown; required: 8 or 16 bits a channel")
    if image.mode.startswith("I"):  # 16-bit grey
        image = Image.fromarray((np.clip(np.asarray(image, np.int32), 0, 65535) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


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
