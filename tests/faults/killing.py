"""Runs that are killed and interrupted at random moments.

What was said to be done is there, and the same call ends with the same bytes as a run that nothing happened to.

    python tests/faults/killing.py [KILLS [INTERRUPTS [SEED]]]          # `make faults`
"""

import os
import random
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

import h5py
import numpy as np
from PIL import Image

import fastdtd
from fastdtd import graph as g
from fastdtd.cli import main

PATIENCE = 20  # seconds until a run is stuck
AGAIN = 0.4  # how likely what goes on after one is killed, too
BEYOND = 1.1  # of the time that a run takes: the latest that it is killed
MEMORY = "/dev/shm"  # where nothing is waited for; what a process has written outlives it on any disk
OPTIONS = ("--batch", "2", "--shard", "2", "--workers", "2")


def make(folder):
    """A network like LeNet, and pictures, some of them unreadable: what a run is called with."""
    rng = np.random.default_rng(0)
    layers = (g.Conv2d("conv1", ("input", ), 0.3 * rng.standard_normal((6, 1, 5, 5))), g.ReLU("relu1", ("conv1", )),
              g.MaxPool2d("pool1", ("relu1", ), (2, 2), (2, 2)),
              g.Conv2d("conv2", ("pool1", ), 0.3 * rng.standard_normal((8, 6, 3, 3))), g.ReLU("relu2", ("conv2", )),
              g.Flatten("flat", ("relu2", )), g.Dense("scores", ("flat", ), rng.standard_normal((10, 800)) + 0.1))
    model = fastdtd.Model(g.Graph(layers, (1, 28, 28), (0.0, 1.0)), fastdtd.Preprocessing("gray", scale=1 / 255))
    fastdtd.save(model, folder / "model.h5")
    pictures = folder / "pictures"
    (pictures / "below").mkdir(parents=True)
    for i in range(5):
        place = pictures / ("below" if i < 2 else ".") / f"{i:02}.png"
        Image.fromarray(rng.integers(0, 256, (30 + i, 40), np.uint8)).save(place)
    for name in ("02a.png", "03a.png"):
        (pictures / name).write_bytes(b"no picture")
    return ["explain", str(folder / "model.h5"), str(pictures), *OPTIONS, "-o"]


def differing(out, whole):
    """Names of what is not the same in both folders."""
    def content(folder):
        return {p.relative_to(folder): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}

    found, wanted = content(out), content(whole)
    return sorted(str(name) for name in {*found, *wanted}
                  if name not in found or name not in wanted or found[name] != wanted[name])


def missing(out, said):
    """Names that were said to be done and of which numbers or drawings are not there."""
    there = set()
    for path in out.glob("shards/[0-9]*.h5"):
        with h5py.File(path, "r") as file:
            there |= set(file["file"].asstr()[...])
    drawn = {name for name in there if all((out / f"{name}.{kind}.png").exists() for kind in ("heatmap", "overlay"))}
    return sorted(said - drawn)


def named(text):
    """Pictures that a run said were done."""
    lines = text[:text.rfind("\n") + 1].splitlines()
    return {line.split("  ")[0] for line in lines if "  score " in line}


class Run:
    """A run in a forked process: without the second that Python and Numba take to start."""

    def __init__(self, call, log):
        self.log = log
        log.write_bytes(b"")  # here: it may be killed before it does anything
        self.pid = os.fork()
        if self.pid:
            return
        status = 70
        try:
            with open(log, "wb") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            status = main(call)
            sys.stdout.flush()
        except KeyboardInterrupt:
            status = 130
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)

    def ended(self, seconds):
        """The exit status, negative for a signal; None where it has not ended within that time."""
        end = time.monotonic() + seconds
        while True:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
            if time.monotonic() >= end:
                return None
            time.sleep(0.003)

    def output(self):
        return self.log.read_text()


def try_all(kills, interrupts, seed):
    """How many differ, how many were stuck; what was wrong is printed."""
    rng, differ, stuck = random.Random(seed), 0, 0
    with tempfile.TemporaryDirectory(dir=MEMORY if os.path.isdir(MEMORY) else None) as name:
        folder = Path(name)
        call = make(folder)
        # The kernels are loaded here, without a thread, for all that is forked.
        fastdtd.Explainer(fastdtd.load(folder / "model.h5"), threads=1)(np.ones((1, 1, 28, 28)))
        begun = time.monotonic()
        whole = folder / "whole"
        if Run([*call, str(whole)], folder / "log").ended(PATIENCE * 6) != 1:  # 1: some cannot be read
            raise SystemExit((folder / "log").read_text())
        takes = time.monotonic() - begun
        todo = [signal.SIGKILL] * kills + [signal.SIGINT] * interrupts
        number = 0
        while todo:
            number += 1
            out, said, wrong = folder / f"out{number}", set(), []
            while True:
                going_on = Run([*call, str(out)], folder / "log")
                sent = todo[-1] if todo else None
                status = going_on.ended(rng.uniform(0, BEYOND * takes)) if sent else None
                if sent and status is None:
                    os.kill(going_on.pid, sent)
                    todo.pop()
                if status is None:
                    status = going_on.ended(PATIENCE)
                if status is None:
                    stuck += 1
                    os.kill(going_on.pid, signal.SIGKILL)
                    going_on.ended(PATIENCE)
                    wrong.append(f"stuck after {sent!r}")
                    break
                said |= named(going_on.output())
                wrong += [f"{name} was said to be done" for name in missing(out, said)]
                if status == 1:  # the end
                    wrong += differing(out, whole)
                    break
                if status not in (-signal.SIGKILL, 130):
                    wrong.append(f"exit status {status}: {going_on.output()}")
                    break
                if rng.random() > AGAIN:  # then to the end
                    status = Run([*call, str(out)], folder / "log").ended(PATIENCE)
                    wrong += differing(out, whole) if status == 1 else [f"exit status {status}, then: "
                                                                        f"{going_on.output()}"]
                    break
            if wrong:
                differ += 1
                print(f"seed {seed}, run {number}:", *wrong, sep="\n  ", flush=True)
    return differ, stuck


if __name__ == "__main__":
    kills, interrupts, seed = (int(word) for word in (*sys.argv[1:], *("200", "200", "0")[len(sys.argv) - 1:]))
    differ, stuck = try_all(kills, interrupts, seed)
    print(f"{kills} kills, {interrupts} interrupts: {differ} differ, {stuck} stuck")
    sys.exit(1 if differ or stuck else 0)
