"""Runs on a growing store: they wait for text and go on with it, as if it had been there from the beginning."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from shoal import checkpoint
from shoal.checkpoint import manifest
from shoal.data.append import append
from shoal.data.loader import Loader
from shoal.data.prepare import Prepared
from shoal.job import parse
from shoal.job.data import DataOptions
from shoal.launch.train import ready
from shoal.observe import metrics
from shoal.training.server.pull import pull
from tests.training.server import runs

BATCH = 12
# Seconds for whatever a test waits for, on a machine however busy.
_PATIENCE = 120.0


@pytest.fixture
def add(corpus, tmp_path) -> Callable[..., Path]:
    """add(first, last): appends these of the corpus's files to a store, which it returns."""
    files, store = sorted(corpus.glob("*.txt")), tmp_path / "news"

    def some(first: int, last: int) -> Path:
        source = tuple(map(str, files[first:last]))
        append(store, DataOptions(source=source, tokenizer="bytes", validation=0.2), say=lambda text: None)
        return store

    return some


@pytest.fixture
def online(tiny) -> Callable[..., object]:
    """online(run, store, ...): a job of two workers without an end, with some options changed by table."""

    def make(run: Path, store: Path, layout: str = "replicas=2", **tables):
        data = {"source": (str(store),), "grow": True, "order": "sequential"}
        optim = {"schedule": "constant", "warmup": 5.0}
        train = {"steps": 0, "validate_every": 5} | tables.pop("train", {})
        # So that rows of the embedding are pulled by themselves.
        tables = {"model": {"tie_word_embeddings": False}} | tables
        return tiny(run, layout, data=data, optim=optim, train=train, sync={"name": "server"}, **tables)

    return make


@contextlib.contextmanager
def aside(*deeds: Callable[[], object]) -> Iterator[None]:
    """Does one after the other while a run goes on, then has it end by SIGTERM; what goes wrong there is raised."""
    wrong: list[BaseException] = []

    def do() -> None:
        try:
            for deed in deeds:
                deed()
        except BaseException as error:
            wrong.append(error)
        for pid in runs.pids("shoal-coordinat"):
            os.kill(pid, signal.SIGTERM)

    thread = threading.Thread(target=do, daemon=True)
    thread.start()
    yield
    thread.join()
    if wrong:
        raise wrong[0]


def waits(run: Path, times: int) -> Callable[[], None]:
    """Until the run has said so often that it waits for text."""

    def until() -> None:
        deadline = time.monotonic() + _PATIENCE
        log = run / "log.txt"
        while not (log.is_file() and log.read_text().count("waits for text") >= times):
            assert time.monotonic() < deadline, log.read_text() if log.is_file() else "nothing was said"
            time.sleep(0.05)

    return until


def test_it_waits_for_text_and_ends_as_if_all_of_it_had_been_there(ranks, add, online, tmp_path):
    """Bitwise, with bsp. Weights are pulled while it waits; it is stopped while it waits, and resumed."""
    run, whole, pulled = tmp_path / "run", tmp_path / "whole", []
    store = add(0, 8)
    with aside(waits(run, 1), lambda: pulled.append(pull(run, None, print)), lambda: add(8, 14), waits(run, 2)):
        figures = runs.run(ranks, online(run, store))
    assert figures["stopped_by"] == "SIGTERM"
    first = figures["step"]
    assert runs.version(run) == first == len(runs.audit(run, first * BATCH))
    assert 0 < pulled[0].step < first, "the text that was there, and no more"
    assert manifest.read(pulled[0].checkpoint).values["position"] == pulled[0].step * BATCH

    with aside(waits(run, 3), lambda: add(14, 20), waits(run, 4)):
        figures = runs.run(ranks, online(run, store), resume=True)
    steps = figures["step"]
    assert first < steps
    assert len(runs.audit(run, steps * BATCH)) == runs.version(run) == steps
    assert [row["step"] for row in metrics.read(run)] == list(range(1, steps + 1))
    assert any("val_loss" in row for row in metrics.read(run))

    figures = runs.run(ranks, online(whole, store, train={"steps": steps}))
    assert (figures["step"], figures["stopped_by"]) == (steps, "")
    mine, theirs = runs.weights(run), runs.weights(whole)
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    rows = {row["step"]: row["loss"] for row in metrics.read(run)}
    assert rows == {row["step"]: row["loss"] for row in metrics.read(whole)}


def test_measuring_needs_one_row_and_leaves_the_job_without_an_end(ranks, add, online, tmp_path):
    """A store of fewer rows than a step takes. Cadences cannot be shares of a length."""
    job = online(tmp_path / "run", add(0, 1), train={"validate_every": 0}, checkpoint={"every": 0})
    job, arguments = ready(job, None, time.time())
    assert Loader(Prepared.load(Path(arguments["prepared"])), job.data).samples < BATCH
    told = {name: arguments[name] for name in ("folder", "job", "prepared", "started")}
    found = parse(ranks.run("shoal.training.server.settle:main", 2, **told)[0]["job"])
    assert found.endless
    assert (found.train.validate_every, found.checkpoint.every) == (100, 100)
    rest = replace(found.train, validate_every=0), replace(found.checkpoint, every=0)
    assert replace(found, train=rest[0], checkpoint=rest[1]) == parse(arguments["job"])


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("layout", "server"),
    [
        ("replicas=2", {}),
        ("replicas=2", {"mode": "asp"}),
        ("replicas=2", {"mode": "ssp", "staleness": 0}),
        ("replicas=2", {"mode": "quorum"}),
        ("replicas=2", {"mode": "asp", "local_steps": 2}),
        ("replicas=2", {"copies": 2}),
        ("replicas=2,fsdp=2", {"mode": "asp"}),
        ("replicas=2,tensor=2", {}),
    ],
    ids=str,
)
def test_every_mode_waits_and_goes_on_and_uses_every_row_once(ranks, add, online, tmp_path, layout, server):
    """Coordinator and a worker are killed while all wait."""
    run = tmp_path / "run"
    store = add(0, 6)

    def kill() -> None:
        for name in ("shoal-coordinat", "shoal-worker0"):
            os.kill(runs.pids(name)[0], signal.SIGKILL)

    with aside(
        waits(run, 1), kill, waits(run, 2), lambda: add(6, 12), waits(run, 3), lambda: add(12, 16), waits(run, 4)
    ):
        figures = runs.run(ranks, online(run, store, layout, server=server))
    assert figures["stopped_by"] == "SIGTERM"
    newest = checkpoint.newest(run / "checkpoints", print)
    assert newest is not None
    told = manifest.read(newest).values
    assert told["sync"]["exceptions"] == []
    runs.audit(run, told["position"])
    assert told["position"] // BATCH == figures["step"] > 0
