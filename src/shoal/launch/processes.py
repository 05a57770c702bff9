"""The launcher's hand on its fork server."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from shoal.errors import RankError
from shoal.launch.channel import Channel
from shoal.launch.messages import Ended, Fork, Refused, Signal

# Libraries must not start threads when they are imported; ranks set the number of theirs.
_ONE_THREAD = dict.fromkeys(
    (
        "OMP_NUM_THREADS",
        "MKL_NUM_THREADS",
        "OPENBLAS_NUM_THREADS",
        "NUMEXPR_NUM_THREADS",
        "RAYON_NUM_THREADS",
    ),
    "1",
)


class ForkServer:
    """A fork server that was executed and imports `preload`; requests wait until it has."""

    def __init__(self, preload: Sequence[str] = ()):
        ours, theirs = socket.socketpair()
        self.channel = Channel(ours, Refused | Ended)
        self._ids = itertools.count()
        self._forked = False
        # Ranks import what the launcher would: neither more (-P: not the working directory) nor less.
        path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", "shoal.launch.forkserver", str(theirs.fileno()), *preload],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env={**os.environ, **_ONE_THREAD, "PYTHONPATH": path},
                # Ctrl-C reaches the terminal's whole process group; the launcher says what ranks make of it.
                process_group=0,
            )

    def fork(self, entry: str, args: dict[str, Any], file: socket.socket) -> int:
        """A child that calls `entry(file, **args)`; the name under which it is signalled and reported."""
        id = next(self._ids)
        self._forked = True
        with contextlib.suppress(OSError):
            self.channel.send(Fork(id, entry, args), file.fileno())
        return id

    def signal(self, id: int, number: signal.Signals) -> None:
        with contextlib.suppress(OSError):
            self.channel.send(Signal(id, number))

    @property
    def ended(self) -> bool:
        return self.process.poll() is not None

    def read(self) -> list[Ended]:
        """Who has ended; blocks if there is no news. RankError if the server refuses or is itself gone."""
        try:
            messages = self.channel.read()
        except EOFError:
            raise RankError(f"the fork server ended with code {self.process.wait()}") from None
        for message in messages:
            if isinstance(message, Refused):
                raise RankError(message.what, fix=message.fix)
        return messages

    def close(self) -> None:
        """Ends the server and everything that came from it."""
        self.channel.close()
        if not self._forked:
            # It may still be importing, and has nothing to end.
            self.process.kill()
        try:
            self.process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
