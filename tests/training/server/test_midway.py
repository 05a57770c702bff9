"""A server job in the middle of which something happens: transfers are torn, workers come anew, networks are bad."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from shoal.observe import metrics
from tests.training.server import gradients, noted, runs
from tests.training.server.runs import Killer
from tests.training.server.test_faults import BATCH, GOES_ON, OPTIONS

KILLED = "was killed by SIGKILL: started again"
KEEPS, NOTES = {"keeps": True}, {"notes": True}


def job_of(tiny, run, workers: int, steps: int, **server):
    options = OPTIONS | {"train": {"steps": steps, "validate_every": 1000}, "checkpoint": {"every": 1000}}
    return tiny(run, f"replicas={workers}", server=server, **options)


def assert_follows(run, workers: tuple[int, ...] = ()) -> None:
    """From logs and journal alone: the weights in the end, bit for bit; and all that these workers pulled, each time of
    one version on all shards."""
    held: dict[tuple[int, int], int] = {}

    def look(shard: int, version: int, parameters) -> None:
        parts = zip(parameters.pieces(), (each.local for each in parameters.shards), strict=True)
        held[shard, version] = noted.digest(parts)

    ours, theirs = runs.replayed(run, look), runs.weights(run)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    for worker in workers:
        pulls = [note for note in noted.notes(run, "pull")[worker, 0] if note["agreed"]]
        for note in pulls:
            assert len({version for version, _, _ in note["shards"].values()}) == 1, "of several versions"
            for shard, (version, _, digest) in note["shards"].items():
                assert version == 0 or digest == held[int(shard), version], "not what the shard held then"


def test_shards_are_killed_within_a_push_and_within_a_pull_and_a_worker_comes_anew(ranks, tiny, tmp_path):
    """The first shard has half of the bytes that a worker pushes, the second has sent half of those that one pulls. A
    worker is killed, and pulls while the other one goes on: weights of one version, those that the journal gives."""
    run, said, steps = tmp_path / "run", [], 24
    also: dict[str, dict] = {"worker 0": NOTES, "worker 1": NOTES}
    also |= {"server 0": KEEPS | {"torn": [["read", 9]]}, "server 1": KEEPS | {"torn": [["write", 16]]}}
    with Killer(run, [(14, "shoal-worker1")]) as killer:
        figures = runs.run(
            ranks, job_of(tiny, run, 2, steps, mode="asp", shards=2), said=said, also=also, rows=False
        )  # fmt: skip
    assert (figures["step"], figures["stopped_by"]) == (steps, ""), said
    restarted = sorted(line.removesuffix(f" {KILLED}") for line in said if line.endswith(KILLED))
    assert restarted == ["server 0", "server 1", "worker 1"], said
    assert max(killer.waits) < GOES_ON
    commits = runs.audit(run, steps * BATCH)
    assert runs.version(run) == commits[-1].version
    anew = [note["key"] for note in noted.notes(run, "pull")[1, 0] if note["key"] and note["key"][1] > 0]
    assert anew, "it came in the middle"
    assert_follows(run, workers=(0, 1))
    assert gradients.assert_follow(run) > steps


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("mode", "copies", "torn"),
    [
        ("bsp", 1, {"server 0": [["read", 9], ["write", 3], ["read", 2]], "server 1": [["write", 9]]}),
        ("ssp", 1, {"server 0": [["write", 5], ["read", 5]], "worker 1": [["read", 8]]}),
        ("asp", 1, {"worker 0": [["write", 9], ["read", 1]], "worker 2": [["read", 12], ["write", 2]]}),
        ("quorum", 1, {"worker 1": [["write", 6]], "server 1": [["read", 20]]}),
        # The second life of a copy is one that takes all from the other: in the middle of that.
        ("asp", 2, {"server 0 copy 0": [["read", 9], ["read", 1]], "server 1 copy 1": [["read", 30]]}),
        ("bsp", 2, {"server 0 copy 0": [["write", 9]], "worker 1": [["write", 20]]}),
        ("quorum", 2, {"server 1 copy 0": [["write", 12], ["read", 1], ["read", 1]]}),
    ],
    ids=str,
)
def test_whoever_is_killed_within_a_transfer_the_audit_is_clean(ranks, tiny, tmp_path, mode, copies, torn):
    run, said, steps = tmp_path / "run", [], 40
    also: dict[str, dict] = {name: {"torn": lives} for name, lives in torn.items()}
    if copies == 1:
        for number in range(2):
            also[f"server {number}"] = also.get(f"server {number}", {}) | KEEPS
    job = job_of(tiny, run, 3, steps, mode=mode, copies=copies, shards=2)
    figures = runs.run(ranks, job, said=said, also=also)
    assert (figures["step"], figures["stopped_by"]) == (steps, ""), said
    assert len([line for line in said if line.endswith(KILLED)]) == sum(map(len, torn.values())), said
    assert runs.version(run) == runs.audit(run, steps * BATCH)[-1].version
    if copies == 1:
        assert_follows(run)


@pytest.mark.nightly
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(
    ("options", "most"),
    [({"mode": "asp"}, 1000), ({"mode": "ssp", "staleness": 1}, 6), ({"mode": "quorum"}, 0), ({"mode": "bsp"}, 0)],
    ids=str,
)
@pytest.mark.parametrize("codec", ["none", "topk:0.05+int2"])
def test_a_tenth_of_all_messages_is_lost_late_or_doubled_in_any_mode(
    ranks, tiny, tmp_path, options, most, seed, codec
):  # fmt: skip
    run, steps = tmp_path / "run", 30
    job = job_of(tiny, run, 3, steps, shards=2, lease=60.0, **options)
    job = replace(job, sync=replace(job.sync, codec=codec))
    also: dict[str, dict] = {f"worker {number}": NOTES for number in range(3)}
    also |= {f"server {number}": KEEPS for number in range(2)}
    network = {"seed": seed, "odds": 0.034}
    figures = runs.run(ranks, job, network=network, also=also, rows=codec != "none")
    assert figures["step"] == steps
    runs.audit(run, steps * BATCH)
    assert max(int(late) for row in metrics.read(run) for late in row["staleness"]) <= most
    assert_follows(run, workers=(0, 1, 2) if codec == "none" else ())
