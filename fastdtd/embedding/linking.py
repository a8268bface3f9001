"""An object file in a static library, written here, and in a shared one, by whatever linker there is."""

from __future__ import annotations

import importlib.util
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from fastdtd.embedding.targets import Target, process_triple

_SUFFIXES = {"elf": ".so", "macho": ".dylib", "coff": ".dll", "wasm": ".wasm"}
_LLD = {"elf": "ld.lld", "coff": "lld-link", "wasm": "wasm-ld", "macho": "ld64.lld"}


def archive(content: bytes, member: str, symbols: Sequence[str], target: Target) -> bytes:
    """A static library of one object, with its index: System V's format, or BSD's for Mach-O."""
    if target.format == "macho":
        names = b"".join(symbol.encode() + b"\0" for symbol in (f"_{symbol}" for symbol in symbols))
        names += bytes(-len(names) % 8)
        begins, at = [], 0
        for symbol in symbols:
            begins.append(at)
            at += len(symbol) + 2
        index_bytes = 8 + 8 * len(symbols) + len(names)
        place = 8 + 60 + index_bytes
        index = struct.pack("<I", 8 * len(symbols)) + b"".join(
            struct.pack("<II", begin, place) for begin in begins) + struct.pack("<I", len(names)) + names
        own = _padded(member.encode() + b"\0", 8)
        return b"!<arch>\n" + _member("__.SYMDEF", index) + _member(f"#1/{len(own)}", own + content)
    names = b"".join(symbol.encode() + b"\0" for symbol in symbols)
    index_bytes = 4 + 4 * len(symbols) + len(names)
    long_name = f"{member}/\n".encode() if len(member) > 15 else b""
    place = 8 + 60 + index_bytes + index_bytes % 2 + (60 + len(long_name) + len(long_name) % 2 if long_name else 0)
    index = struct.pack(f">{1 + len(symbols)}I", len(symbols), *[place] * len(symbols)) + names
    parts = [b"!<arch>\n", _member("/", index)]
    if long_name:
        parts.append(_member("//", long_name))
    return b"".join([*parts, _member("/0" if long_name else f"{member}/", content)])


def _member(name: str, content: bytes) -> bytes:
    """Without date, owner or machine: the same library has the same bytes."""
    return f"{name:<16}{0:<12}{0:<6}{0:<6}{'644':<8}{len(content):<10}`\n".encode() + _padded(content, 2, b"\n")


def _padded(content: bytes, multiple: int, by: bytes = b"\0") -> bytes:
    return content + by * (-len(content) % multiple)


def shared_name(name: str, target: Target) -> str:
    prefix = "" if target.format in ("wasm", "coff") else "lib"
    return f"{prefix}{name}{_SUFFIXES[target.format]}"


def link(source: Path, to: Path, name: str, symbols: Sequence[str], target: Target) -> str | None:
    """Link a shared library (for WebAssembly: a module). Returns None, or why there is none."""
    tried = []
    for linker in _linkers(target):
        done = subprocess.run([*linker, *_arguments(source, to, name, symbols, target)], capture_output=True, text=True,
                              check=False)
        if done.returncode == 0 and to.exists():
            return None
        tried.append(f"{' '.join(linker)}: {(done.stderr or done.stdout).strip()[:300]}")
    if tried:
        return f"no linker made it ({'; '.join(tried)})"
    return (f"there is no linker for {target.triple}; one comes with pip install \"fastdtd[embed]\", with LLVM "
            f"({_LLD[target.format]}) or with a C compiler for that target")


def _linkers(target: Target) -> Iterator[list[str]]:
    is_own = target.architecture == process_triple().split("-")[0] and target.format != "wasm"
    if target.format == "macho":
        if sys.platform == "darwin" and shutil.which("cc"):
            yield ["cc"]
        return
    names = ["ld"] if is_own and target.format == "elf" and sys.platform == "linux" else []
    names += [_LLD[target.format], *(f"{_LLD[target.format]}-{version}" for version in range(22, 13, -1))]
    if target.format == "elf":
        names.append(f"{target.architecture}-linux-gnu-ld")
    for name in names:
        if shutil.which(name):
            yield [name]
    if importlib.util.find_spec("ziglang"):
        yield [sys.executable, "-m", "ziglang", _LLD[target.format]]


def _arguments(source: Path, to: Path, name: str, symbols: Sequence[str], target: Target) -> list[str]:
    match target.format:
        case "wasm":
            exports = [f"--export={symbol}" for symbol in (*symbols, "__heap_base")]
            return ["--no-entry", "--strip-debug", *exports, "-o", str(to), str(source)]
        case "macho":
            return ["-dynamiclib", "-nostdlib", "-Wl,-undefined,error", "-o", str(to), str(source)]
        case "coff":
            exports = [f"/export:{symbol}" for symbol in symbols]
            return ["/dll", "/noentry", "/nodefaultlib", *exports, f"/out:{to}", str(source)]
    return ["-shared", "-z", "noexecstack", "-z", "relro", "--no-undefined", "-soname", shared_name(name, target), "-o",
            str(to), str(source)]
