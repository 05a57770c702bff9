"""What a codec has lost by the end of a run, or when it is asked to end, is in the weights that it saves."""

from __future__ import annotations

import signal
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from shoal.job import Layout, read, write
from shoal.models.spec import parameters
from shoal.observe import metrics
from shoal.shard import Shard
from shoal.sync.server.messages import NOTHING
from shoal.training.server.hold import first_weights
from tests.training.server import runs
from tests.training.server.runs import Killer
from tests.training.server.watched import SUM

LR = 0.05
# Weights move against the sum of all gradients, each divided by its tokens, and by nothing else.
OPTIONS = {
    "optim": {
        "name": "sgd", "lr": LR, "momentum": 0.0, "weight_decay": 0.0, "clip": 0.0, "schedule": "constant",
        "warmup": 0.0,
    },
    "data": {"validation": 0.0},
    "checkpoint": {"every": 1000},
    "sync": {"name": "server", "codec": "topk:0.02+int2"},
}  # fmt: skip

# At a rate of 0, with which other schedules end, a rest would move no weight, and none is pushed.
ENDS_ABOVE_0 = {"lr": 1e-3, "schedule": "constant"}


def sums(run) -> dict[str, torch.Tensor]:
    """Of all gradients that its workers have computed since it began, or was resumed: whole parameters."""
    job = read(run / "job.toml")
    found = {name: torch.zeros(spec.shape, dtype=torch.float64) for name, spec in parameters(job.model).items()}
    for path in (run / "server").glob(f"{SUM}-*"):
        for place, tensor in load_file(path).items():
            name, _, offsets = place.partition("@")
            starts = [int(start) for start in offsets.split(",") if start]
            found[name][tuple(slice(a, a + n) for a, n in zip(starts, tensor.shape, strict=True))] += tensor
        path.unlink()
    return found


def first(run) -> dict[str, torch.Tensor]:
    job = read(run / "job.toml")
    shapes = {name: spec.shape for name, spec in parameters(job.model).items()}
    shards = [
        Shard(name, shape, (0,) * len(shape), torch.empty(shape, dtype=torch.float64)) for name, shape in shapes.items()
    ]
    first_weights(shards, job)
    return {shard.name: shard.local for shard in shards}


def far(run, before: dict[str, torch.Tensor]) -> float:
    """How far its weights are from where all gradients take them, as a share of the way."""
    gone, now = sums(run), runs.weights(run)
    off = sum((now[name] - before[name] + LR * gone[name]).square().sum() for name in before)
    way = sum((LR * gone[name]).square().sum() for name in before)
    return (off / way).sqrt().item()


def rests(run) -> int:
    commits, _ = runs.history(run)
    return sum(record.samples == (NOTHING,) and record.grad_norm > 0 for record in commits.values())


def test_all_that_was_computed_is_in_the_weights_of_a_run_that_is_stopped(ranks, tiny, tmp_path):
    """Two workers of two ranks, two servers."""
    run = tmp_path / "run"
    train = {"steps": 40, "validate_every": 1000, "precision": "fp64"}
    job = tiny(run, "replicas=2,fsdp=2", server={"shards": 2, "mode": "asp"}, train=train, **OPTIONS)
    with Killer(run, [(3, "shoal-coordinat")], number=signal.SIGTERM):
        figures = runs.run(ranks, job)
    assert 3 <= figures["step"] < 40
    assert far(run, first(run)) < 1e-12
    assert rests(run) == 2
    assert all(0 < row["loss"] < 7 for row in metrics.read(run))


@pytest.mark.nightly
def test_and_of_one_that_goes_on_with_other_workers_and_ends(ranks, tiny, tmp_path):
    run, train = tmp_path / "run", {"steps": 12, "validate_every": 1000, "precision": "fp64"}
    job = tiny(run, "replicas=2", server={"shards": 2, "mode": "asp"}, train=train, **OPTIONS)
    with Killer(run, [(3, "shoal-coordinat")], number=signal.SIGTERM):
        runs.run(ranks, job)
    assert far(run, first(run)) < 1e-12
    before = runs.weights(run)
    (run / "job.toml").write_text(write(replace(read(run / "job.toml"), layout=Layout.parse("replicas=3,fsdp=2"))))
    assert runs.run(ranks, job, resume=True)["step"] == 12
    assert far(run, before) < 1e-12
    assert rests(run) == 5


@pytest.mark.nightly
@pytest.mark.parametrize(
    "server", [{"mode": "bsp"}, {"mode": "quorum", "quorum": 1}, {"mode": "bsp", "copies": 2}], ids=str
)
def test_with_rounds_all_rests_are_one_update(ranks, tiny, tmp_path, server):
    run = tmp_path / "run"
    train = {"steps": 6, "validate_every": 1000}
    options = {**OPTIONS, "optim": ENDS_ABOVE_0, "sync": {"name": "server", "codec": "int8"}}
    runs.run(ranks, tiny(run, "replicas=3", server={"shards": 2, **server}, train=train, **options))
    commits = runs.audit(run, 6 * 12)
    assert commits[-1].samples == (NOTHING,) * len(commits[-1].keys)
    if server["mode"] == "bsp":
        assert len(commits) == 7
        assert [key.worker for key in commits[-1].keys] == [0, 1, 2]
    assert metrics.read(run)[-1]["step"] == 6


@pytest.mark.nightly
def test_without_feedback_there_is_none(ranks, tiny, tmp_path):
    run = tmp_path / "run"
    options = {**OPTIONS, "sync": {"name": "server", "codec": "int8", "feedback": False}}
    runs.run(ranks, tiny(run, "replicas=2", train={"steps": 6, "validate_every": 1000}, **options))
    assert len(runs.audit(run, 6 * 12)) == 6


@pytest.mark.nightly
@pytest.mark.parametrize(
    "server", [{"mode": "asp"}, {"mode": "ssp", "staleness": 1, "copies": 2}, {"mode": "bsp"}], ids=str
)
def test_a_run_of_which_processes_are_killed_comes_to_its_end(ranks, tiny, tmp_path, server):
    run = tmp_path / "run"
    options = {**OPTIONS, "optim": ENDS_ABOVE_0, "train": {"steps": 30, "validate_every": 1000}}
    job = tiny(run, "replicas=3", server={"shards": 2, **server}, **options)
    with Killer(run, [(4, "shoal-worker1"), (10, "shoal-coordinat"), (16, "shoal-server0"), (28, "shoal-worker2")]):
        assert runs.run(ranks, job)["step"] == 30
    commits = runs.audit(run, 30 * 12)
    assert commits[-1].samples[0] == NOTHING
