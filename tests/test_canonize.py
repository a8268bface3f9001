"""Canonical form: the same function, by the formula of each layer that goes; and what cannot be brought into it."""

import naive
import numpy as np
import pytest

from fastdtd import graph as g
from fastdtd.canonize import canonize
from fastdtd.errors import ModelError

RNG = np.random.default_rng(0)
SHAPE = (2, 4, 5)
END = (g.Flatten("flat", ("end",)), g.Dense("scores", ("flat",), RNG.standard_normal((3, 3 * 2 * 3))))


def conv(name="conv", source=g.INPUT, bias=True):
    return g.Conv2d(name, (source,), RNG.standard_normal((3, 2, 3, 3)), RNG.standard_normal(3) if bias else None)


def norm(name, source, channels=3):
    return g.BatchNorm(name, (source, ), RNG.standard_normal(channels),
                       RNG.standard_normal(channels))  # scales of both signs


def normalized(layer, values):
    """scale x + shift, from the formula, of a flat tensor."""
    repeat = len(values) // len(layer.scale)
    return np.repeat(layer.scale.astype(float), repeat) * values + np.repeat(layer.shift.astype(float), repeat)


def kinds(graph):
    return [type(layer).__name__ for layer in graph]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("length", [1, 3])
def test_batch_norms_after_a_convolution(bias, length):
    first = conv(bias=bias)
    norms = [norm(f"norm{i}", f"norm{i - 1}" if i else "conv") for i in range(length)]
    made = canonize(g.Graph((first, *norms, g.ReLU("end", (norms[-1].name,)), *END), SHAPE))
    assert kinds(made) == ["Conv2d", "ReLU", "Flatten", "Dense"]
    picture = RNG.standard_normal(SHAPE)
    expected = naive.forward(g.Graph((first, g.ReLU("end", ("conv",)), *END), SHAPE), picture)["conv"]
    for layer in norms:
        expected = normalized(layer, expected)
    np.testing.assert_allclose(naive.forward(made, picture)["conv"], expected, atol=1e-5)


@pytest.mark.parametrize("bias", [None, [1.0, -2.0, 0.5]])
def test_batch_norm_after_a_dense_layer(bias):
    dense, after = g.Dense("dense", (g.INPUT,), RNG.standard_normal((3, 4)), bias), norm("norm", "dense")
    made = canonize(g.Graph((dense, after, g.ReLU("relu", ("norm",))), (4, 1, 1), (0, 1)))
    assert kinds(made) == ["Dense", "ReLU"]
    assert made.box[1].tolist() == [1] * 4
    picture = RNG.standard_normal((4, 1, 1))
    by_hand = normalized(after, naive.forward(g.Graph((dense,), (4, 1, 1)), picture)["dense"])
    np.testing.assert_allclose(naive.forward(made, picture)["relu"], np.maximum(by_hand, 0), atol=1e-6)


def test_dropout_and_softmax_go():
    kept = (conv(), g.ReLU("end", ("conv",)), *END)
    given = (g.Dropout("drop0", (g.INPUT, )), conv(source="drop0"), g.Dropout("drop1",
                                                                              ("conv", )), norm("norm", "drop1"),
             g.Dropout("drop2", ("norm", )), g.ReLU("end", ("drop2", )), *END, g.Dropout("drop3", ("scores", )),
             g.Softmax("soft", ("drop3", )))
    made = canonize(g.Graph(given, SHAPE))
    assert [(layer.name, layer.inputs) for layer in made] == [(layer.name, layer.inputs) for layer in kept]
    assert made.output == "scores"


def test_dropout_that_several_read():
    made = canonize(
        g.Graph((g.Dropout("drop", (g.INPUT, )), g.Add("sum", ("drop", "drop")), g.Add("scores", ("sum", "drop"))),
                (2, 1, 1)))
    assert [layer.inputs for layer in made] == [(g.INPUT, g.INPUT), ("sum", g.INPUT)]


def test_canonical_form_is_a_fixed_point():
    made = canonize(
        g.Graph((conv(), norm("norm", "conv"), g.ReLU("end", ("norm", )), *END, g.Softmax("soft", ("scores", ))),
                SHAPE))
    assert canonize(made) is made


def with_norms(layers, picture):
    """Every tensor by name, batch norms by their formula."""
    tensors = {g.INPUT: picture.astype(float).ravel()}
    for layer in g.Graph(layers, picture.shape):
        if isinstance(layer, g.BatchNorm):
            tensors[layer.name] = normalized(layer, tensors[layer.inputs[0]])
        elif isinstance(layer, g.Dropout):
            tensors[layer.name] = tensors[layer.inputs[0]]
        else:
            shapes = g.Graph(layers, picture.shape).shapes
            source = [tensors[name] for name in layer.inputs]
            if isinstance(layer, g.Add):
                tensors[layer.name] = source[0] + source[1]
                continue
            alone = type(layer)(**{**vars(layer), "inputs": (g.INPUT,)})
            after = (g.Flatten("made flat", (layer.name,)),)
            one = naive.forward(g.Graph((alone, *after), shapes[layer.inputs[0]]),
                                source[0].reshape(shapes[layer.inputs[0]]))
            tensors[layer.name] = one[layer.name]
    return tensors


PADDED = g.Conv2d("conv2", ("norm",), RNG.standard_normal((3, 3, 3, 3)), padding=(1, 1, 1, 1))
GROUPED = g.Conv2d("conv2", ("norm",), RNG.standard_normal((3, 1, 1, 1)), RNG.standard_normal(3), groups=3)


@pytest.mark.parametrize(("layers", "expected"), [
    ([norm("norm", g.INPUT, 2), conv(source="norm"),
      g.ReLU("end", ("conv", ))], ["Conv2d", "ReLU"]),
    ([conv(), g.ReLU("relu", ("conv", )),
      norm("norm", "relu"), g.ReLU("end", ("norm", ))], ["Conv2d", "ReLU", "Conv2d", "ReLU"]),
    ([conv(), g.ReLU("relu", ("conv", )),
      norm("norm", "relu"), PADDED,
      g.ReLU("end", ("conv2", ))], ["Conv2d", "ReLU", "Conv2d", "Conv2d", "ReLU"
                                    ]),  # what is padded after it is zero, not the shift
    ([conv(), g.ReLU("relu", ("conv", )),
      norm("norm", "relu"), GROUPED,
      g.ReLU("end", ("conv2", ))], ["Conv2d", "ReLU", "Conv2d", "ReLU"]),
    # folded into what another layer reads as well, it would change what that one reads
    ([conv(), norm("norm", "conv"), g.Add("end", ("conv", "norm"))], ["Conv2d", "Conv2d", "Add"]),
    ([conv(), norm("a", "conv"), norm("b", "a"), g.Add("end", ("a", "b"))], ["Conv2d", "Conv2d", "Add"]),
    ([conv(), g.Dropout("drop", ("conv", )),
      norm("norm", "drop"), g.Add("end", ("drop", "norm"))], ["Conv2d", "Conv2d", "Add"]),
    ([conv(), g.ReLU("relu", ("conv", )),
      norm("a", "relu"), norm("b", "a"),
      g.ReLU("end", ("b", ))], ["Conv2d", "ReLU", "Conv2d", "ReLU"]),
])
def test_batch_norm_elsewhere(layers, expected):
    made = canonize(g.Graph((*layers, *END), SHAPE))
    assert kinds(made) == [*expected, "Flatten", "Dense"]
    assert canonize(made) is made
    picture = RNG.standard_normal(SHAPE)
    by_hand = with_norms((*layers, *END), picture)["scores"]
    np.testing.assert_allclose(naive.forward(made, picture)["scores"], by_hand, atol=1e-5 * np.abs(by_hand).max())


def test_batch_norm_before_a_dense_layer():
    before, dense = norm("norm", g.INPUT, 4), g.Dense("dense", ("norm",), RNG.standard_normal((3, 4)), [1.0, 2.0, 3.0])
    made = canonize(g.Graph((before, dense), (4, 1, 1), (0, 1)))
    assert kinds(made) == ["Dense"]
    picture = RNG.standard_normal((4, 1, 1))
    by_hand = dense.weight @ normalized(before, picture.ravel()) + dense.bias
    np.testing.assert_allclose(naive.forward(made, picture)["dense"], by_hand, atol=1e-5)


def test_a_softmax_in_a_gate_stays():
    layers = (conv(), g.Softmax("soft", ("conv",)), g.Dropout("drop", ("soft",)), g.Multiply("end", ("conv", "drop")))
    made = canonize(g.Graph((*layers, *END, g.Softmax("last", ("scores",))), SHAPE))
    assert kinds(made) == ["Conv2d", "Softmax", "Multiply", *(type(layer).__name__ for layer in END)]
    assert canonize(made) is made


@pytest.mark.parametrize(
    ("layers", "message"),
    [([conv(), g.Softmax("soft", ("conv", )), g.ReLU("end", ("soft", ))
       ], "softmax 'soft' is not the last layer; required: a softmax only at"),
     ([conv(), g.Softmax("soft", ("conv", )), g.Multiply("end", ("soft", "soft"))], "softmax 'soft' is not the last"),
     ([conv(), g.Softmax("soft", ("conv", )), g.Multiply("product", ("conv", "soft")),
       g.Add("end", ("product", "soft"))], "softmax 'soft' is not the last"), ])
def test_refusals(layers, message):
    with pytest.raises(ModelError, match=message):
        canonize(g.Graph((*layers, *END), SHAPE))


def test_nothing_left():
    with pytest.raises(ModelError, match="nothing is left of the network"):
        canonize(g.Graph((g.Dropout("drop", (g.INPUT,)), g.Softmax("soft", ("drop",))), (3, 1, 1)))


def test_a_fold_beyond_float32():
    dense, after = g.Dense("dense", (g.INPUT,), [[1e30]]), g.BatchNorm("norm", ("dense",), [1e30], [0])
    with pytest.raises(ModelError, match="layer 'dense' has NaN or infinity in its weight"):
        canonize(g.Graph((dense, after), (1, 1, 1)))
