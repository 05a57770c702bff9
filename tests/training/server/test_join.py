"""Parts of a run that are started by themselves, as on another machine."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec
import pytest

from shoal.cli.main import main
from shoal.errors import JobError
from shoal.job import Job, read, write
from shoal.launch import join
from shoal.launch.server import Start
from shoal.launch.train import ready
from shoal.observe import files, result
from shoal.observe.hold import attend
from shoal.sync.choose import CODECS
from shoal.sync.server.messages import NOTHING
from tests.training.server import runs
from tests.training.server.test_equality import QUIET, through_a_server
from tests.training.server.test_going_on import change
from tests.training.test_bad_input import NoRanks

PLAIN = {"steps": 12, "validate_every": 1000}


def ready_to_join(job: Job) -> Path:
    """As if its first machine had started it. Its folder."""
    job, told = ready(job, None, time.time())
    run = Path(told["folder"])
    (run / "server").mkdir()
    (run / "server/start.json").write_bytes(msgspec.json.encode(Start(write(job), told["prepared"], "0")))
    return run


@contextlib.contextmanager
def joining(folder: Path, parts: Sequence[str]) -> Iterator[None]:
    """Meanwhile these parts are at work, and then they end well."""
    command = [sys.executable, "-m", "shoal.cli.main", "join", str(folder)]
    others = [subprocess.Popen([*command, part]) for part in parts]
    try:
        yield
        assert [other.wait(60) for other in others] == [0] * len(others)
    finally:
        for other in others:
            other.kill()
            other.wait()


def test_a_worker_and_a_server_join_and_end_with_the_run(ranks, tiny, tmp_path):
    """Which codec they use is tried with them, before there is a run."""
    folder, elsewhere = tmp_path / "run", ("worker 1", "server 1")
    job = tiny(
        folder, "replicas=2", sync={"name": "server", "codec": "auto"},
        server={"shards": 2, "mode": "asp", "elsewhere": elsewhere}, **{**QUIET, "train": PLAIN},
    )  # fmt: skip
    said: list[str] = []
    with joining(folder, elsewhere):
        figures = runs.run(ranks, job, said=said)
    assert figures["step"] == 12
    assert said.count(f"to be started elsewhere: shoal join {folder} 'worker 1'") == 1
    commits = runs.audit(folder, 12 * 12)
    assert {key.worker for commit in commits for key in commit.keys} == {0, 1}, "both have worked"
    log = (folder / "log.txt").read_text()
    assert [log.count(f"{part} has come") for part in elsewhere] == [2, 2], "to the trial, and to the run"
    codec = read(folder / "job.toml").sync.codec
    assert tries(folder) == [codec]
    assert codec in ("none", *CODECS)


def tries(folder: Path) -> list[str]:
    """What was chosen, each time that links were tried."""
    return re.findall(r"codec (\S+): a push and a pull of all workers at a time", (folder / "log.txt").read_text())


@pytest.mark.nightly
def test_links_are_tried_again_where_a_part_is_killed_and_not_when_the_run_goes_on(ranks, tiny, tmp_path, monkeypatch):
    """The lead is killed while it waits for the others, and so is a worker."""
    folder, elsewhere, said = tmp_path / "run", ("worker 1",), []
    train = {"steps": 6, "validate_every": 1000}
    job = tiny(
        folder, "replicas=2", sync={"name": "server", "codec": "auto"},
        server={"shards": 1, "elsewhere": elsewhere}, **{**QUIET, "train": train},
    )  # fmt: skip

    def kill() -> None:
        for name in ("shoal-coordinat", "shoal-worker0"):
            while not (found := runs.pids(name)):
                time.sleep(0.01)
            os.kill(found[0], signal.SIGKILL)

    killing = threading.Thread(target=kill, daemon=True)
    killing.start()
    with joining(folder, elsewhere):
        runs.run(ranks, job, said=said)
    killing.join()
    chosen = tries(folder)
    assert len(chosen) == 1
    assert sum("started again" in line for line in said) == 2
    change(folder, "replicas=2", train={"steps": 9})
    with joining(folder, elsewhere):
        assert runs.run(ranks, job, resume=True, said=said)["step"] == 9
    assert tries(folder) == chosen
    assert read(folder / "job.toml").sync.codec == chosen[0]


@pytest.mark.nightly
def test_a_worker_that_joined_leaves_with_all_that_it_owes_and_the_others_go_on(ranks, tiny, tmp_path):
    folder, said = tmp_path / "run", []
    options = {**QUIET, "train": {"steps": 40, "validate_every": 1000}}
    sync = {"name": "server", "codec": "topk:0.1+int2"}
    server = {"shards": 2, "mode": "asp", "elsewhere": ("worker 1",)}
    job = tiny(folder, "replicas=2", sync=sync, server=server, **options)
    other = subprocess.Popen([sys.executable, "-m", "shoal.cli.main", "join", str(folder), "worker 1"])

    def leave() -> None:
        while other.poll() is None and runs.steps(folder) < 3:
            time.sleep(0.05)
        other.send_signal(signal.SIGTERM)

    try:
        asking = threading.Thread(target=leave)
        asking.start()
        assert runs.run(ranks, job, said=said)["step"] == 40
        asking.join()
        assert other.wait(60) == 0
    finally:
        other.kill()
        other.wait()
    commits = runs.audit(folder, 40 * 12)
    (rest,) = [commit for commit in commits if commit.keys[0].worker == 1 and commit.samples == (NOTHING,)]
    last = max(key.clock for commit in commits for key in commit.keys if key.worker == 1)
    assert rest.keys[0].clock == last > 3
    assert rest.version < len(commits) - 10, "others go on"
    assert "worker 1 has left" in (folder / "log.txt").read_text()


def test_who_cannot_join_is_told_why(tiny, tmp_path, capsys):
    assert main(["join", str(tmp_path), "worker 1", "--wait", "0.2"]) == 2
    assert "no run with a parameter server goes on here, nor has one begun within 0.2 s" in capsys.readouterr().err
    assert main(["join", str(tmp_path)]) == 2
    assert "a run and a part of it are to be named" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "steps", "what", "fix"),
    [
        ({"sync": {"name": "server"}}, 12, "this run is over: it has trained its 12 steps", "--steps 24"),
        ({}, 5, "this run has no parameter server: its sync is allreduce", "--sync server"),
    ],
)
def test_a_run_that_cannot_be_joined_is_not_waited_for(tiny, tmp_path, capsys, options, steps, what, fix):
    run = ended(tiny(tmp_path / "run", "replicas=2", **{**QUIET, "train": PLAIN}, **options), steps)
    assert main(["join", str(run), "worker 1", "--wait", "600"]) == 2
    error = capsys.readouterr().err
    assert what in error
    assert fix in error


def test_a_run_that_may_go_on_is_waited_for_and_named_in_the_end(tiny, tmp_path, capsys):
    """Stopped before its last step; or over, while somebody is at work on it, who may be giving it more."""
    stopped = ended(tiny(tmp_path / "a", "replicas=2", sync={"name": "server"}, **{**QUIET, "train": PLAIN}), 5)
    assert main(["join", str(stopped), "worker 1", "--wait", "0.2"]) == 2
    assert f"shoal train --resume {stopped}" in capsys.readouterr().err
    over = ended(tiny(tmp_path / "b", "replicas=2", sync={"name": "server"}, **{**QUIET, "train": PLAIN}), 12)
    with attend(over):
        assert join._can_begin(over) is None
    with pytest.raises(JobError, match="is over"):
        join._can_begin(over)


def ended(job: Job, steps: int) -> Path:
    """The folder of a run that has trained so many steps, and is not at work."""
    run = Path(ready(job, None, time.time())[1]["folder"])
    result.write(run, result.Result(str(run), steps, 0, None, None, None, None, None, None, 0.0))
    return run


def test_after_the_trial_of_links_the_run_is_waited_for_while_its_first_machine_is_there(tiny, tmp_path, capsys):
    job = through_a_server(tiny, tmp_path / "run", 2, {**QUIET, "train": PLAIN}, elsewhere=("worker 1",))
    run = ready_to_join(job)
    start = (run / "server/start.json").read_bytes()
    (run / "server/start.json").unlink()
    begins = threading.Timer(1.5, files.replace, (run / "server/start.json", start))
    with attend(run):
        begins.start()
        assert join._wait(run, 0.2, "an earlier start").nonce == "0"
    begins.join()
    assert capsys.readouterr().out.splitlines()[-1] == "links were tried; waits for training to begin"
    (run / "server/start.json").unlink()
    with pytest.raises(JobError, match="nor has one begun"):
        join._wait(run, 0.2, "an earlier start")


def test_a_server_needs_an_address_of_its_own_machine(tiny, tmp_path, capsys):
    """By default that of the first machine."""
    job = through_a_server(tiny, tmp_path / "run", 2, {**QUIET, "train": PLAIN}, elsewhere=("server 0",))
    ready_to_join(job)
    assert main(["join", str(tmp_path / "run"), "server 0", "--host", "192.0.2.1"]) == 2
    error = capsys.readouterr().err
    assert "--host=192.0.2.1: this machine cannot listen there" in error
    assert "Traceback" not in error


def test_a_part_is_taken_once(tiny, tmp_path, capsys, monkeypatch):
    """Two of a kind would fence each other for ever."""
    job = through_a_server(tiny, tmp_path / "run", 2, {**QUIET, "train": PLAIN}, elsewhere=("worker 0", "worker 1"))
    ready_to_join(job)
    monkeypatch.setattr("shoal.launch.join.Ranks", NoRanks)
    told = []

    def run(ranks, parts, **options):
        told.append(parts[0].name)
        if told == ["worker 1"]:
            assert main(["join", str(tmp_path / "run"), "worker 1"]) == 2
            assert main(["join", str(tmp_path / "run"), "worker 0"]) == 0

    monkeypatch.setattr("shoal.launch.join.roles.run", run)
    assert main(["join", str(tmp_path / "run"), "worker 1"]) == 0
    assert "run: another process is worker 1 of this run" in capsys.readouterr().err
    assert main(["join", str(tmp_path / "run"), "worker 1"]) == 0
    assert told == ["worker 1", "worker 0", "worker 1"]
