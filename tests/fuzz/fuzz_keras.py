"""Keras: the configuration as a tree, the members of .keras files, .h5 files as HDF5."""

import io
import json
import tempfile
import zipfile
from pathlib import Path

import h5py
from fuzz_hdf5 import Map, mutated
from fuzzing import Format, check_model, convert
from importing import numbers
from keras_models import FUNCTIONAL, RECORDED, keras_file, layer, legacy_file, zipped
from mutating import smaller_trees, spoil_tree, spoiled

from fastdtd.importers.keras.operators import INSTEAD, OPERATORS

WORDS = (*OPERATORS, *INSTEAD, "Sequential", "Functional", "Model", "relu", "softmax", "sigmoid", "relu6", "linear",
         "valid", "same", "causal", "channels_first", "channels_last", "nearest", "bilinear", "x", "", "a" * 300)
CONFIG, WEIGHTS = "config.json", "model.weights.h5"


def bases():
    made = [(RECORDED / f"{name}.keras3.keras").read_bytes() for name in ("flat", "pools", "nested", "one_dimension")]
    conv = layer("Conv2D", "conv", filters=3, kernel_size=[2, 2], strides=[2, 1], padding="same", activation="relu")
    sizes = {"conv/kernel:0": numbers(2, 2, 2, 3), "conv/bias:0": numbers(3)}
    with tempfile.TemporaryDirectory() as name:
        made.append(keras_file(Path(name), config=FUNCTIONAL).read_bytes())
        legacy = legacy_file(Path(name), {f"conv/{key}": value for key, value in sizes.items()}, conv,
                             layer("BatchNormalization", "norm", scale=False, center=False),
                             layer("ZeroPadding2D", "pad", padding=[[1, 0], [0, 2]]))
        with h5py.File(legacy, "a") as file:
            for i, what in enumerate(("moving_mean", "moving_variance")):
                file[f"model_weights/norm/norm/{what}:0"] = numbers(3, seed=i) ** 2
        made.append(legacy.read_bytes())
    return [{"net.keras" if content.startswith(b"PK") else "net.h5": content} for content in made]


def members(content):
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return {info.filename: archive.read(info) for info in archive.infolist()}


BASES = bases()
MAPS = {}
for base in BASES:
    for content in base.values():
        weights = members(content)[WEIGHTS] if content.startswith(b"PK") else content
        MAPS[weights] = Map(weights)


def mutate(case, rng):
    [(name, content)] = case.items()
    how = rng.random()
    if how < 0.1:
        return {name: spoiled(rng, content)}
    if name == "net.h5":
        if how < 0.4:
            return {name: mutated(rng, content, MAPS[content])}
        with h5py.File(io.BytesIO(content)) as file:
            config = json.loads(file.attrs["model_config"])
        spoil_tree(rng, config, WORDS)
        image = io.BytesIO(content)
        with h5py.File(image, "a") as file:
            file.attrs["model_config"] = json.dumps(config)
        return {name: image.getvalue()}
    parts = members(content)
    if how < 0.4:
        parts[WEIGHTS] = mutated(rng, parts[WEIGHTS], MAPS[parts[WEIGHTS]])
    elif how < 0.5:
        parts[CONFIG] = spoiled(rng, parts[CONFIG])
    else:
        config = json.loads(parts[CONFIG])
        spoil_tree(rng, config, WORDS)
        parts[CONFIG] = json.dumps(config).encode()
    if rng.random() < 0.05:
        parts[CONFIG] = b"[" * 100_000 if rng.random() < 0.5 else parts[CONFIG].replace(b"[", b"[" * 900)
    changed = zipped(*parts.items(), method=rng.choice([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED]))
    return {name: spoiled(rng, changed, range(len(changed) - 300, len(changed))) if rng.random() < 0.1 else changed}


def use(folder):
    [file] = folder.glob("net.*")
    check_model(convert(file), folder)


def smaller(case):
    try:
        parts = members(case["net.keras"])
        config = json.loads(parts[CONFIG])
    except Exception:  # no such file
        return
    for one in smaller_trees(config):
        yield {"net.keras": zipped(*(parts | {CONFIG: json.dumps(one).encode()}).items())}


FORMAT = Format("keras", BASES, mutate, use, smaller)
