"""Devices are packages of the same files, names and parameters, but for what only one of them can mean."""

import ast
import inspect
import typing
from pathlib import Path

import fastdtd.kernels
import numpy as np
import pytest
from fastdtd.kernels import cpu, cuda, signatures

from fastdtd.protocols import BlockedDevice, Device, ImplicitDevice, Kernel

KERNELS = Path(fastdtd.kernels.__file__).parent
# How a processor cuts its work into blocks that stay in its caches, and threads divide.
OF_PROCESSORS = {"block", "columns", "lines", "results", "sums", "contributions", "planes", "positions", "offsets",
                 "bounds", "block_rows", "block_columns", "halo_rows", "halo_columns", "splits", "joined", "density",
                 "sparse_below", "shared"}
# Where a thread of a GPU finds what it reads, which a processor's blocks say otherwise.
OF_GPUS = {"precision", "panel_rows", "kernel_h", "kernel_w", "stride_h", "stride_w", "pad_top", "pad_left"}
# Vector instructions, and libraries for C; what short rows cost a processor, they do not cost a GPU; on tensor cores a
# direct product is fast, and Winograd's transforms would lose digits of TF32's eleven bits.
FILES_OF_PROCESSORS = {"arrays", "depthwise", "planes", "program", "rows", "sparse", "winograd"}
KERNELS_OF_PROCESSORS = ("density", "depthwise2d", "sparse2d", "sum_absorbed", "winograd2d")
KINDS = {cpu: BlockedDevice, cuda: ImplicitDevice}


def members(protocol):
    """What a protocol asks for: names of attributes, functions and kernels."""
    return {name for kind in protocol.__mro__ if kind.__module__ == "fastdtd.protocols"
            for name in (*vars(kind), *vars(kind).get("__annotations__", ())) if not name.startswith("_")}


def taken(function):
    return list(inspect.signature(getattr(function, "py_func", function)).parameters)


def kernels_of(device):
    """Name -> parameters, but for the units, of all kernels, with the two that direction_kernels makes."""
    found = {name: getattr(device, name) for name in device.__all__ if name.endswith(("_forward", "_redistribute"))}
    found |= {signatures.name_of(kernel): kernel for kernel in device.direction_kernels(lambda a, w: a * w, False)}
    return {name: list(signatures.parameters(kernel)) for name, kernel in found.items()}


def test_same_files():
    of_cpu, of_cuda = ({path.stem for path in (KERNELS / device).glob("*.py")} for device in ("cpu", "cuda"))
    assert of_cuda == of_cpu - FILES_OF_PROCESSORS


@pytest.mark.parametrize("device", KINDS)
def test_devices_offer_what_their_protocol_says(device):
    assert set(device.__all__) == members(KINDS[device])
    assert device.CONVOLUTION in typing.get_args(typing.get_type_hints(KINDS[device])["CONVOLUTION"])
    assert device.POOLING in typing.get_args(typing.get_type_hints(Device)["POOLING"])
    for name, wanted in typing.get_type_hints(KINDS[device]).items():
        if wanted in (bool, int, int | None, np.float32):
            assert isinstance(getattr(device, name), wanted), name
        elif wanted is Kernel:
            assert callable(getattr(device, name)), name


@pytest.mark.parametrize("device", KINDS)
def test_functions_have_the_parameters_of_their_protocol(device):
    for name in members(KINDS[device]):
        if inspect.isfunction(asked := getattr(KINDS[device], name, None)):
            assert ["self", *taken(getattr(device, name))] == taken(asked), name


def test_public_functions_are_in_the_same_files():
    for name in set(cpu.__all__) & set(cuda.__all__):
        modules = {getattr(cpu, name).__module__,
                   getattr(cuda, name).__module__} if callable(getattr(cpu, name)) else {""}
        assert len({module.rpartition(".")[2] for module in modules}) == 1, name


@pytest.mark.parametrize("name", signatures.SIGNATURES)
def test_parameters_of_kernels(name):
    """Those of the signature that mean something on the device, in its order; and each of them on one device at
    least."""
    devices = [kernels_of(device) for device in ([cpu] if name.startswith(KERNELS_OF_PROCESSORS) else KINDS)]
    for parameters in (device[name] for device in devices):
        assert parameters == [p for p in signatures.SIGNATURES[name] if p in parameters]
    assert set().union(*(device[name] for device in devices)) == set(signatures.SIGNATURES[name])
    if len(devices) == 2:
        of_cpu, of_cuda = (set(device[name]) for device in devices)
        assert of_cpu - of_cuda <= OF_PROCESSORS
        assert of_cuda - of_cpu <= OF_GPUS


@pytest.mark.parametrize("device", KINDS)
def test_every_kernel_has_a_signature(device):
    kinds = {name for name in signatures.SIGNATURES if not name.startswith(KERNELS_OF_PROCESSORS) or device is cpu}
    assert kernels_of(device).keys() == kinds


def test_what_one_device_alone_has_is_used():
    """Nothing in the lists above is a leftover."""
    differ = [(set(kernels_of(cpu)[name]) ^ set(kernels_of(cuda)[name])) for name in kernels_of(cpu).keys() &
              kernels_of(cuda).keys()]
    assert set().union(*differ) == OF_PROCESSORS | OF_GPUS


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_kernels_import_nothing_of_fastdtd_but_kernels(device):
    for path in (KERNELS / device).glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module.startswith("fastdtd"):
                assert node.module.startswith(("fastdtd.kernels.codes", "fastdtd.kernels.scalar",
                                               f"fastdtd.kernels.{device}")), path
