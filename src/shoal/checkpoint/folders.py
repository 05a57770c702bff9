"""Names of checkpoint folders, and their life: temporary, complete, superseded.

Complete:  `step-00000100`, or `step-00000100-1` where that step was saved before: no folder is ever replaced.
Temporary: `<complete>.<nonce>-<count>.tmp`, the count-th save of that start of the run which chose the nonce.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import msgspec

from shoal.durable import sync

_COMPLETE = re.compile(r"step-(\d{8,})(?:-(\d+))?")
_TEMPORARY = re.compile(r"step-.*\.(\w+)-(\d+)\.tmp")


class Attempt(msgspec.Struct, frozen=True):
    """One save of all ranks. nonce: of this start of the run. count: of its saves, from 1."""

    nonce: str
    count: int

    def temporary(self, name: str) -> str:
        return f"{name}.{self.nonce}-{self.count}.tmp"


def name_of(step: int, generation: int = 0) -> str:
    """generation: how often the step was saved before."""
    return f"step-{step:08d}" + (f"-{generation}" if generation else "")


def _aged(root: Path) -> list[tuple[int, int, Path]]:
    """(step, generation, folder) of the complete checkpoints, newest first."""
    matches = [(_COMPLETE.fullmatch(path.name), path) for path in root.glob("step-*")]
    return sorted(((int(m[1]), int(m[2] or 0), path) for m, path in matches if m), reverse=True)


def complete(root: Path) -> list[Path]:
    """Complete checkpoints under `root`, newest first, unverified; none if there is no such folder."""
    return [path for _, _, path in _aged(root)]


def temporary(root: Path) -> Iterator[tuple[Attempt, Path]]:
    """Checkpoints that are being written, or were when something crashed."""
    for path in root.glob("step-*.tmp"):
        if match := _TEMPORARY.fullmatch(path.name):
            yield Attempt(match[1], int(match[2])), path


def sweep(root: Path, attempt: Attempt) -> None:
    """Removes what saves before `attempt` left unfinished. Ranks that are ahead of it are left alone."""
    for other, path in temporary(root):
        if other.nonce != attempt.nonce or other.count < attempt.count:
            shutil.rmtree(path, ignore_errors=True)


def finish(folder: Path, step: int) -> None:
    """Gives a temporary folder, whose files are all on the disk, its complete name: at once, and to last."""
    sync(folder)
    earlier = [generation for known, generation, _ in _aged(folder.parent) if known == step]
    os.rename(folder, folder.parent / name_of(step, max(earlier, default=-1) + 1))
    sync(folder.parent)
    sync(folder.parent.parent)  # where the first checkpoint's parent may be new


def prune(root: Path, step: int, keep: int, attempt: Attempt) -> None:
    """Removes all but the newest of `step` and the `keep` - 1 steps before it.

    Never those of later steps: the run went back before them and has not reached them again. Each is renamed
    first, so that nothing half-removed has a complete one's name.
    """
    up_to = [(known, path) for known, _, path in _aged(root) if known <= step]
    kept = sorted({known for known, _ in up_to})[-keep:]
    for known, path in up_to:
        if known in kept:
            # The first one of a step is its newest.
            kept.remove(known)
            continue
        doomed = root / attempt.temporary(path.name)
        os.rename(path, doomed)
        shutil.rmtree(doomed, ignore_errors=True)
