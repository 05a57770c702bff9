"""What the ranks of workers write down as they go."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from torch import Tensor

from shoal.mesh import Mesh
from shoal.sync.server.encoding import Encoder
from shoal.sync.server.messages import Key, Piece
from shoal.sync.server.node import work
from shoal.sync.server.node.work import Server

NOTES = "noted"


@contextmanager
def noting(folder: Path, number: int, rank: int) -> Iterator[None]:
    """Writes down of each pull of this rank what came from which shard, and whether all ranks had the same; of each
    push whether what it lost counts from then on."""
    path = folder / "server" / f"{NOTES}-{number}-{rank}"
    agreed, settle, push = work.agreed, Encoder.settle, Server._push
    at: list[Key] = []

    def note(**what: Any) -> None:
        with path.open("a") as file:
            file.write(json.dumps(what) + "\n")

    def pulled(mesh: Mesh, found: Any) -> bool:
        all_have = agreed(mesh, found)
        shards = {
            shard: [message.version, message.chain.drawn, digest(zip(message.pieces, tensors, strict=True))]
            for shard, (message, tensors) in (found or {}).items()
        }
        key = found[0][0].key if found else None
        note(what="pull", key=key, agreed=all_have, shards=shards)
        return all_have

    def pushes(self: Server, key: Key, *args: Any, **options: Any) -> bool:
        at[:] = [key]
        return push(self, key, *args, **options)

    def settles(self: Encoder, accepted: bool) -> None:
        before = self._kept
        settle(self, accepted)
        note(what="settled", key=at[0], accepted=accepted, kept=self._kept is not before)

    pulls, sends = mock.patch.object(work, "agreed", pulled), mock.patch.object(Server, "_push", pushes)
    with pulls, sends, mock.patch.object(Encoder, "settle", settles):
        yield


def notes(folder: Path, what: str) -> dict[tuple[int, int], list[dict[str, Any]]]:
    """Of a kind, by (worker, rank)."""
    found = {}
    for path in sorted((folder / "server").glob(f"{NOTES}-*")):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        number, rank = map(int, path.name.split("-")[1:])
        found[number, rank] = [line for line in lines if line["what"] == what]
    return found


def digest(parts: Iterable[tuple[Piece, Tensor]]) -> int:
    """Of weights, in whatever order they come."""
    found = 0
    for _, tensor in sorted(((piece.name, piece.offsets), tensor) for piece, tensor in parts):
        found = zlib.crc32(tensor.contiguous().numpy().tobytes(), found)
    return found
