"""The formulas of kernels/scalar.py, compiled for processors."""

import numpy as np
from fastdtd.kernels.cpu.arrays import bits_of, float_of
from fastdtd.kernels.cpu.jit import part
from fastdtd.kernels.scalar import ONE, ZERO, compiled_for

_LN2 = 0.6931471805599453
_SQRT2 = 1.4142135623730951
_FRACTION = (1 << 52) - 1  # of a float64's bits
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


globals().update(compiled_for(part, raised=raised))
