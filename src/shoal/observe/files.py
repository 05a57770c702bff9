"""Small files of a run folder, written whole or not at all."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from shoal.durable import sync


def replace(path: Path, content: bytes) -> None:
    """Gives a file new content: who reads it, be it after a crash, finds the old or the new. OSError: the old."""
    fresh = path.with_name(f".{path.name}.new")
    try:
        with fresh.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(path)
        with contextlib.suppress(OSError):  # the new content is there; not every file system can do this
            sync(path.parent)
    finally:
        fresh.unlink(missing_ok=True)
