"""A signal asks the run to end after the step that is being computed."""

from __future__ import annotations

import signal
from types import FrameType


class Stop:
    """SIGTERM (and SIGINT where the terminal's reaches this process) sets `asked`; ranks agree on it in the step.

    Until `listen` signals do what they did: a process that has nothing to save yet ends at once.
    """

    def __init__(self) -> None:
        self.asked = False
        self.signal = ""

    def listen(self) -> None:
        signal.signal(signal.SIGTERM, self._ask)
        if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
            signal.signal(signal.SIGINT, self._ask)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked, self.signal = True, signal.Signals(number).name
