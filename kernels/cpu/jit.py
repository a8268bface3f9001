"""How CPU kernels are compiled: without the GIL, kept on disk, and dividing by zero as arithmetic does, without a Python check.

Not with parallel=True: its cached code has crashed when many processes start at once, and its threads abort when two callers enter.
"""

import hashlib
from pathlib import Path

from numba import njit

_SOURCES = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(Path(__file__).parents[1].rglob("*.py")))).hexdigest()


def _compiled(**options):
    def decorate(function):
        dispatcher = njit(nogil=True, cache=True, error_model="numpy", **options)(function)
        # Numba takes a kernel's cached code for current as long as the kernel's own file is unchanged. But kernels are made of parts,
        # constants and tiles of other files, and new weights packed for old code overrun memory: all sources must be as they were.
        cache_file = getattr(getattr(dispatcher, "_cache", None), "_cache_file", None)
        if cache_file is not None:
            cache_file._source_stamp = _SOURCES
        return dispatcher
    return decorate


kernel = _compiled()
# Sums may be reordered, so that they vectorise; each compiled loop still has one order, whatever the batch or the thread.
kernel_reordering = _compiled(fastmath={"reassoc", "contract", "nsz", "nnan"})
