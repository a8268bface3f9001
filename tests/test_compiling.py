"""How kernels get compiled and kept: each case in processes of its own, for what is compiled belongs to a process."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from fastdtd.kernels import cpu
from fastdtd.kernels.cpu.jit import kernel
from numba.core import config

import fastdtd

TESTS = Path(__file__).parent
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("compiling")]  # all use the same warmed folder
NOTICE = "fastdtd: compiling kernels for this processor, once; this can take half a minute\n"
# Explain with the kernels of a ReLU, quick to compile, or with those of dense layers too, and print a digest of the
# results.
EXPLAIN = """
import hashlib, sys
import numpy as np
from fastdtd import Explainer, Graph, Model, Preprocessing
from fastdtd.graph import Dense, ReLU
def explain(*layers):
    explainer = Explainer(Model(Graph(layers, (3, 1, 1), (0.0, 1.0)), Preprocessing(None)), threads=2)
    e = explainer(np.float32([[[[0.2]], [[0.3]], [[0.5]]]]))
    print(hashlib.sha256(e.relevance.tobytes() + e.output.tobytes()).hexdigest())
relu = ReLU("relu", ("input",))
rng = np.random.default_rng(0)
hidden, scores = Dense("hidden", ("relu",), rng.standard_normal((9, 3))), Dense("scores", ("active",), np.ones((2, 9)))
"""
WITH_RELU = EXPLAIN + "explain(relu)\n"
WITH_DENSE = EXPLAIN + "explain(relu, hidden, ReLU('active', ('hidden',)), scores)\n"
# Prints how many kernels, and parts of kernels, were compiled in this process.
COUNT = """
import importlib, pkgutil
from fastdtd.kernels import cpu
def compiled():
    names = [module.name for module in pkgutil.iter_modules(cpu.__path__)]
    modules = [importlib.import_module(f"fastdtd.kernels.cpu.{name}") for name in names]
    kernels = [value for module in modules for value in vars(module).values() if hasattr(value, "stats")]
    found = {id(kernel): kernel.stats.cache_misses for kernel in kernels}
    found |= {id(step): step.stats.cache_misses for step in cpu.steps_compiled().values()}
    assert len(found) > 20
    return sum(sum(misses.values()) for misses in found.values())
"""
WARM_UP_WITH_RELU = """
import sys
from fastdtd import cli, warmup
from fastdtd.graph import Graph, ReLU
warmup._network = lambda: Graph((ReLU("relu", ("input",)),), (1, 1, 1))
warmup.assign = lambda graph, rules, assign=warmup.assign: assign(graph)
sys.exit(cli.main(["warmup"]))
"""
NO_ROOM = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))\n"  # no file can grow


def start(code, cache, **environment):
    environment = {"NUMBA_CACHE_DIR": str(cache) if cache else None, "PYTHONDONTWRITEBYTECODE": "1", **environment}
    return subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=TESTS,
        env={name: value for name, value in (os.environ | environment).items() if value is not None})


def finish(process):
    out, err = process.communicate(timeout=100)
    assert process.returncode == 0, err
    return out, err


def run(code, cache, **environment):
    """Standard output and standard error of a process."""
    return finish(start(code, cache, **environment))


def kept(cache):
    return {path: path.read_bytes() for path in cache.rglob("*") if path.is_file()}


# Warms up where kernels are usually kept, which is quick where that was done before, and copies what it used: other
# tests may have kept more.
WARM_UP = """
import shutil, sys
from pathlib import Path
from fastdtd.kernels.cpu import jit
from fastdtd.warmup import warm_up
names, name_and_key = set(), jit._KernelCache._name_and_key
def noted(*arguments):
    name, key = name_and_key(*arguments)
    names.add(name)
    return name, key
jit._KernelCache._name_and_key = noted
usual = Path(warm_up())
jit.config.CACHE_DIR = sys.argv[1]
[folder] = jit._folders()
folder.mkdir(parents=True)
for name in names:
    shutil.copy(usual / name, folder)
"""


@pytest.fixture(scope="module")
def warmed(tmp_path_factory):
    """A folder with all kernels that `fastdtd warmup` keeps, and no others."""
    cache = tmp_path_factory.mktemp("warmed")
    subprocess.run([sys.executable, "-c", WARM_UP, cache], check=True, cwd=TESTS)
    return cache


# ---- Ahead -----------------------------------------------------------------------------------------------------------


def test_warming_up_says_where_kernels_are_kept(tmp_path):
    """With the kernels of one layer."""
    out, err = run(WARM_UP_WITH_RELU, tmp_path)
    [folder] = tmp_path.iterdir()
    assert out == f"all kernels are compiled and kept in {folder}\n"
    assert err == NOTICE
    assert run(WARM_UP_WITH_RELU, tmp_path) == (out, "")


def test_after_warming_up_nothing_is_compiled(warmed):
    """Neither for a real network nor for random ones with every layer and rule."""
    before = kept(warmed)
    out, err = run(COUNT + """
import warnings
from fastdtd import Explainer, Model, Preprocessing, load, model_file
from graphs import graphs_and_rules, images
from hypothesis import HealthCheck, Phase, given, settings
warnings.simplefilter("ignore")
model = load("squeezenet1_1")
for threads in (1, 3):
    Explainer(model, threads=threads)(model.preprocess(model_file.MODELS / "coffee.png"))

@settings(max_examples=100, deadline=None, derandomize=True, database=None, phases=[Phase.generate],
          suppress_health_check=list(HealthCheck))
@given(graphs_and_rules())
def explain(case):
    graph, rules = case
    Explainer(Model(graph, Preprocessing(None)), rules, threads=2)(images(graph, 3))

explain()
print(compiled())
""", warmed)
    assert (out, err) == ("0\n", "")
    assert kept(warmed) == before


def test_warming_up_compiles_every_kernel_once(warmed):
    """Where this fails, a kernel is not needed by the network of warmup.py, which then needs a layer more; or one gets
    arrays of another type or number of axes in one place than in another, and is compiled for each."""
    verbs = ("_forward", "_redistribute")
    kernels = sorted(name for name in cpu.__all__ if name.endswith(verbs))
    assert len(kernels) > 10
    out, err = run("""
from fastdtd.warmup import warm_up
from fastdtd.kernels import cpu
warm_up()
print(sorted(function.py_func.__name__ for function, kinds in cpu.steps_compiled()))
""", warmed)
    assert (out, err) == (f"{kernels}\n", "")


def test_importing_fastdtd_imports_nothing_that_is_slow(tmp_path):
    slow = ["numba", "llvmlite", "h5py", "PIL", "onnx", "tqdm"]
    assert run(f"import fastdtd, sys; print([name for name in {slow} if name in sys.modules])",
               tmp_path) == ("[]\n", "")


# ---- What is said ----------------------------------------------------------------------------------------------------


def test_compiling_is_announced_once_and_can_be_silenced(tmp_path):
    result, said = run(WITH_RELU, tmp_path)
    assert said == NOTICE
    assert run(WITH_RELU, tmp_path) == (result, "")
    silence = "import logging; logging.getLogger('fastdtd').setLevel(logging.ERROR)\n"
    assert run(silence + WITH_RELU, tmp_path / "new") == (result, "")


@pytest.mark.parametrize("code", ["", NO_ROOM], ids=["no folder", "full disk"])
def test_a_place_that_cannot_be_written(code, warmed, tmp_path):
    """It works, and says why it will be slow the next time too."""
    pytest.importorskip("resource")
    (tmp_path / "file").touch()
    place = tmp_path / "folder" if code else tmp_path / "file" / "folder"
    out, err = run(code + WITH_RELU, place)
    assert out == run(WITH_RELU, warmed)[0]
    said = err.splitlines(keepends=True)
    assert said[0] == NOTICE
    assert said[1].startswith(f"fastdtd: compiled kernels cannot be kept, so each process will compile them ({place}")
    assert said[1].endswith("; set NUMBA_CACHE_DIR to a folder that can be written and has free space\n")
    assert len(said) == 2
    assert kept(tmp_path) == {tmp_path / "file": b""}


@pytest.mark.parametrize("home_can_be_written", [True, False])
def test_an_installation_that_cannot_be_written(home_can_be_written, warmed, tmp_path):
    installed = tmp_path / "site" / "fastdtd"
    shutil.copytree(Path(fastdtd.__file__).parent, installed, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(Path(cpu.__file__).parents[1], installed / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
    (installed / "kernels" / "cpu"
     / "__pycache__").write_text("where a folder should be, so that not even root can make it")
    (tmp_path / "file").touch()
    home = dict.fromkeys(("HOME", "XDG_CACHE_HOME", "LOCALAPPDATA"),
                         str(tmp_path if home_can_be_written else tmp_path / "file"))
    results = [run(WITH_RELU, None, PYTHONPATH=str(installed.parent), **home) for _ in range(2)]
    assert {out for out, _ in results} == {run(WITH_RELU, warmed)[0]}
    if home_can_be_written:
        assert [err for _, err in results] == [NOTICE, ""]
    else:
        assert all(f"({installed}/kernels/cpu/__pycache__: File exists; {tmp_path}/file/" in err for _, err in results)


def test_warming_up_where_nothing_can_be_kept_fails(tmp_path):
    (tmp_path / "file").touch()
    process = start(WARM_UP_WITH_RELU, tmp_path / "file" / "folder")
    out, err = process.communicate(timeout=100)
    assert (process.returncode, out) == (1, "")
    assert err.startswith(NOTICE + f"fastdtd: compiled kernels cannot be kept ({tmp_path / 'file' / 'folder'}")
    assert len(err.splitlines()) == 2


# ---- What is kept, in processes --------------------------------------------------------------------------------------


def test_kernels_can_be_used_where_they_cannot_be_written(warmed):
    """As in a container whose files are read-only."""
    pytest.importorskip("resource")
    result = run(WITH_DENSE, warmed)
    assert run(NO_ROOM + WITH_DENSE, warmed) == result
    assert result[1] == ""


def test_many_processes_at_once(warmed, tmp_path):
    result, _ = run(WITH_RELU, warmed)
    processes = [start(COUNT + WITH_RELU + "print(compiled())", tmp_path) for _ in range(4)]
    results = [finish(process)[0].split() for process in processes]
    assert {out for out, _ in results} == {result.strip()}
    assert sum(int(count) for _, count in results) > len(kept(tmp_path))  # they were at it together
    assert {path.suffix for path in kept(tmp_path)} == {".nbc"}  # no halves are left
    assert run(COUNT + WITH_RELU + "print(compiled())", tmp_path) == (result + "0\n", "")


def test_processors_have_kernels_of_their_own(warmed, tmp_path):
    """Those of one are not used on another, and do not displace them."""
    warm = shutil.copytree(warmed, tmp_path / "warm")
    code = WITH_RELU + "from fastdtd.kernels.cpu.vector_code import LANES; print(LANES)"
    generic = {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": ""}
    before = kept(warm)
    here = run(code, warm)
    assert here[1] == ""
    out, err = run(code, warm, **generic)
    assert (out.splitlines()[1], err) == ("4", NOTICE)
    assert run(code, warm, **generic) == (out, "")
    assert run(code, warm) == here
    assert kept(warm).items() > before.items()


def test_a_numba_that_is_another_inside_keeps_kernels_its_own_way(warmed, tmp_path):
    code = "import numba.misc.appdirs; del numba.misc.appdirs.AppDirs\n" + WITH_RELU
    assert run(code, tmp_path) == run(WITH_RELU, warmed)
    assert {path.suffix for path in kept(tmp_path)} == {".nbi", ".nbc"}


# ---- What is kept, file by file --------------------------------------------------------------------------------------


@pytest.fixture
def fresh(tmp_path, monkeypatch):
    """Makes a kernel as a new process would, with nothing but what is kept in tmp_path: it gives `number` for any
    argument.
    """
    monkeypatch.setattr(config, "CACHE_DIR", str(tmp_path))

    def make(number, name="give"):
        def give(x):
            return x * 0 + number

        give.__qualname__ = name
        return kernel(give)

    return make


DAMAGES = {
    "empty": lambda content: b"", "head": lambda content: content[:10],
    "half": lambda content: content[:len(content) // 2], "cut": lambda content: content[:-1],
    "longer": lambda content: content + b"\0", "zeros": lambda content: bytes(len(content)),
    "one byte": lambda content: content[:-9] + bytes([content[-9] ^ 1]) + content[-8:],
    "random": lambda content: np.random.default_rng(0).bytes(len(content)),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damaged_files_are_compiled_again(damage, fresh, tmp_path):
    def hits():
        made = fresh(1)
        assert made(5) == 1
        return sum(made.stats.cache_hits.values())

    assert [hits(), hits()] == [0, 1]
    [(path, content)] = kept(tmp_path).items()
    path.write_bytes(damage(content))
    assert [hits(), hits()] == [0, 1]
    assert list(kept(tmp_path)) == [path]


def test_one_kernel_is_not_taken_for_another(fresh, tmp_path):
    """As if their files had the same name by chance."""
    names = ("one", "two")
    assert [fresh(1, name)(5) for name in names] == [1, 1]
    (one, ones), (two, twos) = kept(tmp_path).items()
    one.write_bytes(twos)
    two.write_bytes(ones)
    for hits in (0, 1):
        made = [fresh(1, name) for name in names]
        assert [one(5) for one in made] == [1, 1]
        assert [sum(one.stats.cache_hits.values()) for one in made] == [hits] * 2


def test_kernels_made_by_one_function_are_told_apart(fresh):
    for _ in range(2):
        assert [fresh(number)(5) for number in (1, 2)] == [1, 2]


def test_each_signature_has_a_file(fresh, tmp_path):
    for hits in (0, 1):
        for argument in (5, 5.0, np.float32(5), True):
            made = fresh(1)
            assert made(argument) == 1
            assert sum(made.stats.cache_hits.values()) == hits
    assert len(kept(tmp_path)) == 4


def test_a_file_that_vanishes_is_compiled_again(fresh, tmp_path):
    fresh(1)(5)
    shutil.rmtree(next(tmp_path.iterdir()))
    assert fresh(1)(5) == 1
    assert len(kept(tmp_path)) == 1
