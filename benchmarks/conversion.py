"""Does the time of conversion grow linearly with a file's nodes? Chains and nested joins from ONNX, Keras and Caffe.

    .venv/bin/python benchmarks/conversion.py [--nodes 2000]

Each file is converted twice, with so many nodes and with twice as many, without comparing scores. What is quadratic
shows as milliseconds a node that double. Networks of more layers than are accepted are read, not converted.
"""

import argparse
import io
import json
import tempfile
import time
import zipfile
from pathlib import Path

import h5py
import numpy as np
from onnx import TensorProto, helper, numpy_helper

from fastdtd.errors import ConversionError
from fastdtd.importers import caffe, convert

CHANNELS = 4
WEIGHT = np.full((CHANNELS, CHANNELS, 1, 1), 1 / CHANNELS, np.float32)


def onnx(folder, nodes, last, constants=()):
    """A file of nodes that read "x", and a mean over the image of `last`."""
    nodes = [*nodes, helper.make_node("GlobalAveragePool", [last], ["y"])]
    graph = helper.make_graph(
        nodes, "net", [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, CHANNELS, 6, 6])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in dict(constants).items()])
    path = folder / "net.onnx"
    path.write_bytes(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)]).SerializeToString())
    return [path]


def chain(folder, count, *steps, constants=(), same_inputs=1):
    """`steps`, each an operator with further inputs and attributes, one after the other, over and over."""
    nodes, source = [], "x"
    for i in range(count):
        operator, more, attributes = steps[i % len(steps)]
        nodes.append(helper.make_node(operator, [source] * same_inputs + more, [f"t{i}"], **attributes))
        source = f"t{i}"
    return onnx(folder, nodes, source, constants)


def nested_joins(folder, count):
    """x, and one channel of it after the other, each joined with all before it."""
    nodes = [helper.make_node("Split", ["x"], [f"c{i}" for i in range(CHANNELS)], axis=1)]
    source = "c0"
    for i in range(count):
        nodes.append(helper.make_node("Relu", [f"c{i % CHANNELS}"], [f"r{i}"]))
        nodes.append(helper.make_node("Concat", [source, f"r{i}"], [f"t{i}"], axis=1))
        source = f"t{i}"
    return onnx(folder, nodes, source)


def keras(folder, count):
    entries = [{"class_name": "InputLayer", "config": {"name": "x", "batch_shape": [None, 6, 6, CHANNELS]}}]
    image = io.BytesIO()
    with h5py.File(image, "w") as file:
        for i in range(count // 2):
            entries += [{"class_name": "Conv2D", "config": {"name": f"c{i}", "filters": CHANNELS, "kernel_size": [1, 1],
                                                            "use_bias": False}},
                        {"class_name": "ReLU", "config": {"name": f"r{i}"}}]
            file[f"layers/conv2d{f'_{i}' if i else ''}/vars/0"] = WEIGHT.reshape(1, 1, CHANNELS, CHANNELS)
    entries.append({"class_name": "GlobalAveragePooling2D", "config": {"name": "pool"}})
    config = {"class_name": "Sequential", "config": {"name": "net", "layers": entries}}
    with zipfile.ZipFile(folder / "net.keras", "w") as archive:
        archive.writestr("config.json", json.dumps(config))
        archive.writestr("model.weights.h5", image.getvalue())
    return [folder / "net.keras"]


def prototxt(folder, count):
    net = caffe.NetParameter()
    text, source = f'input: "x" input_shape {{ dim: 1 dim: {CHANNELS} dim: 6 dim: 6 }}\n', "x"
    parameters = f"convolution_param {{ num_output: {CHANNELS} kernel_size: 1 bias_term: false }}"
    for i in range(count // 2):
        text += f'layer {{ name: "c{i}" type: "Convolution" bottom: "{source}" top: "c{i}" {parameters} }}\n'
        text += f'layer {{ name: "r{i}" type: "ReLU" bottom: "c{i}" top: "c{i}" }}\n'
        source, blob = f"c{i}", net.layer.add(name=f"c{i}").blobs.add(data=[WEIGHT.tobytes()])
        blob.shape.dim.extend(WEIGHT.shape)
    parameters = "pooling_param { pool: AVE global_pooling: true }"
    text += f'layer {{ name: "p" type: "Pooling" bottom: "{source}" top: "p" {parameters} }}'
    (folder / "net.prototxt").write_text(text)
    (folder / "net.caffemodel").write_bytes(net.SerializeToString())
    return [folder / "net.prototxt", folder / "net.caffemodel"]


FILES = {
    "ONNX Conv, Relu": lambda folder, n: chain(folder, n, ("Conv", ["w"], {}), ("Relu", [], {}),
                                               constants={"w": WEIGHT}),
    "ONNX Reshape, Transpose": lambda folder, n: chain(
        folder, n, ("Reshape", ["s"], {}), ("Transpose", [], {"perm": [0, 2, 1, 3]}),
        constants={"s": np.array([1, CHANNELS, 6, 6])}),
    "ONNX Gather (indices)": lambda folder, n: chain(folder, n, ("Gather", ["i"], {"axis": 1}),
                                                     constants={"i": np.array([1, 0, 3, 2])}),
    "ONNX Add to itself": lambda folder, n: chain(folder, n, ("Add", [], {}), same_inputs=2),
    "ONNX Identity": lambda folder, n: chain(folder, n, ("Identity", [], {})),
    "ONNX nested Concat": nested_joins,
    "Keras Conv2D, ReLU": keras,
    "Caffe Convolution, ReLU": prototxt,
}


def seconds(write, count):
    with tempfile.TemporaryDirectory() as folder:
        files = write(Path(folder), count)
        begin = time.perf_counter()
        try:
            layers = len(convert(*files, verify=False).graph.layers)
        except ConversionError as error:
            layers = str(error).split(": ", 1)[1][:60]
        return time.perf_counter() - begin, layers


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=2000)
    count = parser.parse_args().nodes
    seconds(FILES["ONNX Identity"], 10)  # imports
    print(f"milliseconds a node       {count:>8} {2 * count:>8}  layers")
    for name, write in FILES.items():
        (once, _), (twice, layers) = seconds(write, count), seconds(write, 2 * count)
        print(f"{name:<25} {1e3 * once / count:>8.3f} {1e3 * twice / count / 2:>8.3f}  {layers}")


if __name__ == "__main__":
    main()
