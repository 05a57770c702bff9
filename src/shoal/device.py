"""The only file that names a backend: which device a rank computes on, and how ranks talk to each other.

Importing it touches no device: the process that ranks are forked from does so, and a GPU that was opened
before the fork is lost to the child.
"""

from __future__ import annotations

import ctypes
import os
import platform
import re
import resource
import socket
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from shoal.errors import ShoalError

# What collectives say when the trouble is another rank's, not ours.
_PEER_GONE = (
    "connection closed by peer",
    "connection reset by peer",
    "connection refused",
    "connection timed out",
    "no route to host",
    "network is unreachable",
    "connection was likely closed",
    "broken pipe",
    "socket closed",
    "socket timeout",
    "timed out waiting",
    "failed to recv",
    "gloo connectfullmesh failed",
    "remote process exited",
)

# glibc's <malloc.h>: how many blocks may be mapped one by one, from which size on, and the free memory above which
# some is given back.
_M_MMAP_MAX, _M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD = -4, -3, -1

# From this size on, ranks that gather weights give memory back: of large blocks what is gathered and its gradient, and
# of activations only the largest.
_GATHERED = 16 << 20

# Seconds that a thread which is not run for the other load of the machine is waited for.
_PATIENCE = 30.0


def kind() -> str:
    """`cuda` where torch finds such a GPU, else `cpu`. Opens the driver: not for a process that will fork."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def count() -> int:
    """Devices of this machine; a CPU is one, however many cores it has."""
    return torch.cuda.device_count() if kind() == "cuda" else 1


def of_rank(local: int) -> torch.device:
    """The device of the rank with this index on its machine; a GPU becomes the process's current one."""
    if kind() == "cpu":
        return torch.device("cpu")
    if local >= count():
        raise ShoalError(
            f"worker {local + 1} of this machine finds no GPU left: there are {count()}",
            fix=f"start at most {count()} workers, or compute on the CPU with CUDA_VISIBLE_DEVICES= (empty)",
        )
    torch.cuda.set_device(local)
    return torch.device("cuda", local)


def backend(where: torch.device) -> str:
    """What `torch.distributed` calls the library that moves this device's tensors."""
    return "nccl" if where.type == "cuda" else "gloo"


def waits_on_host(where: torch.device) -> bool:
    """Whether waiting for a collective blocks the process (a GPU queues it, and the process runs ahead)."""
    return where.type == "cpu"


def loopback_environment() -> dict[str, str]:
    """Environment variables that keep every backend on the loopback interface. Set before the first group."""
    loopback = next((name for _, name in socket.if_nameindex() if name.startswith("lo")), "lo")
    return {"GLOO_SOCKET_IFNAME": loopback, "NCCL_SOCKET_IFNAME": loopback, "TP_SOCKET_IFNAME": loopback}


def require_interface() -> None:
    """ShoalError unless the environment names a network interface of this machine, for ranks on several machines."""
    used = backend(torch.device(kind()))
    variable = f"{used.upper()}_SOCKET_IFNAME"
    given, known = os.environ.get(variable, ""), [name for _, name in socket.if_nameindex()]
    if not given:
        raise ShoalError(
            "ranks are on several machines, and no network interface is named",
            where=variable,
            fix=f"export {variable}=eth0 (`ip -brief address` lists them); tensors travel there unencrypted",
        )
    # NCCL takes beginnings of names, and signs before them.
    unknown = [name for name in given.split(",") if name not in known] if used == "gloo" else []
    if unknown:
        raise ShoalError(
            f"this machine has no network interface {unknown[0]}",
            where=variable,
            fix=f"it has {', '.join(known)}; each machine is given the name of its own",
        )


def peer_gone(error: BaseException) -> bool:
    """Whether the error, or one that led to it, only says that another rank is gone or late."""
    chain: BaseException | None = error
    while chain is not None:
        text = str(chain).lower()
        if isinstance(chain, (dist.DistNetworkError, dist.DistStoreError, ConnectionError)):
            return True
        if isinstance(chain, RuntimeError) and any(said in text for said in _PEER_GONE):
            return True
        chain = chain.__cause__ or chain.__context__
    return False


def out_of_memory(error: BaseException) -> str:
    """What an allocator asked for in vain, e.g. `2.0 GiB`; empty if the error is another."""
    text = str(error)
    if isinstance(error, torch.OutOfMemoryError):
        asked = re.search(r"Tried to allocate ([\d.]+ \w+)", text)
        return asked[1] if asked else "some memory"
    asked = re.search(r"can't allocate memory: you tried to allocate (\d+) bytes", text)
    return f"{int(asked[1]) / 2**30:.3g} GiB" if asked else ""


def let_go() -> None:
    """Before the process ends: until gloo's threads hold nothing of Python's (on Linux; elsewhere nothing is known).

    A collective is over a moment before its thread drops the tensors. Where that is the last reference, the thread
    needs the interpreter, and when this is ending, that aborts the process (torch 2.13: "terminate called without
    an active exception"). Threads that have dropped everything sleep; a hung one does too, and is not waited for.
    """
    deadline, quiet = time.monotonic() + _PATIENCE, 0
    while quiet < 2 and time.monotonic() < deadline:
        quiet = 0 if any(_runs(stat) for stat in Path("/proc/self/task").glob("*/stat")) else quiet + 1
        time.sleep(0.001)


def _runs(stat: Path) -> bool:
    """Whether a thread, of which this is the kernel's line, is one of gloo's and does not sleep."""
    try:
        return re.search(r"\(pt_gloo.*\) [^S]", stat.read_text()) is not None
    except OSError:  # has ended
        return False


def synchronize(where: torch.device) -> None:
    """Waits until the device has done all that it was given. A CPU is never behind."""
    if where.type == "cuda":
        torch.cuda.synchronize(where)


def keep_memory(where: torch.device, gathering: bool = False) -> bool:
    """Has the process keep the memory of freed tensors for those of the next step; whether it does from now on.

    gathering: weights are gathered block by block and freed again (fsdp, context). Then pieces from 16 MiB on are
    given back. Kept, the place of a gathered block is soon taken in part by a small tensor that lives longer, and
    the next block needs a new one: a rank of fsdp=2 came to hold more than one process does alone.

    What a GPU's allocator does anyway. On a CPU, glibc returns every large tensor to the system when it is freed,
    and the next one is made of fresh pages, each of which the kernel zeroes when it is first touched: 33,000 page
    faults in three steps of the benchmark's model, none if memory is kept. The peak is that of a step either way,
    where nothing is gathered.
    Allocators other than glibc's, and what the user has set (MALLOC_…, GLIBC_TUNABLES, LD_PRELOAD), are left alone.
    """
    chosen = any(name.startswith("MALLOC_") for name in os.environ) or any(
        "malloc" in os.environ.get(name, "") for name in ("GLIBC_TUNABLES", "LD_PRELOAD")
    )
    if where.type != "cpu" or chosen:
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # not glibc
        return False
    # A threshold that is set stays; glibc's own moves up with what is freed.
    mapped = mallopt(_M_MMAP_THRESHOLD, _GATHERED) if gathering else mallopt(_M_MMAP_MAX, 0)
    return bool(mapped and mallopt(_M_TRIM_THRESHOLD, -1))


def memory_peak(where: torch.device) -> int:
    """Most bytes in use so far: tensors on a GPU; on a CPU the resident memory of the process."""
    if where.type == "cuda":
        return torch.cuda.max_memory_allocated(where)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def resident(where: torch.device) -> int:
    """Bytes of memory that the process has now, where it computes in that itself; 0 on a GPU, and where nobody says."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:  # not Linux
        return 0
    return pages * resource.getpagesize() if where.type == "cpu" else 0


def name(where: torch.device) -> str:
    """What its maker calls the device, e.g. `NVIDIA H200` or `AMD EPYC 7B13`."""
    if where.type == "cuda":
        return torch.cuda.get_device_name(where)
    for line in _lines("/proc/cpuinfo"):
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def misfit() -> tuple[str, str] | None:
    """(what, what to do) where this torch cannot use the GPUs that it was built for, or the machine's."""
    if torch.cuda.is_available():
        return None
    if torch.version.cuda:
        return (
            f"torch is built for CUDA {torch.version.cuda} but finds no GPU, so everything runs on the CPU",
            "see whether `nvidia-smi` lists a GPU; if there is none, torch's CPU build takes 2 GB less disk",
        )
    if any(Path("/proc/driver/nvidia/gpus").glob("*")):
        return (
            "this machine has an NVIDIA GPU, but torch is built for the CPU only",
            "install torch with CUDA: https://pytorch.org/get-started/locally",
        )
    return None


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []
