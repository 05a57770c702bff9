"""How the replicas are kept consistent."""

from __future__ import annotations

from dataclasses import dataclass

from shoal.job.check import one_of, positive


@dataclass(frozen=True)
class SyncOptions:
    """Replicas agree by all-reducing gradients every step."""

    name: str = "allreduce"
    """`allreduce`: every step, sums of gradients over all replicas."""
    codec: str = "none"
    """How gradients are written on their way between replicas: `none` = as they are, `bf16` or `fp16` = in half the
    bytes, rounded once on the way there and once on the way back. Sums are made in full precision."""
    feedback: bool = True
    """Whether what a codec has lost of a gradient is kept and added to the next one. That takes the bytes of a rank's
    gradients once more, and of sums one part in as many as there are replicas; of both twice as much during a step.
    Checkpoints hold it."""
    bucket_mib: float = 25.0
    """Gradients that travel together, in MiB; small buckets start early, large ones cost fewer latencies."""
    timeout: float = 600.0
    """Seconds after which a collective that does not end is an error."""

    compare: bool = True
    """Before every checkpoint, whether what several ranks hold is still equal to the last bit; if not, the run ends."""

    def validate(self) -> None:
        one_of("sync.name", self.name, ("allreduce",))
        one_of("sync.codec", self.codec, ("none", "bf16", "fp16"))
        positive("sync.bucket_mib", self.bucket_mib)
        positive("sync.timeout", self.timeout)
