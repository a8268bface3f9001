"""Layers as frozen values: what each computes, its fields, and how its output shape follows from its input shapes.

Shapes leave the batch out and always have three entries, (channels, height, width); a flat tensor of F features is (F,
1, 1).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from fastdtd.errors import ModelError, shown

MAX_TENSOR_ELEMENTS = 2**28  # one tensor of one image: 1 GiB of float32; larger claims are taken for damage or attack
MAX_WEIGHT_ELEMENTS = 2**30  # one layer's weights: 4 GiB of float32
MAX_LAYERS = 10_000  # of a network, and so inputs of a concatenation
MAX_PADDING = 1024  # with more, windows of nothing but padding could keep a processor busy for days
_MIN_NORM_BIAS = 1e-6
_MIN_NORM_EPSILON = 1e-12
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
                told.append(f"{field.name}={shape_text(value.shape)}")
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
    """``y[k] = sum over c, i, j of weight[k, c, i, j] * x[c, ...] + bias[k]``.

    weight: (K, C / groups, kernel height, kernel width); bias: (K,) or None; padding: (top, left, bottom, right), with
    zeros. Of the network's source, for presets of other packages' rules: batch_norm, whether a batch norm is folded
    into the layer; registered_later, whether a PyTorch module registers another layer with weights before it that it
    calls after it, or not at all.
    """

    weight: Array
    bias: Array | None = None
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    batch_norm: bool = False
    registered_later: bool = False

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
    """y = weight x + bias on a flat tensor. weight: (K, F); bias: (K,) or None; the others as of `Conv2d`."""

    weight: Array
    bias: Array | None = None
    batch_norm: bool = False
    registered_later: bool = False

    arrays = ("weight", "bias")

    def validate(self) -> None:
        if self.weight.ndim != 2 or 0 in self.weight.shape:
            self._refuse(f"has weight of shape {self.weight.shape}; required: (outputs, features)")
        _check_bias(self, self.weight.shape[0])

    def output_shape(self, shapes: list[Shape]) -> Shape:
        if shapes[0] != (self.weight.shape[1], 1, 1):
            self._refuse(
                f"expects {self.weight.shape[1]} flat features but {self.inputs[0]!r} has shape {shape_text(shapes[0])}"
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
    """``x = y`` where ``y > 0``, else ``slope * y``, with 0 <= slope <= 1."""

    slope: float

    def validate(self) -> None:
        if not 0 <= self.slope <= 1:
            self._refuse(f"has slope {self.slope:g}; required: 0 to 1")


@dataclass(frozen=True, eq=False, repr=False)
class Power(Layer):
    """``x = |y|^exponent``. A pool by the p-norm is Power(p), a convolution of ones, Power(1 / p)."""

    exponent: float

    def validate(self) -> None:
        if not 0 < self.exponent <= _MAX_EXPONENT:
            self._refuse(f"has exponent {self.exponent:g}; required: above 0, at most {_MAX_EXPONENT}")


ACTIVATIONS: dict[str, dict[str, float]] = {
    "elu": {"alpha": 1.0, "beta": 1.0},
    "gelu": {},
    "gelu_tanh": {},
    "hard_sigmoid": {"alpha": 1 / 6, "beta": 0.5},
    "hard_swish": {"alpha": 1 / 6, "beta": 0.5},
    "mish": {},
    "sigmoid": {},
    "silu": {"alpha": 1.0},
    "softplus": {},
    "tanh": {},
}  # the functions of Activation, and the defaults of their parameters
_POSITIVE_AT_ZERO = ("hard_sigmoid", "sigmoid", "softplus")  # nowhere negative, as it happens


@dataclass(frozen=True, eq=False, repr=False)
class Activation(Layer):
    """``x = f(y)``, where `function` says which f:

    - silu: ``y sigmoid(alpha y)``; sigmoid: ``1 / (1 + exp(-y))``
    - hard_swish: ``y hard_sigmoid(y)``; hard_sigmoid: ``min(max(alpha y + beta, 0), 1)``
    - gelu: y times the normal distribution function; gelu_tanh: its approximation by tanh
    - mish: ``y tanh(softplus(y))``; softplus: ``log(1 + exp(y))``
    - elu: ``beta y`` where y > 0, else ``beta alpha (exp(y) - 1)``, so SELU too; tanh

    alpha, beta: None for the default of `ACTIVATIONS`, and where f has none.
    """

    function: str
    alpha: float | None = None
    beta: float | None = None

    def validate(self) -> None:
        if not isinstance(self.function, str) or self.function not in ACTIVATIONS:
            self._refuse(f"has function {shown(self.function)}; required: one of {', '.join(ACTIVATIONS)}")
        defaults = ACTIVATIONS[self.function]
        for field in ("alpha", "beta"):
            value = getattr(self, field)
            if value is None:
                object.__setattr__(self, field, defaults.get(field))
            elif field not in defaults:
                self._refuse(f"has {field} {value:g}; required: none, for {self.function} has no such parameter")
            else:
                most = 1.0 if field == "beta" and self.function != "elu" else _MAX_EXPONENT
                object.__setattr__(self, field, float(value))
                if not 0 <= value <= most:
                    self._refuse(f"has {field} {value:g}; required: 0 to {most:g}")

    @property
    def is_zero_at_zero(self) -> bool:
        """Whether f(0) = 0, so that f(y) / y is bounded and f keeps the sign; else f is nowhere negative."""
        return self.function not in _POSITIVE_AT_ZERO


@dataclass(frozen=True, eq=False, repr=False)
class LocalResponseNorm(Layer):
    """``x[c] = y[c] / (bias + alpha / size * sum of y^2 over size channels around c)^beta`` (Krizhevsky et al. 2012).

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
class GroupNorm(Layer):
    """``x[c] = scale[c] (y[c] - mean) / sqrt(variance + epsilon) + shift[c]``, by the mean and variance of a group.

    scale, shift: (C,). The channels are in `groups` of equal size: 1 for layer norm, as many as there are channels for
    instance norm. per_position: whether a group is its channels at each position alone, as in layer norm over the last
    of (N, H, W, C), and not over all positions. Where it is not `centered`, nothing is subtracted, and the variance is
    the mean of squares: RMS norm.
    """

    scale: Array
    shift: Array
    groups: int = 1
    epsilon: float = 1e-5
    per_position: bool = False
    centered: bool = True

    arrays = ("scale", "shift")

    def validate(self) -> None:
        if self.scale.ndim != 1 or self.scale.shape != self.shift.shape or not self.scale.size:
            self._refuse(f"has scale {self.scale.shape} and shift {self.shift.shape}; required: one number each for "
                         "every channel")
        if self.groups < 1 or len(self.scale) % self.groups:
            self._refuse(f"has {len(self.scale)} channels in {self.groups} groups; required: groups that divide them")
        if not _MIN_NORM_EPSILON <= self.epsilon < math.inf:
            self._refuse(f"has epsilon {self.epsilon:g}; required: {_MIN_NORM_EPSILON:g} or more, so that nothing is "
                         "divided by zero")

    def output_shape(self, shapes: list[Shape]) -> Shape:
        if shapes[0][0] != len(self.scale):
            self._refuse(f"has {len(self.scale)} scales but {self.inputs[0]!r} has {shapes[0][0]} channels")
        return shapes[0]


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
class Resize(Layer):
    """``y[c] = rows x[c] columns^T``: each output a weighted mean of pixels, as in bilinear interpolation, and in
    average pools to a size that does not divide the input's.

    rows: (H', H); columns: (W', W); no weight is negative, and each output has one above zero.
    """

    rows: Array
    columns: Array

    arrays = ("rows", "columns")

    def validate(self) -> None:
        for name in self.arrays:
            weight = getattr(self, name)
            if weight.ndim != 2 or 0 in weight.shape or weight.min() < 0 or not weight.max(1).all():
                self._refuse(f"has {name} of shape {weight.shape}; required: (outputs, inputs), no weight negative, "
                             "and one above zero for each output")

    def output_shape(self, shapes: list[Shape]) -> Shape:
        channels, height, width = shapes[0]
        if (height, width) != (self.rows.shape[1], self.columns.shape[1]):
            self._refuse(f"resizes {self.rows.shape[1]}x{self.columns.shape[1]} pixels but {self.inputs[0]!r} has "
                         f"{height}x{width}")
        return channels, len(self.rows), len(self.columns)


@dataclass(frozen=True, eq=False, repr=False)
class Concat(Layer):
    """Inputs one after the other along the channels."""

    arity = (1, MAX_LAYERS)

    def output_shape(self, shapes: list[Shape]) -> Shape:
        if len({shape[1:] for shape in shapes}) > 1:
            self._refuse(f"concatenates channels of different sizes: {', '.join(map(shape_text, shapes))}")
        return sum(shape[0] for shape in shapes), shapes[0][1], shapes[0][2]


@dataclass(frozen=True, eq=False, repr=False)
class Add(Layer):
    """The sum of two tensors of one shape."""

    arity = (2, 2)

    def output_shape(self, shapes: list[Shape]) -> Shape:
        if shapes[0] != shapes[1]:
            self._refuse(f"adds tensors of different shapes: {', '.join(map(shape_text, shapes))}")
        return shapes[0]


@dataclass(frozen=True, eq=False, repr=False)
class Multiply(Layer):
    """A tensor times its gate, ``y = x * s``: inputs (x, s), where s has one value for each element of x, for each
    channel (C, 1, 1), or for each pixel (1, H, W)."""

    arity = (2, 2)

    def output_shape(self, shapes: list[Shape]) -> Shape:
        (channels, height, width), gate = shapes
        if gate not in ((channels, height, width), (channels, 1, 1), (1, height, width), (1, 1, 1)):
            self._refuse(f"multiplies {shape_text(shapes[0])} by a gate of shape {shape_text(gate)}; required: the "
                         f"same shape, {channels}x1x1 or 1x{height}x{width}")
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
    """``x[c] = exp(y[c]) / sum of exp(y)`` over the channels at each position.

    Either the last layer, which canonize.py drops, for what is explained is the score; or in a branch that leads to
    gates alone, the second inputs of products.
    """


LAYER_TYPES: dict[str, type[Layer]] = {
    "conv2d": Conv2d, "dense": Dense, "relu": ReLU, "max_pool2d": MaxPool2d, "average_pool2d": AveragePool2d,
    "global_average_pool": GlobalAveragePool, "resize": Resize, "concat": Concat, "add": Add, "flatten": Flatten,
    "batch_norm": BatchNorm,
    "clip": Clip, "leaky_relu": LeakyReLU, "power": Power, "activation": Activation, "multiply": Multiply,
    "rearrange": Rearrange, "local_response_norm": LocalResponseNorm,
    "group_norm": GroupNorm, "dropout": Dropout, "softmax": Softmax,
}  # the names that model files use


def shape_text(shape: Iterable[int]) -> str:
    return "x".join(map(str, shape))


def outputs_text(shape: Shape) -> str:
    """Of a network: "1000", or of maps "21 maps of 65x65"."""
    return str(shape[0]) if shape[1:] == (1, 1) else f"{shape[0]} maps of {shape_text(shape[1:])}"
