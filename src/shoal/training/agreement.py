"""What several ranks hold alike must be equal to the last bit, or a fault has made them go apart: a broken memory chip,
an operation that gives another result each time, machines whose processors round differently. Nothing else would tell.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from shoal.errors import DivergedError
from shoal.mesh import Mesh
from shoal.shard import Shard

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def check_agreement(mesh: Mesh, alike: Mapping[str, list[Shard]], step: int) -> None:
    """Compares checksums along every axis whose ranks hold the same. To be called on all ranks.

    alike: axis -> what is the same on all of its ranks. Raises DivergedError that names ranks and a tensor, the same on
    all ranks.
    """
    key = f"apart at {step}"
    axes = [axis for axis in alike if getattr(mesh.layout, axis) > 1]
    if not axes:
        return
    found = next(filter(None, [_difference(mesh, axis, alike[axis]) for axis in axes]), "")
    if found:
        mesh.seat.store.set(key, found)
    if mesh.largest(float(bool(found))):
        raise DivergedError(
            f"{mesh.seat.store.get(key).decode()}, which must be equal to the last bit; nothing was saved",
            where=f"step {step}",
            fix="--resume goes on from the checkpoint before; if it comes again, test that machine's memory. "
            "Machines whose processors round differently need sync.compare=false",
        )


def _difference(mesh: Mesh, axis: str, alike: list[Shard]) -> str:
    """What is not the same on all ranks of the axis, and who has it; empty if nothing is."""
    group = mesh.group(axis)
    if not alike:
        return ""
    sums_N = torch.stack([checksum(shard.local) for shard in alike])
    sums_GN = sums_N.new_empty(group.size(), len(alike))
    mesh.wait(dist.all_gather(list(sums_GN.unbind()), sums_N, group=group, async_op=True))
    different = (sums_GN != sums_GN[0]).any(0).nonzero().flatten().tolist()
    if not different:
        return ""
    ranks, sums_G = dist.get_process_group_ranks(group), sums_GN[:, different[0]]
    odd = [rank for rank, value in zip(ranks, sums_G, strict=True) if value != sums_G.mode().values]
    # Of two that differ, nobody knows which is right.
    who = f"rank {odd[0]} differs" if len(odd) == 1 and len(ranks) > 2 else f"ranks {_list(ranks)} differ"
    more = f" and {len(different) - 1} more" if len(different) > 1 else ""
    return f"{who} along {axis} in '{alike[different[0]].name}'{more}"


def checksum(tensor: Tensor) -> Tensor:
    """The sum of its elements' bits as whole numbers, modulo 2⁶⁴ (int64 scalar): another one for any single change."""
    return tensor.detach().contiguous().view(_BITS[tensor.element_size()]).sum(dtype=torch.int64)


def _list(ranks: list[int]) -> str:
    *others, last = map(str, ranks)
    return f"{', '.join(others)} and {last}"
