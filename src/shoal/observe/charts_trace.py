"""The spans of a traced step -> a chart: what every rank did when, as the JSON that plotly's script draws."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from shoal.observe.charts import BLUE, GREEN, GREY, ORANGE, PURPLE, SKY
from shoal.observe.timeline import Share, aligned, common, computing, minus, own, summary
from shoal.observe.trace import Kind, Recording, Span

WAIT = "#DFE3E8"
HIDDEN = "#F5CBA7"
KINDS: tuple[tuple[Kind, str], ...] = (
    ("forward", BLUE),
    ("backward", SKY),
    ("compute", PURPLE),
    ("optimizer", GREEN),
    ("communication", ORANGE),
    ("data", GREY),
    ("wait", WAIT),
)

# Bars of one kind that are nearer than this share of the step are drawn as one: no screen shows such a gap.
_GAP = 1 / 2000
# Of more ranks, every second one is drawn, or every third ...; and above _TEXTS there is no room for text.
_LANES, _TEXTS = 32, 12
# Of a lane's height of 1: middle and height of the bars, of those in flight, and middle of the text.
_BAR, _FLIGHT, _TEXT = (0.0, 0.4), (0.28, 0.12), -0.36

Bar = tuple[int, int, str]
"""Start and end in ns, and what the pointer shows."""
Placed = tuple[int, Bar]
"""With its lane."""


def trace_chart(recordings: Iterable[Recording]) -> dict[str, Any] | None:
    """One lane a rank: what it did, coloured by kind; under it, what was in flight, pale while it was hidden behind
    compute; above, the shares in words.

    As `charts` gives them, and with `layout`: what this one needs over the page's own layout. None without spans.
    """
    recordings = aligned(recordings)
    end = max((span.end for r in recordings for span in r.spans), default=0)
    if not end:
        return None
    every = -(-len(recordings) // _LANES)
    drawn, shares = recordings[::every], summary(recordings)[::every]
    gap = int(end * _GAP)
    bars, flights = _bars(drawn, gap), _flights(drawn, gap)
    traces = [_trace(kind, kind, colour, _BAR, bars[kind]) for kind, colour in KINDS if bars[kind]]
    for name, colour in (("in flight, hidden", HIDDEN), ("in flight, exposed", ORANGE)):
        if flights[name]:
            traces.append(_trace(name, "communication", colour, _FLIGHT, flights[name]))
    return {
        "title": "One step",
        "unit": "of each rank" if every == 1 else f"of {len(drawn)} of {len(recordings)} ranks",
        "data": [*traces, _texts(shares)],
        "x": None,
        "y": None,
        "layout": _layout([r.rank for r in drawn], end),
        "wide": True,
    }


def shares_text(share: Share) -> str:
    """`compute 71 % · exposed communication 12 % · data 2 % · bubble 15 %; hidden communication 40 %`."""
    parts = {
        "compute": share.compute,
        "exposed communication": share.exposed,
        "data": share.data,
        "bubble": share.bubble,
    }
    whole = sum(parts.values())
    words = " · ".join(f"{name} {100 * part / whole:.0f} %" for name, part in parts.items())
    return f"{words}; hidden communication {100 * share.hidden / whole:.0f} %"


def _bars(recordings: list[Recording], gap: int) -> dict[Kind, list[Placed]]:
    """Those of each kind."""
    bars: dict[Kind, list[Placed]] = defaultdict(list)
    for lane, recording in enumerate(recordings):
        pieces: dict[Kind, list[Bar]] = defaultdict(list)
        for span, mine in own(recording.spans):
            pieces[span.kind] += [(start, end, _words(span)) for start, end in mine]
        for kind, some in pieces.items():
            bars[kind] += [(lane, bar) for bar in _joined(some, gap)]
    return bars


def _flights(recordings: list[Recording], gap: int) -> dict[str, list[Placed]]:
    """What is in flight: cut where the rank begins or ends to compute."""
    flights: dict[str, list[Placed]] = defaultdict(list)
    for lane, recording in enumerate(recordings):
        compute = computing(recording)
        pieces: dict[str, list[Bar]] = defaultdict(list)
        for span in (s for s in recording.spans if s.in_flight):
            whole, words = [(span.start, span.end)], _words(span)
            pieces["in flight, exposed"] += [(start, end, words) for start, end in minus(whole, compute)]
            pieces["in flight, hidden"] += [(start, end, words) for start, end in common(whole, compute)]
        for name, some in pieces.items():
            flights[name] += [(lane, bar) for bar in _joined(some, gap)]
    return flights


def _words(span: Span) -> str:
    """`backward, stage 1, micro-batch 3`."""
    stage = f", stage {span.stage}" if span.stage is not None else ""
    return span.name + stage + (f", micro-batch {span.micro_batch}" if span.micro_batch is not None else "")


def _joined(bars: list[Bar], gap: int) -> list[Bar]:
    """Neighbours as one bar where the gap cannot be seen and one of the two hardly."""
    found: list[Bar] = []
    for start, end, words in sorted(bars):
        last = found[-1] if found else None
        if last and start - last[1] <= gap and min(end - start, last[1] - last[0]) <= gap:
            longer = last[2] if last[1] - last[0] >= end - start else words
            found[-1] = (last[0], max(last[1], end), longer)
        else:
            found.append((start, end, words))
    return found


def _trace(name: str, kind: Kind, colour: str, place: tuple[float, float], bars: list[Placed]) -> dict[str, Any]:
    """All bars of one kind. Plotly does not stack bars that say where they begin."""
    middle, height = place
    return {
        "type": "bar",
        "orientation": "h",
        "name": name,
        "y": [lane + middle for lane, _ in bars],
        "base": [_ms(start) for _, (start, _, _) in bars],
        "x": [_ms(end - start) for _, (start, end, _) in bars],
        "width": height,
        "marker": {"color": colour, "line": {"color": "#fff", "width": 0.5}},
        "text": [words for _, (_, _, words) in bars],
        "textposition": "none",
        "hovertemplate": f"%{{text}}<br>{kind}, %{{x}} ms from %{{base}} ms<extra></extra>",
    }


def _texts(shares: list[Share]) -> dict[str, Any]:
    return {
        "type": "scatter",
        "mode": "text" if len(shares) <= _TEXTS else "markers",
        "name": "shares",
        "x": [0] * len(shares),
        "y": [lane + _TEXT for lane in range(len(shares))],
        "text": [shares_text(share) for share in shares],
        "textposition": "middle right",
        "textfont": {"size": 11},
        "marker": {"size": 4, "color": WAIT},
        "hovertemplate": "%{text}<extra></extra>",
        "showlegend": False,
    }


def _layout(ranks: list[int], end: int) -> dict[str, Any]:
    every = -(-len(ranks) // 16)
    lanes = range(0, len(ranks), every)
    axis = {"gridcolor": "#eef0f3", "zeroline": False, "automargin": True}
    return {
        "hovermode": "closest",
        "showlegend": True,
        "xaxis": axis | {"title": {"text": "ms", "standoff": 8}, "range": [0, _ms(end)]},
        "yaxis": axis
        | {
            "range": [len(ranks) - 0.5, -0.6],
            "showgrid": False,
            "tickvals": list(lanes),
            "ticktext": [f"rank {ranks[lane]}" for lane in lanes],
        },
    }


def _ms(ns: int) -> float:
    """To a microsecond."""
    return round(ns / 1e6, 3)
