"""Padded copies of planes, which windows and taps read without a check for the plane's end.

Everything here works on addresses: an array that is sliced or passed on is a counted reference, which takes longer than
a short row does. Rows are copied in whole vectors. What is stored after a row's end is stored over by the next; a block
has memory after its last.
"""

from fastdtd.kernels.cpu.jit import kernel, part
from fastdtd.kernels.cpu.rows import (
    copy_second_vectors,
    copy_strided,
    copy_vectors,
    fetch_to_read,
    fill_vectors,
    multiply_vectors,
)
from fastdtd.kernels.scalar import ZERO


@kernel
def inside(first, step, size, count):
    """Of first, first + step, ... (count of them): the index of the first inside 0..size-1, and of the next outside."""
    begin = min(max(-(first // step), 0), count)
    return begin, max(min(-((first - size) // step), count), begin)


@kernel
def own_part(count, block, splits, first, last):
    """Begin and end of what a call has of a block's `count` parts, where `splits` units are one block and the call does
    the units first..last-1."""
    begin, end = max(first - block * splits, 0), min(last - block * splits, splits)
    return count * begin // splits, count * end // splits


@part
def fetch_plane(plane, rows, width, across, first_y, first_x):
    """Ask for so many rows of a plane that will be copied next: it lies far from the one before."""
    if width == across:
        fetch_to_read(plane + 4 * first_y * across, rows * across)
        return
    for row in range(first_y, first_y + rows):
        fetch_to_read(plane + 4 * (row * across + first_x), width)


@kernel
def copy_plane(block, rows, width, plane, height, across, first_y, first_x, stride_h, stride_w, outside):
    """block (rows, width) <- the plane (height, across) at first + index * step, `outside` around it."""
    top, bottom = inside(first_y, stride_h, height, rows)
    left, right = inside(first_x, stride_w, across, width)
    if left == right:
        top = bottom = rows
    fill_vectors(block, top * width, outside)
    to, source = block + 4 * top * width, plane + 4 * ((first_y + top * stride_h) * across + first_x + left * stride_w)
    for _ in range(top, bottom):
        fill_vectors(to, left, outside)
        if stride_w == 1:
            copy_vectors(to + 4 * left, source, 0, right - left)
        elif stride_w == 2:
            copy_second_vectors(to + 4 * left, source, right - left)
        else:
            copy_strided(to + 4 * left, source, stride_w, right - left)
        fill_vectors(to + 4 * right, width - right, outside)
        to, source = to + 4 * width, source + 4 * stride_h * across
    fill_vectors(to, (rows - bottom) * width, outside)


@part
def copy_run(block, count, plane, size, first):
    """block <- `count` values of a plane of `size` from number `first` on, zeros where there are none."""
    begin = min(max(-first, 0), count)
    end = max(min(size - first, count), begin)
    fill_vectors(block, begin, ZERO)
    copy_vectors(block + 4 * begin, plane + 4 * (first + begin), 0, end - begin)
    fill_vectors(block + 4 * end, count - end, ZERO)


@part
def copy_product_run(block, count, p, q, size, first):
    """As copy_run, of the product of two planes p and q."""
    begin = min(max(-first, 0), count)
    end = max(min(size - first, count), begin)
    fill_vectors(block, begin, ZERO)
    multiply_vectors(block + 4 * begin, p + 4 * (first + begin), q + 4 * (first + begin), end - begin)
    fill_vectors(block + 4 * end, count - end, ZERO)


@kernel
def copy_product(block, rows, width, p, q, height, across, first_y, first_x, outside):
    """As copy_plane with step 1, of the product of two planes p and q."""
    top, bottom = inside(first_y, 1, height, rows)
    left, right = inside(first_x, 1, across, width)
    if left == right:
        top = bottom = rows
    fill_vectors(block, top * width, outside)
    to, at = block + 4 * top * width, 4 * ((first_y + top) * across + first_x + left)
    for _ in range(top, bottom):
        fill_vectors(to, left, outside)
        multiply_vectors(to + 4 * left, p + at, q + at, right - left)
        fill_vectors(to + 4 * right, width - right, outside)
        to, at = to + 4 * width, at + 4 * across
    fill_vectors(to, (rows - bottom) * width, outside)
