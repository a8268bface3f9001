"""The process in which an embedded library is compiled: kernels are written for a processor when they are imported, so
each target has a process of its own.

    python -m fastdtd.embedding.worker JOB FOLDER

JOB is a pickled `Job` of the process that started this one. In FOLDER it leaves the object, the weights and a
`Compiled`.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import pickle
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fastdtd.embedding import code, layout, packing
from fastdtd.embedding.job import COMPILED, OBJECT, WEIGHTS, Compiled, Job
from fastdtd.errors import FastDTDError, InputError
from fastdtd.graph import Conv2d, Dense, Graph, Layer
from fastdtd.kernels import load
from fastdtd.kernels.cpu import jit, program
from fastdtd.lowering import lower
from fastdtd.model import Model
from fastdtd.rules import Assignment, assign

_MAGIC, _COMPACT_MAGIC, _VERSION = b"fastdtdW", b"fastdtdC", 1


def main(arguments: list[str]) -> None:
    job_path, folder = map(Path, arguments)
    job = pickle.loads(job_path.read_bytes())
    try:
        outcome: Any = _compile(job, folder)
    except FastDTDError as error:
        outcome = error
    (folder / COMPILED).write_bytes(pickle.dumps(outcome))


def _compile(job: Job, folder: Path) -> Compiled:
    jit.keep_ir()
    half, is_compact = job.weights == "compact16", job.weights in ("compact", "compact16")
    graph = _in_half(job.model.graph) if half else job.model.graph
    assignment = assign(graph, job.rules)
    kernels: Any = load("cpu", functools.cache(partial(_say_compiling, job.target.name)))
    kernels = _Direct(kernels) if job.small else kernels
    recorder: Any = packing.Recorder(kernels)
    lowered = lower(graph, assignment, recorder)
    schedule = lowered.schedule(1)
    header_bytes = layout.aligned(8 * program.HEADER_WORDS)
    found = layout.lay_out(schedule, header_bytes)
    layers: dict[int, str] = {}
    for step, row in zip(schedule.steps, found.steps, strict=True):
        layers.setdefault(int(row[0]), step.layer)
    digest = hashlib.sha256()
    for piece in found.weights:
        digest.update(piece)
    digest.update(found.slots.tobytes() + found.steps.tobytes() + job.target.vectors.encode())
    compact = None
    if is_compact:
        compact = packing.compact(lowered.graph, lowered.assignment, kernels, recorder.packings, found, header_bytes,
                                  half)
        found = found.with_scratch(compact.scratch_bytes)
    headers = [magic + np.array([_VERSION, size], "<i8").tobytes() + digest.digest()
               for magic, size in ((_MAGIC, found.weights_bytes), (_COMPACT_MAGIC, compact.size if compact else 0))]
    with open(folder / WEIGHTS, "wb") as file:
        file.write(headers[is_compact].ljust(header_bytes, b"\0"))
        file.writelines(compact.content if compact else found.weights)
    facts = _facts(job.model, assignment, schedule, found, headers[0], job.weights == "embedded")
    if compact:
        for index, value in ((program.COMPACT_MAGIC, int.from_bytes(_COMPACT_MAGIC, "little")),
                             (program.COMPACT_BYTES, compact.size), (program.IS_HALF, half),
                             (program.OPERATIONS, len(compact.operations))):
            facts[index] = int(value)
    classes = () if graph.has_maps else job.model.classes  # of maps they are names of channels
    content = code.emit(found, compact, facts, _numbers(job.model), classes, job.name, job.target,
                        folder / WEIGHTS if job.weights == "embedded" else None, layers)
    (folder / OBJECT).write_bytes(content)
    return Compiled(graph.input_shape, graph.output_shape, dict(job.model.inputs), classes, found.workspace_bytes,
                    found.weights_bytes, 0 if job.weights == "embedded" else (folder / WEIGHTS).stat().st_size,
                    job.model.preprocessing.color is not None, assignment.signed_scores)


def _in_half(graph: Graph) -> Graph:
    """The network with its weights rounded to float16."""
    def rounded(layer: Layer) -> Layer:
        if not isinstance(layer, (Conv2d, Dense)):
            return layer
        with np.errstate(over="ignore"):
            weight = layer.weight.astype(np.float16).astype(np.float32)
        if not np.isfinite(weight).all():
            raise InputError(f"layer {layer.name!r} has weights up to {np.abs(layer.weight).max():.3g}, and float16 "
                             "holds 65504; required: other weights, or --weights compact")
        return dataclasses.replace(layer, weight=weight)

    return Graph(tuple(map(rounded, graph)), graph.input_shape, graph.box)


def _say_compiling(target: str) -> None:
    print(f"fastdtd: compiling kernels for {target}, once; this can take a minute", file=sys.stderr)


class _Direct:
    """Kernels without Winograd's algorithm, whose transformed weights are four times as large, and without a second way
    back for sparse relevance."""

    def __init__(self, kernels: Any) -> None:
        self._kernels = kernels

    def __getattr__(self, name: str) -> Any:
        return getattr(self._kernels, name)

    @staticmethod
    def winograd2d_pays(*shape: int) -> bool:
        return False

    @staticmethod
    def sparse2d_below(*shape: int) -> float:
        return 0.0


def _facts(model: Model, assignment: Assignment, schedule: Any, found: Any, header: bytes, embedded: bool
           ) -> list[int]:
    """The network, as fastdtd.kernels.cpu.program reads it."""
    graph, p = model.graph, model.preprocessing
    channels, height, width = graph.input_shape
    facts = [0] * program.FACTS
    facts[:program.HEADER_WORDS] = np.frombuffer(header, "<i8").tolist()
    dead, ledger = (schedule.states[name][0] for name in ("dead", "ledger"))
    for index, value in {
        program.STEPS: len(schedule.steps), program.FORWARD_STEPS: schedule.forward_steps, program.CHANNELS: channels,
        program.HEIGHT: height, program.WIDTH: width, program.OUTPUTS: graph.outputs,
        program.LAYERS: ledger[1], program.WORKSPACE_BYTES: found.workspace_bytes,
        program.EMBEDDED_WEIGHTS: embedded, program.INPUT_AT: found.places["input"],
        program.OUTPUT_AT: found.places["output"], program.START_AT: found.places["start"],
        program.RELEVANCE_AT: found.places["relevance"], program.LEDGER_AT: found.places["ledger"],
        program.DEAD_AT: found.places["dead"], program.DEAD_BYTES: dead[0] * dead[1],
        program.SLOTS_AT: found.places["slots"], program.HAS_BOUNDS: graph.box is not None,
        program.STARTS_WITH_RELEVANCE: schedule.starts_with_relevance,
        program.SIGNED_SCORES: assignment.signed_scores,
        program.DERIVATIVE: _DERIVATIVES.index(assignment.derivative),
        program.COLOR: _COLORS.index(p.color), program.CROPS: p.resize == "crop",
        program.HAS_PLANES: p.values is None,
    }.items():
        facts[index] = int(value)
    return facts


_DERIVATIVES = (None, "gradient", "gradient*input", "sensitivity")
_COLORS = (None, "rgb", "bgr", "gray")


def _numbers(model: Model) -> Any:
    """The input's bounds, then what pixels become: by channel and value, or scale, means and deviations."""
    graph, p = model.graph, model.preprocessing
    channels = graph.input_shape[0]
    bounds = np.zeros((2, channels)) if graph.box is None else np.stack(graph.box)
    if p.color is None:
        pixels: list[Any] = [np.zeros(0)]
    elif p.values is not None:
        pixels = [p.values]
    else:
        pixels = [np.array([p.scale]), *(np.broadcast_to(each, graph.input_shape) for each in (p.mean, p.std))]
    return np.concatenate([np.ravel(part).astype(np.float32) for part in (bounds, *pixels)])


if __name__ == "__main__":
    main(sys.argv[1:])
