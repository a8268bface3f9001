"""Elements and strings that HDF5 files hold, decoded by zlib, NumPy and what stands below.

What is missing, or not of its size, is an error: HDF5's own library fills it with zeros, or with what its memory holds.
"""

from __future__ import annotations

import itertools
import math
import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any, NamedTuple

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

MAX_CHUNKS = 2**18  # of one dataset, unless it is said

# As HDF5 numbers them; LZF is h5py's. Of the others szip is patented, scale-offset loses digits.
DEFLATE, SHUFFLE, FLETCHER32, LZF = 1, 2, 3, 32000
FILTERS = {DEFLATE: "gzip", SHUFFLE: "shuffle", FLETCHER32: "fletcher32", LZF: "lzf"}
MAX_SLAB_BYTES = 2**28  # of the rows that are decoded for one, when they are read one by one
_SLABS = 2  # that are kept
_NO_FILE = np.uint64(2**40)
_REFERENCE = np.dtype([("length", "<u4"), ("heap", "<u8"), ("index", "<u4")])  # of a string of variable length


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

    def __init__(self, node: Object, max_chunks: int | None = None) -> None:
        self.content = content = node.content
        self._max_chunks = MAX_CHUNKS if max_chunks is None else max_chunks
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
            # Sizes that are no file's are cut off, so that the sum is right or beyond any file.
            return int(np.minimum(self.chunks["size"], _NO_FILE).sum())
        if self.layout == "contiguous":
            return self.size if self.address != NOWHERE else 0
        return len(self.inside)

    @cached_property
    def chunks(self) -> Raw:
        """All that are stored, in no order: first element ("start"), "address", "size" as it is stored, and "mask", a
        bit for each filter that was left out."""
        count = math.prod(self.grid)
        if count > self._max_chunks:
            raise ModelError(f"has {count} chunks; at most {self._max_chunks} are accepted")
        tables = [np.empty(0, _table_type(len(self.chunk)))]
        found = 0
        for table in self._stored_chunks():
            tables.append(table[table["address"] != NOWHERE])
            found += len(tables[-1])
            if found > count:  # which is too many
                break
        return np.concatenate(tables)

    @property
    def grid(self) -> list[int]:
        """How many chunks there are along each axis."""
        return self._grid(self.shape or ())

    def _grid(self, sides: Sequence[int]) -> list[int]:
        return [-(-side // step) for side, step in zip(sides, self.chunk, strict=True)]

    @property
    def cells(self) -> tuple[Raw, Raw]:
        """Of each chunk, its number in the grid, and whether it has a place there."""
        start, chunk = self.chunks["start"], np.array(self.chunk, np.uint64)
        belongs = ((start % chunk == 0) & (start < np.array(self.shape, np.uint64))).all(1)
        cells = np.zeros(len(start), np.uint64)
        for axis, length in enumerate(self.grid):
            cells = cells * np.uint64(length) + start[:, axis] // chunk[axis]
        return cells, belongs

    def _stored_chunks(self) -> Iterator[Raw]:
        rank = len(self.chunk)
        if not self._index:
            if self.address != NOWHERE:
                key = np.dtype([("size", "<u4"), ("mask", "<u4"), ("start", "<u8", (rank,)), ("zero", "<u8")])
                for leaf in leaves(self.content, self.address, 1, key):
                    keys = leaf["key"]
                    yield _table(keys["start"], leaf["address"], keys["size"], keys["mask"])
            return
        nbytes = math.prod(self.chunk) * self.datatype.size
        fields = self._fields
        if self._flags & 1:
            raise ModelError("has chunks at its edge that are stored without its filters; required: with them")
        if self._index == 1:
            size, mask = (fields.number(), fields.number(4)) if self._flags & 2 else (nbytes, 0)
            yield _table(np.zeros((1, rank)), fields.number(), size, mask)
        elif self._index == 2:
            address = fields.number()
            if address > self.content.size:  # NOWHERE, too
                return
            starts = self._starts()
            inside = (starts < np.array(self.shape, np.uint64)).all(1)
            addresses = address + np.arange(len(starts), dtype=np.uint64) * np.uint64(nbytes)
            yield _table(starts, addresses, nbytes, 0)[inside]
        elif self._index == 3:
            fields.take(1)
            yield from self._fixed_array(fields.number(), nbytes)
        else:
            raise ModelError("has chunks in an index that can grow, of HDF5 1.10 or later; required: the older one, as "
                             "h5py writes it unless told libver='latest'")

    def _starts(self) -> Raw:
        """First elements of all chunks that there may ever be, in the order of indices with a number for each."""
        grid = self._grid(self._most)
        if any(most < side for most, side in zip(self._most, self.shape or (), strict=True)):
            raise damaged(f"shape {self.shape} and can grow to {self._most}")
        count = math.prod(grid)
        if count > self._max_chunks:
            raise ModelError(f"can grow to {count} chunks; at most {self._max_chunks} are accepted")
        places = np.indices(grid, np.uint64).reshape(len(grid), count).T
        return places * np.array(self.chunk, np.uint64)

    def _fixed_array(self, address: int, nbytes: int) -> Iterator[Raw]:
        if address == NOWHERE:
            return
        fields = Fields(checked(self.content.structure(address, 28), b"FAHD\0"), 5)
        is_filtered, entry, bits = fields.numbers(3, 1)
        count, block = fields.numbers(2)
        starts = self._starts()
        width = entry - 12  # of a size
        if count != len(starts) or bits > 32 or (not 1 <= width <= 8 if is_filtered else entry != 8):
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
        listed = np.frombuffer(b"".join(elements), np.dtype((np.void, entry)), count)
        if not is_filtered:
            yield _table(starts, listed.view("<u8"), nbytes, 0)
            return
        parts = listed.view(np.uint8).reshape(count, entry)
        sizes = np.zeros((count, 8), np.uint8)
        sizes[:, :width] = parts[:, 8:8 + width]
        yield _table(starts, parts[:, :8].copy().view("<u8")[:, 0], sizes.view("<u8")[:, 0],
                     parts[:, 8 + width:].copy().view("<u4")[:, 0])


def _table_type(rank: int) -> np.dtype[Any]:
    return np.dtype([("start", np.uint64, (rank,)), ("address", np.uint64), ("size", np.uint64), ("mask", np.uint32)])


def _table(start: Raw, address: Raw | int, size: Raw | int, mask: Raw | int) -> Raw:
    """Of chunks, as `Dataset.chunks` has them."""
    table = np.empty(len(start), _table_type(start.shape[1]))
    table["start"], table["address"], table["size"], table["mask"] = start, address, size, mask
    return table


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
    if len(references) % _REFERENCE.itemsize:
        raise damaged("strings of variable length without a place")
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
    dtype, chunks = data.datatype.numpy, data.chunks
    count, (cells, belongs) = math.prod(data.grid), data.cells
    belonging = len(np.unique(cells[belongs]))
    if not count == belonging == len(chunks):
        raise ModelError(f"has {len(chunks)} chunks, {belonging} of them where they belong; required: {count}")
    if data.stored > data.content.size:
        raise ModelError(f"has chunks of {data.stored} bytes in a file of {data.content.size}")
    _require_shuffled(data)
    made = np.empty(shape, dtype)
    for start, address, size, mask in zip(*(chunks[name].tolist() for name in chunks.dtype.names or ()), strict=True):
        packed = data.content.elements(address, np.uint8, (size,)).tobytes()
        place = tuple(slice(at, at + step) for at, step in zip(start, data.chunk, strict=True))
        inner = made[place]
        inner[...] = _chunk(data, packed, mask)[tuple(map(slice, inner.shape))]
    return made


def _require_shuffled(data: Dataset) -> None:
    for code, parameters in data.filters:
        if code == SHUFFLE and parameters[:1] != (data.datatype.size,):
            raise ModelError(f"is shuffled by elements of {parameters} bytes; required: {data.datatype.size}")


def _chunk(data: Dataset, packed: bytes, mask: int) -> Raw:
    dtype = data.datatype.numpy
    nbytes = math.prod(data.chunk) * dtype.itemsize
    return np.frombuffer(_decoded(packed, data.filters, mask, nbytes, dtype.itemsize), dtype).reshape(data.chunk)


class Rows:
    """Rows of a dataset, one by one: without what lies in other chunks, and by any number of threads at once.

    Of chunks with many rows the last that were read are kept, decoded, for rows are most often read one after the
    other.
    """

    def __init__(self, data: Dataset, read: Callable[[int, int], bytes]) -> None:
        """read : (address, count) -> bytes of the file, fewer where it ends; called by many threads at once.

        Raises
        ------
        ModelError
            The dataset is not stored whole, though chunks may be missing; or has chunks out of place, or too large.
        """
        assert data.shape
        self.shape, self._data, self._read = data.shape, data, read
        nbytes = math.prod(data.shape) * data.datatype.size
        if data.layout != "chunked":
            if data.stored != nbytes:
                raise ModelError(f"has {nbytes} bytes of which {data.stored} are stored")
            return
        _require_shuffled(data)
        most = math.prod(data.chunk) * data.datatype.size
        slab = data.chunk[0] * math.prod(data.shape[1:]) * data.datatype.size
        if max(most, slab) > MAX_SLAB_BYTES:
            raise ModelError(f"has chunks of {data.chunk[0]} rows, which take {max(most, slab)} bytes; at most "
                             f"{MAX_SLAB_BYTES} are accepted (h5repack -l CHUNK=1x... writes rows of their own)")
        cells, belongs = data.cells
        if not belongs.all() or len(np.unique(cells)) < len(cells):
            raise damaged("chunks out of place")
        chunks, count = data.chunks, math.prod(data.grid)
        self._address = np.full(count, NOWHERE, np.uint64)
        self._size, self._mask = np.zeros(count, np.uint64), np.zeros(count, np.uint32)
        self._address[cells], self._size[cells], self._mask[cells] = chunks["address"], chunks["size"], chunks["mask"]
        del data.chunks  # from now on they are known by their cells
        self._lock = threading.Lock()
        self._slabs: dict[int, Raw] = {}

    def __getitem__(self, row: int) -> Raw:
        """A row, as the file has it; ModelError for what is missing, damaged, or stored by other filters."""
        data = self._data
        if not 0 <= row < self.shape[0]:
            raise ModelError(f"has {self.shape[0]} rows; row {row} is to be read")
        if data.layout == "chunked":
            number, within = divmod(row, data.chunk[0])
            found: Raw = self._slab(number)[within]
            return found
        nbytes = math.prod(self.shape[1:]) * data.datatype.size
        if data.layout == "compact":
            stored = data.inside[row * nbytes:(row + 1) * nbytes]
        else:
            stored = self._stored(data.address + row * nbytes, nbytes)
        return np.frombuffer(stored, data.datatype.numpy).reshape(self.shape[1:])

    def _stored(self, address: int, count: int) -> bytes:
        if address + count > self._data.content.size:
            raise ModelError(f"ends after {self._data.content.size} bytes, and {count} are to be read from byte "
                             f"{address} on")
        stored = self._read(address, count)
        if len(stored) < count:
            raise ModelError("became shorter while it was read")
        return stored

    def _slab(self, number: int) -> Raw:
        """The rows of all chunks that begin at the same row."""
        if self._data.chunk[0] == 1:
            return self._decoded_slab(number)
        with self._lock:  # what another thread decodes is waited for
            slab = self._slabs.pop(number, None)
            if slab is None:
                slab = self._decoded_slab(number)
                while len(self._slabs) >= _SLABS:
                    del self._slabs[next(iter(self._slabs))]
            self._slabs[number] = slab  # the last
        return slab

    def _decoded_slab(self, number: int) -> Raw:
        data, grid = self._data, self._data.grid
        made = np.empty((min(data.chunk[0], self.shape[0] - number * data.chunk[0]), *self.shape[1:]),
                        data.datatype.numpy)
        first = number * math.prod(grid[1:])
        for cell, place in enumerate(itertools.product(*map(range, grid[1:])), first):
            address, size, mask = int(self._address[cell]), int(self._size[cell]), int(self._mask[cell])
            if address == NOWHERE:
                raise ModelError("was not written")
            inner = made[(slice(None), *(slice(at * step, (at + 1) * step)
                                         for at, step in zip(place, data.chunk[1:], strict=True)))]
            inner[...] = _chunk(data, self._stored(address, size), mask)[tuple(map(slice, inner.shape))]
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
