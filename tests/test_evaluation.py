"""Evaluation: against the curve written down in plain NumPy, and what its numbers must not depend on."""

import csv
import tarfile

import naive
import numpy as np
import pytest
from explaining import small, two_layers
from PIL import Image

import fastdtd
from fastdtd import cli, evaluation, plot, sources
from fastdtd import graph as g
from fastdtd.errors import FastDTDError, InputError, OutputError
from fastdtd.model import Model, Preprocessing
from fastdtd.rules import assign

METHODS = ["dtd", "gradient", "gradient*input", "sensitivity", "random", "edges"]


def one_channel(box=(0.0, 2.0)):
    rng = np.random.default_rng(4)
    return g.Graph((g.Conv2d("conv", ("input",), rng.standard_normal((3, 1, 3, 3))), g.ReLU("relu", ("conv",)),
                    g.Flatten("flat", ("relu",)), g.Dense("scores", ("flat",), rng.standard_normal((2, 3 * 6 * 9)))),
                   (1, 8, 11), box)


def model_of(graph):
    return Model(graph, Preprocessing(None))


def images_of(graph, count):
    low, high = graph.box or (np.float32(-2), np.float32(2))
    return np.random.default_rng(7).uniform(low.min(), high.max(), (count, *graph.input_shape)).astype(np.float32)


def drops_of(result):
    return {(curve.method, curve.order): curve.drops for curve in result.curves}


# ---- The oracle ------------------------------------------------------------------------------------------------------


def derivative(graph, image, target):
    found, step = np.zeros(image.shape), 1e-6
    for place in np.ndindex(image.shape):
        change = np.zeros(image.shape)
        change[place] = step
        found[place] = (naive.forward(graph, image + change)[graph.output][target]
                        - naive.forward(graph, image - change)[graph.output][target]) / (2 * step)
    return found


def sobel(image):
    grey, found = image.mean(0), np.zeros(image.shape[1:])
    kernel = np.array([[-1, 0, 1], [-2, 0, 2], [-1, 0, 1]])
    height, width = grey.shape
    for y, x in np.ndindex(found.shape):
        near = np.array([[grey[min(max(y + i, 0), height - 1), min(max(x + j, 0), width - 1)] for j in (-1, 0, 1)]
                         for i in (-1, 0, 1)])
        found[y, x] = np.hypot((near * kernel).sum(), (near * kernel.T).sum())
    return found[None]


def relevance(model, image, target, method):
    match method:
        case "random":
            return np.zeros(image.shape)
        case "edges":
            return sobel(image)
        case "dtd":
            rules = {name: rule.rule for name, rule in assign(model.graph).rules.items()}
            return naive.explain(model.graph, image, target, rules)[0]
    found = derivative(model.graph, image, target)
    return {"gradient": found, "gradient*input": found * image, "sensitivity": found**2}[method]


def curve(model, image, number, method, order, steps, region, repeats, seed, target=None):
    """(L + 1,) of one picture."""
    graph, image = model.graph, image.astype(float)
    scores = naive.forward(graph, image)[graph.output]
    target = scores.argmax() if target is None else target
    found = relevance(model, image, target, method)
    return falls(graph, image, number, found, lambda scores: scores[target], order, steps, region, repeats, seed)


def falls(graph, image, number, found, score, order, steps, region, repeats, seed):
    """Of what `score` makes of an image's scores, in the order of relevance `found`."""
    before = score(naive.forward(graph, image)[graph.output])
    _, height, width = image.shape
    regions = [(slice(y, y + region), slice(x, x + region))
               for y in range(height % region // 2, height - region + 1, region)
               for x in range(width % region // 2, width - region + 1, region)]
    top, left, bottom, right = regions[0][0].start, regions[0][1].start, regions[-1][0].stop, regions[-1][1].stop
    window, shape = (slice(top, bottom), slice(left, right)), (len(image), bottom - top, right - left)
    sign = -1 if order == "most" else 1
    drops = np.zeros((repeats, steps + 1))
    for repeat in range(repeats):
        rng = np.random.default_rng([seed, number, repeat])
        shuffled = rng.permutation(len(regions))
        low, high = graph.box if graph.box is not None else (image.min((1, 2)), image.max((1, 2)))
        noise = np.zeros(image.shape)
        noise[(..., *window)] = rng.uniform(low[:, None, None], high[:, None, None], shape).astype(np.float32)
        in_order = sorted(range(len(regions)), key=lambda i: (sign * found[(..., *regions[i])].sum(), shuffled[i]))
        replaced = image.copy()
        for step, i in enumerate(in_order[:steps], 1):
            replaced[(..., *regions[i])] = noise[(..., *regions[i])]
            drops[repeat, step] = before - score(naive.forward(graph, replaced)[graph.output])
    return drops.mean(0)


@pytest.mark.parametrize(("graph", "region", "steps", "repeats", "count", "target"), [
    (small(), 2, 6, 1, 3, None),  # 6 x 5: the last column is left over
    (small(box=None), 1, 7, 2, 2, [0, 2]),
    (two_layers((-0.5, 1.0)), 3, 2, 3, 2, 1),  # 7 x 5: one region beside another, and borders
    (one_channel(), 3, 6, 2, 1, None),  # 8 x 11: borders on all sides
    (one_channel(None), 8, 1, 1, 1, None),
])
def test_agrees_with_the_oracle(graph, region, steps, repeats, count, target):
    model, images = model_of(graph), images_of(graph, count)
    result = fastdtd.evaluate(model, images, METHODS, "both", steps, region, repeats, target, 5)
    assert not result.failed
    found = drops_of(result)
    assert set(found) == {(method, order) for method in [*METHODS[:4], "edges"]
                          for order in ("most", "least")} | {("random", "any")}
    targets = np.resize(target, count) if target is not None else [None] * count
    for (method, order), drops in found.items():
        expected = [curve(model, image, i, method, order, steps, region, repeats, 5, targets[i])
                    for i, image in enumerate(images)]
        np.testing.assert_allclose(drops, expected, atol=1e-4, err_msg=f"{method}, {order}")


@pytest.mark.parametrize("against", ["runner-up", 2, [0, 1], [1, 1, 2]])
def test_what_the_target_is_held_against_falls_too(against):
    """Relevance from plain calls; the runner-up is that of the picture as it is."""
    graph = small()
    model, batch = model_of(graph), images_of(graph, 3)
    found = drops_of(fastdtd.evaluate(model, batch, ["dtd", "gradient"], "least", 5, 2, 1, 1, 5, against=against))
    explainer = fastdtd.Explainer(model)
    for i, image in enumerate(batch):
        e = explainer(image, 1, against=against)
        rivals = np.atleast_1d(max((0, 2), key=e.output[0].__getitem__) if against == "runner-up" else against)

        def score(scores, rivals=rivals):
            return scores[1] - scores[rivals].mean(0)

        slope = derivative(graph, image.astype(float), 1) - np.mean(
            [derivative(graph, image.astype(float), k) for k in rivals], 0)
        for method, relevant in (("dtd", e.relevance[0]), ("gradient", slope)):
            expected = falls(graph, image.astype(float), i, relevant, score, "least", 5, 2, 1, 5)
            np.testing.assert_allclose(found[method, "least"][i], expected.ravel(), atol=1e-4)


def test_a_curve_of_what_goes_through_channels():
    graph = two_layers((-0.5, 1.0))
    model, batch = model_of(graph), images_of(graph, 2)
    layer = next(layer.name for layer in graph if isinstance(layer, g.Conv2d))
    found = drops_of(fastdtd.evaluate(model, batch, ["dtd"], region=2, seed=5, target=1, through={layer: [0, 2]}))
    explainer = fastdtd.Explainer(model)
    differs = False
    for i, image in enumerate(batch):
        relevant = explainer(image, 1, through={layer: [0, 2]}).relevance[0]
        differs |= not np.array_equal(relevant, explainer(image, 1).relevance[0])
        expected = falls(graph, image.astype(float), i, relevant, lambda scores: scores[1], "most",
                         found["dtd", "most"].shape[1] - 1, 2, 1, 5)
        np.testing.assert_allclose(found["dtd", "most"][i], expected.ravel(), atol=1e-4)
    assert differs


def test_means_errors_and_areas():
    drops = np.array([[0.0, 1, 2], [0, 3, 10]])
    curve = evaluation.Curve("dtd", "most", drops)
    np.testing.assert_allclose(curve.mean, [0, 2, 6])
    np.testing.assert_allclose(curve.standard_error, [0, 1, 4])
    assert curve.aopc == pytest.approx(8 / 3)
    assert curve.aopc_error == pytest.approx((13 / 3 - 1) / 2)
    alone = evaluation.Curve("dtd", "most", drops[:1])
    assert np.isnan(alone.standard_error).all()
    assert np.isnan(alone.aopc_error)


# ---- What the numbers must not depend on -----------------------------------------------------------------------------


def test_the_seed_alone_decides(monkeypatch):
    """The same bits with any number of threads, memory, and cuts into chunks and jobs; others with another seed."""
    model, images = model_of(small()), images_of(small(), 7)

    def drops(seed=3, **options):
        return drops_of(fastdtd.evaluate(model, images, METHODS, "both", region=2, repeats=2, seed=seed, **options))

    expected = drops(threads=1)
    assert all(not np.array_equal(other, expected[key]) for key, other in drops(4).items())
    monkeypatch.setattr(evaluation, "_CHUNK", 3)
    monkeypatch.setattr(evaluation, "_JOB_BYTES", 5 * images[0].nbytes)
    for options in ({"threads": 1}, {"threads": 3}, {"memory": "300KB"}):
        for key, other in drops(**options).items():
            np.testing.assert_array_equal(other, expected[key])
    one = fastdtd.evaluate(model, images, "random", "least", region=2, repeats=2, seed=3)  # whatever the others are
    np.testing.assert_array_equal(one.curves[0].drops, expected["random", "any"])


def test_regions_of_the_same_relevance_come_in_a_random_order():
    """In that of the method "random": where all have the same, the two are one."""
    graph = small()
    model, images = model_of(graph), np.full((4, *graph.input_shape), 0.5, np.float32)
    found = drops_of(fastdtd.evaluate(model, images, ["edges", "random"], "both", region=1))
    for order in ("most", "least"):
        np.testing.assert_array_equal(found["edges", order], found["random", "any"])


def test_most_falls_before_least():
    """A network that looks at one place alone: its region is the first, or the last."""
    weight = np.zeros((1, 36))
    weight[0, 14] = 1  # row 2, column 2
    graph = g.Graph((g.Flatten("flat", ("input",)), g.Dense("scores", ("flat",), weight)), (1, 6, 6), (0.0, 1.0))
    found = drops_of(fastdtd.evaluate(model_of(graph), np.ones((2, 1, 6, 6)), ["dtd", "gradient", "edges"], "both",
                                      region=2))
    for method in ("dtd", "gradient"):
        most, least = found[method, "most"], found[method, "least"]
        assert (most[:, 1:] == most[:, 1:2]).all()
        assert (most[:, 1] > 0).all()
        assert (least[:, :-1] == 0).all()
        np.testing.assert_array_equal(least[:, -1], most[:, -1])  # both orders end with the same picture


def test_pictures_and_those_that_cannot_be_read(tmp_path):
    """The others' numbers are what they are without."""
    graph = one_channel()
    model = Model(graph, Preprocessing("gray", scale=1 / 255))
    rng = np.random.default_rng(0)
    pictures = [Image.fromarray(rng.integers(0, 255, (9, 14), np.uint8)) for _ in range(4)]
    (tmp_path / "bad.png").write_text("no picture")
    pictures[2].save(tmp_path / "good.png")
    steps = []
    all_good = fastdtd.evaluate(model, pictures, "dtd", region=2, on_progress=steps.append)
    assert sum(steps) == 4
    given = [pictures[0], tmp_path / "bad.png", tmp_path / "good.png", pictures[3]]
    some = fastdtd.evaluate(model, given, "dtd", region=2, on_progress=steps.append)
    assert sum(steps) == 8
    assert list(some.failed) == [1]
    assert "bad.png' is damaged" in some.failed[1]
    np.testing.assert_array_equal(some.curves[0].drops, all_good.curves[0].drops[[0, 2, 3]])
    with pytest.raises(InputError, match=r"none of 1 pictures can be evaluated: picture .* is damaged"):
        fastdtd.evaluate(model, [tmp_path / "bad.png"], "dtd", region=2)


def test_images_of_a_set_and_rules_of_ones_own(tmp_path, capsys):
    """From a tar; by a preset with another rule for a layer."""
    graph = one_channel()
    model = Model(graph, Preprocessing("gray", scale=1 / 255))
    rng = np.random.default_rng(0)
    with tarfile.open(tmp_path / "set.tar", "w") as tar:
        for i in range(3):
            Image.fromarray(rng.integers(0, 255, (9, 14), np.uint8)).save(tmp_path / f"{i}.png")
            tar.add(tmp_path / f"{i}.png", f"{i}.png")
    rules = {"conv": "flat"}
    files = fastdtd.evaluate(model, [tmp_path / f"{i}.png" for i in range(3)], {"mine": rules, "dtd": "dtd"}, region=2)
    of_tar = fastdtd.evaluate(model, sources.find([tmp_path / "set.tar"]), {"mine": rules, "dtd": "dtd"}, region=2)
    assert list(drops_of(of_tar)) == [("mine", "most"), ("dtd", "most")]
    for curve, drops in drops_of(files).items():
        np.testing.assert_array_equal(drops_of(of_tar)[curve], drops)
    assert not np.array_equal(drops_of(files)["mine", "most"], drops_of(files)["dtd", "most"])
    fastdtd.save(model, tmp_path / "net.h5")
    assert cli.main(["evaluate", str(tmp_path / "net.h5"), str(tmp_path / "set.tar"), "-o", str(tmp_path / "out"),
                     "--region", "2", "--methods", "dtd", "--rule", "conv=flat"]) == 0
    said = capsys.readouterr().out
    assert "dtd, conv=flat" in said
    assert "3 evaluated" in said


@pytest.mark.parametrize("method", ["dtd", "random"])
def test_pictures_beyond_float32_are_left_out(method):
    graph = g.Graph((g.Flatten("flat", ("input",)), g.Dense("scores", ("flat",), np.full((2, 9), 1e15))), (1, 3, 3))
    images = np.random.default_rng(0).random((5, 1, 3, 3), np.float32)
    images[3] *= 1e25
    result = fastdtd.evaluate(model_of(graph), images, method, region=1)
    assert {i: reason.split(";")[0] for i, reason in result.failed.items()} == {
        3: "picture 3 gives scores beyond float32"}
    expected = fastdtd.evaluate(model_of(graph), images[:3], method, region=1).curves[0].drops
    np.testing.assert_array_equal(result.curves[0].drops[:3], expected)


def test_noise_beyond_float32_leaves_its_picture_out():
    graph = g.Graph((g.Flatten("flat", ("input",)), g.Dense("scores", ("flat",), np.full((2, 9), 1e20))), (1, 3, 3),
                    (0.0, 1e30))
    with pytest.raises(InputError, match="none of 2 pictures can be evaluated: picture 0 gives scores beyond float32"):
        fastdtd.evaluate(model_of(graph), np.ones((2, 1, 3, 3)), "random", region=1)


@pytest.mark.parametrize(("options", "message"), [
    ({"methods": "magic"}, r"method 'magic' is unknown; required: some of dtd, .*sensitivity, random, edges"),
    ({"methods": ["dtd", 3]}, "method 3 is unknown"),
    ({"methods": []}, "there are no methods; required: some of dtd"),
    ({"order": "best"}, "order is 'best'; required: most, least or both"),
    ({"region": 7}, "region is 7; required: a whole number from 1 to 5, of the input of 6 x 5 pixels"),
    ({"region": 0}, "region is 0"),
    ({"region": 2.0}, "region is 2.0"),
    ({"region": 2, "steps": 7}, "steps is 7; required: a whole number from 1 to 6, for there are 6 regions of 2 x 2"),
    ({"steps": 0}, "steps is 0"),
    ({"repeats": 0}, "repeats is 0; required: a whole number from 1"),
    ({"repeats": True}, "repeats is True"),
    ({"seed": -1}, "seed is -1; required: a whole number from 0"),
    ({"target": 9}, "target 9 is not an output"),
    ({"target": [0]}, "1 targets were given for 2 images"),
    ({"target": 9, "against": 0}, "target 9 is not an output"),
    ({"against": "others"}, "against is 'others', under which what is explained sums to 0.*'runner-up'"),
    ({"against": "softmax-gradient"}, "so no score can fall"),
    ({"against": 9}, "target 9 is not an output"),
    ({"through": {"none": 0}}, "the network has no layer 'none'"),
    ({"through": {"scores": 0}, "methods": ["dtd", "gradient*input"]},
     r"method 'gradient\*input' derives, and no relevance goes through channels; .*--methods dtd,random"),
    ({"memory": "much"}, "memory is 'much'"),
    ({"memory": "1KB"}, "one image takes"),
    ({"threads": 0}, "threads is 0"),
    ({"pictures": np.zeros((0, 2, 6, 5))}, "there are no pictures"),
    ({"pictures": []}, "there are no pictures"),
    ({"pictures": np.zeros((2, 6, 6, 5))}, "the batch has shape"),
    ({"pictures": np.full((2, 2, 6, 5), np.nan)}, "holds NaN"),
    ({"pictures": ["cat.png"]}, "this model's input is no picture"),
    ({"model": "squeezenet1_1"}, "required: a Model"),
])
def test_bad_input(options, message):
    graph = small()
    given = {"model": model_of(graph), "pictures": np.zeros((2, *graph.input_shape)), "methods": "random", "region": 1,
             **options}
    with pytest.raises(FastDTDError, match=message):
        fastdtd.evaluate(**given)


# ---- Files -----------------------------------------------------------------------------------------------------------


def test_table_and_files(tmp_path):
    graph = small()
    result = fastdtd.evaluate(model_of(graph), images_of(graph, 3), ["dtd", "random"], "both", region=2)
    lines = str(result).splitlines()
    assert lines[0].split() == ["method", "order", "AOPC", "standard", "error", "pictures"]
    assert [line.split()[:2] for line in lines[1:]] == [["dtd", "most"], ["dtd", "least"], ["random", "any"]]
    assert {len(line) for line in lines} == {len(lines[0])}
    result.save(tmp_path / "new" / "out")
    with open(tmp_path / "new" / "out" / "evaluation.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3 * 7
    for curve in result.curves:
        of_curve = [row for row in rows if (row["method"], row["order"]) == (curve.method, curve.order)]
        assert [int(row["step"]) for row in of_curve] == list(range(7))
        np.testing.assert_allclose([float(row["mean"]) for row in of_curve], curve.mean, rtol=1e-8)
        np.testing.assert_allclose([float(row["standard_error"]) for row in of_curve], curve.standard_error, rtol=1e-8)
    with Image.open(tmp_path / "new" / "out" / "evaluation.png") as image:
        assert image.size == result.plot().size
    assert len(list((tmp_path / "new" / "out").iterdir())) == 2
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write to"):
        result.save(tmp_path / "file")


def colors_in(image):
    return {tuple(color) for color in np.unique(np.asarray(image).reshape(-1, 3), axis=0).tolist()}


def test_plot_shows_every_curve():
    values = np.linspace(0, 10, 51)
    lines = [plot.Line(str(i), values * (i + 1), values / 10, i, is_dashed=i % 2 == 1) for i in range(7)]
    colors = colors_in(plot.draw(lines, "x", "y"))
    assert {plot._color(line) for line in lines} <= colors
    alone = [plot.Line("one picture", values, np.full(51, np.nan), 0)]
    assert len(colors_in(plot.draw(alone, "x", "y"))) < len(colors)


@pytest.mark.parametrize("values", [[0.0, 0.0], [0.0, -3.0, -1e-9], [0.0, 1e9], [0.0, 1e-9, 2e-9], [0.0] + [5.0] * 600])
def test_plot_of_any_values(values):
    values = np.array(values)
    image = plot.draw([plot.Line("a", values, 0 * values, 0)], "x", "y")
    assert plot._color(plot.Line("a", values, values, 0)) in colors_in(image)
    assert image.width < 1000


@pytest.mark.parametrize(("low", "high", "count", "expected"), [
    (0, 10, 5, [0, 2, 4, 6, 8, 10]), (-1.5, 3.9, 6, [-1, 0, 1, 2, 3]), (0, 0.003, 3, [0, 0.001, 0.002, 0.003]),
    (0, 100, 6, [0, 20, 40, 60, 80, 100]),
])
def test_ticks(low, high, count, expected):
    assert plot._ticks(low, high, count) == expected


def test_ticks_of_whole_numbers():
    assert plot._ticks(0, 2, 6, whole=True) == [0, 1, 2]
