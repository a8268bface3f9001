"""The integers that cross from rules to kernels, the same on every device.

A rule's features u of an activation a (docs/method.md has the table):
"""

NONNEGATIVE = 0  # u = a, for a >= 0
SIGNED = 1  # u = [max(a, 0), max(-a, 0)]
BOX = 2  # u = [a - low, high - a]
ONES = 3  # u = 1
VALUE = 4  # u = a, of either sign
NEGATED = 5  # u = max(-a, 0), where all weights are positive

# Weights V of a rule with one value for each weight W, where a kernel makes them itself (dense):

POSITIVE = 0  # max(W, 0), and max(-W, 0) for the second feature
NEGATIVE = 1  # max(-W, 0), and max(W, 0) for the second feature
AS_IS = 2  # W
SQUARED = 3  # W^2
FLAT = 4  # 1

# How ratios follow from a layer's sums (kernels/scalar.py), where it is not one ratio |x| / z:

SIGNS = 0  # z+ for a layer whose negative outputs have relevance: these are redistributed to the negative contributions
EPSILON = 1
ALPHA_BETA = 2
GAMMA = 3
GRADIENT = 4
DIRECTION = 5

# What the bias is in these sums:

IGNORED = 0
ABSORBED = 1
SHARED = 2

# Of local response normalisation:

NORM_IDENTITY = 10
NORM_TAYLOR = 11
NORM_GRADIENT = 12

# Functions of fastdtd.layers.Activation:

SILU = 0
HARD_SWISH = 1
GELU = 2
GELU_TANH = 3
MISH = 4
ELU = 5
TANH = 6
SIGMOID = 7
HARD_SIGMOID = 8
SOFTPLUS = 9

# How convolutions multiply on CUDA:

FP32 = 0  # float32 throughout
TF32 = 1  # factors rounded to 11 bits, on tensor cores; sums in float32
TF32X3 = 2  # each factor as two of these, three products of four: float32's accuracy on tensor cores
