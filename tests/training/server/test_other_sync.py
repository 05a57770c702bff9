"""A run that goes on with another sync, or with other steps of workers' own: rates, samples, moments; and where it
cannot go on, its folder as it was."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
import torch.distributed as dist

from shoal import checkpoint
from shoal.checkpoint import manifest
from shoal.data.loader import Loader
from shoal.data.prepare import Prepared
from shoal.errors import CheckpointError, JobError
from shoal.job import Job, Layout, read, write
from shoal.launch import server
from shoal.launch.train import ready
from shoal.mesh import Seat
from shoal.observe import metrics
from shoal.optim.schedule import learning_rate
from shoal.sync.server.messages import Range
from shoal.training.server import begin, hold
from tests.training.server import runs
from tests.training.server.test_equality import QUIET
from tests.training.test_going_on import content
from tests.training.test_uneven import LEDGER, stream

# Half of the run's steps have a rate that falls to nothing.
OPTIM = {"schedule": "wsd", "warmup": 0.1, "decay": 0.5}
SHORT = {"steps": 6, "validate_every": 1000}


@pytest.fixture(scope="module")
def asp(ranks, tiny, tmp_path_factory) -> Path:
    """6 steps, in 12 updates."""
    run = tmp_path_factory.mktemp("asp") / "run"
    job = tiny(run, "replicas=2", train=SHORT, optim=OPTIM, sync={"name": "server"}, server={"mode": "asp"}, **QUIET)
    runs.run(ranks, job)
    assert runs.version(run) == 12
    return run


@pytest.fixture(scope="module")
def diloco(ranks, tiny, tmp_path_factory) -> Path:
    """6 steps, of workers' own, in 3 updates."""
    run = tmp_path_factory.mktemp("diloco") / "run"
    options = {"train": SHORT, "optim": OPTIM, "sync": {"name": "server"}, "server": {"local_steps": 2}, **QUIET}
    runs.run(ranks, tiny(run, "replicas=2", **options))
    assert runs.version(run) == 3
    return run


def going_on(run: Path, layout: str = "replicas=2", **tables: dict[str, Any]) -> Job:
    """What `shoal train --resume RUN --OPTION VALUE` makes of its job."""
    job = replace(read(run / "job.toml"), layout=Layout.parse(layout))
    of_all = {"server": {"mode": "bsp", "local_steps": 1}, "train": {"steps": 12}, "run": {"dir": str(run)}}
    for table in of_all | tables:
        options = of_all.get(table, {}) | tables.get(table, {})
        job = replace(job, **{table: replace(getattr(job, table), **options)})
    return job.validate()


def resumed(train: Callable[..., list[Any]], run: Path, job: Job, **args: Any) -> list[Any]:
    """`train` reads the job from the folder."""
    (run / "job.toml").write_text(write(job))
    return train(job, resume=True, **args)


def rewritten(run: Path, change: Callable[[manifest.Manifest], manifest.Manifest]) -> Path:
    """The newest checkpoint's manifest, changed."""
    newest = next(iter(checkpoint.complete(run / "checkpoints")))
    what = change(manifest.read(newest))
    (newest / manifest.FILE).write_bytes(manifest.seal(msgspec.json.encode(what)))
    return newest


def values(run: Path) -> dict[str, Any]:
    """Of the newest checkpoint."""
    return manifest.read(next(iter(checkpoint.complete(run / "checkpoints")))).values


def without_a_moment(what: manifest.Manifest) -> manifest.Manifest:
    """As another optimizer would have left it."""
    tensors = {name: tensor for name, tensor in what.tensors.items() if name != "exp_avg.model.norm.weight"}
    return msgspec.structs.replace(what, tensors=tensors)


def filled(run: Path, **options: Any) -> hold.Parameters:
    """What the only shard of a job that goes on has of the newest checkpoint."""
    job = going_on(run, sync={"name": "server"}, server=options)
    held = hold.empty(job, 0)
    for shard in held.shards:
        shard.local.fill_(torch.nan)
    hold._fill(run, job, held)
    assert all(shard.local.isfinite().all() for shard in held.shards)
    return held


def test_the_rate_is_that_of_the_step_however_many_updates_a_server_made_of_one(asp, train, tmp_path):
    run = shutil.copytree(asp, tmp_path / "run")
    job = going_on(run, sync={"name": "allreduce"})
    resumed(train, run, job)
    rates = [row["lr"] for row in metrics.read(run) if row["step"] > 6]
    assert rates == [learning_rate(job.optim, step, 12) for step in range(6, 12)]
    assert rates[0] > rates[-2] > 0
    assert values(run)["update"] == {"updates": 12 + 6}, "AdamW's moments have seen them all"


def test_samples_that_a_server_used_up_out_of_turn_are_left_out(asp, train, tmp_path):
    """Each sample once: also where the run is broken off and goes on meanwhile, on other ranks and with a server."""
    run, told = shutil.copytree(asp, tmp_path / "run"), {"position": 64, "sync": {"exceptions": [[72, 74], [84, 90]]}}
    rewritten(run, lambda what: msgspec.structs.replace(what, values=what.values | told))
    job = going_on(run, "replicas=3", sync={"name": "allreduce"}, train={"steps": 9}, checkpoint={"every": 7})
    seen = stream(resumed(train, run, job, entry=LEDGER))
    # The server has used up 72 samples in 6 steps; three more steps take 36.
    left = torch.tensor([*range(64, 72), *range(74, 84), *range(90, 108)])
    text = Prepared.load(Path(msgspec.json.decode((run / "data.json").read_bytes())["folder"]))
    loader = Loader(text, job.data, "train", job.train.global_batch, job.train.seed)
    assert seen == loader.order(left.numpy()).tolist()
    assert values(run)["position"] == 108
    assert "exceptions" not in values(run)["sync"]

    shutil.rmtree(run / "checkpoints/step-00000009")
    assert (values(run)["position"], values(run)["sync"]["exceptions"]) == (78, [[84, 90]])
    opened = begin.opened_at(run, job)
    assert (opened.watermark, opened.exceptions) == (78, (Range(84, 90),))
    again = stream(resumed(train, run, replace(job, layout=Layout()), entry=LEDGER))
    assert again == seen[12:]


@pytest.mark.parametrize("sync", ["allreduce", "local", pytest.param("gossip", marks=pytest.mark.nightly)])
def test_another_sync_goes_on_from_steps_of_workers_own(diloco, train, tmp_path, sync):
    """With moments that begin with nothing, and are kept from then on."""
    run = shutil.copytree(diloco, tmp_path / "run")
    job = going_on(run, sync={"name": sync} | ({} if sync == "allreduce" else {"every": 2}))
    resumed(train, run, job)
    log = (run / "log.txt").read_text()
    assert log.count("the optimizer's state begins with nothing: that in the checkpoint is of an outer one") == 1
    rates = [row["lr"] for row in metrics.read(run) if row["step"] > 6]
    assert rates == [learning_rate(job.optim, step, 12) for step in range(6, 12)]
    assert values(run)["update"] == {"updates": 3 + 6, "since": 3}
    assert (run / "server-before/journal").is_file()
    resumed(train, run, going_on(run, sync=vars(job.sync), train={"steps": 13}))
    assert values(run)["update"] == {"updates": 3 + 7, "since": 3}
    assert (run / "log.txt").read_text().count("begins with nothing") == 1


def test_servers_begin_with_nothing_of_another_optimizers_state(asp, diloco, tmp_path):
    outer = filled(asp, local_steps=2)
    assert (outer.optimizer.done, outer.optimizer.since) == (12, 12)
    assert not any(slot.local.any() for slot in outer.optimizer.state())
    assert outer.optimizer.values() == {"updates": 12, "since": 12, "outer": True}
    inner = filled(diloco)
    assert (inner.optimizer.done, inner.optimizer.since) == (3, 3)
    assert not any(slot.local.any() for slot in inner.optimizer.state())
    for same, updates in ((filled(diloco, local_steps=3), 3), (filled(asp), 12)):
        assert (same.optimizer.done, same.optimizer.since) == (updates, 0)
        moments = [slot.local for slot in same.optimizer.state() if not slot.name.startswith("gathered.")]
        assert moments
        assert all(moment.any() for moment in moments)


@pytest.mark.nightly
def test_servers_take_steps_of_workers_own_on_and_off(asp, ranks, tmp_path):
    """Whole runs: without, with, with once more, without."""
    run, said = shutil.copytree(asp, tmp_path / "run"), []
    for steps, local_steps, told in ((8, 2, 1), (10, 2, 1), (12, 1, 2), (14, 1, 2)):
        options = {"sync": {"name": "server"}, "train": {"steps": steps}, "server": {"local_steps": local_steps}}
        (run / "job.toml").write_text(write(going_on(run, **options)))
        job = replace(read(run / "job.toml"), run=replace(read(run / "job.toml").run, dir=str(run)))
        assert runs.run(ranks, job, resume=True, said=said)["step"] == steps
        assert sum("begins with nothing" in text for text in (run / "log.txt").read_text().splitlines()) == told
    assert values(run)["update"] == {"updates": 18, "since": 14}
    assert runs.version(run) == 18


@pytest.mark.parametrize("why", ["moment", "steps", "damaged", "links"])
def test_servers_that_cannot_go_on_leave_the_folder_as_it_was(asp, tmp_path, monkeypatch, why):
    """With other shards than before, so that journal and logs would go; and what somebody would join by. links: a
    moment is missing, and links to other machines were to be tried before."""
    run = shutil.copytree(asp, tmp_path / "run")
    newest = rewritten(run, without_a_moment if why in ("moment", "links") else lambda what: what)
    if why == "damaged":
        victim = next(newest.glob("*.safetensors"))
        victim.write_bytes(victim.read_bytes()[:-1])
    (run / "server/start.json").write_bytes(b"of a start that was killed")
    before = content(run)
    steps = {"steps": 5 if why == "steps" else 12}
    tried = ({"codec": "auto"}, {"elsewhere": ("worker 1",)}) if why == "links" else ({}, {})
    job, arguments = ready(going_on(run, train=steps, sync=tried[0], server={"shards": 2} | tried[1]), run, 0.0)

    def in_this_process(entry: str, told: dict[str, Any], *_: Any, **__: Any) -> None:
        room, _, name = entry.partition(":")
        assert room == "shoal.training.server.begin"
        assert not (run / "server/start.json").exists()
        getattr(begin, name)(Seat(0, 1, 0, 1, dist.HashStore()), **told)

    monkeypatch.setattr(server.local, "run", in_this_process)
    match = {
        "moment": "missing",
        "links": "missing",
        "steps": "has done 6 steps already",
        "damaged": "every checkpoint of this run is",
    }
    with pytest.raises((CheckpointError, JobError), match=match[why]):
        server.run(job, arguments, None, print, print)
    assert content(run) == before


def test_steps_that_the_journal_has_beyond_the_checkpoint_are_done_too(asp, tmp_path):
    """As if the checkpoint were of four steps, and the server had been killed after six: five are fewer."""
    run = shutil.copytree(asp, tmp_path / "run")
    rewritten(run, lambda what: msgspec.structs.replace(what, step=4))
    before = content(run)
    job = going_on(run, sync={"name": "server"}, train={"steps": 5})
    seat = Seat(0, 1, 0, 1, dist.HashStore())
    with pytest.raises(JobError, match="has done 6 steps already"):
        begin.main(seat, folder=str(run), job=write(job))
    assert content(run) == before
    begin.main(seat, folder=str(run), job=write(going_on(run, sync={"name": "server"}, train={"steps": 6})))
    assert (run / "server/journal").read_bytes().startswith((asp / "server/journal").read_bytes()), "it goes on from it"


def test_a_run_without_a_server_that_cannot_go_on_leaves_the_folder_as_it_was(asp, train, tmp_path):
    run = shutil.copytree(asp, tmp_path / "run")
    rewritten(run, without_a_moment)
    job = going_on(run, sync={"name": "allreduce"})
    (run / "job.toml").write_text(write(job))
    before = content(run)
    with pytest.raises(CheckpointError, match="missing"):
        train(job, resume=True)
    assert content(run) == before
