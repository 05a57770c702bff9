"""A rank that torchrun started, instead of our fork server.

torchrun's own store listens on all interfaces, also with --standalone or --master-addr 127.0.0.1. On one
machine, this keeps everything on loopback (the rendezvous is a file, and the store is ours):

    TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 torchrun --nproc-per-node 2 --local-addr 127.0.0.1 \
        --rdzv-backend c10d --rdzv-conf store_type=file -m shoal.cli.main train recipes/quickstart.toml
"""

from __future__ import annotations

import os
import socket
from typing import TYPE_CHECKING, Any

from shoal.launch.cores import threads_per_rank
from shoal.launch.forkserver import resolve

if TYPE_CHECKING:
    from torch.distributed import TCPStore

    from shoal.mesh import Seat

# Unlike the first four, which clusters also set for whole machines, the last two are torchrun's alone.
_SET = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


def is_worker() -> bool:
    """Whether torchrun started this process. Does not import torch."""
    return all(name in os.environ for name in _SET)


def run(entry: str, args: dict[str, Any], threads: int = 0) -> Any:
    """What `entry(seat, **args)` returns in this rank. threads: 0 = an equal part of this machine's cores.

    What it raises is also told to torchrun, which prints the first failure of all ranks last.
    """
    import torch
    from torch.distributed.elastic.multiprocessing.errors import record

    seat = seat_from_environment()
    assert seat is not None, "not started by torchrun"
    torch.set_num_threads(threads_per_rank(threads, seat.neighbours))
    return record(resolve(entry))(seat, **args)


def seat_from_environment() -> Seat | None:
    """The seat that torchrun gave this process; None if torchrun did not start it.

    On one machine everything goes over loopback. ShoalError if there are several and no interface is named.
    """
    if not is_worker():
        return None
    from torch.distributed import PrefixStore

    from shoal import device
    from shoal.mesh import Seat

    rank, world, local, neighbours = (
        int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    )
    if neighbours == world:
        os.environ.update(device.loopback_environment())
    else:
        device.require_interface()
    # torchrun may start everybody again on the same store.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return Seat(rank, world, local, neighbours, PrefixStore(f"shoal-{attempt}", _store(rank)))


def _store(rank: int) -> TCPStore:
    """torchrun's store, where it has one for its workers, else one that rank 0 keeps."""
    from torch.distributed import TCPStore

    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    if rank != 0 or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return TCPStore(host, port, is_master=False)
    with socket.create_server((host, port)) as sock:
        file = sock.detach()
    return TCPStore(host, port, is_master=True, wait_for_workers=False, master_listen_fd=file)
