"""Rows of metrics -> charts, as the JSON that plotly's script draws."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

from shoal.observe.units import finite

Rows = Sequence[dict[str, Any]]

# Distinguishable to colour-blind eyes: Okabe & Ito 2008, "Color Universal Design" (jfly.uni-koeln.de/color).
BLUE, ORANGE, GREEN, PURPLE, SKY, GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#9AA0A6"

# Parts of a step, in the order in which they happen: key of the row, name, colour.
PARTS = (
    ("data_s", "data", GREY),
    ("compute_s", "forward and backward", BLUE),
    ("forward_s", "forward", BLUE),
    ("backward_s", "backward", SKY),
    ("communication_s", "communication after backward", ORANGE),
    ("optimizer_s", "optimizer", GREEN),
)

# Points of one line, so that the page of a long run stays small. A screen shows about as many.
_POINTS = 2000
# Up to so many steps are drawn as bars; one step has no area.
_BARS = 60
# Windows of the moving mean in a run, and the most steps it takes on either side.
_WINDOWS, _WIDEST = 60, 100


def charts(rows: Rows) -> list[dict[str, Any]]:
    """Every chart that the rows have values for.

    Each: title; unit; data: plotly's traces; x, y: ranges of the axes, None where plotly chooses.
    """
    whose = "all workers" if of_server(rows) else "one rank"
    loss = [*noisy(rows, "loss", "training", BLUE), *_validation(rows)]
    found = [
        chart("Loss", "nats per token", loss, zero=False),
        chart("Throughput", "tokens/s", noisy(rows, "tokens_per_second", "each step", GREEN)),
        chart("Step breakdown", "ms", _breakdown(rows)),
        chart("Gradient norm", "before clipping", noisy(rows, "grad_norm", "each step", PURPLE)),
        chart("Network", f"MB a step over TCP, of {whose}", _network(rows)),
        chart("Replicas apart", "length of a step between exchanges", _drift(rows)),
        chart("Balance of experts", "1 = all used alike", _balance(rows)),
        chart("Dropped choices of experts", "%", _dropped(rows)),
        chart("Learning rate", "", line(rows, "lr", "learning rate", ORANGE)),
        chart("Memory", "GiB, highest so far, of the fullest rank", line(rows, "memory_gib", "memory", SKY)),
    ]
    return [one for one in found if one["data"]]


def of_server(rows: Rows) -> bool:
    """Whether a parameter server trained: its rows are of all workers, not of one rank."""
    return any("commits" in row for row in rows)


def parts(rows: Rows) -> list[tuple[str, str, str]]:
    """Of PARTS, those that the rows have, by what they are for them."""
    server = of_server(rows)
    return [
        (key, "push, pull and waiting" if server and key == "communication_s" else name, colour)
        for key, name, colour in PARTS
        if any(finite(row.get(key)) for row in rows)
    ]


def _network(rows: Rows) -> list[dict[str, Any]]:
    """Nothing where nothing was sent."""
    if not any(row.get("sent_bytes") for row in rows):
        return []
    return [
        *line(rows, "sent_bytes", "sent", SKY, scale=1e-6),
        *line(rows, "received_bytes", "received", ORANGE, scale=1e-6),
    ]


def _drift(rows: Rows) -> list[dict[str, Any]]:
    """Nothing where replicas are equal after every step."""
    outer = [row for row in rows if finite(row.get("outer_drift"))]
    own = line(outer, "outer_drift", "a replica, root mean square", PURPLE)
    return own + line(outer, "outer_common", "their mean", BLUE)


def median(rows: Rows, key: str) -> float | None:
    """Of the finite values; None if there are none."""
    values = sorted(row[key] for row in rows if finite(row.get(key)))
    return values[len(values) // 2] if values else None


def chart(title: str, unit: str, data: list[dict[str, Any]], zero: bool = True) -> dict[str, Any]:
    """zero: the vertical axis starts there. (Plotly's own way to say so leaves no room above a line.)"""
    steps = {step for trace in data for step in trace["x"]}
    top = max((y for trace in data for y in trace["y"] if y is not None), default=0.0)
    stacked = any("stackgroup" in trace or trace["type"] == "bar" for trace in data)
    return {
        "title": title,
        "unit": unit,
        "data": data,
        # A single point would get an axis of fractions of a step.
        "x": [min(steps) - 1, max(steps) + 1] if len(steps) == 1 else None,
        "y": [0, 1.06 * top] if zero and top > 0 and not stacked else None,
    }


def by_number(title: str, unit: str, axis: str, values: dict[int, float], colour: str) -> dict[str, Any]:
    """One bar for each number. axis: what is numbered."""
    bars = {
        "type": "bar",
        "name": axis,
        "x": list(values),
        "y": [float(f"{value:.6g}") for value in values.values()],
        "marker": {"color": colour},
    }
    ticks = {"tickformat": ",d", "gridcolor": "#eef0f3", "zeroline": False, "automargin": True}
    ticks |= {"dtick": 1} if len(values) <= 20 else {"nticks": 12}
    return {
        "title": title, "unit": unit, "data": [bars] if values else [], "x": None, "y": None,
        "layout": {"xaxis": {"title": {"text": axis, "standoff": 8}, **ticks}},
    }  # fmt: skip


def _values(rows: Rows, key: str, scale: float = 1.0) -> list[float | None]:
    """None where there is no finite value: plotly leaves a gap, which is what NaN should look like."""
    return [row[key] * scale if finite(row.get(key)) else None for row in rows]


def line(rows: Rows, key: str, name: str, colour: str, faint: bool = False, scale: float = 1.0) -> list[dict[str, Any]]:
    """One trace, or none if there is nothing to draw."""
    steps, values = [row["step"] for row in rows], _values(rows, key, scale)
    return _drawn(steps, values, name, colour, faint) if any(v is not None for v in values) else []


def noisy(rows: Rows, key: str, name: str, colour: str) -> list[dict[str, Any]]:
    """The raw values, and over those of a longer run, then faint, their mean over the steps around."""
    half = min(len(rows) // _WINDOWS // 2, _WIDEST)
    raw = line(rows, key, name, colour, faint=half > 0)
    if not raw or not half:
        return raw
    means = around(_values(rows, key), half)
    return raw + _drawn([row["step"] for row in rows], means, f"mean of {2 * half + 1} steps", colour)


def around(values: Sequence[float | None], half: int) -> list[float | None]:
    """The mean of the present values at most `half` places away; a mean of the past would lag."""
    sums = list(accumulate((v or 0.0 for v in values), initial=0.0))
    counts = list(accumulate((v is not None for v in values), initial=0))
    found: list[float | None] = []
    for i in range(len(values)):
        low, high = max(0, i - half), min(len(values), i + half + 1)
        present = counts[high] - counts[low]
        found.append((sums[high] - sums[low]) / present if present else None)
    return found


def _balance(rows: Rows) -> list[dict[str, Any]]:
    """Both are 1 at best. Nothing for a model without experts."""
    busiest = noisy(rows, "busiest_load", "busiest expert's load over the mean", ORANGE)
    return busiest + line(rows, "balance_loss", "balance loss", BLUE)


def _dropped(rows: Rows) -> list[dict[str, Any]]:
    """Nothing where no choice was dropped, as without a capacity."""
    dropped = [
        row | {"dropped_percent": 100 * row["dropped_share"]} for row in rows if finite(row.get("dropped_share"))
    ]
    return (
        line(dropped, "dropped_percent", "of all choices", PURPLE) if any(r["dropped_share"] for r in dropped) else []
    )


def _validation(rows: Rows) -> list[dict[str, Any]]:
    points = [row for row in rows if finite(row.get("val_loss"))]
    trace = line(points, "val_loss", "validation", ORANGE)
    return [one | {"mode": "lines+markers", "marker": {"size": 7, "color": ORANGE}} for one in trace]


def _drawn(
    steps: list[int], values: list[float | None], name: str, colour: str, faint: bool = False
) -> list[dict[str, Any]]:
    kept = outline(values)
    return [
        {
            "type": "scatter",
            "name": name,
            "x": [steps[i] for i in kept],
            "y": [_short(values[i]) for i in kept],
            "mode": "lines" if len(kept) > 1 else "markers",
            "opacity": 0.35 if faint and len(kept) > 1 else 1,
            "line": {"color": colour, "width": 1 if faint else 2},
            "marker": {"color": colour, "size": 8},
        }
    ]


def outline(values: Sequence[float | None], limit: int = _POINTS) -> list[int]:
    """Indices of about `limit` values that draw the same line: of each piece the lowest and the highest.

    Peaks survive, which means over pieces would hide. A piece with a gap keeps one.
    """
    if len(values) <= limit:
        return list(range(len(values)))
    kept: set[int] = {0, len(values) - 1}
    for piece in _pieces(len(values), limit // 3):
        present = [i for i in piece if values[i] is not None]
        kept.update(next(([i] for i in piece if values[i] is None), []))
        if present:
            value: Callable[[int], Any] = values.__getitem__
            kept.update((min(present, key=value), max(present, key=value)))
    return sorted(kept)


def _breakdown(rows: Rows) -> list[dict[str, Any]]:
    """What a step's milliseconds went into, stacked; of a long run, the mean of every piece."""
    pieces = list(_pieces(len(rows), _POINTS // 4))
    steps = [rows[piece[len(piece) // 2]]["step"] for piece in pieces]
    traces = []
    for key, name, colour in parts(rows):
        values = _values(rows, key, 1e3)
        means = [_short(_mean([values[i] or 0.0 for i in piece])) for piece in pieces]
        trace: dict[str, Any] = {"name": name, "x": steps, "y": means}
        if len(pieces) <= _BARS:
            traces.append(trace | {"type": "bar", "marker": {"color": colour}})
        else:
            area = {"mode": "none", "stackgroup": "parts", "fillcolor": colour}
            traces.append(trace | {"type": "scatter"} | area)
    return traces


def _pieces(length: int, count: int) -> list[range]:
    """range(length) in at most `count` neighbouring pieces of almost equal size."""
    count = min(length, count)
    return [range(length * i // count, length * (i + 1) // count) for i in range(count)]


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _short(value: float | None) -> float | None:
    """Six digits are more than a screen shows, and keep the page small."""
    return None if value is None else float(f"{value:.6g}")
