"""A rank that torchrun started, instead of our fork server.

torchrun's own store listens on all interfaces, also with --standalone or --master-addr 127.0.0.1. On one
machine, this keeps everything on loopback (the rendezvous is a file, and the store is ours):

    TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 torchrun --nproc-per-node 2 --local-addr 127.0.0.1 \
        --rdzv-backend c10d --rdzv-conf store_type=file -m shoal train recipes/quickstart.toml

On several (docs/several-machines.md), with a folder that all of them have, this keeps everything on the interface that
is named; ADDRESS is the machine's own there:

    GLOO_SOCKET_IFNAME=eth0 TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 torchrun --nnodes 4 --nproc-per-node 1 \
        --local-addr ADDRESS --rdzv-backend c10d --rdzv-conf store_type=file --rdzv-endpoint /shared/meet-1 \
        -m shoal train recipes/quickstart.toml --run-dir /shared/run-1 --data.cache /shared/cache
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import os
import socket
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from functools import cache
from typing import TYPE_CHECKING, Any

import msgspec

from shoal import errors, operations
from shoal.connections import Connections, PeerGone
from shoal.errors import RankError, ShoalError
from shoal.launch import waits
from shoal.launch.cores import threads_per_rank
from shoal.launch.elastic import is_mistake, is_worker
from shoal.launch.forkserver import resolve

if TYPE_CHECKING:
    from torch.distributed import TCPStore

    from shoal.mesh import Seat

# Taken as early as can be: importing torch takes long enough for torchrun to be killed meanwhile.
_PARENT = os.getppid()
# Seconds that rank 0, which may keep the store, gives the others to read what it told them before it goes on.
_HEARD = 10.0
# Seconds that rank 0 waits for torchrun's port to be free.
_PORT_PATIENCE = 30.0


def run(entry: str, args: dict[str, Any], threads: int = 0) -> Any:
    """What `entry(seat, **args)` returns in this rank. threads: 0 = an equal part of this machine's cores.

    What it raises is also told to torchrun, which prints the first failure of all ranks last, with its traceback;
    so a mistake of the user's is not. The process ends within seconds when torchrun is killed.
    """
    threading.Thread(target=_end_with_parent, daemon=True).start()
    import torch
    from torch.distributed.elastic.multiprocessing.errors import record

    from shoal import device

    seat = seat_from_environment()
    assert seat is not None, "not started by torchrun"
    torch.set_num_threads(threads_per_rank(threads, seat.neighbours))

    @record
    def value_or_mistake() -> Any:
        try:
            return resolve(entry)(seat, **args)
        except ShoalError as error:
            if is_mistake(error):
                return error
            raise
        except Exception as error:
            doing = operations.doing(error)
            if device.peer_gone(error) and (what := waits.alone(doing, seat.member)):
                fix = "see what it says; if it was only slow, a longer sync.timeout"
                lost = error.lost if isinstance(error, PeerGone) else ""
                what += f", and lost {lost}" if lost else ", gone or late"
                raise RankError(what, where=f"rank {seat.member}", fix=fix) from error
            raise

    value = value_or_mistake()
    if isinstance(value, ShoalError):
        raise value
    return value


def _end_with_parent() -> None:
    """torchrun cannot end its workers when it is killed itself; nobody is left who could save or go on."""
    while os.getppid() == _PARENT:
        time.sleep(1.0)
    os._exit(1)


def from_rank_0(seat: Seat, key: str, make: Callable[[], Any]) -> Any:
    """What `make()` returns in rank 0, which alone calls it; any JSON. A ShoalError that it raises is raised in all."""
    if seat.member > 0:
        told = _told(seat, key)
        if "error" in told:
            kind, what, where, fix = told["error"]
            raise getattr(errors, kind)(what, where=where, fix=fix)
        return told["value"]
    try:
        value = make()
    except ShoalError as error:
        _tell(seat, key, {"error": (type(error).__name__, error.what, error.where, error.fix)})
        raise
    _tell(seat, key, {"value": value})
    return value


def _tell(seat: Seat, key: str, what: dict[str, Any]) -> None:
    from torch.distributed import DistError

    seat.store.set(key, msgspec.json.encode(what).decode())
    with contextlib.suppress(DistError):
        seat.store.wait([f"{key}-{rank}" for rank in range(1, seat.world)], timedelta(seconds=_HEARD))


def _told(seat: Seat, key: str) -> dict[str, Any]:
    from torch.distributed import DistError

    try:
        # However long rank 0 prepares text; if it dies, torchrun ends everybody.
        seat.store.wait([key], timedelta(days=30))
        told = msgspec.json.decode(seat.store.get(key), type=dict[str, Any])
        seat.store.set(f"{key}-{seat.member}", "")
    except DistError:
        raise RankError("rank 0 has ended", where=f"rank {seat.member}", fix="see its message") from None
    return told


def seat_from_environment() -> Seat | None:
    """The seat that torchrun gave this process; None if torchrun did not start it.

    It is the same one however often this is called, with one store: rank 0 cannot open a second on torchrun's port.
    On one machine everything goes over loopback. ShoalError if there are several and no interface is named.
    """
    if not is_worker():
        return None
    from shoal import device

    rank, world, local, neighbours = (
        int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    )
    if neighbours == world:
        os.environ.update(device.loopback_environment())
    else:
        device.require_interface()
    return _seat(rank, world, local, neighbours)


@cache
def _seat(rank: int, world: int, local: int, neighbours: int) -> Seat:
    from torch.distributed import PrefixStore

    from shoal.mesh import Seat

    # torchrun may start everybody again on the same store.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    with Connections() as asked_after:
        store = _store(rank, neighbours < world)
    asked_after.close()
    return Seat(rank, world, local, neighbours, PrefixStore(f"shoal-{attempt}", store))


def _listening(host: str, port: int) -> socket.socket:
    """On torchrun's port. It has looked for a free one, and let go of it; until we come, somebody's connection to
    another place may have it for a moment."""
    deadline = time.monotonic() + _PORT_PATIENCE
    while True:
        try:
            return socket.create_server((host, port))
        except OSError as error:
            if error.errno != errno.EADDRINUSE or time.monotonic() > deadline:
                raise RankError(
                    f"cannot listen on {host}:{port}, which torchrun has named: {error.strerror}",
                    fix="start it again, or name a free one with --master-port",
                ) from error
            time.sleep(0.1)


def _is_loopback(host: str) -> bool:
    """Whether it means this machine alone, as many machines' own names do."""
    try:
        found = {str(info[4][0]) for info in socket.getaddrinfo(host, None)}
    except OSError:
        return False  # what is wrong with it, listening there says
    return all(ipaddress.ip_address(address).is_loopback for address in found)


def _store(rank: int, several: bool) -> TCPStore:
    """torchrun's store, where it has one for its workers, else one that rank 0 keeps. several: machines."""
    from torch.distributed import DistError, TCPStore

    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    if rank != 0 or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        try:
            return TCPStore(host, port, is_master=False)
        except DistError as error:
            fix = "each machine's torchrun is given its own address on the common network: --local-addr"
            raise RankError(f"cannot reach the store at {host}:{port}", where=f"rank {rank}", fix=fix) from error
    if several and _is_loopback(host):
        raise ShoalError(
            f"torchrun's address of this machine, {host}, is one that other machines cannot reach",
            where="MASTER_ADDR",
            fix="give torchrun this machine's address on the common network: --local-addr",
        )
    with _listening(host, port) as sock:
        file = sock.detach()
    return TCPStore(host, port, is_master=True, wait_for_workers=False, master_listen_fd=file)
