"""Facts about this machine that need no measurement and no torch: versions, cores, memory, disk, sockets."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import platform
import shutil
import socket
import sys
from importlib import metadata
from pathlib import Path

_PACKAGES = ("shoal", "torch", "numpy", "tokenizers")
_CGROUP = Path("/sys/fs/cgroup")
# In /proc/net/tcp: state of a socket that waits for connections.
_LISTEN = "0A"


def versions() -> dict[str, str]:
    """Python, and the packages that decide what a run computes."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def system() -> str:
    """`Linux 6.1.0 x86_64, Debian GNU/Linux 12`."""
    release = f"{platform.system()} {platform.release()} {platform.machine()}"
    with contextlib.suppress(OSError):
        return f"{release}, {platform.freedesktop_os_release()['PRETTY_NAME']}"
    return release


def core_limit() -> float | None:
    """Cores' worth of time that the container may use, e.g. 1.5; None without a limit."""
    words = _text(_CGROUP / "cpu.max").split()
    return int(words[0]) / int(words[1]) if words and words[0] != "max" else None


def memory() -> tuple[int, int]:
    """(bytes of the machine or container, bytes of them that are available)."""
    facts = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in _text("/proc/meminfo").splitlines()}
    if not facts:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return total, total
    total, available = facts["MemTotal"], facts["MemAvailable"]
    limit = _text(_CGROUP / "memory.max").strip()
    if limit.isdigit() and int(limit) < total:
        total = int(limit)
        used = int(_text(_CGROUP / "memory.current") or 0)
        available = min(available, total - used + _reclaimable())
    return total, available


def _reclaimable() -> int:
    """Bytes of file cache that count as the container's memory but give way when it needs more."""
    for line in _text(_CGROUP / "memory.stat").splitlines():
        if line.startswith("inactive_file "):
            return int(line.split()[1])
    return 0


def shared_memory() -> tuple[int, int] | None:
    """(bytes, free bytes) of /dev/shm; None where there is none."""
    if not Path("/dev/shm").is_dir():
        return None
    usage = shutil.disk_usage("/dev/shm")
    return usage.total, usage.free


def compiler() -> str | None:
    """Path of the C++ compiler that torch.compile would use on a CPU."""
    return shutil.which(os.environ.get("CXX") or "g++") or shutil.which("clang++")


def listening() -> list[str]:
    """Addresses (`127.0.0.1:29500`) on which this process waits for connections; [] without /proc."""
    sockets = set()
    for file in Path("/proc/self/fd").glob("*"):
        with contextlib.suppress(OSError):
            sockets.add(os.readlink(file))
    found = set()
    for table in ("/proc/self/net/tcp", "/proc/self/net/tcp6"):
        for line in _text(table).splitlines()[1:]:
            words = line.split()
            if words[3] == _LISTEN and f"socket:[{words[9]}]" in sockets:
                found.add(_address(words[1]))
    return sorted(found)


def _address(words: str) -> str:
    """`0100007F:7544` as /proc/net/tcp has it (32 bits each in the machine's order) -> `127.0.0.1:30020`."""
    packed, port = words.split(":")
    parts = [int(packed[i : i + 8], 16).to_bytes(4, sys.byteorder) for i in range(0, len(packed), 8)]
    return f"{ipaddress.ip_address(b''.join(parts))}:{int(port, 16)}"


def is_loopback(address: str) -> bool:
    """Whether only this machine can reach `127.0.0.1:29500`."""
    host = ipaddress.ip_address(address.rpartition(":")[0])
    mapped = getattr(host, "ipv4_mapped", None)
    return (mapped or host).is_loopback


def host() -> str:
    return socket.gethostname()


def _text(path: Path | str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""
