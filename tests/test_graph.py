"""Layers and graphs: shapes by counting windows, domains by looking at values, and everything that is refused."""

import itertools
import math
import random

import naive
import numpy as np
import pytest
from graphs import graphs, images
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from fastdtd import graph as g
from fastdtd.errors import ModelError

quick = settings(max_examples=60, deadline=None,
                 suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])


def head(source, name="scores"):
    """Layers that end a network on `source`, whatever its shape."""
    return g.GlobalAveragePool(f"{name}/mean", (source,)), g.ReLU(name, (f"{name}/mean",))


def conv(name, *inputs, outputs=2, channels=2, **fields):
    return g.Conv2d(name, inputs or (g.INPUT,), np.ones((outputs, channels // fields.get("groups", 1), 3, 3)), **fields)


# ---- Shapes ----------------------------------------------------------------------------------------------------------


def count_windows(size, kernel, stride, before, after, ceil=False, dilation=1):
    """Windows along one axis, laid one after the other: while they fit, or, under ceil, while numbers are left to
    cover.
    """
    span = dilation * (kernel - 1) + 1
    count = 0
    while True:
        start = count * stride - before
        left_uncovered = count == 0 or start - stride + span < size + after
        if start + span > size + after and not (ceil and left_uncovered and start < size):
            return count
        count += 1


axes = st.tuples(*[
    st.tuples(st.integers(1, 12), st.integers(1, 5), st.integers(1, 6), st.integers(0, 4), st.integers(0, 4),
              st.integers(1, 3))
] * 2)


@settings(max_examples=300, deadline=None)
@given(axes, st.sampled_from([g.MaxPool2d, g.AveragePool2d]), st.booleans())
def test_windows_of_pools(axes, kind, ceil):
    sizes, kernel, stride, before, after, _ = zip(*axes, strict=True)
    padding = tuple(min(pad, kernel[i % 2] - 1) for i, pad in enumerate((*before, *after)))
    layer = kind("pool", (g.INPUT,), kernel, stride, padding, ceil)
    assume(all(size + padding[i] + padding[i + 2] >= kernel[i] for i, size in enumerate(sizes)))
    expected = [
        count_windows(size, kernel[i], stride[i], padding[i], padding[i + 2], ceil) for i, size in enumerate(sizes)
    ]
    assert layer.output_shape([(7, *sizes)]) == (7, *expected)


@settings(max_examples=300, deadline=None)
@given(axes)
def test_windows_of_convolutions(axes):
    sizes, kernel, stride, before, after, dilation = zip(*axes, strict=True)
    layer = g.Conv2d("conv", (g.INPUT,), np.ones((6, 2, *kernel)), None, stride, (*before, *after), dilation, groups=3)
    expected = [count_windows(*axis[:5], dilation=axis[5]) for axis in axes]
    assume(all(expected))
    assert layer.output_shape([(6, *sizes)]) == (6, *expected)


def test_shapes_of_the_others():
    layers = (g.Concat("both", (g.INPUT, g.INPUT)), g.Add("sum", ("both", "both")), g.ReLU("relu", ("sum", )),
              g.BatchNorm("norm", ("relu", ), np.ones(4), np.zeros(4)), g.Dropout("drop", ("norm", )),
              g.Flatten("flat", ("drop", )), g.Dense("dense", ("flat", ), np.ones(
                  (5, 24))), g.Softmax("soft", ("dense", )))
    graph = g.Graph(layers, (2, 2, 3))
    assert graph.shapes == {
        "input": (2, 2, 3), "both": (4, 2, 3), "sum": (4, 2, 3), "relu": (4, 2, 3), "norm": (4, 2, 3),
        "drop": (4, 2, 3), "flat": (24, 1, 1), "dense": (5, 1, 1), "soft": (5, 1, 1)
    }
    assert graph.output == "soft"
    assert g.GlobalAveragePool("mean", (g.INPUT,)).output_shape([(4, 2, 3)]) == (4, 1, 1)


# ---- Domains ---------------------------------------------------------------------------------------------------------


def domain(*layers, box=None, shape=(2, 2, 2)):
    return g.Graph((*layers, *head(layers[-1].name)), shape, box).domains[layers[-1].name]


def assert_box(found, low, high):
    assert str(found) == "box"
    assert found.low.tolist() == low
    assert found.high.tolist() == high


CHANNELS = ([-1, 0], [2, 4])


@quick
@given(graphs())
def test_domains_hold_the_values(graph):
    for image in images(graph, 3):
        for name, values in naive.forward(graph, image).items():
            found = graph.domains[name]
            if found.nonnegative:
                assert values.min() >= 0
            if found.low is not None:
                low, high = (np.repeat(bound, np.prod(graph.shapes[name][1:])) for bound in (found.low, found.high))
                assert (low - 1e-6 <= values).all()
                assert (values <= high + 1e-6).all()


def test_the_box_goes_through_layers_without_weights():
    pad = (0, 0, 1, 0)
    assert_box(domain(g.Concat("x", (g.INPUT,)), box=(-1, 2)), [-1, -1], [2, 2])
    assert_box(domain(g.Flatten("x", (g.INPUT,)), box=CHANNELS), [-1] * 4 + [0] * 4, [2] * 4 + [4] * 4)
    assert_box(domain(g.Concat("x", (g.INPUT, g.INPUT)), box=CHANNELS), [-1, 0, -1, 0], [2, 4, 2, 4])
    assert_box(domain(g.Add("x", (g.INPUT, g.INPUT)), box=CHANNELS), [-2, 0], [4, 8])
    assert_box(domain(g.GlobalAveragePool("x", (g.INPUT,)), box=CHANNELS), *CHANNELS)
    assert_box(domain(g.Dropout("x", (g.INPUT,)), box=CHANNELS), *CHANNELS)
    assert_box(domain(g.MaxPool2d("x", (g.INPUT, ), (2, 2), padding=pad), box=(1, 2)), [1, 1],
               [2, 2])  # padding never wins
    assert_box(domain(g.AveragePool2d("x", (g.INPUT,), (2, 2), padding=pad), box=(1, 2)), [1, 1], [2, 2])
    assert_box(domain(g.AveragePool2d("x", (g.INPUT,), (2, 2), count_include_pad=True), box=(1, 2)), [1, 1], [2, 2])
    padded = g.AveragePool2d("x", (g.INPUT,), (2, 2), padding=pad, count_include_pad=True)
    assert_box(domain(padded, box=([1, -3], [2, -2])), [0, -3], [2, 0])


@pytest.mark.parametrize(("layers", "box", "expected"), [
    ([g.Concat("x", (g.INPUT,))], None, "real"),
    ([conv("x", padding=(1,) * 4)], (0, 1), "real"),
    ([g.ReLU("x", (g.INPUT,))], (-1, 1), "non-negative"),
    ([g.ReLU("r", (g.INPUT,)), g.MaxPool2d("x", ("r",), (2, 2))], None, "non-negative"),
    ([g.ReLU("r", (g.INPUT,)), g.Add("x", ("r", g.INPUT))], (0, 1), "non-negative"),  # hidden by one of them
    ([g.ReLU("r", (g.INPUT,)), g.Add("x", (g.INPUT, "r"))], (-1, 1), "real"),
    ([g.ReLU("r", (g.INPUT,)), g.Concat("x", ("r", g.INPUT))], (-1, 1), "real"),
    ([g.ReLU("r", (g.INPUT,)), g.BatchNorm("x", ("r",), [1, 1], [0, 0])], None, "real"),
])
def test_domains_without_a_box(layers, box, expected):
    found = domain(*layers, box=box)
    assert str(found) == expected
    assert found.low is found.high is None
    assert found.hidden == (box is not None or expected == "non-negative" or len(layers) > 1)


def test_an_input_of_non_negative_values():
    assert g.Graph(head(g.INPUT), (1, 2, 2), (0, 1)).domains[g.INPUT].nonnegative
    assert not g.Graph(head(g.INPUT), (2, 2, 2), ([0, -1], 1)).domains[g.INPUT].nonnegative


# ---- Order -----------------------------------------------------------------------------------------------------------


@quick
@given(graphs(), st.randoms(use_true_random=False))
def test_layers_are_sorted(graph, rng):
    """The next one is always the first, in the order given, whose inputs are there."""
    shuffled = rng.sample(graph.layers, len(graph.layers))
    made = g.Graph(tuple(shuffled), graph.input_shape)
    seen = {g.INPUT}
    for layer in made:
        assert layer is next(other for other in shuffled if other.name not in seen and seen.issuperset(other.inputs))
        seen.add(layer.name)
    assert made.shapes == graph.shapes


def test_a_tensor_read_twice_is_waited_for_once():
    layers = (g.Concat("all", ("a", "a", "b")), g.ReLU("a", (g.INPUT,)), g.ReLU("b", ("a",)))
    assert [layer.name for layer in g.Graph(layers, (1, 1, 1))] == ["a", "b", "all"]


def test_a_chain_of_the_most_layers_is_sorted():
    names = [g.INPUT, *map(str, range(g.MAX_LAYERS))]
    layers = [g.ReLU(name, (before,)) for before, name in itertools.pairwise(names)]
    random.Random(0).shuffle(layers)
    assert [layer.name for layer in g.Graph(tuple(layers), (1, 1, 1))] == names[1:]
    with pytest.raises(ModelError, match=f"has {g.MAX_LAYERS + 1} layers; at most {g.MAX_LAYERS} are accepted"):
        g.Graph((*layers, g.ReLU("more", (names[-1],))), (1, 1, 1))


# ---- What is refused: graphs -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("layers", "message"), [
    ([], "the network has no layers"),
    ([g.ReLU("a", (g.INPUT, )), g.ReLU("a", ("a", ))], "layer name 'a' is taken or empty"),
    ([g.ReLU("input", (g.INPUT, ))], "layer name 'input' is taken or empty"),
    ([g.ReLU("", (g.INPUT, ))], "layer name '' is taken or empty"),
    ([g.ReLU("a", ("data", ))], "layer 'a' reads 'data', which no layer makes; the network's input is 'input'"),
    ([g.ReLU("a", ("a", ))], "a cycle through 'a'; required"),
    ([g.ReLU("x",
             (g.INPUT, )), g.Add("a", ("x", "c")),
      g.ReLU("b",
             ("a", )), g.ReLU("c", ("b", ))], "a cycle through 'a', 'b', 'c'; req"),
    ([*head(g.INPUT), *head(g.INPUT, "more")], r"has 2 outputs \('scores', 'more'\); required: one"),
    ([g.Add("a",
            ("long", g.INPUT)), g.Concat("long",
                                         (g.INPUT, g.INPUT))], "'a' adds tensors of different shapes: 4x4x5, 2x4x5"),
    ([g.Concat("a", (g.INPUT, "b")), g.GlobalAveragePool("b", (g.INPUT, ))
      ], "'a' concatenates channels of different sizes: 2x4x5, 2x1x1"),
    ([conv("a", channels=3)], r"'a' expects 3 input channels \(3 in each of 1 groups\) but 'input' has 2"),
    ([conv("a", channels=4, groups=2)], r"'a' expects 4 input channels \(2 in each of 2 groups\) but 'input' has 2"),
    ([conv("a", dilation=(1, 3))], r"'a' has a kernel that spans 7 pixels over an input of 5 \(padding included\)"),
    ([g.MaxPool2d("a", (g.INPUT, ), (6, 1), padding=(0, 0, 1, 0))
      ], r"'a' has a kernel of 6 pixels over an input of 5 \(padding included\)"),
    ([g.Dense("a", (g.INPUT, ), np.ones(
        (3, 40)))], "'a' expects 40 flat features but 'input' has shape 2x4x5; put a Flatten before it"),
    ([*head(g.INPUT), g.Dense("a", ("scores", ), np.ones(
        (1, 3)))], "'a' expects 3 flat features but 'scores' has shape 2x1x1$"),
    ([g.BatchNorm("a", (g.INPUT, ), np.ones(3), np.ones(3))], "'a' has 3 scales but 'input' has 2 channels"),
])
def test_graphs_that_are_refused(layers, message):
    with pytest.raises(ModelError, match=message):
        g.Graph(tuple(layers), (2, 4, 5))


def test_tensors_of_absurd_size_are_refused():
    doubled = [g.Concat(str(i), (str(i - 1) if i else g.INPUT,) * 2) for i in range(29)]
    with pytest.raises(ModelError,
                       match="layer '28' makes a tensor of shape 536870912x1x1; at most 268435456 elements"):
        g.Graph(tuple(doubled), (1, 1, 1))
    assert g.Graph(tuple(doubled[:28]), (1, 1, 1)).shapes["27"] == (2**28, 1, 1)
    with pytest.raises(ModelError, match="'a' makes a tensor of shape 64x2049x2049"):
        g.Graph((g.Conv2d("a", (g.INPUT,), np.ones((64, 1, 1, 1)), padding=(1024,) * 4),), (1, 1, 1))


@pytest.mark.parametrize("shape", [(), (3, 4), (1, 2, 3, 4), (0, 4, 4), (3, -1, -1), (2**14, 2**14, 2),
                                   (2**62, 2**62, 2**62)])
def test_bad_input_shapes(shape):
    with pytest.raises(ModelError,
                       match=r"the input has shape .*required: \(channels, height, width\), each 1 or more"):
        g.Graph(head(g.INPUT), shape)


@pytest.mark.parametrize(("box", "message"), [((1, 1), "low below high"), (([0, 1], [1, 0]), "low below high"),
                                              ((-np.inf, 0), "finite"), ((0, np.nan), "finite"),
                                              ((0, 1e39), "finite"),  # beyond float32
                                              (([0, 0, 0], 1), "2, one for each channel"), ((0, 1, 2), "does not fit"),
                                              (3, "does not fit"), (("a", "b"), "does not fit"), ])
def test_bad_boxes(box, message):
    with pytest.raises(ModelError, match=f"the value box .*{message}"):
        g.Graph(head(g.INPUT), (2, 4, 4), box)


# ---- What is refused: layers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [(lambda: g.ReLU("a", ()), "'a' has 0 inputs; ReLU takes 1$"),
     (lambda: g.Add("a", ("b", )), "'a' has 1 inputs; Add takes 2$"),
     (lambda: g.Add("a", ("b", "c", "d")), "'a' has 3 inputs; Add takes 2$"),
     (lambda: g.Concat("a", ()), "'a' has 0 inputs; Concat takes 1 or more$"),
     (lambda: conv("a", stride=(0, 1)), r"'a' has stride \(0, 1\); required: 2 integers from 1"),
     (lambda: conv("a", stride=(257, 1)), r"'a' has stride \(257, 1\); required: 2 integers from 1 to 256"),
     (lambda: conv("a", padding=(0, 0, 0, 1025)), r"'a' has padding .*; required: 4 integers from 0 to 1024"),
     (lambda: g.MaxPool2d("a", (g.INPUT, ), (2000, 2), padding=(1999, 0, 0, 0)),
      r"'a' has padding .*; required: 4 integers from 0 to 1024"),
     (lambda: conv("a", stride=(1, )), r"'a' has stride \(1,\); required: 2 integers from 1"),
     (lambda: conv("a", dilation=(1, 2**24)), r"'a' has dilation \(1, 16777216\); required: 2 integers from 1"),
     (lambda: conv("a", padding=(0, 0, -1, 0)), r"'a' has padding \(0, 0, -1, 0\); required: 4 integers from 0"),
     (lambda: conv("a", padding=(1, 1)), r"'a' has padding \(1, 1\); required: 4 integers from 0"),
     (lambda: conv("a", outputs=4, channels=3, groups=3),
      "'a' has 4 output channels in 3 groups; required: groups that divide them"),
     (lambda: g.Conv2d("a", (g.INPUT, ), np.ones((1, 1, 1, 1)), groups=0), "'a' has 1 output channels in 0 groups"),
     (lambda: g.Conv2d("a", (g.INPUT, ), np.ones(
         (2, 3, 3))), r"'a' has weight of shape \(2, 3, 3\); required: \(K, C / groups, kernel h"),
     (lambda: conv("a", outputs=0), r"'a' has weight of shape \(0, 2, 3, 3\)"),
     (lambda: conv("a", bias=np.ones(3)), r"'a' has bias of shape \(3,\); required: \(2,\)"),
     (lambda: g.Dense("a", (g.INPUT, ), np.ones((2, 3)), np.ones(
         (2, 1))), r"'a' has bias of shape \(2, 1\); required: \(2,\)"),
     (lambda: g.Dense("a", (g.INPUT, ), np.ones(
         (2, 0))), r"'a' has weight of shape \(2, 0\); required: \(outputs, features\)"),
     (lambda: g.Dense("a",
                      (g.INPUT, ), np.ones(2)), r"'a' has weight of shape \(2,\); required: \(outputs, features\)"),
     (lambda: g.BatchNorm("a", (g.INPUT, ), np.ones(2), np.ones(3)),
      r"'a' has scale \(2,\) and shift \(3,\); required: one number each"),
     (lambda: g.BatchNorm("a", (g.INPUT, ), np.ones((2, 1)), np.ones(
         (2, 1))), r"'a' has scale \(2, 1\) and shift \(2, 1\)"),
     (lambda: g.LeakyReLU("a", (g.INPUT, ), 1.5), "'a' has slope 1.5; required: 0 to 1"),
     (lambda: g.LeakyReLU("a", (g.INPUT, ), math.nan), "'a' has slope nan; required: 0 to 1"),
     (lambda: g.Power("a", (g.INPUT, ), 0), "'a' has exponent 0; required: above 0, at most 100"),
     (lambda: g.Rearrange("a", (g.INPUT, ), [[0, 1]]),
      r"'a' has index of shape \(1, 2\); required: the output's, \(C, H, W\)"),
     (lambda: g.Rearrange("a", (g.INPUT, ), np.zeros((1, 0, 1), int)), r"'a' has index of shape \(1, 0, 1\)"),
     (lambda: g.Rearrange("a", (g.INPUT, ), [[[-2]]]), "'a' has index from -2 to -2; required: -1 to 268435455"),
     (lambda: g.Rearrange("a", (g.INPUT, ), [[[2**40]]]),
      "'a' has index from 1099511627776 to 1099511627776; required: -1 to 268435455"),
     (lambda: g.Rearrange("a", (g.INPUT, ), [[[0.5]]]),
      "'a' has index of 1 elements of type float64; required: at most 268435456 integers"),
     (lambda: g.Graph((g.Rearrange("a", (g.INPUT, ), [[[8]]]), ),
                      (2, 2, 2)), "'a' has index 8 but 'input' has 8 elements"),
     (lambda: g.MaxPool2d("a", (g.INPUT, ), (0, 2)), r"'a' has kernel \(0, 2\); required: 2 integers from 1"),
     (lambda: g.MaxPool2d("a", (g.INPUT, ), (2, 2), (2, 0)), r"'a' has stride \(2, 0\); required: 2 integers from 1"),
     (lambda: g.MaxPool2d("a", (g.INPUT, ), (2, 3), padding=(0, 0, 0, -1)),
      r"'a' has padding \(0, 0, 0, -1\); required: 4 integers from 0"),
     (lambda: g.MaxPool2d("a", (g.INPUT, ), (2, 3), padding=(1, 2, 2, 2)), r"required: less than the kernel \(2, 3\)"),
     (lambda: g.AveragePool2d("a", (g.INPUT, ),
                              (2, 3), padding=(1, 3, 1, 2)), r"required: less than the kernel \(2, 3\)"), ])
def test_layers_that_are_refused(make, message):
    with pytest.raises(ModelError, match=message):
        make()


@pytest.mark.parametrize(("weight", "message"), [(np.array([[1, np.nan]]), "NaN or infinity in its weight"),
                                                 (np.array([[-np.inf, 1]]), "NaN or infinity in its weight"),
                                                 (np.array([[1e39, 1]]), "NaN or infinity in its weight"),
                                                 (np.ones(
                                                     (1, 2), complex), "weight of type complex128; required: real"),
                                                 ([["a", "b"]], "weight of type <U1; required: real numbers"),
                                                 ([[None, 1]], "weight of type object"),
                                                 ([[True]], "weight of type bool"), ])
def test_weights_that_are_refused(weight, message):
    with pytest.raises(ModelError, match=f"layer 'a' has {message}"):
        g.Dense("a", (g.INPUT,), weight)
    assert g.Dense("a", (g.INPUT,), np.ones((1, 2), np.float16)).weight.dtype == np.float32
    with pytest.raises(ModelError, match="layer 'a' has NaN or infinity in its bias"):
        g.Dense("a", (g.INPUT,), [[1]], [math.nan])


def test_too_many_weights_are_refused_before_they_are_copied():
    huge = np.broadcast_to(np.float32(0), (2**15, 2**15 + 1))  # one number in memory
    with pytest.raises(ModelError, match=f"'a' has weight of {2**30 + 2**15} elements; at most {2**30} are accepted"):
        g.Dense("a", (g.INPUT,), huge)


def test_weights_are_copies_that_nobody_changes():
    given = np.ones((1, 2), np.float32)
    layer = g.Dense("a", (g.INPUT,), given)
    given[:] = 2
    assert (layer.weight == 1).all()
    with pytest.raises(ValueError, match="read-only"):
        layer.weight[:] = 3
