"""Which experts a token goes to, with which weights, and how evenly a sequence uses them.

Everything here is a function of one token, or of one sequence (a row of the batch): statistics of a micro-batch or of a
rank would make the answer depend on the layout. Shapes: B rows of L positions, E experts, K of them for each token.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


@torch.no_grad()
def select(
    scores_BLE: Tensor, choices: int, bias_E: Tensor | None = None, groups: int = 1, kept_groups: int = 1
) -> Tensor:
    """The experts of each token, int64 (B, L, K): those with the highest scores.

    bias_E: added to the scores for this choice, and for nothing else (Wang et al. 2024, "Auxiliary-Loss-Free Load
    Balancing", arXiv:2408.15664). groups: experts next to each other, of which each token keeps those whose best
    scores sum highest: two with a bias (DeepSeek-V3, section 2.1.2, arXiv:2412.19437), one without (DeepSeek-V2,
    section 2.2.2, arXiv:2405.04434).
    """
    wanted_BLE = scores_BLE if bias_E is None else scores_BLE + bias_E
    if groups > 1:
        wanted_BLGe = wanted_BLE.unflatten(-1, (groups, -1))
        judged_by = 1 if bias_E is None else 2
        kept_BLg = wanted_BLGe.topk(judged_by).values.sum(-1).topk(kept_groups).indices
        kept_BLG = torch.zeros_like(wanted_BLGe[..., 0], dtype=torch.bool).scatter_(-1, kept_BLg, True)
        wanted_BLE = wanted_BLGe.masked_fill(~kept_BLG[..., None], -torch.inf).flatten(-2)
    return wanted_BLE.topk(choices).indices


def weights(scores_BLE: Tensor, index_BLK: Tensor, normalise: bool, scale: float) -> Tensor:
    """What each chosen expert's output is multiplied by: its score, over the sum of the chosen ones if so asked."""
    weight_BLK = scores_BLE.gather(-1, index_BLK)
    if normalise:
        weight_BLK = weight_BLK / (weight_BLK.sum(-1, keepdim=True) + 1e-20)
    return weight_BLK * scale


@torch.no_grad()
def counts(index_BLK: Tensor, valid_BL: Tensor, experts: int) -> Tensor:
    """How many valid tokens of each row chose each expert, int64 (B, E)."""
    index_BM = index_BLK.flatten(1)
    valid_BM = valid_BL[..., None].expand_as(index_BLK).flatten(1).long()
    return valid_BM.new_zeros(len(index_BM), experts).scatter_add_(1, index_BM, valid_BM)


@torch.no_grad()
def within_capacity(index_BLK: Tensor, valid_BL: Tensor, experts: int, capacity: int) -> Tensor:
    """Which choices find room, bool (B, L, K): an expert takes the first `capacity` valid tokens of each row.

    Rows do not compete with each other (groups of one sequence; Lepikhin et al. 2020, "GShard", section 2.2,
    arXiv:2006.16668), and a token takes no room from those before it.
    """
    chosen_BLE = F.one_hot(index_BLK, experts).sum(-2) * valid_BL[..., None]
    return chosen_BLE.cumsum(1).gather(-1, index_BLK) <= capacity


def balance_loss(share_BLE: Tensor, counts_BE: Tensor, valid_BL: Tensor, choices: int) -> Tensor:
    """Σ over rows of valid tokens × E/(K T²) · Σ_e counts_e · Σ_tokens share_e, where T is the row's valid tokens.

    The second factor is DeepSeek-V3's sequence-wise balance loss (section 2.1.2, equations 17 to 20): 1 where all
    experts are used alike, up to E/K. The first makes it a sum over tokens, to be divided by their number once, like
    the cross-entropy. share_BLE: each token's scores, their sum 1; the gradient flows through these.
    """
    experts = share_BLE.shape[-1]
    sum_BE = (share_BLE * valid_BL[..., None]).sum(1)
    tokens_B = valid_BL.sum(1).clamp(min=1)
    return ((counts_BE * sum_BE).sum(1) * (experts / choices) / tokens_B).sum()


@torch.no_grad()
def move_bias_(bias_E: Tensor, counts_E: Tensor, rate: float) -> None:
    """Experts chosen less often than the mean gain `rate`, those chosen more often lose it (Wang et al. 2024, algorithm
    1). counts_E: of the whole global batch."""
    counts_E = counts_E.double()
    bias_E += rate * (counts_E.mean() - counts_E).sign().to(bias_E.dtype)
