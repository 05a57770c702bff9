"""Processes of a server job are killed, its messages lost: it goes on, and nothing is lost or counted twice."""

from __future__ import annotations

import os
import random
import signal
import threading
import time

import pytest
import torch

from shoal.errors import RankError
from shoal.observe import metrics
from tests.training.server import runs
from tests.training.server.runs import ALL, Killer

STEPS, BATCH = 24, 12
OPTIONS = {
    "train": {"steps": STEPS, "validate_every": 1000}, "data": {"validation": 0.0}, "checkpoint": {"every": 7},
    "sync": {"name": "server"},
}  # fmt: skip
# Seconds until others have gone on, on a machine however busy; within seconds on an idle one.
GOES_ON = 60.0
# Seconds until a run ends that cannot go on; a new copy would wait for longer.
NOTICED = 50.0


@pytest.fixture(scope="module")
def whole(ranks, tiny, tmp_path_factory):
    """A run of bsp that nothing happens to."""
    folder = tmp_path_factory.mktemp("server") / "whole"
    runs.run(ranks, tiny(folder, "replicas=3", server={"shards": 2}, **OPTIONS))
    runs.audit(folder, STEPS * BATCH)
    return folder


def same(one, other) -> bool:
    """Bitwise: the weights; the losses of all steps that both have shown."""
    mine, theirs = ({row["step"]: row["loss"] for row in metrics.read(run)} for run in (one, other))
    left, right = runs.weights(one), runs.weights(other)
    both = mine.keys() & theirs.keys()
    return (
        len(both) > STEPS // 2
        and all(mine[step] == theirs[step] for step in both)
        and all(torch.equal(left[name], right[name]) for name in left)
    )


def test_shards_and_the_coordinator_are_killed_and_bsp_is_bitwise_the_same(ranks, tiny, whole, tmp_path):
    """Shards of one copy come back with their logs, the coordinator with its journal: killed just before a commit is
    in it, and just after; just before a push is in a log; and somewhere."""
    run, said = tmp_path / "run", []
    dies = {"coordinator": [[9, 0], [13, 1]], "server 1": 17}
    with Killer(run, [(2, "shoal-server0")]) as killer:
        figures = runs.run(ranks, tiny(run, "replicas=3", server={"shards": 2}, **OPTIONS), said=said, dies=dies)
    assert (figures["step"], figures["stopped_by"]) == (STEPS, "")
    lost = [line.partition(" was killed by SIGKILL: started again") for line in said]
    restarted = [name for name, again, _ in lost if again]
    assert sorted(restarted) == ["coordinator", "coordinator", "server 0", "server 1"], said
    assert max(killer.waits) < GOES_ON
    assert len(runs.audit(run, STEPS * BATCH)) == runs.version(run) == STEPS
    assert same(run, whole)


def killed_together(run, names: list[str]) -> list[float]:
    """Kills all processes whose names begin so, at once, when the run is at its eighth step; when that was."""
    when: list[float] = []

    def kill() -> None:
        while runs.steps(run) < 8:
            time.sleep(0.01)
        for pid in [pid for name in names for pid in runs.pids(name)]:
            os.kill(pid, signal.SIGKILL)
        when.append(time.monotonic())

    threading.Thread(target=kill, daemon=True).start()
    return when


def test_all_copies_of_a_shard_are_killed_and_the_run_ends_at_once_and_says_why(ranks, tiny, tmp_path):
    run, said = tmp_path / "run", []
    job = tiny(run, "replicas=2", server={"copies": 2}, **OPTIONS | {"train": {"steps": 100_000, "validate_every": 0}})
    when = killed_together(run, ["shoal-server0co"])
    with pytest.raises(RankError, match="all 2 copies of server shard 0 were lost before one") as caught:
        runs.run(ranks, job, said=said)
    assert time.monotonic() - when[0] < NOTICED
    assert caught.value.where == "coordinator"
    assert "goes on from its newest checkpoint" in caught.value.fix
    assert len([line for line in said if "was killed by SIGKILL: started again" in line]) == 2, said


@pytest.mark.nightly
def test_a_copy_that_is_killed_together_with_the_coordinator_is_replaced(ranks, tiny, tmp_path):
    """The coordinator that comes back never had a connection with it. Copy 0 is the one that workers talk to."""
    run, said = tmp_path / "run", []
    options = OPTIONS | {"train": {"steps": 60, "validate_every": 1000}}
    job = tiny(run, "replicas=2", server={"copies": 2}, **options)
    real = runs.pids
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "pids", lambda name, of=None: real(name, of)[:1])  # of copies, the first that was started
        killed_together(run, ["shoal-coordinat", "shoal-server0co"])
        figures = runs.run(ranks, job, said=said)
    assert (figures["step"], figures["stopped_by"]) == (60, ""), said
    assert "server 0 copy 0 was killed by SIGKILL: started again" in said
    assert "coordinator was killed by SIGKILL: started again" in said
    runs.audit(run, 60 * BATCH)


@pytest.mark.parametrize(
    ("mode", "victims"),
    [
        ("asp", ["shoal-worker1", "shoal-server0co", "shoal-coordinat"]),
        pytest.param("bsp", ["shoal-worker1", "shoal-worker0", "shoal-coordinat"], marks=pytest.mark.nightly),
        pytest.param("quorum", ["shoal-worker2", "shoal-server0co", "shoal-worker0"], marks=pytest.mark.nightly),
        pytest.param("ssp", ["shoal-server0co", "shoal-worker2", "shoal-server0co"], marks=pytest.mark.nightly),
    ],
)
def test_workers_and_copies_are_killed_and_the_audit_is_clean(ranks, tiny, tmp_path, mode, victims):
    """Two copies of the shard: the other one takes over, and a new one takes all from it."""
    run, said = tmp_path / "run", []
    options = OPTIONS | {"train": {"steps": 50, "validate_every": 1000}}
    with Killer(run, [(4 + 14 * i, name) for i, name in enumerate(victims)]) as killer:
        figures = runs.run(ranks, tiny(run, "replicas=3", server={"copies": 2, "mode": mode}, **options), said=said)
    assert (figures["step"], figures["stopped_by"]) == (50, ""), said
    assert len([line for line in said if line.endswith("was killed by SIGKILL: started again")]) == 3, said
    assert max(killer.waits) < GOES_ON
    commits = runs.audit(run, 50 * BATCH)
    assert runs.version(run) == commits[-1].version
    assert {key.worker for record in commits for key in record.keys} == {0, 1, 2}


def test_all_are_killed_and_no_acknowledged_update_is_lost(ranks, tiny, whole, tmp_path):
    """As with the launcher: nobody is started again. Journal and logs go on where there is no checkpoint."""
    run, said = tmp_path / "run", []
    job = tiny(run, "replicas=3", server={"shards": 2}, **OPTIONS | {"checkpoint": {"every": 1000}})
    with Killer(run, [(10, ALL)]), pytest.raises(RankError, match="killed by SIGKILL"):
        runs.run(ranks, job, restarts=0)
    before, _ = runs.history(run)
    assert 10 <= max(before) < STEPS
    assert not list((run / "checkpoints").glob("step-*"))
    figures = runs.run(ranks, job, resume=True, said=said)
    assert figures["step"] == STEPS
    commits = runs.audit(run, STEPS * BATCH)
    assert [record for record in commits if record.version in before] == list(before.values())
    assert all(len(record.keys) == 3 for record in commits), "nothing began before all workers were there again"
    assert same(run, whole)


@pytest.mark.nightly
@pytest.mark.parametrize("seed", range(3))
def test_a_tenth_of_all_messages_is_lost_late_or_doubled_and_bsp_is_bitwise_the_same(
    ranks, tiny, whole, tmp_path, seed
):  # fmt: skip
    run = tmp_path / "run"
    network = {"seed": seed, "odds": 0.034}
    runs.run(ranks, tiny(run, "replicas=3", server={"shards": 2, "lease": 60.0}, **OPTIONS), network=network)
    assert len(runs.audit(run, STEPS * BATCH)) == STEPS
    assert same(run, whole)


@pytest.mark.nightly
@pytest.mark.parametrize("seed", range(40))
def test_killed_at_random(ranks, tiny, tmp_path, seed):
    """Five of any role, in any mode; of shards without a log one at a time, since the other copy holds what is left."""
    chance, run = random.Random(seed), tmp_path / "run"
    mode, copies = chance.choice(["bsp", "quorum", "ssp", "asp"]), chance.choice([1, 2])
    roles = ["shoal-worker", "shoal-coordinat", "shoal-server0" if copies == 1 else "shoal-server0co"]
    victims = [(chance.randint(2, 12) + 16 * i, chance.choice(roles)) for i in range(5)]
    options = OPTIONS | {
        "train": {"steps": 90, "validate_every": 1000},
        "checkpoint": {"every": chance.choice([5, 1000])},
    }
    server = {"mode": mode, "copies": copies, "shards": chance.choice([1, 2])}
    with Killer(run, victims) as killer:
        figures = runs.run(ranks, tiny(run, "replicas=3", server=server, **options))
    assert figures["step"] == 90
    assert len(killer.waits) == 5
    assert max(killer.waits) < GOES_ON
    assert runs.version(run) == runs.audit(run, 90 * BATCH)[-1].version
