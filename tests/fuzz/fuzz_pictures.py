"""Pictures of all formats: chunks and segments, headers, EXIF, checksums repaired."""

import io
import random
import struct
import zlib

import numpy as np
from fuzzing import Format, WrongError
from mutating import spoiled, whole
from PIL import Image

from fastdtd import images

PNG = b"\x89PNG\r\n\x1a\n"


def bases():
    rng = np.random.default_rng(0)
    rows, columns = np.mgrid[:13, :17]
    rgb = np.stack([rows * 19, columns * 15, rng.integers(0, 256, (13, 17))], 2).astype(np.uint8)
    image, grey = Image.fromarray(rgb), Image.fromarray(rgb[..., 0])
    clear = Image.fromarray(np.dstack([rgb, rgb[..., :1]]))
    palette, bits = image.quantize(16), grey.convert("1")
    deep = Image.fromarray(rng.integers(0, 65536, (13, 17)).astype(np.uint16))
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "x" * 9
    saved = [
        ("png", image, {"exif": exif}), ("png", clear, {}), ("png", palette, {"transparency": 3}), ("png", deep, {}),
        ("png", grey, {"transparency": 38}), ("png", bits, {}), ("jpg", image, {"exif": exif}),
        ("jpg", image, {"progressive": True, "subsampling": 2}), ("jpg", grey, {}), ("jpg", image.convert("CMYK"), {}),
        ("webp", image, {"exif": exif}), ("webp", clear, {"lossless": True}),
        ("webp", clear, {"save_all": True, "append_images": [clear.rotate(90)]}), ("bmp", image, {}),
        ("bmp", palette, {}), ("bmp", bits, {}), ("bmp", clear, {}), ("gif", palette, {"transparency": 2}),
        ("gif", palette, {"save_all": True, "append_images": [palette.rotate(180)]}), ("ppm", image, {}),
        ("pgm", grey, {}), ("pgm", deep, {}), ("tif", deep, {}), ("tif", image, {"exif": exif}), ("tif", clear, {}),
        *(("tif", image, {"compression": how})
          for how in ("tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg", "tiff_deflate")),
        ("tif", bits, {"compression": "group4"}), ("tif", palette, {"compression": "packbits"}),
    ]
    made = []
    for suffix, picture, how in saved:
        content = io.BytesIO()
        name = {"jpg": "JPEG", "tif": "TIFF", "pgm": "PPM"}.get(suffix, suffix.upper())
        picture.save(content, name, **how)
        made.append({f"picture.{suffix}": content.getvalue()})
    made.append({"picture.ppm": b"P3\n# text\n3 2\n255\n" + b" ".join(b"%d" % n for n in rgb.ravel()[:18])})
    made.append({"picture.pbm": b"P1 4 2 1 0 1 0 0 1 0 1\n"})
    return made


# ---- Parts of a file -------------------------------------------------------------------------------------------------


def parts_of(content):
    """What a file is made of, one after the other: chunks of PNG and WebP, segments of JPEG, blocks of GIF."""
    if content.startswith(PNG):
        return _chunks(content, 8, ">", False, 12)
    if content.startswith(b"RIFF"):
        return _chunks(content, 12, "<", True, 8)
    if content.startswith(b"\xff\xd8"):
        starts = [0]
        at = 2
        while at + 4 <= len(content) and content[at] == 0xFF and content[at + 1] not in (0xD9, 0xDA):
            starts.append(at)
            at += 2 + int.from_bytes(content[at + 2:at + 4], "big")
        return _cut(content, [*starts, at])
    if content.startswith(b"GIF"):
        table = 3 << (content[10] & 7) + 1 if content[10] & 0x80 else 0
        return _cut(content, [0, 13, 13 + table, *(i for i in range(13 + table, len(content) - 1)
                                                     if content[i:i + 2] in (b"\0\x21", b"\0\x2c"))])
    return [content]


def _chunks(content, at, order, is_even, around):
    starts = [0]
    while at + 8 <= len(content):
        starts.append(at)
        length = struct.unpack_from(f"{order}I", content, at + (4 if is_even else 0))[0]
        at += around + length + (length % 2 if is_even else 0)
    return _cut(content, starts)


def _cut(content, starts):
    return [content[a:b] for a, b in zip(starts, [*starts[1:], len(content)], strict=True)]


def repaired(rng, content):
    """With the checksums of a PNG's chunks, and most often the length of a WebP's whole."""
    if content.startswith(PNG):
        first, *chunks = parts_of(content)
        return first + b"".join(chunk[:-4] + struct.pack(">I", zlib.crc32(chunk[4:-4])) if len(chunk) >= 12 else chunk
                                for chunk in chunks)
    if content.startswith(b"RIFF") and len(content) >= 8 and rng.random() < 0.8:
        return content[:4] + struct.pack("<I", len(content) - 8) + content[8:]
    return content


# ---- Mutations -------------------------------------------------------------------------------------------------------


def mutate(case, rng):
    [(name, content)] = case.items()
    for _ in range(rng.choice([1, 1, 2, 3])):
        parts = parts_of(content)
        at, how = rng.randrange(len(parts)), rng.random()
        if how < 0.25:
            content = spoiled(rng, content)
        elif how < 0.6 and len(parts) > 1:
            parts[at] = spoiled(rng, parts[at], range(min(20, len(parts[at]))))
            content = b"".join(parts)
        elif how < 0.8 and len(parts) > 1:
            other = rng.choice([parts, parts_of(next(iter(rng.choice(BASES).values())))])
            parts[at:at + rng.randrange(2)] = [rng.choice(other)] * rng.choice([0, 1, 1, 2, 20])
            content = b"".join(parts)
        elif how < 0.9:
            content = spoiled(rng, content, range(min(60, len(content))), keep_length=True)
        else:
            content = _with_entry(rng, content)
        content = repaired(rng, content)
    return {name: content}


def _with_entry(rng, content):
    """One entry of a directory of TIFF or EXIF changed."""
    start = max(content.find(b"II*\0"), content.find(b"MM\0*"))
    if start < 0:
        return spoiled(rng, content)
    order = "<" if content[start:start + 1] == b"I" else ">"
    data = bytearray(content)
    directory = start + int.from_bytes(data[start + 4:start + 8], "little" if order == "<" else "big")
    if directory + 2 > len(data):
        return spoiled(rng, content)
    count = struct.unpack_from(f"{order}H", data, directory)[0]
    at = directory + 2 + 12 * rng.randrange(max(1, count))
    if at + 12 > len(data):
        return spoiled(rng, content)
    tag, kind, number, value = struct.unpack_from(f"{order}HHII", data, at)
    how = rng.randrange(4)
    tag = rng.choice([tag, 0x100, 0x101, 0x102, 0x103, 0x106, 0x111, 0x112, 0x115, 0x116, 0x117, 0x11C, 0x140, 0x142,
                      0x143, 0x144, 0x145, 0x152, 0x153, 0x8769]) if how == 0 else tag
    kind = rng.choice([*range(14), whole(rng, 16)]) if how == 1 else kind
    number = whole(rng, 32) if how == 2 else number
    value = whole(rng, rng.choice([3, 8, 16, 32])) if how == 3 else value
    struct.pack_into(f"{order}HHII", data, at, tag, kind, number, value)
    return bytes(data)


def use(folder):
    [file] = folder.iterdir()
    rng = random.Random(zlib.crc32(file.read_bytes()))
    image = images.open_picture(file)
    if image.mode != "RGB":
        raise WrongError(f"a picture of mode {image.mode}")
    size = rng.choice([1, 2, 7, 16, 32, 224]), rng.choice([1, 3, 16, 31, 227])
    for resize in "stretch", "crop":
        if images.fit(image, size, resize).size != size[::-1]:
            raise WrongError("a picture of another size")
        images.seen_by_network(image, size, resize, 20)


BASES = bases()
FORMAT = Format("pictures", BASES, mutate, use, memory=2**31)
