"""Experts in a layout: spread over the ranks of an axis, rows of which each rank has a part, and balance after a step.

Expert parallelism (Lepikhin et al. 2020, "GShard", section 3, arXiv:2006.16668; without padding: Gale et al. 2022,
"MegaBlocks", arXiv:2211.15841): each rank holds some experts. Every choice of a token is sent to the rank that has the
expert, computed there with those of all other ranks, and sent back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

from shoal.job.model import ModelOptions
from shoal.mesh import Mesh
from shoal.models.decoder import Decoder
from shoal.models.moe import Experts, MoE
from shoal.ops.grouped import Order, gather, order, spread
from shoal.parallel.collectives import ALL_GATHER
from shoal.parallel.context import Context
from shoal.parallel.tensor import Cut, Tensors


class ExpertAxis:
    """The ranks between whom all experts lie, and those with the same ones as this rank."""

    def __init__(self, mesh: Mesh):
        self.group = mesh.group("expert")
        self.ranks, self.rank = self.group.size(), self.group.rank()
        self.rest = mesh.group("rest").rank() if mesh.layout.rest > 1 else 0
        # With sharers, `zero` spreads a piece over the rest; else each of the rest has all of it and a part of the sum.
        self._copies = mesh.layout.rest if mesh.layout.sharers == 1 else 1

    def split(self, model: nn.Module) -> tuple[dict[str, Cut], list[nn.Module]]:
        """Replaces, on meta, the experts of `model` by those of this rank; returns where the pieces lie, and the
        modules."""
        cuts: dict[str, Cut] = {}
        modules: list[nn.Module] = []
        for name, module in model.named_modules():
            if not isinstance(module, Experts):
                continue
            modules.append(module)
            for key, parameter in list(module.named_parameters(recurse=False)):
                shape = tuple(parameter.shape)
                number = shape[0] // self.ranks
                first = self.rank * number
                setattr(module, key, nn.Parameter(parameter[first : first + number].clone()))
                copy, summed = (self.rest, "rest") if self._copies > 1 else (0, "")
                cuts[f"{name}.{key}"] = Cut(shape, (first, 0, 0), copy == 0, summed, True, copy, self._copies)
            # The module keeps its parameters, their names and its hooks.
            module.__dict__["forward"] = _Dispatch(module, number * self.ranks, self.group)
        return cuts, modules


class _Dispatch:
    """The forward of experts of which this rank has some, for the tokens of all ranks of the group."""

    def __init__(self, module: Experts, experts: int, group: dist.ProcessGroup):
        self.module, self.experts, self.group = module, experts, group
        self.ranks = group.size()

    def __call__(self, x_ND: Tensor, index_NK: Tensor, weight_NK: Tensor) -> Tensor:
        by_expert = order(index_NK, self.experts)
        leaving_RE = by_expert.counts_E.view(self.ranks, -1)
        arriving_RE = torch.empty_like(leaving_RE)
        dist.all_to_all_single(arriving_RE, leaving_RE, group=self.group)
        # Sizes of messages are needed on the host: the one place where it waits for the device.
        leaving, arriving = torch.stack((leaving_RE, arriving_RE)).tolist()
        sent, received = list(map(sum, leaving)), list(map(sum, arriving))
        rows_MD = spread(x_ND, by_expert)
        arrived_MD = _Exchange.apply(rows_MD[: sum(sent)], sent, received, self.group)
        own = _by_expert(arriving_RE, sum(received))
        sizes = [sum(of_expert) for of_expert in zip(*arriving, strict=True)]
        made_MD = self.module.compute(spread(arrived_MD, own), own.counts_E, sizes)
        back_MD = _Exchange.apply(spread(made_MD, _inverse(own)), received, sent, self.group)
        # What goes to no expert was not sent.
        back_MD = pad(back_MD, (0, 0, 0, len(rows_MD) - len(back_MD)))
        # A copy, since fully_shard hangs its hook on what comes out, and a view may lose it.
        return gather(back_MD, weight_NK, by_expert).clone()


def _by_expert(arriving_RE: Tensor, rows: int) -> Order:
    """Rows that arrived by rank, and by expert within each, in the order of the experts. rows: their number."""
    ranks, experts = arriving_RE.shape
    expert_X = torch.arange(experts, device=arriving_RE.device).repeat(ranks)
    expert_M = expert_X.repeat_interleave(arriving_RE.flatten(), output_size=rows)  # without it the device is asked
    return order(expert_M[:, None], experts)


def _inverse(rows: Order) -> Order:
    """Back to where they stood before, each chosen once."""
    return Order(rows.place_M, rows.sorted_M, rows.counts_E, 1)


class _Exchange(torch.autograd.Function):
    """Each rank's rows to the others, `sent` to each and `received` from each; backward the other way round."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.sent, ctx.received, ctx.group = sent, received, group
        return _all_to_all(rows, sent, received, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        return _all_to_all(gradient, ctx.received, ctx.sent, ctx.group), None, None, None


def _all_to_all(rows_MD: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
    out_MD = rows_MD.new_empty(sum(received), rows_MD.shape[1])
    dist.all_to_all_single(out_MD, rows_MD.contiguous(), received, sent, group=group)
    return out_MD


class Rows:
    """Rows of the batch of which each rank of the context and tensor axes has some positions (`models.moe.Row`)."""

    def __init__(self, mesh: Mesh, context: Context | None, tensors: Tensors | None):
        self.group = mesh.group("context", "tensor")
        self.context, self.tensors = context, tensors
        self.first = mesh.context == 0 and mesh.tensor == 0
        self._places: dict[int, tuple[Tensor, Tensor]] = {}

    def whole(self, x_BlX: Tensor) -> Tensor:
        """Along dimension 1 in the order of the row, from each rank its own; no gradient."""
        gathered_BLX = self._gather(x_BlX).transpose(0, 1).flatten(1, 2)
        return gathered_BLX.index_select(1, self._at(gathered_BLX)[0])

    def own(self, x_BLX: Tensor) -> Tensor:
        """This rank's positions."""
        return x_BLX.index_select(1, self._at(x_BLX)[1])

    def _gather(self, x: Tensor) -> Tensor:
        gathered = x.new_empty(self.group.size(), *x.shape)
        ALL_GATHER(gathered.flatten(0, 1), x.contiguous(), group=self.group)
        return gathered

    def _at(self, x_BLX: Tensor) -> tuple[Tensor, Tensor]:
        """(where each position of the row is among those gathered, the positions of this rank)."""
        length = x_BLX.shape[1]
        if length not in self._places:
            place_l = torch.arange(length) if self.context is None else self.context.places(length)
            if self.tensors is not None:
                place_l = self.tensors.part_of_sequence(place_l)
            place_l = place_l.to(x_BLX.device)
            self._places[length] = self._gather(place_l).flatten().argsort(), place_l
        return self._places[length]


@dataclass(frozen=True)
class Use:
    """How the experts of the whole model were used by a batch; the same in every layout, on every rank.

    totals_NX: float64, (layers with experts, experts + 2), sums over the batch: of each expert the valid tokens that
    chose it, dropped ones too; of valid tokens × balance loss, over sequences; choices that found no room. Those of
    several batches add up. choices: of each token.
    """

    totals_NX: Tensor
    choices: int

    def figures(self) -> dict[str, float]:
        """For a row of metrics.

        balance_loss: mean over tokens and layers, without its weight; 1 where all experts are used alike.
        dropped_share: of all choices of valid tokens, those that found no room. busiest_load: the choices of a layer's
        most chosen expert over those of its mean expert, dropped ones too; of the layer where that is largest.
        """
        counts_NE, balance_N, dropped_N = self.totals_NX[:, :-2], self.totals_NX[:, -2], self.totals_NX[:, -1]
        chosen = counts_NE.sum()
        load_N = counts_NE.amax(1) / counts_NE.mean(1)
        found = balance_N.sum() * self.choices / chosen, dropped_N.sum() / chosen, load_N.amax()
        names = "balance_loss", "dropped_share", "busiest_load"
        return dict(zip(names, torch.stack(found).tolist(), strict=True))


def added(one: Use | None, other: Use | None) -> Use | None:
    """Of both batches together; None = nobody knows of one."""
    if one is None or other is None:
        return one or other
    return Use(one.totals_NX + other.totals_NX, one.choices)


class Balance:
    """What the experts of these modules were used for in a step, and what follows from it."""

    def __init__(self, modules: Sequence[nn.Module]):
        decoders = [m for module in modules for m in module.modules() if isinstance(m, Decoder)]
        # By their number in the whole model, as are `_routed`, which other stages have too.
        self._layers = {
            int(number): layer
            for decoder in decoders
            for number, block in decoder.model.layers.items()
            for layer in block.modules()
            if isinstance(layer, MoE)
        }
        self._options = decoders[0].options if decoders else ModelOptions()
        self._routed = [n for n in range(self._options.num_hidden_layers) if self._options.routes(n)]

    def forget(self) -> None:
        """What a step noted that was broken off or whose update was not applied."""
        for layer in self._layers.values():
            layer.take_usage()

    def move(self, mesh: Mesh, counting: dist.ProcessGroup | None) -> Use | None:
        """Moves biases by the counts of all batches of `counting` (None = this rank's alone). All its ranks call it,
        also those of stages without experts.

        None where the model has no experts. One sum over these ranks, 8 bytes an expert and layer.
        """
        if not self._routed:
            return None
        experts = self._options.num_experts
        # Counts are whole in float64 up to 2⁵³.
        totals_NX = torch.zeros(len(self._routed), experts + 2, dtype=torch.float64, device=mesh.device)
        for number, layer in self._layers.items():
            usage = layer.take_usage()
            assert usage is not None, "a layer of experts saw no backward pass"
            here = usage.counts_E.double(), usage.balance_sum[None], usage.dropped[None].double()
            totals_NX[self._routed.index(number)] = torch.cat(here)
        if counting is not None:
            mesh.wait(dist.all_reduce(totals_NX, group=counting, async_op=True))
        for number, layer in self._layers.items():
            layer.rebalance_(totals_NX[self._routed.index(number), :experts])
        return Use(totals_NX, self._options.num_experts_per_tok)
