"""What a network costs, by the definition, and that what costs too much is refused before it begins."""

import math
from pathlib import Path

import numpy as np
import pytest
from explaining import explainer, many, small
from graphs import graphs
from hypothesis import given
from naive import matrix

import fastdtd
from fastdtd import cli
from fastdtd import graph as g
from fastdtd.cost import MAX_MULTIPLY_ADDS, cost, decimal, multiply_adds
from fastdtd.errors import InputError
from fastdtd.explainer import Explainer
from fastdtd.model import Model, Preprocessing


@many
@given(graphs())
def test_counts_what_windows_and_weights_say(graph):
    for layer in graph:
        shape = graph.shapes[layer.name]
        if isinstance(layer, (g.Conv2d, g.Dense, g.Pool2d)):
            _, sources = matrix(layer, [graph.shapes[name] for name in layer.inputs])
            assert multiply_adds(layer, graph) == sources.size, layer
        else:
            assert multiply_adds(layer, graph) >= math.prod(shape) > 0
    found = cost(graph)
    assert found.forward == sum(multiply_adds(layer, graph) for layer in graph)
    assert found.backward >= sum(math.prod(graph.shapes[layer.inputs[0]]) for layer in graph)
    assert found.activation_bytes == 4 * sum(math.prod(shape) for shape in graph.shapes.values())
    assert found.weight_bytes == 4 * graph.parameters


def test_a_large_window_costs_most_in_the_backward_pass():
    """It has few positions, but each input lies in all of them."""
    conv = g.Conv2d("conv", (g.INPUT,), np.ones((2, 1, 30, 30)))
    graph = g.Graph((conv, g.GlobalAveragePool("scores", ("conv",))), (1, 32, 32), (0, 1))
    assert cost(graph).forward == 2 * 9 * 900 + 2 * 9
    assert cost(graph).backward == 2 * 1024 * 900 + 2 * 9


def test_a_network_that_takes_too_much_is_refused_before_it_begins():
    """A large window at every position: hours, from a file of a few bytes."""
    layers = g.MaxPool2d("pool", (g.INPUT,), (4096, 4096), (1, 1)), g.GlobalAveragePool("scores", ("pool",))
    graph = g.Graph(layers, (1, 8192, 8192), (0, 1))
    with pytest.raises(InputError, match=r"an image takes 2\.8.e\+14 multiply-adds, and 5e\+11 are accepted.*higher"):
        explainer(graph)
    Explainer(Model(small(), Preprocessing(None)), max_multiply_adds=math.inf)
    with pytest.raises(InputError, match="multiply-adds, and 10 are accepted"):
        Explainer(Model(small(), Preprocessing(None)), max_multiply_adds=10)
    for bad in ("1e9", True, None, math.nan):
        with pytest.raises(InputError, match=r"max_multiply_adds|multiply-adds, and nan"):
            Explainer(Model(small(), Preprocessing(None)), max_multiply_adds=bad)


def test_the_command_line_has_the_same_limit(tmp_path, capsys):
    assert cli._parser().parse_args(["explain", "net.h5"]).max_multiply_adds == MAX_MULTIPLY_ADDS
    fastdtd.save(Model(small(), Preprocessing(None)), tmp_path / "net.h5")
    status = cli.main(["explain", str(tmp_path / "net.h5"), "-o", str(tmp_path / "out"), "--max-multiply-adds", "0",
                       str(Path(cli.__file__).parent / "models" / "chelsea.png")])
    assert status == 1
    assert "multiply-adds, and 0 are accepted" in capsys.readouterr().err


def test_a_network_that_takes_more_memory_than_the_machine_has(monkeypatch):
    monkeypatch.setattr("fastdtd.executor._memory_of_machine", lambda: 1000)
    with pytest.raises(InputError, match=r"one image takes .* and this machine has 1KiB; use a network with a smaller"):
        explainer(small())
    explainer(small(), memory="1GiB")  # who says so is believed


def test_decimal():
    numbers = 0, 999, 1000, 349e6, 15.47e9, 2.5e13
    assert [decimal(n) for n in numbers] == ["0 ", "999 ", "1 k", "349 M", "15.5 G", "25 T"]
