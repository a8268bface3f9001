"""ONNX: operators, attributes, shapes, tensors and edges are changed. What is accepted gives the scores of ONNX's own
evaluator."""

import numpy as np
import onnx
from fuzzing import Format, WrongError, check_model, convert, inputs
from importing import ints, node, numbers, onnx_file
from mutating import messages, smaller_messages, spoil_message, spoiled
from onnx.reference import ReferenceEvaluator

from fastdtd.cost import cost
from fastdtd.importers.onnx.operators import NEAREST, OPERATORS

ATTRIBUTES = ("alpha", "auto_pad", "axes", "axis", "beta", "bias", "blocksize", "ceil_mode", "count_include_pad",
              "dilations", "epsilon", "group", "keepdims", "kernel_shape", "mode", "momentum", "output_padding",
              "output_shape", "p", "pads", "perm", "size", "split", "storage_order", "strides", "to", "transA",
              "transB", "value", "coordinate_transformation_mode", "nearest_mode", "allowzero", "num_outputs")
WORDS = (*OPERATORS, *NEAREST, *ATTRIBUTES, "", "x", "y", "SAME_UPPER", "SAME_LOWER", "VALID", "NOTSET", "CRD", "DCR",
         "nearest", "linear", "reflect", "edge", "constant", "location", "net.onnx.data", "a" * 300)
MISTAKEN = {"LRN"}  # what ONNX's evaluator gets wrong: it goes through as many channels as there are images
CHEAP = 3e5  # multiply-adds of networks that ONNX's evaluator runs


def bases():
    conv = [node("Conv", ["x", "w", "b"], ["c"], pads=[1, 1, 1, 1], strides=[2, 2]), node("Relu", ["c"], ["r"])]
    pool = [node("MaxPool", ["r"], ["m"], kernel_shape=[2, 2], strides=[1, 2])]
    weights = {"w": numbers(4, 3, 3, 3), "b": numbers(4, seed=1)}
    norm = {"s": 1 + numbers(4) ** 2, "v": 0.5 + numbers(4) ** 2, "mean": numbers(4)}
    head = [node("GlobalAveragePool", ["t"], ["p"]), node("Flatten", ["p"], ["f"]),
            node("Gemm", ["f", "d", "e"], ["y"], transB=1)]
    dense = {"d": numbers(3, 4, seed=2), "e": numbers(3) ** 2}
    return [
        onnx_file([*conv, *pool, node("Identity", ["m"], ["t"]), *head, node("Softmax", ["y"], ["z"])],
                  weights | dense, outputs=("z",)),
        onnx_file([*conv, node("BatchNormalization", ["r", "s", "b", "mean", "v"], ["n"]),
                   node("LRN", ["n"], ["l"], size=3), node("Add", ["l", "n"], ["t"]), *head],
                  weights | dense | norm, opset=14),
        onnx_file([*conv, *pool, node("Shape", ["m"], ["q"]), node("Gather", ["q", "zero"], ["first"], axis=0),
                   node("Unsqueeze", ["first", "axes"], ["batch"]), node("Concat", ["batch", "rest"], ["to"], axis=0),
                   node("Reshape", ["m", "to"], ["g"]), node("MatMul", ["g", "k"], ["h"]),
                   node("Add", ["h", "e"], ["y"])],
                  weights | {"zero": np.array(0), "axes": ints(0), "rest": ints(-1), "k": numbers(32, 3),
                             "e": numbers(3) ** 2}),
        onnx_file([*conv, node("Transpose", ["r"], ["u"], perm=[0, 2, 3, 1]),
                   node("Slice", ["u", "from", "to", "axes"], ["v"]),
                   node("Transpose", ["v"], ["q"], perm=[0, 3, 1, 2]), node("Pad", ["q", "pads"], ["g"]),
                   node("Concat", ["g", "g"], ["j"], axis=1),
                   node("Split", ["j", "parts"], ["t", "other"], axis=1), *head],
                  weights | dense | {"from": ints(1), "to": ints(4), "axes": ints(1),
                                     "pads": ints(0, 0, 1, 0, 0, 0, 0, 1), "parts": ints(4, 4)}),
        onnx_file([*conv, node("ConvTranspose", ["r", "o"], ["u"], strides=[2, 2], output_padding=[1, 0]),
                   node("DepthToSpace", ["u"], ["v"], blocksize=2, mode="CRD"),
                   node("Resize", ["v", "", "", "sizes"], ["g"], mode="nearest", nearest_mode="floor",
                        coordinate_transformation_mode="asymmetric"),
                   node("AveragePool", ["g"], ["h"], kernel_shape=[3, 3], pads=[1, 1, 1, 1], count_include_pad=1),
                   node("Tile", ["h", "times"], ["t"]), *head],
                  weights | dense | {"o": numbers(4, 8, 2, 2), "sizes": ints(1, 2, 30, 24), "times": ints(1, 2, 1, 1)},
                  shape=(1, 3, 9, 8)),
        onnx_file([*conv, node("Constant", [], ["two"], value_float=2.0), node("Mul", ["r", "two"], ["u"]),
                   node("Clip", ["u", "", "two"], ["v"]), node("PRelu", ["v", "slope"], ["q"]),
                   node("Pow", ["q", "two"], ["g"]), node("ReduceMean", ["g"], ["h"], axes=[2, 3], keepdims=0),
                   node("Cast", ["h"], ["j"], to=1), node("Sub", ["j", "b"], ["i"]), node("Abs", ["i"], ["k"]),
                   node("Max", ["k", "none"], ["y"])],
                  weights | {"slope": numbers(4, 1, 1), "none": np.float32(0)}),
        onnx_file([node("Gemm", ["x", "w"], ["h"]), node("Relu", ["h"], ["r"]), node("Dropout", ["r"], ["q"]),
                   node("Expand", ["q", "shape"], ["g"]), node("LeakyRelu", ["g"], ["l"]), node("Neg", ["l"], ["n"]),
                   node("Add", ["n", "b"], ["y"])],
                  {"w": numbers(5, 6), "b": np.full(6, 9, np.float32), "shape": ints(2, 1, 6)[1:]}, shape=(1, 5)),
    ]


def in_two_files(content):
    """The same with its weights in another file."""
    model, data = onnx.load_from_string(content), b""
    for tensor in model.graph.initializer:
        onnx.external_data_helper.set_external_data(tensor, "net.onnx.data", len(data), len(tensor.raw_data))
        data += tensor.raw_data
        tensor.ClearField("raw_data")
    return {"net.onnx": model.SerializeToString(), "net.onnx.data": data}


def mutate(case, rng):
    content = case["net.onnx"]
    if rng.random() < 0.15:
        name = rng.choice(list(case))
        return case | {name: spoiled(rng, case[name])}
    model = onnx.load_from_string(content)
    for _ in range(rng.choice([1, 1, 2])):
        if rng.random() < 0.5 or not model.graph.node:
            spoil_message(rng, model, WORDS)
            continue
        one = rng.choice(model.graph.node)
        how = rng.random()
        if how < 0.3:
            one.op_type = rng.choice(list(OPERATORS))
        elif how < 0.5 and one.attribute:
            spoil_message(rng, rng.choice(one.attribute), WORDS)
        elif how < 0.6:
            value = rng.choice([[1, 1], [2, 2], [0, 1, 1, 0], [0, 3, 1, 2], [-1], 0, 1, 2, -1, 1.5, "SAME_LOWER"])
            one.attribute.append(onnx.helper.make_attribute(rng.choice(ATTRIBUTES), value))
        elif how < 0.8 and one.input:
            names = [name for other in model.graph.node for name in (*other.input, *other.output)]
            one.input[rng.randrange(len(one.input))] = rng.choice(names)
        elif how < 0.9:
            made = model.graph.node.add()
            made.CopyFrom(one)
            made.output[:] = one.input[:1]
        elif model.graph.initializer:
            spoil_message(rng, rng.choice(model.graph.initializer), WORDS)
    try:
        return case | {"net.onnx": model.SerializeToString()}
    except ValueError:  # it was given what it cannot write
        return case | {"net.onnx": spoiled(rng, content)}


def use(folder):
    model = convert(folder / "net.onnx")
    explanation = check_model(model, folder)
    if explanation is not None and cost(model.graph).multiply_adds < CHEAP:
        compare(model, explanation, folder / "net.onnx")


def compare(model, explanation, file):
    """The scores of ONNX's own evaluator, where it has any."""
    if explanation.output.ndim > 2 or model.inputs:  # maps, and several inputs, are compared as they are converted
        return
    batch = inputs(model.graph)[:1]
    try:
        source = onnx.load(file)
    except Exception:  # it has many errors of files that it does not open
        return
    used = sorted({one.op_type for one in messages(source) if isinstance(one, onnx.NodeProto)})
    if not MISTAKEN.isdisjoint(used):
        return
    value = source.graph.input[[one.name for one in source.graph.input].index(_input_name(source))]
    rank = len(value.type.tensor_type.shape.dim)
    given = {2: batch[:, :, 0, 0], 3: batch[:, :, 0]}.get(rank, batch)
    if model.provenance["format"].endswith("channels last"):
        given = given.transpose(0, 2, 3, 1)
    try:
        onnx.checker.check_model(source)
        with np.errstate(all="ignore"):
            theirs = np.asarray(ReferenceEvaluator(source).run(None, {value.name: given})[0], np.float64).reshape(-1)
    except Exception:  # it has no error of its own
        return
    if not np.isfinite(theirs).all():
        return
    ours = explanation.output[0].astype(np.float64)
    kinds = [ours]
    with np.errstate(all="ignore"):  # of what conversion drops at the end
        exponents = np.exp(ours - ours.max())
        kinds += [exponents / exponents.sum(), np.log(exponents / exponents.sum()), 1 / (1 + np.exp(-ours))]
    if not any(one.shape == theirs.shape and np.abs(one - theirs).max() <= 1e-3 * np.abs(theirs).max() + 1e-30
               for one in kinds):
        raise WrongError(f"other scores than ONNX's evaluator gives, with {', '.join(used)}")


def _input_name(source):
    constants = {one.name for one in source.graph.initializer}
    return next(one.name for one in source.graph.input if one.name not in constants)


def smaller(case):
    try:
        model = onnx.load_from_string(case["net.onnx"])
    except Exception:  # protobuf's
        return
    for one in smaller_messages(model):
        yield case | {"net.onnx": one.SerializeToString()}


BASES = bases()
FORMAT = Format("onnx", [*({"net.onnx": content} for content in BASES), in_two_files(BASES[0])], mutate, use, smaller)
