"""Smooth activations and gates: what the table of layers does not say of them."""

import naive
import numpy as np
import pytest
from explaining import explain, explainer
from fastdtd.kernels import codes, cpu
from importing import converter_of_nodes, ints, node, numbers, of_type, scores

from fastdtd import cli, save
from fastdtd import graph as g
from fastdtd.errors import ConversionError, ModelError, RuleError
from fastdtd.model import Model, Preprocessing

# Units in the last place; the tails of GELU's approximation lose digits of their argument.
ULPS = {"elu": 2, "gelu": 10, "gelu_tanh": 200, "hard_sigmoid": 3, "hard_swish": 3, "mish": 5, "sigmoid": 4, "silu": 4,
        "softplus": 5, "tanh": 4}


def computed(layer, x):
    """(f(x), ratio) by the processor's kernel."""
    a, (out, ratio) = np.float32(x).reshape(1, 1, 1, -1), np.empty((2, 1, 1, 1, len(x)), np.float32)
    alpha, beta = (np.float32(1 if value is None else value) for value in (layer.alpha, layer.beta))
    code = getattr(codes, layer.function.upper())
    cpu.nonlinearity_forward(out, ratio, a, 0, 0, code, alpha, beta, False, 0, 1)
    return out.ravel(), ratio.ravel()


@pytest.mark.parametrize("function", g.ACTIVATIONS)
def test_values_are_right_to_their_last_bits(function):
    layer = g.Activation("f", (g.INPUT,), function)
    x = np.concatenate([np.linspace(-9, 9, 30001), np.linspace(-80, 80, 999), np.logspace(-30, 0, 99),
                        -np.logspace(-30, 0, 99), [0]]).astype(np.float32)
    expected = naive.activation(layer, x.astype(float))
    value, ratio = computed(layer, x)
    # where hard ones bend; what 1 + tanh has left in float64; where float32 ends
    floor = 3e-7 if function.startswith("hard") else 1e-15 if function == "gelu_tanh" else 1e-37
    np.testing.assert_array_less(np.abs(value - expected), ULPS[function] * np.spacing(
        np.abs(expected).astype(np.float32)) + floor)
    if layer.is_zero_at_zero:
        np.testing.assert_allclose(ratio[x != 0], (expected / np.where(x, x, 1))[x != 0], rtol=3e-5, atol=1e-7)
        np.testing.assert_allclose(ratio[x == 0], naive.activation(layer, np.array([1e-9])).item() / 1e-9, rtol=1e-6)
        assert (ratio >= 0).all()
    else:
        assert (ratio == 1).all()
        assert (value >= 0).all()


@pytest.mark.parametrize("function", g.ACTIVATIONS)
def test_no_number_stays_none(function):
    """So that what is not finite is refused."""
    assert np.isnan(computed(g.Activation("f", (g.INPUT,), function), np.full(9, np.nan))[0]).all()


@pytest.mark.parametrize(("fields", "message"), [
    (("swish",), "has function 'swish'; required: one of elu, gelu"),
    (("tanh", 1.0), "has alpha 1; required: none, for tanh has no such parameter"),
    (("silu", 1.0, 2.0), "has beta 2; required: none"),
    (("elu", -1.0), "has alpha -1; required: 0 to 100"),
    (("hard_sigmoid", 0.2, 1.5), "has beta 1.5; required: 0 to 1"),
    (("elu", float("nan")), "has alpha nan; required: 0 to 100"),
])
def test_refused_parameters(fields, message):
    with pytest.raises(ModelError, match=message):
        g.Activation("a", (g.INPUT,), *fields)


# ---- Derivatives -----------------------------------------------------------------------------------------------------


def assert_derives(graph):
    """The rule 'gradient' gives what differences of the oracle's scores say."""
    x = np.random.default_rng(0).uniform(-2, 2, (1, *graph.input_shape)).astype(np.float32)
    e = explain(explainer(graph, "gradient"), x, 1)
    ours, step = e.relevance[0].ravel(), 1e-4
    for i in range(ours.size):
        change = np.eye(1, ours.size, i).reshape(graph.input_shape) * step
        high, low = (naive.forward(graph, x[0] + sign * change)[graph.output][1] for sign in (1, -1))
        assert ours[i] == pytest.approx((high - low) / (2 * step), rel=1e-4, abs=1e-5)


@pytest.mark.parametrize(("function", "fields"), [
    *((function, ()) for function in g.ACTIVATIONS), ("silu", (1.7,)), ("elu", (0.5, 1.5)), ("hard_sigmoid", (0.2,))])
def test_derivatives_of_activations(function, fields):
    assert_derives(g.Graph((
        g.Conv2d("conv", (g.INPUT,), numbers(3, 2, 2, 2), numbers(3)),
        g.Activation("tested", ("conv",), function, *fields), g.Flatten("flat", ("tested",)),
        g.Dense("scores", ("flat",), numbers(3, 12)),
    ), (2, 3, 3)))


GATES = {"by channel": (3, 1, 1), "by pixel": (1, 2, 2), "own shape": (3, 2, 2), "by one number": (1, 1, 1)}


SOFT = {"sigmoid": lambda name, source: g.Activation(name, (source,), "sigmoid"),
        "softmax": lambda name, source: g.Softmax(name, (source,))}


def gated(shape, x="activation", soft="sigmoid"):
    """x times a gate of that shape, which a second branch makes."""
    channels, *size = shape
    layers = [g.Conv2d("conv", (g.INPUT,), numbers(3, 2, 2, 2), numbers(3)),
              g.Activation("activation", ("conv",), "silu"),
              g.Conv2d("squeeze", ("activation",), numbers(channels, 3, 1, 1), numbers(channels))]
    if size == [1, 1]:
        layers.append(g.GlobalAveragePool("pool", ("squeeze",)))
    return g.Graph((*layers, SOFT[soft]("gate", layers[-1].name), g.Multiply("product", (x, "gate")),
                    g.Flatten("flat", ("product",)), g.Dense("scores", ("flat",), numbers(3, 12))), (2, 3, 3))


@pytest.mark.parametrize("soft", SOFT)
@pytest.mark.parametrize("gate", GATES)
def test_derivatives_of_products(gate, soft):
    assert_derives(gated(GATES[gate], soft=soft))


# ---- Gates -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("soft", SOFT)
@pytest.mark.parametrize("gate", GATES)
def test_nothing_comes_back_to_a_gate_that_is_held(gate, soft):
    graph = gated(GATES[gate], soft=soft)
    made = explainer(graph)
    held = {layer.name for layer in graph if layer.name in ("squeeze", "pool", "gate")}
    assert made._assignment.held == held
    assert set(made.rules) == {"conv", "product", "scores"}
    schedule = made._executor.devices[0][1].schedule(2, 1)
    assert {step.layer for step in schedule.steps[:schedule.forward_steps]} > held
    assert not held & {step.layer for step in schedule.steps[schedule.forward_steps:]}
    e = explain(made, np.random.default_rng(0).uniform(-1, 1, (2, 2, 3, 3)).astype(np.float32))
    assert set(e.ledger) == {"conv", "scores"}
    for name in held:
        assert not e.at(name).any()
    np.testing.assert_allclose(*(e.at(name).sum((1, 2, 3)) for name in ("activation", "product")), rtol=1e-6)


def test_what_is_held_is_shown(tmp_path, capsys):
    path = tmp_path / "net.h5"
    save(Model(gated((3, 1, 1)), Preprocessing(None)), path)
    assert cli.main(["show", str(path)]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line.strip()}
    assert all(lines[name].endswith("held constant") for name in ("squeeze", "pool", "gate"))
    assert lines["product"].endswith("real    hold")
    assert cli.main(["show", str(path), "--rule", "type:multiply=half"]) == 0
    assert "held constant" not in capsys.readouterr().out


@pytest.mark.parametrize("soft", SOFT)
@pytest.mark.parametrize("gate", GATES)
def test_half_to_the_gate(gate, soft):
    graph = gated(GATES[gate], soft=soft)
    batch = np.random.default_rng(0).uniform(-1, 1, (2, 2, 3, 3)).astype(np.float32)
    e = explain(explainer(graph, {"type:multiply": "half"}), batch)
    halves = [e.at(name).sum((1, 2, 3), dtype=float) for name in ("product", "gate")]
    np.testing.assert_allclose(halves[1], 0.5 * halves[0], rtol=1e-5)
    np.testing.assert_allclose(e.relevance.sum((1, 2, 3), dtype=float) + e.absorbed, e.explained, rtol=1e-5)


def test_a_softmax_of_large_numbers_and_of_none():
    """exp of what is below the largest does not overflow; what is not finite is not hidden."""
    a = np.float32([[1e4, 1e4, -1e4], [0.0, np.nan, 1.0], [np.inf, 0.0, 1.0]]).reshape(3, 3, 1, 1)
    x = np.empty_like(a)
    cpu.softmax_forward(x, a, 0, 0, 3, 0, 3)
    np.testing.assert_allclose(x[0].ravel(), [0.5, 0.5, 0], atol=1e-37)
    assert np.isnan(x[1]).all()
    assert np.isnan(x[2]).any()


def test_a_tensor_that_is_a_gate_and_more_is_explained():
    """The gate's own layers have relevance, of what else reads them."""
    layers = (g.Conv2d("conv", (g.INPUT,), numbers(3, 2, 1, 1)), g.Activation("gate", ("conv",), "sigmoid"),
              g.Multiply("product", ("conv", "gate")), g.Add("sum", ("product", "gate")),
              g.GlobalAveragePool("scores", ("sum",)))
    assert explainer(g.Graph(layers, (2, 3, 3)))._assignment.held == frozenset()


@pytest.mark.parametrize(("preset", "message"), [
    ("innvestigate.deep_taylor", "layer 'activation' is no ReLU"),
    ("captum.lrp", "'activation' is a smooth activation"),
    ("zennit.epsilon_plus", "'product' is a product of computed tensors")])
def test_what_originals_do_not_explain_is_refused(preset, message):
    with pytest.raises(RuleError, match=message):
        explainer(gated((3, 1, 1)), preset)


def test_a_gate_has_to_fit():
    with pytest.raises(ModelError, match="multiplies 2x3x3 by a gate of shape 3x1x1; required: the same shape, 2x1x1"):
        gated((3, 1, 1), g.INPUT)


# ---- As sources write them -------------------------------------------------------------------------------------------

X = numbers(1, 3, 9, 8, seed=5)
POOL = node("GlobalAveragePool", ["t"], ["y"])


@pytest.fixture
def convert_nodes(tmp_path):
    return converter_of_nodes(tmp_path)


def chain(text):
    """Nodes from 'x' to 't': operators and their inputs, _ what the one before made."""
    nodes, last, operators = [], "x", text.split(", ")
    for i, (operator, *inputs) in enumerate(map(str.split, operators), 1):
        made = "t" if i == len(operators) else f"v{i}"
        nodes.append(node(operator, [last if name == "_" else name for name in inputs], [made]))
        last = made
    return nodes


NUMBERS = {name: np.float32(value) for name, value in {
    "zero": 0, "half": 0.5, "one": 1, "three": 3, "six": 6, "sixth": 1 / 6, "root": 2**0.5, "cubic": 0.044715,
    "tanh": (2 / np.pi)**0.5, "quick": 1.702}.items()}
SPELLED = {
    "x sigmoid(x)": ("Sigmoid _, Mul x _", "silu"),
    "sigmoid(x) x": ("Sigmoid _, Mul _ x", "silu"),
    "x sigmoid(1.702 x)": ("Mul _ quick, Sigmoid _, Mul _ x", "silu"),
    "x / (1 + exp(-x))": ("Neg _, Exp _, Add _ one, Div x _", "silu"),
    "1 / (1 + exp(-x))": ("Neg _, Exp _, Add _ one, Reciprocal _", "sigmoid"),
    "log(1 + exp(x))": ("Exp _, Add one _, Log _", "softplus"),
    "x relu6(x + 3) / 6": ("Add _ three, Clip _ zero six, Mul _ x, Div _ six", "hard_swish"),
    "x (relu6(x + 3) / 6)": ("Add _ three, Clip _ zero six, Mul _ sixth, Mul x _", "hard_swish"),
    "relu6(x + 3) / 6": ("Add _ three, Clip _ zero six, Div _ six", "hard_sigmoid"),
    "x hard_sigmoid(x), of ONNX": ("HardSigmoid _, Mul _ x", "hard_swish"),
    "x tanh(softplus(x))": ("Softplus _, Tanh _, Mul _ x", "mish"),
    "x (1 + erf(x / root)) / 2": ("Div _ root, Erf _, Add _ one, Mul _ x, Mul _ half", "gelu"),
    "(x / 2) (1 + erf(x / root))": ("Mul half _, Div x root, Erf _, Add one _, Mul v1 _", "gelu"),
    "by tanh of a cube": (
        "Pow _ three, Mul _ cubic, Add x _, Mul _ tanh, Tanh _, Add _ one, Mul _ x, Mul _ half", "gelu_tanh"),
    "by tanh of products": (
        "Mul _ cubic, Mul _ x, Mul _ x, Add _ x, Mul tanh _, Tanh _, Add one _, Mul x _, Mul half _", "gelu_tanh"),
}


@pytest.mark.parametrize("spelled", SPELLED)
@pytest.mark.parametrize("is_moved", [False, True])
def test_an_activation_that_is_spelled_out(convert_nodes, spelled, is_moved):
    """It is one layer; also of a tensor that is a view."""
    text, function = SPELLED[spelled]
    nodes = chain(text)
    if is_moved:
        nodes = [node("Transpose", ["input"], ["x"], perm=[0, 2, 3, 1]), *nodes]
        nodes[-1].output[0] = "u"
        nodes.append(node("Transpose", ["u"], ["t"], perm=[0, 3, 1, 2]))

    def renamed(model):
        if is_moved:
            model.graph.input[0].name = "input"

    model = convert_nodes([*nodes, POOL], NUMBERS, change=renamed, verify=True)
    assert [type(layer) for layer in model.graph] == [g.Activation, g.GlobalAveragePool]
    assert model.graph.layers[0].function == function


def test_what_is_nearly_an_activation_is_none(convert_nodes):
    with pytest.raises(ConversionError, match=r"Mul .* makes a function of each element that no layer has; required"):
        convert_nodes([*chain("Div _ root, Erf _, Add _ half, Mul _ x"), POOL], NUMBERS)


@pytest.mark.parametrize("text", [
    "Add _ three, Clip _ zero six, Mul _ x, Div _ six, Mul _ half, Add _ three",  # as Paddle's learnable affine blocks
    "Sigmoid _, Mul _ x, Mul _ three, Add _ half", "Tanh _, Mul _ three, Sub _ half", "Softplus _, Add _ three",
])
def test_an_activation_that_is_scaled_and_shifted(convert_nodes, text):
    model = convert_nodes([*chain(text), POOL], NUMBERS, verify=True)
    kinds = [type(layer) for layer in model.graph]
    assert kinds in ([g.Activation, g.Conv2d, g.GlobalAveragePool], [g.Activation, g.GlobalAveragePool])


def test_a_function_that_is_infinite_somewhere_is_none(convert_nodes):
    for text in ("Log _, Mul _ x", "Neg _, Exp _, Log _, Log _, Mul _ x"):
        with pytest.raises(ConversionError, match="makes a function of each element that no layer has"):
            convert_nodes([*chain(text), POOL], NUMBERS)


def test_read_twice_it_is_one_layer(convert_nodes):
    nodes = [node("Sigmoid", ["x"], ["s"]), node("Mul", ["x", "s"], ["m"]), node("Conv", ["m", "w31"], ["c"]),
             node("Add", ["m", "c"], ["t"]), POOL]
    assert [type(layer) for layer in convert_nodes(nodes, WEIGHTS).graph] == [
        g.Activation, g.Conv2d, g.Add, g.GlobalAveragePool]


WEIGHTS = {f"w{n}{seed}": numbers(n, 3, 1, 1, seed=seed) for n in (1, 3) for seed in (1, 2)}
PRODUCTS = {  # what makes 't', a product of 'x' and a gate; the gate's shape
    "by channel": ("GlobalAveragePool _, Conv _ w31, Sigmoid _, Mul x _", (3, 1, 1)),
    "the gate first": ("GlobalAveragePool _, Conv _ w31, HardSigmoid _, Mul _ x", (3, 1, 1)),
    "by pixel": ("Conv _ w11, Sigmoid _, Mul x _", (1, 9, 8)),
    "own shape": ("Conv _ w31, Sigmoid _, Mul x _", (3, 9, 8)),
    "scaled": ("Conv _ w31, Sigmoid _, Mul _ three, Mul x _", (3, 9, 8)),
    "relu6(c + 3)": ("Conv _ w31, Add _ three, Clip _ zero six, Mul x _", (3, 9, 8)),
    "of a pool, repeated": ("GlobalAveragePool _, Conv _ w31, Sigmoid _, Expand _ shape, Mul x _", (3, 9, 8)),
    "of one axis": ("Conv _ w31, Slice _ ints0 ints1 ints2, Sigmoid _, Mul x _", (3, 9, 8)),
    "channels last": ("GlobalAveragePool _, Conv _ w31, Sigmoid _, Transpose _, Transpose x, Mul _ v4, Transpose _",
                      (3, 1, 1)),
    "softmax of channels": ("GlobalAveragePool _, Conv _ w31, Softmax1 _, Mul x _", (3, 1, 1)),
    "softmax of channels at each pixel": ("Conv _ w31, Softmax1 _, Mul _ x", (3, 9, 8)),
    "softmax of columns": ("Conv _ w31, Softmax3 _, Mul x _", (3, 9, 8)),
    "softmax of pixels": ("Conv _ w11, Reshape _ flat, Softmax2 _, Reshape _ map, Mul x _", (1, 9, 8)),
    "softmax, scaled": ("Conv _ w31, Softmax1 _, Mul _ three, Mul x _", (3, 9, 8)),
    "softmax and sigmoid": ("Conv _ w31, Softmax1 _, Conv x w12, Sigmoid _, Mul v2 _, Mul x _", (3, 9, 8)),
    "of two gates": ("Conv _ w31, Sigmoid _, Conv x w12, Sigmoid _, Mul v2 _, Mul x _", (3, 9, 8)),
}


@pytest.mark.parametrize("product", PRODUCTS)
def test_products(convert_nodes, product):
    text, shape = PRODUCTS[product]
    nodes, order = chain(text), [[0, 2, 3, 1], [0, 2, 3, 1], [0, 3, 1, 2]]
    for each in nodes:
        if each.op_type == "Transpose":
            each.attribute.extend(node("Transpose", ["x"], ["y"], perm=order.pop(0)).attribute)
        if each.op_type.startswith("Softmax"):
            each.attribute.extend(node("Softmax", ["x"], ["y"], axis=int(each.op_type[-1])).attribute)
            each.op_type = "Softmax"
    constants = {"shape": ints(1, 3, 9, 8), "ints0": ints(0), "ints1": ints(1), "ints2": ints(2),
                 "flat": ints(1, 1, 72), "map": ints(1, 1, 9, 8)}
    graph = convert_nodes([*nodes, POOL], WEIGHTS | NUMBERS | constants, verify=True).graph
    made = of_type(graph, g.Multiply)[-1]
    assert made.inputs[0] == g.INPUT
    assert graph.shapes[made.inputs[1]] == shape
    moves = {"of a pool, repeated": 1, "of one axis": 1, "softmax of columns": 2, "softmax of pixels": 2}
    assert len(of_type(graph, g.Rearrange)) == moves.get(product, 0)
    assert scores(graph, X).any()


@pytest.mark.parametrize(("text", "message"), [
    ("Conv _ w31, Mul x _",
     r"multiplies two tensors that are computed, \(N, 3, 9, 8\) and \(N, 3, 9, 8\); required: a gate as one of them"),
    ("Conv _ w31, Tanh _, Mul x _", "required: a gate as one of them"),
    ("Conv _ w31, Sigmoid _, Flatten _, Mul x _", "required: shapes that broadcast, of as many axes"),
])
def test_refused_products(convert_nodes, text, message):
    with pytest.raises(ConversionError, match=message):
        convert_nodes([*chain(text), POOL], WEIGHTS)


def selective(keepdims):
    """Two branches side by side along an axis of their own, weighed by a softmax over them, and added up."""
    nodes = [node("Conv", ["x", f"w3{i}"], [f"c{i}"]) for i in (1, 2)]
    nodes += [node("Relu", [f"c{i}"], [f"r{i}"]) for i in (1, 2)]
    nodes += [node("Concat", ["r1", "r2"], ["both"], axis=1), node("Reshape", ["both", "dims"], ["side"]),
              node("ReduceSum", ["side", "one"], ["sum"], keepdims=0), node("GlobalAveragePool", ["sum"], ["mean"]),
              node("Conv", ["mean", "w63"], ["logits"]), node("Reshape", ["logits", "of each"], ["by branch"]),
              node("Softmax", ["by branch"], ["soft"], axis=1), node("Reshape", ["soft", "back"], ["gate"]),
              node("Mul", ["side", "gate"], ["weighed"]),
              node("ReduceSum", ["weighed", "one"], ["kept"], keepdims=keepdims),
              node("Reshape", ["kept", "images"], ["t"]), POOL]
    constants = {"w63": numbers(6, 3, 1, 1, seed=3), "dims": ints(1, 2, 3, 9, 8), "one": ints(1),
                 "of each": ints(1, 2, 3), "back": ints(1, 2, 3, 1, 1), "images": ints(1, 3, 9, 8)}
    return nodes, WEIGHTS | constants


@pytest.mark.parametrize("keepdims", [0, 1])
def test_selective_kernels(convert_nodes, keepdims):
    """As SKNet and ResNeSt write them. The branch of the gate has no relevance, and all is conserved."""
    nodes, constants = selective(keepdims)
    graph = convert_nodes(nodes, constants, verify=True).graph
    product, = of_type(graph, g.Multiply)
    assert graph.shapes[product.name] == (6, 9, 8)
    assert graph.shapes[product.inputs[1]] == (6, 1, 1)
    assert len(of_type(graph, g.Softmax)) == 1
    held = explainer(graph)._assignment.held
    assert {type(layer) for layer in graph if layer.name in held} == {
        g.Add, g.Conv2d, g.GlobalAveragePool, g.Rearrange, g.Softmax}
    batch = np.random.default_rng(2).uniform(-1, 1, (2, 3, 9, 8)).astype(np.float32)
    for rules in ("dtd", {"type:multiply": "half"}):
        e = explain(explainer(graph, rules), batch)
        np.testing.assert_allclose(e.relevance.sum((1, 2, 3), dtype=float) + e.absorbed, e.explained, rtol=1e-5)


@pytest.mark.parametrize(("text", "message"), [
    ("Conv _ w31, Softmax _, Conv _ w32", "softmax 'v2' is not the last layer; required: a softmax only at the end"),
    ("Conv _ w31, Softmax _, Relu _", "or in a gate, which multiplies another tensor"),
    ("Conv _ w31, LogSoftmax _, Mul x _", "multiplies two tensors that are computed"),
    ("Conv _ w31, Softmax _, Mul _ v2", "softmax 'v2' is not the last layer"),
    ("Conv _ w31, Softmax _, Add x _", "softmax 'v2' is not the last layer"),
    ("Conv _ w31, Softmax _, MatMul x _", "docs/method.md#attention"),
])
def test_a_softmax_that_is_no_gate(convert_nodes, text, message):
    with pytest.raises(ConversionError, match=message):
        convert_nodes([*chain(text), POOL], WEIGHTS)


def test_a_softmax_of_what_comes_several_times(convert_nodes):
    nodes = chain("Slice _ ints0 ints1 ints2, Expand _ shape, Softmax _, Mul x _")
    constants = {"shape": ints(1, 3, 9, 8), "ints0": ints(0), "ints1": ints(1), "ints2": ints(2)}
    with pytest.raises(ConversionError, match="has elements several times; required: each once"):
        convert_nodes([*nodes, POOL], constants)


def test_a_softmax_that_is_a_gate_and_the_end(convert_nodes):
    end = [node("GlobalAveragePool", ["x"], ["p"]), node("Softmax", ["p"], ["s"], axis=1),
           node("Mul", ["x", "s"], ["m"]), node("GlobalAveragePool", ["m"], ["q"]),
           node("Softmax", ["q"], ["y"], axis=1)]
    assert [type(layer) for layer in convert_nodes(end, verify=True).graph] == [
        g.GlobalAveragePool, g.Softmax, g.Multiply, g.GlobalAveragePool]


def test_a_sigmoid_that_is_a_gate_and_the_end(convert_nodes):
    """It is left out at the end, and computed where it is a gate."""
    end = [node("GlobalAveragePool", ["x"], ["p"]), node("Sigmoid", ["p"], ["s"]), node("Mul", ["x", "s"], ["m"]),
           node("GlobalAveragePool", ["m"], ["q"]), node("Sigmoid", ["q"], ["y"])]
    assert [type(layer) for layer in convert_nodes(end).graph] == [
        g.GlobalAveragePool, g.Activation, g.Multiply, g.GlobalAveragePool]
