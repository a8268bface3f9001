"""A network and its rules as a library for C: a header, an object file, a static and a shared library.

The schedule of one image is compiled: its kernels, the walk through its steps, and functions that C programs call.
"""

from __future__ import annotations

import os
import pickle
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from fastdtd.embedding import job
from fastdtd.embedding.job import COMPILED, OBJECT, Compiled, Job
from fastdtd.embedding.targets import TARGETS, find_target, this_processor
from fastdtd.errors import InputError, OutputError, RuleError, shown
from fastdtd.files import as_path, replacing
from fastdtd.model import Model
from fastdtd.rules import Rules, assign

__all__ = ["ALGORITHMS", "TARGETS", "WEIGHTS", "Embedded", "embed"]

WEIGHTS = ("embedded", "file", "compact", "compact16")
ALGORITHMS = ("fast", "small")
_MAX_NAME = 64
_KEYWORDS = {
    "auto", "break", "case", "char", "const", "continue", "default", "do", "double", "else", "enum", "extern",
    "float", "for", "goto", "if", "inline", "int", "long", "register", "restrict", "return", "short", "signed",
    "sizeof", "static", "struct", "switch", "typedef", "union", "unsigned", "void", "volatile", "while",
}


@dataclass(frozen=True)
class Embedded:
    """What `embed` wrote.

    Attributes
    ----------
    header, object, static : Path
    shared : Path or None
        The shared library; None where no linker made one.
    weights : Path or None
        None where they are inside of the library.
    name : str
        What the functions' names begin with.
    target : str
    workspace_bytes, weights_bytes : int
        That a call needs.
    object_bytes : int
        With the weights, where they are inside.
    is_tested : bool
        Whether libraries for this target were ever run.
    missing : tuple of str
        What could not be made, and why.
    """

    header: Path
    object: Path
    static: Path
    shared: Path | None
    weights: Path | None
    name: str
    target: str
    workspace_bytes: int
    weights_bytes: int
    object_bytes: int
    is_tested: bool = True
    missing: tuple[str, ...] = field(default=())


def embed(model: Model, folder: str | os.PathLike[str], rules: Rules = "dtd", target: str | None = None,
          weights: str = "embedded", algorithms: str = "fast", name: str = "network", device_cpu: bool = False
          ) -> Embedded:
    """Write a library that explains a network's predictions, without Python, for programs in C.

    Parameters
    ----------
    model : Model
    folder : path
        Where files are written; it is made if it is not there.
    rules : str, mapping of str to str or Rule, or sequence of these
        As an Explainer takes them.
    target : str or None
        "x86-64-v2", "x86-64-v3" (AVX2), "x86-64-v4" (AVX-512), "aarch64", "wasm32", or any triple that LLVM knows, for
        which nothing was tested, as TRIPLE, TRIPLE:CPU or TRIPLE:CPU:FEATURES. None: this machine's architecture;
        "x86-64-v3" on x86-64.
    weights : {"embedded", "file", "compact", "compact16"}
        Inside of the library; in a file beside, as kernels read them, which programs read or map; or there as the
        network has them, in float32 or float16, for `NAME_unpack`.
    algorithms : {"fast", "small"}
        "small": without Winograd's algorithm, whose weights take four times the memory.
    name : str
        What the functions' and files' names begin with.
    device_cpu : bool
        For this very processor instead of a target: the bits that an Explainer gives here.

    Returns
    -------
    Embedded

    Raises
    ------
    InputError
        A target, name or option that there is not, or a rule that calls a library.
    RuleError
        A rule that does not exist or does not fit.
    OutputError
        A folder that cannot be written to.

    Examples
    --------
    >>> import fastdtd
    >>> library = fastdtd.embed(fastdtd.load("squeezenet1_1"), "out", name="squeezenet")
    >>> library.shared.name
    'libsqueezenet.so'
    """
    if not isinstance(model, Model):
        raise InputError(f"the model is {shown(model)}; required: a Model, as fastdtd.load(...) returns it")
    for option, given, choices in (("weights", weights, WEIGHTS), ("algorithms", algorithms, ALGORITHMS)):
        if given not in choices:
            raise InputError(f"{option} is {shown(given)}; required: {' or '.join(map(repr, choices))}")
    _check_name(name)
    if device_cpu and target is not None:
        raise InputError(f"target {shown(target)} and device_cpu were given; required: one or the other")
    found = this_processor() if device_cpu else find_target(target)
    assign(model.graph, rules)  # its errors are told before anything is compiled
    to = as_path(folder, OutputError, "a folder")
    with tempfile.TemporaryDirectory(prefix="fastdtd") as temporary:
        place = Path(temporary)
        wanted = Job(model, rules, found, name, weights, algorithms == "small")
        compiled = _compiled(wanted, place)
        try:
            to.mkdir(parents=True, exist_ok=True)
            return _written(to, place, compiled, wanted)
        except OSError as error:
            raise OutputError(
                f"folder {str(to)!r} cannot be written to: {error.strerror or error}; give another one") from None


def _check_name(name: object) -> None:
    if not isinstance(name, str) or not re.fullmatch("[A-Za-z][A-Za-z0-9_]*", name) or len(name) > _MAX_NAME \
            or name in _KEYWORDS:
        raise InputError(
            f"name is {shown(name)}; required: what a C function's name can begin with: a letter, then letters, digits "
            f"and _, at most {_MAX_NAME}")


def _compiled(wanted: Job, place: Path) -> Compiled:
    """In a process of its own: kernels are written for a processor when they are imported."""
    try:
        (place / "job").write_bytes(pickle.dumps(wanted, protocol=5))
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise RuleError(f"a search direction cannot be given to the process that compiles ({error}); required: a "
                        "function that another process can import, of a module's own") from None
    cpu, features = wanted.target.compiled_for
    environment = {"NUMBA_CPU_NAME": cpu, "NUMBA_CPU_FEATURES": features, "FASTDTD_VECTORS": wanted.target.vectors,
                   "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run([sys.executable, "-m", "fastdtd.embedding.worker", place / "job", place],
                          env=os.environ | environment, stderr=None, check=False)
    outcome = place / COMPILED
    if done.returncode or not outcome.exists():
        raise InputError(f"no code could be made for {wanted.target.name} ({wanted.target.triple}): the compiler "
                         f"stopped with {done.returncode}, see what it said; required: another target")
    result = pickle.loads(outcome.read_bytes())
    if isinstance(result, Exception):
        raise result
    assert isinstance(result, Compiled)
    return result


def _written(to: Path, place: Path, compiled: Compiled, wanted: Job) -> Embedded:
    from fastdtd.embedding import linking
    from fastdtd.embedding.code import COMPACT_EXPORTS, EXPORTS
    from fastdtd.embedding.header import header

    name, target = wanted.name, wanted.target
    content = (place / OBJECT).read_bytes()
    is_compact = wanted.weights in ("compact", "compact16")
    symbols = [f"{name}_{export}" for export in (*EXPORTS, *(COMPACT_EXPORTS if is_compact else ()))]
    suffix = ".obj" if target.format == "coff" else ".o"
    text = header(name, compiled, target, is_compact, wanted.model.preprocessing.resize)
    files = {f"{name}.h": text.encode(), f"{name}{suffix}": content,
             f"lib{name}.a": linking.archive(content, f"{name}{suffix}", symbols, target)}
    for file, written in files.items():
        with replacing(to / file) as beside:
            beside.write_bytes(written)
    weights = None
    if compiled.file_bytes:
        weights = to / f"{name}.weights"
        with replacing(weights) as beside:
            shutil.copyfile(place / job.WEIGHTS, beside)
    shared: Path | None = to / linking.shared_name(name, target)
    assert shared is not None
    problem = linking.link(place / OBJECT, place / shared.name, name, symbols, target)
    missing: tuple[str, ...] = ()
    if problem is None:
        with replacing(shared) as beside:
            shutil.copyfile(place / shared.name, beside)
        shared.chmod(0o755)
    else:
        shared, missing = None, (f"no shared library was written: {problem}",)
    return Embedded(to / f"{name}.h", to / f"{name}{suffix}", to / f"lib{name}.a", shared, weights, name, target.name,
                    compiled.workspace_bytes, compiled.weights_bytes, len(content), target.is_tested, missing)
