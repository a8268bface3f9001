"""iNNvestigate's deep Taylor decomposition of a network in fastdtd's file format, on demand: compare.py runs this in
iNNvestigate's own environment, which needs an older NumPy and TensorFlow.

    .venv-innvestigate/bin/python benchmarks/innvestigate_server.py FOLDER THREADS RULES RESULT

As contenders.py, with the one rule that it has, and for all pictures the first one's target. It knows layers one after
the other: convolutions without groups, ReLU, max-pools, flatten, dense.
"""

import sys
from pathlib import Path

import h5py
import numpy as np
import tensorflow as tf
from contenders import serve

tf.compat.v1.disable_eager_execution()
import innvestigate  # noqa: E402  # after the switch that it asks for
from tensorflow.keras import layers as k  # noqa: E402  # as above


def model_of(path):
    with h5py.File(path) as file:
        shape = [int(n) for n in file["input"].attrs["shape"]]
        x = start = k.Input((shape[1], shape[2], shape[0]))
        weights = []
        for name in sorted(file["layers"]):
            layer = file["layers"][name]
            x, made = keras_layer(layer, x)
            if made is not None:
                kernel = layer["weight"][()]
                weights.append(
                    (made, [kernel.transpose(2, 3, 1, 0) if kernel.ndim == 4 else kernel.T, layer["bias"][()]]))
    for made, values in weights:
        made.set_weights(values)
    return tf.keras.Model(start, x)


def keras_layer(layer, x):
    """(what the layer makes of x, the Keras layer if it has weights)"""
    def setting(name, count, default=None):
        return [int(n) for n in np.resize(layer.attrs.get(name, default), count)]

    kind = layer.attrs["type"]
    kind = kind.decode() if isinstance(kind, bytes) else kind
    if kind == "conv2d":
        top, left, bottom, right = setting("padding", 4, 0)
        if setting("groups", 1, 1) != [1] or setting("dilation", 2, 1) != [1, 1]:
            raise ValueError("groups or dilation")
        if top or left or bottom or right:
            x = k.ZeroPadding2D(((top, bottom), (left, right)))(x)
        outputs, _, *kernel = layer["weight"].shape
        made = k.Conv2D(outputs, kernel, setting("stride", 2, 1))
    elif kind == "dense":
        made = k.Dense(layer["weight"].shape[0])
    elif kind == "relu":
        return k.Activation("relu")(x), None
    elif kind == "max_pool2d" and not any(setting("padding", 4, 0)) and setting("ceil_mode", 1, 0) == [0]:
        return k.MaxPooling2D(setting("kernel", 2), setting("stride", 2, 1))(x), None
    elif kind == "flatten":
        return k.Flatten()(k.Permute((3, 1, 2))(x)), None  # channels first, as the weights after it are
    else:
        raise ValueError(f"{kind} is nothing that is compared here")
    return made(x), made


def main():
    folder, threads, _, result = sys.argv[1:]
    tf.config.threading.set_intra_op_parallelism_threads(int(threads))
    tf.config.threading.set_inter_op_parallelism_threads(1)
    analyzer = innvestigate.create_analyzer("deep_taylor", model_of(Path(folder, "net.h5")),
                                            neuron_selection_mode="index")
    batch = np.load(Path(folder, "pictures.npy")).transpose(0, 2, 3, 1)
    target = int(np.load(Path(folder, "targets.npy"))[0])
    serve({None: lambda: analyzer.analyze(batch, neuron_selection=target).transpose(0, 3, 1, 2)}, result)


if __name__ == "__main__":
    main()
