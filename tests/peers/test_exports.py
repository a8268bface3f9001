"""ONNX as PyTorch's exporters write it, the older and the one that is built on torch.export: onnxruntime's scores."""

import contextlib
import importlib.util
import io
import warnings
from functools import partial

import numpy as np
import onnxruntime
import pytest
import torch
import written
from torch import nn
from torch.nn import functional
from torch_nets import as_trained
from torchvision import models

import fastdtd
from fastdtd import graph as g

OLDER = [("older", opset, batch) for opset, batch in ((9, "open"), (11, "open"), (13, 2), (17, "open"), (18, 2),
                                                      (20, "open"))]
NEWER = [("newer", opset, batch) for opset, batch in ((18, 2), (20, "open"), (23, 2))]
needs_onnxscript = pytest.mark.skipif(importlib.util.find_spec("onnxscript") is None,
                                      reason="the newer exporter takes onnxscript")
EXPORTS = [*OLDER, *(pytest.param(*export, marks=needs_onnxscript) for export in NEWER)]


def export(module, example, path, exporter, opset, batch):
    """batch: how many pictures the file is for, or "open"."""
    options = {"input_names": ["x"], "opset_version": opset, "dynamo": exporter == "newer", "verbose": False}
    if exporter == "newer":
        options |= {"external_data": False}
        options |= {"dynamic_shapes": ({0: torch.export.Dim("n")},)} if batch == "open" else {}
    elif batch == "open":
        options |= {"dynamic_axes": {"x": {0: "n"}}}
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")  # of what is deprecated in PyTorch
        torch.onnx.export(module.eval(), (example[:1].repeat(2, *[1] * (example.ndim - 1)),), path, **options)
    return path


def difference(model, path, output=None):
    """The largest of the scores' from onnxruntime's, which is given the file itself, relative to the largest score;
    output: by name, None: the first."""
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    x = session.get_inputs()[0]
    size = x.shape[0] if isinstance(x.shape[0], int) else 1
    batch = np.random.default_rng(1).uniform(-1, 1, (1, *model.graph.input_shape)).astype(np.float32)
    outputs = None if output is None else [output]
    theirs = session.run(outputs, {x.name: np.repeat(batch, size, 0)})[0].reshape(size, -1)[:1]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ours = fastdtd.Explainer(model)(batch).output.reshape(1, -1)
    return np.abs(ours - theirs).max() / np.abs(theirs).max()


class AlexNet(nn.Module):
    """As torchvision's, with the normalisation that the original has."""

    def __init__(self):
        super().__init__()
        plain = models.alexnet(weights=None)
        parts = list(plain.features)
        self.features = nn.Sequential(*parts[:2], nn.LocalResponseNorm(5, k=2.0), *parts[2:5],
                                      nn.LocalResponseNorm(5, k=2.0), *parts[5:])
        self.pool, self.classifier = plain.avgpool, plain.classifier

    def forward(self, x):
        return self.classifier(torch.flatten(self.pool(self.features(x)), 1))


class Shuffle(nn.Module):
    def forward(self, x):
        n, channels, height, width = x.size()
        return x.view(n, 2, channels // 2, height, width).transpose(1, 2).contiguous().view(n, -1, height, width)


class Cut(nn.Module):
    def forward(self, x):
        a, b = x.chunk(2, 1)
        return torch.cat((a[:, :, 1:-1, 1:], functional.relu(b)[:, 1:, :-2, :-1]), 1)


class Function(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


PARTS = {
    "local response norm": (lambda: nn.LocalResponseNorm(5, 1e-2, 0.6, 2.0), {g.LocalResponseNorm: 1, g.Power: 0}),
    "flatten by size": (lambda: Function(lambda x: x.reshape(x.size(0), -1)), {g.Flatten: 1}),
    "mean": (lambda: Function(lambda x: x.mean((-2, -1), keepdim=True)), {g.GlobalAveragePool: 1}),
    "mean without axes": (lambda: Function(lambda x: x.mean((2, 3))), {g.GlobalAveragePool: 1}),
    "largest": (lambda: Function(lambda x: x.amax((2, 3))), {g.MaxPool2d: 1}),
    "one pixel": (lambda: nn.AdaptiveAvgPool2d(1), {g.GlobalAveragePool: 1}),
    "largest pixel": (lambda: nn.AdaptiveMaxPool2d(1), {g.MaxPool2d: 1}),
    "hard tanh": (lambda: nn.Hardtanh(-0.5, 0.5), {g.Clip: 1}),
    "ReLU6": (nn.ReLU6, {g.Clip: 1}),
    **{f"{name}, one layer": (lambda make=make: Function(make), {g.Activation: 1, g.Conv2d: 1, g.Multiply: 0})
       for name, make in {
           "SiLU": functional.silu, "hard-swish": functional.hardswish, "hard-sigmoid": functional.hardsigmoid,
           "GELU": functional.gelu, "GELU by tanh": lambda x: functional.gelu(x, approximate="tanh"),
           "Mish": functional.mish, "ELU": lambda x: functional.elu(x, 0.5), "SELU": functional.selu,
           "softplus": functional.softplus, "tanh": torch.tanh, "sigmoid": torch.sigmoid,
           "GELU of products": lambda x: 0.5 * x * (1 + torch.tanh(0.7978845608 * (x + 0.044715 * x * x * x))),
       }.items()},
    "gate": (lambda: Function(lambda x: x * torch.sigmoid(x.mean((2, 3), keepdim=True))), {g.Multiply: 1}),
    "selective kernels": (lambda: written.SelectiveKernel(6), {g.Multiply: 1, g.Softmax: 1}),
    "split attention": (lambda: written.SplitAttention(6, 3, 2, True), {g.Multiply: 1, g.Softmax: 1}),
    "leaky ReLU": (lambda: nn.LeakyReLU(0.2), {g.LeakyReLU: 1}),
    "PReLU": (lambda: nn.Sequential(nn.PReLU(), nn.PReLU(6)), {g.LeakyReLU: 2}),
    "p-norm": (lambda: nn.LPPool2d(2, 3, 2), {g.Power: 2, g.ReLU: 0}),
    "transposed convolution": (lambda: nn.ConvTranspose2d(6, 4, (4, 3), 2, 1, (0, 1), groups=2),
                               {g.Conv2d: 2, g.Rearrange: 1}),
    "pads": (lambda: nn.Sequential(nn.ZeroPad2d((1, 0, 2, 1)), nn.Conv2d(6, 4, 3), nn.ReflectionPad2d(2),
                                   nn.MaxPool2d(2)),
             {g.Rearrange: 1}),
    "same": (lambda: nn.Conv2d(6, 4, 4, padding="same"), {g.Conv2d: 2, g.Rearrange: 0}),
    "bilinear": (lambda: nn.Upsample(scale_factor=1.5, mode="bilinear"), {g.Resize: 1}),
    "upsampling": (lambda: nn.Upsample(scale_factor=2), {g.Rearrange: 1}),
    "pixel shuffle": (lambda: nn.Sequential(nn.Conv2d(6, 8, 1), nn.PixelShuffle(2), nn.Conv2d(2, 3, 1)),
                      {g.Rearrange: 1}),
    "channel shuffle": (Shuffle, {g.Rearrange: 0}),  # the dense layer's weights are shuffled
    "chunks and slices": (Cut, {g.Concat: 1, g.Rearrange: 2}),
    "channels last": (lambda: Function(lambda x: functional.relu(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)),
                      {g.Rearrange: 0}),
    "one dimension": (lambda: nn.Sequential(nn.Flatten(2), nn.Conv1d(6, 4, 5, 2, 2), nn.ReLU(), nn.MaxPool1d(2),
                                            nn.AvgPool1d(3, 2, 1)),
                      {g.Conv2d: 2, g.MaxPool2d: 1, g.AveragePool2d: 1}),
    "ceil mode": (lambda: nn.Sequential(nn.MaxPool2d(3, 2, ceil_mode=True), nn.AvgPool2d(3, 2, 1, ceil_mode=True)),
                  {g.AveragePool2d: 1}),
    "arithmetic": (lambda: Function(lambda x: functional.relu((x - 0.5) / 0.3) - x), {g.Add: 1}),
}


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize(("exporter", "opset", "batch"), EXPORTS)
def test_part(tmp_path, exporter, opset, batch, part):
    make, layers = PARTS[part]
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), make(), nn.Flatten(), nn.LazyLinear(5)).eval()
    example = torch.rand(1, 3, 12, 12)
    module(example)
    path = export(module, example, tmp_path / "net.onnx", exporter, opset, batch)
    model = fastdtd.convert(path, verify=False)
    assert difference(model, path) <= 1e-5
    assert {kind: sum(isinstance(layer, kind) for layer in model.graph) for kind in layers} == layers


@needs_onnxscript
def test_weights_beside_the_file(tmp_path):
    """As the newer exporter writes them unless it is told otherwise."""
    module = nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                           nn.Linear(64, 5)).eval()
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        torch.onnx.export(module, (torch.rand(1, 3, 12, 12),), tmp_path / "net.onnx", dynamo=True, verbose=False)
    assert (tmp_path / "net.onnx.data").exists()
    assert difference(fastdtd.convert(tmp_path / "net.onnx", verify=False), tmp_path / "net.onnx") <= 1e-5


NETWORKS = {"alexnet with LRN": AlexNet, **{name: getattr(models, name) for name in (
    "resnet18", "densenet121", "mobilenet_v2", "mnasnet1_0", "googlenet", "inception_v3", "squeezenet1_1",
    "shufflenet_v2_x1_0",
    "regnet_x_400mf", "regnet_y_400mf", "efficientnet_b0", "efficientnet_v2_s", "mobilenet_v3_small",
    "mobilenet_v3_large", "densenet169")}}
# The side of the input, and the position of the output that is compared.
MAPS = {"GhostNet": (written.GhostNet, 224, 0), "U-Net": (written.UNet, 64, 0), "detector": (written.Detector, 128, 1),
        "UltraFace": (written.UltraFace, 128, 1), "MTCNN, O-Net": (written.ONet, 48, 0),
        **{name: (partial(getattr(models.segmentation, name), weights=None, weights_backbone=None), 128, 0)
           for name in ("deeplabv3_mobilenet_v3_large", "lraspp_mobilenet_v3_large")}}


def network(name):
    torch.manual_seed(0)
    if name in MAPS:
        make, size, _ = MAPS[name]
        return as_trained(make()), torch.rand(1, 3, size, size)
    options = {} if name == "alexnet with LRN" else {"weights": None}
    options |= {"googlenet": {"init_weights": False, "aux_logits": False},
                "inception_v3": {"init_weights": False}}.get(name, {})
    size = 299 if name == "inception_v3" else 224
    return as_trained(NETWORKS[name](**options)), torch.rand(1, 3, size, size)


@pytest.mark.parametrize(("exporter", "opset"), [("older", 13), pytest.param("newer", 20, marks=needs_onnxscript)])
@pytest.mark.parametrize("name", [*NETWORKS, *MAPS])
def test_network(tmp_path, name, exporter, opset):
    module, example = network(name)
    batch = "open"
    # else it loses the size of what it normalises, and then fails at the next pool
    if name == "alexnet with LRN" and exporter == "older":
        opset, batch = 9, 2
    path = export(module, example, tmp_path / "net.onnx", exporter, opset, batch)
    output = None
    if name in MAPS:
        names = [output.name for output in onnxruntime.InferenceSession(str(path)).get_outputs()]
        output = names[MAPS[name][2]]
    model = fastdtd.convert(path, verify=False, output=output)
    off = difference(model, path, output)
    path.unlink()
    print(f"{name}, {exporter} exporter: scores within {off:.1e}")
    assert off <= 1e-4
    assert sum(isinstance(layer, g.LocalResponseNorm) for layer in model.graph) == (2 if "LRN" in name else 0)


@pytest.mark.parametrize("name", ["alexnet with LRN", "shufflenet_v2_x1_0"])
def test_module_itself(name):
    module, batch = network(name)
    e = fastdtd.Explainer(fastdtd.from_torch(module, batch, box=(0, 1)))(batch.numpy())
    with torch.inference_mode():
        expected = module(batch).numpy()
    assert np.abs(e.output - expected).max() <= 1e-5 * np.abs(expected).max()
    np.testing.assert_allclose(e.relevance.sum(dtype=float) + e.absorbed[0], e.explained[0], rtol=1e-5)
    assert e.relevance.min() >= 0
