"""`shoal runs`: what the runs in a folder have reached, and how they ended."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import tyro

from shoal.cli import flags
from shoal.cli.answer import Answer


@dataclass(frozen=True)
class RunsOptions:
    """Lists the runs in a folder, the latest last.

    $ shoal runs
    $ shoal runs /data/experiments --format json
    """

    folder: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="[FOLDER]")] = "runs"
    """Folder that holds run folders."""
    format: str = "text"
    """`json` prints one JSON object as the last line on standard output: `root` and `runs`."""


def run(args: list[str]) -> Answer:
    """Prints a table."""
    options = flags.parse(RunsOptions, args, "shoal runs")

    from shoal.observe.runs import find

    found = find(options.folder)
    print(found)
    return Answer(found)
