"""Facts of the machine against what this process knows of itself."""

from __future__ import annotations

import os
import platform
import socket

import pytest

from shoal.observe import machine


def test_versions():
    found = machine.versions()
    assert found["python"] == platform.python_version()
    assert {"shoal", "torch", "numpy", "tokenizers"} <= set(found)


def test_memory_is_no_more_than_the_machine_has():
    total, available = machine.memory()
    assert 0 < available <= total <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def test_memory_and_cores_of_a_container(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "_CGROUP", tmp_path)
    assert machine.core_limit() is None
    (tmp_path / "memory.max").write_text("50000000\n")
    (tmp_path / "memory.current").write_text("30000000\n")
    (tmp_path / "memory.stat").write_text("anon 5\ninactive_file 10000000\n")
    (tmp_path / "cpu.max").write_text("150000 100000\n")
    assert machine.memory() == (50_000_000, 30_000_000)
    assert machine.core_limit() == 1.5
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert machine.core_limit() is None


@pytest.mark.skipif(not os.path.exists("/proc/self/net/tcp"), reason="no /proc")
def test_listening_names_this_process_sockets():
    with socket.create_server(("127.0.0.1", 0)) as near, socket.create_server(("0.0.0.0", 0)) as far:
        near_port, far_port = near.getsockname()[1], far.getsockname()[1]
        found = machine.listening()
        assert f"127.0.0.1:{near_port}" in found
        assert f"0.0.0.0:{far_port}" in found
    assert f"127.0.0.1:{near_port}" not in machine.listening()


@pytest.mark.parametrize(
    ("address", "near"),
    [
        ("127.0.0.1:80", True),
        ("::1:80", True),
        ("::ffff:127.0.0.1:80", True),
        ("0.0.0.0:80", False),
        (":::80", False),
        ("10.0.0.5:80", False),
    ],
)
def test_loopback(address, near):
    assert machine.is_loopback(address) == near
