"""What is explained of a map: a picture of docs/gallery.md.

`python examples/maps.py OUT` cuts the pool off the bundled SqueezeNet, which leaves a map of scores for each class, and
explains parts of two of them, in a photograph that has both.
"""

import sys

import matplotlib.pyplot as plt
import numpy as np

import fastdtd
from fastdtd import heatmap, images
from fastdtd.graph import Flatten, GlobalAveragePool
from fastdtd.model_file import MODELS

CLASSES = "Egyptian cat", "espresso"


def main(out):
    whole = fastdtd.load("squeezenet1_1")
    kept = [layer for layer in whole.graph if not isinstance(layer, (GlobalAveragePool, Flatten))]
    model = fastdtd.Model(fastdtd.Graph(tuple(kept), whole.graph.input_shape, whole.graph.box), whole.preprocessing,
                          whole.classes)
    explainer = fastdtd.Explainer(model)
    cat, coffee = (np.array(images.fit(images.open_picture(MODELS / f"{one}.png"), (227, 227), "stretch"))
                   for one in ("chelsea", "coffee"))
    both = np.concatenate([cat[:, 57:170], coffee[:, 40:154]], 1)
    scores = explainer.predict(both)[0]
    figure, panels = plt.subplots(len(CLASSES), 6, figsize=(14, 5), layout="constrained")
    for name, quarter, line in zip(CLASSES, (1, 3), panels, strict=True):
        own = scores[model.class_index(name)]
        high = own > own.max() / 2
        center = own.shape[0] // 2, own.shape[1] * quarter // 4
        targets = [("the whole map", name), ("its highest score", (name, "max")), ("above half of it", (name, high)),
                   (f"at {center}", (name, *center))]
        line[0].imshow(both)
        line[1].imshow(own)
        line[1].set_title(f"scores of {name}", fontsize=9)
        for panel, (title, target) in zip(line[2:], targets, strict=True):
            e = explainer(both, target)
            pixels = heatmap.pixel_relevance(e.relevance[0])
            panel.imshow(heatmap.colors(pixels, heatmap.scale_of(pixels)) / 255)
            panel.set_title(f"{title}: {e.explained[0]:.1f}", fontsize=9)
            print(f"{name} {e.place()}: explained {e.explained[0]:.2f}, relevance {e.sum[0]:.2f}, absorbed "
                  f"{e.absorbed[0]:.2f}")
        for panel in line:
            panel.axis("off")
    figure.savefig(out, dpi=80, **({"pil_kwargs": {"quality": 85}} if out.endswith(".jpg") else {}))


if __name__ == "__main__":
    main(*sys.argv[1:])
