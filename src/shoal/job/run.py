"""Where a run keeps its files."""

from __future__ import annotations

from dataclasses import dataclass

from shoal.job.check import at_least, require


@dataclass(frozen=True)
class RunOptions:
    """The run folder holds job.toml, metrics, log, checkpoints and the report."""

    dir: str = ""
    """Folder of this run; empty = runs/<name>-<date>-<time> in the working directory."""
    name: str = "run"
    """First part of the folder's name."""
    threads: int = 0
    """Threads of each rank on CPU; 0 = cores / local ranks, at least 1. It stays 0 in job.toml: another machine has
    other cores."""

    trace: int = 0
    """Step of which trace.json is written: what every rank did when, for ui.perfetto.dev and the report. 0 = none.
    Not with sync.name=server."""

    def validate(self) -> None:
        at_least("run.trace", self.trace, 0)
        at_least("run.threads", self.threads, 0)
        most = 1024  # torch starts them all, and dies of too many
        require(self.threads <= most, f"run.threads={self.threads} is more than {most}", "0: cores / local ranks")
        plain = self.name not in ("", ".", "..") and not set(self.name) & set("/\\\0")
        require(plain, f"run.name={self.name!r} is not part of a folder's name", "e.g. quickstart")
