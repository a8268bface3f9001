"""The formulas of kernels/scalar.py, compiled as parts of CUDA kernels."""

from fastdtd.kernels.cuda.jit import part
from fastdtd.kernels.cuda.vector_code import divide
from fastdtd.kernels.scalar import compiled_for

globals().update(compiled_for(part, divide=divide))
