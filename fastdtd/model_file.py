"""Model files: one HDF5 file holds a network, its preprocessing, its class names and where they come from.

docs/model-format.md is the specification. Files come from anywhere, so nothing is opened that could lead out of the
file, and nothing is read before its type and size are known to be sane.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from fastdtd import hdf5
from fastdtd.errors import InputError, ModelError, OutputError, out_of_memory, shown
from fastdtd.files import as_path, replace
from fastdtd.graph import (
    LAYER_TYPES,
    MAX_LAYERS,
    MAX_TENSOR_ELEMENTS,
    MAX_WEIGHT_ELEMENTS,
    Array,
    Conv2d,
    Dense,
    Graph,
    Layer,
    Rearrange,
    Resize,
)
from fastdtd.hdf5_format import Object
from fastdtd.model import Model, Preprocessing

if TYPE_CHECKING:
    import h5py

FORMAT = "fastdtd-model"
VERSION = 1
# Settings that are no integers; a bias with a dataset is none of them.
_NUMBERS = ("low", "high", "alpha", "beta", "bias", "epsilon", "slope", "exponent")
_MARKS = "batch_norm", "registered_later"  # written where they are true, so that readers that know none read the rest
_FLAGS = "ceil_mode", "centered", "count_include_pad", "per_position", "within_channel", *_MARKS
DTYPES = ("float16", "float32", "float64")
COMPRESSIONS = ("gzip", "lzf", None)

MAX_TOTAL_WEIGHTS = 2**31
MAX_CLASSES = 1_000_000
MAX_CLASSES_BYTES = 2**26  # all class names together

MODELS = Path(__file__).parent / "models"
_BUNDLED_SUFFIX = ".h5"
_LAYER_NAMES = {cls: name for name, cls in LAYER_TYPES.items()}
_RANKS = {(Conv2d, "weight"): 4, (Dense, "weight"): 2, (Rearrange, "index"): 3, (Resize, "rows"): 2,
          (Resize, "columns"): 2}  # every other array is a vector
_REQUIRED = "an undamaged fastdtd model file (fastdtd.convert makes one from other formats)"


def load(source: str | os.PathLike[str]) -> Model:
    """Read a model file.

    Parameters
    ----------
    source : path or str
        A file as docs/model-format.md specifies it, or the name of a bundled model, such as ``"squeezenet1_1"``.

    Returns
    -------
    Model

    Raises
    ------
    ModelError
        What is no readable, valid model file. Damaged and hostile files included.

    Examples
    --------
    >>> import fastdtd
    >>> fastdtd.load("squeezenet1_1").class_name(285)
    'Egyptian cat'
    """
    path = _locate(str(as_path(source, ModelError, "the path of a model file or the name of a bundled model")))
    try:
        with out_of_memory(ModelError, "required: a machine with more, or a smaller network"):
            return _read(path)
    except ModelError as error:
        raise ModelError(f"model file {str(path)!r}: {error}") from error


def save(model: Model, path: str | os.PathLike[str], dtype: str = "float32", compression: str | None = "gzip") -> None:
    """Write a model file. The same model makes the same bytes (with the same HDF5). A file already there is replaced
    only by a whole one.

    Parameters
    ----------
    model : Model
    path : path
    dtype : {"float32", "float16", "float64"}
        What the weights are stored as. float32 keeps every bit.
    compression : {"gzip", "lzf", None}
        gzip is read by every HDF5 library, lzf by h5py alone.

    Raises
    ------
    InputError
        An unknown `dtype` or `compression`.
    ModelError
        A model that does not fit the format: weights beyond float16, names or texts that are too long.
    OutputError
        The file cannot be written.

    Examples
    --------
    >>> import fastdtd
    >>> fastdtd.save(fastdtd.load("squeezenet1_1"), "net.h5", dtype="float16")
    """
    if not isinstance(model, Model):
        raise InputError(f"the model is {shown(model)}, of type {type(model).__name__}; required: a Model")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise InputError(f"dtype is {shown(dtype)}; required: one of {', '.join(DTYPES)}")
    if compression is not None and (not isinstance(compression, str) or compression not in COMPRESSIONS):
        raise InputError(f"compression is {shown(compression)}; required: 'gzip', 'lzf' or None")
    file = as_path(path, OutputError, "the path of the file to write")
    image = io.BytesIO()  # HDF5 does not recover from a full disk; plain writing does
    try:
        _write(model, image, np.dtype(dtype).newbyteorder("<"), compression)
        _read(image)  # the reader's limits hold for the writer too
    except ModelError as error:
        raise ModelError(f"the model cannot be saved: {error}") from error
    try:
        replace(file, lambda beside: beside.write_bytes(image.getbuffer()))
    except (OSError, ValueError) as error:  # ValueError: a name that the system cannot write
        raise OutputError(
            f"cannot write {str(file)!r}: {error}; required: a folder that can be written and has free space"
        ) from error


def _locate(source: str) -> Path:
    bundled = MODELS / (source + _BUNDLED_SUFFIX)
    is_bare = Path(source).name == source and not Path(source).suffix
    if is_bare and not os.path.isfile(source) and os.path.isfile(bundled):
        return bundled
    if os.path.lexists(source):
        return Path(source)
    names = ", ".join(sorted(p.stem for p in MODELS.glob("*" + _BUNDLED_SUFFIX))) or "none"
    raise ModelError(
        f"model file {source!r} does not exist; required: the path of a model file or the name of a bundled model "
        f"(bundled: {names})")


def _read(source: Path | io.BytesIO) -> Model:
    with hdf5.opened(source, _REQUIRED) as file:
        names = hdf5.named_attributes(file, "the file")
        found = {
            name: hdf5.values(names[name], file.content, f"root attribute {name!r}") for name in ("format", "version")
            if name in names
        }
        if found.get("format") != [FORMAT]:
            raise ModelError(f"has no root attribute 'format' that says {FORMAT!r}; required: {_REQUIRED}")
        if found.get("version") != [VERSION]:
            raise ModelError(
                f"has format version {hdf5.shown(found.get('version'))}; this fastdtd reads version {VERSION}. Install "
                "the fastdtd that wrote it, or save the model again with this one")
        hdf5.require_known(names, ("format", "version"), "the file", "attribute")
        parts = hdf5.children(file, "the file", 4, ("input", "layers", "classes", "provenance"))
        for name in ("input", "layers"):
            if name not in parts:
                raise ModelError(f"has no group '/{name}'; required: {_REQUIRED}")
        shape, box, preprocessing, inputs = _read_input(hdf5.group(parts["input"], "/input"))
        pending = _read_layers(hdf5.group(parts["layers"], "/layers"))
        classes: tuple[str, ...] = ()
        if "classes" in parts:
            classes = hdf5.strings(parts["classes"], "/classes", MAX_CLASSES, MAX_CLASSES_BYTES)
        provenance = _read_provenance(hdf5.group(parts["provenance"], "/provenance")) if "provenance" in parts else {}
    # Outside the file, so that a mistake of ours is not taken for damage. A layer copies its arrays; popping frees them
    # one by one.
    pending.reverse()
    layers = []
    while pending:
        make, fields = pending.pop()
        layers.append(make(**fields))
    return Model(Graph(tuple(layers), shape, box), preprocessing, classes, provenance, inputs)


def _read_input(group: Object) -> tuple[Any, tuple[Array, Array] | None, Preprocessing, dict[str, Any]]:
    found = hdf5.attributes(group, "/input", ("shape", "color", "resize", "scale", "names", "shapes"))
    datasets = hdf5.children(group, "/input", 3, ("mean", "std", "box"))
    shape = found.get("shape")
    if shape is None or len(shape) != 3 or not all(isinstance(v, int) for v in shape):
        raise ModelError(f"/input has shape {hdf5.shown(shape)}; required: 3 integers (channels, height, width)")
    fields: dict[str, Any] = {"color": None}
    for name, kind in (("color", str), ("resize", str), ("scale", (int, float))):
        if name in found:
            fields[name] = hdf5.single(found[name], kind, f"/input attribute {name!r}")
    for name in ("mean", "std"):
        if name in datasets:
            fields[name] = hdf5.array(datasets[name], f"/input/{name}", (0, 1, 3), MAX_TENSOR_ELEMENTS)
    box = None
    if "box" in datasets:
        bounds = hdf5.array(datasets["box"], "/input/box", (2,), 2 * MAX_TENSOR_ELEMENTS)
        if bounds.shape != (shape[0], 2):
            raise ModelError(
                f"/input/box has shape {bounds.shape}; required: ({shape[0]}, 2), lowest and highest value of each "
                "channel"
            )
        box = bounds[:, 0], bounds[:, 1]
    names, sizes = found.get("names", []), found.get("shapes", [])
    if len(sizes) != 3 * len(names) or len(set(names)) < len(names) or not all(
            isinstance(n, str) for n in names) or not all(isinstance(n, int) for n in sizes):
        raise ModelError(f"/input has names {hdf5.shown(names)} and shapes {hdf5.shown(sizes)}; required: a name for "
                         "each of several inputs, and 3 integers for each name")
    inputs = {name: tuple(sizes[3 * i:3 * i + 3]) for i, name in enumerate(names)}
    return tuple(shape), box, Preprocessing(**fields), inputs


def _read_layers(group: Object) -> list[tuple[type[Layer], dict[str, Any]]]:
    """Each layer's class and what to make it with."""
    pending = []
    total = 0
    owners: dict[int, str] = {}  # a link more costs a file nothing, but memory
    for link, child in hdf5.children(group, "/layers", MAX_LAYERS).items():
        where = f"group {link!r} of /layers"
        layer = hdf5.group(child, where)
        found = hdf5.attributes(layer, where)
        kind = hdf5.single(found.get("type"), str, f"{where} attribute 'type'")
        name = hdf5.single(found.get("name", [link]), str, f"{where} attribute 'name'")
        where = f"layer {name!r} ({kind})"
        if kind not in LAYER_TYPES:
            raise ModelError(f"layer {name!r} has the unknown type {kind!r}; required: one of {', '.join(LAYER_TYPES)}")
        cls = LAYER_TYPES[kind]
        settings = [
            field.name for field in dataclasses.fields(cls) if field.name not in ("name", "inputs", *cls.arrays)
        ]
        hdf5.require_known(found, ("type", "name", "inputs", *settings), where, "attribute")
        datasets = hdf5.children(layer, where, len(cls.arrays), cls.arrays)
        inputs = found.get("inputs", [])
        if not all(isinstance(v, str) for v in inputs):
            raise ModelError(f"{where} has inputs {hdf5.shown(inputs)}; required: names of layers, or 'input'")
        fields: dict[str, Any] = {"name": name, "inputs": tuple(inputs)}
        fields |= {setting: _setting(setting, found[setting], where) for setting in settings if setting in found}
        for array, data in datasets.items():
            total += hdf5.size(data, f"{where} {array}")
            if total > MAX_TOTAL_WEIGHTS:
                raise ModelError(f"the weights up to {where} are {total} numbers; at most {MAX_TOTAL_WEIGHTS} are "
                                 "accepted")
            if (first := owners.setdefault(data.address, f"{where} {array}")) != f"{where} {array}":
                raise ModelError(f"{where} {array} is the dataset of {first}; required: one of its own")
            is_integer = array in cls.integer_arrays
            fields[array] = hdf5.array(data, f"{where} {array}", (_RANKS.get((cls, array), 1),),
                                       MAX_TENSOR_ELEMENTS if is_integer else MAX_WEIGHT_ELEMENTS, is_integer)
        for field in dataclasses.fields(cls):
            if field.name not in fields and field.default is dataclasses.MISSING:
                what = "dataset" if field.name in cls.arrays else "attribute"
                raise ModelError(f"{where} has no {what} {field.name!r}; required: one")
        pending.append((cls, fields))
    return pending


def _setting(field: str, value: list[Any], where: str) -> Any:
    """A hyper-parameter as its layer takes it."""
    if all(isinstance(v, int) for v in value):
        match field, len(value):
            case "padding", 1 | 2 | 4:
                return tuple(value) * (4 // len(value))
            case "kernel" | "stride" | "dilation", 1 | 2:
                return tuple(value) * (2 // len(value))
            case "groups" | "size", 1:
                return value[0]
            case _, 1 if field in _FLAGS and value[0] in (0, 1):
                return bool(value[0])
    if field == "function" and len(value) == 1 and isinstance(value[0], str):
        return value[0]
    if field in _NUMBERS and len(value) == 1 and isinstance(value[0], (int, float)):
        return float(value[0])
    wanted = {"padding": "1, 2 or 4 integers", "groups": "1 integer", "size": "1 integer", "function": "1 string",
              **dict.fromkeys(_FLAGS, "0 or 1"), **dict.fromkeys(_NUMBERS, "1 number")}
    raise ModelError(f"{where} has {field} {hdf5.shown(value)}; required: {wanted.get(field, '1 or 2 integers')}")


def _read_provenance(group: Object) -> dict[str, str]:
    hdf5.children(group, "/provenance", 0, ())
    found = hdf5.attributes(group, "/provenance")
    return {name: hdf5.single(value, str, f"/provenance attribute {name!r}") for name, value in found.items()}


def _write(model: Model, image: io.BytesIO, dtype: npt.DTypeLike, compression: str | None) -> None:
    import h5py

    # v108 objects carry checksums, so that damage to a stride is noticed; every library since HDF5 1.8 (2008) reads
    # them.
    with _errors("names and texts of valid Unicode, none of them empty"), h5py.File(
            image, "w", libver=("v108", "v108")) as file:
        _put_text(file, "format", FORMAT)
        file.attrs["version"] = np.asarray(VERSION, "<i8")
        _write_input(file.create_group("input"), model)
        layers = file.create_group("layers")
        for i, layer in enumerate(model.graph):
            _write_layer(layers.create_group(f"{i:05}"), layer, np.dtype(dtype), compression)
        if model.classes:
            file.create_dataset("classes", data=_fixed(model.classes), track_times=False)
        if model.provenance:
            provenance = file.create_group("provenance")
            for key, value in sorted(model.provenance.items()):
                _put_text(provenance, key, value)


@contextlib.contextmanager
def _errors(required: str) -> Iterator[None]:
    """Whatever h5py raises, on a name that cannot be stored, as ModelError."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, MemoryError, OSError, RuntimeError, TypeError,
            ValueError) as error:
        raise ModelError(f"HDF5 cannot write it ({error}); required: {required}") from error


def _write_input(group: h5py.Group, model: Model) -> None:
    p = model.preprocessing
    group.attrs["shape"] = np.asarray(model.graph.input_shape, "<i8")
    if model.inputs:
        _put_text(group, "names", tuple(model.inputs))
        group.attrs["shapes"] = np.asarray([n for shape in model.inputs.values() for n in shape], "<i8")
    if p.color is not None:
        _put_text(group, "color", p.color)
    _put_text(group, "resize", p.resize)
    group.attrs["scale"] = np.asarray(p.scale, "<f8")
    for name in ("mean", "std"):
        group.create_dataset(name, data=np.asarray(getattr(p, name), "<f4"), track_times=False)
    if model.graph.box is not None:
        group.create_dataset("box", data=np.stack(model.graph.box, axis=1).astype("<f4"), track_times=False)


def _write_layer(group: h5py.Group, layer: Layer, dtype: npt.DTypeLike, compression: str | None) -> None:
    _put_text(group, "type", _LAYER_NAMES[type(layer)])
    _put_text(group, "name", layer.name)
    _put_text(group, "inputs", layer.inputs)
    for field in dataclasses.fields(layer):
        value = getattr(layer, field.name)
        if field.name in ("name", "inputs") or value is None or (field.name in _MARKS and not value):
            continue
        if isinstance(value, str):
            _put_text(group, field.name, value)
            continue
        if field.name not in layer.arrays:
            group.attrs[field.name] = np.asarray(value, "<f8" if field.name in _NUMBERS else "<i8")
            continue
        with np.errstate(over="ignore"):
            stored = value.astype("<i4" if field.name in layer.integer_arrays else dtype)
        if not np.isfinite(stored).all():
            raise ModelError(
                f"layer {layer.name!r} has {field.name} up to {np.abs(value).max():g}, beyond {np.dtype(dtype).name}; "
                "save with dtype='float32'")
        # Chunks of a small array would cost more than their compression saves.
        filters = {"compression": compression, "shuffle": True} if compression and stored.nbytes > 4096 else {}
        group.create_dataset(field.name, data=stored, track_times=False, **filters)


def _put_text(node: h5py.Group, name: str, value: str | tuple[str, ...]) -> None:
    node.attrs.create(name, _fixed(value))


def _fixed(value: str | tuple[str, ...]) -> npt.NDArray[Any]:
    """Fixed-length UTF-8 strings: the same bytes every time, and no heap of strings to go through on reading."""
    import h5py

    data = np.array(value.encode() if isinstance(value, str) else [v.encode() for v in value], np.bytes_)
    return data.astype(h5py.string_dtype("utf-8", data.itemsize))
