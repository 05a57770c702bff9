"""The launcher's side of ranks and their store: start them, call, listen, signal, stop."""

from __future__ import annotations

import contextlib
import selectors
import signal
import socket
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

from shoal.errors import RankError
from shoal.launch import store
from shoal.launch.channel import Channel
from shoal.launch.cores import threads_per_rank
from shoal.launch.messages import Call, Ended, Failed, Returned
from shoal.launch.processes import ForkServer
from shoal.operations import Doing

# What runs in every rank and store; ranks find it imported.
_PRELOAD = ("shoal.launch.store", "shoal.launch.rank", "torch.distributed.fsdp", "torch._dynamo")
# Seconds that killed processes may take to be gone, and that ranks may take to end by themselves.
_KILLED, _ENDING = 2.0, 5.0

Event = tuple[int, Returned | Failed | Ended | Doing]


@dataclass
class _Rank:
    id: int
    channel: Channel


class Ranks:
    """Ranks 0, 1, …: forked when a call first needs them, and again after a call in which one failed.

    `start` and `send` are for a single group that has all of them. Who wants several beside each other forks processes
    under numbers of its own and makes a group of some with `ask`.
    """

    def __init__(self, preload: Sequence[str] = ()):
        """preload: modules that the ranks will need; imported once, before the first fork."""
        self.server = ForkServer([*_PRELOAD, *preload])
        self.selector = selectors.DefaultSelector()
        self.selector.register(self.server.channel, selectors.EVENT_READ)
        self.alive: dict[int, _Rank] = {}
        self._store: int | None = None
        self._port = 0
        self._calls = 0

    def watch(self, sock: socket.socket, callback: Callable[[], None]) -> None:
        """Calls back from `events` when there is something to read."""
        self.selector.register(sock, selectors.EVENT_READ, callback)

    def start(self, world: int) -> None:
        """Forks the ranks below `world` that are not alive, and all where the store is not."""
        self.events(0)
        if self._store is None:
            self.stop()
            with store.listen() as sock:
                self._port = sock.getsockname()[1]
                self._store = self.server.fork("shoal.launch.store:main", {}, sock)
        for rank in range(world):
            if rank not in self.alive:
                self.fork(rank, f"shoal-rank-{rank}")

    def fork(self, rank: int, name: str) -> None:
        """A process under this number, which nobody alive has; the store is there. name: as `ps -o comm` shows it."""
        ours, theirs = socket.socketpair()
        with theirs:
            id = self.server.fork("shoal.launch.rank:main", {"name": name, "port": self._port}, theirs)
        self.alive[rank] = _Rank(id, Channel(ours, Returned | Failed | Doing))
        self.selector.register(self.alive[rank].channel, selectors.EVENT_READ, rank)

    def forget(self, sock: socket.socket) -> None:
        """Ends a `watch`."""
        self.selector.unregister(sock)

    def send(self, entry: str, args: dict[str, Any], world: int, threads: int) -> None:
        """Asks ranks 0 … world - 1 to call `entry(seat, **args)`; their answers come as events."""
        self.start(world)
        self.ask(range(world), entry, args, threads_per_rank(threads, world), 0, world)

    def ask(
        self, group: Sequence[int], entry: str, args: dict[str, Any], threads: int, first: int, neighbours: int
    ) -> None:
        """As `send`, of these processes, which are ranks 0, 1, … of a group with keys of its own in the store.

        first: index on this node of the first of them. neighbours: ranks on this node, other groups' too.
        """
        self._calls += 1
        for rank, process in enumerate(group):
            order = Call(self._calls, entry, args, rank, len(group), first + rank, neighbours, threads)
            # One that has died meanwhile is reported by the server.
            with contextlib.suppress(OSError):
                self.alive[process].channel.send(order)

    def signal(self, number: signal.Signals, ranks: Collection[int] | None = None) -> None:
        """Sends a signal to these ranks (default: all) as far as they are alive."""
        for rank, process in self.alive.items():
            if ranks is None or rank in ranks:
                self.server.signal(process.id, number)

    def events(self, timeout: float | None) -> list[Event]:
        """What ranks have said and who has ended, in this order; waits for at most `timeout` seconds.

        RankError if the server is gone, and with it all ranks.
        """
        said: list[Event] = []
        ended: list[Ended] = []
        callbacks: list[Callable[[], None]] = []
        for key, _ in self.selector.select(timeout):
            if key.fileobj is self.server.channel:
                ended = self._server_says()
            elif callable(key.data):
                callbacks.append(key.data)
            elif key.data in self.alive:
                said += self._rank_says(key.data)
        for end in ended:
            if end.id == self._store:
                self._store = None
            for rank, process in list(self.alive.items()):
                if process.id == end.id:
                    # Its last words may have come after the news of its end.
                    said += [(rank, message) for message in process.channel.drain()]
                    self._forget(rank)
                    said.append((rank, end))
        # Last, since they may raise.
        for callback in callbacks:
            callback()
        return said

    @property
    def has_store(self) -> bool:
        return self._store is not None

    def stop(self, ranks: Collection[int] | None = None) -> None:
        """Kills these ranks (default: all) and waits until they are gone, so that none says anything after us."""
        self.signal(signal.SIGKILL, ranks)
        self._until_gone(_KILLED, ranks)

    def dismiss(self, ranks: Collection[int] | None = None) -> None:
        """Lets these ranks (default: all), which are idle, end by themselves, with their exit handlers."""
        for rank, process in self.alive.items():
            if ranks is None or rank in ranks:
                process.channel.socket.shutdown(socket.SHUT_WR)

    def hang_up(self, ranks: Collection[int] | None = None) -> None:
        """Dismisses them and waits until they are gone."""
        self.dismiss(ranks)
        self._until_gone(_ENDING, ranks)

    def close(self) -> None:
        """Kills ranks, store and server."""
        for rank in list(self.alive):
            self._forget(rank)
        self.server.close()
        self.selector.close()

    def _until_gone(self, seconds: float, ranks: Collection[int] | None) -> None:
        deadline = time.monotonic() + seconds
        with contextlib.suppress(RankError):
            while any(ranks is None or rank in ranks for rank in self.alive) and time.monotonic() < deadline:
                self.events(deadline - time.monotonic())

    def _server_says(self) -> list[Ended]:
        try:
            return self.server.read()
        except RankError:
            for rank in list(self.alive):
                self._forget(rank)
            raise

    def _rank_says(self, rank: int) -> list[Event]:
        channel = self.alive[rank].channel
        try:
            return [(rank, message) for message in channel.read()]
        except EOFError:
            # How it ended, the server will say.
            self.selector.unregister(channel)
            return []

    def _forget(self, rank: int) -> None:
        channel = self.alive.pop(rank).channel
        with contextlib.suppress(KeyError):
            self.selector.unregister(channel)
        channel.close()
