"""Caffe -> layers: the network from its .prototxt, the weights from its .caffemodel, matched by layer name.

Of Caffe's message types, what is read is spelled out below with Caffe's own field numbers. Protobuf skips what it does
not know; what a layer of the .prototxt says besides is refused, unless it is among IGNORED. Both ways to write a
network are read: `layer` with types as text, and the older `layers` with types as an enumeration. The table OPERATORS
at the end has a function for each type.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Sequence, Set
from typing import Any

import numpy as np
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format
from google.protobuf.message import DecodeError

from fastdtd.errors import ConversionError
from fastdtd.graph import INPUT, MAX_TENSOR_ELEMENTS
from fastdtd.importers import moves, patterns
from fastdtd.importers.budget import Budget
from fastdtd.importers.builder import Builder, Parsed, chosen
from fastdtd.importers.moves import Array
from fastdtd.importers.tensors import Tensor, layer_shape, side_by_side

# "message: field number type [= default], ..."; * marks what repeats. `data` is a packed list of floats, which on the
# wire is the same as bytes, and bytes become an array without a loop.
_MESSAGES = """
BlobShape: dim 1 int64*
BlobProto: num 1 int32, channels 2 int32, height 3 int32, width 4 int32, data 5 bytes*, shape 7 BlobShape, \
double_data 8 bytes*
NetState: phase 1 Phase = TEST, level 2 int32, stage 3 string*
NetStateRule: phase 1 Phase, min_level 2 int32, max_level 3 int32, stage 4 string*, not_stage 5 string*
BatchNormParameter: use_global_stats 1 bool = true, eps 3 float = 1e-5
ConcatParameter: concat_dim 1 uint32 = 1, axis 2 int32 = 1
ConvolutionParameter: num_output 1 uint32, bias_term 2 bool = true, pad 3 uint32*, kernel_size 4 uint32*, \
group 5 uint32 = 1, stride 6 uint32*, pad_h 9 uint32, pad_w 10 uint32, kernel_h 11 uint32, kernel_w 12 uint32, \
stride_h 13 uint32, stride_w 14 uint32, axis 16 int32 = 1, dilation 18 uint32*
DropoutParameter: dropout_ratio 1 float
ELUParameter: alpha 1 float = 1
EltwiseParameter: operation 1 EltwiseOp = SUM, coeff 2 float*
FlattenParameter: axis 1 int32 = 1, end_axis 2 int32 = -1
InnerProductParameter: num_output 1 uint32, bias_term 2 bool = true, axis 5 int32 = 1, transpose 6 bool
InputParameter: shape 1 BlobShape*
LRNParameter: local_size 1 uint32 = 5, alpha 2 float = 1, beta 3 float = 0.75, norm_region 4 NormRegion, k 5 float = 1
PReLUParameter: channel_shared 2 bool
PermuteParameter: order 1 uint32*
PoolingParameter: pool 1 PoolMethod, kernel_size 2 uint32, stride 3 uint32 = 1, pad 4 uint32, kernel_h 5 uint32, \
kernel_w 6 uint32, stride_h 7 uint32, stride_w 8 uint32, pad_h 9 uint32, pad_w 10 uint32, global_pooling 12 bool, \
round_mode 13 RoundMode
PowerParameter: power 1 float = 1, scale 2 float = 1, shift 3 float
ReLUParameter: negative_slope 1 float
ReshapeParameter: shape 1 BlobShape, axis 2 int32, num_axes 3 int32 = -1
ScaleParameter: axis 1 int32 = 1, num_axes 2 int32 = 1, bias_term 4 bool
SigmoidParameter:
SliceParameter: slice_dim 1 uint32 = 1, slice_point 2 uint32*, axis 3 int32 = 1
SoftmaxParameter: axis 2 int32 = 1
TanHParameter:
LayerParameter: name 1 string, type 2 string, bottom 3 string*, top 4 string*, blobs 7 BlobProto*, \
include 8 NetStateRule*, exclude 9 NetStateRule*, phase 10 Phase = TEST, concat_param 104 ConcatParameter, \
convolution_param 106 ConvolutionParameter, dropout_param 108 DropoutParameter, \
eltwise_param 110 EltwiseParameter, \
inner_product_param 117 InnerProductParameter, lrn_param 118 LRNParameter, pooling_param 121 PoolingParameter, \
power_param 122 PowerParameter, relu_param 123 ReLUParameter, softmax_param 125 SoftmaxParameter, \
slice_param 126 SliceParameter, prelu_param 131 PReLUParameter, sigmoid_param 124 SigmoidParameter, \
reshape_param 133 ReshapeParameter, flatten_param 135 FlattenParameter, batch_norm_param 139 BatchNormParameter, \
scale_param 142 ScaleParameter, input_param 143 InputParameter, tanh_param 127 TanHParameter, \
elu_param 140 ELUParameter, permute_param 202 PermuteParameter
V0LayerParameter:
V1LayerParameter: layer 1 V0LayerParameter, bottom 2 string*, top 3 string*, name 4 string, type 5 LayerType, \
blobs 6 BlobProto*, concat_param 9 ConcatParameter, convolution_param 10 ConvolutionParameter, \
dropout_param 12 DropoutParameter, inner_product_param 17 InnerProductParameter, lrn_param 18 LRNParameter, \
pooling_param 19 PoolingParameter, power_param 21 PowerParameter, eltwise_param 24 EltwiseParameter, \
relu_param 30 ReLUParameter, slice_param 31 SliceParameter, include 32 NetStateRule*, exclude 33 NetStateRule*, \
tanh_param 37 TanHParameter, sigmoid_param 38 SigmoidParameter, softmax_param 39 SoftmaxParameter
NetParameter: name 1 string, layers 2 V1LayerParameter*, input 3 string*, input_dim 4 int32*, state 6 NetState, \
input_shape 8 BlobShape*, layer 100 LayerParameter*
"""
# Fields of a layer, and within it, that may be given and need not be read: what matters in training alone, how weights
# began, and which of Caffe's programs computes it.
IGNORED = {"bias_filler", "blob_share_mode", "blobs_lr", "engine", "filler",
           "force_nd_im2col", "loss_param", "loss_weight", "moving_average_fraction", "param", "propagate_down",
           "stable_prod_grad", "transform_param", "weight_decay", "weight_filler"}
_ENUMS = {  # each value's number is its position
    "Phase": "TRAIN TEST",
    "EltwiseOp": "PROD SUM MAX",
    "NormRegion": "ACROSS_CHANNELS WITHIN_CHANNEL",
    "PoolMethod": "MAX AVE STOCHASTIC",
    "RoundMode": "CEIL FLOOR",
    "LayerType": "NONE ACCURACY BNLL CONCAT CONVOLUTION DATA DROPOUT EUCLIDEAN_LOSS FLATTEN HDF5_DATA HDF5_OUTPUT "
                 "IM2COL IMAGE_DATA INFOGAIN_LOSS INNER_PRODUCT LRN MULTINOMIAL_LOGISTIC_LOSS POOLING RELU SIGMOID "
                 "SOFTMAX SOFTMAX_LOSS SPLIT TANH WINDOW_DATA ELTWISE POWER SIGMOID_CROSS_ENTROPY_LOSS HINGE_LOSS "
                 "MEMORY_DATA ARGMAX THRESHOLD DUMMY_DATA SLICE MVN ABSVAL SILENCE CONTRASTIVE_LOSS EXP DECONVOLUTION",
}


def _message_class() -> Any:
    """Caffe's NetParameter, made from the tables above."""
    package = "fastdtd.caffe"
    file = descriptor_pb2.FileDescriptorProto(name=f"{package}.proto", package=package, syntax="proto2")
    for enum, values in _ENUMS.items():
        holder = file.message_type.add(name=enum)  # two enumerations with a MAX need a scope each
        described = holder.enum_type.add(name="Value")
        for index, value in enumerate(values.split()):
            described.value.add(name=value, number=index)
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
    pool = descriptor_pool.DescriptorPool()  # our own: a Caffe in the same process has its messages in the default one
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{package}.NetParameter"))


NetParameter = _message_class()


def parse(prototxt: bytes, caffemodel: bytes, size: tuple[int, int] | None = None, limit: int | None = None,
          output: int | str | None = None) -> Parsed:
    """The network in Caffe's files, as it is in its test phase.

    output: the number or name of a blob that no layer reads; None: the first.
    size: replaces the input size in the .prototxt. limit: bytes, see `Budget`. Raises ConversionError and ModelError.
    """
    try:
        net = text_format.Parse(prototxt.decode(), NetParameter(), allow_unknown_field=True)
    except (text_format.ParseError, UnicodeDecodeError, RecursionError) as error:
        raise ConversionError(f"the .prototxt is damaged, or none of Caffe's: {error}") from None
    try:
        trained = NetParameter.FromString(caffemodel)
        weights = {layer.name: layer.blobs for layer in (*trained.layers, *trained.layer) if layer.blobs}
    except (DecodeError, UnicodeDecodeError):
        raise ConversionError("the .caffemodel is damaged, or none of Caffe's") from None
    if not weights:
        raise ConversionError("the .caffemodel holds no weights: it is damaged, or none of Caffe's")

    if net.state.level or net.state.stage or _value(net.state, "phase") != "TEST":
        raise ConversionError(f"the .prototxt has a state, phase {_value(net.state, 'phase')}, level {net.state.level} "
                              f"and stages {list(net.state.stage)}; required: the test phase alone")
    unread = _unread_fields(prototxt.decode())
    if (len(unread["layers"]), len(unread["layer"])) != (len(net.layers), len(net.layer)):
        raise ConversionError("the .prototxt is written in a way in which its layers cannot be told apart; required: a "
                              "layer { ... } each, as Caffe writes them")
    found = [(proto, fields) for proto, fields in zip((*net.layers, *net.layer), unread["layers"] + unread["layer"],
                                                      strict=True) if _is_in_test_phase(proto)]
    blobs: dict[str, Tensor] = {}  # as they are now: a layer may write over what it reads
    nodes = [Node(proto, fields, i, len(found), weights.get(proto.name, ()), blobs)
             for i, (proto, fields) in enumerate(found)]
    nodes = [node for node in nodes if node.kind not in _SKIPPED]
    read = {bottom for node in nodes for bottom in node.bottoms}
    inputs, batch = _inputs(net, [proto for proto, _ in found], read, size)
    xs = side_by_side(list(inputs.values()))
    blobs.update(zip(inputs, xs, strict=True))
    builder = Builder(Budget(len(prototxt) + len(caffemodel), limit), batch)
    outputs: dict[str, Tensor] = {}
    last_reader = {bottom: node for node in nodes for bottom in node.bottoms}
    for node in nodes:
        operator = node.operator()
        if operator is not _same and (node.layer_name in builder.layers or node.layer_name in (INPUT, "")):
            node.refuse(f"has a name that is taken or empty, {node.layer_name!r}; required: one that no other layer "
                        "has")
        with builder.at(node):
            made = operator(builder, node)
            is_unread = [last_reader.get(top, node).index <= node.index for top in node.tops]
            if isinstance(made, list):
                if any(is_unread):
                    node.refuse(f"has a top {node.tops[is_unread.index(True)]!r} that nothing reads; required: one "
                                "output. Remove it")
            elif all(is_unread):
                outputs[node.tops[0]] = made
        several = made if isinstance(made, list) else [made] * (len(node.tops) if node.kind == "split" else 1)
        blobs.update(zip(node.tops, several, strict=False))
    made = outputs[list(outputs)[chosen(output, list(outputs))]]
    named = {} if len(inputs) == 1 else {name: x.shape for name, x in inputs.items()}
    return Parsed(builder.leading_to(builder.scores(made)), xs[0].shape, "caffe", None, named)


def _unread_fields(text: str) -> dict[str, list[list[str]]]:
    """For each of the text's layers, under `layer` and `layers`, which of its fields are neither read nor IGNORED."""
    found: dict[str, list[list[str]]] = {"layer": [], "layers": []}
    stack: list[tuple[str, Any]] = [("", NetParameter.DESCRIPTOR)]  # messages that are open, and what they are called
    name, unread = "", list[str]()
    for token in _TOKEN.findall(_NO_FIELDS.sub(" ", text)):
        if token in "{<":
            described = stack[-1][1].fields_by_name.get(name) if stack[-1][1] is not None else None
            if len(stack) == 1 and name in found:
                unread = []
                found[name].append(unread)
            stack.append((name, None if described is None else described.message_type))
        elif token in "}>" and len(stack) > 1:
            name, _ = stack.pop()  # of the next one, in a list
        elif token not in "}>":
            name = token
            holder, described = stack[-1]
            is_known = described is None or name in described.fields_by_name or name in IGNORED
            if len(stack) > 1 and not is_known:
                unread.append(name if len(stack) == 2 else f"{holder}.{name}")
    return found


_NO_FIELDS = re.compile(r'''"(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])*'|#[^\n]*''')  # texts and comments
_TOKEN = re.compile(r"[{}<>]|[A-Za-z_]\w*(?=\s*[:{<])")  # braces, and names of fields


def _value(message: Any, field: str) -> str:
    """An enumeration's value as text."""
    return str(message.DESCRIPTOR.fields_by_name[field].enum_type.values_by_number[getattr(message, field)].name)


def _is_in_test_phase(proto: Any) -> bool:
    def holds(rule: Any) -> bool:
        return ((not rule.HasField("phase") or _value(rule, "phase") == "TEST") and not rule.stage
                and rule.min_level <= 0 and (not rule.HasField("max_level") or rule.max_level >= 0))

    return any(map(holds, proto.include)) if proto.include else not any(map(holds, proto.exclude))


def _inputs(net: Any, protos: Sequence[Any], read: Set[str], size: tuple[int, int] | None
            ) -> tuple[dict[str, Tensor], int]:
    """The network's inputs by name, each by itself, and how many there are at a time. read: blobs that layers read, for
    of several inputs only these count; size: of all that are images."""
    names, shapes = list(net.input), [list(shape.dim) for shape in net.input_shape]
    if net.input_dim:
        shapes = [list(net.input_dim[i:i + 4]) for i in range(0, len(net.input_dim), 4)]
    for proto in protos:
        if getattr(proto, "type", "") == "Input":
            names += proto.top
            shapes += [list(shape.dim) for shape in proto.input_param.shape]
    if not names or len(names) != len(shapes) or len(set(names)) < len(names):
        raise ConversionError(f"the network has {len(names)} inputs ({', '.join(map(repr, names[:5]))}) of "
                              f"{len(shapes)} shapes; required: one or more, each of a name of its own and with a "
                              "shape. A .prototxt for training has none: take the one for deployment")
    found, batches = dict[str, Tensor](), set[int]()
    for name, shape in [each for each in zip(names, shapes, strict=True) if each[0] in read] or [(names[0], shapes[0])]:
        own = size if len(names) == 1 or len(shape) == 4 else None
        if len(shape) not in (2, 4) or min(shape) < 1 or (len(shape) == 2 and own is not None):
            raise ConversionError(f"the input {name!r} has shape {shape}" + (f" and size {own} is given" if own else
                                  "") + "; required: (N, C, H, W), or (N, F) and no size")
        dims = [shape[1], *(own or shape[2:])]
        if math.prod(dims) > MAX_TENSOR_ELEMENTS:
            raise ConversionError(f"the input {name!r} has {math.prod(dims)} elements; at most {MAX_TENSOR_ELEMENTS} "
                                  "are accepted")
        found[name] = Tensor.whole(INPUT, layer_shape(dims), dims)
        batches.add(shape[0])
    if len(batches) > 1:
        raise ConversionError(f"the inputs have batches of {', '.join(map(str, sorted(batches)))}; required: one size")
    return found, batches.pop()


class Node(moves.Node):
    """A layer of the .prototxt with its weights, and the blobs made so far."""

    def __init__(self, proto: Any, unread: Sequence[str], index: int, count: int, weights: Sequence[Any],
                 blobs: dict[str, Tensor]) -> None:
        self._unread = unread
        self.proto, self.index, self.count, self._weights, self._blobs = proto, index, count, weights, blobs
        self.layer_name, self.bottoms, self.tops = str(proto.name), list(proto.bottom), list(proto.top)
        is_old = proto.DESCRIPTOR.name == "V1LayerParameter"
        self.type = _value(proto, "type") if is_old else str(proto.type)
        self.kind = self.type.replace("_", "").lower()  # INNER_PRODUCT and InnerProduct are the same
        if is_old and proto.HasField("layer"):
            self.refuse("is written as in Caffe's first version; required: a newer one. Caffe's upgrade_net_proto_text "
                        "makes it")

    def __str__(self) -> str:
        reads = ", ".join(map(repr, self.bottoms[:10])) or "nothing"
        return f"layer {self.layer_name!r} of type {self.type} (number {self.index + 1} of {self.count}, reads {reads})"

    def operator(self) -> Callable[[Builder, Node], Tensor | list[Tensor]]:
        found = next((function for name, function in OPERATORS.items() if name.lower() == self.kind), None)
        if found is None:
            is_data = self.kind.endswith("data")
            self.refuse("is a source of training data; required: a .prototxt for deployment" if is_data else
                        f"is not supported; supported: {', '.join(sorted(OPERATORS))}")
        if not self.tops:
            self.refuse("has no top")
        if self._unread:
            self.refuse_unread(self._unread[0])
        if getattr(self.proto, "phase", 1) != 1:
            self.refuse("has phase TRAIN; required: TEST")
        return found

    def tensor(self) -> Tensor:
        """The only bottom."""
        if len(self.bottoms) != 1:
            self.refuse(f"has {len(self.bottoms)} bottoms; required: one")
        return self.tensors()[0]

    def tensors(self) -> list[Tensor]:
        for name in self.bottoms:
            if name not in self._blobs:
                self.refuse(f"reads {name!r}, which no layer before it makes as its first top")
        if not self.bottoms:
            self.refuse("lacks its bottom 1")
        return [self._blobs[name] for name in self.bottoms]

    def weights(self, *shapes: tuple[int, ...]) -> list[Array]:
        """The layer's weights, one array for each of `shapes`."""
        if len(self._weights) != len(shapes):
            self.refuse(f"has {len(self._weights)} blobs of weights in the .caffemodel; required: {len(shapes)}")
        return [self._array(blob, shape) for blob, shape in zip(self._weights, shapes, strict=True)]

    def _array(self, blob: Any, shape: tuple[int, ...]) -> Array:
        # Old files pad every shape with ones to four axes.
        is_new = blob.HasField("shape")
        found = tuple(blob.shape.dim) if is_new else (blob.num, blob.channels, blob.height, blob.width)
        if [n for n in found if n != 1] != [n for n in shape if n != 1]:
            self.refuse(f"has weights of shape {found} in the .caffemodel; required: {shape}")
        data, dtype = (blob.double_data, "<f8") if blob.double_data else (blob.data, "<f4")
        content = b"".join(data)
        if len(content) != np.dtype(dtype).itemsize * math.prod(shape):
            self.refuse(f"has damaged weights in the .caffemodel: {len(content)} bytes for shape {shape}")
        return np.frombuffer(content, dtype).reshape(shape)

    def pair(self, parameter: Any, name: str, default: int = 0) -> tuple[int, int]:
        """Height and width: given apart, as one number for both, or as a list of one or two."""
        apart = [f"{name.removesuffix('_size')}_{side}" for side in "hw"]
        if apart[0] in parameter.DESCRIPTOR.fields_by_name and any(map(parameter.HasField, apart)):
            if self.is_given(parameter, name):
                self.refuse(f"has {name} and {apart[0]} or {apart[1]}; required: one of them")
            return getattr(parameter, apart[0]), getattr(parameter, apart[1])
        value = getattr(parameter, name)
        values = [value] if isinstance(value, int) else list(value) or [default]
        if len(values) > 2:
            self.refuse(f"has {name} {values}; required: two dimensions")
        return values[0], values[-1]

    @staticmethod
    def is_given(parameter: Any, *names: str) -> bool:
        return any(field.name in names for field, _ in parameter.ListFields())

    def require_axis(self, axis: int, what: str = "") -> None:
        if axis != 1:
            self.refuse(f"has axis {axis}; required: 1{what}")


def _convolution(b: Builder, node: Node) -> Tensor:
    """Convolution and Deconvolution."""
    x, p = node.tensor(), node.proto.convolution_param
    node.require_axis(p.axis)
    is_transposed, groups = node.kind == "deconvolution", max(p.group, 1)
    channels = (x.dims[0], p.num_output // groups) if is_transposed else (p.num_output, x.dims[0] // groups)
    shape = (*channels, *node.pair(p, "kernel_size"))
    weight, *rest = node.weights(shape, *[(p.num_output,)] * p.bias_term)
    bias, stride, dilation = rest[0] if rest else None, node.pair(p, "stride", 1), node.pair(p, "dilation", 1)
    if is_transposed:
        return b.conv_transpose(x, weight, bias, stride, node.pair(p, "pad") * 2, dilation, p.group, (0, 0))
    return b.conv(x, weight, bias, stride, node.pair(p, "pad") * 2, dilation, p.group)


def _inner_product(b: Builder, node: Node) -> Tensor:
    x, p = node.tensor(), node.proto.inner_product_param
    node.require_axis(p.axis)
    x = b.flatten(x, part="/flatten") if x.rank > 2 else x
    features, outputs = x.dims[0], p.num_output
    shape = (features, outputs) if p.transpose else (outputs, features)
    weight, *bias = node.weights(shape, *[(outputs,)] * p.bias_term)
    return b.dense(x, weight.T if p.transpose else weight, bias[0] if bias else None)


def _pooling(b: Builder, node: Node) -> Tensor:
    x, p = node.tensor(), node.proto.pooling_param
    method = _value(p, "pool")
    if method == "STOCHASTIC":
        node.refuse("pools at random; required: MAX or AVE")
    is_average = method == "AVE"
    if p.global_pooling:
        if any(field.name not in ("pool", "global_pooling", "round_mode") for field, _ in p.ListFields()):
            node.refuse("is global and has a kernel, a stride or pads; required: none")
        return b.reduce(x, "mean" if is_average else "max", range(2, 4), keep=True)
    return b.pool(x, is_average, node.pair(p, "kernel_size"), node.pair(p, "stride"), node.pair(p, "pad") * 2,
                  ceil_mode=_value(p, "round_mode") == "CEIL", include_pad=True)


def _lrn(b: Builder, node: Node) -> Tensor:
    p = node.proto.lrn_param
    within = _value(p, "norm_region") == "WITHIN_CHANNEL"
    if p.local_size % 2 == 0:
        node.refuse(f"has local_size {p.local_size}; required: an odd one")
    return b.local_response_norm(node.tensor(), size=p.local_size, alpha=p.alpha, beta=p.beta,
                                 bias=1.0 if within else p.k, within_channel=within)  # as Caffe does


def _concat(b: Builder, node: Node) -> Tensor:
    p = node.proto.concat_param
    if p.HasField("axis") and p.HasField("concat_dim"):
        node.refuse("has axis and concat_dim; required: one of them")
    node.require_axis(p.axis if p.HasField("axis") else p.concat_dim, ", the channels")
    return b.concat(node.tensors(), 1)


def _eltwise(b: Builder, node: Node) -> Tensor:
    p = node.proto.eltwise_param
    if _value(p, "operation") == "PROD" and len(node.bottoms) == 2:
        return patterns.as_tensor(b, patterns.times(b, *node.tensors()))
    if _value(p, "operation") != "SUM" or any(c != 1 for c in p.coeff) or len(node.bottoms) < 2:
        node.refuse(f"is a {_value(p, 'operation')} of {len(node.bottoms)} bottoms with coefficients {list(p.coeff)}; "
                    "required: a SUM of two or more, each once, or a PROD of two")
    return b.sum(node.tensors())


def _batch_norm(b: Builder, node: Node) -> Tensor:
    x, p = node.tensor(), node.proto.batch_norm_param
    if not p.use_global_stats:
        node.refuse("normalises by the batch; required: use_global_stats true, or not given")
    channels = x.dims[:1]
    mean, variance, weight = (array.astype(np.float64) for array in node.weights(channels, channels, (1,)))
    mean, variance = (sums / weight if weight else sums * 0 for sums in (mean, variance))  # kept as weighted sums
    return b.batch_norm(x, mean, variance, None, None, p.eps)


def _scale(b: Builder, node: Node) -> Tensor:
    x, p = node.tensor(), node.proto.scale_param
    if p.axis != 1 or p.num_axes != 1:
        node.refuse(f"has axis {p.axis} and num_axes {p.num_axes}; required: 1 and 1, a number for each channel")
    scale, *shift = node.weights(x.dims[:1], *[x.dims[:1]] * p.bias_term)
    return b.scale_channels(x, scale, shift[0] if shift else 0.0)


def _flatten(b: Builder, node: Node) -> Tensor:
    x, p = node.tensor(), getattr(node.proto, "flatten_param", None)  # the older layout has none
    if p is not None and (p.axis, p.end_axis) != (1, -1):
        node.refuse(f"has axis {p.axis} and end_axis {p.end_axis}; required: 1 and -1, all but the batch")
    return b.flatten(x)


def _softmax(b: Builder, node: Node) -> Tensor:
    node.require_axis(node.proto.softmax_param.axis, ", the classes")
    return b.softmax(node.tensor(), 1)


def _prelu(b: Builder, node: Node) -> Tensor:
    x, is_shared = node.tensor(), node.proto.prelu_param.channel_shared
    slope, = node.weights(() if is_shared else x.dims[:1])
    return b.prelu(x, slope.reshape(1, -1, *(1,) * (x.rank - 2)))


def _power(b: Builder, node: Node) -> Tensor:
    """(shift + scale * x) ** power."""
    x, p = node.tensor(), node.proto.power_param
    if (p.scale, p.shift) != (1, 0):
        x = b.affine(x, p.scale, p.shift, "" if p.power == 1 else "/scaled")
    return patterns.as_tensor(b, patterns.power(b, x, p.power))


def _permute(b: Builder, node: Node) -> Tensor:
    x, order = node.tensor(), list(node.proto.permute_param.order)
    return b.transpose(x, order + [axis for axis in range(x.rank) if axis not in order])


def _slice(b: Builder, node: Node) -> list[Tensor]:
    x, p = node.tensor(), node.proto.slice_param
    if p.HasField("axis") and p.HasField("slice_dim"):
        node.refuse("has axis and slice_dim; required: one of them")
    axis, points, count = p.axis if p.HasField("axis") else p.slice_dim, list(p.slice_point), len(node.tops)
    length = x.dims[b.own_axis(x, axis)]
    if (points and len(points) != count - 1) or (not points and length % count):
        node.refuse(f"has slice points {points} for {count} tops and a length of {length}; required: one less than "
                    "tops, or none and equal parts")
    ends = [0, *points, length] if points else range(0, length + 1, length // count)
    return b.split(x, axis, [after - before for before, after in itertools.pairwise(ends)])


def _reshape(b: Builder, node: Node) -> Tensor:
    x, p = node.tensor(), node.proto.reshape_param
    own, wanted = (b.batch, *x.dims), list(p.shape.dim)
    start = p.axis if p.axis >= 0 else x.rank + 1 + p.axis
    stop = x.rank if p.num_axes == -1 else start + p.num_axes
    if not 0 <= start <= stop <= x.rank or any(n == 0 and start + i >= x.rank for i, n in enumerate(wanted)):
        node.refuse(f"replaces axes {start} to {stop} of {x} by {wanted}; required: axes that there are")
    shape = [own[start + i] if n == 0 else n for i, n in enumerate(wanted)]
    return b.reshape(x, [*own[:start], *shape, *own[stop:]])


def _same(_: Builder, node: Node) -> Tensor:
    return node.tensor()


OPERATORS: dict[str, Callable[[Builder, Node], Tensor | list[Tensor]]] = {
    "BatchNorm": _batch_norm, "Concat": _concat, "Convolution": _convolution, "Deconvolution": _convolution,
    "Dropout": _same, "ELU": lambda b, node: b.activation(node.tensor(), "elu", alpha=node.proto.elu_param.alpha),
    "Eltwise": _eltwise, "Flatten": _flatten, "InnerProduct": _inner_product, "LRN": _lrn,
    "PReLU": _prelu, "Permute": _permute, "Pooling": _pooling, "Power": _power,
    "ReLU": lambda b, node: b.leaky_relu(node.tensor(), node.proto.relu_param.negative_slope),
    "Reshape": _reshape, "Scale": _scale, "Sigmoid": lambda b, node: b.activation(node.tensor(), "sigmoid"),
    "Slice": _slice, "Softmax": _softmax, "Split": _same,
    "TanH": lambda b, node: b.activation(node.tensor(), "tanh"),
}
_SKIPPED = {"input", "accuracy", "silence", "softmaxwithloss", "softmaxloss"}  # they make no output of the network
