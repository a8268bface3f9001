"""The parameters of each kernel on any device, in their order, but for the last two of all: `first` and `last`, its
units.

A device's kernel has those that mean something there (tests/test_mirror.py): a GPU has no blocks and no scratch, a
processor no tables of taps. So of arguments that are offered by name a kernel takes its own (`parameters`), and a name
that no device's kernel knows (`SIGNATURES`, `ALL_NAMES`) is a mistake.
"""

import inspect
from functools import cache

_TAPES = "x ratio dead a"
_STEP = "kernel_h kernel_w stride_h stride_w"
_BLOCK = "block_rows block_columns halo_rows halo_columns"
_PAD = "pad_top pad_left"
_BACKWARD = "c_in c ratio a"
_CHANNELS = "c_in_channel c_channel a_channel"
_DIRECTION = f"groups stride_h stride_w {_PAD} dilation_h dilation_w"

_LISTS = ("row_starts row_sources row_weights row_v column_starts column_sources column_weights column_v")
_TRANSPOSED_LISTS = "row_starts row_sources row_v column_starts column_sources column_v"

SIGNATURES = {name: tuple(names.split()) for name, names in {
    "conv2d_forward": f"{_TAPES} packed offsets bounds taps bias constant pattern z_min planes block columns sums "
                      f"x_channel a_channel stride_h stride_w {_BLOCK} channels splits joined features precision x_min "
                      "x_max relevance",
    "conv2d_redistribute": f"{_BACKWARD} density packed offsets bounds taps low high phases planes block columns sums "
                           f"{_CHANNELS} groups stride_h stride_w {_BLOCK} splits joined panel_rows features "
                           "precision sparse_below relevance accumulate",
    "depthwise2d_forward": f"{_TAPES} packed offsets bounds masks bias planes block results x_channel a_channel "
                           "stride_h stride_w width block_rows halo_rows pad_top features x_min x_max relevance",
    "depthwise2d_redistribute": f"{_BACKWARD} packed offsets bounds masks planes block results {_CHANNELS} stride_h "
                                "stride_w width block_rows halo_rows pad_top columns_even features relevance "
                                "accumulate",
    "winograd2d_forward": f"{_TAPES} weight packed offsets bias lines points sums stage seen x_channel a_channel "
                          f"channels groups {_PAD} blocks block panels_at_once splits x_min x_max relevance",
    "winograd2d_redistribute": "c_in c ratio density packed offsets lines points sums stage c_in_channel c_channel "
                               f"inputs groups {_PAD} blocks block panels_at_once splits c_min sparse_below accumulate",
    "density_redistribute": "density ratio c c_channel",
    "sparse2d_redistribute": f"{_BACKWARD} density packed low high lists tile sums {_CHANNELS} inputs kernel_w "
                             f"stride_h stride_w {_PAD} block_rows block_columns splits features sparse_below "
                             "accumulate",
    "dense_forward": f"{_TAPES} weight bias constant low high sums x_channel a_channel features x_min x_max relevance",
    "dense_redistribute": f"{_BACKWARD} weight low high sums contributions {_CHANNELS} features weights relevance "
                          "accumulate",
    "direction_forward": f"z a weight low high a_channel {_DIRECTION}",
    "direction_redistribute": f"{_BACKWARD} weight low high {_CHANNELS} {_DIRECTION} accumulate",
    "ratios_forward": "x ratio_pos ratio_neg ratio_bias absorbed dead dead_neg bias count_h count_w x_channel formula "
                      "factor beta epsilon bias_mode x_min x_max relevance",
    "max_pool2d_forward": "x winner a planes offsets positions block x_channel a_channel "
                          f"{_STEP} {_BLOCK} {_PAD}",
    "max_pool2d_redistribute": f"c_in c winner c_in_channel c_channel {_STEP} {_PAD} accumulate",
    "pool2d_forward": f"{_TAPES} low planes offsets count_h count_w block x_channel a_channel {_STEP} {_BLOCK} {_PAD} "
                      "maximum features relevance",
    "pool2d_redistribute": f"{_BACKWARD} low block results {_CHANNELS} {_STEP} {_PAD} features relevance accumulate",
    "resize_forward": f"{_TAPES} low high {_LISTS} lines x_channel a_channel features x_min x_max relevance",
    "resize_redistribute": f"{_BACKWARD} low high {_TRANSPOSED_LISTS} lines {_CHANNELS} features relevance accumulate",
    "normalize_forward": "x ratio a x_channel a_channel before after within_channel alpha beta bias",
    "normalize_redistribute": "c_in c ratio c_in_channel c_channel relevance accumulate",
    "normalize_taylor_redistribute": f"c_in ledger c ratio a scratch column {_CHANNELS} before after within_channel "
                                     "alpha beta bias formula epsilon accumulate",
    "group_norm_forward": f"{_TAPES} bias scale statistics sums x_channel a_channel groups per_position centered "
                          "epsilon features x_min x_max relevance",
    "group_norm_redistribute": f"{_BACKWARD} scale statistics low high sums {_CHANNELS} groups per_position centered "
                               "features weights relevance derivative accumulate",
    "add_forward": f"{_TAPES} b low_a high_a low_b high_b x_channel a_channel b_channel features x_min x_max relevance",
    "add_redistribute": f"{_BACKWARD} low high {_CHANNELS} features relevance accumulate",
    "activate_forward": "x a x_channel a_channel channels slope x_min x_max",
    "activate_redistribute": f"c_in c a {_CHANNELS} channels slope x_min x_max relevance derivative accumulate",
    "power_forward": "x ratio a x_channel a_channel exponent derivative",
    "nonlinearity_forward": "x ratio a x_channel a_channel function alpha beta derivative",
    "multiply_forward": "x a b x_channel a_channel b_channel channels gate_channels",
    "multiply_redistribute": "c_in c b c_in_channel c_channel b_channel channels gate_channels share relevance "
                             "derivative accumulate",
    "gate_redistribute": f"c_in c a {_CHANNELS} channels gate_channels share relevance derivative accumulate",
    "softmax_forward": "x a x_channel a_channel channels",
    "softmax_redistribute": "c_in c x c_in_channel c_channel x_channel channels derivative accumulate",
    "rearrange_forward": "x a index x_channel a_channel",
    "rearrange_redistribute": "c_in ledger c starts readers column c_in_channel c_channel relevance accumulate",
    "copy_forward": "x a x_begin a_begin count accumulate",
    "clear_redistribute": "c_in begin end",
    "absorb_dead_redistribute": "ledger sums ratio c dead column c_channel shared",
    "absorb_remainder_redistribute": "ledger sums absorbed c column c_channel shared",
    "sum_absorbed_redistribute": "ledger sums column",
    "relevance_redistribute": "out x c x_channel c_channel relevance",
}.items()}
ALL_NAMES = frozenset().union(*SIGNATURES.values())


@cache
def parameters(kernel):
    """Names that a device's kernel takes besides its units."""
    *names, first, last = inspect.signature(getattr(kernel, "py_func", kernel)).parameters
    assert (first, last) == ("first", "last")
    return tuple(names)


def name_of(kernel):
    """Of a device's kernel, in SIGNATURES."""
    return getattr(kernel, "py_func", kernel).__name__
