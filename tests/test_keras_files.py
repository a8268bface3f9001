"""Keras files that are damaged, hostile or contradict themselves are refused, and nothing of them is run."""

import copy
import io
import json
import random
import zipfile

import h5py
import numpy as np
import pytest
from importing import numbers
from keras_models import (
    CONVOLUTION,
    FUNCTIONAL,
    POOL,
    RECORDED,
    WEIGHTS,
    keras_file,
    layer,
    legacy_file,
    weights_file,
    zipped,
)

from fastdtd.errors import ConversionError, FastDTDError
from fastdtd.graph import Graph
from fastdtd.importers import convert, keras
from fastdtd.importers.keras import files

# ---- Weights ----


@pytest.mark.parametrize(("weights", "message"), [
    ({"layers/conv2d/vars/0": numbers(2, 2, 2, 3)}, "has no bias in the file"),
    ({"layers/conv2d_x/vars/0": numbers(2, 2, 2, 3)}, "has no weights of its own"),
    ({}, "has no weights of its own"),
    (WEIGHTS | {"layers/conv2d_1/vars/0": numbers(2, 2, 2, 3)}, "layers of its class are not as many"),
    (WEIGHTS | {"layers/conv2d/vars/0": numbers(2, 2, 3, 3)},
     r"kernel of shape \(2, 2, 3, 3\); required .*\(2, 2, 2, 3\)"),
    (WEIGHTS | {"layers/conv2d/vars/0": numbers(2, 2, 2, 3).astype(np.int8)}, "IEEE floating-point"),
    (WEIGHTS | {"layers/conv2d/vars/0": np.full((2, 2, 2, 3), np.nan, np.float32)}, "NaN or infinity"),
    (WEIGHTS | {"layers/conv2d/vars/0": h5py.ExternalLink("other.h5", "/x")}, "soft, external or user-defined link"),
    (WEIGHTS | {"layers/conv2d/vars/0": h5py.SoftLink("/layers/conv2d/vars/1")}, "soft, external or user-defined link"),
    ({"layers/conv2d": h5py.ExternalLink("other.h5", "/x")}, "soft, external or user-defined link"),
    (b"", "not an HDF5 file"),
    (b"\x89HDF\r\n\x1a\n" + bytes(500), "does not use 8-byte HDF5 addresses"),
    (weights_file()[:2000], "ends after 2000 of [0-9]+ bytes: it is cut off"),
])
def test_refused_weights(tmp_path, weights, message):
    with pytest.raises(ConversionError, match=message):
        convert(keras_file(tmp_path, weights=weights))


def external_storage(file):
    file["layers/conv2d/vars"].create_dataset("0", (2, 2, 2, 3), "f4", external=[("other.bin", 0, h5py.h5f.UNLIMITED)])


def virtual(file):
    layout = h5py.VirtualLayout((2, 2, 2, 3), "f4")
    layout[...] = h5py.VirtualSource("other.h5", "x", (2, 2, 2, 3))
    file["layers/conv2d/vars"].create_virtual_dataset("0", layout)


def foreign_filter(file):
    file["layers/conv2d/vars"].create_dataset("0", data=numbers(2, 2, 2, 3), scaleoffset=3, chunks=(2, 2, 2, 3))


@pytest.mark.parametrize(("make", "message"), [
    (external_storage, "keeps its data in other files"), (virtual, "a virtual dataset"),
    (foreign_filter, "HDF5 filters"),
])
def test_refused_storage(tmp_path, make, message):
    image = io.BytesIO(weights_file())
    with h5py.File(image, "r+") as file:
        del file["layers/conv2d/vars/0"]
        make(file)
    with pytest.raises(ConversionError, match=message):
        convert(keras_file(tmp_path, weights=image.getvalue()))


# ---- Configurations ----

KERAS_TENSOR = {"class_name": "__keras_tensor__", "config": {"keras_history": ["sum", 0, 0]}}


@pytest.mark.parametrize(("index", "nodes", "message"), [
    (2, [[["conv", 0, 0, {}], ["pool", 0, 0, {}]]], "cycle through"),
    (2, [[["sum", 0, 0, {}], ["conv", 0, 0, {}]]], "cycle through 'sum'"),
    (2, [[["nowhere", 0, 0, {}]]], "reads 'nowhere', which is no layer beside it"),
    (3, [[["sum", 1, 0, {}]]], "is read as called 2 times"),
    (3, [[["sum", 0, 1, {}]]], "reads output 2 of 'sum', which has 1"),
    (3, [[["sum", 0, -1, {}]]], "reads output 0 of 'sum'"),
    (3, [], "is read as called 1 times"),
    (3, [[["sum", 0]]], "refers to .*required: a layer's name"),
    (3, [[["sum", "0", 0]]], "inbound_nodes is a text '0'; required: a whole number"),
    (3, [3], "inbound_nodes is a whole number '3'; required: an object"),
    (3, [[["sum", 0, 0, {"training": True}]]], "is called with training=True"),
    (3, [{"args": [KERAS_TENSOR], "kwargs": {"mask": KERAS_TENSOR}}], "is called with mask="),
    (3, [{"args": [3.0], "kwargs": {}}], "is called on a constant; required: nothing but tensors"),
    (3, [{"kwargs": {}}], "inbound_nodes is null; required: a list"),
    (3, [[["sum", 0, 0], ["conv", 0, 0]]], "has 2 inputs; required: one"),
])
def test_refused_connections(tmp_path, index, nodes, message):
    config = copy.deepcopy(FUNCTIONAL)
    config["config"]["layers"][index]["inbound_nodes"] = nodes
    with pytest.raises(ConversionError, match=message):
        convert(keras_file(tmp_path, config=config))


@pytest.mark.parametrize(("changes", "message"), [
    ({"output_layers": []}, "has no output_layers"), ({"output_layers": [["none", 0, 0]]},
                                                      "'none' among its output_layers"),
    ({"input_layers": [["x", 0, 0], ["conv", 0, 0]]}, "comes first and does not say"),
    ({"input_layers": None}, "input_layers is null"),
    ({"layers": []}, "has no layers"), ({"layers": {}}, "layers is an object"),
    ({"layers": FUNCTIONAL["config"]["layers"] * 2}, "two layers of one name"),
    ({"output_layers": [["x", 0, 0]]}, "no layers that compute anything"),
])
def test_refused_models(tmp_path, changes, message):
    with pytest.raises(ConversionError, match=message):
        convert(keras_file(tmp_path, config=FUNCTIONAL | {"config": FUNCTIONAL["config"] | changes}))


def test_connections_are_good_without_the_changes(tmp_path):
    assert len(convert(keras_file(tmp_path, config=FUNCTIONAL)).graph.layers) == 4


@pytest.mark.parametrize(("config", "message"), [
    ("", "config.json is no JSON"), ("{", "config.json is no JSON"), (b"\xff\xff", "config.json is no JSON"),
    ("[]", "config.json is a list"),
    ("[" * 100_000, "config.json is no JSON, or nested too deeply"), ('{"a": ' + "1" * 10_000 + "}",
                                                                      "config.json is no JSON"),
    ("{}", "class_name is null"), ('{"class_name": "Mine", "config": {}}',
                                   "of class 'Mine'; required: Sequential or Functional"),
    ('{"class_name": "Sequential", "config": 3}', "config is a whole number '3'; required: an object"),
    ('{"class_name": "Sequential", "config": {"layers": [{"class_name": "ReLU", "config": {}}]}}',
     "does not say its input's shape"),
])
def test_refused_configurations(tmp_path, config, message):
    with pytest.raises(ConversionError, match=message):
        convert(keras_file(tmp_path, config=config))


@pytest.mark.parametrize(("shape", "message"), [
    ((6, 5, None), "leaves its size open; required"), ((None,), "leaves its size open; required"),
    ((2, 6, 5, 2), "required: .N, H, W, C"),
    ((6, "5", 2), "input shape is a text '5'"), ((6, -5, 2), "leaves its size open"),
    ((2**20, 2**20, 2), "at most 268435456 elements"),
])
def test_refused_inputs(tmp_path, shape, message):
    with pytest.raises(ConversionError, match=message):
        convert(keras_file(tmp_path, shape=shape))


def test_models_in_models_without_end(tmp_path):
    inner = CONVOLUTION
    for i in range(30):
        inner = {"class_name": "Sequential", "config": {"name": f"inner{i}", "layers": [inner]}}
    with pytest.raises(ConversionError, match="lies in 17 other models; at most 16"):
        convert(keras_file(tmp_path, inner))


def test_calls_without_end(tmp_path):
    """Each of eight models calls the one in it ten times."""
    inner = layer("Dropout", "drop")
    for i in range(8):
        x = layer("InputLayer", "x", batch_shape=[None, 6, 5, 2]) | {"inbound_nodes": []}
        calls = [[[["x", 0, 0, {}]]] if k == 0 else [[[inner["config"]["name"], k - 1, 0, {}]]] for k in range(10)]
        entry = inner | {"inbound_nodes": [call[0] for call in calls]}
        inner = {"class_name": "Functional", "config": {"name": f"inner{i}", "layers": [x, entry],
                                                        "input_layers": [["x", 0, 0]],
                                                        "output_layers": [[inner["config"]["name"], 9, 0]]}}
    with pytest.raises(ConversionError, match="at most 10000 calls"):
        convert(keras_file(tmp_path, inner))


# ---- Hostile files ----


CONFIG = ("config.json", json.dumps(FUNCTIONAL))
SOUND = zipped(CONFIG, ("model.weights.h5", weights_file()))


def claiming(size):
    """SOUND, whose directory says that the weights unpack to `size` bytes."""
    at = SOUND.index(b"PK\x01\x02", SOUND.index(b"PK\x01\x02") + 1)
    return SOUND[:at + 24] + size.to_bytes(4, "little") + SOUND[at + 28:]


@pytest.mark.parametrize(("content", "message"), [
    (b"PK", "no .keras file"), (SOUND[:100], "no .keras file"), (SOUND[:-30], "no .keras file"),
    (claiming(2**32 - 2), "unpacks to 429496[0-9]+ bytes"),
    (SOUND.replace(b"relu", b"ralu"), "damaged, or no .keras file .*CRC"),
    (zipped(CONFIG), "a zip without model.weights.h5"), (zipped(("model.weights.h5", b"")),
                                                         "a zip without config.json"),
    (zipped(CONFIG, ("model.weights.h5", weights_file()), method=zipfile.ZIP_LZMA), "packed by an unusual method"),
    (zipped(("config.json", bytes(2**24 + 1)), ("model.weights.h5", b""), method=zipfile.ZIP_DEFLATED),
     "16777217 of them in one text"),
])
def test_refused_zips(tmp_path, content, message):
    path = tmp_path / "net.keras"
    path.write_bytes(content)
    with pytest.raises(ConversionError, match=message):
        convert(path)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_member_that_is_there_twice(tmp_path):
    path = tmp_path / "net.keras"
    path.write_bytes(zipped(CONFIG, CONFIG, ("model.weights.h5", weights_file())))
    with pytest.raises(ConversionError, match="required: each once"):
        convert(path)


def test_only_known_members_are_unpacked(tmp_path):
    path = tmp_path / "net.keras"
    path.write_bytes(zipped(CONFIG, ("model.weights.h5", weights_file()), ("../outside", b"x"),
                            ("assets/big", bytes(10))))
    convert(path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["net.keras"]


CONV_WEIGHTS = {"conv/conv/kernel:0": numbers(2, 2, 2, 3), "conv/conv/bias:0": numbers(3)}


@pytest.mark.parametrize(("weights", "attributes", "message"), [
    ({}, {}, "has no kernel in the file"),
    ({"conv/conv/kernel:0": numbers(2, 2, 2, 3)}, {}, "has no bias in the file"),
    (CONV_WEIGHTS | {"conv/a/conv/kernel:0": numbers(1)}, {}, "may have its kernel in .*required: one place"),
    (CONV_WEIGHTS | {"x": h5py.ExternalLink("other.h5", "/x")}, {}, "soft, external or user-defined link"),
    (CONV_WEIGHTS, {"model_config": None}, "no root attribute 'model_config', so it holds weights at most"),
    (CONV_WEIGHTS, {"model_config": "{"}, "model_config is no JSON"),
    (CONV_WEIGHTS, {"model_config": 3}, "required: one string"),
    (CONV_WEIGHTS, {"model_config": ["{}"] * 10}, "has 10 elements; at most 2 are accepted"),
    (CONV_WEIGHTS, {"keras_version": 2}, "root attribute 'keras_version' is 2; required: one string"),
])
def test_legacy_files(tmp_path, weights, attributes, message):
    path = legacy_file(tmp_path, weights, **attributes)
    with pytest.raises(ConversionError, match=message):
        convert(path)


@pytest.mark.parametrize(("old", "new"), [
    ("model_weights", "model_weights/conv/again"), ("model_weights/conv/conv", "model_weights/other"),
])
def test_groups_that_are_linked_to_again(tmp_path, old, new):
    path = legacy_file(tmp_path, CONV_WEIGHTS)
    with h5py.File(path, "r+") as file:
        file[new] = file[old]
    with pytest.raises(ConversionError, match=r"holds the group '/model_weights.*' a second time, as '/model_weights"):
        convert(path)


def test_doors_to_doors(tmp_path):
    """Groups that hold the next one under many names: two to the power of thirty ways through a small file."""
    path = legacy_file(tmp_path, CONV_WEIGHTS)
    with h5py.File(path, "r+") as file:
        group = file["model_weights"]
        for _ in range(30):
            inner = group.create_group("a")
            group["b"] = inner
            group = inner
    with pytest.raises(ConversionError, match="a second time"):
        convert(path)


def test_more_weights_than_any_network_has(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "MAX_WEIGHTS", 4)
    with pytest.raises(ConversionError, match="holds more weights than 10000 layers have"):
        convert(legacy_file(tmp_path, CONV_WEIGHTS))


def test_a_string_that_is_too_long(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "MAX_CONFIG_BYTES", 100)
    with pytest.raises(ConversionError, match="has a string of 343 bytes; at most 100"):
        convert(legacy_file(tmp_path, CONV_WEIGHTS))


@pytest.mark.parametrize("says", ["bfloat16", "float8", None])
def test_weights_in_bfloat16(tmp_path, says):
    """As Keras writes them: two bytes that HDF5 has no name for, and an attribute."""
    values = np.float32([[1.5, -2], [0.25, 3]]).reshape(1, 1, 2, 2)
    image = io.BytesIO()
    with h5py.File(image, "w") as file:
        data = file.create_dataset("layers/conv2d/vars/0", data=(values.view(np.uint32) >> 16).astype("<u2").view("V2"))
        if says:
            data.attrs["dtype"] = says
    conv = layer("Conv2D", "conv", filters=2, kernel_size=[1, 1], use_bias=False, dtype="bfloat16")
    path = keras_file(tmp_path, conv, weights=image.getvalue())
    if says == "bfloat16":
        np.testing.assert_array_equal(convert(path).graph.layers[0].weight, values.transpose(3, 2, 0, 1))
    else:
        with pytest.raises(ConversionError, match=r"Opaque .2 bytes.; required: IEEE"):
            convert(path)


def test_models_that_are_called_again_and_again(tmp_path):
    """A model of which one layer is used, and 3,000 are read each time."""
    entry = layer("InputLayer", "z", batch_shape=[None, 6, 5, 2]) | {"inbound_nodes": []}
    unused = [layer("ReLU", f"r{i}") | {"inbound_nodes": [[["z", 0, 0]]]} for i in range(3000)]
    inner = {"class_name": "Functional", "name": "inner", "config": {
        "name": "inner", "layers": [entry, *unused], "input_layers": [["z", 0, 0]], "output_layers": [["r0", 0, 0]]}}
    calls = [[["x", 0, 0]], *([["inner", i, 0]] for i in range(1, 100))]
    config = copy.deepcopy(FUNCTIONAL)
    config["config"]["layers"][1:] = [inner | {"inbound_nodes": calls},
                                      POOL | {"inbound_nodes": [[["inner", 100, 0]]]}]
    config["config"]["output_layers"] = [["pool", 0, 0]]
    with pytest.raises(ConversionError, match="are accepted for a source of this size"):
        convert(keras_file(tmp_path, config=config), max_constants="100MiB")


def test_weights_that_are_called_again_and_again_do_not_grow_without_bound(tmp_path):
    entries = copy.deepcopy(FUNCTIONAL)
    square = CONVOLUTION | {"config": CONVOLUTION["config"] | {"filters": 2, "padding": "same"}}
    entries["config"]["layers"][1:] = [square | {"inbound_nodes": [[["x", 0, 0]],
                                                                   *([["conv", i, 0]] for i in range(4))]}]
    entries["config"]["output_layers"] = [["conv", 4, 0]]
    weights = {"layers/conv2d/vars/0": numbers(2, 2, 2, 2), "layers/conv2d/vars/1": numbers(2)}
    with pytest.raises(ConversionError, match=r"Conv2D 'conv' .* at most 96KiB are accepted"):
        convert(keras_file(tmp_path, config=entries, weights=weights), max_constants="96KiB")


def replaced(config, path, value):
    config = copy.deepcopy(config)
    inner = config
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return config


def places(value, path=()):
    yield path
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from places(inner, (*path, key))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["nested.keras3", "convolutions.keras2", "order.keras3", "one_dimension.keras2"])
def test_wrong_types_anywhere(name):
    """Whatever stands in any place of the configuration, the file is read or refused."""
    with zipfile.ZipFile(RECORDED / f"{name}.keras") as archive:
        config, weights = json.loads(archive.read("config.json")), archive.read("model.weights.h5")
    paths = [path for path in places(config) if path and "build_config" not in path
             and not any("initializer" in str(key) for key in path)]
    values = [None, True, -1, 0, 3, 10**30, 2**31 - 1, 1.5, float("nan"), "x", "same", [], {}, [[]], [1, 2],
              [2**30, 2**30]]
    choose = random.Random(0)
    read = 0
    for _ in range(250):
        value = choose.choice(values)
        content = zipped(("config.json", json.dumps(replaced(config, choose.choice(paths), value))),
                         ("model.weights.h5", weights))
        try:
            with np.errstate(all="ignore"):
                layers, shape, *_ = keras.parse(content)
                Graph(tuple(layers), shape)
            read += 1
        except FastDTDError:
            pass
    assert 0 < read < 250


@pytest.mark.parametrize("name", ["nested.keras3.keras", "nested.keras2.h5"])
def test_damaged_files_are_read_or_refused(name):
    content = (RECORDED / name).read_bytes()
    choose = random.Random(1)
    refused = 0
    for _ in range(150):
        damaged = bytearray(content[:choose.choice([len(content), choose.randrange(len(content))])])
        for _ in range(choose.randrange(1, 20)):
            damaged[choose.randrange(len(damaged))] = choose.randrange(256)
        try:
            with np.errstate(all="ignore"):
                layers, shape, *_ = keras.parse(bytes(damaged))
                Graph(tuple(layers), shape)
        except FastDTDError:
            refused += 1
    assert refused > 50
