"""Single layers against the oracle: awkward shapes, and sizes that take several blocks, tiles and units; and the
micro-kernel itself."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from fastdtd.kernels import cpu
from fastdtd.kernels.cpu.microkernel import (
    MULTIPLY_SPLIT,
    MULTIPLY_TILE,
    ROW_VECTORS,
    SPLIT_ROWS,
    SPLIT_VECTORS,
    TILE_COLUMNS,
    TILE_ROWS,
    TILE_VECTORS,
    multiply_row,
    multiply_split_row,
    multiply_split_three,
)
from fastdtd.kernels.cpu.scalar import raised
from fastdtd.kernels.cpu.vector_code import LANES
from layers import KEPT, every_example, weights
from numba import njit
from single_layers import check, check_signed, rules_of_both_signs

from fastdtd import graph as g
from fastdtd.explainer import Explainer
from fastdtd.lowering import lower
from fastdtd.model import Model, Preprocessing
from fastdtd.plan import Plan
from fastdtd.rules import assign

CASES = [(kind, example, rule, domain, threads, count) for kind, example in every_example()
         for rule, domain in KEPT[kind].rules for threads, count in KEPT[kind].runs]


@pytest.mark.parametrize(("kind", "example", "rule", "domain", "threads", "count"), CASES)
def test_like_the_oracle(kind, example, rule, domain, threads, count):
    check(KEPT[kind].examples[example], rule, domain, count, threads=threads)


@pytest.mark.parametrize(("kind", "example", "rule", "domain"), rules_of_both_signs())
def test_rules_of_both_signs_are_like_the_oracle(kind, example, rule, domain):
    check_signed(KEPT[kind].examples[example], rule, domain)


def test_dense_gives_the_same_bits_in_any_batch():
    """Images are taken in groups, on both ways; one of them alone has its weights read in other pieces."""
    features, outputs = 2100, 70
    w, hidden = weights(0, outputs, features), weights(1, features, 6)
    layers = (g.Flatten("flat", (g.INPUT,)), g.Dense("hidden", ("flat",), hidden), g.ReLU("r", ("hidden",)),
              g.Dense("tested", ("r",), w), g.ReLU("s", ("tested",)),
              g.Dense("scores", ("s",), np.abs(weights(2, 3, outputs))))
    explainer = Explainer(Model(g.Graph(layers, (6, 1, 1), (-1.0, 2.0)), Preprocessing(None)), threads=1)
    batch = np.random.default_rng(1).uniform(-1, 2, (11, 6, 1, 1)).astype(np.float32)
    together = explainer(batch, 1)
    for count in (1, 2, 5):
        for first in range(0, 11 - count):
            part = explainer(batch[first:first + count], 1)
            np.testing.assert_array_equal(part.output, together.output[first:first + count])
            np.testing.assert_array_equal(part.relevance, together.relevance[first:first + count])


@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_averages_hide_no_overflow(bad, padding):
    """What stands for padding inside the kernel is no number that could come from outside."""
    layer = g.AveragePool2d("tested", (g.INPUT,), (3, 3), (1, 1), (padding,) * 4)
    graph = g.Graph((layer, g.Flatten("flat", ("tested",))), (1, 3, 3), (-1.0, 2.0))
    plan = Plan(lower(graph, assign(graph), cpu).schedule(1), cpu)
    plan.input[:] = 1
    plan.input[0, 0, 1, 1] = bad
    with np.errstate(invalid="ignore"):
        plan.forward()
    np.testing.assert_array_equal(plan.output.ravel(), np.full(plan.output.size, bad, np.float32))


def _called(product, last, columns=None):
    """`product` (an intrinsic) as a function of arrays; its last argument is an array or an integer, and strips take so
    many columns."""
    end = "end.ctypes.data" if last == "array" else "end"
    strip = "" if columns is None else f", {columns}"
    scope = {"product": product}
    exec("def call(tile, a, offsets, b, end):\n"
         "    product(tile.ctypes.data, tile.shape[-1], a.ctypes.data, offsets.ctypes.data, "
         f"b.ctypes.data, {end}{strip})", scope)
    return njit(scope["call"])


@pytest.mark.parametrize("depth", [1, 2, 3, 4, 5, 7, 8, 100])
@pytest.mark.parametrize("vectors", range(1, TILE_VECTORS + 1))
def test_multiply_tile(depth, vectors):
    rng = np.random.default_rng(depth)
    a, b = rng.standard_normal((depth, TILE_ROWS), np.float32), rng.standard_normal(2000, np.float32)
    offsets = rng.integers(0, len(b) - TILE_COLUMNS, depth).astype(np.int32)
    tile = np.full((TILE_ROWS, TILE_COLUMNS), np.nan, np.float32)
    _called(MULTIPLY_TILE[vectors - 1], "integer")(tile, a, offsets, b, depth)
    columns = vectors * LANES
    rows = np.stack([b[offset:offset + columns] for offset in offsets]).astype(float)
    np.testing.assert_allclose(tile[:, :columns], a.T.astype(float) @ rows, atol=1e-5 * depth)
    assert np.isnan(tile[:, columns:]).all()


@pytest.mark.parametrize("vectors", [1, 2, 2 + ROW_VECTORS])
def test_multiply_row(vectors):
    rng = np.random.default_rng(vectors)
    depth, columns, rows = 9, vectors * LANES, 1
    a, b = rng.standard_normal((depth, rows), np.float32), rng.standard_normal(2000, np.float32)
    offsets = rng.integers(0, 1000, depth).astype(np.int32)
    tile = np.full((rows, columns + ROW_VECTORS * LANES), np.nan, np.float32)
    _called(multiply_row, "integer", columns - 1)(tile, a, offsets, b, depth)
    seen = np.stack([b[offset:offset + columns] for offset in offsets]).astype(float)
    np.testing.assert_allclose(tile[:, :columns], a.T.astype(float) @ seen, atol=1e-5 * depth)
    assert np.isnan(tile[:, columns + LANES:]).all()


@pytest.mark.parametrize("depth", [1, 3, 64, 300])
@pytest.mark.parametrize("rows", [1, 3, SPLIT_ROWS, 2 * SPLIT_ROWS + 1])
@pytest.mark.parametrize("vectors", range(1, SPLIT_VECTORS + 1))
def test_multiply_split(depth, rows, vectors):
    rng = np.random.default_rng(depth)
    w, b = rng.standard_normal((1, rows, depth), np.float32), rng.standard_normal(2000, np.float32)
    w[rng.random(w.shape) < 0.2] = 0
    width = cpu.CONV2D_COLUMNS + LANES  # of tiles; a strip of one row can end one vector after the last column
    offsets = rng.integers(0, len(b) - width, depth).astype(np.int32)
    sides = rng.choice([1, -1, 2, 0], depth)
    shape = cpu.conv2d_split_shape(1, rows, depth)
    panels, panel_rows = shape[1], shape[3]
    assert panel_rows == (rows if rows in (1, 3) else SPLIT_ROWS)
    columns = vectors * LANES
    strip = {1: multiply_split_row, 3: multiply_split_three}.get(rows)
    multiply = _called(MULTIPLY_SPLIT[vectors - 1], "array") if strip is None else _called(strip, "array", columns)
    if rows == 1 and vectors % 2:
        columns += LANES  # its strips end with a whole tile, of two vectors
    packed, packed_offsets = np.full(shape, np.nan, np.float32), np.full(shape[:3], -1, np.int32)
    bounds = np.full((1, panels, cpu.conv2d_split_bounds(panel_rows)), -1, np.int32)
    cpu.conv2d_pack_split(packed, packed_offsets, bounds, w, offsets, sides)
    seen = np.stack([b[offset:offset + columns] for offset in offsets]).astype(float)
    positive = np.where((sides == 2) | (sides * w[0] > 0), w[0], 0)
    for panel in range(panels):
        tiles = np.full((2, panel_rows, width), np.nan, np.float32)
        multiply(tiles, packed[0, panel], packed_offsets[0, panel], b, bounds[0, panel])
        here = slice(panel * panel_rows, (panel + 1) * panel_rows)
        for tile, weight in zip(tiles, (positive, w[0] - positive), strict=True):
            expected = weight[here].astype(float) @ seen
            np.testing.assert_allclose(tile[:len(expected), :columns], expected, atol=1e-5 * depth)
            assert not tile[len(expected):, :columns].any()
            assert np.isnan(tile[:, columns:]).all()


@pytest.mark.parametrize(("features", "lanes"), [("", 4), ("+avx,+avx2,+fma", 8), ("+avx2,+avx512f", 16)])
def test_vectors_of_other_processors(features, lanes):
    """In a process of its own, for they are fixed at import. `make test-portable` runs this file with the first two."""
    code = "from fastdtd.kernels.cpu.vector_code import LANES; print(LANES)"
    environment = os.environ | {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": features}
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, env=environment)
    assert int(run.stdout) == lanes


@pytest.mark.skipif("NUMBA_CPU_NAME" not in os.environ, reason="compares what `make test-portable` compiles for")
def test_a_network_like_this_processor(tmp_path):
    """Whose kernels are used in a process of its own."""
    script = """
import sys
import numpy as np
from fastdtd import Explainer, load
from fastdtd.model_file import MODELS
model = load("squeezenet1_1")
np.save(sys.argv[1], Explainer(model)(model.preprocess(MODELS / "coffee.png")).relevance)
"""
    native = {name: value for name, value in os.environ.items() if not name.startswith("NUMBA_CPU")}
    for environment, name in ((os.environ, "ours.npy"), (native, "theirs.npy")):
        subprocess.run([sys.executable, "-c", script, tmp_path / name], check=True, env=environment)
    ours, theirs = np.load(tmp_path / "ours.npy"), np.load(tmp_path / "theirs.npy")
    # Sums of another order move a winner of a max-pool here and there; a wrong tile moves everything.
    assert np.linalg.norm(ours - theirs) <= 1e-3 * np.linalg.norm(theirs)


@pytest.mark.slow
@pytest.mark.parametrize("edited", ["microkernel.py", "elementwise.py"])
def test_a_change_of_any_source_makes_cached_kernels_stale(edited, tmp_path):
    """Numba itself would look at the file of each kernel alone; code for another tile overruns memory."""
    package = tmp_path / "kernels"
    shutil.copytree(Path(cpu.__file__).parents[1], package, ignore=shutil.ignore_patterns("__pycache__"))
    script = f"""
import importlib.util, sys, types
sys.modules["fastdtd"] = types.ModuleType("fastdtd")
for name, folder in (("fastdtd.kernels", {str(package)!r}), ("fastdtd.kernels.cpu", {str(package / "cpu")!r})):
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = [folder]
import numpy as np
from fastdtd.kernels.cpu.elementwise import activate_forward
activate_forward(np.zeros((1, 1, 1, 1), "f4"), np.zeros((1, 1, 1, 1), "f4"), 0, 0, 1, 1.0, 0.0, 1.0, 0, 1)
print(sum(activate_forward.stats.cache_hits.values()))
"""

    def hits():
        return subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True,
                              cwd=tmp_path).stdout.strip()

    assert [hits(), hits()] == ["0", "1"]
    source = package / "cpu" / edited
    times = source.stat()
    source.write_text(source.read_text() + "\n# another constant\n")
    os.utime(source, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert [hits(), hits()] == ["0", "1"]


# ---- Powers ----------------------------------------------------------------------------------------------------------


def test_powers_are_rounded_once():
    """Of any size, against float64; and what has no logarithm."""
    rng = np.random.default_rng(0)
    base = np.exp(rng.uniform(-80, 80, 20_000)).astype(np.float32)
    exponent = rng.uniform(-3, 3, 20_000).astype(np.float32)
    with np.errstate(over="ignore", under="ignore"):
        exact = np.float64(base)**np.float64(exponent)
        expected = exact.astype(np.float32)
    found = np.array([raised(*pair) for pair in zip(base, exponent, strict=True)], np.float32)
    unequal = found != expected
    assert unequal.mean() < 1e-3  # where float64's own rounding decides
    np.testing.assert_allclose(found[unequal], expected[unequal], rtol=2.0**-23, atol=2.0**-149)
    inf, tiny = np.float32(np.inf), np.float32(2.0**-149)
    for b, e, wanted in ((0, 2, 0), (0, 0, 1), (0, -1, inf), (inf, 1, inf), (inf, -1, 0), (1, 5, 1), (4, 0.5, 2),
                         (2, -149, tiny), (tiny, 1, tiny), (2, 127, 2.0**127), (2, 128, inf), (3, 0, 1), (5, 1, 5)):
        assert raised(np.float32(b), np.float32(e)) == np.float32(wanted), (b, e)
    for b in (-1, np.nan, -inf):
        assert np.isnan(raised(np.float32(b), np.float32(2)))
