"""HDF5: model files. Messages of object headers, heaps and indices are changed, and checksums repaired."""

import io
import struct
import tempfile
from pathlib import Path

import h5py
import numpy as np
from fuzzing import Format, check_model
from model_files import write_small
from mutating import spoiled, whole

import fastdtd
from fastdtd.hdf5_format import checksum

SIGNATURES = (b"OHDR", b"OCHK", b"BTHD", b"BTLF", b"BTIN", b"FRHP", b"FHDB", b"FHIB", b"FSHD", b"FAHD", b"FADB",
              b"EAHD", b"EAIB", b"EASB", b"EADB", b"SMTB", b"TREE", b"SNOD", b"HEAP", b"GCOL")
LONGEST = 300  # of what is looked for before a checksum, beside object headers


class Map:
    """Where the structures of a file are.

    checked : start and length of what a checksum follows
    messages : start and length of the body of each message of object headers
    spots : bytes at which something begins that says how others are to be read
    """

    def __init__(self, content):
        self.checked, self.messages, self.spots = [], [], list(range(0, min(len(content), 100)))
        for signature in SIGNATURES:
            at = content.find(signature)
            while at >= 0:
                self.spots += range(at + 4, min(at + 60, len(content)))
                length = self._checked_length(content, at)
                if length:
                    self.checked.append((at, length))
                    if signature in (b"OHDR", b"OCHK"):
                        self._new_header(content, at, length)
                at = content.find(signature, at + 1)
        if content[8] > 1:
            self.checked.append((0, 44))
        with h5py.File(io.BytesIO(content)) as file:
            found = [file.id]
            file.visititems(lambda _, node: found.append(node.id))
            for node in found:
                self._old_header(content, h5py.h5o.get_info(node).addr)
        for start, length in self.messages:
            self.spots += range(start - 8, start + min(length, 24))

    @staticmethod
    def _checked_length(content, at):
        told = int.from_bytes(content[at:at + 4], "little")
        limit = LONGEST
        if content[at:at + 4] == b"OHDR":
            flags = content[at + 5]
            place = at + 6 + 16 * bool(flags & 0x20) + 4 * bool(flags & 0x10)
            width = 1 << (flags & 3)
            exact = place + width + int.from_bytes(content[place:place + width], "little") - at
            return exact if told and checksum(content[at:at + exact]) == int.from_bytes(
                content[at + exact:at + exact + 4], "little") else 0
        for length in range(8, min(limit, len(content) - at - 4)):
            if checksum(content[at:at + length]) == int.from_bytes(content[at + length:at + length + 4], "little"):
                return length
        return 0

    def _new_header(self, content, at, length):
        if content[at:at + 4] == b"OHDR":
            self._flags = content[at + 5]
            place = at + 6 + 16 * bool(self._flags & 0x20) + 4 * bool(self._flags & 0x10) + (1 << (self._flags & 3))
        else:
            place = at + 4
        head = 4 + 2 * bool(getattr(self, "_flags", 0) & 4)
        while place + head <= at + length:
            size = int.from_bytes(content[place + 1:place + 3], "little")
            self.messages.append((place + head, size))
            place += head + size

    def _old_header(self, content, at):
        if content[at:at + 2] != b"\1\0":
            return
        blocks = [(at + 16, int.from_bytes(content[at + 8:at + 12], "little"))]
        while blocks:
            place, size = blocks.pop()
            end = place + size
            while place + 8 <= end:
                kind, length = struct.unpack_from("<HH", content, place)
                self.messages.append((place + 8, length))
                if kind == 0x10:
                    blocks.append(struct.unpack_from("<QQ", content, place + 8))
                place += 8 + length


def write_anew(source, target, **storage):
    """All that a group holds, as the target's version of HDF5 has it; storage: of the weight."""
    for name, value in source.attrs.items():
        target.attrs.create(name, np.bytes_(value) if isinstance(value, str) else value)
    for name, member in source.items():
        if isinstance(member, h5py.Group):
            write_anew(member, target.create_group(name), **storage)
        else:
            target.create_dataset(name, data=member[()], dtype=member.dtype, **storage if name == "weight" else {})


def bases():
    """Our own files, by each writer of HDF5's library, with each kind of index of chunks, and with many layers."""
    made = []
    with tempfile.TemporaryDirectory() as name:
        small, other = Path(name) / "small.h5", Path(name) / "other.h5"
        made.append(write_small(small).read_bytes())
        model = fastdtd.load(small)
        for dtype, compression in ("float32", "gzip"), ("float16", "lzf"), ("float32", None), ("float64", "gzip"):
            fastdtd.save(model, other, dtype, compression)
            made.append(other.read_bytes())
        storage = [{"chunks": (1, 2, 1, 1), "compression": "gzip", "shuffle": True, "fletcher32": True},
                   {"chunks": (2, 1, 1, 1), "compression": "lzf", "maxshape": (None, 3, 1, 1)},
                   {"chunks": (1, 1, 1, 1), "maxshape": (None, None, 1, 1)}, {"chunks": (1, 1, 1, 1)},
                   {"chunks": (2, 3, 1, 1), "shuffle": True}]
        for version in "earliest", "v108", "latest":
            for how in storage:
                with h5py.File(small) as source, h5py.File(other, "w", libver=version) as file:
                    write_anew(source, file, **how)
                if "maxshape" not in how or version != "latest":  # which is an index of chunks that is not read
                    fastdtd.load(other)
                    made.append(other.read_bytes())
        relus = [fastdtd.graph.ReLU(f"r{i}", (f"r{i - 1}" if i else "input",)) for i in range(9)]
        many = fastdtd.Graph((*relus, fastdtd.graph.GlobalAveragePool("p", ("r8",))), (3, 4, 4))
        fastdtd.save(fastdtd.Model(many, provenance={f"key {i}": "value" for i in range(9)}), other)
        made.append(other.read_bytes())
    return made


def mutated(rng, content, mapped):
    """For members of Keras's files, too."""
    if rng.random() < 0.2:
        return spoiled(rng, content, keep_length=True)
    data = bytearray(content)
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        start, length = rng.choice(mapped.messages)
        how = rng.random()
        if how < 0.35 or not length:
            data = bytearray(spoiled(rng, data, mapped.spots, keep_length=True))
        elif how < 0.7:  # a number in a message's body
            width = rng.choice([1, 2, 4, 8])
            at = start + rng.randrange(max(1, length - width + 1))
            old = int.from_bytes(data[at:at + width], "little")
            new = rng.choice([whole(rng, 8 * width), old + 1, old - 1, old * 2, rng.randrange(len(content))])
            data[at:at + width] = (new % (1 << 8 * width)).to_bytes(width, "little")
        elif how < 0.85:  # another message's body, or its type and size
            other, size = rng.choice(mapped.messages)
            head = rng.choice([0, 4, 8])
            size = min(size, length)
            data[start - head:start + size] = data[other - head:other + size]
        else:  # an address, of something that is there
            at = start + rng.randrange(length)
            data[at:at + 8] = rng.choice([*mapped.messages, *mapped.checked])[0].to_bytes(8, "little")
        del data[len(content):]
    if rng.random() < 0.9:
        for start, length in mapped.checked:
            end = start + length
            if data[start:end] != content[start:end] and end + 4 <= len(data):
                data[end:end + 4] = checksum(bytes(data[start:end])).to_bytes(4, "little")
    return bytes(data)


BASES = bases()
MAPS = {content: Map(content) for content in BASES}


def mutate(case, rng):
    [(name, content)] = case.items()
    return {name: mutated(rng, content, MAPS[content])}


def use(folder):
    model = fastdtd.load(folder / "net.h5")
    if check_model(model, folder) is not None and model.preprocessing.color is not None:
        fastdtd.Explainer(model, threads=1)(np.arange(36, dtype=np.uint8).reshape(4, 3, 3) * 7)


FORMAT = Format("hdf5", [{"net.h5": content} for content in BASES], mutate, use, memory=2**26)
