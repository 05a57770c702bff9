"""Workers that come and go: what whoever watches the run is told of them, and on how many devices it computes."""

from __future__ import annotations

from shoal.job import Layout
from shoal.sync.server import records as r
from shoal.sync.server.standing import Standing


class Comings:
    """Follows the journal from the time that this coordinator writes it. lost: workers that it has seen go."""

    def __init__(self, layout: Layout, lease: float):
        """layout: of the job, whose replicas are its own workers. lease: seconds."""
        self.layout, self.lease = layout, lease
        self.lost: set[int] = set()

    def news(self, record: r.AnyRecord, at: Standing, waited_for: bool = False) -> str:
        """A sentence, or nothing. at: after the record. waited_for: somebody else says that this worker is back."""
        if isinstance(record, r.Left):
            return self._left(record, at)
        if not isinstance(record, r.Entered):
            return ""
        name = f"worker {record.worker}"
        if record.worker in self.lost:
            return "" if waited_for else f"{name} has joined again"
        if record.worker < self.layout.replicas:
            return ""
        return f"{name} has joined, beyond the job's {self.layout.replicas}: with it {len(at.members)} take part"

    def devices(self, at: Standing) -> int:
        """Of all the job's own workers, also where one is lost, and of those that take part beyond them."""
        beyond = sum(worker >= self.layout.replicas for worker in at.members)
        return self.layout.world + beyond * self.layout.ranks_per_replica

    def _left(self, record: r.Left, at: Standing) -> str:
        if record.why in ("lost", "expired"):
            self.lost.add(record.worker)
            why = "its connection broke" if record.why == "lost" else f"silent for {self.lease:g} s"
            return f"worker {record.worker} is given up ({why}); the others go on"
        if record.why == "left" and not at.over:
            self.lost.add(record.worker)
            return f"worker {record.worker} has left"
        return ""
