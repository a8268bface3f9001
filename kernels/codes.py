"""The integers that cross from rules to kernels, the same on every device.

A rule's features u >= 0 of an activation a (docs/method.md has the table):
"""

NONNEGATIVE = 0  # u = a, for a >= 0
SIGNED = 1  # u = [max(a, 0), max(-a, 0)]
BOX = 2  # u = [a - low, high - a]
ONES = 3  # u = 1

# Weights V >= 0 of a rule with one number for each weight W, where a kernel makes them itself (dense):

POSITIVE = 0  # max(W, 0), and max(-W, 0) for the second feature
SQUARED = 1  # W^2
FLAT = 2  # 1
