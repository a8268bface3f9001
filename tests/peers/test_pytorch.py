"""PyTorch modules converted: the networks that people have, in the modules and idioms of torchvision, give PyTorch's own scores."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from fastdtd import ConversionError, Explainer, from_torch
from fastdtd import graph as g


def scores_agree(module, shape, tolerance=1e-4):
    """Scores within a relative 1e-4 of PyTorch's; relevance conserved and not negative."""
    torch.manual_seed(0)
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):  # as after training, not as new
            part.running_mean.normal_(0, 0.1)
            part.running_var.uniform_(0.5, 1.5)
            nn.init.uniform_(part.weight, 0.5, 1.5)
            nn.init.normal_(part.bias, 0, 0.1)
    batch = torch.rand(2, *shape)
    model = from_torch(module, batch[:1], box=(0, 1))
    e = Explainer(model)(batch.numpy())
    with torch.inference_mode():
        expected = module.eval()(batch).numpy()
    np.testing.assert_allclose(e.output, expected, atol=tolerance * np.abs(expected).max())
    np.testing.assert_allclose(e.relevance.sum((1, 2, 3)) + sum(e.ledger.values()), e.explained, rtol=1e-4, atol=1e-6)
    assert e.relevance.min() >= 0
    return model.graph


def conv(inputs, outputs, kernel=3, stride=1, groups=1, activation=nn.ReLU):
    return nn.Sequential(nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False), nn.BatchNorm2d(outputs),
                         activation(inplace=True))


class AlexNet(nn.Module):
    """Groups, local response normalisation, a dropout, an adaptive pool that divides."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 16, 11, 4, 2), nn.ReLU(inplace=True), nn.LocalResponseNorm(5, 1e-2), nn.MaxPool2d(3, 2),
            nn.Conv2d(16, 32, 5, padding=2, groups=2), nn.ReLU(inplace=True), nn.LocalResponseNorm(3, k=2.0), nn.MaxPool2d(3, 2))
        self.pool = nn.AdaptiveAvgPool2d((2, 2))
        self.classifier = nn.Sequential(nn.Dropout(), nn.Linear(32 * 4, 20), nn.ReLU(), nn.Linear(20, 7))

    def forward(self, x):
        return self.classifier(torch.flatten(self.pool(self.features(x)), 1))


class Residual(nn.Module):
    """As ResNet: batch norms, a strided shortcut, sums in place."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(conv(3, 8, 7, 2), nn.MaxPool2d(3, 2, 1))
        self.one = nn.Sequential(conv(8, 16, 3, 2), nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16))
        self.short = nn.Sequential(nn.Conv2d(8, 16, 1, 2, bias=False), nn.BatchNorm2d(16))
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        x = self.stem(x)
        y = self.one(x)
        y += self.short(x)
        return self.head(functional.relu(y).mean((2, 3)))


class Inverted(nn.Module):
    """As MobileNet v2: ReLU6, depthwise convolutions, sums of what can be negative."""

    def __init__(self):
        super().__init__()
        self.stem = conv(3, 8, 3, 2, activation=nn.ReLU6)
        self.block = nn.Sequential(conv(8, 24, 1, activation=nn.ReLU6), conv(24, 24, 3, groups=24, activation=nn.ReLU6),
                                   nn.Conv2d(24, 8, 1, bias=False), nn.BatchNorm2d(8))
        self.last = conv(8, 32, 1, activation=nn.ReLU6)
        self.head = nn.Sequential(nn.Dropout(0.2), nn.Linear(32, 4))

    def forward(self, x):
        x = self.stem(x)
        x = self.last(x + self.block(x))
        return self.head(functional.adaptive_avg_pool2d(x, (1, 1)).reshape(x.shape[0], -1))


class DenseBlock(nn.Module):
    """As DenseNet: batch norms before convolutions, of concatenations; average pools between."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.parts = nn.ModuleList(nn.Sequential(nn.BatchNorm2d(8 + 4 * i), nn.ReLU(), nn.Conv2d(8 + 4 * i, 4, 3, padding=1, bias=False))
                                   for i in range(3))
        self.transition = nn.Sequential(nn.BatchNorm2d(20), nn.ReLU(), nn.Conv2d(20, 10, 1), nn.AvgPool2d(2, 2))
        self.norm, self.head = nn.BatchNorm2d(10), nn.Linear(10, 6)

    def forward(self, x):
        tensors = [self.stem(x)]
        for part in self.parts:
            tensors.append(part(torch.cat(tensors, 1)))
        x = functional.relu(self.norm(self.transition(torch.cat(tensors, 1))), inplace=True)
        return self.head(torch.flatten(functional.adaptive_avg_pool2d(x, 1), 1))


class Inception(nn.Module):
    """As GoogLeNet: branches, ceil-mode pools, normalisation as a function; arithmetic with constants on the input."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 12, 7, 2, 3)
        self.branches = nn.ModuleList([conv(12, 6, 1), nn.Sequential(conv(12, 4, 1), conv(4, 8)),
                                       nn.Sequential(nn.MaxPool2d(3, 1, 1, ceil_mode=True), conv(12, 4, 1))])
        self.head = nn.Conv2d(18, 5, 1)

    def forward(self, x):
        x = (x - 0.5) / 0.25
        x = functional.max_pool2d(functional.relu(self.first(x)), 3, 2, ceil_mode=True)
        x = functional.local_response_norm(x, 5, 1e-2, 0.75, 1.0)
        x = torch.cat([branch(x) for branch in self.branches], 1)
        return torch.flatten(functional.adaptive_avg_pool2d(self.head(x), 1), 1)


@pytest.mark.parametrize(("module", "size"), [(AlexNet, 83), (Residual, 33), (Inverted, 32), (DenseBlock, 16), (Inception, 45)])
def test_networks(module, size):
    torch.manual_seed(1)
    scores_agree(module(), (3, size, size))


def test_layers_are_named_after_modules():
    torch.manual_seed(1)
    graph = scores_agree(AlexNet(), (3, 83, 83))
    assert [layer.name for layer in graph if isinstance(layer, g.LocalResponseNorm)] == ["features.2", "features.6"]
    assert graph.layers[0].name == "features.0"


def test_flat_inputs_and_softmax():
    torch.manual_seed(1)
    module = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3), nn.Softmax(1))
    model = from_torch(module, torch.zeros(1, 4))
    assert [type(layer) for layer in model.graph] == [g.Dense, g.ReLU, g.Dense]
    assert model.preprocessing.color is None


def test_the_module_is_left_as_it_was():
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    module[1].eval()
    before = [part.training for part in module.modules()]
    from_torch(module, torch.zeros(1, 3, 8, 8))
    assert [part.training for part in module.modules()] == before == [True, True, False, True, True, True]


class Computed(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function, self.conv = function, nn.Conv2d(3, 4, 3)

    def forward(self, x):
        return torch.flatten(functional.adaptive_avg_pool2d(self.function(self.conv(x)), 1), 1)


@pytest.mark.parametrize(("function", "message"), [
    (torch.sigmoid, r"Computed: sigmoid \(node 'sigmoid'\) is not supported; nearest: relu, leaky_relu or clamp; "
     "supported: .*, view"),
    (lambda y: y * y.relu(), "multiplies two tensors"),
    (lambda y: y ** 3, "raises to 3 what can be negative; required: an even power"),
    (lambda y: torch.sign(y) + y, "reads the sign of a tensor"),
    (lambda y: y / (1 + y * y), "divides by what is computed"),
    (lambda y: y.flatten(0, 1)[None, :, :, None], "along axis 0"),
    (lambda y: functional.pad(y, (1, 1), value=2.0), "has mode 'constant' and value 2.0"),
    (lambda y: functional.hardtanh(y, 1, 2), r"clips to \[1, 2\]"),
    (lambda y: functional.local_response_norm(y, 4), "over 4 channels; required: an odd number"),
    (lambda y: functional.adaptive_avg_pool2d(y, 4), r"makes \(4, 4\) of \(6, 6\); required: a size that divides it"),
    (lambda y: torch.cat([y, y], 0)[:1], "works along axis 0"),
    (lambda y: functional.max_pool2d(y, 2, dilation=2), "has a dilation"),
    (lambda y: y if y.sum() > 0 else -y, "torch.export cannot export the module"),
])
def test_refusals(function, message):
    with pytest.raises(ConversionError, match=message):
        from_torch(Computed(function), torch.zeros(1, 3, 8, 8))


@pytest.mark.parametrize(("module", "example", "message"), [
    (len, torch.zeros(1, 3, 8, 8), "required: a torch.nn.Module"),
    (nn.ReLU(), np.zeros((1, 3, 8, 8)), "the example is a ndarray; required: a tensor"),
    (nn.ReLU(), torch.zeros(1, 3, 8, 8, 8), "a tensor of 5 axes"),
    (nn.Conv2d(3, 4, 3), torch.zeros(3, 8, 8), "required: an example .N, C, H, W., with its batch"),
])
def test_what_is_given(module, example, message):
    with pytest.raises(ConversionError, match=message):
        from_torch(module, example)
