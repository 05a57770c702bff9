"""From logits to the next token."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from shoal.errors import ModelError
from shoal.job.check import at_least, require


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn.

    temperature: divides the logits; 0 = always the likeliest token. top_k: only among that many likeliest
    tokens; 0 = all. top_p: only among the likeliest tokens whose probabilities add up to this (Holtzman et
    al. 2020, "The Curious Case of Neural Text Degeneration", section 3.1); 1 = all. With both, top_p applies
    to what top_k leaves.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def validate(self) -> None:
        """Raises JobError."""
        at_least("temperature", self.temperature, 0)
        at_least("top_k", self.top_k, 0)
        require(0 < self.top_p <= 1, f"top_p={self.top_p} is not in (0, 1]", "e.g. 0.95; 1 = all tokens")


def probabilities(logits_BV: Tensor, sampling: Sampling) -> Tensor:
    """Of every token, (B, V) float32, rows adding up to 1. Among equal logits the lower token counts as
    likelier."""
    logits_BV = logits_BV.float()
    if sampling.temperature == 0:
        return torch.zeros_like(logits_BV).scatter_(-1, logits_BV.argmax(-1, keepdim=True), 1.0)
    # Relative to the largest, so that no temperature makes them infinite.
    scaled_BV = (logits_BV - logits_BV.amax(-1, keepdim=True)) / sampling.temperature
    sorted_BV, tokens_BV = scaled_BV.sort(dim=-1, descending=True, stable=True)
    if sampling.top_k:
        sorted_BV[:, sampling.top_k :] = -torch.inf
    chance_BV = sorted_BV.softmax(-1)
    if sampling.top_p < 1:
        # A token stays unless those before it already add up to top_p; the first always does.
        before_BV = chance_BV.cumsum(-1) - chance_BV
        chance_BV = chance_BV.masked_fill(before_BV >= sampling.top_p, 0.0)
        chance_BV = chance_BV / chance_BV.sum(-1, keepdim=True)
    return torch.zeros_like(chance_BV).scatter_(-1, tokens_BV, chance_BV)


def draw(logits_BV: Tensor, sampling: Sampling, generator: torch.Generator) -> Tensor:
    """The next token of each row, (B,) int64. generator: on the CPU, so that every device draws alike.

    Raises ModelError where the logits are not finite.
    """
    if not logits_BV.isfinite().all():
        raise ModelError(
            "the model's logits are not finite", fix="its training diverged: take an earlier checkpoint, or train anew"
        )
    chance_BV = probabilities(logits_BV, sampling).cpu()
    return torch.multinomial(chance_BV, 1, generator=generator)[:, 0].to(logits_BV.device)
