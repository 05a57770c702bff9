"""A module that shoal does not know, as one replica: this rank's part of it, with the values that it came with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from shoal.errors import LayoutError
from shoal.mesh import Mesh
from shoal.parallel.backward import refuse_unrecorded
from shoal.parallel.example import compare, see
from shoal.parallel.graph import trace
from shoal.parallel.linears import split
from shoal.parallel.modes import differs, of_training, written_buffers
from shoal.parallel.partition import Stage, cut
from shoal.parallel.pieces import Part
from shoal.parallel.replica import Replica
from shoal.parallel.tensor import Cut
from shoal.parallel.units import units
from shoal.shard import Shard


@dataclass
class Division:
    """This rank's parts of a module.

    handed: for each stage but the last, what it hands on, on meta. tied: parameters that several stages of the pipeline
    hold -> one like it, on meta. first: parameter or buffer -> the first stage that holds it. by_mode: what evaluation
    would compute differently from a pipeline's stages, which were traced in training mode; empty: nothing.
    """

    parts: dict[int, Part]
    handed: list[tuple[Tensor, ...]]
    tied: dict[str, Tensor]
    first: dict[str, int]
    by_mode: str = ""


def divide(
    module: nn.Module, mesh: Mesh, plan: Mapping[str, str] | None, example: tuple[Tensor, ...] | None
) -> Division:
    """module: with its values, on the mesh's device; it is used up. plan: as for `linears.split`. example: inputs of a
    micro-batch, for a pipeline to trace it, and for tensor to see that a split module still computes the same, forward
    and backward. LayoutError where it cannot be.
    """
    layout = mesh.layout
    if layout.sharers > 1:
        _refuse_unshareable(module, f"layout {layout}")
    if layout.pipeline > 1:
        assert example is not None
        return _into_stages(module, mesh, example)
    cuts: Mapping[str, Cut] = {}
    if layout.tensor > 1:
        assert example is not None
        before = see(module, example)
        cuts = split(module, plan, mesh.group("tensor"))
        compare(before, see(module, example, planned=True), cuts, mesh.group("tensor"))
    part = Part(module, units(module) if layout.sharers > 1 else [], cuts)
    names = (*dict(module.named_parameters()), *dict(module.named_buffers()))
    return Division({0: part}, [], {}, dict.fromkeys(names, 0))


def _refuse_unshareable(module: nn.Module, where: str) -> None:
    """What `fully_shard` says no to."""
    dtypes = {p.dtype: name for name, p in module.named_parameters()}
    if len(dtypes) > 1:
        (one, first), (other, second) = list(dtypes.items())[:2]
        what = f"'{first}' is {one} and '{second}' {other}, and fsdp gathers parameters of one dtype"
        raise LayoutError(what, where=where, fix="module.float(), or replicas instead of fsdp")
    for name, parameter in module.named_parameters():
        if not parameter.ndim:
            what = f"'{name}' has no dimension along which the ranks of fsdp could share it"
            raise LayoutError(what, where=where, fix="make it of shape (1,), or replicas instead of fsdp")


def _into_stages(module: nn.Module, mesh: Mesh, example: tuple[Tensor, ...]) -> Division:
    layout = mesh.layout
    graph = trace(module, example)
    written = written_buffers(graph)
    by_mode = of_training(graph) or ("the example gives something else" if differs(module, example, written) else "")
    if layout.recompute == "block" and written:
        what = f"'{written[0]}' is written by the forward pass, which recompute=block would run twice"
        raise LayoutError(what, where=f"layout {layout}", fix="recompute=none")
    stages = cut(graph, layout.stage_count)
    refuse_unrecorded(module, stages, example, written, mesh)
    handed = [
        tuple(
            torch.empty(shape, dtype=dtype, device="meta", requires_grad=gradient)
            for (shape, dtype), gradient in zip(stage.outputs, stage.output_gradients, strict=True)
        )
        for stage in stages[:-1]
    ]
    holders = {name: numbers for stage in stages for name, numbers in stage.shared.items()}
    tied = {n: p.detach().to("meta") for stage in stages for n, p in stage.named_parameters() if n in holders}
    first: dict[str, int] = {}
    for number, stage in enumerate(stages):
        for name in (*dict(stage.named_parameters()), *dict(stage.named_buffers())):
            first.setdefault(name, number)
    parts = {number: _part(stages[number], number, holders) for number in layout.stages_of(mesh.stage)}
    _release(module, parts)
    for number, part in parts.items():
        if layout.recompute == "block":
            stages[number].recompute()
        if layout.sharers > 1 and not any(True for _ in part.module.parameters()):
            what = f"stage {number} of the pipeline has no parameters for the ranks of fsdp to share"
            raise LayoutError(what, where=f"layout {layout}", fix="fewer stages, or replicas instead of fsdp")
    return Division(parts, handed, {name: tied[name] for name in sorted(tied)}, first, by_mode)


def _part(stage: Stage, number: int, holders: Mapping[str, list[int]]) -> Part:
    """A stage with tensors of its own: autograd would add up the gradients of one that two stages of this rank have."""
    cuts = {}
    for name, parameter in list(stage.named_parameters()):
        if name in holders and holders[name][0] != number:
            stage.hold(name, nn.Parameter(parameter.detach().clone()), saved=True)
            cuts[name] = Cut(tuple(parameter.shape), (0,) * parameter.ndim, counted=False)
    # The module may have parts of these names.
    for attribute in ("inputs", "outputs", "input_gradients", "output_gradients", "shared"):
        del stage.__dict__[attribute]
    return Part(stage, [], cuts)


def _release(module: nn.Module, parts: Mapping[int, Part]) -> None:
    """Frees what other ranks hold now: the user may keep the module, and with it its memory."""
    held = {id(t) for part in parts.values() for t in (*part.module.parameters(), *part.module.buffers())}
    for owner in module.modules():
        for key, parameter in owner._parameters.items():
            if parameter is not None and id(parameter) not in held:
                owner._parameters[key] = nn.Parameter(parameter.detach().to("meta"))


class Tied(Replica[Any]):
    """A replica whose stages, any of them, may hold the same parameters: all get the sum of their gradients."""

    def __init__(self, division: Division, mesh: Mesh, bucket_bytes: int = 25 << 20):
        self._tied = division.tied
        super().__init__(division.parts, mesh, bucket_bytes=bucket_bytes, hidden=lambda _: division.handed)

    def collect(self) -> list[Shard]:
        shards = super().collect()
        for name, whole in self._tied.items():
            ours = [s.grad for s in shards if s.name == name and s.grad is not None]
            total = ours[0].clone() if ours else self._nothing_of(whole)
            for gradient in ours[1:]:
                total += gradient
            group = self.mesh.group("pipeline")
            self.mesh.wait(dist.all_reduce(total, group=group, async_op=True))
            for gradient in ours:
                gradient.copy_(total)
        return shards

    def _nothing_of(self, whole: Tensor) -> Tensor:
        """Zeros in the shape of the piece that the ranks of other stages have."""
        if self.mesh.layout.sharers > 1:
            ranks, rank = self.mesh.sharers.size(), self.mesh.sharers.rank()
            rows = -(-whole.shape[0] // ranks)
            whole = whole[rows * rank : rows * (rank + 1)]
        return torch.zeros(whole.shape, dtype=whole.dtype, device=self.mesh.device)
