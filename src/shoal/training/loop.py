"""The training loop."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from shoal import checkpoint, device
from shoal.checkpoint import Pending, Saver, manifest
from shoal.data.loader import Loader
from shoal.errors import DivergedError
from shoal.job import Job, shares
from shoal.observe import perfetto
from shoal.observe.traffic import traffic
from shoal.shard import State
from shoal.sync import saved
from shoal.sync.step import Applied
from shoal.training.agreement import check_agreement
from shoal.training.feed import step_batches
from shoal.training.length import Length
from shoal.training.parts import Parts
from shoal.training.stop import Stop
from shoal.training.traced import Spanning, traced
from shoal.training.validate import Validation, validate

# Tokens of a validation during training; the one at the end reads all of them.
GLANCE_TOKENS = 16_384
# Steps in a row whose update cannot be applied: so many are no bad luck.
MOST_SKIPPED = 10
# Seconds of waiting for a save after which the user hears why nothing moves.
_SLOW = 10.0


@dataclass
class Loop:
    """One run of one rank, from `step` to the job's last step or to the step after which somebody asked to stop.

    record: is given one dict a step, on every rank (rank 0 shows and stores it). say: prints one sentence.
    length: may change how many steps there are, on the way; changed: is given the job with that.
    skipped: steps whose update was not applied, since this start. trace: folder for that of step `run.trace`.
    """

    parts: Parts
    training: Loader
    validation: Loader | None
    saver: Saver
    stop: Stop
    record: Callable[[dict[str, Any]], None]
    say: Callable[[str], None]
    length: Length | None = None
    changed: Callable[[Job], None] = lambda job: None
    step: int = 0
    position: int = 0
    saved: Pending | None = None
    last: Validation | None = None
    skipped: int = 0
    trace: Path | None = None
    _in_a_row: int = 0

    def run(self) -> bool:
        """True when the run reached its last step. The state is saved in any case."""
        job = self.parts.job
        validate_every, save_every = job.train.validate_every, job.checkpoint.every
        assert validate_every > 0 < save_every
        stopped, begun, fullest = False, self.step, 0.0
        if self.length is None:
            self._warn_of_no_trace()
        while self.step < self.steps and not stopped:
            with self._watched() as span:
                row, applied = self._step(span)
            stopped = applied.stop
            self._check(applied, row)
            glance = self.step % validate_every == 0
            # The second step has gradients beside the optimizer's state, which the first one made.
            if glance or self.step in (begun + 2, self.steps):
                fullest = self.parts.mesh.largest(row["memory_gib"])
            row["memory_gib"] = fullest = max(fullest, row["memory_gib"])
            if self.validation and glance and self.step < self.steps and not stopped:
                row["val_loss"] = self._validate(glance=True).nats
            if self.validation and self.step == self.steps:
                row["val_loss"] = self._validate(glance=False).nats
            self.record(row)
            if self.step % save_every == 0 and self.step < self.steps and not stopped:
                self.save()
            if self.length and (other := self.length.follow(self.parts.job, self.step, self.parts.mesh.largest)):
                self._go_on_as(other)
        if self.length and self.step >= self.steps:
            self._warn_of_no_trace()  # only now it is known how many steps there are
        if self.validation and self.last is None and not stopped:
            self._validate(glance=False)  # a finished run that was resumed: the same figures again
        self.save()
        if self._in_vain():
            self.save()  # there is no later one to make up for it
        return self.step >= self.steps

    @property
    def steps(self) -> int:
        """Of the whole run."""
        return self.parts.job.train.steps

    def _network(self) -> dict[str, int]:
        """Bytes that this rank has sent and received so far; those to other replicas by themselves where it has
        connections of their own for that. Empty where they are not known."""
        across, counts = self.parts.mesh.across_descriptors, traffic()
        if counts is None:
            return {}
        of_them = traffic(across)
        assert of_them is not None
        return {"sent_bytes": counts.sent, "received_bytes": counts.received} | (
            {"sent_across_bytes": of_them.sent} if across else {}
        )

    @functools.cached_property
    def _plain(self) -> float:
        """Bytes that this rank would send in an all-reduce of gradients in float32 among as many replicas."""
        replicas = self.parts.mesh.layout.replicas
        return 4 * self.parts.replica.summed() * 2 * (replicas - 1) / replicas

    def _go_on_as(self, job: Job) -> None:
        """The same run with another number of steps, and the schedule of that many."""
        self.parts.job = job
        self.parts.update.reschedule(job.optim, job.train.steps)
        self.changed(job)

    def _warn_of_no_trace(self) -> None:
        """Where somebody asked for one of a step that does not come."""
        wanted = self.parts.job.run.trace
        if not wanted or self.trace is None:
            return
        if wanted > self.steps:
            self.say(f"warning: step {wanted:,} is never reached, the last one is {self.steps:,}: no trace is written")
        elif wanted <= self.step and not (self.trace / perfetto.FILE).exists():
            self.say(f"warning: step {wanted:,} was over before this start: no trace is written")

    @contextlib.contextmanager
    def _watched(self) -> Iterator[Spanning]:
        """For the step that is to be traced, a trace; gives what opens a span in it."""
        if self.trace is None or self.step + 1 != self.parts.job.run.trace:
            yield lambda name, kind: contextlib.nullcontext()
            return
        try:
            with traced(self.parts.mesh, self.trace) as tracer:
                yield tracer.span
            self.say(f"trace of step {self.step:,}: {self.trace / perfetto.FILE} (ui.perfetto.dev opens it)")
        except OSError as error:
            self.say(f"warning: the trace of step {self.step:,} was not written: {error.strerror}")

    def _step(self, span: Spanning) -> tuple[dict[str, Any], Applied]:
        """One step: data, gradients, update; and what it cost."""
        parts, mesh, sync = self.parts, self.parts.mesh, self.parts.job.sync
        start, sent = time.perf_counter(), self._network()
        with span("data", "data"):
            taking = shares.taking(sync, mesh.layout.replicas, self.step)
            batches = step_batches(self.training, mesh, self.position, taking)
        ready = time.perf_counter()
        parts.objective.step = self.step
        parts.sync.begin(self.step)
        tally = parts.replica.gradients(batches, parts.objective)
        forward = parts.objective.lap(mesh.device)
        tally.stop = self.stop.asked
        computed = time.perf_counter()
        with span("reduce and update", "compute"):
            applied = parts.sync.end(tally)
            device.synchronize(mesh.device)
        end = time.perf_counter()
        count = shares.samples(mesh.layout, sync, parts.job.train.global_batch, self.step)
        self.position = self.training.after(self.position, count)
        self.step += 1
        seconds = end - start
        row: dict[str, Any] = {
            "step": self.step,
            "loss": applied.loss_sum / applied.weight if applied.weight else float("nan"),
            "grad_norm": applied.grad_norm,
            "lr": applied.lr,
            "tokens": int(applied.tokens),
            "tokens_per_second": applied.tokens / seconds,
            "seconds": seconds,
            "memory_gib": device.memory_peak(mesh.device) / 2**30,
            "data_s": ready - start,
            "forward_s": forward,
            "backward_s": computed - ready - forward,
            "communication_s": applied.waited,
            "optimizer_s": end - computed - applied.waited,
        }
        row |= {name: now - sent[name] for name, now in self._network().items()}
        if mesh.layout.replicas > 1:
            row["plain_bytes"] = self._plain
        # Of a step that was not applied, nobody summed them up.
        if parts.replica.used is not None:
            row |= parts.replica.used.figures()
        if applied.outer is not None:
            row |= {f"outer_{name}": value for name, value in asdict(applied.outer).items()}
        if applied.waits:
            row["waited_s"] = {str(replica): seconds for replica, seconds in enumerate(applied.waits)}
        return row, applied

    def _check(self, applied: Applied, row: dict[str, Any]) -> None:
        """What `on_nonfinite` says, where the update was not applied."""
        if applied.applied:
            self._in_a_row = 0
            return
        lr = self.parts.update.rate(self.step - 1)
        whence = f"; {applied.whence}" if applied.whence else ""
        what = f"loss or gradient is not finite (gradient norm {applied.grad_norm}{whence}); the update was not applied"
        self.skipped += 1
        self._in_a_row += 1
        if self.parts.job.train.on_nonfinite == "skip" and self._in_a_row < MOST_SKIPPED:
            self.say(f"warning: step {self.step}: {what}; skipped")
            return
        self.record(row)
        again = f", {MOST_SKIPPED} times in a row" if self._in_a_row == MOST_SKIPPED else ""
        raise DivergedError(
            what + again,
            where=f"step {self.step}",
            fix=f"lower optim.lr (now {lr:.2g})" + ("" if again else ", or train.on_nonfinite=skip"),
        )

    def _validate(self, glance: bool) -> Validation:
        assert self.validation is not None
        length = self.parts.job.data.sequence_length
        limit = self.parts.job.train.validate_tokens or (GLANCE_TOKENS if glance else self.validation.samples * length)
        start = time.perf_counter()
        with self.parts.sync.agreed():
            parts = self.parts
            self.last = validate(parts.job, parts.replica, parts.objective, self.validation, max(1, limit // length))
        if self.length:
            self.length.validated(self.last.tokens, time.perf_counter() - start)
        self.parts.objective.lap(self.parts.mesh.device)
        return self.last

    def save(self) -> None:
        """Copies the state and lets the helper process write it; one that failed is told and not fatal.

        Raises DivergedError where ranks have gone apart.
        """
        if self.parts.job.sync.compare:
            replica = self.parts.replica
            check_agreement(replica.mesh, {"replicas": self.parts.sync.alike(), "tensor": replica.alike()}, self.step)
        before, self.saved = self.saved, self.saver.save(self.state(), self.step)
        # Known by now: a save waits for the one before.
        if before is not None and before.error:
            self.say(f"warning: {before.error}")

    def _in_vain(self) -> bool:
        """Waits for the save that is on its way; whether it failed, of which rank 0's helper knows for all ranks."""
        assert self.saved is not None
        if not self.saved.wait(_SLOW):
            self.say(f"the last checkpoint, of step {self.step:,}, is still being written: is the disk slow or full?")
            self.saved.wait()
        failed = self.saved.error is not None
        mesh, key = self.parts.mesh, f"in vain: {self.step}"
        if mesh.rank == 0:
            mesh.seat.store.set(key, "yes" if failed else "no")
        # However long the disk takes; if rank 0 dies, the launcher ends everybody.
        mesh.seat.store.wait([key], timedelta(days=30))
        return mesh.seat.store.get(key) == b"yes"

    def state(self) -> State:
        """Weights, optimizer, sync and the position in the data: all that the next step depends on."""
        parts = self.parts
        sync = parts.sync.state()
        # As a server saves them: samples beyond the position that are used up.
        ahead = [[first, end] for first, end in self.training.used if first > self.position]
        values = {
            "step": self.step,
            "position": self.position,
            "update": parts.update.values(),
            "sync": sync.values | ({"exceptions": ahead} if ahead else {}),
            "layout": str(parts.job.layout),
        }
        return State(sync.shards, values)

    def load(self, folder: Path) -> None:
        """Goes on from a checkpoint, of whatever layout and sync."""
        parts = self.parts
        wanted = parts.sync.wanted(manifest.read(folder))
        values = checkpoint.load(folder, wanted, verified=True)
        parts.sync.restore(values)
        if why := saved.begins_anew(values, outer=False):
            self.say(why)
        self.training.skip(values.get("sync", {}).get("exceptions", ()))
        self.step, self.position = values["step"], self.training.after(values["position"], 0)
