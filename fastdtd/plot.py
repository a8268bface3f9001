"""Curves as a picture, with Pillow alone: axes, bands of standard errors, a legend."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageColor, ImageDraw, ImageFont

# Okabe and Ito's colours, which colour-blind readers tell apart; without their yellow, which is too pale for a line.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_FINER = 3  # times: drawn larger and reduced, so that edges are smooth
_WIDTH, _HEIGHT, _TEXT = 620, 440, 15  # of the axes' rectangle; of text
_TICK, _GAP, _LINE, _KEY, _DASH = 5, 10, 2, 28, 7
_AXIS, _GRID, _BAND = "#404040", "#E4E4E4", 0.18

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Line:
    """A curve at x = 0, 1, 2, ...; its band is values -+ errors, and there is none where these are NaN."""

    label: str
    values: Floats
    errors: Floats
    color: int  # a number, as often as there are COLORS
    is_dashed: bool = False


def draw(lines: Sequence[Line], x_label: str, y_label: str) -> Image.Image:
    """All lines in one pair of axes, beside a legend in the order of their ends."""
    errors = [np.nan_to_num(line.errors) for line in lines]
    low = min(0.0, *(float((line.values - e).min()) for line, e in zip(lines, errors, strict=True)))
    high = max(0.0, *(float((line.values + e).max()) for line, e in zip(lines, errors, strict=True)))
    last = max(len(line.values) for line in lines) - 1
    x_ticks, y_ticks = _ticks(0, last, 6, whole=True), _ticks(low, high, 6)
    room = 0.03 * (high - low or 1)
    low, high = low - room if low < 0 else 0.0, high + room

    f = _FINER
    font = ImageFont.load_default(_TEXT * f)
    y_texts = [f"{y:g}" for y in y_ticks]
    ordered = sorted(lines, key=lambda line: -line.values[-1])
    left = (_GAP + 2 * _TEXT + _TICK + 4) * f + round(max(map(font.getlength, y_texts)))
    top, bottom = (_GAP + _TEXT // 2) * f, (_GAP + _TEXT // 2 + _HEIGHT) * f
    right = left + _WIDTH * f
    legend = right + 2 * _GAP * f
    text_at = legend + (_KEY + _GAP) * f
    width = text_at + round(max(font.getlength(line.label) for line in lines)) + _GAP * f
    image = Image.new("RGB", (width, bottom + (_TICK + 4 + 2 * _TEXT + 2 * _GAP) * f), "white")

    def at(x: float, y: float) -> tuple[float, float]:
        return left + (right - left) * x / last, bottom - (bottom - top) * (y - low) / (high - low)

    pen = ImageDraw.Draw(image)
    for x in x_ticks:
        pen.line([at(x, low), at(x, high)], _GRID, f)
        pen.line([at(x, low), (at(x, low)[0], bottom + _TICK * f)], _AXIS, f)
        pen.text((at(x, low)[0], bottom + (_TICK + 4) * f), f"{x:g}", _AXIS, font, "mt")
    for y, text in zip(y_ticks, y_texts, strict=True):
        pen.line([at(0, y), at(last, y)], _GRID if y else _AXIS, f)
        pen.line([(left - _TICK * f, at(0, y)[1]), at(0, y)], _AXIS, f)
        pen.text((left - (_TICK + 4) * f, at(0, y)[1]), text, _AXIS, font, "rm")

    for line in lines:
        if np.isfinite(line.errors).all():
            outline = [at(x, y) for x, y in enumerate(line.values + line.errors)]
            outline += [at(x, y) for x, y in reversed(list(enumerate(line.values - line.errors)))]
            mask = Image.new("L", image.size)
            ImageDraw.Draw(mask).polygon(outline, fill=round(255 * _BAND))
            image.paste(_color(line), (0, 0), mask)
    for line in reversed(lines):  # the first ones are on top
        _stroke(pen, [at(x, y) for x, y in enumerate(line.values)], line)
    pen.line([(left, top), (left, bottom), (right, bottom)], _AXIS, f)

    for i, line in enumerate(ordered):
        y = top + (i + 0.5) * 1.6 * _TEXT * f
        _stroke(pen, [(legend, y), (legend + _KEY * f, y)], line)
        pen.text((text_at, y), line.label, _AXIS, font, "lm")
    pen.text(((left + right) / 2, image.height - _GAP * f), x_label, _AXIS, font, "mb")
    upright = Image.new("RGB", (bottom - top, 2 * _TEXT * f), "white")
    ImageDraw.Draw(upright).text((upright.width / 2, upright.height / 2), y_label, _AXIS, font, "mm")
    image.paste(upright.rotate(90, expand=True), (_GAP * f // 2, top))
    return image.resize((image.width // f, image.height // f), Image.Resampling.BOX, (0, 0, image.width // f * f,
                                                                                     image.height // f * f))


def _color(line: Line) -> tuple[int, ...]:
    return ImageColor.getrgb(COLORS[line.color % len(COLORS)])


def _stroke(pen: ImageDraw.ImageDraw, points: list[tuple[float, float]], line: Line) -> None:
    if not line.is_dashed:
        pen.line(points, _color(line), _LINE * _FINER, "curve")
        return
    lengths = np.cumsum([0.0, *(math.dist(a, b) for a, b in pairwise(points))])
    dash = _DASH * _FINER
    for start in np.arange(0, lengths[-1], 2 * dash):
        along = np.unique([start, *lengths[(lengths > start) & (lengths < start + dash)],
                           min(start + dash, lengths[-1])])
        x, y = (np.interp(along, lengths, [point[axis] for point in points]).tolist() for axis in (0, 1))
        pen.line(list(zip(x, y, strict=True)), _color(line), _LINE * _FINER, "curve")


def _ticks(low: float, high: float, count: int, whole: bool = False) -> list[float]:
    """About `count` round numbers between low and high."""
    rough = (high - low or 1) / count
    power = 10.0**math.floor(math.log10(rough))
    step = next(step * power for step in (1, 2, 5, 10) if step * power >= rough * 0.999)
    step = max(1.0, step) if whole else step
    return [round(i * step, 12) for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]
