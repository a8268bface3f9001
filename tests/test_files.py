"""Files: opened without waiting, whole or not there, and folders that one process has for itself."""

import errno
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from fastdtd import files

posix = pytest.mark.skipif(sys.platform == "win32", reason="of POSIX")
HOLD = """
import sys
from pathlib import Path
from fastdtd.files import FolderLock
lock = FolderLock(Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
"""


def holder(folder):
    """Another process that has the lock until it dies."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"held\n"
    return process


@posix
def test_only_files_are_opened(tmp_path):
    (tmp_path / "file").write_text("text")
    (tmp_path / "link").symlink_to("file")
    os.mkfifo(tmp_path / "pipe")
    for name in ("file", "link"):
        with files.open_to_read(tmp_path / name) as file:
            assert file.read() == b"text"
    for path, message in ((tmp_path / "pipe", "a named pipe"), (Path("/dev/null"), "a device")):
        with pytest.raises(OSError, match=f"{message}; required: a regular file"):
            files.open_to_read(path)
    with pytest.raises(IsADirectoryError):
        files.open_to_read(tmp_path)
    with pytest.raises(FileNotFoundError):
        files.open_to_read(tmp_path / "none")


@posix
def test_a_file_that_becomes_a_pipe_is_not_waited_for(tmp_path, monkeypatch):
    """Between looking at it and opening it."""
    (tmp_path / "file").write_text("text")
    os.mkfifo(tmp_path / "pipe")
    regular, stat = os.stat(tmp_path / "file"), os.stat
    monkeypatch.setattr(files.os, "stat", lambda path, **o: regular if path == tmp_path / "pipe" else stat(path, **o))
    with pytest.raises(OSError, match="a named pipe"):
        files.open_to_read(tmp_path / "pipe")


def test_a_folder_is_held_by_one(tmp_path):
    with files.FolderLock(tmp_path) as lock:
        assert lock.is_held()
        with pytest.raises(files.HeldError, match=rf"process {os.getpid()} on \S+ since 20"):
            files.FolderLock(tmp_path)
        failed = []

        def take():
            try:
                files.FolderLock(tmp_path)
            except files.HeldError:
                failed.append(True)

        thread = threading.Thread(target=take)
        thread.start()
        thread.join()
        assert failed
    assert not lock.is_held()
    assert list(tmp_path.iterdir()) == []
    with files.FolderLock(tmp_path):
        pass


def test_a_lock_dies_with_its_process(tmp_path):
    other = holder(tmp_path)
    with pytest.raises(files.HeldError, match=f"process {other.pid} on"):
        files.FolderLock(tmp_path)
    other.kill()
    other.wait()
    assert (tmp_path / files.LOCK).exists()
    with files.FolderLock(tmp_path) as lock:
        assert lock.is_held()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_replaced_is_not_held(tmp_path):
    (tmp_path / "out").mkdir()
    with files.FolderLock(tmp_path / "out") as lock:
        (tmp_path / "out").rename(tmp_path / "old")
        assert not lock.is_held()
        (tmp_path / "out").mkdir()
        with files.FolderLock(tmp_path / "out") as another:
            assert another.is_held()
            assert not lock.is_held()
            lock.__exit__()
            assert another.is_held()


def test_only_one_of_many_gets_it(tmp_path):
    """Though those that had it remove the file that is locked."""
    inside, most, got = [], [], []

    def take():
        for _ in range(300):
            try:
                with files.FolderLock(tmp_path):
                    inside.append(1)
                    most.append(len(inside))
                    inside.pop()
                    got.append(1)
            except files.HeldError:
                pass

    threads = [threading.Thread(target=take) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(most) == 1
    assert got
    assert list(tmp_path.iterdir()) == []


def test_an_interrupt_leaves_no_lock_behind(tmp_path):
    """At whatever bytecode it comes."""
    def interrupt(frame, event, argument):
        nonlocal left
        if frame.f_code.co_filename != files.__file__:
            return None
        frame.f_trace_opcodes = True
        left -= event == "opcode"
        if left < 0:
            sys.settrace(None)
            raise KeyboardInterrupt
        return interrupt

    number = interrupted = 0
    while interrupted == number:
        left = number = number + 1
        try:
            sys.settrace(interrupt)
            with files.FolderLock(tmp_path):
                pass
        except KeyboardInterrupt:
            interrupted += 1
        finally:
            sys.settrace(None)
        with files.FolderLock(tmp_path) as lock:
            assert lock.is_held()
    assert interrupted > 100


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes cannot be forked")
def test_a_forked_process_does_not_have_the_lock(tmp_path):
    lock = files.FolderLock(tmp_path)
    (ended, end), (said, say) = os.pipe(), os.pipe()
    child = os.fork()
    if not child:
        os.close(end)
        with lock:
            pass
        os.write(say, b"1" if (tmp_path / files.LOCK).exists() and not lock.is_held() else b"0")
        os.read(ended, 1)  # lives on after the parent has given the lock back
        os._exit(0)
    try:
        assert os.read(said, 1) == b"1"
        with lock:
            pass
        with files.FolderLock(tmp_path) as again:
            assert again.is_held()
    finally:
        os.close(end)
        os.waitpid(child, 0)
        for descriptor in (ended, said, say):
            os.close(descriptor)


@posix
@pytest.mark.parametrize(("content", "held"), [
    (b"", False), (b"process %d on HOST since then", True),
    (b"process 2147483647 on HOST since then", False), (b"process 1 on elsewhere since then", True), (b"\xff\0", True)])
def test_file_systems_without_locks(tmp_path, monkeypatch, content, held):
    """There it is as good as what the file says of its holder."""
    def no_locks(descriptor):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(files, "_lock", no_locks)
    monkeypatch.setattr(files.socket, "gethostname", lambda: "HOST")
    (tmp_path / files.LOCK).write_bytes(content.replace(b"%d", str(os.getpid()).encode()))
    if held:
        with pytest.raises(files.HeldError):
            files.FolderLock(tmp_path)
    else:
        with files.FolderLock(tmp_path), pytest.raises(files.HeldError, match=str(os.getpid())):
            files.FolderLock(tmp_path)
        assert list(tmp_path.iterdir()) == []


@posix
def test_a_lock_that_is_no_file(tmp_path):
    (tmp_path / "mine").write_text("mine")
    (tmp_path / files.LOCK).symlink_to("mine")
    with pytest.raises(OSError, match="symbolic link"):
        files.FolderLock(tmp_path)
    assert (tmp_path / "mine").read_text() == "mine"


@posix
def test_abandoned_files_go_and_living_ones_stay(tmp_path):
    dead = tmp_path / f".a.png.{'0123456789abcdef' * 2}"
    dead.write_text("half of it")
    seen = []

    def write(beside):
        beside.write_text("whole")
        files.remove_abandoned(tmp_path, r"a\.png")
        seen.extend([beside.exists(), dead.exists()])

    files.replace(tmp_path / "a.png", write)
    assert seen == [True, False]
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]
    assert (tmp_path / "a.png").read_text() == "whole"
