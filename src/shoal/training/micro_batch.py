"""What a module that shoal does not know is trained on, and the loss that the user gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from shoal.errors import DataError, JobError, LayoutError
from shoal.job import Layout
from shoal.job.check import count
from shoal.job.fits import enough

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


def as_inputs(given: Any) -> tuple[Tensor, ...]:
    """What a module is called with, as a tuple. DataError for anything but a tensor or a tuple (or list) of tensors."""
    inputs = (given,) if isinstance(given, Tensor) else given
    if isinstance(inputs, tuple | list) and inputs and all(isinstance(x, Tensor) for x in inputs):
        return tuple(inputs)
    found = type(given).__name__
    if isinstance(inputs, tuple | list):
        found += f" with {next((type(x).__name__ for x in inputs if not isinstance(x, Tensor)), 'nothing')} in it"
    fix = "wrap the module in one that is called with tensors only, and knows the rest"
    raise DataError(f"inputs are a tensor or a tuple of tensors, and this is a {found}", fix=fix)


def shared(batch: Batch, layout: Layout, reader: int) -> list[Batch]:
    """The micro-batches of the global batch that are the `reader`'s. DataError where it cannot be shared evenly."""
    counts = {x.shape[0] if x.ndim else 0 for x in pytree.tree_leaves(batch) if isinstance(x, Tensor)}
    if len(counts) != 1:
        raise DataError(f"the batch's tensors have {sorted(counts)} rows", fix="dimension 0 of each is the sample")
    (total,) = counts
    size = layout.micro_batch or max(1, total // layout.readers)
    if not total or total % (layout.readers * size):
        unit = layout.readers * (layout.micro_batch or 1)
        raise DataError(
            f"layout {layout} does not divide a batch of {total} samples evenly",
            fix=f"a multiple of {unit}, such as {max(1, total // unit) * unit}; drop_last=True leaves out the rest",
        )
    part = total // layout.readers
    return [_rows(batch, start, size) for start in range(part * reader, part * (reader + 1), size)]


def refuse_too_few(micro_batches: int, layout: Layout) -> None:
    """LayoutError where a pipeline's schedule cannot run so few."""
    if layout.pipeline == 1 or enough(micro_batches, layout):
        return
    further = range(micro_batches + 1, micro_batches + 1 + layout.stage_count + layout.pipeline)
    more = next(n for n in further if enough(n, layout))
    # The example has the shape of a micro-batch, so another size is another example.
    samples = micro_batches * layout.micro_batch
    sizes = (n for n in range(layout.micro_batch - 1, 0, -1) if samples % n == 0 and enough(samples // n, layout))
    smaller = next((f"micro_batch={n} (an example of {n}), " for n in sizes), "")
    raise LayoutError(
        f"schedule={layout.schedule} on {layout.pipeline} ranks with {layout.stage_count} stages cannot run "
        f"{count(micro_batches, 'micro-batch')}",
        where=f"layout {layout}",
        fix=f"a batch of {more * layout.micro_batch * layout.readers} samples, {smaller}or schedule=gpipe",
    )


def _rows(batch: Batch, start: int, count: int) -> Batch:
    return pytree.tree_map_only(Tensor, lambda x: x[start : start + count], batch)
