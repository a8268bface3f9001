"""Model files: one HDF5 file holds a network, its preprocessing, its class names and where they come from.

docs/model-format.md is the specification. Files come from anywhere, so nothing is opened that could lead out of the file, and nothing is
read before its type and size are known to be sane.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import math
import mmap
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from fastdtd.errors import InputError, ModelError, OutputError
from fastdtd.files import replace
from fastdtd.graph import LAYER_TYPES, MAX_LAYERS, MAX_TENSOR_ELEMENTS, MAX_WEIGHT_ELEMENTS, Array, Conv2d, Dense, Graph, Layer, Rearrange
from fastdtd.model import Model, Preprocessing

if TYPE_CHECKING:
    import h5py

FORMAT = "fastdtd-model"
VERSION = 1
# Settings that are no integers; a bias with a dataset is none of them.
_NUMBERS = ("low", "high", "alpha", "beta", "bias", "slope", "exponent")
DTYPES = ("float16", "float32", "float64")
COMPRESSIONS = ("gzip", "lzf", None)

MAX_TOTAL_WEIGHTS = 2**31
MAX_ATTRIBUTE_ELEMENTS = 10_000
MAX_TEXT_BYTES = 4096  # one string
MAX_CLASSES = 1_000_000
MAX_CLASSES_BYTES = 2**26  # all class names together
# Deflate, the strongest of the accepted compressions on real data, shrinks at most 1032 times. A dataset that claims more over its stored
# bytes was never written. Small ones may do so: a bias left at the fill value, a chunk larger than what it holds.
MAX_EXPANSION = 2000
SMALL_BYTES = 2**20

MODELS = Path(__file__).parent / "models"
_EMBEDDED_SUFFIX = ".h5"
_LAYER_NAMES = {cls: name for name, cls in LAYER_TYPES.items()}
_RANKS = {(Conv2d, "weight"): 4, (Dense, "weight"): 2, (Rearrange, "index"): 3}  # every other array is a vector
_HEAP = b"GCOL\x01\0\0\0"  # how a global heap of HDF5 begins
_REQUIRED = "an undamaged fastdtd model file (fastdtd.convert makes one from other formats)"


def load(source: str | os.PathLike[str]) -> Model:
    """Read a model file.

    Parameters
    ----------
    source : path or str
        A file as docs/model-format.md specifies it, or the name of an embedded model, such as ``"squeezenet1_1"``.

    Returns
    -------
    Model

    Raises
    ------
    ModelError
        What is no readable, valid model file. Damaged and hostile files included.
    """
    path = _locate(os.fsdecode(source))
    try:
        return _read(path)
    except ModelError as error:
        raise ModelError(f"model file {str(path)!r}: {error}") from error


def save(model: Model, path: str | os.PathLike[str], dtype: str = "float32", compression: str | None = "gzip") -> None:
    """Write a model file. The same model makes the same bytes (with the same HDF5). A file already there is replaced only by a whole one.

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
    """
    if dtype not in DTYPES:
        raise InputError(f"dtype is {dtype!r}; required: one of {', '.join(DTYPES)}")
    if compression not in COMPRESSIONS:
        raise InputError(f"compression is {compression!r}; required: 'gzip', 'lzf' or None")
    image = io.BytesIO()  # HDF5 does not recover from a full disk; plain writing does
    try:
        _write(model, image, np.dtype(dtype).newbyteorder("<"), compression)
        _read(image)  # the reader's limits hold for the writer too
    except ModelError as error:
        raise ModelError(f"the model cannot be saved: {error}") from error
    try:
        replace(Path(path), lambda beside: beside.write_bytes(image.getbuffer()))
    except (OSError, ValueError) as error:  # ValueError: a path with a NUL
        raise OutputError(f"cannot write {str(path)!r}: {error}; required: a place with room where files may be written") from error


def _locate(source: str) -> Path:
    if os.path.isfile(source):
        return Path(source)
    embedded = MODELS / (source + _EMBEDDED_SUFFIX)
    is_bare = Path(source).name == source and not Path(source).suffix
    if is_bare and os.path.isfile(embedded):
        return embedded
    if os.path.exists(source):
        what = "a directory" if os.path.isdir(source) else "no regular file"
        raise ModelError(f"model file {source!r} is {what}; required: a model file")
    names = ", ".join(sorted(p.stem for p in MODELS.glob("*" + _EMBEDDED_SUFFIX))) or "none"
    raise ModelError(f"model file {source!r} does not exist; required: the path of a model file or the name of an embedded model "
                     f"(embedded: {names})")


@contextlib.contextmanager
def _hdf5_errors(required: str) -> Iterator[None]:
    """Whatever h5py raises, on a damaged file or on a name that cannot be stored, as ModelError."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, MemoryError, OSError, RuntimeError, TypeError, ValueError) as error:
        raise ModelError(f"HDF5 cannot process it ({error}); required: {required}") from error


def _read(source: Path | io.BytesIO) -> Model:
    import h5py

    with _hdf5_errors(_REQUIRED):
        if isinstance(source, Path) and not h5py.is_hdf5(source):
            raise ModelError(f"is not an HDF5 file, or its start is damaged; required: {_REQUIRED}")
        if isinstance(source, Path):
            _check_string_heaps(source)
        with h5py.File(source, "r", locking=False) as file:  # a lock is refused on some network file systems, and buys a reader nothing
            if file.id.get_create_plist().get_sizes() != (8, 8):
                raise ModelError(f"does not use 8-byte HDF5 addresses; required: {_REQUIRED}")
            names = _attribute_names(file, "the file")
            found = {name: _attribute(file, name, f"root attribute {name!r}") for name in ("format", "version") if name in names}
            if found.get("format") != [FORMAT]:
                raise ModelError(f"has no root attribute 'format' that says {FORMAT!r}; required: {_REQUIRED}")
            if found.get("version") != [VERSION]:
                raise ModelError(f"has format version {_shown(found.get('version'))}; this fastdtd reads version {VERSION}. Install the "
                                 "fastdtd that wrote it, or save the model again with this one")
            _require_known(names, ("format", "version"), "the file", "attribute")
            parts = _children(file, "the file", 4, ("input", "layers", "classes", "provenance"))
            for name in ("input", "layers"):
                if name not in parts:
                    raise ModelError(f"has no group '/{name}'; required: {_REQUIRED}")
            shape, box, preprocessing = _read_input(_group(parts["input"], "/input"))
            pending = _read_layers(_group(parts["layers"], "/layers"))
            classes = _read_classes(parts["classes"]) if "classes" in parts else ()
            provenance = _read_provenance(_group(parts["provenance"], "/provenance")) if "provenance" in parts else {}
    # Outside the file, so that a mistake of ours is not taken for damage. A layer copies its arrays; popping frees them one by one.
    pending.reverse()
    layers = []
    while pending:
        make, fields = pending.pop()
        layers.append(make(**fields))
    return Model(Graph(tuple(layers), shape, box), preprocessing, classes, provenance)


def _check_string_heaps(path: Path) -> None:
    """Refuse global heaps, where HDF5 keeps variable-length strings, that are damaged or hold more than short strings.

    HDF5 would loop for ever over an object of no size, and would copy one long string for each of many references to it.
    """
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        end = 0
        start = data.find(_HEAP)
        while start >= 0:
            size = int.from_bytes(data[start + 8:start + 16], "little")
            at = start + 16
            # Heaps that overlap would have to be walked again and again.
            is_sound = start >= end and start + size <= len(data)
            end = start + size
            while is_sound and at + 16 <= end:  # 16: an object's index (2 bytes), references (2), nothing (4) and size (8)
                index, length = int.from_bytes(data[at:at + 2], "little"), int.from_bytes(data[at + 8:at + 16], "little")
                step = 16 + (length + 7) // 8 * 8 if index else length  # object 0 is free space and counts its header
                is_sound = step >= 16 and at + step <= end and (not index or length <= MAX_TEXT_BYTES)
                at += step
            if not is_sound:
                raise ModelError(f"has a damaged heap at byte {start}, or one with strings of more than {MAX_TEXT_BYTES} bytes; required: "
                                 f"{_REQUIRED}")
            start = data.find(_HEAP, start + 1)


def _read_input(group: h5py.Group) -> tuple[Any, tuple[Array, Array] | None, Preprocessing]:
    found = _attributes(group, "/input", ("shape", "color", "resize", "scale"))
    datasets = _children(group, "/input", 3, ("mean", "std", "box"))
    shape = found.get("shape")
    if shape is None or len(shape) != 3 or not all(isinstance(v, int) for v in shape):
        raise ModelError(f"/input has shape {_shown(shape)}; required: 3 integers (channels, height, width)")
    fields: dict[str, Any] = {"color": None}
    for name, kind in (("color", str), ("resize", str), ("scale", (int, float))):
        if name in found:
            fields[name] = _single(found[name], kind, f"/input attribute {name!r}")
    for name in ("mean", "std"):
        if name in datasets:
            fields[name] = _array(datasets[name], f"/input/{name}", (0, 1, 3), MAX_TENSOR_ELEMENTS)
    box = None
    if "box" in datasets:
        bounds = _array(datasets["box"], "/input/box", (2,), 2 * MAX_TENSOR_ELEMENTS)
        if bounds.shape != (shape[0], 2):
            raise ModelError(f"/input/box has shape {bounds.shape}; required: ({shape[0]}, 2), lowest and highest value of each channel")
        box = bounds[:, 0], bounds[:, 1]
    return tuple(shape), box, Preprocessing(**fields)


def _read_layers(group: h5py.Group) -> list[tuple[type[Layer], dict[str, Any]]]:
    """Each layer's class and what to make it with."""
    pending = []
    total = 0
    for link, child in _children(group, "/layers", MAX_LAYERS).items():
        where = f"group {link!r} of /layers"
        layer = _group(child, where)
        found = _attributes(layer, where)
        kind = _single(found.get("type"), str, f"{where} attribute 'type'")
        name = _single(found.get("name", [link]), str, f"{where} attribute 'name'")
        where = f"layer {name!r} ({kind})"
        if kind not in LAYER_TYPES:
            raise ModelError(f"layer {name!r} has the unknown type {kind!r}; required: one of {', '.join(LAYER_TYPES)}")
        cls = LAYER_TYPES[kind]
        settings = [field.name for field in dataclasses.fields(cls) if field.name not in ("name", "inputs", *cls.arrays)]
        _require_known(found, ("type", "name", "inputs", *settings), where, "attribute")
        datasets = _children(layer, where, len(cls.arrays), cls.arrays)
        inputs = found.get("inputs", [])
        if not all(isinstance(v, str) for v in inputs):
            raise ModelError(f"{where} has inputs {_shown(inputs)}; required: names of layers, or 'input'")
        fields: dict[str, Any] = {"name": name, "inputs": tuple(inputs)}
        fields |= {setting: _setting(setting, found[setting], where) for setting in settings if setting in found}
        total += sum(math.prod(data.shape or ()) for data in datasets.values() if _is_dataset(data))
        if total > MAX_TOTAL_WEIGHTS:
            raise ModelError(f"the weights up to {where} are {total} numbers; at most {MAX_TOTAL_WEIGHTS} are accepted")
        for array, data in datasets.items():
            is_integer = array in cls.integer_arrays
            fields[array] = _array(data, f"{where} {array}", (_RANKS.get((cls, array), 1),),
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
            case "ceil_mode" | "count_include_pad" | "within_channel", 1 if value[0] in (0, 1):
                return bool(value[0])
    if field in _NUMBERS and len(value) == 1 and isinstance(value[0], (int, float)):
        return float(value[0])
    wanted = {"padding": "1, 2 or 4 integers", "groups": "1 integer", "size": "1 integer", "ceil_mode": "0 or 1",
              "count_include_pad": "0 or 1", "within_channel": "0 or 1", **dict.fromkeys(_NUMBERS, "1 number")}
    raise ModelError(f"{where} has {field} {_shown(value)}; required: {wanted.get(field, '1 or 2 integers')}")


def _read_classes(child: Any) -> tuple[str, ...]:
    import h5py

    data = _dataset(child, "/classes", (1,), MAX_CLASSES)
    string = h5py.check_string_dtype(data.dtype)
    if string is None or (string.length or 0) > MAX_TEXT_BYTES:
        raise ModelError(f"/classes is of type {data.dtype}; required: strings of at most {MAX_TEXT_BYTES} bytes")
    step = MAX_CLASSES_BYTES // MAX_TEXT_BYTES
    names: list[str] = []
    size = 0
    for start in range(0, len(data), step):
        block = data[start:start + step]
        size += sum(map(len, block))
        if size > MAX_CLASSES_BYTES:
            raise ModelError(f"/classes has more than {MAX_CLASSES_BYTES} bytes of names; required: shorter names")
        names.extend(_text(name, "/classes") for name in block)
    return tuple(names)


def _read_provenance(group: h5py.Group) -> dict[str, str]:
    _children(group, "/provenance", 0, ())
    return {name: _single(value, str, f"/provenance attribute {name!r}") for name, value in _attributes(group, "/provenance").items()}


def _children(group: h5py.Group, where: str, limit: int, known: Iterable[str] | None = None) -> dict[str, Any]:
    """What `group` holds, by name in sorted order. Only hard links are opened: they cannot lead out of the file."""
    import h5py

    links: list[bytes] = []

    def collect(link: bytes) -> bool | None:
        links.append(link)
        return True if len(links) > limit else None  # True stops: a damaged index may have no end

    group.id.links.iterate(collect)
    names = [_text(link, where) for link in links]
    if known is not None:
        _require_known(names, known, where, "member")
    if len(links) > limit:
        raise ModelError(f"{where} holds more than {limit} objects; required: at most {limit}")
    for link, name in zip(links, names, strict=True):
        if group.id.links.get_info(link).type != h5py.h5l.TYPE_HARD:
            raise ModelError(f"{where} holds {name!r} as a soft, external or user-defined link; required: the object itself (h5repack and "
                             "h5copy resolve links)")
    return {name: group[link] for name, link in sorted(zip(names, links, strict=True))}


def _group(child: Any, where: str) -> h5py.Group:
    import h5py

    if not isinstance(child, h5py.Group):
        raise ModelError(f"{where} is a {type(child).__name__.lower()}; required: a group")
    return child


def _is_dataset(child: Any) -> bool:
    import h5py

    return isinstance(child, h5py.Dataset)


def _dataset(child: Any, where: str, ranks: tuple[int, ...], limit: int) -> h5py.Dataset:
    """`child`, where it is a dataset of an accepted number of axes and elements whose bytes lie in this file."""
    from h5py import h5d, h5z

    if not _is_dataset(child):
        raise ModelError(f"{where} is a {type(child).__name__.lower()}; required: a dataset")
    shape = child.shape
    if shape is None or len(shape) not in ranks or 0 in shape:
        raise ModelError(f"{where} has shape {shape}; required: {' or '.join(map(str, ranks))} axes, none of them empty")
    count = math.prod(shape)
    if count > limit:
        raise ModelError(f"{where} has {count} elements; at most {limit} are accepted")
    layout = child.id.get_create_plist()
    if layout.get_layout() == h5d.VIRTUAL or layout.get_external_count():
        raise ModelError(f"{where} keeps its data in other files (virtual dataset or external storage); required: data in this file "
                         "(h5repack brings it in)")
    compressions = {h5z.FILTER_DEFLATE, h5z.FILTER_LZF, h5z.FILTER_SZIP}
    filters = [layout.get_filter(i)[0] for i in range(layout.get_nfilters())]
    # HDF5's decoder for scale-offset has been overrun by hostile files (CVE-2025-2308, CVE-2025-44905), and filters from elsewhere would
    # load foreign code. Two compressions, one on the other, would multiply how far a file can expand.
    if (set(filters) - compressions - {h5z.FILTER_SHUFFLE, h5z.FILTER_FLETCHER32} or len(set(filters)) < len(filters)
            or len(compressions.intersection(filters)) > 1):
        raise ModelError(f"{where} is stored with the HDF5 filters {filters}; required: at most one of gzip, lzf and szip, with or without "
                         "shuffle and fletcher32 (h5repack changes filters)")
    claimed = max(count, math.prod(child.chunks or ())) * child.id.get_type().get_size()
    stored = min(child.id.get_storage_size(), child.file.id.get_filesize())
    if claimed > max(SMALL_BYTES, stored * (MAX_EXPANSION if filters else 1)):
        raise ModelError(f"{where} claims {claimed} bytes but the file stores {stored} for it; required: data that were written")
    return child


def _array(child: Any, where: str, ranks: tuple[int, ...], limit: int, integers: bool = False) -> Any:
    """float32, or int32 if `integers`."""
    from h5py import h5t

    data = _dataset(child, where, ranks, limit)
    if integers:
        if not (data.id.get_type().equal(h5t.STD_I32LE) or data.id.get_type().equal(h5t.STD_I32BE)):
            raise ModelError(f"{where} is of type {data.dtype}; required: integers of 32 bits")
        return np.asarray(data[()], np.int32)
    accepted = (h5t.IEEE_F16LE, h5t.IEEE_F16BE, h5t.IEEE_F32LE, h5t.IEEE_F32BE, h5t.IEEE_F64LE, h5t.IEEE_F64BE)
    kind = data.id.get_type()
    if not any(kind.equal(one) for one in accepted):
        found = type(kind).__name__.removeprefix("Type").removesuffix("ID")
        raise ModelError(f"{where} is of HDF5 type {found} ({kind.get_size()} bytes); required: IEEE floating-point numbers of 16, 32 or "
                         "64 bits")
    with np.errstate(over="ignore"):  # float64 beyond float32 becomes infinity, which Layer and Model refuse by name
        return np.asarray(data[()], np.float32)


def _attributes(node: h5py.Group, where: str, known: Iterable[str] | None = None) -> dict[str, list[Any]]:
    """The attributes of `node`, each as a flat list of str, int or float."""
    names = _attribute_names(node, where)
    if known is not None:
        _require_known(names, known, where, "attribute")
    return {name: _attribute(node, name, f"{where} attribute {name!r}") for name in names}


def _attribute_names(node: h5py.Group, where: str) -> list[str]:
    from h5py import h5a

    names: list[bytes] = []
    h5a.iterate(node.id, names.append)
    return [_text(name, where) for name in names]


def _attribute(node: h5py.Group, name: str, where: str) -> list[Any]:
    from h5py import h5a, h5s, h5t

    attribute = h5a.open(node.id, name.encode())
    kind = attribute.get_type()
    if attribute.get_space().get_simple_extent_type() == h5s.NULL:
        raise ModelError(f"{where} is empty; required: a value")
    count = math.prod(attribute.shape)
    if count > MAX_ATTRIBUTE_ELEMENTS:
        raise ModelError(f"{where} has {count} elements; at most {MAX_ATTRIBUTE_ELEMENTS} are accepted")
    is_text = kind.get_class() == h5t.STRING
    is_number = kind.get_class() in (h5t.INTEGER, h5t.FLOAT) or (kind.get_class() == h5t.ENUM and attribute.dtype == bool)
    if not (is_text or is_number):
        raise ModelError(f"{where} is neither text nor numbers; required: strings, integers or floating-point numbers")
    if is_text and not kind.is_variable_str() and kind.get_size() > MAX_TEXT_BYTES:
        raise ModelError(f"{where} has strings of {kind.get_size()} bytes; at most {MAX_TEXT_BYTES} are accepted")
    values = np.empty(attribute.shape, attribute.dtype)
    attribute.read(values, mtype=h5t.py_create(attribute.dtype))  # makes null-padded strings of all
    flat: list[Any] = values.ravel().tolist()
    return [_text(v, where) for v in flat] if is_text else [int(v) if isinstance(v, bool) else v for v in flat]


def _text(raw: bytes, where: str) -> str:
    if len(raw) > MAX_TEXT_BYTES:
        raise ModelError(f"{where} has a string of {len(raw)} bytes; at most {MAX_TEXT_BYTES} are accepted")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        raise ModelError(f"{where} has the string {raw[:80]!r}; required: ASCII or UTF-8") from None


def _single(value: list[Any] | None, kind: type | tuple[type, ...], where: str) -> Any:
    if value is None or len(value) != 1 or not isinstance(value[0], kind):
        raise ModelError(f"{where} is {_shown(value)}; required: one {'string' if kind is str else 'number'}")
    return value[0]


def _require_known(found: Iterable[str], known: Iterable[str], where: str, what: str) -> None:
    unknown = sorted(set(found) - set(known))
    if unknown:
        raise ModelError(f"{where} has the unknown {what} {_shown(unknown)}; known: {', '.join(known) or 'none'}. Correct or remove it")


def _shown(value: list[Any] | None) -> str:
    """A list for a message, short enough to read."""
    if not value:
        return "missing" if value is None else "of no elements"
    return ", ".join(repr(v)[:80] for v in value[:5]) + (f", ... ({len(value)} in all)" if len(value) > 5 else "")


def _write(model: Model, image: io.BytesIO, dtype: npt.DTypeLike, compression: str | None) -> None:
    import h5py

    # v108 objects carry checksums, so that damage to a stride is noticed; every library since HDF5 1.8 (2008) reads them.
    with _hdf5_errors("names and texts of valid Unicode, none of them empty"), h5py.File(image, "w", libver=("v108", "v108")) as file:
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


def _write_input(group: h5py.Group, model: Model) -> None:
    p = model.preprocessing
    group.attrs["shape"] = np.asarray(model.graph.input_shape, "<i8")
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
        if field.name in ("name", "inputs") or value is None:
            continue
        if field.name not in layer.arrays:
            group.attrs[field.name] = np.asarray(value, "<f8" if field.name in _NUMBERS else "<i8")
            continue
        with np.errstate(over="ignore"):
            stored = value.astype("<i4" if field.name in layer.integer_arrays else dtype)
        if not np.isfinite(stored).all():
            raise ModelError(f"layer {layer.name!r} has {field.name} up to {np.abs(value).max():g}, beyond {np.dtype(dtype).name}; "
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
