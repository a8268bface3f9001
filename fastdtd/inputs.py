"""What an Explainer is called with (images, targets, starting relevance), checked before anything is computed."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import numpy.typing as npt

from fastdtd.errors import InputError, shown
from fastdtd.graph import INPUT, Array, Shape
from fastdtd.model import Model
from fastdtd.question import HIGHEST, Place
from fastdtd.schedule import Through

Target = int | str | Sequence[int | str] | npt.NDArray[Any] | None
MapTarget = Target | tuple[Any, ...] | list[Any]  # with where in a map
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


def joined(given: Mapping[Any, Any], model: Model, library: Any) -> Array:
    """(N, features, 1, 1): the inputs of a network that has several, one after the other."""
    if not model.inputs:
        raise InputError("inputs were given by name, and the network has one; required: an array, or pictures")
    if set(given) != set(model.inputs):
        raise InputError(f"inputs {', '.join(map(shown, given))} were given; required: {', '.join(model.inputs)}")
    parts: list[Array] = []
    for name, shape in model.inputs.items():
        _require_unmasked(f"input {name!r}", given[name])
        sizes = ", ".join(map(str, shape))
        try:
            part = library.asarray(given[name])
        except (ValueError, TypeError, RuntimeError) as error:
            raise InputError(f"input {name!r} is no array of one shape ({error}); required: (N, {sizes})") from None
        flat = (shape[0],) if shape[1:] == (1, 1) else shape
        if part.shape in (shape, flat):
            part = part[None]
        if part.dtype.kind not in "fiu" or part.shape[1:] not in (shape, flat) or len(part) != len(parts[0] if parts
                                                                                                   else part):
            raise InputError(f"input {name!r} has type {part.dtype} and shape {part.shape}; required: numbers, (N, "
                             f"{sizes}), with as many N as the others")
        with np.errstate(over="ignore"):
            parts.append(part.reshape(len(part), -1).astype(np.float32))
    together: Array = library.concatenate(parts, 1)[:, :, None, None]
    return together


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


def checked_targets(target: Target, model: Model, count: int) -> npt.NDArray[np.int64] | None:
    """(N,): the output (of maps: the channel) to explain of each image; None: the one with the highest score."""
    if target is None:
        return None
    _require_unmasked("target", target)
    if isinstance(target, np.ndarray):
        target = target.tolist()
    is_one = isinstance(target, (str, bytes, bytearray, memoryview)) or not isinstance(target, Sequence)
    given = [target] if is_one else list(target)  # type: ignore[arg-type]  # what it is not is refused below
    indices = [_checked_target(one, model) for one in given]
    if not is_one and len(indices) != count:
        raise InputError(
            f"{len(indices)} targets were given for {count} images; required: one for all, or one for each")
    return np.array(indices * count if is_one else indices, np.int64)


def _checked_target(one: object, model: Model) -> int:
    shape = model.graph.output_shape
    index = model.class_index(one) if isinstance(one, str) else one
    if isinstance(index, bool) or not isinstance(index, (int, np.integer)) or not 0 <= index < shape[0]:
        of_maps = (
            '; with where in its map as in (channel, y, x), (channel, "max") or (channel, mask)'
            if model.graph.has_maps else "")
        raise InputError(
            f"target {shown(one)} is not an output; required: a whole number from 0 to {shape[0] - 1}, or a class "
            f"name{of_maps}")
    return int(index)


def checked_places(target: MapTarget, model: Model, count: int
                   ) -> tuple[npt.NDArray[np.int64] | None, tuple[Place, ...] | None]:
    """Channels (N,) of a network whose outputs are maps, and what of each is explained; None: the highest score."""
    if target is None:
        return None, None
    is_list = isinstance(target, list) or (isinstance(target, np.ndarray) and target.ndim > 0)
    given: list[Any] = [*target] if is_list else [target]  # type: ignore[misc]  # is_list says that it is
    if is_list and len(given) != count:
        raise InputError(f"{len(given)} targets were given for {count} images; required: one for all, or a list with "
                         "one for each")
    pairs = [_checked_place(one, model) for one in given] * (1 if is_list else count)
    return np.array([channel for channel, _ in pairs], np.int64), tuple(place for _, place in pairs)


def _checked_place(one: Any, model: Model) -> tuple[int, Place]:
    """A channel, and what of its map is explained."""
    if not isinstance(one, tuple):
        return _checked_target(one, model), None
    _, height, width = model.graph.output_shape
    if len(one) == 2 and not isinstance(one[1], str):
        try:
            mask = np.asarray(one[1])
        except ValueError:  # ragged
            mask = np.empty(0)
        if mask.shape != (height, width) or mask.dtype.kind not in "biu" or mask.min() < 0 or mask.max() != 1:
            raise InputError(
                f"the target's mask is of shape {mask.shape} and type {mask.dtype}; required: ({height}, {width}), "
                "true where the map is explained, and that somewhere")
        return _checked_target(one[0], model), mask.astype(np.bool_)
    if len(one) == 2 and one[1] == HIGHEST:
        return _checked_target(one[0], model), HIGHEST
    if len(one) != 3 or any(isinstance(n, bool) or not isinstance(n, (int, np.integer)) or not 0 <= n < size
                            for n, size in zip(one[1:], (height, width), strict=True)):
        raise InputError(
            f"target {shown(one)} is no part of an output; required: (channel, y, x), with y below {height} and x below"
            f' {width}, (channel, "{HIGHEST}") or (channel, mask)')
    return _checked_target(one[0], model), (int(one[1]), int(one[2]))


def checked_start(start: npt.ArrayLike | None, target: object, count: int, shape: Shape, is_signed: bool
                  ) -> Array | None:
    """(N, outputs) float32: the relevance that each output starts with; None where a target is to be explained.

    is_signed: whether it may be negative.
    """
    if start is None:
        return None
    if target is not None:
        raise InputError("a target and a start were given; required: one or the other")
    _require_unmasked("start", start)
    wanted = shape[:1] if shape[1:] == (1, 1) else shape
    try:
        given = np.asarray(start)
        if given.dtype.kind not in "fiu":
            raise ValueError
        with np.errstate(over="ignore"):
            relevance = np.broadcast_to(given, (count, *wanted)).astype(np.float32).reshape(count, -1)
    except (ValueError, TypeError, RuntimeError, OverflowError):
        sizes = ", ".join(map(str, wanted))
        raise InputError(f"start is no ({count}, {sizes}) or ({sizes}{',' * (len(wanted) == 1)}) array of numbers; "
                         "required: relevance for each output") from None
    if not np.isfinite(relevance).all():
        raise InputError("start holds a number that is infinite or NaN; required: finite relevance")
    if not is_signed and (relevance < 0).any():
        raise InputError("start holds a negative number, and the rules by which outputs are redistributed decompose "
                         "positive relevance alone; required: relevance from 0, or rules such as epsilon")
    return relevance


def checked_against(against: Against, model: Model, conserves: bool) -> str | tuple[int, ...] | None:
    """As a `Question` has it. conserves: whether the rules redistribute relevance."""
    if against is None:
        return None
    if not conserves:
        raise InputError("the rules derive, and a derivative has no sum to hold against another's; required: rules "
                         "that redistribute, or a start, for the derivative of a weighted sum of scores")
    if model.graph.output_shape[0] < 2:
        raise InputError("the network has one output, and nothing to hold it against; required: two or more")
    if isinstance(against, str) and against in AGAINST:
        return against
    many = isinstance(against, (Sequence, np.ndarray)) and not isinstance(against, (str, bytes, bytearray))
    given: Any = against if many else [against]
    if not len(given):
        raise InputError(f"there are no classes to hold the target against; required: some, or one of "
                         f"{', '.join(AGAINST)}")
    found = checked_targets(given, model, len(given))
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
