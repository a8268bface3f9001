"""Elements and strings that HDF5 files hold, decoded by zlib, NumPy and what stands below.

What is missing, or not of its size, is an error: HDF5's own library fills it with zeros, or with what its memory holds.
"""

from __future__ import annotations

import itertools
import math
import zlib
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np

from fastdtd import hdf5_format
from fastdtd.errors import ModelError
from fastdtd.hdf5_format import (
    NOWHERE,
    Content,
    Fields,
    Object,
    Raw,
    checked,
    damaged,
    datatype,
    heap_object,
    leaves,
    shape,
)

MAX_CHUNKS = 2**18  # of one dataset

# As HDF5 numbers them; LZF is h5py's. Of the others szip is patented, scale-offset loses digits.
DEFLATE, SHUFFLE, FLETCHER32, LZF = 1, 2, 3, 32000
FILTERS = {DEFLATE: "gzip", SHUFFLE: "shuffle", FLETCHER32: "fletcher32", LZF: "lzf"}
_REFERENCE = np.dtype([("length", "<u4"), ("heap", "<u8"), ("index", "<u4")])  # of a string of variable length


class Chunk(NamedTuple):
    start: tuple[int, ...]  # its first element
    address: int
    size: int  # as it is stored
    mask: int  # a bit for each filter that was left out


class Filter(NamedTuple):
    code: int
    parameters: tuple[int, ...]


class Dataset:
    """Where the elements of a dataset are, and what they are.

    Attributes
    ----------
    shape : tuple of int, or None where it is said to be empty
    datatype : Datatype
    layout : "compact", "contiguous" or "chunked"
    is_external : whether the elements are in other files
    filters : list of Filter, in the order in which they were applied
    inside : bytes, the elements of a compact one
    address, size : of a contiguous one
    chunk : tuple of int, the sides of a chunk
    """

    def __init__(self, node: Object) -> None:
        self.content = content = node.content
        self.inside, self.address, self.size = b"", NOWHERE, 0
        self.chunk: tuple[int, ...] = ()
        self.is_external, self.filters = False, _filters(node.body(hdf5_format.FILTERS))
        kinds = {}
        for message in node.messages:
            kinds[message.kind] = message
            self.is_external |= message.kind == hdf5_format.FILES
        if not {hdf5_format.DATASPACE, hdf5_format.DATATYPE, hdf5_format.LAYOUT} <= kinds.keys():
            raise damaged("a dataset without a type or a shape")
        if kinds[hdf5_format.DATASPACE].flags & hdf5_format.SHARED:
            raise ModelError("shares shapes between headers; required: shapes of their own (h5repack writes them)")
        self.shape, self._most = shape(kinds[hdf5_format.DATASPACE].body)
        _, flags, body = kinds[hdf5_format.DATATYPE]
        self.datatype = datatype(content, body, bool(flags & hdf5_format.SHARED))
        fields = Fields(kinds[hdf5_format.LAYOUT].body)
        version = fields.number(1)
        if version in (1, 2):
            rank, kind = fields.numbers(2, 1)
            fields.take(5)
        elif version in (3, 4, 5):
            kind, rank = fields.number(1), 0
        else:
            raise ModelError(f"has elements in a layout of version {version}; 1 to 5 are read")
        if kind > 3 or (kind == 3 and version < 4):
            raise damaged(f"a layout of kind {kind}")
        self.layout = ("compact", "contiguous", "chunked", "virtual")[kind]
        self._index, self._fields = 0, fields
        nbytes = math.prod(self.shape or ()) * self.datatype.size
        if self.layout == "compact":
            fields.take(4 * rank)
            self.inside = fields.take(fields.number(2 if version > 2 else 4))
        elif self.layout == "contiguous":
            self.address, self.size = fields.number(), fields.number() if version > 2 else nbytes
        elif self.layout == "chunked" and version < 4:
            rank = fields.number(1) if version == 3 else rank
            self.address = fields.number()
            self.chunk = fields.numbers(rank, 4)
        elif self.layout == "chunked":
            self._flags, rank, width = fields.numbers(3, 1)
            self.chunk = fields.numbers(rank, width)
            self._index = fields.number(1)
        if self.layout == "chunked":
            sides, size = self.chunk[:-1], self.chunk[-1:]
            if size != (self.datatype.size,) or 0 in sides or len(sides) != len(self.shape or ()):
                raise damaged(f"chunks of shape {self.chunk} in a dataset of shape {self.shape}")
            self.chunk = sides

    @property
    def stored(self) -> int:
        """Bytes that the elements take in the file."""
        if self.layout == "chunked":
            return sum(chunk.size for chunk in self.chunks)
        if self.layout == "contiguous":
            return self.size if self.address != NOWHERE else 0
        return len(self.inside)

    @cached_property
    def chunks(self) -> list[Chunk]:
        """All that are stored, in no order."""
        count = math.prod(self._grid(self.shape or ()))
        if count > MAX_CHUNKS:
            raise ModelError(f"has {count} chunks; at most {MAX_CHUNKS} are accepted")
        found = (chunk for chunk in self._stored_chunks() if chunk.address != NOWHERE)
        return list(itertools.islice(found, count + 1))  # one more shows that there are too many

    def _grid(self, sides: Sequence[int]) -> list[int]:
        return [-(-side // step) for side, step in zip(sides, self.chunk, strict=True)]

    def _stored_chunks(self) -> Iterator[Chunk]:
        if not self._index:
            if self.address != NOWHERE:
                for key, address in leaves(self.content, self.address, 1, 16 + 8 * len(self.chunk)):
                    fields = Fields(key)
                    size, mask = fields.numbers(2, 4)
                    yield Chunk(fields.numbers(len(self.chunk)), address, size, mask)
            return
        nbytes = math.prod(self.chunk) * self.datatype.size
        fields = self._fields
        if self._flags & 1:
            raise ModelError("has chunks at its edge that are stored without its filters; required: with them")
        if self._index == 1:
            size, mask = (fields.number(), fields.number(4)) if self._flags & 2 else (nbytes, 0)
            yield Chunk((0,) * len(self.chunk), fields.number(), size, mask)
        elif self._index == 2:
            address = fields.number()
            if address != NOWHERE:
                for i, start in enumerate(self._starts()):
                    if all(at < side for at, side in zip(start, self.shape or (), strict=True)):
                        yield Chunk(start, address + i * nbytes, nbytes, 0)
        elif self._index == 3:
            fields.take(1)
            yield from self._fixed_array(fields.number(), nbytes)
        else:
            raise ModelError("has chunks in an index that can grow, of HDF5 1.10 or later; required: the older one, as "
                             "h5py writes it unless told libver='latest'")

    def _starts(self) -> Iterator[tuple[int, ...]]:
        """First elements of all chunks that there may ever be, in the order of indices with a number for each."""
        grid = self._grid(self._most)
        if any(most < side for most, side in zip(self._most, self.shape or (), strict=True)):
            raise damaged(f"shape {self.shape} and can grow to {self._most}")
        if math.prod(grid) > MAX_CHUNKS:
            raise ModelError(f"can grow to {math.prod(grid)} chunks; at most {MAX_CHUNKS} are accepted")
        return itertools.product(*(range(0, n * step, step) for n, step in zip(grid, self.chunk, strict=True)))

    def _fixed_array(self, address: int, nbytes: int) -> Iterator[Chunk]:
        if address == NOWHERE:
            return
        fields = Fields(checked(self.content.structure(address, 28), b"FAHD\0"), 5)
        is_filtered, entry, bits = fields.numbers(3, 1)
        count, block = fields.numbers(2)
        starts = list(self._starts())
        if count != len(starts) or bits > 32 or entry < 8 + is_filtered * 5:
            raise damaged("no sound index of chunks")
        if block == NOWHERE:
            return
        page = 1 << bits
        pages = -(-count // page) if count > page else 0
        marks = -(-pages // 8)
        head = self.content.structure(block, 14 + marks + (entry * count if not pages else 0) + 4)
        elements = [checked(head, b"FADB\0")[14 + marks:]]
        at = block + len(head)
        for number in range(pages):
            size = entry * min(page, count - number * page)
            if head[14 + number // 8] >> 7 - number % 8 & 1:
                elements.append(checked(self.content.structure(at, size + 4), b""))
            else:
                elements.append(b"\xff" * size)
            at += size + 4
        fields = Fields(b"".join(elements))
        for start in starts:
            place = fields.number()
            size, mask = (fields.number(entry - 12), fields.number(4)) if is_filtered else (nbytes, 0)
            yield Chunk(start, place, size, mask)


def _filters(body: bytes | None) -> list[Filter]:
    if body is None:
        return []
    fields = Fields(body)
    version, count = fields.numbers(2, 1)
    if version == 1:
        fields.take(6)
    found = []
    for _ in range(count):
        code = fields.number(2)
        name = fields.number(2) if version == 1 or code >= 256 else 0
        fields.take(2)
        parameters = fields.number(2)
        fields.take(-(-name // 8) * 8 if version == 1 else name)
        found.append(Filter(code, fields.numbers(parameters, 4)))
        fields.take(4 * (parameters % 2) if version == 1 else 0)
    return found


def strings(content: Content, references: bytes, longest: int) -> list[bytes]:
    """Strings of variable length."""
    found = []
    for length, heap, index in np.frombuffer(references, _REFERENCE).tolist():
        if length > longest:
            raise ModelError(f"has a string of {length} bytes; at most {longest} are accepted")
        start, stored = heap_object(content, heap, index) if length else (0, 0)
        if length > stored:
            raise ModelError(f"has a string of {length} bytes of which the file holds {stored}")
        found.append(content.structure(start, length).split(b"\0", 1)[0])
    return found


def elements(data: Dataset) -> Raw:
    """All elements of a dataset, as the file has them.

    Raises ModelError for what is not stored whole, or by other filters than FILTERS.
    """
    assert data.shape is not None
    dtype = data.datatype.numpy
    nbytes = math.prod(data.shape) * dtype.itemsize
    if data.layout == "chunked":
        return _from_chunks(data, data.shape)
    if data.stored != nbytes:
        raise ModelError(f"has {nbytes} bytes of which {data.stored} are stored")
    if data.layout == "compact":
        return np.frombuffer(data.inside, dtype).reshape(data.shape)
    return data.content.elements(data.address, dtype, data.shape)


def _from_chunks(data: Dataset, shape: tuple[int, ...]) -> Raw:
    dtype, chunk = data.datatype.numpy, data.chunk
    grid = [range(0, n, step) for n, step in zip(shape, chunk, strict=True)]
    count, placed = math.prod(map(len, grid)), {found.start: found for found in data.chunks}
    belonging = sum(all(at in places for at, places in zip(start, grid, strict=True)) for start in placed)
    if not count == belonging == len(data.chunks):
        raise ModelError(f"has {len(data.chunks)} chunks, {belonging} of them where they belong; required: {count}")
    if data.stored > data.content.size:
        raise ModelError(f"has chunks of {data.stored} bytes in a file of {data.content.size}")
    for code, parameters in data.filters:
        if code == SHUFFLE and parameters[:1] != (dtype.itemsize,):
            raise ModelError(f"is shuffled by elements of {parameters} bytes; required: {dtype.itemsize}")
    nbytes = math.prod(chunk) * dtype.itemsize
    made = np.empty(shape, dtype)
    for start, found in placed.items():
        packed = data.content.elements(found.address, np.uint8, (found.size,)).tobytes()
        decoded = _decoded(packed, data.filters, found.mask, nbytes, dtype.itemsize)
        place = tuple(slice(at, at + step) for at, step in zip(start, chunk, strict=True))
        inner = made[place]
        inner[...] = np.frombuffer(decoded, dtype).reshape(chunk)[tuple(map(slice, inner.shape))]
    return made


def _decoded(chunk: bytes | bytearray, filters: Sequence[Filter], mask: int, nbytes: int, itemsize: int
             ) -> bytes | bytearray:
    """A chunk's `nbytes` bytes. mask: a bit for each filter that was left out, as some are where they save nothing."""
    largest = nbytes + 4 * any(code == FLETCHER32 for code, _ in filters)
    for i, (code, _) in reversed(list(enumerate(filters))):
        if mask >> i & 1:
            continue
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
