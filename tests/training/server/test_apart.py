"""Workers that take steps of their own between a pull and a push."""

from __future__ import annotations

import pytest

from shoal.observe import metrics
from tests.training.server import runs
from tests.training.server.test_equality import QUIET, through_a_server

FP64 = {"steps": 8, "validate_every": 1000, "precision": "fp64"}


@pytest.mark.parametrize(
    ("layout", "local_steps"),
    [("replicas=1,fsdp=2", 4), pytest.param("replicas=1", 3, marks=pytest.mark.nightly)],
)
def test_one_worker_whose_way_is_followed_whole_trains_as_without_a_server(
    ranks, train, tiny, tmp_path, layout, local_steps
):
    """Outer rate 1 without momentum: the servers go where it went. With AdamW, whose state it keeps between pulls."""
    one, server = tmp_path / "one", tmp_path / "server"
    train(tiny(one, "replicas=1", **QUIET, train=FP64))
    job = tiny(
        server, layout, **QUIET, train=FP64, sync={"name": "server", "outer_lr": 1.0, "outer_momentum": 0.0},
        server={"shards": 2, "local_steps": local_steps},
    )  # fmt: skip
    runs.run(ranks, job)
    left, right = runs.weights(one), runs.weights(server)
    assert max((left[name] - right[name]).abs().max().item() for name in left) < 1e-10
    commits = runs.audit(server, 8 * 12)
    assert [samples.stop - samples.start for commit in commits for samples in commit.samples] == [
        12 * min(local_steps, 8 - done) for done in range(0, 8, local_steps)
    ]
    losses = [row["loss"] for row in metrics.read(one)]
    mean = sum(losses[:local_steps]) / local_steps
    rows = metrics.read(server)
    assert rows[0]["loss"] == pytest.approx(mean, rel=0.02), "of all its steps, by their tokens"
    # What it pushes is how far it went; the servers have it from all of its ranks.
    assert [row["outer_drift"] for row in rows] == pytest.approx([row["grad_norm"] for row in rows], rel=1e-9)


def test_workers_go_on_from_where_the_servers_have_come_together(ranks, tiny, tmp_path):
    """asp with the delayed momentum that it needs; every sample once, and it learns."""
    job = through_a_server(
        tiny, tmp_path / "run", 3, {**QUIET, "train": {"steps": 24, "validate_every": 1000}},
        local_steps=4, mode="asp", compensation="delayed-nesterov",
    )  # fmt: skip
    runs.run(ranks, job)
    assert len(runs.audit(tmp_path / "run", 24 * 12)) == 18
    losses = [row["loss"] for row in metrics.read(tmp_path / "run")]
    assert losses[-1] < losses[0] - 0.3
