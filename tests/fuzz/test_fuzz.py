"""Files that are mutated at random, the same in each run, and those of which something was found once."""

import io
import itertools
import os
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import h5py
import numpy as np
import pytest

pytestmark = [pytest.mark.slow,
              pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc to measure memory")]
pytest.importorskip("onnx")
pytest.importorskip("google.protobuf")
import fuzz_hdf5  # noqa: E402  # after importorskip
import fuzz_pictures  # noqa: E402  # after importorskip
import fuzzing  # noqa: E402  # after importorskip

import fastdtd  # noqa: E402  # after importorskip
from fastdtd.errors import ModelError  # noqa: E402  # after importorskip

CASES = {"hdf5": 2500, "onnx": 2500, "keras": 800, "caffe": 2000, "pictures": 10_000,
         "sources": 5000}  # 10 s each


def fuzz(*options):
    """What the script prints; in a process of its own, which forks."""
    paths = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run([sys.executable, fuzzing.__file__, *options], capture_output=True, text=True, check=False,
                          env={**os.environ, "PYTHONPATH": paths}, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("name", fuzzing.FORMATS)
def test_mutated(name, tmp_path):
    assert " 0 findings" in fuzz(name, "--cases", str(CASES[name]), "--out", str(tmp_path))


def test_what_was_found_before(tmp_path):
    assert fuzz("--corpus", "--out", str(tmp_path)).count(" 0 findings") == len(fuzzing.FORMATS)


@pytest.mark.xfail(strict=True, reason="not yet mended")
@pytest.mark.parametrize("place", sorted(fuzzing.OPEN.glob("*/*")), ids=lambda place: place.name)
def test_what_is_to_be_mended(place):
    form = fuzzing.load(place.parent.name)
    case = {file.name: file.read_bytes() for file in place.iterdir()}
    assert not fuzzing.tried(form, lambda _: case, 1).found


@pytest.mark.parametrize("name", fuzzing.FORMATS)
@pytest.mark.filterwarnings("error")  # of scores with nothing to decompose
def test_what_is_mutated_is_accepted_before(name, tmp_path):
    form = fuzzing.load(name)
    for case in form.bases:
        fuzzing.write(case, tmp_path)
        form.use(tmp_path)


# ---- The harness itself ----------------------------------------------------------------------------------------------


def crash():
    import ctypes

    ctypes.string_at(0)


def take_memory():
    np.ones(2**24)


HARM = {"crash": (crash, "SIGSEGV"), "hang": (lambda: time.sleep(9), "takes more than 1 s"),
        "memory": (take_memory, "more than 64 MiB of memory"), "error": (lambda: {}["x"], "KeyError in "),
        "end": (lambda: os._exit(3), "exit status 3")}


@pytest.mark.parametrize("harm", HARM)
def test_what_is_found(harm, monkeypatch):
    """The third case of five does harm; the others are accepted or refused."""
    monkeypatch.setattr(fuzzing, "SECONDS", 1)
    do, expected = HARM[harm]

    def use(folder):
        content = (folder / "file").read_bytes()
        if content == b"2":
            do()
        if content == b"3":
            raise ModelError("of the fourth")

    form = fuzzing.Format("any", [], lambda case, rng: case, use, memory=2**26)
    tally = fuzzing.tried(form, lambda i: {"file": str(i).encode()}, 5)
    [(what, (count, case))] = tally.found.items()
    assert what.startswith(expected)
    assert (tally.accepted, tally.refused, count, case) == (3, 1, 1, {"file": b"2"})
    assert "5 mutated, 1 refused, 3 accepted, 1 findings" in tally.line("any")


def test_findings_are_made_smaller():
    def use(folder):
        content = (folder / "file").read_bytes()
        assert not (b"a" in content and b"b" in content)

    form = fuzzing.Format("any", [{"file": b"." * 200}], lambda case, rng: case, use)
    case = {"file": b"." * 50 + b"a" + b"x" * 80 + b"b" + b"y" * 68}
    [what] = fuzzing.tried(form, lambda _: case, 1).found
    assert what.startswith("AssertionError in test_fuzz.py, use")
    smaller = fuzzing.minimised(form, case, what)["file"]
    assert len(smaller) < 8
    assert {*b"ab"} <= {*smaller}


@pytest.mark.parametrize("name", fuzzing.FORMATS)
def test_cases_are_the_same_again(name):
    form = fuzzing.load(name)
    assert [form.case(0, i) for i in range(20)] == [form.case(0, i) for i in range(20)]
    assert form.case(0, 0) != form.case(1, 0)
    assert sum(form.case(2, i) in form.bases for i in range(200)) < 20


# ---- Mutations -------------------------------------------------------------------------------------------------------


def test_checksums_are_repaired():
    """As HDF5 and PNG have them: of files of HDF5's, all structures with checksums are found."""
    mapped = fuzz_hdf5.Map(content := fuzz_hdf5.BASES[1])
    assert len(mapped.checked) > 10
    for start, length in mapped.checked:
        told = int.from_bytes(content[start + length:start + length + 4], "little")
        assert fuzz_hdf5.checksum(content[start:start + length]) == told
    for case in fuzz_pictures.BASES:
        for content in case.values():
            assert b"".join(fuzz_pictures.parts_of(content)) == content


def test_as_large_as_pictures_may_be():
    """Small as files: rows of zeros, of 16 bits."""
    width = height = 10_000
    rows = zlib.compress(bytes(height * (1 + 2 * width)), 9)
    kinds = (b"IHDR", struct.pack(">IIBBBBB", width, height, 16, 0, 0, 0, 0)), (b"IDAT", rows), (b"IEND", b"")
    chunks = [struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
              for kind, data in kinds]
    case = {"picture.png": fuzz_pictures.PNG + b"".join(chunks)}
    tally = fuzzing.tried(fuzz_pictures.FORMAT, lambda _: case, 1)
    assert tally.accepted == 1, tally.found


# ---- Found by mutations ----------------------------------------------------------------------------------------------


def many_links(file):
    for i in range(9):
        file.create_group(f"layers/{i}")


def ordered_links(file):
    group = file.create_group("layers/c", track_order=True)
    for i in range(9):
        group.create_group(f"{i}")


def many_at_the_root(file):
    for i in range(9):
        file.create_group(f"classes {i}")


@pytest.mark.parametrize("spoil", [many_links, ordered_links, many_at_the_root])
@pytest.mark.parametrize(("kind", "place", "size", "values"), [
    (b"BTHD", 6, 4, (0, 2**29)), (b"BTHD", 10, 2, (0, 2**15)), (b"BTHD", 12, 2, (2**15,)), (b"BTHD", 24, 2, (2**15,)),
    (b"FRHP", 110, 2, (0, 1, 2**15)), (b"FRHP", 112, 8, (0, 2**40)), (b"FRHP", 120, 8, (0, 2**40)),
    (b"FRHP", 128, 2, (0, 2**15)), (b"FRHP", 140, 2, (2**15,)),
])
def test_sizes_in_indices_and_heaps(spoil, tmp_path, kind, place, size, values):
    """Of each of a file's, alone; HDF5's library divides by them, or takes as much memory as is claimed, at once."""
    path = tmp_path / "net.h5"
    with h5py.File(io.BytesIO(fuzz_hdf5.BASES[0])) as source, h5py.File(path, "w", libver="latest") as file:
        fuzz_hdf5.write_anew(source, file)
        spoil(file)
    content = path.read_bytes()
    found = [(at, length) for at, length in fuzz_hdf5.Map(content).checked if content[at:at + 4] == kind]
    assert found
    for (at, length), value in itertools.product(found, values):
        data = bytearray(content)
        data[at + place:at + place + size] = value.to_bytes(size, "little")
        data[at + length:at + length + 4] = fuzz_hdf5.checksum(bytes(data[at:at + length])).to_bytes(4, "little")
        path.write_bytes(data)
        fuzzing.peak_memory(reset=True)
        before = fuzzing.peak_memory()
        with pytest.raises(ModelError):
            fastdtd.load(path)
        assert fuzzing.peak_memory() - before < 2**26
