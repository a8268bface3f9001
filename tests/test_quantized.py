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


# ---- Numbers of a few bits -------------------------------------------------------------------------------------------

TYPES = {4: ("UINT4", "INT4"), 2: ("UINT2", "INT2")}


def packed(values, bits):
    """Numbers along the last axis in bytes, the first in the lowest bits; zeros where a byte has no number."""
    per_byte = 8 // bits
    padded = np.pad(values, [(0, 0)] * (values.ndim - 1) + [(0, -values.shape[-1] % per_byte)]) & (2**bits - 1)
    each = padded.reshape(*values.shape[:-1], -1, per_byte).astype(np.uint8)
    return np.bitwise_or.reduce(each << (bits * np.arange(per_byte, dtype=np.uint8)), -1).astype(np.uint8)


def with_few_bits(change=lambda tensor: None, raw=True, bits=4, signed=True, **tensors):
    """Initialisers of so many bits; each is given to `change` before it becomes one."""
    def add(model):
        for name, values in tensors.items():
            data = packed(np.asarray(values).reshape(-1), bits)
            made = onnx.TensorProto(name=name, dims=np.shape(values),
                                    data_type=getattr(onnx.TensorProto, TYPES[bits][signed]))
            if raw:
                made.raw_data = data.tobytes()
            else:
                made.int32_data.extend(data.tolist())
            change(made)
            model.graph.initializer.append(made)

    return add


def in_blocks(numbers, scale, zero, axis, block):
    """From the specification: number i along the axis has the scale and the zero point of i // block."""
    each = [np.repeat(one, block, axis).take(range(numbers.shape[axis]), axis) for one in (scale, zero)]
    return ((numbers.astype(np.float64) - each[1]) * each[0]).astype(np.float32)


@pytest.mark.parametrize("raw", [True, False])
@pytest.mark.parametrize(("bits", "signed"), [(4, True), (4, False), (2, True), (2, False)])
@pytest.mark.parametrize(("axis", "block"), [(0, 3), (1, 2), (-2, 2), (3, 3), (1, 1), (2, 2**40), (None, 0)])
def test_weights_in_blocks(convert_nodes, raw, bits, signed, axis, block):
    """An odd number of elements, of which the last byte is not full, and blocks of which the last may not be."""
    low = -2**(bits - 1) if signed else 0
    w = RNG.integers(low, low + 2**bits, (5, 3, 3, 3))
    shape = [-(-n // block) if i == axis % 4 else n for i, n in enumerate(w.shape)] if block else ()
    scale = RNG.uniform(0.1, 0.5, shape).astype(np.float32)
    zero = RNG.integers(low, low + 2**bits, shape)
    where = {"axis": axis, "block_size": block} if block else {}
    nodes = [node("DequantizeLinear", ["w", "s", "z"], ["wd"], **where), node("Conv", ["x", "wd"], ["t"]), POOL]
    add = with_few_bits(raw=raw, bits=bits, signed=signed, w=w, z=zero)
    made = convert_nodes(nodes, {"s": scale}, opset=21 if bits == 4 else 25, change=add, verify=bits == 4 and block < 9)
    expected = in_blocks(w, scale, zero, axis, min(block, 9)) if block else (w - zero) * scale
    np.testing.assert_allclose(made.graph.layers[0].weight, expected, rtol=1e-6)


def test_weights_of_four_bits_by_channel(convert_nodes):
    w, zero = RNG.integers(0, 16, (4, 3, 3, 3)), np.array([0, 8, 15, 7])
    nodes = [node("DequantizeLinear", ["w", "w_many", "z"], ["wd"], axis=0), node("Conv", ["x", "wd"], ["t"]), POOL]
    made = convert_nodes(nodes, CONSTANTS, opset=21, change=with_few_bits(signed=False, w=w, z=zero))
    expected = (w - zero.reshape(-1, 1, 1, 1)) * CONSTANTS["w_many"].reshape(-1, 1, 1, 1)
    np.testing.assert_allclose(made.graph.layers[0].weight, expected, rtol=1e-6)


W4 = RNG.integers(-8, 8, (4, 3, 3, 3))


@pytest.mark.parametrize(("where", "scale", "zero", "message"), [
    ({"axis": 1, "block_size": -2}, (4, 2, 3, 3), (4, 2, 3, 3), "blocks of -2 along axis 1; required: one of each"),
    ({"axis": 4, "block_size": 2}, (4, 2, 3, 3), (4, 2, 3, 3), "along axis 4"),
    ({"axis": -5, "block_size": 2}, (4, 2, 3, 3), (4, 2, 3, 3), "along axis -5"),
    ({"axis": 1, "block_size": 2}, (4, 3, 3, 3), (4, 3, 3, 3), r"scales of shape \(4, 3, 3, 3\)"),
    ({"axis": 1, "block_size": 2}, (2,), (2,), r"scales of shape \(2,\)"),
    ({"axis": 1, "block_size": 2**62}, (4, 2, 3, 3), (4, 2, 3, 3), "for numbers of shape"),
    ({"axis": 1, "block_size": 2}, (4, 2, 3, 3), (4, 1, 3, 3), r"zero points of shape \(4, 1, 3, 3\)"),
    ({"axis": 1, "block_size": 0}, (4, 2, 3, 3), (4, 2, 3, 3), r"scales of shape \(4, 2, 3, 3\)"),
    ({"axis": 7}, (4,), (4,), "axis 7; required: one, or one for each"),
])
def test_blocks_that_do_not_fit(convert_nodes, where, scale, zero, message):
    nodes = [node("DequantizeLinear", ["w", "s", "z"], ["wd"], **where), node("Conv", ["x", "wd"], ["t"]), POOL]
    with pytest.raises(ConversionError, match=message):
        convert_nodes(nodes, {"s": np.ones(scale, np.float32)}, opset=21,
                      change=with_few_bits(w=W4, z=np.zeros(zero, int)))


@pytest.mark.parametrize("raw", [True, False])
@pytest.mark.parametrize("dims", [(4, 3, 3, 4), (4, 3, 3), (2**40, 2**40), (-4, 3, 3, 3), ()])
def test_bytes_that_do_not_fit(convert_nodes, raw, dims):
    def spoil(tensor):
        del tensor.dims[:]
        tensor.dims.extend(dims)

    nodes = [node("DequantizeLinear", ["w", "w_s"], ["wd"]), node("Conv", ["x", "wd"], ["t"]), POOL]
    with pytest.raises(ConversionError, match="damaged constant 'w': its shape"):
        convert_nodes(nodes, CONSTANTS, opset=21, change=with_few_bits(spoil, raw, w=W4))


@pytest.mark.parametrize("nodes", [
    [node("QuantizeLinear", ["x", "x_s", "four"], ["q"]), node("DequantizeLinear", ["q", "x_s", "four"], ["t"])],
    [node("QuantizeLinear", ["x", "x_s"], ["q"], output_dtype=21), node("DequantizeLinear", ["q", "x_s"], ["t"])],
    [node("Add", ["four", "four"], ["eight"]), node("Conv", ["x", "eight"], ["t"])],
])
def test_few_bits_elsewhere(convert_nodes, nodes):
    """Of four bits, a grid that is cut off at 15 must not become one of eight, which ends at 255."""
    with pytest.raises(ConversionError, match=r"DequantizeLinear, one of 2 or 4 bits|output_dtype 21; required: int8"):
        convert_nodes([*nodes, POOL], CONSTANTS, opset=21, change=with_few_bits(signed=False, four=0))


def of_few_bits(bits=4, block=16, zeros="packed", bias=True, spoiled=(), **attributes):
    """Nodes and constants of a MatMulNBits of (N, 216) to 5, and its weights (5, 216)."""
    blocks = -(-216 // block)
    numbers = RNG.integers(0, 2**bits, (5, blocks, block))
    scale = RNG.uniform(0.01, 0.1, (5, blocks)).astype(np.float32)
    zero = RNG.integers(0, 2**bits, (5, blocks)) if zeros else np.full((5, blocks), 2**(bits - 1))
    constants = {"w": packed(numbers, bits), "s": scale, "b": np.arange(5, dtype=np.float32)}
    if zeros:
        constants["z"] = packed(zero, bits) if zeros == "packed" else zero.astype(np.float32)
    inputs = ["f", "w", "s", "z" if zeros else "", "", "b"] if bias else ["f", "w", "s", "z" if zeros else ""]
    weight = ((numbers - zero[..., None]) * scale[..., None]).reshape(5, -1)[:, :216].astype(np.float32)
    attributes = {"K": 216, "N": 5, "bits": bits, "block_size": block} | attributes
    nodes = [node("Flatten", ["x"], ["f"]), node("MatMulNBits", inputs, ["y"], **MICROSOFT, **attributes)]
    return nodes, {**constants, **dict(spoiled)}, weight


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize(("block", "zeros", "bias"), [(16, "packed", True), (32, "", False), (64, "packed", False),
                                                      (16, "floats", True), (256, "", True)])
def test_products_with_weights_of_few_bits(convert_nodes, bits, block, zeros, bias):
    """The last of the blocks, and of the bytes with zero points, are not full."""
    nodes, constants, weight = of_few_bits(bits, block, zeros, bias, accuracy_level=4)
    layer = convert_nodes(nodes, constants).graph.layers[-1]
    np.testing.assert_allclose(layer.weight, weight, rtol=1e-6)
    assert layer.bias is None if not bias else layer.bias.tolist() == [0, 1, 2, 3, 4]


def test_older_layouts_of_few_bits(convert_nodes):
    """Scales and zero points were one axis."""
    nodes, constants, weight = of_few_bits()
    flat = {name: constants[name].reshape(-1) for name in ("s", "z")}
    np.testing.assert_allclose(convert_nodes(nodes, constants | flat).graph.layers[-1].weight, weight, rtol=1e-6)


@pytest.mark.parametrize(("how", "message"), [
    ({"bits": 3}, "has 3 bits"), ({"bits": 0}, "has 0 bits"), ({"block_size": 0}, "blocks of 0"),
    ({"block_size": -16}, "blocks of -16"), ({"block_size": 8}, "blocks of 8"), ({"block_size": 24}, "blocks of 24"),
    ({"block_size": 2**62}, "shapes .*; required"), ({"N": 0}, "N 0"), ({"K": -1}, "K -1"), ({"N": 6}, r"\(6, 14, 8\)"),
    ({"N": 2**40, "K": 2**40}, "shapes"), ({"K": 200}, r"required: \(5, 13, 8\)"),
    ({"weight_prepacked": 1}, "packed for one device"), ({"what": 1}, "attribute 'what'"),
    ({"spoiled": {"w": np.zeros((5, 0, 8), np.uint8)}}, "shapes"),
    ({"spoiled": {"w": np.zeros((5, 14, 8), np.int8)}}, "of int8"),
    ({"spoiled": {"s": np.ones((5, 13), np.float32)}}, r"\(5, 13\) of float32"),
    ({"spoiled": {"s": np.ones((5, 14), np.int32)}}, "of int32"),
    ({"spoiled": {"z": np.zeros((5, 14), np.uint8)}}, r"\(5, 14\) of uint8"),
    ({"spoiled": {"z": np.zeros((5, 14), np.int32)}}, r"\(5, 14\) of int32"),
    ({"spoiled": {"b": np.ones(4, np.float32)}}, r"\(4,\) of float32"),
])
def test_products_that_do_not_fit(convert_nodes, how, message):
    nodes, constants, _ = of_few_bits(**{key: how[key] for key in how if key == "spoiled"})
    for name, value in how.items():
        if name != "spoiled":
            kept = [one for one in nodes[1].attribute if one.name != name]
            del nodes[1].attribute[:]
            nodes[1].attribute.extend([*kept, onnx.helper.make_attribute(name, value)])
    with pytest.raises(ConversionError, match=message):
        convert_nodes(nodes, constants)


def test_products_of_other_things(convert_nodes):
    nodes, constants, _ = of_few_bits()
    nodes[1].input[4] = "z"
    with pytest.raises(ConversionError, match="inputs in another order, g_idx"):
        convert_nodes(nodes, constants)
    nodes, constants, _ = of_few_bits()
    quantized = [READ[0], node("Flatten", ["xq"], ["f"]), nodes[1]]
    with pytest.raises(ConversionError, match="computes with quantised numbers"):
        convert_nodes(quantized, {**CONSTANTS, **constants})


# ---- What is refused -------------------------------------------------------------------------------------------------


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
    blocks = [node("DequantizeLinear", ["w4", "s4"], ["wd"], axis=1, block_size=2), node("Conv", ["x", "wd"], ["t"]),
              POOL]
    few_bits, constants, _ = of_few_bits()
    files = [onnx_file(static, CONSTANTS), onnx_file(dynamic, CONSTANTS), onnx_file(few_bits, constants),
             onnx_file(blocks, {"s4": np.ones((4, 2, 3, 3), np.float32)}, opset=21, change=with_few_bits(w4=W4))]
    refused = 0
    for file in files:
        for content in damaged(file, 300):
            path = tmp_path / "net.onnx"
            path.write_bytes(content)
            try:
                fastdtd.convert(path, verify=False)
            except FastDTDError:
                refused += 1
    assert refused > 100
