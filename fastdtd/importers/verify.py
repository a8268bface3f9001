"""How far a converted network's scores are from those of its source, run by the source's own runtime."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from fastdtd.errors import ConversionError, ModelError
from fastdtd.importers.sources import KERAS_SUFFIXES, FilePath, TorchSource, parse_files
from fastdtd.model import Model


def verify(model: Model, source: FilePath | TorchSource) -> float:
    """How far a converted network's scores are from those of its source.

    What runs the source is onnxruntime or Keras on the file, or PyTorch on the module.

    Parameters
    ----------
    model : Model
    source : path or TorchSource
        The .onnx, .keras, .h5 or .hdf5 file, or the module as `opened` gives it.

    Returns
    -------
    float
        The largest difference on four random inputs, relative to the largest score.

    Raises
    ------
    ConversionError
        No onnxruntime or Keras, a source of another kind, or one that does not run.
    """
    runtime = runtime_of(source)
    runtimes: dict[str, Callable[[Any, Any, Model], Any]] = {
        "onnxruntime": _onnxruntime_scores, "Keras": _keras_scores, "PyTorch": _torch_scores}
    from fastdtd.explainer import Explainer

    graph = model.graph
    low, high = (-1.0, 1.0) if graph.box is None else (bound[:, None, None] for bound in graph.box)
    batch = np.asarray(low + (high - low) * np.random.default_rng(0).random((4, *graph.input_shape)), np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of scores that are not positive
        scores = Explainer(model)(batch).output
    try:
        theirs = runtimes[runtime](source, batch, model)
    except ModuleNotFoundError as error:
        packages = "onnxruntime" if runtime == "onnxruntime" else "keras tensorflow"
        raise ConversionError(f"{error}; `pip install {packages}` installs what verifying takes") from None
    except (ConversionError, ModelError):
        raise
    except Exception as error:  # all have many kinds, and none in common
        message = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
        advice = "; required: the version that wrote the file, for Keras 3 reads few files of Keras 2"
        advice = advice if runtime == "Keras" else ""
        raise ConversionError(f"{source}: {runtime} cannot run it: {message}{advice}") from error
    if theirs.shape != scores.shape:
        raise ConversionError(f"{source}: {runtime} gives {theirs.shape[1]} outputs, the converted network "
                              f"{scores.shape[1]}")
    exponents = np.exp(scores - scores.max(1, keepdims=True))
    probabilities = exponents / exponents.sum(1, keepdims=True)
    if np.allclose(theirs.sum(1), 1, atol=1e-3) and (theirs >= 0).all():  # after a softmax, which conversion drops
        scores = probabilities
    elif np.allclose(np.exp(theirs).sum(1), 1, atol=1e-3):
        scores = np.log(probabilities)
    return float(np.abs(scores - theirs).max() / np.abs(theirs).max())


def runtime_of(source: FilePath | TorchSource) -> str:
    """What runs a source to verify it: "onnxruntime", "Keras" or "PyTorch"; ConversionError where there is nothing."""
    if isinstance(source, TorchSource):
        return "PyTorch"
    kind = Path(source).suffix.lower()
    if kind == ".onnx":
        return "onnxruntime"
    if kind in KERAS_SUFFIXES:
        return "Keras"
    raise ConversionError(f"{source}: only .onnx files can be verified, by onnxruntime, .keras, .h5 and .hdf5 files, "
                          "by Keras, and PyTorch modules; there is no runtime here for others")


def _onnxruntime_scores(source: FilePath, batch: Any, model: Model) -> Any:
    import onnxruntime

    from fastdtd.importers.onnx import CHANNELS_LAST

    session = onnxruntime.InferenceSession(str(source), providers=["CPUExecutionProvider"])
    name, output = session.get_inputs()[0], session.get_outputs()[0].name
    images = {2: batch[:, :, 0, 0], 3: batch[:, :, 0]}.get(len(name.shape), batch)
    if model.provenance.get("format", "").endswith(CHANNELS_LAST):
        images = np.ascontiguousarray(batch.transpose(0, 2, 3, 1))
    size = name.shape[0] if isinstance(name.shape[0], int) and name.shape[0] > 0 else 1
    repeated = [np.repeat(image[None], size, 0) for image in images]
    return np.concatenate([session.run([output], {name.name: same})[0].reshape(size, -1)[:1] for same in repeated])


def _keras_scores(source: FilePath, batch: Any, _: Model) -> Any:
    import keras

    # Keras runs the code in a file, and this refuses it.
    parse_files([Path(source)], batch.shape[2:] if batch.shape[2] > 1 else None)
    network = keras.models.load_model(str(source), compile=False)
    images = {2: batch[:, :, 0, 0], 3: batch[:, :, 0].transpose(0, 2, 1), 4: batch.transpose(0, 2, 3, 1)}
    scores = network.predict(images[len(network.inputs[0].shape)], verbose=0)
    return np.reshape(scores[0] if isinstance(scores, list) else scores, (len(batch), -1))


def _torch_scores(source: TorchSource, batch: Any, _: Model) -> Any:
    from fastdtd.importers import pytorch

    return pytorch.scores(source.module, batch)
