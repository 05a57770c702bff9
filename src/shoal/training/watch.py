"""What a module that shoal does not know does besides computing: it draws random numbers, and writes buffers."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from collections.abc import Set as AbstractSet
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn

from shoal.mesh import Mesh


class Watch:
    """Gives each rank random numbers of its own for its steps, and says after the first what depends on the layout."""

    def __init__(self, modules: Sequence[nn.Module], mesh: Mesh, known: AbstractSet[str]):
        """known: buffers that are not written, or of which it is known what becomes of them."""
        self.modules, self.mesh, self.known = modules, mesh, known
        self._first = True
        # Ranks that compute other samples or other layers draw other numbers; those of the tensor axis the same.
        place = mesh.reader * mesh.layout.pipeline + mesh.stage
        seed = torch.tensor([torch.initial_seed() % 2**62], device=mesh.device)
        if mesh.world > 1:
            dist.broadcast(seed, 0, group=mesh.everyone)
        self._seed = int(seed.item()) + 1_000_003 * place
        self._generators: list[Tensor] = []

    @contextmanager
    def step(self) -> Iterator[None]:
        """Around a step's forward and backward passes. The process's own generators stay as they were."""
        if self.mesh.world == 1:
            yield
            return
        where, buffers = self.mesh.device, self._buffers() if self._first else {}
        with torch.random.fork_rng([] if where.type == "cpu" else [where], device_type=where.type):
            self._restore()
            before = self._states()
            yield
            self._generators = self._states()
        if self._first:
            self._first = False
            drew = not all(map(torch.equal, before, self._generators))
            self._warn(bool(self.mesh.largest(float(drew))), buffers)

    def _restore(self) -> None:
        if not self._generators:
            torch.manual_seed(self._seed)
            return
        torch.set_rng_state(self._generators[0])
        for state in self._generators[1:]:
            torch.get_device_module(self.mesh.device).set_rng_state(state, self.mesh.device)

    def _states(self) -> list[Tensor]:
        where = self.mesh.device
        further = [] if where.type == "cpu" else [torch.get_device_module(where).get_rng_state(where)]
        return [torch.get_rng_state(), *further]

    def _buffers(self) -> dict[str, Tensor]:
        """A copy of those that are not known, where several ranks have other micro-batches."""
        if self.mesh.layout.readers == 1:
            return {}
        named = [pair for module in self.modules for pair in module.named_buffers()]
        return {name: buffer.detach().clone() for name, buffer in named if name not in self.known}

    def _warn(self, drew: bool, before: dict[str, Tensor]) -> None:
        if drew and self.mesh.rank == 0:
            what = "the module draws random numbers, from each rank's own generator"
            warnings.warn(f"{what}: with dropout, layouts agree on average only", stacklevel=5)
        after = self._buffers()
        written = [name for name, old in before.items() if name in after and not _equal(old, after[name])]
        if written and (self.mesh.reader, self.mesh.tensor) == (0, 0):
            what = f"'{written[0]}' is written by the forward pass: each rank keeps its own, the first one's are saved"
            warnings.warn(f"{what}, and so it depends on the layout", stacklevel=5)


def _equal(old: Tensor, new: Tensor) -> bool:
    """Also where both are not a number."""
    return old.shape == new.shape and bool(((old == new) | ((old != old) & (new != new))).all())
