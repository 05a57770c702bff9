"""A worker that a run did not begin with: its name, its share, what is told of it; and whole runs that it joins."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest

from shoal.cli.main import main
from shoal.job import Layout, parse, read, write
from shoal.launch.server import START, TRIAL, Start
from shoal.observe import metrics
from shoal.observe.show import Show
from shoal.sync.server import records as r
from shoal.sync.server.rules import Rules
from shoal.sync.server.standing import Standing
from shoal.training.server import plan
from shoal.training.server.comings import Comings
from shoal.training.server.rows import Rows
from tests.training.server import runs
from tests.training.server.test_equality import QUIET, through_a_server
from tests.training.server.test_join import PLAIN, ready_to_join
from tests.training.server.test_rows import commit, push
from tests.training.test_bad_input import NoRanks


@pytest.mark.parametrize(
    ("layout", "server", "found"),
    [
        ("replicas=2", {}, [1, 1, 1]),
        ("replicas=2,micro_batch=2", {}, [3, 3, 3]),
        ("replicas=2,micro_batch=1,replica_share=2+1", {"mode": "asp"}, [8, 4, 4]),
        ("replicas=2,micro_batch=1,replica_share=1+2", {"local_steps": 3}, [12, 24, 12]),
    ],
)
def test_it_pushes_as_much_as_the_one_of_the_others_that_pushes_least(tiny, tmp_path, layout, server, found):
    job = tiny(tmp_path, layout, sync={"name": "server"}, server=server).validate()
    assert [plan.share(job, worker) for worker in (0, 1, 2)] == found
    assert plan.share(job, 9) == found[2]


def test_a_mean_over_workers_is_over_those_that_take_part():
    rows = Rows(4, 0, 1)
    rows.take(r.Entered(0, 0, 0, 0, 1))
    rows.take(r.Entered(3, 0, 0, 0, 1))
    rows.pushed(push(0, 1, 0.0, 6.0))
    rows.take(commit(1, 0, 0))
    rows.take(commit(2, 0, 2))
    assert rows.row()["compute_s"] == 3.0, "the new one has not pushed yet"
    rows.pushed(push(3, 3, 0.0, 8.0))
    rows.take(commit(3, 3, 4))
    rows.take(r.Left(3, 0, "left"))
    rows.take(commit(4, 0, 6))
    assert rows.row()["compute_s"] == 4.0, "it had its part in this step"
    rows.pushed(push(0, 5, 0.0, 6.0))
    rows.take(commit(5, 0, 8))
    rows.take(commit(6, 0, 10))
    assert rows.row()["compute_s"] == 6.0


def test_who_comes_and_goes_is_said():
    at = Standing(Rules(workers=2), [1], None, [r.Opened("model")], 0.0)
    comings = Comings(Layout.parse("replicas=2,fsdp=2"), 5.0)

    def news(record: r.AnyRecord, waited_for: bool = False) -> str:
        at.take(record)
        return comings.news(record, at, waited_for)

    assert [news(r.Entered(worker, 1, 0, 0, 1)) for worker in (0, 1)] == ["", ""]
    assert comings.devices(at) == 4
    assert news(r.Entered(2, 1, 0, 0, 1)) == "worker 2 has joined, beyond the job's 2: with it 3 take part"
    assert comings.devices(at) == 6
    assert news(r.Left(2, 0, "left")) == "worker 2 has left"
    assert news(r.Left(1, 0, "expired")) == "worker 1 is given up (silent for 5 s); the others go on"
    assert comings.devices(at) == 4, "its devices are still the job's"
    assert news(r.Entered(2, 1, 1, 0, 1)) == "worker 2 has joined again"
    assert news(r.Entered(1, 1, 1, 0, 1), waited_for=True) == ""
    assert news(r.Left(2, 1, "replaced")) == ""
    assert news(r.Entered(3, 1, 0, 0, 1)).endswith("with it 3 take part")


def test_mfu_and_speeds_per_device_go_by_those_that_there_are(tmp_path):
    with Show(tmp_path) as show:
        show.begin(0, 10, 2, 1e9, 1000.0)
        row = {"step": 1, "loss": 1.0, "grad_norm": 1.0, "lr": 0.1, "tokens": 1, "tokens_per_second": 1e6}
        row |= {"seconds": 1.0, "memory_gib": 0.0}
        show.step(row)
        show.compute_on(4)
        show.step(row | {"step": 2})
    assert [row["mfu"] for row in metrics.read(tmp_path)] == [0.5, 0.25]


@pytest.fixture
def going(tiny, tmp_path, monkeypatch):
    """A run of two workers that can be joined; and who has joined, instead of processes."""
    run = ready_to_join(through_a_server(tiny, tmp_path / "run", 2, {**QUIET, "train": PLAIN}))
    told: list[str] = []
    monkeypatch.setattr("shoal.launch.join.Ranks", NoRanks)
    monkeypatch.setattr("shoal.launch.join.roles.run", lambda ranks, parts, **options: told.append(parts[0].name))
    return run, told


def change(run: Path, **tables: dict[str, Any]) -> Start:
    """As if the run had been begun with these options."""
    path = run / "server" / START
    start = msgspec.json.decode(path.read_bytes(), type=Start)
    job = parse(start.job)
    for table, options in tables.items():
        job = replace(job, **{table: replace(getattr(job, table), **options)})
    changed = Start(write(job), start.prepared, start.nonce)
    path.write_bytes(msgspec.json.encode(changed))
    return changed


def test_one_more_has_the_first_number_that_nobody_has(going, capsys, monkeypatch):
    run, told = going

    def act(ranks, parts, **options):
        told.append(parts[0].name)
        if len(told) < 3:
            assert main(["join", str(run), "worker", "--format", "json"]) == 0

    monkeypatch.setattr("shoal.launch.join.roles.run", act)
    assert main(["join", str(run), "worker"]) == 0
    assert told == ["worker 2", "worker 3", "worker 4"]
    said = capsys.readouterr()
    assert '"part":"worker 4"' in said.out + said.err, "the answer has the number"
    change(run, layout={"replicas": 3})
    assert main(["join", str(run), "worker"]) == 0
    assert main(["join", str(run), "worker 7"]) == 0
    assert told[3:] == ["worker 3", "worker 7"], (
        "when it was resumed with another worker, that one has a part of its own"
    )


@pytest.mark.parametrize(
    "part", ["worker 1", "worker 02", "worker -2", "worker 1000", "worker 2.5", "Worker", "server 2"]
)
def test_other_parts_are_not_to_be_had(going, capsys, part):
    run, told = going
    assert main(["join", str(run), part]) == 2
    error = capsys.readouterr().err
    assert f"this run has no part '{part}' for another machine" in error
    assert f"`shoal join {run} worker`" in error
    assert not told


@pytest.mark.parametrize(("compensation", "optim"), [("look-ahead", "adamw"), ("delayed-nesterov", "sgd")])
def test_where_servers_go_by_the_number_of_workers_nobody_can_join(going, capsys, compensation, optim):
    run, told = going
    change(run, server={"mode": "asp", "compensation": compensation}, optim={"name": optim})
    assert main(["join", str(run), "worker"]) == 2
    error = capsys.readouterr().err
    assert f"server.compensation={compensation}: servers go by the 2 workers of the job, no other can join" in error
    assert "--workers 3" in error
    assert not told
    change(run, server={"compensation": "rate"})
    assert main(["join", str(run), "worker"]) == 0


def test_it_takes_no_part_in_the_trial_of_links_and_waits_for_training(going):
    run, told = going
    start = (run / "server" / START).read_bytes()
    (run / "server" / TRIAL).write_bytes(msgspec.json.encode(change(run, sync={"codec": "auto"})))
    (run / "server" / START).unlink()
    begins = threading.Timer(0.5, (run / "server" / START).write_bytes, (start,))
    begins.start()
    assert main(["join", str(run), "worker"]) == 0
    begins.join()
    assert told == ["worker 2"]


def test_a_simulated_worker_joins(capsys):
    small = ["simulate", "--updates", "10", "--micro-batch", "1", "--share", "1", "--lr", "0.01", "--workers", "2"]
    assert main([*small, "--mode", "bsp", "--join", "5.5"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"wait of each worker  0: .*  1: .*  2: ", out)
    assert re.search(r"^bsp +\S+ +9 ", out, re.MULTILINE), "seven updates of two, two of three"
    assert main([*small, "--mode", "asp", "--compensation", "look-ahead", "--join", "5"]) == 2
    assert "--join with --compensation look-ahead: servers go by the number of workers" in capsys.readouterr().err


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("layout", "server", "codec"),
    [
        ("replicas=2", {}, "none"),
        ("replicas=2,fsdp=2", {"mode": "ssp", "staleness": 2}, "topk:0.1+int2"),
        ("replicas=2", {"mode": "quorum", "quorum": 2, "copies": 2}, "int8"),
    ],
    ids=str,
)
def test_a_worker_joins_a_run_and_leaves_it(ranks, tiny, tmp_path, layout, server, codec):
    """Asked to leave, it leaves with what it owes; samples are used up once each, and steps are those of the job."""
    folder, steps = tmp_path / "run", 100
    options = {**QUIET, "train": {"steps": steps, "validate_every": 1000}}
    disturbed = {f"server {number}": {"keeps": True} for number in range(2)} | {"worker 0": {"awaits": 2}}
    job = tiny(folder, layout, sync={"name": "server", "codec": codec}, server={"shards": 2} | server, **options)
    others: list[subprocess.Popen[bytes]] = []

    def come_and_go() -> None:
        while runs.steps(folder) < 2:
            time.sleep(0.02)
        others.append(subprocess.Popen([sys.executable, "-m", "shoal.cli.main", "join", str(folder), "worker"]))
        while others[0].poll() is None and _pushes(folder, 2) < 4:
            time.sleep(0.02)
        others[0].send_signal(signal.SIGTERM)

    try:
        asking = threading.Thread(target=come_and_go, daemon=True)
        asking.start()
        assert runs.run(ranks, job, also=disturbed)["step"] == steps
        assert others[0].wait(60) == 0
    finally:
        for other in others:
            other.kill()
            other.wait()
    commits = runs.audit(folder, steps * 12)
    log = (folder / "log.txt").read_text()
    assert log.count("worker 2 has joined, beyond the job's 2: with it 3 take part") == 1
    assert "worker 2 has left" in log
    rows = metrics.read(folder)
    assert rows[-1]["step"] == steps
    assert any("2" in row["waited_s"] for row in rows)
    assert read(folder / "job.toml").layout.replicas == 2
    if server.get("mode", "bsp") == "bsp":
        together = [len(commit.keys) for commit in commits if commit.samples[-1].stop < steps * 12]
        assert re.fullmatch("2+3+2*", "".join(map(str, together))), "a whole update, and from then on all"
        theirs, mine = runs.replayed(folder), runs.weights(folder)
        assert all((theirs[name] == mine[name]).all() for name in theirs)


def _pushes(folder: Path, worker: int) -> int:
    """Of a worker that became part of an update."""
    try:
        return sum(key.worker == worker for record in runs.history(folder)[0].values() for key in record.keys)
    except OSError:
        return 0
