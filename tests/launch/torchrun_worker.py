"""A program for torchrun: prints its seat, a sum over all ranks, and where all processes of the run listen."""

from __future__ import annotations

import json
import os
from typing import Any

import torch
import torch.distributed as dist

from shoal.launch import torchrun
from shoal.mesh import Seat
from tests.launch import cases


def work(seat: Seat) -> list[Any]:
    listening = cases.listening(seat)
    value = torch.full((2,), 1.0 + seat.member)
    dist.all_reduce(value)
    dist.destroy_process_group()
    return [[seat.member, seat.world, seat.local, seat.neighbours], value.tolist(), listening]


if __name__ == "__main__":
    # One write: the workers share this pipe, and print may write a line's end by itself.
    os.write(1, f"{json.dumps(torchrun.run('tests.launch.torchrun_worker:work', {}))}\n".encode())
