"""Elements and strings taken from a file's bytes: the same as HDF5's library gives, and errors where there are none."""

import io
import itertools
import zlib

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdtd import hdf5, hdf5_storage
from fastdtd.errors import ModelError

FILTERS = {
    "none": {}, "gzip": {"compression": "gzip"}, "lzf": {"compression": "lzf"},
    "all of gzip": {"compression": "gzip", "shuffle": True, "fletcher32": True},
    "all of lzf": {"compression": "lzf", "shuffle": True, "fletcher32": True}, "shuffle": {"shuffle": True},
    "fletcher32": {"fletcher32": True},
}


def written(data, libver="earliest", **how):
    image = io.BytesIO()
    with h5py.File(image, "w", libver=libver) as file:
        file.create_dataset("data", data=data, **how)
    return image


def read(image):
    with hdf5.opened(image, "one") as file:
        data = hdf5.children(file, "the file", 10)["data"]
        return hdf5_storage.elements(hdf5.dataset(data, "data", tuple(range(5)), 2**28))


@pytest.mark.parametrize("libver", ["earliest", "v108", "latest"])
@pytest.mark.parametrize("filters", FILTERS.values(), ids=FILTERS.keys())
def test_the_same_as_the_library(filters, libver):
    random = np.random.default_rng(0)
    for dtype, (shape, chunk) in itertools.product(
            ["<f4", ">f8", "<f2", "<i4", ">i4", "S5"],
            [((1,), (1,)), ((7, 5), (3, 2)), ((4, 3, 2, 2), (4, 3, 2, 2)), ((300,), (1000,)), ((40, 30), (40, 7))]):
        data = (random.integers(0, 4, shape) * 1000).astype(dtype)
        if chunk > shape and libver == "latest":
            continue  # test_indices_that_can_grow
        growing = {"maxshape": (None,) * len(shape)} if chunk > shape else {}
        np.testing.assert_array_equal(read(written(data, libver, chunks=chunk, **growing, **filters)), data.view(
            "V5" if dtype == "S5" else dtype))


@settings(max_examples=60, deadline=None)
@given(st.binary(min_size=1, max_size=3000), st.sampled_from(sorted(FILTERS)), st.integers(1, 1000))
def test_any_bytes(content, filters, chunk):
    data = np.frombuffer(content, "i1").astype(">i4") if len(content) % 2 else np.repeat(
        np.frombuffer(content, "i1").astype("<f4"), 3)  # the second compresses
    image = written(data, chunks=(min(chunk, data.size),), **FILTERS[filters])
    np.testing.assert_array_equal(read(image), data)


def test_incompressible_chunks_are_stored_as_they_are():
    data = np.frombuffer(np.random.default_rng(1).bytes(4000), "<i4")
    image = written(data, compression="lzf")
    with h5py.File(image) as file:
        assert file["data"].id.get_chunk_info(0).filter_mask == 1
    np.testing.assert_array_equal(read(image), data)


def test_contiguous():
    data = np.arange(12, dtype=">f8").reshape(3, 4)
    np.testing.assert_array_equal(read(written(data)), data)


# What a hostile file says


def chunked(spoil, **how):
    """A dataset (8,) in two chunks that `spoil` writes."""
    image = io.BytesIO()
    with h5py.File(image, "w") as file:
        spoil(file.create_dataset("data", (8,), "<f4", chunks=(4,), **how).id)
    return image


def chunk(at, content, mask=0):
    return lambda data: data.write_direct_chunk((at,), content, mask)


def both(*writes):
    return lambda data: [write(data) for write in writes]


WHOLE = np.arange(4, dtype="<f4").tobytes()
SHUFFLED = np.frombuffer(WHOLE, np.uint8).reshape(4, 4).T.tobytes()
HOSTILE = {
    "missing": (chunk(0, WHOLE), {}, "has 1 chunks, 1 of them where they belong; required: 2"),
    "none": (lambda data: None, {}, "has 0 chunks, 0 of them"),
    "short": (both(chunk(0, WHOLE), chunk(4, WHOLE[:8])), {}, "has a chunk of 8 bytes; required: 16"),
    "long": (both(chunk(0, WHOLE), chunk(4, WHOLE * 2)), {}, "has a chunk of 32 bytes; required: 16"),
    "shuffled and short": (
        both(chunk(0, SHUFFLED), chunk(4, b"abc")), {"shuffle": True}, "has a chunk of 3 bytes; required: 16"),
    "no room for a checksum": (
        both(chunk(0, b"abc"), chunk(4, b"a")), {"fletcher32": True}, "checksum is wrong"),
    "wrong checksum": (both(chunk(0, WHOLE + b"abcd"), chunk(4, WHOLE)), {"fletcher32": True}, "checksum is wrong"),
    "no gzip": (both(chunk(0, WHOLE), chunk(4, WHOLE)), {"compression": "gzip"}, "zlib cannot inflate"),
    "cut off": (
        both(chunk(0, zlib.compress(WHOLE)[:-5]), chunk(4, WHOLE)), {"compression": "gzip"},
        "is cut off, or inflates to more than 16 bytes"),
    "a bomb": (
        both(chunk(0, zlib.compress(bytes(2**20))), chunk(4, WHOLE)), {"compression": "gzip"},
        "is cut off, or inflates to more than 16 bytes"),
    "an LZF bomb": (
        both(chunk(0, b"\0a" + b"\xff\xff\0" * 9), chunk(4, WHOLE)), {"compression": "lzf"},
        "is no LZF, or unpacks to too much"),
    "LZF from before its start": (
        both(chunk(0, b"\0a\x20\x05"), chunk(4, WHOLE)), {"compression": "lzf"}, "is no LZF"),
    "LZF cut off": (both(chunk(0, b"\x1fabc"), chunk(4, WHOLE)), {"compression": "lzf"}, "is no LZF"),
}


@pytest.mark.parametrize(("spoil", "how", "message"), HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_chunks(spoil, how, message):
    with pytest.raises(ModelError, match=message):
        read(chunked(spoil, **how))


def changed(image, old, new, count=1):
    """The file with bytes replaced that stand there `count` times."""
    content = image.getvalue()
    assert content.count(old) == count
    return io.BytesIO(content.replace(old, new))


def entry(offset, size, mask=0):
    """A chunk's key in an index of HDF5's first kind."""
    return size.to_bytes(4, "little") + mask.to_bytes(4, "little") + offset.to_bytes(8, "little") + bytes(8)


@pytest.mark.parametrize(("old", "new", "message"), [
    (entry(4, 16), entry(0, 16), "has 2 chunks, 1 of them where they belong"),
    (entry(4, 16), entry(8, 16), "has 2 chunks, 1 of them where they belong"),
    (entry(4, 16), entry(4, 2**31), "has chunks of 2147483664 bytes in a file of"),
    (entry(4, 16), entry(4, 0), "HDF5 cannot process it|has a chunk of 0 bytes"),
])
def test_hostile_indices(old, new, message):
    image = changed(chunked(both(chunk(0, WHOLE), chunk(4, WHOLE))), old, new)
    with pytest.raises(ModelError, match=message):
        read(image)


def test_a_chunk_outside_the_file():
    image = chunked(both(chunk(0, WHOLE), chunk(4, WHOLE)))
    with h5py.File(image) as file:
        address = file["data"].id.get_chunk_info(1).byte_offset
    with pytest.raises(ModelError, match=r"ends after \d+ bytes|HDF5 cannot process it"):
        read(changed(image, entry(4, 16) + address.to_bytes(8, "little"), entry(4, 16) + (2**40).to_bytes(8, "little")))


def test_elements_of_other_sizes_are_shuffled():
    image = written(np.arange(100, dtype="<f4"), shuffle=True, chunks=(10,))
    with pytest.raises(ModelError, match=r"is shuffled by elements of \(3,\) bytes; required: 4"):
        read(changed(image, b"shuffle\0" + (4).to_bytes(4, "little"), b"shuffle\0" + (3).to_bytes(4, "little")))


@pytest.mark.parametrize("maxshape", [(None, 3), (None, None)])
def test_indices_that_can_grow(maxshape):
    data = np.zeros((2, 3), "f4")
    np.testing.assert_array_equal(read(written(data, "v108", chunks=(1, 1), maxshape=maxshape)), data)
    with pytest.raises(ModelError, match="has chunks in an index that can grow"):
        read(written(data, "latest", chunks=(1, 1), maxshape=maxshape))


def test_more_chunks_than_anyone_writes(monkeypatch):
    monkeypatch.setattr(hdf5_storage, "MAX_CHUNKS", 9)
    with pytest.raises(ModelError, match="has 10 chunks; at most 9 are accepted"):
        read(written(np.zeros(10, "f4"), chunks=(1,)))


# Strings of variable length


def attribute(image):
    with hdf5.opened(image, "one") as file:
        group = hdf5.children(file, "the file", 10)["group"]
        return hdf5.attributes(group, "the group")["text"]


def with_texts(texts, libver="earliest", others=0):
    image = io.BytesIO()
    with h5py.File(image, "w", libver=libver) as file:
        group = file.create_group("group")
        for i in range(others):
            group.attrs[f"other {i}"] = i
        group.attrs["text"] = texts
    return image


@pytest.mark.parametrize("libver", ["earliest", "v108", "latest"])
@pytest.mark.parametrize("texts", ["one", "ä" * 300, ["a", "", "b" * 4000]])
@pytest.mark.parametrize("others", [0, 7, 100])
def test_texts(texts, libver, others):
    expected = [texts] if isinstance(texts, str) else texts
    assert attribute(with_texts(texts, libver, others)) == expected


def test_lengths_that_lie():
    image = with_texts("twelve bytes")
    with h5py.File(image) as file:
        heap = image.getvalue().index(b"GCOL")
        assert file["group"].attrs["text"] == "twelve bytes"
    honest = (12).to_bytes(4, "little") + heap.to_bytes(8, "little") + (1).to_bytes(4, "little")
    for length, message in ((13, "has a string of 13 bytes of which the file holds 12"), (2**32 - 1, "at most 4096")):
        with pytest.raises(ModelError, match=message):
            attribute(changed(image, honest, length.to_bytes(4, "little") + honest[4:]))
    with pytest.raises(ModelError, match="damaged heap at byte 0"):
        attribute(changed(image, honest, honest[:4] + bytes(8) + honest[12:]))
    with pytest.raises(ModelError, match="of which the file holds 0"):
        attribute(changed(image, honest, honest[:12] + (77).to_bytes(4, "little")))
