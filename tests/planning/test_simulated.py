"""A planned run, simulated: against the expected goodput, and what is told and drawn of it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from shoal.errors import JobError
from shoal.job import Layout
from shoal.observe import perfetto
from shoal.planning import asked, scene, simulated
from shoal.planning.simulation import MOST

HOUR = 3600.0


@pytest.fixture(scope="module")
def planned():
    """A step of 4 replicas of 4 pipeline ranks, two devices each."""
    where = asked.cluster_of("h100x32", 0.0)
    question = asked.of_model("llama3-8b", where, asked.Wanted(global_batch=256, tokens="1T"))
    return question, scene.staged(question, Layout.parse("replicas=4,pipeline=4,tensor=2,micro_batch=1"))


def test_a_long_run_loses_what_is_expected(planned):
    """Some 1,400 failures, which lose a fifth of the time: their number is within 3/√1400 of its mean in nearly all
    seeds, so the share is within 0.02."""
    found = simulated.simulate(*planned, 400_000, mtbf=HOUR, every=0, seed=3)
    assert len(found.outcome.failures) > 1200
    assert found.expected is not None
    assert 0.6 < found.expected.training < 0.9
    assert found.outcome.goodput == pytest.approx(found.expected.training, abs=0.02)
    assert found.failures.every * found.usual == pytest.approx(found.expected.interval)
    assert found.days == pytest.approx(1e12 / found.tokens_per_second / 86400)


def test_slow_devices_and_the_seed(planned):
    question, staged = planned
    plain = simulated.simulate(question, staged, 4, mtbf=None, every=0, seed=0)
    assert plain.outcome.goodput == 1
    assert plain.outcome.seconds == pytest.approx(4 * plain.usual)
    uneven = replace(staged, scene=replace(staged.scene, jitter=0.1))
    once, again, other = (simulated.simulate(question, uneven, 4, None, 0, seed) for seed in (1, 1, 2))
    assert once.outcome.seconds == again.outcome.seconds != other.outcome.seconds
    assert once.outcome.seconds > plain.outcome.seconds
    assert "waiting for slow devices" in simulated.text(once)
    # Sums that cancel leave something of 1e-16.
    assert "waiting for slow devices" not in simulated.text(simulated.simulate(question, staged, 97, None, 0, 0))


def test_checkpoints_alone_cost_their_share(planned):
    found = simulated.simulate(*planned, 1000, mtbf=None, every=10, seed=0)
    assert found.expected is not None
    # The last step is followed by none: one of a hundred less.
    assert found.outcome.parts["checkpoints"] == pytest.approx(99 * found.failures.stall)
    assert found.outcome.goodput == pytest.approx(found.expected.training, rel=0.01)


def test_it_is_told_and_drawn(planned, tmp_path):
    found = simulated.simulate(*planned, 20_000, mtbf=HOUR, every=0, seed=0)
    told = simulated.text(found)
    for words in ("4 pipelines of 4 ranks of 2 devices, seed 0", "restarts", "and ", "goodput"):
        assert words in told
    result = simulated.result(found)
    assert sum(result["parts_seconds"].values()) == pytest.approx(result["seconds"])
    assert result["failures"][0].keys() == {"at", "step", "lost"}
    page, trace = tmp_path / "step.html", tmp_path / "step.json"
    assert "2 pipelines" in simulated.draw(*planned, 0, 2, str(page), str(trace))
    assert "simulated, 2 pipelines of 4" in page.read_text()
    drawn = perfetto.read(trace)
    assert len(drawn) == 8
    assert {recording.spans[-1].name for recording in drawn} == {"optimizer"}
    assert drawn[0].spans[-1].end == pytest.approx(1e9 * found.usual, rel=1e-6)
    with pytest.raises(JobError, match="cannot be written"):
        simulated.draw(*planned, 0, 1, str(tmp_path / "none" / "step.html"), "")


def test_a_restart_that_never_ends_is_refused(planned):
    question, staged = planned
    slow = replace(question, restart=10 * HOUR)
    with pytest.raises(JobError, match="leaves no time for a restart"):
        simulated.simulate(slow, staged, 100_000, mtbf=HOUR / 10, every=0, seed=0)


def test_longer_than_can_be_simulated(planned):
    question, staged = planned
    jittery = replace(staged, scene=replace(staged.scene, jitter=0.1))
    with pytest.raises(JobError, match="too many to simulate"):
        simulated.simulate(question, jittery, MOST // 16 + 1, None, 0, 0)
