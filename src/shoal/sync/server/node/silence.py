"""A part that does not hear of the coordinator: when it says so, and when it gives up."""

from __future__ import annotations

from collections.abc import Callable

from shoal.errors import RankError
from shoal.sync.server.messages import COORDINATOR
from shoal.sync.server.node.book import Book

# Seconds without the coordinator after which a part gives up: it may be starting again, or the machine asleep.
ALONE = 120.0
# Seconds until somebody is told of it: before it has answered at all; without a connection; and with one, on which it
# may say nothing for a while.
_FIRST, _SOON, _LINKED = 1.0, 5.0, 60.0


class Silence:
    """say: of a part that another machine than the run's first has started; None: the first one says it."""

    def __init__(self, name: str, book: Book, say: Callable[[str], None] | None, now: float):
        """name: of the part, as users know it. now: seconds, as everywhere here."""
        self.name, self.book, self._say = name, book, say
        self._last = now
        self._answered = self._said = False

    def heard(self, now: float) -> None:
        """The coordinator has said something, or is connected."""
        self._last = now
        if not self._answered:
            self._tell(f"{self.name} takes part in {self._run}")
        elif self._said:
            self._tell("the coordinator is back")
        self._answered, self._said = True, False

    def excuse(self, now: float) -> None:
        """It has nothing to say now: its silence begins later."""
        self._last = now

    def lasts(self, now: float, linked: bool) -> bool:
        """Whether nobody is there to answer, as it seems. linked: there is a connection with the coordinator."""
        return not self._answered or now - self._last >= (_LINKED if linked else _SOON)

    def check(self, now: float, linked: bool = False) -> None:
        """Says that it waits. linked: as above. Raises RankError after `ALONE` seconds."""
        silent = now - self._last
        if silent > ALONE:
            what = f"the coordinator has not been heard of for {ALONE:.0f} s"
            raise RankError(what, where=str(self._run), fix=self._fix() if self._say is not None else "")
        if not self._said and self.lasts(now, linked) and silent >= _FIRST:
            self._said = True
            entry = self.book.find(COORDINATOR)
            place = f" at {entry.host}:{entry.port}" if entry is not None else ""
            if self._answered:
                self._tell(f"the coordinator{place} is silent; {self.name} waits up to {ALONE:.0f} s")
            else:
                self._tell(f"{self.name} waits for the coordinator{place}, up to {ALONE:.0f} s")

    @property
    def _run(self) -> str:
        return str(self.book.folder.parent)

    def _fix(self) -> str:
        again = f"`shoal train --resume {self._run}` on the run's first machine, as that sees the folder"
        return f"{again}; then `shoal join {self._run} '{self.name}'` here"

    def _tell(self, text: str) -> None:
        if self._say is not None:
            self._say(text)
