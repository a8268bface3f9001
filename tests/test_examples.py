"""The examples run, and draw something."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]


def run(script, *arguments, folder="examples"):
    """What it prints."""
    return subprocess.run([sys.executable, ROOT / folder / script, *arguments], check=True, capture_output=True,
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


def test_maps(tmp_path):
    pytest.importorskip("matplotlib")
    assert "Egyptian cat at all positions: explained" in run("maps.py", tmp_path / "out.png")
    assert is_drawn(tmp_path / "out.png")


def test_digits(tmp_path, data):
    pytest.importorskip("matplotlib")
    run("digits.py", data / "models/lenet_mnist", tmp_path / "out.png")
    assert is_drawn(tmp_path / "out.png")


def test_limits():
    """And docs/limits.md has a place for each table."""
    said = run("limits.py", *(ROOT / "fastdtd/models").glob("*.png"), folder="benchmarks")
    names = [line for line in said.splitlines() if line.startswith("limits.py ")]
    assert names == [f"limits.py {name}" for name in ("classes", "objects", "biases", "ties", "first")]
    page = (ROOT / "docs/limits.md").read_text()
    assert all(f"<!-- table by benchmarks/{name} -->" in page for name in names)
    assert "nan" not in said


def test_gallery(tmp_path):
    pytest.importorskip("matplotlib")
    run("gallery.py", tmp_path / "out", ROOT / "fastdtd/models/chelsea.png")
    assert is_drawn(tmp_path / "out/gallery_squeezenet1_1.jpg")
