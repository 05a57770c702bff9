"""`torchrun … -m shoal.cli.main train …` trains what `shoal train` trains on its own ranks."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys

import pytest

from shoal import checkpoint
from shoal.observe import result
from tests.launch.test_torchrun import documented
from tests.training.test_resume import losses, until


def command() -> list[str]:
    options, _ = documented()
    return [sys.executable, *["-m", "torch.distributed.run", "--nproc-per-node", "2"], *options, "-m", "shoal.cli.main"]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", **documented()[1]}


def torchrun(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*command(), *words], env=environment(), capture_output=True, text=True, timeout=100)


def test_same_losses_as_local_ranks(arguments, train, tiny, tmp_path):
    run, local = tmp_path / "run", tmp_path / "local"
    done = torchrun(*arguments, "--steps", "3", "--format", "json", "--run-dir", str(run))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["run"] == str(run)
    assert {"model", "report.html", "result.json"} <= {path.name for path in run.iterdir()}
    train(tiny(local, "replicas=2", train={"steps": 3}))
    assert losses(run) == losses(local)


@pytest.mark.nightly
def test_goes_on(arguments, tmp_path):
    run = tmp_path / "run"
    first = torchrun(*arguments, "--steps", "2", "--run-dir", str(run))
    assert first.returncode == 0, first.stderr
    more = torchrun("train", "--resume", str(run), "--steps", "4")
    assert more.returncode == 0, more.stderr
    assert len(losses(run)) == 4


@pytest.mark.nightly
def test_a_signal_to_torchrun_saves(arguments, tmp_path):
    """torchrun passes it on to its workers and waits for them."""
    run = tmp_path / "run"
    process = subprocess.Popen(
        [*command(), *arguments, "--steps", "100000", "--run-dir", str(run)],
        env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    until(lambda: len(losses(run)) > 3, process)
    process.send_signal(signal.SIGTERM)
    text, _ = process.communicate(timeout=100)
    assert process.returncode != 0
    assert f"shoal train --resume {run}" in text
    newest = checkpoint.newest(run / "checkpoints", print)
    assert newest is not None
    assert newest.name == f"step-{len(losses(run)):08}", "nothing was lost"
    done = result.read(run)
    assert done is not None
    assert done.stopped_by == "SIGTERM"


@pytest.mark.nightly
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on CPU")
def test_ctrl_c_before_the_first_step_ends_all(arguments, tmp_path):
    """A terminal sends it to torchrun and its workers alike, here while they measure whether compiling pays."""
    run = tmp_path / "run"
    words = ["--minutes", "5", "--train.precision", "auto", "--train.compile", "auto"]
    process = subprocess.Popen(
        [*command(), *[w for w in arguments if w not in ("--train.compile", "off")], *words, "--run-dir", str(run)],
        env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip
    log = run / "log.txt"
    until(lambda: log.exists() and "precision fp32" in log.read_text(), process)
    os.killpg(process.pid, signal.SIGINT)
    process.communicate(timeout=60)  # nobody holds its output any more: torchrun and workers have ended
    assert process.returncode != 0
    assert not losses(run)
    assert not (run / "result.json").exists()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        # Found by every rank for itself before it has a seat, ...
        (["--train.stepz", "3"], "error: unknown option --train.stepz\n  → did you mean --train.steps?\n"),
        # ... and by rank 0 for all.
        pytest.param(
            ["--layout", "replicas=3"],
            "error: layout replicas=3 has 3 ranks, torchrun started 2\n"
            "  → torchrun --nproc-per-node 3, or layout replicas=2\n",
            marks=pytest.mark.nightly,
        ),
        pytest.param(
            ["--sync", "server"],
            "error: a job with sync.name=server is not one of torchrun's\n"
            "  → shoal train without torchrun: it starts coordinator, servers and workers, on this machine\n",
            marks=pytest.mark.nightly,
        ),
        pytest.param(
            ["--data", "/nowhere.txt"],
            "error: /nowhere.txt: no such file or folder\n  → check the path, from the working directory\n",
            marks=pytest.mark.nightly,
        ),
        pytest.param(
            ["--train.global-batch", "3"],
            "error: train.global_batch=3 is not divisible by the 2 workers of layout replicas=2\n"
            "  → layout replicas=1 would do; or take train.global_batch=2 or 4, "
            "or a number of workers that divides 3\n",
            marks=pytest.mark.nightly,
        ),
    ],
    ids=["option", "layout", "server", "data", "batch"],
)
def test_a_mistake_is_said_once_and_leaves_nothing(arguments, tmp_path, words, sentence):
    done = torchrun(*arguments, "--steps", "2", "--run-dir", str(tmp_path / "run"), *words)
    assert done.returncode != 0
    assert done.stderr.count("error: ") == done.stderr.count(sentence) == 1, done.stderr
    assert sentence.removeprefix("error: ") in done.stderr.rpartition("Root Cause")[2]
    assert "shoal/" not in done.stderr, "a traceback of ours"
    # One of them is ended by torchrun where it has not yet found the mistake.
    codes = re.findall(r"exitcode  : (-?\d+) ", done.stderr)
    assert codes[-1] == "2"
    assert set(codes) <= {"2", "-15"}
    assert not (tmp_path / "run").exists()
