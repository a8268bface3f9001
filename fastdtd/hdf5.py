"""HDF5 files from anywhere, model files and Keras's.

Nothing is opened that could lead out of the file, and nothing is read before its type and size are known to be sane.
Whatever is wrong becomes a ModelError.
"""

from __future__ import annotations

import contextlib
import io
import math
import mmap
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastdtd.errors import ModelError

if TYPE_CHECKING:
    import h5py

MAX_ATTRIBUTE_ELEMENTS = 10_000
MAX_TEXT_BYTES = 4096  # one string
# Deflate, the strongest of the accepted compressions on real data, shrinks at most 1032 times. A dataset that claims
# more over its stored bytes was never written. Small ones may do so: a bias left at the fill value, a chunk larger than
# what it holds.
MAX_EXPANSION = 2000
SMALL_BYTES = 2**20

SIGNATURE = b"\x89HDF\r\n\x1a\n"
_HEAP = b"GCOL\x01\0\0\0"  # how a global heap of HDF5 begins


@contextlib.contextmanager
def opened(source: Path | io.BytesIO | bytes, required: str, longest: int = MAX_TEXT_BYTES) -> Iterator[h5py.File]:
    """The file, for reading. An io.BytesIO is one of our own making, and trusted.

    required: ends the messages of errors; longest: bytes that a string of variable length may have.
    """
    import h5py

    with contextlib.ExitStack() as stack:
        with errors(required):  # and what is done with the file later is the caller's
            if not (h5py.is_hdf5(source)
                    if isinstance(source, Path) else isinstance(source, io.BytesIO) or source.startswith(SIGNATURE)):
                raise ModelError(f"is not an HDF5 file, or its start is damaged; required: {required}")
            if isinstance(source, Path):
                with open(source, "rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
                    _check_string_heaps(data, longest, required)
            elif isinstance(source, bytes):
                _check_string_heaps(source, longest, required)
                source = io.BytesIO(source)
            # A lock is refused on some network file systems, and buys a reader nothing.
            file = stack.enter_context(h5py.File(source, "r", locking=False))
            if file.id.get_create_plist().get_sizes() != (8, 8):
                raise ModelError(f"does not use 8-byte HDF5 addresses; required: {required}")
        yield file


@contextlib.contextmanager
def errors(required: str) -> Iterator[None]:
    """Whatever h5py raises, on a damaged file or on a name that cannot be stored, as ModelError."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, MemoryError, OSError, RuntimeError, TypeError,
            ValueError) as error:
        raise ModelError(f"HDF5 cannot process it ({error}); required: {required}") from error


def _check_string_heaps(data: bytes | mmap.mmap, longest: int, required: str) -> None:
    """Refuse global heaps, where HDF5 keeps variable-length strings, that are damaged or hold longer strings than
    expected.

    HDF5 would loop for ever over an object of no size, and would copy one long string for each of many references to
    it.
    """
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
            is_sound = step >= 16 and at + step <= end and (not index or length <= longest)
            at += step
        if not is_sound:
            raise ModelError(
                f"has a damaged heap at byte {start}, or one with strings of more than {longest} bytes; required: "
                f"{required}"
            )
        start = data.find(_HEAP, start + 1)


def children(group: h5py.Group, where: str, limit: int, known: Iterable[str] | None = None) -> dict[str, Any]:
    """What `group` holds, by name in sorted order. Only hard links are opened: they cannot lead out of the file."""
    import h5py

    links: list[bytes] = []

    def collect(link: bytes) -> bool | None:
        links.append(link)
        return True if len(links) > limit else None  # True stops: a damaged index may have no end

    group.id.links.iterate(collect)
    names = [text(link, where) for link in links]
    if known is not None:
        require_known(names, known, where, "member")
    if len(links) > limit:
        raise ModelError(f"{where} holds more than {limit} objects; required: at most {limit}")
    for link, name in zip(links, names, strict=True):
        if group.id.links.get_info(link).type != h5py.h5l.TYPE_HARD:
            raise ModelError(
                f"{where} holds {name!r} as a soft, external or user-defined link; required: the object itself "
                "(h5repack and h5copy resolve links)")
    return {name: group[link] for name, link in sorted(zip(names, links, strict=True))}


def group(child: Any, where: str) -> h5py.Group:
    import h5py

    if not isinstance(child, h5py.Group):
        raise ModelError(f"{where} is a {type(child).__name__.lower()}; required: a group")
    return child


def is_dataset(child: Any) -> bool:
    import h5py

    return isinstance(child, h5py.Dataset)


def dataset(child: Any, where: str, ranks: tuple[int, ...], limit: int) -> h5py.Dataset:
    """`child`, where it is a dataset of an accepted number of axes and elements whose bytes lie in this file."""
    from h5py import h5d, h5z

    if not is_dataset(child):
        raise ModelError(f"{where} is a {type(child).__name__.lower()}; required: a dataset")
    shape = child.shape
    if shape is None or len(shape) not in ranks or 0 in shape:
        raise ModelError(
            f"{where} has shape {shape}; required: {' or '.join(map(str, ranks))} axes, none of them empty")
    count = math.prod(shape)
    if count > limit:
        raise ModelError(f"{where} has {count} elements; at most {limit} are accepted")
    layout = child.id.get_create_plist()
    if layout.get_layout() == h5d.VIRTUAL or layout.get_external_count():
        raise ModelError(
            f"{where} keeps its data in other files (virtual dataset or external storage); required: data in this file "
            "(h5repack brings it in)")
    compressions = {h5z.FILTER_DEFLATE, h5z.FILTER_LZF, h5z.FILTER_SZIP}
    filters = [layout.get_filter(i)[0] for i in range(layout.get_nfilters())]
    # HDF5's decoder for scale-offset has been overrun by hostile files (CVE-2025-2308, CVE-2025-44905), and filters
    # from elsewhere would load foreign code. Two compressions, one on the other, would multiply how far a file can
    # expand.
    if (set(filters) - compressions - {h5z.FILTER_SHUFFLE, h5z.FILTER_FLETCHER32} or len(set(filters)) < len(filters)
            or len(compressions.intersection(filters)) > 1):
        raise ModelError(
            f"{where} is stored with the HDF5 filters {filters}; required: at most one of gzip, lzf and szip, with or "
            "without shuffle and fletcher32 (h5repack changes filters)")
    claimed = max(count, math.prod(child.chunks or ())) * child.id.get_type().get_size()
    stored = min(child.id.get_storage_size(), child.file.id.get_filesize())
    if claimed > max(SMALL_BYTES, stored * (MAX_EXPANSION if filters else 1)):
        raise ModelError(
            f"{where} claims {claimed} bytes but the file stores {stored} for it; required: data that were written")
    return child


def array(child: Any, where: str, ranks: tuple[int, ...], limit: int, integers: bool = False) -> Any:
    """float32, or int32 if `integers`."""
    from h5py import h5t

    data = dataset(child, where, ranks, limit)
    if integers:
        if not (data.id.get_type().equal(h5t.STD_I32LE) or data.id.get_type().equal(h5t.STD_I32BE)):
            raise ModelError(f"{where} is of type {data.dtype}; required: integers of 32 bits")
        return np.asarray(data[()], np.int32)
    accepted = (h5t.IEEE_F16LE, h5t.IEEE_F16BE, h5t.IEEE_F32LE, h5t.IEEE_F32BE, h5t.IEEE_F64LE, h5t.IEEE_F64BE)
    kind = data.id.get_type()
    if not any(kind.equal(one) for one in accepted):
        found = type(kind).__name__.removeprefix("Type").removesuffix("ID")
        raise ModelError(
            f"{where} is of HDF5 type {found} ({kind.get_size()} bytes); required: IEEE floating-point numbers of 16, "
            "32 or 64 bits")
    with np.errstate(over="ignore"):  # float64 beyond float32 becomes infinity, which Layer and Model refuse by name
        return np.asarray(data[()], np.float32)


def attributes(node: h5py.Group, where: str, known: Iterable[str] | None = None) -> dict[str, list[Any]]:
    """The attributes of `node`, each as a flat list of str, int or float."""
    names = attribute_names(node, where)
    if known is not None:
        require_known(names, known, where, "attribute")
    return {name: attribute(node, name, f"{where} attribute {name!r}") for name in names}


def attribute_names(node: h5py.Group, where: str) -> list[str]:
    from h5py import h5a

    names: list[bytes] = []
    h5a.iterate(node.id, names.append)
    return [text(name, where) for name in names]


def attribute(node: h5py.Group, name: str, where: str, longest: int = MAX_TEXT_BYTES) -> list[Any]:
    """One attribute as a flat list of str, int or float.

    longest: bytes that a string may have; with longer ones there may be fewer.
    """
    from h5py import h5a, h5s, h5t

    attribute = h5a.open(node.id, name.encode())
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
