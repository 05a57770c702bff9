"""A worker in a process of its own, for a test that kills it: python -m tests.sync.server.killed PORT."""

from __future__ import annotations

import sys
import threading
import time

from shoal.sync.server.wire import connect
from tests.sync.server.peers import TRUSTED

SIZE = 64 << 20


def push(port: int) -> None:
    with connect("127.0.0.1", port, credentials=TRUSTED, name="worker 3", timeout=60) as connection:
        connection.send(b"push", [bytes(SIZE)], timeout=600)


def stay(header: bytes, lengths: list[int]) -> None:
    """The head of a frame has come, its payload is on the way."""
    print("in the middle of a pull", flush=True)
    time.sleep(600)


if __name__ == "__main__":
    threading.Thread(target=push, args=(int(sys.argv[1]),), daemon=True).start()
    with connect("127.0.0.1", int(sys.argv[1]), credentials=TRUSTED, name="worker 3", timeout=60) as pulls:
        pulls.send(b"pull", timeout=60)
        pulls.receive(stay, timeout=600)
