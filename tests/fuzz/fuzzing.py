"""Mutated files, by the hundred thousand: model files of all formats, pictures, and sets of them.

A file is accepted or refused with a FastDTDError, within limits of time and memory; what is accepted gives sound
numbers. Files are mutated and tried in forked processes, some hundred in each: a crash, a hang or too much memory costs
that process alone, and is a finding. Findings are made smaller and kept.

    PYTHONPATH=tests python tests/fuzz/fuzzing.py [--minutes M | --cases N | --corpus] [FORMAT ...]    # `make fuzz`
"""

import argparse
import concurrent.futures
import contextlib
import faulthandler
import hashlib
import importlib
import itertools
import json
import multiprocessing
import os
import random
import resource
import select
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

import fastdtd
from fastdtd.cost import cost
from fastdtd.errors import ConversionError, FastDTDError
from fastdtd.warmup import warm_up

FORMATS = ("hdf5", "onnx", "keras", "caffe", "pictures", "sources")  # each has its fuzz_NAME.py
CORPUS = Path(__file__).parent / "corpus"  # a folder for each format, in it one for each case, in it the case's files
OPEN = Path(__file__).parent / "open"  # the same of what is not yet mended
MEMORY = "/dev/shm"  # where files are written without a disk
SECONDS = 10  # that a case may take
BATCH = 250  # cases of one process
EXPLAINED, SAVED = 1 / 2, 1 / 8  # of what is accepted
SMALL = 3e6  # multiply-adds and bytes of activations of networks that are explained
MINIMISING = 60  # seconds for one finding

Case = dict[str, bytes]  # the files of one network, one picture or one set, by name


class WrongError(Exception):
    """A file that was accepted and should not have been, or gives numbers that are not sound."""


@dataclass(frozen=True)
class Format:
    """Files of one kind.

    bases : cases that are accepted
    mutate : (case, random) -> a case that may not be
    use : reads the files in a folder; FastDTDError where they are refused, WrongError for what is not sound
    smaller : case -> cases with something left out
    memory : bytes that reading a case may take
    """

    name: str
    bases: list[Case]
    mutate: Callable[[Case, random.Random], Case]
    use: Callable[[Path], None]
    smaller: Callable[[Case], Iterable[Case]] = lambda case: ()
    memory: int = 3 * 2**29  # what conversions may make is limited to a gigabyte

    def case(self, seed: int, number: int) -> Case:
        rng = random.Random(f"{self.name} {seed} {number}")
        base = rng.choice(self.bases)
        try:
            return self.mutate(base, rng)
        except Exception:  # of what was made too odd to be changed once more; a long run must not end by it
            return base


@dataclass
class Tally:
    """What became of the cases of a format."""

    refused: int = 0
    accepted: int = 0
    slowest: float = 0
    most_memory: int = 0
    found: dict[str, list] = field(default_factory=dict)  # by what was found: how often, first case

    def add(self, other: "Tally") -> None:
        self.refused, self.accepted = self.refused + other.refused, self.accepted + other.accepted
        self.slowest, self.most_memory = max(self.slowest, other.slowest), max(self.most_memory, other.most_memory)
        for what, (count, case) in other.found.items():
            self.found.setdefault(what, [0, case])[0] += count

    def line(self, name: str) -> str:
        findings = sum(count for count, _ in self.found.values())
        return (f"{name}: {self.refused + self.accepted + findings:,} mutated, {self.refused:,} refused, "
                f"{self.accepted:,} accepted, {findings:,} findings, slowest {self.slowest:.1f} s, most memory "
                f"{self.most_memory >> 20} MiB")


# ---- One case --------------------------------------------------------------------------------------------------------


def write(case: Case, folder: Path) -> None:
    for name in os.listdir(folder):
        os.unlink(folder / name)
    for name, content in case.items():
        (folder / name).write_bytes(content)


def outcome(form: Format, folder: Path) -> str:
    """"refused", "accepted", or what was found."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            form.use(folder)
        return "accepted"
    except FastDTDError:
        return "refused"
    except WrongError as error:
        return str(error)
    except BaseException as error:
        frames = traceback.extract_tb(error.__traceback__)
        ours = [frame for frame in frames if "fastdtd" in frame.filename or "kernels" in frame.filename]
        at = (ours or frames)[-1]
        return f"{type(error).__name__} in {Path(at.filename).name}, {at.name}, line {at.lineno}"


def convert(*files: Path) -> fastdtd.Model:
    try:
        return fastdtd.convert(*files)
    except ConversionError as error:
        if "a difference of at most" in str(error):  # what conversion finds when it compares itself with the source
            raise WrongError("other scores than the source's, as conversion finds") from None
        raise


def check_model(model: fastdtd.Model, folder: Path) -> fastdtd.Explanation | None:
    """What is accepted can be explained, with sound numbers or an error of ours, and saved; where that takes little.

    Gives the explanation, if there is one.
    """
    repr(model), repr(model.graph)
    graph, total = model.graph, cost(model.graph)
    if total.multiply_adds > SMALL or total.activation_bytes > SMALL or total.weight_bytes > SMALL:
        return None
    chance = random.Random(str([file.read_bytes() for file in sorted(folder.iterdir())])).random()
    if chance < SAVED:
        with contextlib.suppress(FastDTDError):
            fastdtd.save(model, folder / "saved.h5")  # and reads it
    if chance > EXPLAINED:
        return None
    try:
        e = fastdtd.Explainer(model, threads=1)(inputs(graph))
    except FastDTDError:
        return None
    if not (np.isfinite(e.explained).all() and np.isfinite(e.relevance).all()):
        raise WrongError("relevance that is not finite")
    if (e.relevance < 0).any() or (e.explained < 0).any() or (e.absorbed < 0).any():
        raise WrongError("negative relevance")
    if not np.allclose(e.sum + e.absorbed, e.explained, rtol=1e-3, atol=0):
        raise WrongError("books that do not balance")
    return e


def inputs(graph: fastdtd.Graph) -> np.ndarray:
    """Two images within a network's bounds."""
    low, high = (-1.0, 1.0) if graph.box is None else (bound.astype(float)[:, None, None] for bound in graph.box)
    drawn = np.random.default_rng(0).random((2, *graph.input_shape))
    with np.errstate(over="ignore"):
        return (low + (high - low) * drawn).astype(np.float32)


# ---- Many cases ------------------------------------------------------------------------------------------------------


def peak_memory(reset: bool = False) -> int:
    """Bytes that this process had in memory at most, since it was reset."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    return int(status[status.index("VmHWM:") + 6:].split(None, 1)[0]) << 10


def _try_all(form: Format, cases: Iterable[Case], folder: Path, pipe: int) -> None:
    """In a forked process: a line of JSON for each case."""
    log = os.open(folder / "log", os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    faulthandler.enable(2)
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    most = size + form.memory + 2**33  # what the machine is kept from; what is measured is what is in memory
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    place = folder / "case"
    place.mkdir(exist_ok=True)
    for case in cases:
        write(case, place)
        peak_memory(reset=True)
        begun, before = time.perf_counter(), peak_memory()
        what = outcome(form, place)
        seconds, memory = time.perf_counter() - begun, peak_memory() - before
        if memory > form.memory:
            what = f"more than {form.memory >> 20} MiB of memory"
        os.write(pipe, json.dumps([what, seconds, memory]).encode() + b"\n")


def tried(form: Format, cases: Callable[[int], Case], count: int) -> Tally:
    """`count` cases, in processes that are forked anew after a finding."""
    tally, done = Tally(), 0
    with tempfile.TemporaryDirectory(dir=MEMORY if os.path.isdir(MEMORY) else None) as name:
        while done < count:
            reading, writing = os.pipe()
            process = os.fork()
            if not process:
                status = 70
                try:
                    os.close(reading)
                    _try_all(form, map(cases, range(done, count)), Path(name), writing)
                    status = 0
                finally:
                    os._exit(status)
            os.close(writing)
            with open(reading, "rb", buffering=0) as lines:
                done = _listen(lines, process, tally, done, cases, Path(name) / "log")
    return tally


def _listen(lines, process: int, tally: Tally, done: int, cases: Callable[[int], Case], log: Path) -> int:
    """Take down what a process says until it ends, or hangs; gives how many cases are done."""
    said = b""
    while True:
        if not select.select([lines], [], [], SECONDS)[0]:
            os.kill(process, signal.SIGABRT)  # faulthandler says where it is
            time.sleep(0.5)
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
            _found(tally, f"takes more than {SECONDS} s{_where(log)}", cases(done))
            return done + 1
        said += lines.read(65536) or b""
        *whole, said = said.split(b"\n")
        for line in whole:
            what, seconds, memory = json.loads(line)
            tally.slowest, tally.most_memory = max(tally.slowest, seconds), max(tally.most_memory, memory)
            if what == "refused":
                tally.refused += 1
            elif what == "accepted":
                tally.accepted += 1
            else:
                _found(tally, what, cases(done))
            done += 1
        if not whole:  # the end
            status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
            if status == 0:
                return done
            what = signal.Signals(-status).name if status < 0 else f"exit status {status}"
            _found(tally, what + _where(log), cases(done))
            return done + 1


def _found(tally: Tally, what: str, case: Case) -> None:
    tally.found.setdefault(what, [0, case])[0] += 1


def _where(log: Path) -> str:
    """The innermost line of our code that faulthandler has written down."""
    text = log.read_text(errors="replace") if log.exists() else ""
    for line in text.splitlines():
        if line.startswith("  File ") and "fastdtd" in line and "/tests/" not in line:
            file, _, rest = line.removeprefix('  File "').partition('", ')
            return f" in {Path(file).name}, {rest}"
    return ""


# ---- Findings --------------------------------------------------------------------------------------------------------


def minimised(form: Format, case: Case, what: str, seconds: float = MINIMISING) -> Case:
    """A case with less in it of which the same is found."""
    end = time.monotonic() + seconds
    progress = True
    while progress and time.monotonic() < end:
        progress = False
        for smaller in itertools.chain(form.smaller(case), _smaller_bytes(case, form.bases)):
            if time.monotonic() >= end:
                break
            if what in tried(form, lambda _, one=smaller: one, 1).found:
                case, progress = smaller, True
                break
    return case


def _smaller_bytes(case: Case, bases: list[Case]) -> Iterator[Case]:
    """Parts left out, or as they were in the most similar of the bases of the same length."""
    for name, content in case.items():
        alike = [base[name] for base in bases if len(base.get(name, b"")) == len(content)]
        if alike:
            original = min(alike, key=lambda base: sum(a != b for a, b in zip(base, content, strict=True)))
            differing = [i for i, (a, b) in enumerate(zip(original, content, strict=True)) if a != b]
            size = len(differing)
            while size := size // 2 or (1 if size > 1 else 0):
                for at in range(0, len(differing), size):
                    changed = bytearray(content)
                    for i in differing[at:at + size]:
                        changed[i] = original[i]
                    yield case | {name: bytes(changed)}
        size = len(content)
        while size > max(2, len(content) >> 8):
            size //= 2
            for at in range(0, len(content), size):
                yield case | {name: content[:at] + content[at + size:]}


def keep(form: Format, what: str, case: Case, folder: Path) -> Path:
    place = folder / form.name / hashlib.sha256(what.encode()).hexdigest()[:12]
    place.mkdir(parents=True, exist_ok=True)
    write(minimised(form, case, what), place)
    return place


# ---- Runs ------------------------------------------------------------------------------------------------------------


def load(name: str) -> Format:
    return importlib.import_module(f"fuzz_{name}").FORMAT


def _work(names: list[str], seed: int, worker: int, workers: int, end: float) -> dict[str, Tally]:
    """Until `end`, the format next that had least time."""
    forms = [load(name) for name in names]
    tallies, taken, batches = ({form.name: kind() for form in forms} for kind in (Tally, float, int))
    while time.time() < end:
        form = min(forms, key=lambda form: taken[form.name])
        first = (batches[form.name] * workers + worker) * BATCH
        begun = time.time()
        tallies[form.name].add(tried(form, lambda i, f=form, n=first: f.case(seed, n + i), BATCH))
        taken[form.name] += time.time() - begun
        batches[form.name] += 1
    return tallies


def kept(folder: Path) -> list[Case]:
    return [{file.name: file.read_bytes() for file in sorted(place.iterdir())} for place in sorted(folder.glob("*/"))]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("formats", nargs="*", metavar="FORMAT", help=f"of {', '.join(FORMATS)} (all)")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--minutes", type=float, default=1.0, help="how long, with as many processes as there are "
                                                                "processors (1)")
    how.add_argument("--cases", type=int, help="how many of each format, in one process")
    how.add_argument("--corpus", action="store_true", help="those that are kept in corpus/ instead of new ones")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--seed", type=int, default=None, help="(the time, or 0 with --cases)")
    parser.add_argument("--out", type=Path, default=Path("out/fuzz"), help="where findings are kept (out/fuzz)")
    options = parser.parse_args()
    warm_up()  # here, for all that is forked
    forms = [load(name) for name in options.formats or FORMATS]
    tallies = {form.name: Tally() for form in forms}
    if options.corpus:
        for form in forms:
            cases = kept(CORPUS / form.name)
            tallies[form.name] = tried(form, cases.__getitem__, len(cases))
    elif options.cases is not None:
        for form in forms:
            for first in range(0, options.cases, BATCH):
                tallies[form.name].add(tried(form, lambda i, f=form, n=first: f.case(options.seed or 0, n + i),
                                             min(BATCH, options.cases - first)))
    else:
        seed = int(time.time()) if options.seed is None else options.seed
        end = time.time() + 60 * options.minutes
        with concurrent.futures.ProcessPoolExecutor(options.workers, multiprocessing.get_context("fork")) as pool:
            jobs = [pool.submit(_work, list(tallies), seed, i, options.workers, end) for i in range(options.workers)]
            for job in jobs:
                for name, tally in job.result().items():
                    tallies[name].add(tally)
        print(f"seed {seed}")
    for form in forms:
        print(tallies[form.name].line(form.name), flush=True)
        for what, (count, case) in tallies[form.name].found.items():
            place = keep(form, what, case, options.out)
            print(f"  {what}: {count:,} cases. Once it is mended: cp -r {place} "
                  f"{os.path.relpath(CORPUS)}/{form.name}/NAME", flush=True)
    return 1 if any(tally.found for tally in tallies.values()) else 0


if __name__ == "__main__":
    sys.modules["fuzzing"] = sys.modules["__main__"]  # for the formats, which import it
    sys.exit(main())
