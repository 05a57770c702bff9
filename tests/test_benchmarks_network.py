"""Hosts whose links are limited, and the benchmark that trains on them."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from benchmarks import hosts as namespaces
from benchmarks import network
from benchmarks.hosts import Hosts
from benchmarks.network import Method

from shoal.errors import JobError
from shoal.job import Job

REASON = namespaces.why_not()
needs_hosts = pytest.mark.skipif(bool(REASON), reason=REASON or "-")
NETNS = Path("/run/netns")
MAKES_HOSTS = (
    "import time; from benchmarks.hosts import Hosts, terminable\n"
    "with terminable(), Hosts(1) as hosts: print(hosts.names[0], flush=True); time.sleep(600)"
)


def taken(hosts: Hosts, size: int) -> float:
    """Seconds in which so many bytes come from the first host to the second."""
    ends: list[socket.socket] = []

    def serve() -> None:
        namespaces.enter(hosts.names[1])
        ends.append(socket.create_server((hosts.addresses[1], 0)))
        with ends[0].accept()[0] as peer:
            left = size
            while left:
                left -= len(peer.recv(1 << 16))
            peer.sendall(b"!")

    def send() -> None:
        namespaces.enter(hosts.names[0])
        with socket.create_connection(ends[0].getsockname()) as sock:
            start = time.monotonic()
            sock.sendall(bytes(size))
            assert sock.recv(1) == b"!"
            seconds.append(time.monotonic() - start)

    seconds: list[float] = []
    # A namespace is a thread's; each ends with its thread.
    server = threading.Thread(target=serve, daemon=True)
    server.start()
    while not ends:
        time.sleep(0.001)
    client = threading.Thread(target=send, daemon=True)
    client.start()
    client.join(60)
    ends[0].close()
    return seconds[0]


@needs_hosts
def test_a_link_is_as_slow_as_asked():
    """Beyond the first 256 kB, which may come at once. Without a limit it takes milliseconds."""
    with Hosts(2, "20mbit") as hosts:
        assert taken(hosts, 1_500_000) > 8 * (1_500_000 - 256_000) / 20e6
    assert not any((NETNS / name).exists() for name in hosts.names)


@needs_hosts
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_nothing_is_left_of_a_program_that_was_stopped(number):
    maker = subprocess.Popen([sys.executable, "-c", MAKES_HOSTS], stdout=subprocess.PIPE, text=True)
    assert maker.stdout is not None
    name = maker.stdout.readline().strip()
    # It says so once it is there: before, nobody could find it.
    words = ["sh", "-c", "echo there; exec sleep 600"]
    inside = subprocess.Popen(["ip", "netns", "exec", name, *words], stdout=subprocess.PIPE, text=True)
    assert inside.stdout is not None
    try:
        assert inside.stdout.readline() == "there\n"
        namespaces.remove_leftovers()
        assert (NETNS / name).exists(), "its program lives"
        maker.send_signal(number)
        maker.wait(30)
        if number == signal.SIGKILL:
            assert (NETNS / name).exists()
            namespaces.remove_leftovers()
        assert not [path for path in NETNS.glob("*") if str(maker.pid) in path.name.split("-")]
        assert inside.wait(30) == -signal.SIGKILL
    finally:
        maker.stdout.close()
        inside.stdout.close()
        for process in (maker, inside):
            process.kill()
            process.wait()


def test_a_method_is_a_table_of_the_job():
    local = Method.of("allreduce:bucket_mib=5,compare=false/bf16").job(Job())
    assert (local.sync.name, local.sync.codec, local.sync.bucket_mib, local.sync.compare) == (
        "allreduce",
        "bf16",
        5.0,
        False,
    )
    with pytest.raises(JobError, match=r"unknown key 'sync.bucket_mb'.*\n.*sync.bucket_mib"):
        Method.of("allreduce:bucket_mb=5/bf16").job(Job())
    for wrong in ("allreduce", "allreduce/", "/bf16", "local:every/none"):
        with pytest.raises(SystemExit, match="is not a method"):
            Method.of(wrong)


def test_the_target_is_met_between_two_looks():
    run = {"losses": [[10, 5.0], [20, 4.0], [30, 4.5]], "seconds": [1.0, 3.0, 5.0]}
    assert network.first(run, 4.25) == {"step": 17.5, "seconds": 2.5}
    assert network.first(run, 4.0) == {"step": 20.0, "seconds": 3.0}
    assert network.first(run, 6.0) == {"step": 10.0, "seconds": 1.0}
    assert network.first(run, 3.9) is None


def test_without_root_it_says_why_it_measures_nothing(monkeypatch, capsys):
    monkeypatch.setattr(network, "why_not", lambda: "no root")
    monkeypatch.setattr("sys.argv", ["network.py", "--format", "json"])
    network.main()
    assert json.loads(capsys.readouterr().out) == {"rows": [], "skipped": "no root"}


@pytest.fixture
def arguments(tmp_path):
    text = tmp_path / "text"
    text.mkdir()
    for number in range(40):
        (text / f"{number}.txt").write_text("".join(f"{number} and {i} make {number + i}.\n" for i in range(60)))
    return [
        "network.py", "--workers", "2", "--size", "tiny", "--data", str(text), "--cache", str(tmp_path / "cache"),
        "--tokenizer", "bytes", "--length", "64", "--steps", "3", "--every", "1", "--rows", "6", "--timed", "3",
        "--seeds", "1", "--lr", "1e-2", "--out", str(tmp_path / "out"), "--format", "json", "--methods",
    ]  # fmt: skip


@needs_hosts
def test_three_steps_on_two_hosts(arguments, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", [*arguments, "allreduce/none", "nothing/none", "--confirm"])
    network.main()
    said = capsys.readouterr()
    rows = json.loads(said.out)["rows"]
    assert "nothing/none: left out: " in said.err
    promised = {"sync", "codec", "seconds_to_loss", "bytes_per_token", "final_loss", "speedup_vs_ddp"}
    assert all(promised | {"confirmed_seconds"} <= set(row) for row in rows)
    ddp, ours = rows
    assert [(row["sync"], row["codec"]) for row in rows] == [("ddp", "none"), ("allreduce", "none")]
    # By hand it is the same training, but for the mean over each worker's tokens, of which some are padding.
    assert ours["final_loss"] == pytest.approx(ddp["final_loss"], abs=2e-3)
    assert 0 < ddp["steps_to_loss"][0] <= 3
    assert ddp["speedup_vs_ddp"] == 1
    for row in rows:
        # Two workers send half of the sum and half of the result each; besides, how much a message is.
        least = 4 * parameters() / 64
        assert least < row["bytes_per_token"] < 1.2 * least
        assert 0 < row["seconds_per_step"] < row["confirmed_seconds"]

    monkeypatch.setattr(network.Bench, "_run", lambda *_: pytest.fail("measured again"))
    network.main()
    assert json.loads(capsys.readouterr().out)["rows"] == rows


def parameters() -> int:
    """Of the tiny model with single bytes for tokens: embedding, two blocks, the last norm."""
    hidden, middle, vocabulary = 32, 64, 257
    return vocabulary * hidden + 2 * (4 * hidden * hidden + 3 * hidden * middle + 2 * hidden) + hidden
