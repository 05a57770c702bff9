"""Who waits for whom: seconds that each replica, or each worker of a server, had nothing to do but wait."""

from __future__ import annotations

from collections import Counter, deque
from typing import Any

from shoal.observe.charts import ORANGE, Rows, by_number

# For the progress line: exchanges that are looked back on, how many there must be, and the share of the time that
# somebody waits for the slowest before it is said.
_WINDOW, _LEAST, _GREAT = 20, 3, 0.2


def waited(rows: Rows) -> dict[int, float]:
    """Seconds of each replica or worker, by its number."""
    found: Counter[int] = Counter()
    for row in rows:
        for number, seconds in (row.get("waited_s") or {}).items():
            found[int(number)] += seconds
    return dict(sorted(found.items()))


def shares(rows: Rows) -> dict[int, float]:
    """Of each, the part of all steps' time; {} where nobody told."""
    whole = sum(row.get("seconds") or 0.0 for row in rows)
    return {number: seconds / whole for number, seconds in waited(rows).items()} if whole else {}


def percents(rows: Rows) -> dict[int, float]:
    """The same, in percent."""
    return {number: 100 * share for number, share in shares(rows).items()}


def waiting_charts(rows: Rows) -> list[dict[str, Any]]:
    """As `charts` gives them: of replicas without a server; none where nobody told."""
    values = percents([row for row in rows if "commits" not in row])
    title, unit = "Waiting for other replicas", "% of the run, of each replica"
    return [by_number(title, unit, "replica", values, ORANGE)] if values else []


class Recently:
    """The last exchanges of replicas: whether one of them keeps the others waiting."""

    def __init__(self) -> None:
        self._exchanges: deque[dict[str, Any]] = deque(maxlen=_WINDOW)
        self._seconds = 0.0

    def add(self, row: dict[str, Any]) -> None:
        """Takes in a row of metrics. Steps without an exchange count with the next one."""
        self._seconds += row["seconds"]
        if row.get("waited_s"):
            self._exchanges.append({"seconds": self._seconds, "waited_s": row["waited_s"]})
            self._seconds = 0.0

    def slowest(self) -> tuple[int, float] | None:
        """(the replica that waits least, how much more of the time the one does that waits most); None if that is
        little."""
        if len(self._exchanges) < _LEAST:
            return None
        of_each = shares(self._exchanges)
        least = min(of_each, key=of_each.__getitem__, default=-1)
        share = max(of_each.values(), default=0.0) - of_each.get(least, 0.0)
        return (least, share) if share >= _GREAT else None
