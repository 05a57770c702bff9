"""The process that keeps a group's key-value store, so that the store outlives any rank."""

from __future__ import annotations

import signal
import socket

from shoal.launch.forkserver import set_name

HOST = "127.0.0.1"


def listen() -> socket.socket:
    """A socket on a free port of the loopback interface."""
    sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    sock.bind((HOST, 0))
    sock.listen(socket.SOMAXCONN)
    return sock


def main(sock: socket.socket) -> int:
    """Serves until it is killed."""
    # Here, because the launcher, which only listens, starts without torch.
    import torch.distributed as dist

    set_name("shoal-store")
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    port = sock.getsockname()[1]
    # Without a socket of ours the store would listen on all interfaces.
    store = dist.TCPStore(HOST, port, is_master=True, wait_for_workers=False, master_listen_fd=sock.detach())
    while store is not None:
        signal.pause()
    return 0
