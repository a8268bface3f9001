"""Numba kernels for processors: compiled on first use, single-threaded, free of the GIL."""

from fastdtd.kernels.cpu.barrier import meet
from fastdtd.kernels.cpu.conv2d import (
    CONV2D_COLUMNS,
    conv2d_block_shape,
    conv2d_forward,
    conv2d_pack,
    conv2d_pack_split,
    conv2d_packed_shape,
    conv2d_redistribute,
    conv2d_results_elements,
    conv2d_split_bounds,
    conv2d_split_shape,
)
from fastdtd.kernels.cpu.dense import DENSE_FEATURES, dense_forward, dense_redistribute
from fastdtd.kernels.cpu.elementwise import (
    LEAST,
    absorb_redistribute,
    add_forward,
    add_redistribute,
    clear_redistribute,
    copy_forward,
    relu_forward,
    relu_redistribute,
)
from fastdtd.kernels.cpu.microkernel import DENSE_ROWS
from fastdtd.kernels.cpu.pool2d import max_pool2d_elements, max_pool2d_forward, max_pool2d_redistribute, pool2d_forward, pool2d_redistribute
from fastdtd.kernels.cpu.winograd import (
    winograd2d_block,
    winograd2d_forward,
    winograd2d_pack,
    winograd2d_packed_shape,
    winograd2d_pays,
    winograd2d_redistribute,
    winograd2d_scratch,
    winograd2d_tiles,
)

__all__ = [
    "CONV2D_COLUMNS",
    "DENSE_FEATURES",
    "DENSE_ROWS",
    "LEAST",
    "absorb_redistribute",
    "add_forward",
    "add_redistribute",
    "clear_redistribute",
    "conv2d_block_shape",
    "conv2d_forward",
    "conv2d_pack",
    "conv2d_pack_split",
    "conv2d_packed_shape",
    "conv2d_redistribute",
    "conv2d_results_elements",
    "conv2d_split_bounds",
    "conv2d_split_shape",
    "copy_forward",
    "dense_forward",
    "dense_redistribute",
    "max_pool2d_elements",
    "max_pool2d_forward",
    "max_pool2d_redistribute",
    "meet",
    "pool2d_forward",
    "pool2d_redistribute",
    "relu_forward",
    "relu_redistribute",
    "winograd2d_block",
    "winograd2d_forward",
    "winograd2d_pack",
    "winograd2d_packed_shape",
    "winograd2d_pays",
    "winograd2d_redistribute",
    "winograd2d_scratch",
    "winograd2d_tiles",
]
