"""metrics.jsonl: one JSON object per step, each step once, also after a kill and a resume."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import msgspec

FILE = "metrics.jsonl"


class Metrics:
    """Appends rows to the run's metrics.jsonl. Numbers that JSON does not have (NaN, inf) become null."""

    def __init__(self, folder: Path, step: int = 0):
        """step: of the checkpoint that the run goes on from; rows after it are dropped, they come again.

        They are cut off, which a full disk does not prevent and a crash does not leave half done. OSError if the
        file cannot be written.
        """
        self._file = os.open(folder / FILE, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            self._cut((folder / FILE).read_bytes(), step)
        except OSError:
            os.close(self._file)
            raise

    def _cut(self, text: bytes, step: int) -> None:
        """Lets the file end with the last row up to `step`, and with a line break."""
        kept = position = 0
        for line in text.split(b"\n"):
            position += len(line) + 1
            row = _row(line)
            if row is not None and row["step"] <= step:
                kept = position
        os.ftruncate(self._file, min(kept, len(text)))
        if kept > len(text):  # a row that was torn off just before its line break
            os.write(self._file, b"\n")

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
        if (row := _row(line)) is not None:
            rows[row["step"]] = row
    return [rows[step] for step in sorted(rows)]


def _row(line: bytes) -> dict[str, Any] | None:
    """None for a torn or foreign line."""
    try:
        row = msgspec.json.decode(line, type=dict)
    except ValueError:
        return None
    return row if isinstance(row.get("step"), int) else None


def _line(row: dict[str, Any]) -> bytes:
    return msgspec.json.encode(row) + b"\n"
