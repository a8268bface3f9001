"""Bound calls: arguments arrive as they were given, and threads that share a list of steps stay in step."""

import threading

import numpy as np
import pytest
from fastdtd.kernels import cpu
from fastdtd.kernels.cpu.jit import kernel


@kernel
def write_down(out, bytes_in, matrix, cube, number, flag, fraction, first, last):
    """out <- what arrived."""
    out[0] = len(bytes_in) + bytes_in[-1] / 256
    out[1] = matrix.shape[0] + matrix.shape[1] / 10 + matrix[-1, 0] / 100
    out[2] = cube[1, 2, 3] + cube.size / 1000 + cube.strides[0] / 100000
    out[3] = number + flag / 10
    out[4:6] = first, last
    out[6] = fraction


@kernel
def add_behind(sums, order, worker, first, last):
    """sums[i] <- sums[i - 1] + 1 for the units, cut in two: right only where the other worker is done with those
    before.
    """
    for i in range(first, last):
        sums[i] = sums[i - 1 if i else len(sums) - 1] + 1
    order[worker] += 1


def table_of(*calls):
    return np.array([(code, slots.ctypes.data, first, last) for (code, slots), first, last in calls], np.int64)


def test_arguments_arrive_as_they_were_given():
    out = np.zeros(7)
    cube = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    arguments = [out, np.array([1, 2, 64], np.uint8), np.array([[7], [8]], np.int32), cube, -5, True, -0.75]
    bound = cpu.bind(write_down, arguments)
    assert cpu.run_steps(table_of((bound, 3, 9)), np.zeros(1, np.int64), np.zeros(2, np.int64), np.zeros(1, np.int64),
                         1)
    np.testing.assert_allclose(out, [3.25, 2.18, 23.02448, -4.9, 3, 9, -0.75])


def test_only_wanted_steps_are_done_in_their_order():
    out = [np.zeros(7) for _ in range(3)]
    cube = np.zeros((2, 3, 4), np.float32)
    bound = [
        cpu.bind(write_down,
                 [o, np.zeros(1, np.uint8), np.zeros((1, 1), np.int32), cube, i, 0, np.inf]) for i, o in enumerate(out)
    ]
    table = table_of(*((b, 0, 1) for b in bound))
    progress = np.array([1, 0])  # as if the first of those wanted were done
    assert cpu.run_steps(table, np.array([0, 2]), progress, np.zeros(1, np.int64), 1)
    assert [o[5] for o in out] == [0, 0, 1]
    assert progress[0] == 2


@pytest.mark.parametrize("workers", [2, 3, 5])
def test_workers_meet_after_each_step(workers):
    """More of them than processors, at times: who waits for long gives the processor away and goes on with the same
    progress.
    """
    units, rounds, looks_again = 7 * workers, 50, []
    sums, order, counter = np.zeros(units), np.zeros(workers, np.int64), np.zeros(1, np.int64)
    # Each step is one worker's turn, the others have no units: without the meeting, sums would be read before they are
    # written.
    keep = [cpu.bind(add_behind, [sums, order, worker]) for worker in range(workers)]
    tables = [
        table_of(*((keep[worker], *((7 * turn, 7*turn + 7) if turn == worker else (0, 0))) for turn in range(workers)))
        for worker in range(workers)
    ]
    wanted = np.tile(np.arange(workers), rounds)

    def work(table):
        progress = np.zeros(2, np.int64)
        while not cpu.run_steps(table, wanted, progress, counter, workers):
            looks_again.append(1)

    threads = [threading.Thread(target=work, args=(table,), daemon=True) for table in tables]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    np.testing.assert_array_equal(sums, (rounds - 1) * units + np.arange(units) + 1)
    assert list(order) == [rounds * workers] * workers
    assert counter[0] == rounds * workers * workers


def test_a_worker_waits_no_longer_where_another_failed():
    counter, progress = np.zeros(1, np.int64), np.zeros(2, np.int64)
    sums, order = np.zeros(1), np.zeros(1, np.int64)
    bound = cpu.bind(add_behind, [sums, order, 0])
    table, wanted = table_of((bound, 0, 0)), np.zeros(3, np.int64)
    assert not cpu.run_steps(table, wanted, progress, counter, 2)  # nobody else is there
    assert not cpu.run_steps(table, wanted, progress, counter, 2)
    assert (list(progress), counter[0], order[0]) == ([0, 1], 1, 1)
    counter[0] = cpu.BROKEN
    assert cpu.run_steps(table, wanted, progress, counter, 2)
    assert order[0] == 1
    assert cpu.run_steps(table, wanted, np.zeros(2, np.int64), counter, 2)  # one that arrives after the failure
    assert order[0] == 2
