"""The coordinator: who takes part, on which samples, and which gradients become which version. No I/O, no clock.

A push is one transaction over all shards, keyed (worker, incarnation, clock): every copy of every shard stages it, the
coordinator writes the commit into its journal, and only then is anybody told.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from shoal.errors import JobError
from shoal.sync.server import messages as m
from shoal.sync.server import records as r
from shoal.sync.server.acts import Acts
from shoal.sync.server.commits import Commits
from shoal.sync.server.copies import Copy
from shoal.sync.server.decisions import as_granted, refusal
from shoal.sync.server.effects import Effect, Send
from shoal.sync.server.grants import grant
from shoal.sync.server.members import Member
from shoal.sync.server.messages import Address, Message
from shoal.sync.server.presence import Presence
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
        self.at = Standing(rules, copies, samples, journal, now, growing)
        if (job := self.at.opened.job) != model:
            raise JobError(
                f"this is the journal of model {job}, not of {model}", where="journal",
                fix="name the folder of this run",
            )  # fmt: skip
        self._acts = Acts(self.at)
        self._commits = Commits(self._acts, rate, due)
        # At the beginning of a job its shards have much to read.
        first = _FIRST if len(journal) == 1 else 1
        self.presence = Presence(self._acts, self._commits, tuple(copies), now + first * rules.lease)

    @property
    def version(self) -> int:
        """Of the latest commit."""
        return self.at.version

    @property
    def alarm(self) -> float | None:
        ends = self._commits.round.ends
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
        self.presence.tick()
        self._acts.add(self.at.copies.tick(now))
        self._commits.combine()
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
            self.presence.lost((address.number, address.copy))
        return self._done()

    def replaced(self, shard: int, copy: int, now: float) -> list[Effect]:
        """A copy that has nothing yet has been started in the place of one that is gone, though its connection may
        never have come to this coordinator: in each life of its process a copy has the number of the life before, and
        as many more as the shard has copies."""
        self.at.now = now
        self.presence.replaced(shard, copy)
        return self._done()

    def grow(self, samples: int, growing: bool, now: float) -> list[Effect]:
        """There are so many samples by now: who waits for some gets them. growing: more may come."""
        self.at.now = now
        self.at.samples.extend(samples, growing)
        return self._done()

    def bare(self, now: float) -> int | None:
        """A shard of which no copy is left, if any: what it held is gone. One that has just got all of it from the
        last of them has `retry` seconds to say so."""
        return self.presence.bare(now)

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
        self._acts.save(values)
        return self._done()

    def kept(self, version: int) -> list[Effect]:
        """A checkpoint of this version is complete."""
        self.at.copies.forget(version)
        return [Send(address, m.Kept(version)) for address in self.at.copies.addresses()]

    def _done(self) -> list[Effect]:
        """Whatever has become possible by an event, then the effects."""
        self._commits.decide()
        if not self._commits.round.pushes:
            grant(self._acts, self.rate)
        return self._acts.taken()

    # Workers.

    def _join(self, message: m.Join) -> None:
        back = Address("worker", message.worker, message.nonce)
        if (refused := refusal(message, self.model, self.tokenizer)) is not None:
            self._acts.say(back, refused)
            return
        member = self.at.members.get(message.worker)
        if member is None or member.nonce != message.nonce:
            if member is not None:
                self._give_up(member, "replaced")
            # It begins where the slowest one is, so that nobody waits for it to catch up.
            clock = min((other.clock for other in self.at.members.values()), default=0)
            incarnation = self.at.incarnations.get(message.worker, -1) + 1
            self._acts.write(r.Entered(message.worker, message.nonce, incarnation, clock, message.share))
            member = self.at.members[message.worker]
        member.heard(self.at.now + self.rules.lease)
        copies = self.at.copies
        joined = m.Joined(
            message.worker, message.nonce, member.incarnation, member.clock, copies.epoch, copies.primaries()
        )
        self._acts.say(back, joined)

    def _from_worker(self, sender: Address, message: _FromWorker) -> None:
        who = message.key if isinstance(message, m.Ask | m.Push) else message
        member = self.at.members.get(who.worker)
        if member is None or member.incarnation != who.incarnation:
            self._acts.say(sender, m.Fenced(who.worker, who.incarnation))
            return
        member.heard(self.at.now + self.rules.lease)
        if isinstance(message, m.Ask):
            self._ask(member, message)
        elif isinstance(message, m.Push):
            self._push(member, message)
        elif isinstance(message, m.Leave):
            self._give_up(member, "left")
        elif message.epoch < self.at.copies.epoch:
            self._acts.say_primaries(member)

    def _ask(self, member: Member, message: m.Ask) -> None:
        if message.key != member.key or member.push is not None:
            return
        if member.grant is not None and message.gone <= member.grant.gone:
            self._acts.say(member.address, member.grant)
        else:
            if member.asked is not None:
                # It may wait for long, for others or for text: lest it takes this for a coordinator that is gone.
                self._acts.say_primaries(member)
            member.asked = message

    def _push(self, member: Member, message: m.Push) -> None:
        if message.key != member.key:
            if member.answer is not None and member.answer.key == message.key:
                self._acts.say(member.address, member.answer)
            return
        if (member.grant is None or message.version > member.grant.version) and not self._adopt(member, message):
            return
        again, member.push = member.push is not None, message
        if not as_granted(self.at, member, message):
            self._commits.reject(member, "not as granted")
        elif self._commits.late(message):
            self._commits.reject(member, r.LATE)
        else:
            self._commits.complete(member)
            if again and member.push is not None:
                missing = {shard for shard, copy in self.at.copies.applied if (shard, copy) not in member.staged}
                self._acts.say(member.address, m.Missing(message.key, tuple(sorted(missing))))
                for shard in sorted(missing):
                    self._acts.say_copies(shard)

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
        self._acts.write(r.Granted(push.key, push.version, samples, member.peers), durable=False)
        return True

    def _give_up(self, member: Member, why: str) -> None:
        """Fences an incarnation: none of its gradients will count from now on, but those that are being summed."""
        self._acts.write(r.Left(member.worker, member.incarnation, why))
        if member.grant is not None and member.key not in self._commits.round.keys:
            self._acts.drop(member.key)
        if why != "left":
            self._acts.say(member.address, m.Fenced(member.worker, member.incarnation))

    # Shards.

    def _from_shard(self, message: _FromShard) -> None:
        copy, copies = (message.shard, message.copy), self.at.copies
        if isinstance(message, m.Hello):
            self.presence.hello(message)
        elif copy not in copies.applied:
            return
        elif isinstance(message, m.Staged):
            self._staged(copy, message)
        elif isinstance(message, m.Combined):
            if message.version == self.version + 1 and message.keys == self._commits.round.keys:
                self._commits.round.squares[copy] = message.squares
        else:
            copies.applied[copy] = max(copies.applied[copy], message.version)
            # One that has come back and follows what it missed gets the next of it at once.
            self._acts.add(copies.next(copy, self.at.now))

    def _staged(self, copy: Copy, message: m.Staged) -> None:
        member = self.at.members.get(message.key.worker)
        if member is not None and message.key == member.key:
            member.staged[copy] = message.squares
            self._commits.complete(member)
        if message.key in self._commits.round.keys:
            if copy not in self._commits.round.squares:
                # A new one, which may have all of the round now.
                self._acts.say(Address("shard", *copy), m.Combine(self.version + 1, self._commits.round.keys))
        elif member is not None and message.key == member.key:
            return
        elif (record := self.at.copies.commit_of(message.key)) is not None:
            # Never dropped, even if this copy has applied it: it may die, come back with its log, and need it again.
            self._acts.say(Address("shard", *copy), record.apply())
        else:
            self._acts.say(Address("shard", *copy), m.Drop((message.key,)))
