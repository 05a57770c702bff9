"""`run.trace`: every rank's spans of one step, on one time line, in a file and in the report."""

from __future__ import annotations

from dataclasses import replace

import pytest

from shoal.observe import trace


@pytest.mark.parametrize(
    ("layout", "stages"),
    [("fsdp=2,micro_batch=3", {None}), ("pipeline=2,micro_batch=2,schedule=zbv", {0, 1, 2, 3})],
)
def test_a_traced_step_has_every_forward_and_backward_of_every_rank(tiny, train, tmp_path, layout, stages):
    run = tmp_path / "run"
    model = {"num_hidden_layers": 4}
    job = tiny(run, layout, train={"steps": 3}, model=model)
    train(replace(job, run=replace(job.run, trace=2)), finish=True)
    recordings = trace.read(run / trace.FILE)
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
    shares = trace.summary(recordings)
    wholes = [s.compute + s.exposed + s.data + s.bubble for s in shares]
    assert wholes[0] == pytest.approx(wholes[1])
    assert all(share.compute > 0 for share in shares)
    assert "One step" in (run / "report.html").read_text()
    assert f"trace of step 2: {run / trace.FILE}" in (run / "log.txt").read_text()


def test_nothing_is_traced_where_nobody_asked(tiny, train, tmp_path):
    run = tmp_path / "run"
    train(tiny(run, "replicas=2", train={"steps": 2}))
    assert not (run / trace.FILE).exists()


def test_functions_are_as_they_were_after_the_step(ranks):
    assert ranks.run("tests.training.tracing:before_and_after", 2) == [[True, True]] * 2
