"""What the tests of importers share: numbers, comparisons, files of a few nodes, and damage."""

import warnings

import numpy as np

from fastdtd.explainer import Explainer
from fastdtd.importers import convert
from fastdtd.model import Model, Preprocessing


def numbers(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def ints(*values):
    return np.array(values, np.int64)


def scores(graph, batch):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of scores that are not positive
        return Explainer(Model(graph, Preprocessing(None)))(batch, 0).output


def of_type(graph, layer_type):
    return [layer for layer in graph if isinstance(layer, layer_type)]


def same(actual, expected):
    assert actual is expected is None or (actual.dtype == expected.dtype and np.array_equal(actual, expected))


def node(*arguments, **attributes):
    """An ONNX node; onnx is imported where it is needed, for other importers' tests run without it."""
    from onnx import helper

    return helper.make_node(*arguments, **attributes)


def onnx_file(nodes, constants=(), shape=("N", 3, 9, 8), opset=13, outputs=("y",), change=lambda model: None):
    from onnx import TensorProto, helper, numpy_helper

    graph = helper.make_graph(
        nodes, "net", [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in dict(constants).items()])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])
    change(model)
    return model.SerializeToString()


def caffemodel(weights, old=False):
    """A .caffemodel from {layer name: arrays}; old: in the layout of 2014, every shape with four axes."""
    from fastdtd.importers.caffe import NetParameter

    net = NetParameter()
    for name, arrays in weights.items():
        layer = (net.layers if old else net.layer).add(name=name)
        for array in arrays:
            blob = layer.blobs.add(data=[array.astype("<f4").tobytes()])
            if old:
                blob.num, blob.channels, blob.height, blob.width = (1,) * (4 - array.ndim) + array.shape
            else:
                blob.shape.dim.extend(array.shape)
    return net.SerializeToString()


def converter_of_nodes(tmp_path):
    """convert() of an ONNX file of nodes and constants; 'x' is the input, 'y' the output unless `outputs` says it."""
    def convert_nodes(nodes, constants=(), shape=("N", 3, 9, 8), opset=13, outputs=("y",), change=lambda model: None,
                      **options):
        path = tmp_path / "net.onnx"
        path.write_bytes(onnx_file(nodes, constants, shape, opset, outputs, change))
        return convert(path, **options)

    return convert_nodes


def damaged(content, count):
    """`content` with some bytes changed, lost or repeated, `count` times."""
    rng = np.random.default_rng(0)
    for _ in range(count):
        data = bytearray(content)
        for _ in range(rng.integers(1, 4)):
            place, what = int(rng.integers(len(data))), rng.integers(4)
            if what == 0:
                data[place] = int(rng.integers(256))
            elif what == 1:
                del data[place:place + int(rng.integers(1, 9))]
            elif what == 2:
                data[place:place] = data[place:place + int(rng.integers(1, 30))]
            else:
                del data[-place // 8 - 1:]
        yield bytes(data)
