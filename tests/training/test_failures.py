"""What goes wrong in the middle of a run: a full disk, a damaged checkpoint, a rank that raises."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import time

import pytest
import torch

from shoal import checkpoint
from shoal.cli.main import main
from shoal.errors import RankError
from shoal.job import write
from shoal.models.storage import canonical
from shoal.observe import metrics, result
from shoal.serving.load import load
from tests.training.test_resume import losses, weights


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_helper_process_costs_one_checkpoint_and_never_the_last(train, tiny, tmp_path, victim):
    run = tmp_path / "run"
    job = tiny(run, train={"steps": 8}, checkpoint={"every": 2, "keep": 8})
    train(job, entry="tests.training.cases:loses_its_helper", victim=victim, at=[4, 8])
    saved = [folder.name for folder in sorted((run / "checkpoints").glob("step-????????"))]
    assert saved == ["step-00000002", "step-00000006", "step-00000008"]
    assert not checkpoint.verify(run / "checkpoints/step-00000008")
    log = (run / "log.txt").read_text()
    assert [log.count(f"step {step} was not saved") for step in (2, 4, 6, 8)] == [0, 1, 0, 1]


@pytest.mark.parametrize("layout", ["replicas=2", "fsdp=2,zero=3"])
def test_full_disk_while_saving(train, tiny, tmp_path, layout):
    """The disk is full from step 3 to 6: what was saved stays, training goes on, says so, and saves again later."""
    run = tmp_path / "run"
    job = tiny(run, layout, train={"steps": 8}, checkpoint={"every": 2, "keep": 8})
    train(job, entry="tests.training.cases:full_disk", victim=1, after=2, until=6)
    assert [folder.name for folder in sorted((run / "checkpoints").iterdir())] == ["step-00000002", "step-00000008"]
    assert len(metrics.read(run)) == 8
    log = (run / "log.txt").read_text()
    for step in (4, 6):
        assert f"step {step} was not saved" in log
    assert log.count("File too large") == 2
    assert log.count("warning:") == 2


def test_full_disk_at_the_end(train, tiny, tmp_path):
    """The run still ends well, with the model of the last checkpoint, and says which that is."""
    run = tmp_path / "run"
    job = tiny(run, train={"steps": 8}, checkpoint={"every": 2})
    train(job, finish=True, entry="tests.training.cases:full_disk", victim=0, after=4, until=8)
    assert not checkpoint.verify(run / "checkpoints/step-00000004")
    assert [folder.name for folder in sorted((run / "checkpoints").iterdir())] == ["step-00000002", "step-00000004"]
    saved = weights(run, 4)
    for name, tensor in canonical(load(run / "model")):
        assert torch.equal(tensor, saved[name])
    log = (run / "log.txt").read_text()
    assert "step 8 was not saved" in log
    assert "model/ are those of step 4, the last one saved, not of step 8" in log


def test_full_disk_from_some_moment_on(arguments, tmp_path, capfd):
    """Everything the run writes fails: it trains to its end, warns, and keeps the checkpoint that it has."""
    run = tmp_path / "run"
    run.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1100k", "none", run], capture_output=True).returncode:
        pytest.skip("may not mount a file system here")
    try:
        words = ["--layout", "replicas=2", "--steps", "8", "--checkpoint.every", "4", "--format", "json"]
        assert main([*arguments, *words, "--run-dir", str(run)]) == 0
        out, err = capfd.readouterr()
        assert json.loads(out)["val_loss"] > 0
        assert "step 8 was not saved: No space left on device" in err
        assert "Traceback" not in err
        assert [folder.name for folder in (run / "checkpoints").iterdir()] == ["step-00000004"]
        assert not checkpoint.verify(run / "checkpoints/step-00000004")
    finally:
        subprocess.run(["umount", run], check=True)


def test_a_slow_last_save_is_told_and_waited_for(train, tiny, tmp_path):
    run = tmp_path / "run"
    train(tiny(run, "replicas=2"), entry="tests.training.cases:slow_at_the_end")
    assert "the last checkpoint, of step 8, is still being written" in (run / "log.txt").read_text()
    assert checkpoint.newest(run / "checkpoints", lambda _: None).name == "step-00000008"


def test_damaged_checkpoint_on_resume(train, tiny, tmp_path):
    """Newest damaged: its file is named, the one before it is the start, and the end is the same."""
    options = {"train": {"steps": 12}, "checkpoint": {"every": 4, "keep": 4}}
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    train(tiny(whole, "replicas=3", **options))
    shutil.copytree(whole, broken)
    victim = sorted((broken / "checkpoints/step-00000012").glob("*.safetensors"))[1]
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    train(tiny(broken, "replicas=3", **options), resume=True)
    log = (broken / "log.txt").read_text()
    assert f"{victim} is damaged" in log
    assert f"goes on from {broken / 'checkpoints/step-00000008'}: step 8" in log
    assert losses(broken) == losses(whole)
    newest = checkpoint.newest(broken / "checkpoints", lambda _: None)
    assert newest is not None
    assert newest.name == "step-00000012-1"
    again = dict(checkpoint.tensors(newest))
    assert all(torch.equal(again[name], tensor) for name, tensor in weights(whole, 12).items())


def test_resuming_a_finished_run_changes_nothing(train, tiny, tmp_path):
    """Somebody forgot to give more steps."""
    run = tmp_path / "run"
    first = train(tiny(run), finish=True)[0]
    told = result.read(run)
    again = train(tiny(run), resume=True, finish=True)[0]
    assert again["validation"] == first["validation"]
    assert result.read(run).val_loss == told.val_loss is not None
    assert len(metrics.read(run)) == told.steps == 8


def test_a_rank_that_raises_is_named_last_and_the_run_can_be_resumed(train, tiny, tmp_path, monkeypatch, capfd):
    run, whole = tmp_path / "run", tmp_path / "whole"
    options = {"layout": "replicas=3", "checkpoint": {"every": 2}}
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(write(tiny(run, **options)))
    monkeypatch.setattr("shoal.launch.train._WORKER", "tests.training.failing")
    monkeypatch.setattr("shoal.launch.cores.cores", lambda: 2)
    assert main(["train", str(recipe)]) == 1
    out, err = capfd.readouterr()
    assert "warning: 3 workers share 2 cores; 2 would be faster" in out
    lines = err.strip().splitlines()
    assert "error: rank 1: failed at step 6" in lines
    assert "  ranks 0 and 2 waited for it in all_reduce along replicas" in lines
    assert f"shoal train --resume {run} goes on from step-00000004" in lines
    assert lines[-1] == "ValueError: the cat has sat on the keyboard"
    newest = checkpoint.newest(run / "checkpoints", pytest.fail)
    assert newest is not None
    assert newest.name == "step-00000004"
    train(tiny(run), resume=True)
    train(tiny(whole, **options))
    assert losses(run) == losses(whole)


@pytest.mark.parametrize(
    ("layout", "entry", "cause"),
    [
        ("tensor=2", "main", "the cat has sat"),
        ("context=2", "killed", "SIGKILL"),
        ("pipeline=2,micro_batch=2", "killed", "SIGKILL"),
        ("pipeline=2,schedule=zbv", "main", "the cat has sat"),
        pytest.param("tensor=2", "killed", "SIGKILL", marks=pytest.mark.nightly),
        pytest.param("context=2", "main", "the cat has sat", marks=pytest.mark.nightly),
        pytest.param("pipeline=2,micro_batch=2", "main", "the cat has sat", marks=pytest.mark.nightly),
        pytest.param("pipeline=2,schedule=zbv", "killed", "SIGKILL", marks=pytest.mark.nightly),
    ],
)
def test_a_rank_lost_in_the_middle_of_a_replica_ends_the_others_soon(train, tiny, tmp_path, layout, entry, cause):
    """Long before any timeout, and it is the one that is named."""
    job = tiny(tmp_path / "run", layout, train={"steps": 8}, model={"num_hidden_layers": 4})
    start = time.monotonic()
    with pytest.raises(RankError) as caught:
        train(job, entry=f"tests.training.failing:{entry}")
    assert time.monotonic() - start < 60
    assert caught.value.where == "rank 1"
    assert cause in str(caught.value)
    axis = layout.partition("=")[0]
    first, second = str(caught.value).splitlines()[:2]
    assert re.search(r"rank 1: (failed|killed by SIGKILL) at step \d+$", first)
    assert re.search(rf"^  rank 0 waited for it in (all_\w+|send|recv) along {axis}$", second)
