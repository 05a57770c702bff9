"""When the state of a run is saved, and how many of them are kept."""

from __future__ import annotations

from dataclasses import dataclass

from shoal.job.check import at_least


@dataclass(frozen=True)
class CheckpointOptions:
    """Checkpoints are written by a helper process; training waits for the copy only."""

    every: int = 0
    """Steps between checkpoints; 0 = about five times a run, of one without an end every 100. There is always one at
    the end."""
    keep: int = 2
    """Newest checkpoints that are kept; at least 1."""

    def validate(self) -> None:
        at_least("checkpoint.every", self.every, 0)
        at_least("checkpoint.keep", self.keep, 1)
