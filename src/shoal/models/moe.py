"""The feed-forward layer of experts: each token goes through a few of them (Shazeer et al. 2017, arXiv:1701.06538), and
in some families through shared ones besides (Dai et al. 2024, "DeepSeekMoE", arXiv:2401.06066).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shoal.job.model import ModelOptions
from shoal.models.feedforward import FeedForward
from shoal.models.spec import EXPERT_NAMES
from shoal.ops import route
from shoal.ops.grouped import gather, grouped_gated, grouped_linear, order, spread


class Router(nn.Module):
    """A token's score for each expert, and its choice; in float32, in float64 for float64.

    deepseek_v3: sigmoids instead of a softmax, and a bias for the choice that no gradient reaches. It is a buffer,
    whole on every rank, and part of the checkpoint.
    """

    e_score_correction_bias: Tensor | None

    def __init__(self, options: ModelOptions):
        super().__init__()
        self.options, self.sigmoid = options, options.family == "deepseek_v3"
        self.weight = nn.Parameter(torch.empty(options.num_experts, options.hidden_size))
        self.register_buffer("e_score_correction_bias", torch.empty(options.num_experts) if self.sigmoid else None)

    def forward(self, x_BLD: Tensor) -> Tensor:
        """(B, L, E), each between 0 and 1."""
        wide = torch.float64 if x_BLD.dtype == torch.float64 else torch.float32
        with torch.autocast(x_BLD.device.type, enabled=False):
            # By way of x's dtype, so that weights which arrive in it, as from mixed-precision FSDP, score alike.
            logits_BLE = F.linear(x_BLD.to(wide), self.weight.to(x_BLD.dtype).to(wide))
        return logits_BLE.sigmoid() if self.sigmoid else logits_BLE.softmax(-1)

    def select(self, scores_BLE: Tensor) -> tuple[Tensor, Tensor]:
        """Each token's experts and their weights, both (B, L, K)."""
        o = self.options
        index_BLK = route.select(
            scores_BLE, o.num_experts_per_tok, self.e_score_correction_bias, o.n_group, o.topk_group
        )
        return index_BLK, route.weights(scores_BLE, index_BLK, o.norm_topk_prob, o.routed_scaling_factor)


class Experts(nn.Module):
    """All routed experts, stored together: E matrices of each kind, each expert gated as the dense layer is.

    `stored`: own parameter -> the canonical tensors in it, each with its rows of dimension 0, or None where it is one
    index of it with that dimension dropped, as here.
    """

    def __init__(self, options: ModelOptions):
        super().__init__()
        number, inner, width = options.num_experts, options.expert_size, options.hidden_size
        self.gate_EFD = nn.Parameter(torch.empty(number, inner, width))
        self.up_EFD = nn.Parameter(torch.empty(number, inner, width))
        self.down_EDF = nn.Parameter(torch.empty(number, width, inner))
        names = EXPERT_NAMES[options.family]
        kinds = {"gate_EFD": names.gate, "up_EFD": names.up, "down_EDF": names.down}
        self.stored: dict[str, list[tuple[str, int | None]]] = {
            own: [(f"{expert}.{kind}.weight", None) for expert in range(number)] for own, kind in kinds.items()
        }

    def forward(self, x_ND: Tensor, index_NK: Tensor, weight_NK: Tensor) -> Tensor:
        """Each token's weighted sum of what its experts make of it, (N, D).

        index_NK: int64 in [0, E], E = no expert, which contributes zeros. Expert parallelism takes this method's place.
        """
        by_expert = order(index_NK, self.gate_EFD.shape[0])
        return gather(self.compute(spread(x_ND, by_expert), by_expert.counts_E), weight_NK, by_expert)

    def compute(self, rows_MD: Tensor, counts_E: Tensor, sizes: Sequence[int] | None = None) -> Tensor:
        """Rows sorted by expert, and how many each has (sizes: the same, where the host knows) -> what the experts make
        of them, (M, D)."""
        hidden_MF = grouped_gated(rows_MD, self.gate_EFD, self.up_EFD, counts_E, sizes)
        return grouped_linear(hidden_MF, self.down_EDF, counts_E, sizes)


@dataclass
class Usage:
    """How a layer's experts were used by the micro-batches since it was last taken; to be summed over ranks.

    counts_E: int64, valid tokens that chose each expert, dropped ones too. balance_sum: float64, Σ over sequences of
    valid tokens × balance loss; over the valid tokens it is their mean, 1 where all experts are used alike.
    dropped: int64, choices that found no room.
    """

    counts_E: Tensor
    balance_sum: Tensor
    dropped: Tensor

    def __add__(self, other: Usage) -> Usage:
        return Usage(self.counts_E + other.counts_E, self.balance_sum + other.balance_sum, self.dropped + other.dropped)


class Row(Protocol):
    """Rows of which only some positions are here: the others' choices count for capacity and balance too."""

    first: bool
    """Whether what is known of a whole row is noted here; elsewhere it is the same."""

    def whole(self, x_BlX: Tensor) -> Tensor:
        """All positions, in the order of the row."""

    def own(self, x_BLX: Tensor) -> Tensor:
        """Those that are here."""


class MoE(nn.Module):
    """Router, routed experts and what is shared. In training mode it limits what an expert takes of a sequence, adds
    the balance loss and notes the experts' use.

    The last two happen in the backward pass. So the loss reaches the router wherever the rest of the loss is computed,
    also on another pipeline stage; and a forward pass that is made again by activation checkpointing counts once.
    """

    def __init__(self, options: ModelOptions):
        super().__init__()
        self.options = options
        self.gate = Router(options)
        self.experts = Experts(options)
        self.shared_name = EXPERT_NAMES[options.family].shared
        if self.shared_name:
            self.add_module(self.shared_name, FeedForward(options, options.shared_expert_intermediate_size))
        gated = options.family == "qwen2_moe"
        self.shared_expert_gate = nn.Linear(options.hidden_size, 1, bias=False) if gated else None
        self._usage: Usage | None = None
        self.row: Row | None = None
        """None: rows are whole here."""

    # Sizes of the groups are values, not shapes: a compiled block goes around this layer.
    @torch.compiler.disable
    def forward(self, x_BLD: Tensor, valid_BL: Tensor | None = None) -> Tensor:
        """valid_BL: bool, False where a row is filled up: such tokens see no routed expert and count nowhere. None =
        all are valid."""
        if valid_BL is None:
            valid_BL = torch.ones(x_BLD.shape[:2], dtype=torch.bool, device=x_BLD.device)
        index_BLK, weight_BLK = self._route(x_BLD, valid_BL)
        y_ND = self.experts(x_BLD.flatten(0, 1), index_BLK.flatten(0, 1), weight_BLK.flatten(0, 1))
        return self._shared(x_BLD, y_ND.view_as(x_BLD))

    def _route(self, x_BLD: Tensor, valid_BL: Tensor) -> tuple[Tensor, Tensor]:
        o = self.options
        scores_BLE = self.gate(x_BLD)
        index_BLK, weight_BLK = self.gate.select(scores_BLE)
        taken_BLK = valid_BL[..., None].expand_as(index_BLK)
        if self.training and (o.capacity_factor or weight_BLK.requires_grad):
            row_index_BLK, row_valid_BL = self._row(index_BLK, valid_BL)
            if o.capacity_factor:
                capacity = math.ceil(o.capacity_factor * o.num_experts_per_tok * row_valid_BL.shape[1] / o.num_experts)
                room_BLK = route.within_capacity(row_index_BLK, row_valid_BL, o.num_experts, capacity)
                taken_BLK = taken_BLK & (room_BLK if self.row is None else self.row.own(room_BLK))
            if weight_BLK.requires_grad:
                counts_BE = route.counts(row_index_BLK, row_valid_BL, o.num_experts)
                weight_BLK = self._watch(weight_BLK, scores_BLE, taken_BLK, valid_BL, counts_BE)
        return index_BLK.masked_fill(~taken_BLK, o.num_experts), weight_BLK.masked_fill(~taken_BLK, 0.0)

    def _row(self, index_BLK: Tensor, valid_BL: Tensor) -> tuple[Tensor, Tensor]:
        """Choices and validity of all positions of the rows."""
        if self.row is None:
            return index_BLK, valid_BL
        both_BLX = self.row.whole(torch.cat((index_BLK, valid_BL[..., None].long()), -1))
        return both_BLX[..., :-1], both_BLX[..., -1].bool()

    def _watch(
        self, weight_BLK: Tensor, scores_BLE: Tensor, taken_BLK: Tensor, valid_BL: Tensor, counts_BE: Tensor
    ) -> Tensor:
        """counts_BE: of whole rows."""
        o = self.options
        share_BLE = scores_BLE / scores_BLE.sum(-1, keepdim=True) if self.gate.sigmoid else scores_BLE
        per_token_BE = counts_BE
        if self.row is not None:
            # Each token counts K experts. The loss is linear in what is here of a row, but divided by the tokens here.
            here_B = valid_BL.sum(1, dtype=share_BLE.dtype) * o.num_experts_per_tok
            per_token_BE = counts_BE * (here_B / counts_BE.sum(1).clamp(min=1))[:, None]
        balance = route.balance_loss(share_BLE, per_token_BE, valid_BL, o.num_experts_per_tok)
        dropped = (valid_BL[..., None] & ~taken_BLK).sum()
        counts_E = counts_BE.sum(0) * (self.row is None or self.row.first)
        return _InBackward.apply(
            weight_BLK, o.router_aux_loss_coef * balance, self._note, counts_E, balance.detach().double(), dropped
        )

    def _note(self, *seen: Tensor) -> None:
        usage = Usage(*seen)
        self._usage = usage if self._usage is None else self._usage + usage

    def _shared(self, x_BLD: Tensor, y_BLD: Tensor) -> Tensor:
        if not self.shared_name:
            return y_BLD
        shared_BLD = self.get_submodule(self.shared_name)(x_BLD)
        if self.shared_expert_gate is not None:
            shared_BLD = F.sigmoid(self.shared_expert_gate(x_BLD)) * shared_BLD
        return y_BLD + shared_BLD

    def take_usage(self) -> Usage | None:
        """What backward passes have noted since the last call; None if there was none."""
        usage, self._usage = self._usage, None
        return usage

    @property
    def moves(self) -> bool:
        """Whether a bias goes by the counts."""
        return self.gate.e_score_correction_bias is not None and self.options.bias_update_rate > 0

    def rebalance_(self, counts_E: Tensor) -> None:
        """After a step, with the counts of the whole global batch: moves the bias for the next one."""
        bias_E = self.gate.e_score_correction_bias
        if bias_E is not None and self.moves:
            route.move_bias_(bias_E, counts_E, self.options.bias_update_rate)


class _InBackward(torch.autograd.Function):
    """The weights as they are. Their backward adds `loss` to what is minimised, with weight 1, since that is a sum; and
    notes what was seen. The node lives in the first forward's graph, so it runs once, however often forward ran."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, loss: Tensor, note: Callable[..., None], *seen: Tensor) -> Tensor:
        ctx.save_for_backward(loss, *seen)
        ctx.note = note
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        loss, *seen = ctx.saved_tensors
        ctx.note(*seen)
        return gradient, torch.ones_like(loss), None, *(None for _ in seen)
