"""Runs with a server that end and go on: by a signal, without it, with other servers; every mode to its end."""

from __future__ import annotations

import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from shoal.cli.main import main
from shoal.job import Layout, read, write
from shoal.observe import metrics
from tests.training.server import runs
from tests.training.server.runs import Killer
from tests.training.server.test_equality import QUIET, far

BATCH = 12


def change(run: Path, layout: str, **tables: dict) -> None:
    """What `shoal train --resume RUN --OPTION VALUE` makes of its job."""
    job = replace(read(run / "job.toml"), layout=Layout.parse(layout))
    for table, options in tables.items():
        job = replace(job, **{table: replace(getattr(job, table), **options)})
    (run / "job.toml").write_text(write(job.validate()))


def test_a_signal_drains_and_the_run_goes_on_without_a_server_and_with_others(ranks, train, tiny, tmp_path, capsys):
    """In fp64, so that nothing but rounding may differ: two workers, all-reduce, then three with copies of shards."""
    one, run, said = tmp_path / "one", tmp_path / "run", []
    whole = {"steps": 20, "validate_every": 1000, "precision": "fp64"}
    options = {**QUIET, "optim": {"schedule": "constant", "warmup": 0.0}}
    train(tiny(one, "replicas=1", train=whole, **options))
    job = tiny(run, "replicas=2", train=whole, sync={"name": "server"}, server={"shards": 2}, **options)
    with Killer(run, [(3, "shoal-coordinat")], number=signal.SIGTERM):
        figures = runs.run(ranks, job, said=said)
    first = figures["step"]
    assert 3 <= first < 14, "it ends when it is asked to"
    assert figures["stopped_by"] == "SIGTERM"
    assert runs.version(run) == first == len(runs.audit(run, first * BATCH))
    assert main(["ckpt", "verify", str(run)]) == 0

    change(run, "replicas=3", sync={"name": "allreduce"}, server={"shards": 1}, train={"steps": 14})
    assert train(replace(read(run / "job.toml"), run=job.run), resume=True)[0]["step"] == 14
    assert (run / "server-before/journal").is_file()
    assert not (run / "server").exists()

    change(run, "replicas=3", sync={"name": "server"}, server={"copies": 2}, train={"steps": 20})
    assert runs.run(ranks, replace(read(run / "job.toml"), run=job.run), resume=True)["step"] == 20
    assert len(runs.audit(run, 20 * BATCH, first=14 * BATCH)) == 6
    assert runs.version(run) == 20
    assert max(far(run, one)) < 1e-8
    assert main(["ckpt", "verify", str(run)]) == 0


@pytest.mark.nightly
@pytest.mark.parametrize("every", [1000, 5])
def test_a_run_that_is_asked_to_end_and_goes_on_is_bitwise_the_same(ranks, tiny, tmp_path, every):
    whole, run = tmp_path / "whole", tmp_path / "run"
    options = {**QUIET, "train": {"steps": 24, "validate_every": 1000}, "sync": {"name": "server"}}
    options["checkpoint"] = {"every": every}
    runs.run(ranks, tiny(whole, "replicas=3", server={"shards": 2}, **options))
    with Killer(run, [(4, "shoal-coordinat")], number=signal.SIGTERM):
        runs.run(ranks, tiny(run, "replicas=3", server={"shards": 2}, **options))
    assert 4 <= runs.version(run) < 24
    runs.run(ranks, tiny(run, "replicas=3", server={"shards": 2}, **options), resume=True)
    assert [row["loss"] for row in metrics.read(run)] == [row["loss"] for row in metrics.read(whole)]
    mine, theirs = runs.weights(run), runs.weights(whole)
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("options", "most"),
    [
        ({"mode": "asp"}, 1000),
        ({"mode": "asp", "max_staleness": 1, "level": "shard", "compensation": "rate"}, 1),
        ({"mode": "asp", "level": "hogwild", "shards": 3}, 1000),
        ({"mode": "asp", "compensation": "dc", "copies": 2}, 1000),
        ({"mode": "asp", "compensation": "look-ahead"}, 1000),
        ({"mode": "ssp", "staleness": 0, "compensation": "age"}, 2),
        ({"mode": "ssp", "staleness": 2}, 10),
        ({"mode": "quorum"}, 0),
        ({"mode": "quorum", "quorum": 1, "grace": 0.01}, 0),
    ],
    ids=str,
)
def test_every_mode_comes_to_its_end_within_its_bound(ranks, tiny, tmp_path, options, most):
    """Of three workers, one of which is killed."""
    run = tmp_path / "run"
    job = tiny(
        run, "replicas=3", sync={"name": "server"}, server=options, train={"steps": 40, "validate_every": 7},
        data={"validation": 0.1}, checkpoint={"every": 9}, optim={"lr": 5e-4},
    )  # fmt: skip
    with Killer(run, [(8, "shoal-worker1")]):
        figures = runs.run(ranks, job)
    assert figures["step"] == 40
    assert figures["validation"]["nats"] < 4.5  # of 5.58 at the start
    runs.audit(run, 40 * BATCH)
    rows = metrics.read(run)
    late = {int(late) for row in rows for late in row["staleness"]}
    assert max(late) <= most
    assert any("val_loss" in row for row in rows)


@pytest.mark.nightly
def test_minutes_are_how_long_it_takes(ranks, tiny, tmp_path):
    run = tmp_path / "run"
    train = {"steps": 0, "minutes": 0.5, "validate_every": 0}
    job = tiny(run, "replicas=2", sync={"name": "server"}, server={"mode": "asp"}, train=train, checkpoint={"every": 0})
    began = time.time()
    figures = runs.run(ranks, job)
    assert 0.25 < (time.time() - began) / 60 < 1.0
    runs.audit(run, figures["step"] * BATCH)
    assert read(run / "job.toml").train.steps == figures["step"]
