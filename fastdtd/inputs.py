"""What an Explainer is called with (images, targets, starting relevance), checked before anything is computed."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from fastdtd.errors import InputError, shown
from fastdtd.graph import INPUT, Array
from fastdtd.model import Model
from fastdtd.schedule import Through

Target = int | str | Sequence[int | str] | npt.NDArray[Any] | None
Against = Target  # or one of AGAINST
AGAINST = ("runner-up", "others", "softmax-gradient")

_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([kmg]i?b)\s*", re.ASCII | re.IGNORECASE)
_MAX_BYTES = 2**63 - 1  # of a limit of memory
_UNITS = {"kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
_CLIP_TOLERANCE = 1e-4  # of the width of the box: what preprocessing rounds off


class ExplanationWarning(UserWarning):
    """An input was clipped to the model's value box, or a target's score has nothing to decompose."""


class BeyondFloat32Error(InputError):
    """Images whose scores or relevance float32 cannot hold.

    Attributes
    ----------
    reasons : dict of int to str
        By the image's number in the batch, what is wrong with it: what it does, as in "gives ...".
    """

    def __init__(self, reasons: dict[int, str]) -> None:
        self.reasons = reasons
        image, reason = next(iter(reasons.items()))
        super().__init__(f"image {image} {reason}")


def pictures_of(given: Any, model: Model) -> list[Any] | None:
    """The pictures among what an explainer may be given, which the model has to preprocess: paths, PIL images, uint8
    pixels (H, W, 3) or (H, W, 4), or a sequence of these. None: it is an array of network inputs."""
    if isinstance(given, np.ndarray) and given.dtype != np.uint8:
        return None
    from PIL import Image

    def is_picture(one: Any) -> bool:
        if isinstance(one, np.ndarray):
            return one.dtype == np.uint8 and one.ndim in (2, 3) and one.shape != model.graph.input_shape and (
                one.ndim == 2 or one.shape[2] in (3, 4))
        return isinstance(one, (str, os.PathLike, Image.Image))

    if is_picture(given):
        return [given]
    if isinstance(
            given,
            np.ndarray) and given.dtype == np.uint8 and given.ndim == 4 and given.shape[1:] != model.graph.input_shape:
        given = list(given)
    if not isinstance(given, (list, tuple)) or not given or not any(map(is_picture, given)):
        return None
    strange = [i for i, one in enumerate(given) if not is_picture(one)]
    if strange:
        raise InputError(
            f"item {strange[0]} of the list is of type {type(given[strange[0]]).__name__} and no picture, others are; "
            "required: paths, PIL images or uint8 arrays (H, W, 3), or one array of network inputs")
    return list(given)


def _require_unmasked(name: str, given: Any) -> None:
    for one in (given, *(given if isinstance(given, (list, tuple)) else ())):
        if isinstance(one, np.ma.MaskedArray):
            raise InputError(f"{name} is a masked array, and what is masked would count; required: a plain array, as "
                             ".filled(0) gives it")


def checked_images(batch: npt.ArrayLike, model: Model, library: Any,
                   surely_within: Callable[[Array], bool] = lambda _: False) -> Array:
    """(N, C, H, W) float32 within the model's box, a copy; library: NumPy, or CuPy for its arrays. `surely_within` may
    know faster of a batch that it is finite and within."""
    shape = model.graph.input_shape
    _require_unmasked("the batch", batch)
    try:
        given = library.asarray(batch)
    except (ValueError, TypeError, RuntimeError) as error:  # RuntimeError: a tensor of PyTorch that wants .detach()
        raise InputError(
            f"the batch is no array of one shape ({error}); required: (N, {', '.join(map(str, shape))}) float32"
        ) from None
    if given.dtype.kind not in "fiu":
        raise InputError(f"the batch has type {given.dtype}; required: real numbers, as model.preprocess makes them")
    if given.shape == shape:
        given = given[None]
    if given.shape[1:] != shape:
        raise InputError(
            f"the batch has shape {given.shape}; required: (N, {', '.join(map(str, shape))}), as numpy.stack of what "
            "model.preprocess returns, or pictures: paths, PIL images or uint8 arrays (H, W, 3)")
    with nullcontext() if given.dtype == np.float32 else np.errstate(over="ignore"):
        # A copy: `at` reads it later, when the caller's may be another.
        images: Array = library.array(given, np.float32, order="C")
    if not images.size or surely_within(images):
        return images
    planes = images.reshape(-1, shape[1] * shape[2])  # rows of which each is read by one part of a GPU
    lowest = planes.min(1).reshape(-1, shape[0]).min(0)  # NaN where one is
    highest = planes.max(1).reshape(-1, shape[0]).max(0)
    if not (library.isfinite(lowest).all() and library.isfinite(highest).all()):
        worst = int(library.argmin(library.isfinite(images).all((1, 2, 3))))
        raise InputError(f"image {worst} holds NaN or infinity (as float32); required: finite numbers")
    box = model.graph.box
    if box is None:
        return images
    low, high = (library.asarray(bound)[:, None, None] for bound in box)
    if (lowest[:, None, None] >= low).all() and (highest[:, None, None] <= high).all():
        return images
    clipped: Array = library.clip(images, low, high)
    beyond = library.abs(images - clipped) > _CLIP_TOLERANCE * (high - low)
    if beyond.any():
        warnings.warn(
            f"{int(beyond.any((1, 2, 3)).sum())} of {len(images)} images have values beyond the model's value box "
            f"{box[0].tolist()}..{box[1].tolist()}; they were clipped to it. Was model.preprocess used?",
            ExplanationWarning, stacklevel=4)  # past Explainer.__call__ and its decorator
    return clipped


def checked_targets(target: Target, model: Model, count: int, outputs: int) -> npt.NDArray[np.int64] | None:
    """(N,): the output to explain of each image; None: the one with the highest score."""
    if target is None:
        return None
    _require_unmasked("target", target)
    if isinstance(target, np.ndarray):
        target = target.tolist()
    is_one = isinstance(target, (str, bytes, bytearray, memoryview)) or not isinstance(target, Sequence)
    given = [target] if is_one else list(target)  # type: ignore[arg-type]  # what it is not is refused below
    indices = []
    for one in given:
        index = model.class_index(one) if isinstance(one, str) else one
        if isinstance(index, bool) or not isinstance(index, (int, np.integer)) or not 0 <= index < outputs:
            raise InputError(
                f"target {shown(one)} is not an output; required: a whole number from 0 to {outputs - 1}, or a class "
                "name")
        indices.append(int(index))
    if not is_one and len(indices) != count:
        raise InputError(
            f"{len(indices)} targets were given for {count} images; required: one for all, or one for each")
    return np.resize(np.array(indices, np.int64), count)


def checked_start(start: npt.ArrayLike | None, target: Target, count: int, outputs: int, is_signed: bool
                  ) -> Array | None:
    """(N, K) float32: the relevance that each output starts with; None where a target is to be explained.

    is_signed: whether it may be negative.
    """
    if start is None:
        return None
    if target is not None:
        raise InputError("a target and a start were given; required: one or the other")
    _require_unmasked("start", start)
    try:
        given = np.asarray(start)
        if given.dtype.kind not in "fiu":
            raise ValueError
        with np.errstate(over="ignore"):
            relevance = np.broadcast_to(given, (count, outputs)).astype(np.float32)
    except (ValueError, TypeError, RuntimeError, OverflowError):
        raise InputError(
            f"start is no ({count}, {outputs}) or ({outputs},) array of numbers; required: relevance for each output"
        ) from None
    if not np.isfinite(relevance).all():
        raise InputError("start holds a number that is infinite or NaN; required: finite relevance")
    if not is_signed and (relevance < 0).any():
        raise InputError("start holds a negative number, and the rules by which outputs are redistributed decompose "
                         "positive relevance alone; required: relevance from 0, or rules such as epsilon")
    return relevance


@dataclass(frozen=True, eq=False)
class Question:
    """What of each image's scores is explained.

    targets : (N,) int64, the output to explain, or None, the highest
    start : (N, K) float32, the relevance that each output starts with, in place of a target's; or None
    against : what the target is held against: a name in AGAINST, or numbers of outputs; or None
    signed : whether negative scores are explained
    through : layers, and the channels that alone pass relevance on
    """

    targets: npt.NDArray[np.int64] | None
    start: Array | None
    against: str | tuple[int, ...] | None
    signed: bool
    through: Through = ()

    @property
    def mixes_signs(self) -> bool:
        """Whether outputs have negative relevance though the rules decompose positive scores alone."""
        return self.against is not None and not self.signed

    @property
    def is_special(self) -> bool:
        """Whether there is more to check than the score's sum."""
        return self.against is not None or bool(self.through)

    def part(self, which: slice) -> Question:
        """Of some images."""
        return replace(self, targets=None if self.targets is None else self.targets[which],
                       start=None if self.start is None else self.start[which])

    def of(self, scores: Array) -> tuple[npt.NDArray[np.int64], Array | None]:
        """The target of each image, by its scores (N, K), and the relevance that outputs start with; None where that is
        the target's score alone."""
        if self.start is not None:
            return np.abs(self.start).argmax(1), self.start
        targets = scores.argmax(1) if self.targets is None else self.targets
        return targets, None if self.against is None else self._contrast(scores, targets)

    def _contrast(self, scores: Array, targets: npt.NDArray[np.int64]) -> Array:
        """What the target starts with, less what each output that it is held against does."""
        rows, exact = np.arange(len(scores)), scores.astype(np.float64)
        own = exact if self.signed else np.maximum(exact, 0)
        of_targets, held = own[rows, targets], np.zeros_like(exact)
        usable = scores != 0  # what has the score 0 cannot be redistributed
        usable[rows, targets] = False
        if self.against == "others":  # Gu et al. 2018, CLRP1
            held += of_targets[:, None] * usable / np.maximum(usable.sum(1, keepdims=True), 1)
        elif self.against == "softmax-gradient":  # Iwana et al. 2019
            likely = np.exp(exact - exact.max(1, keepdims=True))
            likely /= likely.sum(1, keepdims=True)
            held += likely[rows, targets, None] * likely * usable
            of_targets = held.sum(1) * (scores[rows, targets] != 0)  # y (1 - y), also where y is nearly 1
        else:
            if self.against == "runner-up":
                others = exact.copy()
                others[rows, targets] = -np.inf
                against = others.argmax(1)[:, None]
            else:
                against = np.tile(np.array(self.against, np.int64), (len(scores), 1))
            np.add.at(held, (rows[:, None], against), own[rows[:, None], against] / against.shape[1])
        start = -held
        start[rows, targets] += of_targets
        return start.astype(np.float32)


def checked_against(against: Against, model: Model, conserves: bool) -> str | tuple[int, ...] | None:
    """As a `Question` has it. conserves: whether the rules redistribute relevance."""
    if against is None:
        return None
    outputs = model.graph.shapes[model.graph.output][0]
    if not conserves:
        raise InputError("the rules derive, and a derivative has no sum to hold against another's; required: rules "
                         "that redistribute, or a start, for the derivative of a weighted sum of scores")
    if outputs < 2:
        raise InputError("the network has one output, and nothing to hold it against; required: two or more")
    if isinstance(against, str) and against in AGAINST:
        return against
    many = isinstance(against, (Sequence, np.ndarray)) and not isinstance(against, (str, bytes, bytearray))
    given: Any = against if many else [against]
    if not len(given):
        raise InputError(f"there are no classes to hold the target against; required: some, or one of "
                         f"{', '.join(AGAINST)}")
    found = checked_targets(given, model, len(given), outputs)
    assert found is not None
    return tuple(found.tolist())


def checked_through(through: Mapping[str, int | Sequence[int]] | None, model: Model, conserves: bool) -> Through:
    """Layers, and the channels of what they make through which relevance goes on."""
    if through is None:
        return ()
    if not conserves:
        raise InputError("the rules derive, and no relevance goes through channels; required: rules that redistribute")
    if not isinstance(through, Mapping):
        raise InputError(f"through is {shown(through)}; required: a mapping from layers to channels, as in "
                         "{'conv5': [3, 17]}")
    found, shapes = [], model.graph.shapes
    for name, given in through.items():
        if not isinstance(name, str) or name not in shapes or name == INPUT:
            raise InputError(f"the network has no layer {shown(name)}; it has {', '.join(list(shapes)[1:])}")
        channels = list(given) if isinstance(given, (Sequence, np.ndarray)) and not isinstance(given, str) else [given]
        for one in channels:
            if isinstance(one, bool) or not isinstance(one, (int, np.integer)) or not 0 <= one < shapes[name][0]:
                raise InputError(f"channel {shown(one)} of layer {name!r} was given; required: whole numbers from 0 to "
                                 f"{shapes[name][0] - 1}")
        if not channels:
            raise InputError(f"no channels of layer {name!r} were given; required: one or more")
        found.append((name, tuple(sorted({int(one) for one in channels}))))
    return tuple(found)


def against_text(against: str | tuple[int, ...] | None, model: Model) -> str:
    """What a target is held against, in words; "" where nothing is."""
    if against is None or isinstance(against, str):
        return against or ""
    return "; ".join(map(model.class_name, against))


def factors(relevance: Array, scores: Array, first: int) -> Array:
    """c of R = |score| c. first: the number of the first image."""
    impossible = (relevance != 0) & (scores == 0)
    if impossible.any():
        image, output = np.argwhere(impossible)[0]
        raise InputError(
            f"output {output} of image {first + image} has the score 0, and start gives it relevance; required: a "
            "score that can be redistributed")
    with np.errstate(all="ignore"):  # what becomes infinite is refused with the relevance
        return np.divide(relevance, np.abs(scores), out=np.zeros_like(relevance), where=relevance != 0)


def memory_size(size: str | int, name: str = "memory") -> int:
    """A limit of memory as a number of bytes; `name` is the option's."""
    count = 0.0
    if isinstance(size, (int, np.integer)) and not isinstance(size, bool):
        count = size
    elif isinstance(size, str) and (match := _SIZE.fullmatch(size)):
        count = float(match[1]) * _UNITS[match[2].lower()]
    if not 1 <= count <= _MAX_BYTES:
        raise InputError(
            f"{name} is {shown(size)}; required: a number with one of the units KiB, MiB, GiB, KB, MB, GB, as in "
            "'2GiB', or a whole number of bytes, in all at most 2**63 - 1")
    return int(count)
