"""Real trained networks give the scores that onnxruntime gives."""

import numpy as np
import onnx
import onnxruntime
import pytest
from onnxruntime.quantization import (
    CalibrationDataReader,
    QuantFormat,
    QuantType,
    quantize_dynamic,
    quantize_static,
)
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

import fastdtd
from fastdtd import cli
from fastdtd.importers import builder


def check(path, batch, model):
    """Scores against onnxruntime's tensor `logits`, which is made an output of the graph where it is none; conservation
    besides.
    """
    proto = onnx.load(path)
    if "logits" not in [output.name for output in proto.graph.output]:
        proto.graph.output.append(onnx.helper.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, None))
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    theirs = session.run(["logits"], {session.get_inputs()[0].name: batch})[0]
    e = fastdtd.Explainer(model)(batch)
    assert np.abs(e.output - theirs).max() <= 1e-4 * np.abs(theirs).max()
    np.testing.assert_allclose(e.relevance.sum((1, 2, 3), dtype=np.float64) + e.absorbed, e.explained, rtol=1e-5)


def test_squeezenet(data, photographs):
    path = data / "models/squeezenet_v1.1/squeezenet_v1.1.onnx"
    model = fastdtd.convert(path, color="bgr", mean=(104, 117, 123), box=[(-104, 151), (-117, 138), (-123, 132)])
    check(path, np.stack([model.preprocess(picture) for picture in photographs]), model)


def test_resnet20(data, photographs):
    path = data / "models/resnet20_cifar10/resnet20.onnx"
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    box = list(zip((0 - mean) / std, (1 - mean) / std, strict=True))
    model = fastdtd.convert(path, scale=1 / 255, mean=mean, std=std, box=box)
    check(path, np.stack([model.preprocess(picture) for picture in photographs]), model)


class Calibration(CalibrationDataReader):
    """One image after the other."""

    def __init__(self, name, images):
        self.left = iter([{name: image[None]} for image in images])

    def get_next(self):
        return next(self.left, None)


def quantised(how, source, to, name, images):
    match how:
        case "dynamic":
            quantize_dynamic(source, to, weight_type=QuantType.QUInt8)
        case "QDQ, by channel":
            quantize_static(source, to, Calibration(name, images), quant_format=QuantFormat.QDQ, per_channel=True,
                            activation_type=QuantType.QInt8, weight_type=QuantType.QInt8)
        case _:
            quantize_static(source, to, Calibration(name, images), quant_format=getattr(QuantFormat, how),
                            activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8)


@pytest.mark.parametrize("how", ["QDQ", "QDQ, by channel", "QOperator", "dynamic"])
@pytest.mark.parametrize("network", ["squeezenet_v1.1/squeezenet_v1.1.onnx", "resnet20_cifar10/resnet20.onnx"])
def test_quantised(data, photographs, tmp_path, network, how):
    """As onnxruntime's tools quantise: scores of what the whole numbers stand for are near, and verified as such."""
    source, path = data / "models" / network, tmp_path / "net.onnx"
    original = fastdtd.convert(source, verify=False, **(
        {"color": "bgr", "mean": (104, 117, 123)} if "squeeze" in network else {"scale": 1 / 128, "mean": 1}))
    batch = np.stack([original.preprocess(picture) for picture in photographs])
    name = onnxruntime.InferenceSession(source).get_inputs()[0].name
    quantised(how, source, path, name, batch)
    model = fastdtd.convert(path, verify=True)
    session = onnxruntime.InferenceSession(path)
    theirs = np.concatenate([session.run(None, {name: image[None]})[0].reshape(1, -1) for image in batch])
    e = fastdtd.Explainer(model)(batch)
    ours = e.output
    if "squeeze" in network:
        ours = np.exp(ours - ours.max(1, keepdims=True))
        ours /= ours.sum(1, keepdims=True)
    assert np.abs(ours - theirs).max() <= 0.1 * np.abs(theirs).max()
    np.testing.assert_allclose(e.relevance.sum((1, 2, 3), dtype=np.float64) + e.absorbed, e.explained, rtol=1e-5)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("form", "bits"), [("QOperator", 4), ("QOperator", 8), ("QDQ", 4)])
@pytest.mark.parametrize("axes", [2, 4])
def test_weights_of_few_bits(tmp_path, form, bits, symmetric, axes):
    """As onnxruntime's tool writes them, MatMulNBits or DequantizeLinear in blocks; the input has another type."""
    random = np.random.default_rng(1)
    w, v = random.normal(size=(50, 33)).astype(np.float32), random.normal(size=(33, 5)).astype(np.float32)
    nodes = [onnx.helper.make_node("MatMul", ["x", "w"], ["h"]), onnx.helper.make_node("Relu", ["h"], ["a"]),
             onnx.helper.make_node("MatMul", ["a", "v"], ["y"])]
    shape = ["n", *[3, 4][:axes - 2], 50]
    graph = onnx.helper.make_graph(
        nodes, "net", [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, shape)],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)],
        [onnx.numpy_helper.from_array(w, "w"), onnx.numpy_helper.from_array(v, "v")])
    source = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10)
    quantizer = MatMulNBitsQuantizer(source, bits=bits, block_size=16, is_symmetric=symmetric, accuracy_level=4,
                                     quant_format=getattr(QuantFormat, form))
    quantizer.process()
    path = tmp_path / "net.onnx"
    quantizer.model.save_model_to_file(str(path))
    found = {node.op_type for node in onnx.load(path).graph.node}
    assert ("MatMulNBits" if form == "QOperator" else "DequantizeLinear") in found
    model = fastdtd.convert(path, verify=True)
    assert model.provenance["verified"] == f"onnxruntime {onnxruntime.__version__}"


def test_verified_on_the_command_line(data, tmp_path, capsys):
    source, model = str(data / "models/squeezenet_v1.1/squeezenet_v1.1.onnx"), str(tmp_path / "net.h5")
    assert cli.main(["convert", source, model, "--verify", "--color", "bgr", "--box=-123:151,-123:151,-123:151"]) == 0
    first, _ = capsys.readouterr().out.splitlines()
    assert first == f"{source}: the scores are those of onnxruntime {onnxruntime.__version__}"
    assert fastdtd.load(model).graph.input_shape == (3, 227, 227)


def network(path, *ends, weight=2.0):
    """A dense layer of 3 to 2, and what `ends` says."""
    names = ["y", *(f"e{i}" for i in range(len(ends)))]
    nodes = [onnx.helper.make_node("Gemm", ["x", "w"], ["y"])]
    nodes += [onnx.helper.make_node(end, [names[i]], [names[i + 1]], **({"axis": 1} if "Softmax" in end else {}))
              for i, end in enumerate(ends)]
    graph = onnx.helper.make_graph(nodes, "net",
                                   [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["n", 3])],
                                   [onnx.helper.make_tensor_value_info(names[-1], onnx.TensorProto.FLOAT, None)],
                                   [onnx.numpy_helper.from_array(weight * np.eye(3, 2, dtype=np.float32), "w")])
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8), path)
    return path


@pytest.mark.parametrize("ends", [(), ("Softmax",), ("LogSoftmax",), ("Sigmoid",), ("Relu",)])
def test_ends(tmp_path, ends):
    model = fastdtd.convert(network(tmp_path / "net.onnx", *ends), verify=True)
    assert model.provenance["verified"] == f"onnxruntime {onnxruntime.__version__}"
    assert len(model.graph.layers) == 1 + (ends == ("Relu",))


@pytest.mark.parametrize("end", ["Identity", "Softmax", "LogSoftmax", "Sigmoid"])
def test_another_network_is_found_out(tmp_path, capsys, monkeypatch, end):
    """A dense layer that is read with other weights."""
    original = builder.Builder.dense
    monkeypatch.setattr(builder.Builder, "dense", lambda self, x, weight, bias: original(self, x, weight * 1.05, bias))
    source = network(tmp_path / "net.onnx", end)
    assert cli.main(["convert", str(source), str(tmp_path / "net.h5")]) == 1
    message = capsys.readouterr().err
    assert f"and onnxruntime {onnxruntime.__version__} gives " in message
    assert "What differs first is Gemm 'y' (node 1 of 2, reads 'x', 'w')" in message
    assert not (tmp_path / "net.h5").exists()


def test_what_onnxruntime_cannot_run(tmp_path, monkeypatch, caplog):
    def refuse(*arguments, **options):
        raise RuntimeError("out of order")

    monkeypatch.setattr(onnxruntime, "InferenceSession", refuse)
    source = network(tmp_path / "net.onnx")
    assert "verified" not in fastdtd.convert(source).provenance
    assert "cannot run it: out of order" in caplog.text
    with pytest.raises(fastdtd.ConversionError, match="cannot run it: out of order"):
        fastdtd.convert(source, verify=True)


@pytest.mark.parametrize("kind", ["float16", "float64"])
def test_other_precisions(tmp_path, kind):
    source = network(tmp_path / "net.onnx")
    proto = onnx.load(source)
    dtype = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(kind))
    proto.graph.input[0].type.tensor_type.elem_type = proto.graph.output[0].type.tensor_type.elem_type = dtype
    proto.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(np.eye(3, 2, dtype=kind), "w"))
    onnx.save(proto, source)
    assert "verified" in fastdtd.convert(source, verify=True).provenance
