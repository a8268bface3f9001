"""Files opened without waiting, output that is whole or not there, and folders that one process has for itself."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import re
import socket
import stat
import sys
import time
import uuid
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fastdtd.errors import FastDTDError, shown

LOCK = ".fastdtd.lock"
_HOLDER_BYTES = 300  # of a lock file, what says who holds it
_LOCKED_AT = 1 << 20  # of a lock file, the byte that is locked where systems lock bytes, and do not let them be read
_KINDS = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket",
          stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"}
# What is answered where somebody else has a lock, and by file systems without locks.
_HELD = {errno.EAGAIN, errno.EACCES, errno.EDEADLK}
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL}


def as_path(given: object, error: type[FastDTDError], required: str) -> Path:
    """What was given as a path; `error` where it is none, such as None or bytes, which says what is required."""
    text = os.fspath(given) if isinstance(given, os.PathLike) else given
    if not isinstance(text, str) or "\0" in text:
        raise error(f"a path was given as {shown(given)}, of type {type(given).__name__}; required: {required}, as str "
                    "or pathlib.Path")
    return Path(text)


def open_to_read(path: str | os.PathLike[str]) -> io.BufferedReader:
    """A regular file, for reading; a link leads to what it names.

    What is none is not opened: a named pipe would block until somebody writes, and some devices act when opened.

    Raises
    ------
    OSError
        The file cannot be opened. IsADirectoryError for a folder; for other things errno is EINVAL, and strerror says
        what it is.
    ValueError
        A path with a NUL.
    """
    _require_regular(os.stat(path).st_mode, path)
    # What was looked at may have become another: so without blocking, and it is looked at again.
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0) | getattr(os, "O_BINARY", 0)
    descriptor = os.open(path, flags)
    try:
        _require_regular(os.fstat(descriptor).st_mode, path)
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def _require_regular(mode: int, path: str | os.PathLike[str]) -> None:
    kind = stat.S_IFMT(mode)
    if kind == stat.S_IFDIR:
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(path))
    if kind != stat.S_IFREG:
        raise OSError(errno.EINVAL, f"it is {_KINDS.get(kind, 'no regular file')}; required: a regular file",
                      os.fspath(path))


def replace(path: Path, write: Callable[[Path], Any]) -> None:
    """`path` as `write` makes it, or as it was before; see `replacing`."""
    with replacing(path) as beside:
        write(beside)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file beside `path`, to be written, which then takes its place. Whatever happens, no half of it is ever to be
    seen.

    Raises
    ------
    OSError
        And whatever writing raises; what was written beside is removed then.
    """
    beside = path.with_name(f".{path.name[-50:]}.{uuid.uuid4().hex}")  # within a file system's 255 bytes
    try:
        with open(beside, "xb") as file:
            if sys.platform != "win32":  # which does not remove what is open
                with contextlib.suppress(OSError):
                    _lock(file.fileno())  # so that `remove_abandoned` leaves it alone while this process lives
            yield beside
            os.fsync(file.fileno())
            if sys.platform == "win32":
                file.close()
            os.replace(beside, path)
    except BaseException:
        with contextlib.suppress(OSError, ValueError):
            os.unlink(beside)
        raise


def remove_abandoned(folder: Path, names: str) -> None:
    """Remove what `replace` had written in `folder` for files of these `names`, a regular expression, when its process
    was killed. What a living process writes stays."""
    beside = re.compile(rf"\..*({names})\.[0-9a-f]{{32}}")
    for file in folder.glob(".*"):
        if beside.fullmatch(file.name):
            with contextlib.suppress(OSError):  # what cannot be removed does no harm
                _remove_unlocked(file)


def _remove_unlocked(file: Path) -> None:
    if sys.platform == "win32":
        file.unlink()
        return
    descriptor = os.open(file, os.O_RDWR | os.O_NONBLOCK | os.O_NOFOLLOW)
    try:
        try:
            _lock(descriptor)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
        file.unlink()
    finally:
        os.close(descriptor)


# ---- Locks -----------------------------------------------------------------------------------------------------------


class HeldError(Exception):
    """Another one holds the lock; the message says who, and since when."""


class FolderLock:
    """A folder for one user at a time, among all processes and threads; the lock dies with its process.

    The file that is locked is removed with the lock, and says who holds it. Locks of the whole file (flock) also work
    across the clients of a network file system. Where there are no locks, the file itself is one, unless it is of a
    process of this machine that is no more. A forked process does not have the lock.
    """

    def __init__(self, folder: Path) -> None:
        """Take it.

        Raises
        ------
        HeldError
            It is held already.
        OSError
            The file cannot be written.
        """
        self._path = folder / LOCK
        while not self._take():
            pass
        _held.add(self)

    def _take(self) -> bool:
        """False where the holder has just removed the file: there may be another."""
        # An object, which is closed with its last reference: an interrupt must not leave the lock to nobody.
        self._file = io.FileIO(self._path, "r+", opener=_open_lock)
        holder = self._file.read(_HOLDER_BYTES) or b""
        try:
            _lock(self._file.fileno())
        except OSError as error:
            if error.errno in _HELD or (error.errno in _NO_LOCKS and _may_live(holder)):
                self._file.close()
                raise HeldError(_shown(holder)) from None
            if error.errno not in _NO_LOCKS:
                self._file.close()
                raise
        if not self.is_held():
            self._file.close()
            return False
        since = time.strftime("%Y-%m-%d %H:%M:%S %z")
        self._file.seek(0)
        self._file.truncate()
        self._file.write(f"process {os.getpid()} on {socket.gethostname()} since {since}\n".encode())
        return True

    def is_held(self) -> bool:
        """False where the folder was removed or replaced in the meantime, or the lock's file was."""
        try:
            return os.path.samestat(os.stat(self._path), os.fstat(self._file.fileno()))
        except (OSError, ValueError):  # ValueError: it is closed
            return False

    def __enter__(self) -> FolderLock:
        return self

    def __exit__(self, *_: object) -> None:
        is_held = self.is_held()
        if sys.platform == "win32":  # which does not remove what is open
            self._file.close()
        if is_held:
            with contextlib.suppress(OSError):
                self._path.unlink()
        self._file.close()

    def forget(self) -> None:
        """No longer have a part in the lock, which stays its holder's."""
        self._file.close()


def _open_lock(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0), 0o666)


_held: weakref.WeakSet[FolderLock] = weakref.WeakSet()


def _forget_locks() -> None:
    """In a forked process, which shares its parent's locks and must not keep them when that ends."""
    for lock in _held:
        lock.forget()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_locks)


def _lock(descriptor: int) -> None:
    """Lock an open file, until it is closed. OSError where somebody else has it locked."""
    if sys.platform == "win32":
        import msvcrt

        os.lseek(descriptor, _LOCKED_AT, os.SEEK_SET)
        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        os.lseek(descriptor, 0, os.SEEK_SET)
    else:
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _shown(holder: bytes) -> str:
    return re.sub(r"[^ -~]", "", holder.decode("ascii", "replace")) or "a process that has not said its name"


def _may_live(holder: bytes) -> bool:
    """Whether what is said to hold a lock may be at work; of this machine's processes it is known."""
    said = re.match(rb"process (\d+) on (\S+) ", holder)
    if said is None or said[2].decode("ascii", "replace") != socket.gethostname():
        return bool(holder)
    if sys.platform == "win32":  # where os.kill kills whatever the signal
        return True
    try:
        os.kill(int(said[1]), 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        pass
    return True
