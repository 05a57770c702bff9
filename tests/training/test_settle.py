"""What is `auto` in a job becomes a value in the run's job.toml, which then reproduces the run."""

from __future__ import annotations

import re
import time
from dataclasses import replace

import pytest

from shoal.job import read
from shoal.observe import metrics
from shoal.training import settle


def test_every_auto_is_resolved_and_the_job_reproduces_the_run(train, tiny, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    auto = {"precision": "auto", "compile": "auto", "steps": 0, "minutes": 0.1}
    schedule = {"schedule": "wsd", "decay": 0.5}
    # 6 seconds are asked for, of which 8 are kept for what follows the last step: here 10 are added.
    train(tiny(first, train=auto, optim=schedule), started=time.time() + 10)
    job = read(first / "job.toml")
    assert '"auto"' not in (first / "job.toml").read_text()
    assert job.train.precision in ("fp32", "bf16")
    assert job.train.compile in ("on", "off")
    assert job.train.steps == metrics.read(first)[-1]["step"] > 3
    assert job.model.vocab_size == 257
    log = (first / "log.txt").read_text()
    for decided in (f"precision {job.train.precision}:", f"compile {job.train.compile}:", "steps that fit into"):
        assert decided in log
    assert f"steps that fit, by the pace so far: {job.train.steps:,}" in log
    # How often to validate and save is decided by the first estimate.
    first_guess = int(re.findall(r"what is left of 0.1 minutes: ([\d,]+)", log)[0].replace(",", ""))
    assert job.train.validate_every == max(1, first_guess // 10)
    assert job.checkpoint.every == max(1, first_guess // 5)

    train(replace(job, run=replace(job.run, dir=str(second))))
    assert read(second / "job.toml") == job
    assert [row["loss"] for row in metrics.read(second)] == [row["loss"] for row in metrics.read(first)]


@pytest.mark.parametrize("schedule", ["zbv", "1f1b"])
def test_compiling_is_not_chosen_where_the_layout_excludes_it(monkeypatch, tiny, tmp_path, schedule):
    """Blocks that are compiled under a schedule that computes weights' gradients apart gave wrong gradients."""
    job = tiny(tmp_path, f"pipeline=2,schedule={schedule}", train={"compile": "auto"}, model={"num_hidden_layers": 4})
    monkeypatch.setattr(settle, "_compiling_pays", lambda *_: True)
    said = []
    settled = settle.settle(job, None, [None], said.append)
    assert settled.train.compile == ("on" if schedule == "1f1b" else "off")
    assert any("apart" in line for line in said) == (schedule == "zbv")
