"""What every rank did during a step, as named spans on one time line: recorded, merged for Perfetto, summed up.

A rank does one thing at a time: its spans nest, and a moment belongs to the innermost one. Beside them,
communication is in flight, which costs time only where nothing is computed meanwhile.

Clocks. Ranks of one machine share CLOCK_MONOTONIC, so their spans agree to the nanosecond. Between machines the
wall clocks stand in: as exact as NTP keeps them, often a millisecond off, which a bubble across machines then
contains. On a device that computes asynchronously a span is what the host saw of it: whoever traces a step
there waits for the device at the spans' ends.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec

from shoal.observe import files, machine

FILE = "trace.json"
"""In a run folder: the step of which `run.trace` asked for a trace."""

Kind = Literal["compute", "forward", "backward", "optimizer", "data", "communication", "wait"]
Intervals = list[tuple[int, int]]
"""[start, end) in ns, sorted, none empty, none touching the next."""

_COMPUTE = ("compute", "forward", "backward", "optimizer")
_NOTHING: AbstractContextManager[None] = nullcontext()


class Span(msgspec.Struct, frozen=True, array_like=True):
    """start, end: ns of the recording's clock. depth: how many spans it is nested in.

    in_flight: communication beside the others. stage, micro_batch: of a pipeline, where there is one.
    """

    name: str
    kind: Kind
    start: int
    end: int
    depth: int = 0
    in_flight: bool = False
    stage: int | None = None
    micro_batch: int | None = None


class Recording(msgspec.Struct, frozen=True):
    """One rank's spans. clock: which monotonic clock they are in; wall_ns: what makes it a wall clock's time."""

    rank: int
    host: str
    clock: str
    wall_ns: int
    spans: list[Span]


@dataclass(frozen=True)
class Share:
    """Where one rank's time went between the first start and the last end on any rank, in seconds.

    compute: of whatever kind, the optimizer too. exposed: communication while it did not compute. data: while
    neither. bubble: nothing of these: it waited, or did what no span names. The four add up to the whole.
    communication: with what was hidden behind compute.
    """

    rank: int
    compute: float
    exposed: float
    data: float
    bubble: float
    communication: float


class Tracer:
    """Records one rank's spans while `on`; costs a call and a look at `on` while not."""

    def __init__(self, rank: int, clock: Callable[[], int] = time.monotonic_ns):
        self.rank, self.clock = rank, clock
        self.on = False
        self.depth = 0
        self.spans: list[Span] = []

    def span(
        self, name: str, kind: Kind, stage: int | None = None, micro_batch: int | None = None
    ) -> AbstractContextManager[None]:
        """A context in which this rank does what is named. Contexts nest: one thread at a time opens them."""
        return _Open(self, name, kind, stage, micro_batch) if self.on else _NOTHING

    def flight(self, name: str) -> Callable[[], None]:
        """An asynchronous communication starts; call the result once when it has ended, in whatever thread."""
        if not self.on:
            return _do_nothing
        spans, start = self.spans, self.clock()
        return lambda: spans.append(Span(name, "communication", start, self.clock(), in_flight=True))

    def take(self) -> Recording:
        """What has ended since it was last taken; forgets it. A flight that ends later is in no recording."""
        spans, self.spans = self.spans, []
        wall = time.time_ns() - self.clock()
        return Recording(self.rank, machine.host(), _machine_clock(), wall, list(spans))


class _Open:
    def __init__(self, tracer: Tracer, name: str, kind: Kind, stage: int | None, micro_batch: int | None):
        self.tracer, self.name, self.kind, self.stage, self.micro_batch = tracer, name, kind, stage, micro_batch

    def __enter__(self) -> None:
        self.depth = self.tracer.depth
        self.tracer.depth += 1
        self.start = self.tracer.clock()

    def __exit__(self, *_: object) -> None:
        end = self.tracer.clock()
        self.tracer.depth = self.depth
        span = Span(self.name, self.kind, self.start, end, self.depth, False, self.stage, self.micro_batch)
        self.tracer.spans.append(span)


def _do_nothing() -> None:
    pass


def _machine_clock() -> str:
    """A monotonic clock runs from a machine's start to its end, in all of its containers."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return machine.host()


def encode(recording: Recording) -> bytes:
    """For another rank."""
    return msgspec.json.encode(recording)


def decode(text: bytes) -> Recording:
    """ValueError if it is no recording."""
    return msgspec.json.decode(text, type=Recording)


def aligned(recordings: Iterable[Recording]) -> list[Recording]:
    """The same by rank, in one clock that is 0 at the first start on any rank. Alters nothing when done twice."""
    recordings = sorted(recordings, key=lambda r: r.rank)
    walls = defaultdict(list)
    for recording in recordings:
        walls[recording.clock].append(recording.wall_ns)
    # One offset for each machine: the wall clock may have been set between two ranks' looks at it.
    offset = {clock: sorted(values)[len(values) // 2] for clock, values in walls.items()}
    zero = min((span.start + offset[r.clock] for r in recordings for span in r.spans), default=0)
    found = []
    for r in recordings:
        shift = offset[r.clock] - zero
        spans = [msgspec.structs.replace(s, start=s.start + shift, end=s.end + shift) for s in r.spans]
        found.append(Recording(r.rank, r.host, "", 0, sorted(spans, key=lambda s: (s.start, s.depth))))
    return found


def own(spans: Iterable[Span]) -> list[tuple[Span, Intervals]]:
    """Each span that is not in flight, and when it was the innermost one; in the order of their starts."""
    found: list[tuple[Span, Intervals]] = []
    above: list[tuple[Span, Intervals]] = []
    for span in sorted((s for s in spans if not s.in_flight), key=lambda s: (s.start, s.depth)):
        mine = union([(span.start, span.end)])
        while above and above[-1][0].depth >= span.depth:
            above.pop()
        if above:
            left = above[-1][1]
            # Those nested before it are cut out already, so it lies in the last piece.
            left[-1:] = minus(left[-1:], mine)
        above.append((span, mine))
        found.append((span, mine))
    return found


def summary(recordings: Iterable[Recording]) -> list[Share]:
    """Each rank's share of the time, by rank."""
    recordings = aligned(recordings)
    end = max((span.end for r in recordings for span in r.spans), default=0)
    return [_share(recording, end) for recording in recordings]


def _share(recording: Recording, end: int) -> Share:
    """recording: aligned. end: of the last span on any rank."""
    times: dict[str, Intervals] = defaultdict(list)
    for span, mine in own(recording.spans):
        times["compute" if span.kind in _COMPUTE else span.kind] += mine
    compute = union(times["compute"])
    communication = union(times["communication"] + [(s.start, s.end) for s in recording.spans if s.in_flight])
    exposed = minus(communication, compute)
    data = minus(union(times["data"]), union(compute + exposed))
    parts = [_length(part) for part in (compute, exposed, data)]
    seconds = [1e-9 * part for part in (*parts, end - sum(parts), _length(communication))]
    return Share(recording.rank, *seconds)


def union(intervals: Iterable[tuple[int, int]]) -> Intervals:
    """Of any intervals, in any order."""
    found: Intervals = []
    for start, end in sorted(i for i in intervals if i[0] < i[1]):
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(end, found[-1][1]))
        else:
            found.append((start, end))
    return found


def minus(these: Intervals, those: Intervals) -> Intervals:
    """The times in `these` that are not in `those`."""
    found: Intervals = []
    first = 0
    for start, end in these:
        while first < len(those) and those[first][1] <= start:
            first += 1
        cut = first
        while cut < len(those) and those[cut][0] < end:
            if those[cut][0] > start:
                found.append((start, those[cut][0]))
            start = those[cut][1]
            cut += 1
        if start < end:
            found.append((start, end))
    return found


def _length(intervals: Intervals) -> int:
    return sum(end - start for start, end in intervals)


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
    known = {"depth": span.depth, "stage": span.stage, "micro_batch": span.micro_batch}
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
