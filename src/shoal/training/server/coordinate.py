"""The coordinator of a run: who takes part and what is committed, the run's metrics, its checkpoints, its end."""

from __future__ import annotations

import contextlib
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec

from shoal import device
from shoal.data.prepare import Prepared
from shoal.errors import DivergedError, RankError
from shoal.job import Job, parse, read, write
from shoal.mesh import Seat
from shoal.models.spec import count, flops_per_token
from shoal.observe import environment, metrics
from shoal.observe.peak import matmul_peak
from shoal.observe.screen import visible
from shoal.observe.show import Show
from shoal.sync.server import messages as m
from shoal.sync.server import records as r
from shoal.sync.server.coordinator import Coordinator
from shoal.sync.server.messages import COORDINATOR, Address
from shoal.sync.server.node.book import FOLDER
from shoal.sync.server.node.conduct import Conductor
from shoal.sync.server.node.journal_file import JournalFile
from shoal.sync.server.node.refusals import Refusals
from shoal.sync.server.node.station import Station
from shoal.sync.server.samples import Samples
from shoal.sync.server.staleness import token_schedule
from shoal.sync.server.standing import Standing
from shoal.training import folder as folders
from shoal.training.length import Length
from shoal.training.loop import MOST_SKIPPED
from shoal.training.server import plan
from shoal.training.server.begin import opened_at
from shoal.training.server.comings import Comings
from shoal.training.server.elsewhere import Elsewhere
from shoal.training.server.growth import Growth, Reached
from shoal.training.server.rows import Rows
from shoal.training.stop import Stop
from shoal.training.worker import length_of

# What all shards' logs may hold before a checkpoint makes them short again: bytes, but so many gradients at least, and
# at most: a shard that comes back applies them one by one.
_LOG_BYTES, _LOG_LEAST, _LOG_MOST = 1 << 30, 4, 256
# How often the last checkpoint is asked for, and seconds after which it is again though no shard was lost.
_ATTEMPTS, _LONGEST = 3, 600.0

# Seconds until it is said again for whom the run waits.
_WAITED = 300.0
# Of why somebody is refused, characters that are said: what they tell of themselves may be in it.
_WHY = 300


def main(
    seat: Seat, *, folder: str, job: str, prepared: str, nonce: str, started: float, minutes: bool, command: list[str],
    life: int,
) -> dict[str, Any]:  # fmt: skip
    """Leads a run to its end, and returns its figures. minutes: the job's length follows the workers' pace.

    nonce: of this start of the run. life: how often it was started before; then it goes on from its journal.
    """
    stop, run = Stop(), Path(folder)
    given = read(run / "job.toml") if life else parse(job)
    with contextlib.ExitStack() as ending:
        show = ending.enter_context(Show(run))
        corpus = Prepared.load(Path(prepared))
        station = ending.enter_context(plan.station(given, run, COORDINATOR, (), nonce))
        journal = JournalFile(run / FOLDER)
        ending.callback(journal.close)
        if not journal.records:
            journal.append([opened := opened_at(run, given)], durable=True)
            journal.records.append(opened)
        # Workers that take steps of their own go by the length that the job began with.
        length = length_of(given, corpus, started) if minutes and given.server.local_steps == 1 else None
        growth = Growth(given, corpus) if given.data.grow else None
        lead = _Lead(given, run, show, station, journal, stop, length, growth, again=life > 0)
        if life:
            show.say(
                f"the coordinator was started again: it goes on from its journal, version {lead.machine.version:,}"
            )
        elif lead.machine.version:
            show.say(f"goes on from version {lead.machine.version:,}: step {lead.rows.step:,}")
        folders.fill(run, given, corpus)
        world = given.layout.world if given.layout else 1
        environment.record(run, environment.collect(device.of_rank(0), world, command), show.say)
        peak = matmul_peak(device.of_rank(0), given.train.precision)
        flops = flops_per_token(given.model, given.data.sequence_length)
        show.begin(lead.rows.step, given.train.steps, lead.devices, peak, flops)
        known = {row["step"] for row in metrics.read(run)}
        for row in lead.before:
            if row["step"] not in known:
                show.keep(row)
        station.listen(given.server.host, lead.refusals, most=0)
        stop.listen()
        finished = lead.run_on()
        show.end(lead.rows.step, None)
        return {
            "job": write(lead.job), "step": lead.rows.step, "skipped": lead.skipped, "validation": None,
            "seconds": time.time() - started, "devices": world, "device": device.name(device.of_rank(0)),
            "stopped_by": "" if finished else stop.signal or "another rank", "mfu_note": show.note,
        }  # fmt: skip


def _bare(shard: int, copies: int) -> RankError:
    """For a shard that nobody holds any more."""
    what = f"all {copies} copies of server shard {shard} were lost before one of them could be replaced"
    fix = "resume the run: it goes on from its newest checkpoint; with server.copies=1, logs on a disk hold all"
    return RankError(what, fix=fix)


class _Lead:
    """What a run's coordinator does besides coordinating. rows.step: global batches that are used up."""

    def __init__(
        self, job: Job, run: Path, show: Show, station: Station, journal: JournalFile, stop: Stop,
        length: Length | None, growth: Growth | None, again: bool,
    ):  # fmt: skip
        """again: there was a coordinator of this start of the run before."""
        assert job.layout is not None
        self.job, self.run, self.show, self.station, self.journal = job, run, show, station, journal
        self.stop, self.length, self.growth = stop, length, growth
        self.skipped, self._in_a_row, self._diverged = 0, 0, ""
        self._saving: int | None = None
        self._last: int | None = None
        self._attempts, self._asked = 0, 0.0
        self._glance: m.Noted | None = None
        self._since_save = 0
        self.refusals = Refusals(show.say)
        self._comings = Comings(job.layout, job.server.lease)
        self._elsewhere = Elsewhere(run, job.server.elsewhere, time.monotonic(), came=again, again=_WAITED)
        reached = growth.reached() if growth else Reached(plan.samples(job, job.train.steps), growing=False)
        self.machine = Coordinator(
            plan.rules(job), self._rate, [job.server.copies] * job.server.shards, journal=journal.records,
            samples=reached.end, growing=reached.growing, model=plan.model_hash(job),
            tokenizer=plan.tokenizer_hash(run), now=time.monotonic(), due=self._due,
        )  # fmt: skip
        opened = self.machine.at.opened
        used = Samples(None, opened.watermark, opened.exceptions).used
        self.rows = Rows(job.train.global_batch, used, job.layout.replicas, job.model.num_experts_per_tok)
        # Steps that the journal has, and that a coordinator before this one may not have lived to tell.
        self.before: list[dict[str, Any]] = []
        for record in journal.records:
            self.rows.take(record)
            if (row := self.rows.row()) is not None:
                self.before.append(row)
        self.rows.live()
        self._saved = self.rows.step
        # A journal begins at a checkpoint that is complete.
        self._kept = self.machine.version if self.machine.version == self.machine.at.opened.version else -1
        self._times = min(_LOG_MOST, max(_LOG_LEAST, _LOG_BYTES // (4 * count(job.model))))
        self._conductor = Conductor(
            self.machine, station, journal, written=self._written, noted=self._noted, gone=self._gone,
            refused=self._turned_away,
        )  # fmt: skip

    def run_on(self) -> bool:
        """Until the samples are used up, or somebody asks it to stop; whether it was the former. All is saved then.

        Raises DivergedError.
        """
        self._conductor.run(self._step)
        at = self.machine.at
        for member in at.members.values():
            self.station.send(member.address, m.Finished(member.worker, member.incarnation))
        for address in at.copies.addresses():
            self.station.send(address, m.Over())
        if self._diverged:
            fix = f"lower optim.lr (now {self.job.optim.lr:.2g}), or train.on_nonfinite=skip"
            raise DivergedError(self._diverged, where=f"step {self.rows.step + 1}", fix=fix)
        return self.machine.at.samples.finished

    def _rate(self, samples: int) -> float:
        return token_schedule(plan.optim(self.job), self.job.train.global_batch, self.job.train.steps)(samples)

    @property
    def devices(self) -> int:
        """Ranks of all workers, with those that have joined beyond them."""
        return self._comings.devices(self.machine.at)

    # Checkpoints.

    def _due(self, at: Standing) -> bytes | None:
        """Every so many steps, and where logs have become long; one at a time."""
        step = at.samples.used // self.job.train.global_batch
        every = self.job.checkpoint.every
        self._since_save += len(at.copies.commits[-1].keys)
        regular = step // every > self._saved // every and not at.samples.finished
        long = self.job.server.copies == 1 and self._since_save > self._times
        if self._saving is not None or not (regular or long):
            return None
        return self._values(at)

    def _values(self, at: Standing) -> bytes:
        watermark, exceptions = at.samples.state()
        step = at.samples.used // self.job.train.global_batch
        self._saving, self._saved, self._since_save = at.version, step, 0
        self._asked = time.monotonic()
        values = {
            "step": step,
            "position": watermark,
            "update": {"updates": at.version},
            "sync": {
                "kind": "server",
                "exceptions": [list(used) for used in exceptions],
                "lr": self._rate(at.samples.used),
            },
            "layout": str(self.job.layout),
        }
        return msgspec.json.encode(values)

    def _noted(self, sender: Address, message: m.AnyMessage) -> None:
        if isinstance(message, m.Push):
            self.rows.pushed(message)
        elif isinstance(message, m.Noted):
            self._glance = message
        elif isinstance(message, m.Saved):
            self._was_saved(message)
        elif isinstance(message, m.Hello):
            # A shard that has come back has lost its part of what was being saved.
            self._saving = None

    def _gone(self, address: Address) -> None:
        """With a shard, its part of what is being saved may be lost."""
        if address.role == "shard":
            self._saving = None

    def _turned_away(self, address: Address, message: m.Refused) -> None:
        why = visible(message.why)[:_WHY]
        self.refusals.tell(f"{address.role} {address.number}", why, why, message.fix)

    def _was_saved(self, message: m.Saved) -> None:
        """The first shard's is of the whole checkpoint."""
        if message.version != self._saving or (message.shard > 0 and not message.error):
            return
        self._saving = None
        if message.error:
            self.show.say(f"warning: {message.error}")
            return
        self._kept = message.version
        self.journal.restart(message.version)
        self._conductor.do(self.machine.kept(message.version))

    # On the way, and the end.

    def _written(self, record: r.AnyRecord) -> None:
        self.rows.take(record)
        if isinstance(record, r.Committed):
            self._in_a_row = 0
        elif isinstance(record, r.Rejected):
            if record.reason == "not finite":
                self._not_finite(record)
        elif isinstance(record, r.Entered | r.Left):
            waited_for = self._elsewhere.waits(f"worker {record.worker}")
            if news := self._comings.news(record, self.machine.at, waited_for):
                self.show.say(news)
            self.show.compute_on(self.devices)

    def _not_finite(self, record: r.Rejected) -> None:
        what = f"loss or gradient of worker {record.key.worker} is not finite; the update was not applied"
        self.skipped += 1
        self._in_a_row += 1
        if self.job.train.on_nonfinite == "skip" and self._in_a_row < MOST_SKIPPED:
            self.show.say(f"warning: {what}; skipped")
        else:
            again = f", {MOST_SKIPPED} times in a row" if self._in_a_row == MOST_SKIPPED else ""
            self._diverged = self._diverged or what + again

    def _step(self) -> bool:
        """Between batches of events; True when all is over."""
        row = self.rows.row()
        if row is not None:
            if self._glance is not None:
                row["val_loss"], self._glance = self._glance.nats, None
            self.show.step(row)
            self._follow()
        now = time.monotonic()
        if self.job.server.elsewhere:
            self._look_around(now)
        if (shard := self.machine.bare(now)) is not None:
            raise _bare(shard, self.job.server.copies)
        if self.growth is not None and not self.machine.at.draining:
            self._grow(self.growth, now)
        if (self.stop.asked or self._diverged) and not self.machine.at.draining:
            self._conductor.do(self.machine.drain(now))
        if not self.machine.idle:
            return False
        return self._all_saved(now)

    def _look_around(self, now: float) -> None:
        """Says who has come of those that other machines start, and for whom it waits."""
        at = self.machine.at
        # Given up, a worker is missed by nobody, unless all must be there to begin, or nobody else is.
        alone = not at.over and not (at.started and at.members)
        needed = {f"server {number}" for number in range(self.job.server.shards)}
        if alone:
            needed |= {name for name in self.job.server.elsewhere if name.startswith("worker ")}
        here = {f"worker {n}" for n, member in at.members.items() if self.station.connected(member.address)}
        here |= {f"server {a.number}" for a in at.copies.addresses() if self.station.connected(a)}
        for news in self._elsewhere.news(here, needed, self.stop.asked, now):
            self.show.say(news)

    def _grow(self, growth: Growth, now: float) -> None:
        """Gives out what was appended to the store, and says when there is nothing to do and when there is again."""
        at = self.machine.at
        if (reached := growth.look(now)) is not None:
            self._conductor.do(self.machine.grow(reached.end, reached.growing, now))
        if news := growth.news(at.samples, any(member.grant is not None for member in at.members.values())):
            self.rows.pause() if growth.waits else self.rows.resume()
            self.show.say(news)

    def _all_saved(self, now: float) -> bool:
        """Asks for the last checkpoint, and again where a shard was lost meanwhile."""
        version = self.machine.version
        if self._kept == version or version == 0:
            return True
        if self._saving is not None and now - self._asked < _LONGEST:
            return False
        if self._attempts == _ATTEMPTS:
            self.show.say("warning: the last checkpoint was not saved; the journal and the logs of this run hold it")
            return True
        self._attempts += 1
        self._conductor.do(self.machine.save(self._values(self.machine.at)))
        return False

    def _follow(self) -> None:
        """The number of steps that fit, by the pace so far."""
        if self.length is None or (other := self.length.follow(self.job, self.rows.step, lambda own: own)) is None:
            return
        samples, batch = self.machine.at.samples, other.train.global_batch
        steps = max(other.train.steps, -(-samples.leased // batch))
        self.job = replace(other, train=replace(other.train, steps=steps))
        with contextlib.suppress(OSError):
            folders.write_job(self.run, self.job)
        samples.end = plan.samples(self.job, steps)
        self.show.lengthen(steps)
        if self.length.decided:
            self.show.say(f"steps that fit, by the pace so far: {steps:,}")
