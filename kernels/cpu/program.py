"""What an embedded library does around its kernels: it checks what it is given, walks through the steps of both passes,
and makes a network's input of a picture.

Compiled like kernels, and called with addresses alone: nothing is allocated, no state is kept, no library is called.
The network is in tables, int64 each: facts (FACTS,), by the names below; steps (S + 1, 5): number of the call, first
slot, units, offset and bytes of flags, the last row only for its first slot; slots (A,) int32, with regions (A,) int8.
And numbers, float32: the bounds of the input's channels, then what pixels become.
"""

from itertools import count

import numpy as np
from fastdtd.kernels.cpu.arrays import (
    float32_at,
    float32_of,
    float64_at,
    int8_at,
    int32_at,
    int64_at,
    uint8_at,
)
from fastdtd.kernels.cpu.jit import kernel, part
from fastdtd.kernels.cpu.vector_code import I64
from fastdtd.kernels.scalar import ZERO
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

ABI_VERSION = 1
NUMBER, WEIGHTS, WORKSPACE, COMPACT = range(4)  # what a slot is: a number, or an offset in a region

# What functions return.
OK, NULL, MISALIGNED, BAD_TARGET, NOT_FINITE, NO_WEIGHTS, OTHER_VERSION, OTHER_NETWORK, WRONG_SIZE, BEYOND, LOST, \
    BAD_PICTURE = range(0, -12, -1)
MESSAGES = {
    OK: "success",
    NULL: "a pointer is null",
    MISALIGNED: "weights or workspace do not begin at a multiple of 64 bytes, or an array of floats not at one of 4",
    BAD_TARGET: "target is not an output of the network, nor -1",
    NOT_FINITE: "the input holds NaN or infinity",
    NO_WEIGHTS: "the weights do not begin as a weights file does",
    OTHER_VERSION: "the weights are in another version of the format",
    OTHER_NETWORK: "the weights are of another network, or packed for another library",
    WRONG_SIZE: "the weights or the workspace are not as large as they have to be",
    BEYOND: "scores or relevance are beyond float32: the input's values or the weights are too large",
    LOST: "relevance was lost in numbers below float32's range: the input's values or the weights are too small",
    BAD_PICTURE: "the network takes no pictures, or height and width are not from 1 to 65,536, or a row has fewer than "
                 "3 * width bytes",
}

_next = count()
HEADER = next(_next)  # of the weights, HEADER_WORDS of int64: magic, version, bytes, hash
HEADER_WORDS = 7
for _ in range(HEADER_WORDS - 1):
    next(_next)
COMPACT_MAGIC, COMPACT_BYTES, IS_HALF, OPERATIONS = (next(_next) for _ in range(4))
(STEPS, FORWARD_STEPS, CHANNELS, HEIGHT, WIDTH, OUTPUTS, LAYERS, WORKSPACE_BYTES, EMBEDDED_WEIGHTS,
 INPUT_AT, OUTPUT_AT, START_AT, RELEVANCE_AT, LEDGER_AT, DEAD_AT, DEAD_BYTES, SLOTS_AT,
 HAS_BOUNDS, STARTS_WITH_RELEVANCE, SIGNED_SCORES, DERIVATIVE,
 COLOR, CROPS, HAS_PLANES) = (next(_next) for _ in range(24))
FACTS = next(_next)  # how many there are

# What weights are unpacked by, rows of int64: kind, to (in the weights), from (in the compact file), count; of GATHER,
# which goes to the workspace, by what positive and negative weights are multiplied, the first weight's number, sizes
# and strides of loops, the innermost first; of PACK 0, call, number of slots, first slot.
COPY, WIDEN, GATHER, PACK = range(4)
LOOPS = 6
OPERATION = 4 + 3 + 2 * LOOPS

NO_DERIVATIVE, GRADIENT, GRADIENT_INPUT, SENSITIVITY = range(4)  # DERIVATIVE
NO_PICTURE, RGB, BGR, GRAY = range(4)  # COLOR

_ALIGNMENT = 64
_LARGEST = np.float32(np.finfo(np.float32).max)
_LARGEST_LOSS = 1e-3  # of an image's relevance, as fastdtd.explainer has it
_MAX_SIDE = 1 << 16
_MAX_SIZE = 1 << 32  # of a table whose size is not needed
_HALF_SCALE = np.float32(2.0**112)  # from float16's exponent to float32's
_PRECISION = 22  # bits of the resampling's fixed-point weights, as Pillow has them


@intrinsic
def _call(typing_context, address, number, slots, first, last):
    def codegen(context, builder, signature, arguments):
        function = ir.FunctionType(ir.VoidType(), [I64] * 4)
        builder.call(builder.inttoptr(arguments[0], function.as_pointer()), arguments[1:])
        return context.get_dummy_value()

    return types.void(*[types.intp] * 5), codegen


# ---- Checks ----------------------------------------------------------------------------------------------------------


@part
def _fact(facts, index):
    return int64_at(facts, FACTS)[index]


@kernel
def _check_header(facts, content, magic, size):
    """Whether a file of this network begins here; magic, size: which facts are its own."""
    given, wanted = int64_at(content, HEADER_WORDS), int64_at(facts, FACTS)
    if given[0] != wanted[magic]:
        return NO_WEIGHTS
    if given[1] != wanted[HEADER + 1]:
        return OTHER_VERSION
    for i in range(3, HEADER_WORDS):
        if given[i] != wanted[HEADER + i]:
            return OTHER_NETWORK
    return OK if given[2] == wanted[size] else WRONG_SIZE


@kernel
def _check_weights(facts, weights):
    """Whether the weights are of this network, by what they begin with. Those inside of the library are."""
    if _fact(facts, EMBEDDED_WEIGHTS):
        return OK
    if weights == 0:
        return NULL
    if weights % _ALIGNMENT:
        return MISALIGNED
    return _check_header(facts, weights, HEADER, HEADER + 2)


@kernel
def check_weights(facts, weights, size):
    """The same of a file's content, with so many bytes."""
    if _fact(facts, EMBEDDED_WEIGHTS):
        return OK
    if weights == 0:
        return NULL
    if size < 8 * HEADER_WORDS:
        return WRONG_SIZE
    code = _check_weights(facts, weights)
    return WRONG_SIZE if code == OK and size != _fact(facts, HEADER + 2) else code


@kernel
def check_workspace(facts, workspace, size):
    if workspace == 0:
        return NULL
    if workspace % _ALIGNMENT:
        return MISALIGNED
    return OK if size >= _fact(facts, WORKSPACE_BYTES) else WRONG_SIZE


@part
def _all_finite(values):
    beyond = False
    for value in values:
        beyond |= not abs(value) <= _LARGEST
    return not beyond


@part
def _check(facts, weights, inputs, workspace, count):
    if inputs == 0 or workspace == 0:
        return NULL
    if workspace % _ALIGNMENT or inputs % 4:
        return MISALIGNED
    code = _check_weights(facts, weights)
    if code != OK:
        return code
    return OK if _all_finite(float32_at(inputs, count)) else NOT_FINITE


# ---- The two passes --------------------------------------------------------------------------------------------------


@part
def _fill_slots(own, values, regions, first, last, weights, workspace, compact):
    """Slots first..last-1 of a table, with addresses in place of offsets."""
    for i in range(first, last):
        value = np.int64(values[i])
        if regions[i] != NUMBER:
            value &= 0xffffffff
            value += weights if regions[i] == WEIGHTS else workspace if regions[i] == WORKSPACE else compact
        own[i - first] = value


@kernel
def _run(facts, steps, slots, regions, call, first, last, weights, workspace):
    """Steps first..last-1, each with its slots' addresses in the workspace."""
    table = int64_at(steps, 5 * (_fact(facts, STEPS) + 1))
    size = table[5 * _fact(facts, STEPS) + 1]
    values, regions = int32_at(slots, size), int8_at(regions, size)
    own = int64_at(workspace + _fact(facts, SLOTS_AT), size)
    for step in range(first, last):
        begin, flag_bytes, is_needed = table[5 * step + 1], table[5 * step + 4], False
        flags = uint8_at(workspace + table[5 * step + 3], flag_bytes)
        for i in range(flag_bytes):
            is_needed |= flags[i] != 0
        if flag_bytes and not is_needed:  # no neuron is dead, so nothing is absorbed
            continue
        _fill_slots(own, values, regions, begin, table[5 * step + 6], weights, workspace, 0)
        _call(call, table[5 * step], own.ctypes.data, 0, table[5 * step + 2])


@part
def _clipped(value, low, high):
    return min(max(value, low), high)


@kernel
def _forward(facts, steps, slots, regions, call, numbers, weights, inputs, workspace):
    """Checks; the input, within its bounds, and the forward pass."""
    channels, positions = _fact(facts, CHANNELS), _fact(facts, HEIGHT) * _fact(facts, WIDTH)
    code = _check(facts, weights, inputs, workspace, channels * positions)
    if code != OK:
        return code
    given = float32_at(inputs, channels * positions)
    to = float32_at(workspace + _fact(facts, INPUT_AT), channels * positions)
    bounds = float32_at(numbers, 2 * channels)
    for c in range(channels):
        low, high = (bounds[c], bounds[channels + c]) if _fact(facts, HAS_BOUNDS) else (-_LARGEST, _LARGEST)
        for i in range(c * positions, (c + 1) * positions):
            to[i] = _clipped(given[i], low, high)
    flags = uint8_at(workspace + _fact(facts, DEAD_AT), _fact(facts, DEAD_BYTES))
    for i in range(len(flags)):
        flags[i] = 0
    _run(facts, steps, slots, regions, call, 0, _fact(facts, FORWARD_STEPS), weights, workspace)
    outputs = _fact(facts, OUTPUTS)
    return OK if _all_finite(float32_at(workspace + _fact(facts, OUTPUT_AT), outputs)) else BEYOND


@part
def _copy(to, values):
    for i in range(len(values)):
        to[i] = values[i]


@kernel
def predict(facts, steps, slots, regions, call, numbers, weights, inputs, output, workspace):
    """Class scores alone."""
    if output == 0:
        return NULL
    if output % 4:
        return MISALIGNED
    code = _forward(facts, steps, slots, regions, call, numbers, weights, inputs, workspace)
    outputs = _fact(facts, OUTPUTS)
    if code == OK:
        _copy(float32_at(output, outputs), float32_at(workspace + _fact(facts, OUTPUT_AT), outputs))
    return code


@kernel
def explain(facts, steps, slots, regions, call, numbers, weights, inputs, target, output, relevance, absorbed,
            workspace):
    """Scores, the relevance of the input, and what layers absorbed; `output` and `absorbed` may be 0."""
    if relevance == 0:
        return NULL
    if (output | relevance | absorbed) % 4:
        return MISALIGNED
    outputs, layers = _fact(facts, OUTPUTS), _fact(facts, LAYERS)
    if target < -1 or target >= outputs:
        return BAD_TARGET
    code = _forward(facts, steps, slots, regions, call, numbers, weights, inputs, workspace)
    if code != OK:
        return code
    scores = float32_at(workspace + _fact(facts, OUTPUT_AT), outputs)
    if output:
        _copy(float32_at(output, outputs), scores)
    if target == -1:
        target = 0
        for i in range(outputs):
            if scores[i] > scores[target]:
                target = i
    derivative = _fact(facts, DERIVATIVE)
    score = scores[target]
    explained = score if _fact(facts, SIGNED_SCORES) else max(score, ZERO)
    begin = np.float32(1)
    if not derivative:
        begin = explained if _fact(facts, STARTS_WITH_RELEVANCE) else np.sign(explained)
    start = float32_at(workspace + _fact(facts, START_AT), outputs)  # where the scores lie, it may be
    for i in range(outputs):
        start[i] = begin if i == target else ZERO
    ledger = float64_at(workspace + _fact(facts, LEDGER_AT), layers)
    for i in range(layers):
        ledger[i] = 0
    _run(facts, steps, slots, regions, call, _fact(facts, FORWARD_STEPS), _fact(facts, STEPS), weights, workspace)
    size = _fact(facts, CHANNELS) * _fact(facts, HEIGHT) * _fact(facts, WIDTH)
    code = _results(float32_at(relevance, size), float32_at(workspace + _fact(facts, RELEVANCE_AT), size),
                    float32_at(inputs, size), float32_at(numbers, 2 * _fact(facts, CHANNELS)), facts, derivative,
                    ledger, explained)
    if absorbed:
        total = np.float64(0)
        for i in range(layers):
            total += ledger[i]
        float32_at(absorbed, 1)[0] = np.float32(total)
    return code


@kernel
def _results(to, relevance, inputs, bounds, facts, derivative, ledger, explained):
    channels = _fact(facts, CHANNELS)
    positions = len(relevance) // channels
    for c in range(channels):
        low, high = (bounds[c], bounds[channels + c]) if _fact(facts, HAS_BOUNDS) else (-_LARGEST, _LARGEST)
        for i in range(c * positions, (c + 1) * positions):
            value = relevance[i]
            if derivative == GRADIENT_INPUT:
                value *= _clipped(inputs[i], low, high)
            elif derivative == SENSITIVITY:
                value *= value
            to[i] = value
    if not _all_finite(to):
        return BEYOND
    if derivative:
        return OK
    total, turnover, absorbed = np.float64(0), np.float64(0), np.float64(0)
    for value in to:
        total += np.float64(value)
        turnover += abs(np.float64(value))
    for value in ledger:
        absorbed += value
        turnover += abs(value)
    lost = abs(np.float64(explained) - total - absorbed)
    return LOST if lost > _LARGEST_LOSS * max(abs(np.float64(explained)), turnover) else OK


# ---- Compact weights -------------------------------------------------------------------------------------------------


@kernel
def _weight(source, index, is_half):
    """A weight of a compact file, stored as float32 or float16."""
    if not is_half:
        return float32_at(source, index + 1)[index]
    stored = uint8_at(source + 2 * index, 2)
    bits = np.int64(stored[0]) | np.int64(stored[1]) << 8
    value = float32_of(np.int32((bits & 0x7fff) << 13)) * _HALF_SCALE  # exact, for numbers below the normal ones too
    return -value if bits >> 15 else value


@part
def _times(weight, sign):
    return weight if sign == 1 else -weight if sign == -1 else ZERO


@kernel
def _gather(to, source, row, is_half):
    """A matrix of weights in another order."""
    count, size, stride = row[3], row[7], row[7 + LOOPS]
    result = float32_at(to, count)
    for block in range(count // size):
        index, rest = row[6], block
        for loop in range(1, LOOPS):
            index += rest % row[7 + loop] * row[7 + LOOPS + loop]
            rest //= row[7 + loop]
        for i in range(size):
            weight = _weight(source, index + i * stride, is_half)
            result[block * size + i] = _times(weight, row[4] if weight > ZERO else row[5])


@kernel
def unpack(facts, operations, slots, regions, call, compact, size, weights, workspace):
    """The weights as kernels read them, with what they begin with, from a compact file's content."""
    if compact == 0 or weights == 0 or workspace == 0:
        return NULL
    if (compact | weights | workspace) % _ALIGNMENT:
        return MISALIGNED
    if size < 8 * HEADER_WORDS:
        return WRONG_SIZE
    code = _check_header(facts, compact, COMPACT_MAGIC, COMPACT_BYTES)
    if code != OK:
        return code
    wanted, to = int64_at(facts, FACTS), int64_at(weights, HEADER_WORDS + 1)
    if size != wanted[COMPACT_BYTES]:
        return WRONG_SIZE
    count, is_half = wanted[OPERATIONS], wanted[IS_HALF] != 0
    values, kinds = int32_at(slots, _MAX_SIZE), int8_at(regions, _MAX_SIZE)
    own = int64_at(workspace + wanted[SLOTS_AT], _MAX_SIZE)
    for i in range(count):
        row = int64_at(operations + 8 * OPERATION * i, OPERATION)
        kind, source = row[0], compact + row[2]
        if kind == COPY:
            _copy(uint8_at(weights + row[1], row[3]), uint8_at(source, row[3]))
        elif kind == WIDEN:
            wide = float32_at(weights + row[1], row[3])
            for j in range(row[3]):
                wide[j] = _weight(source, j, is_half)
        elif kind == GATHER:
            _gather(workspace, source, row, is_half)
        else:
            _fill_slots(own, values, kinds, row[4], row[4] + row[3], weights, workspace, compact)
            _call(call, row[2], own.ctypes.data, 0, 0)
    for i in range(HEADER_WORDS):
        to[i] = wanted[HEADER + i]
    to[HEADER_WORDS] = 0
    return OK


# ---- Pictures --------------------------------------------------------------------------------------------------------


@part
def _margin(length, seen):
    """What is cut off at each end of a side, as fastdtd.images has it."""
    return max(0.0, (length - max(seen, 1.0, length / 1048576.0)) / 2)


@part
def _tap(position, center, scale):
    """A resampling filter's value: of a triangle."""
    distance = abs((position - center + 0.5) * scale)
    return 1.0 - distance if distance < 1.0 else 0.0


@part
def _taps(index, begin, end, size, outputs):
    """Which inputs an output is made of, and their filter's centre and scale."""
    scale = np.float64(np.float32(end - begin)) / outputs
    width = max(scale, 1.0)
    center = np.float64(begin) + (index + 0.5) * scale
    first, last = max(np.int64(center - width + 0.5), 0), min(np.int64(center + width + 0.5), size)
    total = 0.0
    for i in range(first, last):
        total += _tap(i, center, 1.0 / width)
    return first, last, center, 1.0 / width, total


@part
def _fixed(position, center, scale, total):
    value = _tap(position, center, scale)
    return np.int64(0.5 + (value / total if total != 0.0 else value) * (1 << _PRECISION))


@part
def _rounded(total):
    return min(max(total >> _PRECISION, 0), 255)


@kernel
def preprocess_rgb(facts, numbers, pixels, height, width, row_bytes, inputs):
    """The network's input from pixels (height, width, 3), rows `row_bytes` apart: resampled in fixed point as Pillow
    does it, its colours ordered, its values looked up."""
    if pixels == 0 or inputs == 0:
        return NULL
    if inputs % 4:
        return MISALIGNED
    if _fact(facts, COLOR) == NO_PICTURE or not (0 < height <= _MAX_SIDE and 0 < width <= _MAX_SIDE
                                                 and row_bytes >= 3 * width):
        return BAD_PICTURE
    channels, rows, columns = _fact(facts, CHANNELS), _fact(facts, HEIGHT), _fact(facts, WIDTH)
    top, left = 0.0, 0.0
    if _fact(facts, CROPS):
        if width * rows <= height * columns:
            top = _margin(height, width * rows / columns)
        else:
            left = _margin(width, height * columns / rows)
    x_begin, x_end = np.float32(left), np.float32(width - left)
    y_begin, y_end = np.float32(top), np.float32(height - top)
    source, to = uint8_at(pixels, (height - 1) * row_bytes + 3 * width), float32_at(inputs, channels * rows * columns)
    half, size = 1 << (_PRECISION - 1), rows * columns
    table = float32_at(numbers + 8 * channels, 256 * channels + 1 + 2 * channels * size)
    for y in range(rows):
        y_first, y_last, y_center, y_scale, y_total = _taps(y, y_begin, y_end, height, rows)
        for x in range(columns):
            x_first, x_last, x_center, x_scale, x_total = _taps(x, x_begin, x_end, width, columns)
            red, green, blue = half, half, half
            for i in range(y_first, y_last):
                row_red, row_green, row_blue = half, half, half
                for j in range(x_first, x_last):
                    weight, at = _fixed(j, x_center, x_scale, x_total), i * row_bytes + 3 * j
                    row_red += weight * source[at]
                    row_green += weight * source[at + 1]
                    row_blue += weight * source[at + 2]
                weight = _fixed(i, y_center, y_scale, y_total)
                red += weight * _rounded(row_red)
                green += weight * _rounded(row_green)
                blue += weight * _rounded(row_blue)
            red, green, blue, color = _rounded(red), _rounded(green), _rounded(blue), _fact(facts, COLOR)
            for c in range(channels):
                value = green if c == 1 else red if (c == 0) == (color == RGB) else blue
                if color == GRAY:
                    value = (19595 * red + 38470 * green + 7471 * blue + 32768) >> 16
                at = c * size + y * columns + x
                if _fact(facts, HAS_PLANES):
                    scaled = np.float32(value) * table[0]
                    to[at] = (scaled - table[1 + at]) / table[1 + channels * size + at]
                else:
                    to[at] = table[256 * c + value]
    return OK
