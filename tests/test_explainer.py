"""Whole explanations: against the oracle, and what must hold for every network (conservation, no negative relevance,
the same bits).
"""

import os
import pickle
import re
import signal
import threading
import time
import warnings
import weakref
from concurrent.futures import Future, ThreadPoolExecutor
from types import SimpleNamespace

import naive
import numpy as np
import pytest
from fastdtd.kernels import cpu
from graphs import graphs, graphs_and_rules, images
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st

from fastdtd import executor as executor_module
from fastdtd import explainer as explainer_module
from fastdtd import graph as g
from fastdtd.errors import InputError, RuleError
from fastdtd.explainer import Explainer
from fastdtd.inputs import ExplanationWarning
from fastdtd.model import Model, Preprocessing
from fastdtd.plan import Plan
from fastdtd.rules import search_direction

many = settings(max_examples=150, deadline=None,
                suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])


def plans_of(made):
    """Of the first device."""
    return made._executor.devices[0][1]


def bound(plans, batch, workers):
    return plans.bind(plans.schedule(batch, workers))


def explainer(graph, rules="dtd", threads=1, memory=None):
    return Explainer(Model(graph, Preprocessing(None)), rules, threads=threads, memory=memory)


def explain(made, batch, target=None):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExplanationWarning)
        return made(batch, target)


def describe(graph):
    for layer in graph:
        fields = {k: v for k, v in vars(layer).items() if k not in ("name", "inputs", "weight", "bias")}
        note(f"{layer.name} {type(layer).__name__} {layer.inputs} -> {graph.shapes[layer.name]} {fields}")


@many
@given(graphs_and_rules(), st.integers(1, 4))
def test_agrees_with_the_oracle(case, count):
    graph, rules = case
    describe(graph)
    made, batch = explainer(graph, rules), images(graph, count)
    e = explain(made, batch)
    names = {name: rule.rule for name, rule in made.rules.items()}
    for i, picture in enumerate(batch):
        relevance, scores, absorbed = naive.explain(graph, picture, e.target[i], names)
        scale = max(1.0, np.abs(scores).max())
        np.testing.assert_allclose(e.output[i], scores, atol=2e-5 * scale)
        # A neuron whose z is 1e-7 of its terms' size may count as none in one precision: compare with the score's
        # scale.
        assert np.linalg.norm(e.relevance[i] - relevance) <= 2e-5 * max(np.linalg.norm(relevance), scale)
        for name, lost in absorbed.items():
            assert abs(e.ledger[name][i] - lost) <= 2e-5 * scale


@many
@given(graphs_and_rules(signed=True), st.integers(1, 4), st.integers(1, 2))
def test_signed_rules_agree_with_the_oracle_and_conserve(case, count, threads):
    graph, rules = case
    describe(graph)
    note(rules)
    made, batch = explainer(graph, rules, threads), images(graph, count)
    e = explain(made, batch)
    for i, picture in enumerate(batch):
        relevance, scores, absorbed = naive.explain(graph, picture, e.target[i],
                                                    {name: rule.rule for name, rule in made.rules.items()})
        scale = max(1.0, np.abs(scores).max())
        assert np.linalg.norm(e.relevance[i] - relevance) <= 1e-4 * max(np.linalg.norm(relevance), scale)
        for name, lost in absorbed.items():
            assert abs(e.ledger[name][i] - lost) <= 1e-4 * max(np.linalg.norm(relevance), scale)
        kept = np.sum([abs(lost[i]) for lost in e.ledger.values()]) + np.abs(e.relevance[i]).sum(dtype=np.float64)
        assert abs(e.relevance[i].sum(dtype=np.float64) + e.absorbed[i]
                   - e.explained[i]) <= 1e-5 * max(kept, e.explained[i])


@settings(many, max_examples=40)
@given(graphs_and_rules(), st.integers(0, 2**32))
def test_any_start_agrees_with_the_oracle(case, seed):
    graph, rules = case
    describe(graph)
    made, batch = explainer(graph, rules, threads=2), images(graph, 3)
    scores = explain(made, batch).output
    start = np.random.default_rng(seed).random(scores.shape, np.float32) * (np.abs(scores) > 1e-3)
    e = made(batch, start=start)
    np.testing.assert_allclose(e.explained, start.sum(1))
    assert (e.target == start.argmax(1)).all()
    names = {name: rule.rule for name, rule in made.rules.items()}
    for i, picture in enumerate(batch):
        relevance, _, absorbed = naive.explain(graph, picture, 0, names, start[i])
        assert np.linalg.norm(e.relevance[i] - relevance) <= 1e-4 * max(np.linalg.norm(relevance), 1.0)
        for name, lost in absorbed.items():
            assert abs(e.ledger[name][i] - lost) <= 1e-4


@settings(many, max_examples=60)
@given(graphs_and_rules(signed=True))
def test_relevance_at_every_layer(case):
    graph, rules = case
    describe(graph)
    made, batch = explainer(graph, rules, threads=2), images(graph, 2)
    e = explain(made, batch)
    rules = {name: rule.rule for name, rule in made.rules.items()}
    oracle = [naive.relevances(graph, picture, e.target[i], rules)[0] for i, picture in enumerate(batch)]
    for name, shape in graph.shapes.items():
        ours = e.at(name)
        assert ours.shape == (2, *shape)
        for i in range(2):
            expected = oracle[i][name].reshape(shape)
            assert np.linalg.norm(ours[i] - expected) <= 1e-4 * max(np.linalg.norm(expected),
                                                                    np.abs(e.output[i]).max(), 1)
    # What several layers give back to a tensor is added in another order where tensors do not share memory.
    np.testing.assert_allclose(e.at("input"), e.relevance, atol=1e-5 * max(1,
                                                                           np.abs(e.relevance).max(),
                                                                           np.abs(e.output).max()))
    assert {name: came.tolist() for name, came in e.flow().items()} == {
        name: e.at(name).sum((1, 2, 3), dtype=np.float64).tolist() for name in e.ledger}


def test_derivatives_by_rules_of_layers_are_those_of_the_preset():
    batch = images(small(), 2)
    preset, by_layer = (explain(explainer(small(), rules), batch)
                        for rules in ("gradient", {"conv": "gradient", "[ps]*": "gradient"}))
    assert preset.relevance.any()
    assert (preset.relevance == by_layer.relevance).all()
    assert (preset.explained == by_layer.explained).all()


def test_no_such_layer_and_no_network():
    e = explain(explainer(small()), images(small(), 1))
    with pytest.raises(InputError, match="has no layer 'conv9'; it has input, conv, relu, pool, scores"):
        e.at("conv9")
    derived = explain(explainer(small(), "gradient"), images(small(), 1))
    assert derived.at("relu").shape == (1, 4, 4, 3)
    with pytest.raises(InputError, match=r"by what layer 'conv' makes is not kept, .* such as 'relu'"):
        derived.at("conv")
    kept = pickle.loads(pickle.dumps(e))
    assert (kept.relevance == e.relevance).all()
    with pytest.raises(InputError, match="pickled, without the network"):
        kept.at("conv")


def z_plus(a, w):
    return a if w > 0 else 0


def z_plus_on_reals(a, w):
    return a if a * w > 0 else 0


def w2(a, w):
    return w


def z_b(a, w, low, high):
    return a - low if w > 0 else a - high


def to_the_middle(a, w, low, high):
    return (a - (low + high) / 2) * np.sign(w) + 0.25 * w * w


def two_layers(box):
    """A convolution in groups with everything off its default, at the input, and a dense layer behind it."""
    rng = np.random.default_rng(1)
    weight, bias = rng.standard_normal((6, 2, 3, 2)), rng.standard_normal(6)
    return g.Graph((g.Conv2d("conv", (g.INPUT, ), weight, bias, (2, 1), (1, 0, 2, 1),
                             (1, 2), 2), g.ReLU("relu", ("conv", )), g.Flatten("flat", ("relu", )),
                    g.Dense("hidden", ("flat", ), rng.standard_normal(
                        (7, 6 * 4 * 4)), rng.standard_normal(7)), g.ReLU(
                            "r", ("hidden", )), g.Dense("scores", ("r", ), rng.random((2, 7)))), (4, 7, 5), box)


@pytest.mark.parametrize(("direction", "layer", "rule"),
                         [(z_plus, "hidden", "z+"), (z_plus_on_reals, "conv", "z+"), (w2, "conv", "w2"),
                          (z_b, "conv", "zB"), (w2, "hidden", "w2"),
                          (lambda a, w: 1 / w if w != 0 else 0, "hidden", "flat"),
                          (lambda a, w: a, "hidden", "epsilon(epsilon=0, bias=ignored)"), ])
def test_named_rules_follow_from_their_search_direction(direction, layer, rule):
    graph = two_layers((-1.0, 2.0))
    batch = images(graph, 3)
    named, general = (explain(explainer(graph, {layer: given}, threads=2), batch)
                      for given in (rule, search_direction(direction)))
    assert (named.explained > 0).all()
    np.testing.assert_allclose(general.relevance, named.relevance, atol=2e-5 * np.abs(named.relevance).max())
    np.testing.assert_allclose(general.ledger[layer], named.ledger[layer], atol=2e-5 * named.explained.max())


@pytest.mark.parametrize(("direction", "layer"), [(to_the_middle, "conv"), (lambda a, w: np.exp(-a) * w, "hidden"),
                                                 (lambda a, w: w if a > 0.3 else 0, "conv")])
def test_any_search_direction_agrees_with_the_oracle(direction, layer):
    graph = two_layers((-1.0, 2.0))
    made, batch = explainer(graph, {layer: search_direction(direction)}), images(graph, 3)
    e = explain(made, batch)
    for i, picture in enumerate(batch):
        relevance, _, absorbed = naive.explain(graph, picture, e.target[i],
                                               {name: rule.rule for name, rule in made.rules.items()})
        np.testing.assert_allclose(e.relevance[i], relevance, atol=1e-4 * max(np.abs(relevance).max(), e.explained[i]))
        assert abs(e.ledger[layer][i] - absorbed[layer]) <= 1e-4 * e.explained[i]


@pytest.mark.parametrize(("direction", "layer", "message"),
                         [(lambda a: a, "conv", "required: a function of"), ("v", "conv", "required: a function of"),
                          (lambda a, w: a.sign(w), "conv", "cannot be compiled"),
                          (lambda a, w: "far", "conv", "cannot be compiled: it returns"),
                          (z_b, "hidden", "takes bounds of the layer's input"),
                          (w2, "relu", "no layer with a rule is named 'relu'"), ])
def test_search_directions_that_are_refused(direction, layer, message):
    with pytest.raises(RuleError, match=message):
        explainer(two_layers((-1.0, 2.0)), {layer: search_direction(direction)})


def test_starts():
    made = explainer(small())
    batch = images(made.model.graph, 3)
    of_target = explain(made, batch, 2)
    one = made(batch, start=of_target.explained[:, None] * [0, 0, 1])
    np.testing.assert_allclose(one.relevance, of_target.relevance, rtol=1e-6)
    assert one.target.tolist() == [2, 2, 2]
    np.testing.assert_allclose(made(batch, start=[1, 0, 0.5]).explained, 1.5)
    assert not made(batch, start=[0, 0, 0]).relevance.any()
    for bad in ([1, 2], np.ones((2, 3)), [-1, 0, 0], [np.nan, 0, 0], [np.inf, 0, 0], "abc", [[1], [1, 2],
                                                                                             [3]], None.__class__):
        with pytest.raises(InputError, match="start"):
            made(batch, start=bad)
    with pytest.raises(InputError, match="a target and a start"):
        made(batch, 1, [1, 0, 0])
    dead = explainer(
        g.Graph((g.Dense("dense", (g.INPUT, ), np.eye(2)), g.ReLU("scores", ("dense", ))), (2, 1, 1), (-1, 1)))
    with pytest.raises(InputError, match="output 1 of image 1 has the score 0"):
        dead(np.float32([[1, 0.5], [1, -1]])[:, :, None, None], start=[1, 1])
    assert nothing_is_taken(made)


@many
@given(graphs_and_rules(), st.integers(1, 3))
def test_conserves_and_is_never_negative(case, count):
    graph, rules = case
    describe(graph)
    e = explain(explainer(graph, rules), images(graph, count))
    assert (e.relevance >= 0).all()
    sums = e.relevance.sum((1, 2, 3), dtype=np.float64)
    np.testing.assert_allclose(sums + e.absorbed, e.explained, rtol=1e-5)


@settings(many, max_examples=40)
@given(graphs())
def test_same_bits_whatever_the_batch_and_the_threads(graph):
    describe(graph)
    batch = images(graph, 5)
    alone, threaded = explainer(graph), explainer(graph, threads=2)
    together = explain(alone, batch)
    for i in range(5):
        for made in (alone, threaded):
            one = explain(made, batch[i:i + 1])
            assert (one.relevance[0] == together.relevance[i]).all()
            assert (one.output[0] == together.output[i]).all()
    shuffled = explain(threaded, batch[::-1])
    assert (shuffled.relevance[::-1] == together.relevance).all()


def small(box=(-1.0, 1.0), bias=None):
    rng = np.random.default_rng(0)
    return g.Graph((g.Conv2d("conv", ("input", ), rng.standard_normal(
        (4, 2, 3, 3)), bias), g.ReLU("relu", ("conv", )), g.GlobalAveragePool(
            "pool", ("relu", )), g.Dense("scores", ("pool", ), [[1, 1, 1, 1], [-1, -1, -1, -1], [1, 0, 0, 0]])),
                   (2, 6, 5), box)


def test_targets():
    made = Explainer(Model(small(), Preprocessing(None), ("n01 cat, house cat", "dog", "cat fish")))
    batch = images(made.model.graph, 3)
    assert explain(made, batch).target.tolist() == [0, 0, 0]
    assert explain(made, batch, 2).target.tolist() == [2, 2, 2]
    assert explain(made, batch, [0, 2, 0]).target.tolist() == [0, 2, 0]
    assert explain(made, batch, np.array([2, 2, 0])).target.tolist() == [2, 2, 0]
    assert explain(made, batch, "House cat").target.tolist() == [0, 0, 0]
    assert explain(made, batch, ["cat", "cat fish", "n01"]).target.tolist() == [0, 2, 0]
    for bad in (3, -1, 1.5, "bird", True, [0, 1], [[0, 1, 2]], [[1, 2],
                                                                [3]], {"a": 1}, object(), [], np.array([0.0, 1.0, 2.0]),
                np.array(1.5), np.array(True), np.array([[0, 1], [1, 2]]), np.array([[0.7], [1.2], [1.0]])):
        with pytest.raises(InputError):
            explain(made, batch, bad)


def test_a_score_that_is_not_positive_has_nothing_to_decompose():
    made = explainer(small())
    with pytest.warns(ExplanationWarning, match=r"3 of 3 targets have a score that is not positive"):
        e = made(images(made.model.graph, 3), 1)
    assert (e.output[:, 1] <= 0).all()
    assert (e.explained == 0).all()
    assert (e.relevance == 0).all()


def test_inner_layers_are_those_of_the_pictures_as_they_were_given():
    graph = g.Graph((g.Flatten("flat", (g.INPUT,)), g.Dense("scores", ("flat",), np.ones((1, 2)))), (2, 1, 1))
    batch = np.array([[[[1]], [[2]]]], np.float32)
    e = explain(explainer(graph), batch)
    batch[:] = 7
    assert e.at("flat").sum() == e.explained.sum() == 3


SECOND_IS_NAN = np.zeros((3, 2, 6, 5), np.float32)
SECOND_IS_NAN[1, 1, 3, 2] = np.nan


@pytest.mark.parametrize(("batch", "message"), [(SECOND_IS_NAN, "image 1 holds NaN"),
                                                (np.zeros((1, 2, 5, 6)), "has shape"), (np.zeros((6, 5)), "has shape"),
                                                (np.zeros(()), "has shape"),
                                                (np.full((2, 2, 6, 5), np.nan), "image 0 holds NaN"),
                                                (np.full((1, 2, 6, 5), 1e300), "image 0 holds NaN or infinity"),
                                                (np.array(["a"]), "has type"), ([[1, 2], [3]], "no array of one shape"),
                                                (np.zeros((1, 2, 6, 5), complex), "has type"), (None, "has type"), ])
def test_bad_batches(batch, message):
    with pytest.raises(InputError, match=message):
        explainer(small())(batch)


def test_an_empty_batch_gives_an_empty_explanation():
    e = explainer(small())(np.zeros((0, 2, 6, 5), np.float32))
    assert e.relevance.shape == (0, 2, 6, 5)
    assert e.output.shape == (0, 3)


def test_values_beyond_the_box_are_clipped_and_it_says_so():
    made = explainer(small())
    batch = images(made.model.graph, 2)
    with pytest.warns(ExplanationWarning, match="2 of 2 images have values beyond"):
        e = made(batch * 5)
    assert (e.relevance == explain(made, np.clip(batch * 5, -1, 1)).relevance).all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made(np.clip(batch, -1, 1) * np.float32(1 + 1e-6))  # rounding of a preprocessing is no reason to speak


def test_overflow_is_an_error():
    graph = g.Graph((g.Conv2d("a", ("input", ), np.full(
        (1, 1, 1, 1), 1e30)), g.ReLU("r", ("a", )), g.Flatten("f",
                                                              ("r", )), g.Dense("d", ("f", ), np.full((1, 1), 1e30))),
                    (1, 1, 1), (0, 1))
    with pytest.raises(InputError, match="beyond float32"):
        explainer(graph)(np.ones((1, 1, 1, 1)))


def test_a_bias_without_support_is_in_the_ledger():
    """relu(b) with b > 0 and only negative weights: active, and no input to thank for it."""
    graph = g.Graph((g.Dense("hidden", ("input",), [[1.0], [-1.0]], [0.0, 3.0]), g.ReLU("relu", ("hidden",)),
                     g.Dense("scores", ("relu",), [[1.0, 1.0]])), (1, 1, 1), (0, 1))
    e = explainer(graph, {"hidden": "z+"})(np.full((1, 1, 1, 1), 0.5, np.float32))
    assert e.explained[0] == pytest.approx(3.0)  # 0.5 + relu(3 - 0.5)
    assert e.relevance.ravel() == pytest.approx([0.5])
    assert e.ledger["hidden"] == pytest.approx([2.5])
    assert e.ledger["scores"] == pytest.approx([0])


def test_many_callers_at_once():
    made = explainer(small(), threads=2)
    batch = images(made.model.graph, 7)
    expected = {n: explain(made, batch[:n]).relevance for n in (1, 3, 7)}
    wrong = []

    def call(n):
        for _ in range(20):
            if not (made(batch[:n], 0).relevance == expected[n]).all():
                wrong.append(n)

    callers = [threading.Thread(target=call, args=(n,)) for n in (1, 3, 7, 1, 3)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not wrong


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")  # forking with threads is what is tested
@pytest.mark.parametrize("count", [1, 4])
def test_use_in_a_forked_process(count):
    made = explainer(small(), threads=2)
    batch = images(made.model.graph, count)
    expected = explain(made, batch).relevance
    plan = plans_of(made).take(1, 2)  # as if another thread were at work
    child = os.fork()
    if not child:
        os._exit(0 if (explain(made, batch).relevance == expected).all() else 1)
    plans_of(made).give_back(plan)
    deadline = time.monotonic() + 30
    done, status = 0, 0
    while not done and time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        time.sleep(0.01)
    if not done:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert done == child, "the forked process hangs"
    assert os.waitstatus_to_exitcode(status) == 0


def test_an_error_in_one_thread_reaches_the_caller_and_the_next_call_works():
    made = explainer(small(), threads=3)
    batch = images(made.model.graph, 2)
    expected = explain(made, batch).relevance
    plan = plans_of(made).take(2, 3)

    def run_steps(steps, *others):
        if steps is plan._tables[1]:
            raise MemoryError("on purpose")
        return cpu.run_steps(steps, *others)

    plan._kernels = SimpleNamespace(**vars(cpu) | {"run_steps": run_steps})
    plans_of(made).give_back(plan)
    with pytest.raises(MemoryError, match="on purpose"):
        explain(made, batch)
    assert nothing_is_taken(made)
    assert (explain(made, batch).relevance == expected).all()


def test_threads_that_cannot_start_are_an_error_and_no_hang(monkeypatch):
    made, start, started = explainer(small(), threads=3), threading.Thread.start, []

    def refuse(thread):
        started.append(thread)
        if len(started) > 1:
            raise RuntimeError("can't start new thread")
        start(thread)

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        with pytest.raises(InputError, match="3 threads cannot be started"):
            explain(made, images(made.model.graph, 1))
    assert explain(made, images(made.model.graph, 1)).relevance.shape == (1, 2, 6, 5)


def test_memory_of_batch_sizes_that_are_over_is_given_back():
    made = explainer(small())
    plans_of(made).max_idle = 3 * plans_of(made).nbytes(1, 1)
    for count in range(1, 20):
        explain(made, images(made.model.graph, count))
    assert sum(plan.nbytes for plan in plans_of(made).idle) <= plans_of(made).max_idle


# ---- Limited memory, many callers ------------------------------------------------------------------------------------


class Watched(Plan):
    """A Plan that is counted: its memory from when it first runs until it is gone, and its threads while it runs."""

    def forward(self, submit=None):
        with self.lock:
            self.running.append(self.schedule.workers)
            self.most_workers.append(sum(self.running))
            self.sizes.add((self.schedule.batch, self.schedule.workers))
            self.touched.add(self)
            for _ in range(20):
                used = sum(plan.nbytes for plan in self.touched)
                if self.limit is None or used <= self.limit:
                    break
                time.sleep(0.001)  # another thread may be about to forget the plan that it gave back
            self.most_bytes.append(used)
        super().forward(submit)

    def backward(self, submit=None):
        super().backward(submit)
        with self.lock:
            self.running.remove(self.schedule.workers)


@pytest.fixture
def watched(monkeypatch):
    for name, value in (("touched", weakref.WeakSet()), ("running", []), ("most_bytes", [0]), ("most_workers", [0]),
                        ("sizes", set()), ("limit", None), ("lock", threading.Lock())):
        monkeypatch.setattr(Watched, name, value, raising=False)
    monkeypatch.setattr(executor_module, "Plan", Watched)
    return Watched


def eventually(condition):
    """Whether it comes true, in a thread that may take its time."""
    deadline = time.monotonic() + 30
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.001)
    return condition()


def nothing_is_taken(made):
    return eventually(lambda: plans_of(made).used_bytes == plans_of(made).used_workers == 0)


def one_image(graph, threads=1):
    """What a plan for one image takes."""
    return Explainer(Model(graph, Preprocessing(None)), threads=threads)._executor.devices[0][1].nbytes(1, threads)


@settings(many, max_examples=30)
@given(graphs(), st.data())
def test_same_bits_in_any_memory(graph, data):
    describe(graph)
    least = max(one_image(graph, n) for n in (1, 2, 3))
    batch = images(graph, 7)
    expected = explain(explainer(graph), batch)
    for threads in (1, 2, 3):
        made = explainer(graph, threads=threads, memory=data.draw(st.integers(least, 8 * least)))
        for count in (7, 2):
            e = explain(made, batch[:count])
            assert (e.relevance == expected.relevance[:count]).all()
            assert (e.output == expected.output[:count]).all()
            assert all((lost == expected.ledger[name][:count]).all() for name, lost in e.ledger.items())


def test_what_fits_into_memory(watched):
    """12 images: as many at a time as fit, each in one thread; where not one fits in each, in plans that all share.

    What fits is asked of the schedules, for how large scratch is depends on the processor.
    """
    graph, threads, count = small(), 3, 12
    size = plans_of(explainer(graph, threads=threads)).nbytes
    one, shared = size(1, 1), size(1, threads)
    assert one < shared < threads * one
    assert one < size(2, 1) <= 2 * one
    cases = [(None, 4, 1), (100 * one, 4, 1), (threads * 2 * one, 2, 1), (threads * one, 1, 1), (shared, 1, threads)]
    most = 2 if size(2, threads) < threads * one else 1  # memory for three would do for one each
    for memory, batch, workers in [*cases, (threads * one - 1, most, threads)]:
        for plans in (watched.sizes, watched.touched, watched.most_bytes):
            plans.clear()
        watched.limit = memory
        made = explainer(graph, threads=threads, memory=memory)
        explain(made, images(graph, count))
        parts = -(-count // batch)
        assert watched.sizes == {(count * (i + 1) // parts - count * i // parts, workers) for i in range(parts)}
        assert memory is None or max(watched.most_bytes) <= memory


def test_memory_in_which_nothing_fits():
    graph = small()
    one = one_image(graph)
    for threads in (1, 3):
        with pytest.raises(
                InputError,
                match=r"one image takes \d+KiB .*, and memory is limited to '0.1KB'; raise the limit") as error:
            explainer(graph, threads=threads, memory="0.1KB")
        with pytest.raises(InputError, match=f"limited to {one - 1}; raise"):
            explainer(graph, threads=threads, memory=one - 1)
        assert explain(explainer(graph, threads=threads, memory=one), images(graph, 4)).relevance.any()
    wanted = re.search(r"takes (\S+)", str(error.value))[1]
    explainer(graph, memory=wanted)  # what it asks for is enough


@pytest.mark.parametrize(("memory", "number"), [("2GiB", 2 << 30), ("1.5 MiB", 3 << 19), (" 64kib ", 64 << 10),
                                                ("3GB", 3 * 10**9), ("500MB", 5 * 10**8), ("7KB", 7000),
                                                (12345, 12345), ])
def test_amounts_of_memory(memory, number):
    assert explainer_module._bytes(memory) == number


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("images", [None, 1, 2, 3.5, 10])
def test_many_callers_of_all_sizes(watched, threads, images):
    """Right results, no more memory or threads than allowed, errors where they belong, and nobody waits forever."""
    graph = small()
    memory = images and int(images * one_image(graph, threads))
    made = explainer(graph, threads=threads, memory=memory)
    batch = images(graph, 9)
    expected = explain(explainer(graph), batch).relevance
    for plans in (watched.touched, watched.most_bytes, watched.most_workers):
        plans.clear()
    watched.limit, wrong = memory, []

    def call(count):
        for i in range(15):
            if i % 5 == 4:
                with pytest.raises(InputError):
                    made(batch[:count], 99)
            elif not (made(batch[:count], 0).relevance == expected[:count]).all():
                wrong.append(count)

    callers = [threading.Thread(target=call, args=(count,), daemon=True) for count in (1, 2, 3, 9, 1, 5, 4, 1)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(60)
    assert not any(caller.is_alive() for caller in callers), "some wait forever"
    assert not wrong
    assert memory is None or max(watched.most_bytes) <= memory
    assert threads == 1 or max(watched.most_workers) <= threads
    assert nothing_is_taken(made)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("count", [1, 6])
def test_a_call_that_fails_gives_back_its_threads_and_memory(watched, monkeypatch, threads, count):
    graph = small()
    made = explainer(graph, threads=threads, memory=2 * one_image(graph, 2))
    batch = images(graph, 6)
    expected = explain(made, batch)
    with monkeypatch.context() as patch:
        def fail(*_):
            raise KeyboardInterrupt("on purpose")

        patch.setattr(watched, "backward", fail)
        for _ in range(3):
            with pytest.raises(KeyboardInterrupt, match="on purpose"):
                explain(made, batch[:count])
            assert nothing_is_taken(made)
    watched.running.clear()
    assert (explain(made, batch).relevance == expected.relevance).all()


def test_after_a_failure_no_more_is_begun(watched, monkeypatch):
    graph = small()
    made = explainer(graph, threads=2, memory=2 * one_image(graph))
    batch = np.repeat(images(graph, 1), 100, 0)
    monkeypatch.setattr(watched, "backward", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        explain(made, batch)
    assert len(watched.most_bytes) < 50


def test_what_no_thread_began_is_given_back_when_another_fails(monkeypatch):
    made, futures = explainer(small(), threads=2), []

    class Late:
        """Begins the first call when it gets the second, and never the second."""

        def submit(self, function, *arguments):
            futures.append((Future(), function, arguments))
            if len(futures) == 2:
                future, function, arguments = futures[0]
                arguments[0][0].input = None
                try:
                    function(*arguments)
                except TypeError as error:
                    future.set_exception(error)
            return futures[-1][0]

    monkeypatch.setattr(made._executor, "_threads", Late)
    with pytest.raises(TypeError):
        explain(made, images(made.model.graph, 2))
    assert futures[1][0].cancelled()
    assert nothing_is_taken(made)


def test_a_plan_that_cannot_be_made_takes_no_memory(monkeypatch):
    graph = small()
    made = explainer(graph, memory=2 * one_image(graph))
    batch = images(graph, 2)
    expected = explain(made, batch)
    plans_of(made).idle.clear()
    with monkeypatch.context() as patch:
        def refuse(*_):
            raise InputError("more than there is")

        patch.setattr(plans_of(made), "bind", refuse)
        for _ in range(3):
            with pytest.raises(InputError, match="more than there is"):
                explain(made, batch)
            assert nothing_is_taken(made)
    assert (explain(made, batch).relevance == expected.relevance).all()


@pytest.mark.parametrize(("threads", "callers"), [(1, 2), (2, 1)])
def test_who_works_side_by_side(threads, callers):
    """Our threads; with one, callers bring their own and need not wait for each other."""
    made, both = explainer(small(), threads=threads), threading.Barrier(2, timeout=30)
    batch = images(made.model.graph, threads)
    expected = explain(made, batch, 0).relevance
    for _ in range(2):
        plan = bound(plans_of(made), 1, 1)
        plan.forward = lambda submit, forward=plan.forward: (both.wait(), forward(submit)
                                                             )  # goes on when another plan is there too
        plans_of(made).idle.append(plan)
    with ThreadPoolExecutor(callers) as executor:
        results = list(executor.map(lambda _: made(batch, 0).relevance, range(callers)))
    assert all((relevance == expected).all() for relevance in results)


def test_who_needs_much_is_not_overtaken():
    made, order = explainer(small(), threads=2), []

    def call(workers):
        plan = plans_of(made).take(1, workers)
        order.append(workers)
        plans_of(made).give_back(plan)

    plan = plans_of(made).take(1, 1)
    callers = [threading.Thread(target=call, args=(workers,), daemon=True) for workers in (2, 1)]
    callers[0].start()
    assert eventually(plans_of(made)._turn.locked)
    callers[1].start()  # there would be room for it now
    time.sleep(0.05)
    assert order == []
    plans_of(made).give_back(plan)
    for caller in callers:
        caller.join(30)
    assert order == [2, 1]


def test_a_mean_that_is_rounded_beyond_its_bound_makes_no_negative_relevance():
    for seed in range(60):
        rng = np.random.default_rng(seed)
        low = -rng.random(2)
        graph = g.Graph(
            (g.AveragePool2d("pool", (g.INPUT, ),
                             (3, 3)), g.Conv2d("conv", ("pool", ), rng.standard_normal(
                                 (3, 2, 2, 2)), [1.0] * 3), g.ReLU("relu", ("conv", )), g.Flatten(
                                     "flat", ("relu", )), g.Dense("scores", ("flat", ), np.ones(
                                         (1, 12)))), (2, 5, 5), (low, low + 0.7))
        batch = np.broadcast_to(np.float32(low)[:, None, None], (1, 2, 5, 5))
        for rules in ("dtd", {"pool": "flat"}):
            e = explain(explainer(graph, rules), batch)
            assert (e.relevance >= 0).all()
            assert all((lost >= 0).all() for lost in e.ledger.values())
            assert e.relevance.sum(dtype=np.float64) + e.absorbed[0] == pytest.approx(e.explained[0], rel=1e-5)


@pytest.mark.parametrize("options", [{"device": "tpu"}, {"precision": "tf32"}, {"precision": 32}, {"threads": 0},
                                     {"threads": True}, {"threads": 1.5}])
def test_bad_options(options):
    with pytest.raises(InputError):
        Explainer(Model(small(), Preprocessing(None)), **options)


@pytest.mark.parametrize("memory", [
    "", "2", "GiB", "2G", "2 GB B", "-1GB", "1e3MB", "nanMB", "infGB", "0GiB", "\N{SUPERSCRIPT TWO}GB", 0, -1, True,
    1.5, b"2GiB", [2],
])
def test_what_is_no_amount_of_memory(memory):
    with pytest.raises(InputError, match=r"memory is .*; required: a number with one of the units"):
        explainer(small(), memory=memory)


def test_a_small_network_is_left_to_one_thread(monkeypatch):
    """And gives the same bits."""
    graph = small()
    batch = images(graph, 1, seed=0)
    shared = explainer(graph, threads=2)
    monkeypatch.setattr("fastdtd.executor._SMALL_NETWORK", 1 << 25)
    alone = explainer(graph, threads=2)
    np.testing.assert_array_equal(alone(batch).relevance, shared(batch).relevance)
    assert (alone._executor._pool_of_threads, shared._executor._pool_of_threads is None) == (None, False)
