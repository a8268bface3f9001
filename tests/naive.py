"""The oracle: deep Taylor decomposition in plain NumPy, float64, written from the formulas and for reading, not for
speed.

Every layer that sums is one matrix W from all its inputs to all its outputs, so each rule is written once, as in the
papers:

    R_i = sum over j of  u_i V_ij / (sum over i' of u_i' V_i'j)  R_j

with the features u and weights V of docs/method.md. Of a row of W only the entries that exist are kept (an output of a
convolution reads few of its inputs). It works on relevance R itself, never on factors c = R / x, on one image at a
time. Nothing here is shared with the package but the layers' fields.
"""

import functools
import inspect
import math

import numpy as np

from fastdtd import graph as g

TIE = 1e-9  # equal values whose sums were rounded in another order are still equal: the first of them wins


# ---- Layers as matrices ----------------------------------------------------------------------------------------------


def matrix(layer, shapes):
    """(weights, sources), each (outputs, terms): what every output sums over, in the order of the inputs.

    sources: indices of the flat inputs, one after the other, or -1 where an output has less terms than others, with a
    weight of 0. A weight may be zero anywhere. Kept for the next image: layers are values.
    """
    return _matrix(layer, tuple(shapes))


@functools.lru_cache(maxsize=6)
def _matrix(layer, shapes):
    elements = int(np.prod(shapes[0]))
    match layer:
        case g.Dense():
            return layer.weight.astype(float), np.broadcast_to(np.arange(elements), layer.weight.shape)
        case g.Conv2d():
            return convolution_matrix(layer, shapes[0])
        case g.Add():
            return np.ones((elements, 2)), np.arange(2 * elements).reshape(2, elements).T
        case g.GlobalAveragePool():
            size = int(np.prod(shapes[0][1:]))
            return np.full((shapes[0][0], size), 1 / size), np.arange(elements).reshape(-1, size)
        case g.Pool2d():
            return window_matrix(layer, shapes[0])
        case g.Resize():
            both = np.multiply.outer(layer.rows.astype(float), layer.columns.astype(float)).transpose(0, 2, 1, 3)
            weights = np.kron(np.eye(shapes[0][0]), both.reshape(layer.rows.shape[0] * layer.columns.shape[0], -1))
            return weights, np.where(weights > 0, np.arange(elements), -1)
    raise TypeError(type(layer).__name__)


def norm_matrix(layer, a):
    """(weights, sources) of a group norm of a (C, H, W), its deviation held constant: a row for each output."""
    channels, positions = a.shape[0], a.shape[1] * a.shape[2]
    elements = np.arange(a.size).reshape(layer.groups, channels // layer.groups, positions)
    groups = elements.transpose(0, 2, 1).reshape(-1, channels // layer.groups) if layer.per_position else \
        elements.reshape(layer.groups, -1)
    weights, sources = np.zeros((a.size, groups.shape[1])), np.zeros((a.size, groups.shape[1]), int)
    for own in groups:
        values, scale = a.ravel()[own], layer.scale[own // positions].astype(float)
        part = 1 / len(own) if layer.centered else 0
        deviation = math.sqrt(((values - part * values.sum())**2).mean() + np.float32(layer.epsilon))
        weights[own] = scale[:, None] / deviation * (np.eye(len(own)) - part)
        sources[own] = own if layer.centered else np.where(np.eye(len(own)), own, -1)
    return weights, sources


def bias_of(layer, outputs):
    bias = getattr(layer, "shift" if isinstance(layer, g.GroupNorm) else "bias", None)
    return np.zeros(outputs) if bias is None else np.repeat(bias.astype(float), outputs // len(bias))


def convolution_matrix(layer, shape):
    _, height, width = shape
    outputs, per_group, kernel_h, kernel_w = layer.weight.shape
    _, out_height, out_width = layer.output_shape([shape])
    k, y, x, c, i, j = np.ogrid[:outputs, :out_height, :out_width, :per_group, :kernel_h, :kernel_w]
    channel = k // (outputs // layer.groups) * per_group + c
    row = y * layer.stride[0] + i * layer.dilation[0] - layer.padding[0]
    column = x * layer.stride[1] + j * layer.dilation[1] - layer.padding[1]
    inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
    sources = np.where(inside, (channel * height + row) * width + column, -1)
    weights = np.where(inside, layer.weight.astype(float)[:, None, None], 0)
    size = outputs * out_height * out_width
    return weights.reshape(size, -1), sources.reshape(size, -1)


def window_matrix(layer, shape):
    """Of an average; of a max-pool `sources` alone are of use."""
    channels, height, width = shape
    top, left, bottom, right = layer.padding
    _, out_height, out_width = layer.output_shape([shape])
    size = channels * out_height * out_width
    weights, sources = np.zeros((size, np.prod(layer.kernel))), np.full((size, np.prod(layer.kernel)), -1)
    for output, (c, y, x) in enumerate(np.ndindex(channels, out_height, out_width)):
        rows = [y * layer.stride[0] - top + i for i in range(layer.kernel[0])]
        columns = [x * layer.stride[1] - left + j for j in range(layer.kernel[1])]
        inside = [(i, j) for i in rows for j in columns if 0 <= i < height and 0 <= j < width]
        padded = [(i, j) for i in rows for j in columns if i < height + bottom and j < width + right]
        for term, (i, j) in enumerate(inside):
            weights[output, term] = 1 / len(padded if getattr(layer, "count_include_pad", False) else inside)
            sources[output, term] = (c * height + i) * width + j
    return weights, sources


def weights_of(layer, shapes, a):
    """`matrix`, of a layer whose weights may depend on its input a, flat."""
    return norm_matrix(layer, a.reshape(shapes[0])) if isinstance(layer, g.GroupNorm) else matrix(layer, shapes)


def read(values, sources, missing=0.0):
    """values (inputs,) of the terms of each output."""
    return np.where(sources >= 0, values[sources], missing)


def sum_by_source(terms, sources, count):
    """(inputs,): the sum of the terms that have each input as their source."""
    exists = sources >= 0
    return np.bincount(sources[exists], terms[exists], count)


# ---- Rules -----------------------------------------------------------------------------------------------------------


def contributions(rule, a, weights, connected, low, high, direction=None):
    """(outputs, terms): u V of each connection, or v w."""
    positive, negative = np.maximum(weights, 0), np.maximum(-weights, 0)
    match rule:
        case "z+":
            return positive * np.maximum(a, 0) + negative * np.maximum(-a, 0)
        case "zB":
            return positive * (a - low) + negative * (high - a)
        case "w2":
            return weights**2
        case "flat":
            return connected.astype(float)
        case "direction":
            every = np.broadcast_arrays(a, weights, *([] if low is None else [low, high]))
            return np.vectorize(
                direction, otypes=[float])(*every[:len(inspect.signature(direction).parameters)]) * weights * connected
    raise ValueError(rule)


def redistribute(terms, relevance):
    """Relevance of the terms, and what was absorbed because no term of an output contributes."""
    total = terms.sum(1)
    ratio = np.divide(relevance, total, out=np.zeros_like(relevance), where=total > 0)
    return terms * ratio[:, None], relevance[total <= 0].sum()


def stable(z, epsilon):
    """z, further from zero by epsilon; where it is zero then, nothing can be redistributed."""
    z = z + np.where(z >= 0, epsilon, -epsilon)
    return np.where(np.abs(z) > 1e-30, z, np.inf)


def total_of(terms):
    """(outputs,): the sum of the terms. What is left where they cancel, as in the norm of a constant, is rounding, and
    its sign says nothing.
    """
    total = terms.sum(1)
    return np.where(np.abs(total) <= 1e-12 * np.abs(terms).sum(1), 0, total)


def redistribute_signed(rule, terms, connected, bias, relevance):
    """The rules with parameters: relevance of the terms a W, with bias (outputs,)."""
    bias = np.zeros_like(bias) if rule.bias == "ignored" else bias
    terms_pos, terms_neg = np.maximum(terms, 0), np.minimum(terms, 0)
    bias_pos, bias_neg = np.maximum(bias, 0), np.minimum(bias, 0)

    def with_bias(terms, bias):
        """Numerators, and the sum of terms and a bias."""
        if rule.bias == "shared":
            terms = terms + connected * (bias / np.maximum(connected.sum(1), 1))[:, None]
            return terms, total_of(terms)
        return terms, total_of(terms) + bias

    def of(terms, z, relevance=relevance):
        return terms * (relevance / stable(z, rule.epsilon))[:, None]

    match rule.name:
        case "epsilon":
            return of(*with_bias(terms, bias))
        case "alpha-beta" | "z+":
            return rule.alpha * of(*with_bias(terms_pos, bias_pos)) - rule.beta * of(*with_bias(terms_neg, bias_neg))
        case "gamma":
            sign = np.sign(terms.sum(1) + bias)
            more = np.where(sign > 0, terms_pos.T, np.where(sign < 0, terms_neg.T, 0)).T
            more_bias = np.where(sign > 0, bias_pos, np.where(sign < 0, bias_neg, 0))
            return of(*with_bias(terms + rule.gamma * more, bias + rule.gamma * more_bias),
                      np.where(sign == 0, 0, relevance))
    raise ValueError(rule.name)


def negatives_contribute(graph, rules, name):
    """Whether negative values of a tensor can have relevance: what reads it redistributes some to them."""
    for layer in graph:
        rule = rules.get(layer.name)
        if name not in layer.inputs or is_held(graph, rules, layer.name):
            continue
        match layer:
            case g.Multiply() if rule.name == "hold" and name != layer.inputs[0]:
                continue  # held constant
            case g.Conv2d() | g.Dense() | g.GroupNorm() | g.Power():
                return True
            case g.Activation() if layer.function in ("sigmoid", "hard_sigmoid", "softplus"):
                return True
            case g.Softmax():
                return True
            case g.Multiply() if not all(graph.domains[source].nonnegative for source in layer.inputs):
                return True
            case g.ReLU() | g.Clip(low=0) | g.LeakyReLU(slope=0):
                continue
            case g.MaxPool2d() if rule.name == "proportional":
                continue
            case g.Add() | g.AveragePool2d() | g.GlobalAveragePool() | g.Resize():
                if rule.name not in ("z+", "alpha-beta"):
                    return True
        if negatives_contribute(graph, rules, layer.name):
            return True
    return False


def explains_negative(graph, rules, name):
    """Whether negative relevance of a tensor is decomposed: by the rules of layer-wise relevance propagation."""
    layer = next((layer for layer in graph if layer.name == name), None)
    if layer is None:
        return False
    rule = rules.get(name)
    if rule is None or rule.name in ("identity", "taylor", "winner", "hold", "half"):
        inputs = layer.inputs[:1] if rule is not None and rule.name == "hold" else layer.inputs
        return all(explains_negative(graph, rules, source) for source in inputs)
    return rule.name in ("epsilon", "gamma") or (rule.name in ("alpha-beta", "z+") and (
        rule.beta > 0 or rule.epsilon > 0 or rule.bias != "ignored" or rule.alpha != 1))


def is_held(graph, rules, name):
    """Whether a layer leads to nothing but gates that are held constant."""
    readers = [layer for layer in graph if name in layer.inputs]
    return bool(readers) and all(
        is_held(graph, rules, reader.name) or (isinstance(reader, g.Multiply) and name != reader.inputs[0]
                                               and rules[reader.name].name == "hold") for reader in readers)


# ---- Normalisation ---------------------------------------------------------------------------------------------------


def normalisation(layer, a):
    """What local response normalisation divides each value of a (C, H, W) by, flat."""
    before, after = (layer.size - 1) // 2, layer.size // 2

    def around(position):
        return slice(max(position - before, 0), position + after + 1)

    if layer.within_channel:
        sums = np.array([(a[c, around(y), around(x)]**2).sum() / layer.size**2 for c, y, x in np.ndindex(a.shape)])
    else:
        sums = np.array([(a[around(c), y, x]**2).sum() / layer.size for c, y, x in np.ndindex(a.shape)])
    return (layer.bias + layer.alpha * sums)**layer.beta


def taylor_of_normalisation(layer, a, relevance, epsilon):
    """Binder et al., arXiv:1604.00825: each output expanded around the input that has its own value alone."""
    flat, size = a.ravel(), layer.size**2 if layer.within_channel else layer.size
    if layer.beta and layer.alpha:
        sums = (normalisation(layer, a)**(1 / layer.beta) - layer.bias) / layer.alpha
    else:
        sums = np.zeros(flat.size)
    alpha, backward = layer.alpha / size, np.zeros_like(flat)
    positions = np.array(list(np.ndindex(a.shape)))
    before, after = (layer.size - 1) // 2, layer.size // 2
    for k, position in enumerate(positions):
        steps = positions - position
        along, across = (steps[:, 1:], steps[:, :1]) if layer.within_channel else (steps[:, :1], steps[:, 1:])
        near = ((-before <= along) & (along <= after)).all(1) & (across == 0).all(1)
        derivatives = -2 * alpha * layer.beta * flat[k] * flat**2 / (layer.bias
                                                                     + layer.alpha * sums[k])**(layer.beta + 1)
        terms = np.where(near, derivatives, 0.0)
        terms[k] = flat[k] / (layer.bias + alpha * flat[k]**2)**layer.beta
        backward += terms * relevance[k] / stable(terms.sum(), epsilon)
    return backward


# ---- Activations -----------------------------------------------------------------------------------------------------


def activation(layer, y):
    """By the textbook."""
    alpha, beta = layer.alpha, layer.beta
    with np.errstate(over="ignore"):
        sigmoid, softplus = 1 / (1 + np.exp(-y)), np.log1p(np.exp(-np.abs(y))) + np.maximum(y, 0)
        match layer.function:
            case "silu":
                return y / (1 + np.exp(-alpha * y))
            case "hard_swish":
                return y * np.clip(alpha * y + beta, 0, 1)
            case "hard_sigmoid":
                return np.clip(alpha * y + beta, 0, 1)
            case "gelu":
                return y * np.array([math.erfc(-value / math.sqrt(2)) / 2 for value in y])
            case "gelu_tanh":
                return y / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y**3)))
            case "mish":
                return y * np.tanh(softplus)
            case "elu":
                return beta * np.where(y > 0, y, alpha * np.expm1(np.minimum(y, 0)))
            case "tanh":
                return np.tanh(y)
            case "sigmoid":
                return sigmoid
            case "softplus":
                return softplus
    raise ValueError(layer.function)


def gate_index(shapes):
    """(elements,): which value of the gate, flat, multiplies each element of a product."""
    return np.broadcast_to(np.arange(np.prod(shapes[1])).reshape(shapes[1]), shapes[0]).ravel()


# ---- Networks --------------------------------------------------------------------------------------------------------


def forward(graph, image):
    """Every tensor, flat, by name."""
    tensors = {g.INPUT: np.asarray(image, float).ravel()}
    for layer in graph:
        inputs = [tensors[name] for name in layer.inputs]
        shapes = [graph.shapes[name] for name in layer.inputs]
        match layer:
            case g.ReLU():
                value = np.maximum(inputs[0], 0)
            case g.Clip():
                value = np.minimum(np.maximum(inputs[0], layer.low), layer.high)
            case g.LeakyReLU():
                value = np.where(inputs[0] > 0, inputs[0], layer.slope * inputs[0])
            case g.Power():
                value = np.abs(inputs[0])**layer.exponent
            case g.Activation():
                value = activation(layer, inputs[0])
            case g.Softmax():
                e = np.exp(inputs[0] - inputs[0].max()).reshape(shapes[0])
                value = (e / e.sum(0)).ravel()
            case g.Multiply():
                value = inputs[0] * inputs[1][gate_index(shapes)]
            case g.Rearrange():
                value = read(inputs[0], layer.index.ravel())
            case g.LocalResponseNorm():
                value = inputs[0] / normalisation(layer, inputs[0].reshape(shapes[0]))
            case g.Concat():
                value = np.concatenate(inputs)
            case g.Flatten():
                value = inputs[0]
            case g.MaxPool2d():
                _, sources = matrix(layer, shapes)
                value = read(inputs[0], sources, -np.inf).max(1)
            case _:
                weights, sources = weights_of(layer, shapes, inputs[0])
                value = (weights * read(np.concatenate(inputs), sources)).sum(1) + bias_of(layer, len(weights))
        tensors[layer.name] = value
    return tensors


def explain(graph, image, target, rules, start=None):
    """(relevance (C, H, W), scores (K,), absorbed by layer) of one image, as `relevances`."""
    relevance, scores, absorbed = relevances(graph, image, target, rules, start)
    return relevance[g.INPUT].reshape(graph.input_shape), scores, absorbed


def relevances(graph, image, target, rules, start=None, through=()):
    """(relevance by tensor, flat, scores (K,), absorbed by layer) of one image; rules: by layer, fastdtd.rules.Rule.

    start (K,): relevance of the outputs, instead of the target's score. through: (layer, channels) where relevance ends
    in all other channels; what ends there is absorbed by "through LAYER".
    """
    tensors = forward(graph, image)
    relevance = {name: np.zeros_like(value) for name, value in tensors.items()}
    if start is None:
        score = tensors[graph.output][target]
        relevance[graph.output][target] = score if explains_negative(graph, rules, graph.output) else max(score, 0)
    else:
        relevance[graph.output][:] = start
    absorbed = {}
    for layer in reversed(graph.layers):
        r, a = relevance[layer.name], np.concatenate([tensors[name] for name in layer.inputs])
        rule, shapes = rules.get(layer.name), [graph.shapes[name] for name in layer.inputs]
        for name, channels in through:
            if name == layer.name:
                others = np.delete(np.arange(r.size).reshape(graph.shapes[name]), channels, 0).ravel()
                absorbed[f"through {name}"] = r[others].sum()
                r[others] = 0
        if not r.any() and is_held(graph, rules, layer.name):
            continue
        if isinstance(layer, g.Rearrange):
            index = layer.index.ravel()
            backward = sum_by_source(r, index, len(a))
            if index.min() < 0:
                absorbed[layer.name] = r[index < 0].sum()
        elif isinstance(layer, g.LocalResponseNorm) and rule.name == "taylor":
            backward = taylor_of_normalisation(layer, a.reshape(shapes[0]), r, rule.epsilon)
            absorbed[layer.name] = r.sum() - backward.sum()
        elif isinstance(layer, g.Multiply):
            share = {"hold": 1.0, "half": 0.5}[rule.name]
            to_gate = np.bincount(gate_index(shapes), (1 - share) * r, np.prod(shapes[1]))
            backward = np.concatenate([share * r, to_gate])
        elif rule is None or rule.name == "identity":  # activations, softmax, normalisation, concatenation
            backward = r
        elif rule.name == "winner":
            _, sources = matrix(layer, shapes)
            candidates = read(a, sources, -np.inf)
            winners = (candidates >= candidates.max(1, keepdims=True) - TIE).argmax(1)
            backward = sum_by_source(r, sources[np.arange(len(r)), winners], len(a))
        else:
            backward, lost = by_rule(graph, rules, layer, tensors, r, a)
            absorbed[layer.name] = lost
        first = 0
        for name in layer.inputs:
            size = len(tensors[name])
            relevance[name] += backward[first:first + size]
            first += size
    return relevance, tensors[graph.output], absorbed


def has_ties(graph, image):
    """Whether the values of a norm's group are equal, but for rounding: of the sums of what they contribute, which some
    rules ask the sign of, rounding is all that is left."""
    tensors = forward(graph, image)
    for layer in graph:
        if isinstance(layer, g.GroupNorm):
            shape = graph.shapes[layer.name]
            size = shape[0] // layer.groups * (1 if layer.per_position else shape[1] * shape[2])
            y = tensors[layer.name].reshape(shape) - layer.shift[:, None, None]
            is_small = np.abs(y) < 1e-5 * np.abs(layer.scale)[:, None, None]
            if size > 1 and (is_small.ravel() & (tensors[layer.inputs[0]] != 0)).any():
                return True
    return False


def contrast(graph, image, target, against, rules):
    """(relevance (C, H, W), absorbed by layer) of the target less that of what it is held against: outputs, "others"
    or "softmax-gradient"; each decomposed by itself.
    """
    scores = forward(graph, image)[graph.output]
    own = scores if explains_negative(graph, rules, graph.output) else np.maximum(scores, 0)
    starts = np.zeros((2, len(scores)))  # of the target, and of the others
    others = [k for k in range(len(scores)) if k != target and scores[k] != 0]
    match against:
        case "others":
            starts[0, target] = own[target]
            starts[1, others] = own[target] / max(len(others), 1)
        case "softmax-gradient":
            y = np.exp(scores - scores.max()) / np.exp(scores - scores.max()).sum()
            starts[0, target] = y[target] * y[others].sum()  # all but the target's, if no score is zero
            starts[1, others] = y[target] * y[others]
        case _:
            starts[0, target] = own[target]
            for k in against:
                starts[1, k] += own[k] / len(against)
    one, other = (explain(graph, image, target, rules, start) for start in starts)
    return one[0] - other[0], {name: lost - other[2][name] for name, lost in one[2].items()}


def by_rule(graph, rules, layer, tensors, r, a):
    """(relevance of the inputs a, what was absorbed) of a layer that sums, with relevance r."""
    rule, kind = rules[layer.name], rules[layer.name].name
    weights, sources = weights_of(layer, [graph.shapes[name] for name in layer.inputs], a)
    connected, terms = sources >= 0, read(a, sources)
    bounded = all(graph.domains[name].low is not None for name in layer.inputs)
    if kind == "proportional":
        kind, weights = "zB" if bounded else "z+", connected.astype(float)
    low = high = None
    if bounded:
        low, high = (read(np.concatenate([
            np.repeat(getattr(graph.domains[name], side).astype(float), np.prod(graph.shapes[name][1:]))
            for name in layer.inputs
        ]), sources) for side in ("low", "high"))
    if kind == "direction":
        each = contributions(kind, terms, weights, connected, low, high, rule.direction)
        backward = each * (r / stable(each.sum(1), 0))[:, None]
        lost = None
    elif kind in ("epsilon", "gamma", "alpha-beta") or (rule.epsilon or rule.bias != "ignored"):
        backward = redistribute_signed(rule, weights * terms, connected, bias_of(layer, len(r)), r)
        lost = None
    else:
        each = contributions(kind, terms, weights, connected, low, high)
        if rule.name == "z+" and negatives_contribute(graph, rules, layer.name):
            # A negative output is a neuron of weights -W that reads the same.
            turned = contributions(kind, terms, -weights, connected, low, high)
            each = np.where(tensors[layer.name][:, None] < 0, turned, each)
        backward, lost = redistribute(each, r)
    backward = sum_by_source(backward, sources, len(a))
    return backward, r.sum() - backward.sum() if lost is None else lost
