"""A growing token store as the samples of a job: how many there are by now, who waits for more, who has them first."""

from __future__ import annotations

import time
from dataclasses import dataclass

from shoal.data.loader import Loader
from shoal.data.prepare import Prepared
from shoal.errors import DataError
from shoal.job import Job
from shoal.job.server import pushed_batch
from shoal.sync.server.samples import Samples
from shoal.training.server import plan

# Seconds between two looks at the store.
_LOOK = 1.0
# Seconds in which a worker's file system must show what the coordinator's has shown already.
_SEEN = 60.0


@dataclass(frozen=True)
class Reached:
    """end: samples of the job by now. growing: there may be more."""

    end: int
    growing: bool


class Growth:
    """The coordinator's side. Samples are given out in whole rounds, one gradient of each worker: so a step is of the
    same samples whether its text was there from the beginning or came while workers waited for it (but where asp gives
    workers unequal shares). waits: for text, as `news` has told."""

    def __init__(self, job: Job, corpus: Prepared):
        self.store = corpus.folder
        self.loader = Loader(corpus, job.data, "train", job.train.global_batch, job.train.seed)
        self.round = pushed_batch(job) * job.server.local_steps
        self._last = plan.samples(job, job.train.steps) if job.train.steps else None
        self._looked = float("-inf")
        self.waits = False

    def reached(self) -> Reached:
        """By the rows that are known."""
        if self._last is not None and self.loader.samples >= self._last:
            return Reached(self._last, False)
        return Reached(self.loader.samples // self.round * self.round, True)

    def look(self, now: float) -> Reached | None:
        """Where more rows are there than before, what that makes; None otherwise. Looks once a second at most."""
        if now - self._looked < _LOOK:
            return None
        self._looked, before = now, self.reached()
        self.loader.grow()
        return found if (found := self.reached()) != before else None

    def news(self, samples: Samples, busy: bool) -> str:
        """Once when all that there is has been computed and workers wait, and once when they go on; else empty.

        busy: somebody computes.
        """
        waits = samples.dry and (self.waits or not busy)
        if waits == self.waits:
            return ""
        self.waits = waits
        rows = f"{self.loader.samples:,}"
        if not waits:
            return f"goes on: there is text up to row {rows}"
        told = f"waits for text: row {samples.used:,} of {rows}, and a round of all workers is {self.round:,}"
        return f"{told}; `shoal data append {self.store} FILE` adds more"


def wait_for(loader: Loader, stop: int, patience: float = _SEEN) -> None:
    """A worker's side: until this machine sees the rows below `stop`, which the coordinator has granted.

    Raises DataError where it does not within `patience` seconds.
    """
    deadline = time.monotonic() + patience
    while loader.samples < stop and loader.grow() < stop:
        if time.monotonic() > deadline:
            what = f"the store has {loader.samples:,} rows here, and the run is at row {stop:,} already"
            raise DataError(what, fix="all machines must see the same folder of the store")
        time.sleep(0.1)
