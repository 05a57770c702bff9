"""What is minimised: the cross-entropy of the next token, summed over the valid tokens of a batch."""

from __future__ import annotations

import time

import torch
from torch import Tensor, nn

from shoal import device
from shoal.data.batch import Batch
from shoal.ops.attention import document_attend
from shoal.ops.loss import chunked_cross_entropy
from shoal.training.precision import autocast


class Objective:
    """(module, batch) -> (loss summed over tokens, weight of the tokens); adds up the seconds of its forwards."""

    def __init__(self, precision: str, chunk: int = 0):
        """chunk: tokens whose logits exist at a time, 0 = by size."""
        self.precision, self.chunk = precision, chunk
        self.seconds = 0.0

    def __call__(self, module: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        start = time.perf_counter()

        def head(hidden_BLD: Tensor, weight_VD: Tensor) -> Tensor:
            return chunked_cross_entropy(hidden_BLD, weight_VD, batch.labels_BL, batch.weight_BL, self.chunk)

        with autocast(self.precision, batch.tokens_BL.device):
            loss_sum = module(batch.tokens_BL, batch.position_BL, document_attend(batch.document_BL), head)
        self.seconds += time.perf_counter() - start
        return loss_sum, batch.weight_BL.sum(dtype=torch.float64)

    def lap(self, where: torch.device) -> float:
        """Seconds of forward passes since the last call."""
        device.synchronize(where)
        seconds, self.seconds = self.seconds, 0.0
        return seconds
