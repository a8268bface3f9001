"""ONNX: every operator becomes the layer it should, and whatever else is refused with its name."""

import contextlib
import dataclasses
import itertools

import numpy as np
import pytest
from importing import converter_of_nodes, damaged, node, numbers, onnx_file, same

from fastdtd import graph as g
from fastdtd.errors import ConversionError, FastDTDError
from fastdtd.importers import convert

onnx = pytest.importorskip("onnx")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402  # after importorskip

from fastdtd.importers import onnx as onnx_importer  # noqa: E402  # after importorskip


@pytest.fixture
def convert_nodes(tmp_path):
    return converter_of_nodes(tmp_path)


POOL = node("GlobalAveragePool", ["t"], ["y"], name="pool")  # makes any image 't' an output
FLAT = [node("GlobalAveragePool", ["x"], ["p"], name="pool"), node("Flatten", ["p"], ["f"])]  # 'f': three features


@pytest.mark.parametrize(("auto_pad", "padding"), [
    ("NOTSET", (1, 0, 2, 1)), ("VALID", (0, 0, 0, 0)), ("SAME_UPPER", (0, 1, 1, 2)), ("SAME_LOWER", (1, 2, 0, 1)),
])
def test_conv(convert_nodes, auto_pad, padding):
    pads = {"pads": [1, 0, 2, 1]} if auto_pad == "NOTSET" else {}
    weight, bias = numbers(6, 1, 2, 4), numbers(6)
    graph = convert_nodes([node("Conv", ["x", "w", "b"], ["t"], name="c", group=3, strides=[2, 3] if pads else [1, 1],
                                auto_pad=auto_pad,
                                dilations=[2, 1] if pads else [1, 1], **pads), POOL], {"w": weight, "b": bias}).graph
    conv = graph.layers[0]
    assert (conv.name, conv.inputs, conv.groups, conv.padding) == ("c", ("input",), 3, padding)
    assert (conv.stride, conv.dilation) == (((2, 3), (2, 1)) if pads else ((1, 1), (1, 1)))
    same(conv.weight, weight)
    same(conv.bias, bias)
    if auto_pad.startswith("SAME"):
        assert graph.shapes["c"] == (6, 9, 8)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("raw", [True, False])
def test_constants_of_every_precision(convert_nodes, dtype, raw):
    weight = numbers(4, 3, 1, 1).astype(dtype)
    tensor = numpy_helper.from_array(weight, "w") if raw else helper.make_tensor(
        "w", helper.np_dtype_to_tensor_dtype(weight.dtype), weight.shape, weight.ravel())
    conv, _ = convert_nodes([node("Constant", [], ["w"], value=tensor), node("Identity", ["w"], ["v"]),
                             node("Conv", ["x", "v"], ["t"], name="c"), POOL]).graph
    same(conv.weight, weight.astype(np.float32))
    assert conv.bias is None


@pytest.mark.parametrize(("operator", "attributes", "expected"), [
    ("MaxPool", {"kernel_shape": [3, 2]}, ((3, 2), (1, 1), (0, 0, 0, 0), False)),
    ("MaxPool", {"kernel_shape": [3, 2], "strides": [2, 3], "pads": [1, 0, 2, 1], "ceil_mode": 1},
     ((3, 2), (2, 3), (1, 0, 2, 1), True)),
    ("MaxPool", {"kernel_shape": [2, 3], "strides": [2, 2], "auto_pad": "SAME_LOWER", "ceil_mode": 1},
     ((2, 3), (2, 2), (1, 1, 0, 0), False)),
    ("AveragePool", {"kernel_shape": [2, 2], "pads": [1, 1, 1, 1]}, ((2, 2), (1, 1), (1, 1, 1, 1), False, False)),
    ("AveragePool", {"kernel_shape": [2, 2], "pads": [1, 1, 1, 1], "count_include_pad": 1},
     ((2, 2), (1, 1), (1, 1, 1, 1), False, True)),
    ("AveragePool", {"kernel_shape": [2, 2], "auto_pad": "VALID", "ceil_mode": 1},
     ((2, 2), (1, 1), (0, 0, 0, 0), True, False)),
    ("GlobalMaxPool", {}, ((9, 8), (1, 1), (0, 0, 0, 0), False)),
])
def test_pools(convert_nodes, operator, attributes, expected):
    pool, _ = convert_nodes([node(operator, ["x"], ["t"], **attributes), POOL]).graph
    assert dataclasses.astuple(pool)[2:] == expected
    assert isinstance(pool, g.AveragePool2d if operator == "AveragePool" else g.MaxPool2d)


@pytest.mark.parametrize(("opset", "keepdims"), list(itertools.product([11, 18], [0, 1])))
def test_mean_over_the_image(convert_nodes, opset, keepdims):
    axes = {"axes": [2, -1]} if opset < 18 else {}
    nodes = [node("ReduceMean", ["x"] + ["a"] * (not axes), ["t"], keepdims=keepdims, **axes)]
    nodes += [node("Squeeze", ["t"], ["y"], axes=[2, 3]) if opset < 13 else node("Squeeze", ["t", "a"],
                                                                                 ["y"])] if keepdims else []
    pool, = convert_nodes(nodes, {} if axes else {"a": np.array([2, 3])}, opset=opset,
                          outputs=["y" if keepdims else "t"]).graph
    assert isinstance(pool, g.GlobalAveragePool)


@pytest.mark.parametrize("transposed", [0, 1])
def test_gemm_with_its_factors(convert_nodes, transposed):
    weight, bias = numbers(5, 3), numbers(1, 5)
    dense = convert_nodes([*FLAT, node("Gemm", ["f", "w", "b"], ["y"], name="d", alpha=0.5, beta=3.0,
                                       transB=transposed)],
                          {"w": weight if transposed else weight.T, "b": bias}).graph.layers[-1]
    same(dense.weight, np.float32(0.5) * weight)
    same(dense.bias, np.float32(3) * bias[0])


@pytest.mark.parametrize("shape", [(5,), (1, 5), (), (1,)])
def test_matmul_and_addition(convert_nodes, shape):
    weight, bias = numbers(3, 5), numbers(*shape)
    dense = convert_nodes([*FLAT, node("MatMul", ["f", "w"], ["m"], name="d"), node("Add", ["b", "m"], ["y"])],
                          {"w": weight, "b": bias}).graph.layers[-1]
    assert dense.name == "d"
    same(dense.weight, weight.T)
    same(dense.bias, np.broadcast_to(bias, (1, 5))[0])


def test_addition_joins_the_bias_of_a_convolution(convert_nodes):
    weight, bias, more = numbers(4, 3, 1, 1), numbers(4), numbers(4, 1, 1, seed=1)
    conv, _ = convert_nodes([node("Conv", ["x", "w", "b"], ["c"]), node("Add", ["c", "m"], ["t"]), POOL],
                            {"w": weight, "b": bias, "m": more}).graph
    same(conv.weight, weight)
    np.testing.assert_allclose(conv.bias, bias + more.ravel(), rtol=1e-6)


def test_batch_norm_is_folded(convert_nodes):
    weight, gamma, beta, mean, variance = numbers(4, 3, 1, 1), *(numbers(4, seed=i)
                                                                 for i in range(1, 4)), np.abs(numbers(4, seed=4))
    conv, _ = convert_nodes([node("Conv", ["x", "w"], ["c"]),
                             node("BatchNormalization", ["c", "g", "b", "m", "v"], ["t"], epsilon=0.125), POOL],
                            {"w": weight, "g": gamma, "b": beta, "m": mean, "v": variance}).graph
    scale = gamma / np.sqrt(variance + 0.125)
    np.testing.assert_allclose(conv.weight, weight * scale[:, None, None, None], rtol=1e-6)
    np.testing.assert_allclose(conv.bias, beta - mean * scale, rtol=1e-5, atol=1e-7)


def test_joins(convert_nodes):
    graph = convert_nodes([node("Relu", ["x"], ["r"], name="relu"), node("Add", ["x", "r"], ["a"], name="add"),
                           node("Sum", ["x", "r", "a"], ["s"], name="sum"), node("Sum", ["s"], ["s1"]),
                           node("Concat", ["s1", "x"], ["t"], name="both", axis=-3), POOL]).graph
    assert [(type(layer), layer.name, layer.inputs) for layer in graph] == [
        (g.ReLU, "relu", ("input",)), (g.Add, "add", ("input", "relu")), (g.Add, "sum/1", ("input", "relu")),
        (g.Add, "sum", ("sum/1", "add")), (g.Concat, "both", ("sum", "input")),
        (g.GlobalAveragePool, "pool", ("both",))]


@pytest.mark.parametrize("shape", [[0, -1], [-1, 216], ["N", 216], [1, -1]])
def test_flattening_by_reshape(convert_nodes, shape):
    batch = 5 if "N" in shape else "N"
    shape = [5 if n == "N" else n for n in shape]
    graph = convert_nodes([node("Reshape", ["x", "s"], ["f"], name="flat"),
                           node("Gemm", ["f", "w"], ["y"], name="dense")],
                          {"s": np.array(shape), "w": numbers(216, 2)}, (batch, 3, 9, 8)).graph
    assert [type(layer) for layer in graph] == [g.Flatten, g.Dense]


def test_weights_may_be_reshaped_and_transposed(convert_nodes):
    weight = numbers(5, 3, 9, 8)
    graph = convert_nodes([node("Flatten", ["x"], ["f"], axis=-3), node("Reshape", ["w", "s"], ["w2"]),
                           node("Transpose", ["w2"], ["w3"], perm=[1, 0]), node("MatMul", ["f", "w3"], ["y"])],
                          {"w": weight, "s": np.array([0, -1])}).graph
    same(graph.layers[-1].weight, weight.reshape(5, -1))


@pytest.mark.parametrize(("attributes", "bounds", "opset"), [
    ({"min": 0.0}, [], 10), ({"min": 0.0, "max": 3.4028234663852886e38}, [], 10), ({}, [0.0], 13),
    ({}, [0.0, np.inf], 13)])
def test_clip_from_zero_is_a_relu(convert_nodes, attributes, bounds, opset):
    names = ["low", "high"][:len(bounds)]
    relu, _ = convert_nodes([node("Clip", ["x", *names], ["t"], **attributes), POOL],
                            {name: np.float32(value) for name, value in zip(names, bounds, strict=True)},
                            opset=opset).graph
    assert isinstance(relu, g.ReLU)


@pytest.mark.parametrize(("inputs", "constants", "expected"), [
    (["x", "a", "b"], {"a": 0, "b": 6}, (0, 6)), (["x", "", "b"], {"b": 2}, (-np.inf, 2)),
    (["x", "a"], {"a": -1}, (-1, np.inf))])
def test_clip(convert_nodes, inputs, constants, expected):
    constants = {name: np.float32(value) for name, value in constants.items()}
    clip, _ = convert_nodes([node("Clip", inputs, ["t"]), POOL], constants).graph
    assert (clip.low, clip.high) == expected


def test_local_response_norm(convert_nodes):
    norm, _ = convert_nodes([node("LRN", ["x"], ["t"], size=5, alpha=2e-4, bias=2.0), POOL]).graph
    assert (norm.size, norm.alpha, norm.beta, norm.bias, norm.within_channel) == (5, pytest.approx(2e-4), 0.75, 2,
                                                                                  False)


@pytest.mark.parametrize(("op", "scale", "shift"), [("Add", 1, 2), ("Sub", 1, -2), ("Mul", 2, 0), ("Div", 0.5, 0)])
@pytest.mark.parametrize("shape", [(), (3, 1, 1), (1, 3, 1, 1)])
def test_arithmetic_with_constants(convert_nodes, op, scale, shift, shape):
    made, *_ = convert_nodes([node(op, ["x", "c"], ["r"]), node("Relu", ["r"], ["t"]), POOL],
                             {"c": np.full(shape, 2, np.float32)}).graph
    same(made.weight, np.full((3, 1, 1, 1), scale, np.float32))
    same(made.bias, np.full(3, shift, np.float32))
    assert made.groups == 3


def test_pad_joins_the_layer_behind_it(convert_nodes):
    pads = {"p": np.array([0, 0, 1, 2, 0, 0, 0, 1])}
    conv, _ = convert_nodes([node("Pad", ["x", "p"], ["q"]), node("Conv", ["q", "w"], ["t"], pads=[1, 1, 1, 1]), POOL],
                            {**pads, "w": numbers(2, 3, 4, 4)}).graph
    assert conv.padding == (2, 3, 1, 2)
    pool, _ = convert_nodes([node("Pad", ["x"], ["q"], pads=pads["p"]),
                             node("AveragePool", ["q"], ["t"], kernel_shape=[3, 3]), POOL],
                            opset=10).graph
    assert (pool.padding, pool.count_include_pad) == ((1, 2, 0, 1), True)


def test_dropout_identity_and_softmax_leave_no_layer(convert_nodes):
    nodes = [node("Dropout", ["x"], ["d"]), node("Identity", ["d"], ["t"]), POOL, node("Flatten", ["y"], ["f"])]
    for operator, axis in (("Softmax", 1), ("LogSoftmax", -1)):
        graph = convert_nodes([*nodes, node(operator, ["f"], ["z"], axis=axis)], outputs=["z"]).graph
        assert [layer.name for layer in graph] == ["pool"]


@pytest.mark.parametrize("outputs", [["scores", "probabilities"], ["probabilities", "scores"]])
def test_scores_beside_probabilities(convert_nodes, outputs):
    graph = convert_nodes([*FLAT, node("Relu", ["f"], ["unused"]), node("Gemm", ["f", "w"], ["scores"], name="d"),
                           node("Softmax", ["scores"], ["probabilities"])], {"w": numbers(3, 5)}, outputs=outputs).graph
    assert (graph.output, len(graph.layers)) == ("d", 2)


def test_names(convert_nodes):
    graph = convert_nodes([node("Relu", ["x"], ["b"], name="twice"), node("Relu", ["b"], ["c"], name="twice"),
                           node("Relu", ["c"], ["d"]), node("Relu", ["d"], ["one"], name="input"),
                           node("Relu", ["one"], ["e"], name="one"),
                           node("GlobalAveragePool", ["e"], ["y"])]).graph
    assert [layer.name for layer in graph] == ["b", "c", "d", "Relu3", "one", "y"]


def test_flat_input(convert_nodes):
    model = convert_nodes([node("Gemm", ["x", "w"], ["y"])], {"w": numbers(3, 5)}, shape=["N", 3])
    assert model.graph.input_shape == (3, 1, 1)
    assert model.preprocessing.color is None


@pytest.mark.parametrize(("size", "shape"), [(7, (3, 7, 7)), ((7, 6), (3, 7, 6)), ([np.int64(7), 6], (3, 7, 6))])
def test_size_replaces_the_files(convert_nodes, size, shape):
    for dims in (["N", 3, "H", "W"], ["N", 3, 9, 9]):
        graph = convert_nodes([node("Relu", ["x"], ["t"]), POOL], shape=dims, size=size).graph
        assert graph.input_shape == shape


@pytest.mark.parametrize(("channels", "box", "low", "high"), [
    (3, (-3, 2), [-3] * 3, [2] * 3),
    (3, [(-1, 1), (-2, 2), (-3, 3)], [-1, -2, -3], [1, 2, 3]),
    (3, ((-1, -2, -3), (1, 2, 3)), [-1, -2, -3], [1, 2, 3]),
    (3, (0, (1, 2, 3)), [0, 0, 0], [1, 2, 3]),
    (2, [(-1, 1), (-2, 2)], [-1, -2], [1, 2]),
])
def test_box(convert_nodes, channels, box, low, high):
    model = convert_nodes([node("Relu", ["x"], ["t"]), POOL], shape=["N", channels, 4, 4], box=box)
    np.testing.assert_array_equal(model.graph.box, [low, high])
    assert model.preprocessing.color == {2: None, 3: "rgb"}[channels]


def test_labels(convert_nodes, tmp_path):
    (tmp_path / "names.txt").write_bytes("\ufeffeins\r\nzwei, deux\r\n三\r\n\r\n".encode())
    for labels in (tmp_path / "names.txt", str(tmp_path / "names.txt"), ["eins", "zwei, deux", "三"]):
        assert convert_nodes([node("Relu", ["x"], ["t"]), POOL], labels=labels).classes == ("eins", "zwei, deux", "三")


RELU = [node("Relu", ["x"], ["t"]), POOL]


@pytest.mark.parametrize(("nodes", "constants", "message"), [
    ([node("Relu", ["x"], ["r"]), node("Softsign", ["r"], ["t"], name="norm"), POOL], {},
     r"net\.onnx: Softsign 'norm' \(node 2 of 3, reads 'r'\) is an operator that is not supported; nearest: Relu, "
     r"LeakyRelu or Clip; "
     r"supported: Abs, Add, .*, Where$"),
    ([node("Relu", ["x"], ["t"], domain="com.example"), POOL], {},
     "an operator of domain 'com.example' that is not supported"),
    ([node("Conv", ["x", "x"], ["t"]), POOL], {}, "computes its input 'x'; required: a constant"),
    ([node("Conv", ["x", "w"], ["t"]), POOL], {"w": numbers(4, 3, 3)}, r"weights of shape \(4, 3, 3\)"),
    ([node("Conv", ["x", "w"], ["t"], kernel_shape=[2, 2]), POOL], {"w": numbers(4, 3, 3, 3)}, "weights of shape"),
    ([node("Conv", ["x", "w"], ["t"], strides=[2]), POOL], {"w": numbers(4, 3, 3, 3)}, "two numbers from 1"),
    ([node("Conv", ["x", "w"], ["t"], strides=[0, 1]), POOL], {"w": numbers(4, 3, 3, 3)}, "two numbers from 1"),
    ([node("Conv", ["x", "w"], ["t"], strides=2), POOL], {"w": numbers(4, 3, 3, 3)},
     "has strides as attribute of type 2; required: ints"),
    ([node("Conv", ["x", "w"], ["t"], pads=[1, 1]), POOL], {"w": numbers(4, 3, 3, 3)}, "required: four"),
    ([node("Conv", ["x", "w"], ["t"], auto_pad="MIRROR"), POOL], {"w": numbers(4, 3, 3, 3)}, "auto_pad 'MIRROR'"),
    ([node("Conv", ["x", "w"], ["t"]), POOL], {"w": numbers(4, 5, 3, 3)}, "expects 5 input channels"),
    ([node("Conv", ["x", "w"], ["t"]), POOL], {"w": np.full((4, 3, 1, 1), np.nan, np.float32)}, "NaN or infinity"),
    ([node("Conv", ["x", "w"], ["t"]), POOL], {"w": np.zeros((4, 3, 1, 1), np.complex64)}, "element type 14"),
    ([node("Conv", ["x"], ["t"]), POOL], {}, "lacks its input 2"),
    ([node("MaxPool", ["x"], ["t"]), POOL], {}, "kernel_shape None"),
    ([node("MaxPool", ["x"], ["t"], kernel_shape=[2, 2], dilations=[2, 2]), POOL], {}, "has dilations"),
    ([node("MaxPool", ["x"], ["m", "t"], kernel_shape=[2, 2]), POOL], {}, "reads 't', which no node before it makes"),
    ([node("ReduceMean", ["x"], ["y"], axes=[0, 1])], {}, r"works along axis 0 of \(N, 3, 9, 8\), the batch"),
    ([node("ReduceMean", ["x"], ["y"])], {}, "over all axes, the batch too"),
    ([node("Gemm", ["x", "w"], ["y"])], {"w": numbers(3, 5)}, r"with 4 axes; required: \(N, F\)"),
    ([*FLAT, node("Gemm", ["f", "w"], ["y"], transA=1)], {"w": numbers(3, 5)}, "transA 0"),
    ([*FLAT, node("Gemm", ["f", "w", "b"], ["y"])], {"w": numbers(3, 5), "b": numbers(4)},
     r"shape \(4,\) for 5 channels"),
    ([*FLAT, node("MatMul", ["w", "f"], ["y"])], {"w": numbers(5, 3)}, "has a constant as input 'w'"),
    ([node("Conv", ["x", "w"], ["c"]), node("Add", ["c", "b"], ["t"]), POOL],
     {"w": numbers(4, 3, 1, 1), "b": numbers(4, 8, 9)},
     r"shape \(4, 8, 9\) for a tensor \(N, 4, 9, 8\)"),
    ([*FLAT, node("Add", ["p", "f"], ["y"])], {}, "tensors of one shape"),
    ([node("Concat", ["x", "x"], ["t"], axis=0), POOL], {}, "works along axis 0"),
    ([node("Concat", ["x", "x"], ["t"], axis=4), POOL], {}, "has axis 4 for a tensor of 4 axes"),
    ([node("Flatten", ["x"], ["y"], axis=2)], {}, "has axis 2"),
    ([node("Reshape", ["x", "s"], ["y"])], {"s": np.array([0, 5, -1])},
     r"makes \(1, 5, -1\) of \(N, 3, 9, 8\); required: a shape of as many"),
    ([node("Reshape", ["x", "s"], ["y"])], {"s": np.array([2, 108])}, "the batch left in front"),
    ([node("Squeeze", ["x", "a"], ["y"])], {"a": np.array([2, 3])},
     r"removes axes \(2, 3\) of \(N, 3, 9, 8\); required: axes of length 1"),
    ([node("Softmax", ["x"], ["t"], axis=-1), POOL], {}, "softmax 't' is not the last layer"),
    ([*FLAT, node("Softmax", ["f"], ["s"]), node("Gemm", ["s", "w"], ["y"])], {"w": numbers(3, 5)},
     "softmax only at the end"),
    ([node("BatchNormalization", ["x", "w", "w", "w", "w"], ["t"]), POOL], {"w": numbers(4)}, r"required: \(3,\)"),
    ([node("Clip", ["x", "a", "b"], ["t"]), POOL], {"a": np.float32(1), "b": np.float32(6)}, r"clips to \[1, 6\]"),
    ([node("Clip", ["x", "", "b"], ["t"]), POOL], {"b": np.float32(-1)}, r"clips to \[-inf, -1\]"),
    ([node("LRN", ["x"], ["t"], size=3, bias=0.0), POOL], {}, "bias 0; required: none negative"),
    ([node("LRN", ["x"], ["t"]), POOL], {}, "has size 0"),
    ([node("Relu", ["x"], ["r"]), node("Mul", ["x", "r"], ["t"]), POOL], {},
     r"Mul .* makes a function of each element that no layer has"),
    ([node("Div", ["a", "x"], ["t"]), POOL], {"a": np.float32(1)}, "divides by what is computed"),
    ([node("Div", ["x", "a"], ["t"]), POOL], {"a": np.float32(0)}, "by zero"),
    ([node("Dropout", ["x", "r", "m"], ["t"]), POOL], {"r": np.float32(0.5), "m": np.array(True)},
     "drops at inference"),
    ([node("Pad", ["x", "p", "v"], ["t"]), POOL], {"p": np.array([0, 0, 1, 1] * 2), "v": np.float32(1)},
     "something else than zeros"),
    ([node("Pad", ["x", "p"], ["t"], mode="wrap"), POOL], {"p": np.array([0, 0, 1, 1] * 2)},
     "required: constant zeros, reflect or edge"),
    ([node("Pad", ["x", "p"], ["t"]), POOL], {"p": np.array([1, 0, 1, 1] * 2)}, "and none for the batch"),
    ([node("Relu", ["y"], ["t"]), POOL], {}, "which no node before it makes"),
    ([node("Relu", ["x"], ["t"]), node("Relu", ["x"], ["t"]), POOL], {}, "two nodes make the tensor 't'"),
    ([node("Relu", ["x"], ["z"])], {}, "output 'y' is not computed"),
    ([], {}, "holds no network"),
])
def test_refused_operators(convert_nodes, nodes, constants, message):
    with pytest.raises(ConversionError, match=message):
        convert_nodes(nodes, constants)


@pytest.mark.parametrize(("arguments", "message"), [
    ({"shape": ["N", 3, "H", "W"]}, r"leaves its height and width open; give size=\(height, width\)"),
    ({"shape": ["N", "C", 4, 4]}, "leaves its number of channels open"),
    ({"shape": ["N", 3, 4, 4, 4]}, "has 5 axes"),
    ({"shape": ["N", 3], "size": 4}, "required: no size"),
    ({"size": (4, 4, 4)}, "size"), ({"size": 0}, "size 0 given"), ({"size": (3.5, 4)}, "size"),
    ({"size": "large"}, "size"),
    ({"opset": 6}, "opset 6; required: 7"),
    ({"box": (1, -1)}, "low below high"), ({"box": [(0, 1)] * 4}, "value box"), ({"box": 5}, "value box"),
    ({"box": "wide"}, "value box"),
    ({"box": (0, (1, 2))}, "value box"),
    ({"color": "gray"}, "has 1 channels"), ({"mean": [1, 2]}, "mean of shape"),
    ({"resize": "fold"}, "resize 'fold' is unknown"),
    ({"labels": ["one"]}, "names 1 classes but has 3 outputs"), ({"labels": "nowhere.txt"}, "no file 'nowhere.txt'"),
    ({"change": lambda model: model.graph.input.append(helper.make_tensor_value_info("x", TensorProto.FLOAT, [1]))},
     "each of a name of its own"),
])
def test_refused_files_and_options(convert_nodes, arguments, message):
    with pytest.raises(ConversionError, match=message):
        convert_nodes(RELU, **arguments)


def test_labels_that_are_no_text(convert_nodes, tmp_path):
    (tmp_path / "names.txt").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(ConversionError, match="no text"):
        convert_nodes(RELU, labels=tmp_path / "names.txt")


def test_weights_in_another_file_are_not_followed(convert_nodes, tmp_path):
    (tmp_path / "secret").write_bytes(numbers(4, 3, 1, 1).tobytes())

    def outside(model):
        tensor = model.graph.initializer[0]
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value="secret")

    with pytest.raises(ConversionError, match="has its constant 'w' in another file; required: weights inside"):
        convert_nodes([node("Conv", ["x", "w"], ["t"]), POOL], {"w": numbers(4, 3, 1, 1)}, change=outside)


def external(entries, location="net.onnx.data"):
    """A change that puts the first constant's bytes where `entries` say."""
    def change(model):
        tensor = model.graph.initializer[0]
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in {"location": location, **entries}.items():
            tensor.external_data.add(key=key, value=value)

    return change


@pytest.mark.parametrize("entries", [{}, {"offset": "0", "length": "48"}, {"offset": "16", "length": "48"}])
def test_weights_beside_the_file_as_pytorch_puts_them(convert_nodes, tmp_path, entries):
    weight = numbers(4, 3, 1, 1)
    (tmp_path / "net.onnx.data").write_bytes(bytes(int(entries.get("offset", 0))) + weight.tobytes())
    model = convert_nodes([node("Conv", ["x", "w"], ["t"]), POOL], {"w": weight}, change=external(entries))
    same(model.graph.layers[0].weight, weight)
    assert model.provenance["source"] == "net.onnx, net.onnx.data"


def test_weights_in_a_file_that_is_given(convert_nodes, tmp_path):
    weight = numbers(4, 3, 1, 1)
    (tmp_path / "weights.bin").write_bytes(weight.tobytes())
    model = convert_nodes([node("Conv", ["x", "w"], ["t"]), POOL], {"w": weight}, change=external({}, "weights.bin"),
                          weights=tmp_path / "weights.bin")
    same(model.graph.layers[0].weight, weight)


@pytest.mark.parametrize(("entries", "message"), [
    ({"offset": "8", "length": "48"}, "has 48 bytes from 8 on in 'net.onnx.data', which has 48"),
    ({"offset": "-8", "length": "48"}, "begins at '-8'"), ({"length": "1e3"}, "has length '1e3'"),
    ({"length": "9" * 30}, "has length"),
    ({"length": "40"}, "damaged constant 'w'"),
])
def test_damaged_places_of_weights(convert_nodes, tmp_path, entries, message):
    (tmp_path / "net.onnx.data").write_bytes(numbers(4, 3, 1, 1).tobytes())
    with pytest.raises(ConversionError, match=message):
        convert_nodes([node("Conv", ["x", "w"], ["t"]), POOL], {"w": numbers(4, 3, 1, 1)}, change=external(entries))


def test_bytes_beside_the_file_are_taken_once(convert_nodes, tmp_path):
    def twice(model):
        external({})(model)
        model.graph.initializer.append(model.graph.initializer[0])
        model.graph.initializer[1].name = "v"

    (tmp_path / "net.onnx.data").write_bytes(numbers(3, 3, 1, 1).tobytes())
    with pytest.raises(ConversionError, match="or others have the same"):
        convert_nodes([node("Conv", ["x", "w"], ["c"]), node("Conv", ["c", "v"], ["t"]), POOL],
                      {"w": numbers(3, 3, 1, 1)}, change=twice)


@pytest.mark.parametrize("dims", [[2**40, 2**40, 2, 2], [4, 3, 1, 2], [-1, 3, 1, 1], [2**62] * 4])
def test_a_shape_beyond_the_content_allocates_nothing(convert_nodes, dims):
    def grow(model):
        del model.graph.initializer[0].dims[:]
        model.graph.initializer[0].dims.extend(dims)

    with pytest.raises(ConversionError, match="damaged constant 'w'"):
        convert_nodes([node("Conv", ["x", "w"], ["t"]), POOL], {"w": numbers(4, 3, 1, 1)}, change=grow)


def test_shared_weights_do_not_grow_without_bound(convert_nodes):
    with pytest.raises(ConversionError, match=r"Conv 't' .* at most 700KiB are accepted"):
        convert_nodes([node("Conv", [source, "w"], [made], pads=[32] * 4) for source, made in ("xa", "ab", "bt")]
                      + [POOL], {"w": numbers(3, 3, 65, 65)}, max_constants="700KiB")


@pytest.mark.parametrize("content", [b"", b"garbage, not a model", bytes(1000), b"\x08\x08:\x7f"])
def test_garbage(tmp_path, content):
    (tmp_path / "net.onnx").write_bytes(content)
    with pytest.raises(ConversionError, match="no ONNX file"):
        convert(tmp_path / "net.onnx")


@pytest.mark.slow
def test_damaged_onnx_files_are_read_or_refused():
    content = onnx_file([
        node("Pad", ["x", "p"], ["q"]), node("Conv", ["q", "w", "b"], ["c"], strides=[2, 2], auto_pad="SAME_UPPER"),
        node("BatchNormalization", ["c", "b", "b", "b", "b"], ["n"]), node("Clip", ["n", "z"], ["r"]),
        node("MaxPool", ["r"], ["m"], kernel_shape=[2, 2], ceil_mode=1), node("Sum", ["m", "m"], ["s"]),
        node("Concat", ["s", "m"], ["k"], axis=1), node("ReduceMean", ["k"], ["g"], axes=[2, 3]),
        node("Reshape", ["g", "f"], ["h"]),
        node("Gemm", ["h", "d"], ["e"], alpha=0.5), node("Softmax", ["e"], ["y"]),
    ], {"p": np.array([0, 0, 1, 1] * 2), "w": numbers(4, 3, 3, 3), "b": np.abs(numbers(4)), "f": np.array([-1, 8]),
        "d": numbers(8, 2), "z": np.float32(0)})
    assert onnx_importer.parse(content).runtime.builder.ending.kind == "softmax"
    for data in damaged(content, 1000):
        with contextlib.suppress(FastDTDError):
            onnx_importer.parse(data)


@pytest.mark.parametrize("kind", [TensorProto.UINT8, TensorProto.INT64])
def test_whole_numbers_are_cast_before_they_are_computed_with(convert_nodes, kind):
    def change(model):
        model.graph.input[0].type.tensor_type.elem_type = kind

    rest = [node("GlobalAveragePool", ["f"], ["p"]), node("Flatten", ["p"], ["y"])]
    turn = node("Transpose", ["x"], ["t"], perm=[0, 1, 3, 2])
    cast = node("Cast", ["t"], ["f"], to=TensorProto.FLOAT)
    assert convert_nodes([turn, cast, *rest], change=change).graph
    for nodes in ([turn, node("Relu", ["t"], ["f"]), *rest],
                  [turn, node("Conv", ["t", "w"], ["f"]), *rest]):
        with pytest.raises(ConversionError, match="computes in the input's whole numbers; required: a Cast"):
            convert_nodes(nodes, {"w": numbers(2, 3, 1, 1)}, change=change)


@pytest.mark.parametrize("opset", [1001, 2**62])
def test_opsets_that_are_damage(convert_nodes, opset):
    def change(model):
        model.opset_import[0].version = opset

    with pytest.raises(ConversionError, match=f"damaged: written for ONNX opset {opset}; 28 is the newest"):
        convert_nodes([node("GlobalAveragePool", ["x"], ["p"]), node("Flatten", ["p"], ["y"])], change=change)


@pytest.mark.parametrize("kind", [TensorProto.STRING, TensorProto.COMPLEX64, 33, 1000])
def test_inputs_of_other_element_types(convert_nodes, kind):
    def change(model):
        model.graph.input[0].type.tensor_type.elem_type = kind

    with pytest.raises(ConversionError, match=f"the input 'x' has element type {kind}; required: floating-point"):
        convert_nodes([node("GlobalAveragePool", ["x"], ["p"]), node("Flatten", ["p"], ["y"])], change=change)
