"""What is drawn: colours that mean what the bar says, at every shape, sign and size."""

import numpy as np
import pytest
from PIL import Image

from fastdtd import heatmap

WHITE, RED, BLUE = [255, 255, 255], [200, 0, 0], [0, 60, 200]


def drawn(relevance, picture=None):
    return np.asarray(heatmap.draw(np.asarray(relevance, np.float32), picture))


def bar(image, width):
    """The colours of the bar beside a map `width` wide, from above."""
    return image[:, width + heatmap._MARGIN + heatmap._BAR // 2]


def test_colors():
    found = heatmap.colors(np.array([[0.0, 2.0, 9.0, -2.0, -9.0, 0.5, 1.0]]), 2.0)[0]
    assert found[0].tolist() == WHITE
    assert found[1].tolist() == found[2].tolist() == RED
    assert found[3].tolist() == found[4].tolist() == BLUE
    assert (np.diff(heatmap.colors(np.linspace(0, 1, 50)[None], 1.0)[0].mean(1)) < 0).all()  # the more, the darker
    assert (heatmap.colors(np.zeros((2, 2)), 0.0) == 255).all()


def test_scale_is_robust():
    pixels = np.zeros((100, 100))
    pixels[:50] = np.random.default_rng(0).random((50, 100))
    without = heatmap.scale_of(pixels)
    assert 0.98 < without < 1
    pixels[0, :3] = 1000  # a few pixels
    assert heatmap.scale_of(pixels) < 1.01 * without
    pixels[50:] = -3
    assert heatmap.scale_of(pixels) == 3
    assert heatmap.scale_of(np.zeros((3, 3))) == 0


def test_channels_are_summed():
    relevance = np.zeros((3, 8, 8), np.float32)
    relevance[:, 2, 5] = 1, 2, 3
    assert heatmap.pixel_relevance(relevance)[2, 5] == 6
    assert heatmap.pixel_relevance(relevance).sum() == 6


def test_small_maps_are_enlarged_by_whole_pixels():
    relevance = np.zeros((1, 28, 28), np.float32)
    relevance[0, 3, 20] = 1
    image = drawn(relevance)
    red = (image[:, :280] == RED).all(2)
    assert image.shape[0] == 280
    assert red[30:40, 200:210].all()
    assert red.sum() == 100


@pytest.mark.parametrize("signed", [False, True])
def test_bar(signed):
    rng = np.random.default_rng(0)
    image = drawn(rng.random((1, 256, 256)) - (0.5 if signed else 0))
    colors = bar(image, 256)
    assert colors[9].tolist() == pytest.approx(RED, abs=8)
    assert colors[-10].tolist() == pytest.approx(BLUE if signed else WHITE, abs=8)
    if signed:
        assert colors[128].tolist() == pytest.approx(WHITE, abs=4)
    text = (image[:, 256 + heatmap._MARGIN + heatmap._BAR + 2:] < 128).all(2)
    rows = np.flatnonzero(text.any(1))
    assert len(np.flatnonzero(np.diff(rows) > 10)) == (2 if signed else 1)  # three labels, or two
    assert not text[[0, -1]].any()  # none is cut
    assert not text[:, -1].any()


@pytest.mark.parametrize(("shape", "width", "height"), [((1, 1, 1), 256, 256), ((3, 2000, 10), 5, 1024),
                                                        ((3, 10, 2000), 1024, 80), ((1, 1, 3000), 1024, 80),
                                                        ((2, 227, 227), 454, 454), ((1, 2, 1), 128, 256)])
@pytest.mark.parametrize("offset", [0, -0.5])
def test_every_shape_has_a_bar_that_can_be_read(shape, width, height, offset):
    image = drawn(1e-20 * (np.random.default_rng(0).random(shape) + offset))
    assert image.shape[0] == height
    assert image.shape[1] > width + 50
    text = (image[:, width + heatmap._MARGIN + heatmap._BAR + 2:] < 128).all(2)
    assert text.sum() > 50
    assert not text[[0, -1]].any()
    assert not text[:, -1].any()
    assert bar(image, width)[9].tolist() == pytest.approx(RED, abs=25)


def test_nothing_relevant():
    image = drawn(np.zeros((3, 16, 16)))
    assert (image[:, :256] == 255).all()
    assert (bar(image, 256)[10:-10] == 255).all()  # a red end labelled 0 would be a lie
    gray = Image.new("RGB", (300, 200), (90, 90, 90))
    overlay = drawn(np.zeros((3, 16, 16)), gray)[:, :300]
    assert np.unique(overlay).size == 1


@pytest.mark.parametrize(("value", "wanted"), [(1, RED), (-1, BLUE)])
def test_overlay(value, wanted):
    relevance = np.zeros((3, 10, 10), np.float32)
    relevance[:, 5, 2] = value
    picture = Image.new("RGB", (400, 300), (0, 0, 0))
    picture.paste((255, 255, 255), (200, 0, 400, 300))
    overlay = drawn(relevance, picture)[:, :400]
    assert overlay.shape[0] == 300
    assert overlay[165, 100].tolist() == wanted  # in the picture's proportions
    assert overlay[0, 399].tolist() == WHITE
    dark = overlay[0, 0]
    assert dark[0] == dark[1] == dark[2] < 128
    assert (overlay == wanted).all(2).sum() < 400 * 300 / 50


def test_large_pictures_are_reduced():
    assert drawn(np.ones((1, 10, 10)), Image.new("RGB", (3000, 1500))).shape[0] == 512
    assert drawn(np.ones((1, 1500, 3000))).shape[0] == 512


def test_write(tmp_path):
    heatmap.write(tmp_path / "map", np.ones((1, 4, 4), np.float32))
    with Image.open(tmp_path / "map") as image:
        assert image.format == "PNG"
        np.testing.assert_array_equal(np.asarray(image), drawn(np.ones((1, 4, 4))))
