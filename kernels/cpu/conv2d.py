"""Convolution and its redistribution: products of packed weights with packed columns, panel by panel.

Both directions are one loop. Copy the part of the input that a block of positions reads into padded planes; for a tile
of positions, pack what the taps read there as columns; multiply these with the weights of all outputs, two rows at a
time, by the micro-kernel; finish the sums in registers, or while they are in cache.

    direction       positions                           summed over                 one tap of a position reads
    forward         outputs                          input channels x taps       the input at position * stride + offset
    redistribute    inputs of one phase, see below   output channels x taps      ratio * c at position + offset

There is no im2col matrix, only a tile's part of one at a time, in the first-level cache. A block's planes have rows of
`width`, a little wider than the block of positions is, so that the tap (i, j) reads i * width + j further. Positions
are counted along the block's own rows, so that tiles are full vectors, however short rows are. Under a stride, values
are sorted into planes by the remainder of their position, so that it is the same again. Where this would be wasteful (a
far dilation), each tap has a plane of its own. A 1x1 convolution reads the tensor itself, as one row. Redistributing to
FEW_ROWS inputs or fewer, packing would take as long as the product: there the planes are read as they are, and
positions at the end of their rows are computed for nothing.

Under a stride (s, t), the inputs of a redistribution fall into s t phases by the remainder of their position. All
inputs of a phase are reached by the same taps of the kernel, so each phase is a plain convolution of its own and
nothing is multiplied by zero.

Shapes: x, c (N, *, OH, OW) and a, c_in (N, *, H, W) are used from a given channel on (a concatenation's inputs are
ranges of its channels); ratio is (N, K, OH, OW). The work is cut into units: image by image, block by block, and within
a block by `splits` of its panels; a call does the units first..last-1, so that threads divide them, and those of one
block together.
"""

import numpy as np
from fastdtd.kernels.codes import BOX, NONNEGATIVE, ONES, SIGNED
from fastdtd.kernels.cpu.elementwise import finish_row, redistribute_row
from fastdtd.kernels.cpu.jit import kernel
from fastdtd.kernels.cpu.microkernel import (
    CLASSES,
    FEW_ROWS,
    FEW_VECTORS,
    PANEL_COLUMNS,
    PANEL_DEPTH,
    PANEL_PITCH,
    PANEL_ROWS,
    PANEL_VECTORS,
    add_nonzero,
    add_nonzero_few,
    add_nonzero_one,
    add_split,
    add_split_few,
    add_split_one,
    finish_constant,
    finish_split,
    pack_columns,
    pack_products,
)
from fastdtd.kernels.cpu.planes import copy_plane, copy_product, fetch_plane, own_part
from fastdtd.kernels.cpu.rows import (
    any_negative,
    copy_exactly,
    fill_vectors,
    interleave_vectors,
    keep_sign_vectors,
    spread,
)
from fastdtd.kernels.cpu.vector_code import LANES
from fastdtd.kernels.scalar import ZERO

CONV2D_FEW_ROWS = FEW_ROWS
CONV2D_REPEATED = PANEL_COLUMNS  # a tile reads so many constants, wherever it begins in a row
CONV2D_COLUMNS = 2 * PANEL_COLUMNS  # tiles read, and ask for, this far beyond the last position
_BLOCK_BYTES = 1 << 18  # a block of planes fits the second-level cache with the weights that stream past it
_BLOCK_POSITIONS = 1536
_FEW_POSITIONS = 4 * PANEL_COLUMNS  # fewer are not worth a pass over all weights
_JOINED_POSITIONS = 3 * PANEL_COLUMNS // 2
_JOINED_BYTES, _MAX_JOINED = 3 << 18, 8
_CLASSES = tuple(np.array(CLASSES[rows], np.int64) for rows in sorted(CLASSES))  # of 1, 2 and 3 rows
_BOUNDS = len(CLASSES[PANEL_ROWS]) + 1
_ALIGNMENT = 64  # bytes


# ---- Sizes, for the plan ---------------------------------------------------------------------------------------------


def conv2d_columns_elements():
    """Floats of `columns`."""
    return PANEL_DEPTH * PANEL_PITCH + _ALIGNMENT


def conv2d_sums_elements(outputs):
    """Floats of `sums` of conv2d_forward, for a group's outputs; 0 where there is only one chunk."""
    return _STAGE + -(-outputs // PANEL_ROWS) * 2 * PANEL_ROWS * PANEL_COLUMNS + _ALIGNMENT


def conv2d_redistribute_sums_elements(inputs, features, stride_w, positions, columns):
    """And of conv2d_redistribute, for a group's inputs and blocks of so many positions, counted along rows of planes,
    and columns."""
    _, rows, row = _sums_shape(inputs, features, positions)
    return PANEL_COLUMNS + stride_w * rows * row + 2 * _line_elements(columns, stride_w) + _ALIGNMENT


def conv2d_joined(images, positions, block_floats):
    """Of how many images at a time the positions are joined, where a plane has so many and each image's block takes so
    many floats: alone, small planes fill tiles badly."""
    if positions > _JOINED_POSITIONS:
        return 1
    most = min(_JOINED_BYTES // max(4 * block_floats, 1), _MAX_JOINED)
    return -(-images // -(-images // max(most, 1)))  # groups of equal size


def conv2d_block_shape(rows, columns, halo_rows, halo_columns, planes):
    """Rows and columns of a block of a grid (rows, columns) of positions that reads so many planes, larger by the
    halo."""
    fitting = _BLOCK_BYTES // (4 * planes)
    across = columns
    if columns > _FEW_POSITIONS and (columns > _BLOCK_POSITIONS
                                     or (1 + halo_rows) * (columns + halo_columns) > fitting):
        across = min(max(_FEW_POSITIONS, fitting // (1 + halo_rows) - halo_columns), _BLOCK_POSITIONS)
        across = -(-columns // -(-columns // across))
        across = min(-(-across // LANES) * LANES, columns)
    down = _block_rows(rows, across, halo_rows, halo_columns, fitting)
    half = min(-(-columns // (2 * LANES)) * LANES, columns)
    lower = _block_rows(rows, half, halo_rows, halo_columns, fitting)
    if 2 * down < 3 * halo_rows and 3 * (down + halo_rows) * lower > 4 * (lower + halo_rows) * down:
        down, across = lower, half  # rather narrow than all halo
    return -(-rows // -(-rows // down)), across  # blocks of equal height


def _block_rows(rows, across, halo_rows, halo_columns, fitting):
    width = across + halo_columns
    down = max(fitting // width - halo_rows, -(-_FEW_POSITIONS // width))
    return max(min(down, rows, _BLOCK_POSITIONS // width), 1)


def conv2d_packed_shape(groups, rows, depth, is_backward):
    """Shape of packed weights (groups, chunks, panels, entries, rows of a panel) for a matrix (rows, depth) in each
    group."""
    if is_backward and rows <= FEW_ROWS:
        return groups, 1, 1, depth, _panel_rows(rows)
    chunks = max(-(-depth // PANEL_DEPTH), 1)
    return groups, chunks, -(-rows // PANEL_ROWS), -(-depth // chunks), PANEL_ROWS


def conv2d_bounds_shape(packed_shape):
    """Shape of their bounds."""
    return *packed_shape[:3], (1 << packed_shape[4]) + 1


# ---- Packing weights -------------------------------------------------------------------------------------------------


@kernel
def conv2d_pack(packed, offsets, bounds, matrices, taps, sides):
    """Sort each panel's entries by class, chunk by chunk: packed (groups, chunks, panels, entries, rows of a panel),
    offsets (.., entries) and bounds (.., classes + 1) <- matrices (groups, rows, depth).

    sides (depth,) says where an entry counts: 1: where it is positive, -1: negative, 2: everywhere, 0: nowhere, 3:
    where it is not zero. taps (depth,) is where each reads, for panels of other rows than PANEL_ROWS; those read packed
    columns.
    """
    groups, rows, depth = matrices.shape
    chunks, panels, length, panel_rows = packed.shape[1:5]
    classes = _CLASSES[panel_rows - 1]
    for g in range(groups):
        for chunk in range(chunks):
            begin, end = chunk * length, min((chunk + 1) * length, depth)
            for panel in range(panels):
                to, bounds[g, chunk, panel, 0] = 0, 0
                for i in range(len(classes)):
                    for d in range(begin, end):
                        counting = 0
                        for row in range(panel_rows):
                            k = panel * panel_rows + row
                            weight = matrices[g, k, d] if k < rows else ZERO
                            if sides[d] == 2 or (weight != ZERO if sides[d] == 3 else sides[d] * weight > ZERO):
                                counting |= 1 << row
                        if counting == classes[i]:
                            for row in range(panel_rows):
                                k = panel * panel_rows + row
                                packed[g, chunk, panel, to, row] = matrices[g, k, d] if k < rows else ZERO
                            offsets[g, chunk, panel, to] = (taps[d] if panel_rows != PANEL_ROWS else
                                                            (d - begin) * PANEL_PITCH)
                            to += 1
                    bounds[g, chunk, panel, i + 1] = to
                for entry in range(to, length):
                    packed[g, chunk, panel, entry], offsets[g, chunk, panel, entry] = ZERO, 0


# ---- Tiles -----------------------------------------------------------------------------------------------------------

_STAGE = (2 * PANEL_ROWS + 1) * PANEL_COLUMNS  # floats: a panel's results, and a row of zeros


@kernel
def _aligned(address):
    return (address + _ALIGNMENT - 1) // _ALIGNMENT * _ALIGNMENT


@kernel
def _sums_shape(inputs, features, positions):
    """Whether a product is one of few rows, how many rows of sums each phase has, and floats of a row, which holds a
    tile or, of few rows, a block."""
    is_few, panel_rows = inputs <= FEW_ROWS, _panel_rows(inputs)
    rows = -(-inputs // panel_rows) * panel_rows
    row = positions + PANEL_COLUMNS if is_few else PANEL_COLUMNS
    return is_few, rows * (2 if features in (SIGNED, BOX) else 1), row


@kernel
def _panel_rows(inputs):
    """Rows of a panel that redistributes to so many inputs of a group."""
    return PANEL_ROWS if inputs > FEW_ROWS else FEW_ROWS if inputs > 1 else 1


@kernel
def _line_elements(columns, stride_w):
    """Floats of a row of inputs, joined from its phases."""
    return max(columns, PANEL_COLUMNS) * stride_w + 2 * LANES


@kernel
def _tile(tile, positions, most, overlaps):
    """First position and number of vectors, at most so many, of a tile, where all are about as wide: narrow ones are
    slow. If `overlaps`, the last begins where all its lanes have positions, so that some are computed twice."""
    all_vectors = -(-positions // LANES)
    tiles = -(-all_vectors // most)
    begin = all_vectors * tile // tiles
    vectors = all_vectors * (tile + 1) // tiles - begin
    place = begin * LANES
    return max(min(place, positions - vectors * LANES), 0) if overlaps else place, vectors


@kernel
def _pack_tile(p_columns, p_a, p_c, taps, depth, place, vectors, positions, across, width, rows, image_floats,
               image_floats_c):
    """columns <- what `depth` taps (an address) read at the positions of a tile, in rows of `across` that begin `width`
    floats one after the other, so many of each image: at p_a, times the same at p_c if that is not 0. Images lie
    image_floats and image_floats_c apart."""
    done, end = 0, min(vectors * LANES, positions - place)
    while done < end:
        row, column = (place + done) // across, (place + done) % across
        image, at = row // rows, 4 * (row % rows * width + column)
        count = min(across - column, end - done)
        if p_c:
            pack_products(-(-count // LANES), p_columns + 4 * done, p_a + 4 * image * image_floats + at,
                          p_c + 4 * image * image_floats_c + at, taps, depth)
        else:
            pack_columns(-(-count // LANES), p_columns + 4 * done, p_a + 4 * image * image_floats + at, 0, taps, depth)
        done += count


@kernel
def _store_rows(p_out, p_values, place, count, columns, across):
    """out <- `count` values of the positions from `place` on, in rows of `columns` that begin `across` floats one after
    the other."""
    if place + count <= columns or columns == across:
        copy_exactly(p_out + 4 * place, p_values, count, False)
        return
    done = 0
    while done < count:
        row, column = (place + done) // columns, (place + done) % columns
        piece = min(columns - column, count - done)
        copy_exactly(p_out + 4 * (row * across + column), p_values + 4 * done, piece, False)
        done += piece


@kernel
def _finish_rows(p_x, p_ratio, p_constant, constant_row, pattern, top, left, p_y, place, count, columns, across, bias,
                 is_box, x_min, x_max, relevance, z_min):
    """x and ratio of `count` positions from `place` on, where z is a constant (and y, if is_box)."""
    done, absorbs = 0, False
    while done < count:
        row, column = (place + done) // columns, (place + done) % columns
        piece, to = min(columns - column, count - done), 4 * (row * across + column)
        p_z = p_constant + 4 * (pattern[top + row] * constant_row + left + column)
        absorbs |= finish_row(p_x + to, p_ratio + to, p_z, p_y + 4 * done, piece, bias, is_box, x_min, x_max, relevance,
                              z_min)
        done += piece
    return absorbs


@kernel
def _same_pattern(pattern, first, last):
    """Whether rows first to last, inclusive, have the same constants."""
    row = first
    while row < last and pattern[row + 1] == pattern[first]:
        row += 1
    return row == last


# ---- Forward ---------------------------------------------------------------------------------------------------------


@kernel
def conv2d_forward(x, ratio, dead, a, packed, offsets, bounds, taps, bias, constant, pattern, z_min, planes, block,
                   columns, sums, x_channel, a_channel, stride_h, stride_w, block_rows, block_columns, halo_rows,
                   halo_columns, channels, splits, joined, features, x_min, x_max, relevance, first, last):
    """x <- W a + bias, clipped to x_min..x_max; ratio <- |x| / z; dead[n] <- 1 where z = 0 absorbs something
    (scalar.ratio_of).

    packed, offsets, bounds are of conv2d_pack. Its depth runs over the copies that the features need (two of both signs
    under SIGNED, else one), the channels of a group (`channels`), the taps; taps (depth,) is where each reads, from a
    position on. planes (P, 2) holds where each plane of a channel begins, relative to a position; with none the tensor
    itself is read. bias is (K,).

    Under ONES z depends on the position alone, and under BOX (W+ (a - low) - W- (high - a) = W a - W+ low - W- high) it
    is y without its bias and such a constant: constant (K, patterns, OW + CONV2D_REPEATED), each row followed by
    itself, pattern (OH,) says which of them a row has. A z up to z_min (K,) counts as zero. block, columns and sums are
    flat scratch. Of small planes the positions of `joined` images are joined.
    """
    outputs, height, across = ratio.shape[1], x.shape[2], x.shape[3]
    size = height * across
    groups, chunks, panels, length, _ = packed.shape
    per_group, copies, depth = outputs // groups, 2 if features == SIGNED else 1, len(taps)
    is_split = features in (NONNEGATIVE, SIGNED)
    direct = len(planes) == 0
    width, plane_rows = block_columns + halo_columns, block_rows + halo_rows
    blocks_across = -(-across // block_columns)
    blocks = -(-height // block_rows) * blocks_across
    block_floats = copies * channels * len(planes) * plane_rows * width
    p_x, p_ratio, p_constant = x.ctypes.data, ratio.ctypes.data, constant.ctypes.data
    constant_bytes = 4 * constant.shape[1] * constant.shape[2]
    p_a, p_block, p_columns, p_stage = a.ctypes.data, block.ctypes.data, _aligned(columns.ctypes.data), _aligned(
        sums.ctypes.data)
    p_zeros = p_stage + 8 * PANEL_ROWS * PANEL_COLUMNS
    p_sums, panel_bytes = p_stage + 4 * _STAGE, 8 * PANEL_ROWS * PANEL_COLUMNS
    p_packed, p_all_offsets, p_all_bounds = packed.ctypes.data, offsets.ctypes.data, bounds.ctypes.data
    fill_vectors(p_zeros, PANEL_COLUMNS, ZERO)
    for block_index in range(first // splits, -(-last // splits)):
        n, index = block_index // blocks * joined, block_index % blocks
        images = min(joined, len(x) - n)
        top, left = index // blocks_across * block_rows, index % blocks_across * block_columns
        rows_here, columns_here = min(block_rows, height - top), min(block_columns, across - left)
        positions = images * rows_here * columns_here
        contiguous = images == 1 and (columns_here == across or height == 1)
        # rows of results: of an image, or of its plane
        row_positions, x_row, ratio_row = columns_here, across, across
        if images > 1:
            row_positions, x_row, ratio_row = size, x.shape[1] * size, outputs * size
        begin, end = own_part(groups * panels, block_index, splits, first, last)
        absorbs = False
        for g in range(begin // panels, -(-end // panels)):
            if not direct:
                at = 0
                for image in range(n, n + images):
                    for copy in range(copies):
                        for channel in range(g * channels, (g + 1) * channels):
                            p_plane = p_a + 4 * (image * a.shape[1] + a_channel + channel) * a.shape[2] * a.shape[3]
                            fetch_plane(p_plane + 4 * a.shape[2] * a.shape[3], plane_rows * stride_h,  # the next
                                        columns_here * stride_w, a.shape[3], top * stride_h, left * stride_w)
                            for i in range(len(planes)):
                                copy_plane(p_block + 4 * at, plane_rows, width, p_plane, a.shape[2], a.shape[3],
                                           top * stride_h + planes[i, 0], left * stride_w + planes[i, 1], stride_h,
                                           stride_w, ZERO)
                                if copies == 2:
                                    keep_sign_vectors(p_block + 4 * at, plane_rows * width, copy == 0)
                                at += plane_rows * width
            p_read, image_floats = p_block, block_floats
            if direct:
                image_floats = a.shape[1] * a.shape[2] * a.shape[3]
                p_read = p_a + 4 * ((n * a.shape[1] + a_channel + g * channels) * a.shape[2] * a.shape[3] + left)
            first_panel, last_panel = max(begin - g * panels, 0), min(end - g * panels, panels)
            first_channel = g * per_group + first_panel * PANEL_ROWS
            p_own_x = p_x + 4 * ((n * x.shape[1] + x_channel + first_channel) * size + top * across + left)
            p_own_ratio = p_ratio + 4 * ((n * outputs + first_channel) * size + top * across + left)
            for tile in range(-(-positions // PANEL_COLUMNS)):
                place, vectors = _tile(tile, positions, PANEL_VECTORS, True)
                count = min(vectors * LANES, positions - place)
                in_place = contiguous and count == vectors * LANES
                top_row = top + place // columns_here
                if in_place and not is_split:
                    in_place = _same_pattern(pattern, top_row, top + (place + count - 1) // columns_here)
                constant_at = 4 * (pattern[top_row] * constant.shape[2] + left + place % columns_here)
                soon = 4 * (place + PANEL_ROWS * size)  # the next panel's rows
                for chunk in range(chunks):
                    _pack_tile(p_columns, p_read, 0, taps.ctypes.data + 4 * chunk * length,
                               min(length, depth - chunk * length), place, vectors, positions, columns_here, width,
                               rows_here, image_floats, 0)
                    entry = (g * chunks + chunk) * panels + first_panel
                    p_weights = p_packed + 4 * entry * length * PANEL_ROWS
                    p_offsets, p_bounds = p_all_offsets + 4 * entry * length, p_all_bounds + 4 * entry * _BOUNDS
                    own, k, at_x, at_ratio = p_sums, first_channel, p_own_x, p_own_ratio
                    for _ in range(first_panel, last_panel):
                        start, stride = (own, PANEL_COLUMNS) if chunk else (p_zeros, 0)
                        rows = min(PANEL_ROWS, (g + 1) * per_group - k)
                        second = bias[min(k + 1, outputs - 1)]
                        if chunk < chunks - 1 and not is_split:
                            add_nonzero(vectors, own, PANEL_COLUMNS, start, stride, p_weights, p_offsets, p_bounds,
                                        p_columns, own + panel_bytes, PANEL_COLUMNS)
                        elif chunk < chunks - 1:
                            add_split(vectors, own, PANEL_COLUMNS, start, stride, p_weights, p_offsets, p_bounds,
                                      p_columns, own + panel_bytes, PANEL_COLUMNS)
                        elif in_place and rows == PANEL_ROWS and not is_split:
                            absorbs |= finish_constant(
                                vectors, at_x + 4 * place, at_ratio + 4 * place, size, start, stride, p_weights,
                                p_offsets, p_bounds, p_columns, at_x + soon, at_ratio + soon, size,
                                p_constant + k * constant_bytes + constant_at, constant_bytes // 4, features == BOX,
                                bias[k], second, z_min[k], z_min[k + 1], x_min, x_max, relevance != 0)
                        elif in_place and rows == PANEL_ROWS:
                            absorbs |= finish_split(vectors, at_x + 4 * place, at_ratio + 4 * place, size, start,
                                                    stride, p_weights, p_offsets, p_bounds, p_columns, at_x + soon,
                                                    at_ratio + soon, size, bias[k], second, x_min, x_max,
                                                    relevance != 0)
                        elif is_split:
                            p_staged = p_stage + 4 * PANEL_ROWS * PANEL_COLUMNS
                            finish_split(vectors, p_stage, p_staged, PANEL_COLUMNS, start, stride, p_weights, p_offsets,
                                         p_bounds, p_columns, at_x + soon, at_ratio + soon, size, bias[k], second,
                                         x_min, x_max, relevance != 0)
                            for i in range(rows):
                                own_stage = 4 * i * PANEL_COLUMNS
                                absorbs |= any_negative(p_staged + own_stage, count)
                                _store_rows(at_x + 4 * i * size, p_stage + own_stage, place, count, row_positions,
                                            x_row)
                                _store_rows(at_ratio + 4 * i * size, p_staged + own_stage, place, count,
                                            row_positions, ratio_row)
                        else:
                            add_nonzero(vectors, p_stage, PANEL_COLUMNS, start, stride, p_weights, p_offsets, p_bounds,
                                        p_columns, at_x + soon, size)
                            for i in range(rows):
                                absorbs |= _finish_rows(
                                    at_x + 4 * i * size, at_ratio + 4 * i * size, p_constant + (k + i) * constant_bytes,
                                    constant.shape[2], pattern, top, left, p_stage + 4 * i * PANEL_COLUMNS, place,
                                    count, columns_here, across, bias[k + i], features == BOX, x_min, x_max,
                                    relevance != 0, z_min[k + i])
                        p_weights, p_offsets = p_weights + 4 * length * PANEL_ROWS, p_offsets + 4 * length
                        p_bounds, own, k = p_bounds + 4 * _BOUNDS, own + panel_bytes, k + PANEL_ROWS
                        at_x, at_ratio = at_x + 4 * PANEL_ROWS * size, at_ratio + 4 * PANEL_ROWS * size
        if absorbs:
            dead[n:n + images] = 1


# ---- Redistribute ----------------------------------------------------------------------------------------------------


@kernel
def _join_phases(p_line, p_row, phases, group, end, product, left, columns, stride_w):
    """So many columns of a row of inputs, from the rows of its phases' products, `product` floats apart."""
    if stride_w == 2 and end - group == 2:
        even = phases[group, 1]  # 0, or 1 where the padding is odd
        count = min(columns, max(phases[group, 3], phases[group + 1, 3]) - left)
        interleave_vectors(p_line, p_row + 4 * even * product, p_row + 4 * (1 - even) * product, count)
        return
    for phase in range(group, end):
        count = min(columns, phases[phase, 3] - left)
        spread(p_line + 4 * phases[phase, 1], p_row + 4 * (phase - group) * product, stride_w, count)


@kernel
def _multiply_few(p_sums, stride, p_zeros, weights, offsets, bounds, p_planes, positions, parts, panel_rows):
    """sums (parts * panel_rows, stride) <- one panel's product with planes, for so many positions."""
    most = PANEL_VECTORS if panel_rows == 1 else FEW_VECTORS
    for tile in range(-(-positions // (most * LANES))):
        place, vectors = _tile(tile, positions, most, False)
        own, planes, soon = p_sums + 4 * place, p_planes + 4 * place, p_sums + 4 * (place + most * LANES)
        if panel_rows == 1 and parts == 1:
            add_nonzero_one(vectors, own, stride, p_zeros, 0, weights, offsets, bounds, planes, soon, stride)
        elif panel_rows == 1:
            add_split_one(vectors, own, stride, p_zeros, 0, weights, offsets, bounds, planes, soon, stride)
        elif parts == 1:
            add_nonzero_few(vectors, own, stride, p_zeros, 0, weights, offsets, bounds, planes, soon, stride)
        else:
            add_split_few(vectors, own, stride, p_zeros, 0, weights, offsets, bounds, planes, soon, stride)


@kernel
def conv2d_redistribute(c_in, c, ratio, a, density, packed, offsets, bounds, taps, low, high, phases, planes, block,
                        columns, sums, c_in_channel, c_channel, a_channel, groups, stride_h, stride_w, block_rows,
                        block_columns, halo_rows, halo_columns, splits, joined, features, sparse_below, relevance,
                        accumulate, first, last):
    """c_in <- V^T (ratio * c), or added to c_in if `accumulate`. If `relevance`, times u. Images whose density[n] is
    less than sparse_below are left to sparse2d_redistribute; where that is 0, density is not read.

    packed, offsets, bounds are of conv2d_pack, flat, those of one phase after those of another, made of the transposed
    V. Where an input has two features (SIGNED, BOX), whose V are W+ and -W-, they are made of the transposed W, so that
    both cost one product. A phase without taps is reached by no output: it gets zero.

    phases has a row for each phase: of its grid of inputs the first row and column, rows, columns; its number of taps;
    where it begins in packed, offsets, bounds, and taps, which holds where each tap reads, from a position on. All
    phases read the same planes; with none, ratio and c themselves. A block is so many positions of each phase. block,
    columns and sums are flat scratch. Of small planes the positions of `joined` images are joined.
    """
    inputs, outputs = len(low), ratio.shape[1]
    height, across = c_in.shape[2], c_in.shape[3]
    per_group, from_group = inputs // groups, outputs // groups
    width, plane_rows, direct = block_columns + halo_columns, block_rows + halo_rows, len(planes) == 0
    is_few, sum_rows, sum_columns = _sums_shape(per_group, features, block_rows * width)
    panel_rows = _panel_rows(per_group)
    panels, parts = -(-per_group // panel_rows), 2 if features in (SIGNED, BOX) else 1
    grid_rows = grid_columns = 1
    for phase in range(len(phases)):
        grid_rows, grid_columns = max(grid_rows, phases[phase, 2]), max(grid_columns, phases[phase, 3])
    blocks_across = -(-grid_columns // block_columns)
    blocks = -(-grid_rows // block_rows) * blocks_across
    block_floats = from_group * len(planes) * plane_rows * width
    as_it_is = (features == NONNEGATIVE and not relevance) or features == ONES
    p_in, p_a, p_block, p_columns = c_in.ctypes.data, a.ctypes.data, block.ctypes.data, _aligned(columns.ctypes.data)
    p_packed, p_offsets, p_bounds, p_taps = (packed.ctypes.data, offsets.ctypes.data, bounds.ctypes.data,
                                             taps.ctypes.data)
    p_zeros = _aligned(sums.ctypes.data)
    p_sums, product = p_zeros + 4 * PANEL_COLUMNS, sum_rows * sum_columns
    panel_floats = parts * panel_rows * sum_columns
    p_line, line = p_sums + 4 * stride_w * product, _line_elements(block_columns, stride_w)
    p_ratio, p_c, size, in_size = ratio.ctypes.data, c.ctypes.data, c.shape[2] * c.shape[3], height * across
    fill_vectors(p_zeros, PANEL_COLUMNS, ZERO)
    for block_index in range(first // splits, -(-last // splits)):
        n, index = block_index // blocks * joined, block_index % blocks
        images, is_dense = min(joined, len(c) - n), sparse_below <= ZERO
        for image in range(n, n + images):
            is_dense = is_dense or density[image] >= sparse_below
        if not is_dense:
            continue
        top, left = index // blocks_across * block_rows, index % blocks_across * block_columns
        columns_here, rows_here = min(block_columns, grid_columns - left), min(block_rows, grid_rows - top)
        # how long a row of positions is, and how many of them there are
        row_width = width if is_few else columns_here
        image_positions = (rows_here - 1) * row_width + columns_here
        positions = images * image_positions
        contiguous = stride_h == stride_w == 1 and row_width == columns_here and (row_width == across or height == 1)
        writes_rows = contiguous and as_it_is and not accumulate and images == 1
        begin, end = own_part(groups * panels, block_index, splits, first, last)
        for g in range(begin // panels, -(-end // panels)):
            own_panels = range(max(begin - g * panels, 0), min(end - g * panels, panels))
            p_read, p_factor, image_floats = p_block, 0, block_floats
            if direct:
                image_floats = outputs * size
                p_read = p_ratio + 4 * ((n * outputs + g * from_group) * size + left)
                p_factor = p_c + 4 * ((n * c.shape[1] + c_channel + g * from_group) * size + left)
            else:
                at = 0
                for image in range(n, n + images):
                    for k in range(g * from_group, (g + 1) * from_group):
                        p_planes = (p_ratio + 4 * (image * outputs + k) * size,
                                    p_c + 4 * (image * c.shape[1] + c_channel + k) * size)
                        for p_plane in p_planes:  # the next ones
                            fetch_plane(p_plane + 4 * size, plane_rows, columns_here, c.shape[3], top, left)
                        for i in range(len(planes)):
                            copy_product(p_block + 4 * at, plane_rows, width, *p_planes, c.shape[2], c.shape[3],
                                         top + planes[i, 0], left + planes[i, 1], ZERO)
                            at += plane_rows * width
            for tile in range(1 if is_few else -(-positions // PANEL_COLUMNS)):
                place, vectors = (0, 0) if is_few else _tile(tile, positions, PANEL_VECTORS, writes_rows)
                count = positions if is_few else min(vectors * LANES, positions - place)
                in_place = writes_rows and count == vectors * LANES
                p_own = p_in + 4 * (top * stride_h * across + left + place)
                group = 0
                while group < len(phases):  # a group of phases is one row of inputs, then the next below at stride_h
                    first_y, rows_down, next_group = phases[group, 0], phases[group, 2], group + 1
                    while next_group < len(phases) and phases[next_group, 0] == first_y:
                        next_group += 1
                    for phase in range(group, next_group if top < rows_down else group):
                        depth, p_phase = from_group * phases[phase, 4], p_sums + 4 * (phase - group) * product
                        if is_few:
                            entry = phases[phase, 6] + g * depth
                            weights = p_packed + 4 * (phases[phase, 5] + g * depth * panel_rows)
                            own_bounds = p_bounds + 4 * (phases[phase, 7] + g * ((1 << panel_rows) + 1))
                            _multiply_few(p_phase, sum_columns, p_zeros, weights, p_offsets + 4 * entry, own_bounds,
                                          p_read, positions, parts, panel_rows)
                            continue
                        chunks = max(-(-depth // PANEL_DEPTH), 1)
                        length = -(-depth // chunks)
                        for chunk in range(chunks):
                            _pack_tile(p_columns, p_read, p_factor, p_taps + 4 * (phases[phase, 8] + chunk * length),
                               min(length, depth - chunk * length), place, vectors, positions, columns_here,
                                       width, rows_here, image_floats, c.shape[1] * size)
                            for panel in own_panels:
                                entry = (g * chunks + chunk) * panels + panel
                                weights = p_packed + 4 * (phases[phase, 5] + entry * length * PANEL_ROWS)
                                own_offsets = p_offsets + 4 * (phases[phase, 6] + entry * length)
                                own_bounds = p_bounds + 4 * (phases[phase, 7] + entry * _BOUNDS)
                                own, own_stride = p_phase + 4 * panel * panel_floats, PANEL_COLUMNS
                                channel = n * c_in.shape[1] + c_in_channel + g * per_group + panel * PANEL_ROWS
                                soon = p_own + 4 * channel * in_size
                                if in_place and (panel + 1) * PANEL_ROWS <= per_group:
                                    own, own_stride = soon, in_size
                                    soon += 4 * PANEL_ROWS * in_size
                                start, stride = (own, own_stride) if chunk else (p_zeros, 0)
                                if parts == 1:
                                    add_nonzero(vectors, own, own_stride, start, stride, weights, own_offsets,
                                                own_bounds, p_columns, soon, in_size)
                                else:
                                    add_split(vectors, own, own_stride, start, stride, weights, own_offsets, own_bounds,
                                              p_columns, soon, in_size)
                    for panel in own_panels if top < rows_down else range(0):
                        rows = min(panel_rows, per_group - panel * panel_rows)
                        for row in range(0 if in_place and rows == panel_rows else rows):
                            channel = g * per_group + panel * panel_rows + row
                            done = 0
                            while done < count:
                                image, at = n + (place + done) // image_positions, (place + done) % image_positions
                                y, column = at // row_width, at % row_width
                                piece = min(image_positions - at if contiguous else columns_here - column, count - done)
                                p_pos = p_sums + 4 * (panel * panel_floats + row * sum_columns + done)
                                p_neg = p_pos + 4 * (parts - 1) * panel_rows * sum_columns
                                done += piece + row_width - columns_here
                                if top + y >= rows_down or (sparse_below > ZERO and density[image] < sparse_below):
                                    continue
                                if stride_w > 1:
                                    _join_phases(p_line, p_pos, phases, group, next_group, product, left + column,
                                                 piece, stride_w)
                                    if parts > 1:
                                        _join_phases(p_line + 4 * line, p_neg, phases, group, next_group, product,
                                                     left + column, piece, stride_w)
                                    p_pos, p_neg = p_line, p_line + 4 * (parts - 1) * line
                                position = (first_y + (top + y) * stride_h) * across + (left + column) * stride_w
                                values = min(in_size - position if contiguous else across - (left + column) * stride_w,
                                             piece * stride_w)
                                to = p_in + 4 * ((image * c_in.shape[1] + c_in_channel + channel) * in_size + position)
                                if as_it_is:
                                    copy_exactly(to, p_pos, values, accumulate != 0)
                                else:
                                    value = p_a + 4 * ((image * a.shape[1] + a_channel + channel) * in_size + position)
                                    redistribute_row(to, p_pos, p_neg, value, values, low[channel], high[channel],
                                                     features == BOX, relevance != 0, accumulate != 0)
                    group = next_group
