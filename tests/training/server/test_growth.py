"""Rows of a growing store as samples: whole rounds of all workers, looked for now and then, told of once."""

from __future__ import annotations

import types
from dataclasses import replace

import pytest

from shoal.errors import DataError
from shoal.job import Job, Layout
from shoal.job.data import DataOptions
from shoal.job.server import ServerOptions
from shoal.job.sync import SyncOptions
from shoal.job.train import TrainOptions
from shoal.sync.server.samples import Samples
from shoal.training.server import growth
from shoal.training.server.growth import Growth, Reached, wait_for

JOB = Job(
    layout=Layout(replicas=3),
    data=DataOptions(grow=True, order="sequential"),
    train=TrainOptions(steps=0, global_batch=12),
    sync=SyncOptions(name="server"),
)


class Store:
    """A loader whose rows come one list entry a look."""

    def __init__(self, *rows: int):
        self.samples, self.left, self.looks = rows[0], list(rows[1:]), 0

    def grow(self) -> int:
        self.looks += 1
        self.samples = self.left.pop(0) if self.left else self.samples
        return self.samples


@pytest.fixture
def grows(monkeypatch):
    """grows(job, rows ...): a Growth of a store that has so many rows at first, and at each look."""

    def make(job: Job, *rows: int) -> Growth:
        monkeypatch.setattr(growth, "Loader", lambda *given: Store(*rows))
        return Growth(job, types.SimpleNamespace(folder="news"))

    return make


@pytest.mark.parametrize(
    ("server", "rows", "end"),
    [
        ({}, 11, 0),
        ({}, 12, 12),
        ({}, 35, 24),
        # Three workers push 4 of 14 sequences each; of steps of their own, three each a round.
        ({"mode": "asp", "batch": 14}, 26, 24),
        ({"local_steps": 3}, 71, 36),
    ],
)
def test_only_whole_rounds_of_all_workers_are_given_out(grows, server, rows, end):
    batch = server.pop("batch", 12)
    job = replace(JOB, server=ServerOptions(**server), train=replace(JOB.train, global_batch=batch))
    assert grows(job, rows).reached() == Reached(end, True)


def test_it_looks_once_a_second_and_tells_what_is_new(grows):
    found = grows(JOB, 12, 12, 30, 30, 50)
    assert found.look(100.0) is None
    assert found.look(100.9) is None
    assert found.loader.looks == 1
    assert [found.look(float(now)) for now in (101, 102, 103)] == [Reached(24, True), None, Reached(48, True)]


def test_with_a_number_of_steps_it_ends_there(grows):
    found = grows(replace(JOB, train=replace(JOB.train, steps=3)), 30, 100)
    assert found.reached() == Reached(24, True)
    assert found.look(0.0) == Reached(36, False)


@pytest.mark.parametrize(("rows", "reached"), [(79, Reached(72, True)), (80, Reached(80, False))])
def test_the_last_round_may_be_shorter_and_waits_for_no_text_that_it_does_not_need(grows, rows, reached):
    server = ServerOptions(mode="asp", local_steps=2)
    job = replace(JOB, train=replace(JOB.train, steps=10, global_batch=8), server=server, layout=Layout(replicas=1))
    job = replace(job, server=replace(server, local_steps=3))
    assert grows(job, rows).reached() == reached


def test_a_dry_spell_is_told_of_once_when_nobody_computes_and_so_is_its_end(grows):
    found, samples = grows(JOB, 30), Samples(24)
    samples.growing = True
    assert found.news(samples, busy=False) == ""
    while samples.lease(12):
        pass
    assert found.news(samples, busy=True) == ""
    samples.used = 24
    told = found.news(samples, busy=False)
    assert told == (
        "waits for text: row 24 of 30, and a round of all workers is 12; `shoal data append news FILE` adds more"
    )
    assert found.news(samples, busy=False) == ""
    found.loader.samples = 40
    samples.extend(36, growing=True)
    assert found.news(samples, busy=False) == "goes on: there is text up to row 40"
    assert found.news(samples, busy=True) == ""


def test_a_worker_waits_for_rows_that_its_machine_does_not_see_yet():
    store = Store(4, 4, 9)
    wait_for(store, 9)
    assert (store.samples, store.looks) == (9, 2)
    wait_for(store, 9)
    assert store.looks == 2, "it looks only where rows are missing"


def test_a_worker_that_never_sees_them_says_so():
    with pytest.raises(DataError, match="the store has 4 rows here, and the run is at row 9 already") as caught:
        wait_for(Store(4), 9, patience=0.05)
    assert "same folder" in caught.value.fix
