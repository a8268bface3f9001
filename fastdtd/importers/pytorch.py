"""PyTorch modules -> layers, through torch.export: one function for each ATen operator, called in the exported graph's order.

torch.export writes what a module computes for an example as a graph of some hundred operators, whatever Python code is behind it. Numbers
of axes are followed along the way: the graph makes no difference between (N, C, 1, 1) and (N, C), but PyTorch does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt
import torch

from fastdtd.errors import ConversionError
from fastdtd.graph import (
    INPUT,
    Add,
    AveragePool2d,
    BatchNorm,
    Clip,
    Concat,
    Conv2d,
    Dense,
    Flatten,
    GlobalAveragePool,
    Layer,
    LocalResponseNorm,
    MaxPool2d,
    ReLU,
    Shape,
    Softmax,
)
from fastdtd.importers.tensors import NO_PADDING, Tensor, by_channel, sum_of


def parse(module: Any, example: Any) -> tuple[list[Layer], Shape, str]:
    """Layers, input shape and format of what `module` computes for `example`, a tensor (N, C, H, W) or (N, F).

    Raises
    ------
    ConversionError
        What torch.export cannot export, or what is not supported.
    ModelError
        A layer that contradicts itself or its input.
    """
    if not isinstance(module, torch.nn.Module):
        raise ConversionError(f"a {type(module).__name__} was given; required: a torch.nn.Module")
    if not isinstance(example, torch.Tensor) or example.ndim not in (2, 4):
        raise ConversionError(f"the example is {_described(example)}; required: a tensor (N, C, H, W) or (N, F), as the module takes it")
    modes = {part: part.training for part in module.modules()}
    try:
        exported = torch.export.export(module.eval(), (example,))
    except Exception as error:  # whatever the module's code raises while it is traced
        raise ConversionError(f"torch.export cannot export the module: {str(error).strip().splitlines()[0]}") from error
    finally:
        for part, training in modes.items():
            part.training = training
    signature = exported.graph_signature
    if len(signature.user_inputs) != 1 or len(signature.user_outputs) != 1:
        raise ConversionError(f"the module has {len(signature.user_inputs)} inputs and {len(signature.user_outputs)} outputs; required: "
                              "one of each")
    shape = (*example.shape[1:], 1, 1)[:3]
    network = _Network((int(shape[0]), int(shape[1]), int(shape[2])), example.ndim, len(example))
    constants = {**exported.state_dict, **exported.constants}
    targets = {**signature.inputs_to_parameters, **signature.inputs_to_buffers, **signature.inputs_to_lifted_tensor_constants}
    for node in exported.graph.nodes:
        if node.op == "placeholder" and node.name in targets:
            network.values[node] = constants[targets[node.name]].detach().cpu().numpy()
        elif node.op == "placeholder":
            network.values[node] = Tensor(INPUT, network.input_shape, example.ndim)
        elif node.op == "call_function":
            network.read(node)
    output, = next(node for node in exported.graph.nodes if node.op == "output").args[0]
    if not isinstance(network.values.get(output), Tensor):
        raise ConversionError("the module's output does not depend on its input")
    return network.leading_to(network.values[output].layer), network.input_shape, f"torch.export of PyTorch {torch.__version__}"


def _described(example: Any) -> str:
    return f"a tensor of {example.ndim} axes" if isinstance(example, torch.Tensor) else f"a {type(example).__name__}"


@dataclass(frozen=True)
class _Squares:
    """What torch.nn.functional.local_response_norm computes on its way: first x * x, at last what x is divided by."""

    of: Tensor
    size: int = 0
    alpha: float = 1.0
    bias: float | None = None
    beta: float | None = None


class _Network:
    """What the nodes read so far have made."""

    def __init__(self, input_shape: Shape, rank: int, batch: int) -> None:
        self.input_shape, self.rank, self.batch = input_shape, rank, batch
        self.layers: dict[str, Layer] = {}
        self.values: dict[Any, Any] = {}

    def read(self, node: Any) -> None:
        """Add what `node` computes."""
        name = node.target._schema.name.removeprefix("aten::") if hasattr(node.target, "_schema") else str(node.target)
        in_place = name.endswith("_")
        call = _Call(self, node, name.rstrip("_"))
        if call.op not in _OPERATORS:
            call.refuse(f"is not supported; supported: {', '.join(sorted(_OPERATORS))}")
        self.values[node] = _OPERATORS[call.op](call)
        if in_place:
            self.values[node.args[0]] = self.values[node]

    def leading_to(self, output: str) -> list[Layer]:
        """The layers that `output` needs."""
        needed, waiting = set(), [output]
        while waiting:
            name = waiting.pop()
            if name != INPUT and name not in needed:
                needed.add(name)
                waiting.extend(self.layers[name].inputs)
        return [layer for name, layer in self.layers.items() if name in needed]


class _Call:
    """A node with its arguments by name, checked as they are asked for."""

    def __init__(self, network: _Network, node: Any, op: str) -> None:
        self.network, self.node, self.op = network, node, op
        schema = getattr(node.target, "_schema", None)
        known = [argument.name for argument in schema.arguments] if schema is not None else []
        self.arguments: dict[str, Any] = dict(zip(known, node.args, strict=False)) | dict(node.kwargs)
        stack = list((node.meta.get("nn_module_stack") or {}).values())
        self.module = stack[-1][0] if stack else ""

    def refuse(self, what: str) -> NoReturn:
        raise ConversionError(f"{self.op} (node {self.node.name!r}{f', in module {self.module!r}' if self.module else ''}) {what}")

    def __contains__(self, name: str) -> bool:
        return self.arguments.get(name) is not None

    def value(self, name: str, default: Any = None) -> Any:
        """An argument: a Tensor, an array or a plain value."""
        value = self.arguments.get(name)
        if isinstance(value, torch.fx.Node):
            return self.network.values[value]
        return default if value is None else value

    def tensor(self, name: str = "self", *, rank: int | None = None, padded: bool = False) -> Tensor:
        value = self.value(name)
        if isinstance(value, _Squares):
            self.refuse("reads the product of a tensor with itself; required: one as part of a local response normalisation only")
        if not isinstance(value, Tensor):
            self.refuse(f"has a constant as {name}; required: a tensor that depends on the module's input")
        if rank is not None and value.rank != rank:
            self.refuse(f"reads a tensor of {value.rank} axes; required: {'(N, C, H, W)' if rank == 4 else '(N, F)'}")
        if value.pad != NO_PADDING and not padded:
            self.refuse("reads what a pad makes; a pad is supported before convolutions and average pools only")
        return value

    def constant(self, name: str) -> npt.NDArray[Any] | None:
        value = self.value(name)
        if isinstance(value, (Tensor, _Squares)):
            self.refuse(f"computes its {name}; required: a constant")
        return None if value is None else np.asarray(value)

    def pair(self, name: str, default: int | Sequence[int]) -> tuple[int, int]:
        """Height and width; one number, or a list of one, stands for both."""
        value = self.value(name)
        values = list(np.ravel(default if value is None or value == [] else value))
        if len(values) not in (1, 2):
            self.refuse(f"has {name} {value}; required: one or two numbers")
        return int(values[0]), int(values[-1])

    def add(self, layer_type: type[Layer], *inputs: Tensor, rank: int | None = None, **fields: Any) -> Tensor:
        """The output of a new layer, named after the module that computes it, or else after the node."""
        name = self.module or self.node.name
        if name in self.network.layers or name == INPUT:
            name = f"{name}/{self.node.name}" if self.module else f"{name}_"
        layer = layer_type(name, tuple(x.layer for x in inputs), **fields)
        self.network.layers[name] = layer
        return Tensor(name, layer.output_shape([x.shape for x in inputs]), rank or inputs[0].rank)


# ---- Operators ---------------------------------------------------------------------------------------------------------------------------


def _conv(call: _Call) -> Tensor:
    x, weight = call.tensor("input", rank=4, padded=True), call.constant("weight")
    assert weight is not None
    stride, dilation = call.pair("stride", 1), call.pair("dilation", 1)
    padding = call.value("padding", 0)
    if padding == "same":
        spans = [d * (n - 1) for d, n in zip(dilation, weight.shape[2:], strict=True)]
        padding = (spans[0] // 2, spans[1] // 2, spans[0] - spans[0] // 2, spans[1] - spans[1] // 2)
    else:
        padding = (0, 0) * 2 if padding == "valid" else call.pair("padding", 0) * 2
    return call.add(Conv2d, x, weight=weight, bias=call.constant("bias"), stride=stride, padding=sum_of(padding, x.pad), dilation=dilation,
                    groups=call.value("groups", 1))


def _linear(call: _Call) -> Tensor:
    return call.add(Dense, call.tensor("input", rank=2), weight=call.constant("weight"), bias=call.constant("bias"))


def _addmm(call: _Call) -> Tensor:
    weight = call.constant("mat2")
    if weight is None or call.value("alpha", 1) != 1 or call.value("beta", 1) != 1:
        call.refuse("has factors; required: none")
    return call.add(Dense, call.tensor("mat1", rank=2), weight=weight.T, bias=call.constant("self"))


def _batch_norm(call: _Call) -> Tensor:
    x = call.tensor("input")
    mean, variance = call.constant("running_mean"), call.constant("running_var")
    if mean is None or variance is None:
        call.refuse("normalises by the batch; required: running mean and variance")
    gamma, beta = call.constant("weight"), call.constant("bias")
    scale = (1.0 if gamma is None else gamma.astype(np.float64)) / np.sqrt(variance.astype(np.float64) + call.value("eps", 1e-5))
    return call.add(BatchNorm, x, scale=scale, shift=(0.0 if beta is None else beta) - mean * scale)


def _relu(call: _Call) -> Tensor:
    return call.add(ReLU, call.tensor())


def _clip(call: _Call) -> Tensor:
    names = ("min", "max") if call.op == "clamp" else ("min_val", "max_val")
    defaults = {"clamp": (-math.inf, math.inf), "hardtanh": (-1.0, 1.0), "relu6": (0.0, 6.0)}[call.op]
    low, high = (float(call.value(name, default)) for name, default in zip(names, defaults, strict=True))
    if (low, high) == (0, math.inf):
        return _relu(call)
    if not low <= 0 < high:
        call.refuse(f"clips to [{low:g}, {high:g}]; required: a lower bound of 0 or less, and an upper one above 0")
    return call.add(Clip, call.tensor(), low=low, high=high)


def _max_pool(call: _Call) -> Tensor:
    if call.pair("dilation", 1) != (1, 1):
        call.refuse("has a dilation; required: none")
    kernel = call.pair("kernel_size", 1)
    return call.add(MaxPool2d, call.tensor(rank=4), kernel=kernel, stride=call.pair("stride", kernel), padding=call.pair("padding", 0) * 2,
                    ceil_mode=bool(call.value("ceil_mode", False)))


def _average_pool(call: _Call) -> Tensor:
    x, kernel = call.tensor(rank=4, padded=True), call.pair("kernel_size", 1)
    if "divisor_override" in call:
        call.refuse("has a divisor of its own; required: none")
    padding, ceil_mode, count = call.pair("padding", 0) * 2, bool(call.value("ceil_mode", False)), call.value("count_include_pad", True)
    if x.pad != NO_PADDING and (ceil_mode or (any(padding) and not count)):  # the zeros of a pad are part of the image and always count
        call.refuse("reads what a pad makes and pads it differently itself; required: one or the other")
    return call.add(AveragePool2d, x, kernel=kernel, stride=call.pair("stride", kernel), padding=sum_of(padding, x.pad),
                    ceil_mode=ceil_mode, count_include_pad=bool(count) or x.pad != NO_PADDING)


def _adaptive_pool(call: _Call) -> Tensor:
    """To one pixel, or to a size that divides the input's into equal windows."""
    x, size = call.tensor(rank=4), call.pair("output_size", 1)
    is_average = call.op == "adaptive_avg_pool2d"
    if is_average and size == (1, 1):
        return call.add(GlobalAveragePool, x)
    if size == x.shape[1:]:
        return x
    if x.shape[1] % size[0] or x.shape[2] % size[1]:
        call.refuse(f"makes {size} of {x.shape[1:]}; required: a size that divides it")
    kernel = x.shape[1] // size[0], x.shape[2] // size[1]
    return call.add(AveragePool2d if is_average else MaxPool2d, x, kernel=kernel, stride=kernel)


def _mean(call: _Call) -> Tensor:
    x = call.tensor(rank=4)
    if {int(axis) % 4 for axis in np.ravel(call.value("dim", []))} != {2, 3}:
        call.refuse("does not average over height and width; required: axes 2 and 3")
    return call.add(GlobalAveragePool, x, rank=4 if call.value("keepdim", False) else 2)


def _pad(call: _Call) -> Tensor | _Squares:
    x, pads = call.value("self"), [int(n) for n in call.value("pad")]
    if isinstance(x, _Squares):
        size = pads[4] + pads[5] + 1 if len(pads) == 6 else 0
        if not any(pads[:4]) and size and pads[4] == pads[5]:
            return x
        call.refuse(f"belongs to a local response normalisation over {size} channels; required: an odd number")
    x = call.tensor(rank=4)
    if call.value("mode", "constant") != "constant" or call.value("value", 0) != 0 or min(pads) < 0 or any(pads[4:]):
        call.refuse("pads with something else than zeros, or channels; required: zeros around the image")
    left, right, top, bottom = (*pads, 0, 0, 0, 0)[:4]
    return replace(x, pad=(top, left, bottom, right))


def _add(call: _Call) -> Tensor | _Squares:
    x, y = call.value("self"), call.value("other")
    factor = call.value("alpha", 1) * (-1 if call.op == "sub" else 1)
    if isinstance(x, _Squares) and isinstance(y, (int, float)):
        return replace(x, bias=float(y) * factor)
    if isinstance(x, Tensor) and isinstance(y, Tensor):
        if factor != 1 or x.rank != y.rank:
            call.refuse("subtracts or scales a tensor, or adds one of other axes; required: the sum of two tensors of one shape")
        return call.add(Add, call.tensor("self"), call.tensor("other"))
    if not isinstance(x, Tensor):
        if call.op == "sub":
            call.refuse("subtracts what is computed; required: a constant")
        x, y = call.tensor("other"), x
    return call.add(BatchNorm, x, scale=np.ones(x.shape[0]), shift=factor * by_channel(np.asarray(y, np.float64), x, call.refuse))


def _multiply(call: _Call) -> Tensor | _Squares:
    x, y = call.value("self"), call.value("other")
    if isinstance(x, Tensor) and isinstance(y, Tensor) and x == y:
        return _Squares(x)
    if isinstance(x, _Squares) and isinstance(y, (int, float)):
        return replace(x, alpha=x.alpha * y)
    if isinstance(x, Tensor) and isinstance(y, Tensor):
        call.refuse("multiplies two tensors that are computed; required: one, and a constant")
    if not isinstance(x, Tensor):
        x, y = call.tensor("other"), x
    return call.add(BatchNorm, x, scale=by_channel(np.asarray(y, np.float64), x, call.refuse), shift=np.zeros(x.shape[0]))


def _divide(call: _Call) -> Tensor:
    x, y = call.value("self"), call.value("other")
    if isinstance(x, Tensor) and isinstance(y, _Squares) and y.of == x:
        if not y.size or y.bias is None:
            call.refuse("divides by squares; required: a local response normalisation as PyTorch computes it")
        return call.add(LocalResponseNorm, x, size=y.size, alpha=y.alpha, beta=1.0 if y.beta is None else y.beta, bias=y.bias)
    if not isinstance(x, Tensor) or isinstance(y, (Tensor, _Squares)) or not np.all(y):
        call.refuse("divides by what is computed, or by zero; required: constants other than zero")
    return call.add(BatchNorm, x, scale=1 / by_channel(np.asarray(y, np.float64), x, call.refuse), shift=np.zeros(x.shape[0]))


def _power(call: _Call) -> _Squares:
    x, exponent = call.value("self"), call.value("exponent")
    if isinstance(x, Tensor) and exponent == 2:
        return _Squares(x)
    if not isinstance(x, _Squares) or not isinstance(exponent, (int, float)):
        call.refuse("is no part of a local response normalisation; required: one as PyTorch computes it")
    return replace(x, beta=float(exponent))


def _sum_over_channels(call: _Call) -> _Squares:
    x, kernel, pads = call.value("self"), list(call.value("kernel_size")), np.ravel(call.value("padding", 0))
    if not isinstance(x, _Squares) or len(kernel) != 3 or kernel[1:] != [1, 1] or any(pads) or not call.value("count_include_pad", True):
        call.refuse("is no part of a local response normalisation; required: one as PyTorch computes it")
    return replace(x, size=int(kernel[0]))


def _concat(call: _Call) -> Tensor:
    parts = [self_value for node in call.arguments["tensors"] if isinstance(self_value := call.network.values[node], Tensor)]
    if len(parts) != len(call.arguments["tensors"]) or any(x.pad != NO_PADDING or x.rank != parts[0].rank for x in parts):
        call.refuse("joins constants, what a pad makes, or tensors of other axes; required: tensors of as many axes")
    if call.value("dim", 0) not in (1, 1 - parts[0].rank):
        call.refuse(f"joins along axis {call.value('dim', 0)}; required: 1, the channels")
    return call.add(Concat, *parts)


def _flatten(call: _Call) -> Tensor:
    x = call.tensor()
    if call.value("start_dim", 0) != 1 or call.value("end_dim", -1) not in (-1, x.rank - 1):
        call.refuse("makes other axes flat than all but the batch; required: start_dim 1")
    return _flat(call, x)


def _flat(call: _Call, x: Tensor) -> Tensor:
    return replace(x, rank=2) if x.shape[1:] == (1, 1) else call.add(Flatten, x, rank=2)


def _view(call: _Call) -> Tensor | _Squares:
    x = call.value("self")
    if isinstance(x, _Squares):
        return x
    x, size = call.tensor(), [int(n) for n in call.value("size", call.value("shape"))]
    features = math.prod(x.shape)
    if size[1:] in ([*x.shape], [-1, *x.shape[1:]]) and x.rank == 4:
        return x
    if len(size) == 4 and size[1] in (-1, features) and size[2:] == [1, 1] and x.shape[1:] == (1, 1):
        return replace(x, rank=4)
    if len(size) != 2 or size[0] not in (-1, call.network.batch) or size[1] not in (-1, features):
        call.refuse(f"makes {tuple(size)} of (N, {', '.join(map(str, x.shape))}); required: (N, {features}), all but the batch made flat")
    return _flat(call, x)


def _squeeze(call: _Call) -> Tensor | _Squares:
    x = call.value("self")
    if isinstance(x, _Squares):
        return x
    x = call.tensor(rank=4)
    if x.shape[1:] != (1, 1) or {int(axis) % 4 for axis in np.ravel(call.value("dim", (2, 3)))} != {2, 3}:
        call.refuse("removes other axes than height and width, or from more than one pixel; required: axes 2 and 3 of (N, C, 1, 1)")
    return replace(x, rank=2)


def _softmax(call: _Call) -> Tensor:
    x = call.tensor()
    if call.value("dim", 1) not in (1, 1 - x.rank):
        call.refuse(f"is over axis {call.value('dim')}; required: 1, the classes")
    return call.add(Softmax, x)


def _same(call: _Call) -> Any:
    name = "input" if "input" in call.arguments else "self"
    if call.value("train", False):
        call.refuse("drops at inference; required: a module in evaluation mode")
    return call.value(name)


_OPERATORS: dict[str, Callable[[_Call], Any]] = {
    "adaptive_avg_pool2d": _adaptive_pool, "adaptive_max_pool2d": _adaptive_pool, "add": _add, "addmm": _addmm, "avg_pool2d": _average_pool,
    "avg_pool3d": _sum_over_channels, "batch_norm": _batch_norm, "cat": _concat, "clamp": _clip, "clone": _same, "contiguous": _same,
    "conv2d": _conv, "detach": _same, "div": _divide, "dropout": _same, "feature_dropout": _same, "flatten": _flatten, "hardtanh": _clip,
    "linear": _linear, "log_softmax": _softmax, "max_pool2d": _max_pool, "mean": _mean, "mul": _multiply, "pad": _pad, "pow": _power,
    "relu": _relu, "relu6": _clip, "reshape": _view, "softmax": _softmax, "squeeze": _squeeze, "sub": _add, "unsqueeze": _squeeze,
    "view": _view,
}
