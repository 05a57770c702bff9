"""What has joined a run lives on when its first machine is killed and resumed: it begins anew by itself."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import msgspec
import pytest

from shoal import checkpoint
from shoal.checkpoint import manifest
from shoal.cli.main import main
from shoal.errors import JobError
from shoal.job import parse, read_run, write
from shoal.launch import roles
from shoal.launch.server import START, TRIAL, Start
from shoal.observe import result
from shoal.observe.hold import hold
from shoal.sync.server import journal
from tests.training.server import runs
from tests.training.server.test_equality import QUIET, through_a_server
from tests.training.server.test_going_on import change
from tests.training.server.test_join import PLAIN, joining, ready_to_join
from tests.training.test_bad_input import NoRanks

# Seconds for a run to come so far, on a machine however busy.
_PATIENCE = 120.0


@pytest.mark.nightly
@pytest.mark.parametrize("codec", ["none", "int8"])
def test_parts_that_live_on_begin_anew_and_checkpoints_are_complete(ranks, tiny, tmp_path, codec):
    """Resumed as it was, the run goes on from journal and logs; with another codec, from its newest checkpoint."""
    folder, elsewhere = tmp_path / "run", ("server 1", "worker 1")
    options = {**QUIET, "checkpoint": {"every": 10}, "train": {"steps": 400, "validate_every": 1000}}
    job = through_a_server(tiny, folder, 2, options, elsewhere=elsewhere)
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(write(job))
    with joining(folder, elsewhere):
        leads = subprocess.Popen([sys.executable, "-m", "shoal.cli.main", "train", str(recipe)])
        try:
            until(lambda: leads.poll() is None and runs.steps(folder) >= 15 and runs.version(folder) > 0)
        finally:
            leads.kill()
            leads.wait()
        newest = checkpoint.newest(folder / "checkpoints", print)
        assert newest is not None
        first = manifest.read(newest).values["position"]
        if codec == "none":
            first = journal.decode((folder / "server/journal").read_bytes(), "journal")[0][0].watermark
        change(folder, "replicas=2", sync={"codec": codec}, train={"steps": runs.steps(folder) + 20})
        steps = runs.run(ranks, job, resume=True)["step"]
    assert runs.version(folder) == steps
    commits = runs.audit(folder, steps * 12, first)
    again = [commit for commit in commits if commit.version > steps - 20]
    assert {key.worker for commit in again for key in commit.keys} == {0, 1}, "both have worked"


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + _PATIENCE
    while True:
        try:
            if condition():
                return
        except (OSError, AssertionError):
            pass
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.fixture
def started(tiny, tmp_path, monkeypatch):
    """A run's folder; a later start of it, named and with other options; and who runs instead of processes."""
    job = through_a_server(tiny, tmp_path / "run", 2, {**QUIET, "train": PLAIN}, elsewhere=("server 1", "worker 1"))
    run = ready_to_join(job)
    first = msgspec.json.decode((run / "server" / START).read_bytes(), type=Start)
    monkeypatch.setattr("shoal.launch.join.Ranks", NoRanks)

    def resume(nonce: str, name: str = START, **tables: dict[str, Any]) -> None:
        changed = parse(first.job)
        for table, options in tables.items():
            changed = replace(changed, **{table: replace(getattr(changed, table), **options)})
        (run / "server" / START).unlink(missing_ok=True)
        (run / "server" / name).write_bytes(msgspec.json.encode(Start(write(changed), first.prepared, nonce)))

    def acts(act: Callable[..., None]) -> None:
        monkeypatch.setattr("shoal.launch.join.roles.run", lambda ranks, parts, **options: act(parts[0], **options))

    return run, resume, acts


def test_a_part_begins_anew_with_the_options_of_the_later_start(started, capsys):
    """Not before there is one: the folder may be away for a moment, or half of a file be there."""
    run, resume, acts = started
    told = []

    def act(part, superseded, **options):
        told.append((part.args["nonce"], parse(part.args["job"]).sync.codec))
        if len(told) == 2:
            return
        assert not superseded()
        text = (run / "server" / START).read_bytes()
        (run / "server" / START).write_bytes(text[:40])
        assert not superseded()
        (run / "server" / START).unlink()
        assert not superseded()
        resume("1", sync={"codec": "int8"})
        assert superseded()
        raise roles.Superseded

    acts(act)
    assert main(["join", str(run), "server 1"]) == 0
    assert told == [("0", "none"), ("1", "int8")]
    assert capsys.readouterr().out == "the run was resumed on its first machine: server 1 begins anew\n"


def test_a_part_takes_part_when_links_are_tried_by_the_later_start(started):
    run, resume, acts = started
    told = []

    def act(part, superseded, **options):
        told.append(part.entry.rpartition(".")[2])
        assert not superseded()
        if len(told) == 1:
            resume("1", TRIAL, sync={"codec": "auto"})
            assert superseded()
            raise roles.Superseded
        (run / "server" / TRIAL).unlink(missing_ok=True)
        resume("1")
        assert not superseded(), "training begins, in the same start"

    acts(act)
    assert main(["join", str(run), "worker 1"]) == 0
    assert told == ["work:main", "trial:take_part", "work:main"]


def test_a_part_that_the_later_start_does_not_name_is_told_so(started, capsys):
    run, resume, acts = started

    def act(part, **options):
        resume("1", server={"elsewhere": ("server 1",)})
        raise roles.Superseded

    acts(act)
    assert main(["join", str(run), "worker 1"]) == 2
    assert "this run has no part 'worker 1' for another machine" in capsys.readouterr().err


def test_a_part_that_nobody_tells_that_the_run_is_over_finds_out(started, capsys, monkeypatch):
    """Not while somebody is at work on it, nor of a run that was killed, which has no result."""
    run, _, acts = started
    monkeypatch.setattr("shoal.launch.join._LEFT", 0.0)

    def act(part, superseded, **options):
        assert not superseded(), "a run that was killed"
        steps = read_run(run).train.steps
        for done, over in ((steps - 1, False), (steps, True)):
            result.write(run, result.Result(str(run), done, 0, None, None, None, None, None, None, 0.0))
            with hold(run):
                assert not superseded(), "somebody is at work on it"
            superseded()
            time.sleep(0.01)
            assert superseded() == over
        raise roles.Superseded

    acts(act)
    assert main(["join", str(run), "worker 1"]) == 0
    assert capsys.readouterr().out == "the run is over: worker 1 ends\n"


def test_what_fails_in_a_start_that_is_over_is_no_error(started, capsys):
    run, resume, acts = started
    told = []

    def act(part, **options):
        told.append(part.args["nonce"])
        if len(told) == 1:
            resume("1")
        raise JobError(f"no. {len(told)}")

    acts(act)
    assert main(["join", str(run), "server 1"]) == 2
    assert told == ["0", "1"]
    assert "no. 2" in capsys.readouterr().err
