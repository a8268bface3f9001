"""Max-pools, by winner or in proportion, and average pools."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from fastdtd import graph as g
from fastdtd.graph import Array
from fastdtd.lowering import linear
from fastdtd.lowering.blocks import Blocks, blocks_of, int_table
from fastdtd.lowering.builder import Builder, read_only
from fastdtd.rules import Assignment, Term

Pool = g.Pool2d | g.GlobalAveragePool

_SPLIT_FROM, _ALWAYS_SPLIT_FROM = 64, 4096  # values of a window


def split_large(graph: g.Graph, assignment: Assignment) -> tuple[g.Graph, Assignment]:
    """Max-pools by winner over large windows as two: over the windows' rows, and over columns of what these gave.

    A window then takes as many comparisons as it has rows and columns, not their product. The first of the largest
    values is in the first row that has one, and the first there, so the winner is the same.
    """
    layers: list[g.Layer] = []
    rules, carriers, signed = dict(assignment.rules), set(assignment.carriers), set(assignment.signed)
    for layer in graph:
        rule = rules.get(layer.name)
        if isinstance(layer, g.MaxPool2d) and rule is not None and not rule.terms and _pays_to_split(layer, graph):
            (down, across), (stride_h, stride_w), (top, left, bottom, right) = layer.kernel, layer.stride, layer.padding
            rows = f"{layer.name}/rows"
            while rows in graph.shapes:
                rows += "'"
            layers.append(g.MaxPool2d(rows, layer.inputs, (1, across), (1, stride_w), (0, left, 0, right),
                                      layer.ceil_mode))
            layers.append(g.MaxPool2d(layer.name, (rows,), (down, 1), (stride_h, 1), (top, 0, bottom, 0),
                                      layer.ceil_mode))
            rules[rows] = rule
            for names in (carriers, signed):
                names.update({rows} if layer.name in names else ())
        else:
            layers.append(layer)
    if len(layers) == len(graph.layers):
        return graph, assignment
    return (g.Graph(tuple(layers), graph.input_shape, graph.box),
            replace(assignment, rules=rules, carriers=frozenset(carriers), signed=frozenset(signed)))


def _pays_to_split(layer: g.MaxPool2d, graph: g.Graph) -> bool:
    (down, across), height = layer.kernel, graph.shapes[layer.inputs[0]][1]
    _, rows, columns = graph.shapes[layer.name]
    at_once, split = rows * columns * down * across, height * columns * across + rows * columns * down
    return min(down, across) > 1 and (down * across > _ALWAYS_SPLIT_FROM
                                      or (down * across >= _SPLIT_FROM and 2 * split <= at_once))


def forward(b: Builder, layer: Pool) -> None:
    if not _by_winner(b, layer):
        linear.forward(b, layer, _sum_step, _window_counts(b, layer))
        return
    x, a = b.activation(layer.name), b.activation(layer.inputs[0])
    blocks, blocked = _blocks(b, layer)
    tap_positions = _tap_positions(b, layer) if blocks else None
    b.step(b.kernels.max_pool2d_forward, b.batch * x.channels, x=x, winner=b.saved(layer, dtype=np.int32).view, a=a,
           x_channel=x.channel, a_channel=a.channel,
           optional={**_geometry(b, layer), **blocked, "positions": tap_positions})


def backward(b: Builder, layer: Pool) -> None:
    if not _by_winner(b, layer):
        linear.backward(b, layer, _term_step)
        return
    source = layer.inputs[0]
    accumulate = b.accumulates(source)
    c_in, c = b.factor(source), b.factor(layer.name)
    b.step(b.kernels.max_pool2d_redistribute, b.batch * c_in.channels, c_in=c_in, c=c, winner=b.saved(layer).view,
           c_in_channel=c_in.channel, c_channel=c.channel, accumulate=accumulate, optional=_geometry(b, layer))


def holds_all(layer: Pool, graph: g.Graph) -> bool:
    """Whether the one window is the whole input."""
    shape = graph.shapes[layer.inputs[0]][1:]
    return isinstance(layer, g.GlobalAveragePool) or (layer.kernel == shape and not any(layer.padding))


def _by_winner(b: Builder, layer: Pool) -> bool:
    rule = b.rule(layer)
    return rule is not None and not rule.terms


def _sum_step(b: Builder, layer: Pool, index: int, features: int, arguments: dict[str, Any]) -> None:
    low, _ = b.bounds(layer.inputs[0])
    b.step(b.kernels.pool2d_forward, b.batch * b.graph.shapes[layer.name][0], **arguments, low=low,
           maximum=isinstance(layer, g.MaxPool2d), features=features,
           optional={**_geometry(b, layer), **_blocks(b, layer)[1]})


def _term_step(b: Builder, layer: Pool, part: int, term: Term, source: str, arguments: dict[str, Any]) -> None:
    kernel, stride, padding, _ = _window(b, layer)
    block, results = b.kernels.pool2d_redistribute_elements(kernel, stride, padding, b.graph.shapes[source][1:],
                                                            b.graph.shapes[layer.name][1:])
    del arguments["high"]  # all weights of a pool are positive
    b.step(b.kernels.pool2d_redistribute, b.batch * b.graph.shapes[source][0], **arguments, features=term.features,
           **_geometry(b, layer),
           optional={"block": b.scratch("block", block), "results": b.scratch("results", results)})


def _window(b: Builder, layer: Pool) -> tuple[Any, Any, Any, bool]:
    """Kernel, stride, padding, and whether padding counts in a mean."""
    if isinstance(layer, g.GlobalAveragePool):
        return b.graph.shapes[layer.inputs[0]][1:], (1, 1), (0, 0, 0, 0), False
    return layer.kernel, layer.stride, layer.padding, isinstance(layer, g.AveragePool2d) and layer.count_include_pad


def _geometry(b: Builder, layer: Pool) -> dict[str, Any]:
    kernel, stride, padding, _ = _window(b, layer)
    return {"kernel_h": kernel[0], "kernel_w": kernel[1], "stride_h": stride[0], "stride_w": stride[1],
            "pad_top": padding[0], "pad_left": padding[1]}


def _blocks(b: Builder, layer: Pool) -> tuple[Blocks | None, dict[str, Any]]:
    """How windows read blocks of their input, if copied; no planes where one window holds the whole input, or the
    largest value is looked for in the input itself."""
    if b.kernels.POOLING != "blocked":
        return None, {}
    kernel, stride, padding, _ = _window(b, layer)
    if holds_all(layer, b.graph) and not _by_winner(b, layer):
        blocks = Blocks(int_table([], 2), [], 1, 1, 0, 0)
    else:
        taps = [(i - padding[0], j - padding[1]) for i in range(kernel[0]) for j in range(kernel[1])]
        if _by_winner(b, layer) and _are_inside(b, layer) and stride[1] <= 2:
            in_shape = b.graph.shapes[layer.inputs[0]][1:]
            blocks = Blocks(int_table([], 2), [(0, *tap) for tap in taps], *in_shape, 0, 0)
        else:
            blocks = blocks_of(taps, stride, b.graph.shapes[layer.name][1:], 1, b.blocked_kernels)
    return blocks, {
        "offsets": read_only(blocks.offsets(1)), "block": b.scratch("block", blocks.elements(1)), **blocks.arguments()
    }


def _are_inside(b: Builder, layer: Pool) -> bool:
    """Whether no window reaches beyond the input."""
    kernel, stride, padding, _ = _window(b, layer)
    sizes, counts = b.graph.shapes[layer.inputs[0]][1:], b.graph.shapes[layer.name][1:]
    return not any(padding) and all((counts[axis] - 1) * stride[axis] + kernel[axis] <= sizes[axis] for axis in (0, 1))


def _tap_positions(b: Builder, layer: Pool) -> Any:
    """Where in a plane of the input each tap of a window lies, from the window's position on."""
    kernel, _, padding, _ = _window(b, layer)
    width = b.graph.shapes[layer.inputs[0]][2]
    taps = [(i - padding[0]) * width + j - padding[1] for i in range(kernel[0]) for j in range(kernel[1])]
    return read_only(np.array(taps, np.int32))


def _window_counts(b: Builder, layer: Pool) -> tuple[Array, Array]:
    """How many rows each window counts, and how many columns: their product is a mean's divisor. 1 for a maximum."""
    kernel, stride, padding, count_padding = _window(b, layer)
    counts = []
    for axis in (0, 1):
        size, positions = b.graph.shapes[layer.inputs[0]][1 + axis], b.graph.shapes[layer.name][1 + axis]
        begin = np.arange(positions) * stride[axis] - padding[axis]
        end = np.minimum(begin + kernel[axis], size + (padding[2 + axis] if count_padding else 0))
        count = end - (begin if count_padding else np.maximum(begin, 0))
        counts.append(read_only((np.ones(positions) if isinstance(layer, g.MaxPool2d) else count).astype(np.float32)))
    return counts[0], counts[1]
