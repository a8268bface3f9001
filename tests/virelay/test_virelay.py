"""ViRelAy opens what `fastdtd analyze` writes, for programs and in a browser: `make test-virelay`, in an environment of
its own, for ViRelAy is AGPL. Chromium is Debian's, or where FASTDTD_CHROMIUM says."""

import contextlib
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import h5py
import numpy as np
import pytest
from PIL import Image

import fastdtd
from fastdtd import graph as g
from fastdtd import runner, sources
from fastdtd.results import Storage

pytest.importorskip("corelay")  # "virelay" would be this folder
CHROMIUM = os.environ.get("FASTDTD_CHROMIUM", "/usr/bin/chromium")
SIDE, COUNT = 16, 30
CLASSES = ("ant", "bee", "cat")
COLORS = {"gray-red", "black-green", "black-fire-red", "black-yellow", "blue-white-red", "afm-hot", "jet", "seismic"}
# How runs may differ in what they store, and the colours in which ViRelAy draws a heatmap alone: that of one channel in
# one of them only. Over the image it draws all.
RUNS = {"float32": ({}, COLORS), "float16": ({"storage": Storage("float16")}, COLORS),
        "int8": ({"storage": Storage("int8", compression="gzip")}, COLORS),
        "summed": ({"storage": Storage("float16", channels=False)}, {"black-fire-red"}),
        "several": ({"top": 3}, COLORS), "labels": ({"true_label": True}, COLORS)}


@pytest.fixture(scope="module")
def explainer():
    rng = np.random.default_rng(0)
    layers = (g.Conv2d("conv", ("input", ), rng.standard_normal((6, 3, 3, 3)), np.zeros(6), padding=(1, 1, 1, 1)),
              g.ReLU("relu", ("conv", )), g.Flatten("flat", ("relu", )),
              g.Dense("scores", ("flat", ), rng.standard_normal((3, 6 * SIDE**2)) + 0.02))
    model = fastdtd.Model(g.Graph(layers, (3, SIDE, SIDE), (0.0, 1.0)), fastdtd.Preprocessing("rgb", scale=1 / 255),
                          CLASSES)
    return fastdtd.Explainer(model, threads=2)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A list of pictures; all but the first ten have a label."""
    place = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for i in range(COUNT):
        Image.fromarray(rng.integers(0, 256, (3, 3, 3), np.uint8)).resize((SIDE, SIDE)).save(place / f"{i:02}.png")
    for name, first in (("some.csv", 10), ("all.csv", 0)):
        lines = [f"{i:02}.png,{CLASSES[i % 3] if i >= first else ''}\n" for i in range(COUNT)]
        (place / name).write_text("path,label\n" + "".join(lines))
    return place


@pytest.fixture(scope="module", params=RUNS)
def project(request, explainer, pictures, tmp_path_factory):
    """The project file of a run of several shards, and the colours."""
    options, colors = RUNS[request.param]
    out = tmp_path_factory.mktemp("runs") / request.param
    source = pictures / ("all.csv" if "true_label" in options else "some.csv")
    runner.run(explainer, sources.find([source]), out, outputs=["relevance"], shard=7, **options)
    return fastdtd.analyze(out, "label" if "true_label" in options else "target").project, colors


@contextlib.contextmanager
def serving(project):
    """The address of ViRelAy with this project."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    virelay = Path(sys.executable).with_name("virelay")
    process = subprocess.Popen([virelay, project, "--port", str(port)], stderr=subprocess.PIPE, text=True)
    try:
        for _ in range(300):
            with contextlib.suppress(OSError), socket.create_connection(("localhost", port), 1):
                break
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.1)
        yield f"http://localhost:{port}"
    finally:
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=20)


def read(address):
    with urllib.request.urlopen(address, timeout=60) as answer:
        return answer.read()


def test_all_is_there_for_programs(project):
    project, colors = project
    out = project.parent
    run = fastdtd.open_results(out)
    with serving(project) as address, h5py.File(out / "analysis.h5") as analysis:
        [one] = json.loads(read(f"{address}/api/projects"))
        assert one["name"] == out.name
        base = f"{address}/api/projects/{one['id']}"
        [method] = json.loads(read(base))["analysisMethods"]
        assert [(c["name"], c["humanReadableName"]) for c in method["categories"]] == [
            (str(i), CLASSES[i]) for i in range(3)]
        assert method["embeddings"] == ["pca", "spectral"]
        assert method["clusterings"] == [f"kmeans-{k:02}" for k in range(2, 9)]
        for category in analysis:
            for embedding in method["embeddings"]:
                found = json.loads(read(f"{base}/analyses/{method['name']}?category={category}&clustering=kmeans-03"
                                        f"&embedding={embedding}"))
                group = analysis[category]
                assert [point["attributionIndex"] for point in found["embedding"]] == group["index"][...].tolist()
                assert [point["cluster"] for point in found["embedding"]] == group["cluster/kmeans-03"][...].tolist()
        for row in range(len(run)):
            label = int(run.columns["label"][row])
            name = CLASSES[label] if label >= 0 else "no true label"
            for kind in ("dataset", "attributions"):
                found = json.loads(read(f"{base}/{kind}/{row}"))
                assert [one["name"] for one in found["labels"]] == [name]
                assert (found["width"], found["height"]) == (SIDE, SIDE)
            seen = np.asarray(Image.open(io.BytesIO(read(f"{base}/dataset/{row}/image")))).astype(int)
            with h5py.File(out / "input.h5") as images:
                assert np.abs(seen - images["data"][row]).mean() < 10  # it is a JPEG
        for color in COLORS:
            assert read(f"{base}/attributions/{row}/heatmap?colorMap={color}&superimpose=true")[:2] == b"\xff\xd8"
        drawn = set()
        for color in COLORS:
            with contextlib.suppress(urllib.error.HTTPError):
                assert read(f"{base}/attributions/{row}/heatmap?colorMap={color}")[:2] == b"\xff\xd8"
                drawn.add(color)
        assert drawn == colors


@pytest.mark.skipif(not os.path.exists(CHROMIUM), reason=f"there is no {CHROMIUM}")
def test_a_browser_shows_it(explainer, pictures, tmp_path):
    playwright = pytest.importorskip("playwright.sync_api")
    runner.run(explainer, sources.find([pictures / "some.csv"]), tmp_path / "run", outputs=["relevance"], shard=7)
    made = fastdtd.analyze(tmp_path / "run")
    with h5py.File(tmp_path / "run" / "analysis.h5") as file:
        category = max(file, key=lambda name: len(file[name]["index"]))
        rows = file[category]["index"][:3].tolist()
        sizes = np.bincount(file[category]["cluster/kmeans-02"][...]).tolist()
    with serving(made.project) as address, playwright.sync_playwright() as p:
        browser = p.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"])
        page = browser.new_page(viewport={"width": 1800, "height": 1000})
        troubles = []
        page.on("pageerror", lambda error: troubles.append(str(error)))
        page.on("response", lambda response: response.status >= 400 and troubles.append(response.url))
        page.goto(f"{address}/projects/0?analysisMethod=spectral-analysis&analysisCategory={category}"
                  "&clustering=kmeans-02&embedding=spectral&imageMode=overlay&colorMap=black-fire-red"
                  f"&firstEmbeddingDimension=0&secondEmbeddingDimension=1&embeddingVectors={','.join(map(str, rows))}")
        page.get_by_text("Eigenvalues").wait_for()
        for number, size in enumerate(sizes, 1):
            page.get_by_text(f"Cluster {number} ({size})").wait_for()
        for row in rows:
            page.wait_for_function("row => [...document.images].some(image => image.naturalWidth > 0"
                                   " && image.src.includes(`/${row}/`))", arg=row)
        with Image.open(io.BytesIO(page.locator("canvas").first.screenshot())) as canvas:
            points = np.asarray(canvas.convert("RGB")).astype(int)
        assert (np.ptp(points, axis=2) > 60).sum() > 50  # coloured points on white
        page.screenshot(path=tmp_path / "virelay.png")
        browser.close()
        assert not troubles
