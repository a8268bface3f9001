"""The formulas of one element, written once: each device compiles them with its own decorator (`compiled_for`).

Kernels loop over elements, load and store; what happens to an element is here. The exceptions are kernels in vector
instructions of their own (kernels/cpu/vector_code.py), which repeat `clip`, `ratio_of` and `redistributed_pair` for
whole vectors.

Rules (docs/method.md has their sources). An output y = sum of w a + b, x = f(y), has a sum z of features u of the
inputs times weights V; in the backward pass each input gets u V times the output's ratio times c, for R = |x| c. Where
the backward pass carries relevance R itself (`relevance`), the ratio is for R = c: its numerator is 1, not |x|.

Where a rule has other ratios than |x| / z, P is the sum of the positive contributions to an output (max(W, 0) a, or -W
a where a is negative), Q that of the negative ones, as a positive number; t = P - Q; b+, b- = max(b, 0), max(-b, 0), or
0 where bias is IGNORED.

    rule         ratio of P's weights             ratio of Q's weights
    signs        |x| / P where x >= 0             |x| / Q where x < 0
    epsilon      1 / (t + b +- epsilon)           that of W, not of its parts
    alpha-beta   alpha / (P + b+ + epsilon)       -beta / (Q + b- + epsilon)
    gamma        (1 + gamma) / (z +- epsilon)     -1 / (z +- epsilon)            z = t + b + gamma (P + b+) if t + b > 0
                 1 / (z +- epsilon)               -(1 + gamma) / (z +- epsilon)  z = t + b - gamma (Q + b-) if t + b < 0
    direction    1 / z, of z that direction.py has summed
    gradient     1 inside the activation's bounds
"""

import math
from types import FunctionType

import numpy as np
from fastdtd.kernels.codes import (
    ALPHA_BETA,
    AS_IS,
    BOX,
    DIRECTION,
    ELU,
    EPSILON,
    FLAT,
    GAMMA,
    GELU,
    GELU_TANH,
    GRADIENT,
    HARD_SIGMOID,
    HARD_SWISH,
    IGNORED,
    NEGATED,
    NEGATIVE,
    NONNEGATIVE,
    ONES,
    SHARED,
    SIGMOID,
    SIGNED,
    SILU,
    SOFTPLUS,
    TANH,
    VALUE,
)
from numba import njit, types
from numba.core.errors import NumbaError

ZERO, ONE, TWO = np.float32(0), np.float32(1), np.float32(2)
MIN_DENOMINATOR = np.float32(1e-30)  # a smaller sum counts as zero: 1 / z and its products stay within float32
ROUNDING = np.float32(1e-6)  # of P: a smaller Q, which is found as P - t, is what rounding left
TIE = np.float32(0.75 * 2.0**-23)  # of a value's size: what rounds to its last bit
LOWEST = np.finfo(np.float32).min
_THREE_QUARTERS = np.float32(0.75)
_HALF, _SQRT_HALF, _NORMAL = (np.float32(value) for value in (0.5, math.sqrt(0.5), 1 / math.sqrt(2 * math.pi)))
_GELU_1, _GELU_3 = np.float32(2 * math.sqrt(2 / math.pi)), np.float32(2 * math.sqrt(2 / math.pi) * 0.044715)
_THREE, _TWENTY = np.float32(3), np.float32(20)

_formulas = []


def formula(function):
    """A function of numbers that kernels call. It may call those before it."""
    _formulas.append(function)
    return function


def compiled_for(compile_part, **own):
    """Name -> formula, each compiled by `compile_part` for kernels of a device, but for those that it has of its
    own."""
    scope = {**globals(), **own}
    for function in _formulas:
        if function.__name__ not in own:
            scope[function.__name__] = compile_part(_in_scope(function, scope))
    return {function.__name__: scope[function.__name__] for function in _formulas}


def _in_scope(function, scope):
    """The same function, with other globals."""
    copy = FunctionType(function.__code__, scope, function.__name__)
    copy.__qualname__, copy.__doc__ = function.__qualname__, function.__doc__
    return copy


# ---- Outputs and their one ratio -------------------------------------------------------------------------------------


@formula
def divide(a, b):
    """Of ratios; GPUs have a faster one."""
    return a / b


@formula
def clip(y, x_min, x_max):
    """The output from its sum: clipped to the bounds of the activation after the layer, infinite where there is
    none."""
    if y < x_min:  # not min(max()), which on GPUs would make a number of NaN
        return x_min
    return x_max if y > x_max else y


@formula
def ratio_of(x, z, z_min, relevance):
    """|x| / z; if `relevance`, 1 / z. A z up to z_min counts as zero: nothing can be redistributed.

    What is absorbed then is a negative value, -|x| or -1, for absorb_dead_redistribute.
    """
    numerator = ONE if relevance else abs(x)
    return divide(numerator, z) if z > z_min else -numerator


@formula
def positive_feature(a, features, low, high):
    """Of an activation's features u, the sum of those that add to z where all weights are positive."""
    if features in (NONNEGATIVE, VALUE):
        return a
    if features == SIGNED:
        return max(a, ZERO)
    if features == NEGATED:
        return max(-a, ZERO)
    if features == BOX:
        return max(a - low, ZERO)
    return ONE


@formula
def z_term(w, a, features, low, high):
    """What one input with the weight w adds to z: NONNEGATIVE, SIGNED or BOX."""
    if features == NONNEGATIVE:
        return max(w, ZERO) * a
    if features == SIGNED:
        return max(w, ZERO) * max(a, ZERO) + max(-w, ZERO) * max(-a, ZERO)
    return max(w, ZERO) * max(a - low, ZERO) + max(-w, ZERO) * max(high - a, ZERO)


@formula
def redistributed(total, a, features, low, high, relevance):
    """What an input gets of total = V^T (ratio * c), where all weights are positive; if `relevance`, times u."""
    if (features == SIGNED and a < ZERO) or (features == NEGATED and a >= ZERO):
        return ZERO
    if relevance and features != ONES:
        return total * positive_feature(a, features, low, high)
    return total


@formula
def redistributed_pair(total, total_neg, a, features, low, high, relevance):
    """The same for weights of both signs: what comes through positive weights (or all), and through negative ones."""
    result = total
    if features == BOX:
        result = max(a - low, ZERO) * total + max(high - a, ZERO) * total_neg
    elif features == SIGNED:
        result = total if a >= ZERO else total_neg
    if relevance and features == VALUE:
        result *= a
    elif relevance and features in (NONNEGATIVE, SIGNED):
        result *= abs(a)
    return result


# ---- Rules with several ratios, or another than |x| / z --------------------------------------------------------------


@formula
def over(numerator, z, epsilon):
    """numerator / z, z moved away from zero by epsilon; 0 where that is zero too."""
    z += epsilon if z >= ZERO else -epsilon
    return divide(numerator, z) if abs(z) > MIN_DENOMINATOR else ZERO


@formula
def sum_of(inverse):
    """z, from what `ratio_of` made of it for relevance."""
    return divide(ONE, inverse) if inverse > ZERO else ZERO


@formula
def signs_ratios(x, total, ratio_pos, relevance):
    """Of z+ where negative outputs have relevance too: (ratio of P, ratio of Q), total = t."""
    numerator, p = ONE if relevance else abs(x), sum_of(ratio_pos)
    q = p - total
    s_neg = divide(numerator, q) if q > max(ROUNDING * p, MIN_DENOMINATOR) else -numerator
    return ZERO if x < ZERO else ratio_of(x, p, MIN_DENOMINATOR, relevance), ZERO if x >= ZERO else s_neg


@formula
def epsilon_ratios(t, b, numerator, epsilon):
    """(ratio, what the bias gets of R, what is absorbed of it)"""
    s = over(numerator, t + b, epsilon)
    return s, b * s, numerator - t * s


@formula
def alpha_beta_ratios(p, q, b, numerator, alpha, beta, epsilon):
    """(ratio of P, ratio of Q, what the bias gets of R, what is absorbed of it)"""
    b_pos, b_neg = max(b, ZERO), max(-b, ZERO)
    s_pos, s_neg = over(numerator * alpha, p + b_pos, epsilon), over(numerator * beta, q + b_neg, epsilon)
    return s_pos, -s_neg, b_pos * s_pos - b_neg * s_neg, numerator - (p * s_pos - q * s_neg)


@formula
def gamma_ratios(t, p, b, numerator, gamma, epsilon):
    """(ratio of P, ratio of Q, what the bias gets of R, what is absorbed of it)"""
    b_pos, b_neg = max(b, ZERO), max(-b, ZERO)
    q, y = max(p - t, ZERO), t + b
    gamma_pos, gamma_neg = gamma if y > ZERO else ZERO, gamma if y < ZERO else ZERO
    z = y + gamma_pos * (p + b_pos) - gamma_neg * (q + b_neg)
    s = over(numerator, z, epsilon) if y != ZERO else ZERO
    return ((ONE + gamma_pos) * s, -(ONE + gamma_neg) * s, (b + gamma_pos * b_pos - gamma_neg * b_neg) * s,
            numerator - (t + gamma_pos * p - gamma_neg * q) * s)


@formula
def rule_ratios(formula, t, bias, ratio_pos, ratio_neg, ratio_bias, factor, beta, epsilon, bias_mode, x_min, x_max,
                relevance):
    """(x, ratio of P or W, ratio of Q, what the bias gets of R, what is absorbed of it) of one output, from t and the
    ratios of its sums (kernels' ratios_forward says what these hold). factor is alpha or gamma."""
    y = t + bias
    x = clip(y, x_min, x_max)
    numerator = ONE if relevance else abs(x)
    is_part = bias_mode != IGNORED and (bias_mode != SHARED or ratio_bias > ZERO)  # some windows hold padding only
    b, to_bias, absorbed = bias if is_part else ZERO, ZERO, ZERO
    if formula == EPSILON:
        ratio_pos, to_bias, absorbed = epsilon_ratios(t, b, numerator, epsilon)
    elif formula == ALPHA_BETA:
        p, q = sum_of(ratio_pos), sum_of(ratio_neg) if beta > ZERO else ZERO
        ratio_pos, ratio_neg, to_bias, absorbed = alpha_beta_ratios(p, q, b, numerator, factor, beta, epsilon)
    elif formula == GAMMA:
        ratio_pos, ratio_neg, to_bias, absorbed = gamma_ratios(t, sum_of(ratio_pos), b, numerator, factor, epsilon)
    elif formula == DIRECTION:
        has_sum = abs(ratio_pos) > MIN_DENOMINATOR
        absorbed = ZERO if has_sum else numerator
        ratio_pos = divide(numerator, ratio_pos) if has_sum else ZERO
    elif formula == GRADIENT:
        ratio_pos = ONE if x_min < y < x_max else ZERO
    if bias_mode == SHARED:
        absorbed -= to_bias
    return x, ratio_pos, ratio_neg, to_bias, absorbed


@formula
def rule_writes(formula, beta, bias_mode):
    """Which of these a rule has: ratio of Q, ratio of a SHARED bias, absorbed. And whether W's ratio is one for a sum,
    to be divided where the output is a mean."""
    return ((formula == ALPHA_BETA and beta > ZERO) or formula == GAMMA,
            bias_mode == SHARED and formula not in (DIRECTION, GRADIENT), formula != GRADIENT,
            formula in (EPSILON, GRADIENT))


@formula
def relevance_of(x, c, relevance):
    """R = |x| c, or c where that is relevance itself."""
    return c if relevance else abs(x) * c


# ---- Layers without weights ------------------------------------------------------------------------------------------


@formula
def activation(a, slope, x_min, x_max):
    """Negative values times slope, then clipped."""
    return clip(a if a > ZERO else a * slope, x_min, x_max)


@formula
def activation_redistributed(c, a, slope, x_min, x_max, relevance, derivative):
    """Relevance |x| c of an activation is its input's: c |x| / |a|; relevance itself as it is. If `derivative`, c is
    one."""
    x = activation(a, slope, x_min, x_max)
    kept = ONE if relevance or x == a else abs(x) / abs(a)
    if derivative:
        kept = ZERO if x <= x_min or x >= x_max else ONE if a > ZERO else slope
    return c * kept


@formula
def raised(base, exponent):
    """base ** exponent, of a base from 0; processors compute it without a library."""
    return base ** exponent


@formula
def power(a, exponent, derivative):
    """(x, ratio): |a|^exponent, and x / |a|, which is 0 where a is; its derivative if `derivative`."""
    size = abs(a)
    x = raised(size, exponent)
    kept = x / size if size > MIN_DENOMINATOR else ZERO
    if derivative:
        kept *= exponent if a > ZERO else -exponent
    return x, kept


# ---- Smooth activations: processors compute the first four without a library -----------------------------------------


@formula
def exp(x):
    return math.exp(x)


@formula
def expm1(x):
    """exp(x) - 1."""
    return math.expm1(x)


@formula
def log1p(x):
    """log(1 + x), of an x from 0 to 1."""
    return math.log1p(x)


@formula
def normal_below(x):
    """How much of the normal distribution lies below x."""
    return _HALF * math.erfc(-x * _SQRT_HALF)


@formula
def sigmoid(x):
    return ONE / (ONE + exp(-x))


@formula
def tanh(x):
    e = expm1(-TWO * abs(x))
    size = -e / (TWO + e)
    return size if x > ZERO else -size


@formula
def gate(a, function, alpha, beta):
    """(s, its derivative) of the functions that are a * s(a)."""
    if function == SILU:
        s = sigmoid(alpha * a)
        return s, alpha * s * (ONE - s)
    if function == HARD_SWISH:
        y = alpha * a + beta
        return clip(y, ZERO, ONE), alpha if ZERO < y < ONE else ZERO
    if function == GELU:
        return normal_below(a), _NORMAL * exp(-_HALF * a * a)
    if function == GELU_TANH:  # (1 + tanh(u)) / 2 is the sigmoid of 2 u
        square = a * a
        s = sigmoid(a * (_GELU_1 + _GELU_3 * square))
        return s, s * (ONE - s) * (_GELU_1 + _THREE * _GELU_3 * square)
    e = exp(min(a, _TWENTY))  # Mish: tanh(log(1 + e)), which is 1 long before 20
    n = e * (e + TWO)
    s = n / (n + TWO)
    return s, (ONE - s) * (ONE + s) * (e / (ONE + e))


@formula
def nonlinearity(a, function, alpha, beta, derivative):
    """(x, ratio): x = f(a), and x / a where f(0) = 0, else 1; the derivative if `derivative`."""
    if function == ELU:
        e = alpha * expm1(min(a, ZERO))
        x = beta * (a if a > ZERO else e)
        kept = beta * (ONE if a > ZERO else alpha if a == ZERO else e / a)
        return x, beta * (ONE if a > ZERO else e + alpha) if derivative else kept
    if function == TANH:
        x = tanh(a)
        kept = ONE if a == ZERO else x / a
        return x, (ONE - x) * (ONE + x) if derivative else kept
    if function == SIGMOID:
        x = sigmoid(a)
        return x, x * (ONE - x) if derivative else ONE
    if function == HARD_SIGMOID:
        y = alpha * a + beta
        return clip(y, ZERO, ONE), ONE if not derivative else alpha if ZERO < y < ONE else ZERO
    if function == SOFTPLUS:
        x = max(a, ZERO) + log1p(exp(-abs(a)))
        return x, sigmoid(a) if derivative else ONE
    s, slope = gate(a, function, alpha, beta)
    return a * s, s + a * slope if derivative else s


@formula
def gated(c, other, relevance, derivative):
    """What one of the factors of a product gets of c, for R = |x| c: |other| c; relevance itself as it is."""
    if derivative:
        return c * other
    return c if relevance else c * abs(other)


@formula
def norm_scale(squares, alpha, beta, bias):
    """(bias + alpha * squares)^-beta, squares the sum of a^2 over the neighbours."""
    z = bias + alpha * squares
    if beta == _THREE_QUARTERS:  # everybody's; square roots are quick
        root = np.float32(math.sqrt(z))
        return ONE / (root * np.float32(math.sqrt(root)))
    return raised(z, -beta)


@formula
def norm_passed(c, scale, relevance):
    """c_in of a normalisation, or a power, with its scale held constant: |x| c = |a| scale c; relevance itself as it
    is."""
    return c * (ONE if relevance else scale)


@formula
def norm_terms(a, scale, c, alpha, beta, bias, taylor, epsilon):
    """What an output gives each neighbour (times its a^2, or a), its own input besides, and what it absorbs.

    The derivative of a * norm_scale times c or, if `taylor`, relevance c in proportion to the expansion

        x_k ~ a_k (bias + alpha a_k^2)^-beta - sum over i != k of a_i^2 2 alpha beta a_k (bias + alpha squares)^-(beta +
        1)

    (Binder et al., arXiv:1604.00825), whose sum is moved away from zero by epsilon.
    """
    denominator = raised(scale, -ONE / beta) if beta > ZERO else ONE
    slope = -TWO * alpha * beta * a * scale / denominator
    if not taylor:
        return slope * c, scale * c, np.float64(0)
    square = a * a
    own = a * raised(bias + alpha * square, -beta)
    others = max((denominator - bias) - alpha * square, ZERO) / alpha if alpha > ZERO else ZERO
    z = own + slope * others
    stable = z + epsilon if z >= ZERO else z - epsilon
    s = c / stable if stable != ZERO else ZERO
    return slope * s, own * s - square * (slope * s), np.float64(c) - np.float64(z) * np.float64(s)


# ---- Group norms -----------------------------------------------------------------------------------------------------

# x = v (a - mean) + shift, v = scale / deviation, is linear with the deviation held constant. Its W is v (1 - part) for
# an output's own input and -v part for each other of the group, part = 1 / their number; not centered, v for its own.
# Sums are float64.


@formula
def group_norm_sum(v, a, positive, negative, part, centered, features):
    """z of one output, from the sums of max(a, 0) and of max(-a, 0) over its group: NONNEGATIVE, SIGNED or ONES."""
    if features == ONES:
        return np.float32(1 / part if centered else 1.0)
    own, own_neg = max(a, ZERO), max(-a, ZERO)
    if v < ZERO:
        own, own_neg, negative = own_neg, own, positive
    z = own + ((negative - own_neg) - own) * part if centered else np.float64(own)
    return np.float32(abs(v) * z)


@formula
def group_norm_shares(v, t, positive, negative, part, centered, weights):
    """What one input gets of t, ratio * c of the outputs, through V (redistributed_pair): from its own output's t, and
    the sums of max(v, 0) t and of max(-v, 0) t over its group; of t where the weights are FLAT."""
    if weights == FLAT:
        total = np.float32(positive if centered else np.float64(t))
        return total, total
    if weights == AS_IS:
        total = np.float32(v * t - ((positive - negative) * part if centered else 0.0))
        return total, total
    own, own_neg = max(v, ZERO) * t, max(-v, ZERO) * t
    total, total_neg = np.float64(own), np.float64(own_neg)
    if centered:
        total, total_neg = (own + ((negative - own_neg) - own) * part,
                            own_neg + ((positive - own) - own_neg) * part)
    if weights == NEGATIVE:
        total, total_neg = total_neg, total
    return np.float32(total), np.float32(total_neg)


@formula
def group_norm_derived(g, a, mean, inverse, total, total_normed, part, centered):
    """The derivative by one input, from g = scale * c, the sums of g and of g (a - mean) / deviation over its group."""
    normed = (a - mean) * inverse
    return np.float32(inverse * (g - normed * (total_normed * part) - (total * part if centered else 0.0)))


# ---- Search directions -----------------------------------------------------------------------------------------------


def direction_formula(direction, bounded, compile_part):
    """v(a, w, low, high) of a user's function v(a, w) or, if `bounded`, of all four. TypeError: it cannot be
    compiled."""
    checked = njit(error_model="numpy")(direction)  # for processors, which can do the same and are always there
    try:
        checked.compile((types.float32,) * (4 if bounded else 2))
        result = checked.nopython_signatures[0].return_type
    except NumbaError as error:
        raise TypeError(str(error).strip().splitlines()[-1]) from None
    if not isinstance(result, (types.Float, types.Integer, types.Boolean)):
        raise TypeError(f"it returns {result} and no number")
    compiled = compile_part(direction)

    def of_all(a, w, low, high):
        return np.float32(compiled(a, w, low, high))

    def of_two(a, w, low, high):
        return np.float32(compiled(a, w))

    return compile_part(of_all if bounded else of_two)
