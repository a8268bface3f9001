"""What benchmarks/compare.py writes of its results, and what it says is reached."""

import json

import compare
import pytest

PAGE = "before\n<!-- table by benchmarks/compare.py -->\nan old table\n<!-- end of table -->\nafter\n"


def result(instructions="AVX2", date="2026-01-01", ours=2.0, onnx=1.0):
    times = {"ONNX Runtime": onnx, "PyTorch": 4.0, "PyTorch, channels_last": 3.0, "fastdtd": ours, "zennit": 40.0}
    rows = [{"net": name, "trained": "trained" in name, "batch": batch, "milliseconds": times,
             "fastest": min(compare.FORWARD, key=times.get), "zennit to fastdtd": 40 / ours,
             "fastdtd to": {who: ours / times[who] for who in compare.FORWARD}, "scores": 1e-6,
             "relevance with average pools": 2e-6, "least relevance": 0.0}
            for name in ("VGG-16", "AlexNet with LRN", compare.SQUEEZENET) for batch in (8, 1)]
    machine = {"processor": f"some {instructions}", "instructions": instructions, "told": False, "threads": 2,
               "torch": "2", "onnxruntime": "1", "zennit": "0", "date": date}
    return {"machine": machine, "speed": rows}


@pytest.fixture
def pages(tmp_path, monkeypatch):
    """(a function that saves results, one that has README.md and docs/speed.md written and gives what they say)"""
    monkeypatch.setattr(compare, "ROOT", tmp_path)
    monkeypatch.setattr(compare, "RESULTS", tmp_path)
    paths = tmp_path / "README.md", tmp_path / "docs" / "speed.md"
    paths[1].parent.mkdir()
    for path in paths:
        path.write_text(PAGE)

    def written(**results):
        for name, content in results.items():
            (tmp_path / f"compare-{name}.json").write_text(json.dumps(content))
        compare.write_tables()
        return [path.read_text() for path in paths]

    return written


def test_results_without_onnx_runtime_leave_the_tables_standing(pages):
    old = {"machine": {"processor": "some"}, "speed": [{"net": "LeNet", "milliseconds": {"PyTorch": 1}}]}
    assert pages(old=old, partial={"machine": {}, "bits": {}}) == [PAGE, PAGE]


def test_a_table_for_each_processor(pages):
    readme, docs = pages(a=result("AVX2", "2026-01-01", ours=7.11), b=result("AVX2", "2026-01-02", ours=7.22),
                         c=result("AVX-512", ours=7.33), d=result("vectors of 4 floats", ours=7.44))
    for page in (readme, docs):
        assert page.startswith("before\n")
        assert page.endswith("<!-- end of table -->\nafter\n")
        assert "an old table" not in page
        assert page.index("7.33") < page.index("7.22")
    assert "7.11" not in readme
    assert "7.44" not in readme
    assert "7.11" in docs
    assert "7.44" in docs
    assert "| VGG-16 | 8 | **1** | 4 | 3 | 7.33 | 7.33 | 1.83 | 5.5 |" in readme
    assert "| VGG-16 | 1 |" not in readme
    assert "| VGG-16 | 1 |" in docs
    assert "LRN |" not in readme
    assert "| AlexNet with LRN | 8 |" in docs


def test_over_the_fastest_forward_pass_whoever_has_it(pages):
    readme, _ = pages(a=result(ours=6.0, onnx=5.0))
    assert "| VGG-16 | 8 | 5 | 4 | **3** | 6 | 2.00 | 1.50 | 6.7 |" in readme


def test_what_was_aimed_at(pages):
    readme, docs = pages(a=result(ours=1.1), b=result("AVX-512", ours=1.9))
    assert "| over ONNX Runtime's forward pass, the most, batch 8 | 1.1 | at most 2 | reached |" in docs
    assert "| over ONNX Runtime's forward pass, geometric mean of 1, batch 1 | 1.9 | at most 1.5 | missed |" in docs
    assert "aimed at" not in readme


def test_what_else_was_measured(pages):
    _, docs = pages(a=result() | {
        "memory": {"fastdtd": {"peak MiB": 1234.5}, "zennit": {"peak MiB": 2469.0}, "ratio": 0.5},
        "threads": {"LeNet": 1.875, "VGG-16": 2.0}, "bits": {"LeNet": True, "VGG-16": False},
        "start": {"first heatmap, warm cache": 0.96, "first heatmap, empty cache": 27.8},
        "thousand": {"ms": 6.0, "ratio": 1.5}, "captum": [{"net": "LeNet", "to fastdtd": 4.0}]})
    told = " ".join(docs.split())
    for sentence in ("Captum takes 4.0 to 4 times as long (LeNet).", "take 6.0 ms an image",
                     "Eight images of VGG-16 take at most 1234 MiB, 0.50 of zennit's.",
                     "Two threads explain batches of 8 faster than one: LeNet 1.88 times, VGG-16 2.00 times.",
                     "an image has the same bits in 1 of 2 networks.",
                     "The first heatmap takes 1.0 s from the start of the process, 28 s where"):
        assert sentence in told


@pytest.mark.parametrize(("change", "missed"), [
    ({}, []),
    ({"ours": 1.9}, ["over ONNX Runtime's forward pass, geometric mean of 1, batch 8",
                     "over ONNX Runtime's forward pass, SqueezeNet 1.1, trained, batch 8"]),
    ({"least relevance": -1e-9}, ["least relevance"]),
    ({"scores": 2e-5}, ["error against float64, the most"]),
    ({"relevance with average pools": float("nan")}, ["error against float64, the most"]),
    ({"ratio": 0.5}, ["peak memory over zennit's, VGG-16, batch 8"]),
    ({"bits": False}, ["networks whose bits depend on batch, place or threads"]),
])
def test_what_is_missed(change, missed):
    found = result(ours=change.get("ours", 1.1))
    found["speed"] = [row | {key: change[key] for key in change if key in row} for row in found["speed"]
                      if row["batch"] == 8]
    found["memory"] = {"ratio": change.get("ratio", 0.3)}
    found["bits"] = {"LeNet": True, "VGG-16": change.get("bits", True)}
    assert [what for what, _, _, holds in compare.goals(found) if not holds] == missed
