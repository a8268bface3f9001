"""How CPU kernels are compiled: without the GIL, kept on disk, and dividing by zero as arithmetic does, without a Python check.

Not with parallel=True: its cached code has crashed when many processes start at once, and its threads abort when two callers enter.
"""

from numba import njit

kernel = njit(nogil=True, cache=True, error_model="numpy")
# Sums may be reordered, so that they vectorise; each compiled loop still has one order, whatever the batch or the thread.
kernel_reordering = njit(nogil=True, cache=True, error_model="numpy", fastmath={"reassoc", "contract", "nsz", "nnan"})
