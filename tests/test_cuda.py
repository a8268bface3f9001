"""Kernels for GPUs, in a simulator (tests/lockstep.py). tests/test_cuda_compiled.py looks at their machine code."""

import ast
from pathlib import Path

import naive
import numpy as np
import pytest
from explaining import assert_first_of_equals_wins, describe, explain, small, to_the_middle, two_layers
from fastdtd.kernels import cuda as device_kernels
from fastdtd.kernels.cuda import vector_code
from graphs import graphs, graphs_and_rules, images
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st
from layers import BOX, KEPT, NON_NEGATIVE, every_example, weights
from single_layers import check, check_signed, rules_of_both_signs

from fastdtd import graph as g
from fastdtd.explainer import Explainer
from fastdtd.model import Model, Preprocessing
from fastdtd.rules import DERIVATIVES, search_direction

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("simulator")]
few = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
KERNELS = Path(device_kernels.__file__).parent
SHORT_TILE = "3 to 5"  # of tensor cores
ON_GPU = {"device": "cuda", "precision": "fp32"}
TOLERANCES = {"tf32": 5e-4, "3xtf32": 1e-6}


def long(*values):
    """A case of `make test-cuda` alone, for it takes seconds."""
    return pytest.param(*values, marks=pytest.mark.cuda)


def on_gpu(graph, rules="dtd"):
    return Explainer(Model(graph, Preprocessing(None)), rules, **ON_GPU)


def on_processor(graph, rules="dtd"):
    return Explainer(Model(graph, Preprocessing(None)), rules, threads=1)


def assert_like_the_oracle(graph, rules="dtd", batch=None, tolerance=1e-5, start=None):
    """The explanation of the images' winners, or from `start`; tolerance: of scores, relevance and ledger."""
    made, batch = on_gpu(graph, rules), images(graph, 3) if batch is None else batch
    e = explain(made, batch) if start is None else made(batch, start=start)
    names = {name: rule.rule for name, rule in made.rules.items()}
    for i, image in enumerate(batch):
        relevance, scores, absorbed = naive.explain(graph, image, e.target[i], names, None if start is None
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


# ---- Single layers ---------------------------------------------------------------------------------------------------


def simulated():
    """Each example with each of its kind's rules. In `make test` too are all rules of one example and one of others."""
    for kind, entry in KEPT.items():
        for i, (name, example) in enumerate(entry.examples.items()):
            for j, (rule, domain) in enumerate(entry.rules if example.on_gpu else ()):
                short = example.on_gpu == "short" and (name == entry.short or (i - j) % len(entry.rules) == 0)
                yield (pytest.param if short else long)(kind, name, rule, domain)


@pytest.mark.parametrize(("kind", "example", "rule", "domain"), list(simulated()))
def test_like_the_oracle(kind, example, rule, domain):
    check(KEPT[kind].examples[example], rule, domain, **ON_GPU)


@pytest.mark.parametrize(("kind", "example", "rule", "domain"), [
    (pytest.param if i % 3 == 0 else long)(*case) for i, case in enumerate(rules_of_both_signs())])
def test_rules_of_both_signs_are_like_the_oracle(kind, example, rule, domain):
    check_signed(KEPT[kind].examples[example], rule, domain, **ON_GPU)


@pytest.mark.parametrize(("example", "precision", "rule", "domain"), [
    (pytest.param if name == SHORT_TILE else long)(name, *case)
    for kind, name in every_example(["conv2d"]) for case in KEPT[kind].examples[name].tensor_cores
])
def test_tensor_cores(example, precision, rule, domain):
    """Lane by lane: which of a warp holds which values, and what is cut off where."""
    check(KEPT["conv2d"].examples[example], rule, domain, device="cuda", precision=precision,
          tolerance=TOLERANCES[precision])


@pytest.mark.parametrize("example", [SHORT_TILE, long("10 to 22"), long("48 to 40")])
def test_copies_that_are_there_at_once(example, monkeypatch):
    """In the other tests they are there as late as can be."""
    monkeypatch.setattr(vector_code, "copies_are_late", False)
    check(KEPT["conv2d"].examples[example], "z+", NON_NEGATIVE, device="cuda", precision="tf32",
          tolerance=TOLERANCES["tf32"])


@pytest.mark.parametrize(("example", "count", "rule", "domain"), [
    ("3 to 5", 1, "zB", BOX), ("3 to 5", 35, "zB", BOX), long("17 to 40", 35, "z+", NON_NEGATIVE),
    long("17 to 40", 35, "zB", BOX)])
def test_dense_layers_of_many_images(example, count, rule, domain):
    """One, and more than a block takes."""
    check(KEPT["dense"].examples[example], rule, domain, count, **ON_GPU)


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


def test_the_first_of_equals_wins():
    assert_first_of_equals_wins(on_gpu)


# ---- What passes relevance on ----------------------------------------------------------------------------------------


def between(*layers, shape=(4, 4, 3), box=(-1.0, 2.0)):
    """Layers, the last of them "tested", between convolutions; the first makes values of both signs, of the shape."""
    channels, height, width = shape
    shapes = {"conv": shape}
    for layer in layers:
        shapes[layer.name] = layer.output_shape([shapes[name] for name in layer.inputs])
    outputs, *size = shapes["tested"]
    return g.Graph((
        g.Conv2d("conv", (g.INPUT,), weights(0, channels, 2, 2, 2), 0.3 * weights(1, channels, 1)[:, 0]), *layers,
        g.Conv2d("after", ("tested",), weights(2, 6, outputs, 1, 1)), g.ReLU("relu", ("after",)),
        g.Flatten("flat", ("relu",)), g.Dense("scores", ("flat",), weights(3, 3, 6 * int(np.prod(size)))),
    ), (2, height + 1, width + 1), box)


CONNECTED = {  # what passes relevance on in ways that hang on other layers
    "ReLU, and what it reads": [g.ReLU("r", ("conv",)), g.Concat("tested", ("r", "conv"))],
    "clip of both signs": [g.LeakyReLU("leaky", ("conv",), 0.2), g.Clip("tested", ("leaky",), -0.1, 0.3)],
    "concatenation of what lies elsewhere": [
        g.ReLU("r", ("conv",)), g.Concat("both", ("r", "r")), g.Concat("tested", ("both", "conv"))],
    "rearrangement, beside another reader": [
        g.Rearrange("moved", ("conv",), np.random.default_rng(1).integers(0, 48, (4, 4, 3))),
        g.Add("tested", ("conv", "moved"))],
    "flatten, beside another reader": [
        g.Flatten("one", ("conv",)), g.Flatten("other", ("conv",)), g.Add("tested", ("one", "other"))],
    "concatenation of which another reads a part": [
        g.ReLU("r", ("conv",)), g.LeakyReLU("leaky", ("conv",), 0.2), g.Concat("both", ("r", "leaky")),
        g.LeakyReLU("of both", ("both",), 0.3), g.LeakyReLU("of one", ("r",), 0.5),
        g.Concat("tested", ("of both", "of one"))],
}
PASSING = CONNECTED | {  # the network's own layers read and are read by others than in test_like_the_oracle
    f"{kind}, {name}": [KEPT[kind].examples[name].make("tested", *["conv"] * KEPT[kind].examples[name].inputs)]
    for kind, name in every_example(["leaky_relu", "clip", "power", "activation", "multiply", "rearrange",
                                     "local_response_norm"])
    if KEPT[kind].examples[name].shapes in ([(4, 4, 3)], [(4, 4, 3)] * 2)
}


@pytest.mark.parametrize("case", PASSING)
def test_what_passes_relevance_on(case):
    assert assert_like_the_oracle(between(*PASSING[case])).relevance.any()


@pytest.mark.parametrize("case", [case for case in PASSING if case.startswith("local_response_norm")])
def test_taylor_of_normalisation(case):
    e = assert_like_the_oracle(between(*PASSING[case], box=None), {"tested": "taylor(epsilon=0.1)"})
    assert np.abs(e.ledger["tested"]).max() > 0


# ---- Derivatives -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", DERIVATIVES)
def test_derivatives(preset):
    """The oracle has none; tests/peers hold the processor's to PyTorch."""
    scale, shift = [1.0, -0.5, 2.0, 0.7], [0.1, 0.0, -0.2, 0.3]
    graph = between(g.LocalResponseNorm("norm", ("conv",), 3, 2.0), g.GroupNorm("groups", ("norm",), scale, shift, 2),
                    g.GroupNorm("layer", ("groups",), scale, shift, per_position=True),
                    g.GroupNorm("squares", ("layer",), scale, shift, centered=False),
                    g.LeakyReLU("leaky", ("squares",), 0.1),
                    g.MaxPool2d("max", ("leaky",), (2, 2), (1, 1)), g.AveragePool2d("average", ("leaky",), (2, 2)),
                    g.Add("sum", ("max", "average")), g.Concat("both", ("sum", "max")),
                    g.Clip("clip", ("both",), -0.2, 0.4), g.Power("tested", ("clip",), 2.0))
    assert assert_like_the_processor(graph, preset, images(graph, 3)).relevance.any()


@pytest.mark.parametrize("case", PASSING)
def test_derivatives_of_what_passes_relevance_on(case):
    graph = between(*PASSING[case])
    assert assert_like_the_processor(graph, "gradient", images(graph, 2)).relevance.any()


# ---- Whole networks --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("examples", [3, long(25)])
def test_agrees_with_the_processor(examples):
    @settings(few, max_examples=examples)
    @given(graphs_and_rules(), st.integers(1, 4))
    def agrees(case, count):
        graph, rules = case
        describe(graph)
        note(rules)
        e = assert_like_the_processor(graph, rules, images(graph, count))
        assert (e.relevance >= 0).all()
        assert all((lost >= 0).all() for lost in e.ledger.values())
        np.testing.assert_allclose(e.relevance.sum((1, 2, 3), dtype=np.float64) + e.absorbed, e.explained, rtol=1e-5)

    agrees()


@pytest.mark.parametrize("examples", [3, long(25)])
def test_signed_rules_agree_with_the_processor(examples):
    @settings(few, max_examples=examples)
    @given(graphs_and_rules(signed=True), st.integers(1, 3))
    def agrees(case, count):
        graph, rules = case
        describe(graph)
        note(rules)
        assert_like_the_processor(graph, rules, images(graph, count))

    agrees()


@pytest.mark.parametrize("examples", [1, long(6)])
def test_same_bits_in_any_batch_and_order(examples):
    @settings(few, max_examples=examples)
    @given(graphs(), st.randoms(use_true_random=False))
    def same_bits(graph, random):
        describe(graph)
        made, batch = on_gpu(graph), images(graph, 5)
        together, order = explain(made, batch), random.sample(range(5), 5)
        shuffled, alone = explain(made, batch[order]), explain(made, batch[order[:1]])
        for part, indices in ((shuffled, order), (alone, order[:1])):
            np.testing.assert_array_equal(part.relevance, together.relevance[indices])
            np.testing.assert_array_equal(part.output, together.output[indices])
            for name, lost in part.ledger.items():
                np.testing.assert_array_equal(lost, together.ledger[name][indices])

    same_bits()


@pytest.mark.parametrize("hidden", [5, long(70)])
def test_dense_layers_give_the_same_bits_in_any_batch(hidden):
    """Images are taken in groups of 32."""
    layers = (g.Dense("hidden", (g.INPUT,), weights(0, hidden, 6)), g.ReLU("r", ("hidden",)),
              g.Dense("scores", ("r",), weights(1, 3, hidden)))
    made = on_gpu(g.Graph(layers, (6, 1, 1), (-1.0, 2.0)))
    batch = np.random.default_rng(1).uniform(-1, 2, (35, 6, 1, 1)).astype(np.float32)
    together = explain(made, batch, 1)
    for first, last in ((0, 1), (31, 33), (34, 35), (3, 35)):
        part = explain(made, batch[first:last], 1)
        np.testing.assert_array_equal(part.output, together.output[first:last])
        np.testing.assert_array_equal(part.relevance, together.relevance[first:last])


@pytest.mark.parametrize("every", [False, long(True)])
def test_relevance_at_layers(every):
    graph = between(*CONNECTED["ReLU, and what it reads"])
    batch = images(graph, 2)
    ours, theirs = (explain(made(graph), batch, 0) for made in (on_gpu, on_processor))
    for name in graph.shapes if every else ["r"]:
        expected = theirs.at(name)
        assert expected.shape == (2, *graph.shapes[name])
        assert expected.any()
        np.testing.assert_allclose(ours.at(name), expected, atol=1e-5 * np.abs(expected).max())
    if every:
        flow = ours.flow()
        for name, came in theirs.flow().items():
            np.testing.assert_allclose(flow[name], came, atol=1e-5 * theirs.explained.max())


@pytest.mark.filterwarnings("ignore::fastdtd.ExplanationWarning")
@pytest.mark.parametrize("options", [{"against": 1}, {"against": "softmax-gradient"}, {"through": {"r": [0, 2]}}],
                         ids=str)
def test_held_against_others_and_through_channels(options):
    graph = between(*CONNECTED["ReLU, and what it reads"])
    batch = images(graph, 2)
    ours, theirs = (made(graph)(batch, 0, **options) for made in (on_gpu, on_processor))
    assert theirs.relevance.any()
    np.testing.assert_allclose(ours.relevance, theirs.relevance, atol=1e-5 * np.abs(theirs.relevance).max())
    for name, cut in theirs.cut.items():
        assert cut.any()
        np.testing.assert_allclose(ours.cut[name], cut, rtol=1e-4)


@pytest.mark.parametrize("rules", ["dtd", {"scores": "flat"}])
def test_any_start(rules):
    """The scores carry their relevance as a factor, and as it is."""
    graph = between(*PASSING["leaky_relu, slope 0.1"])
    start = np.random.default_rng(4).random((3, 3), np.float32)
    e = assert_like_the_oracle(graph, rules, start=start)
    np.testing.assert_allclose(e.explained, start.sum(1))


def test_one_image_of_one_channel():
    graph = g.Graph((g.Conv2d("conv", (g.INPUT,), weights(0, 3, 1, 2, 2), np.ones(3)), g.ReLU("relu", ("conv",)),
                     g.GlobalAveragePool("scores", ("relu",))), (1, 4, 5), (0.0, 1.0))
    assert assert_like_the_oracle(graph, batch=images(graph, 1)).relevance.any()


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


def test_every_kernel_is_launched(monkeypatch):
    """By a short case of each layer, rule and way to ask; where one is missing here, add it."""
    from numba.cuda.simulator import kernel
    run, launched = kernel.BlockManager.run, set()

    def run_and_record(manager, *arguments):
        launched.add((manager._f.__module__.rpartition(".")[2], manager._f.__qualname__))
        run(manager, *arguments)

    monkeypatch.setattr(kernel.BlockManager, "run", run_and_record)
    check(KEPT["conv2d"].examples[SHORT_TILE], "z+", NON_NEGATIVE, count=1, device="cuda", precision="tf32",
          tolerance=TOLERANCES["tf32"])
    for kind, rule in (("conv2d", "zB"), ("conv2d", "flat"), ("dense", "z+"), ("max_pool2d", "winner"),
                       ("max_pool2d", "proportional"), ("average_pool2d", "w2"), ("global_average_pool", "zB"),
                       ("add", "zB"), ("power", ""), ("activation", ""), ("multiply", "half"), ("resize", "zB"),
                       ("softmax", ""), ("group_norm", "z+"), ("rearrange", ""), ("local_response_norm", "identity")):
        check(KEPT[kind].examples[KEPT[kind].short], rule, BOX, count=1, **ON_GPU)
    for kind, rule in (("local_response_norm", "taylor(epsilon=0.1)"), ("conv2d", "epsilon(epsilon=0.5)"),
                       ("dense", "epsilon(epsilon=0.5, bias=shared)"), ("add", "epsilon(epsilon=0.5)")):
        check_signed(KEPT[kind].examples[KEPT[kind].short], rule, BOX, count=1, **ON_GPU)
    graph = two_layers((-1.0, 2.0))
    assert_like_the_oracle(graph, {"hidden": search_direction(lambda a, w: a if a * w > 0 else 0)}, images(graph, 1))
    assert explain(on_gpu(graph), images(graph, 1)).at("relu").any()
    assert_like_the_oracle(between(*CONNECTED["concatenation of which another reads a part"]))
    assert launched == {(path.stem, name) for path in KERNELS.glob("*.py")
                        for name in kernels_in(ast.parse(path.read_text()))}
