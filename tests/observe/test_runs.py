"""The list of runs tells how each ended, from its folder alone."""

from __future__ import annotations

import json
import os
import time
from dataclasses import replace

import msgspec
import pytest

from shoal.job import Job, write
from shoal.job.data import DataOptions
from shoal.job.train import TrainOptions
from shoal.observe import result, runs
from shoal.observe.hold import hold
from shoal.observe.metrics import Metrics
from shoal.observe.result import Result
from tests.observe.rows import row

DONE = Result(
    run="x", steps=10, tokens=10_000, loss_first=8.0, loss_last=7.9, val_loss=2.2, bits_per_byte=1.0,
    tokens_per_second=1900.0, mfu=None, seconds=9.0,
)  # fmt: skip


def make(root, name: str, steps: int = 10, done: Result | None = None):
    folder = root / name
    (folder / "checkpoints" / "step-00000004").mkdir(parents=True)
    (folder / "job.toml").write_text(write(Job(train=TrainOptions(steps=10))))
    metrics = Metrics(folder)
    for step in range(1, steps + 1):
        metrics.write(row(step) | ({"val_loss": 3.0} if step == 5 else {}))
    metrics.close()
    if done:
        result.write(folder, done)
    return folder


@pytest.mark.parametrize(
    ("steps", "done", "state"),
    [
        (10, DONE, "finished"),
        (7, replace(DONE, steps=7, stopped_by="SIGINT"), "stopped"),
        (7, None, "failed"),
        (0, None, "failed"),
        # It finished with 7 steps, and was resumed for more but did none.
        (7, replace(DONE, steps=7), "stopped"),
        # It was stopped after 5 steps, resumed, and killed after 8.
        (8, replace(DONE, steps=5, stopped_by="SIGINT"), "failed"),
    ],
)
def test_state(tmp_path, steps, done, state):
    run = runs.describe(make(tmp_path, "a", steps, done))
    assert (run.state, run.step, run.steps) == (state, steps, 10)


@pytest.mark.parametrize(("grow", "steps", "cell"), [(True, 0, "7 (no end)"), (False, None, "7/–")])
def test_a_run_without_an_end_is_not_one_of_an_unknown_length(tmp_path, monkeypatch, grow, steps, cell):
    monkeypatch.setenv("COLUMNS", "120")
    folder = make(tmp_path, "a", 7, replace(DONE, steps=7, stopped_by="SIGTERM"))
    job = Job(data=DataOptions(grow=grow, order="sequential"))
    (folder / "job.toml").write_text(write(job))
    run = runs.describe(folder)
    assert (run.state, run.step, run.steps) == ("stopped", 7, steps)
    assert cell in str(runs.find(tmp_path))


def test_a_held_run_is_running_even_after_an_earlier_result(tmp_path):
    folder = make(tmp_path, "a", 10, DONE)
    with hold(folder):
        assert runs.describe(folder).state == "running"
    assert runs.describe(folder).state == "finished"


def test_figures(tmp_path):
    folder = make(tmp_path, "a", 7)
    (folder / "checkpoints" / "step-00000006").mkdir()
    for name in ("step-00000007.tmp", "step-00000007.1f-1.tmp", "step-00000008.old", "step-9"):
        (folder / "checkpoints" / name).mkdir()
    for path in folder.rglob("*"):
        os.utime(path, (0, time.time() - 3600))
    run = runs.describe(folder)
    assert (run.val_loss, run.tokens_per_second) == (3.0, 2000.0)
    assert run.checkpoint == str(folder / "checkpoints" / "step-00000006")
    assert run.age == pytest.approx(3600, abs=60)
    assert run.size == sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize(
    ("names", "newest"),
    [
        # Step 4 was saved again, by a start that went on from an earlier one.
        (["step-00000004-1", "step-00000004-2"], "step-00000004-2"),
        (["step-00000004-9", "step-00000004-10"], "step-00000004-10"),
        (["step-99999999", "step-100000000"], "step-100000000"),
    ],
)
def test_the_newest_checkpoint(tmp_path, names, newest):
    folder = make(tmp_path, "a", 4)
    for name in names:
        (folder / "checkpoints" / name).mkdir()
    assert runs.describe(folder).checkpoint == str(folder / "checkpoints" / newest)


def test_a_run_without_a_checkpoint(tmp_path):
    folder = make(tmp_path, "a", 4)
    (folder / "checkpoints" / "step-00000004").rmdir()
    assert runs.describe(folder).checkpoint is None
    (folder / "checkpoints").rmdir()
    assert runs.describe(folder).checkpoint is None


def test_table_and_json(tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")  # the table is as wide as the terminal
    make(tmp_path, "older", 7)
    newer = make(tmp_path, "newer", 10, DONE)
    for path in (tmp_path / "older").iterdir():
        os.utime(path, (0, 1000))
    (tmp_path / "no-run").mkdir()
    found = runs.find(tmp_path)
    assert [run.name for run in found.runs] == ["older", "newer"]
    lines = str(found).splitlines()
    assert len(lines) == 3
    assert "finished" in lines[2]
    assert "10/10" in lines[2]
    assert "2.200" in lines[2]
    assert "step-00000004" in lines[2]
    data = json.loads(msgspec.json.encode(found))
    assert data["root"] == str(tmp_path)
    assert data["runs"][1]["folder"] == str(newer)


def test_no_runs(tmp_path):
    assert "no runs" in str(runs.find(tmp_path / "missing"))


def test_a_damaged_job_is_listed(tmp_path):
    folder = make(tmp_path, "a", 3)
    (folder / "job.toml").write_text("nonsense = [")
    assert runs.describe(folder).steps is None
    assert "3/–" in str(runs.find(tmp_path))
