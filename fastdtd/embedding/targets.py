"""Processors that embedded libraries are made for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fastdtd.errors import InputError, shown

_LEVELS = {  # of x86-64, with what a processor has to have beyond the level before
    "x86-64-v2": ("cx16", "popcnt", "sse4.2", "ssse3"),
    "x86-64-v3": ("avx2", "bmi", "bmi2", "f16c", "fma", "lzcnt", "movbe"),
    "x86-64-v4": ("avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"),
}
_VECTORS = {"x86-64-v2": "4x16", "x86-64-v3": "8x16", "x86-64-v4": "16x32", "aarch64": "4x32", "wasm32": "4x16"}
TARGETS = tuple(_VECTORS)


@dataclass(frozen=True)
class Target:
    """What machine code is made for.

    Attributes
    ----------
    name : str
        As it was asked for.
    triple, cpu, features : str
        As LLVM takes them.
    vectors : str
        Floats in a vector and vector registers, as in "8x16", for which kernels are written.
    compiled_for : (str, str)
        Processor and features that kernels' IR is optimised for: the target's where this machine can run that, for
        weights are packed with kernels of the same sizes.
    is_tested : bool
    """

    name: str
    triple: str
    cpu: str
    features: str
    vectors: str
    compiled_for: tuple[str, str]
    is_tested: bool = True

    @property
    def architecture(self) -> str:
        return self.triple.split("-")[0]

    @property
    def format(self) -> str:
        """Of object files: "elf", "macho", "coff" or "wasm"."""
        if self.architecture.startswith("wasm"):
            return "wasm"
        if any(system in self.triple for system in ("darwin", "macos", "ios")):
            return "macho"
        return "coff" if any(system in self.triple for system in ("windows", "uefi")) else "elf"


def this_processor() -> Target:
    """What kernels are compiled for in this process: this very processor, unless NUMBA_CPU_NAME says otherwise."""
    from numba.core import config

    from fastdtd.kernels.cpu.vector_code import LANES, REGISTERS

    llvm = _llvm()
    cpu, features = config.CPU_NAME or llvm.get_host_cpu_name(), config.CPU_FEATURES
    if features is None:
        features = "" if cpu == "generic" else llvm.get_host_cpu_features().flatten()
    return Target(cpu, llvm.get_process_triple(), cpu, features, f"{LANES}x{REGISTERS}", (cpu, features))


def find_target(name: str | None) -> Target:
    """One of TARGETS, or any triple that LLVM knows, as TRIPLE, TRIPLE:CPU or TRIPLE:CPU:FEATURES.

    None: x86-64-v3 on x86-64 (v2 on processors that have no more), this processor's architecture elsewhere.

    Raises
    ------
    InputError
        An unknown target.
    """
    here = process_triple()
    own = here.split("-")[0].replace("arm64", "aarch64")
    if name is None:
        if own == "x86_64":
            name = "x86-64-v3" if _runs("x86-64-v3") else "x86-64-v2"
        else:
            name = own if own in TARGETS else here
    if name in _LEVELS:
        triple = here if own == "x86_64" else "x86_64-unknown-linux-gnu"
        features = ",".join(f"+{one}" for level, own in _LEVELS.items() if level <= name for one in own)
        runs = own == "x86_64" and _runs(name)
        return Target(name, triple, name, features, _VECTORS[name], (name, features) if runs else ("generic", ""))
    if name == "aarch64":
        triple = here if own == "aarch64" else "aarch64-unknown-linux-gnu"
        return Target(name, triple, "generic", "+neon", _VECTORS[name], ("generic", "+neon" if own == name else ""))
    if name == "wasm32":
        return Target(name, "wasm32-unknown-unknown", "generic", "+simd128,+bulk-memory", _VECTORS[name],
                      ("generic", ""))
    return _any_triple(name)


def _any_triple(name: str) -> Target:
    llvm = _llvm()
    triple, cpu, features = ([*str(name).split(":", 2), "", ""])[:3]
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    known = f"{', '.join(TARGETS)}, or a triple that LLVM knows, as in riscv64-unknown-linux-gnu:generic-rv64:+v,+d"
    try:
        if "-" not in triple:
            raise RuntimeError("no triple")
        machine = llvm.Target.from_triple(triple).create_target_machine(cpu=cpu, features=features)
        layout = str(machine.target_data)
    except RuntimeError as error:
        raise InputError(f"target {shown(name)} is unknown ({error}); required: {known}") from None
    if layout.startswith("E"):
        raise InputError(f"target {shown(name)} has the most significant byte first; weights files have the least; "
                         f"required: {known}")
    return Target(name, triple, cpu, features, "4x16", ("generic", ""), is_tested=False)


def _runs(level: str) -> bool:
    has = _llvm().get_host_cpu_features()
    return all(has.get(one) for name, own in _LEVELS.items() if name <= level for one in own)


def process_triple() -> str:
    """This process's."""
    return str(_llvm().get_process_triple())


def _llvm() -> Any:
    import llvmlite.binding as llvm

    return llvm
