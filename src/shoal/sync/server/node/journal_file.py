"""The coordinator's journal on a disk: appended to, made durable, begun anew at a checkpoint."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from shoal.durable import sync
from shoal.sync.server import journal
from shoal.sync.server.records import AnyRecord, Record

FILE = "journal"


class JournalFile:
    """One writer at a time: the coordinator that lives. OSError where the disk is full; then it must end, too."""

    def __init__(self, folder: Path):
        """folder: of the run's server. Made where it is missing."""
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / FILE
        self.records: list[AnyRecord] = []
        data = self.path.read_bytes() if self.path.exists() else b""
        self.records, size = journal.decode(data, where=str(self.path))
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        os.ftruncate(self._file, size)
        os.lseek(self._file, size, os.SEEK_SET)
        self._size = size
        if not size:
            self._write(journal.MAGIC)
            os.fsync(self._file)
            sync(folder)
        # Of versions that are being saved: a journal's beginning from there, and where in the file what follows begins.
        self._marks: dict[int, tuple[Sequence[Record], int]] = {}

    def append(self, records: Sequence[Record], durable: bool) -> None:
        """durable: returns when they are on the disk, and all before them."""
        self._write(journal.encode(records))
        if durable:
            os.fdatasync(self._file)

    def mark(self, version: int, records: Sequence[Record]) -> None:
        """All that was appended so far leads to `version`, of which these records say the same."""
        self._marks[version] = records, self._size

    def restart(self, version: int) -> None:
        """A checkpoint of `version` is complete: begins with its records, and what has followed. At once or not at
        all; nothing happens for a version that this process did not mark."""
        if version not in self._marks:
            return
        records, position = self._marks[version]
        after = os.pread(self._file, self._size - position, position)
        new = self.path.with_suffix(".new")
        head = journal.MAGIC + journal.encode(records)
        file = os.open(new, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
        _write(file, head + after)
        os.fsync(file)
        os.replace(new, self.path)
        sync(self.path.parent)
        os.close(self._file)
        self._file, moved = file, len(head) - position
        self._size += moved
        self._marks = {v: (told, at + moved) for v, (told, at) in self._marks.items() if v > version}

    def close(self) -> None:
        os.close(self._file)

    def _write(self, data: bytes) -> None:
        _write(self._file, data)
        self._size += len(data)


def _write(file: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(file, view) :]
