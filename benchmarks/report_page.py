"""The page of a large run: what it takes to make, to open, to filter and to scroll.

    .venv/bin/python benchmarks/report_page.py [PICTURE...] [--images 10000] [--work FOLDER]

The run has the relevance of the pictures (the bundled ones) by SqueezeNet, again and again, shifted, under other
classes and names. The page is opened by Playwright in the Chromium or Chrome of the system.
"""

import argparse
import csv
import dataclasses
import json
import resource
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

import fastdtd
from fastdtd import report, results, runner, sources
from fastdtd.explainer import usable_processors

SHARD = 64
STORAGE = results.Storage("int8", channels=False)
FRAMES = """async () => {
  const frames = [];
  for (let last = performance.now(); frames.length < 100;) {
    scrollBy(0, 120);
    await new Promise(requestAnimationFrame);
    const now = performance.now();
    frames.push(now - last);
    last = now;
  }
  return frames;
}"""
PAINTED = "await new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))"


def make_run(out, few, pictures, count):
    """A run of `count` explanations, from those of a few pictures."""
    classes = few.manifest["model"]["outputs"]
    manifest = few.manifest | {"storage": dataclasses.asdict(STORAGE), "images": {"count": count}, "shard": SHARD,
                               "shards": -(-count // SHARD)}
    (out / results.SHARDS).mkdir(parents=True)
    results.write_manifest(out, manifest)
    with open(out / results.SET, "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(results.SET_COLUMNS)
        table.writerows((i, f"{i:06}.jpg", "", pictures[i % len(few)], -1, -1, "") for i in range(count))
    rng = np.random.default_rng(0)
    relevance = [few[row] for row in range(len(few))]
    for number in range(manifest["shards"]):
        images = np.arange(number * SHARD, min((number + 1) * SHARD, count))
        path = results.shard_path(out, number)
        path.touch()
        writer = results.ShardWriter(path, STORAGE, manifest["model"]["input"], len(images), 4 * classes + 4096)
        stored, scale = STORAGE.stored(np.stack([np.roll(relevance[i % len(few)], rng.integers(100), 2)
                                                 for i in images]))
        prediction = rng.random((len(images), classes), np.float32)
        sums = rng.random(len(images))
        writer.add({
            "image": images, "file": np.array([f"{i:06}.jpg" for i in images], object), "rank": np.zeros_like(images),
            "target": rng.integers(0, classes, len(images)), "prediction": prediction, "scale": scale,
            "label": np.where(sums < 0.7, prediction.argmax(1), 0), "score": sums, "explained": sums, "sum": sums,
            "absorbed": 0 * sums, "ledger": np.zeros((len(images), 1)), "attribution": stored})
        writer.finish([], ["none"])


def measure(page_file):
    from playwright.sync_api import sync_playwright

    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))))
    arguments = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    with sync_playwright() as started, started.chromium.launch(executable_path=path, args=arguments) as browser:
        page = browser.new_page(viewport={"width": 1320, "height": 860})
        begun = time.perf_counter()
        page.goto(page_file.resolve().as_uri())
        page.evaluate(f"(async () => {{ {PAINTED} }})()")
        print(f"opened in {time.perf_counter() - begun:.2f} s")
        for name, change in (("search", "at('search').value = '77'"), ("all again", "at('search').value = ''"),
                             ("one class", "at('class').value = data.means[0][0]"),
                             ("all classes", "at('class').value = ''"), ("sort", "at('sort').value = 'score'")):
            spent = page.evaluate(f"""async () => {{
                const begun = performance.now(); {change}; filter(); {PAINTED}; return performance.now() - begun }}""")
            print(f"{name} {spent:.0f} ms")
        for order in ("set", "class", "score"):
            page.evaluate(f"at('sort').value = '{order}'; filter()")
            frames = sorted(page.evaluate(FRAMES))
            print(f"scrolling in order of {order}: frames of {statistics.median(frames):.0f} ms, 19 of 20 within "
                  f"{frames[95 * len(frames) // 100]:.0f} ms")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pictures", nargs="*", default=sorted(Path(fastdtd.__file__).parent.glob("models/*.png")))
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--work", type=Path, default=None, help="folder for what is made (default: a temporary one)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.work) as work:
        few, out = Path(work, "few"), Path(work, "out")
        entries = sources.find(options.pictures)
        runner.run(fastdtd.Explainer(fastdtd.load("squeezenet1_1")), entries, few, outputs=["relevance"])
        opened = results.open_results(few)
        make_run(out, opened, [Path(entries[i].path).resolve() for i in opened.columns["image"]], options.images)
        before, begun = sum(resource.getrusage(resource.RUSAGE_SELF)[:2]), time.perf_counter()
        page = report.write(out, options.images, usable_processors())
        spent = sum(resource.getrusage(resource.RUSAGE_SELF)[:2]) - before
        files = list((out / report.FOLDER).rglob("*.*"))
        print(json.dumps({
            "seconds": round(time.perf_counter() - begun, 1), "ms of a thread each": round(
                1000 * spent / options.images, 1),
            "most memory, MiB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10,
            "page, MB": round(page.stat().st_size / 1e6, 2), "files": len(files),
            "thumbnails, MB": round(sum(file.stat().st_size for file in files) / 1e6)}))
        measure(page)


if __name__ == "__main__":
    main()
