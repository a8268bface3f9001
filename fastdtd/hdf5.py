"""HDF5 files from anywhere, model files and Keras's: what of them is accepted.

Nothing is opened that could lead out of the file, and nothing is read before its type and size are known to be sane.
hdf5_format.py finds the parts and hdf5_storage.py reads them. Whatever is wrong becomes a ModelError.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from fastdtd import hdf5_format, hdf5_storage
from fastdtd.errors import ModelError
from fastdtd.files import open_to_read
from fastdtd.hdf5_format import Attribute, Content, Object
from fastdtd.hdf5_storage import Dataset

MAX_ATTRIBUTE_ELEMENTS = 10_000
MAX_TEXT_BYTES = 4096  # one string
# Deflate, the strongest of the accepted compressions on real data, shrinks at most 1032 times. A dataset that claims
# more over its stored bytes was never written. Small ones may do so: a chunk larger than what it holds.
MAX_EXPANSION = 2000
SMALL_BYTES = 2**20


@contextlib.contextmanager
def opened(source: Path | bytes | io.BufferedIOBase, required: str, most: int | None = None
           ) -> Iterator[Object]:
    """The file, for reading, by its outermost group; `required` ends the messages of errors.

    most: bytes that are read of its structures in all.
    """
    with contextlib.ExitStack() as stack:
        if isinstance(source, Path):
            stream: io.BufferedIOBase = stack.enter_context(_opened(source))
        else:
            stream = io.BytesIO(source) if isinstance(source, bytes) else source
        content = Content(stream, most)
        if not content.is_hdf5:
            raise ModelError(f"is not an HDF5 file, or its start is damaged; required: {required}")
        try:
            outermost = hdf5_format.root(content)
        except ModelError as error:
            raise ModelError(f"is not an HDF5 file that can be read: it {error}; required: {required}") from None
        yield outermost


def _opened(path: Path) -> io.BufferedReader:
    try:
        return open_to_read(path)
    except OSError as error:
        raise ModelError(f"cannot be opened: {error.strerror or error}; required: a file that can be read") from None


@contextlib.contextmanager
def _at(where: str) -> Iterator[None]:
    """Errors of what is read there say where."""
    try:
        yield
    except ModelError as error:
        raise ModelError(f"{where} {error}") from None


def children(group: Object, where: str, limit: int, known: Iterable[str] | None = None) -> dict[str, Object]:
    """What `group` holds, by name in sorted order. Only hard links are opened: they cannot lead out of the file."""
    with _at(where):
        links = list(itertools.islice(hdf5_format.links(group), limit + 1))
    names = [text(link.name, where) for link in links]
    if known is not None:
        require_known(names, known, where, "member")
    if len(links) > limit:
        raise ModelError(f"{where} holds more than {limit} objects; required: at most {limit}")
    found: dict[str, Object] = {}
    for name, link in sorted(zip(names, links, strict=True)):
        if link.address is None:
            raise ModelError(
                f"{where} holds {name!r} as a soft, external or user-defined link; required: the object itself "
                "(h5repack and h5copy resolve links)")
        if name in found:
            raise ModelError(f"{where} holds {name!r} twice: the file is damaged")
        found[name] = Object(group.content, link.address)
    return found


def kind(child: Object, where: str) -> str:
    """"group", "dataset" or "datatype"."""
    with _at(where):
        return child.kind


def group(child: Object, where: str) -> Object:
    if (found := kind(child, where)) != "group":
        raise ModelError(f"{where} is a {found}; required: a group")
    return child


def size(child: Object, where: str) -> int:
    """How many elements it claims to have; none where it is no dataset."""
    with _at(where):
        return math.prod(Dataset(child).shape or ()) if child.kind == "dataset" else 0


def dataset(child: Object, where: str, ranks: tuple[int, ...], limit: int, max_chunks: int | None = None) -> Dataset:
    """`child`, where it is a dataset of an accepted number of axes and elements whose bytes lie in this file."""
    if (found := kind(child, where)) != "dataset":
        raise ModelError(f"{where} is a {found}; required: a dataset")
    with _at(where):
        data = Dataset(child, max_chunks)
    shape = data.shape
    if shape is None or len(shape) not in ranks or 0 in shape:
        raise ModelError(
            f"{where} has shape {shape}; required: {' or '.join(map(str, ranks))} axes, none of them empty")
    count = math.prod(shape)
    if count > limit:
        raise ModelError(f"{where} has {count} elements; at most {limit} are accepted")
    if data.is_external or data.layout == "virtual":
        how = "is a virtual dataset, which keeps" if data.layout == "virtual" else "keeps"
        raise ModelError(f"{where} {how} its data in other files; required: data in this file (h5repack brings it in)")
    filters = [code for code, _ in data.filters]
    # Two compressions, one on the other, would multiply how far a file can expand.
    if (not set(filters) <= hdf5_storage.FILTERS.keys() or len(set(filters)) < len(filters)
            or {hdf5_storage.DEFLATE, hdf5_storage.LZF} <= set(filters)):
        raise ModelError(
            f"{where} is stored with the HDF5 filters {filters}; required: at most one of gzip and lzf, with or "
            "without shuffle and fletcher32 (h5repack changes filters)")
    with _at(where):
        stored = min(data.stored, child.content.size)
    claimed = max(count, math.prod(data.chunk)) * data.datatype.size
    if claimed > max(SMALL_BYTES, stored * (MAX_EXPANSION if filters else 1)):
        raise ModelError(
            f"{where} claims {claimed} bytes but the file stores {stored} for it; required: data that were written")
    return data


def _elements(data: Dataset, where: str) -> hdf5_format.Raw:
    """All elements of a dataset that `dataset` has accepted."""
    try:
        return hdf5_storage.elements(data)
    except ModelError as error:
        raise ModelError(f"{where} {error}; required: data that were written whole (h5repack writes them anew)"
                         ) from None


def array(child: Object, where: str, ranks: tuple[int, ...], limit: int, integers: bool = False,
          bfloat16: bool = False) -> Any:
    """float32, or int32 if `integers`. bfloat16: whether numbers may be of that, as Keras writes them."""
    data = dataset(child, where, ranks, limit)
    kind, size = data.datatype.kind, data.datatype.size
    if integers:
        if data.datatype.numpy not in (np.dtype("<i4"), np.dtype(">i4")):
            raise ModelError(f"{where} is of HDF5 type {kind} ({size} bytes); required: integers of 32 bits")
        return np.asarray(_elements(data, where), np.int32)
    if bfloat16 and kind == "Opaque" and size == 2 and attributes(child, where, ("dtype",)).get("dtype") == [
            "bfloat16"]:
        upper = np.frombuffer(_elements(data, where).tobytes(), "<u2")  # half of a float32
        return (upper.astype(np.uint32) << 16).view(np.float32).reshape(data.shape)
    if data.datatype.numpy.kind != "f":
        raise ModelError(
            f"{where} is of HDF5 type {kind} ({size} bytes); required: IEEE floating-point numbers of 16, 32 or 64 "
            "bits")
    with np.errstate(over="ignore"):  # float64 beyond float32 becomes infinity, which Layer and Model refuse by name
        return np.asarray(_elements(data, where), np.float32)


def strings(child: Object, where: str, limit: int, longest_in_all: int) -> tuple[str, ...]:
    """A list of strings, with so many bytes in all at most."""
    data = dataset(child, where, (1,), limit)
    kind, size = data.datatype.kind, data.datatype.size
    if kind != "String" or not 0 < size <= MAX_TEXT_BYTES:
        raise ModelError(f"{where} is of HDF5 type {kind} ({size} bytes); required: strings of at most "
                         f"{MAX_TEXT_BYTES} bytes")
    raw = _elements(data, where).tobytes()
    names: list[str] = []
    total = 0
    for name in _strings(raw, data.datatype, child.content, where):
        total += len(name)
        if total > longest_in_all:
            raise ModelError(f"{where} has more than {longest_in_all} bytes of names; required: shorter names")
        names.append(text(name, where))
    return tuple(names)


def _strings(raw: bytes, kind: hdf5_format.Datatype, content: Content, where: str, longest: int = MAX_TEXT_BYTES
             ) -> Iterator[bytes]:
    """Of fixed length, or those that are referred to."""
    if kind.is_variable:
        with _at(where):
            yield from hdf5_storage.strings(content, raw, longest)
        return
    for at in range(0, len(raw), kind.size):
        name = raw[at:at + kind.size]
        yield name.rstrip(b"\0 ") if kind.is_spaced else name.split(b"\0", 1)[0]


def attributes(node: Object, where: str, known: Iterable[str] | None = None) -> dict[str, list[Any]]:
    """The attributes of `node`, each as a flat list of str, int or float."""
    found = named_attributes(node, where)
    if known is not None:
        require_known(found, known, where, "attribute")
    return {name: values(one, node.content, f"{where} attribute {name!r}") for name, one in found.items()}


def named_attributes(node: Object, where: str) -> dict[str, Attribute]:
    found: dict[str, Attribute] = {}
    with _at(where):
        listed = list(hdf5_format.attributes(node))
    for one in listed:
        name = text(one.name, where)
        if name in found:
            raise ModelError(f"{where} has the attribute {name!r} twice: the file is damaged")
        found[name] = one
    return found


def values(attribute: Attribute, content: Content, where: str, longest: int = MAX_TEXT_BYTES) -> list[Any]:
    """An attribute as a flat list of str, int or float.

    longest: bytes that a string may have; with longer ones there may be fewer.
    """
    kind, size = attribute.datatype.kind, attribute.datatype.size
    if attribute.shape is None:
        raise ModelError(f"{where} is empty; required: a value")
    count = math.prod(attribute.shape)
    maximum = MAX_ATTRIBUTE_ELEMENTS * MAX_TEXT_BYTES // longest
    if count > maximum:
        raise ModelError(f"{where} has {count} elements; at most {maximum} are accepted")
    is_text = kind == "String"
    if not is_text and attribute.datatype.numpy.kind not in "iuf":
        raise ModelError(f"{where} is neither text nor numbers; required: strings, integers or floating-point numbers")
    if is_text and size > longest:
        raise ModelError(f"{where} has strings of {size} bytes; at most {longest} are accepted")
    if count * size > len(attribute.value) or not size:
        raise ModelError(f"{where} has {len(attribute.value)} bytes; required: {count * size}")
    raw = attribute.value[:count * size]
    if is_text:
        return [text(v, where, longest) for v in _strings(raw, attribute.datatype, content, where, longest)]
    flat: list[Any] = np.frombuffer(raw, attribute.datatype.numpy).tolist()
    return flat


def text(raw: bytes, where: str, longest: int = MAX_TEXT_BYTES) -> str:
    if len(raw) > longest:
        raise ModelError(f"{where} has a string of {len(raw)} bytes; at most {longest} are accepted")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        raise ModelError(f"{where} has the string {raw[:80]!r}; required: ASCII or UTF-8") from None


def single(value: list[Any] | None, kind: type | tuple[type, ...], where: str) -> Any:
    if value is None or len(value) != 1 or not isinstance(value[0], kind):
        raise ModelError(f"{where} is {shown(value)}; required: one {'string' if kind is str else 'number'}")
    return value[0]


def require_known(found: Iterable[str], known: Iterable[str], where: str, what: str) -> None:
    unknown = sorted(set(found) - set(known))
    if unknown:
        raise ModelError(
            f"{where} has the unknown {what} {shown(unknown)}; known: {', '.join(known) or 'none'}. Correct or remove "
            "it"
        )


def shown(value: list[Any] | None) -> str:
    """A list for a message, short enough to read."""
    if not value:
        return "missing" if value is None else "of no elements"
    return ", ".join(repr(v)[:80] for v in value[:5]) + (f", ... ({len(value)} in all)" if len(value) > 5 else "")
