"""Calls that are cut short wherever Ctrl-C can cut them short, one place after the other, and calls after each.

`python interrupting.py THREADS KIND STRIDE` prints how many were cut short. A process of its own, for what is feared is
that a later call waits for ever.

Python looks for signals where a function begins, after a call of native code, and where a loop goes back. The first two
are the places where a profiler is called, so a profiler that raises KeyboardInterrupt the n-th time is Ctrl-C there.
"""

import sys
import warnings

import numpy as np
from explaining import explainer, one_image, small
from graphs import images

from fastdtd import executor


class Interrupts:
    """KeyboardInterrupt at the given places, counted from the start."""

    def __init__(self, *places):
        self.places, self.seen = set(places), 0

    def __call__(self, frame, event, argument):
        if event in ("call", "c_return"):
            self.seen += 1
            if self.seen in self.places:
                raise KeyboardInterrupt


def interrupted(call, *places):
    """Whether a call is cut short, and how many places there are."""
    interrupts = Interrupts(*places)
    try:
        sys.setprofile(interrupts)
        call()
    except KeyboardInterrupt:
        return True, interrupts.seen
    finally:
        sys.setprofile(None)
    return False, interrupts.seen


def main(threads, kind, stride):
    warnings.simplefilter("ignore")
    executor._SMALL_NETWORK = 0 if kind in ("shared", "at") else 1 << 25
    graph = small()
    made = explainer(graph, threads=threads, memory=2 * one_image(graph, threads) if kind == "memory" else None)
    batch = images(graph, 1 if kind == "shared" else 5, seed=0)
    expected = made(batch, 0).relevance

    def call():
        return made(batch, 0).at("conv") if kind == "at" else made(batch, 0).relevance

    expected = call()
    _, places = interrupted(call)
    cut = 0
    for place in range(1, places + 40, stride):
        for again in (0, 1, 3, 10):  # and while what was cut short is put in order
            cut += interrupted(call, place, place + again)[0]
            np.testing.assert_array_equal(call(), expected)
    print(f"{cut} interrupted at {places} places, and none stuck")


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
