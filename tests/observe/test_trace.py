"""Traces: what is recorded, how ranks share one time line, and whose time went where; the chart says the same."""

from __future__ import annotations

import json
import tempfile
import threading
from collections.abc import Iterable
from dataclasses import astuple
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from shoal.job import Layout
from shoal.mesh import Seat, build
from shoal.observe import perfetto, timeline
from shoal.observe.charts_trace import KINDS, shares_text, trace_chart
from shoal.observe.perfetto import read, write
from shoal.observe.timeline import Share, aligned, merged, own, summary
from shoal.observe.trace import Kind, Recording, Span, Tracer, decode, encode

COMPUTE = ("compute", "forward", "backward", "optimizer")
MS = 1_000_000


def recording(rank: int, spans: Iterable[Span], wall_ns: int = 0, clock: str = "one") -> Recording:
    return Recording(rank, "node7", clock, wall_ns, list(spans))


def flight(start: int, end: int) -> Span:
    return Span("all-reduce", "communication", start, end, in_flight=True)


class Clock:
    """Goes on by 10 ns whenever it is looked at."""

    def __init__(self) -> None:
        self.now = 0

    def __call__(self) -> int:
        self.now += 10
        return self.now


def tracing() -> Tracer:
    tracer = Tracer(3, Clock())
    tracer.on = True
    return tracer


# Recording.


def test_spans_nest_and_know_their_place() -> None:
    tracer = tracing()
    with tracer.span("forward", "forward", stage=1, micro_batch=4):
        with tracer.span("all-gather", "communication"):
            pass
        with tracer.span("softmax", "compute"):
            pass
    with tracer.span("AdamW", "optimizer"):
        pass
    found = tracer.take()
    assert found.rank == 3
    assert found.spans == [
        Span("all-gather", "communication", 20, 30, 1),
        Span("softmax", "compute", 40, 50, 1),
        Span("forward", "forward", 10, 60, 0, False, 1, 4),
        Span("AdamW", "optimizer", 70, 80),
    ]
    assert tracer.take().spans == []


def test_what_fails_is_recorded_too() -> None:
    tracer = tracing()
    with pytest.raises(ZeroDivisionError), tracer.span("outer", "compute"), tracer.span("inner", "data"):
        raise ZeroDivisionError
    with tracer.span("next", "compute"):
        pass
    assert [(s.name, s.depth) for s in tracer.take().spans] == [("inner", 1), ("outer", 0), ("next", 0)]


def test_nothing_is_recorded_while_off() -> None:
    """The clock is not even looked at. What began before it was switched off is still recorded."""
    tracer = tracing()
    with tracer.span("before", "compute"):
        tracer.on = False
        with tracer.span("while off", "compute"):
            tracer.flight("all-reduce")()
    looked = tracer.clock.now
    with tracer.span("off", "compute"):
        pass
    tracer.on = True
    assert tracer.clock.now == looked == 20
    assert [s.name for s in tracer.take().spans] == ["before"]


def test_a_flight_may_end_in_another_thread_and_after_other_spans() -> None:
    tracer = tracing()
    with tracer.span("backward", "backward"):
        arrived = tracer.flight("bucket 0")
    thread = threading.Thread(target=arrived)
    thread.start()
    thread.join()
    late = tracer.flight("bucket 1")
    spans = tracer.take().spans
    late()
    assert spans == [
        Span("backward", "backward", 10, 30),
        Span("bucket 0", "communication", 20, 40, in_flight=True),
    ]
    assert tracer.take().spans == []


def recorded(seat: Seat) -> str:
    """A rank's recording of five moments at which all must have come before any goes on."""
    mesh = build(Layout(replicas=seat.world), seat, timeout=60)
    tracer = Tracer(mesh.rank)
    tracer.on = True
    for _ in range(5):
        with tracer.span("largest", "wait"):
            mesh.largest(0.0)
    mesh.close()
    return encode(tracer.take()).decode()


def test_ranks_of_one_machine_share_a_clock(ranks) -> None:
    """Nobody knows the largest number before the last one has come, also by the clocks."""
    found = aligned(decode(text.encode()) for text in ranks.run("tests.observe.test_trace:recorded", 3))
    assert [r.rank for r in found] == [0, 1, 2]
    for spans in zip(*(r.spans for r in found), strict=True):
        assert max(s.start for s in spans) < min(s.end for s in spans)


# One time line.

kinds = st.sampled_from(get_args(Kind))
numbers = st.none() | st.integers(0, 9)


@st.composite
def ranks_spans(draw: st.DrawFn) -> list[Span]:
    """What a rank may record: spans that nest, also empty ones, and flights anywhere."""
    spans: list[Span] = []

    def fill(start: int, end: int, depth: int) -> None:
        edges = sorted(draw(st.lists(st.integers(start, end), max_size=6)))
        for low, high in zip(edges[::2], edges[1::2], strict=False):
            if depth < 3:
                fill(low, high, depth + 1)
            stage, micro = draw(numbers), draw(numbers)
            spans.append(Span(draw(st.text(max_size=3)), draw(kinds), low, high, depth, False, stage, micro))

    fill(0, 60, 0)
    for low, high in draw(st.lists(st.tuples(st.integers(0, 60), st.integers(0, 60)), max_size=4)):
        spans.append(flight(min(low, high), max(low, high)))
    return spans


@st.composite
def worlds(draw: st.DrawFn) -> list[Recording]:
    """Some ranks on up to two machines, whose clocks were started up to ten days apart."""
    walls = {"one": 10**18, "two": 10**18 + draw(st.integers(-864 * 10**12, 864 * 10**12))}
    found = []
    for rank in range(draw(st.integers(1, 3))):
        clock = draw(st.sampled_from(sorted(walls)))
        found.append(recording(rank, draw(ranks_spans()), walls[clock], clock))
    return found


def test_recordings_go_between_ranks_whole() -> None:
    one = recording(2, [Span("send", "communication", 2**62, 2**62 + 1, 1, True, 0, 7), Span("é", "data", 0, 0)])
    assert decode(encode(one)) == one
    for text in (b"", b"{}", encode(one).replace(b"data", b"date")):
        with pytest.raises(msgspec.DecodeError):
            decode(text)


def test_machines_are_put_on_one_time_line() -> None:
    """The clock of `b` started 500 ns after that of `a`; its second rank looked while the wall clock was set."""
    a = recording(0, [Span("x", "compute", 1000, 1100)], 7_000, "a")
    walls = {3: 7_500, 1: 7_509, 2: 7_500}
    b = [recording(rank, [Span("x", "compute", 550, 600)], wall, "b") for rank, wall in walls.items()]
    found = aligned([a, *b])
    assert [(r.rank, r.spans[0].start, r.spans[0].end) for r in found] == [
        (0, 0, 100),
        (1, 50, 100),
        (2, 50, 100),
        (3, 50, 100),
    ]
    assert aligned(found) == found


def test_clocks_of_machines_may_be_an_hour_apart() -> None:
    world = [recording(r, [Span("x", "compute", 0, MS)], r * 3600 * 10**9, f"{r}") for r in range(2)]
    assert summary(world)[0].bubble == pytest.approx(3600)
    moved = [msgspec.structs.replace(r, spans=[Span("x", "compute", -r.wall_ns, MS - r.wall_ns)]) for r in world]
    assert summary(moved)[0].bubble == 0


@settings(deadline=None)
@given(worlds())
def test_aligned_keeps_lengths_and_begins_at_zero(world) -> None:
    found = aligned(world)
    assert aligned(found) == found
    starts = [s.start for r in found for s in r.spans]
    assert not starts or min(starts) == 0
    for before, after in zip(world, found, strict=True):
        assert sorted(s.end - s.start for s in before.spans) == sorted(s.end - s.start for s in after.spans)


# Whose time went where.


def painted(spans: list[Span], end: int) -> dict[str, int]:
    """The oracle: every nanosecond by itself."""
    found = dict.fromkeys(("compute", "exposed", "data", "bubble", "communication"), 0)
    for now in range(end):
        open_ = [s for s in spans if s.start <= now < s.end]
        nested = [s for s in open_ if not s.in_flight]
        doing = max(nested, key=lambda s: s.depth).kind if nested else "nothing"
        communicates = doing == "communication" or len(open_) > len(nested)
        found["communication"] += communicates
        if doing in COMPUTE:
            found["compute"] += 1
        elif communicates:
            found["exposed"] += 1
        else:
            found["data" if doing == "data" else "bubble"] += 1
    return found


def assert_as_painted(world: list[Recording]) -> None:
    world = aligned(world)
    end = max((s.end for r in world for s in r.spans), default=0)
    for share, one in zip(summary(world), world, strict=True):
        wanted = painted(one.spans, end)
        for name, value in wanted.items():
            assert round(1e9 * getattr(share, name), 3) == value, name


@settings(deadline=None)
@given(st.lists(ranks_spans(), min_size=1, max_size=3))
def test_shares_are_those_of_every_nanosecond(spans) -> None:
    assert_as_painted([recording(rank, some) for rank, some in enumerate(spans)])


@settings(deadline=None)
@given(worlds())
def test_parts_add_up_to_the_step(world) -> None:
    """Of each rank: within rounding of seconds to a double, 1e-12 of the whole."""
    found = aligned(world)
    whole = 1e-9 * max((s.end for r in found for s in r.spans), default=0)
    for share in summary(world):
        parts = (share.compute, share.exposed, share.data, share.bubble)
        assert all(part >= 0 for part in parts)
        assert sum(parts) == pytest.approx(whole, rel=1e-12, abs=1e-30)


@settings(deadline=None)
@given(ranks_spans())
def test_each_moment_is_owned_by_the_innermost(spans) -> None:
    for span, mine in own(spans):
        inner = [s for s in spans if not s.in_flight and s.depth > span.depth]
        moments = {now for start, end in mine for now in range(start, end)}
        others = {now for s in inner for now in range(s.start, s.end)}
        assert moments == set(range(span.start, span.end)) - others


def pipeline(stages: int, micro_batches: int, forward: int, backward: int) -> list[Recording]:
    """GPipe (Huang et al. 2019, section 2.3): all forwards, then all backwards, equally long on every stage."""
    found = []
    turn = (stages + micro_batches - 1) * forward
    for stage in range(stages):
        spans = []
        for m in range(micro_batches):
            start, back = (stage + m) * forward, turn + (stages - 1 - stage + m) * backward
            spans.append(Span("forward", "forward", start, start + forward, 0, False, stage, m))
            spans.append(Span("backward", "backward", back, back + backward, 0, False, stage, m))
        found.append(recording(stage, spans))
    return found


@pytest.mark.parametrize(("stages", "micro_batches"), [(1, 1), (2, 3), (4, 8)])
def test_bubble_of_a_pipeline(stages: int, micro_batches: int) -> None:
    """(p − 1) / (m + p − 1) of the step on every stage."""
    for share in summary(pipeline(stages, micro_batches, 10 * MS, 20 * MS)):
        whole = share.compute + share.bubble
        assert whole == pytest.approx(0.03 * (stages + micro_batches - 1))
        assert share.bubble / whole == pytest.approx((stages - 1) / (micro_batches + stages - 1))
        assert share.exposed == share.data == share.communication == 0


def test_communication_is_exposed_where_nothing_is_computed() -> None:
    """Backward to 60; buckets fly from 20 to 50 and 40 to 80; a wait for them to 90; a gap; optimizer to 100."""
    spans = [
        Span("backward", "backward", 0, 60 * MS),
        flight(20 * MS, 50 * MS),
        flight(40 * MS, 80 * MS),
        Span("wait", "wait", 60 * MS, 90 * MS),
        Span("AdamW", "optimizer", 95 * MS, 100 * MS),
    ]
    (share,) = summary([recording(0, spans)])
    wanted = Share(0, compute=0.065, exposed=0.02, data=0, bubble=0.015, communication=0.06)
    assert astuple(share) == pytest.approx(astuple(wanted), abs=1e-12)


def test_communication_inside_a_forward_is_exposed() -> None:
    """A blocking gather of 30 of a forward's 100 ms is no computing, though the forward spans it."""
    spans = [Span("forward", "forward", 0, 100 * MS), Span("all-gather", "communication", 10 * MS, 40 * MS, 1)]
    (share,) = summary([recording(0, spans)])
    assert (share.compute, share.exposed) == pytest.approx((0.07, 0.03))


def test_a_rank_that_ends_early_waits_for_the_last() -> None:
    world = [recording(0, [Span("x", "compute", 0, 40 * MS)]), recording(1, [Span("x", "compute", 10 * MS, 100 * MS)])]
    assert [share.bubble for share in summary(world)] == pytest.approx([0.06, 0.01])


def test_nothing_recorded_is_no_time() -> None:
    assert summary([recording(0, [])]) == [Share(0, 0, 0, 0, 0, 0)]
    assert summary([]) == []


def message(start: int, end: int, name: str, link: str) -> Span:
    return Span(name, "communication", start * MS, end * MS, in_flight=True, link=link)


def slow_link(computed: int, arrived: int, asked: int) -> list[Recording]:
    """Rank 0 computes until `computed` ms. Its message, for which rank 1 asks at `asked`, arrives there at `arrived`,
    and is computed with for 10 ms."""
    end = arrived + 10
    sender = [Span("forward", "forward", 0, computed * MS), message(computed, arrived, "send", "0 to 1, 1")]
    receiver = [
        Span("data", "data", 0, asked * MS),
        message(asked, arrived, "recv", "0 to 1, 1"),
        Span("wait", "wait", asked * MS, arrived * MS),
        Span("forward", "forward", arrived * MS, end * MS),
    ]
    return [recording(0, sender), recording(1, receiver)]


@pytest.mark.parametrize(
    ("computed", "arrived", "asked", "bubble", "exposed"),
    [
        (40, 100, 10, 30, 60),  # until the sender begins to send it is its computing that is waited for
        (40, 41, 10, 30, 1),
        (5, 100, 10, 0, 90),  # it was ready before anybody asked
    ],
)
def test_a_slow_link_is_no_bubble(computed: int, arrived: int, asked: int, bubble: int, exposed: int) -> None:
    share = summary(merged(slow_link(computed, arrived, asked)))[1]
    assert (share.bubble, share.exposed, share.compute) == pytest.approx((bubble / 1e3, exposed / 1e3, 0.01))
    assert share.hidden == 0


def test_a_send_that_nobody_takes_yet_does_not_travel() -> None:
    """The receiver computes until 50; the sender, which has begun at 10, waits until 60."""
    sender = [message(10, 60, "send", "a"), Span("wait", "wait", 10 * MS, 60 * MS), Span("x", "data", 0, 10 * MS)]
    receiver = [Span("backward", "backward", 0, 50 * MS), message(50, 60, "recv", "a")]
    share = summary(merged([recording(0, sender), recording(1, receiver)]))[0]
    assert (share.bubble, share.exposed, share.data) == pytest.approx((0.04, 0.01, 0.01))


@settings(deadline=None, max_examples=50)
@given(worlds())
@example([recording(0, [Span("", "compute", 0, 0)]), recording(1, [Span("", "wait", 1, 1)])])
def test_without_messages_merging_moves_no_time(world) -> None:
    """It cuts waits, in which nothing is nested."""

    def outer(wait: Span, spans: list[Span]) -> bool:
        return any(s.depth > wait.depth and wait.start <= s.start <= wait.end for s in spans)

    world = [
        msgspec.structs.replace(r, spans=[s for s in r.spans if s.kind != "wait" or not outer(s, r.spans)])
        for r in world
    ]
    found = merged(world)
    assert merged(found) == found
    for now, before in zip(summary(found), summary(world), strict=True):
        assert astuple(now) == pytest.approx(astuple(before))


intervals = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), max_size=8)


@given(intervals, intervals)
def test_intervals_are_sets_of_moments(a, b) -> None:
    def moments(some: Iterable[tuple[int, int]]) -> set[int]:
        return {now for start, end in some for now in range(start, end)}

    these, those = timeline.union(a), timeline.union(b)
    assert moments(these) == moments(a)
    rest = timeline.minus(these, those)
    assert moments(rest) == moments(a) - moments(b)
    for found in (these, rest):
        assert all(start < end for start, end in found)
        assert all(before[1] < after[0] for before, after in pairwise(found))


# The file.


@settings(deadline=None, max_examples=30)
@given(worlds())
def test_a_file_is_read_as_written(world) -> None:
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder) / "trace.json", world)
        for found, wanted in zip(read(Path(folder) / "trace.json"), aligned(world), strict=True):
            assert (found.rank, found.host) == (wanted.rank, wanted.host)
            assert sorted(found.spans, key=repr) == sorted(wanted.spans, key=repr)


@settings(deadline=None, max_examples=30)
@given(worlds())
def test_what_a_thread_does_nests(world) -> None:
    """Perfetto leaves out events that overlap without nesting; the outer one comes first."""
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder) / "trace.json", world)
        assert_nested(json.loads((Path(folder) / "trace.json").read_text())["traceEvents"])


def assert_nested(events: list[dict[str, Any]]) -> None:
    threads: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for event in events:
        if event["ph"] == "X":
            open_ = threads.setdefault((event["pid"], event["tid"]), [])
            start = round(1000 * event["ts"])
            end = start + round(1000 * event["dur"])
            while open_ and open_[-1][1] <= start:
                open_.pop()
            assert not open_ or (open_[-1][0] <= start and end <= open_[-1][1])
            open_.append((start, end))


def test_names_and_times_in_the_file(tmp_path) -> None:
    spans = [Span("backward", "backward", 5_000, 9_500, 0, False, 1, 2), flight(6_000, 8_000), flight(7_000, 11_001)]
    write(tmp_path / "trace.json", [recording(0, [Span("x", "data", 1_000, 2_000)]), recording(1, spans)])
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    named = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e["name"] == "thread_name"}
    assert named == {(1, 1): "compute", (2, 1): "compute", (2, 2): "communication", (2, 3): "communication 2"}
    assert [e["args"]["name"] for e in events if e["name"] == "process_name"] == ["rank 0", "rank 1"]
    assert [(e["pid"], e["tid"], e["name"], e["cat"], e["ts"], e["dur"]) for e in events if e["ph"] == "X"] == [
        (1, 1, "x", "data", 0, 1),
        (2, 1, "backward", "backward", 4, 4.5),
        (2, 2, "all-reduce", "communication", 5, 2),
        (2, 3, "all-reduce", "communication", 6, 4.001),
    ]
    (backward,) = [e for e in events if e["name"] == "backward"]
    assert backward["args"] == {"depth": 0, "stage": 1, "micro_batch": 2}


@pytest.mark.parametrize("text", [None, "", "{}", "[]", '{"traceEvents": [{"ph": "X", "name": "a"}]}'])
def test_a_missing_or_damaged_file_has_no_recordings(tmp_path, text) -> None:
    if text is not None:
        (tmp_path / "trace.json").write_text(text)
    assert read(tmp_path / "trace.json") == []


# The chart.


def test_the_chart_has_a_lane_for_each_rank_and_its_shares() -> None:
    chart = trace_chart(pipeline(4, 8, 10 * MS, 20 * MS))
    assert chart is not None
    bars = {t["name"]: t for t in chart["data"] if t["type"] == "bar"}
    assert set(bars) == {"forward", "backward"}
    assert [bars["forward"]["y"].count(lane) for lane in range(4)] == [8] * 4
    assert (bars["forward"]["base"][8], bars["forward"]["x"][8]) == (10, 10)
    assert bars["backward"]["text"][0] == "backward, stage 0, micro-batch 0"
    texts = chart["data"][-1]
    shares = "compute 73 % · exposed communication 0 % · data 0 % · bubble 27 %; hidden communication 0 %"
    assert texts["text"] == [shares] * 4
    assert chart["layout"]["yaxis"]["ticktext"] == [f"rank {r}" for r in range(4)]
    assert chart["layout"]["xaxis"]["range"] == [0, 330]


def test_shares_in_words() -> None:
    share = Share(0, compute=0.7, exposed=0.12, data=0.02, bubble=0.16, communication=0.5)
    words = "compute 70 % · exposed communication 12 % · data 2 % · bubble 16 %; hidden communication 38 %"
    assert shares_text(share) == words


@settings(deadline=None)
@given(worlds())
def test_plotly_takes_the_chart(world) -> None:
    """By its own schema."""
    import plotly.graph_objects  # here, because the ranks import this file too, and this takes seconds

    chart = trace_chart(world)
    if not any(span.end > 0 for r in aligned(world) for span in r.spans):
        assert chart is None
        return
    plotly.graph_objects.Figure(data=chart["data"], layout=chart["layout"])
    assert set(get_args(Kind)) == {kind for kind, _ in KINDS}


@settings(deadline=None, max_examples=50)
@given(st.lists(ranks_spans(), min_size=1, max_size=3))
def test_bars_cover_what_the_spans_own(spans) -> None:
    """In units of 1 µs, which the chart keeps."""
    world = [
        recording(rank, [msgspec.structs.replace(s, start=1000 * s.start, end=1000 * s.end) for s in some])
        for rank, some in enumerate(spans)
    ]
    chart = trace_chart(world)
    for kind in get_args(Kind):
        wanted = sorted(
            (r.rank, start, end)
            for r in aligned(world)
            for start, end in timeline.union(i for span, mine in own(r.spans) if span.kind == kind for i in mine)
        )
        drawn: dict[int, list[tuple[int, int]]] = {}
        for bar in (t for t in (chart or {"data": []})["data"] if t["name"] == kind):
            for y, base, x in zip(bar["y"], bar["base"], bar["x"], strict=True):
                drawn.setdefault(int(y), []).append((round(1e6 * base), round(1e6 * (base + x))))
        assert sorted((lane, *i) for lane, some in drawn.items() for i in timeline.union(some)) == wanted


def test_many_short_spans_and_many_ranks_stay_small() -> None:
    """10,000 spans a rank that no screen could tell apart are few bars; of 100 ranks 25 are drawn."""
    short = [Span("x", "compute", 10 * i, 10 * i + 9) for i in range(10_000)]
    chart = trace_chart([recording(rank, short if rank == 0 else short[-1:]) for rank in range(100)])
    assert chart is not None
    assert chart["unit"] == "of 25 of 100 ranks"
    assert len(chart["data"][0]["x"]) < 100
    assert chart["layout"]["yaxis"]["ticktext"][1] == "rank 8"


# What the tests above would catch.


def test_sees_computing_that_counts_while_it_waits_for_a_gather(monkeypatch: pytest.MonkeyPatch) -> None:
    """A forward that owns also what is nested in it."""
    monkeypatch.setattr(timeline, "own", lambda spans: [(s, [(s.start, s.end)]) for s in spans if not s.in_flight])
    with pytest.raises(AssertionError):
        test_communication_inside_a_forward_is_exposed()


def test_sees_hidden_communication_counted_as_exposed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timeline, "minus", lambda these, those: these)
    with pytest.raises(AssertionError):
        test_communication_is_exposed_where_nothing_is_computed()


def test_sees_a_receive_that_travels_from_when_it_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "merged", aligned)
    with pytest.raises(AssertionError):
        test_a_slow_link_is_no_bubble(40, 100, 10, 30, 60)


def test_sees_flights_that_overlap_on_one_thread(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setattr(perfetto, "_lanes", lambda flights: [list(flights)])
    write(tmp_path / "trace.json", [recording(0, [flight(0, 20), flight(10, 30)])])
    with pytest.raises(AssertionError):
        assert_nested(json.loads((tmp_path / "trace.json").read_text())["traceEvents"])
