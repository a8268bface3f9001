"""Single layers of awkward shapes, and how they are compared with the oracle: on every device."""

import naive
import numpy as np
import pytest

from fastdtd import graph as g
from fastdtd.explainer import Explainer
from fastdtd.model import Model, Preprocessing

RULES = [("zB", ""), ("w2", ""), ("flat", ""), ("z+", ""), ("z+", "relu"), ("z+", "real"), ("w2", "relu"),
         ("flat", "real")]


def weights(seed, *shape):
    rng = np.random.default_rng(seed)
    return (rng.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))).astype(np.float32)


def check(layer, shape, rule, hidden, count=2, tolerance=1e-5, **options):
    """`layer` alone, as the first one under `rule`, or after a convolution (and a ReLU where hidden == "relu"); options
    of Explainer."""
    layers, source = [], g.INPUT
    if hidden:
        layers = [g.Conv2d("before", (g.INPUT,), np.eye(shape[0])[:, :, None, None] - 0.1 / shape[0])]
        source = "before"
        if hidden == "relu":
            layers.append(g.ReLU("after", ("before",)))
            source = "after"
    layers.append(layer(source))
    tested = layers[-1].name
    layers += [g.ReLU("x", (tested,)), g.Flatten("flat", ("x",))]
    features = int(np.prod(layers[len(layers) - 3].output_shape([shape] * len(layers[-3].inputs))))
    layers.append(g.Dense("scores", ("flat",), np.abs(weights(5, 3, features)), None))
    graph = g.Graph(tuple(layers), shape, (-1.0, 2.0))
    explainer = Explainer(Model(graph, Preprocessing(None)), {tested: rule}, **{"threads": 1, **options})
    batch = np.random.default_rng(1).uniform(-1, 2, (count, *shape)).astype(np.float32)
    if shape[1] > 1:
        batch[:, :, :1] = 0  # dead units
    e = explainer(batch, 1)
    assert (e.explained > 0).all()
    for i in range(count):
        rules = {name: r.rule for name, r in explainer.rules.items()}
        relevance, scores, absorbed = naive.explain(graph, batch[i], 1, rules)
        np.testing.assert_allclose(e.output[i], scores, rtol=tolerance, atol=tolerance)
        assert np.linalg.norm(e.relevance[i] - relevance) <= tolerance * np.linalg.norm(relevance) + 1e-12
        assert e.ledger[tested][i] == pytest.approx(absorbed[tested], rel=10 * tolerance, abs=tolerance * scores[1])
    assert e.relevance.min() >= 0


CONVOLUTIONS = {  # (shape of the input), outputs, kernel, stride, padding, dilation, groups
    "several blocks of positions": ((2, 31, 29), 3, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 1),
    "several panels of outputs and inputs": ((19, 5, 6), 27, (3, 2), (1, 1), (1, 0, 0, 1), (1, 1), 1),
    "deep: one tile a block": ((80, 4, 13), 9, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 1),
    "pointwise": ((33, 7, 9), 17, (1, 1), (1, 1), (0, 0, 0, 0), (1, 1), 1),
    "one pixel": ((3, 1, 1), 4, (1, 1), (1, 1), (0, 0, 0, 0), (1, 1), 1),
    "one channel, one output": ((1, 12, 12), 1, (5, 5), (1, 1), (0, 0, 0, 0), (1, 1), 1),
    "as large as its input": ((3, 6, 5), 4, (6, 5), (1, 1), (0, 0, 0, 0), (1, 1), 1),
    "padding beyond the kernel": ((2, 3, 3), 3, (2, 2), (1, 1), (4, 3, 2, 5), (1, 1), 1),
    "stride over kernel": ((2, 11, 13), 5, (2, 2), (3, 4), (0, 0, 0, 0), (1, 1), 1),
    "stride over kernel, padded": ((2, 11, 13), 5, (1, 2), (2, 5), (1, 2, 0, 1), (1, 1), 1),
    "large stride": ((3, 23, 27), 6, (11, 11), (4, 4), (2, 2, 2, 2), (1, 1), 1),
    "stride and dilation": ((2, 17, 16), 4, (3, 3), (2, 3), (2, 1, 3, 2), (2, 2), 1),
    "dilation over stride": ((2, 19, 16), 4, (3, 2), (2, 2), (1, 1, 1, 1), (3, 5), 1),
    "groups": ((6, 9, 8), 9, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 3),
    "groups of many": ((20, 6, 6), 22, (3, 3), (2, 1), (1, 1, 1, 1), (1, 1), 2),
    "depthwise": ((7, 9, 9), 7, (3, 3), (2, 2), (1, 1, 1, 1), (1, 1), 7),
    "depthwise with a multiplier": ((4, 7, 7), 12, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 4),
    "Winograd's tiles, cut at the edge": ((9, 13, 15), 11, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 1),
    "Winograd's tiles, uneven padding": ((8, 9, 30), 17, (3, 3), (1, 1), (0, 2, 1, 0), (1, 1), 1),
    "Winograd's tiles, no padding": ((12, 21, 22), 8, (3, 3), (1, 1), (0, 0, 0, 0), (1, 1), 1),
    "Winograd's tiles, more padding than kernel": ((8, 9, 10), 9, (3, 3), (1, 1), (4, 3, 2, 5), (1, 1), 1),
    "Winograd's tiles, groups": ((16, 10, 11), 24, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 2),
    "Winograd's tiles, several blocks": ((8, 29, 31), 8, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 1),
    "channels by the sixteen": ((16, 5, 4), 40, (3, 2), (1, 2), (1, 0, 1, 1), (1, 1), 1),
    "channels by the sixteen, groups": ((32, 3, 4), 34, (2, 2), (1, 1), (1, 0, 1, 1), (1, 1), 2),
    "pointwise, strided, outputs by the sixteen": ((5, 5, 6), 16, (1, 1), (2, 2), (0, 0, 0, 0), (1, 1), 1),
    "one row": ((2, 1, 40), 3, (1, 5), (1, 2), (0, 2, 0, 2), (1, 1), 1),
    "one column": ((2, 40, 1), 3, (5, 1), (2, 1), (2, 0, 2, 0), (1, 1), 1),
}


def convolution(case):
    """One of CONVOLUTIONS, as a function of what it reads; the first output is active by its bias alone."""
    shape, outputs, kernel, stride, padding, dilation, groups = CONVOLUTIONS[case]
    w, bias = weights(0, outputs, shape[0] // groups, *kernel), 1 + 0.1 * weights(1, outputs, 1)[:, 0]
    w[0] = -np.abs(w[0])
    bias[0] = 3.0
    return lambda source: g.Conv2d("tested", (source,), w, bias, stride, padding, dilation, groups)


POOLS = {  # (shape), kernel, stride, padding, ceil mode
    "halves": ((3, 8, 6), (2, 2), (2, 2), (0, 0, 0, 0), False),
    "overlapping, ceil": ((2, 9, 12), (3, 3), (2, 2), (0, 0, 0, 0), True),
    "padded": ((2, 7, 5), (3, 2), (1, 2), (1, 0, 2, 1), False),
    "padded, ceil": ((2, 8, 9), (3, 3), (2, 3), (1, 2, 1, 0), True),
    "stride over kernel": ((2, 11, 10), (2, 1), (3, 4), (0, 0, 0, 0), False),
    "stride over kernel, ceil": ((2, 11, 10), (2, 1), (3, 4), (1, 0, 0, 0), True),
    "whole input": ((3, 4, 5), (4, 5), (1, 1), (0, 0, 0, 0), False),
    "one pixel": ((1, 1, 1), (1, 1), (1, 1), (0, 0, 0, 0), False),
    "several vectors": ((2, 7, 37), (3, 3), (1, 1), (1, 1, 1, 1), False),
    "several vectors, halves": ((2, 9, 71), (3, 2), (2, 2), (1, 1, 1, 0), False),
    "several vectors, thirds": ((2, 8, 83), (3, 5), (2, 3), (1, 2, 0, 1), True),
    "whole input, several vectors": ((2, 7, 11), (7, 11), (1, 1), (0, 0, 0, 0), False),
    "input within the kernel": ((2, 3, 4), (5, 6), (1, 1), (1, 1, 1, 1), False),
}


def check_winner(layer, shape, hidden, **options):
    """As check; the ledger of a layer that absorbs nothing has no line."""
    tested = layer(g.INPUT)
    relu = [g.ReLU("r", ("first",))] if hidden else []
    graph = g.Graph((g.Conv2d("first", (g.INPUT,), np.eye(shape[0])[:, :, None, None] - 0.1 / shape[0]), *relu,
                     layer("r" if hidden else "first"), g.Flatten("flat", ("tested",)),
                     g.Dense("scores", ("flat",), np.abs(weights(5, 3, int(np.prod(tested.output_shape([shape]))))),
                             [9, 9, 9])), shape)
    explainer = Explainer(Model(graph, Preprocessing(None)), **{"threads": 1, **options})
    batch = np.random.default_rng(1).uniform(-1, 2, (2, *shape)).astype(np.float32)
    e = explainer(batch, 1)
    for i in range(2):
        relevance, scores, _ = naive.explain(graph, batch[i], 1, {name: r.rule for name, r in explainer.rules.items()})
        np.testing.assert_allclose(e.output[i], scores, rtol=1e-5, atol=1e-5)
        assert np.linalg.norm(e.relevance[i] - relevance) <= 1e-5 * np.linalg.norm(relevance) + 1e-12
    assert "tested" not in e.ledger
