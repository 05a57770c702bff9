"""How the replicas are kept consistent."""

from __future__ import annotations

from dataclasses import dataclass

from shoal.job.check import one_of, positive


@dataclass(frozen=True)
class SyncOptions:
    """Replicas agree by all-reducing gradients every step."""

    name: str = "allreduce"
    """`allreduce`: every step, sums of gradients over all replicas."""
    bucket_mib: float = 25.0
    """Gradients that travel together, in MiB; small buckets start early, large ones cost fewer latencies."""
    timeout: float = 600.0
    """Seconds after which a collective that does not end is an error."""

    def validate(self) -> None:
        one_of("sync.name", self.name, ("allreduce",))
        positive("sync.bucket_mib", self.bucket_mib)
        positive("sync.timeout", self.timeout)
