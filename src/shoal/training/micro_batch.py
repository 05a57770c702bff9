"""What a module that shoal does not know is trained on, and the loss that the user gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from shoal.errors import DataError, JobError

Batch = tuple[Any, Any]
"""(inputs, target): the module is called with the inputs, a tensor or a tuple of tensors, and the loss with what comes
out and the target, any nest of tuples, lists and dicts of tensors. Dimension 0 of every tensor is the sample."""

Loss = Callable[[Any, Any], Tensor | tuple[Tensor, Tensor | float]]
"""(output, target) -> the loss SUMMED over the samples; or this and what it is to be divided by, also a sum, where
that is not the number of samples (tokens, say)."""


class Objective:
    """(module, micro-batch, what the stage before hands on) -> (loss, weight); an early stage: what it hands on."""

    def __init__(self, loss: Loss | None, last: nn.Module | None):
        """last: the module that makes the output; None where another rank has it. JobError where there is no loss."""
        if loss is None:
            raise JobError(
                "there is no loss to compute", fix="shoal.parallelize(..., loss=...), or evaluate(..., loss=...)"
            )
        self.loss, self.last = loss, last

    def __call__(self, module: nn.Module, batch: Batch, handed: tuple[Tensor, ...] | None = None) -> tuple[Any, Tensor]:
        inputs, target = batch
        out = module(*(inputs if handed is None else handed))
        weight: Tensor | float = inputs[0].shape[0]
        if module is self.last:
            out = self.loss(out, target)
            if isinstance(out, tuple):
                out, weight = out
            if not isinstance(out, Tensor) or out.ndim:
                what = f"shape {list(out.shape)}" if isinstance(out, Tensor) else type(out).__name__
                raise DataError(f"the loss is no single number: {what}", fix="sum it over the samples: .sum()")
        return out, torch.as_tensor(weight, dtype=torch.float64, device=inputs[0].device)


def rows(batch: Batch, start: int, count: int) -> Batch:
    return pytree.tree_map_only(Tensor, lambda x: x[start : start + count], batch)
