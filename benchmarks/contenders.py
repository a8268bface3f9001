"""What compare.py times: forward passes and explanations, each alone in a process of its own, for threads of one that
wait would slow another.

    python benchmarks/contenders.py WHO FOLDER THREADS RULES RESULT

It computes once, of the network, pictures and targets in FOLDER (`prepare`), writes the scores or the relevance to
RESULT, and says that it is ready; then it times itself for each line on standard input. RULES are JSON. Between its
turns it sleeps: ONNX Runtime's threads go on turning for 40 ms after a call, PyTorch's for 10, which makes calls that
follow at once faster, and is over before the next contender's turn.
"""

import functools
import json
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent / "tests" / "peers"))
INNVESTIGATE = HERE.parent / ".venv-innvestigate" / "bin" / "python"
FORWARD = ("ONNX Runtime", "PyTorch", "PyTorch, channels_last")
PAUSE, TURN, LONG = 0.1, 0.2, 1.0  # seconds: before a turn, of a turn, of a call that makes a turn by itself

# ---- In compare.py's process -----------------------------------------------------------------------------------------


def prepare(folder, model, images, targets):
    """What contenders read; of the model once, and of the pictures (N, C, H, W) and targets (N,) each time."""
    import torch
    from torch_nets import Net

    import fastdtd
    if not (folder / "net.h5").exists():
        fastdtd.save(model, folder / "net.h5", compression=None)
    np.save(folder / "pictures.npy", images)
    np.save(folder / "targets.npy", targets)
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")  # the exporter that needs nothing else is an old one
        torch.onnx.export(Net(model.graph).eval(), (torch.tensor(images),), folder / "net.onnx", dynamo=False,
                          input_names=["input"])


class Contender:
    """One of them in its process, until the `with` ends. A call is a turn, and gives the seconds of a call there.

    result : what it computed, (N, K) scores or (N, C, H, W) relevance
    layout : the faster of its layouts, where it has two
    is_slow : whether it should have fewer turns
    """

    def __init__(self, who, folder, threads, rules="dtd"):
        self.is_slow = who not in (*FORWARD, "fastdtd")
        self.files = tempfile.TemporaryDirectory(dir=folder)
        result, self.log = Path(self.files.name, "result.npy"), Path(self.files.name, "log")
        command = [INNVESTIGATE, HERE / "innvestigate_server.py"] if who == "iNNvestigate" else [
            sys.executable, __file__, who]
        with self.log.open("w") as errors:
            self.process = subprocess.Popen([*command, folder, str(threads), json.dumps(rules, default=str), result],
                                            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True)
        self.layout, self.result = self._answer(), np.load(result)

    def __call__(self):
        print(file=self.process.stdin, flush=True)
        return self._answer()

    def _answer(self):
        if line := self.process.stdout.readline():
            return json.loads(line)
        sys.exit(f"{self.process.args} ended:\n{self.log.read_text()}")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.communicate()
        self.files.cleanup()


# ---- In its own ------------------------------------------------------------------------------------------------------


def turn(function):
    """Seconds of a call, the median of those in the second half of a turn: the first ones find cold caches, and threads
    that sleep or share a processor.
    """
    times, end = [], time.perf_counter() + TURN
    while (now := time.perf_counter()) < end or (len(times) < 2 and sum(times) < LONG):
        function()
        times.append(time.perf_counter() - now)
    return statistics.median(times[len(times) // 2:])


def serve(functions, result):
    """functions: by layout, those that compute the same; the fastest is timed."""
    for function in functions.values():
        np.save(result, np.asarray(function()))
    layout = min(functions, key=lambda name: turn(functions[name])) if len(functions) > 1 else next(iter(functions))
    print(json.dumps(layout), flush=True)
    for _ in sys.stdin:
        print(json.dumps(turn(functions[layout])), flush=True)


def onnx_runtime(job):
    import onnxruntime
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = job.threads, 1
    session = onnxruntime.InferenceSession(job.folder / "net.onnx", options, providers=["CPUExecutionProvider"])
    return {None: lambda: session.run(None, {"input": job.images})[0]}


def pytorch(job, layout="contiguous_format"):
    import torch
    from torch_nets import Net
    torch.set_num_threads(job.threads)
    graph, layout = model_of(job).graph, getattr(torch, layout)
    net, tensor = Net(graph).eval().to(memory_format=layout), torch.tensor(job.images).to(memory_format=layout)
    read = ["input", *(name for layer in graph for name in layer.inputs)]
    for layer, module in zip(graph, net.parts, strict=True):
        if hasattr(module, "inplace"):  # a ReLU overwrites what nobody else reads
            module.inplace = read.count(layer.inputs[0]) == 1

    def forward():
        with torch.inference_mode():
            return net(tensor)

    return {None: forward}


def fastdtd_itself(job):
    import fastdtd
    explainer = fastdtd.Explainer(model_of(job), job.rules, threads=job.threads)
    return {None: lambda: explainer(job.images, job.targets).relevance}


def zennit(job):
    import torch
    from torch_nets import ZennitExplainer
    torch.set_num_threads(job.threads)
    graph = model_of(job).graph

    def explain_in(layout):
        explainer = ZennitExplainer(graph, zennit_rules(graph, job.rules), torch.float32)
        explainer.net.to(memory_format=layout)
        tensor = torch.tensor(job.images).to(memory_format=layout)
        return lambda: explainer(tensor, job.targets)[0]

    return {"default": explain_in(torch.contiguous_format), "channels_last": explain_in(torch.channels_last)}


def zennit_rules(graph, rules):
    """What ZennitExplainer takes for an Explainer's rules."""
    from fastdtd.rules import assign
    if isinstance(rules, str) and rules.startswith("zennit."):
        return rules.removeprefix("zennit.")
    return {name: rule.name for name, rule in assign(graph, rules).rules.items()}


def captum(job):
    import torch
    from torch_nets import CaptumExplainer
    torch.set_num_threads(job.threads)
    explainer, tensor = CaptumExplainer(model_of(job).graph), torch.tensor(job.images)
    return {None: lambda: explainer(tensor, job.targets)}


def model_of(job):
    import fastdtd
    return fastdtd.load(job.folder / "net.h5")


CONTENDERS = {
    "ONNX Runtime": onnx_runtime, "PyTorch": pytorch,
    "PyTorch, channels_last": functools.partial(pytorch, layout="channels_last"), "fastdtd": fastdtd_itself,
    "zennit": zennit, "Captum": captum
}


def main():
    who, folder, threads, rules, result = sys.argv[1:]
    folder = Path(folder)
    job = SimpleNamespace(folder=folder, images=np.load(folder / "pictures.npy"),
                          targets=np.load(folder / "targets.npy"), threads=int(threads), rules=json.loads(rules))
    serve(CONTENDERS[who](job), result)


if __name__ == "__main__":
    main()
