"""What outlives the simulated processes besides the journal: shards' logs, checkpoints."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from shoal.sync.server import messages as m
from shoal.sync.server.shard import ServerShard

_Entry = tuple[m.Stage | m.Backup, Sequence[Any]]
# Of a shard: the optimizer's values, tensors, as in `Held.whole`.
_Part = tuple[bytes, Sequence[Any]]


class Disk:
    """saving: the version of which there is to be a checkpoint."""

    def __init__(self) -> None:
        self.saving: int | None = None
        self.checkpoint: tuple[int, dict[int, _Part]] | None = None
        self._parts: dict[int, dict[int, _Part]] = {}
        self._logs: dict[int, dict[int, list[_Entry]]] = {}

    def log(self, shard: int, stage: m.Stage, tensors: Sequence[Any]) -> None:
        """At the end of the latest segment."""
        segments = self._logs.setdefault(shard, {0: []})
        segments[max(segments)].append((stage, tensors))

    def turn(self, shard: int, version: int, carried: Iterable[_Entry]) -> None:
        """Begins another segment."""
        segments = self._logs.setdefault(shard, {0: []})
        segments.setdefault(version, []).extend((message, tuple(tensors)) for message, tensors in carried)

    def forget(self, shard: int, version: int) -> None:
        segments = self._logs.setdefault(shard, {0: []})
        self._logs[shard] = {first: log for first, log in segments.items() if first >= min(version, max(segments))}

    def part(self, version: int, shard: int, part: _Part, shards: int) -> bool:
        """Whether the checkpoint is complete by it."""
        parts = self._parts.setdefault(version, {})
        parts[shard] = part
        if len(parts) == shards and (self.checkpoint is None or self.checkpoint[0] < version):
            self.checkpoint = version, parts
        return len(parts) == shards

    def recover(self, shard: ServerShard) -> None:
        """As a new process of a shard does: from the newest checkpoint and the log since."""
        if self.checkpoint is not None:
            version, parts = self.checkpoint
            shard.held.fill(*parts[shard.number])
            shard.version = version
        segments = self._logs.get(shard.number, {})
        since = max([first for first in segments if first <= shard.version], default=0)
        for first in sorted(segments):
            if first >= since:
                shard.recover(segments[first])
