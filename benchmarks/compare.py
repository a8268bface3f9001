"""How fast is an explanation, next to PyTorch's forward pass and to the explanations of zennit, Captum, iNNvestigate?
And is it right?

    make compare                                   # everything, about 20 minutes; makes .venv-peers first
    .venv-peers/bin/python benchmarks/compare.py --only speed --nets VGG-16 --batches 8
    .venv-peers/bin/python benchmarks/compare.py --save --readme
    make .venv-innvestigate/ready                  # iNNvestigate and TensorFlow; without them that section is left out

Every net is first checked: scores against PyTorch's and relevance against zennit's, both in float64. What disagrees by
more than 1e-3 is not timed, and the script ends with an error. Then the three run in turns, so that what else the
machine does meets all of them; times are medians over the turns, ratios are medians of the turns' ratios. --save writes
benchmarks/results/ (sections that were not run stay as they are there), --readme the table in docs/speed.md and the
rows of it that README.md has.
"""

import argparse
import datetime
import functools
import importlib.metadata
import json
import os
import platform
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "tests" / "peers")]

import numpy as np  # noqa: E402  # after the paths
from networks import NETWORKS, pictures  # noqa: E402  # as above

import fastdtd  # noqa: E402  # as above
from fastdtd import graph as g  # noqa: E402  # as above
from fastdtd.model import Model, Preprocessing  # noqa: E402  # as above

BEGIN, END = "<!-- table by benchmarks/compare.py -->", "<!-- end of table -->"
MOST_DISAGREEMENT = 1e-3
_PAUSE = 0.1  # seconds
INNVESTIGATE = ROOT / ".venv-innvestigate" / "bin" / "python"
SECTIONS = ("speed", "captum", "innvestigate", "memory", "threads", "bits", "growth", "start")


def explainer_of(graph, threads=None):
    return fastdtd.Explainer(Model(graph, Preprocessing(None)), threads=threads)


# ---- Right before fast -----------------------------------------------------------------------------------------------


def averaged(graph):
    """The same network with average pools: no winner of a max-pool that turns on the last bit."""
    return g.Graph(
        tuple(
            g.AveragePool2d(layer.name, layer.inputs, layer.kernel, layer.stride, layer.padding, layer.ceil_mode
                            ) if isinstance(layer, g.MaxPool2d) else layer
            for layer in graph), graph.input_shape, graph.box)


def disagreement(graph):
    """(scores, relevance, smallest relevance) of one picture, the first two relative to PyTorch and zennit in float64.
    """
    from torch_nets import zennit_relevance
    explainer, picture = explainer_of(graph), pictures(graph, 1)
    e = explainer(picture)
    relevance, scores = zennit_relevance(graph, {name: rule.name for name, rule in explainer.rules.items()}, picture,
                                         e.target)
    return (float(abs(e.output - scores).max() / abs(scores).max()),
            float(np.linalg.norm(e.relevance - relevance) / np.linalg.norm(relevance)), float(e.relevance.min()))


# ---- Speed -----------------------------------------------------------------------------------------------------------


def contenders(graph, batch, threads):
    """Functions of no arguments: PyTorch's forward pass, our explanation, zennit's."""
    import torch
    from torch_nets import Net, ZennitExplainer
    torch.set_num_threads(threads)
    explainer, images = explainer_of(graph, threads), pictures(graph, batch)
    net, tensor = Net(graph).eval(), torch.tensor(images)
    for module in net.modules():
        if isinstance(module, torch.nn.ReLU):
            module.inplace = True
    targets = explainer(images).target
    zennit = ZennitExplainer(graph, {name: rule.name for name, rule in explainer.rules.items()}, torch.float32)

    def forward():
        with torch.inference_mode():
            return net(tensor)

    return {
        "PyTorch": forward, "fastdtd": lambda: explainer(images, targets), "zennit": lambda: zennit(tensor, targets)
    }


def measure(functions, seconds):
    """Seconds of each call, in turns, for about so long. The slow ones (zennit, Captum, iNNvestigate) have a third of
    the turns, and 3.

    Before its turn each has a pause, for PyTorch's threads keep turning for a while after a call, on processors that
    the next one needs; and as long a run that does not count, for it finds cold caches and threads that sleep, or share
    a processor.
    """
    times = {name: [] for name in functions}
    for function in functions.values():
        function()
    end, turn = time.perf_counter() + seconds, 0
    while time.perf_counter() < end or turn < 9:
        for name, function in functions.items():
            slow = name in ("zennit", "Captum", "iNNvestigate")
            if slow and turn % 3:
                continue
            time.sleep(_PAUSE)
            warm = time.perf_counter() + _PAUSE
            while not slow and time.perf_counter() < warm:
                function()
            start = time.perf_counter()
            function()
            times[name].append(time.perf_counter() - start)
        turn += 1
    return times


def speed(options):
    rows = []
    for name in options.nets:
        graph = NETWORKS[name]()
        errors = disagreement(graph)
        exact = disagreement(averaged(graph))
        print(
            f"{name}: scores within {errors[0]:.1e}, relevance within {errors[1]:.1e} ({exact[1]:.1e} with average "
            f"pools, where no "
            f"winner turns on the last bit), least relevance {errors[2]:.1e}", flush=True)
        if max(errors[:2]) > MOST_DISAGREEMENT or max(exact[:2]) > MOST_DISAGREEMENT or errors[2] < 0:
            sys.exit(f"{name} disagrees with PyTorch or zennit by more than {MOST_DISAGREEMENT}: not timed")
        for batch in options.batches:
            times = measure(contenders(graph, batch, options.threads), options.seconds)
            medians = {who: statistics.median(values) / batch * 1e3 for who, values in times.items()}
            ratio = statistics.median(ours / theirs
                                      for ours, theirs in zip(times["fastdtd"], times["PyTorch"], strict=True))
            spreads = {who: (np.percentile(values, 75) - np.percentile(values, 25)) / statistics.median(values)
                       for who, values in times.items()}
            rows.append({"net": name, "batch": batch, "milliseconds": medians, "spread": spreads, "to PyTorch": ratio,
                         "zennit to ours": medians["zennit"] / medians["fastdtd"], "turns": len(times["fastdtd"]),
                         "scores": errors[0], "relevance": errors[1], "relevance with average pools": exact[1]})
            print(
                f"  batch {batch}: " + ", ".join(f"{who} {medians[who]:.2f} ms (spread {spreads[who]:.0%})"
                                                 for who in medians)
                + f"; to PyTorch {ratio:.2f}, zennit to ours {rows[-1]['zennit to ours']:.1f}", flush=True)
    return rows


def captum(options):
    """Captum's "deep Taylor" is z+ in the first layer too: so is ours here, on networks that it can do and pictures
    without negatives.
    """
    import torch
    from torch_nets import CaptumExplainer
    torch.set_num_threads(options.threads)
    rows = []
    for name in [name for name in ("LeNet", "AlexNet", "VGG-16") if name in options.nets]:
        graph = averaged(NETWORKS[name]())  # in float32 the two pick other winners of max-pools here and there
        graph = g.Graph(graph.layers, graph.input_shape, (0 * graph.box[0], graph.box[1]))
        explainer = fastdtd.Explainer(Model(graph, Preprocessing(None)), {graph.layers[0].name: "z+"},
                                      threads=options.threads)
        theirs = CaptumExplainer(graph)
        for batch in options.batches:
            images = pictures(graph, batch)
            e, tensor = explainer(images), torch.tensor(images)
            if (e.explained <= 0).any():
                sys.exit(f"{name}: a score is not positive, so the two mean different things")
            error = float(np.linalg.norm(e.relevance - theirs(tensor, e.target).numpy()) / np.linalg.norm(e.relevance))
            if error > MOST_DISAGREEMENT:
                sys.exit(f"{name} disagrees with Captum by {error:.1e}: not timed")
            times = measure({"fastdtd": functools.partial(explainer, images, e.target),
                             "Captum": functools.partial(theirs, tensor, e.target)}, options.seconds / 2)
            rows.append(compared(name, batch, times, "Captum", error))
    return rows


class Innvestigate:
    """iNNvestigate's deep Taylor decomposition of `images`, in a process of its own (innvestigate_server.py)."""

    def __init__(self, model, images, target, threads, folder):
        self.relevance, arguments = Path(
            folder, "relevance.npy"), [str(Path(folder, name)) for name in ("net.h5", "pictures.npy")]
        fastdtd.save(model, arguments[0])
        np.save(arguments[1], images)
        with open(Path(folder, "log"), "w") as log:
            self.process = subprocess.Popen([
                INNVESTIGATE,
                str(ROOT / "benchmarks" / "innvestigate_server.py"), *arguments,
                str(target),
                str(threads), self.relevance
            ], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
                                            env=os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3"})
        if self.process.stdout.readline() != "ready\n":
            sys.exit(Path(folder, "log").read_text())

    def __call__(self):
        print(file=self.process.stdin, flush=True)
        self.process.stdout.readline()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.communicate()


def innvestigate(options):
    """iNNvestigate's "deep_taylor" is z+ in the first layer too; it asks for TensorFlow 2.14, so for an environment of
    its own.
    """
    if not INNVESTIGATE.exists():
        print("iNNvestigate is not installed: make .venv-innvestigate/ready", flush=True)
        return None
    rows = []
    for name in [name for name in ("LeNet", "VGG-16") if name in options.nets]:
        graph = NETWORKS[name]()
        graph = g.Graph(graph.layers, graph.input_shape, (0 * graph.box[0], graph.box[1]))
        model = Model(graph, Preprocessing(None))
        explainer = fastdtd.Explainer(model, {graph.layers[0].name: "z+"}, threads=options.threads)
        for batch in options.batches:
            images = pictures(graph, batch)
            target = int(explainer(images).output.min(0).argmax())
            e = explainer(images, target)
            with tempfile.TemporaryDirectory() as folder, Innvestigate(model, images, target, options.threads,
                                                                       folder) as theirs:
                error = float(np.linalg.norm(e.relevance - np.load(theirs.relevance)) / np.linalg.norm(e.relevance))
                if error > MOST_DISAGREEMENT or (e.explained <= 0).any():
                    sys.exit(f"{name} disagrees with iNNvestigate by {error:.1e}: not timed")
                times = measure({"fastdtd": functools.partial(explainer, images, target), "iNNvestigate": theirs},
                                options.seconds / 2)
            rows.append(compared(name, batch, times, "iNNvestigate", error))
    return rows


def compared(name, batch, times, who, error):
    medians = {own: statistics.median(values) / batch * 1e3 for own, values in times.items()}
    print(f"{name}, batch {batch}: fastdtd {medians['fastdtd']:.2f} ms, {who} {medians[who]:.2f} ms, "
          f"{medians[who] / medians['fastdtd']:.1f} times; relevance within {error:.1e}", flush=True)
    return {"net": name, "batch": batch, "milliseconds": medians, "relevance": error}


def table(rows):
    """Markdown."""
    lines = [
        "| network | batch | PyTorch, forward only | **fastdtd, whole explanation** | ratio | zennit, same explanation "
        "| times ours |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |"
    ]
    for row in rows:
        t = row["milliseconds"]
        lines.append(
            f"| {row['net']} | {row['batch']} | {t['PyTorch']:.3g} ms | **{t['fastdtd']:.3g} ms** | "
            f"{row['to PyTorch']:.2f} | "
            f"{t['zennit']:.3g} ms | {row['zennit to ours']:.1f} |")
    for batch in sorted({row["batch"] for row in rows}, reverse=True):
        own = [row for row in rows if row["batch"] == batch and "LRN" not in row["net"]]  # each network once
        lines.append(
            f"| *geometric mean, without LRN* | {batch} | | | {geometric_mean(row['to PyTorch'] for row in own):.2f} | "
            f"| "
            f"{geometric_mean(row['zennit to ours'] for row in own):.1f} |")
    return "\n".join(lines)


def geometric_mean(values):
    return float(np.exp(np.mean(np.log(list(values)))))


# ---- Memory, threads, bits, growth, start ----------------------------------------------------------------------------


def in_own_process(what, *arguments):
    """What the function `what` of this file returns in a process of its own."""
    code = (f"import sys; sys.path.insert(0, {str(ROOT / 'benchmarks')!r}); import compare, json; "
            f"print(json.dumps(compare.{what}(*{arguments!r})))")
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return json.loads(run.stdout.splitlines()[-1])


def peak_memory(who, name, batch, threads):
    graph = NETWORKS[name]()
    before = peak_mebibytes()
    if who == "fastdtd":
        explainer_of(graph, threads)(pictures(graph, batch))
    else:
        import torch
        from torch_nets import ZennitExplainer
        torch.set_num_threads(threads)
        explainer_rules = {key: rule.name for key, rule in fastdtd.rules.assign(graph, "dtd").rules.items()}
        ZennitExplainer(graph, explainer_rules, torch.float32)(torch.tensor(pictures(graph, batch)), [0] * batch)
    return {"peak MiB": peak_mebibytes(), "of which weights and interpreter MiB": before}


def peak_mebibytes():
    """Of this process. On Linux, what getrusage tells is at least what the parent held when it started this one."""
    if Path("/proc/self/status").exists():
        return int(re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text()).group(1)) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def memory(options):
    result = {who: in_own_process("peak_memory", who, "VGG-16", 8, options.threads) for who in ("fastdtd", "zennit")}
    result["ratio"] = result["fastdtd"]["peak MiB"] / result["zennit"]["peak MiB"]
    print(f"peak memory, VGG-16, batch 8: {result}", flush=True)
    return result


def threads(options):
    result = {}
    for name in ("SqueezeNet 1.1", "VGG-16"):
        graph = NETWORKS[name]()
        images = pictures(graph, 8)
        one, two = explainer_of(graph, 1), explainer_of(graph, 2)
        times = measure(
            {"one": lambda one=one, images=images: one(images), "two": lambda two=two, images=images: two(images)},
            options.seconds)
        result[name] = statistics.median(a / b for a, b in zip(times["one"], times["two"], strict=True))
    print(f"two threads over one, batch 8: {result}", flush=True)
    return result


def bits(options):
    """Whether the same picture gives the same bits alone, in batches, at any place, with any number of threads."""
    result = {}
    for name in options.nets:
        graph = NETWORKS[name]()
        images = pictures(graph, 5)
        alone = np.concatenate([explainer_of(graph, 1)(images[i:i + 1]).relevance for i in range(5)])
        others = [explainer_of(graph, 1)(images).relevance, explainer_of(graph, 2)(images).relevance,
                  explainer_of(graph, 3)(images[::-1]).relevance[::-1],
                  np.concatenate([explainer_of(graph, 2)(images[i:i + 1]).relevance for i in range(5)])]
        result[name] = all(np.array_equal(alone, other) for other in others)
    print(f"same bits in any batch, place and number of threads: {result}", flush=True)
    return result


def growth(options):
    result = {}
    for name, few, many in (("LeNet", 64, 4096), ("SqueezeNet 1.1", 8, 256)):
        graph = NETWORKS[name]()
        explainer, images = explainer_of(graph, options.threads), pictures(graph, many)
        explainer(images[:few])
        small, large = [], []
        for _ in range(5):
            start = time.perf_counter()
            for _ in range(many // few // 4):
                explainer(images[:few])
            small.append((time.perf_counter() - start) / (many // few // 4) / few)
            start = time.perf_counter()
            explainer(images)
            large.append((time.perf_counter() - start) / many)
        result[name] = statistics.median(b / a for a, b in zip(small, large, strict=True))
    print(f"time an image, large set over small set: {result}", flush=True)
    return result


def start(options):
    def process(code):
        begin = time.perf_counter()
        subprocess.run([sys.executable, "-c", code], check=True)
        return time.perf_counter() - begin

    heatmap = "import fastdtd; from fastdtd.model_file import MODELS; m = fastdtd.load('squeezenet1_1'); " \
              "fastdtd.Explainer(m)(m.preprocess(MODELS / 'coffee.png'))"
    process(heatmap)
    result = {"python alone": statistics.median(process("pass") for _ in range(5)),
              "import fastdtd": statistics.median(process("import fastdtd") for _ in range(5)),
              "first heatmap, warm cache": statistics.median(process(heatmap) for _ in range(5))}
    with tempfile.TemporaryDirectory() as cache:
        begin = time.perf_counter()
        subprocess.run([sys.executable, "-c", heatmap], check=True, env=os.environ | {"NUMBA_CACHE_DIR": cache})
        result["first heatmap, empty cache"] = time.perf_counter() - begin
    with tempfile.TemporaryDirectory() as cache:
        begin = time.perf_counter()
        runs = [
            subprocess.Popen([sys.executable, "-c", heatmap], env=os.environ | {"NUMBA_CACHE_DIR": cache})
            for _ in range(8)
        ]
        result["8 processes, empty cache, all well"] = all(run.wait() == 0 for run in runs)
        result["8 processes, empty cache"] = time.perf_counter() - begin
    print(f"seconds: {result}", flush=True)
    return result


# ---- The script ------------------------------------------------------------------------------------------------------


def machine(options):
    model = platform.processor()
    if Path("/proc/cpuinfo").exists():
        found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
        model = found.group(1) if found else model
    from fastdtd.kernels.cpu.vector_code import LANES
    versions = {
        name: importlib.metadata.version(name) for name in ("fastdtd", "numpy", "numba", "torch", "zennit", "captum")
    }
    return {"processor": model, "target": _numba_target(), "threads": options.threads, "float lanes": LANES,
            "python": platform.python_version(), **versions, "date": datetime.date.today().isoformat()}


def _numba_target():
    import llvmlite.binding as llvm
    return llvm.get_host_cpu_name()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=SECTIONS)
    parser.add_argument("--nets", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--batches", nargs="+", type=int, default=[8, 1])
    parser.add_argument("--threads", type=int,
                        default=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())
    parser.add_argument("--seconds", type=float, default=20, help="about how long each net and batch is measured")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/compare-<processor>.json")
    parser.add_argument("--readme", action="store_true", help="put the tables into docs/speed.md and README.md")
    options = parser.parse_args()
    result = {"machine": machine(options)}
    print(result["machine"], flush=True)
    for section in options.only:
        result[section] = globals()[section](options)
    if "speed" in result:
        print(table(result["speed"]))
    if options.save:
        path = ROOT / "benchmarks" / "results" / f"compare-{result['machine']['target']}.json"
        path.parent.mkdir(exist_ok=True)
        result = (json.loads(path.read_text()) if path.exists() else {}) | result
        path.write_text(json.dumps(result, indent=1) + "\n")
    if options.readme:
        write_tables(result)


def write_tables(result):
    """All rows into docs/speed.md, the largest batch of each network that has no LRN into README.md."""
    m, rows = result["machine"], result["speed"]
    text = (
        f"Milliseconds an image, {m['threads']} threads, float32, random weights; {m['processor']} ({m['target']}), "
        f"PyTorch {m['torch']}, zennit {m['zennit']}, {m['date']}.")
    largest = max(row["batch"] for row in rows)
    headline = [row for row in rows if row["batch"] == largest and "LRN" not in row["net"]]
    for path, shown, note in ((ROOT / "docs" / "speed.md", rows, text + others(result)),
                              (ROOT / "README.md", headline, text)):
        before, rest = path.read_text().split(BEGIN)
        wrapped = textwrap.fill(note, 120, break_long_words=False, break_on_hyphens=False)
        path.write_text(f"{before}{BEGIN}\n{table(shown)}\n\n{wrapped}\n{END}{rest.split(END)[1]}")


def others(result):
    """What Captum and iNNvestigate take for what they call deep Taylor, as a sentence."""
    told = []
    for who, key in (("Captum", "captum"), ("iNNvestigate", "innvestigate")):
        rows = result.get(key) or []
        if rows:
            times = [row["milliseconds"][who] / row["milliseconds"]["fastdtd"] for row in rows]
            nets = ", ".join(dict.fromkeys(row["net"] for row in rows))
            told.append(f"{who} takes {min(times):.1f} to {max(times):.0f} times as long ({nets})")
    return f" For what they call deep Taylor, z+ in the first layer too, {' and '.join(told)}." if told else ""


if __name__ == "__main__":
    main()
