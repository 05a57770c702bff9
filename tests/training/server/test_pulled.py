"""The folder that `shoal pull` leaves: a second pull of the version, damage, other weights; and who resumes it."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from shoal import checkpoint
from shoal.cli.main import main
from shoal.errors import CheckpointError
from shoal.job import Job
from shoal.launch.train import ready
from shoal.models.spec import parameters
from shoal.sync.server import messages as m
from shoal.sync.server import records as r
from shoal.sync.server.messages import Key, Piece
from shoal.sync.server.node.read import Read
from shoal.sync.server.standing import Standing
from shoal.training.server import plan
from shoal.training.server.pull import Pulled, deliver

VERSION, BATCH = 7, 12


def read(job: Job, seed: int = 0) -> Read:
    """What two shards hold of a version, the second the rows from the second on."""
    draw = torch.Generator().manual_seed(seed)
    wholes = {name: torch.randn(spec.shape, generator=draw) for name, spec in parameters(job.model).items()}
    parts = []
    for shard, rows in enumerate((slice(0, 1), slice(1, None))):
        tensors = {name: whole[rows] for name, whole in wholes.items()}
        pieces = [
            Piece(name, (rows.start, *[0] * (part.ndim - 1)), tuple(part.shape)) for name, part in tensors.items()
        ]
        parts.append((m.Pulled(Key(0, 0, 0), shard, VERSION, tuple(pieces)), list(tensors.values())))
    return Read(VERSION, parts)


@pytest.fixture
def pulled(tiny, tmp_path):
    """A run, how one pulls from it, and what was pulled first."""
    run = tmp_path / "run"
    job, _ = ready(tiny(run, "replicas=2", sync={"name": "server"}, server={"shards": 2}), None, time.time())
    opened = r.Opened(plan.model_hash(job), VERSION, VERSION * BATCH)

    def pull(seed: int = 0, to: Path | None = None) -> Pulled:
        return deliver(run, job, read(job, seed), Standing(plan.rules(job), [1, 1], None, [opened], 0.0), to)

    return run, pull, pull()


def test_a_second_pull_of_a_version_finds_it_there(pulled):
    _, pull, first = pulled
    before = {path: path.stat().st_mtime_ns for path in first.folder.rglob("*")}
    assert (first.version, first.step, first.new) == (VERSION, VERSION, True)
    assert pull() == replace(first, new=False)
    assert {path: path.stat().st_mtime_ns for path in first.folder.rglob("*")} == before


@pytest.mark.parametrize("missing", ["job.toml", "pulled.json", "checkpoints", "a bit"])
def test_what_is_there_and_not_whole_is_written_again(pulled, missing):
    _, pull, first = pulled
    if missing == "a bit":
        file = next(first.checkpoint.glob("*.safetensors"))
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
    else:
        (first.folder / missing).rename(first.folder.parent / "elsewhere")
    assert pull().new
    assert not checkpoint.verify(first.checkpoint)
    assert not pull().new


def test_other_weights_of_the_same_version_are_neither_taken_for_it_nor_lost(pulled, tmp_path):
    """Of a run that went back to its checkpoint and came to the version by another way."""
    _, pull, first = pulled
    before = dict(checkpoint.tensors(first.checkpoint))
    with pytest.raises(CheckpointError, match="has other weights of version 7: the run has gone back") as caught:
        pull(seed=1)
    assert "--to" in caught.value.fix
    assert all(torch.equal(before[name], tensor) for name, tensor in checkpoint.tensors(first.checkpoint))
    assert pull(seed=1, to=tmp_path / "other").new
    with pytest.raises(CheckpointError, match="is there already"):
        pull(seed=1, to=tmp_path / "other")


def test_who_resumes_it_is_told_what_it_is_and_what_it_is_good_for(pulled, tmp_path, capsys):
    run, _, first = pulled
    assert main(["train", "--resume", str(first.folder)]) == 2
    error = capsys.readouterr().err
    assert f"{first.folder}: this is no run but weights that `shoal pull` has taken out of one" in error
    assert f"shoal train --resume {run} goes on with the run" in error
    export = error.partition("`shoal ckpt export-hf ")[2].partition("`")[0].split()
    assert main(["ckpt", "export-hf", *export]) == 0
    assert f"`shoal train --model.weights {export[1]}`" in error
    assert (Path(export[1]) / "config.json").is_file()
