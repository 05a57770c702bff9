"""Folders for work under way: gone when the work ends, swept up by the next one if it was killed, or published."""

from __future__ import annotations

import contextlib
import fcntl
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from shoal.durable import sync

_PREFIX, _LOCK = ".prepare-", "lock"


@contextlib.contextmanager
def draft(cache: Path) -> Iterator[Path]:
    """A new folder in `cache`. The kernel drops its lock with its process, however that ends."""
    sweep(cache)
    with tempfile.TemporaryDirectory(prefix=_PREFIX, dir=cache, ignore_cleanup_errors=True) as folder:
        # Locked before it has the name that sweepers look for.
        unnamed = Path(folder) / "unnamed"
        with unnamed.open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            unnamed.rename(unnamed.with_name(_LOCK))
            yield Path(folder)


def sweep(cache: Path) -> None:
    """Removes what processes left in `cache` that did not live to do so."""
    for left in cache.glob(f"{_PREFIX}*/{_LOCK}"):
        with contextlib.suppress(OSError), left.open() as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(left.parent, ignore_errors=True)


def publish(made: Path, target: Path) -> None:
    """Gives a complete folder of files its name, when all of it is on disk: a crash leaves the whole of it or nothing.

    Raises OSError, also if there is a folder of that name which is not empty.
    """
    for path in (*made.iterdir(), made):
        sync(path)
    made.rename(target)
    sync(target.parent)
