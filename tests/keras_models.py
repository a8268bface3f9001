"""Keras files for tests: what Keras wrote, and small models that are written here."""

import io
import json
import zipfile
from pathlib import Path

import h5py
import numpy as np
from importing import numbers

RECORDED = Path(__file__).parent / "recorded" / "keras"  # record_keras.py made them
FILES = sorted(path.name for path in RECORDED.glob("*.*.*"))


def recorded(name):
    """Input, as the network has it here, and scores that Keras gave for it."""
    with np.load(RECORDED / "scores.npz") as arrays:
        picture, scores = (arrays[f"{name.rpartition('.')[0]}.{what}"] for what in ("input", "scores"))
    picture = np.moveaxis(picture, -1, 1)
    return picture.reshape(*picture.shape[:2], *((1,) * (4 - picture.ndim)), *picture.shape[2:]), scores


def layer(kind, name, **settings):
    return {"class_name": kind, "config": {"name": name, **settings}}


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


FUNCTIONAL = {"class_name": "Functional", "config": {
    "name": "net", "layers": [
        layer("InputLayer", "x", batch_shape=[None, 6, 5, 2]) | {"inbound_nodes": []},
        CONVOLUTION | {"inbound_nodes": [[["x", 0, 0, {}]]]},
        layer("Add", "sum") | {"inbound_nodes": [[["conv", 0, 0, {}], ["conv", 0, 0, {}]]]},
        POOL | {"inbound_nodes": [[["sum", 0, 0, {}]]]}],
    "input_layers": [["x", 0, 0]], "output_layers": [["pool", 0, 0]]}}


def zipped(*members, method=zipfile.ZIP_STORED):
    """The bytes of a zip file, the same at any time."""
    image = io.BytesIO()
    with zipfile.ZipFile(image, "w", method) as archive:
        for name, content in members:
            archive.writestr(zipfile.ZipInfo(name), content, method)
    return image.getvalue()


def tensor(name, dtype="float32"):
    """What an operation of Keras 3 is called on: the output of the layer or operation `name`."""
    return {"class_name": "__keras_tensor__", "config": {"shape": [None, 6, 5, 3], "dtype": dtype,
                                                         "keras_history": [name, 0, 0]}}


def operation(kind, name, *arguments, **config):
    """A function of Keras 3 in a functional model, such as x / 127.5."""
    return {"module": "keras.src.ops.numpy", "class_name": kind, "config": {"name": name, **config},
            "registered_name": kind, "name": name, "inbound_nodes": [{"args": list(arguments), "kwargs": {}}]}


def functional(*operations, shape=(6, 5, 3), dtype="float32"):
    """The configuration of a model: operations on "x", and of the last a mean over the image."""
    entries = [layer("InputLayer", "x", batch_shape=[None, *shape], dtype=dtype) | {"inbound_nodes": []}, *operations,
               POOL | {"name": "pool", "inbound_nodes": [{"args": [tensor(operations[-1]["name"])], "kwargs": {}}]}]
    return {"class_name": "Functional", "config": {"name": "net", "layers": entries, "input_layers": ["x", 0, 0],
                                                   "output_layers": ["pool", 0, 0]}}
