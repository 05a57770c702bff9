"""A run of so many minutes ends on time though the machine changes its pace on the way."""

from __future__ import annotations

import types
from dataclasses import replace

import pytest

from shoal.job import Job
from shoal.job.data import DataOptions
from shoal.job.optim import OptimOptions
from shoal.job.sync import SyncOptions
from shoal.job.train import TrainOptions
from shoal.optim.schedule import learning_rate
from shoal.training import length
from shoal.training.length import Length

_START = 1_000_000.0


def agreed(value: float) -> float:
    return value


def run(monkeypatch, optim: OptimOptions, planned: int, pace, ends: float, final: int = 0):
    """(seconds, job, rates) of a run of `ends` seconds whose step number n takes pace(n) seconds."""
    now = [0.0]
    clock = types.SimpleNamespace(time=lambda: _START + now[0], perf_counter=lambda: now[0])
    monkeypatch.setattr(length, "time", clock)
    job = Job(data=DataOptions(sequence_length=10), optim=optim, train=TrainOptions(steps=planned, global_batch=10))
    parts = types.SimpleNamespace(job=job, mesh=types.SimpleNamespace(largest=lambda value: agreed(value)))
    fits, rates = Length(_START + ends, glance=0, final=final, _every=max(1, planned // 50)), []
    while len(rates) < parts.job.train.steps:
        rates.append(learning_rate(parts.job.optim, len(rates), parts.job.train.steps))
        now[0] += pace(len(rates))
        parts.job = fits.follow(parts.job, len(rates), parts.mesh.largest) or parts.job
    return now[0], parts.job, rates


WSD = OptimOptions(schedule="wsd", warmup=0.05, decay=0.4, final_lr=0.0)
SCHEDULES = [WSD, replace(WSD, schedule="cosine"), replace(WSD, schedule="constant")]


@pytest.mark.parametrize("pace", [0.1, 0.5, 0.8, 1.0, 1.25, 2.0, 8.0])
@pytest.mark.parametrize("optim", SCHEDULES)
def test_a_pace_other_than_the_measured_one_is_made_good(monkeypatch, optim, pace):
    """1,000 steps were thought to fit into 1,000 seconds."""
    seconds, job, rates = run(monkeypatch, optim, 1000, lambda step: pace, 1000.0)
    assert job.train.steps == len(rates) == pytest.approx(1000 / pace, abs=1)
    assert seconds == pytest.approx(1000, abs=pace)
    if optim.schedule == "wsd":  # its shape stays, too
        assert len(rates) - rates[::-1].index(optim.lr) == pytest.approx(0.6 * len(rates), abs=21)


@pytest.mark.parametrize("optim", SCHEDULES)
@pytest.mark.parametrize("change", [0.6, 1.5])
def test_the_job_that_is_written_has_the_rates_that_were_used(monkeypatch, optim, change):
    """Also where the pace changes in the middle, of which a cosine takes no notice any more."""
    seconds, job, rates = run(monkeypatch, optim, 1000, lambda step: 1.0 if step < 300 else change, 1000.0)
    if optim.schedule != "cosine":
        assert seconds == pytest.approx(1000, abs=60)
    assert rates == [learning_rate(job.optim, step, job.train.steps) for step in range(job.train.steps)]
    assert optim.schedule == "constant" or rates[-1] == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("pace", [0.6, 1.7])
@pytest.mark.parametrize("decay", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("warmup", [0.0, 0.05, 1.0])
def test_any_shares(monkeypatch, warmup, decay, pace):
    """A run that is all warm-up cannot become shorter, and one that is all decay neither that nor longer."""
    optim = replace(WSD, warmup=warmup, decay=decay)
    seconds, job, rates = run(monkeypatch, optim, 1000, lambda step: pace, 1000.0)
    job.validate()
    assert rates == [learning_rate(job.optim, step, job.train.steps) for step in range(job.train.steps)]
    as_it_was = (warmup == 1 and pace > 1) or (warmup == 0 and decay == 1)
    assert seconds == pytest.approx(1000 * pace if as_it_was else 1000, abs=30)


def test_ranks_that_see_different_paces_agree(monkeypatch):
    """What is reduced over the ranks decides, not what one of them has measured."""
    seen = []
    for largest in (lambda value: value, lambda value: 400.0):
        monkeypatch.setattr(__name__ + ".agreed", largest)
        seen.append(run(monkeypatch, WSD, 1000, lambda step: 1.0, 700.0)[1].train.steps)
    assert seen[0] == pytest.approx(700, abs=1)
    assert seen[1] > 900, "400 steps more, wherever it looked last"


def test_the_first_estimate_counts_validations(monkeypatch):
    """Steps of a second; 3,000 tokens on the way and at the end take as long as ten steps of 100."""
    now = [0.0]

    def step(*_: object) -> None:
        now[0] += 1.0

    clock = types.SimpleNamespace(time=lambda: _START + now[0], perf_counter=lambda: now[0])
    monkeypatch.setattr(length, "time", clock)
    monkeypatch.setattr(length.device, "synchronize", lambda where: None)
    job = Job(data=DataOptions(sequence_length=10), train=TrainOptions(steps=1, global_batch=10))
    parts = types.SimpleNamespace(
        job=job, mesh=types.SimpleNamespace(largest=lambda value: value, device=None, replica=1), objective=None,
        sync=types.SimpleNamespace(begin=lambda step: None, end=lambda tally: None),
        replica=types.SimpleNamespace(gradients=step),
    )  # fmt: skip
    measured = 5  # steps of the measurement itself
    assert Length(_START + 1000, glance=3000, final=3000).estimate(parts, []) == 1000 - measured - 9 * 10 - 10
    parts.job = replace(job, train=replace(job.train, validate_every=10))
    assert Length(_START + now[0] + 1005, 3000, 3000).estimate(parts, []) == round((1000 - 10) / (1 + 10 / 10))
    # A replica that takes every other step of the run, of which eight are measured.
    paced = types.SimpleNamespace(**vars(parts) | {"job": replace(parts.job, sync=SyncOptions("local", pace="2+1"))})
    assert Length(_START + now[0] + 1008, 3000, 3000).estimate(paced, []) == round((2000 - 10) / (1 + 10 / 10))
    assert Length(_START + now[0] + 6, 3000, 3000).estimate(parts, []) < 1


def test_what_is_late_already_still_ends_in_a_decay(monkeypatch):
    """The machine stands still for an hour, in the stable phase: a tenth of what is behind follows."""
    seconds, job, rates = run(monkeypatch, WSD, 1000, lambda step: 3600.0 if step == 400 else 1.0, 1000.0)
    assert job.train.steps == len(rates) == 440
    assert rates[399] == WSD.lr > rates[401] > rates[-1] == 0.0
    assert seconds == 3600 + 439


def test_the_last_validation_is_part_of_the_time(monkeypatch):
    """1,500 tokens take as long as training on a third of them: five steps of 100."""
    assert run(monkeypatch, WSD, 100, lambda step: 1.0, 100.0, final=1500)[1].train.steps == 95


def test_what_cannot_be_measured_stays_as_it_was_estimated(monkeypatch):
    """Two steps are too few, and these cosines have no more."""
    for warmup in (0.0, 0.01):
        optim = replace(WSD, schedule="cosine", warmup=warmup)
        assert run(monkeypatch, optim, 100, lambda step: 2.0, 100.0)[1].train.steps == 100
