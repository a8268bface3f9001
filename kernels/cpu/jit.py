"""How CPU kernels are compiled: without the GIL, kept on disk, and dividing by zero as arithmetic does, without a
Python check.

Not with parallel=True: its cached code has crashed when many processes start at once, and its threads abort when two
callers enter.
"""

import hashlib
import os
import pickle
import re
import sys
import uuid
from pathlib import Path

import llvmlite
import numba
from numba import njit
from numba.core import config

try:
    from llvmlite.binding import Linkage
    from numba.core.caching import NullCache
    from numba.core.codegen import CPUCodeLibrary
    from numba.core.compiler import CompileResult
    from numba.core.serialize import dumps
    from numba.misc.appdirs import AppDirs
except ImportError:  # a Numba that is another inside: its own cache has to do, and says nothing
    NullCache = None

_FOLDER = Path(__file__).parent
_SOURCES = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(_FOLDER.parent.rglob("*.py")))).hexdigest()
_SEAL_BYTES = hashlib.sha256().digest_size


def on_compile():
    """Called before a kernel is compiled because it is not on disk. `kernels.load` replaces it."""


def on_unkept(reason):
    """Called when a compiled kernel cannot be kept on disk, with the folders that were tried and their errors."""


# ---- On disk ---------------------------------------------------------------------------------------------------------


def _folders():
    """Where kernels are kept: in NUMBA_CACHE_DIR; else beside their sources or, failing that, in the user's cache."""
    subfolder = f"fastdtd_{hashlib.sha256(os.fsencode(_FOLDER)).hexdigest()[:16]}"
    if config.CACHE_DIR:
        return [Path(config.CACHE_DIR, subfolder)]
    return [_FOLDER / "__pycache__", Path(AppDirs("numba", appauthor=False).user_cache_dir, subfolder)]


class _KernelCache(NullCache or object):
    """One kernel's compiled code on disk: asked by Numba's dispatcher before it compiles, and told after.

    Numba's own cache is not safe here. It numbers its files, and two processes that compile at once can give one number
    to the code of two signatures; here a file is named after what it holds, so all processes write the same. It trusts
    its files, and one that was cut off is an exception in every later process (numba issue 10434); here a seal tells.
    It takes a kernel's code for current as long as the kernel's own file is unchanged; but kernels are made of parts,
    constants and tiles of other files, and new weights packed for old code overrun memory, so here all sources must be
    as they were. And it reads only where it can write, so that what was compiled into an image is compiled again by
    every user who may not write there.
    """

    def __init__(self, function):
        module = function.__module__.rpartition(".")[2]
        self._stem = re.sub("[<>]", "", f"{module}.{function.__qualname__}.{sys.implementation.cache_tag}")
        self._found_in = None

    @property
    def cache_path(self):
        return self._found_in

    def load_overload(self, sig, target_context):
        """The code for a signature, or None: then it is compiled."""
        target_context.refresh()
        name, key = self._name_and_key(sig, target_context.codegen())
        for folder in _folders():
            try:
                content = (folder / name).read_bytes()
            except OSError:
                continue
            code = content[_SEAL_BYTES:]
            if content[:_SEAL_BYTES] == _seal(key, code):
                self._found_in = str(folder)
                return CompileResult._rebuild(target_context, *pickle.loads(code))
        on_compile()
        return None

    def save_overload(self, sig, data):
        """Keep the code for a signature, in the first folder that takes it."""
        if data.library.has_dynamic_globals:  # it holds addresses of this process
            return
        name, key = self._name_and_key(sig, data.codegen)
        code = dumps(data._reduce())
        problems = []
        for folder in _folders():
            try:
                _write(folder / name, _seal(key, code) + code)
            except OSError as error:
                problems.append(f"{folder}: {error.strerror}")
            else:
                self._found_in = str(folder)
                return
        on_unkept("; ".join(problems))

    def _name_and_key(self, sig, codegen):
        """A file's name, one for each signature and processor, and all that its code depends on."""
        what_for = repr((self._stem, sig, codegen.magic_tuple(), *_other_target()))
        name = f"{self._stem}.{hashlib.sha256(what_for.encode()).hexdigest()[:16]}.nbc"
        return name, repr((numba.__version__, llvmlite.__version__, sys.version, _SOURCES, what_for))


def _seal(key, code):
    return hashlib.sha256(key.encode() + code).digest()


def _write(path, content):
    """The whole file or none: other processes read and write it at the same time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


# ---- For other programs ----------------------------------------------------------------------------------------------

_keeps_ir = False


def _other_target():
    """What else the code depends on where it is made for another program."""
    return [os.environ.get("FASTDTD_VECTORS"), "IR"] if _keeps_ir else []


def keep_ir():
    """From now on keep kernels' optimised IR as it is before machine code is made of it, which takes masked loads and
    atomics apart for this processor. `ir_of` gives it; on disk it is kept beside the machine code."""
    global _keeps_ir  # noqa: PLW0603
    _keeps_ir = True
    original = CPUCodeLibrary._finalize_final_module

    def finalize(library):
        if library._shared_module is None:  # else it comes from disk
            library._shared_module = library._final_module.clone()
            for function in library._shared_module.functions:
                if not function.is_declaration and function.linkage == Linkage.external:
                    function.linkage = "linkonce_odr"  # as Numba does before it links a library into another
        original(library)

    CPUCodeLibrary._finalize_final_module = finalize


def ir_of(result):
    """(bitcode, name) of the native function of what Numba compiled."""
    return result.library._shared_module.as_bitcode(), result.fndesc.llvm_func_name


# ---- The decorator ---------------------------------------------------------------------------------------------------


def kernel(function, name="", keep=True, **options):
    """The kernel of a Python function, by another name in the cache if one is given; kept on disk if `keep`."""
    options = {"nogil": True, "error_model": "numpy", **options}
    if not keep:
        return njit(**options)(function)
    if name:
        function.__name__ = function.__qualname__ = name
    if NullCache is None:
        return njit(cache=True, **options)(function)
    # functions that one function makes are told apart by name, here and among symbols of cached code
    if function.__closure__ and not name:
        constants = dumps([cell.cell_contents for cell in function.__closure__])
        function.__qualname__ += f"-{hashlib.sha256(constants).hexdigest()[:8]}"
    dispatcher = njit(**options)(function)
    dispatcher._cache = _KernelCache(function)
    return dispatcher


def part(function):
    """A function whose code becomes part of each kernel that calls it."""
    return kernel(function, forceinline=True)


def is_kept(dispatcher):
    """Whether a kernel's code is kept on disk."""
    return NullCache is None or isinstance(dispatcher._cache, _KernelCache)
