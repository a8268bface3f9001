"""Every kernel on every layer shape of the seven networks: time, GFLOP/s, share of the micro-kernel's ceiling, bytes.

    .venv/bin/pytest benchmarks/bench_kernels.py --benchmark-json=kernels.json
    .venv/bin/pytest benchmarks/bench_kernels.py -k "ResNet and conv2d" --benchmark-sort=name

Operands are those of a real explanation, which is checked (conserved, not negative) before any kernel is timed; tests/
hold each kernel to the float64 oracle. What is computed from the median is under "extra_info" of the JSON;
`profile_layers.py` prints it as tables.
"""

import functools
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from networks import NETWORKS
from steps import Steps, ceiling, copy_rate

BATCH = 4


@functools.lru_cache(1)  # one network's memory at a time
def steps_of(name):
    return Steps(name, BATCH)


@functools.cache
def ceilings():
    return ceiling(), copy_rate()


def cases():
    """Each shape once; a network is made here to see its shapes and again to run it, so as not to hold all at once."""
    seen = set()
    for name in NETWORKS:
        steps = steps_of(name)
        for step in range(len(steps)):
            shapes = steps.shapes(step)
            if shapes not in seen and not steps.kernel(step).startswith("absorb"):  # has nothing to do, or not twice
                seen.add(shapes)
                yield pytest.param(name, step, id=f"{name}-{steps.layer(step).name}-{steps.kernel(step)}")


@pytest.mark.parametrize(("name", "step"), cases())
def test_kernel(benchmark, name, step):
    steps, (top, rate) = steps_of(name), ceilings()
    steps.advance_to(step)
    benchmark.group = steps.kernel(step)
    benchmark.pedantic(steps.run, (step,), rounds=9, iterations=1, warmup_rounds=2)
    if benchmark.stats is None:  # --benchmark-disable
        return
    seconds, operations = benchmark.stats.stats.median, steps.operations(step)
    benchmark.extra_info |= {"GFLOP/s": operations / seconds / 1e9, "share of ceiling": operations / seconds / top,
                             "least bytes": steps.least_bytes(step), "GB/s": steps.least_bytes(step) / seconds / 1e9,
                             "times floor": seconds / steps.floor(step, top, rate)}
