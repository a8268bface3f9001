"""Where the time of one network's explanation goes: layer by layer, next to its floor.

    .venv/bin/python benchmarks/profile_layers.py "ResNet-18" --batch 4
    .venv/bin/python benchmarks/profile_layers.py --summary           # all networks, by kernel
    .venv/bin/python benchmarks/profile_layers.py LeNet --batch 8 --call    # a call, beside its kernels

One thread. A step's floor is the time of its multiply-adds at the measured ceiling of the tile product, or of its
operands at the measured rate of copying, whichever is more; y and z count as one product, which is what the direct
convolution takes. "GFLOP/s" counts the definition (two products forward, one back), so that kernels which need fewer
can be above the ceiling. Times are medians over whole explanations, each step timed in its turn, so that caches hold
what they hold in real use.

With --call it prints instead what a whole call takes, by one thread and by two, what its kernels take of that on the
thread with the most images, and the difference: checks, memory, threads, results. The least of many calls, for others
that compute meanwhile only add to it.
"""

import argparse
import statistics
import sys
import time
from collections import defaultdict
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from networks import NETWORKS, network, pictures
from steps import Steps, ceiling, copy_rate

import fastdtd
from fastdtd import lowering
from fastdtd.graph import Conv2d


def measure(steps, rounds):
    """Median seconds of each step."""
    times = [[] for _ in range(len(steps))]
    for _ in range(rounds):
        for step, own in enumerate(times):
            steps.advance_to(step)
            start = time.perf_counter()
            steps.run(step)
            own.append(time.perf_counter() - start)
    return [statistics.median(own) for own in times]


def least(function, seconds=2):
    """Seconds that a function takes, or says that it took."""
    function()
    times, end = [], time.perf_counter() + seconds
    while (start := time.perf_counter()) < end:
        said = function()
        times.append(said if isinstance(said, float) else time.perf_counter() - start)
    return min(times)


def explainer_of(name, threads):
    return fastdtd.Explainer(fastdtd.Model(network(name), fastdtd.Preprocessing(None)), threads=threads)


def print_early(name, batch, threads, rounds):
    """What it gains to compute early layers image by image: whole calls in turns with the same schedule layer by layer.
    """
    ways, early_layers = [], lowering._early_layers
    for early in (early_layers, lambda graph, layers: 0):
        lowering._early_layers = early
        ways.append(explainer_of(name, threads))
        images = pictures(ways[0].model.graph, batch)
        ways[-1](images)  # which makes the schedule
    lowering._early_layers = early_layers
    first, second = (explainer(images) for explainer in ways)
    np.testing.assert_array_equal(first.relevance, second.relevance)
    ratios = []
    for _ in range(rounds):
        times = []
        for explainer in ways:
            start = time.perf_counter()
            explainer(images)
            times.append(time.perf_counter() - start)
        ratios.append(times[0] / times[1])
    print(f"{name}, batch {batch}, {threads} threads: image by image over layer by layer "
          f"{statistics.median(ratios):.3f}")


def print_call(name, batch, threads):
    explainer = explainer_of(name, threads)
    images = pictures(explainer.model.graph, batch)
    steps = Steps(name, -(-batch // threads))
    plan, middle = steps.plan, steps.plan.schedule.forward_steps
    passes = plan.prepared(range(middle)), plan.prepared(range(middle, len(steps)))

    def kernels():
        plan.input[:] = images[:len(plan.input)]
        times = [time.perf_counter()]
        passes[0]()
        times.append(time.perf_counter())
        target = plan.output.argmax(1)
        plan.start[:] = 0
        plan.start[np.arange(len(target)), target] = 1
        times.append(time.perf_counter())
        passes[1]()
        return time.perf_counter() - times[2] + times[1] - times[0]

    call, own = least(lambda: explainer(images)), least(kernels)
    print(f"{name}, batch {batch}, {threads} threads: a call {call * 1e6:.0f} us, its kernels {own * 1e6:.0f}, beside "
          f"them {(call - own) * 1e6:.0f}")


def print_steps(steps, times, top, rate):
    print(
        f"{'layer':12} {'kernel':26} {'output':>16} {'ms':>8} {'floor':>8} {'x floor':>8} {'GFLOP/s':>8} "
        f"{'of ceiling':>10} {'GB/s':>6}"
    )
    rows = defaultdict(lambda: np.zeros(4))  # seconds, floor, operations, bytes: of all images of an early layer
    for step, seconds in enumerate(times):
        rows[steps.layer(step).name, steps.kernel(step)] += (
            seconds, steps.floor(step, top, rate), steps.operations(step), steps.least_bytes(step))
    for (layer, kernel), (seconds, floor, operations, moved) in rows.items():
        if seconds < 2e-6:  # nothing to do
            continue
        products = f"{operations / seconds / 1e9:8.0f} {operations / seconds / top:10.2f}" if operations else " " * 19
        print(f"{layer:12} {kernel:26} {'x'.join(map(str, steps.graph.shapes[layer])):>16} {seconds * 1e3:8.3f} "
              f"{floor * 1e3:8.3f} {seconds / floor:8.1f} {products} {moved / seconds / 1e9:6.1f}")


def print_kernels(steps, times, top, rate):
    sums = defaultdict(lambda: [0, 0.0, 0.0, 0])
    for step, seconds in enumerate(times):
        own = sums[steps.kernel(step)]
        own[0] += 1
        own[1] += seconds
        own[2] += steps.floor(step, top, rate) if seconds >= 2e-6 else 0
        own[3] += steps.operations(step)
    for name, (count, seconds, floor, operations) in sorted(sums.items(), key=lambda item: -item[1][1]):
        rate_text = f", {operations / seconds / 1e9:.0f} GFLOP/s" if operations else ""
        print(f"  {name:26} {count:4} steps {seconds * 1e3:9.3f} ms, floor {floor * 1e3:8.3f} ms{rate_text}")


def print_fractions(fractions):
    """What the convolutions of 64 channels or more, in and out, reach of the ceiling."""
    print(
        "\nshare of the ceiling, convolutions from 64 channels or more to as many: min, lower quarter, median, max, "
        "how many reach 0.8")
    for name, own in sorted(fractions.items()):
        own.sort()
        print(
            f"  {name:26} {len(own):4} layers {own[0]:.2f} {own[len(own) // 4]:.2f} {statistics.median(own):.2f} "
            f"{own[-1]:.2f} "
            f"{sum(fraction >= 0.8 for fraction in own):4}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("nets", nargs="*", help=f"of {', '.join(NETWORKS)} (default: all), or model files")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--summary", action="store_true", help="by kernel only")
    parser.add_argument("--call", action="store_true", help="what a whole call takes beside its kernels")
    parser.add_argument("--early", action="store_true",
                        help="what it gains to compute the first layers image by image, on two threads")
    options = parser.parse_args()
    if options.early:
        for name in options.nets or NETWORKS:
            print_early(name, 2 * options.batch, 2, 5 * options.rounds)
        return
    if options.call:
        for name in options.nets or NETWORKS:
            for threads in (1, 2):
                print_call(name, options.batch, threads)
        return
    top, rate = ceiling(), copy_rate()
    print(f"ceiling of the tile product {top / 1e9:.0f} GFLOP/s, copying {rate / 1e9:.1f} GB/s (read and written)")
    fractions = defaultdict(list)
    for name in options.nets or NETWORKS:
        steps = Steps(name, options.batch)
        times = measure(steps, options.rounds)
        print(f"\n{name}, batch {options.batch}: {sum(times) * 1e3 / options.batch:.2f} ms an image")
        if not options.summary:
            print_steps(steps, times, top, rate)
        print_kernels(steps, times, top, rate)
        for step, seconds in enumerate(times):
            layer, operations = steps.layer(step), steps.operations(step)
            if isinstance(layer, Conv2d) and operations and min(layer.weight.shape[1],
                                                                len(layer.weight) // layer.groups) >= 64:
                fractions[steps.kernel(step)].append(operations / seconds / top)
    if fractions:
        print_fractions(fractions)


if __name__ == "__main__":
    main()
