"""benchmarks/gpu.py as far as it goes without a GPU: how it starts, that it tells right from wrong, what it writes."""

import json
import os
import subprocess
import sys
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
from single_layers import weights

from fastdtd import graph as g

pytest.importorskip("numba_cuda")
import gpu

pytestmark = pytest.mark.slow
STARTS = {
    "as it is installed": "",
    "from a checkout": "sys.meta_path[:] = [finder for finder in sys.meta_path if 'Editable' not in str(finder)]",
}


def tiny(seed=0):
    """Two convolutions with a max-pool between them, and a box for pixels."""
    return g.Graph((g.Conv2d("conv", (g.INPUT,), weights(seed, 6, 2, 3, 3), np.ones(6)), g.ReLU("r", ("conv",)),
                    g.MaxPool2d("pool", ("r",), (2, 2), (2, 2)), g.Flatten("flat", ("pool",)),
                    g.Dense("scores", ("flat",), np.abs(weights(1, 3, 24)))), (2, 6, 6), (-2.0, 2.0))


@pytest.mark.parametrize("how", STARTS)
def test_without_a_gpu_it_says_so(how, tmp_path):
    code = (f"import runpy, sys\n{STARTS[how]}\nsys.argv = ['gpu.py']\n"
            f"runpy.run_path({gpu.__file__!r}, run_name='__main__')")
    environment = {
        name: value for name, value in os.environ.items() if name not in ("NUMBA_ENABLE_CUDASIM", "PYTHONPATH")
    }
    run = subprocess.run([sys.executable, "-c", code], env=environment | {"CUDA_VISIBLE_DEVICES": ""}, cwd=tmp_path,
                         text=True, capture_output=True, check=False)
    assert run.returncode == 2, run.stderr
    assert run.stderr.startswith("gpu.py: ")
    assert "Traceback" not in run.stderr


@pytest.mark.usefixtures("simulator")
def test_right_is_told_from_wrong(monkeypatch, tmp_path):
    monkeypatch.setitem(gpu.NETWORKS, "tiny", tiny)
    monkeypatch.setattr(gpu, "ROOT", tmp_path)

    def written():
        return json.loads((tmp_path / "benchmarks" / "results" / "gpu-simulator.json").read_text())

    with warnings.catch_warnings():  # it silences some
        assert gpu.main(["--nets", "tiny"]) == 0
        rows = written()["correct"]
        assert [(row["precision"], row["remark"]) for row in rows] == [("fp32", ""), ("3xtf32", ""), ("tf32", ""),
                                                                        ("fp32", "max-pools as they are")]
        assert 1e-6 < rows[2]["relevance"] < gpu.LIMITS["tf32"]
        right = gpu.explainer_of
        monkeypatch.setattr(
            gpu, "explainer_of",
            lambda graph, *precision, **device: right(graph if device else tiny(5), *precision, **device))
        with pytest.raises(SystemExit) as end:
            gpu.main(["--nets", "tiny"])
    assert end.value.code == 1
    assert written()["correct"][0]["relevance"] > 0.1


@pytest.mark.usefixtures("simulator")
def test_what_there_is_no_time_for_is_left_out(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    with warnings.catch_warnings():
        assert gpu.main(["--minutes", "0"]) == 0
    assert json.loads((tmp_path / "benchmarks" / "results" / "gpu-simulator.json").read_text())["correct"] == []
    assert "VGG-16: no time is left for it" in capsys.readouterr().out


@pytest.mark.parametrize("spoil", [
    lambda e: -e.relevance, lambda e: e.relevance * np.float32(1.01), lambda e: e.relevance * np.nan
])
@pytest.mark.usefixtures("simulator")
def test_what_is_wrong_with_relevance(spoil, monkeypatch):
    right = gpu.explainer_of

    def spoiled(graph, precision=None, device=gpu.DEVICE):
        def explain(*arguments):
            e = right(graph, precision, device)(*arguments)
            return e if device == "cpu" else SimpleNamespace(**vars(e)
                                                             | {"relevance": spoil(e), "absorbed": e.absorbed})

        return explain

    monkeypatch.setattr(gpu, "explainer_of", spoiled)
    _, wrong = gpu.check("tiny", tiny(), wanted=("fp32",))
    assert [text.split(":")[0] for text in wrong if "conserve" in text or "miss" in text] == [
        "tiny, fp32", "tiny, fp32, max-pools as they are"]


@pytest.mark.usefixtures("simulator")
def test_steps_of_a_plan():
    """Step by step it computes what it computes at once, and each step has a floor."""
    graph = tiny()
    steps = gpu.DeviceSteps(graph, 2, "fp32")
    with steps.kernels.on_device(0):
        steps.advance_to(len(steps))
    scores = gpu.explainer_of(graph, device="cpu")(gpu.pictures(graph, 2)).output.max(1)
    np.testing.assert_allclose(steps.plan.relevance.sum((1, 2, 3)) + steps.plan.ledger.sum(1), scores, rtol=1e-5)
    rows = [{
        "kernel": steps.kernel(step), "seconds": steps.floor(step, 1e12, 1e12), "operations": steps.operations(step),
        "least bytes": steps.least_bytes(step)
    } for step in range(len(steps))]
    found = gpu.by_kernel(rows, 1e12, 1e12)
    assert found["conv2d_forward"]["share of mma.sync"] == pytest.approx(1)
    assert found["dense_forward"]["share of copy"] == pytest.approx(1)
    assert sum(own["of all"] for own in found.values()) == pytest.approx(1)


def test_what_it_writes(tmp_path):
    assert gpu.path_of("NVIDIA H100 80GB HBM3").name == "gpu-h100-80gb-hbm3.json"
    path = tmp_path / "results" / "gpu.json"
    times = {
        "fastdtd, tf32": [1.0, 2.0, 3.0, 4.0], "PyTorch, TF32": [0.5] * 4, "zennit": [5.0, 16.0],
        "PyTorch, float32": None
    }
    row = {"net": "tiny", "batch": 32, "images a second": {who: values and 32.0 for who, values in times.items()},
           "to PyTorch's forward": gpu.ratio(times, "fastdtd, tf32", "PyTorch, TF32"),
           "zennit to ours": gpu.ratio(times, "zennit", "fastdtd, tf32")}
    assert (row["to PyTorch's forward"], row["zennit to ours"]) == (5.0, 4.5)
    assert gpu.ratio(times, "fastdtd, tf32", "PyTorch, float32") is None
    gpu.save(path, {"speed": [row]})
    gpu.save(
        path, {
            "memory": [{
                "net": "tiny", "batch": 32, "fastdtd, used": 3 << 20, "fastdtd, weights": 1 << 20,
                "fastdtd, pool": 4 << 20, "zennit, most allocated": None
            }]
        })
    lines = gpu.table(json.loads(path.read_text())).splitlines()
    assert "| tiny | 32 | 32 | 32 | 32 |  | 5.00 | 4.50 |" in lines
    assert "| tiny | 32 | 3 | 1 | 4 |  |" in lines


def test_measurements_take_turns(monkeypatch):
    called = []
    monkeypatch.setattr(gpu, "synchronize", lambda: None)

    class OutOfMemoryError(Exception):
        pass

    def too_large():
        raise OutOfMemoryError

    times = gpu.measure(
        {"fastdtd": lambda: called.append("fastdtd"), "zennit": lambda: called.append("zennit"), "other": too_large}, 0)
    assert [len(times["fastdtd"]), len(times["zennit"]), times["other"]] == [4, 2, None]
    assert called[-6:] == ["fastdtd", "zennit", "fastdtd", "fastdtd", "fastdtd", "zennit"]


def test_the_loop_of_tensor_cores_compiles():
    """In a process without the simulator."""
    pytest.importorskip("cuda.bindings")
    code = (
        "import gpu; from numba import cuda; from numba.cuda.types import float32, int64; "
        "ptx, _ = cuda.compile_ptx(gpu.tensor_core_kernel(), (float32[::1], float32, float32, int64), cc=(8, 0)); "
        "print(ptx.count('mma.sync'))"
    )
    environment = os.environ | {"NUMBA_ENABLE_CUDASIM": "0", "PYTHONPATH": os.path.dirname(gpu.__file__)}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    count = int(run.stdout)
    assert count >= 4
    assert count % 4 == 0
