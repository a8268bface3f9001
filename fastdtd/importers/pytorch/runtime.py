"""A PyTorch module as PyTorch runs it; its nodes one by one where the scores differ."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fastdtd.importers.moves import Array
from fastdtd.importers.verify import TOLERANCE, Runtime


@contextlib.contextmanager
def evaluating(module: Any) -> Iterator[Any]:
    """`module` in evaluation mode; afterwards each of its modules in its own again."""
    modes = {part: part.training for part in module.modules()}
    try:
        yield module.eval()
    finally:
        for part, training in modes.items():
            part.training = training


def given(exported: Any) -> tuple[dict[str, str], dict[str, Any]]:
    """What an exported program has beside its input: by placeholder, the name of a parameter, buffer or constant; and
    by that name, the tensor."""
    signature = exported.graph_signature
    names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers,
             **signature.inputs_to_lifted_tensor_constants}
    return names, {**exported.state_dict, **exported.constants}


@dataclass
class TorchRuntime(Runtime):
    """exported: what was read of `module`; like: tensors of the inputs' kinds; which: of the tensors that it returns.
    """

    module: Any = None
    exported: Any = None
    like: Sequence[Any] = ()
    which: int = 0

    def start(self) -> str:
        values = (node.meta.get("val") for node in self.exported.graph.nodes)
        types = {value.dtype for value in values if isinstance(value, torch.Tensor) and value.dtype.is_floating_point}
        self.tolerance = max(TOLERANCE, *(8 * torch.finfo(dtype).eps for dtype in types))
        return f"PyTorch {torch.__version__}"

    def run(self, inputs: Sequence[Array], key: Any = None) -> Array:
        given = tuple(torch.from_numpy(np.ascontiguousarray(x)).to(like)
                      for x, like in zip(inputs, self.like, strict=True))
        with torch.no_grad():
            made = self._module(given) if key is None else _Until(self.exported, key).value(given)
        return np.asarray(made.cpu().double().numpy())

    def _module(self, inputs: tuple[Any, ...]) -> Any:
        buffers = {name: buffer.clone() for name, buffer in self.module.named_buffers()}  # which it may write to
        with evaluating(self.module):
            made = torch.func.functional_call(self.module, buffers, inputs)
        return torch.utils._pytree.tree_leaves(made)[self.which]


class _Until(torch.fx.Interpreter):  # type: ignore[misc]  # for mypy does not follow torch
    """Runs an exported program as far as a node."""

    def __init__(self, exported: Any, last: Any) -> None:
        super().__init__(exported.graph_module)
        self._exported, self._last, self._found = exported, last, None

    def value(self, inputs: tuple[Any, ...]) -> Any:
        targets, constants = given(self._exported)
        names = [node.name for node in self._exported.graph.nodes if node.op == "placeholder"]
        left = iter(inputs)
        self.run(*(constants[targets[name]] if name in targets else next(left) for name in names))
        return self._found

    def run_node(self, n: Any) -> Any:
        value = super().run_node(n)
        if n is self._last:
            self._found = value
        return value
