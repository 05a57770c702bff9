"""Which processes are there, and where do they listen; read from /proc."""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Iterator
from pathlib import Path


def alive(pid: int) -> bool:
    """Whether the process runs. One that has ended but that nobody asks for any more does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def family(pid: int) -> list[int]:
    """The process and all its descendants, as far as they live."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except (FileNotFoundError, ProcessLookupError):
        return [pid]
    return [pid, *(member for child in children for member in family(int(child)))]


def listening(pids: list[int]) -> list[str]:
    """The TCP addresses at which these processes listen, without ports."""
    inodes = set()
    for pid in pids:
        for file in Path(f"/proc/{pid}/fd").iterdir():
            try:
                inodes.add(os.readlink(file))
            except FileNotFoundError:
                continue
    tables = "".join(Path(f"/proc/net/{table}").read_text() for table in ("tcp", "tcp6"))
    return [address for address, inode in listeners(tables) if f"socket:[{inode}]" in inodes]


def listeners(tables: str) -> Iterator[tuple[str, str]]:
    """(address, inode) of each socket that listens, in what the kernel's tables of TCP sockets say."""
    for line in tables.splitlines():
        fields = line.split()
        if fields[3] == "0A":
            # Each group of four bytes is a number in this machine's byte order.
            raw = bytes.fromhex(fields[1].split(":")[0])
            words = (raw[i : i + 4][::-1] for i in range(0, len(raw), 4))
            yield str(ipaddress.ip_address(b"".join(words))), fields[9]
