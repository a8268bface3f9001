"""Photographs by rule and by network: the pictures of docs/gallery.md.

`python examples/gallery.py OUT_FOLDER PICTURE... [--model NAME=FILE]...` draws a sheet for each network: a row for each
photograph, a column for each preset. SqueezeNet 1.1 is bundled; other networks are model files.
"""

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

import fastdtd
from fastdtd import heatmap, images

PRESETS = [
    "dtd", "zennit.epsilon_plus_flat", "zennit.epsilon_gamma_box", "zennit.epsilon_alpha2_beta1", "gradient*input",
    "sensitivity"
]


def sheet(model, pictures):
    batch = np.stack([model.preprocess(path) for path in pictures])
    columns = [fastdtd.Explainer(model, preset)(batch) for preset in PRESETS]
    for preset, e in zip(PRESETS, columns, strict=True):
        if e.ledger:  # derivatives have none
            print(
                f"{preset}: {', '.join(f'{share:.1%}' for share in e.absorbed / e.explained)} of the scores in the "
                f"ledger"
            )
    figure, panels = plt.subplots(len(pictures), 1 + len(PRESETS), figsize=(15, 2.35 * len(pictures)), squeeze=False,
                                  layout="constrained")
    for i, path in enumerate(pictures):
        panels[i, 0].imshow(
            images.fit(images.open_picture(path), model.graph.input_shape[:0:-1], model.preprocessing.resize))
        panels[i, 0].set_title(model.class_name(int(columns[0].target[i])).split(",")[0], fontsize=9)
        for panel, preset, e in zip(panels[i, 1:], PRESETS, columns, strict=True):
            pixels = heatmap.pixel_relevance(e.relevance[i])
            panel.imshow(heatmap.colors(pixels, heatmap.scale_of(pixels)) / 255)
            if i == 0:
                panel.set_title(preset, fontsize=9)
    for panel in panels.flat:
        panel.axis("off")
    return figure


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("pictures", type=Path, nargs="+")
    parser.add_argument("--model", action="append", default=[], metavar="NAME=FILE")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    for name, _, file in [("squeezenet1_1", "", "squeezenet1_1"), *(item.partition("=") for item in options.model)]:
        print(name)
        sheet(fastdtd.load(file), options.pictures).savefig(options.out / f"gallery_{name}.jpg", dpi=80,
                                                            pil_kwargs={"quality": 85})


if __name__ == "__main__":
    main()
