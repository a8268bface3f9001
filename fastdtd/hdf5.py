"""HDF5 files from anywhere, model files and Keras's.

Nothing is opened that could lead out of the file, and nothing is read before its type and size are known to be sane.
HDF5's library says what a file is made of; what the parts hold is taken from the file's bytes (hdf5_storage.py).
Whatever is wrong becomes a ModelError.
"""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastdtd import hdf5_storage
from fastdtd.errors import ModelError
from fastdtd.files import open_to_read
from fastdtd.hdf5_storage import Content

if TYPE_CHECKING:
    import h5py

MAX_ATTRIBUTE_ELEMENTS = 10_000
MAX_TEXT_BYTES = 4096  # one string
# Deflate, the strongest of the accepted compressions on real data, shrinks at most 1032 times. A dataset that claims
# more over its stored bytes was never written. Small ones may do so: a chunk larger than what it holds.
MAX_EXPANSION = 2000
SMALL_BYTES = 2**20

SIGNATURE = b"\x89HDF\r\n\x1a\n"


@dataclass(frozen=True)
class Object:
    """What a file holds, most often a group or a dataset.

    h5 : as h5py gives it
    content : the bytes of the file
    address : where its header is in the file, the same for all links that lead to it. It is taken from the link: the
        library, asked of the object, would go through its indices, whatever they are

    h5 : as h5py gives it
    content : the bytes of the file
    address : where its header is in the file, the same for all links that lead to it
    """

    h5: Any
    content: Content
    address: int


@contextlib.contextmanager
def opened(source: Path | bytes | io.BytesIO, required: str) -> Iterator[Object]:
    """The file, for reading, by its outermost group; `required` ends the messages of errors."""
    import h5py

    with contextlib.ExitStack() as stack:
        with errors(required):  # and what is done with the file later is the caller's
            if isinstance(source, Path):
                stream: io.BufferedIOBase = stack.enter_context(_opened(source))
            else:
                stream = io.BytesIO(source) if isinstance(source, bytes) else source
            stream.seek(0)
            if stream.read(len(SIGNATURE)) != SIGNATURE:
                raise ModelError("is not an HDF5 file, or its start is damaged, or comes after a user block; required: "
                                 f"{required}")
            content = Content(stream)
            # A lock is refused on some network file systems, and buys a reader nothing.
            file = stack.enter_context(h5py.File(stream, "r", locking=False))
            if file.id.get_create_plist().get_sizes() != (8, 8):
                raise ModelError(f"does not use 8-byte HDF5 addresses; required: {required}")
            outermost = Object(file, content, hdf5_storage.root_address(content))
            if reason := hdf5_storage.why_not_opened(content, outermost.address):
                raise ModelError(f"holds its groups {reason}")
        yield outermost


def _opened(path: Path) -> io.BufferedReader:
    try:
        return open_to_read(path)
    except OSError as error:
        raise ModelError(f"cannot be opened: {error.strerror or error}; required: a file that can be read") from None


@contextlib.contextmanager
def errors(required: str) -> Iterator[None]:
    """Whatever h5py raises, on a damaged file or on a name that cannot be stored, as ModelError."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, MemoryError, OSError, RuntimeError, TypeError,
            ValueError) as error:
        raise ModelError(f"HDF5 cannot process it ({error}); required: {required}") from error


def children(group: Object, where: str, limit: int, known: Iterable[str] | None = None) -> dict[str, Object]:
    """What `group` holds, by name in sorted order. Only hard links are opened: they cannot lead out of the file."""
    import h5py

    links: list[bytes] = []
    found: dict[str, Object] = {}

    def collect(link: bytes) -> bool | None:
        links.append(link)
        return True if len(links) > limit else None  # True stops: a damaged index may have no end

    group.h5.id.links.iterate(collect)
    names = [text(link, where) for link in links]
    if known is not None:
        require_known(names, known, where, "member")
    if len(links) > limit:
        raise ModelError(f"{where} holds more than {limit} objects; required: at most {limit}")
    found = {}
    for name, link in sorted(zip(names, links, strict=True)):
        info = group.h5.id.links.get_info(link)
        if info.type != h5py.h5l.TYPE_HARD:
            raise ModelError(
                f"{where} holds {name!r} as a soft, external or user-defined link; required: the object itself "
                "(h5repack and h5copy resolve links)")
        if reason := hdf5_storage.why_not_opened(group.content, info.u):
            raise ModelError(f"{where} holds {name!r} {reason}")
        found[name] = Object(group.h5[link], group.content, info.u)
    return found


def group(child: Object, where: str) -> Object:
    import h5py

    if not isinstance(child.h5, h5py.Group):
        raise ModelError(f"{where} is a {type(child.h5).__name__.lower()}; required: a group")
    return child


def is_dataset(child: Object) -> bool:
    import h5py

    return isinstance(child.h5, h5py.Dataset)


def dataset(child: Object, where: str, ranks: tuple[int, ...], limit: int) -> h5py.Dataset:
    """`child`, where it is a dataset of an accepted number of axes and elements whose bytes lie in this file."""
    if not is_dataset(child):
        raise ModelError(f"{where} is a {type(child.h5).__name__.lower()}; required: a dataset")
    data = child.h5
    shape = data.shape
    if shape is None or len(shape) not in ranks or 0 in shape:
        raise ModelError(
            f"{where} has shape {shape}; required: {' or '.join(map(str, ranks))} axes, none of them empty")
    count = math.prod(shape)
    if count > limit:
        raise ModelError(f"{where} has {count} elements; at most {limit} are accepted")
    layout = data.id.get_create_plist()
    if layout.get_external_count():
        raise ModelError(f"{where} keeps its data in other files; required: data in this file (h5repack brings it in)")
    filters = [layout.get_filter(i)[0] for i in range(layout.get_nfilters())]
    # Two compressions, one on the other, would multiply how far a file can expand.
    if (not set(filters) <= hdf5_storage.FILTERS.keys() or len(set(filters)) < len(filters)
            or {hdf5_storage.DEFLATE, hdf5_storage.LZF} <= set(filters)):
        raise ModelError(
            f"{where} is stored with the HDF5 filters {filters}; required: at most one of gzip and lzf, with or "
            "without shuffle and fletcher32 (h5repack changes filters)")
    claimed = max(count, math.prod(data.chunks or ())) * hdf5_storage.itemsize(data)
    stored = min(data.id.get_storage_size(), child.content.size)
    if claimed > max(SMALL_BYTES, stored * (MAX_EXPANSION if filters else 1)):
        raise ModelError(
            f"{where} claims {claimed} bytes but the file stores {stored} for it; required: data that were written")
    return data


def _elements(child: Object, where: str) -> hdf5_storage.Raw:
    """All elements of a dataset that `dataset` has accepted."""
    try:
        return hdf5_storage.elements(child.h5, child.content)
    except ModelError as error:
        raise ModelError(f"{where} {error}; required: data that were written whole, contiguous or in chunks (h5repack "
                         "writes them anew)") from None


def array(child: Object, where: str, ranks: tuple[int, ...], limit: int, integers: bool = False,
          bfloat16: bool = False) -> Any:
    """float32, or int32 if `integers`. bfloat16: whether numbers may be of that, as Keras writes them."""
    from h5py import h5t

    data = dataset(child, where, ranks, limit)
    kind = data.id.get_type()
    if integers:
        if not (kind.equal(h5t.STD_I32LE) or kind.equal(h5t.STD_I32BE)):
            raise ModelError(f"{where} is of type {data.dtype}; required: integers of 32 bits")
        return np.asarray(_elements(child, where), np.int32)
    is_opaque = bfloat16 and kind.get_class() == h5t.OPAQUE and kind.get_size() == 2
    if is_opaque and attributes(child, where, ("dtype",)).get("dtype") == ["bfloat16"]:
        upper = np.frombuffer(_elements(child, where).tobytes(), "<u2")  # half of a float32
        return (upper.astype(np.uint32) << 16).view(np.float32).reshape(data.shape)
    accepted = (h5t.IEEE_F16LE, h5t.IEEE_F16BE, h5t.IEEE_F32LE, h5t.IEEE_F32BE, h5t.IEEE_F64LE, h5t.IEEE_F64BE)
    if not any(kind.equal(one) for one in accepted):
        found = type(kind).__name__.removeprefix("Type").removesuffix("ID")
        raise ModelError(
            f"{where} is of HDF5 type {found} ({kind.get_size()} bytes); required: IEEE floating-point numbers of 16, "
            "32 or 64 bits")
    with np.errstate(over="ignore"):  # float64 beyond float32 becomes infinity, which Layer and Model refuse by name
        return np.asarray(_elements(child, where), np.float32)


def strings(child: Object, where: str, limit: int, longest_in_all: int) -> tuple[str, ...]:
    """A list of strings, with so many bytes in all at most."""
    from h5py import h5t

    data = dataset(child, where, (1,), limit)
    kind = data.id.get_type()
    is_text = kind.get_class() == h5t.STRING
    size = kind.get_size() if is_text and not kind.is_variable_str() else 0
    if not is_text or size > MAX_TEXT_BYTES:
        raise ModelError(f"{where} is of type {data.dtype}; required: strings of at most {MAX_TEXT_BYTES} bytes")
    too_many = ModelError(f"{where} has more than {longest_in_all} bytes of names; required: shorter names")
    if size * data.size > longest_in_all:
        raise too_many
    raw = _elements(child, where)
    names: list[str] = []
    total = 0
    for name in raw.view(f"S{size}").tolist() if size else _variable(child, where, raw.tobytes()):
        total += len(name)
        if total > longest_in_all:
            raise too_many
        names.append(text(_unpadded(name, kind) if size else name, where))
    return tuple(names)


def _variable(child: Object, where: str, references: bytes, longest: int = MAX_TEXT_BYTES) -> Iterator[bytes]:
    """Strings that a dataset or an attribute refers to."""
    try:
        yield from child.content.strings(references, longest)
    except ModelError as error:
        raise ModelError(f"{where} {error}") from None


def _unpadded(name: bytes, kind: Any) -> bytes:
    """A string of fixed length, of which NumPy has taken the zeros at the end."""
    from h5py import h5t

    return name.rstrip(b" ") if kind.get_strpad() == h5t.STR_SPACEPAD else name.split(b"\0", 1)[0]


def attributes(node: Object, where: str, known: Iterable[str] | None = None) -> dict[str, list[Any]]:
    """The attributes of `node`, each as a flat list of str, int or float."""
    names = attribute_names(node, where)
    if known is not None:
        require_known(names, known, where, "attribute")
    return {name: attribute(node, name, f"{where} attribute {name!r}") for name in names}


def attribute_names(node: Object, where: str) -> list[str]:
    from h5py import h5a

    names: list[bytes] = []
    h5a.iterate(node.h5.id, names.append)
    return [text(name, where) for name in names]


def attribute(node: Object, name: str, where: str, longest: int = MAX_TEXT_BYTES) -> list[Any]:
    """One attribute as a flat list of str, int or float.

    longest: bytes that a string may have; with longer ones there may be fewer.
    """
    from h5py import h5a, h5s, h5t

    attribute = h5a.open(node.h5.id, name.encode())
    kind = attribute.get_type()
    if attribute.get_space().get_simple_extent_type() == h5s.NULL:
        raise ModelError(f"{where} is empty; required: a value")
    count = math.prod(attribute.shape)
    maximum = MAX_ATTRIBUTE_ELEMENTS * MAX_TEXT_BYTES // longest
    if count > maximum:
        raise ModelError(f"{where} has {count} elements; at most {maximum} are accepted")
    is_text = kind.get_class() == h5t.STRING
    is_bool = kind.get_class() == h5t.ENUM and attribute.dtype == bool
    is_number = is_bool or kind.get_class() in (h5t.INTEGER, h5t.FLOAT)
    if not (is_text or is_number):
        raise ModelError(f"{where} is neither text nor numbers; required: strings, integers or floating-point numbers")
    if is_text and not kind.is_variable_str() and kind.get_size() > longest:
        raise ModelError(f"{where} has strings of {kind.get_size()} bytes; at most {longest} are accepted")
    if is_text and kind.is_variable_str():
        references = hdf5_storage.attribute_references(node.content, node.address, name.encode())
        return [text(v, where, longest) for v in _variable(node, where, references[:16 * count], longest)]
    values = np.empty(attribute.shape, attribute.dtype)
    attribute.read(values, mtype=h5t.py_create(attribute.dtype))  # makes null-padded strings of all
    flat: list[Any] = values.ravel().tolist()
    return [text(v, where, longest) for v in flat] if is_text else [int(v) if isinstance(v, bool) else v for v in flat]


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
