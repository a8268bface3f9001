"""Numba kernels for processors: compiled on first use, single-threaded, free of the GIL."""

from fastdtd.kernels.cpu.conv2d import (
    conv2d_block_columns,
    conv2d_forward,
    conv2d_pack,
    conv2d_packed_shape,
    conv2d_redistribute,
    conv2d_tiles_shape,
)
from fastdtd.kernels.cpu.dense import DENSE_FEATURES, dense_forward, dense_redistribute
from fastdtd.kernels.cpu.elementwise import (
    absorb_redistribute,
    add_forward,
    add_redistribute,
    clear_redistribute,
    copy_forward,
    relu_forward,
    relu_redistribute,
)
from fastdtd.kernels.cpu.pool2d import max_pool2d_forward, max_pool2d_redistribute, pool2d_forward, pool2d_redistribute

__all__ = [
    "DENSE_FEATURES", "absorb_redistribute", "add_forward", "add_redistribute", "clear_redistribute", "conv2d_block_columns",
    "conv2d_forward", "conv2d_pack", "conv2d_packed_shape", "conv2d_redistribute", "conv2d_tiles_shape", "copy_forward",
    "dense_forward", "dense_redistribute", "max_pool2d_forward", "max_pool2d_redistribute", "pool2d_forward", "pool2d_redistribute",
    "relu_forward", "relu_redistribute",
]
