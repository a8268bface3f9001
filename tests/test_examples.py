"""The examples run, and draw something."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("matplotlib")
pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]


def run(script, *arguments):
    subprocess.run([sys.executable, ROOT / "examples" / script, *arguments], check=True, capture_output=True,
                   timeout=300)


def is_drawn(path):
    return np.asarray(Image.open(path).convert("L")).std() > 5


def test_two_dimensions(tmp_path):
    run("two_dimensions.py", tmp_path / "out.png")
    assert is_drawn(tmp_path / "out.png")


def test_digits(tmp_path, data):
    run("digits.py", data / "models/lenet_mnist", tmp_path / "out.png")
    assert is_drawn(tmp_path / "out.png")


def test_gallery(tmp_path):
    run("gallery.py", tmp_path / "out", ROOT / "fastdtd/models/chelsea.png")
    assert is_drawn(tmp_path / "out/gallery_squeezenet1_1.jpg")
