"""Quantised ONNX networks: read as the numbers that theirs stand for. What is expected is written from ONNX's formulas,
value = (number - zero point) * scale."""

import numpy as np
import pytest
from importing import converter_of_nodes, damaged, node, numbers, onnx_file, scores

import fastdtd
from fastdtd import graph as g
from fastdtd.errors import ConversionError, FastDTDError

onnx = pytest.importorskip("onnx")

POOL = node("GlobalAveragePool", ["t"], ["y"], name="pool")
RNG = np.random.default_rng(0)
IMAGES = RNG.uniform(-1, 1, (5, 3, 9, 8)).astype(np.float32)
# by name, a scale and a zero point: of pixels, of what is not negative, of what has both signs
GRIDS = {"x_s": np.float32(0.01), "x_z": np.uint8(128), "p_s": np.float32(0.05), "p_z": np.uint8(0),
         "s_s": np.float32(0.1), "s_z": np.int8(-3)}
W = RNG.integers(-127, 128, (4, 3, 3, 3)).astype(np.int8)
WEIGHTS = {"w": W, "w_s": np.float32(0.004), "w_z": np.int8(2), "w_many": np.array([1, 2, 3, 4], np.float32) / 500,
           "z_many": np.array([0, 1, -1, 3], np.int8), "b": np.array([300, -200, 0, 90], np.int32),
           "b_s": np.float32(0.00004), "b_z": np.int32(0)}
CONSTANTS = {**GRIDS, **WEIGHTS}
READ = [node("QuantizeLinear", ["x", "x_s", "x_z"], ["xq"]), node("DequantizeLinear", ["xq", "x_s", "x_z"], ["xd"])]


@pytest.fixture
def convert_nodes(tmp_path):
    return converter_of_nodes(tmp_path)


def floats(scale="w_s", zero="w_z"):
    shape = (-1, 1, 1, 1) if np.ndim(CONSTANTS[scale]) else ()
    return (W.astype(np.float32) - np.reshape(CONSTANTS[zero].astype(np.float32), shape)) * np.reshape(
        CONSTANTS[scale], shape)


def weight_nodes(scale="w_s", zero="w_z"):
    return [node("DequantizeLinear", ["w", scale, zero], ["wd"], axis=0),
            node("DequantizeLinear", ["b", "b_s", "b_z"], ["bd"])]


@pytest.mark.parametrize(("scale", "zero"), [("w_s", "w_z"), ("w_many", "z_many")])
@pytest.mark.parametrize("is_fused", [False, True])
def test_a_convolution_between_both_conversions(convert_nodes, scale, zero, is_fused):
    """A zero point at the end of the range stands for a ReLU."""
    relu = [] if is_fused else [node("Relu", ["c"], ["r"])]
    nodes = [*READ, *weight_nodes(scale, zero), node("Conv", ["xd", "wd", "bd"], ["c"]), *relu,
             node("QuantizeLinear", ["c" if is_fused else "r", "p_s", "p_z"], ["q"]),
             node("DequantizeLinear", ["q", "p_s", "p_z"], ["t"]), POOL]
    graph = convert_nodes(nodes, CONSTANTS).graph
    first, *others = graph
    np.testing.assert_allclose(first.weight, floats(scale, zero), rtol=1e-6)
    np.testing.assert_allclose(first.bias, CONSTANTS["b"] * CONSTANTS["b_s"], rtol=1e-6)
    clip = next(layer for layer in others if isinstance(layer, g.Clip))
    assert (clip.low, clip.high) == pytest.approx((0, 255 * 0.05))
    assert first.inputs == (g.INPUT,)  # the input's own range is the model's box, not a clip


def test_pixels_as_whole_numbers(tmp_path, convert_nodes):
    def change(model):
        model.graph.input[0].type.tensor_type.elem_type = onnx.TensorProto.UINT8

    nodes = [node("DequantizeLinear", ["x", "x_s", "x_z"], ["xd"]), *weight_nodes(),
             node("Conv", ["xd", "wd", "bd"], ["t"]), POOL]
    graph = convert_nodes(nodes, CONSTANTS, change=change).graph
    pixels = RNG.integers(0, 256, (2, 3, 9, 8)).astype(np.float32)
    plain = convert_nodes([*weight_nodes(), node("Conv", ["x", "wd", "bd"], ["t"]), POOL], CONSTANTS).graph
    np.testing.assert_allclose(scores(graph, pixels), scores(plain, (pixels - 128) * np.float32(0.01)), rtol=1e-4,
                               atol=1e-5)


def quantized_convolution(name="q", source="xq"):
    return node("QLinearConv", [source, "x_s", "x_z", "w", "w_many", "z_many", "s_s", "s_z", "b"], [name],
                pads=[1, 1, 1, 1])


def layers_of_convolution():
    bias = CONSTANTS["b"] * CONSTANTS["x_s"] * CONSTANTS["w_many"]
    return {"fw": floats("w_many", "z_many"), "fb": bias.astype(np.float32)}, [
        node("Conv", ["x", "fw", "fb"], ["c"], pads=[1, 1, 1, 1]), node("Clip", ["c", "low", "high"], ["cc"])]


LIMITS = {"low": np.float32((-128 + 3) * 0.1), "high": np.float32((127 + 3) * 0.1), "low2": np.float32(0),
          "high2": np.float32(255 * 0.05)}
CLIPPED = node("Clip", ["t2", "low2", "high2"], ["t"])
MICROSOFT = {"domain": "com.microsoft"}
DENSE = RNG.integers(0, 256, (288, 5)).astype(np.uint8)


@pytest.mark.parametrize(("nodes", "plain", "more"), [
    ([node("DequantizeLinear", ["q", "s_s", "s_z"], ["t"])], [node("Identity", ["cc"], ["t"])], {}),
    ([node("MaxPool", ["q"], ["m"], kernel_shape=[2, 2]), node("DequantizeLinear", ["m", "s_s", "s_z"], ["t"])],
     [node("MaxPool", ["cc"], ["t"], kernel_shape=[2, 2])], {}),
    ([node("QLinearAdd", ["q", "s_s", "s_z", "q", "s_s", "s_z", "p_s", "p_z"], ["a"], **MICROSOFT),
      node("DequantizeLinear", ["a", "p_s", "p_z"], ["t"])], [node("Add", ["cc", "cc"], ["t2"]), CLIPPED], {}),
    ([node("QLinearLeakyRelu", ["q", "s_s", "s_z", "p_s", "p_z"], ["a"], alpha=0.2, **MICROSOFT),
      node("DequantizeLinear", ["a", "p_s", "p_z"], ["t"])],
     [node("LeakyRelu", ["cc"], ["t2"], alpha=0.2), CLIPPED], {}),
    ([node("QLinearAveragePool", ["q", "s_s", "s_z", "p_s", "p_z"], ["a"], kernel_shape=[3, 3], strides=[2, 2],
           pads=[1, 1, 1, 1], count_include_pad=1, **MICROSOFT), node("DequantizeLinear", ["a", "p_s", "p_z"], ["t"])],
     [node("AveragePool", ["cc"], ["t2"], kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1],
           count_include_pad=1), CLIPPED], {}),
    ([node("QLinearGlobalAveragePool", ["q", "s_s", "s_z", "p_s", "p_z"], ["a"], **MICROSOFT),
      node("DequantizeLinear", ["a", "p_s", "p_z"], ["t"])],
     [node("GlobalAveragePool", ["cc"], ["t2"]), CLIPPED], {}),
    ([node("QLinearConcat", ["p_s", "p_z", "q", "s_s", "s_z", "xq", "x_s", "x_z"], ["a"], axis=1, **MICROSOFT),
      node("DequantizeLinear", ["a", "p_s", "p_z"], ["t"])],
     [node("Concat", ["cc", "x"], ["t2"], axis=1), CLIPPED], {}),
    ([node("Flatten", ["q"], ["f"]), node("QLinearMatMul", ["f", "s_s", "s_z", "d", "d_s", "d_z", "s_s", "s_z"],
                                          ["a"]), node("DequantizeLinear", ["a", "s_s", "s_z"], ["y"])],
     [node("Flatten", ["cc"], ["f"]), node("MatMul", ["f", "fd"], ["a"]), node("Clip", ["a", "low", "high"], ["y"])],
     {"d": DENSE, "d_s": np.float32(1e-4), "d_z": np.uint8(128), "fd": (DENSE - 128.0).astype("f4") * 1e-4}),
    ([node("Flatten", ["q"], ["f"]), node("QGemm", ["f", "s_s", "s_z", "d", "d_s", "d_z", "db", "s_s", "s_z"], ["a"],
                                          transB=1, **MICROSOFT), node("DequantizeLinear", ["a", "s_s", "s_z"], ["y"])],
     [node("Flatten", ["cc"], ["f"]), node("Gemm", ["f", "fd", "fb2"], ["a"], transB=1),
      node("Clip", ["a", "low", "high"], ["y"])],
     {"d": DENSE.T.copy(), "d_s": np.float32(1e-4), "d_z": np.uint8(128), "db": np.arange(5, dtype=np.int32) * 1000,
      "fd": (DENSE.T - 128.0).astype("f4") * 1e-4, "fb2": np.arange(5, dtype=np.float32) * 1000 * 0.1 * 1e-4}),
])
def test_operators_on_whole_numbers(convert_nodes, nodes, plain, more):
    """They give what the same network of floating-point operators gives, cut off where the whole numbers end."""
    constants, before = layers_of_convolution()
    constants = {**CONSTANTS, **constants, **LIMITS, **more}
    ends = [] if nodes[-1].output[0] == "y" else [POOL]
    made = convert_nodes([READ[0], quantized_convolution(), *nodes, *ends], constants).graph
    wanted = convert_nodes([*before, *plain, *ends], constants, opset=13).graph
    np.testing.assert_allclose(scores(made, IMAGES), scores(wanted, IMAGES), rtol=1e-4, atol=1e-4)


def test_scales_of_the_running_network(convert_nodes):
    """As quantize_dynamic writes it: the scale that is found for each image cancels."""
    nodes = [node("DynamicQuantizeLinear", ["x"], ["xq", "s", "z"]),
             node("ConvInteger", ["xq", "w", "z", "w_z"], ["i"]), node("Cast", ["i"], ["c"], to=1),
             node("Mul", ["s", "w_s"], ["both"]), node("Mul", ["c", "both"], ["t"]), POOL]
    made = convert_nodes(nodes, CONSTANTS).graph
    wanted = convert_nodes([node("Conv", ["x", "f"], ["t"]), POOL], {"f": floats()}).graph
    np.testing.assert_allclose(scores(made, IMAGES), scores(wanted, IMAGES), rtol=1e-5, atol=1e-6)


def test_weights_that_are_quantised_in_the_file(convert_nodes):
    f = numbers(4, 3, 3, 3)
    nodes = [node("QuantizeLinear", ["f", "w_many", "z_many"], ["fq"], axis=0),
             node("DequantizeLinear", ["fq", "w_many", "z_many"], ["fd"], axis=0), node("Conv", ["x", "fd"], ["t"]),
             POOL]
    weight = convert_nodes(nodes, {**CONSTANTS, "f": f}).graph.layers[0].weight
    scale = CONSTANTS["w_many"].reshape(-1, 1, 1, 1)
    zero = CONSTANTS["z_many"].astype(float).reshape(-1, 1, 1, 1)
    np.testing.assert_allclose(weight, (np.clip(np.rint(f / scale) + zero, -128, 127) - zero) * scale, rtol=1e-5)


def test_a_probability_at_the_end(convert_nodes):
    nodes = [*READ, node("Flatten", ["xd"], ["f"]), node("Gemm", ["f", "d"], ["s"]), node("Softmax", ["s"], ["p"]),
             node("QuantizeLinear", ["p", "p_s", "p_z"], ["pq"]),
             node("DequantizeLinear", ["pq", "p_s", "p_z"], ["y"])]
    graph = convert_nodes(nodes, {**CONSTANTS, "d": numbers(216, 3)}).graph
    assert [type(layer) for layer in graph] == [g.Flatten, g.Dense]


def test_it_says_so(convert_nodes, caplog):
    nodes = [*READ, *weight_nodes(), node("Conv", ["xd", "wd", "bd"], ["t"]), POOL]
    model = convert_nodes(nodes, CONSTANTS)
    assert "dequantised" in model.provenance["format"]
    assert "quantised: it is converted to the floating-point numbers" in caplog.text


@pytest.mark.parametrize(("nodes", "more", "message"), [
    ([READ[0], node("Relu", ["xq"], ["t"])], {}, "computes with quantised numbers; required: DequantizeLinear"),
    ([READ[0], node("DequantizeLinear", ["xq", "p_s", "x_z"], ["t"])], {}, "which was made as Grid"),
    ([READ[0], node("DequantizeLinear", ["xq", "x_s"], ["t"])], {}, "which was made as Grid"),
    ([node("DequantizeLinear", ["x", "x_s", "x_z"], ["t"])], {}, "'x', which is not quantised"),
    ([node("QuantizeLinear", ["x", "w_many", "z_many"], ["q"])], {}, r"scales of shape \(4,\); required: one"),
    ([node("QuantizeLinear", ["x", "bad", "x_z"], ["q"])], {"bad": np.float32(-1)}, "above zero"),
    ([node("QuantizeLinear", ["x", "x_s", "top"], ["q"])], {"top": np.uint8(255)}, "required: a range with zero"),
    ([node("QuantizeLinear", ["x", "x_s", "b_z"], ["q"])], {}, "quantises to int32"),
    ([*READ, node("DequantizeLinear", ["w", "three"], ["wd"]), node("Conv", ["xd", "wd"], ["t"])],
     {"three": np.ones(2, np.float32)}, r"scales of shape \(2,\) for numbers of shape \(4, 3, 3, 3\)"),
    ([READ[0], node("Pad", ["xq", "pads"], ["q"])], {"pads": np.array([0, 0, 1, 1] * 2)}, "quantised numbers"),
    ([READ[0], node("QLinearWhat", ["xq"], ["t"], **MICROSOFT)], {}, "operator of domain 'com.microsoft'"),
    ([READ[0], node("QLinearConcat", ["p_s", "p_z", "xq", "x_s", "x_z"], ["t"], sides=1, **MICROSOFT)], {},
     "attribute 'sides'; required: axis"),
    ([node("DynamicQuantizeLinear", ["x"], ["xq", "s", "z"]), node("Add", ["s", "w_s"], ["t"])], {},
     "quantised as the network runs; required: a product"),
    ([node("DynamicQuantizeLinear", ["x"], ["xq", "s", "z"]), node("ConvInteger", ["xq", "w", "z"], ["i"]),
      node("Relu", ["i"], ["t"])], {}, "sums of quantised numbers; required: a product with their scales"),
    ([READ[0], node("ConvInteger", ["xq", "w", "x_z"], ["t"])], {}, "other numbers than DynamicQuantizeLinear"),
])
def test_what_is_refused(convert_nodes, nodes, more, message):
    last = nodes[-1].output[0]
    ends = [node("DequantizeLinear", ["q", "x_s", "x_z"], ["t"]), POOL] if last == "q" else [POOL]
    with pytest.raises(ConversionError, match=message):
        convert_nodes([*nodes, *ends], {**CONSTANTS, **more})


def test_damaged_files_are_read_or_refused(tmp_path):
    dynamic = [node("DynamicQuantizeLinear", ["x"], ["xq", "s", "z"]),
               node("ConvInteger", ["xq", "w", "z", "w_z"], ["i"]), node("Cast", ["i"], ["c"], to=1),
               node("Mul", ["s", "w_s"], ["both"]), node("Mul", ["c", "both"], ["t"]), POOL]
    static = [READ[0], quantized_convolution(), node("DequantizeLinear", ["q", "s_s", "s_z"], ["t"]), POOL]
    refused = 0
    for nodes in (static, dynamic):
        for content in damaged(onnx_file(nodes, CONSTANTS), 300):
            path = tmp_path / "net.onnx"
            path.write_bytes(content)
            try:
                fastdtd.convert(path, verify=False)
            except FastDTDError:
                refused += 1
    assert refused > 100
