"""All ranks' spans on one time line, and whose time went where.

A moment of a rank belongs to the innermost of its spans. Beside them communication is in flight, which costs time only
where nothing is computed meanwhile.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from msgspec.structs import replace

from shoal.observe.trace import Recording, Span

Intervals = list[tuple[int, int]]
"""[start, end) in ns, sorted, none empty, none touching the next."""

_COMPUTE = ("compute", "forward", "backward", "optimizer")


@dataclass(frozen=True)
class Share:
    """Where one rank's time went between the first start and the last end on any rank, in seconds.

    compute: of whatever kind, the optimizer too. exposed: communication while it did not compute. data: while
    neither. bubble: nothing of these: it waited, or did what no span names. The four add up to the whole.
    communication: with what was hidden behind compute.

    Of a wait between the turns of a pipeline's stage, exposed is what a message takes to arrive once both its ends have
    begun (see `merged`), and bubble the rest: until then its sender computes.
    """

    rank: int
    compute: float
    exposed: float
    data: float
    bubble: float
    communication: float

    @property
    def hidden(self) -> float:
        """Communication while it computed."""
        return self.communication - self.exposed


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
        spans = [replace(s, start=s.start + shift, end=s.end + shift) for s in r.spans]
        found.append(Recording(r.rank, r.host, "", 0, sorted(spans, key=lambda s: (s.start, s.depth))))
    return found


def merged(recordings: Iterable[Recording]) -> list[Recording]:
    """`aligned`, and corrected by what no rank knows alone. Alters nothing when done twice.

    A message travels from when both its ends have begun. A receive that waits for the sender to compute is no
    communication yet, nor is a send that waits for the receiver. Then each wait is cut: it is "communication" while
    something of this rank's is in flight.
    """
    recordings = aligned(recordings)
    begun: dict[str | None, int] = defaultdict(int)
    for span in (s for r in recordings for s in r.spans):
        begun[span.link] = max(begun[span.link], span.start)
    found = []
    for r in recordings:
        spans = [s if s.link is None else replace(s, start=min(s.end, begun[s.link])) for s in r.spans]
        flying = union((s.start, s.end) for s in spans if s.in_flight)
        pieces = [piece for span in spans for piece in (_cut(span, flying) if span.kind == "wait" else [span])]
        found.append(Recording(r.rank, r.host, r.clock, r.wall_ns, pieces))
    return aligned(found)


def _cut(wait: Span, flying: Intervals) -> list[Span]:
    whole = [(wait.start, wait.end)]
    if wait.start == wait.end:
        return [wait]  # no time, but it may be the last span of all
    pieces = [(piece, "wait") for piece in minus(whole, flying)]
    pieces += [(piece, "communication") for piece in common(whole, flying)]
    return [replace(wait, start=start, end=end, kind=kind) for (start, end), kind in pieces]


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
        times[span.kind] += mine
    compute = computing(recording)
    communication = union(times["communication"] + [(s.start, s.end) for s in recording.spans if s.in_flight])
    exposed = minus(communication, compute)
    data = minus(union(times["data"]), union(compute + exposed))
    parts = [_length(part) for part in (compute, exposed, data)]
    seconds = [1e-9 * part for part in (*parts, end - sum(parts), _length(communication))]
    return Share(recording.rank, *seconds)


def computing(recording: Recording) -> Intervals:
    """When it computed, of whatever kind."""
    return union(time for span, mine in own(recording.spans) if span.kind in _COMPUTE for time in mine)


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


def common(these: Intervals, those: Intervals) -> Intervals:
    """The times in both."""
    return minus(these, minus(these, those))


def _length(intervals: Intervals) -> int:
    return sum(end - start for start, end in intervals)
