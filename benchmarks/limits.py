"""What heatmaps of deep Taylor decomposition do and do not tell, in figures: the tables of docs/limits.md.

    .venv/bin/python benchmarks/limits.py PICTURE... [--model NAME=FILE]... [--write] [--draw OUT.jpg]

SqueezeNet 1.1 is bundled; other networks are model files. --write puts the tables where docs/limits.md has them, --draw
draws its picture, of the first picture.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
from tables import markdown, write_table

import fastdtd
from fastdtd import heatmap, images
from fastdtd.graph import Conv2d, Dense, Graph

PAGE = Path(__file__).parents[1] / "docs" / "limits.md"
REGION = 8  # side, in pixels
PRESETS = ("dtd", "zennit.epsilon_plus", "zennit.epsilon_gamma_box", "captum.lrp", "gradient*input")


def pixels(e):
    """(N, H, W)"""
    return e.relevance.sum(1, dtype=np.float64)


def regions(maps):
    """(N, rows, columns): sums over squares of pixels; what is left over at the borders is left out."""
    rows, columns = (side // REGION for side in maps.shape[1:])
    inside = maps[:, :rows * REGION, :columns * REGION]
    return inside.reshape(len(maps), rows, REGION, columns, REGION).sum((2, 4))


def correlation(ones, others):
    """On average over pictures, with the standard deviation."""
    found = [np.corrcoef(one.ravel(), other.ravel())[0, 1] for one, other in zip(ones, others, strict=True)]
    return f"{np.mean(found):.3f} ± {np.std(found):.3f}"


def shuffled(model, share):
    """The network with the weights of its last layers, a share of all, each in another order."""
    rng, graph = np.random.default_rng(0), model.graph
    weighted = [layer for layer in graph if isinstance(layer, (Conv2d, Dense))]
    last = weighted[len(weighted) - max(1, round(share * len(weighted))):]
    layers = [replace(layer, weight=rng.permutation(layer.weight.ravel()).reshape(layer.weight.shape))
              if layer in last else layer for layer in graph]
    return replace(model, graph=Graph(tuple(layers), graph.input_shape, graph.box))


def classes(model, batch):
    """The winner's map beside those of other classes, and of a network whose last layers know nothing."""
    order = np.argsort(-fastdtd.Explainer(model).predict(batch), 1)
    for preset in PRESETS:
        explainer = fastdtd.Explainer(model, preset)
        winners = pixels(explainer(batch, order[:, 0]))
        row = [f"`{preset}`", *(correlation(winners, pixels(explainer(batch, order[:, rank]))) for rank in (1, 9, 99))]
        for share in (0, 0.5):
            other = fastdtd.Explainer(shuffled(model, share), preset)
            row.append(correlation(winners, pixels(other(batch, other.predict(batch).argmax(1)))))
        yield row


def objects(model, batch):
    """Two photographs side by side: how much of the positive relevance of a class lies in the half that shows it; 0
    where none is positive."""
    scores = fastdtd.Explainer(model).predict(batch)
    half = batch.shape[3] // 2
    middle = slice(half // 2, half // 2 + half)
    others = np.roll(np.arange(len(batch)), 1)
    both = batch.copy()
    both[..., :half], both[..., half:2 * half] = batch[..., middle], batch[others][..., middle]
    left, right = scores.argmax(1), scores[others].argmax(1)
    kept = left != right
    ways = {f"`{preset}`": preset for preset in PRESETS}
    if shared := shared_biases(model):
        ways["`z+(bias=shared)` in depthwise layers"] = shared
    for name, rules in ways.items():
        explainer, row = fastdtd.Explainer(model, rules), [name]
        for against in (None, right, "others", "softmax-gradient"):
            if against is not None and not explainer.conserves:
                row.append("")
                continue
            if isinstance(against, np.ndarray):
                parts = [explainer(one, int(target), against=int(other)).relevance
                         for one, target, other in zip(both, left, right, strict=True)]
                maps = np.concatenate(parts)
            else:
                maps = explainer(both, left, against=against).relevance
            positive = np.maximum(maps.sum(1, dtype=np.float64), 0)[kept]
            shares = positive[..., :half].sum((1, 2)) / np.maximum(positive.sum((1, 2)), 1e-30)
            row.append(f"{np.mean(shares):.0%} ± {np.std(shares):.0%}")
        yield row


def shared_biases(model):
    """Rules that share the biases of depthwise layers; none where there are no such layers."""
    return {layer.name: "z+(bias=shared)" for layer in model.graph if isinstance(layer, Conv2d) and layer.groups > 1}


def biases(models, batches):
    everywhere = {"type:conv2d": "z+(bias=shared)", "type:dense": "z+(bias=shared)"}
    for (name, model), batch in zip(models.items(), batches, strict=True):
        shared = shared_biases(model)
        ways = {"`dtd`": "dtd", "`zennit.epsilon_plus`": "zennit.epsilon_plus", "`captum.lrp`": "captum.lrp"}
        if shared:
            ways |= {"`z+(bias=shared)` in depthwise layers": shared, "`z+(bias=shared)` in all layers": everywhere}
        for title, rules in ways.items():
            e = fastdtd.Explainer(model, rules)(batch)
            shares = e.absorbed / e.explained
            yield [f"{name}, {title}", f"{np.median(shares):.1%}", f"{shares.min():.1%}", f"{shares.max():.1%}"]


def ties(model, batch):
    """The map of a picture that was changed by less than a thousandth of a grey level."""
    explainer, rng = fastdtd.Explainer(model), np.random.default_rng(0)
    low, high = (bound[:, None, None] for bound in model.graph.box)
    flat = batch.copy()
    flat[:, :, :, :batch.shape[3] // 2] = ((low + high) / 2)[None]  # half of it one grey
    for name, given in (("as they are", batch), ("half of each one grey", flat)):
        noise = rng.uniform(-0.5, 0.5, given.shape) * (high - low) / 255 / 1000
        one, other = explainer(given), explainer(np.clip(given + noise, low, high).astype(np.float32))
        change = np.abs(other.explained / one.explained - 1).mean()
        row = [name, f"{change:.0e}"]
        for maps in (pixels(one), pixels(other)), (regions(pixels(one)), regions(pixels(other))):
            distance = [np.linalg.norm(a - b) / np.linalg.norm(a) for a, b in zip(*maps, strict=True)]
            row += [f"{np.median(distance):.1%}", f"{max(distance):.1%}"]
        yield row


def first_rules(model, batch):
    first = next(layer.name for layer in model.graph if isinstance(layer, Conv2d))
    usual = pixels(fastdtd.Explainer(model)(batch))
    for rule in ("w2", "flat", "z+", "epsilon(bias=ignored)", "gamma(bias=ignored)"):
        maps = pixels(fastdtd.Explainer(model, {first: rule})(batch))
        yield [f"`{rule}`", correlation(usual, maps), correlation(regions(usual), regions(maps))]


def tables(models, pictures):
    batches = [np.stack([model.preprocess(picture) for picture in pictures]) for model in models.values()]
    for (name, model), batch in zip(models.items(), batches, strict=True):
        label = "" if name == "SqueezeNet 1.1" else f" of {name}"
        yield f"limits.py classes{label}", ["rules", "runner-up", "tenth", "hundredth", "last layer shuffled",
                                            "last half shuffled"], classes(model, batch)
        yield f"limits.py objects{label}", ["rules", "its map", "against the other", "all others",
                                            "softmax gradient"], objects(model, batch)
    yield "limits.py biases", ["network, rules", "absorbed: median", "least", "most"], biases(models, batches)
    yield "limits.py ties", ["pictures", "scores", "pixels: median", "most", "regions: median", "most"], ties(
        next(iter(models.values())), batches[0])
    heads = ["first layer by", "pixels", "regions"]
    yield "limits.py first", heads, first_rules(next(iter(models.values())), batches[0])


def draw(models, picture, out):
    """A row for each network: two maps that look the same, their difference, and two more."""
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(len(models), 6, figsize=(14, 2.5 * len(models)), squeeze=False, layout="constrained")
    for (network, model), line in zip(models.items(), panels, strict=True):
        explainer = fastdtd.Explainer(model)
        second = int(np.argsort(-explainer.predict(picture)[0])[1])
        grouped = shared_biases(model)
        first = next(layer.name for layer in model.graph if isinstance(layer, Conv2d))
        last = ("biases shared", grouped) if grouped else ("first layer by w2", {first: "w2"})
        shown = {"winner": explainer(picture), "runner-up": explainer(picture, second),
                 "their difference": explainer(picture, against="runner-up"),
                 last[0]: fastdtd.Explainer(model, last[1])(picture),
                 "softmax gradient": explainer(picture, against="softmax-gradient")}
        line[0].imshow(images.fit(images.open_picture(picture), model.graph.input_shape[:0:-1],
                                  model.preprocessing.resize))
        line[0].set_title(network, fontsize=9)
        for panel, (title, e) in zip(line[1:], shown.items(), strict=True):
            found = pixels(e)[0]
            panel.imshow(heatmap.colors(found, heatmap.scale_of(found)) / 255)
            is_lost = not e.context.against and e.absorbed[0] > 0.01 * e.explained[0]
            absorbed = f", {e.absorbed[0] / e.explained[0]:.0%} absorbed" if is_lost else ""
            panel.set_title(f"{title}{absorbed}", fontsize=9)
        for panel in line:
            panel.axis("off")
    figure.savefig(out, dpi=80, pil_kwargs={"quality": 85})


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pictures", type=Path, nargs="+")
    parser.add_argument("--model", action="append", default=[], metavar="NAME=FILE")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--draw", metavar="OUT.jpg")
    options = parser.parse_args()
    models = {name: fastdtd.load(file) for name, _, file in
              [("SqueezeNet 1.1", "", "squeezenet1_1"), *(item.partition("=") for item in options.model)]}
    if options.draw:
        draw(models, options.pictures[0], options.draw)
    for script, heads, rows in tables(models, options.pictures):
        table = markdown(heads, rows)
        print(f"{script}\n{table}\n", flush=True)
        if options.write:
            write_table(PAGE, script, table)


if __name__ == "__main__":
    main()
