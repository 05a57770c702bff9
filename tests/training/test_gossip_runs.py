"""`sync.name = gossip` as a whole run: checkpoints, resume on as many replicas or others, other syncs, ends."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace

import pytest
import torch

from shoal import checkpoint
from shoal.checkpoint import manifest
from shoal.job import Layout, read, write
from shoal.job.idle import without_idle
from shoal.observe import metrics
from shoal.sync.pairs import heard_by_all
from tests.sync.test_gossip import GOSSIP


@pytest.fixture(scope="module")
def whole(train, tiny, tmp_path_factory):
    run = tmp_path_factory.mktemp("gossip") / "whole"
    train(tiny(run, "replicas=3", train={"steps": 12}, sync=GOSSIP, checkpoint={"every": 5, "keep": 9}))
    return run


def again(whole, run, layout="", **sync):
    shutil.copytree(whole, run)
    for folder in checkpoint.complete(run / "checkpoints"):
        if folder.name > "step-00000005":
            shutil.rmtree(folder)
    job = read(run / "job.toml")
    layout = Layout.parse(layout) if layout else job.layout
    job = replace(job, layout=layout, run=replace(job.run, dir=str(run)), sync=replace(job.sync, **sync))
    (run / "job.toml").write_text(write(without_idle(job).validate()))
    return run


def test_resumed_between_meetings_equals_never_stopped_bitwise(train, tiny, whole, tmp_path):
    run = again(whole, tmp_path / "run")
    train(tiny(run), resume=True)
    rows, expected = metrics.read(run), metrics.read(whole)
    for key in ("loss", "grad_norm", "outer_drift", "outer_tokens", "val_loss"):
        assert [row.get(key) for row in rows] == [row.get(key) for row in expected], key
    one, two = (sorted((folder / "checkpoints/step-00000012").glob("*.safetensors")) for folder in (run, whole))
    assert len(one) == len(two) == 3
    for mine, theirs in zip(one, two, strict=True):
        assert mine.read_bytes() == theirs.read_bytes()


@pytest.mark.parametrize(
    ("layout", "sync"),
    [
        ("replicas=2", {}),
        ("replicas=4", {}),
        ("replicas=3", {"name": "allreduce"}),
        ("replicas=3", {"name": "local"}),
    ],
)
def test_others_go_on_from_it(train, tiny, whole, tmp_path, layout, sync):
    run = again(whole, tmp_path / "run", layout, **sync)
    assert train(tiny(run), resume=True)[0]["step"] == 12
    rows, expected = metrics.read(run), metrics.read(whole)
    # Where replicas that were apart go on as one, what they had learned since they last met is left behind.
    assert rows[5]["loss"] < expected[3]["loss"]
    assert rows[-1]["val_loss"] < expected[5]["loss"]


def test_the_model_of_a_checkpoint_is_the_mean_of_all_and_at_the_end_what_all_have(whole):
    for step, same in ((5, False), (12, True)):
        folder = whole / f"checkpoints/step-{step:08}"
        for name, mean in checkpoint.tensors(folder):
            slow = [t for _, t in checkpoint.tensors(folder, [f"slow@{r}.{name}" for r in range(3)])]
            assert torch.allclose(mean, sum(slow) / 3, atol=1e-6)
            assert all(torch.equal(slow[0], one) for one in slow) == same, name
    assert manifest.read(folder).values["sync"]["kind"] == "gossip"


def test_a_replica_with_ruined_weights_takes_over_its_partners(train, tiny, tmp_path):
    sync = GOSSIP | {"every": 3}
    job = tiny(tmp_path / "run", "replicas=2", train={"steps": 8, "on_nonfinite": "skip"}, sync=sync)
    told = train(job, entry="tests.training.cases:nonfinite", what="weights", at=[2], victim=1)
    assert [of_rank["error"] for of_rank in told] == [None, None]
    rows = metrics.read(tmp_path / "run")
    assert all(math.isfinite(row["loss"]) for row in rows)
    assert rows[-1]["val_loss"] < rows[0]["loss"]


def test_all_stop_after_the_same_step_where_one_is_asked(train, tiny, tmp_path):
    """Word of it goes from pair to pair."""
    job = tiny(tmp_path / "run", "replicas=4", train={"steps": 100}, sync=GOSSIP)
    told = train(job, entry="tests.training.cases:asked_to_stop", at=5, victim=2)
    last = (heard_by_all(job.train.seed, 2, 4, 2) + 1) * 2
    assert [figures["step"] for figures in told] == [last] * 4
