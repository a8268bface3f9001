"""Whole explanations: against the oracle, and what must hold for every network (conservation, no negative relevance, the same bits)."""

import os
import signal
import threading
import time
import warnings

import naive
import numpy as np
import pytest
from graphs import graphs, graphs_and_rules, pictures
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st

from fastdtd import graph as g
from fastdtd.errors import InputError
from fastdtd.explainer import Explainer, ExplanationWarning
from fastdtd.model import Model, Preprocessing

many = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])


def explainer(graph, rules="dtd", threads=1):
    return Explainer(Model(graph, Preprocessing(None)), rules, threads=threads)


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
    made, batch = explainer(graph, rules), pictures(graph, count)
    e = explain(made, batch)
    names = {name: rule.name for name, rule in made.rules.items()}
    for i, picture in enumerate(batch):
        relevance, scores, absorbed = naive.explain(graph, picture, e.target[i], names)
        scale = max(1.0, np.abs(scores).max())
        np.testing.assert_allclose(e.output[i], scores, atol=2e-5 * scale)
        # A neuron whose z is 1e-7 of its terms' size may count as none in one precision: compare with the score's scale.
        assert np.linalg.norm(e.relevance[i] - relevance) <= 2e-5 * max(np.linalg.norm(relevance), scale)
        for name, lost in absorbed.items():
            assert abs(e.ledger[name][i] - lost) <= 2e-5 * scale


@many
@given(graphs_and_rules(), st.integers(1, 3))
def test_conserves_and_is_never_negative(case, count):
    graph, rules = case
    describe(graph)
    e = explain(explainer(graph, rules), pictures(graph, count))
    assert (e.relevance >= 0).all()
    sums = e.relevance.sum((1, 2, 3), dtype=np.float64)
    np.testing.assert_allclose(sums + e.absorbed, e.explained, rtol=1e-5)


@settings(many, max_examples=40)
@given(graphs())
def test_same_bits_whatever_the_batch_and_the_threads(graph):
    describe(graph)
    batch = pictures(graph, 5)
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
    return g.Graph((g.Conv2d("conv", ("input",), rng.standard_normal((4, 2, 3, 3)), bias), g.ReLU("relu", ("conv",)),
                    g.GlobalAveragePool("pool", ("relu",)), g.Dense("scores", ("pool",), [[1, 1, 1, 1], [-1, -1, -1, -1], [1, 0, 0, 0]])),
                   (2, 6, 5), box)


def test_targets():
    made = Explainer(Model(small(), Preprocessing(None), ("n01 cat, house cat", "dog", "cat fish")))
    batch = pictures(made.model.graph, 3)
    assert explain(made, batch).target.tolist() == [0, 0, 0]
    assert explain(made, batch, 2).target.tolist() == [2, 2, 2]
    assert explain(made, batch, [0, 2, 0]).target.tolist() == [0, 2, 0]
    assert explain(made, batch, np.array([2, 2, 0])).target.tolist() == [2, 2, 0]
    assert explain(made, batch, "House cat").target.tolist() == [0, 0, 0]
    assert explain(made, batch, ["cat", "cat fish", "n01"]).target.tolist() == [0, 2, 0]
    for bad in (3, -1, 1.5, "bird", True, [0, 1], [[0, 1, 2]], [[1, 2], [3]], {"a": 1}, object(), [],
                np.array([0.0, 1.0, 2.0]), np.array(1.5), np.array(True), np.array([[0, 1], [1, 2]]), np.array([[0.7], [1.2], [1.0]])):
        with pytest.raises(InputError):
            explain(made, batch, bad)


def test_a_score_that_is_not_positive_has_nothing_to_decompose():
    made = explainer(small())
    with pytest.warns(ExplanationWarning, match=r"3 of 3 targets have a score that is not positive"):
        e = made(pictures(made.model.graph, 3), 1)
    assert (e.output[:, 1] <= 0).all()
    assert (e.explained == 0).all()
    assert (e.relevance == 0).all()


@pytest.mark.parametrize(("batch", "message"), [
    (np.zeros((1, 2, 5, 6)), "has shape"), (np.zeros((6, 5)), "has shape"), (np.zeros(()), "has shape"),
    (np.full((2, 2, 6, 5), np.nan), "picture 0 holds NaN"), (np.full((1, 2, 6, 5), 1e300), "picture 0 holds NaN or infinity"),
    (np.array(["a"]), "has type"), ([[1, 2], [3]], "no array of one shape"), (np.zeros((1, 2, 6, 5), complex), "has type"),
    (None, "has type"),
])
def test_bad_batches(batch, message):
    with pytest.raises(InputError, match=message):
        explainer(small())(batch)


def test_an_empty_batch_gives_an_empty_explanation():
    e = explainer(small())(np.zeros((0, 2, 6, 5), np.float32))
    assert e.relevance.shape == (0, 2, 6, 5)
    assert e.output.shape == (0, 3)


def test_values_beyond_the_box_are_clipped_and_it_says_so():
    made = explainer(small())
    batch = pictures(made.model.graph, 2)
    with pytest.warns(ExplanationWarning, match="2 of 2 pictures have values beyond"):
        e = made(batch * 5)
    assert (e.relevance == explain(made, np.clip(batch * 5, -1, 1)).relevance).all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made(np.clip(batch, -1, 1) * np.float32(1 + 1e-6))  # rounding of a preprocessing is no reason to speak


def test_overflow_is_an_error():
    graph = g.Graph((g.Conv2d("a", ("input",), np.full((1, 1, 1, 1), 1e30)), g.ReLU("r", ("a",)), g.Flatten("f", ("r",)),
                     g.Dense("d", ("f",), np.full((1, 1), 1e30))), (1, 1, 1), (0, 1))
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
    batch = pictures(made.model.graph, 7)
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
    batch = pictures(made.model.graph, count)
    expected = explain(made, batch).relevance
    child = os.fork()
    if not child:
        os._exit(0 if (explain(made, batch).relevance == expected).all() else 1)
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


def test_an_error_in_one_thread_reaches_the_caller_and_the_next_call_works(monkeypatch):
    made = explainer(small(), threads=3)
    batch = pictures(made.model.graph, 2)
    expected = explain(made, batch).relevance
    plan = made._take_plan(2, 3)

    def fail():
        raise MemoryError("on purpose")

    plan._forward[1][0] = fail
    made._give_back(plan)
    with pytest.raises(MemoryError, match="on purpose"):
        explain(made, batch)
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
            explain(made, pictures(made.model.graph, 1))
    assert explain(made, pictures(made.model.graph, 1)).relevance.shape == (1, 2, 6, 5)


def test_memory_of_batch_sizes_that_are_over_is_given_back():
    made = explainer(small())
    made._kept_bytes = 3 * made._take_plan(1, 1).nbytes
    for count in range(1, 20):
        explain(made, pictures(made.model.graph, count))
    assert sum(plan.nbytes for plan in made._idle) <= made._kept_bytes


def test_a_mean_that_is_rounded_beyond_its_bound_makes_no_negative_relevance():
    for seed in range(60):
        rng = np.random.default_rng(seed)
        low = -rng.random(2)
        graph = g.Graph((g.AveragePool2d("pool", (g.INPUT,), (3, 3)),
                         g.Conv2d("conv", ("pool",), rng.standard_normal((3, 2, 2, 2)), [1.0] * 3), g.ReLU("relu", ("conv",)),
                         g.Flatten("flat", ("relu",)), g.Dense("scores", ("flat",), np.ones((1, 12)))), (2, 5, 5), (low, low + 0.7))
        batch = np.broadcast_to(np.float32(low)[:, None, None], (1, 2, 5, 5))
        for rules in ("dtd", {"pool": "flat"}):
            e = explain(explainer(graph, rules), batch)
            assert (e.relevance >= 0).all()
            assert all((lost >= 0).all() for lost in e.ledger.values())
            assert e.relevance.sum(dtype=np.float64) + e.absorbed[0] == pytest.approx(e.explained[0], rel=1e-5)


@pytest.mark.parametrize("options", [{"device": "tpu"}, {"threads": 0}, {"threads": True}, {"threads": 1.5}])
def test_bad_options(options):
    with pytest.raises(InputError):
        Explainer(Model(small(), Preprocessing(None)), **options)
