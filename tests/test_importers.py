"""Importers: trained networks come in whole, and each kind of file finds its importer."""

import dataclasses
import hashlib
import os
import sys

import numpy as np
import pytest
from importing import of_type, same

from fastdtd import graph as g
from fastdtd.errors import ConversionError
from fastdtd.explainer import Explainer
from fastdtd.importers import convert
from fastdtd.model import Model, Preprocessing


def squeezenet(data, *names):
    options = {"color": "bgr", "mean": (104, 117, 123), "box": [(-104, 151), (-117, 138), (-123, 132)],
               "labels": data / "labels" / "synset_words.txt"}
    return convert(*(data / "models" / "squeezenet_v1.1" / name for name in names), **options)


@pytest.fixture(scope="session")
def from_onnx(data):
    pytest.importorskip("onnx")
    return squeezenet(data, "squeezenet_v1.1.onnx")


@pytest.fixture(scope="session")
def from_caffe(data):
    pytest.importorskip("google.protobuf")
    return squeezenet(data, "deploy.prototxt", "squeezenet_v1.1.caffemodel")


def test_squeezenet_is_the_same_from_onnx_and_caffe(from_onnx, from_caffe):
    assert from_onnx.graph.shapes == from_caffe.graph.shapes
    for a, b in zip(from_onnx.graph, from_caffe.graph, strict=True):
        assert type(a) is type(b)
        for field in dataclasses.fields(a):
            if field.name in a.arrays:
                same(getattr(a, field.name), getattr(b, field.name))
            else:
                assert getattr(a, field.name) == getattr(b, field.name)


@pytest.mark.parametrize("source", ["from_onnx", "from_caffe"])
def test_squeezenet_is_whole(source, request):
    model = request.getfixturevalue(source)
    assert model.graph.input_shape == (3, 227, 227)
    assert model.graph.shapes[model.graph.output] == (1000, 1, 1)
    assert len(of_type(model.graph, g.Conv2d)) == 26
    assert all(pool.ceil_mode for pool in of_type(model.graph, g.MaxPool2d))
    np.testing.assert_array_equal(model.graph.box, [[-104, -117, -123], [151, 138, 132]])
    assert model.class_name(340) == "n02391049 zebra"
    assert model.preprocessing.color == "bgr"
    assert model.preprocessing.mean.ravel().tolist() == [104, 117, 123]


def test_provenance(from_onnx, from_caffe, data):
    folder = data / "models" / "squeezenet_v1.1"
    names = ["deploy.prototxt", "squeezenet_v1.1.caffemodel"]
    digests = [hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names]
    assert from_onnx.provenance["format"] == "onnx opset 13 from assets"
    assert from_caffe.provenance == {"source": ", ".join(names), "sha256": ", ".join(digests), "format": "caffe"}


def test_resnet_with_its_additions(data):
    pytest.importorskip("onnx")
    graph = convert(data / "models" / "resnet20_cifar10" / "resnet20.onnx").graph
    assert graph.input_shape == (3, 32, 32)
    assert graph.shapes[graph.output] == (10, 1, 1)
    assert [len(of_type(graph, kind)) for kind in (g.Conv2d, g.Add, g.Dense)] == [21, 9, 1]
    assert graph.shapes["add88"] == (64, 8, 8)


def test_lenet_in_the_older_layout(data):
    pytest.importorskip("google.protobuf")
    folder = data / "models" / "lenet_mnist"
    model = convert(folder / "lenet.prototxt", folder / "lenet_iter_10000.caffemodel", scale=1 / 256)
    assert [type(layer) for layer in model.graph] == [g.Conv2d, g.MaxPool2d, g.Conv2d, g.MaxPool2d, g.Flatten, g.Dense,
                                                      g.ReLU, g.Dense]
    assert model.graph.shapes == {"input": (1, 28, 28), "conv1": (20, 24, 24), "pool1": (20, 12, 12),
                                  "conv2": (50, 8, 8),
                                  "pool2": (50, 4, 4), "ip1/flatten": (800, 1, 1), "ip1": (500, 1, 1),
                                  "relu1": (500, 1, 1),
                                  "ip2": (10, 1, 1)}
    assert model.preprocessing.color == "gray"


def test_cifar10_full_with_normalisation_within_channels(data):
    """Scores in float64, kept beside the network, for pictures whose mean is taken off."""
    pytest.importorskip("google.protobuf")
    folder = data / "models" / "cifar10_full"
    graph = convert(folder / "cifar10_full.prototxt", folder / "cifar10_full_iter_70000.caffemodel").graph
    assert sum(isinstance(layer, g.LocalResponseNorm) and layer.within_channel for layer in graph) == 2
    reference = np.load(folder / "cifar10_full_ref64.npz")
    explainer = Explainer(Model(g.Graph(graph.layers, graph.input_shape, (-255, 255)), Preprocessing(None)))
    e = explainer(reference["x"])
    np.testing.assert_allclose(e.output, reference["logits"], atol=1e-4)
    explained = e.relevance.sum((1, 2, 3)) + sum(e.ledger.values())
    np.testing.assert_allclose(explained, e.explained, rtol=1e-5)
    assert e.relevance.min() >= 0


# ---- Kinds of files ----


def test_kinds_of_files(tmp_path):
    for name in ("net.caffemodel", "net.keras", "net.h5", "net.hdf5", "net.pt"):
        (tmp_path / name).write_bytes(b"")
    for arguments, message in [
        (["net.pt"], "would run code"), (["net.keras"], "neither a zip nor an HDF5 file"),
        (["net.h5"], "neither a zip nor an HDF5 file"), (["net.hdf5"], "neither a zip nor an HDF5 file"),
        (["net.keras", "net.h5"], "no second file"),
        (["net.caffemodel"], "the .prototxt first"), ([""], "none of the kinds"),
    ]:
        with pytest.raises(ConversionError, match=message):
            convert(*(tmp_path / name for name in arguments))


@pytest.mark.parametrize(("package", "arguments", "message"), [
    ("onnx", ["missing.onnx"], "no file"), ("onnx", ["net.onnx", "net.caffemodel"], "no ONNX file"),
    ("google.protobuf", ["net.prototxt"], "required: the .caffemodel"),
    ("google.protobuf", ["net.prototxt", "missing.caffemodel"], "no file"),
])
def test_files_that_take_a_package(tmp_path, package, arguments, message):
    pytest.importorskip(package)
    for name in ("net.onnx", "net.prototxt", "net.caffemodel"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(ConversionError, match=message):
        convert(*(tmp_path / name for name in arguments))


def test_a_file_that_is_too_large_is_not_read(tmp_path):
    pytest.importorskip("onnx")
    with open(tmp_path / "net.onnx", "wb") as file:
        file.truncate(2**31 + 1)
    with pytest.raises(ConversionError, match="at most 2147483648 are accepted"):
        convert(tmp_path / "net.onnx")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes")
def test_what_is_no_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for name in ("net.onnx", "net.keras", "net.prototxt"):
        (tmp_path / name).symlink_to("pipe")
        with pytest.raises(ConversionError, match=r"cannot be read: it is a named pipe; required: a regular file"):
            convert(tmp_path / name, *[tmp_path / "pipe"] * (name == "net.prototxt"))


@pytest.mark.parametrize(("package", "name", "extra"), [("onnx", "net.onnx", "onnx"),
                                                        ("google.protobuf", "net.prototxt", "caffe")])
def test_a_missing_package_names_its_extra(tmp_path, monkeypatch, package, name, extra):
    for module in [name for name in sys.modules if name.startswith(f"fastdtd.importers.{extra}")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.delattr(f"fastdtd.importers.{extra}", raising=False)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConversionError, match=rf"pip install 'fastdtd\[{extra}\]'"):
        convert(tmp_path / name, *[tmp_path / "net.caffemodel"] * (extra == "caffe"))
