"""The formulas of kernels/scalar.py, compiled for processors."""

from fastdtd.kernels.cpu.jit import part
from fastdtd.kernels.scalar import compiled_for

globals().update(compiled_for(part))
