"""What happens to runs: kills, interrupts, full disks, folders that vanish, other runs, spoiled caches of kernels.

After each the same call ends with the same bytes as a run that nothing happened to.

FASTDTD_FAULTS says how many kills, and as many interrupts (20); `make faults` tries 200 of each, and more processes.
"""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import killing
import pytest
from fastdtd.kernels import cpu
from fastdtd.kernels.cpu import jit

from fastdtd.warmup import warm_up

COUNT = int(os.environ.get("FASTDTD_FAULTS", "20"))
PROCESSES = 3 if COUNT <= 20 else 8
COMMAND = "import sys; from fastdtd.cli import main; sys.exit(main())"
SMALL_FILES = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({0}, {0})); " + COMMAND
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not hasattr(os, "fork"), reason="of POSIX")]


def start(call, code=COMMAND, **environment):
    return subprocess.Popen([sys.executable, "-c", code, *map(str, call)], stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True, env={**os.environ, **environment})


def ended(process):
    """Exit status, output and errors."""
    try:
        output, errors = process.communicate(timeout=100)
    finally:
        process.kill()
    return process.returncode, output, errors


def run(call, code=COMMAND, **environment):
    return ended(start(call, code, **environment))


@pytest.fixture(scope="module")
def call(tmp_path_factory):
    """A run but for its output folder, with two pictures that cannot be read."""
    warm_up()
    return killing.make(tmp_path_factory.mktemp("made"))


@pytest.fixture(scope="module")
def whole(call, tmp_path_factory):
    """What a run writes that nothing happens to."""
    out = tmp_path_factory.mktemp("whole")
    status, output, _ = run([*call, out])
    assert status == 1  # for the two
    assert "5 explained, 2 failed" in output
    return out


@pytest.fixture
def file_system(tmp_path):
    """A small one of its own; gives a function that mounts it with options."""
    place = tmp_path / "disk"
    place.mkdir()

    def mount(options, *arguments):
        return subprocess.run(["mount", *arguments, "-o", options, "-t", "tmpfs", "tmpfs", str(place)],
                              capture_output=True, check=False).returncode == 0

    if os.geteuid() or not shutil.which("mount") or not mount("size=4m"):
        pytest.skip("no file system can be mounted here, which takes root")
    try:
        yield place, lambda options: mount(f"remount,{options}")
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def assert_resumes(call, out, whole, said="", **environment):
    """The same call ends with the same bytes; gives what it said on standard error."""
    assert killing.missing(out, killing.named(said)) == []
    status, output, errors = run([*call, out], **environment)
    assert (status, errors.count("not explained")) == (1, 2), errors
    assert killing.named(output) >= killing.named(said)
    assert killing.differing(out, whole) == []
    return errors


def test_killed_and_interrupted(call):
    """In a process of its own, which forks."""
    status, output, errors = ended(
        subprocess.Popen([sys.executable, killing.__file__, str(COUNT), str(COUNT), str(int(time.time()))],
                         stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    assert status == 0, output + errors
    assert output.endswith(f"{COUNT} kills, {COUNT} interrupts: 0 differ, 0 stuck\n")


# ---- Disks -----------------------------------------------------------------------------------------------------------


def test_a_full_disk(call, whole, file_system):
    place, remount = file_system
    assert remount("size=80k")
    status, output, errors = run([*call, place / "out"])
    assert status == 1
    assert errors.endswith("Nothing that was reported as done is lost\n")
    assert "No space left on device" in errors
    assert remount("size=4m")
    assert_resumes(call, place / "out", whole, output)


@pytest.mark.parametrize("size", [1000, 20_000])
def test_files_that_may_not_be_as_large(call, whole, tmp_path, size):
    """No drawing; no part or result."""
    status, output, errors = run([*call, tmp_path / "out"], SMALL_FILES.format(size))
    assert status == 1
    assert "File too large" in errors
    assert_resumes(call, tmp_path / "out", whole, output)


def after_a_line(call, change):
    """A run whose folder is changed when it has said that a picture is done."""
    process = start(call)
    said = process.stdout.readline()
    change()
    status, output, errors = ended(process)
    assert status == 1
    assert "Traceback" not in errors
    return said + output, errors


def test_a_folder_that_vanishes(call, whole, tmp_path):
    out, moved = tmp_path / "out", tmp_path / "moved"
    said, errors = after_a_line([*call, out], lambda: out.rename(moved))
    assert "fastdtd: cannot write to" in errors or "was removed or replaced" in errors
    assert not out.exists()
    moved.rename(out)
    assert_resumes(call, out, whole, said)


def test_a_folder_that_becomes_read_only(call, whole, tmp_path):
    """For root, who may write anywhere else, one that cannot be changed."""
    out = tmp_path / "out"
    close, reopen = (["chattr", "+i"], ["chattr", "-i"]) if os.geteuid() == 0 else (["chmod", "555"], ["chmod", "755"])
    if not shutil.which(close[0]) or subprocess.run([*close, tmp_path], capture_output=True, check=False).returncode:
        pytest.skip(f"{' '.join(close)} is not possible here")
    subprocess.run([*reopen, tmp_path], check=True)
    try:
        said, errors = after_a_line([*call, out], lambda: subprocess.run([*close, out], check=True))
    finally:
        subprocess.run([*reopen, out], check=True)
    assert "fastdtd: cannot write to" in errors
    assert "not permitted" in errors or "Permission denied" in errors
    assert_resumes(call, out, whole, said)


# ---- Other runs ------------------------------------------------------------------------------------------------------


def test_runs_into_one_folder(call, whole, tmp_path):
    """Each is refused or the only one at the time, and what is there is of one of them."""
    other = tmp_path / "other"
    run([*call, other, "--target", "3"])
    out = tmp_path / "out"
    processes = [start([*call, out, *options]) for options in ([], ["--target", "3"]) * (PROCESSES // 2)]
    results = [ended(process) for process in processes]
    done = [output for _, output, _ in results if "5 explained, 2 failed" in output]
    refused = [errors for _, _, errors in results if "another run is writing" in errors or "holds another" in errors]
    assert done
    assert len(done) + len(refused) == len(processes)
    assert all("Traceback" not in errors for _, _, errors in results)
    assert [] in (killing.differing(out, whole), killing.differing(out, other))
    is_other = killing.differing(out, whole) != []  # any of them may have been the first
    options = ["--target", "3"] if is_other else []
    status, _, errors = run([*call, out, *options])
    assert (status, errors.count("not explained")) == (1, 2), errors
    assert killing.differing(out, other if is_other else whole) == []


# ---- Kernels on disk -------------------------------------------------------------------------------------------------


def kept_kernels():
    [kept] = {Path(step._cache.cache_path) for step in cpu.steps_compiled().values()}
    return list(kept.glob("*.nbc"))


def fill(folder):
    """All compiled kernels into a folder that is to be NUMBA_CACHE_DIR; gives those of the dense layers, which are
    compiled soonest."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jit.config, "CACHE_DIR", str(folder))
        [place] = jit._folders()
    place.mkdir(parents=True)
    for file in kept_kernels():
        shutil.copy(file, place)
    few = sorted(place.glob("steps.dense_*.nbc"))
    assert few
    return few


def test_kernels_that_are_corrupt(call, whole, tmp_path):
    for i, file in enumerate(fill(tmp_path / "kernels")):
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content[:100] if i % 2 else content)
    errors = assert_resumes(call, tmp_path / "out", whole, NUMBA_CACHE_DIR=str(tmp_path / "kernels"))
    assert "compiling kernels" in errors


@pytest.mark.parametrize("how", ["full", "read-only"])
def test_kernels_that_cannot_be_kept(call, whole, tmp_path, file_system, how):
    place, remount = file_system
    needed = sum(file.stat().st_size for file in kept_kernels())  # those of earlier versions may be there, too
    assert remount(f"size={needed // 2**20 + 10}m")
    for file in fill(place / "kernels"):
        file.unlink()
    if how == "full":
        with pytest.raises(OSError, match="No space left"), open(place / "filling", "wb") as file:  # noqa: PT012  # any write may be the last
            while True:
                file.write(bytes(4096))
                file.flush()
    else:
        assert remount("ro")
    errors = assert_resumes(call, tmp_path / "out", whole, NUMBA_CACHE_DIR=str(place / "kernels"))
    assert "cannot be kept" in errors


def test_processes_that_compile_the_same_kernels(call, whole, tmp_path):
    for file in fill(tmp_path / "kernels"):
        file.unlink()
    kept = {"NUMBA_CACHE_DIR": str(tmp_path / "kernels")}
    processes = [start([*call, tmp_path / f"out{i}"], **kept) for i in range(PROCESSES)]
    assert [ended(process)[0] for process in processes] == [1] * PROCESSES
    assert [killing.differing(tmp_path / f"out{i}", whole) for i in range(PROCESSES)] == [[]] * PROCESSES
    assert "compiling" not in assert_resumes(call, tmp_path / "out", whole, **kept)
