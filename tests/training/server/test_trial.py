"""What a trial of links takes from the job, and when there is one."""

from __future__ import annotations

import time
from dataclasses import replace

import msgspec
import pytest

from shoal.job import parse, write
from shoal.launch import join, server
from shoal.launch.train import ready
from shoal.models.spec import count
from shoal.training.server import trial


@pytest.mark.parametrize(
    ("layout", "mode", "times"),
    [
        ("replicas=3", "bsp", 1), ("replicas=3", "quorum", 1), ("replicas=3", "asp", 3), ("replicas=2", "ssp", 2),
        ("replicas=2,fsdp=2", "bsp", 2), ("replicas=2,tensor=2", "asp", 4), ("replicas=2,pipeline=2", "bsp", 1),
    ],
)  # fmt: skip
def test_a_worker_pulls_the_steps_of_all_whose_pushes_are_updates(tiny, tmp_path, layout, mode, times):
    job = tiny(tmp_path / "run", layout, sync={"name": "server"}, server={"mode": mode})
    assert trial.times(job) == times


def test_each_shard_exchanges_what_it_holds(tiny, tmp_path):
    job = ready(tiny(tmp_path / "run", "replicas=1", sync={"name": "server"}, server={"shards": 3}), None, time.time())[
        0
    ]
    found = trial.held(job)
    assert sum(found) == count(job.model)
    assert len(found) == 3
    assert max(found) < 2 * min(found)


class Stopped(Exception):
    """The run has begun, and that is enough."""


def test_links_are_tried_once_and_before_anything_is_kept(tiny, tmp_path, monkeypatch):
    """All parts are in the trial, those of other machines by its file. A run that goes on with what was chosen has no
    other."""
    run, told = tmp_path / "run", []
    elsewhere = ("worker 1", "server 1")
    given = tiny(
        run, "replicas=2,fsdp=2", sync={"name": "server", "codec": "auto"},
        server={"shards": 2, "elsewhere": elsewhere}, train={"steps": 3, "validate_every": 5}, checkpoint={"every": 5},
    )  # fmt: skip
    job, arguments = ready(given, None, time.time())

    def roles_run(ranks, parts, **options):
        names = [part.name for part in parts]
        told.append((parts[0].entry.rpartition(".")[2], names))
        if ".trial:" not in parts[0].entry:
            start = msgspec.json.decode((run / "server/start.json").read_bytes(), type=server.Start)
            assert parse(start.job).sync.codec == "int8"
            assert join._begun(run, start.nonce) == start
            raise Stopped
        assert {part.ranks for part in parts} == {1}
        start = msgspec.json.decode((run / "server/trial.json").read_bytes(), type=server.Start)
        assert parse(start.job).sync.codec == "auto"
        assert join._begun(run, "") == start
        assert join._begun(run, start.nonce) is None, "who has tried waits for the run"
        return "int8"

    def begin(entry, args, *rest, **options):
        told.append((entry.rpartition(".")[2], parse(args["job"]).sync.codec))
        assert not (run / "server/trial.json").exists()

    monkeypatch.setattr(server.roles, "run", roles_run)
    monkeypatch.setattr(server.local, "run", begin)
    said: list[str] = []
    with pytest.raises(Stopped):
        server.run(job, arguments, None, said.append, print)
    at_work = ("coordinate:main", ["coordinator", "server 0", "worker 0"])
    tried = ("trial:lead", ["coordinator", "server 0", "worker 0"])
    assert told == [("begin:check", "auto"), tried, ("begin:main", "int8"), at_work]
    assert said == [f"to be started elsewhere: shoal join {run} '{part}'" for part in elsewhere]
    told.clear()
    going_on = replace(job, sync=replace(job.sync, codec="int8"))
    with pytest.raises(Stopped):
        server.run(going_on, {**arguments, "job": write(going_on)}, None, said.append, print)
    assert told == [("begin:main", "int8"), at_work]


def test_of_a_shard_with_copies_one_takes_part(tiny, tmp_path, monkeypatch):
    """Workers talk to one at a time, and copies are on the first machine."""
    given = tiny(
        tmp_path / "run", "replicas=2", sync={"name": "server", "codec": "auto"},
        server={"copies": 2, "elsewhere": ("worker 1",)}, train={"steps": 3, "validate_every": 5},
        checkpoint={"every": 5},
    )  # fmt: skip
    job, arguments = ready(given, None, time.time())
    told = []

    def roles_run(ranks, parts, **options):
        told.extend((part.name, part.args.get("part")) for part in parts)
        raise Stopped

    monkeypatch.setattr(server.roles, "run", roles_run)
    with pytest.raises(Stopped):
        server.run(job, arguments, None, print, print)
    assert told == [("coordinator", None), ("server 0 copy 0", "server 0"), ("worker 0", "worker 0")]
    assert not (tmp_path / "run/server/trial.json").exists()
