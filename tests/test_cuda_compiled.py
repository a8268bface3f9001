"""Compiled code of the kernels for GPUs, of which none is needed: what it takes (benchmarks/gpu_resources.py), and what
it computes (tests/ptx.py)."""

import functools
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.skipif(not all(map(importlib.util.find_spec, ("numba_cuda", "cupy"))), reason="needs the extra cuda"),
    pytest.mark.slow, pytest.mark.xdist_group("compiled"),  # all look at what is compiled once
]
ROOT = Path(__file__).parents[1]
WITHOUT_SIMULATOR = os.environ | {"NUMBA_ENABLE_CUDASIM": "0"}
TILES = ("conv2d_forward", "conv2d_redistribute")


# The kernels of one convolution and one dense layer, for one chip, in place of all for two.
FEW = """
import json
import numpy as np
import gpu_resources as r
from fastdtd import graph as g
layers = (g.ReLU("positive", ("input",)), g.Conv2d("conv", ("positive",), np.ones((16, 16, 2, 2))),
          g.ReLU("relu", ("conv",)), g.Flatten("flat", ("relu",)), g.Dense("scores", ("flat",), np.ones((2, 64))))
r._cases = lambda: [(g.Graph(layers, (16, 3, 3)), "dtd")]
r.kernels_of_modules = set
print(json.dumps(r.table({(9, 0): r.CHIPS[9, 0]})))
"""
ALL = pytest.param("all", marks=pytest.mark.cuda)


@functools.cache
def table_of(which):
    command = ["-c", FEW] if which == "few" else [ROOT / "benchmarks" / "gpu_resources.py", "--json"]
    environment = WITHOUT_SIMULATOR | {"PYTHONPATH": str(ROOT / "benchmarks")}
    run = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=False, env=environment)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


@pytest.fixture(params=["few", ALL])
def rows(request):
    return table_of(request.param)


def named(row):
    return f"{row['kernel']} {row['variant']}, sm_{row['capability']}"


def test_nothing_is_spilled_and_sums_are_in_registers(rows):
    """A local array whose index is no constant, or one too many, would lie in memory: a stack."""
    assert [named(row) for row in rows if row["stack"] or row["spills"]] == []


@pytest.mark.parametrize("rows", [ALL], indirect=True)
def test_both_chips_and_all_kinds_of_tiles_are_there(rows):
    assert {row["capability"] for row in rows} == {"8.0", "9.0"}
    variants = {(row["kernel"], row["variant"]) for row in rows}
    for kernel, kinds in zip(TILES, (("SUM", "PAIR", "SIGNED_PAIR"), ("SUM", "SPLIT")), strict=True):
        for precision in ("fp32", "tf32", "3xtf32"):
            for kind in kinds:
                for height in (16, 64, *[128] * (precision == "tf32")):
                    assert any((kernel, f"{precision}, {kind}, {height} rows{planes}") in variants
                               for planes in ("", ", in planes"))


def test_tensor_cores_are_used_where_they_should_be(rows):
    """As many products as a warp has in a tile of 16 depths or, where that is a loop, in 8 of them."""
    assert any(row["mma"] for row in rows)
    for row in rows:
        if row["kernel"] not in TILES:
            assert row["mma"] == 0
            continue
        precision, kind, height = row["variant"].split(", ")[:3]
        products = {"SUM": 1, "PAIR": 2, "SIGNED_PAIR": 3,
                    "SPLIT": 2}[kind] * {"fp32": 0, "tf32": 1, "3xtf32": 3}[precision]
        fragments = {"16 rows": 1, "64 rows": 2, "128 rows": 4}[height] * 4 * 2
        assert row["mma"] in (products * fragments, products * fragments // 2), named(row)


def test_as_many_blocks_at_a_time_as_planned(rows):
    for row in rows:
        warps = row["blocks"] * row["threads"] // 32
        if row["kernel"] not in TILES:
            assert warps >= 16, named(row)  # half of what hides the way to memory
            continue
        precision, kind, height = row["variant"].split(", ")[:3]
        two = precision == "tf32" and height == "64 rows" and kind in ("SUM", "PAIR")
        two |= row["variant"] == "tf32, SUM, 128 rows, in planes" and row["kernel"] == "conv2d_redistribute"
        small = 2 if precision == "3xtf32" else 3  # of half as many threads
        assert row["blocks"] >= (small if height == "16 rows" else 2 if two else 1), named(row)


def test_shared_memory_needs_no_asking_for(rows):
    assert all(row["shared"] <= 48 * 1024 for row in rows)


@pytest.mark.parametrize("arguments", [["--short"], pytest.param([], marks=pytest.mark.cuda)], ids=["few", "all"])
def test_compiled_code_agrees_with_the_oracle_and_the_processor(arguments):
    """By an interpreter of PTX: what intrinsics and inline assembly really do."""
    run = subprocess.run([sys.executable, ROOT / "tests" / "ptx.py", *arguments], capture_output=True, text=True,
                         check=False, env=WITHOUT_SIMULATOR)
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.splitlines()[-1].startswith("average_pool2d" if arguments else "every layer")
