"""Makes innvestigate.npz: what iNNvestigate 2.1.2 computes by `deep_taylor` and `deep_taylor.bounded` on a small
network.

    make .venv-innvestigate/ready
    .venv-innvestigate/bin/python tests/recorded/record_innvestigate.py

The network has each kind of layer that the presets treat in a way of their own; pictures are between -1 and 2.
test_presets.py reads it.
"""

from pathlib import Path

import numpy as np
import tensorflow as tf

tf.compat.v1.disable_eager_execution()
import innvestigate  # noqa: E402  # after the switch that it asks for
from tensorflow.keras import layers as k  # noqa: E402  # as above

SHAPE, LOW, HIGH = (9, 11, 3), -1.0, 2.0


def network():
    start = k.Input(SHAPE)
    a = k.Conv2D(6, 3, strides=2, padding="valid", activation="relu", name="a")(start)
    b = k.Conv2D(5, (2, 3), padding="same", activation="relu", name="b")(a)
    pooled = k.MaxPooling2D((2, 2), (1, 1))(k.Concatenate()([a, b]))
    c = k.Conv2D(7, 1, activation="relu", name="c")(k.AveragePooling2D((3, 2), (1, 1))(pooled))
    d = k.Dense(8, activation="relu", name="d")(k.Flatten()(k.Permute((3, 1, 2))(c)))
    return tf.keras.Model(start, k.Dense(4, name="e")(d))


def main():
    rng = np.random.default_rng(0)
    model = network()
    for layer in model.layers:
        if layer.get_weights():
            kernel, bias = layer.get_weights()
            layer.set_weights([rng.standard_normal(kernel.shape) * np.sqrt(2 / np.prod(kernel.shape[:-1])),
                               0.1 * rng.standard_normal(bias.shape)])
    pictures = rng.uniform(LOW, HIGH, (6, *SHAPE)).astype(np.float32)
    scores = model.predict(pictures)
    target = int((scores > 0).sum(0).argmax())
    pictures, scores = pictures[scores[:, target] > 0], scores[scores[:, target] > 0]
    recorded = {
        "pictures": pictures.transpose(0, 3, 1, 2), "target": target, "low": LOW, "high": HIGH, "scores": scores
    }
    for layer in model.layers:
        if layer.get_weights():
            kernel, bias = layer.get_weights()
            recorded[layer.name] = kernel.transpose(3, 2, 0, 1) if kernel.ndim == 4 else kernel.T
            recorded[f"{layer.name} bias"] = bias
    for name, options in (("deep_taylor", {}), ("deep_taylor.bounded", {"low": LOW, "high": HIGH})):
        analyzer = innvestigate.create_analyzer(name, model, neuron_selection_mode="index", **options)
        recorded[name] = analyzer.analyze(pictures, neuron_selection=target).transpose(0, 3, 1, 2)
    np.savez_compressed(Path(__file__).with_name("innvestigate.npz"), **recorded)


if __name__ == "__main__":
    main()
