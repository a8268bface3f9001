"""After Ctrl-C in a call, at whatever moment, later calls do not wait for ever and give the same bits."""

import re
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
from explaining import explainer, small
from fastdtd.kernels import cpu
from graphs import images

from fastdtd import lowering, rules
from fastdtd.cli import _interrupts_kept
from fastdtd.plan import Plan
from fastdtd.threads import Threads

TESTS = Path(__file__).parent


@pytest.mark.slow
@pytest.mark.parametrize(("threads", "kind", "stride"), [
    (1, "own", 2), (2, "own", 2), (2, "shared", 2), (3, "shared", 2), (2, "memory", 5), (2, "at", 60),
])
def test_wherever_python_lets_one_in(threads, kind, stride):
    command = [sys.executable, str(TESTS / "interrupting.py"), str(threads), kind, str(stride)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    cut = int(re.match(r"(\d+) interrupted at \d+ places, and none stuck", result.stdout)[1])
    assert cut > 200


TIMER = f"""
import random, signal, sys, time, warnings
sys.path[:0] = [{str(TESTS)!r}]
from explaining import explainer, small
from graphs import images
from fastdtd import executor

warnings.simplefilter("ignore")
executor._SMALL_NETWORK = 0
made = explainer(small(), threads=2)
batch = images(made.model.graph, int(sys.argv[1]), seed=0)
expected = made(batch, 0).relevance
start = time.perf_counter()
for _ in range(20):
    made(batch, 0)
length = (time.perf_counter() - start) / 20
signal.signal(signal.SIGALRM, signal.default_int_handler)
random, cut = random.Random(0), 0
for _ in range(300):
    try:
        signal.setitimer(signal.ITIMER_REAL, random.uniform(1e-6, 1.2 * length))
        made(batch, 0)
        time.sleep(2 * length)
    except KeyboardInterrupt:
        cut += 1
    try:
        signal.setitimer(signal.ITIMER_REAL, 0)
    except KeyboardInterrupt:
        cut += 1
    assert (made(batch, 0).relevance == expected).all()
print(cut)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs signals")
@pytest.mark.parametrize("count", [1, 5])
def test_at_random_moments(count):
    result = subprocess.run([sys.executable, "-c", TIMER, str(count)], capture_output=True, text=True, timeout=120,
                            check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    assert int(result.stdout) > 200


def test_workers_do_not_wait_for_a_caller_that_is_gone():
    """Who stops before it comes to the barrier lets the others go."""
    graph = small()
    plan = Plan(lowering.lower(graph, rules.assign(graph, "dtd"), cpu).schedule(1, 3), cpu)
    threads, stopped = Threads(2), []

    class Stops(Exception):
        pass

    def run_steps(table, *others):
        if table is plan._tables[0]:
            stopped.append(table)
            raise Stops
        return cpu.run_steps(table, *others)

    plan._kernels = type("Kernels", (), {**vars(cpu), "run_steps": staticmethod(run_steps)})
    with pytest.raises(Stops):
        plan.forward(threads.submit)
    assert stopped
    threads.join()  # the two are free


def test_workers_do_not_wait_for_a_start_that_does_not_come():
    """Where what is called between the passes fails, the others are let go, and the plan can be used again."""
    graph = small()
    plan = Plan(lowering.lower(graph, rules.assign(graph, "dtd"), cpu).schedule(1, 3), cpu)
    threads = Threads(2)
    with pytest.raises(ZeroDivisionError):
        plan.explain(lambda: 1 / 0, threads.submit)
    plan.explain(lambda: plan.start.fill(1), threads.submit)
    threads.join()


def test_tasks():
    threads, done = Threads(2), []
    tasks = [threads.submit(done.append, i) for i in range(50)]
    for task in tasks:
        task.result()
    assert sorted(done) == list(range(50))
    failing = threads.submit(lambda: 1 / 0)
    failing.wait()
    assert failing.is_done
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            failing.result()
    threads.join()
    threads.join()


def test_threads_end_when_nobody_needs_them():
    threads = Threads(3)
    running = list(threads._threads)
    del threads
    for thread in running:
        thread.join(30)
    assert not any(thread.is_alive() for thread in running)


def test_a_process_ends_while_a_call_is_cut_short():
    script = TIMER.split("random, cut", 1)[0] + """
import os, threading
threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
while True:
    made(batch, 0)
"""
    result = subprocess.run([sys.executable, "-c", script, "5"], capture_output=True, text=True, timeout=120,
                            check=False)
    assert "KeyboardInterrupt" in result.stderr
    assert result.returncode in (130, -2), (result.returncode, result.stderr[-500:])


def test_calls_of_other_threads_go_on_when_one_is_cut_short():
    """A loan is its call's own: what one call leaves behind does not touch the others."""
    made = explainer(small(), threads=2)
    batch = images(made.model.graph, 4, seed=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = made(batch, 0).relevance
        pool = made._executor.devices[0][1]
        kept = pool.bind

        def cut(schedule):
            raise KeyboardInterrupt

        pool.idle.clear()
        pool.bind = cut
        with pytest.raises(KeyboardInterrupt):
            made(batch, 0)
        pool.bind = kept
        np.testing.assert_array_equal(made(batch, 0).relevance, expected)
    assert pool.used_bytes == pool.used_workers == 0


def test_an_interrupt_that_python_drops_comes_again():
    """As one in a destructor is: it would be printed, and the run go on."""
    class Dying:
        def __del__(self):
            signal.raise_signal(signal.SIGINT)

    def go_on():
        with _interrupts_kept():
            Dying()
            time.sleep(5)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # shells' background jobs ignore it
    try:
        with pytest.raises(KeyboardInterrupt):
            go_on()
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
