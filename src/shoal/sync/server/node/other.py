"""A rank of a worker that does not lead it: exchanges its own pieces with the shards when the lead says so."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from shoal.errors import RankError
from shoal.mesh import Mesh
from shoal.sync.server import messages as m
from shoal.sync.server.follower import Follower
from shoal.sync.server.messages import Address, Key, Piece, Rows
from shoal.sync.server.node.lead import Command
from shoal.sync.server.node.needs import Needs
from shoal.sync.server.node.station import Lost, Said, Station
from shoal.sync.server.worker import Pushed

# Seconds after which a rank asks a shard again, at first and at most, and those after which it gives up.
_RETRY, _LONGEST, _PATIENCE = 1.0, 8.0, 120.0


class Other:
    """Has no state machine: what is lost on the way is asked for again here, or told again by the lead."""

    def __init__(
        self, station: Station, mesh: Mesh, wanted: Mapping[int, tuple[Piece, ...]], follower: Follower | None,
        needs: Needs | None,
    ):  # fmt: skip
        """wanted: this rank's pieces on each shard. follower: where the job has a codec. needs: where rows are pulled
        by themselves."""
        self.station, self.mesh = station, mesh
        self._wanted, self._follower, self._needs = wanted, follower, needs

    def pull(
        self, command: Command, primaries: Sequence[int]
    ) -> dict[int, tuple[m.Pulled, Sequence[Any]]] | None:  # fmt: skip
        """This rank's pieces from each shard; None where they are gone, or a connection is. Raises RankError."""
        rows = self._rows(command)
        found: dict[int, tuple[m.Pulled, Sequence[Any]]] = {}
        deadline, said, wait = time.monotonic() + _PATIENCE, float("-inf"), _RETRY / 2
        while len(found) < len(self._wanted):
            now = time.monotonic()
            if now > deadline:
                raise RankError(f"no weights of version {command.version} within {_PATIENCE:.0f} s")
            if now - said > wait:
                said, wait = now, min(2 * wait, _LONGEST)
                for shard in self._wanted.keys() - found.keys():
                    pull = self._asks(command, shard, rows.get(shard, ()))
                    self.station.send(Address("shard", shard, primaries[shard]), pull)
            event = self.station.next(_RETRY)
            if isinstance(event, Lost):
                # Its copy may be another one by now, of which the lead hears.
                return None
            if isinstance(event, Said) and getattr(event.message, "key", None) == command.key:
                if isinstance(event.message, m.Gone):
                    return None
                if not isinstance(event.message, m.Pulled) or event.message.version < command.version:
                    continue
                # Else it answers what was asked before.
                if event.message.rows == rows.get(event.message.shard, ()):
                    self._take(event.message, event.tensors, found)
        return found

    def stage(self, gradients: Mapping[int, Pushed], key: Key, to: Sequence[tuple[int, int]]) -> None:
        """This rank's part of a push. to: (shard, copy)."""
        for shard, copy in to:
            pushed = gradients[shard]
            stage = m.Stage(key, self.mesh.rank, self.mesh.world, pushed.pieces, encoded=pushed.encoded)
            self.station.send(Address("shard", shard, copy), stage, pushed.tensors)

    def _rows(self, command: Command) -> dict[int, tuple[Rows, ...]]:
        """Of which pieces rows are enough."""
        if command.whole or self._needs is None or not self._needs.has_rows:
            return {}
        return self._needs.of(command.samples) or {}

    def _asks(self, command: Command, shard: int, rows: tuple[Rows, ...]) -> m.Pull:
        wanted = self._wanted[shard]
        if self._follower is None:
            return m.Pull(command.key, command.version, wanted, rows=rows)
        chain, held = self._follower.holds(shard, wanted)
        return m.Pull(command.key, command.version, wanted, chain=chain, held=held)

    def _take(
        self, message: m.Pulled, tensors: Sequence[Any], found: dict[int, tuple[m.Pulled, Sequence[Any]]]
    ) -> None:
        """Weights from one shard; what a repeated question brought again goes nowhere."""
        if message.shard in found:
            return
        if self._follower is None:
            found[message.shard] = message, tensors
        elif (taken := self._follower.take(message, tensors, self._wanted[message.shard])) is not None:
            found[message.shard] = msgspec.structs.replace(message, pieces=taken[0], base=-1, links=()), taken[1]
