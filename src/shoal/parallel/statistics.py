"""The running statistics of batch norms (Ioffe and Szegedy 2015, arXiv:1502.03167), the same on all ranks.

Each rank sees its own micro-batches only. A running statistic is moved by each of them in turn, r <- (1 - m) r + m s,
so what n of them make of it is (1 - m)^n r plus a sum that does not depend on r. Hence what one process would have that
computes all micro-batches, rank after rank, follows from what each rank has: nothing is averaged, and nothing is lost.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from shoal.errors import LayoutError
from shoal.job import Layout
from shoal.mesh import Mesh
from shoal.parallel.collectives import ALL_GATHER


def momenta(module: nn.Module) -> dict[str, float]:
    """Name of each running statistic that training moves -> m; 0 of counts, to which every micro-batch adds."""
    found: dict[str, float] = {}
    for name, part in norms(module):
        if not part.track_running_stats:
            continue
        if part.momentum is None:
            what = f"'{name}' has momentum=None, a plain average over all micro-batches so far"
            raise LayoutError(what, fix="a momentum, such as 0.1; or a layout of one rank")
        prefix = f"{name}." if name else ""
        found |= {f"{prefix}running_mean": part.momentum, f"{prefix}running_var": part.momentum}
        found[f"{prefix}num_batches_tracked"] = 0.0
    return found


def norms(module: nn.Module) -> list[tuple[str, nn.modules.batchnorm._NormBase]]:
    """The norms, by name, that compute with the statistics of a micro-batch, or keep running ones."""
    parts = [(n, p) for n, p in module.named_modules() if isinstance(p, nn.modules.batchnorm._NormBase)]
    return [(name, part) for name, part in parts if part.training and not _of_a_sample(part)]


def _of_a_sample(norm: nn.modules.batchnorm._NormBase) -> bool:
    return isinstance(norm, nn.modules.instancenorm._InstanceNorm) and not norm.track_running_stats


def loose(who: str, layout: Layout) -> LayoutError:
    """What is said of a norm where micro-batches may have another size in another layout."""
    return LayoutError(
        f"{who} computes with the statistics of a micro-batch, so layouts agree only where that has the same size",
        where=f"layout {layout}",
        fix="give micro_batch=8, say, in every layout that is to agree; or take GroupNorm or LayerNorm",
    )


def called_norm(out: Tensor) -> bool:
    """Whether backward from `out` passes through a batch norm, module or function, that took statistics of samples.

    (Those of one sample are its own: an instance norm is computed as a batch norm of a single sample.)
    """
    todo: list[Any] = [out.grad_fn] if out.grad_fn is not None else []
    seen = set(todo)
    while todo:
        node = todo.pop()
        is_norm = "BatchNorm" in node.name() and getattr(node, "_saved_training", True)
        if is_norm and node._input_metadata[0].shape[0] > 1:
            return True
        before = {n for n, _ in node.next_functions if n is not None} - seen
        seen |= before
        todo += before
    return False


class RunningStatistics:
    """Those of this rank's modules."""

    def __init__(self, momenta: dict[str, float], modules: Iterable[nn.Module], mesh: Mesh):
        self.mesh = mesh
        found = {name: buffer for module in modules for name, buffer in module.named_buffers() if name in momenta}
        self.buffers = [found[name] for name in sorted(found)]
        self.kept = [1 - momenta[name] for name in sorted(found)]

    def begin(self) -> None:
        """Before the step's forward passes."""
        self._before = self._flat()

    @torch.no_grad()
    def end(self, micro_batches: int) -> None:
        """After them, on all ranks. micro_batches: of each rank, equally many."""
        layout = self.mesh.layout
        if not self.buffers:
            return
        if layout.fsdp > 1:
            self._follow(self.mesh.sharers, micro_batches)
        if layout.replicas > 1:
            self._follow(self.mesh.across_replicas, micro_batches * layout.fsdp)

    def _follow(self, group: dist.ProcessGroup, micro_batches: int) -> None:
        """Each rank of the group goes on where the one before it has ended."""
        mine = self._flat()
        all_RN = mine.new_empty(group.size(), mine.numel())
        ALL_GATHER(all_RN.view(-1), mine, group=group)
        sizes = torch.tensor([b.numel() for b in self.buffers], device=mine.device)
        kept = torch.tensor(self.kept, dtype=mine.dtype, device=mine.device).pow(micro_batches).repeat_interleave(sizes)
        moved = self._before
        for after in all_RN:
            moved = kept * moved + (after - kept * self._before)
        for buffer, piece in zip(self.buffers, moved.split(sizes.tolist()), strict=True):
            buffer.copy_(piece.view_as(buffer))

    def _flat(self) -> Tensor:
        """In float64, which holds counts exactly."""
        parts = [b.detach().double().flatten() for b in self.buffers]
        return torch.cat(parts) if parts else torch.empty(0, dtype=torch.float64)
