"""Decomposition against sensitivity analysis on a function of two variables: f(x) = max(0, x1) + max(0, x2).

`python examples/two_dimensions.py OUT.png` draws both as vector fields over the plane, after the introduction to deep
Taylor decomposition by the method's authors. Each arrow has what the two variables got at the point where it starts.
"""

import sys

import matplotlib.pyplot as plt
import numpy as np

import fastdtd
from fastdtd import graph as g

network = g.Graph((
    g.Dense("each", (g.INPUT,), np.eye(2)), g.ReLU("positive", ("each",)), g.Dense("f", ("positive",), np.ones((1, 2))),
), input_shape=(2, 1, 1))
model = fastdtd.Model(network, fastdtd.Preprocessing(None))


def field(rules, points):
    """(N, 2): what each variable gets at each point."""
    return fastdtd.Explainer(model, rules)(points.reshape(-1, 2, 1, 1).astype(np.float32), target=0)


def main(out):
    ticks = np.linspace(-1, 1, 17)
    points = np.stack(np.meshgrid(ticks, ticks), -1).reshape(-1, 2)
    points = points[(np.maximum(points, 0) > 0).any(1)]  # elsewhere f is zero and there is nothing to explain
    fine = np.linspace(-1.15, 1.15, 200)
    height = np.maximum(fine, 0)[:, None] + np.maximum(fine, 0)
    figure, panels = plt.subplots(1, 2, figsize=(8.4, 4.3), sharey=True, layout="constrained")
    for panel, (title, rules) in zip(panels, (("sensitivity analysis: squared derivatives", "sensitivity"),
                                              ("decomposition: deep Taylor", "dtd")), strict=True):
        arrows = field(rules, points).relevance.reshape(-1, 2)
        panel.contourf(fine, fine, height, levels=12, cmap="Blues", alpha=0.8)
        panel.quiver(*points.T, *arrows.T, angles="xy", pivot="tail", width=0.004, color="black",
                     scale=9 if rules == "dtd" else 18)
        panel.set(title=title, xlabel="$x_1$", aspect="equal", xticks=(-1, 0, 1), yticks=(-1, 0, 1))
        panel.axhline(0, color="gray", linewidth=0.5)
        panel.axvline(0, color="gray", linewidth=0.5)
    panels[0].set_ylabel("$x_2$")
    figure.suptitle("$f(x) = \\max(0, x_1) + \\max(0, x_2)$, the bluer the larger")
    figure.savefig(out, dpi=110)


if __name__ == "__main__":
    main(*sys.argv[1:])
