"""Layout -> object file: kernels' IR and tables in one module, with the functions that a C program calls.

Nothing is left for a linker to find: no run-time library of C, Numba or LLVM.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import llvmlite.binding as llvm
import numpy as np
import numpy.typing as npt
from numba import types

from fastdtd.embedding.layout import ALIGNMENT, Layout
from fastdtd.embedding.packing import Compact
from fastdtd.embedding.targets import Target
from fastdtd.errors import InputError
from fastdtd.kernels.cpu import program
from fastdtd.kernels.cpu.jit import ir_of
from fastdtd.kernels.cpu.steps import step_ir

# Beside what only Python calls, which is dropped, kernels would call these where user code in a search direction does.
_LIBRARY_CALLS = re.compile(r"llvm\.(pow|powi|exp|exp2|exp10|log|log2|log10|sin|cos|tan|sinh|cosh|tanh|fma)\b")
_MAX_TEXT = 1 << 28  # bytes of weights that are written into a module as text
_SMALL = 64  # bytes that every target sets or copies without a call

# The one function of a library of mathematics that kernels call, which is an instruction.
_ROOTS = """
declare float @llvm.sqrt.f32(float)
declare double @llvm.sqrt.f64(double)
define float @sqrtf(float %x) {
  %root = call float @llvm.sqrt.f32(float %x)
  ret float %root
}
define double @sqrt(double %x) {
  %root = call double @llvm.sqrt.f64(double %x)
  ret double %root
}
"""

# In place of the C library's. "no-builtins": else their loops would become calls of what they stand for.
_MEMORY = """
define internal void @fastdtd.set(ptr %to, i8 %byte, i64 %count, i1 %v) noinline nounwind "no-builtins" {
entry:
  %one = insertelement <16 x i8> poison, i8 %byte, i64 0
  %many = shufflevector <16 x i8> %one, <16 x i8> poison, <16 x i32> zeroinitializer
  %whole = and i64 %count, -16
  br label %vectors
vectors:
  %i = phi i64 [ 0, %entry ], [ %i.next, %vector ]
  %more = icmp ult i64 %i, %whole
  br i1 %more, label %vector, label %bytes
vector:
  %at = getelementptr i8, ptr %to, i64 %i
  store <16 x i8> %many, ptr %at, align 1
  %i.next = add i64 %i, 16
  br label %vectors
bytes:
  %j = phi i64 [ %whole, %vectors ], [ %j.next, %byte.body ]
  %left = icmp ult i64 %j, %count
  br i1 %left, label %byte.body, label %done
byte.body:
  %there = getelementptr i8, ptr %to, i64 %j
  store i8 %byte, ptr %there
  %j.next = add i64 %j, 1
  br label %bytes
done:
  ret void
}
define internal void @fastdtd.copy(ptr %to, ptr %from, i64 %count, i1 %v) noinline nounwind "no-builtins" {
entry:
  %to.at = ptrtoint ptr %to to i64
  %from.at = ptrtoint ptr %from to i64
  %distance = sub i64 %to.at, %from.at
  %is.before = icmp ult i64 %distance, %count
  %whole = and i64 %count, -16
  br i1 %is.before, label %back, label %vectors
vectors:
  %i = phi i64 [ 0, %entry ], [ %i.next, %vector ]
  %more = icmp ult i64 %i, %whole
  br i1 %more, label %vector, label %bytes
vector:
  %source = getelementptr i8, ptr %from, i64 %i
  %at = getelementptr i8, ptr %to, i64 %i
  %many = load <16 x i8>, ptr %source, align 1
  store <16 x i8> %many, ptr %at, align 1
  %i.next = add i64 %i, 16
  br label %vectors
bytes:
  %j = phi i64 [ %whole, %vectors ], [ %j.next, %byte.body ]
  %left = icmp ult i64 %j, %count
  br i1 %left, label %byte.body, label %done
byte.body:
  %here = getelementptr i8, ptr %from, i64 %j
  %there = getelementptr i8, ptr %to, i64 %j
  %byte = load i8, ptr %here
  store i8 %byte, ptr %there
  %j.next = add i64 %j, 1
  br label %bytes
back:
  %k = phi i64 [ %count, %entry ], [ %k.next, %back.body ]
  %some = icmp ugt i64 %k, 0
  br i1 %some, label %back.body, label %done
back.body:
  %k.next = sub i64 %k, 1
  %last = getelementptr i8, ptr %from, i64 %k.next
  %place = getelementptr i8, ptr %to, i64 %k.next
  %moved = load i8, ptr %last
  store i8 %moved, ptr %place
  br label %back
done:
  ret void
}
"""
_SET = re.compile(r"@llvm\.memset\.p0\.i64\((ptr [^,]*, i8 [^,]*), i64 ([^,]*), i1 \w+\)")
_COPY = re.compile(r"@llvm\.mem(?:cpy|move)\.p0\.p0\.i64\((ptr [^,]*, ptr [^,]*), i64 ([^,]*), i1 \w+\)")

_TABLES = ("facts", "steps", "slots", "regions", "call", "numbers")  # that both passes take


def emit(layout: Layout, compact: Compact | None, facts: Sequence[int], numbers: npt.NDArray[np.float32],
         classes: Sequence[str], name: str, target: Target, weights: Path | None, layers: dict[int, str]) -> bytes:
    """An object file.

    Parameters
    ----------
    layout : Layout
    compact : Compact or None
        What weights are unpacked from.
    facts : sequence of int
        By the names of fastdtd.kernels.cpu.program.
    numbers : (F,) float32
    classes : sequence of str
    name : str
        What the functions' names begin with.
    target : Target
    weights : path or None
        A file whose content becomes part of the object.
    layers : dict of int to str
        By a call's number, who makes it: for messages.

    Raises
    ------
    InputError
        A layer whose kernels call a library.
    """
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    is_wasm = target.format == "wasm"
    machine = llvm.Target.from_triple(target.triple).create_target_machine(
        cpu=target.cpu, features=target.features, opt=3, reloc="static" if is_wasm else "pic",
        codemodel="default" if is_wasm else "small")
    data_layout = str(machine.target_data)
    data = _tables(layout, compact, facts, numbers, classes)
    whole = _parsed(data + _weights(target, weights) + _ROOTS, target, data_layout)
    callers: dict[str, set[str]] = {}
    packers = compact.calls if compact else []
    for number, (kernel, kinds) in enumerate([*layout.calls, *packers]):
        bitcode, native = step_ir(kernel, kinds, has_units=number < len(layout.calls))
        module = _linked(bitcode, _STEP.format(number=number, native=native), {f"fastdtd.step{number}"})
        for function in module.functions:
            if function.is_declaration:
                callers.setdefault(function.name, set()).add(layers.get(number, ""))
        _link(whole, module, target, data_layout)
    functions = [function for function in _FUNCTIONS if compact or function not in COMPACT_EXPORTS]
    for function in functions:
        tables, given = _FUNCTIONS[function]
        count = len(tables) + len(given)
        bitcode, native = ir_of(getattr(program, function).get_compile_result(types.int64(*[types.intp] * count)))
        _link(whole, _linked(bitcode, _glue(function, native, count), {f"fastdtd.{function}"}), target, data_layout)
    interface = _exports(name, data_layout, weights is not None, len(classes), functions)
    whole.link_in(_parsed(_dispatch(len(layout.calls) + len(packers)) + interface, target, data_layout))
    _internalise(whole, {f"{name}_{export}" for export in (*EXPORTS, *COMPACT_EXPORTS)})
    passes = llvm.create_pass_builder(machine, llvm.create_pipeline_tuning_options(speed_level=3))
    passes.getModulePassManager().run(whole, passes)  # drops what nothing reaches: what only Python calls
    whole = _without_library_calls(whole)
    for function in whole.functions:
        if function.is_declaration and (not function.name.startswith("llvm.")
                                        or _LIBRARY_CALLS.match(function.name)):
            raise InputError(
                f"layer {', '.join(sorted(callers.get(function.name, {'of unknown name'})))} calls {function.name}, "
                "which an embedded library does not have; required: rules of arithmetic and square roots alone")
    return bytes(machine.emit_object(whole))


# ---- Modules ---------------------------------------------------------------------------------------------------------

# Numba's own convention: where to put the result, where to put an exception, arguments; status 0 is success.
_STEP = """
declare i32 @"{native}"(ptr, ptr, i64, i64, i64)
define void @fastdtd.step{number}(i64 %slots, i64 %first, i64 %last) {{
  %result = alloca ptr
  %exception = alloca ptr
  store ptr null, ptr %exception
  call i32 @"{native}"(ptr %result, ptr %exception, i64 %slots, i64 %first, i64 %last)
  ret void
}}"""
# Of program.py, by name: the tables that it takes first, then what C gives it.
_FUNCTIONS: dict[str, tuple[tuple[str, ...], dict[str, str]]] = {
    "check_weights": (("facts",), {"weights": "ptr", "bytes": "size"}),
    "check_workspace": (("facts",), {"workspace": "ptr", "bytes": "size"}),
    "predict": (_TABLES, {"weights": "ptr", "input": "ptr", "output": "ptr", "workspace": "ptr"}),
    "explain": (_TABLES, {"weights": "ptr", "input": "ptr", "target": "i32", "output": "ptr", "relevance": "ptr",
                          "absorbed": "ptr", "workspace": "ptr"}),
    "preprocess_rgb": (("facts", "numbers"), {"pixels": "ptr", "height": "i32", "width": "i32", "row_bytes": "i32",
                                              "input": "ptr"}),
    "unpack": (("facts", "operations", "pack_slots", "pack_regions", "call"),
               {"compact": "ptr", "bytes": "size", "weights": "ptr", "workspace": "ptr"}),
}
COMPACT_EXPORTS = ("compact_bytes", "unpack")


def _glue(function: str, native: str, arguments: int) -> str:
    kinds = ", ".join(["i64"] * arguments)
    given = ", ".join(f"i64 %a{i}" for i in range(arguments))
    return f"""
declare i32 @"{native}"(ptr, ptr, {kinds})
define i32 @fastdtd.{function}({given}) {{
  %result = alloca i64
  %exception = alloca ptr
  store i64 0, ptr %result
  store ptr null, ptr %exception
  call i32 @"{native}"(ptr %result, ptr %exception, {given})
  %wide = load i64, ptr %result
  %code = trunc i64 %wide to i32
  ret i32 %code
}}"""


def _linked(bitcode: bytes, glue: str, exported: set[str]) -> Any:
    module = llvm.parse_bitcode(bitcode)
    module.link_in(llvm.parse_assembly(glue))
    _internalise(module, exported)  # modules bring functions of the same names
    return module


def _link(whole: Any, module: Any, target: Target, data_layout: str) -> None:
    module.triple, module.data_layout = target.triple, data_layout  # is enough: no function names a processor
    whole.link_in(module)


def _parsed(text: str, target: Target, data_layout: str) -> Any:
    module = llvm.parse_assembly(text)
    module.triple, module.data_layout = target.triple, data_layout
    return module


def _internalise(module: Any, exported: set[str]) -> None:
    for symbol in [*module.functions, *module.global_variables]:
        if not symbol.is_declaration and symbol.name not in exported:
            symbol.linkage = "internal"


def _without_library_calls(module: Any) -> Any:
    """LLVM's own way to set and copy memory ends in calls of the C library's functions, unless it is little."""
    def by(ours: str) -> Callable[[re.Match[str]], str]:
        def replaced(match: re.Match[str]) -> str:
            count = match[2].strip()
            is_small = count.isdigit() and int(count) <= _SMALL
            return match[0] if is_small else f"{ours}({match[1]}, i64 {count}, i1 false)"

        return replaced

    text = str(module)
    text = "\n".join(line if line.startswith("declare") else
                     _COPY.sub(by("@fastdtd.copy"), _SET.sub(by("@fastdtd.set"), line)) for line in text.split("\n"))
    changed = llvm.parse_assembly(text + _MEMORY)
    changed.verify()
    return changed


# ---- Data ------------------------------------------------------------------------------------------------------------


def _tables(layout: Layout, compact: Compact | None, facts: Sequence[int], numbers: npt.NDArray[np.float32],
            classes: Sequence[str]) -> str:
    last = np.array([[0, len(layout.slots), 0, 0, 0]], np.int64)
    texts = [text.encode() + b"\0" for text in classes] + [
        text.encode() + b"\0" for text in program.MESSAGES.values()]
    begins = np.cumsum([0, *map(len, texts)])[:-1]
    of_packing = [] if compact is None else [
        _integers("operations", compact.operations.ravel()), _integers("pack_slots", compact.slots),
        _integers("pack_regions", compact.regions)
    ]
    return "\n".join([
        *of_packing, _integers("facts", np.array(facts, np.int64)),
        _integers("steps", np.concatenate([layout.steps, last]).ravel()),
        _integers("slots", layout.slots), _integers("regions", layout.regions),
        _integers("numbers", numbers.view(np.int32)),  # as bits: exact
        _integers("texts", np.array(begins, np.int64)), _bytes("characters", b"".join(texts)), ""
    ])


def _integers(name: str, values: npt.NDArray[Any]) -> str:
    kind = f"i{8 * values.itemsize}"
    content = ", ".join(f"{kind} {value}" for value in values.tolist())
    return f"@fastdtd.{name} = constant [{len(values)} x {kind}] [{content}], align {ALIGNMENT}"


_ESCAPED = [f"\\{byte:02X}" if byte in b'"\\' or not 32 <= byte < 127 else chr(byte) for byte in range(256)]


def _bytes(name: str, content: bytes) -> str:
    return (f"@fastdtd.{name} = constant [{len(content)} x i8] c\"{''.join(map(_ESCAPED.__getitem__, content))}\", "
            f"align {ALIGNMENT}")


def _weights(target: Target, path: Path | None) -> str:
    """The content of a file, for this processor's assembler taken in as it is."""
    if path is None:
        return ""
    if target.format == "elf" and target.architecture == llvm.get_process_triple().split("-")[0]:
        llvm.initialize_native_asmparser()
        lines = ['.section .rodata.fastdtd.weights,\\22a\\22,@progbits', f".p2align {ALIGNMENT.bit_length() - 1}",
                 "fastdtd.weights:", f".incbin \\22{path}\\22", ".text"]
        return "".join(f'module asm "{line}"\n' for line in lines) + (
            f"@fastdtd.weights = external hidden constant [{path.stat().st_size} x i8], align {ALIGNMENT}\n")
    if path.stat().st_size > _MAX_TEXT:
        raise InputError(
            f"the weights take {path.stat().st_size / 2**20:.0f} MiB, and for {target.name} at most "
            f"{_MAX_TEXT >> 20} are put into an object; required: weights in a file of their own (--weights file)")
    return _bytes("weights", path.read_bytes()) + "\n"


# ---- What C calls ----------------------------------------------------------------------------------------------------

EXPORTS = ("abi_version", "workspace_bytes", "weights_bytes", "input_shape", "classes", "class_name", "error",
           *(function for function in _FUNCTIONS if function not in COMPACT_EXPORTS))

_TEXT_OF = """
define ptr @{name}_{function}(i32 %index) {{
  %number = {number}
  %known = icmp ult i32 %number, {count}
  br i1 %known, label %found, label %unknown
found:
  %wide = zext i32 %number to i64
  %entry = add i64 %wide, {first}
  %at = getelementptr i64, ptr @fastdtd.texts, i64 %entry
  %begin = load i64, ptr %at
  %text = getelementptr i8, ptr @fastdtd.characters, i64 %begin
  ret ptr %text
unknown:
  ret ptr {otherwise}
}}"""


def _dispatch(count: int) -> str:
    """One function that makes a call, by its number."""
    cases = " ".join(f"i64 {i}, label %case{i}" for i in range(count))
    blocks = "\n".join(
        f"case{i}:\n  call void @fastdtd.step{i}(i64 %slots, i64 %first, i64 %last)\n  ret void" for i in range(count))
    declared = "\n".join(f"declare void @fastdtd.step{i}(i64, i64, i64)" for i in range(count))
    return f"""{declared}
define void @fastdtd.call(i64 %number, i64 %slots, i64 %first, i64 %last) {{
  switch i64 %number, label %none [ {cases} ]
none:
  unreachable
{blocks}
}}
"""


def _exports(name: str, data_layout: str, has_weights: bool, classes: int, functions: Sequence[str]) -> str:
    size = "i32" if "p:32:32" in data_layout else "i64"
    data = ["facts", "steps", "slots", "regions", "numbers", "texts", "characters", *["weights"] * has_weights]
    if is_compact := "unpack" in functions:
        data += ["operations", "pack_slots", "pack_regions"]
    unknown = '@fastdtd.no_code = internal constant [13 x i8] c"no such code\\00"\n'
    return unknown + "\n".join([
        *(f"@fastdtd.{table} = external constant i8" for table in data),
        f"define i32 @{name}_abi_version() {{\n  ret i32 {program.ABI_VERSION}\n}}",
        _fact(f"{name}_workspace_bytes", size, program.WORKSPACE_BYTES),
        f"define {size} @{name}_weights_bytes() {{\n  ret {size} 0\n}}" if has_weights else _fact(
            f"{name}_weights_bytes", size, program.HEADER + 2),
        _fact(f"{name}_classes", "i32", program.OUTPUTS), _shape(f"{name}_input_shape"),
        _TEXT_OF.format(name=name, function="class_name", number="add i32 %index, 0", count=classes, first=0,
                        otherwise="null"),
        _TEXT_OF.format(name=name, function="error", number="sub i32 0, %index", count=len(program.MESSAGES),
                        first=classes, otherwise="@fastdtd.no_code"),
        *[_fact(f"{name}_compact_bytes", size, program.COMPACT_BYTES)] * is_compact,
        *(_call(name, function, size, has_weights) for function in functions), ""
    ])


def _call(name: str, function: str, size: str, has_weights: bool) -> str:
    """What C calls: addresses and whole numbers become integers of 64 bits, tables come first."""
    tables, given = _FUNCTIONS[function]
    kinds = {argument: size if kind == "size" else kind for argument, kind in given.items()}
    lines = []
    for argument, kind in kinds.items():
        value = f"ptr {'@fastdtd.weights' if argument == 'weights' and has_weights else f'%{argument}'}"
        match kind:
            case "ptr":
                lines.append(f"  %{argument}.wide = ptrtoint {value} to i64")
            case "i64":
                lines.append(f"  %{argument}.wide = add i64 %{argument}, 0")
            case _:
                extend = "zext" if given[argument] == "size" else "sext"
                lines.append(f"  %{argument}.wide = {extend} {kind} %{argument} to i64")
    arguments = ", ".join([f"i64 ptrtoint (ptr @fastdtd.{table} to i64)" for table in tables]
                          + [f"i64 %{argument}.wide" for argument in given])
    parameters = ", ".join(f"{kind} %{argument}" for argument, kind in kinds.items())
    return "\n".join([
        f"declare i32 @fastdtd.{function}({', '.join(['i64'] * (len(tables) + len(given)))})",
        f"define i32 @{name}_{function}({parameters}) {{", *lines,
        f"  %code = call i32 @fastdtd.{function}({arguments})", "  ret i32 %code", "}"
    ])


def _fact(function: str, kind: str, index: int) -> str:
    return "\n".join([
        f"define {kind} @{function}() {{", f"  %at = getelementptr i64, ptr @fastdtd.facts, i64 {index}",
        f"  %value = load {kind}, ptr %at", f"  ret {kind} %value", "}"  # little-endian: its low half comes first
    ])


def _shape(function: str) -> str:
    lines = [f"define void @{function}(ptr %shape) {{"]
    for axis, index in enumerate((program.CHANNELS, program.HEIGHT, program.WIDTH)):
        lines += [f"  %from{axis} = getelementptr i64, ptr @fastdtd.facts, i64 {index}",
                  f"  %value{axis} = load i32, ptr %from{axis}",
                  f"  %to{axis} = getelementptr i32, ptr %shape, i64 {axis}",
                  f"  store i32 %value{axis}, ptr %to{axis}"]
    return "\n".join([*lines, "  ret void", "}"])
