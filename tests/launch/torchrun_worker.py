"""A program for torchrun: prints its seat, a sum over all ranks, and where all processes of the run listen.

With SHOAL_TEST_ENTRY=linger it prints its process id, and then does nothing for minutes; with `twice` it sums over two
meshes, one after the other, as two calls of `shoal.parallelize` build them.
"""

from __future__ import annotations

import json
import os
import time
from typing import Any

import torch
import torch.distributed as dist

from shoal.job import Layout
from shoal.launch import torchrun
from shoal.mesh import Seat, build
from tests.launch import cases


def work(seat: Seat) -> list[Any]:
    listening = cases.listening(seat)
    value = torch.full((2,), 1.0 + seat.member)
    dist.all_reduce(value)
    dist.destroy_process_group()
    return [[seat.member, seat.world, seat.local, seat.neighbours], value.tolist(), listening]


def linger(seat: Seat) -> int:
    os.write(1, f"{os.getpid()}\n".encode())
    time.sleep(300)
    return 0


def twice(seat: Seat) -> list[Any]:
    sums = []
    for layout in ("replicas=2", "fsdp=2"):
        again = torchrun.seat_from_environment()
        assert again is not None
        mesh = build(Layout.parse(layout), again)
        sums.append(mesh.largest(1.0 + mesh.rank))
        mesh.close()
    return [seat.member, sums, dict(seat.built)]


if __name__ == "__main__":
    # One write: the workers share this pipe, and print may write a line's end by itself.
    entry = os.environ.get("SHOAL_TEST_ENTRY", "work")
    os.write(1, f"{json.dumps(torchrun.run(f'tests.launch.torchrun_worker:{entry}', {}))}\n".encode())
