"""A folder that is there whole or not at all: written under another name, synced, renamed."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from shoal.durable import sync
from shoal.errors import CheckpointError


@contextlib.contextmanager
def staged(out: Path) -> Iterator[Path]:
    """An empty folder `.<name>.new` beside `out`, which becomes `out` if the block ends well, and else goes.

    What a killed process left of it is removed by the next one; two at once are refused. Raises CheckpointError if
    there is an `out` already, or the disk is full.
    """
    out = Path(os.path.abspath(out))
    if os.path.lexists(out):
        raise CheckpointError("is there already", where=str(out), fix="name another folder, or remove this one")
    draft = out.with_name(f".{out.name}.new")
    try:
        draft.mkdir(parents=True, exist_ok=True)
        with _alone(draft, out):
            _empty(draft)
            try:
                yield draft
                for path, _, files in os.walk(draft):
                    for name in files:
                        sync(Path(path) / name)
                    sync(Path(path))
                os.rename(draft, out)
            except BaseException:
                shutil.rmtree(draft, ignore_errors=True)
                raise
        sync(out.parent)
    except OSError as error:
        named = f" ({error.filename})" if error.filename else ""
        raise CheckpointError(
            f"cannot be written: {error.strerror}{named}", where=str(out), fix="free disk space, or name another folder"
        ) from None


@contextlib.contextmanager
def _alone(folder: Path, out: Path) -> Iterator[None]:
    """The kernel drops the lock with its process, however that ends."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a file system without locks, unless:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise CheckpointError(
                    "another process is writing it", where=str(out), fix="wait for it, or name another folder"
                ) from None
        yield
    finally:
        os.close(handle)


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
