"""PyTorch modules converted: the networks that people have, in the modules and idioms of torchvision, give PyTorch's
own scores.
"""

import re

import numpy as np
import pytest
import torch
import written
from torch import nn
from torch.nn import functional
from torch_nets import zennit_relevance

from fastdtd import ConversionError, Explainer, cli, convert, from_torch, load
from fastdtd import graph as g
from fastdtd.importers.builder import Builder
from fastdtd.model import Model, Preprocessing


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


@pytest.mark.parametrize("function", [
    lambda y: functional.interpolate(y, scale_factor=2, mode="bilinear"),
    lambda y: functional.interpolate(y, scale_factor=(1.7, 0.6), mode="bilinear"),
    lambda y: functional.interpolate(y, scale_factor=1.7, mode="bilinear", recompute_scale_factor=True),
    lambda y: functional.interpolate(y, size=(9, 4), mode="bilinear"),
    lambda y: functional.interpolate(y, size=(11, 1), mode="bilinear", align_corners=True),
    lambda y: functional.interpolate(y.flatten(2), size=50, mode="linear")[..., None],
    lambda y: functional.adaptive_avg_pool2d(y, (4, 5)),
    lambda y: functional.adaptive_avg_pool2d(y, (8, 4)),
    lambda y: functional.adaptive_max_pool2d(y, (4, 5)),
    lambda y: functional.adaptive_max_pool2d(y, (8, 4)),
    lambda y: functional.adaptive_avg_pool1d(y.flatten(2), 7)[..., None],
    lambda y: functional.pixel_shuffle(y, 2),
])
def test_other_sizes(function):
    torch.manual_seed(1)
    scores_agree(Computed(lambda y: function(y)[:, :1] + function(y)[:, :1]), (3, 8, 8))
    scores_agree(Computed(function), (3, 8, 8))


class Computed(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function, self.conv = function, nn.Conv2d(3, 4, 3)

    def forward(self, x):
        return torch.flatten(functional.adaptive_avg_pool2d(self.function(self.conv(x)), 1), 1)


@pytest.mark.parametrize(("function", "message"), [
    (functional.softsign, "divides by what is computed"),
    (functional.celu, r"Computed: celu \(node 'celu'\) is not supported; nearest: elu; supported: .*, view"),
    (lambda y: y * y.relu(), r"mul \(node 'mul'\) makes a function of each element that no layer has"),
    (lambda y: y * torch.tanh(y.flip(2)), "multiplies two tensors"),
    (lambda y: y ** 3, "makes a function of each element that no layer has"),
    (lambda y: y ** 5, "raises to 5 what can be negative; required: an even power"),
    (lambda y: torch.sign(y) + y, "reads the sign of a tensor"),
    (lambda y: torch.sign(y) * y.abs().flip(3), "multiplies two tensors"),
    (lambda y: torch.sign(y) * y.abs().roll(1, 2), "multiplies two tensors"),
    (lambda y: torch.sign(y) * y.abs().transpose(2, 3), "multiplies two tensors"),
    (lambda y: torch.sign(y) * y.abs().sqrt(), "multiplies two tensors"),
    (lambda y: torch.sign(y) * y.relu().abs(), "multiplies two tensors"),
    (lambda y: y / (1 + y * y), "divides by what is computed"),
    (lambda y: y.flatten(0, 1)[None, :, :, None], "the batch left in front"),
    (lambda y: functional.pad(y, (1, 1), value=2.0), "has mode 'constant' and value 2.0"),
    (lambda y: functional.hardtanh(y, 1, 2), r"clips to \[1, 2\]"),
    (lambda y: functional.interpolate(y, scale_factor=2, mode="bicubic"), "nearest: upsample_bilinear2d"),
    (lambda y: functional.interpolate(y, size=4, mode="bilinear", antialias=True), "nearest: upsample_bilinear2d"),
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


class PerPixel(nn.Module):
    """Constants that differ within a channel, and a batch norm of elements."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 4, 3), nn.BatchNorm1d(4 * 36), nn.Linear(4 * 36, 5)
        self.norm.running_mean = torch.randn(4 * 36)
        self.register_buffer("scale", torch.randn(1, 4, 6, 6))

    def forward(self, x):
        x = torch.maximum(self.conv(x), torch.full((4, 1, 1), -0.1))
        return self.head(functional.relu(self.norm(torch.flatten(x * self.scale + torch.ones(6, 6).triu(), 1))))


def test_constants_by_pixel():
    torch.manual_seed(1)
    scores_agree(PerPixel(), (3, 8, 8))


def test_weights_in_bfloat16():
    """Scores as of the same weights in float32: bfloat16 has but three digits."""
    torch.manual_seed(1)
    module = headed(nn.ReLU(), features=6 * 64).bfloat16()
    model = from_torch(module, torch.zeros(1, 3, 8, 8, dtype=torch.bfloat16))
    batch = torch.rand(2, 3, 8, 8)
    with torch.inference_mode():
        expected = module.float()(batch).numpy()
    np.testing.assert_allclose(Explainer(model)(batch.numpy()).output, expected, atol=1e-4)


def test_weights_that_are_computed():
    torch.manual_seed(1)
    scores_agree(
        nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3)), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
                      nn.Flatten()), (3, 8, 8))


# ---- What torch.export leaves to be understood -----------------------------------------------------------------------


class Headed(nn.Module):
    """A function of a convolution's output, and a layer that tells all elements of what comes out apart."""

    def __init__(self, function, **buffers):
        super().__init__()
        self.function, self.conv, self.norm = function, nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)
        for name, value in buffers.items():
            self.register_buffer(name, value)
        self.head = nn.LazyLinear(5)

    def forward(self, x):
        return self.head(torch.flatten(self.function(self, x), 1))


def in_place(change):
    """`change` writes into what a convolution made."""
    def function(module, x):
        h = module.conv(x)
        changed = change(h)
        return h if changed is None else changed

    return function


def scores_of(function, **buffers):
    torch.manual_seed(1)
    module = Headed(function, **buffers)
    with torch.no_grad():
        module(torch.zeros(1, 3, 8, 8))
    return scores_agree(module, (3, 8, 8))


@pytest.mark.parametrize("function", [
    lambda module, x: functional.avg_pool2d(module.conv(x), 2, divisor_override=3),
    lambda module, x: functional.avg_pool2d(module.conv(x), 3, 2, 1, count_include_pad=False, divisor_override=7),
    lambda module, x: functional.local_response_norm(module.conv(x), 2, 0.1, 0.6, 2.0),
    lambda module, x: functional.local_response_norm(module.conv(x), 4, 0.1, 0.6, 2.0),
])
def test_windows_of_their_own(function):
    scores_of(function)


def set_slice(h, key, value):
    h[key] = value


VIEWS = [
    lambda h: h[:, :2], lambda h: h[:, 1::2], lambda h: h[:, -1], lambda h: h[:, :, 2:4, ::3],
    lambda h: h.narrow(1, 2, 3), lambda h: h.select(2, 1), lambda h: h.transpose(2, 3)[:, :, 0],
    lambda h: h.permute(0, 2, 3, 1)[..., 2:], lambda h: h.view(-1, 2, 3, 6, 6)[:, 1],
    lambda h: h.reshape(-1, 6, 36)[..., 5:], lambda h: h.flatten(1)[:, 7:100], lambda h: h.unsqueeze(1)[:, 0, 1],
    lambda h: h.unflatten(1, (2, 3))[:, :, 1], lambda h: h.detach()[:, :3],
    lambda h: functional.dropout(h, 0.5, training=False)[:, :3], lambda h: h.expand(-1, -1, -1, -1)[:, :1],
    lambda h: h.contiguous()[:, 3:], lambda h: h.unbind(1)[2], lambda h: h.split(2, 1)[1],
    lambda h: h.to(torch.float32)[:, 1:2]]


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("write", [lambda v: v.mul_(0.5), lambda v: v.fill_(-0.3)])
def test_writing_through_a_view(view, write):
    def change(h):
        write(view(h))
        h[:, 3, 2].mul_(2.0)

    scores_of(in_place(change))


@pytest.mark.parametrize("write", [lambda v: v.relu_(), lambda v: v.zero_(), lambda v: v.sub_(0.1),
                                   lambda v: v.copy_(torch.ones(6)), lambda v: v.clamp_(-0.1, 0.1)])
def test_other_writes(write):
    scores_of(in_place(lambda h: (write(h[:, 1::2]), None)[1]))


@pytest.mark.parametrize("view", VIEWS)
def test_a_view_of_what_is_written_later(view):
    def change(h):
        before = view(h)
        h.relu_()
        h[:, 2:4].mul_(2.0)
        return before

    scores_of(in_place(change))


def test_writing_a_tensor_into_another():
    def change(h):
        h[:, 1::2] = h[:, ::2] * 2.0
        h[:, 0] = h[:, 1].relu()
        h[:, :, 1] = torch.arange(6.0) / 6
        return h

    scores_of(in_place(change))


@pytest.mark.parametrize("start", [torch.zeros, torch.ones])
def test_writing_into_constants(start):
    def function(module, x):
        out = start(len(x), 8, 6, 6)
        out[:, 1:7] = module.conv(x)
        return out

    scores_of(function)


@pytest.mark.parametrize("change", [lambda h: set_slice(h, h < 0, 0.0), lambda h: h.diagonal(0, 2, 3).zero_()])
def test_writing_where_it_cannot_be_told(change):
    with pytest.raises(ConversionError, match=r"(lt|diagonal) .* is not supported"):
        scores_of(in_place(lambda h: (change(h), None)[1]))


def test_what_is_written_into_buffers_and_the_input():
    def function(module, x):
        module.count.add_(1)
        x -= 0.5
        return module.conv(x) * module.count

    scores_of(function, count=torch.zeros(()))


def under(context):
    def function(module, x):
        with context():
            h = module.norm(module.conv(x))
        return h.relu()

    return function


def nested(module, x):
    with torch.no_grad():
        h = module.conv(x)
        with torch.enable_grad():
            return h.relu()


def grad_is_set(module, x):
    torch.set_grad_enabled(False)
    h = module.conv(x)
    torch.set_grad_enabled(True)
    return h.relu()


@pytest.mark.parametrize("function", [
    under(torch.no_grad), under(torch.inference_mode), under(torch.enable_grad), under(lambda: torch.autocast("cuda")),
    under(lambda: torch.autocast("cpu", enabled=False)), torch.no_grad()(lambda module, x: module.conv(x)),
    torch.inference_mode()(lambda module, x: module.conv(x)), nested, grad_is_set])
def test_under_contexts(function):
    graph = scores_of(function)
    assert graph.layers[0].name == "conv"


def test_control_flow_is_refused_by_name():
    def function(module, x):
        return torch.cond(module.flag > 0, lambda h: h + 1, lambda h: h - 1, (module.conv(x),))

    with pytest.raises(ConversionError, match=r"cond .node 'cond'.* is not supported"):
        scores_of(function, flag=torch.ones(()))


@pytest.mark.parametrize("cast", [
    lambda h: h.float(), lambda h: h.to(torch.float32), lambda h: h.double().float(), lambda h: h.to("cpu"),
    lambda h: h.type_as(torch.zeros(())), lambda h: h.to(torch.float64).to(h.dtype),
    lambda h: torch.relu(h.double()).float(), lambda h: h.to(memory_format=torch.channels_last),
    lambda h: h.mean(2, dtype=torch.float64).float()])
def test_casts_between_floating_types(cast):
    scores_of(in_place(cast))


@pytest.mark.parametrize("cast", [lambda h: h.int().float(), lambda h: h.bool().float(),
                                  lambda h: h.to(torch.uint8).float(), lambda h: h.long() * 1.0])
def test_casts_to_whole_numbers(cast):
    with pytest.raises(ConversionError, match=r"_to_copy .* makes (u?int\d+|bool) of what is computed; required: a "
                                              "floating-point type"):
        scores_of(in_place(cast))


def batch_norm(module, x, **options):
    return functional.batch_norm(module.conv(x), module.norm.running_mean, module.norm.running_var, **options)


@pytest.mark.parametrize(("function", "message"), [
    (lambda module, x: batch_norm(module, x, training=True), "normalises by the statistics of its batch"),
    (lambda module, x: functional.batch_norm(module.conv(x), None, None, training=True), "by the statistics of its"),
    (lambda module, x: functional.dropout(module.conv(x), training=True), "dropout .* is not supported"),
    (lambda module, x: torch.addmm(torch.zeros(5), module.conv(x).flatten(1), torch.ones(216, 5), beta=0.5),
     "has factors"),
    (lambda module, x: functional.avg_pool2d(module.conv(x), 3, 2, ceil_mode=True, divisor_override=3),
     "has the divisor 3, ceil_mode True; required: a whole number from 1, and no ceil_mode"),
    (lambda module, x: functional.avg_pool2d(module.conv(x), 2, divisor_override=-3), "has the divisor -3"),
    (lambda module, x: functional.avg_pool3d(module.conv(x), 3, ceil_mode=True), "ceil_mode; required: neither"),
    (lambda module, x: torch.div(module.conv(x), 2.0, rounding_mode="floor"), "rounds"),
    (lambda module, x: functional.max_pool2d(module.conv(x), 2, return_indices=True)[1].float(), "takes the positions"),
])
def test_arguments_that_make_something_else(function, message):
    with pytest.raises(ConversionError, match=message):
        scores_of(function)


def test_an_argument_that_no_operator_reads(monkeypatch):
    """Should one be overlooked: it is refused unless it is what it is by default."""
    from fastdtd.importers.pytorch import reader

    monkeypatch.setitem(reader.OPERATORS, "hardtanh", lambda b, node: b.relu(node.tensor()))
    for low, high in ((0.0, 1.0), (-1.0, 2.0)):
        with pytest.raises(ConversionError, match=r"hardtanh .* has m(in|ax)_val .*, which is not supported; required"):
            scores_of(in_place(lambda h, low=low, high=high: functional.hardtanh(h, low, high)))


# ---- The scores of the module itself ---------------------------------------------------------------------------------


def small(*ends):
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                         *ends)


@pytest.mark.parametrize("end", [nn.Identity(), nn.Softmax(1), nn.LogSoftmax(1), nn.Sigmoid()])
def test_another_network_is_found_out(monkeypatch, end):
    """A ReLU that is forgotten."""
    assert from_torch(small(end), torch.zeros(1, 3, 8, 8)).provenance["verified"] == f"PyTorch {torch.__version__}"
    monkeypatch.setattr(Builder, "relu", lambda self, x, part="": x)
    with pytest.raises(ConversionError, match=(
            rf"output \d.* is -?\d\S+, and PyTorch {re.escape(torch.__version__)} gives -?\d\S+; .*"
            r"What differs first is relu \(node 'relu', in module '1'\)\. Please report this network; verify=False")):
        from_torch(small(end), torch.zeros(1, 3, 8, 8))
    assert "verified" not in from_torch(small(end), torch.zeros(1, 3, 8, 8), verify=False).provenance


class Counting(nn.Module):
    """Counts its calls in a buffer that its scores depend on, and works in half precision."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x):
        self.count += 1
        with torch.autocast("cpu", torch.bfloat16):
            return self.conv(x).mean((2, 3)) * self.count


def test_a_module_that_changes_itself_is_left_as_it_was():
    module = Counting().train()
    assert "verified" in from_torch(module, torch.zeros(1, 3, 8, 8), verify=True).provenance
    assert module.count == 0
    assert module.training


def test_a_module_that_does_not_run(caplog):
    module = small()
    module.register_forward_hook(lambda *_: 1 / 0 if not torch.compiler.is_exporting() else None)
    assert "verified" not in from_torch(module, torch.zeros(1, 3, 8, 8)).provenance
    assert f"compared with nothing: PyTorch {torch.__version__} cannot run it: division by zero" in caplog.text
    with pytest.raises(ConversionError, match="cannot run it: division by zero"):
        from_torch(module, torch.zeros(1, 3, 8, 8), verify=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_modules_of_other_precisions(dtype):
    assert "verified" in from_torch(small().to(dtype), torch.zeros(1, 3, 8, 8, dtype=dtype), verify=True).provenance


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
    assert f"my_networks:small: the scores are those of PyTorch {torch.__version__}" in capsys.readouterr().out
    model = load("net.h5")
    assert model.graph.input_shape == (1, 9, 8)
    np.testing.assert_array_equal(model.graph.layers[-1].weight, project[4].weight.detach().numpy())
    assert model.provenance["source"] == f"my_networks:small, {weights}"
    assert len(model.provenance["sha256"]) == 64


def test_module_by_name_with_the_weights_it_has(project, capsys):
    assert cli.main(["convert", "my_networks:made", "net.h5", "--size", "9", "--verify"]) == 0
    assert "the scores are those of PyTorch" in capsys.readouterr().out


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


def test_a_module_that_makes_too_much():
    module = nn.Sequential(*(nn.Conv2d(3, 3, 1) for _ in range(9)), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    example = torch.rand(1, 3, 8, 8)
    assert from_torch(module, example, max_constants="1MB").graph
    with pytest.raises(ConversionError, match=r"in module '\d'\) .* at most 50KiB are accepted"):
        from_torch(module, example, max_constants="50KiB")


# ---- Several inputs and outputs --------------------------------------------------------------------------------------


class Both(nn.Module):
    """A picture and a vector in; scores, features and a map out."""

    def __init__(self, kind=dict):
        super().__init__()
        self.kind = kind
        self.conv, self.head, self.map = nn.Conv2d(3, 6, 3), nn.Linear(10, 5), nn.Conv2d(6, 4, 1)

    def forward(self, picture, age):
        features = self.conv(picture).relu()
        scores = self.head(torch.cat([features.mean((2, 3)), age], 1)).softmax(1)
        made = {"scores": scores, "map": self.map(features).softmax(1)}
        return made if self.kind is dict else self.kind(made.values())


@pytest.mark.parametrize("kind", [dict, tuple, list])
@pytest.mark.parametrize("output", [0, 1, "scores", "map", None])
def test_several_inputs_and_outputs(kind, output, caplog):
    if kind is not dict and isinstance(output, str):
        output = {"scores": "0", "map": "1"}[output]
    torch.manual_seed(0)
    module, picture, age = Both(kind).eval(), torch.rand(2, 3, 8, 9), torch.rand(2, 4)
    model = from_torch(module, (picture[:1], age[:1]), output=output, verify=True,
                       box={"picture": (0, 1), "age": (0, 1)})
    is_map = output in (1, "map", "1")
    assert model.inputs == ({"picture": (3, 8, 9), "age": (4, 1, 1)})
    assert model.graph.output_shape == ((4, 6, 7) if is_map else (5, 1, 1))
    assert ("the first is explained" in caplog.text) == (output is None)
    e = Explainer(model)({"picture": picture.numpy(), "age": age.numpy()})
    np.testing.assert_allclose(e.sum + e.absorbed, e.explained, rtol=1e-4, atol=1e-6)
    assert is_map == (not e.of("age").any())


def test_outputs_that_a_module_does_not_have():
    for output in (2, "loss", -1):
        with pytest.raises(ConversionError, match="required: one of 'scores', 'map', or a number from 0 to 1"):
            from_torch(Both(), (torch.rand(1, 3, 8, 9), torch.rand(1, 4)), output=output)
    with pytest.raises(ConversionError, match=r"the example is a tensor of 2 axes, .2, 4."):
        from_torch(Both(), (torch.rand(1, 3, 8, 9), torch.rand(2, 4)))


class Counted(Both):
    """A vector of whole numbers, cast to floating point; or, looked up, tokens."""

    def __init__(self, has_tokens=False):
        super().__init__()
        self.table = nn.Embedding(9, 4) if has_tokens else None

    def forward(self, picture, age):
        return super().forward(picture, age.float() if self.table is None else self.table(age).mean(1))


def test_inputs_of_whole_numbers():
    example = torch.rand(1, 3, 8, 9), torch.ones(1, 4, dtype=torch.long)
    model = from_torch(Counted().eval(), example, verify=True)
    assert model.inputs == {"picture": (3, 8, 9), "age": (4, 1, 1)}
    with pytest.raises(ConversionError, match=r"embedding .* is not supported; nearest: none: a module that begins"):
        from_torch(Counted(True).eval(), example)


@pytest.mark.parametrize("make", [
    lambda: nn.MultiheadAttention(8, 2, batch_first=True), lambda: nn.TransformerEncoderLayer(8, 2, batch_first=True)])
def test_attention_is_refused_with_its_page(make):
    class Attending(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.attention = nn.Conv2d(3, 8, 4, 4), make()

        def forward(self, x):
            tokens = self.conv(x).flatten(2).transpose(1, 2)
            made = self.attention(tokens, tokens, tokens)[0] if isinstance(
                self.attention, nn.MultiheadAttention) else self.attention(tokens)
            return made.mean(1)

    with pytest.raises(ConversionError, match=r"docs/method.md#attention"):
        from_torch(Attending().eval(), torch.rand(1, 3, 16, 16))


@pytest.mark.parametrize("branches", [
    (written.SelectiveKernel,), (written.SelectiveKernel, 3), (written.SplitAttention,),
    (written.SplitAttention, 2, 1), (written.SplitAttention, 4, 1, True)])
def test_branches_that_a_softmax_weighs(branches):
    """SKNet's and ResNeSt's: PyTorch's scores, and zennit's relevance with the softmax held constant."""
    torch.manual_seed(1)
    module = written.with_branches(*branches)
    graph = scores_agree(module, (3, 11, 10))
    assert sum(isinstance(layer, g.Softmax) for layer in graph) == 1
    batch = np.random.default_rng(0).random((2, *graph.input_shape), np.float32)
    explainer = Explainer(Model(graph, Preprocessing(None)))
    e = explainer(batch)
    theirs, _ = zennit_relevance(graph, {name: rule.name for name, rule in explainer.rules.items()}, batch, e.target)
    assert np.linalg.norm(e.relevance - theirs) <= 1e-5 * np.linalg.norm(theirs)
