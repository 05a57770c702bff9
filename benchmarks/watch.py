"""Looks at a run with a parameter server from outside: its processes, and its journal while it grows."""

from __future__ import annotations

import os
import time
from pathlib import Path

from shoal.sync.server import journal
from shoal.sync.server import records as r

# Seconds between two looks.
_LOOK = 0.004


def processes(root: int) -> list[tuple[int, str]]:
    """(process, its name in 15 bytes) of all that descend from `root`."""
    parents: dict[int, tuple[int, str]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                text = Path("/proc", entry, "stat").read_text()
            except OSError:
                continue  # it has ended meanwhile
            # The name is in brackets, and may have some itself.
            name, _, rest = text.partition("(")[2].rpartition(")")
            if rest.split()[0] != "Z":
                parents[int(entry)] = int(rest.split()[1]), name
    found, new = dict[int, str](), {root}
    while new:
        new = {pid for pid, (parent, _) in parents.items() if parent in new}
        found |= {pid: parents[pid][1] for pid in new}
    return sorted(found.items())


class Watch:
    """All that was ever in a journal, each with the time at which it was seen first, in seconds of time.monotonic.

    commits, rejected: records. entered: when a worker came last; incarnations: as what. copies: of shards that have
    others than at first. wrong: one sentence for each version that was there twice and not alike.
    """

    def __init__(self, path: Path):
        self.path = path
        self.commits: list[tuple[float, r.Committed]] = []
        self.rejected: list[r.Rejected] = []
        self.entered: dict[int, float] = {}
        self.incarnations: dict[int, int] = {}
        self.copies: dict[int, tuple[int, ...]] = {}
        self.wrong: list[str] = []
        self._seen: dict[int, r.Committed] = {}
        self._refused: set[r.Rejected] = set()
        self._file, self._position = -1, 0

    def since(self, when: float) -> list[tuple[float, r.Committed]]:
        """Commits that were seen after that time."""
        first = len(self.commits)
        while first and self.commits[first - 1][0] > when:
            first -= 1
        return self.commits[first:]

    def follow(self, seconds: float) -> None:
        """Looks for so long."""
        end = time.monotonic() + seconds
        while True:
            self.look()
            if time.monotonic() >= end:
                return
            time.sleep(_LOOK)

    def look(self) -> None:
        """Takes in what is new. At a checkpoint another file takes the journal's place, and repeats a part of it."""
        try:
            now = os.stat(self.path).st_ino
        except FileNotFoundError:
            return
        if self._file >= 0:
            # Up to its end, also where it is not the journal any more: open, it keeps its number.
            self._read()
        if self._file < 0 or os.fstat(self._file).st_ino != now:
            if self._file >= 0:
                os.close(self._file)
            self._file, self._position = os.open(self.path, os.O_RDONLY), len(journal.MAGIC)
            self._read()

    def _read(self) -> None:
        data = os.pread(self._file, max(0, os.fstat(self._file).st_size - self._position), self._position)
        # A record that is only half written is read again.
        records, taken = journal.decode(journal.MAGIC + data, where=str(self.path))
        self._position += taken - len(journal.MAGIC)
        for record in records:
            self._take(record, time.monotonic())

    def _take(self, record: r.AnyRecord, now: float) -> None:
        if isinstance(record, r.Committed):
            if self._seen.setdefault(record.version, record) != record:
                self.wrong.append(f"version {record.version} is two commits")
            elif not self.commits or self.commits[-1][1].version < record.version:
                self.commits.append((now, record))
        elif isinstance(record, r.Rejected):
            if record not in self._refused:
                self._refused.add(record)
                self.rejected.append(record)
        elif isinstance(record, r.Entered):
            if self.incarnations.get(record.worker) != record.incarnation:
                self.incarnations[record.worker] = record.incarnation
                self.entered[record.worker] = now
        elif isinstance(record, r.Changed):
            self.copies[record.shard] = record.copies
