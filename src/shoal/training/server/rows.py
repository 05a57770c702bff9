"""The metrics of a server job: one row for each global batch of samples that was used up, whoever computed it."""

from __future__ import annotations

import time
from collections import Counter
from typing import Any

from shoal.sync.server import messages as m
from shoal.sync.server import records as r


class Rows:
    """Takes in pushes, commits and rejections; gives a row when the samples of another step have been used up.

    loss: mean over the tokens of its commits. staleness: commits that were so late, by lateness. rejected: gradients
    whose work was lost. waited_s, computed_s: seconds of each worker, without those of rejected gradients.
    """

    def __init__(self, global_batch: int, used: int, workers: int):
        """used: samples, by the time that this begins."""
        self.global_batch, self.workers = global_batch, workers
        self.step = used // global_batch
        self._used, self._version = used, 0
        # The latest of each worker, which has one at a time.
        self._said: dict[int, m.Push] = {}
        self._since: float | None = None
        self._forget()

    def _forget(self) -> None:
        self._loss = self._tokens = 0.0
        self._staleness: Counter[int] = Counter()
        self._spent: dict[int, list[m.Spent]] = {}
        self._rejected = self._commits = 0
        self._last: r.Committed | None = None

    def pushed(self, push: m.Push) -> None:
        """What a worker says of its push; known when it is decided on."""
        self._said[push.key.worker] = push
        if self._since is None:
            # Workers have come one by one: time counts from when the first of them had something to do.
            self._since = time.perf_counter() - push.spent.computed

    def rejected(self, record: r.Rejected) -> None:
        """A gradient was computed in vain."""
        self._rejected += 1
        self._used += record.skipped.stop - record.skipped.start

    def committed(self, record: r.Committed) -> None:
        """Another version."""
        # A rest alone is an update, and no gradient of this step.
        if any(samples.stop > samples.start for samples in record.samples):
            self._last = record
        self._version = record.version
        self._commits += 1
        self._loss += sum(record.losses)
        for key, late, weight, samples in zip(
            record.keys, record.staleness, record.weights, record.samples, strict=True
        ):
            if samples.stop <= samples.start:
                continue
            said = self._said.get(key.worker)
            self._staleness[late] += 1
            self._tokens += weight
            self._used += samples.stop - samples.start
            # What it cost is not in the journal, and so not known of what was committed before a crash.
            if said is not None and said.key == key:
                self._spent.setdefault(key.worker, []).append(said.spent)

    def row(self) -> dict[str, Any] | None:
        """The metrics of the steps since the last one, once there is another."""
        step = self._used // self.global_batch
        if step == self.step or self._last is None:
            return None
        now = time.perf_counter()
        seconds = now - self._since if self._since is not None else 0.0
        self._since, self.step = now, step
        spent = [each for of_worker in self._spent.values() for each in of_worker]
        row = {
            "step": step,
            "loss": self._loss / self._tokens if self._tokens else float("nan"),
            "grad_norm": self._last.grad_norm,
            "lr": self._last.lr,
            "tokens": int(self._tokens),
            "tokens_per_second": self._tokens / seconds if seconds else float("nan"),
            "seconds": seconds,
            "memory_gib": max((each.memory_gib for each in spent), default=0.0),
            "compute_s": sum(each.computed for each in spent) / self.workers,
            "communication_s": sum(each.waited for each in spent) / self.workers,
            "sent_bytes": sum(each.sent for each in spent),
            "received_bytes": sum(each.received for each in spent),
            "version": self._version,
            "commits": self._commits,
            "rejected": self._rejected,
            "staleness": {str(late): count for late, count in sorted(self._staleness.items())},
            "waited_s": {str(worker): sum(s.waited for s in told) for worker, told in sorted(self._spent.items())},
        }
        self._forget()
        return row
