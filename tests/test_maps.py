"""Networks whose outputs are maps, as in segmentation and detection: what of a map is explained."""

import json
import pickle
import warnings

import h5py
import naive
import numpy as np
import pytest
from explaining import explainer
from PIL import Image
from test_evaluation import falls

import fastdtd
from fastdtd import channels, cli, devices, embed, embedded, runner, sources
from fastdtd import graph as g
from fastdtd.errors import FastDTDError
from fastdtd.inputs import ExplanationWarning, InputError
from fastdtd.model import Model, Preprocessing

SIZE = 3, 5, 7  # of the output
NAMES = ("ground", "tree", "sky")


def segmentation(box=(-1.0, 1.0), seed=0):
    """Down, up again by interpolation, joined with what was before, and a score for each class at each position."""
    rng = np.random.default_rng(seed)
    up = (np.abs(np.arange(5)[:, None] / 2 - np.arange(3)) < 1) * (1 - np.abs(np.arange(5)[:, None] / 2 - np.arange(3)))
    across = np.zeros((7, 4))
    across[np.arange(7), np.arange(7) // 2] = 1
    return g.Graph((
        g.Conv2d("early", (g.INPUT,), rng.standard_normal((4, 2, 3, 3)), rng.standard_normal(4), padding=(1, 1, 1, 1)),
        g.ReLU("r1", ("early",)), g.MaxPool2d("pool", ("r1",), (2, 2), (2, 2), (0, 0, 1, 1)),
        g.Conv2d("late", ("pool",), rng.standard_normal((6, 4, 1, 1)), rng.standard_normal(6)), g.ReLU("r2", ("late",)),
        g.Resize("up", ("r2",), up, across), g.Concat("both", ("r1", "up")),
        g.Conv2d("scores", ("both",), rng.standard_normal((3, 10, 1, 1)), rng.standard_normal(3)),
    ), (2, 5, 7), box)


def images(count=3, seed=1):
    return np.random.default_rng(seed).uniform(-1, 1, (count, 2, 5, 7)).astype(np.float32)


def checked(made, e, batch, starts):
    """That `e` decomposes `starts`, (N, K, H, W), as the oracle does."""
    rules = {name: rule.rule for name, rule in made.rules.items()}
    graph = made.model.graph
    for i, image in enumerate(batch):
        relevance, scores, absorbed = naive.explain(graph, image, 0, rules, starts[i].ravel())
        np.testing.assert_allclose(e.output[i], scores.reshape(SIZE), rtol=1e-4, atol=1e-5)
        scale = max(np.abs(starts[i]).sum(), 1)
        np.testing.assert_allclose(e.relevance[i], relevance, atol=1e-4 * scale)
        for name, lost in absorbed.items():
            assert abs(e.ledger[name][i] - lost) <= 1e-4 * scale
        assert abs(e.sum[i] + e.absorbed[i] - e.explained[i]) <= 1e-5 * scale
        np.testing.assert_allclose(e.explained[i], starts[i].sum(), atol=1e-4 * scale)


MASK = np.arange(35).reshape(5, 7) % 3 == 0


RULES = {"dtd": "dtd", "epsilon": {"type:conv2d": "epsilon(epsilon=0.01)"},
         "alpha-beta": {"type:conv2d": "alpha-beta(alpha=2, beta=1)"}}


@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize(("target", "channel", "region"), [
    (1, 1, np.ones((5, 7), bool)), ("sky", 2, np.ones((5, 7), bool)), ((2, 4, 6), 2, (4, 6)),
    (("tree", 0, 3), 1, (0, 3)),
    ((0, MASK), 0, MASK), ((1, MASK.astype(int)), 1, MASK), ((1, "max"), 1, None),
])
def test_parts_of_a_map_agree_with_the_oracle(rules, target, channel, region):
    made = fastdtd.Explainer(Model(segmentation(), Preprocessing(None), NAMES), RULES[rules], threads=2)
    batch = images()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExplanationWarning)
        e = made(batch, target)
    assert e.output.shape == (3, *SIZE)
    np.testing.assert_array_equal(e.output, made.predict(batch))
    starts = np.zeros_like(e.output)
    for i, scores in enumerate(e.output):
        own = np.zeros((5, 7), bool)
        own[np.unravel_index(scores[channel].argmax(), own.shape) if region is None else region] = True
        np.testing.assert_array_equal(e.region[i], own)
        starts[i, channel] = np.where(own, scores[channel] if rules != "dtd" else np.maximum(scores[channel], 0), 0)
        np.testing.assert_allclose(e.score[i], scores[channel][own].sum(), rtol=1e-5, atol=1e-6)
    assert (e.target == channel).all()
    assert (e.class_name(0), e.relevance.min() >= 0 or rules != "dtd") == (NAMES[channel], True)
    checked(made, e, batch, starts)


def test_the_highest_score_of_all_by_default():
    made, batch = explainer(segmentation()), images(5)
    e = made(batch)
    for i, scores in enumerate(e.output):
        channel, y, x = np.unravel_index(scores.argmax(), SIZE)
        assert (e.target[i], e.place(i)) == (channel, f"at ({y}, {x})")
        assert e.explained[i] == e.score[i] == scores.max()
    again = made(batch, [(int(channel), *np.argwhere(region)[0].tolist())
                         for channel, region in zip(e.target, e.region, strict=True)])
    np.testing.assert_array_equal(again.relevance, e.relevance)
    for i in range(5):
        np.testing.assert_array_equal(made(batch[i]).relevance[0], e.relevance[i])  # the same bits, alone
    np.testing.assert_allclose(e.at("input"), e.relevance, atol=1e-6)
    np.testing.assert_allclose(e.at("scores").sum((1, 2, 3)), e.explained, rtol=1e-6)
    assert f"{e.target[0]} {e.place(0)}  score" in repr(e)
    assert e.place(0) in e._repr_html_()
    assert pickle.loads(pickle.dumps(e)).place(0) == e.place(0)


def test_a_list_has_a_target_for_each_image():
    made, batch = explainer(segmentation()), images(3)
    targets = [1, (0, 2, 2), (2, "max")]
    e = made(batch, targets)
    for i, target in enumerate(targets):
        np.testing.assert_array_equal(e.relevance[i], made(batch[i], target).relevance[0])
    assert [e.place(i) for i in range(2)] == ["at all positions", "at (2, 2)"]
    assert made(batch, (1, MASK)).place(0) == "at 12 positions"
    np.testing.assert_array_equal(made(batch, np.array([1, 1, 0])).relevance, made(batch, [1, 1, 0]).relevance)


@pytest.mark.parametrize("rules", ["dtd", "epsilon"])
@pytest.mark.parametrize("against", ["runner-up", "others", "softmax-gradient", 0, [0, 2]])
def test_each_position_is_held_against_its_own_others(rules, against):
    """One pass; the oracle's is one for each position."""
    made, batch = explainer(segmentation(), RULES[rules]), images(2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExplanationWarning)
        e = made(batch, (1, MASK), against=against)
    names = {name: rule.rule for name, rule in made.rules.items()}
    assert e.against_name(0) == {0: "0", "runner-up": "runner-up"}.get(against if not isinstance(against, list) else "",
                                                                       "0; 2" if isinstance(against, list) else against)
    for i, image in enumerate(batch):
        expected = np.zeros((2, 5, 7))
        for y, x in np.argwhere(MASK):
            for sign, start in zip((1, -1), starts_of(e.output[i, :, y, x], against, rules != "dtd"), strict=True):
                whole = np.zeros(SIZE)
                whole[:, y, x] = start
                expected += sign * naive.explain(made.model.graph, image, 0, names, whole.ravel())[0]
        np.testing.assert_allclose(e.relevance[i], expected, atol=1e-4 * max(1, np.abs(e.output[i]).sum()))


def starts_of(scores, against, is_signed):
    """Of one position whose target is 1: what it starts with, and what the others do."""
    scores = scores.astype(float)
    own = scores if is_signed else np.maximum(scores, 0)
    others = [0, 2]
    ours, theirs = np.zeros(3), np.zeros(3)
    if against == "softmax-gradient":
        y = np.exp(scores - scores.max()) / np.exp(scores - scores.max()).sum()
        ours[1], theirs[others] = y[1] * y[others].sum(), y[1] * y[others]
        return ours, theirs
    ours[1] = own[1]
    if against == "others":
        theirs[others] = own[1] / 2
    else:
        held = [0, 2][np.argmax(scores[others])] if against == "runner-up" else against
        theirs[held] = own[held] / np.size(held)
    return ours, theirs


@pytest.mark.slow
@pytest.mark.parametrize("target", [None, 1, (2, 4, 6), (0, MASK), (1, "max")])
def test_gpus_agree(simulator, monkeypatch, target):
    """In a simulator of one."""
    from fastdtd.kernels import cuda

    image, expected = images(1), explainer(segmentation())
    monkeypatch.setattr(devices, "find", lambda device, precision: devices.Devices(cuda, (0,), "fp32"))
    made = fastdtd.Explainer(expected.model, device="cuda")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExplanationWarning)
        e, wanted = made(image, target), expected(image, target)
    np.testing.assert_allclose(e.output, wanted.output, atol=1e-5)
    np.testing.assert_allclose(e.relevance, wanted.relevance, atol=1e-5 * max(1, wanted.explained.max()))
    np.testing.assert_array_equal(e.region, wanted.region)


def test_starts_are_maps():
    made, batch = explainer(segmentation()), images(2)
    rng = np.random.default_rng(2)
    start = rng.random((2, *SIZE), np.float32) * (rng.random((2, *SIZE)) > 0.9)
    e = made(batch, start=start)
    checked(made, e, batch, start)
    np.testing.assert_array_equal(e.region, (start > 0).any(1))
    assert (e.target == start.max((2, 3)).argmax(1)).all()
    np.testing.assert_array_equal(made(batch, start=start[0]).relevance[0], e.relevance[0])
    with pytest.raises(InputError, match=r"start is no \(2, 3, 5, 7\) or \(3, 5, 7\) array"):
        made(batch, start=[1, 0, 0])


@pytest.mark.parametrize("rules", ["gradient", "gradient*input", "sensitivity"])
def test_derivatives_of_a_sum(rules):
    made, image = explainer(segmentation(), rules), images(1)
    e = made(image, (1, MASK))
    step, found = 1e-6, np.zeros((2, 5, 7))
    for place in np.ndindex(2, 5, 7):
        for sign in (1, -1):
            moved = image.astype(float)
            moved[(0, *place)] += sign * step
            found[place] += sign * naive.forward(made.model.graph, moved[0])["scores"].reshape(SIZE)[1][MASK].sum()
    found /= 2 * step
    expected = {"gradient": found, "gradient*input": found * image[0], "sensitivity": found**2}[rules]
    np.testing.assert_allclose(e.relevance[0], expected, atol=1e-4 * np.abs(expected).max())
    np.testing.assert_allclose(e.explained, e.output[0, 1][MASK].sum(), rtol=1e-5)


def test_relevance_through_channels():
    made, batch = explainer(segmentation()), images(2)
    whole = made(batch, 1)
    parts = [made(batch, 1, through={"up": chosen}) for chosen in ([0, 1, 2], [3, 4, 5])]
    cut = sum(part.cut["up"] for part in parts)  # each cuts what the other lets through
    np.testing.assert_allclose(cut, whole.at("up").sum((1, 2, 3)), rtol=1e-5)


def test_a_mask_of_what_is_predicted():
    """As the documentation has it."""
    made, batch = explainer(segmentation()), images(1)
    predicted = made.predict(batch)[0].argmax(0) == 1
    assert predicted.any()
    e = made(batch, (1, predicted))
    np.testing.assert_array_equal(e.region[0], predicted)


def test_nothing_to_decompose_is_said():
    graph = g.Graph((g.Conv2d("c", (g.INPUT,), -np.ones((2, 1, 1, 1))),), (1, 2, 3), (0.0, 1.0))
    with pytest.warns(ExplanationWarning, match="1 of 1 targets have a score that is not positive"):
        e = explainer(graph)(np.ones((1, 1, 2, 3)), 1)
    assert not e.relevance.any()


@pytest.mark.parametrize(("target", "message"), [
    (3, "target 3 is not an output"), ((0, 5, 0), "y below 5 and x below 7"), ((0, 0, -1), "no part of an output"),
    ((0, 0.0, 1), "no part of an output"), ((0, True, 1), "no part of an output"), ((0, "min"), "no part of an output"),
    ((0, np.zeros((5, 7), bool)), "mask"), ((0, np.ones((7, 5), bool)), r"shape \(7, 5\)"),
    ((), "no part of an output"), ((0, np.full((5, 7), 0.5)), "type float64"), ((0, [[1, 2]]), "mask"),
    ("grass", "class name"), ([0], "1 targets were"),
    ((3, "max"), "target 3 is not an output"), ([(0, 1, 1), (0,)], "no part of an output"), (1.5, "not an output"),
    ((0, [[1], [1, 2]]), "mask"), ((0, None), "mask"), ((0, -np.ones((5, 7), int)), "mask"), (True, "not an output"),
    (b"sky", "not an output"), ({}, "not an output"), ((0, 1, 2, 3), "no part of an output"),
])
def test_targets_that_there_are_not(target, message):
    with pytest.raises(InputError, match=message):
        explainer(segmentation())(images(2), target)


def test_what_a_model_says():
    model = Model(segmentation(), Preprocessing(None), NAMES)
    assert "3 maps of 5x7: ground; tree; ..." in repr(model)
    assert "-> 3 maps of 5x7 scores" in repr(model.graph)
    assert model.graph.output_shape == SIZE
    assert model.graph.outputs == 105
    with pytest.raises(FastDTDError, match="names 2 classes but has 3 maps of 5x7"):
        Model(segmentation(), Preprocessing(None), NAMES[:2])


def test_files(tmp_path):
    model = Model(segmentation(), Preprocessing(None), NAMES)
    fastdtd.save(model, tmp_path / "net.h5")
    made = fastdtd.Explainer(fastdtd.load(tmp_path / "net.h5"))
    e = made(images(), "tree")
    np.testing.assert_array_equal(e.relevance, fastdtd.Explainer(model)(images(), 1).relevance)
    e.save(tmp_path / "e.h5")
    with h5py.File(tmp_path / "e.h5") as file:
        np.testing.assert_array_equal(file["region"], e.region)
        assert file["scores"].shape == (3, *SIZE)


def of_pictures():
    """For pictures of 16 x 12."""
    rng = np.random.default_rng(0)
    graph = g.Graph((
        g.Conv2d("c", (g.INPUT,), rng.standard_normal((4, 3, 3, 3)), stride=(2, 2), padding=(1, 1, 1, 1)),
        g.ReLU("r", ("c",)), g.Conv2d("scores", ("r",), rng.standard_normal((3, 4, 1, 1)))), (3, 12, 16), (0.0, 1.0))
    return Model(graph, Preprocessing(scale=1 / 255), NAMES)


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(3):
        pixels = np.random.default_rng(i).integers(0, 256, (12, 16, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return folder


@pytest.mark.parametrize(("target", "place"), [
    ("tree", "at all positions"), ("1@max", "at ("), ("sky@2,3", "at (2, 3)"), (None, "at (")])
def test_the_command_line(target, place, pictures, tmp_path, capsys):
    fastdtd.save(of_pictures(), tmp_path / "net.h5")
    arguments = ["explain", str(tmp_path / "net.h5"), str(pictures), "-o", str(tmp_path / "out"),
                 *([] if target is None else ["--target", target])]
    assert cli.main(arguments) == 0
    out = capsys.readouterr().out
    assert f" {place}" in out
    lines = (tmp_path / "out" / "scores.csv").read_text().splitlines()
    assert place in lines[1]
    run = fastdtd.open_results(tmp_path / "out")
    made = fastdtd.Explainer(of_pictures())
    whole = {"tree": "tree", "1@max": (1, "max"), "sky@2,3": ("sky", 2, 3), None: None}[target]
    e = made([pictures / f"{i}.png" for i in range(3)], whole)
    np.testing.assert_allclose(run[:], e.relevance, atol=1e-6)
    np.testing.assert_array_equal(run.columns["prediction"], e.output.max((2, 3)))
    assert cli.main(arguments) == 0  # goes on where it was
    assert cli.main(["explain", str(tmp_path / "net.h5"), str(pictures), "-o", str(tmp_path / "out"), "--target",
                     "ground@0,0"]) != 0
    assert "another run" in capsys.readouterr().err
    assert cli.main(["show", str(tmp_path / "net.h5")]) == 0
    assert cli.main(["report", str(tmp_path / "out")]) == 0


def test_several_targets_of_a_run(pictures, tmp_path):
    made = fastdtd.Explainer(of_pictures())
    runner.run(made, sources.find([str(pictures)]), tmp_path / "out", ["tree", (0, 1, 2), (2, "max")])
    run = fastdtd.open_results(tmp_path / "out")
    paths = [pictures / f"{i}.png" for i in range(3)]
    for rank, target in enumerate(["tree", (0, 1, 2), (2, "max")]):
        np.testing.assert_allclose(run[rank::3], made(paths, target).relevance, atol=1e-6)
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["target"] == [1, [0, 1, 2], [2, "max"]]
    for target, top, message in (((0, np.ones((6, 8), bool)), 1, "mask"), (None, 2, "top is 2")):
        with pytest.raises(InputError, match=message):
            runner.run(made, sources.find([str(pictures)]), tmp_path / "other", target, top=top)


@pytest.mark.parametrize("against", [None, "runner-up", 0, ["ground", "sky"]])
@pytest.mark.parametrize("target", [None, "tree", ("tree", "max"), (2, 4, 6), (1, MASK),
                                    [0, ("sky", "max"), (1, 2, 3)]], ids=str)
def test_evaluation_follows_the_score_that_is_explained(target, against):
    """Where it is, and against what, is that of the picture as it is."""
    model = Model(segmentation(), Preprocessing(None), NAMES)
    batch, made = images(), fastdtd.Explainer(model)
    methods = ["dtd", "gradient*input"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExplanationWarning)
        result = fastdtd.evaluate(model, batch, methods, steps=4, region=2, target=target, seed=5, against=against)
        e = made(batch, target, against=against)
    for i, image in enumerate(batch.astype(float)):
        region, channel = e.region[i], int(e.target[i])
        rivals = {None: [], "runner-up": None, 0: [0]}.get(against if not isinstance(against, list) else "", [0, 2])
        own = naive.forward(model.graph, image)["scores"].reshape(SIZE)
        if rivals is None:  # the highest at each position
            rivals = [np.where(np.arange(3)[:, None, None] == channel, -np.inf, own).argmax(0)]

        def score(scores, region=region, channel=channel, rivals=rivals):
            scores = scores.reshape(SIZE)
            held = [scores[rival] if np.ndim(rival) == 0 else np.take_along_axis(scores, rival[None], 0)[0]
                    for rival in rivals]
            return (scores[channel] - (np.mean(held, 0) if held else 0))[region].sum()

        slope = np.zeros(image.shape)
        for place in np.ndindex(image.shape):
            change = np.zeros(image.shape)
            change[place] = 1e-6
            slope[place] = (score(naive.forward(model.graph, image + change)["scores"])
                            - score(naive.forward(model.graph, image - change)["scores"])) / 2e-6
        for curve, relevant in zip(result.curves, (e.relevance[i], slope * image), strict=True):
            expected = falls(model.graph, image, i, relevant, score, "most", 4, 2, 1, 5)
            np.testing.assert_allclose(curve.drops[i], expected.ravel(), atol=1e-4 * max(1, np.abs(expected).max()))


@pytest.mark.parametrize("target", [None, "tree", ("tree", "max"), (2, 3, 4)])
def test_channels_of_a_part_of_a_map(target, pictures, tmp_path):
    made, entries = fastdtd.Explainer(of_pictures()), sources.find([str(pictures)])
    found = channels.rank(made, entries, "c", target)
    e = made([entry.path for entry in entries], target)
    sums = e.at("c").sum((2, 3), dtype=np.float64)
    np.testing.assert_allclose(found.shares, sums / np.abs(sums).sum(1, keepdims=True), rtol=1e-5)
    np.testing.assert_array_equal(found.target, e.target)
    assert list(found.places) == [e.place(i) for i in range(3)]
    found.save(tmp_path / "out", made, 2, 2)
    head, *rows = (tmp_path / "out" / "channels.csv").read_text().splitlines()
    assert head.endswith("target,class,place")
    assert all(e.place(0).split("(")[0] in row for row in rows)
    with pytest.raises(InputError, match="one for all pictures"):
        channels.rank(made, entries, "c", [1, 1, 2])
    with pytest.raises(InputError, match="no part of an output"):
        channels.rank(made, entries, "c", (1, 99, 0))


def test_commands_for_parts_of_maps(pictures, tmp_path, capsys):
    fastdtd.save(of_pictures(), tmp_path / "net.h5")
    common = [str(tmp_path / "net.h5"), str(pictures), "-o", str(tmp_path / "out"), "--target", "tree@max"]
    assert cli.main(["evaluate", *common, "--against", "sky", "--methods", "dtd,gradient*input", "--region", "4",
                     "--steps", "3"]) == 0
    model, paths = of_pictures(), [pictures / f"{i}.png" for i in range(3)]
    result = fastdtd.evaluate(model, paths, ["dtd", "gradient*input"], steps=3, region=4, target=("tree", "max"),
                              against="sky")
    assert repr(result) in capsys.readouterr().out
    assert cli.main(["evaluate", *common, "--through", "c=1", "--methods", "dtd", "--region", "4"]) == 0
    assert cli.main(["evaluate", *common, "--through", "c=1", "--region", "4"]) == 1
    assert "--methods dtd,random" in capsys.readouterr().err
    assert cli.main(["channels", *common, "--layer", "c"]) == 0
    assert "3 explained" in capsys.readouterr().out


def test_an_embedded_library(tmp_path):
    model = Model(segmentation(), Preprocessing(None), NAMES)
    made = embed(model, tmp_path, device_cpu=True)
    library = embedded.load(made.shared)
    image = images(1)[0]
    for target in ((1, 2, 3), (2, 4, 6), (0, 0, 0)):
        ours = fastdtd.Explainer(model)(image, target)
        e = library.explain(image, int(np.ravel_multi_index(target, SIZE)))
        np.testing.assert_array_equal(e.output.reshape(SIZE), ours.output[0])
        np.testing.assert_array_equal(e.relevance, ours.relevance[0])
    best = library.explain(image)
    np.testing.assert_array_equal(best.relevance, fastdtd.Explainer(model)(image).relevance[0])
    text = made.header.read_text()
    assert "output is float[3][5][7]" in text
    assert "(channel * 5 + y) * 7 + x" in text
