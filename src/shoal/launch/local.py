"""A run on this machine: ranks are started for one function and end with it, or with Ctrl-C."""

from __future__ import annotations

import signal
import socket
import threading
from collections.abc import Callable, Collection
from types import FrameType
from typing import Any

from shoal.launch.call import call
from shoal.launch.failure import Terminated
from shoal.launch.ranks import Ranks


class Interrupted(KeyboardInterrupt):
    """A signal ended a run before it could answer. name: SIGINT or SIGTERM. what: for the user to know then."""

    def __init__(self, name: str, what: str = ""):
        self.name, self.what = name, what
        super().__init__(f"stopped by {name}" + (f"; {what}" if what else ""))


def run(
    entry: str,
    args: dict[str, Any],
    world: int,
    threads: int = 0,
    on_signal: Callable[[str], None] | None = None,
    ranks: Ranks | None = None,
) -> Any:
    """What `entry(seat, **args)` returned in rank 0 of `world` ranks, as `shoal.launch.call.call` says.

    The first SIGINT or SIGTERM is passed on to all ranks as SIGTERM, which asks them to finish their step and
    save, and on_signal is called with its name; the second kills them. Interrupted if they end without an
    answer because of it. Signals are caught in the main thread only; elsewhere they do what they did.
    """
    own = ranks is None
    ranks = ranks or Ranks([entry.partition(":")[0]])
    try:
        with Interrupts(ranks, on_signal) as interrupts:
            try:
                value = call(ranks, entry, args, world, threads=threads)[0]
            except Terminated:
                if interrupts.first:
                    raise Interrupted(interrupts.first) from None
                raise
            if own:
                ranks.hang_up()
            return value
    finally:
        if own:
            ranks.close()


class Interrupts:
    """Signals that come while ranks work, handled between their messages.

    The first is passed on as SIGTERM to those who are `told` (default: all). first: its name, empty before it.
    """

    def __init__(
        self, ranks: Ranks, on_signal: Callable[[str], None] | None = None, told: Collection[int] | None = None
    ):
        self.ranks, self.on_signal, self.told = ranks, on_signal, told
        self.first = ""
        self.wake, self._waker = socket.socketpair()
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Interrupts:
        self.ranks.watch(self.wake, self._pass_on)
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self.ranks.forget(self.wake)
        self.wake.close()
        self._waker.close()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._waker.send(bytes([number]))

    def _pass_on(self) -> None:
        for number in self.wake.recv(64):
            name = signal.Signals(number).name
            if self.first:
                raise Interrupted(name)
            self.first = name
            self.ranks.signal(signal.SIGTERM, self.told)
            if self.on_signal is not None:
                self.on_signal(name)
