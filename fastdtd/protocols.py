"""What a device's package of kernels offers. `fastdtd.kernels.load` gives one; tests/test_mirror.py holds them to this.

A question about a device has an attribute of its own: who wants to know whether memory can run out asks that, not
whether it is a GPU. `kernels.CONVOLUTION == "blocked"` tells mypy which of the two kinds `AnyDevice` is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

DeviceArray: TypeAlias = Any  # NumPy's or CuPy's
Kernel: TypeAlias = Callable[..., None]  # its parameters: kernels/signatures.py
Shape: TypeAlias = tuple[int, ...]


class Device(Protocol):
    """What all devices have."""

    POOLING: Literal["blocked", "gathered"]  # whether max and average pools copy blocks of their input
    MAX_IMAGES: int  # of a plan
    MAX_PLANS: int | None  # at a time, on each device of this kind; None: one for each thread
    THREADS_SHARE_A_PLAN: bool  # whether several workers may run the steps of one plan
    FILLS_MEMORY: bool  # whether larger plans are faster as long as memory holds them
    ALLOCATION_MAY_FAIL_AT_RUN_TIME: bool  # whether a plan that was made may still raise MemoryError when it runs
    SURVIVES_FORK: bool  # whether a forked process can go on with what its parent made
    MARGIN: int  # floats that `empty` adds after each allocation, for tiles that read beyond the end
    MIN_DENOMINATOR: np.float32  # a smaller sum counts as zero
    DENSE_FEATURES: int  # inputs of a unit of dense_redistribute
    ABSORBING_PARTS: int  # units of an image, of kernels that absorb relevance
    NO_STEP: int  # among the steps that are wanted: the workers wait for each other there
    BROKEN: int  # a barrier's counter that stands here lets all workers go, and they stop

    # -- Memory

    def empty(self, elements: int) -> DeviceArray:
        """float32, not initialised, with the margin."""
    def zeros(self, shape: int | Shape, dtype: type[np.generic]) -> DeviceArray:
        """An array of zeros."""
    def constant(self, array: npt.NDArray[Any]) -> DeviceArray:
        """A NumPy array, where kernels can read it."""
    def write(self, to: DeviceArray, values: DeviceArray) -> None:
        """to <- values of the host or of the device."""
    def read(self, out: DeviceArray, values: DeviceArray) -> None:
        """out <- what kernels wrote. Waits for them if out is the host's."""
    def namespace(self, array: Any) -> Any:
        """The library that an array is of, if this device takes its arrays; else NumPy."""
    def on_device_of(self, array: Any) -> AbstractContextManager[None]:
        """While in this context, new arrays are allocated on the device of `array`."""
    def on_device(self, device: int) -> AbstractContextManager[None]:
        """While in this context, the calling thread works on that device; what it began is done when it leaves."""
    def memory_budget(self, device: int) -> int | None:
        """Bytes that plans may take there; None: any number."""

    # -- What a call is given and what it gives; False: not known, or something is not as it should be

    def surely_within(self, low: npt.NDArray[Any], high: npt.NDArray[Any], images: DeviceArray) -> bool:
        """Whether the values of images (N, C, H, W) are from low (C,) to high (C,), and none is NaN."""
    def sum_relevance(self, sums: npt.NDArray[Any], relevance: DeviceArray, scores: DeviceArray, ledger: DeviceArray,
                      explained: npt.NDArray[Any], loss: float) -> bool:
        """sums (N,) float64 of relevance (N, C, H, W). Whether relevance and scores (N, K) are finite, and sums and
        ledger (N, layers) make up what is explained (N,), which is positive, but for a part `loss` of it."""

    # -- Shapes of packed weights, floats of scratch: (results, block) where there are two

    def dense_forward_elements(self, images: int) -> int:
        """Floats of `sums`."""
    def dense_redistribute_elements(self, images: int, outputs: int) -> tuple[int, int]:
        """Floats of `sums` and `contributions`."""
    def normalize_taylor_elements(self, images: int, shape: Shape) -> int:
        """Floats of `scratch`."""
    def pool2d_redistribute_elements(self, kernel_size: Shape, stride: Shape, padding: Shape, in_shape: Shape,
                                     out_shape: Shape) -> tuple[int, int]:
        """Floats of `block` and `results`."""

    # -- Kernels

    conv2d_pack: Kernel
    conv2d_forward: Kernel
    conv2d_redistribute: Kernel
    dense_forward: Kernel
    dense_redistribute: Kernel
    max_pool2d_forward: Kernel
    max_pool2d_redistribute: Kernel
    pool2d_forward: Kernel
    pool2d_redistribute: Kernel
    normalize_forward: Kernel
    normalize_redistribute: Kernel
    normalize_taylor_redistribute: Kernel
    add_forward: Kernel
    add_redistribute: Kernel
    resize_forward: Kernel
    resize_redistribute: Kernel
    resize_elements: Callable[[int, int], int]
    group_norm_forward: Kernel
    group_norm_redistribute: Kernel
    group_norm_elements: Callable[[int], int]
    activate_forward: Kernel
    activate_redistribute: Kernel
    power_forward: Kernel
    nonlinearity_forward: Kernel
    multiply_forward: Kernel
    multiply_redistribute: Kernel
    gate_redistribute: Kernel
    softmax_forward: Kernel
    softmax_redistribute: Kernel
    rearrange_forward: Kernel
    rearrange_redistribute: Kernel
    copy_forward: Kernel
    clear_redistribute: Kernel
    ratios_forward: Kernel
    absorb_dead_redistribute: Kernel
    absorb_remainder_redistribute: Kernel
    relevance_redistribute: Kernel

    def direction_kernels(self, direction: Callable[..., Any], bounded: bool) -> tuple[Kernel, Kernel]:
        """direction_forward and direction_redistribute. TypeError: the function cannot be compiled."""

    # -- Steps

    def bind(self, function: Kernel, arguments: list[Any]) -> tuple[Any, Any]:
        """(code, slots) of a call of a kernel, which the caller keeps alive."""
    def table(self, calls: Sequence[Any]) -> Any:
        """What run_steps runs, from calls that have `code`, `slots`, `first` and `last`."""
    def run_steps(self, steps: Any, wanted: npt.NDArray[np.int64], progress: npt.NDArray[np.int64],
                  counter: npt.NDArray[np.int64], workers: int) -> bool:
        """Make the calls `wanted`, with a barrier after each; False: waited long, to be called again."""


class BlockedDevice(Device, Protocol):
    """Convolutions copy blocks of their input into padded planes, or go through Winograd's transforms."""

    CONVOLUTION: Literal["blocked"]
    CONV2D_REPEATED: int  # constants of a row that follow it once more
    CONV2D_COLUMNS: int  # tiles read this far beyond the last position
    CONV2D_FEW_ROWS: int  # conv2d_redistribute to no more inputs of a group reads planes always
    DEPTHWISE2D_STEP: int  # positions at a time
    sum_absorbed_redistribute: Kernel
    density_redistribute: Kernel
    depthwise2d_forward: Kernel
    depthwise2d_redistribute: Kernel
    sparse2d_pack: Kernel
    sparse2d_redistribute: Kernel
    winograd2d_pack: Kernel
    winograd2d_forward: Kernel
    winograd2d_redistribute: Kernel

    def conv2d_block_shape(self, rows: int, columns: int, halo_rows: int, halo_columns: int, planes: int
                           ) -> tuple[int, int]:
        """Rows and columns of a block of output positions."""
    def conv2d_joined(self, images: int, positions: int, block_floats: int) -> int:
        """Of how many images the positions are joined."""
    def conv2d_packed_shape(self, groups: int, rows: int, depth: int, is_backward: bool) -> Shape:
        """Of packed weights for a matrix (rows, depth) in each group."""
    def conv2d_bounds_shape(self, packed_shape: Shape) -> Shape:
        """Of the bounds of packed weights."""
    def conv2d_columns_elements(self) -> int:
        """Floats of `columns`."""
    def conv2d_sums_elements(self, outputs: int) -> int:
        """Floats of `sums` of conv2d_forward."""
    def conv2d_redistribute_sums_elements(self, inputs: int, features: int, stride_w: int, positions: int, columns: int
                                          ) -> int:
        """Floats of `sums` of conv2d_redistribute."""
    def depthwise2d_block_rows(self, rows: int, width: int, inputs: int) -> int:
        """Rows of positions of each block, where each stands for so many inputs."""
    def depthwise2d_results_elements(self, rows: int, width: int, values: int) -> int:
        """Floats of `results`."""
    def sparse2d_below(self, features: int, taps: int, box: bool, tiles_used: float) -> float:
        """The density below which it is faster than Winograd's algorithm, or conv2d's where tiles_used is 0."""
    def sparse2d_packed_shape(self, outputs: int, channels: int, kernel_h: int, kernel_w: int) -> Shape:
        """Of packed weights."""
    def sparse2d_block(self, outputs: int, height: int, across: int, is_pointwise: bool, parts: int) -> tuple[int, int]:
        """Rows and columns of a block of inputs, of which there should be so many parts."""
    def sparse2d_splits_channels(self, packed_shape: Shape, workers: int) -> bool:
        """Whether workers divide the channels of a single image's block."""
    def sparse2d_scratch(self, packed_shape: Shape, features: int, kernel_w: int, columns: int, stride_h: int,
                         block_rows: int, block_columns: int) -> tuple[int, ...]:
        """Floats of lists, tile, sums."""
    def winograd2d_pays(self, depth: int, rows: int, height: int, width: int, products: int) -> bool:
        """Whether it is faster than the direct convolution."""
    def winograd2d_packed_shape(self, groups: int, rows: int, depth: int) -> Shape:
        """Of packed weights."""
    def winograd2d_tiles(self, height: int, width: int) -> int:
        """Tiles of one image."""
    def winograd2d_block(self, panels: int, products: int, tiles: int, workers: int) -> tuple[int, int, int]:
        """Blocks of so many tiles, tiles of the largest, panels at once."""
    def winograd2d_scratch(self, channels: int, panels: int, block: int, width: int) -> tuple[int, ...]:
        """Floats of lines, points, sums, stage, seen."""
    def steps_compiled(self) -> dict[Any, Any]:
        """What `bind` compiled in this process."""


class ImplicitDevice(Device, Protocol):
    """Convolutions gather their input by address, as products of tiles."""

    CONVOLUTION: Literal["implicit"]

    def conv2d_panel_rows(self, rows: int, depth: int, precision: int) -> int:
        """Rows of a panel for a matrix (rows, depth) in each group."""
    def conv2d_packed_shape(self, groups: int, rows: int, depth: int, panel_rows: int) -> Shape:
        """Of packed weights for such a matrix in each group."""
    def conv2d_taps(self, downs: npt.NDArray[np.int64], rights: npt.NDArray[np.int64], channels: int, height: int,
                    width: int, panel_rows: int) -> npt.NDArray[np.int64]:
        """What each depth reads."""


AnyDevice: TypeAlias = BlockedDevice | ImplicitDevice
