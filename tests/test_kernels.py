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
    FEW_VECTORS,
    MULTIPLY_TILE,
    PANEL_DEPTH,
    PANEL_PITCH,
    PANEL_VECTORS,
    TILE_COLUMNS,
    TILE_ROWS,
    TILE_VECTORS,
    add_nonzero,
    add_nonzero_few,
    add_split,
    add_split_few,
)
from fastdtd.kernels.cpu.scalar import raised
from fastdtd.kernels.cpu.vector_code import LANES
from layers import BOX, KEPT, NON_NEGATIVE, REAL, every_example, weights
from numba import njit
from single_layers import TESTED, batch_of, check, check_bits_alone, check_signed, network, rules_of_both_signs

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


# How a convolution is computed, whatever would be faster: (whether Winograd's algorithm is taken where it can be, the
# density below which an image's zeros are skipped in the backward pass).
WAYS = {"direct": (False, 0.0), "Winograd": (True, 0.0), "sparse": (False, 2.0), "some sparse": (True, 0.5)}


def force(monkeypatch, way):
    pays, below = WAYS[way]
    monkeypatch.setattr(cpu, "winograd2d_pays", lambda *_: pays)
    monkeypatch.setattr(cpu, "sparse2d_below", lambda features, taps, box, used: 0.0 if box and features > LANES
                        else below)


@pytest.mark.parametrize(("rule", "domain"), [("zB", BOX), ("z+", NON_NEGATIVE), ("w2", NON_NEGATIVE), ("flat", REAL)])
@pytest.mark.parametrize("example", KEPT["conv2d"].examples)
@pytest.mark.parametrize("way", WAYS)
def test_all_ways_of_a_convolution_are_like_the_oracle(monkeypatch, way, example, rule, domain):
    force(monkeypatch, way)
    check(KEPT["conv2d"].examples[example], rule, domain, threads=2 if way == "sparse" else 1)


@pytest.mark.parametrize(("rule", "domain"), [("zB", BOX), ("z+", NON_NEGATIVE), ("z+", REAL), ("w2", NON_NEGATIVE)])
@pytest.mark.parametrize("example", KEPT["conv2d"].examples)
def test_joined_images_have_the_bits_that_they_have_alone(monkeypatch, example, rule, domain):
    force(monkeypatch, "direct")
    layers = KEPT["conv2d"].examples[example]
    explainer = Explainer(Model(network(layers, domain), Preprocessing(None)), {TESTED: rule}, threads=1)
    check_bits_alone(explainer, batch_of(layers, 5))


@pytest.mark.parametrize("rule", ["z+", "gamma(gamma=0.5, epsilon=0.5)", "epsilon(epsilon=0.5)"])
@pytest.mark.parametrize("example", ["Winograd's tiles, cut at the edge", "pointwise"])
@pytest.mark.parametrize("way", WAYS)
def test_all_ways_of_a_convolution_take_rules_of_both_signs(monkeypatch, way, example, rule):
    force(monkeypatch, way)
    check_signed(KEPT["conv2d"].examples[example], rule, REAL)


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize(("pays", "shape"), [(False, (11, 13)), (True, (11, 13)), (False, (5, 7))])
def test_images_of_one_batch_go_each_its_own_way(monkeypatch, kernel, pays, shape):
    """Sparse ones and others, in any order; with the bits that they have alone. Positions of small planes are
    joined."""
    monkeypatch.setattr(cpu, "winograd2d_pays", lambda *_: pays)
    monkeypatch.setattr(cpu, "sparse2d_below", lambda *_: 0.3)
    random = np.random.default_rng(2)
    layers = (g.Conv2d("first", (g.INPUT,), random.standard_normal((9, 2, 1, 1))), g.ReLU("r", ("first",)),
              g.Conv2d("tested", ("r",), random.standard_normal((20, 9, kernel, kernel)), padding=(kernel // 2,) * 4),
              g.ReLU("s", ("tested",)), g.Flatten("flat", ("s",)),
              g.Dense("scores", ("flat",), np.abs(random.standard_normal((2, 20 * shape[0] * shape[1])))))
    model = Model(g.Graph(layers, (2, *shape), (-1.0, 1.0)), Preprocessing(None))
    batch = random.uniform(-1, 1, (5, 2, *shape)).astype(np.float32)
    batch[[1, 4], :, shape[0] // 5:] = 0
    plan = Plan(lower(model.graph, assign(model.graph), cpu).schedule(5), cpu)
    plan.input[:] = batch
    plan.forward()
    plan.start[:] = 1
    steps = [i for i, step in enumerate(plan.schedule.steps) if step.name == "density_redistribute"]
    plan.run(np.arange(plan.schedule.forward_steps, steps[0] + 1))
    density = plan.arguments(steps[0])[0]
    assert ((density < 0.3) == [False, True, False, False, True]).all()
    explainer = Explainer(model, threads=1)
    together = explainer(batch, 0).relevance
    for i in range(5):
        np.testing.assert_array_equal(explainer(batch[i:i + 1], 0).relevance[0], together[i])
    np.testing.assert_array_equal(Explainer(model, threads=3)(batch[::-1], 0).relevance[::-1], together)


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


def _tile_product(product):
    """An intrinsic as a function of arrays."""
    @njit
    def multiply(tile, a, offsets, b, depth):
        product(tile.ctypes.data, tile.shape[-1], a.ctypes.data, offsets.ctypes.data, b.ctypes.data, depth)

    return multiply


@pytest.mark.parametrize("depth", [1, 2, 3, 4, 5, 7, 8, 100])
@pytest.mark.parametrize("vectors", range(1, TILE_VECTORS + 1))
def test_multiply_tile(depth, vectors):
    rng = np.random.default_rng(depth)
    a, b = rng.standard_normal((depth, TILE_ROWS), np.float32), rng.standard_normal(2000, np.float32)
    offsets = rng.integers(0, len(b) - TILE_COLUMNS, depth).astype(np.int32)
    tile = np.full((TILE_ROWS, TILE_COLUMNS), np.nan, np.float32)
    _tile_product(MULTIPLY_TILE[vectors - 1])(tile, a, offsets, b, depth)
    columns = vectors * LANES
    rows = np.stack([b[offset:offset + columns] for offset in offsets]).astype(float)
    np.testing.assert_allclose(tile[:, :columns], a.T.astype(float) @ rows, atol=1e-5 * depth)
    assert np.isnan(tile[:, columns:]).all()


def _panel_adder(product):
    """And one of panels."""
    @njit
    def add(vectors, out, start, weights, offsets, bounds, columns):
        product(vectors, out.ctypes.data, out.shape[-1], start.ctypes.data, start.shape[-1], weights.ctypes.data,
                offsets.ctypes.data, bounds.ctypes.data, columns.ctypes.data, out.ctypes.data, 0)

    return add


def _aligned(count):
    room = np.full(count + 16, np.nan, np.float32)
    return room[-room.ctypes.data % 64 // 4:][:count]


PANELS = {  # (product, most vectors, whether P and N, whether few rows)
    "split": (add_split, PANEL_VECTORS, True, False), "nonzero": (add_nonzero, PANEL_VECTORS, False, False),
    "split, few": (add_split_few, FEW_VECTORS, True, True), "nonzero, few": (add_nonzero_few, FEW_VECTORS, False, True)}


@pytest.mark.parametrize("depth", [1, 3, PANEL_DEPTH, 2 * PANEL_DEPTH + 5])
@pytest.mark.parametrize("name", PANELS)
def test_panels(depth, name):
    """All widths, with entries that count in no row, in all, by sign, where not zero; sums begin with what is there."""
    product, most, is_split, is_few = PANELS[name]
    rng, add, rows = np.random.default_rng(depth), _panel_adder(product), 3 if is_few else 5
    w = rng.standard_normal((1, rows, depth), np.float32)
    w[rng.random(w.shape) < 0.3] = 0
    sides = rng.choice([1, -1, 2, 0, 3], depth) if is_split else np.full(depth, 3)
    counting = (sides == 2) | (sides * w[0] > 0) & (sides != 3) | (sides == 3) & (w[0] != 0)
    shape = cpu.conv2d_packed_shape(1, rows, depth, is_few)
    packed, offsets = np.full(shape, np.nan, np.float32), np.full(shape[:-1], -1, np.int32)
    bounds = np.full(cpu.conv2d_bounds_shape(shape), -1, np.int32)
    b = rng.standard_normal(2000, np.float32)
    taps = rng.integers(0, len(b) - PANEL_PITCH, depth).astype(np.int32)
    cpu.conv2d_pack(packed, offsets, bounds, w, taps, sides)
    _, chunks, panels, length, panel_rows = shape
    assert not is_few or chunks == panels == 1
    for vectors in range(1, most + 1):
        columns = vectors * LANES
        seen = np.stack([b[tap:tap + columns] for tap in taps])
        for panel in range(panels):
            sums = np.full(((2 if is_split else 1) * panel_rows, columns + LANES), 0.5, np.float32)
            for chunk in range(chunks):
                own = seen[chunk * length:(chunk + 1) * length]
                read = b
                if not is_few:
                    read = _aligned(PANEL_DEPTH * PANEL_PITCH)
                    read[:len(own) * PANEL_PITCH].reshape(-1, PANEL_PITCH)[:, :columns] = own
                out = np.full_like(sums, np.nan)
                add(vectors, out, sums, packed[0, chunk, panel], offsets[0, chunk, panel], bounds[0, chunk, panel],
                    read)
                assert np.isnan(out[:, columns:]).all()
                sums = out
            here = slice(panel * panel_rows, (panel + 1) * panel_rows)
            parts = [np.where(counting, w[0], 0), np.where(counting, 0, w[0])][:2 if is_split else 1]
            for part, weight in enumerate(parts):
                expected = 0.5 + weight[here].astype(float) @ seen
                got = sums[part * panel_rows:][:panel_rows, :columns]
                np.testing.assert_allclose(got[:len(expected)], expected, atol=1e-5 * depth)
                assert (got[len(expected):] == 0.5).all()


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


# ---- A call looked over ----------------------------------------------------------------------------------------------

INF, NAN, NEXT = np.float32(np.inf), np.float32(np.nan), np.nextafter(np.float32(1), np.float32(2))


@pytest.mark.parametrize("shape", [(3, 2, 5, 7), (1, 2, 1, 1), (1, 2, 6, 16)])
@pytest.mark.parametrize(("value", "within"), [(1, True), (-1, True), (NEXT, False), (-NEXT, False), (INF, False),
                                               (-INF, False), (NAN, False)])
def test_values_within_a_box(shape, value, within):
    """Wherever the one is that may not be; each channel has bounds of its own."""
    low, high = np.float32([-1, 4]), np.float32([1, 8])
    for place in np.ndindex(shape):
        images = np.broadcast_to(np.float32([0.5, 5])[:, None, None], shape).copy()
        images[place] = value if place[1] == 0 else 6 + 2 * value
        assert cpu.surely_within(low, high, images) == (within or (place[1] == 1 and images[place] == 8)), place
    assert cpu.surely_within(low, high, np.zeros((0, *shape[1:]), np.float32))


def looked_over(place=None, value=0.0, explained=6.0):
    """Of two images with relevance 4, 2 of which is absorbed, and one number put into one of the arrays."""
    arrays = {"relevance": np.full((2, 2, 2, 4), 0.25, np.float32), "scores": np.ones((2, 3), np.float32),
              "ledger": np.ones((2, 2)), "explained": np.float32([6, explained])}
    if place:
        arrays[place].reshape(2, -1)[1, -1] = value
    sums = np.full(2, 7.0)
    return cpu.sum_relevance(sums, *arrays.values(), 1e-3), sums


@pytest.mark.parametrize(("changed", "is_well"), [
    ((), True), (("relevance", NAN), False), (("relevance", INF), False), (("scores", NAN), False),
    (("scores", -INF), False), (("scores", -3.4e38), True), (("ledger", np.nan), False), (("ledger", 1.005), True),
    (("ledger", 1.007), False), (("ledger", 0.993), False), (("relevance", 0.26), False), ((None, 0, 6.005), True),
    ((None, 0, -6.0), False), ((None, 0, 0.0), False), ((None, 0, NAN), False),
])
def test_relevance_that_sums_to_what_is_explained(changed, is_well):
    found, sums = looked_over(*changed)
    assert found == is_well
    in_last = changed[1] if changed and changed[0] == "relevance" else 0.25
    np.testing.assert_allclose(sums, [4, 3.75 + in_last])
