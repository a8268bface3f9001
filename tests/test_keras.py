"""Keras files: recorded networks give Keras's scores in both dialects; whatever is damaged, hostile or unsupported is refused by name."""

import copy
import io
import json
import random
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import pytest

import fastdtd
from fastdtd import graph as g
from fastdtd.errors import ConversionError, FastDTDError
from fastdtd.explainer import Explainer
from fastdtd.graph import Graph
from fastdtd.importers import convert, keras, verify

RECORDED = Path(__file__).parent / "recorded" / "keras"  # record_keras.py made them
FILES = sorted(path.name for path in RECORDED.glob("*.*.*"))


# ---- What Keras wrote --------------------------------------------------------------------------------------------------------------------


def recorded(name):
    """Input, as the network has it here, and scores that Keras gave for it."""
    with np.load(RECORDED / "scores.npz") as arrays:
        picture, scores = (arrays[f"{name.rpartition('.')[0]}.{what}"] for what in ("input", "scores"))
    picture = np.moveaxis(picture, -1, 1)
    return picture.reshape(*picture.shape[:2], *((1,) * (4 - picture.ndim)), *picture.shape[2:]), scores


@pytest.mark.filterwarnings("ignore::fastdtd.explainer.ExplanationWarning")
@pytest.mark.parametrize("name", FILES)
def test_recorded_networks(name):
    picture, expected = recorded(name)
    e = Explainer(convert(RECORDED / name))(picture)
    scores = e.output
    if name.startswith(("convolutions", "flat")):  # a softmax is at their end, which is dropped
        exponents = np.exp(scores - scores.max(1, keepdims=True))
        scores = exponents / exponents.sum(1, keepdims=True)
    np.testing.assert_allclose(scores, expected, atol=1e-5 * np.abs(expected).max())
    np.testing.assert_allclose(e.relevance.sum((1, 2, 3)) + e.absorbed, e.explained, rtol=1e-4, atol=1e-5)


def test_recorded_files_are_all_there():
    assert len(FILES) == 20
    assert {name.split(".", 1)[1] for name in FILES} == {"keras2.keras", "keras2.h5", "keras3.keras", "keras3.h5"}


def test_layers_and_names():
    graph = convert(RECORDED / "nested.keras3.h5").graph
    assert graph.input_shape == (3, 6, 6)
    names = [layer.name for layer in graph]
    assert [name for name in names if name.startswith("inner/block")] == [
        "inner/block/conv2d", "inner/block/leaky_re_lu", "inner/block/conv2d_", "inner/block/leaky_re_lu_"]  # called twice
    assert isinstance(graph.layers[-2], g.Flatten)  # nothing is moved: the dense layer's columns are
    assert isinstance(graph.layers[-1], g.Dense)


@pytest.mark.parametrize(("name", "expected"), [("flat.keras2.keras", "keras 2.14.0"), ("flat.keras2.h5", "keras 2.14.0 (HDF5)")])
def test_provenance(name, expected):
    assert convert(RECORDED / name).provenance["format"] == expected


def test_zeros_join_a_max_pool_only_where_they_change_nothing():
    graph = convert(RECORDED / "pools.keras3.keras").graph
    pools = [layer for layer in graph if isinstance(layer, g.MaxPool2d) and layer.kernel == (3, 3)]
    assert [pool.padding for pool in pools] == [(1, 1, 1, 1), (1, 0, 1, 1), (0, 0, 0, 0)]
    assert sum(isinstance(layer, g.Rearrange) for layer in graph) == 1


def test_size_replaces_the_files(tmp_path):
    model = convert(keras_file(tmp_path, shape=(None, None, 2)), size=(7, 9))
    assert model.graph.input_shape == (2, 7, 9)
    with pytest.raises(ConversionError, match=r"leaves its size open; give size="):
        convert(keras_file(tmp_path, shape=(None, None, 2)))


def test_converted_networks_are_saved(tmp_path):
    model = convert(RECORDED / "order.keras3.keras")
    fastdtd.save(model, tmp_path / "net.h5")
    picture, _ = recorded("order.keras3.keras")
    np.testing.assert_array_equal(Explainer(fastdtd.load(tmp_path / "net.h5"))(picture).output, Explainer(model)(picture).output)
    with pytest.raises(ConversionError, match="already a fastdtd model file"):
        convert(tmp_path / "net.h5")


# ---- Single layers -----------------------------------------------------------------------------------------------------------------------


def layer(kind, name, **settings):
    return {"class_name": kind, "config": {"name": name, **settings}}


def numbers(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


CONVOLUTION = layer("Conv2D", "conv", filters=3, kernel_size=[2, 2], activation="relu")
WEIGHTS = {"layers/conv2d/vars/0": numbers(2, 2, 2, 3), "layers/conv2d/vars/1": numbers(3, seed=1)}
POOL = layer("GlobalAveragePooling2D", "pool")


def weights_file(weights=WEIGHTS):
    image = io.BytesIO()
    with h5py.File(image, "w") as file:
        for path, value in weights.items():
            file[path] = value
    return image.getvalue()


def keras_file(tmp_path, *layers, shape=(6, 5, 2), weights=WEIGHTS, config=None):
    """A Sequential model of the layers given (default: a convolution) and a pool, as .keras."""
    entries = [layer("InputLayer", "x", batch_shape=[None, *shape]), *(layers or [CONVOLUTION]), POOL]
    config = {"class_name": "Sequential", "config": {"name": "net", "layers": entries}} if config is None else config
    path = tmp_path / "net.keras"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("config.json", config if isinstance(config, (str, bytes)) else json.dumps(config))
        archive.writestr("model.weights.h5", weights if isinstance(weights, bytes) else weights_file(weights))
    return path


@pytest.mark.parametrize(("activation", "expected"), [
    ("linear", None), (None, None), ("relu", g.ReLU), ("relu6", g.Clip), ("leaky_relu", g.LeakyReLU),
    ({"module": "builtins", "class_name": "function", "config": "relu6", "registered_name": "function"}, g.Clip),
    ({"module": "keras.layers", "class_name": "LeakyReLU", "config": {"name": "a", "negative_slope": 0.3}}, g.LeakyReLU),
])
def test_activations(tmp_path, activation, expected):
    graph = convert(keras_file(tmp_path, CONVOLUTION, layer("Activation", "act", activation=activation))).graph
    assert [type(one) for one in graph if one.name in ("act", "act/activation")] == ([] if expected is None else [expected])


@pytest.mark.parametrize(("settings", "expected"), [
    ({}, [g.ReLU]), ({"max_value": 2.5}, [g.Clip]), ({"negative_slope": 0.5}, [g.LeakyReLU]), ({"negative_slope": [0.5]}, [g.LeakyReLU]),
    ({"negative_slope": 0.5, "max_value": 2.5}, [g.LeakyReLU, g.Clip]),
])
def test_relu(tmp_path, settings, expected):
    graph = convert(keras_file(tmp_path, CONVOLUTION, layer("ReLU", "r", **settings))).graph
    assert [type(one) for one in graph if one.name in ("r", "r/clip")] == expected


def test_gaps_in_the_numbers_of_groups(tmp_path):
    """Keras 2.12 skips numbers where it meets a layer twice."""
    second = layer("Conv2D", "conv2", filters=3, kernel_size=[1, 1], use_bias=False)
    weights = WEIGHTS | {"layers/conv2d_10/vars/0": numbers(1, 1, 3, 3)}
    graph = convert(keras_file(tmp_path, CONVOLUTION, second, weights=weights)).graph
    np.testing.assert_array_equal(graph.layers[2].weight, numbers(1, 1, 3, 3).transpose(3, 2, 0, 1))


def legacy_file(tmp_path, weights, *layers, **attributes):
    """The same as .h5."""
    entries = [layer("InputLayer", "x", batch_input_shape=[None, 6, 5, 2]), *(layers or [CONVOLUTION]), POOL]
    config = {"class_name": "Sequential", "config": {"name": "net", "layers": entries}}
    path = tmp_path / "net.h5"
    with h5py.File(path, "w") as file:
        for key, value in ({"model_config": json.dumps(config)} | attributes).items():
            if value is not None:
                file.attrs[key] = value
        file.create_group("model_weights")
        for where, value in weights.items():
            file[f"model_weights/{where}"] = value
    return path


@pytest.mark.parametrize("prefix", ["conv/conv", "conv/conv2d_7", "conv/some/scope/conv"])
@pytest.mark.parametrize("ending", ["", ":0", "_1:0"])
def test_legacy_names_of_weights(tmp_path, prefix, ending):
    weights = {f"{prefix}/kernel{ending}": numbers(2, 2, 2, 3), f"{prefix}/bias{ending}": numbers(3, seed=1)}
    graph = convert(legacy_file(tmp_path, weights)).graph
    np.testing.assert_array_equal(graph.layers[0].weight, numbers(2, 2, 2, 3).transpose(3, 2, 0, 1))
    np.testing.assert_array_equal(graph.layers[0].bias, numbers(3, seed=1))


def test_of_several_outputs_the_first_is_taken(tmp_path):
    entries = [layer("InputLayer", "x", batch_shape=[None, 6, 5, 2]) | {"inbound_nodes": []},
               CONVOLUTION | {"inbound_nodes": [[["x", 0, 0, {}]]]}, POOL | {"inbound_nodes": [[["conv", 0, 0, {"training": False}]]]},
               layer("ReLU", "other") | {"inbound_nodes": [[["conv", 0, 0, {}]]]}]
    config = {"class_name": "Functional", "config": {"name": "net", "layers": entries, "input_layers": [["x", 0, 0]],
                                                     "output_layers": [["pool", 0, 0], ["other", 0, 0]]}}
    assert [one.name for one in convert(keras_file(tmp_path, config=config)).graph] == ["conv", "conv/activation", "pool"]


# ---- Refused -----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("refused", "message"), [
    (layer("Lambda", "code", function={"class_name": "__lambda__", "config": {"code": "4wAAAA"}}),
     r"Lambda 'code' \(layer 3 of 4\) is of a class that is not supported; what works: .* never run"),
    (layer("Multiply", "se"), "Multiply 'se' .*squeeze-and-excitation"),
    (layer("LSTM", "l"), r"LSTM 'l' \(layer 3 of 4\) .* supported: Activation, "),
    (layer("Conv2D", "mine") | {"module": "mylib.layers"}, "'mine' .* somebody's own"),
    (layer("mylib>Conv2D", "mine"), "'mine' .* somebody's own"),
    (layer("Dense", "mine") | {"registered_name": "mylib>Dense"}, "'mine' .* somebody's own"),
    (layer("Activation", "a", activation="swish"), "activation 'swish'; required: linear, relu"),
    (layer("Activation", "a", activation="sigmoid"), "activation 'sigmoid'.*save a model without it"),
    (layer("Activation", "a", activation={"module": "mylib", "class_name": "function", "config": "relu"}), "of somebody's own"),
    (layer("Activation", "a", activation=3), "activation is a whole number '3'; required: a text"),
    (layer("ReLU", "r", threshold=1.0), "threshold 1; required: 0"),
    (layer("LeakyReLU", "r", alpha=2.0), "slope 2; required: 0 to 1"),
    (layer("Dense", "d", units=2, dtype={"class_name": "QuantizedDTypePolicy", "config": {"name": "int8_from_float32"}}), "computes in"),
    (layer("Dense", "d", units=2, quantization_config={}), "is quantized"),
    (layer("Dense", "d", units=0), "units 0; required: a whole number from 1"),
    (layer("Dense", "d", units="two"), "units is a text 'two'; required: a whole number"),
    (layer("Dense", "d"), "units is null; required: a whole number"),
    (layer("Dense", "d", units=2), "has no weights of its own"),
    (layer("MaxPooling2D", "p", data_format="channels_first"), "channels first; required: channels_last"),
    (layer("MaxPooling2D", "p", padding="causal"), "padding 'causal'; required: 'valid' or 'same'"),
    (layer("MaxPooling2D", "p", pool_size=[2, 2, 2]), "pool_size .*required: 2 whole numbers"),
    (layer("MaxPooling1D", "p"), "4 axes, the batch included; required: 3"),
    (layer("UpSampling2D", "u", interpolation="bilinear"), "interpolation 'bilinear'; required: nearest"),
    (layer("UpSampling2D", "u", size=[2**15, 2**15]), "at most 268435456 numbers"),
    (layer("ZeroPadding2D", "z", padding=[[2**30, 0], [0, 0]]), r"ZeroPadding2D 'z' .*at most 268435456 numbers"),
    (layer("ZeroPadding2D", "z", padding=[1, "1"]), "padding is a text '1'; required: a list"),
    (layer("Cropping2D", "c", cropping=[[3, 3], [0, 0]]), "crops everything away"),
    (layer("Reshape", "s", target_shape=[7, -1]), "of 60 numbers; required: as many"),
    (layer("Reshape", "s", target_shape=[2, 5, 3, 2]), "reads a tensor of 5 axes, the batch included; required: 4"),
    (layer("Permute", "s", dims=[1, 2, 2]), "each of 1 to 3 once"),
    (layer("Concatenate", "c"), "required: two or more"),
    (layer("Normalization", "n", mean=[1, 2, 3], variance=[1, 2]), "3 means and 2 variances"),
    (layer("Normalization", "n", axis=1, mean=[1], variance=[1]), "axis 1 over 4 axes; required: -1"),
    (layer("Rescaling", "n", scale=[1, 2], offset=0), "2 factors and 1 offsets for 3 channels"),
    (layer("Rescaling", "n", scale=float("inf"), offset=0), "scale inf; required: a finite number"),
    (layer("Softmax", "s"), "softmax 's' is not the last layer"),
    (layer("Conv2DTranspose", "t", filters=2, kernel_size=3, strides=2, output_padding=2), "output_padding less than the stride"),
    ({"class_name": "Sequential", "config": {"name": "inner", "layers": []}}, "'inner' .* has no layers"),
    ({"config": {}}, "layer 3 of 4: class_name is null; required: a text"),
    ("ReLU", "layer 3 of 4 is a text 'ReLU'; required: an object"),
])
def test_refused_layers(tmp_path, refused, message):
    with pytest.raises(ConversionError, match=message):
        explainer_of(keras_file(tmp_path, CONVOLUTION, refused))


def explainer_of(path):
    try:
        return Explainer(convert(path))  # a softmax in the middle is refused when the network is made canonical
    except fastdtd.ModelError as error:
        raise ConversionError(str(error)) from error


@pytest.mark.parametrize(("weights", "message"), [
    ({"layers/conv2d/vars/0": numbers(2, 2, 2, 3)}, "has no bias in the file"),
    ({"layers/conv2d_x/vars/0": numbers(2, 2, 2, 3)}, "has no weights of its own"),
    ({}, "has no weights of its own"),
    (WEIGHTS | {"layers/conv2d_1/vars/0": numbers(2, 2, 2, 3)}, "layers of its class are not as many"),
    (WEIGHTS | {"layers/conv2d/vars/0": numbers(2, 2, 3, 3)}, r"kernel of shape \(2, 2, 3, 3\); required .*\(2, 2, 2, 3\)"),
    (WEIGHTS | {"layers/conv2d/vars/0": numbers(2, 2, 2, 3).astype(np.int8)}, "IEEE floating-point"),
    (WEIGHTS | {"layers/conv2d/vars/0": np.full((2, 2, 2, 3), np.nan, np.float32)}, "NaN or infinity"),
    (WEIGHTS | {"layers/conv2d/vars/0": h5py.ExternalLink("other.h5", "/x")}, "soft, external or user-defined link"),
    (WEIGHTS | {"layers/conv2d/vars/0": h5py.SoftLink("/layers/conv2d/vars/1")}, "soft, external or user-defined link"),
    ({"layers/conv2d": h5py.ExternalLink("other.h5", "/x")}, "soft, external or user-defined link"),
    (b"", "not an HDF5 file"),
    (b"\x89HDF\r\n\x1a\n" + bytes(500), "HDF5 cannot process it"),
    (weights_file()[:2000], "HDF5 cannot process it"),
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
    (external_storage, "keeps its data in other files"), (virtual, "keeps its data in other files"), (foreign_filter, "HDF5 filters"),
])
def test_refused_storage(tmp_path, make, message):
    image = io.BytesIO(weights_file())
    with h5py.File(image, "r+") as file:
        del file["layers/conv2d/vars/0"]
        make(file)
    with pytest.raises(ConversionError, match=message):
        convert(keras_file(tmp_path, weights=image.getvalue()))


FUNCTIONAL = {"class_name": "Functional", "config": {
    "name": "net", "layers": [
        layer("InputLayer", "x", batch_shape=[None, 6, 5, 2]) | {"inbound_nodes": []},
        CONVOLUTION | {"inbound_nodes": [[["x", 0, 0, {}]]]},
        layer("Add", "sum") | {"inbound_nodes": [[["conv", 0, 0, {}], ["conv", 0, 0, {}]]]},
        POOL | {"inbound_nodes": [[["sum", 0, 0, {}]]]}],
    "input_layers": [["x", 0, 0]], "output_layers": [["pool", 0, 0]]}}
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
    (3, [{"args": [3.0], "kwargs": {}}], "inbound_nodes is a number '3.0'; required: an object"),
    (3, [{"kwargs": {}}], "inbound_nodes is null; required: a list"),
    (3, [[["sum", 0, 0], ["conv", 0, 0]]], "has 2 inputs; required: one"),
])
def test_refused_connections(tmp_path, index, nodes, message):
    config = copy.deepcopy(FUNCTIONAL)
    config["config"]["layers"][index]["inbound_nodes"] = nodes
    with pytest.raises(ConversionError, match=message):
        convert(keras_file(tmp_path, config=config))


@pytest.mark.parametrize(("changes", "message"), [
    ({"output_layers": []}, "has no output_layers"), ({"output_layers": [["none", 0, 0]]}, "'none' among its output_layers"),
    ({"input_layers": [["x", 0, 0], ["conv", 0, 0]]}, "2 inputs; required: one"), ({"input_layers": None}, "input_layers is null"),
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
    ("[" * 100_000, "config.json is no JSON, or nested too deeply"), ('{"a": ' + "1" * 10_000 + "}", "config.json is no JSON"),
    ("{}", "class_name is null"), ('{"class_name": "Mine", "config": {}}', "of class 'Mine'; required: Sequential or Functional"),
    ('{"class_name": "Sequential", "config": 3}', "config is a whole number '3'; required: an object"),
    ('{"class_name": "Sequential", "config": {"layers": [{"class_name": "ReLU", "config": {}}]}}', "does not say its input's shape"),
])
def test_refused_configurations(tmp_path, config, message):
    with pytest.raises(ConversionError, match=message):
        convert(keras_file(tmp_path, config=config))


@pytest.mark.parametrize(("shape", "message"), [
    ((6, 5, None), "leaves its size open; required"), ((None,), "leaves its size open; required"), ((2, 6, 5, 2), "required: .N, H, W, C"),
    ((6, "5", 2), "input shape is a text '5'"), ((6, -5, 2), "leaves its size open"), ((2**20, 2**20, 2), "at most 268435456 numbers"),
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
        inner = {"class_name": "Functional", "config": {"name": f"inner{i}", "layers": [x, entry], "input_layers": [["x", 0, 0]],
                                                        "output_layers": [[inner["config"]["name"], 9, 0]]}}
    with pytest.raises(ConversionError, match="at most 10000 calls"):
        convert(keras_file(tmp_path, inner))


# ---- Hostile files -----------------------------------------------------------------------------------------------------------------------


def zipped(*members, method=zipfile.ZIP_STORED):
    image = io.BytesIO()
    with zipfile.ZipFile(image, "w", method) as archive:
        for name, content in members:
            archive.writestr(name, content)
    return image.getvalue()


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
    (zipped(CONFIG), "a zip without model.weights.h5"), (zipped(("model.weights.h5", b"")), "a zip without config.json"),
    (zipped(CONFIG, ("model.weights.h5", weights_file()), method=zipfile.ZIP_LZMA), "packed by an unusual method"),
    (zipped(("config.json", bytes(2**24 + 1)), ("model.weights.h5", b""), method=zipfile.ZIP_DEFLATED), "16777217 of them in one text"),
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
    path.write_bytes(zipped(CONFIG, ("model.weights.h5", weights_file()), ("../outside", b"x"), ("assets/big", bytes(10))))
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


def test_groups_in_a_circle(tmp_path):
    path = legacy_file(tmp_path, CONV_WEIGHTS)
    with h5py.File(path, "r+") as file:
        file["model_weights/conv/again"] = file["model_weights"]
    with pytest.raises(ConversionError, match="too deep ones"):
        convert(path)


def test_a_string_that_is_too_long(tmp_path, monkeypatch):
    monkeypatch.setattr(keras, "MAX_CONFIG_BYTES", 100)
    with pytest.raises(ConversionError, match="strings of more than 100 bytes"):
        convert(legacy_file(tmp_path, CONV_WEIGHTS))


def test_weights_that_are_called_again_and_again_do_not_grow_without_bound(tmp_path, monkeypatch):
    monkeypatch.setattr(keras, "MAX_WEIGHT_ELEMENTS", 60)
    entries = copy.deepcopy(FUNCTIONAL)
    square = CONVOLUTION | {"config": CONVOLUTION["config"] | {"filters": 2, "padding": "same"}}
    entries["config"]["layers"][1:] = [square | {"inbound_nodes": [[["x", 0, 0]], *([["conv", i, 0]] for i in range(4))]}]
    entries["config"]["output_layers"] = [["conv", 4, 0]]
    weights = {"layers/conv2d/vars/0": numbers(2, 2, 2, 2), "layers/conv2d/vars/1": numbers(2)}
    with pytest.raises(ConversionError, match="brings the network beyond 60 weights"):
        convert(keras_file(tmp_path, config=entries, weights=weights))


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


@pytest.mark.parametrize("name", ["nested.keras3", "convolutions.keras2", "order.keras3", "one_dimension.keras2"])
def test_wrong_types_anywhere(name):
    """Whatever stands in any place of the configuration, the file is read or refused."""
    with zipfile.ZipFile(RECORDED / f"{name}.keras") as archive:
        config, weights = json.loads(archive.read("config.json")), archive.read("model.weights.h5")
    paths = [path for path in places(config) if path and "build_config" not in path and not any("initializer" in str(key) for key in path)]
    values = [None, True, -1, 0, 3, 10**30, 2**31 - 1, 1.5, float("nan"), "x", "same", [], {}, [[]], [1, 2], [2**30, 2**30]]
    choose = random.Random(0)
    read = 0
    for _ in range(250):
        value = choose.choice(values)
        content = zipped(("config.json", json.dumps(replaced(config, choose.choice(paths), value))), ("model.weights.h5", weights))
        try:
            with np.errstate(all="ignore"):
                layers, shape, _ = keras.parse(content)
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
                layers, shape, _ = keras.parse(bytes(damaged))
                Graph(tuple(layers), shape)
        except FastDTDError:
            refused += 1
    assert refused > 50


# ---- Verifying ---------------------------------------------------------------------------------------------------------------------------


def test_verifying_compares_with_keras(tmp_path, monkeypatch):
    """With a Keras that gives what is expected of it: the converted network's own scores, a tenth more of the first."""
    path = keras_file(tmp_path)
    model = convert(path)
    calls = []

    def predict(pictures, verbose):
        calls.append(pictures.shape)
        return Explainer(model)(np.ascontiguousarray(pictures.transpose(0, 3, 1, 2))).output * np.float32(1.25)

    network = SimpleNamespace(inputs=[SimpleNamespace(shape=(None, 6, 5, 2))], predict=predict)
    monkeypatch.setitem(sys.modules, "keras", SimpleNamespace(models=SimpleNamespace(load_model=lambda path, compile: network)))
    assert verify(model, path) == pytest.approx(0.2, rel=1e-4)
    assert calls == [(4, 6, 5, 2)]


def test_verifying_loads_nothing_that_conversion_refuses(tmp_path, monkeypatch):
    model = convert(keras_file(tmp_path))
    loaded = []
    monkeypatch.setitem(sys.modules, "keras", SimpleNamespace(models=SimpleNamespace(load_model=loaded.append)))
    with pytest.raises(ConversionError, match="never run"):
        verify(model, keras_file(tmp_path, layer("Lambda", "code")))
    assert not loaded


def test_verifying_what_keras_cannot_run(tmp_path, monkeypatch):
    path = keras_file(tmp_path)
    monkeypatch.setitem(sys.modules, "keras", SimpleNamespace(models=SimpleNamespace()))
    with pytest.raises(ConversionError, match=r"Keras cannot run it: .* required: the version that wrote the file"):
        verify(convert(path), path)


def test_verifying_without_keras(tmp_path, monkeypatch):
    path = keras_file(tmp_path)
    monkeypatch.setitem(sys.modules, "keras", None)
    with pytest.raises(ConversionError, match="pip install keras"):
        verify(convert(path), path)
