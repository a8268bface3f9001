"""What an embedded library takes: code, workspace, weights, time to start and to explain; and are its bits the same?

    .venv/bin/python benchmarks/embed.py [--networks VGG-16 ...] [--rules] [--write NAME]

Each network is embedded for this very processor. Its relevance is compared with an explainer's, bit by bit, before
anything is timed; then the two explain one picture in turns, in one thread each. --rules compares other rules' bits,
too. --write writes benchmarks/results/embed-NAME.json and the table in docs/howto-embed.md.
"""

import argparse
import datetime
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from networks import NETWORKS, pictures
from tables import processor, write_table

import fastdtd
from fastdtd import embedded
from fastdtd import graph as g
from fastdtd.model import Model, Preprocessing

ROOT = Path(__file__).resolve().parents[1]
RULES = ("epsilon", "gamma", "alpha-beta", "gradient")  # of all convolutions and dense layers; the last of all layers
# In a process of its own, with a copy of the one file that it needs.
START = """
import sys, time
import numpy as np, embedded
begun = time.perf_counter()
network = embedded.load(sys.argv[1])
loaded = time.perf_counter()
network.explain(np.fromfile(sys.argv[2], np.float32).reshape(network.input_shape))
ended = time.perf_counter()
peak = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(loaded - begun, ended - begun, 1024 * peak)
"""


def measure(name, with_rules):
    graph = NETWORKS[name]()
    model, picture = Model(graph, Preprocessing(None)), pictures(graph, 1)
    with tempfile.TemporaryDirectory() as folder:
        begun = time.perf_counter()
        made = fastdtd.embed(model, folder, weights="file", name="net", device_cpu=True)
        exported = time.perf_counter() - begun
        network, explainer = embedded.load(made.shared), fastdtd.Explainer(model, threads=1)
        check(name, "dtd", network, explainer, picture)
        compact = fastdtd.embed(model, Path(folder) / "compact", weights="compact", name="net", device_cpu=True)
        ours, python = in_turns(lambda: network.explain(picture[0]), lambda: explainer(picture))
        found = {
            "exported s": exported, "code": sections(made.object), "object": made.object_bytes,
            "workspace": made.workspace_bytes, "weights": made.weights_bytes,
            "compact": compact.weights.stat().st_size, "unpack s": unpacked(compact), "ms": 1000 * ours,
            "Python ms": 1000 * python, **start(made, picture, Path(folder)), "same bits": ["dtd"]
        }
    for rules in RULES if with_rules else ():
        chosen = rules if rules == "gradient" else {
            f"type:{kind}": rules for kind, layer in (("conv2d", g.Conv2d), ("dense", g.Dense))
            if any(isinstance(one, layer) for one in graph)}
        with tempfile.TemporaryDirectory() as folder:
            made = fastdtd.embed(model, folder, chosen, weights="file", name="net", device_cpu=True)
            check(name, rules, embedded.load(made.shared), fastdtd.Explainer(model, chosen, threads=1), picture)
            found["same bits"].append(rules)
    return found


def check(name, rules, network, explainer, picture):
    e, expected = network.explain(picture[0]), explainer(picture)
    if e.relevance.tobytes() != expected.relevance[0].tobytes() or e.output.tobytes() != expected.output[0].tobytes():
        raise SystemExit(f"{name}, {rules}: the library's bits are not the explainer's")


def in_turns(*calls, turns=15):
    times = [[] for _ in calls]
    for _ in range(turns):
        for call, own in zip(calls, times, strict=True):
            begun = time.perf_counter()
            call()
            own.append(time.perf_counter() - begun)
    return [statistics.median(own) for own in times]


def unpacked(made):
    begun = time.perf_counter()
    embedded.load(made.shared)
    return time.perf_counter() - begun


def start(made, picture, folder):
    """Seconds until the library is loaded and until the first heatmap, with Python's own; the most memory in bytes."""
    (folder / "embedded.py").write_bytes(Path(embedded.__file__).read_bytes())
    picture.tofile(folder / "picture.f32")
    runs = []
    for _ in range(5):
        begun = time.perf_counter()
        said = subprocess.run([sys.executable, "-c", START, made.shared, folder / "picture.f32"], cwd=folder,
                              check=True, capture_output=True, text=True).stdout
        loaded, _, peak = map(float, said.split())
        runs.append((loaded, time.perf_counter() - begun, peak))
    loaded, first, peak = map(statistics.median, zip(*runs, strict=True))
    return {"load s": loaded, "first heatmap s": first, "peak": peak}


def sections(path):
    """Bytes of machine code in an ELF object."""
    content = path.read_bytes()
    at, (size, count, names) = int.from_bytes(content[40:48], "little"), (
        int.from_bytes(content[place:place + 2], "little") for place in (58, 60, 62))
    headers = [content[at + size * i:at + size * (i + 1)] for i in range(count)]

    def field(header, place):
        return int.from_bytes(header[place:place + 8], "little")

    texts = content[field(headers[names], 24):]
    return sum(field(header, 32) for header in headers
               if texts[int.from_bytes(header[:4], "little"):].startswith(b".text"))


def table(found):
    lines = [
        "| network | code | workspace | weights, as kernels read them | compact, unpacked in | loaded in | a picture, "
        "one thread | over Python's time |", "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"
    ]
    for name, one in found["networks"].items():
        size, work, packed, compact = (one[what] for what in ("code", "workspace", "weights", "compact"))
        lines.append(
            f"| {name} | {size / 1e3:.0f} KB | {work / 1e6:.1f} MB | {packed / 1e6:.1f} MB | {compact / 1e6:.1f} MB, "
            f"{one['unpack s']:.2g} s | {1000 * one['load s']:.1f} ms | {one['ms']:.2f} ms | "
            f"{one['ms'] / one['Python ms']:.2f} |")
    rules = sorted({rule for one in found["networks"].values() for rule in one["same bits"]})
    name, one = next(((name, one) for name, one in found["networks"].items() if name.startswith("SqueezeNet")),
                     next(iter(found["networks"].items())))
    lines += ["", f"For {found['cpu']}, {found['date']}. The relevance had the same bits as an explainer's, under "
              f"{', '.join(rules)}. \"Loaded\": weights mapped and checked. Of {name} the first heatmap is "
              f"there {one['first heatmap s']:.2f} s after Python is started, with "
              f"{(one['peak'] - one['weights'] - one['workspace']) / 1e6:.0f} MB beside weights and workspace."]
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [name for name in NETWORKS if "LRN" not in name]
    parser.add_argument("--networks", nargs="*", default=names)
    parser.add_argument("--rules", action="store_true", help="compare other rules' bits")
    parser.add_argument("--write", metavar="NAME", help="of the machine")
    options = parser.parse_args()
    found = {"cpu": processor(), "date": datetime.date.today().isoformat(), "networks": {}}
    for name in options.networks:
        found["networks"][name] = measure(name, options.rules)
        print(name, json.dumps(found["networks"][name]), flush=True)
    print(table(found))
    if options.write:
        (ROOT / "benchmarks" / "results" / f"embed-{options.write}.json").write_text(json.dumps(found, indent=1) + "\n")
        write_table(ROOT / "docs" / "howto-embed.md", "embed.py", table(found))


if __name__ == "__main__":
    np.seterr(all="raise", under="ignore")
    main()
