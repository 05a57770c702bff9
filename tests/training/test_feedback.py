"""What a codec has lost goes into the checkpoints of a run; with it, a resumed run ends as one that never stopped."""

from __future__ import annotations

import shutil

import pytest
import torch

from shoal import checkpoint
from shoal.checkpoint import manifest
from shoal.job import parse
from shoal.observe import metrics


def losses(run) -> list[float]:
    return [row["loss"] for row in metrics.read(run)]


def slots(folder) -> set[str]:
    return {name.partition(".")[0] for name in manifest.read(folder).tensors if name.startswith("residual")}


CODEC = "randomk:0.5+bf16"


@pytest.fixture(scope="module")
def whole(train, tiny, tmp_path_factory):
    """A run of three replicas with a codec that draws at random, saved at steps 3 and 6."""
    run = tmp_path_factory.mktemp("feedback") / "whole"
    train(tiny(run, "replicas=3", train={"steps": 6}, checkpoint={"every": 3}, sync={"codec": CODEC}))
    return run


def broken_off(whole, run):
    shutil.copytree(whole, run)
    shutil.rmtree(run / "checkpoints/step-00000006")
    return run


def test_resumed_is_bitwise_the_same(train, tiny, whole, tmp_path):
    run = broken_off(whole, tmp_path / "run")
    assert slots(run / "checkpoints/step-00000003") == {"residual@0", "residual@1", "residual@2", "residual-sum"}
    assert train(tiny(run), resume=True)[0]["step"] == 6
    assert losses(run) == losses(whole)
    one, two = (sorted((r / "checkpoints/step-00000006").glob("*.safetensors")) for r in (whole, run))
    assert [file.read_bytes() for file in one] == [file.read_bytes() for file in two]


def test_off_nothing_is_kept_and_on_again_it_begins_at_zero(train, tiny, whole, tmp_path):
    run = tmp_path / "off"
    sync = {"codec": CODEC, "feedback": False}
    train(tiny(run, "replicas=3", train={"steps": 6}, sync=sync))
    folder = run / "checkpoints/step-00000006"
    assert slots(folder) == set()
    assert losses(run)[0] == losses(whole)[0]
    assert losses(run)[5] != losses(whole)[5]
    text = (
        (run / "job.toml").read_text().replace("feedback = false", "feedback = true").replace("steps = 6", "steps = 8")
    )
    assert parse(text).sync.feedback
    (run / "job.toml").write_text(text)
    assert train(tiny(run), resume=True)[0]["step"] == 8
    assert slots(run / "checkpoints/step-00000008") == {"residual@0", "residual@1", "residual@2", "residual-sum"}


def test_the_model_of_a_checkpoint_with_residuals(whole):
    """What reads weights sees no residuals."""
    folder = whole / "checkpoints/step-00000006"
    names = [name for name, _ in checkpoint.tensors(folder)]
    assert len(names) == len(manifest.read(folder).tensors) // 7
    assert all(name.startswith(("model.", "lm_head.")) for name in names)
    residual = dict(checkpoint.tensors(folder, ["residual-sum.model.norm.weight"]))
    assert torch.cat([*residual.values()]).count_nonzero()
