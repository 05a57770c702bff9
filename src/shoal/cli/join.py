"""`shoal join`: one part of a run with a parameter server, on another machine than the run's own."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from shoal.cli import flags
from shoal.cli.answer import Answer
from shoal.errors import JobError
from shoal.job.check import positive
from shoal.job.machine import MachineOptions


@dataclass(frozen=True)
class JoinOptions(MachineOptions):
    """Takes a part in a run with a parameter server that another machine leads. Both see a folder, here /shared, that
    has the run, its prepared text and the job token; where that of the other is a copy, options here name it.

    `worker` is one more than the run has: it gets the weights of now and samples of its own, and counts from then on.
    At a first Ctrl-C or SIGTERM a worker finishes the gradient that it is at, and leaves with all that it has computed.

    $ shoal train --sync server --workers 3 --server.host 10.0.0.1 --server.token /shared/job.token
          --server.elsewhere "worker 1" "worker 2" --data.cache /shared/cache --run-dir /shared/run
                                                                               on the first machine
    $ shoal join /shared/run "worker 1"                                        on the second
    $ shoal join /shared/run worker                                            anywhere, any time: a fourth
    """

    run: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN")] = ""
    """Folder of the run, as this machine sees it."""
<<<<<<< HEAD
    part: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="PART")] = ""
    """`worker 1`, `server 0`: one of those that server.elsewhere names. `worker`: one more than the run has, which gets
    the first number that is free beyond them (`worker 3`: this one)."""
=======
    part: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="PART")] = ()
    """`worker 1`, `server 0`: one of those that server.elsewhere names, in quotes or as two words."""
>>>>>>> 1fc75f6742d7cc695957157fab51b6c62068e56c
    wait: float = 60.0
    """Seconds to wait for the run to begin."""
    format: str = "text"
    """`json` prints one JSON object as the last line on standard output: `run` and `part`, which has a number."""


def run(args: list[str]) -> Answer:
    """Returns when the run is over, or the worker has left."""
    options = flags.parse(JoinOptions, args, "shoal join")
    if not options.run or not options.part:
        raise JobError("a run and a part of it are to be named", fix="shoal join RUN 'worker 1'")
    positive("--wait", options.wait)
    part = " ".join(options.part)

    from shoal.launch.join import join

<<<<<<< HEAD
    part = join(Path(options.run), options.part, options, options.wait)
=======
    join(Path(options.run), part, options, options.wait)
>>>>>>> 1fc75f6742d7cc695957157fab51b6c62068e56c
    return Answer({"run": options.run, "part": part})
