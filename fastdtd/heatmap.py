"""Relevance as a picture: colours, a robust scale, and a bar beside the picture that says what the colours mean."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from fastdtd.graph import Array

PERCENTILE = 99.5  # what the strongest colour stands for: a few bright pixels must not darken all others
_MIN_SIDE, MAX_SIDE = 256, 1024  # of a drawn picture: small inputs are enlarged, large photographs reduced
_BAR, _MIN_BAR, _MARGIN, _TEXT = 14, 80, 10, 13
_BLACK = 90  # of a picture under its overlay, paler than it is so that the colours stand out

_WHITE, _RED, _BLUE = (np.array(color, np.float64) for color in ((255, 255, 255), (200, 0, 0), (0, 60, 200)))
# Half-way: even steps to the eye.
_ORANGE, _SKY = np.array((255, 150, 90), np.float64), np.array((120, 170, 255), np.float64)

Pixels = npt.NDArray[np.float64]


def pixel_relevance(relevance: Array) -> Pixels:
    """(H, W): the relevance of each pixel, all channels together, from (C, H, W)."""
    return np.asarray(relevance.sum(0, dtype=np.float64))


def scale_of(pixels: Pixels) -> float:
    """The relevance that gets the strongest colour: a percentile of the pixels that have any."""
    sizes = np.abs(pixels[pixels != 0])
    return float(np.percentile(sizes, PERCENTILE)) if sizes.size else 0.0


def colors(pixels: Pixels, scale: float) -> Pixels:
    """(H, W, 3): white for 0 to red for `scale` and more, and to blue for what is negative."""
    strength = np.clip(pixels / scale if scale > 0 else np.zeros_like(pixels), -1, 1)[..., None]
    size = np.abs(strength)
    half, full = np.where(strength >= 0, _ORANGE, _SKY), np.where(strength >= 0, _RED, _BLUE)
    pale, strong = _WHITE + (half - _WHITE) * (2 * size), half + (full - half) * (2 * size - 1)
    return np.asarray(np.where(size < 0.5, pale, strong))


def draw(relevance: Array, picture: Image.Image | None = None) -> Image.Image:
    """A heatmap with its scale beside it, or, with a picture, its overlay on the picture in grey.

    Parameters
    ----------
    relevance : (C, H, W) float32
    picture : PIL image, optional
        What the network saw, at any size.
    """
    pixels = pixel_relevance(relevance)
    scale = scale_of(pixels)
    size = _drawn_size(picture.size if picture is not None else (pixels.shape[1], pixels.shape[0]))
    return _with_bar(shaded(pixels, scale, size, picture), scale, signed=bool((pixels < 0).any()))


def shaded(pixels: Pixels, scale: float, size: tuple[int, int], picture: Image.Image | None = None) -> Image.Image:
    """The colours alone, at (width, height); with a picture over it in grey."""
    drawn = _resized(pixels, size)
    if picture is None:
        image = colors(drawn, scale)
    else:
        gray = np.asarray(picture.convert("L").resize(size, Image.Resampling.BILINEAR), np.float64)[..., None]
        opacity = np.clip(np.abs(drawn) / scale if scale > 0 else np.zeros_like(drawn), 0, 1)
        # From half-way on: the paler colours would veil the picture.
        shades = colors(np.copysign((1 + opacity) / 2, drawn), 1.0)
        image = (_BLACK + (255 - _BLACK) / 255 * gray) * (1 - opacity[..., None]) + shades * opacity[..., None]
    return Image.fromarray(np.round(image).astype(np.uint8))


def write(path: Path, relevance: Array, picture: Image.Image | None = None) -> None:
    """Write `draw`'s picture as PNG."""
    draw(relevance, picture).save(path, "PNG", optimize=False, compress_level=4)


def _drawn_size(size: tuple[int, int]) -> tuple[int, int]:
    """(width, height) in the picture's proportions, of a size that people can look at."""
    longest = max(size)
    factor = max(1, -(-_MIN_SIDE // longest)) if longest <= MAX_SIDE else MAX_SIDE / longest
    return max(1, round(size[0] * factor)), max(1, round(size[1] * factor))


def _resized(pixels: Pixels, size: tuple[int, int]) -> Pixels:
    """Enlarged by whole pixels where that is exact, so that one looks at pixels, else interpolated."""
    height, width = pixels.shape
    exact = size[0] % width == 0 and size[1] % height == 0
    return np.asarray(Image.fromarray(pixels.astype(np.float32)).resize(
        size, Image.Resampling.NEAREST if exact else Image.Resampling.BILINEAR), np.float64)


def _with_bar(image: Image.Image, scale: float, signed: bool) -> Image.Image:
    """`image` with a colour bar on its right, its ends labelled in relevance a pixel."""
    font = ImageFont.load_default(_TEXT)
    ends = [f"{scale:.2g}", "0", f"{-scale:.2g}"] if signed else [f"{scale:.2g}", "0"]
    text_width = int(max(font.getlength(end) for end in ends)) + 8
    height = max(image.height, _MIN_BAR)
    canvas = Image.new("RGB", (image.width + _MARGIN + _BAR + 5 + text_width, height), "white")
    canvas.paste(image, (0, (height - image.height) // 2))
    top, bottom, left = _TEXT // 2 + 1, height - 2 - _TEXT // 2, image.width + _MARGIN
    levels = np.linspace(scale, -scale if signed else 0, bottom - top)[:, None].repeat(_BAR, 1)
    canvas.paste(Image.fromarray(np.round(colors(levels, scale)).astype(np.uint8)), (left, top))
    pen = ImageDraw.Draw(canvas)
    pen.rectangle((left - 1, top - 1, left + _BAR, bottom), outline="gray")
    for i, end in enumerate(ends):
        pen.text((left + _BAR + 5, top + (bottom - top) * i / (len(ends) - 1)), end, "black", font, anchor="lm")
    return canvas
