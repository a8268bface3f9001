"""The table of layers: of every kind awkward examples, rules, and how a random one is drawn.

The oracle, random graphs, model files and the kernels of every device are tested with it, so that a new layer is one
entry here and a case in naive.py (test_layers.py sees to it that none is forgotten).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from fastdtd.kernels import cpu

from fastdtd import graph as g
from fastdtd.errors import ModelError

BOX, NON_NEGATIVE, REAL = "box", "non-negative", "real"  # what is known of a layer's input, as fastdtd.graph.Domain
DOMAINS = (BOX, NON_NEGATIVE, REAL)
PLAIN = "alpha-beta(alpha=1, beta=0, epsilon=0, bias=ignored)"  # z+ whatever the sign of the output


@dataclass(frozen=True)
class Example:
    """A layer, and the shape of the tensors that it reads."""

    shape: tuple[int, int, int]
    make: Callable[..., g.Layer]  # of its name and the names of what it reads
    inputs: int = 1
    second: tuple[int, int, int] | None = None  # shape of the second, where it is another
    on_gpu: str = "short"  # how long the simulator of GPUs takes for it: "short", "long", or "" for far too long
    tensor_cores: tuple[tuple[str, str, str], ...] = ()  # (precision, rule, domain): how it is simulated with these

    @property
    def shapes(self):
        return [self.shape] * self.inputs if self.second is None else [self.shape, self.second]


@dataclass(frozen=True)
class Entry:
    """A kind of layer. The first of its examples takes a simulator little time."""

    examples: dict[str, Example]
    rules: tuple[tuple[str, str], ...] = ()  # (rule, domain) that each example is tested with; "" where it has no rule
    signed: tuple[str, ...] = ()  # rules that can make negative relevance, tested with one example,
    typical: str = ""  # this one
    draw: Callable | None = None  # adds a random layer of some name to a graphs.Sketch
    often: int = 1  # compared with others
    runs: tuple[tuple[int, int], ...] = ((1, 2),)  # (threads, images at a time) on the processor
    in_peers: bool = True  # whether other packages have it, so that it is drawn in graphs that are like theirs
    canonized: bool = False  # whether no canonical graph has it: then it has no rules, and is never drawn

    @property
    def short(self):
        """The name of the first example."""
        return next(iter(self.examples))

    def drawn_rules(self, signed):
        """What random graphs' rules are drawn from."""
        found = dict.fromkeys(rule for rule, _ in self.rules if rule and rule != "zB")  # which needs bounds
        return [*found, *(self.signed if signed else ())]


def weights(seed, *shape):
    rng = np.random.default_rng(seed)
    return (rng.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))).astype(np.float32)


def with_a_dead_unit(*shape):
    """Weights and bias; the first output is active by its bias alone."""
    w, bias = weights(0, *shape), 1 + 0.1 * weights(1, shape[0], 1)[:, 0]
    w[0], bias[0] = -np.abs(w[0]), 3.0
    return w, bias


def random_weights(rng, *shape, dead=0.1):
    """Some zero, some rows without a positive or without any weight."""
    w = rng.standard_normal(shape) * np.sqrt(2 / max(1, np.prod(shape[1:])))
    w[rng.random(shape) < 0.1] = 0
    for row in w:
        if rng.random() < dead:
            row[...] = -np.abs(row)
        elif rng.random() < dead / 2:
            row[...] = 0
    return w


def layer(kind, shape, *fields, **options):
    """An Example of what is made by kind(name, inputs, *fields)."""
    return Example(shape, lambda name, *sources: kind(name, sources, *fields), **options)


# ---- Convolutions ----------------------------------------------------------------------------------------------------

# Rules that can make negative relevance. Their stabilisers are large, so that small denominators do not amplify
# float32's rounding.
SIGNED = (
    PLAIN, "epsilon(epsilon=0.5)", "epsilon(epsilon=0.5, bias=ignored)", "epsilon(epsilon=0.5, bias=shared)",
    "gamma(gamma=0.5, epsilon=0.5)", "gamma(epsilon=0.5, bias=shared)", "gamma(epsilon=0.5, bias=ignored)",
    "alpha-beta(epsilon=0.5)", "alpha-beta(alpha=3, beta=2, epsilon=0.5, bias=ignored)",
    "alpha-beta(epsilon=0.5, bias=shared)", "z+(bias=absorbed, epsilon=0.1)", "z+(bias=shared)",
)
SIGNED_WITHOUT_WEIGHTS = SIGNED[1:3]
LINEAR = (("zB", BOX), ("w2", BOX), ("flat", BOX), ("z+", BOX), ("z+", NON_NEGATIVE), ("z+", REAL),
          ("w2", NON_NEGATIVE), ("flat", REAL))
LINEAR_WITHOUT_WEIGHTS = (("zB", BOX), ("w2", BOX), ("z+", NON_NEGATIVE), ("z+", REAL), ("flat", NON_NEGATIVE))


def conv(shape, outputs, kernel, stride=(1, 1), padding=(0, 0, 0, 0), dilation=(1, 1), groups=1, on_gpu="",
         tensor_cores=()):
    w, bias = with_a_dead_unit(outputs, shape[0] // groups, *kernel)
    return layer(g.Conv2d, shape, w, bias, stride, padding, dilation, groups, on_gpu=on_gpu, tensor_cores=tensor_cores)


def tile(inputs, outputs, *precisions):
    """A convolution whose sums over channels and outputs fill tiles of tensor cores more or less."""
    return conv((inputs, 2, 3), outputs, (2, 1), padding=(1, 0, 0, 0), tensor_cores=tuple(
        (precision, "z+", domain) for precision in precisions for domain in (NON_NEGATIVE, REAL)))


ONE = (1, 1, 1, 1)
TF32, TF32_REAL = ("tf32", "z+", NON_NEGATIVE), ("tf32", "z+", REAL)
CONVOLUTIONS = {
    "small": conv((2, 3, 3), 3, (2, 2), on_gpu="short"),
    "several blocks of positions": conv((2, 31, 29), 3, (3, 3), padding=ONE),
    "several panels of outputs and inputs": conv((19, 5, 6), 27, (3, 2), padding=(1, 0, 0, 1), on_gpu="long"),
    "deep: one tile a block": conv((80, 4, 13), 9, (3, 3), padding=ONE),
    "pointwise": conv((33, 7, 9), 17, (1, 1)),
    "one pixel": conv((3, 1, 1), 4, (1, 1), on_gpu="short"),
    "one channel, one output": conv((1, 12, 12), 1, (5, 5), on_gpu="long"),
    "as large as its input": conv((3, 6, 5), 4, (6, 5)),
    "padding beyond the kernel": conv((2, 3, 3), 3, (2, 2), padding=(4, 3, 2, 5), on_gpu="long", tensor_cores=(TF32,)),
    "stride over kernel": conv((2, 11, 13), 5, (2, 2), (3, 4)),
    "stride over kernel, padded": conv((2, 11, 13), 5, (1, 2), (2, 5), (1, 2, 0, 1), on_gpu="long",
                                       tensor_cores=(TF32, ("3xtf32", "z+", NON_NEGATIVE))),
    "large stride": conv((3, 23, 27), 6, (11, 11), (4, 4), (2, 2, 2, 2)),
    "stride and dilation": conv((2, 17, 16), 4, (3, 3), (2, 3), (2, 1, 3, 2), (2, 2), on_gpu="long",
                                tensor_cores=(TF32,)),
    "dilation over stride": conv((2, 19, 16), 4, (3, 2), (2, 2), ONE, (3, 5)),
    "everything, small": conv((4, 5, 4), 6, (2, 2), (2, 1), (1, 0, 0, 1), (1, 2), 2, on_gpu="long"),
    "groups": conv((6, 9, 8), 9, (3, 3), padding=ONE, groups=3, on_gpu="long"),
    "groups of many": conv((20, 6, 6), 22, (3, 3), (2, 1), ONE, groups=2),
    "depthwise": conv((7, 9, 9), 7, (3, 3), (2, 2), ONE, groups=7),
    "depthwise, a step and a few positions": conv((2, 9, 16), 2, (3, 3), padding=ONE, groups=2),
    "depthwise, one pixel": conv((2, 1, 1), 2, (3, 3), padding=ONE, groups=2),
    "depthwise, one pixel, strided": conv((2, 1, 1), 2, (3, 3), (2, 2), ONE, groups=2),
    "depthwise, kernel larger than its input": conv((2, 2, 3), 2, (7, 7), padding=(3, 3, 3, 3), groups=2),
    "depthwise, as large as its input": conv((3, 5, 7), 3, (5, 7), groups=3),
    "depthwise, no padding": conv((3, 11, 21), 3, (5, 5), groups=3),
    "depthwise, more padding than kernel": conv((3, 4, 5), 3, (3, 3), padding=(4, 3, 5, 6), groups=3),
    "depthwise, padding after the end alone": conv((3, 10, 12), 3, (3, 3), (2, 2), (0, 0, 1, 1), groups=3),
    "depthwise, uneven padding": conv((3, 11, 13), 3, (5, 5), (2, 2), (1, 2, 2, 1), groups=3),
    "depthwise, rows strided": conv((3, 8, 9), 3, (3, 4), (2, 1), (1, 2, 1, 0), groups=3),
    "depthwise, columns strided": conv((3, 9, 8), 3, (2, 3), (1, 2), (1, 2, 1, 0), groups=3),
    "depthwise, stride over kernel": conv((3, 8, 9), 3, (1, 1), (2, 2), groups=3),
    "depthwise, dilated": conv((3, 12, 13), 3, (3, 3), (1, 2), (2, 3, 2, 3), (2, 3), 3),
    "depthwise, dilation over stride": conv((3, 12, 13), 3, (3, 3), (2, 1), (2, 1, 1, 2), (2, 1), 3),
    "depthwise, several blocks": conv((1, 71, 64), 1, (3, 3), padding=ONE),
    "depthwise, several blocks, strided": conv((2, 71, 67), 2, (5, 5), (2, 2), (2, 2, 2, 2), groups=2),
    "depthwise, rows longer than a block": conv((1, 2, 4200), 1, (3, 3), padding=ONE),
    "depthwise with a multiplier": conv((4, 7, 7), 12, (3, 3), padding=ONE, groups=4, on_gpu="long"),
    "Winograd's tiles, cut at the edge": conv((9, 13, 15), 11, (3, 3), padding=ONE),
    "Winograd's tiles, uneven padding": conv((8, 9, 30), 17, (3, 3), padding=(0, 2, 1, 0)),
    "Winograd's tiles, no padding": conv((12, 21, 22), 8, (3, 3)),
    "Winograd's tiles, more padding than kernel": conv((8, 9, 10), 9, (3, 3), padding=(4, 3, 2, 5)),
    "Winograd's tiles, groups": conv((16, 10, 11), 24, (3, 3), padding=ONE, groups=2),
    "Winograd's tiles, several blocks": conv((8, 29, 31), 8, (3, 3), padding=ONE),
    "channels by the sixteen": conv((16, 5, 4), 40, (3, 2), (1, 2), (1, 0, 1, 1)),
    "channels by the sixteen, groups": conv((32, 3, 4), 34, (2, 2), padding=(1, 0, 1, 1), groups=2),
    "pointwise, strided, outputs by the sixteen": conv((5, 5, 6), 16, (1, 1), (2, 2)),
    "one row": conv((2, 1, 40), 3, (1, 5), (1, 2), (0, 2, 0, 2)),
    "one column": conv((2, 40, 1), 3, (5, 1), (2, 1), (2, 0, 2, 0)),
    # For GPUs: 70 rows take more than one tile of 64, or one of 128 that is not full.
    "22 outputs in groups": conv((10, 3, 4), 22, (2, 2), (1, 2), (1, 0, 0, 1), groups=2, on_gpu="long",
                                 tensor_cores=(TF32, ("3xtf32", "z+", REAL))),
    "channels in whole tiles of depth": conv((16, 2, 3), 16, (2, 2), padding=(1, 0, 0, 1), on_gpu="long",
                                             tensor_cores=(TF32,)),
    "70 outputs": conv((3, 4, 5), 70, (3, 2), (2, 1), (1, 0, 1, 1), on_gpu="long", tensor_cores=(("tf32", "z+", BOX),)),
    "70 inputs": conv((70, 2, 3), 5, (2, 1), padding=(0, 0, 1, 0), on_gpu="long", tensor_cores=(("tf32", "zB", BOX),)),
    # Tiles of 16, 64, 128 rows (of which 3xTF32 has none); channels by the 16.
    "3 to 5": tile(3, 5, "tf32", "3xtf32"),
    "10 to 22": tile(10, 22, "tf32", "3xtf32"),
    "16 to 16": tile(16, 16, "tf32", "3xtf32"),
    "40 to 48": tile(40, 48, "tf32", "3xtf32"),
    "48 to 40": tile(48, 40, "tf32", "3xtf32"),
    "70 to 80": tile(70, 80, "tf32"),
    "80 to 70": tile(80, 70, "tf32"),
}


def draw_conv(net, name):
    source = net.pick()
    channels, *size = net.shapes[source]
    kernel = tuple(net.integer(1, min(4, n + 1)) for n in size)
    stride, dilation = (tuple(net.integer(1, most) for _ in size) for most in (5, 2))
    groups = net.one_of([n for n in (1, 2, 3, 4) if channels % n == 0])
    outputs = groups * net.integer(1, 9 if groups == 1 else 3)
    bias = 0.2 * net.rng.standard_normal(outputs) if net.boolean() else None
    padding = tuple(net.integer(0, 2) for _ in range(2)) * 2 if net.like_peers else tuple(
        net.integer(0, 2) for _ in range(4))
    try:
        net.add(g.Conv2d(name, (source,), random_weights(net.rng, outputs, channels // groups, *kernel), bias, stride,
                         padding, dilation, groups), False)
    except ModelError:  # a kernel that reaches beyond its input
        return
    if net.boolean():
        high = net.one_of([None, None, 0.5])
        net.add(g.ReLU(f"{name}/relu", (name,)) if high is None else g.Clip(f"{name}/relu", (name,), 0, high), True)


# ---- Dense layers ----------------------------------------------------------------------------------------------------


def dense(features, outputs, **options):
    return layer(g.Dense, (features, 1, 1), *with_a_dead_unit(outputs, features), **options)


DENSE = {
    "1 to 1": dense(1, 1),
    "3 to 5": dense(3, 5),
    "9 to 7": dense(9, 7),
    "17 to 40": dense(17, 40, on_gpu="long"),
    "several blocks of outputs": dense(21, 71, on_gpu=""),
    "several units of features": dense(cpu.DENSE_FEATURES + 3, 4, on_gpu=""),
    # For GPUs: more than one tile is summed over, in either direction.
    "70 to 3": dense(70, 3, on_gpu="long"),
    "3 to 70": dense(3, 70, on_gpu="long"),
}


def draw_dense(net, name):
    source = net.pick(flat=True)
    if net.shapes[source][1:] != (1, 1):
        source = net.add(g.Flatten(f"{name}/flatten", (source,)), net.nonnegative[source])
    outputs = net.integer(1, 12)
    net.add(g.Dense(name, (source,), random_weights(net.rng, outputs, net.shapes[source][0]),
                    0.2 * net.rng.standard_normal(outputs)), False)
    if net.boolean():
        net.add(g.ReLU(f"{name}/relu", (name,)), True)


# ---- Pools, additions ------------------------------------------------------------------------------------------------

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


def pools(kind, *fields):
    return {name: layer(kind, *pool, *fields, on_gpu="" if name.startswith("several vectors") else "short")
            for name, pool in POOLS.items()}


def draw_pool(net, name, kind):
    """Averages alone are kept to what is not negative in graphs like peers'."""
    source = net.pick(nonnegative=net.like_peers and kind is g.AveragePool2d)
    size = net.shapes[source][1:]
    kernel = tuple(net.integer(1, min(3, n)) for n in size)
    stride = tuple(net.integer(1, 3) for _ in size)
    if net.like_peers:
        padding = tuple(net.integer(0, k // 2) for k in kernel) * 2
    else:
        padding = tuple(net.integer(0, min(2, k - 1)) for k in (*kernel, *kernel))
    fields = [kernel, stride, padding, net.boolean(), *([net.boolean()] if kind is g.AveragePool2d else [])]
    net.add(kind(name, (source,), *fields), net.nonnegative[source])


def draw_global_average(net, name):
    source = net.pick(nonnegative=net.like_peers)
    net.add(g.GlobalAveragePool(name, (source,)), net.nonnegative[source])


def resize(shape, down, across, **options):
    return layer(g.Resize, shape, down(shape[1]), across(shape[2]), **options)


def interpolation(outputs, aligned=False):
    """Of an axis: bilinear, with the corners where they were or not."""
    def weights(inputs):
        at = np.arange(outputs)
        place = at * (inputs - 1) / max(outputs - 1, 1) if aligned else (at + 0.5) * inputs / outputs - 0.5
        place = np.clip(place, 0, inputs - 1)
        return np.maximum(0, 1 - np.abs(place[:, None] - np.arange(inputs)))

    return weights


def averages(outputs):
    """Of an axis: pieces of about the same length."""
    def weights(inputs):
        at, position = np.arange(outputs)[:, None], np.arange(inputs)
        own = (position >= at * inputs // outputs) & (position < -(-(at + 1) * inputs // outputs))
        return own / own.sum(1, keepdims=True)

    return weights


RESIZES = {
    "twice": resize((2, 3, 4), interpolation(6), interpolation(8)),
    "corners aligned": resize((2, 5, 3), interpolation(7, True), interpolation(8, True)),
    "to fewer": resize((3, 9, 7), interpolation(4), interpolation(3)),
    "averages that overlap": resize((2, 7, 10), averages(3), averages(4)),
    "several vectors": resize((2, 4, 19), interpolation(5), interpolation(70), on_gpu=""),
    "from one pixel": resize((3, 1, 1), interpolation(2), interpolation(3)),
    "one axis": resize((2, 4, 5), averages(4), interpolation(9)),
    "sums that are not one": resize((2, 4, 3), lambda n: 3 * interpolation(5)(n), lambda n: averages(2)(n) / 2),
}


def draw_resize(net, name):
    source = net.pick()
    sizes = [net.integer(1, 2 * n) for n in net.shapes[source][1:]]
    net.add(g.Resize(name, (source,), *(net.one_of([averages, interpolation])(size)(n) for size, n in zip(
        sizes, net.shapes[source][1:], strict=True))), net.nonnegative[source])


def draw_add(net, name):
    source = net.pick(nonnegative=net.like_peers)
    others = [n for n, shape in net.shapes.items()
              if shape == net.shapes[source] and (net.nonnegative[n] or not net.like_peers)]
    inputs = (source, net.one_of(others))
    net.add(g.Add(name, inputs), all(net.nonnegative[n] for n in inputs))
    if net.boolean():
        net.add(g.ReLU(f"{name}/relu", (name,)), True)


# ---- What passes relevance on ----------------------------------------------------------------------------------------

NO_RULE = tuple(("", domain) for domain in DOMAINS)
SMALL = (4, 4, 3)


def elementwise(kind, fields, nonnegative):
    """A draw of kind(name, (source,), *fields(net)); nonnegative: whether the output is, or as the input where None."""

    def draw(net, name):
        source = net.pick(flat=True)
        made = kind(name, (source,), *fields(net))
        net.add(made, net.nonnegative[source] or bool(nonnegative and nonnegative(made)))

    return draw


ACTIVATIONS = [(name, *fields) for name in g.ACTIVATIONS for fields in {
    "elu": [(), (0.5, 1.5)], "hard_sigmoid": [(), (0.2, 0.5)], "silu": [(), (1.702,)]}.get(name, [()])]


def draw_multiply(net, name):
    source = net.pick(flat=True)
    channels, height, width = net.shapes[source]
    gates = [n for n, shape in net.shapes.items()
             if shape in ((channels, height, width), (channels, 1, 1), (1, height, width), (1, 1, 1))]
    inputs = (source, net.one_of(gates))
    net.add(g.Multiply(name, inputs), all(net.nonnegative[n] for n in inputs))


def draw_softmax(net, name):
    """In a gate; nothing else may read it."""
    source = net.pick(flat=True)
    net.add(g.Softmax(name, (source,)), True)
    net.add(g.Multiply(f"{name}/gated", (source, name)), net.nonnegative[source])
    del net.shapes[name]


def draw_concat(net, name):
    source = net.pick(flat=True)
    others = [n for n, shape in net.shapes.items() if shape[1:] == net.shapes[source][1:]]
    inputs = (source, *(net.one_of(others) for _ in range(net.integer(0, 2))))
    net.add(g.Concat(name, inputs), all(net.nonnegative[n] for n in inputs))


def draw_flatten(net, name):
    source = net.pick()
    net.add(g.Flatten(name, (source,)), net.nonnegative[source])


def draw_rearrange(net, name):
    source = net.pick(flat=True)
    shape = tuple(net.integer(1, 5) for _ in range(3))
    index = net.rng.integers(-1, np.prod(net.shapes[source]), shape)
    net.add(g.Rearrange(name, (source,), index), net.nonnegative[source])


def draw_norm(net, name):
    source, size = net.pick(flat=True), net.integer(1, 5)
    net.add(g.LocalResponseNorm(
        name, (source,), size | 1 if net.like_peers else size, 2.0, net.one_of([0.75, 0.5, 1.0]),
        net.one_of([1.0, 2.0]), not net.like_peers and net.boolean()), net.nonnegative[source])


def norm(shape, *fields, seed=0, **options):
    """Scales of both signs, and one that is zero where there are several."""
    scale = 1.5 * np.random.default_rng(seed).standard_normal(shape[0])
    if shape[0] > 2:
        scale[2] = 0
    return layer(g.GroupNorm, shape, scale, np.random.default_rng(seed + 1).uniform(-0.3, 0.6, shape[0]), *fields,
                 **options)


NORMS = {  # groups, epsilon, per position, centered
    "layer": norm((4, 4, 3), 1, 1e-2),
    "by position": norm((5, 4, 3), 1, 1e-2, True),
    "groups": norm((6, 4, 3), 3, 1e-2),
    "groups by position": norm((6, 4, 3), 2, 1e-2, True),
    "instance": norm((4, 4, 3), 4, 1e-2),
    "root mean squares": norm((4, 4, 3), 1, 1e-2, False, False),
    "root mean squares by position": norm((4, 4, 3), 1, 1e-2, True, False),
    "flat": norm((9, 1, 1), 1, 1e-2, True),
    "flat, groups": norm((8, 1, 1), 2, 1e-2),
    "two by two": norm((4, 3, 2), 2, 1e-2, True),
    "one at a time": norm((3, 2, 2), 3, 1e-2, True),
    "one channel": norm((1, 4, 5), 1, 1e-2),
    "one position, instance": norm((3, 1, 1), 3, 1e-2),
    "one row, several vectors": norm((7, 1, 37), 1, 1e-2, True),
    "several vectors": norm((6, 5, 37), 2, 1e-2, on_gpu="long"),
}


def draw_group_norm(net, name):
    source = net.pick(flat=True)
    channels = net.shapes[source][0]
    groups = net.one_of([n for n in range(1, channels + 1) if channels % n == 0])
    scale = net.rng.standard_normal(channels)
    net.add(g.GroupNorm(name, (source,), scale, 0.2 * net.rng.standard_normal(channels), groups, 0.1, net.boolean(),
                        net.boolean()), False)
    if net.boolean():
        net.add(g.ReLU(f"{name}/relu", (name,)), True)


# ---- The table -------------------------------------------------------------------------------------------------------

TABLE = {  # by the names of model files, as fastdtd.layers.LAYER_TYPES
    "conv2d": Entry(CONVOLUTIONS, LINEAR, SIGNED, "everything, small", draw_conv, often=4),
    "dense": Entry(DENSE, LINEAR, SIGNED, "9 to 7", draw_dense, runs=((2, 7),)),
    "average_pool2d": Entry(
        pools(g.AveragePool2d, False)
        | {f"{name}, padding counts": example for name, example in pools(g.AveragePool2d, True).items()},
        LINEAR_WITHOUT_WEIGHTS, SIGNED_WITHOUT_WEIGHTS, "padded", lambda net, name: draw_pool(
            net, name, g.AveragePool2d)),
    "global_average_pool": Entry(
        {"small": layer(g.GlobalAveragePool, (3, 4, 5)), "one pixel": layer(g.GlobalAveragePool, (1, 1, 1)),
         "square": layer(g.GlobalAveragePool, (2, 7, 7)),
         "several vectors": layer(g.GlobalAveragePool, (2, 13, 13), on_gpu="")},
        LINEAR_WITHOUT_WEIGHTS, SIGNED_WITHOUT_WEIGHTS, "small", draw_global_average),
    "resize": Entry(RESIZES, LINEAR_WITHOUT_WEIGHTS, SIGNED_WITHOUT_WEIGHTS, "corners aligned", draw_resize,
                    in_peers=False),
    "max_pool2d": Entry(
        pools(g.MaxPool2d), tuple((rule, domain) for rule in ("winner", "proportional") for domain in DOMAINS),
        draw=lambda net, name: draw_pool(net, name, g.MaxPool2d)),
    # With two threads one image's channels are cut in the middle.
    "add": Entry({"small": layer(g.Add, (3, 5, 4), inputs=2)}, LINEAR_WITHOUT_WEIGHTS, SIGNED_WITHOUT_WEIGHTS, "small",
                 draw_add, runs=((1, 2), (2, 1))),
    "relu": Entry({"small": layer(g.ReLU, SMALL)}, NO_RULE,
                  draw=elementwise(g.ReLU, lambda net: (), lambda made: True)),
    "clip": Entry(
        {"both signs": layer(g.Clip, SMALL, -0.1, 0.3), "one sign": layer(g.Clip, SMALL, 0.0, 0.3),
         "from below": layer(g.Clip, SMALL, -0.2, math.inf), "from above": layer(g.Clip, SMALL, -math.inf, 0.4)},
        NO_RULE, draw=elementwise(g.Clip, lambda net: (net.one_of([0, -0.3, -np.inf]), 0.4),
                                  lambda made: made.low == 0)),
    "leaky_relu": Entry(
        {f"slope {slope:g}": layer(g.LeakyReLU, SMALL, slope) for slope in (0.1, 0.0, 1.0)}, NO_RULE,
        draw=elementwise(g.LeakyReLU, lambda net: (net.one_of([0.0, 0.1, 1.0]),), None)),
    "power": Entry(
        {f"to the {exponent:g}": layer(g.Power, SMALL, exponent) for exponent in (1.5, 0.5, 1.0, 2.0)}, NO_RULE,
        draw=elementwise(g.Power, lambda net: (net.one_of([2.0, 0.5, 1.0, 1.5]),), lambda made: True), in_peers=False),
    "activation": Entry(
        {" ".join(map(str, fields)): layer(g.Activation, SMALL, *fields) for fields in ACTIVATIONS}
        | {"silu, several vectors": layer(g.Activation, (3, 7, 19), "silu")}, NO_RULE,
        draw=elementwise(g.Activation, lambda net: net.one_of(ACTIVATIONS), lambda made: not made.is_zero_at_zero),
        in_peers=False),
    "multiply": Entry(
        {"by channel": layer(g.Multiply, SMALL, inputs=2, second=(4, 1, 1)),
         "own shape": layer(g.Multiply, SMALL, inputs=2),
         "by pixel": layer(g.Multiply, (3, 4, 9), inputs=2, second=(1, 4, 9)),
         "by one number": layer(g.Multiply, (3, 2, 2), inputs=2, second=(1, 1, 1)),
         "flat": layer(g.Multiply, (5, 1, 1), inputs=2)},
        tuple((rule, domain) for rule in ("hold", "half") for domain in DOMAINS), (), "", draw_multiply,
        runs=((1, 2), (2, 1)), in_peers=False),
    "concat": Entry(
        {"of one": layer(g.Concat, SMALL), "of two": layer(g.Concat, (3, 5, 2), inputs=2),
         "of three": layer(g.Concat, (2, 3, 7), inputs=3)}, NO_RULE, draw=draw_concat),
    "flatten": Entry({"small": layer(g.Flatten, SMALL), "flat before": layer(g.Flatten, (5, 1, 1))}, NO_RULE,
                     draw=draw_flatten),
    "rearrange": Entry(
        {"zeros, some elements twice, some never": layer(
            g.Rearrange, SMALL, np.random.default_rng(0).integers(-1, 48, (5, 2, 3))),
         "each once": layer(g.Rearrange, SMALL, np.random.default_rng(1).permutation(48).reshape(3, 4, 4)),
         "zeros before": layer(g.Rearrange, SMALL, np.arange(-1, 47).reshape(4, 4, 3)[:, ::-1])},
        NO_RULE, draw=draw_rearrange, in_peers=False),
    "local_response_norm": Entry(
        {"across channels": layer(g.LocalResponseNorm, SMALL, 3, 2.0, 0.75, 1.0),
         "across an even number": layer(g.LocalResponseNorm, SMALL, 2, 2.0, 0.5, 2.0),
         "within channels": layer(g.LocalResponseNorm, SMALL, 3, 2.0, 0.75, 1.0, True),
         "within channels, an even number": layer(g.LocalResponseNorm, (2, 5, 6), 4, 2.0, 1.0, 1.0, True)},
        tuple(("identity", domain) for domain in DOMAINS), ("taylor(epsilon=0.1)",), "across channels", draw_norm),
    "group_norm": Entry(NORMS, tuple(("z+", domain) for domain in DOMAINS), SIGNED, "groups by position",
                        draw_group_norm, runs=((1, 2), (2, 1)), in_peers=False),
    "batch_norm": Entry({"small": layer(g.BatchNorm, SMALL, [0.5, -1.0, 0.0, 2.0], [0.1, 0.0, -0.3, 1.0])},
                        canonized=True),
    "dropout": Entry({"small": layer(g.Dropout, SMALL)}, canonized=True),
    "softmax": Entry(  # as a gate, half of whose product's relevance is its own
        {"flat": layer(g.Softmax, (5, 1, 1)), "maps": layer(g.Softmax, (4, 3, 5)), "rows": layer(g.Softmax, (2, 1, 19)),
         "one channel": layer(g.Softmax, (1, 2, 3))},
        NO_RULE, draw=draw_softmax, runs=((1, 2), (2, 1)), in_peers=False),
}
KEPT = {kind: entry for kind, entry in TABLE.items() if not entry.canonized}


def every_example(kinds=None):
    """(kind, name of the example) of all layers that canonical graphs have, or of these kinds."""
    return [(kind, name) for kind, entry in KEPT.items() for name in entry.examples if kinds is None or kind in kinds]
