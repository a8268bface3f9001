"""What explainers take and explanations give: pictures in, a few lines, pictures and a file out."""

import io
import json
import pickle
import subprocess
import sys

import h5py
import numpy as np
import pytest
from PIL import Image

import fastdtd
from fastdtd import graph as g
from fastdtd import heatmap
from fastdtd.errors import InputError, OutputError, PictureError
from fastdtd.explainer import Explainer
from fastdtd.model import Model, Preprocessing

CLASSES = ("bright", "dark", "green")


def model(color="rgb", resize="stretch", box=(0.0, 255.0), channels=3):
    """Of pixels: its first class is their brightness."""
    weight = np.array([[1.0] * channels, [-1.0] * channels, [0.0] * (channels - 1) + [1.0]])
    bias = np.array([0.0, 300.0 * channels, 0.0])
    layers = (g.Conv2d("conv", (g.INPUT,), weight[:, :, None, None], bias), g.ReLU("relu", ("conv",)),
              g.GlobalAveragePool("scores", ("relu",)))
    graph = g.Graph(layers, (channels, 8, 6), box)
    return Model(graph, Preprocessing(color, resize), CLASSES, {"source": "a test " * 30})


@pytest.fixture
def picture(tmp_path):
    """(path, PIL image, pixels) of one picture."""
    pixels = np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8)
    image = Image.fromarray(pixels)
    image.save(tmp_path / "noise.png")
    return tmp_path / "noise.png", image, pixels


# ---- Pictures in -----------------------------------------------------------------------------------------------------


def test_pictures_are_preprocessed_by_the_model(picture):
    made = Explainer(model())
    expected = made(made.model.preprocess(picture[1]))
    for one in (*picture, str(picture[0])):
        np.testing.assert_array_equal(made(one).relevance, expected.relevance)
    several = made([*picture], target=["dark", 0, "green"])
    assert several.target.tolist() == [1, 0, 2]
    assert len(several) == 3
    np.testing.assert_array_equal(made(tuple(picture)).relevance, np.repeat(expected.relevance, 3, 0))
    np.testing.assert_array_equal(made(np.stack([picture[2]] * 2)).relevance, np.repeat(expected.relevance, 2, 0))
    gray = Explainer(model("gray", channels=1))
    np.testing.assert_array_equal(gray(picture[2][..., 0]).output, gray(Image.fromarray(picture[2][..., 0])).output)


def test_arrays_of_the_input_s_shape_are_its_values():
    made = Explainer(model())
    batch = np.random.default_rng(0).integers(0, 256, (2, 3, 8, 6), np.uint8)
    np.testing.assert_array_equal(made(batch).relevance, made(batch.astype(np.float32)).relevance)
    np.testing.assert_array_equal(made(list(batch)).relevance, made(batch).relevance)
    assert made(batch[0]).relevance.shape == (1, 3, 8, 6)
    assert made(batch[:0]).relevance.shape == (0, 3, 8, 6)


@pytest.mark.parametrize(("given", "error", "message"), [
    ("missing.png", PictureError, "'missing.png' does not exist"),
    (["missing.png", 3], InputError, "item 1 of the list is of type int and no picture"),
    (np.zeros((8, 6, 3), np.float32), InputError, r"required: \(N, 3, 8, 6\).*or pictures: paths"),
    (np.zeros((2, 8, 6, 5), np.uint8), InputError, r"required: \(N, 3, 8, 6\)"),
    ([], InputError, r"shape \(0,\); required"),
    (b"noise.png", InputError, "required"),
])
def test_what_is_no_picture(given, error, message):
    with pytest.raises(error, match=message):
        Explainer(model())(given)


def test_a_model_of_no_pictures_says_so(picture):
    with pytest.raises(InputError, match="this model's input is no picture"):
        Explainer(model(color=None))(picture[0])


# ---- A few lines -----------------------------------------------------------------------------------------------------


def test_prints_are_a_few_lines(picture):
    made = Explainer(fastdtd.load("squeezenet1_1"))
    e = Explainer(model())([picture[0]] * 30)
    for value in (made.model, made.model.graph, made, e, made.model.preprocessing, *made.model.graph.layers):
        for text in (repr(value), str(value)):
            assert len(text.splitlines()) <= 14
            assert len(text) < 1500
            assert max(map(len, text.splitlines())) < 500
    lines = repr(e).splitlines()
    assert lines[0] == "Explanation of 30 images, 3x8x6"
    assert lines[1].startswith("  0  1 dark  score ") or lines[1].startswith("  0  0 bright  score ")
    assert lines[-1] == "  ... 20 more"
    assert "Explanation of 1 image," in repr(Explainer(model())(picture[0]))
    assert repr(Explainer(model())(np.zeros((0, 3, 8, 6)))) == "Explanation of 0 images, 3x8x6"
    assert "Model: 64 layers, 1,235,496 parameters" in repr(made.model)


def test_notebooks_get_pictures(picture):
    e = Explainer(model())([picture[0]] * 10, target=0)
    shown = e._repr_html_()
    assert shown.count("data:image/png;base64,") == 2 * 8  # a heatmap and an overlay of each of the first eight
    assert "... 2 more" in shown
    for text in ("bright", f"{e.output[0, 0]:.6g}", f"{e.sum[0]:.6g}", "absorbed"):
        assert text in shown
    assert Explainer(model())(np.ones((1, 3, 8, 6)))._repr_html_().count("data:image/png") == 1  # no picture is known
    odd = Model(model().graph, Preprocessing(), ("<script>", "b", "c"))
    for shown in (odd._repr_html_(), Explainer(odd)(picture[0], 0)._repr_html_()):
        assert "<script>" not in shown
        assert "&lt;script&gt;" in shown


# ---- Pictures and files out ------------------------------------------------------------------------------------------


def test_heatmap_and_overlay(picture):
    e = Explainer(model(resize="crop"))([picture[0], picture[1]])
    np.testing.assert_array_equal(e.heatmap(1), heatmap.draw(e.relevance[1]))
    np.testing.assert_array_equal(e.heatmap(-1), e.heatmap(1))
    np.testing.assert_array_equal(e.overlay(0), e.overlay(1))
    np.testing.assert_array_equal(e.overlay(0, picture[2]), e.overlay(0))
    wide, narrow = e.overlay(0).size, Explainer(model())(picture[0]).overlay().size
    assert wide != narrow  # what is cropped away is not shown
    alone = Explainer(model())(np.ones((1, 3, 8, 6)))
    with pytest.raises(InputError, match=r"the picture is not known; required: overlay\(i, picture\)"):
        alone.overlay()
    assert alone.overlay(picture=picture[1]).size == narrow
    for wrong in (2, -3):
        with pytest.raises(InputError, match=f"image {wrong} of 2 was asked for; required: 0 to 1"):
            e.heatmap(wrong)


def test_save(picture, tmp_path):
    e = Explainer(model(), {"scores": "flat"})([picture[0]] * 3, target=[0, 1, 2])
    e.save(tmp_path / "out.h5")
    with h5py.File(tmp_path / "out.h5") as file:
        for name, values in e.columns().items():
            np.testing.assert_array_equal(file[name][...], values)
        assert file.attrs["format"] == "fastdtd-explanations"
        assert json.loads(file["rules"][()]) == {"conv": "zB", "scores": "flat"}
        assert file["classes"].asstr()[...].tolist() == list(CLASSES)
        assert file["ledger"].shape == (3, 2)
        np.testing.assert_array_equal(file["ledger"][...].sum(1), e.absorbed)
        assert list(file["ledger"].attrs["layers"]) == list(e.ledger)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["noise.png", "out.h5"]
    for wrong in (tmp_path / "none" / "out.h5", tmp_path):
        with pytest.raises(OutputError, match=r"cannot write .*required: a file in a folder"):
            e.save(wrong)


def test_explanations_are_pickled_without_the_network(picture):
    e = Explainer(model())(picture[1])
    again = pickle.loads(pickle.dumps(e))
    np.testing.assert_array_equal(again.relevance, e.relevance)
    np.testing.assert_array_equal(again.overlay(), e.overlay())
    assert repr(again) == repr(e)
    with pytest.raises(InputError, match="this explanation was pickled, without the network"):
        again.at("conv")


# ---- Relevance at inner layers counts against the memory limit -------------------------------------------------------


def test_inner_relevance_within_the_memory_limit():
    made = Explainer(model(), threads=1)
    batch = np.random.default_rng(1).uniform(0, 255, (2, 3, 8, 6)).astype(np.float32)
    e, plans = made(batch), made._executor.devices[0][1]
    every, one = plans.nbytes(1, 1, ["conv", "relu", "scores"]), plans.nbytes(1, 1, ["conv"])
    assert plans.nbytes(1, 1) < one < every
    names = ["input", "conv", "relu", "scores"]
    for limit in (every, one + 256):  # all at once, or in parts
        limited = Explainer(model(), threads=1, memory=limit)
        seen, pool = [], limited._executor.devices[0][1]
        bind = pool.bind
        pool.bind = lambda schedule, bind=bind, seen=seen: seen.append(schedule) or bind(schedule)
        found = limited(batch)
        for name in names:
            np.testing.assert_array_equal(found.at(name), e.at(name))
        for name, came in found.flow().items():
            np.testing.assert_array_equal(came, e.flow()[name])
        assert max(schedule.nbytes for schedule in seen) <= limit
        assert pool.used_bytes == pool.used_workers == 0
    tight = Explainer(model(), threads=1, memory=plans.nbytes(1, 1))(batch)
    with pytest.raises(InputError, match=r"relevance at layer 'conv' takes .*, and the limit is .*higher memory="):
        tight.at("conv")


# ---- The command line as a module ------------------------------------------------------------------------------------


def test_python_dash_m(tmp_path):
    done = subprocess.run([sys.executable, "-m", "fastdtd", "--version"], capture_output=True, text=True, check=True,
                          cwd=tmp_path)
    assert done.stdout == f"fastdtd {fastdtd.__version__}\n"


def test_pictures_are_png(picture):
    content = io.BytesIO()
    Explainer(model())(picture[0]).overlay().save(content, "PNG")
    assert content.getvalue().startswith(b"\x89PNG")
