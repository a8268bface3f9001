"""ATen operators -> layers: the table OPERATORS has a function for each, which reads a node and calls the builder."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fastdtd.graph import Power
from fastdtd.importers import curves, patterns
from fastdtd.importers.builder import ATTENTION, Builder, same_padding
from fastdtd.importers.curves import Curve
from fastdtd.importers.norms import Moment
from fastdtd.importers.patterns import Sign, Squares, moving
from fastdtd.importers.tensors import Tensor

if TYPE_CHECKING:
    from fastdtd.importers.pytorch.reader import Node

# Layers with windows or weights


def _conv(b: Builder, node: Node) -> Tensor:
    weight = node.weight()
    axes = weight.ndim - 2
    x = node.image(axes, "input")
    stride, dilation = node.window("stride", axes, 1), node.window("dilation", axes, 1)
    padding = node.get("padding", 0)
    if padding in ("same", "valid"):
        is_same = padding == "same"
        pads = same_padding(x.dims[1:], weight.shape[2:], stride, dilation) if is_same else (0,) * 2 * axes
    else:
        pads = node.window("padding", axes, 0) * 2
    return b.conv(x, weight, node.optional("bias"), stride, pads, dilation, node.get("groups", 1))


def _conv_transpose(b: Builder, node: Node) -> Tensor:
    weight = node.weight()
    axes = weight.ndim - 2
    return b.conv_transpose(
        node.tensor("input"), weight, node.optional("bias"), node.window("stride", axes, 1),
        node.window("padding", axes, 0) * 2, node.window("dilation", axes, 1), node.get("groups", 1),
        node.window("output_padding", axes, 0))


def _addmm(b: Builder, node: Node) -> Tensor:
    if node.get("alpha", 1) != 1 or node.get("beta", 1) != 1:
        node.refuse("has factors; required: none")
    return b.dense(node.tensor("mat1"), node.weight("mat2").T, node.optional("self"))


def _matmul(b: Builder, node: Node) -> Tensor:
    other = "mat2" if node.op == "mm" else "other"
    if isinstance(node.value(other), patterns.COMPUTED):
        node.refuse(f"multiplies two matrices that are computed; nearest: {ATTENTION}")
    return b.dense(node.tensor(), node.weight(other).T, None)


def _axes(node: Node) -> int:
    return 1 if "1d" in node.op else 2


def _max_pool(b: Builder, node: Node) -> Any:
    axes = _axes(node)
    if any(n != 1 for n in node.window("dilation", axes, 1)):
        node.refuse("has a dilation; required: none")
    kernel = node.window("kernel_size", axes, 1)
    made = b.pool(node.image(axes), False, kernel, node.window("stride", axes, kernel),
                  node.window("padding", axes, 0) * 2, bool(node.get("ceil_mode", False)))
    return [made] if node.op.endswith("with_indices") else made


def _average_pool(b: Builder, node: Node) -> Tensor:
    axes = _axes(node)
    kernel, divisor = node.window("kernel_size", axes, 1), node.get("divisor_override", None)
    ceil_mode, includes_pad = bool(node.get("ceil_mode", False)), bool(node.get("count_include_pad", True))
    if divisor is not None and (ceil_mode or not isinstance(divisor, int) or divisor < 1):
        node.refuse(f"has the divisor {divisor}, ceil_mode {ceil_mode}; required: a whole number from 1, and no "
                    "ceil_mode")
    made = b.pool(node.image(axes), True, kernel, node.window("stride", axes, kernel),
                  node.window("padding", axes, 0) * 2, ceil_mode,
                  divisor is not None or includes_pad)
    return made if divisor is None else b.affine(made, scale=math.prod(kernel) / divisor, part="/divided")


def _mean_over_channels(b: Builder, node: Node) -> Squares:
    if "divisor_override" in node or node.get("ceil_mode", False):
        node.refuse("has a divisor of its own, or ceil_mode; required: neither")
    kernel, stride = node.window("kernel_size", 3, 1), node.window("stride", 3, node.window("kernel_size", 3, 1))
    is_plain = not any(node.window("padding", 3, 0)) and bool(node.get("count_include_pad", True))
    return patterns.mean_over_channels(b, node.value("self"), kernel, stride, is_plain)


def _adaptive_pool(b: Builder, node: Node) -> Any:
    axes, is_average, size = _axes(node), "avg" in node.op, node.get("output_size", 1)
    sizes = [size] if isinstance(size, int) else list(size)
    made = b.adaptive_pool(node.image(axes), is_average, sizes * axes if len(sizes) < axes else sizes)
    return made if is_average else [made]  # the other is where the largest are


def _reduce(b: Builder, node: Node) -> Tensor | Moment:
    if node.op == "mean" and node.integers("dim"):
        return patterns.mean(b, node.stepping(), node.integers("dim"), bool(node.get("keepdim", False)))
    if node.op == "sum" and node.integers("dim") and isinstance(node.value("self"), Squares):
        return patterns.square_sum(b, node.moving(), node.integers("dim"), bool(node.get("keepdim", False)))
    x = node.tensor()
    axes = node.integers("dim") or range(x.rank)
    return b.reduce(x, {"amax": "max"}.get(node.op, node.op), axes, bool(node.get("keepdim", False)))


def _vector_norm(b: Builder, node: Node) -> Tensor | Moment:
    exponent, axes = node.get("ord", node.get("p", 2)), node.integers("dim")
    if exponent != 2 or not axes:
        node.refuse(f"is a norm of order {exponent} over axes {axes}; required: 2, and axes")
    return patterns.length(b, node.tensor(), axes, bool(node.get("keepdim", False)))


# Arithmetic


def _add(b: Builder, node: Node) -> Tensor | Squares | Curve | Moment:
    factor = node.get("alpha", 1) * (1.0 if node.op == "add" else -1.0)
    x, y = node.operand("self"), node.operand("other")
    return patterns.plus(b, y, x, factor) if node.op == "rsub" else patterns.plus(b, x, y, factor)


def _add_product(b: Builder, node: Node) -> Tensor | Squares | Curve | Moment:
    product = patterns.times(b, node.operand("tensor1"), node.operand("tensor2"))
    if (factor := node.get("value", 1)) != 1:
        product = patterns.times(b, product, np.float64(factor))
    return patterns.plus(b, node.operand("self"), product)


def _divide(b: Builder, node: Node) -> Tensor | Curve | Moment:
    if "rounding_mode" in node:
        node.refuse("rounds; required: division as it is")
    return patterns.divided(b, node.operand("self"), node.operand("other"))


def _power(b: Builder, node: Node) -> Tensor | Squares | Curve | Moment:
    exponent = {"rsqrt": -0.5, "sqrt": 0.5, "square": 2}.get(node.op, node.value("exponent"))
    if not isinstance(exponent, (int, float)):
        node.refuse("has an exponent that is no number; required: one")
    return patterns.power(b, node.stepping(), float(exponent))


def _batch_norm(b: Builder, node: Node) -> list[Tensor]:
    made = b.batch_norm(node.tensor("input"), node.weight("running_mean"), node.weight("running_var"),
                        node.optional("weight"), node.optional("bias"), node.get("eps", 1e-5))
    return [made]  # the others are what normalised it, or nothing


def _layer_norm(b: Builder, node: Node) -> Tensor:
    """rms_norm too, whose epsilon is by default the least difference of float32."""
    is_rms, axes = node.op == "rms_norm", len(node.integers("normalized_shape"))
    epsilon = node.single("eps", 2.0**-23 if is_rms else 1e-5)
    return b.layer_norm(node.tensor("input"), axes, node.optional("weight"),
                        None if is_rms else node.optional("bias"), epsilon, centered=not is_rms)


def _group_norm(b: Builder, node: Node) -> Tensor:
    return b.group_norm(node.tensor("input"), int(node.value("num_groups")), node.optional("weight"),
                        node.optional("bias"), node.single("eps", 1e-5))


def _instance_norm(b: Builder, node: Node) -> Tensor:
    x, mean, variance = node.tensor("input"), node.optional("running_mean"), node.optional("running_var")
    scale, shift, epsilon = node.optional("weight"), node.optional("bias"), node.single("eps", 1e-5)
    if node.value("use_input_stats"):
        return b.group_norm(x, x.dims[0], scale, shift, epsilon)
    if mean is None or variance is None:
        node.refuse("has neither statistics of its own nor the input's; required: one of them")
    return b.batch_norm(x, mean, variance, scale, shift, epsilon)


def _batch_statistics(_: Builder, node: Node) -> Any:
    node.refuse("normalises by the statistics of its batch; required: running mean and variance, in evaluation mode")


# Activations


def _clip(b: Builder, node: Node) -> Tensor | Curve:
    names = ("min_val", "max_val") if node.op == "hardtanh" else ("min", "max")
    defaults = {"hardtanh": (-1.0, 1.0), "relu6": (0.0, 6.0)}.get(node.op, (-math.inf, math.inf))
    low, high = (node.single(name, default) for name, default in zip(names, defaults, strict=True))
    return patterns.clip(b, node.pointwise(), low, high)


def _activation(b: Builder, node: Node) -> Tensor | Curve:
    name, fields = node.op, {}
    match node.op:
        case "elu":
            name, fields = "elu", {"alpha": float(node.get("alpha", 1.0)), "beta": float(node.get("scale", 1.0))}
        case "selu":
            name, fields = "elu", {"alpha": 1.6732632423543772, "beta": 1.0507009873554805}
        case "gelu":
            name = "gelu_tanh" if node.get("approximate", "none") == "tanh" else "gelu"
        case "hardsigmoid" | "hardswish":
            name = name.replace("hard", "hard_")
        case "softplus" if node.get("threshold", 20) < 20:
            node.refuse(f"has threshold {node.get('threshold', 20)}; required: 20 or more, where it changes nothing")
    return patterns.activation(b, node.pointwise(), name, **fields)


def _extreme(b: Builder, node: Node) -> Tensor | Curve:
    return patterns.extreme(b, node.operand("self"), node.operand("other"), node.op == "maximum")


def _prelu(b: Builder, node: Node) -> Tensor:
    x, slope = node.tensor(), node.weight()
    return b.prelu(x, slope if slope.size == 1 else slope.reshape(1, -1, *(1,) * (x.rank - 2)))


# Moving elements


def _pad(b: Builder, node: Node, x: Tensor) -> Tensor:
    pads = node.integers("pad" if "pad" in node else "padding")
    mode = {"reflection": "reflect", "replication": "replicate"}.get(node.op.split("_")[0],
                                                                     node.get("mode", "constant"))
    modes = {"constant": "constant", "reflect": "reflect", "replicate": "edge"}
    if mode not in modes or (mode == "constant" and node.get("value", 0)):
        node.refuse(f"has mode {mode!r} and value {node.get('value', 0)}; required: constant zeros, reflect or "
                    "replicate")
    pairs = list(zip(pads[::2], pads[1::2], strict=True))[::-1]  # of the last axes; PyTorch begins with the last
    return b.pad(x, [(0, 0)] * (x.rank - len(pairs)) + pairs, modes[mode])


def _view(b: Builder, node: Node, x: Tensor) -> Tensor:
    return b.reshape(x, node.integers("size" if "size" in node else "shape"))


def _squeeze(b: Builder, node: Node, x: Tensor) -> Tensor:
    if "dim" not in node and b.batch == 1:
        node.refuse("removes all axes of length 1, the batch too; required: axes")
    axes = node.integers("dim", range(1, x.rank))
    return b.squeeze(x, [axis for axis in axes if x.dims[b.own_axis(x, axis)] == 1])


def _permute(b: Builder, node: Node, x: Tensor) -> Tensor:
    order = list(range(x.rank))
    if node.op == "permute":
        order = [b.axis(axis, x.rank) for axis in node.integers("dims")]
    else:
        one, other = (b.axis(node.value(name), x.rank) for name in ("dim0", "dim1"))
        order[one], order[other] = other, one
    return b.transpose(x, order)


def _slice(b: Builder, node: Node) -> Tensor:
    x, axis = node.tensor(), node.get("dim", 0)
    part = slice(node.value("start"), node.value("end"), node.get("step", 1))
    return b.take(x, axis, part)


def _split(b: Builder, node: Node) -> list[Tensor]:
    x, axis = node.tensor(), node.get("dim", 0)
    length = x.dims[b.own_axis(x, axis)]
    if node.op == "unbind":
        return [b.take(x, axis, i) for i in range(length)]
    sizes = node.get("split_sizes", node.value("split_size"))
    if isinstance(sizes, int):
        sizes = [min(sizes, length - start) for start in range(0, length, max(sizes, 1))]
    return b.split(x, axis, [int(n) for n in sizes])


def _item(_: Builder, node: Node) -> Any:
    values, index = node.reader.values[node.traced.args[0]], node.traced.args[1]
    if not isinstance(values, list) or not isinstance(index, int):
        node.refuse("takes a part of what is no list; required: the outputs of an operator that has several")
    if index >= len(values):
        node.refuse("takes the positions of the largest, or statistics; required: an operator's first output")
    return values[index]


def _concat(b: Builder, node: Node) -> Tensor:
    parts, axis = node.tensors("tensors"), int(node.get("dim", 0))
    return b.concat([b.unsqueeze(x, [axis]) for x in parts] if node.op == "stack" else parts, axis)


def _flip(b: Builder, node: Node) -> Tensor:
    x = node.tensor()
    for axis in node.integers("dims"):
        x = b.take(x, axis, slice(None, None, -1))
    return x


def _roll(b: Builder, node: Node) -> Tensor:
    x, shifts, axes = node.tensor(), node.integers("shifts"), node.integers("dims")
    own = [b.own_axis(x, axis) for axis in axes]
    if len(shifts) != len(own):
        node.refuse(f"has shifts {shifts} for axes {axes}; required: as many")
    return b.move(x, x.elements, lambda index: np.roll(index, shifts, own))


def _pixel_shuffle(b: Builder, node: Node) -> Tensor:
    if node.op == "pixel_shuffle":
        return b.depth_to_space(node.image(2), int(node.value("upscale_factor")), channels_first=True)
    return b.space_to_depth(node.image(2), int(node.value("downscale_factor")), channels_first=True)


def _channel_shuffle(b: Builder, node: Node) -> Tensor:
    x, groups = node.tensor(), int(node.value("groups"))
    channels, *rest = x.dims
    return b.shuffle(x, (groups, channels // groups, *rest), (1, 0, *range(2, len(rest) + 2)), x.dims)


def _upsample(b: Builder, node: Node) -> Tensor:
    x = node.tensor("input" if "input" in node else "self")
    scales = node.get("scale_factors", node.value("scales"))
    if scales is None and "scales_h" in node:
        scales = [node.value("scales_h"), node.value("scales_w")]
    old, sizes = x.dims[1:], node.value("output_size")
    new = [int(n) for n in sizes] if sizes is not None else [
        int(n * float(s)) for n, s in zip(old, scales, strict=True)]
    if len(new) != len(old) or min(new) < 1:
        node.refuse(f"makes {tuple(new)} of {x}; required: sizes from 1")
    steps = [m / n for n, m in zip(old, new, strict=True)] if scales is None else [float(s) for s in scales]
    if "linear" in node.op:
        aligned = bool(node.get("align_corners", False))
        return b.interpolate(x, [
            np.arange(m) * ((n - 1) / max(m - 1, 1)) if aligned else (np.arange(m) + 0.5) / step - 0.5
            for n, m, step in zip(old, new, steps, strict=True)])
    positions = [np.minimum(np.floor(np.arange(m) / step).astype(np.int64), n - 1)
                 for n, m, step in zip(old, new, steps, strict=True)]
    return b.repeat(x, [np.arange(x.dims[0]), *positions])


def _same(_: Builder, node: Node) -> Any:
    return node.value("self")



def _type_as(_: Builder, node: Node) -> Any:
    node.require_floating(node.value("other"))
    return node.value("self")


def _softmax(b: Builder, node: Node) -> Tensor:
    return b.softmax(node.tensor(), node.get("dim", 1), is_log="log" in node.op)


# Written in place, as a function


def _fill(b: Builder, node: Node) -> Any:
    """A number in place of all elements: a constant, whatever the input."""
    number = node.single("fill_value" if node.op == "full_like" else "value", 0.0)
    return torch.full((b.batch, *node.tensor().dims), number)


def _copy(b: Builder, node: Node) -> Any:
    """Other elements in place of all."""
    like, source = node.value("self"), node.value("src")
    shape = like.shape if isinstance(like, torch.Tensor) else (b.batch, *node.tensor().dims)
    if isinstance(source, torch.Tensor):
        return source.expand(shape)
    x = node.tensor("src")
    return b.expand(b.unsqueeze(x, range(1, 1 + len(shape) - x.rank)), shape)


def _scatter(b: Builder, node: Node) -> Tensor:
    """Other elements, `src`, in place of those at some positions along an axis; either may be constant."""
    own, source = node.value("self"), node.value("src")
    shape = own.shape if isinstance(own, torch.Tensor) else (b.batch, *node.tensor().dims)
    axis = b.axis(node.get("dim", 0), len(shape))
    if axis == 0:
        node.refuse("writes to a part of the batch; required: all of it")
    is_one = node.op == "select_scatter"  # which has no axis for it
    positions = np.arange(shape[axis])
    part = positions[int(node.value("index"))] if is_one else slice(node.value("start"), node.value("end"),
                                                                    node.get("step", 1))
    written = np.zeros(shape[axis], bool)
    written[part] = True
    along = written.reshape([-1 if i == axis else 1 for i in range(len(shape))])
    if isinstance(source, torch.Tensor):
        values = node.constant("src")[:1]
        positions[:] = 0
        positions[written] = np.arange(written.sum())
        values = np.take(np.expand_dims(values, axis) if is_one else values, positions, axis)
        return b.affine(node.tensor(), scale=np.where(along, 0, np.ones((1, *shape[1:]))), shift=along * values)
    x = b.unsqueeze(node.tensor("src"), [axis]) if is_one else node.tensor("src")
    if isinstance(own, torch.Tensor):
        positions[:] = written.sum()  # where there is a zero
        positions[written] = np.arange(written.sum())
        x = b.pad(x, [(0, int(i == axis)) for i in range(len(shape))])
        return b.affine(b.take(x, axis, positions), shift=np.where(along, 0, node.constant("self")[:1]))
    positions[written] = shape[axis] + np.arange(written.sum())
    return b.take(b.concat([node.tensor(), x], axis), axis, positions)


OPERATORS: dict[str, Callable[[Builder, Node], Any]] = {
    "_log_softmax": _softmax, "_native_batch_norm_legit": _batch_statistics,
    "_native_batch_norm_legit_functional": _batch_statistics, "_native_batch_norm_legit_no_training": _batch_norm,
    "_prelu_kernel": _prelu, "_softmax": _softmax, "_to_copy": _same, "_unsafe_view": moving(_view),
    "abs": lambda b, node: b.pointwise(Power, node.tensor(), exponent=1.0), "adaptive_avg_pool1d": _adaptive_pool,
    "adaptive_avg_pool2d": _adaptive_pool, "adaptive_max_pool1d": _adaptive_pool, "adaptive_max_pool2d": _adaptive_pool,
    "add": _add, "addcmul": _add_product, "addmm": _addmm, "alias": _same, "amax": _reduce, "avg_pool1d": _average_pool,
    "avg_pool2d": _average_pool, "avg_pool3d": _mean_over_channels, "cat": _concat,
    "channel_shuffle": _channel_shuffle, "clamp": _clip, "clamp_max": _clip, "clamp_min": _clip,
    "clone": _same, "constant_pad_nd": moving(_pad), "conv1d": _conv,
    "conv2d": _conv, "conv_transpose1d": _conv_transpose, "conv_transpose2d": _conv_transpose, "copy": _copy,
    "detach": _same, "div": _divide, "erf": lambda b, node: patterns.curve(b, node.pointwise(), curves.erf),
    "exp": lambda b, node: patterns.curve(b, node.pointwise(), np.exp),
    "expand": lambda b, node: b.expand(node.tensor(), node.integers("size")),
    "fill": _fill, "full_like": _fill, "flip": _flip, "getitem": _item, "group_norm": _group_norm, "hardtanh": _clip,
    "instance_norm": _instance_norm, "layer_norm": _layer_norm,
    "leaky_relu": lambda b, node: b.leaky_relu(node.tensor(), node.get("negative_slope", 0.01)),
    "linalg_vector_norm": _vector_norm,
    "linear": lambda b, node: b.dense(node.tensor("input"), node.weight(), node.optional("bias")),
    "log": lambda b, node: patterns.curve(b, node.pointwise(), np.log),
    "log1p": lambda b, node: patterns.curve(b, node.pointwise(), np.log1p), "log_softmax": _softmax, "matmul": _matmul,
    "max_pool1d": _max_pool, "max_pool2d": _max_pool, "max_pool2d_with_indices": _max_pool, "maximum": _extreme,
    "mean": _reduce, "minimum": _extreme, "mm": _matmul,
    "mul": lambda b, node: patterns.times(b, node.operand("self"), node.operand("other")),
    "neg": lambda b, node: patterns.times(b, node.operand("self"), np.float64(-1)), "norm": _vector_norm,
    "pad": moving(_pad),
    "permute": moving(_permute),
    "pixel_shuffle": _pixel_shuffle, "pixel_unshuffle": _pixel_shuffle, "pow": _power, "prelu": _prelu,
    "reciprocal": lambda b, node: patterns.divided(b, np.float64(1), node.operand("self")),
    "reflection_pad1d": moving(_pad), "reflection_pad2d": moving(_pad), "relu": lambda b, node: b.relu(node.tensor()),
    "relu6": _clip, "repeat": lambda b, node: b.tile(node.tensor(), node.integers("repeats")),
    "replication_pad1d": moving(_pad), "replication_pad2d": moving(_pad), "reshape": moving(_view), "roll": _roll,
    "rms_norm": _layer_norm, "rsqrt": _power, "rsub": _add,
    "select": lambda b, node: b.take(node.tensor(), node.get("dim", 0), node.constant("index")),
    "select_scatter": _scatter, "sign": lambda _, node: Sign(node.tensor()), "slice": _slice,
    "slice_scatter": _scatter,
    "softmax": _softmax, "split": _split, "split_with_sizes": _split, "sqrt": _power, "square": _power,
    "squeeze": moving(_squeeze), "stack": _concat, "sub": _add, "sum": _reduce, "transpose": moving(_permute),
    "type_as": _type_as, "unbind": _split, "unsqueeze": moving(lambda b, node, x: b.unsqueeze(x, [node.value("dim")])),
    "upsample_bilinear2d": _upsample, "upsample_linear1d": _upsample, "upsample_nearest1d": _upsample,
    "upsample_nearest2d": _upsample, "view": moving(_view), "zero": _fill,
    "zeros_like": _fill,
    **dict.fromkeys(("elu", "gelu", "hardsigmoid", "hardswish", "mish", "selu", "sigmoid", "silu", "softplus", "tanh"),
                    _activation),
}

# What may be given and need not be read: where and how a tensor lies in memory, what matters in training alone, and
# copies, for nothing is written in place. Each other argument is read, or must be what it is by default.
IGNORED = {"copy", "cudnn_enable", "cudnn_enabled", "device", "half_to_float", "implicit", "layout",
           "memory_format", "momentum", "non_blocking", "pin_memory", "requires_grad"}

NEAREST = {
    "celu": "elu", "embedding": "none: a module that begins after it takes what it looks up as its input",
    **dict.fromkeys(("bmm", "scaled_dot_product_attention"), ATTENTION), "einsum": "linear",
    "upsample_bicubic2d": "upsample_bilinear2d", "_upsample_bilinear2d_aa": "upsample_bilinear2d",
}
