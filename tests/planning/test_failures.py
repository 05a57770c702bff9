"""What failures leave of a planned run: against the same run simulated, and against a sum by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from shoal.job import Job
from shoal.planning import asked, cluster, failures, simulation
from shoal.planning.asked import Wanted
from shoal.planning.simulation import Scene
from shoal.planning.timeline import Seconds
from tests.planning.plans import plan

LARGE = asked.of_model("llama3-405b", cluster.named("h100x16384"), Wanted(tokens="15T"))


def test_days_are_those_of_the_run_simulated():
    """Steps of a minute, a checkpoint after as many of them as come nearest to the interval."""
    question = replace(LARGE, storage=4e6, restart=900.0)
    found = failures.expected(question)
    every, steps = round(found.shares.interval / 60), 200_000
    scene = Scene("gpipe", 1, 1, 1, Seconds([60.0], [0.0], [0.0]))
    failing = simulation.Failures(question.cluster.mtbf, 900.0, every, stall=found.stall)
    simulated = simulation.run(scene, steps, failing, seed=2).seconds
    days = found.days(plan("replicas=1", 60.0, days=steps * 60 / 86400))
    assert days * 86400 == pytest.approx(simulated, rel=0.01)
    assert found.shares.training < 0.85, "or the simulation would say little"


def test_by_hand():
    """419 failures of 16,384 devices in 54 days; 12 bytes of 405e9 parameters at 2 TB/s; √(2 δ M) between two; half of
    that and ten minutes are lost each time."""
    found = failures.expected(LARGE)
    assert found.mtbf == pytest.approx(54 * 86400 / 419, rel=0.01)
    assert found.stall == pytest.approx(12 * 405.9e9 / (16384 * 0.12e9), rel=1e-3)
    every = (2 * found.stall * found.mtbf) ** 0.5
    lost = found.stall / every + (every / 2 + 600) / found.mtbf
    assert 1 / found.shares.training == pytest.approx(1 + lost, rel=0.003)
    # Llama 3 405B was trained for more than 90 % of the time (Llama 3, 2024, section 3.3.4).
    assert 0.90 < found.shares.training < 0.95


def test_what_a_cluster_does_not_say_is_not_made_up():
    quiet = asked.of_model("llama3-8b", cluster.named("h100x8+a100-80x8"), Wanted())
    assert failures.expected(quiet) is None


def test_a_restart_of_no_time_is_one():
    job = replace(Job(), model=replace(Job().model, vocab_size=500))
    assert asked.of_job(job, cluster.named("h100x8"), Wanted(restart=0.0)).restart == 0
    assert asked.of_job(job, cluster.named("h100x8"), Wanted()).restart == 600
