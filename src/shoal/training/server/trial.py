"""Before a job with parts on other machines begins: which codec `auto` becomes, by trying the links between them."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Collection
from pathlib import Path

from shoal.errors import JobError, RankError
from shoal.job import Job, parse
from shoal.job.server import ROUNDS
from shoal.mesh import Seat
from shoal.models.spec import parameters
from shoal.observe.log import speaker
from shoal.sync.server.messages import COORDINATOR
from shoal.sync.server.node.book import Book
from shoal.sync.server.node.trial import Echo, Here, Links, attend
from shoal.sync.server.node.trial_lead import Lead, choose
from shoal.sync.server.wire import BOTH_TLS, Connection, Credentials, NotLetIn, connect
from shoal.training.precision import stored
from shoal.training.server import plan
from shoal.training.server.elsewhere import Elsewhere
from shoal.training.settle import codecs_of

# Seconds between two looks for the lead, and those after which it is given up.
_AGAIN, _REACHED = 0.2, 60.0
# Seconds in which a lead may let nobody in because it is just ending; and until it says again for whom it waits.
_SHUT, _WAITED = 5.0, 60.0


def lead(seat: Seat, *, folder: str, job: str, life: int) -> str:
    """Waits until all parts of the job are there. Returns the codec that they shall use, and says why."""
    run, given = Path(folder), parse(job)
    assert given.layout is not None
    parts = [f"worker {n}" for n in range(given.layout.replicas)] + [f"server {n}" for n in range(given.server.shards)]
    say, far = speaker(run), given.server.elsewhere
    elsewhere = Elsewhere(run, far, time.monotonic(), came=False, again=_WAITED)

    def watch(here: Collection[str]) -> None:
        for sentence in elsewhere.news(here, far, False, time.monotonic()):
            say(sentence)

    with Lead(parts, given.server.host, plan.credentials(given, run), say, watch) as leads:
        Book(run).enter(COORDINATOR, *leads.address)
        found = choose(leads, codecs_of(given), held(given), times(given), given.sync.feedback, say)
        leads.end()
        return found


def take_part(seat: Seat, *, folder: str, job: str, part: str, host: str, until: str, life: int) -> None:
    """A worker, or a server, until links have been tried. host: where a server listens.

    until: a file; when it is gone, so is the lead.
    """
    run, given = Path(folder), parse(job)
    credentials, dtype = plan.credentials(given, run), stored(given.train.precision)
    with contextlib.ExitStack() as ending:
        here, links = Here(), None
        if part.startswith("server "):
            here = Here(*ending.enter_context(Echo(host, credentials, dtype)).address)
        else:
            links = ending.enter_context(Links(part, credentials, dtype))
        while (connection := _reach(run, credentials, part, Path(until))) is not None:
            # Where the lead is lost it is started again, or it has ended.
            with connection, contextlib.suppress(ConnectionError):
                return attend(connection, here, links)


def held(job: Job) -> list[int]:
    """Numbers that each shard holds."""
    shapes = {name: spec.shape for name, spec in parameters(job.model).items()}
    return [
        sum((block.stop - block.start) * math.prod(shapes[block.name][1:]) for block in blocks)
        for blocks in plan.placement(job)
    ]


def times(job: Job) -> int:
    """Encoded steps of the weights that come back to a worker for each push: with modes in which each push moves them,
    those of all workers; and each rank that has a part of a matrix gets the steps of all of it."""
    layout = job.layout
    assert layout is not None
    steps = 1 if job.server.mode in ROUNDS else layout.replicas
    return steps * layout.sharers * layout.tensor


def _reach(run: Path, credentials: Credentials, part: str, until: Path) -> Connection | None:
    """A connection with the lead, or None where the trial is over. JobError where it does not let this side in (another
    token, other TLS), RankError where it is not reached."""
    book, deadline, why = Book(run), time.monotonic() + _REACHED, "it has not said where it listens"
    shut = math.inf
    while until.is_file():
        if (entry := book.find(COORDINATOR)) is not None:
            try:
                return connect(
                    entry.host, entry.port, credentials=credentials, name=part, peer="coordinator", timeout=1.0
                )
            except NotLetIn as error:
                why, shut = str(error), min(shut, time.monotonic())
            except OSError as error:
                why, shut = str(error), math.inf
        if time.monotonic() - shut > _SHUT:
            raise JobError(f"the coordinator does not let {part} in: {why}", where=str(run), fix=BOTH_TLS)
        if time.monotonic() > deadline:
            fix = "let this machine connect with the run's first one (server.host)"
            raise RankError(f"{part} does not reach the coordinator: {why}", fix=fix)
        time.sleep(_AGAIN)
    return None
