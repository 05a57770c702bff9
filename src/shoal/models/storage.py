"""Which canonical tensors lie in what a model stores.

A module may store several tensors of the published files as one parameter. It then says so in `stored`: own parameter
-> [(canonical name in the module, rows), ...], stretches of so many rows of dimension 0, one after the other. rows =
None: one index of dimension 0 each, which the canonical tensor has not.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Stored = list[tuple[str, int | None]]


class FusedLinear(nn.Module):
    """Linear layers that have the same input, as one matrix and one product.

    names: what they are called beside this module, where the published files have them. sizes: the outputs of each.
    """

    def __init__(self, inputs: int, outputs: dict[str, int], bias: bool):
        """outputs: name -> size."""
        super().__init__()
        self.names, self.sizes = list(outputs), list(outputs.values())
        self.weight = nn.Parameter(torch.empty(sum(self.sizes), inputs))
        self.bias = nn.Parameter(torch.empty(sum(self.sizes))) if bias else None

    @property
    def stored(self) -> dict[str, Stored]:
        pieces = list(zip(self.names, self.sizes, strict=True))
        return {own: [(f"{name}.{own}", size) for name, size in pieces] for own in ("weight", "bias")}

    def forward(self, x_BLD: Tensor) -> tuple[Tensor, ...]:
        """What each of the layers makes of it, all (B, L, size)."""
        return F.linear(x_BLD, self.weight, self.bias).split(self.sizes, -1)


def stored_in(model: nn.Module, name: str) -> Stored | None:
    """What lies in this parameter of the whole model, with canonical names; None where it is canonical itself."""
    path, _, own = name.rpartition(".")
    module = model.get_submodule(path)
    stored = getattr(module, "stored", None)
    if not isinstance(stored, dict) or own not in stored:
        return None
    home = path.rpartition(".")[0] if isinstance(module, FusedLinear) else path
    return [(f"{home}.{piece}" if home else piece, rows) for piece, rows in stored[own]]


def buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Those that are part of a checkpoint."""
    for name, buffer in model.named_buffers():
        path, _, own = name.rpartition(".")
        if own not in model.get_submodule(path)._non_persistent_buffers_set:
            yield name, buffer


def canonical(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every canonical tensor of a model that is whole here, learned or not: views of what it stores, detached."""
    for name, tensor in (*model.named_parameters(), *buffers(model)):
        stored, first = stored_in(model, name), 0
        if stored is None:
            yield name, tensor.detach()
            continue
        for piece, rows in stored:
            yield piece, tensor.detach()[first if rows is None else slice(first, first + rows)]
            first += rows or 1
