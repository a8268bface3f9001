"""Real trained networks give the scores that onnxruntime gives."""

import numpy as np
import onnx
import onnxruntime

import fastdtd


def check(path, batch, model):
    """Scores against onnxruntime's tensor `logits`, which is made an output of the graph where it is none; conservation besides."""
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
