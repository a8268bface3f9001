"""PyTorch modules -> layers, through torch.export: one function for each ATen operator, called in the exported graph's order.

torch.export writes what a module computes for an example as a graph of some hundred operators, whatever Python code is behind it. Numbers
of axes are followed along the way: the graph makes no difference between (N, C, 1, 1) and (N, C), but PyTorch does.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt
import torch

from fastdtd.errors import ConversionError
from fastdtd.graph import INPUT, Layer, Shape
from fastdtd.importers.network import Network, Sign, Squares, Tensor, plain_shape, viewed


def parse(module: Any, example: Any) -> tuple[list[Layer], Shape, str]:
    """Layers, input shape and format of what `module` computes for `example`, a tensor (N, C, H, W), (N, C, L) or (N, F).

    Raises
    ------
    ConversionError
        What torch.export cannot export, or what is not supported.
    ModelError
        A layer that contradicts itself or its input.
    """
    if not isinstance(module, torch.nn.Module):
        raise ConversionError(f"a {type(module).__name__} was given; required: a torch.nn.Module")
    if not isinstance(example, torch.Tensor) or example.ndim not in (2, 3, 4):
        raise ConversionError(f"the example is {_described(example)}; required: a tensor (N, C, H, W), (N, C, L) or (N, F), as the module "
                              "takes it")
    modes = {part: part.training for part in module.modules()}
    try:
        exported = torch.export.export(module.eval(), (example,))
    except Exception as error:  # whatever the module's code raises while it is traced
        raise ConversionError(f"torch.export cannot export the module: {str(error).strip().splitlines()[0]}") from error
    finally:
        for part, training in modes.items():
            part.training = training
    return parse_exported(exported, example)


def parse_exported(exported: Any, example: Any) -> tuple[list[Layer], Shape, str]:
    """The same of a torch.export.ExportedProgram."""
    signature = exported.graph_signature
    if len(signature.user_inputs) != 1 or len(signature.user_outputs) != 1:
        raise ConversionError(f"the module has {len(signature.user_inputs)} inputs and {len(signature.user_outputs)} outputs; required: "
                              "one of each")
    dims = tuple(int(n) for n in example.shape[1:])
    network = _Network(plain_shape(dims), len(example))
    constants = {**exported.state_dict, **exported.constants}
    targets = {**signature.inputs_to_parameters, **signature.inputs_to_buffers, **signature.inputs_to_lifted_tensor_constants}
    nodes = list(exported.graph.nodes)
    for node in nodes:
        if node.op == "placeholder" and node.name in targets:
            network.values[node] = constants[targets[node.name]].detach().cpu()
        elif node.op == "placeholder":
            network.values[node] = Tensor(INPUT, network.input_shape, dims)
        elif node.op == "call_function":
            network.read(node)
    output, = next(node for node in nodes if node.op == "output").args[0]
    result = network.values.get(output)
    if not isinstance(result, (Tensor, Squares)):
        raise ConversionError("the module's output does not depend on its input")
    call = _Call(network, output, "output")
    layers = network.leading_to(network.plain(call, network.unsquared(call, result)).layer)
    return layers, network.input_shape, f"torch.export of PyTorch {torch.__version__}"


def _described(example: Any) -> str:
    return f"a tensor of {example.ndim} axes" if isinstance(example, torch.Tensor) else f"a {type(example).__name__}"


class _Network(Network):
    """What the nodes read so far have made."""

    def __init__(self, input_shape: Shape, batch: int) -> None:
        super().__init__(input_shape)
        self.batch = batch
        self.values: dict[Any, Any] = {}  # tensors, lists of them, and constants

    def read(self, node: Any) -> None:
        """Add what `node` computes."""
        name = node.target._schema.name.removeprefix("aten::") if hasattr(node.target, "_schema") else str(node.target.__name__)
        in_place = name.endswith("_") and not name.endswith("__")
        call = _Call(self, node, name.rstrip("_") if in_place else name)
        if not any(isinstance(self.values[made], (Tensor, Squares, Sign, list)) for made in node.all_input_nodes):
            self.values[node] = _of_constants(call)
        elif call.op not in _OPERATORS:
            call.refuse(f"is not supported; nearest: {_nearest(call.op)}; supported: {', '.join(sorted(_OPERATORS))}")
        else:
            self.values[node] = _OPERATORS[call.op](call)
        if in_place:
            self.values[node.args[0]] = self.values[node]


class _Call:
    """A node with its arguments by name, checked as they are asked for."""

    def __init__(self, network: _Network, node: Any, op: str) -> None:
        self.network, self.node, self.op = network, node, op
        schema = getattr(node.target, "_schema", None)
        known = [argument.name for argument in schema.arguments] if schema is not None else []
        self.arguments: dict[str, Any] = dict(zip(known, node.args, strict=False)) | dict(node.kwargs)
        stack = list((node.meta.get("nn_module_stack") or {}).values())
        self.module = str(stack[-1][0]) if stack else ""

    @property
    def layer_name(self) -> str:
        """The module that computes it, or else the node."""
        name = self.module or str(self.node.name)
        return f"{name}/{self.node.name}" if self.module and (name in self.network.layers or name == INPUT) else name

    def refuse(self, what: str) -> NoReturn:
        raise ConversionError(f"{self.op} (node {self.node.name!r}{f', in module {self.module!r}' if self.module else ''}) {what}")

    def __contains__(self, name: str) -> bool:
        return self.arguments.get(name) is not None

    def value(self, name: str, default: Any = None) -> Any:
        """An argument: a Tensor, a constant or a plain value."""
        value = self.arguments.get(name)
        if isinstance(value, torch.fx.Node):
            value = self.network.values[value]
        return default if value is None else value

    def moving(self, name: str = "self") -> Tensor | Squares:
        """A tensor that may be squares."""
        value = self.value(name)
        return value if isinstance(value, Squares) else self.tensor(name)

    def tensor(self, name: str = "self") -> Tensor:
        value = self.value(name)
        if isinstance(value, Sign):
            self.refuse("reads the sign of a tensor; required: one as part of a pool by the p-norm only")
        if isinstance(value, Squares):
            value = self.network.values[self.arguments[name]] = self.network.unsquared(self, value)
        if not isinstance(value, Tensor):
            self.refuse(f"has a constant as {name}; required: a tensor that depends on the module's input")
        return value

    def tensors(self, name: str) -> list[Tensor]:
        """A list of tensors."""
        values = self.arguments.get(name) or []
        made = [self.network.values[node] for node in values] if isinstance(values, (list, tuple)) else list(self.value(name))
        made = [self.network.unsquared(self, x) if isinstance(x, Squares) else x for x in made]
        if not made or not all(isinstance(x, Tensor) for x in made):
            self.refuse("joins constants; required: tensors that depend on the module's input")
        return made

    def constant(self, name: str) -> npt.NDArray[Any] | None:
        value = self.value(name)
        if isinstance(value, (Tensor, Squares, Sign)):
            self.refuse(f"computes its {name}; required: a constant")
        return None if value is None else _array(value)

    def required_constant(self, name: str) -> npt.NDArray[Any]:
        value = self.constant(name)
        if value is None:
            self.refuse(f"has no {name}; required: one")
        return value

    def is_computed(self, name: str) -> bool:
        return isinstance(self.value(name), (Tensor, Squares, Sign))

    def window(self, name: str, axes: int, default: int | Sequence[int]) -> tuple[int, ...]:
        """A number for each spatial axis; one number stands for all."""
        value = self.value(name)
        values = [int(n) for n in np.ravel(default if value is None or (isinstance(value, list) and not value) else value)]
        if len(values) not in (1, axes):
            self.refuse(f"has {name} {value}; required: one or {axes} numbers")
        return tuple(values * axes if len(values) < axes else values)

    def integers(self, name: str, default: Sequence[int] = ()) -> list[int]:
        value = self.value(name, default)
        return [int(n) for n in ([value] if isinstance(value, int) else value)]


def _array(value: Any) -> npt.NDArray[Any]:
    return value.detach().cpu().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)


def _of_constants(call: _Call) -> Any:
    """What PyTorch makes of weights alone, such as their normalisation."""
    args, kwargs = torch.fx.node.map_arg((call.node.args, call.node.kwargs), lambda node: call.network.values[node])
    try:
        with torch.no_grad():
            return call.node.target(*args, **kwargs)
    except Exception as error:  # whatever an operator raises
        call.refuse(f"cannot be computed from constants: {str(error).strip().splitlines()[0]}")


def _nearest(op: str) -> str:
    if op in _NEAREST:
        return _NEAREST[op]
    close = difflib.get_close_matches(op, [*_OPERATORS], 1, 0.5)
    return close[0] if close else "none"


_NEAREST = {
    **dict.fromkeys(("celu", "elu", "gelu", "hardsigmoid", "hardswish", "mish", "selu", "sigmoid", "silu", "softplus", "tanh"),
                    "relu, leaky_relu or clamp"),
    **dict.fromkeys(("group_norm", "instance_norm", "layer_norm", "rms_norm"), "batch_norm"),
    **dict.fromkeys(("scaled_dot_product_attention", "bmm", "einsum"), "linear"), "upsample_bilinear2d": "upsample_nearest2d",
}


# ---- Operators ---------------------------------------------------------------------------------------------------------------------------


def _conv(call: _Call) -> Tensor:
    x, weight = call.tensor("input"), call.required_constant("weight")
    axes = weight.ndim - 2
    if call.network.spatial(call, x) != axes:
        call.refuse(f"has weights of shape {weight.shape} for a tensor {x}; required: an example (N, C, H, W), with its batch, for two "
                    "dimensions, and (N, C, L) for one")
    stride, dilation = call.window("stride", axes, 1), call.window("dilation", axes, 1)
    padding = call.value("padding", 0)
    if padding == "same":
        spans = [d * (n - 1) for d, n in zip(dilation, weight.shape[2:], strict=True)]
        pads = (*(n // 2 for n in spans), *(n - n // 2 for n in spans))
    else:
        pads = (0,) * 2 * axes if padding == "valid" else call.window("padding", axes, 0) * 2
    return call.network.conv(call, x, weight, call.constant("bias"), stride, pads, dilation, call.value("groups", 1))


def _conv_transpose(call: _Call) -> Tensor:
    x, weight = call.tensor("input"), call.required_constant("weight")
    axes = weight.ndim - 2
    return call.network.conv_transpose(
        call, x, weight, call.constant("bias"), call.window("stride", axes, 1), call.window("padding", axes, 0) * 2,
        call.window("dilation", axes, 1), call.value("groups", 1), call.window("output_padding", axes, 0))


def _linear(call: _Call) -> Tensor:
    return call.network.dense(call, call.tensor("input"), call.required_constant("weight"), call.constant("bias"))


def _addmm(call: _Call) -> Tensor:
    if call.value("alpha", 1) != 1 or call.value("beta", 1) != 1:
        call.refuse("has factors; required: none")
    return call.network.dense(call, call.tensor("mat1"), call.required_constant("mat2").T, call.constant("self"))


def _matmul(call: _Call) -> Tensor:
    weight = call.required_constant("mat2" if call.op == "mm" else "other")
    if weight.ndim != 2:
        call.refuse(f"has weights of shape {weight.shape}; required: two axes")
    return call.network.dense(call, call.tensor(), weight.T, None)


def _batch_norm(call: _Call) -> Tensor:
    x = call.tensor("input")
    mean, variance = call.constant("running_mean"), call.constant("running_var")
    if mean is None or variance is None:
        call.refuse("normalises by the batch; required: running mean and variance")
    gamma, beta = call.constant("weight"), call.constant("bias")
    scale = (1.0 if gamma is None else gamma.astype(np.float64)) / np.sqrt(variance.astype(np.float64) + call.value("eps", 1e-5))
    column = (1, -1) + (1,) * (x.rank - 2)
    return call.network.affine(call, x, scale.reshape(column), ((0.0 if beta is None else beta) - mean * scale).reshape(column))


def _relu(call: _Call) -> Tensor:
    return call.network.clip(call, call.tensor(), 0.0, math.inf)


def _clip(call: _Call) -> Tensor:
    names = ("min_val", "max_val") if call.op == "hardtanh" else ("min", "max")
    defaults = {"hardtanh": (-1.0, 1.0), "relu6": (0.0, 6.0)}.get(call.op, (-math.inf, math.inf))
    bounds = []
    for name, default in zip(names, defaults, strict=True):
        given = call.constant(name)
        if given is not None and given.size != 1:
            call.refuse(f"has a {name} of shape {given.shape}; required: one number")
        bounds.append(default if given is None else float(given.item()))
    return call.network.clip(call, call.tensor(), *bounds)


def _extreme(call: _Call) -> Tensor:
    """The larger or smaller of a tensor and a number."""
    if call.is_computed("self") and call.is_computed("other"):
        call.refuse("compares tensors that are computed; required: one, and a constant")
    name, other = ("self", "other") if call.is_computed("self") else ("other", "self")
    bound = call.required_constant(other)
    if bound.size != 1:
        call.refuse(f"has a constant of shape {bound.shape}; required: one number")
    low, high = (float(bound.item()), math.inf) if call.op == "maximum" else (-math.inf, float(bound.item()))
    return call.network.clip(call, call.tensor(name), low, high)


def _leaky_relu(call: _Call) -> Tensor:
    return call.network.prelu(call, call.tensor(), call.value("negative_slope", 0.01))


def _prelu(call: _Call) -> Tensor:
    x, slope = call.tensor(), call.required_constant("weight")
    return call.network.prelu(call, x, slope if slope.size == 1 else slope.reshape(1, -1, *(1,) * (x.rank - 2)))


def _max_pool(call: _Call) -> Any:
    axes = 1 if "1d" in call.op else 2
    if any(n != 1 for n in call.window("dilation", axes, 1)):
        call.refuse("has a dilation; required: none")
    kernel = call.window("kernel_size", axes, 1)
    x = _of_axes(call, axes)
    made = call.network.pool(call, x, False, kernel, call.window("stride", axes, kernel), call.window("padding", axes, 0) * 2,
                             bool(call.value("ceil_mode", False)))
    return [made] if call.op.endswith("with_indices") else made


def _average_pool(call: _Call) -> Tensor:
    axes = 1 if "1d" in call.op else 2
    kernel = call.window("kernel_size", axes, 1)
    if "divisor_override" in call:
        call.refuse("has a divisor of its own; required: none")
    return call.network.pool(call, _of_axes(call, axes), True, kernel, call.window("stride", axes, kernel),
                             call.window("padding", axes, 0) * 2, bool(call.value("ceil_mode", False)),
                             bool(call.value("count_include_pad", True)))


def _of_axes(call: _Call, axes: int) -> Tensor:
    x = call.tensor()
    if x.rank != axes + 2:
        call.refuse(f"reads a tensor {x}; required: (N, C, {'H, W' if axes == 2 else 'L'}), with its batch")
    return x


def _adaptive_pool(call: _Call) -> Any:
    """To one pixel, or to a size that divides the input's into equal windows."""
    axes = 1 if "1d" in call.op else 2
    size = call.value("output_size", 1)
    sizes = [size] * axes if isinstance(size, int) else list(size)
    is_average = "avg" in call.op
    made = call.network.adaptive_pool(call, _of_axes(call, axes), is_average, sizes * axes if len(sizes) < axes else sizes)
    return made if is_average else [made]  # the other is where the largest are


def _reduce(call: _Call) -> Tensor:
    x = call.tensor()
    axes = call.integers("dim", []) or list(range(x.rank))
    made = call.network.reduce(call, x, call.op != "amax", axes, bool(call.value("keepdim", False)))
    if call.op != "sum":
        return made
    return call.network.affine(call, made, scale=float(math.prod(x.dims[axis] for axis in {axis % x.rank - 1 for axis in axes})))


def _pad(call: _Call) -> Tensor | Squares:
    x, pads = call.moving(), call.integers("pad" if "pad" in call else "padding")
    rank = x.view.rank if isinstance(x, Squares) else x.rank
    mode = {"reflection": "reflect", "replication": "replicate"}.get(call.op.split("_")[0], call.value("mode", "constant"))
    modes = {"constant": "constant", "reflect": "reflect", "replicate": "edge"}
    if mode not in modes or (mode == "constant" and call.value("value", 0) != 0) or (mode != "constant" and isinstance(x, Squares)):
        call.refuse(f"has mode {mode!r} and value {call.value('value', 0)}; required: constant zeros, reflect or replicate")
    pairs = list(zip(pads[::2], pads[1::2], strict=True))[::-1]  # of the last axes; PyTorch begins with the last
    pairs = [(0, 0)] * (rank - len(pairs)) + pairs
    if len(pairs) > rank or pairs[0] != (0, 0):
        call.refuse(f"has pads {tuple(pads)} for {rank} axes; required: none for the batch")
    return viewed(x, lambda y: call.network.pad(call, y, pairs[1:], modes[mode]))


def _add(call: _Call) -> Tensor | Squares:
    network, factor = call.network, call.value("alpha", 1) * (-1 if call.op == "sub" else 1)
    if call.is_computed("self") and call.is_computed("other"):
        other = call.tensor("other")
        if factor != 1:
            other = network.affine(call, other, scale=float(factor), part="/scaled")
        return network.sum(call, [call.tensor("self"), other])
    if not call.is_computed("self"):
        return network.affine(call, call.tensor("other"), scale=float(factor), shift=call.required_constant("self"))
    x, y = call.moving(), np.asarray(call.required_constant("other"), np.float64)
    if isinstance(x, Squares) and x.size and x.bias is None and y.size == 1:
        return Squares(x.of, x.view, x.size, x.alpha, y.item() * factor)
    return network.affine(call, call.tensor(), shift=factor * y)


def _subtract_from(call: _Call) -> Tensor:
    return call.network.affine(call, call.tensor(), scale=-float(call.value("alpha", 1)), shift=call.required_constant("other"))


def _negate(call: _Call) -> Tensor:
    return call.network.affine(call, call.tensor(), scale=-1.0)


def _multiply(call: _Call) -> Tensor | Squares:
    if call.is_computed("self") and call.is_computed("other"):
        return call.network.product(call, call.value("self"), call.value("other"))
    name, other = ("self", "other") if call.is_computed("self") else ("other", "self")
    x, y = call.moving(name), call.required_constant(other)
    if isinstance(x, Squares) and x.size and x.bias is None and y.size == 1:
        return Squares(x.of, x.view, x.size, x.alpha * float(y.item()))
    return call.network.affine(call, call.tensor(name), scale=y)


def _divide(call: _Call) -> Tensor:
    by = call.value("other")
    if isinstance(by, Squares) and call.is_computed("self"):
        return call.network.normalise(call, call.tensor(), by)
    if call.is_computed("other") or not call.required_constant("other").all() or call.value("rounding_mode") is not None:
        call.refuse("divides by what is computed, or by zero, or rounds; required: constants other than zero")
    return call.network.affine(call, call.tensor(), scale=1 / np.asarray(call.required_constant("other"), np.float64))


def _power(call: _Call) -> Tensor | Squares:
    exponent = {"sqrt": 0.5, "square": 2}.get(call.op, call.value("exponent"))
    if not isinstance(exponent, (int, float)):
        call.refuse("has an exponent that is no number; required: one")
    return call.network.power(call, call.moving(), float(exponent))


def _magnitude(call: _Call) -> Tensor:
    return call.network.magnitude(call, call.tensor())


def _sign(call: _Call) -> Sign:
    return Sign(call.tensor())


def _mean_over_channels(call: _Call) -> Squares:
    x, kernel, pads = call.value("self"), list(call.value("kernel_size")), np.ravel(call.value("padding", 0))
    if not isinstance(x, Squares) or len(kernel) != 3 or kernel[1:] != [1, 1] or any(pads) or any(
            n != 1 for n in np.ravel(call.value("stride") or kernel)) or not call.value("count_include_pad", True):
        call.refuse("is no part of a local response normalisation; required: one as PyTorch computes it")
    return call.network.mean_over_channels(call, x, int(kernel[0]))


def _concat(call: _Call) -> Tensor:
    parts, axis = call.tensors("tensors"), int(call.value("dim", 0))
    if call.op == "stack":
        parts = [call.network.unsqueeze(call, x, [axis]) for x in parts]
    return call.network.concat(call, parts, axis)


def _flatten(call: _Call) -> Tensor | Squares:
    first, last = call.value("start_dim", 0), call.value("end_dim", -1)
    return viewed(call.moving(), lambda x: call.network.flatten(call, x, first, last))


def _unflatten(call: _Call) -> Tensor | Squares:
    axis, sizes = call.value("dim"), call.integers("sizes")

    def unflattened(x: Tensor) -> Tensor:
        own = call.network.own_axis(call, x, axis)
        return call.network.reshape(call, x, [call.network.batch, *x.dims[:own], *sizes, *x.dims[own + 1:]], call.network.batch)

    return viewed(call.moving(), unflattened)


def _view(call: _Call) -> Tensor | Squares:
    size = call.integers("size" if "size" in call else "shape")
    return viewed(call.moving(), lambda x: call.network.reshape(call, x, size, call.network.batch))


def _squeeze(call: _Call) -> Tensor | Squares:
    def squeezed(x: Tensor) -> Tensor:
        axes = call.integers("dim", range(1, x.rank))
        if "dim" not in call and call.network.batch == 1:
            call.refuse("removes all axes of length 1, the batch too; required: axes")
        return call.network.squeeze(call, x, [axis for axis in axes if x.dims[call.network.own_axis(call, x, axis)] == 1])

    return viewed(call.moving(), squeezed)


def _unsqueeze(call: _Call) -> Tensor | Squares:
    return viewed(call.moving(), lambda x: call.network.unsqueeze(call, x, [call.value("dim")]))


def _permute(call: _Call) -> Tensor | Squares:
    def permuted(x: Tensor) -> Tensor:
        if call.op == "permute":
            order = [call.network.axis(call, axis, x.rank) for axis in call.integers("dims")]
        elif call.op == "transpose":
            a, b = (call.network.axis(call, call.value(name), x.rank) for name in ("dim0", "dim1"))
            order = list(range(x.rank))
            order[a], order[b] = b, a
        else:
            order = list(range(x.rank))[::-1]
        return call.network.transpose(call, x, order)

    return viewed(call.moving(), permuted)


def _slice(call: _Call) -> Tensor:
    x, axis = call.tensor(), call.value("dim", 0)
    part = slice(call.value("start"), call.value("end"), call.value("step", 1))
    if call.network.axis(call, axis, x.rank) == 0:
        if part.indices(call.network.batch) != (0, call.network.batch, 1):
            call.refuse("takes a part of the batch; required: all of it")
        return x
    return call.network.take(call, x, axis, part)


def _narrow(call: _Call) -> Tensor:
    start = call.value("start", 0)
    return call.network.take(call, call.tensor(), call.value("dim"), slice(start, start + call.value("length")))


def _select(call: _Call) -> Tensor:
    index = call.value("index")
    return call.network.take(call, call.tensor(), call.value("dim", 0), _array(index))


def _split(call: _Call) -> list[Tensor]:
    x, axis = call.tensor(), call.value("dim", 0)
    length = x.dims[call.network.own_axis(call, x, axis)]
    if call.op == "unbind":
        return [call.network.take(call, x, axis, np.array(i)) for i in range(length)]
    sizes = call.value("split_sizes", call.value("split_size", None))
    if call.op == "chunk":
        sizes = -(-length // int(call.value("chunks", 1)))
    if isinstance(sizes, int):
        sizes = [min(sizes, length - start) for start in range(0, length, max(sizes, 1))]
    return call.network.split(call, x, axis, [int(n) for n in sizes])


def _item(call: _Call) -> Any:
    values, index = call.network.values[call.node.args[0]], call.node.args[1]
    if not isinstance(values, list) or not isinstance(index, int):
        call.refuse("takes a part of what is no list; required: the outputs of an operator that has several")
    return values[index] if index < len(values) else None  # where the largest were: nothing, unless it is read


def _flip(call: _Call) -> Tensor:
    x = call.tensor()
    for axis in call.integers("dims"):
        x = call.network.take(call, x, axis, slice(None, None, -1))
    return x


def _roll(call: _Call) -> Tensor:
    x, shifts, axes = call.tensor(), call.integers("shifts"), call.integers("dims")
    own = [call.network.own_axis(call, x, axis) for axis in axes]
    if len(shifts) != len(own):
        call.refuse(f"has shifts {shifts} for axes {axes}; required: as many")
    return call.network.move(call, x, math.prod(x.dims), lambda index: np.roll(index, shifts, own))


def _pixel_shuffle(call: _Call) -> Tensor:
    x = call.tensor()
    n = int(call.value("upscale_factor" if call.op == "pixel_shuffle" else "downscale_factor"))
    if x.rank != 4:
        call.refuse(f"reads a tensor {x}; required: (N, C, H, W)")
    if call.op == "pixel_shuffle":
        return call.network.depth_to_space(call, x, n, channels_first=True)
    channels, height, width = x.dims
    return call.network.move(call, x, math.prod(x.dims), lambda index: index.reshape(channels, height // n, n, width // n, n)
                             .transpose(0, 2, 4, 1, 3).reshape(-1, height // n, width // n))


def _channel_shuffle(call: _Call) -> Tensor:
    x, groups = call.tensor(), int(call.value("groups"))
    return call.network.move(call, x, math.prod(x.dims), lambda index: index.reshape(groups, -1, *x.dims[1:]).swapaxes(0, 1)
                             .reshape(x.dims))


def _upsample(call: _Call) -> Tensor:
    x = call.tensor("input" if "input" in call else "self")
    scales = call.value("scale_factors", call.value("scales"))
    if scales is None and call.value("scales_h") is not None:
        scales = [call.value("scales_h"), call.value("scales_w")]
    sizes = call.value("output_size")
    old = x.dims[1:]
    new = [int(n) for n in sizes] if sizes is not None else [int(n * float(s)) for n, s in zip(old, scales, strict=True)]
    steps = [float(s) for s in scales] if scales is not None else [m / n for n, m in zip(old, new, strict=True)]
    if len(new) != len(old) or min(new) < 1:
        call.refuse(f"makes {tuple(new)} of {x}; required: sizes from 1")
    places = [np.minimum(np.floor(np.arange(m) / step).astype(np.int64), n - 1) for n, m, step in zip(old, new, steps, strict=True)]
    return call.network.repeat(call, x, [np.arange(x.dims[0]), *places])


def _repeat(call: _Call) -> Tensor:
    x, times = call.tensor(), call.integers("repeats")
    if len(times) != x.rank or times[0] != 1 or min(times) < 1:
        call.refuse(f"repeats {x} by {tuple(times)}; required: a number from 1 for each axis, and 1 for the batch")
    return call.network.move(call, x, math.prod(x.dims) * math.prod(times), lambda index: np.tile(index, times[1:]))


def _expand(call: _Call) -> Tensor:
    x, size = call.tensor(), call.integers("size")
    if len(size) != x.rank or size[0] not in (-1, call.network.batch):
        call.refuse(f"makes {tuple(size)} of {x}; required: as many axes, and the batch as it is")
    return call.network.expand(call, x, size[1:])


def _softmax(call: _Call) -> Tensor:
    return call.network.softmax(call, call.tensor(), call.value("dim", 1))


def _same(call: _Call) -> Any:
    name = "input" if "input" in call.arguments else "self"
    if call.value("train", False):
        call.refuse("drops at inference; required: a module in evaluation mode")
    return call.value(name)


_OPERATORS: dict[str, Callable[[_Call], Any]] = {
    "_to_copy": _same, "_unsafe_view": _view, "abs": _magnitude, "adaptive_avg_pool1d": _adaptive_pool,
    "adaptive_avg_pool2d": _adaptive_pool, "adaptive_max_pool1d": _adaptive_pool, "adaptive_max_pool2d": _adaptive_pool, "add": _add,
    "addmm": _addmm, "alias": _same, "amax": _reduce, "avg_pool1d": _average_pool, "avg_pool2d": _average_pool,
    "avg_pool3d": _mean_over_channels, "batch_norm": _batch_norm, "cat": _concat, "channel_shuffle": _channel_shuffle, "chunk": _split,
    "clamp": _clip, "clamp_max": _clip, "clamp_min": _clip, "clone": _same, "concat": _concat, "constant_pad_nd": _pad,
    "contiguous": _same, "conv1d": _conv, "conv2d": _conv, "conv_transpose1d": _conv_transpose, "conv_transpose2d": _conv_transpose,
    "detach": _same, "div": _divide, "dropout": _same, "expand": _expand, "feature_dropout": _same, "flatten": _flatten, "flip": _flip,
    "getitem": _item, "hardtanh": _clip, "leaky_relu": _leaky_relu, "linear": _linear, "log_softmax": _softmax, "matmul": _matmul,
    "max_pool1d": _max_pool, "max_pool2d": _max_pool, "max_pool2d_with_indices": _max_pool, "maximum": _extreme, "mean": _reduce,
    "minimum": _extreme, "mm": _matmul, "mul": _multiply, "narrow": _narrow, "neg": _negate, "pad": _pad, "permute": _permute,
    "pixel_shuffle": _pixel_shuffle, "pixel_unshuffle": _pixel_shuffle, "pow": _power, "prelu": _prelu, "reflection_pad1d": _pad,
    "reflection_pad2d": _pad, "relu": _relu, "relu6": _clip, "repeat": _repeat, "replication_pad1d": _pad, "replication_pad2d": _pad,
    "reshape": _view, "roll": _roll, "rsub": _subtract_from, "select": _select, "sign": _sign, "slice": _slice, "softmax": _softmax,
    "split": _split, "split_with_sizes": _split, "sqrt": _power, "square": _power, "squeeze": _squeeze, "stack": _concat, "sub": _add,
    "sum": _reduce, "to": _same, "transpose": _permute, "unbind": _split, "unflatten": _unflatten, "unsqueeze": _unsqueeze,
    "upsample_nearest1d": _upsample, "upsample_nearest2d": _upsample, "view": _view,
}
