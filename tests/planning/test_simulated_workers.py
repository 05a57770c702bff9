"""Planned asynchronous workers, simulated: what `shoal plan` predicts of equal ones, and what unequal ones do."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from shoal.errors import JobError
from shoal.job import Layout
from shoal.job.server import ServerOptions
from shoal.job.sync import SyncOptions
from shoal.planning import asked, scene, simulated_workers, simulation

LAYOUT = Layout.parse("replicas=4,fsdp=2,pipeline=2,tensor=2,micro_batch=1")


def staged(shards=4, codec="none", **server):
    options = ServerOptions(shards=shards, **{"mode": "asp"} | server)
    sync = SyncOptions("server", codec=codec)
    wanted = asked.Wanted(global_batch=512, replicas=4, sync=sync, server=options)
    question = asked.of_model("llama3-8b", asked.cluster_of("h100x32", 0.0), wanted)
    return question, scene.staged(question, LAYOUT)


@pytest.mark.parametrize(("shards", "own", "codec"), [(8, 1, "none"), (1, 1, "none"), (2, 4, "none"), (2, 1, "int8")])
def test_equal_workers_take_what_is_predicted(shards, own, codec):
    """Up to the pipeline's messages; with one shard its link decides."""
    question, found = staged(shards, codec, local_steps=own)
    run = simulated_workers.simulate(question, found, 200, None, 0)
    assert run.run.seconds / 200 == pytest.approx(found.plan.seconds, rel=0.03)
    assert run.tokens_per_second == pytest.approx(found.plan.tokens_per_second, rel=0.03)


def test_a_slow_worker_costs_its_own_share():
    """Of four workers one takes twice as long: three and a half are left, whatever pipeline of it is slow."""
    question, found = staged(shards=32)
    slow = replace(found, scene=replace(found.scene, slow={(2, 0): 2.0, (2, 1): 2.0}))
    plain, one = (simulated_workers.simulate(question, each, 200, None, 0) for each in (found, slow))
    assert plain.run.seconds / one.run.seconds == pytest.approx(3.5 / 4, rel=0.02)
    assert np.argmin(one.run.updates) == 1
    assert "updates of a worker" in simulated_workers.text(one)
    result = simulated_workers.result(one)
    assert sum(result["staleness"].values()) == sum(result["updates"]) == 800


def test_groups_wait_inside_and_not_for_each_other():
    _, found = staged()
    uneven = replace(found.scene, jitter=0.1)
    taken = simulation.of_groups(uneven, 4, 3, seed=1)
    assert taken.shape == (3, 4)
    assert len(np.unique(taken)) == 12
    one = simulation.of_groups(uneven, 1, 3, seed=1)
    assert np.array_equal(taken.max(axis=1), one[:, 0])
    assert simulation.of_groups(found.scene, 4, 3).shape == (1, 4)


@pytest.mark.parametrize(
    ("server", "words"), [({"mode": "quorum"}, "mode=quorum"), ({"max_staleness": 3}, "max_staleness=3")]
)
def test_what_is_not_simulated(server, words):
    with pytest.raises(JobError, match=words):
        staged(**server)
