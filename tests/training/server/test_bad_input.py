"""What a user may get wrong about a parameter server: one sentence, what to do, and nothing left behind."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from shoal.cli.main import main
from shoal.errors import JobError
from shoal.job import Job, read
from shoal.sync.server.messages import COORDINATOR, Address
from shoal.sync.server.node.book import Book
from shoal.sync.server.node.client import Client
from shoal.sync.server.node.station import Station
from shoal.sync.server.wire import Credentials
from shoal.sync.server.worker import Worker
from shoal.training.precision import stored
from shoal.training.server import plan
from tests.training.server import runs
from tests.training.test_bad_input import NoRanks, corpus_of

MISTAKES = {
    "more shards than parameters": (
        lambda _: ["--servers", "99"],
        "--servers: 99 server shards for 29 parameters: some would hold nothing",
        "at most 29",
    ),
    "negative staleness": (
        lambda _: ["--mode", "ssp", "--staleness", "-1"], "server.staleness=-1 is less than 0", "0 or more",
    ),
    "no token beyond loopback": (
        lambda _: ["--server.host", "0.0.0.0"], "server.host=0.0.0.0 without server.token", "server.token=FILE",
    ),
    "an address that the machine lacks": (
        lambda f: ["--server.host", "192.0.2.1", "--server.token", corpus_of(f, b"x" * 32, "token")],
        "server.host=192.0.2.1: this machine cannot listen there: Cannot assign requested address",
        "ip -brief address",
    ),
    "a name that nobody knows": (
        lambda f: ["--server.host", "no.such.host.invalid", "--server.token", corpus_of(f, b"x" * 32, "token")],
        "server.host=no.such.host.invalid: this machine cannot listen there",
        "ip -brief address",
    ),
    "no file with a token": (
        lambda f: ["--server.token", str(f / "none")], "none: cannot read the job token: No such file", "secrets.token",
    ),
    "a token of few bytes": (
        lambda f: ["--server.token", corpus_of(f, b"short", "token")], "fewer than 16 bytes", "secrets.token",
    ),
    "TLS files that are none": (
        lambda f: [
            word for name in ("certificate", "key", "authority")
            for word in (f"--server.{name}", corpus_of(f, b"not PEM", name))
        ],
        "TLS cannot use these files", "PEM",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("words", "what", "fix"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake(arguments, tmp_path, monkeypatch, capfd, words, what, fix):
    """Before a process is started."""
    monkeypatch.setattr("shoal.launch.train.Ranks", NoRanks)
    run, words = tmp_path / "run", words(tmp_path)
    words = [*arguments, "--sync", "server", "--workers", "2", "--steps", "2", "--run-dir", str(run), *words]
    assert main([*words, "--format", "json"]) == 2
    out, err = capfd.readouterr()
    assert "Traceback" not in err
    error = json.loads(out)["error"]
    sentence = err[err.index("error: ") :]
    assert sentence.count("\n") <= 2, "the sentence, and what to do"
    assert what in sentence
    assert fix in error["fix"]
    assert not run.exists()


def stranger(run: Path, job: Job, **other: str) -> str:
    """What a worker of another model, tokenizer or token is told by a coordinator that lives."""
    told = {"model": plan.model_hash(job), "tokenizer": plan.tokenizer_hash(run)} | other
    token = told.pop("token", (run / "server" / "token").read_text())

    def station(nonce: int) -> Station:
        dtype = stored(job.train.precision)
        return Station(Address("worker", 9, nonce), Book(run), Credentials(token), dtype, ("coordinator", "shard"))

    client = Client(Worker(9, 1, job.server.shards, retry=1.0, heartbeat=1.0, **told), station)
    try:
        client.wait("asking", timeout=60.0)
        return "was let in"
    except JobError as error:
        return f"{error.what} → {error.fix}"
    finally:
        client.close()


def test_strangers_are_told_why_and_disturb_nothing(ranks, tiny, tmp_path):
    """Of a run that is asked to end when they have been there."""
    run, told = tmp_path / "run", []
    options = {"train": {"steps": 100_000, "validate_every": 1000}, "data": {"validation": 0.0}}
    job = tiny(run, "replicas=1", sync={"name": "server"}, checkpoint={"every": 1000}, **options)

    def knock() -> None:
        while Book(run).find(COORDINATOR) is None:
            time.sleep(0.01)
        known = read(run / "job.toml")
        told.append(stranger(run, known, model="another"))
        told.append(stranger(run, known, tokenizer="another"))
        told.append(stranger(run, known, token="another token of enough bytes"))
        while runs.steps(run) < 3:
            time.sleep(0.01)
        os.kill(runs.pids("shoal-coordinat")[0], signal.SIGTERM)

    visitor = threading.Thread(target=knock, daemon=True)
    visitor.start()
    figures = runs.run(ranks, job)
    visitor.join(60.0)
    model, tokenizer = plan.model_hash(read(run / "job.toml")), plan.tokenizer_hash(run)
    fix = "start it with the job.toml of this run"
    assert told[0] == f"worker 9 has another model: another instead of {model} → {fix}"
    assert told[1] == f"worker 9 has another tokenizer: another instead of {tokenizer} → {fix}"
    assert told[2] == "the listener refuses this side's job token → give both sides the same token"
    assert figures["step"] >= 3
    assert {key.worker for record in runs.audit(run, figures["step"] * 12) for key in record.keys} == {0}
