"""Conversion compares its result with the source, as ONNX's own reference runs it where nothing else is installed."""

import importlib.util
import logging

import numpy as np
import pytest
from importing import converter_of_nodes, node, numbers

from fastdtd import cli
from fastdtd import graph as g
from fastdtd.errors import ConversionError
from fastdtd.importers import convert, verify
from fastdtd.importers.builder import Builder

pytest.importorskip("onnx")

NETWORK = [node("Conv", ["x", "w"], ["c"], name="first"), node("Relu", ["c"], ["r"], name="positive"),
           node("Conv", ["r", "v"], ["d"], name="second"), node("GlobalAveragePool", ["d"], ["p"], name="mean"),
           node("Flatten", ["p"], ["y"], name="flat")]
WEIGHTS = {"w": numbers(4, 3, 3, 3), "v": numbers(2, 4, 3, 3, seed=1)}


@pytest.fixture
def convert_nodes(tmp_path):
    return converter_of_nodes(tmp_path)


@pytest.fixture
def wrong(monkeypatch):
    """The builder makes another network: it forgets about strides, or turns the second convolution's kernel."""
    original = Builder.conv

    def conv(self, x, weight, *others):
        return original(self, x, weight[..., ::-1] if self.node.layer_name == "second" else weight, *others)

    monkeypatch.setattr(Builder, "conv", conv)


def test_what_verified_it_is_in_the_provenance(convert_nodes):
    assert "onnx" in convert_nodes(NETWORK, WEIGHTS).provenance["verified"]
    assert "verified" not in convert_nodes(NETWORK, WEIGHTS, verify=False).provenance


def test_another_network_is_an_error_that_names_its_first_layer(convert_nodes, wrong):
    with pytest.raises(ConversionError, match=(
            r"output \d is -?\d\S+, and onnx.* gives -?\d\S+; required: a difference of at most 0\.001 of the largest, "
            r"\S+\. What differs first is Conv 'second' \(node 3 of 5.*verify=False")):
        convert_nodes(NETWORK, WEIGHTS)
    assert convert_nodes(NETWORK, WEIGHTS, verify=False).graph


def test_on_the_command_line(convert_nodes, tmp_path, capsys, wrong):
    convert_nodes(NETWORK, WEIGHTS, verify=False)
    source, target = str(tmp_path / "net.onnx"), tmp_path / "net.h5"
    for options in ([], ["--verify"]):
        assert cli.main(["convert", source, str(target), *options]) == 1
        assert "What differs first is Conv 'second'" in capsys.readouterr().err
        assert not target.exists()
    assert cli.main(["convert", source, str(target), "--no-verify"]) == 0
    assert "the scores are" not in capsys.readouterr().out


@pytest.mark.parametrize("end", ["Softmax", "LogSoftmax", "Sigmoid"])
@pytest.mark.parametrize("scale", [0.01, 1, 1000])
def test_probabilities_at_the_end(convert_nodes, end, scale):
    """They are left out, and compared as what they are, also where they are 0 or 1."""
    constants = {"w": WEIGHTS["w"] * np.float32(scale), "v": WEIGHTS["v"]}
    axis = {} if end == "Sigmoid" else {"axis": 1}
    model = convert_nodes([*NETWORK, node(end, ["y"], ["z"], **axis)], constants, outputs=["z"], verify=True)
    assert [type(layer) for layer in model.graph] == [g.Conv2d, g.ReLU, g.Conv2d, g.GlobalAveragePool]


@pytest.mark.parametrize("end", ["Softmax", "LogSoftmax", "Sigmoid"])
def test_probabilities_of_another_network(convert_nodes, end, wrong):
    axis = {} if end == "Sigmoid" else {"axis": 1}
    with pytest.raises(ConversionError, match=r"before its sigmoid|the logarithm of its softmax"):
        convert_nodes([*NETWORK, node(end, ["y"], ["z"], **axis)], WEIGHTS, outputs=["z"])


@pytest.mark.parametrize(("weights", "is_verified"), [
    ({"w": 0 * WEIGHTS["w"]}, True), ({name: value * np.float32(1e30) for name, value in WEIGHTS.items()}, False)])
def test_scores_that_are_zero_or_beyond_float32(convert_nodes, caplog, weights, is_verified):
    model = convert_nodes(NETWORK, {**WEIGHTS, **weights})
    assert ("verified" in model.provenance) == is_verified
    assert ("compared with nothing" in caplog.text) != is_verified


def test_a_network_that_is_too_large(convert_nodes, caplog, monkeypatch):
    monkeypatch.setattr(verify, "_operations", lambda *_: 10**12)
    assert "verified" not in convert_nodes(NETWORK, WEIGHTS).provenance
    assert "an image takes 1.0e+12 multiply-adds" in caplog.text
    with pytest.raises(ConversionError, match="cannot be compared with its source's: an image takes"):
        convert_nodes(NETWORK, WEIGHTS, verify=True)


@pytest.mark.skipif(importlib.util.find_spec("onnxruntime") is not None, reason="the reference is not asked")
@pytest.mark.parametrize(("op", "kernel"), [("MaxPool", 96), ("ConvTranspose", 16)])
def test_what_the_reference_does_in_python_loops_is_not_run(convert_nodes, caplog, op, kernel):
    """It would take minutes, for few multiply-adds."""
    attributes = {"kernel_shape": [kernel, kernel]}
    nodes = [node(op, ["x"] if op == "MaxPool" else ["x", "w"], ["h"], **attributes),
             node("GlobalAveragePool", ["h"], ["p"]), node("Flatten", ["p"], ["y"])]
    weights = {} if op == "MaxPool" else {"w": numbers(3, 2, kernel, kernel)}
    model = convert_nodes(nodes, weights, shape=("N", 3, 128, 128))
    assert "is given at most 5e+08" in caplog.text
    assert "verified" not in model.provenance


def test_the_runtime_gets_only_what_was_read(convert_nodes, tmp_path):
    """Nodes that do not lead to the output, and branches that are not taken, are not run."""
    from onnx import TensorProto, helper

    def branch(operator, domain=""):
        return helper.make_graph([helper.make_node(operator, ["y"], ["b"], domain=domain)], "b", [],
                                 [helper.make_tensor_value_info("b", TensorProto.FLOAT, None)])

    nodes = [*NETWORK, node("Crash", ["x"], ["unread"], domain="hostile"),
             node("If", ["yes"], ["z"], then_branch=branch("Relu"), else_branch=branch("Crash", "hostile"))]
    model = convert_nodes(nodes, {**WEIGHTS, "yes": np.array(True), "more": numbers(1000)}, outputs=["z"], verify=True)
    assert "verified" in model.provenance
    from fastdtd.importers import onnx as reader

    graph = reader.parse((tmp_path / "net.onnx").read_bytes()).runtime.graph
    assert sorted(tensor.name for tensor in graph.initializer) == ["v", "w", "yes"]
    assert b"Crash" not in graph.SerializeToString()


def test_weights_in_other_files_are_not_opened(convert_nodes, caplog):
    """Here they are a constant's that no layer needs: ONNX's runtimes would open the file."""
    from onnx import TensorProto, helper

    outside = helper.make_tensor("outside", TensorProto.FLOAT, [1], [0.0])
    outside.ClearField("float_data")
    outside.data_location = TensorProto.EXTERNAL
    outside.external_data.add(key="location", value="/etc/passwd")
    nodes = [node("Dropout", ["x", "ratio"], ["k"]), node("Conv", ["k", "w"], ["c"]), *NETWORK[1:]]
    model = convert_nodes(NETWORK, WEIGHTS, change=lambda model: model.graph.initializer.append(outside))
    assert "verified" in model.provenance  # nothing reads it

    def read_it(model):
        outside.name = "ratio"
        model.graph.initializer.append(outside)

    assert "verified" not in convert_nodes(nodes, WEIGHTS, change=read_it).provenance
    assert "names weights in another file" in caplog.text


def test_caffe_has_nothing_to_compare_with(data, caplog):
    pytest.importorskip("google.protobuf")
    folder = data / "models" / "lenet_mnist"
    names = folder / "lenet.prototxt", folder / "lenet_iter_10000.caffemodel"
    with caplog.at_level(logging.WARNING, "fastdtd"):
        assert "verified" not in convert(*names).provenance
    assert "compared with nothing: there is no runtime here for files of this kind" in caplog.text
    with pytest.raises(ConversionError, match="cannot be compared with its source's: there is no runtime"):
        convert(*names, verify=True)


@pytest.mark.parametrize(("shape", "count"), [(("N", 16, 1024, 1024), 130), ((2**30, 3, 9, 8), 2)])
def test_what_is_small_here_and_large_there_is_not_run(convert_nodes, shape, count):
    """Views are arrays to other runtimes, and a file may ask for any batch."""
    nodes = [node("Transpose", [f"t{i}" if i else "x"], [f"t{i + 1}"], perm=[0, 1, 3, 2]) for i in range(count)]
    nodes += [node("GlobalAveragePool", [f"t{count}"], ["p"]), node("Flatten", ["p"], ["y"])]
    assert "verified" not in convert_nodes(nodes, shape=shape).provenance
    with pytest.raises(ConversionError, match=r"its nodes make \d+ elements for \d+ images, and at most \d+ are"):
        convert_nodes(nodes, shape=shape, verify=True)


def test_what_the_reference_gets_wrong_is_not_compared(convert_nodes, caplog):
    nodes = [node("LRN", ["x"], ["n"], size=3), node("GlobalAveragePool", ["n"], ["p"]), node("Flatten", ["p"], ["y"])]
    with caplog.at_level(logging.WARNING, "fastdtd"):
        model = convert_nodes(nodes)
    assert "verified" in model.provenance or "onnx's reference normalises by the batch's size" in caplog.text
