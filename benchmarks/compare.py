"""How fast is an explanation, next to the fastest forward pass there is and to the explanations of zennit, Captum,
iNNvestigate? And is it right?

    make compare                                   # everything, about an hour; makes .venv-peers first
    .venv-peers/bin/python benchmarks/compare.py --only speed --nets VGG-16 --batches 8
    .venv-peers/bin/python benchmarks/compare.py --save --pictures photos --models resnet20.h5
    .venv-peers/bin/python benchmarks/compare.py --save --isa avx2     # as if there were no AVX-512
    .venv-peers/bin/python benchmarks/compare.py --tables              # measures nothing
    make .venv-innvestigate/ready                  # iNNvestigate and TensorFlow; without them that section is left out

Every net is first checked: scores against PyTorch's and relevance against zennit's, both in float64, and then the
scores of each forward pass. What disagrees by more than 1e-3 is not timed, and the script ends with an error. Each
contender has a process of its own (contenders.py), and they run in turns, so that what else the machine does meets all
of them; times are medians over the turns, ratios are medians of the turns' ratios. At the end is said which of the
project's goals are met. --save writes benchmarks/results/ (sections that were not run stay as they are there) and the
tables in docs/speed.md and README.md, which are of all results that there are.
"""

import argparse
import contextlib
import datetime
import functools
import importlib.metadata
import itertools
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

import llvmlite.binding as llvm  # noqa: E402  # after the paths
import numpy as np  # noqa: E402  # as above
from contenders import FORWARD, INNVESTIGATE, PAUSE, Contender, prepare, zennit_rules  # noqa: E402  # as above
from fastdtd.kernels.cpu.vector_code import LANES  # noqa: E402  # as above
from networks import NETWORKS, averaged, pictures  # noqa: E402  # as above
from tables import geometric_mean, markdown, processor, write_table  # noqa: E402  # as above

import fastdtd  # noqa: E402  # as above
from fastdtd import graph as g  # noqa: E402  # as above
from fastdtd.model import Model, Preprocessing  # noqa: E402  # as above

RESULTS = ROOT / "benchmarks" / "results"
MOST_DISAGREEMENT = 1e-3
SQUEEZENET, EFFICIENTNET = "SqueezeNet 1.1, trained", "EfficientNet-Lite0, trained"
PRESETS = "zennit.epsilon_plus", "zennit.epsilon_gamma_box"
SELDOM = 3  # explanations of others, which take long, have every third turn
SECTIONS = ("speed", "rules", "thousand", "captum", "innvestigate", "memory", "threads", "bits", "growth", "start")


def explainer_of(graph, threads=None):
    return fastdtd.Explainer(Model(graph, Preprocessing(None)), threads=threads)


def subject(name, options):
    """(model, images): of so many, drawn for networks with random weights, and photographs for trained ones."""
    if name in NETWORKS:
        graph = NETWORKS[name]()
        return Model(graph, Preprocessing(None)), functools.partial(pictures, graph)
    if name == EFFICIENTNET:
        from torch_nets import efficientnet
        _, model = efficientnet()
    else:
        model = fastdtd.load("squeezenet1_1" if name == SQUEEZENET else options.models[name])

    def images(count):
        return np.stack([model.preprocess(path) for path in itertools.islice(itertools.cycle(options.pictures), count)])

    return model, images


# ---- Right before fast -----------------------------------------------------------------------------------------------


def disagreement(graph, picture, rules):
    """(scores, relevance, smallest relevance) of one picture, the first two relative to PyTorch and zennit in float64.
    """
    from torch_nets import zennit_relevance
    e = fastdtd.Explainer(Model(graph, Preprocessing(None)), rules)(picture)
    relevance, scores = zennit_relevance(graph, zennit_rules(graph, rules), picture, e.target)
    return (float(abs(e.output - scores).max() / abs(scores).max()),
            float(np.linalg.norm(e.relevance - relevance) / np.linalg.norm(relevance)), float(e.relevance.min()))


def checked(name, graph, picture):
    """What is to be told of a network's errors; ends the script where they are large."""
    from torch_nets import comparable_rules
    rules = comparable_rules(graph)
    errors, exact = disagreement(graph, picture, rules), disagreement(averaged(graph), picture, rules)
    print(f"{name}: scores within {errors[0]:.1e}, relevance within {errors[1]:.1e} ({exact[1]:.1e} with average "
          f"pools, where no winner turns on the last bit), least relevance {errors[2]:.1e}", flush=True)
    if not (np.max([errors[:2], exact[:2]]) <= MOST_DISAGREEMENT and errors[2] >= 0):  # NaN is neither
        sys.exit(f"{name} disagrees with PyTorch or zennit by more than {MOST_DISAGREEMENT}: not timed")
    return {"scores": errors[0], "relevance": errors[1], "relevance with average pools": exact[1]}


# ---- Speed -----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def at_work(folder, options, wanted):
    """Contenders by name; wanted: who each is and by which rules it explains."""
    with contextlib.ExitStack() as stack:
        yield {name: stack.enter_context(Contender(who, folder, options.threads, rules))
               for name, (who, rules) in wanted.items()}


def in_turns(contenders, seconds):
    """Seconds of a call in each turn, by name, for about so long. Before each turn is a pause: the threads of the last
    one keep turning for a while, on processors that the next one needs.
    """
    times = {name: [] for name in contenders}
    end, turn = time.perf_counter() + seconds, 0
    while time.perf_counter() < end or turn < 3 * SELDOM:
        for name, contender in contenders.items():
            if not contender.is_slow or turn % SELDOM == 0:
                time.sleep(PAUSE)
                times[name].append(contender())
        turn += 1
    return times


def ratio(times, who, to):
    """Median over the turns that both have."""
    fewer = min(len(times[who]), len(times[to]))
    return statistics.median(a / b for a, b in zip(*(
        own if len(own) == fewer else own[::SELDOM] for own in (times[who], times[to])), strict=True))


def milliseconds(times, batch):
    """Of an image, by name."""
    return {name: statistics.median(own) / batch * 1e3 for name, own in times.items()}


def speed(options):
    rows = []
    for name in options.nets:
        model, images = subject(name, options)
        errors = checked(name, model.graph, images(1))
        with tempfile.TemporaryDirectory() as folder:
            for batch in options.batches:
                rows.append({"net": name, "trained": name not in NETWORKS, "batch": batch,
                             **raced(Path(folder), name, model, images(batch), options), **errors})
    return rows


def raced(folder, name, model, images, options):
    """One network and batch, as a row of the table."""
    from torch_nets import comparable_rules
    e = fastdtd.Explainer(model, threads=options.threads)(images)
    prepare(folder, model, images, e.target)
    wanted = {who: (who, "dtd") for who in (*FORWARD, "fastdtd")}
    with at_work(folder, options, wanted | {"zennit": ("zennit", comparable_rules(model.graph))}) as contenders:
        for who in FORWARD:
            off = float(abs(contenders[who].result - e.output).max() / abs(e.output).max())
            if not off <= MOST_DISAGREEMENT:
                sys.exit(f"{name}: the scores of {who} are others by {off:.1e}: not timed")
        if not np.array_equal(contenders["fastdtd"].result, e.relevance) or not e.relevance.min() >= 0:
            sys.exit(f"{name}: what would be timed is not what was checked, or negative: not timed")
        times = in_turns(contenders, options.seconds)
        layout = contenders["zennit"].layout
    medians = milliseconds(times, len(images))
    fastest = min(FORWARD, key=medians.get)
    spreads = {who: float(np.subtract(*np.percentile(own, [75, 25])) / statistics.median(own))
               for who, own in times.items()}
    ratios = {who: ratio(times, "fastdtd", who) for who in FORWARD}
    row = {"milliseconds": medians, "spread": spreads, "turns": len(times["fastdtd"]), "fastest": fastest,
           "fastdtd to": ratios, "zennit to fastdtd": ratio(times, "zennit", "fastdtd"), "zennit's layout": layout,
           "least relevance": float(e.relevance.min())}
    print(f"  batch {len(images)}: " + ", ".join(f"{who} {medians[who]:.3g} ms (spread {spreads[who]:.0%})"
                                                 for who in medians)
          + f"; fastdtd to {fastest} {ratios[fastest]:.2f}, to PyTorch {ratios['PyTorch']:.2f}, zennit to fastdtd "
          f"{row['zennit to fastdtd']:.1f}", flush=True)
    return row


def rules(options):
    """Other rules beside dtd, ours and zennit's, for the first of the batches."""
    rows = []
    for name in [name for name in ("SqueezeNet 1.1", SQUEEZENET, "VGG-16") if name in options.nets]:
        model, images = subject(name, options)
        errors = {preset: disagreement(averaged(model.graph), images(1), preset)[1] for preset in PRESETS}
        if not np.max(list(errors.values())) <= MOST_DISAGREEMENT:
            sys.exit(f"{name} disagrees with zennit by {errors}: not timed")
        batch = images(options.batches[0])
        wanted = {f"{who}, {preset}": (who, preset) for preset in PRESETS for who in ("fastdtd", "zennit")}
        with tempfile.TemporaryDirectory() as folder:
            prepare(Path(folder), model, batch, explainer_of(model.graph)(batch).target)
            with at_work(Path(folder), options, {"dtd": ("fastdtd", "dtd"), **wanted}) as contenders:
                times = in_turns(contenders, options.seconds)
        for preset in PRESETS:
            ours, theirs = f"fastdtd, {preset}", f"zennit, {preset}"
            rows.append({"net": name, "batch": len(batch), "rules": preset,
                         "milliseconds": milliseconds(times, len(batch))[ours], "to dtd": ratio(times, ours, "dtd"),
                         "zennit to fastdtd": ratio(times, theirs, ours),
                         "relevance with average pools": errors[preset]})
            print(f"{name}, batch {len(batch)}, {preset}: {rows[-1]}", flush=True)
    return rows


def thousand(options):
    """1,000 JPEGs, to relevance on disk by `fastdtd explain`, beside explanations of images in memory."""
    from runs import alone, make_set, timed
    with tempfile.TemporaryDirectory() as folder:
        images = make_set(Path(folder, "images"), options.pictures, 1000)
        before = alone(images, 64)
        whole = timed(images, Path(folder, "out"), "--threads", str(options.threads))["seconds"]
        result = {"ms": whole, "alone ms": (before + alone(images, 64)) / 2}  # of 1,000 images seconds are milliseconds
    result["ratio"] = result["ms"] / result["alone ms"]
    print(f"1,000 images, milliseconds an image: {result}", flush=True)
    return result


def captum(options):
    """Captum has no rule for additions and concatenations. In float32 it picks other winners of max-pools here and
    there, so its networks have average pools.
    """
    return against("Captum", [name for name in ("LeNet", "AlexNet", "VGG-16") if name in options.nets], averaged,
                   options)


def innvestigate(options):
    """iNNvestigate asks for TensorFlow 2.14, so for an environment of its own."""
    if not INNVESTIGATE.exists():
        print("iNNvestigate is not installed: make .venv-innvestigate/ready", flush=True)
        return None
    return against("iNNvestigate", [name for name in ("LeNet", "VGG-16") if name in options.nets], lambda graph: graph,
                   options)


def against(who, names, change, options):
    """What both call "deep Taylor" is z+ in the first layer too: so is ours here, on pictures without negatives. One
    target for all pictures, for iNNvestigate takes no others.
    """
    rows = []
    for name in names:
        graph = change(NETWORKS[name]())
        graph = g.Graph(graph.layers, graph.input_shape, (0 * graph.box[0], graph.box[1]))
        model, first_too = Model(graph, Preprocessing(None)), {graph.layers[0].name: "z+"}
        for batch in options.batches:
            images = pictures(graph, batch)
            scores = explainer_of(graph).predict(images).min(0)
            if scores.max() <= 0:
                sys.exit(f"{name}: a score is not positive, so the two mean different things")
            with tempfile.TemporaryDirectory() as folder:
                prepare(Path(folder), model, images, np.full(batch, scores.argmax()))
                with at_work(Path(folder), options, {"fastdtd": ("fastdtd", first_too),
                                                     who: (who, first_too)}) as contenders:
                    ours, theirs = (contenders[one].result for one in ("fastdtd", who))
                    error = float(np.linalg.norm(ours - theirs) / np.linalg.norm(ours))
                    if not error <= MOST_DISAGREEMENT:
                        sys.exit(f"{name} disagrees with {who} by {error:.1e}: not timed")
                    times = in_turns(contenders, options.seconds / 2)
            rows.append({"net": name, "batch": batch, "milliseconds": milliseconds(times, batch), "relevance": error,
                         "to fastdtd": ratio(times, who, "fastdtd")})
            print(f"{name}, batch {batch}: {who} takes {rows[-1]['to fastdtd']:.1f} times as long; relevance within "
                  f"{error:.1e}", flush=True)
    return rows


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
        explainer = ZennitExplainer(graph, zennit_rules(graph, "dtd"), torch.float32)
        explainer(torch.tensor(pictures(graph, batch)), [0] * batch)
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
    for name in [name for name in ("SqueezeNet 1.1", "VGG-16") if name in options.nets]:
        model, images = subject(name, options)
        batch = images(8)
        with tempfile.TemporaryDirectory() as folder:
            prepare(Path(folder), model, batch, explainer_of(model.graph)(batch).target)
            with Contender("fastdtd", folder, 1) as one, Contender("fastdtd", folder, 2) as two:
                result[name] = ratio(in_turns({"one": one, "two": two}, options.seconds), "one", "two")
    print(f"two threads over one, batch 8: {result}", flush=True)
    return result


def bits(options):
    """Whether the same picture gives the same bits alone, in batches, at any place, with any number of threads."""
    result = {}
    for name in options.nets:
        model, images = subject(name, options)
        batch = images(5)
        one, two, three = (fastdtd.Explainer(model, threads=count) for count in (1, 2, 3))
        alone = np.concatenate([one(batch[i:i + 1]).relevance for i in range(5)])
        others = [one(batch).relevance, two(batch).relevance, three(batch[::-1]).relevance[::-1],
                  np.concatenate([two(batch[i:i + 1]).relevance for i in range(5)])]
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


# ---- What is reached -------------------------------------------------------------------------------------------------


def goals(result):
    """(what, value, what it should be, whether it is) of the goals that the sections of a result tell of."""
    found = []

    def at_most(what, value, limit):
        found.append((what, f"{value:.3g}", f"at most {limit:g}", value <= limit))

    def at_least(what, value, limit):
        found.append((what, f"{value:.3g}", f"at least {limit:g}", value >= limit))

    rows = result.get("speed", [])
    for batch in dict.fromkeys(row["batch"] for row in rows):
        own = headline(rows, batch)
        at = f"batch {batch}"
        if own:
            to_onnx, to_pytorch = ([row["fastdtd to"][who] for row in own] for who in ("ONNX Runtime", "PyTorch"))
            at_most(f"over ONNX Runtime's forward pass, geometric mean of {len(own)}, {at}", geometric_mean(to_onnx),
                    1.5)
            at_most(f"over ONNX Runtime's forward pass, the most, {at}", max(to_onnx), 2)
            at_most(f"over PyTorch's forward pass, geometric mean, {at}", geometric_mean(to_pytorch), 0.6)
            at_most(f"over PyTorch's forward pass, the most, {at}", max(to_pytorch), 1)
            at_least(f"zennit over ours, the least, {at}", min(row["zennit to fastdtd"] for row in own), 10)
        for row in rows:
            if row["batch"] == batch and row["net"] == SQUEEZENET:
                at_most(f"over ONNX Runtime's forward pass, {row['net']}, {at}", row["fastdtd to"]["ONNX Runtime"], 1.2)
            if row["batch"] == batch and row["net"] == "VGG-16":
                at_least(f"zennit over ours, VGG-16, {at}", row["zennit to fastdtd"], 15)
    if rows:
        errors = [(row["scores"], row["relevance with average pools"]) for row in rows]
        at_most("error against float64, the most", np.max(errors), 1e-5)
        at_least("least relevance", np.min([row["least relevance"] for row in rows]), 0)
    if "memory" in result:
        at_most("peak memory over zennit's, VGG-16, batch 8", result["memory"]["ratio"], 0.4)
    if "bits" in result:
        at_most("networks whose bits depend on batch, place or threads", list(result["bits"].values()).count(False), 0)
    return found


def headline(rows, batch):
    """Each architecture once: those with random weights, without LRN."""
    return [row for row in rows if row["batch"] == batch and not row["trained"] and "LRN" not in row["net"]]


# ---- Tables ----------------------------------------------------------------------------------------------------------


def table(rows):
    """Markdown; the fastest forward pass is bold."""
    def ratios(row):
        return row["fastdtd to"][row["fastest"]], row["fastdtd to"]["PyTorch"], row["zennit to fastdtd"]

    def line(name, batch, times, values):
        return [name, batch, *times, *(f"{value:.2f}" for value in values[:2]), f"{values[2]:.1f}"]

    lines = []
    for row in rows:
        times = {who: shown(row["milliseconds"][who]) for who in (*FORWARD, "fastdtd")}
        times[row["fastest"]] = f"**{times[row['fastest']]}**"
        lines.append(line(row["net"], row["batch"], times.values(), ratios(row)))
    for batch in dict.fromkeys(row["batch"] for row in rows):
        own = [ratios(row) for row in headline(rows, batch)]
        if own:
            lines.append(line("*geometric mean, random weights, without LRN*", batch, [""] * (len(FORWARD) + 1),
                              [geometric_mean(values) for values in zip(*own, strict=True)]))
    return markdown(["network", "batch", *(f"{who}, forward" for who in FORWARD), "fastdtd, explanation",
                     "over the fastest forward", "over PyTorch's forward", "zennit over fastdtd"], lines)


def shown(value):
    """Three digits."""
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


def note(machine):
    told = " (what it has beyond is left unused, but by ONNX Runtime)" if machine["told"] else ""
    return (f"{machine['instructions']}: {machine['processor']}{told}, {machine['threads']} threads, milliseconds an "
            f"image, float32; PyTorch {machine['torch']}, ONNX Runtime {machine['onnxruntime']}, zennit "
            f"{machine['zennit']}, {machine['date']}.")


def others(result):
    """What Captum and iNNvestigate take for what they call deep Taylor, runs, memory, threads, bits and the start, as
    sentences."""
    told = []
    for who, key in (("Captum", "captum"), ("iNNvestigate", "innvestigate")):
        if rows := result.get(key):
            times, nets = [row["to fastdtd"] for row in rows], ", ".join(dict.fromkeys(row["net"] for row in rows))
            told.append(f"{who} takes {min(times):.1f} to {max(times):.0f} times as long ({nets})")
    sentences = [f"For what they call deep Taylor, z+ in the first layer too, {' and '.join(told)}."] if told else []
    if run := result.get("thousand"):
        sentences.append(f"1,000 JPEGs by SqueezeNet, to relevance on disk, take {run['ms']:.1f} ms an image, with the "
                         f"start of the process, {run['ratio']:.2f} times what explanations alone take.")
    if peak := result.get("memory"):
        sentences.append(f"Eight images of VGG-16 take at most {peak['fastdtd']['peak MiB']:.0f} MiB, "
                         f"{peak['ratio']:.2f} of zennit's.")
    if gains := result.get("threads"):
        each = ", ".join(f"{name} {gain:.2f} times" for name, gain in gains.items())
        sentences.append(f"Two threads explain batches of 8 faster than one: {each}.")
    if same := result.get("bits"):
        sentences.append(f"In any batch, at any place and with any number of threads an image has the same bits in "
                         f"{sum(same.values())} of {len(same)} networks.")
    if start := result.get("start"):
        sentences.append(f"The first heatmap takes {start['first heatmap, warm cache']:.1f} s from the start of the "
                         f"process, {start['first heatmap, empty cache']:.0f} s where kernels are not compiled yet.")
    return " ".join(sentences)


def rules_table(rows):
    return markdown(["rules", "network", "batch", "fastdtd, ms an image", "over dtd", "zennit over fastdtd"],
                    [[f"`{row['rules']}`", row["net"], row["batch"], shown(row["milliseconds"]), f"{row['to dtd']:.2f}",
                      f"{row['zennit to fastdtd']:.1f}"] for row in rows])


def goals_table(found):
    return markdown(["what was aimed at", "measured", "aim", "result"],
                    [[what, value, wanted, "reached" if holds else "missed"] for what, value, wanted, holds in found])


def write_tables():
    """Of all results: all rows, and which goals they reach, into docs/speed.md; into README.md the rows of batch 8, of
    one processor with AVX-512 and one with AVX2.
    """
    results = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("compare-*.json"))]
    results = [result for result in results if result.get("speed") and "fastest" in result["speed"][0]]
    if not results:
        print("no result has ONNX Runtime's forward pass: the tables stay as they are")
        return
    results.sort(key=lambda result: result["machine"]["date"], reverse=True)
    results.sort(key=lambda result: result["machine"]["instructions"])

    def wrapped(text):
        return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)

    parts = []
    for result in results:
        parts += [wrapped(note(result["machine"])), table(result["speed"])]
        parts += [rules_table(result["rules"])] if result.get("rules") else []
        parts += [wrapped(others(result))] if others(result) else []
        parts += [goals_table(goals(result))]
    write_table(ROOT / "docs" / "speed.md", "compare.py", "\n\n".join(parts))
    parts = []
    for instructions in ("AVX-512", "AVX2"):
        if newest := next((result for result in results if result["machine"]["instructions"] == instructions), None):
            rows = [row for row in newest["speed"] if row["batch"] == 8 and "LRN" not in row["net"]]
            parts += [wrapped(note(newest["machine"])), table(rows)]
    if parts:
        write_table(ROOT / "README.md", "compare.py", "\n\n".join(parts))


# ---- The script ------------------------------------------------------------------------------------------------------


def machine(options):
    versions = {name: importlib.metadata.version(name)
                for name in ("fastdtd", "numpy", "numba", "torch", "onnxruntime", "zennit", "captum")}
    instructions = {16: "AVX-512", 8: "AVX2"}.get(LANES, f"vectors of {LANES} floats")
    return {"processor": processor(), "target": llvm.get_host_cpu_name(), "instructions": instructions,
            "told": bool(options.isa), "threads": options.threads, "python": platform.python_version(), **versions,
            "date": datetime.date.today().isoformat()}


def start_again_with_avx2():
    """This script, in an environment in which it and all that it starts use no AVX-512; ONNX Runtime cannot be told."""
    features = ",".join(f"{'+' if has and '512' not in name and 'avx10' not in name else '-'}{name}"
                        for name, has in llvm.get_host_cpu_features().items())
    os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | {
        "NUMBA_CPU_NAME": "znver3", "NUMBA_CPU_FEATURES": features, "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2"})


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [*NETWORKS, SQUEEZENET, EFFICIENTNET]
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=SECTIONS, metavar="SECTION",
                        help=f"of {', '.join(SECTIONS)}")
    parser.add_argument("--nets", nargs="*", choices=names, default=names, metavar="NET",
                        help=f"of {', '.join(names)}")
    parser.add_argument("--models", nargs="+", type=Path, default=[], metavar="FILE",
                        help="more trained networks: model files, as `fastdtd convert` writes them")
    parser.add_argument("--pictures", type=Path, default=ROOT / "fastdtd" / "models", metavar="FOLDER",
                        help="photographs for trained networks, .jpg and .png (default: the bundled two)")
    parser.add_argument("--batches", nargs="+", type=int, default=[8, 1])
    parser.add_argument("--threads", type=int,
                        default=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())
    parser.add_argument("--seconds", type=float, default=20, help="about how long each net and batch is measured")
    parser.add_argument("--isa", choices=["avx2"], help="use AVX2 on a processor that has AVX-512")
    parser.add_argument("--save", action="store_true",
                        help="write benchmarks/results/compare-<processor>.json, and the tables")
    parser.add_argument("--tables", action="store_true",
                        help="only write the tables of docs/speed.md and README.md, from benchmarks/results")
    options = parser.parse_args()
    if options.tables:
        write_tables()
        return
    if options.isa and "ATEN_CPU_CAPABILITY" not in os.environ:
        start_again_with_avx2()
    options.pictures = sorted(path for path in options.pictures.iterdir() if path.suffix in (".jpg", ".png"))
    options.models = {f"{path.stem}, trained": path for path in options.models}
    options.nets = [*options.nets, *options.models]
    result = {"machine": machine(options)}
    print(result["machine"], flush=True)
    for section in options.only:
        result[section] = globals()[section](options)
    if "speed" in result:
        print(table(result["speed"]))
    for what, value, wanted, holds in goals(result):
        print(f"{'reached' if holds else 'MISSED':7}  {what}: {value} ({wanted})")
    if options.save:
        suffix = f"-{options.isa}" if options.isa else ""
        path = RESULTS / f"compare-{result['machine']['target']}{suffix}.json"
        path.parent.mkdir(exist_ok=True)
        before = json.loads(path.read_text()) if path.exists() else {"machine": {}}
        if before["machine"].keys() == result["machine"].keys():  # else it is of a time when other things were measured
            result = before | result
        path.write_text(json.dumps(result, indent=1) + "\n")
        write_tables()


if __name__ == "__main__":
    main()
