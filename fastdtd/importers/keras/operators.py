"""Keras's layers -> layers: the table OPERATORS has a function for each class; it reads a node and calls the builder.

Keras has channels last, and so have the tensors that go from one function to the next; the builder's methods take them
first. These transposes cancel (tensors.py).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from fastdtd.graph import MAX_TENSOR_ELEMENTS
from fastdtd.importers import patterns
from fastdtd.importers.builder import ATTENTION, Builder, same_padding, transposed_padding
from fastdtd.importers.keras.files import expect, is_keras_module
from fastdtd.importers.moves import Array
from fastdtd.importers.tensors import Tensor

if TYPE_CHECKING:
    from fastdtd.importers.keras.reader import Node

_EPSILON = 1e-7  # keras.backend.epsilon()

# Layers with windows or weights


def _padding(node: Node, x: Tensor, kernel: tuple[int, ...], stride: tuple[int, ...], dilation: tuple[int, ...]
             ) -> tuple[int, ...]:
    mode = node.get("padding", str, "valid")
    if mode == "causal" and node.kind == "Conv1D":
        return dilation[0] * (kernel[0] - 1), 0
    if mode not in ("valid", "same"):
        node.refuse(f"has padding {mode!r}; required: 'valid' or 'same'")
    return same_padding(x.dims[1:], kernel, stride, dilation) if mode == "same" else (0,) * 2 * len(kernel)


def _kernel(node: Node, axes: int) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Kernel, stride and dilation of a convolution."""
    return (node.integers("kernel_size", axes), node.integers("strides", axes, default=1),
            node.integers("dilation_rate", axes, default=1))


def _conv(b: Builder, node: Node) -> Tensor:
    x, axes = node.image()
    kernel, stride, dilation = _kernel(node, axes)
    channels, groups, outputs = x.dims[0], node.integer("groups", 1), node.integer("filters")
    if channels % groups or outputs % groups:
        node.refuse(f"has {groups} groups for {channels} channels and {outputs} filters; required: groups that divide "
                    "both")
    weight, *bias = node.arrays(("kernel", (*kernel, channels // groups, outputs)), *node.bias(outputs))
    padding = _padding(node, x, kernel, stride, dilation)
    y = b.conv(x, _outputs_first(weight), bias[0] if bias else None, stride, padding, dilation, groups)
    return _activated(b, node, node.restored(y))


def _outputs_first(weight: Array) -> Array:
    """(kernel..., C, K) as (K, C, kernel...)."""
    return weight.transpose(-1, -2, *range(weight.ndim - 2))


def _depthwise(b: Builder, node: Node) -> Tensor:
    """DepthwiseConv, and SeparableConv, which has a convolution of 1 x 1 after it."""
    x, axes = node.image()
    kernel, stride, dilation = _kernel(node, axes)
    channels, times = x.dims[0], node.integer("depth_multiplier", 1)
    is_separable = node.kind.startswith("Separable")
    outputs = node.integer("filters") if is_separable else channels * times
    pointwise = [("pointwise_kernel", (*(1,) * axes, channels * times, outputs))] if is_separable else []
    weight, *rest = node.arrays(("depthwise_kernel|kernel", (*kernel, channels, times)), *pointwise,
                                *node.bias(outputs))
    bias = rest[-1] if len(rest) > len(pointwise) else None
    weight = np.moveaxis(weight, (-2, -1), (0, 1)).reshape(channels * times, 1, *kernel)
    padding = _padding(node, x, kernel, stride, dilation)
    part = "/depthwise" if is_separable else ""
    y = b.conv(x, weight, None if is_separable else bias, stride, padding, dilation, channels, part)
    if is_separable:
        y = b.conv(y, _outputs_first(rest[0]), bias, (1,) * axes, (0,) * 2 * axes, (1,) * axes, 1)
    return _activated(b, node, node.restored(y))


def _conv_transpose(b: Builder, node: Node) -> Tensor:
    x, axes = node.image()
    kernel, stride, dilation = _kernel(node, axes)
    outputs, mode = node.integer("filters"), node.get("padding", str, "valid")
    if mode not in ("same", "valid"):
        node.refuse(f"has padding {mode!r}; required: 'valid' or 'same'")
    extra = node.integers("output_padding", axes, 0) if node.has("output_padding") else None
    wanted = []
    for axis, (n, k, s, d) in enumerate(zip(x.dims[1:], kernel, stride, dilation, strict=True)):
        span = d * (k - 1) + 1
        if extra is not None:
            made = (n - 1) * s + span + extra[axis] - (2 * (span // 2) if mode == "same" else 0)
        else:
            made = n * s + (max(span - s, 0) if mode == "valid" else 0)
        if made < 1 or (extra is not None and extra[axis] >= s):
            node.refuse(f"has a kernel of {k}, stride {s} and output_padding {extra} over {n} positions; required: an "
                        "output of one position at least, and an output_padding less than the stride")
        wanted.append(made)
    # TensorFlow's: the backward pass through a convolution that makes the input from the output.
    padding, more = transposed_padding(x.dims[1:], wanted, kernel, stride, dilation)
    weight, *bias = node.arrays(("kernel", (*kernel, outputs, x.dims[0])), *node.bias(outputs))
    y = b.conv_transpose(x, _outputs_first(weight), bias[0] if bias else None, stride, padding, dilation, 1, more)
    return _activated(b, node, node.restored(y))


def _dense(b: Builder, node: Node) -> Tensor:
    x, outputs = node.tensor(), node.integer("units")
    if not 2 <= x.rank <= 4:
        node.refuse(f"reads a tensor of {x.rank} axes; required: 2 to 4, the batch included")
    weight, *bias = node.arrays(("kernel", (x.dims[-1], outputs)), *node.bias(outputs))
    return _activated(b, node, b.dense(x, weight.T, bias[0] if bias else None))


def _pool(b: Builder, node: Node) -> Tensor:
    x, axes = node.image()
    kernel = node.integers("pool_size", axes, default=2)
    stride = node.integers("strides", axes) if node.has("strides") else kernel
    padding = _padding(node, x, kernel, stride, (1,) * axes)
    return node.restored(b.pool(x, node.kind.startswith("Average"), kernel, stride, padding))


def _global_pool(b: Builder, node: Node) -> Tensor:
    x, axes = node.image()
    how, keep = "max" if "Max" in node.kind else "mean", node.get("keepdims", bool, False)
    y = b.reduce(x, how, range(2, axes + 2), keep)
    return node.restored(y)


# Activations


def _activated(b: Builder, node: Node, x: Tensor) -> Tensor:
    """What the setting `activation` makes of `x`: a name, a function's name in an object, or a layer."""
    value = node.setting("activation")
    part, where = "" if node.kind == "Activation" else "/activation", f"{node}: activation"
    if isinstance(value, dict):
        kind = expect(value.get("class_name"), str, where)
        if value.get("module") != "builtins" and not is_keras_module(value.get("module")):
            node.refuse("has an activation of somebody's own, whose code is not in the file; required: Keras's own")
        if kind in ("ReLU", "LeakyReLU", "ELU", "Softmax"):
            inner = node.inner(kind, value.get("config"), part, x)
            with b.at(inner):
                made = OPERATORS[kind](b, inner)
            inner.check_read()
            return made
        value = value.get("config") if kind == "function" else kind
    name = "linear" if value is None else expect(value, str, where)
    if name == "linear":
        return x
    if name == "relu":
        return b.relu(x, part)
    if name == "relu6":
        return b.clip(x, 0.0, 6.0, part)
    if name == "leaky_relu":
        return b.leaky_relu(x, 0.2, part)
    if name in ("softmax", "log_softmax"):
        return b.channels_last(b.softmax(b.channels_first(x), 1, part, is_log=name == "log_softmax"))
    if name == "hard_sigmoid":
        return b.activation(x, name, part, alpha=1 / 6 if node.reader.is_keras_3 else 0.2)
    if name in _FUNCTIONS:
        function, fields = _FUNCTIONS[name]
        return b.activation(x, function, part, **fields)
    return node.refuse(f"has activation {name[:60]!r}; required: linear, relu, relu6, leaky_relu, hard_sigmoid, "
                       f"{', '.join(_FUNCTIONS)} or, at the end, softmax")


_FUNCTIONS: dict[str, tuple[str, dict[str, float]]] = {
    "elu": ("elu", {}), "gelu": ("gelu", {}), "hard_silu": ("hard_swish", {}), "hard_swish": ("hard_swish", {}),
    "mish": ("mish", {}), "selu": ("elu", {"alpha": 1.6732632423543772, "beta": 1.0507009873554805}),
    "sigmoid": ("sigmoid", {}), "silu": ("silu", {}), "softplus": ("softplus", {}), "swish": ("silu", {}),
    "tanh": ("tanh", {}),
}


def _elu(b: Builder, node: Node) -> Tensor:
    return b.activation(node.tensor(), "elu", alpha=node.number("alpha", 1.0))


def _relu(b: Builder, node: Node) -> Tensor:
    x, slope = node.tensor(), node.number("negative_slope", 0.0)
    high = node.number("max_value") if node.has("max_value") else math.inf
    if node.number("threshold", 0.0) != 0:
        node.refuse(f"has threshold {node.number('threshold'):g}; required: 0")
    if slope == 0:
        return b.clip(x, 0.0, high)
    return b.clip(b.leaky_relu(x, slope), -math.inf, high, "/clip")


def _leaky_relu(b: Builder, node: Node) -> Tensor:
    return b.leaky_relu(node.tensor(), node.number("negative_slope" if node.has("negative_slope") else "alpha", 0.3))


def _softmax(b: Builder, node: Node) -> Tensor:
    x = node.tensor()
    return _along(b, x, node.channel_axis(x), lambda first: b.softmax(first, 1))


# Arithmetic


def _batch_norm(b: Builder, node: Node) -> Tensor:
    x = node.tensor()
    axis = node.channel_axis(x)
    has_scale, has_center = node.get("scale", bool, True), node.get("center", bool, True)
    wanted = ["gamma"] * has_scale + ["beta"] * has_center + ["moving_mean", "moving_variance"]
    arrays = dict(zip(wanted, node.arrays(*((name, x.dims[axis - 1:axis]) for name in wanted)), strict=True))
    return _along(b, x, axis, lambda first: b.batch_norm(
        first, arrays["moving_mean"], arrays["moving_variance"], arrays.get("gamma"), arrays.get("beta"),
        node.number("epsilon", 1e-3)))


def _layer_norm(b: Builder, node: Node) -> Tensor:
    """Over the channels at each position."""
    x = node.tensor()
    if node.channel_axis(x) != x.rank - 1:
        node.refuse("has axis 1; required: -1, the last")
    is_rms = node.kind == "RMSNormalization"
    if node.get("rms_scaling", bool, False):
        node.refuse("has rms_scaling, which divides by a deviation from a mean that is not subtracted; required: none")
    scale, shift = _trained(node, x.dims[-1:], ["scale"] if is_rms else ["gamma", "beta"])
    return b.layer_norm(x, 1, scale, shift, node.number("epsilon", 1e-6 if is_rms else 1e-3), centered=not is_rms)


def _group_norm(b: Builder, node: Node) -> Tensor:
    x = node.tensor()
    axis = node.channel_axis(x)
    groups, channels = node.get("groups", int, 32), x.dims[axis - 1]
    scale, shift = _trained(node, (channels,), ["gamma", "beta"])
    return _along(b, x, axis, lambda first: b.group_norm(first, channels if groups == -1 else groups, scale, shift,
                                                         node.number("epsilon", 1e-3)))


def _trained(node: Node, shape: tuple[int, ...], names: list[str]) -> tuple[Array | None, Array | None]:
    """Scale and shift of these names, each of which a setting may leave out."""
    wanted = [name for name in names
              if name == "scale" or node.get({"gamma": "scale", "beta": "center"}[name], bool, True)]
    arrays = dict(zip(wanted, node.arrays(*((name, shape) for name in wanted)), strict=True))
    return arrays.get(names[0]), arrays.get("beta")


def _along(b: Builder, x: Tensor, axis: int, function: Callable[[Tensor], Tensor]) -> Tensor:
    """What a function of images with the channels first makes of x, whose channels are the first or the last axis."""
    return function(x) if axis == 1 else b.channels_last(function(b.channels_first(x)))


def _scaled(b: Builder, x: Tensor, scale: Array, shift: Array, axis: int = -1) -> Tensor:
    return _along(b, x, axis, lambda first: b.scale_channels(first, scale, shift))


def _normalization(b: Builder, node: Node) -> Tensor:
    x, is_one = node.tensor(), node.setting("axis", -1) in (None, [])
    axis = x.rank - 1 if is_one else node.channel_axis(x)
    if node.has("mean"):
        mean, variance = node.numbers("mean"), node.numbers("variance")
    else:
        shape = () if is_one else x.dims[axis - 1:axis]
        mean, variance = (np.ravel(a).astype(np.float64) for a in node.arrays(("mean", shape), ("variance", shape)))
    if mean.size != variance.size:
        node.refuse(f"has {mean.size} means and {variance.size} variances; required: as many of each")
    deviation = np.maximum(np.sqrt(variance), _EPSILON)
    if node.get("invert", bool, False):
        return _scaled(b, x, deviation, mean, axis)
    return _scaled(b, x, 1 / deviation, -mean / deviation, axis)


def _add(b: Builder, node: Node) -> Tensor:
    """The layer, of any number of tensors, or the operation, of two of which one may be constant."""
    if len(node.inputs) != 2:
        return b.sum(node.tensors())
    x, y = node.operands()
    return patterns.as_tensor(b, patterns.plus(b, x, y))


def _subtract(b: Builder, node: Node) -> Tensor:
    x, y = node.operands()
    return patterns.as_tensor(b, patterns.plus(b, x, y, -1.0))


def _multiply(b: Builder, node: Node) -> Tensor:
    if len(node.inputs) != 2:
        return functools.reduce(lambda x, y: patterns.as_tensor(b, patterns.times(b, x, y)), node.tensors())
    x, y = node.operands()
    return patterns.as_tensor(b, patterns.times(b, x, y))


def _divide(b: Builder, node: Node) -> Tensor:
    x, y = node.operands()
    return patterns.as_tensor(b, patterns.divided(b, x, y))


def _layer_scale(b: Builder, node: Node) -> Tensor:
    """A factor for each channel, of keras.applications' ConvNeXt."""
    _expect_applications(node)
    x = node.tensor()
    node.setting("init_values")  # before training
    channels = node.integer("projection_dim")
    if channels != x.dims[-1]:
        node.refuse(f"has a projection_dim of {channels}, and its input has {x.dims[-1]} channels; required: the same")
    gamma, = node.arrays(("gamma|variable|Variable", (channels,)))
    return _scaled(b, x, gamma, np.zeros(()))


def _custom_scale(b: Builder, node: Node) -> Tensor:
    """x + scale * y, of keras.applications' Inception-ResNet."""
    _expect_applications(node)
    if len(node.inputs) != 2:
        node.refuse(f"has {len(node.inputs)} inputs; required: 2")
    x, y = node.tensors()
    return patterns.as_tensor(b, patterns.plus(b, x, y, node.number("scale")))


def _expect_applications(node: Node) -> None:
    """Refuse what has the name of a class of keras.applications, and is another by its module."""
    module = node.entry.get("module")
    if module is not None and ".applications." not in str(module):
        node.refuse(f"is of the module {str(module)[:60]!r}; required: a layer of keras.applications")


def _concatenate(b: Builder, node: Node) -> Tensor:
    parts = node.tensors()
    return b.concat(parts, node.channel_axis(parts[0]))


# Moving elements


def _zero_padding(b: Builder, node: Node) -> Tensor:
    x, axes = node.image()
    return node.restored(b.pad(x, [(0, 0), (0, 0), *node.sides("padding", axes, 1)]))


def _cropping(b: Builder, node: Node) -> Tensor:
    x, axes = node.image()
    sides = node.sides("cropping", axes, 0 if axes == 2 else 1)
    return node.restored(b.pad(x, [(0, 0), (0, 0), *((-before, -after) for before, after in sides)]))


def _upsampling(b: Builder, node: Node) -> Tensor:
    x, axes = node.image()
    how, times = node.get("interpolation", str, "nearest"), node.integers("size", axes, default=2)
    if x.elements * math.prod(times) > MAX_TENSOR_ELEMENTS:
        node.refuse(f"makes {math.prod(times)} times as many elements of {x}; at most {MAX_TENSOR_ELEMENTS} are "
                    "accepted")
    if how == "bilinear":
        return node.restored(b.interpolate(x, [(np.arange(n * m) + 0.5) / m - 0.5
                                               for n, m in zip(x.dims[1:], times, strict=True)]))
    if how != "nearest":
        node.refuse(f"has interpolation {how!r}; required: nearest or bilinear")
    channels, *sizes = x.dims
    y = b.with_dims(x, [channels, *(m for n in sizes for m in (n, 1))])
    y = b.expand(y, [-1, channels, *(m for pair in zip(sizes, times, strict=True) for m in pair)])
    return node.restored(b.with_dims(y, [channels, *(n * m for n, m in zip(sizes, times, strict=True))]))


def _flatten(b: Builder, node: Node) -> Tensor:
    x = node.tensor()
    if node.has_channels_first():  # which go last before all becomes flat
        x = b.channels_last(x)
    return b.flatten(x) if x.rank > 2 else x


def _reshape(b: Builder, node: Node) -> Tensor:
    target = [expect(n, int, f"{node}: target_shape") for n in node.get("target_shape", list)]
    return b.reshape(node.tensor(), [b.batch, *target])


def _permute(b: Builder, node: Node) -> Tensor:
    x = node.tensor()
    return b.transpose(x, [0, *node.integers("dims", x.rank - 1)])


def _get_item(b: Builder, node: Node) -> Tensor:
    x, index = node.index()
    axis = 0
    for entry in index:
        if entry is None:
            x = b.unsqueeze(x, [axis])
        elif entry != slice(None):
            x = b.take(x, axis, entry)
        axis += not isinstance(entry, int)
    return x


def _stack(b: Builder, node: Node) -> Tensor:
    axis = node.get("axis", int, 0)
    return b.concat([b.unsqueeze(x, [axis]) for x in node.tensors()], axis)


def unchanged(_: Builder, node: Node) -> Tensor:
    """What a layer makes that does something in training alone, whatever its settings."""
    return node.tensor()


OPERATORS: dict[str, Callable[[Builder, Node], Tensor]] = {
    "Activation": lambda b, node: _activated(b, node, node.tensor()), "ActivityRegularization": unchanged,
    "Add": _add, "AlphaDropout": unchanged, "AveragePooling1D": _pool,
    "AveragePooling2D": _pool, "BatchNormalization": _batch_norm, "BatchNormalizationV1": _batch_norm,
    "Concatenate": _concatenate, "Conv1D": _conv, "Conv1DTranspose": _conv_transpose, "Conv2D": _conv,
    "Conv2DTranspose": _conv_transpose, "Cropping1D": _cropping, "Cropping2D": _cropping,
    "CustomScaleLayer": _custom_scale, "Dense": _dense,
    "DepthwiseConv1D": _depthwise, "DepthwiseConv2D": _depthwise, "Divide": _divide, "Dropout": unchanged,
    "ELU": _elu,
    "Flatten": _flatten, "GaussianDropout": unchanged, "GaussianNoise": unchanged, "GetItem": _get_item,
    "GlobalAveragePooling1D": _global_pool, "GlobalAveragePooling2D": _global_pool,
    "GlobalMaxPooling1D": _global_pool, "GlobalMaxPooling2D": _global_pool,
    "GroupNormalization": _group_norm, "Identity": unchanged, "InputLayer": unchanged,
    "LayerNormalization": _layer_norm, "LayerScale": _layer_scale, "LeakyReLU": _leaky_relu, "MaxPooling1D": _pool,
    "MaxPooling2D": _pool,
    "Multiply": _multiply, "Negative": lambda b, node: b.affine(node.tensor(), scale=-1.0),
    "Normalization": _normalization, "Permute": _permute, "RandomBrightness": unchanged, "RandomContrast": unchanged,
    "RandomFlip": unchanged, "RandomRotation": unchanged, "RandomTranslation": unchanged, "RandomZoom": unchanged,
    "RMSNormalization": _layer_norm, "ReLU": _relu,
    "Rescaling": lambda b, node: _scaled(b, node.tensor(), node.numbers("scale"), node.numbers("offset")),
    "Reshape": _reshape, "SeparableConv1D": _depthwise, "SeparableConv2D": _depthwise, "Softmax": _softmax,
    "SpatialDropout1D": unchanged, "SpatialDropout2D": unchanged, "Stack": _stack, "Subtract": _subtract,
    "TrueDivide": _divide, "UpSampling1D": _upsampling, "UpSampling2D": _upsampling,
    "ZeroPadding1D": _zero_padding, "ZeroPadding2D": _zero_padding,
}

# Settings that may be given and need not be read: names, shapes that are followed anyway, and what works in training
# alone. Each other one is read, or has here the value that is computed.
IGNORED = {"name", "trainable", "autocast", "batch_input_shape", "batch_shape", "build_input_shape", "input_dim",
           "input_dtype", "input_length", "input_shape", "momentum", "renorm_clipping", "renorm_momentum",
           "synchronized", "fused", "virtual_batch_size"}
IGNORED_ENDINGS = ("_initializer", "_regularizer", "_constraint")
UNREAD = {"groups": 1, "renorm": False, "data_format": "channels_last", "implementation": 1}

INSTEAD = {
    "Embedding": "a model that begins after it, with what it looks up as its input",
    "Lambda": "a layer of Keras's own, Rescaling say; the code in a Lambda is never run",
    "TFOpLambda": "layers in place of TensorFlow's functions, Rescaling in place of preprocess_input's arithmetic say",
    "SlicingOpLambda": "Cropping2D in place of slices", "Average": "Add, and Rescaling after it",
    "Maximum": "MaxPooling2D over what lies side by side",
    "PReLU": "LeakyReLU", "LocallyConnected2D": "Conv2D", "Conv3D": "Conv2D",
    "UnitNormalization": "LayerNormalization",
    **dict.fromkeys(("AdditiveAttention", "Attention", "GroupedQueryAttention", "MultiHeadAttention"), ATTENTION),
    "Resizing": "a model that begins after it, for fastdtd resizes images", "CenterCrop": "Cropping2D",
    "RandomCrop": "Cropping2D", "TimeDistributed": "the layer in it, where there is one step only",
}
