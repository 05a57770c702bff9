"""Which checkpoints there are and whether they can be trusted; without torch."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from shoal.checkpoint import folders, manifest
from shoal.checkpoint.manifest import File
from shoal.errors import CheckpointError

# Files that are read and hashed at a time; hashing leaves the interpreter's lock.
_THREADS = 8


class Damage(NamedTuple):
    """A file that cannot be trusted, and why."""

    file: Path
    reason: str


def verify(folder: Path) -> list[Damage]:
    """Every damaged or missing file of one checkpoint, all of which is read. None: each bit is as saved."""
    try:
        files = manifest.read(folder).files
    except CheckpointError as error:
        return [Damage(Path(error.where), error.what)]
    with ThreadPoolExecutor(_THREADS) as pool:
        reasons = pool.map(lambda name: _reason(folder / name, files[name]), files)
        return [Damage(folder / name, reason) for name, reason in zip(files, reasons, strict=True) if reason]


def _reason(path: Path, expected: File) -> str:
    try:
        with open(path, "rb") as file:
            size = file.seek(0, 2)
            if size != expected.size:
                return f"is damaged: it has {size} bytes instead of {expected.size}"
            file.seek(0)
            if hashlib.file_digest(file, "sha256").hexdigest() != expected.sha256:
                return "is damaged: it does not match its checksum"
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    return ""


def newest(root: Path, say: Callable[[str], None]) -> Path | None:
    """The newest complete checkpoint under `root` that is undamaged, or None if there is none.

    say: is told each damaged file of the newer ones that are passed over.
    """
    for folder in folders.complete(root):
        damages = verify(folder)
        if not damages:
            return folder
        for file, reason in damages:
            say(f"{file} {reason}; checkpoint {folder.name} is passed over")
    return None


def describe(folder: Path) -> dict[str, Any]:
    """Figures for a list of checkpoints, from the manifest alone. Raises CheckpointError if that is damaged.

    step; bytes on disk; files; tensors; elements of all tensors; layout that saved it, if the run noted it.
    """
    what = manifest.read(folder)
    return {
        "step": what.step,
        "bytes": sum(file.size for file in what.files.values()) + (folder / manifest.FILE).stat().st_size,
        "files": len(what.files),
        "tensors": len(what.tensors),
        "elements": sum(prod(tensor.shape) for tensor in what.tensors.values()),
        "layout": what.values.get("layout"),
    }
