"""Numba kernels for processors: compiled on first use, single-threaded, free of the GIL."""
# ruff: noqa: I001  # names in filled lines

from fastdtd.kernels.cpu.conv2d import (
    CONV2D_COLUMNS, CONV2D_FEW_ROWS, CONV2D_REPEATED, conv2d_block_shape, conv2d_bounds_shape, conv2d_columns_elements,
    conv2d_forward, conv2d_joined, conv2d_pack, conv2d_packed_shape, conv2d_redistribute,
    conv2d_redistribute_sums_elements, conv2d_sums_elements,
)
from fastdtd.kernels.cpu.dense import (
    DENSE_FEATURES, dense_forward, dense_forward_elements, dense_redistribute, dense_redistribute_elements,
)
from fastdtd.kernels.cpu.depthwise import (
    DEPTHWISE2D_STEP, depthwise2d_block_rows, depthwise2d_forward, depthwise2d_redistribute,
    depthwise2d_results_elements,
)
from fastdtd.kernels.cpu.direction import direction_kernels
from fastdtd.kernels.cpu.elementwise import (
    ABSORBING_PARTS, absorb_dead_redistribute, activate_forward, activate_redistribute, add_forward, add_redistribute,
    clear_redistribute, copy_forward, gate_redistribute, multiply_forward, multiply_redistribute, nonlinearity_forward,
    power_forward, rearrange_forward, rearrange_redistribute, sum_absorbed_redistribute, sum_relevance, surely_within,
)
from fastdtd.kernels.cpu.formulas import absorb_remainder_redistribute, ratios_forward, relevance_redistribute
from fastdtd.kernels.cpu.group_norm import group_norm_elements, group_norm_forward, group_norm_redistribute
from fastdtd.kernels.cpu.memory import (
    ALLOCATION_MAY_FAIL_AT_RUN_TIME, CONVOLUTION, FILLS_MEMORY, MARGIN, MAX_IMAGES, MAX_PLANS, POOLING, SURVIVES_FORK,
    THREADS_SHARE_A_PLAN, constant, empty, memory_budget, namespace, on_device, on_device_of, read, write, zeros,
)
from fastdtd.kernels.cpu.normalize import (
    normalize_forward, normalize_redistribute, normalize_taylor_elements, normalize_taylor_redistribute,
)
from fastdtd.kernels.cpu.pool2d import (
    max_pool2d_forward, max_pool2d_redistribute, pool2d_forward, pool2d_redistribute, pool2d_redistribute_elements,
)
from fastdtd.kernels.cpu.resize import resize_elements, resize_forward, resize_redistribute
from fastdtd.kernels.cpu.softmax import softmax_forward, softmax_redistribute
from fastdtd.kernels.cpu.sparse import (
    density_redistribute, sparse2d_below, sparse2d_block, sparse2d_pack, sparse2d_packed_shape, sparse2d_redistribute,
    sparse2d_scratch, sparse2d_splits_channels,
)
from fastdtd.kernels.cpu.steps import BROKEN, NO_STEP, bind, run_steps, steps_compiled, table
from fastdtd.kernels.cpu.winograd import (
    winograd2d_block, winograd2d_forward, winograd2d_pack, winograd2d_packed_shape, winograd2d_pays,
    winograd2d_redistribute, winograd2d_scratch, winograd2d_tiles,
)
from fastdtd.kernels.scalar import MIN_DENOMINATOR

__all__ = [
    "ABSORBING_PARTS", "ALLOCATION_MAY_FAIL_AT_RUN_TIME", "BROKEN", "CONV2D_COLUMNS", "CONV2D_FEW_ROWS",
    "CONV2D_REPEATED", "CONVOLUTION", "DENSE_FEATURES", "DEPTHWISE2D_STEP", "FILLS_MEMORY", "MARGIN", "MAX_IMAGES",
    "MAX_PLANS", "MIN_DENOMINATOR", "NO_STEP", "POOLING", "SURVIVES_FORK", "THREADS_SHARE_A_PLAN",
    "absorb_dead_redistribute", "absorb_remainder_redistribute", "activate_forward", "activate_redistribute",
    "add_forward", "add_redistribute", "bind", "clear_redistribute", "constant", "conv2d_block_shape",
    "conv2d_bounds_shape", "conv2d_columns_elements", "conv2d_forward", "conv2d_joined", "conv2d_pack",
    "conv2d_packed_shape", "conv2d_redistribute", "conv2d_redistribute_sums_elements", "conv2d_sums_elements",
    "copy_forward", "dense_forward", "dense_forward_elements", "dense_redistribute", "dense_redistribute_elements",
    "density_redistribute", "depthwise2d_block_rows", "depthwise2d_forward", "depthwise2d_redistribute",
    "depthwise2d_results_elements", "direction_kernels", "empty", "gate_redistribute", "group_norm_elements",
    "group_norm_forward", "group_norm_redistribute", "max_pool2d_forward", "max_pool2d_redistribute", "memory_budget",
    "multiply_forward", "multiply_redistribute", "namespace", "nonlinearity_forward", "normalize_forward",
    "normalize_redistribute", "normalize_taylor_elements", "normalize_taylor_redistribute", "on_device", "on_device_of",
    "pool2d_forward", "pool2d_redistribute", "pool2d_redistribute_elements", "power_forward", "ratios_forward", "read",
    "rearrange_forward", "rearrange_redistribute", "relevance_redistribute", "resize_elements", "resize_forward",
    "resize_redistribute", "run_steps", "softmax_forward", "softmax_redistribute", "sparse2d_below", "sparse2d_block",
    "sparse2d_pack", "sparse2d_packed_shape", "sparse2d_redistribute", "sparse2d_scratch", "sparse2d_splits_channels",
    "steps_compiled", "sum_absorbed_redistribute", "sum_relevance", "surely_within", "table", "winograd2d_block",
    "winograd2d_forward", "winograd2d_pack", "winograd2d_packed_shape", "winograd2d_pays", "winograd2d_redistribute",
    "winograd2d_scratch", "winograd2d_tiles", "write", "zeros",
]
