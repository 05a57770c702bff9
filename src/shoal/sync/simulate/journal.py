"""The coordinator's journal on a simulated disk: what of it outlives a crash, and what was ever in it."""

from __future__ import annotations

import random
from collections.abc import Sequence

from shoal.sync.server import records as r
from shoal.sync.server.journal import MAGIC, decode, encode


class Journal:
    """As `node.journal_file`. records: in the file now. history: all since the job began, but what was lost in crashes
    of the coordinator."""

    def __init__(self) -> None:
        self.records: list[r.AnyRecord] = [r.Opened("")]
        self.history = list(self.records)
        self._durable = 1
        # Of versions that are being saved: a journal's beginning from there, and where in this one what follows begins.
        self._marks: dict[int, tuple[Sequence[r.AnyRecord], int]] = {}

    def append(self, record: r.AnyRecord, durable: bool) -> None:
        self.records.append(record)
        self.history.append(record)
        if durable:
            self._durable = len(self.records)

    def mark(self, version: int, records: Sequence[r.AnyRecord]) -> None:
        """All that was appended so far leads to `version`, of which these records say the same."""
        self._marks[version] = records, len(self.records)

    def restart(self, version: int) -> None:
        """A checkpoint of `version` is complete: begins with its records, and what has followed."""
        records, position = self._marks.pop(version)
        self.records = [*records, *self.records[position:]]
        self._durable = len(self.records)

    def crash(self, rng: random.Random) -> None:
        """Leaves what was on the disk, and of the rest as many bytes as happened to be."""
        kept, torn = encode(self.records[: self._durable]), encode(self.records[self._durable :])
        data = MAGIC + kept + torn[: rng.randint(0, len(torn))]
        before, (self.records, _) = len(self.records), decode(data)
        self._durable = len(self.records)
        self.history = self.history[: len(self.history) - (before - self._durable)]
        self._marks.clear()
