"""Which canonical tensors lie in what a model stores.

A module may store several tensors of the published files as one parameter. It then says so in `stored`: own parameter
-> [(canonical name in the module, None), ...], one for each index of dimension 0, which the canonical tensor has not.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn


def stored_in(model: nn.Module, name: str) -> list[str] | None:
    """The canonical names of what lies at each index of dimension 0 of this parameter of the whole model; None where
    it is canonical itself."""
    path, _, own = name.rpartition(".")
    stored = getattr(model.get_submodule(path), "stored", {}).get(own)
    if stored is None:
        return None
    assert all(rows is None for _, rows in stored), f"{name}: only tensors of one index each are known"
    return [f"{path}.{piece}" if path else piece for piece, _ in stored]


def buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Those that are part of a checkpoint."""
    for name, buffer in model.named_buffers():
        path, _, own = name.rpartition(".")
        if own not in model.get_submodule(path)._non_persistent_buffers_set:
            yield name, buffer


def canonical(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every canonical tensor of a model that is whole here, learned or not: views of what it stores, detached."""
    for name, tensor in (*model.named_parameters(), *buffers(model)):
        names = stored_in(model, name)
        if names is None:
            yield name, tensor.detach()
        else:
            yield from zip(names, tensor.detach(), strict=True)
