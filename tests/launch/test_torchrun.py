"""Seats under torchrun; with the options of the module's docstring everything listens on loopback."""

from __future__ import annotations

import ipaddress
import json
import os
import re
import subprocess
import sys

import pytest

from shoal import device
from shoal.errors import ShoalError
from shoal.launch import torchrun


def start(*options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", *options]
    return subprocess.run(
        [*command, "-m", "tests.launch.torchrun_worker"],
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


def test_without_torchrun_there_is_no_seat():
    assert not torchrun.is_worker()
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
