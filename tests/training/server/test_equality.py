"""`bsp` through a server is what all-reduce is: losses, norms, weights; with workers of one rank and of several."""

from __future__ import annotations

import pytest

from shoal.job import Layout
from shoal.observe import metrics
from tests.training.server import runs

# No update is clipped by 1000, and every one of these by 0.5.
CLIPPED, FREE = 0.5, 1000.0
QUIET = {"data": {"validation": 0.0}, "checkpoint": {"every": 1000}}
PLAIN = {"steps": 6, "validate_every": 1000}


def through_a_server(tiny, folder, workers: int, options: dict, **server):
    return tiny(folder, f"replicas={workers}", sync={"name": "server"}, server={"shards": 2} | server, **options)


def far(one, other) -> tuple[float, float, float]:
    """How far two runs are apart at most: losses, norms relative, weights."""
    mine, theirs = metrics.read(one), metrics.read(other)
    assert [row["step"] for row in mine] == [row["step"] for row in theirs]
    assert [row["lr"] for row in mine] == [row["lr"] for row in theirs]
    rows = list(zip(mine, theirs, strict=True))
    losses = max(abs(a["loss"] - b["loss"]) for a, b in rows)
    norms = max(abs(a["grad_norm"] - b["grad_norm"]) / b["grad_norm"] for a, b in rows)
    left, right = runs.weights(one), runs.weights(other)
    return losses, norms, max((left[name] - right[name]).abs().max().item() for name in left.keys() | right.keys())


EVERY = [
    (workers, {"name": name, "lr": lr, "momentum": momentum, "clip": clip})
    for workers in (2, 3)
    for name, lr, momentum in (("sgd", 0.1, 0.0), ("sgd", 0.05, 0.9), ("adamw", 2e-3, 0.9))
    for clip in (CLIPPED, FREE)
]


@pytest.mark.parametrize(
    ("workers", "optim"),
    [EVERY[8], *(pytest.param(*each, marks=pytest.mark.nightly) for each in EVERY if each is not EVERY[8])],
    ids=str,
)
def test_in_fp32_within_rounding(ranks, train, tiny, tmp_path, workers, optim):
    one, server = tmp_path / "one", tmp_path / "server"
    options = {**QUIET, "train": PLAIN, "optim": optim}
    train(tiny(one, f"replicas={workers}", **options))
    figures = runs.run(ranks, through_a_server(tiny, server, workers, options))
    assert (figures["step"], figures["stopped_by"], figures["validation"]) == (6, "", None)
    losses, norms, weights = far(server, one)
    # AdamW divides gradients by their size, and makes much of the rounding of small ones.
    assert losses < 1e-5
    assert norms < 1e-5
    assert weights < (1e-4 if optim["name"] == "adamw" else 1e-6)
    assert all(row["grad_norm"] > CLIPPED for row in metrics.read(one)), "it is clipped where it should be"
    assert len(runs.audit(server, 6 * 12)) == 6
    assert all(row["staleness"] == {"0": workers} for row in metrics.read(server))


@pytest.mark.parametrize(
    ("layout", "shards"),
    [
        ("replicas=2,tensor=2,micro_batch=2,replica_share=2+1", 2),
        *(
            pytest.param(layout, shards, marks=pytest.mark.nightly)
            for layout, shards in (
                ("replicas=3", 1), ("replicas=2,tensor=2", 2),
                ("replicas=2,fsdp=2", 3), ("replicas=2,pipeline=2", 2), ("replicas=2,context=2", 2),
                ("replicas=2,fsdp=2,tensor=2", 2), ("replicas=1,fsdp=2,zero=2,micro_batch=3", 2),
                ("replicas=2,pipeline=2,schedule=zbv", 2),
            )
        ),
    ],
)  # fmt: skip
def test_in_fp64_as_one_process(ranks, train, tiny, tmp_path, layout, shards):
    """With AdamW, over 20 steps: workers of several ranks push what each of them holds, of their own share."""
    one, server = tmp_path / "one", tmp_path / "server"
    options = {**QUIET, "train": {"steps": 20, "validate_every": 1000, "precision": "fp64"}}
    options["model"] = {"num_hidden_layers": 4}
    train(tiny(one, "replicas=1", **options))
    runs.run(ranks, tiny(server, layout, sync={"name": "server"}, server={"shards": shards}, **options))
    losses, norms, weights = far(server, one)
    assert max(losses, norms, weights) < 1e-8
    commits = runs.audit(server, 20 * 12)
    assert len(commits) == 20
    shares = Layout.parse(layout).shares
    sizes = [12 * share // sum(shares) for share in shares]
    assert all([stop - start for start, stop in record.samples] == sizes for record in commits)


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("server", "batch", "pushed"),
    [({"mode": "asp"}, 16, (12, 4)), ({"mode": "ssp", "staleness": 2}, 16, (12, 4)), ({"local_steps": 3}, 12, (27, 9))],
    ids=["asp", "ssp", "local steps"],
)
def test_shares_in_other_modes(ranks, tiny, tmp_path, server, batch, pushed):
    """Each worker pushes as much as its share is, but at the end of the data; every sample is used once."""
    options = {**QUIET, "train": {"steps": 8, "validate_every": 1000, "global_batch": batch}}
    layout = f"replicas=2,replica_share=3+1,micro_batch={batch % 3 + 1}"
    runs.run(ranks, tiny(tmp_path / "run", layout, sync={"name": "server"}, server={"shards": 2} | server, **options))
    commits = runs.audit(tmp_path / "run", 8 * batch)
    sizes = {
        (key.worker, stop - start)
        for record in commits for key, (start, stop) in zip(record.keys, record.samples, strict=True)
    }  # fmt: skip
    assert {max(size for number, size in sizes if number == worker) for worker in (0, 1)} == set(pushed)
    assert set(enumerate(pushed)) <= sizes


@pytest.mark.nightly
def test_in_bf16_as_with_allreduce(ranks, train, tiny, tmp_path):
    """Gradients are summed in float32 either way, and in the same order for two workers."""
    one, server = tmp_path / "one", tmp_path / "server"
    options = {**QUIET, "train": PLAIN | {"precision": "bf16"}}
    train(tiny(one, "replicas=2", **options))
    runs.run(ranks, through_a_server(tiny, server, 2, options))
    assert max(far(server, one)) < 1e-6
    assert len(runs.audit(server, 6 * 12)) == 6
