"""Which replica the others wait for: seconds that each one waits in exchanges, told along with what is sent anyway."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from shoal import device
from shoal.mesh import Mesh


class Waits:
    """Of exchanges in which all replicas take part.

    A rank counts the seconds in which it does nothing but wait for a collective of the exchange. None of these is over
    before the last rank has come, so whoever comes earlier waits longer by just that: the difference between two ranks
    is how much earlier one came, and no two machines' clocks are compared. Of a replica the mean over its ranks counts.
    On a GPU nothing is counted: there the process does not wait, its queue does.
    """

    def __init__(self, mesh: Mesh):
        self._mesh, self._seconds = mesh, 0.0
        self._told_R = [0.0] * mesh.layout.replicas

    def wait(self, work: dist.Work) -> None:
        """As `Mesh.wait`."""
        start = time.perf_counter()
        self._mesh.wait(work)
        if device.waits_on_host(self._mesh.device):
            self._seconds += time.perf_counter() - start

    def own(self) -> Tensor:
        """This rank's part of a sum over all ranks, float64: at its replica's place, what it has waited since the last
        call. Empty where there is one replica."""
        replicas = self._mesh.layout.replicas
        waited_R = torch.zeros(replicas if replicas > 1 else 0, dtype=torch.float64, device=self._mesh.device)
        if len(waited_R):
            waited_R[self._mesh.replica] = self._seconds / self._mesh.layout.ranks_per_replica
        self._seconds = 0.0
        return waited_R

    def hear(self, waited: Sequence[float]) -> None:
        """The sum of all ranks' `own`."""
        for replica, seconds in enumerate(waited):
            self._told_R[replica] += seconds

    def news(self) -> tuple[float, ...]:
        """Of what was heard since the last call, how much longer each replica waited than the one that waited least, in
        seconds; () where nothing was."""
        told_R, self._told_R = self._told_R, [0.0] * len(self._told_R)
        return tuple(seconds - min(told_R) for seconds in told_R) if any(told_R) else ()


class Heard:
    """Of exchanges in pairs: how long each replica has waited for its partners in all, as far as this one has heard.

    A total only grows, so of two the larger one is the newer: everybody keeps it and passes it on, and what one replica
    tells reaches all others in meetings, as in Demers et al. 1987, "Epidemic Algorithms for Replicated Database
    Maintenance".
    """

    def __init__(self, mesh: Mesh):
        self._mesh = mesh
        self.known_R = torch.zeros(mesh.layout.replicas, dtype=torch.float64)
        self._before_R = self.known_R.clone()

    def add(self, seconds: float) -> None:
        """This replica has waited for a partner."""
        self.known_R[self._mesh.replica] += seconds

    def hear(self, theirs_R: Tensor) -> None:
        """What another one knows."""
        self.known_R = torch.maximum(self.known_R, theirs_R.cpu())

    def own(self) -> Tensor:
        """This rank's part of a sum over all ranks, after which everybody knows what the first ranks of all know of
        their own replicas."""
        own_R = torch.zeros_like(self.known_R)
        if self._mesh.rank % self._mesh.layout.ranks_per_replica == 0:
            own_R[self._mesh.replica] = self.known_R[self._mesh.replica]
        return own_R.to(self._mesh.device)

    def news(self, all_heard: bool = False) -> tuple[float, ...]:
        """Seconds of each replica that are known now and were not when something was told last; () until there is
        something new of each: of whom nothing has been heard, it cannot be said that it waits least.

        all_heard: this one has just heard of all, so that whoever has nothing new has not waited, as a replica without
        a partner; () where nobody has.
        """
        news = (self.known_R - self._before_R).tolist()
        if not (any(news) if all_heard else all(news)):
            return ()
        self._before_R = self.known_R.clone()
        return tuple(news)
