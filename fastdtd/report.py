"""A finished run as a page to look at: OUT/report.html, with thumbnails in side files.

Names, classes and reasons come from files of strangers. They cross into the page as JSON in which nothing can end the
element that holds it, and the page makes text of them, never HTML.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import shutil
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from fastdtd import heatmap, images, sources
from fastdtd.errors import InputError, OutputError, PictureError, shown
from fastdtd.explanation import note_of_absorbed
from fastdtd.files import as_path, remove_abandoned, replace
from fastdtd.results import FAILED, Results, added_to, open_results, read_set
from fastdtd.sources import Entry
from fastdtd.threads import Task, Threads

PAGE, FOLDER = "report.html", "report"
SHOWN, MAX_SHOWN = 10_000, 50_000  # explanations in a page: as a list, more would be higher than browsers draw
TILE = 192  # pixels of a thumbnail's longer side
SHEET = 12  # explanations of a sheet: few, for sorted as one likes, what is in view is on as many sheets
CONCENTRATED = 0.1  # of the pixels: those with most relevance, whose share of it says how concentrated it is
_MAX_THREADS = 1024
_FAILED = 1000  # failed images that the page lists
_AHEAD = 2  # sheets for each thread, being made or waiting for those before them
# No picture's suffix: a set that is made of a folder above the run's must not take these for pictures.
_SUFFIX = ".jfif"
_FOLDERS = re.compile(r"[0-9a-f]{32}")
_REASON = 300  # characters of it in the page


def write(out: str | os.PathLike[str], shown_at_most: int = SHOWN, workers: int = 1,
          on_progress: Callable[[int, int], Any] = lambda count, total: None) -> Path:
    """Write `out`/report.html and its thumbnails, in `out`/report.

    Until the page is whole, one of before stays as it is, with its thumbnails.

    Parameters
    ----------
    out : path
        The output folder of a finished run that kept relevance.
    shown_at_most : int
        Explanations in the page, 1 to 50,000. Of a larger run images are taken at even distances.
    workers : int
        Threads that read pictures and draw.
    on_progress : callable
        Told how many more explanations are drawn, and of how many.

    Returns
    -------
    Path
        Of the page.

    Raises
    ------
    OutputError
        It is no finished run, has no relevance, or cannot be written to.
    InputError
        Another number of explanations, or of threads.
    """
    for name, value, most in (("number of explanations", shown_at_most, MAX_SHOWN),
                              ("number of threads", workers, _MAX_THREADS)):
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or not 1 <= value <= most:
            raise InputError(f"{name} is {shown(value)}; required: a whole number from 1 to {most}")
    place = as_path(out, OutputError, "the output folder of a run")
    if not os.path.isdir(place):
        raise OutputError(f"{str(place)!r} is no folder; required: the output folder of a run of `fastdtd explain`")
    with added_to(place, "a run or another report"):
        results = open_results(place)
        if results.manifest["storage"] is None and len(results):
            raise OutputError(f"{str(place)!r} is a run that did not keep relevance, which a report is made of; "
                              "required: one whose --outputs have it, to another folder")
        return _write(results, shown_at_most, workers, on_progress)


def _write(results: Results, shown_at_most: int, workers: int, on_progress: Callable[[int, int], Any]) -> Path:
    out, page = results.out, results.out / PAGE
    folder = out / FOLDER / uuid.uuid4().hex
    folder.mkdir(parents=True)
    try:
        remove_abandoned(out, re.escape(PAGE))
        drawer = _Drawer(results, _chosen(results, shown_at_most), folder)
        drawer.draw(workers, on_progress)
        text = _page(_data(drawer))
        replace(page, lambda path: path.write_text(text, "utf-8", newline="\n"))
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    for other in (out / FOLDER).iterdir():  # of earlier reports; pictures of a set may have been drawn there, too
        if _FOLDERS.fullmatch(other.name) and other != folder and not other.is_symlink():
            shutil.rmtree(other, ignore_errors=True)
    return page


def _chosen(results: Results, most: int) -> npt.NDArray[np.int64]:
    """Rows in the page: all of a small run, else those of images at even distances. Classes are together, so that what
    one class's filter shows is on few sheets, and of one class's mean alone is in memory."""
    if not len(results):
        return np.zeros(0, np.int64)
    numbers = results.columns["image"]
    distinct = np.unique(numbers)
    count = min(len(distinct), max(1, most * len(distinct) // len(numbers)))
    taken = distinct[np.arange(count) * len(distinct) // count]
    rows = np.flatnonzero(np.isin(numbers, taken))[:most]
    return rows[np.argsort(results.columns["target"][rows], kind="stable")]


def concentration(pixels: heatmap.Pixels) -> float:
    """The share of the relevance, whatever its sign, that the 10 % of pixels with most of it carry; NaN where there is
    none. 0.1 is the least, of relevance that is the same everywhere."""
    sizes = np.abs(pixels).ravel()
    count = max(1, round(CONCENTRATED * sizes.size))
    total = sizes.sum()
    return float(np.partition(sizes, -count)[-count:].sum() / total) if total > 0 else float("nan")


# ---- Thumbnails ------------------------------------------------------------------------------------------------------


class _Sheet:
    """Thumbnails in one file, three to a line: picture, heatmap and overlay; or means of three classes."""

    def __init__(self) -> None:
        self._image = Image.new("RGB", (3 * TILE, SHEET * TILE), "white")

    def add(self, at: int, tile: Image.Image) -> None:
        self._image.paste(tile, (at % 3 * TILE, at // 3 * TILE))

    def save(self, path: Path) -> None:
        self._image.save(path, "JPEG", quality=82, subsampling=0)  # subsampled, heatmaps lose their colours


def _tile_size(size: tuple[int, int]) -> tuple[int, int]:
    """(width, height) of a thumbnail: small pictures are enlarged by whole pixels."""
    longest = max(size)
    factor = TILE // longest if longest <= TILE else TILE / longest
    return max(1, round(size[0] * factor)), max(1, round(size[1] * factor))


class _Drawer:
    """Draws the thumbnails of a page, and finds out what only the relevance and the pictures say."""

    def __init__(self, results: Results, rows: npt.NDArray[np.int64], folder: Path) -> None:
        self.results, self.rows, self.folder = results, rows, folder
        self.concentration = np.full(len(rows), np.nan)
        self.sizes = np.zeros((len(rows), 2), np.int64)
        self.gone: dict[int, str] = {}  # by place in the page, why there is no picture
        self.means: list[tuple[int, int, int, int]] = []  # class, explanations, width and height of the thumbnail
        self._entries: dict[int, Entry] = {}
        self._trouble = ""
        numbers = frozenset(results.columns["image"][rows].tolist() if len(rows) else ())
        try:
            self._entries = read_set(results.out, numbers)
        except OutputError as error:
            self._trouble = str(error)

    def draw(self, workers: int, on_progress: Callable[[int, int], Any]) -> None:
        """By threads, a sheet at a time; means are made of sheets in their order, so that they are always the same."""
        threads = Threads(workers)
        waiting: deque[tuple[Task, range, list[tuple[int, int, heatmap.Pixels]]]] = deque()
        sheets = iter([range(first, min(first + SHEET, len(self.rows))) for first in range(0, len(self.rows), SHEET)])

        def finished() -> Iterator[tuple[int, int, heatmap.Pixels]]:
            while True:
                while len(waiting) < _AHEAD * workers and (places := next(sheets, None)) is not None:
                    sums: list[tuple[int, int, heatmap.Pixels]] = []
                    waiting.append((threads.submit(self._draw_sheet, places, sums), places, sums))
                if not waiting:
                    return
                task, places, sums = waiting.popleft()
                task.result()
                on_progress(len(places), len(self.rows))
                yield from sums

        try:
            self._draw_means(finished())
        finally:
            for _ in sheets:  # whatever happened, no more are begun
                pass
            threads.join()

    def _draw_sheet(self, places: range, sums: list[tuple[int, int, heatmap.Pixels]]) -> None:
        sheet = _Sheet()
        for i, place in enumerate(places):
            row = int(self.rows[place])
            pixels = heatmap.pixel_relevance(self.results[row])
            scale = heatmap.scale_of(pixels)
            self.concentration[place] = concentration(pixels)
            picture = self._picture(place, row)
            size = _tile_size(picture.size if picture is not None else pixels.shape[::-1])
            self.sizes[place] = size
            if picture is not None:
                is_enlarged = max(picture.size) <= TILE
                picture = picture.resize(size, Image.Resampling.NEAREST if is_enlarged else Image.Resampling.BILINEAR)
                sheet.add(3 * i, picture)
                sheet.add(3 * i + 2, heatmap.shaded(pixels, scale, size, picture))
            sheet.add(3 * i + 1, heatmap.shaded(pixels, scale, size))
            target = int(self.results.columns["target"][row])
            if sums and sums[-1][0] == target:
                sums[-1] = target, sums[-1][1] + 1, sums[-1][2] + pixels
            else:
                sums.append((target, 1, pixels))
        sheet.save(self.folder / f"{places.start // SHEET:05}{_SUFFIX}")

    def _picture(self, place: int, row: int) -> Image.Image | None:
        """What the network saw, small."""
        manifest, number = self.results.manifest, int(self.results.columns["image"][row])
        try:
            if number not in self._entries:
                raise PictureError(self._trouble or "it is not in the run's images.csv")
            image = sources.open_image(self._entries[number], (TILE, TILE))
        except PictureError as error:
            self.gone[place] = str(error)[:_REASON]
            return None
        return images.seen_by_network(image, tuple(manifest["model"]["input"][1:]), manifest["preprocessing"]["resize"],
                                      TILE)

    def _draw_means(self, sums: Iterable[tuple[int, int, heatmap.Pixels]]) -> None:
        """A thumbnail for each class, of all its explanations in the page."""
        tiles, sheet = 3 * SHEET, _Sheet()

        def add(target: int, count: int, total: heatmap.Pixels) -> None:
            nonlocal sheet
            mean = total / count
            size = _tile_size(mean.shape[::-1])
            at = len(self.means)
            sheet.add(at % tiles, heatmap.shaded(mean, heatmap.scale_of(mean), size))
            self.means.append((target, count, *size))
            if at % tiles == tiles - 1:
                sheet.save(self.folder / f"class-{at // tiles:05}{_SUFFIX}")
                sheet = _Sheet()

        current: tuple[int, int, heatmap.Pixels] | None = None
        for target, count, total in sums:
            if current is not None and current[0] == target:
                current = target, current[1] + count, current[2] + total
            else:
                if current is not None:
                    add(*current)
                current = target, count, total
        if current is not None:
            add(*current)
        if len(self.means) % tiles:
            sheet.save(self.folder / f"class-{len(self.means) // tiles:05}{_SUFFIX}")


# ---- The page --------------------------------------------------------------------------------------------------------


def _data(drawer: _Drawer) -> dict[str, Any]:
    """All that the page shows: columns with an element for each explanation, in the order of their thumbnails."""
    results, rows = drawer.results, drawer.rows
    all_of = results.columns
    counts: dict[int, int] = {}
    right = known = 0
    if len(results):
        targets, number = np.unique(all_of["target"], return_counts=True)
        counts = dict(zip(targets.tolist(), number.tolist(), strict=True))
        winner = results.winners()
        first = all_of["rank"] == 0
        known = int((first & (all_of["label"] >= 0)).sum())
        right = int((first & (all_of["label"] == winner)).sum())
        columns = {name: _numbers(all_of[name][rows]) for name in ("image", "rank", "label", "target", "score",
                                                                   "explained", "sum", "absorbed")}
        columns |= {"file": all_of["file"][rows].tolist(), "winner": winner[rows].tolist(),
                    "concentration": _numbers(drawer.concentration), "width": drawer.sizes[:, 0].tolist(),
                    "height": drawer.sizes[:, 1].tolist()}
    else:
        columns = {"image": []}
    used = {*counts, *columns.get("label", ()), *columns.get("winner", ())}
    return {
        "name": os.path.basename(os.path.abspath(results.out)), "folder": f"{FOLDER}/{drawer.folder.name}",
        "suffix": _SUFFIX, "tile": TILE, "sheet": SHEET, "concentrated": CONCENTRATED, "columns": columns,
        "gone": {str(place): reason for place, reason in sorted(drawer.gone.items())},
        "classes": {str(i): results.classes[i] for i in sorted(used) if 0 <= i < len(results.classes)},
        "counts": {str(target): count for target, count in counts.items()},
        "means": drawer.means,
        "totals": {"explanations": len(results), "images": results.manifest["images"]["count"],
                   "failed": len(results.failed), "known": known, "right": right,
                   **{name: _finite(float(all_of[name].sum())) if len(results) else 0.0
                      for name in ("explained", "sum", "absorbed")}},
        "note": "" if results.manifest.get("against") or not len(results) else note_of_absorbed(
            *(float(np.abs(all_of[name]).sum()) for name in ("explained", "absorbed"))),
        "failed": [(number, name, reason[:_REASON]) for number, name, reason in results.failed[:_FAILED]],
        "failed_file": FAILED, "manifest": _finite(results.manifest),
    }


def _numbers(values: npt.NDArray[Any]) -> list[Any]:
    """As JSON has them: six digits, None for what is no number."""
    if values.dtype.kind != "f":
        return list(values.tolist())
    return [float(f"{value:.6g}") if np.isfinite(value) else None for value in values.tolist()]


def _finite(value: Any) -> Any:
    """JSON's values without the numbers that it has not."""
    if isinstance(value, Mapping):
        return {name: _finite(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value


def _embedded(data: Any) -> str:
    """JSON that can stand in a script element, whatever is in it: HTML's parser sees no tag, comment or entity."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)  # ASCII alone
    return text.replace("&", r"\u0026").replace("<", r"\u003c").replace(">", r"\u003e")


def _page(data: Mapping[str, Any]) -> str:
    """The template with its data, and a policy that lets a browser run and load what is its own, and nothing else."""
    template = Path(__file__).with_name(PAGE).read_text("utf-8")
    hashes = {}
    for element in ("style", "script"):
        [content] = re.findall(f"<{element}>(.*?)</{element}>", template, re.DOTALL)
        hashes[element] = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
    policy = (f"default-src 'none'; script-src 'sha256-{hashes['script']}'; style-src 'sha256-{hashes['style']}'; "
              "img-src 'self' file:; base-uri 'none'; form-action 'none'")
    before, between, after = re.split("%POLICY%|%DATA%", template)
    return f"{before}{policy}{between}{_embedded(data)}{after}"
