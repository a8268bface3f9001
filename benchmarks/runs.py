"""Runs over many images, end to end: time, memory, kills, resume, processes; and the loop that people write today.

    .venv/bin/python benchmarks/runs.py [FOLDER...] [--images 20000] [--kills 20] [--work FOLDER] [--write]
    .venv-peers/bin/python benchmarks/runs.py --loop SET OUT       # PyTorch's DataLoader, zennit and h5py

The set is made of the pictures in FOLDER (the bundled ones): crops and rotations of 500 x 375 pixels, as JPEG. --write
writes benchmarks/results/runs-NAME.json and the table in docs/speed.md. With 20,000 images it takes about an hour and
40 GB; the loop is measured where .venv-peers is.
"""

import argparse
import contextlib
import hashlib
import itertools
import json
import os
import platform
import random
import re
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image
from tables import processor, write_table

ROOT = Path(__file__).resolve().parents[1]
MODEL = "squeezenet1_1"
SIZE = 500, 375
LARGE = 2000, 1500  # pixels of a camera's JPEGs, where decoding is what takes the time
COMMAND = [sys.executable, "-m", "fastdtd"]
PEERS = ROOT / ".venv-peers" / "bin" / "python"
LOOPED, LOOP_TURNS = 2000, 3  # images of the loop, which is slow


def pictures_in(folders):
    return [path for folder in folders for path in sorted(folder.iterdir()) if path.suffix in (".jpg", ".png")]


def make_set(folder, pictures, count, size=SIZE):
    """JPEGs of one size: `count` of them, always the same."""
    folder.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor() as pool:
        parts = [range(i, count, os.cpu_count()) for i in range(os.cpu_count())]
        list(pool.map(make_pictures, *zip(*[(folder, pictures, part, size) for part in parts], strict=True)))
    return folder


def make_pictures(folder, pictures, numbers, size):
    sources = [Image.open(path).convert("RGB") for path in pictures]
    for i in numbers:
        rng = random.Random(i)
        picture = sources[i % len(sources)]
        turned = picture.rotate(rng.uniform(-10, 10), Image.Resampling.BILINEAR)
        width = min(picture.width, picture.height * size[0] / size[1]) * rng.uniform(0.6, 1)
        height = width * size[1] / size[0]
        left, top = rng.uniform(0, picture.width - width), rng.uniform(0, picture.height - height)
        part = turned.resize(size, Image.Resampling.BICUBIC, (left, top, left + width, top + height))
        part.save(folder / f"{i:06}.jpg", quality=90)


def explain(images, out, *options, **how):
    return subprocess.Popen([*COMMAND, "explain", MODEL, str(images), "-o", str(out), "--draw", "0", *options],
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **how)


def timed(images, out, *options):
    """Seconds, the share of the processors' time, and the most memory in MiB of a run."""
    begun, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    process, peak = explain(images, out, *options), 0
    while process.poll() is None:
        with contextlib.suppress(OSError, TypeError):
            peak = max(peak, int(re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{process.pid}/status").read_text())[1]))
        time.sleep(0.05)
    output, errors = process.communicate()
    elapsed, after = time.perf_counter() - begun, resource.getrusage(resource.RUSAGE_CHILDREN)
    if process.returncode:
        raise SystemExit(errors)
    busy = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"seconds": elapsed, "busy": busy / elapsed / os.cpu_count(), "MiB": peak / 1024, "said": output}


def alone(images, count=256):
    """Milliseconds an image of explanations alone, of as many images that are in memory already."""
    import fastdtd

    model = fastdtd.load(MODEL)
    batch = np.stack([model.preprocess(path) for path in sorted(images.iterdir())[:count]])
    explainer = fastdtd.Explainer(model)
    times = []
    for _ in range(7):
        begun = time.perf_counter()
        explainer(batch)
        times.append(time.perf_counter() - begun)
    return 1000 * statistics.median(times) / len(batch)


def contents(folder):
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(folder.rglob("*")) if path.is_file()}


def killed(images, out, kills, seconds, seed=0):
    """A run that is killed at random moments, started again each time until it is through."""
    rng, times = random.Random(seed), []
    for _ in range(kills):
        process = explain(images, out)
        try:
            process.wait(rng.uniform(0, 2 * seconds / kills))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            times.append(process.wait())
        process.communicate()
    process = explain(images, out)
    _, errors = process.communicate()
    if process.returncode:
        raise SystemExit(errors)
    return len(times)


def measure(options, work):
    pictures = pictures_in(options.folders)
    images = make_set(work / "images", pictures, options.images)
    few = make_set(work / "few", pictures, min(1000, options.images // 5))
    found = {"machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} processors",
             "cpu": processor(), "images": options.images, "of": len(pictures)}
    explain(few, work / "warm").wait()  # kernels are compiled, files are in memory
    before = alone(images)
    shutil.rmtree(work / "warm")
    small = timed(few, work / "few out")
    whole = timed(images, work / "whole")
    found["alone ms"] = (before + alone(images)) / 2  # of other machines' work meanwhile, both meet some
    found |= {"ms": 1000 * whole["seconds"] / options.images, "busy": whole["busy"],
              "MiB of few": small["MiB"], "MiB": whole["MiB"], "few": len(list(few.iterdir()))}
    found["resume s"] = timed(images, work / "whole")["seconds"]
    found["kills"] = killed(images, work / "killed", options.kills, whole["seconds"])
    found["same bytes"] = contents(work / "whole") == contents(work / "killed")
    shutil.rmtree(work / "killed")
    verified = subprocess.run([*COMMAND, "verify", str(work / "whole")], capture_output=True, text=True, check=False)
    found["verified"] = verified.stdout.splitlines()[-1]
    found["storages"] = storages(few, work)
    found["draft"] = drafted(make_set(work / "large", pictures, found["few"] // 4, LARGE), work)
    found["two threads"] = started(few, work / "threads")
    found["two dask workers"] = started(few, work / "dask", "--dask", "local", "--workers", "2")
    if PEERS.exists():
        found["loop"] = looped(hard_links(images, work / "looped", LOOPED), work)
    return found


def looped(images, work):
    """The loop that people write and a run, in turns."""
    times = []
    for i in range(LOOP_TURNS):
        ours = timed(images, work / f"looped out {i}")["seconds"]
        said = subprocess.run([PEERS, __file__, "--loop", images, work / "loop.h5"], capture_output=True, text=True,
                              check=True).stdout
        times.append((ours, json.loads(said)["seconds"]))
    return json.loads(said) | {
        "seconds": [theirs for _, theirs in times], "ours s": [ours for ours, _ in times],
        "ratio": statistics.median(theirs / ours for ours, theirs in times),
        "difference": disagreement(work / "looped out 0", work / "loop.h5")}


SETS = {"ImageNet, validation": (50_000, 1), "ImageNet, training": (1_281_167, 1),
        "a billion, in 800 runs": (10**9, 800)}  # images and runs
STORAGES = {"float32": [], "float16": ["--store", "float16"], "int8": ["--store", "int8"],
            "float32, gzip": ["--compress", "gzip"], "int8, gzip": ["--store", "int8", "--compress", "gzip"],
            "float16, 95 % kept, gzip": ["--store", "float16", "--keep", "0.95", "--compress", "gzip"],
            "float16, channels summed": ["--store", "float16", "--sum-channels"],
            "int8, channels summed, gzip": ["--store", "int8", "--sum-channels", "--compress", "gzip"]}


def storages(images, work):
    """By storage: bytes of an image, the median over images of the relative error, and milliseconds an image."""
    import fastdtd

    found = {}
    for name, options in STORAGES.items():
        out = work / f"stored {name}"
        seconds = timed(images, out, *options)["seconds"]
        results, exact = fastdtd.open_results(out), fastdtd.open_results(work / "stored float32")
        errors = []
        for i in range(0, len(results), 7):
            wanted = exact[i].sum(0, keepdims=True) if "--sum-channels" in options else exact[i]
            errors.append(np.linalg.norm(results[i] - wanted) / np.linalg.norm(wanted))
        found[name] = {"bytes": sum(path.stat().st_size for path in (out / "shards").iterdir()) / len(results),
                       "error": float(np.median(errors)), "ms": 1000 * seconds / len(results)}
    return found


def started(images, out, *options):
    """Seconds of a run, and milliseconds of each image more: what a run takes beside its start."""
    part = hard_links(images, out.with_name(f"{out.name} part"), len(list(images.iterdir())) // 4)
    times = {folder: statistics.median(timed(folder, f"{out} {folder.name} {i}", *options)["seconds"] for i in range(3))
             for folder in (images, part)}
    more = len(list(images.iterdir())) - len(list(part.iterdir()))
    return {"s": times[images], "ms": 1000 * (times[images] - times[part]) / more}


def hard_links(images, folder, count):
    """A folder of the first `count` files of another."""
    folder.mkdir()
    for path in itertools.islice(sorted(images.iterdir()), count):
        os.link(path, folder / path.name)
    return folder


def drafted(images, work):
    """What scaling JPEGs while they are decoded changes, against the whole decoding."""
    import fastdtd

    seconds = timed(images, work / "large out")["seconds"]
    draft = timed(images, work / "drafted", "--draft")["seconds"]
    ours, exact = fastdtd.open_results(work / "drafted"), fastdtd.open_results(work / "large out")
    scores, wanted = ours.columns["score"], exact.columns["score"]
    maps = [np.corrcoef(ours[i].sum(0).ravel(), exact[i].sum(0).ravel())[0, 1] for i in range(0, len(ours), 7)]
    return {"ms": 1000 * draft / len(ours), "ms without": 1000 * seconds / len(ours),
            "score": float(np.median(np.abs(scores - wanted) / np.abs(wanted))),
            "other winners": float((ours.columns["target"] != exact.columns["target"]).mean()),
            "correlation": float(np.median(maps))}


def disagreement(out, loop):
    """Median over images of the relative difference of both results' relevance."""
    import h5py

    import fastdtd

    results = fastdtd.open_results(out)
    with h5py.File(loop) as file:
        return float(np.median([np.linalg.norm(results[i] - file["relevance"][i]) / np.linalg.norm(results[i])
                                for i in range(0, len(results), 20)]))


def loop(images, out):
    """What people write: a DataLoader that decodes in processes, zennit's composite, rows appended to an HDF5 file."""
    import h5py
    import torch
    sys.path[:0] = [str(ROOT / "tests" / "peers")]
    from torch_nets import ZennitExplainer
    from zennit.attribution import Gradient

    import fastdtd

    model = fastdtd.load(MODEL)
    explainer = fastdtd.Explainer(model)
    zennit = ZennitExplainer(model.graph, {name: rule.name for name, rule in explainer.rules.items()}, torch.float32)
    paths = sorted(Path(images).iterdir())

    class Pictures(torch.utils.data.Dataset):
        def __len__(self):
            return len(paths)

        def __getitem__(self, i):
            return torch.tensor(model.preprocess(paths[i]))

    begun = time.perf_counter()
    with h5py.File(out, "w") as file:
        rows = file.create_dataset("relevance", (len(paths), *model.graph.input_shape), "f4")
        at = 0
        for batch in torch.utils.data.DataLoader(Pictures(), batch_size=16, num_workers=os.cpu_count()):
            with Gradient(zennit.net, zennit.composite) as attribute:
                _, relevance = attribute(batch, lambda y: torch.nn.functional.one_hot(y.argmax(1), y.shape[1]) * y)
            rows[at:at + len(batch)] = relevance.numpy()
            at += len(batch)
    print(json.dumps({"seconds": time.perf_counter() - begun, "images": len(paths), "torch": torch.__version__}))


def table(found):
    """Markdown, for docs/speed.md."""
    over, threads, dask = found["ms"] / found["alone ms"], found["two threads"], found["two dask workers"]
    lines = [
        f"{found['images']:,} JPEGs of {SIZE[0]} x {SIZE[1]} pixels, SqueezeNet 1.1, relevance stored, nothing drawn; "
        f"{found['cpu']}, {found['machine'].split(', ')[-1]}.", "",
        "| what | figure |", "| --- | ---: |",
        f"| explanations alone, images in memory | {found['alone ms']:.1f} ms an image |",
        f"| the whole run, from JPEG to disk | {found['ms']:.1f} ms an image, {over:.2f} times that |",
        f"| processors busy | {found['busy']:.0%} |",
        f"| memory, {found['few']:,} images / all | {found['MiB of few']:.0f} / {found['MiB']:.0f} MiB |",
        f"| the same command again, when all is done | {found['resume s']:.1f} s |",
        f"| killed at {found['kills']} random moments: same bytes | {'yes' if found['same bytes'] else 'NO'} |",
        f"| `fastdtd verify` | {found['verified']} |",
        f"| {found['few']:,} images, two Dask workers / two threads, with their start | "
        f"{dask['s']:.1f} / {threads['s']:.1f} s |",
        f"| two Dask workers / two threads, beside their start | {dask['ms']:.1f} / {threads['ms']:.1f} ms an image, "
        f"{dask['ms'] / threads['ms']:.2f} times that |",
    ]
    if "loop" in found:
        lines.append(f"| {found['loop']['images']:,} images by PyTorch's DataLoader, zennit and h5py | "
                     f"{found['loop']['ratio']:.1f} "
                     f"times as long; relevance differs by {found['loop']['difference']:.0e} |")
    lines += ["", "| relevance stored as | bytes an image | relative error | ms an image, all |",
              "| --- | ---: | ---: | ---: |"]
    lines += [f"| {name} | {one['bytes']:,.0f} | {one['error']:.0e} | {one['ms']:.1f} |"
              for name, one in found["storages"].items()]
    stored = {name: found["storages"][name]["bytes"] for name in ("float32", "int8, channels summed, gzip")}
    hours = found["ms"] / 3.6e6 * int(found["machine"].split(", ")[-1].split()[0])  # of a processor, for an image
    lines += ["", "| what a set costs | images | core-hours | as float32 | as int8, summed, gzip | shards |",
              "| --- | ---: | ---: | ---: | ---: | ---: |"]
    lines += [f"| {name} | {count:,} | {count * hours:,.1f} | "
              f"{' | '.join(f'{count * size / 1e9:,.0f} GB' for size in stored.values())} | "
              f"{runs * min(499, -(-count // runs // 64)):,} |" for name, (count, runs) in SETS.items()]
    draft = found["draft"]
    lines += ["", f"`--draft`, on JPEGs of {LARGE[0]} x {LARGE[1]} pixels (the same pictures, enlarged): "
              f"{draft['ms']:.1f} ms an image instead of {draft['ms without']:.1f}; scores move by "
              f"{draft['score']:.1%} (median), {draft['other winners']:.1%} of the winners are others, and "
              f"heatmaps correlate by {draft['correlation']:.3f} (median)."]
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", type=Path, default=[ROOT / "fastdtd" / "models"])
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--work", type=Path, help="where files are made and left (a temporary folder)")
    parser.add_argument("--write", metavar="NAME", help="of the machine")
    parser.add_argument("--again", choices=["loop"], help="only this; the rest stays as --write has left it")
    parser.add_argument("--loop", nargs=2, metavar=("SET", "OUT"))
    options = parser.parse_args()
    if options.loop:
        loop(*options.loop)
        return
    result = ROOT / "benchmarks" / "results" / f"runs-{options.write}.json"
    with tempfile.TemporaryDirectory(dir=options.work) as folder:
        if options.again:
            found, images = json.loads(result.read_text()), Path(folder) / "looped"
            found["loop"] = looped(make_set(images, pictures_in(options.folders), LOOPED), Path(folder))
        else:
            found = measure(options, Path(folder))
    print(json.dumps(found, indent=1))
    print(table(found))
    if options.write:
        result.write_text(json.dumps(found, indent=1) + "\n")
        write_table(ROOT / "docs" / "speed.md", "runs.py", table(found))


if __name__ == "__main__":
    main()
