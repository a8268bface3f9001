"""Importers: real networks come in whole, every operator becomes the layer it should, and whatever else is refused with its name."""

import contextlib
import dataclasses
import hashlib
import itertools
import sys
import warnings

import naive
import numpy as np
import pytest

from fastdtd import graph as g
from fastdtd.errors import ConversionError, FastDTDError
from fastdtd.explainer import Explainer
from fastdtd.importers import convert
from fastdtd.model import Model, Preprocessing

onnx = pytest.importorskip("onnx")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402  # after importorskip

from fastdtd.importers import caffe, network  # noqa: E402  # after importorskip
from fastdtd.importers import onnx as onnx_importer  # noqa: E402  # after importorskip


def numbers(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def of_type(graph, layer_type):
    return [layer for layer in graph if isinstance(layer, layer_type)]


def same(actual, expected):
    assert actual is expected is None or (actual.dtype == expected.dtype and np.array_equal(actual, expected))


# ---- Trained networks --------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def squeezenets(data):
    folder = data / "models" / "squeezenet_v1.1"
    options = {"color": "bgr", "mean": (104, 117, 123), "box": [(-104, 151), (-117, 138), (-123, 132)],
               "labels": data / "labels" / "synset_words.txt"}
    return (convert(folder / "squeezenet_v1.1.onnx", **options),
            convert(folder / "deploy.prototxt", folder / "squeezenet_v1.1.caffemodel", **options))


def test_squeezenet_is_the_same_from_onnx_and_caffe(squeezenets):
    from_onnx, from_caffe = (model.graph for model in squeezenets)
    assert from_onnx.shapes == from_caffe.shapes
    for a, b in zip(from_onnx, from_caffe, strict=True):
        assert type(a) is type(b)
        for field in dataclasses.fields(a):
            if field.name in a.arrays:
                same(getattr(a, field.name), getattr(b, field.name))
            else:
                assert getattr(a, field.name) == getattr(b, field.name)


def test_squeezenet_is_whole(squeezenets, data):
    for model in squeezenets:
        assert model.graph.input_shape == (3, 227, 227)
        assert model.graph.shapes[model.graph.output] == (1000, 1, 1)
        assert len(of_type(model.graph, g.Conv2d)) == 26
        assert all(pool.ceil_mode for pool in of_type(model.graph, g.MaxPool2d))
        np.testing.assert_array_equal(model.graph.box, [[-104, -117, -123], [151, 138, 132]])
        assert model.class_name(340) == "n02391049 zebra"
        assert model.preprocessing.color == "bgr"
        assert model.preprocessing.mean.ravel().tolist() == [104, 117, 123]
    folder = data / "models" / "squeezenet_v1.1"
    digests = [hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in ("deploy.prototxt", "squeezenet_v1.1.caffemodel")]
    assert squeezenets[0].provenance["format"] == "onnx opset 13 from assets"
    assert squeezenets[1].provenance == {"source": "deploy.prototxt, squeezenet_v1.1.caffemodel", "sha256": ", ".join(digests),
                                         "format": "caffe"}


def test_resnet_with_its_additions(data):
    graph = convert(data / "models" / "resnet20_cifar10" / "resnet20.onnx").graph
    assert graph.input_shape == (3, 32, 32)
    assert graph.shapes[graph.output] == (10, 1, 1)
    assert [len(of_type(graph, kind)) for kind in (g.Conv2d, g.Add, g.Dense)] == [21, 9, 1]
    assert graph.shapes["add88"] == (64, 8, 8)


def test_lenet_in_the_older_layout(data):
    folder = data / "models" / "lenet_mnist"
    model = convert(folder / "lenet.prototxt", folder / "lenet_iter_10000.caffemodel", scale=1 / 256)
    assert [type(layer) for layer in model.graph] == [g.Conv2d, g.MaxPool2d, g.Conv2d, g.MaxPool2d, g.Flatten, g.Dense, g.ReLU, g.Dense]
    assert model.graph.shapes == {"input": (1, 28, 28), "conv1": (20, 24, 24), "pool1": (20, 12, 12), "conv2": (50, 8, 8),
                                  "pool2": (50, 4, 4), "ip1/flatten": (800, 1, 1), "ip1": (500, 1, 1), "relu1": (500, 1, 1),
                                  "ip2": (10, 1, 1)}
    assert model.preprocessing.color == "gray"


def test_cifar10_full_with_normalisation_within_channels(data):
    """Scores in float64, kept beside the network, for pictures whose mean is taken off."""
    folder = data / "models" / "cifar10_full"
    graph = convert(folder / "cifar10_full.prototxt", folder / "cifar10_full_iter_70000.caffemodel").graph
    assert sum(isinstance(layer, g.LocalResponseNorm) and layer.within_channel for layer in graph) == 2
    reference = np.load(folder / "cifar10_full_ref64.npz")
    explainer = Explainer(Model(g.Graph(graph.layers, graph.input_shape, (-255, 255)), Preprocessing(None)))
    e = explainer(reference["x"])
    np.testing.assert_allclose(e.output, reference["logits"], atol=1e-4)
    explained = e.relevance.sum((1, 2, 3)) + sum(e.ledger.values())
    np.testing.assert_allclose(explained, e.explained, rtol=1e-5)
    assert e.relevance.min() >= 0


# ---- ONNX --------------------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def convert_nodes(tmp_path):
    """convert() of an ONNX file with the nodes and constants given; 'x' is the input and 'y', or what `outputs` says, the output."""
    def convert_nodes(nodes, constants=(), shape=("N", 3, 9, 8), opset=13, outputs=("y",), change=lambda model: None, **options):
        path = tmp_path / "net.onnx"
        path.write_bytes(onnx_file(nodes, constants, shape, opset, outputs, change))
        return convert(path, **options)

    return convert_nodes


def onnx_file(nodes, constants=(), shape=("N", 3, 9, 8), opset=13, outputs=("y",), change=lambda model: None):
    graph = helper.make_graph(
        nodes, "net", [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in dict(constants).items()])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])
    change(model)
    return model.SerializeToString()


node = helper.make_node
POOL = node("GlobalAveragePool", ["t"], ["y"], name="pool")  # makes any image 't' an output
FLAT = [node("GlobalAveragePool", ["x"], ["p"], name="pool"), node("Flatten", ["p"], ["f"])]  # 'f': three features


@pytest.mark.parametrize(("auto_pad", "padding"), [
    ("NOTSET", (1, 0, 2, 1)), ("VALID", (0, 0, 0, 0)), ("SAME_UPPER", (0, 1, 1, 2)), ("SAME_LOWER", (1, 2, 0, 1)),
])
def test_conv(convert_nodes, auto_pad, padding):
    pads = {"pads": [1, 0, 2, 1]} if auto_pad == "NOTSET" else {}
    weight, bias = numbers(6, 1, 2, 4), numbers(6)
    graph = convert_nodes([node("Conv", ["x", "w", "b"], ["t"], name="c", group=3, strides=[2, 3] if pads else [1, 1], auto_pad=auto_pad,
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
    ("MaxPool", {"kernel_shape": [3, 2], "strides": [2, 3], "pads": [1, 0, 2, 1], "ceil_mode": 1}, ((3, 2), (2, 3), (1, 0, 2, 1), True)),
    ("MaxPool", {"kernel_shape": [2, 3], "strides": [2, 2], "auto_pad": "SAME_LOWER", "ceil_mode": 1},
     ((2, 3), (2, 2), (1, 1, 0, 0), False)),
    ("AveragePool", {"kernel_shape": [2, 2], "pads": [1, 1, 1, 1]}, ((2, 2), (1, 1), (1, 1, 1, 1), False, False)),
    ("AveragePool", {"kernel_shape": [2, 2], "pads": [1, 1, 1, 1], "count_include_pad": 1}, ((2, 2), (1, 1), (1, 1, 1, 1), False, True)),
    ("AveragePool", {"kernel_shape": [2, 2], "auto_pad": "VALID", "ceil_mode": 1}, ((2, 2), (1, 1), (0, 0, 0, 0), True, False)),
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
    nodes += [node("Squeeze", ["t"], ["y"], axes=[2, 3]) if opset < 13 else node("Squeeze", ["t", "a"], ["y"])] if keepdims else []
    pool, = convert_nodes(nodes, {} if axes else {"a": np.array([2, 3])}, opset=opset, outputs=["y" if keepdims else "t"]).graph
    assert isinstance(pool, g.GlobalAveragePool)


@pytest.mark.parametrize("transposed", [0, 1])
def test_gemm_with_its_factors(convert_nodes, transposed):
    weight, bias = numbers(5, 3), numbers(1, 5)
    dense = convert_nodes([*FLAT, node("Gemm", ["f", "w", "b"], ["y"], name="d", alpha=0.5, beta=3.0, transB=transposed)],
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
    weight, gamma, beta, mean, variance = numbers(4, 3, 1, 1), *(numbers(4, seed=i) for i in range(1, 4)), np.abs(numbers(4, seed=4))
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
        (g.Add, "sum", ("sum/1", "add")), (g.Concat, "both", ("sum", "input")), (g.GlobalAveragePool, "pool", ("both",))]


@pytest.mark.parametrize("shape", [[0, -1], [-1, 216], ["N", 216], [1, -1]])
def test_flattening_by_reshape(convert_nodes, shape):
    batch = 5 if "N" in shape else "N"
    shape = [5 if n == "N" else n for n in shape]
    graph = convert_nodes([node("Reshape", ["x", "s"], ["f"], name="flat"), node("Gemm", ["f", "w"], ["y"], name="dense")],
                          {"s": np.array(shape), "w": numbers(216, 2)}, (batch, 3, 9, 8)).graph
    assert [type(layer) for layer in graph] == [g.Flatten, g.Dense]


def test_weights_may_be_reshaped_and_transposed(convert_nodes):
    weight = numbers(5, 3, 9, 8)
    graph = convert_nodes([node("Flatten", ["x"], ["f"], axis=-3), node("Reshape", ["w", "s"], ["w2"]),
                           node("Transpose", ["w2"], ["w3"], perm=[1, 0]), node("MatMul", ["f", "w3"], ["y"])],
                          {"w": weight, "s": np.array([0, -1])}).graph
    same(graph.layers[-1].weight, weight.reshape(5, -1))


@pytest.mark.parametrize(("attributes", "bounds", "opset"), [
    ({"min": 0.0}, [], 10), ({"min": 0.0, "max": 3.4028234663852886e38}, [], 10), ({}, [0.0], 13), ({}, [0.0, np.inf], 13)])
def test_clip_from_zero_is_a_relu(convert_nodes, attributes, bounds, opset):
    names = ["low", "high"][:len(bounds)]
    relu, _ = convert_nodes([node("Clip", ["x", *names], ["t"], **attributes), POOL],
                            {name: np.float32(value) for name, value in zip(names, bounds, strict=True)}, opset=opset).graph
    assert isinstance(relu, g.ReLU)


@pytest.mark.parametrize(("inputs", "constants", "expected"), [
    (["x", "a", "b"], {"a": 0, "b": 6}, (0, 6)), (["x", "", "b"], {"b": 2}, (-np.inf, 2)), (["x", "a"], {"a": -1}, (-1, np.inf))])
def test_clip(convert_nodes, inputs, constants, expected):
    constants = {name: np.float32(value) for name, value in constants.items()}
    clip, _ = convert_nodes([node("Clip", inputs, ["t"]), POOL], constants).graph
    assert (clip.low, clip.high) == expected


def test_local_response_norm(convert_nodes):
    norm, _ = convert_nodes([node("LRN", ["x"], ["t"], size=5, alpha=2e-4, bias=2.0), POOL]).graph
    assert (norm.size, norm.alpha, norm.beta, norm.bias, norm.within_channel) == (5, pytest.approx(2e-4), 0.75, 2, False)


@pytest.mark.parametrize(("op", "scale", "shift"), [("Add", 1, 2), ("Sub", 1, -2), ("Mul", 2, 0), ("Div", 0.5, 0)])
@pytest.mark.parametrize("shape", [(), (3, 1, 1), (1, 3, 1, 1)])
def test_arithmetic_with_constants(convert_nodes, op, scale, shift, shape):
    made, *_ = convert_nodes([node(op, ["x", "c"], ["r"]), node("Relu", ["r"], ["t"]), POOL], {"c": np.full(shape, 2, np.float32)}).graph
    same(made.weight, np.full((3, 1, 1, 1), scale, np.float32))
    same(made.bias, np.full(3, shift, np.float32))
    assert made.groups == 3


def test_pad_joins_the_layer_behind_it(convert_nodes):
    pads = {"p": np.array([0, 0, 1, 2, 0, 0, 0, 1])}
    conv, _ = convert_nodes([node("Pad", ["x", "p"], ["q"]), node("Conv", ["q", "w"], ["t"], pads=[1, 1, 1, 1]), POOL],
                            {**pads, "w": numbers(2, 3, 4, 4)}).graph
    assert conv.padding == (2, 3, 1, 2)
    pool, _ = convert_nodes([node("Pad", ["x"], ["q"], pads=pads["p"]), node("AveragePool", ["q"], ["t"], kernel_shape=[3, 3]), POOL],
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
                           node("Relu", ["c"], ["d"]), node("Relu", ["d"], ["one"], name="input"), node("Relu", ["one"], ["e"], name="one"),
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
    ([node("Relu", ["x"], ["r"]), node("Erf", ["r"], ["t"], name="norm"), POOL], {},
     r"net\.onnx: Erf 'norm' \(node 2 of 3, reads 'r'\) is an operator that is not supported; nearest: Relu, LeakyRelu or Clip; "
     r"supported: Abs, Add, .*, Upsample$"),
    ([node("Relu", ["x"], ["t"], domain="com.example"), POOL], {}, "an operator of domain 'com.example' that is not supported"),
    ([node("Conv", ["x", "x"], ["t"]), POOL], {}, "computes its input 'x'; required: a constant"),
    ([node("Conv", ["x", "w"], ["t"]), POOL], {"w": numbers(4, 3, 3)}, r"weights of shape \(4, 3, 3\)"),
    ([node("Conv", ["x", "w"], ["t"], kernel_shape=[2, 2]), POOL], {"w": numbers(4, 3, 3, 3)}, "weights of shape"),
    ([node("Conv", ["x", "w"], ["t"], strides=[2]), POOL], {"w": numbers(4, 3, 3, 3)}, "two numbers from 1"),
    ([node("Conv", ["x", "w"], ["t"], strides=[0, 1]), POOL], {"w": numbers(4, 3, 3, 3)}, "two numbers from 1"),
    ([node("Conv", ["x", "w"], ["t"], strides=2), POOL], {"w": numbers(4, 3, 3, 3)}, "attribute strides of a type"),
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
    ([*FLAT, node("Gemm", ["f", "w", "b"], ["y"])], {"w": numbers(3, 5), "b": numbers(4)}, r"shape \(4,\) for 5 channels"),
    ([*FLAT, node("MatMul", ["w", "f"], ["y"])], {"w": numbers(5, 3)}, "has the constant 'w' as input"),
    ([node("Conv", ["x", "w"], ["c"]), node("Add", ["c", "b"], ["t"]), POOL], {"w": numbers(4, 3, 1, 1), "b": numbers(4, 9, 8)},
     r"shape \(4, 9, 8\) for 4 channels"),
    ([*FLAT, node("Add", ["p", "f"], ["y"])], {}, "tensors of one shape"),
    ([node("Concat", ["x", "x"], ["t"], axis=0), POOL], {}, "works along axis 0"),
    ([node("Concat", ["x", "x"], ["t"], axis=4), POOL], {}, "has axis 4 for a tensor of 4 axes"),
    ([node("Flatten", ["x"], ["y"], axis=2)], {}, "has axis 2"),
    ([node("Reshape", ["x", "s"], ["y"])], {"s": np.array([0, 5, -1])},
     r"makes \(1, 5, -1\) of \(N, 3, 9, 8\); required: a shape of as many"),
    ([node("Reshape", ["x", "s"], ["y"])], {"s": np.array([2, 108])}, "the batch left in front"),
    ([node("Squeeze", ["x", "a"], ["y"])], {"a": np.array([2, 3])},
     r"removes axes \(2, 3\) of \(N, 3, 9, 8\); required: axes of length 1"),
    ([node("Softmax", ["x"], ["t"], axis=-1), POOL], {}, "has axis -1 over 4 axes"),
    ([*FLAT, node("Softmax", ["f"], ["s"]), node("Gemm", ["s", "w"], ["y"])], {"w": numbers(3, 5)}, "softmax only at the end"),
    ([node("BatchNormalization", ["x", "w", "w", "w", "w"], ["t"]), POOL], {"w": numbers(4)}, r"required: \(3,\)"),
    ([node("Clip", ["x", "a", "b"], ["t"]), POOL], {"a": np.float32(1), "b": np.float32(6)}, r"clips to \[1, 6\]"),
    ([node("Clip", ["x", "", "b"], ["t"]), POOL], {"b": np.float32(-1)}, r"clips to \[-inf, -1\]"),
    ([node("LRN", ["x"], ["t"], size=3, bias=0.0), POOL], {}, "bias 0; required: none negative"),
    ([node("LRN", ["x"], ["t"]), POOL], {}, "has size 0"),
    ([node("Relu", ["x"], ["r"]), node("Mul", ["x", "r"], ["t"]), POOL], {}, "multiplies two tensors"),
    ([node("Div", ["a", "x"], ["t"]), POOL], {"a": np.float32(1)}, "divides by what is computed"),
    ([node("Div", ["x", "a"], ["t"]), POOL], {"a": np.float32(0)}, "by zero"),
    ([node("Dropout", ["x", "r", "m"], ["t"]), POOL], {"r": np.float32(0.5), "m": np.array(True)}, "drops at inference"),
    ([node("Pad", ["x", "p", "v"], ["t"]), POOL], {"p": np.array([0, 0, 1, 1] * 2), "v": np.float32(1)}, "something else than zeros"),
    ([node("Pad", ["x", "p"], ["t"], mode="wrap"), POOL], {"p": np.array([0, 0, 1, 1] * 2)}, "required: constant zeros, reflect or edge"),
    ([node("Pad", ["x", "p"], ["t"]), POOL], {"p": np.array([1, 0, 1, 1] * 2)}, "required: none for the batch"),
    ([node("Relu", ["y"], ["t"]), POOL], {}, "which no node before it makes"),
    ([node("Relu", ["x"], ["t"]), node("Relu", ["x"], ["t"]), POOL], {}, "two nodes make the tensor 't'"),
    ([node("Relu", ["x"], ["z"])], {}, "output 'y' is not computed"),
    ([node("Relu", ["x"], ["y"])], {}, "output 'y' has shape"),
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
    ({"size": (4, 4, 4)}, "size"), ({"size": 0}, "size 0 given"), ({"size": (3.5, 4)}, "size"), ({"size": "large"}, "size"),
    ({"opset": 6}, "opset 6; required: 7"),
    ({"box": (1, -1)}, "low below high"), ({"box": [(0, 1)] * 4}, "value box"), ({"box": 5}, "value box"), ({"box": "wide"}, "value box"),
    ({"box": (0, (1, 2))}, "value box"),
    ({"color": "gray"}, "has 1 channels"), ({"mean": [1, 2]}, "mean of shape"), ({"resize": "fold"}, "resize 'fold' is unknown"),
    ({"labels": ["one"]}, "names 1 classes but has 3 outputs"), ({"labels": "nowhere.txt"}, "no file 'nowhere.txt'"),
    ({"change": lambda model: model.graph.input.append(helper.make_tensor_value_info("z", TensorProto.FLOAT, [1]))}, "has 2 inputs"),
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
    ({"offset": "-8", "length": "48"}, "begins at '-8'"), ({"length": "1e3"}, "has length '1e3'"), ({"length": "9" * 30}, "has length"),
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
        convert_nodes([node("Conv", ["x", "w"], ["c"]), node("Conv", ["c", "v"], ["t"]), POOL], {"w": numbers(3, 3, 1, 1)}, change=twice)


@pytest.mark.parametrize("dims", [[2**40, 2**40, 2, 2], [4, 3, 1, 2], [-1, 3, 1, 1], [2**62] * 4])
def test_a_shape_beyond_the_content_allocates_nothing(convert_nodes, dims):
    def grow(model):
        del model.graph.initializer[0].dims[:]
        model.graph.initializer[0].dims.extend(dims)

    with pytest.raises(ConversionError, match="damaged constant 'w'"):
        convert_nodes([node("Conv", ["x", "w"], ["t"]), POOL], {"w": numbers(4, 3, 1, 1)}, change=grow)


def test_shared_weights_do_not_grow_without_bound(convert_nodes, monkeypatch):
    monkeypatch.setattr(network, "MAX_WEIGHT_ELEMENTS", 20)
    with pytest.raises(ConversionError, match="beyond 20 weights"):
        convert_nodes([node("Conv", ["x", "w"], ["a"]), node("Conv", ["a", "w"], ["b"]), node("Conv", ["b", "w"], ["t"]), POOL],
                      {"w": numbers(3, 3, 1, 1)})


@pytest.mark.parametrize("content", [b"", b"garbage, not a model", bytes(1000), b"\x08\x08:\x7f"])
def test_garbage(tmp_path, content):
    (tmp_path / "net.onnx").write_bytes(content)
    with pytest.raises(ConversionError, match="no ONNX file"):
        convert(tmp_path / "net.onnx")


def test_kinds_of_files(tmp_path):
    for name in ("net.onnx", "net.prototxt", "net.caffemodel", "net.keras", "net.h5", "net.hdf5", "net.pt"):
        (tmp_path / name).write_bytes(b"")
    for arguments, message in [
        (["missing.onnx"], "no file"), (["net.pt"], "would run code"), (["net.keras"], "neither a zip nor an HDF5 file"),
        (["net.h5"], "neither a zip nor an HDF5 file"), (["net.hdf5"], "neither a zip nor an HDF5 file"),
        (["net.keras", "net.h5"], "no second file"),
        (["net.caffemodel"], "the .prototxt first"),
        (["net.onnx", "net.caffemodel"], "no ONNX file"), (["net.prototxt"], "required: the .caffemodel"),
        (["net.prototxt", "missing.caffemodel"], "no file"), ([""], "none of the kinds"),
    ]:
        with pytest.raises(ConversionError, match=message):
            convert(*(tmp_path / name for name in arguments))


def test_a_file_that_is_too_large_is_not_read(tmp_path):
    with open(tmp_path / "net.onnx", "wb") as file:
        file.truncate(2**31 + 1)
    with pytest.raises(ConversionError, match="at most 2147483648 are accepted"):
        convert(tmp_path / "net.onnx")


@pytest.mark.parametrize(("package", "name", "extra"), [("onnx", "net.onnx", "onnx"), ("google.protobuf", "net.prototxt", "caffe")])
def test_a_missing_package_names_its_extra(tmp_path, monkeypatch, package, name, extra):
    for module in (f"fastdtd.importers.{extra}", package):
        monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.delattr(f"fastdtd.importers.{extra}", raising=False)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConversionError, match=rf"pip install 'fastdtd\[{extra}\]'"):
        convert(tmp_path / name, *[tmp_path / "net.caffemodel"] * (extra == "caffe"))


def damaged(content, count):
    """`content` with some bytes changed, lost or repeated, `count` times."""
    rng = np.random.default_rng(0)
    for _ in range(count):
        data = bytearray(content)
        for _ in range(rng.integers(1, 4)):
            place, what = int(rng.integers(len(data))), rng.integers(4)
            if what == 0:
                data[place] = int(rng.integers(256))
            elif what == 1:
                del data[place:place + int(rng.integers(1, 9))]
            elif what == 2:
                data[place:place] = data[place:place + int(rng.integers(1, 30))]
            else:
                del data[-place // 8 - 1:]
        yield bytes(data)


def test_damaged_onnx_files_are_read_or_refused():
    content = onnx_file([
        node("Pad", ["x", "p"], ["q"]), node("Conv", ["q", "w", "b"], ["c"], strides=[2, 2], auto_pad="SAME_UPPER"),
        node("BatchNormalization", ["c", "b", "b", "b", "b"], ["n"]), node("Clip", ["n"], ["r"], min=0.0),
        node("MaxPool", ["r"], ["m"], kernel_shape=[2, 2], ceil_mode=1), node("Sum", ["m", "m"], ["s"]),
        node("Concat", ["s", "m"], ["k"], axis=1), node("ReduceMean", ["k"], ["g"], axes=[2, 3]), node("Reshape", ["g", "f"], ["h"]),
        node("Gemm", ["h", "d"], ["e"], alpha=0.5), node("Softmax", ["e"], ["y"]),
    ], {"p": np.array([0, 0, 1, 1] * 2), "w": numbers(4, 3, 3, 3), "b": np.abs(numbers(4)), "f": np.array([-1, 8]), "d": numbers(8, 2)})
    assert isinstance(onnx_importer.parse(content)[0][-1], g.Softmax)
    for data in damaged(content, 1000):
        with contextlib.suppress(FastDTDError):
            onnx_importer.parse(data)


# ---- What exporters write around the layers ----------------------------------------------------------------------------------------------


def ints(*values):
    return np.array(values, np.int64)


def scores(graph, batch):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of scores that are not positive
        return Explainer(Model(graph, Preprocessing(None)))(batch, 0).output


SHAPE = [node("Shape", ["x"], ["shape"])]
BATCH = [*SHAPE, node("Gather", ["shape", "zero"], ["n"], axis=0), node("Unsqueeze", ["n", "zeros"], ["n1"])]
SCALARS = {"zero": np.int64(0), "zeros": ints(0), "one": np.int64(1), "minus": ints(-1), "two": np.int64(2)}


@pytest.mark.parametrize("nodes", [
    [*BATCH, node("Concat", ["n1", "minus"], ["s"], axis=0)],
    [*SHAPE, node("Slice", ["shape", "zeros", "first"], ["n1"]), node("Concat", ["n1", "minus"], ["s"], axis=0)],
    [*SHAPE, node("Slice", ["shape", "first", "end"], ["rest"]), node("ReduceProd", ["rest"], ["f"], keepdims=1),
     node("Concat", ["minus", "f"], ["s"], axis=0)],
    [node("Shape", ["x"], ["rest"], start=1), node("Cast", ["rest"], ["r"], to=1), node("ReduceProd", ["r"], ["f"], keepdims=1),
     node("Floor", ["f"], ["g"]), node("Cast", ["g"], ["h"], to=7), node("Concat", ["minus", "h"], ["s"], axis=0)],
    [*BATCH, node("Size", ["x"], ["all"]), node("Div", ["all", "n"], ["f"]), node("Unsqueeze", ["f", "zeros"], ["f1"]),
     node("Concat", ["n1", "f1"], ["s"], axis=0)],
    [*SHAPE, node("Split", ["shape"], ["n1", "c", "h", "v"], axis=0), node("Mul", ["c", "h"], ["ch"]), node("Mul", ["ch", "v"], ["f"]),
     node("Where", ["yes", "n1", "f"], ["m"]), node("Max", ["m", "first"], ["o"]), node("Concat", ["o", "f"], ["s"], axis=0)],
    [node("ConstantOfShape", ["first"], ["ones"], value=numpy_helper.from_array(ints(-1))), *BATCH,
     node("Concat", ["n1", "ones"], ["s"], axis=0)],
    [node("Range", ["zero", "two", "one"], ["r"]), node("Sub", ["r", "one"], ["q"]), node("Neg", ["q"], ["p"]),
     node("Equal", ["p", "zero"], ["e"]), node("Not", ["e"], ["e1"]), node("Where", ["e1", "p", "features"], ["s"])],
])
@pytest.mark.parametrize("batch", ["N", 4])
def test_flattening_by_arithmetic_on_shapes(convert_nodes, nodes, batch):
    if batch == 4 and nodes[0].op_type == "Range":
        batch = 1  # it writes the batch as a number
    constants = {**SCALARS, "first": ints(1), "end": ints(4), "yes": np.array(True), "features": ints(216), "w": numbers(216, 2)}
    graph = convert_nodes([*nodes, node("Reshape", ["x", "s"], ["flat"]), node("Gemm", ["flat", "w"], ["y"])], constants, (batch, 3, 9, 8),
                          15).graph
    assert [type(layer) for layer in graph] == [g.Flatten, g.Dense]


@pytest.mark.parametrize("condition", [True, False])
def test_the_branch_that_a_constant_chooses(convert_nodes, condition):
    branches = [helper.make_graph([node("Constant", [], ["axes"], value=numpy_helper.from_array(ints(2, 3))),
                                   node("Squeeze", ["p", "axes"], ["squeezed"])], "a",
                                  [], [helper.make_tensor_value_info("squeezed", TensorProto.FLOAT, None)]),
                helper.make_graph([node("Identity", ["p"], ["same"])], "b", [],
                                  [helper.make_tensor_value_info("same", TensorProto.FLOAT, None)])]
    nodes = [node("GlobalAveragePool", ["x"], ["p"], name="pool"), node("Shape", ["p"], ["s"]), node("Gather", ["s", "at"], ["n"]),
             node("Equal", ["n", "one"], ["is_one"]), node("If", ["is_one"], ["i"], then_branch=branches[0], else_branch=branches[1]),
             node("Flatten", ["i"], ["f"]), node("Gemm", ["f", "w"], ["y"])]
    graph = convert_nodes(nodes, {**SCALARS, "at": np.int64(2 if condition else 1), "w": numbers(3, 2)}).graph
    assert [type(layer) for layer in graph] == [g.GlobalAveragePool, g.Dense]


def normalised(size=5, *, pad="p5", pool=None, by="x"):
    """Local response normalisation as PyTorch's exporters write it."""
    return [node("Mul", [by, by], ["squares"]), node("Reshape", ["squares", "s5"], ["r"]), node("Pad", ["r", pad], ["p"]),
            node("AveragePool", ["p"], ["a"], kernel_shape=pool or [size, 1, 1], count_include_pad=1),
            node("Squeeze", ["a", "axis"], ["q"]), node("Reshape", ["q", "s4"], ["m"]), node("Mul", ["m", "alpha"], ["n"]),
            node("Add", ["n", "k"], ["o"]), node("Pow", ["o", "beta"], ["d"]), node("Div", ["x", "d"], ["t"]), POOL]


NORM = {"s5": ints(0, 1, 3, 9, -1), "s4": ints(0, 3, 9, -1), "p5": ints(0, 0, 2, 0, 0, 0, 0, 2, 0, 0), "axis": ints(1),
        "alpha": np.float32(1e-2), "k": np.float32(2), "beta": np.float32(0.6), "off": ints(0, 0, 1, 0, 0, 0, 0, 3, 0, 0),
        "even": ints(0, 0, 2, 0, 0, 0, 0, 1, 0, 0)}


def test_local_response_norm_as_pytorch_writes_it(convert_nodes):
    norm, _ = convert_nodes(normalised(), NORM).graph
    assert (norm.size, norm.alpha, norm.beta, norm.bias) == (5, pytest.approx(1e-2), pytest.approx(0.6), 2)


@pytest.mark.parametrize(("nodes", "message"), [
    (normalised(pad="off"), r"AveragePool 'a' .* is no part of a local response normalisation"),
    (normalised(3), "is no part of a local response normalisation"),
    (normalised(4, pad="even"), "over 4 channels; required: an odd number"),
    (normalised(pool=[5, 2, 1]), "is no part of a local response normalisation"),
    ([node("Relu", ["x"], ["x2"]), *normalised(by="x2")], "divides by squares; required: a local response normalisation"),
    ([*normalised()[:6], node("Relu", ["m"], ["t"]), POOL], "reads a part of a local response normalisation; required: all of one"),
])
def test_what_is_no_local_response_norm(convert_nodes, nodes, message):
    with pytest.raises(ConversionError, match=message):
        convert_nodes(nodes, NORM)


def test_squares_alone(convert_nodes):
    power, _ = convert_nodes([node("Mul", ["x", "x"], ["s"]), node("Relu", ["s"], ["t"]), POOL]).graph.layers[:2]
    assert power.exponent == 2


def test_transposes_that_cancel_leave_no_layer(convert_nodes):
    """A convolution as tf2onnx writes it, between what is channels last; the input too."""
    to, back = {"perm": [0, 3, 1, 2]}, {"perm": [0, 2, 3, 1]}
    nodes = [node("Sub", ["x", "mean"], ["m"]), node("Transpose", ["m"], ["a"], **to), node("Conv", ["a", "w"], ["b"], name="conv"),
             node("Transpose", ["b"], ["c"], **back), node("Add", ["c", "bias"], ["d"]), node("Relu", ["d"], ["e"], name="relu"),
             node("Transpose", ["e"], ["f"], **to), node("MaxPool", ["f"], ["h"], kernel_shape=[2, 2], name="pool"),
             node("Transpose", ["h"], ["i"], **back), node("ReduceMean", ["i"], ["y"], axes=[1, 2], keepdims=0, name="mean")]
    constants = {"mean": numbers(3), "w": numbers(4, 3, 3, 3), "bias": numbers(4)}
    model = convert_nodes(nodes, constants, ("N", 9, 8, 3))
    assert [layer.name for layer in model.graph] == ["conv", "relu", "pool", "mean"]
    assert model.graph.input_shape == (3, 9, 8)
    assert model.preprocessing.color == "rgb"
    np.testing.assert_allclose(model.graph.layers[0].bias, constants["bias"] - np.einsum("kcij,c->k", constants["w"], constants["mean"]),
                               rtol=1e-4, atol=1e-5)


def test_a_transpose_before_a_flatten_is_kept(convert_nodes):
    weight = numbers(216, 2)
    graph = convert_nodes([node("Transpose", ["x"], ["t"], perm=[0, 2, 3, 1]), node("Reshape", ["t", "s"], ["f"]),
                           node("MatMul", ["f", "w"], ["y"])], {"s": ints(-1, 216), "w": weight}).graph
    assert [type(layer) for layer in graph] == [g.Rearrange, g.Dense]
    batch = numbers(2, 3, 9, 8)
    np.testing.assert_allclose(scores(graph, batch), batch.transpose(0, 2, 3, 1).reshape(2, -1) @ weight, rtol=1e-4, atol=1e-5)


X = numbers(2, 4, 6, 5)


@pytest.mark.parametrize(("nodes", "constants", "expected", "layers"), [
    ([node("Reshape", ["x", "s"], ["a"]), node("Transpose", ["a"], ["b"], perm=[0, 2, 1, 3, 4]), node("Reshape", ["b", "r"], ["t"])],
     {"s": ints(0, 2, 2, 6, 5), "r": ints(0, 4, 6, 5)}, X[:, [0, 2, 1, 3]], 1),
    ([node("Slice", ["x", "a", "b", "c", "d"], ["t"])], {"a": ints(1, -2), "b": ints(4, -100), "c": ints(1, -1), "d": ints(1, -2)},
     X[:, 1:4, :, -2::-2], 1),
    ([node("Split", ["x", "s"], ["a", "b"], axis=1), node("Concat", ["b", "a"], ["t"], axis=1)], {"s": ints(1, 3)}, X[:, [1, 2, 3, 0]], 1),
    ([node("Split", ["x"], ["a", "b"], axis=2), node("Relu", ["a"], ["c"]), node("Concat", ["b", "c"], ["t"], axis=2)], {},
     np.concatenate([X[:, :, 3:], np.maximum(X[:, :, :3], 0)], 2), None),
    ([node("Gather", ["x", "i"], ["t"], axis=-1)], {"i": ints(3, -1, 0)}, X[..., [3, 4, 0]], 1),
    ([node("Gather", ["x", "i"], ["a"], axis=2), node("Unsqueeze", ["a", "u"], ["t"])], {"i": np.int64(-2), "u": ints(3)},
     X[:, :, 4, :, None], 1),
    ([node("DepthToSpace", ["x"], ["t"], blocksize=2)], {},
     X.reshape(2, 2, 2, 1, 6, 5).transpose(0, 3, 4, 1, 5, 2).reshape(2, 1, 12, 10), 1),
    ([node("DepthToSpace", ["x"], ["t"], blocksize=2, mode="CRD")], {},
     X.reshape(2, 1, 2, 2, 6, 5).transpose(0, 1, 4, 2, 5, 3).reshape(2, 1, 12, 10), 1),
    ([node("DepthToSpace", ["x"], ["a"], blocksize=2), node("SpaceToDepth", ["a"], ["t"], blocksize=2)], {}, X, 0),
    ([node("Resize", ["x", "", "f"], ["t"], coordinate_transformation_mode="asymmetric", nearest_mode="floor")],
     {"f": np.float32([1, 1, 2, 3])}, X.repeat(2, 2).repeat(3, 3), 1),
    ([node("Resize", ["x", "", "", "s"], ["t"])], {"s": ints(1, 4, 12, 10)}, X.repeat(2, 2).repeat(2, 3), 1),
    ([node("Pad", ["x", "p"], ["q"]), node("Relu", ["q"], ["r"]), node("MaxPool", ["r"], ["t"], kernel_shape=[1, 1])],
     {"p": ints(0, 1, 0, 2, 0, 0, -1, 1)}, np.pad(np.maximum(X, 0)[:, :, :-1], ((0, 0), (1, 0), (0, 0), (2, 1))), None),
    ([node("Pad", ["x", "p"], ["t"], mode="reflect")], {"p": ints(0, 0, 1, 2, 0, 0, 0, 1)},
     np.pad(X, ((0, 0), (0, 0), (1, 0), (2, 1)), "reflect"), 1),
    ([node("Tile", ["x", "n"], ["t"])], {"n": ints(1, 1, 2, 1)}, np.tile(X, (1, 1, 2, 1)), 1),
    ([node("LeakyRelu", ["x"], ["t"], alpha=0.25)], {}, np.where(X > 0, X, X / 4), 1),
    ([node("PRelu", ["x", "s"], ["t"])], {"s": np.full((4, 1, 1), 0.5, np.float32)}, np.where(X > 0, X, X / 2), 1),
    ([node("PRelu", ["x", "s"], ["t"])], {"s": np.float32([[[0.5]], [[0]], [[-1]], [[2]]])},
     np.where(X > 0, X, X * np.float32([0.5, 0, -1, 2])[:, None, None]), None),
    ([node("LpPool", ["x"], ["t"], kernel_shape=[2, 1], p=2)], {}, np.sqrt(X[:, :, 1:]**2 + X[:, :, :-1]**2), 3),
    ([node("GlobalLpPool", ["x"], ["t"], p=4)], {}, (X**4).sum((2, 3), keepdims=True)**0.25, 3),
    ([node("Max", ["x", "z"], ["a"]), node("Min", ["c", "a"], ["t"])], {"z": np.float32(0), "c": np.float32(0.5)}, X.clip(0, 0.5), 2),
    ([node("Cast", ["low"], ["l"], to=1), node("Clip", ["x", "l", "h"], ["t"])], {"low": ints(-1), "h": np.float32(0.5)},
     X.clip(-1, 0.5), 1),
    ([node("Relu", ["x"], ["a"]), node("Sub", ["a", "x"], ["b"]), node("Sub", ["c", "b"], ["t"])], {"c": np.float32(2)},
     2 - (np.maximum(X, 0) - X), None),
    ([node("ReduceMax", ["x"], ["t"], axes=[-2, -1])], {}, X.max((2, 3), keepdims=True), 1),
    ([node("ReduceSum", ["x", "a"], ["t"])], {"a": ints(1)}, X.sum(1, keepdims=True), None),
    ([node("Relu", ["x"], ["r"]), node("Mean", ["x", "r"], ["t"])], {}, (X + np.maximum(X, 0)) / 2, None),
])
def test_what_moves_numbers_and_more(convert_nodes, nodes, constants, expected, layers):
    """layers: how many are made, but for the two that make it an output."""
    weight = numbers(expected[0].size, 3, seed=7)
    graph = convert_nodes([*nodes, node("Flatten", ["t"], ["flat"]), node("MatMul", ["flat", "w"], ["y"])], {**constants, "w": weight},
                          ("N", *X.shape[1:])).graph
    np.testing.assert_allclose(scores(graph, X), expected.reshape(2, -1).astype(np.float64) @ weight, rtol=1e-4, atol=1e-4)
    if layers is not None:
        assert sum(not isinstance(layer, (g.Flatten, g.Dense)) for layer in graph) == layers


@pytest.mark.parametrize(("attributes", "size"), [
    ({}, (13, 16)), ({"pads": [1, 0, 2, 1]}, (10, 15)), ({"auto_pad": "SAME_UPPER"}, (12, 15)), ({"auto_pad": "VALID"}, (13, 16)),
    ({"output_padding": [1, 2]}, (14, 18)), ({"output_shape": [12, 14]}, (12, 14)),
])
def test_transposed_convolution(convert_nodes, attributes, size):
    graph = convert_nodes([node("ConvTranspose", ["x", "w", "b"], ["t"], strides=[2, 3], **attributes), node("Relu", ["t"], ["r"]),
                           node("Flatten", ["r"], ["f"]), node("Gemm", ["f", "d"], ["y"])],
                          {"w": numbers(4, 2, 3, 4), "b": numbers(2), "d": numbers(2 * size[0] * size[1], 1)}, ("N", 4, 6, 5)).graph
    assert of_type(graph, g.Rearrange)[0].index.size == 2 * size[0] * size[1]


def test_one_spatial_axis(convert_nodes):
    weight, x = numbers(3, 2, 4), numbers(2, 2, 9)
    model = convert_nodes([node("Conv", ["x", "w"], ["c"], pads=[1, 2], strides=[2]), node("MaxPool", ["c"], ["m"], kernel_shape=[2]),
                           node("AveragePool", ["m"], ["t"], kernel_shape=[2], pads=[1, 0], count_include_pad=1),
                           node("Flatten", ["t"], ["y"])], {"w": weight}, ("N", 2, 9))
    assert model.graph.input_shape == (2, 1, 9)
    assert [layer.kernel for layer in of_type(model.graph, g.Pool2d)] == [(1, 2), (1, 2)]
    padded = np.pad(x, ((0, 0), (0, 0), (1, 2)))
    made = np.stack([np.einsum("ncl,kcl->nk", padded[:, :, i:i + 4], weight) for i in range(0, 9, 2)], 2)
    pooled = np.pad(np.maximum(made[:, :, 1:], made[:, :, :-1]), ((0, 0), (0, 0), (1, 0)))
    np.testing.assert_allclose(scores(model.graph, x[:, :, None]), ((pooled[:, :, 1:] + pooled[:, :, :-1]) / 2).reshape(2, -1), rtol=1e-4,
                               atol=1e-5)


@pytest.mark.parametrize("opset", [9, 10, 11, 13, 18, 21])
def test_inputs_that_were_attributes(convert_nodes, opset):
    """The same network in the words of each opset."""
    def words(op, inputs, output, values, first, **attributes):
        """Integers as attributes before opset `first`, as inputs from then on."""
        if opset < first:
            return node(op, inputs, [output], **{name: list(map(int, np.ravel(value))) for name, value in values.items()}, **attributes)
        constants.update({f"{output}_{name}": value for name, value in values.items()})
        return node(op, [*inputs, *(f"{output}_{name}" for name in values)], [output], **attributes)

    constants = {"f": np.float32([1, 1, 2, 2])}
    nodes = [words("Pad", ["x"], "p", {"pads": ints(0, 0, 1, 0, 0, 0, 0, 1)}, 11),
             words("Slice", ["p"], "s", {"starts": ints(1), "ends": ints(3), "axes": ints(1)}, 10),
             words("Unsqueeze", ["s"], "u", {"axes": ints(1)}, 13), words("Squeeze", ["u"], "q", {"axes": ints(1)}, 13),
             node("Upsample", ["q", "f"], ["t"]) if opset == 9 else node("Resize", ["q", "f"] if opset < 11 else ["q", "", "f"], ["t"]),
             words("Split", ["t"], "v", {"split": ints(2)}, 13, axis=1),
             words("ReduceMean", ["v"], "y", {"axes": ints(2, 3)}, 18, keepdims=0)]
    graph = convert_nodes(nodes, constants, ("N", 4, 6, 5), opset).graph
    np.testing.assert_allclose(scores(graph, X), np.pad(X[:, 1:3], ((0, 0), (0, 0), (1, 0), (0, 1))).mean((2, 3)), rtol=1e-4, atol=1e-6)


HUGE = ints(2**20, 2**20)


def branch(*nodes):
    return helper.make_graph(list(nodes), "branch", [], [helper.make_tensor_value_info("o", TensorProto.FLOAT, None)])


def nested(depth):
    """A branch within a branch, `depth` deep, that ends in what is its own."""
    inner = branch(node("Relu", ["o"], ["o"]))
    for _ in range(depth):
        inner = branch(node("If", ["yes"], ["o"], then_branch=inner, else_branch=branch()))
    return inner


YES = {"yes": np.array(True)}


@pytest.mark.parametrize(("nodes", "constants", "message"), [
    ([node("ConstantOfShape", ["s"], ["c"]), node("Add", ["x", "c"], ["t"]), POOL], {"s": HUGE},
     "makes a constant of 1099511627776 numbers"),
    ([node("ConstantOfShape", ["s"], ["c"]), node("Add", ["x", "c"], ["t"]), POOL], {"s": ints(-1)}, r"a shape \[-1\]"),
    ([node("ConstantOfShape", ["s"], ["c"]), node("Add", ["x", "c"], ["t"]), POOL], {"s": ints(*[1] * 40)},
     "at most 32 integers"),
    ([node("Range", ["a", "b", "c"], ["r"]), node("Add", ["x", "r"], ["t"]), POOL],
     {"a": np.int64(0), "b": np.int64(2**62), "c": np.int64(1)},
     "makes a constant of 4611686018427387904 numbers"),
    ([node("Range", ["a", "b", "c"], ["r"]), node("Add", ["x", "r"], ["t"]), POOL], {"a": np.int64(0), "b": np.int64(5), "c": np.int64(0)},
     "Range 'r' .* cannot be computed from constants of shapes"),
    ([node("Range", ["a", "b", "c"], ["r"]), node("Add", ["x", "r"], ["t"]), POOL],
     {"a": np.float32(0), "b": np.float32(np.inf), "c": np.float32(1)}, "cannot be computed"),
    ([node("Expand", ["a", "s"], ["c"]), node("Add", ["x", "c"], ["t"]), POOL], {"a": np.float32(1), "s": HUGE}, "makes a constant of"),
    ([node("Expand", ["a", "s"], ["c"]), node("Add", ["x", "c"], ["t"]), POOL], {"a": np.float32(1), "s": ints(2**62, 2**62, 2**62)},
     "broadcast dimensions too large"),
    ([node("Tile", ["a", "s"], ["c"]), node("Add", ["x", "c"], ["t"]), POOL], {"a": numbers(2, 2), "s": HUGE}, "makes a constant of"),
    ([node("Expand", ["x", "s"], ["t"]), POOL], {"s": ints(1, 3, 2**31, 8)}, "required: axes of length 1"),
    ([node("Tile", ["x", "s"], ["t"]), POOL], {"s": ints(1, 2**20, 2**20, 1)}, "moves 237494511599616 numbers"),
    ([node("Pad", ["x", "s"], ["t"]), POOL], {"s": ints(0, 0, 2**40, 0, 0, 0, 0, 0)}, "moves .* numbers; at most"),
    ([node("Resize", ["x", "", "f"], ["t"]), POOL], {"f": np.float32([1, 1, 1e6, 1e6])}, "makes .* of .N, 3, 9, 8."),
    ([node("Resize", ["x", "", "f"], ["t"]), POOL], {"f": np.float32([1, 1, np.nan, 1])}, "required: numbers above 0"),
    ([node("Resize", ["x", "", "f"], ["t"], mode="linear"), POOL], {"f": np.float32([1, 1, 2, 2])}, "required: nearest"),
    ([node("Gather", ["s", "i"], ["c"]), node("Reshape", ["x", "c"], ["t"]), POOL], {"s": ints(1, 216), "i": ints(0, 2)},
     "Gather 'c' .* cannot be computed .* places 0 to 2 of an axis of length 2"),
    ([node("Gather", ["s", "i"], ["c"]), node("Reshape", ["x", "c"], ["t"]), POOL], {"s": ints(1, 216), "i": ints(-3)}, "places -3 to -3"),
    ([node("Gather", ["s", "i"], ["c"], axis=7), node("Reshape", ["x", "c"], ["t"]), POOL], {"s": ints(1, 216), "i": ints(0)}, "cannot be"),
    ([node("Gather", ["x", "i"], ["t"], axis=1), POOL], {"i": ints(3)}, "takes numbers 3 to 3 of an axis of length 3"),
    ([node("Gather", ["x", "i"], ["t"], axis=1), POOL], {"i": np.zeros((2**12, 2**12), np.int64)}, "moves .* numbers; at most"),
    ([node("Gather", ["x", "i"], ["t"], axis=0), POOL], {"i": ints(0)}, "works along axis 0"),
    ([node("Gather", ["x", "i"], ["t"], axis=1), POOL], {"i": np.zeros(0, np.int64)}, "leaves nothing"),
    ([node("Reshape", ["x", "s"], ["t"]), POOL], {"s": ints(1, 2**32, 2**32, 216)}, "required: a shape of as many numbers"),
    ([node("Reshape", ["x", "s"], ["t"]), POOL], {"s": ints(-1, -1)}, "required: a shape of as many numbers"),
    ([node("Reshape", ["x", "s"], ["t"]), POOL], {"s": ints(1, 3, 9, 8, 0)}, "no 0 for an axis that there is not"),
    ([node("Reshape", ["x", "s"], ["t"]), POOL], {"s": np.ones(100, np.int64)}, "at most 32 integers"),
    ([node("Reshape", ["x", "s"], ["t"]), POOL], {"s": np.float32([1, 216])}, "at most 32 integers"),
    ([node("Unsqueeze", ["x", "s"], ["t"]), POOL], {"s": ints(0)}, "none before the batch"),
    ([node("Unsqueeze", ["x", "s"], ["t"]), POOL], {"s": ints(9)}, "has axis 9 for a tensor of 5 axes"),
    ([node("Squeeze", ["x"], ["t"]), POOL], {}, "the batch too; required: axes"),
    ([node("Transpose", ["x"], ["t"]), POOL], {}, r"moves the batch, \(3, 2, 1, 0\)"),
    ([node("Transpose", ["x"], ["t"], perm=[0, 1, 1, 3]), POOL], {}, "has the order"),
    ([node("Slice", ["x", "a", "a", "a"], ["t"]), POOL], {"a": ints(1)}, "leaves nothing"),
    ([node("Slice", ["x", "a", "b", "c"], ["t"]), POOL], {"a": ints(0), "b": ints(0), "c": ints(0)}, "takes a part of the batch"),
    ([node("Slice", ["x", "a", "b", "c"], ["t"]), POOL], {"a": ints(0), "b": ints(1, 2), "c": ints(1)}, "of different lengths"),
    ([node("Slice", ["x", "a", "b", "c", "d"], ["t"]), POOL], {"a": ints(0), "b": ints(1), "c": ints(1), "d": ints(0)},
     "a step other than 0"),
    ([node("Split", ["x", "s"], ["t", "u"], axis=1), POOL], {"s": ints(1, 1)}, "required: sizes from 1 that add up"),
    ([node("Split", ["x"], ["t"], axis=1, num_outputs=2**40), POOL], {}, "splits into 1099511627776 parts"),
    ([node("DepthToSpace", ["x"], ["t"], blocksize=2), POOL], {}, "required: one that divides it"),
    ([node("DepthToSpace", ["x"], ["t"], blocksize=0), POOL], {}, "has blocksize 0"),
    ([node("Mod", ["s", "z"], ["c"]), node("Reshape", ["x", "c"], ["t"]), POOL], {"s": ints(1), "z": ints(0)}, "divided by zero"),
    ([node("Div", ["s", "z"], ["c"]), node("Reshape", ["x", "c"], ["t"]), POOL], {"s": ints(1), "z": ints(0)}, "divided by zero"),
    ([node("Concat", ["s", ""], ["c"], axis=0), node("Reshape", ["x", "c"], ["t"]), POOL], {"s": ints(1)}, "lacks one of its inputs"),
    ([node("Where", ["s"], ["c"]), node("Reshape", ["x", "c"], ["t"]), POOL], {"s": ints(1)}, "lacks one of its inputs; required: 3"),
    ([node("Cast", ["s"], ["c"], to=8), node("Reshape", ["x", "c"], ["t"]), POOL], {"s": ints(1)}, "casts to element type 8"),
    ([node("Cast", ["x"], ["t"], to=7), POOL], {}, "casts what is computed to element type 7"),
    ([node("Floor", ["x"], ["t"]), POOL], {}, "Floor 't' .* reads what is computed; required: constants"),
    ([node("If", ["yes"], ["t"], then_branch=branch(node("Relu", ["o"], ["o"])), else_branch=branch()), POOL],
     YES, "reads 'o', which no node"),
    ([node("If", ["yes"], ["t"], then_branch=branch(node("Identity", ["t"], ["o"])), else_branch=branch()), POOL],
     YES, "reads 't', which no"),
    ([node("If", ["yes"], ["t"], then_branch=nested(15), else_branch=branch()), POOL], YES, "reads 'o', which no node"),
    ([node("If", ["yes"], ["t"], then_branch=branch(), else_branch=branch()), POOL], YES, "a branch that does not make all outputs"),
    ([node("If", ["yes"], ["t"], then_branch=branch()), POOL], {"yes": np.array(False)}, "has no else_branch"),
    ([node("If", ["x"], ["t"], then_branch=branch(), else_branch=branch()), POOL], {}, "computes its input 'x'; required: a constant"),
    ([node("Loop", ["yes"], ["t"], body=branch()), POOL], YES, "not supported; nearest: If with a constant condition"),
    ([node("Pow", ["x", "e"], ["t"]), POOL], {"e": np.float32(3)}, "raises to 3 what can be negative; required: an even power"),
    ([node("ConvTranspose", ["x", "w"], ["t"], strides=[2**20, 1]), POOL], {"w": numbers(3, 2, 2, 2)}, "required: strides from 1 to 256"),
    ([node("ConvTranspose", ["x", "w"], ["t"], dilations=[2**30, 2**30]), POOL], {"w": numbers(3, 2, 2, 2)}, "brings the network beyond"),
    ([node("ConvTranspose", ["x", "w", "b"], ["t"]), POOL], {"w": numbers(3, 2, 2, 2), "b": numbers(3)}, r"and bias \(2,\)"),
    ([node("ConvTranspose", ["x", "w"], ["t"], pads=[100] * 4), POOL], {"w": numbers(3, 2, 2, 2)}, "leaves nothing"),
    ([node("ConvTranspose", ["x", "w"], ["t"], output_padding=[2**40, 0]), POOL], {"w": numbers(3, 2, 2, 2)}, "moves .* numbers; at most"),
    ([node("LpPool", ["x"], ["t"], kernel_shape=[2**20, 2**20]), POOL], {}, "brings the network beyond"),
    ([node("Max", ["x", "x"], ["t"]), POOL], {}, "compares tensors that are computed"),
    ([node("PRelu", ["x", "s"], ["t"]), POOL], {"s": np.float32(3)}, "slope 3; required: 0 to 1"),
    ([node("Mul", ["x", "w"], ["t"]), POOL], {"w": numbers(1, 1, 9, 8)}, r"has a constant of shape \(1, 1, 9, 8\) for 3 channels"),
])
def test_hostile_and_unsupported_arithmetic(convert_nodes, nodes, constants, message):
    with pytest.raises(ConversionError, match=message):
        convert_nodes(nodes, constants)


def test_constants_that_double_and_double(convert_nodes):
    nodes = [node("Concat", [f"c{i}", f"c{i}"], [f"c{i + 1}"], axis=0) for i in range(60)]
    with pytest.raises(ConversionError, match="larger than is accepted for a file of this size"):
        convert_nodes([*nodes, node("Add", ["x", "c60"], ["t"]), POOL], {"c0": numbers(1024)})


def test_tensors_moved_again_and_again(convert_nodes, monkeypatch):
    monkeypatch.setattr(network, "MAX_MOVED", 10_000)
    nodes = [node("Transpose", [f"c{i}"], [f"c{i + 1}"], perm=[0, 1, 3, 2]) for i in range(60)]
    with pytest.raises(ConversionError, match="at most 10000 are accepted in all of a network"):
        convert_nodes([node("Relu", ["x"], ["c0"]), *nodes, node("Relu", ["c60"], ["t"]), POOL])


# ---- Caffe -------------------------------------------------------------------------------------------------------------------------------


INPUT = 'input: "x" input_shape { dim: 10 dim: 3 dim: 9 dim: 8 } '


def caffemodel(weights, old=False):
    """A .caffemodel from {layer name: arrays}; old: in the layout of 2014, every shape with four axes."""
    net = caffe.NetParameter()
    for name, arrays in weights.items():
        layer = (net.layers if old else net.layer).add(name=name)
        for array in arrays:
            blob = layer.blobs.add(data=[array.astype("<f4").tobytes()])
            if old:
                blob.num, blob.channels, blob.height, blob.width = (1,) * (4 - array.ndim) + array.shape
            else:
                blob.shape.dim.extend(array.shape)
    return net.SerializeToString()


@pytest.fixture
def convert_text(tmp_path):
    """convert() of a .prototxt with the text given, and a .caffemodel with the weights given."""
    def convert_text(text, weights=None, old=False, head=INPUT, **options):
        (tmp_path / "net.prototxt").write_text(head + text)
        (tmp_path / "net.caffemodel").write_bytes(caffemodel(weights or {"unused": [numbers(1)]}, old))
        return convert(tmp_path / "net.prototxt", tmp_path / "net.caffemodel", **options)

    return convert_text


def layer(name, kind, bottom="x", top=None, more=""):
    bottoms = " ".join(f'bottom: "{name}"' for name in bottom.split())
    return f'layer {{ name: "{name}" type: "{kind}" {bottoms} top: "{top or name}" {more} }}\n'


GLOBAL = layer("pool", "Pooling", "t", "pool", "pooling_param { pool: AVE global_pooling: true }")


@pytest.mark.parametrize(("parameters", "kernel", "expected"), [
    ("kernel_size: 3", (3, 3), ((1, 1), (0, 0, 0, 0), (1, 1))),
    ("kernel_h: 2 kernel_w: 3 pad_h: 1 pad_w: 2 stride_h: 2 stride_w: 3", (2, 3), ((2, 3), (1, 2, 1, 2), (1, 1))),
    ("kernel_size: 2 kernel_size: 3 pad: 1 pad: 2 stride: 2 stride: 3 dilation: 1 dilation: 2", (2, 3), ((2, 3), (1, 2, 1, 2), (1, 2))),
    ("kernel_size: 3 pad: 1 stride: 2 dilation: 2", (3, 3), ((2, 2), (1, 1, 1, 1), (2, 2))),
])
@pytest.mark.parametrize("bias", [True, False])
def test_caffe_convolution(convert_text, parameters, kernel, expected, bias):
    weights = [numbers(6, 1, *kernel)] + [numbers(6, seed=1)] * bias
    conv, _ = convert_text(layer("c", "Convolution", "x", "t", f"convolution_param {{ num_output: 6 group: 3 {parameters} "
                                                               f"bias_term: {str(bias).lower()} }}") + GLOBAL, {"c": weights}).graph
    assert ((conv.stride, conv.padding, conv.dilation), conv.groups) == (expected, 3)
    same(conv.weight, weights[0])
    same(conv.bias, weights[1] if bias else None)


def test_caffe_leaky_relu(convert_text):
    leaky, _ = convert_text(layer("r", "ReLU", "x", "t", "relu_param { negative_slope: 0.125 }") + GLOBAL, {}).graph
    assert (type(leaky), leaky.slope) == (g.LeakyReLU, 0.125)


@pytest.mark.parametrize(("parameters", "kernel", "stride", "pad", "dilation"), [
    ("kernel_size: 2 stride: 2", (2, 2), (2, 2), (0, 0), (1, 1)), ("kernel_size: 3", (3, 3), (1, 1), (0, 0), (1, 1)),
    ("kernel_h: 4 kernel_w: 3 stride_h: 3 stride_w: 2 pad_h: 2 pad_w: 1 dilation: 2", (4, 3), (3, 2), (2, 1), (2, 2)),
])
def test_caffe_deconvolution(convert_text, parameters, kernel, stride, pad, dilation):
    """Each number of the input adds the kernel, times itself, to the output."""
    weight, bias = numbers(3, 2, *kernel), numbers(6, seed=1)
    graph = convert_text(layer("d", "Deconvolution", "x", "t", f"convolution_param {{ num_output: 6 group: 3 {parameters} }}") + GLOBAL,
                         {"d": [weight.reshape(3, 2, *kernel), bias]}).graph
    picture = numbers(3, 9, 8, seed=2)
    sizes = [(n - 1) * stride[i] + dilation[i] * (kernel[i] - 1) + 1 for i, n in enumerate(picture.shape[1:])]
    expected = np.zeros((6, *sizes))
    for c, y, x, k, i, j in np.ndindex(3, 9, 8, 2, *kernel):
        expected[2 * c + k, y * stride[0] + i * dilation[0], x * stride[1] + j * dilation[1]] += weight[c, k, i, j] * picture[c, y, x]
    expected = expected[:, pad[0]:sizes[0] - pad[0], pad[1]:sizes[1] - pad[1]] + bias[:, None, None]
    assert graph.shapes["d"] == expected.shape
    np.testing.assert_allclose(naive.forward(graph, picture)["d"].reshape(expected.shape), expected, atol=1e-5)


@pytest.mark.parametrize("transpose", [False, True])
def test_caffe_inner_product_is_flattened_for(convert_text, transpose):
    weight = numbers(2, 216)
    text = layer("d", "InnerProduct", more=f"inner_product_param {{ num_output: 2 bias_term: false transpose: {str(transpose).lower()} }}")
    flatten, dense = convert_text(text, {"d": [weight.T if transpose else weight]}).graph
    assert (flatten.name, dense.name) == ("d/flatten", "d")
    same(dense.weight, weight)


@pytest.mark.parametrize(("parameters", "expected"), [
    ("kernel_size: 3 stride: 2", g.MaxPool2d("p", ("input",), (3, 3), (2, 2), ceil_mode=True)),
    ("pool: MAX kernel_size: 3 stride: 2 round_mode: FLOOR", g.MaxPool2d("p", ("input",), (3, 3), (2, 2))),
    ("pool: AVE kernel_h: 3 kernel_w: 2 pad_h: 1 pad_w: 0",
     g.AveragePool2d("p", ("input",), (3, 2), (1, 1), (1, 0, 1, 0), ceil_mode=True, count_include_pad=True)),
    ("pool: AVE kernel_size: 3 pad: 1 stride_h: 2 stride_w: 3",
     g.AveragePool2d("p", ("input",), (3, 3), (2, 3), (1, 1, 1, 1), ceil_mode=True, count_include_pad=True)),
    ("pool: AVE global_pooling: true", g.GlobalAveragePool("p", ("input",))),
    ("pool: MAX global_pooling: true", g.MaxPool2d("p", ("input",), (9, 8))),
])
def test_caffe_pools(convert_text, parameters, expected):
    pool, *_ = convert_text(layer("p", "Pooling", "x", "t", f"pooling_param {{ {parameters} }}") + GLOBAL).graph
    assert type(pool) is type(expected)
    assert dataclasses.astuple(pool) == dataclasses.astuple(expected)


def test_caffe_joins_and_layers_in_place(convert_text):
    text = (layer("r", "ReLU", "x", "x") + layer("s", "Split", "x", 'a" top: "b') + layer("e", "Eltwise", "x a b")
            + layer("d", "Dropout", "e", "e") + layer("r2", "ReLU", "e", "e")
            + layer("k", "Concat", "e a", "t", "concat_param { concat_dim: 1 }") + GLOBAL
            + layer("f", "Flatten", "pool") + layer("prob", "Softmax", "f") + layer("accuracy", "Accuracy", "f label"))
    graph = convert_text(text).graph
    assert [(type(layer), layer.name, layer.inputs) for layer in graph] == [
        (g.ReLU, "r", ("input",)), (g.Add, "e/1", ("r", "r")), (g.Add, "e", ("e/1", "r")), (g.ReLU, "r2", ("e",)),
        (g.Concat, "k", ("r2", "r")), (g.GlobalAveragePool, "pool", ("k",))]


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("weight_of_sums", [0.0, 4.0])
def test_caffe_batch_norm_and_scale_are_folded(convert_text, old, weight_of_sums):
    weight, bias, mean, gamma, beta = numbers(4, 3, 1, 1), *(numbers(4, seed=i) for i in range(1, 5))
    variance = np.abs(numbers(4, seed=5))
    text = (layer("c", "Convolution", "x", "c", "convolution_param { num_output: 4 kernel_size: 1 }")
            + layer("n", "BatchNorm", "c", "c", "batch_norm_param { eps: 0.125 }")
            + layer("s", "Scale", "c", "t", "scale_param { bias_term: true }") + GLOBAL)
    conv, _ = convert_text(text, {"c": [weight, bias], "n": [mean, variance, np.float32([weight_of_sums])], "s": [gamma, beta]}, old).graph
    factor = 1 / weight_of_sums if weight_of_sums else 0
    scale = gamma / np.sqrt(variance * factor + 0.125)
    np.testing.assert_allclose(conv.weight, weight * scale[:, None, None, None], rtol=1e-5)
    np.testing.assert_allclose(conv.bias, (bias - mean * factor) * scale + beta, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("head", [
    'input: "x" input_dim: 1 input_dim: 3 input_dim: 9 input_dim: 8 ', INPUT,
    layer("in", "Input", "", "x", "input_param { shape { dim: 1 dim: 3 dim: 9 dim: 8 } }"),
])
def test_caffe_inputs(convert_text, head):
    text = layer("r", "ReLU", "x", "t") + GLOBAL
    assert convert_text(text, head=head).graph.input_shape == (3, 9, 8)
    assert convert_text(text, head=head, size=(4, 5)).graph.input_shape == (3, 4, 5)


def test_caffe_flat_input(convert_text):
    model = convert_text(layer("d", "InnerProduct", more="inner_product_param { num_output: 2 bias_term: false }"), {"d": [numbers(2, 3)]},
                         head='input: "x" input_shape { dim: 1 dim: 3 } ')
    assert [type(layer) for layer in model.graph] == [g.Dense]
    assert model.preprocessing.color is None


@pytest.mark.parametrize(("rule", "is_in"), [
    ("include { phase: TRAIN }", False), ("include { phase: TEST }", True), ("exclude { phase: TEST }", False),
    ("exclude { phase: TRAIN }", True), ('include { stage: "a" }', False), ("include { min_level: 1 }", False),
    ("include { max_level: 0 }", True), ("include { phase: TRAIN } include { phase: TEST }", True),
])
def test_caffe_layers_for_the_test_phase(convert_text, rule, is_in):
    graph = convert_text(layer("r", "ReLU", "x", "x", rule) + GLOBAL.replace('"t"', '"x"')).graph
    assert len(graph.layers) == 1 + is_in


def test_caffe_weights_in_double_precision_and_pieces(tmp_path):
    weight = numbers(2, 3)
    net = caffe.NetParameter()
    for name, field, data in (("d", "double_data", weight.astype("<f8")), ("e", "data", weight[:, :2].astype("<f4"))):
        blob = net.layer.add(name=name).blobs.add()
        blob.shape.dim.extend(data.shape)
        content = data.tobytes()
        getattr(blob, field).extend([content[:8], content[8:]])
    parameters = "inner_product_param { num_output: 2 bias_term: false }"
    text = ('input: "x" input_shape { dim: 1 dim: 3 } ' + layer("d", "InnerProduct", more=parameters)
            + layer("e", "InnerProduct", "d", more=parameters))
    (first, second), shape, file_format = caffe.parse(text.encode(), net.SerializeToString())
    same(first.weight, weight)
    same(second.weight, weight[:, :2])
    assert (shape, file_format) == ((3, 1, 1), "caffe")


CONV = "convolution_param { num_output: 4 kernel_size: 2 }"


@pytest.mark.parametrize(("text", "weights", "message"), [
    (layer("l", "Sigmoid"), {},
     r"net\.prototxt: layer 'l' of type Sigmoid \(number 1 of 1, reads 'x'\) is not supported; supported: BatchNorm, .*Split$"),
    ('layers { name: "s" type: SIGMOID bottom: "x" top: "s" }', {}, "layer 's' of type SIGMOID .* is not supported"),
    ('layers { layer { name: "r" type: "relu" } bottom: "x" top: "s" }', {}, "Caffe's first version"),
    (layer("d", "Data", "x"), {}, "source of training data"),
    (layer("c", "Convolution", more=CONV), {}, "has 0 blobs of weights in the .caffemodel; required: 2"),
    (layer("c", "Convolution", more=CONV), {"c": [numbers(4, 3, 2, 3), numbers(4)]}, r"weights of shape \(4, 3, 2, 3\)"),
    (layer("c", "Convolution", more=CONV), {"c": [numbers(4, 3, 2, 2), numbers(5)]}, r"weights of shape \(5,\)"),
    (layer("c", "Convolution", more="convolution_param { num_output: 4 kernel_size: 2 axis: 2 }"), {}, "axis 2"),
    (layer("c", "Convolution", more="convolution_param { num_output: 4 kernel_size: [2, 2, 2] }"), {}, "two dimensions"),
    (layer("c", "Convolution", more="convolution_param { num_output: 4294967295 kernel_size: 4294967295 }"),
     {"c": [numbers(1), numbers(1)]}, "required: .4294967295, 3"),
    (layer("c", "Convolution", more="convolution_param { num_output: 4 kernel_size: 1 group: 0 }"),
     {"c": [numbers(4, 3), numbers(4)]}, "groups"),
    (layer("d", "InnerProduct", more="inner_product_param { num_output: 4 axis: 2 }"), {}, "axis 2"),
    (layer("p", "Pooling", more="pooling_param { pool: STOCHASTIC kernel_size: 2 }"), {}, "pools at random"),
    (layer("p", "Pooling"), {}, "kernel"),
    (layer("r", "ReLU", more="relu_param { negative_slope: -0.1 }"), {}, "has slope -0.1; required: 0 to 1"),
    (layer("d", "Deconvolution", more="convolution_param { num_output: 2 kernel_size: 2 stride: 0 }"), {},
     "required: axis 1, numbers from 1"),
    (layer("d", "Deconvolution", more="convolution_param { num_output: 2 group: 2 kernel_size: 2 }"), {}, "groups that divide both"),
    (layer("d", "Deconvolution", more="convolution_param { num_output: 2 kernel_size: 2 pad: 9 }"), {}, "at least one pixel"),
    (layer("d", "Deconvolution", more="convolution_param { num_output: 2 kernel_size: 2 stride: 1000000 }"), {},
     "at most 268435456 numbers"),
    (layer("d", "Deconvolution", more="convolution_param { num_output: 2 kernel_size: 2 }"),
     {"d": [numbers(3, 2, 3, 3), numbers(2)]}, r"weights of shape .*; required: \(3, 2, 2, 2\)"),
    (layer("k", "Concat", "x x", more="concat_param { axis: 2 }"), {}, "axis 2"),
    (layer("e", "Eltwise", "x x", more="eltwise_param { operation: MAX }"), {}, "is a MAX"),
    (layer("e", "Eltwise", "x x", more="eltwise_param { coeff: 1 coeff: -1 }"), {}, r"coefficients \[1.0, -1.0\]"),
    (layer("n", "BatchNorm", more="batch_norm_param { use_global_stats: false }"), {}, "normalises by the batch"),
    (layer("l", "LRN", more="lrn_param { local_size: 4 }"), {}, "has local_size 4; required: an odd one"),
    (layer("s", "Scale", "x x"), {}, "has 2 bottoms"),
    (layer("s", "Scale", more="scale_param { axis: 0 }"), {}, "axis 0"),
    (layer("f", "Flatten", more="flatten_param { axis: 2 }"), {}, "axis 2"),
    (layer("s", "Softmax", more="softmax_param { axis: 2 }"), {}, "axis 2"),
    (layer("r", "ReLU", "nothing"), {}, "reads 'nothing', which no layer before it makes"),
    (layer("r", "ReLU") + layer("r", "ReLU", "r"), {}, "name that is taken"),
    (layer("r", "ReLU") + layer("q", "ReLU"), {}, "2 outputs"),
    ('layer { name: "r" type: "ReLU" bottom: "x" }', {}, "has no top"),
    ("layer {", {}, "the .prototxt is damaged"),
    ("a { " * 50_000, {}, "the .prototxt is damaged"),
    ('input: "z"', {}, "has 2 inputs"),
])
def test_refused_caffe_layers(convert_text, text, weights, message):
    with pytest.raises(ConversionError, match=message):
        convert_text(text, weights)


def test_refused_caffe_inputs(convert_text):
    for head, options, message in [("", {}, "has 0 inputs"), ('input: "x" ', {}, "of 0 shapes"),
                                   ('input: "x" input_shape { dim: 1 dim: 3 dim: 0 dim: 4 } ', {}, r"shape \[1, 3, 0, 4\]"),
                                   ('input: "x" input_shape { dim: 1 dim: 3 } ', {"size": 4}, "no size")]:
        with pytest.raises(ConversionError, match=message):
            convert_text(layer("r", "ReLU"), head=head, **options)


@pytest.mark.parametrize("content", [b"", b"garbage, not weights", bytes(1000)])
def test_caffemodel_that_is_none(tmp_path, content):
    (tmp_path / "net.prototxt").write_text(INPUT + layer("r", "ReLU"))
    (tmp_path / "net.caffemodel").write_bytes(content)
    with pytest.raises(ConversionError, match=r"the \.caffemodel"):
        convert(tmp_path / "net.prototxt", tmp_path / "net.caffemodel")


def test_damaged_caffe_files_are_read_or_refused():
    text = (INPUT + layer("c", "Convolution", "x", "c", CONV) + layer("n", "BatchNorm", "c", "c") + layer("e", "Eltwise", "c c")
            + layer("p", "Pooling", "e", "p", "pooling_param { pool: AVE kernel_size: 3 stride: 2 pad: 1 }")
            + layer("d", "InnerProduct", "p", "d", "inner_product_param { num_output: 2 }")).encode()
    weights = caffemodel({"c": [numbers(4, 3, 2, 2), numbers(4)], "n": [numbers(4), np.ones(4), np.ones(1)],
                          "d": [numbers(2, 80), numbers(2)]})
    assert len(caffe.parse(text, weights)[0]) == 6
    for data in damaged(weights, 500):
        with contextlib.suppress(FastDTDError):
            caffe.parse(text, data)
    for data in damaged(text, 500):
        with contextlib.suppress(FastDTDError):
            caffe.parse(data, weights)
