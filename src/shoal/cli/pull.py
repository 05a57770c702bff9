"""`shoal pull`: the weights of a run with a parameter server, while it trains."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from shoal.cli import flags
from shoal.cli.answer import Answer
from shoal.errors import JobError


@dataclass(frozen=True)
class PullOptions:
    """Writes the weights of a running server job as a checkpoint: all of one version, while the training goes on.

    $ shoal pull runs/online
    $ shoal pull runs/online --to tonight && shoal generate tonight --prompt "The"
    $ shoal ckpt export-hf tonight tonight-hf

    The folder is laid out as a run's, with a checkpoint of master weights alone: it can be generated from, shown and
    exported, but not resumed, since the optimizer's state stays with the run.
    """

    run: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN")] = ""
    """Folder of the run, on this machine or on a file system that it shares."""
    to: str = ""
    """Folder to make; must not exist. Empty = RUN/pulled/version-00000123, where the same weights may be already."""
    format: str = "text"
    """`json` prints one JSON object as the last line on standard output: `folder`, `checkpoint`, `version`, `step`,
    `position` (samples below it are used up), `new` (false: it was there already)."""


def run(args: list[str]) -> Answer:
    """Prints what was written."""
    options = flags.parse(PullOptions, args, "shoal pull")
    if not options.run:
        raise JobError("no run is named", fix="shoal pull RUN; `shoal runs` lists the runs")

    from shoal.observe import commands
    from shoal.observe.log import speaker
    from shoal.training.server.pull import pull

    pulled = pull(Path(options.run), Path(options.to) if options.to else None, speaker())
    already = "" if pulled.new else ", there already and whole"
    print(f"version {pulled.version:,}, step {pulled.step:,}: {pulled.folder}{already}")
    print(f"next: {commands.generate(pulled.folder)}")
    return Answer(pulled)
