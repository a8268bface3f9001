"""Limited memory, and many callers and threads at once: right results, and nobody waits forever."""

import os
import re
import signal
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
from explaining import (
    bound,
    describe,
    eventually,
    explain,
    explainer,
    many,
    nothing_is_taken,
    one_image,
    plans_of,
    small,
    taken,
)
from fastdtd.kernels import cpu
from graphs import graphs, images
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdtd import executor as executor_module
from fastdtd.errors import InputError
from fastdtd.inputs import memory_size
from fastdtd.plan import Plan
from fastdtd.threads import Task

# ---- Threads ---------------------------------------------------------------------------------------------------------


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
    with taken(plans_of(made), 1, 2):  # as if another thread were at work
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


def test_an_error_in_one_thread_reaches_the_caller_and_the_next_call_works():
    made = explainer(small(), threads=3)
    batch = images(made.model.graph, 2)
    expected = explain(made, batch).relevance
    with taken(plans_of(made), 2, 3) as plan:
        def run_steps(steps, *others):
            if steps is plan._tables[1]:
                raise MemoryError("on purpose")
            return cpu.run_steps(steps, *others)

        plan._kernels = SimpleNamespace(**vars(cpu) | {"run_steps": run_steps})
    with pytest.raises(InputError, match=r"no memory left for it .on purpose.; fewer images at a time"):
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


def test_a_small_network_is_left_to_one_thread(monkeypatch):
    """And gives the same bits."""
    graph = small()
    batch = images(graph, 1, seed=0)
    shared = explainer(graph, threads=2)
    monkeypatch.setattr("fastdtd.executor._SMALL_NETWORK", 1 << 25)
    alone = explainer(graph, threads=2)
    np.testing.assert_array_equal(alone(batch).relevance, shared(batch).relevance)
    assert (alone._executor._pool_of_threads, shared._executor._pool_of_threads is None) == (None, False)


# ---- Limited memory, many callers ------------------------------------------------------------------------------------


class Watched(Plan):
    """A Plan that is counted: its memory from when it first runs until it is gone, and its threads while it runs."""

    def explain(self, begin, submit=None):
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
        super().explain(lambda: (self.between(), begin()), submit)
        with self.lock:
            self.running.remove(self.schedule.workers)

    def between(self):
        """What tests let fail: called between the two passes, by the thread that runs them."""


@pytest.fixture
def watched(monkeypatch):
    for name, value in (("touched", weakref.WeakSet()), ("running", []), ("most_bytes", [0]), ("most_workers", [0]),
                        ("sizes", set()), ("limit", None), ("lock", threading.Lock())):
        monkeypatch.setattr(Watched, name, value, raising=False)
    monkeypatch.setattr(executor_module, "Plan", Watched)
    return Watched


@pytest.mark.slow
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
        message = r"one image takes \d+KiB .*, and memory is limited to '0.1KB'; raise the limit"
        with pytest.raises(InputError, match=message) as error:
            explainer(graph, threads=threads, memory="0.1KB")
        with pytest.raises(InputError, match=f"limited to {one - 1}; raise"):
            explainer(graph, threads=threads, memory=one - 1)
        assert explain(explainer(graph, threads=threads, memory=one), images(graph, 4)).relevance.any()
    wanted = re.search(r"takes (\S+)", str(error.value))[1]
    explainer(graph, memory=wanted)  # what it asks for is enough


@pytest.mark.parametrize(("memory", "number"), [
    ("2GiB", 2 << 30), ("1.5 MiB", 3 << 19), (" 64kib ", 64 << 10), ("3GB", 3 * 10**9), ("500MB", 5 * 10**8),
    ("7KB", 7000), (12345, 12345),
])
def test_amounts_of_memory(memory, number):
    assert memory_size(memory) == number


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("images_that_fit", [None, 1, 2, 3.5, 10])
def test_many_callers_of_all_sizes(watched, threads, images_that_fit):
    """Right results, no more memory or threads than allowed, errors where they belong, and nobody waits forever."""
    graph = small()
    memory = images_that_fit and int(images_that_fit * one_image(graph, threads))
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
        def fail(_):
            raise KeyboardInterrupt("on purpose")

        patch.setattr(watched, "between", fail)
        for _ in range(3):
            with pytest.raises(KeyboardInterrupt, match="on purpose"):
                explain(made, batch[:count])
            assert nothing_is_taken(made)
    watched.running.clear()
    assert (explain(made, batch).relevance == expected.relevance).all()


@pytest.mark.parametrize("of_caller", [True, False])
def test_a_part_that_fails_is_the_callers_or_a_threads(watched, monkeypatch, of_caller):
    """The caller explains the last images itself; what either raises is raised, and the other's plan is given back."""
    made = explainer(small(), threads=2)
    batch = images(made.model.graph, 6)
    expected = explain(made, batch).relevance
    plans_of(made).idle.clear()
    failed = []

    def fail(_):
        is_caller = threading.current_thread() is threading.main_thread()
        if is_caller == of_caller:
            failed.append(is_caller)
            raise ZeroDivisionError

    with monkeypatch.context() as patch:
        patch.setattr(watched, "between", fail)
        with pytest.raises(ZeroDivisionError):
            explain(made, batch)
        assert failed == [of_caller]
        assert nothing_is_taken(made)
    assert (explain(made, batch).relevance == expected).all()


def test_after_a_failure_no_more_is_begun(watched, monkeypatch):
    graph = small()
    made = explainer(graph, threads=2, memory=2 * one_image(graph))
    batch = np.repeat(images(graph, 1), 100, 0)
    monkeypatch.setattr(watched, "between", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        explain(made, batch)
    assert len(watched.most_bytes) < 50


def test_what_no_thread_began_is_given_back_when_another_fails(monkeypatch):
    made, tasks = explainer(small(), threads=3), []

    class Late:
        """Begins the first task when it gets the second, and never the second."""

        def submit(self, function, loan, *others):
            tasks.append((Task(function, loan, *others), loan))
            if len(tasks) == 2:
                task, loan = tasks[0]
                loan.plan.input = None
                task.run()
            return tasks[-1][0]

    monkeypatch.setattr(made._executor, "_threads", Late)
    with pytest.raises(TypeError):
        explain(made, images(made.model.graph, 3))  # the last one by the caller itself
    task, loan = tasks[1]
    assert not task.is_done
    assert nothing_is_taken(made)
    loan.plan.input = None  # now it begins after all, and must not use a plan that others may have
    task.run()
    task.result()
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
        # goes on when another plan is there too
        plan.explain = lambda begin, submit, explain=plan.explain: (both.wait(), explain(begin, submit))
        plans_of(made).idle.append(plan)
    with ThreadPoolExecutor(callers) as executor:
        results = list(executor.map(lambda _: made(batch, 0).relevance, range(callers)))
    assert all((relevance == expected).all() for relevance in results)


def test_who_needs_much_is_not_overtaken():
    made, order = explainer(small(), threads=2), []

    def call(workers):
        with taken(plans_of(made), 1, workers):
            order.append(workers)

    callers = [threading.Thread(target=call, args=(workers,), daemon=True) for workers in (2, 1)]
    with taken(plans_of(made), 1, 1):
        callers[0].start()
        assert eventually(plans_of(made)._turn.locked)
        callers[1].start()  # there would be room for it now
        time.sleep(0.05)
        assert order == []
    for caller in callers:
        caller.join(30)
    assert order == [2, 1]


@pytest.mark.parametrize("memory", [
    "", "2", "GiB", "2G", "2 GB B", "-1GB", "1e3MB", "nanMB", "infGB", "0GiB", "\N{SUPERSCRIPT TWO}GB", 0, -1, True,
    1.5, b"2GiB", [2],
])
def test_what_is_no_amount_of_memory(memory):
    with pytest.raises(InputError, match=r"memory is .*; required: a number with one of the units"):
        explainer(small(), memory=memory)
