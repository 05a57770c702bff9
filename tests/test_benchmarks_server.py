"""The benchmarks of a parameter server: who is killed and what is seen of it, and what a slow worker costs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
from benchmarks import faults, slow_worker, slow_worker_ranks
from benchmarks.watch import Watch, processes

from shoal.errors import JobError
from shoal.job import Job, Layout
from shoal.job.server import ServerOptions
from shoal.launch import roles
from shoal.launch.roles import Role
from shoal.sync.server import journal
from shoal.sync.server import records as r
from shoal.sync.server.messages import Key, Range
from shoal.sync.server.node.journal_file import JournalFile
from shoal.training.server import work


def commit(version: int, *samples: tuple[int, int], worker: int = 0, clock: int | None = None) -> r.Committed:
    """Of so many pushes of one worker."""
    keys = tuple(Key(worker, 0, 10 * (version if clock is None else clock) + i) for i in range(len(samples)))
    ranges = tuple(Range(*pair) for pair in samples)
    zeros = (0,) * len(keys)
    return r.Committed(version, keys, zeros, (1.0,) * len(keys), ranges, 1.0, 1.0, 0.1)


COMMITS = [commit(1, (0, 4)), commit(2, (8, 12), (4, 8)), commit(3, (16, 20))]
LAST = {"update": {"updates": 3}, "position": 12, "sync": {"exceptions": [[16, 20]]}}


def watched(folder: Path, records: list[r.AnyRecord]) -> Watch:
    file = JournalFile(folder)
    file.append(records, durable=False)
    file.close()
    watch = Watch(file.path)
    watch.look()
    return watch


def test_the_audit_finds_nothing_where_all_is_well(tmp_path: Path):
    assert faults.audit(watched(tmp_path, [*COMMITS]), LAST) == []


@pytest.mark.parametrize(
    ("records", "last", "found"),
    [
        (COMMITS[::2], LAST, "the journal's versions are not 1, 2, 3"),
        ([*COMMITS, commit(4, (20, 24), clock=1)], {**LAST, "update": {"updates": 4}}, "1 pushes are in two commits"),
        ([*COMMITS[:2], commit(3, (10, 14))], LAST, "samples 10 to 11 were used twice"),
        (COMMITS, {**LAST, "update": {"updates": 2}}, "the last checkpoint is of version 2, the last commit is 3"),
        (COMMITS, {**LAST, "position": 8}, r"the last checkpoint says \[\(0, 8\), \(16, 20\)\]"),
        ([*COMMITS, r.Rejected(Key(0, 0, 9), 3, 0, "not finite", Range(12, 16))], LAST, r"samples \[\(0, 20\)\]"),
        ([*COMMITS, commit(3, (20, 24))], LAST, "version 3 is two commits"),
        (COMMITS, {}, "nothing was saved"),
    ],
    ids=["gap", "key", "samples", "version", "watermark", "skipped", "other", "unsaved"],
)
def test_the_audit_finds(tmp_path: Path, records, last, found):
    with pytest.raises(AssertionError, match=found):
        assert not faults.audit(watched(tmp_path, list(records)), last)


def test_all_that_was_ever_in_a_journal_is_seen_once(tmp_path: Path):
    """Also what was written just before another file took its place, and a record that comes in two halves."""
    file = JournalFile(tmp_path)
    watch = Watch(file.path)
    file.append([r.Entered(1, 77, 0, 0, 1), COMMITS[0]], durable=False)
    watch.look()
    since = time.monotonic()
    file.mark(1, [r.Opened("job", 1), r.Entered(1, 77, 0, 0, 1)])
    file.append([COMMITS[1]], durable=False)
    file.restart(1)
    watch.look()
    assert watch.entered[1] < since, "it is only repeated"
    file.append([r.Entered(1, 78, 1, 0, 1), r.Changed(1, (0, 3))], durable=False)
    watch.look()
    assert [record.version for _, record in watch.commits] == [1, 2]
    assert [record.version for _, record in watch.since(since)] == [2]
    assert watch.entered[1] > since
    assert (watch.incarnations, watch.copies, watch.wrong) == ({1: 1}, {1: (0, 3)}, [])
    file.close()
    half = journal.encode([COMMITS[2]])
    for part in (half[:20], half[20:]):
        with file.path.open("ab") as end:
            end.write(part)
        watch.look()
    assert [record.version for _, record in watch.commits] == [1, 2, 3]


def test_processes_are_those_that_descend_from_one():
    words = [sys.executable, "-c", "import subprocess; subprocess.run(['sleep', '60'])"]
    with subprocess.Popen(words) as program:
        try:
            deadline = time.monotonic() + 30
            while [comm for _, comm in processes(program.pid)] != ["sleep"] and time.monotonic() < deadline:
                time.sleep(0.01)
            assert [comm for _, comm in processes(program.pid)] == ["sleep"]
            assert any(pid == program.pid for pid, _ in processes(os.getpid()))
        finally:
            for pid, _ in processes(program.pid):
                os.kill(pid, 9)
            program.kill()


def test_the_figures_of_kills(monkeypatch, capsys):
    """p95 of 20 is the 19th. In the second run nobody but servers is killed."""

    def one_run(asked, copies, wanted):
        assert wanted == (["worker", "server", "coordinator"] if copies == 1 else ["server"])
        kills = [("worker", 0.1, 0.1 * i) for i in range(1, 21)] + [("coordinator", 1.0, 2.0), ("server", 1.0, 3.0)]
        return ([*kills, ("nobody", 0.1, 0.1)] if copies == 1 else [("server, 2 copies", 0.5, 5.5)]), [], 11

    monkeypatch.setattr(faults, "one_run", one_run)
    monkeypatch.setattr("sys.argv", ["faults.py", "--format", "json"])
    with pytest.raises(SystemExit) as ended:
        faults.main()
    assert ended.value.code == 1
    found = json.loads(capsys.readouterr().out)
    rows = {row["role"]: row for row in found["rows"]}
    assert (rows["worker"]["p95"], rows["worker"]["max"]) == pytest.approx((1.9, 2.0))
    assert {role: row["within"] for role, row in rows.items()} == {
        "worker": False, "server": True, "coordinator": True, "server, 2 copies": False, "nobody": True,
    }  # fmt: skip
    assert found["started_again"] == 22
    assert "MISSED" in faults.table(found)


@pytest.mark.nightly
def test_one_kill_of_each(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["faults.py", "--kills", "1", "--workers", "2", "--format", "json"])
    with pytest.raises(SystemExit):
        faults.main()
    found = json.loads(capsys.readouterr().out)
    assert found["audit"] == []
    assert [row["times"] for row in found["rows"]] == [1, 1, 1, 1, 4]
    # How long it took is a matter of the machine; that nobody waited for ever was seen.
    assert all(0 < row["resumed_median"] <= row["median"] for row in found["rows"])
    assert found["started_again"] >= 4


def test_a_method_is_a_mode_with_options():
    asked = Namespace(steps=400, longest=1.5, every=10, servers=2, copies=1)
    base = Job(layout=Layout(replicas=4))
    job = slow_worker.job_of(base, "asp:compensation=look-ahead,max_staleness=9", 2e-3, 1, asked)
    assert job.server == ServerOptions(mode="asp", shards=2, compensation="look-ahead", max_staleness=9)
    assert (job.train.steps, job.train.seed, job.optim.lr) == (600, 1, 2e-3)
    assert job.optim.warmup * job.train.steps == pytest.approx(40)
    assert slow_worker.job_of(base, "bsp", 1e-3, 0, asked).train.steps == 400
    with pytest.raises(JobError, match=r"server.stalenes"):
        slow_worker.job_of(base, "ssp:stalenes=4", 1e-3, 0, asked)


def test_workers_and_nobody_else_are_slowed_down(tmp_path: Path):
    parts = [
        Role("coordinator", "a:main", {}),
        Role("worker 1", "b:main", {"number": 1}),
        Role("server 0", "c:main", {}),
    ]
    with mock.patch.object(roles, "run") as run:
        with slow_worker.stretched([0.5, 2.0], tmp_path):
            roles.run(None, parts, say=print)
        assert roles.run is run
    lead, worker, shard = run.call_args[0][1]
    assert [lead, shard] == [parts[0], parts[2]]
    assert worker.entry == "benchmarks.slow_worker_ranks:main"
    assert worker.args == {"number": 1, "pad": 2.0, "told": str(tmp_path / "padded-1.json")}


def test_the_clock_begins_with_the_end_of_the_first_step():
    rows = [
        {"version": 4, "seconds": 9.0, "staleness": {"0": 4}, "rejected": 0},
        {"version": 8, "seconds": 2.0, "staleness": {"1": 3, "3": 1}, "rejected": 2},
        {"version": 12, "seconds": 4.0, "staleness": {"0": 4}, "rejected": 0},
    ]
    looks = [{"step": step, "version": version, "loss": 4.0 - step} for step, version in ((3, 12), (2, 9), (1, 3))]
    found = slow_worker.figures(looks, rows, [{"answered": 8, "overran": 2}])
    assert found["losses"] == [[2, 2.0], [3, 1.0]]
    assert found["seconds"] == [3.0, 6.0]
    assert (found["staleness"], found["rejected"], found["overran"]) == (0.5, 2 / 14, [0.25])


def test_rates_of_all_methods_are_chosen_by_the_same_rule():
    """By the loss after as many samples with the first seed; not by who comes to the target first, nor by the end of a
    run that is longer than bsp's."""
    losses = {
        ("bsp", 1e-3): [[2, 5.0], [4, 4.0]],
        ("bsp", 2e-3): [[2, 3.9], [4, 4.5]],
        ("asp", 1e-3): [[2, 4.5], [4, 3.0], [6, 2.9]],
        ("asp", 2e-3): [[2, 3.5], [4, 3.2], [6, 2.0]],
    }

    def train(method: str, lr: float, seed: int):
        found = [[step, loss + 0.1 * seed] for step, loss in losses[method, lr]]
        return {
            "losses": found, "seconds": [float(step) for step, _ in found], "staleness": 1.0, "rejected": 0.0,
            "overran": [0.0],
        }  # fmt: skip

    slow = slow_worker.Slow.__new__(slow_worker.Slow)
    slow.asked, slow.train = Namespace(lr=[1e-3, 2e-3], steps=4, seeds=2), train
    best, targets = slow.targets()
    assert (best, targets) == (1e-3, [4.0, 4.1])
    row = slow.row("asp", None, targets)
    assert row["lr"] == 1e-3
    assert row["seconds_to_loss"] == pytest.approx([2 + 2 * 0.5 / 1.5] * 2)
    assert row["final_losses"] == pytest.approx([3.0, 3.1])


def test_a_gradient_takes_as_long_as_its_pad(tmp_path: Path, monkeypatch):
    """The second one takes longer by itself."""
    replica, pauses, took = SimpleNamespace(), [0.0, 0.6], []
    replica.gradients = lambda pause: time.sleep(pause)

    def worker(seat, *, number):
        padded, objective = work.spread("job")
        for pause in pauses:
            start = time.perf_counter()
            padded.gradients(pause)
            took.append(time.perf_counter() - start)
        return {"answered": number, "objective": objective}

    monkeypatch.setattr(work, "spread", lambda job: (replica, job))
    monkeypatch.setattr(work, "main", worker)
    slow_worker_ranks.main(mock.sentinel.seat, pad=0.4, told=str(tmp_path / "told"), number=2)
    assert took[0] >= 0.4
    assert took[1] >= 0.6
    assert json.loads((tmp_path / "told").read_text()) == {"answered": 2, "objective": "job", "overran": 1}


@pytest.mark.nightly
def test_a_slow_worker_holds_up_bsp(tmp_path: Path, monkeypatch, capsys):
    text = tmp_path / "text"
    text.mkdir()
    for number in range(40):
        (text / f"{number}.txt").write_text("".join(f"{number} and {i} make {number + i}.\n" for i in range(60)))
    words = [
        "slow_worker.py", "--size", "tiny", "--data", str(text), "--cache", str(tmp_path / "cache"), "--tokenizer",
        "bytes", "--length", "64", "--steps", "4", "--every", "2", "--rows", "6", "--seeds", "1", "--lr", "1e-2",
        "--pads", "0.01,0.3", "--out", str(tmp_path / "out"), "--format", "json", "--methods", "bsp",
    ]  # fmt: skip
    monkeypatch.setattr("sys.argv", words)
    slow_worker.main()
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    # Of four steps, three are after the first; each waits for the slow one.
    assert row["seconds_to_loss"][0] >= 3 * 0.3
    assert (row["method"], row["speedup"], row["staleness"], row["rejected"]) == ("bsp", 1, 0, 0)
    assert len(row["overran"]) == 2
    assert list((tmp_path / "out").iterdir()) == [*(tmp_path / "out").glob("slow-*.json")], "the run is removed"
    monkeypatch.setattr(slow_worker, "run", lambda *_: pytest.fail("measured again"))
    slow_worker.main()
    assert json.loads(capsys.readouterr().out)["rows"] == [row]
