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
        # When what was said of whom.
        self._said: dict[tuple[str, str], float] = {}

    def __call__(self, address: str, reason: str, what: str) -> None:
        self.tell(address, reason, what, _FIXES[reason])

    def tell(self, who: str, reason: str, what: str, fix: str) -> None:
        """Of somebody who proved to know the token, or of an address. reason: in a word or two, to tell it by."""
        with self._lock:
            text = self.news(who, reason, what, fix, time.monotonic())
        if text:
            self._say(text)

    def news(self, who: str, reason: str, what: str, fix: str, now: float) -> str:
        """What is to be said of it; empty where that was said of the same one within a minute. now: seconds."""
        self._said = {key: at for key, at in self._said.items() if now - at < _AGAIN}
        if (who, reason) in self._said or len(self._said) >= _MOST:
            return ""
        self._said[who, reason] = now
        return f"refused: {what}; {fix}"
