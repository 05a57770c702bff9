"""Seats under torchrun; with the options of the module's docstring everything listens on loopback."""

from __future__ import annotations

import contextlib
import ipaddress
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from shoal import device
from shoal.errors import JobError, RankError, ShoalError
from shoal.launch import elastic, torchrun


def words(*options: str) -> list[str]:
    run = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    return [*run, *options, "-m", "tests.launch.torchrun_worker"]


def start(*options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        words(*options),
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


def documented() -> tuple[list[str], dict[str, str]]:
    """Options and environment of the command that the docstring recommends."""
    assert torchrun.__doc__ is not None
    (command,) = re.findall(r"^    (\w+=1) torchrun --nproc-per-node 2 (.*?) -m ", torchrun.__doc__, re.M | re.S)
    name, value = command[0].split("=")
    return command[1].replace("\\\n", " ").split(), {name: value}


def test_workers_take_their_seats_and_listen_on_loopback():
    options, environment = documented()
    done = start(*options, **environment)
    assert done.returncode == 0, done.stderr
    told = sorted(json.loads(line) for line in done.stdout.splitlines())
    assert [seat for seat, _, _ in told] == [[0, 2, 0, 2], [1, 2, 1, 2]]
    for _, total, listening in told:
        assert total == [3.0, 3.0]
        assert listening
        assert all(ipaddress.ip_address(address).is_loopback for address in listening)


@pytest.mark.parametrize("own_store", [True, False], ids=["the documented command", "torchrun's own store"])
def test_a_second_mesh_of_the_same_ranks_has_keys_of_its_own(own_store):
    options, environment = documented() if own_store else (["--standalone"], {})
    done = start(*options, **environment, SHOAL_TEST_ENTRY="twice")
    assert done.returncode == 0, done.stderr
    told = sorted(json.loads(line) for line in done.stdout.splitlines())
    assert told == [[0, [2.0, 2.0], {"0": 2}], [1, [2.0, 2.0], {"0": 2}]]


def test_workers_end_with_a_torchrun_that_is_killed():
    options, environment = documented()
    launcher = subprocess.Popen(
        words(*options),
        env={**os.environ, "OMP_NUM_THREADS": "1", "SHOAL_TEST_ENTRY": "linger", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert launcher.stdout is not None
    workers = [int(launcher.stdout.readline()) for _ in range(2)]
    try:
        launcher.kill()
        launcher.wait()
        # Liveness: it takes about a second, and without the watch they linger for minutes.
        deadline = time.monotonic() + 30
        while (alive := [pid for pid in workers if Path(f"/proc/{pid}").exists()]) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not alive
    finally:
        launcher.stdout.close()
        for pid in workers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def test_a_mistake_is_said_by_one_rank_and_a_failure_by_each(monkeypatch, tmp_path):
    for name in elastic._SET:
        monkeypatch.setenv(name, "1")
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    said = []
    for rank in range(3):
        (tmp_path / str(rank)).mkdir()
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / str(rank) / "error.json"))
        said.append((elastic.to_be_said(JobError("mistake")), elastic.to_be_said(RankError("failure"))))
    assert said == [(True, True), (False, True), (False, True)]
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "gone" / "0" / "error.json"))
    assert elastic.to_be_said(JobError("mistake"))


def test_without_torchrun_there_is_no_seat():
    assert not elastic.is_worker()
    assert torchrun.seat_from_environment() is None


def test_several_machines_need_an_interface(monkeypatch):
    variable = f"{device.backend(device.of_rank(0)).upper()}_SOCKET_IFNAME"
    for name, value in {"RANK": 0, "WORLD_SIZE": 4, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 2}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("MASTER_ADDR", "192.0.2.1")
    monkeypatch.setenv("MASTER_PORT", "1")
    monkeypatch.delenv(variable, raising=False)
    with pytest.raises(ShoalError, match="no network interface is named"):
        torchrun.seat_from_environment()
    monkeypatch.setenv(variable, "nowhere0")
    with pytest.raises(ShoalError, match="this machine has no network interface nowhere0") as refused:
        torchrun.seat_from_environment()
    assert "lo" in refused.value.fix.removeprefix("it has ").partition(";")[0].split(", ")


def test_several_machines_do_not_meet_on_loopback(monkeypatch):
    """As where a machine's own name means 127.0.1.1 on it, and torchrun was given no other."""
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    for name in ("127.0.1.1", "localhost"):
        monkeypatch.setenv("MASTER_ADDR", name)
        with pytest.raises(ShoalError, match="is one that other machines cannot reach") as refused:
            torchrun._store(0, several=True)
        assert "--local-addr" in refused.value.fix
    torchrun._store(0, several=False).set("key", "value")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return sock.getsockname()[1]


def test_a_port_that_is_taken_for_a_moment_is_waited_for(monkeypatch):
    taken = socket.create_server(("127.0.0.1", 0))
    port = taken.getsockname()[1]
    threading.Timer(0.5, taken.close).start()
    with torchrun._listening("127.0.0.1", port) as sock:
        assert sock.getsockname()[1] == port
        monkeypatch.setattr(torchrun, "_PORT_PATIENCE", 0.2)
        with pytest.raises(RankError, match=f"cannot listen on 127.0.0.1:{port}") as refused:
            torchrun._listening("127.0.0.1", port)
        assert "--master-port" in refused.value.fix
