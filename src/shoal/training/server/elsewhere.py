"""Parts of a run that other machines start: who has come, and for whom it waits."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

# Seconds without a part before anybody is told: one that is started again, or whose link breaks, comes back sooner.
_SOON = 5.0


@dataclass
class _Part:
    """since: when it was last there. came: it has been. said: when it was said that it is waited for; stopping: also
    that it ends then only."""

    since: float
    came: bool
    said: float | None = None
    stopping: bool = False


class Elsewhere:
    """Says of these parts what whoever watches the first machine would not know."""

    def __init__(self, run: Path, parts: Sequence[str], now: float, came: bool, again: float):
        """parts: `server.elsewhere`. came: they had, before this coordinator was started again. again: seconds until it
        is said once more for whom it waits."""
        self.run, self._again = run.absolute(), again
        self._parts = {name: _Part(now, came) for name in parts}

    def news(self, here: Collection[str], needed: Collection[str], stopping: bool, now: float) -> list[str]:
        """Sentences, each once, or again after a while.

        here: parts that there is a link to. needed: parts without which nothing goes on.
        stopping: the run was asked to end.
        """
        said = []
        for name, part in self._parts.items():
            if name in here:
                if not part.came:
                    said.append(f"{name} has come")
                elif part.said is not None:
                    said.append(f"{name} is back")
                self._parts[name] = _Part(now, came=True)
            elif name in needed and now - part.since >= _SOON and self._is_news(part, stopping, now):
                part.said, part.stopping = now, stopping
                end = "; the run ends when it is there, or by a second Ctrl-C at once, unsaved" if stopping else ""
                said.append(f"waits for {name}: shoal join {self.run} '{name}'{end}")
        return said

    def waits(self, name: str) -> bool:
        """Whether it was said that this part is waited for, and not yet that it is back."""
        return name in self._parts and self._parts[name].said is not None

    def _is_news(self, part: _Part, stopping: bool, now: float) -> bool:
        """Whether it is to be said that this part is waited for."""
        return part.said is None or (stopping and not part.stopping) or now - part.said >= self._again
