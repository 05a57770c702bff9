"""The metrics of a server job: one row for each global batch of samples that was used up, whoever computed it."""

from __future__ import annotations

import math
import time
from collections import Counter
from statistics import fmean
from typing import Any

import torch

from shoal.parallel.expert import Use, added
from shoal.sync.server import messages as m
from shoal.sync.server import records as r


class Rows:
    """Takes in pushes and the journal's records; gives a row when the samples of another step have been used up.

    loss: mean over the tokens of its commits. staleness: gradients in them that were so late, by lateness. rejected:
    gradients that were computed in vain; lost: that workers had begun when they were given up. wasted_s: seconds that
    workers computed on either, so far as they have told. All other seconds and bytes are of those gradients, too.
    outer_drift, outer_common: of workers that take steps of their own, how far these went and how far an update's
    mean did, root mean squares. How experts were used (`Use.figures`): by the commits of which workers have told.
    """

    def __init__(self, global_batch: int, used: int, workers: int, choices: int = 0):
        """used: samples, by the time that this begins. workers: of the job. choices: experts of each token."""
        self.global_batch, self.workers, self.choices = global_batch, workers, choices
        # Those that have joined beyond the job's workers, and take part.
        self._beyond: set[int] = set()
        self.step = used // global_batch
        self._used, self._version = used, 0
        # The latest of each worker, which has one at a time.
        self._said: dict[int, m.Push] = {}
        # What each has been granted and not been answered; of that what no commit since has shown to be lost or not.
        self._begun: dict[int, m.Key] = {}
        self._given_up: dict[m.Key, m.Push | None] = {}
        # Of each worker that was given up, the lost gradient that it may yet push: it was only slow.
        self._unheard: dict[int, m.Key] = {}
        self._since: float | None = None
        self._paused: float | None = None
        # Since when there has been something to compute again.
        self._resumed = -math.inf
        self._forget()

    def _forget(self) -> None:
        self._loss = self._tokens = 0.0
        self._staleness: Counter[int] = Counter()
        self._spent: dict[int, list[m.Spent]] = {}
        self._rejected = self._lost = self._commits = 0
        self._wasted = 0.0
        # Of steps of workers' own: squares of how far each push says that they went, and of what became of them.
        self._drifts: list[float] = []
        self._common: list[float] = []
        self._experts: Use | None = None
        self._last: r.Committed | None = None

    def pause(self) -> None:
        """There is nothing to compute: the time from here is no step's."""
        self._paused = time.perf_counter()

    def resume(self) -> None:
        """There is again."""
        if self._since is not None and self._paused is not None:
            self._since += time.perf_counter() - self._paused
        self._paused, self._resumed = None, time.perf_counter()

    def live(self) -> None:
        """What has been taken in was a journal of before; workers are still to come, and time counts from then on."""
        self._since = None

    def pushed(self, push: m.Push) -> None:
        """What a worker says of its push; known when it is decided on."""
        worker, said = push.key.worker, self._said.get(push.key.worker)
        if push.key in self._given_up:
            self._given_up[push.key] = push
        elif self._unheard.get(worker) == push.key:
            del self._unheard[worker]
            self._in_vain(push)
        if said is None or said.key <= push.key:
            self._said[worker] = push
        if self._since is None:
            # Workers have come one by one: time counts from when the first of them was given something to do.
            spent = push.spent
            self._since = max(self._resumed, time.perf_counter() - spent.waited - spent.computed - spent.wasted)

    def take(self, record: r.AnyRecord) -> None:
        """Follows the journal."""
        if isinstance(record, r.Committed):
            self._committed(record)
        elif isinstance(record, r.Rejected):
            self._refused(record)
        elif isinstance(record, r.Granted | r.Begun):
            grants = record.grants if isinstance(record, r.Begun) else (record,)
            # A rest is granted no samples.
            self._begun.update({each.key.worker: each.key for each in grants if each.samples.stop > each.samples.start})
        elif isinstance(record, r.Entered):
            self._beyond |= {record.worker} if record.worker >= self.workers else set()
        elif isinstance(record, r.Anew):
            self._beyond.clear()
        elif isinstance(record, r.Left):
            self._beyond.discard(record.worker)
            begun = self._begun.pop(record.worker, None)
            if begun is not None and record.why != "left":
                self._given_up[begun] = self._of(begun)

    def _of(self, key: m.Key) -> m.Push | None:
        """The push with this key. What it cost is not in the journal, and so not known of what was before a crash."""
        said = self._said.get(key.worker)
        return said if said is not None and said.key == key else None

    def _over(self, key: m.Key) -> None:
        if self._begun.get(key.worker) == key:
            del self._begun[key.worker]

    def _refused(self, record: r.Rejected) -> None:
        self._rejected += 1
        self._used += record.skipped.stop - record.skipped.start
        self._over(record.key)
        if (said := self._of(record.key)) is not None:
            self._in_vain(said)

    def _in_vain(self, push: m.Push) -> None:
        """It became no update, but its bytes were sent, and its worker had computed and waited."""
        self._spent.setdefault(push.key.worker, []).append(push.spent)
        self._wasted += push.spent.computed

    def _committed(self, record: r.Committed) -> None:
        # A rest alone is an update, and no gradient of this step.
        if any(samples.stop > samples.start for samples in record.samples):
            self._last = record
            self._common.append(record.grad_norm**2)
        self._version = record.version
        self._commits += 1
        self._loss += sum(record.losses)
        for key, late, weight, samples in zip(
            record.keys, record.staleness, record.weights, record.samples, strict=True
        ):
            self._over(key)
            if samples.stop <= samples.start:
                continue
            self._staleness[late] += 1
            self._tokens += weight
            self._used += samples.stop - samples.start
            if (said := self._of(key)) is not None:
                self._spent.setdefault(key.worker, []).append(said.spent)
                self._drifts += [said.spent.drift**2] if said.spent.drift else []
                self._add_experts(said.spent.experts)
        # What was being summed when its worker was given up is in the next commit, or never in one.
        for key, push in self._given_up.items():
            if key not in record.keys:
                self._lose(key, push)
        self._given_up.clear()

    def _add_experts(self, rows: tuple[tuple[float, ...], ...]) -> None:
        """Passes over what is no table, or another one than others have told: workers are of one model, but what they
        say of themselves is not to end the run."""
        shape = (len(rows), len(rows[0])) if rows else (0, 0)
        known = self._experts.totals_NX.shape if self._experts is not None else shape
        if not rows or any(len(row) != shape[1] for row in rows) or shape != known or shape[1] < 3:
            return
        totals_NX = torch.tensor(rows, dtype=torch.float64)
        self._experts = added(self._experts, Use(totals_NX, self.choices))

    def _lose(self, key: m.Key, push: m.Push | None) -> None:
        self._lost += 1
        if push is not None:
            self._in_vain(push)
        else:
            self._unheard[key.worker] = key

    def row(self) -> dict[str, Any] | None:
        """The metrics of the steps since the last one, once there is another."""
        step = self._used // self.global_batch
        if step == self.step or self._last is None:
            return None
        now = time.perf_counter()
        seconds = now - self._since if self._since is not None else 0.0
        self._since, self.step = now, step
        spent = [each for of_worker in self._spent.values() for each in of_worker]
        # Who has left meanwhile has had its part in this.
        workers = len({*range(self.workers), *self._beyond, *self._spent})
        row = {
            "step": step,
            "loss": self._loss / self._tokens if self._tokens else float("nan"),
            "grad_norm": self._last.grad_norm,
            "lr": self._last.lr,
            "tokens": int(self._tokens),
            "tokens_per_second": self._tokens / seconds if seconds else float("nan"),
            "seconds": seconds,
            "memory_gib": max((each.memory_gib for each in spent), default=0.0),
            "compute_s": sum(each.computed + each.wasted for each in spent) / workers,
            "communication_s": sum(each.waited for each in spent) / workers,
            "sent_bytes": sum(each.sent for each in spent),
            "received_bytes": sum(each.received for each in spent),
            "version": self._version,
            "commits": self._commits,
            "rejected": self._rejected,
            "lost": self._lost,
            "wasted_s": self._wasted + sum(each.wasted for each in spent),
            "staleness": {str(late): count for late, count in sorted(self._staleness.items())},
            "waited_s": {str(worker): sum(s.waited for s in told) for worker, told in sorted(self._spent.items())},
        }
        if self._drifts:
            row["outer_drift"] = fmean(self._drifts) ** 0.5
            row["outer_common"] = fmean(self._common) ** 0.5
        if self._experts is not None:
            row |= self._experts.figures()
        self._forget()
        return row
