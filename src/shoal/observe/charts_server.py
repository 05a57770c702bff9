"""Rows of metrics of a parameter server -> its charts: how late gradients are, who waits, what is computed in vain."""

from __future__ import annotations

from collections import Counter
from typing import Any

from shoal.observe.charts import GREEN, GREY, ORANGE, PURPLE, Rows, by_number, chart, line, noisy
from shoal.observe.waiting import percents


def server_charts(rows: Rows) -> list[dict[str, Any]]:
    """As `charts` gives them. Those that would only say zero are left out; none for another sync."""
    rows = [row for row in rows if "commits" in row]
    found = [
        chart("Staleness", "updates between a gradient's weights and its own update", _lateness(rows)),
        by_number("Staleness of the whole run", "gradients", "staleness", _histogram(rows), PURPLE),
        by_number("Waiting", "% of the run, of each worker: push, pull and others", "worker", percents(rows), ORANGE),
        chart("Rejected gradients", "% of a step's, computed in vain", _rejected(rows)),
        chart("Wasted work", "s a step that workers computed in vain", _wasted(rows)),
        chart("Updates", "a step", _updates(rows)),
    ]
    return [one for one in found if one["data"]]


def staleness(rows: Rows) -> Counter[int]:
    """Gradients of the rows that became updates, by staleness."""
    found: Counter[int] = Counter()
    for row in rows:
        found.update({int(late): count for late, count in (row.get("staleness") or {}).items()})
    return found


def mean_staleness(row: dict[str, Any]) -> float | None:
    """Of one row's gradients; None where there are none."""
    late = staleness([row])
    return sum(each * count for each, count in late.items()) / late.total() if late else None


def _lateness(rows: Rows) -> list[dict[str, Any]]:
    known = [
        {"step": row["step"], "highest": max(late), "mean": mean_staleness(row)}
        for row in rows
        if (late := staleness([row]))
    ]
    if not any(row["highest"] for row in known):
        return []
    return line(known, "highest", "highest", GREY) + noisy(known, "mean", "mean of a step", PURPLE)


def _histogram(rows: Rows) -> dict[int, float]:
    """Nothing where none was late."""
    late = staleness(rows)
    return {each: float(late[each]) for each in range(max(late) + 1)} if any(late) else {}


def _rejected(rows: Rows) -> list[dict[str, Any]]:
    """Those of workers that were given up by themselves."""
    shares = [
        {
            "step": row["step"],
            "percent": 100 * (row.get("rejected") or 0) / whole,
            "percent_lost": 100 * (row.get("lost") or 0) / whole,
        }
        for row in rows
        if (whole := staleness([row]).total() + (row.get("rejected") or 0) + (row.get("lost") or 0))
    ]
    rejected = noisy(shares, "percent", "each step", ORANGE) if any(share["percent"] for share in shares) else []
    if not any(share["percent_lost"] for share in shares):
        return rejected
    return rejected + line(shares, "percent_lost", "lost with their worker", GREY)


def _wasted(rows: Rows) -> list[dict[str, Any]]:
    return noisy(rows, "wasted_s", "each step", ORANGE) if any(row.get("wasted_s") for row in rows) else []


def _updates(rows: Rows) -> list[dict[str, Any]]:
    """Nothing where every step is one update, as in bsp."""
    return noisy(rows, "commits", "each step", GREEN) if any(row["commits"] != 1 for row in rows) else []
