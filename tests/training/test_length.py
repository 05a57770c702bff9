"""A run of so many minutes ends on time though the machine changes its pace on the way."""

from __future__ import annotations

import types
from dataclasses import replace

import pytest

from shoal.job import Job
from shoal.job.data import DataOptions
from shoal.job.optim import OptimOptions
from shoal.job.train import TrainOptions
from shoal.optim.schedule import learning_rate
from shoal.training import length
from shoal.training.length import Length

_START = 1_000_000.0


def run(monkeypatch, optim: OptimOptions, planned: int, pace, ends: float, final: int = 0):
    """(seconds, steps, rates) of a run of `ends` seconds whose step number n takes pace(n) seconds."""
    now = [0.0]
    clock = types.SimpleNamespace(time=lambda: _START + now[0], perf_counter=lambda: now[0])
    monkeypatch.setattr(length, "time", clock)
    job = Job(data=DataOptions(sequence_length=10), optim=optim, train=TrainOptions(steps=planned, global_batch=10))
    parts = types.SimpleNamespace(job=job, mesh=types.SimpleNamespace(largest=lambda value: value))
    fits, rates = Length(_START + ends, glance=0, final=final), []
    while len(rates) < parts.job.train.steps:
        rates.append(learning_rate(parts.job.optim, len(rates), parts.job.train.steps))
        now[0] += pace(len(rates))
        parts.job = fits.decided(parts, len(rates)) or parts.job
    return now[0], parts.job, rates


WSD = OptimOptions(schedule="wsd", warmup=0.05, decay=0.4, final_lr=0.0)


@pytest.mark.parametrize("pace", [0.5, 0.8, 1.0, 1.25, 2.0])
@pytest.mark.parametrize("optim", [WSD, replace(WSD, schedule="cosine"), replace(WSD, schedule="constant")])
def test_a_pace_other_than_the_measured_one_is_made_good(monkeypatch, optim, pace):
    """100 steps were thought to fit into 100 seconds."""
    seconds, job, _ = run(monkeypatch, optim, 100, lambda step: pace, 100.0)
    behind = 80 if optim.schedule == "constant" else 60 if optim.schedule == "wsd" else 6
    least = behind + max(1, behind // 10)
    assert job.train.steps == max(least, round(100 / pace))
    assert seconds == pytest.approx(max(100.0, least * pace), abs=pace)


def test_the_job_that_is_written_has_the_rates_that_were_used(monkeypatch):
    """Also where the pace changes in the middle: the steps behind are measured by their later half."""
    seconds, job, rates = run(monkeypatch, WSD, 100, lambda step: 1.0 if step < 30 else 1.5, 100.0)
    assert seconds == pytest.approx(100, abs=1.5)
    assert job.train.steps == len(rates) < 100
    assert rates == [learning_rate(job.optim, step, job.train.steps) for step in range(job.train.steps)]
    assert rates[59] == WSD.lr > rates[60] > rates[-1] == 0.0


def test_the_last_validation_is_part_of_the_time(monkeypatch):
    """1,500 tokens take as long as training on a third of them: five steps of 100."""
    assert run(monkeypatch, WSD, 100, lambda step: 1.0, 100.0, final=1500)[1].train.steps == 95


def test_what_cannot_be_measured_stays_as_it_was_estimated(monkeypatch):
    for optim in (replace(WSD, schedule="cosine", warmup=0.0), replace(WSD, warmup=1.0)):
        assert run(monkeypatch, optim, 100, lambda step: 2.0, 100.0)[1].train.steps == 100
