"""What HDF5 files hold, taken from their bytes without HDF5's library: elements of datasets, strings in heaps.

The library believes what a file says of its chunks, filters and strings, and a hostile file makes it read or write
where it must not. So it is asked only for what a file is made of and where its parts are. Each part is fetched from
there, within the file, and is decoded by zlib, NumPy and what stands below. What is missing is an error, not zeros.
"""

from __future__ import annotations

import io
import itertools
import math
import os
import zlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from fastdtd.errors import ModelError

if TYPE_CHECKING:
    import h5py

MAX_CHUNKS = 2**18  # of one dataset
# As HDF5 numbers them; LZF is h5py's. Its decoder of szip is in C, that of scale-offset has been overrun by hostile
# files (CVE-2025-2308, CVE-2025-44905), and filters from elsewhere would load foreign code.
DEFLATE, SHUFFLE, FLETCHER32, LZF = 1, 2, 3, 32000
FILTERS = {DEFLATE: "gzip", SHUFFLE: "shuffle", FLETCHER32: "fletcher32", LZF: "lzf"}
_HEAP = b"GCOL\x01\0\0\0"  # how a global heap begins
_REFERENCE = np.dtype([("length", "<u4"), ("heap", "<u8"), ("index", "<u4")])  # of a string of variable length

Raw = npt.NDArray[Any]


class Content:
    """The bytes of a file, and the strings in its global heaps."""

    def __init__(self, stream: io.BufferedIOBase) -> None:
        self._stream = stream
        self.size = stream.seek(0, os.SEEK_END)
        self._heaps: dict[int, dict[int, tuple[int, int]]] = {}  # by address: index -> start, length
        self._heap_bytes_left = self.size  # heaps that overlap would have to be walked again and again

    def _heap(self, address: int) -> dict[int, tuple[int, int]]:
        """Where the objects of the global heap at an address are."""
        if address in self._heaps:
            return self._heaps[address]
        head = self.read(address, 16)
        size = int.from_bytes(head[8:], "little")
        self._heap_bytes_left -= size
        if not head.startswith(_HEAP) or self._heap_bytes_left < 0:
            raise ModelError(f"has a damaged heap at byte {address}")
        heap, at = self.read(address, size), 16
        objects = self._heaps[address] = {}
        while at + 16 <= len(heap):  # an object's index (2 bytes), references (2), nothing (4), size (8)
            index, length = int.from_bytes(heap[at:at + 2], "little"), int.from_bytes(heap[at + 8:at + 16], "little")
            step = 16 + (length + 7) // 8 * 8 if index else length  # object 0 is free space and counts its header
            if step < 16 or at + step > len(heap):
                raise ModelError(f"has a damaged heap at byte {address}")
            objects[index] = address + at + 16, length
            at += step
        return objects

    def read(self, start: int, count: int) -> bytes:
        """Bytes that must be there."""
        return self.read_array(start, np.uint8, (count,)).tobytes()

    def read_array(self, start: int, dtype: npt.DTypeLike, shape: Sequence[int]) -> Raw:
        """The same as an array."""
        nbytes = math.prod(shape) * np.dtype(dtype).itemsize
        if not 0 <= start <= start + nbytes <= self.size:
            raise ModelError(f"ends after {self.size} bytes, and {nbytes} are to be read from byte {start} on")
        made = np.empty(shape, dtype)
        # mypy knows arrays as buffers from Python 3.12 on.
        view = memoryview(made.reshape(-1).view(np.uint8))  # type: ignore[arg-type]
        self._stream.seek(start)
        while view:
            count = self._stream.readinto(view)
            if not count:
                raise ModelError("became shorter while it was read")
            view = view[count:]
        return made

    def start_at(self, address: bytes) -> bytes:
        """How what is at an address begins, as far as it is there."""
        start = int.from_bytes(address, "little")
        return self.read(start, min(142, self.size - start)) if start < self.size else b""

    def strings(self, references: bytes, longest: int) -> list[bytes]:
        """Strings of variable length."""
        found = []
        for length, heap, index in np.frombuffer(references, _REFERENCE).tolist():
            if length > longest:
                raise ModelError(f"has a string of {length} bytes; at most {longest} are accepted")
            start, stored = self._heap(heap).get(index, (0, 0)) if length else (0, 0)
            if length > stored:
                raise ModelError(f"has a string of {length} bytes of which the file holds {stored}")
            found.append(self.read(start, length).split(b"\0", 1)[0])
        return found


def itemsize(data: h5py.Dataset) -> int:
    """Bytes that an element takes in the file."""
    from h5py import h5t

    kind = data.id.get_type()
    is_reference = kind.get_class() == h5t.STRING and kind.is_variable_str()
    return _REFERENCE.itemsize if is_reference else int(kind.get_size())


def elements(data: h5py.Dataset, content: Content) -> Raw:
    """All elements of a dataset as the file has them: of its own dtype, or of bytes where NumPy has none.

    Raises ModelError for what is not stored whole, or by other filters than FILTERS.
    """
    from h5py import h5d, h5t

    is_text, layout = data.id.get_type().get_class() == h5t.STRING, data.id.get_create_plist().get_layout()
    dtype = np.dtype(f"V{itemsize(data)}" if is_text else data.dtype)
    nbytes = math.prod(data.shape) * dtype.itemsize
    if layout == h5d.CONTIGUOUS:
        start = data.id.get_offset()
        if start is None or data.id.get_storage_size() != nbytes:
            raise ModelError(f"has {nbytes} bytes of which {data.id.get_storage_size()} are stored")
        return content.read_array(start, dtype, data.shape)
    if layout == h5d.CHUNKED:
        return _from_chunks(data, content, dtype)
    raise ModelError("is stored in a layout other than contiguous and chunked")


def _from_chunks(data: h5py.Dataset, content: Content, dtype: np.dtype[Any]) -> Raw:
    shape, chunk = data.shape, data.chunks
    if any(most not in (None, now) for most, now in zip(data.maxshape, shape, strict=True)):
        raise ModelError(f"has shape {shape} and can grow to {data.maxshape}")
    grid = [range(0, n, step) for n, step in zip(shape, chunk, strict=True)]
    count = math.prod(map(len, grid))
    if count > MAX_CHUNKS:
        raise ModelError(f"has {count} chunks; at most {MAX_CHUNKS} are accepted")
    found: dict[tuple[int, ...], Any] = {}
    seen = 0

    def collect(info: Any) -> bool | None:
        nonlocal seen
        seen += 1
        found[info.chunk_offset] = info
        return True if seen > count else None  # True stops: a damaged index may have no end

    data.id.chunk_iter(collect)
    positions = set(itertools.product(*grid))
    if seen != count or found.keys() != positions:
        raise ModelError(f"has {seen} chunks, {len(positions & found.keys())} of them where they belong; required: "
                         f"{count}")
    stored = sum(info.size for info in found.values())
    if stored > content.size:
        raise ModelError(f"has chunks of {stored} bytes in a file of {content.size}")
    filters, nbytes = _filters(data, dtype.itemsize), math.prod(chunk) * dtype.itemsize
    made = np.empty(shape, dtype)
    for start, info in found.items():
        decoded = _decoded(content.read(info.byte_offset, info.size), filters, info.filter_mask, nbytes, dtype.itemsize)
        place = tuple(slice(at, at + step) for at, step in zip(start, chunk, strict=True))
        inner = made[place]
        inner[...] = np.frombuffer(decoded, dtype).reshape(chunk)[tuple(map(slice, inner.shape))]
    return made


def _filters(data: h5py.Dataset, itemsize: int) -> list[int]:
    """The filters of a dataset, in the order in which they were applied."""
    layout = data.id.get_create_plist()
    filters = [layout.get_filter(i) for i in range(layout.get_nfilters())]
    for code, _, parameters, _ in filters:
        if code == SHUFFLE and tuple(parameters[:1]) != (itemsize,):
            raise ModelError(f"is shuffled by elements of {parameters} bytes; required: {itemsize}")
    return [code for code, *_ in filters]


def _decoded(chunk: bytes | bytearray, filters: Sequence[int], mask: int, nbytes: int, itemsize: int
             ) -> bytes | bytearray:
    """A chunk's `nbytes` bytes. mask: a bit for each filter that was left out, as some are where they save nothing."""
    for i, code in reversed(list(enumerate(filters))):
        if mask >> i & 1:
            continue
        largest = nbytes + 4 * (FLETCHER32 in filters)
        if code == DEFLATE:
            inflater = zlib.decompressobj()
            try:
                chunk = inflater.decompress(chunk, largest + 1)
            except zlib.error as error:
                raise ModelError(f"has a chunk that zlib cannot inflate ({error})") from None
            if not inflater.eof:
                raise ModelError(f"has a chunk that is cut off, or inflates to more than {largest} bytes")
        elif code == LZF:
            chunk = _lzf(chunk, largest)
        elif code == SHUFFLE:
            whole = len(chunk) // itemsize * itemsize
            planes = np.frombuffer(chunk, np.uint8, whole).reshape(itemsize, -1)
            joined = bytearray(chunk)
            elements = np.frombuffer(joined, np.uint8, whole).reshape(-1, itemsize)
            for byte, plane in enumerate(planes):  # twice as fast as a transposed copy
                elements[:, byte] = plane
            chunk = joined
        elif code == FLETCHER32:
            chunk = _checked(chunk)
        else:
            raise ModelError(f"is stored with the filter {code}")
    if len(chunk) != nbytes:
        raise ModelError(f"has a chunk of {len(chunk)} bytes; required: {nbytes}")
    return chunk


def _checked(chunk: bytes | bytearray) -> bytes | bytearray:
    """A chunk without its last four bytes, which are Fletcher's checksum of the others."""
    body, told = chunk[:-4], int.from_bytes(chunk[-4:], "little")
    words = np.frombuffer(body + b"\0" * (len(body) % 2), ">u2").astype(np.int64)
    low = int(words.sum()) % 65535
    high = int((words * (np.arange(len(words), 0, -1) % 65535)).sum()) % 65535
    if len(chunk) < 4 or (told & 0xFFFF) % 65535 != low or (told >> 16) % 65535 != high:
        raise ModelError("has a chunk whose checksum is wrong: it is damaged")
    return body


def _lzf(packed: bytes | bytearray, largest: int) -> bytes:
    """Runs of bytes as they are, and repetitions of what came before, as Marc Lehmann's LibLZF writes them."""
    made = bytearray()
    at = 0
    try:
        while at < len(packed):
            first = packed[at]
            at += 1
            if first < 32:
                if at + first + 1 > len(packed):
                    raise IndexError
                made += packed[at:at + first + 1]
                at += first + 1
            else:
                length = first >> 5
                if length == 7:
                    length += packed[at]
                    at += 1
                start = len(made) - ((first & 31) << 8 | packed[at]) - 1
                at += 1
                if start < 0:
                    raise IndexError
                repeated = made[start:start + length + 2]
                made += (repeated * ((length + 2) // len(repeated) + 1))[:length + 2]
            if len(made) > largest:
                raise IndexError
    except IndexError:
        raise ModelError("has a chunk that is no LZF, or unpacks to too much") from None
    return bytes(made)


# Headers of objects, of which the library is not asked where it would go to a global heap: it copies as many bytes of a
# string as are claimed, and there are damaged heaps of which it finds no end.

_LINKS, _FILES, _LAYOUT, _ATTRIBUTE, _CONTINUATION, _SYMBOLS, _ATTRIBUTES = (
    0x02, 0x07, 0x08, 0x0C, 0x10, 0x11, 0x15)  # types of messages
_CHUNKED, _VIRTUAL = 2, 3  # layouts
_FIXED_ARRAY = 3  # the last of the indices that cannot grow
_END_OF_FREE = 1
_NOWHERE = b"\xff" * 8  # the address of what is not there
_LEAST_NODE_BYTES = 64  # of a node, below which the library counts its records to be billions
_NODE_BYTES = 2**16  # that a node of a B-tree may have in a file of any size
_FREE_BLOCKS = 4096  # of a local heap, which keeps names; files have a few
_PREFIX = 512  # bytes that are read at once, in which most headers end


def root_address(content: Content) -> int:
    """Where the header of the outermost group is."""
    at = {0: 64, 1: 68}.get(content.read(8, 1)[0], 36)  # in the superblock, by its version
    return int.from_bytes(content.read(at, 8), "little")


def why_not_opened(content: Content, address: int) -> str:
    """Why the library must not be given the object at `address`; nothing where it may be.

    What its versions from 1.8 and 1.10 on can write, and few files have, it does not read safely. It looks a virtual
    dataset up when it opens it. Where attributes are kept apart, one that claims to be shared crashes it; where chunks
    are in an index that can grow, sizes in that make it allocate and search without end. For a node of a B-tree it
    takes as much memory as the tree says that its nodes have, and in a heap of names it goes from free block to free
    block, in a circle if they lead there.
    """
    for kind, _, body in _messages(content, address):
        if kind == _LAYOUT and body[:1] > b"\2" and body[1:2] == bytes([_VIRTUAL]):
            return ("as a virtual dataset, whose data are in other files; required: data in this file (h5repack brings "
                    "it in)")
        if kind == _LAYOUT and body[:1] > b"\3" and body[1:2] == bytes([_CHUNKED]) and len(body) > 4:
            index = 5 + body[3] * body[4]  # behind the chunk's sides
            if body[index:index + 1] > bytes([_FIXED_ARRAY]):
                return ("with chunks in an index that can grow, of HDF5 1.10 or later; required: the older one, as "
                        "h5py writes it unless told libver='latest'")
        if kind == _ATTRIBUTES and len(body) > 1:
            at = 2 + 2 * (body[1] & 1)
            if body[at:at + 8] != _NOWHERE:
                return ("with so many or large attributes that HDF5 keeps them apart; required: at most eight, of "
                        "less than 64 KiB, or the older format, as h5py writes it unless told libver='latest'")
        if kind in (_SYMBOLS, _FILES) and len(body) >= 16 and not _is_sound_heap(content, body[8:16]):
            return "with a damaged heap of names; required: an undamaged file"
        if kind == _LINKS and len(body) > 1 and (damage := _damage_of_links(content, body)):
            return f"with {damage}; required: an undamaged file"
    return ""


def _damage_of_links(content: Content, body: bytes) -> str:
    """What is wrong with the heap and the indices of a group's links, which are kept apart where they are many."""
    largest = max(_NODE_BYTES, content.size)
    at = 2 + 8 * (body[1] & 1)
    heap = content.start_at(body[at:at + 8])
    if heap.startswith(b"FRHP\0"):
        sizes = [int.from_bytes(heap[i:i + 8], "little") for i in (112, 120)]  # of its blocks
        blocks_in_a_row = int.from_bytes(heap[110:112], "little")
        if not blocks_in_a_row or 0 in sizes or max(sizes) > largest:
            return f"a heap whose blocks are said to have {max(sizes)} bytes, in a file of {content.size}"
    for tree in body[at + 8:at + 16], body[at + 16:at + 24], heap[22:30]:
        head = content.start_at(tree)
        if not head.startswith(b"BTHD\0"):
            continue
        node, record, records = (int.from_bytes(head[i:j], "little") for i, j in ((6, 10), (10, 12), (26, 34)))
        if not record:
            return "an index of records of no bytes"
        if not _LEAST_NODE_BYTES <= node <= largest:
            return f"an index whose nodes are said to have {node} bytes, in a file of {content.size}"
        if records > content.size:
            return f"an index that is said to hold {records} records, in a file of {content.size} bytes"
    return ""


def _is_sound_heap(content: Content, address: bytes) -> bool:
    """Whether the free blocks of a local heap, which the library goes through, come to an end."""
    head = content.start_at(address)
    if not head.startswith(b"HEAP"):
        return True  # the library refuses it
    size, at, start = (int.from_bytes(head[i:i + 8], "little") for i in (8, 16, 24))
    for _ in range(_FREE_BLOCKS):
        if at in (_END_OF_FREE, 2**64 - 1):
            return True
        if at + 16 > size:
            return False
        at = int.from_bytes(content.read(start + at, 8), "little")
    return False


def attribute_references(content: Content, address: int, name: bytes) -> bytes:
    """The references to strings of variable length that an attribute of the object at `address` holds.

    Raises ModelError where they are not in its header.
    """
    for kind, is_shared, body in _messages(content, address):
        if kind != _ATTRIBUTE or is_shared or len(body) < 8:
            continue
        version, (name_size, *others) = body[0], (int.from_bytes(body[i:i + 2], "little") for i in (2, 4, 6))
        start = 8 if version < 3 else 9
        if body[start:start + name_size].split(b"\0", 1)[0] == name:
            return body[start + sum(-(-n // 8) * 8 if version == 1 else n for n in (name_size, *others)):]
    raise ModelError("has strings of variable length that are not in its object's header; required: there, or strings "
                     "of fixed length")


def _messages(content: Content, address: int) -> Iterator[tuple[int, bool, bytes]]:
    """Type, whether it is kept elsewhere, and body of each message in an object's header."""
    prefix = content.read(address, min(_PREFIX, content.size - address))
    if prefix.startswith(b"OHDR"):
        flags = prefix[5]
        at = 6 + 16 * bool(flags & 0x20) + 4 * bool(flags & 0x10)
        width = 1 << (flags & 3)
        blocks = [(address + at + width, int.from_bytes(prefix[at:at + width], "little"))]
        head, is_new = 4 + 2 * bool(flags & 4), True
    else:
        blocks = [(address + 16, int.from_bytes(prefix[8:12], "little"))]
        head, is_new = 8, False
    left = content.size  # blocks that lead round in circles end here
    while blocks:
        start, size = blocks.pop(0)
        left -= max(size, head)
        if left < 0:
            raise ModelError("has a damaged object header")
        is_read = address <= start <= start + size <= address + len(prefix)
        block = prefix[start - address:start - address + size] if is_read else content.read(start, size)
        at = 0
        while at + head <= len(block):
            kind = block[at] if is_new else int.from_bytes(block[at:at + 2], "little")
            at_size = at + (1 if is_new else 2)
            length = int.from_bytes(block[at_size:at_size + 2], "little")
            body = block[at + head:at + head + length]
            if kind == _CONTINUATION and len(body) >= 16:
                place, size = int.from_bytes(body[:8], "little"), int.from_bytes(body[8:16], "little")
                blocks.append((place + 4, size - 8) if is_new else (place, size))  # signature, checksum
            elif len(body) == length:
                yield kind, bool(block[at_size + 2] & 2), body
            at += head + length
