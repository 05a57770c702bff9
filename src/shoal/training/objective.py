"""What is minimised: the cross-entropy of the next token, summed over the valid tokens of a batch."""

from __future__ import annotations

import time
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shoal import device
from shoal.data.batch import Batch
from shoal.ops.attention import Attend, Attention, document_attend, dropped_attend
from shoal.ops.dropout import Dropout
from shoal.ops.loss import chunked_cross_entropy
from shoal.parallel.context import Context
from shoal.parallel.tensor import Tensors
from shoal.training.precision import autocast


class Objective:
    """(module, batch, hidden) -> (loss summed over tokens, weight of the tokens); adds up the seconds of its forwards.

    With a pipeline, the module is a stage, and what the stage before has made comes in as hidden states; of a stage
    that is not the last, hidden states come out.
    """

    def __init__(
        self,
        precision: str,
        chunk: int = 0,
        context: Context | None = None,
        tensors: Tensors | None = None,
        dropout: float = 0.0,
        seed: int = 0,
        attention_dropout: float = 0.0,
    ):
        """chunk: tokens whose logits exist at a time, 0 = by size. context, tensors: where sequences and matrices are
        shared with other ranks. dropout, attention_dropout: rates, of the residual stream and of attention's
        probabilities, wherever gradients are computed; seed: of their masks."""
        assert context is None or not attention_dropout, "probabilities of rows that no rank holds whole"
        self.precision, self.chunk = precision, chunk
        self.context, self.tensors = context, tensors
        self.dropout, self.attention_dropout, self.seed = dropout, attention_dropout, seed
        self.seconds = 0.0
        self.step = 0
        """The step that is computed, for the masks of dropout; to be set."""

    def __call__(self, module: nn.Module, batch: Batch, hidden_BLD: Tensor | None = None) -> tuple[Tensor, Tensor]:
        start = time.perf_counter()
        attend, drop = self._attend(batch), self._drop(batch)
        batch = self._mine(batch)

        def head(hidden_BLD: Tensor, weight_VD: Tensor) -> Tensor:
            words = None
            if self.tensors is not None:
                hidden_BLD, words = self.tensors.whole_sequence(hidden_BLD), self.tensors.words()
            return chunked_cross_entropy(hidden_BLD, weight_VD, batch.labels_BL, batch.weight_BL, self.chunk, words)

        with autocast(self.precision, batch.tokens_BL.device):
            input_ = batch.tokens_BL if hidden_BLD is None else hidden_BLD
            out = module(input_, batch.position_BL, attend, head, self._valid(batch), drop)
        self.seconds += time.perf_counter() - start
        return out, batch.weight_BL.sum(dtype=torch.float64)

    def _attend(self, batch: Batch) -> Attend:
        if self.context is not None:
            return _padded(self.context.attend(batch.document_BL))
        if not self.attention_dropout or not torch.is_grad_enabled():
            return document_attend(batch.document_BL)
        # Attention sees whole rows, whichever part of the residual stream is here. Documents may have equal positions,
        # places in the row are each another one.
        place_L = torch.arange(batch.tokens_BL.shape[1], device=batch.tokens_BL.device)
        drop = Dropout(self.attention_dropout, self.seed, self.step, batch.sample_B, place_L)
        return dropped_attend(batch.document_BL, drop, self.tensors.heads.start if self.tensors else 0)

    def _mine(self, batch: Batch) -> Batch:
        """Where sequences are shared, this rank's positions."""
        if self.context is None:
            return batch
        names = ("tokens_BL", "labels_BL", "document_BL", "position_BL", "weight_BL")
        return replace(batch, **{name: self.context.cut(getattr(batch, name)) for name in names})

    def _valid(self, batch: Batch) -> Tensor:
        """Of the positions whose residual stream is here, those that are not filled up."""
        valid_BL = batch.weight_BL > 0
        return valid_BL if self.tensors is None else self.tensors.part_of_sequence(valid_BL)

    def _drop(self, batch: Batch) -> Dropout | None:
        """The masks of the positions whose residual stream is here."""
        if not self.dropout or not torch.is_grad_enabled():
            return None
        length, where = batch.tokens_BL.shape[1], batch.tokens_BL.device
        place_L = torch.arange(length) if self.context is None else self.context.places(length)
        if self.tensors is not None:
            place_L = self.tensors.part_of_sequence(place_L)
        return Dropout(self.dropout, self.seed, self.step, batch.sample_B, place_L.to(where))

    def lap(self, where: torch.device) -> float:
        """Seconds of forward passes since the last call."""
        device.synchronize(where)
        seconds, self.seconds = self.seconds, 0.0
        return seconds


def _padded(attend: Attend) -> Attend:
    """For latent attention, whose values have fewer features than its keys: what shares sequences takes them alike."""
    return lambda layer: partial(_attend_alike, attend(layer))


@torch.compiler.disable
def _attend_alike(attention: Attention, q_BLHD: Tensor, k_BLHD: Tensor, v_BLHV: Tensor) -> Tensor:
    size, missing = v_BLHV.shape[-1], k_BLHD.shape[-1] - v_BLHV.shape[-1]
    if not missing:
        return attention(q_BLHD, k_BLHD, v_BLHV)
    return attention(q_BLHD, k_BLHD, F.pad(v_BLHV, (0, missing)))[..., :size]
