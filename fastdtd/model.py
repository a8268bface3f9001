"""A Model: a network with what it takes to feed it a picture and to name what it says."""

from __future__ import annotations

import dataclasses
import difflib
import html
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from fastdtd.canonize import canonize, with_complement
from fastdtd.errors import InputError, ModelError, printable, shown
from fastdtd.graph import Array, Graph
from fastdtd.layers import Shape, outputs_text, shape_text

COLORS = {"rgb": 3, "bgr": 3, "gray": 1}
RESIZES = ("stretch", "crop")
_MAX_NAMES = 2  # of classes, and lines of provenance, in a printed model
_MAX_TEXT = 80  # of a line of provenance
_MAX_NEAR = 5  # names that an unknown class is answered with


@dataclass(frozen=True, eq=False)
class Preprocessing:
    """How a picture becomes the network's input: resized, colours ordered, then ``(pixel * scale - mean) / std``.

    Parameters
    ----------
    color : {"rgb", "bgr", "gray"} or None
        Order of the input's channels. None: the input is no picture, and only arrays are accepted.
    resize : {"stretch", "crop"}
        Stretch to the input's size, or scale until the picture covers it and cut out the centre.
    mean, std : float, (C,) or (C, H, W)
        After `scale`, in the input's channel order.
    scale : float
        Multiplies the pixels 0..255.
    """

    color: str | None = "rgb"
    resize: str = "stretch"
    mean: Any = 0.0
    std: Any = 1.0
    scale: float = 1.0

    @property
    def values(self) -> Array | None:
        """What each of 256 values of a pixel becomes, (C, 256), once a Model has it; None where pixels have means and
        deviations of their own."""
        if not self.mean.shape[1:] == self.std.shape[1:] == (1, 1):
            return None
        values: Array = (np.arange(256, dtype=np.float32) * np.float32(self.scale) - self.mean[:, 0]) / self.std[:, 0]
        return values


@dataclass(frozen=True, eq=False, repr=False)
class Model:
    """A network, its preprocessing and its class names. `fastdtd.load` and `fastdtd.convert` make one.

    Parameters
    ----------
    graph : Graph
        Kept in canonical form (see canonize.py): without dropout, softmax and batch norm.
    preprocessing : Preprocessing
    classes : sequence of str
        One name for each output (of maps: each channel), or empty. Two names for one output make a binary classifier
        of it, with the outputs -y, which the first name is of, and y.
    provenance : dict of str to str
        Where the weights come from: source, license, ....
    inputs : dict of str to (C, H, W)
        Of a network with several inputs: their names and shapes. The graph's input, (features, 1, 1), holds them one
        after the other. Empty where there is one.

    Raises
    ------
    ModelError
        Where preprocessing or class names do not fit the network.

    Examples
    --------
    >>> import fastdtd
    >>> print(fastdtd.load("squeezenet1_1"))
    Model: 64 layers, 1,235,496 parameters
      input    3x227x227, bgr, stretch; box -123 to 151
      outputs  1000: tench; goldfish; ...
      license  BSD-2-Clause (weights), BSD-3-Clause (class names, from torchvision); see NOTICE
      source   SqueezeNet 1.1, Iandola, Han, Moskewicz, Ashraf, Dally, Keutzer, arXiv:1602.0736...
    """

    graph: Graph
    preprocessing: Preprocessing = field(default_factory=Preprocessing)
    classes: tuple[str, ...] = ()
    provenance: dict[str, str] = field(default_factory=dict)
    inputs: dict[str, Shape] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, kind in (("graph", Graph), ("preprocessing", Preprocessing), ("provenance", Mapping),
                           ("inputs", Mapping)):
            if not isinstance(getattr(self, name), kind):
                raise ModelError(f"the model's {name} is {shown(getattr(self, name))}; required: a {kind.__name__}")
        if not all(isinstance(text, str) for pair in self.provenance.items() for text in pair):
            raise ModelError(f"the model's provenance is {shown(self.provenance)}; required: texts by name")
        object.__setattr__(self, "graph", canonize(self.graph))
        object.__setattr__(self, "classes", _checked_classes(self.classes))
        object.__setattr__(self, "preprocessing", _checked(self.preprocessing, self.graph.input_shape))
        object.__setattr__(self, "inputs", _checked_inputs(self.inputs, self.graph.input_shape))
        shape = self.graph.output_shape
        if len(self.classes) == 2 and shape[0] == 1:
            object.__setattr__(self, "graph", with_complement(self.graph))
        elif self.classes and len(self.classes) != shape[0]:
            raise ModelError(
                f"the model names {len(self.classes)} classes but has {outputs_text(shape)}"
                f"{' outputs' if shape[1:] == (1, 1) else ''}; required: one name each, or none")

    def _facts(self) -> dict[str, str]:
        """What it is, in a few lines."""
        graph, p = self.graph, self.preprocessing
        box = "none" if graph.box is None else f"{graph.box[0].min():g} to {graph.box[1].max():g}"
        how = f"{p.color}, {p.resize}" if p.color else "no picture"
        outputs = outputs_text(graph.output_shape)
        names = "; ".join(self.classes[:_MAX_NAMES]) + ("; ..." if len(self.classes) > _MAX_NAMES else "")
        shapes = ", ".join(f"{name} {shape_text(shape)}" for name, shape in self.inputs.items())
        facts = {"input": f"{shapes or shape_text(graph.input_shape)}, {how}; box {box}",
                 "outputs": f"{outputs}: {names}" if names else f"{outputs}, unnamed"}
        return {**facts, **{key: _one_line(value) for key, value in list(self.provenance.items())[:_MAX_NAMES]}}

    def _title(self) -> str:
        return f"{len(self.graph.layers)} layers, {self.graph.parameters:,} parameters"

    def __repr__(self) -> str:
        facts = self._facts()
        width = max(map(len, facts))
        lines = [printable(f"  {key:<{width}}  {value}") for key, value in facts.items()]
        return "\n".join([f"Model: {self._title()}", *lines])

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><th style='text-align:left'>{html.escape(key)}</th><td "
            f"style='text-align:left'>{html.escape(value)}</td></tr>"
            for key, value in self._facts().items())
        return f"<table><tr><th colspan=2>Model: {self._title()}</th></tr>{rows}</table>"

    def preprocess(self, picture: Any) -> Array:
        """The network's input from a picture.

        Parameters
        ----------
        picture : path, PIL image, or uint8 array (H, W), (H, W, 3) or (H, W, 4), RGB(A)

        Returns
        -------
        (C, H, W) float32

        Raises
        ------
        PictureError
            What cannot be read as a picture.
        """
        from fastdtd import images

        if self.inputs:
            names = ", ".join(f"{name!r} {shape}" for name, shape in self.inputs.items())
            raise InputError("this model has several inputs, which only Python can give: pass arrays by name to the "
                             f"explainer, explainer({{{next(iter(self.inputs))!r}: array, ...}}), of {names}")
        if self.preprocessing.color is None:
            raise InputError("this model's input is no picture (its colour order is not given); pass arrays of shape "
                             f"{self.graph.input_shape} to the explainer")
        pixels = images.read(picture, self.graph.input_shape, self.preprocessing.color, self.preprocessing.resize)
        p = self.preprocessing
        values = p.values
        if values is not None:
            return np.stack([of_channel[plane] for of_channel, plane in zip(values, pixels, strict=True)])
        return np.ascontiguousarray((pixels.astype(np.float32) * np.float32(p.scale) - p.mean) / p.std, np.float32)

    def class_name(self, index: int) -> str:
        """Name of output `index`, or its number where the model has no names."""
        outputs = self.graph.output_shape[0]
        if not isinstance(index, (int, np.integer)) or not 0 <= index < outputs:
            raise InputError(f"output {shown(index)} was asked for; required: a whole number from 0 to {outputs - 1}")
        return self.classes[index] if self.classes else str(index)

    def class_index(self, name: str) -> int:
        """The output named `name`: the whole name, its WordNet id, or one of its synonyms, whatever the case."""
        if not isinstance(name, str):
            raise InputError(f"class name {shown(name)} is of type {type(name).__name__}; required: str")
        if not self.classes:
            raise InputError(f"target {shown(name)} is a class name, but this model has none; give the number of an "
                             "output")
        wanted = name.strip().lower()
        for forms in (lambda c: [c], _synonyms):
            matches = [i for i, c in enumerate(self.classes) if wanted in forms(c.lower())]
            if len(matches) == 1:
                return matches[0]
            if matches:
                raise InputError(
                    f"class name {name!r} is ambiguous: it names outputs {', '.join(map(str, matches))}; give the "
                    "number"
                )
        near = self._nearest(wanted)
        raise InputError(f"no class is named {shown(name)}; required: one of {len(self.classes)} names, or a number"
                         + (f". Nearest: {'; '.join(near)}" if near else ""))

    def _nearest(self, wanted: str) -> list[str]:
        """Classes whose names hold `wanted`, or are spelled much like it."""
        holding = [c for c in self.classes if wanted and wanted in c.lower()]
        spelled = {form: c for c in self.classes for form in [c.lower(), *_synonyms(c.lower())]}
        alike = [spelled[form] for form in difflib.get_close_matches(wanted, spelled, _MAX_NEAR)]
        return list(dict.fromkeys([*holding, *alike]))[:_MAX_NEAR]


def _checked_classes(names: Any) -> tuple[str, ...]:
    is_sequence = np.iterable(names) and not isinstance(names, (str, bytes))
    classes = tuple(names) if is_sequence else ()
    if not is_sequence or not all(isinstance(name, (str, int, np.integer)) for name in classes):
        raise ModelError(f"the model's classes are {shown(names)}; required: a sequence of names, each a str")
    return tuple(map(str, classes))


def _checked_inputs(inputs: Mapping[Any, Any], shape: Shape) -> dict[str, Shape]:
    found: dict[str, Shape] = {}
    for name, given in inputs.items():
        sizes = tuple(given) if np.iterable(given) else ()
        if not isinstance(name, str) or not name or len(sizes) != 3 or any(
                isinstance(n, bool) or not isinstance(n, (int, np.integer)) or n < 1 for n in sizes):
            raise ModelError(f"the input {shown(name)} has shape {shown(given)}; required: a name, and (channels, "
                             "height, width)")
        found[name] = int(sizes[0]), int(sizes[1]), int(sizes[2])
    total = sum(math.prod(sizes) for sizes in found.values())
    if found and (total, 1, 1) != shape:
        raise ModelError(f"the inputs {', '.join(found)} have {total} values, and the network's input has shape "
                         f"{shape_text(shape)}; required: ({total}, 1, 1)")
    return found


def _one_line(text: str) -> str:
    return text if len(text) <= _MAX_TEXT else f"{text[:_MAX_TEXT]}..."


def _synonyms(name: str) -> list[str]:
    """'n02123045 tabby, tabby cat' -> its id, 'tabby', 'tabby cat'."""
    head, _, rest = name.partition(" ")
    is_id = head[:1] == "n" and head[1:].isdigit()
    return ([head] if is_id else []) + [part.strip() for part in (rest if is_id else name).split(",")]


def _checked(p: Preprocessing, shape: tuple[int, int, int]) -> Preprocessing:
    if p.color is not None and (not isinstance(p.color, str) or p.color not in COLORS):
        raise ModelError(f"colour order {shown(p.color)} is unknown; required: one of {', '.join(COLORS)}")
    if p.color is not None and COLORS[p.color] != shape[0]:
        raise ModelError(
            f"colour order {p.color!r} has {COLORS[p.color]} channels but the network's input has {shape[0]}")
    if not isinstance(p.resize, str) or p.resize not in RESIZES:
        raise ModelError(f"resize {shown(p.resize)} is unknown; required: one of {', '.join(RESIZES)}")
    mean, std = (_per_channel(name, getattr(p, name), shape) for name in ("mean", "std"))
    scale = _number("scale", p.scale)
    if (std == 0).any() or scale == 0:
        raise ModelError("std and scale must not be zero: they divide and multiply the pixels")
    return dataclasses.replace(p, mean=mean, std=std, scale=scale)


def _number(name: str, value: Any) -> float:
    try:
        with np.errstate(over="ignore"):
            number = float(np.float32(value))
    except (TypeError, ValueError, RuntimeError, OverflowError):
        number = float("nan")
    if not np.isfinite(number):
        raise ModelError(f"preprocessing has {name} {shown(value)}; required: a finite float32 number")
    return number


def _per_channel(name: str, value: Any, shape: tuple[int, int, int]) -> npt.NDArray[np.float32]:
    """`value` as (C, 1, 1) or (C, H, W) float32."""
    try:
        with np.errstate(over="ignore"):
            array = np.asarray(value, np.float32)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise ModelError(
            f"preprocessing has {name} {shown(value)}; required: numbers, and as many in each row") from None
    if array.ndim <= 1 and array.size in (1, shape[0]):
        array = np.broadcast_to(array.reshape(-1, 1, 1), (shape[0], 1, 1))
    if array.shape not in ((shape[0], 1, 1), shape) or not np.isfinite(array).all():
        raise ModelError(
            f"preprocessing has {name} of shape {np.shape(value)}; required: finite, and one number, one for each of "
            f"{shape[0]} channels, or one for each of {shape}")
    array = np.array(array, np.float32, order="C")
    array.flags.writeable = False
    return array
