"""Networks with several inputs, such as a picture and a vector."""

import naive
import numpy as np
import pytest
from importing import converter_of_nodes, node, numbers
from keras_models import keras_file, layer
from PIL import Image

import fastdtd
from fastdtd import cli
from fastdtd import graph as g
from fastdtd.errors import ConversionError, InputError, ModelError
from fastdtd.explainer import Explainer
from fastdtd.importers import convert
from fastdtd.model import Model, Preprocessing

SHAPES = {"picture": (3, 5, 6), "age": (4, 1, 1)}
TOTAL = 3 * 5 * 6 + 4


def network(box=(-1.0, 1.0)):
    """A convolution of the picture, joined with the vector before a dense layer."""
    rng = np.random.default_rng(0)
    return g.Graph((
        g.Rearrange("picture", (g.INPUT,), np.arange(90).reshape(3, 5, 6)),
        g.Rearrange("age", (g.INPUT,), np.arange(90, 94).reshape(4, 1, 1)),
        g.Conv2d("conv", ("picture",), rng.standard_normal((5, 3, 3, 3)), rng.standard_normal(5)),
        g.ReLU("r", ("conv",)),
        g.GlobalAveragePool("pool", ("r",)), g.Concat("both", ("pool", "age")),
        g.Dense("hidden", ("both",), rng.standard_normal((6, 9)), rng.standard_normal(6)), g.ReLU("q", ("hidden",)),
        g.Dense("scores", ("q",), rng.standard_normal((3, 6)))), (TOTAL, 1, 1), box)


def model(**options):
    return Model(network(**options), Preprocessing(None), inputs=SHAPES)


def batch(count=3, seed=1):
    rng = np.random.default_rng(seed)
    return {"picture": rng.uniform(-1, 1, (count, 3, 5, 6)).astype(np.float32),
            "age": rng.uniform(-1, 1, (count, 4)).astype(np.float32)}


def flat(inputs):
    return np.concatenate([one.reshape(len(one), -1) for one in inputs.values()], 1)[:, :, None, None]


@pytest.mark.parametrize("box", [(-1.0, 1.0), None])
def test_relevance_of_each_input(box):
    made, inputs = Explainer(model(box=box)), batch()
    e = made(inputs)
    assert (e.of("picture").shape, e.of("age").shape) == ((3, 3, 5, 6), (3, 4, 1, 1))
    np.testing.assert_array_equal(e.relevance, made(flat(inputs)).relevance)
    np.testing.assert_array_equal(e.output, made.predict(inputs))
    rules = {name: rule.rule for name, rule in made.rules.items()}
    for i, image in enumerate(flat(inputs)):
        relevance, scores, _ = naive.explain(made.model.graph, image, e.target[i], rules)
        np.testing.assert_allclose(e.output[i], scores, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(e.relevance[i], relevance, atol=1e-5 * max(1, abs(scores).max()))
    np.testing.assert_allclose(e.of("picture").sum((1, 2, 3)) + e.of("age").sum((1, 2, 3)) + e.absorbed, e.explained,
                               rtol=1e-5)
    assert "(picture " in repr(e)
    assert ", age " in repr(e)


def test_in_any_order_and_alone():
    made, inputs = Explainer(model()), batch(1)
    e = made(inputs)
    turned = made({"age": inputs["age"], "picture": inputs["picture"]})
    alone = made({"picture": inputs["picture"][0], "age": inputs["age"][0]})
    columns = made({"picture": inputs["picture"], "age": inputs["age"].reshape(1, 4, 1, 1)})
    for other in (turned, alone, columns):
        np.testing.assert_array_equal(other.relevance, e.relevance)
    assert e.heatmap(0).size == made(inputs, 1).heatmap(0).size
    picture = np.random.default_rng(0).integers(0, 256, (20, 24, 3), np.uint8)
    assert e.overlay(0, picture).size[0] > 6


@pytest.mark.parametrize(("change", "message"), [
    (lambda inputs: inputs.pop("age"), "inputs 'picture' were given; required: picture, age"),
    (lambda inputs: inputs.update(more=1), "required: picture, age"),
    (lambda inputs: inputs.update(age=np.ones((2, 4))), "as many N"),
    (lambda inputs: inputs.update(age=np.ones(3)), "N, 4"),
    (lambda inputs: inputs.update(age="old"), "input 'age' has type"),
    (lambda inputs: inputs.update(age=[[1], [1, 2]]), "input 'age' is no array"),
    (lambda inputs: inputs.update(picture=np.full((3, 3, 5, 6), np.nan)), "NaN"),
    (lambda inputs: inputs.update(age=np.ma.masked_array(np.ones((3, 4)))), "masked"),
    (lambda inputs: inputs.clear(), "required: picture, age"),
])
def test_inputs_that_do_not_fit(change, message):
    inputs = batch()
    change(inputs)
    with pytest.raises(InputError, match=message):
        Explainer(model())(inputs)


def test_pictures_alone_are_not_enough():
    with pytest.raises(InputError, match=r"by name to the explainer, .* of 'picture' \(3, 5, 6\), 'age' \(4, 1, 1\)"):
        Explainer(model())(np.zeros((20, 24, 3), np.uint8))


@pytest.mark.parametrize("command", [["explain"], ["channels", "--layer", "conv"], ["evaluate"]])
def test_the_command_line_says_who_can(tmp_path, capsys, command):
    """Pictures are all that it can give."""
    fastdtd.save(model(), tmp_path / "net.h5")
    Image.new("RGB", (20, 24)).save(tmp_path / "a.png")
    assert cli.main([command[0], str(tmp_path / "net.h5"), str(tmp_path / "a.png"), *command[1:]]) == 1
    message = capsys.readouterr().err
    assert "this model has several inputs" in message
    assert "explainer({'picture': array, ...})" in message or "required: a model of one" in message


def test_one_input_has_no_names():
    one = Model(network(), Preprocessing(None))
    with pytest.raises(InputError, match="the network has one"):
        Explainer(one)(batch())
    e = Explainer(one)(flat(batch()))
    with pytest.raises(InputError, match="no input 'age' among several"):
        e.of("age")


@pytest.mark.parametrize("inputs", [
    {"picture": (3, 5, 6)}, {"picture": (3, 5, 6), "age": (5, 1, 1)}, {"picture": (3, 5), "age": (4, 1, 1)},
    {"": (3, 5, 6), "age": (4, 1, 1)}, {"picture": (3, 5, 6), "age": (4.0, 1, 1)}, {3: (TOTAL, 1, 1)}, {"age": 94},
    {"picture": (-3, 5, -6), "age": (4, 1, 1)}, [("age", (94, 1, 1))],
])
def test_inputs_that_are_none(inputs):
    with pytest.raises(ModelError):
        Model(network(), Preprocessing(None), inputs=inputs)


def test_an_embedded_library(tmp_path):
    """Its input is flat; the header says where each is."""
    made = fastdtd.embed(model(), tmp_path)
    text = made.header.read_text()
    assert "picture float[3][5][6] from 0 on, age float[4][1][1] from 90 on" in text


def test_model_files(tmp_path, capsys):
    fastdtd.save(model(), tmp_path / "net.h5")
    again = fastdtd.load(tmp_path / "net.h5")
    assert (again.inputs, list(again.inputs)) == (SHAPES, ["picture", "age"])
    np.testing.assert_array_equal(Explainer(again)(batch()).relevance, Explainer(model())(batch()).relevance)
    assert "picture 3x5x6, age 4x1x1, no picture" in repr(again)
    assert cli.main(["show", str(tmp_path / "net.h5")]) == 0
    assert "picture" in capsys.readouterr().out
    import h5py

    for name, value, message in (("shapes", [3, 5, 6], "a name for each"), ("names", [b"a", b"a"], "a name for each"),
                                 ("names", [1, 2], "a name for each"), ("shapes", [3, 5, 6, 5, 1, 1], "required: ")):
        fastdtd.save(model(), tmp_path / "net.h5")
        with h5py.File(tmp_path / "net.h5", "r+") as file:
            file["input"].attrs[name] = value
        with pytest.raises(ModelError, match=message):
            fastdtd.load(tmp_path / "net.h5")


# ---- Sources ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def convert_nodes(tmp_path):
    pytest.importorskip("onnx")
    return converter_of_nodes(tmp_path)


def second_input(name, shape, kind=1):
    def change(model):
        from onnx import helper

        model.graph.input.append(helper.make_tensor_value_info(name, kind, shape))

    return change


NODES = (("Conv", ["x", "w"], ["c"]), ("Relu", ["c"], ["r"]), ("GlobalAveragePool", ["r"], ["p"]),
         ("Flatten", ["p"], ["f"]), ("Concat", ["f", "age"], ["j"]), ("MatMul", ["j", "m"], ["y"]))
WEIGHTS = {"w": numbers(5, 3, 3, 3), "m": numbers(9, 2, seed=1)}


def nodes():
    return [node(*each, **({"axis": 1} if each[0] == "Concat" else {})) for each in NODES]


def test_onnx(convert_nodes):
    made = convert_nodes(nodes(), WEIGHTS, change=second_input("age", ("N", 4)), verify=True,
                         box={"x": (0, 1), "age": ([0, 0, 0, -1], 2)})
    assert made.inputs == {"x": (3, 9, 8), "age": (4, 1, 1)}
    assert made.graph.box[0].tolist() == [0] * 219 + [-1]
    assert made.graph.box[1].tolist() == [1] * 216 + [2] * 4
    rng = np.random.default_rng(0)
    e = Explainer(made)({"x": rng.random((2, 3, 9, 8)), "age": rng.random((2, 4))})
    np.testing.assert_allclose(e.sum + e.absorbed, e.explained, rtol=1e-5)


def test_onnx_of_channels_last(convert_nodes):
    last = [node("Transpose", ["x"], ["t"], perm=(0, 3, 1, 2)), node("Conv", ["t", "w"], ["c"]), *nodes()[1:]]
    made = convert_nodes(last, WEIGHTS, ("N", 9, 8, 3), change=second_input("age", (1, 4)), verify=True)
    assert made.inputs == {"x": (3, 9, 8), "age": (4, 1, 1)}


def test_onnx_input_that_nothing_reads(convert_nodes):
    one = [*nodes()[:3], node("Flatten", ["p"], ["y"])]
    made = convert_nodes(one, {"w": WEIGHTS["w"]}, change=second_input("age", ("N", 4)), verify=True)
    assert (made.inputs, made.graph.input_shape) == ({}, (3, 9, 8))


@pytest.mark.parametrize(("change", "options", "message"), [
    (second_input("age", (2, 4)), {"shape": (1, 3, 9, 8)}, "batches of 1, 2"),
    (second_input("age", ("N", 4), 7), {}, "whole numbers"), (second_input("x", ("N", 4)), {}, "a name of its own"),
    (second_input("age", ("N", 4)), {"box": {"x": (0, 1)}}, "the box names 'x'"),
    (second_input("age", ("N", 4)), {"box": {"x": (0, 1), "age": 3}}, "by name .low, high."),
])
def test_onnx_inputs_that_are_refused(convert_nodes, change, options, message):
    with pytest.raises(ConversionError, match=message):
        convert_nodes(nodes(), WEIGHTS, change=change, **options)


@pytest.mark.parametrize("kind", [2, 6, 7])
def test_onnx_whole_numbers_that_are_cast(convert_nodes, kind):
    """Beside a picture of floating-point numbers; compared with the source at whole ones."""
    cast = [node("Cast", ["age"], ["a"], to=1), *nodes()]
    cast[5].input[1] = "a"
    made = convert_nodes(cast, WEIGHTS, change=second_input("age", ("N", 4), kind), verify=True)
    assert made.inputs == {"x": (3, 9, 8), "age": (4, 1, 1)}
    assert "verified" in made.provenance
    rng = np.random.default_rng(0)
    e = Explainer(made)({"x": rng.random((2, 3, 9, 8)), "age": rng.integers(0, 9, (2, 4))}, start=np.ones((2, 2)))
    np.testing.assert_allclose(e.sum + e.absorbed, e.explained, rtol=1e-5)


def test_onnx_tokens_are_refused(convert_nodes):
    looked_up = [node("Gather", ["table", "age"], ["rows"]), node("Flatten", ["rows"], ["a"]), *nodes()]
    looked_up[6].input[1] = "a"
    with pytest.raises(ConversionError, match=r"Gather .* such as tokens, which contribute to nothing themselves; "
                                              r"required: a network that begins .* onnx\.utils\.extract_model"):
        convert_nodes(looked_up, WEIGHTS | {"table": numbers(7, 1)}, change=second_input("age", ("N", 4), 7))


def test_keras(tmp_path):
    entries = [layer("InputLayer", "picture", batch_shape=[None, 6, 5, 2]),
               layer("InputLayer", "age", batch_shape=[None, 4]),
               layer("Conv2D", "conv", filters=3, kernel_size=[2, 2], activation="relu"),
               layer("GlobalAveragePooling2D", "pool"), layer("Concatenate", "join"), layer("Dense", "scores", units=2)]
    reads = {"conv": ["picture"], "pool": ["conv"], "join": ["pool", "age"], "scores": ["join"]}
    for entry in entries:
        name = entry["name"] = entry["config"]["name"]
        entry["inbound_nodes"] = [[[before, 0, 0, {}] for before in reads[name]]] if name in reads else []
    weights = {"layers/conv2d/vars/0": numbers(2, 2, 2, 3), "layers/conv2d/vars/1": numbers(3, seed=1),
               "layers/dense/vars/0": numbers(7, 2, seed=2), "layers/dense/vars/1": numbers(2, seed=3)}
    config = {"name": "net", "layers": entries, "input_layers": [["picture", 0, 0], ["age", 0, 0]],
              "output_layers": [["scores", 0, 0]]}
    made = convert(keras_file(tmp_path, weights=weights, config={"class_name": "Functional", "config": config}))
    assert made.inputs == {"picture": (2, 6, 5), "age": (4, 1, 1)}
    rng = np.random.default_rng(0)
    picture, age = rng.standard_normal((1, 2, 6, 5)), rng.standard_normal((1, 4))
    patches = np.lib.stride_tricks.sliding_window_view(picture[0], (2, 2), (1, 2))  # C, y, x, i, j
    hidden = np.maximum(np.einsum("cyxij,ijck->kyx", patches, weights["layers/conv2d/vars/0"])
                        + weights["layers/conv2d/vars/1"][:, None, None], 0).mean((1, 2))
    expected = np.concatenate([hidden, age[0]]) @ weights["layers/dense/vars/0"] + weights["layers/dense/vars/1"]
    np.testing.assert_allclose(Explainer(made).predict({"picture": picture, "age": age})[0], expected, rtol=1e-4)
