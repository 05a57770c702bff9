"""Machines of one run that differ: paths, devices, threads, micro-batches."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from shoal.cli.main import main
from shoal.errors import JobError
from shoal.job import Layout, parse, write
from shoal.job.machine import MachineOptions
from shoal.launch import cores, join, server
from shoal.launch.roles import Role
from shoal.launch.server import Start
from shoal.mesh import Seat
from shoal.training.server import work
from tests.training.server import runs
from tests.training.server.test_equality import QUIET, far, through_a_server
from tests.training.server.test_join import ready_to_join
from tests.training.test_bad_input import NoRanks

TOKEN = "a token of 16 bytes or more"
# In every Python of a machine: files below a folder that is another machine's are not there.
HIDES = """
import os, sys

def hides(event, args):
    if event == "open" and not isinstance(args[0], int) and os.path.abspath(os.fspath(args[0])).startswith({hidden!r}):
        raise FileNotFoundError(2, "No such file or directory (of another machine)", args[0])

sys.addaudithook(hides)
"""


def machine(home: Path, hidden: Path) -> dict[str, Any]:
    """How a process is started that works in one folder and does not see another one, under that name."""
    (home / "python").mkdir()
    (home / "python/sitecustomize.py").write_text(HIDES.format(hidden=f"{hidden}{os.sep}"))
    path = os.pathsep.join([str(home / "python"), *(entry or os.getcwd() for entry in sys.path)])
    return {"cwd": home, "env": {**os.environ, "PYTHONPATH": path, "HOME": str(home)}}


def test_with_paths_and_micro_batches_of_its_own_a_machine_computes_the_same(ranks, train, tiny, tmp_path):
    """Of the first machine's folders it sees the run's, elsewhere, and copies of the others. In float64, as one
    process; its 6 sequences are computed 4 and 2 at a time."""
    one, first, second = (tmp_path / name for name in ("one", "first", "second"))
    options: dict[str, Any] = {**QUIET, "train": {"steps": 6, "validate_every": 1000, "precision": "fp64"}}
    train(tiny(one, "replicas=1", **options))
    for folder in (first / "shared", second):
        folder.mkdir(parents=True)
    for name in ("shared", "cache"):
        (second / name).symlink_to(first / name)
    for folder in (first, second):
        (folder / "job.token").write_text(TOKEN)
    run, options["data"] = first / "shared/run", {**options["data"], "cache": str(first / "cache")}
    named = {"elsewhere": ("worker 1",), "token": str(first / "job.token")}
    own = ["--data", "cache", "--token", "job.token", "--micro-batch", "4", "--threads", "1"]
    command = [sys.executable, "-m", "shoal.cli.main", "join", "shared/run", "worker 1", *own]
    other = subprocess.Popen(command, **machine(second, first))
    try:
        assert runs.run(ranks, through_a_server(tiny, run, 2, options, **named))["step"] == 6
        assert other.wait(60) == 0
    finally:
        other.kill()
        other.wait()
    assert max(far(run, one)) < 1e-8
    assert [len(commit.keys) for commit in runs.audit(run, 6 * 12)] == [2] * 6


class Stopped(Exception):
    """It has been told what was to be seen."""


def test_a_worker_cuts_its_samples_as_its_machine_says(tiny, tmp_path, monkeypatch):
    job, told = through_a_server(tiny, tmp_path / "run", 2, QUIET), list[Layout]()

    def build(layout: Layout, *_: Any, **__: Any) -> None:
        told.append(layout)
        raise Stopped

    monkeypatch.setattr(work.mesh, "build", build)
    for own in (4, 0):
        with pytest.raises(Stopped):
            work.main(
                Seat(0, 1, 0, 1, None), folder="", job=write(job), prepared="", nonce="", number=1, life=0,
                micro_batch=own,
            )  # fmt: skip
    assert [layout.micro_batch for layout in told] == [4, job.layout.micro_batch]
    assert {layout.replicas for layout in told} == {1}


@pytest.mark.parametrize(
    ("layout", "elsewhere", "seats", "there"),
    [
        ("replicas=3", ("worker 1",), {0: (0, 2, 4), 2: (1, 2, 4)}, (0, 1, 8)),
        ("replicas=4,fsdp=2", ("worker 2", "worker 3"), {0: (0, 4, 2), 1: (2, 4, 2)}, (0, 2, 4)),
        ("replicas=4,fsdp=2", ("worker 0",), {1: (0, 6, 1), 2: (2, 6, 1), 3: (4, 6, 1)}, (0, 2, 4)),
        ("replicas=2", ("worker 0", "worker 1"), {}, (0, 1, 8)),
    ],
)
def test_workers_share_the_devices_and_the_cores_of_their_own_machine(
    tiny, tmp_path, monkeypatch, layout, elsewhere, seats, there
):
    """(first of its ranks on its machine, ranks there, threads of each), by worker; there: of one that has joined."""
    monkeypatch.setattr(cores, "cores", lambda: 8)
    sync, options = {"name": "server"}, {"shards": 2, "mode": "asp", "elsewhere": (*elsewhere, "server 1")}
    job = tiny(tmp_path / "run", layout, sync=sync, server=options, train={"global_batch": 24})
    folder = ready_to_join(replace(job, run=replace(job.run, threads=0)))
    start = join._begun(folder, "")
    assert start is not None
    parts = server._roles(parse(start.job), str(folder), start)
    names = [*(f"worker {number}" for number in seats), "server 0"]
    assert sorted(part.name for part in parts) == sorted(names), "others are started elsewhere"
    assert {part.args["number"]: _seat(part) for part in parts if "worker" in part.name} == seats
    for name in elsewhere:
        part = join._part(folder, name, MachineOptions(), start)
        assert (part.name, part.args["number"], part.ranks) == (name, int(name[-1]), parse(start.job).layout.fsdp)
        assert _seat(part) == there
        own = join._part(folder, name, MachineOptions(threads=3, micro_batch=2), start)
        assert _seat(own) == (*there[:2], 3)
        assert (part.args["micro_batch"], own.args["micro_batch"]) == (0, 2)
        with pytest.raises(JobError, match="--threads"):
            join._part(folder, name, MachineOptions(threads=-1), start)


def _seat(part: Role) -> tuple[int, int, int]:
    return part.first, part.neighbours, part.threads


@pytest.mark.parametrize(
    ("part", "words", "what", "fix"),
    [
        (
            "worker 1",
            ["--token", "other.token"],
            "cannot read server.token={home}/other.token: No such",
            "--token FILE",
        ),
        ("worker 1", [], "cannot read server.token={first}/job.token: No such", "copy the first machine's file"),
        ("worker 1", ["--key", "my.key"], "--key in a run that was begun without server.key", "--server.key"),
        ("worker 1", ["--data", "empty"], "does not have the run's prepared text", "--data.cache"),
        ("worker 1", ["--data", "other"], "this is another text than the one that the run trains on", "a copy of it"),
        ("worker 1", ["--micro-batch", "-1"], "--micro-batch=-1 is less than 0", "0 or more"),
        ("worker 1", ["--micro-batch", "2"], "--micro-batch 2 with pipeline=2", "of all workers"),
        ("worker 1", ["--threads", "5000"], "run.threads=5000 is more than 1024", "cores"),
        ("server 0", ["--data", "empty"], "--data has no effect with server 0", "leave it out"),
        ("server 0", ["--micro-batch", "2"], "--micro-batch has no effect with server 0", "leave it out"),
        ("server 0", ["--threads", "2"], "--threads has no effect with server 0", "leave it out"),
        ("worker 1", ["--host", "127.0.0.1"], "--host has no effect with worker 1: it is of servers", "leave it out"),
    ],
)
def test_what_a_machine_lacks_or_has_in_vain_is_said_before_it_takes_part(
    tiny, tmp_path, monkeypatch, capsys, part, words, what, fix
):
    first, home = tmp_path / "first", tmp_path / "home"
    for folder in (first, home, home / "empty"):
        folder.mkdir()
    token, layout = first / "job.token", "replicas=2,pipeline=2" if "pipeline" in what else "replicas=2"
    token.write_text(TOKEN)
    server = {"elsewhere": ("worker 1", "server 0"), "token": str(token)}
    run = ready_to_join(tiny(first / "run", layout, sync={"name": "server"}, server=server))
    if not words:
        token.unlink()
    if words[-1:] == ["other"]:
        start = join._begun(run, "")
        assert start is not None
        shutil.copytree(start.prepared, home / "other")
        meta = home / "other/meta.json"
        meta.write_text(meta.read_text().replace(Path(start.prepared).name, "0" * 20))
    monkeypatch.setattr(join, "Ranks", NoRanks)
    monkeypatch.setattr(join.roles, "run", lambda *_, **__: pytest.fail("it takes part"))
    monkeypatch.chdir(home)
    assert main(["join", str(run), part, *words]) == 2
    said = capsys.readouterr().err
    assert what.format(home=home, first=first) in said
    assert fix in said
    assert "Traceback" not in said


def test_files_of_its_own_take_the_place_of_the_first_machine_s(tiny, tmp_path, monkeypatch):
    """Also the folder of prepared text itself, as of a growing store."""
    monkeypatch.chdir(tmp_path)
    for name in ("token", "certificate", "key", "authority", "mine"):
        (tmp_path / name).write_text(TOKEN)
    named = {name: str(tmp_path / name) for name in ("token", "certificate", "key", "authority")}
    job = tiny(
        tmp_path / "run", "replicas=2", sync={"name": "server"},
        server={"elsewhere": ("worker 1", "server 0"), "host": "127.0.0.1", **named},
    )  # fmt: skip
    monkeypatch.setattr("shoal.launch.train.server.check", lambda job: None)
    run = ready_to_join(job)
    start = join._begun(run, "")
    assert isinstance(start, Start)
    for name, path in named.items():
        (tmp_path / name).unlink()
        part = join._part(run, "server 0", MachineOptions(**{name: "mine"}, host="127.0.0.2"), start)
        told = parse(part.args["job"]).server
        assert {key: getattr(told, key) for key in named} == {**named, name: str(tmp_path / "mine")}
        assert part.args["host"] == "127.0.0.2"
        Path(path).write_text(TOKEN)
    (tmp_path / "copy").symlink_to(start.prepared)
    part = join._part(run, "worker 1", MachineOptions(data="copy"), start)
    assert part.args["prepared"] == str(tmp_path / "copy")
