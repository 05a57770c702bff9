"""Muon in one process in float64, with nothing of shoal's but the names of a model's tensors: by singular values, not
by products of matrices."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from shoal.job.optim import OptimOptions
from tests.models import experts


def orthogonal(matrix: Tensor) -> Tensor:
    """Odd polynomials of a matrix are those of its singular values."""
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    values = values / max(values.square().sum().sqrt().item(), 1e-7)
    for _ in range(5):
        values = 3.4445 * values - 4.775 * values**3 + 2.0315 * values**5
    return left * values @ right


class Muon:
    """Of matrices that are named one by one. `param_groups` have the learning rate, as in torch's optimizers."""

    def __init__(self, values: dict[str, Tensor], options: OptimOptions):
        self.values, self.options = values, options
        self.momentum = {name: torch.zeros_like(value) for name, value in values.items()}
        self.param_groups = [{"lr": options.lr}]

    def step(self, gradients: dict[str, Tensor]) -> None:
        lr, o = self.param_groups[0]["lr"], self.options
        for name, value in self.values.items():
            self.momentum[name] = o.muon_momentum * self.momentum[name] + gradients[name]
            direction = orthogonal(gradients[name] + o.muon_momentum * self.momentum[name])
            value.copy_(value - lr * o.weight_decay * value - lr * 0.2 * max(value.shape) ** 0.5 * direction)


def is_hidden(name: str, shape: Iterable[int]) -> bool:
    rows, columns = shape if len(tuple(shape)) == 2 else (1, 1)
    return ".layers." in name and rows > 1 and columns > 1


class OfModel:
    """Muon for the matrices of a model's blocks, each by its canonical name, and torch's AdamW for all else."""

    def __init__(self, model: nn.Module, options: OptimOptions):
        self.model = model
        hidden = {n: t.detach() for n, t in experts.canonical(model) if is_hidden(n, t.shape)}
        self.muon = Muon(hidden, options)
        of_muon = {t.untyped_storage().data_ptr() for t in hidden.values()}
        rest = [p for p in model.parameters() if p.untyped_storage().data_ptr() not in of_muon]
        groups = [
            {"params": [p for p in rest if p.ndim > 1], "weight_decay": options.weight_decay},
            {"params": [p for p in rest if p.ndim == 1], "weight_decay": 0.0},
        ]
        self.adamw = torch.optim.AdamW(groups, lr=options.lr, betas=options.betas, eps=options.eps, foreach=False)
        self.param_groups = [*self.muon.param_groups, *self.adamw.param_groups]

    def step(self) -> None:
        gradients = experts.canonical(self.model, gradients=True)
        self.muon.step({n: g for n, g in gradients if n in self.muon.values})
        self.adamw.step()
