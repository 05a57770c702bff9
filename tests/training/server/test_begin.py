"""Before the processes of a run start: what is left of an earlier start, and that nobody of it lives."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
import torch.distributed as dist

from shoal.errors import CheckpointError
from shoal.job import write
from shoal.launch.train import ready
from shoal.mesh import Seat
from shoal.sync.server import journal
from shoal.sync.server import records as r
from shoal.sync.server.node.journal_file import JournalFile
from shoal.training import folder
from shoal.training.server import begin, plan


@pytest.fixture
def run(tiny, tmp_path):
    """begin(copies) of a run's folder, and its journal."""
    job, _ = ready(tiny(tmp_path / "run", "replicas=2", sync={"name": "server"}), None, time.time())
    here = tmp_path / "run/server"

    def start(copies: int = 1) -> None:
        changed = replace(job, server=replace(job.server, copies=copies))
        begin.main(Seat(0, 1, 0, 1, dist.HashStore()), folder=str(here.parent), job=write(changed))

    start()
    told = JournalFile(here)
    told.append([r.Opened(plan.model_hash(job)), r.Entered(0, 7, 0, 0, 1), r.Entered(1, 8, 0, 0, 1)], durable=True)
    told.close()
    return start, here / "journal"


def test_that_all_begins_anew_is_in_the_journal_before_anybody_starts(run):
    """However soon the coordinator is killed, it knows that its workers are not there yet."""
    start, path = run
    for starts in (1, 2):
        start()
        records, _ = journal.decode(path.read_bytes())
        assert records[3:] == [r.Anew()] * starts


def test_a_journal_that_does_not_hold_any_more_goes(run):
    start, path = run
    start(copies=2)
    assert not path.exists()


def test_who_has_joined_keeps_its_lock(run):
    """Or another process could take the same part; all else of an earlier start goes, folders too."""
    start, path = run
    (path.parent / "worker-1.lock").touch()
    (path.parent / "shard-0").mkdir()
    held = (path.parent / "worker-1.lock").stat().st_ino
    start(copies=2)
    assert (path.parent / "worker-1.lock").stat().st_ino == held
    assert {each.name for each in path.parent.iterdir()} == {"worker-1.lock", "plan.json"}


def test_a_run_does_not_go_on_without_a_server_beside_its_journal(run):
    """Or another resume, with a server, would go on from that."""
    here = run[1].parent
    (here.parent / "server-before").touch()
    with pytest.raises(CheckpointError, match="cannot be set aside in server-before: Not a directory") as caught:
        folder.set_aside(here.parent, print)
    assert f"remove {here.parent / 'server-before'}" in caught.value.fix
    assert run[1].is_file()


def test_a_damaged_journal_is_named(run):
    start, path = run
    data = bytearray(path.read_bytes())
    data[len(journal.MAGIC) + 12] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="damaged at byte") as caught:
        start()
    assert caught.value.where == str(path)
