"""PyTorch module -> nodes of ATen operators, by torch.export, and the values that go between them.

torch.export writes what a module computes for an example as a graph of some hundred operators, whatever Python code
is behind it. PyTorch then makes functions of them: what is written in place, through whatever view, becomes a new
tensor, and what stands under `torch.no_grad` or `torch.autocast` stands in the graph itself. Numbers of axes are
followed along the way: the graph makes no difference between (N, C, 1, 1) and (N, C), but PyTorch does. What depends on
weights alone is computed by PyTorch.
"""

from __future__ import annotations

import importlib
import io
import itertools
import os
import sys
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from fastdtd.errors import ConversionError
from fastdtd.graph import INPUT, Conv2d, Dense, Layer
from fastdtd.importers.budget import Budget
from fastdtd.importers.builder import Builder, Parsed, chosen, nearest
from fastdtd.importers.moves import Array
from fastdtd.importers.patterns import COMPUTED, ValueNode, as_tensor
from fastdtd.importers.pytorch.operators import IGNORED, NEAREST, OPERATORS
from fastdtd.importers.pytorch.runtime import TorchRuntime, evaluating, given
from fastdtd.importers.tensors import Tensor, layer_shape, side_by_side


def parse(module: Any, example: Any, limit: int | None = None, output: int | str | None = None) -> Parsed:
    """What `module` computes for `example`, a tensor (N, C, H, W), (N, C, L) or (N, F), or several in a tuple.

    output: which, where it returns several tensors: a number, or a key of a dictionary.
    limit: bytes, see `Budget`. Raises ConversionError, also for what torch.export cannot export, and ModelError.
    """
    if not isinstance(module, torch.nn.Module):
        raise ConversionError(f"a {type(module).__name__} was given; required: a torch.nn.Module")
    examples = tuple(example) if isinstance(example, (tuple, list)) else (example,)
    for one in examples or (example,):
        if not isinstance(one, torch.Tensor) or one.ndim not in (2, 3, 4) or len(one) != len(examples[0]):
            is_tensor = isinstance(one, torch.Tensor)
            found = f"a tensor of {one.ndim} axes, {tuple(one.shape)}" if is_tensor else f"a {type(one).__name__}"
            raise ConversionError(f"the example is {found}; required: a tensor (N, C, H, W), (N, C, L) or (N, F), as "
                                  "the module takes it, or a tuple of these with one N")
    try:
        with evaluating(module):
            exported = _exported(module, examples)
    except Exception as error:  # whatever the module's code raises while it is traced
        raise ConversionError(f"torch.export cannot export the module: {_first_line(error)}") from error
    return _read(exported, examples, module, limit, output)


def _exported(module: Any, examples: tuple[Any, ...]) -> Any:
    """The module as functions: nothing in them is written in place.

    It is exported without gradients, so that `torch.no_grad` in a module makes no graph of its own, whose nodes would
    not say their modules; with them only where a module that sets the mode itself cannot be exported so.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what is deprecated in PyTorch
        try:
            with torch.no_grad():
                return _functional(torch.export.export(module, examples))
        except Exception:
            return _functional(torch.export.export(module, examples))


def _functional(exported: Any) -> Any:
    _drop_dropout(exported.graph)
    return exported.run_decompositions({})  # no operator is taken apart


def _read(exported: Any, examples: tuple[Any, ...], module: Any, limit: int | None, wanted: int | str | None) -> Parsed:
    """What the torch.export.ExportedProgram of `module` computes, in which nothing is written in place."""
    signature = exported.graph_signature
    which = chosen(wanted, _output_names(exported))
    dims = [tuple(int(n) for n in one.shape[1:]) for one in examples]
    inputs = side_by_side([Tensor.whole(INPUT, layer_shape(own), own) for own in dims])
    held = sum(value.numel() * value.element_size() for value in exported.state_dict.values())
    reader = Reader(Builder(Budget(held, limit), len(examples[0])), exported)
    output = next(node for node in exported.graph.nodes if node.name == signature.user_outputs[which])
    needed, left = _leading_to(output), iter(inputs)
    for node in exported.graph.nodes:
        if node.op == "placeholder" and node.name in signature.user_inputs:
            reader.values[node] = next(left)
        elif node in needed:  # not: assertions, and what is written into buffers or the input
            reader.read(node)
    result = reader.values[output]
    if not isinstance(result, COMPUTED):
        raise ConversionError("the module's output does not depend on its input")
    with reader.builder.at(Node(reader, output, "output")):
        layers = reader.builder.leading_to(reader.builder.scores(as_tensor(reader.builder, result)))
    steps = [(str(Node(reader, node, _name_of(node))), node, value)
             for node, value in reader.values.items() if node.op == "call_function" and isinstance(value, Tensor)]
    dtypes = [np.float32 if one.is_floating_point() else np.int64 for one in examples]
    runtime = TorchRuntime(reader.builder, inputs, len(examples[0]), dtypes=dtypes, steps=steps, module=module,
                           exported=exported, like=examples, which=which)
    named = {} if len(inputs) == 1 else dict(zip(signature.user_inputs, map(layer_shape, dims), strict=True))
    return Parsed(_marked(layers, module), inputs[0].shape, f"torch.export of PyTorch {torch.__version__}", runtime,
                  named)


def _marked(layers: list[Layer], module: Any) -> list[Layer]:
    """Those that are called before the convolution or dense layer that is registered first."""
    kinds = torch.nn.modules.conv._ConvNd, torch.nn.Linear
    first = next((name for name, part in module.named_modules() if isinstance(part, kinds)), "")
    if not first:  # functions alone, or a module that is nothing but one layer
        return layers
    before = list(itertools.takewhile(lambda layer: layer.name.partition("/")[0] != first, layers))
    return [*(replace(layer, registered_later=True) if isinstance(layer, (Conv2d, Dense)) else layer
              for layer in before), *layers[len(before):]]


def _output_names(exported: Any) -> list[str]:
    """Keys of what the module returns, as in "out", or numbers; in the order in which PyTorch lists its tensors."""
    signature = exported.graph_signature
    places = torch.utils._pytree.tree_flatten_with_path(torch.utils._pytree.tree_unflatten(
        list(signature.user_outputs), exported.call_spec.out_spec))[0]
    return [".".join(str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", key)))) for key in path)
            for path, _ in places]


def _name_of(traced: Any) -> str:
    target = traced.target
    return str(target._schema.name.removeprefix("aten::") if hasattr(target, "_schema") else target.__name__)


def _drop_dropout(graph: Any) -> None:
    """In evaluation mode it returns its input, and not a copy as PyTorch has it where it makes functions."""
    for node in graph.nodes:
        if node.target is torch.ops.aten.dropout.default and not node.args[2]:
            node.replace_all_uses_with(node.args[0], lambda user: user.op != "output")


def _leading_to(output: Any) -> set[Any]:
    needed, waiting = {output}, [output]
    while waiting:
        before = [node for node in waiting.pop().all_input_nodes if node not in needed]
        needed.update(before)
        waiting.extend(before)
    return needed


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0]


def made_by(source: str) -> Any:
    """What the callable that `source` names, ``module:callable``, makes when it is called without arguments."""
    module, _, name = source.partition(":")
    sys.path.insert(0, os.getcwd())
    try:
        made: Any = importlib.import_module(module)
        for part in name.split("."):
            made = getattr(made, part)
        if not isinstance(made, torch.nn.Module):
            made = made()
    except Exception as error:  # whatever that code raises
        raise ConversionError(f"importing {module!r} and calling {name!r} failed: {type(error).__name__}: "
                              f"{_first_line(error)}") from error
    finally:
        sys.path.remove(os.getcwd())
    if not isinstance(made, torch.nn.Module):
        raise ConversionError(f"{name!r} made a {type(made).__name__}; required: a torch.nn.Module")
    return made.eval()


def load_weights(module: Any, content: bytes) -> None:
    """Put a state dict into `module`; nothing that is pickled in the file is run."""
    required = "required: a state dict, as torch.save(module.state_dict(), path) writes it"
    try:
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # of many kinds
        raise ConversionError(f"the file of weights is damaged, or holds more than tensors; {required}") from error
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):  # as training scripts keep it
        state = state["state_dict"]
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise ConversionError(f"the file of weights holds no state dict; {required}")
    state = {str(name).removeprefix("module."): value for name, value in state.items()}  # put before it by DataParallel
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines()[1:]]
        raise ConversionError(f"the state dict does not fit the module: {' '.join(lines)[:500]}") from error


def input_channels(module: Any) -> int:
    """Channels of the first convolution; three where there is none."""
    return next((int(part.in_channels) for part in module.modules() if isinstance(part, torch.nn.Conv2d)), 3)


class Reader:
    """The values that the nodes read so far have made: tensors, lists of them, and constants."""

    def __init__(self, builder: Builder, exported: Any) -> None:
        self.builder, self.module = builder, exported.graph_module
        self.values: dict[Any, Any] = {}
        self.targets, self.constants = given(exported)

    def read(self, traced: Any) -> None:
        """Add what a node computes."""
        if traced.op == "placeholder":
            self.values[traced] = self.constants[self.targets[traced.name]].detach().cpu()
            return
        if traced.op == "get_attr":
            self.values[traced] = getattr(self.module, traced.target)
            return
        node = Node(self, traced, _name_of(traced))
        if not any(isinstance(self.values[made], (*COMPUTED, list)) for made in traced.all_input_nodes):
            self.values[traced] = self._of_constants(node)
        elif node.op not in OPERATORS:
            node.refuse(f"is not supported; nearest: {nearest(node.op, NEAREST, OPERATORS)}; supported: "
                        f"{', '.join(sorted(OPERATORS))}")
        else:
            with self.builder.at(node):
                node.require_floating(node.value("dtype"))
                self.values[traced] = OPERATORS[node.op](self.builder, node)
            node.check_arguments()

    def _of_constants(self, node: Node) -> Any:
        """What PyTorch makes of weights alone, such as their normalisation."""
        traced = node.traced
        args, kwargs = torch.fx.node.map_arg((traced.args, traced.kwargs), lambda made: self.values[made])
        try:
            with torch.no_grad():
                return traced.target(*args, **kwargs)
        except Exception as error:  # whatever an operator raises
            node.refuse(f"cannot be computed from constants: {_first_line(error)}")


class Node(ValueNode):
    """A node of the exported graph: arguments by the names of their parameters."""

    first = "self"

    def __init__(self, reader: Reader, traced: Any, op: str) -> None:
        self.reader, self.builder, self.traced, self.op = reader, reader.builder, traced, op
        schema = getattr(traced.target, "_schema", None)
        self.parameters = {} if schema is None else {argument.name: argument for argument in schema.arguments}
        self._arguments: dict[str, Any] = dict(zip(self.parameters, traced.args, strict=False)) | dict(traced.kwargs)
        self._read: set[str] = set()
        stack = list((traced.meta.get("nn_module_stack") or {}).values())
        self.module = (str(stack[-1][0]) if stack else "") or self._owner()
        name = self.module or str(traced.name)  # the module that computes it, or else the node
        is_taken = name in self.builder.layers or name == INPUT
        self.layer_name = f"{name}/{traced.name}" if self.module and is_taken else name

    def __str__(self) -> str:
        return f"{self.op} (node {self.traced.name!r}{f', in module {self.module!r}' if self.module else ''})"

    def _owner(self) -> str:
        """The module whose parameters it reads: what stands under `torch.no_grad` no longer says its own."""
        names = (self.reader.targets.get(node.name, "") for node in self.traced.all_input_nodes)
        return next((owner for owner in (name.rpartition(".")[0] for name in names) if owner), "")

    def check_arguments(self) -> None:
        """Refuse what was given and not read, unless it is what is computed without it."""
        for name, value in self._arguments.items():
            if name in self._read or name in IGNORED:
                continue
            parameter = self.parameters.get(name)
            default = parameter.default_value if parameter is not None and parameter.has_default_value() else None
            if value is not None and value != default:
                self.refuse_unread(f"{name} {value}", default)

    def _argument(self, name: str) -> Any:
        self._read.add(name)
        return self._arguments.get(name)

    def __contains__(self, name: str) -> bool:
        return self._argument(name) is not None

    def value(self, key: str) -> Any:
        value = self._argument(key)
        return self.reader.values[value] if isinstance(value, torch.fx.Node) else value

    def label(self, key: str) -> str:
        return key

    def require_floating(self, like: Any) -> None:
        """A type, or a tensor's, that leaves values as they are but for their rounding."""
        dtype = getattr(like, "dtype", like)
        if isinstance(dtype, torch.dtype) and not dtype.is_floating_point:
            self.refuse(f"makes {str(dtype).removeprefix('torch.')} of what is computed; required: a floating-point "
                        "type, for whole numbers and truth values have no relevance")

    def array(self, value: Any) -> Array:
        if not isinstance(value, torch.Tensor):
            return np.asarray(value)
        value = value.detach().cpu()
        return np.asarray((value.float() if value.dtype == torch.bfloat16 else value).numpy())  # NumPy has no bfloat16

    def get(self, key: str, default: Any) -> Any:
        """A plain value, such as a number or a list."""
        value = self.value(key)
        return default if value is None else value

    def optional(self, key: str) -> Array | None:
        return self.constant(key) if key in self else None

    def weight(self, key: str = "weight") -> Array:
        """A constant that must be there."""
        if key not in self:
            self.refuse(f"has no {key}; required: one")
        return self.constant(key)

    def image(self, axes: int, key: str = "self") -> Tensor:
        x = self.tensor(key)
        if x.rank != axes + 2:
            self.refuse(f"reads a tensor {x}; required: an example (N, C, {'H, W' if axes == 2 else 'L'}), with its "
                        "batch")
        return x

    def tensors(self, key: str) -> list[Tensor]:
        """A list of tensors."""
        values = self._argument(key) or []
        is_list = isinstance(values, (list, tuple))
        made = [self.reader.values[node] for node in values] if is_list else list(self.value(key))
        if not made or not all(isinstance(x, COMPUTED) for x in made):
            self.refuse("joins constants; required: tensors that depend on the network's input")
        return [as_tensor(self.builder, x) for x in made]

    def window(self, key: str, axes: int, default: int | Sequence[int]) -> tuple[int, ...]:
        """A number for each spatial axis; one number stands for all."""
        value = self.value(key)
        is_default = value is None or (isinstance(value, list) and not value)
        values = [int(n) for n in np.ravel(default if is_default else value)]
        if len(values) not in (1, axes):
            self.refuse(f"has {key} {value}; required: one or {axes} numbers")
        return tuple(values * axes if len(values) < axes else values)

    def integers(self, key: str, default: Sequence[int] = ()) -> list[int]:
        value = self.get(key, default)
        return [int(n) for n in ([value] if isinstance(value, int) else value)]
