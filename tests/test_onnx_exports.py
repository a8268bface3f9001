"""ONNX: what exporters write around the layers, arithmetic on shapes and constants, and hostile files of it."""

import numpy as np
import pytest
from importing import converter_of_nodes, ints, node, numbers, of_type, onnx_file, scores

from fastdtd import graph as g
from fastdtd.errors import ConversionError, FastDTDError

onnx = pytest.importorskip("onnx")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402  # after importorskip

POOL = node("GlobalAveragePool", ["t"], ["y"], name="pool")  # makes any image 't' an output


@pytest.fixture
def convert_nodes(tmp_path):
    return converter_of_nodes(tmp_path)


SHAPE = [node("Shape", ["x"], ["shape"])]
BATCH = [*SHAPE, node("Gather", ["shape", "zero"], ["n"], axis=0), node("Unsqueeze", ["n", "zeros"], ["n1"])]
SCALARS = {"zero": np.int64(0), "zeros": ints(0), "one": np.int64(1), "minus": ints(-1), "two": np.int64(2)}


@pytest.mark.parametrize("nodes", [
    [*BATCH, node("Concat", ["n1", "minus"], ["s"], axis=0)],
    [*SHAPE, node("Slice", ["shape", "zeros", "first"], ["n1"]), node("Concat", ["n1", "minus"], ["s"], axis=0)],
    [*SHAPE, node("Slice", ["shape", "first", "end"], ["rest"]), node("ReduceProd", ["rest"], ["f"], keepdims=1),
     node("Concat", ["minus", "f"], ["s"], axis=0)],
    [node("Shape", ["x"], ["rest"], start=1), node("Cast", ["rest"], ["r"], to=1),
     node("ReduceProd", ["r"], ["f"], keepdims=1),
     node("Floor", ["f"], ["g"]), node("Cast", ["g"], ["h"], to=7), node("Concat", ["minus", "h"], ["s"], axis=0)],
    [*BATCH, node("Size", ["x"], ["all"]), node("Div", ["all", "n"], ["f"]), node("Unsqueeze", ["f", "zeros"], ["f1"]),
     node("Concat", ["n1", "f1"], ["s"], axis=0)],
    [*SHAPE, node("Split", ["shape"], ["n1", "c", "h", "v"], axis=0), node("Mul", ["c", "h"], ["ch"]),
     node("Mul", ["ch", "v"], ["f"]),
     node("Where", ["yes", "n1", "f"], ["m"]), node("Max", ["m", "first"], ["o"]),
     node("Concat", ["o", "f"], ["s"], axis=0)],
    [node("ConstantOfShape", ["first"], ["ones"], value=numpy_helper.from_array(ints(-1))), *BATCH,
     node("Concat", ["n1", "ones"], ["s"], axis=0)],
    [node("Range", ["zero", "two", "one"], ["r"]), node("Sub", ["r", "one"], ["q"]), node("Neg", ["q"], ["p"]),
     node("Equal", ["p", "zero"], ["e"]), node("Not", ["e"], ["e1"]), node("Where", ["e1", "p", "features"], ["s"])],
])
@pytest.mark.parametrize("batch", ["N", 4])
def test_flattening_by_arithmetic_on_shapes(convert_nodes, nodes, batch):
    if batch == 4 and nodes[0].op_type == "Range":
        batch = 1  # it writes the batch as a number
    constants = {**SCALARS, "first": ints(1), "end": ints(4), "yes": np.array(True), "features": ints(216),
                 "w": numbers(216, 2)}
    graph = convert_nodes([*nodes, node("Reshape", ["x", "s"], ["flat"]), node("Gemm", ["flat", "w"], ["y"])],
                          constants, (batch, 3, 9, 8),
                          15).graph
    assert [type(layer) for layer in graph] == [g.Flatten, g.Dense]


@pytest.mark.parametrize("condition", [True, False])
def test_the_branch_that_a_constant_chooses(convert_nodes, condition):
    branches = [helper.make_graph([node("Constant", [], ["axes"], value=numpy_helper.from_array(ints(2, 3))),
                                   node("Squeeze", ["p", "axes"], ["squeezed"])], "a",
                                  [], [helper.make_tensor_value_info("squeezed", TensorProto.FLOAT, None)]),
                helper.make_graph([node("Identity", ["p"], ["same"])], "b", [],
                                  [helper.make_tensor_value_info("same", TensorProto.FLOAT, None)])]
    nodes = [node("GlobalAveragePool", ["x"], ["p"], name="pool"), node("Shape", ["p"], ["s"]),
             node("Gather", ["s", "at"], ["n"]),
             node("Equal", ["n", "one"], ["is_one"]), node("If", ["is_one"], ["i"], then_branch=branches[0],
                                                           else_branch=branches[1]),
             node("Flatten", ["i"], ["f"]), node("Gemm", ["f", "w"], ["y"])]
    graph = convert_nodes(nodes, {**SCALARS, "at": np.int64(2 if condition else 1), "w": numbers(3, 2)}).graph
    assert [type(layer) for layer in graph] == [g.GlobalAveragePool, g.Dense]


def normalised(size=5, *, pad="p5", pool=None, by="x"):
    """Local response normalisation as PyTorch's exporters write it."""
    return [node("Mul", [by, by], ["squares"]), node("Reshape", ["squares", "s5"], ["r"]),
            node("Pad", ["r", pad], ["p"]),
            node("AveragePool", ["p"], ["a"], kernel_shape=pool or [size, 1, 1], count_include_pad=1),
            node("Squeeze", ["a", "axis"], ["q"]), node("Reshape", ["q", "s4"], ["m"]),
            node("Mul", ["m", "alpha"], ["n"]),
            node("Add", ["n", "k"], ["o"]), node("Pow", ["o", "beta"], ["d"]), node("Div", ["x", "d"], ["t"]), POOL]


NORM = {"s5": ints(0, 1, 3, 9, -1), "s4": ints(0, 3, 9, -1), "p5": ints(0, 0, 2, 0, 0, 0, 0, 2, 0, 0), "axis": ints(1),
        "alpha": np.float32(1e-2), "k": np.float32(2), "beta": np.float32(0.6),
        "off": ints(0, 0, 1, 0, 0, 0, 0, 3, 0, 0),
        "even": ints(0, 0, 2, 0, 0, 0, 0, 1, 0, 0)}


def test_local_response_norm_as_pytorch_writes_it(convert_nodes):
    norm, _ = convert_nodes(normalised(), NORM).graph
    assert (norm.size, norm.alpha, norm.beta, norm.bias) == (5, pytest.approx(1e-2), pytest.approx(0.6), 2)


def test_local_response_norm_over_an_even_number_of_channels(convert_nodes):
    """PyTorch's windows have one channel more before theirs, ONNX's one more after."""
    x = numbers(1, 3, 9, 8)
    for pad, channels in (("even", [(0, 2), (0, 3), (0, 3)]), ("odd", [(0, 3), (0, 3), (1, 3)])):
        graph = convert_nodes(normalised(4, pad=pad), {**NORM, "odd": ints(0, 0, 1, 0, 0, 0, 0, 2, 0, 0)}).graph
        sums = np.stack([(x[:, first:last] ** 2).sum(1) for first, last in channels], 1)
        expected = (x / (2 + 1e-2 * sums / 4) ** 0.6).mean((2, 3))
        np.testing.assert_allclose(scores(graph, x), expected, rtol=1e-5)


@pytest.mark.parametrize(("nodes", "message"), [
    (normalised(pad="off"), r"AveragePool 'a' .* is no part of a local response normalisation"),
    (normalised(3), "is no part of a local response normalisation"),
    (normalised(4, pad="off"), "is no part of a local response normalisation"),
    (normalised(pool=[5, 2, 1]), "is no part of a local response normalisation"),
    ([node("Relu", ["x"], ["x2"]), *normalised(by="x2")],
     "divides by squares; required: a local response normalisation"),
    ([*normalised()[:6], node("Relu", ["m"], ["t"]), POOL],
     "reads a part of a local response normalisation; required: all of one"),
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
    nodes = [node("Sub", ["x", "mean"], ["m"]), node("Transpose", ["m"], ["a"], **to),
             node("Conv", ["a", "w"], ["b"], name="conv"),
             node("Transpose", ["b"], ["c"], **back), node("Add", ["c", "bias"], ["d"]),
             node("Relu", ["d"], ["e"], name="relu"),
             node("Transpose", ["e"], ["f"], **to), node("MaxPool", ["f"], ["h"], kernel_shape=[2, 2], name="pool"),
             node("Transpose", ["h"], ["i"], **back), node("ReduceMean", ["i"], ["y"], axes=[1, 2], keepdims=0,
                                                           name="mean")]
    constants = {"mean": numbers(3), "w": numbers(4, 3, 3, 3), "bias": numbers(4)}
    model = convert_nodes(nodes, constants, ("N", 9, 8, 3))
    assert [layer.name for layer in model.graph] == ["conv", "relu", "pool", "mean"]
    assert model.graph.input_shape == (3, 9, 8)
    assert model.preprocessing.color == "rgb"
    np.testing.assert_allclose(model.graph.layers[0].bias, constants["bias"]
                               - np.einsum("kcij,c->k", constants["w"], constants["mean"]),
                               rtol=1e-4, atol=1e-5)


def test_a_transpose_before_a_dense_layer_moves_its_weights(convert_nodes):
    weight = numbers(216, 2)
    graph = convert_nodes([node("Transpose", ["x"], ["t"], perm=[0, 2, 3, 1]), node("Reshape", ["t", "s"], ["f"]),
                           node("MatMul", ["f", "w"], ["y"])], {"s": ints(-1, 216), "w": weight}).graph
    assert [type(layer) for layer in graph] == [g.Flatten, g.Dense]
    batch = numbers(2, 3, 9, 8)
    np.testing.assert_allclose(scores(graph, batch), batch.transpose(0, 2, 3, 1).reshape(2, -1) @ weight, rtol=1e-4,
                               atol=1e-5)


X = numbers(2, 4, 6, 5)


@pytest.mark.parametrize(("nodes", "constants", "expected", "layers"), [
    ([node("Reshape", ["x", "s"], ["a"]), node("Transpose", ["a"], ["b"], perm=[0, 2, 1, 3, 4]),
      node("Reshape", ["b", "r"], ["t"])],
     {"s": ints(0, 2, 2, 6, 5), "r": ints(0, 4, 6, 5)}, X[:, [0, 2, 1, 3]], 0),
    ([node("Slice", ["x", "a", "b", "c", "d"], ["t"])], {"a": ints(1, -2), "b": ints(4, -100), "c": ints(1, -1),
                                                         "d": ints(1, -2)},
     X[:, 1:4, :, -2::-2], 1),
    ([node("Split", ["x", "s"], ["a", "b"], axis=1), node("Concat", ["b", "a"], ["t"], axis=1)], {"s": ints(1, 3)},
     X[:, [1, 2, 3, 0]], 0),
    ([node("Split", ["x"], ["a", "b"], axis=2), node("Relu", ["a"], ["c"]), node("Concat", ["b", "c"], ["t"], axis=2)],
     {},
     np.concatenate([X[:, :, 3:], np.maximum(X[:, :, :3], 0)], 2), None),
    ([node("Gather", ["x", "i"], ["t"], axis=-1)], {"i": ints(3, -1, 0)}, X[..., [3, 4, 0]], 1),
    ([node("Gather", ["x", "i"], ["a"], axis=2), node("Unsqueeze", ["a", "u"], ["t"])],
     {"i": np.int64(-2), "u": ints(3)},
     X[:, :, 4, :, None], 1),
    ([node("DepthToSpace", ["x"], ["t"], blocksize=2)], {},
     X.reshape(2, 2, 2, 1, 6, 5).transpose(0, 3, 4, 1, 5, 2).reshape(2, 1, 12, 10), 0),
    ([node("DepthToSpace", ["x"], ["t"], blocksize=2, mode="CRD")], {},
     X.reshape(2, 1, 2, 2, 6, 5).transpose(0, 1, 4, 2, 5, 3).reshape(2, 1, 12, 10), 0),
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
    ([node("Max", ["x", "z"], ["a"]), node("Min", ["c", "a"], ["t"])], {"z": np.float32(0), "c": np.float32(0.5)},
     X.clip(0, 0.5), 2),
    ([node("Max", ["z", "x", "c"], ["t"])], {"z": np.float32([[-0.5]]), "c": np.float32(-1)}, X.clip(-0.5), 1),
    ([node("Mul", ["x", "c"], ["a"]), node("Add", ["d", "a"], ["t"])], {"c": X[:1] + 1, "d": X[0, 0]},
     X * (X[:1] + 1) + X[0, 0], None),
    ([node("Reshape", ["x", "s"], ["f"]), node("BatchNormalization", ["f", "c", "d", "d", "c"], ["t"])],
     {"s": ints(0, 120), "c": np.arange(1, 121, dtype=np.float32), "d": X[0].ravel()},
     (X.reshape(2, 120) - X[0].ravel()) * np.sqrt(np.arange(1, 121)) + X[0].ravel(), None),
    ([node("Sign", ["x"], ["a"]), node("Abs", ["x"], ["b"]), node("Relu", ["b"], ["c"]),
      node("Mul", ["c", "a"], ["t"])], {}, X, 0),
    ([node("Cast", ["low"], ["l"], to=1), node("Clip", ["x", "l", "h"], ["t"])],
     {"low": ints(-1), "h": np.float32(0.5)},
     X.clip(-1, 0.5), 1),
    ([node("Relu", ["x"], ["a"]), node("Sub", ["a", "x"], ["b"]), node("Sub", ["c", "b"], ["t"])], {"c": np.float32(2)},
     2 - (np.maximum(X, 0) - X), None),
    ([node("ReduceMax", ["x"], ["t"], axes=[-2, -1])], {}, X.max((2, 3), keepdims=True), 1),
    ([node("ReduceSum", ["x", "a"], ["t"])], {"a": ints(1)}, X.sum(1, keepdims=True), None),
    ([node("Relu", ["x"], ["r"]), node("Mean", ["x", "r"], ["t"])], {}, (X + np.maximum(X, 0)) / 2, None),
])
def test_what_moves_numbers_and_more(convert_nodes, nodes, constants, expected, layers):
    """layers: how many are made before the dense layer, whose weights are moved where all elements are in it once."""
    weight = numbers(expected[0].size, 3, seed=7)
    graph = convert_nodes([*nodes, node("Flatten", ["t"], ["flat"]), node("MatMul", ["flat", "w"], ["y"])],
                          {**constants, "w": weight},
                          ("N", *X.shape[1:])).graph
    np.testing.assert_allclose(scores(graph, X), expected.reshape(2, -1).astype(np.float64) @ weight, rtol=1e-4,
                               atol=1e-4)
    if layers is not None:
        assert sum(not isinstance(layer, (g.Flatten, g.Dense)) for layer in graph) == layers
    alone = convert_nodes([*nodes, node("Flatten", ["t"], ["y"])], constants, ("N", *X.shape[1:])).graph
    np.testing.assert_allclose(scores(alone, X), expected.reshape(2, -1), rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(onnx.defs.onnx_opset_version() < 28, reason="this onnx does not know the attribute")
def test_space_to_depth_in_the_other_order(convert_nodes):
    graph = convert_nodes([node("Slice", ["x", "a", "b", "c"], ["e"]),
                           node("SpaceToDepth", ["e"], ["t"], blocksize=2, mode="CRD"), node("Flatten", ["t"], ["y"])],
                          {"a": ints(0), "b": ints(4), "c": ints(3)}, ("N", *X.shape[1:]), 28).graph
    expected = X[..., :4].reshape(2, 4, 3, 2, 2, 2).transpose(0, 1, 3, 5, 2, 4)
    np.testing.assert_array_equal(scores(graph, X), expected.reshape(2, -1))


# ---- What is said and not read ----


WEIGHTS = {"w": numbers(4, 4, 2, 2), "c": np.abs(numbers(4))}
END = [node("GlobalAveragePool", ["t"], ["y"])]


@pytest.mark.parametrize(("nodes", "opset", "message"), [
    ([node("SpaceToDepth", ["x"], ["t"], blocksize=1, mode="CRD")], 13,
     "SpaceToDepth 't' .* has an attribute 'mode' that it has not in opset 13, .*required: one of its own .blocksize."),
    ([node("Relu", ["x"], ["t"], alpha=0.5)], 13, "has an attribute 'alpha' .*required: one of its own .none."),
    ([node("Clip", ["x"], ["t"], min=0.0)], 11, "has an attribute 'min'"),
    ([node("Relu", ["x", "c"], ["t"])], 13, "has 2 inputs; required: at most 1"),
    ([node("Reciprocal", ["c", "c"], ["r"]), node("Conv", ["x", "w", "r"], ["t"])], 13, "has 2 inputs; required"),
    ([node("CastLike", ["x", "c"], ["t"])], 13, "is no operator of ONNX's opset 13"),
    ([node("CastLike", ["x", "s"], ["t"])], 15, "casts what is computed to int64; required: a floating-point type"),
    ([node("Conv", ["x", "w"], ["t"], auto_pad="SAME_UPPER", pads=[1, 1, 0, 0])], 13,
     r"has pads \(1, 1, 0, 0\) and auto_pad SAME_UPPER, which makes \(0, 0, 1, 1\); required: one of them"),
    ([node("ConvTranspose", ["x", "w"], ["t"], kernel_shape=[3, 3])], 13, r"required: kernel_shape \(3, 3\)"),
    ([node("BatchNormalization", ["x", "c", "c", "c", "c"], ["t", "mean"])], 9, "as in training; required: one output"),
    ([node("Constant", [], ["v"], value_float=1.0, value_ints=[2]), node("Mul", ["x", "v"], ["t"])], 13,
     r"has value_ints \[2\], which is not supported; required: none"),
    ([node("Resize", ["x", "", "f", "s"], ["t"])], 13, "has 's' as its sizes, which is not supported; required: none"),
    ([node("MaxPool", ["x"], ["m", "t"], kernel_shape=[2, 2])], 13, "reads 't', which no node before it makes"),
    ([node("Relu", ["x"], ["w"]), node("Relu", ["w"], ["t"])], 13, "a node makes the tensor 'w', which is an input or"),
])
def test_what_would_not_be_read_is_refused(convert_nodes, nodes, opset, message):
    constants = {**WEIGHTS, "f": np.float32([1, 1, 2, 2]), "s": ints(1, 4, 12, 10)}
    with pytest.raises(ConversionError, match=message):
        convert_nodes([*nodes, *END], constants, ("N", *X.shape[1:]), opset)


def test_attributes_that_mean_nothing_must_be_known(convert_nodes, monkeypatch):
    pool = [node("MaxPool", ["x"], ["t"], kernel_shape=[2, 2], storage_order=1), *END]
    assert len(convert_nodes(pool).graph.layers) == 2
    monkeypatch.setattr("fastdtd.importers.onnx.reader.IGNORED", set())
    with pytest.raises(ConversionError, match="has storage_order 1, which is not supported; required: 0"):
        convert_nodes(pool)
    assert convert_nodes([node("MaxPool", ["x"], ["t"], kernel_shape=[2, 2], storage_order=0), *END]).graph


def test_attributes_by_their_names(convert_nodes):
    def again(model):
        model.graph.node[0].attribute.append(helper.make_attribute("axis", 2))

    def of_a_function(model):
        del model.graph.node[0].attribute[:]
        model.graph.node[0].attribute.add(name="axis", type=onnx.AttributeProto.INT, ref_attr_name="a")

    nodes = [node("Concat", ["x", "x"], ["t"], axis=1), *END]
    for change, message in ((again, "has an attribute twice"), (of_a_function, "takes its axis from a function")):
        with pytest.raises(ConversionError, match=message):
            convert_nodes(nodes, change=change)


def test_a_function_in_the_place_of_an_operator(convert_nodes):
    def other(model):
        model.functions.append(helper.make_function("", "Relu", ["a"], ["b"], [node("Neg", ["a"], ["b"])],
                                                    [helper.make_opsetid("", 13)]))

    with pytest.raises(ConversionError, match=r"Relu 't' .* is a function of the file's own"):
        convert_nodes([node("Relu", ["x"], ["t"]), *END], change=other)


def test_pads_that_say_the_same_twice(convert_nodes):
    conv, *_ = convert_nodes([node("Conv", ["x", "w"], ["t"], auto_pad="SAME_UPPER", pads=[0, 0, 1, 1]), *END], WEIGHTS,
                             ("N", *X.shape[1:])).graph
    assert conv.padding == (0, 0, 1, 1)


@pytest.mark.parametrize("attributes", [{}, {"noop_with_empty_axes": 0}, {"noop_with_empty_axes": 1}])
@pytest.mark.parametrize("axes", [[], ["none"]])
def test_empty_axes_are_all_axes(convert_nodes, attributes, axes):
    """Of constants, and of what is computed, where that would be the batch, too."""
    is_noop, value = bool(attributes.get("noop_with_empty_axes")), numbers(4, 1, 1)
    constants = {"c": value, "none": np.zeros(0, np.int64)}
    add, *_ = convert_nodes([node("ReduceSum", ["c", *axes], ["s"], **attributes), node("Add", ["x", "s"], ["t"]),
                             *END], constants, ("N", *X.shape[1:])).graph
    np.testing.assert_allclose(add.bias, value.ravel() if is_noop else np.full(4, value.sum()), rtol=1e-6)
    nodes = [node("ReduceSum", ["x", *axes], ["t"], **attributes), *END]
    if is_noop:
        assert len(convert_nodes(nodes, constants).graph.layers) == 1
    else:
        with pytest.raises(ConversionError, match="over all axes, the batch too"):
            convert_nodes(nodes, constants)


def test_a_newer_opset_than_was_tested(convert_nodes, monkeypatch, caplog):
    monkeypatch.setattr("fastdtd.importers.onnx.reader.NEWEST_OPSET", 12)
    assert convert_nodes([node("Relu", ["x"], ["t"]), *END], opset=13).graph
    assert "written for ONNX opset 13; 12 is the newest that this version was tested with" in caplog.text
    caplog.clear()
    assert convert_nodes([node("Relu", ["x"], ["t"]), *END], opset=12).graph
    assert "opset" not in caplog.text


@pytest.mark.parametrize(("attributes", "size"), [
    ({}, (13, 16)), ({"pads": [1, 0, 2, 1]}, (10, 15)), ({"auto_pad": "SAME_UPPER"}, (12, 15)),
    ({"auto_pad": "VALID"}, (13, 16)),
    ({"output_padding": [1, 2]}, (14, 18)), ({"output_shape": [12, 14]}, (12, 14)),
])
def test_transposed_convolution(convert_nodes, attributes, size):
    nodes = [node("ConvTranspose", ["x", "w", "b"], ["c"], strides=[2, 3], **attributes),
             node("Relu", ["c"], ["t"])]
    constants = {"w": numbers(4, 2, 3, 4), "b": numbers(2)}
    graph = convert_nodes([*nodes, POOL], constants, ("N", 4, 6, 5)).graph
    assert of_type(graph, g.Rearrange)[0].index.shape == (2, *size)
    dense = [node("Flatten", ["t"], ["f"]), node("Gemm", ["f", "d"], ["y"])]
    graph = convert_nodes([*nodes, *dense], constants | {"d": numbers(2 * size[0] * size[1], 1)}, ("N", 4, 6, 5)).graph
    assert isinstance(graph.layers[-1], g.Dense)


def test_one_spatial_axis(convert_nodes):
    weight, x = numbers(3, 2, 4), numbers(2, 2, 9)
    model = convert_nodes([node("Conv", ["x", "w"], ["c"], pads=[1, 2], strides=[2]),
                           node("MaxPool", ["c"], ["m"], kernel_shape=[2]),
                           node("AveragePool", ["m"], ["t"], kernel_shape=[2], pads=[1, 0], count_include_pad=1),
                           node("Flatten", ["t"], ["y"])], {"w": weight}, ("N", 2, 9))
    assert model.graph.input_shape == (2, 1, 9)
    assert [layer.kernel for layer in of_type(model.graph, g.Pool2d)] == [(1, 2), (1, 2)]
    padded = np.pad(x, ((0, 0), (0, 0), (1, 2)))
    made = np.stack([np.einsum("ncl,kcl->nk", padded[:, :, i:i + 4], weight) for i in range(0, 9, 2)], 2)
    pooled = np.pad(np.maximum(made[:, :, 1:], made[:, :, :-1]), ((0, 0), (0, 0), (1, 0)))
    np.testing.assert_allclose(scores(model.graph, x[:, :, None]), ((pooled[:, :, 1:]
                                                                     + pooled[:, :, :-1]) / 2).reshape(2, -1),
                                                                     rtol=1e-4,
                               atol=1e-5)


@pytest.mark.parametrize("opset", [9, 10, 11, 13, 18, 21])
def test_inputs_that_were_attributes(convert_nodes, opset):
    """The same network in the words of each opset."""
    def words(op, inputs, output, values, first, **attributes):
        """Integers as attributes before opset `first`, as inputs from then on."""
        if opset < first:
            return node(op, inputs, [output], **{name: list(map(int, np.ravel(value))) for name,
                                                 value in values.items()}, **attributes)
        constants.update({f"{output}_{name}": value for name, value in values.items()})
        return node(op, [*inputs, *(f"{output}_{name}" for name in values)], [output], **attributes)

    constants = {"f": np.float32([1, 1, 2, 2])}
    nodes = [words("Pad", ["x"], "p", {"pads": ints(0, 0, 1, 0, 0, 0, 0, 1)}, 11),
             words("Slice", ["p"], "s", {"starts": ints(1), "ends": ints(3), "axes": ints(1)}, 10),
             words("Unsqueeze", ["s"], "u", {"axes": ints(1)}, 13), words("Squeeze", ["u"], "q", {"axes": ints(1)}, 13),
             node("Upsample", ["q", "f"], ["t"]) if opset == 9 else node("Resize",
                                                                         ["q", "f"] if opset < 11 else ["q", "", "f"],
                                                                         ["t"]),
             words("Split", ["t"], "v", {"split": ints(2)}, 13, axis=1),
             words("ReduceMean", ["v"], "y", {"axes": ints(2, 3)}, 18, keepdims=0)]
    graph = convert_nodes(nodes, constants, ("N", 4, 6, 5), opset).graph
    np.testing.assert_allclose(scores(graph, X), np.pad(X[:, 1:3], ((0, 0), (0, 0), (1, 0), (0, 1))).mean((2, 3)),
                               rtol=1e-4, atol=1e-6)


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
     "makes 1099511627776 elements"),
    ([node("ConstantOfShape", ["s"], ["c"]), node("Add", ["x", "c"], ["t"]), POOL], {"s": ints(-1)}, r"a shape \[-1\]"),
    ([node("ConstantOfShape", ["s"], ["c"]), node("Add", ["x", "c"], ["t"]), POOL], {"s": ints(*[1] * 40)},
     "at most 32 integers"),
    ([node("Range", ["a", "b", "c"], ["r"]), node("Add", ["x", "r"], ["t"]), POOL],
     {"a": np.int64(0), "b": np.int64(2**62), "c": np.int64(1)},
     "makes 4611686018427387904 elements"),
    ([node("Range", ["a", "b", "c"], ["r"]), node("Add", ["x", "r"], ["t"]), POOL],
     {"a": np.int64(0), "b": np.int64(5), "c": np.int64(0)},
     "Range 'r' .* cannot be computed from constants of shapes"),
    ([node("Range", ["a", "b", "c"], ["r"]), node("Add", ["x", "r"], ["t"]), POOL],
     {"a": np.float32(0), "b": np.float32(np.inf), "c": np.float32(1)}, "cannot be computed"),
    ([node("Expand", ["a", "s"], ["c"]), node("Add", ["x", "c"], ["t"]), POOL], {"a": np.float32(1), "s": HUGE},
     "makes"),
    ([node("Expand", ["a", "s"], ["c"]), node("Add", ["x", "c"], ["t"]), POOL],
     {"a": np.float32(1), "s": ints(2**62, 2**62, 2**62)},
     "broadcast dimensions too large"),
    ([node("Tile", ["a", "s"], ["c"]), node("Add", ["x", "c"], ["t"]), POOL], {"a": numbers(2, 2), "s": HUGE},
     "makes"),
    ([node("Expand", ["x", "s"], ["t"]), POOL], {"s": ints(1, 3, 2**31, 8)}, "required: axes of length 1"),
    ([node("Tile", ["x", "s"], ["t"]), POOL], {"s": ints(1, 2**20, 2**20, 1)},
     "makes a tensor of 237494511599616 elements"),
    ([node("Pad", ["x", "s"], ["t"]), POOL], {"s": ints(0, 0, 2**40, 0, 0, 0, 0, 0)},
     "makes a tensor of .* elements; at most"),
    ([node("Resize", ["x", "", "f"], ["t"]), POOL], {"f": np.float32([1, 1, 1e6, 1e6])}, "makes .* of .N, 3, 9, 8."),
    ([node("Resize", ["x", "", "f"], ["t"]), POOL], {"f": np.float32([1, 1, np.nan, 1])}, "required: numbers above 0"),
    ([node("Resize", ["x", "", "f"], ["t"], mode="cubic"), POOL], {"f": np.float32([1, 1, 2, 2])},
     "mode 'cubic', policy 'stretch' and antialias 0; required: nearest or linear"),
    ([node("Resize", ["x", "", "f"], ["t"], mode="linear"), POOL], {"f": np.float32([1, 2, 2, 2])},
     "the channels as they are"),
    ([node("Resize", ["x", "", "f"], ["t"], mode="linear", coordinate_transformation_mode="tf_half_pixel_for_nn"),
      POOL], {"f": np.float32([1, 1, 2, 2])}, "coordinate_transformation_mode 'tf_half_pixel_for_nn'"),
    ([node("Gather", ["s", "i"], ["c"]), node("Reshape", ["x", "c"], ["t"]), POOL],
     {"s": ints(1, 216), "i": ints(0, 2)},
     "Gather 'c' .* cannot be computed .* positions 0 to 2 of an axis of length 2"),
    ([node("Gather", ["s", "i"], ["c"]), node("Reshape", ["x", "c"], ["t"]), POOL], {"s": ints(1, 216), "i": ints(-3)},
     "positions -3 to -3"),
    ([node("Gather", ["s", "i"], ["c"], axis=7), node("Reshape", ["x", "c"], ["t"]), POOL],
     {"s": ints(1, 216), "i": ints(0)}, "cannot be"),
    ([node("Gather", ["x", "i"], ["t"], axis=1), POOL], {"i": ints(3)}, "takes elements 3 to 3 of an axis of length 3"),
    ([node("Gather", ["x", "i"], ["t"], axis=1), POOL], {"i": np.zeros((2**12, 2**12), np.int64)},
     "makes a tensor of .* elements; at most"),
    ([node("Gather", ["x", "i"], ["t"], axis=0), POOL], {"i": ints(0)}, "works along axis 0"),
    ([node("Gather", ["x", "i"], ["t"], axis=1), POOL], {"i": np.zeros(0, np.int64)}, "leaves nothing"),
    ([node("Reshape", ["x", "s"], ["t"]), POOL], {"s": ints(1, 2**32, 2**32, 216)},
     "required: a shape of as many elements"),
    ([node("Reshape", ["x", "s"], ["t"]), POOL], {"s": ints(-1, -1)}, "required: a shape of as many elements"),
    ([node("Reshape", ["x", "s"], ["t"]), POOL], {"s": ints(1, 3, 9, 8, 0)}, "no 0 for an axis that there is not"),
    ([node("Reshape", ["x", "s"], ["t"]), POOL], {"s": np.ones(100, np.int64)}, "at most 32 integers"),
    ([node("Reshape", ["x", "s"], ["t"]), POOL], {"s": np.float32([1, 216])}, "at most 32 integers"),
    ([node("Unsqueeze", ["x", "s"], ["t"]), POOL], {"s": ints(0)}, "none before the batch"),
    ([node("Unsqueeze", ["x", "s"], ["t"]), POOL], {"s": ints(9)}, "has axis 9 for a tensor of 5 axes"),
    ([node("Squeeze", ["x"], ["t"]), POOL], {}, "the batch too; required: axes"),
    ([node("Transpose", ["x"], ["t"]), POOL], {}, r"moves the batch, \(3, 2, 1, 0\)"),
    ([node("Transpose", ["x"], ["t"], perm=[0, 1, 1, 3]), POOL], {}, "has the order"),
    ([node("Slice", ["x", "a", "a", "a"], ["t"]), POOL], {"a": ints(1)}, "leaves nothing"),
    ([node("Slice", ["x", "a", "b", "c"], ["t"]), POOL], {"a": ints(0), "b": ints(0), "c": ints(0)},
     "takes a part of the batch"),
    ([node("Slice", ["x", "a", "b", "c"], ["t"]), POOL], {"a": ints(0), "b": ints(1, 2), "c": ints(1)},
     "of different lengths"),
    ([node("Slice", ["x", "a", "b", "c", "d"], ["t"]), POOL], {"a": ints(0), "b": ints(1), "c": ints(1), "d": ints(0)},
     "a step other than 0"),
    ([node("Split", ["x", "s"], ["t", "u"], axis=1), POOL], {"s": ints(1, 1)}, "required: sizes from 1 that add up"),
    ([node("DepthToSpace", ["x"], ["t"], blocksize=2), POOL], {}, "required: one that divides it"),
    ([node("DepthToSpace", ["x"], ["t"], blocksize=0), POOL], {}, "has blocksize 0"),
    ([node("Mod", ["s", "z"], ["c"]), node("Reshape", ["x", "c"], ["t"]), POOL], {"s": ints(1), "z": ints(0)},
     "divided by zero"),
    ([node("Div", ["s", "z"], ["c"]), node("Reshape", ["x", "c"], ["t"]), POOL], {"s": ints(1), "z": ints(0)},
     "divided by zero"),
    ([node("Concat", ["s", ""], ["c"], axis=0), node("Reshape", ["x", "c"], ["t"]), POOL], {"s": ints(1)},
     "lacks one of its inputs"),
    ([node("Where", ["s"], ["c"]), node("Reshape", ["x", "c"], ["t"]), POOL], {"s": ints(1)},
     "lacks one of its inputs; required: 3"),
    ([node("Cast", ["s"], ["c"], to=8), node("Reshape", ["x", "c"], ["t"]), POOL], {"s": ints(1)},
     "casts to element type 8"),
    ([node("Cast", ["x"], ["t"], to=7), POOL], {}, "casts what is computed to element type 7"),
    ([node("Floor", ["x"], ["t"]), POOL], {}, "Floor 't' .* reads what is computed; required: constants"),
    ([node("If", ["yes"], ["t"], then_branch=branch(node("Relu", ["o"], ["o"])), else_branch=branch()), POOL],
     YES, "reads 'o', which no node"),
    ([node("If", ["yes"], ["t"], then_branch=branch(node("Identity", ["t"], ["o"])), else_branch=branch()), POOL],
     YES, "reads 't', which no"),
    ([node("If", ["yes"], ["t"], then_branch=nested(15), else_branch=branch()), POOL], YES, "reads 'o', which no node"),
    ([node("If", ["yes"], ["t"], then_branch=branch(), else_branch=branch()), POOL], YES,
     "a branch that does not make all outputs"),
    ([node("If", ["yes"], ["t"], then_branch=branch()), POOL], {"yes": np.array(False)}, "has no else_branch"),
    ([node("If", ["x"], ["t"], then_branch=branch(), else_branch=branch()), POOL], {},
     "computes its input 'x'; required: a constant"),
    ([node("Loop", ["yes"], ["t"], body=branch()), POOL], YES, "not supported; nearest: If with a constant condition"),
    ([node("Pow", ["x", "e"], ["t"]), POOL], {"e": np.float32(3)},
     r"Pow .* makes a function of each element that no layer has; required: one of elu"),
    ([node("Pow", ["x", "e"], ["t"]), POOL], {"e": np.float32(5)},
     "raises to 5 what can be negative; required: an even power"),
    ([node("ConvTranspose", ["x", "w"], ["t"], strides=[2**20, 1]), POOL], {"w": numbers(3, 2, 2, 2)},
     "required: strides from 1 to 256"),
    ([node("ConvTranspose", ["x", "w"], ["t"], dilations=[2**30, 2**30]), POOL], {"w": numbers(3, 2, 2, 2)},
     "are accepted for a source of this size"),
    ([node("ConvTranspose", ["x", "w", "b"], ["t"]), POOL], {"w": numbers(3, 2, 2, 2), "b": numbers(3)},
     r"and bias \(2,\)"),
    ([node("ConvTranspose", ["x", "w"], ["t"], pads=[100] * 4), POOL], {"w": numbers(3, 2, 2, 2)}, "leaves nothing"),
    ([node("ConvTranspose", ["x", "w"], ["t"], output_padding=[2**40, 0]), POOL], {"w": numbers(3, 2, 2, 2)},
     "makes a tensor of .* elements; at most"),
    ([node("LpPool", ["x"], ["t"], kernel_shape=[2**20, 2**20]), POOL], {}, "are accepted for a source of this size"),
    ([node("Max", ["x", "x"], ["t"]), POOL], {}, "compares 2 tensors that are computed"),
    ([node("Max", ["x", "c", "d"], ["t"]), POOL], {"c": np.float32(0), "d": numbers(8)}, "with several numbers"),
    ([node("PRelu", ["x", "s"], ["t"]), POOL], {"s": np.float32(3)}, "slope 3; required: 0 to 1"),
    ([node("Mul", ["x", "w"], ["t"]), POOL], {"w": numbers(1, 1, 8, 9)},
     r"has a constant of shape \(1, 1, 8, 9\) for a tensor"),
    ([node("Mul", ["x", "w"], ["t"]), POOL], {"w": numbers(1, 1, 1, 1, 1)}, "in a shape that broadcasts with it"),
])
def test_hostile_and_unsupported_arithmetic(convert_nodes, nodes, constants, message):
    with pytest.raises(ConversionError, match=message):
        convert_nodes(nodes, constants)


def test_a_split_into_more_parts_than_there_can_be(convert_nodes):
    with pytest.raises(ConversionError, match="splits into 1099511627776 parts"):
        convert_nodes([node("Split", ["x"], ["t"], axis=1, num_outputs=2**40), POOL], opset=18)


def test_constants_that_double_and_double(convert_nodes):
    nodes = [node("Concat", [f"c{i}", f"c{i}"], [f"c{i + 1}"], axis=0) for i in range(60)]
    with pytest.raises(ConversionError, match="are accepted for a source of this size"):
        convert_nodes([*nodes, node("Add", ["x", "c60"], ["t"]), POOL], {"c0": numbers(1024)}, max_constants="50MiB")


def many(op, count, constants=(), **attributes):
    """The same operator again and again, on a constant `c0`, and a sum with what comes out."""
    nodes = [node(op, [f"c{i}", *constants], [f"c{i + 1}"], **attributes) for i in range(count)]
    return [*nodes, node("ReduceMean", [f"c{count}"], ["m"]), node("Add", ["x", "m"], ["t"]), POOL]


EXPANDED = node("Expand", ["small", "large"], ["c0"])  # 10**6 elements, of which one is in memory


@pytest.mark.parametrize("nodes", [
    many("Reshape", 40, ["turned"]), many("Flatten", 40, axis=0), many("Reshape", 40, ["flat"]), many("Relu", 40),
    many("Cast", 40, to=11), many("Identity", 40)])
def test_what_is_small_in_the_file_and_made_again_and_again(convert_nodes, nodes):
    """Views cost little, copies their size, and a larger limit lets them through."""
    constants = {"small": np.float32(1), "large": ints(1000, 1000), "turned": ints(10, 100_000), "flat": ints(-1)}
    if nodes[0].op_type != "Identity":
        with pytest.raises(ConversionError, match=(
                r"\(node \d\d? of 44, .* makes \d+ elements; with them, .* come to \d+MiB, and at most 100MiB are "
                r"accepted for a source of this size; max_constants= \(--max-constants SIZE\) sets another limit, such "
                r"as \d+MiB")):
            convert_nodes([EXPANDED, *nodes], constants, max_constants="100MiB")
        assert convert_nodes([EXPANDED, *nodes], constants, max_constants=2**29).graph
    else:
        assert convert_nodes([EXPANDED, *nodes], constants, max_constants="100MiB").graph


def test_a_constant_that_is_larger_than_the_file(convert_nodes):
    nodes = [node("ConstantOfShape", ["large"], ["c0"]), *many("Identity", 1)]
    constants = {"large": ints(2**12, 2**12)}
    assert convert_nodes(nodes, constants).graph
    with pytest.raises(ConversionError, match="makes 16777216 elements"):
        convert_nodes(nodes, constants, max_constants="100 MiB")
    with pytest.raises(ConversionError, match="max_constants is 'much'; required: a number with one of the units"):
        convert_nodes(nodes, constants, max_constants="much")


def test_steps_count_though_they_make_nothing(convert_nodes):
    """Thirty nodes that make 300,000 views."""
    nodes = []
    for i in range(30):
        nodes += [node("Split", [f"x{i}" if i else "x"], [f"s{i}_{j}" for j in range(10_000)], axis=1),
                  node("Identity", [f"s{i}_0"], [f"x{i + 1}"])]
        nodes[-1] = node("Identity", ["x"], [f"x{i + 1}"])
    parts = [node("Sum", [f"s{i}_9999" for i in range(30)], ["t"])]
    with pytest.raises(ConversionError, match="are accepted for a source of this size"):
        convert_nodes([*nodes, *parts, POOL], shape=("N", 10_000, 1, 1), max_constants="200MiB")


def test_where_the_machine_has_no_memory(convert_nodes, monkeypatch):
    def fail(*arguments):
        raise MemoryError

    monkeypatch.setattr("fastdtd.importers.onnx.reader._parse", fail)
    with pytest.raises(ConversionError, match=r"net\.onnx: the machine has no memory left"):
        convert_nodes([node("Relu", ["x"], ["t"]), POOL])


def test_tensors_moved_again_and_again(convert_nodes):
    nodes = [node("Gather", [f"c{i}", "turned"], [f"c{i + 1}"], axis=3) for i in range(60)]
    with pytest.raises(ConversionError, match="at most 600KiB are accepted"):
        convert_nodes([node("Relu", ["x"], ["c0"]), *nodes, node("Relu", ["c60"], ["t"]), POOL],
                      {"turned": ints(*range(8))[::-1]}, max_constants="600KiB")


def test_transposes_and_reshapes_cost_nothing(convert_nodes):
    """However large the tensor, for no index is made."""
    nodes = []
    for i in range(60):
        nodes += [node("Transpose", [f"c{3 * i}"], [f"c{3 * i + 1}"], perm=[0, 2, 3, 1]),
                  node("Reshape", [f"c{3 * i + 1}", "shape"], [f"c{3 * i + 2}"]),
                  node("Transpose", [f"c{3 * i + 2}"], [f"c{3 * i + 3}"], perm=[0, 3, 1, 2])]
    graph = convert_nodes([node("Relu", ["x"], ["c0"]), *nodes, node("Relu", ["c180"], ["t"]), POOL],
                          {"shape": ints(0, 4096, 4096, 16)}, ("N", 16, 4096, 4096), max_constants="4MiB").graph
    assert [type(layer) for layer in graph] == [g.ReLU, g.ReLU, g.GlobalAveragePool]


# ---- Recognisers: exponents, axes, order and indices are part of the pattern ----


@pytest.mark.parametrize("magnitude", [
    [node("Abs", ["x"], ["a"]), node("Slice", ["a", "end", "begin", "axis", "back"], ["m"])],  # flipped
    [node("Abs", ["x"], ["a"]), node("Slice", ["a", "cut", "end", "axis"], ["p"]),
     node("Slice", ["a", "zero", "cut", "axis"], ["q"]), node("Concat", ["p", "q"], ["m"], axis=3)],  # rolled
    [node("Abs", ["x"], ["a"]), node("Transpose", ["a"], ["m"], perm=[0, 1, 3, 2])],
    [node("Transpose", ["x"], ["a"], perm=[0, 1, 3, 2]), node("Abs", ["a"], ["m"])],
    [node("Transpose", ["x"], ["a"], perm=[0, 2, 1, 3]), node("Abs", ["a"], ["m"])],
    [node("Abs", ["x"], ["a"]), node("Pow", ["a", "two"], ["m"])],
    [node("Abs", ["x"], ["a"]), node("Pow", ["a", "half"], ["m"])],
    [node("Abs", ["x"], ["a"]), node("Pow", ["a", "half"], ["b"]), node("Abs", ["b"], ["m"])],
    [node("Pow", ["x", "four"], ["m"])],
    [node("Relu", ["x"], ["a"]), node("Abs", ["a"], ["m"])],
    [node("Relu", ["x"], ["m"])],
    [node("Abs", ["x"], ["a"]), node("Mul", ["a", "two"], ["m"])],
    [node("Neg", ["x"], ["a"]), node("Abs", ["a"], ["b"]), node("Relu", ["b"], ["m"])],
])
def test_a_sign_times_something_else_than_its_magnitude(convert_nodes, magnitude):
    constants = {"end": ints(4), "begin": ints(-100), "axis": ints(3), "back": ints(-1), "cut": ints(1),
                 "zero": ints(0), "two": np.float32(2), "half": np.float32(0.5), "four": np.float32(4)}
    for reads in (["s", "m"], ["m", "s"]):
        with pytest.raises(ConversionError, match="multiplies two tensors that are computed"):
            convert_nodes([*magnitude, node("Sign", ["x"], ["s"]), node("Mul", reads, ["t"]), POOL], constants,
                          ("N", 4, 4, 4))


NORMALISATION = {
    "square": node("Mul", ["x", "x"], ["s"]), "unsqueeze": node("Unsqueeze", ["s", "one"], ["u"]),
    "pad": node("Pad", ["u", "pads"], ["p"]),
    "pool": node("AveragePool", ["p"], ["m"], kernel_shape=[3, 1, 1], strides=[1, 1, 1]),
    "squeeze": node("Squeeze", ["m", "one"], ["q"]), "alpha": node("Mul", ["q", "alpha"], ["a"]),
    "bias": node("Add", ["a", "bias"], ["b"]), "beta": node("Pow", ["b", "beta"], ["c"]),
    "divide": node("Div", ["x", "c"], ["t"])}
ITS_CONSTANTS = {"one": ints(1), "pads": ints(0, 0, 1, 0, 0, 0, 0, 1, 0, 0), "alpha": np.float32(0.3),
                 "bias": np.float32(1), "beta": np.float32(0.5), "axis": ints(3), "end": ints(8), "begin": ints(-100),
                 "back": ints(-1)}


@pytest.mark.parametrize(("change", "constants"), [
    ({"bias": node("Pow", ["a", "beta"], ["b"]), "beta": node("Add", ["b", "bias"], ["c"])}, {}),  # raised before
    ({"alpha": node("Add", ["q", "bias"], ["a"]), "bias": node("Mul", ["a", "alpha"], ["b"])}, {}),  # scaled after
    ({"alpha": node("Pow", ["q", "beta"], ["a"]), "bias": node("Mul", ["a", "alpha"], ["b"]),
      "beta": node("Add", ["b", "bias"], ["c"])}, {}),
    ({}, {"pads": ints(0, 0, 2, 0, 0, 0, 0, 0, 0, 0)}),  # windows that begin elsewhere
    ({"pool": node("AveragePool", ["p"], ["m"], kernel_shape=[1, 3, 1], strides=[1, 1, 1])},
     {"pads": ints(0, 0, 0, 1, 0, 0, 0, 0, 1, 0)}),
    ({"pad": node("Identity", ["u"], ["p"]), "pool": node("AveragePool", ["p"], ["m"], kernel_shape=[3, 1, 1],
                                                          strides=[1, 1, 1], pads=[1, 0, 0, 1, 0, 0])}, {}),
    ({"pad": node("Identity", ["u"], ["p"]), "pool": node("AveragePool", ["p"], ["m"], kernel_shape=[3, 1, 1],
                                                          strides=[1, 1, 1], auto_pad="SAME_UPPER")}, {}),
    ({"pool": node("AveragePool", ["p"], ["m"], kernel_shape=[3, 1, 1], auto_pad="SAME_LOWER")}, {}),
    ({"pool": node("MaxPool", ["p"], ["m"], kernel_shape=[3, 1, 1])}, {}),
    ({"squeeze": node("Squeeze", ["m", "one"], ["z"]), "alpha": node("Transpose", ["z"], ["q"], perm=[0, 1, 3, 2]),
      "more": node("Mul", ["q", "alpha"], ["a"])}, {}),
    ({"square": node("Slice", ["x", "end", "begin", "axis", "back"], ["o"]), "again": node("Mul", ["o", "o"], ["s"])},
     {}),
    ({"divide": node("Transpose", ["x"], ["o"], perm=[0, 1, 3, 2]), "more": node("Div", ["o", "c"], ["t"])}, {}),
    ({"divide": node("Div", ["c", "x"], ["t"])}, {}),
    ({}, {"alpha": np.float32([[[[[0.3]]]]])}),  # one axis more
    ({}, {"bias": np.float32([[[1]], [[2]], [[3]]])}),
    ({"beta": node("Pow", ["b", "beta"], ["d"]), "divide": node("Pow", ["d", "beta"], ["c"]),
      "more": node("Div", ["x", "c"], ["t"])}, {}),
])
def test_what_is_almost_a_local_response_normalisation(convert_nodes, change, constants):
    order = ["square", "again", "unsqueeze", "pad", "pool", "squeeze", "alpha", "more", "bias", "beta", "divide"]
    if "divide" in change and "more" in change:
        order = [*(name for name in order if name != "more"), "more"]
    made = {**NORMALISATION, **change}
    with pytest.raises(ConversionError, match=r"part of a local response normalisation|divides by"):
        convert_nodes([*(made[name] for name in order if name in made), POOL], {**ITS_CONSTANTS, **constants},
                      ("N", 3, 8, 8))


def test_a_local_response_normalisation(convert_nodes):
    graph = convert_nodes([*NORMALISATION.values(), POOL], ITS_CONSTANTS, ("N", 3, 8, 8)).graph
    norm, = (layer for layer in graph if isinstance(layer, g.LocalResponseNorm))
    assert (norm.size, norm.bias, norm.beta) == (3, 1, 0.5)
    assert norm.alpha == pytest.approx(0.3)


# ---- bfloat16 ----


@pytest.mark.parametrize("raw", [True, False])
@pytest.mark.parametrize("cast", [True, False])
def test_weights_in_bfloat16(convert_nodes, raw, cast):
    values = np.float32([1.5, -2, 0.25, 3, -1e-20, 1e30, 0, -0.125]).reshape(2, 4, 1, 1)
    upper = (values.view(np.uint32) >> 16).ravel()
    tensor = onnx.TensorProto(name="w", data_type=TensorProto.BFLOAT16, dims=values.shape)
    if raw:
        tensor.raw_data = upper.astype("<u2").tobytes()
    else:
        tensor.int32_data.extend(upper.tolist())
    kept = (upper.astype(np.uint32) << 16).view(np.float32).reshape(values.shape)
    nodes = [node("Cast", ["w"], ["v"], to=TensorProto.FLOAT), node("Conv", ["x", "v" if cast else "w"], ["t"]), *END]
    conv, _ = convert_nodes(nodes[not cast:], shape=("N", *X.shape[1:]), opset=22, verify=False,
                            change=lambda model: model.graph.initializer.append(tensor)).graph
    np.testing.assert_array_equal(conv.weight, kept)


def test_constants_rounded_to_bfloat16(convert_nodes):
    """To the nearest, and to the even one of two."""
    values = np.float32([1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8 - 2**-12, 1]).reshape(4, 1, 1)
    nodes = [node("Cast", ["c"], ["d"], to=TensorProto.BFLOAT16), node("Cast", ["d"], ["e"], to=TensorProto.FLOAT),
             node("Mul", ["x", "e"], ["t"]), *END]
    scale, _ = convert_nodes(nodes, {"c": values}, ("N", *X.shape[1:])).graph
    np.testing.assert_array_equal(scale.weight.ravel(), [1, 1 + 2**-6, -1 - 2**-7, 1])


def test_a_constant_cast_like_another(convert_nodes):
    nodes = [node("CastLike", ["c", "x0"], ["d"]), node("Mul", ["x", "d"], ["t"]), *END]
    scale, _ = convert_nodes(nodes, {"c": ints(1, 2, 3, 4).reshape(4, 1, 1), "x0": np.float32(0)}, ("N", *X.shape[1:]),
                             15).graph
    np.testing.assert_array_equal(scale.weight.ravel(), [1, 2, 3, 4])
    nodes[0] = node("CastLike", ["c", "x"], ["d"])  # like what is computed
    scale, _ = convert_nodes(nodes, {"c": ints(1, 2, 3, 4).reshape(4, 1, 1)}, ("N", *X.shape[1:]), 15).graph
    np.testing.assert_array_equal(scale.weight.ravel(), [1, 2, 3, 4])


def test_the_largest_of_constants(convert_nodes):
    """Folded among themselves first, whatever the order."""
    for names in (["a", "b", "x"], ["x", "b", "a"], ["b", "x", "a"]):
        clip, _ = convert_nodes([node("Min", names, ["t"]), *END], {"a": np.float32(3), "b": np.float32([[2]])},
                                ("N", *X.shape[1:])).graph
        assert (clip.low, clip.high) == (-np.inf, 2)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_onnx_s_own_cases_hold_nothing_that_is_not_read():
    """Every attribute and input of every operator in them is read, ignored for a reason, or refused for its value."""
    from onnx.backend.test.case.node import collect_testcases

    from fastdtd.importers.onnx import constants, operators, parse, reader

    known = operators.OPERATORS.keys() | constants.OPERATORS.keys()
    parsed, refused = 0, {}
    for case in collect_testcases(""):
        if case.model is None or not {node.op_type for node in case.model.graph.node} <= known:
            continue
        assert max(entry.version for entry in case.model.opset_import if not entry.domain) <= reader.NEWEST_OPSET
        try:
            parse(case.model.SerializeToString())
            parsed += 1
        except FastDTDError as error:
            refused[case.name] = str(error)
    assert parsed > 80
    unread = ("which is not supported; required", "that it has not in opset")
    assert not {name: text for name, text in refused.items() if any(part in text for part in unread)}


@pytest.mark.parametrize("coordinates", ["half_pixel", "pytorch_half_pixel", "align_corners", "asymmetric"])
@pytest.mark.parametrize(("scales", "sizes"), [((1, 1, 2, 3), None), ((1, 1, 2 / 3, 1.25), None),
                                               (None, (1, 3, 1, 20))])
def test_bilinear_resizing(convert_nodes, coordinates, scales, sizes):
    """As the specification's reference computes it."""
    from onnx.reference import ReferenceEvaluator

    constants = {"f": np.float32(scales)} if scales else {"f": np.float32([]), "s": ints(*sizes)}
    nodes = [node("Resize", ["x", "", "f", *([] if scales else ["s"])], ["t"], mode="linear",
                  coordinate_transformation_mode=coordinates), POOL]
    made = onnx.ModelProto.FromString(onnx_file([*nodes[:1], node("Flatten", ["t"], ["y"])], constants))
    x = numbers(1, 3, 9, 8)
    expected, = ReferenceEvaluator(made).run(None, {"x": x})
    graph = convert_nodes([*nodes[:1], node("Flatten", ["t"], ["y"])], constants).graph
    assert [type(layer) for layer in graph] == [g.Resize, g.Flatten]
    np.testing.assert_allclose(scores(graph, x), expected, rtol=1e-4, atol=1e-5)


def group_normed(x, groups, epsilon, axes=None):
    """x (1, C, H, W), by the statistics of groups of its channels at all positions, or over axes."""
    parts = x.reshape(1, groups, -1) if axes is None else x
    over = -1 if axes is None else axes
    deviations = parts - parts.mean(over, keepdims=True)
    return (deviations / np.sqrt((deviations**2).mean(over, keepdims=True) + epsilon)).reshape(x.shape)


SIX = numbers(6) + 2, numbers(6, seed=1)
COLUMN = (1, 6, 1, 1)


@pytest.mark.parametrize(("nodes", "groups", "per_position"), [
    ([node("GroupNormalization", ["t", "scale", "shift"], ["n"], num_groups=2, epsilon=0.1)], 2, False),
    ([node("InstanceNormalization", ["t", "scale", "shift"], ["n"], epsilon=0.1)], 6, False),
    ([node("Transpose", ["t"], ["a"], perm=[0, 2, 3, 1]),
      node("LayerNormalization", ["a", "scale", "shift"], ["b"], epsilon=0.1),
      node("Transpose", ["b"], ["n"], perm=[0, 3, 1, 2])], 1, True),
    ([node("ReduceMean", ["t", "channels"], ["m"]), node("Sub", ["t", "m"], ["d"]), node("Mul", ["d", "d"], ["s"]),
      node("ReduceMean", ["s", "channels"], ["v"]), node("Add", ["epsilon", "v"], ["e"]), node("Sqrt", ["e"], ["r"]),
      node("Div", ["d", "r"], ["q"]), node("Mul", ["q", "scales"], ["p"]), node("Add", ["p", "shifts"], ["n"])],
     1, True),
    ([node("ReduceMean", ["t", "channels"], ["m"]), node("Sub", ["t", "m"], ["d"]), node("Sub", ["t", "m"], ["d2"]),
      node("Pow", ["d2", "two"], ["s"]), node("ReduceMean", ["s", "channels"], ["v"]),
      node("Add", ["v", "epsilon"], ["e"]), node("Sqrt", ["e"], ["r"]), node("Reciprocal", ["r"], ["i"]),
      node("Mul", ["i", "d"], ["q"]), node("Mul", ["scales", "q"], ["p"]), node("Add", ["p", "shifts"], ["n"])],
     1, True),
    ([node("Reshape", ["t", "grouped"], ["g"]),
      node("InstanceNormalization", ["g", "ones", "zeros"], ["q"], epsilon=0.1),
      node("Reshape", ["q", "back"], ["o"]), node("Mul", ["o", "scales"], ["p"]), node("Add", ["p", "shifts"], ["n"])],
     2, False),
    ([node("ReduceMean", ["t", "pixels"], ["m"]), node("Sub", ["t", "m"], ["d"]), node("Mul", ["d", "d"], ["s"]),
      node("ReduceMean", ["s", "pixels"], ["v"]), node("Add", ["v", "epsilon"], ["e"]),
      node("Pow", ["e", "half"], ["r"]),
      node("Div", ["d", "r"], ["q"]), node("Mul", ["q", "scales"], ["p"]), node("Add", ["p", "shifts"], ["n"])],
     6, False),
])
def test_norms_by_the_image_s_own_statistics(convert_nodes, nodes, groups, per_position):
    """One layer of each, however it is written; no element moves."""
    constants = {"w": numbers(6, 3, 2, 2), "scale": SIX[0], "shift": SIX[1], "scales": SIX[0].reshape(COLUMN),
                 "shifts": SIX[1].reshape(COLUMN), "channels": ints(1), "pixels": ints(2, 3),
                 "epsilon": np.float32(0.1), "two": np.float32(2), "half": np.float32(0.5),
                 "grouped": ints(0, 2, -1), "back": ints(1, 6, 8, 7),
                 "ones": np.ones(2, np.float32), "zeros": np.zeros(2, np.float32)}
    conv = node("Conv", ["x", "w"], ["t"])
    graph = convert_nodes([conv, *nodes, node("Flatten", ["n"], ["y"])], constants, opset=21).graph
    _, norm, _ = graph
    assert (norm.groups, norm.per_position) == (groups, per_position)
    x = numbers(1, 3, 9, 8)
    before = scores(convert_nodes([conv, node("Flatten", ["t"], ["y"])], constants, opset=21).graph, x)
    expected = group_normed(before.reshape(1, 6, 8, 7), groups, 0.1, 1 if per_position else None)
    expected = expected * SIX[0].reshape(COLUMN) + SIX[1].reshape(COLUMN)
    np.testing.assert_allclose(scores(graph, x), expected.reshape(1, -1), rtol=1e-4, atol=1e-4)


DEVIATION = [node("ReduceMean", ["x", "channels"], ["m"]), node("Sub", ["x", "m"], ["d"])]
VARIANCE = [*DEVIATION, node("Mul", ["d", "d"], ["s"]), node("ReduceMean", ["s", "channels"], ["v"]),
            node("Add", ["v", "epsilon"], ["e"]), node("Sqrt", ["e"], ["r"])]
STATISTICS = {"channels": ints(1), "pixels": ints(2, 3), "epsilon": np.float32(0.1), "two": np.float32([[[2]]])}


@pytest.mark.parametrize(("nodes", "function"), [
    ([*DEVIATION, node("Mul", ["d", "two"], ["t"])], lambda x: 2 * (x - x.mean(1, keepdims=True))),
    ([*DEVIATION, node("Mul", ["d", "d"], ["t"])], lambda x: (x - x.mean(1, keepdims=True))**2),
    ([*VARIANCE, node("Mul", ["r", "two"], ["t"])], lambda x: 2 * np.sqrt(x.var(1, keepdims=True) + np.float32(0.1))),
    ([node("ReduceMean", ["x", "channels"], ["m"]), node("Sub", ["m", "x"], ["t"])], None),
    ([*DEVIATION, node("Mul", ["d", "d"], ["s"]), node("ReduceMean", ["s", "pixels"], ["t"])],
     lambda x: ((x - x.mean(1, keepdims=True))**2).mean((2, 3), keepdims=True)),
])
def test_parts_of_norms(convert_nodes, nodes, function):
    """Each operator by itself; a mean broadcasts where it is subtracted, and nowhere else yet."""
    nodes = [*nodes, node("Flatten", ["t"], ["y"])]
    if function is None:
        with pytest.raises(ConversionError, match=r"adds .*required: tensors of one shape"):
            convert_nodes(nodes, STATISTICS, opset=18)
        return
    x = numbers(1, 3, 9, 8)
    found = scores(convert_nodes(nodes, STATISTICS, opset=18).graph, x)
    np.testing.assert_allclose(found, function(x).reshape(1, -1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("last", [
    node("Div", ["x", "r"], ["t"]), node("Div", ["m", "r"], ["t"]), node("Div", ["r", "d"], ["t"]),
])
def test_what_is_almost_a_norm(convert_nodes, last):
    with pytest.raises(ConversionError, match="divides by"):
        convert_nodes([*VARIANCE, last, POOL], STATISTICS, opset=18)


def global_response_nodes(how):
    """From 't' to 'n', as exporters write it: the channels last or first, and the norm as one operator or several."""
    norm = {"ReduceL2": [node("ReduceL2", ["a", "pixels"], ["g"])],
            "Pow": [node("Pow", ["a", "two"], ["s"]), node("ReduceSum", ["s", "pixels"], ["m"]),
                    node("Sqrt", ["m"], ["g"])],
            "Mul": [node("Mul", ["a", "a"], ["s"]), node("ReduceSum", ["s", "pixels"], ["m"]),
                    node("Pow", ["m", "half"], ["g"])]}[how]
    return [*norm, node("ReduceMean", ["g", "channels"], ["mean"]), node("Add", ["mean", "epsilon"], ["e"]),
            node("Div", ["g", "e"], ["r"]), node("Mul", ["a", "r"], ["p"]), node("Mul", ["scales", "p"], ["q"])]


ENDS = {"shift, then input": [node("Add", ["q", "shifts"], ["h"]), node("Add", ["h", "a"], ["b"])],
        "input, then shift": [node("Add", ["a", "q"], ["h"]), node("Add", ["shifts", "h"], ["b"])]}


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("how", ["ReduceL2", "Pow", "Mul"])
@pytest.mark.parametrize("is_last", [True, False])
def test_global_response_norm(convert_nodes, how, end, is_last):
    """y = (1 + gamma N) x + beta, N = G / (mean of G + epsilon), by the formula in float64, also where it is zero."""
    order, back = ([0, 2, 3, 1], [0, 3, 1, 2]) if is_last else ([0, 1, 2, 3], [0, 1, 2, 3])
    shape = (1, 1, 1, 6) if is_last else (1, 6, 1, 1)
    nodes = [node("Conv", ["x", "w"], ["t"]), node("Transpose", ["t"], ["a"], perm=order), *global_response_nodes(how),
             *ENDS[end], node("Transpose", ["b"], ["n"], perm=back)]
    constants = {"w": numbers(6, 3, 2, 2), "scales": SIX[0].reshape(shape), "shifts": SIX[1].reshape(shape),
                 "channels": ints(-1 if is_last else 1), "pixels": ints(1, 2) if is_last else ints(2, 3),
                 "epsilon": np.float32(0.1), "two": np.float32(2), "half": np.float32(0.5)}
    graph = convert_nodes([*nodes, node("Flatten", ["n"], ["y"])], constants, opset=18, verify=True).graph
    assert [type(layer) for layer in graph] == [
        g.Conv2d, g.Power, g.GlobalAveragePool, g.Power, g.GroupNorm, g.Power, g.Conv2d, g.Multiply, g.Conv2d,
        g.Flatten]
    x = np.concatenate([numbers(1, 3, 9, 8), np.zeros((1, 3, 9, 8), np.float32)])
    plain = convert_nodes([nodes[0], node("Flatten", ["t"], ["y"])], constants).graph
    before = scores(plain, x).astype(float).reshape(2, 6, -1)
    length = np.sqrt((before**2).sum(2, keepdims=True))
    response = length / (length.mean(1, keepdims=True) + 0.1)
    expected = before * (1 + SIX[0].reshape(6, 1) * response) + SIX[1].reshape(6, 1)
    np.testing.assert_allclose(scores(graph, x), expected.reshape(2, -1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("nodes", [
    [*global_response_nodes("ReduceL2")[:2], node("Div", ["g", "mean"], ["r"])],  # which nothing keeps from zero
    [node("ReduceL2", ["a", "pixels"], ["g"]), node("ReduceL2", ["a", "channels"], ["other"]),
     node("Div", ["g", "other"], ["r"])],
    [*global_response_nodes("ReduceL2")[:3], node("Div", ["a", "e"], ["r"])],
])
def test_what_is_almost_a_global_response_norm(convert_nodes, nodes):
    constants = {"channels": ints(1), "pixels": ints(2, 3), "epsilon": np.float32(0.1)}
    with pytest.raises(ConversionError, match="divides by what is computed"):
        convert_nodes([node("Identity", ["x"], ["a"]), *nodes, node("Flatten", ["r"], ["y"])], constants, opset=18)


def test_a_euclidean_norm_by_itself(convert_nodes):
    x = numbers(2, 3, 9, 8)
    for keep in (0, 1):
        nodes = [node("ReduceL2", ["x", "pixels"], ["t"], keepdims=keep), node("Flatten", ["t"], ["y"])]
        made = convert_nodes(nodes, {"pixels": ints(2, 3)}, opset=18).graph
        np.testing.assert_allclose(scores(made, x), np.sqrt((x**2).sum((2, 3))), rtol=1e-5)
