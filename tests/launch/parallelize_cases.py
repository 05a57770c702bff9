"""Modules with chance, statistics and stages of their own, under `shoal.parallelize`, in ranks."""

from __future__ import annotations

import warnings
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import shoal
from shoal.mesh import Seat


class Net(nn.Module):
    """Four layers and a head; `between` is called behind each layer."""

    def __init__(self, between: Any = None):
        super().__init__()
        self.layers, self.head = nn.ModuleList(nn.Linear(8, 8) for _ in range(4)), nn.Linear(8, 1)
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.relu(layer(x))
            x = x if self.between is None else self.between(self, x)
        return self.head(x)


class Masked(nn.Module):
    """Says which elements it dropped."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 1)
        self.masks: list[list[bool]] = []

    def forward(self, x: Tensor) -> Tensor:
        mask = F.dropout(torch.ones(len(x), 1, dtype=x.dtype), 0.5, self.training)
        if self.training:
            self.masks.append((mask > 0).tolist())
        return self.down(self.up(x).relu() * mask)


class Attention(nn.Module):
    def __init__(self, dropout: float):
        super().__init__()
        self.up, self.head = nn.Linear(8, 8), nn.Linear(8, 1)
        self.attention = nn.MultiheadAttention(8, 2, dropout=dropout, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(x)[:, None]
        return self.head(self.attention(x, x, x, need_weights=False)[0][:, 0])


class Functional(nn.Module):
    """Batch norm by the function, with statistics under names of its own."""

    def __init__(self, keeps: bool = True):
        super().__init__()
        self.linear, self.head = nn.Linear(8, 8), nn.Linear(8, 1)
        self.register_buffer("mean", torch.zeros(8) if keeps else None)
        self.register_buffer("variance", torch.ones(8) if keeps else None)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.batch_norm(self.linear(x), self.mean, self.variance, training=self.training))


class Instance(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv1d(1, 4, 3, padding=1), nn.InstanceNorm1d(4), nn.Linear(32, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.conv(x[:, None])).flatten(1))


class Recurrent(nn.Module):
    def __init__(self, dropout: float):
        super().__init__()
        self.lstm, self.head = nn.LSTM(8, 8, 2, dropout=dropout, batch_first=True), nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x[:, None])[0][:, -1])


class Bypassed(nn.Module):
    """Blocks whose own forward nobody calls."""

    def __init__(self):
        super().__init__()
        self.blocks, self.head = nn.ModuleList(nn.Sequential(nn.Linear(8, 8)) for _ in range(2)), nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block[0](x).tanh()
        return self.head(x)


def _louder(net: Net, x: Tensor) -> Tensor:
    return x if net.training else 2 * x


MODULES = {
    "net": Net,
    "masked": Masked,
    "dropout": lambda: Net(lambda net, x: F.dropout(x, 0.5, net.training)),
    "attention with dropout": lambda: Attention(0.5),
    "attention": lambda: Attention(0.0),
    "lstm with dropout": lambda: Recurrent(0.5),
    "lstm": lambda: Recurrent(0.0),
    "own mode": lambda: Net(_louder),
    "batch_norm": Functional,
    "batch_norm without statistics": lambda: Functional(keeps=False),
    "instance norm": Instance,
    "bypassed": Bypassed,
}


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    return MODULES[name]().double()


def batch(samples: int = 16) -> tuple[Tensor, Tensor]:
    x = torch.randn(samples, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return x, x[:, :1].tanh()


def loss(out: Tensor, target: Tensor) -> Tensor:
    return (out - target).square().sum()


def reference(name: str, steps: int = 2) -> dict[str, Any]:
    """With nothing of shoal's."""
    module, (x, y) = build(name), batch()
    optimizer, losses = torch.optim.SGD(module.parameters(), lr=0.1), []
    for _ in range(steps):
        optimizer.zero_grad()
        value = loss(module(x), y) / len(x)
        value.backward()
        optimizer.step()
        losses.append(value.item())
    return {"losses": losses, "held_out": (loss(module.eval()(x), y) / len(x)).item()}


def start(seat: Seat, name: str, layout: str, **options: Any) -> shoal.training.own.Trained:
    torch.set_num_threads(1)
    given: dict[str, Any] = {"example": batch()[0][:4], "loss": loss, "optimizer": "sgd", "lr": 0.1} | options
    return shoal.parallelize(build(name), layout, seat=seat, **given)


def run(seat: Seat, name: str, layout: str, samples: int = 16, evaluate: bool = True) -> dict[str, Any]:
    """Losses of two steps, and of the same samples in evaluation; what was said; the sentence of a refusal."""
    said: dict[str, Any] = {"losses": [], "refused": "", "held_out": None}
    with warnings.catch_warnings(record=True) as caught, start(seat, name, layout) as trained:
        warnings.simplefilter("always")
        try:
            said["losses"] = [trained.step(trained.share(batch(samples))).loss for _ in range(2)]
            said["held_out"] = trained.evaluate(trained.share(batch(samples))) if evaluate else None
        except shoal.ShoalError as error:
            said["refused"] = str(error)
            said["chained"] = error.__cause__ is not None
    # Torch has warnings of its own, such as of an LSTM that is traced.
    return said | {"warned": [text for w in caught if "layout" in (text := str(w.message))]}


def masks(seat: Seat, layout: str) -> dict[str, Any]:
    """What each of two steps dropped, and what the process's own generator gives before and after."""
    module = build("masked")
    torch.manual_seed(seat.member)  # as after weights that were loaded: no rank is like another
    plan = {"up": "columns", "down": "rows"} if "tensor" in layout else None
    with shoal.parallelize(module, layout, plan, loss=loss, seat=seat, example=batch()[0][:4]) as trained:
        generator = torch.get_rng_state()
        for _ in range(2):
            trained.step(trained.share(batch()))
        assert torch.equal(torch.get_rng_state(), generator)
    return {"masks": module.masks}


def the_issues_call(seat: Seat, layout: str) -> dict[str, Any]:
    """`shoal.parallelize(module, layout)` and nothing else, where a launcher has said who is who."""
    torch.set_num_threads(1)
    module, (x, y) = build("net"), batch()
    whole = module(x).tolist()
    with mock.patch("shoal.launch.parallelize.seat_from_environment", return_value=seat):
        trained = shoal.parallelize(module, layout)
    with trained:
        part = len(x) // trained.readers
        mine = slice(part * trained.reader, part * (trained.reader + 1))
        try:
            trained.step(trained.share((x, y)))
        except shoal.ShoalError as error:
            refused = str(error)
        held_out = trained.evaluate(trained.share((x, y)), loss=loss)
        return {"out": trained(x[mine]).tolist(), "whole": whole[mine], "refused": refused, "held_out": held_out}


def forward(seat: Seat, layout: str) -> Any:
    """What a pipeline makes of the example; not under an autocast that it was not traced under."""
    with start(seat, "net", layout, loss=None) as trained:
        try:
            with torch.autocast("cpu", torch.bfloat16):
                trained(batch()[0][:4])
        except shoal.ShoalError as error:
            assert "autocast is on around the pipeline" in str(error)  # noqa: PT017
        else:
            raise AssertionError("not refused")
        out = trained(batch()[0][:4])
        return None if out is None else out.tolist()


@contextmanager
def _saved() -> Any:
    """Elements that forward passes keep for backward, beside what modules hold."""
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        yield kept


def recomputed(seat: Seat, layout: str) -> dict[str, Any]:
    with start(seat, "net", layout) as trained, _saved() as kept:
        losses = [trained.step(trained.share(batch())).loss for _ in range(2)]
        return {"losses": losses, "kept": sum(kept), "held_out": trained.evaluate(trained.share(batch()))}
