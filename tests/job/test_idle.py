"""Options that another sync or mode would look at: refused where they have no effect, forgotten where a run goes on."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest

from shoal.errors import JobError
from shoal.job import Job, Layout
from shoal.job.idle import OF_MODE, OF_SYNC, idle_here, without_idle
from shoal.job.run import RunOptions
from shoal.job.server import MODES, ServerOptions
from shoal.job.sync import SyncOptions
from shoal.job.train import TrainOptions

SYNCS = ("allreduce", "local", "gossip", "server")
# Of every option a value that some sync or mode takes.
SYNC = {
    "every": 20, "outer_lr": 0.5, "outer_momentum": 0.3, "pull": 0.1, "fragments": 2, "delay": 1, "mix": 0.5,
    "together": 5, "pace": "2+1",
}  # fmt: skip
SERVER = {
    "staleness": 3, "max_staleness": 6, "quorum": 2, "grace": 0.5, "compensation": "rate", "strength": 2.0,
}  # fmt: skip


def refused(job: Job) -> str:
    try:
        job.validate()
    except JobError as error:
        return f"{error.what} → {error.fix}"
    return ""


@pytest.mark.parametrize("option", SYNC)
@pytest.mark.parametrize("name", SYNCS)
def test_an_option_of_another_sync_is_refused_and_its_own_is_not(name: str, option: str):
    server = ServerOptions(local_steps=2) if name == "server" else ServerOptions()
    found = refused(Job(sync=SyncOptions(name=name, **{option: SYNC[option]}), server=server))
    if name in OF_SYNC[option]:
        assert not found
    else:
        assert f"sync.{option}" in found
        assert name in found


@pytest.mark.parametrize(
    ("sync", "replicas", "steps", "said"),
    [
        (SyncOptions(), 1, 10, ""),
        (SyncOptions(codec="int8"), 1, 10, "sync.codec=int8 does nothing here"),
        (SyncOptions(codec="int8"), 2, 10, ""),
        (SyncOptions(codec="auto"), 1, 10, ""),
        (SyncOptions(name="gossip"), 1, 100, "sync.name=gossip does nothing here"),
        (SyncOptions(name="local"), 1, 100, "one outer step"),
        (SyncOptions(name="local"), 2, 49, "replicas do not meet before the end, after 49 steps"),
        (SyncOptions(name="gossip", every=8), 2, 7, "replicas do not meet before the end"),
        (SyncOptions(name="local"), 2, 50, ""),
        (SyncOptions(name="local"), 2, 0, ""),
        (SyncOptions(name="server"), 1, 10, ""),
    ],
)
def test_what_does_nothing_in_this_layout_is_said(sync: SyncOptions, replicas: int, steps: int, said: str):
    found = idle_here(Job(layout=Layout(replicas=replicas), sync=sync, train=TrainOptions(steps=steps)))
    assert [said in sentence for sentence in found] == ([True] if said else [])


@pytest.mark.parametrize("option", SERVER)
@pytest.mark.parametrize("mode", MODES)
def test_an_option_of_another_mode_is_refused_and_its_own_is_not(mode: str, option: str):
    extra = {"compensation": "rate"} if option == "strength" and mode in OF_MODE["compensation"] else {}
    server = ServerOptions(mode=mode, **{option: SERVER[option], **extra})
    found = refused(Job(sync=SyncOptions(name="server"), server=server))
    assert bool(found) == (mode not in OF_MODE[option])
    assert not found or f"server.{option}" in found


@pytest.mark.parametrize("name", SYNCS)
def test_a_step_is_traced_where_all_take_it_and_forgotten_where_a_run_goes_on_with_a_server(name: str):
    job = Job(sync=SyncOptions(name=name), run=RunOptions(trace=5))
    assert refused(job).startswith("run.trace=5 has no effect with sync.name=server") == (name == "server")
    assert name == "server" or not refused(job)
    assert without_idle(job).run.trace == (0 if name == "server" else 5)


def test_what_is_said_names_both_options_and_the_way_out():
    found = refused(Job(sync=SyncOptions(name="server"), server=ServerOptions(grace=0.5)))
    assert found == (
        "server.grace=0.5 has no effect with server.mode=bsp → "
        "server.mode quorum; else leave it out (server.grace=0.0, the default)"
    )
    found = refused(Job(sync=SyncOptions(every=20)))
    assert found == (
        "sync.every=20 has no effect with sync.name=allreduce → "
        "sync.name local or gossip; else leave it out (sync.every=50, the default)"
    )


def test_every_option_of_a_sync_is_known_to_be_of_some_or_of_all():
    of_all = {"name", "codec", "feedback", "bucket_mib", "timeout", "compare"}
    assert {field.name for field in fields(SyncOptions)} == OF_SYNC.keys() | of_all
    assert OF_MODE.keys() < {field.name for field in fields(ServerOptions)}


@pytest.mark.parametrize("name", SYNCS)
@pytest.mark.parametrize("mode", MODES)
def test_what_had_no_effect_is_forgotten_and_the_rest_is_kept(name: str, mode: str):
    job = Job(
        sync=replace(SyncOptions(**SYNC), name=name), server=replace(ServerOptions(**SERVER, shards=2), mode=mode)
    )
    found = without_idle(job)
    assert not refused(found)
    kept = {option for option in SYNC if getattr(found.sync, option) == SYNC[option]}
    assert kept == {option for option in SYNC if name in OF_SYNC[option] and name != "server"}
    kept = {option for option in SERVER if getattr(found.server, option) == SERVER[option]}
    assert kept == {option for option in SERVER if name == "server" and mode in OF_MODE[option]}
    assert found.server.shards == (2 if name == "server" else 1)
    assert without_idle(found) == found
