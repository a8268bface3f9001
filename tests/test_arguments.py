"""Whatever is given where something else was meant: an error of our own, in a line, and never one from the depths."""

import warnings

import numpy as np
import pytest

import fastdtd
from fastdtd import graph as g
from fastdtd.errors import FastDTDError, InputError, ModelError


class WantsGradients:
    """As a tensor of PyTorch does that requires them."""

    def __array__(self, *_, **__):
        raise RuntimeError("Can't call numpy() on Tensor that requires grad. Use tensor.detach().numpy() instead.")


class Unprintable:
    def __repr__(self):
        raise ValueError


def model():
    layers = (g.Conv2d("conv", ("input", ), np.ones((2, 3, 3, 3))), g.GlobalAveragePool("scores", ("conv", )))
    return fastdtd.Model(g.Graph(layers, (3, 4, 4), (0.0, 1.0)), classes=("ant", "cat"))


MODEL = model()
EXPLAINER = fastdtd.Explainer(MODEL, threads=1)
IMAGES = np.ones((1, 3, 4, 4), np.float32)
EXPLANATION = EXPLAINER(IMAGES)
PICTURE = np.zeros((4, 4, 3), np.uint8)
STRANGE = [
    None, "", "x", b"", b"x", bytearray(b"cat"), memoryview(b"cat"), -1, 10**30, -10**30, 10**5000, 1.5, float("nan"),
    float("inf"), True, [], {}, set(), [None], [b"x"], ["x", 1], np.float32(1), np.bool_(True), np.array([]),
    np.array("x"), np.array(1), np.array([1, None], object), np.ma.masked_equal([1, 2], 1), np.ma.masked,
    [np.ma.masked_equal([1, 2], 1)], object(), "9" * 5000, "9" * 5000 + "GiB", "1e400", "nan", "a\0b", "\udce9", 1j,
    lambda: 1, [[]], [[1], [2, 3]], range(5), np.datetime64("2020"), {"conv": None}, {None: "flat"}, {1: "flat"},
    [{"conv": 3}], WantsGradients(), [WantsGradients()], Unprintable(), [Unprintable()], PICTURE, type, ...
]
CALLS = {
    "model": fastdtd.Explainer,
    "rules": lambda x: fastdtd.Explainer(MODEL, x, threads=1),
    "device": lambda x: fastdtd.Explainer(MODEL, device=x, threads=1),
    "threads": lambda x: fastdtd.Explainer(MODEL, threads=x),
    "memory": lambda x: fastdtd.Explainer(MODEL, threads=1, memory=x),
    "precision": lambda x: fastdtd.Explainer(MODEL, threads=1, precision=x),
    "batch": EXPLAINER,
    "target": lambda x: EXPLAINER(IMAGES, x),
    "start": lambda x: EXPLAINER(IMAGES, start=x),
    "at": EXPLANATION.at,
    "heatmap": EXPLANATION.heatmap,
    "overlay": lambda x: EXPLANATION.overlay(x, PICTURE),
    "overlay's picture": lambda x: EXPLANATION.overlay(0, x),
    "class_name": EXPLANATION.class_name,
    "explanation.save": EXPLANATION.save,
    "preprocess": MODEL.preprocess,
    "model.class_name": MODEL.class_name,
    "class_index": MODEL.class_index,
    "graph": fastdtd.Model,
    "preprocessing": lambda x: fastdtd.Model(MODEL.graph, x),
    "classes": lambda x: fastdtd.Model(MODEL.graph, classes=x),
    "provenance": lambda x: fastdtd.Model(MODEL.graph, provenance=x),
    "color": lambda x: fastdtd.Model(MODEL.graph, fastdtd.Preprocessing(x)),
    "resize": lambda x: fastdtd.Model(MODEL.graph, fastdtd.Preprocessing(resize=x)),
    "mean": lambda x: fastdtd.Model(MODEL.graph, fastdtd.Preprocessing(mean=x)),
    "std": lambda x: fastdtd.Model(MODEL.graph, fastdtd.Preprocessing(std=x)),
    "scale": lambda x: fastdtd.Model(MODEL.graph, fastdtd.Preprocessing(scale=x)),
    "rule": fastdtd.Rule,
    "epsilon": lambda x: fastdtd.Rule("epsilon", epsilon=x),
    "bias": lambda x: fastdtd.Rule("epsilon", bias=x),
    "layers": lambda x: g.Graph(x, (3, 4, 4)),
    "input_shape": lambda x: g.Graph(MODEL.graph.layers, x),
    "box": lambda x: g.Graph(MODEL.graph.layers, (3, 4, 4), x),
    "load": fastdtd.load,
    "model to save": lambda x: fastdtd.save(x, "net.h5"),
    "path to save": lambda x: fastdtd.save(MODEL, x),
    "dtype": lambda x: fastdtd.save(MODEL, "net.h5", x),
    "compression": lambda x: fastdtd.save(MODEL, "net.h5", compression=x),
    "max_multiply_adds": lambda x: fastdtd.Explainer(MODEL, threads=1, max_multiply_adds=x),
    "source": fastdtd.convert,
    "weights": lambda x: fastdtd.convert("net.prototxt", x),
}


@pytest.mark.parametrize("name", CALLS)
def test_strange_arguments(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    for strange in STRANGE:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                CALLS[name](strange)
        except FastDTDError as error:
            message = str(error)
            assert "\n" not in message
            assert len(message) < 700 or isinstance(strange, str)  # a path is shown whole


@pytest.mark.parametrize(("name", "value", "error", "message"), [
    ("model", "net.h5", InputError, r"the model is 'net.h5', of type str; required: a Model, as fastdtd.load"),
    ("threads", 10**30, InputError, "a whole number from 1 to 1024"), ("threads", True, InputError, "threads is True"),
    ("threads", 10**5000, InputError, "threads is of type int"), ("threads", 2.0, InputError, "threads is 2.0"),
    ("memory", "9" * 5000 + "GiB", InputError, r"memory is '9{79}\.\.\.; required: a number"),
    ("memory", 10**5000, InputError, "memory is of type int; required"), ("memory", -5, InputError, "memory is -5"),
    ("memory", float("nan"), InputError, "memory is nan"), ("target", b"cat", InputError, "target b'cat' is not"),
    ("target", bytearray(b"cat"), InputError, "target bytearray"), ("target", [b"cat"], InputError, "target b'cat'"),
    ("target", np.ma.masked_equal([1], 0), InputError, "target is a masked array"),
    ("start", np.ma.masked_equal([1, 2], 1), InputError, "start is a masked array"),
    ("batch", np.ma.masked_equal(IMAGES, 0), InputError, "the batch is a masked array"),
    ("batch", [np.ma.masked_equal(IMAGES[0], 0)], InputError, "the batch is a masked array"),
    ("batch", WantsGradients(), InputError, r"Use tensor.detach\(\)"),
    ("classes", [b"ant", b"cat"], ModelError, "required: a sequence of names"),
    ("classes", "ab", ModelError, "required: a sequence of names"), ("rules", b"", FastDTDError, "rules b''"),
    ("class_index", b"cat", InputError, "is of type bytes; required: str"),
    ("source", None, FastDTDError, "required: a file, or MODULE:CALLABLE"),
    ("explanation.save", b"out.h5", FastDTDError, "required: the file to write, as str or pathlib.Path"),
], ids=lambda value: value if isinstance(value, str) and len(value) < 50 else type(value).__name__)
def test_what_is_said(name, value, error, message):
    with pytest.raises(error, match=message):
        CALLS[name](value)


def test_numbers_of_numpy_are_numbers():
    explainer = fastdtd.Explainer(MODEL, threads=np.int64(1), memory=np.int64(10**9))
    assert explainer.threads == 1
    assert EXPLAINER(IMAGES, np.int32(1)).class_name(np.int8(0)) == "cat"
    assert MODEL.class_name(np.int64(1)) == "cat"
