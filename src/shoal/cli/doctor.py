"""`shoal doctor`: what this machine has, how fast it is, what is wrong with it and what to do."""

from __future__ import annotations

from dataclasses import dataclass

from shoal.cli import flags
from shoal.cli.answer import Answer


@dataclass(frozen=True)
class DoctorOptions:
    """Looks at this machine, for about 15 seconds at most: versions, devices, peaks of matrix products, the link
    between two ranks. Says what is wrong and what to do."""

    format: str = "text"
    """`json` prints one JSON object as the last line on standard output: all facts and `findings`."""


def run(args: list[str]) -> Answer:
    """Prints the diagnosis."""
    flags.parse(DoctorOptions, args, "shoal doctor")

    from shoal.launch.doctor import diagnose

    diagnosis = diagnose()
    print(diagnosis)
    return Answer(diagnosis)
