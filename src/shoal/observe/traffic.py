"""What this process has sent and received over TCP so far, counted by the kernel at its sockets."""

from __future__ import annotations

import os
import socket
import stat
import struct
from collections.abc import Iterable
from contextlib import suppress
from typing import NamedTuple

# Of Linux's struct tcp_info (linux/tcp.h): tcpi_bytes_acked and tcpi_bytes_received, two 64-bit counts side by side.
_COUNTS = struct.Struct("=QQ")
_AT = 120


class Traffic(NamedTuple):
    """Bytes without headers: sent and acknowledged, received. Of sockets that are open now."""

    sent: int
    received: int


def traffic(descriptors: Iterable[int] | None = None) -> Traffic | None:
    """Of these sockets, or of all. None where the system does not tell (anything but Linux). What a GPU's network moves
    by itself is not in it."""
    if not os.path.isdir("/proc/self/fd") or not hasattr(socket, "TCP_INFO"):
        return None
    counts, seen = [], set()
    for descriptor in map(int, os.listdir("/proc/self/fd")) if descriptors is None else descriptors:
        # Another thread may close it meanwhile; then it counts no more.
        with suppress(OSError):
            status = os.fstat(descriptor)
            # Several descriptors may be of one socket.
            if stat.S_ISSOCK(status.st_mode) and status.st_ino not in seen:
                seen.add(status.st_ino)
                counts.append(_counts(descriptor))
    return Traffic(sum(sent for sent, _ in counts), sum(received for _, received in counts))


def _counts(descriptor: int) -> tuple[int, int]:
    borrowed = socket.socket(fileno=descriptor)
    try:
        if borrowed.family not in (socket.AF_INET, socket.AF_INET6) or borrowed.type != socket.SOCK_STREAM:
            return 0, 0
        told = borrowed.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _AT + _COUNTS.size)
        sent, received = _COUNTS.unpack_from(told.ljust(_AT + _COUNTS.size, b"\0"), _AT)
        return sent, received
    finally:
        borrowed.detach()
