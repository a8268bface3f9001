"""Keras: recorded networks give Keras's scores in both dialects; what is not supported is refused with its name."""

import copy
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from importing import numbers, scores
from keras_models import (
    CONVOLUTION,
    FILES,
    FUNCTIONAL,
    POOL,
    RECORDED,
    WEIGHTS,
    functional,
    keras_file,
    layer,
    legacy_file,
    operation,
    recorded,
    tensor,
)

import fastdtd
from fastdtd import graph as g
from fastdtd.errors import ConversionError
from fastdtd.explainer import Explainer
from fastdtd.importers import convert

# ---- What Keras wrote ----


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
        # called twice
        "inner/block/conv2d", "inner/block/leaky_re_lu", "inner/block/conv2d_", "inner/block/leaky_re_lu_"]
    assert isinstance(graph.layers[-2], g.Flatten)  # nothing is moved: the dense layer's columns are
    assert isinstance(graph.layers[-1], g.Dense)


@pytest.mark.parametrize(("name", "expected"), [("flat.keras2.keras", "keras 2.14.0"),
                                                ("flat.keras2.h5", "keras 2.14.0 (HDF5)")])
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
    np.testing.assert_array_equal(Explainer(fastdtd.load(tmp_path / "net.h5"))(picture).output,
                                  Explainer(model)(picture).output)
    with pytest.raises(ConversionError, match="already a fastdtd model file"):
        convert(tmp_path / "net.h5")


# ---- Single layers ----


@pytest.mark.parametrize(("activation", "expected"), [
    ("linear", None), (None, None), ("relu", g.ReLU), ("relu6", g.Clip), ("leaky_relu", g.LeakyReLU),
    ({"module": "builtins", "class_name": "function", "config": "relu6", "registered_name": "function"}, g.Clip),
    ({"module": "keras.layers", "class_name": "LeakyReLU", "config": {"name": "a", "negative_slope": 0.3}},
     g.LeakyReLU),
])
def test_activations(tmp_path, activation, expected):
    graph = convert(keras_file(tmp_path, CONVOLUTION, layer("Activation", "act", activation=activation))).graph
    assert [type(one) for one in graph if one.name in ("act", "act/activation")] == ([] if expected is None
                                                                                     else [expected])


@pytest.mark.parametrize(("activation", "expected"), [
    ("swish", ("silu", 1, None)), ("silu", ("silu", 1, None)), ("hard_silu", ("hard_swish", 1 / 6, 0.5)),
    ("gelu", ("gelu", None, None)), ("elu", ("elu", 1, 1)), ("selu", ("elu", 1.6732632423543772, 1.0507009873554805)),
    ("mish", ("mish", None, None)), ("softplus", ("softplus", None, None)), ("tanh", ("tanh", None, None)),
    ("sigmoid", ("sigmoid", None, None)), ("hard_sigmoid", ("hard_sigmoid", 1 / 6, 0.5)),
    ({"module": "keras.layers", "class_name": "ELU", "config": {"name": "a", "alpha": 0.5}}, ("elu", 0.5, 1)),
])
def test_smooth_activations(tmp_path, activation, expected):
    graph = convert(keras_file(tmp_path, CONVOLUTION, layer("Activation", "act", activation=activation))).graph
    made, = (one for one in graph if isinstance(one, g.Activation))
    assert (made.function, made.alpha, made.beta) == expected


@pytest.mark.parametrize(("version", "slope"), [("2.14.0", 0.2), ("3.3.3", 1 / 6), (None, 1 / 6)])
def test_the_hard_sigmoid_of_a_version(tmp_path, version, slope):
    file = legacy_file(tmp_path, {}, layer("Activation", "act", activation="hard_sigmoid"), keras_version=version)
    assert convert(file).graph.layers[0].alpha == slope


def test_squeeze_and_excitation(tmp_path):
    """As keras.applications writes it: a pool, a reshape, dense layers by convolution, and a product."""
    entries = [layer("InputLayer", "x", batch_shape=[None, 6, 5, 2]) | {"inbound_nodes": []}]
    for one, *sources in (
            (layer("GlobalAveragePooling2D", "squeeze"), "x"),
            (layer("Reshape", "one", target_shape=[1, 1, 2]), "squeeze"),
            (layer("Conv2D", "conv", filters=2, kernel_size=[1, 1], activation="sigmoid"), "one"),
            (layer("Multiply", "excite"), "x", "conv"), (layer("GlobalAveragePooling2D", "pool"), "excite")):
        entries.append(one | {"inbound_nodes": [[[source, 0, 0, {}] for source in sources]]})
    config = {"class_name": "Functional", "config": {"name": "net", "layers": entries, "input_layers": [["x", 0, 0]],
                                                     "output_layers": [["pool", 0, 0]]}}
    weights = {"layers/conv2d/vars/0": numbers(1, 1, 2, 2), "layers/conv2d/vars/1": numbers(2)}
    graph = convert(keras_file(tmp_path, config=config, weights=weights)).graph
    assert [(type(one), graph.shapes[one.name]) for one in graph] == [
        (g.GlobalAveragePool, (2, 1, 1)), (g.Conv2d, (2, 1, 1)), (g.Activation, (2, 1, 1)), (g.Multiply, (2, 6, 5)),
        (g.GlobalAveragePool, (2, 1, 1))]
    assert graph.layers[3].inputs == ("input", "conv/activation")


@pytest.mark.parametrize(("settings", "expected"), [
    ({}, [g.ReLU]), ({"max_value": 2.5}, [g.Clip]), ({"negative_slope": 0.5}, [g.LeakyReLU]),
    ({"negative_slope": [0.5]}, [g.LeakyReLU]),
    ({"negative_slope": 0.5, "max_value": 2.5}, [g.LeakyReLU, g.Clip]),
])
def test_relu(tmp_path, settings, expected):
    graph = convert(keras_file(tmp_path, CONVOLUTION, layer("ReLU", "r", **settings))).graph
    assert [type(one) for one in graph if one.name in ("r", "r/clip")] == expected


BATCH_NORM = {f"layers/batch_normalization/vars/{i}": np.abs(numbers(3, seed=i)) + 1 for i in range(4)}


@pytest.mark.parametrize(("settings", "message"), [
    ({"renorm": False, "momentum": 0.9, "gamma_initializer": "ones", "beta_constraint": "any", "synchronized": True,
      "trainable": False, "axis": [-1]}, None),
    ({"renorm": True}, "has renorm True, which is not supported; required: False"),
    ({"mode": 1}, "has mode 1, which is not supported; required: none"),
    ({"axis": [2]}, "has axis 2 over 4 axes; required: -1 or 1"), ({"mode": None}, None),
])
def test_settings_of_a_batch_norm(tmp_path, settings, message):
    path = keras_file(tmp_path, CONVOLUTION, layer("BatchNormalization", "n", **settings), weights=WEIGHTS | BATCH_NORM)
    if message is None:
        assert convert(path).graph
    else:
        with pytest.raises(ConversionError, match=message):
            convert(path)


def test_channels_first(tmp_path):
    """The network is the one that it is with the channels last, whose weights are the same."""
    graphs = []
    for order, axis, shape in (("channels_last", -1, (9, 8, 2)), ("channels_first", 1, (2, 9, 8))):
        def image(kind, name, order=order, **settings):
            return layer(kind, name, data_format=order, **settings)

        layers = [
            image("ZeroPadding2D", "z", padding=[[1, 0], [0, 2]]),
            image("Conv2D", "conv", filters=3, kernel_size=[2, 2], activation="relu"),
            layer("BatchNormalization", "n", axis=[axis]), image("DepthwiseConv2D", "d", kernel_size=[2, 2]),
            layer("ReLU", "r"), image("Cropping2D", "c", cropping=[[1, 0], [0, 1]]),
            image("MaxPooling2D", "m", pool_size=[2, 2]), image("UpSampling2D", "u", size=[2, 1]),
            image("UpSampling2D", "v", size=[1, 2], interpolation="bilinear"),
            image("Conv2DTranspose", "t", filters=2, kernel_size=[2, 2], strides=[2, 2]),
            image("Flatten", "f"), layer("Dense", "y", units=4)]
        weights = WEIGHTS | BATCH_NORM | {
            "layers/depthwise_conv2d/vars/0": numbers(2, 2, 3, 1), "layers/depthwise_conv2d/vars/1": numbers(3, seed=2),
            "layers/conv2d_transpose/vars/0": numbers(2, 2, 2, 3), "layers/conv2d_transpose/vars/1": numbers(2, seed=3),
            "layers/dense/vars/0": numbers(288, 4), "layers/dense/vars/1": numbers(4, seed=4)}
        entries = [layer("InputLayer", "x", batch_shape=[None, *shape]), *layers]
        config = {"class_name": "Sequential", "config": {"name": "net", "layers": entries}}
        graphs.append(convert(keras_file(tmp_path, config=config, weights=weights)).graph)
    last, first = graphs
    assert first.input_shape == last.input_shape == (2, 9, 8)
    x = numbers(3, 2, 9, 8)
    np.testing.assert_allclose(scores(first, x), scores(last, x), rtol=1e-5, atol=1e-6)
    entries[0]["config"]["batch_shape"] = [None, 2, None, None]
    assert convert(keras_file(tmp_path, config=config, weights=weights), size=(9, 8)).graph.input_shape == (2, 9, 8)


NORM = {f"layers/{kind}/vars/{i}": numbers(3, seed=i) for kind in ("layer_normalization", "group_normalization",
                                                                   "rms_normalization") for i in range(2)}


@pytest.mark.parametrize(("kind", "settings", "expected"), [
    ("LayerNormalization", {"axis": [-1]}, (1, True, True, 1e-3)),
    ("LayerNormalization", {"axis": 3, "epsilon": 0.1, "scale": False, "rms_scaling": False}, (1, True, True, 0.1)),
    ("LayerNormalization", {"center": False}, (1, True, True, 1e-3)),
    ("RMSNormalization", {}, (1, True, False, 1e-6)),
    ("GroupNormalization", {"groups": 1}, (1, False, True, 1e-3)),
    ("GroupNormalization", {"groups": -1, "epsilon": 0.01, "center": False}, (3, False, True, 0.01)),
])
def test_norms_by_the_image_s_own_statistics(tmp_path, kind, settings, expected):
    names = [name for name, setting in (("gamma", "scale"), ("beta", "center")) if settings.get(setting, True)]
    stored = [NORM[f"layers/{kind.removesuffix('Normalization').lower()}_normalization/vars/{i}"]
              for i in range(1 if kind.startswith("RMS") else len(names))]
    path = keras_file(tmp_path, CONVOLUTION, layer(kind, "n", **settings), weights=WEIGHTS | {
        f"layers/{kind.removesuffix('Normalization').lower()}_normalization/vars/{i}": value
        for i, value in enumerate(stored)})
    norm, = (one for one in convert(path).graph if isinstance(one, g.GroupNorm))
    assert (norm.groups, norm.per_position, norm.centered, norm.epsilon) == expected
    parameters = dict(zip(names, stored, strict=False))
    np.testing.assert_array_equal(norm.scale, parameters.get("gamma", np.ones(3, np.float32)))
    np.testing.assert_array_equal(norm.shift, parameters.get("beta", np.zeros(3, np.float32)))


@pytest.mark.parametrize(("kind", "settings", "message"), [
    ("LayerNormalization", {"axis": [1, 2, 3]}, "has axis .1, 2, 3. over 4 axes"),
    ("LayerNormalization", {"rms_scaling": True}, "has rms_scaling"),
    ("GroupNormalization", {"groups": 2}, "has 3 channels in 2 groups; required: groups that divide them"),
    ("GroupNormalization", {"groups": 0}, "has 3 channels in 0 groups"),
    ("LayerNormalization", {"epsilon": 0}, "has epsilon 0; required: 1e-12 or more"),
])
def test_norms_that_are_refused(tmp_path, kind, settings, message):
    path = keras_file(tmp_path, CONVOLUTION, layer(kind, "n", **settings), weights=WEIGHTS | NORM)
    with pytest.raises(ConversionError, match=message):
        convert(path)


def test_the_factors_of_convnext_and_of_inception_resnet(tmp_path):
    """Layers of keras.applications, which .h5 files do not name the modules of."""
    gamma = numbers(3, seed=5)
    scaling = layer("LayerScale", "s", init_values=1e-6, projection_dim=3)
    plain = convert(keras_file(tmp_path)).graph
    x = numbers(2, 2, 6, 5)
    for entry in (scaling, scaling | {"module": "keras.src.applications.convnext"}):
        weights = WEIGHTS | {"layers/layer_scale/vars/0": gamma}
        scaled = convert(keras_file(tmp_path, CONVOLUTION, entry, weights=weights))
        np.testing.assert_allclose(scores(scaled.graph, x), scores(plain, x) * gamma, rtol=1e-5)
    config = copy.deepcopy(FUNCTIONAL)
    for module in (None, "keras.src.applications.inception_resnet_v2"):
        config["config"]["layers"][2] |= layer("CustomScaleLayer", "sum", scale=0.25) | {"module": module}
        graph = convert(keras_file(tmp_path, config=config)).graph
        np.testing.assert_allclose(scores(graph, x), scores(plain, x) * 1.25, rtol=1e-5)


@pytest.mark.parametrize(("entry", "message"), [
    (layer("LayerScale", "s", init_values=1, projection_dim=2), "a projection_dim of 2, and its input has 3 channels"),
    (layer("LayerScale", "s", init_values=1, projection_dim=3), "has no weights of its own"),
    (layer("LayerScale", "s", projection_dim=3) | {"module": "keras.layers"}, "of the module 'keras.layers'; required"),
    (layer("CustomScaleLayer", "s", scale=2), "has 1 inputs; required: 2"),
])
def test_factors_that_are_refused(tmp_path, entry, message):
    weights = WEIGHTS if "no weights" in message else WEIGHTS | {"layers/layer_scale/vars/0": numbers(3)}
    with pytest.raises(ConversionError, match=message):
        convert(keras_file(tmp_path, CONVOLUTION, entry, weights=weights))


@pytest.mark.parametrize("scale", [[1, 2, 4], {"class_name": "__numpy__", "config": {"value": [1, 2, 4],
                                                                                     "dtype": "float32"}}])
def test_rescaling_by_an_array(tmp_path, scale):
    scaled, _ = convert(keras_file(tmp_path, layer("Rescaling", "r", scale=scale, offset=0.5), shape=(6, 5, 3))).graph
    np.testing.assert_array_equal(scaled.weight.ravel(), [1, 2, 4])


@pytest.mark.parametrize(("groups", "is_taken"), [(1, True), (2, False), (None, True)])
def test_groups_where_there_are_none(tmp_path, groups, is_taken):
    weights = WEIGHTS | {"layers/depthwise_conv2d/vars/0": numbers(1, 1, 3, 1)}
    path = keras_file(tmp_path, CONVOLUTION,
                      layer("DepthwiseConv2D", "d", kernel_size=1, groups=groups, use_bias=False), weights=weights)
    if is_taken:
        assert convert(path).graph
    else:
        with pytest.raises(ConversionError, match="has groups 2, which is not supported; required: 1"):
            convert(path)


def test_gaps_in_the_numbers_of_groups(tmp_path):
    """Keras 2.12 skips numbers where it meets a layer twice."""
    second = layer("Conv2D", "conv2", filters=3, kernel_size=[1, 1], use_bias=False)
    weights = WEIGHTS | {"layers/conv2d_10/vars/0": numbers(1, 1, 3, 3)}
    graph = convert(keras_file(tmp_path, CONVOLUTION, second, weights=weights)).graph
    np.testing.assert_array_equal(graph.layers[2].weight, numbers(1, 1, 3, 3).transpose(3, 2, 0, 1))


@pytest.mark.parametrize("prefix", ["conv/conv", "conv/conv2d_7", "conv/some/scope/conv"])
@pytest.mark.parametrize("ending", ["", ":0", "_1:0"])
def test_legacy_names_of_weights(tmp_path, prefix, ending):
    weights = {f"{prefix}/kernel{ending}": numbers(2, 2, 2, 3), f"{prefix}/bias{ending}": numbers(3, seed=1)}
    graph = convert(legacy_file(tmp_path, weights)).graph
    np.testing.assert_array_equal(graph.layers[0].weight, numbers(2, 2, 2, 3).transpose(3, 2, 0, 1))
    np.testing.assert_array_equal(graph.layers[0].bias, numbers(3, seed=1))


def test_of_several_outputs_the_first_is_taken(tmp_path):
    entries = [layer("InputLayer", "x", batch_shape=[None, 6, 5, 2]) | {"inbound_nodes": []},
               CONVOLUTION | {"inbound_nodes": [[["x", 0, 0, {}]]]}, POOL
               | {"inbound_nodes": [[["conv", 0, 0, {"training": False}]]]},
               layer("ReLU", "other") | {"inbound_nodes": [[["conv", 0, 0, {}]]]}]
    config = {"class_name": "Functional", "config": {"name": "net", "layers": entries, "input_layers": [["x", 0, 0]],
                                                     "output_layers": [["pool", 0, 0], ["other", 0, 0]]}}
    assert [one.name for one in convert(keras_file(tmp_path, config=config)).graph] == ["conv", "conv/activation",
                                                                                        "pool"]


# ---- Refused ----


@pytest.mark.parametrize(("refused", "message"), [
    (layer("Lambda", "code", function={"class_name": "__lambda__", "config": {"code": "4wAAAA"}}),
     r"Lambda 'code' \(layer 3 of 4\) is of a class that is not supported; what works: .* never run"),
    (layer("Multiply", "se"), "Multiply 'se' .* reads tensors of .* required: two or more"),
    (layer("LSTM", "l"), r"LSTM 'l' \(layer 3 of 4\) .* supported: Activation, "),
    (layer("Conv2D", "mine") | {"module": "mylib.layers"}, "'mine' .* somebody's own"),
    (layer("mylib>Conv2D", "mine"), "'mine' .* somebody's own"),
    (layer("Dense", "mine") | {"registered_name": "mylib>Dense"}, "'mine' .* somebody's own"),
    (layer("Activation", "a", activation="softsign"), "activation 'softsign'; required: linear, relu"),
    (layer("Activation", "a", activation={"module": "mylib", "class_name": "function", "config": "relu"}),
     "of somebody's own"),
    (layer("Activation", "a", activation=3), "activation is a whole number '3'; required: a text"),
    (layer("ReLU", "r", threshold=1.0), "threshold 1; required: 0"),
    # settings that nothing reads
    (layer("ReLU", "r", slope=0.5), "ReLU 'r' .* has slope 0.5, which is not supported; required: none"),
    (layer("ReLU", "r", slope=0), "has slope 0, which is not supported"),
    (layer("LeakyReLU", "r", negative_slope=0.1, alpha=0.2), "has alpha 0.2, which is not supported"),
    (layer("MaxPooling2D", "p", dilation_rate=2), "has dilation_rate 2, which is not supported; required: none"),
    (layer("ZeroPadding2D", "p", value=1.0), "has value 1.0, which is not supported; required: none"),
    (layer("GlobalMaxPooling2D", "p", keepdims=True, axis=1), "has axis 1, which is not supported"),
    (layer("Softmax", "s", dtype="float32", temperature=2), "has temperature 2, which is not supported"),
    (layer("Activation", "a", activation={"module": "keras.layers", "class_name": "ReLU", "config": {"shift": 1}}),
     "has shift 1, which is not supported"),
    (layer("LeakyReLU", "r", alpha=2.0), "slope 2; required: 0 to 1"),
    (layer("Dense", "d", units=2, dtype={"class_name": "QuantizedDTypePolicy",
                                         "config": {"name": "int8_from_float32"}}), "computes in"),
    (layer("Dense", "d", units=2, quantization_config={}), "is quantized"),
    (layer("Dense", "d", units=0), "units 0; required: a whole number from 1"),
    (layer("Dense", "d", units="two"), "units is a text 'two'; required: a whole number"),
    (layer("Dense", "d"), "units is null; required: a whole number"),
    (layer("Dense", "d", units=2), "has no weights of its own"),
    (layer("MaxPooling2D", "p", data_format="channels_middle"), "'channels_middle'; required: channels_first or"),
    (layer("MaxPooling2D", "p", padding="causal"), "padding 'causal'; required: 'valid' or 'same'"),
    (layer("MaxPooling2D", "p", pool_size=[2, 2, 2]), "pool_size .*required: 2 whole numbers"),
    (layer("MaxPooling1D", "p"), "4 axes, the batch included; required: 3"),
    (layer("UpSampling2D", "u", interpolation="bicubic"), "interpolation 'bicubic'; required: nearest or bilinear"),
    (layer("UpSampling2D", "u", interpolation="bilinear", size=[2**15, 2**15]), "at most 268435456 are accepted"),
    (layer("UpSampling2D", "u", size=[2**15, 2**15]), "at most 268435456 are accepted"),
    (layer("ZeroPadding2D", "z", padding=[[2**30, 0], [0, 0]]), r"ZeroPadding2D 'z' .*at most 268435456 are accepted"),
    (layer("ZeroPadding2D", "z", padding=[1, "1"]), "padding is a text '1'; required: a list"),
    (layer("Cropping2D", "c", cropping=[[3, 3], [0, 0]]), "leaves nothing of a tensor"),
    (layer("Reshape", "s", target_shape=[7, -1]), "makes .1, 7, -1. of .N, 5, 4, 3.; required: a shape of as many"),
    (layer("Reshape", "s", target_shape=[2, 5, 3, 2]), "reads a tensor of 5 axes, the batch included; required: 4"),
    (layer("Permute", "s", dims=[1, 2, 2]), "has the order .0, 1, 2, 2. for 4 axes"),
    (layer("Concatenate", "c"), "required: two or more"),
    (layer("Normalization", "n", mean=[1, 2, 3], variance=[1, 2]), "3 means and 2 variances"),
    (layer("Normalization", "n", axis=2, mean=[1], variance=[1]), "axis 2 over 4 axes; required: -1 or 1"),
    (layer("Rescaling", "n", scale=[1, 2], offset=0), "a constant of shape .1, 2, 1, 1. for a tensor"),
    (layer("Rescaling", "n", scale=float("inf"), offset=0), "scale inf; required: a finite number"),
    (layer("Softmax", "s"), "softmax 's' is not the last layer"),
    (layer("Embedding", "s"), "what works: a model that begins after it"),
    (layer("Conv2DTranspose", "t", filters=2, kernel_size=3, strides=2, output_padding=2),
     "output_padding less than the stride"),
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


# ---- Operations: functions of Keras 3 in a functional model ----

X = tensor("x")
REST = {"class_name": "__ellipsis__", "config": {}}


def part(start, stop, step=None):
    return {"class_name": "__slice__", "config": {"start": start, "stop": stop, "step": step}}


def array(value, kind="__tensor__", dtype="float32"):
    return {"class_name": kind, "config": {"value": np.asarray(value).tolist(), "dtype": dtype}}


MEAN = np.array([103.939, 116.779, 123.68])
IMAGES = np.random.default_rng(3).uniform(0, 255, (2, 6, 5, 3)).astype(np.float32)


@pytest.mark.parametrize(("operations", "expected"), [
    ([operation("TrueDivide", "a", X, 127.5), operation("Subtract", "b", tensor("a"), 1.0)], IMAGES / 127.5 - 1),
    ([operation("Subtract", "a", 1, X)], 1 - IMAGES), ([operation("Negative", "a", X)], -IMAGES),
    ([operation("Multiply", "a", 0.5, X), operation("Add", "b", 3, tensor("a"))], 0.5 * IMAGES + 3),
    ([operation("Divide", "a", X, array([1, 2, 4], "__numpy__"))], IMAGES / [1, 2, 4]),
    ([operation("Multiply", "a", X, array(IMAGES[:1] + 1))], IMAGES * (IMAGES[:1] + 1)),
    ([operation("Add", "a", X, X)], 2 * IMAGES),
    ([operation("Multiply", "h", X, 2.0), operation("Subtract", "a", tensor("h"), X)], IMAGES),
    # keras.applications' preprocess_input, in its modes "tf", "torch" and "caffe"
    ([operation("TrueDivide", "a", X, 255.0), operation("Add", "b", tensor("a"), array([[[[-0.485, -0.456, -0.406]]]])),
      operation("TrueDivide", "c", tensor("b"), array([0.229, 0.224, 0.225]))],
     (IMAGES / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]),
    ([*(operation("GetItem", f"i{i}", X, [REST, i]) for i in (2, 1, 0)),
      operation("Stack", "s", [tensor("i2"), tensor("i1"), tensor("i0")], axis=-1),
      operation("Add", "a", tensor("s"), array(-MEAN.reshape(1, 1, 1, 3)))], IMAGES[..., ::-1] - MEAN),
    ([operation("GetItem", "a", X, [REST, part(None, None, -1)]), operation("Subtract", "b", tensor("a"), array(MEAN))],
     IMAGES[..., ::-1] - MEAN),
    # slices
    ([operation("GetItem", "a", X, [part(None, None), part(1, 5, 2), part(-2, None), REST])], IMAGES[:, 1:5:2, -2:]),
    ([operation("GetItem", "a", X, part(None, None))], IMAGES),
    ([operation("GetItem", "a", X, [REST, 1, None])], IMAGES[..., 1, None]),
    ([operation("GetItem", "a", X, [part(None, None), -1, None])], IMAGES[:, -1, None]),
])
def test_operations(tmp_path, operations, expected):
    graph = convert(keras_file(tmp_path, config=functional(*operations))).graph
    found = scores(graph, np.ascontiguousarray(IMAGES.transpose(0, 3, 1, 2)))
    np.testing.assert_allclose(found, expected.mean((1, 2)), rtol=1e-5, atol=1e-4)


def test_arithmetic_with_constants_is_one_layer(tmp_path):
    operations = [operation("TrueDivide", "a", X, 127.5), operation("Subtract", "b", tensor("a"), 1.0)]
    scale, _ = convert(keras_file(tmp_path, config=functional(*operations))).graph
    np.testing.assert_allclose(scale.weight.ravel(), [1 / 127.5] * 3, rtol=1e-6)
    np.testing.assert_array_equal(scale.bias, [-1] * 3)


@pytest.mark.parametrize(("refused", "message"), [
    (operation("TrueDivide", "a", 1.0, X), "TrueDivide 'a' .*divides by what is computed"),
    (operation("TrueDivide", "a", X, 0), "by zero"),
    (operation("Subtract", "a", X), "has 1 inputs; required: two"),
    (operation("Subtract", "a", X, "much"), "is called on much; required: a tensor, a number or an array of numbers"),
    (operation("Subtract", "a", X, True), "is called on True; required"),
    (operation("Subtract", "a", X, {"class_name": "__numpy__", "config": {"value": [[1, 2], [3]]}}),
     "required: a tensor, a number or an array"),
    (operation("Add", "a", X, array([1, 2])), r"has a constant of shape \(2,\) for a tensor \(N, 6, 5, 3\)"),
    (operation("Add", "a", tensor("x", "uint8"), 200), "computes with whole numbers.*Divide them first"),
    (operation("Add", "a", tensor("x", "uint8"), array([200], dtype="uint8")), "computes with whole numbers"),
    (operation("GetItem", "a", X, [0]), r"works along axis 0 of \(N, 6, 5, 3\), the batch"),
    (operation("GetItem", "a", X, [part(1, None)]), "takes a part of the batch"),
    (operation("GetItem", "a", X, [REST, 3]), "takes elements 3 to 3 of an axis of length 3"),
    (operation("GetItem", "a", X, [REST, REST]), "or two ellipses"),
    (operation("GetItem", "a", X, [1] * 5), "has an index of 5 axes"),
    (operation("GetItem", "a", X, [REST, part(0, 3, 0)]), "has a step of 0"),
    (operation("GetItem", "a", X, [REST, part(2, 1)]), "leaves nothing"),
    (operation("GetItem", "a", X, [REST, "1"]), "index is a text '1'; required: a whole number"),
    (operation("GetItem", "a", X, X), "is not called on a tensor and an index"),
    (operation("Stack", "a", X, axis=1), "two or more of one number of axes"),
    (operation("ReLU", "a", X, 0.5), "is called on a constant; required: nothing but tensors"),
    (operation("Maximum", "a", X, 0.5), "Maximum 'a' .* is of a class that is not supported"),
    (operation("Sqrt", "a", X), "Sqrt 'a' .* supported: Activation, "),
])
def test_refused_operations(tmp_path, refused, message):
    with pytest.raises(ConversionError, match=message):
        convert(keras_file(tmp_path, config=functional(refused)))


def test_functions_of_keras_2(tmp_path):
    """Their constants are no reason, they are."""
    entries = [layer("InputLayer", "x", batch_shape=[None, 6, 5, 2]) | {"inbound_nodes": []},
               layer("TFOpLambda", "tf.math.truediv", function="math.truediv")
               | {"inbound_nodes": [["x", 0, 0, {"y": 127.5, "name": None}]]},
               POOL | {"inbound_nodes": [[["tf.math.truediv", 0, 0, {}]]]}]
    config = {"class_name": "Functional", "config": {"name": "net", "layers": entries, "input_layers": [["x", 0, 0]],
                                                     "output_layers": [["pool", 0, 0]]}}
    with pytest.raises(ConversionError, match="is of a class that is not supported; what works: layers in place of"):
        convert(keras_file(tmp_path, config=config))


# ---- Verifying ----


def fake_keras(monkeypatch, load_model):
    monkeypatch.setitem(sys.modules, "keras", SimpleNamespace(__version__="3", models=SimpleNamespace(
        load_model=load_model)))


@pytest.mark.parametrize(("factor", "message"), [
    (1.0, None), (1.0005, None),
    (1.25, r"output \d is (-?\d\.\d+), and Keras 3 gives (-?\d\.\d+); required: a difference of at most"),
    (np.nan, None)])
def test_scores_are_compared_with_keras(tmp_path, monkeypatch, factor, message):
    """With a Keras that gives what is expected of it, the converted network's own scores, or others."""
    path = keras_file(tmp_path)
    model, calls = convert(path, verify=False), []

    def predict(pictures, verbose):
        calls.append(pictures.shape)
        return Explainer(model)(np.ascontiguousarray(pictures.transpose(0, 3, 1, 2))).output * np.float32(factor)

    def load_model(copy, compile):
        assert Path(copy).read_bytes() == path.read_bytes()
        assert copy != str(path)  # what was read, whatever has become of the file
        return SimpleNamespace(predict=predict)

    fake_keras(monkeypatch, load_model)
    if message is None:
        assert convert(path).provenance.get("verified") == (None if np.isnan(factor) else "Keras 3")
    else:
        with pytest.raises(ConversionError, match=message):
            convert(path)
    assert calls == [(1, 6, 5, 2)] * 2


def test_keras_loads_nothing_that_conversion_refuses(tmp_path, monkeypatch):
    loaded = []
    fake_keras(monkeypatch, lambda *arguments, **options: loaded.append(arguments))
    with pytest.raises(ConversionError, match="never run"):
        convert(keras_file(tmp_path, layer("Lambda", "code")), verify=True)
    assert not loaded


def test_what_keras_cannot_run(tmp_path, monkeypatch, caplog):
    def load_model(path, compile):
        raise TypeError("no such layer")

    path = keras_file(tmp_path)
    fake_keras(monkeypatch, load_model)
    with pytest.raises(ConversionError, match="cannot be compared with its source's: Keras 3 cannot run it: no such"):
        convert(path, verify=True)
    assert "verified" not in convert(path).provenance
    assert "compared with nothing: Keras 3 cannot run it: no such layer" in caplog.text


def test_without_keras(tmp_path, monkeypatch, caplog):
    path = keras_file(tmp_path)
    monkeypatch.setitem(sys.modules, "keras", None)
    assert "verified" not in convert(path).provenance
    assert "compared with nothing" in caplog.text
    assert "pip install keras" in caplog.text
    with pytest.raises(ConversionError, match="pip install keras"):
        convert(path, verify=True)


def test_a_sigmoid_at_the_end(tmp_path):
    """It is left out there, and a layer elsewhere: of a convolution before a pool, say."""
    inside = convert(keras_file(tmp_path, layer("Conv2D", "conv", filters=3, kernel_size=[2, 2], activation="sigmoid")))
    assert [layer.name for layer in inside.graph][:2] == ["conv", "conv/activation"]
    config = {"class_name": "Sequential", "config": {"name": "net", "layers": [
        layer("InputLayer", "x", batch_shape=[None, 4]), layer("Dense", "scores", units=1, activation="sigmoid")]}}
    weights = {"layers/dense/vars/0": numbers(4, 1), "layers/dense/vars/1": numbers(1)}
    assert [layer.name for layer in convert(keras_file(tmp_path, weights=weights, config=config)).graph] == ["scores"]
