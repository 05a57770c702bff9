"""Modules whose linear layers are shared by the tensor axis, in ranks."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from examples import hf_module
from torch import Tensor, nn

import shoal
from shoal.mesh import Seat
from tests.parallel import own_cases

PLAN = {"up": "columns", "down": "rows"}


class Adapter(nn.Module):
    """Two layers to cut, of which a part may be frozen, and a head."""

    def __init__(self, *frozen: str):
        super().__init__()
        self.up, self.down, self.head = nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(8, 1)
        for name in frozen:
            self.get_parameter(name).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.down(torch.relu(self.up(x))))


class Gained(nn.Module):
    """A gain of each head between columns and rows, and one of the whole behind them."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 1)
        self.g, self.after = nn.Parameter(torch.rand(4)), nn.Parameter(torch.rand(1))

    def forward(self, x: Tensor) -> Tensor:
        heads = self.up(x).view(len(x), -1, 4) * self.g
        return self.down(torch.relu(heads.flatten(1))) * self.after


class Encoder(nn.Module):
    """Torch's own layers, which in evaluation read their linear layers' weights past them."""

    def __init__(self):
        super().__init__()
        layers = (nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True) for _ in range(2))
        self.layers, self.head = nn.ModuleList(layers), nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, None] * torch.ones(3, 1, dtype=x.dtype)
        for layer in self.layers:
            x = layer(x)
        return self.head(x.mean(1))


def half_frozen() -> nn.Module:
    module = own_cases.hugging_face()
    module.model.layers[0].requires_grad_(False)
    return module


WHOLE = ("up.weight", "up.bias", "down.weight", "down.bias")
MODULES: dict[str, tuple[Any, dict[str, str] | None]] = {
    "frozen layers": (lambda: Adapter(*WHOLE), PLAN),
    "frozen weights": (lambda: Adapter("up.weight", "down.weight"), PLAN),
    "frozen biases": (lambda: Adapter("up.bias", "down.bias"), PLAN),
    "half frozen": (half_frozen, None),
    "summed": (Gained, PLAN | {"g": "summed"}),
    "encoder": (Encoder, {"layers.*.linear1": "columns", "layers.*.linear2": "rows"}),
}


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    return MODULES[name][0]().double()


def batch(name: str) -> tuple[Tensor, Tensor]:
    if name == "half frozen":
        return hf_module.batch(0, 8)
    x = torch.randn(8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return x, x[:, :1].tanh()


def loss(out: Any, target: Tensor) -> Tensor:
    if isinstance(out, Tensor):
        return (out - target).square().sum()
    return F.cross_entropy(out.logits.flatten(0, 1), target.flatten(), reduction="sum")


def reference(name: str, steps: int = 3) -> dict[str, Any]:
    """With nothing of shoal's."""
    module, (x, y) = build(name), batch(name)
    optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        (loss(module(x), y) / len(x)).backward()
        optimizer.step()
    with torch.no_grad():
        held_out = (loss(module.eval()(x), y) / len(x)).item()
    return {"weights": module.state_dict(), "held_out": held_out}


def start(seat: Seat, name: str, layout: str, plan: dict[str, str] | None = None) -> shoal.training.own.Trained:
    torch.set_num_threads(1)
    plan = plan or MODULES[name][1]
    example = batch(name)[0][:2]
    return shoal.parallelize(build(name), layout, plan, loss=loss, example=example, optimizer="sgd", lr=0.1, seat=seat)


def run(seat: Seat, name: str, layout: str, folder: str = "", steps: int = 3) -> dict[str, Any]:
    with start(seat, name, layout) as trained:
        for _ in range(steps):
            trained.step(trained.share(batch(name)))
        held_out = trained.evaluate(trained.share(batch(name)))
        if folder:
            trained.save(folder)
            with torch.no_grad():
                for shard in trained._held():
                    shard.local.zero_()
            trained.load(folder)
        return {"weights": {k: t.tolist() for k, t in trained.state_dict().items()}, "held_out": held_out}


def refused(seat: Seat, name: str, plan: dict[str, str]) -> str:
    try:
        start(seat, name, "tensor=2", plan).close()
    except shoal.ShoalError as error:
        return str(error)
    return ""
