"""Each matrix shared by the ranks of the tensor axis, with sequence parallelism between the matrices.

Shoeybi et al. 2019 ("Megatron-LM", section 3, arXiv:1909.08053) and Korthikanti et al. 2022 (arXiv:2205.05198, section
4.2.2): in front of a group of matrices the sequence is gathered, each rank computes a part of the features, and what
the last matrix makes is summed over the ranks, each of which keeps its part of the sequence. The two send as many bytes
as one all-reduce, and what lies between is computed and kept once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from shoal.job.model import ModelOptions
from shoal.models import split
from shoal.models.decoder import LatentAttention
from shoal.models.storage import FusedLinear
from shoal.ops.loss import Words
from shoal.parallel.collectives import ALL_GATHER, REDUCE_SCATTER
from shoal.parallel.overlap import gathered_linear, linear_scattered


@dataclass(frozen=True)
class Cut:
    """The piece of a parameter that this rank has of it before fully_shard cuts it again.

    offsets: where it begins in the whole. counted: as in Shard. summed: "", or an axis: the gradient here is a part,
    and the whole is the sum over those ranks of the axis that hold the same piece. everywhere: which all of them do.
    copy, copies: which of those that hold the same piece of the replica this is, and how many there are.
    """

    global_shape: tuple[int, ...]
    offsets: tuple[int, ...]
    counted: bool = True
    summed: str = ""
    everywhere: bool = False
    copy: int = 0
    copies: int = 1


class Tensors:
    """Splits modules over a process group of `ranks` ranks; this is `rank` of them."""

    def __init__(self, options: ModelOptions, group: dist.ProcessGroup, *, sequence: bool = True, ring: bool = False):
        """sequence: False for a sequence that cannot be cut, as one new token: each rank has all of it between the
        matrices too, and what the last one of a group makes is summed (one all-reduce). Forward only. ring: parts of
        the sequence are multiplied while others are sent (see overlap.py)."""
        self.options, self.group, self.sequence, self.ring = options, group, sequence, ring
        self.ranks, self.rank = group.size(), group.rank()

    def split(self, model: nn.Module) -> dict[str, Cut]:
        """Replaces, on meta, every parameter of `model` by this rank's piece of it; returns where the pieces lie, by
        canonical name."""
        cuts: dict[str, Cut] = {}
        for name, module in list(model.named_modules()):
            if isinstance(module, FusedLinear):
                cuts |= self._fused(name.rpartition(".")[0], module)
                if self.ring:
                    _compute_as(module, _Gathered(module, self.group))
                continue
            how = split.how(name, self.options)
            if isinstance(module, LatentAttention):
                module.options = self._own_heads()
            fused = any(isinstance(child, FusedLinear) for child in module.children())
            if how == split.GATHERED and self.sequence and not (self.ring and fused):
                module.register_forward_pre_hook(self._gather_first)
            for key, parameter in list(module.named_parameters(recurse=False)):
                assert how is not None, f"nothing is said of how {name} is split"
                local, cut = self._piece(how, key, parameter)
                setattr(module, key, local)
                cuts[f"{name}.{key}"] = cut
            if how == split.INPUTS:
                assert isinstance(module, nn.Linear), f"{name} is no linear layer"
                _compute_as(module, _RowParallel(module, self._multiply))
            elif how == split.WORDS and isinstance(module, nn.Embedding):
                _compute_as(module, _Lookup(module, self._rows(module.num_embeddings).start, self._join))
        return cuts

    def _fused(self, home: str, module: FusedLinear) -> dict[str, Cut]:
        """Of each canonical tensor in it this rank's rows, one piece after the other as in the whole; returns their
        cuts, by canonical name. home: the module that it is in."""
        cuts: dict[str, Cut] = {}
        sizes = module.sizes
        for key, parameter in list(module.named_parameters(recurse=False)):
            pieces: list[Tensor] = []
            for name, whole in zip(module.names, parameter.split(sizes), strict=True):
                how = split.how(f"{home}.{name}", self.options)
                assert how is not None, f"nothing is said of how {home}.{name} is split"
                local, cuts[f"{home}.{name}.{key}"] = self._piece(how, key, nn.Parameter(whole))
                pieces.append(local.data)
            setattr(module, key, nn.Parameter(torch.cat(pieces)))
            module.sizes = [len(piece) for piece in pieces]
        return cuts

    def _piece(self, how: str, key: str, parameter: nn.Parameter) -> tuple[nn.Parameter, Cut]:
        shape = tuple(parameter.shape)
        dimension, summed, sharers = 0, "", 1
        if how == split.WHOLE or (how == split.INPUTS and key == "bias"):
            return parameter, Cut(shape, (0,) * len(shape), self.rank == 0, "tensor", True, self.rank, self.ranks)
        if how == split.INPUTS:
            dimension, part = 1, self._rows(shape[1])
        elif how == split.KEYS:
            heads = split.key_heads(self.options, self.ranks, self.rank)
            size = self.options.head_size
            part = range(heads.start * size, heads.stop * size)
            sharers = max(1, self.ranks // self.options.num_key_value_heads)
            summed = "tensor" if sharers > 1 else ""
        else:
            part = self._rows(shape[0])
        local = parameter.narrow(dimension, part.start, len(part)).clone()
        offsets = tuple(part.start if d == dimension else 0 for d in range(len(shape)))
        copy = self.rank % sharers
        return nn.Parameter(local), Cut(shape, offsets, copy == 0, summed, copy=copy, copies=sharers)

    def _own_heads(self) -> ModelOptions:
        """Latent attention asks its options how many heads there are."""
        heads = self.options.num_attention_heads // self.ranks
        return replace(self.options, num_attention_heads=heads, num_key_value_heads=heads)

    def _rows(self, total: int) -> range:
        return split.even(total, self.ranks, self.rank)

    def _gather_first(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return gather_sequence(args[0], self.group), *args[1:]

    @property
    def heads(self) -> range:
        """The query heads of this rank."""
        return self._rows(self.options.num_attention_heads)

    def _join(self, x_BLD: Tensor) -> Tensor:
        """The sum of the ranks' values, where this rank needs it."""
        return scatter_sequence(x_BLD, self.group) if self.sequence else sum_whole(x_BLD, self.group)

    def _multiply(self, x_BLF: Tensor, weight_DF: Tensor) -> Tensor:
        """With some columns of a matrix; the sum over the ranks."""
        return linear_scattered(x_BLF, weight_DF, self.group) if self.ring else self._join(F.linear(x_BLF, weight_DF))

    def words(self) -> Words:
        """For the loss, where the output layer is split."""
        rows = self._rows(self.options.vocab_size)
        return Words(rows.start, -(-self.options.vocab_size // self.ranks), self._combine)

    def _combine(self, sums_2C1: Tensor) -> Tensor:
        gathered = sums_2C1.new_empty(self.ranks, *sums_2C1.shape)
        ALL_GATHER(gathered.flatten(0, 1), sums_2C1.contiguous(), group=self.group)
        return torch.stack((gathered[:, 0].logsumexp(0), gathered[:, 1].sum(0)))

    def part_of_sequence(self, x_L: Tensor) -> Tensor:
        """Along the last dimension, the positions whose residual stream this rank has."""
        return x_L.chunk(self.ranks, -1)[self.rank]

    def whole_sequence(self, hidden_BlD: Tensor) -> Tensor:
        """What the output layer needs."""
        return gather_sequence(hidden_BlD, self.group)


def _compute_as(module: nn.Module, forward: Callable[[Tensor], Any]) -> None:
    """The module keeps its parameters, their names and its hooks."""
    module.__dict__["forward"] = forward


class _Gathered:
    """The forward of layers stored as one, of which this rank has some rows, for all positions from those here."""

    def __init__(self, module: FusedLinear, group: dist.ProcessGroup):
        self.module, self.group = module, group

    def __call__(self, x_BlD: Tensor) -> tuple[Tensor, ...]:
        y_BLF = gathered_linear(x_BlD, self.module.weight, self.module.bias, self.group)
        return y_BLF.split(self.module.sizes, -1)


class _RowParallel:
    """The forward of a linear layer that has some columns of its matrix; the bias is added once, after the sum."""

    def __init__(self, module: nn.Linear, multiply: Callable[[Tensor, Tensor], Tensor]):
        self.module, self.multiply = module, multiply

    def __call__(self, x_BLF: Tensor) -> Tensor:
        x_BlD = self.multiply(x_BLF, self.module.weight)
        bias_D = self.module.bias
        return x_BlD if bias_D is None else x_BlD + bias_D.to(x_BlD.dtype)


class _Lookup:
    """The forward of an embedding that has some rows: zeros for tokens that are elsewhere, summed over the ranks."""

    def __init__(self, module: nn.Embedding, first: int, join: Callable[[Tensor], Tensor]):
        self.module, self.first, self.join = module, first, join

    def __call__(self, tokens_BL: Tensor) -> Tensor:
        weight_vD = self.module.weight
        row_BL = tokens_BL - self.first
        here_BL = (row_BL >= 0) & (row_BL < weight_vD.shape[0])
        x_BLD = F.embedding(row_BL.where(here_BL, 0), weight_vD) * here_BL[..., None]
        return self.join(x_BLD)


def gather_sequence(x_BlD: Tensor, group: dist.ProcessGroup) -> Tensor:
    """All parts of the sequence (dimension 1), from each rank its own; backward sums what the ranks made of it."""
    return _Gather.apply(x_BlD, group)


def scatter_sequence(x_BLD: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum of the ranks' values, of which each keeps its part of the sequence; backward gathers."""
    return _Scatter.apply(x_BLD, group)


def sum_whole(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum of the ranks' values, in place, equal to the last bit on all of them. It has no backward."""
    assert not torch.is_grad_enabled(), "a sum over ranks without a gradient, where one is asked for"
    x = x.contiguous()
    dist.all_reduce(x, group=group)
    return x


@torch.compiler.disable
def _all_gather(x_BlD: Tensor, group: dist.ProcessGroup) -> Tensor:
    gathered_NBlD = x_BlD.new_empty(group.size(), *x_BlD.shape)
    ALL_GATHER(gathered_NBlD.flatten(0, 1), x_BlD.contiguous(), group=group)
    return gathered_NBlD.transpose(0, 1).flatten(1, 2)


@torch.compiler.disable
def _reduce_scatter(x_BLD: Tensor, group: dist.ProcessGroup) -> Tensor:
    parts_NBlD = x_BLD.unflatten(1, (group.size(), -1)).transpose(0, 1).contiguous()
    out_BlD = torch.empty_like(parts_NBlD[0])
    REDUCE_SCATTER(out_BlD, parts_NBlD.flatten(0, 1), group=group)
    return out_BlD


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BlD: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _all_gather(x_BlD, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _reduce_scatter(gradient, ctx.group), None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BLD: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _reduce_scatter(x_BLD, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _all_gather(gradient, ctx.group), None
