"""Model files: what is written comes back, what the document allows is read, and nothing else gets in."""

import dataclasses
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import pytest

from fastdtd import model_file
from fastdtd.errors import InputError, ModelError, OutputError
from fastdtd.graph import (
    Add,
    AveragePool2d,
    Clip,
    Concat,
    Conv2d,
    Dense,
    Flatten,
    GlobalAveragePool,
    Graph,
    LeakyReLU,
    LocalResponseNorm,
    MaxPool2d,
    Power,
    Rearrange,
    ReLU,
)
from fastdtd.model import Model, Preprocessing
from fastdtd.model_file import load, save

DOCUMENT = Path(__file__).parents[1] / "docs" / "model-format.md"


def numbers(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def every_layer():
    """A model with every layer type that is left after canonizing, every setting off its default, and names that HDF5
    forbids as links.
    """
    layers = (Conv2d("fire2/squeeze1x1", ("input", ), numbers(4, 2, 3, 2), numbers(4, seed=1), (2, 1), (1, 0, 2, 1),
                     (1, 2), 2), ReLU("r é", ("fire2/squeeze1x1", )), Conv2d("c", ("r é", ),
                                                                             numbers(4, 4, 1, 1, seed=2)),
              Add("sum", ("r é", "c")), MaxPool2d("p", ("sum", ), (3, 2), (2, 3), (1, 1, 2, 0), ceil_mode=True),
              AveragePool2d("q", ("sum", ), (3, 2), (2, 3), (1, 1, 2, 0), ceil_mode=True,
                            count_include_pad=True), Clip("clip", ("q", ), -0.5, 3.5),
              LeakyReLU("leaky", ("clip", ), 0.125), LocalResponseNorm("norm", ("leaky", ), 3, 0.01, 0.5, 2.0,
                                                                       True), Power("power", ("norm", ), 1.5),
              Rearrange("turned", ("power", ),
                        np.arange(-1, 47).reshape(4, 4, 3)[:, ::-1]), Concat("both", ("p", "turned", "p")),
              GlobalAveragePool("g", ("both", )), Flatten("f", ("g", )),
              Dense("d", ("f", ), numbers(200, 12, seed=3),
                    numbers(200, seed=4)), ReLU("r2", ("d", )), Dense(".", ("r2", ), numbers(3, 200, seed=5)),
              )
    graph = Graph(layers, (4, 11, 9), (np.float32([-1, -2, -3, 0]), np.float32([1, 2, 3, 4])))
    preprocessing = Preprocessing(None, "crop", numbers(4, 11, 9, seed=6), [1, 2, 3, 4], 1 / 3)
    return Model(graph, preprocessing, ("eins", "zwei, deux", "三"), {"source": "random numbers", "licence é": ""})


def assert_same_layers(actual, expected, change=lambda array: array):
    assert len(actual.layers) == len(expected.layers)
    for a, e in zip(actual, expected, strict=True):
        assert type(a) is type(e)
        for field in dataclasses.fields(e):
            left, right = getattr(a, field.name), getattr(e, field.name)
            if isinstance(right, np.ndarray):
                assert left.dtype == right.dtype
                expected = right if field.name in e.integer_arrays else change(right)
                np.testing.assert_array_equal(left, expected, err_msg=f"{e.name} {field.name}")
            else:
                assert left == right, f"{e.name} {field.name}"


@pytest.fixture
def model():
    return every_layer()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.h5"


@pytest.fixture
def valid(path):
    """A small valid file, written by hand, to be spoiled."""
    with h5py.File(path, "w") as file:
        file.attrs["format"] = "fastdtd-model"
        file.attrs["version"] = 1
        file.create_group("input").attrs["shape"] = [3, 4, 4]
        file["input"].attrs["color"] = "rgb"
        conv = file.create_group("layers/a")
        conv.attrs["type"], conv.attrs["inputs"] = "conv2d", "input"
        conv["weight"], conv["bias"] = numbers(2, 3, 1, 1), numbers(2)
        pool = file.create_group("layers/b")
        pool.attrs["type"], pool.attrs["inputs"] = "global_average_pool", "a"
        file["classes"] = ["x", "y"]
        file.create_group("provenance").attrs["source"] = "random numbers"
    load(path)
    return path


# Writing and reading back


@pytest.mark.parametrize("compression", ["gzip", "lzf", None])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_round_trip(model, path, dtype, compression):
    save(model, path, dtype, compression)
    again = load(path)
    stored = dict.fromkeys(("float32", "float64"), lambda array: array)
    assert_same_layers(again.graph, model.graph, stored.get(dtype, lambda array: array.astype(np.float16)))
    assert again.graph.input_shape == model.graph.input_shape
    np.testing.assert_array_equal(again.graph.box, model.graph.box)
    assert again.classes == model.classes
    assert again.provenance == model.provenance
    for field in ("color", "resize", "scale"):
        assert getattr(again.preprocessing, field) == getattr(model.preprocessing, field)
    np.testing.assert_array_equal(again.preprocessing.mean, model.preprocessing.mean)
    np.testing.assert_array_equal(again.preprocessing.std, np.float32([1, 2, 3, 4]).reshape(4, 1, 1))
    with h5py.File(path) as file:
        big = next(group["weight"] for group in file["layers"].values() if group.attrs["name"] == b"d")
        assert big.dtype == np.dtype(dtype)
        assert big.compression == compression


def test_model_with_nothing_optional(path):
    save(Model(Graph((Dense("d", ("input",), numbers(2, 3)),), (3, 1, 1)), Preprocessing(None)), path)
    again = load(path)
    assert again.graph.box is None
    assert again.preprocessing.color is None
    assert (again.classes, again.provenance) == ((), {})
    with h5py.File(path) as file:
        assert set(file) == {"input", "layers"}
        assert set(file["layers/00000"]) == {"weight"}


def test_same_model_same_bytes(model, path, tmp_path):
    save(model, path)
    time.sleep(1.1)  # HDF5 counts time in seconds
    save(load(path), tmp_path / "later.h5")
    assert path.read_bytes() == (tmp_path / "later.h5").read_bytes()


def test_bundled_model(model, path, tmp_path, monkeypatch):
    monkeypatch.setattr(model_file, "MODELS", tmp_path)
    save(model, tmp_path / "tiny.h5")
    assert_same_layers(load("tiny").graph, model.graph)
    for name in ("tinny", "sub/tiny", "tiny.onnx"):
        with pytest.raises(ModelError, match=rf"'{name}' does not exist; required: the path .* \(bundled: tiny\)"):
            load(name)


# What the document allows


def test_example_of_the_document(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(re.search(r"```python\n(.*?)```", DOCUMENT.read_text("utf-8"), re.DOTALL)[1], {})
    model = load("example.h5")
    assert model.graph.shapes == {
        "input": (3, 8, 8), "1": (4, 8, 8), "2": (4, 8, 8), "3": (4, 4, 4), "4": (64, 1, 1), "scores": (2, 1, 1)
    }
    assert model.classes == ("cat", "dog")


def test_file_by_hand(path):
    """Every storage, type and spelling that the document names."""
    expected = {name: numbers(*shape, seed=i) for i, (name, shape) in enumerate(
        {"c": (8, 3, 3, 3), "cb": (8,), "scale": (8,), "shift": (8,), "d": (5, 8 * 3 * 2), "db": (5,)}.items())}
    space_padded = h5py.h5t.C_S1.copy()
    space_padded.set_size(12)
    space_padded.set_strpad(h5py.h5t.STR_SPACEPAD)
    null_terminated = h5py.h5t.C_S1.copy()
    null_terminated.set_size(12)
    with h5py.File(path, "w", userblock_size=512) as file:
        file.attrs["format"] = np.bytes_("fastdtd-model")
        file.attrs["version"] = np.array([1], ">u2")
        entry = file.create_group("input")
        entry.attrs["shape"] = np.array([3, 9, 9], ">i2")
        entry.attrs["color"] = "bgr"
        entry.attrs["scale"] = np.int8(2)
        entry["mean"], entry["std"] = np.float64(7), np.array([1, 2, 3], ">f2")
        entry.create_dataset("box", data=[[-1, 1], [-2, 2], [0, 3.5]], compression="gzip")

        def layer(link, kind, inputs, **settings):
            group = file.create_group(f"layers/{link}")
            attribute = h5py.h5a.create(group.id, b"type", space_padded, h5py.h5s.create(h5py.h5s.SCALAR))
            attribute.write(np.array(kind.ljust(12).encode(), "S12"), mtype=space_padded)
            group.attrs["inputs"] = inputs
            for name, value in settings.items():
                group.attrs[name] = value
            return group

        # Links in another order than the network's
        layer("z", "softmax", "scores/1")
        dense = layer("y", "dense", ["flat"], name="scores/1")
        dense.create_dataset("weight", data=expected["d"].astype(">f8"), chunks=(2, 7), compression="szip",
                             shuffle=True)
        dense.create_dataset("bias", data=expected["db"].astype("<f2"), maxshape=(None,), chunks=(1000,))
        layer("x", "dropout", np.array([b"flat0"]))
        layer("w", "flatten", "x", name="flat")
        layer("v", "max_pool2d", "relu", kernel=2, stride=np.array([2, 3]), padding=[0, 1], ceil_mode=True,
              name="flat0")
        layer("u", "relu", "norm", name="relu")
        norm = layer("t", "batch_norm", "s", name="norm")
        norm["scale"], norm["shift"] = expected["scale"], expected["shift"].astype("f8")
        conv = layer("s", "conv2d", np.array(["input"], h5py.string_dtype()), stride=np.uint8(2), padding=np.int64([1]),
                     groups=[1])
        conv.create_dataset("weight", data=expected["c"], chunks=(3, 2, 3, 3), compression="gzip", shuffle=True,
                            fletcher32=True)
        conv.create_dataset("bias", data=expected["cb"], compression="lzf")
        conv["weight"].attrs["units"] = conv["weight"].ref  # attributes of datasets are free
        names = h5py.h5d.create(file.id, b"classes", null_terminated, h5py.h5s.create_simple((5,)))
        names.write(h5py.h5s.ALL, h5py.h5s.ALL, np.array([b"a", "ä".encode(), b"c\0rubbish", b"", b"e " * 5], "S12"),
                    mtype=null_terminated)
        file.create_group("provenance").attrs["why not"] = np.bytes_("because")
    model = load(path)
    assert model.graph.shapes == {
        "input": (3, 9, 9), "s": (8, 5, 5), "relu": (8, 5, 5), "flat0": (8, 3, 2), "flat": (48, 1, 1),
        "scores/1": (5, 1, 1)
    }
    conv, _, pool, _, dense = model.graph
    np.testing.assert_allclose(conv.weight, expected["c"] * expected["scale"].reshape(8, 1, 1, 1), rtol=1e-6)
    np.testing.assert_allclose(conv.bias, expected["cb"] * expected["scale"] + expected["shift"], rtol=1e-5, atol=1e-6)
    assert (conv.stride, conv.padding, conv.dilation, conv.groups) == ((2, 2), (1, 1, 1, 1), (1, 1), 1)
    assert (pool.kernel, pool.stride, pool.padding, pool.ceil_mode) == ((2, 2), (2, 3), (0, 1, 0, 1), True)
    np.testing.assert_array_equal(dense.weight, expected["d"])
    np.testing.assert_array_equal(dense.bias, expected["db"].astype(np.float16))
    assert model.classes == ("a", "ä", "c", "", "e e e e e ")
    assert model.provenance == {"why not": "because"}
    np.testing.assert_array_equal(model.graph.box, [[-1, -2, 0], [1, 2, 3.5]])
    p = model.preprocessing
    assert (p.color, p.resize, p.scale) == ("bgr", "stretch", 2)
    np.testing.assert_array_equal(p.mean, np.full((3, 1, 1), 7))
    np.testing.assert_array_equal(p.std.ravel(), [1, 2, 3])


def test_large_zero_weights_compress_as_far_as_gzip_can(path):
    layers = Flatten("f", ("input",)), Dense("d", ("f",), np.zeros((2, 2**20)))
    save(Model(Graph(layers, (1, 2**10, 2**10)), Preprocessing(None)), path)
    assert path.stat().st_size < 2**23 / 200
    assert not load(path).graph.layers[1].weight.any()


def test_variable_length_names_over_several_blocks(path):
    names = [f"name {i}" for i in range(2 * model_file.MAX_CLASSES_BYTES // model_file.MAX_TEXT_BYTES + 1)]
    save(Model(Graph((Dense("d", ("input",), np.ones((len(names), 1))),), (1, 1, 1)), Preprocessing(None)), path)
    with h5py.File(path, "r+") as file:
        file["classes"] = names
    assert load(path).classes == tuple(names)


# Places where no model file is


def test_no_model_file(tmp_path, path):
    with pytest.raises(ModelError, match="does not exist; required: the path"):
        load(path)
    with pytest.raises(ModelError, match="is a directory; required: a model file"):
        load(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ModelError, match="is no regular file"):
        load(tmp_path / "pipe")
    with pytest.raises(ModelError, match="does not exist"):
        load("zero\0byte")


SIGNATURE = b"\x89HDF\r\n\x1a\n"


@pytest.mark.parametrize("content", [b"", b"\0" * 5000, b"PK\x03\x04" + b"x"*5000, SIGNATURE, SIGNATURE + b"\0"*5000])
def test_not_hdf5(path, content):
    path.write_bytes(content)
    with pytest.raises(ModelError,
                       match=r"model\.h5': (is not an HDF5 file|HDF5 cannot process it).*required: an undamaged"):
        load(path)


def test_truncated(model, valid, tmp_path):
    save(model, tmp_path / "written.h5")
    for source in (valid, tmp_path / "written.h5"):
        content = source.read_bytes()
        for length in [*range(0, len(content), max(1, len(content) // 150)), len(content) - 1]:
            (tmp_path / "short.h5").write_bytes(content[:length])
            with pytest.raises(ModelError, match=r"short\.h5"):
                load(tmp_path / "short.h5")


FUZZ = """
import sys
import numpy as np
from fastdtd.errors import ModelError
from fastdtd.model_file import load

original, spoiled = sys.argv[1:]
content = open(original, "rb").read()
used = np.flatnonzero(np.frombuffer(content, np.uint8))  # most of a small HDF5 file is free space
for seed in range(300):
    random = np.random.default_rng(seed)
    changed = bytearray(content)
    for place in random.choice(used, random.integers(1, 5)):
        changed[place] ^= 1 << random.integers(8)
    open(spoiled, "wb").write(changed)
    print("seed", seed, flush=True)
    try:
        load(spoiled)
    except ModelError:
        print("refused")
"""


@pytest.mark.parametrize("which", ["by hand", "saved"])
def test_flipped_bits_neither_crash_nor_hang(model, valid, tmp_path, which):
    source = valid
    if which == "saved":
        source = tmp_path / "saved.h5"
        save(model, source)
    # In a process of its own: what is feared is that libhdf5 crashes.
    command = [sys.executable, "-c", FUZZ, source, tmp_path / "spoiled.h5"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stdout[-50:] + result.stderr
    assert result.stdout.count("seed") == 300
    assert result.stdout.count("refused") > 30


# Valid HDF5 that is no valid model


def attribute(place, name, value):
    def spoil(file):
        file[place].attrs[name] = value
    return spoil


def without_attribute(place, name):
    def spoil(file):
        del file[place].attrs[name]
    return spoil


def dataset(place, data=None, **how):
    def spoil(file):
        if place in file:
            del file[place]
        file.create_dataset(place, data=data, **how)
    return spoil


def without(place):
    def spoil(file):
        del file[place]
    return spoil


def link(place, target):
    def spoil(file):
        if place in file:
            del file[place]
        file[place] = target
    return spoil


def virtual(file):
    layout = h5py.VirtualLayout((2, 3, 1, 1), "f4")
    layout[...] = h5py.VirtualSource("elsewhere.h5", "weight", (2, 3, 1, 1))
    del file["layers/a/weight"]
    file.create_virtual_dataset("layers/a/weight", layout)


def hard_link_cycle(file):
    file["layers/a/loop"] = file["layers"]
    file["layers/loop"] = file["layers"]


def layer_is_its_own_parent(file):
    file["layers/loop"] = file["layers"]


def scale_offset(file):
    del file["layers/a/weight"]
    file.create_dataset("layers/a/weight", data=numbers(2, 3, 1, 1), scaleoffset=2)


def two_compressions(file):
    del file["layers/a/bias"]
    plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    plist.set_chunk((2,))
    plist.set_deflate(4)
    plist.set_filter(h5py.h5z.FILTER_LZF)
    h5py.h5d.create(file["layers/a"].id, b"bias", h5py.h5t.IEEE_F32LE, h5py.h5s.create_simple((2,)), plist)


def absurd_chunk(file):
    del file["layers/a/bias"]
    file.create_dataset("layers/a/bias", (2,), "f4", maxshape=(None,), chunks=(2**28,))


def strange_float(file):
    del file["layers/a/bias"]
    kind = h5py.h5t.IEEE_F32LE.copy()
    kind.set_ebias(100)
    h5py.h5d.create(file["layers/a"].id, b"bias", kind, h5py.h5s.create_simple((2,)))


def second_layer(name, inputs):
    def spoil(file):
        group = file.create_group("layers/c")
        group.attrs["type"], group.attrs["inputs"], group.attrs["name"] = "relu", inputs, name
    return spoil


def group_for_weights(file):
    del file["layers/a/bias"]
    file.create_group("layers/a/bias")


def attribute_name_not_utf8(file):
    h5py.h5a.create(file["layers/a"].id, b"\xff", h5py.h5t.STD_I32LE, h5py.h5s.create(h5py.h5s.SCALAR))


def named_type(file):
    file["layers/c"] = np.dtype("f4")


def empty_layers(file):
    del file["layers"]
    file.create_group("layers")


SPOILED = {
    "no format": (without_attribute("/", "format"), "no root attribute 'format'"),
    "other format": (attribute("/", "format", "keras"), "no root attribute 'format' that says 'fastdtd-model'"),
    "newer": (attribute("/", "version", 2), "has format version 2; this fastdtd reads version 1"),
    "version missing": (without_attribute("/", "version"), "has format version missing; this fastdtd reads version 1"),
    "version text": (attribute("/", "version", "1"), "has format version '1'; this fastdtd reads version 1"),
    "root attribute": (attribute("/", "classes",
                                 "x"), "the file has the unknown attribute 'classes'; known: format, version"),
    "root member": (dataset("labels", [1]), "the file has the unknown member 'labels'; known: input, layers"),
    "no input": (without("input"), "has no group '/input'"), "no layers group": (without("layers"),
                                                                                 "has no group '/layers'"),
    "no layers": (empty_layers,
                  "the network has no layers"), "layers a dataset": (dataset("layers", [1]),
                                                                     "/layers is a dataset; required: a group"),
    "layer a dataset": (dataset("layers/a", [1]), "group 'a' of /layers is a dataset; required: a group"),
    "layer a type": (named_type, "group 'c' of /layers is a datatype; required: a group"),
    "no shape": (without_attribute("input", "shape"), r"/input has shape missing; required: 3 integers"),
    "flat shape": (attribute("input", "shape", [3, 4]), r"/input has shape 3, 4; required: 3 integers"),
    "float shape": (attribute("input", "shape", [3.0, 4, 4]), r"/input has shape 3.0, 4.0, 4.0; required: 3 integers"),
    "zero shape": (attribute("input", "shape", [3, 0, 4]), r"the input has shape \(3, 0, 4\); required"),
    "huge shape": (attribute("input", "shape", [3, 2**40, 2**40]), r"the input has shape .* at most"),
    "input attribute": (attribute("input", "colour",
                                  "rgb"), "/input has the unknown attribute 'colour'; known: shape, color"),
    "input member": (dataset("input/men", [1.0]), "/input has the unknown member 'men'; known: mean, std, box"),
    "color": (attribute("input", "color", "cmyk"), "colour order 'cmyk' is unknown"),
    "color number": (attribute("input", "color", 3), "/input attribute 'color' is 3; required: one string"),
    "color channels": (attribute("input", "color", "gray"), "colour order 'gray' has 1 channels but"),
    "resize": (attribute("input", "resize", "pad"),
               "resize 'pad' is unknown"), "scale text": (attribute("input", "scale", "1"),
                                                          "/input attribute 'scale' is '1'; required: one number"),
    "scale NaN": (attribute("input", "scale", np.nan),
                  "scale nan; required: a finite float32 number"), "mean shape": (dataset("input/mean", [1.0, 2.0]),
                                                                                  r"mean of shape \(2,\); required"),
    "mean axes": (dataset("input/mean", [[1.0]]), r"/input/mean has shape \(1, 1\); required: 0 or 1 or 3 axes"),
    "mean too large": (dataset("input/mean", shape=(2**29, ), dtype="f4"),
                       "/input/mean has 536870912 elements; at most"), "std zero": (dataset("input/std", 0.0),
                                                                                    "std and scale must not be zero"),
    "box shape": (dataset("input/box",
                          [[0.0, 0.0, 0.0], [1.0, 1.0, 1.0]]), r"/input/box has shape \(2, 3\); required: \(3, 2\)"),
    "box order": (dataset("input/box", [[1.0, 0.0]] * 3), "required: finite, and low below high"),
    "no type": (without_attribute("layers/a",
                                  "type"), "group 'a' of /layers attribute 'type' is missing; required: one string"),
    "unknown type": (attribute("layers/a", "type",
                               "gelu"), "layer 'a' has the unknown type 'gelu'; required: one of conv2d, dense, relu"),
    "no inputs": (without_attribute("layers/a", "inputs"), "'a' has 0 inputs; Conv2d takes 1"),
    "input numbers": (attribute("layers/a", "inputs",
                                [1, 2]), r"layer 'a' \(conv2d\) has inputs 1, 2; required: names of layers"),
    "two inputs": (attribute("layers/a", "inputs", ["input", "input"]), "'a' has 2 inputs; Conv2d takes 1"),
    "strides": (attribute("layers/a", "strides",
                          2), r"layer 'a' \(conv2d\) has the unknown attribute 'strides'; known: type, name, "),
    "kernel of a conv": (attribute("layers/a", "kernel", 1), "has the unknown attribute 'kernel'"),
    "layer member": (dataset("layers/a/biases",
                             [1.0]), r"layer 'a' \(conv2d\) has the unknown member 'biases'; known: weight, bias"),
    "stride count": (attribute("layers/a", "stride",
                               [1, 1, 1]), "has stride 1, 1, 1; required: 1 or 2 integers"), "stride float": (attribute(
                                   "layers/a", "stride",
                                   2.0), r"has stride 2\.0; required: 1 or 2 integers"), "stride zero": (attribute(
                                       "layers/a", "stride", 0), r"has stride \(0, 0\); required: 2 integers from 1"),
    "stride huge": (attribute("layers/a", "stride", 2**62),
                    "has stride .* required: 2 integers from 1"), "padding count": (attribute(
                        "layers/a", "padding",
                        [1, 1, 1]), "has padding 1, 1, 1; required: 1, 2 or 4 integers"), "groups": (attribute(
                            "layers/a", "groups",
                            [1, 1]), "has groups 1, 1; required: 1 integer"), "no kernel": (attribute(
                                "layers/b", "type",
                                "max_pool2d"), r"layer 'b' \(max_pool2d\) has no attribute 'kernel'; required: one"),
    "no weight": (without("layers/a/weight"), r"layer 'a' \(conv2d\) has no dataset 'weight'; required: one"),
    "duplicate name": (second_layer("a", "a"),
                       "layer name 'a' is taken or empty"), "reserved name": (second_layer("input", "a"),
                                                                              "layer name 'input' is taken or empty"),
    "cycle": (attribute("layers/a", "inputs",
                        "b"), "cycle through 'a', 'b'"), "dangling": (attribute("layers/a", "inputs", "gone"),
                                                                      "layer 'a' reads 'gone', which no layer makes"),
    "weight axes": (dataset("layers/a/weight",
                            numbers(2, 3)), r"layer 'a' \(conv2d\) weight has shape \(2, 3\); required: 4 axes"),
    "weight shape": (dataset("layers/a/weight", numbers(2, 4, 1, 1)),
                     "expects 4 input channels"), "weight empty": (dataset("layers/a/weight", np.zeros(
                         (0, 3, 1, 1))), "required: 4 axes, none of them empty"),
    "weight null": (dataset("layers/a/weight", h5py.Empty("f4")),
                    "has shape None; required: 4 axes"), "weight a group": (group_for_weights,
                                                                            "bias is a group; required: a dataset"),
    "weight integers": (dataset("layers/a/weight", np.ones(
        (2, 3, 1, 1), int)), "weight is of HDF5 type Integer .* required: IEEE"), "weight strings": (dataset(
            "layers/a/bias",
            ["1", "2"]), "bias is of HDF5 type String .* required: IEEE"), "weight fixed strings": (dataset(
                "layers/a/bias",
                np.array([b"1", b"2"])), "bias is of HDF5 type String .* required: IEEE"), "weight compound": (dataset(
                    "layers/a/bias", np.zeros(2, "f4,f4")), "bias is of HDF5 type Compound"),
    "weight complex": (dataset("layers/a/bias", np.zeros(2, "c8")),
                       "bias is of HDF5 type Comp"), "weight opaque": (dataset("layers/a/bias", np.zeros(2, "V4")),
                                                                       "bias is of HDF5 type Opaque"),
    "weight vlen": (dataset("layers/a/bias", shape=(2, ), dtype=h5py.vlen_dtype("f4")),
                    "bias is of HDF5 type Vlen"), "weight references": (dataset("layers/a/bias", shape=(2, ),
                                                                                dtype=h5py.ref_dtype),
                                                                        "bias is of HDF5 type Reference"),
    "weight regions": (dataset("layers/a/bias", shape=(2, ), dtype=h5py.regionref_dtype),
                       "bias is of HDF5 type Reference"), "weight long double": (dataset(
                           "layers/a/bias", np.zeros(2, np.longdouble)), "bias is of HDF5 type Float .16 bytes"),
    "weight strange float": (strange_float, "bias is of HDF5 type Float .* required: IEEE"), "weight NaN": (dataset(
        "layers/a/bias", [1.0, np.nan]), "layer 'a' has NaN or infinity in its bias"), "weight overflow": (dataset(
            "layers/a/bias", [1.0, 1e300]), "layer 'a' has NaN or infinity in its bias"), "bias shape": (dataset(
                "layers/a/bias", numbers(3)), r"bias of shape \(3,\); required: \(2,\)"), "too many numbers": (dataset(
                    "layers/a/bias", shape=(2**30 + 1, ),
                    dtype="f4"), "bias has 1073741825 elements; at most 1073741824"), "unwritten chunks": (
                        dataset("layers/a/bias", shape=(2**30, ), dtype="f4", compression="gzip"),
                        "bias claims 4294967296 bytes but the file stores 0 for it; required: data that were written"),
    "unwritten": (dataset("layers/a/bias", shape=(2**30, ),
                          dtype="f4"), "bias claims 4294967296 bytes but the file stores 0"),
    "absurd chunk": (absurd_chunk, "bias claims 1073741824 bytes but the file stores 0"), "soft link": (link(
        "layers/a/bias",
        h5py.SoftLink("/layers/a/weight")), "layer 'a' .* holds 'bias' as a soft, external"), "soft layer": (link(
            "layers/c", h5py.SoftLink("/layers/a")), "/layers holds 'c' as a soft, external"), "external link": (link(
                "layers/a/bias",
                h5py.ExternalLink("/etc/passwd",
                                  "/x")), "layer 'a' .* holds 'bias' as a soft, external"), "external root": (link(
                                      "classes",
                                      h5py.ExternalLink("other.h5",
                                                        "/x")), "the file holds 'classes' as a soft, external"),
    "virtual": (virtual, "weight keeps its data in other files"), "external storage": (dataset(
        "layers/a/bias", shape=(2, ), dtype="f4", external=[
            ("/etc/passwd", 0, 8)
        ]), "bias keeps its data in other files"), "hard-link cycle": (hard_link_cycle,
                                                                       "layer 'a' .* has the unknown member 'loop'"),
    "own parent": (layer_is_its_own_parent, "group 'loop' of /layers attribute 'type' is missing"), "scale-offset": (
        scale_offset,
        r"weight is stored with the HDF5 filters \[6\]; required: at most one of gzip"), "two compressions": (
            two_compressions, r"bias is stored with the HDF5 filters \[1, 32000\]; required: at most one of gzip"),
    "attribute reference": (lambda f: attribute("layers/a", "name", f["layers"].ref)
                            (f), "'name' is neither text nor numbers"), "attribute compound": (attribute(
                                "layers/a", "stride", np.zeros(2, "i4,i4")), "'stride' is neither text nor numbers"),
    "attribute array type": (lambda f: f["layers/a"].attrs.create("stride", np.ones(
        (1, 2), "i4"), (1, 2), np.dtype("(2,)i4")), "'stride' is neither text nor numbers"), "attribute null": (
            attribute("layers/a", "stride", h5py.Empty("i4")),
            "'stride' is empty; required: a value"), "attribute without elements": (attribute(
                "layers/a", "stride",
                np.zeros(0, "i4")), "has stride of no elements; required"), "long string": (attribute(
                    "layers/a", "name", np.bytes_("x" * 5000)), "'name' has strings of 5000 bytes; at most 4096"),
    "long heap string": (attribute("layers/a", "name", "x" * 5000), "strings of more than 4096 bytes"), "not UTF-8": (
        attribute("layers/a", "name",
                  np.bytes_(b"\xff\xfe")),
        "'name' has the string .* required: ASCII or UTF-8"), "attribute name not UTF-8": (
            attribute_name_not_utf8,
            "group 'a' of /layers has the string .* required: ASCII or UTF-8"), "link name not UTF-8": (
                lambda f: h5py.h5g.create(f["layers"].id, b"\xff"),
                "/layers has the string .* required: ASCII or UTF-8"), "classes count": (dataset("classes", [
                    "x"
                ]), "names 1 classes but has 2 outputs"), "classes numbers": (dataset("classes", [
                    1, 2
                ]), "/classes is of type int64; required: strings"), "classes axes": (dataset("classes", [[
                    "x", "y"
                ]]), r"/classes has shape \(1, 2\); required: 1 axes"), "classes too many": (dataset(
                    "classes", shape=(10**6 + 1, ),
                    dtype="S1"), "/classes has 1000001 elements; at most 1000000"), "classes long": (dataset(
                        "classes", np.array([b"x" * 5000,
                                             b"y"])), "/classes is of type .* strings of at most 4096 bytes"),
    "provenance number": (attribute("provenance", "year", 2017),
                          "/provenance attribute 'year' is 2017; required: one string"), "provenance member": (dataset(
                              "provenance/x", [1]), "/provenance has the unknown member 'x'; known: none"),
}


@pytest.mark.parametrize(("spoil", "message"), SPOILED.values(), ids=SPOILED.keys())
def test_spoiled(valid, spoil, message):
    with h5py.File(valid, "r+") as file:
        spoil(file)
    with pytest.raises(ModelError, match=message) as caught:
        load(valid)
    assert str(caught.value).startswith(f"model file {str(valid)!r}: ")


@pytest.mark.parametrize("value", [2, -1, [0, 1]])
def test_truth_values(valid, value):
    with h5py.File(valid, "r+") as file:
        file["layers/b"].attrs["type"] = "average_pool2d"
        file["layers/b"].attrs["kernel"] = 4
        file["layers/b"].attrs["count_include_pad"] = True
    assert load(valid).graph.layers[1].count_include_pad is True
    with h5py.File(valid, "r+") as file:
        file["layers/b"].attrs["count_include_pad"] = value
    with pytest.raises(ModelError, match=r"has count_include_pad .*; required: 0 or 1"):
        load(valid)


def test_huge_attribute(path):
    with h5py.File(path, "w",
                   libver="latest") as file:  # earlier versions of HDF5's objects keep attributes below 64 KiB
        file.attrs["format"], file.attrs["version"] = "fastdtd-model", 1
        file.create_group("layers")
        file.create_group("input").attrs["shape"] = np.ones(20_000, int)
    with pytest.raises(ModelError, match="'shape' has 20000 elements; at most 10000"):
        load(path)


def test_long_objects_in_a_heap(valid):
    with h5py.File(valid, "r+") as file:
        # Attributes of datasets are free, but their heap is one that strings could be referred to.
        kind = h5py.h5t.vlen_create(h5py.h5t.STD_U8LE)
        history = h5py.h5a.create(file["layers/a/bias"].id, b"history", kind, h5py.h5s.create_simple((1,)))
        value = np.empty(1, h5py.vlen_dtype("u1"))
        value[0] = np.zeros(5000, "u1")
        history.write(value)
    with pytest.raises(ModelError, match=r"heap at byte .*more than 4096 bytes"):
        load(valid)


@pytest.mark.parametrize("size", [0xFFFFFFFFFFFFFFF0, 1 << 40, 4097])
def test_damaged_string_heap(valid, size):
    """The first of these sizes makes libhdf5 2.0 loop for ever."""
    content = bytearray(valid.read_bytes())
    start = content.index(b"GCOL") + 16  # its first object
    content[start + 8:start + 16] = size.to_bytes(8, "little")
    valid.write_bytes(content)
    with pytest.raises(ModelError, match="has a damaged heap at byte"):
        load(valid)


def test_short_addresses(path):
    sizes = h5py.h5p.create(h5py.h5p.FILE_CREATE)
    sizes.set_sizes(4, 4)
    h5py.h5f.create(os.fsencode(path), fcpl=sizes).close()
    with pytest.raises(ModelError, match="does not use 8-byte HDF5 addresses"):
        load(path)


def test_limits_on_the_whole_file(valid, monkeypatch):
    monkeypatch.setattr(model_file, "MAX_TOTAL_WEIGHTS", 7)
    with pytest.raises(ModelError, match=r"the weights up to layer 'a' \(conv2d\) are 8 numbers; at most 7"):
        load(valid)
    monkeypatch.undo()
    monkeypatch.setattr(model_file, "MAX_CLASSES_BYTES", 4096)
    with h5py.File(valid, "r+") as file:
        del file["classes"]
        file["classes"] = ["x" * 4000, "y" * 4000]
    with pytest.raises(ModelError, match="/classes has more than 4096 bytes of names"):
        load(valid)
    monkeypatch.setattr(model_file, "MAX_LAYERS", 1)
    with pytest.raises(ModelError, match="/layers holds more than 1 objects"):
        load(valid)


def test_loading_changes_nothing(valid):
    before = valid.read_bytes()
    valid.chmod(0o444)
    load(valid)
    assert valid.read_bytes() == before


# Failing to write


def test_unknown_options(model, path):
    with pytest.raises(InputError, match="dtype is 'int8'; required: one of float16, float32, float64"):
        save(model, path, "int8")
    with pytest.raises(InputError, match="compression is 'zip'; required: 'gzip', 'lzf' or None"):
        save(model, path, compression="zip")
    assert not path.exists()


def test_float16_overflow(path):
    big = Model(Graph((Dense("d", ("input",), [[1.0, -70000.0]]),), (2, 1, 1)), Preprocessing(None))
    with pytest.raises(
            ModelError,
            match="cannot be saved: layer 'd' has weight up to 70000, beyond float16; save with dtype='float32'"):
        save(big, path, "float16")
    assert not path.exists()
    save(big, path)
    assert load(path).graph.layers[0].weight[0, 1] == -70000


@pytest.mark.parametrize(("key", "value", "message"), [
    ("text", "x" * 5000, "'text' has strings of 5000 bytes; at most 4096"),
    ("text", "\udc80", "names and texts of valid Unicode"),
    ("", "x", "names and texts of valid Unicode, none of them empty"),
])
def test_what_cannot_be_stored(model, path, key, value, message):
    with pytest.raises(ModelError, match=f"the model cannot be saved: .*{message}"):
        save(dataclasses.replace(model, provenance={key: value}), path)
    assert not path.exists()


def test_unwritable_folders(model, tmp_path):
    (tmp_path / "file").touch()
    for place in (tmp_path, tmp_path / "missing" / "m.h5", tmp_path / "file" / "m.h5", tmp_path /
                  ("x"*300), tmp_path / "zero\0byte"):
        with pytest.raises(OutputError, match=r"cannot write .*required: a folder"):
            save(model, place)
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("step", ["fsync", "replace"])
@pytest.mark.parametrize(("error", "seen"), [(OSError(28, "No space left"), OutputError),
                                             (KeyboardInterrupt(), KeyboardInterrupt)])
def test_failing_halfway_keeps_the_old_file(model, path, monkeypatch, step, error, seen):
    path.write_text("precious")

    def fail(*_):
        assert len(os.listdir(path.parent)) == 2  # the old file and the one that is being written
        raise error

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(seen):
        save(model, path)
    assert path.read_text() == "precious"
    assert os.listdir(path.parent) == [path.name]


def test_permissions_are_those_of_any_new_file(model, path, tmp_path):
    save(model, path)
    (tmp_path / "other").touch()
    assert path.stat().st_mode == (tmp_path / "other").stat().st_mode
