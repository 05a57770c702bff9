"""Several hosts on one machine: network namespaces on a bridge, each with an interface whose rate is limited for real.

    with Hosts(4, "100mbit") as hosts:
        subprocess.run(hosts.command(2, "ip address"))   # as on the third one; or `enter(hosts.names[2])` in a process

Each host has loopback of its own and `eth0`, 10.77.0.1 and so on; the file system and the processors are shared.
`tc tbf` shapes both ends of every link, so a host neither sends nor receives faster than the rate. The bridge is in a
namespace of its own too: nothing of the machine's network is touched. Linux, iproute2, root.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

INTERFACE = "eth0"
# Namespaces of ours begin so; the number of the process that made them follows.
_PREFIX = "shoal-bench-"
_NAMED = Path("/run/netns")
_CLONE_NEWNET = 0x40000000  # linux/sched.h


def why_not() -> str:
    """Why this machine cannot have hosts; empty if it can."""
    if not sys.platform.startswith("linux"):
        return "network namespaces are Linux's"
    if os.geteuid() != 0:
        return "making network namespaces needs root"
    missing = [word for word in ("ip", "tc") if shutil.which(word) is None]
    if missing:
        return f"{' and '.join(missing)} of iproute2 not found"
    trial = f"{_PREFIX}{os.getpid()}-try"
    tried = subprocess.run(["ip", "netns", "add", trial], capture_output=True, text=True)
    _remove([trial])
    return f"ip netns add: {tried.stderr.strip()}" if tried.returncode else ""


class Hosts:
    """So many hosts within a `with` block, and nothing of them after it. rate: as `tc` writes it, empty = no limit."""

    def __init__(self, count: int, rate: str = ""):
        own = f"{_PREFIX}{os.getpid()}-{time.monotonic_ns()}"
        self.rate, self._switch = rate, f"{own}-switch"
        self.names = [f"{own}-{i + 1}" for i in range(count)]
        self.addresses = [f"10.77.0.{i + 1}" for i in range(count)]

    def __enter__(self) -> Hosts:
        remove_leftovers()
        try:
            _ip("netns", "add", self._switch)
            _ip("-n", self._switch, "link", "add", "bridge", "type", "bridge")
            _ip("-n", self._switch, "link", "set", "bridge", "up")
            for number, (name, address) in enumerate(zip(self.names, self.addresses, strict=True)):
                self._connect(name, address, f"port{number}")
        except BaseException:
            self.__exit__()
            raise
        return self

    def _connect(self, name: str, address: str, port: str) -> None:
        _ip("netns", "add", name)
        _ip("link", "add", INTERFACE, "netns", name, "type", "veth", "peer", "name", port, "netns", self._switch)
        _ip("-n", self._switch, "link", "set", port, "master", "bridge", "up")
        _ip("-n", name, "link", "set", "lo", "up")
        _ip("-n", name, "address", "add", f"{address}/24", "dev", INTERFACE)
        _ip("-n", name, "link", "set", INTERFACE, "up")
        if self.rate:
            for namespace, end in ((name, INTERFACE), (self._switch, port)):
                limit = ["rate", self.rate, "burst", "256kb", "latency", "50ms"]
                _run("tc", "-n", namespace, "qdisc", "add", "dev", end, "root", "tbf", *limit)

    def __exit__(self, *_: object) -> None:
        _remove([*self.names, self._switch])

    def command(self, host: int, words: Sequence[str]) -> list[str]:
        """The words of a command that runs on this host, numbered from 0."""
        return ["ip", "netns", "exec", self.names[host], *words]

    def silence(self, host: int) -> None:
        """Cuts its cable: from now on nothing arrives there or comes from there, and nobody is told."""
        _ip("-n", self._switch, "link", "set", f"port{host}", "down")


def enter(name: str) -> None:
    """Puts this process on a host: sockets that it makes from now on, in this thread and in later ones, are there.

    Those that it has stay where they are.
    """
    with (_NAMED / name).open() as namespace:
        libc: Any = ctypes.CDLL(None, use_errno=True)
        if libc.setns(namespace.fileno(), _CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"cannot enter {name}: {os.strerror(ctypes.get_errno())}")


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """In the main thread: SIGTERM ends the program as an error does, so that hosts are removed."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def remove_leftovers() -> None:
    """Hosts of processes that are gone: were killed before they could remove them."""
    for name in sorted(path.name for path in _NAMED.glob(f"{_PREFIX}*")):
        maker = name.removeprefix(_PREFIX).split("-")[0]
        if not Path("/proc", maker).exists():
            _remove([name])


def _remove(names: Sequence[str]) -> None:
    """With all that still runs there."""
    for name in names:
        if not (_NAMED / name).exists():
            continue
        inside = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True).stdout
        for pid in map(int, inside.split()):
            if pid != os.getpid():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        subprocess.run(["ip", "netns", "delete", name], capture_output=True)


def _ip(*words: str) -> None:
    _run("ip", *words)


def _run(*words: str) -> None:
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"{' '.join(words)}: {done.stderr.strip()}")
