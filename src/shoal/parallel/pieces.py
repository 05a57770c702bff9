"""Which pieces of the model's canonical tensors this rank has, where they lie in its parameters, and the sum of their
gradients where several ranks hold the same and each has seen a part."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from types import EllipsisType

import torch
import torch.distributed as dist
from torch import Tensor, nn

from shoal.mesh import Mesh
from shoal.models.storage import Stored, stored_in
from shoal.parallel.flat import Flat, boxes
from shoal.parallel.fsdp import is_sharded, local_gradient, rows_here
from shoal.parallel.tensor import Cut
from shoal.shard import Shard

Index = int | slice | EllipsisType
"""Where a shard lies in what this rank has of a parameter."""


@dataclass
class Part:
    """A stage's share of the model, on meta.

    blocks: the units in which parameters are gathered. cuts: parameter -> the piece that the tensor axis or the expert
    axis leaves of it, where there is one. shared: parameters that both the first stage and the last one have, as a tied
    embedding; both get the sum of their gradients, and the first one's counts. experts: modules in the blocks that the
    expert axis has cut; `zero` spreads their parameters over the ranks with the same piece, not over all sharers.
    in_order: every forward pass calls the blocks in their order.
    """

    module: nn.Module
    blocks: Sequence[nn.Module]
    cuts: Mapping[str, Cut] = field(default_factory=dict)
    shared: Sequence[str] = ()
    experts: Sequence[nn.Module] = ()
    in_order: bool = False


@dataclass
class Piece:
    """A shard; what the tensor or expert axis left of its tensor; the parameter that it lies in, and where in it."""

    shard: Shard
    cut: Cut
    parameter: nn.Parameter
    index: Index

    def take_gradient(self) -> None:
        """The shard's gradient is from now on a view of the parameter's."""
        gradient = local_gradient(self.parameter)
        self.shard.grad = None if gradient is None else gradient[self.index]

    def lying_in(self, flat: Flat, stretch_N: Tensor, first: int) -> Iterator[Shard]:
        """What there is of it in the stretch from `first` on of such a tensor: views of that."""
        if self.parameter not in flat.starts:
            return
        index = self.index.start if isinstance(self.index, slice) else self.index
        rows_ahead = index if isinstance(index, int) else 0
        begin = flat.starts[self.parameter] + rows_ahead * prod(self.parameter.shape[1:])
        start, stop = (min(max(edge - begin, 0), self.shard.local.numel()) for edge in (first, first + len(stretch_N)))
        place = begin + start - first
        for offsets, shape in boxes(start, stop, self.shard.local.shape):
            numbers_n = stretch_N[place : place + prod(shape)]
            place += len(numbers_n)
            corner = tuple(o + p for o, p in zip(self.shard.offsets, offsets, strict=True))
            yield replace(self.shard, offsets=corner, local=numbers_n.view(shape), grad=None, owner=True)


def pieces_of(part: Part, stage: int, sharers: Callable[[nn.Parameter], dist.ProcessGroup]) -> Iterator[Piece]:
    """All that this rank has of a stage, in the order of its parameters.

    sharers: the ranks over which `zero` has spread a parameter.
    """
    for name, parameter in part.module.named_parameters():
        local, first = parameter.detach(), 0
        if is_sharded(parameter):
            group = sharers(parameter)
            local, first = rows_here(parameter, group.size(), group.rank())
        stored = stored_in(part.module, name)
        if stored is not None and stored[0][1] is not None:
            for canonical, rows, start, here in _stretches(stored, first, len(local)):
                cut = part.cuts.get(canonical) or Cut((rows, *parameter.shape[1:]), (0,) * parameter.ndim)
                yield _piece(canonical, cut, (cut.offsets[0] + start, *cut.offsets[1:]), local[here], parameter, here)
            continue
        cut = part.cuts.get(name) or Cut(tuple(parameter.shape), (0,) * parameter.ndim)
        if name in part.shared:
            # Rows of the vocabulary, of which the tensor axis has made no copies.
            assert cut.copies == 1, f"{name}: copies along two axes"
            cut = replace(cut, counted=cut.counted and stage == 0, copy=int(stage > 0), copies=2)
        offsets = (cut.offsets[0] + first, *cut.offsets[1:]) if cut.offsets else ()
        if stored is None:
            yield _piece(name, cut, offsets, local, parameter, ...)
            continue
        one = replace(cut, global_shape=cut.global_shape[1:], offsets=cut.offsets[1:])
        for row, tensor in enumerate(local):
            yield _piece(stored[offsets[0] + row][0], one, offsets[1:], tensor, parameter, row)


def _piece(
    name: str, cut: Cut, offsets: tuple[int, ...], local: Tensor, parameter: nn.Parameter, index: Index
) -> Piece:
    return Piece(Shard(name, cut.global_shape, offsets, local, counted=cut.counted), cut, parameter, index)


def sum_over(axis: str, pieces: Sequence[Piece], mesh: Mesh) -> None:
    """Gradients of what several ranks of the axis hold, of which each has seen a part.

    One sum for all, so that they are equal to the last bit on all of these ranks.
    """
    summed = [(p.shard, p.shard.grad, p.cut) for p in pieces if p.cut.summed == axis and p.shard.grad is not None]
    if not summed:
        return
    wide = [_in_whole(gradient, shard, cut) for shard, gradient, cut in summed]
    flat = torch.cat([w.flatten() for w in wide])
    mesh.wait(dist.all_reduce(flat, group=mesh.group(axis), async_op=True))
    for (shard, gradient, cut), w, part in zip(summed, wide, flat.split([w.numel() for w in wide]), strict=True):
        gradient.copy_(_own(part.view_as(w), shard, cut))


def _stretches(stored: Stored, first: int, number: int) -> Iterator[tuple[str, int, int, slice]]:
    """Of a parameter of which `number` rows from `first` on are here, for every stretch: its name, its rows, which of
    them is the first one here, and where they lie in those here. May be none."""
    start = 0
    for name, rows in stored:
        assert rows is not None, f"{name}: stretches and single indices in one parameter"
        here = slice(*(min(max(edge - first, 0), number) for edge in (start, start + rows)))
        yield name, rows, min(max(first - start, 0), rows), here
        start += rows


def _in_whole(gradient: Tensor, shard: Shard, cut: Cut) -> Tensor:
    """The gradient, in zeros of the whole's rows where ranks hold different pieces of it."""
    if cut.everywhere:
        return gradient
    whole = gradient.new_zeros(cut.global_shape)
    whole[_place(shard)] = gradient
    return whole


def _own(total: Tensor, shard: Shard, cut: Cut) -> Tensor:
    """The shard's piece of what `_in_whole` made, summed."""
    return total if cut.everywhere else total[_place(shard)]


def _place(shard: Shard) -> tuple[slice, ...]:
    return tuple(slice(o, o + n) for o, n in zip(shard.offsets, shard.local.shape, strict=True))
