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
# Numbers of the first trial; at most so many times as many each time, until one takes so many seconds: a short one is
# over before a link's buffers are full and connections have found their pace, and on a fast link it is latency.
_FIRST, _MOST, _LONG_ENOUGH = 1 << 10, 4.0, 0.3
# Of less growth than that, nothing new is learned.
_LEAST_GROWTH = 1.5
# Seconds that all trials together are planned for. The promise is 2: where a link slows down under load, a trial takes
# longer than the one before it would have it.
_PLANNED = 1.5


def choose(mesh: Mesh, codecs: Sequence[str], numbers: int, say: Callable[[str], None]) -> str:
    """The first of these that saves enough, or `none`. All ranks call it and get the same, within 2 seconds.

    numbers: that a rank sums with other replicas. (On a network on which six exchanges of a thousand numbers take
    longer than 2 seconds, it takes as long as these do.)
    """
    if mesh.layout.replicas == 1:
        say("codec none: there is one replica")
        return "none"
    if mesh.seat.neighbours == mesh.seat.world:
        say("codec none: all replicas are on this machine")
        return "none"
    ways: dict[str, Callable[[Tensor], None]] = {"none": partial(_sum, mesh)}
    ways |= {name: partial(_encoded, mesh, EncodedSum(codec_of(name))) for name in codecs}
    began = time.perf_counter()

    def trial(name: str, size: int) -> float:
        flat_N = torch.ones(size, device=mesh.device)
        start = time.perf_counter()
        ways[name](flat_N)
        device.synchronize(mesh.device)
        return mesh.largest(time.perf_counter() - start)

    trials = Trials(numbers, trial, lambda: mesh.largest(time.perf_counter() - began))
    return fastest(codecs, trials, "an exchange between replicas", say)


def fastest(codecs: Sequence[str], trials: Trials, what: str, say: Callable[[str], None]) -> str:
    """The first of these that saves enough of an exchange, or `none`. what: is exchanged, for the user."""
    left = len(codecs)
    found = {"none": trials.seconds("none", left)}
    for name in codecs:
        left -= 1
        found[name] = trials.seconds(name, left)
        if found[name] <= (1 - _LEAST) * found["none"]:
            break
    best = min(found, key=lambda name: found[name])
    if found[best] > (1 - _LEAST) * found["none"]:
        best = "none"
    told = ", ".join(f"{name} {_short(value)}" for name, value in found.items())
    say(f"codec {best}: {what} would take {told}")
    return best


class Trials:
    """Exchanges of more and more numbers, each way in its turn, against one deadline for all of them."""

    def __init__(self, numbers: int, trial: Callable[[str, int], float], clock: Callable[[], float]):
        """trial: exchanges so many numbers in this codec; the seconds that it takes the slowest who takes part.

        clock: seconds since the beginning, the same for all who decide.
        """
        self.numbers, self._trial, self._clock = numbers, trial, clock

    def seconds(self, name: str, others: int) -> float:
        """That an exchange of all numbers takes, by that of fewer. others: ways that are yet to be tried after it.

        It takes its part of the time that is left, but tries the smallest size in any case.
        """
        spent = self._clock()
        until = spent + (_PLANNED - spent) / (1 + others)
        size = min(_FIRST, self.numbers)
        seconds = self._trial(name, size)
        if self._clock() + seconds < until:
            # The first opened connections.
            seconds = self._trial(name, size)
        while seconds < _LONG_ENOUGH and size < self.numbers:
            growth = min(_MOST, (until - self._clock()) / max(seconds, 1e-9))
            if growth < _LEAST_GROWTH:
                break
            size = min(self.numbers, int(growth * size))
            seconds = self._trial(name, size)
        return seconds * self.numbers / size


def _sum(mesh: Mesh, flat_N: Tensor) -> None:
    mesh.wait(dist.all_reduce(flat_N, group=mesh.across_replicas, async_op=True))


def _encoded(mesh: Mesh, summing: EncodedSum, flat_N: Tensor) -> None:
    summing.start(flat_N, mesh.across_replicas)
    summing.finish(mesh.across_replicas, mesh.wait)


def _short(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds >= 1 else f"{1e3 * seconds:.0f} ms"
