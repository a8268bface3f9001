"""Kernels for GPUs, in a simulator (tests/lockstep.py). tests/test_cuda_compiled.py looks at their machine code."""

import ast
import itertools
from pathlib import Path

import naive
import numpy as np
import pytest
from fastdtd.kernels import cuda as device_kernels
from fastdtd.kernels.cuda import vector_code
from graphs import SIGNED_WITH_WEIGHTS, graphs, graphs_and_rules, pictures
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st
from single_layers import CONVOLUTIONS, POOLS, RULES, check, check_winner, convolution, weights
from test_explainer import describe, explain, small, to_the_middle, two_layers

from fastdtd import graph as g
from fastdtd.explainer import Explainer
from fastdtd.model import Model, Preprocessing
from fastdtd.rules import DERIVATIVES, search_direction

pytestmark = pytest.mark.usefixtures("simulator")
few = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
KERNELS = Path(device_kernels.__file__).parent

ON_GPU = {"device": "cuda", "precision": "fp32"}
SHAPES = ["several panels of outputs and inputs", "padding beyond the kernel", "stride over kernel, padded",
          "stride and dilation", "groups", "depthwise with a multiplier", "one pixel", "one channel, one output"]
TILES = {  # as CONVOLUTIONS; 70 rows take more than one tile of 64, or one of 128 that is not full
    "16 rows": ((10, 3, 4), 22, (2, 2), (1, 2), (1, 0, 0, 1), (1, 1), 2),
    "channels in whole tiles of depth": ((16, 2, 3), 16, (2, 2), (1, 1), (1, 0, 0, 1), (1, 1), 1),
    "70 outputs": ((3, 4, 5), 70, (3, 2), (2, 1), (1, 0, 1, 1), (1, 1), 1),
    "70 inputs": ((70, 2, 3), 5, (2, 1), (1, 1), (0, 0, 1, 0), (1, 1), 1),
}
SMALL_POOLS = [case for case in POOLS if case.count("several vectors") == 0 or case.startswith("whole")]


@pytest.fixture(scope="module")
def record(simulator):
    """(module, name) of each kernel that was launched, and the names of this file's tests that ran."""
    from numba.cuda.simulator import kernel
    run, launched = kernel.BlockManager.run, set()

    def run_and_record(manager, *arguments):
        launched.add((manager._f.__module__.rpartition(".")[2], manager._f.__qualname__))
        run(manager, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel.BlockManager, "run", run_and_record)
        yield launched, set()


@pytest.fixture(autouse=True)
def _recorded(record, request):
    record[1].add(request.function.__name__)


def on_gpu(graph, rules="dtd"):
    return Explainer(Model(graph, Preprocessing(None)), rules, **ON_GPU)


def on_processor(graph, rules="dtd"):
    return Explainer(Model(graph, Preprocessing(None)), rules, threads=1)


def assert_like_the_oracle(graph, rules="dtd", batch=None, tolerance=1e-5, start=None):
    """The explanation of the images' winners, or from `start`; tolerance: of scores, relevance and ledger."""
    made, batch = on_gpu(graph, rules), pictures(graph, 3) if batch is None else batch
    e = explain(made, batch) if start is None else made(batch, start=start)
    names = {name: rule.rule for name, rule in made.rules.items()}
    for i, picture in enumerate(batch):
        relevance, scores, absorbed = naive.explain(graph, picture, e.target[i], names, None if start is None
                                                    else start[i])
        scale = max(np.linalg.norm(relevance), np.abs(scores).max())
        np.testing.assert_allclose(e.output[i], scores, atol=tolerance * scale)
        assert np.linalg.norm(e.relevance[i] - relevance) <= tolerance * scale
        assert set(absorbed) == set(e.ledger)
        for name, lost in absorbed.items():
            assert abs(e.ledger[name][i] - lost) <= tolerance * scale
    return e


def assert_like_the_processor(graph, rules, batch, tolerance=1e-5):
    """The GPU's explanation, which is the processor's."""
    ours, theirs = (explain(made(graph, rules), batch) for made in (on_gpu, on_processor))
    assert ours.ledger.keys() == theirs.ledger.keys()
    np.testing.assert_array_equal(ours.target, theirs.target)
    for i in range(len(batch)):
        scale = max(np.linalg.norm(theirs.relevance[i]), np.abs(theirs.output[i]).max(), 1.0)
        np.testing.assert_allclose(ours.output[i], theirs.output[i], atol=tolerance * scale)
        np.testing.assert_allclose(ours.explained[i], theirs.explained[i], atol=tolerance * scale)
        assert np.linalg.norm(ours.relevance[i] - theirs.relevance[i]) <= tolerance * scale
        for name, lost in theirs.ledger.items():
            assert abs(ours.ledger[name][i] - lost[i]) <= tolerance * scale
    return ours


# ---- Layers with weights ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("case", "precision"), [
    *itertools.product(SHAPES, ["fp32"]), *itertools.product(SHAPES[1:4], ["tf32"]),
    ("stride over kernel, padded", "3xtf32"), ])
def test_convolution(case, precision):
    check(convolution(case), CONVOLUTIONS[case][0], "z+", "relu", device="cuda", precision=precision,
          tolerance=2e-3 if precision == "tf32" else 1e-5)


@pytest.mark.parametrize(("rule", "hidden"), RULES)
def test_convolution_under_every_rule(rule, hidden):
    check(convolution("stride and dilation"), CONVOLUTIONS["stride and dilation"][0], rule, hidden, **ON_GPU)


def with_a_dead_unit(*shape):
    """Weights and bias; the first output is active by its bias alone."""
    w, bias = weights(0, *shape), 1 + 0.1 * weights(1, shape[0], 1)[:, 0]
    w[0], bias[0] = -np.abs(w[0]), 3.0
    return w, bias


@pytest.mark.parametrize(("case", "rule", "hidden", "precision"), [
    *((case, rule, "", "fp32") for case, rule in itertools.product(TILES, ["zB", "z+", "w2"])),
    ("16 rows", "z+", "relu", "fp32"), ("70 outputs", "z+", "relu", "fp32"), ("16 rows", "z+", "relu", "tf32"),
    ("16 rows", "z+", "real", "3xtf32"), ("channels in whole tiles of depth", "z+", "relu", "tf32"),
    ("70 outputs", "z+", "", "tf32"), ("70 inputs", "zB", "", "tf32"),
])
def test_convolution_in_tiles(case, rule, hidden, precision):
    shape, outputs, kernel, *fields, groups = TILES[case]
    w, bias = with_a_dead_unit(outputs, shape[0] // groups, *kernel)
    check(lambda source: g.Conv2d("tested", (source,), w, bias, *fields, groups), shape, rule, hidden, device="cuda",
          precision=precision, tolerance=2e-3 if precision == "tf32" else 1e-5)


# inputs, outputs: tiles of 16, 64, 128 rows; channels by the 16
SIZES = [(10, 22), (16, 16), (40, 48), (48, 40), (70, 80), (80, 70)]


def through_tensor_cores(sizes, hidden, precision):
    w, bias = with_a_dead_unit(sizes[1], sizes[0], 2, 1)
    check(lambda source: g.Conv2d("tested", (source,), w, bias, (1, 1), (1, 0, 0, 0)), (sizes[0], 2, 3), "z+", hidden,
          device="cuda", precision=precision, tolerance=5e-4 if precision == "tf32" else 1e-6)


@pytest.mark.parametrize("hidden", ["relu", "real"])
@pytest.mark.parametrize(("sizes", "precision"), [
    *itertools.product(SIZES, ["tf32"]), *itertools.product(SIZES[:4], ["3xtf32"]),  # which has no tiles of 128 rows
])
def test_tensor_cores(sizes, hidden, precision):
    """Lane by lane: which of a warp holds which values, and what is cut off where."""
    through_tensor_cores(sizes, hidden, precision)


@pytest.mark.parametrize("sizes", [(10, 22), (48, 40)])
def test_copies_that_are_there_at_once(sizes, monkeypatch):
    """In the other tests they are there as late as can be."""
    monkeypatch.setattr(vector_code, "copies_are_late", False)
    through_tensor_cores(sizes, "relu", "tf32")


DENSE = [(features, outputs, 2, *rule) for features, outputs in [(1, 1), (17, 40)] for rule in RULES]
# one image, and more than a block takes
DENSE += [(5, 7, 1, "zB", ""), (17, 40, 35, "z+", "relu"), (17, 40, 35, "zB", "")]
# more than one tile is summed over, each way
DENSE += [(70, 3, 2, "z+", "real"), (3, 70, 2, "z+", "real"), (70, 3, 2, "flat", "")]


@pytest.mark.parametrize(("features", "outputs", "count", "rule", "hidden"), DENSE)
def test_dense(features, outputs, count, rule, hidden):
    w, bias = with_a_dead_unit(outputs, features)
    check(lambda source: g.Dense("tested", (source,), w, bias), (features, 1, 1), rule, hidden, count=count, **ON_GPU)


@pytest.mark.parametrize("rule", [*SIGNED_WITH_WEIGHTS, "z+", "w2", "flat"])
def test_formulas_of_layers_with_weights(rule):
    """Both layers have negative outputs that are read as they are, so that z+ redistributes those too."""
    rng = np.random.default_rng(3)
    graph = g.Graph((g.Conv2d("conv", (g.INPUT,), rng.standard_normal((6, 2, 2, 3)), 0.3 * rng.standard_normal(6),
                              (2, 1), (1, 0, 0, 1), groups=2),
                     g.Flatten("flat", ("conv",)), g.Dense("dense", ("flat",), 0.3 * rng.standard_normal((9, 60)),
                                                           rng.standard_normal(9)),
                     g.Dense("scores", ("dense",), rng.standard_normal((3, 9)), [0.1, -0.2, 0.3])), (4, 4, 6),
                    (-1.0, 2.0))
    e = assert_like_the_oracle(graph, {"conv": rule, "dense": rule, "scores": rule}, tolerance=1e-5)
    assert e.relevance.any()


def test_what_rounding_leaves_redistributes_nothing():
    """Outputs that only their bias makes negative: their negative contributions are zero, found as the difference of
    equal sums."""
    graph = g.Graph((g.Dense("dense", (g.INPUT,), np.abs(weights(0, 40, 7)), np.full(40, -9.0)),
                     g.Dense("scores", ("dense",), -np.abs(weights(1, 3, 40)))), (7, 1, 1), (0.0, 1.0))
    e = assert_like_the_oracle(graph, {"dense": "z+", "scores": "z+"})
    np.testing.assert_allclose(e.ledger["dense"], e.explained, rtol=1e-5)


@pytest.mark.parametrize(("direction", "layer"),
                         [(to_the_middle, "conv"), (lambda a, w: a if a * w > 0 else 0, "hidden")])
def test_search_directions(direction, layer):
    assert assert_like_the_oracle(two_layers((-1.0, 2.0)), {layer: search_direction(direction)}).relevance.any()


# ---- Pools, additions ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rule", "hidden", "count_include_pad"), [
    ("zB", "", False), ("w2", "", True), ("z+", "relu", True), ("z+", "real", False), ("flat", "relu", False),
])
@pytest.mark.parametrize("case", SMALL_POOLS)
def test_average_pool(case, rule, hidden, count_include_pad):
    shape, *fields = POOLS[case]
    check(lambda source: g.AveragePool2d("tested", (source,), *fields, count_include_pad), shape, rule, hidden,
          **ON_GPU)


@pytest.mark.parametrize(("rule", "hidden"), [("zB", ""), ("w2", ""), ("z+", "relu"), ("z+", "real"), ("flat", "relu")])
@pytest.mark.parametrize("shape", [(3, 4, 5), (2, 7, 7), (1, 1, 1)])
def test_global_average_pool(shape, rule, hidden):
    check(lambda source: g.GlobalAveragePool("tested", (source,)), shape, rule, hidden, **ON_GPU)


@pytest.mark.parametrize(("rule", "hidden"), [("winner", ""), ("winner", "relu"), ("proportional", ""),
                                              ("proportional", "relu"), ("proportional", "real")])
@pytest.mark.parametrize("case", SMALL_POOLS)
def test_max_pool(case, rule, hidden):
    shape, *fields = POOLS[case]
    if rule == "winner":
        check_winner(lambda source: g.MaxPool2d("tested", (source,), *fields), shape, hidden, **ON_GPU)
    else:
        check(lambda source: g.MaxPool2d("tested", (source,), *fields), shape, rule, hidden, **ON_GPU)


def test_the_first_of_equals_wins():
    """Also where rounding alone made them unequal."""
    graph = g.Graph((g.MaxPool2d("pool", (g.INPUT,), (2, 2), (2, 2)), g.Flatten("flat", ("pool",)),
                     g.Dense("scores", ("flat",), np.ones((1, 2)))), (1, 2, 4), (0.0, 1.0))
    almost = np.nextafter(np.float32(0.7), np.float32(1))
    picture = np.float32([[[0.1, 0.7, 0.2, 0.3], [0.7, almost, 0.3, 0.3]]])
    e = on_gpu(graph)(picture)
    np.testing.assert_array_equal(e.relevance[0, 0] > 0, [[False, True, False, True], [False, False, False, False]])


@pytest.mark.parametrize(("rule", "hidden"), [("zB", ""), ("w2", ""), ("z+", "relu"), ("z+", "real"), ("flat", "relu")])
def test_add(rule, hidden):
    check(lambda source: g.Add("tested", (source, source)), (3, 5, 4), rule, hidden, count=3, **ON_GPU)


@pytest.mark.parametrize("rule", ["z+", "epsilon(epsilon=0.5)", "flat"])
@pytest.mark.parametrize("kind", ["add", "average", "global"])
def test_formulas_of_layers_without_weights(kind, rule):
    """Values of both signs in and out."""
    tested = {"add": g.Add("tested", ("conv", "other")),
              "average": g.AveragePool2d("tested", ("conv",), (2, 3), (1, 2), (1, 0, 0, 1)),
              "global": g.GlobalAveragePool("tested", ("conv",))}[kind]
    other = [g.Conv2d("other", ("conv",), weights(2, 4, 4, 1, 1))] if kind == "add" else []
    graph = g.Graph((g.Conv2d("conv", (g.INPUT,), weights(0, 4, 2, 2, 2)), *other, tested,
                     g.Flatten("flat", ("tested",)),
                     g.Dense("scores", ("flat",), weights(1, 3, int(np.prod(tested.output_shape([(4, 4, 3)] * 2)))))),
                    (2, 5, 4), None)
    assert assert_like_the_oracle(graph, {"tested": rule, "scores": "epsilon(epsilon=0.5)"}).relevance.any()


# ---- What passes relevance on ----------------------------------------------------------------------------------------


def between(*layers, box=(-1.0, 2.0)):
    """Layers, the last of them "tested", between convolutions; the first makes values of both signs, of shape (4, 4,
    3)."""
    shapes = {"conv": (4, 4, 3)}
    for layer in layers:
        shapes[layer.name] = layer.output_shape([shapes[name] for name in layer.inputs])
    channels, *size = shapes["tested"]
    return g.Graph((g.Conv2d("conv", (g.INPUT,), weights(0, 4, 2, 2, 2), 0.3 * weights(1, 4, 1)[:, 0]), *layers,
                    g.Conv2d("after", ("tested",), weights(2, 6, channels, 1, 1)), g.ReLU("relu", ("after",)),
                    g.Flatten("flat", ("relu",)), g.Dense("scores", ("flat",), weights(3, 3, 6 * int(np.prod(size))))),
                   (2, 5, 4), box)


PASSING = {
    "leaky ReLU": [g.LeakyReLU("tested", ("conv",), 0.1)],
    "ReLU, and what it reads": [g.ReLU("r", ("conv",)), g.Concat("tested", ("r", "conv"))],
    "clip of both signs": [g.LeakyReLU("leaky", ("conv",), 0.2), g.Clip("tested", ("leaky",), -0.1, 0.3)],
    "fused clip": [g.Clip("tested", ("conv",), 0, 0.3)],
    "power": [g.Power("tested", ("conv",), 1.5)],
    "root": [g.Power("tested", ("conv",), 0.5)],
    "concatenation of what lies elsewhere": [g.ReLU("r", ("conv",)), g.Concat("both", ("r", "r")),
                                             g.Concat("tested", ("both", "conv"))],
    "rearrangement with zeros, some numbers twice, some never": [g.Rearrange("tested", ("conv",),
                                                                             np.random.default_rng(0).integers(
        -1, 48, (5, 2, 3)))],
    "rearrangement, beside another reader": [
        g.Rearrange("moved", ("conv",), np.random.default_rng(1).integers(0, 48, (4, 4, 3))),
        g.Add("tested", ("conv", "moved"))],
    "flatten, beside another reader": [g.Flatten("one", ("conv",)), g.Flatten("other", ("conv",)),
                                       g.Add("tested", ("one", "other"))],
    "concatenation of which another reads a part": [
        g.ReLU("r", ("conv",)), g.LeakyReLU("leaky", ("conv",), 0.2), g.Concat("both", ("r", "leaky")),
        g.LeakyReLU("of both", ("both",), 0.3), g.LeakyReLU("of one", ("r",), 0.5),
        g.Concat("tested", ("of both", "of one"))],
    "norm across channels": [g.LocalResponseNorm("tested", ("conv",), 3, 2.0, 0.75, 1.0)],
    "norm across an even number": [g.LocalResponseNorm("tested", ("conv",), 2, 2.0, 0.5, 2.0)],
    "norm within channels": [g.LocalResponseNorm("tested", ("conv",), 3, 2.0, 0.75, 1.0, True)],
}


@pytest.mark.parametrize("case", PASSING)
def test_what_passes_relevance_on(case):
    assert assert_like_the_oracle(between(*PASSING[case])).relevance.any()


@pytest.mark.parametrize("case", [case for case in PASSING if case.startswith("norm")])
def test_taylor_of_normalisation(case):
    e = assert_like_the_oracle(between(*PASSING[case], box=None), {"tested": "taylor(epsilon=0.1)"})
    assert np.abs(e.ledger["tested"]).max() > 0


# ---- Derivatives -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", DERIVATIVES)
def test_derivatives(preset):
    """The oracle has none; tests/peers hold the processor's to PyTorch."""
    graph = between(g.LocalResponseNorm("norm", ("conv",), 3, 2.0), g.LeakyReLU("leaky", ("norm",), 0.1),
                    g.MaxPool2d("max", ("leaky",), (2, 2), (1, 1)), g.AveragePool2d("average", ("leaky",), (2, 2)),
                    g.Add("sum", ("max", "average")), g.Concat("both", ("sum", "max")),
                    g.Clip("clip", ("both",), -0.2, 0.4), g.Power("tested", ("clip",), 2.0))
    assert assert_like_the_processor(graph, preset, pictures(graph, 3)).relevance.any()


@pytest.mark.parametrize("case", PASSING)
def test_derivatives_of_what_passes_relevance_on(case):
    graph = between(*PASSING[case])
    assert assert_like_the_processor(graph, "gradient", pictures(graph, 2)).relevance.any()


# ---- Whole networks --------------------------------------------------------------------------------------------------


@few
@given(graphs_and_rules(), st.integers(1, 4))
def test_agrees_with_the_processor(case, count):
    graph, rules = case
    describe(graph)
    note(rules)
    e = assert_like_the_processor(graph, rules, pictures(graph, count))
    assert (e.relevance >= 0).all()
    assert all((lost >= 0).all() for lost in e.ledger.values())
    np.testing.assert_allclose(e.relevance.sum((1, 2, 3), dtype=np.float64) + e.absorbed, e.explained, rtol=1e-5)


@few
@given(graphs_and_rules(signed=True), st.integers(1, 3))
def test_signed_rules_agree_with_the_processor(case, count):
    graph, rules = case
    describe(graph)
    note(rules)
    assert_like_the_processor(graph, rules, pictures(graph, count))


@settings(few, max_examples=6)
@given(graphs(), st.randoms(use_true_random=False))
def test_same_bits_in_any_batch_and_place(graph, random):
    describe(graph)
    made, batch = on_gpu(graph), pictures(graph, 5)
    together, order = explain(made, batch), random.sample(range(5), 5)
    shuffled, alone = explain(made, batch[order]), explain(made, batch[order[:1]])
    for part, places in ((shuffled, order), (alone, order[:1])):
        np.testing.assert_array_equal(part.relevance, together.relevance[places])
        np.testing.assert_array_equal(part.output, together.output[places])
        for name, lost in part.ledger.items():
            np.testing.assert_array_equal(lost, together.ledger[name][places])


def test_dense_layers_give_the_same_bits_in_any_batch():
    """Images are taken in groups of 32."""
    layers = (g.Dense("hidden", (g.INPUT,), weights(0, 70, 6)), g.ReLU("r", ("hidden",)),
              g.Dense("scores", ("r",), weights(1, 3, 70)))
    made = on_gpu(g.Graph(layers, (6, 1, 1), (-1.0, 2.0)))
    batch = np.random.default_rng(1).uniform(-1, 2, (35, 6, 1, 1)).astype(np.float32)
    together = explain(made, batch, 1)
    for first, last in ((0, 1), (31, 33), (34, 35), (3, 35)):
        part = explain(made, batch[first:last], 1)
        np.testing.assert_array_equal(part.output, together.output[first:last])
        np.testing.assert_array_equal(part.relevance, together.relevance[first:last])


def test_relevance_at_every_layer():
    graph = between(*PASSING["ReLU, and what it reads"])
    batch = pictures(graph, 2)
    ours, theirs = (explain(made(graph), batch, 0) for made in (on_gpu, on_processor))
    for name, shape in graph.shapes.items():
        expected = theirs.at(name)
        assert expected.shape == (2, *shape)
        assert expected.any()
        np.testing.assert_allclose(ours.at(name), expected, atol=1e-5 * np.abs(expected).max())
    flow = ours.flow()
    for name, came in theirs.flow().items():
        np.testing.assert_allclose(flow[name], came, atol=1e-5 * theirs.explained.max())


@pytest.mark.parametrize("rules", ["dtd", {"scores": "flat"}])
def test_any_start(rules):
    """The scores carry their relevance as a factor, and as it is."""
    graph = between(*PASSING["leaky ReLU"])
    start = np.random.default_rng(4).random((3, 3), np.float32)
    e = assert_like_the_oracle(graph, rules, start=start)
    np.testing.assert_allclose(e.explained, start.sum(1))


def test_one_picture_of_one_channel():
    graph = g.Graph((g.Conv2d("conv", (g.INPUT,), weights(0, 3, 1, 2, 2), np.ones(3)), g.ReLU("relu", ("conv",)),
                     g.GlobalAveragePool("scores", ("relu",))), (1, 4, 5), (0.0, 1.0))
    assert assert_like_the_oracle(graph, batch=pictures(graph, 1)).relevance.any()


@pytest.mark.parametrize("box", [None, (-1.0, 1.0)])
def test_nothing_comes_of_nothing(box):
    """No input, no bias: all sums are zero, and nothing is divided by them."""
    e = explain(on_gpu(small(box)), np.zeros((2, 2, 6, 5), np.float32), 0)
    assert not e.output.any()
    assert not e.relevance.any()
    assert not e.absorbed.any()


def test_what_dead_units_absorb_is_in_the_ledger():
    """Units that are active by their bias alone, in every layer that can have such."""
    graph = g.Graph((g.Conv2d("conv", (g.INPUT,), -np.ones((5, 1, 1, 1)), np.full(5, 2.0)), g.ReLU("r", ("conv",)),
                     g.Flatten("flat", ("r",)), g.Dense("scores", ("flat",), -np.ones((1, 30)), [70.0])), (1, 2, 3),
                    None)
    e = assert_like_the_oracle(graph, {"conv": "z+", "scores": "z+"}, np.full((2, 1, 2, 3), 0.5, np.float32))
    assert not e.relevance.any()
    np.testing.assert_allclose(e.ledger["scores"], e.explained)


# ---- All of them -----------------------------------------------------------------------------------------------------


def kernels_in(tree, outside=""):
    """Qualified names of the functions that are made kernels: by @kernel, or by kernel(function, ...)."""
    made = {node.args[0].id for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) ==
            "kernel"}
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef):
            if node.name in made or "kernel" in map(ast.unparse, node.decorator_list):
                yield outside + node.name
            yield from kernels_in(node, f"{outside}{node.name}.<locals>.")


def test_every_kernel_was_launched(record):
    launched, ran = record
    if missing := {name for name in globals() if name.startswith("test_")} - ran:
        pytest.skip(f"needs all tests of this file, and {min(missing)} did not run")
    assert launched == {(path.stem, name) for path in KERNELS.glob("*.py")
                        for name in kernels_in(ast.parse(path.read_text()))}
