"""Dense layers: the weights are streamed from memory once for y and z and once for the backward pass, for all images
together.

V is made from W in registers, so no second copy of the weights is held. Tensors are flat, (N, *, 1, 1), used from a
given feature on; weight is (K, F).

Both passes read a piece of a few weight rows for several images at once, and ask for the piece that follows: the
processor by itself asks too late. A block of rows is read piece by piece, each piece for all images, so that with many
images it comes from the cache. Whatever the piece, the block or the other images, each sum is one chain of
multiply-adds (in each lane, in the forward pass).
"""

from fastdtd.kernels.codes import AS_IS, BOX, FLAT, NEGATIVE, ONES, SIGNED, SQUARED
from fastdtd.kernels.cpu.arrays import as_int32, flat
from fastdtd.kernels.cpu.jit import kernel
from fastdtd.kernels.cpu.scalar import clip, ratio_of, redistributed_pair
from fastdtd.kernels.cpu.vector_code import (
    F32,
    I32,
    I64,
    LANES,
    ZEROS,
    combine_lanes,
    integer,
    load_vector,
    loop_over,
    multiply_add,
    negative,
    pointers,
    positive,
    prefetch,
    splat,
    store_vector,
)
from fastdtd.kernels.scalar import MIN_DENOMINATOR, ZERO
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

DENSE_FEATURES = 512  # of one unit of redistribution
# of sums: rows that are a power of two apart would drive each other from the first-level cache
_STRIDE = DENSE_FEATURES + 64
_IMAGES = 4 if LANES == 16 else 2  # that a weight in a register serves: as many as there are registers for sums
_ROWS, _ROWS_REDISTRIBUTE = 2, 4  # outputs whose weights are read at once
_BLOCK_ROWS = 32
# features: those of a few images stay in the first-level cache with two pairs of rows, those of one in the second
_PIECE, _PIECE_ALONE = 1024, 1 << 14


# ---- Vector code -----------------------------------------------------------------------------------------------------


def _make_add_products(images, bounded):
    @intrinsic
    def add_products(typing_context, sums, w, w_stride, following, a, a_stride, low, high, box, count):
        def codegen(context, builder, signature, arguments):
            p_sums, p_w, p_following, p_a, p_low, p_high = pointers(builder, [arguments[i] for i in (0, 1, 3, 4, 6, 7)],
                                                                    *[F32] * 6)
            w_stride, a_stride, box, count = [arguments[i] for i in (2, 5, 8, 9)]
            offsets = [integer(i * LANES) for i in range(2 * _ROWS * images)]

            def one_vector(step, sums, load, store):
                rows = [builder.add(step, builder.mul(w_stride, integer(i))) for i in range(_ROWS)]
                for row in rows:
                    prefetch(builder, builder.gep(p_following, [row]))
                weights = [load(p_w, row) for row in rows]
                more = [positive(builder, weight) for weight in weights]
                less = [negative(builder, weight) for weight in weights]
                if bounded:
                    lowest, highest = (builder.select(box, load(p, step), ZEROS) for p in (p_low, p_high))
                sums = list(sums)
                for n in range(images):
                    above = value = load(p_a, builder.add(step, builder.mul(a_stride, integer(n))))
                    if bounded:
                        above = positive(builder, builder.fsub(value, lowest))
                        below = negative(builder, builder.fsub(value, highest))
                    for i in range(_ROWS):
                        y, z = 2 * (i * images + n), 2 * (i * images + n) + 1
                        sums[y] = multiply_add(builder, sums[y], weights[i], value)
                        sums[z] = multiply_add(builder, sums[z], more[i], above)
                        if bounded:
                            sums[z] = multiply_add(builder, sums[z], less[i], below)
                return sums

            results = loop_over(builder, count, [load_vector(builder, p_sums, offset) for offset in offsets],
                                one_vector)
            for vector, offset in zip(results, offsets, strict=True):
                store_vector(builder, vector, p_sums, offset)
            return context.get_dummy_value()

        return types.void(*[types.intp] * 8, types.boolean, types.intp), codegen

    z_of = "max(w, 0) (a - low) + max(-w, 0) (high - a), with bounds of 0 unless `box`" if bounded else "max(w, 0) a"
    add_products.__doc__ = f"""sums ({_ROWS}, {images}, 2, LANES) += lane by lane y, the sum of w a, and z, that of
    {z_of}.

    {_ROWS} rows of w and {images} of a, w_stride and a_stride floats apart, `count` values of each. Weights at
    `following`, laid out as those at w, are fetched into the cache.
    """
    return add_products


def _make_add_rows(images, weight_of):
    @intrinsic
    def add_rows(typing_context, sums, w, w_stride, contributions, all_images, first_image, count):
        def codegen(context, builder, signature, arguments):
            p_sums, p_w, p_contributions, p_rows = pointers(builder, [arguments[i] for i in (0, 1, 3, 3)], F32, F32,
                                                            F32, I32)
            w_stride, all_images, first_image, count = [arguments[i] for i in (2, 4, 5, 6)]
            lines = [builder.mul(builder.add(all_images, integer(1)), integer(i))
                     for i in range(2 * _ROWS_REDISTRIBUTE)]
            numbers = [builder.sext(builder.load(builder.gep(p_rows, [builder.add(line, all_images)])), I64)
                       for line in lines]
            rows = [builder.mul(number, w_stride) for number in numbers]
            columns = [builder.add(first_image, integer(n)) for n in range(images)]
            factors = [[splat(builder, builder.load(builder.gep(p_contributions, [builder.add(line, column)])))
                        for line in lines[:_ROWS_REDISTRIBUTE]] for column in columns]

            def one_vector(step, nothing, load, store):
                for row in rows[_ROWS_REDISTRIBUTE:]:
                    prefetch(builder, builder.gep(p_w, [builder.add(step, row)]))
                weights = [weight_of(builder, load(p_w, builder.add(step, row))) for row in rows[:_ROWS_REDISTRIBUTE]]
                for n in range(images):
                    at = builder.add(step, integer(n * _STRIDE))
                    total = load(p_sums, at)
                    for weight, factor in zip(weights, factors[n], strict=True):
                        total = multiply_add(builder, total, factor, weight)
                    store(total, p_sums, at)
                return nothing

            loop_over(builder, count, [], one_vector)
            return context.get_dummy_value()

        return types.void(*[types.intp] * 7), codegen

    add_rows.__doc__ = f"""sums ({images}, _STRIDE) += s V, {_ROWS_REDISTRIBUTE} rows of w one after the other, {images}
    images, `count` values.

    contributions ({2 * _ROWS_REDISTRIBUTE}, all_images + 1) has a line for each row: s of all images, then (int32) its
    number. The second half of the lines are the rows that follow; their weights are fetched into the cache.
    """
    return add_rows


_PRODUCTS, _PRODUCTS_OF_SEVERAL, _BOUNDED, _BOUNDED_OF_SEVERAL = (
    _make_add_products(images, bounded) for bounded in (False, True) for images in (1, _IMAGES))
_POSITIVE, _POSITIVE_OF_SEVERAL = (_make_add_rows(images, positive) for images in (1, _IMAGES))
_NEGATIVE, _NEGATIVE_OF_SEVERAL = (
    _make_add_rows(images, lambda builder, w: positive(builder, builder.fsub(ZEROS, w))) for images in (1, _IMAGES))
_SQUARES = _make_add_rows(1, lambda builder, w: builder.fmul(w, w))
_AS_IS = _make_add_rows(1, lambda builder, w: w)


@intrinsic
def _sum_of_lanes(typing_context, vector):
    """The sum of LANES values from an address."""
    def codegen(context, builder, signature, arguments):
        pointer, = pointers(builder, arguments, F32)
        return combine_lanes(builder, load_vector(builder, pointer, integer(0)), ir.IRBuilder.fadd)

    return types.float32(types.intp), codegen


@kernel
def _group(images, n):
    """How many images from n on are computed together."""
    return _IMAGES if images - n >= _IMAGES else 1


# ---- Forward ---------------------------------------------------------------------------------------------------------


def dense_forward_elements(images):
    """Floats of the scratch array `sums` of dense_forward."""
    return _BLOCK_ROWS * images * 2 * LANES


@kernel
def dense_forward(x, ratio, dead, a, weight, bias, constant, low, high, sums, x_channel, a_channel, features, x_min,
                  x_max, relevance, first, last):
    """x <- W a + bias, clipped to x_min..x_max; ratio <- |x| / z. Units are outputs.

    constant (K,) is z under ONES, where it does not depend on a. sums is flat scratch: for each group of images y and z
    of a block's outputs, lane by lane.
    """
    images, outputs, count = ratio.shape[0], weight.shape[0], weight.shape[1]
    flat_x, flat_ratio = flat(x), flat(ratio)
    p_sums, p_a, p_weight, p_low = sums.ctypes.data, a.ctypes.data, weight.ctypes.data, low.ctypes.data
    p_high = high.ctypes.data
    bounded, box = features in (SIGNED, BOX), features == BOX
    piece, of_image = _PIECE_ALONE if images == 1 else _PIECE, 4 * _BLOCK_ROWS * 2 * LANES
    for block in range(first, last, _BLOCK_ROWS):
        rows = min(_BLOCK_ROWS, last - block)
        sums[:_BLOCK_ROWS * images * 2 * LANES] = ZERO
        for begin in range(0, count, piece):
            p_w, length, bounds = p_weight + 4 * (block * count + begin), min(piece, count - begin), 4 * begin
            # the block's next piece, or the next block
            next_block = p_w + 4 * (piece if begin + piece < count else rows * count - begin)
            n = 0
            while n < images:
                group = _group(images, n)
                values = p_a + 4 * (n * a.shape[1] + a_channel + begin)
                for row in range(0, rows, _ROWS):
                    # the last row of an odd number, twice
                    w, stride = p_w + 4 * row * count, count if row + _ROWS <= rows else 0
                    following = w if n else w + 4 * _ROWS * count if row + _ROWS < rows else next_block
                    to = p_sums + n * of_image + 4 * row * group * 2 * LANES
                    if bounded and group == 1:
                        _BOUNDED(to, w, stride, following, values, a.shape[1], p_low + bounds, p_high + bounds, box,
                                 length)
                    elif bounded:
                        _BOUNDED_OF_SEVERAL(to, w, stride, following, values, a.shape[1], p_low + bounds,
                                            p_high + bounds, box, length)
                    elif group == 1:
                        _PRODUCTS(to, w, stride, following, values, a.shape[1], 0, 0, box, length)
                    else:
                        _PRODUCTS_OF_SEVERAL(to, w, stride, following, values, a.shape[1], 0, 0, box, length)
                n += group
        n = 0
        while n < images:
            group = _group(images, n)
            for row in range(rows):
                k = block + row
                for i in range(group):
                    y = p_sums + n * of_image + 4 * (row * group + i) * 2 * LANES
                    value = clip(_sum_of_lanes(y) + bias[k], x_min, x_max)
                    z = constant[k] if features == ONES else _sum_of_lanes(y + 4 * LANES)
                    r = ratio_of(value, z, MIN_DENOMINATOR, relevance)
                    flat_x[(n + i) * x.shape[1] + x_channel + k] = value
                    flat_ratio[(n + i) * outputs + k] = r
                    if r < ZERO:
                        dead[n + i] = 1
            n += group


# ---- Redistribute ----------------------------------------------------------------------------------------------------


def dense_redistribute_elements(images, outputs):
    """Floats of the scratch arrays `sums` and `contributions` of dense_redistribute."""
    return 2 * images * _STRIDE, (outputs + 2 * _ROWS_REDISTRIBUTE) * (images + 1)


@kernel
def _list_contributions(contributions, ratio, c, c_channel):
    """contributions <- a line for each output whose s = ratio * c is not zero in all images: s, then its number.
    Returns how many there are.

    Few have any: outputs after a ReLU, and one class of many. Lines of zeros follow, to fill the last group of rows and
    to follow it.
    """
    images, outputs = ratio.shape[0], ratio.shape[1]
    flat_ratio, flat_c, numbers = flat(ratio), flat(c), as_int32(contributions)
    count = 0
    for k in range(outputs):
        line, is_listed = count * (images + 1), False
        for n in range(images):
            s = flat_ratio[n * outputs + k] * flat_c[n * c.shape[1] + c_channel + k]
            contributions[line + n] = s
            is_listed |= s != ZERO
        numbers[line + images] = k
        count += is_listed
    for i in range(count, count + 2 * _ROWS_REDISTRIBUTE):
        for n in range(images):
            contributions[i * (images + 1) + n] = ZERO
        numbers[i * (images + 1) + images] = 0
    return count


@kernel
def _add_rows(p_sums, p_w, stride, p_contributions, count, images, second, weights, length):
    """sums (images, _STRIDE) += s V of the listed rows, V of the first feature or of the second."""
    negative = (weights == NEGATIVE) != (second == 1)
    for block in range(0, count, _BLOCK_ROWS):
        n = 0
        while n < images:
            to, group = p_sums + 4 * n * _STRIDE, 1 if weights in (SQUARED, AS_IS) else _group(images, n)
            for i in range(block, min(block + _BLOCK_ROWS, count), _ROWS_REDISTRIBUTE):
                lines = p_contributions + 4 * i * (images + 1)
                if weights == SQUARED:
                    _SQUARES(to, p_w, stride, lines, images, n, length)
                elif weights == AS_IS:
                    _AS_IS(to, p_w, stride, lines, images, n, length)
                elif negative and group == 1:
                    _NEGATIVE(to, p_w, stride, lines, images, n, length)
                elif negative:
                    _NEGATIVE_OF_SEVERAL(to, p_w, stride, lines, images, n, length)
                elif group == 1:
                    _POSITIVE(to, p_w, stride, lines, images, n, length)
                else:
                    _POSITIVE_OF_SEVERAL(to, p_w, stride, lines, images, n, length)
            n += group


@kernel
def dense_redistribute(c_in, c, ratio, a, weight, low, high, sums, contributions, c_in_channel, c_channel, a_channel,
                       features, weights, relevance, accumulate, first, last):
    """c_in <- V^T (ratio * c), or added to c_in if `accumulate`. If `relevance`, it is multiplied by u. Units are
    DENSE_FEATURES inputs.

    sums (features of an input, images, _STRIDE) and contributions (see _list_contributions) are flat scratch.
    """
    images, count = ratio.shape[0], weight.shape[1]
    parts, part = 2 if features in (SIGNED, BOX) else 1, images * _STRIDE
    flat_a, flat_in = flat(a), flat(c_in)
    listed, as_it_is = _list_contributions(contributions, ratio, c, c_channel), parts == 1 and not relevance
    for unit in range(first, last):
        begin = unit * DENSE_FEATURES
        length = min(DENSE_FEATURES, count - begin)
        sums[:parts * part] = ZERO
        a_min, a_max = low[begin:begin + length], high[begin:begin + length]
        if weights == FLAT:
            for n in range(images):
                total = ZERO
                for i in range(listed):
                    total += contributions[i * (images + 1) + n]
                sums[n * _STRIDE:n * _STRIDE + length] = total
        else:
            for second in range(parts):
                _add_rows(sums.ctypes.data + 4 * second * part, weight.ctypes.data + 4 * begin, count,
                          contributions.ctypes.data, listed, images, second, weights, length)
        for n in range(images):
            at_a, at_in = n * a.shape[1] + a_channel + begin, n * c_in.shape[1] + c_in_channel + begin
            value, out = flat_a[at_a:at_a + length], flat_in[at_in:at_in + length]
            sum_pos = sums[n * _STRIDE:n * _STRIDE + length]
            sum_neg = sums[(parts - 1) * part + n * _STRIDE:(parts - 1) * part + n * _STRIDE + length]
            if as_it_is:
                for i in range(length):
                    out[i] = sum_pos[i] + out[i] if accumulate else sum_pos[i]
                continue
            for i in range(length):
                result = redistributed_pair(sum_pos[i], sum_neg[i], value[i], features, a_min[i], a_max[i], relevance)
                out[i] = result + out[i] if accumulate else result
