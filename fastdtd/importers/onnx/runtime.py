"""A network in an ONNX file as onnxruntime runs it or, where that is not installed, onnx's own reference.

They get no file, and of it no more than the nodes that the reader has read and accepted: no other operators, no
branches that are not taken, no weights in files of their own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx

from fastdtd.importers.moves import Array
from fastdtd.importers.verify import NotComparedError, Runtime

_IR_VERSION = 8  # that every onnxruntime of today takes
_TOLERANCES = {onnx.TensorProto.FLOAT16: 1e-2, onnx.TensorProto.BFLOAT16: 5e-2}  # some units in the last place
QUANTIZED_TOLERANCE = 0.2  # of whole numbers of 8 bits, rounded after each layer; random inputs are at some 0.03


@dataclass
class OnnxRuntime(Runtime):
    """graph: nodes that lead to the output, their weights, the inputs and one output; opset: theirs."""

    graph: Any = None
    opset: int = 0
    _sessions: dict[str, Any] = field(default_factory=dict)

    def start(self) -> str:
        for node in self.graph.node:
            if node.op_type == "MatMulNBits":  # not with an input that is rounded to 8 bits, but as it is converted
                exact = [attribute for attribute in node.attribute if attribute.name != "accuracy_level"]
                del node.attribute[:]
                node.attribute.extend(exact)
        for tensor in _tensors(self.graph):
            if tensor.data_location == onnx.TensorProto.EXTERNAL or tensor.external_data:
                raise NotComparedError("it names weights in another file that were not read")
            self.tolerance = max(self.tolerance, _TOLERANCES.get(tensor.data_type, 0.0))
        self.dtypes = [onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
                       for value in self.graph.input]
        try:
            import onnxruntime
        except ModuleNotFoundError:
            self.max_operations, self.pool_operations = 5e8, 500  # it is NumPy, and loops over windows,
            if any(node.op_type == "ConvTranspose" for node in self.graph.node):
                self.column_operations = 500  # and over what transposed convolutions add up,
            self.max_elements = 2**24  # and keeps all tensors
            return f"onnx {onnx.__version__}'s reference"
        return f"onnxruntime {onnxruntime.__version__}"

    def run(self, inputs: Sequence[Array], key: Any = None) -> Array:
        output = key or self.graph.output[0].name
        if output not in self._sessions:
            self._sessions[output] = self._session(output)
        return np.asarray(self._sessions[output]({value.name: given for value, given in zip(
            self.graph.input, inputs, strict=True)}))

    def _session(self, output: str) -> Any:
        domains = [("", self.opset), *((domain, 1) for domain in {node.domain for node in self.graph.node} - {
            "", "ai.onnx"})]
        model = onnx.ModelProto(ir_version=_IR_VERSION, graph=self.graph,
                                opset_import=[onnx.helper.make_opsetid(*domain) for domain in domains])
        if output != model.graph.output[0].name:
            del model.graph.output[:]
            model.graph.output.append(onnx.ValueInfoProto(name=output))
        try:
            import onnxruntime
        except ModuleNotFoundError:
            from onnx.reference import ReferenceEvaluator

            for node in model.graph.node:
                _mend_for_reference(node)
            reference = ReferenceEvaluator(model, new_ops=_softmaxes_to_the_end() if self.opset < 13 else None)
            return lambda inputs: reference.run([output], inputs)[0]
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4  # what goes wrong is raised
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL  # as it is written
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        return lambda inputs: session.run([output], inputs)[0]


def _softmaxes_to_the_end() -> list[type]:
    """As they are before opset 13, over all axes from one on; onnx's reference takes that one alone."""
    from onnx.reference.op_run import OpRun

    class LogSoftmax(OpRun):  # type: ignore[misc]  # for mypy does not follow onnx
        op_domain = ""

        def _run(self, x: Array, axis: int = 1) -> tuple[Array]:
            rows = x.reshape(*x.shape[:axis % x.ndim], -1)
            rows = rows - rows.max(-1, keepdims=True)
            return ((rows - np.log(np.exp(rows).sum(-1, keepdims=True))).reshape(x.shape),)

    class Softmax(LogSoftmax):
        def _run(self, x: Array, axis: int = 1) -> tuple[Array]:
            return (np.exp(super()._run(x, axis)[0]),)

    return [LogSoftmax, Softmax]


def _mend_for_reference(node: Any) -> None:
    """Without what onnx's reference (1.23) computes otherwise than the specification: below opset 14 batch norms mix
    the batch's statistics in, but for this momentum; max-pools that pad the beginning more are a row short; LRN takes
    the batch for the channels."""
    if node.op_type == "BatchNormalization":
        kept = [attribute for attribute in node.attribute if attribute.name != "momentum"]
        del node.attribute[:]
        node.attribute.extend([*kept, onnx.helper.make_attribute("momentum", 1.0)])
    if node.op_type == "LRN":
        raise NotComparedError("onnx's reference normalises by the batch's size, not the channels'; `pip install "
                               "onnxruntime` does it right")
    if node.op_type == "MaxPool" and any(attribute.s == b"SAME_LOWER" for attribute in node.attribute):
        raise NotComparedError("onnx's reference does not know the auto_pad SAME_LOWER; `pip install onnxruntime` does")


def _tensors(graph: Any) -> Iterator[Any]:
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            yield from attribute.tensors
            if attribute.type == onnx.AttributeProto.TENSOR:
                yield attribute.t
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from _tensors(attribute.g)
