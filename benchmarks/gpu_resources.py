"""What does each CUDA kernel take of a multiprocessor? Registers, shared memory, spills, blocks at a time; no GPU is
needed.

    .venv/bin/python benchmarks/gpu_resources.py               # a table
    .venv/bin/python benchmarks/gpu_resources.py --json        # the same for programs (tests/test_cuda_compiled.py)
    .venv/bin/python benchmarks/gpu_resources.py --docs        # writes the table into docs/cuda.md

Plans of networks are made and run with launches that are written down instead of done. Each kernel is then compiled
with the types that it was launched with, by numba-cuda to PTX and by ptxas (of the package nvidia-cuda-nvcc) for sm_80
and sm_90. Needs `pip install "fastdtd[cuda]" nvidia-cuda-nvcc`.
"""

import argparse
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ["NUMBA_ENABLE_CUDASIM"] = "0"  # before Numba is imported

import fastdtd.kernels
import numpy as np
from networks import alexnet, googlenet, mobilenet, resnet18, vgg16
from numba import cuda, types
from numba.cuda import dispatcher

from fastdtd import graph as g
from fastdtd.lowering import lower
from fastdtd.plan import Plan
from fastdtd.rules import assign, search_direction

ROOT = Path(__file__).resolve().parents[1]
# compute capability: KiB of shared memory, threads of a multiprocessor
CHIPS = {(8, 0): (164, 2048), (9, 0): (228, 2048)}
_REGISTERS = 65536
PRECISIONS = ("fp32", "tf32", "3xtf32")
SUMS = ("SUM", "PAIR", "SIGNED_PAIR", "SPLIT")
FEATURES = ("NONNEGATIVE", "SIGNED", "BOX", "ONES", "VALUE", "NEGATED")
WEIGHTS = ("POSITIVE", "NEGATIVE", "AS_IS", "SQUARED", "FLAT")


# ---- Which kernels ---------------------------------------------------------------------------------------------------


def as_if_on_a_device():
    """Kernels for GPUs that take NumPy's arrays."""
    device = fastdtd.kernels.load("cuda")
    memory, steps = sys.modules["fastdtd.kernels.cuda.memory"], sys.modules["fastdtd.kernels.cuda.steps"]
    for module in (memory, steps):
        module.cupy, module.arrays, module.as_device_array = None, np, lambda array: array
    return device


def recorded_launches():
    """{kernel: types of its arguments}, and threads of its blocks, of all that a set of networks and rules launches."""
    launched = {}

    class Recorder:
        def __init__(self, kernel, threads):
            self.kernel, self.threads = kernel, threads

        def __call__(self, *arguments):
            launched.setdefault(self.kernel, (tuple(_type_of(argument) for argument in arguments), self.threads))

    dispatcher.CUDADispatcher.__getitem__ = lambda kernel, shape: Recorder(kernel, shape[1])
    device = as_if_on_a_device()
    for precision, (graph, rules) in itertools.product(range(3), _cases()):
        network = lower(graph, assign(graph, rules), device, precision)
        for observed in ([], [g.INPUT]):
            plan = Plan(network.schedule(1, observed=observed), device)
            plan.forward()
            plan.backward()
    return launched


def _type_of(argument):
    if isinstance(argument, np.ndarray):
        return types.Array(_NUMBERS[argument.dtype.name], argument.ndim, "C")
    return types.float32 if isinstance(argument, np.float32) else types.int64


_NUMBERS = {"float32": types.float32, "float64": types.float64, "int64": types.int64, "int32": types.int32,
            "uint8": types.uint8}


def _cases():
    """Networks whose speed matters, and one of every other layer under every kind of rule."""
    for network in (vgg16, resnet18, mobilenet, googlenet, alexnet):
        yield network(), "dtd"
    for rules in rules_of_every_kind():
        yield every_layer(100, 120, 20, 40, 10), rules
        yield every_layer(96, 112, 32, 48, 16), rules
    yield g.Graph((g.GlobalAveragePool("mean", (g.INPUT,)), g.Activation("gate", ("mean",), "sigmoid"),
                   g.Softmax("softmax", ("gate",)), g.Multiply("gated", (g.INPUT, "softmax")),
                   g.Flatten("scores", ("gated",))), (3, 8, 8)), "gradient"
    for rule in ("zB", "w2", "flat"):
        yield g.Graph((g.Dense("scores", (g.INPUT,), np.ones((3, 7))),), (7, 1, 1), (-1.0, 1.0)), {"scores": rule}


def rules_of_every_kind():
    """For every_layer."""
    bounded = search_direction(lambda a, w, low, high: a - low if w > 0 else a - high)
    direction = search_direction(lambda a, w: a if w > 0 else 0.0)
    # as zennit's and Captum's presets, which refuse group norms
    sums = dict.fromkeys(("type:dense", "type:add", "type:average_pool2d", "type:group_norm"), "epsilon")
    return ["dtd", "gradient", ["dtd", {"type:conv2d": "z+(bias=absorbed, epsilon=1e-6)", **sums}],
            ["dtd", {"type:conv2d": "alpha-beta(alpha=2, beta=1)", **sums}],
            ["dtd", {"type:conv2d": "gamma(gamma=0.25)", **sums}, {"first": "zB"}],
            ["dtd", {"type:conv2d": "epsilon", **sums}],
            ["dtd", {"type:conv2d": "z+(bias=shared)", "type:dense": "alpha-beta(alpha=2, beta=1, bias=shared)"},
             {"pool": "proportional", "norm": "taylor"}],
            ["dtd", {"first": "w2", "few": "flat", "many": direction}], ["dtd", {"first": bounded}]]


def every_layer(first, many, few, middle, groups):
    """Of so many outputs each."""
    random = np.random.default_rng(0)

    def conv(name, source, inputs, outputs, **options):
        return g.Conv2d(name, (source,), random.standard_normal((outputs, inputs, 3, 3), np.float32), None,
                        padding=(1,) * 4, **options)

    numbers = 2 * few * 16
    return g.Graph((
        conv("first", g.INPUT, 3, first), g.LeakyReLU("leaky", ("first",), 0.1),
        g.LocalResponseNorm("norm", ("leaky",), 5, 1e-4, 0.75), conv("many", "norm", first, many),
        g.ReLU("r", ("many",)), conv("few", "r", many // groups, few, groups=groups), g.Clip("clip", ("few",), 0, 6),
        conv("to middle", "few", few, middle), conv("from middle", "to middle", middle, few),
        g.Add("sum", ("clip", "from middle")), g.MaxPool2d("pool", ("sum",), (2, 2), (2, 2)),
        g.AveragePool2d("mean", ("sum",), (2, 2), (2, 2)), g.Concat("both", ("pool", "mean")),
        g.Resize("resized", ("both",), *[(np.eye(4) + np.eye(4, k=1)) / 2] * 2),
        g.GroupNorm("groups", ("resized",), np.ones(2 * few), np.zeros(2 * few), 2), g.Power("power", ("groups",), 2.0),
        g.Rearrange("moved", ("power",), np.arange(-1, numbers - 1).reshape(2 * few, 4, 4)),
        g.GlobalAveragePool("average", ("moved",)), g.Flatten("flat", ("average",)), g.Flatten("flat2", ("moved",)),
        g.GlobalAveragePool("of a part", ("pool",)), g.Flatten("flat3", ("of a part",)),
        g.Concat("numbers", ("flat", "flat2", "flat3")),
        g.Dense("scores", ("numbers",), random.standard_normal((7, 3 * few + numbers), np.float32), None), ), (3, 8, 8),
                   (-1.0, 2.0))


def names_of(kernels):
    """A kernel that a function makes has its name and what it was made for."""
    from fastdtd.kernels.cuda import conv2d, dense
    made = {}
    for rows, sums, precision, in_planes in itertools.product((16, 64, 128), range(4), range(3), (False, True)):
        for factory, verb in ((conv2d._forward_kernel, "forward"), (conv2d._redistribute_kernel, "redistribute")):
            made[factory, rows, sums, precision, in_planes] = (
                f"conv2d_{verb}",
                f"{PRECISIONS[precision]}, {SUMS[sums]}, {rows} rows{', in planes' if in_planes else ''}")
    for features in range(len(FEATURES)):
        made[dense._forward_kernel, features] = "dense_forward", FEATURES[features]
    for weights, both in itertools.product(range(len(WEIGHTS)), (False, True)):
        made[dense._redistribute_kernel, weights,
             both] = "dense_redistribute", WEIGHTS[weights] + ", both features" * both
    names = {factory(*arguments): name for (factory, *arguments), name in made.items()}
    return {kernel: names.get(kernel, (f"{kernel.__module__.rpartition('.')[2]}.{kernel.__name__.strip('_')}", ""))
            for kernel in kernels}


def kernels_of_modules():
    """All kernels that stand in the files, not those that a function makes."""
    modules = [module for name, module in sys.modules.items() if name.startswith("fastdtd.kernels.cuda.")]
    return {value for module in modules for value in vars(module).values()
            if isinstance(value, dispatcher.CUDADispatcher) and not value.targetoptions.get("device")}


# ---- What they take --------------------------------------------------------------------------------------------------


def resources(kernel, arguments, threads, capability, folder):
    """What ptxas says: registers of a thread, bytes of shared memory, of stack and of spills; and how many blocks
    fit."""
    ptx, _ = cuda.compile_ptx(kernel.py_func, arguments, cc=capability)
    path = Path(folder, "kernel.ptx")
    path.write_text(ptx)
    most = kernel.targetoptions.get("max_registers")
    said = subprocess.run([_ptxas(), "-v", f"-arch=sm_{capability[0]}{capability[1]}",
                           *([f"-maxrregcount={most}"] if most else []), path, "-o", path.with_suffix(".cubin")],
                          capture_output=True, text=True, check=True).stderr
    numbers = {name: sum(map(int, re.findall(pattern, said))) for name, pattern in (
        ("registers", r"Used (\d+) registers"), ("shared", r"(\d+) bytes smem"), ("stack", r"(\d+) bytes stack frame"),
        ("spills", r"(\d+) bytes spill"))}
    return numbers | {"blocks": _blocks_at_once(numbers["registers"], numbers["shared"], threads, capability),
                      "threads": threads, "mma": ptx.count("mma.sync")}


def _blocks_at_once(registers, shared, threads, capability):
    """Of a multiprocessor: registers are given to warps by 256, and each block has 1 KiB of shared memory besides."""
    kibibytes, most_threads = CHIPS[capability]
    of_warp = -(-registers * 32 // 256) * 256
    return min(32, most_threads // threads, _REGISTERS // of_warp // (threads // 32),
               kibibytes * 1024 // (shared + 1024))


def _ptxas():
    import nvidia
    found = [path for folder in nvidia.__path__ for path in Path(folder).glob("*/bin/ptxas*")]
    if not found:
        sys.exit("ptxas is missing: pip install nvidia-cuda-nvcc")
    return found[0]


def table(chips=CHIPS):
    """[{kernel, variant, capability, registers, shared, stack, spills, blocks, threads, mma}]"""
    launched = recorded_launches()
    missed = kernels_of_modules() - launched.keys()
    if missed:
        sys.exit(f"no network here launches {', '.join(sorted(kernel.__name__ for kernel in missed))}")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for capability in chips:
            dispatcher.get_current_device = lambda capability=capability: type("Chip", (),
                                                                               {"compute_capability": capability})
            for kernel, name in sorted(names_of(launched).items(), key=lambda item: item[1]):
                rows.append({"kernel": name[0], "variant": name[1], "capability": f"{capability[0]}.{capability[1]}",
                             **resources(kernel, *launched[kernel], capability, folder)})
    return rows


def as_markdown(rows):
    lines = ["| kernel | for | threads | registers | shared memory | blocks at a time | mma.sync | stack and spills |",
             "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |"]
    by_name = {}
    for row in rows:  # of kernels that a user's functions make there are several of one name
        chips = by_name.setdefault((row["kernel"], row["variant"]), {})
        chips[row["capability"]] = max(chips.get(row["capability"], row), row, key=lambda row: row["registers"])
    for (kernel, variant), of_chips in by_name.items():
        chips = of_chips.values()

        def both(key, chips=chips):
            values = [str(row[key]) for row in chips]
            return values[0] if len(set(values)) == 1 else ", ".join(values)

        spills = [row["stack"] + row["spills"] for row in chips]
        lines.append(f"| `{kernel}` | {variant} | {both('threads')} | {both('registers')} | {both('shared')} | "
                     f"{both('blocks')} | {both('mma')} | {max(spills)} |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--docs", action="store_true", help="write the table into docs/cuda.md")
    options = parser.parse_args()
    rows = table()
    print(json.dumps(rows) if options.json else as_markdown(rows))
    if options.docs:
        path = ROOT / "docs" / "cuda.md"
        begin, end = "<!-- table of resources, by benchmarks/gpu_resources.py -->\n", "\n<!-- end of resources -->"
        before, _, rest = path.read_text().partition(begin)
        path.write_text(before + begin + as_markdown(rows) + end + rest.partition(end)[2])


if __name__ == "__main__":
    main()
