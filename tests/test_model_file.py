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
from layers import KEPT, every_example
from model_files import numbers, write_small

from fastdtd import model_file
from fastdtd.errors import InputError, ModelError, OutputError
from fastdtd.graph import (
    Activation,
    Add,
    AveragePool2d,
    Clip,
    Concat,
    Conv2d,
    Dense,
    Flatten,
    GlobalAveragePool,
    Graph,
    GroupNorm,
    LeakyReLU,
    LocalResponseNorm,
    MaxPool2d,
    Multiply,
    Power,
    Rearrange,
    ReLU,
)
from fastdtd.model import Model, Preprocessing
from fastdtd.model_file import load, save

DOCUMENT = Path(__file__).parents[1] / "docs" / "model-format.md"


def every_layer():
    """A model with every layer type that is left after canonizing, every setting off its default, and names that HDF5
    forbids as links.
    """
    layers = (
        Conv2d("fire2/squeeze1x1", ("input",), numbers(4, 2, 3, 2), numbers(4, seed=1), (2, 1), (1, 0, 2, 1), (1, 2),
               2, True, True),
        ReLU("r é", ("fire2/squeeze1x1",)), Conv2d("c", ("r é",), numbers(4, 4, 1, 1, seed=2)),
        Add("sum", ("r é", "c")), MaxPool2d("p", ("sum",), (3, 2), (2, 3), (1, 1, 2, 0), ceil_mode=True),
        AveragePool2d("q", ("sum",), (3, 2), (2, 3), (1, 1, 2, 0), ceil_mode=True, count_include_pad=True),
        Clip("clip", ("q",), -0.5, 3.5), LeakyReLU("leaky", ("clip",), 0.125),
        LocalResponseNorm("norm", ("leaky",), 3, 0.01, 0.5, 2.0, True),
        GroupNorm("groups", ("norm",), numbers(4, seed=7), numbers(4, seed=8), 2, 0.25, True, False),
        Power("power", ("groups",), 1.5),
        Rearrange("turned", ("power",), np.arange(-1, 47).reshape(4, 4, 3)[:, ::-1]),
        Concat("both", ("p", "turned", "p")), Activation("swish", ("both",), "silu", 1.5),
        GlobalAveragePool("g", ("swish",)), Activation("gate", ("g",), "hard_sigmoid", 0.2, 0.4),
        Multiply("gated", ("g", "gate")), Flatten("f", ("gated",)),
        Dense("d", ("f",), numbers(200, 12, seed=3), numbers(200, seed=4)), ReLU("r2", ("d",)),
        Dense(".", ("r2",), numbers(3, 200, seed=5)),
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
    return write_small(path)


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


def test_round_trip_of_every_example(path):
    """Of the table of layers, in one graph: each reads what is made from the input, and the scores are their means."""
    layers, means = [], []
    for kind, name in every_example():
        example, stem = KEPT[kind].examples[name], f"{kind}/{name}"
        index = (np.arange(np.prod(example.shape)) % 12).reshape(example.shape)
        layers += [Rearrange(f"{stem} reads", ("input",), index),
                   example.make(stem, *[f"{stem} reads"] * example.inputs)]
        if kind == "softmax":
            layers.append(Multiply(f"{stem} product", (f"{stem} reads", stem)))
        layers.append(GlobalAveragePool(f"{stem} mean", (layers[-1].name,)))
        means.append(f"{stem} mean")
    graph = Graph((*layers, Concat("means", tuple(means))), (3, 2, 2))
    save(Model(graph, Preprocessing(None)), path)
    assert_same_layers(load(path).graph, graph)


def test_model_with_nothing_optional(path):
    save(Model(Graph((Dense("d", ("input",), numbers(2, 3)),), (3, 1, 1)), Preprocessing(None)), path)
    again = load(path)
    assert again.graph.box is None
    assert again.preprocessing.color is None
    assert (again.classes, again.provenance) == ((), {})
    with h5py.File(path) as file:
        assert set(file) == {"input", "layers"}
        assert set(file["layers/00000"]) == {"weight"}


def test_any_number_of_provenances(path):
    provenance = {f"key {i}": "value" * i for i in range(100)}
    save(Model(Graph((GlobalAveragePool("p", ("input",)),), (3, 4, 4)), provenance=provenance), path)
    assert load(path).provenance == provenance


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
    with h5py.File(path, "w") as file:
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
        dense.create_dataset("weight", data=expected["d"].astype(">f8"), chunks=(2, 7), compression="lzf",
                             shuffle=True, fletcher32=True)
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


def test_many_names_of_variable_length(path):
    names = [f"name {i}" for i in range(30_000)]
    save(Model(Graph((Dense("d", ("input",), np.ones((len(names), 1))),), (1, 1, 1)), Preprocessing(None)), path)
    with h5py.File(path, "r+") as file:
        file["classes"] = names
    assert load(path).classes == tuple(names)


# Places where no model file is


def test_no_model_file(tmp_path, path):
    with pytest.raises(ModelError, match="does not exist; required: the path"):
        load(path)
    with pytest.raises(ModelError, match="cannot be opened: Is a directory; required: a file"):
        load(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ModelError, match="cannot be opened: it is a named pipe; required: a regular file"):
        load(tmp_path / "pipe")
    with pytest.raises(ModelError, match="required: the path of a model file or the name of a bundled model"):
        load("zero\0byte")


SIGNATURE = b"\x89HDF\r\n\x1a\n"


@pytest.mark.parametrize("content", [b"", b"\0" * 5000, b"PK\x03\x04" + b"x"*5000, SIGNATURE, SIGNATURE + b"\0"*5000])
def test_not_hdf5(path, content):
    path.write_bytes(content)
    with pytest.raises(ModelError,
                       match=r"model\.h5': (is not an HDF5 file|HDF5 cannot process it).*required: an undamaged"):
        load(path)


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.parametrize("which", ["by hand", "saved"])
def test_flipped_bits_neither_crash_nor_hang(model, valid, tmp_path, which):
    source = valid
    if which == "saved":
        source = tmp_path / "saved.h5"
        save(model, source)
    # In a process of its own, which a crash would end.
    command = [sys.executable, "-c", FUZZ, source, tmp_path / "spoiled.h5"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stdout[-50:] + result.stderr
    assert result.stdout.count("seed") == 300
    assert result.stdout.count("refused") > 30


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
    for place in (tmp_path, tmp_path / "missing" / "m.h5", tmp_path / "file" / "m.h5", tmp_path / ("x" * 300)):
        with pytest.raises(OutputError, match=r"cannot write .*required: a folder"):
            save(model, place)
    with pytest.raises(OutputError, match="required: the path of the file to write"):
        save(model, tmp_path / "zero\0byte")
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
