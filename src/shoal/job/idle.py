"""Options that have an effect with some syncs, or in some modes of a server, and with others none."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from shoal.job.check import require

if TYPE_CHECKING:
    from shoal.job.job import Job

OF_SYNC = {
    "every": ("local", "gossip"),
    "outer_lr": ("local", "gossip", "server"),
    "outer_momentum": ("local", "gossip", "server"),
    "pull": ("gossip",),
    "fragments": ("local",),
    "delay": ("local",),
    "mix": ("local",),
    "together": ("local",),
    "pace": ("local",),
}
"""Options of [sync], with the names of the syncs that look at them."""

OF_MODE = {
    "staleness": ("ssp",),
    "max_staleness": ("asp", "ssp"),
    "quorum": ("quorum",),
    "grace": ("quorum",),
    "compensation": ("asp", "ssp"),
    "strength": ("asp", "ssp"),
}
"""Options of [server], with the modes that look at them."""


def refuse_idle(options: Any, known: Mapping[str, tuple[str, ...]], table: str, by: str) -> None:
    """Raises JobError for an option that is not at its default and has no effect.

    known: which values of option `by` look at which option. table: before the names in it.
    """
    value = getattr(options, by)
    for name, users in known.items():
        given, usual = getattr(options, name), getattr(type(options), name)
        what = f"{table}{name}={given} has no effect with {table}{by}={value}"
        fix = f"{table}{by} {' or '.join(users)}; else leave it out ({table}{name}={usual}, the default)"
        require(given == usual or value in users, what, fix)


def idle_here(job: Job) -> list[str]:
    """Sentences about options that do nothing in this job's layout and length, or less than who gave them may expect.
    Not of a server, whose workers push also where there is one."""
    sync, layout = job.sync, job.layout
    if layout is None or sync.name == "server":
        return []
    said: list[str] = []
    if layout.replicas == 1:
        if sync.codec not in ("none", "auto"):
            said.append(f"sync.codec={sync.codec} does nothing here: one replica has no other to send gradients to")
        if sync.name == "gossip":
            said.append("sync.name=gossip does nothing here: one replica meets no other")
        if sync.name == "local":
            said.append(f"sync.name=local with one replica: what {sync.every} steps moved is taken as one outer step")
    elif sync.name in ("local", "gossip") and 0 < job.train.steps < sync.every:
        said.append(f"sync.every={sync.every}: replicas do not meet before the end, after {job.train.steps} steps")
    return said


def without_idle(job: Job) -> Job:
    """The job with every option that has no effect with its sync at its default: of [sync] and [server], and run.trace.
    What was said for another sync is no mistake where a run goes on with this one."""
    sync, server = job.sync, job.server
    if sync.name != "server":
        server = type(server)()
    idle = [name for name, users in OF_SYNC.items() if sync.name not in users]
    if sync.name == "server" and server.local_steps == 1:
        idle += ["outer_lr", "outer_momentum"]
    unused = [name for name, users in OF_MODE.items() if server.mode not in users]
    run = _usual(job.run, ["trace"] if sync.name == "server" else [])
    return replace(job, sync=_usual(sync, idle), server=_usual(server, unused), run=run)


def _usual(options: Any, names: list[str]) -> Any:
    """With these options at their defaults."""
    return replace(options, **{name: getattr(type(options), name) for name in names})
