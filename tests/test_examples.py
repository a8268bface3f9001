"""The examples run, and draw something."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]


def run(script, *arguments):
    """What it prints."""
    return subprocess.run([sys.executable, ROOT / "examples" / script, *arguments], check=True, capture_output=True,
                          text=True, timeout=300).stdout


def is_drawn(path):
    return np.asarray(Image.open(path).convert("L")).std() > 5


def test_tutorial():
    said = run("tutorial.py")
    assert "285 Egyptian cat" in said
    assert "Nearest: espresso maker" in said


def test_two_dimensions(tmp_path):
    pytest.importorskip("matplotlib")
    run("two_dimensions.py", tmp_path / "out.png")
    assert is_drawn(tmp_path / "out.png")


def test_contrast(tmp_path):
    pytest.importorskip("matplotlib")
    assert "Egyptian cat against espresso" in run("contrast.py", tmp_path / "out.png")
    assert is_drawn(tmp_path / "out.png")


def test_digits(tmp_path, data):
    pytest.importorskip("matplotlib")
    run("digits.py", data / "models/lenet_mnist", tmp_path / "out.png")
    assert is_drawn(tmp_path / "out.png")


def test_gallery(tmp_path):
    pytest.importorskip("matplotlib")
    run("gallery.py", tmp_path / "out", ROOT / "fastdtd/models/chelsea.png")
    assert is_drawn(tmp_path / "out/gallery_squeezenet1_1.jpg")
