"""`shoal report`: the page of a run, of whatever there is of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from shoal.cli import flags
from shoal.cli.answer import Answer
from shoal.errors import JobError, ShoalError


@dataclass(frozen=True)
class ReportOptions:
    """Writes a run's report.html again: losses, throughput, memory, and where the time of a step goes.

    $ shoal report runs/quickstart-...

    Training writes it at its end; this also works while a run goes on, and after one that failed.
    """

    run: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN")] = ""
    """Folder of a run."""
    format: str = "text"
    """`json` prints one JSON object as the last line on standard output: `run` and `report`."""


def run(args: list[str]) -> Answer:
    """Prints where the page is."""
    options = flags.parse(ReportOptions, args, "shoal report")
    if not options.run:
        raise JobError("no run is named", fix="shoal report RUN; `shoal runs` lists the runs")

    from shoal.observe.report import write

    try:
        path = write(Path(options.run))
    except OSError as error:
        fix = "make space, or copy the run to where you may write"
        raise ShoalError(f"cannot write the report: {error.strerror}", where=options.run, fix=fix) from None
    print(path)
    return Answer({"run": options.run, "report": str(path)})
