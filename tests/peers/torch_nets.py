"""A Graph as a PyTorch module, and zennit's rules for its layers: what the peers compute of the same network.

Paddings are the modules' own where they are symmetric. zennit takes what is padded outside of a module for input, which
makes a difference where zero is no zero: under zB, w2 and flat.
"""

import importlib.util
import inspect
import re
import warnings
from pathlib import Path

import numpy as np
import torch
from captum.attr import LRP
from captum.attr._utils.lrp_rules import Alpha1_Beta0_Rule, EpsilonRule
from torch import nn


def _declare_operators():
    """Make torchvision importable beside a PyTorch without CUDA: its compiled operators do not load there, and no
    network needs them.
    """
    source = Path(importlib.util.find_spec("torchvision").origin).with_name("_meta_registrations.py").read_text()
    library = torch.library.Library("torchvision", "DEF")
    for name in set(re.findall(r'register_(?:fake|meta)\("(?:torchvision::)?(\w+)"', source)):
        library.define(f"{name}(Tensor x) -> Tensor")
    return library


_LIBRARY = _declare_operators() if torch.version.cuda is None else None  # what it declares goes when it goes
from zennit.attribution import Gradient  # noqa: E402  # it imports torchvision
from zennit.core import BasicHook, Composite, Stabilizer  # noqa: E402  # as above
from zennit.layer import Sum  # noqa: E402  # as above
from zennit.rules import Flat, NoMod, Pass, WSquare, ZBox, ZPlus  # noqa: E402  # as above

from fastdtd import Model  # noqa: E402  # as above
from fastdtd import graph as g  # noqa: E402  # as above


def is_symmetric(layer):
    return layer.padding[:2] == layer.padding[2:]


def module_of(layer, shape):
    match layer:
        case g.Conv2d():
            outputs, _, *kernel = layer.weight.shape
            padding = layer.padding[:2] if is_symmetric(layer) else 0
            module = nn.Conv2d(shape[0], outputs, kernel, layer.stride, padding, layer.dilation, layer.groups)
        case g.Dense():
            module = nn.Linear(*layer.weight.shape[::-1])
        case g.ReLU():
            return nn.ReLU()
        case g.Clip():
            return nn.Hardtanh(layer.low, layer.high)
        case g.LeakyReLU():
            return nn.LeakyReLU(layer.slope)
        case g.LocalResponseNorm(within_channel=True):
            return NormWithinChannel(layer)
        case g.LocalResponseNorm():
            return nn.LocalResponseNorm(layer.size, layer.alpha, layer.beta, layer.bias)
        case g.MaxPool2d():
            return nn.MaxPool2d(layer.kernel, layer.stride, layer.padding[:2], ceil_mode=layer.ceil_mode)
        case g.AveragePool2d():
            return nn.AvgPool2d(layer.kernel, layer.stride, layer.padding[:2], layer.ceil_mode, layer.count_include_pad)
        case g.GlobalAveragePool():
            return nn.AvgPool2d(shape[1:])
        case g.Add():
            return Sum()
        case _:
            return nn.Identity()
    module.weight.data = torch.tensor(layer.weight)
    module.bias.data = torch.tensor(layer.bias) if layer.bias is not None else torch.zeros(len(layer.weight))
    return module


class NormWithinChannel(nn.Module):
    """Local response normalisation over an odd number of pixels down and across, which PyTorch has none of."""

    def __init__(self, layer):
        super().__init__()
        self.layer, self.mean = layer, nn.AvgPool2d(layer.size, 1, layer.size // 2)

    def forward(self, x):
        return x / (self.layer.bias + self.layer.alpha * self.mean(x * x))**self.layer.beta


class Net(nn.Module):
    """Runs a Graph's layers in order."""

    def __init__(self, graph):
        super().__init__()
        self.graph = graph
        self.parts = nn.ModuleList(module_of(layer, graph.shapes[layer.inputs[0]]) for layer in graph)

    def forward(self, x):
        tensors = {g.INPUT: x}
        for layer, part in zip(self.graph, self.parts, strict=True):
            inputs = [tensors[name] for name in layer.inputs]
            match layer:
                case g.Dense():
                    value = part(inputs[0].flatten(1))[:, :, None, None]
                case g.Conv2d() if not is_symmetric(layer):
                    top, left, bottom, right = layer.padding
                    value = part(nn.functional.pad(inputs[0], (left, right, top, bottom)))
                case g.Rearrange():
                    value = (inputs[0].flatten(1)[:, layer.index.ravel()]
                             * torch.tensor(layer.index.ravel() >= 0)).reshape(-1, *layer.index.shape)
                case g.Add():
                    value = part(torch.stack(inputs, -1))
                case g.Concat():
                    value = torch.cat(inputs, 1)
                case g.Flatten():
                    value = inputs[0].flatten(1)[:, :, None, None]
                case _:
                    value = part(inputs[0])
            tensors[layer.name] = value
        return tensors[self.graph.output].flatten(1)


class SumPlus(BasicHook):
    """Relevance of a sum in proportion to its positive terms: z+ on the reals, the same as zennit's Norm where none is
    negative.
    """

    def __init__(self, stabilizer):
        stabilizer = Stabilizer.ensure(stabilizer)
        super().__init__(input_modifiers=[lambda x: x.clamp(min=0)], param_modifiers=[NoMod()],
                         output_modifiers=[lambda y: y],
                         gradient_mapper=lambda gradient, outputs: [gradient / stabilizer(y) for y in outputs],
                         reducer=lambda inputs, gradients: inputs[0] * gradients[0])


class ZennitExplainer:
    """zennit's relevance of a Graph, biases left out; rules: names by layer, as Explainer.rules has them."""

    def __init__(self, graph, rules, dtype):
        self.net = Net(graph).to(dtype).requires_grad_(False)
        hooks = {}
        for layer, part in zip(graph, self.net.parts, strict=True):
            zplus = lambda: ZPlus(stabilizer=1e-12, zero_params="bias")  # noqa: E731  # as its neighbours
            hooks[part] = {
                "z+": zplus, "alpha-beta": zplus, "w2": lambda: WSquare(1e-12, zero_params="bias"),
                "flat": lambda: Flat(1e-12), "zB": lambda layer=layer: box_rule(graph, layer, dtype),
                "winner": lambda: None, "identity": Pass, None: Pass
            }[rules.get(layer.name)]()
            if isinstance(layer, (g.Add, g.AveragePool2d, g.GlobalAveragePool)):
                hooks[part] = SumPlus(stabilizer=1e-12)
        self.composite = Composite(module_map=lambda ctx, name, module: hooks.get(module))

    def __call__(self, x, targets):
        """x: a tensor (N, C, H, W) of the dtype. Returns relevance and scores."""
        chosen = torch.as_tensor(targets)
        with Gradient(self.net, self.composite) as attribute:
            scores, relevance = attribute(x, lambda y: nn.functional.one_hot(chosen, y.shape[1]) * y.clamp(min=0))
        return relevance.detach(), scores.detach()


def zennit_composite(composite, graph):
    """One of zennit's composites, with the bounds of the graph's input where it asks for them."""
    if "low" not in inspect.signature(composite).parameters:
        return composite()
    low, high = (torch.tensor(bound, dtype=torch.float64)[None, :, None, None].expand(1, *graph.input_shape)
                 for bound in graph.box)
    return composite(low, high)


class CaptumExplainer:
    """Captum's relevance of layers in a row, by the rule that it calls deep Taylor, biases left out: z+, in the first
    layer too.

    So pictures must not be negative. It has no rule for such layers as additions with which biases can be left out.
    """

    def __init__(self, graph):
        parts = []
        for layer in graph:
            if not isinstance(layer, (g.Conv2d, g.Dense, g.Pool2d, g.ReLU, g.Flatten)) or layer.inputs != (
                    parts[-1][0] if parts else g.INPUT,):
                raise ValueError(f"{layer.name!r} is nothing that Captum is compared on")
            parts.append(
                (layer.name,
                 nn.Flatten() if isinstance(layer, g.Flatten) else module_of(layer, graph.shapes[layer.inputs[0]])))
        self.lrp = LRP(nn.Sequential(*(part for _, part in parts)).eval())

    def __call__(self, x, targets):
        """x: a tensor (N, C, H, W). Returns relevance."""
        for part in self.lrp.model:  # Captum takes them away after each call
            if not isinstance(part, nn.ReLU):
                part.rule = Alpha1_Beta0_Rule(
                    set_bias_to_zero=True) if isinstance(part, (nn.Conv2d, nn.Linear)) else EpsilonRule()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Input Tensor 0 did not already require gradients")
            return self.lrp.attribute(x, target=torch.as_tensor(targets)).detach()


def without_max_pools(model):
    """The same weights with average pools: no winner that turns on the last bit."""
    def averaged(layer):
        if not isinstance(layer, g.MaxPool2d):
            return layer
        return g.AveragePool2d(layer.name, layer.inputs, layer.kernel, layer.stride, layer.padding, layer.ceil_mode)

    layers = map(averaged, model.graph)
    return Model(g.Graph(tuple(layers), model.graph.input_shape, model.graph.box), model.preprocessing, model.classes)


def zennit_relevance(graph, rules, batch, targets, dtype=torch.float64):
    """Relevance (N, C, H, W) and scores by zennit, as arrays."""
    relevance, scores = ZennitExplainer(graph, rules, dtype)(torch.tensor(np.asarray(batch), dtype=dtype), targets)
    return relevance.numpy(), scores.numpy()


def box_rule(graph, layer, dtype):
    bounds = []
    for side in ("low", "high"):
        bound = torch.tensor(getattr(graph.domains[layer.inputs[0]], side), dtype=dtype)
        bounds.append(bound[None] if isinstance(layer, g.Dense) else bound[
            None, :, None, None].expand(1, *graph.shapes[layer.inputs[0]]))
    return ZBox(*bounds, stabilizer=1e-12)
