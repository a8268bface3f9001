"""Keras's own networks, as Keras writes them: its scores, and relevance that is conserved."""

import os

import numpy as np
import pytest

os.environ.setdefault("KERAS_BACKEND", "torch")
keras = pytest.importorskip("keras")

import fastdtd  # noqa: E402

# By name in the table: the function's, and the size of its input.
NETWORKS = {
    "MobileNet": ("MobileNet", 96), "MobileNet v2": ("MobileNetV2", 96), "MobileNet v3 small": ("MobileNetV3Small", 96),
    "MobileNet v3 large": ("MobileNetV3Large", 96), "EfficientNet-B0": ("EfficientNetB0", 96),
    "EfficientNet v2 B0": ("EfficientNetV2B0", 96), "EfficientNet v2 S": ("EfficientNetV2S", 96),
    "ConvNeXt-Tiny": ("ConvNeXtTiny", 96), "DenseNet-121": ("DenseNet121", 96), "ResNet-50": ("ResNet50", 96),
    "ResNet-50 v2": ("ResNet50V2", 96), "Inception v3": ("InceptionV3", 139), "Xception": ("Xception", 139),
    "Inception-ResNet v2": ("InceptionResNetV2", 139), "VGG-16": ("VGG16", 96)
}


def build(function, size):
    """With random weights, and norms that do something."""
    keras.utils.set_random_seed(3)
    network = getattr(keras.applications, function)(weights=None, input_shape=(size, size, 3),
                                                    classifier_activation=None, classes=10)
    random = np.random.default_rng(0)
    for layer in network.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.moving_mean.assign(0.05 * random.standard_normal(layer.moving_mean.shape))
            layer.moving_variance.assign(random.uniform(0.8, 1.2, layer.moving_variance.shape))
        if type(layer).__name__ == "LayerScale":
            layer.gamma.assign(random.uniform(0.1, 0.5, layer.gamma.shape))
    return network


@pytest.mark.parametrize("name", NETWORKS)
def test_scores_and_conservation(name, tmp_path, rows):
    function, size = NETWORKS[name]
    network, path = build(function, size), tmp_path / "network.keras"
    network.save(path)
    batch = np.random.default_rng(1).uniform(0, 255, (2, size, size, 3)).astype(np.float32)
    expected = network.predict(batch, verbose=0)
    e = fastdtd.Explainer(fastdtd.convert(path))(batch.transpose(0, 3, 1, 2))
    scale = np.abs(expected).max()
    difference = np.abs(e.output - expected).max() / scale
    assert difference < 5e-5  # both compute in float32, and random weights leave little of much (VGG-16: 2e-5)
    off = np.abs(e.sum + e.absorbed - e.explained).max() / scale
    assert off < 1e-5
    assert e.relevance.min() >= 0
    absorbed = (e.absorbed / e.explained).max()
    print(f"{name}: scores within {difference:.1e}, conserved to {off:.1e}, absorbed {absorbed:.1%}")
    rows["networks"].append([name, "Keras", f"{difference:.0e}", f"{off:.0e}", "", f"{absorbed:.1%}"])


@pytest.mark.parametrize("function", ["ConvNeXtTiny", "InceptionResNetV2"])
def test_the_older_format(function, tmp_path):
    """Which does not name the modules of layers."""
    size = 139 if function == "InceptionResNetV2" else 64
    network, path = build(function, size), tmp_path / "network.h5"
    network.save(path)
    batch = np.random.default_rng(1).uniform(0, 255, (1, size, size, 3)).astype(np.float32)
    expected = network.predict(batch, verbose=0)
    scores = fastdtd.Explainer(fastdtd.convert(path))(batch.transpose(0, 3, 1, 2)).output
    assert np.abs(scores - expected).max() < 5e-5 * np.abs(expected).max()
