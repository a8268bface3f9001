"""Why this class and not another: the picture of docs/gallery.md.

`python examples/contrast.py OUT` explains the bundled photographs, of which one row has both, by SqueezeNet.
"""

import sys

import matplotlib.pyplot as plt
import numpy as np

import fastdtd
from fastdtd import heatmap, images
from fastdtd.model_file import MODELS


def main(out):
    model = fastdtd.load("squeezenet1_1")
    explainer = fastdtd.Explainer(model)
    cat, coffee = (np.array(images.fit(images.open_picture(MODELS / f"{one}.png"), (227, 227), "stretch"))
                   for one in ("chelsea", "coffee"))
    both = np.concatenate([cat[:, 57:170], coffee[:, 40:154]], 1)
    rows = [(cat, None, "runner-up"), (both, "Egyptian cat", "espresso")]
    figure, panels = plt.subplots(len(rows), 6, figsize=(14, 5), layout="constrained")
    for (picture, target, against), line in zip(rows, panels, strict=True):
        one, held = explainer(picture, target), explainer(picture, target, against=against)
        other = explainer(picture, held.against_name())
        shown = [(f"{name(one)} {one.explained[0]:.1f}", one), (f"{name(other)} {other.explained[0]:.1f}", other),
                 (f"difference {held.explained[0]:.1f}", held),
                 ("against all others (CLRP1)", explainer(picture, target, against="others")),
                 ("softmax gradient (SGLRP)", explainer(picture, target, against="softmax-gradient"))]
        line[0].imshow(picture)
        for panel, (title, e) in zip(line[1:], shown, strict=True):
            pixels = heatmap.pixel_relevance(e.relevance[0])
            panel.imshow(heatmap.colors(pixels, heatmap.scale_of(pixels)) / 255)
            panel.set_title(title, fontsize=9)
        for panel in line:
            panel.axis("off")
        maps = [heatmap.pixel_relevance(e.relevance[0]).ravel() for e in (one, other)]
        print(f"{name(one)} against {name(other)}: their maps correlate {np.corrcoef(maps)[0, 1]:.3f}; "
              f"{one.sum[0]:.2f} - {other.sum[0]:.2f} = {held.sum[0]:.2f}")
    figure.savefig(out, dpi=80, **({"pil_kwargs": {"quality": 85}} if out.endswith(".jpg") else {}))


def name(e):
    return e.class_name().split(",")[0]


if __name__ == "__main__":
    main(*sys.argv[1:])
