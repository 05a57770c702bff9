"""Who was not let in, as whoever watches the listening side is told."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from shoal.sync.server.wire import BOTH_TLS
from shoal.sync.server.wire.handshake import SAME_PROGRAM, SAME_TOKEN

# Seconds until the same is said again, and how much may be said meanwhile: strangers cannot fill a log.
_AGAIN, _MOST = 60.0, 16
# By the listener's reasons.
_FIXES = {
    "wrong token": SAME_TOKEN,
    "TLS": BOTH_TLS,
    "no greeting": f"if it is one, {BOTH_TLS}",
    "another version": SAME_PROGRAM,
    "full": "start fewer workers",
}


class Refusals:
    """`Listener(..., refused=Refusals(say))`."""

    def __init__(self, say: Callable[[str], None]):
        self._say, self._lock = say, threading.Lock()
        # When what was said of which address.
        self._said: dict[tuple[str, str], float] = {}

    def __call__(self, address: str, reason: str, what: str) -> None:
        with self._lock:
            text = self.news(address, reason, what, time.monotonic())
        if text:
            self._say(text)

    def news(self, address: str, reason: str, what: str, now: float) -> str:
        """What is to be said of it; empty where that was said of this address within a minute. now: seconds."""
        self._said = {key: at for key, at in self._said.items() if now - at < _AGAIN}
        if (address, reason) in self._said or len(self._said) >= _MOST:
            return ""
        self._said[address, reason] = now
        return f"refused: {what}; {_FIXES[reason]}"
