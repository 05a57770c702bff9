"""What launcher, fork server and ranks say to each other."""

from __future__ import annotations

import signal
from typing import Any

from msgspec import Struct

from shoal.operations import Doing

# To a rank: say what you are in with others (`Doing`). Not a message, since its main thread may read none.
ASK = signal.SIGUSR2


class Fork(Struct, tag=True):
    """Launcher to server, with an open file: fork a child that calls `entry(file, **args)`."""

    id: int
    entry: str
    args: dict[str, Any]


class Signal(Struct, tag=True):
    """Launcher to server: send a signal to a child, if it still lives."""

    id: int
    number: int


class Refused(Struct, tag=True):
    """Server to launcher: nothing can be forked, and why."""

    what: str
    fix: str


class Ended(Struct, tag=True):
    """Server to launcher: a child is gone. code: its exit code, or minus the signal that killed it."""

    id: int
    code: int


class Call(Struct, tag=True):
    """Launcher to rank: call `entry(seat, **args)`. number: of the call, which has keys of its own in the store.

    rank, world, local and neighbours: where the process sits in it.
    """

    number: int
    entry: str
    args: dict[str, Any]
    rank: int
    world: int
    local: int
    neighbours: int
    threads: int


class Returned(Struct, tag=True):
    """Rank to launcher: what the entry returned."""

    value: Any


class Failed(Struct, tag=True):
    """Rank to launcher: what the entry raised.

    kind: class of a ShoalError (then what, where and fix are its own), empty for any other exception (then
    what is the traceback). at: when, by the machine's monotonic clock. follows: it only tells that another
    rank is gone. doing: what it was in.
    """

    kind: str
    what: str
    where: str
    fix: str
    at: float
    follows: bool
    doing: Doing | None = None
