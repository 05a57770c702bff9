"""One process at a time trains in a run folder, and others can see that it does, or that it is about to.

The kernel releases the lock whatever ends its holder, so there is no stale process number to misread.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path

from shoal.errors import ShoalError
from shoal.observe.log import FILE

# A file system that knows no locks: there, nobody is told from anybody.
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)


@contextlib.contextmanager
def hold(folder: Path, patience: float = 5.0) -> Iterator[None]:
    """Holds the run folder. ShoalError if somebody else still does after `patience` seconds.

    The patience is for a run that was killed a moment ago and resumed at once.
    """
    taken = ShoalError(
        "another process is training in this run folder",
        where=str(folder),
        fix="wait for it or stop it, or give --run-dir another folder",
    )
    with alone(folder / FILE, taken, patience):
        yield


@contextlib.contextmanager
def alone(path: Path, taken: ShoalError, patience: float = 5.0) -> Iterator[None]:
    """Holds a file, which is made where there is none. Raises `taken` if somebody else still does after `patience`
    seconds."""
    deadline = time.monotonic() + patience
    with path.open("ab") as file:
        while not _lock(file.fileno(), fcntl.LOCK_EX):
            if time.monotonic() > deadline:
                raise taken
            time.sleep(0.1)
        yield


@contextlib.contextmanager
def attend(folder: Path) -> Iterator[None]:
    """Lets others see that somebody is at work on this run while nobody holds its folder: the launcher, before its
    ranks have started and after they have ended. Keeps nobody out."""
    file = None
    with contextlib.suppress(OSError):  # no such folder any more, or no locks
        file = os.open(folder, os.O_RDONLY)
        fcntl.flock(file, fcntl.LOCK_SH)
    try:
        yield
    finally:
        if file is not None:
            os.close(file)


def held(folder: Path) -> bool:
    """Whether some process holds the run folder, or attends to it, now."""
    return _taken(folder / FILE, fcntl.LOCK_SH) or _taken(folder, fcntl.LOCK_EX)


def _taken(path: Path, kind: int) -> bool:
    try:
        file = os.open(path, os.O_RDONLY)
    except OSError:
        return False
    try:
        return not _lock(file, kind)
    except OSError:  # a network's file system may refuse this kind for a folder
        return False
    finally:
        os.close(file)


def _lock(file: int, kind: int) -> bool:
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
    return True
