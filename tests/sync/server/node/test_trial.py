"""Which codec `auto` becomes between workers and servers of several machines: by real exchanges over loopback, through
links that are slow on purpose."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from queue import Queue

import pytest
import torch

from shoal.device import peer_gone
from shoal.errors import JobError
from shoal.sync.codec import codec_of
from shoal.sync.server.node import trial, trial_lead
from shoal.sync.server.node.trial import Echo, Here, Links, Pushed, Try, attend, receive, send
from shoal.sync.server.node.trial_lead import Lead, choose
from shoal.sync.server.wire import connect
from tests.sync.server.peers import TRUSTED, in_thread

HELD = [120_000, 80_000]
CODECS = ["int8", "bf16"]
FLOAT = torch.float32
# Seconds for anything that must come to an end.
PATIENCE = 30.0


class Relay:
    """Between workers and one shard: a link that all its connections share, and that carries `rate` bytes a second each
    way. With `breaks` it ends its connections once, as soon as so many bytes have come from workers."""

    def __init__(self, to: tuple[str, int], rate: float, breaks: int = 0):
        self.to, self.rate, self.left = to, rate, breaks
        self.locks = threading.Lock(), threading.Lock()
        self.carried = [0, 0]
        self.ends: list[socket.socket] = []
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.address = self.listener.getsockname()
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near = self.listener.accept()[0]
                far = socket.create_connection(self.to)
                self.ends += [near, far]
                for way, ends in enumerate([(near, far), (far, near)]):
                    threading.Thread(target=self._carry, args=(way, *ends), daemon=True).start()

    def _carry(self, way: int, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 14):
                with self.locks[way]:
                    time.sleep(len(data) / self.rate)
                    self.carried[way] += len(data)
                if way == 0 and 0 < self.left <= self.carried[0]:
                    self.left = 0
                    break
                sink.sendall(data)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        for end in (self.listener, *self.ends):
            end.close()


class Late(Echo):
    """Answers after a while, much longer than all else takes, however much it is: there fewer bytes save nothing."""

    def answer(self, asked: Pushed, payload: torch.Tensor) -> list[torch.Tensor]:
        time.sleep(0.5)
        return super().answer(asked, payload)


class Parts:
    """Two workers and two shards as threads, each with the lead."""

    def __init__(self, lead: Lead):
        self.lead, self.failed = lead, list[BaseException]()
        self.threads: list[threading.Thread] = []

    def start(self, name: str, here: Here, links: Links | None = None) -> None:
        def main() -> None:
            try:
                with connect(*self.lead.address, credentials=TRUSTED, name=name, timeout=PATIENCE) as connection:
                    attend(connection, here, links)
            except BaseException as error:
                self.failed.append(error)

        self.threads.append(threading.Thread(target=main, daemon=True))
        self.threads[-1].start()

    def end(self) -> None:
        self.lead.end()
        for thread in self.threads:
            thread.join(PATIENCE)
            assert not thread.is_alive(), "a part was not told that it is over"


@contextlib.contextmanager
def parts(echo: type[Echo] = Echo, link: Callable[[tuple[str, int]], Relay] | None = None) -> Iterator[Parts]:
    """link: what shards are behind."""
    with contextlib.ExitStack() as ending:
        names = [f"{role} {number}" for role in ("worker", "server") for number in range(2)]
        job = Parts(ending.enter_context(Lead(names, "127.0.0.1", TRUSTED)))
        for number in range(2):
            address = ending.enter_context(echo("127.0.0.1", TRUSTED, FLOAT)).address
            if link is not None:
                relay = ending.enter_context(contextlib.closing(link(address)))
                address = relay.address
            job.start(f"server {number}", Here(*address))
        for number in range(2):
            links = ending.enter_context(Links(f"worker {number}", TRUSTED, FLOAT))
            job.start(f"worker {number}", Here(), links)
        yield job
        job.end()
    assert not job.failed


def test_a_slow_link_gets_a_codec():
    said: list[str] = []
    relays: list[Relay] = []

    def link(address: tuple[str, int]) -> Relay:
        relays.append(Relay(address, 1e6))
        return relays[-1]

    with parts(link=link) as job:
        chosen = choose(job.lead, CODECS, HELD, 1, True, said.append)
    assert chosen != "none"
    (line,) = said
    assert line.startswith(f"codec {chosen}: a push and a pull of all workers at a time would take none ")
    first, second = relays
    for relay in relays:
        assert 0.9 < relay.carried[0] / relay.carried[1] < 1.1, "as much comes back as went there"
    assert 1.4 < first.carried[0] / second.carried[0] < 1.6, "each shard's part of all numbers"


def test_where_fewer_bytes_save_nothing_it_is_none():
    said: list[str] = []
    with parts(echo=Late) as job:
        # So few that all of them are exchanged at once, and nothing is worked out from fewer.
        assert choose(job.lead, CODECS, [600, 400], 1, True, said.append) == "none"
    assert said[0].startswith("codec none: ")
    assert "int8" in said[0]
    assert "bf16" in said[0]


@pytest.mark.nightly
def test_on_loopback_as_it_is_it_is_none():
    with parts() as job:
        assert choose(job.lead, CODECS, [3_000_000, 3_000_000], 1, True, print) == "none"


def test_a_connection_that_breaks_meanwhile_is_tried_once_more():
    said: list[str] = []
    with parts(link=lambda address: Relay(address, 1e6, breaks=100_000)) as job:
        assert choose(job.lead, CODECS, HELD, 1, True, said.append) != "none"
    assert "with a server was lost while links were tried: once more when all are there" in said[0]
    assert "a push and a pull of all workers at a time would take none " in said[-1]


def test_a_part_that_is_lost_is_waited_for_and_nobody_else_is_let_in():
    said: list[str] = []
    with (
        Lead(["worker 0", "server 0"], "127.0.0.1", TRUSTED) as lead,
        Echo("127.0.0.1", TRUSTED, FLOAT) as echo,
        Links("worker 0", TRUSTED, FLOAT) as links,
    ):
        job = Parts(lead)
        job.start("server 0", Here(*echo.address))
        with connect(*lead.address, credentials=TRUSTED, name="worker 1", timeout=PATIENCE) as stranger:
            send(stranger, Here())
            with pytest.raises(ConnectionError):
                stranger.receive(timeout=5.0)
        with in_thread(lambda: choose(lead, CODECS, [1000], 1, True, said.append)) as chosen:
            with connect(*lead.address, credentials=TRUSTED, name="worker 0", timeout=PATIENCE) as first:
                send(first, Here())
                assert receive(first) == Try(1, "none", (1000,), (echo.address,))
            job.start("worker 0", Here(), links)
            assert chosen.get(timeout=PATIENCE) in ("none", *CODECS)
        assert said[0] == "worker 0 was lost while links were tried: once more when all are there"
        job.end()
    assert not job.failed


@contextlib.contextmanager
def one_worker(said: list[str]) -> Iterator[tuple[Parts, tuple[str, int], Queue[object]]]:
    """Worker 0 with its links, the address of a shard that has gone, and what is chosen (or raised): a shard is to
    come."""
    with Echo("127.0.0.1", TRUSTED, FLOAT) as echo:
        gone = echo.address
    with Lead(["worker 0", "server 0"], "127.0.0.1", TRUSTED) as lead, Links("worker 0", TRUSTED, FLOAT) as links:
        job = Parts(lead)
        with in_thread(lambda: choose(lead, CODECS, [1000], 1, True, said.append)) as chosen:
            job.start("worker 0", Here(), links)
            yield job, gone, chosen
        job.end()
    assert not job.failed, "a worker that cannot connect takes part none the less"


def test_a_shard_that_cannot_be_reached_is_named(monkeypatch):
    """It is there, but no worker can connect with it: the user's mistake, and not the loss of a peer."""
    monkeypatch.setattr(trial, "_REACHED", 0.2)
    monkeypatch.setattr(trial_lead, "_LEARNT", 0.1)
    said: list[str] = []
    with one_worker(said) as (job, gone, chosen):
        job.start("server 0", Here(*gone))
        error = chosen.get(timeout=PATIENCE)
    assert isinstance(error, JobError)
    assert "worker 0 cannot connect with server 0: " in error.what
    assert "--host" in error.fix
    assert not peer_gone(error)
    assert len(said) == 5
    assert all("server 0" in line and "was lost" not in line for line in said)


def test_a_shard_that_is_back_elsewhere_is_found_there(monkeypatch):
    """Lost when it had said where it listens, and before a worker had connected: none waits for the old address."""
    monkeypatch.setattr(trial, "_REACHED", 0.5)
    said: list[str] = []
    with one_worker(said) as (job, gone, chosen), Echo("127.0.0.1", TRUSTED, FLOAT) as echo:
        with connect(*job.lead.address, credentials=TRUSTED, name="server 0", timeout=PATIENCE) as lost:
            send(lost, Here(*gone))
            while not job.lead._turn:
                time.sleep(0.01)
        job.start("server 0", Here(*echo.address))
        assert chosen.get(timeout=PATIENCE) in ("none", *CODECS)
    assert said[0] == "server 0 was lost while links were tried: once more when all are there"
    assert len(said) == 2


@pytest.mark.parametrize(
    ("codec", "times", "sent"),
    [("none", 4, [2560]), ("int8", 1, [660]), ("int8", 3, [660] * 3), ("int8", 4, [2560]), ("bf16", 2, [2560])],
)
def test_what_comes_back_is_as_many_steps_as_a_pull_takes_or_all_numbers(codec, times, sent):
    """640 numbers: 10 blocks of 66 bytes."""
    payload = torch.ones(640) if codec == "none" else codec_of(codec).encode(torch.ones(1, 640))[0]
    with Echo("127.0.0.1", TRUSTED, FLOAT) as echo:
        assert [buffer.nbytes for buffer in echo.answer(Pushed(codec, 640, times), payload)] == sent
