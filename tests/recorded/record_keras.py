"""Makes the files in tests/recorded/keras: small networks as Keras saves them, and their scores.

Run once with Keras 2 (TensorFlow 2.14) and once with Keras 3, for their files differ:

    python tests/recorded/record_keras.py

Weights are random; each network is saved as .keras or .h5, and scores.npz gets an input and what Keras makes of it.
"""

import io
import os
import zipfile
from pathlib import Path

os.environ.setdefault("KERAS_BACKEND", "jax")

import keras
import numpy as np

L = keras.layers
OUT = Path(__file__).parent / "keras"
DIALECT = f"keras{keras.__version__.split('.', maxsplit=1)[0]}"


def sequential(shape, *layers):
    return keras.Sequential([keras.Input(shape), *layers])


def convolutions():
    return sequential((15, 14, 3), L.Rescaling([0.5, 1.0, 2.0], offset=-0.25),
                      L.Conv2D(6, 3, strides=2, padding="same", name="stem"), L.BatchNormalization(), L.ReLU(6.0),
                      L.ZeroPadding2D(((0, 1), (2, 1))), L.DepthwiseConv2D(3, depth_multiplier=2, strides=2),
                      L.BatchNormalization(scale=False), L.Activation("relu6"),
                      L.SeparableConv2D(8, (3, 2), padding="same", activation="relu"),
                      L.Conv2D(4, 3, dilation_rate=2, padding="same", groups=2,
                               use_bias=False, activation="leaky_relu"), L.Dropout(0.5), L.SpatialDropout2D(0.5),
                      L.Flatten(), L.Dense(7, activation="relu"), L.BatchNormalization(center=False),
                      L.Dense(5, activation="softmax"))


def pools():
    x = image = keras.Input((13, 12, 4))
    x = L.Conv2D(4, 3, activation="relu", padding="same")(x)
    a = L.MaxPooling2D(3, 2)(L.ZeroPadding2D(1)(x))  # zeros join what is positive
    b = L.MaxPooling2D(3, 2, padding="same")(x)
    c = L.AveragePooling2D(3, 2, padding="same")(x)
    d = L.AveragePooling2D(3, 2)(L.ZeroPadding2D(1)(x))
    e = L.MaxPooling2D(3, 2)(L.ZeroPadding2D(1)(L.Conv2D(3, 1)(x)))  # and are seen among the negative
    y = L.Concatenate()([a, b, c, d, e])
    z = L.GlobalAveragePooling2D(keepdims=True)(y)
    z = L.Conv2D(6, 1, name="mixed")(z)
    z = L.Reshape((6,))(z)
    w = L.GlobalMaxPooling2D()(y)
    return keras.Model(image, L.Dense(4)(L.Concatenate()([z, w])))


def nested():
    block = keras.Sequential([L.Input((6, 6, 4)), L.Conv2D(4, 3, padding="same"),
                              L.LeakyReLU(0.25)], name="block")  # called twice
    inner_in = keras.Input((6, 6, 3))
    y = L.Conv2D(4, 1, name="inner_conv")(inner_in)
    y = block(block(y))
    inner = keras.Model(inner_in, L.BatchNormalization()(y), name="inner")
    image = keras.Input((6, 6, 3))
    mean, variance = [0.1, 0.2, 0.3], [1.0, 4.0, 0.25]
    x = inner(L.Normalization(mean=mean, variance=variance)(image), training=False)
    shortcut = L.Conv2D(4, 1)(image)
    x = L.Add()([x, shortcut, x])
    x = L.ReLU(max_value=2.0, negative_slope=0.1)(x)
    return keras.Model(image, keras.Sequential([L.Input((6, 6, 4)), L.Flatten(), L.Dense(5)], name="head")(x))


def order():
    x = image = keras.Input((6, 8, 4))
    x = L.Conv2D(6, 3, activation="relu")(x)
    x = L.Reshape((4, 6, 2, 3))(x)  # a shuffle of channels, through five axes
    x = L.Reshape((4, 6, 6))(L.Permute((1, 2, 4, 3))(x))
    x = L.Permute((2, 1, 3))(x)
    x = L.UpSampling2D((2, 1))(x)
    x = L.Cropping2D(((1, 2), (0, 1)))(x)
    x = L.ReLU()(x)
    x = L.Conv2DTranspose(3, 3, strides=2, padding="same")(x)
    x = L.Conv2DTranspose(3, (2, 4), strides=(3, 2))(x)
    x = L.Dense(2)(x)  # at every place
    x = L.AveragePooling2D(4)(x)
    x = L.BatchNormalization()(L.Flatten()(x))
    return keras.Model(image, L.Dense(3)(x))


def transposed():
    x = image = keras.Input((4, 5, 2))
    parts = [
        L.Conv2DTranspose(2, kernel, strides=stride, padding=padding, output_padding=extra)(x)
        for kernel, stride, padding, extra in [(3, 2, "valid", None), (2, 3, "same",
                                                                       None), (3, 2, "same",
                                                                               1), (4, 3, "valid",
                                                                                    2), (5, 2, "same",
                                                                                         0), (3, 1, "valid", None)]
    ]
    return keras.Model(image, L.Concatenate()([L.Dense(2)(L.Flatten()(part)) for part in parts]))


def one_dimension():
    return sequential((19, 3), L.ZeroPadding1D((2, 1)),
                      L.Conv1D(4, 3, padding="causal", dilation_rate=2, activation="relu"), L.MaxPooling1D(2),
                      L.Conv1D(5, 3, strides=2, padding="same"), L.BatchNormalization(), L.ReLU(negative_slope=0.2),
                      L.UpSampling1D(3), L.Cropping1D(1), L.AveragePooling1D(3, 2, padding="same"),
                      L.SeparableConv1D(4, 2), L.Conv1DTranspose(3, 3, strides=2), L.Permute((2, 1)), L.Permute((2, 1)),
                      L.GlobalAveragePooling1D(), L.Dense(2))


def flat():
    normalization = L.Normalization()
    normalization.adapt(np.random.default_rng(5).normal(2, 3, (50, 12)).astype(np.float32))
    return sequential((12, ), normalization, L.Reshape((2, 3, 2)), L.Conv2D(3, 2, activation="relu"), L.Flatten(),
                      L.GaussianNoise(0.1), L.Dense(4), L.Softmax())


NETWORKS = [convolutions, pools, nested, order, transposed, one_dimension, flat]


def record():
    OUT.mkdir(exist_ok=True)
    path = OUT / "scores.npz"
    scores = dict(np.load(path)) if path.exists() else {}
    for seed, make in enumerate(NETWORKS):
        keras.backend.clear_session()
        model = make()
        random = np.random.default_rng(seed)
        model.set_weights(
            [_numbers(v.name, value, random) for v, value in zip(model.weights, model.get_weights(), strict=True)])
        shape = model.input_shape[1:]
        picture = random.normal(size=(2, *shape)).astype(np.float32)
        for suffix in ("keras", "h5") if make in (convolutions, nested, flat) else ("keras",):
            file = OUT / f"{make.__name__}.{DIALECT}.{suffix}"
            model.save(file)
            if suffix == "keras":
                _pack(file)
        scores[f"{make.__name__}.{DIALECT}.input"] = picture
        scores[f"{make.__name__}.{DIALECT}.scores"] = np.asarray(model.predict(picture, verbose=0))
    np.savez_compressed(path, **scores)


def _numbers(name, value, random):
    if name.split(":")[0] in ("mean", "variance",
                              "count"):  # a Normalization takes these up when it is adapted or loaded
        return value
    numbers = random.normal(size=value.shape).astype(np.float32)
    return np.abs(numbers) + 0.5 if "variance" in name else numbers / np.sqrt(max(value.size // value.shape[-1],
                                                                                  4)).astype(np.float32)


def _pack(file):
    """Deflated, for the repository; the content is as Keras wrote it."""
    with zipfile.ZipFile(file) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    image = io.BytesIO()
    with zipfile.ZipFile(image, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(zipfile.ZipInfo(name), content, zipfile.ZIP_DEFLATED)
    file.write_bytes(image.getvalue())


if __name__ == "__main__":
    record()
