"""Which output of a source is converted, and sources whose outputs are maps or probabilities along any axis."""

import logging

import numpy as np
import pytest
from importing import caffemodel, converter_of_nodes, ints, node, numbers
from keras_models import CONVOLUTION, POOL, WEIGHTS, keras_file, layer

import fastdtd
from fastdtd import graph as g
from fastdtd.errors import ConversionError, ModelError
from fastdtd.explainer import Explainer
from fastdtd.importers import convert
from fastdtd.model import Model, Preprocessing

SHAPE = 1, 3, 9, 8


@pytest.fixture
def convert_nodes(tmp_path):
    pytest.importorskip("onnx")
    return converter_of_nodes(tmp_path)


def conv(source, to, channels=5, weight="w"):
    return node("Conv", [source, weight], [to])


W = {"w": numbers(5, 3, 3, 3), "v": numbers(4, 3, 1, 1, seed=1)}


@pytest.mark.parametrize(("after", "ending"), [
    ([], None), ([("Softmax", {"axis": 1})], "softmax"), ([("LogSoftmax", {"axis": 1})], "log_softmax"),
    ([("Sigmoid", {})], "sigmoid"), ([("Softmax", {"axis": 2})], "softmax"), ([("Softmax", {"axis": -1})], "softmax"),
    ([("Transpose", {"perm": (0, 2, 3, 1)})], None),
    ([("Transpose", {"perm": (0, 2, 3, 1)}), ("Softmax", {"axis": -1})], "softmax"),
    ([("Softmax", {"axis": 1}), ("Transpose", {"perm": (0, 2, 3, 1)})], "softmax"),
    ([("Sigmoid", {}), ("Transpose", {"perm": (0, 2, 3, 1)})], "sigmoid"),
    ([("Transpose", {"perm": (0, 3, 2, 1)})], "other"),
    ([("Softmax", {"axis": 1}), ("Transpose", {"perm": (0, 3, 2, 1)})], "other"),
])
def test_maps_have_their_channels_first(convert_nodes, after, ending):
    """Scores are compared with ONNX's own, whatever the order and the probabilities."""
    nodes, last = [conv("x", "t0")], "t0"
    for i, (kind, attributes) in enumerate(after, 1):
        nodes.append(node(kind, [last], [f"t{i}"], **attributes))
        last = f"t{i}"
    model = convert_nodes(nodes, W, SHAPE, outputs=[last], verify=True)
    assert model.graph.output_shape == ((6, 7, 5) if ending == "other" else (5, 7, 6))
    assert not any(isinstance(one, (g.Softmax, g.Activation)) for one in model.graph)
    assert len(model.graph.layers) == (2 if ending == "other" else 1)


def test_a_softmax_of_moved_scores(convert_nodes):
    """As detectors write it: all positions and anchors in one row, and the classes of each last."""
    nodes = [conv("x", "a"), node("Transpose", ["a"], ["b"], perm=(0, 2, 3, 1)), node("Reshape", ["b", "s"], ["c"]),
             conv("x", "d", weight="v"), node("Transpose", ["d"], ["e"], perm=(0, 2, 3, 1)),
             node("Reshape", ["e", "s"], ["f"]), node("Concat", ["c", "f"], ["h"], axis=1),
             node("Softmax", ["h"], ["y"], axis=2)]
    weights = {"w": numbers(4, 3, 3, 3), "v": numbers(6, 3, 1, 1, seed=1), "s": ints(1, -1, 2)}
    model = convert_nodes(nodes, weights, SHAPE, verify=True)
    assert model.graph.output_shape == (7 * 6 * 2 + 9 * 8 * 3, 1, 2)
    e = Explainer(model)(np.random.default_rng(0).random((2, 3, 9, 8), np.float32), target=(100, 0, 1))
    assert e.output.shape == (2, 300, 1, 2)


@pytest.mark.parametrize("axis", [1, 2, 3, -1])
def test_a_softmax_to_the_end(convert_nodes, axis):
    """Before opset 13 it goes over all axes from there."""
    model = convert_nodes([conv("x", "t"), node("Softmax", ["t"], ["y"], axis=axis)], W, SHAPE, opset=11, verify=True)
    assert model.graph.output_shape == (5, 7, 6)


def test_classes_that_are_one_pixel_are_no_map(convert_nodes):
    for perm, shape in (((0, 2, 3, 1), None), ((0, 1, 2, 3), None)):
        nodes = [conv("x", "a"), node("GlobalAveragePool", ["a"], ["b"]), node("Transpose", ["b"], ["y"], perm=perm)]
        assert convert_nodes(nodes, W, SHAPE, verify=True).graph.output_shape == (5, 1, 1), shape


TWO = [conv("x", "hidden"), node("Relu", ["hidden"], ["r"]), node("GlobalAveragePool", ["r"], ["p"]),
       node("Flatten", ["p"], ["first"]), node("MatMul", ["first", "m"], ["second"])]
CONSTANTS = W | {"m": numbers(5, 2, seed=2)}


@pytest.mark.parametrize(("output", "shape"), [
    (None, (5, 1, 1)), (0, (5, 1, 1)), (1, (2, 1, 1)), ("first", (5, 1, 1)), ("second", (2, 1, 1)),
    ("hidden", (5, 7, 6)), ("r", (5, 7, 6)), (np.int64(1), (2, 1, 1)),
])
def test_outputs_of_onnx(convert_nodes, output, shape, caplog):
    model = convert_nodes(TWO, CONSTANTS, SHAPE, outputs=["first", "second"], output=output, verify=True)
    assert model.graph.output_shape == shape
    assert model.provenance.get("output") == (None if output is None else str(output))
    said = "2 outputs, 'first', 'second': the first is explained; output= (--output) chooses another"
    assert (said in caplog.text) == (output is None)


@pytest.mark.parametrize(("output", "message"), [
    ("third", "output 'third' was asked for; required: one of 'first', 'second', or a number from 0 to 1"),
    (2, "output 2 was asked for"), (-1, "output -1 was asked for"), (True, "output True was asked for"),
    (1.0, r"output 1.0 was asked for"), (["first"], "its number or its name"), ("x", "output 'x' was asked for"),
    ("w", "output 'w' was asked for"),
])
def test_outputs_that_there_are_not(convert_nodes, output, message):
    with pytest.raises(ConversionError, match=message):
        convert_nodes(TWO, CONSTANTS, SHAPE, outputs=["first", "second"], output=output)


def functional(tmp_path, outputs):
    entries = [layer("InputLayer", "x", batch_shape=[None, 6, 5, 2]), CONVOLUTION, POOL,
               layer("Dense", "more", units=2, activation="softmax")]
    before = {"conv": "x", "pool": "conv", "more": "pool"}
    for entry in entries:
        name = entry["name"] = entry["config"]["name"]
        entry["inbound_nodes"] = [[[before[name], 0, 0, {}]]] if name in before else []
    config = {"name": "net", "layers": entries, "input_layers": [["x", 0, 0]],
              "output_layers": [[name, 0, 0] for name in outputs]}
    weights = WEIGHTS | {"layers/dense/vars/0": numbers(3, 2), "layers/dense/vars/1": numbers(2, seed=1)}
    return keras_file(tmp_path, weights=weights, config={"class_name": "Functional", "config": config})


@pytest.mark.parametrize(("output", "shape"), [
    (None, (3, 1, 1)), (0, (3, 1, 1)), (1, (2, 1, 1)), ("pool", (3, 1, 1)), ("more", (2, 1, 1)), ("conv", (3, 5, 4))])
def test_outputs_of_keras(tmp_path, output, shape, caplog):
    model = convert(functional(tmp_path, ["pool", "more"]), output=output)
    assert model.graph.output_shape == shape
    assert ("the first is explained" in caplog.text) == (output is None)


def test_layers_of_a_sequential_model(tmp_path, caplog):
    assert convert(keras_file(tmp_path), output="conv").graph.output_shape == (3, 5, 4)
    assert convert(keras_file(tmp_path), output=0).graph.output_shape == (3, 1, 1)
    assert convert(keras_file(tmp_path)).graph.output_shape == (3, 1, 1)
    assert "the first is" not in caplog.text
    for wrong in ("dense", 1):
        with pytest.raises(ConversionError, match=f"output {wrong!r} was asked for; required: one of "):
            convert(keras_file(tmp_path), output=wrong)


def test_maps_of_keras_have_their_channels_first(tmp_path):
    """Of (N, H, W, C): each element is where the channels-first network has it."""
    model = convert(functional(tmp_path, ["conv"]))
    image = numbers(1, 2, 6, 5, seed=3)
    made = Explainer(model).predict(image)
    weight, bias = (WEIGHTS[f"layers/conv2d/vars/{i}"] for i in range(2))
    patch = image[0, :, 2:4, 1:3]
    np.testing.assert_allclose(made[0, :, 2, 1], np.maximum(np.einsum("cij,ijck->k", patch, weight) + bias, 0),
                               rtol=1e-5, atol=1e-6)


PROTOTXT = """
name: "net"
layer { name: "data" type: "Input" top: "data" input_param { shape { dim: 1 dim: 2 dim: 5 dim: 4 } } }
layer { name: "c" type: "Convolution" bottom: "data" top: "c"
        convolution_param { num_output: 3 kernel_size: 1 bias_term: false } }
layer { name: "r" type: "ReLU" bottom: "c" top: "r" }
layer { name: "p" type: "Pooling" bottom: "r" top: "p" pooling_param { pool: AVE global_pooling: true } }
layer { name: "q" type: "Pooling" bottom: "r" top: "q" pooling_param { pool: MAX kernel_size: 2 stride: 2 } }
"""


@pytest.mark.parametrize(("output", "shape"), [(None, (3, 1, 1)), (1, (3, 3, 2)), ("q", (3, 3, 2)), ("p", (3, 1, 1))])
def test_outputs_of_caffe(tmp_path, output, shape, caplog):
    pytest.importorskip("google.protobuf")
    (tmp_path / "net.prototxt").write_text(PROTOTXT)
    (tmp_path / "net.caffemodel").write_bytes(caffemodel({"c": [numbers(3, 2, 1, 1)]}))
    model = convert(tmp_path / "net.prototxt", tmp_path / "net.caffemodel", output=output)
    assert model.graph.output_shape == shape
    assert ("2 outputs, 'p', 'q'" in caplog.text) == (output is None)
    with pytest.raises(ConversionError, match="output 'r' was asked for"):
        convert(tmp_path / "net.prototxt", tmp_path / "net.caffemodel", output="r")


def test_the_command_line(convert_nodes, tmp_path, capsys):
    from fastdtd import cli

    convert_nodes(TWO, CONSTANTS, SHAPE, outputs=["first", "second"], verify=False)
    for given, outputs in (("second", 2), ("1", 2), ("r", 5)):
        assert cli.main(["convert", str(tmp_path / "net.onnx"), str(tmp_path / "net.h5"), "--output", given]) == 0
        assert fastdtd.load(tmp_path / "net.h5").graph.output_shape[0] == outputs
    assert cli.main(["convert", str(tmp_path / "net.onnx"), str(tmp_path / "net.h5"), "--output", "third"]) != 0
    assert "required: one of 'first', 'second'" in capsys.readouterr().err


# ---- Binary classifiers ----------------------------------------------------------------------------------------------


def binary(last, *after):
    rng = np.random.default_rng(0)
    return g.Graph((
        g.Conv2d("c", (g.INPUT,), rng.standard_normal((4, 2, 2, 2)), rng.standard_normal(4)), g.ReLU("r", ("c",)),
        *last, *after), (2, 5, 6), (-1.0, 1.0))


DENSE = g.GlobalAveragePool("p", ("r",)), g.Dense("d", ("p",), numbers(1, 4), [0.5])
LATE = g.Conv2d("d", ("r",), numbers(1, 4, 2, 2)), g.GlobalAveragePool("p", ("d",)), g.Flatten("f", ("p",))
MAP = g.Conv2d("d", ("r",), numbers(1, 4, 2, 2), [-0.25]),


@pytest.mark.parametrize("last", [DENSE, LATE, MAP], ids=["dense", "convolution", "map"])
def test_two_names_for_one_output(last):
    one, model = binary(last), Model(binary(last), Preprocessing(None), ("no", "yes"))
    batch = np.random.default_rng(1).uniform(-1, 1, (20, 2, 5, 6)).astype(np.float32)
    own, both = Explainer(Model(one, Preprocessing(None))), Explainer(model)
    y = own.predict(batch)
    np.testing.assert_allclose(both.predict(batch), np.concatenate([-y, y], 1), rtol=1e-5, atol=1e-6)
    assert len(both.predict(batch)[0]) == 2
    e = both(batch)
    if last is not MAP:
        assert [e.class_name(i) for i in range(20)] == ["yes" if one > 0 else "no" for one in y[:, 0]]
    if last is DENSE:
        assert (e.explained > 0).all()  # one of the two always is
        np.testing.assert_array_equal(both(batch, "yes").relevance, own(batch, 0).relevance)
    np.testing.assert_allclose(e.sum + e.absorbed, e.explained, rtol=1e-5)
    if last is DENSE:
        weight, bias = last[1].weight, last[1].bias
        opposite = binary((last[0], g.Dense("d", ("p",), -weight, -bias)))
        np.testing.assert_array_equal(both(batch, "no").relevance,
                                      Explainer(Model(opposite, Preprocessing(None)))(batch, 0).relevance)
    again = Model(model.graph, Preprocessing(None), ("no", "yes"))
    assert again.graph.output_shape == model.graph.output_shape


@pytest.mark.parametrize("last", [(g.GlobalAveragePool("p", ("r",)), g.Dense("d", ("p",), numbers(1, 4)), g.ReLU("q", (
    "d",))), (g.Conv2d("d", ("r",), numbers(1, 4, 1, 1)), g.Conv2d("e", ("d",), numbers(1, 1, 1, 1)), g.Add(
        "a", ("d", "e")))], ids=["activation", "sum"])
def test_what_has_no_complement(last):
    with pytest.raises(ModelError, match="two classes are named for the one output"):
        Model(binary(last), Preprocessing(None), ("no", "yes"))


def test_a_converted_binary_classifier(convert_nodes, tmp_path):
    """Its logit is compared with the source's sigmoid, before it gets its complement."""
    nodes = [*TWO[:4], node("MatMul", ["first", "m"], ["z"]), node("Sigmoid", ["z"], ["y"])]
    model = convert_nodes(nodes, W | {"m": numbers(5, 1, seed=2)}, SHAPE, labels=["no", "yes"], verify=True)
    assert (model.graph.output_shape, model.classes) == ((2, 1, 1), ("no", "yes"))
    assert "verified" in model.provenance
    fastdtd.save(model, tmp_path / "net.h5")
    again = fastdtd.load(tmp_path / "net.h5")
    assert (again.graph.output_shape, again.classes) == ((2, 1, 1), ("no", "yes"))


logging.getLogger("fastdtd").propagate = True
