"""Caffe -> layers: the network from its .prototxt, the weights from its .caffemodel, matched by layer name.

Of Caffe's message types, what is needed is spelled out below with Caffe's own field numbers; protobuf skips what it does not know. Both
ways to write a network are read: `layer` with types as text, and the older `layers` with types as an enumeration.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format
from google.protobuf.message import DecodeError

from fastdtd.errors import ConversionError
from fastdtd.graph import (
    INPUT,
    MAX_TENSOR_ELEMENTS,
    MAX_WEIGHT_ELEMENTS,
    Add,
    Array,
    AveragePool2d,
    BatchNorm,
    Concat,
    Conv2d,
    Dense,
    Flatten,
    GlobalAveragePool,
    Layer,
    LeakyReLU,
    LocalResponseNorm,
    MaxPool2d,
    Rearrange,
    ReLU,
    Shape,
    Softmax,
)
from fastdtd.importers.tensors import transposed_convolution

# "message: field number type [= default], ..."; * marks what repeats. `data` is a packed list of floats, which on the wire is the same as
# bytes, and bytes become an array without a loop.
_MESSAGES = """
BlobShape: dim 1 int64*
BlobProto: num 1 int32, channels 2 int32, height 3 int32, width 4 int32, data 5 bytes*, shape 7 BlobShape, double_data 8 bytes*
NetStateRule: phase 1 Phase, min_level 2 int32, max_level 3 int32, stage 4 string*, not_stage 5 string*
BatchNormParameter: use_global_stats 1 bool = true, eps 3 float = 1e-5
ConcatParameter: concat_dim 1 uint32 = 1, axis 2 int32 = 1
ConvolutionParameter: num_output 1 uint32, bias_term 2 bool = true, pad 3 uint32*, kernel_size 4 uint32*, group 5 uint32 = 1, \
stride 6 uint32*, pad_h 9 uint32, pad_w 10 uint32, kernel_h 11 uint32, kernel_w 12 uint32, stride_h 13 uint32, stride_w 14 uint32, \
axis 16 int32 = 1, dilation 18 uint32*
EltwiseParameter: operation 1 EltwiseOp = SUM, coeff 2 float*
FlattenParameter: axis 1 int32 = 1, end_axis 2 int32 = -1
InnerProductParameter: num_output 1 uint32, bias_term 2 bool = true, axis 5 int32 = 1, transpose 6 bool
InputParameter: shape 1 BlobShape*
LRNParameter: local_size 1 uint32 = 5, alpha 2 float = 1, beta 3 float = 0.75, norm_region 4 NormRegion, k 5 float = 1
PoolingParameter: pool 1 PoolMethod, kernel_size 2 uint32, stride 3 uint32 = 1, pad 4 uint32, kernel_h 5 uint32, kernel_w 6 uint32, \
stride_h 7 uint32, stride_w 8 uint32, pad_h 9 uint32, pad_w 10 uint32, global_pooling 12 bool, round_mode 13 RoundMode
ReLUParameter: negative_slope 1 float
ScaleParameter: axis 1 int32 = 1, num_axes 2 int32 = 1, bias_term 4 bool
SoftmaxParameter: axis 2 int32 = 1
LayerParameter: name 1 string, type 2 string, bottom 3 string*, top 4 string*, blobs 7 BlobProto*, include 8 NetStateRule*, \
exclude 9 NetStateRule*, concat_param 104 ConcatParameter, convolution_param 106 ConvolutionParameter, eltwise_param 110 EltwiseParameter, \
inner_product_param 117 InnerProductParameter, lrn_param 118 LRNParameter, pooling_param 121 PoolingParameter, \
relu_param 123 ReLUParameter, softmax_param 125 SoftmaxParameter, flatten_param 135 FlattenParameter, \
batch_norm_param 139 BatchNormParameter, scale_param 142 ScaleParameter, input_param 143 InputParameter
V0LayerParameter:
V1LayerParameter: layer 1 V0LayerParameter, bottom 2 string*, top 3 string*, name 4 string, type 5 LayerType, blobs 6 BlobProto*, \
concat_param 9 ConcatParameter, convolution_param 10 ConvolutionParameter, inner_product_param 17 InnerProductParameter, \
lrn_param 18 LRNParameter, pooling_param 19 PoolingParameter, eltwise_param 24 EltwiseParameter, relu_param 30 ReLUParameter, \
include 32 NetStateRule*, \
exclude 33 NetStateRule*, softmax_param 39 SoftmaxParameter
NetParameter: name 1 string, layers 2 V1LayerParameter*, input 3 string*, input_dim 4 int32*, input_shape 8 BlobShape*, \
layer 100 LayerParameter*
"""
_ENUMS = {
    "Phase": "TRAIN TEST",
    "EltwiseOp": "PROD SUM MAX",
    "NormRegion": "ACROSS_CHANNELS WITHIN_CHANNEL",
    "PoolMethod": "MAX AVE STOCHASTIC",
    "RoundMode": "CEIL FLOOR",
    "LayerType": "NONE ACCURACY BNLL CONCAT CONVOLUTION DATA DROPOUT EUCLIDEAN_LOSS FLATTEN HDF5_DATA HDF5_OUTPUT IM2COL IMAGE_DATA "
                 "INFOGAIN_LOSS INNER_PRODUCT LRN MULTINOMIAL_LOGISTIC_LOSS POOLING RELU SIGMOID SOFTMAX SOFTMAX_LOSS SPLIT TANH "
                 "WINDOW_DATA ELTWISE POWER SIGMOID_CROSS_ENTROPY_LOSS HINGE_LOSS MEMORY_DATA ARGMAX THRESHOLD DUMMY_DATA SLICE MVN "
                 "ABSVAL SILENCE CONTRASTIVE_LOSS EXP DECONVOLUTION",
}  # each value's number is its place


def _message_class() -> Any:
    """Caffe's NetParameter, made from the tables above."""
    package = "fastdtd.caffe"
    file = descriptor_pb2.FileDescriptorProto(name=f"{package}.proto", package=package, syntax="proto2")
    for enum, values in _ENUMS.items():
        holder = file.message_type.add(name=enum)  # two enumerations with a MAX need a scope each
        described = holder.enum_type.add(name="Value")
        for place, value in enumerate(values.split()):
            described.value.add(name=value, number=place)
    for line in _MESSAGES.strip().splitlines():
        message, _, fields = line.partition(":")
        described = file.message_type.add(name=message)
        for entry in filter(None, fields.strip().split(", ")):
            name, number, kind, *default = entry.replace("= ", "").split()
            field = described.field.add(name=name, number=int(number), default_value=default[0] if default else None)
            field.label = field.LABEL_REPEATED if kind.endswith("*") else field.LABEL_OPTIONAL
            kind = kind.rstrip("*")
            if kind in _ENUMS:
                field.type, field.type_name = field.TYPE_ENUM, f".{package}.{kind}.Value"
            elif kind[0].isupper():
                field.type, field.type_name = field.TYPE_MESSAGE, f".{package}.{kind}"
            else:
                field.type = getattr(field, f"TYPE_{kind.upper()}")
    pool = descriptor_pool.DescriptorPool()  # of our own: a Caffe in the same process has registered its messages in the default one
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{package}.NetParameter"))


NetParameter = _message_class()


def parse(prototxt: bytes, caffemodel: bytes, size: tuple[int, int] | None = None) -> tuple[list[Layer], Shape, str]:
    """The network in Caffe's files, as it is in its test phase.

    Parameters
    ----------
    prototxt, caffemodel : bytes
        The files.
    size : (height, width), optional
        Replaces the input size in the .prototxt.

    Returns
    -------
    layers : list of Layer
    input_shape : (C, H, W)
    file_format : str

    Raises
    ------
    ConversionError
        Damage, or what is not supported.
    ModelError
        A layer that contradicts itself or its input.
    """
    try:
        net = text_format.Parse(prototxt.decode(), NetParameter(), allow_unknown_field=True)
    except (text_format.ParseError, UnicodeDecodeError, RecursionError) as error:
        raise ConversionError(f"the .prototxt is damaged, or none of Caffe's: {error}") from None
    try:
        trained = NetParameter.FromString(caffemodel)
        blobs = {layer.name: layer.blobs for layer in (*trained.layers, *trained.layer) if layer.blobs}
    except (DecodeError, UnicodeDecodeError):
        raise ConversionError("the .caffemodel is damaged, or none of Caffe's") from None
    if not blobs:
        raise ConversionError("the .caffemodel holds no weights: it is damaged, or none of Caffe's")

    protos = [proto for proto in (*net.layers, *net.layer) if _is_in_test_phase(proto)]
    network = _Network(*_input(net, protos, size))
    for index, proto in enumerate(protos):
        network.read(_Node(proto, index, len(protos), blobs.get(proto.name, ())))
    return network.layers, network.input_shape, "caffe"


def _value(message: Any, field: str) -> str:
    """An enumeration's value as text."""
    return str(message.DESCRIPTOR.fields_by_name[field].enum_type.values_by_number[getattr(message, field)].name)


def _is_in_test_phase(proto: Any) -> bool:
    def holds(rule: Any) -> bool:
        return ((not rule.HasField("phase") or _value(rule, "phase") == "TEST") and not rule.stage
                and rule.min_level <= 0 and (not rule.HasField("max_level") or rule.max_level >= 0))

    return any(map(holds, proto.include)) if proto.include else not any(map(holds, proto.exclude))


def _input(net: Any, protos: Sequence[Any], size: tuple[int, int] | None) -> tuple[str, Shape]:
    """Name and shape of the network's input."""
    names, shapes = list(net.input), [list(shape.dim) for shape in net.input_shape]
    if net.input_dim:
        shapes = [list(net.input_dim)]
    for proto in protos:
        if getattr(proto, "type", "") == "Input":
            names += proto.top
            shapes += [list(shape.dim) for shape in proto.input_param.shape]
    if len(names) != 1 or len(shapes) != 1:
        raise ConversionError(f"the network has {len(names)} inputs ({', '.join(map(repr, names[:5]))}) of {len(shapes)} shapes; required: "
                              "one. A .prototxt for training has none: take the one for deployment")
    shape = shapes[0]
    if len(shape) not in (2, 4) or min(shape) < 1 or (len(shape) == 2 and size is not None):
        raise ConversionError(f"the input {names[0]!r} has shape {shape}" + (f" and size {size} is given" if size else "")
                              + "; required: (N, C, H, W), or (N, F) and no size")
    channels, (height, width) = shape[1], size or ((shape[2], shape[3]) if len(shape) == 4 else (1, 1))
    return names[0], (channels, height, width)


@dataclass(frozen=True)
class _Blob:
    """What a layer computes: the layer that makes it, and its shape there."""

    layer: str
    shape: Shape


class _Node:
    """A layer of the .prototxt with its weights."""

    def __init__(self, proto: Any, index: int, count: int, blobs: Sequence[Any]) -> None:
        self.proto, self.index, self.count, self.blobs = proto, index, count, blobs
        self.name, self.bottoms, self.tops = str(proto.name), list(proto.bottom), list(proto.top)
        is_old = proto.DESCRIPTOR.name == "V1LayerParameter"
        self.type = _value(proto, "type") if is_old else str(proto.type)
        if is_old and proto.HasField("layer"):
            self.refuse("is written as in Caffe's first version; required: a newer one. Caffe's upgrade_net_proto_text makes it")

    def refuse(self, what: str) -> NoReturn:
        reads = ", ".join(map(repr, self.bottoms[:10])) or "nothing"
        raise ConversionError(f"layer {self.name!r} of type {self.type} (number {self.index + 1} of {self.count}, reads {reads}) {what}")

    def weights(self, *shapes: tuple[int, ...]) -> list[Array]:
        """The layer's blobs, one for each of `shapes`."""
        if len(self.blobs) != len(shapes):
            self.refuse(f"has {len(self.blobs)} blobs of weights in the .caffemodel; required: {len(shapes)}")
        return [self._array(blob, shape) for blob, shape in zip(self.blobs, shapes, strict=True)]

    def _array(self, blob: Any, shape: tuple[int, ...]) -> Array:
        # Old files pad every shape with ones to four axes.
        found = tuple(blob.shape.dim) if blob.HasField("shape") else (blob.num, blob.channels, blob.height, blob.width)
        if [n for n in found if n != 1] != [n for n in shape if n != 1]:
            self.refuse(f"has weights of shape {found} in the .caffemodel; required: {shape}")
        data, number = (blob.double_data, "<f8") if blob.double_data else (blob.data, "<f4")
        content = b"".join(data)
        if len(content) != np.dtype(number).itemsize * int(np.prod(shape, dtype=object)):
            self.refuse(f"has damaged weights in the .caffemodel: {len(content)} bytes for shape {shape}")
        return np.frombuffer(content, number).reshape(shape)


class _Network:
    """What the layers read so far have made."""

    def __init__(self, input_name: str, input_shape: Shape) -> None:
        self.input_shape = input_shape
        self.layers: list[Layer] = []
        self.blobs = {input_name: _Blob(INPUT, input_shape)}  # as they are now: a layer may write over what it reads
        self._taken = {INPUT, ""}

    def read(self, node: _Node) -> None:
        """Add what `node` makes."""
        kind = node.type.replace("_", "").lower()  # INNER_PRODUCT and InnerProduct are the same
        if kind in _SKIPPED:
            return
        make = {name.lower(): function for name, function in _TYPES.items()}.get(kind)
        if make is None:
            node.refuse("is a source of training data; required: a .prototxt for deployment" if kind.endswith("data") else
                        f"is not supported; supported: {', '.join(sorted(_TYPES))}")
        if not node.tops:
            node.refuse("has no top")
        result = make(self, node)
        for top in node.tops if kind == "split" else node.tops[:1]:
            self.blobs[top] = result

    def blob(self, node: _Node, index: int = 0) -> _Blob:
        if index >= len(node.bottoms):
            node.refuse(f"lacks its bottom {index + 1}")
        if node.bottoms[index] not in self.blobs:
            node.refuse(f"reads {node.bottoms[index]!r}, which no layer before it makes as its first top")
        return self.blobs[node.bottoms[index]]

    def only_blob(self, node: _Node) -> _Blob:
        if len(node.bottoms) != 1:
            node.refuse(f"has {len(node.bottoms)} bottoms; required: one")
        return self.blob(node)

    def add(self, layer_type: type[Layer], node: _Node, inputs: Sequence[_Blob], part: str = "", **fields: Any) -> _Blob:
        """The output of a new layer. part: marks one of several layers that one of Caffe's needs."""
        name = node.name + part
        if name in self._taken:
            node.refuse(f"has a name that is taken or empty, {name!r}; required: one that no other layer has")
        self._taken.add(name)
        layer = layer_type(name, tuple(x.layer for x in inputs), **fields)
        self.layers.append(layer)
        return _Blob(name, layer.output_shape([x.shape for x in inputs]))


def _pair(node: _Node, parameter: Any, name: str, default: int = 0) -> tuple[int, int]:
    """Height and width: given apart, as one number for both, or as a list of one or two."""
    apart = [f"{name.removesuffix('_size')}_{side}" for side in "hw"]
    if apart[0] in parameter.DESCRIPTOR.fields_by_name and any(map(parameter.HasField, apart)):
        return getattr(parameter, apart[0]), getattr(parameter, apart[1])
    value = getattr(parameter, name)
    values = [value] if isinstance(value, int) else list(value) or [default]
    if len(values) > 2:
        node.refuse(f"has {name} {values}; required: two dimensions")
    return values[0], values[-1]


# ---- Layer types -------------------------------------------------------------------------------------------------------------------------


def _convolution(network: _Network, node: _Node) -> _Blob:
    x, p = network.only_blob(node), node.proto.convolution_param
    if p.axis != 1:
        node.refuse(f"has axis {p.axis}; required: 1")
    outputs, (top, left) = p.num_output, _pair(node, p, "pad")
    weight, *bias = node.weights((outputs, x.shape[0] // max(p.group, 1), *_pair(node, p, "kernel_size")), *[(outputs,)] * p.bias_term)
    return network.add(Conv2d, node, [x], weight=weight, bias=bias[0] if bias else None, stride=_pair(node, p, "stride", 1),
                       padding=(top, left, top, left), dilation=_pair(node, p, "dilation", 1), groups=p.group)


def _deconvolution(network: _Network, node: _Node) -> _Blob:
    x, p = network.only_blob(node), node.proto.convolution_param
    kernel, stride, dilation = _pair(node, p, "kernel_size"), _pair(node, p, "stride", 1), _pair(node, p, "dilation", 1)
    pad, groups, outputs = _pair(node, p, "pad"), p.group, p.num_output
    if p.axis != 1 or min(*kernel, *stride, *dilation, groups) < 1 or x.shape[0] % groups or outputs % groups:
        node.refuse(f"has axis {p.axis}, kernel {kernel}, stride {stride}, dilation {dilation} and {groups} groups for {x.shape[0]} to "
                    f"{outputs} channels; required: axis 1, numbers from 1, and groups that divide both")
    sizes = [(x.shape[1 + i] - 1) * stride[i] + dilation[i] * (kernel[i] - 1) + 1 for i in (0, 1)]
    weights = x.shape[0] * outputs // groups * math.prod(stride) * math.prod(-(-dilation[i] * kernel[i] // stride[i]) + 1 for i in (0, 1))
    if min(sizes[i] - 2 * pad[i] for i in (0, 1)) < 1 or outputs * math.prod(sizes) > MAX_TENSOR_ELEMENTS or weights > MAX_WEIGHT_ELEMENTS:
        node.refuse(f"makes {outputs} x {sizes[0]} x {sizes[1]} less padding {pad}, of {weights} weights; required: at least one pixel, at "
                    f"most {MAX_TENSOR_ELEMENTS} numbers and {MAX_WEIGHT_ELEMENTS} weights")
    weight, *bias = node.weights((x.shape[0], outputs // groups, *kernel), *[(outputs,)] * p.bias_term)
    fields, index = transposed_convolution(weight, bias[0] if bias else None, x.shape, stride, (*pad, *pad), dilation, groups)
    return network.add(Rearrange, node, [network.add(Conv2d, node, [x], "/phases", **fields)], index=index)


def _inner_product(network: _Network, node: _Node) -> _Blob:
    x, p = network.only_blob(node), node.proto.inner_product_param
    if p.axis != 1:
        node.refuse(f"has axis {p.axis}; required: 1")
    if x.shape[1:] != (1, 1):
        x = network.add(Flatten, node, [x], part="/flatten")
    features, outputs = x.shape[0], p.num_output
    weight, *bias = node.weights((features, outputs) if p.transpose else (outputs, features), *[(outputs,)] * p.bias_term)
    return network.add(Dense, node, [x], weight=weight.T if p.transpose else weight, bias=bias[0] if bias else None)


def _pooling(network: _Network, node: _Node) -> _Blob:
    x, p = network.only_blob(node), node.proto.pooling_param
    method = _value(p, "pool")
    if method == "STOCHASTIC":
        node.refuse("pools at random; required: MAX or AVE")
    if p.global_pooling:
        return network.add(GlobalAveragePool, node, [x]) if method == "AVE" else network.add(MaxPool2d, node, [x], kernel=x.shape[1:])
    top, left = _pair(node, p, "pad")
    window: dict[str, Any] = {"kernel": _pair(node, p, "kernel_size"), "stride": _pair(node, p, "stride"),
                              "padding": (top, left, top, left), "ceil_mode": _value(p, "round_mode") == "CEIL"}
    if method == "AVE":
        return network.add(AveragePool2d, node, [x], **window, count_include_pad=True)
    return network.add(MaxPool2d, node, [x], **window)


def _relu(network: _Network, node: _Node) -> _Blob:
    slope = node.proto.relu_param.negative_slope
    return network.add(LeakyReLU, node, [network.only_blob(node)], slope=slope) if slope else network.add(
        ReLU, node, [network.only_blob(node)])


def _lrn(network: _Network, node: _Node) -> _Blob:
    p = node.proto.lrn_param
    within = _value(p, "norm_region") == "WITHIN_CHANNEL"
    if p.local_size % 2 == 0:
        node.refuse(f"has local_size {p.local_size}; required: an odd one")
    return network.add(LocalResponseNorm, node, [network.only_blob(node)], size=p.local_size, alpha=p.alpha, beta=p.beta,
                       bias=1.0 if within else p.k, within_channel=within)  # as Caffe does


def _concat(network: _Network, node: _Node) -> _Blob:
    p = node.proto.concat_param
    axis = p.axis if p.HasField("axis") else p.concat_dim
    if axis != 1:
        node.refuse(f"has axis {axis}; required: 1, the channels")
    return network.add(Concat, node, [network.blob(node, i) for i in range(len(node.bottoms))])


def _eltwise(network: _Network, node: _Node) -> _Blob:
    p = node.proto.eltwise_param
    if _value(p, "operation") != "SUM" or any(c != 1 for c in p.coeff) or len(node.bottoms) < 2:
        node.refuse(f"is a {_value(p, 'operation')} of {len(node.bottoms)} bottoms with coefficients {list(p.coeff)}; "
                    "required: a SUM of two or more, each once")
    terms = [network.blob(node, i) for i in range(len(node.bottoms))]
    total = terms[0]
    for i, term in enumerate(terms[1:], 1):
        total = network.add(Add, node, [total, term], part="" if i == len(terms) - 1 else f"/{i}")
    return total


def _batch_norm(network: _Network, node: _Node) -> _Blob:
    x, p = network.only_blob(node), node.proto.batch_norm_param
    if not p.use_global_stats:
        node.refuse("normalises by the batch; required: use_global_stats true, or not given")
    channels = (x.shape[0],)
    mean, variance, weight = (array.astype(np.float64) for array in node.weights(channels, channels, (1,)))
    mean, variance = (sums / weight if weight else sums * 0 for sums in (mean, variance))  # kept as weighted sums
    scale = 1 / np.sqrt(variance + p.eps)
    return network.add(BatchNorm, node, [x], scale=scale, shift=-mean * scale)


def _scale(network: _Network, node: _Node) -> _Blob:
    x, p = network.only_blob(node), node.proto.scale_param
    if p.axis != 1 or p.num_axes != 1:
        node.refuse(f"has axis {p.axis} and num_axes {p.num_axes}; required: 1 and 1, a number for each channel")
    channels = (x.shape[0],)
    scale, *shift = node.weights(channels, *[channels] * p.bias_term)
    return network.add(BatchNorm, node, [x], scale=scale, shift=shift[0] if shift else np.zeros(channels))


def _flatten(network: _Network, node: _Node) -> _Blob:
    x, p = network.only_blob(node), getattr(node.proto, "flatten_param", None)  # the older layout has none
    if p is not None and (p.axis, p.end_axis) != (1, -1):
        node.refuse(f"has axis {p.axis} and end_axis {p.end_axis}; required: 1 and -1, all but the batch")
    return x if x.shape[1:] == (1, 1) else network.add(Flatten, node, [x])


def _softmax(network: _Network, node: _Node) -> _Blob:
    if node.proto.softmax_param.axis != 1:
        node.refuse(f"has axis {node.proto.softmax_param.axis}; required: 1, the classes")
    return network.add(Softmax, node, [network.only_blob(node)])


def _same(network: _Network, node: _Node) -> _Blob:
    return network.only_blob(node)


_TYPES: dict[str, Callable[[_Network, _Node], _Blob]] = {
    "BatchNorm": _batch_norm, "Concat": _concat, "Convolution": _convolution, "Deconvolution": _deconvolution,
    "Dropout": _same, "Eltwise": _eltwise, "Flatten": _flatten,
    "InnerProduct": _inner_product, "Pooling": _pooling, "ReLU": _relu, "Scale": _scale, "LRN": _lrn, "Softmax": _softmax, "Split": _same,
}
_SKIPPED = {"input", "accuracy", "silence", "softmaxwithloss", "softmaxloss"}  # lower case; what they make is not the network's output
