"""Roles of a server job as they always run, but watched or disturbed: entries for `tests.training.server.runs`."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.torch import save_file

from shoal.mesh import Seat
from shoal.sync.server import messages as m
from shoal.sync.server import records as r
from shoal.sync.server.encoding import Encoder
from shoal.sync.server.messages import Address
from shoal.sync.server.node.journal_file import JournalFile
from shoal.sync.server.node.shard_log import ShardLog
from shoal.sync.server.node.station import Station
from shoal.sync.server.worker import Worker
from shoal.training.server import coordinate as real_coordinate
from shoal.training.server import hold as real_hold
from shoal.training.server import plan
from shoal.training.server import work as real_work
from shoal.training.server.glances import Words
from tests.training.server import midway, noted

# Beside a run's journal: what it was before each checkpoint made it short again; and what workers were told.
OLD, TOLD, SUM = "old-journal", "told", "sum"
# What is said once, because it is lost only with a connection, after which shards greet the coordinator again.
_ONCE = m.Save | m.Saved | m.Kept | m.Over


def coordinate(
    seat: Seat, *, network: dict[str, Any] | None = None, dies: list[list[int]] | None = None, **args: Any
) -> Any:  # fmt: skip
    """Keeps each journal that gives way to a shorter one.

    dies: of its first lives, [version, 0]: killed just before that commit is in the journal; [version, 1]: just after.
    """
    real, append, life = JournalFile.restart, JournalFile.append, args["life"]
    at, after = dies[life] if dies and life < len(dies) else (0, 0)

    def watched(self: JournalFile, records: Sequence[r.Record], durable: bool) -> None:
        doomed = any(isinstance(record, r.Committed) and record.version == at for record in records)
        if doomed and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        append(self, records, durable)
        if doomed:
            os.kill(os.getpid(), signal.SIGKILL)

    def restart(self: JournalFile, version: int) -> None:
        number = len(list(self.path.parent.glob(f"{OLD}-*")))
        os.link(self.path, self.path.parent / f"{OLD}-{number:03}")
        real(self, version)

    with mock.patch.multiple(JournalFile, restart=restart, append=watched), _bad(network, "coordinator"):
        return real_coordinate.main(seat, **args)


def hold(
    seat: Seat, *, network: dict[str, Any] | None = None, dies: int = 0, torn: list[list[Any]] | None = None,
    keeps: bool = False, **args: Any,
) -> Any:  # fmt: skip
    """A copy of a shard.

    dies: in its first life, killed just before so many pushes are in its log. torn: see `midway.torn`, of its first
    lives. keeps: its log stays whole when there is a checkpoint.
    """
    append, left = ShardLog.append, [dies if args["life"] == 0 else 0]

    def watched(self: ShardLog, *push: Any, **options: Any) -> None:
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        append(self, *push, **options)

    with contextlib.ExitStack() as ending:
        if keeps:
            ending.enter_context(mock.patch.object(ShardLog, "forget"))
        if torn and args["life"] < len(torn):
            ending.enter_context(midway.torn(*torn[args["life"]]))
        ending.enter_context(mock.patch.object(ShardLog, "append", watched))
        ending.enter_context(_bad(network, f"shard {args['number']} {args['copy']}"))
        return real_hold.main(seat, **args)


def work(
    seat: Seat, *, network: dict[str, Any] | None = None, rows: bool = True, stops: int = 0, apart: int = 0,
    torn: list[list[Any]] | None = None, notes: bool = False, awaits: int = 0, **args: Any,
) -> Any:  # fmt: skip
    """Writes down every answer that this worker gets: `worker incarnation clock accepted version`.

    Where there is a codec, also the sum of what each rank encodes, each gradient divided by its tokens: `name@row`.
    rows: False where it pulls all rows of embeddings, also where those of its tokens are enough. stops, apart,
    torn: see `midway`, in its first life, torn in its first lives. notes: what `noted` writes down, too.
    awaits: the number of a worker without which it does not begin its fourth gradient.
    """
    real = Worker._answered

    def answered(self: Worker, message: Any, now: float) -> None:
        new = self.state == "pushing" and message.key == self.key
        real(self, message, now)
        if new:
            with (Path(args["folder"]) / "server" / f"{TOLD}-{self.number}").open("a") as file:
                file.write(" ".join(map(str, [*message.key, int(message.accepted), message.version])) + "\n")

    encode, sums = Encoder.encode, dict[str, torch.Tensor]()

    def encoded(self: Encoder, gradients: Any, weight: float, clock: int) -> Any:
        for pushed in gradients.values():
            for piece, tensor in zip(pushed.pieces, pushed.tensors, strict=True):
                name = f"{piece.name}@{','.join(map(str, piece.offsets))}"
                sums[name] = sums.get(name, 0.0) + tensor / weight
        return encode(self, gradients, weight, clock)

    with contextlib.ExitStack() as ending:
        if not rows:
            ending.enter_context(mock.patch.object(Words, "enough", return_value=False))
        if notes:
            ending.enter_context(noted.noting(Path(args["folder"]), args["number"], seat.member))
        if args["life"] == 0 and stops:
            ending.enter_context(midway.stopped(stops))
        if args["life"] == 0 and apart:
            ending.enter_context(midway.apart(apart))
        if torn and args["life"] < len(torn):
            ending.enter_context(midway.torn(*torn[args["life"]]))
        if awaits:
            ending.enter_context(midway.awaiting(Path(args["folder"]), awaits))
        ending.enter_context(mock.patch.object(Worker, "_answered", answered))
        ending.enter_context(mock.patch.object(Encoder, "encode", encoded))
        ending.enter_context(_bad(network, f"worker {args['number']}"))
        told = real_work.main(seat, **args)
    if sums:
        save_file(sums, Path(args["folder"]) / "server" / f"{SUM}-{args['number']}-{seat.member}.safetensors")
    return told


@contextlib.contextmanager
def _bad(network: dict[str, Any] | None, who: str) -> Iterator[None]:
    """A part of this side's messages, `odds` each, is lost, comes late, or comes twice."""
    if network is None:
        yield
        return
    chance, real, rules = random.Random(f"{network['seed']} {who}"), Station.send, plan.rules

    def send(self: Station, to: Address, what: m.Message, tensors: Any = ()) -> None:
        message = to, what, tensors
        fate, odds = chance.random() if not isinstance(what, _ONCE) else 1.0, network["odds"]
        if fate < odds:
            return
        if fate < 2 * odds:
            _later(lambda: real(self, *message))
            return
        real(self, *message)
        if fate < 3 * odds:
            real(self, *message)

    impatient = mock.patch.object(plan, "rules", lambda job: replace(rules(job), retry=0.1))
    with mock.patch.object(Station, "send", send), impatient:
        yield


def _later(do: Callable[[], None]) -> None:
    timer = threading.Timer(0.03, do)
    timer.daemon = True
    timer.start()
