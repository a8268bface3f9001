"""Caffe: every layer type becomes the layer it should, and whatever else is refused with its name."""

import contextlib
import dataclasses

import naive
import numpy as np
import pytest
from importing import caffemodel, damaged, numbers, same

from fastdtd import graph as g
from fastdtd.errors import ConversionError, FastDTDError
from fastdtd.explainer import Explainer
from fastdtd.importers import convert

pytest.importorskip("google.protobuf")
from fastdtd.importers import caffe  # after importorskip

INPUT = 'input: "x" input_shape { dim: 10 dim: 3 dim: 9 dim: 8 } '


@pytest.fixture
def convert_text(tmp_path):
    """convert() of a .prototxt with the text given, and a .caffemodel with the weights given."""
    def convert_text(text, weights=None, old=False, head=INPUT, **options):
        (tmp_path / "net.prototxt").write_text(head + text)
        (tmp_path / "net.caffemodel").write_bytes(caffemodel(weights or {"unused": [numbers(1)]}, old))
        return convert(tmp_path / "net.prototxt", tmp_path / "net.caffemodel", **options)

    return convert_text


def layer(name, kind, bottom="x", top=None, more=""):
    bottoms = " ".join(f'bottom: "{name}"' for name in bottom.split())
    return f'layer {{ name: "{name}" type: "{kind}" {bottoms} top: "{top or name}" {more} }}\n'


GLOBAL = layer("pool", "Pooling", "t", "pool", "pooling_param { pool: AVE global_pooling: true }")


@pytest.mark.parametrize(("parameters", "kernel", "expected"), [
    ("kernel_size: 3", (3, 3), ((1, 1), (0, 0, 0, 0), (1, 1))),
    ("kernel_h: 2 kernel_w: 3 pad_h: 1 pad_w: 2 stride_h: 2 stride_w: 3", (2, 3), ((2, 3), (1, 2, 1, 2), (1, 1))),
    ("kernel_size: 2 kernel_size: 3 pad: 1 pad: 2 stride: 2 stride: 3 dilation: 1 dilation: 2", (2, 3),
     ((2, 3), (1, 2, 1, 2), (1, 2))),
    ("kernel_size: 3 pad: 1 stride: 2 dilation: 2", (3, 3), ((2, 2), (1, 1, 1, 1), (2, 2))),
])
@pytest.mark.parametrize("bias", [True, False])
def test_caffe_convolution(convert_text, parameters, kernel, expected, bias):
    weights = [numbers(6, 1, *kernel)] + [numbers(6, seed=1)] * bias
    conv, _ = convert_text(layer("c", "Convolution", "x", "t",
                                 f"convolution_param {{ num_output: 6 group: 3 {parameters} "
                                                               f"bias_term: {str(bias).lower()} }}") + GLOBAL,
                                                               {"c": weights}).graph
    assert ((conv.stride, conv.padding, conv.dilation), conv.groups) == (expected, 3)
    same(conv.weight, weights[0])
    same(conv.bias, weights[1] if bias else None)


def test_a_text_that_would_take_long(convert_text):
    with pytest.raises(ConversionError, match="at most 2097152 are accepted"):
        convert_text("input_dim:[1,1,1,1]" * 2**17)


def test_caffe_leaky_relu(convert_text):
    leaky, _ = convert_text(layer("r", "ReLU", "x", "t", "relu_param { negative_slope: 0.125 }") + GLOBAL, {}).graph
    assert (type(leaky), leaky.slope) == (g.LeakyReLU, 0.125)


@pytest.mark.parametrize(("parameters", "kernel", "stride", "pad", "dilation"), [
    ("kernel_size: 2 stride: 2", (2, 2), (2, 2), (0, 0), (1, 1)), ("kernel_size: 3", (3, 3), (1, 1), (0, 0), (1, 1)),
    ("kernel_h: 4 kernel_w: 3 stride_h: 3 stride_w: 2 pad_h: 2 pad_w: 1 dilation: 2", (4, 3), (3, 2), (2, 1), (2, 2)),
])
def test_caffe_deconvolution(convert_text, parameters, kernel, stride, pad, dilation):
    """Each number of the input adds the kernel, times itself, to the output."""
    weight, bias = numbers(3, 2, *kernel), numbers(6, seed=1)
    graph = convert_text(layer("d", "Deconvolution", "x", "t",
                               f"convolution_param {{ num_output: 6 group: 3 {parameters} }}") + GLOBAL,
                         {"d": [weight.reshape(3, 2, *kernel), bias]}).graph
    picture = numbers(3, 9, 8, seed=2)
    sizes = [(n - 1) * stride[i] + dilation[i] * (kernel[i] - 1) + 1 for i, n in enumerate(picture.shape[1:])]
    expected = np.zeros((6, *sizes))
    for c, y, x, k, i, j in np.ndindex(3, 9, 8, 2, *kernel):
        expected[2 * c + k, y * stride[0] + i * dilation[0], x * stride[1] + j * dilation[1]] += weight[c, k, i,
                                                                                                        j] * picture[c,
                                                                                                                     y,
                                                                                                                     x]
    expected = expected[:, pad[0]:sizes[0] - pad[0], pad[1]:sizes[1] - pad[1]] + bias[:, None, None]
    assert graph.shapes["d"] == expected.shape
    np.testing.assert_allclose(naive.forward(graph, picture)["d"].reshape(expected.shape), expected, atol=1e-5)


@pytest.mark.parametrize("transpose", [False, True])
def test_caffe_inner_product_is_flattened_for(convert_text, transpose):
    weight = numbers(2, 216)
    text = layer("d", "InnerProduct", more=f"inner_product_param {{ num_output: 2 bias_term: false transpose: "
                                           f"{str(transpose).lower()} }}")
    flatten, dense = convert_text(text, {"d": [weight.T if transpose else weight]}).graph
    assert (flatten.name, dense.name) == ("d/flatten", "d")
    same(dense.weight, weight)


@pytest.mark.parametrize(("parameters", "expected"), [
    ("kernel_size: 3 stride: 2", g.MaxPool2d("p", ("input",), (3, 3), (2, 2), ceil_mode=True)),
    ("pool: MAX kernel_size: 3 stride: 2 round_mode: FLOOR", g.MaxPool2d("p", ("input",), (3, 3), (2, 2))),
    ("pool: AVE kernel_h: 3 kernel_w: 2 pad_h: 1 pad_w: 0",
     g.AveragePool2d("p", ("input",), (3, 2), (1, 1), (1, 0, 1, 0), ceil_mode=True, count_include_pad=True)),
    ("pool: AVE kernel_size: 3 pad: 1 stride_h: 2 stride_w: 3",
     g.AveragePool2d("p", ("input",), (3, 3), (2, 3), (1, 1, 1, 1), ceil_mode=True, count_include_pad=True)),
    ("pool: AVE global_pooling: true", g.GlobalAveragePool("p", ("input",))),
    ("pool: MAX global_pooling: true", g.MaxPool2d("p", ("input",), (9, 8))),
])
def test_caffe_pools(convert_text, parameters, expected):
    pool, *_ = convert_text(layer("p", "Pooling", "x", "t", f"pooling_param {{ {parameters} }}") + GLOBAL).graph
    assert type(pool) is type(expected)
    assert dataclasses.astuple(pool) == dataclasses.astuple(expected)


def test_caffe_joins_and_layers_in_place(convert_text):
    text = (layer("r", "ReLU", "x", "x") + layer("s", "Split", "x", 'a" top: "b') + layer("e", "Eltwise", "x a b")
            + layer("d", "Dropout", "e", "e") + layer("r2", "ReLU", "e", "e")
            + layer("k", "Concat", "e a", "t", "concat_param { concat_dim: 1 }") + GLOBAL
            + layer("f", "Flatten", "pool") + layer("prob", "Softmax", "f") + layer("accuracy", "Accuracy", "f label"))
    graph = convert_text(text).graph
    assert [(type(layer), layer.name, layer.inputs) for layer in graph] == [
        (g.ReLU, "r", ("input",)), (g.Add, "e/1", ("r", "r")), (g.Add, "e", ("e/1", "r")), (g.ReLU, "r2", ("e",)),
        (g.Concat, "k", ("r2", "r")), (g.GlobalAveragePool, "pool", ("k",))]


@pytest.mark.parametrize("end", ["Softmax", "Sigmoid"])
def test_caffe_probabilities(convert_text, end):
    """Left out at the end, in place or not; elsewhere a sigmoid is a layer, and a softmax refused."""
    for top in ("pool", "prob"):
        assert [layer.name for layer in convert_text(layer("r", "ReLU", "x", "t") + GLOBAL
                                                     + layer("prob", end, "pool", top)).graph] == ["r", "pool"]
    inside = layer("prob", end, "x", "t") + GLOBAL
    if end == "Sigmoid":
        assert [layer.name for layer in convert_text(inside).graph] == ["prob", "pool"]
        return
    with pytest.raises(ConversionError, match="softmax 'prob' is not the last layer"):
        convert_text(inside)


X = numbers(3, 9, 8, seed=2)


def made(graph):
    """What a network makes of X before its pool."""
    name = graph.layers[-1].inputs[0]
    return naive.forward(graph, X)[name].reshape(graph.shapes[name])


@pytest.mark.parametrize("is_shared", [False, True])
def test_caffe_prelu(convert_text, is_shared):
    slope = np.float32(0.25) if is_shared else np.float32([0.5, 0, 2])
    more = f"prelu_param {{ channel_shared: {str(is_shared).lower()} filler {{ value: 0.1 }} }}"
    graph = convert_text(layer("p", "PReLU", "x", "t", more) + GLOBAL, {"p": [np.asarray(slope)]}).graph
    np.testing.assert_allclose(made(graph), np.where(X > 0, X, X * slope.reshape(-1, 1, 1)), rtol=1e-6)


@pytest.mark.parametrize(("text", "expected"), [
    (layer("f", "ELU", "x", "t", "elu_param { alpha: 0.5 }"), np.where(X > 0, X, 0.5 * np.expm1(X))),
    (layer("f", "ELU", "x", "t"), np.where(X > 0, X, np.expm1(X))), (layer("f", "TanH", "x", "t"), np.tanh(X)),
    (layer("f", "Sigmoid", "x", "t"), 1 / (1 + np.exp(-X))),
    (layer("s", "Sigmoid", "x", "s") + layer("f", "Eltwise", "x s", "t", "eltwise_param { operation: PROD }"),
     X / (1 + np.exp(-X))),
    (layer("r", "ReLU", "x", "r") + layer("h", "TanH", "x", "h") + layer("s", "Sigmoid", "h", "s")
     + layer("f", "Eltwise", "s r", "t", "eltwise_param { operation: PROD }"),
     np.maximum(X, 0) / (1 + np.exp(-np.tanh(X))))])
def test_caffe_activations_and_gates(convert_text, text, expected):
    np.testing.assert_allclose(made(convert_text(text + GLOBAL).graph), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("parameters", "expected"), [
    ("power: 2 scale: 0.5 shift: 1", (1 + 0.5 * X)**2), ("scale: 0.5", X / 2), ("shift: -3", X - 3), ("power: 2", X**2),
    ("", X)])
def test_caffe_power(convert_text, parameters, expected):
    text = layer("p", "Power", "x", "t", f"power_param {{ {parameters} }}") + layer("r", "ReLU", "t", "t") + GLOBAL
    np.testing.assert_allclose(made(convert_text(text).graph), np.maximum(expected, 0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("text", "expected"), [
    (layer("p", "Permute", "x", "t", "permute_param { order: 0 order: 2 }"), X.transpose(1, 0, 2)),
    (layer("p", "Permute", "x", "t", "permute_param { order: [0, 3, 1, 2] }"), X.transpose(2, 0, 1)),
    (layer("s", "Reshape", "x", "t", "reshape_param { shape { dim: 0 dim: -1 dim: 3 dim: 6 } }"),
     X.reshape(12, 3, 6)),
    (layer("s", "Reshape", "x", "t", "reshape_param { shape { dim: 10 dim: 9 dim: 0 dim: 3 } }"), None),
    (layer("s", "Reshape", "x", "t", "reshape_param { shape { dim: 10 dim: 8 dim: 0 dim: 3 } }"), X.reshape(8, 9, 3)),
    (layer("s", "Reshape", "x", "t", "reshape_param { shape { dim: 3 dim: 0 dim: 1 } axis: 1 num_axes: 1 } "), None),
    (layer("s", "Reshape", "x", "t", "reshape_param { shape { dim: 9 dim: 24 dim: -1 } axis: -4 }"),
     X.reshape(9, 24, 1)),
    (layer("s", "Reshape", "x", "t", "reshape_param { shape { dim: 27 dim: 1 } axis: 1 num_axes: 2 }"),
     X.reshape(27, 1, 8)),
    (layer("s", "Slice", "x", 'a" top: "b', "slice_param { axis: 2 slice_point: 2 }")
     + layer("k", "Concat", "b a", "t", "concat_param { axis: 1 }"), None),
    (layer("s", "Slice", "x", 'a" top: "b" top: "c', "") + layer("k", "Concat", "c a b", "t"), X[[2, 0, 1]]),
    (layer("s", "Slice", "x", 'a" top: "b', "slice_param { slice_dim: 1 slice_point: 1 }")
     + layer("k", "Concat", "b a", "t"), X[[1, 2, 0]]),
    (layer("s", "Slice", "x", 'a" top: "b', "slice_param { axis: 3 }") + layer("k", "Eltwise", "a b", "t"),
     X[..., :4] + X[..., 4:]),
])
def test_caffe_moves(convert_text, text, expected):
    if expected is None:
        with pytest.raises(ConversionError, match=r"required: (a shape of as many|axes that|tensors that differ)"):
            convert_text(text + GLOBAL)
        return
    graph = convert_text(text + layer("r", "ReLU", "t", "r") + GLOBAL.replace('"t"', '"r"')).graph
    np.testing.assert_allclose(made(graph), np.maximum(expected, 0), rtol=1e-6)


def test_caffe_moves_in_the_older_layout(convert_text):
    text = ('layers { name: "s" type: SLICE bottom: "x" top: "a" top: "b" top: "c" }'
            'layers { name: "p" type: POWER bottom: "b" top: "p" power_param { scale: 3 } }'
            'layers { name: "k" type: CONCAT bottom: "c" bottom: "a" bottom: "p" top: "t" }'
            'layers { name: "r" type: RELU bottom: "t" top: "t" }'
            'layers { name: "g" type: POOLING bottom: "t" top: "g" pooling_param { pool: AVE global_pooling: true } }')
    np.testing.assert_allclose(made(convert_text(text).graph), np.maximum(X[[2, 0, 1]] * [[[1]], [[1]], [[3]]], 0),
                               rtol=1e-6)


@pytest.mark.parametrize("text", [
    layer("r", "ReLU", "x", "t", 'relu_param { engine: CUDNN } param { lr_mult: 1 name: "a{" } # relu { six: 6 }\n'),
    'layer: [ { name: "r" type: "ReLU" bottom: "x" top: "t" loss_weight: 0 }, '
    '{ name: "d" type: "Dropout" bottom: "t" top: "t" dropout_param { dropout_ratio: 0.5 } } ]\n',
    layer("r", "ReLU", "x", "t", "include < phase: TEST >")
     + layer("a", "Accuracy", "t l", "a", "accuracy_param { k: 1 }")
    + layer("s", "SoftmaxWithLoss", "t l", "s", "loss_param { valid: false } softmax_loss { a: 1 }"),
    layer("r", "ReLU", "x", "t", "propagate_down: false") + layer("e", "Data", "", "e", "include { phase: TRAIN } "
                                                                  "data_param { source: 'x' batch_size: 3 }"),
    "force_backward: true state { phase: TEST } " + layer("r", "ReLU", "x", "t", "phase: TEST"),
])
def test_caffe_fields_that_change_nothing(convert_text, text):
    assert [layer.name for layer in convert_text(text + GLOBAL).graph] == ["r", "pool"]


@pytest.mark.parametrize(("text", "message"), [
    (layer("r", "ReLU", "x", "t", "relu_param { max_value: 6 }"),
     "layer 'r' .* has relu_param.max_value, which is not"),
    (layer("r", "ReLU", "x", "t", "relu6_param { a { b: 6 } }"),
     "layer 'r' .* has relu6_param, which is not supported"),
    (layer("a", "ReLU", "x", "s") + layer("r", "ReLU", "s", "t", "relu_param: { name: 'a' }"),
     "layer 'r' .*relu_param.name"),
    ('layer: [{ name: "a" type: "ReLU" bottom: "x" top: "s" }, '
     '{ name: "r" type: "ReLU" bottom: "s" top: "t" slope: 1 }]',
     "layer 'r' .* has slope, which is not supported"),
    ('layers { name: "r" type: RELU bottom: "x" top: "t" relu_param { slope: 1 } }',
     "layer 'r' .* has relu_param.slope"),
    (layer("d", "Dropout", "x", "t", "dropout_param { scale_train: false }"), "dropout_param.scale_train"),
    (layer("r", "ReLU", "x", "t", "relu_param # {\n { slope # '\n : 1 }"), "relu_param.slope"),
    (layer("p", "Pooling", "x", "t", "pooling_param { kernel_size: 2 ceil_mode: false }"), "pooling_param.ceil_mode"),
    (layer("p", "Pooling", "x", "t", "pooling_param { global_pooling: true kernel_size: 2 }"),
     "global and has a kernel"),
    (layer("p", "Pooling", "x", "t", "pooling_param { global_pooling: true pad: 1 }"), "global and has a kernel"),
    (layer("p", "Pooling", "x", "t", "pooling_param { kernel_size: 2 kernel_h: 3 kernel_w: 3 }"),
     "has kernel_size and kernel_h or kernel_w; required: one of them"),
    (layer("k", "Concat", "x x", "t", "concat_param { axis: 1 concat_dim: 1 }"), "axis and concat_dim"),
    (layer("s", "Slice", "x", 't" top: "b', "slice_param { axis: 1 slice_dim: 1 slice_point: 1 }"),
     "axis and slice_dim"),
    (layer("s", "Slice", "x", 't" top: "b', "slice_param { slice_point: 1 }"), "has a top 'b' that nothing reads"),
    (layer("s", "Slice", "x", 't" top: "b', ""), "slice points .. for 2 tops and a length of 3"),
    (layer("s", "Slice", "x", 't" top: "b', "slice_param { slice_point: 1 slice_point: 2 }"), "one less than tops"),
    (layer("s", "Slice", "x", 't" top: "b', "slice_param { slice_point: 3 }"), "required: sizes from 1 that add up"),
    (layer("n", "BatchNorm", "x", "t", "batch_norm_param { fused_relu: true }"), "batch_norm_param.fused_relu"),
    (layer("p", "Permute", "x", "t", "permute_param { order: 1 }"), "moves the batch"),
    (layer("p", "Permute", "x", "t", "permute_param { order: 0 order: 0 }"), "has the order"),
    (layer("p", "Power", "x", "t", "power_param { power: 0.5 }"), "raises to 0.5 what can be negative"),
    (layer("r", "ReLU", "x", "t", "phase: TRAIN"), "has phase TRAIN"),
    ("state { stage: 'deploy' } " + layer("r", "ReLU", "x", "t"),
     "has a state, phase TEST, level 0 and stages .'deploy'."),
])
def test_caffe_fields_that_would_not_be_read(convert_text, text, message):
    with pytest.raises(ConversionError, match=message):
        convert_text(text + GLOBAL)


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("weight_of_sums", [0.0, 4.0])
def test_caffe_batch_norm_and_scale_are_folded(convert_text, old, weight_of_sums):
    weight, bias, mean, gamma, beta = numbers(4, 3, 1, 1), *(numbers(4, seed=i) for i in range(1, 5))
    variance = np.abs(numbers(4, seed=5))
    text = (layer("c", "Convolution", "x", "c", "convolution_param { num_output: 4 kernel_size: 1 }")
            + layer("n", "BatchNorm", "c", "c", "batch_norm_param { eps: 0.125 }")
            + layer("s", "Scale", "c", "t", "scale_param { bias_term: true }") + GLOBAL)
    conv, _ = convert_text(text, {"c": [weight, bias], "n": [mean, variance, np.float32([weight_of_sums])],
                                  "s": [gamma, beta]}, old).graph
    factor = 1 / weight_of_sums if weight_of_sums else 0
    scale = gamma / np.sqrt(variance * factor + 0.125)
    np.testing.assert_allclose(conv.weight, weight * scale[:, None, None, None], rtol=1e-5)
    np.testing.assert_allclose(conv.bias, (bias - mean * factor) * scale + beta, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("head", [
    'input: "x" input_dim: 1 input_dim: 3 input_dim: 9 input_dim: 8 ', INPUT,
    layer("in", "Input", "", "x", "input_param { shape { dim: 1 dim: 3 dim: 9 dim: 8 } }"),
])
def test_caffe_inputs(convert_text, head):
    text = layer("r", "ReLU", "x", "t") + GLOBAL
    assert convert_text(text, head=head).graph.input_shape == (3, 9, 8)
    assert convert_text(text, head=head, size=(4, 5)).graph.input_shape == (3, 4, 5)


def test_caffe_flat_input(convert_text):
    model = convert_text(layer("d", "InnerProduct", more="inner_product_param { num_output: 2 bias_term: false }"),
                         {"d": [numbers(2, 3)]},
                         head='input: "x" input_shape { dim: 1 dim: 3 } ')
    assert [type(layer) for layer in model.graph] == [g.Dense]
    assert model.preprocessing.color is None


@pytest.mark.parametrize(("rule", "is_in"), [
    ("include { phase: TRAIN }", False), ("include { phase: TEST }", True), ("exclude { phase: TEST }", False),
    ("exclude { phase: TRAIN }", True), ('include { stage: "a" }', False), ("include { min_level: 1 }", False),
    ("include { max_level: 0 }", True), ("include { phase: TRAIN } include { phase: TEST }", True),
])
def test_caffe_layers_for_the_test_phase(convert_text, rule, is_in):
    graph = convert_text(layer("r", "ReLU", "x", "x", rule) + GLOBAL.replace('"t"', '"x"')).graph
    assert len(graph.layers) == 1 + is_in


def test_caffe_weights_in_double_precision_and_pieces(tmp_path):
    weight = numbers(2, 3)
    net = caffe.NetParameter()
    for name, field, data in (("d", "double_data", weight.astype("<f8")), ("e", "data", weight[:, :2].astype("<f4"))):
        blob = net.layer.add(name=name).blobs.add()
        blob.shape.dim.extend(data.shape)
        content = data.tobytes()
        getattr(blob, field).extend([content[:8], content[8:]])
    parameters = "inner_product_param { num_output: 2 bias_term: false }"
    text = ('input: "x" input_shape { dim: 1 dim: 3 } ' + layer("d", "InnerProduct", more=parameters)
            + layer("e", "InnerProduct", "d", more=parameters))
    (first, second), shape, file_format, *_ = caffe.parse(text.encode(), net.SerializeToString())
    same(first.weight, weight)
    same(second.weight, weight[:, :2])
    assert (shape, file_format) == ((3, 1, 1), "caffe")


CONV = "convolution_param { num_output: 4 kernel_size: 2 }"


@pytest.mark.parametrize(("text", "weights", "message"), [
    (layer("l", "BNLL"), {},
     r"net\.prototxt: layer 'l' of type BNLL \(number 1 of 1, reads 'x'\) is not supported; supported: BatchNorm, "
     r".*TanH$"),
    ('layers { name: "s" type: BNLL bottom: "x" top: "s" }', {}, "layer 's' of type BNLL .* is not supported"),
    ('layers { layer { name: "r" type: "relu" } bottom: "x" top: "s" }', {}, "Caffe's first version"),
    (layer("d", "Data", "x"), {}, "source of training data"),
    (layer("c", "Convolution", more=CONV), {}, "has 0 blobs of weights in the .caffemodel; required: 2"),
    (layer("c", "Convolution", more=CONV), {"c": [numbers(4, 3, 2, 3), numbers(4)]},
     r"weights of shape \(4, 3, 2, 3\)"),
    (layer("c", "Convolution", more=CONV), {"c": [numbers(4, 3, 2, 2), numbers(5)]}, r"weights of shape \(5,\)"),
    (layer("c", "Convolution", more="convolution_param { num_output: 4 kernel_size: 2 axis: 2 }"), {}, "axis 2"),
    (layer("c", "Convolution", more="convolution_param { num_output: 4 kernel_size: [2, 2, 2] }"), {},
     "two dimensions"),
    (layer("c", "Convolution", more="convolution_param { num_output: 4294967295 kernel_size: 4294967295 }"),
     {"c": [numbers(1), numbers(1)]}, "required: .4294967295, 3"),
    (layer("c", "Convolution", more="convolution_param { num_output: 4 kernel_size: 1 group: 0 }"),
     {"c": [numbers(4, 3), numbers(4)]}, "groups"),
    (layer("d", "InnerProduct", more="inner_product_param { num_output: 4 axis: 2 }"), {}, "axis 2"),
    (layer("p", "Pooling", more="pooling_param { pool: STOCHASTIC kernel_size: 2 }"), {}, "pools at random"),
    (layer("p", "Pooling"), {}, "kernel"),
    (layer("r", "ReLU", more="relu_param { negative_slope: -0.1 }"), {}, "has slope -0.1; required: 0 to 1"),
    (layer("d", "Deconvolution", more="convolution_param { num_output: 2 kernel_size: 2 axis: 2 }"), {}, "axis 2"),
    (layer("d", "Deconvolution", more="convolution_param { num_output: 2 kernel_size: 2 stride: 0 }"),
     {"d": [numbers(3, 2, 2, 2), numbers(2)]}, "required: strides from 1 to 256"),
    (layer("d", "Deconvolution", more="convolution_param { num_output: 2 group: 2 kernel_size: 2 }"),
     {"d": [numbers(3, 1, 2, 2), numbers(2)]}, "groups that divide them"),
    (layer("d", "Deconvolution", more="convolution_param { num_output: 2 group: 0 kernel_size: 2 }"),
     {"d": [numbers(3, 2, 2, 2), numbers(2)]}, "in 0 groups"),
    (layer("d", "Deconvolution", more="convolution_param { num_output: 2 kernel_size: 2 pad: 9 }"),
     {"d": [numbers(3, 2, 2, 2), numbers(2)]}, "leaves nothing of a tensor"),
    (layer("d", "Deconvolution", more="convolution_param { num_output: 2 kernel_size: 2 stride: 1000000 }"),
     {"d": [numbers(3, 2, 2, 2), numbers(2)]}, "required: strides from 1 to 256"),
    (layer("d", "Deconvolution", more="convolution_param { num_output: 2 kernel_size: 2 }"),
     {"d": [numbers(3, 2, 3, 3), numbers(2)]}, r"weights of shape .*; required: \(3, 2, 2, 2\)"),
    (layer("k", "Concat", "x x", more="concat_param { axis: 2 }"), {}, "axis 2"),
    (layer("e", "Eltwise", "x x", more="eltwise_param { operation: MAX }"), {}, "is a MAX"),
    (layer("e", "Eltwise", "x x", more="eltwise_param { coeff: 1 coeff: -1 }"), {}, r"coefficients \[1.0, -1.0\]"),
    (layer("n", "BatchNorm", more="batch_norm_param { use_global_stats: false }"), {}, "normalises by the batch"),
    (layer("l", "LRN", more="lrn_param { local_size: 4 }"), {}, "has local_size 4; required: an odd one"),
    (layer("s", "Scale", "x x"), {}, "has 2 bottoms"),
    (layer("s", "Scale", more="scale_param { axis: 0 }"), {}, "axis 0"),
    (layer("f", "Flatten", more="flatten_param { axis: 2 }"), {}, "axis 2"),
    (layer("s", "Softmax", more="softmax_param { axis: 2 }"), {}, "axis 2"),
    (layer("r", "ReLU", "nothing"), {}, "reads 'nothing', which no layer before it makes"),
    (layer("r", "ReLU") + layer("r", "ReLU", "r"), {}, "name that is taken"),
    ('layer { name: "r" type: "ReLU" bottom: "x" }', {}, "has no top"),
    ("layer {", {}, "the .prototxt is damaged"),
    ("a { " * 50_000, {}, "the .prototxt is damaged"),
    ('input: "z"', {}, "has 2 inputs"),
])
def test_refused_caffe_layers(convert_text, text, weights, message):
    with pytest.raises(ConversionError, match=message):
        convert_text(text, weights)


def test_a_caffe_network_that_makes_too_much(convert_text):
    text = "".join(layer(f"s{i}", "PReLU", f"s{i - 1}" if i else "x") for i in range(9))
    text += layer("t", "ReLU", "s8") + GLOBAL
    weights = {f"s{i}": [np.full(3, 0.5)] for i in range(9)}
    assert convert_text(text, weights, max_constants="1MB").graph
    with pytest.raises(ConversionError, match=r"layer 's\d' .* at most 50KiB are accepted"):
        convert_text(text, weights, max_constants="50KiB")


def test_refused_caffe_inputs(convert_text):
    for head, options, message in [("", {}, "has 0 inputs"), ('input: "x" ', {}, "of 0 shapes"),
                                   ('input: "x" input_shape { dim: 1 dim: 3 dim: 0 dim: 4 } ', {},
                                    r"shape \[1, 3, 0, 4\]"),
                                   ('input: "x" input_shape { dim: 1 dim: 3 } ', {"size": 4}, "no size")]:
        with pytest.raises(ConversionError, match=message):
            convert_text(layer("r", "ReLU"), head=head, **options)


JOINED = (layer("c", "Convolution", "image", more="convolution_param { num_output: 4 kernel_size: 2 }")
          + layer("p", "Pooling", "c", more="pooling_param { pool: AVE global_pooling: true }")
          + layer("f", "Flatten", "p") + layer("j", "Concat", "f age")
          + layer("d", "InnerProduct", "j", more="inner_product_param { num_output: 2 }"))
HEADS = {
    "named": 'input: "image" input_shape { dim: 2 dim: 3 dim: 5 dim: 6 } input: "age" input_shape { dim: 2 dim: 4 } ',
    "layers": layer("i", "Input", "", "image", "input_param { shape { dim: 2 dim: 3 dim: 5 dim: 6 } }")
    + layer("a", "Input", "", "age", "input_param { shape { dim: 2 dim: 4 } }"),
    "one layer": 'layer { name: "i" type: "Input" top: "image" top: "age" input_param { '
                 'shape { dim: 2 dim: 3 dim: 5 dim: 6 } shape { dim: 2 dim: 4 } } } ',
    "and one that nothing reads": 'input: "unread" input_shape { dim: 7 dim: 3 } input: "image" '
                                  'input_shape { dim: 2 dim: 3 dim: 5 dim: 6 } input: "age" '
                                  'input_shape { dim: 2 dim: 4 } ',
}


@pytest.mark.parametrize("head", HEADS)
def test_several_caffe_inputs(convert_text, head):
    w, v = numbers(4, 3, 2, 2), numbers(2, 8, seed=1)
    made = convert_text(JOINED, {"c": [w, numbers(4, seed=2)], "d": [v, numbers(2, seed=3)]}, head=HEADS[head])
    assert made.inputs == {"image": (3, 5, 6), "age": (4, 1, 1)}
    image, age = numbers(2, 3, 5, 6, seed=4), numbers(2, 4, seed=5)
    patches = np.lib.stride_tricks.sliding_window_view(image, (2, 2), (2, 3))
    hidden = np.einsum("ncyxij,kcij->nk", patches, w) / 20 + numbers(4, seed=2)
    expected = np.concatenate([hidden, age], 1) @ v.T + numbers(2, seed=3)
    np.testing.assert_allclose(Explainer(made).predict({"image": image, "age": age}), expected, rtol=1e-4, atol=1e-5)


def test_several_caffe_inputs_in_the_old_way(convert_text):
    """Four numbers for each; what is given as a size is that of images."""
    head = 'input: "image" input: "age" ' + "".join(f"input_dim: {n} " for n in (1, 3, 5, 6, 1, 4, 1, 1))
    text = layer("g", "Flatten", "age") + JOINED.replace('"age"', '"g"')
    weights = {"c": [numbers(4, 3, 2, 2), numbers(4)], "d": [numbers(2, 8), numbers(2)]}
    assert convert_text(text, weights, head=head).inputs == {"image": (3, 5, 6), "age": (4, 1, 1)}
    assert convert_text(JOINED, weights, head=HEADS["named"], size=9).inputs == {"image": (3, 9, 9), "age": (4, 1, 1)}


@pytest.mark.parametrize(("head", "message"), [
    ('input: "image" input: "age" input_shape { dim: 2 dim: 4 } ', "has 2 inputs .* of 1 shapes"),
    (HEADS["named"].replace("dim: 2 dim: 4", "dim: 3 dim: 4"), "batches of 2, 3; required: one size"),
    (HEADS["named"].replace('"age"', '"image"'), "each of a name of its own"),
    (HEADS["named"].replace("dim: 4", "dim: 0"), r"input 'age' has shape \[2, 0\]"),
    (HEADS["named"].replace("dim: 4", f"dim: {2**40}"), "at most 268435456 are accepted"),
])
def test_refused_inputs_of_several(convert_text, head, message):
    with pytest.raises(ConversionError, match=message):
        convert_text(JOINED, {"c": [numbers(4, 3, 2, 2), numbers(4)]}, head=head)


@pytest.mark.parametrize("content", [b"", b"garbage, not weights", bytes(1000)])
def test_caffemodel_that_is_none(tmp_path, content):
    (tmp_path / "net.prototxt").write_text(INPUT + layer("r", "ReLU"))
    (tmp_path / "net.caffemodel").write_bytes(content)
    with pytest.raises(ConversionError, match=r"the \.caffemodel"):
        convert(tmp_path / "net.prototxt", tmp_path / "net.caffemodel")


def test_damaged_caffe_files_are_read_or_refused():
    text = (INPUT + layer("c", "Convolution", "x", "c", CONV) + layer("n", "BatchNorm", "c", "c")
            + layer("e", "Eltwise", "c c")
            + layer("p", "Pooling", "e", "p", "pooling_param { pool: AVE kernel_size: 3 stride: 2 pad: 1 }")
            + layer("d", "InnerProduct", "p", "d", "inner_product_param { num_output: 2 }")).encode()
    weights = caffemodel({"c": [numbers(4, 3, 2, 2), numbers(4)], "n": [numbers(4), np.ones(4), np.ones(1)],
                          "d": [numbers(2, 80), numbers(2)]})
    assert len(caffe.parse(text, weights)[0]) == 6
    for data in damaged(weights, 500):
        with contextlib.suppress(FastDTDError):
            caffe.parse(text, data)
    for data in damaged(text, 500):
        with contextlib.suppress(FastDTDError):
            caffe.parse(data, weights)
