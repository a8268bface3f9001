"""Sets of images: tars, whose headers' checksums are repaired, HDF5 files, and lists."""

import contextlib
import io
import tarfile

import h5py
import numpy as np
from fuzz_hdf5 import Map, mutated
from fuzzing import Format, WrongError
from mutating import spoiled, whole
from PIL import Image

from fastdtd import sources
from fastdtd.errors import PictureError

PIXELS = np.random.default_rng(0).integers(0, 256, (5, 4, 3, 3), np.uint8)
BLOCK = tarfile.BLOCKSIZE
FIELDS = (0, 1, 100, 124, 125, 130, 135, 148, 156, 157, 257, 262, 263, 345, 386, 482, 483, 504)  # of a tar's header


def tar(form):
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w", format=form) as file:
        for i, pixels in enumerate(PIXELS[:3]):
            picture = io.BytesIO()
            Image.fromarray(pixels).save(picture, "BMP")
            name = ("n" * 90 + "/" + "n" * 40) * (i == 1) + f"{i}"
            for suffix, data in ("bmp", picture.getvalue()), ("cls", b"%d" % i):
                info = tarfile.TarInfo(f"{name}.{suffix}")
                info.size = len(data)
                file.addfile(info, io.BytesIO(data))
    return content.getvalue()


def hdf5(version, **how):
    content = io.BytesIO()
    with h5py.File(content, "w", libver=version) as file:
        file.create_dataset("images", data=PIXELS, **how)
        file["label"] = np.arange(5) if how else ["a", "b", "c", "d", "e"]
    return content.getvalue()


def bases():
    lists = [{"set.csv": b"path,label\na.bmp,1\n\"a.bmp\",\"b\"\n"}, {"set.txt": b"a.bmp\t1\na.bmp\n"}]
    storage = [{}, {"chunks": (1, 4, 3, 3)}, {"chunks": (2, 3, 3, 2), "compression": "gzip", "shuffle": True},
               {"chunks": (5, 4, 3, 3), "compression": "lzf", "fletcher32": True}]
    return [*({"set.tar": tar(form)} for form in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)),
            *({"set.h5": hdf5(version, **how)} for version in ("earliest", "latest") for how in storage),
            *({"a.bmp": PICTURE} | one for one in lists)]


def mutate(case, rng):
    name = next(name for name in case if name.startswith("set."))
    content = case[name]
    if name == "set.h5":
        return {name: mutated(rng, content, MAPS[content])}
    if name == "set.tar":
        return {name: _mutated_tar(rng, content)}
    return case | {name: spoiled(rng, content)}


def _mutated_tar(rng, content):
    starts = range(0, len(content) - BLOCK, BLOCK)
    headers = [at for at in starts if content[at + 257:at + 262] == b"ustar"]
    data = bytearray(content)
    for _ in range(rng.choice([1, 1, 2, 3])):
        at, how = rng.choice(headers), rng.random()
        if how < 0.3:
            data = bytearray(spoiled(rng, data, [at + field for at in headers for field in FIELDS], keep_length=True))
        elif how < 0.5:
            data[at + 156:at + 157] = rng.choice([b"0", b"1", b"2", b"3", b"5", b"6", b"7", b"L", b"K", b"S", b"x",
                                                  b"g", b"X", b"\0", b"Z"])
        elif how < 0.7:
            size = whole(rng, rng.choice([8, 16, 32, 64]))
            data[at + 124:at + 136] = rng.choice([b"%011o\0" % (size % 8**11), b"\x80" + size.to_bytes(11, "big"),
                                                  b"\xff" * 12])
        elif how < 0.9:  # blocks copied or left out
            blocks = [bytes(data[at:at + BLOCK]) for at in range(0, len(data), BLOCK)]
            place = rng.randrange(len(blocks))
            blocks[place:place + rng.choice([0, 1, 3])] = [rng.choice(blocks)] * rng.choice([0, 1, 1, 2, 50])
            data = bytearray(b"".join(blocks))
        else:
            del data[rng.randrange(len(data)):]
        if rng.random() < 0.9:
            for at in range(0, len(data) - BLOCK + 1, BLOCK):
                if data[at + 257:at + 262] == b"ustar":
                    total = sum(data[at:at + BLOCK]) - sum(data[at + 148:at + 156]) + 8 * ord(" ")
                    data[at + 148:at + 156] = b"%06o\0 " % total
        headers = [at for at in range(0, len(data), BLOCK) if data[at + 257:at + 262] == b"ustar"] or [0]
        data = data or bytearray(BLOCK)
    return bytes(data)


def use(folder):
    [file] = folder.glob("set.*")
    entries = sources.find([file])
    if len({entry.name for entry in entries}) < len(entries):
        raise WrongError("names that are not unique")
    for entry in entries[:20]:
        if entry.name.startswith("/") or ".." in entry.name.split("/") or not entry.name.isprintable():
            raise WrongError(f"the name {entry.name!r}")
        with contextlib.suppress(PictureError):
            if sources.open_image(entry).mode != "RGB":
                raise WrongError("an image of another mode")


def picture():
    content = io.BytesIO()
    Image.fromarray(PIXELS[0]).save(content, "BMP")
    return content.getvalue()


PICTURE = picture()
BASES = bases()
MAPS = {case["set.h5"]: Map(case["set.h5"]) for case in BASES if "set.h5" in case}
FORMAT = Format("sources", BASES, mutate, use, memory=2**30)
