"""Whole runs with a codec: what is pushed and pulled, logged and replayed, owed and settled, in real processes."""

from __future__ import annotations

import os
import signal
import statistics
import threading
from pathlib import Path

import pytest
import torch

from shoal.job import read
from shoal.models.spec import count
from shoal.observe import metrics
from shoal.sync.server import journal
from shoal.sync.server import records as r
from tests.training.server import noted, runs
from tests.training.server.runs import Killer

STEPS, BATCH = 16, 12
# So that names of pieces and other words are few beside the numbers.
LARGER = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}
QUIET = {"data": {"validation": 0.0, "sequence_length": 16}, "checkpoint": {"every": 1000}}
# Long enough that nobody else is given up where the machine is busy.
LEASE = 3.0


def job_of(tiny, folder, layout: str, codec: str, steps: int = STEPS, model: dict | None = None, **server):
    return tiny(
        folder, layout, **QUIET, model=LARGER | (model or {}), train={"steps": steps, "validate_every": 1000},
        sync={"name": "server", "codec": codec}, server=server,
    )  # fmt: skip


def woken(folder: Path, worker: int, over: threading.Event) -> None:
    """Lets a worker that has stopped itself go on, once it has been given up."""
    path = folder / "server" / "journal"
    while not over.wait(0.02):
        gone = path.exists() and any(
            isinstance(record, r.Left) and record.worker == worker
            for record in journal.decode(path.read_bytes(), str(path))[0]
        )
        if gone:
            for pid in runs.pids(f"shoal-worker{worker}"):
                os.kill(pid, signal.SIGCONT)


def given_up(folder: Path) -> list[tuple[int, int, str]]:
    """Who was, in the whole run: worker, incarnation, why."""
    paths = [*(folder / "server").glob(f"{runs.OLD}-*"), folder / "server" / "journal"]
    records = [record for path in paths for record in journal.decode(path.read_bytes(), str(path))[0]]
    found = [(each.worker, each.incarnation, each.why) for each in records if isinstance(each, r.Left)]
    return [each for each in dict.fromkeys(found) if each[2] != "left"]


def assert_settled(folder: Path, commits: list[r.Committed], ranks_each: int) -> None:
    """What a push lost counts on all of its worker's ranks, or on none: where it was committed, and nowhere else."""
    accepted = {tuple(key) for record in commits for key in record.keys}
    notes = noted.notes(folder, "settled")
    for (worker, _), told in notes.items():
        assert told == notes[worker, 0], "all ranks of a worker hear the same"
        for note in told:
            # Of a fenced worker that never heard the answer, nothing counts though it may have been committed.
            assert note["accepted"] <= (tuple(note["key"]) in accepted), note
            assert note["kept"] == note["accepted"]
    assert len(notes) == 2 * ranks_each


def test_a_shard_is_killed_between_two_ranks_pulls_and_a_worker_sleeps_past_its_lease(ranks, tiny, tmp_path):
    """Two workers of two ranks. The shard comes back with encoded pushes from its log, as another chain; the worker is
    stopped when its push is with the shard and the coordinator not told: it is fenced, and what it says late counts
    for nothing."""
    run, said, over = tmp_path / "run", [], threading.Event()
    job = job_of(tiny, run, "replicas=2,fsdp=2", "int8", shards=2, lease=LEASE)
    everybody = {"worker 0": {"notes": True, "apart": 5}, "worker 1": {"notes": True, "stops": 10}}
    everybody |= {f"server {shard}": {"keeps": True} for shard in range(2)}
    waker = threading.Thread(target=woken, args=(run, 1, over), daemon=True)
    waker.start()
    try:
        figures = runs.run(ranks, job, said=said, also=everybody)
    finally:
        over.set()
        waker.join()
    assert (figures["step"], figures["stopped_by"]) == (STEPS, ""), said
    assert [line for line in said if "killed by" in line] == ["server 0 was killed by SIGKILL: started again"], said
    commits = runs.audit(run, STEPS * BATCH)
    assert given_up(run) == [(1, 0, "expired")]
    late = {key.clock for record in commits for key in record.keys if key[:2] == (1, 0)}
    assert max(late) == 8, "its tenth push came when others had gone on"
    again = [key for record in commits for key in record.keys if key.worker == 1 and key.incarnation > 0]
    assert again, "and it took part again"

    pulls = noted.notes(run, "pull")
    apart = [(first, second) for first, second in zip(pulls[0, 0], pulls[0, 1], strict=True) if not first["agreed"]]
    chains = [[note["shards"].get("0", [0, 0])[1] for note in pair] for pair in apart]
    assert any(0 not in pair and pair[0] != pair[1] for pair in chains), "its ranks were at two lives of the shard"
    assert all(note["agreed"] == other["agreed"] for note, other in zip(pulls[0, 0], pulls[0, 1], strict=True))
    assert_settled(run, commits, ranks_each=2)
    assert any(not note["accepted"] for note in noted.notes(run, "settled")[1, 0]), "the late push was settled, too"
    ours, theirs = runs.replayed(run), runs.weights(run)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs), "logs and journal give other weights"
    sent, received = share_of_fp32(run)
    assert 0.25 < sent < 0.27
    assert 0.25 < received < 2 * 0.27, "a rank that has half of a block gets the step of all of it"


def share_of_fp32(folder: Path) -> tuple[float, float]:
    """Of 4 bytes for each parameter and worker, what workers' sockets have sent and received in a step: the median of
    the first eight, of which one has a dense pull."""
    whole = 2 * 4 * count(read(folder / "job.toml").model)
    rows = metrics.read(folder)[:8]
    return tuple(statistics.median(row[name] for row in rows) / whole for name in ("sent_bytes", "received_bytes"))


@pytest.mark.nightly
def test_the_bytes_of_codecs_at_the_sockets(ranks, tiny, tmp_path):
    """Of two workers' pushes and pulls, against the same without a codec, with all that travels beside numbers."""
    larger = {"hidden_size": 256, "intermediate_size": 768}
    moved = {}
    for codec in ("none", "int8", "topk:0.05+int2"):
        run = tmp_path / codec
        runs.run(ranks, job_of(tiny, run, "replicas=2", codec, steps=8, model=larger, shards=2))
        runs.audit(run, 8 * BATCH)
        moved[codec] = share_of_fp32(run)
    # Rows of the embedding that a batch does not have are not pushed without a codec.
    assert 0.95 < moved["none"][0] <= 1.01
    assert 1.0 < moved["none"][1] < 1.01
    for way in range(2):
        assert moved["int8"][way] / moved["none"][way] <= 0.27
        assert moved["topk:0.05+int2"][way] / moved["none"][way] <= 0.02


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("layout", "mode", "copies", "codec"),
    [
        ("replicas=2,tensor=2", "bsp", 1, "topk:0.05+int2"),
        ("replicas=2,fsdp=2", "bsp", 2, "topk:0.05+int2"),
        ("replicas=2,fsdp=2", "asp", 2, "topk:0.05+int2"),
        ("replicas=2,tensor=2", "asp", 1, "int8"),
        ("replicas=2,pipeline=2", "ssp", 2, "sign"),
    ],
)
def test_shards_and_workers_are_killed_and_what_was_accepted_counts_once(
    ranks, tiny, tmp_path, layout, mode, copies, codec
):  # fmt: skip
    """Ranks that hold the same have it from the same shadow, bit for bit, or none of them computes."""
    run, steps = tmp_path / "run", 40
    job = job_of(tiny, run, layout, codec, steps=steps, shards=2, copies=copies, mode=mode)
    shard = "shoal-server0" if copies == 1 else "shoal-server0co"
    also: dict[str, dict] = {f"worker {worker}": {"notes": True} for worker in range(2)}
    also["worker 0"]["apart"] = 20 if copies == 1 else 0
    also |= {f"server {number}": {"keeps": True} for number in range(2)} if copies == 1 else {}
    with Killer(run, [(4, shard), (14, "shoal-worker1"), (28, shard)]) as killer:
        figures = runs.run(ranks, job, also=also)
    assert (figures["step"], len(killer.waits)) == (steps, 3)
    commits = runs.audit(run, steps * BATCH)
    assert runs.version(run) == commits[-1].version
    assert_settled(run, commits, ranks_each=2)
    for (worker, _), told in noted.notes(run, "pull").items():
        first = {tuple(note["key"]): note for note in noted.notes(run, "pull")[worker, 0] if note["agreed"]}
        for note in [each for each in told if each["agreed"]]:
            mine, leads = note["shards"], first[tuple(note["key"])]["shards"]
            assert {n: each[:2] for n, each in mine.items()} == {n: each[:2] for n, each in leads.items()}
    if copies == 1:
        ours, theirs = runs.replayed(run), runs.weights(run)
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
