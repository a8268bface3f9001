"""Numba CUDA kernels and their launchers: compiled on first use, for memory of CuPy. Names and parameters are those of kernels/cpu."""

from fastdtd.kernels.cuda.conv2d import (
    conv2d_forward,
    conv2d_pack,
    conv2d_packed_shape,
    conv2d_redistribute,
    conv2d_taps,
)
from fastdtd.kernels.cuda.dense import (
    DENSE_FEATURES,
    dense_forward,
    dense_forward_elements,
    dense_redistribute,
    dense_redistribute_elements,
)
from fastdtd.kernels.cuda.direction import direction_kernels
from fastdtd.kernels.cuda.elementwise import (
    LEAST,
    absorb_redistribute,
    activate_forward,
    activate_redistribute,
    add_forward,
    add_redistribute,
    clear_redistribute,
    copy_forward,
    power_forward,
    rearrange_forward,
    rearrange_redistribute,
)
from fastdtd.kernels.cuda.formulas import lose_redistribute, observe_redistribute, ratios_forward
from fastdtd.kernels.cuda.memory import COPIES_BLOCKS, MARGIN, constant, empty, may_hold, to_host, zeros
from fastdtd.kernels.cuda.normalize import (
    normalize_forward,
    normalize_redistribute,
    normalize_shares_elements,
    normalize_shares_redistribute,
)
from fastdtd.kernels.cuda.pool2d import (
    max_pool2d_forward,
    max_pool2d_redistribute,
    pool2d_forward,
    pool2d_redistribute,
    pool2d_redistribute_elements,
)
from fastdtd.kernels.cuda.steps import BROKEN, bind, run_steps, table

__all__ = [
    "BROKEN",
    "COPIES_BLOCKS",
    "DENSE_FEATURES",
    "LEAST",
    "MARGIN",
    "absorb_redistribute",
    "activate_forward",
    "activate_redistribute",
    "add_forward",
    "add_redistribute",
    "bind",
    "clear_redistribute",
    "constant",
    "conv2d_forward",
    "conv2d_pack",
    "conv2d_packed_shape",
    "conv2d_redistribute",
    "conv2d_taps",
    "copy_forward",
    "dense_forward",
    "dense_forward_elements",
    "dense_redistribute",
    "dense_redistribute_elements",
    "direction_kernels",
    "empty",
    "lose_redistribute",
    "max_pool2d_forward",
    "max_pool2d_redistribute",
    "may_hold",
    "normalize_forward",
    "normalize_redistribute",
    "normalize_shares_elements",
    "normalize_shares_redistribute",
    "observe_redistribute",
    "pool2d_forward",
    "pool2d_redistribute",
    "pool2d_redistribute_elements",
    "power_forward",
    "ratios_forward",
    "rearrange_forward",
    "rearrange_redistribute",
    "run_steps",
    "table",
    "to_host",
    "zeros",
]
