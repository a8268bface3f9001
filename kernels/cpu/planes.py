"""Padded copies of planes, which windows and taps read without looking where the plane ends.

Everything here works on addresses: an array that is sliced or passed on is a counted reference, which takes longer than a short row does.
Rows are copied in whole vectors. What is stored behind a row's end is stored over by the next; a block has room behind its last.
"""

from fastdtd.kernels.cpu.jit import kernel
from fastdtd.kernels.cpu.rows import copy_second_vectors, copy_strided, copy_vectors, fill_vectors, multiply_vectors


@kernel
def inside(first, step, size, count):
    """Of the positions first, first + step, ... (count of them): the number of the first inside 0..size-1, and of the first behind it."""
    begin = min(max(-(first // step), 0), count)
    return begin, max(min(-((first - size) // step), count), begin)


@kernel
def copy_plane(block, rows, width, plane, height, across, first_y, first_x, stride_down, stride_right, outside):
    """block (rows, width) <- the plane (height, across) at first + index * step, `outside` beside it."""
    top, bottom = inside(first_y, stride_down, height, rows)
    left, right = inside(first_x, stride_right, across, width)
    if left == right:
        top = bottom = rows
    fill_vectors(block, top * width, outside)
    to, source = block + 4 * top * width, plane + 4 * ((first_y + top * stride_down) * across + first_x + left * stride_right)
    for _ in range(top, bottom):
        fill_vectors(to, left, outside)
        if stride_right == 1:
            copy_vectors(to + 4 * left, source, 0, right - left)
        elif stride_right == 2:
            copy_second_vectors(to + 4 * left, source, right - left)
        else:
            copy_strided(to + 4 * left, source, stride_right, right - left)
        fill_vectors(to + 4 * right, width - right, outside)
        to, source = to + 4 * width, source + 4 * stride_down * across
    fill_vectors(to, (rows - bottom) * width, outside)


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
