"""Hosts whose links are limited, and the benchmark that trains on them."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import pytest
from benchmarks import hosts as namespaces
from benchmarks import network
from benchmarks.hosts import Hosts
from benchmarks.network import Method
from benchmarks.network_server import placed

from shoal.errors import JobError
from shoal.job import Job, Layout
from shoal.job.server import ServerOptions
from shoal.job.train import TrainOptions

REASON = namespaces.why_not()
needs_hosts = pytest.mark.skipif(bool(REASON), reason=REASON or "-")
NETNS = Path("/run/netns")
MAKES_HOSTS = (
    # Where these tests run in a shell's background, Ctrl-C would be ignored.
    "import signal, time; from benchmarks.hosts import Hosts, terminable\n"
    "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
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


@pytest.mark.parametrize("text", [*network.METHODS, *network.MORE])
def test_every_method_is_one_of_this_shoal(text):
    base = Job(layout=Layout(replicas=4), train=TrainOptions(steps=100, global_batch=4))
    method = Method.of(text)
    job = method.job(base)
    assert method.by_hand or (job.sync.name, job.sync.codec) == (method.sync, method.codec)
    assert method.period(job) == (50 if method.sync in ("local", "gossip") else 1 if method.sync != "server" else 50)


def test_servers_are_with_workers_or_apart():
    """A part that is on the first host is started with the run."""
    job = Job(layout=Layout(replicas=3), server=ServerOptions(shards=4))
    workers = {"worker 1": 1, "worker 2": 2}
    assert placed(job, 3) == {**workers, "server 1": 1, "server 2": 2}
    assert placed(job, 4) == {**workers, **{f"server {number}": 3 for number in range(4)}}
    assert placed(job, 5) == {**workers, "server 0": 3, "server 1": 4, "server 2": 3, "server 3": 4}


def test_all_are_the_usual_methods_and_more(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("sys.argv", ["network.py", "--methods", "all", "--server-hosts", "2", "--out", str(tmp_path)])
    asked = network.options()
    assert (asked.methods, asked.server_hosts) == ([*network.METHODS, *network.MORE], 2)
    assert len(set(asked.methods)) == len(asked.methods)
    monkeypatch.setattr("sys.argv", ["network.py", "--server-hosts", "-1"])
    with pytest.raises(SystemExit):
        network.options()


@pytest.mark.parametrize(
    ("option", "value", "why"),
    [("--workers", "1", "nobody to send to"), ("--rate", "100", "its unit"), ("--rate", "0mbit", "its unit")],
)
def test_a_network_of_nobody_or_of_no_rate_is_refused(option, value, why, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["network.py", "--rate", "1Gbit", option, value])
    with pytest.raises(SystemExit):
        network.options()
    assert why in capsys.readouterr().err


def test_a_run_with_hosts_for_servers_is_measured_by_itself(monkeypatch, tmp_path):
    """And on loopback, where there are none, it is the same run."""
    made: list[tuple[int, str]] = []

    class Some:
        def __init__(self, count: int, rate: str):
            made.append((count, rate))

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(network, "Hosts", Some)
    monkeypatch.setattr(network.network_server, "train", lambda *_: {"losses": [[2, 1.0]]})
    asked = SimpleNamespace(workers=2, server_hosts=0, rows=1, every=1, steps=2, out=tmp_path)
    base = Job(layout=Layout(replicas=2), train=TrainOptions(steps=100, global_batch=4))
    bench = network.Bench(asked, SimpleNamespace(fingerprint="text"), base, None)
    for asked.server_hosts in (0, 1):
        for rate in ("100mbit", "", "100mbit"):
            bench.serve(Method.of("server:mode=bsp/none"), 1e-3, 0, None, 2, rate)
    assert made == [(2, "100mbit"), (3, "100mbit")]
    assert len(list(tmp_path.glob("serve-*.json"))) == 3


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

    # Steps alone need no losses, and were timed already.
    monkeypatch.setattr("sys.argv", [*arguments, "allreduce/none", "--only-steps"])
    monkeypatch.setattr(network.Bench, "train", lambda *_: pytest.fail("a loss"))
    network.main()
    told = json.loads(capsys.readouterr().out)["rows"]
    same = ("sync", "codec", "seconds_per_step", "bytes_per_token", "rate", "workers")
    assert told == [{name: row[name] for name in same} for row in rows]


@pytest.mark.parametrize(("own", "steps"), [(1, 20), (8, 24), (50, 100)])
def test_whole_rounds_of_a_server_are_timed(monkeypatch, tmp_path, own, steps):
    asked = SimpleNamespace(timed=20, lr=[1e-3], rate="1mbit", workers=2)
    bench = network.Bench(asked, None, None, ExitStack())
    ran = []

    def serve(method, lr, seed, target, longest, rate, least):
        ran.append((target, longest, rate, least))
        return {"total_seconds": 6.0, "steps": longest, "moved": 100.0, "tokens": 50.0}

    monkeypatch.setattr(bench, "serve", serve)
    row = bench.timed_row(network.Method.of(f"server:mode=asp,local_steps={own}/none"))
    assert ran == [(None, steps, "1mbit", steps)]
    assert (row["seconds_per_step"], row["bytes_per_token"]) == (6.0 / steps, 2.0)


def parameters() -> int:
    """Of the tiny model with single bytes for tokens: embedding, two blocks, the last norm."""
    hidden, middle, vocabulary = 32, 64, 257
    return vocabulary * hidden + 2 * (4 * hidden * hidden + 3 * hidden * middle + 2 * hidden) + hidden
