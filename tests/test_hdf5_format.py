"""Files as h5py writes them, found to hold what h5py says: groups, links, attributes, datasets, by every writer."""

import contextlib
import io

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from model_files import write_small

from fastdtd import hdf5, hdf5_format
from fastdtd.errors import ModelError

VERSIONS = ["earliest", "v108", "v110", "latest"]


def found(image):
    """All that a file holds, as fastdtd reads it: attributes, and elements of datasets, by path."""
    all_of_it = {}

    def walk(node, path):
        all_of_it[path, "attributes"] = hdf5.attributes(node, path)
        if hdf5.kind(node, path) == "dataset":
            all_of_it[path, "elements"] = hdf5.array(node, path, (0, 1, 2, 3, 4), 2**28).tolist()
        elif hdf5.kind(node, path) == "group":
            for name, child in hdf5.children(node, path, 10**5).items():
                walk(child, f"{path}/{name}")

    with hdf5.opened(image, "a file") as file:
        walk(file, "")
    return all_of_it


def expected(image):
    """The same, as h5py does."""
    all_of_it = {}

    def plain(value):
        values = np.asarray(value).ravel().tolist()
        return [int(v) if isinstance(v, bool) else v.decode() if isinstance(v, bytes) else v for v in values]

    def walk(node, path):
        all_of_it[path, "attributes"] = {name: plain(value) for name, value in node.attrs.items()}
        if isinstance(node, h5py.Dataset):
            all_of_it[path, "elements"] = node[()].astype("f4").tolist()
        elif isinstance(node, h5py.Group):
            for name, child in node.items():
                walk(child, f"{path}/{name}")

    with h5py.File(image, locking=False) as file:
        walk(file, "")
    return all_of_it


def file(fill, **how):
    image = io.BytesIO()
    with h5py.File(image, "w", **how) as made:
        fill(made)
    return image


def check(fill, **how):
    image = file(fill, **how)
    got = found(image)
    assert got == expected(image)
    return got


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("track_order", [False, True])
@pytest.mark.parametrize("count", [1, 8, 9, 300, 5000])
def test_groups_of_any_size(version, track_order, count):
    def fill(made):
        group = made.create_group("group", track_order=track_order)
        for i in range(count):
            group.create_group(f"{i * 7919 % 10007} {'x' * (i % 40)}")
            if i % 17 == 16:
                del group[f"{(i - 3) * 7919 % 10007} {'x' * ((i - 3) % 40)}"]

    assert len(check(fill, libver=version)) > count * 0.9


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("track_order", [False, True])
@pytest.mark.parametrize("count", [1, 8, 9, 300])
def test_any_number_of_attributes(version, track_order, count):
    def fill(made):
        group = made.create_group("group", track_order=track_order)
        for i in range(count):
            group.attrs[f"attribute {i}"] = [f"text {i}", i, i / 3, [i] * (i % 30 + 1)][i % 4]

    check(fill, libver=version)


@pytest.mark.parametrize("version", ["v110", "latest"])
def test_large_attributes(version):
    """Which lie outside the blocks of their heap; older formats have none."""
    def fill(made):
        for i in range(12):
            made.attrs[f"large {i}"] = np.arange(100 * i + 300)

    check(fill, libver=version)


ATTRIBUTES = {
    "integers": np.array([-1, 2], "<i8"), "of a byte": np.array(200, "u1"), "big": np.array([1, -2], ">i2"),
    "floats": np.array([[0.5, 1e300]]), "half": np.array(0.5, ">f2"), "truths": np.array([True, False]),
    "truth": True, "text": "ä text", "texts": ["a", "", "b" * 100], "none": np.zeros(0, "i4"),
    "fixed": np.bytes_("fixed"), "list of fixed": np.array([b"a", b"bcd"]),
}


@pytest.mark.parametrize("version", VERSIONS)
def test_attributes_of_every_type(version):
    check(lambda made: made.attrs.update(ATTRIBUTES), libver=version)


@pytest.mark.parametrize("padding", [h5py.h5t.STR_NULLTERM, h5py.h5t.STR_NULLPAD, h5py.h5t.STR_SPACEPAD])
def test_padded_strings(padding):
    def fill(made):
        kind = h5py.h5t.C_S1.copy()
        kind.set_size(6)
        kind.set_strpad(padding)
        made.attrs.create("text", np.array(b"ab    " if padding == h5py.h5t.STR_SPACEPAD else b"ab"), dtype=None)
        written = h5py.h5a.create(made.id, b"padded", kind, h5py.h5s.create(h5py.h5s.SCALAR))
        written.write(np.array(b"ab", "S6"), h5py.h5t.py_create(np.dtype("S6")))

    with hdf5.opened(file(fill), "a file") as made:
        assert hdf5.attributes(made, "it")["padded"] == ["ab"]


@pytest.mark.parametrize("version", VERSIONS)
def test_types_with_a_name(version):
    def fill(made):
        made["single"] = np.dtype("<f4")
        made.create_dataset("weight", data=np.arange(3.0), dtype=made["single"])
        made.attrs.create("scale", 0.5, dtype=made["single"])

    check(fill, libver=version)


@pytest.mark.parametrize("size", [512, 1024, 2**20])
@pytest.mark.parametrize("version", VERSIONS)
def test_user_blocks(size, version):
    def fill(made):
        made["weight"] = np.arange(3.0)
        made.attrs["texts"] = ["a", "b"]

    check(fill, libver=version, userblock_size=size)


LAYOUTS = {
    "contiguous": {}, "one chunk": {"chunks": (60, 7)},
    "one filtered chunk": {"chunks": (60, 7), "compression": "gzip"},
    "chunks": {"chunks": (1, 1)}, "filtered": {"chunks": (3, 2), "compression": "gzip", "shuffle": True},
    "room to grow": {"chunks": (3, 2), "maxshape": (100, 30)},
    "room to grow, filtered": {"chunks": (1, 2), "maxshape": (100, 30), "fletcher32": True},
    "rows to grow": {"chunks": (30, 2), "maxshape": (60, 30)},
}


@pytest.mark.parametrize("how", LAYOUTS.values(), ids=LAYOUTS.keys())
@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("is_early", [False, True])
def test_datasets_in_every_layout(tmp_path, how, version, is_early):
    """is_early: all chunks are made when the dataset is, which needs no index of them."""
    data = np.random.default_rng(0).standard_normal((60, 7))
    with h5py.File(tmp_path / "file.h5", "w", libver=version) as made:  # in memory it would end before its last chunk
        plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        if is_early:
            plist.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
        made.create_dataset("data", data=data, dcpl=plist, **how)
    content = (tmp_path / "file.h5").read_bytes()
    assert found(content) == expected(io.BytesIO(content))


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("filters", [{}, {"compression": "gzip"}])
def test_thousands_of_chunks(version, filters):
    """The index has pages from 1,024 on, and levels."""
    check(lambda made: made.create_dataset("data", data=np.arange(5000.0), chunks=(1,), **filters), libver=version)


def test_chunks_of_four_hundred_columns():
    check(lambda made: made.create_dataset("data", data=np.arange(2 * 1500.0).reshape(2, 1500), chunks=(1, 2)))


@pytest.mark.parametrize("version", VERSIONS)
def test_elements_in_the_header(version):
    def fill(made):
        layout = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        layout.set_layout(h5py.h5d.COMPACT)
        data = h5py.h5d.create(made.id, b"data", h5py.h5t.IEEE_F32LE, h5py.h5s.create_simple((2, 2)), layout)
        h5py.Dataset(data)[...] = [[1, 2], [3, 4]]

    assert check(fill, libver=version)["/data", "elements"] == [[1, 2], [3, 4]]


@settings(max_examples=60, deadline=None)
@given(st.recursive(
    st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=40),
    lambda inner: st.dictionaries(st.text("abc/ä é", min_size=1, max_size=9).map(lambda s: "n" + s.replace("/", "")),
                                  inner, max_size=12), max_leaves=30), st.sampled_from(VERSIONS), st.booleans())
def test_any_tree(tree, version, is_compressed):
    def fill(group, members):
        for name, member in members.items():
            if isinstance(member, dict):
                fill(group.create_group(name), member)
            else:
                data = group.create_dataset(name, data=np.array(member, "f4"), **(
                    {"compression": "gzip"} if is_compressed else {}))
                data.attrs["first"], data.attrs["name"] = member[0], name

    check(lambda made: fill(made, {"top": tree}), libver=version)


def test_checksums():
    """Those that lookup3.c's author gives, and of every length one of its own."""
    assert hdf5_format.checksum(b"") == 0xDEADBEEF
    assert hdf5_format.checksum(b"Four score and seven years ago") == 0x17770551
    assert len({hdf5_format.checksum(bytes(range(256))[:n]) for n in range(200)}) == 200


# ---- Damage ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", VERSIONS)
def test_every_byte_of_a_small_file_changed(tmp_path, version):
    """Whatever it is, it is read or refused, soon, and by one kind of error."""
    with h5py.File(write_small(tmp_path / "small.h5")) as source:
        image = file(lambda made: [source.copy(name, made) for name in source], libver=version)
    content = image.getvalue()
    for at in range(len(content)):
        for value in (0, 0xFF, content[at] ^ 1, content[at] ^ 0x80):
            changed = bytearray(content)
            changed[at] = value
            with contextlib.suppress(ModelError):
                found(bytes(changed))


def test_a_cut_anywhere():
    image = file(lambda made: made.create_dataset("data", data=np.arange(9.0), compression="gzip"), libver="latest")
    content = image.getvalue()
    for length in range(len(content)):
        with pytest.raises(ModelError):
            found(content[:length])


def test_names_that_stand_twice():
    content = file(lambda made: [made.create_group(name) for name in ("aa", "ab")], libver="v108").getvalue()
    assert content.count(b"\2ab") == 1
    header = next(at for at in range(len(content)) if content.startswith(b"OHDR", at))
    changed = bytearray(content.replace(b"\2ab", b"\2aa"))
    end = next(at for at in range(header, len(content)) if hdf5_format.checksum(content[header:at]) == int.from_bytes(
        content[at:at + 4], "little"))
    changed[end:end + 4] = hdf5_format.checksum(bytes(changed[header:end])).to_bytes(4, "little")
    with pytest.raises(ModelError, match="holds 'aa' twice"):
        found(bytes(changed))


def test_headers_that_lead_round_in_circles():
    content = file(lambda made: [made.attrs.create(str(i), i) for i in range(30)]).getvalue()
    at = next(i for i in range(96, len(content)) if content[i:i + 4] == b"\x10\0\x10\0")  # a continuation
    changed = bytearray(content)
    place = int.from_bytes(content[at + 8:at + 16], "little")
    second = next(i for i in range(place, len(content) - 24, 8) if content[i:i + 2] == b"\x0c\0")
    changed[second:second + 24] = content[at:at + 24]
    with pytest.raises(ModelError, match="leads round in circles"):
        found(bytes(changed))


@pytest.mark.parametrize("version", ["earliest", "v108"])
def test_structures_that_claim_too_much(monkeypatch, version):
    image = file(lambda made: [made.create_group(str(i)) for i in range(40)], libver=version)
    found(image)
    monkeypatch.setattr(hdf5_format, "MAX_STRUCTURE_BYTES", 2**12)
    with pytest.raises(ModelError, match="structures that overlap"):
        found(image)
