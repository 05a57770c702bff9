"""How many cores this process may use, and what that means for the number of workers."""

from __future__ import annotations

import os
from pathlib import Path

QUOTA = Path("/sys/fs/cgroup/cpu.max")
DEVICES = Path("/dev")


def cores() -> int:
    """Cores that the scheduler and the container's quota leave to this process, at least 1."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if QUOTA.exists():
        limit, period = QUOTA.read_text().split()
        if limit != "max":
            allowed = min(allowed, round(int(limit) / int(period)))
    return max(1, allowed)


def has_driver() -> bool:
    """Whether an NVIDIA driver shows GPUs here. Torch would know more, but takes a second to import."""
    return any(DEVICES.glob("nvidia[0-9]*")) or (DEVICES / "dxg").exists()  # dxg: under Windows


def threads_per_rank(threads: int, neighbours: int) -> int:
    """`threads`, or where it is 0 an equal part of the cores among the ranks of this machine, at least 1."""
    return threads or max(1, cores() // neighbours)


def too_many_workers(workers: int) -> str:
    """The warning for more workers than cores on this machine; empty if there is nothing to warn of.

    So it is where there are GPUs: each worker has its own, and fewer would be slower.
    """
    there = cores()
    if workers <= there or has_driver():
        return ""
    return f"{workers} workers share {there} core{'s' * (there > 1)}; {there} would be faster"
