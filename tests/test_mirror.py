"""Devices are packages of the same files, names and parameters, but for what only one of them can mean."""

import ast
import inspect
from pathlib import Path

import fastdtd.kernels
import pytest
from fastdtd.kernels import cpu, cuda

KERNELS = Path(fastdtd.kernels.__file__).parent
# How a processor cuts its work into blocks that stay in its caches, and threads share.
OF_PROCESSORS = {"block", "results", "sums", "shares", "planes", "places", "offsets", "bounds", "block_rows", "block_columns", "more_rows",
                 "more_columns"}
# Where a thread of a GPU finds what it reads, which a processor's blocks say otherwise.
OF_GPUS = {"taps", "precision", "panel_rows", "kernel_down", "kernel_right", "stride_down", "stride_right", "top", "left"}
# Vector instructions; on tensor cores a direct product is fast, and Winograd's transforms would lose digits of TF32's eleven bits.
FILES_OF_PROCESSORS = {"planes", "rows", "winograd"}
NAMES_OF_PROCESSORS = {"CONV2D_COLUMNS", "conv2d_block_shape", "conv2d_pack_split", "conv2d_redistribute_results_elements",
                       "conv2d_results_elements", "conv2d_split_bounds", "conv2d_split_shape", "steps_compiled"}
NAMES_OF_GPUS = {"conv2d_panel_rows", "conv2d_taps"}


def kernels_of(device):
    """Name -> parameters of all that are kernels or launchers, with the two that direction_kernels makes."""
    found = {name: getattr(device, name) for name in device.__all__}
    found |= {kernel.__name__: kernel for kernel in device.direction_kernels(lambda a, w: a * w, False)}
    found = {name: list(inspect.signature(getattr(value, "py_func", value)).parameters) for name, value in found.items()
             if callable(value) and name != "steps_compiled"}
    return {name: parameters for name, parameters in found.items() if not name.startswith("winograd")}


def test_same_files():
    of_cpu, of_cuda = ({path.stem for path in (KERNELS / device).glob("*.py")} for device in ("cpu", "cuda"))
    assert of_cuda == of_cpu - FILES_OF_PROCESSORS


def test_same_names():
    of_cpu, of_cuda = ({name for name in device.__all__ if not name.startswith("winograd")} for device in (cpu, cuda))
    assert of_cpu - NAMES_OF_PROCESSORS == of_cuda - NAMES_OF_GPUS
    assert of_cpu >= NAMES_OF_PROCESSORS
    assert of_cuda >= NAMES_OF_GPUS


def test_public_functions_are_in_the_same_files():
    for name in set(cpu.__all__) & set(cuda.__all__):
        modules = {getattr(cpu, name).__module__, getattr(cuda, name).__module__} if callable(getattr(cpu, name)) else {""}
        assert len({module.rpartition(".")[2] for module in modules}) == 1, name


@pytest.mark.parametrize("name", sorted(kernels_of(cuda).keys() & kernels_of(cpu).keys()))
def test_same_parameters(name):
    of_cpu, of_cuda = kernels_of(cpu)[name], kernels_of(cuda)[name]
    common = set(of_cpu) & set(of_cuda)
    assert [p for p in of_cpu if p in common] == [p for p in of_cuda if p in common], "the same order"
    assert set(of_cpu) - common <= OF_PROCESSORS
    assert set(of_cuda) - common <= OF_GPUS


def test_what_one_device_alone_has_is_used():
    """Nothing in the lists above is a leftover."""
    differ = [(set(kernels_of(cpu)[name]) ^ set(kernels_of(cuda)[name])) for name in kernels_of(cpu).keys() & kernels_of(cuda).keys()]
    assert set().union(*differ) == OF_PROCESSORS | OF_GPUS


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_kernels_import_nothing_of_fastdtd_but_kernels(device):
    for path in (KERNELS / device).glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module.startswith("fastdtd"):
                assert node.module.startswith(("fastdtd.kernels.codes", "fastdtd.kernels.scalar", f"fastdtd.kernels.{device}")), path
