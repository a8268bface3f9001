"""How fast is an explanation on a GPU, next to PyTorch's forward pass, zennit's explanation and what the chip can do?
And is it right?

    python benchmarks/gpu.py                            # all, in 8 minutes at most; nothing has to be installed
    python benchmarks/gpu.py --only correct --nets "ResNet-18"
    python benchmarks/gpu.py --zennit FOLDER            # where zennit is not installed: a folder that has it

Needs numba-cuda, CuPy and h5py; PyTorch and zennit are measured where they are there. First each network is held to the
explanation on the processor, and nothing is timed once one is wrong (status 1). For that average pools stand in for
max-pools: with these, rounding picks another winner here and there. Of the network as it is, scores and conservation
are checked.

Then times. Contenders run in turns, so that what the clock of the chip does meets all of them; times are medians over
the turns, ratios are medians of the turns' ratios. Of each kernel the time between two events of the device is shown
next to what was measured right before: a copy from device to device, and a loop of nothing but mma.sync, the
instruction that the convolutions use (PyTorch's product of large matrices, by other instructions, can be faster). What
there is no time for is left out, and said. benchmarks/results/gpu-<chip>.json has every number; sections that were not
run stay as they are there.
"""

import argparse
import datetime
import functools
import gc
import importlib.machinery
import importlib.metadata
import importlib.util
import json
import platform
import re
import statistics
import sys
import time
import types
import warnings
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def make_importable():
    """fastdtd from the checkout, unless it is installed: then its kernels, which are mapped there by setuptools, lie in
    another folder."""
    found = importlib.util.find_spec("fastdtd")
    if found is not None and any(finder.find_spec("fastdtd.kernels", found.submodule_search_locations)
                                 for finder in sys.meta_path):
        return
    sys.path.insert(0, str(ROOT))
    folder = ROOT / "kernels"
    spec = importlib.util.spec_from_file_location("fastdtd.kernels", folder / "__init__.py",
                                                  submodule_search_locations=[str(folder)])
    sys.modules[spec.name] = kernels = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(kernels)
    importlib.import_module("fastdtd").kernels = kernels


make_importable()
sys.path.insert(0, str(ROOT / "benchmarks"))

import numpy as np  # noqa: E402  # after the paths
from networks import NETWORKS, averaged, pictures  # noqa: E402  # as above
from numba import config  # noqa: E402  # as above
from steps import Steps  # noqa: E402  # as above

import fastdtd  # noqa: E402  # as above
from fastdtd import devices  # noqa: E402  # as above
from fastdtd import graph as g  # noqa: E402  # as above
from fastdtd.errors import DeviceError  # noqa: E402  # as above
from fastdtd.lowering import lower  # noqa: E402  # as above
from fastdtd.model import Model, Preprocessing  # noqa: E402  # as above
from fastdtd.plan import OutOfMemoryError  # noqa: E402  # as above
from fastdtd.rules import assign  # noqa: E402  # as above

DEVICE = "cuda:0"
NETS = ["SqueezeNet 1.1", "ResNet-18", "VGG-16", "AlexNet", "GoogLeNet"]
ZENNIT_NETS = ["ResNet-18", "VGG-16"]
LIMITS = {"fp32": 1e-5, "3xtf32": 1e-5, "tf32": 1e-3}  # of each precision's difference from the processor
SECTIONS = ("correct", "ceilings", "speed", "kernels", "memory")
KERNELS_BATCH = 32
_SECONDS = 2  # about, for which contenders take turns
_WARM = 4  # calls: kernels are compiled in the first, and each plan is captured in its second
_HEAD_START = 40  # copies that the device is busy with while the first launches are queued


def say(text):
    print(text, flush=True)


def explainer_of(graph, precision=None, device=DEVICE):
    return fastdtd.Explainer(Model(graph, Preprocessing(None)), device=device, precision=precision)


def precisions():
    """Those that the chip has."""
    def has(precision):
        try:
            return bool(devices.find(DEVICE, precision))
        except DeviceError:
            return False

    return [precision for precision in LIMITS if has(precision)]


# ---- Right before fast -----------------------------------------------------------------------------------------------


def check(name, graph, count=3, wanted=tuple(LIMITS)):
    """(rows, what is wrong, in words): each precision next to the processor, and the network with its max-pools in the
    first of them."""
    rows, wrong = [], []
    cases = [(averaged(graph), precision, "") for precision in wanted]
    if any(isinstance(layer, g.MaxPool2d) for layer in graph):
        cases.append((graph, wanted[0], "max-pools as they are"))
    expected, expected_of = None, None
    for tested, precision, remark in cases:
        images = pictures(tested, count)
        if expected_of is not tested and (expected is None or remark):
            expected, expected_of = explainer_of(tested, device="cpu")(images), tested
        start = time.perf_counter()
        e = explainer_of(tested, precision)(images, expected.target)
        row = {"net": name, "precision": precision, "remark": remark, **differences(e, expected),
               "limit": LIMITS[precision], "first call, seconds": time.perf_counter() - start}
        rows.append(row)
        judged = ["scores", "conserved"] if remark else ["scores", "relevance", "conserved"]
        found = [f"{what} differ{'s' * (what == 'relevance')} by {row[what]:.1e}" if what != "conserved" else
                 f"relevance and ledger miss what is explained by {row[what]:.1e}" for what in judged
                 if not row[what] <= LIMITS[precision]]
        found += [f"relevance of {row['least']:.1e}"] * (not row["least"] >= 0)
        found += ["a score that is not positive, which leaves nothing to compare"] * (not row["least explained"] > 0)
        wrong += [f"{name}, {precision}{', ' * bool(remark)}{remark}: {what}" for what in found]
        say(f"{name}, {precision}{', ' * bool(remark)}{remark}: scores {row['scores']:.1e}, relevance "
            f"{row['relevance']:.1e}, conserved {row['conserved']:.1e}, least relevance "
            f"{row['least']:.1e}; {row['first call, seconds']:.1f} s with compilation")
    return rows, wrong


def differences(e, expected):
    """The largest of all images, relative; the least relevance, and the least score that is explained."""
    def norm(relevance):
        return np.linalg.norm(relevance.reshape(len(relevance), -1).astype(np.float64), axis=1)

    with np.errstate(invalid="ignore", divide="ignore"):
        kept = e.relevance.sum((1, 2, 3), dtype=np.float64) + e.absorbed
        return {"scores": float(np.max(np.abs(e.output - expected.output).max(1) / np.abs(expected.output).max(1))),
                "relevance": float(np.max(norm(e.relevance - expected.relevance) / norm(expected.relevance))),
                "conserved": float(np.max(np.abs(kept - e.explained) / e.explained)), "least": float(e.relevance.min()),
                "least explained": float(e.explained.min())}


def correct(options):
    """Also takes networks that there was no time to check from those that are timed."""
    rows = []
    for name in list(options.nets):
        if options.left() < 30:
            say(f"{name}: no time is left for it, so it is neither checked nor timed")
            options.nets = [other for other in options.nets if other != name]
            continue
        found, wrong = check(name, NETWORKS[name](), wanted=options.precisions)
        rows += found
        if wrong:
            options.save({"correct": rows})
            say("Wrong, so nothing is timed:\n  " + "\n  ".join(wrong))
            sys.exit(1)
        release()
    return rows


# ---- What the chip can do --------------------------------------------------------------------------------------------


def ceilings(options):
    import cupy
    source = cupy.ones(1 << 28, np.float32)
    to = cupy.empty_like(source)
    found = {"copy, bytes a second": 2 * source.nbytes / fastest(functools.partial(cupy.copyto, to, source))}
    del source, to
    if "tf32" in options.precisions:
        found["mma.sync in TF32, operations a second"] = tensor_core_rate()
    if options.torch:
        import torch
        a, b = (torch.randn(8192, 8192, device="cuda") for _ in range(2))
        for name, wanted in (("TF32", True), ("float32", False)):
            allow_tf32(wanted)
            seconds = fastest_of_torch(lambda: a @ b)
            found[f"PyTorch's product of matrices in {name}, operations a second"] = 2 * 8192**3 / seconds
        del a, b
    for name, value in found.items():
        say(f"{name}: {value:.3g}")
    release()
    return found


def fastest(function, rounds=10):
    """Seconds of the device for what `function` launches in CuPy's current stream."""
    import cupy
    begin, end, times = cupy.cuda.Event(), cupy.cuda.Event(), []
    for _ in range(rounds):
        begin.record()
        function()
        end.record()
        end.synchronize()
        times.append(cupy.cuda.get_elapsed_time(begin, end) / 1e3)
    return min(times[2:])


def fastest_of_torch(function, rounds=10):
    """The same in PyTorch's stream."""
    import torch
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    times = []
    for _ in range(rounds):
        begin.record()
        function()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return min(times[2:])


def tensor_core_kernel():
    """A kernel whose warps do nothing but 4 * count mma.sync in TF32, all operands in registers; its sums keep the
    compiler from leaving them out."""
    from fastdtd.kernels.cuda.vector_code import mma
    from numba import cuda

    def repeat(out, w, b, count):
        zero = np.float32(0)
        p = q = r = s = (zero, zero, zero, zero)
        for _ in range(count):
            p = mma(w, w, w, w, b, b, p[0], p[1], p[2], p[3])
            q = mma(w, w, w, w, b, b, q[0], q[1], q[2], q[3])
            r = mma(w, w, w, w, b, b, r[0], r[1], r[2], r[3])
            s = mma(w, w, w, w, b, b, s[0], s[1], s[2], s[3])
        out[cuda.grid(1)] = p[0] + q[1] + r[2] + s[3]

    return repeat


def tensor_core_rate():
    """Operations a second of that kernel, with 32 warps on each multiprocessor."""
    import cupy
    from numba import cuda
    blocks, threads, count = 4 * cupy.cuda.Device().attributes["MultiProcessorCount"], 256, 20000
    kernel, out = cuda.jit(tensor_core_kernel()), cupy.empty(blocks * threads, np.float32)
    arguments = cuda.as_cuda_array(out), np.float32(1), np.float32(1), count
    return blocks * threads // 32 * count * 4 * 2 * 16 * 8 * 8 / fastest(lambda: kernel[blocks, threads](*arguments))


# ---- Speed -----------------------------------------------------------------------------------------------------------


class _PlaceholderLoader:
    """Modules of which any name is an empty class."""

    def create_module(self, spec):
        module = types.ModuleType(spec.name)
        module.__getattr__ = self._name
        return module

    def exec_module(self, module):
        pass

    @staticmethod
    def _name(name):
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


class _Placeholders:
    """Stand-ins for what tests/peers/torch_nets.py and zennit import and these measurements do not use, where it is not
    installed."""

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("captum", "torchvision", "zennit"):
            return importlib.machinery.ModuleSpec(name, _PlaceholderLoader(), is_package=True)
        return None


def find_peers(zennit):
    """Whether there is a PyTorch that sees the GPU, and whether there is zennit, in the folder `zennit` if one is
    given."""
    sys.path[:0] = [str(ROOT / "tests" / "peers"), *([zennit] if zennit else [])]
    if importlib.util.find_spec("torch") is None:
        say("PyTorch is not installed: its columns stay empty")
        return False, False
    import torch
    if not torch.cuda.is_available():
        say(f"PyTorch {torch.__version__} sees no GPU: its columns stay empty")
        return False, False
    torch.backends.cudnn.benchmark = True
    has_zennit = importlib.util.find_spec("zennit") is not None
    if not has_zennit:
        say("zennit is not installed, and --zennit names no folder that has it: its column stays empty")
    sys.meta_path.append(_Placeholders())
    return True, has_zennit


def allow_tf32(wanted):
    import torch
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = wanted


def forward_of(graph, images, tf32):
    """PyTorch's forward pass, as a function of no arguments."""
    import torch
    from torch_nets import Net
    with torch.device("cuda"):
        net, tensor = Net(graph).eval(), torch.tensor(images)
    for module in net.modules():
        if isinstance(module, torch.nn.ReLU):
            module.inplace = True

    def forward():
        allow_tf32(tf32)
        with torch.inference_mode():
            return net(tensor)

    return forward


def zennit_of(graph, images, targets):
    """zennit's explanation by the same rules, as a function of no arguments."""
    import torch
    from torch_nets import ZennitExplainer
    rules = {name: rule.name for name, rule in fastdtd.rules.assign(graph, "dtd").rules.items()}
    with torch.device("cuda"):
        explainer, tensor = ZennitExplainer(graph, rules, torch.float32), torch.tensor(images)
        chosen = torch.tensor(targets)

    def explain():
        allow_tf32(True)
        return explainer(tensor, chosen)

    return explain


def contenders(name, graph, wanted, batch, options):
    """Functions of no arguments: ours in each of the precisions, and in the first of them with arrays of the host; the
    peers'."""
    import cupy
    images, explainers = pictures(graph, batch), [explainer_of(graph, precision) for precision in wanted]
    beside, targets = cupy.asarray(images), explainers[0](images).target
    made = {f"fastdtd, {precision}": functools.partial(explainer, beside, targets)
            for precision, explainer in zip(wanted, explainers, strict=True)}
    made["fastdtd, from the host"] = functools.partial(explainers[0], images, targets)
    if options.torch:
        made |= {"PyTorch, TF32": forward_of(graph, images, True), "PyTorch, float32": forward_of(graph, images, False)}
    if options.has_zennit and name in ZENNIT_NETS:
        made["zennit"] = zennit_of(graph, images, targets)
    return made


def synchronize():
    import cupy
    cupy.cuda.Device().synchronize()


def is_out_of_memory(error):
    """CuPy and PyTorch each have an error of this name."""
    return type(error).__name__ == "OutOfMemoryError"


def measure(functions, seconds=_SECONDS):
    """Seconds of each call, in turns, for about so long; zennit has a third of the turns. None for what does not fit
    into memory."""
    times = {name: [] for name in functions}
    for name, function in functions.items():
        try:
            for _ in range(1 if name == "zennit" else _WARM):
                function()
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            say(f"    {name}: more memory than there is")
            times[name] = None
        release()
    end, turn = time.perf_counter() + seconds, 0
    while time.perf_counter() < end or turn < 4:
        for name, function in functions.items():
            if times[name] is None or (name == "zennit" and turn % 3):
                continue
            synchronize()
            start = time.perf_counter()
            function()
            synchronize()
            times[name].append(time.perf_counter() - start)
        turn += 1
    return times


def ratio(times, who, to):
    """Median over the turns that both have of how many times as long `who` takes; None where one has none."""
    if not times.get(who) or not times.get(to):
        return None
    every = 3 if who == "zennit" else 1
    return statistics.median(a / b for a, b in zip(times[who], times[to][::every], strict=True))


def speed(options):
    rows = []
    for name in options.nets:
        graph = NETWORKS[name]()
        wanted = [precision for precision in ("tf32", "3xtf32") if precision in options.precisions] or ["fp32"]
        ours = f"fastdtd, {wanted[0]}"
        for batch in options.batches:
            if options.left() < 20:
                say(f"{name}, batch {batch}: no time is left for it")
                continue
            functions = contenders(name, graph, wanted, batch, options)
            times = measure(functions)
            medians = {who: None if values is None else statistics.median(values) for who, values in times.items()}
            rows.append({"net": name, "batch": batch,
                         "images a second": {who: value and batch / value for who, value in medians.items()},
                         "spread": {who: values
                                    and float(np.subtract(*np.percentile(values, [75, 25])) / statistics.median(values))
                                    for who, values in times.items()},
                         "turns": len(times[ours]), "to PyTorch's forward": ratio(times, ours, "PyTorch, TF32"),
                         "zennit to ours": ratio(times, "zennit", ours)})
            say(f"{name}, batch {batch}: " + ", ".join(f"{who} {value:.0f}" for who,
                                                       value in rows[-1]["images a second"].items() if value)
                + " images a second")
            del functions
            release()
    return rows


def release():
    """Give back what nobody uses: the libraries keep their memory apart."""
    gc.collect()
    if "cupy" in sys.modules:
        import cupy
        cupy.get_default_memory_pool().free_all_blocks()
    if "torch" in sys.modules:
        import torch
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


# ---- Kernels ---------------------------------------------------------------------------------------------------------


class DeviceSteps(Steps):
    """A plan on the device, step by step. Use it within `kernels.on_device`, for graphs are not captured in the default
    stream."""

    def __init__(self, graph, batch, precision):
        found = devices.find("cuda:0", precision)
        self.kernels, self.graph = found.kernels, graph
        with self.kernels.on_device(0):
            schedule = lower(graph, assign(graph), self.kernels, found.precision_code).schedule(batch)
            self._bind(schedule, self.kernels.constant(pictures(graph, batch)))

    def floor(self, step, ceiling, copy_rate):
        """Seconds that the step takes at least: tensor cores have y and z as a product each, and memory is no faster
        than copying."""
        products = self.operations(step) if self.kernel(step).startswith("conv2d") else 0
        return max(products / ceiling, self.least_bytes(step) / copy_rate)


def device_times(steps, rounds=7):
    """Median seconds of each step between two events; in the first rounds kernels are compiled, and steps captured.

    The device is kept busy until launches are queued, or events would tell how long Python takes.
    """
    import cupy
    busy = cupy.empty((2, 1 << 27), np.float32)
    times = [[] for _ in range(len(steps))]
    for turn in range(rounds):
        events = [[cupy.cuda.Event() for _ in range(2)] for _ in times]
        for _ in range(_HEAD_START):
            cupy.copyto(busy[0], busy[1])
        for step, (begin, end) in enumerate(events):
            steps.advance_to(step)
            begin.record()
            steps.run(step)
            end.record()
        cupy.cuda.get_current_stream().synchronize()
        for own, (begin, end) in zip(times, events, strict=True):
            if turn >= 2:
                own.append(cupy.cuda.get_elapsed_time(begin, end) / 1e3)
    return [statistics.median(own) for own in times]


def kernels(options):
    top, rate = options.ceilings.get("mma.sync in TF32, operations a second"), options.ceilings["copy, bytes a second"]
    rows = []
    for name in options.nets:
        if options.left() < 30:
            say(f"kernels of {name}: no time is left for them")
            continue
        try:
            steps = DeviceSteps(NETWORKS[name](), KERNELS_BATCH, options.precisions[-1])
        except OutOfMemoryError as error:
            say(f"kernels of {name}: {error}")
            continue
        with steps.kernels.on_device(0):
            times = device_times(steps)
        own = [{"layer": steps.layer(step).name, "kernel": steps.kernel(step), "seconds": seconds,
                "operations": steps.operations(step), "least bytes": steps.least_bytes(step),
                **({"times floor": seconds / steps.floor(step, top, rate)} if top else {})}
               for step, seconds in enumerate(times)]
        rows.append({"net": name, "batch": KERNELS_BATCH, "precision": options.precisions[-1], "seconds": sum(times),
                     "steps": own, "kernels": by_kernel(own, top, rate)})
        say(f"kernels of {name}: {sum(times) * 1e3:.2f} ms for {KERNELS_BATCH} images")
        del steps
        release()
    return rows


def by_kernel(steps, top, rate):
    """Sums by kernel, the slowest first: convolutions by their operations, others by bytes, each with its share of a
    ceiling."""
    sums = defaultdict(lambda: np.zeros(4))
    for step in steps:
        sums[step["kernel"]] += 1, step["seconds"], step["operations"], step["least bytes"]
    total, found = sum(step["seconds"] for step in steps), {}
    for name, (count, seconds, operations, nbytes) in sorted(sums.items(), key=lambda item: -item[1][1]):
        multiplies = name.startswith("conv2d") and operations > 0
        found[name] = {"steps": int(count), "seconds": float(seconds), "of all": float(seconds / total)}
        if multiplies:
            found[name] |= {"operations a second": float(operations / seconds),
                            "share of mma.sync": float(operations / seconds / top) if top else None}
        else:
            found[name] |= {"bytes a second": float(nbytes / seconds), "share of copy": float(nbytes / seconds / rate)}
    return found


# ---- Memory ----------------------------------------------------------------------------------------------------------


def memory(options):
    """Of the device, with weights: what CuPy's pool holds after an explanation, and the most that PyTorch allocated for
    zennit's."""
    import cupy
    rows = []
    for name in [name for name in ZENNIT_NETS if name in options.nets]:
        if options.left() < 10:
            say(f"memory of {name}: no time is left for it")
            continue
        graph = NETWORKS[name]()
        images = pictures(graph, KERNELS_BATCH)
        release()
        pool, explainer = cupy.get_default_memory_pool(), explainer_of(graph)
        before = pool.used_bytes()
        targets = explainer(cupy.asarray(images)).target
        row = {"net": name, "batch": KERNELS_BATCH, "fastdtd, weights": before, "fastdtd, used": pool.used_bytes(),
               "fastdtd, pool": pool.total_bytes(), "zennit, most allocated": None}
        del explainer
        release()
        if options.has_zennit:
            import torch
            try:
                torch.cuda.reset_peak_memory_stats()
                zennit_of(graph, images, targets)()
                row["zennit, most allocated"] = torch.cuda.max_memory_allocated()
            except torch.cuda.OutOfMemoryError:
                say(f"memory of {name}: zennit needs more than there is")
            release()
        rows.append(row)
    return rows


# ---- The script ------------------------------------------------------------------------------------------------------


def machine():
    """The device, what runs on it, and from where."""
    import cupy
    properties, runtime = cupy.cuda.runtime.getDeviceProperties(0), cupy.cuda.runtime

    def version(package):
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return None

    versions = {name: version(name) for name in ("numpy", "numba", "numba-cuda", "torch", "zennit")}
    return {"device": properties["name"].decode(), "compute capability": f"{properties['major']}.{properties['minor']}",
            "multiprocessors": properties["multiProcessorCount"], "memory": properties["totalGlobalMem"],
            "CUDA of the driver": runtime.driverGetVersion(), "CUDA": runtime.runtimeGetVersion(),
            "cupy": cupy.__version__, **versions, "python": platform.python_version(), "fastdtd": fastdtd.__version__,
            "date": datetime.date.today().isoformat()}


def path_of(device):
    """benchmarks/results/gpu-h100-80gb-hbm3.json for an "NVIDIA H100 80GB HBM3"."""
    words = re.findall(r"[a-z0-9]+", device.lower())
    return ROOT / "benchmarks" / "results" / f"gpu-{'-'.join(word for word in words if word != 'nvidia')}.json"


def save(path, result):
    path.parent.mkdir(parents=True, exist_ok=True)
    result = (json.loads(path.read_text()) if path.exists() else {}) | result
    path.write_text(json.dumps(result, indent=1) + "\n")


def table(result):
    """Markdown of what was measured."""
    lines = []
    if result.get("speed"):
        names = list(dict.fromkeys(who for row in result["speed"] for who in row["images a second"]))
        lines += ["", "Images a second; of ratios the first is the time of an explanation to that of PyTorch's forward "
                  "pass with TF32", "",
                  f"| network | batch | {' | '.join(names)} | to PyTorch's forward | zennit to ours |",
                  f"| --- | ---: | {' | '.join(['---:'] * (len(names) + 2))} |"]
        for row in result["speed"]:
            numbers = [_number(row["images a second"].get(who), ",.0f") for who in names]
            ratios = [_number(row[key], ".2f") for key in ("to PyTorch's forward", "zennit to ours")]
            lines.append(f"| {row['net']} | {row['batch']} | {' | '.join(numbers + ratios)} |")
    for row in result.get("kernels", []):
        of = f"{row['net']}, {row['batch']} images, {row['precision']}"
        lines += ["", f"{of}: {row['seconds'] * 1e3:.2f} ms of kernels", "",
                  "| kernel | steps | ms | of all | rate | of its ceiling |",
                  "| --- | ---: | ---: | ---: | ---: | ---: |"]
        for name, own in row["kernels"].items():
            if "operations a second" in own:
                rate, share = f"{own['operations a second'] / 1e12:.1f} TFLOP/s", own["share of mma.sync"]
            else:
                rate, share = f"{own['bytes a second'] / 1e9:.0f} GB/s", own["share of copy"]
            lines.append(f"| {name} | {own['steps']} | {own['seconds'] * 1e3:.3f} | {own['of all']:.0%} | {rate} | "
                         f"{_number(share, '.0%')} |")
    if result.get("memory"):
        lines += ["",
                  "| network | batch | fastdtd, MiB used | of them weights | of CuPy's pool | zennit, MiB at most |",
                  "| --- | ---: | ---: | ---: | ---: | ---: |"]
        for row in result["memory"]:
            keys = ("fastdtd, used", "fastdtd, weights", "fastdtd, pool", "zennit, most allocated")
            numbers = [_number(row[key] and row[key] / 2**20, ",.0f") for key in keys]
            lines.append(f"| {row['net']} | {row['batch']} | {' | '.join(numbers)} |")
    return "\n".join(lines)


def _number(value, how):
    return "" if value is None else format(value, how)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=SECTIONS, metavar="SECTION",
                        help=f"of {', '.join(SECTIONS)}")
    parser.add_argument("--nets", nargs="+", choices=list(NETWORKS), default=NETS, metavar="NET",
                        help=f"of {', '.join(NETWORKS)}")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 32, 256])
    parser.add_argument("--minutes", type=float, default=8, help="what there is no time for is left out")
    parser.add_argument("--zennit", metavar="PATH", help="a folder that has zennit, where it is not installed")
    options = parser.parse_args(arguments)
    end = time.monotonic() + 60 * options.minutes
    options.left = lambda: end - time.monotonic()
    warnings.simplefilter("ignore", fastdtd.explainer.ExplanationWarning)
    try:
        devices.find(DEVICE, None)
    except DeviceError as error:
        print(f"gpu.py: {error}", file=sys.stderr)
        return 2
    options.precisions = precisions()
    wanted, result = [section for section in SECTIONS if section in options.only], {}
    if config.ENABLE_CUDASIM:
        say("Numba's simulator stands in for a GPU, so nothing is timed")
        wanted, result["machine"] = [section for section in wanted if section == "correct"], {"device": "simulator"}
    else:
        result["machine"] = machine()
    path = path_of(result["machine"]["device"])
    options.save = lambda part: save(path, result | part)
    say(f"{result['machine']}\nfastdtd is that of {Path(fastdtd.__file__).parent}")
    options.torch, options.has_zennit = find_peers(options.zennit) if set(wanted) - {"correct"} else (False, False)
    if "kernels" in wanted and "ceilings" not in wanted:
        wanted.insert(wanted.index("kernels"), "ceilings")
    for section in wanted:
        say(f"\n{section}, with {options.left():.0f} s left")
        result[section] = globals()[section](options)
        options.ceilings = result.get("ceilings")
        options.save({})
    say(table(result))
    say(f"\nAll numbers: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
