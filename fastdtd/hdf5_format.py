"""HDF5's format: what a file is made of, read from its bytes without HDF5's library.

The library believes a file. Headers, indices, heaps and chunks that lie make it crash, allocate gigabytes or search
without end, and every longer run of mutated files found another place of that kind. Here each structure is fetched
within the file, its checksum compared where it has one, and what is fetched in all is limited. What few files have is
not read: shared messages, heaps with filters, indices of chunks that can grow.

Source: HDF5 File Format Specification, version 3.0, The HDF Group.
"""

from __future__ import annotations

import bisect
import io
import itertools
import math
import os
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fastdtd.errors import ModelError

SIGNATURE = b"\x89HDF\r\n\x1a\n"
MAX_STRUCTURE_BYTES = 2**26  # that are read of a file's structures in all, unless it is said
_MAX_MESSAGES = 2**16  # of one header; HDF5's own limit
_USER_BLOCK = 512  # and its doubles: where a file may begin
_MAX_DEPTH = 64  # of trees, and rows of blocks in a heap, whose sizes double
_PREFIX = 512  # bytes that are read at once, in which most headers end
NOWHERE = 2**64 - 1  # the address of what is not there

# Types of messages
DATASPACE, LINKS, DATATYPE, LINK, FILES, LAYOUT = 0x01, 0x02, 0x03, 0x06, 0x07, 0x08
FILTERS, ATTRIBUTE, CONTINUATION, SYMBOLS, ATTRIBUTES = 0x0B, 0x0C, 0x10, 0x11, 0x15
SHARED = 2  # of a message's flags
_HUGE = 1 << 4  # of references into a heap

Raw = npt.NDArray[Any]


def damaged(what: str) -> ModelError:
    return ModelError(f"has {what}: the file is damaged")


class Content:
    """The bytes of a file. Addresses count from its superblock; before that may be a block of the user's."""

    def __init__(self, stream: io.BufferedIOBase, most: int | None = None) -> None:
        """most: bytes that are read of structures in all; they are limited by the file's size, too."""
        self._stream = stream
        self.size = stream.seek(0, os.SEEK_END)
        self.begin = 0
        starts = itertools.takewhile(lambda at: at < self.size, (0, *(_USER_BLOCK << i for i in range(56))))
        self.is_hdf5 = False
        for start in starts:
            stream.seek(start)
            if stream.read(len(SIGNATURE)) == SIGNATURE:
                self.is_hdf5, self.begin, self.size = True, start, self.size - start
                break
        self._structure_bytes_left = min(4 * self.size + 2**20, MAX_STRUCTURE_BYTES if most is None else most)
        self._element_bytes_left = 4 * self.size
        # What was read, by address
        self.headers: dict[int, list[Message]] = {}
        self.global_heaps: dict[int, dict[int, tuple[int, int]]] = {}
        self.fractal_heaps: dict[int, _Heap] = {}

    def structure(self, start: int, count: int) -> bytes:
        """Bytes of a structure. What overlaps is read again and again, so there is a limit on all together."""
        self._require(start, count)
        self._structure_bytes_left -= max(count, 64)  # reading has its costs
        if self._structure_bytes_left < 0:
            raise damaged("structures that overlap, or lead round in circles")
        return self._array(start, np.uint8, (count,)).tobytes()

    def elements(self, start: int, dtype: npt.DTypeLike, shape: Sequence[int]) -> Raw:
        """What a dataset stores."""
        nbytes = math.prod(shape) * np.dtype(dtype).itemsize
        self._require(start, nbytes)
        self._element_bytes_left -= nbytes
        if self._element_bytes_left < 0:
            raise damaged("datasets that overlap")
        return self._array(start, dtype, shape)

    def _require(self, start: int, count: int) -> None:
        if not 0 <= start <= start + count <= self.size:
            raise ModelError(f"ends after {self.size} bytes, and {count} are to be read from byte {start} on")

    def _array(self, start: int, dtype: npt.DTypeLike, shape: Sequence[int]) -> Raw:
        made = np.empty(shape, dtype)
        # mypy knows arrays as buffers from Python 3.12 on.
        view = memoryview(made.reshape(-1).view(np.uint8))  # type: ignore[arg-type]
        self._stream.seek(self.begin + start)
        while view:
            count = self._stream.readinto(view)
            if not count:
                raise ModelError("became shorter while it was read")
            view = view[count:]
        return made


class Fields:
    """The fields of a structure, one after the other."""

    def __init__(self, data: bytes, at: int = 0) -> None:
        self._data, self.at = data, at

    def take(self, count: int) -> bytes:
        end = self.at + count
        if not self.at <= end <= len(self._data):
            raise damaged("a structure that ends too early")
        taken = self._data[self.at:end]
        self.at = end
        return taken

    def number(self, width: int = 8) -> int:
        return int.from_bytes(self.take(width), "little")

    def numbers(self, count: int, width: int = 8) -> tuple[int, ...]:
        return tuple(self.number(width) for _ in range(count))

    def string(self) -> bytes:
        """What comes before the next zero."""
        end = self._data.find(b"\0", self.at)
        return self.take(end - self.at if end >= 0 else len(self._data) + 1)  # the latter is an error

    @property
    def left(self) -> int:
        return len(self._data) - self.at


def checksum(data: bytes) -> int:
    """Bob Jenkins's lookup3, as HDF5 uses it for its structures."""
    mask = 0xFFFFFFFF
    a = b = c = (0xDEADBEEF + len(data)) & mask
    if not data:
        return c
    words: tuple[int, ...] = struct.unpack(f"<{(len(data) + 11) // 12 * 3}I", data + bytes(-len(data) % 12))
    numbers = iter(words[:-3])
    for x, y, z in zip(numbers, numbers, numbers, strict=True):
        b += y
        c = c + z & mask
        a = (a + x - c ^ (c << 4 | c >> 28)) & mask
        c += b
        b = (b - a ^ (a << 6 | a >> 26)) & mask
        a += c
        c = (c - b ^ (b << 8 | b >> 24)) & mask
        b += a
        a = (a - c ^ (c << 16 | c >> 16)) & mask
        c += b
        b = (b - a ^ (a << 19 | a >> 13)) & mask
        a += c
        c = (c - b ^ (b << 4 | b >> 28)) & mask
        b += a
    a, b, c = a + words[-3] & mask, b + words[-2] & mask, c + words[-1] & mask
    c = (c ^ b) - (b << 14 | b >> 18) & mask
    a = (a ^ c) - (c << 11 | c >> 21) & mask
    b = (b ^ a) - (a << 25 | a >> 7) & mask
    c = (c ^ b) - (b << 16 | b >> 16) & mask
    a = (a ^ c) - (c << 4 | c >> 28) & mask
    b = (b ^ a) - (a << 14 | a >> 18) & mask
    return (c ^ b) - (b << 24 | b >> 8) & mask


def checked(block: bytes, signature: bytes) -> bytes:
    """A structure without the checksum at its end."""
    if not block.startswith(signature) or checksum(block[:-4]) != int.from_bytes(block[-4:], "little"):
        raise damaged(f"no sound {signature.decode('latin1')}")
    return block[:-4]


# ---- Objects and their headers ---------------------------------------------------------------------------------------


class Message(NamedTuple):
    """Of an object's header."""

    kind: int
    flags: int
    body: bytes


@dataclass(frozen=True)
class Object:
    """A group, a dataset or a named type; where its header is, which is the same for all links that lead to it."""

    content: Content
    address: int

    @property
    def messages(self) -> list[Message]:
        if self.address not in self.content.headers:
            self.content.headers[self.address] = list(
                itertools.islice(_messages(self.content, self.address), _MAX_MESSAGES))
        return self.content.headers[self.address]

    @property
    def kind(self) -> str:
        """"group", "dataset" or "datatype"."""
        kinds = {message.kind for message in self.messages}
        if kinds & {SYMBOLS, LINKS, LINK}:
            return "group"
        return "dataset" if LAYOUT in kinds else "datatype"

    def body(self, kind: int) -> bytes | None:
        """Of the first message of a kind, where there is one."""
        for message in self.messages:
            if message.kind == kind:
                if message.flags & SHARED:
                    raise ModelError("shares messages of its header; required: whole headers (h5repack writes them)")
                return message.body
        return None


def root(content: Content) -> Object:
    """The outermost group."""
    block = Fields(content.structure(0, min(96, content.size)), 8)
    version = block.number(1)
    if version > 3:
        raise ModelError(f"has a superblock of version {version}; 0 to 3 are read")
    block.at = 13 if version < 2 else 9
    if block.take(2) != b"\x08\x08":
        raise ModelError("does not use 8-byte HDF5 addresses")
    if version < 2:
        block.at = 24 + 4 * version
        _, _, end, _, _, address = block.numbers(6)
    else:
        block.at = 12
        _, _, end, address = block.numbers(4)
        checked(content.structure(0, 48), SIGNATURE)
    if end > content.begin + content.size:
        raise ModelError(f"ends after {content.begin + content.size} of {end} bytes: it is cut off")
    return Object(content, address)


def _messages(content: Content, address: int) -> Iterator[Message]:
    prefix = content.structure(address, min(_PREFIX, max(0, content.size - address)))
    fields = Fields(prefix)
    is_new = fields.take(4) == b"OHDR"
    if is_new:
        version, flags = fields.numbers(2, 1)
        fields.take(16 * bool(flags & 0x20) + 4 * bool(flags & 0x10))  # times, and when attributes are kept apart
        size = fields.number(1 << (flags & 3)) + 4
        head = 4 + 2 * bool(flags & 4)
    else:
        version, head = prefix[0] + 1, 8
        fields.take(4)
        size = fields.number(4)
        fields.take(4)
    if version != 2:
        raise damaged(f"no object at byte {address}")
    begin = fields.at
    blocks = [(address, begin + size)]
    for start, size in blocks:
        is_first = start == address
        block = prefix[:size] if is_first and size <= len(prefix) else content.structure(start, size)
        if is_new:
            block = checked(block, b"OHDR" if is_first else b"OCHK")
        at = begin if is_first else 4 * is_new
        while at + head <= len(block):
            if is_new:
                kind, length, bits = block[at], block[at + 1] | block[at + 2] << 8, block[at + 3]
            else:
                kind, length, bits = block[at] | block[at + 1] << 8, block[at + 2] | block[at + 3] << 8, block[at + 4]
            at += head + length
            if at > len(block):
                raise damaged(f"a header at byte {address} that ends too early")
            body = block[at - length:at]
            if kind == CONTINUATION:
                blocks.append(struct.unpack("<QQ", Fields(body).take(16)))
                if len(blocks) > len({start for start, _ in blocks}):
                    raise damaged("a header that leads round in circles")
            else:
                yield Message(kind, bits, body)


# ---- Groups ----------------------------------------------------------------------------------------------------------


class Link(NamedTuple):
    name: bytes
    address: int | None  # None: a soft, external or user-defined link


def links(group: Object) -> Iterator[Link]:
    """What a group holds, in no order."""
    content = group.content
    for message in group.messages:
        if message.kind == SYMBOLS:
            yield from _symbols(content, *Fields(message.body).numbers(2))
        elif message.kind == LINK:
            yield _link(message.body)
        elif message.kind == LINKS:
            fields = Fields(message.body, 1)
            fields.take(8 * (fields.number(1) & 1))  # the largest index by order of creation
            heap, tree = fields.numbers(2)
            if heap != NOWHERE:
                for record in _records(content, tree, 5):
                    yield _link(_Heap.of(content, heap).object(record[4:]))


def _symbols(content: Content, tree: int, heap: int) -> Iterator[Link]:
    """Of a group as HDF5 had them before 1.8: a tree of nodes, and a heap of names."""
    head = Fields(content.structure(heap, 32))
    if head.take(8) != b"HEAP\0\0\0\0":
        raise damaged("no sound heap of names")
    size, _, start = head.numbers(3)
    names = content.structure(start, size)
    for address in itertools.chain.from_iterable(leaf["address"].tolist() for leaf in leaves(content, tree, 0, "<u8")):
        node = Fields(content.structure(address, 8))
        if node.take(6) != b"SNOD\1\0":
            raise damaged("no sound node of symbols")
        count = node.number(2)
        node = Fields(content.structure(address + 8, 40 * count))
        for _ in range(count):
            name, header = node.numbers(2)
            node.take(24)
            yield Link(Fields(names, name).string(), None if header == NOWHERE else header)


def _link(body: bytes) -> Link:
    fields = Fields(body)
    version, flags = fields.numbers(2, 1)
    if version != 1:
        raise damaged(f"a link of version {version}")
    kind = fields.number(1) if flags & 8 else 0
    fields.take(8 * bool(flags & 4) + bool(flags & 16))  # order of creation; character set
    name = fields.take(fields.number(1 << (flags & 3)))
    return Link(name, None if kind else fields.number())


# ---- Trees and heaps -------------------------------------------------------------------------------------------------


def leaves(content: Content, address: int, kind: int, key: npt.DTypeLike) -> Iterator[Raw]:
    """Keys and addresses in each leaf of a B-tree of the first version, in order."""
    entry = np.dtype([("key", key), ("address", "<u8")])
    waiting = [(address, -1)]
    while waiting:
        address, expected = waiting.pop()
        head = Fields(content.structure(address, 24))
        signature, found, level, count = head.take(4), *head.numbers(2, 1), head.number(2)
        if signature != b"TREE" or found != kind or expected not in (-1, level):
            raise damaged(f"no sound TREE at byte {address}")
        entries = np.frombuffer(content.structure(address + 24, count * entry.itemsize), entry)
        if level:
            waiting += [(child, level - 1) for child in entries["address"][::-1].tolist()]
        else:
            yield entries


def _records(content: Content, address: int, kind: int) -> Iterator[bytes]:
    """Of a B-tree of the second version, in no order."""
    fields = Fields(checked(content.structure(address, 38), b"BTHD\0" + bytes([kind])), 6)
    size, record, depth = fields.number(4), *fields.numbers(2, 2)
    fields.take(2)
    start, count = fields.number(), fields.number(2)
    if depth > _MAX_DEPTH or not record:
        raise damaged("no sound BTHD")
    # How many records a node may have, and its subtree; and the bytes that these numbers take in nodes above
    most = in_all = (size - 10) // max(1, record)
    width, widths = _width(most), [0]
    for _ in range(depth):
        pointer = 8 + width + widths[-1]
        most = (size - 10 - pointer) // (record + pointer)
        in_all = (most + 1) * in_all + most
        widths.append(_width(in_all))
    waiting = [(start, count, depth)] if start != NOWHERE else []
    while waiting:
        address, count, level = waiting.pop()
        pointer = 8 + width + widths[level - 1] if level else 0
        nbytes = 6 + count * record + (count + 1) * pointer * bool(level)
        node = Fields(checked(content.structure(address, nbytes + 4), b"BTIN\0" if level else b"BTLF\0"), 6)
        yield from [node.take(record) for _ in range(count)]
        for _ in range(count + 1 if level else 0):
            waiting.append((node.number(), node.number(width), level - 1))
            node.take(widths[level - 1])


def _width(largest: int) -> int:
    """Bytes that a number takes of which HDF5 knows the largest."""
    return max(largest, 1).bit_length() + 7 >> 3


class _Heap:
    """A fractal heap: objects in blocks whose sizes double from row to row."""

    @classmethod
    def of(cls, content: Content, address: int) -> _Heap:
        if address not in content.fractal_heaps:
            content.fractal_heaps[address] = cls(content, address)
        return content.fractal_heaps[address]

    def __init__(self, content: Content, address: int) -> None:
        self._content = content
        head = checked(content.structure(address, 146), b"FRHP\0")
        fields = Fields(head, 7)
        filters, _, largest, _, self._huge_tree = (fields.number(n) for n in (2, 1, 4, 8, 8))
        fields.at = 110
        self._columns, self._least, most, bits, _ = (fields.number(n) for n in (2, 8, 8, 2, 2))
        start, rows = fields.number(), fields.number(2)
        if filters:
            raise ModelError("keeps links or attributes apart, with filters; required: without")
        powers = self._columns, self._least, most
        if any(n < 1 or n & n - 1 for n in powers) or most < self._least or bits > 64:
            raise damaged("no sound heap")
        self._offset = bits + 7 >> 3
        self._length = min(most.bit_length() + 6 >> 3, _width(largest))
        self._direct_rows = most.bit_length() - self._least.bit_length() + 2
        self._blocks = sorted(self._below(start, rows))

    def _below(self, address: int, rows: int) -> Iterator[tuple[int, int, int]]:
        """Begin in the heap, size and address of blocks with objects; rows: of those that a block lists, none where it
        has objects itself.
        """
        waiting = [(address, 0, self._least, rows)]
        while waiting:
            address, begin, size, rows = waiting.pop()
            if rows < 1:
                yield begin, size, address
                continue
            if rows > _MAX_DEPTH:
                raise damaged("no sound heap")
            count = rows * self._columns
            head = 13 + self._offset
            block = Fields(checked(self._content.structure(address, head + 8 * count + 4), b"FHIB\0"), head)
            for row in range(rows):
                size = self._least << max(0, row - 1)
                below = 0 if row < self._direct_rows else (
                    size.bit_length() - (self._least * self._columns).bit_length() + 1)
                for _ in range(self._columns):
                    child = block.number()
                    if child != NOWHERE:
                        waiting.append((child, begin, size, below))
                    begin += size

    @cached_property
    def _huge(self) -> dict[bytes, tuple[int, int]]:
        """Addresses and lengths of objects that have no place in blocks."""
        records = list(_records(self._content, self._huge_tree, 1))
        return {record[16:]: (Fields(record).number(), Fields(record, 8).number()) for record in records}

    def object(self, reference: bytes) -> bytes:
        fields = Fields(reference)
        kind = fields.number(1)
        if kind == _HUGE and (key := fields.take(fields.left).ljust(8, b"\0")) in self._huge:
            return self._content.structure(*self._huge[key])
        if not kind:
            at, length = fields.number(self._offset), fields.number(self._length)
            begin, size, address = self._blocks[bisect.bisect(self._blocks, (at, NOWHERE)) - 1]
            if begin <= at <= at + length <= begin + size:
                return self._content.structure(address + at - begin, length)
        raise damaged("a heap without what is to be in it")


def heap_object(content: Content, address: int, index: int) -> tuple[int, int]:
    """Where an object of a global heap is, and how many bytes it has; none where there is none."""
    if address not in content.global_heaps:
        try:
            content.global_heaps[address] = dict(_heap_objects(content, address))
        except ModelError:
            raise ModelError(f"has a damaged heap at byte {address}") from None
    return content.global_heaps[address].get(index, (0, 0))


def _heap_objects(content: Content, address: int) -> Iterator[tuple[int, tuple[int, int]]]:
    head = content.structure(address, 16)
    if not head.startswith(b"GCOL\1\0\0\0"):
        raise damaged("no sound heap")
    fields = Fields(content.structure(address, int.from_bytes(head[8:], "little")), 16)
    while fields.left >= 16:
        index, _, length = fields.number(2), fields.take(6), fields.number()
        yield index, (address + fields.at, length)
        fields.take((length + 7) // 8 * 8 if index else length - 16)  # object 0 is free space and counts its header


# ---- Types, shapes, attributes ---------------------------------------------------------------------------------------


class Datatype(NamedTuple):
    """Of elements.

    kind : as h5py calls it
    size : bytes of an element
    numpy : what NumPy reads it as, bytes where it has nothing of the kind
    is_variable : whether it is a string of variable length, of which the elements say where it is
    is_spaced : whether it is a string that spaces fill up
    """

    kind: str
    size: int
    numpy: np.dtype[Any]
    is_variable: bool = False
    is_spaced: bool = False


_CLASSES = ("Integer", "Float", "Time", "String", "Bitfield", "Opaque", "Compound", "Reference", "Enum", "Vlen",
            "Array", "Complex")
_TRUTHS = b"FALSE\0TRUE\0\0\1", b"FALSE\0\0\0TRUE\0\0\0\0\0\1"  # names, padded or not, and values
# By size: offset, precision, where exponent and mantissa are and what they have, bias
_IEEE = {2: (0, 16, 10, 5, 0, 10, 15), 4: (0, 32, 23, 8, 0, 23, 127), 8: (0, 64, 52, 11, 0, 52, 1023)}


def datatype(content: Content, body: bytes, is_shared: bool) -> Datatype:
    if is_shared:
        fields = Fields(body)
        version, where = fields.numbers(2, 1)
        if version == 1:
            fields.take(6)
        if version == 3 and where != 2:
            raise ModelError("shares types between headers; required: types of their own (h5repack writes them)")
        return _named(Object(content, fields.number()))
    fields = Fields(body)
    first, low, middle, _, size = *fields.numbers(4, 1), fields.number(4)
    kind = _CLASSES[first & 15] if first & 15 < len(_CLASSES) else "unknown"
    order, raw = "<>"[low & 1], np.dtype(f"V{min(size, 2**31 - 1)}")
    if kind == "Integer" and size in (1, 2, 4, 8) and fields.numbers(2, 2) == (0, 8 * size):
        return Datatype(kind, size, np.dtype(f"{order}{'i' if low & 8 else 'u'}{size}"))
    if kind == "Float" and size in _IEEE and (low & 0x7E, middle) == (0x20, 8 * size - 1) and tuple(
            fields.number(n) for n in (2, 2, 1, 1, 1, 1, 4)) == _IEEE[size]:
        return Datatype(kind, size, np.dtype(f"{order}f{size}"))
    if kind == "Vlen" and low & 15 == 1 and size == 16:  # a length, an address and an index
        return Datatype("String", size, raw, is_variable=True)
    if kind == "Enum" and size == 1 and low == 2 and fields.number(1) & 15 == 0:
        fields.take(11)  # of the integers
        if fields.take(fields.left).startswith(_TRUTHS):
            return Datatype(kind, size, np.dtype("i1"))
    return Datatype(kind, size, raw, is_spaced=low & 15 == 2)


def _named(named: Object) -> Datatype:
    body = named.body(DATATYPE)
    if body is None:
        raise damaged("a type that is none")
    return datatype(named.content, body, False)


def shape(body: bytes) -> tuple[tuple[int, ...] | None, tuple[int, ...]]:
    """Sides, or None for an empty dataspace, and how far they can grow."""
    fields = Fields(body)
    version, rank, flags, kind = fields.numbers(4, 1)
    if version == 1:
        fields.take(4)
    elif kind == 2:
        return None, ()
    sides = fields.numbers(rank)
    return sides, fields.numbers(rank) if flags & 1 else sides


class Attribute(NamedTuple):
    name: bytes
    datatype: Datatype
    shape: tuple[int, ...] | None
    value: bytes


def attributes(node: Object) -> Iterator[Attribute]:
    """Of an object, in no order."""
    for message in node.messages:
        if message.kind == ATTRIBUTE:
            yield _attribute(node.content, message.body, message.flags)
        elif message.kind == ATTRIBUTES:
            fields = Fields(message.body, 1)
            fields.take(2 * (fields.number(1) & 1))
            heap, tree = fields.numbers(2)
            if heap != NOWHERE:
                for record in _records(node.content, tree, 8):
                    body = _Heap.of(node.content, heap).object(record[:8])
                    yield _attribute(node.content, body, Fields(record, 8).number(1))


def _attribute(content: Content, body: bytes, flags: int) -> Attribute:
    if flags & SHARED:
        raise ModelError("shares attributes between headers; required: attributes of their own (h5repack writes them)")
    fields = Fields(body)
    version, shared, *sizes = *fields.numbers(2, 1), *fields.numbers(3, 2)
    if not 1 <= version <= 3:
        raise damaged(f"an attribute of version {version}")
    fields.take(version == 3)  # the character set
    parts = []
    for size in sizes:
        parts.append(fields.take(size))
        fields.take(-size % 8 if version == 1 else 0)
    name, kind, space = parts
    if version > 1 and shared & 2:
        raise ModelError("shares shapes between headers; required: shapes of their own (h5repack writes them)")
    return Attribute(name.split(b"\0", 1)[0], datatype(content, kind, version > 1 and bool(shared & 1)),
                     shape(space)[0], fields.take(fields.left))
