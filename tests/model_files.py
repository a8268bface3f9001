"""A small model file for tests that spoil it."""

import h5py
import numpy as np

from fastdtd.model_file import load


def numbers(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def write_small(path):
    """A valid file, written by hand."""
    with h5py.File(path, "w") as file:
        file.attrs["format"] = "fastdtd-model"
        file.attrs["version"] = 1
        file.create_group("input").attrs["shape"] = [3, 4, 4]
        file["input"].attrs["color"] = "rgb"
        conv = file.create_group("layers/a")
        conv.attrs["type"], conv.attrs["inputs"] = "conv2d", "input"
        conv["weight"], conv["bias"] = numbers(2, 3, 1, 1), numbers(2)
        pool = file.create_group("layers/b")
        pool.attrs["type"], pool.attrs["inputs"] = "global_average_pool", "a"
        file["classes"] = ["x", "y"]
        file.create_group("provenance").attrs["source"] = "random numbers"
    load(path)
    return path
