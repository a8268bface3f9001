"""Pictures of every kind people have: an upright 8-bit RGB image, or a PictureError; never a warning, never another
exception.
"""

import io
import multiprocessing
import os
import pickle
import re
import socket
import struct
import threading
import warnings
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from fastdtd import images
from fastdtd.errors import PictureError

RED, BLUE = (255, 0, 0), (0, 0, 255)


def corners(size=(60, 40)):
    """Red but for its left upper quarter, which is blue: no two of its eight orientations are alike."""
    image = Image.new("RGB", size, RED)
    image.paste(BLUE, (0, 0, size[0] // 2, size[1] // 2))
    return image


def png(width, height, depth, color_type, rows, *chunks):
    """A PNG made by hand, for what Pillow does not write."""
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    return b"".join([
        b"\x89PNG\r\n\x1a\n",
        chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color_type, 0, 0, 0)), *chunks,
        chunk(b"IDAT", zlib.compress(rows)),
        chunk(b"IEND", b"")
    ])


def encoded(image, kind="PNG", **options):
    content = io.BytesIO()
    image.save(content, kind, **options)
    return content.getvalue()


@pytest.fixture
def pixels(tmp_path):
    def read(content, name="picture.png"):
        (tmp_path / name).write_bytes(content)
        image = images.open_picture(tmp_path / name)
        assert image.mode == "RGB"
        return np.asarray(image)

    return read


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM"])
def test_formats_without_loss(pixels, kind):
    options = {"lossless": True} if kind == "WEBP" else {}
    np.testing.assert_array_equal(pixels(encoded(corners(), kind, **options)), corners())


def test_grey_of_16_bits(pixels):
    grey = np.array([[0, 255, 256, 65535]], np.uint16)
    assert pixels(encoded(Image.fromarray(grey)))[0, :, 0].tolist() == [0, 0, 1, 255]
    assert pixels(encoded(Image.fromarray(grey), "TIFF"), "p.tif")[0, :, 1].tolist() == [0, 0, 1, 255]
    assert pixels(b"P5 4 1 65535\n" + grey.astype(">u2").tobytes(), "p.pgm")[0, :, 2].tolist() == [0, 0, 1, 255]


def test_rgb_of_16_bits(pixels):
    row = b"\0" + struct.pack(">6H", 0x1234, 0xFFFF, 0, 0x8000, 0x00FF, 0x0100)
    assert pixels(png(2, 1, 16, 2, row)).tolist() == [[[0x12, 255, 0], [0x80, 0, 1]]]


def key(*levels):
    """A PNG's chunk: the grey or colour that is transparent."""
    data = struct.pack(f">{len(levels)}H", *levels)
    return struct.pack(">I", len(data)) + b"tRNS" + data + struct.pack(">I", zlib.crc32(b"tRNS" + data))


@pytest.mark.parametrize(("depth", "row", "levels", "shown"), [
    (16, struct.pack(">3H", 0x1234, 0x1235, 0xFF00), [0x1234], [255, 0x12, 255]),
    (8, bytes([1, 2, 3]), [2], [1, 255, 3]), (4, bytes([0x25, 0x20]), [5], [34, 255, 34]),
    (4, bytes([0x25, 0x20]), [2], [255, 85, 255]), (2, bytes([0b00011000]), [1], [0, 255, 170]),
    (1, bytes([0b01000000]), [0], [255, 255, 255]), (1, bytes([0b01000000]), [1], [0, 255, 0])])
def test_a_transparent_grey(pixels, depth, row, levels, shown):
    assert pixels(png(3, 1, depth, 0, b"\0" + row, key(*levels)))[0, :, 0].tolist() == shown


def test_a_transparent_colour_of_16_bits(pixels):
    row = struct.pack(">6H", 0x1234, 0x5678, 0x9ABC, 0x1234, 0x5678, 0)
    shown = pixels(png(2, 1, 16, 2, b"\0" + row, key(0x1234, 0x5678, 0x9ABC)))
    assert shown[0].tolist() == [[255, 255, 255], [0x12, 0x56, 0]]


def test_transparent_parts_are_white(pixels):
    clear, half = Image.new("RGBA", (2, 2), (0, 0, 0, 0)), Image.new("RGBA", (2, 2), (255, 0, 0, 51))
    assert (pixels(encoded(clear)) == 255).all()
    assert pixels(encoded(half))[0, 0].tolist() == [255, 204, 204]
    assert pixels(encoded(Image.new("LA", (2, 2), (0, 51))))[0, 0].tolist() == [204, 204, 204]
    palette = corners().quantize(2)
    blue = palette.getpixel((0, 0))
    shown = pixels(encoded(palette, transparency=blue))
    assert shown[0, 0].tolist() == [255, 255, 255]
    assert shown[-1, -1].tolist() == list(RED)
    shown = pixels(encoded(
        palette, transparency=bytes([0, 51] if blue else [51, 0])))  # an opacity for each colour of the palette
    assert shown[0, 0].tolist() == [204, 204, 255]
    keyed = encoded(corners(), transparency=BLUE)  # one colour of an RGB picture is transparent
    assert pixels(keyed)[0, 0].tolist() == [255, 255, 255]


def test_jpegs_of_many_scans(pixels):
    """The last scan again and again: as small as it is, it takes as long as each of the others."""
    content = encoded(Image.new("L", (1024, 1024), 128), "JPEG", progressive=True)
    tables = content.rfind(b"\xff\xc4")
    assert tables < content.rfind(b"\xff\xda")
    scan = content[tables:-2]
    assert pixels(content[:-2] + scan * 90 + content[-2:], "p.jpg").shape == (1024, 1024, 3)
    with pytest.raises(PictureError, match="is a JPEG of 1006 scans; at most 953 are accepted with 1024 x 1024 pixels"):
        pixels(content[:-2] + scan * 1000 + content[-2:], "p.jpg")


def test_other_modes(pixels):
    np.testing.assert_array_equal(pixels(encoded(corners().quantize(2))), corners())
    grey = corners().convert("L")
    np.testing.assert_array_equal(pixels(encoded(grey)), grey.convert("RGB"))
    black = Image.new("1", (9, 3), 0)
    black.putpixel((8, 2), 1)
    assert pixels(encoded(black)).sum() == 3 * 255
    assert np.abs(
        pixels(encoded(corners().convert("CMYK"), "JPEG", quality=100), "p.jpg")
        - np.asarray(corners(), int)).mean() < 5


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation(pixels, orientation):
    back = {
        2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270
    }
    turned = corners().transpose(back[orientation]) if orientation > 1 else corners()
    exif = Image.Exif()
    exif[0x0112] = orientation
    shown = pixels(encoded(turned, "JPEG", quality=100, subsampling=0, exif=exif), "p.jpg")
    assert shown.shape == (40, 60, 3)
    assert np.abs(shown - np.asarray(corners(), int)).mean() < 5
    shown = pixels(encoded(turned, exif=exif))
    np.testing.assert_array_equal(shown, corners())
    once = images.open_picture(Image.open(io.BytesIO(encoded(turned, exif=exif))))
    np.testing.assert_array_equal(images.open_picture(once), corners())  # what is upright already is not turned again


def test_damaged_exif_is_no_matter(pixels):
    np.testing.assert_array_equal(pixels(encoded(corners(), exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x09\x01\x12")), corners())


def test_smallest_picture(pixels):
    assert pixels(encoded(Image.new("RGB", (1, 1), RED))).tolist() == [[list(RED)]]


def test_first_frame_of_an_animation(pixels):
    frames = [corners(), Image.new("RGB", (60, 40), "black")]
    for kind in ("GIF", "PNG", "TIFF"):
        content = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
        np.testing.assert_array_equal(pixels(content), corners())
    stereo = pixels(encoded(frames[0], "MPO", save_all=True, append_images=frames[1:]), "p.jpg")
    assert np.abs(stereo - np.asarray(corners(), int)).mean() < 5


def claiming(kind, width, height):
    """A picture of 8 x 8 that says it has another size."""
    image = Image.new("RGB", (8, 8), RED)
    content = bytearray(encoded(image, kind, **({"save_all": True, "append_images": [Image.new("RGB", (8, 8), BLUE)]}
                                                if kind == "WEBP" else {})))
    if kind == "PPM":
        return content.replace(b"8 8", b"%d %d" % (width, height))
    at, size = {"GIF": (6, struct.pack("<HH", width, height)), "BMP": (18, struct.pack("<ii", width, height)),
                "JPEG": (content.find(b"\xff\xc0") + 5, struct.pack(">HH", height, width)),
                "WEBP": (content.find(b"VP8X") + 12, (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(
                    3, "little"))}[kind]
    content[at:at + len(size)] = size
    return content


@pytest.mark.parametrize("kind", ["JPEG", "GIF", "WEBP", "BMP", "PPM"])
def test_sizes_are_checked_before_pixels_are_decoded(tmp_path, monkeypatch, kind):
    path = tmp_path / "picture"
    path.write_bytes(claiming(kind, 12_000, 12_000))
    monkeypatch.setattr(Image.Image, "load", lambda image: pytest.fail("pixels were decoded"))
    with pytest.raises(PictureError, match=r"12000 x 12000 pixels; 1 to 100000000|too large"):
        images.open_picture(path)


def damaged():
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    yield "a text", b"this is no picture", "damaged, or not in a known format"
    yield "nothing", b"", "damaged, or not in a known format"
    for kind in ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM"):
        content = encoded(noise, kind)
        yield f"half a {kind}", content[:len(content) // 2], "."
        yield f"the start of a {kind}", content[:30], "."
    broken = bytearray(encoded(noise))
    broken[5000:5100] = bytes(100)
    yield "a PNG with zeros", bytes(broken), "cannot be read"
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n"
    yield "EPS, which would run another program", eps, "not in a known"
    yield "a bomb", png(60000, 60000, 8, 2, b""), "too large; at most 100000000"
    yield "a bit too large", png(10000, 10001, 8, 0, b""), "10000 x 10001 pixels; 1 to 100000000"
    yield "no width", png(0, 5, 8, 0, b""), "."
    yield "floating point", encoded(Image.new("F", (3, 3)), "TIFF"), "floating-point"


@pytest.mark.parametrize(("content", "message"), [pytest.param(c, m, id=name) for name, c, m in damaged()])
def test_refused(tmp_path, content, message):
    path = tmp_path / "picture.jpg"
    path.write_bytes(content)
    with pytest.raises(PictureError, match=message) as error:
        images.open_picture(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes")
@pytest.mark.parametrize("kind", ["a named pipe", "a socket", "a device", "a loop", "a link to none", "a folder"])
def test_what_is_no_file_is_not_waited_for(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)  # sockets' names are short
    place, message = Path("picture.png"), f"is {kind}"
    match kind:
        case "a named pipe":
            os.mkfifo(place)
        case "a socket":
            socket.socket(socket.AF_UNIX).bind(str(place))
        case "a device":
            place.symlink_to("/dev/zero")
        case "a loop":
            place.symlink_to("picture.png")
            message = "symbolic link"
        case "a link to none":
            place.symlink_to("none.png")
            message = "is a link to what does not exist"
        case "a folder":
            place.mkdir()
    with pytest.raises(PictureError, match=message):
        images.open_picture(place)


def test_a_link_to_a_picture(tmp_path):
    corners().save(tmp_path / "a.png")
    (tmp_path / "b.png").symlink_to("a.png")
    np.testing.assert_array_equal(images.open_picture(tmp_path / "b.png"), corners())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes cannot be forked")
def test_a_fork_while_others_read(tmp_path):
    corners((300, 200)).save(tmp_path / "a.png")
    stop = threading.Event()

    def read():
        while not stop.is_set():
            images.open_picture(tmp_path / "a.png")

    threads = [threading.Thread(target=read) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(10):
            child = multiprocessing.get_context("fork").Process(target=images.open_picture, args=(tmp_path / "a.png",))
            child.start()
            child.join(20)
            child.kill()
            assert child.exitcode == 0
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def test_no_file(tmp_path):
    with pytest.raises(PictureError, match="does not exist"):
        images.open_picture(tmp_path / "none.png")
    with pytest.raises(PictureError, match="is a folder"):
        images.open_picture(str(tmp_path))
    for path in ("a\0b", "x" * 5000):
        with pytest.raises(PictureError, match="cannot be read"):
            images.open_picture(path)


@pytest.mark.parametrize("shape", [(4, 6), (4, 6, 3), (4, 6, 4)])
def test_arrays(shape):
    array = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    array[..., 3:] = 255  # opaque
    expected = array[..., :3] if array.ndim == 3 else array[..., None].repeat(3, 2)
    np.testing.assert_array_equal(images.open_picture(array), expected)
    np.testing.assert_array_equal(images.open_picture(array[::-1, ::2]), expected[::-1, ::2])


@pytest.mark.parametrize("array", [
    np.zeros((4, 6), np.float32),
    np.zeros((4, 6, 3), bool),
    np.zeros((3, 4, 6), np.uint8),
    np.uint8(3),
    np.zeros((4, 6, 3), np.int64),
    np.zeros((4, 6, 2), np.uint8),
    np.zeros((0, 6), np.uint8),
    np.zeros((4, 0, 3), np.uint8),
    np.array(["a"]),
    np.zeros((1, 4, 6, 3), np.uint8),
    np.ma.masked_less(np.zeros((4, 6), np.uint8), 1),
], ids=repr)
def test_other_arrays(array):
    with pytest.raises(PictureError, match=r"the array|of type uint8"):
        images.open_picture(array)


@pytest.mark.parametrize("thing", [None, 3, b"picture.png", [[1, 2], [3, 4]]])
def test_other_things(thing):
    with pytest.raises(PictureError, match=f"of type {type(thing).__name__}"):
        images.open_picture(thing)


def test_damaged_images_of_pillow():
    content = encoded(corners((500, 500)), "JPEG")
    closed = corners()
    closed.close()
    for image in (Image.open(io.BytesIO(content[:len(content) // 2])), Image.new("RGB",
                                                                                 (0, 3)), Image.new("F",
                                                                                                    (3, 3)), closed):
        with pytest.raises(PictureError, match="the image"):
            images.open_picture(image)


def test_filters_of_warnings_can_be_copied(tmp_path):
    """As scikit-learn and others copy them: they take patterns to be regular expressions, and pickle them."""
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    images.open_picture(tmp_path / "a.png")
    pattern = warnings.filters[0][3]
    for copied in (re.compile(pattern.pattern), pickle.loads(pickle.dumps(pattern))):
        assert not any(copied.match(module) for module in ("", "PIL.Image", "others"))


def test_filters_of_warnings_stay_as_they_are(tmp_path):
    """Though they belong to the whole process, and several threads read."""
    corners((300, 200)).save(tmp_path / "a.png")
    images.open_picture(tmp_path / "a.png")  # which puts one there that is nothing to others
    before = list(warnings.filters)
    threads = [
        threading.Thread(target=lambda: [images.open_picture(tmp_path / "a.png") for _ in range(30)]) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert warnings.filters == before
    with pytest.warns(UserWarning, match="of others"):
        warnings.warn_explicit("of others", UserWarning, "a.py", 1, module="PIL.Image")


def test_no_warning_comes_out(pixels, monkeypatch):
    """Not even where warnings are errors; nor is one of Pillow's lost that others cause meanwhile."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2000)  # Pillow warns from here, and refuses from twice as many
    damaged = encoded(corners(), exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x09\x01\x12")
    with warnings.catch_warnings():
        for _ in range(2):
            warnings.resetwarnings()
            warnings.simplefilter("error")
            np.testing.assert_array_equal(pixels(damaged), corners())
    with pytest.warns(Image.DecompressionBombWarning):
        Image.open(io.BytesIO(damaged))


def test_order_of_channels():
    pixel = np.array([[[10, 20, 30]]], np.uint8)
    assert images.read(pixel, (3, 1, 1), "rgb", "stretch").ravel().tolist() == [10, 20, 30]
    assert images.read(pixel, (3, 1, 1), "bgr", "stretch").ravel().tolist() == [30, 20, 10]
    assert images.read(pixel, (1, 1, 1), "gray", "stretch").ravel().tolist() == [18]
    every = np.arange(256, dtype=np.uint8)[None]
    np.testing.assert_array_equal(images.read(every, (1, 1, 256), "gray", "crop")[0], every)


def test_stretch_and_crop():
    third = np.zeros((10, 30), np.uint8)
    third[:, 10:20] = 255
    assert (images.read(third, (1, 10, 10), "gray", "crop") == 255).all()
    assert (images.read(third.T, (1, 10, 10), "gray", "crop") == 255).all()
    stretched = images.read(third, (1, 10, 9), "gray", "stretch")[0, 5]
    assert stretched[[0, 1, 7, 8]].tolist() == [0, 0, 0, 0]
    assert stretched[4] == 255
    image = images.open_picture(third)
    assert images.visible_part(image, (20, 20), "crop") == (10, 0, 20, 10)
    assert images.visible_part(image, (20, 20), "stretch") == (0, 0, 30, 10)
    assert images.visible_part(image, (10, 60), "crop") == (0, 2.5, 30, 7.5)


SIDES = st.one_of(st.integers(1, 4), st.sampled_from([224, 227, 240, 299]), st.integers(1, 400))
RESIZES = st.sampled_from(["crop", "stretch"])


@settings(max_examples=1000, deadline=None)
@given(st.tuples(st.integers(1, 10_000), st.integers(1, 10_000)), st.tuples(SIDES, SIDES), RESIZES)
@example((600, 450), (224, 224), "crop")
@example((1, 10_000), (1, 4000), "crop")
@example((1, 100_000_000), (1, 400), "crop")
@example((100_000_000, 1), (400, 1), "crop")
def test_what_is_seen_lies_in_the_picture(size, network, resize):
    left, top, right, bottom = images.visible_part(SimpleNamespace(size=size), network, resize)
    for low, high, length in ((left, right, size[0]), (top, bottom, size[1])):
        assert 0 <= low < high <= length
        assert np.float32(low) < np.float32(high)  # as Pillow has them
        assert low + high == pytest.approx(length)  # the centre
    assert (left, right) == (0, size[0]) or (top, bottom) == (0, size[1])
    if resize == "crop" and min(right - left, bottom - top) > 1:
        assert (right - left) * network[0] == pytest.approx((bottom - top) * network[1])


@settings(max_examples=300, deadline=None)
@given(st.one_of(st.tuples(st.integers(1, 700), st.integers(1, 100)), st.tuples(st.integers(1, 7), st.integers(
    1, 10_000))), st.booleans(), st.tuples(SIDES, SIDES), RESIZES)
@example((600, 450), False, (224, 224), "crop")
@example((10_000, 7), False, (299, 299), "crop")
@example((7, 10_000), False, (1, 299), "crop")
def test_every_picture_fits(size, turned, network, resize):
    image = Image.new("RGB", size[::-1] if turned else size, RED)
    assert images.fit(image, network, resize).getextrema() == ((255, 255), (0, 0), (0, 0))
    shown = images.seen_by_network(image, network, resize, 64)
    assert 1 <= max(shown.size) <= 64
    assert shown.getextrema() == ((255, 255), (0, 0), (0, 0))


@pytest.mark.parametrize("side", [224, 227, 240, 299])
def test_photographs_of_all_common_proportions_are_cropped(side):
    for width, height in ((600, 450), (500, 375), (640, 427), (1024, 683), (333, 500), (375, 500), (481, 321)):
        image = Image.new("RGB", (width, height))
        assert images.fit(image, (side, side), "crop").size == (side, side)
        images.seen_by_network(image, (side, side), "crop", 1024)


def test_images_that_are_given_stay_as_they_are():
    image = Image.new("P", (3, 2), 1)
    image.putpalette([0, 0, 0, 9, 9, 9])
    image.info["transparency"] = 300
    for picture in (image, Image.new("RGB", (3, 2), "red")):
        before = picture.tobytes(), dict(picture.info), picture.mode
        images.open_picture(picture)
        assert (picture.tobytes(), dict(picture.info), picture.mode) == before


def test_large_animations_are_refused(tmp_path, monkeypatch):
    """Decoding a frame takes four times as long as a picture."""
    frames = [Image.new("RGB", (40, 30), color) for color in ("red", "blue")]
    frames[0].save(tmp_path / "a.webp", save_all=True, append_images=frames[1:], lossless=True)
    frames[0].save(tmp_path / "b.webp", lossless=True)
    assert images.open_picture(tmp_path / "a.webp").getpixel((0, 0)) == (255, 0, 0)
    monkeypatch.setattr(images, "MAX_ANIMATED", 1199)
    with pytest.raises(PictureError, match="is an animation of 40 x 30 pixels; at most 1199 are accepted"):
        images.open_picture(tmp_path / "a.webp")
    assert images.open_picture(tmp_path / "b.webp").size == (40, 30)
