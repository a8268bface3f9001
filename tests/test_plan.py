"""Plans from inside: what shares memory, what is copied, what is read before it is written, what goes back through a
tensor.
"""

from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import naive
import numpy as np
import pytest
from fastdtd.kernels import cpu
from graphs import graphs, graphs_and_rules, images
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastdtd import graph as g
from fastdtd import lowering
from fastdtd.errors import InputError
from fastdtd.lowering import lower
from fastdtd.lowering.aliasing import locations
from fastdtd.plan import Plan
from fastdtd.rules import assign
from fastdtd.schedule import View, _in_order_of_time, lay_out


@pytest.fixture(params=["all", "half", "none"])
def early(request, monkeypatch):
    """How many layers are computed image by image: in small networks none are, unless they are told to be."""
    parts = {"all": 1.0, "half": 0.5, "none": 0.0}
    monkeypatch.setattr(lowering, "_early_layers", lambda graph, layers: int(parts[request.param] * len(layers)))


quick = settings(max_examples=50, deadline=None,
                 suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large,
                                        HealthCheck.function_scoped_fixture])


def plan_of(graph, rules="dtd", batch=1, workers=1):
    return Plan(lower(graph, assign(graph, rules), cpu).schedule(batch, workers), cpu)


def run(plan, batch, submit=None):
    """(scores, relevance, ledger) of each image's first class."""
    plan.input[:] = batch
    scores = np.empty(plan.output.shape, np.float32)

    def begin():
        scores[:] = plan.output
        plan.start[:] = 0
        plan.start[:, 0] = np.maximum(scores[:, 0], 0) if plan.schedule.starts_with_relevance else scores[:, 0] > 0

    plan.explain(begin, submit)
    return scores, plan.relevance.copy(), plan.ledger.copy()


def conv(name, source, channels, outputs, kernel=1):
    weight = np.random.default_rng(len(name)).standard_normal((outputs, channels, kernel, kernel))
    return g.Conv2d(name, (source,), weight, 0.1 * np.ones(outputs), padding=(kernel // 2,) * 4)


def scored(*layers, shape, box=(-1.0, 1.0)):
    """A network that gives the last layer's channels one score each."""
    return g.Graph((*layers, g.GlobalAveragePool("mean", (layers[-1].name,)), g.ReLU("scores", ("mean",))), shape, box)


# ---- Memory ----------------------------------------------------------------------------------------------------------


@quick
@given(graphs_and_rules())
def test_buffers_alive_together_do_not_overlap(early, case):
    schedule = plan_of(*case, batch=3).schedule
    alive = {}  # from the steps themselves, not from what the layout was told
    for number, step in enumerate(schedule.steps):
        for view in step.arguments:
            if isinstance(view, View):
                buffer = schedule.buffers[view.buffer]
                assert np.prod(view.shape) * buffer.images <= buffer.elements
                assert buffer.images == 3 or (buffer.images == step.images == 1 and view.image is None)
                first, _ = alive.get(view.buffer, (number, number))
                alive[view.buffer] = (first, number)
    middle, end = schedule.forward_steps, len(schedule.steps)
    for tensor, written, read in [(schedule.input, -1, 0), (schedule.output, 0, middle),
                                  (schedule.start, middle, middle), (schedule.relevance, end, end)]:
        first, last = alive.get(tensor.view.buffer, (written, read))
        # the caller's writing and reading
        alive[tensor.view.buffer] = (first if written == 0 else min(first, written), max(last, read))
    buffers = sorted(alive, key=lambda buffer: schedule.buffers[buffer].offset)
    for i, low in enumerate(buffers):
        end_of_low = schedule.buffers[low].offset + schedule.buffers[low].elements
        assert end_of_low <= schedule.workspace_elements
        for high in buffers[i + 1:]:
            together = alive[low][0] <= alive[high][1] and alive[high][0] <= alive[low][1]
            assert not together or end_of_low <= schedule.buffers[high].offset


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 99), st.integers(0, 30), st.integers(0, 9)), min_size=1, max_size=60),
       st.booleans())
def test_layouts_of_any_lifetimes(given, in_order_of_time):
    """Both ways of laying buffers out: none overlaps another that is alive with it, all within the size, at whole cache
    lines.
    """
    lifetimes = [(elements, first, first + length) for elements, first, length in given]
    sizes = [-(-elements // 16) * 16 for elements, _, _ in lifetimes]
    offsets, size = _in_order_of_time(sizes, lifetimes) if in_order_of_time else lay_out(lifetimes)
    for i, (_, first, last) in enumerate(lifetimes):
        assert offsets[i] % 16 == 0
        assert offsets[i] + sizes[i] <= size
        for j in range(i):
            if sizes[i] and sizes[j] and lifetimes[j][1] <= last and first <= lifetimes[j][2]:
                assert offsets[i] + sizes[i] <= offsets[j] or offsets[j] + sizes[j] <= offsets[i]


@quick
@given(graphs_and_rules())
def test_nothing_reads_what_was_not_written(early, case):
    graph, rules = case
    plan, batch = plan_of(graph, rules, batch=3), images(graph, 3)
    expected = run(plan, batch)
    for poison in (np.nan, 1e30):
        plan._workspace[:] = poison
        plan.ledger[:] = np.nan
        for step in range(len(plan.schedule.steps)):
            arrays = [argument for argument in plan.arguments(step) if isinstance(argument, np.ndarray)]
            for scratch in arrays:  # blocks and tiles; dead flags are the plan's memory between runs
                if scratch.flags.writeable and not np.shares_memory(scratch, plan._workspace):
                    scratch[...] = 0 if scratch.dtype == np.uint8 else poison
        for ours, theirs in zip(run(plan, batch), expected, strict=True):
            np.testing.assert_array_equal(ours, theirs)


@quick
@given(graphs_and_rules(signed=True), st.integers(2, 4), st.integers(1, 2), st.data())
def test_layers_computed_image_by_image(case, batch, workers, data):
    """The same bits, however many of the layers they are."""
    graph, rules = case
    network, inputs = lower(graph, assign(graph, rules), cpu), images(graph, batch)
    observed = [g.INPUT, graph.layers[0].name]
    found = []
    for early in (0, data.draw(st.integers(1, len(graph.layers)), label="early")):
        with mock.patch.object(lowering, "_early_layers", return_value=early), ThreadPoolExecutor(workers) as pool:
            for names in ((), observed):
                plan = Plan(network.schedule(batch, workers, names), cpu)
                found.append((*run(plan, inputs, pool.submit), *plan.observed.values()))
    for one, other in ((found[0], found[2]), (found[1], found[3])):
        for ours, theirs in zip(one, other, strict=True):
            np.testing.assert_array_equal(ours, theirs)


# (kernels that are to divide an image, whether Winograd's algorithm is taken, below which density zeros are skipped,
# bytes of V beyond which workers divide its channels)
DIVISIONS = [("conv2d", False, 0.0, 0), ("winograd2d", True, 0.0, 0), ("sparse2d", False, 2.0, 0),
             ("sparse2d", False, 2.0, 1 << 40)]


@pytest.mark.parametrize("workers", [2, 3, 4])
@pytest.mark.parametrize(("name", "winograd", "below", "most"), DIVISIONS)
@pytest.mark.parametrize(("size", "groups"), [((29, 31), 1), ((13, 14), 2), ((6, 5), 1)])
def test_workers_that_share_an_image_give_the_bits_of_one(monkeypatch, name, winograd, below, most, size, groups,
                                                          workers):
    """Whether they divide positions, tiles, outputs or the inputs' channels, in units of one block or of several."""
    monkeypatch.setattr(cpu, "winograd2d_pays", lambda *_: winograd)
    monkeypatch.setattr(cpu, "sparse2d_below", lambda features, taps, box, used: 0.0 if box else below)
    monkeypatch.setattr(cpu.sparse, "_MOST_BYTES", most)
    weight = np.random.default_rng(5).standard_normal((26, 256 // groups, 3, 3)) / 40
    tested = g.Conv2d("tested", ("relu",), weight, 0.1 * np.ones(26), padding=(1,) * 4, groups=groups)
    graph = scored(conv("first", g.INPUT, 2, 256), g.ReLU("relu", ("first",)), tested, shape=(2, *size))
    batch, alone = images(graph, 1, seed=6), plan_of(graph)
    expected = run(alone, batch)
    assert expected[1].any()
    shared = plan_of(graph, workers=workers)
    if below == 0 or groups == 1:
        for direction in ("forward", "redistribute")[below > 0:]:
            units = [step.units for step in shared.schedule.steps
                     if step.layer == "tested" and step.name == f"{name}_{direction}"]
            assert max(units) >= workers
    with ThreadPoolExecutor(workers) as pool:
        for ours, theirs in zip(run(shared, batch, pool.submit), expected, strict=True):
            np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("workers", [2, 3, 5])
@pytest.mark.parametrize("rules", ["dtd", {"blind": "epsilon"}], ids=["dtd", "epsilon"])
def test_workers_absorb_what_one_does(rules, workers):
    """The same bits: neurons with a bias that no input supports, in half of the channels; and stabilisers."""
    weight = np.random.default_rng(7).standard_normal((12, 6, 3, 3)) / 8
    weight[::2] = -abs(weight[::2])
    blind = g.Conv2d("blind", ("relu",), weight, 2 * np.ones(12), padding=(1,) * 4)
    graph = scored(conv("first", g.INPUT, 2, 6), g.ReLU("relu", ("first",)), blind, g.ReLU("last", ("blind",)),
                   shape=(2, 9, 7))
    batch = images(graph, 2, seed=8)
    expected = run(plan_of(graph, rules, 2), batch)
    column = plan_of(graph, rules).schedule.ledger_layers.index("blind")
    assert (expected[2][:, column] > 0.1 * expected[0][:, 0]).all()
    with ThreadPoolExecutor(workers) as pool:
        for ours, theirs in zip(run(plan_of(graph, rules, 2, workers), batch, pool.submit), expected, strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_which_layers_are_computed_image_by_image():
    """The first ones whose tensors are large, but not where there is one image, or where weights are large."""
    layers = (conv("a", g.INPUT, 4, 8, 3), conv("b", "a", 8, 8, 3), g.MaxPool2d("max", ("b",), (8, 8), (8, 8)),
              conv("c", "max", 8, 64))
    graph = scored(*layers, shape=(4, 96, 96))
    schedule = plan_of(graph, batch=3).schedule
    assert {step.layer for step in schedule.steps if step.images == 1} == {"a", "b", "max"}
    assert {step.layer for step in schedule.steps if step.images == 3} == {"c", "mean", "scores"}
    wide = scored(conv("a", g.INPUT, 256, 256, 3), shape=(256, 24, 24))
    assert {step.images for step in plan_of(wide, batch=3).schedule.steps} == {3}


def test_memory_is_used_again():
    layers, source = [], g.INPUT
    for i in range(20):
        layers += [conv(f"conv{i}", source, 4, 4), g.ReLU(f"relu{i}", (f"conv{i}",))]
        source = f"relu{i}"
    plan = plan_of(scored(*layers, shape=(4, 8, 8)))
    tapes = 20 * 4 * 8 * 8  # the ratios, which have to wait for the way back
    assert plan.schedule.workspace_elements <= tapes + 3 * 4 * 8 * 8 + 10 * 16


# ---- Concatenations --------------------------------------------------------------------------------------------------


def copies(plan):
    return sum(step.kernel is cpu.copy_forward for step in plan.schedule.steps)


def fire(both=("a/relu", "b/relu")):
    return scored(conv("s", g.INPUT, 3, 4), g.ReLU("s/relu", ("s", )), conv("a", "s/relu", 4, 5),
                  g.ReLU("a/relu", ("a", )), conv("b", "s/relu", 4, 6, 3), g.ReLU("b/relu", ("b", )),
                  g.Concat("both", both), conv("c", "both", 11, 2), shape=(3, 5, 5))


def dense_block():
    """Each convolution reads all before it: one tensor can lie in one concatenation only."""
    return scored(conv("a", g.INPUT, 2, 3), g.Concat("ab", (g.INPUT, "a")), conv("b", "ab", 5, 3),
                  g.Concat("abc", (g.INPUT, "b", "a")), conv("c", "abc", 8, 3), g.Concat("all", ("c", "a", "abc", "b")),
                  conv("d", "all", 17, 2), shape=(2, 4, 4))


def twice():
    return scored(conv("a", g.INPUT, 2, 3), g.Concat("aa", ("a", "a")), conv("b", "aa", 6, 2), shape=(2, 4, 4))


def read_in_parts(part):
    """On the way back, a part of the concatenation has its c before the whole gets its own."""
    return scored(conv("a", g.INPUT, 2, 3), conv("b", g.INPUT, 2, 3), g.Concat("ab", ("a", "b")), conv("c", "ab", 6, 3),
                  conv("d", part, 3, 3), g.Add("sum", ("c", "d")), shape=(2, 4, 4))


def flattened(first):
    """One image and flat numbers in one concatenation: only at a whole channel can the image lie in it."""
    layers = (conv("a", g.INPUT, 2, 3), g.Flatten("flat", ("a",)), g.GlobalAveragePool("means", ("a",)))
    return scored(*layers, g.Concat("both", ("flat", "means") if first else ("means", "flat")), shape=(2, 3, 3))


@pytest.mark.parametrize(("graph", "copied"), [(fire(), False), (fire(("b/relu", "a/relu")), False),
                                               (dense_block(), True), (twice(), True), (flattened(True), True),
                                               (flattened(False), True), (read_in_parts("a"), False),
                                               (read_in_parts("b"), False), ])
def test_concatenations_write_in_place_where_they_can(graph, copied):
    plan, batch = plan_of(graph, batch=2), images(graph, 2)
    assert (copies(plan) > 0) == copied
    plan._workspace[:] = np.nan  # what is added to without having been cleared would show
    scores, relevance, _ = run(plan, batch)
    rules = {name: rule.rule for name, rule in assign(graph).rules.items()}
    for i, image in enumerate(batch):
        expected, expected_scores, _ = naive.explain(graph, image, 0, rules)
        np.testing.assert_allclose(scores[i], expected_scores, atol=1e-5)
        np.testing.assert_allclose(relevance[i], expected, atol=1e-5 * max(1, expected.max()))


@quick
@given(graphs())
def test_locations_of_tensors(graph):
    """Where one lies in another, it is at a whole channel, inside, and beside the others of one concatenation."""
    found, copied = locations(graph), copies(plan_of(graph))
    elsewhere = 0
    for layer in graph:
        offset = found[layer.name].offset
        for name in layer.inputs if isinstance(layer, (g.Concat, g.Flatten)) else ():
            location, channel = found[name], np.prod(graph.shapes[name][1:])
            assert location.offset % channel == location.elements % channel == 0
            assert location.offset + channel * graph.shapes[name][0] <= location.elements
            elsewhere += (location.root, location.offset) != (found[layer.name].root, offset)
            offset += int(np.prod(graph.shapes[name]))
    assert copied == 2 * elsewhere  # forward and back


def test_buffers_are_whole_cache_lines():
    plan = plan_of(fire(), batch=3)
    for buffer in plan.schedule.buffers:
        assert buffer.offset % 16 == 0


# ---- What goes back --------------------------------------------------------------------------------------------------


BOX = (0, 1)
CHAIN = (conv("a", g.INPUT, 2, 2), g.ReLU("relu", ("a", )), g.MaxPool2d("max", ("relu", ),
                                                                        (2, 2)), conv("b", "max", 2, 2))


@pytest.mark.parametrize(
    ("layers", "rules", "carriers"),
    [(CHAIN, {}, set()), (CHAIN, {"max": "proportional"}, set()),
     (CHAIN, {"b": "w2"}, {"max", "relu", "a"}),  # the winner and the ReLU only pass it on
     (CHAIN, {"b": "flat", "max": "proportional"}, {"max"}),  # under z+ what comes back is a multiple of a again
     (CHAIN, {"mean": "flat"}, {"b"}),
     ((g.ReLU("relu", (g.INPUT, )), g.Concat("x", ("relu", "relu")), conv(
         "a", "x", 4, 2)), {}, {"relu", "x"}),  # joined to the input
     ((conv("a", g.INPUT, 2, 2), g.Concat("x",
                                          ("a", g.INPUT))), {}, {"a", "x"}),  # by the other input of a concatenation
     ((conv("a", g.INPUT, 2, 2), conv("b", "a", 2, 2), g.Concat("x", ("a", "b")), conv(
         "c", "b", 2, 2), g.Concat("y", ("x", "c"))), {"c": "flat"}, {"a", "b", "c", "x", "y"}),
     ((conv("a", g.INPUT, 2, 2), conv("b", "a", 2, 2), g.Add("x", ("a", "b"))), {}, set()),
     ((conv("a", g.INPUT, 2, 2), conv("b", "a", 2, 2), g.Add("x", ("a", "b"))), {"x": "w2"}, {"a", "b"}), ])
def test_which_tensors_carry_relevance(layers, rules, carriers):
    graph = scored(*layers, shape=(2, 4, 4), box=BOX)
    assert assign(graph, rules).carriers == {g.INPUT} | carriers
    assert not plan_of(graph, rules).schedule.starts_with_relevance


def test_an_output_that_carries_relevance():
    graph = g.Graph((g.GlobalAveragePool("mean", (g.INPUT,)), g.ReLU("scores", ("mean",))), (2, 2, 2), BOX)
    assert assign(graph).carriers == {g.INPUT}
    graph = g.Graph((g.ReLU("relu", (g.INPUT,)), g.Flatten("scores", ("relu",))), (2, 1, 1), BOX)
    assert plan_of(graph).schedule.starts_with_relevance
    _, relevance, _ = run(plan_of(graph), np.array([[[[0.25]], [[0.5]]]]))
    assert relevance.ravel().tolist() == [0.25, 0]


def test_more_memory_than_there_is(monkeypatch):
    graph = g.Graph((g.Flatten("flat", (g.INPUT,)), g.Dense("scores", ("flat",), np.ones((2, 12)))), (3, 2, 2), (0, 1))
    schedule = lower(graph, assign(graph), cpu).schedule(5)

    def refuse(*_):
        raise MemoryError

    monkeypatch.setattr(np, "empty", refuse)
    with pytest.raises(InputError, match=r"the network needs 0\.0 GiB for 5 images at a time, more than there is"):
        Plan(schedule, cpu)


# ---- Signed relevance through Winograd's tiles -----------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["z+", "epsilon(epsilon=0.1)", "gamma(epsilon=0.1)", "alpha-beta(epsilon=0.1)"])
def test_negative_relevance_passes_through_winograd(monkeypatch, rule):
    """What comes back to a 3x3 layer may be negative: it is kept, where nothing else is that could hide a clamp."""
    monkeypatch.setattr(cpu, "winograd2d_pays", lambda *_: True)
    random = np.random.default_rng(3)
    first = g.Conv2d("first", (g.INPUT,), random.standard_normal((8, 2, 3, 3)), padding=(1,) * 4)
    middle = g.Conv2d("middle", ("first/relu",), random.standard_normal((16, 8, 3, 3)) / 6, padding=(1,) * 4)
    head = g.Dense("scores", ("flat",), random.standard_normal((3, 16 * 13 * 12)) / 9, [20.0, 0, 0])
    graph = g.Graph((first, g.ReLU("first/relu", ("first",)), middle, g.ReLU("middle/relu", ("middle",)),
                     g.Flatten("flat", ("middle/relu",)), head), (2, 13, 12), (-1.0, 1.0))
    assigned = assign(graph, {"scores": rule})
    assert assigned.signed == (frozenset() if rule == "z+" else frozenset(graph.shapes))
    plan, batch = plan_of(graph, {"scores": rule}, batch=2), images(graph, 2, seed=1)
    assert "winograd2d_redistribute" in [step.name for step in plan.schedule.steps if step.layer == "middle"]
    scores, relevance, ledger = run(plan, batch)
    assert (scores[:, 0] > 0).all()
    assert (relevance.min() < 0) == (rule != "z+")
    rules = {name: layer_rule.rule for name, layer_rule in assigned.rules.items()}
    for i in range(2):
        expected, _, absorbed = naive.explain(graph, batch[i], 0, rules)
        np.testing.assert_allclose(relevance[i], expected, atol=2e-5 * np.abs(expected).max())
        total, size = relevance[i].sum(dtype=np.float64) + ledger[i].sum(), float(np.abs(relevance[i]).sum())
        assert total == pytest.approx(max(float(scores[i, 0]), 0), rel=1e-4, abs=1e-5 * size)
        np.testing.assert_allclose(ledger[i], list(absorbed.values())[::-1], atol=2e-5 * np.abs(expected).sum())
