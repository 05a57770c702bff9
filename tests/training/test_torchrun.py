"""`torchrun … -m shoal.cli.main train …` trains what `shoal train` trains on its own ranks."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests.launch.test_torchrun import documented
from tests.training.test_resume import losses


def torchrun(*words: str) -> subprocess.CompletedProcess[str]:
    options, environment = documented()
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", *options]
    return subprocess.run(
        [*command, "-m", "shoal.cli.main", *words],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=100,
    )


@pytest.mark.nightly
def test_same_losses_as_local_ranks(arguments, train, tiny, tmp_path):
    run, local = tmp_path / "run", tmp_path / "local"
    done = torchrun(*arguments, "--steps", "6", "--format", "json", "--run-dir", str(run))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["run"] == str(run)
    assert {"model", "report.html", "result.json"} <= {path.name for path in run.iterdir()}
    train(tiny(local, "replicas=2", train={"steps": 6}))
    assert losses(run) == losses(local)

    more = torchrun("train", "--resume", str(run), "--steps", "8")
    assert more.returncode == 0, more.stderr
    assert len(losses(run)) == 8


@pytest.mark.nightly
def test_a_layout_that_does_not_fit_leaves_nothing(arguments, tmp_path):
    done = torchrun(*arguments, "--layout", "replicas=3", "--steps", "2", "--run-dir", str(tmp_path / "run"))
    assert done.returncode != 0
    assert "layout replicas=3 has 3 ranks, torchrun started 2" in done.stderr
    assert "torchrun --nproc-per-node 3" in done.stderr
    assert not (tmp_path / "run").exists()
