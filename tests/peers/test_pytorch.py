"""PyTorch modules converted: the networks that people have, in the modules and idioms of torchvision, give PyTorch's
own scores.
"""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from fastdtd import ConversionError, Explainer, cli, convert, from_torch, load
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
    return nn.Sequential(nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False),
                         nn.BatchNorm2d(outputs), activation(inplace=True))


class AlexNet(nn.Module):
    """Groups, local response normalisation, a dropout, an adaptive pool that divides."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 16, 11, 4, 2), nn.ReLU(inplace=True), nn.LocalResponseNorm(5, 1e-2),
                                      nn.MaxPool2d(3, 2), nn.Conv2d(16, 32, 5, padding=2, groups=2),
                                      nn.ReLU(inplace=True), nn.LocalResponseNorm(3, k=2.0), nn.MaxPool2d(3, 2))
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
        self.parts = nn.ModuleList(
            nn.Sequential(nn.BatchNorm2d(8 + 4*i), nn.ReLU(), nn.Conv2d(8 + 4*i, 4, 3, padding=1, bias=False))
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


@pytest.mark.parametrize(("module", "size"), [(AlexNet, 83), (Residual, 33), (Inverted, 32), (DenseBlock, 16),
                                              (Inception, 45)])
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


class Shuffled(nn.Module):
    """As ShuffleNet v2: half of the channels pass, and all are shuffled."""

    def __init__(self):
        super().__init__()
        self.stem, self.branch = conv(3, 8, 3, 2), conv(4, 4, 3)
        self.head = nn.Conv2d(8, 5, 1)

    def forward(self, x):
        passed, x = self.stem(x).chunk(2, dim=1)
        x = torch.cat((passed, self.branch(x)), 1)
        n, channels, height, width = x.size()
        x = x.view(n, 2, channels // 2, height, width).transpose(1, 2).contiguous().view(n, channels, height, width)
        return self.head(x).mean([2, 3])


class Pixelwise(nn.Module):
    """Channels last, where a linear layer is a convolution of 1 x 1."""

    def __init__(self):
        super().__init__()
        self.inner, self.head = nn.Linear(3, 6), nn.Linear(6, 4)

    def forward(self, x):
        return self.head(functional.relu(self.inner(x.permute(0, 2, 3, 1))).permute(0, 3, 1, 2).mean((2, 3)))


def headed(*parts, features):
    return nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), *parts, nn.Flatten(), nn.Linear(features, 5))


@pytest.mark.parametrize(
    ("module", "layers"),
    [(Shuffled, {g.Rearrange: 3, g.Concat: 1}), (Pixelwise, {g.Conv2d: 1, g.Dense: 1, g.Rearrange: 0}),
     (lambda: headed(nn.LeakyReLU(0.2), features=6 * 64), {g.LeakyReLU: 1}),
     (lambda: headed(nn.PReLU(), nn.MaxPool2d(2), nn.PReLU(6), features=6 * 16), {g.LeakyReLU: 2}),
     (lambda: headed(nn.LPPool2d(2, 2), features=6 * 16), {g.Power: 2, g.AveragePool2d: 1, g.ReLU: 0}),
     (lambda: headed(nn.ConvTranspose2d(6, 4, (3, 2), 2, 1, (1, 0), groups=2), features=4 * 16 * 14), {g.Conv2d: 2}),
     (lambda: headed(nn.Flatten(2), nn.Conv1d(6, 4, 5, 2, 2), nn.ReLU(), nn.MaxPool1d(2), nn.AvgPool1d(3, 2, 1),
                     features=4 * 8), {g.Conv2d: 2, g.MaxPool2d: 1, g.AveragePool2d: 1}),
     (lambda: headed(nn.Conv2d(6, 8, 1), nn.PixelShuffle(2), nn.Upsample(scale_factor=2), nn.PixelUnshuffle(4),
                     features=32 * 64), {g.Rearrange: 1}),
     (lambda: headed(nn.ReflectionPad2d(1), nn.MaxPool2d(2), nn.ZeroPad2d(
         (1, 0, 2, 1)), nn.Conv2d(6, 4, 3), features=4 * 6 * 4), {g.Rearrange: 1}), ])
def test_what_moves_numbers_and_more(module, layers):
    torch.manual_seed(1)
    graph = scores_agree(module(), (3, 8, 8))
    assert {kind: sum(isinstance(layer, kind) for layer in graph) for kind in layers} == layers


def test_weights_that_are_computed():
    torch.manual_seed(1)
    scores_agree(
        nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3)), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
                      nn.Flatten()), (3, 8, 8))


# ---- By name ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A working directory with code that makes modules, and a state dict."""
    (tmp_path / "my_networks.py").write_text("""
from torch import nn

def small():
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3),
                         nn.Softmax(1))

made = small()

def none():
    return 3

def failing():
    raise OSError("nowhere to be found")
""")
    monkeypatch.chdir(tmp_path)
    module = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3),
                           nn.Softmax(1))
    torch.save(module.state_dict(), "state.pth")
    torch.save({"epoch": 3, "state_dict": {f"module.{name}": value for name, value in module.state_dict().items()}},
               "checkpoint.pth")
    torch.save(module, "module.pth")
    torch.save(nn.Linear(2, 3).state_dict(), "other.pth")
    torch.save([1, 2], "list.pth")
    (tmp_path / "garbage.pth").write_bytes(b"garbage")
    return module


@pytest.mark.parametrize("weights", ["state.pth", "checkpoint.pth"])
def test_module_by_name_and_state_dict(project, weights, capsys):
    assert cli.main(["convert", "my_networks:small", weights, "net.h5", "--size", "9,8", "--verify"]) == 0
    assert "my_networks:small: scores within " in capsys.readouterr().out
    model = load("net.h5")
    assert model.graph.input_shape == (1, 9, 8)
    np.testing.assert_array_equal(model.graph.layers[-1].weight, project[4].weight.detach().numpy())
    assert model.provenance["source"] == f"my_networks:small, {weights}"
    assert len(model.provenance["sha256"]) == 64


def test_module_by_name_with_the_weights_it_has(project, capsys):
    assert cli.main(["convert", "my_networks:made", "net.h5", "--size", "9", "--verify"]) == 0
    assert "of PyTorch's, relative to the largest" in capsys.readouterr().out


@pytest.mark.parametrize(("source", "weights", "size", "message"), [
    ("my_networks:none", None, 9, "'none' made a int; required: a torch.nn.Module"),
    ("my_networks:failing", None, 9, "calling 'failing' failed: OSError: nowhere to be found"),
    ("my_networks:missing", None, 9, "AttributeError"),
    ("no_such_networks:small", None, 9, "importing 'no_such_networks' .* ModuleNotFoundError"),
    ("my_networks:small", None, None, r"give size=\(height, width\)"),
    ("my_networks:small", "module.pth", 9, "holds more than tensors; required: a state dict"),
    ("my_networks:small", "garbage.pth", 9, "is damaged, or holds more than tensors"),
    ("my_networks:small", "list.pth", 9, "holds no state dict"),
    ("my_networks:small", "other.pth", 9, "does not fit the module: Missing key"),
    ("my_networks:small", "missing.pth", 9, "no file 'missing.pth'"),
    ("module.pth", None, 9, "would run code that is pickled in it; required: MODULE:CALLABLE"),
    ("module.pt2", None, 9, "would run code that is pickled in it"),
])
def test_refused_names_and_weights(project, source, weights, size, message):
    with pytest.raises(ConversionError, match=message):
        convert(source, weights, size=size)
