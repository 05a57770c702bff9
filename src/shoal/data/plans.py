"""Packing plans on disk, beside the token stores that they are of: made once, by whoever comes first."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import numpy as np

from shoal.data.pack import Plan, plan
from shoal.data.store import Store


def packed(prefix: Path, sequence_length: int, pack: str) -> Plan:
    """The rows of the token store at `prefix`, made at the first call and kept beside it if that can be written."""
    folder = prefix.with_name(f"plan-{prefix.name}-{sequence_length}-{pack}")
    if kept := _kept(folder):
        return kept
    shutil.rmtree(folder, ignore_errors=True)  # if it is there, it is damaged
    store = Store(prefix)
    made = plan(store.start_D, store.length_D, sequence_length, pack)
    _publish(made, folder)
    return _kept(folder) or made


def _kept(folder: Path) -> Plan | None:
    """The plan in a folder, memory-mapped; None if there is none or it is damaged."""
    try:
        arrays = [np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("start", "length", "first")]
    except (OSError, ValueError, EOFError):
        return None
    start_P, length_P, first_R = map(np.asarray, arrays)
    return Plan(start_P, length_P, first_R) if len(start_P) == len(length_P) == first_R[-1] else None


def _publish(made: Plan, folder: Path) -> None:
    """Writes a plan under another name first; of several ranks that do so at once the first one counts."""
    try:
        draft = Path(tempfile.mkdtemp(prefix=".plan-", dir=folder.parent))
    except OSError:
        return
    try:
        np.save(draft / "start.npy", made.start_P)
        np.save(draft / "length.npy", made.length_P)
        np.save(draft / "first.npy", made.first_R)
        draft.rename(folder)
    except OSError:
        pass  # somebody was first, or the disk is full: the plan in memory will do
    finally:
        shutil.rmtree(draft, ignore_errors=True)
