"""The formulas of kernels/scalar.py, compiled for processors."""

import math

import numpy as np
from fastdtd.kernels.cpu.arrays import bits32_of, bits_of, float32_of, float_of
from fastdtd.kernels.cpu.jit import part
from fastdtd.kernels.scalar import ONE, TWO, ZERO, compiled_for

_LN2 = 0.6931471805599453
_SQRT2 = 1.4142135623730951
_FRACTION = (1 << 52) - 1  # of a float64's bits
_LOWEST, _HIGHEST = np.float32(-87.3), np.float32(88)  # exp of less is not held to full precision
_LOG2E, _SHIFTER = np.float32(1 / _LN2), np.float32(1.5 * 2.0**23)
_LN2_HIGH, _LN2_LOW = np.float32(0.693359375), np.float32(_LN2 - 0.693359375)  # times n, the first is exact
_C2, _C3, _C4, _C5, _C6, _C7 = (np.float32(1 / math.factorial(n)) for n in range(2, 8))
_A3, _A5, _A7, _A9, _A11, _A13, _A15 = (np.float32(2 / n) for n in range(3, 17, 2))
_E0, _E1, _E2, _E3, _E4, _E5, _E6, _E7, _E8, _E9 = (np.float32(value) for value in (
    -1.26551223, 1.00002368, 0.37409196, 0.09678418, -0.18628806, 0.27886807, -1.13520398, 1.48851587, -0.82215223,
    0.17087277))
_HALF, _SQRT_HALF = np.float32(0.5), np.float32(math.sqrt(0.5))
_INFINITE, _NAN = np.float32(np.inf), np.float32(np.nan)


@part
def raised(base, exponent):
    """base ** exponent, in float64 as 2^(exponent log2(base)): all but as good as rounding it once, and the same bits
    on every processor, whatever library of mathematics there is, if any."""
    if not base > ZERO:
        if base == ZERO:
            return ONE if exponent == ZERO else ZERO if exponent > ZERO else _INFINITE
        return _NAN
    bits = bits_of(np.float64(base))
    whole, mantissa = (bits >> 52) - 1023, float_of((bits & _FRACTION) | (1023 << 52))
    if mantissa > _SQRT2:
        whole, mantissa = whole + 1, 0.5 * mantissa
    t = (mantissa - 1.0) / (mantissa + 1.0)  # log(mantissa) = 2 (t + t^3 / 3 + t^5 / 5 + ...), |t| < 0.172
    square, log = t * t, 0.0
    for i in (21.0, 19.0, 17.0, 15.0, 13.0, 11.0, 9.0, 7.0, 5.0, 3.0, 1.0):
        log = log * square + 1.0 / i
    power = min(max(np.float64(exponent) * (whole + 2.0 / _LN2 * t * log), -200.0), 200.0)
    nearest = np.int64(power + 256.5) - 256
    rest, result = (power - nearest) * _LN2, 1.0
    for i in (14.0, 13.0, 12.0, 11.0, 10.0, 9.0, 8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0):
        result = 1.0 + result * rest / i
    return np.float32(result * float_of((nearest + 1023) << 52))


# ---- In float32, and without a branch, so that loops over elements become vector instructions ------------------------


@part
def _powers(x):
    """(2^n, exp(r) - 1) for x = n log(2) + r, x within what float32 can hold of 2^n."""
    x = _LOWEST if x < _LOWEST else _HIGHEST if x > _HIGHEST else x
    shifted = x * _LOG2E + _SHIFTER  # the last bits of which are those of n
    n = shifted - _SHIFTER
    r = (x - n * _LN2_HIGH) - n * _LN2_LOW
    p = _C7
    p = p * r + _C6
    p = p * r + _C5
    p = p * r + _C4
    p = p * r + _C3
    p = p * r + _C2
    return float32_of(np.int32((bits32_of(shifted) + 127) << 23)), r + r * r * p


@part
def exp(x):
    scale, rest = _powers(x)
    return scale + scale * rest


@part
def expm1(x):
    scale, rest = _powers(x)
    return scale * rest + (scale - ONE)


@part
def log1p(x):
    """By the series of 2 artanh(x / (2 + x)), for x from 0 to 1."""
    t = x / (x + TWO)
    square, p = t * t, _A15
    p = p * square + _A13
    p = p * square + _A11
    p = p * square + _A9
    p = p * square + _A7
    p = p * square + _A5
    p = p * square + _A3
    return t * (TWO + p * square)


@part
def normal_below(x):
    """By Chebyshev's approximation of erfc that Numerical Recipes (2nd edition, 6.2) gives, to 1.2e-7 of its value."""
    z = abs(x) * _SQRT_HALF
    t = TWO / (TWO + z)
    p = _E9
    p = p * t + _E8
    p = p * t + _E7
    p = p * t + _E6
    p = p * t + _E5
    p = p * t + _E4
    p = p * t + _E3
    p = p * t + _E2
    p = p * t + _E1
    # exp(-x^2 / 2) of a rounded square and exp(-what was rounded off): the tails keep their digits
    high = float32_of(np.int32(bits32_of(x) & -4096))
    low = x - high
    tail = _HALF * t * exp(-_HALF * high * high) * exp(p * t + _E0 - _HALF * low * (x + high))
    return tail if x < ZERO else ONE - tail


globals().update(compiled_for(part, raised=raised, exp=exp, expm1=expm1, log1p=log1p, normal_below=normal_below))
