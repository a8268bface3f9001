"""What operators of all sources are made of: arithmetic, windows, weights and activations.

Operators of ONNX, PyTorch, Keras and Caffe are short functions that call the methods of `Builder`, here and in
moves.py.
"""

from __future__ import annotations

import difflib
import itertools
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fastdtd import graph
from fastdtd.errors import ConversionError, shown
from fastdtd.graph import MAX_PADDING, Layer, Shape
from fastdtd.importers.moves import Array, Moves
from fastdtd.importers.tensors import Tensor, layer_shape
from fastdtd.importers.transposed import transposed_convolution

if TYPE_CHECKING:
    from fastdtd.importers.verify import Runtime

NO_PADDING = (0, 0, 0, 0)
ATTENTION = ("none, for attention is not explained: "
             "https://github.com/fastdtd/fastdtd/blob/main/docs/method.md#attention says why")
_MAX_LISTED = 20  # outputs, in messages
_MAX_BRANCHES = 16  # images side by side, which are added up one by one
_LOG = logging.getLogger("fastdtd")

Padding = tuple[int, int, int, int]  # top, left, bottom, right


class Parsed(NamedTuple):
    """What a source is read as. runtime: what runs the source itself, where that is known. inputs: of several, by name,
    their shapes; `shape` is then that of all together."""

    layers: list[Layer]
    shape: Shape
    format: str
    runtime: Runtime | None = None
    inputs: Mapping[str, Shape] = {}


class Builder(Moves):
    """A network while it is read, and what operators make of it.

    Windows have an entry for each spatial axis, of which there may be one or two; paddings have all that is before,
    then all that is after. Images are (N, C, H, W), or (N, C, L).
    """

    # Arithmetic

    def affine(self, x: Tensor, scale: Any = 1.0, shift: Any = 0.0, part: str = "") -> Tensor:
        """scale * x + shift, constants that broadcast with x, batch included."""
        if np.any(shift) and self.has_zeros(x):
            x = self.materialize(x)
        x, (scales, shifts) = self._by_channel(x, (scale, 1.0), (shift, 0.0))
        return self.pointwise(graph.BatchNorm, x, part, scale=scales, shift=shifts)

    def scale_channels(self, x: Tensor, scale: Any, shift: Any) -> Tensor:
        """The same with one value, or one for each channel, which is the axis after the batch."""
        column = (1, -1) + (1,) * (x.rank - 2)
        return self.affine(x, np.reshape(scale, column), np.reshape(shift, column))

    def batch_norm(self, x: Tensor, mean: Array, variance: Array, gamma: Array | None, beta: Array | None,
                   epsilon: float) -> Tensor:
        """(x - mean) / sqrt(variance + epsilon) * gamma + beta, all by channel."""
        scale = (1.0 if gamma is None else gamma.astype(np.float64)) / np.sqrt(variance.astype(np.float64) + epsilon)
        return self.scale_channels(x, scale, (0.0 if beta is None else beta) - mean.astype(np.float64) * scale)

    def _by_channel(self, x: Tensor, *constants: tuple[Any, float]) -> tuple[Tensor, list[Array]]:
        """Constants as one value for each channel of the layer that x views; x is materialized where that helps, and
        where nothing else does, each element becomes a channel.

        constants: (constant, what channels get that x has nothing of)
        """
        found = [self._one_by_channel(x, np.asarray(value, np.float64), rest) for value, rest in constants]
        if all(values is not None for values in found):
            return x, [values for values in found if values is not None]
        whole = self.materialize(x)
        if whole.layer == x.layer:
            for value, _ in constants:
                if not _broadcasts(np.shape(value), (1, *x.dims)) or not np.isfinite(value).all():
                    self.refuse(f"has a constant of shape {np.shape(value)} for a tensor {x}; required: finite "
                                "numbers, in a shape that broadcasts with it")
            flat = self.materialize(self.with_dims(x, (x.elements,), "/flatten"))
            whole = self.with_dims(flat, x.dims, "/image")
        return self._by_channel(whole, *constants)

    def _one_by_channel(self, x: Tensor, value: Array, rest: float) -> Array | None:
        """None where it differs within a channel, or does not broadcast."""
        channels, pixels = x.shape[0], x.shape[1] * x.shape[2]
        if not _broadcasts(value.shape, (1, *x.dims)):
            return None
        if value.size == 1:
            return np.full(channels, value.reshape(()))
        value = value[(None,) * (x.rank - value.ndim)]
        if x.index is None and x.offset == 0 and channels in value.shape and value.size == channels:
            axis = value.shape.index(channels) - 1
            if x.axes[axis] == ((channels, pixels),) and not any(x.pads[axis]):
                return value.ravel()
        self.spend_index(math.prod(x.shape) + x.elements)
        full, index = np.broadcast_to(value[0], x.dims).ravel(), x.indices().ravel()
        each = np.full(math.prod(x.shape), np.nan)
        each[index[index >= 0]] = full[index >= 0]
        by_channel = each.reshape(channels, -1)
        low, high = np.fmin.reduce(by_channel, 1), np.fmax.reduce(by_channel, 1)
        low, high = np.where(np.isnan(low), rest, low), np.where(np.isnan(high), rest, high)
        is_one = np.isfinite(full).all() and (low == high).all() and (each[index[index >= 0]] == full[index >= 0]).all()
        return low if is_one else None

    def sum(self, terms: Sequence[Tensor]) -> Tensor:
        if len({x.dims for x in terms}) > 1:
            self.refuse(f"adds {', '.join(map(str, terms[:5]))}; required: tensors of one shape")
        total = terms[0]
        for i, term in enumerate(terms[1:], 1):
            part = "" if i == len(terms) - 1 else f"/{i}"
            if self.have_one_view(total, term):
                total = replace(total, layer=self.add(graph.Add, [total.base, term.base], part).layer)
            else:
                both = self.add(graph.Add, [self.materialize(total), self.materialize(term)], part)
                total = Tensor.whole(both.layer, both.shape, total.dims)
        return total

    def local_response_norm(self, x: Tensor, **fields: Any) -> Tensor:
        return self.add(graph.LocalResponseNorm, [self.materialize(x)], **fields)

    def group_norm(self, x: Tensor, groups: int, scale: Array | None, shift: Array | None, epsilon: float,
                   centered: bool = True) -> Tensor:
        """By the statistics of groups of the channels, which are the axis after the batch, at all positions."""
        if not x.dims:
            self.refuse(f"reads a tensor {x}; required: (N, C, ...)")
        channels = x.dims[0]
        scale, shift = self._norm_parameters(channels, scale, shift)
        base = x.base if x.is_whole and x.shape[0] % channels == 0 else self.materialize(x)
        times = base.shape[0] // channels  # the channels that are one in the source, as where groups are an axis
        made = self.add(graph.GroupNorm, [base], scale=np.repeat(scale, times), shift=np.repeat(shift, times),
                        groups=groups, epsilon=epsilon, centered=centered)
        return Tensor.whole(made.layer, made.shape, x.dims)

    def layer_norm(self, x: Tensor, axes: int, scale: Array | None, shift: Array | None, epsilon: float,
                   centered: bool = True) -> Tensor:
        """By the statistics over the last axes, so many; scale and shift have their shape."""
        if not 1 <= axes < x.rank:
            self.refuse(f"normalises over the last {axes} axes of {x}; required: 1 or more, without the batch")
        fields: dict[str, Any] = {"epsilon": epsilon, "centered": centered}
        is_channel = x.rank == 3 and x.is_whole and x.shape[0] % x.dims[0] == 0 and not self.channels_first(x).is_whole
        if axes == 1 and is_channel and scale is None and shift is None:  # as groups that are an axis
            return self.group_norm(x, x.dims[0], None, None, epsilon, centered)
        if axes == 1:
            scale, shift = self._norm_parameters(x.dims[-1], scale, shift)
            first = self.channels_first(x)
            made = self.add(graph.GroupNorm, [self.materialize(first)], scale=scale, shift=shift, per_position=True,
                            **fields)
            return self.channels_last(Tensor.whole(made.layer, made.shape, first.dims))
        outer = math.prod(x.dims[:-axes])
        if outer == 1:  # all elements, in whatever order
            view = self.channels_first(x)
            base = view if view.is_whole else x if x.is_whole else self.materialize(x)
            scales, shifts = self._norm_parameters(base.shape[0], None, None)
            part = self.add(graph.GroupNorm, [base.base], scale=scales, shift=shifts, **fields)
            made = replace(x if base is view else base, layer=part.layer)
        else:
            rows = x if x.dims[0] == outer else self.with_dims(x, (outer, *x.dims[-axes:]))
            made = self.group_norm(rows, outer, None, None, epsilon, centered)
            made = made if made.dims == x.dims else self.with_dims(made, x.dims)
        if scale is None and shift is None:
            return made
        return self.affine(made, 1.0 if scale is None else scale[None], 0.0 if shift is None else shift[None],
                           "/affine")

    def _norm_parameters(self, channels: int, scale: Array | None, shift: Array | None) -> tuple[Array, Array]:
        given = np.ones(channels) if scale is None else scale, np.zeros(channels) if shift is None else shift
        if given[0].shape != (channels,) or given[1].shape != (channels,):
            self.refuse(f"has parameters of shapes {given[0].shape} and {given[1].shape}; required: ({channels},)")
        return given

    # Layers with windows or weights

    def spatial(self, x: Tensor) -> int:
        """How many spatial axes."""
        if x.rank not in (3, 4):
            self.refuse(f"reads a tensor {x} of {x.rank} axes; required: (N, C, H, W), or (N, C, L)")
        return x.rank - 2

    def _unpadded(self, x: Tensor) -> tuple[Tensor, Padding]:
        """A layer's output and the zeros around it that together are `x`; else `x` materialized, and none."""
        inner = x.unpadded()
        if x.is_padded and not any(x.pads[0]) and inner.is_whole and inner.shape == layer_shape(inner.dims):
            around = _four([before for before, _ in x.pads[1:]] + [after for _, after in x.pads[1:]])
            if max(around) <= MAX_PADDING:
                return inner, around
        return self.materialize(x), NO_PADDING

    def check_weights(self, weight: Array, axes: int, layout: str = "(K, C / group, *kernel_shape)") -> None:
        if weight.ndim != axes + 2 or 0 in weight.shape:
            self.refuse(f"has weights of shape {weight.shape}; required: {layout}, in {axes} dimensions")

    def conv(self, x: Tensor, weight: Array, bias: Array | None, stride: Sequence[int], padding: Sequence[int],
             dilation: Sequence[int], groups: int, part: str = "") -> Tensor:
        """weight: (K, C / groups, kernel...)."""
        self.check_weights(weight, self.spatial(x))
        x, around = self._unpadded(x)
        weight = weight.reshape(*weight.shape[:2], *_two(weight.shape[2:], 1))
        return self.add(graph.Conv2d, [x], part, weight=weight, bias=bias, stride=_two(stride, 1),
                        padding=_sum(_four(padding), around), dilation=_two(dilation, 1), groups=groups)

    def conv_transpose(self, x: Tensor, weight: Array, bias: Array | None, stride: Sequence[int],
                       padding: Sequence[int], dilation: Sequence[int], groups: int, extra: Sequence[int]) -> Tensor:
        """weight: (C, K / groups, kernel...); extra: what is added at the end of each axis."""
        axes = self.spatial(x)
        self.check_weights(weight, axes, "(C, K / group, *kernel_shape)")
        outputs = weight.shape[1] * groups
        if groups < 1 or weight.shape[0] % groups or x.dims[0] != weight.shape[0] or (
                bias is not None and bias.shape != (outputs,)):
            self.refuse(f"has weights of shape {weight.shape} in {groups} groups and bias of shape "
                        f"{None if bias is None else bias.shape} for a tensor {x}; required: weights for as many "
                        f"channels, groups that divide them, and bias ({outputs},)")
        weight = weight.reshape(*weight.shape[:2], *_two(weight.shape[2:], 1))
        stride, dilation, extra, cut = _two(stride, 1), _two(dilation, 1), _two(extra, 0), _four(padding)
        if not all(1 <= n <= 256 for n in stride) or min(dilation) < 1 or min(*cut, *extra) < 0:
            self.refuse(f"has strides {stride}, dilations {dilation}, pads {cut} and output padding {extra}; required: "
                        "strides from 1 to 256, dilations from 1, and nothing negative")
        shape, kernel = layer_shape(x.dims), weight.shape[2:]
        sizes = [(shape[1 + i] - 1) * stride[i] + dilation[i] * (kernel[i] - 1) + 1 + extra[i] for i in (0, 1)]
        if any(sizes[i] <= cut[i] + cut[i + 2] for i in (0, 1)):
            self.refuse(f"leaves nothing of a tensor {x}")
        taps = math.prod(dilation[i] * (kernel[i] - 1) // stride[i] + 1 for i in (0, 1))
        self.spend(weight.shape[0] * weight.shape[1] * math.prod(stride) * taps, 4)
        self.spend_index(outputs * math.prod(sizes))
        fields, index = transposed_convolution(weight, bias, shape, stride, cut, dilation, groups, extra)
        is_convolution = stride == (1, 1) and not any(cut)
        phases = self.add(graph.Conv2d, [self.materialize(x)], "" if is_convolution else "/phases", **fields)
        made = self.move(phases.base, index.size, lambda _: index)
        return made if axes == 2 else self.with_dims(made, (made.dims[0], made.dims[2]))

    def pool(self, x: Tensor, is_average: bool, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int],
             ceil_mode: bool = False, include_pad: bool = False) -> Tensor:
        """Zeros around an image join the pool where nothing changes by it.

        In an average they are part of the image and always count, while those of the pool itself may not. A maximum
        over elements that are not negative is the same without them, if no window holds nothing else.
        """
        self.spatial(x)
        sides, pads = _two(kernel, 1), _four(padding)
        inner, around = self._unpadded(x)
        total = _sum(pads, around)
        if around != NO_PADDING:
            joins = (pads == NO_PADDING or include_pad) if is_average else self.is_nonnegative(inner)
            if ceil_mode or not joins or any(total[i] >= sides[i % 2] for i in range(4)):
                inner, around, total = self.materialize(x), NO_PADDING, pads
        window: dict[str, Any] = {"kernel": sides, "stride": _two(stride, 1), "padding": total, "ceil_mode": ceil_mode}
        if not is_average:
            return self.add(graph.MaxPool2d, [inner], **window)
        return self.add(graph.AveragePool2d, [inner], count_include_pad=include_pad or around != NO_PADDING, **window)

    def norm_pool(self, x: Tensor, exponent: float, kernel: Sequence[int], stride: Sequence[int],
                  padding: Sequence[int]) -> Tensor:
        """The p-norm of each window."""
        self.spend(x.dims[0] * math.prod(kernel), 4)
        powers = self.pointwise(graph.Power, x, "/power", exponent=exponent)
        ones = np.ones((x.dims[0], 1, *kernel), np.float32)
        sums = self.conv(powers, ones, None, stride, padding, (1,) * len(kernel), x.dims[0], "/sum")
        return self.pointwise(graph.Power, sums, exponent=1 / exponent if exponent else 0.0)

    def adaptive_pool(self, x: Tensor, is_average: bool, size: Sequence[int | None]) -> Tensor:
        """Windows from floor(i n / m) to ceil((i + 1) n / m), for m outputs of n inputs along an axis."""
        axes = self.spatial(x)
        wanted = [own if n is None else n for n, own in zip(size, x.dims[1:], strict=True)]
        if wanted == [1] * axes:
            return self.reduce(x, "mean" if is_average else "max", range(2, axes + 2), keep=True)
        if wanted == list(x.dims[1:]):
            return x
        if min(wanted) < 1 or math.prod(wanted) > graph.MAX_TENSOR_ELEMENTS:
            self.refuse(f"makes {tuple(wanted)} of {x.dims[1:]}; required: sizes from 1")
        if all(own % n == 0 for n, own in zip(wanted, x.dims[1:], strict=True)):
            kernel = [own // n for n, own in zip(wanted, x.dims[1:], strict=True)]
            return self.pool(x, is_average, kernel, kernel, (0,) * 2 * axes)
        self.spend(sum(n * own for n, own in zip(wanted, x.dims[1:], strict=True)))
        windows = [[np.arange(i * own // n, -(-(i + 1) * own // n)) for i in range(n)]
                   for n, own in zip(wanted, x.dims[1:], strict=True)]
        if is_average:
            return self.resize(x, [np.stack([np.isin(np.arange(own), window) / len(window) for window in each])
                                   for each, own in zip(windows, x.dims[1:], strict=True)])
        # Windows of one length side by side: the last element of a shorter one comes again, and never before the first.
        kernel = [max(map(len, each)) for each in windows]
        repeated = self.repeat(x, [np.arange(x.dims[0]), *(
            np.concatenate([np.pad(window, (0, k - len(window)), "edge") for window in each])
            for k, each in zip(kernel, windows, strict=True))])
        return self.pool(repeated, False, kernel, kernel, (0,) * 2 * axes)

    def resize(self, x: Tensor, weights: Sequence[Array]) -> Tensor:
        """Weighted means along each spatial axis; weights: (outputs, inputs) of each."""
        self.spatial(x)
        rows, columns = weights if len(weights) == 2 else (np.ones((1, 1)), *weights)
        return self.add(graph.Resize, [self.materialize(x)], rows=rows, columns=columns)

    def interpolate(self, x: Tensor, positions: Sequence[Array]) -> Tensor:
        """Bilinear: at fractional positions along each spatial axis; beyond the ends is what is there."""
        self.spend(sum(len(at) * n for at, n in zip(positions, x.dims[1:], strict=True)))
        return self.resize(x, [
            np.maximum(0, 1 - np.abs(np.clip(at, 0, n - 1)[:, None] - np.arange(n)))
            for at, n in zip(positions, x.dims[1:], strict=True)])

    def reduce(self, x: Tensor, how: str, axes: Iterable[int], keep: bool) -> Tensor:
        """The "mean", "sum" or "max" over any axes but the batch."""
        over = sorted({self.own_axis(x, axis) for axis in axes})
        if not over:
            return x
        rest = [axis for axis in range(len(x.dims)) if axis not in over]
        if how == "sum" and over == [0] and len(x.dims) == 4 and x.dims[0] <= _MAX_BRANCHES:
            total = self.sum([self.take(x, 1, i) for i in range(x.dims[0])])
            return self.unsqueeze(total, [1]) if keep else total
        kept = math.prod(x.dims[axis] for axis in rest)
        moved = x
        if rest != [0] or len(over) > 2:
            moved = self.transpose(x, [0, *(axis + 1 for axis in rest + over)])
            moved = self.with_dims(moved, (kept, x.elements // kept), "/transposed")
        base = moved if moved.is_whole and moved.shape[0] == kept else self.materialize(moved)
        window: dict[str, Any] = {"kernel": base.shape[1:]} if how == "max" else {}
        reduced = self.add(graph.MaxPool2d if how == "max" else graph.GlobalAveragePool, [base], **window)
        dims = [1 if axis in over else n for axis, n in enumerate(x.dims) if keep or axis not in over]
        result = Tensor.whole(reduced.layer, reduced.shape, dims)
        return self.affine(result, scale=float(x.elements // kept)) if how == "sum" else result

    def dense(self, x: Tensor, weight: Array, bias: Array | None) -> Tensor:
        """weight (K, F) over the last axis. Elements in another order than a layer has them leave the layer as it is:
        the weights' columns are put in its order."""
        if not x.dims:
            self.refuse(f"reads a tensor {x}; required: (N, F)")
        if weight.ndim != 2 or weight.shape[1] != x.dims[-1]:
            self.refuse(f"has weights of shape {weight.shape} (outputs, features) for a tensor {x}; required: as many "
                        "features as its last axis is long")
        if x.rank > 2:
            first = self.channels_first(x)
            made = self.add(graph.Conv2d, [self.materialize(first)], weight=weight[:, :, None, None], bias=bias)
            return self.channels_last(Tensor.whole(made.layer, made.shape, (len(weight), *first.dims[1:])))
        if not x.is_whole and x.elements == math.prod(x.shape) and not x.is_padded:
            self.spend_index(x.elements)
            order = np.argsort(x.indices())
            if np.array_equal(x.indices()[order], np.arange(x.elements)):
                weight, x = weight[:, order], Tensor.whole(x.layer, x.shape, x.dims, x.name)
        return self.add(graph.Dense, [self.materialize(x)], weight=weight, bias=bias)

    # Activations

    def relu(self, x: Tensor, part: str = "") -> Tensor:
        return self.pointwise(graph.ReLU, x, part)

    def leaky_relu(self, x: Tensor, slope: float, part: str = "") -> Tensor:
        return self.pointwise(graph.LeakyReLU, x, part, slope=slope) if slope else self.relu(x, part)

    def prelu(self, x: Tensor, slope: Any) -> Tensor:
        """One slope, or one for each channel. Slopes that differ take the positive and the negative part apart."""
        x, (slopes,) = self._by_channel(x, (slope, 0.0))
        if (slopes == slopes[0]).all():
            return self.leaky_relu(x, slopes[0])
        base, zeros = x.base, np.zeros(len(slopes))
        mirrored = self.relu(self.add(graph.BatchNorm, [base], "/minus", scale=zeros - 1, shift=zeros), "/negative")
        scaled = self.add(graph.BatchNorm, [mirrored], "/scaled", scale=-slopes, shift=zeros)
        return replace(x, layer=self.add(graph.Add, [self.relu(base, "/positive"), scaled]).layer)

    def clip(self, x: Tensor, low: float, high: float, part: str = "") -> Tensor:
        if (low, high) == (0, math.inf):
            return self.relu(x, part)
        if (low, high) == (-math.inf, math.inf):
            return x
        if not low <= 0 < high:
            self.refuse(f"clips to [{low:g}, {high:g}]; required: a lower bound of 0 or less, and an upper one above 0")
        return self.pointwise(graph.Clip, x, part, low=low, high=high)

    def softmax(self, x: Tensor, axis: int, part: str = "", is_log: bool = False, to_the_end: bool = False) -> Tensor:
        """to_the_end: over all axes from `axis` on, as ONNX has it before opset 13."""
        if to_the_end:
            return self.with_dims(self.softmax(self.flatten(x, axis), axis % x.rank, part, is_log), x.dims)
        over = self.own_axis(x, axis)
        return self.ends_in("log_softmax" if is_log else "softmax", x, over, part)

    def activation(self, x: Tensor, function: str, part: str = "", **fields: Any) -> Tensor:
        """One of `graph.ACTIVATIONS`, with its alpha and beta."""
        layer = graph.Activation("", ("",), function, **fields)
        if not layer.is_zero_at_zero and self.has_zeros(x):
            x = self.materialize(x)
        made = self.pointwise(graph.Activation, x, part, function=function, **fields)
        # At the end a binary classifier's score is its logit.
        return self.may_end_in("sigmoid", made) if function == "sigmoid" else made

    def is_gate(self, x: Tensor) -> bool:
        """Whether x is a sigmoid, soft or hard, or softmax of something, moved or scaled, or a product of such."""
        while layer := self.layers.get(x.layer):
            match layer:
                case graph.Activation():
                    return layer.function in ("sigmoid", "hard_sigmoid")
                case graph.Clip():  # relu6(x + 3)
                    before = self.layers.get(layer.inputs[0])
                    return layer.low == 0 and isinstance(before, graph.BatchNorm) and bool(
                        (2 * before.shift == layer.high).all())
                case graph.Softmax():
                    return self.is_softmax(layer.name)
                case graph.BatchNorm() | graph.Rearrange() | graph.Flatten():
                    x = replace(x, layer=layer.inputs[0])
                case graph.Multiply():
                    return all(self.is_gate(replace(x, layer=name)) for name in layer.inputs)
                case _:
                    return False
        return False

    def gated(self, x: Tensor, y: Tensor) -> Tensor:
        """The product of a tensor and its gate, in either order, of shapes that broadcast."""
        if self.is_gate(x) and not (self.is_gate(y) and x.elements > y.elements):
            x, y = y, x
        if not self.is_gate(y):
            self.refuse(f"multiplies two tensors that are computed, {x} and {y}; required: a gate as one of them, a "
                        "sigmoid, hard sigmoid or softmax, or a constant (where this is attention: "
                        "docs/method.md#attention)")
        if x.rank != y.rank or any(n != m and 1 not in (n, m) for n, m in zip(x.dims, y.dims, strict=True)):
            self.refuse(f"multiplies tensors {x} and {y}; required: shapes that broadcast, of as many axes")
        if self.have_one_view(x, y):
            return replace(x, layer=self.add(graph.Multiply, [x.base, y.base]).layer)
        dims = tuple(map(max, x.dims, y.dims))
        if x.dims != dims:
            x = self.expand(x, (-1, *dims))
        split = _axes_of(x.shape[0], x.dims) if x.is_whole else 0
        if split > 1 and y.dims[:split] == x.dims[:split] and all(n == 1 for n in y.dims[split:]):
            # the channels are several axes, as those of branches side by side
            y = self.materialize(self.with_dims(y, x.shape[:1], "/by channel"))
            return replace(x, layer=self.add(graph.Multiply, [x.base, y]).layer)
        is_last = x.rank > 2 and not x.is_whole and self.channels_first(x).is_whole
        if is_last:
            x, y = self.channels_first(x), self.channels_first(y)
        by_channel = all(n == 1 for n in y.dims[1:])
        if not (by_channel or y.dims[1:] == x.dims[1:]) or y.dims[:1] not in (x.dims[:1], (1,)):
            y = self.expand(y, (-1, *x.dims))
        made = self.add(graph.Multiply, [self.materialize(x), self.materialize(y)])
        made = Tensor.whole(made.layer, made.shape, x.dims)
        return self.channels_last(made) if is_last else made


def _axes_of(channels: int, dims: Sequence[int]) -> int:
    """How many of the first axes hold so many channels together; 0 where none do."""
    return next((i for i in range(1, len(dims) + 1) if math.prod(dims[:i]) == channels), 0)


def _broadcasts(shape: Sequence[int], to: Sequence[int]) -> bool:
    return len(shape) <= len(to) and all(n in (1, m) for n, m in zip(shape[::-1], to[::-1], strict=False))


def _sum(a: Padding, b: Padding) -> Padding:
    return a[0] + b[0], a[1] + b[1], a[2] + b[2], a[3] + b[3]


def _two(values: Sequence[int], fill: int) -> tuple[int, int]:
    """Height and width; a single axis is the width."""
    return (int(values[0]), int(values[1])) if len(values) == 2 else (fill, int(values[0]))


def _four(padding: Sequence[int]) -> Padding:
    """Top, left, bottom, right; a single axis is the width."""
    return (padding[0], padding[1], padding[2], padding[3]) if len(padding) == 4 else (0, padding[0], 0, padding[1])


def same_padding(sizes: Sequence[int], kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int],
                 odd_before: bool = False) -> tuple[int, ...]:
    """What keeps sizes as they are, but for the stride. odd_before: where an odd one out goes."""
    return _divided([max((-(-n // s) - 1) * s + d * (k - 1) + 1 - n, 0)
                     for n, k, s, d in zip(sizes, kernel, stride, dilation, strict=True)], odd_before)


def transposed_padding(sizes: Sequence[int], wanted: Sequence[int], kernel: Sequence[int], stride: Sequence[int],
                       dilation: Sequence[int], odd_before: bool = False) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """What a transposed convolution has to cut off, and what to add at the ends, to make the sizes `wanted`."""
    more = [(n - 1) * s + d * (k - 1) + 1 - m
            for n, m, k, s, d in zip(sizes, wanted, kernel, stride, dilation, strict=True)]
    return _divided([max(n, 0) for n in more], odd_before), tuple(max(-n, 0) for n in more)


def _divided(totals: Sequence[int], odd_before: bool) -> tuple[int, ...]:
    before = [-(-total // 2) if odd_before else total // 2 for total in totals]
    return *before, *(total - part for total, part in zip(totals, before, strict=True))


def chosen(output: int | str | None, names: Sequence[str]) -> int:
    """Which of a source's outputs, called so, is meant by its number or name; None: the first."""
    if not names:
        raise ConversionError("damaged: the network has no output")
    listed = ", ".join(map(repr, names[:_MAX_LISTED])) + (", ..." if len(names) > _MAX_LISTED else "")
    if output is None:
        if len(names) > 1:
            _LOG.warning("the network has %d outputs, %s: the first is explained; output= (--output) chooses another",
                         len(names), listed)
        return 0
    if isinstance(output, str) and output in names:
        return names.index(output)
    if isinstance(output, str) or not 0 <= output < len(names):
        raise ConversionError(f"output {shown(output)} was asked for; required: one of {listed}, or a number from 0 to "
                              f"{len(names) - 1}")
    return output


def nearest(operator: str, hints: Mapping[str, str], *tables: Iterable[str]) -> str:
    """What is supported and nearest to an operator that is not."""
    close = difflib.get_close_matches(operator, itertools.chain(*tables), 1, 0.5)
    return hints.get(operator, close[0] if close else "none")
