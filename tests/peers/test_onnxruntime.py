"""Real trained networks give the scores that onnxruntime gives."""

import numpy as np
import onnx
import onnxruntime
import pytest

import fastdtd
from fastdtd import cli
from fastdtd.importers import verify


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


def test_verified_on_the_command_line(data, tmp_path, capsys):
    source, model = str(data / "models/squeezenet_v1.1/squeezenet_v1.1.onnx"), str(tmp_path / "net.h5")
    assert cli.main(["convert", source, model, "--verify", "--color", "bgr", "--box=-123:151,-123:151,-123:151"]) == 0
    first, _ = capsys.readouterr().out.splitlines()
    assert first.startswith(f"{source}: scores within ")
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


@pytest.mark.parametrize("ends", [(), ("Softmax",), ("LogSoftmax",), ("Relu",)])
def test_ends(tmp_path, ends):
    source = network(tmp_path / "net.onnx", *ends)
    assert verify(fastdtd.convert(source), source) < 1e-6


def test_another_network_is_found_out(tmp_path, capsys, monkeypatch):
    one, other = network(tmp_path / "net.onnx"), network(tmp_path / "other.onnx", weight=2.1)
    model = fastdtd.convert(one)
    assert verify(model, other) == pytest.approx(0.1 / 2.1, rel=1e-3)
    monkeypatch.setattr("fastdtd.importers.convert", lambda *_, **__: model)
    assert cli.main(["convert", str(other), str(tmp_path / "net.h5"), "--verify"]) == 1
    assert "scores differ from onnxruntime's by 4.8% of the largest; nothing was written" in capsys.readouterr().err
    assert not (tmp_path / "net.h5").exists()


def test_what_cannot_be_verified(tmp_path):
    model = fastdtd.convert(network(tmp_path / "net.onnx"))
    with pytest.raises(fastdtd.ConversionError, match=r"net\.prototxt: only \.onnx files can be verified"):
        verify(model, "net.prototxt")
    (tmp_path / "bad.onnx").write_bytes(b"nothing")
    with pytest.raises(fastdtd.ConversionError, match="onnxruntime cannot run it"):
        verify(model, tmp_path / "bad.onnx")
