"""The steps of a network's plan one by one: what each has to compute and move at least, and the processor's ceilings.
"""

import math
import time

import numpy as np
from networks import network, pictures
from numba import njit

from fastdtd import graph as g
from fastdtd.lowering import lower
from fastdtd.plan import Plan
from fastdtd.rules import assign
from fastdtd.warmup import load_kernels


class Steps:
    """A plan for one worker, step by step, with the operands of a real explanation."""

    def __init__(self, name, batch):
        self.kernels = load_kernels("cpu")
        self.graph = network(name)
        self._bind(lower(self.graph, assign(self.graph), self.kernels).schedule(batch), pictures(self.graph, batch))
        self._check()

    def _bind(self, schedule, images):
        self.plan, self.steps = Plan(schedule, self.kernels), schedule.steps
        self._runs = [self.plan.prepared((step,)) for step in range(len(schedule.steps))]
        self.layers = {layer.name: layer for layer in self.graph}
        self._images, self._position = images, 0

    def _check(self):
        """One explanation of each image's winner; an error where relevance is not conserved or negative."""
        self.advance_to(len(self))
        explained, plan = np.maximum(self._scores, 0), self.plan
        np.testing.assert_allclose(
            plan.relevance.sum((1, 2, 3), dtype=float) + plan.ledger.sum(1), explained, rtol=1e-4)
        assert plan.relevance.min() >= 0

    def advance_to(self, step):
        """Run the steps before this one, so that its operands are there: later ones use their memory again."""
        if step < self._position - 1:
            self._position = 0
        for i in range(self._position, step + 1):
            if i == 0:
                self.plan.input[:] = self._images
            if i == self.plan.schedule.forward_steps:
                scores = np.empty(self.plan.output.shape, np.float32)
                self.kernels.read(scores, self.plan.output)
                self._scores, start = scores.max(1), np.zeros_like(scores)
                start[np.arange(len(scores)), scores.argmax(1)] = self._scores > 0
                self.kernels.write(self.plan.start, start)
            if i < step:
                self.run(i)

    def __len__(self):
        return len(self.steps)

    def kernel(self, step):
        return self.steps[step].name

    def layer(self, step):
        return self.layers[self.steps[step].layer]

    def shapes(self, step):
        """All that the time of a step depends on: kernel, shapes, integers."""
        arguments = [
            argument.shape if isinstance(argument, np.ndarray) else argument for argument in self.plan.arguments(step)
        ]
        return self.kernel(step), *arguments

    def run(self, step):
        self._position = step + 1
        self._runs[step]()

    def operations(self, step):
        """Of the definition of a convolution or dense layer: two products forward (y and z), one back; 0 for others."""
        layer, kernel = self.layer(step), self.kernel(step)
        if not isinstance(layer, (g.Conv2d, g.Dense)) or kernel.startswith(("absorb", "clear")):
            return 0
        return 2 * self.multiply_adds(step) * (2 if kernel.endswith("forward") else 1)

    def multiply_adds(self, step):
        layer = self.layer(step)
        return self.steps[step].images * layer.weight[0].size * math.prod(self.graph.shapes[layer.name])

    def least_bytes(self, step):
        """Each operand read or written once: forward input, output, ratio and weights; back c, ratio, what is given
        back and weights.
        """
        layer = self.layer(step)
        numbers = self.steps[step].images * (2 * math.prod(self.graph.shapes[layer.name])
                                             + sum(math.prod(self.graph.shapes[name]) for name in set(layer.inputs)))
        return 4 * (numbers + (layer.weight.size if isinstance(layer, (g.Conv2d, g.Dense)) else 0))

    def floor(self, step, ceiling, copy_rate):
        """Seconds that the step takes at least: y and z cost one product (docs/kernels.md), and memory is no faster
        than copying.
        """
        product = 2 * self.multiply_adds(step) if self.operations(step) else 0
        return max(product / ceiling, self.least_bytes(step) / copy_rate)


def ceiling(seconds=0.5):
    """Operations a second of the tile product on operands in the first-level cache."""
    from fastdtd.kernels.cpu.microkernel import MULTIPLY_TILE, TILE_COLUMNS, TILE_ROWS
    multiply, depth = MULTIPLY_TILE[-1], 64

    @njit
    def repeat(tile, a, offsets, b, count):
        for _ in range(count):
            multiply(tile.ctypes.data, tile.shape[1], a.ctypes.data, offsets.ctypes.data, b.ctypes.data, depth)

    operands = (np.zeros((TILE_ROWS, TILE_COLUMNS), np.float32), np.ones((depth, TILE_ROWS), np.float32),
                np.arange(depth, dtype=np.int32) * TILE_COLUMNS, np.ones(depth * TILE_COLUMNS, np.float32))
    return best(lambda: repeat(*operands, 1000), seconds) * 1000 * 2 * depth * TILE_ROWS * TILE_COLUMNS


def copy_rate(seconds=0.5):
    """Bytes a second that one thread reads and writes, beyond all caches."""
    source = np.ones(1 << 25, np.float32)
    to = np.empty_like(source)
    return best(lambda: np.copyto(to, source), seconds) * 2 * source.nbytes


def best(function, seconds):
    """Calls a second, of the fastest."""
    function()
    times, end = [], time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return 1 / min(times)
