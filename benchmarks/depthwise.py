"""Which rule for depthwise layers, whose biases carry most of a score? Region perturbation of EfficientNet-Lite0.

    .venv-peers/bin/python benchmarks/depthwise.py PICTURE... [--crops N] [--docs]

Of each photograph it takes the largest square in its middle and N - 1 squares of three quarters of that side, at places
of a fixed seed. Crops of one photograph are averaged before anything else is: standard errors are those of photographs,
and differences are paired. --docs puts the table where docs/limits.md has it.
"""

import argparse
import math
import sys
from pathlib import Path

import numpy as np
from tables import markdown, write_table
from tqdm import tqdm

import fastdtd
from fastdtd import images
from fastdtd.graph import Conv2d

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests" / "peers"))
PAGE = ROOT / "docs" / "limits.md"
SMALLER = 0.75  # side of the other crops, of the largest square's


def methods(model):
    shared = "z+(bias=shared)"
    depthwise = {layer.name: shared for layer in model.graph if isinstance(layer, Conv2d) and layer.groups > 1}
    return {"`dtd`": "dtd", f"`{shared}` in depthwise layers": depthwise,
            f"`{shared}` in all layers": {"type:conv2d": shared, "type:dense": shared},
            "`gradient*input`": "gradient*input", "random": None}


def crops(path, count):
    """Squares of a photograph."""
    picture = images.open_picture(path).convert("RGB")
    rng, largest = np.random.default_rng(0), min(picture.size)
    for i in range(count):
        side = largest if i == 0 else round(SMALLER * largest)
        room = [length - side for length in picture.size]
        left, top = (n // 2 for n in room) if i == 0 else rng.integers(0, room, endpoint=True).tolist()
        yield picture.crop((left, top, left + side, top + side))


def text(values):
    """Mean and standard error."""
    return f"{np.mean(values):.2f} ± {np.std(values, ddof=1) / math.sqrt(len(values)):.2f}"


def areas(model, options):
    """By method and order, the area over the curve of each photograph."""
    squares = [square for path in options.pictures for square in crops(path, options.crops)]
    rules = methods(model)
    own = {"random" if rule is None else name: rule for name, rule in rules.items()}
    with tqdm(total=len(squares), unit="crop", file=sys.stderr, disable=None) as bar:
        result = fastdtd.evaluate(model, squares, own, "both", options.steps, options.region, options.repeats,
                                  on_progress=bar.update, threads=options.threads)
    if result.failed:
        raise SystemExit(f"not evaluated: {result.failed}")
    return {(curve.method, curve.order): curve.drops.mean(1).reshape(-1, options.crops).mean(1)
            for curve in result.curves}


def table(found):
    heads = ["rules", "most relevant first", "less `dtd`", "better for", "least relevant first", "less `dtd`"]
    rows = []
    for name in dict.fromkeys(method for method, _ in found):
        row = [name]
        for order in ("most", "least"):
            own, usual = found.get((name, order), found.get((name, "any"))), found["`dtd`", order]
            row += [text(own), *([""] if name == "`dtd`" else [text(own - usual)])]
            if order == "most":
                row.append("" if name == "`dtd`" else f"{(own > usual).sum()} of {len(own)}")
        rows.append(row)
    return markdown(heads, rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pictures", type=Path, nargs="+")
    parser.add_argument("--crops", type=int, default=3, help="of each photograph (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--region", type=int, default=9)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--docs", action="store_true", help="write the table into docs/limits.md")
    options = parser.parse_args()
    from torch_nets import efficientnet  # which is in tests/peers

    _, model = efficientnet()
    count = len(options.pictures)
    said = f"""\
Region perturbation ([howto-evaluate.md](howto-evaluate.md)) of EfficientNet-Lite0: how far the winner's score falls on
average while {options.steps} regions of {options.region} x {options.region} pixels are replaced. {count} photographs,
of each {options.crops} crops, which are averaged; ± is the standard error over photographs.

"""
    made = said + table(areas(model, options))
    print(made)
    if options.docs:
        write_table(PAGE, "depthwise.py", made)


if __name__ == "__main__":
    main()
