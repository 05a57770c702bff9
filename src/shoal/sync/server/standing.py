"""What the coordinator is at, as it follows from its journal: nothing else changes it, so a crash loses nothing."""

from __future__ import annotations

from collections.abc import Sequence

from shoal.errors import JobError
from shoal.sync.server import messages as m
from shoal.sync.server import records as r
from shoal.sync.server.copies import Copies
from shoal.sync.server.members import Member
from shoal.sync.server.messages import Key, Range
from shoal.sync.server.rules import Rules
from shoal.sync.server.samples import Samples


class Standing:
    """members, samples, versions: after all records of the journal.

    turn: the worker that all others wait for. ready: pushes that all copies of all shards have in full, in the order in
    which they were complete; made anew after a crash, by what workers and shards say again. draining: nobody may begin
    anything any more.
    """

    def __init__(
        self, rules: Rules, copies: Sequence[int], samples: int | None, journal: Sequence[r.AnyRecord], now: float,
        growing: bool = False,
    ):  # fmt: skip
        """journal: at least an Opened. copies: of each shard, at first. samples: of the whole job, None = no end; if
        they are `growing`, so many by now."""
        first = journal[0]
        assert isinstance(first, r.Opened), "a journal begins with what was opened"
        self.rules, self.now = rules, now
        self.members: dict[int, Member] = {}
        self.incarnations: dict[int, int] = {}
        # What was leased before may lie beyond an end that has come nearer since.
        self.samples = Samples(None, first.watermark, first.exceptions)
        self.copies = Copies(copies, first.version, rules.retry, first.epoch)
        self.started = first.started
        self.ready: dict[Key, Member] = {}
        self.turn: int | None = None
        self.draining = False
        self.opened = first
        for record in journal[1:]:
            self.take(record)
        self.samples.end, self.samples.growing = samples, growing

    @property
    def version(self) -> int:
        return self.copies.version

    @property
    def over(self) -> bool:
        """Nothing more is to be computed."""
        return self.draining or self.samples.finished

    def take(self, record: r.AnyRecord) -> None:
        """Follows one record, a new one or, after a crash, an old one."""
        if isinstance(record, r.Committed):
            self._committed(record)
        elif isinstance(record, r.Granted):
            self._granted(self.members[record.key.worker], record)
        elif isinstance(record, r.Begun):
            for grant in record.grants:
                self._granted(self.members[grant.key.worker], grant)
        elif isinstance(record, r.Rejected):
            member = self.members[record.key.worker]
            self._over(member, record.answer(), record.skipped)
            if record.reason == r.LATE:
                member.came_late()
        elif isinstance(record, r.Entered):
            for member in self.members.values():
                member.peers += 1
            entered = self.members[record.worker] = Member.of(record, self.now + self.rules.lease)
            entered.peers = len(self.members) - 1
            self.incarnations[record.worker] = record.incarnation
            # Who joins beyond the job's own workers takes the place of none of them.
            own = sum(worker < self.rules.workers for worker in self.members)
            self.started = self.started or own >= self.rules.workers
        elif isinstance(record, r.Left):
            self._left(record.worker)
        elif isinstance(record, r.Anew):
            for worker in list(self.members):
                self._left(worker)
            self.started = False
        elif isinstance(record, r.Changed):
            self.copies.change(record)
        elif isinstance(record, r.Answered):
            self.members[record.answer.key.worker].answer = record.answer
        elif isinstance(record, r.Paced):
            member = self.members[record.worker]
            member.size, member.rejected, member.peers = record.size, record.rejected, record.peers
        else:
            raise JobError("a journal is opened twice", where="journal", fix="start from the last checkpoint")

    def summary(self) -> list[r.AnyRecord]:
        """A journal to begin with from here, for the checkpoint of this version: the table of answers is in it."""
        watermark, exceptions = self.samples.state()
        opened = r.Opened(self.opened.job, self.version, watermark, exceptions, self.started, self.copies.epoch)
        records: list[r.AnyRecord] = [opened]
        records += [r.Changed(shard, copies) for shard, copies in enumerate(self.copies.of_shard)]
        # Numbers of incarnations that are gone are not given out again.
        for worker, incarnation in self.incarnations.items():
            if worker not in self.members:
                records += [r.Entered(worker, 0, incarnation, 0, 1), r.Left(worker, incarnation, "left")]
        for member in self.members.values():
            records.append(r.Entered(member.worker, member.nonce, member.incarnation, member.clock, member.share))
        for member in self.members.values():
            records.append(r.Paced(member.worker, member.size, member.rejected, member.peers))
            if member.answer is not None:
                records.append(r.Answered(member.answer))
            if member.grant is not None:
                grant = member.grant
                records.append(r.Granted(grant.key, grant.version, grant.samples, member.peers, grant.gone))
        return records

    def _left(self, worker: int) -> None:
        member = self.members.pop(worker)
        if member.grant is not None:
            self.samples.give_back(member.grant.samples)
        self._forget(member)

    def _granted(self, member: Member, record: r.Granted) -> None:
        if member.grant is None:
            free = self.samples.claim(record.samples)
            assert free, f"{record.samples} is leased to another"
        elif record.samples != member.grant.samples:
            # What it could not pull, it is not to compute any more.
            self.samples.give_back(member.grant.samples)
        member.grant = m.Grant(record.key, record.version, record.samples, record.gone)
        member.asked = None
        member.peers = record.peers
        if self.turn is None and member.starved_by(record.gone):
            self.turn = member.worker

    def _committed(self, record: r.Committed) -> None:
        self.copies.add(record)
        for i, (key, samples) in enumerate(zip(record.keys, record.samples, strict=True)):
            member = self.members.get(key.worker)
            if member is not None and member.key == key:
                self._over(member, record.answer(i), samples)
                continue
            # Of a worker that was given up while its gradient was being summed.
            free = self.samples.claim(samples)
            assert free, f"{samples} went to another while it was being summed"
            self.samples.consume(samples)

    def _over(self, member: Member, answer: m.Answer, used: Range) -> None:
        """A clock ends: of the samples leased for it, some are used up, the others go back."""
        assert member.grant is not None
        start, stop = member.grant.samples
        if used.stop > used.start:
            self.samples.give_back(Range(start, used.start))
            self.samples.give_back(Range(used.stop, stop))
            self.samples.consume(used)
        else:
            self.samples.give_back(member.grant.samples)
        self._forget(member)
        member.answered(answer, len(self.members) - 1)

    def _forget(self, member: Member) -> None:
        self.ready.pop(member.key, None)
        if self.turn == member.worker:
            self.turn = None
