"""Does time grow linearly with the number of layers? Load, plan and explain a chain, and dense blocks as in DenseNet.

    .venv/bin/python benchmarks/scaling.py

Each network is saved and loaded again, and its explanation is checked for conservation. A step that is quadratic shows
as microseconds a layer that grow with the layers.
"""

import argparse
import itertools
import tempfile
import time
from pathlib import Path

import numpy as np

import fastdtd
from fastdtd import graph as g

CHAIN = (625, 1250, 2500, 5000, 9996)
DENSE = (250, 500, 1000, 2000)
_CHANNELS, _BLOCK = 4, 8


def conv(name, source, inputs):
    """Each output is the mean of all channels: activations keep their size, however many layers there are."""
    return g.Conv2d(name, (source,), np.full((_CHANNELS, inputs, 1, 1), 1 / inputs))


def network(layers, source, channels):
    head = [g.GlobalAveragePool("mean", (source,)), g.Dense("scores", ("mean",), np.ones((2, channels)))]
    return fastdtd.Model(g.Graph((*layers, *head), (_CHANNELS, 6, 6), (0.0, 1.0)), fastdtd.Preprocessing(None))


def chain(count):
    """`count` layers: convolutions and ReLUs one after the other."""
    layers, source = [], g.INPUT
    for i in range(count // 2 - 1):
        layers += [conv(f"conv{i}", source, _CHANNELS), g.ReLU(f"relu{i}", (f"conv{i}",))]
        source = f"relu{i}"
    return network(layers, source, _CHANNELS)


def dense(count):
    """`count` layers in dense blocks: each convolution reads all before it in its block, through concatenations."""
    layers, source, channels, i = [], g.INPUT, _CHANNELS, 0
    while len(layers) < count - 2:
        layers += [conv(f"conv{i}", source, channels), g.ReLU(f"relu{i}", (f"conv{i}",))]
        if i % _BLOCK == _BLOCK - 1:  # a transition: the block's channels become few again
            source, channels = f"relu{i}", _CHANNELS
        else:
            layers.append(g.Concat(f"join{i}", (source, f"relu{i}")))
            source, channels = f"join{i}", channels + _CHANNELS
        i += 1
    return network(layers, source, channels)


def measure(model):
    """Seconds of each stage, for one image; and bytes of the plan."""
    batch = np.full((1, *model.graph.input_shape), 0.5, np.float32)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "net.h5")
        times = [("save", time.perf_counter())]
        fastdtd.save(model, path)
        times.append(("load", time.perf_counter()))
        model = fastdtd.load(path)
    times.append(("pack and schedule", time.perf_counter()))
    explainer = fastdtd.Explainer(model, threads=1)
    times.append(("first call", time.perf_counter()))
    explainer(batch)
    times.append(("explain", time.perf_counter()))
    e = explainer(batch)
    times.append(("", time.perf_counter()))
    np.testing.assert_allclose(e.sum + e.absorbed, e.explained, rtol=1e-3)
    return {name: after - at for (name, at), (_, after) in itertools.pairwise(times)}


def main():
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    measure(chain(20))  # compiles what is needed
    measure(dense(20))
    for title, make, counts in (("chain", chain, CHAIN), ("dense blocks", dense, DENSE)):
        print(f"{title}: microseconds a layer\n{'layers':>8} ", end="")
        for row, count in enumerate(counts):
            model = make(count)
            seconds = measure(model)
            layers = len(model.graph.layers)
            if not row:
                print(" ".join(f"{name:>18}" for name in (*seconds, "all, seconds")))
            cells = [f"{1e6 * of_stage / layers:18.1f}" for of_stage in seconds.values()]
            print(f"{layers:8} ", *cells, f"{sum(seconds.values()):18.2f}")


if __name__ == "__main__":
    main()
