"""What a trial of links takes from the job, and when there is one."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from shoal.errors import JobError
from shoal.job import parse, write
from shoal.launch import join, server
from shoal.launch.train import ready
from shoal.models.spec import count
from shoal.sync.server.messages import COORDINATOR
from shoal.sync.server.node.book import Book
from shoal.sync.server.wire import Listener
from shoal.training.server import elsewhere as parts_elsewhere
from shoal.training.server import trial
from tests.sync.server.peers import TRUSTED, eventually, in_thread

# Seconds for anything that must come to an end.
PATIENCE = 60.0


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


def test_the_lead_says_for_whom_it_waits_and_whom_it_refused(tiny, tmp_path, monkeypatch, capsys):
    """Its parts are threads of this process. The last one comes with another token at first."""
    monkeypatch.setattr(parts_elsewhere, "_SOON", 0.0)
    run, said = tmp_path / "run", ""
    given = tiny(
        run, "replicas=2", sync={"name": "server", "codec": "auto"}, server={"elsewhere": ("worker 1",)},
        train={"steps": 3, "validate_every": 5}, checkpoint={"every": 5},
    )  # fmt: skip
    found = ready(given, None, time.time())[0]
    (tmp_path / "other.token").write_text("another token of 16 bytes")
    job, other = write(found), replace(found, server=replace(found.server, token=str(tmp_path / "other.token")))
    until = run / "server/trial.json"
    until.parent.mkdir(parents=True)
    until.touch()
    told = {"folder": str(run), "job": job, "host": "127.0.0.1", "until": str(until), "life": 0}

    def heard(text: str) -> bool:
        nonlocal said
        said += capsys.readouterr().out
        return text in said

    with contextlib.ExitStack() as ending:
        codec = ending.enter_context(in_thread(lambda: trial.lead(None, folder=str(run), job=job, life=0)))
        for part in ("server 0", "worker 0"):
            ending.enter_context(in_thread(lambda part=part: trial.take_part(None, part=part, **told)))
        assert eventually(lambda: heard(f"waits for worker 1: shoal join {run} 'worker 1'"), PATIENCE)
        with pytest.raises(JobError, match="refuses this side's job token") as caught:
            trial.take_part(None, part="worker 1", **{**told, "job": write(other)})
        assert caught.value.fix == "give both sides the same token"
        assert caught.value.exit_code == 2
        assert eventually(lambda: heard("refused: 127.0.0.1:"), PATIENCE)
        assert heard("does not know the job token; give both sides the same token")
        trial.take_part(None, part="worker 1", **told)
        assert codec.get(timeout=PATIENCE) in ("none", "int8", "bf16")
    assert heard("worker 1 has come")
    assert "refused: 127.0.0.1:" in (run / "log.txt").read_text()


@contextlib.contextmanager
def shut() -> Iterator[tuple[str, int]]:
    """Where somebody listens who ends each connection, as one with TLS does where this side has none."""
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as server:

        def main() -> None:
            with contextlib.suppress(OSError):
                while True:
                    server.accept()[0].close()

        threading.Thread(target=main, daemon=True).start()
        yield server.getsockname()
        server.shutdown(socket.SHUT_RDWR)


def waiting(run: Path) -> Path:
    """The file of a trial that goes on."""
    until = run / "trial.json"
    until.touch()
    return until


def test_a_part_that_is_not_let_in_is_told_of_tls(tmp_path, monkeypatch):
    monkeypatch.setattr(trial, "_SHUT", 0.5)
    with shut() as address:
        Book(tmp_path).enter(COORDINATOR, *address)
        with pytest.raises(JobError, match=r"the coordinator does not let worker 1 in: .*both use TLS") as caught:
            trial._reach(tmp_path, TRUSTED, "worker 1", waiting(tmp_path))
    assert "TLS files" in caught.value.fix


def test_a_lead_that_was_just_ending_is_found_again(tmp_path):
    """Started anew elsewhere, after it had let nobody in."""
    with shut() as before, Listener(lambda _: None, credentials=TRUSTED) as after:
        Book(tmp_path).enter(COORDINATOR, *before)
        with in_thread(lambda: trial._reach(tmp_path, TRUSTED, "worker 1", waiting(tmp_path))) as reached:
            time.sleep(0.5)
            Book(tmp_path).enter(COORDINATOR, *after.address)
            with reached.get(timeout=PATIENCE) as connection:
                assert connection.name == "worker 1"
