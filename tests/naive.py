"""The oracle: deep Taylor decomposition in plain NumPy, float64, written from the formulas and for reading, not for
speed.

Every layer that sums is one dense matrix W from all its inputs to all its outputs, so each rule is written once, as in
the papers:

    R_i = sum over j of  u_i V_ij / (sum over i' of u_i' V_i'j)  R_j

with the features u and weights V of docs/method.md. It works on relevance R itself, never on factors c = R / x, on one
picture at a time. Nothing here is shared with the package but the layers' fields.
"""

import functools
import inspect

import numpy as np

from fastdtd import graph as g

TIE = 1e-9  # equal numbers whose sums were rounded in another order are still equal: the first of them wins


def matrix(layer, shapes):
    """(weights, connected), each (outputs, inputs): the layer as one matrix, and which entries exist (a weight may be
    zero). Kept for the next image: layers are values.
    """
    return _matrix(layer, tuple(shapes))


@functools.lru_cache(maxsize=6)
def _matrix(layer, shapes):
    match layer:
        case g.Dense():
            return layer.weight.astype(float), np.ones(layer.weight.shape)
        case g.Conv2d():
            return convolution_matrix(layer, shapes[0])
        case g.Add():
            eye = np.eye(int(np.prod(shapes[0])))
            return np.hstack([eye, eye]), np.hstack([eye, eye])
        case g.GlobalAveragePool():
            channels, height, width = shapes[0]
            connected = np.kron(np.eye(channels), np.ones((1, height * width)))
            return connected / (height * width), connected
        case g.Pool2d():
            return window_matrix(layer, shapes[0])
    raise TypeError(type(layer).__name__)


def convolution_matrix(layer, shape):
    channels, height, width = shape
    outputs, per_group, rows, columns = layer.weight.shape
    _, out_height, out_width = layer.output_shape([shape])
    weights = np.zeros((outputs, out_height, out_width, channels, height, width))
    connected = np.zeros(weights.shape)
    k, c = np.arange(outputs)[:, None, None], np.arange(per_group)[None, :, None]
    source = k // (outputs // layer.groups) * per_group + c  # channel of the input
    for i, j in np.ndindex(rows, columns):
        y, x = (axis.ravel() for axis in np.indices((out_height, out_width)))
        down = y * layer.stride[0] + i * layer.dilation[0] - layer.padding[0]
        right = x * layer.stride[1] + j * layer.dilation[1] - layer.padding[1]
        inside = (down >= 0) & (down < height) & (right >= 0) & (right < width)
        where = k, y[inside], x[inside], source, down[inside], right[inside]
        weights[where] = layer.weight[:, :, i, j, None]
        connected[where] = 1
    size = outputs * out_height * out_width
    return weights.reshape(size, -1), connected.reshape(size, -1)


def window_matrix(layer, shape):
    """Of an average; of a max-pool `connected` alone is of use."""
    channels, height, width = shape
    top, left, bottom, right = layer.padding
    _, out_height, out_width = layer.output_shape([shape])
    weights = np.zeros((channels, out_height, out_width, channels, height, width))
    connected = np.zeros(weights.shape)
    for c, y, x in np.ndindex(channels, out_height, out_width):
        rows = [y * layer.stride[0] - top + i for i in range(layer.kernel[0])]
        columns = [x * layer.stride[1] - left + j for j in range(layer.kernel[1])]
        inside = [(i, j) for i in rows for j in columns if 0 <= i < height and 0 <= j < width]
        padded = [(i, j) for i in rows for j in columns if i < height + bottom and j < width + right]
        for i, j in inside:
            weights[c, y, x, c, i, j] = 1 / len(padded if getattr(layer, "count_include_pad", False) else inside)
            connected[c, y, x, c, i, j] = 1
    size = channels * out_height * out_width
    return weights.reshape(size, -1), connected.reshape(size, -1)


def shares(rule, a, weights, connected, low, high, direction=None):
    """(outputs, inputs): u V of each connection, or v w."""
    positive, negative = np.maximum(weights, 0), np.maximum(-weights, 0)
    match rule:
        case "z+":
            return positive * np.maximum(a, 0) + negative * np.maximum(-a, 0)
        case "zB":
            return positive * (a - low) + negative * (high - a)
        case "w2":
            return weights**2
        case "flat":
            return connected
        case "direction":
            every = np.broadcast_arrays(a, weights, *([] if low is None else [low, high]))
            return np.vectorize(
                direction, otypes=[float])(*every[:len(inspect.signature(direction).parameters)]) * weights * connected
    raise ValueError(rule)


def redistribute(share, relevance):
    """Relevance of the inputs, and what was absorbed because no connection has a share."""
    total = share.sum(1)
    ratio = np.divide(relevance, total, out=np.zeros_like(relevance), where=total > 0)
    return share.T @ ratio, relevance[total <= 0].sum()


def stable(z, epsilon):
    """z, further from zero by epsilon; where it is zero then, nothing can be shared."""
    z = z + np.where(z >= 0, epsilon, -epsilon)
    return np.where(np.abs(z) > 1e-30, z, np.inf)


def redistribute_signed(rule, contributions, connected, bias, relevance):
    """The rules with parameters: relevance of the inputs, from contributions (outputs, inputs) a W and bias (outputs,).
    """
    bias = np.zeros_like(bias) if rule.bias == "ignored" else bias
    speaks_for, against = np.maximum(contributions, 0), np.minimum(contributions, 0)
    bias_for, bias_against = np.maximum(bias, 0), np.minimum(bias, 0)

    def part(numbers, of_bias):
        """Shares of numbers (outputs, inputs) and a bias in their sum."""
        if rule.bias == "shared":
            numbers = numbers + connected * (of_bias / np.maximum(connected.sum(1), 1))[:, None]
            return numbers, numbers.sum(1)
        return numbers, numbers.sum(1) + of_bias

    match rule.name:
        case "epsilon":
            numbers, z = part(contributions, bias)
            return numbers.T @ (relevance / stable(z, rule.epsilon))
        case "alpha-beta" | "z+":
            (numbers, z), (other, other_z) = part(speaks_for, bias_for), part(against, bias_against)
            return (rule.alpha * (numbers.T @ (relevance / stable(z, rule.epsilon)))
                    - rule.beta * (other.T @ (relevance / stable(other_z, rule.epsilon))))
        case "gamma":
            sign = np.sign(contributions.sum(1) + bias)
            more = np.where(sign > 0, speaks_for.T, np.where(sign < 0, against.T, 0)).T
            more_bias = np.where(sign > 0, bias_for, np.where(sign < 0, bias_against, 0))
            numbers, z = part(contributions + rule.gamma * more, bias + rule.gamma * more_bias)
            return numbers.T @ (np.where(sign == 0, 0, relevance) / stable(z, rule.epsilon))
    raise ValueError(rule.name)


def negatives_speak(graph, rules, name):
    """Whether negative numbers of a tensor can have relevance: what reads it gives some to them."""
    for layer in graph:
        rule = rules.get(layer.name)
        if name not in layer.inputs:
            continue
        match layer:
            case g.Conv2d() | g.Dense() | g.Power():
                return True
            case g.ReLU() | g.Clip(low=0) | g.LeakyReLU(slope=0):
                continue
            case g.MaxPool2d() if rule.name == "proportional":
                continue
            case g.Add() | g.AveragePool2d() | g.GlobalAveragePool() if rule.name not in ("z+", "alpha-beta"):
                return True
        if negatives_speak(graph, rules, layer.name):
            return True
    return False


def normalisation(layer, a):
    """What local response normalisation divides each number of a (C, H, W) by, flat."""
    before, behind = (layer.size - 1) // 2, layer.size // 2

    def around(place):
        return slice(max(place - before, 0), place + behind + 1)

    if layer.within_channel:
        sums = np.array([(a[c, around(y), around(x)]**2).sum() / layer.size**2 for c, y, x in np.ndindex(a.shape)])
    else:
        sums = np.array([(a[around(c), y, x]**2).sum() / layer.size for c, y, x in np.ndindex(a.shape)])
    return (layer.bias + layer.alpha * sums)**layer.beta


def rearrangement(layer, inputs):
    """(outputs, inputs): one where a number comes from."""
    return (layer.index.reshape(-1, 1) == np.arange(inputs)).astype(float)


def forward(graph, picture):
    """Every tensor, flat, by name."""
    tensors = {g.INPUT: np.asarray(picture, float).ravel()}
    for layer in graph:
        inputs = [tensors[name] for name in layer.inputs]
        match layer:
            case g.ReLU():
                value = np.maximum(inputs[0], 0)
            case g.Clip():
                value = np.minimum(np.maximum(inputs[0], layer.low), layer.high)
            case g.LeakyReLU():
                value = np.where(inputs[0] > 0, inputs[0], layer.slope * inputs[0])
            case g.Power():
                value = np.abs(inputs[0])**layer.exponent
            case g.Rearrange():
                value = rearrangement(layer, len(inputs[0])) @ inputs[0]
            case g.LocalResponseNorm():
                value = inputs[0] / normalisation(layer, inputs[0].reshape(graph.shapes[layer.inputs[0]]))
            case g.Concat():
                value = np.concatenate(inputs)
            case g.Flatten():
                value = inputs[0]
            case g.MaxPool2d():
                _, connected = matrix(layer, [graph.shapes[name] for name in layer.inputs])
                value = np.where(connected > 0, inputs[0], -np.inf).max(1)
            case _:
                weights, _ = matrix(layer, [graph.shapes[name] for name in layer.inputs])
                value = weights @ np.concatenate(inputs)
                if getattr(layer, "bias", None) is not None:
                    value = value + np.repeat(layer.bias.astype(float), len(value) // len(layer.bias))
        tensors[layer.name] = value
    return tensors


def taylor_of_normalisation(layer, a, relevance, epsilon):
    """Binder et al., arXiv:1604.00825: each output expanded around the input that has its own number alone."""
    flat, size = a.ravel(), layer.size**2 if layer.within_channel else layer.size
    sums = (normalisation(layer, a)**(1 / layer.beta)
            - layer.bias) / layer.alpha if layer.beta and layer.alpha else np.zeros(flat.size)
    alpha, back = layer.alpha / size, np.zeros_like(flat)
    places = list(np.ndindex(a.shape))
    before, behind = (layer.size - 1) // 2, layer.size // 2
    for k, place in enumerate(places):
        terms = np.zeros_like(flat)
        for i, other in enumerate(places):
            steps = [q - p for p, q in zip(place, other, strict=True)]
            near = all(-before <= step <= behind for step in (steps[1:] if layer.within_channel else steps[:1]))
            if near and not any(steps[:1] if layer.within_channel else steps[1:]) and i != k:
                terms[i] = -2 * alpha * layer.beta * flat[k] * flat[i]**2 / (layer.bias
                                                                             + layer.alpha * sums[k])**(layer.beta + 1)
        terms[k] = flat[k] / (layer.bias + alpha * flat[k]**2)**layer.beta
        back += terms * relevance[k] / stable(terms.sum(), epsilon)
    return back


def explain(graph, picture, target, rules, start=None):
    """(relevance (C, H, W), scores (K,), absorbed by layer) of one picture, as `relevances`."""
    relevance, scores, absorbed = relevances(graph, picture, target, rules, start)
    return relevance[g.INPUT].reshape(graph.input_shape), scores, absorbed


def relevances(graph, picture, target, rules, start=None):
    """(relevance by tensor, flat, scores (K,), absorbed by layer) of one picture; rules: by layer, fastdtd.rules.Rule.

    start (K,): relevance of the outputs, instead of the target's score.
    """
    tensors = forward(graph, picture)
    relevance = {name: np.zeros_like(value) for name, value in tensors.items()}
    if start is None:
        relevance[graph.output][target] = max(tensors[graph.output][target], 0)
    else:
        relevance[graph.output][:] = start
    absorbed = {}
    for layer in reversed(graph.layers):
        r, a = relevance[layer.name], np.concatenate([tensors[name] for name in layer.inputs])
        rule = rules.get(layer.name)
        if isinstance(layer, g.Rearrange):
            back = rearrangement(layer, len(a)).T @ r
            if layer.index.min() < 0:
                absorbed[layer.name] = r[layer.index.ravel() < 0].sum()
        elif isinstance(layer, g.LocalResponseNorm) and rule.name == "taylor":
            back = taylor_of_normalisation(layer, a.reshape(graph.shapes[layer.inputs[0]]), r, rule.epsilon)
            absorbed[layer.name] = r.sum() - back.sum()
        elif rule is None or rule.name == "identity":  # activations, normalisation, concatenation, flatten
            back = r
        elif rule.name == "winner":
            _, connected = matrix(layer, [graph.shapes[name] for name in layer.inputs])
            candidates = np.where(connected > 0, a, -np.inf)
            winners = (candidates >= candidates.max(1, keepdims=True) - TIE).argmax(1)
            back = np.zeros_like(a)
            np.add.at(back, winners, r)
        else:
            weights, connected = matrix(layer, [graph.shapes[name] for name in layer.inputs])
            domains = [graph.domains[name] for name in layer.inputs]
            bounded, kind = all(d.low is not None for d in domains), rule.name
            if kind == "proportional":
                kind, weights = "zB" if bounded else "z+", connected
            low = high = None
            if bounded:
                low, high = (np.concatenate([
                    np.repeat(getattr(graph.domains[name], side).astype(float), np.prod(graph.shapes[name][1:]))
                    for name in layer.inputs
                ]) for side in ("low", "high"))
            if kind == "direction":
                share = shares(kind, a, weights, connected, low, high, rule.direction)
                back = share.T @ (r / stable(share.sum(1), 0))
                absorbed[layer.name] = r.sum() - back.sum()
            elif kind in ("epsilon", "gamma", "alpha-beta") or (rule.epsilon or rule.bias != "ignored"):
                bias = np.zeros(len(r))
                if getattr(layer, "bias", None) is not None:
                    bias = np.repeat(layer.bias.astype(float), len(r) // len(layer.bias))
                back = redistribute_signed(rule, weights * a, connected, bias, r)
                absorbed[layer.name] = r.sum() - back.sum()
            else:
                share = shares(kind, a, weights, connected, low, high)
                if rule.name == "z+" and negatives_speak(graph, rules, layer.name):
                    # A negative output is a neuron of weights -W that reads the same.
                    share = np.where(tensors[layer.name][:, None] < 0, shares(kind, a, -weights, connected, low, high),
                                     share)
                back, absorbed[layer.name] = redistribute(share, r)
        at = 0
        for name in layer.inputs:
            size = len(tensors[name])
            relevance[name] += back[at:at + size]
            at += size
    return relevance, tensors[graph.output], absorbed
