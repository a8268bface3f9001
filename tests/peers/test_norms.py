"""Normalisation by an image's own statistics: PyTorch's scores, autograd's relevance and derivatives, and ConvNeXt."""

import numpy as np
import pytest
import torch
import torch_nets  # noqa: F401  # makes torchvision importable
from test_exports import difference, export
from test_pytorch import scores_agree
from torch import nn
from torch.nn import functional
from torchvision import models

import fastdtd
from fastdtd import graph as g


class LayerNorm(nn.Module):
    """Over the channels at each position; the deviation held constant if `held`."""

    def __init__(self, channels, held=False):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(channels)), nn.Parameter(0.1 * torch.randn(channels))
        self.held = held

    def forward(self, x):
        centered = x - x.mean(-1, keepdim=True)
        deviation = ((centered**2).mean(-1, keepdim=True) + 1e-6).sqrt()
        return centered / (deviation.detach() if self.held else deviation) * self.weight + self.bias


class RMSNorm(nn.Module):
    """Written out, as the older exporter has none."""

    def __init__(self, channels):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(channels))

    def forward(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.weight


class GlobalResponseNorm(nn.Module):
    """As ConvNeXt v2's authors write it or, with `as_timm`, as timm does, also with the channels first; what it
    multiplies by held constant if `held`."""

    def __init__(self, channels, as_timm=False, channels_first=False, held=False):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(channels)), nn.Parameter(0.1 * torch.randn(channels))
        self.as_timm, self.held, self.channels_first = as_timm, held, channels_first

    def forward(self, x):
        pixels, channel, shape = ((2, 3), 1, (1, -1, 1, 1)) if self.channels_first else ((1, 2), -1, (1, 1, 1, -1))
        weight, bias = self.weight.view(shape), self.bias.view(shape)
        norm = x.norm(p=2, dim=pixels, keepdim=True) if self.as_timm else torch.sqrt(
            (x**2).sum(pixels, keepdim=True)) if self.channels_first else torch.norm(x, p=2, dim=pixels, keepdim=True)
        response = norm / (norm.mean(dim=channel, keepdim=True) + 1e-6)
        response = response.detach() if self.held else response
        if self.as_timm:
            return x + torch.addcmul(bias, weight, x * response)
        return weight * (x * response) + bias + x


class GELU(nn.Module):
    """With its ratio held constant if `held`."""

    def __init__(self, held=False):
        super().__init__()
        self.held = held

    def forward(self, x):
        y = functional.gelu(x)
        return x * (y / x).detach() if self.held else y


class Block(nn.Module):
    """As in ConvNeXt or, with responses, in its second version, between a stem with a group norm and a head with a
    layer norm."""

    def __init__(self, responses=False):
        super().__init__()
        self.stem, self.groups = nn.Conv2d(3, 12, 4, 4), nn.GroupNorm(3, 12)
        self.depthwise = nn.Conv2d(12, 12, 7, padding=3, groups=12)
        self.norm, self.up, self.activation = nn.LayerNorm(12, 1e-6), nn.Linear(12, 30), nn.GELU()
        self.responses = GlobalResponseNorm(30) if responses else nn.Identity()
        self.down, self.scale = nn.Linear(30, 12), nn.Parameter(torch.randn(12, 1, 1))
        self.last, self.head = nn.LayerNorm(12, 1e-6), nn.Linear(12, 5)
        for norm in (self.groups, self.norm, self.last):
            nn.init.normal_(norm.weight)
            nn.init.normal_(norm.bias, std=0.1)

    def forward(self, x):
        x = self.groups(self.stem(x))
        y = self.activation(self.up(self.norm(self.depthwise(x).permute(0, 2, 3, 1))))
        x = x + self.scale * self.down(self.responses(y)).permute(0, 3, 1, 2)
        return self.head(self.last(x.mean((2, 3))))


class Held(nn.Module):
    """A Block whose gradient times input is the epsilon rule's relevance, for an epsilon of 0."""

    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, x):
        block = self.block
        y = block.stem(x)
        groups = y.unflatten(1, (3, 4))
        centered = groups - groups.mean((2, 3, 4), keepdim=True)
        deviation = ((centered**2).mean((2, 3, 4), keepdim=True) + 1e-5).sqrt().detach()
        y = (centered / deviation).flatten(1, 2) * block.groups.weight[:, None, None] + block.groups.bias[:, None, None]
        z = self.normed(block.norm, block.depthwise(y).permute(0, 2, 3, 1))
        z = GELU(held=True)(block.up(z))
        block.responses.held = True
        y = y + block.scale * block.down(block.responses(z)).permute(0, 3, 1, 2)
        return block.head(self.normed(block.last, y.mean((2, 3))))

    def normed(self, norm, x):
        held = LayerNorm(len(norm.weight), held=True).to(x.dtype)
        held.weight, held.bias = norm.weight, norm.bias
        return held(x)


@pytest.fixture(params=[False, True], ids=["ConvNeXt", "ConvNeXt v2"])
def block(request):
    torch.manual_seed(3)
    return Block(request.param).eval()


def gradient(module, batch, target):
    x = batch.double().requires_grad_()
    module.double()(x)[torch.arange(len(x)), torch.tensor(target)].sum().backward()
    module.float()
    return x.grad.numpy()


def test_epsilon_is_the_gradient_with_deviations_held_constant(block):
    batch = torch.rand(2, 3, 20, 24) - 0.3
    hold = {"type:multiply": "hold"} if isinstance(block.responses, GlobalResponseNorm) else {}
    explainer = fastdtd.Explainer(fastdtd.from_torch(block, batch[:1]), {"*": "epsilon(epsilon=0)", **hold})
    e = explainer(batch.numpy())
    expected = gradient(Held(block), batch, e.target) * batch.numpy()
    assert np.linalg.norm(e.relevance - expected) <= 1e-4 * np.linalg.norm(expected)
    np.testing.assert_allclose(e.relevance.sum((1, 2, 3)) + e.absorbed, e.explained, rtol=1e-4)


def test_derivatives(block):
    batch = torch.rand(2, 3, 20, 24) - 0.3
    e = fastdtd.Explainer(fastdtd.from_torch(block, batch[:1]), "gradient")(batch.numpy())
    expected = gradient(block, batch, e.target)
    assert np.linalg.norm(e.relevance - expected) <= 1e-5 * np.linalg.norm(expected)


class Last(nn.Module):
    """A norm of the last axis, where the channels are put."""

    def __init__(self, norm):
        super().__init__()
        self.norm = norm

    def forward(self, x):
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


@pytest.mark.parametrize("as_timm", [False, True])
@pytest.mark.parametrize("channels_first", [False, True])
def test_global_response_norm(as_timm, channels_first):
    """One product, whatever it is written as, and no addition; what is multiplied by has no relevance."""
    torch.manual_seed(1)
    norm = GlobalResponseNorm(6, as_timm, channels_first)
    norm = norm if channels_first else Last(norm)
    module = nn.Sequential(nn.Conv2d(3, 6, (2, 1)), norm, nn.Conv2d(6, 4, 1), nn.Flatten(), nn.LazyLinear(4))
    module(torch.zeros(1, 3, 6, 8))
    graph = scores_agree(module, (3, 6, 8))
    assert [type(layer) for layer in graph] == [
        g.Conv2d, g.Power, g.GlobalAveragePool, g.Power, g.GroupNorm, g.Power, g.Conv2d, g.Multiply, g.Conv2d,
        g.Flatten, g.Dense]
    assert len(fastdtd.rules.assign(graph).held) == 6


def with_parameters(norm):
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    return norm


@pytest.mark.parametrize(("make", "kinds"), [
    (lambda: nn.LayerNorm(8), [g.GroupNorm, g.Rearrange]),
    (lambda: nn.LayerNorm((5, 8), elementwise_affine=False), [g.GroupNorm]),
    (lambda: nn.LayerNorm((6, 5, 8), elementwise_affine=False), [g.GroupNorm]),
    (lambda: nn.LayerNorm((6, 5, 8)), None),
    (lambda: nn.LayerNorm((5, 8)), None),
    (lambda: nn.GroupNorm(3, 6), [g.GroupNorm]),
    (lambda: nn.GroupNorm(1, 6, affine=False), [g.GroupNorm]),
    (lambda: nn.InstanceNorm2d(6), [g.GroupNorm]),
    (lambda: nn.InstanceNorm2d(6, affine=True), [g.GroupNorm]),
    (lambda: nn.InstanceNorm2d(6, track_running_stats=True), []),
    (lambda: nn.RMSNorm((6, 5, 8), elementwise_affine=False), [g.GroupNorm]),
    (lambda: Last(nn.LayerNorm(6)), [g.GroupNorm]),
    (lambda: Last(nn.RMSNorm(6)), [g.GroupNorm]),
    (lambda: Last(LayerNorm(6)), [g.GroupNorm]),
    (lambda: nn.Sequential(nn.Flatten(), nn.LayerNorm(240)), [g.GroupNorm]),
])
def test_norms(make, kinds):
    torch.manual_seed(1)
    module = nn.Sequential(nn.Conv2d(3, 6, (2, 1)), with_parameters(make()), nn.Flatten(), nn.LazyLinear(4))
    module(torch.zeros(1, 3, 6, 8))
    found = [type(layer) for layer in scores_agree(module, (3, 6, 8))]
    if kinds is not None:
        assert {kind for kind in found if kind not in (g.Conv2d, g.Dense, g.Flatten)} == set(kinds)


def convnext():
    torch.manual_seed(0)
    module = models.convnext_tiny(weights=None).eval()
    for name, parameter in module.named_parameters():
        if name.endswith("layer_scale"):  # as after training, not as new
            nn.init.uniform_(parameter, 0.1, 0.5)
    return module


def test_convnext_tiny(rows):
    """As it is, whole: no elements are moved, for its norms and dense layers read the channels where they are."""
    module = convnext()
    batch = torch.rand(1, 3, 64, 64)
    model = fastdtd.from_torch(module, batch, box=(0, 1))
    assert not any(isinstance(layer, g.Rearrange) for layer in model.graph)
    assert sum(isinstance(layer, g.GroupNorm) for layer in model.graph) == 23
    e = fastdtd.Explainer(model)(batch.numpy())
    with torch.inference_mode():
        expected = module(batch).numpy()
    difference = np.abs(e.output - expected).max() / np.abs(expected).max()
    off = np.abs(e.sum + e.absorbed - e.explained).max() / e.explained.max()
    absorbed = (e.absorbed / e.explained).max()
    print(f"ConvNeXt-Tiny: scores within {difference:.1e}, conserved to {off:.1e}, absorbed {absorbed:.1%}")
    rows["networks"].append(["ConvNeXt-Tiny", "PyTorch", f"{difference:.0e}", f"{off:.0e}", "", f"{absorbed:.1%}"])
    assert difference <= 1e-5
    assert off <= 1e-4
    assert e.relevance.min() >= 0


@pytest.mark.parametrize(("exporter", "opset"), [("older", 13), ("older", 20), ("newer", 20)])
def test_exports_of_convnext_like_blocks(block, tmp_path, exporter, opset):
    """The older exporter takes layer norms apart before opset 17. Both take GELU apart before opset 20."""
    block.activation = nn.ReLU() if opset < 20 else block.activation
    path = export(block, torch.rand(1, 3, 20, 24), tmp_path / "block.onnx", exporter, opset, 2)
    model = fastdtd.convert(path)
    has_responses = isinstance(block.responses, GlobalResponseNorm)
    assert [type(layer) for layer in model.graph if isinstance(layer, (g.GroupNorm, g.Rearrange))] == [g.GroupNorm] * (
        3 + has_responses)
    assert sum(isinstance(layer, g.Multiply) for layer in model.graph) == has_responses
    assert difference(model, path) < 1e-5


def test_export_of_convnext_tiny(tmp_path):
    path = export(convnext(), torch.rand(1, 3, 64, 64), tmp_path / "convnext.onnx", "older", 20, 2)
    model = fastdtd.convert(path)
    assert not any(isinstance(layer, g.Rearrange) for layer in model.graph)
    assert difference(model, path) < 3e-5


@pytest.mark.parametrize("make", [
    lambda: nn.GroupNorm(3, 6), lambda: nn.InstanceNorm2d(6, affine=True), lambda: Last(nn.LayerNorm(6)),
    lambda: Last(LayerNorm(6)), lambda: nn.GroupNorm(3, 6, affine=False), lambda: Last(RMSNorm(6)),
])
@pytest.mark.parametrize(("exporter", "opset"), [("older", 13), ("older", 18), ("newer", 18), ("newer", 23)])
def test_exports_of_norms(make, tmp_path, exporter, opset):
    torch.manual_seed(1)
    module = nn.Sequential(nn.Conv2d(3, 6, (2, 1)), with_parameters(make()), nn.Flatten(), nn.Linear(240, 4))
    path = export(module, torch.rand(1, 3, 6, 8), tmp_path / "norm.onnx", exporter, opset, 2)
    model = fastdtd.convert(path)
    assert [type(layer) for layer in model.graph] == [g.Conv2d, g.GroupNorm, g.Flatten, g.Dense]
    assert difference(model, path) < 1e-5
