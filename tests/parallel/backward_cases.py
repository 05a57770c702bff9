"""Modules with a backward of their own, which a graph does not record, and others that look like them, in ranks."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import shoal
from shoal.mesh import Seat
from shoal.parallel import foreign


class _Round(torch.autograd.Function):
    """Straight through: Bengio et al. 2013, "Estimating or Propagating Gradients Through Stochastic Neurons"."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


class _Reverse(torch.autograd.Function):
    """Ganin and Lempitsky 2015, "Unsupervised Domain Adaptation by Backpropagation"."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return -gradient


def _hooked(x: Tensor) -> Tensor:
    if x.requires_grad:
        x.register_hook(lambda gradient: gradient * 5)
    return x


class Net(nn.Module):
    """Three layers; `between` computes with what the first one makes."""

    def __init__(self, between: Callable[[Net, Tensor], Tensor]):
        super().__init__()
        self.up, self.middle, self.down = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 4)
        self.norm, self.frozen = nn.BatchNorm1d(8), nn.Linear(8, 8).requires_grad_(False)
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.between(self, self.up(x).tanh()).tanh())


def _checkpointed(reentrant: bool) -> Callable[[Net, Tensor], Tensor]:
    return lambda net, x: checkpoint(lambda h: net.middle(h).tanh(), x, use_reentrant=reentrant)


UNRECORDED: dict[str, Callable[[Net, Tensor], Tensor]] = {
    "straight through": lambda net, x: net.middle(_Round.apply(3 * x)),
    "reversal": lambda net, x: net.middle(_Reverse.apply(x)),
    "hook on a tensor": lambda net, x: net.middle(_hooked(x)),
    "reentrant checkpoint": _checkpointed(True),
}
RECORDED: dict[str, Callable[[Net, Tensor], Tensor]] = {
    "checkpoint": _checkpointed(False),
    "dropout": lambda net, x: net.middle(F.dropout(x, 0.5, net.training)),
    "batch norm and frozen": lambda net, x: net.frozen(net.norm(net.middle(x))),
}


def start(seat: Seat, name: str, layout: str, checked: bool = True) -> dict[str, Any]:
    """The sentence of a refusal; or the buffers, the random state before and after, and a gradient that was there."""
    torch.set_num_threads(1)
    torch.manual_seed(3)
    module = Net((UNRECORDED | RECORDED)[name]).double()
    x = torch.randn(8, 4, dtype=torch.float64)
    module.up.bias.grad = torch.ones(8, dtype=torch.float64)
    before, chance = {n: t.clone() for n, t in module.state_dict().items()}, torch.get_rng_state()
    patch = nullcontext() if checked else mock.patch.object(foreign, "refuse_unrecorded")
    try:
        with (
            patch,
            shoal.parallelize(module, f"{layout},micro_batch=2", example=x[:2], loss=_loss, seat=seat) as trained,
        ):
            state = trained.state_dict()
            kept = all(torch.equal(state[n], t) for n, t in before.items())
            gradients = {n: p.grad.tolist() for n, p in module.named_parameters() if p.grad is not None}
            same_chance = torch.equal(chance, torch.get_rng_state())
            done = trained.step(trained.share((x, x)))
            return {"kept": kept, "chance": same_chance, "gradients": gradients, "norm": done.gradient_norm}
    except shoal.ShoalError as error:
        return {"refused": str(error)}


def _loss(out: Tensor, target: Tensor) -> Tensor:
    return (out - target).square().sum()


def reference(name: str) -> float:
    """The norm of the gradient that the module has by itself, of the loss divided by the samples."""
    torch.manual_seed(3)
    module = Net(UNRECORDED[name]).double()
    x = torch.randn(8, 4, dtype=torch.float64)
    (_loss(module(x), x) / 8).backward()
    gradients = [p.grad.flatten() for p in module.parameters() if p.grad is not None]
    return torch.cat(gradients).norm().item()
