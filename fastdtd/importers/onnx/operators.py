"""ONNX operators -> layers: the table OPERATORS has a function for each, which reads a node and calls the builder."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx

from fastdtd.graph import MAX_TENSOR_ELEMENTS, Power
from fastdtd.importers import curves, patterns
from fastdtd.importers.builder import ATTENTION, Builder, same_padding, transposed_padding
from fastdtd.importers.curves import Curve
from fastdtd.importers.moves import MAX_AXES, Array
from fastdtd.importers.norms import Moment
from fastdtd.importers.onnx import constants
from fastdtd.importers.patterns import Sign, Squares, moving
from fastdtd.importers.tensors import Tensor

if TYPE_CHECKING:
    from fastdtd.importers.onnx.reader import Node

# Layers with windows or weights


def _conv(b: Builder, node: Node) -> Tensor:
    return convolved(b, node, node.image()[0], node.constant(1), node.optional(2))


def convolved(b: Builder, node: Node, x: Tensor, weight: Array, bias: Array | None, part: str = "") -> Tensor:
    """x convolved as the node's attributes say; part: what the layer's name ends with."""
    axes = b.spatial(x)
    b.check_weights(weight, axes)
    kernel = _kernel_of(node, weight)
    stride, dilation = node.window("strides", axes, 1), node.window("dilations", axes, 1)
    padding = padding_of(node, x, kernel, stride, dilation)
    return b.conv(x, weight, bias, stride, padding, dilation, node.integer("group", 1), part)


def _kernel_of(node: Node, weight: Array) -> tuple[int, ...]:
    kernel = weight.shape[2:]
    if (node.integers("kernel_shape") or kernel) != kernel:
        node.refuse(f"has weights of shape {weight.shape}; required: kernel_shape {node.integers('kernel_shape')}")
    return kernel


def _conv_transpose(b: Builder, node: Node) -> Tensor:
    (x, axes), weight = node.image(), node.constant(1)
    b.check_weights(weight, axes, "(C, K / group, *kernel_shape)")
    kernel = _kernel_of(node, weight)
    stride, dilation = node.window("strides", axes, 1), node.window("dilations", axes, 1)
    extra = node.integers("output_padding") or (0,) * axes
    if len(extra) != axes:
        node.refuse(f"has output_padding {extra}; required: {axes} numbers")
    mode, wanted = node.text("auto_pad", "NOTSET"), node.integers("output_shape")
    if wanted is not None or mode.startswith("SAME"):
        node.ignore("pads")
        sizes = [n * s for n, s in zip(x.dims[1:], stride, strict=True)] if wanted is None else list(wanted[-axes:])
        if len(sizes) != axes or min(sizes) < 1:
            node.refuse(f"has output_shape {wanted}; required: {axes} numbers from 1")
        inner = [size - n for size, n in zip(sizes, extra, strict=True)]
        padding, more = transposed_padding(x.dims[1:], inner, kernel, stride, dilation, mode != "SAME_UPPER")
        extra = tuple(a + b for a, b in zip(extra, more, strict=True))
    else:
        padding = padding_of(node, x, kernel, stride, dilation)
    return b.conv_transpose(x, weight, node.optional(2), stride, padding, dilation, node.integer("group", 1), extra)


def padding_of(node: Node, x: Tensor, kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]
             ) -> tuple[int, ...]:
    """What is padded before each spatial axis, then what is padded after."""
    mode, axes = node.text("auto_pad", "NOTSET"), len(kernel)
    none = (0,) * 2 * axes
    pads = node.integers("pads") or none
    if mode in ("NOTSET", ""):
        if len(pads) != 2 * axes:
            node.refuse(f"has pads {pads}; required: "
                        + ("four, for top, left, bottom and right" if axes == 2 else f"{2 * axes}"))
        return pads
    if mode not in ("VALID", "SAME_UPPER", "SAME_LOWER"):
        node.refuse(f"has auto_pad {mode!r}; required: NOTSET, VALID, SAME_UPPER or SAME_LOWER")
    made = none if mode == "VALID" else same_padding(x.dims[1:], kernel, stride, dilation, mode == "SAME_LOWER")
    if any(pads) and pads != made:
        node.refuse(f"has pads {pads} and auto_pad {mode}, which makes {made}; required: one of them")
    return made


def _pool(b: Builder, node: Node) -> Tensor | Squares:
    is_average, moved = node.op == "AveragePool", node.moving()
    if isinstance(moved, Squares) and moved.view.rank == 5:
        is_plain = (is_average and not any(node.integers("pads") or ()) and set(node.integers("dilations") or ()) <= {1}
                    and node.text("auto_pad", "NOTSET") in ("NOTSET", "VALID", ""))
        node.ignore("count_include_pad", "ceil_mode")  # which change nothing without padding and with a stride of 1
        return patterns.mean_over_channels(b, moved, node.window("kernel_shape", 3), node.window("strides", 3, 1),
                                           is_plain)
    x, axes = node.image()
    kernel, stride = node.window("kernel_shape", axes), node.window("strides", axes, 1)
    if any(n != 1 for n in node.integers("dilations") or ()):
        node.refuse("has dilations; required: none")
    padding = padding_of(node, x, kernel, stride, (1,) * axes)
    ceil_mode = node.integer("ceil_mode", 0) != 0 and not node.text("auto_pad", "").startswith("SAME")
    return b.pool(x, is_average, kernel, stride, padding, ceil_mode, node.integer("count_include_pad", 0) != 0)


def _norm_pool(b: Builder, node: Node) -> Tensor:
    (x, axes), exponent = node.image(), node.integer("p", 2)
    if node.op == "GlobalLpPool":
        return b.norm_pool(x, exponent, x.dims[1:], (1,) * axes, (0,) * 2 * axes)
    kernel, stride = node.window("kernel_shape", axes), node.window("strides", axes, 1)
    if any(n != 1 for n in node.integers("dilations") or ()) or node.integer("ceil_mode", 0):
        node.refuse("has dilations or ceil_mode; required: neither")
    return b.norm_pool(x, exponent, kernel, stride, padding_of(node, x, kernel, stride, (1,) * axes))


def _global_pool(b: Builder, node: Node) -> Tensor:
    x, axes = node.image()
    return b.reduce(x, "mean" if node.op == "GlobalAveragePool" else "max", range(2, axes + 2), keep=True)


def _reduce(b: Builder, node: Node) -> Tensor | Moment:
    axes, keep = node.axes(), node.integer("keepdims", 1) != 0
    if axes and node.op == "ReduceMean":
        node.ignore("noop_with_empty_axes")
        return patterns.mean(b, node.stepping(), axes, keep)
    is_length, is_sum = node.op == "ReduceL2", node.op == "ReduceSum" and isinstance(node.value(0), Squares)
    if axes and (is_length or is_sum):
        node.ignore("noop_with_empty_axes")
        return patterns.length(b, node.tensor(), axes, keep) if is_length else patterns.square_sum(
            b, node.moving(), axes, keep)
    x = node.tensor()
    is_noop = node.integer("noop_with_empty_axes", 0) != 0
    if not axes:  # given as an empty input, too
        if is_noop and not is_length:  # the length of one element is its magnitude
            return x
        node.refuse("is over all axes, the batch too; required: others")
    return b.reduce(x, node.op.removeprefix("Reduce").lower(), axes, keep)


def _gemm(b: Builder, node: Node) -> Tensor:
    x, weight, bias = node.tensor(), node.constant(1), node.optional(2)
    if x.rank != 2:
        node.refuse(f"reads {node.inputs[0]!r} with {x.rank} axes; required: (N, F)")
    if node.integer("transA", 0):
        node.refuse("transposes its input; required: transA 0")
    if weight.ndim != 2:
        node.refuse(f"has weights of shape {weight.shape}; required: two axes")
    weight = np.float32(node.number("alpha", 1.0)) * (weight if node.integer("transB", 0) else weight.T)
    node.ignore("beta")
    if bias is not None:
        if bias.ndim > 2 or (bias.ndim == 2 and len(bias) != 1) or bias.shape[-1:] not in ((), (1,), (len(weight),)):
            node.refuse(f"has a constant of shape {bias.shape} for {len(weight)} channels; required: one value, or one "
                        "for each channel")
        bias = np.float32(node.number("beta", 1.0)) * np.broadcast_to(bias.reshape(-1), len(weight))
    return b.dense(x, weight, bias)


def _matmul(b: Builder, node: Node) -> Tensor:
    if all(isinstance(node.value(i), patterns.COMPUTED) for i in (0, 1)):
        node.refuse(f"multiplies two matrices that are computed; nearest: {ATTENTION}")
    x, weight = node.tensor(), node.constant(1)
    return b.dense(x, weight.T, None)


# Arithmetic


def _add(b: Builder, node: Node) -> Tensor | Squares | Curve | Moment:
    return patterns.plus(b, node.operand(0), node.operand(1), -1.0 if node.op == "Sub" else 1.0)


def _sum(b: Builder, node: Node) -> Tensor:
    terms = node.tensors()
    total = b.sum(terms)
    return total if node.op != "Mean" else b.affine(total, scale=1 / len(terms))


def _batch_norm(b: Builder, node: Node) -> Tensor:
    x = node.tensor()
    if node.integer("training_mode", 0) or not node.integer("spatial", 1):
        node.refuse("normalises by the batch or by the pixel; required: training_mode 0 and spatial 1")
    if sum(map(bool, node.outputs)) > 1:  # before opset 14 that is how training is said
        node.refuse("makes statistics of the batch, as in training; required: one output")
    gamma, beta, mean, variance = (node.constant(i) for i in range(1, 5))
    if not gamma.shape == beta.shape == mean.shape == variance.shape == x.dims[:1]:
        node.refuse(f"has parameters of shapes {gamma.shape}, {beta.shape}, {mean.shape}, {variance.shape}; required: "
                    f"{x.dims[:1]}")
    return b.batch_norm(x, mean, variance, gamma, beta, node.number("epsilon", 1e-5))


def _layer_norm(b: Builder, node: Node) -> Tensor:
    """RMSNormalization too."""
    x, is_rms = node.tensor(), node.op == "RMSNormalization"
    axis = b.axis(node.integer("axis", -1), x.rank)
    node.ignore("stash_type")  # in which type they are computed: float64 here
    shape = x.dims[axis - 1:]
    scale, shift = (_broadcast(node, node.optional(i), shape) for i in (1, 2))
    return b.layer_norm(x, x.rank - axis, scale, shift, node.number("epsilon", 1e-5), centered=not is_rms)


def _broadcast(node: Node, value: Array | None, shape: tuple[int, ...]) -> Array | None:
    if value is None:
        return None
    if value.ndim > len(shape) or any(n not in (1, m) for n, m in zip(value.shape[::-1], shape[::-1], strict=False)):
        node.refuse(f"has parameters of shape {value.shape}; required: {shape}")
    return np.broadcast_to(value, shape)


def _group_norm(b: Builder, node: Node) -> Tensor:
    x, groups = node.tensor(), node.integer("num_groups", 0)
    channels, scale, shift = x.dims[0] if x.dims else 0, node.constant(1), node.constant(2)
    node.ignore("stash_type")
    if node.opset < 21 and 0 < groups < channels and channels % groups == 0 and scale.shape == shift.shape == (groups,):
        scale, shift = np.repeat(scale, channels // groups), np.repeat(shift, channels // groups)
    return b.group_norm(x, groups, scale, shift, node.number("epsilon", 1e-5))


def _instance_norm(b: Builder, node: Node) -> Tensor:
    x = node.tensor()
    return b.group_norm(x, x.dims[0] if x.dims else 0, node.constant(1), node.constant(2), node.number("epsilon", 1e-5))


def _lrn(b: Builder, node: Node) -> Tensor:
    x, axes = node.image()
    if axes != 2:
        node.refuse(f"reads a tensor {x}; required: (N, C, H, W)")
    return b.local_response_norm(x, size=node.integer("size", 0), alpha=node.number("alpha", 1e-4),
                                 beta=node.number("beta", 0.75), bias=node.number("bias", 1.0))


# Activations


def _clip(b: Builder, node: Node) -> Tensor | Curve:
    low, high = (_bound(node.single(i, limit) if node.has_input(i) else node.number(name, limit))
                 for i, name, limit in ((1, "min", -math.inf), (2, "max", math.inf)))
    return patterns.clip(b, node.pointwise(), low, high)


def _bound(value: Any) -> Any:
    """Old opsets write the largest float32 for infinity."""
    if isinstance(value, patterns.COMPUTED):
        return value
    return np.where(np.abs(value) >= np.finfo(np.float32).max, np.copysign(np.inf, value), value)[()]


def _extreme(b: Builder, node: Node) -> Any:
    """The largest or smallest of a tensor and numbers."""
    values = [_bound(node.operand(i)) for i in range(len(node.inputs))]
    computed = [value for value in values if isinstance(value, patterns.COMPUTED)]
    if len(computed) != 1:
        node.refuse(f"compares {len(computed)} tensors that are computed; required: one, and numbers")
    if len(values) == 1:
        return computed[0]
    bound = constants.fold(node, [value for value in values if not isinstance(value, patterns.COMPUTED)])
    return patterns.extreme(b, computed[0], bound, node.op == "Max")


def _softmax(b: Builder, node: Node) -> Tensor:
    x = node.tensor()
    axis = node.integer("axis", 1 if node.opset < 13 else -1)
    return b.softmax(x, axis, is_log=node.op == "LogSoftmax", to_the_end=node.opset < 13)


def _activation(b: Builder, node: Node) -> Tensor | Curve:
    name, fields = _ACTIVATIONS[node.op]
    given = {field: node.number(key, default) for field, (key, default) in fields.items()}
    if node.op == "Gelu":
        mode = node.text("approximate", "none")
        if mode not in ("none", "tanh"):
            node.refuse(f"has approximate {mode!r}; required: none or tanh")
        name = "gelu" if mode == "none" else "gelu_tanh"
    return patterns.activation(b, node.pointwise(), name, **given)


_ACTIVATIONS: dict[str, tuple[str, dict[str, tuple[str, float]]]] = {
    "Elu": ("elu", {"alpha": ("alpha", 1.0)}), "Gelu": ("gelu", {}),
    "HardSigmoid": ("hard_sigmoid", {"alpha": ("alpha", 0.2), "beta": ("beta", 0.5)}),
    "HardSwish": ("hard_swish", {}), "Mish": ("mish", {}),
    "Selu": ("elu", {"alpha": ("alpha", 1.67326319217681884765625), "beta": ("gamma", 1.05070102214813232421875)}),
    "Sigmoid": ("sigmoid", {}), "Softplus": ("softplus", {}), "Swish": ("silu", {"alpha": ("alpha", 1.0)}),
    "Tanh": ("tanh", {}),
}

# Moving elements


def _pad(b: Builder, node: Node, x: Tensor) -> Tensor:
    mode = node.text("mode", "constant")
    given = node.integers_at(1, 2 * MAX_AXES) if node.opset >= 11 else node.integers("pads")
    value = node.optional(2) if node.opset >= 11 else None
    axes = [b.axis(axis, x.rank) for axis in node.integers_at(3) or range(x.rank)]
    if given is None or len(given) != 2 * len(axes) or len(set(axes)) < len(axes):
        node.refuse(f"has pads {given}; required: two for each of {len(axes)} axes")
    pads = [(0, 0)] * x.rank
    for i, axis in enumerate(axes):
        pads[axis] = given[i], given[i + len(axes)]
    is_zero = node.number("value", 0.0) == 0 and (value is None or not value.any())
    if mode not in ("constant", "reflect", "edge") or (mode == "constant" and not is_zero):
        node.refuse(f"has mode {mode!r} and pads with something else than zeros; required: constant zeros, reflect or "
                    "edge")
    return b.pad(x, pads, mode)


def _flatten(b: Builder, node: Node) -> Tensor:
    x = node.tensor()
    axis = node.integer("axis", 1)
    axis += x.rank if axis < 0 else 0
    if not 1 <= axis <= x.rank or math.prod(x.dims[:axis - 1]) != 1:
        node.refuse(f"has axis {axis}; required: 1, so that all but the batch becomes flat")
    return b.flatten(x) if x.dims else x


def _reshape(b: Builder, node: Node, x: Tensor) -> Tensor:
    target, own = constants.small_integers(node, node.constant(1)), (b.batch, *x.dims)
    if not node.integer("allowzero", 0):
        if any(n == 0 and i >= len(own) for i, n in enumerate(target)):
            node.refuse(f"makes {tuple(target)} of {x}; required: no 0 for an axis that there is not")
        target = [own[i] if n == 0 else n for i, n in enumerate(target)]
    return b.reshape(x, target)


def _squeeze(b: Builder, node: Node, x: Tensor) -> Tensor:
    axes = node.axes()
    if axes is None:
        node.refuse("changes axes of length 1, the batch too; required: axes")
    return b.squeeze(x, axes) if node.op == "Squeeze" else b.unsqueeze(x, axes)


def _transpose(b: Builder, node: Node, x: Tensor) -> Tensor:
    return b.transpose(x, node.integers("perm") or tuple(reversed(range(x.rank))))


def _shape(b: Builder, node: Node) -> Array:
    x = node.moving()
    shape = (b.batch, *(x.view if isinstance(x, Squares) else x).dims)
    return constants.shape_slice(node, shape) if node.op == "Shape" else np.array(math.prod(shape), np.int64)


def _slice(b: Builder, node: Node) -> Tensor:
    x = node.tensor()
    inputs = [None, *(node.optional(i) for i in range(1, len(node.inputs)))]
    for axis, part in enumerate(constants.slices(node, (b.batch, *x.dims), inputs)):
        if part != slice(None):
            x = b.take(x, axis, part)
    return x


def _split(b: Builder, node: Node) -> list[Tensor]:
    x, axis = node.tensor(), node.integer("axis", 0)
    return b.split(x, axis, constants.split_sizes(node, x.dims[b.own_axis(x, axis)], [None, node.optional(1)]))


def _expand(b: Builder, node: Node) -> Tensor:
    x, target = node.tensor(), node.integers_at(1) or []
    return b.expand(x, [1] * (x.rank - len(target)) + target)


def _depth_and_space(b: Builder, node: Node) -> Tensor:
    (x, axes), n, mode = node.image(), node.integer("blocksize", 0), node.text("mode", "DCR")
    if axes != 2 or n < 1 or mode not in ("DCR", "CRD") or (node.op == "DepthToSpace" and x.dims[0] % (n * n)):
        node.refuse(f"has blocksize {n} and mode {mode!r} for {x}; required: one that divides it, and DCR or CRD")
    return (b.depth_to_space if node.op == "DepthToSpace" else b.space_to_depth)(x, n, mode == "CRD")


def _resize(b: Builder, node: Node) -> Tensor:
    x = node.tensor()
    mode, policy = node.text("mode", "nearest"), node.text("keep_aspect_ratio_policy", "stretch")
    antialias = node.integer("antialias", 0)
    if mode not in ("nearest", "linear") or policy != "stretch" or (mode == "linear" and antialias):
        node.refuse(f"has mode {mode!r}, policy {policy!r} and antialias {antialias}; required: nearest or linear, "
                    "stretched, without antialias")
    is_old = node.op == "Upsample" or node.opset < 11
    scales: Sequence[float] | None = node.floats("scales")
    if scales is None and (given := node.optional(1 if is_old else 2)) is not None and given.size:
        if given.size > MAX_AXES or given.dtype.kind != "f":
            node.refuse(f"has {given.size} scales; required: one for each axis")
        scales = [float(n) for n in given.ravel()]
    sizes = None if is_old or scales else node.integers_at(3)
    axes = [b.axis(axis, x.rank) for axis in node.integers("axes") or range(x.rank)]
    if (scales is None) == (sizes is None) or len(scales or sizes or ()) != len(axes):
        node.refuse("has neither scales nor sizes for all axes; required: one of them")
    own = (b.batch, *x.dims)
    steps, wanted = [1.0] * x.rank, list(own)
    for i, axis in enumerate(axes):
        if scales is not None:
            if not 0 < scales[i] <= MAX_TENSOR_ELEMENTS:
                node.refuse(f"has scales {tuple(scales)}; required: numbers above 0")
            steps[axis], wanted[axis] = scales[i], math.floor(own[axis] * scales[i])
        elif sizes is not None:
            steps[axis], wanted[axis] = sizes[i] / own[axis], sizes[i]
    if wanted[0] != own[0] or min(wanted) < 1 or math.prod(wanted) > MAX_TENSOR_ELEMENTS:
        node.refuse(f"makes {tuple(wanted)} of {x}; required: the batch as it is, and at most {MAX_TENSOR_ELEMENTS} "
                    "elements")
    coordinates = "asymmetric" if is_old else node.text("coordinate_transformation_mode", "half_pixel")
    rounding = "floor" if is_old else node.text("nearest_mode", "round_prefer_floor")
    is_linear = mode == "linear"
    if coordinates not in _COORDINATES or rounding not in _ROUNDINGS or (is_linear and "for_nn" in coordinates):
        node.refuse(f"has coordinate_transformation_mode {coordinates!r} and nearest_mode {rounding!r}; required: one "
                    f"of {', '.join(_COORDINATES)}, and one of {', '.join(_ROUNDINGS)}")
    b.spend(8 * sum(wanted))
    at = [_COORDINATES[coordinates](np.arange(wanted[axis], dtype=np.float64), steps[axis], own[axis], wanted[axis])
          for axis in range(1, x.rank)]
    if is_linear:
        if wanted[1] != own[1]:
            node.refuse(f"makes {tuple(wanted)} of {x}; required: the channels as they are")
        return b.interpolate(x, at[1:])
    return b.repeat(x, [np.clip(_ROUNDINGS[rounding](each), 0, n - 1).astype(np.int64)
                        for each, n in zip(at, x.dims, strict=True)])


_COORDINATES: dict[str, Callable[[Any, float, int, int], Any]] = {  # of a position: it, scale, old length, new length
    "half_pixel": lambda x, scale, _, __: (x + 0.5) / scale - 0.5,
    "pytorch_half_pixel": lambda x, scale, _, new: (x + 0.5) / scale - 0.5 if new > 1 else 0 * x,
    "asymmetric": lambda x, scale, _, __: x / scale,
    "tf_half_pixel_for_nn": lambda x, scale, _, __: (x + 0.5) / scale,
    "align_corners": lambda x, _, old, new: x * (old - 1) / (new - 1) if new > 1 else 0 * x,
}
_ROUNDINGS: dict[str, Callable[[Any], Any]] = {
    "round_prefer_floor": lambda x: np.ceil(x - 0.5), "round_prefer_ceil": lambda x: np.floor(x + 0.5),
    "floor": np.floor, "ceil": np.ceil,
}

# Values that pass


def _if(_: Builder, node: Node) -> list[Any]:
    """The branch that a constant condition chooses."""
    condition = node.constant(0)
    if condition.size != 1:
        node.refuse(f"has a condition of shape {condition.shape}; required: one value")
    made = node.reader.read_branch(node, "then_branch" if condition.any() else "else_branch")
    if len(made) < len(node.outputs) or any(value is None for value in made):
        node.refuse("has a branch that does not make all outputs; required: one that does")
    return made


def _constant(_: Builder, node: Node) -> Any:
    fields = {"value": "t", "value_float": "f", "value_floats": "floats", "value_int": "i", "value_ints": "ints"}
    for name, field in fields.items():
        if name in node.attributes:
            node.ignore(name)
            value = getattr(node.attributes[name], field)
            return value if field == "t" else np.asarray(value, np.float32 if "float" in name else np.int64)
    return node.refuse(f"has attributes {sorted(node.attributes)}; required: a tensor or numbers")


def _cast(_: Builder, node: Node) -> Any:
    if node.op == "Cast" and node.integer("to", 0) not in FLOATS:
        node.refuse(f"casts what is computed to element type {node.integer('to', 0)}; required: float16, float32 or "
                    "float64")
    if node.op == "CastLike":
        like = node.value(1)
        if not isinstance(like, patterns.COMPUTED) and node.constant(1).dtype.kind != "f":
            node.refuse(f"casts what is computed to {node.constant(1).dtype}; required: a floating-point type")
        if not isinstance(node.value(0), patterns.COMPUTED):  # like what is computed
            return node.constant(0).astype(np.float32)
    return node.moving()


FLOATS = {onnx.TensorProto.FLOAT16, onnx.TensorProto.FLOAT, onnx.TensorProto.DOUBLE, onnx.TensorProto.BFLOAT16}


def _dropout(_: Builder, node: Node) -> Tensor:
    training = node.optional(2)
    if training is not None and training.any():
        node.refuse("drops at inference; required: training_mode false")
    return node.tensor()


OPERATORS: dict[str, Callable[[Builder, Node], Any]] = {
    "Abs": lambda b, node: b.pointwise(Power, node.tensor(), exponent=1.0), "Add": _add, "AveragePool": _pool,
    "BatchNormalization": _batch_norm, "Cast": _cast, "CastLike": _cast, "Clip": _clip,
    "Concat": lambda b, node: b.concat(node.tensors(), node.integer("axis", 0)), "Constant": _constant, "Conv": _conv,
    "ConvTranspose": _conv_transpose, "DepthToSpace": _depth_and_space,
    "Erf": lambda b, node: patterns.curve(b, node.pointwise(), curves.erf),
    "Exp": lambda b, node: patterns.curve(b, node.pointwise(), np.exp),
    "Log": lambda b, node: patterns.curve(b, node.pointwise(), np.log),
    "Div": lambda b, node: patterns.divided(b, node.operand(0), node.operand(1)), "Dropout": _dropout,
    "Expand": _expand, "Flatten": _flatten,
    "Greater": lambda b, node: patterns.greater(b, node.operand(0), node.operand(1)),
    "Gather": lambda b, node: b.take(node.tensor(), node.integer("axis", 0), node.constant(1)), "Gemm": _gemm,
    "GlobalAveragePool": _global_pool, "GlobalLpPool": _norm_pool, "GlobalMaxPool": _global_pool,
    "GroupNormalization": _group_norm, "Identity": lambda _, node: node.value(0), "If": _if,
    "InstanceNormalization": _instance_norm, "LRN": _lrn, "LayerNormalization": _layer_norm,
    "LeakyRelu": lambda b, node: b.leaky_relu(node.tensor(), node.number("alpha", 0.01)), "LogSoftmax": _softmax,
    "LpPool": _norm_pool, "MatMul": _matmul, "Max": _extreme, "MaxPool": _pool, "Mean": _sum, "Min": _extreme,
    "Mul": lambda b, node: patterns.times(b, node.operand(0), node.operand(1)),
    "Neg": lambda b, node: patterns.times(b, node.operand(0), np.float64(-1)),
    "PRelu": lambda b, node: b.prelu(node.tensor(), node.constant(1)), "Pad": moving(_pad),
    "Pow": lambda b, node: patterns.power(b, node.stepping(), node.single(1, 2.0)), "RMSNormalization": _layer_norm,
    "Reciprocal": lambda b, node: patterns.divided(b, np.float64(1), node.operand(0)), "ReduceL2": _reduce,
    "ReduceMax": _reduce, "ReduceMean": _reduce, "ReduceSum": _reduce, "Relu": lambda b, node: b.relu(node.tensor()),
    "Reshape": moving(_reshape), "Resize": _resize, "Shape": _shape,
    "Sign": lambda _, node: Sign(node.tensor()),
    "Size": _shape, "Slice": _slice, "Softmax": _softmax, "SpaceToDepth": _depth_and_space, "Split": _split,
    "Sqrt": lambda b, node: patterns.power(b, node.stepping(), 0.5), "Squeeze": moving(_squeeze), "Sub": _add,
    "Sum": _sum, "Tile": lambda b, node: b.tile(node.tensor(), node.integers_at(1) or []),
    "Transpose": moving(_transpose), "Unsqueeze": moving(_squeeze), "Upsample": _resize,
    "Where": lambda b, node: patterns.chosen(b, *map(node.operand, range(3))),
    **dict.fromkeys(_ACTIVATIONS, _activation),
}

_ACTIVATION, _BRANCH = "Relu, LeakyRelu or Clip", "If with a constant condition"
# Attributes and inputs that may be given and need not be read: what matters in training alone, to outputs that nobody
# reads, to other modes than the one that is read, or to types that are refused. Each other one is read, or must be what
# it is by default.
IGNORED = {"antialias", "cubic_coeff_a", "exclude_outside", "extrapolation_value", "momentum", "ratio", "roi",
           "round_mode", "saturate", "seed", "storage_order"}

NEAREST = {
    **dict.fromkeys(("Softsign", "ThresholdedRelu"), _ACTIVATION), "Celu": "Elu",
    **dict.fromkeys(("LpNormalization", "MeanVarianceNormalization"), "LayerNormalization"),
    **dict.fromkeys(("ReduceL1", "ReduceSumSquare"), "GlobalLpPool"),
    **dict.fromkeys(("Attention", "MultiHeadAttention", "GroupQueryAttention"), ATTENTION),
    "Einsum": "MatMul", "Loop": _BRANCH, "Scan": _BRANCH, "GatherND": "Gather",
    "GatherElements": "Gather", "MaxRoiPool": "MaxPool", "MaxUnpool": "Resize", "GridSample": "Resize",
    "LogSoftmax": "Softmax", "Hardmax": "Softmax", "ArgMax": "the scores before it",
}
