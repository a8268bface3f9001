"""Numba CUDA kernels and their launchers, compiled on first use. Names and parameters are those of kernels/cpu, whose
docstrings say more. Units of launchers are channels of images where nothing else is said."""
# ruff: noqa: I001  # names in filled lines

from fastdtd.kernels.cuda.conv2d import (
    conv2d_forward, conv2d_pack, conv2d_packed_shape, conv2d_panel_rows, conv2d_redistribute, conv2d_taps,
)
from fastdtd.kernels.cuda.dense import (
    DENSE_FEATURES, dense_forward, dense_forward_elements, dense_redistribute, dense_redistribute_elements,
)
from fastdtd.kernels.cuda.direction import direction_kernels
from fastdtd.kernels.cuda.elementwise import (
    ABSORBING_PARTS, absorb_dead_redistribute, activate_forward, activate_redistribute, add_forward, add_redistribute,
    clear_redistribute, copy_forward, gate_redistribute, multiply_forward, multiply_redistribute, nonlinearity_forward,
    power_forward, rearrange_forward, rearrange_redistribute, sum_relevance, surely_within,
)
from fastdtd.kernels.cuda.formulas import absorb_remainder_redistribute, ratios_forward, relevance_redistribute
from fastdtd.kernels.cuda.group_norm import group_norm_elements, group_norm_forward, group_norm_redistribute
from fastdtd.kernels.cuda.memory import (
    ALLOCATION_MAY_FAIL_AT_RUN_TIME, CONVOLUTION, FILLS_MEMORY, MARGIN, MAX_IMAGES, MAX_PLANS, POOLING, SURVIVES_FORK,
    THREADS_SHARE_A_PLAN, constant, empty, memory_budget, namespace, on_device, on_device_of, read, write, zeros,
)
from fastdtd.kernels.cuda.normalize import (
    normalize_forward, normalize_redistribute, normalize_taylor_elements, normalize_taylor_redistribute,
)
from fastdtd.kernels.cuda.pool2d import (
    max_pool2d_forward, max_pool2d_redistribute, pool2d_forward, pool2d_redistribute, pool2d_redistribute_elements,
)
from fastdtd.kernels.cuda.resize import resize_elements, resize_forward, resize_redistribute
from fastdtd.kernels.cuda.softmax import softmax_forward, softmax_redistribute
from fastdtd.kernels.cuda.steps import BROKEN, NO_STEP, bind, run_steps, table
from fastdtd.kernels.scalar import MIN_DENOMINATOR

__all__ = [
    "ABSORBING_PARTS", "ALLOCATION_MAY_FAIL_AT_RUN_TIME", "BROKEN", "CONVOLUTION", "DENSE_FEATURES", "FILLS_MEMORY",
    "MARGIN", "MAX_IMAGES", "MAX_PLANS", "MIN_DENOMINATOR", "NO_STEP", "POOLING", "SURVIVES_FORK",
    "THREADS_SHARE_A_PLAN", "absorb_dead_redistribute", "absorb_remainder_redistribute", "activate_forward",
    "activate_redistribute", "add_forward", "add_redistribute", "bind", "clear_redistribute", "constant",
    "conv2d_forward", "conv2d_pack", "conv2d_packed_shape", "conv2d_panel_rows", "conv2d_redistribute", "conv2d_taps",
    "copy_forward", "dense_forward", "dense_forward_elements", "dense_redistribute", "dense_redistribute_elements",
    "direction_kernels", "empty", "gate_redistribute", "group_norm_elements", "group_norm_forward",
    "group_norm_redistribute", "max_pool2d_forward", "max_pool2d_redistribute", "memory_budget", "multiply_forward",
    "multiply_redistribute", "namespace", "nonlinearity_forward", "normalize_forward", "normalize_redistribute",
    "normalize_taylor_elements", "normalize_taylor_redistribute", "on_device", "on_device_of", "pool2d_forward",
    "pool2d_redistribute", "pool2d_redistribute_elements", "power_forward", "ratios_forward", "read",
    "rearrange_forward", "rearrange_redistribute", "relevance_redistribute", "resize_elements", "resize_forward",
    "resize_redistribute", "run_steps", "softmax_forward", "softmax_redistribute", "sum_relevance", "surely_within",
    "table", "write", "zeros",
]
