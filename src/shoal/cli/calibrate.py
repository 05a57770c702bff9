"""`shoal calibrate`: measures this machine, for predictions of what runs here."""

from __future__ import annotations

from dataclasses import dataclass

from shoal.cli import flags
from shoal.cli.answer import Answer


@dataclass(frozen=True)
class CalibrateOptions:
    """Measures matrix products, memory, attention, launching and collectives of this machine with 1, 2, … ranks
    computing at once, and writes an entry. Nothing else should compute here meanwhile."""

    ranks: int = 4
    """Most ranks to measure; 1, 2, 4, … up to it are measured too. On GPUs not more than there are."""
    seconds: float = 60.0
    """That all of it may take, 5 or more."""
    out: str = ""
    """File to write; empty = ~/.cache/shoal/machine.toml (or in $XDG_CACHE_HOME/shoal), where predictions look."""
    format: str = "text"
    """`json` prints one JSON object as the last line on standard output: `file` and `entry`."""


def run(args: list[str]) -> Answer:
    """Measures, writes, and says what was found."""
    options = flags.parse(CalibrateOptions, args, "shoal calibrate")

    from shoal.launch.calibrate import calibrate, summary

    entry, path = calibrate(options.ranks, options.seconds, options.out, say=lambda line: print(line, flush=True))
    print(summary(entry))
    print(f"written to {path}")
    return Answer({"file": str(path), "entry": entry})
