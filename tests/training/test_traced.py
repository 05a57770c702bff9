"""`run.trace`: every rank's spans of one step, on one time line, in a file and in the report."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from itertools import pairwise

import pytest

from shoal.job import read, write
from shoal.observe import perfetto, timeline, trace


@pytest.mark.parametrize(
    ("layout", "stages"),
    [("fsdp=2,micro_batch=3", {None}), ("pipeline=2,micro_batch=2,schedule=zbv", {0, 1, 2, 3})],
)
def test_a_traced_step_has_every_forward_and_backward_of_every_rank(tiny, train, tmp_path, layout, stages):
    run = tmp_path / "run"
    model = {"num_hidden_layers": 4}
    job = tiny(run, layout, train={"steps": 3}, model=model)
    train(replace(job, run=replace(job.run, trace=2)), finish=True)
    recordings = perfetto.read(run / perfetto.FILE)
    assert [r.rank for r in recordings] == [0, 1]
    batches = 2 if stages == {None} else 6
    for recording in recordings:
        forwards = [s for s in recording.spans if s.name == "forward" and (s.stage is not None) == (None not in stages)]
        seen = {(s.stage, s.micro_batch) for s in forwards}
        mine = {None} if None in stages else {recording.rank, 3 - recording.rank}
        assert seen == {(stage, batch) for stage in mine for batch in range(batches)}
        backwards = {(s.stage, s.micro_batch) for s in recording.spans if s.kind == "backward"}
        assert seen <= backwards
        kinds = {s.kind for s in recording.spans}
        assert {"forward", "backward", "optimizer", "data", "communication"} <= kinds
        assert ("wait" in kinds) == (None not in stages)
    shares = timeline.summary(recordings)
    wholes = [s.compute + s.exposed + s.data + s.bubble for s in shares]
    assert wholes[0] == pytest.approx(wholes[1])
    assert all(share.compute > 0 for share in shares)
    assert "One step" in (run / "report.html").read_text()
    assert f"trace of step 2: {run / perfetto.FILE}" in (run / "log.txt").read_text()


def test_nothing_is_traced_where_nobody_asked(tiny, train, tmp_path):
    run = tmp_path / "run"
    train(tiny(run, "replicas=2", train={"steps": 2}))
    assert not (run / perfetto.FILE).exists()


def test_functions_are_as_they_were_after_the_step(ranks):
    assert ranks.run("tests.training.tracing:before_and_after", 2) == [[True, True]] * 2


@pytest.mark.parametrize(
    ("layout", "operations"),
    [
        ("replicas=2,micro_batch=3", {"all_reduce, replicas"}),
        ("fsdp=2", {"all_gather, fsdp", "reduce_scatter, fsdp"}),
        ("fsdp=2,recompute=block", {"all_gather, fsdp", "reduce_scatter, fsdp"}),
        ("context=2", {"send, context", "recv, context"}),
    ],
)
def test_what_travels_during_backward_is_seen(tiny, train, tmp_path, layout, operations):
    """On some rank: of two that exchange, it is the later one whose messages travel from within its backward on."""
    run = tmp_path / "run"
    job = tiny(run, layout, train={"steps": 2}, model={"num_hidden_layers": 4})
    train(replace(job, run=replace(job.run, trace=2)))
    recordings = perfetto.read(run / perfetto.FILE)
    seen = set()
    for recording in recordings:
        backward = [(s.start, s.end) for s in recording.spans if s.kind == "backward"]
        flights = [s for s in recording.spans if s.in_flight]
        seen |= {s.name for s in flights if timeline.common([(s.start, s.end)], backward)}
    assert operations <= seen


def test_what_a_pipeline_sends_is_hidden_behind_what_both_its_ends_compute(ranks):
    """Both compute from before the message travels until it has arrived, and that is no luck: one tells the other."""
    recordings = timeline.merged(map(trace.decode, ranks.run("tests.training.tracing:message", 2)))
    for recording, name in zip(recordings, ("send, pipeline", "recv, pipeline"), strict=True):
        (backward,) = (s for s in recording.spans if s.kind == "backward")
        (flight,) = (s for s in recording.spans if s.in_flight)
        assert flight.name == name
        assert backward.start < flight.start < flight.end < backward.end
    for share in timeline.summary(recordings):
        assert 0 < share.hidden <= share.communication


@pytest.mark.parametrize("recompute", ["none", "block"])
def test_a_sharded_block_is_gathered_while_another_is_computed(tiny, train, tmp_path, recompute):
    """Told by the order in which things begin: how much of it is hidden is the machine's business."""
    job = tiny(tmp_path / "run", f"fsdp=2,recompute={recompute}", train={"steps": 2}, model={"num_hidden_layers": 4})
    for events in train(job, entry="tests.training.tracing:order"):
        turn, end = events.index("backward"), events.index("update")
        forward, backward = events[:turn], events[turn:end]
        before = [one for one, other in pairwise(forward) if other == "block"]
        assert before == ["gather", "gather", "gather", "wait"]
        after = [other for one, other in pairwise(backward) if one == "gather"]
        assert len(after) == 4
        assert [other for other in after if other == "wait"] == after[:1]


def test_both_ends_of_a_message_are_known_to_be_one(tiny, train, tmp_path):
    run = tmp_path / "run"
    job = tiny(run, "pipeline=2,micro_batch=3", train={"steps": 2})
    train(replace(job, run=replace(job.run, trace=2)))
    ends = defaultdict(list)
    for recording in perfetto.read(run / perfetto.FILE):
        for span in recording.spans:
            if span.link is not None:
                ends[span.link].append(span)
    # Of each micro-batch one message forward and one back, and two of the tied matrix's gradient.
    assert len(ends) >= 4
    for first, second in ends.values():
        assert {first.name, second.name} == {"send, pipeline", "recv, pipeline"}
        assert first.start == second.start  # merged: both travel from when the later one began


@pytest.mark.parametrize("late", [7, 2])
def test_a_step_that_never_comes_is_told(tiny, train, tmp_path, late):
    """Beyond the last one, or over when the run was taken up again."""
    run = tmp_path / "run"
    job = tiny(run, "replicas=2", train={"steps": 3})
    traced = replace(job, run=replace(job.run, trace=late))
    train(job if late == 2 else traced)
    if late == 2:
        (run / "job.toml").write_text(write(replace(read(run / "job.toml"), run=traced.run)))
        train(traced, resume=True)
    said = {7: "step 7 is never reached, the last one is 3", 2: "step 2 was over before this start"}[late]
    assert f"warning: {said}: no trace is written" in (run / "log.txt").read_text()
    assert not (run / perfetto.FILE).exists()
