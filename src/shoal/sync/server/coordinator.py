"""The coordinator: who takes part, on which samples, and which gradients become which version. No I/O, no clock.

A push is one transaction over all shards, keyed (worker, incarnation, clock): every copy of every shard stages it, the
coordinator writes the commit into its journal, and only then is anybody told.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from shoal.errors import JobError
from shoal.sync.server import messages as m
from shoal.sync.server import records as r
from shoal.sync.server.copies import Copy
from shoal.sync.server.decisions import (
    as_granted,
    check_clock,
    commit,
    how_late,
    leases,
    may_begin,
    refusal,
    rests,
)
from shoal.sync.server.effects import Effect, Send, Summary, Write
from shoal.sync.server.members import Member
from shoal.sync.server.messages import Address, Key, Message, Range, Square
from shoal.sync.server.rounds import Round
from shoal.sync.server.rules import Rules
from shoal.sync.server.standing import Standing

# Leases in which a copy of a shard may say for the first time that it is there.
_FIRST = 10

_FromShard = m.Hello | m.Staged | m.Combined | m.Applied
_FromWorker = m.Leave | m.Heartbeat | m.Ask | m.Push


class Coordinator:
    """Give it every message (`handle`), the time now and then (`tick`), broken connections (`lost`); do what it says.

    Effects are to be done in order; a durable Write must be on disk before what follows it. At `alarm`, if not None,
    it wants a tick.
    """

    def __init__(
        self,
        rules: Rules,
        rate: Callable[[int], float],
        copies: Sequence[int],
        *,
        journal: Sequence[r.AnyRecord],
        samples: int | None = None,
        growing: bool = False,
        model: str = "",
        tokenizer: str = "",
        now: float = 0.0,
        due: Callable[[Standing], bytes | None] = lambda at: None,
    ):
        """rate: learning rate by samples used up so far (`staleness.token_schedule`). copies: of each shard, at first.

        journal: what the job's coordinators wrote so far, in this process or before a crash; a new one is one Opened.
        samples: of the whole job, None = no end; where they are `growing`, those that there are by now (`grow`).
        model, tokenizer: hashes that workers must have, too. due: asked at each commit whether there is to be a
        checkpoint of it: the values of its manifest, as JSON, or None.
        """
        self.rules, self.rate, self.model, self.tokenizer = rules.validate(), rate, model, tokenizer
        self.due = due
        self.at = Standing(rules, copies, samples, journal, now, growing)
        if (job := self.at.opened.job) != model:
            raise JobError(
                f"this is the journal of model {job}, not of {model}", where="journal",
                fix="name the folder of this run",
            )  # fmt: skip
        self._round = Round(rules)
        self._places = tuple(copies)
        # Shards without a copy that lives, and since when that is known.
        self._bare: dict[int, float] = {}
        self._out: list[Effect] = []
        # Copies that have not said yet that they are there, and until when they may: at the beginning of a job they
        # have much to read. And copies that were the last of a shard when their connection broke.
        self.unheard = set(self.at.copies.applied)
        self._unheard_until = now + (rules.lease if len(journal) > 1 else _FIRST * rules.lease)
        self._ends: set[Copy] = set()

    @property
    def version(self) -> int:
        """Of the latest commit."""
        return self.at.version

    @property
    def alarm(self) -> float | None:
        ends = self._round.ends
        return ends if ends is not None and ends > self.at.now else None

    # Events.

    def handle(self, sender: Address, message: Message, now: float) -> list[Effect]:
        """What follows from one message."""
        self.at.now = now
        if isinstance(message, _FromShard):
            self._from_shard(message)
        elif isinstance(message, m.Join):
            self._join(message)
        else:
            assert isinstance(message, _FromWorker), message
            self._from_worker(sender, message)
        return self._done()

    def tick(self, now: float) -> list[Effect]:
        """Gives up workers that are silent, closes rounds whose grace is over, says again what was not answered."""
        self.at.now = now
        for member in list(self.at.members.values()):
            if now >= member.until:
                self._give_up(member, "lost" if member.broken else "expired")
        if now >= self._unheard_until:
            for copy in sorted(self.unheard):
                self._lose(copy)
            self.unheard.clear()
        self._out += self.at.copies.tick(now)
        self._combine()
        return self._done()

    def lost(self, address: Address, now: float) -> list[Effect]:
        """The connection to a worker or to a copy of a shard broke."""
        self.at.now = now
        if address.role == "worker":
            member = self.at.members.get(address.number)
            if member is not None and member.nonce == address.copy:
                member.until, member.broken = min(member.until, now + self.rules.reconnect), True
                if not self.rules.reconnect:
                    self._give_up(member, "lost")
        else:
            self._lose((address.number, address.copy))
        return self._done()

    def _lose(self, lost: Copy) -> None:
        """The last copy of a shard is waited for: it comes back with its log, or one that has taken all from it."""
        shard, number = lost
        copies = self.at.copies.of_shard[shard]
        left = tuple(copy for copy in copies if copy != number)
        if not left:
            self._ends.add(lost)
        elif left != copies:
            self._change(shard, left)

    def replaced(self, shard: int, copy: int, now: float) -> list[Effect]:
        """A copy that has nothing yet has been started in the place of one that is gone, though its connection may
        never have come to this coordinator: in each life of its process a copy has the number of the life before, and
        as many more as the shard has copies."""
        self.at.now = now
        if not 0 <= shard < len(self._places):
            return []
        copies, places = self.at.copies.of_shard[shard], self._places[shard]
        gone = [other for other in copies if other < copy and (copy - other) % places == 0]
        for other in gone:
            self._lose((shard, other))
        if len(gone) == len(copies):
            self._bare.setdefault(shard, now)
        return self._done()

    def grow(self, samples: int, growing: bool, now: float) -> list[Effect]:
        """There are so many samples by now: who waits for some gets them. growing: more may come."""
        self.at.now = now
        self.at.samples.extend(samples, growing)
        return self._done()

    def bare(self, now: float) -> int | None:
        """A shard of which no copy is left, if any: what it held is gone. One that has just got all of it from the
        last of them has `retry` seconds to say so."""
        return next((shard for shard, since in self._bare.items() if now - since >= self.rules.retry), None)

    def drain(self, now: float) -> list[Effect]:
        """Nobody begins anything any more: whoever asks is told that it is over, or pushes what it owes."""
        self.at.now, self.at.draining = now, True
        return self._done()

    @property
    def idle(self) -> bool:
        """Nobody computes on anything or owes anything, every commit is applied everywhere, and nothing more can begin.

        What workers owe they alone know: where they may, all must have asked whether anything is left to do.
        """
        members = self.at.members.values()
        busy = any(member.grant or (self.rules.residuals and not member.dismissed) for member in members)
        behind = any(version < self.version for version in self.at.copies.applied.values())
        return self.at.over and not busy and not behind

    def save(self, values: bytes) -> list[Effect]:
        """Has the shards save the latest version, now."""
        self._save(values)
        return self._done()

    def kept(self, version: int) -> list[Effect]:
        """A checkpoint of this version is complete."""
        self.at.copies.forget(version)
        return [Send(address, m.Kept(version)) for address in self.at.copies.addresses()]

    def _save(self, values: bytes) -> None:
        told = m.Save(self.version, values)
        self._out.append(Summary(self.version, tuple(self.at.summary())))
        self._out += [Send(Address("shard", s, copy), told) for s, copy in enumerate(self.at.copies.primaries())]

    def _done(self) -> list[Effect]:
        """Whatever has become possible by an event, then the effects."""
        if self.rules.rounds:
            self._decide_round()
        else:
            self._decide()
        self._grant()
        out, self._out = self._out, []
        return out

    # Workers.

    def _join(self, message: m.Join) -> None:
        back = Address("worker", message.worker, message.nonce)
        if (refused := refusal(message, self.model, self.tokenizer)) is not None:
            self._say(back, refused)
            return
        member = self.at.members.get(message.worker)
        if member is None or member.nonce != message.nonce:
            if member is not None:
                self._give_up(member, "replaced")
            # It begins where the slowest one is, so that nobody waits for it to catch up.
            clock = min((other.clock for other in self.at.members.values()), default=0)
            incarnation = self.at.incarnations.get(message.worker, -1) + 1
            self._write(r.Entered(message.worker, message.nonce, incarnation, clock, message.share))
            member = self.at.members[message.worker]
        member.heard(self.at.now + self.rules.lease)
        copies = self.at.copies
        joined = m.Joined(
            message.worker, message.nonce, member.incarnation, member.clock, copies.epoch, copies.primaries()
        )
        self._say(back, joined)

    def _from_worker(self, sender: Address, message: _FromWorker) -> None:
        who = message.key if isinstance(message, m.Ask | m.Push) else message
        member = self.at.members.get(who.worker)
        if member is None or member.incarnation != who.incarnation:
            self._say(sender, m.Fenced(who.worker, who.incarnation))
            return
        member.heard(self.at.now + self.rules.lease)
        if isinstance(message, m.Ask):
            self._ask(member, message)
        elif isinstance(message, m.Push):
            self._push(member, message)
        elif isinstance(message, m.Leave):
            self._give_up(member, "left")
        elif message.epoch < self.at.copies.epoch:
            self._say(member.address, m.Primaries(self.at.copies.epoch, self.at.copies.primaries()))

    def _ask(self, member: Member, message: m.Ask) -> None:
        if message.key != member.key or member.push is not None:
            return
        if member.grant is not None and message.gone <= member.grant.gone:
            self._say(member.address, member.grant)
        else:
            if member.asked is not None:
                # It may wait for long, for others or for text: lest it takes this for a coordinator that is gone.
                told = m.Primaries(self.at.copies.epoch, self.at.copies.primaries())
                self._say(member.address, told)
            member.asked = message

    def _push(self, member: Member, message: m.Push) -> None:
        if message.key != member.key:
            if member.answer is not None and member.answer.key == message.key:
                self._say(member.address, member.answer)
            return
        if (member.grant is None or message.version > member.grant.version) and not self._adopt(member, message):
            return
        again, member.push = member.push is not None, message
        if not as_granted(self.at, member, message):
            self._reject(member, "not as granted")
        elif self._late(message):
            self._reject(member, r.LATE)
        else:
            self._complete(member)
            if again and member.push is not None:
                missing = {shard for shard, copy in self.at.copies.applied if (shard, copy) not in member.staged}
                self._say(member.address, m.Missing(message.key, tuple(sorted(missing))))
                for shard in sorted(missing):
                    self._say_copies(shard)

    def _adopt(self, member: Member, push: m.Push) -> bool:
        """The grant was written, but did not reach the disk before a crash. False if its samples are another's now."""
        samples = push.samples if member.grant is None or push.rest else member.grant.samples
        if member.grant is None:
            if not self.at.samples.claim(samples):
                self._give_up(member, "lost")
                return False
            self.at.samples.give_back(samples)
        # Nothing that was decided after a grant is on the disk without it: who was there then has been since the clock
        # began.
        self._write(r.Granted(push.key, push.version, samples, member.peers), durable=False)
        return True

    def _late(self, push: m.Push) -> bool:
        if self.rules.rounds:
            return push.version < self.version and push.key not in self._round.keys
        return self.rules.max_staleness is not None and how_late(self.at, push) > self.rules.max_staleness

    def _give_up(self, member: Member, why: str) -> None:
        """Fences an incarnation: none of its gradients will count from now on, but those that are being summed."""
        self._write(r.Left(member.worker, member.incarnation, why))
        if member.grant is not None and member.key not in self._round.keys:
            self._drop(member.key)
        if why != "left":
            self._say(member.address, m.Fenced(member.worker, member.incarnation))

    # Shards.

    def _from_shard(self, message: _FromShard) -> None:
        copy, copies = (message.shard, message.copy), self.at.copies
        if isinstance(message, m.Hello):
            self._hello(copy, message)
        elif copy not in copies.applied:
            return
        elif isinstance(message, m.Staged):
            self._staged(copy, message)
        elif isinstance(message, m.Combined):
            if message.version == self.version + 1 and message.keys == self._round.keys:
                self._round.squares[copy] = message.squares
        else:
            copies.applied[copy] = max(copies.applied[copy], message.version)
            # One that has come back and follows what it missed gets the next of it at once.
            self._out += copies.next(copy, self.at.now)

    def _hello(self, copy: Copy, message: m.Hello) -> None:
        copies = self.at.copies
        if not 0 <= message.shard < len(copies.of_shard) or not copies.base <= message.version <= self.version:
            why = f"shard {message.shard} holds version {message.version}, its journal {copies.base} to {self.version}"
            self._say(Address("shard", *copy), m.Refused(message.version, why, "start all from one checkpoint"))
            return
        self.unheard.discard(copy)
        self._ends.discard(copy)
        if copy not in copies.applied:
            left = [other for other in copies.of_shard[message.shard] if (message.shard, other) not in self._ends]
            self._change(message.shard, (*left, message.copy))
        self._bare.pop(message.shard, None)
        copies.applied[copy] = message.version
        self._out += copies.again(copy, self.at.now)

    def _staged(self, copy: Copy, message: m.Staged) -> None:
        member = self.at.members.get(message.key.worker)
        if member is not None and message.key == member.key:
            member.staged[copy] = message.squares
            self._complete(member)
        if message.key in self._round.keys:
            if copy not in self._round.squares:
                # A new one, which may have all of the round now.
                self._say(Address("shard", *copy), m.Combine(self.version + 1, self._round.keys))
        elif member is not None and message.key == member.key:
            return
        elif (record := self.at.copies.commit_of(message.key)) is not None:
            # Never dropped, even if this copy has applied it: it may die, come back with its log, and need it again.
            self._say(Address("shard", *copy), record.apply())
        else:
            self._say(Address("shard", *copy), m.Drop((message.key,)))

    def _change(self, shard: int, copies: tuple[int, ...]) -> None:
        self._write(r.Changed(shard, copies))
        self._say_copies(shard)
        told = m.Primaries(self.at.copies.epoch, self.at.copies.primaries())
        for member in list(self.at.members.values()):
            self._say(member.address, told)
            self._complete(member)

    def _say_copies(self, shard: int) -> None:
        """Lest the first of them does not know that it is, or of a new one."""
        copies = self.at.copies.of_shard[shard]
        for copy in copies:
            self._say(Address("shard", shard, copy), m.Copies(self.at.copies.epoch, copies))

    # What becomes of gradients.

    def _complete(self, member: Member) -> None:
        """Once every copy of every shard has all of the push; at its commit that is looked at again."""
        push = member.push
        if push is None or member.key in self.at.ready or not self.at.copies.applied.keys() <= member.staged.keys():
            return
        if not math.isfinite(sum(square.value for square in self._squares(member.staged))):
            self._reject(member, "not finite", push.samples)
        elif push.weight <= 0:
            self._reject(member, "no valid tokens", push.samples)
        else:
            self.at.ready[member.key] = member

    def _decide(self) -> None:
        """asp, ssp: one commit a push."""
        for member in list(self.at.ready.values()):
            push = member.push
            assert push is not None
            if self.at.turn not in (None, member.worker):
                continue
            if self._late(push):
                self._reject(member, r.LATE)
            elif self.at.copies.holds(member.staged):
                self._commit((push,), self._squares(member.staged))

    def _decide_round(self) -> None:
        """bsp, quorum: one commit a round."""
        if not self._round.pushes and self._round.closes(self.at):
            self._round.close(self.at)
            self._combine()
        if not self._round.pushes or not self.at.copies.holds(self._round.squares):
            return
        self._commit(self._round.pushes, self._squares(self._round.squares))
        self._round = Round(self.rules)
        for member in list(self.at.members.values()):
            if member.push is not None and self._late(member.push):
                self._reject(member, r.LATE)

    def _combine(self) -> None:
        """Asks for the sum of a round's gradients where it is not known yet."""
        if self._round.pushes:
            told = m.Combine(self.version + 1, self._round.keys)
            unknown = self.at.copies.applied.keys() - self._round.squares.keys()
            self._out += [Send(Address("shard", *copy), told) for copy in sorted(unknown)]

    def _squares(self, of_copies: dict[Copy, tuple[Square, ...]]) -> list[Square]:
        """Of the shards' first copies, in the order in which one process would add them up: by name and row."""
        primaries = enumerate(self.at.copies.primaries())
        return sorted(square for shard, copy in primaries for square in of_copies[shard, copy])

    def _commit(self, pushes: tuple[m.Push, ...], squares: list[Square]) -> None:
        """Journal first; shards and workers learn of it from the effects after it."""
        record = commit(self.at, self.rate, pushes, squares)
        self._write(record)
        self._out += self.at.copies.send(record, self.at.now)
        if (values := self.due(self.at)) is not None:
            self._save(values)
        for i, key in enumerate(record.keys):
            member = self.at.members.get(key.worker)
            if member is not None and member.incarnation == key.incarnation:
                self._say(member.address, record.answer(i))

    def _reject(self, member: Member, reason: str, skipped: Range = m.NOTHING) -> None:
        assert member.push is not None
        record = r.Rejected(member.key, self.version, self.version - member.push.version, reason, skipped)
        self._write(record)
        self._drop(record.key)
        self._say(member.address, record.answer())

    def _drop(self, key: Key) -> None:
        """After the journal has it, never before: bytes that are gone cannot be committed any more."""
        self._out += [Send(address, m.Drop((key,))) for address in self.at.copies.addresses()]

    # What workers may begin.

    def _grant(self) -> None:
        if self._round.pushes:
            return
        self._dismiss()
        if self.at.over:
            self._begin_rests()
            return
        if self.rules.mode == "bsp":
            for member in [each for each in self.at.members.values() if each.asked and each.grant]:
                # One of the round that goes on could not pull: the others wait for it, not it for them.
                self._give(member)
            self._begin(may_begin(self.at))
            return
        for member in may_begin(self.at):
            if self.at.turn in (None, member.worker) or not member.starved:
                self._give(member)
        if self.at.samples.dry and not any(member.grant for member in self.at.members.values()):
            # While there is no text, nobody is getting nearer to whom ssp holds back.
            for member in [each for each in self.at.members.values() if each.asked and each.asked.leaves]:
                self._give(member)

    def _dismiss(self) -> None:
        """Lets those go that are to compute nothing more and owe nothing, or for nothing: at a rate of 0, with which
        schedules end, a rest moves no weight."""
        for member in list(self.at.members.values()):
            asked, over = member.asked, self.at.over
            owes = asked is not None and asked.owes and not (over and self.rate(self.at.samples.used) == 0)
            if asked is not None and not owes and (over or asked.leaves):
                self._say(member.address, m.Finished(member.worker, member.incarnation))
                member.asked, member.dismissed = None, True

    def _begin_rests(self) -> None:
        """There is nothing more to compute: whoever owes something pushes that."""
        if grants := rests(self.at):
            self._write(r.Begun(grants))
        for grant in grants:
            self._say_grant(self.at.members[grant.key.worker])

    def _begin(self, asked: list[Member]) -> None:
        """bsp: all begin together, and get their samples in the order of their numbers."""
        grants = leases(self.at, asked)
        if grants:
            self._write(r.Begun(grants))
        for member in asked:
            self._say_grant(member)

    def _give(self, member: Member) -> None:
        """asp, ssp, quorum: a lease that is forgotten in a crash costs work, no more, so it need not be on disk.

        But for dc: of whom nobody knows that he computes on these weights, they are not kept.
        """
        assert member.asked is not None
        gone = member.asked.gone
        samples = member.grant.samples if member.grant is not None else None
        if member.asked.leaves:
            samples = m.NOTHING
        elif samples is None and (samples := self.at.samples.lease(member.size * self.rules.micro_batch)) is not None:
            self.at.samples.give_back(samples)
        if samples is not None:
            if not member.asked.leaves:
                check_clock(self.at, member)
            peers = len(self.at.members) - 1
            durable = self.rules.compensation == "dc"
            self._write(r.Granted(member.key, self.version, samples, peers, gone), durable)
        self._say_grant(member)

    def _say_grant(self, member: Member) -> None:
        """Where there are no samples for it, but others' may yet come back, it waits."""
        if member.grant is not None:
            self._say(member.address, member.grant)

    def _write(self, record: r.AnyRecord, durable: bool = True) -> None:
        self._out.append(Write(record, durable=durable))
        self.at.take(record)

    def _say(self, to: Address, message: Message) -> None:
        self._out.append(Send(to, message))
