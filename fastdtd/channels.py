"""Which feature: in which pictures of a set each channel of a layer has most relevance, and where."""

from __future__ import annotations

import csv
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from fastdtd import heatmap, images
from fastdtd.errors import InputError, PictureError, shown
from fastdtd.evaluation import writable_folder, writing
from fastdtd.explainer import Explainer
from fastdtd.files import replace
from fastdtd.graph import Array
from fastdtd.inputs import BeyondFloat32Error, ExplanationWarning, MapTarget, checked_places, checked_targets
from fastdtd.sources import Entry, open_image

PICTURES, DRAWN = 8, 8  # of each channel; channels of which pictures are drawn
TABLE, GRID = "channels.csv", "channels.png"
_BATCH = 16
_SIDE, _GAP, _TEXT, _HEAD = 144, 6, 14, 130  # pixels of the grid


@dataclass(frozen=True, eq=False)
class Channels:
    """What `rank` returns.

    Attributes
    ----------
    layer : str
    entries : tuple of Entry
        The pictures that were explained.
    asked : int, str, tuple or None
        The target that was asked for; None: each picture's winner.
    target : (N,) int64
        The output that was explained of each; of maps the channel.
    places : tuple of str
        Of maps, which positions of the channel, in words; else "".
    shares : (N, C) float32
        How much of the relevance at the layer each channel has, by size: relevance over the sum of all channels' sizes.
    failed : dict of str to str
        By picture, why it was not explained.
    """

    layer: str
    entries: tuple[Entry, ...]
    asked: MapTarget
    target: npt.NDArray[np.int64]
    places: tuple[str, ...]
    shares: Array
    failed: dict[str, str]

    @property
    def order(self) -> npt.NDArray[np.int64]:
        """All channels, that with the largest mean share first."""
        return np.argsort(-self.shares.mean(0, dtype=np.float64), kind="stable")

    def top(self, channel: int, count: int = PICTURES) -> npt.NDArray[np.int64]:
        """Numbers of the pictures in which a channel has the largest shares, those above 0."""
        found = np.argsort(-self.shares[:, channel], kind="stable")[:count]
        return np.asarray(found[self.shares[found, channel] > 0])

    def draw(self, explainer: Explainer, count: int = DRAWN, pictures: int = PICTURES) -> Image.Image:
        """A row for each of the first channels: its pictures, and on each the relevance that goes through it.

        Parameters
        ----------
        explainer : Explainer
            The one that they were ranked by.
        count, pictures : int
            Channels, and pictures of each.
        """
        chosen = self.order[:count].tolist()
        canvas = Image.new("RGB", (_HEAD + pictures * (_SIDE + _GAP), len(chosen) * (_SIDE + _GAP)), "white")
        pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(_TEXT)
        for row, channel in enumerate(chosen):
            y = row * (_SIDE + _GAP)
            text = f"channel {channel}\n{self.shares[:, channel].mean(dtype=np.float64):.1%} on average"
            pen.multiline_text((2, y + _SIDE // 2 - _TEXT), text, "black", font)
            for column, picture in enumerate(self.top(channel, pictures).tolist()):
                drawn = self._drawn(explainer, channel, picture)
                canvas.paste(drawn, (_HEAD + column * (_SIDE + _GAP), y))
        return canvas

    def _drawn(self, explainer: Explainer, channel: int, picture: int) -> Image.Image:
        model = explainer.model
        height, width = model.graph.input_shape[1:]
        opened = open_image(self.entries[picture])
        e = explainer(model.preprocess(opened), self.asked, through={self.layer: channel})
        seen = images.seen_by_network(opened, (height, width), model.preprocessing.resize, heatmap.MAX_SIDE)
        pixels = heatmap.pixel_relevance(e.relevance[0])
        return heatmap.shaded(pixels, heatmap.scale_of(pixels), (_SIDE, _SIDE), seen)

    def save(self, out: str | os.PathLike[str], explainer: Explainer, count: int = DRAWN, pictures: int = PICTURES
             ) -> None:
        """Write channels.csv, the pictures of every channel, and channels.png, what `draw` draws.

        Parameters
        ----------
        out : path
            A folder; made where it does not exist.
        explainer, count, pictures
            As `draw` takes them.

        Raises
        ------
        OutputError
            It cannot be written to.
        """
        folder = writable_folder(out)
        drawn = self.draw(explainer, count, pictures)
        with writing(folder):
            replace(folder / TABLE, lambda path: self._write(path, explainer, pictures))
            replace(folder / GRID, lambda path: drawn.save(path, "PNG"))

    def _write(self, path: Path, explainer: Explainer, pictures: int) -> None:
        means = self.shares.mean(0, dtype=np.float64)
        with open(path, "w", newline="", encoding="utf-8", errors="backslashreplace") as file:
            table = csv.writer(file, lineterminator="\n")
            of_maps = ["place"] if explainer.model.graph.has_maps else []
            table.writerow(("channel", "mean_share", "rank", "file", "share", "target", "class", *of_maps))
            for channel in self.order.tolist():
                for rank, i in enumerate(self.top(channel, pictures).tolist()):
                    target = int(self.target[i])
                    table.writerow((channel, f"{means[channel]:.6g}", rank, self.entries[i].name,
                                    f"{self.shares[i, channel]:.6g}", target, explainer.model.class_name(target),
                                    *([self.places[i]] if of_maps else [])))


def rank(explainer: Explainer, entries: Sequence[Entry], layer: str, target: MapTarget = None,
         on_progress: Callable[[int], Any] = lambda count: None) -> Channels:
    """How much of the relevance at a layer each of its channels has, in each picture of a set.

    Parameters
    ----------
    explainer : Explainer
        By rules that redistribute.
    entries : list of Entry
        From `sources.find`.
    layer : str
        Of which channels are ranked.
    target : int, str, tuple or None
        The output to explain of all pictures, of maps which positions of it too, as an `Explainer` takes it. None: each
        picture's winner.
    on_progress : callable
        Told how many more pictures are done.

    Returns
    -------
    Channels

    Raises
    ------
    InputError
        The network has no such layer or target, the rules derive, or no picture could be explained.

    References
    ----------
    Achtibat et al.: From attribution maps to human-understandable explanations through concept relevance propagation.
    Nature Machine Intelligence 5, 2023.
    """
    graph = explainer.model.graph
    if not explainer.conserves:
        raise InputError("the rules derive, and channels have no relevance; required: rules that redistribute")
    if not isinstance(layer, str) or layer not in graph.shapes:
        raise InputError(f"the network has no layer {shown(layer)}; it has {', '.join(list(graph.shapes)[1:])}")
    if isinstance(target, (list, np.ndarray)):
        raise InputError(f"target is {shown(target)}; required: one for all pictures, or None")
    (checked_places if graph.has_maps else checked_targets)(target, explainer.model, 1)
    kept: list[Entry] = []
    targets: list[int] = []
    places: list[str] = []
    shares: list[Array] = []
    failed: dict[str, str] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExplanationWarning)  # what has no relevance has no share
        for first in range(0, len(entries), _BATCH):
            loaded = []
            for entry in entries[first:first + _BATCH]:
                try:
                    loaded.append((entry, explainer.model.preprocess(open_image(entry))))
                except PictureError as error:
                    failed[entry.name] = str(error)
            while loaded:
                try:
                    e = explainer(np.stack([values for _, values in loaded]), target)
                    sums = e.at(layer).sum((2, 3), dtype=np.float64)
                except BeyondFloat32Error as error:
                    for i, reason in error.reasons.items():
                        failed[loaded[i][0].name] = f"picture {loaded[i][0].path!r} {reason}"
                    loaded = [one for i, one in enumerate(loaded) if i not in error.reasons]
                    continue
                sizes = np.abs(sums).sum(1, keepdims=True)
                shares += [*np.divide(sums, sizes, out=np.zeros_like(sums), where=sizes > 0).astype(np.float32)]
                kept += [entry for entry, _ in loaded]
                targets += e.target.tolist()
                places += map(e.place, range(len(e)))
                break
            on_progress(len(entries[first:first + _BATCH]))
    if not kept:
        raise InputError(f"no picture can be explained: {next(iter(failed.values()), 'there are none')}")
    return Channels(layer, tuple(kept), target, np.array(targets, np.int64), tuple(places), np.stack(shares), failed)
