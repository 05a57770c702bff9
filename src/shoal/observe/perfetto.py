"""The file of a traced step, for ui.perfetto.dev or chrome://tracing."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from shoal.observe import files
from shoal.observe.timeline import aligned
from shoal.observe.trace import Recording, Span

FILE = "trace.json"
"""In a run folder: the step of which `run.trace` asked for a trace."""


def write(path: Path, recordings: Sequence[Recording]) -> None:
    """One file for ui.perfetto.dev or chrome://tracing, 0 at the first start on any rank. OSError: the old file.

    After Duca & Sinclair 2016, "Trace Event Format". A process is a rank, numbered from 1, because Perfetto takes
    process 0 for the idle one. Its first thread has the spans that nest; flights that
    overlap get threads of their own, because Perfetto leaves out what overlaps without nesting. Times are
    fractions of microseconds, in which a nanosecond is kept for ten days.
    """
    events: list[dict[str, Any]] = []
    for recording in aligned(recordings):
        place = {"pid": recording.rank + 1, "tid": 1}
        events.append(_named("process_name", place, name=f"rank {recording.rank}"))
        events.append(_named("process_labels", place, labels=recording.host))
        events.append(_named("process_sort_index", place, sort_index=recording.rank))
        threads = [[s for s in recording.spans if not s.in_flight], *_lanes(s for s in recording.spans if s.in_flight)]
        for number, spans in enumerate(threads):
            place = {"pid": recording.rank + 1, "tid": number + 1}
            events.append(_named("thread_name", place, name=_thread(number)))
            events.append(_named("thread_sort_index", place, sort_index=number))
            events += [_event(span) | place for span in spans]
    files.replace(path, msgspec.json.encode({"displayTimeUnit": "ms", "traceEvents": events}))


def _named(what: str, place: dict[str, int], **value: str | int) -> dict[str, Any]:
    return {"name": what, "ph": "M", **place, "args": value}


def _thread(number: int) -> str:
    return "compute" if number == 0 else "communication" + f" {number}" * (number > 1)


def _lanes(flights: Iterable[Span]) -> list[list[Span]]:
    """As few rows as possible in which none overlap. flights: in the order of their starts."""
    lanes: list[list[Span]] = []
    for span in flights:
        free = next((lane for lane in lanes if lane[-1].end <= span.start), None)
        if free is None:
            lanes.append([span])
        else:
            free.append(span)
    return lanes


def _event(span: Span) -> dict[str, Any]:
    known = {"depth": span.depth, "stage": span.stage, "micro_batch": span.micro_batch, "link": span.link}
    return {
        "name": span.name,
        "cat": span.kind,
        "ph": "X",
        "ts": span.start / 1000,
        "dur": (span.end - span.start) / 1000,
        "args": {name: value for name, value in known.items() if value is not None},
    }


def read(path: Path) -> list[Recording]:
    """What `write` wrote, aligned; none if there is no such file, or it is damaged or another program's."""
    try:
        events = msgspec.json.decode(path.read_bytes())["traceEvents"]
        hosts = {e["pid"]: e["args"]["labels"] for e in events if e["name"] == "process_labels"}
        spans = defaultdict(list)
        for event in events:
            if event["ph"] == "X":
                spans[event["pid"]].append(_span(event))
        return aligned(Recording(pid - 1, host, "", 0, spans[pid]) for pid, host in hosts.items())
    except (OSError, ValueError, KeyError, TypeError):
        return []


def _span(event: dict[str, Any]) -> Span:
    start, length = round(1000 * event["ts"]), round(1000 * event["dur"])
    return Span(event["name"], event["cat"], start, start + length, in_flight=event["tid"] > 1, **event["args"])
