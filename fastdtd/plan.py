"""(graph, rules, kernels, batch) -> Plan: the only place that allocates, and that binds kernels to memory.

A plan is a flat list of bound calls, forward and then back. Compiling it takes two looks: the first writes down each call with the buffers
it touches, the second lays the buffers out in one arena, where those that are never alive together share memory, and binds the calls.

What goes back. R = |a| c is the relevance of an activation a. Most tensors carry the factor c; a tensor that some layer reads under a rule
whose relevance is no multiple of a (zB, w2, flat) carries R itself, and so does the network's input. docs/architecture.md says more.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, wait
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np

from fastdtd import graph as g
from fastdtd.errors import InputError, RuleError
from fastdtd.graph import INPUT, Array, Graph, Layer, Shape
from fastdtd.kernels import codes
from fastdtd.kernels.signatures import parameters
from fastdtd.packing import (
    Blocks,
    DirectBack,
    DirectForward,
    ImplicitBack,
    ImplicitForward,
    Winograd,
    bounds_of,
    read_only,
    reads_in_place,
    window_blocks,
)
from fastdtd.rules import Assigned, Rule, Term, absorbers, relevance_carriers

_ALIGNMENT = 16  # floats: one cache line
_LOST = 3  # the tape of what a neuron keeps, behind those of its rule's terms
_WEIGHTS = {"positive": codes.POSITIVE, "negative": codes.NEGATIVE, "value": codes.AS_IS, "squared": codes.SQUARED, "flat": codes.FLAT}
_BIASES = {"ignored": codes.IGNORED, "absorbed": codes.ABSORBED, "shared": codes.SHARED}
_FACTORS: dict[int, Callable[[Rule], float]] = {
    **dict.fromkeys((codes.SIGNS, codes.EPSILON, codes.GRADIENT, codes.DIRECTION), lambda _: 1.0),
    codes.ALPHA_BETA: lambda rule: rule.alpha, codes.GAMMA: lambda rule: rule.gamma,
}


# ---- Buffers -----------------------------------------------------------------------------------------------------------------------------


class _Buffer:
    """Memory of a known size for the steps first..last."""

    def __init__(self, elements: int) -> None:
        self.elements = elements  # for each image
        self.first, self.last, self.offset = -1, -1, 0


@dataclass(frozen=True, eq=False)
class _Use:
    """A buffer as a step sees it: an array (batch, *shape)."""

    buffer: _Buffer
    shape: tuple[int, ...]
    dtype: type[np.generic] = np.float32


@dataclass(frozen=True, eq=False)
class _Tensor:
    """A tensor's place: channels `channel`.. of an array (batch, *shape)."""

    use: _Use
    channel: int


def _lay_out(buffers: Iterable[_Buffer], batch: int) -> int:
    """Give each buffer an offset, the large ones first, so that buffers alive at the same time do not overlap; returns the size of all."""
    placed: list[_Buffer] = []
    size = 0
    for buffer in sorted(buffers, key=lambda b: -b.elements):
        need = _room(buffer, batch)
        start = 0
        for other in sorted((b for b in placed if b.first <= buffer.last and buffer.first <= b.last), key=lambda b: b.offset):
            if start + need <= other.offset:
                break
            start = max(start, other.offset + _room(other, batch))
        buffer.offset = start
        placed.append(buffer)
        size = max(size, start + need)
    return size


def _room(buffer: _Buffer, batch: int) -> int:
    return -(-buffer.elements * batch // _ALIGNMENT) * _ALIGNMENT


# ---- The plan ----------------------------------------------------------------------------------------------------------------------------


class NoRoomError(InputError):
    """A plan for which there is no memory."""


class Plan:
    """Bound calls for `batch` images at a time, shared out among `workers` threads. Not for two callers at once.

    Attributes
    ----------
    batch, workers : int
    input : (batch, C, H, W) float32
        Write pictures here before `forward`.
    output : (batch, K) float32
        Class scores, valid between `forward` and `back`.
    start : (batch, K) float32
        Write here what the output carries back (1 for the class to explain; its relevance if `starts_with_relevance`) before `back`.
    relevance : (batch, C, H, W) float32
        Of the input, valid after `back`.
    ledger : (batch, layers) float64
        Relevance that each layer of `ledger_layers` absorbed, valid after `back`.
    observed : dict of str to (batch, C, H, W) float32
        Relevance of the tensors that were asked for, valid after `back`.
    """

    def __init__(self, graph: Graph, rules: dict[str, Assigned], kernels: ModuleType, packed: dict[str, Any], batch: int,
                 workers: int = 1, observed: Iterable[str] = ()):
        self._graph, self._rules, self._kernels, self._packed = graph, rules, kernels, packed
        self.batch, self.workers = batch, workers
        self._steps: list[tuple[Callable[..., None], list[Any], int]] = []
        self.step_layers: list[str] = []  # which layer each step belongs to
        self._conditions: dict[int, Any] = {}  # steps for which there is nothing to do where this is all zero
        self._scratch: dict[str, int] = {}
        self._activation_behind = fusible_activations(graph)
        self._relevance_carriers = relevance_carriers(graph, rules)
        # Tensors that share memory share what their readers give back, so who looks at one of them needs them apart.
        self._roots = {name: (name, 0, math.prod(shape)) for name, shape in graph.shapes.items()} if observed else _roots(graph)
        self._activations: dict[str, _Buffer] = {}
        self._factors: dict[str, _Buffer] = {}
        self._written: dict[str, list[tuple[int, int]]] = {}
        self._tapes: dict[tuple[str, int], tuple[_Use, Any]] = {}
        # A row for each tape, so that all are cleared at once.
        self._dead = kernels.zeros(((_LOST + 1) * len(graph.layers), batch), np.uint8)
        self.ledger_layers = absorbers(graph, rules)
        self.ledger = kernels.zeros((batch, len(self.ledger_layers)), np.float64)
        self.starts_with_relevance = graph.output in self._relevance_carriers
        self._derives = any(rule.name == "gradient" for rule in rules.values())

        fused = {layer.name for layer in self._activation_behind.values()}
        layers = [layer for layer in graph if layer.name not in fused]
        source, output = self._activation(INPUT), self._activation(graph.output)
        self._touch(source.use, 0)
        for layer in layers:
            self._emit_forward(layer)
            self._name_steps(layer.name)
        middle = len(self._steps)
        self._touch(output.use, middle)
        start = self._factor(graph.output)
        self._touch(start.use, middle)
        self._mark_written(graph.output)
        self.observed = {name: kernels.zeros((batch, *graph.shapes[name]), np.float32) for name in observed}
        for layer in reversed(layers):
            for name in self.observed.keys() & {layer.name, self._result(layer)[0]}:
                self._observe(name, self._result(layer)[0])
            self._emit_back(layer)
            self._name_steps(layer.name)
        if INPUT in self.observed:
            self._observe(INPUT, INPUT)
        relevance = self._factor(INPUT)
        self._touch(relevance.use, len(self._steps))

        buffers = {id(use.buffer): use.buffer for _, arguments, _ in self._steps for use in arguments if isinstance(use, _Use)}
        buffers |= {id(t.use.buffer): t.use.buffer for t in (source, output, start, relevance)}
        self.arena_elements = _lay_out(buffers.values(), batch)
        try:
            self._arena = kernels.empty(self.arena_elements)
            self._bound = [self._bind(worker) for worker in range(workers)]  # what the tables hold addresses of
        except MemoryError:
            size = self.arena_elements * 4 / 2**30
            raise NoRoomError(f"the network needs {size:.1f} GiB for {batch} pictures at a time, more than there is") from None
        self.input, self.output, self.start, self.relevance = map(self._bind_tensor, (
            (source, graph.input_shape), (output, graph.shapes[graph.output]), (start, graph.shapes[graph.output]),
            (relevance, graph.input_shape)))
        self.output, self.start = self.output[:, :, 0, 0], self.start[:, :, 0, 0]
        self._tables = [kernels.table(calls) for calls in self._bound]
        self._middle = middle

    @property
    def nbytes(self) -> int:
        """Memory of the arena and of all workers' scratch."""
        scratch = sum(elements + int(self._kernels.MARGIN) for elements in self._scratch.values())
        return int(self._arena.nbytes) + 4 * self.workers * scratch

    def forward(self, submit: Callable[..., Any] | None = None) -> None:
        """input -> output. `submit` starts a call in another thread; needed where the plan has several workers."""
        self._dead[:] = 0
        self._run(range(self._middle), submit)

    def back(self, submit: Callable[..., Any] | None = None) -> None:
        """start -> relevance and ledger."""
        self.ledger[:] = 0
        self._run(range(self._middle, len(self._steps)), submit)

    # -- Where tensors live

    def _activation(self, name: str) -> _Tensor:
        return self._place(name, self._activations)

    def _factor(self, name: str) -> _Tensor:
        return self._place(name, self._factors)

    def _place(self, name: str, buffers: dict[str, _Buffer]) -> _Tensor:
        root, offset, elements = self._roots[name]
        buffer = buffers.setdefault(root, _Buffer(elements))
        _, height, width = self._graph.shapes[name]
        return _Tensor(_Use(buffer, (elements // (height * width), height, width)), offset // (height * width))

    def _accumulates(self, name: str) -> bool:
        """Whether c of a tensor is added to; a part of it that is not written yet is cleared before."""
        root, offset, elements = self._roots[name]
        end = offset + int(np.prod(self._graph.shapes[name]))
        written = self._written.setdefault(root, [])
        covered = sorted((max(a, offset), min(b, end)) for a, b in written if a < end and b > offset)
        self._mark_written(name)
        if not covered:
            return False
        at = offset
        for begin, stop in [*covered, (end, end)]:
            if begin > at:
                whole = _Use(self._factors.setdefault(root, _Buffer(elements)), (elements, 1, 1))
                self._step(self._kernels.clear_redistribute, self.batch, c_in=whole, begin=at, end=begin)
            at = max(at, stop)
        return True

    def _mark_written(self, name: str) -> None:
        root, offset, _ = self._roots[name]
        self._written.setdefault(root, []).append((offset, offset + int(np.prod(self._graph.shapes[name]))))

    # -- Writing steps down

    def _step(self, kernel: Callable[..., None], units: int, **offered: Any) -> None:
        """Write down a call. Of what is offered by name a device's kernel takes what it has parameters for: a processor's blocks and
        scratch mean nothing to others."""
        arguments = [offered[name] for name in parameters(kernel)]
        for use in arguments:
            if isinstance(use, _Use):
                self._touch(use, len(self._steps))
        self._steps.append((kernel, arguments, units))

    def _name_steps(self, layer: str) -> None:
        self.step_layers += [layer] * (len(self._steps) - len(self.step_layers))

    def _touch(self, use: _Use, step: int) -> None:
        buffer = use.buffer
        buffer.first = step if buffer.first < 0 else min(buffer.first, step)
        buffer.last = max(buffer.last, step)

    def _result(self, layer: Layer) -> tuple[str, tuple[float, float]]:
        """The tensor that a layer makes, and the bounds of the activation that is fused with it, infinite where none is."""
        behind = self._activation_behind.get(layer.name)
        return (layer.name, (-math.inf, math.inf)) if behind is None else (behind.name, _clips_to(behind))

    def _bounds(self, name: str) -> tuple[Array, Array]:
        return bounds_of(self._graph, name)

    def _tape(self, layer: Layer, part: int = 0, dtype: type[np.generic] = np.float32) -> tuple[_Use, Any]:
        """What a layer keeps for the way back, of each term of its rule, and whether something is absorbed, of each image."""
        shape = self._graph.shapes[layer.name]
        if (layer.name, part) not in self._tapes:
            self._tapes[layer.name, part] = _Use(_Buffer(int(np.prod(shape))), shape, dtype), self._dead[len(self._tapes)]
        return self._tapes[layer.name, part]

    def _emit_forward(self, layer: Layer) -> None:
        kernels, batch = self._kernels, self.batch
        result, clip = self._result(layer)
        x, a = self._activation(result), self._activation(layer.inputs[0])
        channels = self._graph.shapes[layer.name][0]
        carries = result in self._relevance_carriers
        rule = self._rules.get(layer.name)
        match layer:
            case g.MaxPool2d() if rule and not rule.terms:
                winner, _ = self._tape(layer, dtype=np.int32)
                self._step(kernels.max_pool2d_forward, batch * channels, x=x.use, winner=winner, a=a.use, x_channel=x.channel,
                           a_channel=a.channel, **self._geometry(layer), **self._windows(layer))
            case g.LocalResponseNorm():
                ratio, _ = self._tape(layer)
                self._step(kernels.normalize_forward, batch * self._graph.shapes[layer.name][1], x=x.use, ratio=ratio, a=a.use,
                           x_channel=x.channel, a_channel=a.channel, **_normalisation(layer))
            case _ if rule and rule.formula is None:
                self._emit_sum(layer, 0, x, *self._tape(layer), clip, carries)
            case _ if rule:
                self._emit_formula(layer, rule, x, clip, carries)
            case g.ReLU() | g.Clip() | g.LeakyReLU():
                self._step(kernels.activate_forward, batch * channels, x=x.use, a=a.use, x_channel=x.channel, a_channel=a.channel,
                           channels=channels, **_pointwise(layer))
            case g.Power():
                ratio, _ = self._tape(layer)
                self._step(kernels.power_forward, batch * channels, x=x.use, ratio=ratio, a=a.use, x_channel=x.channel,
                           a_channel=a.channel, exponent=layer.exponent, derivative=self._derives)
            case g.Rearrange():
                self._step(kernels.rearrange_forward, batch, x=x.use, a=a.use, index=read_only(layer.index), x_channel=x.channel,
                           a_channel=a.channel)
            case g.Concat() | g.Flatten():
                for source, place in self._copied_inputs(layer):
                    self._copy(self._activations, layer.name, place, source, 0, source, False)
            case _:
                raise AssertionError(f"no kernel for {type(layer).__name__}: the graph is not canonical")

    def _emit_sum(self, layer: Layer, index: int, x: _Tensor, ratio: _Use, dead: Any, clip: tuple[float, float],
                  relevance: bool) -> None:
        """The layer's output, and the ratio of one of its rule's sums. The bias is left out where a formula adds it."""
        kernels, batch, rule = self._kernels, self.batch, self._rules[layer.name]
        features = rule.sums[index].features
        a, channels = self._activation(layer.inputs[0]), self._graph.shapes[layer.name][0]
        low, high = self._bounds(layer.inputs[0])
        bias = _bias(layer) if isinstance(layer, (g.Conv2d, g.Dense)) and rule.formula is None else _zeros(channels)
        match layer:
            case g.Conv2d():
                self._emit_convolution(layer, self._packed[layer.name].forward[index], bias, x, ratio, dead, a, clip, relevance)
            case g.Dense():
                weight, constant = self._packed[layer.name].sums[index]
                self._step(
                    kernels.dense_forward, channels, x=x.use, ratio=ratio, dead=dead, a=a.use, weight=weight, bias=bias, constant=constant,
                    low=low, high=high, sums=self._scratch_of("results", kernels.dense_forward_elements(batch)), x_channel=x.channel,
                    a_channel=a.channel, features=features, x_min=clip[0], x_max=clip[1], relevance=relevance)
            case g.Add():
                b, (low_b, high_b) = self._activation(layer.inputs[1]), self._bounds(layer.inputs[1])
                self._step(
                    kernels.add_forward, batch * channels, x=x.use, ratio=ratio, dead=dead, a=a.use, b=b.use, low_a=low, high_a=high,
                    low_b=low_b, high_b=high_b, x_channel=x.channel, a_channel=a.channel, b_channel=b.channel, features=features,
                    x_min=clip[0], x_max=clip[1], relevance=relevance)
            case _:
                count_h, count_w = self._window_counts(layer)
                self._step(
                    kernels.pool2d_forward, batch * channels, x=x.use, ratio=ratio, dead=dead, a=a.use, low=low,
                    count_h=count_h, count_w=count_w, x_channel=x.channel, a_channel=a.channel,
                    maximum=isinstance(layer, g.MaxPool2d), features=features, relevance=relevance, **self._geometry(layer),
                    **self._windows(layer))

    def _emit_formula(self, layer: Layer, rule: Assigned, x: _Tensor, clip: tuple[float, float], relevance: bool) -> None:
        """The sums of the rule, one after the other, then what follows from them."""
        tapes = {term: self._tape(layer, part)[0] for part, term in enumerate(rule.terms)}
        first, dead = self._tape(layer)
        nobody = self._kernels.zeros(self.batch, np.uint8)  # the formula finds out what is absorbed
        for index, term in enumerate(rule.sums):
            self._emit_sum(layer, index, x, tapes.get(term, first), nobody, (-math.inf, math.inf), True)
        if rule.rule.direction:
            a, (low, high) = self._activation(layer.inputs[0]), self._bounds(layer.inputs[0])
            self._step(self._direction(rule.rule)[0], self.batch * self._graph.shapes[layer.name][0], z=first, a=a.use, low=low, high=high,
                       a_channel=a.channel, **_as_convolution(layer))
        second = next((tapes[term] for term in rule.terms if term.weights == "negative"), first)
        third = next((tapes[term] for term in rule.terms[1:] if term.weights == "flat"), first)
        lost = self._tape(layer, _LOST)[0] if rule.loses else first
        _, second_dead = self._tape(layer, 1) if second is not first else (second, dead)
        is_pool = isinstance(layer, (g.Pool2d, g.GlobalAveragePool))
        _, height, width = self._graph.shapes[layer.name]
        down, across = self._window_counts(layer) if is_pool else [read_only(np.ones(size, np.float32)) for size in (height, width)]
        bias = _bias(layer) if isinstance(layer, (g.Conv2d, g.Dense)) else _zeros(self._graph.shapes[layer.name][0])
        assert rule.formula is not None
        self._step(
            self._kernels.ratios_forward, self.batch * self._graph.shapes[layer.name][0], x=x.use, ratio_pos=first, ratio_neg=second,
            ratio_bias=third, absorbed=lost, dead=dead, dead_neg=second_dead, bias=bias, count_h=down, count_w=across, x_channel=x.channel,
            formula=rule.formula, factor=_FACTORS[rule.formula](rule.rule), beta=rule.rule.beta, epsilon=rule.rule.epsilon,
            bias_mode=_BIASES[rule.rule.bias], x_min=clip[0], x_max=clip[1], relevance=relevance)

    def _emit_back(self, layer: Layer) -> None:
        kernels, batch = self._kernels, self.batch
        result, _ = self._result(layer)
        c, source = self._factor(result), layer.inputs[0]
        carries = source in self._relevance_carriers
        channels = self._graph.shapes[source][0]
        rule = self._rules.get(layer.name)
        absorbs = layer.name in self.ledger_layers
        column = self.ledger_layers.index(layer.name) if absorbs else 0
        if rule and rule.loses and not isinstance(layer, g.LocalResponseNorm):
            self._step(kernels.absorb_remainder_redistribute, batch, ledger=self.ledger, absorbed=self._tape(layer, _LOST)[0], c=c.use,
                       column=column, c_channel=c.channel)
        elif rule and absorbs and rule.formula in (None, codes.SIGNS):
            for part in range(len(rule.terms)):
                ratio, dead = self._tape(layer, part)
                self._conditions[len(self._steps)] = dead
                self._step(kernels.absorb_dead_redistribute, batch, ledger=self.ledger, ratio=ratio, c=c.use, dead=dead, column=column,
                           c_channel=c.channel)
        match layer:
            case g.MaxPool2d() if rule and not rule.terms:
                winner, _ = self._tape(layer)
                accumulate = self._accumulates(source)
                c_in = self._factor(source)
                self._step(kernels.max_pool2d_redistribute, batch * channels, c_in=c_in.use, c=c.use, winner=winner,
                           c_in_channel=c_in.channel, c_channel=c.channel, accumulate=accumulate, **self._geometry(layer))
            case g.LocalResponseNorm() if rule and rule.formula != codes.NORM_IDENTITY:
                ratio, _ = self._tape(layer)
                accumulate = self._accumulates(source)
                c_in, a = self._factor(source), self._activation(source)
                elements = kernels.normalize_taylor_elements(batch, self._graph.shapes[source])
                self._step(
                    kernels.normalize_taylor_redistribute, batch, c_in=c_in.use, ledger=self.ledger, c=c.use, ratio=ratio, a=a.use,
                    scratch=self._scratch_of("results", elements), column=column, c_in_channel=c_in.channel, c_channel=c.channel,
                    a_channel=a.channel, formula=rule.formula, epsilon=rule.rule.epsilon, accumulate=accumulate, **_normalisation(layer))
            case _ if rule and rule.terms:
                for part, term in enumerate(rule.terms):
                    for name in layer.inputs:
                        # Of several terms, all but the first add to what is there.
                        accumulate = self._accumulates(name) or part > 0
                        self._emit_term(layer, part, term, name, c, accumulate)
            case g.ReLU() | g.Clip() | g.LeakyReLU():
                accumulate = self._accumulates(source)
                c_in, a = self._factor(source), self._activation(source)
                self._step(
                    kernels.activate_redistribute, batch * channels, c_in=c_in.use, c=c.use, a=a.use, c_in_channel=c_in.channel,
                    c_channel=c.channel, a_channel=a.channel, channels=channels, relevance=carries and not self._derives,
                    derivative=self._derives, accumulate=accumulate, **_pointwise(layer))
            case g.Rearrange():
                accumulate = self._accumulates(source)
                c_in = self._factor(source)
                starts, readers = self._packed[layer.name]
                self._step(
                    kernels.rearrange_redistribute, batch, c_in=c_in.use, ledger=self.ledger, c=c.use, starts=starts, readers=readers,
                    column=column, c_in_channel=c_in.channel, c_channel=c.channel, relevance=carries and absorbs, accumulate=accumulate)
            case g.LocalResponseNorm() | g.Power():
                ratio, _ = self._tape(layer)
                accumulate = self._accumulates(source)
                c_in = self._factor(source)
                self._step(
                    kernels.normalize_redistribute, batch * channels, c_in=c_in.use, c=c.use, ratio=ratio, c_in_channel=c_in.channel,
                    c_channel=c.channel, relevance=carries and not self._derives, accumulate=accumulate)
            case g.Concat() | g.Flatten():
                for name, place in self._copied_inputs(layer):
                    self._copy(self._factors, name, 0, layer.name, place, name, self._accumulates(name))
                # Inputs that lie in the result's own memory have what was written there.

    def _direction(self, rule: Rule) -> tuple[Callable[..., None], Callable[..., None]]:
        try:
            kernels: tuple[Callable[..., None], Callable[..., None]] = self._kernels.direction_kernels(rule.direction, rule.asks_for_bounds)
        except TypeError as error:
            raise RuleError(f"the direction {rule.direction!r} cannot be compiled: {error}; required: a function of numbers that returns a "
                            "number, in Python that Numba can compile") from None
        return kernels

    def _observe(self, name: str, result: str) -> None:
        """Write down the relevance of a tensor, whose relevance that of `result` is, once all who read it have given it theirs."""
        x, c = self._activation(result), self._factor(result)
        self._step(self._kernels.relevance_redistribute, self.batch, out=self.observed[name], x=x.use, c=c.use, x_channel=x.channel,
                   c_channel=c.channel, relevance=result in self._relevance_carriers)

    def _emit_term(self, layer: Layer, part: int, term: Term, source: str, c: _Tensor, accumulate: bool) -> None:
        """What a layer's input `source` gets through one term of its rule."""
        kernels, batch = self._kernels, self.batch
        ratio, _ = self._tape(layer, part)
        c_in, a = self._factor(source), self._activation_for(term, source)
        carries, channels = source in self._relevance_carriers, self._graph.shapes[source][0]
        low, high = self._bounds(source)
        tensors = {"c_in": c_in.use, "c": c.use, "ratio": ratio, "a": a.use, "low": low, "high": high, "c_in_channel": c_in.channel,
                   "c_channel": c.channel, "a_channel": a.channel, "relevance": carries, "accumulate": accumulate}
        match layer:
            case _ if term.weights == "direction":
                self._step(self._direction(self._rules[layer.name].rule)[1], batch * channels, **tensors, **_as_convolution(layer))
            case g.Conv2d():
                self._emit_convolution_back(layer, self._packed[layer.name].back[part], source, tensors)
            case g.Dense():
                sums, shares = kernels.dense_redistribute_elements(batch, len(layer.weight))
                self._step(
                    kernels.dense_redistribute, -(-channels // kernels.DENSE_FEATURES), **tensors, weight=self._packed[layer.name].weight,
                    sums=self._scratch_of("results", sums), contributions=self._scratch_of("block", shares), features=term.features,
                    weights=_WEIGHTS[term.weights])
            case g.Add():
                self._step(kernels.add_redistribute, batch * channels, **tensors, features=term.features)
            case _:
                kernel, stride, padding, _ = self._window(layer)
                block, results = kernels.pool2d_redistribute_elements(kernel, stride, padding, self._graph.shapes[source][1:],
                                                                      self._graph.shapes[layer.name][1:])
                self._step(
                    kernels.pool2d_redistribute, batch * channels, **tensors, block=self._scratch_of("block", block),
                    results=self._scratch_of("results", results), features=term.features, **self._geometry(layer))

    def _emit_convolution(self, layer: g.Conv2d, packed: DirectForward | ImplicitForward | Winograd, bias: Array, x: _Tensor, ratio: _Use,
                          dead: Any, a: _Tensor, clip: tuple[float, float], carries: bool) -> None:
        kernels, (_, height, width) = self._kernels, self._graph.shapes[layer.name]
        common = {"dead": dead, "bias": bias, "x_channel": x.channel, "a_channel": a.channel, "relevance": carries}
        if isinstance(packed, Winograd):
            block, together, shares, units, scratch = self._winograd(packed, height, width)
            self._step(
                kernels.winograd2d_forward, units, x=x.use, ratio=ratio, a=a.use, weight=packed.source, packed=packed.weights,
                offsets=packed.offsets(block), channels=packed.channels, groups=packed.groups, pad_top=packed.padding[0],
                pad_left=packed.padding[1], block=block, panels_at_once=together, splits=shares, x_min=clip[0], x_max=clip[1], **scratch,
                **common)
            return
        common |= {"packed": packed.weights, "constant": packed.constant, "pattern": packed.pattern, "z_min": packed.least,
                   "features": packed.features, "channels": layer.weight.shape[1], "stride_h": layer.stride[0],
                   "stride_w": layer.stride[1], "x_min": clip[0], "x_max": clip[1]}
        if isinstance(packed, ImplicitForward):
            self._step(kernels.conv2d_forward, self.batch, x=x.use, ratio=ratio, a=a.use, taps=packed.taps, precision=packed.precision,
                       **common)
            return
        blocks, in_place = packed.blocks, packed.copies == 0
        units = packed.units(*((1, height * width) if in_place else (height, width)))
        shares = self._shares(units, packed.weights.shape[0] * packed.weights.shape[1])
        self._step(
            kernels.conv2d_forward, self.batch * units * shares, x=self._in_a_row(x.use, in_place), ratio=self._in_a_row(ratio, in_place),
            a=self._in_a_row(a.use, in_place), offsets=packed.offsets, bounds=packed.bounds,
            block=self._scratch_of("block", blocks.elements(packed.copies)),
            results=self._scratch_of("results", kernels.conv2d_results_elements(blocks.places())), splits=shares, **_cut(blocks),
            **common)

    def _emit_convolution_back(self, layer: g.Conv2d, packed: DirectBack | ImplicitBack | Winograd, source: str, tensors: dict[str, Any]
                               ) -> None:
        """tensors: what every kernel on the way back takes."""
        kernels, (channels, height, width) = self._kernels, self._graph.shapes[source]
        if isinstance(packed, Winograd):
            block, together, shares, units, scratch = self._winograd(packed, height, width)
            self._step(
                kernels.winograd2d_redistribute, units, **tensors, packed=packed.weights[0], offsets=packed.offsets(block),
                inputs=channels, groups=packed.groups, pad_top=packed.padding[0], pad_left=packed.padding[1], block=block,
                panels_at_once=together, splits=shares, **scratch)
            return
        common = {"packed": packed.weights, "phases": packed.phases, "features": packed.features, "groups": layer.groups,
                  "stride_h": layer.stride[0], "stride_w": layer.stride[1]}
        if isinstance(packed, ImplicitBack):
            self._step(kernels.conv2d_redistribute, self.batch, taps=packed.taps, panel_rows=packed.panel_rows, precision=packed.precision,
                       **tensors, **common)
            return
        if reads_in_place(layer):
            tensors = tensors | {name: self._in_a_row(tensors[name], True) for name in ("c_in", "c", "ratio", "a")}
        blocks = packed.blocks
        shares = self._shares(packed.units, packed.panels)
        self._step(
            kernels.conv2d_redistribute, self.batch * packed.units * shares, offsets=packed.offsets, bounds=packed.bounds,
            block=self._scratch_of("block", blocks.elements(packed.copies)),
            results=self._scratch_of("results", kernels.conv2d_redistribute_results_elements(blocks.places(), blocks.columns,
                                                                                             layer.stride[1])),
            splits=shares, **tensors, **common, **_cut(blocks))

    def _winograd(self, packed: Winograd, height: int, width: int) -> tuple[int, int, int, int, dict[str, _Scratch]]:
        """Tiles of a block, panels of a group, shares of a block, units, scratch."""
        kernels = self._kernels
        tiles, panels = self.batch * kernels.winograd2d_tiles(height, width), packed.weights.shape[-3]
        block, together = kernels.winograd2d_block(panels, packed.products, tiles)
        blocks = -(-tiles // block) * packed.groups
        shares = self._shares_of(blocks, panels)
        sizes = kernels.winograd2d_scratch(packed.channels, packed.products * together, block, width)
        scratch = {name: self._scratch_of(f"winograd {name}", size)
                   for name, size in zip(("lines", "points", "sums", "stage", "seen"), sizes, strict=True)}
        return block, min(together, panels), shares, blocks * shares, scratch

    def _activation_for(self, term: Term, name: str) -> _Tensor:
        """What the way back reads as the activation `name`: where the term does not look at it, c itself, so that its memory can go."""
        unread = term.features == codes.ONES or (term.features == codes.NONNEGATIVE and name not in self._relevance_carriers)
        return self._factor(name) if unread else self._activation(name)

    def _window(self, layer: Layer) -> tuple[Any, Any, Any, bool]:
        if isinstance(layer, g.GlobalAveragePool):
            size = self._graph.shapes[layer.inputs[0]][1:]
            return size, (1, 1), (0, 0, 0, 0), False
        assert isinstance(layer, g.Pool2d)
        return layer.kernel, layer.stride, layer.padding, isinstance(layer, g.AveragePool2d) and layer.count_include_pad

    def _geometry(self, layer: Layer) -> dict[str, int]:
        kernel, stride, padding, _ = self._window(layer)
        return {"kernel_h": kernel[0], "kernel_w": kernel[1], "stride_h": stride[0], "stride_w": stride[1],
                "pad_top": padding[0], "pad_left": padding[1]}

    def _windows(self, layer: Layer) -> dict[str, Any]:
        """How windows read blocks of their input, where those are copied; no planes where the one window holds the whole input."""
        if self._kernels.POOLING != "blocked":
            return {}
        kernel, _, padding, _ = self._window(layer)
        whole = kernel == self._graph.shapes[layer.inputs[0]][1:] and self._graph.shapes[layer.name][1:] == (1, 1) and not any(padding)
        if whole and self._rules[layer.name].terms:
            blocks, places = Blocks(read_only(np.zeros((0, 2), np.int64)), [], 1, 1, 0, 0), None
        else:
            assert isinstance(layer, g.Pool2d)
            blocks, places = window_blocks(layer, self._graph, self._kernels)
        return {"positions": places, "offsets": read_only(blocks.offsets(1)), "block": self._scratch_of("block", blocks.elements(1)),
                **_cut(blocks)}

    def _window_counts(self, layer: Layer) -> list[Array]:
        """How many numbers each window counts down, and how many across: their product is a mean's divisor. 1 for a maximum."""
        kernel, stride, padding, count_padding = self._window(layer)
        counts = []
        for axis in (0, 1):
            size, places = self._graph.shapes[layer.inputs[0]][1 + axis], self._graph.shapes[layer.name][1 + axis]
            begin = np.arange(places) * stride[axis] - padding[axis]
            end = np.minimum(begin + kernel[axis], size + (padding[2 + axis] if count_padding else 0))
            count = end - (begin if count_padding else np.maximum(begin, 0))
            counts.append(read_only((np.ones(places) if isinstance(layer, g.MaxPool2d) else count).astype(np.float32)))
        return counts

    def _shares(self, blocks: int, panels: int) -> int:
        """Into how many units each block of each image is cut, so that all workers have the same to do."""
        return self._shares_of(self.batch * blocks, panels)

    def _shares_of(self, blocks: int, panels: int) -> int:
        shares = 1
        while shares < panels and blocks * shares % self.workers and blocks * shares < 8 * self.workers:
            shares += 1
        return shares

    @staticmethod
    def _in_a_row(use: _Use, wanted: bool) -> _Use:
        """The same tensor, all places of a channel in one row, if that is wanted."""
        return _Use(use.buffer, (use.shape[0], 1, use.shape[1] * use.shape[2]), use.dtype) if wanted else use

    def _scratch_of(self, name: str, elements: int) -> _Scratch:
        self._scratch[name] = max(self._scratch.get(name, 0), elements)
        return _Scratch(name)

    def _copied_inputs(self, layer: Layer) -> list[tuple[str, int]]:
        """Inputs of a concatenation or flatten that do not lie in its memory already, with where in it they belong."""
        copied, place = [], 0
        root, offset, _ = self._roots[layer.name]
        for name in layer.inputs:
            if self._roots[name][:2] != (root, offset + place):
                copied.append((name, place))
            place += int(np.prod(self._graph.shapes[name]))
        return copied

    def _copy(self, buffers: dict[str, _Buffer], to: str, to_place: int, source: str, source_place: int, what: str, add: bool) -> None:
        """As many numbers as tensor `what` has, between places within two tensors."""
        ends = []
        for name, place in ((to, to_place), (source, source_place)):
            root, offset, elements = self._roots[name]
            ends.append((_Use(buffers.setdefault(root, _Buffer(elements)), (elements, 1, 1)), offset + place))
        (x, x_begin), (a, a_begin) = ends
        self._step(self._kernels.copy_forward, self.batch, x=x, a=a, x_begin=x_begin, a_begin=a_begin,
                   count=int(np.prod(self._graph.shapes[what])), accumulate=add)

    # -- Binding them

    def _bind_use(self, use: _Use) -> Any:
        flat = self._arena[use.buffer.offset:use.buffer.offset + use.buffer.elements * self.batch]
        return flat.view(use.dtype).reshape(self.batch, *use.shape)

    def _bind_tensor(self, item: tuple[_Tensor, Shape]) -> Array:
        tensor, shape = item
        bound: Array = self._bind_use(tensor.use)[:, tensor.channel:tensor.channel + shape[0]]
        return bound

    def _bind(self, worker: int) -> list[_Call]:
        scratch = {name: self._kernels.empty(elements) for name, elements in self._scratch.items()}
        calls = []
        for kernel, arguments, units in self._steps:
            bound: list[Any] = []
            for argument in arguments:
                match argument:
                    case _Use():
                        bound.append(self._bind_use(argument))
                    case _Scratch(name):
                        bound.append(scratch[name])
                    case _:
                        bound.append(argument)
            first, last = units * worker // self.workers, units * (worker + 1) // self.workers
            code, slots = self._kernels.bind(kernel, bound)
            calls.append(_Call(code, slots, bound, first, last))
        return calls

    # -- Making them

    def _run(self, steps: Iterable[int], submit: Callable[..., Any] | None) -> None:
        """Make the calls of these steps, each once all workers are done with the one before."""
        wanted = np.array([step for step in steps if step not in self._conditions or self._kernels.may_be_set(self._conditions[step])],
                          np.int64)
        counter = np.zeros(1, np.int64)

        def work(table: Any) -> None:
            progress = np.zeros(2, np.int64)
            try:
                while not self._kernels.run_steps(table, wanted, progress, counter, self.workers):
                    time.sleep(0)
            except BaseException:
                counter[0] = self._kernels.BROKEN  # nobody waits for who does not come
                raise

        others: list[Future[None]] = []
        try:
            if self.workers > 1:
                assert submit is not None
                others += (submit(work, table) for table in self._tables[1:])
            work(self._tables[0])
        except BaseException:
            counter[0] = self._kernels.BROKEN
            raise
        finally:
            wait(others)
        for other in others:
            other.result()


@dataclass(frozen=True)
class _Scratch:
    """A worker's own scratch memory, one array for all steps that name it."""

    name: str


@dataclass(frozen=True, eq=False)
class _Call:
    """A step of one worker, bound: what the kernels' `bind` made of it, its arguments, and which units it does."""

    code: Any
    slots: Any
    arguments: list[Any]
    first: int
    last: int


def _bias(layer: g.Conv2d | g.Dense) -> Array:
    return _zeros(len(layer.weight)) if layer.bias is None else read_only(layer.bias)


def _as_convolution(layer: Layer) -> dict[str, Any]:
    """What the kernels of a direction read of a convolution or of a dense layer, which is one of one pixel."""
    names = ("groups", "stride_h", "stride_w", "pad_top", "pad_left", "dilation_h", "dilation_w")
    if isinstance(layer, g.Dense):
        return {"weight": read_only(layer.weight[..., None, None]), **dict(zip(names, (1, 1, 1, 0, 0, 1, 1), strict=True))}
    assert isinstance(layer, g.Conv2d)
    numbers = layer.groups, *layer.stride, *layer.padding[:2], *layer.dilation
    return {"weight": read_only(layer.weight), **dict(zip(names, numbers, strict=True))}


def _zeros(count: int) -> Array:
    return read_only(np.zeros(count, np.float32))


def fusible_activations(graph: Graph) -> dict[str, g.ReLU | g.Clip]:
    """Layer's name -> the activation behind it, for each that alone reads a layer which can apply it itself."""
    by_name = {layer.name: layer for layer in graph}
    return {layer.inputs[0]: layer for layer in graph if isinstance(layer, (g.ReLU, g.Clip))
            and isinstance(by_name.get(layer.inputs[0]), (g.Conv2d, g.Dense, g.Add)) and len(graph.consumers(layer.inputs[0])) == 1}


def _normalisation(layer: g.LocalResponseNorm) -> dict[str, Any]:
    """How far its sums reach before and behind a number, whether within the channel, alpha of a sum, beta, bias."""
    summed = layer.size**2 if layer.within_channel else layer.size
    return {"before": (layer.size - 1) // 2, "after": layer.size // 2, "within_channel": layer.within_channel,
            "alpha": layer.alpha / summed, "beta": layer.beta, "bias": layer.bias}


def _clips_to(layer: g.ReLU | g.Clip | g.LeakyReLU) -> tuple[float, float]:
    match layer:
        case g.ReLU():
            return 0.0, math.inf
        case g.Clip():
            return layer.low, layer.high
    return -math.inf, math.inf


def _pointwise(layer: g.ReLU | g.Clip | g.LeakyReLU) -> dict[str, float]:
    least, most = _clips_to(layer)
    return {"slope": layer.slope if isinstance(layer, g.LeakyReLU) else 1.0, "x_min": least, "x_max": most}


def _cut(blocks: Blocks) -> dict[str, Any]:
    return {"planes": blocks.planes, "block_rows": blocks.rows, "block_columns": blocks.columns, "halo_rows": blocks.more_rows,
            "halo_columns": blocks.more_columns}


def _roots(graph: Graph) -> dict[str, tuple[str, int, int]]:
    """Where each tensor lies: (the tensor that owns the memory, offset in it, its size), in numbers for each image.

    A concatenation's inputs and a flatten's input lie in the result's memory, so that nothing is copied, unless they lie elsewhere already
    or their channels would not start at a whole channel of it.
    """
    size = {name: int(np.prod(shape)) for name, shape in graph.shapes.items()}
    inside: dict[str, tuple[str, int]] = {}

    def root_of(name: str) -> tuple[str, int]:
        offset = 0
        while name in inside:
            name, more = inside[name]
            offset += more
        return name, offset

    for layer in reversed(graph.layers):
        if not isinstance(layer, (g.Concat, g.Flatten)):
            continue
        offset = 0
        for name in layer.inputs:
            root, start = root_of(layer.name)
            below = [inner for inner in graph.shapes if root_of(inner)[0] == name]
            if name not in inside and root != name and all(
                    _whole_channels(graph.shapes[inner], start + offset + root_of(inner)[1], size[root]) for inner in below):
                inside[name] = (layer.name, offset)
            offset += size[name]
    return {name: (*root_of(name), size[root_of(name)[0]]) for name in graph.shapes}


def _whole_channels(shape: Shape, offset: int, elements: int) -> bool:
    places = shape[1] * shape[2]
    return offset % places == 0 and elements % places == 0
