"""Winograd's convolution F(4x4, 3x3) for 3x3 kernels of stride 1: 36 products for 16 outputs, where the definition
takes 144.

Lavin and Gray, Fast Algorithms for Convolutional Neural Networks, CVPR 2016. Outputs are cut into tiles of 4 x 4. A
tile reads 6 x 6 inputs; transformed, these are 36 points. At each point the channels are summed by an ordinary matrix
product over many tiles, and the 36 sums are transformed back. The points' matrices are made once, from W, from V and,
for the backward pass, from V^T with its taps turned round.

The values that are summed here are non-negative (features NONNEGATIVE), so the transforms' cancellations stay small
beside them. Only where z is zero, or far below others of its tile, would they matter: what rounding leaves there of the
others is nothing to divide by. So outputs whose inputs are all zeros are found beforehand and set, and other doubtful
ones are summed once more by the definition.

Tiles of all images are counted through: image by image, row by row. The work is cut into `blocks` of at most `block`
tiles, of about as many vectors each, and these by groups and by `splits` of a group's outputs; a call does the units
first..last-1, and those of one block together. Vectors run along tiles.

Scratch, per worker: lines holds 6 rows of input, and what tiles read of them, points (36, channels, block) the
transformed input, sums (36, rows, block) the products of `panels_at_once` panels, stage rows of outputs, seen the
largest input of all channels and then what `_look_for_zeros` finds.
"""

import numpy as np
from fastdtd.kernels.cpu.arrays import as_int32
from fastdtd.kernels.cpu.elementwise import Finish
from fastdtd.kernels.cpu.jit import kernel
from fastdtd.kernels.cpu.microkernel import MULTIPLY_TILE, TILE_COLUMNS, TILE_ROWS
from fastdtd.kernels.cpu.planes import copy_plane, copy_product, fetch_plane, own_part
from fastdtd.kernels.cpu.rows import copy_exactly, fetch_to_write, fill_vectors, larger_vectors
from fastdtd.kernels.cpu.scalar import clip, ratio_of
from fastdtd.kernels.cpu.vector_code import (
    F32,
    I32,
    I64,
    LANES,
    NO_LANE,
    VECTOR,
    ZEROS,
    any_lane,
    integer,
    lanes_of,
    load_vector,
    loop_range,
    pick,
    pointers,
    splat,
    store_vector,
)
from fastdtd.kernels.scalar import MIN_DENOMINATOR, ZERO
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

WINOGRAD_POINTS = 36
_SUMS_BYTES = 1 << 19  # sums stay in the second-level cache
_TRANSFORM = np.array([[1 / 4, 0, 0], [-1 / 6, -1 / 6, -1 / 6], [-1 / 6, 1 / 6, -1 / 6], [1 / 24, 1 / 12, 1 / 6],
                       [1 / 24, -1 / 12, 1 / 6], [0, 0, 1]])
_TILE_1, _TILE_2, _TILE_3 = (*MULTIPLY_TILE, MULTIPLY_TILE[-1])[:3]


# ---- Sizes and weights, for the plan ---------------------------------------------------------------------------------


def winograd2d_packed_shape(groups, rows, depth):
    """Shape of packed weights for 3 x 3 kernels from `depth` channels to `rows` in each group."""
    return groups * WINOGRAD_POINTS, -(-rows // TILE_ROWS), depth, TILE_ROWS


@kernel
def winograd2d_pack(packed, weight):
    """packed (groups * 36, panels, C, TILE_ROWS) <- G w G^T of weight (groups, K, C, 3, 3), filled with zeros."""
    groups, outputs, channels = weight.shape[:3]
    for g in range(groups):
        for panel in range(packed.shape[1]):
            for channel in range(channels):
                for row in range(TILE_ROWS):
                    k = panel * TILE_ROWS + row
                    for i in range(6):
                        for j in range(6):
                            total = 0.0
                            for p in range(3):
                                for q in range(3):
                                    if k < outputs:
                                        total += _TRANSFORM[i, p] * weight[g, k, channel, p, q] * _TRANSFORM[j, q]
                            packed[g * WINOGRAD_POINTS + 6 * i + j, panel, channel, row] = total


def winograd2d_tiles(height, width):
    """Tiles of one image."""
    return -(-height // 4) * -(-width // 4)


def winograd2d_pays(depth, rows, height, width, products):
    """Whether this is faster than conv2d for sums over `depth` channels to so many rows (docs/kernels.md).

    Both take so many multiply-adds for a tile, at the rates that were measured; products: 2 forward, of y and z, for
    which conv2d takes one, and 1 backward, where conv2d skips half.
    """
    tiles = winograd2d_tiles(height, width)
    if height * width < 81 or (products == 2 and tiles < 16):
        return False  # one image has too few tiles to fill a vector, and to read so many weights for
    used = height * width / (16 * tiles)
    direct = (0.95 if products == 2 else 0.83) * 144 * used * depth * rows
    return products * (0.95 * WINOGRAD_POINTS * depth + 1000) * rows + 450 * depth < direct


def winograd2d_block(panels, products, tiles, workers):
    """Blocks of so many tiles, tiles of the largest, and how many panels (of each product) are multiplied before they
    are transformed back. As many blocks for each worker as for the others, where there are tiles enough."""
    blocks, vectors = -(-tiles // TILE_COLUMNS), -(-tiles // LANES)
    if -(-blocks // workers) * workers <= vectors:
        blocks = -(-blocks // workers) * workers
    block = -(-vectors // blocks) * LANES
    panel_count = _SUMS_BYTES // (4 * WINOGRAD_POINTS * products * TILE_ROWS * block)
    return blocks, block, min(max(panel_count, 1), panels)


def winograd2d_scratch(channels, panels, block, width):
    """Floats of the scratch arrays lines, points, sums, stage, seen."""
    rows, lines = panels * TILE_ROWS, _lines(block, width) + 36 * (block + LANES)
    seen = 6 * 6 * block + block // LANES + 1 + 16 * block // LANES + 16 * block
    return lines, WINOGRAD_POINTS * _stride(channels,
                                            block), WINOGRAD_POINTS * _stride(rows, block), 2 * 16 * LANES, seen


@kernel
def _lines(block, width):
    """Floats of six lines of tiles in one row of an image."""
    return 6 * (4 * min(-(-width // 4), block) + 2) + 6 * LANES


@kernel
def _stride(rows, block):
    """Floats from one point to the next: not a multiple of what the first-level cache maps to one place."""
    return rows * block + LANES


# ---- Winograd's transforms, for a vector of tiles --------------------------------------------------------------------


def _combine(builder, *terms):
    """The sum of factor * value over the terms (factor, value), multiplied and added in this order."""
    total = None
    for factor, value in terms:
        scaled = value if abs(factor) == 1 else builder.fmul(value, ir.Constant(VECTOR, [float(abs(factor))] * LANES),
                                                             flags=("contract",))
        if total is None:
            total = scaled if factor > 0 else builder.fsub(ZEROS, scaled, flags=("contract",))
        else:
            total = (builder.fadd if factor > 0 else builder.fsub)(total, scaled, flags=("contract",))
    return total


def _transform_input(builder, d):
    """B^T d: six inputs of a line -> their six points."""
    p, q = _combine(builder, (1, d[4]), (-4, d[2])), _combine(builder, (1, d[3]), (-4, d[1]))
    r, s = _combine(builder, (1, d[4]), (-1, d[2])), _combine(builder, (1, d[3]), (-1, d[1]))
    return [_combine(builder, (1, d[4]), (4, d[0]), (-5, d[2])), _combine(builder, (1, p), (1, q)),
            _combine(builder, (1, p), (-1, q)), _combine(builder, (1, r), (2, s)), _combine(builder, (1, r), (-2, s)),
            _combine(builder, (1, d[5]), (4, d[1]), (-5, d[3]))]


def _transform_output(builder, m):
    """A^T m: six points of a line -> its four outputs."""
    p, q = _combine(builder, (1, m[1]), (1, m[2])), _combine(builder, (1, m[1]), (-1, m[2]))
    r, s = _combine(builder, (1, m[3]), (1, m[4])), _combine(builder, (1, m[3]), (-1, m[4]))
    return [_combine(builder, (1, m[0]), (1, p), (1, r)), _combine(builder, (1, q), (2, s)),
            _combine(builder, (1, p), (4, r)), _combine(builder, (1, m[5]), (1, q), (8, s))]


@intrinsic
def _sort_columns(typing_context, columns, stride, lines, width, count):
    """columns (6, 6, `stride` floats apart) <- what `count` tiles read in lines (6, `width`), in whole vectors: tile t
    reads columns 4 t to 4 t + 5."""
    def codegen(context, builder, signature, arguments):
        p_columns, p_lines = pointers(builder, (arguments[0], arguments[2]), F32, F32)
        stride, width, count = arguments[1], arguments[3], arguments[4]
        half = [4 * i for i in range(LANES // 2)]

        def one_vector(tile, nothing):
            for i in range(6):
                begin = builder.add(builder.mul(width, integer(i)), builder.shl(tile, integer(2)))
                line = [load_vector(builder, p_lines, builder.add(begin, integer(j * LANES))) for j in range(5)]
                sorted_columns = []
                for k in range(4):
                    left, right = (pick(builder, line[j], line[j + 1], [k + lane for lane in half]) for j in (0, 2))
                    sorted_columns.append(pick(builder, left, right, list(range(LANES))))
                for k in range(2):  # columns 4 and 5 of a tile are 0 and 1 of the next
                    sorted_columns.append(pick(builder, sorted_columns[k], line[4], [*range(1, LANES), LANES + k]))
                for j, column in enumerate(sorted_columns):
                    at = builder.mul(stride, integer(6 * i + j))
                    store_vector(builder, column, p_columns, builder.add(at, tile))
            return nothing

        loop_range(builder, integer(0), count, LANES, [], one_vector)
        return context.get_dummy_value()

    return types.void(*[types.intp] * 5), codegen


@intrinsic
def _input_tiles(typing_context, points, stride, columns, columns_stride):
    """points (36, LANES, `stride` floats apart) <- LANES tiles in columns (6, 6, `columns_stride` floats apart)."""
    def codegen(context, builder, signature, arguments):
        p_points, p_columns = pointers(builder, (arguments[0], arguments[2]), F32, F32)
        stride, columns_stride = arguments[1], arguments[3]
        columns = [_transform_input(builder, [
            load_vector(builder, p_columns, builder.mul(columns_stride, integer(6 * i + j))) for i in range(6)])
            for j in range(6)]
        for i in range(6):
            for j, point in enumerate(_transform_input(builder, [column[i] for column in columns])):
                store_vector(builder, point, p_points, builder.mul(stride, integer(6 * i + j)))
        return context.get_dummy_value()

    return types.void(*[types.intp] * 4), codegen


def _outputs(builder, p_sums, stride):
    """The 4 x 6 points of the outputs of LANES tiles from sums (36, LANES, `stride` floats apart), line by line."""
    across = []
    for j in range(6):
        across.append(_transform_output(builder,
                                        [load_vector(builder, p_sums, builder.mul(stride, integer(6 * i + j)))
                                         for i in range(6)]))
    return [[across[j][i] for j in range(6)] for i in range(4)]


def _interleave(builder, four):
    """Four vectors, tiles in lanes -> four vectors in the order of columns."""
    low = [pick(builder, four[k], four[k + 1], [v for i in range(LANES // 2) for v in (i, LANES + i)]) for k in (0, 2)]
    high = [pick(builder, four[k], four[k + 1], [v for i in range(LANES // 2, LANES) for v in (i, LANES + i)])
            for k in (0, 2)]
    result = []
    for left, right in (low, high):
        for begin in (0, LANES // 2):
            order = [v for i in range(begin, begin + LANES // 2, 2) for v in (i, i + 1, LANES + i, LANES + i + 1)]
            result.append(pick(builder, left, right, order))
    return result


@intrinsic
def _output_tiles(typing_context, stage, sums, stride, c_min):
    """stage (4, 4 LANES) <- outputs of LANES tiles, at least c_min, from sums (36, LANES, `stride` floats apart)."""
    def codegen(context, builder, signature, arguments):
        p_stage, p_sums = pointers(builder, arguments[:2], F32, F32)
        lowest = splat(builder, arguments[3])
        for i, line in enumerate(_outputs(builder, p_sums, arguments[2])):
            outputs = _transform_output(builder, line)
            outputs = [builder.select(builder.fcmp_ordered("<", value, lowest), lowest, value) for value in outputs]
            for j, vector in enumerate(_interleave(builder, outputs)):
                store_vector(builder, vector, p_stage, integer((4 * i + j) * LANES))
        return context.get_dummy_value()

    return types.void(*[types.intp] * 3, types.float32), codegen


@intrinsic
def _finish_tiles(typing_context, stage, sums, sums_of_v, stride, masks, bias, x_min, x_max, relevance, z_min):
    """stage (2, 4, 4 LANES) <- x and ratio of LANES tiles (elementwise.Finish) from the points of y and of z, `stride`
    floats apart.

    A ratio that rounding may have spoilt is NaN: one that is large, of a z far below others of its tile. Returns 1
    where a ratio is negative, plus 2 where one is NaN, of outputs whose numbers at `masks` have the tile's bit.
    """
    signature = types.int64(*[types.intp] * 5, *[types.float32] * 3, types.boolean, types.float32)

    def codegen(context, builder, signature, arguments):
        p_stage, p_y, p_z, p_masks = pointers(builder, [arguments[i] for i in (0, 1, 2, 4)], F32, F32, F32, I32)
        stride, _, bias, x_min, x_max, relevance, z_min = arguments[3:]
        finish = Finish(builder, bias, x_min, x_max, relevance, z_min)
        all_z = [_transform_output(builder, line) for line in _outputs(builder, p_z, stride)]
        largest = all_z[0][0]
        for z in (z for line in all_z for z in line):
            largest = builder.select(builder.fcmp_ordered(">", z, largest), z, largest)
        small = _combine(builder, (2.0**-8, largest))
        found = doubtful = NO_LANE
        for i, (line_y, line_z) in enumerate(zip(_outputs(builder, p_y, stride), all_z, strict=True)):
            results = []
            for j, (y, z) in enumerate(zip(_transform_output(builder, line_y), line_z, strict=True)):
                x, ratio = finish(y, z)
                counts = lanes_of(builder, builder.load(builder.gep(p_masks, [integer(4 * i + j)])))
                negative = builder.fcmp_ordered("<", ratio, ZEROS)
                found = builder.or_(found, builder.and_(counts, negative))
                doubt = builder.and_(builder.fcmp_ordered("<", z, small),
                                     builder.fcmp_ordered(">", x, _combine(builder, (8, z))))
                doubtful = builder.or_(doubtful, builder.and_(counts, doubt))
                results.append((x, builder.select(doubt, ir.Constant(VECTOR, [float("nan")] * LANES), ratio)))
            for part in range(2):
                for j, vector in enumerate(_interleave(builder, [result[part] for result in results])):
                    store_vector(builder, vector, p_stage, integer((16 * part + 4 * i + j) * LANES))
        found, doubtful = (builder.zext(any_lane(builder, lanes), I64) for lanes in (found, doubtful))
        return builder.add(found, builder.shl(doubtful, integer(1)))

    return signature, codegen


# ---- Parts of both directions ----------------------------------------------------------------------------------------


@kernel
def _piece(tile, last, tiles_across, tiles_of_image):
    """Tiles from `tile` on that lie in one row of one image: image, row, column, how many."""
    n, within = tile // tiles_of_image, tile % tiles_of_image
    row, column = within // tiles_across, within % tiles_across
    return n, row, column, min(tiles_across - column, last - tile)


@kernel
def _block(index, blocks, tiles):
    """First tile of a block, and how many it has."""
    vectors = -(-tiles // LANES)
    first, last = vectors * index // blocks * LANES, vectors * (index + 1) // blocks * LANES
    return first, min(last, tiles) - first


@kernel
def _dense_image(index, density, sparse_below):
    """The image that is number `index` of those that are dense enough; all are where sparse_below is 0."""
    if sparse_below <= ZERO:
        return index
    n = -1
    while index >= 0:
        n += 1
        if density[n] >= sparse_below:
            index -= 1
    return n


@kernel
def _count_dense(images, density, sparse_below):
    if sparse_below <= ZERO:
        return images
    found = 0
    for n in range(images):
        if density[n] >= sparse_below:
            found += 1
    return found


@kernel
def _multiply_points(p_sums, sums_stride, p_packed, all_panels, panels, p_points, points_stride, p_offsets, depth,
                     block, count):
    """sums (36, rows of `panels` panels, block) <- panels of packed (36, all_panels, depth, TILE_ROWS) times points
    (36, depth, block)."""
    for point in range(WINOGRAD_POINTS):
        for panel in range(panels):
            a = p_packed + 4 * (point * all_panels + panel) * depth * TILE_ROWS
            for j in range(0, count, TILE_COLUMNS):
                tile = p_sums + 4 * (point * sums_stride + panel * TILE_ROWS * block + j)
                b = p_points + 4 * (point * points_stride + j)
                if count - j <= LANES:
                    _TILE_1(tile, block, a, p_offsets, b, depth)
                elif count - j <= 2 * LANES:
                    _TILE_2(tile, block, a, p_offsets, b, depth)
                else:
                    _TILE_3(tile, block, a, p_offsets, b, depth)


@kernel
def _store_tiles(p_out, p_stage, density, sparse_below, channels, channel, height, across, tile, count, tiles_across,
                 tiles_of_image, accumulate):
    """Rows of so many tiles go from the stage (4, 4 LANES) to their positions in out (N, channels, height, across), of
    images that are dense enough."""
    done = 0
    while done < count:
        n, row, column, length = _piece(tile + done, tile + count, tiles_across, tiles_of_image)
        n = _dense_image(n, density, sparse_below)
        for i in range(min(4, height - 4 * row)):
            to = ((n * channels + channel) * height + 4 * row + i) * across + 4 * column
            columns = min(4 * length, across - 4 * column)
            copy_exactly(p_out + 4 * to, p_stage + 16 * (i * LANES + done), columns, accumulate)
            fetch_to_write(p_out + 4 * (to + height * across), columns)  # the next channel's
        done += length


@kernel
def _look_for_zeros(marks, first_mark, seen, tile, count, tiles_across, tiles_of_image, height, across):
    """Sorts the outputs of so many tiles: marks[first_mark:] <- where each vector of tiles has its list, and where the
    last ends; for each vector 16 numbers, of each output of a tile, with a bit for each lane where it is in its plane
    and has inputs that are not 0; the lists: indices in the stage of those in their planes whose inputs are all 0.
    Returns whether there are any."""
    vectors = -(-count // LANES)
    masks = first_mark + vectors + 1
    lists = used = masks + 16 * vectors
    marks[first_mark] = used
    for i in range(masks, lists):
        marks[i] = 0
    t = at = 0
    while t < count:
        _, row, column, length = _piece(tile + t, tile + count, tiles_across, tiles_of_image)
        width = 4 * length + 2
        for lane in range(length):
            vector, bit = (t + lane) // LANES, np.int32(1) << np.int32((t + lane) % LANES)
            for i in range(min(4, height - 4 * row)):
                for j in range(min(4, across - 4 * (column + lane))):
                    largest = ZERO
                    for p in range(3):
                        for q in range(3):
                            largest = max(largest, seen[at + (i + p) * width + 4 * lane + j + q])
                    if largest == ZERO:
                        marks[used] = i * 4 * LANES + 4 * ((t + lane) % LANES) + j
                        used += 1
                    else:
                        marks[masks + 16 * vector + 4 * i + j] |= bit
            marks[first_mark + vector + 1] = used
        t, at = t + length, at + 6 * width
    return used > lists


@kernel
def _sum_doubtful(stage, a, a_channel, weight, k, bias, tile, count, tiles_across, tiles_of_image, height, across,
                  pad_top, pad_left, x_min, x_max, relevance):
    """Output k of the tiles in the stage, where its ratio is NaN: by the definition. Returns whether one of these
    ratios is negative."""
    absorbs = False
    for at in range(16 * LANES):
        lane = at % (4 * LANES) // 4
        if lane >= count or not np.isnan(stage[16 * LANES + at]):
            continue
        n, row, column, _ = _piece(tile + lane, tile + count, tiles_across, tiles_of_image)
        y_out, x_out = 4 * row + at // (4 * LANES), 4 * column + at % 4
        if y_out >= height or x_out >= across:
            continue
        y = z = ZERO
        for channel in range(weight.shape[1]):
            for i in range(max(0, pad_top - y_out), min(3, a.shape[2] + pad_top - y_out)):
                for j in range(max(0, pad_left - x_out), min(3, a.shape[3] + pad_left - x_out)):
                    term = weight[k, channel, i, j] * a[n, a_channel + channel, y_out + i - pad_top,
                                                        x_out + j - pad_left]
                    y += term
                    z += max(term, ZERO)
        value = clip(y + bias, x_min, x_max)
        stage[at], stage[16 * LANES + at] = value, ratio_of(value, z, MIN_DENOMINATOR, relevance)
        absorbs |= stage[16 * LANES + at] < ZERO
    return absorbs


# ---- Kernels ---------------------------------------------------------------------------------------------------------


@kernel
def _transform_inputs(points, lines, seen, a, a_channel, channels, pad_top, pad_left, block, tile, count, tiles_across,
                      tiles_of_image, height, across):
    """The points of `count` tiles, of so many channels of a, and what `_look_for_zeros` finds in these."""
    stride, size = _stride(channels, block), a.shape[2] * a.shape[3]
    p_a, p_lines, p_points = a.ctypes.data, lines.ctypes.data, points.ctypes.data
    p_columns, p_seen = p_lines + 4 * _lines(block, across), seen.ctypes.data
    fill_vectors(p_seen, 36 * block, ZERO)
    for channel in range(channels):
        t = at = 0
        while t < count:
            n, row, column, length = _piece(tile + t, tile + count, tiles_across, tiles_of_image)
            width = 4 * length + 2
            p_plane = p_a + 4 * (n * a.shape[1] + a_channel + channel) * size
            fetch_plane(p_plane + 4 * size, 6, a.shape[3], a.shape[3], 4 * row - pad_top, 0)  # the next channel's
            copy_plane(p_lines, 6, width, p_plane, a.shape[2], a.shape[3], 4 * row - pad_top, 4 * column - pad_left, 1,
                       1, ZERO)
            larger_vectors(p_seen + 4 * at, p_seen + 4 * at, p_lines, 6 * width)
            _sort_columns(p_columns + 4 * t, block + LANES, p_lines, width, length)
            t, at = t + length, at + 6 * width
        for i in range(0, count, LANES):
            _input_tiles(p_points + 4 * (channel * block + i), stride, p_columns + 4 * i, block + LANES)
    return _look_for_zeros(as_int32(seen), 36 * block, seen, tile, count, tiles_across, tiles_of_image, height, across)


@kernel
def _transform_products(points, lines, ratio, c, density, sparse_below, group, c_channel, outputs, pad_top, pad_left,
                        block, tile, count, tiles_across, tiles_of_image):
    """The points of `count` tiles of ratio * c, of a group's outputs; c_channel is the group's first."""
    stride, size = _stride(outputs, block), c.shape[2] * c.shape[3]
    p_ratio, p_c, p_lines, p_points = ratio.ctypes.data, c.ctypes.data, lines.ctypes.data, points.ctypes.data
    p_columns = p_lines + 4 * _lines(block, 4 * tiles_across)
    for k in range(outputs):
        t = 0
        while t < count:
            n, row, column, length = _piece(tile + t, tile + count, tiles_across, tiles_of_image)
            n, width = _dense_image(n, density, sparse_below), 4 * length + 2
            p_plane = p_ratio + 4 * (n * ratio.shape[1] + group * outputs + k) * size
            p_plane_c = p_c + 4 * (n * c.shape[1] + c_channel + k) * size
            for p_next in (p_plane, p_plane_c):
                fetch_plane(p_next + 4 * size, 6, c.shape[3], c.shape[3], 4 * row - pad_top, 0)
            copy_product(p_lines, 6, width, p_plane, p_plane_c, c.shape[2], c.shape[3], 4 * row - pad_top,
                         4 * column - pad_left, ZERO)
            _sort_columns(p_columns + 4 * t, block + LANES, p_lines, width, length)
            t += length
        for i in range(0, count, LANES):
            _input_tiles(p_points + 4 * (k * block + i), stride, p_columns + 4 * i, block + LANES)


@kernel
def winograd2d_forward(x, ratio, dead, a, weight, packed, offsets, bias, lines, points, sums, stage, seen,
                       x_channel, a_channel, channels, groups, pad_top, pad_left, blocks, block, panels_at_once, splits,
                       x_min, x_max, relevance, first, last):
    """As conv2d_forward for features NONNEGATIVE: x <- W a + bias, clipped to x_min..x_max; ratio <- |x| / z.

    packed (2, groups * 36, panels, C, TILE_ROWS) is of winograd2d_pack from W and from V, for C channels of a group;
    offsets (C,) are c * block.
    """
    outputs, height, across = ratio.shape[1:]
    per_group = outputs // groups
    tiles_across = -(-across // 4)
    tiles_of_image = -(-height // 4) * tiles_across
    all_tiles, panels = tiles_of_image * ratio.shape[0], packed.shape[2]
    points_stride, sums_stride = _stride(channels, block), _stride(2 * panels_at_once * TILE_ROWS, block)
    p_points, p_sums, p_stage = points.ctypes.data, sums.ctypes.data, stage.ctypes.data
    p_packed, p_packed_v = packed[0].ctypes.data, packed[1].ctypes.data
    p_x, p_ratio = x.ctypes.data, ratio.ctypes.data
    marks = as_int32(seen)
    for index in range(first // splits, -(-last // splits)):
        g, (tile, count) = index % groups, _block(index // groups, blocks, all_tiles)
        any_blind = _transform_inputs(points, lines, seen, a, a_channel + g * channels, channels, pad_top, pad_left,
                                      block, tile, count, tiles_across, tiles_of_image, height, across)
        p_masks = seen.ctypes.data + 4 * (36 * block + -(-count // LANES) + 1)
        absorbs = False
        begin, end = own_part(panels, index, splits, first, last)
        for panel in range(begin, end, panels_at_once):
            panel_count = min(panels_at_once, end - panel)
            weights = 4 * (g * WINOGRAD_POINTS * panels + panel) * channels * TILE_ROWS
            p_sums_z = p_sums + 4 * panel_count * TILE_ROWS * block
            _multiply_points(p_sums, sums_stride, p_packed + weights, panels, panel_count, p_points, points_stride,
                             offsets.ctypes.data, channels, block, count)
            _multiply_points(p_sums_z, sums_stride, p_packed_v + weights, panels, panel_count, p_points, points_stride,
                             offsets.ctypes.data, channels, block, count)
            for i in range(min(panel_count * TILE_ROWS, per_group - panel * TILE_ROWS)):
                k = g * per_group + panel * TILE_ROWS + i
                for t in range(0, count, LANES):
                    at, now = 4 * (i * block + t), min(LANES, count - t)
                    found = _finish_tiles(p_stage, p_sums + at, p_sums_z + at, sums_stride, p_masks + 64 * (t // LANES),
                                          bias[k], x_min, x_max, relevance != 0, MIN_DENOMINATOR)
                    absorbs |= found & 1 != 0
                    if any_blind:
                        value = clip(bias[k], x_min, x_max)
                        absorbed = ratio_of(value, ZERO, MIN_DENOMINATOR, relevance)
                        for j in range(marks[36 * block + t // LANES], marks[36 * block + t // LANES + 1]):
                            stage[marks[j]] = value
                            stage[16 * LANES + marks[j]] = absorbed
                            absorbs |= absorbed < ZERO
                    if found & 2:
                        absorbs |= _sum_doubtful(stage, a, a_channel + g * channels, weight, k, bias[k], tile + t, now,
                                                 tiles_across, tiles_of_image, height, across, pad_top, pad_left, x_min,
                                                 x_max, relevance)
                    _store_tiles(p_x, p_stage, dead, ZERO, x.shape[1], x_channel + k, height, across, tile + t, now,
                                 tiles_across, tiles_of_image, False)
                    _store_tiles(p_ratio, p_stage + 64 * LANES, dead, ZERO, outputs, k, height, across, tile + t, now,
                                 tiles_across, tiles_of_image, False)
        if absorbs:
            for n in range(tile // tiles_of_image, (tile + count - 1) // tiles_of_image + 1):
                dead[n] = 1


@kernel
def winograd2d_redistribute(c_in, c, ratio, density, packed, offsets, lines, points, sums, stage,
                            c_in_channel, c_channel, inputs, groups, pad_top, pad_left, blocks, block, panels_at_once,
                            splits, c_min, sparse_below, accumulate, first, last):
    """As conv2d_redistribute for features NONNEGATIVE: c_in <- V^T (ratio * c), or added to c_in if `accumulate`.
    Tiles of images that are dense enough are counted through.

    packed (groups * 36, panels, K, TILE_ROWS) is of winograd2d_pack from V^T, taps turned round, for K outputs of a
    group; offsets (K,) are k * block; pad_top and pad_left are those of that convolution: 2 less the layer's own. What
    comes back is at least c_min: 0 where no relevance is negative, so that rounding makes none, else -infinity.
    """
    outputs, height, across = ratio.shape[1] // groups, c_in.shape[2], c_in.shape[3]
    per_group = inputs // groups
    tiles_across = -(-across // 4)
    tiles_of_image = -(-height // 4) * tiles_across
    dense_images = _count_dense(ratio.shape[0], density, sparse_below)
    dense_tiles, dense_blocks = dense_images * tiles_of_image, -(-blocks * dense_images // ratio.shape[0])
    panels = packed.shape[1]
    points_stride, sums_stride = _stride(outputs, block), _stride(panels_at_once * TILE_ROWS, block)
    p_points, p_sums, p_stage = points.ctypes.data, sums.ctypes.data, stage.ctypes.data
    for index in range(first // splits, -(-last // splits)):
        if index // groups >= dense_blocks:
            break
        g, (tile, count) = index % groups, _block(index // groups, dense_blocks, dense_tiles)
        _transform_products(points, lines, ratio, c, density, sparse_below, g, c_channel + g * outputs, outputs,
                            pad_top, pad_left, block, tile, count, tiles_across, tiles_of_image)
        begin, end = own_part(panels, index, splits, first, last)
        for panel in range(begin, end, panels_at_once):
            panel_count = min(panels_at_once, end - panel)
            weights = 4 * (g * WINOGRAD_POINTS * panels + panel) * outputs * TILE_ROWS
            _multiply_points(p_sums, sums_stride, packed.ctypes.data + weights, panels, panel_count, p_points,
                             points_stride, offsets.ctypes.data, outputs, block, count)
            for i in range(min(panel_count * TILE_ROWS, per_group - panel * TILE_ROWS)):
                for t in range(0, count, LANES):
                    _output_tiles(p_stage, p_sums + 4 * (i * block + t), sums_stride, c_min)
                    _store_tiles(c_in.ctypes.data, p_stage, density, sparse_below, c_in.shape[1],
                                 c_in_channel + g * per_group + panel * TILE_ROWS + i, height, across, tile + t,
                                 min(LANES, count - t), tiles_across, tiles_of_image, accumulate != 0)
