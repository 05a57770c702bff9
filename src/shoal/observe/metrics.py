"""metrics.jsonl: one JSON object per step, each step once, also after a kill and a resume."""

from __future__ import annotations

import contextlib
import errno
import os
from pathlib import Path
from typing import Any

import msgspec

FILE = "metrics.jsonl"


class Metrics:
    """Appends rows to the run's metrics.jsonl. Numbers that JSON does not have (NaN, inf) become null."""

    def __init__(self, folder: Path, step: int = 0):
        """step: of the checkpoint that the run goes on from; rows after it are dropped, they come again."""
        path = folder / FILE
        kept = [row for row in read(folder) if row["step"] <= step]
        fresh = path.with_suffix(".new")
        fresh.write_bytes(b"".join(map(_line, kept)))
        fresh.replace(path)
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND)

    def write(self, row: dict[str, Any]) -> None:
        """Appends one row, whole or not at all. OSError when the disk is full.

        One system call without a buffer of ours: what was written survives the death of this process.
        """
        line, before = _line(row), os.fstat(self._file).st_size
        if os.write(self._file, line) < len(line):
            os.ftruncate(self._file, before)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), FILE)

    def close(self) -> None:
        os.close(self._file)


def read(folder: Path) -> list[dict[str, Any]]:
    """The rows of a run in the order of their steps, if there are any. Passes over torn or foreign lines."""
    try:
        text = (folder / FILE).read_bytes()
    except FileNotFoundError:
        return []
    rows: dict[int, dict[str, Any]] = {}
    for line in text.split(b"\n"):
        with contextlib.suppress(ValueError):
            row = msgspec.json.decode(line, type=dict)
            if isinstance(row.get("step"), int):
                rows[row["step"]] = row
    return [rows[step] for step in sorted(rows)]


def _line(row: dict[str, Any]) -> bytes:
    return msgspec.json.encode(row) + b"\n"
