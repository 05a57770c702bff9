"""What a user may get wrong about a parameter server: one sentence, what to do, and nothing left behind."""

from __future__ import annotations

import json
import os
import random
import signal
import threading
import time
from pathlib import Path

import pytest

from shoal.cli.main import main
from shoal.errors import JobError
from shoal.job import Job, read
from shoal.sync.server import messages as m
from shoal.sync.server.messages import COORDINATOR, Address, Key, Piece
from shoal.sync.server.node.book import Book
from shoal.sync.server.node.client import Client
from shoal.sync.server.node.station import Station
from shoal.sync.server.wire import Credentials, connect
from shoal.sync.server.wire.frame import pack
from shoal.sync.server.wire.handshake import Session
from shoal.sync.server.worker import Worker
from shoal.training.precision import stored
from shoal.training.server import plan
from tests.sync.server.peers import raw_at
from tests.sync.server.test_wire_fuzz import KINDS, attack, resident
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


def no_message(session: Session, chance: random.Random) -> bytes:
    """Whole frames whose header is no message, or another one than its buffers are of."""
    piece = Piece("model.norm.weight", (0,), (chance.choice([12, 1 << 40, -1]),))
    key, bent = Key(9, 7, 0), Piece("model.norm.weight", (0,), chance.choice([(12, 1), (), (-1,)]))
    messages = [
        m.Over(), m.Stage(key, 0, 1, (piece,)), m.Pulled(key, 0, 1, (piece, piece)), m.Pull(key, 0, (bent,)),
        m.Stage(key, 0, 1, chance.choice([(), (piece, piece), (bent,)]), encoded=True), m.Apply(1, (key,), 1.0, 1.0, 0),
        m.Drop((key,)), m.Save(0, b"{}"),
    ]  # fmt: skip
    header = m.encode(chance.choice(messages))
    header = chance.choice([header, header, header, chance.randbytes(40), header[: chance.randrange(len(header))]])
    lengths = chance.choice([[], [40], [40, 8]])
    return pack(session.send_key, 0, header, lengths) + bytes(sum(lengths))


def fuzz(run: Path, frames: int) -> dict[int, int]:
    """Malformed frames of all kinds, from somebody who has the token, to the coordinator and to the shard. Bytes that
    each of these processes has grown by since the first half of them."""
    chance, token = random.Random(frames), (run / "server" / "token").read_text()
    entries = [Book(run).find(address) for address in (COORDINATOR, Address("shard"))]
    held = [runs.pids(name)[0] for name in ("shoal-coordinat", "shoal-server0")]
    before: dict[int, int] = {}
    for number in range(frames):
        entry = entries[number % 2]
        assert entry is not None
        sock, session = raw_at((entry.host, entry.port), token, "worker 9 7")
        with sock:
            attack(sock, chance.choice([*KINDS, *[no_message] * len(KINDS)])(session, chance))
        if number == frames // 2:  # buffers of as many as ever come at a time have been made by then
            before = {pid: resident(pid) for pid in held}
    return {pid: resident(pid) - before[pid] for pid in held}


@pytest.mark.parametrize("frames", [60, pytest.param(10_000, marks=pytest.mark.nightly)])
def test_strangers_are_told_why_and_disturb_nothing(ranks, tiny, tmp_path, frames):
    """Of a run that is asked to end when they have been there. It trains on beneath malformed frames."""
    run, told, said, grown = tmp_path / "run", [], [], {}
    options = {"train": {"steps": 100_000, "validate_every": 1000}, "data": {"validation": 0.0}}
    job = tiny(run, "replicas=1", sync={"name": "server"}, checkpoint={"every": 1000}, **options)

    def knock() -> None:
        while Book(run).find(COORDINATOR) is None:
            time.sleep(0.01)
        known = read(run / "job.toml")
        told.append(stranger(run, known, model="another"))
        told.append(stranger(run, known, tokenizer="another"))
        told.append(stranger(run, known, token="another token of enough bytes"))
        try:
            while runs.steps(run) < 3:
                time.sleep(0.01)
            shard = Book(run).find(Address("shard"))
            assert shard is not None
            with pytest.raises(JobError, match="refuses this side's job token"):
                connect(shard.host, shard.port, credentials=Credentials("another of enough bytes"), timeout=60.0)
            began = runs.steps(run)
            grown.update(fuzz(run, frames))
            while runs.steps(run) < began + 3:
                time.sleep(0.01)
        finally:
            os.kill(runs.pids("shoal-coordinat")[0], signal.SIGTERM)

    visitor = threading.Thread(target=knock, daemon=True)
    visitor.start()
    figures = runs.run(ranks, job, said=said)
    visitor.join(60.0)
    assert len(grown) == 2, "somebody did not let go of a malformed frame"
    # What is trained on grows the journal, too; and logs of what happened.
    assert max(grown.values()) < 32 << 20
    assert not any("given up" in line or "started again" in line for line in said), said
    model, tokenizer = plan.model_hash(read(run / "job.toml")), plan.tokenizer_hash(run)
    fix = "join from the run's own folder, or from a copy of it in which nothing was changed"
    assert told[0] == f"worker 9 has another model: another instead of {model} → {fix}"
    assert told[1] == f"worker 9 has another tokenizer: another instead of {tokenizer} → {fix}"
    assert told[2] == "the listener refuses this side's job token → give both sides the same token"
    log = (run / "log.txt").read_text()
    for sentence in told[:2]:
        assert log.count(f"refused: {sentence.replace(' → ', '; ')}") == 1
    refused = [line for line in log.splitlines() if line.endswith("know the job token; give both sides the same token")]
    assert [" server 0: refused: 127.0.0.1:" in line for line in refused] == [False, True], "both listen"
    assert figures["step"] >= 6
    assert {key.worker for record in runs.audit(run, figures["step"] * 12) for key in record.keys} == {0}
