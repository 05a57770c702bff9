"""A worker's side: asks for work, pulls weights, pushes gradients, until each push is answered. No I/O, no clock."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec

from shoal.sync.server import messages as m
from shoal.sync.server.effects import Effect, Send
from shoal.sync.server.messages import COORDINATOR, Address, Key, Message, Piece, Range, Rows
from shoal.sync.server.records import LATE

if TYPE_CHECKING:
    from shoal.sync.server.follower import Follower


# The longest wait for an answer before the question is repeated, of the shortest.
_LONGEST = 8.0


@dataclass(frozen=True)
class Pushed:
    """What one rank pushes to one shard: sums over tokens. The tensors must stay as they are until the answer.

    encoded: they are bytes of the job's codec (`encoding`).
    """

    pieces: tuple[Piece, ...]
    tensors: tuple[Any, ...]
    encoded: bool = False


class Worker:
    """One incarnation after another of one worker.

    state: `joining` → `asking` → `pulling` → `computing` → `pushing` → `asking` … until `finished`, `left`, `fenced` or
    `refused`. While `computing`, the host computes from `pulled` on `grant.samples` and then calls `push`; a grant
    without samples (`grant.rest`) asks for what is left of earlier pushes, and nothing is pulled. When `fenced`,
    everything it holds is void but what it owes, and it calls `start` again, with another nonce, or ends.

    owes: whether accepted pushes have left something that is still to be pushed. leaves: it is to `retire`.
    """

    def __init__(
        self, number: int, share: int, shards: int, *, model: str = "", tokenizer: str = "", retry: float = 1.0,
        heartbeat: float = 1.0, wanted: Mapping[int, tuple[Piece, ...]] | None = None,
        follower: Follower | None = None,
    ):  # fmt: skip
        """share: micro-batches a clock. retry, heartbeat: seconds (heartbeat: less than a third of the lease).

        wanted: pieces to pull from each shard; None = all that it holds. follower: holds them, where there is a codec.
        """
        self.number, self.share, self.shards = number, share, shards
        self.model, self.tokenizer, self.retry, self.heartbeat = model, tokenizer, retry, heartbeat
        self.wanted, self.follower = dict(wanted or {}), follower
        self.rows: Callable[[Range], Mapping[int, tuple[Rows, ...]] | None] | None = None
        """Asked once for each grant: what of its samples' pull, of each shard, are rows only; None: nothing is, on any
        rank of this worker. Not with a follower."""
        self.state = "left"
        self.nonce = self.incarnation = self.clock = 0
        self.grant: m.Grant | None = None
        self.pulled: dict[int, tuple[m.Pulled, Sequence[Any]]] = {}
        self.answer: m.Answer | None = None
        self.refused: m.Refused | None = None
        self.owes = self._will_owe = self.leaves = False
        self._rows: Mapping[int, tuple[Rows, ...]] | None = None
        self._gone = 0
        self._epoch = -1
        self._primaries: tuple[int, ...] = ()
        self._push: m.Push | None = None
        self._pushed: Mapping[int, Pushed] = {}
        self._part, self._parts = 0, 1
        self._said = self._beat = 0.0
        self._wait = retry
        self._out: list[Effect] = []

    @property
    def address(self) -> Address:
        return Address("worker", self.number, self.nonce)

    @property
    def key(self) -> Key:
        return Key(self.number, self.incarnation, self.clock)

    @property
    def whole(self) -> bool:
        """Whether all ranks pull all rows of everything for what is granted now."""
        return self._rows is None

    def start(self, nonce: int, now: float) -> list[Effect]:
        """Joins as a new incarnation. nonce: drawn at random, at least 32 bits."""
        self.nonce, self.state = nonce, "joining"
        self._forget()
        self._again(now)
        return self._effects()

    def retire(self, now: float) -> list[Effect]:
        """Begins nothing more: it finishes what it is at, pushes what it owes, and is `finished`."""
        self.leaves = True
        if self.state == "asking":
            self._again(now)
        return self._effects()

    def leave(self, now: float) -> list[Effect]:
        """Ends; what is not answered may or may not be applied."""
        self.state = "left"
        self._forget()
        return [Send(COORDINATOR, m.Leave(self.number, self.incarnation))]

    def push(
        self, gradients: Mapping[int, Pushed], weight: float, loss_sum: float, now: float, *,
        samples: Range | None = None, part: int = 0, parts: int = 1, spent: m.Spent = m.UNKNOWN, owes: bool = False,
    ) -> list[Effect]:  # fmt: skip
        """Sends the gradient of the granted samples, or of the first of them; or the rest.

        gradients: for every shard. weight: valid tokens in it. part, parts: which of the worker's ranks this is.
        spent: what it cost. owes: once it is accepted, something of it is left to be pushed.
        """
        assert self.state == "computing"
        assert self.grant is not None
        assert len(gradients) == self.shards, "every shard must hear of every push"
        self.state, self.pulled, self._pushed = "pushing", {}, gradients
        self._part, self._parts, self._will_owe = part, parts, owes
        self._push = m.Push(self.key, self.grant.version, weight, loss_sum, samples or self.grant.samples, spent)
        self._out += [self._stage(shard) for shard in range(self.shards)]
        self._again(now)
        return self._effects()

    def handle(self, message: Message, tensors: Sequence[Any], now: float) -> list[Effect]:
        """What follows from one message. Doubles and messages of earlier states change nothing."""
        if isinstance(message, m.Joined):
            self._joined(message, now)
        elif isinstance(message, m.Grant):
            self._granted(message, now)
        elif isinstance(message, m.Pulled):
            self._take(message, tensors)
        elif isinstance(message, m.Gone):
            self._gone_by(message, now)
        elif isinstance(message, m.Missing):
            if message.key == self.key and self.state == "pushing":
                self._out += [self._stage(shard) for shard in message.shards]
        elif isinstance(message, m.Answer):
            self._answered(message, now)
        elif isinstance(message, m.Primaries):
            self._moved(message)
        elif isinstance(message, m.Refused):
            if message.nonce == self.nonce and self.state == "joining":
                self.state, self.refused = "refused", message
        elif isinstance(message, m.Fenced | m.Finished):
            self._ended(message)
        return self._effects()

    def tick(self, now: float) -> list[Effect]:
        """Says that it lives, and again what was not answered: each time after twice the time, for whoever is slow
        because there is much to do must not get more of it."""
        if self.state in ("left", "fenced", "refused", "finished"):
            return []
        if self.state != "computing" and now - self._said >= self._wait:
            self._again(now, 2 * self._wait)
        elif self.state != "joining" and now - self._beat >= self.heartbeat:
            self._beat = now
            self._live()
        return self._effects()

    def lost(self) -> None:
        """A connection broke, and with it perhaps a question or an answer: asks again soon."""
        self._wait = self.retry

    def _live(self) -> None:
        """Says that it lives; learns of shards that have moved."""
        self._out.append(Send(COORDINATOR, m.Heartbeat(self.number, self.incarnation, self._epoch)))

    def _effects(self) -> list[Effect]:
        out, self._out = self._out, []
        return out

    def _again(self, now: float, wait: float = 0.0) -> None:
        """What the present state waits for an answer to. A repeated Push is answered with what is missing.

        wait: seconds until this is said once more.
        """
        self._said = self._beat = now
        self._wait = min(max(wait, self.retry), _LONGEST * self.retry)
        if self.state == "joining":
            self._out.append(Send(COORDINATOR, m.Join(self.number, self.nonce, self.share, self.model, self.tokenizer)))
        elif self.state == "asking":
            self._out.append(Send(COORDINATOR, m.Ask(self.key, self._gone, self.owes, self.leaves)))
        elif self.state == "pulling":
            self._out += [self._pull(shard) for shard in range(self.shards) if shard not in self.pulled]
            self._live()
        elif self.state == "pushing":
            assert self._push is not None
            self._out.append(Send(COORDINATOR, self._push))
            self._live()

    def _pull(self, shard: int) -> Send:
        assert self.grant is not None
        wanted = self.wanted.get(shard)
        chain, held = self.follower.holds(shard, wanted) if self.follower is not None else (m.NO_CHAIN, -1)
        pull = m.Pull(self.key, self.grant.version, wanted, chain=chain, held=held, rows=self._asked(shard))
        return Send(self._shard(shard), pull)

    def _asked(self, shard: int) -> tuple[Rows, ...]:
        return (self._rows or {}).get(shard, ())

    def _stage(self, shard: int) -> Send:
        pushed = self._pushed[shard]
        stage = m.Stage(self.key, self._part, self._parts, pushed.pieces, encoded=pushed.encoded)
        return Send(self._shard(shard), stage, pushed.tensors)

    def _shard(self, shard: int) -> Address:
        return Address("shard", shard, self._primaries[shard])

    def _joined(self, message: m.Joined, now: float) -> None:
        if self.state != "joining" or message.nonce != self.nonce:
            return
        self.incarnation, self.clock = message.incarnation, message.clock
        if message.epoch > self._epoch:
            self._epoch, self._primaries = message.epoch, message.primaries
        self._ask(now)

    def _ask(self, now: float) -> None:
        self.state = "asking"
        self._again(now)

    def _granted(self, message: m.Grant, now: float) -> None:
        if self.state == "asking" and message.key == self.key and message.gone == self._gone:
            self.state, self.grant = "computing" if message.rest else "pulling", message
            self._rows = self.rows(message.samples) if self.rows is not None and not message.rest else None
            self._again(now)

    def _take(self, message: m.Pulled, tensors: Sequence[Any]) -> None:
        if self.state != "pulling" or message.key != self.key or self.grant is None:
            return
        if message.version < self.grant.version or message.shard in self.pulled:
            return
        if message.rows != self._asked(message.shard):
            # It answers what was asked for an earlier grant.
            return
        if self.follower is not None:
            taken = self.follower.take(message, tensors, self.wanted.get(message.shard))
            if taken is None:
                return
            message, tensors = msgspec.structs.replace(message, pieces=taken[0], base=-1, links=()), taken[1]
        self.pulled[message.shard] = (message, tensors)
        if len(self.pulled) == self.shards:
            self.state = "computing"

    def _gone_by(self, message: m.Gone, now: float) -> None:
        if self.state == "pulling" and message.key == self.key and self.grant and message.version == self.grant.version:
            self._ask_again(now)

    def not_pulled(self, now: float) -> list[Effect]:
        """Another of the worker's ranks came too late for the version that was granted: asks for a newer one."""
        if self.state in ("pulling", "computing"):
            self._ask_again(now)
        return self._effects()

    def _ask_again(self, now: float) -> None:
        self._gone += 1
        self.pulled = {}
        self._ask(now)

    @property
    def primaries(self) -> tuple[int, ...]:
        """The copy of each shard to talk to, as far as is known."""
        return self._primaries

    def _answered(self, message: m.Answer, now: float) -> None:
        if self.state == "pushing" and message.key == self.key:
            assert self._push is not None
            self.answer = message
            # A rest that cannot be applied at all is given up: it would come back for ever.
            if message.accepted or (self._push.rest and message.reason != LATE):
                self.owes = self._will_owe
            self._forget()
            self.clock += 1
            self._ask(now)

    def _moved(self, message: m.Primaries) -> None:
        if message.epoch <= self._epoch:
            return
        old, self._primaries, self._epoch = self._primaries, message.copies, message.epoch
        for shard, copy in enumerate(message.copies):
            if not old or copy == old[shard]:
                continue
            if self.state == "pulling" and shard not in self.pulled:
                self._out.append(self._pull(shard))
            elif self.state == "pushing":
                self._out.append(self._stage(shard))

    def _ended(self, message: m.Fenced | m.Finished) -> None:
        if message.incarnation != self.incarnation or self.state in ("joining", "left", "refused"):
            return
        self.state = "fenced" if isinstance(message, m.Fenced) else "finished"
        self._forget()

    def _forget(self) -> None:
        self.grant, self.pulled, self._push, self._pushed, self._gone = None, {}, None, {}, 0
