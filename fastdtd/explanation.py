"""What an Explainer returns: relevance, scores and ledger of N images, and how to look at them and keep them."""

from __future__ import annotations

import base64
import html
import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from fastdtd.errors import InputError, OutputError, printable, shown
from fastdtd.graph import Array

if TYPE_CHECKING:
    import os

    from PIL import Image

LIMITS = "https://github.com/fastdtd/fastdtd/blob/main/docs/limits.md"
FORMAT = "fastdtd-explanations"  # of the files that `save` and fastdtd.runner write
_MAX_LINES = 10  # of a printed explanation
_MAX_DRAWN, _SHOWN_SIDE = 8, 320  # pictures of a notebook, and their size


@dataclass(frozen=True, eq=False)
class Context:
    """What an explanation knows of the network that it comes from.

    classes : names of the outputs, or none
    rules : by layer, as text
    resize : how pictures were fitted to the input
    pictures : those that were explained, as they were given; None where arrays were
    inputs : of a network with several, by name, their shapes
    against : what each target is held against: names of classes, or a word such as "others"; "" where nothing is
    explain_again : tensors' names -> their relevance; None where the network is not at hand
    """

    classes: tuple[str, ...] = ()
    rules: Mapping[str, str] = field(default_factory=dict)
    resize: str = "stretch"
    pictures: Sequence[Any] | None = None
    inputs: Mapping[str, tuple[int, int, int]] = field(default_factory=dict)
    against: str = ""
    explain_again: Callable[[Sequence[str]], dict[str, Array]] | None = None


@dataclass(frozen=True, eq=False, repr=False)
class Explanation:
    """What an Explainer returns for N images.

    Attributes
    ----------
    relevance : (N, C, H, W) float32
        How much of `explained` each input value carries, summing to `explained` less what `ledger` names. Non-negative
        by the rules of "dtd"; epsilon, gamma and alpha-beta can make it negative, and what contributes to the classes
        that a target is held against is. The presets named after derivatives have these instead.
    output : (N, K) float32, or (N, K, H, W)
        Class scores, before any softmax; of networks whose outputs are maps at each position.
    target : (N,) int64
        The output that is explained; of maps the channel.
    explained : (N,) float32
        Its score. Where that is not positive, 0, for there is nothing to decompose, and the relevance is 0; but under
        rules of layer-wise relevance propagation at the output (epsilon, gamma, alpha-beta, z+ with parameters) and
        derivatives, which explain negative scores too. Held against other classes, less what these are given: their
        mean score ("others" all of the target's).
    ledger : dict of str to (N,) float64
        By layer, the relevance that it absorbed: where a neuron is active though none of its inputs contributes to it
        (its bias does), the rule has nowhere to send its relevance; and what a stabiliser, or a bias that is part of a
        rule's sums, kept.
    cut : dict of str to (N,) float64
        By layer of `through`, the relevance that ended there, in other channels than those that it was to go through:
        with relevance and ledger it makes up what is explained.
    region : (N, H, W) bool, or None
        Of networks whose outputs are maps: the positions whose scores are explained, together.

    Examples
    --------
    >>> import fastdtd
    >>> e = fastdtd.Explainer(fastdtd.load("squeezenet1_1"))("cat.jpg")
    >>> print(e)
    Explanation of 1 image, 3x227x227
      0  285 Egyptian cat  score ..., relevance ..., absorbed 0
    >>> e.overlay().save("cat.overlay.png")
    """

    relevance: Array
    output: Array
    target: npt.NDArray[np.int64]
    explained: Array
    ledger: dict[str, npt.NDArray[np.float64]]
    context: Context = field(default_factory=Context)
    cut: dict[str, npt.NDArray[np.float64]] = field(default_factory=dict)
    region: npt.NDArray[np.bool_] | None = None

    # -- What it says

    @property
    def absorbed(self) -> npt.NDArray[np.float64]:
        """(N,) float64: what all layers absorbed together."""
        return np.asarray(sum(self.ledger.values(), np.zeros(len(self.target))))

    @property
    def sum(self) -> npt.NDArray[np.float64]:
        """(N,) float64: the relevance of all input values together."""
        return np.asarray([_host(image).sum(dtype=np.float64) for image in self.relevance], np.float64)

    @property
    def score(self) -> Array:
        """(N,) float32: the target's score; of maps the sum of those that are explained."""
        scores: Array = _host(self.output)[np.arange(len(self)), self.target]
        return scores if self.region is None else np.where(self.region, scores, 0).sum((1, 2))

    def place(self, image: int = 0) -> str:
        """Of networks whose outputs are maps, where in the map it is explained, in words; else ""."""
        if self.region is None:
            return ""
        region = self.region[self._checked(image)]
        count = int(region.sum())
        if count == 1:
            y, x = np.argwhere(region)[0].tolist()
            return f"at ({y}, {x})"
        return f"at {count} positions" if count < region.size else "at all positions"

    def class_name(self, image: int = 0) -> str:
        """The class that is explained of an image: its name, or its number where the model has no names."""
        target = int(self.target[self._checked(image)])
        return self.context.classes[target] if self.context.classes else str(target)

    def against_name(self, image: int = 0) -> str:
        """What an image's target is held against, in words: names of classes, "others" or "softmax-gradient"; "" where
        nothing is. Of maps "runner-up" stays, for it is another at each position."""
        if self.context.against != "runner-up" or self.region is not None:  # which is another at each position
            return self.context.against
        scores = _host(self.output[self._checked(image)]).copy()
        scores[self.target[image]] = -np.inf
        runner_up = int(scores.argmax())
        return self.context.classes[runner_up] if self.context.classes else str(runner_up)

    def __len__(self) -> int:
        return len(self.target)

    def __repr__(self) -> str:
        """A few lines, whatever the number of images."""
        count, shape = len(self), "x".join(map(str, self.relevance.shape[1:]))
        lines = [f"Explanation of {count} image{'' if count == 1 else 's'}, {shape}"]
        lines += [f"  {i}  {self._line(i)}" for i in range(min(count, _MAX_LINES))]
        return "\n".join([*lines, f"  ... {count - _MAX_LINES} more"] if count > _MAX_LINES else lines)

    def _line(self, i: int) -> str:
        target, name = int(self.target[i]), printable(self.class_name(i))
        against = printable(self.against_name(i))
        explained, score = float(self.explained[i]), float(self.score[i])
        less = f" against {against}" if against else ""
        if against or (self.region is not None and explained != score):  # where some of the scores are negative
            less += f", explained {explained:.6g}"
        return (
            f"{name if name == str(target) else f'{target} {name}'}{f' {place}' if (place := self.place(i)) else ''}  "
            f"score {score:.6g}{less}, "
            f"relevance {float(_host(self.relevance[i]).sum(dtype=np.float64)):.6g}{self._shares(i)}, absorbed "
            f"{float(self.absorbed[i]):.6g}"
            + "".join(f", cut at {printable(name)} {cut[i]:.6g}" for name, cut in self.cut.items())
        )

    def _shares(self, i: int) -> str:
        """Of several inputs, how much relevance each has."""
        shares = [f"{printable(name)} {float(_host(self.of(name)[i]).sum(dtype=np.float64)):.6g}"
                  for name in self.context.inputs]
        return f" ({', '.join(shares)})" if shares else ""

    def _repr_html_(self) -> str:
        """For notebooks: each heatmap beside class, score, sum and what was absorbed."""
        rows = []
        for i in range(min(len(self), _MAX_DRAWN)):
            against = self.against_name(i)
            where = {} if self.region is None else {"where": self.place(i)}
            facts = {"class": self.class_name(i), **where, "score": f"{float(self.score[i]):.6g}",
                     **({"against": against, "explained": f"{float(self.explained[i]):.6g}"} if against else {}),
                     "relevance": f"{float(_host(self.relevance[i]).sum(dtype=np.float64)):.6g}",
                     "absorbed": f"{float(self.absorbed[i]):.6g}"}
            pictures = [self.heatmap(i), *([self.overlay(i)] if self.context.pictures is not None else [])]
            cells = "".join(f"<td><img src='data:image/png;base64,{_png(picture)}'></td>" for picture in pictures)
            text = "".join(
                f"<tr><th style='text-align:left'>{name}</th><td style='text-align:left'>{html.escape(value)}</td></tr>"
                for name, value in facts.items())
            rows.append(f"<tr>{cells}<td><table>{text}</table></td></tr>")
        more = f"<p>... {len(self) - _MAX_DRAWN} more</p>" if len(self) > _MAX_DRAWN else ""
        return f"<table>{''.join(rows)}</table>{more}"

    def of(self, name: str) -> Array:
        """Relevance of one of several inputs, (N, C, H, W): a view of `relevance`.

        Raises
        ------
        InputError
            The network has no input of that name.
        """
        begin = 0
        for own, shape in self.context.inputs.items():
            end = begin + math.prod(shape)
            if own == name:
                part: Array = self.relevance[:, begin:end].reshape(-1, *shape)
                return part
            begin = end
        raise InputError(f"the network has no input {shown(name)} among several; it has "
                         f"{', '.join(self.context.inputs) or 'one'}")

    def _seen(self, image: int) -> Array:
        """What is drawn of an image's relevance: of several inputs the first that has pixels."""
        names = [name for name, shape in self.context.inputs.items() if shape[1:] != (1, 1)]
        drawn: Array = (self.of(names[0]) if names else self.relevance)[self._checked(image)]
        return drawn

    # -- Relevance inside the network

    def at(self, layer: str) -> Array:
        """Relevance of what a layer makes: how much of `explained` each element carries there.

        It is computed now, by explaining the images again. A layer and the ReLU or clip after it have the same
        relevance; derivatives have only those after it. Layers that lead to gates which are held constant have none.

        Parameters
        ----------
        layer : str
            A layer's name, or "input".

        Returns
        -------
        (N, C, H, W) float32

        Raises
        ------
        InputError
            The network has no such layer, or not the derivative by it; or the explainer's memory limit is too low for
            it.
        """
        return self._at([layer])[layer]

    def flow(self) -> dict[str, npt.NDArray[np.float64]]:
        """By layer of the ledger, the relevance that came to it: (N,) float64. What went on is this less what the
        ledger names.

        It is computed now, by explaining the images again.
        """
        return {
            name: relevance.sum((1, 2, 3), dtype=np.float64) for name, relevance in self._at(list(self.ledger)).items()
        }

    def _at(self, layers: Sequence[str]) -> dict[str, Array]:
        if self.context.explain_again is None:
            raise InputError(
                "this explanation was pickled, without the network; explain the images again for relevance at inner "
                "layers"
            )
        return self.context.explain_again(layers)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "context": replace(self.context, explain_again=None)}

    # -- Pictures and files

    def heatmap(self, image: int = 0) -> Image.Image:
        """The relevance of each pixel as a picture: white for none to red, or blue where it is negative, with its scale
        beside it.

        Parameters
        ----------
        image : int
            Which of the N.
        """
        from fastdtd import heatmap

        return heatmap.draw(_host(self._seen(image)))

    def overlay(self, image: int = 0, picture: Any = None) -> Image.Image:
        """The heatmap over a picture in grey.

        Parameters
        ----------
        image : int
            Which of the N.
        picture : path, PIL image or uint8 array, optional
            What was explained. Not needed where the explainer was given pictures and not arrays.

        Raises
        ------
        InputError
            No picture is known.
        PictureError
            The picture cannot be read.
        """
        from fastdtd import heatmap, images

        image = self._checked(image)
        if picture is None and self.context.pictures is not None:
            picture = self.context.pictures[image]
        if picture is None:
            raise InputError(
                "this explanation was made of an array, so the picture is not known; required: overlay(i, picture) "
                "with a path, a PIL image or a uint8 array")
        relevance = _host(self._seen(image))
        seen = images.seen_by_network(images.open_picture(picture), (relevance.shape[1], relevance.shape[2]),
                                      self.context.resize, heatmap.MAX_SIDE)
        return heatmap.draw(relevance, seen)

    def _checked(self, image: int) -> int:
        if not isinstance(image, (int, np.integer)) or not -len(self) <= image < len(self):
            raise InputError(f"image {shown(image)} of {len(self)} was asked for; required: 0 to {len(self) - 1}")
        return int(image) % len(self)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write relevance, scores, targets, sums and the whole ledger to an HDF5 file: written beside and renamed into
        place.

        Parameters
        ----------
        path : path
            It gets the datasets relevance, scores, target, explained, sum and absorbed, a row for each image, and of
            maps region; ledger, a column for each layer of its attribute "layers"; rules (JSON) and classes.

        Raises
        ------
        OutputError
            The file cannot be written.
        """
        import h5py

        from fastdtd import files

        place = files.as_path(path, OutputError, "the file to write")
        content = io.BytesIO()
        with h5py.File(content, "w") as file:
            write_header(file, self.context)
            for name, values in self.columns().items():
                file[name] = values
            if self.region is not None:
                file["region"] = self.region
            file["ledger"] = np.stack([*self.ledger.values()], 1) if self.ledger else np.zeros((len(self), 0))
            file["ledger"].attrs["layers"] = np.array(list(self.ledger), h5py.string_dtype())
        try:
            files.replace(place, lambda beside: beside.write_bytes(content.getbuffer()))
        except (OSError, ValueError) as error:  # ValueError: a folder's path, such as "."
            reason = getattr(error, "strerror", None) or error
            raise OutputError(f"cannot write {str(path)!r}: {reason}; required: a file in a folder that can be written "
                              "and has free space") from None

    def columns(self) -> dict[str, npt.NDArray[Any]]:
        """What a file of explanations holds, a row for each image."""
        return {
            "relevance": _host(self.relevance), "scores": _host(self.output), "target": self.target,
            "explained": self.explained, "sum": self.sum, "absorbed": self.absorbed
        }


def note_of_absorbed(explained: float, absorbed: float) -> str:
    """What is to be said where layers absorbed more than half of what was explained, both summed by size; else ""."""
    if not absorbed > explained / 2:
        return ""
    return (f"{absorbed / explained if explained else math.inf:.0%} of what was explained was absorbed by layers, and "
            "no pixel has it: as a rule biases carry it, and the map shows what is left. What that means, and what to "
            f"do: {LIMITS}#biases-can-carry-the-score")


def write_header(file: Any, context: Context) -> None:
    """What a file of explanations says of the network."""
    file.attrs["format"] = FORMAT
    file["rules"] = json.dumps(dict(context.rules))
    if context.against:
        file.attrs["against"] = context.against
    if context.classes:
        file["classes"] = np.array(context.classes, object)


def _host(array: Any) -> npt.NDArray[Any]:
    """An array of NumPy; CuPy's come from the device."""
    return np.asarray(array if isinstance(array, np.ndarray) else array.get())


def _png(picture: Image.Image) -> str:
    content, small = io.BytesIO(), picture.copy()
    small.thumbnail((_SHOWN_SIDE, _SHOWN_SIDE))
    small.save(content, "PNG")
    return base64.b64encode(content.getvalue()).decode()
