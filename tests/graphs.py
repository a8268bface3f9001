"""Random networks for property tests: every layer, every connection, awkward shapes."""

import numpy as np
from hypothesis import strategies as st

from fastdtd import graph as g

LINEAR = ["z+", "w2", "flat"]
PLAIN = "alpha-beta(alpha=1, beta=0, epsilon=0, bias=ignored)"  # z+ whatever the sign of the output
# Rules that can make negative relevance. Their stabilisers are large, so that small denominators do not amplify
# float32's rounding.
SIGNED = [
    PLAIN, "epsilon(epsilon=0.5)", "epsilon(epsilon=0.5, bias=ignored)", "epsilon(epsilon=0.5, bias=shared)",
]
SIGNED_WITH_WEIGHTS = [
    *SIGNED, "gamma(gamma=0.5, epsilon=0.5)", "gamma(epsilon=0.5, bias=shared)", "gamma(epsilon=0.5, bias=ignored)",
    "alpha-beta(epsilon=0.5)", "alpha-beta(alpha=3, beta=2, epsilon=0.5, bias=ignored)",
    "alpha-beta(epsilon=0.5, bias=shared)", "z+(bias=absorbed, epsilon=0.1)", "z+(bias=shared)",
]
KINDS = [
    "conv", "conv", "conv+relu", "conv+relu", "max", "average", "global", "concat", "add", "relu", "clip", "norm",
    "dense", "leaky", "power", "rearrange"
]


def _pads(draw, kernel, symmetric):
    if symmetric:
        return tuple(draw(st.integers(0, k // 2)) for k in kernel) * 2
    return tuple(draw(st.integers(0, min(2, k - 1))) for k in (*kernel, *kernel))


def _weights(rng, *shape, dead=0.1):
    """Some zero, some rows without a positive or without any weight."""
    w = rng.standard_normal(shape) * np.sqrt(2 / max(1, np.prod(shape[1:])))
    w[rng.random(shape) < 0.1] = 0
    for row in w:
        if rng.random() < dead:
            row[...] = -np.abs(row)
        elif rng.random() < dead / 2:
            row[...] = 0
    return w


@st.composite
def graphs(draw, layers=6, like_peers=False, maximum_size=9):
    """A Graph of up to `layers` layers and a head.

    like_peers keeps averages and additions behind ReLUs, for zennit shares signed numbers by their sign, and paddings
    to PyTorch's.
    """
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    shape = tuple(draw(st.integers(1, n)) for n in (4, maximum_size, maximum_size))
    box = draw(st.sampled_from([None, (-1.0, 2.0), (0.0, 1.0), "channels"]))
    if box == "channels":
        low = -rng.random(shape[0])
        box = (low, low + 0.5 + rng.random(shape[0]))
    made, shapes, behind_relu, read = [], {g.INPUT: shape}, {g.INPUT: False}, set()

    def add(layer, relu):
        shapes[layer.name] = layer.output_shape([shapes[name] for name in layer.inputs])
        made.append(layer)
        behind_relu[layer.name] = relu
        read.update(layer.inputs)
        return layer.name

    def pick(images=True, quiet=False):
        names = [
            n for n, s in shapes.items()
            if (not images or s[1:] != (1, 1) or n == g.INPUT) and (not quiet or behind_relu[n])
        ]
        return draw(st.sampled_from(names[-4:])) if names else None

    for number in range(draw(st.integers(1, layers))):
        kind = draw(st.sampled_from(KINDS))
        name = f"{kind}{number}"
        quiet = like_peers and kind in ("average", "global", "add")
        source = pick(images=kind not in ("dense", "relu", "clip", "norm", "concat", "leaky", "power", "rearrange"),
                      quiet=quiet)
        if source is None:
            continue
        channels, *size = shapes[source]
        if kind.startswith("conv"):
            kernel = tuple(draw(st.integers(1, min(4, n + 1))) for n in size)
            stride, dilation = (tuple(draw(st.integers(1, most)) for _ in size) for most in (5, 2))
            groups = draw(st.sampled_from([n for n in (1, 2, 3, 4) if channels % n == 0]))
            outputs = groups * draw(st.integers(1, 9 if groups == 1 else 3))
            try:
                add(g.Conv2d(name, (source,), _weights(rng, outputs, channels // groups, *kernel),
                             0.2 * rng.standard_normal(outputs) if draw(st.booleans()) else None, stride,
                             tuple(draw(st.integers(0, 2)) for _ in range(2)) * 2 if like_peers else
                             tuple(draw(st.integers(0, 2)) for _ in range(4)), dilation, groups), False)
            except g.ModelError:  # a kernel that reaches beyond its input
                continue
            if kind == "conv+relu":
                high = draw(st.sampled_from([None, None, 0.5]))
                add(g.ReLU(name + "/relu", (name,)) if high is None else g.Clip(name + "/relu", (name,), 0, high), True)
        elif kind in ("max", "average"):
            kernel = tuple(draw(st.integers(1, min(3, n))) for n in size)
            stride, padding = tuple(draw(st.integers(1, 3)) for _ in size), _pads(draw, kernel, like_peers)
            arguments = (name, (source,), kernel, stride, padding, draw(st.booleans()))
            add(
                g.MaxPool2d(*arguments) if kind == "max" else g.AveragePool2d(*arguments, draw(st.booleans())),
                behind_relu[source])
        elif kind == "global":
            add(g.GlobalAveragePool(name, (source,)), behind_relu[source])
        elif kind == "concat":
            others = [n for n, s in shapes.items() if s[1:] == shapes[source][1:]]
            inputs = (source, *(draw(st.sampled_from(others)) for _ in range(draw(st.integers(0, 2)))))
            add(g.Concat(name, inputs), all(behind_relu[n] for n in inputs))
        elif kind == "add":
            others = [n for n, s in shapes.items() if s == shapes[source] and (behind_relu[n] or not quiet)]
            inputs = (source, draw(st.sampled_from(others)))
            add(g.Add(name, inputs), all(behind_relu[n] for n in inputs))
            if draw(st.booleans()):
                add(g.ReLU(name + "/relu", (name,)), True)
        elif kind == "relu":
            add(g.ReLU(name, (source,)), True)
        elif kind == "clip":
            low = draw(st.sampled_from([0, -0.3, -np.inf]))
            add(g.Clip(name, (source,), low, 0.4), low == 0 or behind_relu[source])
        elif kind == "leaky":
            add(g.LeakyReLU(name, (source,), draw(st.sampled_from([0.0, 0.1, 1.0]))), behind_relu[source])
        elif kind == "power" and not like_peers:
            add(g.Power(name, (source,), draw(st.sampled_from([2.0, 0.5, 1.0, 1.5]))), True)
        elif kind == "rearrange" and not like_peers:
            shape_out = tuple(draw(st.integers(1, 5)) for _ in range(3))
            add(g.Rearrange(name, (source,), rng.integers(-1, np.prod(shapes[source]), shape_out)), behind_relu[source])
        elif kind in ("power", "rearrange"):
            continue
        elif kind == "norm":
            size, beta = draw(st.integers(1, 5)), draw(st.sampled_from([0.75, 0.5, 1.0]))
            add(
                g.LocalResponseNorm(name, (source, ), size | 1 if like_peers else size, 2.0, beta,
                                    draw(st.sampled_from([1.0, 2.0])), not like_peers and draw(st.booleans())),
                behind_relu[source])
        else:
            flat = source
            if shapes[source][1:] != (1, 1):
                flat = add(g.Flatten(name + "/flatten", (source,)), behind_relu[source])
            outputs = draw(st.integers(1, 12))
            add(g.Dense(name, (flat, ), _weights(rng, outputs, shapes[flat][0]), 0.2 * rng.standard_normal(outputs)),
                False)
            if draw(st.booleans()):
                add(g.ReLU(name + "/relu", (name,)), True)

    flat = [add(g.Flatten(f"{name}/flat", (name, )), behind_relu[name])
            for name in list(shapes) if name not in read] or [g.INPUT]
    if flat == [g.INPUT]:
        flat = [add(g.Flatten("flat", (g.INPUT,)), False)]
    joined = add(g.Concat("join", tuple(flat)), all(behind_relu[n] for n in flat)) if len(flat) > 1 else flat[0]
    add(g.Dense("scores", (joined,), _weights(rng, draw(st.integers(1, 4)), shapes[joined][0], dead=0)), False)
    return g.Graph(tuple(made), shape, box)


@st.composite
def graphs_and_rules(draw, like_peers=False, signed=False):
    """A Graph, and rules for some of its layers; like_peers: for none of its pools and additions; signed: for most, of
    SIGNED.
    """
    graph = draw(graphs(like_peers=like_peers))
    rules = {}
    for layer in graph:
        if draw(st.integers(0, 4)) > (3 if signed else 0) or (like_peers and not isinstance(layer,
                                                                                            (g.Conv2d, g.Dense))):
            continue
        if isinstance(layer, g.MaxPool2d):
            rules[layer.name] = draw(st.sampled_from(["winner", "proportional"]))
        elif isinstance(layer, (g.Conv2d, g.Dense)):
            rules[layer.name] = draw(st.sampled_from(LINEAR + SIGNED_WITH_WEIGHTS if signed else LINEAR))
        elif isinstance(layer, (g.Add, g.Pool2d, g.GlobalAveragePool)):
            rules[layer.name] = draw(st.sampled_from(LINEAR + SIGNED[1:3] if signed else LINEAR))
        elif isinstance(layer, g.LocalResponseNorm) and signed:
            rules[layer.name] = draw(st.sampled_from(["identity", "taylor(epsilon=0.1)"]))
    return graph, rules


def pictures(graph, count, seed=0):
    """(count, C, H, W) float32 inside the graph's box; the second is all zero (or the lower bound), the third holds the
    bounds only.

    Where a mean or sum of the input has bounds, the pictures keep off them: there a - low of a mean is what rounding
    left.
    """
    rng = np.random.default_rng(seed)
    low, high = (b[:, None, None] for b in graph.box) if graph.box is not None else (-2.0, 2.0)
    if any(
            isinstance(layer, (g.AveragePool2d, g.GlobalAveragePool, g.Add)) and not graph.domains[layer.name].hidden
            for layer in graph):
        low, high = low + 0.01 * (high - low), high - 0.01 * (high - low)
    batch = low + (high - low) * rng.random((count, *graph.input_shape))
    if count > 1:
        batch[1] = 0 if graph.box is None else low
    if count > 2:
        batch[2] = np.where(rng.random(graph.input_shape) < 0.5, low, high)
    return batch.astype(np.float32)
