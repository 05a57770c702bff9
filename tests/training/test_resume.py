"""A run that is killed and resumed ends as the run that never was."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from shoal import checkpoint
from shoal.cli.main import main
from shoal.observe import metrics, result


def shoal(*words: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "shoal.cli.main", *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def descendants(pid: int) -> list[int]:
    children = Path(f"/proc/{pid}/task/{pid}/children")
    found = [int(word) for word in children.read_text().split()] if children.exists() else []
    return found + [grandchild for child in found for grandchild in descendants(child)]


def kill_everything(process: subprocess.Popen) -> None:
    for pid in [process.pid, *descendants(process.pid)]:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    process.wait()


def until(condition, process: subprocess.Popen, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it takes too long"
        assert process.poll() is None, process.stdout and process.stdout.read()
        time.sleep(0.002)


def weights(run: Path, step: int) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in checkpoint.tensors(run / f"checkpoints/step-{step:08}")}


def losses(run: Path) -> list[float]:
    return [row["loss"] for row in metrics.read(run)]


_STALLS = (
    "import sys, shoal.launch.train as t; from shoal.cli.main import main;"
    "t._WORKER = 'tests.training.stalling'; sys.exit(main(sys.argv[1:]))"
)


def test_killed_and_resumed_equals_never_killed_bitwise(arguments, train, tiny, tmp_path):
    """20 steps = 13 steps, 10 of them saved, + SIGKILL of everything + resume, with 3 workers and several buckets."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    train(tiny(whole, "replicas=3", train={"steps": 20}, checkpoint={"every": 10}))
    words = [*arguments, "--layout", "replicas=3", "--steps", "20", "--checkpoint.every", "10"]
    command = [sys.executable, "-c", _STALLS, *words, "--run-dir", str(broken)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    saved = broken / "checkpoints/step-00000010/manifest.json"
    until(lambda: saved.exists() and len(metrics.read(broken)) == 13, process)
    kill_everything(process)
    assert train(tiny(broken), resume=True)[0]["step"] == 20
    assert losses(broken) == losses(whole)
    one, two = (sorted((run / "checkpoints/step-00000020").glob("*.safetensors")) for run in (whole, broken))
    assert len(one) == len(two) == 3
    for mine, theirs in zip(one, two, strict=True):  # weights and both moments
        assert mine.read_bytes() == theirs.read_bytes()


@pytest.mark.parametrize(
    "layout", ["fsdp=2,zero=2,micro_batch=3", pytest.param("replicas=1", marks=pytest.mark.nightly)]
)
def test_resumes_in_another_layout(train, tiny, tmp_path, layout):
    """In float64: rounding stays below 1e-8, a lost or repeated sample would not."""
    whole, moved = tmp_path / "whole", tmp_path / "moved"
    train(tiny(whole, "replicas=3", train={"steps": 12, "precision": "fp64"}, checkpoint={"every": 6}))
    shutil.copytree(whole, moved)
    shutil.rmtree(moved / "checkpoints/step-00000012")
    assert main(["train", "--resume", str(moved), "--layout", layout]) == 0
    assert losses(moved) == pytest.approx(losses(whole), rel=1e-8)
    one, two = weights(whole, 12), weights(moved, 12)
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-8, atol=1e-10)


@pytest.mark.nightly
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on CPU")
def test_resumed_is_bitwise_the_same_in_bf16_and_compiled(train, tiny, tmp_path):
    """As the quickstart trains."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    options = {"train": {"precision": "bf16", "compile": "on", "steps": 12}, "checkpoint": {"every": 6}}
    train(tiny(whole, "replicas=3", **options))
    shutil.copytree(whole, broken)
    shutil.rmtree(broken / "checkpoints/step-00000012")
    train(tiny(broken, "replicas=3", **options), resume=True)
    assert losses(broken) == losses(whole)
    one, two = (sorted((run / "checkpoints/step-00000012").glob("*.safetensors")) for run in (whole, broken))
    assert [file.read_bytes() for file in one] == [file.read_bytes() for file in two]


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.nightly)])
def test_a_signal_saves_and_says_how_to_go_on(arguments, tmp_path, number):
    run = tmp_path / "run"
    process = shoal(*arguments, "--layout", "replicas=2", "--steps", "100000", "--run-dir", str(run))
    until(lambda: len(metrics.read(run)) > 3, process)
    process.send_signal(number)
    text, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + number, text
    assert f"shoal train --resume {run}" in text
    steps = metrics.read(run)[-1]["step"]
    newest = checkpoint.newest(run / "checkpoints", print)
    assert newest is not None
    assert newest.name == f"step-{steps:08}", "nothing was lost"
    assert "nothing is lost: resume as below" in text
    done = result.read(run)
    assert done is not None
    assert done.saved_step == done.steps == steps
    assert done.val_loss is done.bits_per_byte is None, "a glance at an earlier step is not the run's result"
