"""Numba CUDA kernels and their launchers."""
