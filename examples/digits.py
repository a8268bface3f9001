"""z+ against alpha-beta and sensitivity analysis, on handwritten digits.

`python examples/digits.py FOLDER OUT.png` needs a folder with Caffe's LeNet (lenet.prototxt,
lenet_iter_10000.caffemodel) and MNIST's test digits (t10k-images-idx3-ubyte.gz).
"""

import gzip
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

import fastdtd
from fastdtd import heatmap

RULES = {
    "deep Taylor (z+)": "dtd", "alpha 2, beta 1": [
        "dtd",
        {"type:conv2d": "alpha-beta(alpha=2, beta=1)", "type:dense": "alpha-beta(alpha=2, beta=1)", "conv1": "zB"}
    ],
    "epsilon": ["dtd", {"type:conv2d": "epsilon(epsilon=0.25)", "type:dense": "epsilon(epsilon=0.25)",
                        "conv1": "zB"}], "sensitivity": "sensitivity",
}
SHOWN = [0, 1, 2, 3, 4, 7, 8, 18]  # of the test set


def main(folder, out):
    folder = Path(folder)
    model = fastdtd.convert(folder / "lenet.prototxt", folder / "lenet_iter_10000.caffemodel", scale=1 / 256,
                            box=(0, 255 / 256))
    content = gzip.decompress((folder / "t10k-images-idx3-ubyte.gz").read_bytes())
    digits = np.frombuffer(content, np.uint8, offset=16).reshape(-1, 1, 28, 28)[SHOWN]
    columns = {name: fastdtd.Explainer(model, rules)(digits.astype(np.float32) / 256) for name, rules in RULES.items()}
    figure, panels = plt.subplots(len(SHOWN), 1 + len(RULES), figsize=(7, 1.35 * len(SHOWN)), layout="constrained")
    for panel in panels.flat:
        panel.axis("off")
    for i, digit in enumerate(digits):
        panels[i, 0].imshow(digit[0], cmap="gray_r")
        for panel, (name, e) in zip(panels[i, 1:], columns.items(), strict=True):
            pixels = heatmap.pixel_relevance(e.relevance[i])
            panel.imshow(np.clip(heatmap.colors(pixels, heatmap.scale_of(pixels)) / 255, 0, 1))
            if i == 0:
                panel.set_title(name, fontsize=9)
    panels[0, 0].set_title("digit", fontsize=9)
    figure.savefig(out, dpi=110)
    for name, e in columns.items():
        against = -np.minimum(e.relevance, 0).sum((1, 2, 3)) / np.abs(e.relevance).sum((1, 2, 3))
        print(f"{name}: {against.mean():.0%} of the relevance's size is negative")


if __name__ == "__main__":
    main(*sys.argv[1:])
