"""Preprocessing by its formula, class names, and what does not fit a network."""

import numpy as np
import pytest

from fastdtd import graph as g
from fastdtd.errors import InputError, ModelError
from fastdtd.model import Model, Preprocessing

SHAPE = (3, 4, 6)
RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (4, 6, 3), np.uint8)  # of the network's size, so nothing is resampled


def model(shape=SHAPE, classes=(), **preprocessing):
    outputs = len(classes) or shape[0]
    scores = g.Dense("scores", ("mean",), np.ones((outputs, shape[0])))
    graph = g.Graph((g.GlobalAveragePool("mean", (g.INPUT,)), scores, g.Softmax("soft", ("scores",))), shape)
    return Model(graph, Preprocessing(**preprocessing), classes)


# ---- Preprocessing ---------------------------------------------------------------------------------------------------


MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.3, 0.4]
MEAN_IMAGE = RNG.uniform(0, 255, SHAPE)


@pytest.mark.parametrize(("preprocessing", "formula"),
                         [({}, lambda p: p), ({"mean": 100, "std": 50}, lambda p: (p-100) / 50),
                          ({"scale": 1 / 255, "mean": MEAN, "std": STD}, lambda p:
                           (p/255 - np.array(MEAN)[:, None, None]) / np.array(STD)[:, None, None]),
                          ({"color": "bgr", "mean": MEAN
                            }, lambda p: p[::-1] - np.array(MEAN)[:, None, None]),  # the mean is in the network's order
                          ({"color": "bgr", "mean": MEAN_IMAGE, "scale": 2.0, "std": 3.0}, lambda p:
                           (p[::-1] * 2 - MEAN_IMAGE) / 3), ({"std": -1.0}, lambda p: -p), ])
def test_formula(preprocessing, formula):
    made = model(**preprocessing).preprocess(PIXELS)
    np.testing.assert_allclose(made, formula(PIXELS.transpose(2, 0, 1).astype(float)), rtol=1e-5, atol=1e-4)
    assert made.dtype == np.float32
    assert made.flags.c_contiguous


def test_gray():
    made = model((1, 4, 6), color="gray", mean=[10.0], scale=0.5).preprocess(PIXELS)
    luma = PIXELS.astype(float) @ [0.299, 0.587, 0.114]  # ITU-R 601
    np.testing.assert_allclose(made[0], luma * 0.5 - 10, atol=0.5)  # rounded to a whole grey value before


def test_stretch_and_crop():
    lines = np.repeat(PIXELS[:, :1], 11, 1)  # each of one colour, so nothing but the width is stretched
    assert (model().preprocess(lines) == np.repeat(PIXELS[:, :1], 6, 1).transpose(2, 0, 1)).all()
    crop = model(resize="crop")  # the same as the whole picture at that scale, and then the centre
    wide, high = RNG.integers(0, 256, (8, 24, 3), np.uint8), RNG.integers(0, 256, (24, 12, 3), np.uint8)
    for picture, scaled, centre in [(wide, (3, 4, 12), np.s_[:, :, 3:9]), (high, (3, 12, 6), np.s_[:, 4:8])]:
        np.testing.assert_allclose(crop.preprocess(picture),
                                   model(scaled).preprocess(picture)[centre], atol=1)  # of 255: rounding


@pytest.mark.parametrize(
    ("preprocessing", "message"),
    [({"color": "hsv"}, "colour order 'hsv' is unknown; required: one of rgb, bgr, gray"),
     ({"color": "gray"}, "colour order 'gray' has 1 channels but the network's input has 3"),
     ({"resize": "fill"}, "resize 'fill' is unknown; required: one of stretch, crop"),
     ({"mean": np.zeros(
         (3, 6, 4))}, r"mean of shape \(3, 6, 4\); required: finite, and one number, one for each of 3 channels"),
     ({"mean": [1, 2]}, r"mean of shape \(2,\)"), ({"mean": "a"}, "preprocessing has mean"),
     ({"mean": [[1], [2, 3]]}, "preprocessing has mean"), ({"mean": np.nan}, "preprocessing has mean"),
     ({"std": [1, np.inf, 1]}, "preprocessing has std"), ({"mean": 1e39}, "has mean"),
     ({"std": [1, 0, 1]}, "std and scale must not be zero"), ({"scale": 0}, "std and scale must not be zero"),
     ({"std": 1e-60}, "std and scale must not be zero"),  # zero as float32
     ({"scale": np.inf}, "preprocessing has scale inf; required: a finite float32 number"),
     ({"scale": "a"}, "has scale 'a'"), ({"scale": 1e39}, r"has scale 1e\+39"), ({"scale": None}, "has scale None"), ])
def test_preprocessing_that_is_refused(preprocessing, message):
    with pytest.raises(ModelError, match=message):
        model(**preprocessing)


def test_an_input_that_is_no_picture():
    with pytest.raises(InputError, match=r"input is no picture .*; pass arrays of shape \(5, 2, 2\) to the explainer"):
        model((5, 2, 2), color=None).preprocess(PIXELS)


# ---- Classes ---------------------------------------------------------------------------------------------------------


CLASSES = ("n02123045 tabby, tabby cat", "n02123159 tiger cat", "n02129604 tiger, Panthera tigris", "crane",
           "crane, machine", "n1x odd", "Crane")


def test_class_names():
    made = model(classes=CLASSES)
    assert made.class_name(3) == "crane"
    assert model().class_name(2) == "2"


@pytest.mark.parametrize(("name", "index"), [("n02123045 tabby, tabby cat", 0), ("n02123045", 0), ("tabby", 0),
                                             ("TABBY CAT", 0), ("  tiger cat ", 1), ("tiger", 2),
                                             ("panthera tigris", 2), ("crane, machine", 4), ("machine", 4),
                                             ("n1x odd", 5), ])
def test_class_index(name, index):
    assert model(classes=CLASSES).class_index(name) == index


REQUIRED = "required: one of 7 names, or a number"


@pytest.mark.parametrize(("name", "message"), [
    ("crane", "class name 'crane' is ambiguous: it names outputs 3, 6; give the number"),  # whole names before synonyms
    ("tabby, tabby cat", f"no class is named 'tabby, tabby cat'; {REQUIRED}. Nearest: n02123045 tabby, tabby cat$"),
    ("cat", f"no class is named 'cat'; {REQUIRED}. Nearest: n02123045 tabby, tabby cat; n02123159 tiger cat"),
    ("tigre cat", "Nearest: n02123159 tiger cat"),  # by its letters
    ("craen", "Nearest: Crane"),
    ("n1x", f"no class is named 'n1x'; {REQUIRED}. Nearest: n1x odd"),  # no WordNet id
    ("xyzzy", f"no class is named 'xyzzy'; {REQUIRED}$"), ("", f"no class is named ''; {REQUIRED}$"),
    (" ", f"no class is named ' '; {REQUIRED}$"),
])
def test_names_that_are_no_class(name, message):
    with pytest.raises(InputError, match=message):
        model(classes=CLASSES).class_index(name)


def test_ambiguous_synonyms_and_no_names():
    with pytest.raises(InputError, match="'bat' is ambiguous: it names outputs 0, 1; give the number"):
        model(classes=("n1 bat, animal", "n2 bat, club")).class_index("bat")
    with pytest.raises(InputError,
                       match="target 'bat' is a class name, but this model has none; give the number of an output"):
        model().class_index("bat")
    with pytest.raises(InputError, match=r"Nearest: (a\d+; ){4}a\d+$"):  # five at most
        model(classes=[f"a{i}" for i in range(9)]).class_index("a")


def test_as_many_names_as_outputs():
    graph = model().graph
    with pytest.raises(ModelError,
                       match="the model names 2 classes but has 3 outputs; required: one name each, or none"):
        Model(graph, classes=("a", "b"))


def test_the_graph_is_canonical():
    assert [layer.name for layer in model().graph] == ["mean", "scores"]
