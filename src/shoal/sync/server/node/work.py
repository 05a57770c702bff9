"""A worker of a parameter server: one replica, on one rank or several, that pulls weights and pushes gradients.

The first rank (the lead) talks to the coordinator and tells the others what it hears; every rank pulls and pushes its
own pieces. What several ranks hold, the one that counts it in the gradient's norm pushes.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from shoal.mesh import Mesh
from shoal.parallel.replica import Replica, Tally
from shoal.sync.server import messages as m
from shoal.sync.server.encoding import Encoder
from shoal.sync.server.messages import Address, Key, Piece, Range
from shoal.sync.server.node.client import Client
from shoal.sync.server.node.cuts import Cut, cuts, fill
from shoal.sync.server.node.lead import AGAIN, DONE, END, PULL, PUSH, REST, Command, Told, agreed, hear
from shoal.sync.server.node.needs import EMBEDDING, Needs, Words
from shoal.sync.server.node.other import Other
from shoal.sync.server.node.station import Station
from shoal.sync.server.placement import Block
from shoal.sync.server.rows import sparse_pieces
from shoal.sync.server.worker import Pushed, Worker
from shoal.sync.step import sum_within, totals_of

# Runs of rows that one message names.
_MOST_RUNS = 4096
# Seconds after which the lead tells the others that there is no news, since nobody waits for ever in a collective.
_NEWS = 20.0


@dataclass(frozen=True)
class Work:
    """What is computed next: from the weights of `version`, on these samples.

    whole: False where rows of the embedding that these samples do not read may be of earlier versions.
    """

    key: Key
    version: int
    samples: Range
    whole: bool = True


class Server:
    """`begin`, gradients on `Work.samples`, `end`; the same on all ranks of a worker, until `begin` has no more."""

    def __init__(
        self, mesh: Mesh, replica: Replica[Any], placement: Sequence[Sequence[Block]], *,
        station: Callable[[Address], Station], machine: Worker, encoder: Encoder | None = None,
        words: Words | None = None, leaving: Callable[[], bool] = lambda: False,
        say: Callable[[str], None] | None = None,
    ):  # fmt: skip
        """mesh: of this worker alone. station: for an address, one that calls coordinator and shards.

        encoder: of this rank, where the job has a codec; `machine` has a follower then. words: of the same result on
        all ranks, or None on some of them; not given, all rows of the embedding are pulled, as they are with a codec.
        leaving: whether the worker has been asked to leave; the lead's counts. say: as of `Silence`.
        """
        assert words is None or encoder is None, "a shadow moves as a whole"
        self.mesh, self.replica, self.shards = mesh, replica, len(placement)
        held = replica.held()
        self._pulls = cuts(held, placement)
        self._pushes = cuts([shard for shard in replica.shards() if shard.counted], placement)
        self._alone = mesh.world == 1
        self._encoder, self._follower = encoder, machine.follower
        machine.wanted = {n: tuple(dict.fromkeys(cut.piece for cut in found)) for n, found in self._pulls.items()}
        self._needs = Needs(machine.wanted, words, held[0].local.element_size()) if words is not None else None
        machine.rows = self._needs.of if self._needs is not None else None
        self._client: Client | None = None
        self._other: Other | None = None
        self._grant: m.Grant | None = None
        if mesh.rank == 0:
            self._client = Client(
                machine, lambda nonce: station(Address("worker", machine.number, nonce)), leaving, say
            )
        else:
            mailbox = station(Address("worker", machine.number, secrets.randbits(62)))
            self._other = Other(mailbox, mesh, machine.wanted, self._follower, self._needs)
        # From when this worker has had nothing to compute; before its first grant it waits for others to join.
        self._since: float | None = None
        self._traffic = (0, 0)
        # Of gradients that nobody waited for any more when they were to be pushed.
        self._void = m.UNKNOWN

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        if self._client is not None:
            self._client.close()
        if self._other is not None:
            self._other.station.close()

    # Pulling.

    def begin(self) -> Work | None:
        """Waits until there is work, and has its weights; None when the job, or this worker's part in it, is over.

        Raises JobError where the coordinator refuses this worker, RankError where a rank or the coordinator is gone.
        """
        while True:
            command, primaries = hear(self.mesh, self.shards, self._lead_begin)
            if command.kind == END:
                return None
            if command.kind == REST:
                self._push_rest(command.key)
            if command.kind != PULL:
                continue
            self._since = time.perf_counter() if self._since is None else self._since
            found = self._pull(command, primaries)
            if agreed(self.mesh, found):
                assert found is not None
                for shard, (pulled, tensors) in found.items():
                    fill(self._pulls[shard], pulled.pieces, tensors, pulled.rows)
                    if self._follower is None:
                        # With one, they are the rank's own copy.
                        self._mailbox.give_back(tensors)
                if self._needs is not None:
                    self._needs.filled = True
                self._waited = time.perf_counter() - self._since
                self._began = time.perf_counter()
                return Work(command.key, command.version, command.samples, bool(command.whole))
            if self._client is not None:
                assert self._grant is not None
                self._client.not_pulled(self._grant)

    def _lead_begin(self) -> Told:
        assert self._client is not None
        state = self._client.wait("pulling", "computing", "finished", timeout=None if self._alone else _NEWS)
        self._client.missing()
        if state == "finished":
            return Command(END), ()
        granted = self._client.granted()
        if granted is None:
            return Command(DONE), ()
        if granted.grant.rest:
            return Command(REST, granted.grant.key), granted.primaries
        self._grant = grant = granted.grant
        return Command(PULL, grant.key, grant.version, grant.samples, int(granted.whole)), granted.primaries

    def _pull(self, command: Command, primaries: tuple[int, ...]) -> dict[int, tuple[m.Pulled, Sequence[Any]]] | None:
        """This rank's pieces from each shard; None where they are gone, or the clock is void."""
        if self._other is not None:
            return self._other.pull(command, primaries)
        assert self._client is not None
        while self._client.wait("computing", "asking", "joining", "finished", timeout=_NEWS) == "pulling":
            self._client.missing()
        assert self._grant is not None
        return self._client.pulled(self._grant)

    # Pushing.

    def collect(self, tally: Tally) -> tuple[float, float]:
        """Leaves the gradient of all ranks' batches in the replica's shards. Returns loss and weight, summed up."""
        totals = totals_of(tally.loss_sum, tally.weight, tally.stop)
        sum_within(self.mesh, totals)
        self.replica.collect()
        self.replica.updated(self.mesh.within_replica if not self._alone else None)
        loss_sum, weight, _ = totals.tolist()
        return loss_sum, weight

    def end(
        self, work: Work, loss_sum: float, weight: float, memory_gib: float = 0.0, drift: float = 0.0,
        experts: tuple[tuple[float, ...], ...] = (),
    ) -> m.Answer | None:  # fmt: skip
        """Pushes what is in the shards' gradients: sums over `weight` tokens. Waits for the answer.

        memory_gib, drift, experts: as in `Spent`. None where nobody waits for it any more, and on all ranks but the
        first.
        """
        key, samples = work.key, work.samples
        spent = self._spent(memory_gib)._replace(drift=drift, experts=experts)
        gradients = {shard: self._gradient(found) for shard, found in self._pushes.items()}
        owes = False
        if self._encoder is not None:
            gradients = self._encoder.encode(gradients, weight, key.clock)
            owes = self._encoder.feedback
        self._since = time.perf_counter()
        pushed = self._push(key, gradients, weight, loss_sum, samples, spent, owes)
        again = spent._replace(computed=0.0, wasted=spent.wasted + spent.computed)
        self._void = m.UNKNOWN if pushed else again
        return self._client.answer(key) if self._client is not None else None

    def _push_rest(self, key: Key) -> None:
        """What the codec lost of earlier pushes, when nothing more is to be computed."""
        assert self._encoder is not None, "nothing is lost without a codec"
        gradients, weight = self._encoder.rest()
        self._push(key, gradients, weight, 0.0, m.NOTHING, m.UNKNOWN, owes=False)

    def _push(
        self, key: Key, gradients: dict[int, Pushed], weight: float, loss_sum: float, samples: Range, spent: m.Spent,
        owes: bool,
    ) -> bool:  # fmt: skip
        """One push, from its first byte to its answer. What the codec lost of it counts if it was accepted.

        False where it was void before it went out.
        """

        def push() -> Told:
            assert self._client is not None
            told = self._client.granted()
            pushed = self._client.push(key, gradients, weight, loss_sum, samples, self.mesh.world, spent, owes)
            return Command(PUSH if pushed else DONE, key), told.primaries if told else ()

        command, primaries = hear(self.mesh, self.shards, push)
        if command.kind == DONE:
            self._settle(False)
            return False
        self._stage(gradients, key, [(shard, primaries[shard]) for shard in range(self.shards)])
        while command.kind != DONE:
            command, copies = hear(self.mesh, self.shards, lambda: self._follow(key))
            if command.kind == AGAIN:
                self._stage(gradients, key, [(i, copy) for i, copy in enumerate(copies) if copy >= 0])
        self._settle(command.version > 0)
        return True

    def _settle(self, accepted: bool) -> None:
        if self._encoder is not None:
            self._encoder.settle(accepted)

    def _follow(self, key: Key) -> Told:
        """What becomes of the push, as the lead hears it; when that is over, `version` is 1 if it was accepted."""
        assert self._client is not None
        state = self._client.wait("asking", "joining", "pulling", "computing", "finished", timeout=_NEWS)
        copies = [-1] * self.shards
        for shard, copy in self._client.missing():
            copies[shard] = copy
        answer = self._client.answer(key)
        if state == "pushing" and answer is None:
            return Command(AGAIN, key), tuple(copies)
        return Command(DONE, key, int(answer is not None and answer.accepted)), ()

    def _stage(self, gradients: dict[int, Pushed], key: Key, to: Sequence[tuple[int, int]]) -> None:
        """This rank's part of a push; the lead's machine sends its own."""
        if self._other is not None:
            self._other.stage(gradients, key, to)

    def _gradient(self, found: Sequence[Cut]) -> Pushed:
        parts: list[tuple[Piece, Tensor]] = []
        for cut in found:
            assert cut.shard.grad is not None, f"{cut.shard.name} got no gradient"
            tensor = cut.of(cut.shard.grad).contiguous()
            # Of an embedding, few rows are of this batch's tokens. A codec's residuals are of whole pieces.
            rows = [(cut.piece, tensor)]
            if cut.piece.name == EMBEDDING and self._encoder is None:
                rows = sparse_pieces(cut.piece, tensor)
            parts += rows if len(rows) <= _MOST_RUNS else [(cut.piece, tensor)]
        return Pushed(tuple(piece for piece, _ in parts), tuple(tensor for _, tensor in parts))

    def _spent(self, memory_gib: float) -> m.Spent:
        """Since the push before, and on what was void since."""
        void, computed = self._void, time.perf_counter() - self._began
        sent, received = self._moved()
        return m.Spent(
            self._waited + void.waited, computed, memory_gib, sent + void.sent, received + void.received, void.wasted
        )

    @property
    def _mailbox(self) -> Station:
        """This rank's."""
        if self._client is not None:
            return self._client.station
        assert self._other is not None
        return self._other.station

    def _moved(self) -> tuple[int, int]:
        """Bytes sent and received by all ranks since it was last asked."""
        now = self._mailbox.traffic()
        moved = torch.tensor([now[0] - self._traffic[0], now[1] - self._traffic[1]], device=self.mesh.device)
        self._traffic = now
        sum_within(self.mesh, moved)
        sent, received = moved.tolist()
        return sent, received

    def note(self, message: m.Message) -> None:
        """Tells the coordinator something, from the lead."""
        if self._client is not None:
            self._client.note(message)
