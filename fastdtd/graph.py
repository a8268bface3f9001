"""Networks as frozen values: layers, how they connect, and what follows from that (shapes, input domains).

A tensor is named after the layer that makes it; the network's input is named ``"input"``. Shapes leave the batch out
and always have three entries, (channels, height, width); a flat tensor of F features is (F, 1, 1). Values here are
never changed after they are made.
"""

from __future__ import annotations

import dataclasses
import heapq
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from fastdtd.errors import ModelError

INPUT = "input"
MAX_TENSOR_ELEMENTS = 2**28  # one tensor of one image: 1 GiB of float32; larger claims are taken for damage or attack
MAX_WEIGHT_ELEMENTS = 2**30  # one layer's weights: 4 GiB of float32
MAX_LAYERS = 10_000
MAX_PADDING = 1024  # with more, windows of nothing but padding could keep a processor busy for days
_MIN_NORM_BIAS = 1e-6
_MAX_EXPONENT = 100
MAX_CONVOLUTION_STRIDE = 256  # its square is how many phases the backward pass has

Shape = tuple[int, int, int]
Array = npt.NDArray[np.float32]


@dataclass(frozen=True, eq=False, repr=False)
class Layer:
    """What every layer has: a unique name and the names of the tensors it reads.

    A subclass says how its output shape follows from its input shapes, which of its fields are weights (``arrays``),
    and how many inputs it takes (``arity``, minimum and maximum).
    """

    name: str
    inputs: tuple[str, ...]

    arity: ClassVar[tuple[int, int]] = (1, 1)
    arrays: ClassVar[tuple[str, ...]] = ()
    integer_arrays: ClassVar[tuple[str, ...]] = ()  # those of `arrays` that hold int32 and not float32

    def __post_init__(self) -> None:
        object.__setattr__(self, "inputs", tuple(self.inputs))
        for name in self.arrays:
            if getattr(self, name) is not None:
                made_of = _indices if name in self.integer_arrays else _weights
                object.__setattr__(self, name, made_of(self.name, name, getattr(self, name)))
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name != "inputs" and isinstance(value, (list, tuple)):
                object.__setattr__(self, field.name, tuple(int(v) for v in value))
            elif field.type == "float":
                object.__setattr__(self, field.name, float(value))
        minimum, maximum = self.arity
        if not minimum <= len(self.inputs) <= maximum:
            wanted = f"{minimum}" if minimum == maximum else f"{minimum} or more"
            self._refuse(f"has {len(self.inputs)} inputs; {type(self).__name__} takes {wanted}")
        self.validate()

    def __repr__(self) -> str:
        """Fields that differ from their defaults; of arrays the shape alone."""
        told = []
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, np.ndarray):
                told.append(f"{field.name}={_text(value.shape)}")
            elif field.default is dataclasses.MISSING or value != field.default:
                told.append(f"{field.name}={value!r}" if field.name != "name" else repr(value))
        return f"{type(self).__name__}({', '.join(told)})"

    def _refuse(self, what: str) -> None:
        raise ModelError(f"layer {self.name!r} {what}")

    def _require_ints(self, field: str, length: int, minimum: int, maximum: int = 2**24 - 1) -> None:
        value = getattr(self, field)
        if len(value) != length or any(v < minimum or v > maximum for v in value):
            self._refuse(f"has {field} {value}; required: {length} integers from {minimum} to {maximum}")

    def validate(self) -> None:
        """Raise ModelError where the layer's own fields contradict each other."""

    def output_shape(self, shapes: list[Shape]) -> Shape:
        """Output shape (C, H, W) from the input shapes; raises ModelError where they do not fit."""
        return shapes[0]


def _weights(layer: str, field: str, value: Any) -> Array:
    """A finite, read-only, C-ordered float32 copy of `value`."""
    array = np.asarray(value)
    if array.dtype.kind not in "fiu":
        raise ModelError(f"layer {layer!r} has {field} of type {array.dtype}; required: real numbers")
    if array.size > MAX_WEIGHT_ELEMENTS:
        raise ModelError(
            f"layer {layer!r} has {field} of {array.size} elements; at most {MAX_WEIGHT_ELEMENTS} are accepted")
    with np.errstate(over="ignore"):
        array = np.array(array, np.float32, order="C")
    if not np.isfinite(array).all():
        raise ModelError(f"layer {layer!r} has NaN or infinity in its {field}; required: finite float32 numbers")
    array.flags.writeable = False
    return array


def _indices(layer: str, field: str, value: Any) -> npt.NDArray[np.int32]:
    """A read-only, C-ordered int32 copy of `value`."""
    array = np.asarray(value)
    if array.dtype.kind not in "iu" or array.size > MAX_TENSOR_ELEMENTS:
        raise ModelError(
            f"layer {layer!r} has {field} of {array.size} elements of type {array.dtype}; required: at most "
            f"{MAX_TENSOR_ELEMENTS} integers")
    if array.size and not -1 <= array.min() <= array.max() < MAX_TENSOR_ELEMENTS:
        raise ModelError(
            f"layer {layer!r} has {field} from {array.min()} to {array.max()}; required: -1 to "
            f"{MAX_TENSOR_ELEMENTS - 1}"
        )
    array = np.array(array, np.int32, order="C")
    array.flags.writeable = False
    return array


@dataclass(frozen=True, eq=False, repr=False)
class Conv2d(Layer):
    """y[k] = sum over c, i, j of weight[k, c, i, j] * x[c, ...] + bias[k].

    weight: (K, C / groups, kernel height, kernel width); bias: (K,) or None; padding: (top, left, bottom, right), with
    zeros.
    """

    weight: Array
    bias: Array | None = None
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    arrays = ("weight", "bias")

    def validate(self) -> None:
        self._require_ints("stride", 2, 1, MAX_CONVOLUTION_STRIDE)
        self._require_ints("padding", 4, 0, MAX_PADDING)
        self._require_ints("dilation", 2, 1)
        if self.weight.ndim != 4 or 0 in self.weight.shape:
            self._refuse(
                f"has weight of shape {self.weight.shape}; required: (K, C / groups, kernel height, kernel width)")
        if self.groups < 1 or self.weight.shape[0] % self.groups:
            self._refuse(
                f"has {self.weight.shape[0]} output channels in {self.groups} groups; required: groups that divide them"
            )
        _check_bias(self, self.weight.shape[0])

    def output_shape(self, shapes: list[Shape]) -> Shape:
        channels, height, width = shapes[0]
        outputs, per_group, *kernel = self.weight.shape
        if channels != per_group * self.groups:
            self._refuse(
                f"expects {per_group * self.groups} input channels ({per_group} in each of {self.groups} groups) but "
                f"{self.inputs[0]!r} has {channels}")
        sizes = []
        for axis, size in enumerate((height, width)):
            padded = size + self.padding[axis] + self.padding[axis + 2]
            span = self.dilation[axis] * (kernel[axis] - 1) + 1
            if padded < span:
                self._refuse(f"has a kernel that spans {span} pixels over an input of {padded} (padding included)")
            sizes.append((padded - span) // self.stride[axis] + 1)
        return outputs, sizes[0], sizes[1]


@dataclass(frozen=True, eq=False, repr=False)
class Dense(Layer):
    """y = weight x + bias on a flat tensor. weight: (K, F); bias: (K,) or None."""

    weight: Array
    bias: Array | None = None

    arrays = ("weight", "bias")

    def validate(self) -> None:
        if self.weight.ndim != 2 or 0 in self.weight.shape:
            self._refuse(f"has weight of shape {self.weight.shape}; required: (outputs, features)")
        _check_bias(self, self.weight.shape[0])

    def output_shape(self, shapes: list[Shape]) -> Shape:
        if shapes[0] != (self.weight.shape[1], 1, 1):
            self._refuse(
                f"expects {self.weight.shape[1]} flat features but {self.inputs[0]!r} has shape {_text(shapes[0])}"
                + ("; put a Flatten before it" if shapes[0][1:] != (1, 1) else ""))
        return self.weight.shape[0], 1, 1


def _check_bias(layer: Conv2d | Dense, outputs: int) -> None:
    if layer.bias is not None and layer.bias.shape != (outputs,):
        raise ModelError(f"layer {layer.name!r} has bias of shape {layer.bias.shape}; required: ({outputs},)")


@dataclass(frozen=True, eq=False, repr=False)
class ReLU(Layer):
    """x = max(y, 0)."""


@dataclass(frozen=True, eq=False, repr=False)
class Clip(Layer):
    """x = min(max(y, low), high), with low <= 0 < high; ReLU6 is 0 and 6. Either bound may be infinite."""

    low: float = 0.0
    high: float = math.inf

    def validate(self) -> None:
        if not self.low <= 0 < self.high:
            self._refuse(
                f"clips to {self.low:g}..{self.high:g}; required: a lower bound of 0 or less, and an upper one above 0")


@dataclass(frozen=True, eq=False, repr=False)
class LeakyReLU(Layer):
    """x = y where y > 0, else slope * y, with 0 <= slope <= 1."""

    slope: float

    def validate(self) -> None:
        if not 0 <= self.slope <= 1:
            self._refuse(f"has slope {self.slope:g}; required: 0 to 1")


@dataclass(frozen=True, eq=False, repr=False)
class Power(Layer):
    """x = |y|^exponent. A pool by the p-norm is Power(p), a convolution of ones, Power(1 / p)."""

    exponent: float

    def validate(self) -> None:
        if not 0 < self.exponent <= _MAX_EXPONENT:
            self._refuse(f"has exponent {self.exponent:g}; required: above 0, at most {_MAX_EXPONENT}")


@dataclass(frozen=True, eq=False, repr=False)
class LocalResponseNorm(Layer):
    """x[c] = y[c] / (bias + alpha / size * sum of y^2 over `size` channels around c)^beta (Krizhevsky et al. 2012).

    The channels are those from (size - 1) // 2 before c to size // 2 after it, as far as there are any.
    within_channel: size x size pixels around each of the same channel instead, and alpha / size^2.
    """

    size: int
    alpha: float = 1e-4
    beta: float = 0.75
    bias: float = 1.0
    within_channel: bool = False

    def validate(self) -> None:
        if not 1 <= self.size <= MAX_PADDING:
            self._refuse(f"has size {self.size}; required: 1 to {MAX_PADDING}")
        if not (0 <= self.alpha < math.inf and 0 <= self.beta <= 100 and _MIN_NORM_BIAS <= self.bias < math.inf):
            self._refuse(
                f"has alpha {self.alpha:g}, beta {self.beta:g} and bias {self.bias:g}; required: none negative, beta "
                f"up to 100, and a bias of {_MIN_NORM_BIAS} or more, so that nothing is divided by zero")


@dataclass(frozen=True, eq=False, repr=False)
class Pool2d(Layer):
    """What the pools share. kernel, stride: (height, width); padding: (top, left, bottom, right), each less than the
    kernel.

    ceil_mode rounds the number of windows up; a window that would start beyond the input is dropped, as in PyTorch,
    Caffe and ONNX.
    """

    kernel: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    ceil_mode: bool = False

    def validate(self) -> None:
        self._require_ints("kernel", 2, 1)
        self._require_ints("stride", 2, 1)
        self._require_ints("padding", 4, 0, MAX_PADDING)
        if any(self.padding[i] >= self.kernel[i % 2] for i in range(4)):
            self._refuse(
                f"has padding {self.padding} (top, left, bottom, right); required: less than the kernel {self.kernel}")

    def output_shape(self, shapes: list[Shape]) -> Shape:
        channels, *image = shapes[0]
        sizes = []
        for axis, size in enumerate(image):
            before, after = self.padding[axis], self.padding[axis + 2]
            free = size + before + after - self.kernel[axis]
            if free < 0:
                self._refuse(
                    f"has a kernel of {self.kernel[axis]} pixels over an input of {size + before + after} (padding "
                    "included)"
                )
            count = (-(-free // self.stride[axis]) if self.ceil_mode else free // self.stride[axis]) + 1
            if self.ceil_mode and (count - 1) * self.stride[axis] >= size + before:
                count -= 1
            sizes.append(count)
        return channels, sizes[0], sizes[1]


@dataclass(frozen=True, eq=False, repr=False)
class MaxPool2d(Pool2d):
    """The largest value of each window; padding never wins."""


@dataclass(frozen=True, eq=False, repr=False)
class AveragePool2d(Pool2d):
    """The mean of each window.

    count_include_pad: padded zeros count in the divisor (never what ceil_mode adds beyond them).
    """

    count_include_pad: bool = False


@dataclass(frozen=True, eq=False, repr=False)
class GlobalAveragePool(Layer):
    """The mean of each channel: (C, H, W) -> (C, 1, 1)."""

    def output_shape(self, shapes: list[Shape]) -> Shape:
        return shapes[0][0], 1, 1


@dataclass(frozen=True, eq=False, repr=False)
class Concat(Layer):
    """Inputs one after the other along the channels."""

    arity = (1, MAX_LAYERS)

    def output_shape(self, shapes: list[Shape]) -> Shape:
        if len({shape[1:] for shape in shapes}) > 1:
            self._refuse(f"concatenates channels of different sizes: {', '.join(map(_text, shapes))}")
        return sum(shape[0] for shape in shapes), shapes[0][1], shapes[0][2]


@dataclass(frozen=True, eq=False, repr=False)
class Add(Layer):
    """The sum of two tensors of one shape."""

    arity = (2, 2)

    def output_shape(self, shapes: list[Shape]) -> Shape:
        if shapes[0] != shapes[1]:
            self._refuse(f"adds tensors of different shapes: {', '.join(map(_text, shapes))}")
        return shapes[0]


@dataclass(frozen=True, eq=False, repr=False)
class Flatten(Layer):
    """(C, H, W) -> (C H W, 1, 1), in that order."""

    def output_shape(self, shapes: list[Shape]) -> Shape:
        channels, height, width = shapes[0]
        return channels * height * width, 1, 1


@dataclass(frozen=True, eq=False, repr=False)
class Rearrange(Layer):
    """Elements in another order and shape: reshape, transpose, slice, pad, channel shuffle, nearest upsampling.

    index: (C, H, W) integers, of the output's shape. Each is the index, in C order, of the element of the input that
    comes there, or -1 for a zero.
    """

    index: npt.NDArray[np.int32]

    arrays = ("index",)
    integer_arrays = ("index",)

    def validate(self) -> None:
        if self.index.ndim != 3 or not self.index.size:
            self._refuse(f"has index of shape {self.index.shape}; required: the output's, (C, H, W)")

    def output_shape(self, shapes: list[Shape]) -> Shape:
        if self.index.max() >= math.prod(shapes[0]):
            self._refuse(f"has index {self.index.max()} but {self.inputs[0]!r} has {math.prod(shapes[0])} elements")
        channels, height, width = self.index.shape
        return channels, height, width


@dataclass(frozen=True, eq=False, repr=False)
class BatchNorm(Layer):
    """y[c] = scale[c] x[c] + shift[c]: batch normalisation at inference.

    canonize.py folds it into the convolution or dense layer before it or after it, or makes a convolution of it.
    """

    scale: Array
    shift: Array

    arrays = ("scale", "shift")

    def validate(self) -> None:
        if self.scale.ndim != 1 or self.scale.shape != self.shift.shape:
            self._refuse(
                f"has scale {self.scale.shape} and shift {self.shift.shape}; required: one number each for every "
                "channel"
            )

    def output_shape(self, shapes: list[Shape]) -> Shape:
        if shapes[0][0] != len(self.scale):
            self._refuse(f"has {len(self.scale)} scales but {self.inputs[0]!r} has {shapes[0][0]} channels")
        return shapes[0]


@dataclass(frozen=True, eq=False, repr=False)
class Dropout(Layer):
    """Does nothing at inference. canonize.py drops it."""


@dataclass(frozen=True, eq=False, repr=False)
class Softmax(Layer):
    """Probabilities from class scores.

    Only as the last layer, where canonize.py drops it: what is explained is the score.
    """


LAYER_TYPES: dict[str, type[Layer]] = {
    "conv2d": Conv2d, "dense": Dense, "relu": ReLU, "max_pool2d": MaxPool2d, "average_pool2d": AveragePool2d,
    "global_average_pool": GlobalAveragePool, "concat": Concat, "add": Add, "flatten": Flatten, "batch_norm": BatchNorm,
    "clip": Clip, "leaky_relu": LeakyReLU, "power": Power, "rearrange": Rearrange,
    "local_response_norm": LocalResponseNorm, "dropout": Dropout, "softmax": Softmax,
}  # the names that model files use


@dataclass(frozen=True, eq=False)
class Domain:
    """Which values a tensor can take, and so which rule the layer that reads it gets.

    low, high : (C,) float32 or None
        Bounds of each channel, where they are known.
    hidden : bool
        Whether a layer with weights or a nonlinearity lies between the network's input and this tensor.
    """

    hidden: bool
    nonnegative: bool
    low: Array | None = None
    high: Array | None = None

    def __str__(self) -> str:
        if self.low is not None and self.high is not None:
            return "box"
        return "non-negative" if self.nonnegative else "real"


@dataclass(frozen=True, eq=False, repr=False)
class Graph:
    """A network without cycles, checked when it is made.

    Parameters
    ----------
    layers : iterable of Layer
        In any order; kept in an order in which every layer comes after its inputs.
    input_shape : (C, H, W)
        Of one picture.
    box : (low, high) or None
        Bounds of the input's values, after preprocessing: a number or one for each channel.

    Attributes
    ----------
    shapes : dict of str to (C, H, W)
        Of every tensor, the input included.
    domains : dict of str to Domain
        Of every tensor, the input included.
    output : str
        The one tensor that no layer reads: the class scores, of shape (K, 1, 1).

    Raises
    ------
    ModelError
        Names that repeat or are missing, a cycle, shapes that do not fit, more or less than one output, bounds that are
        no bounds.
    """

    layers: tuple[Layer, ...]
    input_shape: Shape
    box: tuple[Array, Array] | None = None
    output: str = dataclasses.field(init=False)
    shapes: dict[str, Shape] = dataclasses.field(init=False)
    domains: dict[str, Domain] = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        def keep(name: str, value: Any) -> None:
            object.__setattr__(self, name, value)

        keep("input_shape", _input_shape(self.input_shape))
        keep("box", None if self.box is None else _box(self.box, self.input_shape[0]))
        keep("layers", _sorted(tuple(self.layers)))
        keep("shapes", self._infer_shapes())
        read = {name for layer in self.layers for name in layer.inputs}
        outputs = [layer.name for layer in self.layers if layer.name not in read]
        if len(outputs) != 1:
            raise ModelError(
                f"the network has {len(outputs)} outputs ({', '.join(map(repr, outputs))}); required: one. Remove the "
                "layers that lead to the others")
        keep("output", outputs[0])
        if self.shapes[self.output][1:] != (1, 1):
            raise ModelError(
                f"the network's output {self.output!r} has shape {_text(self.shapes[self.output])}; required: one "
                "score for each class, (K, 1, 1). Add a global average pool or a flatten at the end")
        keep("domains", self._infer_domains())

    def __iter__(self) -> Iterator[Layer]:
        return iter(self.layers)

    @property
    def parameters(self) -> int:
        """Numbers that training gave: those of weights, biases and batch norms."""
        return sum(getattr(layer, field).size for layer in self for field in layer.arrays
                   if field not in layer.integer_arrays and getattr(layer, field) is not None)

    def __repr__(self) -> str:
        return (
            f"<Graph of {len(self.layers)} layers: {_text(self.input_shape)} -> {self.shapes[self.output][0]} scores, "
            f"{self.parameters:,} parameters>")

    def _infer_shapes(self) -> dict[str, Shape]:
        shapes = {INPUT: self.input_shape}
        for layer in self.layers:
            shape = layer.output_shape([shapes[name] for name in layer.inputs])
            if int(np.prod(shape, dtype=object)) > MAX_TENSOR_ELEMENTS:
                raise ModelError(
                    f"layer {layer.name!r} makes a tensor of shape {_text(shape)}; at most {MAX_TENSOR_ELEMENTS} "
                    "elements are accepted")
            shapes[layer.name] = shape
        return shapes

    def _infer_domains(self) -> dict[str, Domain]:
        low, high = self.box if self.box is not None else (None, None)
        domains = {INPUT: Domain(False, low is not None and bool((low >= 0).all()), low, high)}
        for layer in self.layers:
            domains[layer.name] = _output_domain(layer, [domains[name] for name in layer.inputs], self.shapes)
        return domains


def _output_domain(layer: Layer, inputs: list[Domain], shapes: dict[str, Shape]) -> Domain:
    match layer:
        case Conv2d() | Dense() | BatchNorm():
            return Domain(hidden=True, nonnegative=False)
        case ReLU() | Softmax():
            return Domain(hidden=True, nonnegative=True)
        case Clip():
            return Domain(hidden=True, nonnegative=layer.low >= 0 or inputs[0].nonnegative)
        case Power():
            return Domain(hidden=True, nonnegative=True)
        case LocalResponseNorm() | LeakyReLU():
            return Domain(hidden=True, nonnegative=inputs[0].nonnegative)
        case Rearrange():
            return _rearranged_domain(layer, inputs[0], shapes[layer.inputs[0]])
        case MaxPool2d() | GlobalAveragePool() | Dropout():
            return inputs[0]
        case Concat() | Add():
            hidden, nonnegative = any(d.hidden for d in inputs), all(d.nonnegative for d in inputs)
            lows, highs = [d.low for d in inputs if d.low is not None], [d.high for d in inputs if d.high is not None]
            if hidden or len(lows) < len(inputs):
                return Domain(hidden, nonnegative)
            if isinstance(layer, Concat):
                return Domain(False, nonnegative, np.concatenate(lows), np.concatenate(highs))
            return Domain(False, nonnegative, lows[0] + lows[1], highs[0] + highs[1])
    domain = inputs[0]
    if domain.low is None or domain.high is None:
        return domain
    if isinstance(layer, AveragePool2d) and layer.count_include_pad and any(layer.padding):
        return dataclasses.replace(domain, low=np.minimum(domain.low, 0), high=np.maximum(domain.high, 0))
    if isinstance(layer, Flatten):
        _, height, width = shapes[layer.inputs[0]]
        return dataclasses.replace(domain, low=np.repeat(domain.low, height * width),
                                   high=np.repeat(domain.high, height * width))
    return domain


def _rearranged_domain(layer: Rearrange, domain: Domain, shape: Shape) -> Domain:
    """Bounds stay bounds of channels where all elements of a channel come from channels of the same bounds."""
    if domain.low is None or domain.high is None:
        return domain
    index = layer.index.reshape(len(layer.index), -1)
    bounds = []
    for bound in (domain.low, domain.high):
        each = np.where(index < 0, np.float32(0), bound[index // (shape[1] * shape[2])])
        bounds.append((each.min(1), each.max(1)))
    (low, _), (_, high) = bounds
    return dataclasses.replace(domain, low=low, high=high)


def _sorted(layers: tuple[Layer, ...]) -> tuple[Layer, ...]:
    """The layers in the given order as far as it goes, each after its inputs."""
    if not layers:
        raise ModelError("the network has no layers")
    if len(layers) > MAX_LAYERS:
        raise ModelError(f"the network has {len(layers)} layers; at most {MAX_LAYERS} are accepted")
    by_name: dict[str, Layer] = {}
    for layer in layers:
        if layer.name in by_name or layer.name in (INPUT, ""):
            raise ModelError(
                f"layer name {layer.name!r} is taken or empty; required: a name for each layer that no other has "
                f"({INPUT!r} is the network's input)")
        by_name[layer.name] = layer
    for layer in layers:
        for name in layer.inputs:
            if name not in by_name and name != INPUT:
                raise ModelError(
                    f"layer {layer.name!r} reads {name!r}, which no layer makes; the network's input is {INPUT!r}")
    readers: dict[str, list[Layer]] = {}
    waiting = {layer.name: len(set(layer.inputs) - {INPUT}) for layer in layers}
    for layer in layers:
        for name in set(layer.inputs):
            readers.setdefault(name, []).append(layer)
    position = {layer.name: i for i, layer in enumerate(layers)}
    ready = [position[name] for name, count in waiting.items() if not count]
    heapq.heapify(ready)
    order: list[Layer] = []
    while ready:
        order.append(layers[heapq.heappop(ready)])
        for reader in readers.get(order[-1].name, ()):
            waiting[reader.name] -= 1
            if not waiting[reader.name]:
                heapq.heappush(ready, position[reader.name])
    if len(order) < len(layers):
        stuck = [layer.name for layer in layers if waiting[layer.name]]
        raise ModelError(
            f"the network has a cycle through {', '.join(map(repr, stuck[:5]))}; required: layers that lead forward "
            "only"
        )
    return tuple(order)


def _input_shape(shape: Iterable[int]) -> Shape:
    values = tuple(int(v) for v in shape)
    if len(values) != 3 or min(values) < 1 or int(np.prod(values, dtype=object)) > MAX_TENSOR_ELEMENTS:
        raise ModelError(
            f"the input has shape {values}; required: (channels, height, width), each 1 or more, and at most "
            f"{MAX_TENSOR_ELEMENTS} elements in all")
    return values[0], values[1], values[2]


def _box(box: tuple[Any, Any], channels: int) -> tuple[Array, Array]:
    try:
        with np.errstate(over="ignore"):
            low, high = (np.ascontiguousarray(np.broadcast_to(np.asarray(bound, np.float32), (channels, )))
                         for bound in box)
    except (ValueError, TypeError):
        raise ModelError(
            f"the value box {box!r} does not fit; required: (low, high), each one number or {channels}, one for each "
            "channel"
        ) from None
    if not (np.isfinite(low).all() and np.isfinite(high).all() and (low < high).all()):
        raise ModelError(
            f"the value box has low {low.tolist()} and high {high.tolist()}; required: finite, and low below high")
    low.flags.writeable = high.flags.writeable = False
    return low, high


def _text(shape: Iterable[int]) -> str:
    return "x".join(map(str, shape))
