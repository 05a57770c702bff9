"""What one step reads: rows of tokens, and what each position is."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """B rows of L positions.

    tokens_BL, labels_BL: int64; the label is the token that follows. document_BL: int32, 0 … k − 1 for the k
    pieces of documents packed into a row, then k where it is filled up. position_BL: int32, from 0 in each
    piece. weight_BL: float32, 1, or 0 where the row is filled up (token: the end token, label: 0). sample_B:
    int64, the row's number in its split; each comes once an epoch.
    """

    tokens_BL: Tensor
    labels_BL: Tensor
    document_BL: Tensor
    position_BL: Tensor
    sample_B: Tensor
    weight_BL: Tensor
