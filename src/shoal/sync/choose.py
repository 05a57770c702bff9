"""`codec = auto`: which codec pays on this network, by trying them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from shoal import device
from shoal.mesh import Mesh
from shoal.sync.codec import codec_of
from shoal.sync.encoded import EncodedSum

CODECS = ("int8", "bf16")
"""What it may be: little is lost, and fed back. Fewer bits are the user's choice."""
# A codec that saves less of an exchange than this share is not worth what it loses.
_LEAST = 0.3
# Numbers of the first trial; four times as many each time, until one takes so many seconds: a short one is over before
# a link's buffers are full and connections have found their pace, and on a fast link it is latency.
_FIRST, _LONG_ENOUGH = 1 << 14, 0.3


def choose(mesh: Mesh, codecs: Sequence[str], numbers: int, say: Callable[[str], None]) -> str:
    """The first of these that saves enough, or `none`. All ranks call it and get the same.

    numbers: that a rank sums with other replicas.
    """
    if mesh.layout.replicas == 1:
        say("codec none: there is one replica")
        return "none"
    if mesh.seat.neighbours == mesh.seat.world:
        say("codec none: all replicas are on this machine")
        return "none"
    found = {"none": _seconds(mesh, partial(_sum, mesh), numbers)}
    for name in codecs:
        found[name] = _seconds(mesh, partial(_encoded, mesh, EncodedSum(codec_of(name))), numbers)
        if found[name] <= (1 - _LEAST) * found["none"]:
            break
    best = min(found, key=lambda name: found[name])
    if found[best] > (1 - _LEAST) * found["none"]:
        best = "none"
    told = ", ".join(f"{name} {_short(value)}" for name, value in found.items())
    say(f"codec {best}: an exchange between replicas would take {told}")
    return best


def _seconds(mesh: Mesh, operation: Callable[[Tensor], None], numbers: int) -> float:
    """That an exchange of so many numbers takes, by that of fewer."""
    size = _FIRST
    _trial(mesh, operation, size)  # opens connections
    while (seconds := _trial(mesh, operation, size)) < _LONG_ENOUGH and size < numbers:
        size *= 4
    return seconds * numbers / size


def _trial(mesh: Mesh, operation: Callable[[Tensor], None], size: int) -> float:
    """Seconds that it takes the slowest rank."""
    flat_N = torch.ones(size, device=mesh.device)
    mesh.largest(0.0)  # all begin together
    start = time.perf_counter()
    operation(flat_N)
    device.synchronize(mesh.device)
    return mesh.largest(time.perf_counter() - start)


def _sum(mesh: Mesh, flat_N: Tensor) -> None:
    mesh.wait(dist.all_reduce(flat_N, group=mesh.across_replicas, async_op=True))


def _encoded(mesh: Mesh, summing: EncodedSum, flat_N: Tensor) -> None:
    summing.start(flat_N, mesh.across_replicas)
    summing.finish(mesh.across_replicas, mesh.wait)


def _short(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds >= 1 else f"{1e3 * seconds:.0f} ms"
